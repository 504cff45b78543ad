"""Questions about an image for tiny architectures that no processor is built for: tensors, by the names that a model takes."""

import inspect
from collections.abc import Iterator

import torch


ROWS = [(3, 6), (5, 11)]  # words before and after the image
FIRST_WORD = 200
PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "token_type_ids",
    "cross_attention_mask",
    "image_attention_mask",
    "image_embeds_position_mask",
)
IMAGE_TOKENS = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")


class NoInputsError(Exception):
    """No way was found to show an image to a model."""


def question(model, rows, image_seed: int = 0) -> dict[str, torch.Tensor]:
    """Batch of some of `ROWS`, padded on the left, each with one image of its own."""
    per_row = [_row(model, row, image_seed + row) for row in rows]
    length = max(inputs["input_ids"].shape[1] for inputs in per_row)
    batch = {}
    for name in per_row[0]:
        parts = [inputs[name] for inputs in per_row]
        if name in PER_TOKEN:
            parts = [
                torch.cat([part.new_zeros(1, length - part.shape[1], *part.shape[2:]), part], 1) for part in parts
            ]
        batch[name] = torch.cat(parts, -1 if name == "pixel_values" and "target_sizes" in per_row[0] else 0)
    return batch


def _row(model, row: int, seed: int) -> dict[str, torch.Tensor]:
    before, after = ROWS[row]
    words = torch.randint(FIRST_WORD, FIRST_WORD + 80, (before + after,), generator=torch.Generator().manual_seed(row))
    images, count = image_inputs(model, seed)
    accepted = inspect.signature(model.forward).parameters
    image_token = next(
        (getattr(model.config, name) for name in IMAGE_TOKENS if getattr(model.config, name, None) is not None), 3
    )
    start, end = (
        [token] if isinstance(token := getattr(model.config, f"vision_{edge}_token_id", None), int) else []
        for edge in ("start", "end")
    )
    ids = [*words[:before].tolist(), *start, *[image_token] * count, *end, *words[before:].tolist()]
    input_ids = torch.tensor([ids])
    is_image = (input_ids == image_token).long() if count else torch.zeros_like(input_ids)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask"):
        if name in accepted:
            inputs[name] = is_image
    if "image_attention_mask" in accepted:  # all words see the image
        inputs["image_attention_mask"] = torch.ones(1, len(ids), 1, dtype=torch.long)
    if "cross_attention_mask" in accepted:  # one image of one tile of four
        inputs["cross_attention_mask"] = torch.tensor([1, 0, 0, 0]).expand(1, len(ids), 1, 4)
    return inputs


def image_inputs(model, seed: int) -> tuple[dict[str, torch.Tensor], int]:
    """Tensors of one image in the first form that the model can encode, and the number of its tokens."""
    names = ("get_video_features",) if model.config.model_type == "instructblipvideo" else ("get_image_features",)
    encode = next(
        (getattr(part, name) for name in names for part in (model, model.base_model) if hasattr(part, name)), None
    )
    accepted = inspect.signature(model.forward).parameters
    errors = []
    for images in _forms(model, torch.Generator().manual_seed(seed)):
        if not set(images) <= set(accepted):
            continue
        if encode is None:  # seen through cross-attention, or put before the text
            return images, getattr(model.config, "latent_query_num", 0)
        try:
            with torch.no_grad():
                features = encode(**images)
        except Exception as error:
            errors.append(f"{ ({name: tuple(value.shape) for name, value in images.items()}) }: {error!r}"[:200])
            continue
        return images, _count(features)
    raise NoInputsError("; ".join(errors) or f"takes {sorted(accepted)}")


def _count(features) -> int:
    pooled = features
    for name in ("last_hidden_state", "deepstack_features", "pooler_output"):
        pooled = getattr(features, name, None) if getattr(features, name, None) is not None else pooled
    if getattr(features, "deepstack_features", None) is not None and pooled is features.deepstack_features:
        pooled = pooled[0][1]  # Granite: what is added at the first of several layers
    if isinstance(pooled, (list, tuple)):
        return sum(_count(part) for part in pooled)
    return pooled.numel() // pooled.shape[-1]


def _forms(model, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """Ways to write an image down, the ones that say most first."""
    vision = next(
        (
            part
            for name in (
                "vision_config",
                "vq_config",
                "visual_config",
                "vit_config",
                "image_config",
                "low_res_vision_config",
            )
            if (part := getattr(model.config, name, None)) is not None
        ),
        model.config,
    )

    def noise(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    patch = getattr(vision, "patch_size", None) or 8
    patch = patch if isinstance(patch, int) else patch[0]
    side = getattr(vision, "image_size", None) or 4 * patch
    side = side if isinstance(side, int) else side[0]
    square = noise(1, 3, side, side)
    sizes = torch.tensor([[side, side]])
    merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
    merge = merge if isinstance(merge, int) else merge[0]
    for times in (getattr(vision, "temporal_patch_size", None) or 1, 2, 1):
        across = 2 * merge
        grid = torch.tensor([[1, across, across]])
        patches = noise(across**2, 3 * times * patch**2)
        for flat in (patches, patches.view(across**2, 3 * times, patch, patch)):
            yield {"pixel_values": flat, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([merge])}
            yield {"pixel_values": flat, "image_grid_thw": grid}
            yield {"pixel_values": flat, "image_grid_hw": grid[:, 1:]}
    tokens = noise(1, 16, 3 * patch**2)
    cells = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
    yield {
        "pixel_values": tokens,
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16).long(),
    }
    yield {"pixel_values": (tokens + 1) / 2, "image_position_ids": cells}
    row_of_patches = noise(1, 3, patch, 16 * patch)
    yield {"pixel_values": row_of_patches, "target_sizes": torch.tensor([[4, 4]])}
    yield {
        "pixel_values": square,
        "pixel_values_local": noise(0, 3, side, side),
        "num_local_patches": torch.tensor([0]),
    }
    yield {
        "pixel_values": square[None, None] * torch.tensor([1, 0, 0, 0]).view(1, 1, 4, 1, 1, 1),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
    }
    yield {"pixel_values": square[None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    yield {"pixel_values": square[None], "image_attention_mask": torch.ones(1, 1, 1, dtype=torch.long)}
    yield {
        "pixel_values": tokens,
        "image_token_pooling": torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }
    flattened = noise(1, 16, getattr(vision, "patch_embed_hidden_size", 1))
    yield {
        "flattened_patches": torch.cat([cells.flip(-1) + 1, flattened], -1),
        "width": torch.tensor([4]),
        "height": torch.tensor([4]),
    }
    yield {"pixel_values": square[None], "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.long)}
    yield {"pixel_values": square, "high_res_pixel_values": noise(1, 3, side, side)}
    words = torch.tensor([[FIRST_WORD, FIRST_WORD + 1]])
    for shown in (square, square[:, None].expand(-1, 4, -1, -1, -1)):
        yield {"pixel_values": shown, "qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
    yield {"pixel_values": noise(4, patch * merge, patch * merge, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    yield {"pixel_values": noise(1, 2, 3, side, side), "image_sizes": sizes}
    yield {"pixel_values": square, "image_sizes": sizes}
    yield {"pixel_values": square}
    yield {"pixel_values": tokens}
