"""Rewards of generated samples, from one callable or several."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...scoring.scorer import RewardDanceScorer


class RewardFunctions:
    r"""
    One or several reward functions `reward(images, prompts, **context) -> Tensor (n,)` with names and weights.

    Columns of the rows are passed to a function under their name, or with an "s" appended (`condition` as `conditions`),
    if it takes such an argument. A function that takes `references` is called with one reference for each image: images
    with several come several times, and their reward is the mean. Rows of clips without a `task` get that of clips.

    Args:
        reward (`Callable`, `list[Callable]` or `dict[str, Callable]`):
            Functions, by name if they come as a `dict`.
        weights (`list[float]`, *optional*):
            Weight of each function. Defaults to `1.0` for all.

    Raises:
        `TypeError`: If a reward cannot be called.
        `ValueError`: If there is no reward, or the number of weights differs.
    """

    def __init__(self, reward: Any, weights: Sequence[float] | None = None) -> None:
        if isinstance(reward, Mapping):
            functions = list(reward.values())
            self.names = [str(name) for name in reward]
        else:
            functions = list(reward) if isinstance(reward, (list, tuple)) else [reward]
            self.names = _distinct([getattr(function, "__name__", type(function).__name__) for function in functions])
        if not functions:
            raise ValueError("`reward` is empty, but must hold at least one reward function.")
        for name, function in zip(self.names, functions, strict=True):
            if not callable(function):
                raise TypeError(
                    f"Reward {name!r} is a `{type(function).__name__}`, but must be callable as "
                    "`reward(images, prompts, **context)`. Pass a `RewardDanceScorer` or a function."
                )
        self.functions: list[Callable[..., Any]] = functions
        self.weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(functions):
            raise ValueError(
                f"`reward_weights` has {len(self.weights)} entries, but there are {len(functions)} rewards "
                f"({self.names}). Give one weight for each."
            )
        if not any(self.weights):
            raise ValueError(f"`reward_weights` is {self.weights}, but at least one weight must differ from 0.")

    @property
    def is_pairwise(self) -> bool:
        """Whether a function judges a sample relative to a reference."""
        return any(getattr(function, "is_pairwise", False) for function in self.functions)

    def __call__(self, images: torch.Tensor, columns: Mapping[str, list[Any]]) -> dict[str, torch.Tensor]:
        """
        Compute the rewards of samples.

        Args:
            images (`torch.Tensor` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`):
                Samples in `[0, 1]`.
            columns (`dict[str, list]`):
                `prompt` and further columns of the rows that the samples were made for.

        Returns:
            `dict[str, torch.Tensor]` of tensors of shape `(n,)`: Rewards by name, and their weighted sum as `"reward"`,
            on the device of the images.

        Raises:
            `TypeError`: If a function does not return a tensor.
            `ValueError`: If a tensor has the wrong shape, is not finite, or lacks the gradient that its images carry.
        """
        if images.ndim == 5 and "task" not in columns:  # clips
            task = "image-to-video" if "condition" in columns else "text-to-video"
            columns = {**columns, "task": [task] * len(images)}
        values = {}
        for name, function, weight in zip(self.names, self.functions, self.weights, strict=True):
            # A weight of 0 is for the logs, e.g. a held-out judge.
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0.0):
                samples = images if weight != 0.0 else images.detach()
                values[name] = _call(name, function, samples, columns)
        weighted = [weight * values[name] for name, weight in zip(self.names, self.weights, strict=True) if weight]
        return {**values, "reward": torch.stack(weighted).sum(dim=0)}


def _call(
    name: str, function: Callable[..., Any], images: torch.Tensor, columns: Mapping[str, list[Any]]
) -> torch.Tensor:
    """Reward of each image by one function."""
    context = _context(function, columns)
    prompts, rows = columns["prompt"], list(range(len(images)))
    if "references" in context:
        references = [row or [None] for row in context["references"]]
        rows = [row for row, several in enumerate(references) for _ in several]
        context = {key: [values[row] for row in rows] for key, values in context.items()}
        context["references"] = [reference for several in references for reference in several]
    index = torch.tensor(rows, device=images.device)
    values = function(images[index], [prompts[row] for row in rows], **context)
    if not isinstance(values, torch.Tensor):
        raise TypeError(
            f"Reward {name!r} returned a `{type(values).__name__}`, but must return a tensor of shape ({len(rows)},)."
        )
    if values.shape != (len(rows),):
        raise ValueError(
            f"Reward {name!r} returned a tensor of shape {tuple(values.shape)} for {len(rows)} images, but must return one "
            f"number for each, of shape ({len(rows)},). Do not average over the batch, and squeeze trailing dimensions."
        )
    if images.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
        raise ValueError(
            f"Reward {name!r} carries no gradient, but the images that it was given do. Compute it from the tensor, "
            "without `torch.no_grad()`, `detach()`, rounding or a way through PIL or NumPy; or give it the weight 0 to log "
            "it only."
        )
    values = values.to(images.device).float()
    finite = values.detach().isfinite()
    if not finite.all():
        first = rows[int((~finite).nonzero()[0])]
        raise ValueError(
            f"Reward {name!r} is {values[~finite][0].item()} for {int((~finite).sum())} of {len(rows)} images, the first "
            f"of the prompt {prompts[first]!r}, but must be finite. Look at that sample, lower `learning_rate`, or compute "
            "the reward in float32."
        )
    if len(rows) == len(images):
        return values
    counts = torch.bincount(index, minlength=len(images))
    return torch.zeros(len(images), device=images.device).index_add(0, index, values) / counts


def _context(function: Callable[..., Any], columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns that a function takes, by the name of its argument."""
    # A scorer takes any keyword when called, but knows only those of `score`.
    target = function.score if isinstance(function, RewardDanceScorer) else function
    parameters = inspect.signature(target).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    context = {}
    for column, values in columns.items():
        if column in ("prompt", "draw"):
            continue
        if column == "references" and not getattr(function, "is_pairwise", True):
            continue
        argument = f"{column}s" if column not in parameters and f"{column}s" in parameters else column
        if argument in parameters or takes_all:
            context[argument] = values
    return context


def _distinct(names: list[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name}_{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
