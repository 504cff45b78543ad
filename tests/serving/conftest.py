"""Servers of tiny judges on the loopback interface, shared by the tests of a module."""

import threading
from contextlib import contextmanager

import pytest
import torch

from rewarddance_hf import JudgeServer, RemoteReward, RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer


class GatedScorer(RewardDanceScorer):
    """A judge that can be made to wait before it answers."""

    gate: threading.Event | None = None
    entered: threading.Event

    def stream_windows(self, *args, **kwargs):
        if self.gate is not None:
            self.entered.set()
            self.gate.wait(30)
        return super().stream_windows(*args, **kwargs)

    @contextmanager
    def held(self):
        """Let the judge wait inside."""
        self.gate, self.entered = threading.Event(), threading.Event()
        try:
            yield
        finally:
            gate, self.gate = self.gate, None
            gate.set()


def load_scorer(folder, paradigm="pairwise", seed=None) -> GatedScorer:
    model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm)
    if paradigm == "regressive":
        torch.nn.init.normal_(model.score.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    if seed is not None:
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return GatedScorer(model.requires_grad_(False), RewardDanceProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def local(vlm_folder):
    """A judge in this process, the same as that of the server."""
    return load_scorer(vlm_folder("internvl"))


@pytest.fixture(scope="module")
def server(vlm_folder):
    with JudgeServer(load_scorer(vlm_folder("internvl")), "tiny", token="secret") as server:
        yield server


@pytest.fixture(scope="module")
def remote(server):
    reward = RemoteReward(server.url, token="secret", max_wait=10)
    yield reward
    reward.close()
