"""A judge that an engine serves: questions are written here, and the engine gives the log-probabilities of both answers."""

import base64
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..import_utils import require_extra
from ..models import RewardDanceConfig, RewardDanceProcessor
from ..models.question_rewarddance import Question
from ..scoring.dataset import DatasetScoring
from ..scoring.judge import non_finite_error
from ..scoring.scorer import RewardDanceScorer
from .errors import RemoteRewardError
from .export import JUDGE_FOLDER, SCORE_FILE


require_extra("serve", "httpx2")

from .transport import Transport  # noqa: E402


CHAT = "/v1/chat/completions"
PROBE = Image.new("RGB", (64, 64), "red")
LARGEST_SURPRISE = 1e-3  # of the probe: how far log-odds at temperature 2 may be from half of those at 1


@dataclass(frozen=True)
class Reply:
    """What an engine says about one question: log-probabilities of both answers, and the tokens that it was asked with."""

    yes: float
    no: float
    prompt_token_ids: list[int] | None


class ConfiguredModule(torch.nn.Module):
    """A model without weights, which are elsewhere; its configuration says what they are for."""

    def __init__(self, config: RewardDanceConfig) -> None:
        super().__init__()
        self.config = config


class EngineJudge(RewardDanceScorer):
    r"""
    Judge that an engine serves which speaks OpenAI's protocol and gives log-probabilities of chosen tokens, such as vLLM with a
    folder of `rewarddance export`. It scores, compares and ranks as a [`RewardDanceScorer`]; there is no gradient.

    The question is written here, so that no text of users becomes a special token; images are sent as PNG. One token is asked
    for, with `logprob_token_ids` of both answers: the most probable tokens alone often hold neither of them.

    Args:
        url (`str` or `list[str]`):
            Address of the engine, or of several with the same judge.
        judge (`str` or `os.PathLike`):
            Folder of `rewarddance export`.
        token (`str`, *optional*):
            Token that the engine wants.
        model (`str`, *optional*):
            Name of the judge there. Defaults to the only one.
        timeout, max_wait:
            As in [`RemoteReward`].
        num_workers (`int`, *optional*, defaults to `16`):
            Questions on their way at a time.

    Raises:
        `ValueError`: If the folder is no export, or the engine cannot give what the reward of this judge needs.
        `RemoteRewardError`: If the engine does not answer.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        judge: str | os.PathLike,
        token: str | None = None,
        model: str | None = None,
        timeout: float = 300.0,
        max_wait: float = 600.0,
        num_workers: int = 16,
    ) -> None:
        self.folder = place = Path(judge)
        try:
            self.settings = json.loads((place / SCORE_FILE).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"`judge` {os.fspath(judge)!r} has no `{SCORE_FILE}`. Pass the folder of `rewarddance export`."
            ) from error
        names = ("paradigm", "yes_token_id", "no_token_id", "score_normalization", "score_temperature")
        self.model = ConfiguredModule(RewardDanceConfig(**{name: self.settings[name] for name in names}))  # type: ignore[assignment]
        self.processor = RewardDanceProcessor.from_pretrained(place / JUDGE_FOLDER)
        self.batch_size = num_workers
        self.statistics = None
        self._engine = None
        self._kept = None
        self._transport = Transport([url] if isinstance(url, str) else url, token, timeout, max_wait)
        self.served_model = model or self._find_model()
        self.is_processed = self._probe()

    def fingerprint(self) -> dict[str, Any]:
        """That of the judge that was exported, and that an engine computes it."""
        return {**self.settings["fingerprint"], "engine": "openai"}

    def with_batch_size(self, batch_size: int) -> "EngineJudge":
        """The same: the engine chooses."""
        return self

    def stream(
        self,
        questions: Iterable[Question],
        on_progress: Callable[[int], Any] = lambda count: None,
        session: Any = None,
        window: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-odds and scores of questions, as in [`~RewardDanceScorer.stream`]."""
        known: list[torch.Tensor] = []
        numbered = (q if q.row is not None else replace(q, row=i) for i, q in enumerate(questions))
        with ThreadPoolExecutor(self.batch_size) as threads:
            while batch := [self._load(question) for question in islice(numbered, window or 4 * self.batch_size)]:
                replies = list(threads.map(self.ask_engine, batch))
                logits, scores = (torch.tensor(values) for values in zip(*map(self.read_reply, replies), strict=True))
                on_progress(len(batch))
                count = sum(map(len, known))
                known.append(scores)
                bad = (~(logits.isfinite() & scores.isfinite())).nonzero()[:, 0].tolist()
                if bad:
                    raise non_finite_error([count + i for i in bad], torch.cat(known))
                yield logits, scores

    stream_windows = DatasetScoring.stream_windows  # type: ignore[assignment]  # nothing is prepared ahead

    def compare(self, *args: Any, explain: bool = False, **kwargs: Any) -> Any:
        """As [`RewardDanceScorer.compare`], without `explain`."""
        if explain:
            raise NotImplementedError(
                "`explain` is True, but an engine is asked for one token only. Load the judge for it."
            )
        return super().compare(*args, **kwargs)

    def reason(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: an engine is asked for one token only."""
        raise NotImplementedError(
            "`reason` needs the judge itself, as an engine is asked for one token only. Load it."
        )

    def ask_engine(self, question: Question, temperature: float | None = None, others: Sequence[int] = ()) -> Reply:
        """What the engine says about a loaded question. It must know the log-probabilities of `others`, too."""
        row = 0 if question.row is None else question.row
        config = self.model.config
        asked = [config.yes_token_id, config.no_token_id, *others]
        body = {
            "model": self.served_model,
            "messages": self.write_request(question),
            "max_tokens": 1,
            "temperature": config.score_temperature if temperature is None else temperature,
            "top_p": 1.0,
            "logprobs": True,
            "logprob_token_ids": asked,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
            "add_generation_prompt": True,
        }
        answer = self._transport.post_json(CHAT, body, [row])
        try:
            (choice,) = answer["choices"]
            found = {entry["token"]: entry["logprob"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
            yes, no, *_ = (float(found[f"token_id:{token}"]) for token in asked)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RemoteRewardError(
                f"Sample {row} has no reward: the engine did not give the log-probabilities of the tokens "
                f"{asked}. It must support `logprob_token_ids` and `return_tokens_as_token_ids`.",
                [row],
            ) from error
        return Reply(yes, no, answer.get("prompt_token_ids") or choice.get("prompt_token_ids"))

    def write_request(self, question: Question) -> list[dict[str, Any]]:
        """Messages of a loaded question, with images as PNG."""
        messages, images = self.processor.write_messages(question)
        rest = iter(images)

        def part(given: dict[str, Any]) -> dict[str, Any]:
            if given["type"] != "image":
                return given
            return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(next(rest))}"}}

        return [{**message, "content": [part(given) for given in message["content"]]} for message in messages]

    def _load(self, question: Question) -> Question:
        with torch.no_grad():
            loaded = self.processor.load(question)
        media = (question.sample, question.reference, question.condition)
        frames = [frame for one in media for frame in (one if isinstance(one, (list, tuple)) else [one])]
        if torch.is_grad_enabled() and any(getattr(frame, "requires_grad", False) for frame in frames):
            raise NotImplementedError(
                f"`{question.names[0]}` or what it is shown with requires a gradient, but engines give none. Detach it, or "
                "serve the judge with `rewarddance serve`."
            )
        return loaded

    def read_reply(self, reply: Reply) -> tuple[float, float]:
        """Log-odds and reward of an answer (Eq. 2)."""
        config = self.model.config
        divisor = 1.0 if self.is_processed else config.score_temperature
        logits = (reply.yes - reply.no) / divisor
        if config.score_normalization == "yes_no":
            return logits, 1 / (1 + math.exp(-logits)) if logits > -700 else 0.0
        return logits, math.exp(reply.yes)

    def _find_model(self) -> str:
        served = [model["id"] for model in self._transport.get("/v1/models")["data"]]
        if len(served) != 1:
            raise ValueError(f"`model` is None, but the engine serves {served}. Choose one of them.")
        return served[0]

    def _probe(self) -> bool:
        """
        Whether log-probabilities are those after the temperature. Refuses an engine that does not give what is asked for,
        and a judge whose reward it cannot give.
        """
        answers = (self.model.config.yes_token_id, self.model.config.no_token_id)
        question = Question(PROBE, "a red square", PROBE if self.is_pairwise else None)
        size = len(self.processor.tokenizer)
        # Both answers may be among the most probable tokens by chance, but not these as well.
        others = [token for token in range(0, size, max(1, size // 32)) if token not in answers][:32]
        replies = [self.ask_engine(self.processor.load(question), temperature, others) for temperature in (1.0, 2.0)]
        for reply in replies:
            if max(reply.yes, reply.no) > 0 or not math.isfinite(reply.yes + reply.no):
                raise ValueError(f"The engine gives {reply.yes} and {reply.no}, which are no log-probabilities.")
        first, second = (reply.yes - reply.no for reply in replies)
        tolerance = LARGEST_SURPRISE + 0.02 * abs(first)
        is_raw, is_processed = abs(second - first) < tolerance, abs(second - first / 2) < tolerance
        # Log-probabilities tell them apart where the log-odds are nearly 0.
        if is_raw and is_processed:
            is_raw = abs(replies[1].yes - replies[0].yes) < tolerance
            is_processed = not is_raw
        if not is_raw and not is_processed:
            raise ValueError(
                f"The engine gives the log-odds {first} at temperature 1 and {second} at 2, which is neither."
            )
        config = self.model.config
        if not is_processed and config.score_temperature != 1.0 and config.score_normalization == "vocabulary":
            raise ValueError(
                f"The judge has the temperature {config.score_temperature} over the whole vocabulary, but the engine gives "
                "log-probabilities before it. Start it with `--logprobs-mode processed_logprobs`."
            )
        return is_processed


def _png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
