"""
Judges of the sizes that people use, in bf16 on a GPU: scoring, ranking, a reward step of ReFL and LoRA training.

Configurations are those of the released models, weights are random: nothing is downloaded. Without a GPU nothing is measured.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_attention import compare
from bench_reward_step import WAYS, Step
from bench_scoring import BATCH_SIZE, RoundRobin, distinct_pairs, round_robin
from judges import PROMPT, make_judge, make_qwen3_vl
from released_vlms import INTERNVL, QWEN3_VL
from timing import interleaved, matrix_product_peak
from torch.utils.flop_counter import FlopCounterMode


WORDS_BEFORE, WORDS_AFTER = 77, 24  # tokens of a question before its reference, and after it beside the sample


@dataclass
class Size:
    """A judge and how much of it is measured."""

    make: Callable[..., tuple[Any, Any]]
    configs: dict[str, dict[str, Any]]
    num_tokens: int = 256  # an image
    pairs: int = 64  # distinct ones
    images: int = 16  # of a round robin
    train_pairs: int = 8  # of an update
    updates: int = 6
    repeats: int = 3
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    bound: float = 0.25  # on log-odds between the engine and its peers, both in bf16


SIZES = {
    "internvl3_5_2b": Size(make_judge, INTERNVL["2B"]),
    "internvl3_5_8b": Size(make_judge, INTERNVL["8B"]),
    "qwen3_vl_8b": Size(make_qwen3_vl, QWEN3_VL["8B"]),
}


@contextlib.contextmanager
def judge_of(size: Size, layout: str = "text_first") -> Iterator[tuple[Any, Any]]:
    """Judge and processor, which leave the device afterwards."""
    yield size.make(size.num_tokens, layout, **size.configs, device=size.device, dtype=size.dtype)
    if size.device == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def peak_memory(results: dict[str, float]) -> Iterator[None]:
    """Adds gibibytes at the peak, weights included."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield
    if torch.cuda.is_available():
        results["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30


def score(size: Size) -> dict[str, float]:
    """Distinct pairs, each of two images of its own."""
    results: dict[str, float] = {}
    with judge_of(size) as judge, peak_memory(results):
        found = distinct_pairs(size.pairs, size.num_tokens, repeats=size.repeats, judge=judge)
    results |= {"images_per_second": 2 * found["questions_per_second"], **found}
    return results


def rank(size: Size) -> dict[str, float]:
    """A round robin against peers."""
    results: dict[str, float] = {}
    case = RoundRobin(size.images, size.num_tokens, "text_first", repeats=size.repeats, bound=size.bound)
    with judge_of(size) as judge, peak_memory(results):
        results |= round_robin(case, judge)
    return results


def reward_step(size: Size) -> dict[str, float]:
    """Forward and backward to the pixels of four samples, over the full graph."""
    results: dict[str, float] = {}
    with judge_of(size) as judge:
        steps = {
            way: Step(way, "text_first", has_one_reference=False, num_tokens=size.num_tokens, judge=judge)
            for way in WAYS
        }
        _, seconds = interleaved(steps, size.repeats)
        results["full_graph_seconds"] = seconds["full_graph"]
        peaks = {}
        for way, step in steps.items():
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            with peak_memory(results):
                step()
            peaks[way] = results.pop("peak_gib", float("nan")) - before / 2**30
            step.stack.close()
        for way in list(WAYS)[1:]:
            results[f"{way}_time_over_full_graph"] = seconds[way] / seconds["full_graph"]
            results[f"{way}_memory_over_full_graph"] = peaks[way] / peaks["full_graph"]
    return results


def train(size: Size) -> dict[str, float]:
    """LoRA updates of [`RewardDanceTrainer`] with the settings that it has by default."""
    from peft import LoraConfig
    from tiny_vlms import random_image
    from transformers import TrainerCallback

    from rewarddance_hf import DataCollatorForRewardDance, RewardDanceTrainer, RewardDanceTrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    results: dict[str, float] = {}
    images = [random_image(i, 512, 512) for i in range(4 * size.train_pairs)]
    rows = [
        {"prompt": f"{PROMPT} {i}", "chosen": images[2 * i % len(images)], "rejected": images[2 * i % len(images) + 1]}
        for i in range(2 * size.train_pairs)
    ]
    clock = Clock()
    with judge_of(size) as (model, processor), tempfile.TemporaryDirectory() as folder:
        arguments = RewardDanceTrainingArguments(
            folder,
            per_device_train_batch_size=size.train_pairs,
            max_steps=size.updates,
            bf16=size.dtype == torch.bfloat16,
            use_cpu=size.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RewardDanceTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=processor,
            peft_config=LoraConfig(r=32, lora_alpha=64),
            callbacks=[clock],
        )
        with peak_memory(results):
            trainer.train()
        batch = DataCollatorForRewardDance(processor)(rows[: size.train_pairs])
        tokens = int(batch["attention_mask"].sum())
        # The first update loads kernels
        seconds = (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
        with FlopCounterMode(display=False) as counter:
            trainer.training_step(trainer.model, trainer._prepare_inputs(batch))
        operations = counter.get_total_flops()
    peak = matrix_product_peak(size.device, size.dtype)
    results |= {
        "seconds_per_update": seconds,
        "pairs_per_second": size.train_pairs / seconds,
        "images_per_second": 2 * size.train_pairs / seconds,
        "tokens_per_second": tokens / seconds,
        "share_of_peak": operations / seconds / peak,
    }
    return results


def attention(size: Size) -> dict[str, float]:
    """Ways to attend to a prefix that candidates share, at the shapes of a round robin."""
    text = size.configs["text_config"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    prefix, rest = WORDS_BEFORE + size.num_tokens, size.num_tokens + WORDS_AFTER
    return compare(BATCH_SIZE, prefix, rest, heads, kv_heads, width, device=size.device, types=(size.dtype,))


TASKS = {"attention": attention, "score": score, "rank": rank, "reward_step": reward_step, "train": train}


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """All tasks of each size, where there is a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        f"{name}/{task}": (lambda size=size, measure=measure: measure(size))
        for name, size in SIZES.items()
        for task, measure in TASKS.items()
    }
