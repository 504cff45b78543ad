"""Tournaments: the best is found with few comparisons, whoever sits where."""

import functools
import math
import random

import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.rewards import NonFiniteScoreError, RewardContractError
from rewarddance_hf.scoring import ranking as tournaments
from rewarddance_hf.scoring.ranking import rank_samples


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
        if count >= 16:
            assert len(met) < count * (count - 1) / 2 / 3


def num_comparisons(method, count, **arguments):
    """Comparisons that a tournament plays."""
    quality, met = random.Random(0).sample(range(1000), count), []

    def play(pairs):
        met.extend(pairs)
        return [quality[j] - quality[i] for i, j in pairs]

    getattr(tournaments, method)(count, play, **arguments)
    return len(met)


def test_stated_numbers():
    """Most comparisons of a tournament, by hand; some pairs have met before."""
    assert num_comparisons("swiss", 16) == 4 * 8
    assert num_comparisons("swiss", 5, num_rounds=3) <= 3 * 2
    assert num_comparisons("swiss", 4, num_rounds=100) == 6
    assert 16 < num_comparisons("halving", 16) <= 2 * 8 + 2 * 4 + 2 * 2 + 1
    assert num_comparisons("halving", 16, num_rounds=3, top_k=8) == 3 * 8
    assert 64 < num_comparisons("halving", 64) <= 125


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
    got = scorer.rank(samples, "a red circle", ranking_method=method, top_k=3)
    statistics = scorer.statistics
    assert statistics.num_images == statistics.num_encoded == 9
    asked = ~got.matrix.isnan()
    assert statistics.num_questions == asked.sum() == 2 * got.wins.sum()
    assert (
        got.num_questions
        == asked.sum()
        == 2 * num_comparisons(method, 9, **({"top_k": 3} if method == "halving" else {}))
    )
    assert torch.equal(asked, asked.T)
    torch.testing.assert_close(got.matrix[asked], full.matrix[asked], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.scores, got.matrix.nanmean(0))
    assert len(got.order) == len(set(got.order)) == 3


def test_full_swiss_tournament_is_a_round_robin(scorer):
    """With enough rounds all have met."""
    samples = [random_image(i) for i in range(4)]
    full = scorer.rank(samples, "a red circle")
    got = scorer.rank(samples, "a red circle", ranking_method="swiss", num_rounds=3)
    torch.testing.assert_close(got.matrix, full.matrix, rtol=1e-4, atol=1e-7, equal_nan=True)
    assert torch.equal(got.wins, full.wins)


def test_wrong_arguments(scorer):
    """What makes no sense is refused."""
    samples = [random_image(i) for i in range(3)]
    for arguments, match in [
        ({"ranking_method": "duel"}, "`ranking_method` is 'duel'"),
        ({"num_rounds": 2}, "`num_rounds` is 2, but belongs to tournaments"),
        ({"ranking_method": "swiss", "num_rounds": 0}, "`num_rounds` is 0, but must be positive"),
    ]:
        with pytest.raises(ValueError, match=match):
            scorer.rank(samples, "a", **arguments)
    assert math.isnan(scorer.rank(samples, "a").matrix[0, 0])


def pairwise(images, prompts, references, conditions=None):
    """How much brighter an image is than its reference, as a plain function."""
    assert conditions is None or conditions == ["first frame"] * len(images)
    return torch.stack([image.mean() - other.mean() for image, other in zip(images, references, strict=True)])


pairwise.is_pairwise = True


def pointwise(images, prompts, task=None):
    """Brightness."""
    return torch.stack([image.mean() for image in images])


def failing(reward, broken, mode):
    """The same reward, which cannot judge an image of some brightness, or does so with another one."""

    @functools.wraps(reward)
    def function(images, prompts, **context):
        values = reward(images, prompts, **context)
        seen = [{round(float(image.mean()), 3)} for image in images]
        for own, other in zip(seen, context.get("references") or [], strict=False):
            own.add(round(float(other.mean()), 3))
        bad = torch.tensor([broken <= own for own in seen])
        if mode == "raise" and bad.any():
            raise OSError("unreadable")
        return values.masked_fill(bad, torch.nan)

    return function


BRIGHT = [torch.full((3, 4, 4), value) for value in (0.3, 0.9, 0.1, 0.5)]


@pytest.mark.parametrize("method", ["round_robin", "swiss", "halving"])
@pytest.mark.parametrize("reward", [pairwise, pointwise])
def test_functions_are_ranked(reward, method):
    """Any reward ranks samples; a pairwise function is asked in both orders, another once for each."""
    ranking = rank_samples(reward, BRIGHT, "a", ranking_method=method, condition="first frame", task=None, top_k=2)
    assert ranking.order == [1, 3]
    if reward is pointwise:
        assert ranking.wins.tolist() == [1, 3, 0, 2]
        torch.testing.assert_close(ranking.scores, torch.tensor([0.3, 0.9, 0.1, 0.5]))
        assert ranking.num_questions == 4
    elif method == "round_robin":
        assert ranking.wins.tolist() == [1, 3, 0, 2]
        assert ranking.num_questions == 12
        torch.testing.assert_close(ranking.matrix[0, 1], torch.tensor(0.6))
        torch.testing.assert_close(ranking.scores[2], torch.tensor(-(0.2 + 0.8 + 0.4) / 3))
    assert ranking.error is None
    with pytest.raises(ValueError, match="`top_k` is 5"):
        rank_samples(reward, BRIGHT, "a", top_k=5)


@pytest.mark.parametrize("mode", ["raise", "nan"])
@pytest.mark.parametrize("reward", [pairwise, pointwise])
def test_failures_are_left_out(reward, mode, caplog):
    """What cannot be judged is missing, the others are ranked; without `skip_failures` it is an error."""
    tournaments.logger.parent.propagate = True
    function = failing(reward, {0.9}, mode)
    with pytest.raises((OSError, NonFiniteScoreError), match="unreadable|is nan for"):
        rank_samples(function, BRIGHT, "a")
    ranking = rank_samples(function, BRIGHT, "a", skip_failures=True)
    assert ranking.order == [3, 0, 2]
    assert ranking.scores.isnan().tolist() == [False, True, False, False]
    assert ranking.wins.tolist() == [1, 0, 0, 2]
    assert isinstance(ranking.error, OSError if mode == "raise" else NonFiniteScoreError)
    assert "1 of 4 samples of 'a' are left out of the ranking" in caplog.text
    assert "([1])" in caplog.text


def test_failures_of_pairs():
    """Where only two samples together fail, one of them leaves; where all fail, none is left."""
    ranking = rank_samples(failing(pairwise, {0.9, 0.1}, "raise"), BRIGHT, "a", skip_failures=True)
    assert ranking.order == [3, 0, 2]
    ranking = rank_samples(failing(pairwise, set(), "raise"), BRIGHT, "a", skip_failures=True)
    assert ranking.order == []
    assert ranking.scores.isnan().all()
    assert isinstance(ranking.error, OSError)
    ranking = rank_samples(pairwise, BRIGHT[:1], "a", skip_failures=True)
    assert ranking.order == [0]
    assert ranking.scores.isnan().all()


def test_broken_functions_are_errors():
    """A function that does not return one number for each sample is a mistake, and not a failing sample."""
    with pytest.raises(RewardContractError, match="must return one number for each"):
        rank_samples(lambda images, prompts: torch.zeros(1), BRIGHT, "a", skip_failures=True)


def test_scorer_is_asked_for_its_ranking(scorer):
    """A judge ranks as it does alone; a sample that cannot be read is left out."""
    samples = [random_image(i) for i in range(3)]
    want = scorer.rank(samples, "a", task="text-to-image", ranking_method="swiss", top_k=2)
    got = rank_samples(scorer, samples, "a", task="text-to-image", ranking_method="swiss", top_k=2, skip_failures=True)
    assert (got.order, got.wins.tolist(), got.num_questions) == (want.order, want.wins.tolist(), want.num_questions)
    assert torch.equal(got.matrix.nan_to_num(-1), want.matrix.nan_to_num(-1))
    got = rank_samples(scorer, [*samples, "missing.png"], "a", skip_failures=True)
    full = scorer.rank(samples, "a")
    assert got.order == full.order
    torch.testing.assert_close(got.scores[:3], full.scores)
