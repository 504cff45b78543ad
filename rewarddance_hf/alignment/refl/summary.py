"""What is kept of the rewards of a batch, and what is logged of those of an update."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch


T = TypeVar("T", torch.Tensor, Any)


def is_saturated(rewards: T, distance: float) -> T:
    """
    Whether rewards are so near to 0 or 1 that they have no gradient and cannot order samples. The one meaning of
    "saturated" in logs, history and warnings.
    """
    return (abs(rewards) <= distance) | (abs(1 - rewards) <= distance)


def record_rewards(prompts: Sequence[str], values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Keep prompts and rewards of a batch as plain values."""
    return {"prompts": list(prompts), "rewards": {name: value.detach().tolist() for name, value in values.items()}}


def summarize_rewards(records: Sequence[Mapping[str, Any]], saturation: float) -> dict[str, float]:
    """Summarize the records of an update or an evaluation."""
    columns = {
        name: torch.tensor([value for record in records for value in record["rewards"][name]])
        for name in records[0]["rewards"]
    }
    reward = columns.pop("reward")
    summary = {
        "reward": reward.mean().item(),
        "reward_std": reward.std(correction=0).item(),
        "reward_saturated": is_saturated(reward, saturation).float().mean().item(),
    }
    summary.update({f"rewards/{name}": values.mean().item() for name, values in columns.items()})
    if "base_distance" in records[0]:
        summary["base_distance"] = sum(record["base_distance"] for record in records) / len(records)
    return summary
