"""What the trainers of judges and of generators share: arguments, whole checkpoints, logs, cards, epochs."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..scoring.engine.memory import keep_freed_memory
from .sharding import (
    SHARDED_WEIGHTS,
    RowsPerUpdate,
    check_checkpoint,
    check_engine,
    is_fsdp_checkpoint,
    load_optimizer,
    load_weights,
    prepare_sharding,
    reshard,
)


T = TypeVar("T")


def with_help(arguments: type[T]) -> type[T]:
    """Take the help of arguments on the command line from the docstring of their class."""
    documented = re.findall(r"^ {8}(\w+) \(.*\):\n((?: {12}.*\n)+)", arguments.__doc__ or "", re.MULTILINE)
    for name, text in documented:
        argument = arguments.__dataclass_fields__[name]  # type: ignore[attr-defined]
        help_text = " ".join(text.split()).replace("%", "%%")
        argument.metadata = MappingProxyType({**argument.metadata, "help": help_text})
    return arguments


@with_help
@dataclass
class CommonTrainingArguments(TrainingArguments):
    """
    Arguments whose defaults differ from those of transformers in both trainers.

    Parameters:
        learning_rate (`float`, *optional*):
            Initial learning rate for AdamW. Defaults to one for an adapter, and a lower one if all weights are trained; see
            the class of the trainer's arguments.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether to compute activations again in the backward pass to save memory.
        bf16 (`bool`, *optional*):
            Whether to use bf16 (mixed) precision instead of 32-bit. Defaults to `True` on an accelerator that supports it if
            `fp16` is not set.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Leave it at `False`: the trainer picks the columns that it needs.
    """

    learning_rate: float | None = None
    gradient_checkpointing: bool | None = None
    bf16: bool | None = None
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            )
        # transformers 5.23 renamed the argument and warns about the old name, which its floor does not have yet.
        renamed = "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        if getattr(self, renamed) is None:
            setattr(self, renamed, True if self.gradient_checkpointing is None else self.gradient_checkpointing)
        super().__post_init__()


class CommonTrainer(Trainer):
    """Base of both trainers; see [`~transformers.Trainer`]."""

    # Default learning rates of an adapter, and of all weights
    learning_rates: tuple[float, float]

    def __init__(self, model: Any, args: TrainingArguments, eval_dataset: Any = None, **kwargs: Any) -> None:
        if args.learning_rate is None:
            args.learning_rate = self.learning_rates[0 if getattr(model, "peft_config", None) else 1]
        # A dispatched batch is sliced along the first dimension, which is not that of rows.
        args.accelerator_config.dispatch_batches = False
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_rows(rows, f"eval_dataset[{name!r}]") for name, rows in eval_dataset.items()
            }
        else:
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset")
        super().__init__(model=model, args=args, eval_dataset=eval_dataset, **kwargs)
        keep_freed_memory()
        # `compute_loss` gives means over rows, which have to be divided by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.add_callback(RowsPerUpdate())
        check_engine(self.accelerator, args)
        if self.is_fsdp_enabled:
            prepare_sharding(self.accelerator.state.fsdp_plugin, self.model)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """
        Train. See [`~transformers.Trainer.train`].

        `resume_from_checkpoint=True` takes the newest complete checkpoint; so does "true", as it comes from a command
        line.
        """
        if isinstance(resume_from_checkpoint, str) and resume_from_checkpoint.lower() in ("true", "false"):
            resume_from_checkpoint = resume_from_checkpoint.lower() == "true"
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(Path(self.args.output_dir)))
        if self.is_fsdp_enabled:
            reshard(self.model)
        if resume_from_checkpoint and not self.is_deepspeed_enabled:
            checkpoint = Path(resume_from_checkpoint)
            check_checkpoint(checkpoint, self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None)
            if self.is_fsdp_enabled and not is_fsdp_checkpoint(checkpoint):
                if self.accelerator._models:
                    raise ValueError(
                        f"{str(checkpoint)!r} was written without FSDP, and is read before the model is split, which an evaluation "
                        "or training of this trainer has done. Resume with a new trainer, and evaluate afterwards."
                    )
                with self._without_fsdp():  # whole weights are loaded before they are sharded
                    self._load_from_checkpoint(str(checkpoint))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._training_logs())
        super().log(logs, start_time)

    @contextmanager
    def _without_fsdp(self) -> Iterator[None]:
        self.is_fsdp_enabled = False
        try:
            yield
        finally:
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if (checkpoint / SHARDED_WEIGHTS).exists():
            self._issue_warnings_after_load(load_weights(model or self.model, checkpoint, self.is_fsdp_enabled))
        elif is_fsdp_checkpoint(checkpoint) or not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if (
            checkpoint is None
            or self.is_deepspeed_enabled
            or is_fsdp_checkpoint(Path(checkpoint)) == self.is_fsdp_enabled
        ):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, self.model, Path(checkpoint), self.is_fsdp_enabled)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # One of an earlier run in the same folder is complete no longer, until its last file is written again.
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state that tells a complete checkpoint follows the files of all processes

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model, so that `from_pretrained` loads it. See [`~transformers.Trainer.save_model`].

        All processes must call it. With FSDP's `SHARDED_STATE_DICT`, too, whole weights are saved, but not with each checkpoint.
        """
        with_whole_weights = not _internal_call and self.is_fsdp_enabled
        if with_whole_weights and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and not self.accelerator._models:  # accelerate shards no model without an optimizer
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.model, _ = self.accelerator.prepare(self.model, torch.optim.SGD(trained))
            self.model_wrapped = self.model
        return super().evaluation_loop(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a model card, filled from this run, into `args.output_dir`."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            card = self._card(kwargs.get("model_name") or self.hub_model_id or folder.name)
            (folder / "README.md").write_text(card, encoding="utf-8")

    def _prepare_rows(self, dataset: Any, name: str) -> Any:
        """Dataset as the trainer reads it, checked."""
        raise NotImplementedError

    def _training_logs(self) -> dict[str, float]:
        """What is logged beside the loss."""
        raise NotImplementedError

    def _card(self, model_name: str) -> str:
        """Text of the model card."""
        raise NotImplementedError


class SetEpochCallback(TrainerCallback):
    """
    Tell dataset, sampler and collator which epoch begins, also after resuming. The data loader's own `set_epoch` does
    not reach a collator, nor a sampler or dataset when there are several processes.
    """

    def __init__(self, set_epoch: Callable[[int], Any]) -> None:
        self.set_epoch = set_epoch
        self.next_epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.next_epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.set_epoch(self.next_epoch)
        self.next_epoch += 1


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: the state of the trainer is written last."""
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, json.JSONDecodeError, TypeError):
        return False
    return True


def last_checkpoint(folder: Path) -> Path:
    """Newest complete checkpoint. A killed run may leave a newer one that is incomplete."""
    found = {
        int(step): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.rpartition("-")[2]).isdigit() and is_complete(path)
    }
    if not found:
        raise ValueError(
            f"{folder} has no complete checkpoint to resume from. Start without `resume_from_checkpoint`, or pass the path "
            "of one."
        )
    return found[max(found)]
