"""Losses of the three training variants (Section 3.2.3 and Table 7 of the paper) as plain tensor functions."""

import torch
from torch.nn.functional import logsigmoid, softplus


def answer_cross_entropy(
    answer_log_probs: torch.Tensor, labels: torch.Tensor, margin: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Cross-entropy of the answer over the whole vocabulary, the loss of the pairwise paradigm.

    `answer_log_probs` `(batch_size, 2)` are those of "yes" and "no", `labels` target probabilities of "yes". `margin` is
    subtracted from the logit of the right answer, so that it has to win by that much (additive-margin softmax,
    [CosFace](https://huggingface.co/papers/1801.09414)); the paper has no margins.
    """
    losses = -answer_log_probs
    if margin is not None:
        # Odds of an answer against all other tokens: log p - log(1 - p).
        log_odds = answer_log_probs - torch.log1p(-answer_log_probs.exp().clamp(max=1 - 1e-6))
        losses = softplus(margin[:, None] - log_odds)
    targets = torch.stack([labels, 1 - labels], dim=-1).to(losses)
    return (targets * losses).sum(-1).mean()


def bradley_terry_loss(
    chosen_logits: torch.Tensor,
    rejected_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Bradley-Terry loss `-log sigmoid(r_chosen - r_rejected)`, for the regressive and the pointwise paradigm, which applies it to
    log-odds of "yes": on probabilities, which differ by 1 at most, the loss could not fall below 0.31.

    `labels` are target probabilities that the chosen sample is better (0.5 for a tie, 1 by default), `margin` is the wanted
    difference, without effect on ties.
    """
    difference = chosen_logits - rejected_logits
    labels = torch.ones_like(difference) if labels is None else labels.to(difference)
    if margin is not None:
        difference = difference - margin.to(difference) * (2 * labels - 1)
    return -(labels * logsigmoid(difference) + (1 - labels) * logsigmoid(-difference)).mean()


def pointwise_loss(
    chosen: tuple[torch.Tensor, torch.Tensor],
    rejected: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    answer_weight: float,
    margin: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Loss of the pointwise paradigm: Bradley-Terry on the two rewards, plus `answer_weight` times the cross-entropy with "yes"
    for the preferred and "no" for the rejected sample. Each is given as log-odds and answer log-probabilities.
    """
    cross_entropy = (answer_cross_entropy(chosen[1], labels) + answer_cross_entropy(rejected[1], 1 - labels)) / 2
    return bradley_terry_loss(chosen[0], rejected[0], labels, margin) + answer_weight * cross_entropy
