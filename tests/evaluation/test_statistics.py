"""Statistics against values computed by hand, and at their edges."""

import doctest

import numpy as np
import pytest

from rewarddance_hf.evaluation import statistics


def test_docstring_examples():
    """The examples in the docstrings are true."""
    runner = doctest.DocTestRunner()
    for function in (statistics.verdict_credits, statistics.expected_calibration_error):
        text = function.__doc__.replace("```", "")
        runner.run(doctest.DocTestParser().get_doctest(text, vars(statistics), function.__name__, None, 0))
    assert runner.summarize() == (0, 2)


def test_sigmoid_is_exact_at_the_edges():
    """Large log-odds neither overflow nor warn."""
    with np.errstate(all="raise", under="ignore"):
        got = statistics.sigmoid(np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0]))
    assert got == pytest.approx([0.0, 0.2689414213699951, 0.5, 0.7310585786300049, 1.0])
    assert got[2] == 0.5


def test_verdict_credits():
    """Each order of a row counts; equal probabilities are half right."""
    log_odds = np.array([[1.0, 2.0], [1.0, -1.0], [0.0, 0.0], [-3.0, -0.1]])
    assert statistics.verdict_credits(log_odds).mean(axis=1).tolist() == [1.0, 0.5, 0.5, 0.0]


def test_accuracy_with_ties():
    """A predicted tie is right for a tie and wrong elsewhere; the margin itself still is a tie."""
    probabilities = np.array([0.9, 0.5, 0.53125, 0.4, 0.5, 0.9])
    ties = np.array([False, False, False, False, True, True])
    assert statistics.accuracy_with_ties(probabilities, ties, 0.03125) == pytest.approx(2 / 6)
    assert statistics.accuracy_with_ties(probabilities, ties, 0.0) == pytest.approx(3 / 6)


def test_order_consistency():
    """The same verdict in both orders is consistent, right or wrong; a tie agrees with a tie only."""
    log_odds = np.array([[1.0, 2.0], [-1.0, -2.0], [1.0, -1.0], [0.0, 0.0], [0.0, 1.0]])
    assert statistics.order_consistency(log_odds) == pytest.approx(3 / 5)


def test_expected_calibration_error():
    """Bins are weighted by their size; probability 1 falls into the last one."""
    probabilities = np.array([0.05, 0.05, 0.95, 1.0])
    labels = np.array([0, 1, 1, 1])
    want = (abs(1 - 0.1) + abs(2 - 1.95)) / 4
    assert statistics.expected_calibration_error(probabilities, labels) == pytest.approx(want)
    assert statistics.expected_calibration_error(np.array([0.0, 1.0]), np.array([0, 1])) == 0


def test_calibration_error_of_an_honest_judge_is_small():
    """Labels drawn with the predicted probabilities are calibrated."""
    generator = np.random.default_rng(0)
    probabilities = generator.random(100_000)
    labels = generator.random(100_000) < probabilities
    assert statistics.expected_calibration_error(probabilities, labels) < 0.01


def test_brier_and_likelihood():
    """Two answers by hand; a sure mistake costs its log-odds, not infinity."""
    log_odds, labels = np.log([4.0, 0.25]), np.array([1.0, 1.0])
    assert statistics.brier_score(np.array([0.8, 0.2]), labels) == pytest.approx((0.04 + 0.64) / 2)
    assert statistics.negative_log_likelihood(log_odds, labels) == pytest.approx(-np.log([0.8, 0.2]).mean())
    assert statistics.negative_log_likelihood(np.array([-1000.0]), np.array([1])) == pytest.approx(1000)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 7.0])
def test_temperature_is_found(temperature):
    """Log-odds that were multiplied by a temperature get it back, as the smallest likelihood on a fine grid does."""
    generator = np.random.default_rng(0)
    true_log_odds = generator.normal(0, 2, 20_000)
    labels = generator.random(20_000) < statistics.sigmoid(true_log_odds)
    got = statistics.fit_temperature(true_log_odds * temperature, labels)
    assert got == pytest.approx(temperature, rel=0.05)
    grid = np.exp(np.linspace(np.log(got) - 0.2, np.log(got) + 0.2, 101))
    losses = [statistics.negative_log_likelihood(true_log_odds * temperature / t, labels) for t in grid]
    assert grid[int(np.argmin(losses))] == pytest.approx(got, rel=0.005)


def test_temperature_runs_into_its_bounds():
    """All right: as sharp as allowed. Mostly wrong: as flat as allowed."""
    assert statistics.fit_temperature(np.array([1.0, -2.0]), np.array([1, 0])) == pytest.approx(0.01)
    assert statistics.fit_temperature(np.array([1.0, -2.0]), np.array([0, 1])) == pytest.approx(100.0)


def test_bootstrap_interval():
    """The interval is that of the normal approximation for many rows, reproducible, and a point for equal rows."""
    values = np.random.default_rng(0).random(2000) < 0.8
    low, high = statistics.bootstrap_interval(values, 2000, seed=1)
    deviation = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * deviation, abs=0.002)
    assert high == pytest.approx(values.mean() + 1.96 * deviation, abs=0.002)
    assert statistics.bootstrap_interval(values, 2000, seed=1) == (low, high)
    assert statistics.bootstrap_interval(values, 2000, seed=2) != (low, high)
    assert statistics.bootstrap_interval(np.ones(3)) == (1.0, 1.0)
    assert statistics.bootstrap_interval(np.array([0.5])) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (statistics.verdict_credits, ()),
        (statistics.order_consistency, ()),
        (statistics.expected_calibration_error, (np.ones(1),)),
        (statistics.brier_score, (np.ones(1),)),
        (statistics.negative_log_likelihood, (np.ones(1),)),
        (statistics.fit_temperature, (np.ones(1),)),
        (statistics.bootstrap_interval, ()),
        (statistics.accuracy_with_ties, (np.zeros(1, dtype=bool), 0.1)),
    ],
)
def test_nan_and_empty_arrays_are_refused(function, arguments):
    """No statistic of NaN or of nothing is a number."""
    with pytest.raises(ValueError, match="is NaN or infinite in 1 of 1 entries"):
        function(np.array([np.nan]), *arguments)
    with pytest.raises(ValueError, match="is empty"):
        function(np.array([]), *arguments)
