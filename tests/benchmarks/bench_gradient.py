"""Memory and time of one ReFL step, and of DRaFT-K, against back-propagation through the whole sampler, on tiny pipelines."""

from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved


STEPS = 10
ROUNDS = 5
# Names in the keys, pipelines of the tests, and images large enough for activations to outweigh all else
PIPELINES = {"sd": ("StableDiffusion", 64), "sd3": ("StableDiffusion3", 16), "flux": ("Flux", 32)}


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
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


def pipeline(name: str, size: int) -> dict[str, float]:
    """Mebibytes and seconds of whole-sampler back-propagation, and the ratios of the other ways to it."""
    from tiny_pipelines import TinyPipeline

    from rewarddance_hf.alignment.gradient import RewardGradientCallback

    model = TinyPipeline(name)
    weights = [weight for part in (model.denoiser, model.pipeline.vae) for weight in part.parameters()]
    # The earliest step of the last quarter: the mean cost of a random one is a little more.
    step = int(STEPS * 0.75)
    steps = {"step_index_range": (step, step + 1)}
    ways = {
        "full_backprop": RewardGradientCallback(method="draft", num_gradient_steps=STEPS),
        "draft_3": RewardGradientCallback(method="draft", num_gradient_steps=3),
        "refl_step": RewardGradientCallback(**steps),
        "refl_step_checkpointed_vae": RewardGradientCallback(**steps, vae_checkpointing=True),
    }

    def images(callback: Any) -> torch.Tensor:
        with callback.attach(model.pipeline):
            return model(num_inference_steps=STEPS, height=size, width=size)

    memory = {way: saved_bytes(lambda callback=callback: images(callback), weights) for way, callback in ways.items()}
    _, seconds = interleaved(
        {way: (lambda callback=callback: images(callback).sum().backward()) for way, callback in ways.items()}, ROUNDS
    )
    results = {
        "full_backprop_memory_mib": memory["full_backprop"] / 2**20,
        "full_backprop_seconds": seconds["full_backprop"],
    }
    for way in list(ways)[1:]:
        results[f"{way}_memory_over_full_backprop"] = memory[way] / memory["full_backprop"]
        results[f"{way}_time_over_full_backprop"] = seconds[way] / seconds["full_backprop"]
    return results


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """One measurement for each pipeline."""
    return {key: (lambda arguments=arguments: pipeline(*arguments)) for key, arguments in PIPELINES.items()}
