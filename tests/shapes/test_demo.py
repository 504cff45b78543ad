"""The demo from end to end, with few steps."""

import contextlib
import io
import json
import os
import pty
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from new_process import run_python
from PIL import Image

from rewarddance_hf.shapes.demo import REPORT, TITLES, run_demo
from rewarddance_hf.shapes.display import Display
from rewarddance_hf.shapes.report import STUDY_LINES
from rewarddance_hf.shapes.stages import Stage, run_stages


def test_demo_writes_its_report(tmp_path):
    """All files are written, metrics have the promised keys, and the report shows all three models."""
    metrics = run_demo(str(tmp_path), steps=2, rows=24, tuning_steps=2, prompts=8)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved == metrics
    for name in ("untrained", "judge", "regressive"):
        for split in ("id", "ood"):
            assert 0 <= metrics[f"{name}/{split}/accuracy"] <= 1
            assert metrics[f"{name}/{split}/num_rows"] == 24
        assert metrics[f"{name}/generated/num_rows"] > 10
    for name in ("base", "tuned", "hacked"):
        assert 0 <= metrics[f"generator/{name}/alignment"] <= 1
    for name in ("tuned", "hacked"):
        gain = metrics[f"generator/{name}/alignment"] - metrics["generator/base/alignment"]
        assert metrics[f"generator/{name}/gain"] == pytest.approx(gain)
        assert metrics[f"generator/{name}/gain_low"] <= gain + 1e-9 <= metrics[f"generator/{name}/gain_high"] + 2e-9
    assert metrics["seconds"] > 0
    report = (tmp_path / "report.md").read_text()
    for split, title in (("id", "In domain"), ("ood", "Out of domain")):
        told = re.search(rf"- {title} the judge is ([\d.]+) points (ahead|behind): (.+)\.", report)
        difference = metrics[f"judge/{split}/accuracy"] - metrics[f"regressive/{split}/accuracy"]
        assert float(told[1]) == pytest.approx(100 * abs(difference), abs=0.06)
        parts = [float(part) for part in re.findall(r"[+-][\d.]+", told[3])]
        assert sum(parts) == pytest.approx(100 * difference, abs=0.9)  # each is rounded, and the smallest are left out
    for name in ("untrained", "regressive", "judge"):
        assert f"| {TITLES[name]} |" in report
    images = (
        "learning_curve.png",
        "judged_pairs.png",
        "ranking.png",
        "paradigms.png",
        "generators.png",
        "hacked/reward_dynamics.png",
    )
    for name in images:
        assert name in report
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200


def test_figures_of_the_study_are_those_of_its_readme():
    """The report tells what the study found, which is measured again from time to time."""
    readme = (Path(__file__).parents[2] / "examples" / "paper" / "README.md").read_text()
    figures = re.findall(r"\d+\.\d", " ".join(STUDY_LINES))
    assert len(figures) > 5
    assert [figure for figure in figures if figure not in readme] == []


def test_unwritable_folder_is_noticed_before_training(tmp_path):
    """A folder that cannot be made costs no minutes of training."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        run_demo(str(tmp_path / "file" / "demo"))


def stage(name, *arguments, after=()):
    return Stage(f"{name} something", f"stage_functions:{name}", arguments, after)


def test_output_without_a_terminal_is_plain_lines(tmp_path):
    """One line for each start and end, in the order of what needs what; noise of libraries is in files."""
    stages = {"second": stage("count", 3, after=("first",)), "first": stage("count", 2)}
    stream = io.StringIO()
    run_stages(stages, tmp_path, [REPORT], stream)
    lines = stream.getvalue().splitlines()
    assert [line.split("] ")[1].split(" (")[0] for line in lines] == [
        "started   count something",
        "finished  count something",
    ] * 2
    assert stream.getvalue().replace("\n", "").isprintable()
    assert "noise of a library" in (tmp_path / "second.txt").read_text()


def read_to_end(controller, chunks):
    """All that is written to a terminal; Linux ends it with an error."""
    with contextlib.suppress(OSError):
        while chunk := os.read(controller, 65_536):
            chunks.append(chunk)


def test_output_in_a_terminal(tmp_path):
    """Bars are drawn in place; what stays is a line for each stage."""
    controller, terminal = pty.openpty()
    chunks = []
    # A terminal holds 4 KiB that nobody has read, and then stops those who write to it.
    reader = threading.Thread(target=read_to_end, args=(controller, chunks))
    reader.start()
    with open(terminal, "w") as stream:
        run_stages({"first": stage("count", 2)}, tmp_path, [REPORT], stream)
    reader.join()
    os.close(controller)
    written = b"".join(chunks).decode()
    assert "\x1b[" in written
    assert "all stages" in written
    assert "count something (0:0" in written
    assert "noise" not in written


def test_time_that_is_left():
    """It is told by costs, once there is something to tell it by: a quarter took 10 seconds, so 30 are left."""
    stream = io.StringIO()
    with Display(stream, {"short": 1, "long": 3, "none": 0}) as display:
        display.start_time -= 10
        for name in ("none", "short", "long"):
            display.start(name, name)
            display.finish(name, 10)
    finished = [line for line in stream.getvalue().splitlines() if "finished" in line]
    assert [line.partition("finished  ")[2] for line in finished] == [
        "none (0:10)",
        "short (0:10), 0:30 left",
        "long (0:10)",
    ]


def test_time_that_nobody_knows():
    """Without costs nothing is said of what is left."""
    stream = io.StringIO()
    with Display(stream, {"first": 0, "second": 0}) as display:
        display.start("first", "first")
        display.finish("first", 10)
    assert stream.getvalue().endswith("finished  first (0:10)\n")


def test_modules_beside_a_script_are_imported_once(tmp_path):
    """What a script asks to be preloaded is found beside it, and stages do not import it again."""
    (tmp_path / "heavy.py").write_text(
        "with open(__file__ + '.log', 'a') as file:\n    file.write('imported ')\ndef work(*, report):\n    pass\n"
    )
    (tmp_path / "script.py").write_text(
        "from pathlib import Path\nfrom rewarddance_hf.shapes.stages import Stage, run_stages\n"
        "if __name__ == '__main__':\n"
        "    stages = {name: Stage(name, 'heavy:work') for name in ('first', 'second')}\n"
        "    run_stages(stages, Path(__file__).parent / 'logs', ['heavy'])\n"
    )
    done = run_python(str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "heavy.py.log").read_text() == "imported "


def test_stages_that_can_wait(tmp_path):
    """Two that can wait leave processor time, and a place, to one that cannot."""
    file = tmp_path / "niceness"
    stages = {
        "later": replace(stage("wait_for", str(file)), can_wait=True),
        "much later": replace(stage("wait_for", str(file)), can_wait=True),
        "urgent": stage("write_niceness", str(file)),
        "nice": replace(stage("write_niceness", str(tmp_path / "nice"), after=("urgent",)), can_wait=True),
    }
    run_stages(stages, tmp_path / "logs", [REPORT], io.StringIO())
    assert int(file.read_text()) == os.nice(0)
    assert int((tmp_path / "nice").read_text()) == min(os.nice(0) + 10, 19)


def test_failed_stage_is_named_and_ends_the_others(tmp_path):
    """The error shows the end of the log, and nothing runs on."""
    start = time.monotonic()
    stages = {"long": stage("sleep", 300), "bad": stage("fail"), "never": stage("count", 1, after=("bad",))}
    with pytest.raises(RuntimeError, match=r"(?s)'fail something' failed.*bad\.txt.*ValueError: the disk is full"):
        run_stages(stages, tmp_path, [REPORT], io.StringIO())
    assert time.monotonic() - start < 200
    assert not (tmp_path / "never.txt").exists()
