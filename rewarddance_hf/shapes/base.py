"""
Train the tiny base model that the demo starts from: it learns to see, to describe and to match, but not to compare.

First it describes single images. Then each row is a chat about several images of one prompt: for one after the other
it says whether the image is right, and what it shows. Run it with `make shapes-base` (about an hour on two cores); the
same seed gives the same weights on the same machine. The checkpoint that ships is its output.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from .captions import canonical_caption, caption_paraphrases
from .drawing import IN_DOMAIN, draw_objects, place_objects
from .models import BASE_VLM, CRITERIA, PROMPT_TEXTS, build_tokenizer, build_vlm, build_vlm_processor
from .oracle import check_facts
from .preferences import DEGRADATIONS, OWN_EDIT_SHARE, QUALITY_CRITERIA, SHARP, ShapesCaptions, break_scene
from .scenes import KINDS, sample_scene


IMAGES_PER_ROW = 3
QUALITY_SHARE = 0.2
BATCH_SIZE = 48


class CaptionChats(Dataset):
    """Chats in which one image is described."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.captions = ShapesCaptions(num_rows, seed)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.captions[index]
        question = [
            {"type": "text", "text": "Image 1: "},
            {"type": "image"},
            {"type": "text", "text": "\nDescribe it."},
        ]
        return {"images": [row["image"]], "messages": _exchange(question, f"{row['caption']}.")}


class MatchingChats(Dataset):
    """
    Chats in which images are matched with a prompt, by the criteria that it states, and described.

    `own_edit_share` is how often a wrong image is wrong in number, binding, relation or size, which are learned last; below 1,
    since some scenes have no such mistake. A kind that is named twice in `kinds` comes twice as often.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int = 0,
        own_edit_share: float = OWN_EDIT_SHARE,
        kinds: tuple[str, ...] = KINDS,
    ) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.own_edit_share = own_edit_share
        self.kinds = kinds

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"chats/{self.seed}/{index}")
        wanted = sample_scene(rng, rng.choice(self.kinds))
        about_quality = rng.random() < QUALITY_SHARE
        criteria = QUALITY_CRITERIA if about_quality else CRITERIA["text-to-image"]
        prompt = rng.choice(caption_paraphrases(wanted))
        opening = f"{PROMPT_TEXTS['prompt']}\n{PROMPT_TEXTS['criteria']}\n".format(
            prompt=f'"{prompt}"', criteria=criteria
        )
        images, messages = [], []
        for number in range(1, IMAGES_PER_ROW + 1):
            shown = wanted if rng.random() < 0.5 else break_scene(wanted, rng, self.own_edit_share)
            defect = rng.choice(list(DEGRADATIONS)) if about_quality and rng.random() < 0.5 else None
            placed = place_objects(shown, rng)
            nuisance = replace(IN_DOMAIN, **DEGRADATIONS[defect]) if defect else IN_DOMAIN
            images.append(draw_objects(placed, rng, nuisance))
            right = defect is None if about_quality else all(check_facts(wanted, placed).values())
            caption = canonical_caption(shown) + (f", {defect or SHARP}" if about_quality else "")
            question = [{"type": "text", "text": f"{opening}Image {number}: "}, {"type": "image"}]
            messages += _exchange(question, f"{'yes' if right else 'no'}\nImage {number}: {caption}.")
            opening = ""
        return {"images": images, "messages": messages}


def _exchange(question: list[dict[str, str]], answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


class ChatCollator:
    """Turn chats into batches with labels on what the assistant says."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.opened, self.closed = processor.tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.processor(
            images=[row["images"] for row in rows],
            text=[self.processor.apply_chat_template(row["messages"]) for row in rows],
            padding=True,
            return_tensors="pt",
            images_kwargs={"crop_to_patches": False},
        )
        ids = batch["input_ids"]
        # A turn of the assistant lasts from after its opening to the next end of a turn, which it includes.
        opened = (ids == self.opened).cumsum(-1) - (ids == self.opened).long()
        closed_before = (ids == self.closed).cumsum(-1) - (ids == self.closed).long()
        batch["labels"] = torch.where(closed_before == 2 * opened - 1, ids, -100)
        return dict(batch)


class ChatTrainer(Trainer):
    """
    Trainer in which verdicts weigh as much as all other words, which are many more; `optimizer` is a class or factory with its
    arguments, as of [`~transformers.Trainer`], and `settings` are training arguments.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        collator: Callable[..., Any],
        rows: Dataset,
        steps: int,
        optimizer: tuple[Any, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        arguments = TrainingArguments(
            os.path.join(tempfile.gettempdir(), "shapes_base"),  # nothing is saved there
            max_steps=steps,
            warmup_steps=50,
            weight_decay=0.02,
            adam_beta2=0.98,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            use_cpu=True,
            **settings,
        )
        super().__init__(
            model, arguments, data_collator=collator, train_dataset=rows, optimizer_cls_and_kwargs=optimizer
        )
        self.model_accepts_loss_kwargs = False
        self.verdict_ids = torch.tensor(tokenizer.convert_tokens_to_ids(["yes", "no"]))
        self.verdict_losses: list[float] = []

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        labelled = labels != -100
        # Few tokens of a batch have labels: logits of the others would cost a tenth of an update.
        states = model.model(**inputs).last_hidden_state[:, :-1]
        losses = torch.nn.functional.cross_entropy(model.lm_head(states[labelled]), labels[labelled], reduction="none")
        is_verdict = torch.isin(labels[labelled], self.verdict_ids)
        loss = losses[~is_verdict].mean()
        if is_verdict.any():
            verdict_loss = losses[is_verdict].mean()
            self.verdict_losses.append(verdict_loss.item())
            loss = loss + verdict_loss
        return loss

    def log(self, logs: dict[str, float], *args: Any) -> None:
        if self.verdict_losses:
            logs["verdict_loss"] = sum(self.verdict_losses) / len(self.verdict_losses)
            self.verdict_losses.clear()
        super().log(logs, *args)


@dataclass(frozen=True)
class Stage:
    """
    One part of the training, with an optimizer of its own. `rows` makes a dataset from a number of rows and a seed; the
    learning rate falls in the last `decay_share` of the steps.
    """

    name: str
    rows: Callable[[int, int], Dataset]
    steps: int
    learning_rate: float
    decay_share: float


STAGES = (
    Stage("captions", CaptionChats, 600, 1e-3, 0.4),
    Stage("matching", MatchingChats, 1600, 1e-3, 0.4),
    Stage("hard_matching", partial(MatchingChats, own_edit_share=0.85), 4000, 7e-4, 0.8),
    # Who has which color, and which object is larger: learned late, and only where little else is asked.
    Stage("binding", partial(MatchingChats, own_edit_share=0.95, kinds=("binding",)), 900, 1e-3, 0.4),
    Stage(
        "comparison", partial(MatchingChats, own_edit_share=0.95, kinds=("size",) * 3 + ("binding",)), 1000, 1e-3, 0.5
    ),
    Stage("all", partial(MatchingChats, own_edit_share=0.85), 1200, 7e-4, 0.7),
)


def train_base(output_dir: Path, seed: int = 0, stages: tuple[Stage, ...] = STAGES) -> None:
    """Train the base model from scratch and save it as a plain checkpoint."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model, processor = build_vlm(tokenizer, seed), build_vlm_processor(tokenizer)
    for number, stage in enumerate(stages):
        trainer = ChatTrainer(
            model,
            tokenizer,
            ChatCollator(processor),
            stage.rows(stage.steps * BATCH_SIZE, seed + number),
            stage.steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": int(stage.decay_share * stage.steps), "min_lr_ratio": 0.05},
            logging_steps=100,
            dataloader_num_workers=1,
            seed=seed + number,
        )
        trainer.train()
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=BASE_VLM)
    parser.add_argument("--seed", type=int, default=0)
    train_base(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
