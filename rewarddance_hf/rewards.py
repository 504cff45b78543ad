"""
The reward seam: anything callable as `reward(images, prompts, **context) -> Tensor (n,)` is a reward.

A judge, a plain function, a model, a judge on another machine, or several of them with weights: everything that needs
rewards (tuning, references, search, monitor, evaluation) calls one [`AdaptedReward`], which passes each function the
arguments that it takes, one reference at a time, and checks what it returns.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.utils import logging

from .models.tasks_rewarddance import infer_task


logger = logging.get_logger(__name__)


class Reward(Protocol):
    """
    What can be a reward. `images` are float tensors `(n, 3, height, width)` or `(n, frames, 3, height, width)` in `[0, 1]`,
    or lists of images or clips; `context` holds one value for each of them: `references`, `conditions`, `task`, `criteria`.

    A reward may also have `is_pairwise` (bool: each sample is judged relative to one of `references`), `rank(images, prompt,
    ...)` for the samples of one prompt, `reuse()`, a context in which it may keep what it knows of references,
    `sees_equal_images_once` (bool: it takes a list in which one tensor may come several times, which saves it work), and
    `fingerprint()`, a dict that identifies it.
    """

    def __call__(self, images: Any, prompts: Sequence[str], **context: Any) -> torch.Tensor: ...


class NonFiniteScoreError(ValueError):
    """
    A reward is NaN or infinite.

    Args:
        message (`str`):
            Which rows, why and what to do.
        rows (`list[int]`):
            Indices of samples without a finite score.
        scores (`torch.Tensor`):
            Scores that are known, at least up to the first of these rows.
    """

    def __init__(self, message: str, rows: list[int], scores: torch.Tensor) -> None:
        super().__init__(message)
        self.rows = rows
        self.scores = scores


class RewardContractError(TypeError, ValueError):
    """A reward function returned something that is not one number for each sample, or cut off the gradient."""


def as_reward(reward: Any, weights: Sequence[float] | None = None) -> "AdaptedReward":
    """
    Turn functions, judges or models into one reward.

    Args:
        reward (`Callable`, `str`, or `list` or `dict` of those):
            [`RewardDanceScorer`], function, address of a judge (`"http://judge:8000"`), or several of them, by name if they
            come as a `dict`.
        weights (`list[float]`, *optional*):
            Weight of each function. Defaults to `1.0` for all.

    Returns:
        [`AdaptedReward`]: The same object if it is one already and `weights` is None.

    Raises:
        `TypeError`: If a reward cannot be called.
        `ValueError`: If there is no reward, the number of weights differs, or all weights are 0.
    """
    if isinstance(reward, AdaptedReward):
        if weights is None:
            return reward
        reward = dict(zip(reward.names, reward.functions, strict=True))
    return AdaptedReward(reward, weights)


class AdaptedReward:
    """
    One or several reward functions with names and weights, as one reward. Made by [`as_reward`].

    Columns of rows are passed to a function under their name, or with an "s" appended (`condition` as `conditions`),
    if it takes such an argument. A function that takes `references` is called with one reference for each image:
    images with several are repeated, and their reward is the mean. Clips, and samples with a condition, get their task if
    they come without one. Functions get copies of what the caller keeps, and models among them get no gradient in their own weights.
    """

    def __init__(self, reward: Any, weights: Sequence[float] | None = None) -> None:
        if isinstance(reward, Mapping):
            functions, names = [_connected(function) for function in reward.values()], [str(name) for name in reward]
        else:
            functions = list(reward) if isinstance(reward, (list, tuple)) else [reward]
            functions = [_connected(function) for function in functions]
            names = _distinct([getattr(function, "__name__", type(function).__name__) for function in functions])
        if not functions:
            raise ValueError("`reward` is empty, but must hold at least one reward function.")
        for name, function in zip(names, functions, strict=True):
            if not callable(function):
                raise TypeError(
                    f"Reward {name!r} is a `{type(function).__name__}`, but must be callable as "
                    "`reward(images, prompts, **context)`. Pass a `RewardDanceScorer`, a function or an address."
                )
        self.names: list[str] = names
        self.functions: list[Callable[..., Any]] = functions
        self.weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(functions):
            raise ValueError(
                f"`reward_weights` has {len(self.weights)} entries, but there are {len(functions)} rewards ({names}). Give one "
                "weight for each."
            )
        if not any(self.weights):
            raise ValueError(f"`reward_weights` is {self.weights}, but at least one weight must differ from 0.")

    @property
    def is_pairwise(self) -> bool:
        """Whether a function judges a sample relative to a reference."""
        return any(getattr(function, "is_pairwise", False) for function in self.functions)

    @property
    def is_probability(self) -> bool:
        """Whether it is the reward of a single function that declares to be a probability."""
        weighted = [(f, weight) for f, weight in zip(self.functions, self.weights, strict=True) if weight]
        return len(weighted) == 1 and weighted[0][1] == 1.0 and getattr(weighted[0][0], "is_probability", False)

    def fingerprint(self) -> dict[str, Any]:
        """
        Weight and description of each function by its name, for files that hold scores: its own `fingerprint()`, else its
        module and name, with a digest of the weights of a model.
        """
        parts = zip(self.names, self.functions, self.weights, strict=True)
        return {name: {"weight": weight, **_describe(function)} for name, function, weight in parts}

    def check_columns(self, *columns: str) -> None:
        """
        Raise a `TypeError` if a function cannot be called with images, prompts, and columns of these names, or those that are
        always known (`references`, `task`): before anything is computed.
        """
        for name, function in zip(self.names, self.functions, strict=True):
            given = _context(function, dict.fromkeys((*columns, "references", "task")))
            try:
                inspect.signature(function).bind([], [], **given)
            except TypeError as error:
                raise TypeError(
                    f"Reward {name!r} cannot be called as `reward(images, prompts, **context)` with {sorted(columns)} as context "
                    f"({error}). Pass what it requires as `context`, or wrap it in a function that knows it."
                ) from error

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """Let judges keep what they computed of references from call to call, see [`RewardDanceScorer.reuse`]."""
        with ExitStack() as stack:
            for function in self.functions:
                if hasattr(function, "reuse"):
                    stack.enter_context(function.reuse())
            yield

    def __call__(self, images: Any, prompts: Sequence[str], **columns: Any) -> torch.Tensor:
        """
        Compute rewards of samples: the weighted sum over all functions.

        Args:
            images (`torch.Tensor` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`, or `list`):
                Samples, floats in `[0, 1]`, or lists of images or clips.
            prompts (`list[str]`):
                Prompt of each.
            columns (`list`):
                Further columns with an entry for each sample: `references` (one or a list of several), `condition`, `task`,
                `criteria`, ... None counts as not given.

        Returns:
            `torch.Tensor` of shape `(n,)`: Rewards as float32, on the device of the images. They carry the gradient of images
            that require one.

        Raises:
            `RewardContractError`: If a function does not return one number for each sample, or cuts off the gradient.
            `NonFiniteScoreError`: If a reward is NaN or infinite.
        """
        return self.by_name(images, prompts, **columns)["reward"]

    def by_name(self, images: Any, prompts: Sequence[str], **columns: Any) -> dict[str, torch.Tensor]:
        """Rewards `(n,)` by each function's name, and their weighted sum as `"reward"`. Arguments and errors are those of a call."""
        values = self._by_name(images, prompts, columns)
        for name, found in values.items():
            bad = (~found.detach().isfinite()).nonzero()[:, 0].tolist()
            if bad:
                raise NonFiniteScoreError(
                    f"Reward {name!r} is {found[bad[0]].item()} for {len(bad)} of {len(found)} samples, the first of the prompt "
                    f"{prompts[bad[0]]!r}, but must be finite. Look at that sample, lower `learning_rate` if a generator is "
                    "tuned, or compute the reward in float32.",
                    bad,
                    found.detach(),
                )
        return values

    def _by_name(self, images: Any, prompts: Sequence[str], columns: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        columns = _complete(images, columns)
        values = {}
        for name, function, weight in zip(self.names, self.functions, self.weights, strict=True):
            # A weight of 0 is for the logs, e.g. a held-out judge.
            with nullcontext() if weight else torch.no_grad():
                values[name] = _ask(name, function, images, prompts, columns)
        weighted = [weight * values[name] for name, weight in zip(self.names, self.weights, strict=True) if weight]
        return {**values, "reward": torch.stack(weighted).sum(dim=0)}

    @torch.no_grad()
    def score_each(self, images: Any, prompts: Sequence[str], **columns: Any) -> list[float | None]:
        """
        Reward of each sample, None with a warning where a function raised or the reward is not finite: if a batch fails, its
        samples are asked about one by one. Arguments are those of a call; a [`RewardContractError`] is raised.
        """
        try:
            rewards = self._by_name(images, prompts, columns)["reward"].double().tolist()
        except RewardContractError:
            raise
        except Exception as error:
            if len(prompts) == 1:
                logger.warning(f"The reward of a sample of {prompts[0]!r} is left out: {error!r}")
                return [None]
        else:
            for reward, prompt in zip(rewards, prompts, strict=True):
                if not math.isfinite(reward):
                    logger.warning(f"The reward of a sample of {prompt!r} is left out: it is {reward}")
            return [reward if math.isfinite(reward) else None for reward in rewards]
        single = {name: values for name, values in columns.items() if values is not None}
        return [
            value
            for i in range(len(prompts))
            for value in self.score_each(
                images[i : i + 1], prompts[i : i + 1], **{name: values[i : i + 1] for name, values in single.items()}
            )
        ]


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Keep the weights of models out of graphs that are built inside, without changing them for others that may train them."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _complete(images: Any, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that were given, with an entry for each sample, and the task of clips and of samples with a condition."""
    count = len(images)
    known = {k: [v] * count if isinstance(v, str) else v for k, v in columns.items() if v is not None}
    for name, values in known.items():
        if len(values) != count:
            raise ValueError(f"`{name}` has {len(values)} entries for {count} images, but must have one for each.")
    is_clip = images.ndim == 5 if isinstance(images, torch.Tensor) else any(map(_is_clip, images))
    conditions = known.get("condition") or known.get("conditions") or [None] * count
    if is_clip or any(condition is not None for condition in conditions):
        named = known.get("task") or [None] * count
        known["task"] = [task or infer_task(*sample) for task, *sample in zip(named, images, conditions, strict=True)]
    return known


def _is_clip(sample: Any) -> bool:
    return isinstance(sample, (list, tuple)) or getattr(sample, "ndim", 0) == 4


def _ask(
    name: str, function: Callable[..., Any], images: Any, prompts: Sequence[str], columns: Mapping[str, Any]
) -> torch.Tensor:
    """Reward of each sample by one function, as float32."""
    context = _context(function, columns)
    rows = list(range(len(prompts)))
    if "references" in context:
        references = [
            list(several) or [None] if isinstance(several, (list, tuple)) else [several]
            for several in context["references"]
        ]
        rows = [row for row, several in enumerate(references) for _ in several]
        context = {key: [values[row] for row in rows] for key, values in context.items()}
        context["references"] = [reference for several in references for reference in several]
    is_judge = getattr(function, "sees_equal_images_once", False)  # which edits nothing, and knows objects again
    copies: dict[int, Any] = {}
    if not is_judge:
        context = {key: _copied(values, copies) for key, values in context.items()}
    context = {key: list(values) for key, values in context.items()}
    if isinstance(images, torch.Tensor):
        samples: Any = images[torch.tensor(rows)]
    else:
        samples = [images[row] if is_judge else _copied(images[row], copies) for row in rows]
    if isinstance(samples, torch.Tensor) and not torch.is_grad_enabled():
        samples = samples.detach()
    module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    with frozen(module) if isinstance(module, nn.Module) else nullcontext():
        given = samples
        if isinstance(samples, torch.Tensor) and is_judge:
            views = list(images if torch.is_grad_enabled() else images.detach())
            given = [views[row] for row in rows]  # those of one image are one object
        values = function(given, [prompts[row] for row in rows], **context)
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardContractError(
            f"Reward {name!r} returned a `{type(values).__name__}`, but must return a tensor of shape ({len(rows)},)."
        ) from error
    if values.shape != (len(rows),):
        raise RewardContractError(
            f"Reward {name!r} returned a tensor of shape {tuple(values.shape)} for {len(rows)} images, but must return one "
            f"number for each, of shape ({len(rows)},). Do not average over the batch, and squeeze trailing dimensions."
        )
    if isinstance(samples, torch.Tensor):
        if samples.requires_grad and not values.requires_grad:
            raise RewardContractError(
                f"Reward {name!r} carries no gradient, but the images that it was given do. Compute it from the tensor, "
                "without `torch.no_grad()`, `detach()`, rounding or a way through PIL or NumPy; or give it the weight 0 to log "
                "it only."
            )
        values = values.to(samples.device)
    values = values.to(torch.float32, copy=True)  # a function may write into what it returned
    if len(rows) == len(prompts):
        return values
    index = torch.tensor(rows, device=values.device)
    return values.new_zeros(len(prompts)).index_add(0, index, values) / torch.bincount(index)


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """What a function may edit: media and lists. An object that comes several times is copied once."""
    if isinstance(value, (list, tuple)):
        return [_copied(item, copies) for item in value]
    if isinstance(value, (Image.Image, np.ndarray, torch.Tensor)):
        if id(value) not in copies:
            copies[id(value)] = value.clone() if isinstance(value, torch.Tensor) else value.copy()
        return copies[id(value)]
    return value


def _context(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that a function takes, by the name of its argument."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    context = {}
    for column, values in columns.items():
        if column == "references" and not getattr(function, "is_pairwise", True):
            continue
        argument = f"{column}s" if column not in parameters and f"{column}s" in parameters else column
        if argument in parameters or takes_all:
            context[argument] = values
    return context


def is_address(name: Any) -> bool:
    """Whether a judge is named by the address of its server."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def _connected(reward: Any) -> Any:
    """The judge at an address, which a public name of the package stands for: rooms above this one are not imported here."""
    if is_address(reward):
        from . import RemoteReward

        return RemoteReward.at(reward)
    return reward


def _describe(function: Any) -> dict[str, Any]:
    if hasattr(function, "fingerprint"):
        return function.fingerprint()
    named = function if hasattr(function, "__qualname__") else type(function)
    description = {"function": f"{named.__module__}.{named.__qualname__}"}
    if isinstance(function, nn.Module):
        from .resumable import describe_weights

        description["weights"] = describe_weights(function)
    return description


def _distinct(names: list[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name}_{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
