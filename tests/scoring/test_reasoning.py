"""Scores after reasons, against greedy decoding and a softmax written by hand, on tiny judges that learned to give reasons."""

import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import (
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
)
from rewarddance_hf.rewards import NonFiniteScoreError
from rewarddance_hf.scoring.reasoning import NoAnswerError


PROMPTS = ["a red circle", "two green triangles left of a blue square", "yes"]
SAMPLES = [random_image(i, *size) for i, size in enumerate([(40, 40), (60, 30), (28, 56)])]
REFERENCES = [random_image(10 + i) for i in range(3)]
CLOSE = {"rtol": 1e-4, "atol": 1e-6, "equal_nan": True}
REASONS = ["red", "blue square left of it, yes or no"]  # of the first two


def train_to_reason(folder, num_steps=40, learning_rate=6e-3):
    """Judge that has learned a few reasons and their end by heart."""
    torch.manual_seed(0)
    model = RewardDanceForYesScoring.from_pretrained(folder)
    processor = RewardDanceProcessor.from_pretrained(folder)
    questions = processor(SAMPLES[:2], PROMPTS[:2], REFERENCES[:2], reasons_first=True)
    batch = processor.append_answers(questions, [True, False], REASONS, reasons_first=True)
    labels = torch.tensor([1.0, 0.0])
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    for _ in range(num_steps):
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, processor


@pytest.fixture(scope="module")
def judges(vlm_folder):
    """Function that gives the reasoning judge of a family. Read only."""
    known = {}

    def load(family, batch_size=8):
        if family not in known:
            known[family] = train_to_reason(vlm_folder(family))
        return RewardDanceScorer(*known[family], batch_size=batch_size)

    return load


def reason_by_hand(scorer, sample, prompt, reference, max_new_tokens):
    """Greedy decoding with whole forward passes, then the softmax after the phrase."""
    tokenizer = scorer.processor.tokenizer
    question = dict(scorer.processor([sample], [prompt], [reference], reasons_first=True))

    def logits_after(ids):
        batch = {**question, "input_ids": torch.cat([question["input_ids"], torch.tensor([ids], dtype=torch.long)], 1)}
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in batch:
                batch[name] = torch.nn.functional.pad(batch[name], (0, len(ids)), value=value)
        with torch.no_grad():
            return scorer.model.vlm(**batch).logits[0, -1].float()

    tokens, text = [], ""
    for _ in range(max_new_tokens):
        tokens.append(int(logits_after(tokens).argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if "\nAnswer:" in text:
            reasons = text.split("\nAnswer:")[0].strip()
            lead = scorer.processor._answer_space + reasons + scorer.processor._answer_phrase
            ids = tokenizer(lead + "yes", add_special_tokens=False)["input_ids"]
            return reasons, logits_after(ids[:-1]).softmax(-1)[scorer.processor.yes_token_id].item()
    return text.strip(), float("nan")


def test_reasons_and_scores_equal_decoding_by_hand(judges, family):
    """In every family a batch of mixed lengths gives the reasons and P("yes") of each row alone, decoded by hand."""
    scorer = judges(family)
    got = scorer.reason(SAMPLES, PROMPTS, REFERENCES, max_new_tokens=40)
    want = [reason_by_hand(scorer, *row, 40) for row in zip(SAMPLES, PROMPTS, REFERENCES, strict=True)]
    assert got.texts == [[text] for text, _ in want]
    assert got.texts[:2] == [[reasons] for reasons in REASONS]  # it did learn
    torch.testing.assert_close(got.scores, torch.tensor([score for _, score in want]), **CLOSE)
    torch.testing.assert_close(got.sample_scores[:, 0], got.scores, equal_nan=True)
    assert got.std[:2].tolist() == [0, 0]
    assert not got.scores[:2].isnan().any()
    assert got.num_failed == got.scores.isnan().sum()
    alone = judges(family, batch_size=1).reason(SAMPLES, PROMPTS, REFERENCES, max_new_tokens=40)
    assert alone.texts == got.texts
    torch.testing.assert_close(alone.scores, got.scores, **CLOSE)


def test_unanswered_chains_are_nan_and_counted(judges, caplog):
    """A chain that is cut off before its answer has no score; the others have theirs, and a warning names the row."""
    scorer = judges("internvl")
    rows = (SAMPLES[:2], PROMPTS[:2], REFERENCES[:2])
    want = scorer.reason(*rows, max_new_tokens=40)
    assert not caplog.records
    with caplog.at_level("WARNING", logger="rewarddance_hf.scoring.reasoning"):
        got = scorer.reason(*rows, max_new_tokens=12)
    assert got.scores.isnan().tolist() == [False, True]
    assert got.std.isnan().tolist() == [False, True]
    assert got.num_failed == 1
    torch.testing.assert_close(got.scores[0], want.scores[0], **CLOSE)
    assert REASONS[1].startswith(got.texts[1][0])
    assert "1 of 2 chains of thought did not reach '\\nAnswer:' in 12 tokens" in caplog.text
    assert "(rows [1])" in caplog.text


def test_no_answer_at_all_is_an_error_with_the_texts(judges):
    """Where nothing can be scored the message says what to do, and what was generated is kept."""
    with pytest.raises(NoAnswerError, match=r"3 of 3 chains .* Raise `max_new_tokens`, or train") as error:
        judges("internvl").reason(SAMPLES, PROMPTS, REFERENCES, max_new_tokens=1)
    assert [len(texts) for texts in error.value.texts] == [1, 1, 1]


def test_self_consistency(judges):
    """Several chains are drawn by their own seed, and mean and spread are those of the chains that have an answer."""
    scorer = judges("internvl", batch_size=4)
    arguments = {"num_samples": 5, "max_new_tokens": 40, "temperature": 1.6}
    state = torch.get_rng_state()
    got = scorer.reason(SAMPLES, PROMPTS, REFERENCES, seed=3, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert got.sample_scores.shape == (3, 5)
    assert [len(texts) for texts in got.texts] == [5, 5, 5]
    assert len({text for texts in got.texts for text in texts}) > 3
    assert got.num_failed == got.sample_scores.isnan().sum()
    for row, mean, std in zip(got.sample_scores, got.scores, got.std, strict=True):
        known = row[~row.isnan()]
        torch.testing.assert_close(mean, known.mean())
        torch.testing.assert_close(std, known.std(correction=0))
    assert got.std.max() > 0
    again = scorer.reason(SAMPLES, PROMPTS, REFERENCES, seed=3, **arguments)
    assert again.texts == got.texts
    torch.testing.assert_close(again.sample_scores, got.sample_scores, equal_nan=True)
    assert scorer.reason(SAMPLES, PROMPTS, REFERENCES, seed=4, **arguments).texts != got.texts


def test_each_chain_has_the_score_of_its_text(judges):
    """A drawn chain's reward is P("yes") after that very text, so that it can be computed again."""
    scorer = judges("internvl")
    got = scorer.reason(SAMPLES[:1], PROMPTS[:1], REFERENCES[:1], num_samples=4, max_new_tokens=40, temperature=1.3)
    for text, score in zip(got.texts[0], got.sample_scores[0], strict=True):
        if score.isnan():
            continue
        batch = scorer.processor(SAMPLES[:1], PROMPTS[:1], REFERENCES[:1], reasons_first=True)
        batch = scorer.processor.append_answers(batch, [False], [text], reasons_first=True)
        with torch.no_grad():
            torch.testing.assert_close(scorer.model(**batch).scores[0], score, rtol=1e-4, atol=1e-6)


def test_answer_without_reasons_has_a_score(judges):
    """A judge that answers at once reached its answer: the reasons are empty."""
    scorer = judges("internvl")
    assert scorer.processor.split_reasons("Answer: yes") == ""
    assert scorer.processor.split_reasons("  Answer: a\nAnswer: yes") == ""
    assert scorer.processor.split_reasons("The Answer: yes") is None
    batch = scorer.processor(SAMPLES[:1], PROMPTS[:1], REFERENCES[:1], reasons_first=True)
    length = batch["input_ids"].shape[1]
    ids = scorer.processor.append_answers(batch, [True], [""], reasons_first=True)["input_ids"][0, length:]
    assert scorer.processor.tokenizer.decode(ids) == "Answer:\nyes<|im_end|>\n"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_samples": 0}, "`num_samples` is 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"num_samples": 3, "temperature": 0.0}, "`temperature` is 0, with which all of `num_samples=3`"),
        ({"references": None}, "`references` is None, but the judge is pairwise"),
        ({"images": [b"no image", *SAMPLES[1:]]}, r"`images\[0\]` cannot be read"),
        ({"references": [*REFERENCES[:2], b"no image"], "num_samples": 2}, r"`references\[2\]` cannot be read"),
    ],
)
def test_wrong_arguments(judges, arguments, match):
    """What cannot be done is refused by name, before anything is generated."""
    arguments = {"images": SAMPLES, "prompts": PROMPTS, "references": REFERENCES, **arguments}
    with pytest.raises(ValueError, match=match):
        judges("internvl").reason(**arguments)


def test_other_paradigms(vlm_folder):
    """A pointwise judge is asked about one sample; a regressive one gives no answers."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="regressive")
    scorer = RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(vlm_folder("internvl")))
    with pytest.raises(ValueError, match="judge is regressive and gives no answer"):
        scorer.reason(SAMPLES, PROMPTS)
    scorer = RewardDanceScorer.from_pretrained(vlm_folder("internvl"), paradigm="pointwise")
    with pytest.raises(NoAnswerError, match="3 of 3 chains"):
        scorer.reason(SAMPLES, PROMPTS, max_new_tokens=2)
    ids = scorer.processor(SAMPLES[:1], PROMPTS[:1], reasons_first=True)["input_ids"][0]
    assert "a high-quality result by these criteria? Give your reasons" in scorer.processor.tokenizer.decode(ids)


def test_nan_is_an_error(judges, monkeypatch):
    """A score that is NaN for another reason than a missing answer is not taken for one."""
    scorer = judges("internvl")
    monkeypatch.setattr(scorer.model.config, "score_temperature", float("nan"))
    with pytest.raises(NonFiniteScoreError, match=r"rows \[0, 1, 2\] are NaN"):
        scorer.reason(SAMPLES, PROMPTS, REFERENCES, max_new_tokens=40)
