"""Tournaments: the best is found with few comparisons, whoever sits where."""

import math
import random

import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.scoring import ranking as tournaments


@pytest.mark.parametrize("method", ["swiss", "halving"])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 16, 33, 64])
def test_best_sample_is_found(method, count):
    """With a judge that never contradicts itself the best is first; no pair meets twice; the number is as stated."""
    for seed in range(20):
        quality = random.Random(seed).sample(range(1000), count)
        met = []

        def play(pairs, quality=quality, met=met):
            met.extend(frozenset(pair) for pair in pairs)
            players = [player for pair in pairs for player in pair]
            assert len(players) == len(set(players))
            return [quality[j] - quality[i] for i, j in pairs]

        order = getattr(tournaments, method)(count, play)
        assert sorted(order) == list(range(count))
        assert order[0] == max(range(count), key=quality.__getitem__)
        assert len(met) == len(set(met))
        assert len(met) <= tournaments.num_comparisons(method, count)
        if count >= 16:
            assert len(met) < tournaments.num_comparisons("round_robin", count) / 3


def test_stated_numbers():
    """Numbers of comparisons by hand."""
    assert tournaments.num_comparisons("round_robin", 16) == 120
    assert tournaments.num_comparisons("swiss", 16) == 4 * 8
    assert tournaments.num_comparisons("swiss", 5, num_rounds=3) == 3 * 2
    assert tournaments.num_comparisons("swiss", 4, num_rounds=100) == 6
    assert tournaments.num_comparisons("halving", 16) == 2 * 8 + 2 * 4 + 2 * 2 + 1
    assert tournaments.num_comparisons("halving", 16, num_rounds=3, top_k=8) == 3 * 8
    assert tournaments.num_comparisons("halving", 64) == 125


def test_ties_share_a_win():
    """Equal samples keep their order."""
    assert tournaments.swiss(4, lambda pairs: [0.0] * len(pairs)) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def scorer(vlm_folder):
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    return RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(vlm_folder("internvl")))


@pytest.mark.parametrize("method", ["swiss", "halving"])
def test_tournament_gives_a_ranking(scorer, method):
    """The result is part of the round robin: equal where it was asked, NaN elsewhere; images are seen once."""
    samples = [random_image(i) for i in range(9)]
    full = scorer.rank(samples, "a red circle")
    got = scorer.rank(samples, "a red circle", method=method, top_k=3)
    statistics = scorer.statistics
    assert statistics.num_images == statistics.num_encoded == 9
    asked = ~got.matrix.isnan()
    assert statistics.num_judgements == asked.sum() == 2 * got.wins.sum()
    assert asked.sum() <= 2 * tournaments.num_comparisons(method, 9, top_k=3)
    assert torch.equal(asked, asked.T)
    torch.testing.assert_close(got.matrix[asked], full.matrix[asked], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.scores, got.matrix.nanmean(0))
    assert len(got.order) == len(set(got.order)) == 3


def test_full_swiss_tournament_is_a_round_robin(scorer):
    """With enough rounds all have met."""
    samples = [random_image(i) for i in range(4)]
    full = scorer.rank(samples, "a red circle")
    got = scorer.rank(samples, "a red circle", method="swiss", num_rounds=3)
    torch.testing.assert_close(got.matrix, full.matrix, rtol=1e-4, atol=1e-7, equal_nan=True)
    assert torch.equal(got.wins, full.wins)


def test_wrong_arguments(scorer):
    """What makes no sense is refused."""
    samples = [random_image(i) for i in range(3)]
    for arguments, match in [
        ({"method": "duel"}, "`method` is 'duel'"),
        ({"num_rounds": 2}, "`num_rounds` is 2, but belongs to tournaments"),
        ({"method": "swiss", "num_rounds": 0}, "`num_rounds` is 0, but must be positive"),
    ]:
        with pytest.raises(ValueError, match=match):
            scorer.rank(samples, "a", **arguments)
    assert math.isnan(scorer.rank(samples, "a").matrix[0, 0])
