# /// script
# dependencies = [
#     "rewarddance_hf[diffusers]",
# ]
# ///
"""
Carry the gradient of a reward through an unmodified pipeline to a LoRA adapter.

    python examples/reward_gradient.py
    python examples/reward_gradient.py --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \\
        --judge OpenGVLab/InternVL3_5-2B-HF

Without arguments, a tiny Stable Diffusion 3 with random weights and the tiny base model of the demo stand in for real
ones; they need no download and run in seconds on a CPU.
"""

import argparse

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceScorer, RewardGradientCallback


def main(pipeline: DiffusionPipeline, scorer: RewardDanceScorer, prompt: str, inputs: dict) -> None:
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False)
    pipeline.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [parameter for parameter in pipeline.transformer.parameters() if parameter.requires_grad]

    callback = RewardGradientCallback(method="refl", step_ratio_range=(0.5, 1.0), vae_checkpointing=True)
    images = pipeline(
        **inputs,
        num_inference_steps=8,
        output_type="pt",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=callback.tensor_inputs,
    ).images
    rewards = scorer(images, prompt)
    (-rewards.mean()).backward()

    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    print(f"step {callback.last_step} of 8, reward {rewards.mean():.4f}, gradient norm of the adapter {norm:.2e}")


def load_judge(name: str | None, device: str = "cpu") -> RewardDanceScorer:
    if name is not None:
        return RewardDanceScorer.from_pretrained(name, paradigm="pointwise", device_map=device)
    from rewarddance_hf.shapes.models import BASE_VLM, judge_processor

    model = RewardDanceForYesScoring.from_pretrained(BASE_VLM, paradigm="pointwise").to(device)
    return RewardDanceScorer(model.requires_grad_(False), judge_processor())


def tiny_pipeline() -> DiffusionPipeline:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=16,
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=2, shift_factor=0.06)
    no_text = dict.fromkeys(
        ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
    )
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), **no_text
    )


def tiny_inputs() -> dict:
    """Random embeddings, as there is no text encoder."""
    embeds = {"prompt_embeds": torch.randn(2, 7, 32), "pooled_prompt_embeds": torch.randn(2, 16)}
    negative = {f"negative_{name}": torch.zeros_like(value) for name, value in embeds.items()}
    return {**embeds, **negative, "height": 16, "width": 16}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", help="Stable Diffusion 3, Flux, or another transformer.")
    parser.add_argument("--judge", help="Pointwise judge, or a plain vision-language model as a zero-shot judge.")
    parser.add_argument("--prompt", default="a red circle")
    args = parser.parse_args()
    if args.pretrained_model_name_or_path:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, torch_dtype=torch.bfloat16)
        main(pipeline.to(device), load_judge(args.judge, device), args.prompt, {"prompt": args.prompt})
    else:
        main(tiny_pipeline(), load_judge(args.judge), args.prompt, tiny_inputs())
