"""The example that measures search at inference runs as a user would run it."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


EXAMPLE = Path(__file__).parents[2] / "examples" / "search_at_test_time.py"


def test_search_at_test_time(tmp_path):
    """A small run trains a judge, keeps to its budgets, and writes report, curves, figures and a tree; a second one reuses the judge."""
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    sys.modules[EXAMPLE.stem] = example
    spec.loader.exec_module(example)
    arguments = ["--output_dir", str(tmp_path), "--judge_steps", "2", "--judge_prompts", "60", "--num_prompts", "4"]
    arguments += ["--budgets", "16", "40", "--batch_size", "64"]
    metrics = example.main(example.make_parser().parse_args(arguments))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for reward in ("judge", "oracle"):
        for method in example.METHODS:
            for budget, values in metrics[reward][method].items():
                assert 0 < values["evaluations"] <= int(budget)
                assert 0 <= values["low"] <= values["met"] <= values["high"] <= 1
    # With the oracle as reward, the best of more candidates is at least as good.
    best = metrics["oracle"]["best-of-n"]
    assert np.all(np.array(best["40"]["holds"]) >= np.array(best["16"]["holds"]))
    assert best["40"]["facts"] >= best["16"]["facts"]
    report = (tmp_path / "report.md").read_text()
    assert "| judge | Search over Paths |" in report
    assert {path.name for path in (tmp_path / "example").iterdir()} == {"image_0.png", "search.json", "tree.png"}
    assert Image.open(tmp_path / "curves.png").size[0] > 1000

    weights = tmp_path / "judge" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = example.main(example.make_parser().parse_args(arguments))
    assert weights.stat().st_mtime_ns == before
    assert again == metrics
