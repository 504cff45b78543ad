"""The base model's training: what its rows teach, and that it runs and repeats."""

import torch

from rewarddance_hf import RewardDanceForYesScoring
from rewarddance_hf.shapes.base import CaptionChats, ChatCollator, MatchingChats, Stage, train_base
from rewarddance_hf.shapes.models import BASE_VLM, JUDGE_BASE, build_tokenizer, build_vlm_processor, judge_processor
from rewarddance_hf.shapes.oracle import check
from rewarddance_hf.shapes.preferences import ShapesPreferences


def text_of(message):
    return "".join(part.get("text", "<image>") for part in message["content"])


def test_matching_chats_are_true():
    """The oracle agrees with the verdicts of rows about what an image shows, and with nearly all captions."""
    agreed, captions, count = 0, 0, 0
    for index in range(120):
        row = MatchingChats(200)[index]
        opening = text_of(row["messages"][0])
        if "what the picture shows" not in opening:
            continue
        prompt = opening.partition('"')[2].partition('"')[0]
        for image, answer in zip(row["images"], row["messages"][1::2], strict=True):
            verdict, caption = text_of(answer).split("\n")
            agreed += check(image, prompt).all_hold == (verdict == "yes")
            captions += check(image, caption.partition(": ")[2].rstrip(".")).all_hold
            count += 1
    assert count > 200
    assert agreed / count > 0.98
    assert captions / count > 0.98


def test_labels_cover_what_the_assistant_says():
    """Labels hold each answer with the end of its turn, and nothing that the user says."""
    tokenizer = build_tokenizer()
    collator = ChatCollator(build_vlm_processor(tokenizer))
    rows = [MatchingChats(4)[i] for i in range(3)] + [CaptionChats(4)[0]]
    batch = collator(rows)
    for row, labels in zip(rows, batch["labels"], strict=True):
        said = "".join(text_of(message) + "<|end|>" for message in row["messages"] if message["role"] == "assistant")
        assert tokenizer.decode(labels[labels != -100]) == said


def test_training_runs_and_repeats(tmp_path):
    """Every stage trains, and the same seed gives the same weights."""
    stages = (Stage("captions", CaptionChats, 2, 1e-3, 0.5), Stage("matching", MatchingChats, 1, 1e-3, 0.5))
    for name in ("first", "second"):
        train_base(tmp_path / name, seed=3, stages=stages)
    first, second = (
        RewardDanceForYesScoring.from_pretrained(tmp_path / name).state_dict() for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokenizer_knows_every_word_of_the_world():
    """Each word of prompts, questions and rationales is one token, so that sequences stay short."""
    processor = judge_processor()
    words = {
        word.strip('.,":')
        for i in range(60)
        for row in [ShapesPreferences(60, "ood")[i]]
        for word in f"{row['prompt']} {row['rationale']['yes']} {row['criteria']}".split()
    }
    for word in words:
        assert len(processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word


def test_shipped_base_model_is_small_and_loads():
    """The base checkpoint is a plain model under 6 MB that any judge can start from."""
    assert sum(file.stat().st_size for file in BASE_VLM.iterdir()) < 6e6
    model = RewardDanceForYesScoring.from_pretrained(BASE_VLM)
    assert model.config.vlm_config.model_type == "internvl"
    assert model.config.yes_token_id == judge_processor().yes_token_id


def test_shipped_tokenizer_is_the_one_that_is_built():
    """Token IDs are the same in every process, so that stages and judges agree about them."""
    built, shipped = build_tokenizer(), judge_processor().tokenizer
    assert built.get_vocab() == shipped.get_vocab()
    text = "two small red circles left of a blue square, clear. yes no"
    assert built(text)["input_ids"] == shipped(text)["input_ids"]


def test_judges_are_asked_as_they_were_taught(tmp_path):
    """Base models have a layout of their own; that of a saved judge is kept, and its wording."""
    texts = {"pairwise_question": "Which one?"}
    judge_processor(JUDGE_BASE, prompt_layout="images_first", prompt_texts=texts).save_pretrained(tmp_path)
    for folder, layout in ((BASE_VLM, "text_first"), (JUDGE_BASE, "text_after_each"), (tmp_path, "images_first")):
        assert judge_processor(folder).prompt_layout == layout
    assert judge_processor(tmp_path).prompt_texts["pairwise_question"] == "Which one?"
    assert judge_processor(tmp_path, prompt_layout="text_first").prompt_layout == "text_first"
