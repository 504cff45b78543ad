"""Paths of a search: started, denoised, judged, and turned into results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ...rewards import as_reward
from ...scoring.ranking import rank_samples
from ..pipelines.stage import Trajectory
from ..pipelines.staged import StagedPipeline
from .drawing import make_preview
from .output import convert
from .result import PathNode, SearchResult


logger = logging.get_logger(__name__)

# When the first prompts have all lost all of their paths, the reward function is taken for broken.
ENOUGH_LOST_PROMPTS = 3
UNLIMITED = 2**62


@dataclass(eq=False)
class Path:
    """Path, the node of its latest stage, and what is to be seen at its end."""

    trajectory: Trajectory
    node: PathNode
    image: torch.Tensor | None = None

    @property
    def prompt_index(self) -> int:
        return self.trajectory.prompt_index

    def go_on(self) -> "Path":
        """The same path, about to run its next stage."""
        return self._child("none", None, self.trajectory)

    def branch(self, step: int, back_to: int, search: "Search") -> "Path":
        """A branch of it with its own noise."""
        seed, generator = search.next_seed(self.prompt_index)
        return self._child("renoised", seed, search.staged.renoise(self.trajectory, step, back_to, generator))

    def mix(self, strength: float, search: "Search") -> "Path":
        """A path that begins near the noise of this one."""
        seed, generator = search.next_seed(self.prompt_index)
        trajectory = Trajectory(self.prompt_index, generator, pivot=self.trajectory.initial, strength=strength)
        child = self._child("mixed", seed, trajectory)
        child.node.strength = strength
        return child

    def _child(self, noise: str, seed: int | None, trajectory: Trajectory) -> "Path":
        self.node.survived = True
        return Path(trajectory, PathNode(-1, self.node.index, noise, seed))


class Search:
    """
    State of one search over several prompts: seeds, trees and results, and how often the reward was asked.

    `context` holds further columns of the reward, one value for all samples; `conditions` one image for each prompt.
    """

    def __init__(
        self,
        method: str,
        staged: StagedPipeline,
        reward: Any,
        context: Mapping[str, Any] | None,
        seed: int,
        output_type: str,
    ) -> None:
        self.method = method
        self.staged = staged
        self.reward = as_reward(reward)
        self.context = dict(context or {})
        self.seed = seed
        self.output_type = output_type
        self.num_steps = staged.num_steps
        count = len(staged.prompts)
        self.reward.check_columns(*self.context)
        self.conditions = self.context.pop("conditions", None)
        self.nodes: list[list[PathNode]] = [[] for _ in range(count)]
        self.num_seeds = [0] * count
        self.reward_calls = [0] * count
        self.error: Exception | None = None
        self.results: dict[int, SearchResult] = {}

    def next_seed(self, prompt_index: int) -> tuple[int, torch.Generator]:
        """A new seed, which depends on the search's seed, the prompt and the number of seeds before."""
        entropy = (self.seed, prompt_index, self.num_seeds[prompt_index])
        self.num_seeds[prompt_index] += 1
        # 53 bits, which every reader of JSON keeps
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) >> 11
        return seed, torch.Generator().manual_seed(seed)

    def begin(self, prompts: Iterable[int], count: int) -> list[Path]:
        """Paths of fresh noise."""
        paths = []
        for index in prompts:
            for _ in range(count):
                seed, generator = self.next_seed(index)
                paths.append(Path(Trajectory(index, generator), PathNode(-1, None, "fresh", seed)))
        return paths

    def advance(self, paths: Sequence[Path], start: int, stop: int, judge: bool = True) -> list[Path]:
        """Run one stage of each path, and give each its reward. Paths that cannot be judged are left out."""
        for path in paths:
            nodes = self.nodes[path.prompt_index]
            path.node.index, path.node.start_step, path.node.stop_step = len(nodes), start, stop
            nodes.append(path.node)
        # A pairwise judge needs all images of a prompt at once.
        judge = judge and not self.reward.is_pairwise
        keep_images = stop == self.num_steps or self.reward.is_pairwise
        waiting = iter(paths)
        for trajectories, images in self.staged.advance([path.trajectory for path in paths], start, stop):
            images = images.float()
            rewards = self._score(images, [t.prompt_index for t in trajectories]) if judge else [None] * len(images)
            for trajectory, image, reward in zip(trajectories, images.cpu(), rewards, strict=True):
                path = next(waiting)
                path.trajectory = trajectory
                path.image = image if keep_images else None
                path.node.reward = reward
                path.node.lost = judge and reward is None
                if self.output_type == "pil":
                    frame = image[len(image) // 2] if image.ndim == 4 else image
                    path.node.preview = make_preview(convert(frame, "pil"))
        return [path for path in paths if not path.node.lost]

    def keep(self, paths: Sequence[Path], count: int, ranking_method: str = "round_robin") -> list[Path]:
        """The best paths of each prompt, in the order in which they were made: a batch in another order gives other last digits."""
        ranked = self._ranked(paths, ranking_method)
        return [path for group in ranked for path in sorted(group[:count], key=lambda path: path.node.index)]

    def finish(
        self, prompts: Iterable[int], paths: Sequence[Path], num_images: int, ranking_method: str = "round_robin"
    ) -> None:
        """
        Make results of the finished paths of some prompts. If the reward function has failed for all paths so far,
        that is an error.
        """
        best = {group[0].prompt_index: group[:num_images] for group in self._ranked(paths, ranking_method)}
        for index in prompts:
            chosen = best.get(index, [])
            if not chosen:
                logger.warning(f"All paths of {self.staged.prompts[index]!r} are lost: its result has no image.")
            for path in chosen:
                path.node.survived = True
            self.results[index] = SearchResult(
                method=self.method,
                prompt=self.staged.prompts[index],
                images=[convert(path.image, self.output_type) for path in chosen if path.image is not None],
                rewards=[float("nan") if path.node.reward is None else path.node.reward for path in chosen],
                nodes=self.nodes[index],
                winners=[path.node.index for path in chosen],
                denoiser_evaluations=self.staged.evaluations[index],
                forward_passes=self.staged.forward_passes[index],
                verifier_calls=self.reward_calls[index],
            )
        found = any(result.images for result in self.results.values())
        if not found and len(self.results) >= min(len(self.staged.prompts), ENOUGH_LOST_PROMPTS):
            raise self.broken()

    def broken(self) -> RuntimeError:
        """Error that names what the reward function raised last."""
        error = RuntimeError(
            f"The reward function failed for every path, last with {self.error!r}. It must return one finite number for each "
            "image."
        )
        error.__cause__ = self.error
        return error

    def _score(self, images: torch.Tensor, prompt_indices: list[int]) -> list[float | None]:
        columns = {name: [value] * len(images) for name, value in self.context.items()}
        if self.conditions is not None:
            columns["condition"] = [self.conditions[index] for index in prompt_indices]
        prompts = [self.staged.prompts[index] for index in prompt_indices]
        return as_reward(self._counted).score_each(images, prompts, prompt_index=prompt_indices, **columns)

    def _counted(self, images: Any, prompts: Sequence[str], prompt_index: list[int], **columns: Any) -> torch.Tensor:
        for index in prompt_index:
            self.reward_calls[index] += 1
        try:
            return self.reward(images, prompts, **columns)
        except Exception as error:
            self.error = error
            raise

    def _ranked(self, paths: Sequence[Path], ranking_method: str) -> list[list[Path]]:
        """Paths of each prompt that could be judged, best first."""
        groups: dict[int, list[Path]] = {}
        for path in paths:
            groups.setdefault(path.prompt_index, []).append(path)
        if not self.reward.is_pairwise:
            return [sorted(group, key=_badness) for group in groups.values()]
        return [ranked for index, group in groups.items() if (ranked := self._rank(index, group, ranking_method))]

    def _rank(self, index: int, group: list[Path], ranking_method: str) -> list[Path]:
        context = dict(self.context)
        if self.conditions is not None:
            context["condition"] = self.conditions[index]
        images = [path.image for path in group]
        prompt = self.staged.prompts[index]
        ranking = rank_samples(
            self.reward, images, prompt, ranking_method=ranking_method, skip_failures=True, **context
        )
        self.reward_calls[index] += ranking.num_questions
        self.error = ranking.error or self.error
        for place, (path, reward) in enumerate(zip(group, ranking.scores.tolist(), strict=True)):
            path.node.reward = None if np.isnan(reward) else reward
            path.node.lost = place not in ranking.order
        return [group[place] for place in ranking.order]


def _badness(path: Path) -> tuple[float, int]:
    return (0.0 if path.node.reward is None else -path.node.reward, path.node.index)
