"""The notebook of the quickstart: its code compiles, its outputs are stored, and it runs offline."""

import json
from pathlib import Path

import pytest
import torch


NOTEBOOK = json.loads((Path(__file__).parents[2] / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_cells_compile_and_have_run():
    """Every cell is Python; they have run once, in their order and without an error."""
    for cell in CELLS:
        compile("".join(cell["source"]), "quickstart.ipynb", "exec")
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}


@pytest.mark.slow
def test_cells_run(tmp_path, monkeypatch):
    """Training on 200 pairs makes a judge that is right on held-out pairs far more often; its choice is right more often."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for cell in CELLS:
        exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
    assert names["after"]["accuracy_low"] > names["before"]["accuracy_high"]
    holds, prompts = names["alignment_holds"], names["prompts"]
    assert holds(names["best"], prompts).sum() > holds(names["plain"], prompts).sum()
    assert (tmp_path / "outputs" / "quickstart_judge" / "model.safetensors").exists()
