"""Memory of the VAE's decoder while gradient goes through it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DecoderOutput
from torch.utils.checkpoint import checkpoint


def decode_in_parts(
    decode: Callable[..., Any], checkpointing: bool, slicing: bool, scale: float
) -> Callable[..., Any]:
    """
    Change a VAE's `decode` so that it needs less memory: with activations computed again in the backward pass, image by image,
    or of latents whose width and height are shrunk by `scale`.
    """

    def wrapper(z: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        slices = _shrink(z, scale).split(1) if slicing else (_shrink(z, scale),)
        images = []
        for index, latents in enumerate(slices):
            # Tensors with one entry for each image, such as the timestep of some video VAEs
            arguments = [
                value[index : index + 1] if len(slices) > 1 and isinstance(value, torch.Tensor) else value
                for value in args
            ]
            if checkpointing:
                output = checkpoint(decode, latents, *arguments, return_dict=False, use_reentrant=False, **kwargs)
            else:
                output = decode(latents, *arguments, return_dict=False, **kwargs)
            images.append(output[0])
        sample = torch.cat(images)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    return wrapper


def _shrink(latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Average latents over space, `(batch_size, channels, [num_frames,] height, width)`."""
    if scale == 1.0:
        return latents
    height, width = (max(1, round(size * scale)) for size in latents.shape[-2:])
    frames = latents.reshape(latents.shape[0], -1, *latents.shape[-2:])
    return F.interpolate(frames, size=(height, width), mode="area").reshape(*latents.shape[:-2], height, width)
