"""
Memory of judges by size, counted by `rewarddance estimate`: scoring 8 pairs at once, and updates of 4 pairs on each GPU, LoRA and all weights, on one GPU and on several. Models are of full size, and there are no values.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rewarddance_hf.memory.apart import run_apart
from rewarddance_hf.memory.report import on_each_gpu


SIZES = {
    **{f"InternVL3.5 {size}": f"OpenGVLab/InternVL3_5-{size}-HF" for size in ("1B", "2B", "4B", "8B", "14B", "38B")},
    "Qwen3-VL 8B": "Qwen/Qwen3-VL-8B-Instruct",
}
PAIRS, UPDATED_PAIRS = 8, 4
NUM_GPUS = (2, 4, 8, 16, 32)
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def count(name: str) -> dict[str, float]:
    """
    Count a judge.

    Args:
        name (`str`):
            Name on the Hub.

    Returns:
        `dict[str, float]`: Billions of parameters, and gibibytes of the weights in bf16 and at the peak of each task:
        `lora_ddp_8_gib` is that of each of 8 GPUs.
    """
    from released_vlms import VLMS

    from rewarddance_hf.scripts.estimate import estimate, parse

    with tempfile.TemporaryDirectory() as folder:
        VLMS[name](Path(folder))

        def counted(*flags: str, pairs: int = UPDATED_PAIRS) -> Any:
            task, parsed = parse(["--model", folder, "--per_device_train_batch_size", str(pairs), *flags])
            return estimate(task, *parsed)[1]

        scoring = counted("--task", "score", pairs=PAIRS)
        results = {"billion_parameters": scoring.num_parameters / 1e9, "weights_gib": scoring.parts["weights"]}
        results["score_gib"] = scoring.peak
        accumulated = ["--gradient_accumulation_steps", "2"]  # as on one GPU rows are too few else
        lora, full = counted("--use_peft", *accumulated), counted(*accumulated)
        split = {"lora": lora, "full": counted("--dtype", "bfloat16", *accumulated)}  # as `on_each_gpu` wants it
    for kind, whole in {"lora": lora, "full": full}.items():
        results[f"{kind}_none_1_gib"] = whole.peak
        for engine in ENGINES:
            used = whole if engine == "ddp" else split[kind]
            for num_gpus in NUM_GPUS:
                results[f"{kind}_{engine}_{num_gpus}_gib"] = on_each_gpu(used, engine, num_gpus).peak
    return results


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """One size, or all of them if `is_full`: counts are the same on every machine."""
    titles = SIZES if is_full else ["InternVL3.5 2B"]
    return {title: partial(run_apart, count, SIZES[title]) for title in titles}
