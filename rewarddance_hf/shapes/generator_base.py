"""
Train the tiny generator of the shapes world from scratch, on renderings of training prompts.

First the autoencoder learns to draw, then the denoiser and the text encoders learn to make images from noise and words, at
last from captions of which most are wrong, as those of the web are. What comes out has learned to draw what it is told, but
often does not, which is what a reward can mend. Before that last stage the oracle finds 72 % of its images right.
Run it with `make shapes-generator` (about 10 minutes of one core); the same seed gives the same weights on the same machine. The checkpoint
that ships was trained by these stages, one run each, with other seeds and the words' tokens in another order, so this does not
give its very weights: a full run ended at 36 % of images right, where the shipped one has 45 %.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .captions import parse_caption
from .drawing import GENERATOR_STYLE, render_scene
from .generated import ShapesPrompts
from .generator import BASE_GENERATOR, MAX_SEQUENCE_LENGTH, WIDTH, build_generator
from .preferences import break_scene


NUM_IMAGES = 16_000
AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_LR = 600, 32, 2e-3
# The decoder learns to draw from inexact latents, such as a denoiser leaves.
LATENT_NOISE = 0.15
L1_WEIGHT, LATENT_WEIGHT = 0.3, 5e-5

DENOISER_BATCH = 64


@dataclass(frozen=True)
class Stage:
    """
    One stage of the denoiser's training. Of the captions for more than one fact `wrong_share` are wrong, and of these
    `wrong_own_share` in number, binding, relation or size, the others in a color or shape.
    """

    steps: int
    learning_rate: float
    wrong_share: float = 0.0
    wrong_own_share: float = 0.0


DENOISER_STAGES = (Stage(1200, 3e-3, 0.5, 0.9), Stage(1200, 2e-3), Stage(400, 1.5e-3, 0.8, 0.2))
EMA_DECAY = 0.995
DROPPED_PROMPTS = 0.1
# Noise levels are the logistic of a normal variable, as for Stable Diffusion 3, with most of them high.
NOISE_MEAN, NOISE_STD = 0.8, 1.0
# In some steps, with less images, prompts are followed by as many zero vectors as a plain call of the pipeline adds.
LONG_EVERY, LONG_SEQUENCE_LENGTH, LONG_BATCH = 10, 256, 16


def train_generator(
    output_dir: str | Path = BASE_GENERATOR,
    seed: int = 0,
    num_images: int = NUM_IMAGES,
    autoencoder_steps: int = AUTOENCODER_STEPS,
    denoiser_stages: Sequence[Stage] = DENOISER_STAGES,
    width: int = WIDTH,
) -> None:
    """Train a generator from scratch and save it as a pipeline; `width` is that of its denoiser."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pipeline = build_generator(seed, width)
    images = render_prompts(num_images, seed)[1]
    train_autoencoder(pipeline.vae, images, autoencoder_steps)
    _normalize_latents(pipeline, images)
    torch.manual_seed(seed)
    for number, stage in enumerate(denoiser_stages):
        prompts, images = render_prompts(num_images, seed + number, stage.wrong_share, stage.wrong_own_share)
        latents = _encode_images(pipeline, images)
        _train_denoiser(pipeline, latents, prompts, stage.steps, stage.learning_rate)
    pipeline.save_pretrained(output_dir)


def render_prompts(
    num_images: int, seed: int = 0, wrong_share: float = 0.0, wrong_own_share: float = 0.0
) -> tuple[list[str], torch.Tensor]:
    """
    Training prompts, and images `(num_images, 3, height, width)` in [-1, 1] of them in the generator's style.

    Of the prompts for more than one fact, `wrong_share` have an image of something else, as in [`Stage`].
    """
    dataset = ShapesPrompts(num_images, seed=seed)
    prompts = [dataset[index]["prompt"] for index in range(num_images)]
    rng = random.Random(f"generator/{seed}")
    images = []
    for prompt in prompts:
        scene = parse_caption(prompt)
        if wrong_share and scene.kind != "single" and rng.random() < wrong_share:
            scene = break_scene(scene, rng, wrong_own_share)
        images.append(np.asarray(render_scene(scene, rng, GENERATOR_STYLE)))
    return prompts, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def train_autoencoder(vae: Any, images: torch.Tensor, steps: int, batch_size: int = AUTOENCODER_BATCH) -> None:
    """Train an autoencoder of diffusers to draw images, or clips, from their latents and a little noise."""
    vae.train()

    def compute_loss(step: int) -> torch.Tensor:
        batch = images[torch.randint(len(images), (batch_size,))]
        latents = vae.encode(batch).latent_dist.mode()
        drawn = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        loss = F.mse_loss(drawn, batch) + L1_WEIGHT * F.l1_loss(drawn, batch)
        return loss + LATENT_WEIGHT * latents.square().mean()

    _optimize(list(vae.parameters()), compute_loss, steps, AUTOENCODER_LR, "autoencoder")
    vae.eval()


@torch.no_grad()
def _normalize_latents(pipeline: StableDiffusion3Pipeline, images: torch.Tensor) -> None:
    """Note in the autoencoder's configuration which shift and scale give latents of mean 0 and variance 1."""
    pipeline.vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = _encode_images(pipeline, images)
    pipeline.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def _encode_images(pipeline: StableDiffusion3Pipeline, images: torch.Tensor) -> torch.Tensor:
    vae = pipeline.vae
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(250)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def _train_denoiser(
    pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, prompts: Sequence[str], steps: int, learning_rate: float
) -> None:
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)

    def compute_loss(step: int) -> torch.Tensor:
        long = step % LONG_EVERY == LONG_EVERY - 1
        batch_size = LONG_BATCH if long else DENOISER_BATCH
        picked = torch.randint(len(latents), (batch_size,))
        dropped = torch.rand(batch_size) < DROPPED_PROMPTS
        embeds, _, pooled_embeds, _ = pipeline.encode_prompt(
            ["" if drop else prompts[index] for index, drop in zip(picked, dropped, strict=True)],
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=LONG_SEQUENCE_LENGTH if long else MAX_SEQUENCE_LENGTH,
        )
        clean = latents[picked]
        noise = torch.randn_like(clean)
        sigmas = draw_sigmas(batch_size)
        mixed = torch.lerp(clean, noise, sigmas[:, None, None, None])
        timesteps = pipeline.scheduler.config.num_train_timesteps * sigmas
        velocity = pipeline.transformer(mixed, embeds, pooled_embeds, timesteps, return_dict=False)[0]
        return F.mse_loss(velocity, noise - clean)

    train_denoiser(modules, compute_loss, steps, learning_rate)


def draw_sigmas(batch_size: int) -> torch.Tensor:
    """Noise levels `(batch_size,)` between 0 and 1."""
    return torch.sigmoid(NOISE_MEAN + NOISE_STD * torch.randn(batch_size))


def train_denoiser(
    modules: Sequence[torch.nn.Module], compute_loss: Callable[[int], torch.Tensor], steps: int, learning_rate: float
) -> None:
    """Train a denoiser and its text encoders, and leave them with the moving average of their weights."""
    parameters = [parameter for module in modules for parameter in module.train().parameters()]
    average = EMAModel(parameters, decay=EMA_DECAY)
    _optimize(parameters, compute_loss, steps, learning_rate, "denoiser", lambda: average.step(parameters))
    average.copy_to(parameters)
    for module in modules:
        module.eval()


def _optimize(
    parameters: Sequence[torch.nn.Parameter],
    compute_loss: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    after_step: Callable[[], None] | None = None,
) -> None:
    """AdamW with a short warm-up and a linear decay in the second half."""
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    progress = tqdm(range(steps), desc=name, mininterval=10)
    for step in progress:
        factor = min(1.0, (step + 1) / 50, max(0.02, 2 * (1 - step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        loss = compute_loss(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=BASE_GENERATOR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=WIDTH, help="width of the denoiser, a multiple of 16")
    train_generator(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
