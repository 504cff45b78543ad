"""Criteria: what is asked by default stays word for word, text files are read, a checkpoint keeps what it was trained with."""

import json

import pytest
from tiny_vlms import random_image

from rewarddance_hf.models import RewardDanceProcessor
from rewarddance_hf.models.prompting_rewarddance import CRITERIA, DIMENSIONS, read_criteria


IMAGE_DIMENSIONS = {"alignment", "counting", "binding", "relations", "text", "aesthetics", "structure"}
VIDEO_DIMENSIONS = IMAGE_DIMENSIONS | {"motion", "consistency", "physics"}


def test_default_criteria_stay():
    """Zero-shot scores and saved measurements belong to this wording."""
    assert CRITERIA == {
        "text-to-image": "how well it shows every object, attribute, count and relation of the prompt, then visual quality: structure, "
        "detail and aesthetics",
        "text-to-video": "how well it shows every object, attribute, action and relation of the prompt, then motion: smooth, "
        "plausible and consistent over time, then visual quality",
        "image-to-video": "how faithful it stays to the given first frame, how well its motion follows the prompt, smooth, plausible "
        "and consistent over time, then visual quality",
        "image-editing": "how exactly it carries out the instruction, then how well it keeps everything else of the source image, "
        "then visual quality: structure, detail and aesthetics",
    }


def test_every_task_has_its_dimensions():
    """Each dimension is one line of its own."""
    assert {task: set(named) for task, named in DIMENSIONS.items()} == {
        "text-to-image": IMAGE_DIMENSIONS,
        "text-to-video": VIDEO_DIMENSIONS,
        "image-to-video": VIDEO_DIMENSIONS | {"faithfulness"},
        "image-editing": IMAGE_DIMENSIONS | {"faithfulness"},
    }
    for task, named in DIMENSIONS.items():
        texts = [*named.values(), CRITERIA[task]]
        assert len(set(texts)) == len(texts)
        assert all(text == " ".join(text.split()) and text.startswith(("how", "whether")) for text in texts)


def test_own_text_files(tmp_path):
    """Files of the same form make own criteria and dimensions, with or without overall ones."""
    (tmp_path / "logo.txt").write_text(
        "# A comment: left out.\noverall: how well: the\n  logo is drawn\n\n\nink: whether\n# x\nit dries"
    )
    (tmp_path / "text-to-image.txt").write_text("alignment: all\n")
    (tmp_path / "notes.md").write_text("no criteria")
    criteria, dimensions = read_criteria(tmp_path)
    assert criteria == {"logo": "how well: the logo is drawn"}
    assert dimensions == {"logo": {"ink": "whether it dries"}, "text-to-image": {"alignment": "all"}}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "has no file `TASK.txt`"),
        ("whether it is good", "has the paragraph 'whether it is good', but each must be a name"),
        ("alignment:\n\nmotion: x", "has the paragraph 'alignment:'"),
        ("two words: x", "has the paragraph 'two words: x'"),
        ("a: x\n\na: y", "has the paragraph 'a: y', but each must be a name of its own"),
    ],
)
def test_wrong_text_files(tmp_path, text, match):
    """A file that would drop or mix up criteria is refused."""
    if text is not None:
        (tmp_path / "task.txt").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_criteria(tmp_path)


def test_dimensions_are_saved(vlm_folder, tmp_path):
    """Own dimensions stand beside the default ones; a checkpoint keeps all, and one from before gets the default ones."""
    own = {"text-to-image": {"alignment": "whether it fits", "logo": "whether it is there"}, "sticker": {"cut": "c"}}
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), dimensions=own)
    assert processor.dimension_criteria("alignment") == "whether it fits"
    assert processor.dimension_criteria("logo") == "whether it is there"
    assert processor.dimension_criteria("cut", "sticker") == "c"
    assert processor.dimension_criteria("physics", task="text-to-video") == DIMENSIONS["text-to-video"]["physics"]
    assert DIMENSIONS["text-to-image"]["alignment"] != "whether it fits"
    processor.save_pretrained(tmp_path)
    assert RewardDanceProcessor.from_pretrained(tmp_path).dimensions == processor.dimensions

    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text())
    assert saved["dimensions"] == processor.dimensions
    file.write_text(json.dumps({name: value for name, value in saved.items() if name != "dimensions"}))
    assert RewardDanceProcessor.from_pretrained(tmp_path).dimensions == DIMENSIONS


def test_later_wording_does_not_change_a_checkpoint(vlm_folder, tmp_path, monkeypatch):
    """Text files of a later version that say something else do not reach a saved judge."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    question = [random_image(1)], ["x"]
    want = processor(*question)["input_ids"]
    processor.save_pretrained(tmp_path)
    monkeypatch.setitem(CRITERIA, "text-to-image", "other")
    monkeypatch.setitem(DIMENSIONS, "text-to-image", {"alignment": "other", "new": "later"})
    loaded = RewardDanceProcessor.from_pretrained(tmp_path)
    assert loaded(*question)["input_ids"].equal(want)
    assert loaded.dimension_criteria("alignment") == processor.dimension_criteria("alignment") != "other"
    assert loaded.dimension_criteria("new") == "later"
    assert not RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))(*question)["input_ids"].equal(want)


def test_unknown_dimensions(vlm_folder):
    """What does not exist for a task is answered with what does."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    with pytest.raises(
        ValueError, match=r"`dimension` is 'motion', but the task 'text-to-image' has \['alignment', .*'structure'\]"
    ):
        processor.dimension_criteria("motion")
    with pytest.raises(
        ValueError,
        match=r"`task` is 'text-to-song', but the processor has dimensions for \['image-editing', 'image-to",
    ):
        processor.dimension_criteria("alignment", "text-to-song")
    with pytest.raises(ValueError, match=r"`dimensions\['logo'\]` is 'x', but must be a dict"):
        RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), dimensions={"logo": "x"})
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), prompt_texts={"criteria": ""})
    with pytest.raises(ValueError, match=r"`prompt_texts\['criteria'\]` is empty, so the question holds no criteria"):
        processor.dimension_criteria("alignment")
