"""Tasks: one list of them, how edits are asked about, and what a judge that was saved before knows of them."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf.data.collator import DataCollatorForRewardDance
from rewarddance_hf.data.preference import check_row
from rewarddance_hf.models import RewardDanceProcessor
from rewarddance_hf.models.prompting_rewarddance import CRITERIA, DIMENSIONS, PROMPT_TEXTS
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.models.tasks_rewarddance import TASKS, task_of


ROOT = Path(__file__).parents[2]
SOURCE, FIRST, SECOND = random_image(0, 60, 30), random_image(1, 40, 40), random_image(2, 28, 56)
INSTRUCTION = 'make the "red" circle blue'
QUOTED = 'Editing instruction: "make the \\"red\\" circle blue"'
CRITERION = f"Criteria: {CRITERIA['image-editing']}"


@pytest.fixture(scope="module")
def processor(vlm_folder):
    return RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))


def texts(processor, batch):
    """Text of each question, with [] for an image."""
    decoded = processor.tokenizer.batch_decode(batch["input_ids"])
    return [re.sub(r"(<img>)?(<IMG_CONTEXT>)+(</img>)?", "[]", text) for text in decoded]


def assert_order(text, parts):
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert text.count("[]") == sum(part.count("[]") for part in parts)


def test_every_task_is_told_once():
    """What is known of tasks, their criteria, and the columns that the docs name are about the same tasks."""
    assert TASKS.keys() == CRITERIA.keys() == DIMENSIONS.keys()
    assert {task.condition_text for task in TASKS.values()} | {task.prompt_text for task in TASKS.values()} <= (
        PROMPT_TEXTS.keys()
    )
    # A sample without a task has exactly one that fits.
    assert len({(task.is_video, task.has_condition) for task in TASKS.values()}) == len(TASKS)
    columns = (ROOT / "rewarddance_hf" / "data" / "README.md").read_text()
    assert all(f"| `{task}` |" in columns for task in TASKS)
    options = (ROOT / "rewarddance_hf" / "cli" / "shared.py").read_text()
    assert all(f"{task}, " in options for task in TASKS)


def test_tasks_of_users():
    """A task that only a user's criteria know has no condition of its own; its name tells whether it is about videos."""
    assert not task_of("sticker").is_video
    assert task_of("my-video").is_video
    assert not task_of(None).is_video
    assert task_of("sticker").condition_text == "condition"


@pytest.mark.parametrize("layout", ["images_first", "text_first", "text_after_each"])
def test_edits_are_asked_about_beside_their_source(vlm_folder, layout):
    """The source image comes first and is named as such, the prompt is an instruction, in every layout and paradigm."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), prompt_layout=layout)
    (text,) = texts(processor, processor([SECOND], [INSTRUCTION], [FIRST], [SOURCE]))
    statement, images = [QUOTED, CRITERION], ["Source image: []", "\nImage 1: []", "\nImage 2: []"]
    question = ["Is image 2 better than image 1 by these criteria?"]
    if layout == "text_after_each":
        # The template ends the line of an image.
        images = [images[0], f"{images[1]}\n\n" + "\n".join(statement) + images[2]]
    assert_order(text, [*(statement + images if layout == "text_first" else images + statement), *question])
    (text,) = texts(processor, processor([SECOND], [INSTRUCTION], conditions=[SOURCE], reasons_first=True))
    images = ["Source image: []", "\nImage: []"]
    question = ["Is this a high-quality result by these criteria? Give your reasons"]
    assert_order(text, [*(statement + images if layout == "text_first" else images + statement), *question])
    assert "first frame" not in text


def test_batches_of_mixed_tasks(processor):
    """Edits stand beside samples of other tasks, each asked about as it would be alone."""
    questions = [
        Question(SECOND, INSTRUCTION, FIRST, SOURCE),
        Question(SECOND, "a", FIRST),
        Question([FIRST, FIRST], "it moves", [FIRST, FIRST], SOURCE),
        Question(SECOND, INSTRUCTION, FIRST, SOURCE, criteria="only colors"),
    ]
    found = texts(processor, processor.encode(questions))
    alone = [texts(processor, processor.encode([question]))[0] for question in questions]
    pad = processor.tokenizer.pad_token
    assert [text.replace(pad, "") for text in found] == [text.replace(pad, "") for text in alone]
    starts = ["Source image", "Image 1", "Given first frame", "Source image"]
    assert all(f"{start}: []" in text for start, text in zip(starts, found, strict=True))
    assert "Criteria: only colors" in found[3]


def test_transparent_source_images(processor):
    """A source image with transparency is shown on the same ground as all others."""
    source = SOURCE.convert("RGBA")
    source.putalpha(Image.new("L", source.size, 128))
    shown = Image.alpha_composite(Image.new("RGBA", source.size, "white"), source).convert("RGB")
    got = processor([FIRST], ["x"], conditions=[source])
    want = processor([FIRST], ["x"], conditions=[shown])
    torch.testing.assert_close(got["pixel_values"], want["pixel_values"], rtol=0, atol=0.02)


def test_examples_of_edits(processor):
    """An example of an edit brings its own source image."""
    example = {"image": FIRST, "prompt": "x", "reference": SECOND, "condition": SOURCE, "verdict": "yes"}
    (text,) = texts(processor, processor([SECOND], [INSTRUCTION], [FIRST], [SOURCE], examples=[example]))
    assert text.count("Source image: []") == text.count(CRITERION) == 2
    del example["condition"]
    for task, own in (("image-editing", {}), (None, {"task": "image-editing"})):
        with pytest.raises(ValueError, match=r"`examples\[0\]\['condition'\]` is None, but the task is 'image-edit"):
            processor([SECOND], ["x"], [FIRST], [SOURCE], task=task, examples=[{**example, **own}])


def test_missing_source_images(processor):
    """An edit without its source image is refused with the name of its row, before any image is read."""
    with pytest.raises(
        ValueError, match=r"`conditions\[1\]` is None, but the task is 'image-editing'.*Pass the source image, or"
    ):
        processor(["a.png", "b.png"], ["x", "y"], conditions=["c.png", None], task="image-editing")
    row = {"prompt": "x", "chosen": "a.png", "rejected": "b.png", "task": "image-editing"}
    for edit in (row, {**row, "condition": None}):
        with pytest.raises(ValueError, match=r"`condition of train\[3\]` is None, but the task is 'image-editing'"):
            check_row(edit, "train[3]")
        with pytest.raises(ValueError, match=r"`condition of row 0 of the batch` is None"):
            DataCollatorForRewardDance(processor)([edit])
    check_row({**row, "task": "image-to-video"})


@pytest.mark.parametrize("paradigm", ["pairwise", "pointwise"])
def test_rows_of_edits(processor, paradigm):
    """A row with a condition and no task is one of an edit, and its reasons are about images."""
    row = {"prompt": INSTRUCTION, "chosen": FIRST, "rejected": SECOND, "condition": SOURCE}
    row |= {"rationale": "{chosen} is right"}
    collator = DataCollatorForRewardDance(processor, paradigm, with_rationales=paradigm == "pairwise")
    for text in texts(processor, collator([row])):
        assert "Source image: []" in text
        assert QUOTED in text
        assert CRITERION in text
        assert re.search("Image [12] is right", text) or paradigm == "pointwise"


def test_judges_saved_before_know_edits(tmp_path):
    """A processor that was saved when there was no such task asks by the wording of now, and keeps it when saved again."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "saved_0_1" / "pairwise", tmp_path / "saved")
    processor = RewardDanceProcessor.from_pretrained(tmp_path / "saved")
    (before,) = texts(processor, processor([SECOND], [INSTRUCTION], [FIRST], [SOURCE]))
    assert "Source image: " in before
    assert QUOTED in before
    assert CRITERION in before
    assert processor.dimension_criteria("faithfulness", "image-editing") == DIMENSIONS["image-editing"]["faithfulness"]
    processor.save_pretrained(tmp_path / "again")
    again = RewardDanceProcessor.from_pretrained(tmp_path / "again")
    assert texts(again, again([SECOND], [INSTRUCTION], [FIRST], [SOURCE])) == [before]


def test_own_wording(vlm_folder):
    """The wording of edits can be changed as the rest; an instruction cannot be left out."""
    own = {"instruction": "Anweisung: {prompt}", "source_image": "Vorlage: "}
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), prompt_texts=own)
    (text,) = texts(processor, processor([SECOND], ["x"], [FIRST], [SOURCE]))
    assert 'Anweisung: "x"' in text
    assert "Vorlage: []" in text
    with pytest.raises(ValueError, match=r"`prompt_texts\['instruction'\]` is 'x', but must contain '\{prompt\}'"):
        RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), prompt_texts={"instruction": "x"})
