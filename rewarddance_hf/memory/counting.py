"""Run a training, a tuning or a scoring on the counting device: models come from their configurations, weights are not read."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.integrations import PeftAdapterMixin

from ..availability import check_available
from .device import NAME, memory, register


GIB = 2**30
LARGEST = 2**18  # elements of the largest tensor of floats that has values
CONFIGURATIONS = ["*.json", "*.txt", "*.model", "*.jinja"]  # of a repository, with its tokenizers


@contextlib.contextmanager
def counting() -> Iterator[torch.device]:
    """
    Let trainers run on the counting device, and `from_pretrained` make models there from their configurations. The device
    stays known to the process, which is of no use for anything else afterwards.

    Yields:
        `torch.device`: The device. What it allocates is in [`~rewarddance_hf.memory.device.memory`].
    """
    device = register(largest=LARGEST)
    memory.peak = memory.now
    with trainers_on(device), _models_without_weights(device):
        yield device


def fetch_configurations(name: str, revision: str | None = None) -> str:
    """Folder with the configurations and tokenizers of a model, without its weights: `name` itself if it is a folder."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    check_available(name, revision=revision)
    return snapshot_download(name, revision=revision, allow_patterns=CONFIGURATIONS)


@contextlib.contextmanager
def trainers_on(device: torch.device) -> Iterator[None]:
    """Let trainers run on a device that accelerate would not choose by itself."""
    set_up = vars(TrainingArguments)["_setup_devices"]

    def choose(arguments: TrainingArguments) -> torch.device:
        set_up.__get__(arguments)  # once for each instance
        PartialState().device = device
        if AcceleratorState._shared_state:  # a copy, of one who came before
            AcceleratorState._shared_state["device"] = device
        return device

    def load(file: Any, map_location: Any = None, **settings: Any) -> Any:  # torch moves storages, which we have not
        loaded = load_on_cpu(file, map_location="cpu", **settings)
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(map_location or "cpu"), loaded)

    load_on_cpu = torch.load
    with (
        mock.patch.object(TrainingArguments, "_setup_devices", property(choose)),
        mock.patch.object(torch, "load", load),
    ):
        yield


@contextlib.contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make models there and of this type at once, as `from_pretrained` does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _models_without_weights(device: torch.device) -> Iterator[None]:
    """`from_pretrained` of transformers, diffusers and adapters, which makes models from their configurations."""

    def of_transformers(cls: Any, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(name, return_unused_kwargs=True, **kwargs)
        config._name_or_path = str(name)
        if kwargs.get("attn_implementation") is not None:
            config._attn_implementation = kwargs["attn_implementation"].replace("flash_attention_2", "sdpa")
        dtype = _saved_type(config) if dtype == "auto" else _type(dtype)
        _set_type(config, dtype)
        with made_on(device, dtype):
            model = cls(config).eval()
        return (model, {"missing_keys": set()}) if kwargs.get("output_loading_info") else model

    def of_adapter(model: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        from peft import PeftConfig, inject_adapter_in_model

        settings = PeftConfig.from_pretrained(str(name))
        with made_on(device, torch.float32):
            inject_adapter_in_model(settings, model)  # type: ignore[arg-type]
        return SimpleNamespace(missing_keys=[])

    patches: list[Any] = [
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(of_transformers)),
        mock.patch.object(PeftAdapterMixin, "load_adapter", of_adapter),
    ]
    if find_spec("diffusers") is not None:  # judges need none
        from diffusers import ModelMixin

        def of_diffusers(cls: Any, name: Any, *args: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
            dtype = kwargs.get("torch_dtype") or kwargs.get("dtype") or torch.float32
            with made_on(device, _type(dtype)):
                return cls.from_config(cls.load_config(name, subfolder=subfolder)).eval()

        patches.append(mock.patch.object(ModelMixin, "from_pretrained", classmethod(of_diffusers)))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _type(dtype: str | torch.dtype) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _set_type(config: Any, dtype: torch.dtype) -> None:
    """Let all parts of a model be made in a type, as their configurations tell it."""
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _set_type(getattr(config, name), dtype)


def _saved_type(config: Any) -> torch.dtype:
    """Type that the weights were saved in, as the configuration tells it."""
    for part in (config, getattr(config, "vlm_config", None), config.get_text_config()):
        dtype = getattr(part, "dtype", None) or getattr(part, "torch_dtype", None)
        if dtype is not None:
            return _type(str(dtype).removeprefix("torch."))
    return torch.float32


def size_of(tensors: Iterable[torch.Tensor]) -> float:
    """Gibibytes of the tensors that are on the device, each once."""
    found = {id(tensor): tensor for tensor in tensors if tensor.device.type == NAME}
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values()) / GIB


def weights_of(model: torch.nn.Module) -> float:
    """Gibibytes of the parameters and buffers that are on the device."""
    return size_of([*model.parameters(), *model.buffers()])


class FirstUpdate(TrainerCallback):
    """
    Make the first update like a later one: the optimizer has its states, and gradients of earlier batches are there if they
    are accumulated. Then the peak is counted anew, over what is there (`base`), as it is not that of what came before.
    """

    def __init__(self, accumulates: bool) -> None:
        self.accumulates = accumulates
        self.gradients = self.optimizer = self.before = self.base = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.before = memory.peak / GIB
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        self.optimizer = size_of(
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
        )
        self.gradients = size_of(parameter.grad for parameter in parameters)
        optimizer.zero_grad()
        for parameter in kwargs["model"].parameters():  # may be others on the way to the device, of the same memory
            if self.accumulates and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self.base = memory.now / GIB
        memory.peak = memory.now


def prepare_arguments(args: Any, folder: str) -> FirstUpdate:
    """Let a run make one update and nothing else, in `folder`."""
    first = FirstUpdate(args.gradient_accumulation_steps > 1)
    args.device  # is found out once, which resets what accelerate knows  # noqa: B018
    few = {
        "output_dir": folder,
        "max_steps": 1,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "sample_steps": 0,
        "warmup_steps": 0,
        # How it is split is worked out from what is counted in one process.
        "fsdp": None,
        "fsdp_plugin_args": None,
        "deepspeed": None,
        "deepspeed_plugin": None,
        "hf_deepspeed_config": None,
    }
    for name, value in few.items():
        if hasattr(args, name):
            setattr(args, name, value)
    return first
