"""A denoiser that is split over two processes (FSDP2): updates, gradient norms, samples and checkpoints are those of one process."""

import os
from pathlib import Path

import pytest
import torch
from new_process import run_together
from sharded_refl import run, settings_of
from tiny_refl import make_trainer, trained_weights

from rewarddance_hf import JudgeServer, RewardDanceScorer


HELPER = Path(__file__).parents[1] / "sharded_refl.py"
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true"}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        difference = (weight - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-12)
        assert difference <= 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan", "wan22"])
def test_two_processes_equal_one(kind, tmp_path):
    """
    LoRA and full: weights after two updates of two processes that share the denoiser are those of one, with an evaluation and a
    monitor in between; runs are resumed from two processes to two, from one to two, and from two to one; what is saved loads.
    """
    names = [f"{kind}-lora", f"{kind}-full"]
    one = {name: run(tmp_path / name / "one", name, 1) for name in names}
    runs = run_together(HELPER, tmp_path, *names, env=ON_CPU)
    assert not any(done.returncode for done in runs), "\n".join(done.stderr[-3000:] for done in runs)
    for name in names:
        for rank in range(2):
            results = torch.load(tmp_path / name / f"result-{rank}.pt", weights_only=False)
            for way, result in results.items():
                assert_close(result["weights"], one[name]["weights"])
                assert result["metrics"] == pytest.approx(one[name]["metrics"], rel=1e-4), way
                assert result["norms"][-1] == pytest.approx(one[name]["norms"][-1], rel=1e-4)
                torch.testing.assert_close(result["rewards"], one[name]["rewards"], rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(results["whole"]["history"], one[name]["history"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)  # changes are small differences of rewards
        resumed = make_trainer(tmp_path / "resumed", **settings_of(name, 1))
        resumed.train(resume_from_checkpoint=str(tmp_path / name / "two" / "checkpoint-1"))
        assert_close(trained_weights(resumed), one[name]["weights"])
        loaded = make_trainer(tmp_path / "loaded", **settings_of(name, 1))
        loaded._load_from_checkpoint(str(tmp_path / name / "two" / "final"))
        assert_close(trained_weights(loaded), one[name]["weights"])
        if name.endswith("full"):
            config = (tmp_path / name / "two" / "final" / "transformer" / "config.json").read_text()
            assert "FSDP" not in config


@pytest.mark.slow
def test_judges_beside_a_split_denoiser(vlm_folder, tmp_path):
    """
    A judge that is whole in each process, or in parts by `device_map`, or behind HTTP makes the updates of one process. One whose
    weights are split over the processes is refused, whether it tunes or watches.
    """
    vlm = vlm_folder("internvl")
    judge = RewardDanceScorer.from_pretrained(vlm, paradigm="pointwise")
    one = run(tmp_path / "one", "sd3-lora", 1, reward={"judge": judge})
    with JudgeServer(judge, "tiny") as server:
        runs = run_together(HELPER, tmp_path, "judges", server.url, vlm, env=ON_CPU)
    assert not any(done.returncode for done in runs), "\n".join(done.stderr[-3000:] for done in runs)
    for rank in range(2):
        results = torch.load(tmp_path / f"result-{rank}.pt", weights_only=False)
        for way in ("whole", "served", "placed"):
            assert_close(results[way]["weights"], one["weights"])
            assert results[way]["norms"] == pytest.approx(one["norms"], rel=1e-4)
            assert results[way]["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        for role in ("reward", "held_out"):
            assert "are split over processes" in results[f"split {role}"]


def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch):
    """One process, a second copy of the weights, and engines that wrap."""
    with pytest.raises(ValueError, match="there is one process to split the denoiser over"):
        make_trainer(tmp_path, shard_denoiser=True)
    for option in ({"use_ema": True}, {"beta": 0.1}):
        with pytest.raises(ValueError, match="does not go together with"):
            make_trainer(tmp_path, shard_denoiser=True, **option)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(NotImplementedError, match="FSDP was asked for.* set `shard_denoiser=True`"):
        make_trainer(tmp_path)
