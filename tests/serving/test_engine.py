"""Judges that are exported and served by an engine, here a small one of plain transformers; vLLM has tests of its own."""

import json
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import uvicorn
from serving.conftest import load_scorer
from serving.engine_server import Engine
from tiny_vlms import random_image

from rewarddance_hf import (
    RemoteReward,
    RemoteRewardError,
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
)
from rewarddance_hf.cli import main
from rewarddance_hf.serving.export import export_judge
from rewarddance_hf.serving.parity import compare_with_engine, make_sheet


@contextmanager
def serving(engine: Engine):
    config = uvicorn.Config(engine.app(), port=0, log_config=None)
    server, listening = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def exported(vlm_folder, tmp_path_factory):
    """Function that gives a judge of a family in a folder, and its export. Read only."""

    def export(family, **settings):
        judge, folder = (tmp_path_factory.mktemp(f"{family}_{name}") for name in ("judge", "export"))
        model = RewardDanceForYesScoring.from_pretrained(vlm_folder(family), **settings)
        processor = RewardDanceProcessor.from_pretrained(
            vlm_folder(family), **({"vlm_images_kwargs": {"crop_to_patches": False}} if family == "internvl" else {})
        )
        RewardDanceScorer(model, processor).save_pretrained(judge)
        return judge, export_judge(judge, folder)

    return export


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "idefics3"])
def test_an_exported_judge_is_the_judge(exported, family):
    """The same tokens, log-odds and rewards on a sheet with prompts that look like special tokens; verdicts and rankings."""
    judge, folder = exported(family)
    local = RewardDanceScorer.from_pretrained(judge)
    with serving(Engine(folder)) as url:
        remote = RemoteReward(url, backend="openai", judge=folder, max_wait=5)
        report = compare_with_engine(local, remote, make_sheet(10, is_pairwise=True))
        assert report.num_equal_prompts == report.num_questions == 10
        assert report.log_odds < 1e-5
        assert report.scores < 1e-6
        images = [random_image(i) for i in range(3)]
        assert remote.rank(images, "a circle").order == local.rank(images, "a circle").order
        got, want = (judge.compare(*images[:2], "a circle", dimensions=["counting"]) for judge in (remote, local))
        assert got.probability_b == pytest.approx(want.probability_b, abs=1e-5)
        torch.testing.assert_close(
            remote.score(images, "a circle", images[::-1]),
            local.score(images, "a circle", images[::-1]),
            rtol=0,
            atol=1e-6,
        )
        assert remote.fingerprint() == {**local.fingerprint(), "engine": "openai"}
        with pytest.raises(NotImplementedError, match="requires a gradient"):
            remote.score(torch.rand(1, 3, 20, 20).requires_grad_(), ["x"], images[:1])
        with pytest.raises(NotImplementedError, match="explain"):
            remote.compare(*images[:2], "x", explain=True)


def test_temperature_and_normalization(exported):
    """The stored temperature counts once, whether the engine has applied it or not; where that cannot be had it says so."""
    settings = {"score_temperature": 2.5, "paradigm": "pointwise"}
    for normalization in ("yes_no", "vocabulary"):
        judge, folder = exported("internvl", score_normalization=normalization, **settings)
        local = RewardDanceScorer.from_pretrained(judge)
        images = [random_image(i) for i in range(3)]
        for mode in ("raw_logprobs", "processed_logprobs"):
            with serving(Engine(folder, mode)) as url:
                if (normalization, mode) == ("vocabulary", "raw_logprobs"):
                    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
                        RemoteReward(url, backend="openai", judge=folder, max_wait=5)
                    continue
                remote = RemoteReward(url, backend="openai", judge=folder, max_wait=5)
                torch.testing.assert_close(remote.score(images, "x"), local.score(images, "x"), rtol=0, atol=1e-6)


def test_what_cannot_be_served_is_refused(exported, vlm_folder, tmp_path):
    """Engines without chosen tokens, judges with a scalar head, families that are not equal, folders that are in use."""
    _, folder = exported("internvl")
    with serving(Engine(folder, knows_token_ids=False)) as url:
        with pytest.raises(RemoteRewardError, match="must support `logprob_token_ids`"):
            RemoteReward(url, backend="openai", judge=folder, max_wait=5)
        with pytest.raises(ValueError, match="has no `score.json`"):
            RemoteReward(url, backend="openai", judge=tmp_path)
    with pytest.raises(ValueError, match="`backend` is 'vllm'"):
        RemoteReward(url, backend="vllm")
    with pytest.raises(ValueError, match="is not empty"):
        export_judge(vlm_folder("internvl"), folder)
    with pytest.raises(ValueError, match="engines were found equal only for"):
        export_judge(vlm_folder("llava_onevision"), tmp_path / "a")
    load_scorer(vlm_folder("internvl"), "regressive").save_pretrained(tmp_path / "judge")
    with pytest.raises(ValueError, match="is regressive"):
        export_judge(tmp_path / "judge", tmp_path / "b")


def test_commands(exported, vlm_folder, tmp_path, capsys):
    """`export` writes the folder, and `serve --verify-against` states the difference."""
    judge, _ = exported("internvl")
    assert main(["export", "--model", str(judge), "--format", "vllm", "--output-dir", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    with serving(Engine(tmp_path / "out")) as url:
        verify = ["serve", "--model", str(judge), "--verify-against", url, "--export", str(tmp_path / "out"), "--json"]
        assert main([*verify, "--questions", "5"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["num_questions"] == report["num_equal_prompts"] == 5
        assert report["log_odds"] < 1e-5
        other = vlm_folder("qwen3_vl")
        assert main([*verify[:2], str(other), *verify[3:]]) == 1
        assert "is of another judge" in capsys.readouterr().err
