"""Collator: orders, labels, rationales, and errors that name the row."""

import pickle

import pytest
import torch
from tiny_vlms import random_picture

from rewarddance_hf import DataCollatorForRewardDance, RewardDanceProcessor


@pytest.fixture(scope="module")
def processor(vlm_folder):
    return RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))


def make_rows(count, **columns):
    return [
        {"prompt": f"prompt {i}", "chosen": random_picture(i), "rejected": random_picture(1000 + i), **columns}
        for i in range(count)
    ]


def test_order_is_random_but_reproducible(processor):
    """About half of the rows show the chosen picture second; the same seed and epoch give the same order."""
    rows = make_rows(200)
    labels = DataCollatorForRewardDance(processor)(rows)["labels"]
    assert 70 < labels.sum() < 130
    assert torch.equal(labels, DataCollatorForRewardDance(processor)(rows)["labels"])
    assert not torch.equal(labels, DataCollatorForRewardDance(processor, seed=1)(rows)["labels"])


def test_order_changes_with_the_epoch(processor):
    """In another epoch about half of the rows are turned around, and going back gives the first order again."""
    rows, collator = make_rows(200), DataCollatorForRewardDance(processor)
    first = collator(rows)["labels"]
    collator.set_epoch(1)
    second = collator(rows)["labels"]
    assert 70 < (first != second).sum() < 130
    collator.set_epoch(0)
    assert torch.equal(collator(rows)["labels"], first)


def test_order_does_not_depend_on_the_batch(processor):
    """A row keeps its order whichever batch it is in, so that sharding and resuming do not change it."""
    rows, collator = make_rows(12), DataCollatorForRewardDance(processor)
    together = collator(rows)["labels"]
    alone = torch.cat([collator([row])["labels"] for row in rows])
    assert torch.equal(together, alone)


def test_pictures_follow_the_labels(processor):
    """Label 1 means that the chosen picture is image 2: the batch equals a direct call in that order."""
    rows = make_rows(16)
    batch = DataCollatorForRewardDance(processor)(rows)
    pairs = [
        (row["rejected"], row["chosen"]) if label == 1 else (row["chosen"], row["rejected"])
        for row, label in zip(rows, batch["labels"], strict=True)
    ]
    direct = processor([b for _, b in pairs], [row["prompt"] for row in rows], references=[a for a, _ in pairs])
    assert torch.equal(batch["pixel_values"], direct["pixel_values"])
    assert torch.equal(batch["input_ids"], direct["input_ids"])


@pytest.mark.parametrize("paradigm", ["pointwise", "regressive"])
def test_pointwise_batches_hold_chosen_then_rejected(processor, paradigm):
    """The first half of the samples is chosen, the second rejected; labels have one entry per row."""
    rows = make_rows(5)
    batch = DataCollatorForRewardDance(processor, paradigm)(rows)
    samples = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    direct = processor(samples, [row["prompt"] for row in rows] * 2)
    assert torch.equal(batch["pixel_values"], direct["pixel_values"])
    assert batch["labels"].tolist() == [1.0] * 5
    assert next(iter(batch)) == "labels"  # the Trainer counts rows by the first tensor


def test_ties_and_margins(processor):
    """A tie has label one half in every paradigm; margins are passed on, 0 where a row has none."""
    rows = [*make_rows(1, tie=True), *make_rows(1, tie=False, margin=0.3), *make_rows(1)]
    for paradigm in ("pairwise", "pointwise", "regressive"):
        batch = DataCollatorForRewardDance(processor, paradigm)(rows)
        assert batch["labels"][0] == 0.5
        assert (batch["labels"][1:] != 0.5).all()
        torch.testing.assert_close(batch["margin"], torch.tensor([0.0, 0.3, 0.0]))
    assert "margin" not in DataCollatorForRewardDance(processor)(make_rows(2))


def test_rationale_targets_spell_answer_and_rationale(processor):
    """The appended tokens are the verdict of the row's order, its rationale and the end of the turn."""
    rows = make_rows(8, rationale={"yes": "the second is right", "no": "the first is right"})
    rows[0]["rationale"] = None
    batch = DataCollatorForRewardDance(processor, with_rationales=True)(rows)
    for i, label in enumerate(batch["labels"]):
        start = int(batch["answer_index"][i]) + 1
        target = batch["input_ids"][i, start:][batch["attention_mask"][i, start:] == 1]
        text = processor.tokenizer.decode(target)
        word = "yes" if label == 1 else "no"
        expected = word if i == 0 else f"{word}\n{rows[i]['rationale'][word]}<|im_end|>\n"
        assert text == expected
        labels = batch["rationale_labels"][i]
        assert torch.equal(labels[labels != -100], target[1:])


def test_corrupt_picture_names_its_row(processor):
    """The message says which row of which dataset to drop."""
    rows = make_rows(3)
    rows[1] |= {"chosen": {"bytes": b"\x89PNG no picture", "path": None}, "row": "train_dataset[41]"}
    with pytest.raises(ValueError, match=r"`chosen of train_dataset\[41\]` cannot be read as a picture"):
        DataCollatorForRewardDance(processor)(rows)


def test_missing_column_names_its_row(processor):
    """Rows of a stream, whose columns are not known before, are checked one by one."""
    rows = make_rows(2)
    del rows[1]["rejected"]
    with pytest.raises(ValueError, match=r"`row 1 of the batch` lacks the columns \['rejected'\]"):
        DataCollatorForRewardDance(processor)(rows)


def test_collator_can_be_sent_to_workers(processor):
    """Data loader workers that are spawned get a copy that makes the same batches."""
    collator, rows = DataCollatorForRewardDance(processor, seed=3), make_rows(4)
    copy = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copy(rows)["input_ids"], collator(rows)["input_ids"])
    assert torch.equal(copy(rows)["labels"], collator(rows)["labels"])


def test_rationales_need_the_pairwise_paradigm(processor):
    """Asking for what a paradigm does not have is an error, not a silent nothing."""
    with pytest.raises(ValueError, match="pointwise paradigm has no rationales"):
        DataCollatorForRewardDance(processor, "pointwise", with_rationales=True)
    with pytest.raises(ValueError, match="`paradigm` is 'listwise'"):
        DataCollatorForRewardDance(processor, "listwise")
