"""The demo from end to end, with few steps."""

import json

import pytest
from PIL import Image

from rewarddance_hf.shapes.demo import run_demo


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
    for name in ("untrained", "regressive", "judge"):
        assert f"| {name} |" in report
    images = (
        "learning_curve.png",
        "judged_pairs.png",
        "ranking.png",
        "generators.png",
        "hacked/reward_dynamics.png",
    )
    for name in images:
        assert name in report
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200


def test_unwritable_folder_is_noticed_before_training(tmp_path):
    """A folder that cannot be made costs no minutes of training."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        run_demo(str(tmp_path / "file" / "demo"))
