"""
Train the tiny generator of clips from scratch, text-to-video and image-to-video in turn: first its autoencoder, then the denoiser from
right captions, at last from captions of which most are wrong, so that a reward has something to mend.

    make shapes-clip-generator    # about half an hour of one core; the same seed gives the same weights on the same machine

Before the last stage the oracle finds 49 % of the clips right that are drawn from text, and 64 % of those that go on from a given
frame, and after it 23 and 33 %. It never learns which way "turns left" is: positions are only relative for its denoiser.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .clip_generator import FRAME_RATE, PROMPT_TOKENS, build_clip_generator
from .clips import CATEGORY_SHARES, NUM_FRAMES
from .generated_clips import draw_clip, plan_prompt
from .generator_base import DROPPED_PROMPTS, Stage, draw_sigmas, train_autoencoder, train_denoiser


TASKS = tuple(CATEGORY_SHARES)
NUM_CLIPS = 12_000
AUTOENCODER_STEPS, AUTOENCODER_BATCH = 4000, 16
DENOISER_BATCH = 40
DENOISER_STAGES = (Stage(2600, 2e-3), Stage(3000, 2e-3), Stage(400, 1e-3, 0.8))


def train_clip_generator(
    output_dir: str | Path,
    seed: int = 0,
    num_clips: int = NUM_CLIPS,
    autoencoder_steps: int = AUTOENCODER_STEPS,
    denoiser_stages: Sequence[Stage] = DENOISER_STAGES,
) -> None:
    """Train a generator of clips from scratch and save it as a text-to-video pipeline."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pipeline: Any = build_clip_generator(seed)
    clips = draw_clips(num_clips, seed)[2]
    train_autoencoder(pipeline.vae, clips, autoencoder_steps, AUTOENCODER_BATCH)
    _measure_latents(pipeline, clips)
    torch.manual_seed(seed)
    for number, stage in enumerate(denoiser_stages):
        tasks, prompts, clips = draw_clips(num_clips, seed + number, stage.wrong_share)
        latents = _encode_clips(pipeline, clips)
        _train_denoiser(pipeline, latents, tasks, prompts, stage)
    pipeline.save_pretrained(output_dir)


def draw_clips(num_clips: int, seed: int = 0, wrong_share: float = 0.0) -> tuple[list[str], list[str], torch.Tensor]:
    """
    Tasks, training prompts, and clips `(num_clips, 3, num_frames, height, width)` in [-1, 1] of them, of which `wrong_share` show
    something else.
    """
    rng = random.Random(f"clip generator/{seed}")
    tasks, prompts = [], []
    clips: list[np.ndarray] = []
    for index in range(num_clips):
        tasks.append(TASKS[index % len(TASKS)])
        _, prompt, right, wrong = plan_prompt(rng, tasks[-1], "train")
        prompts.append(prompt)
        frames = draw_clip(wrong if rng.random() < wrong_share else right, rng)
        clips.append(np.stack([np.asarray(frame) for frame in frames]))
    return tasks, prompts, torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) / 127.5 - 1


@torch.no_grad()
def _encode_clips(pipeline: Any, clips: torch.Tensor) -> torch.Tensor:
    vae = pipeline.vae
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in clips.split(250)])
    return pipeline._normalize_latents(latents, vae.latents_mean, vae.latents_std)


@torch.no_grad()
def _measure_latents(pipeline: Any, clips: torch.Tensor) -> None:
    """Note in the autoencoder which means and deviations its latents have."""
    latents = _encode_clips(pipeline, clips)  # as they are, until then
    pipeline.vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
    pipeline.vae.latents_std.copy_(latents.std((0, 2, 3, 4)))


def _train_denoiser(
    pipeline: Any, latents: torch.Tensor, tasks: Sequence[str], prompts: Sequence[str], stage: Stage
) -> None:
    of_task = [torch.tensor([index for index, task in enumerate(tasks) if task == name]) for name in TASKS]
    height, width = latents.shape[-2:]
    ratio = pipeline.vae_spatial_compression_ratio
    positions = {
        "num_frames": NUM_FRAMES,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (1 / FRAME_RATE, ratio, ratio),
    }

    def compute_loss(step: int) -> torch.Tensor:
        number = step % len(TASKS)
        picked = of_task[number][torch.randint(len(of_task[number]), (DENOISER_BATCH,))]
        dropped = torch.rand(DENOISER_BATCH) < DROPPED_PROMPTS
        embeds, mask, _, _ = pipeline.encode_prompt(
            ["" if drop else prompts[index] for index, drop in zip(picked, dropped, strict=True)],
            do_classifier_free_guidance=False,
            max_sequence_length=PROMPT_TOKENS,
        )
        clean = pipeline._pack_latents(latents[picked])
        noise = torch.randn_like(clean)
        sigmas = draw_sigmas(DENOISER_BATCH)[:, None].expand(clean.shape[:2]).clone()
        given = height * width if TASKS[number] == "image-to-video" else 0  # tokens of the given first frame
        sigmas[:, :given] = 0.0
        mixed = torch.lerp(clean, noise, sigmas[..., None])
        timesteps = pipeline.scheduler.config.num_train_timesteps * sigmas
        velocity = pipeline.transformer(
            mixed,
            embeds,
            timesteps if given else timesteps[:, 0],
            mask,
            return_dict=False,
            **positions,
        )[0]
        return F.mse_loss(velocity[:, given:], (noise - clean)[:, given:])

    modules = (pipeline.transformer, pipeline.text_encoder)
    train_denoiser(modules, compute_loss, stage.steps, stage.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/shapes_clip_generator"))
    parser.add_argument("--seed", type=int, default=0)
    train_clip_generator(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
