"""Tiny judges that vLLM serves on a CPU: their heads have 32 dimensions."""

from copy import deepcopy
from pathlib import Path

import tiny_vlms
import torch

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.shapes.preferences import ShapesPreferences


FAMILIES = ("internvl", "qwen2_5_vl", "qwen3_vl")
WIDTH = 128  # of four heads
SECTIONS = [4, 6, 6]  # of rotary positions, half a head


def save_wide_judge(family: str, folder: Path, backend: str = "pil") -> Path:
    """A pairwise judge of a family, with the image processor that the engine uses if `backend` is torchvision."""
    build = tiny_vlms.FAMILIES[family]

    def wide():
        config, processor = build()
        if hasattr(config.vision_config, "out_hidden_size"):
            config.vision_config.out_hidden_size = WIDTH
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rope:
            rope["mrope_section"] = SECTIONS
        if hasattr(config.get_text_config(), "head_dim"):
            config.get_text_config().head_dim = 32
        return config, processor

    kept = dict(tiny_vlms.TEXT), tiny_vlms.FAMILIES[family]
    tiny_vlms.TEXT.update(hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    tiny_vlms.FAMILIES[family] = wide
    try:
        plain = tiny_vlms.save_tiny_vlm(family, folder / "plain")
    finally:
        tiny_vlms.TEXT.clear()
        tiny_vlms.TEXT.update(kept[0])
        tiny_vlms.FAMILIES[family] = kept[1]
    settings = {"vlm_images_kwargs": {"crop_to_patches": False}} if family == "internvl" else {}
    processor = RewardDanceProcessor.from_pretrained(plain, backend=backend, **settings)
    model = RewardDanceForYesScoring.from_pretrained(plain, dtype=torch.float32)
    RewardDanceScorer(model, processor).save_pretrained(folder / "judge")
    return folder / "judge"


def shapes_questions(count: int, first: int = 0) -> list[Question]:
    """Questions about pairs of shapes: every second one has its images in the other order."""
    rows = ShapesPreferences(first + count)
    media = [("chosen", "rejected") if i % 2 == 0 else ("rejected", "chosen") for i in range(count)]
    pairs = zip(media, (rows[first + i] for i in range(count)), strict=True)
    return [
        Question(row[sample], row["prompt"], row[reference], row=i)
        for i, ((sample, reference), row) in enumerate(pairs)
    ]


def train_shapes_judge(updates: int = 60, size: int = 32) -> RewardDanceForYesScoring:
    """A pairwise judge of shapes after a few updates, whose log-odds are spread out."""
    torch.manual_seed(0)
    model = RewardDanceForYesScoring.from_pretrained(BASE_VLM, paradigm="pairwise", dtype=torch.float32)
    processor = judge_processor()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    labels = torch.tensor([1.0, 0.0] * (size // 2))
    for questions in torch.utils.data.DataLoader(shapes_questions(updates * size, 1000), size, collate_fn=list):
        model(**processor.encode(questions), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def widened(model: RewardDanceForYesScoring, width: int = 32) -> RewardDanceForYesScoring:
    """
    The same function with heads of `width` dimensions in the language model, which has no norm of queries and keys: new weights
    are zero, and what depends on a width is scaled back.
    """
    config = deepcopy(model.config)
    text = config.vlm_config.text_config
    size = text.hidden_size
    head = size // text.num_attention_heads
    text.hidden_size = width * text.num_attention_heads
    text.rope_parameters["rope_theta"] **= width / head  # the same frequencies come first
    text.rms_norm_eps *= size / text.hidden_size
    wide = RewardDanceForYesScoring(config).requires_grad_(False).eval()
    first = torch.arange(head)
    # A rotary pair is half a head apart.
    paired = torch.where(first < head // 2, first, first + (width - head) // 2)
    heads = width * torch.arange(text.num_attention_heads)[:, None]
    new = wide.state_dict()
    for name, value in model.state_dict().items():
        layer = name.split(".")[-2]
        target = new[name].zero_() if new[name].shape != value.shape else new[name]
        columns = slice(value.shape[-1])
        if target.shape == value.shape:
            target.copy_(value)
        elif layer in ("q_proj", "k_proj", "v_proj"):
            scale = (width / head) ** 0.5 if layer == "q_proj" else 1.0  # softmax divides by the root of the width
            rows = (heads + (first if layer == "v_proj" else paired)).flatten()
            target[(rows, columns) if value.ndim == 2 else rows] = scale * value
        elif layer == "o_proj":
            target[: len(value), (heads + first).flatten()] = value
        elif "norm" in layer:
            target[columns] = (size / text.hidden_size) ** 0.5 * value  # the mean is over more dimensions
        else:
            target[tuple(slice(length) for length in value.shape)] = value
    return wide


def save_shapes_judge(folder: Path, backend: str = "pil") -> Path:
    """The trained judge of shapes with wide heads, whose scores are those of the trained one."""
    trained = train_shapes_judge()
    wide, processor = widened(trained), judge_processor(backend=backend)
    questions = shapes_questions(50)
    (logits, scores), (_, wide_scores) = (
        RewardDanceScorer(deepcopy(model).double(), processor).ask(questions) for model in (trained, wide)
    )
    torch.testing.assert_close(wide_scores, scores, rtol=0, atol=1e-6)
    assert logits.min() < -2  # spread out
    assert logits.max() > 2
    RewardDanceScorer(wide, processor).save_pretrained(folder / "judge")
    return folder / "judge"
