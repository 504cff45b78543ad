"""Losses against formulas written out by hand."""

import math

import pytest
import torch

from rewarddance_hf.trainer.losses import answer_cross_entropy, bradley_terry_loss, pointwise_loss


def test_answer_cross_entropy_is_that_of_the_vocabulary():
    """The loss equals torch's cross-entropy on full logits, for hard and soft labels."""
    torch.manual_seed(0)
    logits = torch.randn(6, 50, dtype=torch.double)
    log_probs = logits.log_softmax(-1)[:, [7, 9]]  # "yes" is token 7, "no" token 9
    hard = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    expected = torch.nn.functional.cross_entropy(logits, torch.where(hard == 1, 7, 9))
    torch.testing.assert_close(answer_cross_entropy(log_probs, hard), expected)
    soft = torch.zeros(6, 50, dtype=torch.double)
    soft[:, 7], soft[:, 9] = 0.5, 0.5
    expected = torch.nn.functional.cross_entropy(logits, soft)
    torch.testing.assert_close(answer_cross_entropy(log_probs, torch.full((6,), 0.5)), expected)


def test_answer_margin_lowers_the_logit_of_the_right_answer():
    """A margin is the same as subtracting it from the right answer's logit before the softmax; 0 changes nothing."""
    torch.manual_seed(1)
    logits, margin = torch.randn(4, 30, dtype=torch.double), torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.double)
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0])
    right = torch.where(labels == 1, 3, 4)
    shifted = logits.clone()
    shifted[torch.arange(4), right] -= margin
    expected = torch.nn.functional.cross_entropy(shifted, right)
    log_probs = logits.log_softmax(-1)[:, [3, 4]]
    torch.testing.assert_close(answer_cross_entropy(log_probs, labels, margin), expected)
    zero = answer_cross_entropy(log_probs, labels, torch.zeros(4, dtype=torch.double))
    torch.testing.assert_close(zero, answer_cross_entropy(log_probs, labels))


def test_bradley_terry():
    """-log sigmoid of the difference; a tie is symmetric; a margin is subtracted, except from ties."""
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    expected = sum(math.log1p(math.exp(-d)) for d in (1.5, -2.0)) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected, rel=1e-6)
    tie = torch.tensor([0.5, 0.5])
    swapped = bradley_terry_loss(rejected, chosen, tie, torch.ones(2))
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, tie, torch.ones(2)), swapped)
    with_margin = sum(math.log1p(math.exp(-d)) for d in (1.0, -3.0)) / 2
    got = bradley_terry_loss(chosen, rejected, margin=torch.tensor([0.5, 1.0])).item()
    assert got == pytest.approx(with_margin, rel=1e-6)


def test_pointwise_loss_is_the_weighted_sum():
    """Bradley-Terry on log-odds plus a weight times the mean cross-entropy of both answers."""
    log_probs_chosen = torch.tensor([[0.6, 0.3], [0.2, 0.5]]).log()
    log_probs_rejected = torch.tensor([[0.4, 0.5], [0.1, 0.7]]).log()
    odds = [p[:, 0] - p[:, 1] for p in (log_probs_chosen, log_probs_rejected)]
    loss = pointwise_loss((odds[0], log_probs_chosen), (odds[1], log_probs_rejected), torch.ones(2), 0.1)
    cross_entropy = -(math.log(0.6) + math.log(0.2) + math.log(0.5) + math.log(0.7)) / 4
    expected = bradley_terry_loss(*odds).item() + 0.1 * cross_entropy
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 60.0])
def test_gradients_stay_finite_at_the_extremes(scale):
    """Probabilities near 0 and 1 give finite gradients, also with a margin."""
    logits = (torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]) * scale).requires_grad_()
    log_probs = logits.log_softmax(-1)[:, :2]
    loss = answer_cross_entropy(log_probs, torch.tensor([1.0, 0.0]), torch.ones(2))
    loss = loss + bradley_terry_loss(log_probs[:, 0], log_probs[:, 1])
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
