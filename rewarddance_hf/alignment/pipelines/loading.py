"""Loading of pipelines with the weights in the type that was asked for: diffusers does not understand the name of a
type, and loads float32."""

import os
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...availability import check_available


def load_pipeline(
    pretrained_model_name_or_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    **kwargs: Any,
) -> Any:
    """
    Load a pipeline from the Hub or a folder, without the components that it was saved without. The `dtype`, also by its name,
    is `"auto"` for float32 on the CPU and bfloat16 elsewhere; `kwargs` are those of `DiffusionPipeline.from_pretrained`.
    """
    device = torch.device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    check_available(pretrained_model_name_or_path, "model_index.json", **kwargs)
    # Of these, some pipelines demand to be told that there are none.
    components = DiffusionPipeline.load_config(pretrained_model_name_or_path, **kwargs)
    absent = {name: None for name, value in components.items() if value == [None, None]}
    return DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, torch_dtype=dtype, **absent, **kwargs).to(
        device
    )
