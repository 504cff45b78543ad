"""Collator: orders, labels, rationales, and errors that name the row."""

import pickle

import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import DataCollatorForRewardDance, RewardDanceProcessor


@pytest.fixture(scope="module")
def processor(vlm_folder):
    return RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))


def make_rows(count, **columns):
    return [
        {"prompt": f"prompt {i}", "chosen": random_image(i), "rejected": random_image(1000 + i), **columns}
        for i in range(count)
    ]


def test_order_is_random_but_reproducible(processor):
    """About half of the rows show the chosen image second; the same seed and epoch give the same order."""
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


def test_images_follow_the_labels(processor):
    """Label 1 means that the chosen image is image 2: the batch equals a direct call in that order."""
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


def test_reasons_first_targets(vlm_folder, family):
    """
    In every family the row is asked for reasons first, and the target is reasons, phrase, verdict and end of turn; the verdict
    is the very token that the model reads, and has no label of a rationale.
    """
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family))
    rows = make_rows(6, rationale={"yes": " the second is right.\n", "no": "the first is right"})
    batch = DataCollatorForRewardDance(processor, with_rationales=True, rationale_format="reasons_first")(rows)
    assert set(batch["labels"].tolist()) == {0.0, 1.0}
    for i, label in enumerate(batch["labels"]):
        answer = int(batch["answer_index"][i]) + 1
        assert batch["input_ids"][i, answer] == (processor.yes_token_id if label == 1 else processor.no_token_id)
        pair = (rows[i]["rejected"], rows[i]["chosen"]) if label == 1 else (rows[i]["chosen"], rows[i]["rejected"])
        question = processor([pair[1]], [rows[i]["prompt"]], [pair[0]], reasons_first=True)["input_ids"][0]
        seen = batch["input_ids"][i][batch["attention_mask"][i] == 1]
        assert torch.equal(seen[: len(question)], question)
        word, reasons = ("yes", "the second is right.") if label == 1 else ("no", "the first is right")
        text = processor.tokenizer.decode(seen[len(question) :])
        join = " " if family in ("idefics3", "smolvlm") else "\n"
        assert text.lstrip() == f"{reasons}\nAnswer:{join}{word}{processor._answer_end}"
        labels = batch["rationale_labels"][i]
        assert labels[answer] == -100
        target = seen[len(question) :].tolist()
        target.pop(target.index(int(batch["input_ids"][i, answer]), answer - batch["input_ids"].shape[1]))
        assert labels[labels != -100].tolist() == target


def test_mixed_formats(processor):
    """About half of the rows ask for reasons first, whatever their order; each row is that of the format alone."""
    rows = make_rows(120, rationale={"yes": "the second", "no": "the first"})
    collators = {
        name: DataCollatorForRewardDance(processor, with_rationales=True, rationale_format=name)
        for name in ("mixed", "decision_first", "reasons_first")
    }
    batch = collators["mixed"](rows)
    first = torch.tensor([is_reasons_first(processor, ids) for ids in batch["input_ids"]])
    second = batch["labels"] == 1
    for group in (second, ~second):
        assert 0.3 < first[group].float().mean() < 0.7
    for i in (int(first.int().argmax()), int(first.int().argmin())):
        pure = collators["reasons_first" if first[i] else "decision_first"]([rows[i]])
        alone = collators["mixed"]([rows[i]])
        for name in pure:
            assert torch.equal(alone[name], pure[name]), name
    collators["mixed"].set_epoch(1)
    later = torch.tensor([is_reasons_first(processor, ids) for ids in collators["mixed"](rows)["input_ids"]])
    assert 30 < (later != first).sum() < 90
    copy = pickle.loads(pickle.dumps(collators["mixed"]))
    assert torch.equal(copy(rows)["input_ids"], collators["mixed"](rows)["input_ids"])


def is_reasons_first(processor, ids):
    return "Give your reasons" in processor.tokenizer.decode(ids)


@pytest.mark.parametrize("rationale_format", ["reasons_first", "mixed"])
def test_rows_without_rationale_are_asked_for_the_decision(processor, rationale_format):
    """There are no reasons to put first: such rows are those of the decision-first format."""
    rows = make_rows(4, rationale=None)
    got = DataCollatorForRewardDance(processor, with_rationales=True, rationale_format=rationale_format)(rows)
    want = DataCollatorForRewardDance(processor, with_rationales=True)(rows)
    assert torch.equal(got["input_ids"], want["input_ids"])
    assert torch.equal(got["answer_index"], want["answer_index"])


def test_rationale_with_an_answer_in_it_names_its_row(processor):
    """Reasons end at the first phrase that announces the answer, so that it must not be in the reasons."""
    rows = make_rows(2, rationale={"yes": "red.\nAnswer: yes", "no": "Answer: no"})
    with pytest.raises(ValueError, match=r"`rationale` of row 0 of the batch contains '\\nAnswer:'"):
        DataCollatorForRewardDance(processor, with_rationales=True, rationale_format="reasons_first")(rows)
    DataCollatorForRewardDance(processor, with_rationales=True)(rows)  # after the decision it is text like any other


def test_answers_that_change_behind_the_phrase_are_refused(vlm_folder):
    """A tokenizer that merges the phrase and the answer gives an error; the decision-first format still works."""
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    processor.tokenizer.add_tokens([":\nyes", ":yes"])
    rows = make_rows(1, rationale={"yes": "red", "no": "blue"})
    DataCollatorForRewardDance(processor, with_rationales=True)(rows)
    with pytest.raises(ValueError, match="answers end in the tokens .* must be the single tokens"):
        DataCollatorForRewardDance(processor, with_rationales=True, rationale_format="reasons_first")(rows)


def test_wording_of_reasons_first_is_saved(vlm_folder, tmp_path):
    """A checkpoint is asked in the words that it was trained with, and its phrase is the one that ends its reasons."""
    texts = {
        "pairwise_reasons_question": "Think, then say which. {noun} 2?",
        "answer": "\nVerdict:",
    }
    RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), prompt_texts=texts).save_pretrained(tmp_path)
    processor = RewardDanceProcessor.from_pretrained(tmp_path)
    rows = make_rows(1, rationale={"yes": "red", "no": "red"})
    batch = DataCollatorForRewardDance(processor, with_rationales=True, rationale_format="reasons_first")(rows)
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert "Think, then say which. image 2?<|im_end|>" in text
    assert "red\nVerdict:\n" in text
    assert processor.split_reasons("a\nAnswer: b\nVerdict: yes") == "a\nAnswer: b"
    with pytest.raises(ValueError, match=r"`prompt_texts\['answer'\]` is blank"):
        RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), prompt_texts={"answer": "\n"})


def test_corrupt_image_names_its_row(processor):
    """The message says which row of which dataset to drop."""
    rows = make_rows(3)
    rows[1] |= {"chosen": {"bytes": b"\x89PNG no image", "path": None}, "row": "train_dataset[41]"}
    with pytest.raises(ValueError, match=r"`chosen of train_dataset\[41\]` cannot be read as an image"):
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
    with pytest.raises(ValueError, match="`rationale_format` is 'reasons_last'"):
        DataCollatorForRewardDance(processor, rationale_format="reasons_last")
