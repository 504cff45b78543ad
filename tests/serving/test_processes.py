"""Servers and training runs in processes of their own, which are killed, restarted and told to end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import tiny_refl
import torch
from new_process import run_together
from serving.conftest import load_scorer
from tiny_vlms import random_image

from rewarddance_hf import RemoteReward


pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TRAINING = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "optim": "sgd",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
}


@pytest.fixture(scope="module")
def folder(vlm_folder, tmp_path_factory):
    """A judge of single samples as users have it: in a folder."""
    folder = tmp_path_factory.mktemp("judge")
    load_scorer(vlm_folder("internvl"), "pointwise").save_pretrained(folder)
    return folder


class ServerProcess:
    """`rewarddance serve`, as a user starts it."""

    def __init__(self, folder: Path, log: Path):
        self.folder, self.log = folder, log
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [
            sys.executable,
            "-m",
            "rewarddance_hf",
            "serve",
            "--model",
            str(self.folder),
            "--port",
            str(self.port),
        ]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stderr=log)

    def wait(self, seconds=180):
        """Until it is up."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                return httpx2.get(f"{self.url}/health").raise_for_status()
            except httpx2.TransportError:
                time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-2000:])

    def count(self, path: str) -> int:
        """Requests that were answered."""
        try:
            lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        except httpx2.TransportError:
            return 0
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(f'rewarddance_requests_total{{path="{path}"')
        )


@contextmanager
def serving(folder, log):
    server = ServerProcess(folder, log)
    try:
        server.wait()
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_two_training_processes_and_a_server_that_dies(folder, vlm_folder, tmp_path):
    """
    Two processes tune a generator by one server, which is killed in the middle and started again: the run waits, goes on, and
    ends with the weights of one process with the judge inside.
    """
    scorer = load_scorer(vlm_folder("internvl"), "pointwise")
    wanted = tiny_refl.run(tmp_path / "one", reward=scorer, gradient_accumulation_steps=2, **TRAINING)
    with serving(folder, tmp_path / "log") as server:
        settings = json.dumps({**TRAINING, "reward": server.url})
        runs: list = []
        command = (tiny_refl.__file__, str(tmp_path / "two"), settings)
        training = threading.Thread(target=lambda: runs.extend(run_together(*command, env=ENVIRONMENT)))
        training.start()
        while not server.count("gradient") and training.is_alive():
            time.sleep(0.02)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        time.sleep(1)
        server.start()
        training.join()
        assert server.count("gradient") > 0
    assert [done.returncode for done in runs] == [0, 0], runs[-1].stderr[-3000:]
    for rank in range(2):
        found = torch.load(tmp_path / "two" / f"result-{rank}.pt", weights_only=False)
        for name, value in wanted["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-6, msg=name)


def test_a_server_that_is_told_to_end(folder, tmp_path):
    """SIGTERM lets it answer what it has accepted, write why it ends, and exit well."""
    with serving(folder, tmp_path / "log") as server:
        reward = RemoteReward(server.url, max_wait=60)
        scores: list = []
        asked = threading.Thread(
            target=lambda: scores.append(reward.rank([random_image(i) for i in range(60)], "a circle").scores)
        )
        asked.start()
        while asked.is_alive() and not server.log.read_text().count("start"):
            time.sleep(0.01)
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        asked.join()
        assert server.process.wait(60) in (0, -signal.SIGTERM)
        assert scores[0].isfinite().all()
        events = [json.loads(line)["event"] for line in server.log.read_text().splitlines() if line.startswith("{")]
        assert events[0] == "start"
        assert events.count("request") == 1
