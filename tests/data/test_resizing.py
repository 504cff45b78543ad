"""Images resized once: the judge is given the same numbers, bad rows are named, the result is found again."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf import DataCollatorForRewardDance, RewardDanceProcessor, resize_images
from rewarddance_hf.data import resizing


WITHOUT_TILES = {"vlm_images_kwargs": {"crop_to_patches": False}}
SIZES = ((300, 200), (64, 64), (40, 40), (57, 91), (1000, 30))
BACKENDS = ("pil", pytest.param("torchvision", marks=pytest.mark.torchvision))
FAMILIES = {"internvl": WITHOUT_TILES, "qwen2_5_vl": {}, "qwen3_vl": {}, "gemma3": {}, "glm4v": {}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Folder of what is kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch):
    """Indices of the rows that were resized, with the first, which is looked at beforehand."""
    found = []
    original = resizing._Resizer.__call__

    def counting(self, row, index):
        found.append(index)
        return original(self, row, index)

    monkeypatch.setattr(resizing._Resizer, "__call__", counting)
    return found


def load_processor(vlm_folder, family="qwen3_vl", **kwargs):
    return RewardDanceProcessor.from_pretrained(vlm_folder(family), **FAMILIES.get(family, {}), **kwargs)


def make_rows(count):
    return [
        {"prompt": f"prompt {i}", "chosen": random_image(i), "rejected": random_image(1000 + i)} for i in range(count)
    ]


def encoded(image, format="PNG", **kwargs):
    stream = io.BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def shown(row):
    """Image of a row as a plain reader of files sees it."""
    media = row["bytes"] if isinstance(row, dict) else encoded(row)
    return Image.open(io.BytesIO(media))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_judge_is_given_the_same(family, backend, vlm_folder):
    """For images of any size, in pairs and alone, all inputs are equal bit by bit, and most images have another size."""
    processor = load_processor(vlm_folder, family, backend=backend)
    assert type(processor.image_processor).__name__.endswith("Pil") == (backend == "pil")
    rows = [
        {"prompt": f"p{i}", "chosen": random_image(i, *size), "rejected": random_image(50 + i, *reversed(size))}
        for i, size in enumerate(SIZES)
    ]
    resized = resize_images(datasets.Dataset.from_list(rows), processor)
    sizes = []
    for row, other in zip(rows, resized, strict=True):
        pairs = [[shown(which[name]).convert("RGB") for name in ("chosen", "rejected")] for which in (row, other)]
        sizes.append(pairs[1][0].size)
        for asked in (
            [processor([chosen], ["p"], [rejected]) for chosen, rejected in pairs],
            [processor([chosen], ["p"]) for chosen, _ in pairs],
        ):
            first, second = asked
            assert first.keys() == second.keys()
            for name in first:
                assert torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])), name
    assert sum(size != own for size, own in zip(sizes, SIZES, strict=True)) >= 3


def test_files_of_all_kinds(vlm_folder, tmp_path):
    """Paths, encoded bytes, transparent and turned images become plain RGB files, as the collator reads them; other columns stay."""
    processor = load_processor(vlm_folder)
    turned = Image.Exif()
    turned[0x0112] = 6
    transparent = Image.fromarray(np.dstack([np.asarray(random_image(1, 90, 60)), np.full((60, 90), 99, np.uint8)]))
    random_image(0, 90, 60).save(tmp_path / "turned.jpg", exif=turned)
    transparent.save(tmp_path / "transparent.png")
    rows = {
        "prompt": ["one", "two"],
        "chosen": [str(tmp_path / "turned.jpg"), str(tmp_path / "transparent.png")],
        "rejected": [{"bytes": encoded(random_image(i, 70, 50)), "path": None} for i in range(2)],
        "condition": [encoded(random_image(10 + i, 70, 50)) for i in range(2)],
        "margin": [1.0, None],
        "task": ["image-editing"] * 2,
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column("rejected", datasets.Image())
    resized = resize_images(dataset, processor)
    assert resized["margin"] == [1.0, None]
    assert resized["task"] == rows["task"]
    assert shown(resized[0]["chosen"]).size[0] < shown(resized[0]["chosen"]).size[1]  # upright
    for row, path in zip(resized, rows["chosen"], strict=True):
        assert row["chosen"]["path"] is None
        assert shown(row["chosen"]).mode == "RGB"
        before, after = (processor([media], ["p"])["pixel_values"] for media in (path, row["chosen"]))
        assert torch.equal(before, after)
    inputs = DataCollatorForRewardDance(processor)([dict(row) for row in resized])
    assert len(inputs["labels"]) == 2


def test_it_is_done_once(vlm_folder, tmp_path, calls):
    """A second call finds the files of the first, also after the tokenizer was used; other images and settings do not."""
    processor = load_processor(vlm_folder)
    datasets.Dataset.from_list(make_rows(6)).save_to_disk(tmp_path / "rows")

    def resize(processor, rows=slice(None)):
        calls.clear()
        stored = datasets.load_from_disk(str(tmp_path / "rows"))
        return resize_images(stored.select(range(*rows.indices(6))), processor), len(calls) - 1

    first, count = resize(processor)
    assert count == 6
    processor([random_image(0)], ["a prompt"])
    second, count = resize(processor)
    assert count == 0
    assert second[:] == first[:]
    assert resize(RewardDanceProcessor.from_pretrained(vlm_folder("qwen3_vl")))[1] == 0
    assert resize(RewardDanceProcessor.from_pretrained(vlm_folder("qwen3_vl"), background="red"))[1] == 6
    assert resize(processor, slice(1, 4))[1] == 3


def test_files_of_a_table_are_read_again_when_they_change(vlm_folder, tmp_path, cache, calls):
    """Rows in memory that name files, as those of a table, are kept too, until one of the files is another."""
    processor = load_processor(vlm_folder)
    for i in range(4):
        random_image(i, 70, 50).save(tmp_path / f"{i}.png")
    rows = [
        {"prompt": "p", "chosen": str(tmp_path / f"{i}.png"), "rejected": str(tmp_path / "3.png")} for i in range(3)
    ]

    def resize():
        calls.clear()
        return resize_images(datasets.Dataset.from_list(rows), processor)[:], len(calls) - 1

    first, count = resize()
    assert count == 3
    assert list(cache.rglob("*.arrow"))
    assert resize() == (first, 0)
    random_image(9, 70, 50).save(tmp_path / "1.png")
    second, count = resize()
    assert count == 3
    changed = [old != new for old, new in zip(first["chosen"], second["chosen"], strict=True)]
    assert changed == [False, True, False]


def test_a_plain_image_tells_nothing(vlm_folder):
    """Where images of a size are prepared in another way after resizing, rows stay, though a white one first looks the same."""
    processor = load_processor(vlm_folder, "gemma3")
    processor.image_processor.size = {"height": 28, "width": 56}  # its resizing keeps this, what follows does not
    original = type(processor.image_processor).rescale

    def by_size(self, image, scale, **kwargs):
        rescaled = original(self, image, scale, **kwargs)
        return rescaled if self.seen_size == (40, 40) else rescaled[:, ::-1]

    def prepare(self, images, *args, **kwargs):
        self.seen_size = images[0].shape[-2:]
        return preprocess(self, images, *args, **kwargs)

    preprocess = type(processor.image_processor)._preprocess
    kind = type(
        "GemmaThatTurnsImages", (type(processor.image_processor),), {"rescale": by_size, "_preprocess": prepare}
    )
    processor.image_processor.__class__ = kind
    white = {
        "prompt": "p",
        "chosen": Image.new("RGB", (40, 40), "white"),
        "rejected": Image.new("RGB", (40, 40), "white"),
    }
    with pytest.raises(ValueError, match="cannot be resized beforehand"):
        resize_images(datasets.Dataset.from_list([white, *make_rows(2)]), processor)


def test_several_processes_give_the_same(vlm_folder):
    """Rows come in their order, whoever resized them."""
    processor = load_processor(vlm_folder)
    dataset = datasets.Dataset.from_list(make_rows(5))
    assert resize_images(dataset, processor, num_proc=2)[:] == resize_images(dataset, processor)[:]


def test_clips_stay_as_they_are(vlm_folder):
    """Among images, a row with an animation is left to the collator."""
    processor = load_processor(vlm_folder)
    frames = [random_image(i, 50, 50) for i in range(3)]
    clip = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    rows = make_rows(2)
    rows = [{**row, **{name: encoded(row[name]) for name in ("chosen", "rejected")}} for row in rows]
    rows.append({"prompt": "it moves", "chosen": clip, "rejected": clip})
    resized = resize_images(datasets.Dataset.from_list(rows).cast_column("chosen", datasets.Image()), processor)
    assert resized[2]["chosen"]["bytes"] == clip
    assert resized[2]["rejected"]["bytes"] == clip
    assert shown(resized[0]["chosen"]).size == (32, 32)


def test_what_cannot_be_resized_is_refused(vlm_folder):
    """Tiles and streams are told before anything is computed; files and images that cannot be read or prepared are named."""
    dataset = datasets.Dataset.from_list(make_rows(3))
    with pytest.raises(ValueError, match=r"Images of `dataset\[0\]` cannot be resized .* cuts them into tiles"):
        resize_images(dataset, RewardDanceProcessor.from_pretrained(vlm_folder("llava_onevision")))
    processor = load_processor(vlm_folder)
    with pytest.raises(TypeError, match="`pairs` is a `IterableDataset`"):
        resize_images(dataset.to_iterable_dataset(), processor, name="pairs")
    with pytest.raises(ValueError, match=r"lacks the columns \['rejected'\]"):
        resize_images(dataset.remove_columns("rejected"), processor)
    line = [*make_rows(2), {"prompt": "p", "chosen": random_image(0, 400, 1), "rejected": random_image(1)}]
    with pytest.raises(
        ValueError, match=r"^dataset\[2\]: .* cannot be prepared by `Qwen3VLProcessor` .* drop the row"
    ):
        resize_images(datasets.Dataset.from_list(line), processor)
    broken = make_rows(3)
    broken[2]["rejected"] = {"bytes": encoded(random_image(1))[:60], "path": None}
    features = datasets.Features({**dataset.features, "rejected": datasets.Image(decode=False)})
    with pytest.raises(ValueError, match=r"rejected of dataset\[2\]"):
        resize_images(datasets.Dataset.from_list(broken, features=features), processor)
