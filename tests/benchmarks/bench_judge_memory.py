"""
Memory of judges by size, counted: InternVL3.5 at full size on a device that gives large tensors no values (`second_device`),
as in `bench_refl_memory`. Each size scores 8 pairs at once, ranks 16 images, and makes one LoRA update of 8 pairs in bf16.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parents[2]
GIB = 2**30
# The language models of InternVL3.5 (Qwen3 with a head of its own), all with the vision tower of 300M parameters
SIZES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "2B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "14B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
}
PAIRS, IMAGES = 8, 16


def count(size: str) -> dict[str, float]:
    """
    Count one size.

    Args:
        size (`str`):
            Name in `SIZES`.

    Returns:
        `dict[str, float]`: Billions of parameters, and gibibytes of the weights in bf16 and at the peak of each task.
    """
    import bench_refl_memory
    from peft import LoraConfig
    from second_device import memory, register
    from second_device_cases import trainers_on
    from tiny_vlms import random_image

    from rewarddance_hf import RewardDanceScorer, RewardDanceTrainer, RewardDanceTrainingArguments

    device = register(largest=bench_refl_memory.LARGEST)
    text = {**bench_refl_memory.JUDGE["text_config"], **SIZES[size], "tie_word_embeddings": False}
    with bench_refl_memory.created_on(device, torch.bfloat16):
        model, processor = bench_refl_memory.judge(text)
    results = {"billion_parameters": model.num_parameters() / 1e9, "weights_gib": memory.now / GIB}
    images = [random_image(index, 448, 448) for index in range(IMAGES)]

    def peak(name: str, task: Any) -> None:
        memory.peak = memory.now
        task()
        results[f"{name}_peak_gib"] = memory.peak / GIB

    scorer = RewardDanceScorer(model, processor, batch_size=PAIRS)
    peak("score", lambda: scorer.score(images[:PAIRS], ["a red circle"] * PAIRS, images[PAIRS:]))
    peak("rank", lambda: scorer.rank(images, "a red circle"))
    row = {"prompt": "a red circle", "chosen": images[0], "rejected": images[1]}
    with tempfile.TemporaryDirectory() as folder, trainers_on(device):
        arguments = RewardDanceTrainingArguments(
            folder,
            per_device_train_batch_size=PAIRS,
            max_steps=1,
            bf16=True,
            use_cpu=True,  # the device is chosen above
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RewardDanceTrainer(
            model=model,
            args=arguments,
            train_dataset=[row] * PAIRS,
            processing_class=processor,
            peft_config=LoraConfig(r=32, lora_alpha=64),  # all linear layers of the language model
        )
        peak("lora_update", trainer.train)
    return results


def count_apart(size: str) -> dict[str, float]:
    """[`count`] in a process of its own."""
    output = subprocess.run([sys.executable, __file__, size], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """All sizes."""
    return {size: partial(count_apart, size) for size in SIZES}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)
    sys.stdout.write("\n" + json.dumps(count(sys.argv[1])) + "\n")
