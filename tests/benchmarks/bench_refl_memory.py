"""
Memory of the example configurations that tune large generators, counted: the real script, models and trainer at full size,
on a device that gives large tensors no values (`second_device`).

Counted are bytes of tensors: weights, optimizer, gradients, and what a step keeps. Workspaces of kernels and what an
allocator loses between blocks come on top on a GPU, a few percent as a rule.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch


ROOT = Path(__file__).parents[2]
CONFIGS = ("refl_sd35", "refl_flux_dev", "refl_qwen_image", "refl_wan_t2v")
LARGEST = 2**18  # elements of the largest tensor of floats that has values
GIB = 2**30
# Memory does not depend on these numbers.
FEW = {
    "num_prompts": 4,
    "num_candidates": 2,
    "num_inference_steps": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "sample_steps": 0,
    "warmup_steps": 0,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": "true",  # the device is chosen below
    "disable_tqdm": "true",
}
JUDGE = {
    "text_config": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "image_size": 448,
        "patch_size": 14,
    },
}
VAE_16_CHANNELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def tokenizer(length: int) -> Any:
    from tiny_refl import tokenizer as make

    words = make()
    words.model_max_length = length
    return words


def clip(model_class: type, large: bool = False) -> Any:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if large:
        sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return model_class(CLIPTextConfig(projection_dim=sizes["hidden_size"], eos_token_id=2, **sizes))


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))


def stable_diffusion_35_medium() -> Any:
    import diffusers
    from transformers import CLIPTextModelWithProjection

    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(**VAE_16_CHANNELS, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(CLIPTextModelWithProjection, large=True),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(512),
    )


def flux_dev() -> Any:
    import diffusers
    from transformers import CLIPTextModel

    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(guidance_embeds=True),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=diffusers.AutoencoderKL(**VAE_16_CHANNELS, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(CLIPTextModel),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
    )


def qwen_image() -> Any:
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(1024),
    )


def wan_1_3b() -> Any:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderKLWan(),
        text_encoder=UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes)),
        tokenizer=tokenizer(512),
    )


PIPELINES = dict(zip(CONFIGS, (stable_diffusion_35_medium, flux_dev, qwen_image, wan_1_3b), strict=True))


def judge(text_config: dict[str, Any] = JUDGE["text_config"]) -> Any:
    """Judge of the proportions of InternVL3.5-2B, or of another language model, with a tokenizer of few words."""
    import tiny_vlms
    import transformers

    from rewarddance_hf import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor

    _, tiny = tiny_vlms.internvl()
    vlm_config = transformers.InternVLConfig(
        text_config={**tiny_vlms._text_ids(tiny.tokenizer), **text_config},
        vision_config={"model_type": "internvl_vision", **JUDGE["vision_config"]},
        image_token_id=tiny.tokenizer.context_image_token_id,
        image_seq_length=256,
        tie_word_embeddings=text_config["tie_word_embeddings"],
    )
    processor = RewardDanceProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": 448, "width": 448}, crop_to_patches=False
        ),
        tokenizer=tiny.tokenizer,
        chat_template=tiny.chat_template,
        vlm_processor_class="InternVLProcessor",
        vlm_processor_kwargs={"image_seq_length": 256},
        vlm_images_kwargs={"crop_to_patches": False},
    )
    config = RewardDanceConfig(
        vlm_config=vlm_config, yes_token_id=processor.yes_token_id, no_token_id=processor.no_token_id
    )
    return RewardDanceForYesScoring(config).requires_grad_(False).eval(), processor


class Elsewhere:
    """Stands for a judge on another device: samples go to it, and their gradient comes back."""

    is_pairwise = False

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.cpu().float().flatten(1).mean(1)


@contextlib.contextmanager
def created_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make models there and of this type at once, as `from_pretrained` does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def count(name: str, *arguments: str) -> dict[str, float]:
    """
    Run a configuration of `examples/configs` with the example's own code.

    Args:
        name (`str`):
            Name of the configuration.
        arguments (`str`):
            Further arguments of the script.

    Returns:
        `dict[str, float]`: Gibibytes of the weights, and the peak while references are made and in an update.
    """
    from datasets import Dataset
    from second_device import memory, register
    from second_device_cases import trainers_on

    from rewarddance_hf import RewardDanceScorer
    from rewarddance_hf.scripts import tune

    device = register(largest=LARGEST)
    settings = {**FEW, "output_dir": tempfile.mkdtemp(), "judge": "judge"}
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    config = ROOT / "examples" / "configs" / f"{name}.yaml"
    results: dict[str, float] = {}

    def load_pipeline(model_args: Any, run_device: Any) -> Any:
        with created_on(device, torch.bfloat16):
            pipeline = PIPELINES[name]()
        results["generator_weights"] = memory.now / GIB
        return pipeline

    def load_judge(name: str, script_args: Any, run_device: Any) -> Any:
        if name == "elsewhere":
            return Elsewhere()
        with created_on(device, torch.bfloat16):
            model, processor = judge()
        results["judge_weights"] = memory.now / GIB - results["generator_weights"]
        return RewardDanceScorer(model, processor)

    def load_prompts(*_: Any) -> Dataset:
        return Dataset.from_list([{"prompt": f"a red circle {index}"} for index in range(FEW["num_prompts"])])

    def add_references(*args: Any) -> Any:
        memory.peak = memory.now
        rows = make_references(*args)
        results["references_peak"] = memory.peak / GIB
        memory.peak = memory.now
        return rows

    make_references = tune.add_references
    changes = {
        "load_pipeline": load_pipeline,
        "load_judge": load_judge,
        "load_prompts": load_prompts,
        "add_references": add_references,
    }
    with mock.patch.multiple(tune, **changes), trainers_on(device):
        parser = tune.make_parser()
        tune.main(*parser.parse_args_and_config(["--config", str(config), *flags, *arguments]))
    results["update_peak"] = memory.peak / GIB
    return results


def count_apart(name: str, *arguments: str) -> dict[str, float]:
    """The same in a process of its own: the device that counts stays with its process."""
    command = [sys.executable, __file__, name, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {f"{part}_gib": value for part, value in json.loads(output.splitlines()[-1]).items()}


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """All configurations, with the judge beside the generator and on another device."""
    return {
        f"{name}{suffix}": partial(count_apart, name, *arguments)
        for name in CONFIGS
        for suffix, arguments in (("", []), ("/judge_elsewhere", ["--judge", "elsewhere"]))
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    torch.set_num_threads(1)
    sys.stdout.write("\n" + json.dumps(count(*sys.argv[1:])) + "\n")
