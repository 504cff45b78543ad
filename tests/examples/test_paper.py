"""The study of the paper's experiments runs as a user would run it, goes on where it stopped, and its statistics are right."""

import gzip
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from new_process import run_python

from rewarddance_hf.shapes.clip_generator import build_clip_generator
from rewarddance_hf.shapes.generator import load_generator
from rewarddance_hf.shapes.models import LADDER_VLMS


FOLDER = Path(__file__).parents[2] / "examples" / "paper"
TUNING = {"updates": 2, "num_prompts": 4, "references": {"method": "top", "num_candidates": 2, "top_k": 1}}
TINY = {
    "common": {"held_out_rows": 20, "measured_prompts": 6, "monitored_prompts": 4, "pairs": {"train": 12, "id": 8}},
    "paradigms": {"size": "0.12m", "rows": {50: 1, 96: 2}, "seeds": [0]},
    "sizes": {
        "sizes": ["0.12m", "10m"],
        "generators": {32: {"pairwise": ["0.12m"], "pointwise": ["0.12m"]}, 48: {"pointwise": ["0.12m"]}},
        "num_rows": 48,
        "updates": 1,
        "sample_updates": 1,
        "seeds": [0],
        "tuning": TUNING,
        "search": {"sizes": ["0.12m"], "num_prompts": 2, "budgets": [16]},
    },
    "references": {"size": "0.12m", "seeds": [0], "references": {"top": TUNING["references"]}},
    "reasons": {"size": "0.12m", "seeds": [0]},
    "dynamics": {"sizes": ["0.12m"], "seeds": [0], "paradigms": ["pointwise", "pairwise"]},
    "attacks": {"sizes": ["0.12m"], "num_rows": 6, "radii": [0.02], "steps": 2},
    "clips": {
        "paradigms": {"pointwise": ["refl"], "pairwise": ["draft"]},
        "seeds": [0],
        "pairs": {"train": 2, "id": 2},
        "updates": 1,
        "sample_updates": 1,
        "held_out_rows": 6,
        "measured_prompts": 3,
        "tuning": {"updates": 1, "batch_size": 2, "learning_rate": 1e-3, "num_prompts": 4, "num_candidates": 2},
    },
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"paper_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"paper_{name}"] = module
    spec.loader.exec_module(module)
    return module


def write_experiments(folder, **changes):
    """The experiments that ship, with settings that take seconds."""
    folder.mkdir(exist_ok=True)
    for file in (FOLDER / "experiments").glob("*.yaml"):
        settings = {**yaml.safe_load(file.read_text()), **TINY[file.stem], **changes.get(file.stem, {})}
        (folder / file.name).write_text(yaml.safe_dump(settings, sort_keys=False))


def run_study(tmp_path, *more):
    arguments = ["--experiments", str(tmp_path / "experiments"), "--output_dir", str(tmp_path / "study")]
    done = run_python(str(FOLDER / "study.py"), *arguments, "--bases", str(tmp_path), *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_study(tmp_path):
    """All tables are made of the sizes that there are; a second call does nothing, and a changed setting only what hangs on it."""
    write_experiments(tmp_path / "experiments")
    load_generator().save_pretrained(tmp_path / "shapes_generator_32")  # any width serves
    shutil.copytree(LADDER_VLMS / "0.12m", tmp_path / "shapes_clip_base")
    clip_generator = build_clip_generator()
    torch.nn.init.normal_(clip_generator.transformer.proj_out.weight, std=0.2)  # zero would leave the LoRA no gradient
    clip_generator.save_pretrained(tmp_path / "shapes_clip_generator")
    said = run_study(tmp_path)
    assert "There is no base model of 10m" in said
    assert "There is no generator of width 48" in said
    report = (tmp_path / "study" / "report.md").read_text()
    for title in ("Table 7", "Table 2", "Table 8", "Table 9", "Table 3", "Figures 2, 5 and 6", "Not in the paper"):
        assert f"## {title}" in report
    for image in ("paradigms.png", "sizes.png", "dynamics.png"):
        assert (tmp_path / "study" / image).stat().st_size > 10_000
    results = {
        str(file.parent.relative_to(tmp_path / "study")): json.loads(file.read_text())
        for file in (tmp_path / "study").rglob("result.json")
    }
    # A figure of the report, counted from the credits of rows
    judged = [results[f"judges/0.12m_pairwise_96_{seed}"]["metrics"]["ood"] for seed in (0,)]
    assert f"{100 * np.mean([of_seed['credits'] for of_seed in judged]):.1f} (" in report
    assert judged[0]["accuracy"] == pytest.approx(np.mean(judged[0]["credits"]))

    packed = tmp_path / "results.jsonl.gz"
    said = run_study(tmp_path, "--pack", str(packed))
    assert f"0 of {len(results)} jobs are left to do." in said
    assert "started" not in said
    assert f"{len(results)} results are in" in said

    # Results travel to another folder, but no weights do.
    (tmp_path / "study").rename(tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    for name in ("shapes_generator_32", "shapes_clip_base", "shapes_clip_generator"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    bases = ("--bases", str(tmp_path / "elsewhere"))
    said = run_study(tmp_path, *bases, "--report", "--results", str(packed))
    assert f"{len(results)} results are taken from {packed}." in said
    again = (tmp_path / "study" / "report.md").read_text()
    ours, theirs = ([line for line in text.splitlines() if line and "clip" not in line] for text in (again, report))
    assert ours == theirs
    shutil.rmtree(tmp_path / "study")
    (tmp_path / "here").rename(tmp_path / "study")

    shutil.rmtree(tmp_path / "study" / "generators")
    write_experiments(tmp_path / "experiments", sizes={"updates": 2})
    said = run_study(tmp_path, *bases, "--only", "sizes")
    again = {line.split("started   ")[1] for line in said.splitlines() if "started   " in line}
    judges = {f"judges/0.12m_{paradigm}_all_0" for paradigm in ("pairwise", "pointwise")}
    tuned = {f"generators/0.12m_{paradigm}_top_1_of_2_0_w32" for paradigm in ("pairwise", "pointwise")}
    assert again == {*judges, *tuned, "searches/0.12m_0", "generators/base_w32"}


def test_figures_of_the_readme_are_those_of_the_results_that_ship(tmp_path):
    """Of what was measured with the models that ship."""
    packed = FOLDER / "results.jsonl.gz"
    arguments = ["--report", "--results", str(packed), "--output_dir", str(tmp_path), "--bases", str(tmp_path)]
    done = run_python(str(FOLDER / "study.py"), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    if f"0 results are taken from {packed}" in done.stdout:
        pytest.skip("these are results of other settings or of another version")
    readme, report = (path.read_text() for path in (FOLDER / "README.md", tmp_path / "report.md"))
    section = readme.split("### Sizes, tuning and search")[1].split("\n### ")[0]
    figures = re.findall(r"([+-]\d+\.\d)(?: points)? (\([+-]\d+\.\d to [+-]\d+\.\d\))", section)
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    figures += re.findall(r"(\d\.\d\d) (\(-?\d\.\d\d to \d\.\d\d\))", table)
    assert len(figures) > 15
    assert [" ".join(figure) for figure in figures if " ".join(figure) not in report] == []


def test_results_that_came_without_weights(tmp_path, monkeypatch):
    """A job whose result was taken is done again only if one that needs it is not done; others' results are left alone."""
    jobs = load("jobs")
    monkeypatch.setitem(sys.modules, "jobs", jobs)
    results = load("results")
    judge, other = (jobs.Job(f"judges/{name}", "judges:measure", {"name": name}) for name in "ab")
    tuned = jobs.Job("generators/a", "generators:tune", {}, (judge,))
    everything = jobs.with_needs([tuned, other])
    for job in everything.values():
        jobs_file = tmp_path / "here" / job.name / "result.json"
        jobs_file.parent.mkdir(parents=True)
        jobs_file.write_text(json.dumps({"fingerprint": job.fingerprint(), "metrics": {"value": job.name}}))
    packed = tmp_path / "packed.gz"
    assert results.pack_results(everything, tmp_path / "here", packed) == 3
    assert results.take_results(everything, tmp_path / "there", packed) == 3
    assert results.take_results(everything, tmp_path / "there", packed) == 0
    assert tuned.result(tmp_path / "there")["metrics"] == {"value": "generators/a"}
    assert jobs.stages_of(everything, tmp_path / "there") == {}
    (tmp_path / "there" / "generators" / "a" / "result.json").unlink()
    assert [*jobs.stages_of(everything, tmp_path / "there")] == ["judges_a", "generators_a"]
    changed = jobs.with_needs([jobs.Job("judges/b", "judges:measure", {"name": "c"})])
    assert results.take_results(changed, tmp_path / "changed", packed) == 0


@pytest.mark.parametrize("content", [None, b"", b"no archive", gzip.compress(b"{}")[:-9], gzip.compress(b"{")])
def test_files_that_hold_no_results(tmp_path, monkeypatch, content):
    """A missing or broken file of results is told by name."""
    monkeypatch.setitem(sys.modules, "jobs", load("jobs"))
    file = tmp_path / "results.jsonl.gz"
    if content is not None:
        file.write_bytes(content)
    wanted = "There is no file" if content is None else "cannot be read"
    with pytest.raises(SystemExit, match=rf"{wanted}.*`--pack` has written"):
        load("results").take_results({}, tmp_path, file)


def test_settings_that_cannot_be(tmp_path):
    """Two jobs of one name and different settings are refused."""
    jobs = load("jobs")
    first, second = (jobs.Job("judges/a", "judges:measure", {"seed": seed}) for seed in (0, 1))
    with pytest.raises(ValueError, match="Two jobs are named 'judges/a'"):
        jobs.with_needs([first, second])


def test_intervals_cover_what_they_should():
    """Of 95 % intervals over seeds and rows, about that many hold the true mean; paired differences are narrower."""
    intervals = load("intervals")
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        of_seed, of_row = rng.normal(0, 0.05, (8, 1)), rng.normal(0, 0.3, (1, 100))
        found = intervals.estimate(0.7 + of_seed + of_row + rng.normal(0, 0.1, (8, 100)))
        covered += found.low <= 0.7 <= found.high
    assert 50 <= covered <= 60
    rows = rng.normal(0, 1, (1, 200))
    alone = intervals.estimate(rows + 0.1)
    difference = intervals.estimate(rows + 0.1, rows)
    assert difference.value == pytest.approx(0.1)
    assert difference.high - difference.low < 0.01 < alone.high - alone.low
    assert intervals.verdict(difference) == "holds"
    assert intervals.verdict(intervals.estimate(rows, rows + 0.1)) == "does not hold"
    assert intervals.verdict(intervals.estimate(rows, rows)) == "undecided"


def test_good_same_bad():
    """Three of eight are better, one is worse: (3 - 1) / 8."""
    intervals = load("intervals")
    found = intervals.good_same_bad([[1, 0.5, 0, 1], [1, 1, 0, 0]], [0.5, 0.5, 0, 1])
    assert found.value == pytest.approx((3 - 1) / 8)


def test_rank_correlation():
    """Spearman's correlation, by its formula for ranks without ties, and with shared ranks."""
    intervals = load("intervals")
    first, second = [0.1, 0.4, 0.2, 0.9, 0.7], [10, 30, 20, 40, 50]
    differences = np.array([0, 0, 0, 1, -1])
    found = intervals.rank_correlation(first, second)
    assert found.value == pytest.approx(1 - 6 * (differences**2).sum() / (5 * 24))
    assert found.low <= found.value <= found.high <= 1
    # Ranks 0.5, 0.5, 2, 3 and 0, 1, 2, 3: covariance 4.5, sums of squares 4.5 and 5
    assert intervals.rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]).value == pytest.approx(4.5 / np.sqrt(4.5 * 5))
