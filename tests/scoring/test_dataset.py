"""Scoring of datasets into files: interrupted at any byte, it ends with each score once."""

import json

import datasets
import numpy as np
import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer


ROWS = [
    {"image": random_image(i), "prompt": prompt, "reference": random_image(20 + i // 3)}
    for i, prompt in enumerate(["a red circle", "two", "a", "a red circle", "no", "yes", "two", "a"])
]


def read_scores(path):
    """Scores in a file, by row."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["row"]: entry["score"] for entry in map(json.loads, lines)}


@pytest.fixture(scope="module")
def scorer(vlm_folder):
    folder = vlm_folder("internvl")
    model = RewardDanceForYesScoring.from_pretrained(folder)
    return RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(folder), batch_size=2)


@pytest.fixture(scope="module")
def scores(scorer):
    columns = {name: [row[name] for row in ROWS] for name in ("image", "prompt", "reference")}
    return scorer.score(columns["image"], columns["prompt"], columns["reference"])


def assert_complete(path, scores):
    """Each row is in the file once, with its score."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(entry["row"] for entry in entries) == list(range(len(ROWS)))
    got = torch.tensor([entry["score"] for entry in sorted(entries, key=lambda entry: entry["row"])])
    torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_file_has_the_scores(scorer, scores, tmp_path, engine):
    """The file holds what `score` gives; a second call has nothing to do."""
    scorer = RewardDanceScorer(scorer.model, scorer.processor, batch_size=3, engine=engine)
    path = tmp_path / "scores.jsonl"
    assert scorer.score_dataset(ROWS, path, save_every=3, show_progress=False) == 8
    assert_complete(path, scores)
    before = path.read_bytes()
    assert scorer.score_dataset(ROWS, path, show_progress=False) == 0
    assert path.read_bytes() == before


def test_interrupted_run_goes_on(scorer, scores, tmp_path):
    """What was written stays and is not scored again."""
    path = tmp_path / "scores.jsonl"
    seen = []

    class Rows(list):
        def __getitem__(self, row):
            if row == 6 and not seen.count(6):
                seen.append(6)
                raise KeyboardInterrupt("at row 6")
            seen.append(row)
            return super().__getitem__(row)

    with pytest.raises(KeyboardInterrupt, match="at row 6"):
        scorer.score_dataset(Rows(ROWS), path, save_every=2, show_progress=False)
    done = read_scores(path)
    assert len(done) == 4
    seen.clear()
    seen.append(6)
    assert scorer.score_dataset(Rows(ROWS), path, save_every=2, show_progress=False) == 4
    assert seen == [6, 4, 5, 6, 7]
    assert_complete(path, scores)


@pytest.mark.parametrize("cut", [1, 5, 20, 33, 60])
def test_line_that_was_cut_off_is_repaired(scorer, scores, tmp_path, cut):
    """A run that was killed within a write goes on after its last whole line."""
    path = tmp_path / "scores.jsonl"
    scorer.score_dataset(ROWS, path, show_progress=False)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    num_whole = content[:-cut].count(b"\n")
    assert scorer.score_dataset(ROWS, path, show_progress=False) == 8 - num_whole
    assert_complete(path, scores)


EXAMPLES = [
    {"image": random_image(30 + i), "prompt": "two", "reference": random_image(40 + i), "verdict": verdict}
    for i, verdict in enumerate(["yes", "no"])
]


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_examples_are_shown_before_each_row(scorer, scores, tmp_path, engine):
    """Scores after examples are those of `score` with the same ones, also of the rows that a resumed call does."""
    scorer = RewardDanceScorer(scorer.model, scorer.processor, batch_size=3, engine=engine)
    path = tmp_path / "scores.jsonl"
    columns = {name: [row[name] for row in ROWS] for name in ("image", "prompt", "reference")}
    wanted = scorer.score(columns["image"], columns["prompt"], columns["reference"], examples=EXAMPLES)
    assert not torch.allclose(wanted, scores, rtol=1e-2)
    assert scorer.score_dataset(ROWS, path, save_every=3, show_progress=False, examples=EXAMPLES) == 8
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))
    assert scorer.score_dataset(ROWS, path, show_progress=False, examples=EXAMPLES) == 3
    assert_complete(path, wanted)


def test_examples_have_the_task_of_the_row(scorer, tmp_path):
    """Where rows have several tasks, an example that names none states the criteria of each row's own."""
    tasks = ["text-to-image", "text-to-video", "text-to-image"]
    clips = [random_image(50), [random_image(51), random_image(52)], random_image(53)]
    rows = [
        {"image": clip, "prompt": "a", "reference": clip, "task": task}
        for clip, task in zip(clips, tasks, strict=True)
    ]
    example = {
        "image": [random_image(54), random_image(55)],
        "reference": [random_image(55), random_image(54)],
        "prompt": "two",
        "verdict": "no",
    }
    scorer.score_dataset(rows, tmp_path / "scores.jsonl", show_progress=False, examples=[example])
    got = read_scores(tmp_path / "scores.jsonl")
    for i, row in enumerate(rows):
        wanted = scorer.score(
            [row["image"]],
            row["prompt"],
            [row["reference"]],
            task=row["task"],
            examples=[{**example, "task": tasks[i]}],
        )
        assert got[i] == pytest.approx(float(wanted), rel=1e-4)


def test_wrong_examples_are_refused_before_anything_is_scored(scorer, tmp_path):
    """An example that lacks something is named, and the file stays empty."""
    path = tmp_path / "scores.jsonl"
    with pytest.raises(ValueError, match=r"`examples\[1\]` has the keys"):
        scorer.score_dataset(ROWS, path, show_progress=False, examples=[EXAMPLES[0], {"prompt": "two"}])
    assert read_scores(path) == {}


def test_progress_starts_where_it_stopped(scorer, tmp_path, capfd):
    """The bar counts rows that are known."""
    path = tmp_path / "scores.jsonl"
    scorer.score_dataset(ROWS, path, show_progress=False)
    path.write_text("".join(f'{{"row": {row}, "score": 0.5}}\n' for row in range(6)))
    scorer.score_dataset(ROWS, path)
    assert "8/8" in capfd.readouterr().err
    assert read_scores(path)[5] == 0.5


def test_file_of_another_judge_or_other_rows_is_refused(scorer, vlm_folder, tmp_path):
    """Scores of another judge, other prompts, other images or after other examples are not mixed; the file stays."""
    path = tmp_path / "scores.jsonl"
    scorer.score_dataset(ROWS[:3], path, show_progress=False, examples=EXAMPLES)
    content = path.read_bytes()
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    again = RewardDanceScorer(model, processor, engine="plain")
    assert again.score_dataset(ROWS[:3], path, show_progress=False, examples=EXAMPLES) == 0
    other_rows = [ROWS[0], ROWS[1] | {"prompt": "another"}, ROWS[2]]
    other_images = [ROWS[0], ROWS[1] | {"image": ROWS[3]["image"]}, ROWS[2]]
    for rows, examples, match in [
        (other_rows, EXAMPLES, r"\['rows'\] were others"),
        (other_images, EXAMPLES, r"\['rows'\] were others"),
        (ROWS, EXAMPLES, r"\['rows'\] were others"),
        (ROWS[:3], EXAMPLES[:1], r"\['examples'\] were others"),
    ]:
        with pytest.raises(ValueError, match=match):
            scorer.score_dataset(rows, path, show_progress=False, examples=examples)
    settings = {"criteria": {"text-to-image": "whether it is red"}}
    asking = RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), **settings))
    with pytest.raises(ValueError, match=r"`output_file` .* in which \['processor'\] were others"):
        asking.score_dataset(ROWS[:3], path, show_progress=False, examples=EXAMPLES)
    model.get_output_embeddings().weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"\['weights'\] were others"):
        again.score_dataset(ROWS[:3], path, show_progress=False, examples=EXAMPLES)
    assert path.read_bytes() == content


@pytest.mark.parametrize("form", ["dataset", "arrays", "files"])
def test_another_image_in_the_same_place_is_refused(scorer, tmp_path, form):
    """Of more than 16 rows not all images are looked at, but 16 of them in whatever form they are."""

    def rows(changed):
        images = [random_image(i + changed * (i == 5), 28, 28) for i in range(20)]
        if form == "files":
            for i, image in enumerate(images):
                image.save(tmp_path / f"{i}.png")
            images = [str(tmp_path / f"{i}.png") for i in range(20)]
        if form == "arrays":
            images = [np.asarray(image) for image in images]
        if form == "dataset":
            features = datasets.Features({"image": datasets.Image(), "reference": datasets.Image()})
            columns = {"image": images, "reference": images}
            return datasets.Dataset.from_dict(columns, features).add_column("prompt", ["a"] * 20)
        return [{"image": image, "prompt": "a", "reference": image} for image in images]

    path = tmp_path / "scores.jsonl"
    assert scorer.score_dataset(rows(changed=0), path, show_progress=False) == 20
    assert scorer.score_dataset(rows(changed=0), path, show_progress=False) == 0
    with pytest.raises(ValueError, match=r"\['rows'\] were others"):
        scorer.score_dataset(rows(changed=1), path, show_progress=False)


def test_rows_of_a_dataset(scorer, scores, tmp_path):
    """A dataset goes on where it stopped, also when it is loaded again; other prompts are refused."""
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    features = datasets.Features(
        {"image": datasets.Image(), "prompt": datasets.Value("string"), "reference": datasets.Image()}
    )
    path = tmp_path / "scores.jsonl"
    assert scorer.score_dataset(datasets.Dataset.from_dict(columns, features), path, show_progress=False) == 8
    assert_complete(path, scores)
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert scorer.score_dataset(loaded, path, show_progress=False) == 0
    renamed = columns | {"prompt": [*columns["prompt"][:-1], "b"]}
    with pytest.raises(ValueError, match=r"\['rows'\] were others"):
        scorer.score_dataset(datasets.Dataset.from_dict(renamed, features), path, show_progress=False)


def test_wrong_files_and_rows(scorer, tmp_path):
    """Files of unknown origin, broken files, and rows that lack something are refused by name."""
    path = tmp_path / "scores.jsonl"
    scorer.score_dataset(ROWS, path, show_progress=False)
    for content, match in [
        ('{"row": 8, "score": 0.5}\n', r"has results of the rows \[8\], but there are 8 rows"),
        ('{"row": 1, "score": 0.5}\n{"row": 1, "score": 0.5}\n', "Line 2 .* is a second result of row 1"),
        ('{"row": 0, "score": 0.5}\nhello\n{"row": 2, "score": 0.5}\n', "Line 2 .* is no result"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=match):
            scorer.score_dataset(ROWS, path, show_progress=False)
        assert path.read_text() == content
    (tmp_path / "scores.jsonl.fingerprint.json").unlink()
    with pytest.raises(ValueError, match="which tells what made them, is not beside it"):
        scorer.score_dataset(ROWS, path, show_progress=False)
    path = tmp_path / "others.jsonl"
    with pytest.raises(ValueError, match=r"Row 1 has no \['reference'\], but a pairwise judge needs"):
        scorer.score_dataset([ROWS[0], {"image": ROWS[0]["image"], "prompt": "a"}], path, show_progress=False)
    with pytest.raises(TypeError, match=r"`prompts\[0\]` is of type `int`"):
        scorer.score_dataset([ROWS[0] | {"prompt": 3}], tmp_path / "third.jsonl", show_progress=False)
    with pytest.raises(ValueError, match="`save_every` is 0"):
        scorer.score_dataset(ROWS, path, save_every=0)


def test_nan_keeps_what_was_before(vlm_folder, tmp_path):
    """A row without a finite score is named, and the rows before it are in the file."""
    folder = vlm_folder("internvl")
    model = RewardDanceForYesScoring.from_pretrained(folder)
    scorer = RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(folder))
    path = tmp_path / "scores.jsonl"

    class Rows(list):
        def __getitem__(self, row):
            if row == 5:
                model.get_output_embeddings().weight.data.fill_(torch.nan)
            return super().__getitem__(row)

    with pytest.raises(ValueError, match=r"Scores of the rows \[2, 3\] are NaN .* The 2 rows before are in the file"):
        scorer.score_dataset(Rows(ROWS), path, save_every=2, show_progress=False)
    assert sorted(read_scores(path)) == [0, 1]
