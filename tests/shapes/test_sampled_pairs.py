"""Tests of pairs that are sampled by several processes, each prompt once, whatever ends in between."""

import json
import os

import datasets
import numpy as np
import pytest
from new_process import run_together

from rewarddance_hf.shapes.generated import generated_preferences
from rewarddance_hf.shapes.generator import load_generator
from rewarddance_hf.shapes.sampled_pairs import PAIRS_FILE, sample_pairs


NUM_PROMPTS = 24
# Notes how many prompts each process has sampled; may be killed in the middle.
SCRIPT = """
import os, signal, sys
from rewarddance_hf.shapes import sampled_pairs

sampled_pairs.SAMPLING_BATCH_SIZE = 12  # two prompts
folder, killed = sys.argv[1:]
calls = []

def note(count):
    calls.append(count)
    if os.environ.get("RANK") == killed and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

pairs = sampled_pairs.sample_pairs("train", folder, 24, note)
print("sampled", sum(calls[1:]), "of", len(pairs))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder that two processes have left, of which one was killed, and how many prompts are in it."""
    folder = tmp_path_factory.mktemp("pairs")
    runs = run_together("-c", SCRIPT, folder, "1", env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert all(run.returncode for run in runs)
    assert not (folder / PAIRS_FILE).exists()
    return folder, len(list((folder / "rows").iterdir()))


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill(killed):
    """What is on disk is not sampled again, all get the rows that one process makes, and a finished folder is only read."""
    folder, kept = killed
    assert 0 < kept < NUM_PROMPTS
    outputs = []
    for _ in range(2):
        runs = run_together("-c", SCRIPT, folder, "", env={**os.environ, "ACCELERATE_USE_CPU": "true"})
        assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr[-2000:]
        outputs.append([run.stdout.split() for run in runs])
    assert sum(int(words[1]) for words in outputs[0]) == NUM_PROMPTS - kept
    assert [int(words[1]) for words in outputs[1]] == [0, 0]
    assert len({words[3] for words in outputs[0] + outputs[1]}) == 1

    pairs = sample_pairs("train", folder, NUM_PROMPTS)
    alone = generated_preferences(load_generator(), NUM_PROMPTS, with_described=True, with_ties=True)
    assert [row["prompt"] for row in pairs] == [row["prompt"] for row in alone]
    for row, other in zip(pairs, alone, strict=True):
        assert {key: row[key] for key in ("rationale", "tie")} == {key: other[key] for key in ("rationale", "tie")}
        for name in ("chosen", "rejected"):  # batches differ by rounding
            assert np.abs(np.asarray(row[name], dtype=int) - np.asarray(other[name])).max() <= 1


@pytest.mark.slow
def test_one_process_sees_the_folder_finished_and_another_does_not(tmp_path):
    """Processes agree before any of them skips work: none waits for one that is gone."""
    script = SCRIPT.replace(
        "pairs = ",
        "exists = os.path.exists\n"
        "from pathlib import Path\n"
        "Path.exists = lambda path, **_: os.environ['RANK'] == '1' or exists(path) if path.suffix == '.arrow' else exists(path)\n"
        "pairs = ",
    )
    runs = run_together("-c", script, tmp_path, "", env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr[-2000:]
    assert all(run.stdout.startswith("sampled 12 of") for run in runs)


def test_pairs_of_other_prompts_are_refused(tmp_path):
    """Another number of prompts would make other rows."""
    sample_pairs("id", tmp_path, 6)
    with pytest.raises(ValueError, match=r"belongs to a run in which \['num_prompts'\] were others"):
        sample_pairs("id", tmp_path, 8)
    assert json.loads((tmp_path / "arguments.json").read_text())["num_prompts"] == 6
    assert isinstance(sample_pairs("id", tmp_path, 6), datasets.Dataset)
