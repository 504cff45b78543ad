"""What a run maximises: a reward, its logarithm or its log-odds."""

import torch

from ...rewards import AdaptedReward
from .arguments import ReFLTrainingArguments


EPS = 1e-6  # probabilities are kept this far from 0 and 1 before logarithms


def choose_transform(reward_transform: str, reward: AdaptedReward) -> str:
    """The transform that `"auto"` stands for: that of probabilities for one judge."""
    if reward_transform != "auto":
        return reward_transform
    return "log" if reward.is_probability else "none"


def objective(rewards: torch.Tensor, args: ReFLTrainingArguments) -> torch.Tensor:
    """What is maximised."""
    if args.reward_clip is not None:
        rewards = rewards.clamp(max=args.reward_clip)
    if args.reward_transform == "none":
        return rewards
    if rewards.min() < 0.0 or rewards.max() > 1.0:
        raise ValueError(
            f"`reward_transform` is {args.reward_transform!r}, but rewards reach from {rewards.min().item():.3g} to "
            f"{rewards.max().item():.3g}: it requires probabilities. Set it to 'none', or scale `reward_weights`."
        )
    if args.reward_transform == "log":
        return rewards.clamp(min=EPS).log()
    return torch.logit(rewards, eps=EPS)
