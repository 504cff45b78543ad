"""Memory of tuning a generator by a judge, counted."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback

from .counting import GIB, counting, prepare_arguments, size_of
from .device import memory
from .report import Count


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

    Returns:
        [`Count`]: Weights by component, and the peak of each phase of an update. `references` is what making them takes.
    """
    from ..alignment.refl.trainer import ReFLTrainer

    phases: dict[str, float] = {}
    with counting() as device, tempfile.TemporaryDirectory() as folder:
        first = prepare_arguments(args, folder)
        pipeline = load_pipeline(device)
        parts = {
            name: size_of([*component.parameters(), *component.buffers()])
            for name, component in pipeline.components.items()
            if isinstance(component, torch.nn.Module)
        }
        num_parameters = sum(
            parameter.numel()
            for component in pipeline.components.values()
            if isinstance(component, torch.nn.Module)
            for parameter in component.parameters()
        )
        loaded = {name: load(device) for name, load in judges.items()}
        for name, judge in loaded.items():
            if hasattr(judge, "model"):
                parts[name] = size_of([*judge.model.parameters(), *judge.model.buffers()])
        judge = next(iter(loaded.values()))
        memory.peak = memory.now
        rows = add_references(prompts, pipeline, judge)
        if judge.is_pairwise:
            phases["making references"] = (memory.peak - memory.now) / GIB
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
        peak = first.base + max(phases.values())
        trained = trainer.trained_parameters
        if peft_config is not None:
            parts["adapter"] = size_of(trained)
        if trainer.ema is not None:
            parts["average"] = size_of(trainer.ema.shadow_params)
    weights = {name: size for name, size in parts.items() if size > 0}
    others = {"gradients": first.gradients, "optimizer": first.optimizer}
    others["activations"] = peak - sum(weights.values()) - sum(others.values())
    return Count({**weights, **others}, num_parameters, sum(p.numel() for p in trained), phases=phases)


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
