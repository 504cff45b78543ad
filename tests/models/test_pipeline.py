"""The "visual-preference" pipeline: the scorer's numbers, installed and from the checkpoint's own code."""

import json
import os

import pytest
from new_process import run_python
from tiny_vlms import random_image
from transformers import pipeline

from rewarddance_hf.models import RewardDanceForYesScoring, RewardDanceProcessor, VisualPreferencePipeline
from rewarddance_hf.scoring.scorer import RewardDanceScorer


IMAGES = [random_image(i) for i in range(4)]

REMOTE_SCRIPT = """
import json, sys
sys.modules["rewarddance_hf"] = None  # cannot be imported
import torch
from transformers import pipeline

torch.set_num_threads(1)
try:
    pipeline("visual-preference", model=sys.argv[1])
except ValueError as error:
    assert "trust_remote_code" in str(error), error
judge = pipeline(model=sys.argv[1], trust_remote_code=True)
answer = judge({"prompt": "a red circle", "images": sys.argv[2:]})
print()
print(json.dumps({**answer, "module": type(judge).__module__}))
"""


@pytest.fixture(scope="module")
def folders(vlm_folder, tmp_path_factory):
    """Checkpoints by paradigm, saved with the pipeline's own code."""
    saved = {}
    for paradigm in ("pairwise", "pointwise", "regressive"):
        saved[paradigm] = tmp_path_factory.mktemp(paradigm)
        model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm=paradigm)
        processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
        VisualPreferencePipeline(model, processor=processor).save_pretrained(saved[paradigm])
        processor.save_pretrained(saved[paradigm])
    return saved


@pytest.mark.parametrize("paradigm", ["pairwise", "pointwise", "regressive"])
def test_ranking_is_the_scorers(folders, paradigm):
    """Scores, wins and order of several images are those of `RewardDanceScorer.rank`, in every paradigm."""
    judge = pipeline("visual-preference", model=str(folders[paradigm]))  # installed: no trust is needed
    answer = judge({"prompt": "a red circle", "images": IMAGES, "criteria": "colors"}, questions_per_batch=5)
    want = RewardDanceScorer.from_pretrained(folders[paradigm]).rank(IMAGES, "a red circle", criteria="colors")
    assert answer["scores"] == pytest.approx(want.scores.tolist(), abs=1e-6)
    assert answer["wins"] == want.wins.tolist()
    assert answer["order"] == want.order


def test_single_samples_are_the_scorers(folders):
    """A sample with its reference, or alone where the judge is pointwise, gets the scorer's reward."""
    for paradigm in ("pairwise", "pointwise"):
        judge = pipeline("visual-preference", model=str(folders[paradigm]))
        reference = {"reference": IMAGES[1]} if paradigm == "pairwise" else {}
        got = judge({"prompt": "p", "image": IMAGES[0], **reference})["score"]
        references = [IMAGES[1]] if reference else None
        want = RewardDanceScorer.from_pretrained(folders[paradigm]).score([IMAGES[0]], "p", references)
        assert got == pytest.approx(want.item(), abs=1e-6)


def test_edits_are_the_scorers(folders):
    """Edits of a source image are judged beside it, one or several."""
    scorer = RewardDanceScorer.from_pretrained(folders["pairwise"])
    judge = pipeline("visual-preference", model=str(folders["pairwise"]))
    edit = {"prompt": "make it red", "condition": IMAGES[3]}
    want = scorer.rank(IMAGES[:3], "make it red", condition=IMAGES[3], task="image-editing")
    assert judge({**edit, "images": IMAGES[:3]})["scores"] == pytest.approx(want.scores.tolist(), abs=1e-6)
    got = judge({**edit, "image": IMAGES[0], "reference": IMAGES[1]})["score"]
    want = scorer.score(IMAGES[:1], "make it red", IMAGES[1:2], IMAGES[3:], task="image-editing")
    assert got == pytest.approx(want.item(), abs=1e-6)
    with pytest.raises(ValueError, match="`condition` is None, but the task is 'image-editing'"):
        judge({"prompt": "p", "images": IMAGES[:3], "task": "image-editing"})


def test_lists_of_inputs(folders):
    """Inputs of different kinds can be mixed in a list, one by one or in batches of the pipeline."""
    judge = pipeline("visual-preference", model=str(folders["pairwise"]))
    inputs = [
        {"prompt": "a", "images": IMAGES[:3]},
        {"prompt": "b", "image": IMAGES[0], "reference": IMAGES[1]},
        {"prompt": "c", "image": [IMAGES[0], IMAGES[1]], "reference": [IMAGES[2]] * 2, "task": "text-to-video"},
    ]
    one_by_one = judge(inputs)
    assert [sorted(answer) for answer in one_by_one] == [["order", "scores", "wins"], ["score"], ["score"]]
    for got, want in zip(judge(inputs, batch_size=2), one_by_one, strict=True):
        assert got == {name: pytest.approx(value, abs=1e-6) for name, value in want.items()}


def test_dimensions_and_examples_are_the_scorers(folders):
    """Scores by dimension and after examples are those of the scorer, also beside other inputs in a batch."""
    judge = pipeline("visual-preference", model=str(folders["pairwise"]))
    scorer = RewardDanceScorer.from_pretrained(folders["pairwise"])
    examples = [{"image": IMAGES[2], "reference": IMAGES[3], "prompt": "x", "verdict": "no"}]
    single = {"prompt": "p", "image": IMAGES[0], "reference": IMAGES[1]}
    inputs = [
        single,
        {**single, "dimensions": ["text", "binding"], "examples": examples},
        {**single, "examples": examples},
    ]
    inputs.append({"prompt": "p", "images": IMAGES[:2], "examples": examples})
    plain, by_dimension, shown, ranked = judge(inputs, batch_size=4, questions_per_batch=3)
    assert judge(inputs)[1]["dimensions"] == pytest.approx(by_dimension["dimensions"], abs=1e-6)
    arguments = ([IMAGES[0]], "p", [IMAGES[1]])
    want = scorer.score(*arguments, dimensions=["text", "binding"], examples=examples)[0].tolist()
    assert list(by_dimension) == ["dimensions"]
    assert by_dimension["dimensions"] == {
        "text": pytest.approx(want[0], abs=1e-6),
        "binding": pytest.approx(want[1], abs=1e-6),
    }
    assert plain["score"] == pytest.approx(scorer.score(*arguments).item(), abs=1e-6)
    assert shown["score"] == pytest.approx(scorer.score(*arguments, examples=examples).item(), abs=1e-6)
    assert shown["score"] != pytest.approx(plain["score"], abs=1e-6)
    want = scorer.rank(IMAGES[:2], "p", examples=examples).scores.tolist()
    assert ranked["scores"] == pytest.approx(want, abs=1e-6)


@pytest.mark.new_process
def test_remote_code_gives_the_same_scores(folders, tmp_path):
    """Without the package the checkpoint's own pipeline asks for trust, finds its task, and scores equally."""
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path, image in zip(paths, IMAGES, strict=False):
        image.save(path)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = run_python("-c", REMOTE_SCRIPT, folders["pairwise"], *paths, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["module"].startswith("transformers_modules.")
    want = pipeline("visual-preference", model=str(folders["pairwise"]))({"prompt": "a red circle", "images": paths})
    assert answer["scores"] == pytest.approx(want["scores"], abs=1e-6)
    assert answer["order"] == want["order"]


def test_a_checkpoint_keeps_its_pipeline(folders, tmp_path):
    """What `config.json` says about the pipeline survives loading with the package and saving again."""
    RewardDanceForYesScoring.from_pretrained(folders["pairwise"]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    assert saved["visual-preference"]["impl"] == "pipeline_rewarddance.VisualPreferencePipeline"


@pytest.mark.parametrize(
    ("paradigm", "inputs", "error", "match"),
    [
        ("pairwise", "a red circle", TypeError, "is of type `str`, but must be a dict"),
        ("pairwise", {"images": IMAGES}, ValueError, r"has the keys \['images'\], but must have `prompt`"),
        ("pairwise", {"prompt": "p"}, ValueError, "either `images` or `image`"),
        ("pairwise", {"prompt": "p", "image": IMAGES[0], "seed": 1}, ValueError, r"has the keys .*'seed'"),
        ("pairwise", {"prompt": "p", "image": IMAGES[0]}, ValueError, "`reference` is None, but a pairwise judge"),
        ("pointwise", {"prompt": "p", "image": "nothing.png"}, ValueError, "cannot be read as an image"),
        ("pointwise", {"prompt": "p", "image": IMAGES[0], "reference": IMAGES[1]}, ValueError, "was given, but a"),
        ("pairwise", {"prompt": "p", "images": IMAGES[:1]}, ValueError, "has 1 entries, but must have 2 or more"),
        ("pairwise", {"prompt": "p", "images": IMAGES, "reference": IMAGES[0]}, ValueError, "Leave it out"),
        (
            "pairwise",
            {"prompt": "p", "images": IMAGES, "dimensions": ["text"]},
            ValueError,
            "single `image` is scored",
        ),
        ("pairwise", {"prompt": 3, "images": IMAGES}, TypeError, "`prompt` is of type `int`"),
    ],
)
def test_bad_inputs_are_refused(folders, paradigm, inputs, error, match):
    """What is wrong with an input is said before the model runs."""
    judge = pipeline("visual-preference", model=str(folders[paradigm]))
    with pytest.raises(error, match=match):
        judge(inputs)
