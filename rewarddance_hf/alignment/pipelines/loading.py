"""Loading of pipelines, in the type of weights that was asked for: diffusers takes no name of a type and loads float32."""

import os
from typing import Any

import torch

from ...import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers import DiffusionPipeline  # noqa: E402


def load_pipeline(
    pretrained_model_name_or_path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    **kwargs: Any,
) -> Any:
    """
    Load a pipeline from the Hub or a local folder.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            Repository ID or folder. Components that it was saved without are left out.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Device of all components.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Type of the weights, also by its name. `"auto"` is float32 on the CPU and bfloat16 elsewhere.
        kwargs:
            `revision`, `token`, ... of [`~diffusers.DiffusionPipeline.from_pretrained`].

    Returns:
        [`~diffusers.DiffusionPipeline`]

    Raises:
        `OSError`: If there is no pipeline.
    """
    device = torch.device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    # Of these, some pipelines demand to be told that there are none.
    components = DiffusionPipeline.load_config(pretrained_model_name_or_path, **kwargs)
    absent = {name: None for name, value in components.items() if value == [None, None]}
    return DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, torch_dtype=dtype, **absent, **kwargs).to(
        device
    )
