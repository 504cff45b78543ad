"""
What `precompute_prompts` saves of an update of FLUX.1-dev: memory of the recipe, counted at full size, and time of a pipeline whose
classes, numbers of steps and shares of text encoders, tokens and pixels are those of FLUX.1-dev, at less width and depth.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_refl_memory import count
from transformers import PrinterCallback, TrainerCallback

from rewarddance_hf.memory.apart import run_apart


RECIPE = "refl_flux_dev"
# Of FLUX.1-dev: 3072 wide with 19 and 38 blocks; T5 4096 wide with 24 layers; 512 x 512 pixels and 256 tokens of text
WIDTH, BLOCKS, SINGLE_BLOCKS = 256, 4, 8
T5_LAYERS, CLIP_WIDTH, CLIP_LAYERS = 9, 64, 4
PIXELS, TEXT_TOKENS, STEPS = 256, 64, 20
UPDATES = 4


def reduced_flux(width: int) -> Any:
    """A pipeline with random weights."""
    import diffusers
    from tiny_refl import WORDS, tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=width // 4,
        num_attention_heads=4,
        joint_attention_dim=width,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=[width // 32, 7 * width // 64, 7 * width // 64],
    )
    clip = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        num_hidden_layers=CLIP_LAYERS,
        num_attention_heads=4,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=2,
    )
    t5 = T5Config(
        vocab_size=len(WORDS),
        d_model=width,
        d_kv=width // 4,
        d_ff=5 * width // 2,
        num_layers=T5_LAYERS,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    pipeline = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 32, 32),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=16,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer(),
    )
    pipeline.tokenizer_max_length = 77
    return pipeline


class Watch(TrainerCallback):
    """CPU seconds of updates, and of the encoding of prompts in the last one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.encoding = self.start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start, self.encoding = time.process_time(), 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.start)

    def around(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = encode(*args, **kwargs)
            self.encoding += time.process_time() - start
            return result

        return functools.wraps(encode)(encode_prompt)


def flux_reduced(
    width: int = WIDTH, pixels: int = PIXELS, tokens: int = TEXT_TOKENS, steps: int = STEPS, updates: int = UPDATES
) -> dict[str, float]:
    """CPU seconds of an update of one sample with prompts encoded in each and once before, and of the encoding; no judge."""
    from tiny_refl import lora, pixel_reward, rows

    from rewarddance_hf import ReFLTrainer, ReFLTrainingArguments

    def train(precomputes: bool, folder: str) -> Watch:
        pipeline, watch = reduced_flux(width), Watch()
        pipeline.encode_prompt = watch.around(pipeline.encode_prompt)
        arguments = ReFLTrainingArguments(
            folder,
            max_steps=updates,
            per_device_train_batch_size=1,
            num_inference_steps=steps,
            guidance_scale=3.5,
            step_ratio_range=[0.5, 1.0],
            pipeline_kwargs={"height": pixels, "width": pixels, "max_sequence_length": tokens},
            precompute_prompts=precomputes,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = ReFLTrainer(
            pipeline, pixel_reward, arguments, rows(), callbacks=[watch], peft_config=lora(r=32, lora_alpha=32)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watch

    with tempfile.TemporaryDirectory() as folder:
        each_time, once = train(False, folder), train(True, folder)
    parts = {name: getattr(reduced_flux(width), name) for name in ("transformer", "text_encoder_2")}
    sizes = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    seconds = [statistics.mean(watch.seconds) for watch in (each_time, once)]
    return {
        "each_time_seconds": seconds[0],
        "once_seconds": seconds[1],
        "encoding_seconds": each_time.encoding,
        "encoding_once_seconds": once.encoding,
        "encoding_share": each_time.encoding / seconds[0],
        "denoiser_parameters": sizes["transformer"],
        "t5_over_denoiser": sizes["text_encoder_2"] / sizes["transformer"],
    }


def flux_dev() -> dict[str, float]:
    """Gibibytes of the recipe before the first update and in one, by when prompts are encoded."""
    found = {}
    for name, value in {"each_time": "false", "once": "true"}.items():
        counted = run_apart(count, RECIPE, True, "--precompute_prompts", value)
        found |= {f"{name}_{part}_gib": counted[f"{part}_gib"] for part in ("before", "update")}
    return found


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """Time at a reduced size, and memory at full size if `is_full`."""
    return {"flux_reduced": flux_reduced} | ({"flux_dev": flux_dev} if is_full else {})
