"""Questions: one value, whose task follows from its sample and whose media are read once."""

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf.data.collator import DataCollatorForRewardDance
from rewarddance_hf.models import RewardDanceProcessor
from rewarddance_hf.models.clips_rewarddance import Clip
from rewarddance_hf.models.prompting_rewarddance import CRITERIA
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.models.tasks_rewarddance import infer_task


IMAGES = [random_image(i) for i in range(5)]


@pytest.fixture(scope="module")
def processor(vlm_folder):
    return RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))


@pytest.fixture
def files(tmp_path):
    """Paths of five images."""
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(5)]


@pytest.fixture
def reads(monkeypatch):
    """How often each file was opened as an image."""
    counts, opened = Counter(), Image.open

    def count(file, *arguments, **options):
        counts[str(file) if isinstance(file, (str, os.PathLike)) else file.name] += 1
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Image, "open", count)
    return counts


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def text_of(processor, batch):
    return processor.tokenizer.decode(batch["input_ids"][0])


def test_lists_are_a_door_to_questions(processor):
    """A call with lists is the same as one with questions, which may differ in everything."""
    example = {"image": IMAGES[2], "reference": IMAGES[3], "prompt": "e", "verdict": "no"}
    shown = processor.read_examples([example])
    want = processor(
        *(IMAGES[:2], ["a", "b c"], IMAGES[2:4], [None, IMAGES[4]]), criteria=["x", None], examples=[example]
    )
    first = Question(IMAGES[0], "a", IMAGES[2], criteria="x", examples=shown)
    second = Question(IMAGES[1], "b c", IMAGES[3], condition=IMAGES[4], examples=shown)
    assert_same(processor.encode([first, second]), want)
    mixed = processor.encode([first, Question(IMAGES[1], "pointwise")])
    ids = [row[mask == 1] for row, mask in zip(mixed["input_ids"], mixed["attention_mask"], strict=True)]
    for row, question in zip(ids, (first, Question(IMAGES[1], "pointwise")), strict=True):
        torch.testing.assert_close(row, processor.encode([question])["input_ids"][0], rtol=0, atol=0)


def test_files_are_read_once(processor, files, reads):
    """Each file of a question is opened once: by the processor, by the collator, and never when it is loaded."""
    processor(files[:2], ["a", "b"], files[2:4], [files[4], None])
    assert reads == {str(file): 1 for file in files}
    reads.clear()
    for paradigm in ("pairwise", "pointwise"):
        rows = [{"prompt": "a", "chosen": files[0], "rejected": files[1], "condition": files[2]}]
        DataCollatorForRewardDance(processor, paradigm)(rows)
        assert reads == {str(file): 1 for file in files[:3]}
        reads.clear()
    question = processor.load(Question(files[0], "a", files[1], condition=files[2]))
    assert reads == {str(file): 1 for file in files[:3]}
    batch = processor.encode([question, replace(question, sample=question.reference, reference=question.sample)])
    assert sum(reads.values()) == 3
    assert_same(batch, processor(files[:2], ["a"] * 2, [files[1], files[0]], [files[2]] * 2))


def test_loading_again_is_free(processor):
    """What is loaded stays the very same objects, and an image in a task about videos stays an image."""
    question = Question(IMAGES[0], "a", Clip(IMAGES[1:4], fps=2), condition=IMAGES[4], task="image-to-video")
    loaded = processor.load(question)
    again = processor.load(loaded)
    for before, after in zip(loaded.images, again.images, strict=True):
        assert before is after
    assert (again.sample.marks, again.reference.marks) == (loaded.sample.marks, loaded.reference.marks)
    assert_same(processor.encode([again]), processor.encode([question]))
    with pytest.raises(ValueError, match=r"`image` is a clip of a single frame, but the task 'text-to-video'"):
        processor.load(Question([IMAGES[0]], "a", task="text-to-video"))


def test_tasks_follow_from_samples(processor):
    """An image is an image and a clip is one in every form; a condition is a clip's first frame, and the source of an image."""
    clips = [IMAGES, tuple(IMAGES), np.stack([np.asarray(i) for i in IMAGES]), torch.rand(3, 3, 8, 8), Clip(IMAGES)]
    for clip in [*clips, processor.load_frames(IMAGES), processor.open_clip(IMAGES)]:
        assert infer_task(clip) == "text-to-video"
        assert infer_task(clip, IMAGES[0]) == "image-to-video"
    for image in (IMAGES[0], torch.rand(3, 8, 8), IMAGES[:1], processor.load_frames(IMAGES[0])):
        assert infer_task(image) == "text-to-image"
        assert infer_task(image, IMAGES[1]) == "image-editing"

    def asks_by(wanted, *arguments, **named):
        return CRITERIA[wanted] in text_of(processor, processor(*arguments, **named))

    clips = torch.rand(2, 3, 3, 20, 20)
    assert asks_by("text-to-video", clips, ["x", "y"])
    assert asks_by("image-to-video", clips, ["x", "y"], conditions=[IMAGES[0]] * 2)
    assert asks_by("text-to-image", clips, ["x", "y"], task="text-to-image")
    assert asks_by("text-to-image", IMAGES[:1], ["x"])
    assert asks_by("image-editing", IMAGES[:1], ["x"], conditions=IMAGES[1:2])
    assert asks_by("text-to-image", IMAGES[:1], ["x"], conditions=IMAGES[1:2], task="text-to-image")
    assert asks_by("text-to-video", IMAGES[:1], ["x"], task="text-to-video")


def test_clips_of_rows_are_videos(processor):
    """A preference row of clips without a task is asked about, and explained, as one of videos."""
    row = {"prompt": "p", "chosen": IMAGES[:2], "rejected": IMAGES[2:4], "rationale": "{chosen} moves"}
    collator = DataCollatorForRewardDance(processor, with_rationales=True)
    text = text_of(processor, collator([row]))
    assert CRITERIA["text-to-video"] in text
    assert "Video 1 moves" in text or "Video 2 moves" in text


def test_arguments_of_processors(processor):
    """Tensors are those of PyTorch; other arguments go to the wrapped processor, which ignores what it does not know."""
    question = ([IMAGES[0]], ["x"])
    want = processor(*question)
    assert_same(processor(*question, return_tensors="pt", unknown=1), want)
    padded = processor(*question, padding="max_length", max_length=300)
    assert padded["input_ids"].shape == (1, 300)
    with pytest.raises(ValueError, match="`return_tensors` is 'np', but the model takes PyTorch tensors"):
        processor(*question, return_tensors="np")
    with pytest.raises(TypeError, match="text"):
        processor(*question, text="<image>")


def test_chats_become_inputs(family, judge):
    """A chat that is tokenized is that of the wrapped processor, with the settings of this one."""
    _, processor = judge(family)
    question = processor.load(Question(IMAGES[0], "a red circle", IMAGES[1]))
    messages, images = processor.write_messages(question)
    rest = iter(images)
    for message in messages:
        message["content"] = [
            {"type": "image", "image": next(rest)} if part["type"] == "image" else part for part in message["content"]
        ]
    got = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert_same(got, processor.encode([question]))


@pytest.mark.parametrize(
    ("sample", "error", "match"),
    [
        (None, TypeError, r"`images\[1\]` is of type `NoneType`, but must be an image or a clip. Drop the row"),
        ("https://a.b/c.png", ValueError, r"`images\[1\]` is the address 'https://a.b/c.png', but nothing is downlo"),
        ("data:image/png;base64,iVBOR", ValueError, r"`images\[1\]` is the address 'data:image.* path or the bytes"),
        (torch.full((3, 8, 8), 1.0002), ValueError, r"`images\[1\]` has values from 1.0002 to 1.0002, but .*clamp"),
    ],
)
def test_wrong_samples_are_named(processor, sample, error, match):
    """What cannot be an image is answered with its row and what to do."""
    with pytest.raises(error, match=match):
        processor([IMAGES[0], sample], ["a", "b"])


@pytest.mark.parametrize("family_with_limit", ["qwen2_5_vl", "glm4v"])
def test_images_that_a_model_refuses_are_named(vlm_folder, family_with_limit):
    """Some image processors refuse very long images, without saying which."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family_with_limit))
    with pytest.raises(ValueError, match=r"`images\[1\]` and what it is shown with .*aspect ratio.* drop the row"):
        processor([IMAGES[0], Image.new("RGB", (3000, 10)), IMAGES[1]], ["a", "b", "c"])
