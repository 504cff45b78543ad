"""Tiny pipelines that edit a source image, with real text encoders."""

import contextlib
import importlib
from collections.abc import Iterator

import diffusers
import tiny_refl
import torch
from tiny_pipelines import qwen_image
from tiny_vlms import FAMILIES
from transformers import Qwen2_5_VLForConditionalGeneration


EDIT_STEPS = 4


def flux_kontext(seed: int = 0) -> diffusers.FluxKontextPipeline:
    """Flux with the tokens of the source image beside those of the result."""
    components = tiny_refl.tiny_flux(seed).components
    pipeline = diffusers.FluxKontextPipeline(**components)
    pipeline.tokenizer_max_length = 8
    return pipeline


def instruct_pix2pix(seed: int = 0) -> diffusers.StableDiffusionInstructPix2PixPipeline:
    """Stable Diffusion with the channels of the source image beside those of the result, and guidance by both."""
    components = tiny_refl.tiny_sd(seed).components
    torch.manual_seed(seed)
    components["unet"] = diffusers.UNet2DConditionModel.from_config(components["unet"].config, in_channels=8)
    components["scheduler"] = diffusers.DDIMScheduler.from_config(components["scheduler"].config)
    return diffusers.StableDiffusionInstructPix2PixPipeline(**components, requires_safety_checker=False)


def sd3_img2img(seed: int = 0) -> diffusers.StableDiffusion3Img2ImgPipeline:
    """Stable Diffusion 3 from the noised source image: a weak editor."""
    return diffusers.StableDiffusion3Img2ImgPipeline(**tiny_refl.tiny_sd3(seed).components)


def _qwen(pipeline_class: type) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    config, processor = FAMILIES["qwen2_5_vl"]()
    components = qwen_image()[0].components
    width = config.text_config.hidden_size
    components["transformer"] = diffusers.QwenImageTransformer2DModel.from_config(
        components["transformer"].config, joint_attention_dim=width
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    components |= {"text_encoder": encoder, "tokenizer": processor.tokenizer, "processor": processor}
    return pipeline_class(**components)


def qwen_image_edit() -> diffusers.QwenImageEditPipeline:
    """Qwen-Image with the source image beside the result, and before the eyes of its text encoder."""
    return _qwen(diffusers.QwenImageEditPipeline)


def qwen_image_edit_plus() -> diffusers.QwenImageEditPlusPipeline:
    """The same for several source images."""
    return _qwen(diffusers.QwenImageEditPlusPipeline)


@contextlib.contextmanager
def small_sources() -> Iterator[None]:
    """Qwen-Image-Edit brings source images to a million pixels; here to a few hundred."""
    names = ("pipeline_qwenimage_edit", "pipeline_qwenimage_edit_plus")
    modules = [importlib.import_module(f"diffusers.pipelines.qwenimage.{name}") for name in names]
    before = [module.calculate_dimensions for module in modules]
    for module, whole in zip(modules, before, strict=True):
        module.calculate_dimensions = lambda area, ratio, whole=whole: [
            None if side is None else max(side // 32, 16) for side in whole(area, ratio)
        ]
    try:
        yield
    finally:
        for module, whole in zip(modules, before, strict=True):
            module.calculate_dimensions = whole


EDITORS = {
    "flux_kontext": flux_kontext,
    "instruct_pix2pix": instruct_pix2pix,
    "sd3_img2img": sd3_img2img,
    "qwen_image_edit": qwen_image_edit,
    "qwen_image_edit_plus": qwen_image_edit_plus,
}
# Arguments of their calls. Kontext knows the sizes that it was trained on, which are a million pixels.
CALLS = {
    "flux_kontext": {"height": 8, "width": 8, "max_area": 64, "_auto_resize": False, "max_sequence_length": 8},
    "instruct_pix2pix": {"image_guidance_scale": 1.5},
    "sd3_img2img": {"strength": 0.75, "max_sequence_length": 8},
    "qwen_image_edit": {"height": 16, "width": 16, "true_cfg_scale": 2.0, "negative_prompt": "a"},
    "qwen_image_edit_plus": {"height": 16, "width": 16},
}
