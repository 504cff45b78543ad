"""Tiny random CLIP model of the real classes, with its real processor and tokenizer."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer


def save_tiny_clip(folder, seed=0):
    """Save a checkpoint as CLIP's are: weights, image processor, byte-level BPE tokenizer."""
    folder = Path(folder)
    characters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789.,"})
    tokens = [*characters, "re", "red</w>", *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(tokens),
            "eos_token_id": len(tokens) - 1,
            "bos_token_id": len(tokens) - 2,
        },
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    with torch.no_grad():
        for weight in model.parameters():  # so that images differ
            if weight.ndim > 1:
                weight.mul_(4)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
