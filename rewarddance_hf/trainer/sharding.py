"""FSDP 2 for the trainers, and checkpoints that go on with another number of processes, sharded or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..parallel import Processes


logger = logging.get_logger(__name__)

# Files that accelerate writes under FSDP: of whole weights, and of shards, which only the same setting reads
SHARDED_WEIGHTS, SHARDED_OPTIMIZER, SHARDS = "pytorch_model_fsdp.bin", "optimizer.bin", "pytorch_model_fsdp_0"
PLAIN_OPTIMIZER = "optimizer.pt"
# From the files of process 0 to all processes
FROM_MAIN = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


def engines_asked_for(args: Any) -> list[str]:
    """Engines that split a training over processes, as the launcher or arguments of a trainer ask for them."""
    engines = ("FSDP", "DeepSpeed")
    return [
        name
        for name in engines
        if getattr(args, name.lower()) or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")
    ]


def check_engine(accelerator: Any, args: Any) -> None:
    """
    Warn if accelerate runs something else than it was asked for, which it does without a word, as on a CPU.

    Raises:
        `RuntimeError`: If each of several processes takes itself for the only one.
    """
    count = Processes.current().count
    runs = accelerator.distributed_type.value
    for engine in engines_asked_for(args):
        if runs != engine.upper() and accelerator.is_main_process:
            logger.warning(
                f"{engine} was asked for, but accelerate runs {runs} ({count} process{'es' * (count > 1)} on "
                f"{accelerator.device.type}): nothing is split, and each process holds all weights, gradients and states of the "
                f"optimizer. {engine} needs GPUs and `accelerate launch`; leave it out to silence this warning."
            )


def forget_unused_renamings(model: Any) -> None:
    """
    Keep those renamings of weights that loading has used, as transformers does except under ZeRO-3, where all are kept: a model would
    be saved under names that nothing loads.
    """
    renamings = getattr(model, "_weight_conversions", None)
    if renamings:
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]


def prepare_sharding(plugin: Any, model: nn.Module) -> None:
    """
    Check that a model can be sharded as it is asked, and shard it by layers if the configuration names none.

    The layers are those that `gradient_checkpointing` computes again. accelerate would take `_no_split_modules`, which for some
    models name what is not there (SigLIP's text tower) or only a part of a layer (the attention of Idefics3).
    """
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` is {plugin.fsdp_version}, but tied and frozen weights need FSDP 2. Set `fsdp_version: 2`, as "
            "`examples/accelerate_configs/fsdp2.yaml` does."
        )
    saved = model.state_dict().keys()
    buffers = [name for name, _ in model.named_buffers() if name in saved]
    if plugin.cpu_ram_efficient_loading and buffers:
        raise ValueError(
            f"`fsdp_cpu_ram_efficient_loading` is true, but accelerate cannot send buffers to other processes, of which the "
            f"checkpoint has {len(buffers)} (first: {buffers[0]!r}). Set it to false."
        )
    if plugin.transformer_cls_names_to_wrap is None:
        layers = {
            type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
        }
        plugin.transformer_cls_names_to_wrap = sorted(layers) or None


def reshard(model: nn.Module) -> None:
    """Let go of weights that an evaluation has left whole: an optimizer made of them would train nothing that is kept."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain_class(model: nn.Module) -> Any:
    """Class of a model before it was sharded, which derives another one whose code is torch's."""
    kind = type(model)
    return (
        next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))
        if isinstance(model, FSDPModule)
        else kind
    )


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Give a model its plain class back, since the code of its class is saved with it."""
    derived = type(model)
    model.__class__ = plain_class(model)
    try:
        yield
    finally:
        model.__class__ = derived


def is_fsdp_checkpoint(checkpoint: Path) -> bool:
    """Whether a run under FSDP wrote a checkpoint."""
    return (checkpoint / SHARDED_WEIGHTS).exists() or (checkpoint / SHARDS).exists()


def check_checkpoint(checkpoint: Path, plugin: Any) -> None:
    """Refuse a checkpoint that would not go on where it stopped. `plugin` is that of FSDP, or None."""
    if not checkpoint.is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, but there is no such folder. Check the path."
        )
    shards_wanted = plugin is not None and "SHARDED" in str(plugin.state_dict_type)
    if (checkpoint / SHARDS).exists() != shards_wanted and is_fsdp_checkpoint(checkpoint):
        written = "SHARDED_STATE_DICT" if not shards_wanted else "FULL_STATE_DICT"
        raise ValueError(
            f"{str(checkpoint)!r} was written with `fsdp_state_dict_type: {written}`. Resume with the same, which for "
            "`SHARDED_STATE_DICT` means under FSDP."
        )
    if not any((checkpoint / name).exists() for name in (PLAIN_OPTIMIZER, SHARDED_OPTIMIZER, "optimizer_0")):
        raise ValueError(
            f"{str(checkpoint)!r} holds no state of the optimizer that this run can read: it was written with "
            "`save_only_model` or by DeepSpeed. Resume under DeepSpeed, or start anew from its weights by `model`."
        )


def load_weights(model: nn.Module, checkpoint: Path, under_fsdp: bool) -> Any:
    """Load whole weights that a run under FSDP wrote. Returns the names of those that are missing or unknown."""
    is_reader = not under_fsdp or Processes.current().is_main
    state = {}
    if is_reader:
        state = torch.load(checkpoint / SHARDED_WEIGHTS, map_location="cpu", weights_only=True)
    # Frozen weights under an adapter are in no checkpoint.
    names = {name for name, p in model.named_parameters() if p.requires_grad or not hasattr(model, "peft_config")}
    missing, unknown = sorted(names - state.keys()), sorted(state.keys() - model.state_dict().keys())
    if not under_fsdp:
        model.load_state_dict(state, strict=False)
    else:
        missing, unknown = Processes.current().gather([(missing, unknown)])[0]
        if not missing:
            set_model_state_dict(model, state, options=FROM_MAIN)
    return nn.modules.module._IncompatibleKeys(missing, unknown)


def load_optimizer(optimizer: Any, model: nn.Module, checkpoint: Path, under_fsdp: bool) -> None:
    """
    Load the state that a run under FSDP wrote into an optimizer without it, or the other way round: the one names weights, the
    other numbers them.
    """
    name = PLAIN_OPTIMIZER if under_fsdp else SHARDED_OPTIMIZER
    processes = Processes.current()
    state: dict[str, Any] = {}
    error: Exception | None = None
    if not under_fsdp or processes.is_main:
        try:
            saved = torch.load(checkpoint / name, map_location="cpu", weights_only=True)
            state = _renamed(saved, *(_keys(optimizer, model, by_name) for by_name in (not under_fsdp, under_fsdp)))
        except Exception as raised:
            error = raised
    processes.raise_together(error)
    if under_fsdp:
        set_optimizer_state_dict(model, optimizer, state, options=FROM_MAIN)
    else:
        optimizer.load_state_dict(state)


def _keys(optimizer: Any, model: nn.Module, by_name: bool) -> list[Any]:
    """Names of the weights of an optimizer in the order of its groups, or their numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [names[weight] for weight in weights] if by_name else list(range(len(weights)))


def _renamed(state: dict[str, Any], old: list[Any], new: list[Any]) -> dict[str, Any]:
    """State of an optimizer under other keys of its weights."""
    found = [key for group in state["param_groups"] for key in group["params"]]
    if set(found) != set(old):
        raise ValueError(
            f"The checkpoint holds the optimizer of {len(found)} weights, but {len(old)} are trained now, or others. Resume with "
            "the same model, adapter and optimizer."
        )
    names = dict(zip(old, new, strict=True))
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: value for key, value in state["state"].items()}, "param_groups": groups}


class RowsPerUpdate(TrainerCallback, ExportableState):
    """Remember in each checkpoint how many rows made an update, and warn if another number does after resuming."""

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("args", {}).get("rows", 0)
        self.rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if saved not in (0, self.rows) and state.global_step and state.is_world_process_zero:
            logger.warning(
                f"The checkpoint made updates of {saved} rows, but this run makes them of {self.rows}, so that it goes on at "
                "another row and another epoch. Choose `per_device_train_batch_size` and `gradient_accumulation_steps` so that "
                f"their product times the {args.world_size} processes is {saved}."
            )

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {"rows": self.rows}, "attributes": {}}
