"""An image of a search, made again from its seeds."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..pipelines.stage import Trajectory
from ..pipelines.staged import StagedPipeline
from .output import convert, output_type_of
from .result import PathNode


def replay(pipeline: Any, prompt: str, lineage: Iterable[PathNode | Mapping[str, Any]], **pipeline_kwargs: Any) -> Any:
    r"""
    Make an image of a search again.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline.
        prompt (`str`):
            Prompt.
        lineage (`list[PathNode]` or `list[dict]`):
            `result.lineage()`, or an entry of `lineages` in a saved `search.json`.
        pipeline_kwargs:
            Arguments of the pipeline's call, as in the search.

    Returns:
        Image or clip in the `output_type` of the call. It differs from that of the search by rounding where the
        denoiser's last digits depend on the batch size.

    Raises:
        `ValueError`: If the schedule has another number of steps than the lineage.

    Example:

    ```python
    image = replay(pipeline, "a red circle", result.lineage(), num_inference_steps=28)
    ```
    """
    output_type = output_type_of(pipeline, pipeline_kwargs)
    staged = StagedPipeline(pipeline, [prompt], pipeline_kwargs)
    stages = [node if isinstance(node, Mapping) else node.to_dict() for node in lineage]
    if stages[-1]["stop_step"] != staged.num_steps:
        raise ValueError(
            f"The lineage ends after step {stages[-1]['stop_step']}, but the pipeline makes {staged.num_steps}. Pass the same "
            "`num_inference_steps` and other arguments as in the search."
        )
    trajectory = Trajectory(0, torch.Generator())
    position = 0
    for stage in stages:
        if stage["noise"] != "none":
            generator = torch.Generator().manual_seed(stage["seed"])
            if stage["noise"] == "renoised":
                trajectory = staged.renoise(trajectory, position, stage["start_step"], generator)
            elif stage["noise"] == "mixed":
                trajectory = Trajectory(0, generator, pivot=trajectory.initial, strength=stage["strength"])
            else:
                trajectory = Trajectory(0, generator)
        (((trajectory,), images),) = staged.advance([trajectory], stage["start_step"], stage["stop_step"])
        position = stage["stop_step"]
    return convert(images[0], output_type)
