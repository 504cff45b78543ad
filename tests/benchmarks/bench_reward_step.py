"""
A reward step of ReFL, forward and backward to the pixels of samples, against the full graph of the plain path.

Each sample has a prompt and a reference of its own, as in a batch of prompts, or all have one. `first` is the step when a prompt
comes for the first time, `again` one in which what goes before the sample has been kept, `checkpointed` the latter with
layers that are computed again in the backward pass.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from judges import PROMPT, make_judge, tiny_config
from timing import interleaved, peak_of


SAMPLES = 4
WAYS: dict[str, dict[str, Any]] = {
    "full_graph": {"engine": "plain"},
    "first": {},
    "again": {},
    "checkpointed": {"gradient_checkpointing": True},
}


class Step:
    """One way of getting the gradient of some samples."""

    def __init__(
        self,
        way: str,
        layout: str,
        has_one_reference: bool,
        num_tokens: int = 64,
        size: str = "13m",
        judge: tuple[Any, Any] | None = None,
    ) -> None:
        from tiny_vlms import random_image

        from rewarddance_hf import RewardDanceScorer

        judge = judge or make_judge(num_tokens, layout, **tiny_config(size))
        self.scorer = RewardDanceScorer(*judge, **WAYS[way])
        side = round(num_tokens**0.5) * 28
        references = [random_image(0 if has_one_reference else i, side, side) for i in range(SAMPLES)]
        words = PROMPT.split()
        prompts = [" ".join(words[i:] + words[:i]) if not has_one_reference else PROMPT for i in range(SAMPLES)]
        self.context = (prompts, references)
        pixels = torch.rand(SAMPLES, 3, side, side, generator=torch.Generator().manual_seed(0))
        self.samples = pixels.to(judge[0].device).requires_grad_()
        self.stack = ExitStack()
        if way in ("again", "checkpointed"):
            self.stack.enter_context(self.scorer.reuse())
        self()  # libraries are loaded, buffers made, states kept

    def __call__(self) -> torch.Tensor:
        """Gradient of the rewards."""
        rewards = self.scorer.score(self.samples, *self.context)
        return torch.autograd.grad(rewards.log().sum(), self.samples)[0]


def reward_step(*arguments: Any, repeats: int = 3) -> dict[str, float]:
    """Time of all ways over that of the full graph, and how their gradient differs from its."""
    steps = {way: Step(way, *arguments) for way in WAYS}
    gradients, seconds = interleaved(steps, repeats)
    for step in steps.values():
        step.stack.close()
    wanted, results = gradients["full_graph"], {"full_graph_seconds": seconds["full_graph"]}
    for way in list(WAYS)[1:]:
        results[f"{way}_time_over_full_graph"] = seconds[way] / seconds["full_graph"]
        results[f"{way}_gradient_difference"] = float((gradients[way] - wanted).norm() / wanted.norm())
    return results


def with_memory(*arguments: Any) -> dict[str, float]:
    """The same with peaks of memory, each in a fresh process."""
    results = reward_step(*arguments)
    peaks = {way: peak_of(_measure, way, *arguments) for way in WAYS}
    results["full_graph_peak_gb"] = peaks["full_graph"] / 1e9
    return results | {f"{way}_memory_over_full_graph": peaks[way] / peaks["full_graph"] for way in list(WAYS)[1:]}


def _measure(measure: Callable[[Callable[[], Any]], None], *arguments: Any) -> None:
    measure(Step(*arguments))


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """Both layouts, for samples of different prompts and, if `is_full`, for those of one."""
    return {
        f"{'one_prompt' if is_one else 'own_prompts'}/{layout}": (
            lambda layout=layout, is_one=is_one: with_memory(layout, is_one)
        )
        for is_one in ((False, True) if is_full else (False,))
        for layout in ("text_first", "images_first")
    }
