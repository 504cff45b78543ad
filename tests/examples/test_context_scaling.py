"""The measurement of context scaling, run as a user would run it, at the smallest size."""

import importlib.util
import json
import sys
from pathlib import Path


EXAMPLE = Path(__file__).parents[2] / "examples" / "context_scaling.py"


def test_measures_and_continues(tmp_path, monkeypatch, capsys):
    """Both judges are measured on the same rows; what was trained is used again, and results of other parts are kept."""
    spec = importlib.util.spec_from_file_location("context_scaling", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["context_scaling.py", "--output_dir", str(tmp_path), *arguments])
        module.main()
        return json.loads((tmp_path / "results.json").read_text())

    criteria = run("--parts", "criteria", "--steps", "1", "--rows", "8")["criteria"]
    # Who is not told the criteria gets one row of each pair wrong, whatever it has learned.
    assert criteria["without"]["accuracy"] == 0.5
    assert set(criteria) == {"with criteria", "without"}
    written = (tmp_path / "criteria_with" / "model.safetensors").stat().st_mtime_ns
    results = run(
        "--parts", "criteria", "faults", "--rows", "4", "--fault_rows", "2", "--judge", str(tmp_path / "criteria_with")
    )
    assert (tmp_path / "criteria_with" / "model.safetensors").stat().st_mtime_ns == written
    assert results["criteria"]["with criteria"]["num_rows"] == 4
    assert results["faults"]["id, all"]["num_rows"] == 2
    assert "| ood, all |" in capsys.readouterr().out
