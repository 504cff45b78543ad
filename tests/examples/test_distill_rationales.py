"""Distillation of rationales: a server that times out, limits, breaks off and talks nonsense; and a real tiny teacher."""

import argparse
import base64
import importlib.util
import io
import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf import (
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
)


EXAMPLE = Path(__file__).parents[2] / "examples" / "distill_rationales.py"


@pytest.fixture(scope="module")
def distill():
    spec = importlib.util.spec_from_file_location("distill_rationales", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Teacher(ThreadingHTTPServer):
    """
    Chat endpoint on loopback that prefers red images. `faults` holds, for a prompt, what goes wrong with the next requests
    about it; `says` how it answers in place of giving reasons and the right verdict.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[str, list] = {}
        self.says: dict[str, str] = {}
        self.answered: Counter = Counter()
        self.times: dict[str, list[float]] = {}
        self.bodies: list[dict] = []
        self.keys: set = set()
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1/"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][-1]["content"]
        text = "".join(part.get("text", "") for part in parts)
        prompt = json.loads(text.partition("Generation prompt: ")[2].splitlines()[0])
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        server = self.server
        with server.lock:
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization"))
            server.times.setdefault(prompt, []).append(time.monotonic())
            fault = server.faults[prompt].pop(0) if server.faults.get(prompt) else None
        if fault == "hang":
            time.sleep(0.8)
            return
        if fault == "break off":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            return
        if isinstance(fault, str):
            return self.reply(200, fault)
        if fault is not None:
            return self.reply(fault[0], json.dumps({"error": "fault"}), *fault[1:])
        red_is_second = images[1].getpixel((0, 0))[0] > 200
        word = "yes" if red_is_second else "no"
        order = "yes" if red_is_second else "no"
        said = server.says.get(prompt, "The {order} order shows it.\nAnswer: {word}").format(order=order, word=word)
        with server.lock:
            server.answered[prompt, order] += 1
        self.reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}))

    def reply(self, status, text, *headers):
        content = text.encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def make_pairs(folder, prompts, **columns):
    rows = [
        {
            "prompt": p,
            "chosen": Image.new("RGB", (28, 28), "red"),
            "rejected": Image.new("RGB", (28, 28), "blue"),
            **columns,
        }
        for p in prompts
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


@pytest.fixture
def ask(distill, tmp_path, vlm_folder):
    """Function that runs the example against an address, with short pauses."""

    def run(dataset, address, **changes):
        arguments = {
            "dataset": str(dataset),
            "output": str(tmp_path / "out"),
            "teacher": "served",
            "processor": str(vlm_folder("internvl")),
            "base_url": address,
            "timeout": 0.4,
            "backoff": 0.01,
            "max_retries": 2,
            "concurrency": 3,
            **changes,
        }
        pairs = [part for name, value in arguments.items() if value is not None for part in (f"--{name}", str(value))]
        return distill.main(distill.make_parser().parse_args(pairs))

    return run


def test_faults_of_an_endpoint_lose_nothing(ask, tmp_path, monkeypatch, capsys):
    """Time-outs, limits, server errors, broken and senseless answers are asked again, and every pair is kept, once."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    faults = {
        "hangs": ["hang"],
        "limits": [(429, ("Retry-After", "1"))],
        "overloaded": [(503,), (500,)],
        "breaks off": ["break off"],
        "no json": ["<html>gateway</html>"],
        "no text": ['{"choices": [{"message": {"content": null}}]}', '{"choices": []}'],
    }
    dataset = make_pairs(tmp_path / "pairs", [*faults, "fine"])
    with Teacher() as server:
        server.faults = {prompt: list(fault) for prompt, fault in faults.items()}
        summary = ask(dataset, server.address)
        assert set(server.answered.values()) == {1}  # each order of each pair, once
        assert len(server.answered) == 14
        waits = sorted(server.times["limits"])
        assert waits[-1] - waits[0] >= 1.0
        assert server.keys == {"Bearer secret"}
    assert summary["kept"] == 7
    assert summary["answers"] == {"right": 14}
    assert summary["retries"]["HTTP 429"] == 1
    assert summary["retries"]["HTTP 503"] == summary["retries"]["HTTP 500"] == 1
    assert summary["retries"]["timed out"] >= 1
    assert summary["retries"]["nonsense"] == 3
    assert summary["retries"]["connection"] >= 1
    out = capsys.readouterr().out
    assert "kept 7 of 7 rows" in out
    assert "secret" not in out + (tmp_path / "out" / "answers.jsonl").read_text()
    rows = datasets.load_from_disk(str(tmp_path / "out" / "dataset"))
    assert rows["rationale"] == [{"yes": "The yes order shows it.", "no": "The no order shows it."}] * 7


def test_only_right_verdicts_are_kept_and_all_others_counted(ask, tmp_path, vlm_folder, distill):
    """A pair whose verdict is wrong, missing or without reasons in one order is dropped, and why is counted."""
    says = {
        "always yes": "It is red.\nAnswer: yes",
        "no verdict": "It is red.",
        "perhaps": "It is red.\nAnswer: perhaps",
        "no reasons": "Answer: {word}",
        "loud": "It is **red**.\n\nAnswer:\n**{word}.**",
    }
    dataset = make_pairs(tmp_path / "pairs", [*says, "fine", "too long"])
    with Teacher() as server:
        server.says = says
        server.faults = {"too long": [(400,), (400,)]}
        summary = ask(dataset, server.address)
        request = server.bodies[0]
    answers = summary["answers"]
    assert summary["kept"] == 2
    assert answers.pop("right") == 5
    assert answers.pop("wrong verdict") == 1
    assert answers.pop("no verdict") == 4
    assert answers.pop("no reasons") == 2
    ((refused, count),) = answers.items()
    assert (refused[:17], count) == ("refused (HTTP 400", 2)
    rows = datasets.load_from_disk(str(tmp_path / "out" / "dataset"))
    assert rows["prompt"] == ["loud", "fine"]
    assert rows[0]["rationale"]["yes"] == "It is **red**."
    assert request["model"] == "served"
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    asked = "".join(part.get("text", "") for part in request["messages"][-1]["content"])
    assert asked.endswith(processor.prompt_texts["pairwise_reasons_question"].format(noun="image"))
    # What was written trains a judge.
    trainer = RewardDanceTrainer(
        model=str(vlm_folder("internvl")),
        args=RewardDanceTrainingArguments(
            str(tmp_path / "judge"),
            rationale="mixed",
            max_steps=1,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
    )
    assert trainer.train().training_loss > 0


def test_interrupted_runs_go_on(ask, tmp_path):
    """After a stop and a line that was cut off only what is missing is asked; a longer run asks only about new rows."""
    dataset = make_pairs(tmp_path / "pairs", [f"pair {i}" for i in range(6)])
    file = tmp_path / "out" / "answers.jsonl"
    with Teacher() as server:
        server.faults = {"pair 3": [(401,)]}
        with pytest.raises(SystemExit, match=r"answers HTTP 401: .* Check `--base_url`"):
            ask(dataset, server.address, concurrency=2)
        lines = file.read_bytes().splitlines(keepends=True)
        assert 1 + sum(server.answered.values()) == len(lines)  # what was under way is kept
        file.write_bytes(b"".join(lines) + lines[-1][: len(lines[-1]) // 2])
        before = Counter(server.answered)
        summary = ask(dataset, server.address, limit=5)
        assert summary["kept"] == 5
        assert (server.answered - before).total() == 10 - before.total()
        assert ask(dataset, server.address)["kept"] == 6
        assert set(server.answered.values()) == {1}
        count = len(server.bodies)
        assert ask(dataset, server.address)["kept"] == 6
        assert len(server.bodies) == count
        with pytest.raises(SystemExit, match="holds answers to other questions"):
            ask(dataset, server.address, teacher="another")
    other = make_pairs(tmp_path / "others", [f"other {i}" for i in range(6)])
    (tmp_path / "pairs").rename(tmp_path / "old")
    other.rename(tmp_path / "pairs")
    with pytest.raises(SystemExit, match="Row 0 has another prompt"):
        ask(tmp_path / "pairs", "http://127.0.0.1:9/v1")


def test_an_endpoint_that_is_down_stops_the_run(ask, tmp_path, capsys):
    """Single questions without an answer are left for the next run; many in a row stop this one."""
    dataset = make_pairs(tmp_path / "pairs", ["a", "b", "c", "d"])
    with Teacher() as server:
        server.faults = {"b": [(503,)] * 3}
        summary = ask(dataset, server.address, concurrency=1)
        assert (summary["kept"], summary["answers"]) == (3, {"right": 7, "not answered": 1})
        assert "1 questions got no answer now: run the same command again" in capsys.readouterr().out
        assert ask(dataset, server.address)["kept"] == 4
        address = server.address
    more = make_pairs(tmp_path / "more", ["e", "f", "g"])
    with pytest.raises(SystemExit, match="2 questions in a row got no answer from .*refused"):
        ask(more, address, output=tmp_path / "out2", max_failures=2, max_retries=1, concurrency=1)


def test_retry_after(distill):
    """A pause may be given in seconds or as a date, and nonsense is no pause."""
    assert distill._retry_after("2.5") == 2.5
    assert distill._retry_after(None) == distill._retry_after("soon") == distill._retry_after("-3") == 0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 50 < distill._retry_after(date) <= 60


def test_unreadable_rows_and_ties_are_dropped(ask, tmp_path):
    """A corrupt image and a tie stop nothing, are not asked about, and are counted."""
    file = tmp_path / "pairs.jsonl"
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    Image.new("RGB", (28, 28), "blue").save(tmp_path / "blue.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    pair = {"chosen": str(tmp_path / "red.png"), "rejected": str(tmp_path / "blue.png"), "tie": False}
    rows = [
        {"prompt": "fine", **pair},
        {"prompt": "broken", **pair, "chosen": str(tmp_path / "broken.png")},
        {"prompt": "tie", **pair, "tie": True},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Teacher() as server:
        summary = ask(file, server.address)
        assert set(server.answered) == {("fine", "yes"), ("fine", "no")}
    assert summary["kept"] == 1
    assert summary["answers"]["tie"] == 2
    assert sum(count for kind, count in summary["answers"].items() if "unreadable" in kind) == 2


@pytest.fixture(scope="module")
def local_teacher(vlm_folder, tmp_path_factory):
    """Tiny model that learned the answers about the first two of three pairs by heart."""
    torch.manual_seed(0)
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    pairs = [(random_image(i), random_image(10 + i)) for i in range(2)]
    samples, references = zip(*pairs, *((b, a) for a, b in pairs), strict=True)
    questions = processor(list(samples), ["p0", "p1"] * 2, list(references), reasons_first=True)
    answers = [True, True, False, False]
    batch = processor.append_answers(questions, answers, ["red"] * 4, reasons_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(80):
        model(**batch, labels=torch.tensor(answers).float()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_teacher_of_transformers(ask, tmp_path, local_teacher):
    """A local model answers in batches; what it does not know is dropped; a second run does not load images again."""
    rows = [
        {"prompt": f"p{i}", "chosen": random_image(i), "rejected": random_image(10 + i), "rationale": "old"}
        for i in range(2)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "pairs"))
    arguments = {"teacher": local_teacher, "processor": None, "max_new_tokens": 12, "batch_size": 3}
    summary = ask(tmp_path / "pairs", None, **arguments)
    assert summary == {"rows": 2, "kept": 2, "answers": {"right": 4}, "retries": {}}
    kept = datasets.load_from_disk(str(tmp_path / "out" / "dataset"))
    assert kept["rationale"] == [{"yes": "red", "no": "red"}] * 2
    content = (tmp_path / "out" / "answers.jsonl").read_bytes()
    ask(tmp_path / "pairs", None, **arguments)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == content
    with pytest.raises(SystemExit, match="No row is left"):
        ask(tmp_path / "pairs", None, **{**arguments, "output": tmp_path / "short", "max_new_tokens": 1})


def test_help_can_be_printed(distill, capsys):
    """Every help text can be rendered."""
    with pytest.raises(SystemExit, match="0"):
        distill.make_parser().parse_args(["--help"])
    assert isinstance(distill.make_parser(), argparse.ArgumentParser)
    assert "--base_url" in capsys.readouterr().out
