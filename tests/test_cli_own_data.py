"""Own files through the commands, as typed, in-process."""

import csv
import importlib.util
import json
import logging

import numpy as np
import pytest
import torch
from tiny_vlms import random_image
from transformers.utils import logging as hf_logging

from rewarddance_hf import RewardDanceEvaluator, RewardDanceForYesScoring, RewardDanceScorer
from rewarddance_hf.cli import main
from rewarddance_hf.shapes.generator import BASE_GENERATOR


@pytest.fixture(scope="module")
def vlm(vlm_folder):
    return str(vlm_folder("internvl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of twelve images, one of them truncated, with a table of pairs and one of samples."""
    path = tmp_path_factory.mktemp("own")
    for i in range(12):
        random_image(i).save(path / f"{i:02}.png")
    (path / "cut.png").write_bytes((path / "00.png").read_bytes()[:-40])
    pairs = [[f"a circle {i // 2}", f"{i:02}.png", f"{11 - i:02}.png", "ab"[i % 2]] for i in range(6)]
    samples = [["a circle", f"{i:02}.png"] for i in range(3)] + [["a circle", "cut.png"], ["a square", "05.png"]]
    for name, header, rows in (
        ("pairs.csv", ["caption", "a", "b", "winner"], pairs),
        ("samples.csv", ["prompt", "image"], samples),
    ):
        with open(path / name, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return path


COLUMNS = ["--columns", "prompt=caption,image_1=a,image_2=b,label=winner"]


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def training(vlm, folder, output, *more):
    small = [
        "--max-steps",
        1,
        "--per-device-train-batch-size",
        2,
        "--use-cpu",
        "--report-to",
        "none",
        "--save-strategy",
    ]
    command = ["train", "--model", vlm, "--data", folder / "pairs.csv", *COLUMNS, "--output-dir", output]
    return [*command, *small, "no", "--disable-tqdm", "true", "--bf16", "false", *more]


def test_train_and_evaluate(capsys, vlm, folder, tmp_path):
    """A CSV of own pairs gives a judge with the accuracy on held-out rows, which `evaluate` measures again."""
    code, out, err = run(capsys, *training(vlm, folder, tmp_path, "--test-split-size", 2))
    assert code == 0, err
    assert "Accuracy on 2 rows that were not trained on: " in out
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert results["eval_num_rows"] == 2
    assert "pairs.csv" in (tmp_path / "README.md").read_text()
    evaluate = ["evaluate", "--model", tmp_path, "--data", folder / "pairs.csv", *COLUMNS, "--test-split-size", 2]
    code, out, _ = run(capsys, *evaluate, "--json")
    metrics = json.loads(out)["metrics"]
    assert code == 0
    assert metrics["nll"] == pytest.approx(results["eval_nll"], abs=1e-4)
    assert "accuracy_with_ties" not in metrics


@pytest.mark.slow
def test_dry_run(capsys, vlm, folder, tmp_path, monkeypatch):
    """Rows, a picture, tokens, updates, memory and time are shown, and no weights are loaded."""
    monkeypatch.setattr(RewardDanceForYesScoring, "from_pretrained", None)
    code, out, err = run(capsys, *training(vlm, folder, tmp_path, "--test-split-size", 2, "--dry-run"))
    assert code == 0, err
    for text in (
        "rows to train on: 4",
        "rows to measure on: 2",
        "tokens of an image",
        "updates: 1 of 2 rows",
        "memory, counted",
        "time",
    ):
        assert text in out
    assert (tmp_path / "dry_run.png").stat().st_size > 1000


def test_dry_run_of_a_tuning(capsys, vlm, tmp_path):
    """Prompts are lines of a text file, of which some are held out where something is measured."""
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(40)))
    command = ["tune", "--pipeline", BASE_GENERATOR, "--judge", vlm, "--data", tmp_path / "prompts.txt"]
    command += [
        "--output-dir",
        tmp_path / "out",
        "--use-cpu",
        "--bf16",
        "false",
        "--dry-run",
        "--per-device-train-batch-size",
        4,
    ]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert "prompts to train on: 40" in out
    code, out, _ = run(capsys, *command, "--held-out-judge", vlm)
    assert "prompts to train on: 38" in out


def test_bad_rows_end_a_training_before_weights_are_loaded(capsys, vlm, folder, tmp_path, monkeypatch):
    """The error names file and line; with `--skip-bad-rows` training goes on."""
    monkeypatch.setattr(RewardDanceForYesScoring, "from_pretrained", None)
    with open(folder / "bad.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "chosen", "rejected"], ["a", "00.png", "01.png"], ["b", "cut.png", "01.png"]]
        )
    command = [
        "train",
        "--model",
        vlm,
        "--data",
        folder / "bad.csv",
        "--output-dir",
        tmp_path,
        "--use-cpu",
        "--bf16",
        "false",
    ]
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "1 of 2 rows of bad.csv cannot be used. bad.csv, line 3: " in err
    assert "cut.png" in err
    code, out, _ = run(capsys, *command, "--skip-bad-rows", "--dry-run")
    assert code == 0
    assert "rows to train on: 1" in out


def test_wrong_flags_and_folders(capsys, folder, tmp_path):
    """A mistyped flag and a folder that is not there are said before anything is read."""
    command = [
        "train",
        "--data",
        folder / "pairs.csv",
        "--output-dir",
        tmp_path,
        "--use-cpu",
        "--bf16",
        "false",
        "--model",
    ]
    code, _, err = run(capsys, *command, "m", "--colums", "a=b")
    assert code == 2
    assert "unrecognized arguments: ['--colums', 'a=b']" in err
    code, _, err = run(capsys, *command, "./nothing")
    assert code == 1
    assert "there is no such folder" in err


def test_one_bad_file_does_not_end_scoring(capsys, vlm, folder, tmp_path):
    """All others are scored, in a folder and in a table, and into a file that a second call leaves as it is."""
    pointwise = ["--model", vlm, "--paradigm", "pointwise"]
    (tmp_path / "few").mkdir()
    for name in ("00.png", "01.png", "cut.png"):
        (tmp_path / "few" / name).write_bytes((folder / name).read_bytes())
    output = tmp_path / "scores.jsonl"
    want = RewardDanceScorer.from_pretrained(vlm, paradigm="pointwise").score([random_image(0), random_image(1)], "a")
    command = ["score", *pointwise, "--image", tmp_path / "few", "--prompt", "a"]
    for more in ([], ["--output", output], ["--output", output]):
        code, out, err = run(capsys, *command, *more)
        assert code == 1
        assert "1 of 3 could not be scored" in err.splitlines()[-1]
        assert "cut.png" in err.splitlines()[-1]
        lines = [line.split("\t") for line in out.splitlines()]
        assert [float(line[0]) for line in lines] == pytest.approx(
            [*want.tolist(), float("nan")], abs=1e-5, nan_ok=True
        )
    assert len(output.read_text().splitlines()) == 2
    code, out, _ = run(capsys, "rank", *pointwise, "--data", folder / "samples.csv", "--json")
    (ranking,) = json.loads(out)["rankings"]
    assert code == 1
    assert (ranking["prompt"], len(ranking["images"])) == ("a circle", 3)
    code, out, _ = run(capsys, "rank", *pointwise, "--prompt", "a", tmp_path / "few")
    assert [line.split("\t")[0] for line in out.splitlines()] == ["place", "1", "2"]


def test_an_interrupted_command_says_what_was_kept(capsys, vlm, folder, tmp_path, monkeypatch):
    """Ctrl-C ends with one line and code 130."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardDanceScorer, "score_dataset", interrupt)
    command = ["score", "--model", vlm, "--paradigm", "pointwise", "--data", folder / "samples.csv", "--output"]
    code, _, err = run(capsys, *command, tmp_path / "scores.jsonl")
    assert code == 130
    assert err.splitlines()[-1].startswith(
        f"rewarddance score: interrupted. Scores are in {tmp_path / 'scores.jsonl'}"
    )
    monkeypatch.setattr("rewarddance_hf.scripts.train.load_rows", interrupt)
    code, _, err = run(capsys, *training(vlm, folder, tmp_path))
    assert code == 130
    assert err.splitlines()[-1] == (
        "rewarddance train: interrupted. No checkpoint was written; --save_steps says how often one is."
    )


def test_no_connection_and_no_memory(capsys, vlm, folder, monkeypatch):
    """What a network or a device refuses ends with one line that says what can be done."""
    client = importlib.import_module(
        "httpx2" if importlib.util.find_spec("httpx2") else "httpx"
    )  # of the Hub's client
    command = ["score", "--model", vlm, "--paradigm", "pointwise", "--image", folder / "00.png", "--prompt", "a"]
    for error, message in (
        (client.ConnectError("refused"), "(ConnectError: refused). Check the network"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            "Memory ran out (CUDA out of memory. Tried). Use smaller",
        ),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(RewardDanceScorer, "from_pretrained", fail)
        code, _, err = run(capsys, *command)
        assert code == 1
        assert message in err.splitlines()[-1]


def test_swapped_columns_are_suspected(caplog, vlm):
    """A judge that is nearly always wrong has most likely been given swapped columns."""
    rows = [{"prompt": "a", "chosen": random_image(i), "rejected": random_image(i + 50)} for i in range(20)]
    order = {image.tobytes(): -i for i, row in enumerate(rows) for image in (row["chosen"],)}
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        RewardDanceEvaluator(rows)(
            lambda images, prompts, **_: torch.tensor([float(order.get(i.tobytes(), 9)) for i in images])
        )
    hf_logging.disable_propagation()
    assert "far below one half" in caplog.text


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_outputs_of_pipelines(vlm, output_type):
    """What a pipeline gives is scored the same, whatever its `output_type`."""
    pixels = np.stack([np.asarray(random_image(i).resize((32, 32))) for i in range(2)]).astype(np.float32) / 255
    scorer = RewardDanceScorer.from_pretrained(vlm, paradigm="pointwise")
    want = scorer.score([random_image(i).resize((32, 32)) for i in range(2)], "a")
    images = pixels if output_type == "np" else torch.from_numpy(pixels).permute(0, 3, 1, 2)
    torch.testing.assert_close(scorer.score(images, "a"), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"must be finite and in `\[0, 1\]`"):
        scorer.score(images * 2, "a")
