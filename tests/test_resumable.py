"""Rows on disk: whole or not at all, exactly once, and never mixed with those of another judge."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from new_process import run_together
from PIL import Image

from rewarddance_hf import resumable
from rewarddance_hf.parallel import Processes, run_split
from rewarddance_hf.resumable import RowFile, RowFolder, describe_weights, digest_of, write_atomically


WRITER = """
import random, sys, time
from rewarddance_hf.resumable import RowFile
file = RowFile(sys.argv[1], {"judge": "a"}, 400)
for row in range(400):
    if row not in file.rows:
        file.append([{"row": row, "score": row / 400}])
file.merge()
"""


def as_process(monkeypatch, index, count):
    """Make this process one of several, which wait for nobody."""
    monkeypatch.setattr(resumable.Processes, "current", classmethod(lambda cls: cls(index, count)))
    monkeypatch.setattr(resumable.Processes, "gather", lambda self, values, group=None: values)


def test_file_goes_on_where_it_stopped(tmp_path):
    """A line that was cut off is removed, and its row is asked again; all others are kept."""
    path = tmp_path / "scores.jsonl"
    file = RowFile(path, {"judge": "a"}, 3)
    file.append([{"row": 0, "score": 0.5}, {"row": 2, "score": 0.25}])
    with open(path, "a") as stream:
        stream.write('{"row": 1, "sco')
    again = RowFile(path, {"judge": "a"}, 3)
    assert sorted(again.rows) == [0, 2]
    again.append([{"row": 1, "score": 0.75}])
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 2, 1]


def test_another_run_is_refused(tmp_path):
    """Another judge, fewer rows, a foreign line, a row twice and a lost fingerprint are errors that say what to do."""
    path = tmp_path / "scores.jsonl"
    RowFile(path, {"judge": "a", "rows": "x"}, 3).append([{"row": 2, "score": 0.5}])
    with pytest.raises(ValueError, match=r"\['judge'\] were others.*choose another place"):
        RowFile(path, {"judge": "b", "rows": "x"}, 3)
    with pytest.raises(ValueError, match=r"rows \[2\], but there are 2 rows only"):
        RowFile(path, {"judge": "a", "rows": "x"}, 2)
    content = path.read_text()
    path.write_text(content * 2)
    with pytest.raises(ValueError, match="Line 2 .* is a second result of row 2"):
        RowFile(path, {"judge": "a", "rows": "x"}, 3)
    path.write_text(content + "hello\n")
    with pytest.raises(ValueError, match="Line 2 .* is no result of a row"):
        RowFile(path, {"judge": "a", "rows": "x"}, 3)
    path.write_text(content)
    (tmp_path / "scores.jsonl.fingerprint.json").unlink()
    with pytest.raises(ValueError, match="is not beside it"):
        RowFile(path, {"judge": "a", "rows": "x"}, 3)


def test_parts_of_processes_are_joined(tmp_path, monkeypatch):
    """Three processes write a part each; the file has all rows in order, also if another number of processes goes on."""
    path = tmp_path / "scores [1].jsonl"
    for index in (2, 0):
        as_process(monkeypatch, index, 3)
        RowFile(path, {}, 5).append([{"row": row} for row in Processes(index, 3).rows(5)])
    assert not path.exists()
    monkeypatch.undo()
    file = RowFile(path, {}, 5)
    assert sorted(file.rows) == [0, 2, 3]
    file.append([{"row": 1}, {"row": 4}])
    file.merge()
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, f"{path.name}.fingerprint.json"]


def test_merge_that_was_killed(tmp_path, monkeypatch):
    """Parts that are still there after the file was written hold the same rows, and are no error."""
    path = tmp_path / "scores.jsonl"
    as_process(monkeypatch, 1, 2)
    part = RowFile(path, {}, 2)
    part.append([{"row": 1, "score": 0.5}])
    monkeypatch.undo()
    path.write_text('{"row": 0, "score": 0.1}\n{"row": 1, "score": 0.5}\n')
    RowFile(path, {}, 2).merge()
    assert len(path.read_text().splitlines()) == 2
    assert not list(tmp_path.glob("*-of-*"))


def test_kills_lose_and_repeat_nothing(tmp_path):
    """A writer that is killed again and again ends with every row once."""
    path, rng = tmp_path / "scores.jsonl", random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        deadline = time.monotonic() + 60
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True)
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == list(range(400))


def test_folder(tmp_path):
    """Rows are files of their own; another row in the place of one, and another run, are refused."""
    folder = RowFolder(tmp_path, {"seed": 0}, 2, "`output_dir`", ".arrow")
    image = Image.new("RGB", (2, 2), "red")
    folder.write(1, {"prompt": "a", "condition": image}, b"result")
    again = RowFolder(tmp_path, {"seed": 0}, 2, "`output_dir`", ".arrow")
    assert not again.is_done(0, {"prompt": "b"})
    assert again.is_done(1, {"condition": image.copy(), "prompt": "a"})
    assert again.read(1) == b"result"
    with pytest.raises(ValueError, match="another row in the place of row 1"):
        again.is_done(1, {"prompt": "a", "condition": Image.new("RGB", (2, 2), "blue")})
    with pytest.raises(ValueError, match=r"`output_dir` belongs to a run in which \['seed'\]"):
        RowFolder(tmp_path, {"seed": 1}, 2, "`output_dir`", ".arrow")
    with pytest.raises(ValueError, match=r"results of the rows \[1\], but there are 1 rows"):
        RowFolder(tmp_path, {"seed": 0}, 1, "`output_dir`", ".arrow")


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    """A write that fails on its way leaves what was there."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_digests():
    """Values, images and weights that differ have other digests; equal ones the same."""
    image = Image.new("RGB", (2, 3))
    values = [
        "a",
        ("a",),
        ["a", "b"],
        ["ab"],
        None,
        0,
        image,
        image.resize((3, 2)),
        {"a": image},
        {"a": None},
        torch.ones(2),
    ]
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    layer = torch.nn.Linear(3, 4)
    before = describe_weights(layer)
    with torch.no_grad():
        layer.bias += 1
    assert describe_weights(layer) != before


def test_work_of_one_process():
    """Without a launcher there is one process, which works on everything; its error is raised as it is."""
    assert run_split(lambda rows: [row * row for row in rows], 4) == [0, 1, 4, 9]
    assert run_split(lambda rows: [], 0) == []
    with pytest.raises(KeyError, match="no such row"):
        run_split(lambda rows: {}["no such row"], 2)
    with pytest.raises(ValueError, match="zip"):
        run_split(lambda rows: [1], 2)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_work_of_several_processes(tmp_path, count):
    """
    Real processes: all have all results in order, wait for each other however long one works (they used to give up after half
    an hour), and a failure on one is raised on all.
    """
    script = tmp_path / "work.py"
    script.write_text(
        "import datetime, os, time\n"
        "from pathlib import Path\n"
        "from accelerate import PartialState\n"
        "from rewarddance_hf.parallel import Processes, run_split\n"
        "Path(f'ready-{os.environ[\"RANK\"]}').touch()\n"  # who starts late is not waited for in 3 seconds
        "while len(list(Path().glob('ready-*'))) < int(os.environ['WORLD_SIZE']):\n"
        "    time.sleep(0.01)\n"
        "PartialState(cpu=True, timeout=datetime.timedelta(seconds=3))\n"
        "def slow(rows):\n"
        "    time.sleep(5 if 0 in rows else 0)\n"  # longer than processes wait by default
        "    return list(rows)\n"
        "assert run_split(slow, 7) == list(range(7))\n"
        "results = run_split(lambda rows: [f'{row}' for row in rows], 7)\n"
        "assert results == [str(row) for row in range(7)], results\n"
        "def work(rows):\n"
        "    if 1 in rows:\n"
        "        raise KeyError('row 1')\n"
        "    return list(rows)\n"
        "try:\n"
        "    run_split(work, 7)\n"
        "except (KeyError, RuntimeError) as error:\n"
        "    print('caught', type(error).__name__, error, flush=True)\n"
        "Processes.current().wait()\n"
    )
    results = run_together(script, count=count, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, cwd=tmp_path)
    assert [result.returncode for result in results] == [0] * count, results[0].stderr
    written = "".join(result.stdout for result in results)
    assert written.count("caught KeyError 'row 1'") == 1
    failure = f"caught RuntimeError 1 of {count} processes failed, the first with KeyError: 'row 1'"
    assert written.count(failure) == count - 1
