"""Peak memory of a training step with a large vocabulary: labelled positions only, against full-sequence logits."""

import multiprocessing
import re
import tempfile
from pathlib import Path

import torch


VOCABULARY = 151_936
ROWS = 4


def _peak_of_step(full_logits: bool, connection) -> None:
    """Run one forward and backward pass in this process and send its peak resident memory above the model's."""
    from tiny_vlms import random_image, save_tiny_vlm

    from rewarddance_hf import DataCollatorForRewardDance, RewardDanceForYesScoring, RewardDanceProcessor

    torch.set_num_threads(1)
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
    for parameter in model.parameters():  # gradients exist in any training run; they are not what is compared
        parameter.grad = torch.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of a process starts from that of its parent
    before = _peak_kilobytes()
    if full_logits:
        labels = batch.pop("rationale_labels")
        batch.pop("answer_index")
        logits = model.vlm(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    else:
        output = model(**batch)
        loss = output.rationale_loss.mean() - output.answer_log_probs.mean()
    loss.backward()
    connection.send(((_peak_kilobytes() - before) * 1024, batch["input_ids"].shape[1]))


def _peak_kilobytes() -> int:
    """Peak resident memory of this process (Linux only)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def run() -> dict[str, float]:
    """
    Measure both variants, each in a fresh process.

    Returns:
        `dict[str, float]`: Flat keys with gigabytes above the model, and their ratio.
    """
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name, full_logits in (("labelled_positions", False), ("full_logits", True)):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_peak_of_step, args=(full_logits, sender))
        process.start()
        peaks[name], length = receiver.recv()
        process.join()
    return {
        "training_memory/sequence_length": length,
        "training_memory/labelled_positions_gb": peaks["labelled_positions"] / 1e9,
        "training_memory/full_logits_gb": peaks["full_logits"] / 1e9,
        "training_memory/full_over_labelled": peaks["full_logits"] / peaks["labelled_positions"],
    }
