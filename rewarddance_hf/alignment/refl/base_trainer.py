"""Training of a denoiser inside its pipeline: weights, their average, checkpoints, several processes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from ...import_utils import require_extra


require_extra("train", "accelerate", "datasets")
require_extra("diffusers", "diffusers", "peft")

from accelerate.utils import broadcast  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402

from ...parallel import Processes  # noqa: E402
from ...trainer.common import CommonTrainer, is_complete  # noqa: E402
from ...trainer.sharding import load_optimizer  # noqa: E402
from .arguments import ReFLTrainingArguments  # noqa: E402
from .encoded_prompts import EncodedPrompts  # noqa: E402
from .sharding import are_finite, optimizer_state, shard, whole  # noqa: E402
from .weights import (  # noqa: E402
    adapter_file,
    complete_config,
    denoiser_names,
    is_on_device,
    load_denoiser,
    make_trainable,
    model_of,
    save_denoiser,
    set_gradient_checkpointing,
    trained_state,
)


logger = logging.get_logger(__name__)

EMA_FILE = "ema.pt"
CHECKPOINTING_ARGUMENTS = ("activation_checkpointing", "gradient_checkpointing")  # new name, old name


class DenoiserTrainer(CommonTrainer):
    """Trainer of denoisers that only their pipeline calls: what the base class wraps around a model would not run."""

    def __init__(self, pipeline: Any, args: ReFLTrainingArguments, peft_config: Any = None, **kwargs: Any) -> None:
        self.pipeline = pipeline
        self.denoiser_names = denoiser_names(pipeline, args.denoisers)
        self.peft_config = peft_config
        denoisers = {name: getattr(pipeline, name) for name in self.denoiser_names}
        for name, denoiser in denoisers.items():
            if not (args.bf16 or args.fp16) and peft_config is None and denoiser.dtype != torch.float32:
                raise ValueError(
                    f"`pipeline.{name}` has the type {denoiser.dtype}, but all of it is trained, in float32. Set "
                    "`bf16=True` so that the pipeline still runs in mixed precision, or pass a `peft_config`."
                )
        set_seed(args.seed)  # of the adapter
        make_trainable(pipeline, self.denoiser_names, peft_config)
        for denoiser in denoisers.values():
            if any(getattr(args, name, None) for name in CHECKPOINTING_ARGUMENTS):
                set_gradient_checkpointing(denoiser)
            complete_config(denoiser)
        if args.shard_denoiser:
            shard(denoisers, args.device)
        # On several GPUs of one process, the base class would wrap the denoiser in `nn.DataParallel`, past which the
        # pipeline calls it, and would count batches for all of them.
        args._n_gpu = min(args.n_gpu, 1)

        super().__init__(model=model_of(pipeline, self.denoiser_names), args=args, **kwargs)
        self.encoded_prompts = None
        if args.precompute_prompts or args.offload:
            self.encoded_prompts = EncodedPrompts(pipeline, args.device, keeps=args.precompute_prompts)
        if self.encoded_prompts is not None:
            self.encoded_prompts.move_pipeline()
        elif not is_on_device(pipeline, args.device):
            pipeline.to(args.device)
        pipeline.set_progress_bar_config(disable=True)

        self.trained_parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if args.world_size > 1 and not args.shard_denoiser:
            for parameter in self.trained_parameters:
                parameter.data.copy_(broadcast(parameter.data.clone()))
        self.ema = EMAModel(self.trained_parameters, decay=args.ema_decay) if args.use_ema else None
        self._saves_checkpoint = False
        self._failed_together = False
        self._states: dict[str, Any] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._failed_together = False
        try:
            with self._without_checkpointing_arguments():
                return super().train(*args, **kwargs)
        except (Exception, KeyboardInterrupt):
            self._save_after_error()
            raise

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Its wrappers, for data parallelism and autocast, would not be called by the pipeline: gradients of processes would
        # not be averaged, or the forward pass of the denoiser would run in float32.
        self.accelerator.prepare_model = lambda model, *args, **kwargs: model

    @contextmanager
    def _without_checkpointing_arguments(self) -> Iterator[None]:
        """Nothing is left to do: the denoiser has its own switch for checkpointing, which is already set."""
        before = {name: getattr(self.args, name) for name in CHECKPOINTING_ARGUMENTS if hasattr(self.args, name)}
        try:
            for name in before:
                setattr(self.args, name, False)
            yield
        finally:
            for name, value in before.items():
                setattr(self.args, name, value)

    def _average_gradients(self) -> None:
        """Average the gradient over processes, and make sure that it is finite."""
        gradients = [parameter.grad for parameter in self.trained_parameters if parameter.grad is not None]
        if self.args.world_size > 1 and not self.args.shard_denoiser:  # which averages by itself
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, reduction="mean"))
        if self.accelerator.scaler is None:  # which skips such updates by itself
            if not are_finite(gradients):
                self._failed_together = True
                raise ValueError(
                    f"The gradient of update {self.state.global_step + 1} is NaN or infinite, while the rewards are finite. "
                    "Resume with a smaller `learning_rate`, with `reward_transform='none'`, or in float32 if this was fp16."
                )

    def _raise_together(self, error: BaseException | None) -> None:
        """Raise the error of one process in all of them, so that none waits for the others."""
        try:
            Processes.current().raise_together(error)
        except BaseException:
            self._failed_together = True
            raise

    def _save_after_error(self) -> None:
        """Save the state before the update that failed, unless it is saved already."""
        step = self.state.global_step
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{step}"
        if step == 0 or is_complete(checkpoint):
            return
        if self.args.world_size > 1 and not self._failed_together:
            logger.warning("One process failed alone, so that no checkpoint could be saved: resume from the last one.")
            return
        self.model.zero_grad()
        try:
            self._save_checkpoint(self.model, trial=None)
        except Exception:
            logger.exception(f"The state after update {step} could not be saved.")
        else:
            logger.warning(f"Training stopped by an error. The state after update {step} was saved to {checkpoint}.")

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Put the average of the weights into the denoiser for a while, if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained_parameters)
        self.ema.copy_to(self.trained_parameters)
        try:
            yield
        finally:
            self.ema.restore(self.trained_parameters)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained. With `shard_denoiser`, all processes must call it."""
        if self.args.shard_denoiser:
            is_kept = self.args.should_save
            for name in self.denoiser_names:
                self._states[name] = whole(trained_state(getattr(self.pipeline, name)), is_kept)
        super().save_model(output_dir, _internal_call)
        self._states = {}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.shard_denoiser:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = optimizer_state(self.optimizer, self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.args.shard_denoiser or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, self.model, Path(checkpoint), under_fsdp=True)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saves_checkpoint = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        # A checkpoint goes on from the trained weights.
        with nullcontext() if self._saves_checkpoint else self._averaged_weights():
            for name in self.denoiser_names:
                save_denoiser(self.pipeline, name, folder, self._states.get(name))
        if self._saves_checkpoint and self.ema is not None:
            torch.save(self.ema.state_dict(), folder / EMA_FILE)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        for name in self.denoiser_names:
            load_denoiser(self.pipeline, name, folder)
        if self.ema is not None:
            if not (folder / EMA_FILE).is_file():
                raise ValueError(
                    f"`use_ema` is True, but {folder} has no file {EMA_FILE}. Resume from a checkpoint that was made with it, "
                    "or set `use_ema=False`."
                )
            self.ema.load_state_dict(torch.load(folder / EMA_FILE, map_location=self.args.device, weights_only=True))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The base class copies the files of transformers and PEFT only: `hub_strategy="every_save"` would push no weights.
        if self.is_world_process_zero():
            source, target = Path(checkpoint_folder), Path(self.args.output_dir)
            for name in self.denoiser_names:
                if self.peft_config is None:
                    shutil.copytree(source / name, target / name, dirs_exist_ok=True)
                else:
                    file, _ = adapter_file(name, target)
                    file.parent.mkdir(exist_ok=True)
                    shutil.copy(adapter_file(name, source)[0], file)
        super()._push_from_checkpoint(checkpoint_folder)
