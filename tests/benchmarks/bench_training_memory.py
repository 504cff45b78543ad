"""Peak memory of a training step with a large vocabulary: labelled positions only, against full-sequence logits."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import peak_of


VOCABULARY = 151_936
ROWS = 4


def batch_and_model() -> tuple[Any, Any]:
    """Batch of rows with rationales, and a tiny judge with a large vocabulary."""
    from tiny_vlms import random_image, save_tiny_vlm

    from rewarddance_hf import DataCollatorForRewardDance, RewardDanceForYesScoring, RewardDanceProcessor

    with tempfile.TemporaryDirectory() as folder:
        save_tiny_vlm("internvl", Path(folder))
        model = RewardDanceForYesScoring.from_pretrained(folder)
        processor = RewardDanceProcessor.from_pretrained(folder)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    rationale = {"yes": "Image 1: worse. Image 2: better.", "no": "Image 1: better. Image 2: worse."}
    rows = [
        {
            "prompt": "a red circle",
            "chosen": random_image(i),
            "rejected": random_image(9 + i),
            "rationale": rationale,
        }
        for i in range(ROWS)
    ]
    batch = DataCollatorForRewardDance(processor, with_rationales=True)(rows)
    batch.pop("labels")
    return batch, model


def step(full_logits: bool, batch: dict[str, Any], model: Any) -> torch.Tensor:
    """Loss of one forward and backward pass."""
    if full_logits:
        inputs = {k: v for k, v in batch.items() if k not in ("rationale_labels", "answer_index")}
        logits, labels = model.vlm(**inputs, use_cache=False).logits, batch["rationale_labels"]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    else:
        output = model(**batch)
        loss = output.rationale_loss.mean() - output.answer_log_probs.mean()
    loss.backward()
    return loss


def _measure(measure: Callable[[Callable[[], Any]], None], full_logits: bool) -> None:
    batch, model = batch_and_model()
    for parameter in model.parameters():  # gradients exist in any training run; they are not what is compared
        parameter.grad = torch.zeros_like(parameter)
    measure(lambda: step(full_logits, batch, model))


def rationales() -> dict[str, float]:
    """Gigabytes above the model, each variant in a fresh process, and their ratio."""
    labelled, full = (peak_of(_measure, full_logits) for full_logits in (False, True))
    return {
        "labelled_positions_gb": labelled / 1e9,
        "full_logits_gb": full / 1e9,
        "full_over_labelled": full / labelled,
    }


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """Training with rationales."""
    return {"rationales": rationales}
