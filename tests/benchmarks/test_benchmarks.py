"""Every benchmark still runs, at its smallest size, and what it compares is the same."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def load_benchmark(name: str):
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scoring():
    """A round robin of three images, and the gradient of a step, by the engine and without it."""
    bench = load_benchmark("bench_scoring")
    results = bench.round_robin(3, 4, "text_first", "2b", repeats=1)
    assert results["largest_difference"] < 1e-4
    assert results["theoretical_speedup"] > 1
    assert results["encodings_per_image"] == 1
    gradients = [bench.reward_step(*bench._judge_for_steps("images_first", engine)) for engine in ("auto", "plain")]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert bench.tournaments()["swiss_over_round_robin"] < 1


def test_gradient(monkeypatch):
    """Memory of a ReFL step is below that of the whole sampler."""
    bench = load_benchmark("bench_gradient")
    monkeypatch.setattr(bench, "PIPELINES", {"sd3": ("StableDiffusion3", 4)})
    monkeypatch.setattr(bench, "STEPS", 4)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    assert bench.run()["refl_step/sd3/memory_over_full_backprop"] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks of memory from /proc")
def test_training_memory(monkeypatch):
    """A step with labelled positions only, and one with all."""
    bench = load_benchmark("bench_training_memory")
    monkeypatch.setattr(bench, "VOCABULARY", 2000)
    lengths = []

    class Connection:
        def send(self, result):
            lengths.append(result[1])

    for full_logits in (False, True):
        bench._peak_of_step(full_logits, Connection())
    assert len(set(lengths)) == 1


def test_memory_of_configurations():
    """All configurations of large generators are counted (models of full size take minutes)."""
    bench = load_benchmark("bench_refl_memory")
    configs = {path.stem for path in (bench.ROOT / "examples" / "configs").glob("refl_*.yaml")}
    assert set(bench.PIPELINES) == set(bench.CONFIGS) == configs - {"refl_shapes"}
