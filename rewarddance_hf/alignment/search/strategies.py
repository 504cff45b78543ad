"""
Strategies of search: which paths are begun, kept and grown, within a budget.

A strategy checks its arguments (`check`), plans from the number of steps and the budget (`plan`, which refuses what is
impossible before anything is computed), and then works on some prompts at a time (`run`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...checks import check_integers
from ...scoring.ranking import METHODS
from ..pipelines.staged import StagedPipeline
from .paths import Path, Search


def _check_one(budget: int | None, **value: int | None) -> None:
    name = next(iter(value))
    if value[name] is None and budget is None:
        raise ValueError(
            f"`{name}` and `max_denoiser_evaluations` are None, but one of them must say how long to search. Pass one."
        )


@dataclass
class BestOfN:
    """Generate candidates and keep the best; with `preview_step`, after a look at their clean predictions."""

    num_candidates: int | None = None
    preview_step: int | None = None
    num_kept: int = 1
    ranking_method: str = "round_robin"
    name: ClassVar[str] = "best-of-n"

    def check(self, budget: int | None) -> None:
        _check_one(budget, num_candidates=self.num_candidates)
        if self.ranking_method not in METHODS:
            raise ValueError(f"`ranking_method` is {self.ranking_method!r}, but must be one of {METHODS}.")
        check_integers(
            may_be_none=True,
            num_candidates=self.num_candidates,
            num_kept=self.num_kept,
            preview_step=self.preview_step,
        )

    def plan(self, staged: StagedPipeline, budget: int) -> int:
        """How many candidates to make and to finish; returns the number of paths that each prompt begins with."""
        num_steps = staged.num_steps
        first = self.preview_step or num_steps
        if self.preview_step:
            if first >= num_steps:
                raise ValueError(
                    f"`preview_step` is {first}, but must be less than the number of steps, {num_steps}. Lower it."
                )
            staged.check_parts()
        rest = num_steps - first
        count = self.num_candidates
        if count is None:
            count = max((budget - self.num_kept * rest) // first, 1)
        kept = min(self.num_kept, count)
        if count * first + kept * rest > budget:
            kept = min(kept, budget // num_steps)
            count = min(count, (budget - kept * rest) // first)
        self.count, self.kept = count, kept
        return count

    def run(self, search: Search, prompts: Sequence[int], num_images: int) -> None:
        paths = search.advance(search.begin(prompts, self.count), 0, self.preview_step or search.num_steps)
        if self.preview_step:
            paths = search.keep(paths, self.kept, self.ranking_method)
            paths = search.advance([path.go_on() for path in paths], self.preview_step, search.num_steps)
        search.finish(prompts, paths, num_images, self.ranking_method)


@dataclass
class ZeroOrder:
    """Search the noise around the best one so far."""

    num_neighbors: int = 4
    num_rounds: int | None = None
    noise_strength: float = 0.9
    name: ClassVar[str] = "zero-order"

    def check(self, budget: int | None) -> None:
        _check_one(budget, num_rounds=self.num_rounds)
        if not 0.0 < self.noise_strength <= 1.0:
            raise ValueError(f"`noise_strength` is {self.noise_strength}, but must be above 0.0 and at most 1.0.")
        check_integers(may_be_none=True, num_neighbors=self.num_neighbors, num_rounds=self.num_rounds)

    def plan(self, staged: StagedPipeline, budget: int) -> int:
        """How many neighbors each round has; returns the number of paths that each prompt begins with."""
        affordable = budget // staged.num_steps - 1
        if self.num_rounds is not None:
            affordable = min(affordable, self.num_rounds * self.num_neighbors)
        whole, rest = divmod(affordable, self.num_neighbors)
        self.rounds = [self.num_neighbors] * whole + [rest] * (rest > 0)
        return 1

    def run(self, search: Search, prompts: Sequence[int], num_images: int) -> None:
        found = search.advance(search.begin(prompts, 1), 0, search.num_steps)
        for count in self.rounds:
            centers = {path.prompt_index: path for path in search.keep(found, 1)}
            paths: list[Path] = []
            for index in prompts:
                if index in centers:
                    paths += [centers[index].mix(self.noise_strength, search) for _ in range(count)]
                else:  # all were lost so far
                    paths += search.begin([index], count)
            found += search.advance(paths, 0, search.num_steps)
        search.finish(prompts, found, num_images)


@dataclass
class OverPaths:
    """Grow the most promising of several paths: noise them back, branch, denoise, keep the best."""

    num_paths: int = 4
    num_branches: int | None = None
    start_step: int | None = None
    renoise_steps: int | None = None
    denoise_steps: int | None = None
    name: ClassVar[str] = "paths"

    def check(self, budget: int | None) -> None:
        _check_one(budget, num_branches=self.num_branches)
        check_integers(
            may_be_none=True,
            num_paths=self.num_paths,
            num_branches=self.num_branches,
            start_step=self.start_step,
            denoise_steps=self.denoise_steps,
        )

    def plan(self, staged: StagedPipeline, budget: int) -> int:
        """Paths, branches, and the stages that the budget allows; returns the number of paths."""
        num_steps = staged.num_steps
        first = max(3 * num_steps // 8, 1) if self.start_step is None else self.start_step
        back = min(max(num_steps // 8, 1), first) if self.renoise_steps is None else self.renoise_steps
        ahead = max(5 * num_steps // 8, back + 1) if self.denoise_steps is None else self.denoise_steps
        if not first <= num_steps:
            raise ValueError(
                f"`start_step` is {first}, but must be at most the number of steps, {num_steps}. Lower it."
            )
        if not 0 <= back <= first:
            raise ValueError(f"`renoise_steps` is {back}, but must be from 0 to `start_step`, {first}.")
        if ahead <= back:
            raise ValueError(
                f"`denoise_steps` is {ahead} and `renoise_steps` is {back}, but paths must lose more noise than they get. "
                "Raise `denoise_steps`."
            )
        staged.check_parts()
        stages, position = [(0, first)], first
        while position < num_steps:
            start = position - back
            position = min(start + ahead, num_steps)
            stages.append((start, position))
        self.count = count = min(self.num_paths, budget // num_steps)
        length = sum(stop - start for start, stop in stages[1:])
        self.branches = self.num_branches or max((budget - count * first) // (count * max(length, 1)), 1)
        self.stages, spent = stages[:1], count * first
        if self.num_branches is None and self.branches == 1:
            return count  # nothing to choose from: the paths are finished as they are
        for start, stop in stages[1:]:
            spent += count * self.branches * (stop - start)
            if spent + count * (num_steps - stop) > budget:
                break
            self.stages.append((start, stop))
        return count

    def run(self, search: Search, prompts: Sequence[int], num_images: int) -> None:
        first, num_steps = self.stages[0][1], search.num_steps
        paths = search.advance(search.begin(prompts, self.count), 0, first, judge=first == num_steps)
        position = first
        for start, stop in self.stages[1:]:
            if start == position and self.branches == 1:
                grown = [path.go_on() for path in paths]
            else:
                grown = [path.branch(position, start, search) for path in paths for _ in range(self.branches)]
            paths = search.advance(grown, start, stop)
            if stop < num_steps:
                paths = search.keep(paths, self.count)
            position = stop
        if position < num_steps:
            paths = search.advance([path.go_on() for path in paths], position, num_steps)
        search.finish(prompts, paths, num_images)
