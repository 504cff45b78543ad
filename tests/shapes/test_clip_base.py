"""Tests of the base model of clips: true answers, and questions that see the clip and themselves only."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from rewarddance_hf.shapes.clip_base import (
    ADDED_LAYERS,
    CLIP_LAYOUT,
    CLIP_TEXTS,
    ClipPairQuestions,
    ClipQuestions,
    train_clip_base,
)
from rewarddance_hf.shapes.clip_oracle import check_clip_facts
from rewarddance_hf.shapes.clip_scenes import parse_clip_caption
from rewarddance_hf.shapes.clips import NUM_FRAMES
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.shapes.oracle import detect_objects
from rewarddance_hf.shapes.questions import QuestionCollator


@pytest.fixture(scope="module")
def rows():
    """Enough clips for every kind of fault."""
    return [ClipQuestions(60, seed=1)[i] for i in range(60)]


@pytest.fixture(scope="module")
def processor():
    """Processor of a judge of clips."""
    return judge_processor(prompt_layout=CLIP_LAYOUT, prompt_texts=CLIP_TEXTS)


def test_answers_are_true(rows):
    """By pixels, a clip shows what was answered with yes and nothing else, and begins as its given frame."""
    answers = []
    for row in rows:
        shown = [detect_objects(image) for image in row["images"]]
        frames, given = shown[-NUM_FRAMES:], shown[:-NUM_FRAMES]
        assert row["opening"].count("{}") == len(row["images"])
        for question, answer in row["questions"][:-1]:
            prompt = question.split('"')[1]
            scene = parse_clip_caption(prompt)
            assert all(check_clip_facts(scene, frames, *given).values()) == (answer == "yes"), prompt
            answers.append((scene.kind, answer))
    assert {kind for kind, _ in answers} == {"move", "turn", "pace", "stay", "order"}
    assert 0.35 < sum(answer == "yes" for _, answer in answers) / len(answers) < 0.5


def test_questions_are_those_of_a_judge(rows, processor):
    """The tokens of a clip and one question are those that a pointwise judge of clips gets."""
    collator = QuestionCollator(processor.vlm_processor)
    for row in (next(row for row in rows if len(row["images"]) == count) for count in (4, 5)):
        question, answer = row["questions"][0]
        batch = collator([{**row, "questions": [(question, answer)]}])
        asked = processor(
            images=[row["images"][-NUM_FRAMES:]],
            prompts=[question.split('"')[1]],
            conditions=[row["images"][0]] if len(row["images"]) == 5 else None,
            task="image-to-video" if len(row["images"]) == 5 else "text-to-video",
        )
        length = asked["input_ids"].shape[1]
        torch.testing.assert_close(batch["input_ids"][:, :length], asked["input_ids"])
        torch.testing.assert_close(batch["pixel_values"], asked["pixel_values"])
        written = processor.tokenizer.decode(batch["labels"][0][length:])
        assert written == f"{answer}<|end|>"


def test_questions_do_not_see_each_other(rows, processor):
    """Logits at a question are those of a forward pass with no other question."""
    model = AutoModelForImageTextToText.from_pretrained(BASE_VLM).eval()
    collator = QuestionCollator(processor.vlm_processor)
    together = collator([rows[0], rows[1]])
    alone = collator([{**rows[0], "questions": rows[0]["questions"][4:5]}])
    with torch.no_grad():
        logits = [model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0] for batch in (together, alone)]
    # Each answer to a question is two tokens, "yes" or "no" and the end.
    answers = [(batch["labels"][0] != -100).nonzero()[:, 0] for batch in (together, alone)]
    torch.testing.assert_close(logits[0][answers[0][8:10]], logits[1][answers[1]], atol=1e-4, rtol=1e-4)


def test_answers_about_pairs_are_true():
    """By pixels, those clips of a pair show a prompt of which the answers say so."""
    verdicts, together = [], set()
    for index in range(60):
        row = ClipPairQuestions(60, seed=2)[index]
        shown = [detect_objects(image) for image in row["images"]]
        clips, given = (shown[-2 * NUM_FRAMES : -NUM_FRAMES], shown[-NUM_FRAMES:]), shown[: -2 * NUM_FRAMES]
        assert row["opening"].count("{}") == len(row["images"])
        for question, answer in row["questions"][:-1]:
            scene = parse_clip_caption(question.split('"')[1])
            holds = [all(check_clip_facts(scene, frames, *given).values()) for frames in clips]
            if "Which" in question:
                assert answer == {(1, 1): "1 and 2", (1, 0): "1", (0, 1): "2", (0, 0): "nothing"}[tuple(holds)]
                together.add(answer)
            else:
                assert holds["image 2" in question] == (answer == "yes"), question
                verdicts.append(answer)
    assert len(together) == 4
    assert 0.25 < verdicts.count("yes") / len(verdicts) < 0.6


def test_pairs_are_those_of_a_judge(processor):
    """The tokens of two clips and a prompt are those that a pairwise judge of clips gets before its question."""
    collator = QuestionCollator(processor.vlm_processor)
    rows = [ClipPairQuestions(20, seed=3)[index] for index in range(20)]
    for row in (next(row for row in rows if len(row["images"]) == count) for count in (8, 9)):
        prompt = row["questions"][0][0].split('"')[1]
        batch = collator([{**row, "questions": [(f'"{prompt}"\nIs image 2 better than image 1?', "yes")]}])
        asked = processor(
            references=[row["images"][-8:-4]],
            images=[row["images"][-4:]],
            prompts=[prompt],
            conditions=[row["images"][0]] if len(row["images"]) == 9 else None,
            task="image-to-video" if len(row["images"]) == 9 else "text-to-video",
        )
        torch.testing.assert_close(batch["input_ids"][:, : asked["input_ids"].shape[1]], asked["input_ids"])
        torch.testing.assert_close(batch["pixel_values"], asked["pixel_values"])


def test_training_saves_a_plain_checkpoint(tmp_path):
    """The result is loaded as any base model, deeper than before, with weights that have moved."""
    train_clip_base(tmp_path, steps=2, pair_steps=2)
    trained, base = (AutoModelForImageTextToText.from_pretrained(path) for path in (tmp_path, BASE_VLM))
    assert not torch.equal(trained.get_input_embeddings().weight, base.get_input_embeddings().weight)
    layers = [model.config.text_config.num_hidden_layers for model in (trained, base)]
    assert layers[0] == layers[1] + ADDED_LAYERS
