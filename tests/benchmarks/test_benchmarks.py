"""Every benchmark still runs, at its smallest size, and what it compares is the same."""

import json
import sys
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def bench():
    """Function that imports a module of this folder, as the benchmarks import each other."""
    import importlib

    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("references", [None, 1])
def test_scoring(bench, references, monkeypatch):
    """A round robin of three images, timed on all pairs or some, against all peers that are installed."""
    scoring = bench("bench_scoring")
    monkeypatch.setattr(bench("peers"), "NEW_TOKENS", 2)
    case = scoring.RoundRobin(3, 4, "text_first", "3m", references=references, peer_pairs=2, with_generation=True)
    results = scoring.round_robin(case)
    assert results["largest_difference"] < 1e-4
    assert results["encodings_per_image"] == 1
    assert all(
        results[f"speedup_vs_{name}"] > 0 for name in ("batched", "batched_forward", "one_by_one", "generation")
    )
    if references is None:
        assert results["theoretical_speedup"] > 1


def test_distinct_pairs(bench):
    """Pairs that share nothing get the scores of a plain batch."""
    assert bench("bench_scoring").distinct_pairs(3, 4, "3m", repeats=1)["largest_difference"] < 1e-4


@pytest.mark.parametrize("has_one_reference", [False, True])
def test_reward_step(bench, has_one_reference):
    """All ways give the gradient of the full graph."""
    results = bench("bench_reward_step").reward_step("images_first", has_one_reference, 4, "3m", repeats=1)
    assert all(value < 1e-4 for key, value in results.items() if key.endswith("difference"))


def test_tournaments(bench):
    """A tournament asks less."""
    assert bench("bench_scoring").tournaments()["swiss_over_round_robin"] < 1


def test_gradient(bench, monkeypatch):
    """Memory of a ReFL step is below that of the whole sampler."""
    gradient = bench("bench_gradient")
    monkeypatch.setattr(gradient, "STEPS", 4)
    monkeypatch.setattr(gradient, "ROUNDS", 1)
    assert gradient.pipeline("StableDiffusion3", 4)["refl_step_memory_over_full_backprop"] < 1


def test_training_memory(bench, monkeypatch):
    """A step with labelled positions only has the loss of one with all, up to how it is averaged."""
    training = bench("bench_training_memory")
    monkeypatch.setattr(training, "VOCABULARY", 2000)
    batch, model = training.batch_and_model()
    losses = [training.step(full_logits, batch, model) for full_logits in (False, True)]
    assert all(torch.isfinite(loss) for loss in losses)
    assert training.step(True, batch, model) == losses[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks of memory from /proc")
def test_peak_of_memory(bench):
    """The peak of a step is measured above what there was before it (in a fresh process, when benchmarks run)."""
    before, peaks = torch.ones(60_000_000, dtype=torch.uint8), []

    class Connection:
        send = peaks.append

    def allocate(measure, count):
        measure(lambda: torch.ones(count, dtype=torch.uint8).max())

    bench("timing")._send_peak(allocate, (30_000_000,), Connection)
    assert 29e6 <= peaks[0] <= 40e6
    del before


def test_memory_of_configurations(bench):
    """All configurations of large generators are counted (models of full size take minutes)."""
    refl = bench("bench_refl_memory")
    configs = {path.stem for path in (refl.ROOT / "examples" / "configs").glob("refl_*.yaml")}
    assert set(refl.PIPELINES) == set(refl.CONFIGS) == configs - {"refl_shapes"}


def test_results_are_kept_and_compared(bench, tmp_path, monkeypatch, capsys):
    """Results are written with commit and versions; what got worse, failed or changed is said, and ends with status 1."""
    run, thresholds = bench("run"), bench("thresholds")
    values = {"part": {"ratio": 2.0, "other": 1.0}}

    def broken():
        raise RuntimeError("no memory")

    monkeypatch.setattr(
        run, "measurements", lambda is_full=False: {"a/part": lambda: values["part"], "b/broken": broken}
    )
    monkeypatch.setattr(thresholds, "AT_LEAST", {"a/*/ratio": 1.5})
    output, before = tmp_path / "results" / "here.json", tmp_path / "before.json"

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(output), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run.main()
        return end.value.code, capsys.readouterr()

    status, printed = main()
    assert status == 1
    assert "b/broken failed" in printed.out
    assert "no memory" in printed.err
    written = json.loads(output.read_text())
    assert written["results"] == {"a/part/ratio": 2.0, "a/part/other": 1.0}
    assert written["versions"]["torch"] == torch.__version__
    assert {"date", "cpu", "cores", "python"} <= set(written)
    assert written["commits"] == {"a/part": written["commit"]}
    output.rename(before)
    values["part"] = {"ratio": 1.0, "other": 1.01}
    status, printed = main("--only", "a/", "--compare", before)
    assert status == 1
    assert "a/part/ratio: 2 -> 1 (0.50x)" in printed.out
    assert "a/part/other" not in printed.out.split("Against")[1]
    assert "a/part/ratio is 1, but must be at least 1.5" in printed.out
    values["part"]["ratio"] = float("nan")
    assert main("--only", "a/")[0] == 1
    values["part"]["ratio"] = 1.6
    assert main("--only", "a/")[0] == 0


def test_thresholds_name_what_is_measured(bench):
    """Each limit is about something that is measured, or it would never be broken."""
    from fnmatch import fnmatch

    names = list(bench("run").measurements())
    thresholds = bench("thresholds")
    for pattern in [*thresholds.AT_LEAST, *thresholds.AT_MOST]:
        assert any(fnmatch(name, pattern.rpartition("/")[0]) for name in names), pattern


def test_tables_are_those_of_the_results(bench):
    """The tables of README.md are made from a file of results, and not by hand."""
    table = bench("results_table")
    text = table.README.read_text(encoding="utf-8")
    assert any(
        table.write(json.loads(path.read_text(encoding="utf-8")), text) == text
        for path in (FOLDER / "results").iterdir()
    )
