"""The command line, in-process, on real tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import (
    RewardDanceEvaluator,
    RewardDanceScorer,
    __version__,
)
from rewarddance_hf.cli import main
from rewarddance_hf.shapes.generator import BASE_GENERATOR
from rewarddance_hf.shapes.preferences import ShapesPreferences


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [str(folder / f"{i}.png") for i in range(4)]
    for i, path in enumerate(paths):
        random_image(i).save(path)
    return paths


@pytest.fixture(scope="module")
def rows():
    return [{"prompt": f"circle {i}", "chosen": random_image(i), "rejected": random_image(9 + i)} for i in range(4)]


def run(capsys, *arguments):
    """Exit code, stdout and stderr. Everything on stderr is progress, except for the last line of an error."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_score(capsys, judge, images):
    """Scores are those of the library, as one document or one line per image; progress stays on stderr."""
    arguments = [
        "score",
        "--model",
        judge,
        "--image",
        *images[:2],
        "--prompt",
        "a circle",
        "--reference",
        *images[2:],
    ]
    code, out, err = run(capsys, *arguments, "--json", "--criteria", "quality")
    want = RewardDanceScorer.from_pretrained(judge).score(images[:2], "a circle", images[2:], criteria="quality")
    assert code == 0
    scores = json.loads(out)["scores"]
    assert [row["score"] for row in scores] == pytest.approx(want.tolist())
    assert [(row["image"], row["prompt"], row["reference"]) for row in scores] == [
        (images[0], "a circle", images[2]),
        (images[1], "a circle", images[3]),
    ]
    assert "Scoring" in err
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert [line.split("\t")[1] for line in out.splitlines()] == images[:2]


def test_score_without_references(capsys, pointwise_judge, images):
    """A pointwise judge needs no reference; each image may have its own prompt."""
    code, out, _ = run(
        capsys,
        "score",
        "--model",
        pointwise_judge,
        "--image",
        *images[:2],
        "--prompt",
        "a",
        "b",
        "--json",
        "--dtype",
        "float32",
    )
    want = RewardDanceScorer.from_pretrained(pointwise_judge).score(images[:2], ["a", "b"])
    assert code == 0
    assert [row["score"] for row in json.loads(out)["scores"]] == pytest.approx(want.tolist())


def test_score_by_dimensions(capsys, judge, images):
    """`--dimensions` gives a column for each, or a document; wrong names list those of the task."""
    command = ["score", "--model", judge, "--image", *images[:2], "--prompt", "a circle", "--reference", images[2]]
    names = ["motion", "text"]
    code, out, _ = run(capsys, *command, "--task", "text-to-video", "--dimensions", *names, "--json")
    want = RewardDanceScorer.from_pretrained(judge).score(
        images[:2], "a circle", [images[2]] * 2, task="text-to-video", dimensions=names
    )
    assert code == 0
    rows = json.loads(out)["scores"]
    assert [row["image"] for row in rows] == images[:2]
    assert [list(row["dimensions"]) for row in rows] == [names] * 2
    assert [list(row["dimensions"].values()) for row in rows] == [pytest.approx(row) for row in want.tolist()]
    code, out, _ = run(capsys, *command, "--dimensions", "text", "structure")
    assert code == 0
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[0] == ["text", "structure", "image"]
    assert [line[2] for line in lines[1:]] == images[:2]
    code, out, err = run(capsys, *command, "--dimensions", "motion")
    assert (code, out) == (1, "")
    assert "`dimension` is 'motion', but the task 'text-to-image' has ['alignment'" in err
    code, out, err = run(capsys, *command, "--dimensions", "text", "--criteria", "x")
    assert (code, out) == (2, "")
    assert "argument --dimensions: not allowed with argument --criteria" in err


def test_rank_by_a_tournament(capsys, judge, images):
    """`--ranking-method` reaches the library: a Swiss tournament leaves pairs out that a round robin compares."""
    code, out, _ = run(
        capsys,
        "rank",
        "--model",
        judge,
        "--prompt",
        "a circle",
        *images,
        *images,
        "--json",
        "--ranking-method",
        "swiss",
    )
    assert code == 0
    want = RewardDanceScorer.from_pretrained(judge).rank([*images, *images], "a circle", ranking_method="swiss")
    assert json.loads(out)["order"] == want.order


def test_rank(capsys, judge, images):
    """The ranking is that of the library; NaN of the diagonal is null in JSON."""
    want = RewardDanceScorer.from_pretrained(judge).rank(images, "a circle")
    code, out, _ = run(capsys, "rank", "--model", judge, "--prompt", "a circle", *images, "--json", "--top-k", 2)
    document = json.loads(out)
    assert code == 0
    assert document["order"] == want.order[:2]
    assert document["wins"] == want.wins.tolist()
    assert document["matrix"][0][0] is None
    assert document["matrix"][0][1] == pytest.approx(want.matrix[0, 1].item())
    code, out, _ = run(capsys, "rank", "--model", judge, "--prompt", "a circle", *images)
    lines = [line.split("\t") for line in out.splitlines()]
    assert lines[0] == ["place", "wins", "score", "image"]
    assert [line[-1] for line in lines[1:]] == [images[i] for i in want.order]


def test_evaluate_saved_dataset(capsys, judge, rows, tmp_path):
    """A folder of `save_to_disk` is measured as by the library, and the metrics are written to a file too."""
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    output = tmp_path / "new" / "metrics.json"
    code, out, _ = run(
        capsys,
        "evaluate",
        "--model",
        judge,
        "--dataset",
        tmp_path / "rows",
        "--limit",
        3,
        "--output",
        output,
        "--json",
    )
    assert code == 0
    document = json.loads(out)
    want = RewardDanceEvaluator(rows[:3])(RewardDanceScorer.from_pretrained(judge))
    assert document["metrics"] == pytest.approx(want, rel=1e-4)
    assert document["judge_fingerprint"] == RewardDanceScorer.from_pretrained(judge).fingerprint()
    assert json.loads(output.read_text()) == document
    evaluator = RewardDanceEvaluator(datasets.load_from_disk(tmp_path / "rows").select(range(3)))
    evaluator(lambda images, prompts: [0.0] * len(images))
    assert document["rows_fingerprint"] == evaluator.results.rows_fingerprint
    assert document["is_local"] is True
    code, out, _ = run(capsys, "evaluate", "--model", judge, "--dataset", tmp_path / "rows")
    assert dict(line.split() for line in out.splitlines())["num_rows"] == "4"


def test_evaluate_splits(capsys, judge, rows, tmp_path):
    """Of several splits one has to be named; a wrong name is answered with the right ones."""
    dataset = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"id": dataset, "ood": dataset.select([0])}).save_to_disk(tmp_path)
    arguments = ["evaluate", "--model", judge, "--dataset", tmp_path, "--json"]
    code, out, _ = run(capsys, *arguments, "--split", "ood")
    assert (code, json.loads(out)["metrics"]["num_rows"]) == (0, 1)
    for split in ([], ["--split", "test"]):
        code, out, err = run(capsys, *arguments, *split)
        assert (code, out) == (1, "")
        assert "['id', 'ood']. Choose one of them." in err.splitlines()[-1]


def test_evaluate_files(capsys, judge, rows, tmp_path):
    """Files go through `load_dataset`."""
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    code, out, _ = run(
        capsys, "evaluate", "--model", judge, "--dataset", "parquet", "--data-files", tmp_path / "rows.parquet", "--split",
        "train[:2]", "--json",
    )  # fmt: skip
    document = json.loads(out)
    assert (code, document["metrics"]["num_rows"], document["split"]) == (0, 2, "train[:2]")


def test_evaluate_shapes(capsys, judge):
    """The shapes world is a dataset by name, with its categories; the seed draws other rows."""
    arguments = ["evaluate", "--model", judge, "--dataset", "shapes:ood", "--limit", 4, "--batch-size", 4, "--json"]
    code, out, _ = run(capsys, *arguments, "--seed", 3)
    metrics = json.loads(out)["metrics"]
    assert (code, metrics["num_rows"]) == (0, 4)
    want = RewardDanceEvaluator(ShapesPreferences(4, "ood", seed=3), seed=3)(RewardDanceScorer.from_pretrained(judge))
    assert metrics == pytest.approx(want, rel=1e-4)
    assert any(name.startswith("category/") for name in metrics)


def test_calibrate(capsys, judge, rows, tmp_path):
    """The calibrated judge is saved with its temperature, and the folder loads as a judge."""
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    code, out, _ = run(
        capsys,
        "evaluate",
        "--model",
        judge,
        "--dataset",
        tmp_path / "rows",
        "--calibrate",
        tmp_path / "judge",
        "--json",
    )
    metrics = json.loads(out)["metrics"]
    assert code == 0
    assert metrics["nll_after"] < metrics["nll_before"] == metrics["nll"]
    scorer = RewardDanceScorer.from_pretrained(tmp_path / "judge")
    assert scorer.model.config.score_temperature == pytest.approx(metrics["score_temperature"])


def test_failed_writing_still_shows_the_metrics(capsys, judge, monkeypatch, rows, tmp_path):
    """When the disk is full at the end, hours of computing are not lost: the metrics are on stdout."""
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    folder = tmp_path / "new"
    evaluate = RewardDanceEvaluator.__call__

    def evaluate_and_break(self, model):
        metrics = evaluate(self, model)
        folder.rmdir()  # the folder that was there at the start is gone
        return metrics

    monkeypatch.setattr(RewardDanceEvaluator, "__call__", evaluate_and_break)
    code, out, err = run(
        capsys, "evaluate", "--model", judge, "--dataset", tmp_path / "rows", "--output", folder / "m.json", "--json"
    )
    assert code == 1
    assert json.loads(out)["metrics"]["num_rows"] == 4
    assert "m.json" in err.splitlines()[-1]


def test_unwritable_output_is_noticed_first(capsys, images, tmp_path):
    """A metrics file or folder that cannot be written ends the command before the model is even looked for."""
    arguments = ["evaluate", "--model", "no/such-model", "--dataset", "shapes:id"]
    for option, target, message in (
        ("--output", tmp_path, "Is a directory"),
        ("--output", f"{images[0]}/metrics.json", "File exists"),
        ("--calibrate", images[0], "File exists"),
    ):
        code, out, err = run(capsys, *arguments, option, target)
        assert (code, out) == (1, "")
        assert err.startswith("rewarddance evaluate: error: ")
        assert message in err
        assert err.count("\n") == 1


def test_calibrated_judge_does_not_overwrite_the_one_in_use(capsys, pointwise_judge):
    """The folder of the model is no place for its successor."""
    code, _, err = run(
        capsys, "evaluate", "--model", pointwise_judge, "--dataset", "shapes:id", "--calibrate", pointwise_judge
    )
    assert code == 1
    assert "whose weights are in use" in err


@pytest.mark.parametrize("search", ["best-of-n", "paths", "zero-order"])
def test_generate(capsys, pointwise_judge, tmp_path, search):
    """Images, their seeds and rewards and the tree are written, within the budget; the images are those of the library."""
    code, out, _ = run(
        capsys, "generate", "--pipeline", BASE_GENERATOR, "--model", pointwise_judge, "--prompt", "a red circle",
        "two blue squares", "--search", search, "--budget", 13, "--steps", 4, "--num-paths", 1, "--seed", 3, "--argument",
        "max_sequence_length=1", "guidance_scale=2.5", "negative_prompt=blur", "--output-dir", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0
    results = json.loads(out)["results"]
    assert [result["prompt"] for result in results] == ["a red circle", "two blue squares"]
    for number, result in enumerate(results):
        folder = tmp_path / f"prompt_{number}"
        assert result["images"] == [str(folder / "image_0.png")]
        assert sorted(path.name for path in folder.iterdir()) == ["image_0.png", "search.json", "tree.png"]
        document = json.loads((folder / "search.json").read_text())
        assert document["method"] == search
        assert document["rewards"] == result["rewards"]
        assert 8 <= document["denoiser_evaluations"] <= 13
        want = RewardDanceScorer.from_pretrained(pointwise_judge).score(result["images"], result["prompt"])
        assert result["rewards"] == pytest.approx(want.tolist(), abs=1e-5)


def test_generate_in_shards(capsys, pointwise_judge, tmp_path, monkeypatch):
    """Workers share the prompts of a file; images are those of one worker, and what is finished is not made again."""
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\n\na green triangle\n")
    arguments = ["generate", "--pipeline", BASE_GENERATOR, "--model", pointwise_judge, "--budget", 4, "--steps", 2]
    arguments += ["--argument", "max_sequence_length=1", "--json", "--data", tmp_path / "prompts.txt", "--output-dir"]
    code, out, _ = run(capsys, *arguments, tmp_path / "one")
    assert code == 0
    whole = json.loads(out)["results"]
    assert len(whole) == 3
    shards = [json.loads(run(capsys, *arguments, tmp_path / "two", "--num-shards", 2, "--shard", 1)[1])["results"]]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    shards.insert(0, json.loads(run(capsys, *arguments, tmp_path / "two", "--num-shards", 2)[1])["results"])
    assert [[found["prompt"] for found in shard] for shard in shards] == [
        ["a red circle", "a green triangle"],
        ["two blue squares"],
    ]
    for number, want in enumerate(whole):
        got = shards[number % 2][number // 2]
        assert got["rewards"] == pytest.approx(want["rewards"], abs=1e-5)
        assert Path(got["images"][0]).read_bytes() == Path(want["images"][0]).read_bytes()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "two").glob("*/image_0.png"))]
    (tmp_path / "two" / "prompt_1" / "search.json").unlink()  # as a kill leaves it
    code, out, _ = run(capsys, *arguments, tmp_path / "two")
    assert [found["rewards"] for found in json.loads(out)["results"]] == [
        pytest.approx(want["rewards"], abs=1e-5) for want in whole
    ]
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "two").glob("*/image_0.png"))]
    assert [new == old for new, old in zip(again, times, strict=True)] == [True, False, True]
    (tmp_path / "prompts.txt").write_text("another\n")
    code, _, err = run(capsys, *arguments, tmp_path / "two")
    assert code == 1
    assert "has a search for 'a red circle' in the place of prompt 0, 'another'" in err


def test_generate_with_a_pairwise_judge(capsys, judge, tmp_path):
    """A pairwise judge ranks candidates; a search that needs single scores ends with one clean line."""
    arguments = ["generate", "--pipeline", BASE_GENERATOR, "--model", judge, "--prompt", "a", "--budget", 4]
    arguments += ["--steps", 2, "--argument", "max_sequence_length=1", "--output-dir", tmp_path]
    code, out, _ = run(capsys, *arguments)
    assert (code, out.split("\t")[1]) == (0, f"{tmp_path / 'prompt_0' / 'image_0.png'}\n")
    code, out, err = run(capsys, *arguments, "--seed", 1)
    assert (code, out) == (1, "")
    assert "belongs to a run in which ['seed'] were others" in err.splitlines()[-1]
    arguments[-1] = tmp_path / "other"
    code, out, err = run(capsys, *arguments, "--search", "paths")
    assert (code, out) == (1, "")
    assert "The reward is pairwise" in err.splitlines()[-1]
    assert run(capsys, *arguments, "--argument", "steps")[0] == 2


def test_demo(capsys, monkeypatch, tmp_path):
    """`demo` runs the demo of the shapes world in the folder that is given."""
    calls = []
    monkeypatch.setattr("rewarddance_hf.shapes.demo.run_demo", lambda *arguments: calls.append(arguments))
    assert run(capsys, "demo", "--output-dir", tmp_path)[0] == 0
    assert run(capsys, "demo", "--no-tune-generator")[0] == 0
    assert calls == [(str(tmp_path), True), ("outputs/demo", False)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["score", "--model", "JUDGE", "--image", "0", "--prompt", "a"],
            "`references` is None, but the judge is pairwise",
        ),
        (
            ["score", "--model", "JUDGE", "--image", "gone.png", "--prompt", "a", "--reference", "0"],
            "there is no file 'gone.png'",
        ),
        (["score", "--model", "/no/model", "--image", "0", "--prompt", "a"], "/no/model"),
        (["score", "--model", "JUDGE", "--image", "0", "--prompt", "a", "--device", "xla:9"], "`--device` is 'xla:9'"),
        (["rank", "--model", "JUDGE", "--prompt", "a", "0"], "a ranking needs at least 2"),
        (["rank", "--model", "JUDGE", "--prompt", "a", "0", "1", "--task", "song"], "`task` is 'song'"),
        (["evaluate", "--model", "JUDGE", "--dataset", "shapes:moon"], "`split` is 'moon'"),
        (["evaluate", "--model", "JUDGE", "--dataset", "/no/dataset"], "/no/dataset"),
        (["evaluate", "--model", "JUDGE", "--benchmark", "moon"], "There is no benchmark 'moon', but "),
    ],
)
def test_errors_of_input_and_model(capsys, judge, images, arguments, message):
    """What cannot be used ends with code 1, one clean line on stderr and nothing on stdout."""
    names = {"JUDGE": judge, "0": images[0], "1": images[1]}
    code, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith(f"rewarddance {arguments[0]}: error: ")
    assert message in last
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["dance"], "invalid choice"),
        (["score", "--model", "m", "--prompt", "a"], "--image"),
        (["score", "--model", "m", "--image", "0", "--prompt", "a", "b"], "2 values for 1 images"),
        (["score", "--model", "m", "--image", "0", "1", "2", "--prompt", "a", "--reference", "0", "1"], "--reference"),
        (["rank", "--model", "m", "--prompt", "a", "0", "1", "--top-k", "0"], "0 is not 1 or more"),
        (["evaluate", "--model", "m", "--dataset", "d", "--limit", "x"], "invalid"),
        (["evaluate", "--model", "m"], "one of the arguments --dataset/--data --benchmark is required"),
        (["evaluate", "--model", "m", "--dataset", "d", "--benchmark", "hpdv2"], "not allowed with"),
        (["evaluate", "--model", "m", "--dataset", "d", "--compare", "clipscore"], "need --benchmark"),
        (
            ["evaluate", "--model", "m", "--benchmark", "hpdv2", "--calibrate", "f"],
            "--calibrate: not allowed with --benchmark",
        ),
        (["score", "--model", "m", "--image", "0", "--prompt", "a", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    """Wrong arguments end with code 2 before anything is loaded."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_traceback_on_request(capsys, judge, images):
    """`--traceback` shows where an error comes from."""
    with pytest.raises(ValueError, match="`references` is None"):
        run(capsys, "score", "--model", judge, "--image", images[0], "--prompt", "a", "--traceback")


@pytest.mark.parametrize("separator", ["-", "_"])
def test_flags_with_dashes_or_underscores(capsys, judge, images, separator):
    """`--batch_size` is `--batch-size`, also with its value behind "="; values and what follows "--" stay as they are."""
    flags = [flag.replace("-", separator) for flag in ("top-k", "batch-size=2", "ranking-method")]
    arguments = ["--model", judge, f"--{flags[0]}", "1", f"--{flags[1]}", f"--{flags[2]}", "round_robin"]
    code, out, _ = run(capsys, "rank", *arguments, "--prompt", "a_circle", "--json", "--", *images[:3])
    assert (code, len(json.loads(out)["order"])) == (0, 1)
    code, _, err = run(capsys, "rank", *arguments, "--prompt", "a", "--", images[0], "--un_known")
    assert code == 1
    assert "--un_known" in err
    assert run(capsys, "rank", *arguments, "--prompt", "a", images[0], "--un_known")[0] == 2


def test_version_and_help(capsys):
    """Version and help are no errors."""
    assert run(capsys, "--version")[:2] == (0, f"rewarddance {__version__}\n")
    code, out, _ = run(capsys, "score", "--help")
    assert code == 0
    assert "--reference" in out


def test_runs_as_a_module_without_heavy_imports():
    """`python -m` works, and help needs no torch."""
    code = (
        "import runpy, sys; sys.argv = ['rewarddance', '--help']\n"
        "try: runpy.run_module('rewarddance_hf', run_name='__main__')\n"
        "except SystemExit as exit: sys.exit(exit.code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: rewarddance ")
    assert torch.get_num_threads() == 1


def test_score_in_shards(capsys, pointwise_judge, images, tmp_path, monkeypatch):
    """Workers score a shard each, as an array job of Slurm does, and `merge` joins them."""
    table = tmp_path / "rows.parquet"
    rows = [{"file": path, "prompt": "a red circle", "id": f"row {i}"} for i, path in enumerate(images)]
    datasets.Dataset.from_list(rows).to_parquet(table)
    command = ["score", "--model", pointwise_judge, "--data", table, "--columns", "image=file", "--num-shards", 2]
    folder = tmp_path / "scores"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    code, out, _ = run(capsys, *command, "--output", folder)
    assert code == 0
    assert "rewarddance merge" in out
    assert run(capsys, "merge", folder)[::2] == (
        1,
        f"rewarddance merge: error: 1 of 2 shards are missing in '{folder}': 0. Score them first; finished ones are not scored again.\n",
    )
    assert run(capsys, *command, "--output", folder, "--shard", 0)[0] == 0
    code, out, _ = run(capsys, "merge", folder)
    assert (code, out.strip()) == (0, str(folder / "scores.parquet"))
    merged = datasets.Dataset.from_parquet(out.strip(), cache_dir=str(tmp_path / "cache"))
    assert merged["id"][:] == [row["id"] for row in rows]
    expected = RewardDanceScorer.from_pretrained(pointwise_judge).score(images, "a red circle")
    torch.testing.assert_close(torch.tensor(merged["score"][:]), expected)
    code, _, err = run(capsys, *command, "--output", folder, "--prompt", "a")
    assert code == 2
    assert "--prompt: not allowed with argument --num-shards" in err
