"""Commands on edits: each row's own source image is shown to the judge, and given to the generator."""

import csv
import json

import datasets
import diffusers
import pytest
from tiny_vlms import random_image

from rewarddance_hf import (
    RewardDanceEvaluator,
    RewardDanceScorer,
)
from rewarddance_hf.cli import main
from rewarddance_hf.data.files import load_rows
from rewarddance_hf.shapes.generator import load_generator


SMALL = "--max-steps 1 --per-device-train-batch-size 1 --gradient-accumulation-steps 1 --use-cpu --bf16 false".split()
SMALL += ["--save-strategy", "no", "--disable-tqdm", "true", "--report-to", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images with `metadata.csv`: pairs of edits of three sources, of other size than the edits."""
    folder = tmp_path_factory.mktemp("edits")
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["instruction", "source_file_name", "chosen_file_name", "rejected_file_name"])
        for i in range(6):
            names = [f"{part}{i % 3 if part == 'source' else i}.png" for part in ("source", "chosen", "rejected")]
            for j, name in enumerate(names):
                random_image(10 * (i % 3 if j == 0 else i) + j, *((48, 32) if j == 0 else (32, 32))).save(
                    folder / name
                )
            table.writerow([f"make it {i // 3}", *names])
    return folder


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """The tiny generator of the package as one that starts from an image."""
    folder = tmp_path_factory.mktemp("editor")
    diffusers.StableDiffusion3Img2ImgPipeline(**load_generator().components).save_pretrained(folder)
    return str(folder)


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


COLUMNS = ["--columns", "prompt=instruction,condition=source_file_name"]


def rows_of(folder):
    return load_rows(str(folder), columns=COLUMNS[1])


def test_evaluate(capsys, judge, folder, tmp_path):
    """A folder with `metadata.csv`, and the same as a Parquet file with images in it, are measured as edits."""
    rows = rows_of(folder)
    evaluator = RewardDanceEvaluator([{**row, "task": "image-editing"} for row in rows])
    want = evaluator(RewardDanceScorer.from_pretrained(judge))
    code, out, err = run(capsys, "evaluate", "--model", judge, "--data", folder, *COLUMNS, "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["nll"] == pytest.approx(want["nll"], abs=1e-5)
    table = datasets.Dataset.from_dict(
        {
            "instruction": [row["prompt"] for row in rows],
            "task": ["image-editing", None] * 3,
            **{name: [row[name] for row in rows] for name in ("chosen", "rejected", "condition")},
        },
        features=datasets.Features(
            **dict.fromkeys(("instruction", "task"), datasets.Value("string")),
            **dict.fromkeys(("chosen", "rejected", "condition"), datasets.Image()),
        ),
    )
    table.to_parquet(tmp_path / "edits.parquet")
    command = ["evaluate", "--model", judge, "--data", tmp_path / "edits.parquet", "--columns", "prompt=instruction"]
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["nll"] == pytest.approx(want["nll"], abs=1e-5)


def test_a_missing_source_in_a_table_with_images_is_named(capsys, judge, tmp_path):
    """Also where images are inside of the file: a row without one, and a file without the column."""
    image, names = datasets.Image(), ("chosen", "rejected", "condition")
    features = datasets.Features(
        prompt=datasets.Value("string"), task=datasets.Value("string"), **dict.fromkeys(names, image)
    )
    values = {name: [random_image(10 * i + j) for i in range(2)] for j, name in enumerate(names)}
    values |= {"prompt": ["x", "y"], "task": ["image-editing"] * 2}
    values["condition"][1] = None
    table = datasets.Dataset.from_dict(values, features=features)
    for name, part, count in (("null", table, 1), ("none", table.remove_columns("condition"), 2)):
        part.to_parquet(tmp_path / f"{name}.parquet")
        code, _, err = run(capsys, "evaluate", "--model", judge, "--data", tmp_path / f"{name}.parquet")
        assert code == 1
        assert f"{count} of 2 rows of {name}.parquet cannot be used" in err
        assert "is None, but the task is 'image-editing'" in err


def test_a_missing_source_is_named(capsys, judge, tmp_path):
    """A row that is said to be an edit and has no source image is refused with its line, or left out."""
    for name in ("a", "b"):
        random_image(ord(name), 32, 32).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text("prompt,chosen,rejected,task\nx,a.png,b.png,image-editing\n")
    code, _, err = run(capsys, "evaluate", "--model", judge, "--data", tmp_path)
    assert code == 1
    assert "1 of 1 rows of metadata.csv cannot be used. `condition of metadata.csv, line 2` is None" in err
    assert "but the task is 'image-editing'" in err


def test_train(capsys, judge, folder, tmp_path):
    """A judge is trained on edits from a folder, as typed."""
    command = ["train", "--model", judge, "--data", folder, *COLUMNS, "--output-dir", tmp_path, *SMALL]
    code, out, err = run(capsys, *command, "--test-split-size", 3, "--eval-strategy", "no")
    assert code == 0, err
    assert "Accuracy on 3 rows that were not trained on: " in out


def test_score_and_rank(capsys, judge, pointwise_judge, folder):
    """Each image is scored beside its own source, and edits of different sources are no rivals."""
    rows, scorer = rows_of(folder), RewardDanceScorer.from_pretrained(pointwise_judge)
    columns = "image=chosen_file_name,prompt=instruction,condition=source_file_name"
    command = ["score", "--model", pointwise_judge, "--data", folder, "--columns", columns, "--json"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    got = [row["score"] for row in json.loads(out)["scores"]]
    want = scorer.score(
        [row["chosen"] for row in rows], list(rows["prompt"]), conditions=[row["condition"] for row in rows]
    )
    assert got == pytest.approx(want.tolist(), abs=1e-5)
    assert len({round(value, 6) for value in got}) > 1

    images = [folder / "chosen0.png", folder / "chosen1.png", folder / "rejected0.png"]
    command = ["score", "--model", pointwise_judge, "--prompt", "make it 0", "--image", *images, "--json"]
    code, out, err = run(capsys, *command, "--condition", folder / "source0.png")
    assert code == 0, err
    source = str(folder / "source0.png")
    want = scorer.score([str(image) for image in images], "make it 0", conditions=[source] * 3)
    assert [row["score"] for row in json.loads(out)["scores"]] == pytest.approx(want.tolist(), abs=1e-5)
    assert run(capsys, *command, "--condition", source, source)[0] == 2

    command = ["rank", "--model", judge, "--prompt", "make it 0", "--condition", source, *images, "--json"]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    ranking = RewardDanceScorer.from_pretrained(judge).rank(
        [str(image) for image in images], "make it 0", condition=source
    )
    assert json.loads(out)["scores"] == pytest.approx(ranking.scores.tolist(), abs=1e-5)

    table = folder.parent / "samples.csv"
    lines = [
        f"make it,{folder}/{kind}{i}.png,{folder}/source{i}.png" for i in (0, 1) for kind in ("chosen", "rejected")
    ]
    table.write_text("\n".join(["prompt,image,condition", *lines]) + "\n")
    code, out, err = run(capsys, "rank", "--model", judge, "--data", table, "--json")
    assert code == 0, err
    rankings = json.loads(out)["rankings"]
    assert [ranking["condition"] for ranking in rankings] == [str(folder / f"source{i}.png") for i in (0, 1)]
    assert [len(ranking["images"]) for ranking in rankings] == [2, 2]


def test_generate(capsys, pointwise_judge, folder, editor, tmp_path):
    """The source image of each row is edited and judged; one of the command line serves all prompts."""
    scorer = RewardDanceScorer.from_pretrained(pointwise_judge)
    command = ["generate", "--pipeline", editor, "--model", pointwise_judge, "--budget", 4, "--steps", 4, "--json"]
    command += ["--argument", "max_sequence_length=1", "strength=0.5", "--output-dir"]
    code, out, err = run(capsys, *command, tmp_path / "data", "--data", folder, *COLUMNS, "--limit", 2)
    assert code == 0, err
    results = json.loads(out)["results"]
    assert len(results) == 2
    for number, result in enumerate(results):
        want = scorer.score(result["images"], result["prompt"], conditions=[str(folder / f"source{number}.png")])
        assert result["rewards"] == pytest.approx(want.tolist(), abs=1e-5)
    source = folder / "source1.png"
    more = ["--prompt", "a", "b", "--condition", source]
    code, out, err = run(capsys, *command, tmp_path / "one", *more)
    assert code == 0, err
    for result in json.loads(out)["results"]:
        want = scorer.score(result["images"], result["prompt"], conditions=[str(source)])
        assert result["rewards"] == pytest.approx(want.tolist(), abs=1e-5)
    assert run(capsys, *command, tmp_path / "two", *more, source, source)[0] == 2


def test_tune(capsys, judge, folder, editor, tmp_path):
    """A generator is tuned on the edits of a folder, by a pairwise judge and references of its own."""
    command = [
        "tune",
        "--pipeline",
        editor,
        "--judge",
        judge,
        "--data",
        folder,
        *COLUMNS,
        *SMALL,
        "--use-peft",
        "true",
    ]
    command += ["--num-candidates", 2, "--num-inference-steps", 4, "--output-dir", tmp_path, "--num-prompts", 2]
    command += ["--pipeline-kwargs", '{"strength": 0.5, "max_sequence_length": 1}']
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert "pipeline_tag: image-to-image" in (tmp_path / "README.md").read_text()
