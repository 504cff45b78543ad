"""
Whether the engine answers as the plain path does, tried out on a small copy of a model: the same classes, settings, vocabulary
and images, few and narrow layers with random weights, in float32 on the CPU.

What depends on lengths (windows, chunks, the length that rotary embeddings were trained for) is half as long as a question in
the copy: a model that is equal only up to some length does not pass, and through several layers an answer still depends on all of
its question.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ...models import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor
from ...models.question_rewarddance import Question


if TYPE_CHECKING:
    from .engine import ScoringEngine


HEADS = ("num_attention_heads", "num_heads", "attention_heads")
WIDTHS = ("hidden_size", "embed_dim", "d_model")
DEPTHS = ("num_hidden_layers", "depth", "num_layers")
WIDE = re.compile(r"\w*intermediate_size|\w*ffn_dim|mlp_dim|\w*ffn_hidden_size")
EXPERTS = re.compile(r"num_(local_)?experts|n_routed_experts|moe_num_experts")
LENGTHS = re.compile(
    r"\w*window(_size)?|attention_chunk_size|original_max_position_embeddings|floor_scale|\w*topk_tokens|index_topk"
)
LAYERS = 6  # so that an answer depends on all of a question through windows of half its length
TOLERANCE = 1e-5
# Log-odds differ by more if only the prompt or the reference does, or equality would mean nothing.
MARGIN = 1e-4
# Rotary embeddings that change with the length of a whole question, which a part of it does not know
DENIED_ROPE = ("dynamic", "longrope")
_known: dict[str, str | None] = {}


def difference_from_plain_path(
    make_engine: Callable[..., "ScoringEngine"], model: RewardDanceForYesScoring, processor: RewardDanceProcessor
) -> str | None:
    """Why the engine is not known to give the scores of the plain path, or None. Tried out once for each configuration."""
    config = model.config.vlm_config
    rope = _rope_types(config.to_dict())
    if rope & set(DENIED_ROPE):
        return f"its rotary embeddings ({', '.join(sorted(rope))}) depend on the length of a question"
    key = json.dumps([config.to_dict(), processor.to_dict()], sort_keys=True, default=str)
    if key not in _known:
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # what a copy warns of is not about the model
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                _known[key] = _try_out(make_engine, small_copy(model, processor), processor)
        except Exception as error:  # whatever a model that nobody has tried may raise
            _known[key] = f"the engine cannot be tried out on it ({type(error).__name__}: {str(error)[:200]})"
        finally:
            logging.set_verbosity(level)
    return _known[key]


def small_copy(model: RewardDanceForYesScoring, processor: RewardDanceProcessor) -> RewardDanceForYesScoring:
    """Random judge of the same classes, few and narrow layers."""
    config = model.config.vlm_config
    question = _questions(model.config.uses_reference)[:1]
    settings = _shrink(config.to_dict(), processor.encode(question)["input_ids"].shape[1] // 2)
    text = settings.get("text_config") or settings
    width = next(text[name] for name in WIDTHS if name in text)
    for part in settings.values():
        if isinstance(part, dict) and "out_hidden_size" in part:
            part["out_hidden_size"] = width
    settings.pop("dtype", None)
    own: dict[str, Any] = {"yes_token_id": processor.yes_token_id, "no_token_id": processor.no_token_id}
    torch.manual_seed(0)
    copy = RewardDanceForYesScoring(RewardDanceConfig(vlm_config=type(config).from_dict(settings), **own))
    for name, parameter in copy.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.data.mul_(3)  # or answers would hardly depend on images
    attention = model.config.get_text_config()._attn_implementation
    copy.config.get_text_config()._attn_implementation = attention if attention == "eager" else "sdpa"
    return copy.float().eval().requires_grad_(False)


def _shrink(settings: dict[str, Any], short: int) -> dict[str, Any]:
    """Settings of a configuration, and of those within it, with fewer and narrower layers and short lengths."""
    settings = {name: _shrink(value, short) if isinstance(value, dict) else value for name, value in settings.items()}
    heads, width, depth = (next((n for n in names if settings.get(n)), None) for names in (HEADS, WIDTHS, DEPTHS))
    if heads and width:
        head = settings[width] // settings[heads]
        if settings.get("num_key_value_heads"):
            settings["num_key_value_heads"] = 1 if settings["num_key_value_heads"] < settings[heads] else 2
        settings[heads], settings[width] = 2, 2 * head
        for name in settings:
            if WIDE.fullmatch(name) and settings[name]:
                settings[name] = 4 * head
    if depth:
        layers, kinds = settings[depth], settings.get("layer_types")
        few = LAYERS
        if kinds:  # up to the first of each kind
            few = max(few, 1 + max(kinds.index(kind) for kind in set(kinds)))
        settings[depth] = few
        for name, value in settings.items():
            if isinstance(value, list) and len(value) == layers and "layer" in name:
                settings[name] = (value * few)[:few]
            elif name.endswith("indexes") and isinstance(value, list):  # of layers
                settings[name] = list(range(min(len(value), few)))
    for name, value in settings.items():
        if isinstance(value, int) and not isinstance(value, bool):
            if EXPERTS.fullmatch(name):
                settings[name] = min(value, 4)
            elif name in ("num_experts_per_tok", "moe_topk"):
                settings[name] = min(value, 2)
            elif LENGTHS.fullmatch(name) and name != "window_size":  # that of a vision encoder is in pixels
                settings[name] = min(value, short)
    return settings


def _rope_types(settings: Any) -> set[str]:
    """Kinds of rotary embeddings in a configuration and those within it."""
    if not isinstance(settings, dict):
        return set()
    own = {settings["rope_type"]} if isinstance(settings.get("rope_type"), str) else set()
    return own.union(*map(_rope_types, settings.values()))


def _try_out(
    make_engine: Callable[..., "ScoringEngine"], model: RewardDanceForYesScoring, processor: RewardDanceProcessor
) -> str | None:
    engine = make_engine(model, processor, 4, 32768, 0, True, None, False)
    engine.min_saving = 4  # images may be small
    questions = _questions(model.config.uses_reference)
    want = torch.cat([model(**processor.encode([question])).logits[:, 0].float() for question in questions])
    with engine.session() as session:
        found = list(engine.answer(iter([[replace(q, row=i) for i, q in enumerate(questions)]]), session))
        shared = session.statistics.tokens < session.statistics.plain_tokens
    got = torch.cat([logits for logits, _ in found])
    if not (want[1:] - want[:-1])[:3].abs().min() > MARGIN:
        return "the answers of a small copy do not tell questions apart"
    gap = float((got - want).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(want.abs().max())):
        return f"log-odds of a small copy differ by {gap:.1g} from those of the plain path"
    if not engine.share_prefixes or not shared:
        return "its states cannot be shared"
    return None


def _questions(is_pairwise: bool) -> list[Question]:
    """Images of several sizes in several orders, several prompts, and a clip."""
    generator = np.random.default_rng(0)
    sizes = [(64, 64), (96, 48), (48, 80)]
    patches = [Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)) for _ in sizes]
    images = [patch.resize(size, Image.Resampling.NEAREST) for patch, size in zip(patches, sizes, strict=True)]
    asked = [
        (0, 1, "a red circle"),
        (0, 2, "a red circle"),
        (1, 2, "a red circle"),
        (1, 2, "green triangles"),
        (2, 1, "a red circle"),
    ]
    if not is_pairwise:  # each differs from the one before in one thing
        asked[1] = (0, 2, "two cats")
    questions = [Question(images[i], prompt, images[j] if is_pairwise else None) for i, j, prompt in asked]
    clip = [images[1], images[1].transpose(Image.Transpose.ROTATE_180)]
    return [*questions, Question(clip, "a cat", clip[::-1] if is_pairwise else None, task="text-to-video")]
