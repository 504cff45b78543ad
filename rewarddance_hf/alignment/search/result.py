"""What a search returns: images, rewards, the tree of its paths with their seeds, and what it cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class PathNode:
    """One stage of one path: some steps of the denoising loop."""

    index: int  # position in `SearchResult.nodes`
    parent: int | None  # node that it goes on from, or whose noise it is near; None at a root
    # "fresh": pure noise that the pipeline draws; "renoised": noise added to the parent's latents; "mixed": pure noise near the
    # parent's; "none": it goes on as it is
    noise: str
    seed: int | None  # of that noise, and of all random numbers until the next seed
    start_step: int = 0
    stop_step: int = 0  # step after the last one
    strength: float | None = None  # share of fresh noise if `noise` is "mixed"
    reward: float | None = None  # of the clean prediction at its end, or of the image, if it is known
    survived: bool = (
        False  # whether the search went on from here; at the end, whether the image is one of the result's
    )
    lost: bool = False  # whether the reward function failed
    preview: Any = field(default=None, repr=False)  # small PIL image of what was judged; of a clip, its middle frame

    def to_dict(self) -> dict[str, Any]:
        """All but the preview, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "preview"}


@dataclass(eq=False)
class SearchResult:
    """
    What a search found for one prompt. [`~rewarddance_hf.alignment.search.saving.save_search`] writes it to a folder.

    Args:
        method (`str`):
            `"best-of-n"`, `"zero-order"` or `"paths"`.
        prompt (`str`):
            The prompt.
        images (`list`):
            Best images or clips, best first, in the `output_type` of the call, or their files if it had an `output_dir`. Empty if
            all paths were lost.
        rewards (`list[float]`):
            Reward of each. For a pairwise judge the mean over all that it was compared with; NaN if there was no other.
        nodes (`list[PathNode]`):
            Tree of paths.
        winners (`list[int]`):
            Node of each image.
        denoiser_evaluations (`int`):
            Number of denoiser evaluations: one for each path and step. The passes that guidance takes at one step (with and
            without prompt) are one evaluation.
        forward_passes (`int`):
            Number of samples that went through the denoiser, guidance included.
        verifier_calls (`int`):
            Number of scores: images that were given to the reward function, or ordered pairs that a pairwise judge compared.
            What is asked again after a failure counts again.
    """

    method: str
    prompt: str
    images: list[Any]
    rewards: list[float]
    nodes: list[PathNode]
    winners: list[int]
    denoiser_evaluations: int
    forward_passes: int
    verifier_calls: int

    def lineage(self, place: int = 0) -> list[PathNode]:
        """
        Trace an image back to pure noise.

        Args:
            place (`int`, *optional*, defaults to `0`):
                Place of the image; 0 is the best.

        Returns:
            `list[PathNode]`: Stages of its path, the first one first. This is what
            [`~rewarddance_hf.alignment.search.replay.replay`] makes the image from.
        """
        nodes = [self.nodes[self.winners[place]]]
        while nodes[0].parent is not None:
            nodes.insert(0, self.nodes[nodes[0].parent])
        return nodes

    def to_dict(self) -> dict[str, Any]:
        """
        Everything but images, for JSON.

        Returns:
            `dict`: The fields, and as `lineages` the seeds and steps that each image can be made from again.
        """
        names = ("method", "prompt", "winners", "denoiser_evaluations", "forward_passes", "verifier_calls")
        return {
            **{name: getattr(self, name) for name in names},
            "rewards": [None if math.isnan(reward) else reward for reward in self.rewards],
            "lineages": [[node.to_dict() for node in self.lineage(i)] for i in range(len(self.winners))],
            "nodes": [node.to_dict() for node in self.nodes],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], images: list[Any]) -> "SearchResult":
        """
        The result that [`~SearchResult.to_dict`] made a document of.

        Args:
            document (`dict`):
                What `to_dict` returned, or `search.json` holds.
            images (`list`):
                Its images or their files, best first.

        Returns:
            [`SearchResult`]: Without previews.
        """
        names = ("method", "prompt", "winners", "denoiser_evaluations", "forward_passes", "verifier_calls")
        rewards = [math.nan if reward is None else reward for reward in document["rewards"]]
        nodes = [PathNode(**node) for node in document["nodes"]]
        return cls(images=images, rewards=rewards, nodes=nodes, **{name: document[name] for name in names})
