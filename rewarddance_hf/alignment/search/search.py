"""
Search at inference (Sec. 3.3.2 of the [RewardDance paper](https://huggingface.co/papers/2509.08826)), on unmodified diffusers
pipelines: Best-of-N, zero-order search and Search over Paths of
["Inference-time scaling for diffusion models beyond scaling denoising steps"](https://huggingface.co/papers/2501.09732).

Every function calls the pipeline itself, see [`~rewarddance_hf.alignment.pipelines.staged.StagedPipeline`], and counts denoiser
evaluations: one for each image and step. The two or more passes of classifier-free guidance at one step are one evaluation.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ...import_utils import require_extra
from ...scoring.ranking import METHODS


require_extra("diffusers", "diffusers")

from ..pipelines.staged import StagedPipeline, Trajectory  # noqa: E402
from .drawing import make_preview  # noqa: E402
from .result import PathNode, SearchResult  # noqa: E402
from .verifier import Verifier  # noqa: E402


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "pt", "np")
# When the first prompts have all lost all of their paths, the reward function is taken for broken.
ENOUGH_LOST_PROMPTS = 3


def best_of_n(
    pipeline: Any,
    prompt: str | Sequence[str],
    reward: Callable[..., Any],
    num_candidates: int | None = None,
    preview_step: int | None = None,
    num_kept: int = 1,
    max_denoiser_evaluations: int | None = None,
    num_images: int = 1,
    tournament: str = "round_robin",
    context: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    distribute: bool = False,
    **pipeline_arguments: Any,
) -> Any:
    r"""
    Generate candidates and keep the best.

    A candidate's seed makes it again with the pipeline alone:
    `pipeline(prompt, generator=torch.Generator().manual_seed(node.seed), ...)`.

    With `preview_step`, all candidates are denoised so far only; their clean predictions are judged, and only the
    `num_kept` best are finished.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline.
        prompt (`str` or `list[str]`):
            Prompts. With `prompt_embeds` among the pipeline's arguments they are what the reward function gets.
        reward (`Callable` or [`RewardDanceScorer`]):
            `reward(images, prompts, **context) -> (n,)`. A pairwise judge ranks the candidates in a tournament.
        num_candidates (`int`, *optional*):
            Number of candidates for each prompt. Defaults to as many as `max_denoiser_evaluations` allows.
        preview_step (`int`, *optional*):
            Number of steps after which the clean predictions are judged. Defaults to none: all candidates are finished.
        num_kept (`int`, *optional*, defaults to `1`):
            Number of candidates that are finished after `preview_step`.
        max_denoiser_evaluations (`int`, *optional*):
            Budget for each prompt, which is never exceeded: fewer candidates are made if need be.
        num_images (`int`, *optional*, defaults to `1`):
            Number of best images in the result.
        tournament (`str`, *optional*, defaults to `"round_robin"`):
            Method of [`RewardDanceScorer.rank`], for a pairwise judge.
        context (`dict`, *optional*):
            Further arguments of `reward`, such as `task` and `criteria`; `conditions` holds one first frame for each
            prompt. Clips are judged by a [`RewardDanceScorer`] as `task="text-to-video"` unless it is given.
        seed (`int`, *optional*, defaults to `0`):
            Seed that all others are made from, together with the index of the prompt.
        batch_size (`int`, *optional*, defaults to `8`):
            Largest number of images per call of the pipeline.
        distribute (`bool`, *optional*, defaults to `False`):
            Whether to split the prompts over the processes of `accelerate launch`; each gets all results. They do not depend
            on the number of processes. On CPUs it needs the environment variable `ACCELERATE_USE_CPU=true`.
        pipeline_arguments:
            Any argument of the pipeline's call. Those about prompts and images may have one entry for each prompt. A
            callback counts steps from 0 in each stage.

    Returns:
        [`~rewarddance_hf.alignment.search.result.SearchResult`]: Or a list of them if `prompt` is a list.

    Raises:
        `ValueError`: If an argument is out of range, or the budget does not suffice for one image.
        `NotImplementedError`: If the scheduler or pipeline cannot stop at `preview_step`.
        `RuntimeError`: If the reward function fails for every image.

    Example:

    ```python
    result = best_of_n(pipeline, "a red circle", scorer, num_candidates=16, num_inference_steps=28)
    result.images[0], result.rewards[0], result.denoiser_evaluations
    ```
    """
    if num_candidates is None and max_denoiser_evaluations is None:
        raise ValueError(
            "`num_candidates` and `max_denoiser_evaluations` are None, but one of them must say how many candidates to make. "
            "Pass one."
        )
    if tournament not in METHODS:
        raise ValueError(f"`tournament` is {tournament!r}, but must be one of {METHODS}.")
    _check_positive(num_candidates=num_candidates, num_kept=num_kept, preview_step=preview_step)

    def run(search: "_Search", prompts: Sequence[int]) -> None:
        count, kept = plan(search)
        paths = search.start(prompts, count, 0, preview_step or search.num_steps)
        if preview_step:
            paths = search.keep(paths, kept, tournament)
            paths = search.advance([path.go_on() for path in paths], preview_step, search.num_steps)
        search.finish(paths, num_images, tournament)

    def plan(search: "_Search") -> tuple[int, int]:
        """Number of candidates, and of those that are finished."""
        num_steps, budget = search.num_steps, search.budget
        first = preview_step or num_steps
        if first >= num_steps and preview_step:
            raise ValueError(
                f"`preview_step` is {preview_step}, but must be less than the number of steps, {num_steps}. Lower it."
            )
        count = num_candidates
        if count is None:
            count = max((budget - num_kept * (num_steps - first)) // first, 1)
        kept = min(num_kept, count)
        if count * first + kept * (num_steps - first) > budget:
            kept = min(kept, budget // num_steps)
            count = min(count, (budget - kept * (num_steps - first)) // first)
        return count, kept

    return _run_search(
        "best-of-n", pipeline, prompt, reward, run, plan, max_denoiser_evaluations, context, seed, batch_size, distribute,
        num_images, pipeline_arguments,
    )  # fmt: skip


def zero_order_search(
    pipeline: Any,
    prompt: str | Sequence[str],
    verifier: Callable[..., Any],
    num_neighbors: int = 4,
    num_rounds: int | None = None,
    strength: float = 0.9,
    max_denoiser_evaluations: int | None = None,
    num_images: int = 1,
    context: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    distribute: bool = False,
    **pipeline_arguments: Any,
) -> Any:
    r"""
    Search the noise around the best one so far.

    Each round makes images from `num_neighbors` noises `sqrt(1 - strength^2) * best + strength * fresh`; the best of them
    and of all before is the next center.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline.
        prompt (`str` or `list[str]`):
            Prompts, as in [`best_of_n`].
        verifier (`Callable` or [`RewardDanceScorer`]):
            `verifier(images, prompts, **context) -> (n,)`; not a pairwise judge.
        num_neighbors (`int`, *optional*, defaults to `4`):
            Number of noises in each round.
        num_rounds (`int`, *optional*):
            Number of rounds. Defaults to as many as `max_denoiser_evaluations` allows, the last of which may be smaller.
        strength (`float`, *optional*, defaults to `0.9`):
            Share of fresh noise, above 0 and at most 1.
        max_denoiser_evaluations, num_images, context, seed, batch_size, distribute, pipeline_arguments:
            As in [`best_of_n`].

    Returns:
        [`~rewarddance_hf.alignment.search.result.SearchResult`]: Or a list of them if `prompt` is a list.

    Raises:
        `ValueError`: If an argument is out of range, or the budget does not suffice for one image.
        `RuntimeError`: If the verifier fails for every image.
    """
    if num_rounds is None and max_denoiser_evaluations is None:
        raise ValueError(
            "`num_rounds` and `max_denoiser_evaluations` are None, but one of them must say how long to search. Pass one."
        )
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"`strength` is {strength}, but must be above 0.0 and at most 1.0.")
    _check_positive(num_neighbors=num_neighbors, num_rounds=num_rounds)

    def run(search: "_Search", prompts: Sequence[int]) -> None:
        num_steps = search.num_steps
        everything = search.start(prompts, 1, 0, num_steps)
        for count in plan(search):
            centers = search.best(everything)
            branches = [path.mix(strength, search) for path in centers for _ in range(count)]
            for path in centers:
                path.node.survived = True
            everything += search.advance(branches, 0, num_steps)
        search.finish(everything, num_images)

    def plan(search: "_Search") -> list[int]:
        """Number of neighbors in each round."""
        affordable = search.budget // search.num_steps - 1
        if num_rounds is not None:
            affordable = min(affordable, num_rounds * num_neighbors)
        whole, rest = divmod(affordable, num_neighbors)
        return [num_neighbors] * whole + [rest] * (rest > 0)

    return _run_search(
        "zero-order", pipeline, prompt, verifier, run, plan, max_denoiser_evaluations, context, seed, batch_size, distribute,
        num_images, pipeline_arguments,
    )  # fmt: skip


def search_over_paths(
    pipeline: Any,
    prompt: str | Sequence[str],
    verifier: Callable[..., Any],
    num_paths: int = 4,
    num_branches: int | None = None,
    start_step: int | None = None,
    renoise_steps: int | None = None,
    denoise_steps: int | None = None,
    max_denoiser_evaluations: int | None = None,
    num_images: int = 1,
    context: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    distribute: bool = False,
    **pipeline_arguments: Any,
) -> Any:
    r"""
    Search over Paths: grow the most promising of several sampling paths.

    1. Denoise `num_paths` noises by `start_step` steps.
    2. Noise each back by `renoise_steps` steps, `num_branches` times; the forward process keeps the distribution.
    3. Denoise by `denoise_steps` steps, have the clean predictions verified, and keep the best `num_paths`.
    4. Repeat 2 and 3 until no noise is left; the last ones are verified as images.

    All noise levels are those of the pipeline's own schedule. With `num_branches=1` and `renoise_steps=0` the images are those
    of plain sampling, bit for bit.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline whose scheduler is a flow-matching or diffusion one with one timestep a step: FlowMatch Euler, DDIM,
            DDPM, LCM, Euler, DPM++, UniPC, ...
        prompt (`str` or `list[str]`):
            Prompts, as in [`best_of_n`].
        verifier (`Callable` or [`RewardDanceScorer`]):
            `verifier(images, prompts, **context) -> (n,)`; not a pairwise judge.
        num_paths (`int`, *optional*, defaults to `4`):
            Number of paths that are kept, N.
        num_branches (`int`, *optional*):
            Number of noises that each path goes on with, M. Defaults to as many as `max_denoiser_evaluations` allows.
        start_step (`int`, *optional*):
            Number of steps before the first branching. Defaults to three eighths of them.
        renoise_steps (`int`, *optional*):
            Number of steps that noise is added for. Defaults to an eighth of all, at most `start_step`.
        denoise_steps (`int`, *optional*):
            Number of steps that are made then, more than `renoise_steps`. Defaults to five eighths of all.
        max_denoiser_evaluations (`int`, *optional*):
            Budget for each prompt, which is never exceeded: paths are left out from the beginning if not all could be
            finished, and branch only as long as all can be finished.
        num_images, context, seed, batch_size, distribute, pipeline_arguments:
            As in [`best_of_n`].

    Returns:
        [`~rewarddance_hf.alignment.search.result.SearchResult`]: Or a list of them if `prompt` is a list.

    Raises:
        `ValueError`: If an argument is out of range, or the budget does not suffice for one image.
        `NotImplementedError`: If the scheduler's noise levels are not known, or the pipeline makes a part of its schedule
            only.
        `RuntimeError`: If the verifier fails for every path.
    """
    if num_branches is None and max_denoiser_evaluations is None:
        raise ValueError(
            "`num_branches` and `max_denoiser_evaluations` are None, but one of them must say how many branches to make. "
            "Pass one."
        )
    _check_positive(num_paths=num_paths, num_branches=num_branches, start_step=start_step, denoise_steps=denoise_steps)

    def run(search: "_Search", prompts: Sequence[int]) -> None:
        count, branches, stages = plan(search)
        position = stages[0][1]
        paths = search.start(prompts, count, *stages[0], verify=position == search.num_steps)
        for start, stop in stages[1:]:
            if start == position and branches == 1:
                grown = [path.go_on() for path in paths]
            else:
                grown = [path.branch(position, start, search) for path in paths for _ in range(branches)]
            paths = search.advance(grown, start, stop)
            if stop < search.num_steps:
                paths = search.keep(paths, count)
            position = stop
        if position < search.num_steps:
            paths = search.advance([path.go_on() for path in paths], position, search.num_steps)
        search.finish(paths, num_images)

    def plan(search: "_Search") -> tuple[int, int, list[tuple[int, int]]]:
        """Number of paths and branches, and the stages that the budget suffices for."""
        num_steps = search.num_steps
        search.staged.noise_levels  # noqa: B018 (raises for unknown schedulers)
        first = max(3 * num_steps // 8, 1) if start_step is None else start_step
        back = min(max(num_steps // 8, 1), first) if renoise_steps is None else renoise_steps
        ahead = max(5 * num_steps // 8, back + 1) if denoise_steps is None else denoise_steps
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
        stages, position = [(0, first)], first
        while position < num_steps:
            start = position - back
            position = min(start + ahead, num_steps)
            stages.append((start, position))
        budget = search.budget
        count = min(num_paths, budget // num_steps)
        length = sum(stop - start for start, stop in stages[1:])
        branches = num_branches
        if branches is None:
            branches = max((budget - count * first) // (count * max(length, 1)), 1)
            if branches == 1:  # nothing to choose from: the paths are finished as they are
                return count, 1, stages[:1]
        affordable, spent = stages[:1], count * first
        for start, stop in stages[1:]:
            spent += count * branches * (stop - start)
            if spent + count * (num_steps - stop) > budget:
                break
            affordable.append((start, stop))
        return count, branches, affordable

    return _run_search(
        "paths", pipeline, prompt, verifier, run, plan, max_denoiser_evaluations, context, seed, batch_size, distribute,
        num_images, pipeline_arguments,
    )  # fmt: skip


def replay(
    pipeline: Any, prompt: str, lineage: Iterable[PathNode | Mapping[str, Any]], **pipeline_arguments: Any
) -> Any:
    r"""
    Make an image of a search again.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline.
        prompt (`str`):
            Prompt.
        lineage (`list[PathNode]` or `list[dict]`):
            `result.lineage()`, or an entry of `lineages` in a saved `search.json`.
        pipeline_arguments:
            Arguments of the pipeline's call, as in the search.

    Returns:
        Image or clip in the `output_type` of the call. It differs from that of the search by rounding where the denoiser
        gives other last digits in another batch size.

    Raises:
        `ValueError`: If the schedule has another number of steps than the lineage.

    Example:

    ```python
    image = replay(pipeline, "a red circle", result.lineage(), num_inference_steps=28)
    ```
    """
    output_type = _output_type(pipeline, pipeline_arguments)
    staged = StagedPipeline(pipeline, [prompt], pipeline_arguments)
    names = ("noise", "seed", "start_step", "stop_step", "strength")
    steps = [node if isinstance(node, Mapping) else {name: getattr(node, name) for name in names} for node in lineage]
    if steps[-1]["stop_step"] != staged.num_steps:
        raise ValueError(
            f"The lineage ends after step {steps[-1]['stop_step']}, but the pipeline makes {staged.num_steps}. Pass the same "
            "`num_inference_steps` and other arguments as in the search."
        )
    trajectory: Trajectory | None = None
    position = 0
    for step in steps:
        generator = None if step["seed"] is None else torch.Generator().manual_seed(step["seed"])
        if trajectory is None or step["noise"] == "fresh":
            assert generator is not None
            trajectory = Trajectory(0, generator)
        elif step["noise"] == "mixed":
            assert generator is not None
            trajectory = Trajectory(0, generator, pivot=trajectory.initial, strength=step["strength"])
        elif step["noise"] == "renoised":
            assert generator is not None
            trajectory = staged.renoise(trajectory, position, step["start_step"], generator)
        ((trajectories, images),) = staged.advance([trajectory], step["start_step"], step["stop_step"])
        trajectory, position = trajectories[0], step["stop_step"]
    return _convert(images[0], output_type)


@dataclass(eq=False)
class _Path:
    """Path, the node of its latest stage, and what is to be seen at its end."""

    trajectory: Trajectory
    node: PathNode
    image: torch.Tensor | None = None

    def go_on(self) -> "_Path":
        """The same path, about to run its next stage."""
        self.node.survived = True
        return self._child("none", None, self.trajectory)

    def branch(self, step: int, back_to: int, search: "_Search") -> "_Path":
        """A branch of it with its own noise."""
        self.node.survived = True
        seed = search.next_seed(self.trajectory.prompt_index)
        generator = torch.Generator().manual_seed(seed)
        return self._child("renoised", seed, search.staged.renoise(self.trajectory, step, back_to, generator))

    def mix(self, strength: float, search: "_Search") -> "_Path":
        """A path that begins near the noise of this one."""
        seed = search.next_seed(self.trajectory.prompt_index)
        trajectory = Trajectory(
            self.trajectory.prompt_index,
            torch.Generator().manual_seed(seed),
            pivot=self.trajectory.initial,
            strength=strength,
        )
        child = self._child("mixed", seed, trajectory)
        child.node.strength = strength
        return child

    def _child(self, noise: str, seed: int | None, trajectory: Trajectory) -> "_Path":
        return _Path(trajectory, PathNode(-1, self.node.index, noise, seed, 0, 0))


class _Search:
    """
    State of one search over several prompts.

    Args:
        staged ([`StagedPipeline`]):
            Pipeline with all prompts.
        verifier ([`Verifier`]):
            Reward function with all prompts.
        prompt_numbers (`list[int]`):
            Number of each prompt among those of all processes, for the seeds.
        budget (`int`):
            Budget of each prompt.
        seed (`int`):
            Seed of the search.
        output_type (`str`):
            Type of the images in results.
        method (`str`):
            Name of the search.
    """

    def __init__(
        self,
        staged: StagedPipeline,
        verifier: Verifier,
        prompt_numbers: Sequence[int],
        budget: int | None,
        seed: int,
        output_type: str,
        method: str,
    ) -> None:
        self.staged = staged
        self.verifier = verifier
        self.prompt_numbers = prompt_numbers
        self.seed = seed
        self.output_type = output_type
        self.method = method
        self.num_steps = staged.num_steps
        self.budget = 2**62 if budget is None else budget
        if self.budget < self.num_steps:
            raise ValueError(
                f"`max_denoiser_evaluations` is {budget}, but one image takes {self.num_steps}. Raise it, or lower "
                "`num_inference_steps`."
            )
        self.nodes: list[list[PathNode]] = [[] for _ in prompt_numbers]
        self.num_seeds = [0] * len(prompt_numbers)
        self.results: dict[int, SearchResult] = {}
        self.group: Sequence[int] = []
        self.lost_prompts: set[int] = set()

    def next_seed(self, prompt_index: int) -> int:
        """A new seed, which depends on the search's seed, the prompt and the number of seeds before."""
        entropy = (self.seed, self.prompt_numbers[prompt_index], self.num_seeds[prompt_index])
        self.num_seeds[prompt_index] += 1
        # 53 bits, which every reader of JSON keeps
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 11

    def start(self, prompts: Sequence[int], count: int, start: int, stop: int, verify: bool = True) -> list[_Path]:
        """Begin paths from fresh noise and run their first stage."""
        paths = []
        for index in prompts:
            for _ in range(count):
                seed = self.next_seed(index)
                trajectory = Trajectory(index, torch.Generator().manual_seed(seed))
                paths.append(_Path(trajectory, PathNode(-1, None, "fresh", seed, 0, 0)))
        return self.advance(paths, start, stop, verify)

    def advance(self, paths: Sequence[_Path], start: int, stop: int, verify: bool = True) -> list[_Path]:
        """Run one stage of each path, and give each its reward. Paths that cannot be judged are left out."""
        for path in paths:
            nodes = self.nodes[path.trajectory.prompt_index]
            path.node.index = len(nodes)
            path.node.start_step, path.node.stop_step = start, stop
            nodes.append(path.node)
        # A pairwise judge needs all images of a prompt at once.
        keep_images = stop == self.num_steps or self.verifier.is_pairwise
        done = 0
        for trajectories, images in self.staged.advance([path.trajectory for path in paths], start, stop):
            batch = paths[done : done + len(trajectories)]
            done += len(trajectories)
            images = images.float()
            rewards: list[float | None] = [None] * len(batch)
            if verify and not self.verifier.is_pairwise:
                rewards = self.verifier.score(images, [trajectory.prompt_index for trajectory in trajectories])
            for path, trajectory, image, reward in zip(batch, trajectories, images.cpu(), rewards, strict=True):
                path.trajectory = trajectory
                path.image = image if keep_images else None
                path.node.reward = reward
                path.node.lost = verify and not self.verifier.is_pairwise and reward is None
                path.node.preview = _preview(image)
        alive = [path for path in paths if not path.node.lost]
        self._check_alive(alive)
        return alive

    def keep(self, paths: Sequence[_Path], count: int, tournament: str = "round_robin") -> list[_Path]:
        """The best paths of each prompt, in the order in which they were made: that of a batch changes last digits."""
        ranked = self._ranked(paths, tournament)
        return [path for group in ranked for path in sorted(group[:count], key=lambda path: path.node.index)]

    def best(self, paths: Sequence[_Path]) -> list[_Path]:
        """The best path of each prompt."""
        return self.keep(paths, 1)

    def finish(self, paths: Sequence[_Path], num_images: int, tournament: str = "round_robin") -> None:
        """Make results of the paths that have ended."""
        for ranked in self._ranked(paths, tournament):
            best = ranked[:num_images]
            index = best[0].trajectory.prompt_index
            for path in best:
                path.node.survived = True
            self.results[index] = self._result(index, best)

    def result(self, index: int) -> SearchResult:
        """Result of a prompt, without images if all of its paths were lost."""
        if index not in self.results:
            logger.warning("All paths of %r are lost: its result has no image.", self.staged.prompts[index])
            self.results[index] = self._result(index, [])
        return self.results[index]

    def _result(self, index: int, best: Sequence[_Path]) -> SearchResult:
        return SearchResult(
            method=self.method,
            prompt=self.staged.prompts[index],
            images=[_convert(path.image, self.output_type) for path in best if path.image is not None],
            rewards=[float("nan") if path.node.reward is None else path.node.reward for path in best],
            nodes=self.nodes[index],
            winners=[path.node.index for path in best],
            denoiser_evaluations=self.staged.evaluations[index],
            forward_passes=self.staged.forward_passes[index],
            verifier_calls=self.verifier.calls[index],
        )

    def _ranked(self, paths: Sequence[_Path], tournament: str) -> list[list[_Path]]:
        """Paths of each prompt, best first."""
        groups: dict[int, list[_Path]] = {}
        for path in paths:
            groups.setdefault(path.trajectory.prompt_index, []).append(path)
        if not self.verifier.is_pairwise:
            return [sorted(group, key=_badness) for group in groups.values()]
        ranked = []
        for index, group in groups.items():
            images = [path.image for path in group if path.image is not None]
            order, rewards = self.verifier.rank(images, index, tournament)
            for place, (path, reward) in enumerate(zip(group, rewards, strict=True)):
                path.node.reward = reward
                path.node.lost = place not in order
            ranked.append([group[place] for place in order])
        ranked = [group for group in ranked if group]
        self._check_alive(ranked)
        return ranked

    def _check_alive(self, alive: Sequence[Any]) -> None:
        """A reward function that never works is an error, and not bad luck with one prompt."""
        if alive:
            return
        self.lost_prompts.update(self.group)
        found = any(result.images for result in self.results.values())
        if not found and len(self.lost_prompts) >= min(len(self.staged.prompts), ENOUGH_LOST_PROMPTS):
            raise _broken(self.verifier)


def _broken(verifier: Verifier) -> RuntimeError:
    """Error that names what the reward function raised last, if it did."""
    error = RuntimeError(
        f"The reward function failed for every path, last with {verifier.last_error!r}. It must return one finite number for "
        "each image."
    )
    error.__cause__ = verifier.last_error
    return error


def _badness(path: _Path) -> tuple[float, int]:
    return (0.0 if path.node.reward is None else -path.node.reward, path.node.index)


def _run_search(
    method: str,
    pipeline: Any,
    prompt: str | Sequence[str],
    reward: Callable[..., Any],
    run: Callable[[_Search, Sequence[int]], None],
    plan: Callable[[_Search], Any],
    budget: int | None,
    context: Mapping[str, Any] | None,
    seed: int,
    batch_size: int,
    distribute: bool,
    num_images: int,
    arguments: dict[str, Any],
) -> Any:
    """Search for all prompts, a few at a time so that few images are in memory."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` is {prompt!r}, but must be a string or a list of at least one string.")
    _check_positive(batch_size=batch_size, num_images=num_images, max_denoiser_evaluations=budget)
    if seed < 0:
        raise ValueError(f"`seed` is {seed}, but must be 0 or more.")
    output_type = _output_type(pipeline, arguments)
    verifier = Verifier(reward, prompts, context)
    if verifier.is_pairwise and method != "best-of-n":
        raise ValueError(
            "The judge is pairwise, but this search verifies one sample at a time. Load a pointwise judge, or use "
            "`best_of_n`."
        )
    staged = StagedPipeline(pipeline, prompts, arguments, batch_size)

    def search_some(indices: Sequence[int]) -> list[SearchResult]:
        search = _Search(staged, verifier, range(len(prompts)), budget, seed, output_type, method)
        plan(search)  # bad arguments are refused before anything is computed
        group: list[int] = []
        for index in indices:
            group.append(index)
            if len(group) * _paths_of_start(plan(search)) >= batch_size or index == indices[-1]:
                search.group = group
                run(search, group)
                group = []
        return [search.result(index) for index in indices]

    everything = list(range(len(prompts)))
    results = _on_all_processes(search_some, everything) if distribute else search_some(everything)
    if not any(result.images for result in results):
        raise _broken(verifier)
    return results[0] if isinstance(prompt, str) else results


def _paths_of_start(planned: Any) -> int:
    """Number of paths that each prompt begins with: the first number of the plan of Best-of-N and Search over Paths."""
    return planned[0] if isinstance(planned, tuple) else 1


def _on_all_processes(
    search_some: Callable[[Sequence[int]], list[SearchResult]], indices: list[int]
) -> list[SearchResult]:
    """Split prompts over processes, and give all results to each."""
    require_extra("diffusers", "accelerate")
    from accelerate import PartialState
    from accelerate.utils import gather_object, parse_flag_from_env

    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    found: list[tuple[int, SearchResult]] = []
    error: str | None = None
    with state.split_between_processes(indices) as mine:
        try:
            found = list(zip(mine, search_some(mine), strict=True)) if mine else []
        except Exception as raised:  # the other processes would wait forever
            if state.num_processes == 1:
                raise
            error = f"process {state.process_index}: {raised!r}"
    errors = [text for text in gather_object([error]) if text is not None]
    if errors:
        raise RuntimeError(
            f"The search failed on {len(errors)} of {state.num_processes} processes: {'; '.join(errors)}"
        )
    return [result for _, result in sorted(gather_object(found), key=lambda pair: pair[0])]


def _output_type(pipeline: Any, arguments: Mapping[str, Any]) -> str:
    signature = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(set(arguments) - set(signature))
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        raise TypeError(f"`{type(pipeline).__name__}` takes no argument `{unknown[0]}`. Leave it out.")
    output_type = arguments.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"`output_type` is {output_type!r}, but must be one of {OUTPUT_TYPES}: images are to be judged."
        )
    return output_type


def _convert(image: torch.Tensor, output_type: str) -> Any:
    """Image `(3, height, width)` or clip `(num_frames, 3, height, width)` in the type that was asked for."""
    if output_type == "pt":
        return image
    array = image.movedim(-3, -1).float().cpu().numpy()
    if output_type == "np":
        return array
    frames = [Image.fromarray(frame) for frame in (array.reshape(-1, *array.shape[-3:]) * 255).round().astype("uint8")]
    return frames if image.ndim == 4 else frames[0]


def _preview(image: torch.Tensor) -> Image.Image:
    return make_preview(_convert(image[len(image) // 2] if image.ndim == 4 else image, "pil"))


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` is {value!r}, but must be a positive integer.")
