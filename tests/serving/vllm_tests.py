"""A real vLLM serves exported judges on this CPU: `make test-vllm`, in an environment of its own."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from serving.vllm_judges import FAMILIES, save_shapes_judge, save_wide_judge, shapes_questions

from rewarddance_hf import RemoteReward, RewardDanceScorer
from rewarddance_hf.serving.export import export_judge
from rewarddance_hf.serving.parity import ParityReport, compare_with_engine, make_sheet


pytest.importorskip("vllm")
TESTS = Path(__file__).parents[1]
STARTED_WITHIN = float(os.environ.get("VLLM_STARTED_WITHIN", "1800"))  # seconds, for busy machines
BOUNDS = {"float32": 2e-5, "bfloat16": 0.1}  # of log-odds
PILLOW_BOUND, LARGEST_PIXEL_DIFFERENCE = 5e-3, 0.1


@contextmanager
def vllm_server(folder: Path, log: Path, dtype: str):
    """Address of vLLM's own server of OpenAI's protocol, with a folder of `rewarddance export`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "model": folder,
        "served-model-name": "judge",
        "dtype": dtype,
        "max-num-seqs": 16,
        "limit-mm-per-prompt": '{"image": 2, "video": 0}',
        "chat-template-content-format": "openai",
        "host": "127.0.0.1",
        "port": port,
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(TESTS / "serving" / "vllm_site"), str(TESTS), os.environ.get("PYTHONPATH", "")]
        ),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + STARTED_WITHIN
        while True:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx2.HTTPError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end, f"not started: {log.read_text()[-3000:]}"
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def compare(judge: Path, dtype: str, sheet: list, title: str, capsys) -> ParityReport:
    """What vLLM and our own engine say about a sheet of questions, printed with the number of pairs per second."""
    folder = export_judge(judge, judge.parent / "export")
    local = RewardDanceScorer.from_pretrained(judge)
    with vllm_server(folder, judge.parent / "server.log", dtype) as url:
        remote = RemoteReward(url, backend="openai", judge=folder, max_wait=60)
        report = compare_with_engine(local, remote, sheet)
        start = time.perf_counter()
        for _ in remote.stream(sheet):
            pass
        rate = len(sheet) / (time.perf_counter() - start)
        start = time.perf_counter()
        local.ask(sheet)
        ours = len(sheet) / (time.perf_counter() - start)
    with capsys.disabled():
        lines = "\n".join(report.lines())
        sys.stdout.write(f"\n{title}, {dtype}:\n{lines}\npairs per second  {rate:.1f}, by our engine {ours:.1f}\n")
    assert report.num_equal_prompts == len(sheet)
    return report


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("judge", [*FAMILIES, "shapes"])
def test_vllm_gives_our_log_odds(judge, dtype, tmp_path, capsys):
    """50 pairs over HTTP: the same prompt tokens, pixels and log-odds."""
    if judge == "shapes":
        sheet, folder = shapes_questions(50), save_shapes_judge(tmp_path, "torchvision")
    else:
        sheet, folder = make_sheet(50, is_pairwise=True), save_wide_judge(judge, tmp_path, "torchvision")
    report = compare(folder, dtype, sheet, f"{judge}, pixels of torchvision", capsys)
    assert report.pixel_difference == 0
    assert report.log_odds <= BOUNDS[dtype]


@pytest.mark.parametrize("judge", FAMILIES)
def test_pixels_of_pillow_are_what_differs(judge, tmp_path, capsys):
    """A judge that sees Pillow's pixels is exported all the same: tokens are equal, and log-odds differ by little."""
    folder = save_wide_judge(judge, tmp_path, "pil")
    report = compare(folder, "float32", make_sheet(50, is_pairwise=True), f"{judge}, pixels of Pillow", capsys)
    assert 0 < report.pixel_difference < LARGEST_PIXEL_DIFFERENCE
    assert report.log_odds <= PILLOW_BOUND
