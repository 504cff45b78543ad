"""The example scores shards as tasks of datatrove, goes on where tasks were lost, and joins them."""

import importlib.util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer


SCRIPT = Path(__file__).parents[2] / "examples/score_with_datatrove.py"


def test_script(vlm_folder, tmp_path):
    specification = importlib.util.spec_from_file_location("score_with_datatrove", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="pointwise")
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), paradigm="pointwise")
    scorer = RewardDanceScorer(model, processor)
    scorer.save_pretrained(tmp_path / "judge")
    for i in range(5):
        random_image(i).save(tmp_path / f"{i}.png")
    rows = [{"file": str(tmp_path / f"{i}.png"), "caption": "a red circle"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    command = ["--model", str(tmp_path / "judge"), "--data", str(tmp_path / "rows.parquet"), "--num_shards", "2"]
    script.main([*command, "--columns", "image=file", "prompt=caption", "--output", str(tmp_path / "scores")])
    scores = pq.read_table(tmp_path / "scores/scores.parquet")["score"].to_pylist()
    torch.testing.assert_close(torch.tensor(scores), scorer.score([row["file"] for row in rows], "a red circle"))
