"""Memory and time of one ReFL step, and of DRaFT-K, against back-propagation through the whole sampler."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


STEPS = 10
ROUNDS = 5
# Names in the keys, pipelines of the tests, and images large enough for activations to outweigh all else
PIPELINES = {"sd": ("StableDiffusion", 64), "sd3": ("StableDiffusion3", 16), "flux": ("Flux", 32)}


def _saved_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Size of what autograd keeps for the backward pass, each storage once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = forward()
    total = sum(sizes.values())
    images.sum().backward()
    return total


def run() -> dict[str, float]:
    """
    Measure each way of getting gradient on three tiny pipelines, side by side in this process.

    Returns:
        `dict[str, float]`: Flat keys with the mebibytes and seconds of whole-sampler back-propagation, and ratios.
    """
    from tiny_pipelines import TinyPipeline

    from rewarddance_hf.alignment.gradient import RewardGradientCallback

    results = {}
    for key, (name, size) in PIPELINES.items():
        model = TinyPipeline(name)
        weights = [weight for part in (model.denoiser, model.pipeline.vae) for weight in part.parameters()]
        # The earliest step of the last quarter: the mean cost of a random one is a little more.
        step = int(STEPS * 0.75)
        ways = {
            "full_backprop": RewardGradientCallback(method="draft", num_gradient_steps=STEPS),
            "draft_3": RewardGradientCallback(method="draft", num_gradient_steps=3),
            "refl_step": RewardGradientCallback(step_index_range=(step, step + 1)),
            "refl_step_checkpointed_vae": RewardGradientCallback(
                step_index_range=(step, step + 1), vae_checkpointing=True
            ),
        }

        def images(callback, model=model, size=size) -> torch.Tensor:
            with callback.attach(model.pipeline):
                return model(num_inference_steps=STEPS, height=size, width=size)

        memory, seconds = {}, {way: [] for way in ways}
        for way, callback in ways.items():
            memory[way] = _saved_bytes(lambda callback=callback: images(callback), weights)
        for _ in range(ROUNDS):
            for way, callback in ways.items():
                start = time.perf_counter()
                images(callback).sum().backward()
                seconds[way].append(time.perf_counter() - start)
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        results[f"full_backprop/{key}/memory_mib"] = memory.pop("full_backprop") / 2**20
        results[f"full_backprop/{key}/seconds"] = full_seconds = medians.pop("full_backprop")
        for way in memory:
            full_memory = results[f"full_backprop/{key}/memory_mib"] * 2**20
            results[f"{way}/{key}/memory_over_full_backprop"] = memory[way] / full_memory
            results[f"{way}/{key}/time_over_full_backprop"] = medians[way] / full_seconds
    return results


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))  # the tiny models of the tests
    torch.set_num_threads(1)
    results = run()
    width = max(map(len, results))
    for key, value in results.items():
        sys.stdout.write(f"{key:{width}}  {value:10.3f}\n")


if __name__ == "__main__":
    main()
