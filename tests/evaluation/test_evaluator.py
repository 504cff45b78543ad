"""The evaluator against plain reference computations, on real tiny models."""

import json
import math
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from new_process import run_python, run_together
from tiny_vlms import random_image

from rewarddance_hf import (
    RewardDanceEvaluator,
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
)


PARADIGMS = ("pairwise", "pointwise", "regressive")
NUM_ROWS = 7


def make_rows(count=NUM_ROWS):
    """Rows of which the third is a tie, in two categories."""
    return [
        {
            "prompt": f"a red circle {i}",
            "chosen": random_image(i, 40, 30 + i),
            "rejected": random_image(100 + i),
            "criteria": "quality" if i % 2 else None,
            "tie": i == 2,
            "category": "even" if i % 2 == 0 else "odd",
        }
        for i in range(count)
    ]


def make_scorer(folder, paradigm="pairwise", **settings):
    torch.manual_seed(0)
    model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm, **settings)
    if paradigm == "regressive":
        torch.nn.init.normal_(model.score.weight, std=0.5)
    return RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(folder), batch_size=3)


@pytest.fixture(scope="module")
def scorers(vlm_folder):
    """One scorer for each paradigm. Read only."""
    return {paradigm: make_scorer(vlm_folder("internvl"), paradigm) for paradigm in PARADIGMS}


def ask(scorer, row, sample, reference):
    batch = scorer.processor(
        [row[sample]],
        [row["prompt"]],
        [row[reference]] if scorer.is_pairwise else None,
        criteria=row["criteria"],
    )
    with torch.no_grad():
        output = scorer.model(**batch)
    return output.logits.item(), output.scores.item()


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_metrics_equal_a_plain_loop(scorers, paradigm):
    """Every metric is that of a loop over single questions."""
    scorer, rows = scorers[paradigm], make_rows()
    got = RewardDanceEvaluator(rows, tie_margin=0.01)(scorer)
    preferences, rewards = [], []
    for row in rows:
        (chosen_logit, chosen_score), (rejected_logit, rejected_score) = (
            ask(scorer, row, *pair) for pair in (("chosen", "rejected"), ("rejected", "chosen"))
        )
        rewards += [chosen_score, rejected_score]
        if paradigm == "pairwise":
            preferences.append([chosen_logit, -rejected_logit])
        else:
            preferences.append([chosen_logit - rejected_logit] * 2)
    probabilities = 1 / (1 + np.exp(-np.array(preferences)))
    untied = [i for i in range(NUM_ROWS) if i != 2]
    averaged = probabilities.mean(axis=1)
    right = (probabilities > 0.5).mean(axis=1)
    predicted_tie = abs(averaged - 0.5) <= 0.01
    assert got["accuracy"] == pytest.approx(right[untied].mean())
    assert got["accuracy_low"] <= got["accuracy"] <= got["accuracy_high"]
    assert got["accuracy_swap_averaged"] == pytest.approx((averaged > 0.5)[untied].mean())
    with_ties = [predicted_tie[i] if i == 2 else averaged[i] > 0.5 and not predicted_tie[i] for i in range(NUM_ROWS)]
    assert got["accuracy_with_ties"] == pytest.approx(np.mean(with_ties))
    assert got["order_consistency"] == pytest.approx(np.isin(right[untied], [0, 1]).mean())
    assert got["nll"] == pytest.approx(-np.log(probabilities[untied]).mean(), rel=1e-4)
    assert got["brier"] == pytest.approx(((1 - probabilities[untied]) ** 2).mean(), rel=1e-4)
    assert got["mean_reward"] == pytest.approx(np.mean(rewards), rel=1e-4)
    assert (got["num_rows"], got["num_ties"]) == (NUM_ROWS, 1)
    assert got["category/even/accuracy"] == pytest.approx(right[[0, 4, 6]].mean())
    assert got["category/odd/accuracy"] == pytest.approx(right[[1, 3, 5]].mean())
    assert all(isinstance(value, float) for value in got.values())
    assert 0 <= got["ece"] <= 1
    if paradigm != "pairwise":
        assert got["order_consistency"] == 1


def test_results_of_rows_stay(scorers):
    """What the judge said about each row can be looked at afterwards."""
    scorer, rows = scorers["pairwise"], make_rows()
    evaluator = RewardDanceEvaluator(rows)
    assert evaluator.results is None
    evaluator(scorer)
    results = evaluator.results
    assert results.probabilities.shape == (NUM_ROWS, 2)
    scores = scorer.score(
        [row["chosen"] for row in rows],
        [row["prompt"] for row in rows],
        [row["rejected"] for row in rows],
        criteria=[row["criteria"] for row in rows],
    )
    assert results.scores[:, 0] == pytest.approx(scores.numpy(), rel=1e-4)
    assert results.ties.tolist() == [i == 2 for i in range(NUM_ROWS)]
    assert results.categories == ["even" if i % 2 == 0 else "odd" for i in range(NUM_ROWS)]


def test_rows_are_told_from_others(tmp_path):
    """The fingerprint of rows is that of what is shown, wherever it lies: other texts, images, orders and ties have others."""

    def fingerprint(rows):
        evaluator = RewardDanceEvaluator(rows)
        evaluator(lambda images, prompts: range(len(images)))
        return evaluator.results.rows_fingerprint

    rows = make_rows()[:3]
    for i, row in enumerate(rows):
        for name in ("chosen", "rejected"):
            row[name].save(tmp_path / f"{i}-{name}.png")
            row[name] = str(tmp_path / f"{i}-{name}.png")
    want = fingerprint(rows)
    encoded = [{**row, "chosen": {"bytes": Path(row["chosen"]).read_bytes(), "path": "elsewhere.png"}} for row in rows]
    assert fingerprint([{**row, "category": "another", "number": 1} for row in encoded]) == want
    other = [
        rows[::-1],
        rows[:2],
        [{**rows[0], "chosen": rows[0]["rejected"]}, *rows[1:]],
        [{**rows[0], "condition": rows[0]["chosen"]}, *rows[1:]],
        [*rows[:2], {**rows[2], "tie": not rows[2].get("tie")}],
        *([*rows[:2], {**rows[2], name: "another"}] for name in ("prompt", "criteria")),
        [*rows[:2], {**rows[2], "task": "image-to-video"}],
    ]
    assert len({want, *map(fingerprint, other)}) == len(other) + 1


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_exchanged_labels_mirror_the_accuracy(scorers, paradigm):
    """With chosen and rejected exchanged the accuracy is one minus it: no order is favored."""
    rows = make_rows()
    exchanged = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    got, mirrored = (RewardDanceEvaluator(data)(scorers[paradigm]) for data in (rows, exchanged))
    assert got["accuracy"] == pytest.approx(1 - mirrored["accuracy"])
    assert got["order_consistency"] == mirrored["order_consistency"]


def test_equal_images_are_half_right(scorers):
    """A judge cannot know which of two equal images is chosen. One by one, because batching rounds rows differently."""
    row = make_rows(1)[0]
    for paradigm, scorer in scorers.items():
        metrics = RewardDanceEvaluator([{**row, "rejected": row["chosen"]}], batch_size=1)(scorer)
        assert metrics["accuracy"] == 0.5
        assert metrics["accuracy_swap_averaged"] == 0.5
        assert metrics["order_consistency"] == (0 if paradigm == "pairwise" else 1)


def test_forms_of_datasets_and_judges_agree(scorers):
    """A list, a `Dataset`, an object that can only be iterated; a scorer, and model with processor; any batch size."""

    class Sized:
        def __len__(self):
            return NUM_ROWS

        def __iter__(self):
            return iter(make_rows())

    scorer, rows = scorers["pairwise"], make_rows()
    want = RewardDanceEvaluator(rows)(scorer)
    assert RewardDanceEvaluator(datasets.Dataset.from_list(rows))(scorer) == pytest.approx(want, rel=1e-4)
    assert RewardDanceEvaluator(Sized())(scorer) == pytest.approx(want, rel=1e-4)
    assert RewardDanceEvaluator(rows, batch_size=1)(scorer) == pytest.approx(want, rel=1e-4)
    assert RewardDanceEvaluator(rows, batch_size=16)(scorer.model, scorer.processor) == pytest.approx(want, rel=1e-4)
    assert scorer.batch_size == 3


def test_batch_size_reaches_the_engine(scorers):
    """Forward passes have as many rows as the evaluator says, and the scorer keeps its own number."""
    scorer, rows = scorers["pairwise"], make_rows()
    sizes = []
    handle = scorer.model.get_output_embeddings().register_forward_hook(
        lambda module, arguments, output: sizes.append(len(output))
    )
    for batch_size, largest in ((1, 1), (2, 2), (None, 3)):
        sizes.clear()
        RewardDanceEvaluator(rows, batch_size=batch_size)(scorer)
        assert max(sizes) == largest
        assert sum(sizes) == 2 * NUM_ROWS
    handle.remove()
    assert scorer.batch_size == 3


PROCESSES = """
import json, sys
import torch
sys.path[:0] = sys.argv[1:3]
from test_evaluator import make_rows, make_scorer
from rewarddance_hf import RewardDanceEvaluator
from rewarddance_hf.parallel import Processes

scorer, rows = make_scorer(sys.argv[3]), make_rows()
evaluator = RewardDanceEvaluator(rows, batch_size=2)
metrics = evaluator(scorer)
assert evaluator.results.scores.shape == (7, 2)
bright = lambda images, prompts, **context: torch.tensor([float(image.size[0]) for image in images])
asked = [{"image": row["chosen"], "prompt": row["prompt"], "reference": row["rejected"]} for row in rows]
count = scorer.score_dataset(asked, sys.argv[4], save_every=2, show_progress=False)
again = scorer.score_dataset(asked, sys.argv[4], show_progress=False)
results = {"metrics": metrics, "function": evaluator(bright), "counts": [count, again]}
print(f"RESULTS {json.dumps(results)}\\n", end="", flush=True)
Processes.current().wait()
"""


@pytest.mark.slow
def test_two_processes_give_the_same(vlm_folder, tmp_path):
    """Each asks about its share; both have the figures of one process, and the file has each row once."""
    (tmp_path / "run.py").write_text(PROCESSES)
    here = Path(__file__).parent
    arguments = [here, here.parent, vlm_folder("internvl"), tmp_path / "scores.jsonl"]
    runs = run_together(tmp_path / "run.py", *arguments, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    lines = [line for run in runs for line in run.stdout.splitlines() if "RESULTS" in line]
    results = [json.loads(line.split("RESULTS ")[1]) for line in lines]
    scorer, rows = make_scorer(vlm_folder("internvl")), make_rows()
    evaluator = RewardDanceEvaluator(rows, batch_size=2)
    assert len(results) == 2
    for result in results:
        assert result["metrics"] == pytest.approx(evaluator(scorer), rel=1e-4)
        assert result["counts"] == [NUM_ROWS, 0]
    bright = evaluator(lambda images, prompts: torch.tensor([float(image.size[0]) for image in images]))
    assert results[0]["function"] == results[1]["function"] == bright
    want = scorer.score(*([row[name] for row in rows] for name in ("chosen", "prompt", "rejected"))).tolist()
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(NUM_ROWS))
    assert [line["score"] for line in lines] == pytest.approx(want, rel=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "run.py",
        "scores.jsonl",
        "scores.jsonl.fingerprint.json",
    ]


@pytest.mark.slow
def test_command_by_several_processes(vlm_folder, tmp_path):
    """`rewarddance evaluate` gives the figures of one process, once, and the calibrated judge is saved by one."""
    lines = ["prompt,chosen,rejected"]
    for i, row in enumerate(make_rows()):
        names = [f"{side}_{i}.png" for side in ("chosen", "rejected")]
        for side, name in zip(("chosen", "rejected"), names, strict=True):
            row[side].save(tmp_path / name)
        lines.append(f"{row['prompt']},{','.join(names)}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    settings = {"env": {**os.environ, "ACCELERATE_USE_CPU": "true"}, "cwd": tmp_path}
    common = ["-m", "rewarddance_hf", "evaluate", "--model", vlm_folder("internvl"), "--data", "pairs.csv", "--json"]
    results, temperatures = [], []
    for count in (1, 2, 3):
        command = [*common, "--output", f"{count}/result.json", "--calibrate", f"{count}/judge"]
        runs = run_together(*command, count=count, **settings) if count > 1 else [run_python(*command, **settings)]
        assert not any(run.returncode for run in runs), runs[0].stderr[-3000:]
        assert [bool(run.stdout) for run in runs] == [True] + [False] * (count - 1)
        written = json.loads((tmp_path / str(count) / "result.json").read_text())
        assert written == json.loads(runs[0].stdout)
        results.append(written["metrics"])
        temperatures.append(
            RewardDanceScorer.from_pretrained(tmp_path / str(count) / "judge").model.config.score_temperature
        )
    assert results[0]["num_rows"] == NUM_ROWS
    for other, temperature in zip(results[1:], temperatures[1:], strict=True):
        assert other == pytest.approx(results[0], rel=1e-4)
        assert temperature == pytest.approx(temperatures[0], rel=1e-4)


def test_clips_with_first_frames(scorers):
    """Rows of clips with a condition are asked as such."""
    rows = [
        {
            "prompt": "a red circle",
            "chosen": [random_image(0), random_image(1)],
            "rejected": [random_image(2), random_image(3)],
            "condition": random_image(4),
            "task": "image-to-video",
        }
    ]
    evaluator = RewardDanceEvaluator(rows)
    evaluator(scorers["pairwise"])
    want = scorers["pairwise"].score(
        [rows[0]["chosen"]],
        "a red circle",
        [rows[0]["rejected"]],
        conditions=[rows[0]["condition"]],
        task="image-to-video",
    )
    assert evaluator.results.scores[0, 0] == pytest.approx(want.item(), rel=1e-4)


def test_name_is_a_prefix(scorers):
    """Metrics of several datasets can live in one dictionary; the primary metric is one of them."""
    evaluator = RewardDanceEvaluator(make_rows(2), name="ood")
    metrics = evaluator(scorers["pointwise"])
    assert all(key.startswith("ood_") for key in metrics)
    assert evaluator.primary_metric in metrics
    assert evaluator.greater_is_better


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(vlm_folder, training):
    """An evaluation in the middle of a training leaves the model as it was, even if it fails."""
    scorer = make_scorer(vlm_folder("internvl"))
    scorer.model.train(training)
    evaluator = RewardDanceEvaluator(make_rows(3))
    evaluator(scorer.model, scorer.processor)
    assert scorer.model.training == training
    scorer.model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        evaluator(scorer.model, scorer.processor)
    assert scorer.model.training == training


# ---- calibration ----


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_calibration_lowers_the_likelihood_and_survives_saving(vlm_folder, tmp_path, paradigm):
    """The fitted temperature is stored, refines an earlier one, and what it promises is measured after loading."""
    scorer = make_scorer(vlm_folder("internvl"), paradigm, score_temperature=0.1)
    rows = make_rows(12)
    evaluator = RewardDanceEvaluator(rows)
    before = evaluator(scorer)
    report = evaluator.calibrate(scorer)
    assert report["nll_before"] == pytest.approx(before["nll"])
    assert report["ece_before"] == pytest.approx(before["ece"])
    assert report["nll_after"] < report["nll_before"]
    assert report["score_temperature"] == scorer.model.config.score_temperature
    scorer.save_pretrained(tmp_path)
    loaded = RewardDanceScorer.from_pretrained(tmp_path)
    assert loaded.model.config.score_temperature == pytest.approx(report["score_temperature"])
    after = RewardDanceEvaluator(rows)(loaded)
    assert after["nll"] == pytest.approx(report["nll_after"], rel=1e-3)
    assert after["ece"] == pytest.approx(report["ece_after"], abs=1e-3)
    assert after["accuracy"] == before["accuracy"]


def test_calibration_is_a_fixed_point(vlm_folder):
    """A judge that starts with another temperature ends with the same, and a second fit changes nothing."""
    temperatures = []
    for start in (0.5, 2.0):
        scorer = make_scorer(vlm_folder("internvl"), "regressive", score_temperature=start)
        rows = [{**row, "tie": False} for row in make_rows(8)]
        # Label by the judge itself in all rows but one, so that the best temperature is not at a bound.
        evaluator = RewardDanceEvaluator(rows)
        evaluator(scorer)
        log_odds = evaluator.results.log_odds[:, 0]
        for i in np.flatnonzero((log_odds < 0) != (abs(log_odds) == abs(log_odds).min())):
            rows[i] = {**rows[i], "chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]}
        evaluator = RewardDanceEvaluator(rows)
        temperatures.append(evaluator.calibrate(scorer)["score_temperature"])
        again = evaluator.calibrate(scorer)
        assert again["score_temperature"] == pytest.approx(temperatures[-1], rel=1e-2)
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-2)


def test_calibration_from_results(vlm_folder):
    """What was asked already need not be asked again."""
    scorer, other = (make_scorer(vlm_folder("internvl")) for _ in range(2))
    evaluator = RewardDanceEvaluator(make_rows(6))
    evaluator(scorer)
    evaluator.dataset = None  # must not be read
    got = evaluator.calibrate(scorer, results=evaluator.results)
    want = RewardDanceEvaluator(make_rows(6)).calibrate(other.model, other.processor)
    assert got == pytest.approx(want, rel=1e-3)


# ---- errors ----


def test_wrong_datasets():
    """No rows, no length, missing columns: found and wanted are named."""
    with pytest.raises(ValueError, match="`dataset` is empty"):
        RewardDanceEvaluator([])
    with pytest.raises(ValueError, match="without a length"):
        RewardDanceEvaluator(iter(make_rows(1)))
    with pytest.raises(ValueError, match=r"lacks the columns \['chosen'\]; it has \['prompt', 'rejected', 'win'\]"):
        RewardDanceEvaluator(datasets.Dataset.from_dict({"prompt": ["a"], "rejected": ["b"], "win": ["c"]}))


def test_wrong_arguments():
    """Arguments out of range are named."""
    with pytest.raises(ValueError, match="`bootstrap_samples` is 0"):
        RewardDanceEvaluator(make_rows(1), bootstrap_samples=0)
    with pytest.raises(ValueError, match="`tie_margin` is 0.5"):
        RewardDanceEvaluator(make_rows(1), tie_margin=0.5)


def test_wrong_rows(scorers, tmp_path):
    """A row that lacks a column or holds a corrupt image is named by its index."""
    rows = make_rows(5)
    with pytest.raises(ValueError, match=r"`row 4` lacks the columns \['rejected'\]"):
        RewardDanceEvaluator([*rows[:4], {"prompt": "a", "chosen": rows[0]["chosen"]}])(scorers["pairwise"])
    with pytest.raises(ValueError, match="`chosen of row 3` cannot be read"):
        RewardDanceEvaluator([*rows[:3], {**rows[3], "chosen": b"no image"}])(scorers["pairwise"])
    encoded = datasets.Dataset.from_list(
        [{"prompt": "a", "chosen": {"bytes": b"no image", "path": None}, "rejected": rows[0]["rejected"]}],
        features=datasets.Features(
            {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
        ),
    )
    with pytest.raises(ValueError, match="`chosen of row 0` cannot be read"):
        RewardDanceEvaluator(encoded)(scorers["pairwise"])


def test_only_ties(scorers):
    """Accuracy of ties is not defined, and says so."""
    with pytest.raises(ValueError, match="has 1 rows and all are ties"):
        RewardDanceEvaluator([{**make_rows(1)[0], "tie": True}])(scorers["pairwise"])


def test_model_without_processor(scorers):
    """A bare model cannot be asked."""
    with pytest.raises(ValueError, match="`processor` is None"):
        RewardDanceEvaluator(make_rows(1))(scorers["pairwise"].model)


def test_nan_names_the_rows_and_keeps_the_others(vlm_folder):
    """A judge that gives NaN late loses neither the number of the row nor what was measured before."""
    scorer = make_scorer(vlm_folder("internvl"), "regressive")
    scorer = RewardDanceScorer(scorer.model, scorer.processor, batch_size=3, engine="plain")  # in the order of rows
    rows = make_rows(5)
    want = RewardDanceEvaluator(rows)
    want(scorer)
    calls = []

    def spoil(module, arguments, output):
        calls.append(len(output))
        return output * math.nan if len(calls) == 3 else output

    scorer.model.score.register_forward_hook(spoil)
    evaluator = RewardDanceEvaluator(rows)
    with pytest.raises(ValueError, match=r"rows \[3, 4\] are NaN or infinite"):
        evaluator(scorer)
    assert evaluator.results.scores == pytest.approx(want.results.scores[:3])
