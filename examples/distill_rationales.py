# /// script
# dependencies = [
#     "rewarddance_hf[scripts]",
# ]
# ///
"""
Distill chains of thought: ask a teacher why the preferred image of each pair is better, and keep the reasons that lead to
the known label (Section 3.2.1 of the paper).

The teacher is an image-text-to-text model of transformers,

    python examples/distill_rationales.py --dataset me/my-pairs --teacher Qwen/Qwen2.5-VL-72B-Instruct --output outputs/cot

or whatever is served under an OpenAI-compatible address, e.g. by `vllm serve Qwen/Qwen2.5-VL-72B-Instruct`:

    python examples/distill_rationales.py --dataset me/my-pairs --teacher Qwen/Qwen2.5-VL-72B-Instruct \\
        --base_url http://localhost:8000/v1 --concurrency 32 --output outputs/cot

Each pair is asked about in both orders, in the words of the judge (`--processor`) with reasons first. A pair is kept if the
teacher's verdict is right in both: kept for one order only, it would teach that reasons are followed by one of the answers.
Then `load_from_disk("outputs/cot/dataset")` has a column `rationale`, and `RewardDanceTrainer` trains on it with any
`rationale=` format.

Every answer is written to `answers.jsonl` at once. An interrupted run resumes where it stopped, and repeats no question
that was answered; `--limit` may grow between runs. (Both commands were tried with tiny teachers only.)
"""

import argparse
import base64
import email.utils
import hashlib
import http.client
import io
import json
import os
import random
import shutil
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor
from rewarddance_hf.data.preference import check_columns, check_row, row_question
from rewarddance_hf.data.rows import keep_images_encoded
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.scoring.reasoning import generate_texts, read_verdict


ORDERS = ("yes", "no")  # the right verdict: "yes" where the preferred image is shown second
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
REFUSED = (400, 413, 415, 422)  # about this question: too long, image not accepted, content filter
LONGEST_WAIT = 600.0


class RefusedError(Exception):
    """The endpoint will not answer this question, however often it is asked."""


class UnansweredError(Exception):
    """The endpoint did not answer this time."""


@dataclass
class Pair:
    """One pair in one order, with decoded images if it is to be asked."""

    row: int
    order: str
    key: str
    question: "Question | None" = None


class TransformersTeacher:
    """Teacher in this process, which answers batches."""

    def __init__(self, args: argparse.Namespace, processor: RewardDanceProcessor) -> None:
        self.args = args
        self.model = RewardDanceForYesScoring.from_pretrained(args.teacher, dtype="auto", device_map=args.device_map)
        self.model.eval().requires_grad_(False)
        self.processor = RewardDanceProcessor.from_pretrained(
            args.teacher, prompt_texts=processor.prompt_texts, criteria=processor.criteria
        )
        self.retries: Counter[str] = Counter()
        torch.manual_seed(args.seed)

    def answers(self, pairs: Iterator[Pair]) -> Iterator[tuple[Pair, dict[str, str] | None]]:
        """Each question with the text of its answer."""
        for batch in _batches(pairs, self.args.batch_size):
            with torch.no_grad():
                texts = generate_texts(
                    self.model,
                    self.processor,
                    self.processor.encode([pair.question for pair in batch]),
                    self.args.max_new_tokens,
                    self.args.temperature,
                )
            for pair, text in zip(batch, texts, strict=True):
                yield pair, {"text": text}


class EndpointTeacher:
    """Teacher behind an OpenAI-compatible address, which is asked several questions at a time."""

    def __init__(self, args: argparse.Namespace, processor: RewardDanceProcessor) -> None:
        self.args = args
        self.processor = processor
        self.address = args.base_url.rstrip("/") + "/chat/completions"
        self.retries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def answers(self, pairs: Iterator[Pair]) -> Iterator[tuple[Pair, dict[str, str] | None]]:
        """Each question with the text of its answer, the reason why it was refused, or None for no answer now."""
        failed_in_a_row = 0
        running: dict[Future, Pair] = {}
        stop: SystemExit | None = None  # what is under way is waited for and kept
        pool = ThreadPoolExecutor(self.args.concurrency)
        try:
            exhausted = False
            while running or not exhausted:
                while not exhausted and stop is None and len(running) < self.args.concurrency:
                    pair = next(pairs, None)
                    if pair is None:
                        exhausted = True
                    else:
                        running[pool.submit(self.ask, self._body(pair))] = pair
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    pair, answer = running.pop(future), None
                    try:
                        answer = {"text": future.result()}
                    except RefusedError as error:
                        answer = {"refused": str(error)}
                    except SystemExit as error:
                        stop = error
                    except UnansweredError as error:
                        if failed_in_a_row + 1 >= self.args.max_failures:
                            stop = stop or SystemExit(
                                f"{failed_in_a_row + 1} questions in a row got no answer from {self.address} (last: {error}). "
                                "All answers until here are kept: run the same command again when it is up."
                            )
                    failed_in_a_row = failed_in_a_row + 1 if answer is None else 0
                    yield pair, answer
                if stop is not None:
                    self._closed.set()
            if stop is not None:
                raise stop
        finally:
            self._closed.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _body(self, pair: Pair) -> bytes:
        messages, images = self.processor.write_messages(pair.question)
        rest = iter(images)
        for message in messages:
            message["content"] = [
                {"type": "image_url", "image_url": {"url": _data_url(next(rest))}} if part["type"] == "image" else part
                for part in message["content"]
            ]
        body = {
            "model": self.args.teacher,
            "messages": messages,
            "max_tokens": self.args.max_new_tokens,
            "temperature": self.args.temperature,
        }
        return json.dumps(body).encode()

    def ask(self, body: bytes) -> str:
        """Ask until there is an answer: with pauses that double, or as long as the endpoint says."""
        error = ""
        for attempt in range(self.args.max_retries + 1):
            pause = self.args.backoff * 2**attempt * random.uniform(0.5, 1.0)
            try:
                return self._ask_once(body)
            except urllib.error.HTTPError as response:
                detail = f"HTTP {response.code}: {response.read(500).decode(errors='replace')}"
                if response.code in REFUSED:
                    raise RefusedError(detail) from response
                if response.code not in RETRIED:
                    raise SystemExit(
                        f"{self.address} answers {detail}. Check `--base_url`, `--teacher` and the key in "
                        f"`${self.args.api_key_variable}`. All answers until here are kept."
                    ) from response
                kind, error = f"HTTP {response.code}", detail
                pause = max(pause, _retry_after(response.headers.get("Retry-After")))
            except (TimeoutError, urllib.error.URLError, http.client.HTTPException, OSError) as problem:
                timed_out = isinstance(getattr(problem, "reason", problem), TimeoutError)
                kind, error = "timed out" if timed_out else "connection", f"{type(problem).__name__}: {problem}"
            except (ValueError, LookupError, TypeError) as problem:
                kind, error = "nonsense", f"not the answer of a chat: {problem}"
            with self._lock:
                self.retries[kind] += 1
            if attempt == self.args.max_retries or self._closed.wait(min(pause, LONGEST_WAIT)):
                break
        raise UnansweredError(error)

    def _ask_once(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.args.api_key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.address, body, headers)
        with urllib.request.urlopen(request, timeout=self.args.timeout) as response:
            text = json.loads(response.read())["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(f"`content` is {text!r}")
        return text


def _data_url(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _retry_after(value: str | None) -> float:
    """Seconds to wait before the next try, given as such or as a date."""
    try:
        return max(float(value or 0), 0.0)
    except ValueError:
        pass
    try:
        return max((email.utils.parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return 0.0


def _batches(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    batch = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class Answers:
    """
    File of answers, one a line, which is never rewritten: the settings, then `{"row", "order", "key", "text"}`, or `"refused"`
    in place of `"text"`. A last line that was cut off by a kill is removed.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.known: dict[tuple[int, str], dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        end = content.rfind(b"\n") + 1
        lines = [json.loads(line) for line in content[:end].splitlines()]
        if lines and lines[0] != {"settings": settings}:
            raise SystemExit(
                f"{path} holds answers to other questions ({lines[0]}), not to {settings}. Choose another `--output`, or remove it."
            )
        self.known = {(line["row"], line["order"]): line for line in lines[1:]}
        self._file = path.open("ab")
        self._file.truncate(end)
        if not lines:
            self._write({"settings": settings})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, pair: Pair, answer: dict[str, str]) -> None:
        line = {"row": pair.row, "order": pair.order, "key": pair.key, **answer}
        self._write(line)
        self.known[pair.row, pair.order] = line

    def close(self) -> None:
        self._file.close()


def _key(row: dict[str, Any]) -> str:
    return hashlib.sha256(str(row.get("prompt")).encode()).hexdigest()[:16]


def ask_all(rows: Any, teacher: Any, processor: RewardDanceProcessor, answers: Answers) -> int:
    """Ask what is not answered yet, and count the questions that got no answer now."""
    for (index, _), line in answers.known.items():
        if index < len(rows) and line["key"] != _key(rows[index]):
            raise SystemExit(
                f"Row {index} has another prompt than when it was asked about. Choose another `--output`."
            )
    todo = [(i, order) for i in range(len(rows)) for order in ORDERS if (i, order) not in answers.known]
    unanswered = 0
    with tqdm(total=2 * len(rows), initial=2 * len(rows) - len(todo), desc="Asking", unit="question") as progress:

        def pairs() -> Iterator[Pair]:
            for index, order in todo:
                row = rows[index]
                if row.get("tie"):
                    answers.add(Pair(index, order, _key(row)), {"refused": "tie"})
                    progress.update()
                    continue
                try:
                    yield Pair(index, order, _key(row), _question(row, order, processor, f"row {index}"))
                except (TypeError, ValueError) as error:
                    answers.add(Pair(index, order, _key(row)), {"refused": f"unreadable: {error}"})
                    progress.update()

        for pair, answer in teacher.answers(pairs()):
            if answer is None:
                unanswered += 1
            else:
                answers.add(pair, answer)
            progress.update()
    return unanswered


def _question(row: dict[str, Any], order: str, processor: RewardDanceProcessor, name: str) -> Question:
    check_row(row, name)
    question = row_question(row, chosen_second=order == "yes", reasons_first=True)
    columns = ("chosen", "rejected") if order == "yes" else ("rejected", "chosen")
    names = (f"{columns[0]} of {name}", f"{columns[1]} of {name}", f"condition of {name}")
    return processor.load(question, names=names)


def sort_answers(
    count: int, answers: Answers, processor: RewardDanceProcessor
) -> tuple[dict[int, dict[str, str]], Counter[str]]:
    """Rationales by row, of rows whose verdicts are right in both orders; and how many answers are of which kind."""
    kinds: Counter[str] = Counter()
    reasons: dict[int, dict[str, str]] = {}
    for index in range(count):
        for order in ORDERS:
            line = answers.known.get((index, order))
            if line is None:
                kinds["not answered"] += 1
                continue
            if "refused" in line:
                kinds[line["refused"] if line["refused"] == "tie" else f"refused ({line['refused'][:60]})"] += 1
                continue
            text, verdict = read_verdict(processor, line["text"])
            if verdict is None:
                kinds["no verdict"] += 1
            elif verdict != (order == "yes"):
                kinds["wrong verdict"] += 1
            elif not text:
                kinds["no reasons"] += 1
            else:
                kinds["right"] += 1
                reasons.setdefault(index, {})[order] = text
    return {index: texts for index, texts in reasons.items() if len(texts) == len(ORDERS)}, kinds


def load_rows(args: argparse.Namespace) -> datasets.Dataset:
    """Preference rows as a dataset with encoded images."""
    if args.dataset == "shapes":
        from rewarddance_hf.shapes.loading import load_shapes

        columns = ("prompt", "chosen", "rejected", "criteria")
        shapes = load_shapes(args.split, args.limit or 1000)
        rows = [{name: shapes[i].get(name) for name in columns} for i in range(len(shapes))]
        dataset = datasets.Dataset.from_list(rows)
    elif os.path.isdir(args.dataset) and not any(Path(args.dataset).glob("*.parquet")):
        dataset = datasets.load_from_disk(args.dataset)
        dataset = dataset[args.split] if isinstance(dataset, datasets.DatasetDict) else dataset
    elif args.dataset.endswith((".json", ".jsonl")):
        dataset = datasets.load_dataset("json", data_files=args.dataset, split="train")
    else:
        dataset = datasets.load_dataset(args.dataset, split=args.split)
    check_columns(dataset.column_names, args.dataset)
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    return dataset


def main(args: argparse.Namespace) -> dict[str, Any]:
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    dataset = load_rows(args)
    processor = RewardDanceProcessor.from_pretrained(args.processor or args.teacher)
    settings = {
        **{name: getattr(args, name) for name in ("dataset", "split", "teacher", "temperature", "max_new_tokens")},
        "question": processor.prompt_texts["pairwise_reasons_question"],
    }
    answers = Answers(output / "answers.jsonl", settings)
    teacher = (TransformersTeacher if args.base_url is None else EndpointTeacher)(args, processor)
    try:
        unanswered = ask_all(keep_images_encoded(dataset), teacher, processor, answers)
    finally:
        answers.close()
        if teacher.retries:
            print("asked again because of: " + ", ".join(f"{kind} {n}" for kind, n in teacher.retries.items()))
    kept, kinds = sort_answers(len(dataset), answers, processor)
    print("answers: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    print(f"kept {len(kept)} of {len(dataset)} rows, whose verdicts are right in both orders")
    if unanswered:
        print(f"{unanswered} questions got no answer now: run the same command again to ask them")
    summary = {"rows": len(dataset), "kept": len(kept), "answers": dict(kinds), "retries": dict(teacher.retries)}
    (output / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    if not kept:
        raise SystemExit(
            f"No row is left. See `text` in {output / 'answers.jsonl'}: a teacher that never ends in "
            f"{processor.prompt_texts['answer']!r} needs more `--max_new_tokens`, or is too weak."
        )
    rows = dataset.select(list(kept))
    rows = rows.remove_columns([name for name in ("rationale",) if name in rows.column_names])
    rows = rows.add_column("rationale", list(kept.values()))
    rows.save_to_disk(str(output / "dataset.new"))
    shutil.rmtree(output / "dataset", ignore_errors=True)
    (output / "dataset.new").rename(output / "dataset")
    print(f"written to {output / 'dataset'}")
    return summary


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Distill chains of thought from a teacher.")
    add = parser.add_argument
    add("--dataset", required=True, help="Hub repository, folder of `save_to_disk`, JSON lines, or 'shapes'.")
    add("--split", default="train")
    add("--limit", type=int, help="Number of rows. Defaults to all.")
    add("--output", required=True, help="Folder for answers and the dataset.")
    add("--teacher", required=True, help="Model of transformers, or the name under which the endpoint serves it.")
    add(
        "--processor", help="Judge that asks, in its words. Defaults to the teacher; needed if that is not on the Hub."
    )
    add(
        "--base_url", help="OpenAI-compatible address, e.g. http://localhost:8000/v1. Without it transformers is used."
    )
    add("--api_key_variable", default="OPENAI_API_KEY", help="Environment variable with the key, if one is needed.")
    add("--max_new_tokens", type=int, default=512)
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0, help="Of sampling with transformers.")
    add("--batch_size", type=int, default=8, help="Questions at a time with transformers.")
    add("--device_map", help="Device of the teacher with transformers, e.g. auto.")
    add("--concurrency", type=int, default=8, help="Questions at a time to the endpoint.")
    add("--timeout", type=float, default=120.0, help="Seconds to wait for the endpoint.")
    add("--max_retries", type=int, default=6, help="How often a question is asked again.")
    add("--backoff", type=float, default=1.0, help="Seconds before a question is asked again, doubled each time.")
    add("--max_failures", type=int, default=10, help="Questions in a row without an answer after which to stop.")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
