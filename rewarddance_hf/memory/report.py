"""What was counted, what of it a GPU of several holds, and what to do where it does not fit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .counting import GIB


PARALLEL = ("none", "ddp", "fsdp2", "zero2", "zero3")
# What kernels and libraries take, and what an allocator loses between blocks, is left of a card.
CARDS, USABLE = (24, 40, 80, 141), 0.92
BEFORE = "before the first update"  # a phase of a tuning
# Elements that DeepSpeed reduces at a time, by default. Of gathered weights it holds up to twice as many.
BUCKET = 500_000_000


@dataclass
class Count:
    """
    Memory of one GPU.

    Attributes:
        parts (`dict[str, float]`):
            Gibibytes at the peak: `weights` (or by component of a pipeline), `adapter`, `gradients`, `optimizer` and
            `activations`, which are all that is left of the peak.
        num_parameters (`int`):
            Number of parameters.
        num_trained (`int`):
            Those of them that are trained.
        largest_block (`int`):
            Parameters of the largest block that FSDP gathers at once.
        outside_blocks (`int`):
            Parameters that FSDP gathers for the whole pass.
        phases (`dict[str, float]`):
            Gibibytes above weights, gradients and optimizer at the peak of each phase, where it has several.
    """

    parts: dict[str, float]
    num_parameters: int
    num_trained: int
    largest_block: int = 0
    outside_blocks: int = 0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak, "smallest_card": self.smallest_card}

    @property
    def smallest_card(self) -> int | None:
        """Smallest of the usual cards, in GB, that it fits on."""
        return next((card for card in CARDS if self.peak <= USABLE * card), None)


def on_each_gpu(count: Count, parallel: str, num_gpus: int) -> Count:
    """
    What one of several GPUs holds of a training of a judge.

    Args:
        count ([`Count`]):
            Training on one GPU. For `fsdp2`, `zero2` and `zero3` it must have been counted with weights in bfloat16, in which they
            are gathered and computed with, and with gradients of an earlier batch, which leave no room to activations.
        parallel (`str`):
            One of `PARALLEL`. `zero2` and `zero3` follow DeepSpeed's documentation and defaults.
        num_gpus (`int`):
            Number of GPUs.

    Returns:
        [`Count`]: The same for one of them.
    """
    parts = dict(count.parts)
    trained, frozen = count.num_trained, count.num_parameters - count.num_trained
    activations = parts["activations"]
    share = 1 / num_gpus
    if parallel == "none":
        return count
    if parallel == "ddp":
        parts["buckets"] = parts["gradients"]  # in which gradients are averaged
    elif parallel == "fsdp2":
        # Trained weights, their gradients and moments are float32, as others are without an adapter; under one they keep their type.
        frozen_weights = parts["weights"] if "adapter" in parts else frozen * 4 / GIB
        parts = {"weights": share * (frozen_weights + trained * 4 / GIB)}
        parts |= {"gradients": share * trained * 4 / GIB, "optimizer": share * trained * 8 / GIB}
        # The block that is computed and the next one, and gradients of both before they are split
        at_once = 2 * count.largest_block * (1 if "adapter" in count.parts else 2)
        parts["gathered"] = (at_once + count.outside_blocks) * 2 / GIB
    else:
        is_split = parallel == "zero3"
        split_weights = share if is_split else 1.0
        parts = {"weights": split_weights * (frozen + trained) * 2 / GIB}
        parts |= {"gradients": share * trained * (2 + 4) / GIB}  # in bfloat16, and in float32 for the optimizer
        parts["optimizer"] = share * trained * (4 + 8) / GIB  # with the weights in float32
        parts["gathered"] = BUCKET * 2 / GIB  # a buffer of this size, however little is trained
        if is_split:
            parts["gathered"] += min(2 * BUCKET, count.num_parameters) * 2 / GIB
    parts["activations"] = activations
    return Count(parts, count.num_parameters, count.num_trained, count.largest_block, count.outside_blocks)


def with_split_denoiser(count: Count, denoisers: Sequence[str], num_gpus: int) -> Count:
    """The same for one of several GPUs that share the denoisers of a pipeline, which is loaded on the CPU."""
    parts = dict(count.parts)
    for name in {*denoisers, "adapter", "gradients", "optimizer"} & parts.keys():
        parts[name] /= num_gpus
    # The block that is computed and the next one, and their gradients if these are not an adapter's
    parts["gathered"] = 2 * count.largest_block * (2 if "adapter" in parts else 2 * 4) / GIB
    phases = {name: size for name, size in count.phases.items() if name != BEFORE}
    parts["activations"] = max(phases.values())
    return Count(parts, count.num_parameters, count.num_trained, count.largest_block, phases=phases)


def table(count: Count, title: str, num_gpus: int = 1) -> list[str]:
    """Lines of a table of parts, with the peak."""
    where = "on each GPU" if num_gpus > 1 else "on the GPU"
    total, trained = count.num_parameters / 1e9, count.num_trained / 1e6
    lines = [title, f"parameters: {total:.2f} billion" + f", {trained:.1f} million of them trained" * bool(trained)]
    width = max(map(len, [*count.parts, *count.phases])) + 4
    lines.append(f"{'GiB ' + where:{width}}")
    lines += [f"  {name:{width}}{value:8.2f}" for name, value in count.parts.items()]
    if len(count.phases) > 1:
        lines += [f"    {name:{width}}{value:6.2f}" for name, value in count.phases.items()]
    lines.append(f"  {'peak':{width}}{count.peak:8.2f}")
    card = count.smallest_card
    fits = f"a card of {card} GB" if card else f"no card of {CARDS[-1]} GB or less"
    lines.append(f"It fits on {fits}, with {1 - USABLE:.0%} left for kernels and what the allocator loses.")
    return lines


def advice(count: Count, task: str, args: Any, is_adapter: bool, parallel: str) -> list[str]:
    """The largest part, and what makes it smaller, most first."""
    is_judge = task != "tune"
    largest = max(count.parts, key=lambda name: count.parts[name])
    if task == "score":
        turns = ["--load_in_8bit true" if largest == "weights" else "a smaller --per_device_train_batch_size"]
        return [_largest(count, largest), *(f"  smaller: {turn}" for turn in turns)]
    turns = []
    if largest == "activations":
        if args.per_device_train_batch_size > 1:
            turns.append("a smaller --per_device_train_batch_size, with more --gradient_accumulation_steps")
        if not getattr(args, "activation_checkpointing", args.gradient_checkpointing):
            turns.append("--gradient_checkpointing true computes activations again in the backward pass")
        turns.append("smaller images, or fewer tokens of one (processor_kwargs)" if is_judge else "--vae_scale 0.5")
    if not is_adapter:
        turns.append("--use_peft trains an adapter: no gradients and moments of all weights")
    if is_judge and parallel in ("none", "ddp"):
        turns.append("--parallel fsdp2 with --num_gpus splits weights, gradients and optimizer over the GPUs")
    elif parallel == "zero2":
        turns.append("--parallel fsdp2 or zero3 splits the weights too")
    if parallel in ("fsdp2", "zero3"):
        turns.append("more GPUs")
    if is_judge and is_adapter and largest == "weights":
        turns.append("--load_in_4bit true holds the base in about a quarter")
    if not is_judge:
        if not args.precompute_prompts:
            turns.append("--precompute_prompts true: text encoders leave the GPU before the first update")
        if not args.offload:
            turns.append("--offload true: text encoders and judges are on the CPU while they are not in use")
        if not args.shard_denoiser:
            turns.append("--shard_denoiser true with --num_gpus splits the denoiser over the GPUs")
        turns.append("a judge on another device: --judge_device cuda:1, or --judge http://HOST:PORT")
    return [_largest(count, largest), *(f"  smaller: {turn}" for turn in turns)]


def _largest(count: Count, name: str) -> str:
    return f"The largest part: {name}, {count.parts[name]:.2f} GiB."
