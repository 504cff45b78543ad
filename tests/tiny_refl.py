"""Tiny pipelines with real text encoders, and a run of `ReFLTrainer` on one that other processes can start."""

import json
import os
import signal
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from peft import LoraConfig
from tiny_pipelines import LORA_TARGETS, flux, image_vae, noise, stable_diffusion, wan
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    TrainerCallback,
    UMT5Config,
    UMT5EncoderModel,
)

from rewarddance_hf.alignment.monitor.callback import RewardDynamicsCallback
from rewarddance_hf.alignment.refl.arguments import ReFLTrainingArguments
from rewarddance_hf.alignment.refl.references import best_of_n_references
from rewarddance_hf.alignment.refl.trainer import ReFLTrainer


WORDS = ["<pad>", "<unk>", "<end>", "a", "red", "blue", "green", "circle", "square", "two", "and"]
PROMPTS = ["a red circle", "a blue square", "two green circle", "a red square and a blue circle", "a green square"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=8
    )


def clip(model_class: type, width: int):
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        projection_dim=4,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=2,
    )
    return model_class(config).eval()


def tiny_sd3(seed: int = 0) -> diffusers.StableDiffusion3Pipeline:
    """Stable Diffusion 3 with 8 x 8 pixels."""
    torch.manual_seed(seed)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=8,
    )
    with torch.no_grad():  # zero at initialization
        transformer.proj_out.weight.normal_(0, 0.2)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=clip(CLIPTextModelWithProjection, 8),
        tokenizer=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 8),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def tiny_sd(seed: int = 0) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion, the pipeline with a UNet."""
    torch.manual_seed(seed)
    pipeline, _ = stable_diffusion()
    pipeline.register_modules(text_encoder=clip(CLIPTextModel, 8), tokenizer=tokenizer())
    return pipeline


def tiny_img2img(seed: int = 0) -> diffusers.StableDiffusionImg2ImgPipeline:
    """Stable Diffusion from an image."""
    components = tiny_sd(seed).components
    return diffusers.StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)


def tiny_wan(seed: int = 0) -> diffusers.WanPipeline:
    """Wan, the pipeline for clips."""
    torch.manual_seed(seed)
    pipeline, _ = wan()
    config = UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline.register_modules(text_encoder=UMT5EncoderModel(config).eval(), tokenizer=tokenizer())
    return pipeline


def tiny_wan_22() -> diffusers.WanPipeline:
    """Of four steps, `transformer` makes the first two, and `transformer_2` the others."""
    pipeline = tiny_wan()
    second = diffusers.WanTransformer3DModel.from_config(pipeline.transformer.config)
    pipeline.register_modules(transformer_2=second, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.register_to_config(boundary_ratio=0.8)
    return pipeline


def tiny_flux(seed: int = 0) -> diffusers.FluxPipeline:
    """Flux, whose guidance is an input of the denoiser."""
    torch.manual_seed(seed)
    pipeline, _ = flux()
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline.register_modules(
        text_encoder=clip(CLIPTextModel, 8),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(config).eval(),
        tokenizer_2=tokenizer(),
    )
    pipeline.tokenizer_max_length = 8  # known when it is made
    return pipeline


SIZES = {
    "FluxPipeline": {"height": 8, "width": 8, "max_sequence_length": 8},
    "StableDiffusion3Pipeline": {"height": 8, "width": 8, "max_sequence_length": 8},
    "StableDiffusionPipeline": {"height": 16, "width": 16},
    "StableDiffusionImg2ImgPipeline": {},
    "WanPipeline": {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 8},
}


def pixel_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """A fixed differentiable function of pixels and prompt between 0 and 1."""
    frames = images.reshape(-1, *images.shape[-3:])
    features = torch.nn.functional.conv2d(frames - 0.5, noise(11, 4, 3, 3, 3)).tanh().mean(dim=(1, 2, 3))
    lengths = torch.tensor([len(prompt) / 40 for prompt in prompts])
    return (4 * features.reshape(len(images), -1).mean(dim=1) + lengths).sigmoid()


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": LORA_TARGETS, **changes})


def rows(count: int = 5) -> list[dict]:
    return [{"prompt": PROMPTS[index % len(PROMPTS)]} for index in range(count)]


def make_trainer(output_dir, pipeline=None, reward=pixel_reward, train_dataset=None, peft_config="lora", **arguments):
    pipeline = pipeline or tiny_sd3()
    others = {name: arguments.pop(name) for name in ("eval_dataset", "callbacks") if name in arguments}
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "step_ratio_range": [0.25, 1.0],
        "pipeline_kwargs": SIZES.get(type(pipeline).__name__, {}),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ReFLTrainer(
        pipeline=pipeline,
        reward=reward,
        args=ReFLTrainingArguments(str(output_dir), **{**defaults, **arguments}),
        train_dataset=rows() if train_dataset is None else train_dataset,
        peft_config=lora() if peft_config == "lora" else peft_config,
        **others,
    )


def trained_weights(trainer: ReFLTrainer) -> dict[str, torch.Tensor]:
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


class KillBeforeUpdate(TrainerCallback):
    """End the process as the kernel would when memory runs out: nothing is cleaned up."""

    def __init__(self, update: int):
        self.update = update

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def brightness(images, prompts):
    """A reward of images that are not tensors."""
    return [float(np.asarray(image).mean()) for image in images]


def run(output_dir: str | Path, resume: str | None = None, callbacks: list | None = None, **settings) -> dict:
    """Train, evaluate, watch and draw references, and give all that may not depend on the number of processes."""
    watches = settings.pop("watches", False)
    results = {}
    callbacks = callbacks or []
    if watches:
        pipeline = tiny_sd3()
        pipeline.set_progress_bar_config(disable=True)
        size = SIZES[type(pipeline).__name__]
        folder = Path(output_dir) / "references"
        drawn = {"num_candidates": 2, "top_k": 1, "num_inference_steps": 2, "show_progress": False, **size}
        for place in (None, folder):
            references = best_of_n_references(pipeline, brightness, PROMPTS[:3], output_dir=place, **drawn)
            results[f"references in {'memory' if place is None else 'files'}"] = references.to_list()
        monitor = RewardDynamicsCallback(pixel_reward, PROMPTS[:3], eval_steps=1, plot=False)
        callbacks.append(monitor)
        settings["eval_dataset"] = rows(3)
    trainer = make_trainer(output_dir, callbacks=callbacks, **settings)
    trainer.train(resume_from_checkpoint=resume)
    if watches:
        results |= {"metrics": trainer.evaluate(), "history": monitor.dynamics.history}
    ema = trainer.ema.shadow_params if trainer.ema is not None else []
    return {"weights": trained_weights(trainer), "ema": ema, "rewards": trainer.last_rewards, **results}


def main(output_dir: str, settings: str) -> None:
    """Train in a process of its own and save what comes out."""
    torch.set_num_threads(1)
    settings = json.loads(settings)
    kill_at = settings.pop("kill_at", None)
    results = run(output_dir, callbacks=[KillBeforeUpdate(kill_at)] if kill_at else None, **settings)
    torch.save(results, Path(output_dir) / f"result-{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
