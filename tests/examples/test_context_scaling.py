"""The measurement of context scaling, run as a user would run it, at the smallest size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceScorer
from rewarddance_hf.scoring.reasoning import NoAnswerError
from rewarddance_hf.shapes.clips import NUM_FRAMES
from rewarddance_hf.shapes.loading import load_shapes
from rewarddance_hf.shapes.models import BASE_VLM, PROMPT_TEXTS, judge_processor
from rewarddance_hf.shapes.preferences import ShapesPreferences


EXAMPLE = Path(__file__).parents[2] / "examples" / "context_scaling.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("context_scaling", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, tmp_path, monkeypatch):
    """Run the example with arguments, and read its results."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["context_scaling.py", "--output_dir", str(tmp_path), *arguments])
        example.main()
        return json.loads((tmp_path / "results.json").read_text())

    return run


def test_measures_and_continues(run, tmp_path, capsys):
    """Both judges are measured on the same rows; what was trained is used again, and results of other parts are kept."""
    criteria = run("--parts", "criteria", "--steps", "1", "--rows", "8")["criteria"]
    # Who is not told the criteria gets one row of each pair wrong, whatever it has learned.
    assert criteria["without"]["accuracy"] == 0.5
    assert set(criteria) == {"with criteria", "without"}
    written = (tmp_path / "criteria_with" / "model.safetensors").stat().st_mtime_ns
    results = run(
        "--parts", "criteria", "faults", "--rows", "4", "--fault_rows", "2", "--judge", str(tmp_path / "criteria_with")
    )
    assert (tmp_path / "criteria_with" / "model.safetensors").stat().st_mtime_ns == written
    assert results["criteria"]["with criteria"]["num_rows"] == 4
    assert results["faults"]["id, all"]["num_rows"] == 2
    assert "| ood, all |" in capsys.readouterr().out


def test_judges_with_and_without_reasons(run):
    """All arms are trained and measured; a judge that has not learned to reason is wrong everywhere, which is counted."""
    results = run("--parts", "rationales", "--rationale_steps", "1", "--seeds", "1", "--rows", "6")["rationales"]
    arms = ("with rationale", "without", "reasons first")
    assert list(results) == [f"{arm}, 1 steps, seed 0, {split}" for arm in arms for split in ("id", "ood")]
    assert all(result["num_rows"] == 6 for result in results.values())
    untaught = results["reasons first, 1 steps, seed 0, id"]
    assert (untaught["accuracy"], untaught["no_answer"]) == (0.0, 1.0)
    assert "no_answer" not in results["without, 1 steps, seed 0, id"]


def test_accuracy_after_reasons(example, tmp_path):
    """It is that of each chain on its own in both orders, one without an answer being wrong."""
    # Chains of the base model end in captions: whether there are squares decides whether they reach this "answer".
    texts = {**PROMPT_TEXTS, "pairwise_reasons_question": "Describe it.", "answer": " squares"}
    model = RewardDanceForYesScoring.from_pretrained(BASE_VLM, score_normalization="yes_no")
    scorer = RewardDanceScorer(model, judge_processor(prompt_texts=texts))
    scorer.save_pretrained(tmp_path)
    rows = ShapesPreferences(10, "id")
    credits, failed = [], 0
    for row in rows:
        credits.append(0.0)
        for sample, reference in (("chosen", "rejected"), ("rejected", "chosen")):
            question = {"references": [row[reference]], "criteria": row["criteria"], "max_new_tokens": 64}
            try:
                score = float(scorer.reason([row[sample]], row["prompt"], **question).scores)
            except NoAnswerError:
                failed += 1
            else:
                credits[-1] += ((score > 0.5) == (sample == "chosen")) / 2
    assert 0 < failed < 20
    assert 0 < sum(credits)
    metrics = example.accuracy_after_reasons(tmp_path, rows)
    assert metrics["accuracy"] == pytest.approx(sum(credits) / 10)
    assert metrics["no_answer"] == failed / 20
    categories = [row["category"] for row in rows]
    for category in set(categories):
        of_category = [credit for credit, name in zip(credits, categories, strict=True) if name == category]
        assert metrics[f"category/{category}/accuracy"] == pytest.approx(sum(of_category) / len(of_category))


def test_one_frame_in_place_of_all(example):
    """Rows are as they were, but that all frames are the one."""
    rows = load_shapes("i2v-id", 3)
    for row, still in zip(rows, example.repeat_frame(rows, 2), strict=True):
        for name in ("chosen", "rejected"):
            assert [frame.tobytes() for frame in still[name]] == [row[name][2].tobytes()] * NUM_FRAMES
        unchanged = ("prompt", "criteria", "task", "category")
        assert all(still[name] == row[name] for name in unchanged)
        assert still["condition"].tobytes() == row["condition"].tobytes()
