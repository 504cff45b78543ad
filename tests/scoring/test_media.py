"""Media are read once on every path, and decide about the task."""

import contextlib
import inspect
import os

import numpy as np
import pytest
import torch
from PIL.PngImagePlugin import PngImageFile
from tiny_vlms import FAMILIES, random_image

from rewarddance_hf import (
    NoAnswerError,
    RewardDanceEvaluator,
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
)
from rewarddance_hf.rewards import as_reward
from rewarddance_hf.scoring.engine.media_desk import ImageDesk


@pytest.fixture(scope="module")
def judge(vlm_folder):
    folder = vlm_folder("internvl")
    return RewardDanceForYesScoring.from_pretrained(folder), RewardDanceProcessor.from_pretrained(folder)


@pytest.fixture
def reads(monkeypatch):
    """Widths of images whose pixels are decoded, once for each time."""
    widths = []
    load_end = PngImageFile.load_end

    def count(self):
        widths.append(self.width)
        return load_end(self)

    monkeypatch.setattr(PngImageFile, "load_end", count)
    return widths


def reason(scorer, files):
    with contextlib.suppress(NoAnswerError):
        scorer.reason(files[:2], "a", files[2:4], conditions=files[4:], num_samples=2, max_new_tokens=2)


DOORS = {
    "score": lambda scorer, files: scorer.score(files[:2], "a", files[2:4], conditions=files[4:]),
    "dimensions": lambda scorer, files: scorer.score(
        files[:2], "a", files[2:4], conditions=files[4:], dimensions=["alignment", "counting"]
    ),
    "compare": lambda scorer, files: scorer.compare(
        files[0], files[1], "a", condition=files[4], dimensions=["alignment"], explain=True, max_new_tokens=1
    ),
    "rank": lambda scorer, files: scorer.rank(files[:4], "a", condition=files[4]),
    "reason": reason,
    "dataset": lambda scorer, files: scorer.score_dataset(
        [{"image": files[i], "prompt": "a", "reference": files[2 + i], "condition": files[4 + i]} for i in range(2)],
        os.path.join(os.path.dirname(files[0]), "scores.jsonl"),
        show_progress=False,
    ),
}


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("door", DOORS)
def test_each_file_is_read_once(judge, reads, tmp_path, door, engine):
    """Samples, references and first frames are decoded once, whatever is asked about them."""
    files = [str(tmp_path / f"{i}.png") for i in range(6)]
    for i, file in enumerate(files):
        random_image(i, 30 + i, 40).save(file)
    DOORS[door](RewardDanceScorer(*judge, engine=engine), files)
    assert reads
    assert max(map(reads.count, reads)) == 1


def test_evaluation_reads_each_file_once(judge, reads, tmp_path):
    """Both orders of a row share its images, in one session for all rows."""
    for i in range(6):
        random_image(i, 30 + i, 40).save(tmp_path / f"{i}.png")
    rows = [
        {"prompt": "a", "chosen": tmp_path / f"{2 * i}.png", "rejected": tmp_path / f"{2 * i + 1}.png"}
        for i in range(3)
    ]
    scorer = RewardDanceScorer(*judge, batch_size=2)
    RewardDanceEvaluator(rows)(scorer)
    assert sorted(reads) == [30 + i for i in range(6)]
    assert scorer.statistics.num_questions == scorer.statistics.num_images == 6


def test_task_of_clips_is_inferred(judge):
    """Clips without a task are asked about as clips, with a first frame as image-to-video, by every door."""
    scorer = RewardDanceScorer(*judge)
    clips = [[random_image(i), random_image(i + 1)] for i in (0, 2)]
    first_frame = random_image(9)
    for condition, task in ((None, "text-to-video"), (first_frame, "image-to-video")):
        got, want = (
            scorer.score(clips[:1], "a", clips[1:], conditions=[condition], task=task) for task in (None, task)
        )
        assert got == want
        got, want = (scorer.compare(*clips, "a", condition=condition, task=task) for task in (None, task))
        assert got == want
        got, want = (scorer.rank(clips, "a", condition=condition, task=task).scores.tolist() for task in (None, task))
        assert got == want
    assert scorer.score(clips[:1], "a", clips[1:]) != scorer.score(clips[:1], "a", clips[1:], task="text-to-image")


def test_scorer_tells_what_it_takes(judge):
    """The signature of a scorer is that of `score`, so that columns of rows reach it under their names."""
    scorer = RewardDanceScorer(*judge)
    assert inspect.signature(scorer) == inspect.signature(scorer.score)
    images = [random_image(i) for i in range(4)]
    got = as_reward(scorer)(images[:2], ["a", "b"], references=images[2:], criteria=["red", None], unknown=[1, 2])
    want = scorer.score(images[:2], ["a", "b"], images[2:], criteria=["red", None])
    assert got.tolist() == want.tolist()


def test_fingerprint(judge, vlm_folder):
    """The same judge has one fingerprint however it is loaded; another temperature, wording or weight has another."""
    want = RewardDanceScorer(*judge).fingerprint()
    folder = vlm_folder("internvl")
    assert RewardDanceScorer.from_pretrained(folder, engine="plain", batch_size=1).fingerprint() == want
    model = RewardDanceForYesScoring.from_pretrained(folder)
    asking = RewardDanceProcessor.from_pretrained(folder, prompt_layout="text_first")
    got = RewardDanceScorer(model, asking).fingerprint()
    assert {key for key in want if got[key] != want[key]} == {"processor"}
    model.config.score_temperature = 2.0
    model.get_input_embeddings().weight.data += 1
    got = RewardDanceScorer(model, judge[1]).fingerprint()
    assert {key for key in want if got[key] != want[key]} == {"score_temperature", "weights"}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_images_of_a_known_size_are_prepared_alike(family, vlm_folder):
    """From the third image of a size on the image processor alone is asked: inputs, text and gradient are those of the processor."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family))
    images = [random_image(seed, 40, 56) for seed in range(4)]
    desk = ImageDesk(processor)
    for alone in (True, False):
        known = [desk._process(image, alone) for image in images]
        call = desk._calls.find(((40, 56), alone), lambda: None)
        assert call is not None
        fresh = [
            ImageDesk(RewardDanceProcessor.from_pretrained(vlm_folder(family)))._process(images[i], alone)
            for i in (2, 3)
        ]
        pixels = torch.from_numpy(np.array(images[3])).permute(2, 0, 1) / 255
        tensors = [pixels.clone().requires_grad_() for _ in range(2)]
        desks = desk, ImageDesk(RewardDanceProcessor.from_pretrained(vlm_folder(family)))
        graded = [desk._process(tensor, alone) for desk, tensor in zip(desks, tensors, strict=True)]
        for one, other in [*zip(known[2:], fresh, strict=True), graded]:
            assert one.expansion == other.expansion
            assert one.grid == other.grid
            assert one.inputs.keys() == other.inputs.keys()
            for name, value in one.inputs.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.inputs[name])), name
        for prepared in graded:
            (prepared.inputs["pixel_values"] ** 2).sum().backward()
        assert torch.equal(tensors[0].grad, tensors[1].grad)
        assert tensors[0].grad.abs().sum() > 0


def test_other_settings_are_noticed(vlm_folder):
    """What is known of a size belongs to the settings of the processor."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    image = random_image(0)
    before = [ImageDesk(processor)._process(image, True) for _ in range(3)][-1]
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    after = ImageDesk(processor)._process(image, True)
    assert not torch.equal(before.inputs["pixel_values"], after.inputs["pixel_values"])
