"""
Search at inference (Sec. 3.3.2 of the [RewardDance paper](https://huggingface.co/papers/2509.08826)), on unmodified diffusers
pipelines: Best-of-N, zero-order search and Search over Paths of
["Inference-time scaling for diffusion models beyond scaling denoising steps"](https://huggingface.co/papers/2501.09732).

Every function calls the pipeline itself, see [`~rewarddance_hf.alignment.pipelines.staged.StagedPipeline`], and counts denoiser
evaluations: one for each image and step. The two or more passes of classifier-free guidance at one step are one evaluation.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from ...checks import check_integers
from ...models.media_rewarddance import load_image
from ...parallel import Processes, run_split
from ...resumable import digest_of
from ..pipelines.models import describe_pipeline
from ..pipelines.staged import StagedPipeline
from .output import output_type_of
from .paths import UNLIMITED, Search
from .result import SearchResult
from .saving import SearchFolder
from .strategies import BestOfN, OverPaths, ZeroOrder


logger = logging.get_logger(__name__)


def best_of_n(
    pipeline: Any,
    prompt: str | Sequence[str],
    reward: Callable[..., Any],
    num_candidates: int | None = None,
    preview_step: int | None = None,
    num_kept: int = 1,
    max_denoiser_evaluations: int | None = None,
    num_images: int = 1,
    ranking_method: str = "round_robin",
    context: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    distribute: bool = False,
    output_dir: str | os.PathLike | None = None,
    prompt_indices: Sequence[int] | None = None,
    **pipeline_kwargs: Any,
) -> Any:
    r"""
    Generate candidates and keep the best.

    A candidate's seed makes it again with the pipeline alone:
    `pipeline(prompt, generator=torch.Generator().manual_seed(node.seed), ...)`, after `torch.manual_seed(node.seed)` where a language
    model rewrites prompts without the generator (LongCat-Image, Flux 2 with `caption_upsample_temperature`).

    With `preview_step`, all candidates are denoised up to this step only; their clean predictions are judged, and only
    the `num_kept` best are finished.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline.
        prompt (`str` or `list[str]`):
            Prompts. With `prompt_embeds` among the pipeline's arguments they are what the reward function gets.
        reward (`Callable` or [`RewardDanceScorer`]):
            `reward(images, prompts, **context) -> (n,)`. A pairwise one ranks the candidates in a tournament.
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
        ranking_method (`str`, *optional*, defaults to `"round_robin"`):
            Method of [`RewardDanceScorer.rank`], for a pairwise judge.
        context (`dict`, *optional*):
            What else the reward gets, such as `task` and `criteria`: one value for all images, handed on as a list with an
            entry for each. `conditions` holds one image for each prompt (first frame of image-to-video, source image of an
            edit), which the pipeline is given as `image` too.
        seed (`int`, *optional*, defaults to `0`):
            Seed that all others are made from, together with the index of the prompt.
        batch_size (`int`, *optional*, defaults to `8`):
            Largest number of images per call of the pipeline.
        distribute (`bool`, *optional*, defaults to `False`):
            Whether to split the prompts over the processes of `accelerate launch`; each gets all results. They do not depend
            on the number of processes. On CPUs it needs the environment variable `ACCELERATE_USE_CPU=true`.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder that the result of each prompt is written to as soon as it is there, in `prompt_0`, `prompt_1`, ... as by
            [`save_search`]. A repeated call goes on where it stopped, also with prompts added at the end. Results then
            have the files of images.
        prompt_indices (`list[int]`, *optional*):
            Indices of the prompts to search for, so that several calls can share them. All by default.
        pipeline_kwargs:
            Any argument of the pipeline's call. Those about prompts and images may have one entry for each prompt. A
            callback counts steps from 0 in each stage.

    Returns:
        [`~rewarddance_hf.alignment.search.result.SearchResult`]: Or a list of them if `prompt` is a list, in the order of
        `prompt_indices` if it was given.

    Raises:
        `ValueError`: If an argument is out of range, the budget does not suffice for one image, or `output_dir` belongs to another
            search.
        `NotImplementedError`: If the scheduler or pipeline cannot stop at `preview_step`.
        `RuntimeError`: If the reward function fails for every image.

    Example:

    ```python
    result = best_of_n(pipeline, "a red circle", scorer, num_candidates=16, num_inference_steps=28)
    result.images[0], result.rewards[0], result.denoiser_evaluations
    ```
    """
    settings = _Settings(
        max_denoiser_evaluations, num_images, context, seed, batch_size, distribute, output_dir, prompt_indices
    )
    strategy = BestOfN(num_candidates, preview_step, num_kept, ranking_method)
    return _search(strategy, pipeline, prompt, reward, settings, pipeline_kwargs)


def zero_order_search(
    pipeline: Any,
    prompt: str | Sequence[str],
    reward: Callable[..., Any],
    num_neighbors: int = 4,
    num_rounds: int | None = None,
    noise_strength: float = 0.9,
    max_denoiser_evaluations: int | None = None,
    num_images: int = 1,
    context: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    distribute: bool = False,
    output_dir: str | os.PathLike | None = None,
    prompt_indices: Sequence[int] | None = None,
    **pipeline_kwargs: Any,
) -> Any:
    r"""
    Search the noise around the best one so far.

    Each round makes images from `num_neighbors` noises `sqrt(1 - noise_strength^2) * best + noise_strength * fresh`; the best of them
    and of all before is the next center.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline.
        prompt (`str` or `list[str]`):
            Prompts, as in [`best_of_n`].
        reward (`Callable` or [`RewardDanceScorer`]):
            `reward(images, prompts, **context) -> (n,)`; not a pairwise judge.
        num_neighbors (`int`, *optional*, defaults to `4`):
            Number of noises in each round.
        num_rounds (`int`, *optional*):
            Number of rounds. Defaults to as many as `max_denoiser_evaluations` allows, the last of which may be smaller.
        noise_strength (`float`, *optional*, defaults to `0.9`):
            Share of fresh noise, above 0 and at most 1.
        max_denoiser_evaluations, num_images, context, seed, batch_size, distribute, output_dir, prompt_indices, pipeline_kwargs:
            As in [`best_of_n`].

    Returns:
        [`~rewarddance_hf.alignment.search.result.SearchResult`]: Or a list of them if `prompt` is a list.

    Raises:
        `ValueError`: If an argument is out of range, or the budget does not suffice for one image.
        `RuntimeError`: If the reward function fails for every image.
    """
    settings = _Settings(
        max_denoiser_evaluations, num_images, context, seed, batch_size, distribute, output_dir, prompt_indices
    )
    strategy = ZeroOrder(num_neighbors, num_rounds, noise_strength)
    return _search(strategy, pipeline, prompt, reward, settings, pipeline_kwargs)


def search_over_paths(
    pipeline: Any,
    prompt: str | Sequence[str],
    reward: Callable[..., Any],
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
    output_dir: str | os.PathLike | None = None,
    prompt_indices: Sequence[int] | None = None,
    **pipeline_kwargs: Any,
) -> Any:
    r"""
    Search over Paths: grow the most promising of several sampling paths.

    1. Denoise `num_paths` noises by `start_step` steps.
    2. Noise each back by `renoise_steps` steps, `num_branches` times; the forward process keeps the distribution.
    3. Denoise by `denoise_steps` steps, have the clean predictions judged, and keep the best `num_paths`.
    4. Repeat 2 and 3 until no noise is left; the last ones are judged as images.

    All noise levels are those of the pipeline's own schedule. With `num_branches=1` and `renoise_steps=0` the images are those
    of plain sampling, bit for bit.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline whose scheduler is a flow-matching or diffusion one with one timestep a step: FlowMatch Euler, DDIM,
            DDPM, LCM, Euler, DPM++, UniPC, ...
        prompt (`str` or `list[str]`):
            Prompts, as in [`best_of_n`].
        reward (`Callable` or [`RewardDanceScorer`]):
            `reward(images, prompts, **context) -> (n,)`; not a pairwise judge.
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
        num_images, context, seed, batch_size, distribute, output_dir, prompt_indices, pipeline_kwargs:
            As in [`best_of_n`].

    Returns:
        [`~rewarddance_hf.alignment.search.result.SearchResult`]: Or a list of them if `prompt` is a list.

    Raises:
        `ValueError`: If an argument is out of range, or the budget does not suffice for one image.
        `NotImplementedError`: If the scheduler's noise levels are not known, or the pipeline makes a part of its schedule
            only.
        `RuntimeError`: If the reward function fails for every path.
    """
    settings = _Settings(
        max_denoiser_evaluations, num_images, context, seed, batch_size, distribute, output_dir, prompt_indices
    )
    strategy = OverPaths(num_paths, num_branches, start_step, renoise_steps, denoise_steps)
    return _search(strategy, pipeline, prompt, reward, settings, pipeline_kwargs)


@dataclass(frozen=True)
class _Settings:
    """Arguments that all searches share."""

    max_denoiser_evaluations: int | None
    num_images: int
    context: Mapping[str, Any] | None
    seed: int
    batch_size: int
    distribute: bool
    output_dir: str | os.PathLike | None
    prompt_indices: Sequence[int] | None

    def __post_init__(self) -> None:
        names = ("batch_size", "num_images", "max_denoiser_evaluations")
        check_integers(may_be_none=True, **{name: getattr(self, name) for name in names})
        if self.seed < 0:
            raise ValueError(f"`seed` is {self.seed}, but must be 0 or more.")


def _with_conditions(
    pipeline: Any, prompts: Sequence[str], context: Mapping[str, Any], pipeline_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of the pipeline with the conditions of the prompts, unless it was given an `image` of its own or takes none."""
    conditions = context.get("conditions")
    if conditions is None:
        if pipeline_kwargs.get("image") is not None and not hasattr(pipeline, "controlnet"):
            logger.warning(
                "`image` was given to the pipeline, but the reward does not see it. Pass `context={'conditions': [image]}` in its "
                "place, with one image for each prompt, so that a judge sees what was edited or animated."
            )
        return pipeline_kwargs
    if len(conditions) != len(prompts):
        raise ValueError(
            f'`context["conditions"]` has {len(conditions)} entries for {len(prompts)} prompts, but must have one for each. '
            "Make both equally long."
        )
    missing = [index for index, condition in enumerate(conditions) if condition is None]
    takes_image = "image" in inspect.signature(type(pipeline).__call__).parameters
    if len(missing) == len(prompts) or not takes_image or "image" in pipeline_kwargs:
        return pipeline_kwargs
    if missing:
        raise ValueError(
            f'`context["conditions"][{missing[0]}]` is None, but others are images, and `{type(pipeline).__name__}` is given all or '
            "none. Search for the prompts without an image in a call of their own."
        )
    images = [load_image(condition, f"conditions[{index}]") for index, condition in enumerate(conditions)]
    return {**pipeline_kwargs, "image": images}


def _search(
    strategy: BestOfN | ZeroOrder | OverPaths,
    pipeline: Any,
    prompt: str | Sequence[str],
    reward: Callable[..., Any],
    settings: _Settings,
    pipeline_kwargs: dict[str, Any],
) -> Any:
    """Search for all prompts, a few at a time so that few images are in memory."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`prompt` is {prompt!r}, but must be a string or a list of at least one string.")
    output_type = output_type_of(pipeline, pipeline_kwargs)
    pipeline_kwargs = _with_conditions(pipeline, prompts, settings.context or {}, pipeline_kwargs)
    staged = StagedPipeline(pipeline, prompts, pipeline_kwargs, settings.batch_size)
    budget = settings.max_denoiser_evaluations
    strategy.check(budget)
    search = Search(strategy.name, staged, reward, settings.context, settings.seed, output_type)
    if search.reward.is_pairwise and not isinstance(strategy, BestOfN):
        raise ValueError(
            "The reward is pairwise, but this search judges one sample at a time. Pass a pointwise judge, or use "
            "`best_of_n`."
        )
    if budget is not None and budget < staged.num_steps:
        raise ValueError(
            f"`max_denoiser_evaluations` is {budget}, but one image takes {staged.num_steps}. Raise it, or lower "
            "`num_inference_steps`."
        )
    indices = range(len(prompts)) if settings.prompt_indices is None else list(settings.prompt_indices)
    unknown = [index for index in indices if not 0 <= index < len(prompts)]
    if unknown:
        raise ValueError(f"`prompt_indices` has {unknown[:3]}, but there are {len(prompts)} prompts. Count from 0.")
    store = None
    if settings.output_dir is not None:
        if output_type != "pil":
            raise ValueError(
                f"`output_type` is {output_type!r}, but images for `output_dir` must be 'pil'. Leave it out."
            )
        fingerprint = {
            "search": strategy.name,
            **vars(strategy),
            "max_denoiser_evaluations": budget,
            "num_images": settings.num_images,
            "context": digest_of(settings.context),
            "seed": settings.seed,
            "pipeline": describe_pipeline(pipeline),
            "reward": search.reward.fingerprint(),
            **{name: digest_of(value) for name, value in sorted(pipeline_kwargs.items())},
        }
        store = SearchFolder(settings.output_dir, prompts, fingerprint)
    num_paths = strategy.plan(staged, UNLIMITED if budget is None else budget)
    prompts_at_once = -(-settings.batch_size // num_paths)

    found = {index: result for index in indices if store is not None and (result := store.read(index)) is not None}
    left = [index for index in indices if index not in found]

    def search_some(places: Sequence[int]) -> list[SearchResult]:
        for start in range(0, len(places), prompts_at_once):
            some = [left[place] for place in places[start : start + prompts_at_once]]
            strategy.run(search, some, settings.num_images)
            if store is not None:
                search.results |= {index: store.write(index, search.results[index]) for index in some}
        return [search.results[left[place]] for place in places]

    if settings.distribute:
        Processes.current().wait()  # all have looked before one writes
        made = run_split(search_some, len(left))
    else:
        made = search_some(range(len(left)))
    found |= zip(left, made, strict=True)
    results = [found[index] for index in indices]
    if results and not any(result.images for result in results):
        raise search.broken()
    return results[0] if isinstance(prompt, str) else results
