"""
Best-of-N references: strong samples of the un-tuned generator, which a pairwise reward compares with (Sec. 3.3.1 and
Table 8 of the [RewardDance paper](https://huggingface.co/papers/2509.08826)).

The paper keeps the top 2 of 16 candidates by wins in a round robin. Bottom and random ones serve its ablation.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm
from transformers.utils import logging

from ...checks import check_integers
from ...models.media_rewarddance import load_image
from ...parallel import Processes, run_split
from ...resumable import RowFolder, write_atomically
from ...rewards import as_reward
from ...scoring.ranking import check_ranking, rank_samples
from ..pipelines.models import describe_pipeline
from .candidates import CandidateDrawer, candidate_seed
from .conditions import check_conditions


logger = logging.get_logger(__name__)

METHODS = ("top", "bottom", "random")
NEW_COLUMNS = ("references", "wins", "scores", "seeds")
# Prompts from which on it pays to find out whether candidates of several can be drawn together
FEWEST_TO_SHARE = 16
CONTEXT_COLUMNS = ("task", "criteria", "condition")
# Arguments of pipelines that are set here
OWN_ARGUMENTS = {
    "generator",
    "latents",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "output_type",
    "prompt",
    "return_dict",
}


def best_of_n_references(
    pipeline: Any,
    reward: Callable[..., torch.Tensor] | None,
    prompts: Sequence[str] | datasets.Dataset,
    num_candidates: int = 16,
    top_k: int = 2,
    method: str = "top",
    ranking_method: str = "round_robin",
    num_rounds: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    output_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
    **pipeline_kwargs: Any,
) -> datasets.Dataset:
    r"""
    Draw candidates for each prompt, let a judge rank them, and keep some as references.

    Each candidate has its own seed, which follows from `seed`, the prompt and the candidate's index, so a prompt has
    the same candidates in every list, batch and number of processes. Under `accelerate launch`, prompts are split over
    processes, and each gets all references. How long it takes is said after the first prompt.

    `pipeline(prompt, generator=torch.Generator().manual_seed(seed), **pipeline_kwargs)` draws one again (up to the rounding
    errors that batch sizes make on some devices).

    A candidate loses, with a warning, if its image has pixels that are not finite or was blanked by a safety checker, or
    if a score of it is not finite.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Un-tuned generator of images or clips, with any components that take text.
        reward ([`RewardDanceScorer`] or `Callable`):
            Judge, or any `reward(images, prompts, **context) -> torch.Tensor (n,)`, that orders candidates as in
            [`~rewarddance_hf.scoring.ranking.rank_samples`]: by wins if it is pairwise, by score if not. Not asked, and may
            be None, if `method` is `"random"`.
        prompts (`list[str]` or `datasets.Dataset`):
            Prompts. A dataset has a column `prompt`; its columns `task`, `criteria` and `condition` (first frame of
            image-to-video, source image of an edit, given to the pipeline as `image` too) are used, and all of its columns
            are kept.
        num_candidates (`int`, *optional*, defaults to `16`):
            Number of candidates of each prompt.
        top_k (`int`, *optional*, defaults to `2`):
            Number of candidates to keep.
        method (`str`, *optional*, defaults to `"top"`):
            `"top"` keeps the best, best first; `"bottom"` the worst, worst first; `"random"` draws no more candidates than it
            keeps, since which of them are kept would be chance.
        ranking_method (`str`, *optional*, defaults to `"round_robin"`):
            `"round_robin"`, `"swiss"` or `"halving"`, as in [`RewardDanceScorer.rank`].
        num_rounds (`int`, *optional*):
            Number of rounds of a tournament, as in [`RewardDanceScorer.rank`].
        batch_size (`int`, *optional*, defaults to `8`):
            Number of candidates in one call of the pipeline. Halved when memory runs out. From 16 prompts on, a call draws those of
            several where there is room, if a trial at the beginning shows that the samples stay the same. With a `condition`, one
            by one, unless a trial shows that the pipeline gives the same samples when it gets several images.
        seed (`int`, *optional*, defaults to `0`):
            Seed that all seeds of candidates follow from.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder that each finished prompt is written to at once, so that a repeated call goes on where it stopped, also
            with prompts added at the end. The dataset is then read from there, and not held in memory.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        pipeline_kwargs:
            Further arguments of the pipeline: `num_inference_steps`, `guidance_scale`, `height`, ...

    Returns:
        `datasets.Dataset`: One row per prompt, with the columns of `prompts` and
        - `references` (`List(Image())`, for clips `List(List(Image()))`): The kept candidates, as encoded bytes.
        - `wins` (`list[float]`): Comparisons that each has won. None if no judge was asked.
        - `scores` (`list[float]`): Reward of each, as in [`~rewarddance_hf.scoring.results.Ranking`]. None if no judge
          was asked.
        - `seeds` (`list[int]`): Seed of each.

    Raises:
        `ValueError`: If an argument is out of range, `output_dir` belongs to other arguments, or fewer than `top_k`
            candidates of a prompt are left. Prompts that are finished stay in `output_dir`.

    Example:

    ```python
    references = best_of_n_references(pipeline, reward, ["a red circle"], num_candidates=16, top_k=2, output_dir="references")
    references.push_to_hub("org/my-references")
    ```
    """
    rows = _as_dataset(prompts)
    _check_arguments(reward, num_candidates, top_k, method, ranking_method, num_rounds, batch_size)
    taken = sorted(OWN_ARGUMENTS & set(pipeline_kwargs))
    if taken:
        raise ValueError(
            f"{taken} were given as arguments of the pipeline, but are set for each candidate. Leave them out; prompts go into "
            "`prompts`."
        )
    if "condition" in rows.column_names and rows[0]["condition"] is not None:
        check_conditions(pipeline, "prompts", pipeline_kwargs)
    store = None
    if output_dir is not None:
        fingerprint = {
            "num_candidates": num_candidates,
            "top_k": top_k,
            "method": method,
            "ranking_method": ranking_method,
            "num_rounds": num_rounds,
            "seed": seed,
            "pipeline": describe_pipeline(pipeline),
            "reward": None if method == "random" else as_reward(reward).fingerprint(),
            **{name: Hasher.hash(value) for name, value in pipeline_kwargs.items()},
        }
        store = RowFolder(output_dir, fingerprint, len(rows), f"`output_dir` {os.fspath(output_dir)!r}", ".arrow")

    drawer = CandidateDrawer(pipeline, pipeline_kwargs, batch_size)
    used = rows.select_columns([name for name in ("prompt", *CONTEXT_COLUMNS) if name in rows.column_names])
    processes = Processes.current()
    group = processes.patient_group()
    left = [i for i in range(len(rows)) if store is None or not store.is_done(i, _read_row(used, i)[0])]
    processes.wait(group)  # all have looked before one writes
    is_quiet = not (show_progress and processes.is_main)

    # Few candidates leave room in a batch for those of further prompts.
    first_drawn = top_k if method == "random" else num_candidates
    num_together = max(1, batch_size // first_drawn) if len(left) >= FEWEST_TO_SHARE else 1

    def make(indices: Sequence[int]) -> Iterator[bytes | None]:
        """Results of some prompts, each as a table of one row, or None if it went into the store."""
        some, names = zip(*(_read_row(used, index) for index in indices), strict=True)
        seeds = [[candidate_seed(seed, row["prompt"], number) for number in range(num_candidates)] for row in some]
        drawn = drawer.draw(some, names, seeds, at_least=top_k if method == "random" else None)
        for index, row, name, own_seeds, samples in zip(indices, some, names, seeds, drawn, strict=True):
            order, wins, scores = list(samples)[:top_k], None, None
            if method != "random":
                order, wins, scores = _rank(reward, samples, row, name, top_k, method, ranking_method, num_rounds)
            if len(order) < top_k:
                raise ValueError(
                    f"Only {len(order)} of {num_candidates} candidates of `{name}` are left, but `top_k` is {top_k}. Look at "
                    "the warnings above: NaN in the weights, or a type with too small a range (`torch.float16`)?"
                )
            table = _as_table([samples[i] for i in order], wins, scores, [own_seeds[i] for i in order])
            if store is not None:
                store.write(index, row, table)
            yield table if store is None else None

    def work(places: Sequence[int]) -> list[bytes | None]:
        results: list[bytes | None] = []
        start = time.monotonic()
        with tqdm(total=len(places), desc="References", unit="prompt", disable=is_quiet) as progress:
            while len(results) < len(places):
                end = len(results) + num_together
                for result in make([left[place] for place in places[len(results) : end]]):
                    results.append(result)
                    progress.update()
                if len(results) <= num_together and not is_quiet and len(places) > len(results):
                    seconds = (time.monotonic() - start) / len(results)
                    progress.write(_estimate(len(left), len(rows), num_candidates, seconds, processes.count, store))
        return results

    with _without_progress_bars(pipeline):
        made = dict(zip(left, run_split(work, len(left)), strict=True))
    new = _read_all(store, Path(output_dir or ""), [made.get(index) for index in range(len(rows))])
    return datasets.concatenate_datasets([rows, new], axis=1)


def _estimate(
    num_left: int, num_rows: int, num_candidates: int, seconds: float, num_processes: int, store: Any
) -> str:
    """What is to be done, and how long it takes if each prompt takes as long as the first."""
    total = timedelta(seconds=round(seconds * math.ceil(num_left / num_processes)))
    kept = f" Each is kept in {store.folder.parent} when it is done." if store is not None else ""
    return (
        f"References of {num_left} of {num_rows} prompts, {num_candidates} candidates each, on {num_processes} "
        f"process{'es' * (num_processes > 1)}: {seconds:.1f} s a prompt at first, about {total} in all.{kept}"
    )


@contextmanager
def _without_progress_bars(pipeline: Any) -> Iterator[None]:
    """Keep the bars of a pipeline's single calls away from that of all prompts."""
    before = getattr(pipeline, "_progress_bar_config", None)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(**(before or {}))


def _read_row(rows: datasets.Dataset, index: int) -> tuple[dict[str, Any], str]:
    """What is known of a prompt, and its name in messages."""
    row = {name: value for name, value in rows[index].items() if value is not None}
    name = f"prompts[{index}] ({row.get('prompt')!r})"
    if not isinstance(row.get("prompt"), str):
        raise TypeError(f"`{name}` is not a string, but every prompt must be one. Repair or drop it.")
    if "condition" in row:
        row["condition"] = load_image(row["condition"], f"condition of {name}")
    return row, name


def _rank(
    reward: Any,
    samples: Mapping[int, Any],
    row: Mapping[str, Any],
    name: str,
    top_k: int,
    method: str,
    ranking_method: str,
    num_rounds: int | None,
) -> tuple[list[int], list[float], list[float]]:
    """Kept candidates with their wins and scores. Those without finite scores are left out."""
    candidates = list(samples)
    if len(candidates) < top_k:
        return candidates, [0.0] * len(candidates), [float("nan")] * len(candidates)
    ranking = rank_samples(
        reward,
        list(samples.values()),
        row["prompt"],
        top_k if method == "top" else None,
        ranking_method=ranking_method,
        num_rounds=num_rounds,
        skip_failures=True,
        **{key: row[key] for key in CONTEXT_COLUMNS if key in row},
    )
    for i, score in enumerate(ranking.scores.tolist()):
        if math.isnan(score) and i not in ranking.order:
            logger.warning(f"Candidate {candidates[i]} of `{name}` is left out: its score is NaN or infinite.")
    order = (ranking.order[::-1] if method == "bottom" else ranking.order)[:top_k]
    return [candidates[i] for i in order], ranking.wins[order].tolist(), ranking.scores[order].tolist()


def _as_table(samples: list[Any], wins: Any, scores: Any, seeds: list[int]) -> bytes:
    """Result of a prompt as a table of one row."""
    image = datasets.Image()
    features = datasets.Features(
        references=datasets.List(datasets.List(image) if isinstance(samples[0], list) else image),
        wins=datasets.List(datasets.Value("float64")),
        scores=datasets.List(datasets.Value("float64")),
        seeds=datasets.List(datasets.Value("int64")),
    )
    row = features.encode_example({"references": samples, "wins": wins, "scores": scores, "seeds": seeds})
    schema, stream = features.arrow_schema, pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, schema) as writer:
        writer.write_table(datasets.Dataset.from_list([row], features=features).data.table.cast(schema))
    return stream.getvalue().to_pybytes()


def _read_all(store: RowFolder | None, folder: Path, made: Sequence[bytes | None]) -> datasets.Dataset:
    """All results in the order of prompts; those of a store from one file that is mapped into memory."""
    if store is None:
        return datasets.Dataset(pa.concat_tables([_read_table(table or b"") for table in made]))
    merged, processes = folder / "references.arrow", Processes.current()

    def write(stream: Any) -> None:
        with pa.ipc.new_stream(stream, _read_table(store.read(0)).schema) as writer:
            for index in range(len(made)):
                writer.write_table(_read_table(store.read(index)))

    if (
        processes.is_main
    ):  # a dataset of an earlier call may still map the old file, which is replaced and not overwritten
        write_atomically(merged, write)
    processes.wait(processes.patient_group())
    return datasets.Dataset.from_file(str(merged))


def _read_table(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()


def _as_dataset(prompts: Sequence[str] | datasets.Dataset) -> datasets.Dataset:
    if isinstance(prompts, str) or not isinstance(prompts, (list, tuple, datasets.Dataset)):
        raise TypeError(
            f"`prompts` is of type `{type(prompts).__name__}`, but must be a list of strings or a `datasets.Dataset`. Wrap "
            "a single prompt in a list."
        )
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty, but must have at least one prompt. Check its split and filters.")
    if not isinstance(prompts, datasets.Dataset):
        bad = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
        if bad:
            raise TypeError(
                f"`prompts[{bad[0]}]` is of type `{type(prompts[bad[0]]).__name__}`, but must be a string. Pass further columns "
                "as a `datasets.Dataset`."
            )
        return datasets.Dataset.from_dict({"prompt": list(prompts)})
    if "prompt" not in prompts.column_names:
        raise ValueError(
            f"`prompts` has the columns {prompts.column_names}, but needs `prompt`. Rename one, e.g. "
            '`prompts.rename_column("caption", "prompt")`.'
        )
    taken = [name for name in NEW_COLUMNS if name in prompts.column_names]
    if taken:
        raise ValueError(
            f"`prompts` has the columns {taken}, but these are made here. Remove them, e.g. `prompts.remove_columns({taken})`."
        )
    return prompts


def _check_arguments(
    reward: Any,
    num_candidates: int,
    top_k: int,
    method: str,
    ranking_method: str,
    num_rounds: int | None,
    batch_size: int,
) -> None:
    check_integers(num_candidates=num_candidates, top_k=top_k, batch_size=batch_size)
    if top_k > num_candidates:
        raise ValueError(
            f"`top_k` is {top_k}, but only {num_candidates} candidates are drawn. Raise `num_candidates` or lower `top_k`."
        )
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}, but must be one of {METHODS}.")
    check_ranking(num_candidates, False, None, ranking_method, num_rounds)
    if method != "random" and not callable(reward):
        raise TypeError(
            f"`reward` is of type `{type(reward).__name__}`, but `method={method!r}` needs a judge. Pass a "
            '`RewardDanceScorer` or a reward function, or `method="random"`.'
        )
