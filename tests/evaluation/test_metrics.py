"""The `evaluate` modules: their examples, the package's own statistics, and loading from folders and Spaces."""

import doctest
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hub_server import LoopbackHub
from new_process import run_python

from rewarddance_hf.evaluation import statistics
from rewarddance_hf.hub.spaces import build_metric


evaluate = pytest.importorskip("evaluate", reason="needs evaluate: `pip install rewarddance_hf[metrics]`")

METRICS = Path(statistics.__file__).parent / "metrics"
NAMES = ("gsb", "order_consistency", "preference_accuracy", "reward_calibration", "reward_dynamics")

SPACE_SCRIPT = """
import json, sys
import evaluate

answers = {}
for name, arguments in json.loads(sys.argv[1]).items():
    answers[name] = evaluate.load(f"org/{name}").compute(**arguments)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def load():
    """Function that loads a module from its folder, without files in a shared cache."""
    return lambda name: evaluate.load(str(METRICS / name), keep_in_memory=True)


@pytest.fixture
def rows():
    """Log-odds of both orders for 200 rows, some exactly 0, and which rows are ties."""
    generator = np.random.default_rng(0)
    log_odds = generator.normal(0.7, 1.5, (200, 2))
    log_odds[:10] = 0
    log_odds[10:30] = generator.normal(0, 0.05, (20, 2))
    return log_odds, generator.random(200) < 0.2


def test_all_modules_are_tested():
    """Every module is in the list that the tests of this file go through."""
    assert sorted(path.stem for path in METRICS.glob("*/*.py")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_true(load, name):
    """The doctest in each module's description runs, on the module as `evaluate` loads it."""
    metric = load(name)
    runner = doctest.DocTestRunner()
    names = {"evaluate": SimpleNamespace(load=lambda _: metric)}
    runner.run(doctest.DocTestParser().get_doctest(metric.inputs_description, names, name, None, 0))
    assert runner.summarize().failed == 0
    assert runner.summarize().attempted >= 3


def test_preference_accuracy_is_the_evaluators(load, rows):
    """Accuracy, interval and accuracy with ties are those of `statistics`, whichever sample is called the first."""
    log_odds, ties = rows
    probabilities = statistics.sigmoid(log_odds)
    flipped = np.random.default_rng(1).random(len(ties)) < 0.5
    results = load("preference_accuracy").compute(
        predictions=np.where(flipped[:, None], 1 - probabilities, probabilities).tolist(),
        references=np.where(ties, 0.5, np.where(flipped, 0.0, 1.0)).tolist(),
        bootstrap_samples=200,
        seed=3,
    )
    credits = statistics.verdict_credits(log_odds[~ties]).mean(axis=1)
    low, high = statistics.bootstrap_interval(credits, 200, 3)
    assert results["accuracy"] == pytest.approx(credits.mean())
    assert (results["accuracy_low"], results["accuracy_high"]) == pytest.approx((low, high))
    want = statistics.accuracy_with_ties(probabilities.mean(axis=1), ties, 0.05)
    assert results["accuracy_with_ties"] == pytest.approx(want)
    assert (results["num_pairs"], results["num_ties"]) == (int((~ties).sum()), int(ties.sum()))


def test_order_consistency_is_the_evaluators(load, rows):
    """The share of equal verdicts is that of `statistics`; a judge of positions is found out by its second-place rate."""
    log_odds, _ = rows
    second, first = statistics.sigmoid(log_odds).T
    metric = load("order_consistency")
    results = metric.compute(predictions=second, swapped_predictions=first)
    assert results["order_consistency"] == pytest.approx(statistics.order_consistency(log_odds))
    biased = metric.compute(predictions=[0.9, 0.8], swapped_predictions=[0.2, 0.1])  # always the second place
    assert (biased["order_consistency"], biased["second_place_rate"]) == (0.0, 1.0)


def test_reward_calibration_is_the_evaluators(load, rows):
    """ECE and Brier score are those of `statistics`, also when predictions come in batches."""
    log_odds, _ = rows
    probabilities = statistics.sigmoid(log_odds[:, 0])
    labels = (np.random.default_rng(2).random(200) < probabilities).astype(float)
    metric = load("reward_calibration")
    for part in np.array_split(np.arange(200), 7):
        metric.add_batch(predictions=probabilities[part], references=labels[part])
    results = metric.compute()
    assert results["ece"] == pytest.approx(statistics.expected_calibration_error(probabilities, labels))
    assert results["brier"] == pytest.approx(statistics.brier_score(probabilities, labels))


def test_gsb_counts_and_interval(load):
    """Good, same and bad are counted by the margin; the interval is the bootstrap of their mean."""
    probabilities = np.array([0.9] * 50 + [0.52] * 20 + [0.54] + [0.1] * 29)
    results = load("gsb").compute(predictions=probabilities, bootstrap_samples=300, seed=4)
    assert (results["good"], results["same"], results["bad"]) == (50, 21, 29)
    verdicts = np.array([1.0] * 50 + [0.0] * 21 + [-1.0] * 29)
    assert results["gsb"] == pytest.approx(0.21)
    want = statistics.bootstrap_interval(verdicts, 300, 4)
    assert (results["gsb_low"], results["gsb_high"]) == pytest.approx(want)


def test_reward_dynamics_is_a_plain_loop(load):
    """Means and deviations are those of a plain loop over windows, and a constant beginning gives NaN as ratio."""
    rewards = np.random.default_rng(5).random(40)
    results = load("reward_dynamics").compute(predictions=rewards, window=8)
    wanted = [rewards[i : i + 8].std() for i in range(33)]
    assert results["stds"] == pytest.approx(wanted)
    assert results["means"] == pytest.approx([rewards[i : i + 8].mean() for i in range(33)])
    assert results["std_ratio"] == pytest.approx(wanted[-1] / wanted[0])
    assert math.isnan(load("reward_dynamics").compute(predictions=[1.0, 1.0, 0.0], window=2)["std_ratio"])


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        (
            "preference_accuracy",
            {"predictions": [1.5], "references": [1.0]},
            r"`predictions` must be numbers in \[0, 1\]",
        ),
        ("preference_accuracy", {"predictions": [math.nan], "references": [1.0]}, "`predictions` must be numbers"),
        ("preference_accuracy", {"predictions": [0.5], "references": [-1.0]}, "`references` must be numbers"),
        ("preference_accuracy", {"predictions": [0.5], "references": [0.5]}, "all are ties"),
        ("preference_accuracy", {"predictions": [[0.5, 0.1], [0.2]], "references": [1.0, 0.0]}, "equally many"),
        ("preference_accuracy", {"predictions": [0.5], "references": [1.0], "tie_margin": 0.5}, "`tie_margin` is 0.5"),
        (
            "preference_accuracy",
            {"predictions": [0.5], "references": [1.0], "bootstrap_samples": 0},
            "must be 1 or more",
        ),
        ("order_consistency", {"predictions": [0.5], "swapped_predictions": [2.0]}, "`swapped_predictions` must be"),
        ("reward_calibration", {"predictions": [-0.5], "references": [1.0]}, "`predictions` must be numbers"),
        ("reward_calibration", {"predictions": [0.5], "references": [1.0], "num_bins": 0}, "`num_bins` is 0"),
        ("gsb", {"predictions": [3.0]}, "`predictions` must be numbers"),
        ("gsb", {"predictions": [0.5], "same_margin": 0.7}, "`same_margin` is 0.7"),
        ("reward_dynamics", {"predictions": [1.0], "window": 2}, "`window` is 2, but must be between 1 and"),
        ("reward_dynamics", {"predictions": [math.inf], "window": 1}, "must be finite"),
    ],
)
def test_bad_arguments_are_refused(load, name, arguments, match):
    """Numbers that are no probabilities, and windows or margins out of range, are named."""
    with pytest.raises(ValueError, match=match):
        load(name).compute(**arguments)


def test_spaces_give_the_same_numbers(load, tmp_path):
    """Loaded by repository ID from Spaces over HTTP, in another process, each module gives what its folder gives."""
    arguments = {
        "preference_accuracy": {"predictions": [[0.9, 0.4], [0.3, 0.2]], "references": [1.0, 0.5]},
        "order_consistency": {"predictions": [0.9, 0.8], "swapped_predictions": [0.8, 0.3]},
        "reward_calibration": {"predictions": [0.9, 0.2], "references": [1.0, 1.0]},
        "gsb": {"predictions": [1.0, 0.5, 1.0]},
        "reward_dynamics": {"predictions": [0.0, 1.0, 0.5], "window": 2},
    }
    with LoopbackHub() as hub:
        for name in NAMES:
            space = build_metric(METRICS / name / f"{name}.py", tmp_path / name)
            hub.put(f"org/{name}", space, kind="space")
        environment = hub.environment(tmp_path / "home")
        done = run_python("-c", SPACE_SCRIPT, json.dumps(arguments), env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers == {name: load(name).compute(**arguments[name]) for name in NAMES}
