"""Rewards of groups: samples of one prompt, which a pairwise judge compares with each other where no references are given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..rewards import AdaptedReward, as_reward


# Columns of rows that a judge takes; trainers hand on many others.
COLUMNS = ("references", "reference", "condition", "conditions", "task", "criteria")


def group_references(images: Sequence[Any], prompts: Sequence[str]) -> list[list[Any]]:
    """For each sample the others of its prompt."""
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    alone = [rows[0] for rows in rows_of.values() if len(rows) < 2]
    if alone:
        raise ValueError(
            f"`prompts[{alone[0]}]` has a single sample and no reference, but a pairwise judge compares samples of a prompt with "
            "each other. Pass references, two samples or more of each prompt, or ask a judge of single samples."
        )
    return [[images[other] for other in rows_of[prompt] if other != row] for row, prompt in enumerate(prompts)]


@torch.no_grad()
def reward_in_groups(reward: AdaptedReward, images: Any, prompts: Sequence[str], **columns: Any) -> torch.Tensor:
    """Reward of each sample; by a pairwise judge without references the mean over the other samples of its prompt."""
    if reward.is_pairwise and columns.get("references") is None:
        columns["references"] = group_references(images, prompts)
    return reward(images, prompts, **columns)


class GRPOReward:
    """
    Rewards in the form of TRL's `GRPOTrainer`: `reward(prompts, completions, **columns) -> list[float]`.

    Completions are images, of trainers of generators that took over this form; or texts that `render` makes images of: a
    prompt that is rewritten for a generator, or code that draws. Columns of the dataset that a judge takes (`references`,
    `condition`, `task`, `criteria`) are handed on. A pairwise judge without references compares the samples of a prompt, which
    GRPO draws in groups, with each other.

    Args:
        reward (`Callable` or `str`):
            What [`~rewarddance_hf.rewards.as_reward`] takes: judge, address of one, function, or several.
        render (`Callable`, *optional*):
            Gives for a list of texts a list of images or clips, with None for texts that cannot be drawn.
        undrawn (`float`, *optional*, defaults to `0.0`):
            Reward of completions that cannot be drawn. That a judge cannot be asked is an error, never a reward.

    Example:

    ```python
    reward = GRPOReward("http://judge:8000", render=lambda texts: pipeline(texts).images)
    trainer = GRPOTrainer(model, reward_funcs=[reward], args=args, train_dataset=prompts)
    ```
    """

    def __init__(
        self,
        reward: Any,
        render: Callable[[list[str]], Sequence[Any]] | None = None,
        undrawn: float = 0.0,
    ) -> None:
        self.reward = as_reward(reward)
        self.render = render
        self.undrawn = undrawn
        self.__name__ = "_".join(self.reward.names)  # under which TRL logs it

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Reward of each completion."""
        images = list(completions)
        if self.render is not None:
            images = list(self.render([_text(completion) for completion in completions]))
        if len(images) != len(prompts):
            raise ValueError(
                f"`render` gave {len(images)} images for {len(prompts)} completions, but must give one for each."
            )
        drawn = [row for row, image in enumerate(images) if image is not None]
        rewards = [self.undrawn] * len(images)
        known = {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
        if "reference" in known:
            known["references"] = known.pop("reference")
        if drawn:
            found = reward_in_groups(
                self.reward,
                [images[row] for row in drawn],
                [_text(prompts[row]) for row in drawn],
                **{name: [values[row] for row in drawn] for name, values in known.items()},
            )
            for row, value in zip(drawn, found.tolist(), strict=True):
                rewards[row] = value
        return rewards


def _text(message: Any) -> str:
    """Text of a prompt or completion, which may be a chat: that of its last message."""
    if isinstance(message, str):
        return message
    content = message[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
