"""Scores in shards: the same bytes by any number of workers, killed or not, and nothing of another run among them."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from new_process import run_together
from tiny_vlms import random_image

from rewarddance_hf import (
    ParquetRows,
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
    merge_shards,
    score_shards,
)


NUM_ROWS = 26
WINDOW = 4
WORKER = """
import sys
from rewarddance_hf import ParquetRows, RewardDanceScorer, score_shards
judge, rows, folder, num_shards, *shard = sys.argv[1:]
scorer = RewardDanceScorer.from_pretrained(judge, num_workers=0)
shard = int(shard[0]) if shard else None
print(score_shards(scorer, ParquetRows(rows), folder, int(num_shards), shard, window=4, show_progress=False))
"""


def png(seed):
    stream = io.BytesIO()
    random_image(seed).save(stream, "png")
    return stream.getvalue()


def write_rows(folder, num_rows=NUM_ROWS, bad=(), files=2):
    """Rows in parquet files of row groups that fit no shard."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "id": f"row-{i}",
            "image": {"bytes": b"no image" if i in bad else png(i), "path": None},
            "prompt": ["a red circle", "two", "a"][i % 3],
            "reference": {"bytes": png(100 + i // 4), "path": None},
        }
        for i in range(num_rows)
    ]
    half = -(-num_rows // files)
    for number, start in enumerate(range(0, num_rows, half)):
        pq.write_table(
            pa.Table.from_pylist(rows[start : start + half]), folder / f"{number}.parquet", row_group_size=5
        )
    return rows


@pytest.fixture(scope="module")
def judge_folder(vlm_folder, tmp_path_factory):
    source = vlm_folder("internvl")
    folder = tmp_path_factory.mktemp("judge")
    RewardDanceForYesScoring.from_pretrained(source).save_pretrained(folder)
    RewardDanceProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(judge_folder):
    return RewardDanceScorer.from_pretrained(judge_folder, num_workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, write_rows(folder)


@pytest.fixture(scope="module")
def merged(scorer, data, tmp_path_factory):
    """The merged file of one process and one shard."""
    folder = tmp_path_factory.mktemp("scores")
    assert score_shards(scorer, ParquetRows(data[0]), folder, window=WINDOW, show_progress=False) == NUM_ROWS
    return merge_shards(folder)


def scores_of(path):
    return {row["row"]: row["score"] for row in pq.read_table(path).to_pylist()}


def test_rows_are_read_in_any_order(data):
    """Rows of files are those that were written, whichever is asked for next."""
    folder, written = data
    rows = ParquetRows(folder, {"prompt": "text", "id": "id"})
    assert len(rows) == NUM_ROWS
    for i in [0, 1, 2, 13, 12, 25, 4, 5, 6, 24, 25, 0]:
        assert rows[i] == {"text": written[i]["prompt"], "id": written[i]["id"]}
    assert [row["id"] for row in rows] == [row["id"] for row in written]
    assert (
        ParquetRows([folder / "0.parquet", folder / "1.parquet"]).digest == ParquetRows(f"{folder}/*.parquet").digest
    )
    with pytest.raises(ValueError, match=r"has no columns \['caption'\]"):
        ParquetRows(folder, {"caption": "prompt"})
    with pytest.raises(FileNotFoundError, match="There is no parquet file at"):
        ParquetRows(folder / "none.parquet")


def test_scores_are_those_of_the_scorer(scorer, data, merged):
    """Row, ID and score of each row, once, in order."""
    table = pq.read_table(merged).to_pylist()
    assert [row["row"] for row in table] == list(range(NUM_ROWS))
    assert [row["id"] for row in table] == [row["id"] for row in data[1]]
    columns = [[row[name] for row in data[1]] for name in ("image", "prompt", "reference")]
    torch.testing.assert_close(torch.tensor([row["score"] for row in table]), scorer.score(*columns))


@pytest.mark.parametrize("num_shards", [2, 7, 40])
def test_any_number_of_shards_gives_equal_bytes(scorer, data, merged, tmp_path, num_shards):
    """The merged file is the same, also where shards are scored in another order, or are empty."""
    for shard in reversed(range(num_shards)):
        score_shards(scorer, ParquetRows(data[0]), tmp_path, num_shards, shard, WINDOW, show_progress=False)
    assert merge_shards(tmp_path).read_bytes() == merged.read_bytes()
    assert score_shards(scorer, ParquetRows(data[0]), tmp_path, num_shards, window=WINDOW, show_progress=False) == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_shards(judge_folder, data, merged, tmp_path, count):
    """Processes of one run score all shards together, each of them once."""
    counts = []
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    for result in run_together("-c", WORKER, judge_folder, data[0], tmp_path, "7", env=on_cpu, count=count):
        assert result.returncode == 0, result.stderr
        counts.append(int(result.stdout.split()[-1]))
    assert sum(counts) == NUM_ROWS
    assert min(counts) > 0
    assert merge_shards(tmp_path).read_bytes() == merged.read_bytes()


def test_gaps_and_strangers_are_refused(scorer, data, tmp_path):
    """Merging wants each shard once, made by the run that the manifest tells."""
    rows = ParquetRows(data[0])
    for shard in (0, 2):
        score_shards(scorer, rows, tmp_path, 3, shard, WINDOW, show_progress=False)
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards are missing in .*: 1\."):
        merge_shards(tmp_path)
    score_shards(scorer, rows, tmp_path, 3, 1, WINDOW, show_progress=False)
    shards = sorted((tmp_path / "shards").glob("*"))
    kept = [path.read_bytes() for path in shards]
    with pytest.raises(ValueError, match=r"belongs to a run in which \['num_shards', 'window'\] were others"):
        score_shards(scorer, rows, tmp_path, 2, 0, show_progress=False)
    other = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    with pytest.raises(ValueError, match=r"in which \['engine'\] were others"):
        score_shards(other, rows, tmp_path, 3, 0, WINDOW, show_progress=False)
    shards[1].write_bytes(kept[0])
    with pytest.raises(ValueError, match="must hold the rows 8 to 15, once each"):
        merge_shards(tmp_path)
    table = pq.read_table(io.BytesIO(kept[1]))
    manifest = json.loads(table.schema.metadata[b"rewarddance"])
    changed = table.replace_schema_metadata({b"rewarddance": json.dumps({**manifest, "weights": "others"})})
    pq.write_table(changed, shards[1])
    with pytest.raises(ValueError, match=r"was made with other \['weights'\]"):
        merge_shards(tmp_path)
    shards[1].write_bytes(kept[1])
    shards[0].with_name("shard-00000-of-00002.parquet").write_bytes(kept[0])
    with pytest.raises(ValueError, match=r"has shard-00000-of-00002\.parquet, which is none of the 3 shards"):
        merge_shards(tmp_path)


def test_bad_rows(scorer, tmp_path):
    """A corrupt image ends the run with its row, or is skipped with its reason."""
    write_rows(tmp_path / "data", 12, bad=(5, 9))
    rows = ParquetRows(tmp_path / "data")
    with pytest.raises(ValueError, match="5.*cannot be read as an image"):
        score_shards(scorer, rows, tmp_path / "raised", 3, window=WINDOW, show_progress=False)
    assert len(list((tmp_path / "raised/shards").glob("*.parquet"))) == 1  # what was finished
    score_shards(scorer, rows, tmp_path / "skipped", 3, window=WINDOW, skip_bad_rows=True, show_progress=False)
    table = pq.read_table(merge_shards(tmp_path / "skipped")).to_pylist()
    assert [row["row"] for row in table if row["score"] is None] == [5, 9]
    assert all("cannot be read as an image" in row["error"] for row in table if row["row"] in (5, 9))
    good = [row for row in table if row["row"] not in (5, 9)]
    whole = tmp_path / "whole"
    write_rows(whole, 12)
    score_shards(scorer, ParquetRows(whole), tmp_path / "all", window=WINDOW, show_progress=False)
    expected = scores_of(merge_shards(tmp_path / "all"))
    assert [row["score"] for row in good] == pytest.approx([expected[row["row"]] for row in good], rel=1e-5)


def test_nothing_but_bad_rows(scorer, tmp_path):
    """A shard without any score is an error, whatever is skipped."""
    rows = [{"image": b"no image", "prompt": "a", "reference": b"no image"}] * 3
    with pytest.raises(ValueError, match="None of the rows 0 to 2 can be scored"):
        score_shards(scorer, rows, tmp_path, skip_bad_rows=True, show_progress=False)


@pytest.mark.slow
def test_killed_workers(judge_folder, data, merged, tmp_path):
    """20 workers are killed at some moment; those that come after end with each row once."""
    command = [sys.executable, "-c", WORKER, judge_folder, data[0], tmp_path, "7"]
    started = time.monotonic()
    reference = tmp_path / "whole"
    subprocess.run([*command[:-2], reference, "7"], check=True)
    whole = time.monotonic() - started
    for kill in range(20):
        worker = subprocess.Popen(command)
        time.sleep(whole * (0.4 + 0.6 * kill / 20))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    subprocess.run(command, check=True)
    assert merge_shards(tmp_path).read_bytes() == merged.read_bytes()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_around_the_rename(scorer, data, merged, tmp_path, monkeypatch, moment):
    """A worker that dies before or after it has moved a shard to its place loses that shard at most."""

    class Killed(BaseException):
        pass

    original = getattr(os, moment)
    calls = itertools.count()

    def dies(*args):
        if next(calls) == 3:
            raise Killed
        return original(*args)

    monkeypatch.setattr(os, moment, dies)
    with pytest.raises(Killed):
        score_shards(scorer, ParquetRows(data[0]), tmp_path, 7, window=WINDOW, show_progress=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "shards").glob("*.parquet"))) == 2  # the manifest was written first
    score_shards(scorer, ParquetRows(data[0]), tmp_path, 7, window=WINDOW, show_progress=False)
    assert merge_shards(tmp_path).read_bytes() == merged.read_bytes()
