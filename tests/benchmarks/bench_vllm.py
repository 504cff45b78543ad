"""
The engine beside a real vLLM on this CPU, which has an environment of its own (`make test-vllm` makes it): the same judge, prompts
and pixels, float32, one thread each, by turns. Images have the judge's own size, so that nothing is resized, and are new in
each round: what vLLM keeps of earlier questions helps it within a round, as it does the engine.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judges import PROMPT, make_judge, tiny_config
from timing import timed


TESTS = Path(__file__).parents[1]
PYTHON = Path(f"{sys.prefix}-vllm") / "bin" / "python"
NUM_TOKENS = 64
ROUNDS = 3
LARGEST_DIFFERENCE = 1e-4  # of log-odds
NUM_IMAGES = {"round_robin": 16, "distinct_pairs": 64}


@contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen]:
    """Process of vLLM with an exported judge, which is ready."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS / "serving" / "vllm_site"), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(PYTHON), str(Path(__file__).with_name("vllm_process.py")), str(folder)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            if process.stdout.readline() != "ready\n":
                log.seek(0)
                raise RuntimeError(f"vLLM did not start: {log.read()[-3000:]}")
            yield process
        finally:
            process.kill()  # it holds nothing
            process.communicate()


@torch.no_grad()
def beside_vllm(size: str, rounds: int = ROUNDS, num_tokens: int = NUM_TOKENS) -> dict[str, float]:
    """Speed of the engine over that of vLLM, for a round robin and for distinct pairs. Nothing where there is no vLLM."""
    if not PYTHON.exists():
        sys.stderr.write(f"{PYTHON} does not exist: no comparison with vLLM. `make test-vllm` installs it.\n")
        return {}
    from rewarddance_hf import RewardDanceScorer
    from rewarddance_hf.serving.export import export_judge

    model, processor = make_judge(num_tokens, "text_first", **tiny_config(size))
    scorer = RewardDanceScorer(model, processor)
    found, differences = {}, []
    with tempfile.TemporaryDirectory() as place:
        scorer.save_pretrained(Path(place) / "judge")
        with started(export_judge(Path(place) / "judge", Path(place) / "export")) as vllm:
            for name, count in NUM_IMAGES.items():
                seconds: dict[str, list[float]] = {"ours": [], "vllm": []}
                for turn in range(rounds + 1):  # the first warms up
                    questions = make_questions(scorer, name, count if turn else 4, num_tokens, turn)
                    file = Path(place) / "questions.npz"
                    write(processor, questions, file)
                    (logits, _), ours = timed(lambda questions=questions: scorer.ask(questions))
                    answer = ask(vllm, file)
                    wanted = processor.encode(questions[:1])["input_ids"][0].tolist()
                    if wanted != answer["token_ids"]:
                        raise RuntimeError("vLLM was asked with other tokens than the engine.")
                    differences.append(float((torch.tensor(answer["log_odds"]) - logits).abs().max()))
                    if turn:
                        seconds["ours"].append(ours)
                        seconds["vllm"].append(answer["seconds"])
                ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
                found[f"{name}_speedup_vs_vllm"] = statistics.median(ratios)
                found[f"{name}_questions_per_second"] = len(questions) / statistics.median(seconds["ours"])
                found[f"{name}_questions_per_second_vllm"] = len(questions) / statistics.median(seconds["vllm"])
    if not max(differences) <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"Log-odds differ by {max(differences)} between the engine and vLLM.")
    return {**found, "largest_difference": max(differences)}


def make_questions(scorer: Any, name: str, count: int, num_tokens: int, seed: int) -> list[Any]:
    """All pairs of some images about one prompt, or each pair of two other images about a prompt of its own."""
    from tiny_vlms import random_image

    from rewarddance_hf.models.question_rewarddance import Question

    side = round(num_tokens**0.5) * 28
    images = [random_image(1000 * seed + i, side, side) for i in range(count)]
    if name == "round_robin":
        pairs = [(images[j], images[i]) for i, j in itertools.permutations(range(count), 2)]
        questions = [Question(sample, PROMPT, reference, row=row) for row, (sample, reference) in enumerate(pairs)]
    else:
        words = PROMPT.split()
        questions = [
            Question(sample, " ".join(words[row % 7 :] + words[: row % 7]) + f" {row}", reference, row=row)
            for row, (sample, reference) in enumerate(zip(images[::2], images[1::2], strict=True))
        ]
    return [scorer.processor.load(question) for question in questions]


def write(processor: Any, questions: list[Any], file: Path) -> None:
    """Prompts and pixels for the process of vLLM. Equal images are one, as they are for the engine."""
    places: dict[int, int] = {}
    images, shown = [], []
    for question in questions:
        for image in question.images:
            if id(image) not in places:
                places[id(image)] = len(images)
                images.append(np.asarray(image))
        shown.append([places[id(image)] for image in question.images])
    prompts = [processor.write_question(question) for question in questions]
    np.savez(file, prompts=prompts, images=images, shown=shown)


def ask(vllm: subprocess.Popen, file: Path) -> dict[str, Any]:
    """What the process answers."""
    vllm.stdin.write(f"{file}\n")
    vllm.stdin.flush()
    return json.loads(vllm.stdout.readline())


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """All measurements by name."""
    return {size: (lambda size=size: beside_vllm(size)) for size in ("13m", "3m")}
