"""Scores after reasons: the judge thinks first, and its answer is read where the reasons end (Section 3.2.1)."""

from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from ..checks import check_integers
from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..models.question_rewarddance import Question
from .judge import Judge, non_finite_error


logger = logging.get_logger(__name__)

SAMPLING_TEMPERATURE = 0.7  # of self-consistency, https://huggingface.co/papers/2203.11171


@dataclass(frozen=True, eq=False)
class ReasonedScores:
    """
    Rewards of samples, each read after one or several chains of thought. Tensors are on the CPU.

    Args:
        scores (`torch.Tensor` of shape `(n,)`):
            Mean reward over the chains that reached an answer; NaN where none did.
        std (`torch.Tensor` of shape `(n,)`):
            Standard deviation of the same rewards (of the population: 0 for a single one).
        sample_scores (`torch.Tensor` of shape `(n, num_samples)`):
            Reward after each chain; NaN where it did not reach an answer.
        texts (`list[list[str]]`):
            Reasons of each chain, up to the answer; all that was generated where there is none.
        num_failed (`int`):
            Number of chains that did not reach an answer.
    """

    scores: torch.Tensor
    std: torch.Tensor
    sample_scores: torch.Tensor
    texts: list[list[str]]
    num_failed: int


class NoAnswerError(ValueError):
    """
    No chain of thought reached an answer.

    Args:
        message (`str`):
            What went wrong and what to do.
        texts (`list[list[str]]`):
            What was generated for each sample.
    """

    def __init__(self, message: str, texts: list[list[str]]) -> None:
        super().__init__(message)
        self.texts = texts


def read_verdict(processor: RewardDanceProcessor, text: str) -> tuple[str | None, bool | None]:
    """
    Reasons and verdict in the whole text of a judge that was asked for reasons first. The reasons are None if the text does not
    reach an answer, and the verdict is None if it is neither "yes" nor "no", whatever its case and punctuation.
    """
    reasons = processor.split_reasons(text)
    if reasons is None:
        return None, None
    answer = f"\n{text.strip()}".partition(processor.prompt_texts["answer"].rstrip())[2].split(maxsplit=1)
    word = answer[0].strip("\"'*`.,!").lower() if answer else ""
    verdicts = {processor.yes_word.lower(): True, processor.no_word.lower(): False}
    return reasons, verdicts.get(word)


def generate_texts(
    model: RewardDanceForYesScoring,
    processor: RewardDanceProcessor,
    batch: BatchFeature,
    max_new_tokens: int,
    temperature: float = 0.0,
    until_answer: bool = False,
) -> list[str]:
    """
    What the judge says after each question of a batch: `max_new_tokens` at most, and with `until_answer` where the reasons end.
    A `temperature` of 0 takes the most probable tokens.
    """
    tokenizer = processor.tokenizer
    known = model.vlm.generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    names = ("rationale_labels", "answer_index")
    inputs = {name: value for name, value in batch.to(model.device).items() if name not in names}
    length = inputs["input_ids"].shape[1]
    tokens = model.vlm.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}),
        **({"stopping_criteria": StoppingCriteriaList([_AnswerReached(processor, length)])} if until_answer else {}),
    )
    return [text.strip() for text in tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)]


class _AnswerReached(StoppingCriteria):
    """Ends each row where its reasons end; the rest of the batch goes on."""

    def __init__(self, processor: RewardDanceProcessor, start: int) -> None:
        self.processor = processor
        self.start = start
        self.phrase = processor.prompt_texts["answer"].rstrip()
        self.window = len(self.phrase.encode()) + 4  # a token is one byte or more

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        first = max(self.start, input_ids.shape[1] - self.window)
        texts = self.processor.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
        split, is_whole = self.processor.split_reasons, first == self.start
        done = [split(text) is not None if is_whole else self.phrase in text for text in texts]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def score_with_reasons(
    judge: Judge,
    questions: list[Question],
    num_samples: int,
    max_new_tokens: int,
    temperature: float | None,
    seed: int,
    show_progress: bool,
) -> ReasonedScores:
    """
    Generate reasons, and read the reward where they end; see [`RewardDanceScorer.reason`].

    The text is tokenized anew, as in training, so that the reward is a function of question and text.
    """
    model, processor, batch_size = judge.model, judge.processor, judge.batch_size
    if temperature is None:
        temperature = 0.0 if num_samples == 1 else SAMPLING_TEMPERATURE
    check_integers(num_samples=num_samples, max_new_tokens=max_new_tokens)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"`temperature` is {temperature}, but must be 0 or a positive number. 0 does not sample.")
    if num_samples > 1 and temperature == 0:
        raise ValueError(
            f"`temperature` is 0, with which all of `num_samples={num_samples}` chains of thought would be the same. Pass "
            f"e.g. `temperature={SAMPLING_TEMPERATURE}`, or `num_samples=1`."
        )
    if model.config.has_scalar_head:
        raise ValueError(
            "The judge is regressive and gives no answer that reasons could precede. Load a pairwise or pointwise judge."
        )
    # Each image is decoded once, and before anything is generated.
    rows = [loaded for loaded in map(processor.load, questions) for _ in range(num_samples)]
    texts: list[str] = []
    scores = torch.full((len(rows),), torch.nan)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        tqdm(total=len(rows), desc="Reasoning", unit="chain", disable=not show_progress) as progress,
    ):
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = processor.encode(rows[start : start + batch_size])
            copy = BatchFeature(dict(batch))
            generated = generate_texts(model, processor, copy, max_new_tokens, temperature, until_answer=True)
            reasons = [_usable_reasons(processor, text) for text in generated]
            answered = torch.tensor([text is not None for text in reasons])
            if answered.any():
                # Rows without an answer are computed along, and not read.
                batch = processor.append_answers(batch, [True] * len(reasons), [text or "" for text in reasons], True)
                batch["rationale_labels"].fill_(-100)  # logits at the answer only
                output = model(**batch.to(model.device))
                scores[start : start + batch_size] = output.scores.float().cpu().where(answered, torch.nan)
                bad = answered & ~(output.scores.isfinite() & output.logits[:, 0].isfinite()).cpu()
                if bad.any():
                    found = [(start + int(i)) // num_samples for i in bad.nonzero()[:, 0]]
                    raise non_finite_error(found, scores[: start + batch_size])
            texts += [text if reason is None else reason for text, reason in zip(generated, reasons, strict=True)]
            progress.update(len(reasons))

    scores = scores.view(-1, num_samples)
    all_texts = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
    _report_failures(processor, scores.isnan(), all_texts, max_new_tokens)
    mean = scores.nanmean(dim=1)
    std = (scores - mean[:, None]).square().nanmean(dim=1).sqrt()
    return ReasonedScores(mean, std, scores, all_texts, num_failed=int(scores.isnan().sum()))


def _usable_reasons(processor: RewardDanceProcessor, text: str) -> str | None:
    """Reasons before an answer, or None if there is no answer or they cannot be written as plain text."""
    reasons = processor.split_reasons(text)
    try:
        return None if reasons is None else processor.plain_text(reasons)
    except ValueError:
        return None


def _report_failures(
    processor: RewardDanceProcessor, failed: torch.Tensor, texts: list[list[str]], max_new_tokens: int
) -> None:
    if not failed.any():
        return
    what = (
        f"{int(failed.sum())} of {failed.numel()} chains of thought did not reach {processor.prompt_texts['answer']!r} in "
        f"{max_new_tokens} tokens"
    )
    fix = "Raise `max_new_tokens`, or train the judge with `rationale='reasons_first'`"
    if failed.all():
        raise NoAnswerError(f"{what}, so that there is no score. {fix}. It says, e.g.: {texts[0][0][-300:]!r}", texts)
    rows = failed.any(dim=1).nonzero()[:, 0].tolist()
    named = f"{rows[:20]}{' and others' if len(rows) > 20 else ''}"
    logger.warning(
        f"{what} and are left out as NaN (rows {named}). {fix}. Silence this with "
        "`transformers.utils.logging.set_verbosity_error()`."
    )
