"""Memory of a training of a judge that is told by the script's arguments."""

from collections.abc import Sequence
from typing import Any

from trl import get_peft_config

from ..memory.judge import count_training
from ..memory.report import Count, on_each_gpu


def count_training_of(
    rows: Sequence[Any], processor: Any, parallel: str, num_gpus: int, args: Any, model_args: Any
) -> Count:
    """What each GPU holds of a training of a judge whose configurations are in a folder. `args` are changed."""
    settings = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    if parallel not in ("none", "ddp"):
        # Gradients are split, and leave no room for activations as they grow; weights are gathered in bfloat16.
        args.gradient_accumulation_steps = max(2, args.gradient_accumulation_steps)
        settings["dtype"] = model_args.dtype if model_args.use_peft else "bfloat16"
    if args.fp16:  # takes as much
        args.fp16, args.bf16 = False, True
    args.model_init_kwargs = {**settings, **(args.model_init_kwargs or {})}
    bits = 8 if model_args.load_in_8bit else 4 if model_args.load_in_4bit else None
    count = count_training(
        model_args.model_name_or_path, args, processor, rows, get_peft_config(model_args), quantized_to=bits
    )
    return on_each_gpu(count, parallel, num_gpus)
