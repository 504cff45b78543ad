"""A reward function that judges the paths of a search: what it cannot judge is lost, and not the search."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from ...scoring.scorer import RewardDanceScorer


logger = logging.get_logger(__name__)


class Verifier:
    """
    Rewards of images, with the failures of single ones set apart.

    Args:
        reward (`Callable`):
            `reward(images, prompts, **context)` with images of shape `(n, 3, height, width)` or clips of shape
            `(n, num_frames, 3, height, width)`, floats in `[0, 1]`, that returns `n` numbers.
        prompts (`list[str]`):
            Prompts of the search.
        context (`dict`, *optional*):
            Further arguments of `reward`. `conditions` holds one first frame for each prompt.

    Attributes:
        calls (`list[int]`):
            Judgements for each prompt: images that were given to the reward function, or ordered pairs that a pairwise
            judge compared. What is asked again after a failure counts again.
        last_error (`Exception`, *optional*):
            What the reward function raised last.
    """

    def __init__(self, reward: Callable[..., Any], prompts: Sequence[str], context: Mapping[str, Any] | None) -> None:
        if not callable(reward):
            raise TypeError(
                f"The reward is of type `{type(reward).__name__}`, but must be a function `reward(images, prompts)` or a "
                "`RewardDanceScorer`. Pass one."
            )
        self.reward = reward
        self.prompts = prompts
        self.context = dict(context or {})
        self.calls = [0] * len(prompts)
        self.last_error: Exception | None = None
        self.conditions = self.context.pop("conditions", None)
        if self.conditions is not None and len(self.conditions) != len(prompts):
            raise ValueError(
                f'`context["conditions"]` has {len(self.conditions)} entries for {len(prompts)} prompts, but must have one '
                "for each. Make both equally long."
            )

    @property
    def is_pairwise(self) -> bool:
        """`bool`: Whether the reward function is a judge that needs two samples."""
        return isinstance(self.reward, RewardDanceScorer) and self.reward.is_pairwise

    def score(self, images: torch.Tensor, prompt_indices: Sequence[int]) -> list[float | None]:
        """
        Score a batch.

        Args:
            images (`torch.Tensor` of shape `(n, 3, height, width)` or `(n, num_frames, 3, height, width)`):
                Images or clips in `[0, 1]`.
            prompt_indices (`list[int]`):
                Prompt of each.

        Returns:
            `list[float | None]`: Reward of each, or None if the reward function raised or gave no finite number for it.

        Raises:
            `ValueError`: If the reward function returns another number of rewards than it was given images.
        """
        try:
            rewards = self._ask(images, prompt_indices)
        except Exception as error:
            self.last_error = error
            if len(images) > 1:  # find out which one it was
                return [
                    reward
                    for i, index in enumerate(prompt_indices)
                    for reward in self.score(images[i : i + 1], [index])
                ]
            logger.warning("A path of %r is lost: the reward function raised %r.", self._prompt(prompt_indices), error)
            return [None]
        if len(rewards) != len(images):
            raise ValueError(
                f"The reward function returned {len(rewards)} rewards for {len(images)} images, but must return one for "
                "each. Return a tensor of shape `(n,)`."
            )
        known: list[float | None] = []
        for reward, index in zip(rewards, prompt_indices, strict=True):
            if not torch.isfinite(torch.tensor(reward)):
                logger.warning("A path of %r is lost: its reward is %s.", self.prompts[index], reward)
            known.append(reward if torch.isfinite(torch.tensor(reward)) else None)
        return known

    def rank(
        self, images: Sequence[torch.Tensor], prompt_index: int, method: str
    ) -> tuple[list[int], list[float | None]]:
        """
        Rank the samples of one prompt with a pairwise judge.

        Args:
            images (`list[torch.Tensor]`):
                Images or clips.
            prompt_index (`int`):
                Their prompt.
            method (`str`):
                Tournament, as in [`RewardDanceScorer.rank`].

        Returns:
            `tuple[list[int], list[float | None]]`: Indices of samples, best first, without those that could not be judged;
            and for each sample its mean reward over all that it was compared with, None if it could not be judged.
        """
        alive = list(range(len(images)))
        if len(alive) < 2:  # nothing to compare with
            return alive, [None] * len(alive)
        ranking = self._rank(images, prompt_index, method)
        if ranking is None:
            alive = self._comparable(images, prompt_index)
            lost = len(images) - len(alive)
            logger.warning(
                "%d paths of %r are lost: the judge raised %r.", lost, self.prompts[prompt_index], self.last_error
            )
            ranking = self._rank([images[i] for i in alive], prompt_index, method) if len(alive) > 1 else None
            if ranking is None:
                return [], [None] * len(images)
        rewards: list[float | None] = [None] * len(images)
        for i, score in zip(alive, ranking.scores.tolist(), strict=True):
            rewards[i] = score
        return [alive[i] for i in ranking.order], rewards

    def _ask(self, images: torch.Tensor, prompt_indices: Sequence[int]) -> list[float]:
        context = self._context(images)
        if self.conditions is not None:
            context["conditions"] = [self.conditions[i] for i in prompt_indices]
        for index in prompt_indices:
            self.calls[index] += 1
        with torch.no_grad():
            rewards = self.reward(images, [self.prompts[i] for i in prompt_indices], **context)
        return torch.as_tensor(rewards).detach().double().flatten().tolist()

    def _rank(self, images: Sequence[torch.Tensor], prompt_index: int, method: str) -> Any:
        """Ranking, or None if the judge raised."""
        context = self._context(images[0][None])
        if self.conditions is not None:
            context["condition"] = self.conditions[prompt_index]
        # Samples that need no gradient are given as they are: one tensor for each
        try:
            ranking = self.reward.rank(list(images), self.prompts[prompt_index], ranking_method=method, **context)  # type: ignore[attr-defined]
        except Exception as error:
            self.last_error = error
            self.calls[prompt_index] += 2
            return None
        self.calls[prompt_index] += int(ranking.matrix.isfinite().sum())
        return ranking

    def _comparable(self, images: Sequence[torch.Tensor], prompt_index: int) -> list[int]:
        """Samples that can be compared with another one, which can be compared itself."""
        for good in range(len(images) - 1):
            others = [
                i
                for i in range(good + 1, len(images))
                if self._rank([images[good], images[i]], prompt_index, "round_robin") is not None
            ]
            if others:
                return [good, *others]
        return []

    def _context(self, images: torch.Tensor) -> dict[str, Any]:
        context = dict(self.context)
        if images.ndim == 5 and isinstance(self.reward, RewardDanceScorer):
            context.setdefault("task", "text-to-video")
        return context

    def _prompt(self, prompt_indices: Sequence[int]) -> str:
        return self.prompts[prompt_indices[0]]
