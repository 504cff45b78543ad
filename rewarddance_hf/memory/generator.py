"""Memory of tuning a generator by a judge, counted."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback

from .counting import GIB, counting, prepare_arguments, size_of, weights_of
from .device import memory
from .report import BEFORE, Count, with_split_denoiser


class Elsewhere:
    """Stands for a judge on another device or machine: samples go to it, and their gradient comes back."""

    is_pairwise = False

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.cpu().float().flatten(1).mean(1)


def count_tuning(
    load_pipeline: Callable[[torch.device], Any],
    judges: dict[str, Callable[[torch.device], Any]],
    args: Any,
    prompts: Any,
    add_references: Callable[[Any, Any, Any], Any],
    peft_config: Any = None,
    num_gpus: int = 1,
) -> Count:
    """
    Count an update of [`ReFLTrainer`].

    Args:
        load_pipeline (`Callable`):
            Loads the pipeline onto a device, with `from_pretrained`.
        judges (`dict[str, Callable]`):
            Load judges onto a device. By the first the generator is tuned; others have their weights there only.
        args ([`ReFLTrainingArguments`]):
            Arguments of the run, which are changed.
        prompts (`datasets.Dataset`):
            Rows with a `prompt`, enough for a batch.
        add_references (`Callable`):
            Makes references of rows, by the pipeline and a judge, if that judge needs them.
        peft_config (`peft.PeftConfig`, *optional*):
            Adapter.
        num_gpus (`int`, *optional*, defaults to 1):
            Number of GPUs, which share the denoiser if `args.shard_denoiser` says so.

    Returns:
        [`Count`]: Weights by component that are there in an update, and the peak of each phase of an update and of what comes
        before the first one (loading, references, encoding of prompts).
    """
    from ..alignment.refl.trainer import ReFLTrainer

    phases: dict[str, float] = {}
    is_split, args.shard_denoiser = args.shard_denoiser, False  # which needs several processes
    if is_split and num_gpus < 2:
        raise ValueError("`shard_denoiser` is True, but there is one GPU to split the denoiser over. Pass `num_gpus`.")
    with counting() as device, tempfile.TemporaryDirectory() as folder:
        first = prepare_arguments(args, folder)
        pipeline = load_pipeline(device)
        loaded = {name: load(device) for name, load in judges.items()}
        judge = next(iter(loaded.values()))
        rows = add_references(prompts, pipeline, judge)
        trainer = ReFLTrainer(
            pipeline=pipeline,
            reward={"judge": judge},
            args=args,
            train_dataset=rows,
            peft_config=peft_config,
            callbacks=[first],
        )
        trainer.remove_callback(PrinterCallback)
        trainer._check_first_rows = lambda: None  # type: ignore[method-assign]  # the update shows the same
        with _phases(trainer, first, phases):
            trainer.train()
        phases[BEFORE] = first.before - first.base
        peak = first.base + max(phases.values())
        models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        num_parameters = sum(parameter.numel() for model in models.values() for parameter in model.parameters())
        models |= {name: judge.model for name, judge in loaded.items() if hasattr(judge, "model")}
        trained = trainer.trained_parameters
        parts = {name: weights_of(model) for name, model in models.items()}
    if peft_config is not None:
        for name in trainer.denoiser_names:
            parts[name] -= size_of(p for p in getattr(pipeline, name).parameters() if p.requires_grad)
        parts["adapter"] = size_of(trained)
    if trainer.ema is not None:
        parts["average"] = size_of(trainer.ema.shadow_params)
    parts = {name: size for name, size in parts.items() if size > 0}
    parts |= {"gradients": first.gradients, "optimizer": first.optimizer}
    parts["activations"] = peak - sum(parts.values())
    num_trained = sum(parameter.numel() for parameter in trained)
    largest = max(_largest_block(getattr(pipeline, name)) for name in trainer.denoiser_names)
    count = Count(parts, num_parameters, num_trained, largest, phases=phases)
    return with_split_denoiser(count, trainer.denoiser_names, num_gpus) if is_split else count


def _largest_block(denoiser: torch.nn.Module) -> int:
    """Parameters of the largest block that FSDP gathers at once."""
    names = set(getattr(denoiser, "_no_split_modules", None) or ())
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks or [denoiser])


@contextmanager
def _phases(trainer: Any, first: Any, phases: dict[str, float]) -> Iterator[None]:
    """Write the peak of each phase of an update into `phases`, over what is there before it."""

    def phase(name: str) -> None:
        """End a phase."""
        if first.base:
            phases[name] = max(phases.get(name, 0.0), memory.peak / GIB - first.base)
            memory.peak = memory.now

    def around(function: Callable[..., Any], before: str | None, after: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                phase(before)
            result = function(*args, **kwargs)
            phase(after)
            return result

        return run

    vae, rewards = trainer.pipeline.vae, trainer.rewards
    is_backward = [False]
    decode = vae.decode
    forward = around(decode, "sampling with gradient", "VAE decode")
    # What checkpointing decodes again in the backward pass belongs to that.
    vae.decode = lambda *args, **kwargs: (decode if is_backward[0] else forward)(*args, **kwargs)
    by_name = around(rewards.by_name, None, "reward step")

    def last(*args: Any, **kwargs: Any) -> Any:
        result = by_name(*args, **kwargs)
        is_backward[0] = True
        return result

    rewards.by_name = last  # of a trainer that makes one update
    yield
    phase("backward")
