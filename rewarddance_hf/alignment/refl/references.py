"""
Best-of-N references: strong samples of the un-tuned generator, which a pairwise reward compares with (Sec. 3.3.1 and
Table 8 of the [RewardDance paper](https://huggingface.co/papers/2509.08826)).

The paper keeps the top 2 of 16 candidates by wins in a round robin. Bottom and random ones serve its ablation.
"""

import hashlib
import inspect
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets.fingerprint import Hasher
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from ...models.processing_rewarddance import load_image
from ...rewards import NonFiniteScoreError
from ...scoring.engine.memory import BatchLimit
from ...scoring.ranking import METHODS as RANK_METHODS
from ...scoring.scorer import RewardDanceScorer


logger = logging.get_logger(__name__)

METHODS = ("top", "bottom", "random")
NEW_COLUMNS = ("references", "wins", "scores", "seeds")
CONTEXT_COLUMNS = ("task", "criteria", "condition")
# Arguments of pipelines that are set here.
OWN_ARGUMENTS = (
    "generator",
    "latents",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "output_type",
    "prompt",
    "return_dict",
)
# Entries of each tensor that tell one checkpoint from another.
SAMPLED_ENTRIES = 8


def best_of_n_references(
    pipeline: Any,
    scorer: RewardDanceScorer | Callable[..., torch.Tensor] | None,
    prompts: Sequence[str] | datasets.Dataset,
    num_candidates: int = 16,
    top_k: int = 2,
    method: str = "top",
    rank_method: str = "round_robin",
    num_rounds: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    output_dir: str | os.PathLike | None = None,
    show_progress: bool = True,
    **pipeline_kwargs: Any,
) -> datasets.Dataset:
    r"""
    Draw candidates for each prompt, let a judge rank them, and keep some as references.

    Each candidate has a seed of its own, which follows from `seed`, the prompt and the candidate's index: a prompt has the
    same candidates in whatever list and batch it comes, so that parts of a list can be worked on by several processes.
    `pipeline(prompt, generator=torch.Generator().manual_seed(seed), **pipeline_kwargs)` draws one again (up to the rounding
    errors that batch sizes make on some devices).

    A candidate loses, with a warning, if its image has pixels that are not finite or was blanked by a safety checker, or
    if a score of it is not finite.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Un-tuned generator of images or clips, with any components that take text.
        scorer ([`RewardDanceScorer`] or `Callable`):
            Judge: [`RewardDanceScorer.rank`] orders candidates, by wins for a pairwise judge and by score for others. Or
            any `reward(images, prompts, **context) -> torch.Tensor (n,)`, by which candidates are ordered. Not asked, and
            may be None, if `method` is `"random"`.
        prompts (`list[str]` or `datasets.Dataset`):
            Prompts. A dataset has a column `prompt`; its columns `task`, `criteria` and `condition` (first frame, given to
            the pipeline as `image` too) are used, and all of its columns are kept.
        num_candidates (`int`, *optional*, defaults to `16`):
            Number of candidates of each prompt.
        top_k (`int`, *optional*, defaults to `2`):
            Number of candidates to keep.
        method (`str`, *optional*, defaults to `"top"`):
            `"top"` keeps the best, best first; `"bottom"` the worst, worst first; `"random"` draws no more candidates than it
            keeps, since which of them are kept would be chance.
        rank_method (`str`, *optional*, defaults to `"round_robin"`):
            `"round_robin"`, `"swiss"` or `"halving"`, as in [`RewardDanceScorer.rank`].
        num_rounds (`int`, *optional*):
            Number of rounds of a tournament, as in [`RewardDanceScorer.rank`].
        batch_size (`int`, *optional*, defaults to `8`):
            Number of candidates in one call of the pipeline. Halved when memory runs out. Prompts with a `condition` are
            drawn one by one, since pipelines disagree about lists of first frames.
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
    references = best_of_n_references(pipeline, scorer, ["a red circle"], num_candidates=16, top_k=2, output_dir="references")
    references.push_to_hub("org/my-references")
    ```
    """
    rows = _as_dataset(prompts)
    _check_arguments(scorer, num_candidates, top_k, method, rank_method, num_rounds, batch_size)
    taken = [name for name in OWN_ARGUMENTS if name in pipeline_kwargs]
    if "condition" in rows.column_names and "image" in pipeline_kwargs:
        taken.append("image")
    if taken:
        raise ValueError(
            f"{taken} were given as arguments of the pipeline, but are set for each candidate. Leave them out; "
            "prompts and first frames go into `prompts`."
        )
    store = None
    if output_dir is not None:
        arguments = {
            "num_candidates": num_candidates,
            "top_k": top_k,
            "method": method,
            "rank_method": rank_method,
            "num_rounds": num_rounds,
            "seed": seed,
            "pipeline": _describe_pipeline(pipeline),
            "scorer": None if method == "random" else _describe_scorer(scorer),
            **{name: Hasher.hash(value) for name, value in pipeline_kwargs.items()},
        }
        store = _RowStore(Path(output_dir), arguments, len(rows))

    drawer = _Drawer(pipeline, pipeline_kwargs, batch_size)
    kept: list[dict[str, Any]] = []
    used = rows.select_columns([name for name in ("prompt", *CONTEXT_COLUMNS) if name in rows.column_names])
    for index in tqdm(range(len(used)), desc="References", unit="prompt", disable=not show_progress):
        row = {name: value for name, value in used[index].items() if value is not None}
        name = f"prompts[{index}] ({row.get('prompt')!r})"
        if not isinstance(row.get("prompt"), str):
            raise TypeError(f"`{name}` is no string, but every prompt must be one. Repair or drop it.")
        if "condition" in row:
            row["condition"] = load_image(row["condition"], f"condition of {name}")
        if store is not None and store.has(index, row):
            continue
        seeds = [_candidate_seed(seed, row["prompt"], candidate) for candidate in range(num_candidates)]
        if method == "random":
            samples = drawer.draw(row, name, seeds, at_least=top_k)
            order, wins, scores = list(samples)[:top_k], None, None
        else:
            samples = drawer.draw(row, name, seeds)
            order, wins, scores = _rank(scorer, samples, row, name, top_k, method, rank_method, num_rounds)
        if len(order) < top_k:
            raise ValueError(
                f"Only {len(order)} of {num_candidates} candidates of `{name}` are left, but `top_k` is {top_k}. Look at "
                "the warnings above: NaN in the weights, or a type with too small a range (`torch.float16`)?"
            )
        result = {
            "references": [_encode(samples[candidate]) for candidate in order],
            "wins": wins,
            "scores": scores,
            "seeds": [seeds[candidate] for candidate in order],
        }
        if store is None:
            kept.append(result)
        else:
            store.write(index, row, result)
    new = datasets.Dataset.from_list(kept, features=_features(kept[0])) if store is None else store.read_all()
    return datasets.concatenate_datasets([rows, new], axis=1)


class _Drawer:
    """Draws candidates of a prompt in batches."""

    def __init__(self, pipeline: Any, pipeline_kwargs: Mapping[str, Any], batch_size: int) -> None:
        self.pipeline = pipeline
        self.pipeline_kwargs = pipeline_kwargs
        self.limit = BatchLimit(batch_size)

    def draw(
        self, row: Mapping[str, Any], name: str, seeds: Sequence[int], at_least: int | None = None
    ) -> dict[int, list[Image.Image] | Image.Image]:
        """Candidates that can be looked at, by index; no more batches once there are `at_least`."""
        samples: dict[int, Any] = {}
        start = 0
        while start < len(seeds) and (at_least is None or len(samples) < at_least):
            size = 1 if "condition" in row else self.limit.max_rows
            if at_least is not None:
                size = min(size, at_least - len(samples))
            batch = list(range(start, min(start + size, len(seeds))))
            start = batch[-1] + 1
            self.limit.run_in_halves(batch, lambda part: samples.update(self._call(row, name, seeds, part)))
        return samples

    def _call(
        self, row: Mapping[str, Any], name: str, seeds: Sequence[int], batch: Sequence[int]
    ) -> dict[int, list[Image.Image] | Image.Image]:
        arguments = dict(self.pipeline_kwargs)
        generators: Any = [torch.Generator().manual_seed(seeds[candidate]) for candidate in batch]
        prompt: Any = [row["prompt"]] * len(batch)
        if "condition" in row:
            arguments["image"] = row["condition"]
            prompt, generators = prompt[0], generators[0]
        else:
            for key, value in arguments.items():
                if key.startswith("negative_prompt") and isinstance(value, str):
                    arguments[key] = [value] * len(batch)  # some pipelines want the type of `prompt`
        output = self.pipeline(prompt=prompt, generator=generators, output_type="pt", **arguments)
        images = output[0]
        if len(images) != len(batch):
            raise ValueError(
                f"The pipeline made {len(images)} samples of {len(batch)} prompts, but must make one of each. Leave out "
                f"what multiplies them; got the arguments {sorted(arguments)}."
            )
        blanked = output.get("nsfw_content_detected") or [False] * len(batch)
        samples = {}
        for candidate, image, is_blank in zip(batch, images, blanked, strict=True):
            if is_blank or not image.isfinite().all():
                reason = "was blanked by the safety checker" if is_blank else "has pixels that are NaN or infinite"
                logger.warning(f"Candidate {candidate} of `{name}` is left out: it {reason}.")
            else:
                samples[candidate] = _as_images(image)
        return samples


def _rank(
    scorer: Any,
    samples: Mapping[int, Any],
    row: Mapping[str, Any],
    name: str,
    top_k: int,
    method: str,
    rank_method: str,
    num_rounds: int | None,
) -> tuple[list[int], list[float], list[float]]:
    """Kept candidates with their wins and scores. Those without finite scores are left out."""
    candidates = list(samples)
    context = {key: row[key] for key in CONTEXT_COLUMNS if key in row}
    if not context.get("task"):
        is_clip = any(isinstance(sample, list) for sample in samples.values())
        clip_task = "image-to-video" if "condition" in row else "text-to-video"
        context["task"] = clip_task if is_clip else "text-to-image"
    if not isinstance(scorer, RewardDanceScorer):
        rewards = _rewards(scorer, samples, row["prompt"], context)
        candidates = _leave_out(candidates, [i for i in candidates if not torch.tensor(rewards[i]).isfinite()], name)
        values = torch.tensor([rewards[i] for i in candidates])
        order = sorted(range(len(candidates)), key=lambda i: (-float(values[i]), candidates[i]))
        above = values[None] - values[:, None]  # entry [i, j] is above 0 if j is better
        wins = (above > 0).sum(0) + 0.5 * ((above == 0).sum(0) - 1)
    elif len(candidates) < max(2, top_k):
        return candidates, [0.0] * len(candidates), [float("nan")] * len(candidates)
    else:
        keep = top_k if method == "top" else None

        def rank(chosen: list[int]) -> Any:
            images = [samples[i] for i in chosen]
            return scorer.rank(
                images, row["prompt"], keep, ranking_method=rank_method, num_rounds=num_rounds, **context
            )

        try:
            ranking = rank(candidates)
        except NonFiniteScoreError as error:
            candidates = _leave_out(candidates, _find_culprits(scorer, samples, row["prompt"], context), name, error)
            if len(candidates) < max(2, top_k):
                return candidates, [0.0] * len(candidates), [float("nan")] * len(candidates)
            ranking = rank(candidates)
        order, wins, values = ranking.order, ranking.wins, ranking.scores
    if method == "bottom":
        order = order[::-1]
    order = order[:top_k]
    return [candidates[i] for i in order], [float(wins[i]) for i in order], [float(values[i]) for i in order]


def _rewards(
    reward: Callable[..., torch.Tensor], samples: Mapping[int, Any], prompt: str, context: dict[str, Any]
) -> dict[int, float]:
    """Rewards of candidates by a plain function, which is given the context that the prompt has."""
    arguments = {
        ("conditions" if key == "condition" else key): [value] * len(samples) for key, value in context.items()
    }
    parameters = inspect.signature(reward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    with torch.no_grad():
        rewards = torch.as_tensor(reward(list(samples.values()), [prompt] * len(samples), **arguments))
    if rewards.shape != (len(samples),):
        raise ValueError(
            f"`scorer` gave rewards of shape {tuple(rewards.shape)} for {len(samples)} samples, but must give one each. "
            f"Return a tensor of shape ({len(samples)},)."
        )
    return dict(zip(samples, rewards.double().tolist(), strict=True))


def _find_culprits(
    scorer: RewardDanceScorer, samples: Mapping[int, Any], prompt: str, context: dict[str, Any]
) -> list[int]:
    """Candidates without which all scores are finite: judged one by one, those leave that are in most bad judgements."""
    arguments: dict[str, Any] = {
        ("conditions" if key == "condition" else key): [value] for key, value in context.items()
    }

    def is_bad(sample: int, reference: int | None) -> bool:
        references = None if reference is None else [samples[reference]]
        try:
            with torch.no_grad():
                scorer.score([samples[sample]], [prompt], references, **arguments)
        except NonFiniteScoreError:
            return True
        return False

    if not scorer.is_pairwise:
        return [sample for sample in samples if is_bad(sample, None)]
    bad = [pair for pair in permutations(samples, 2) if is_bad(*pair)]
    culprits = []
    while bad:
        involved = [candidate for pair in bad for candidate in pair]
        culprits.append(max(samples, key=involved.count))
        bad = [pair for pair in bad if culprits[-1] not in pair]
    return culprits


def _leave_out(candidates: list[int], culprits: list[int], name: str, error: Exception | None = None) -> list[int]:
    if error is not None and not culprits:
        raise ValueError(
            f"Candidates of `{name}` have scores that are NaN or infinite, but only when they are judged together. Load the "
            "judge in another type (`dtype=torch.float32`)."
        ) from error
    for candidate in culprits:
        logger.warning(f"Candidate {candidate} of `{name}` is left out: its score is NaN or infinite.")
    return [candidate for candidate in candidates if candidate not in culprits]


# ---- what is kept on disk ----


class _RowStore:
    """
    Finished prompts of a run, one file each, in a folder that belongs to its arguments.

    Args:
        folder (`Path`):
            Folder, made if it is missing.
        arguments (`dict`):
            All that results depend on, beside the prompts.
        num_rows (`int`):
            Number of prompts.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], num_rows: int) -> None:
        self.folder = folder / "rows"
        self.num_rows = num_rows
        self.folder.mkdir(parents=True, exist_ok=True)
        file = folder / "arguments.json"
        if file.exists():
            known = json.loads(file.read_text(encoding="utf-8"))
            different = sorted(key for key in {*known, *arguments} if known.get(key) != arguments.get(key))
            if different:
                raise ValueError(
                    f"`output_dir` {os.fspath(folder)!r} belongs to a run in which {different} were others, but references "
                    "of both would be mixed. Repeat the call with the same ones, or choose another folder."
                )
        else:
            _write(file, json.dumps(arguments, indent=2).encode())
        self.known = {int(file.name[:8]): file for file in self.folder.glob("*.arrow")}
        beyond = sorted(index for index in self.known if index >= num_rows)
        if beyond:
            raise ValueError(
                f"`output_dir` {os.fspath(folder)!r} has results of the prompts {beyond[:3]}, but `prompts` has {num_rows} prompts only. "
                "Choose another folder for other prompts."
            )

    def _file(self, index: int, row: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256()
        for key in ("prompt", *CONTEXT_COLUMNS):
            value = row.get(key)
            digest.update(value.tobytes() if isinstance(value, Image.Image) else repr(value).encode())
        return self.folder / f"{index:08d}-{digest.hexdigest()[:16]}.arrow"

    def has(self, index: int, row: Mapping[str, Any]) -> bool:
        """Whether a prompt is finished."""
        if index not in self.known:
            return False
        if self.known[index] != self._file(index, row):
            raise ValueError(
                f"`output_dir` {os.fspath(self.folder.parent)!r} has the results of another prompt at the place of "
                f"`prompts[{index}]`, {row['prompt']!r}. Repeat the call with the same prompts in the same order (new ones at "
                "the end), or choose another folder."
            )
        return True

    def write(self, index: int, row: Mapping[str, Any], result: dict[str, Any]) -> None:
        """Keep the result of a prompt, all of it or nothing."""
        features = _features(result)
        table = datasets.Dataset.from_list([result], features=features).data.table.cast(features.arrow_schema)
        stream = io.BytesIO()
        with pa.ipc.new_stream(stream, features.arrow_schema) as writer:
            writer.write_table(table)
        self.known[index] = self._file(index, row)
        _write(self.known[index], stream.getvalue())

    def read_all(self) -> datasets.Dataset:
        """All results in the order of prompts, read from one file that is mapped into memory."""
        merged = self.folder.parent / "references.arrow"
        part = merged.with_suffix(".part")
        schema = pa.ipc.open_stream(self.known[0].read_bytes()).schema
        # A dataset of an earlier call may still map the old file, so it is replaced and not overwritten.
        with open(part, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for index in range(self.num_rows):
                writer.write_table(pa.ipc.open_stream(self.known[index].read_bytes()).read_all())
        os.replace(part, merged)
        return datasets.Dataset.from_file(str(merged))


def _write(file: Path, content: bytes) -> None:
    part = file.with_suffix(".part")
    with open(part, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def _features(result: Mapping[str, Any]) -> datasets.Features:
    image = datasets.Image()
    is_clip = isinstance(result["references"][0], list)
    return datasets.Features(
        {
            "references": datasets.List(datasets.List(image) if is_clip else image),
            "wins": datasets.List(datasets.Value("float64")),
            "scores": datasets.List(datasets.Value("float64")),
            "seeds": datasets.List(datasets.Value("int64")),
        }
    )


# ---- images, seeds, checks ----


def _as_images(pixels: torch.Tensor) -> Image.Image | list[Image.Image]:
    """Image of shape `(3, height, width)`, or clip with frames first."""
    if pixels.ndim == 4:
        return [load_image(frame.float().clamp(0, 1)) for frame in pixels]
    return load_image(pixels.float().clamp(0, 1))


def _encode(sample: Image.Image | list[Image.Image]) -> Any:
    if isinstance(sample, list):
        return [_encode(frame) for frame in sample]
    stream = io.BytesIO()
    sample.save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """Seed of 32 bits that no other candidate is likely to have."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{candidate}/{prompt}".encode()).digest()[:4], "big")


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
    scorer: Any,
    num_candidates: int,
    top_k: int,
    method: str,
    rank_method: str,
    num_rounds: int | None,
    batch_size: int,
) -> None:
    for name, value in (("num_candidates", num_candidates), ("top_k", top_k), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}, but must be a positive integer. Pass 1 or more.")
    if top_k > num_candidates:
        raise ValueError(
            f"`top_k` is {top_k}, but only {num_candidates} candidates are drawn. Raise `num_candidates` or lower `top_k`."
        )
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}, but must be one of {METHODS}.")
    if rank_method not in RANK_METHODS:
        raise ValueError(f"`rank_method` is {rank_method!r}, but must be one of {RANK_METHODS}.")
    if num_rounds is not None and (rank_method == "round_robin" or num_rounds < 1):
        wanted = "belongs to tournaments" if rank_method == "round_robin" else "must be positive"
        raise ValueError(f"`num_rounds` is {num_rounds}, but {wanted}. Leave it out, or pass 1 or more to others.")
    if method != "random" and not callable(scorer):
        raise TypeError(
            f"`scorer` is of type `{type(scorer).__name__}`, but `method={method!r}` needs a judge. Pass a "
            '`RewardDanceScorer` or a reward function, or `method="random"`.'
        )


def _describe_pipeline(pipeline: Any) -> dict[str, Any]:
    """What tells one generator from another: class, scheduler, some entries of all weights."""
    description = {"class": type(pipeline).__name__}
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            description[name] = _weights_digest(component.named_parameters())
        elif hasattr(component, "timesteps"):
            description[name] = f"{type(component).__name__} {Hasher.hash(dict(component.config))}"
    return description


def _describe_scorer(scorer: Any) -> Any:
    if not isinstance(scorer, RewardDanceScorer):
        return getattr(scorer, "__qualname__", type(scorer).__name__)
    config = scorer.model.config
    settings = {name: getattr(config, name) for name in ("paradigm", "score_normalization", "score_temperature")}
    return {"class": "RewardDanceScorer", **settings, "weights": _weights_digest(scorer.model.named_parameters())}


def _weights_digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # of offloaded models
            entries = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLED_ENTRIES)]
            digest.update(repr(entries.double().tolist()).encode())
    return digest.hexdigest()[:16]
