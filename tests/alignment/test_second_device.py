"""
What users run on a GPU, on a device that is as strict about where tensors are (`rewarddance_hf.memory.device`), against the CPU.

The device is known to a whole process, hence one process for each group of cases.
"""

import json
import os
from pathlib import Path

import pytest
from new_process import run_python


CASES = Path(__file__).parents[1] / "second_device_cases.py"


SOME = {
    "internvl-pairwise-auto": 1e-5,
    "internvl-regressive-plain": 1e-5,
    "StableDiffusion-DPM++-draft": 5e-5,
    "Flux-refl": 5e-5,
    "Wan-refl": 5e-5,
    "judge": 1e-5,
    "search": 1e-5,
}


@pytest.mark.new_process
@pytest.mark.parametrize(
    "tolerances",
    [
        pytest.param(SOME, id="some"),
        *(
            pytest.param({group: tolerance}, id=group, marks=pytest.mark.slow)
            for group, tolerance in {"scoring": 1e-5, "pipelines": 5e-5, "training": 1e-5}.items()
        ),
    ],
)
def test_results_are_those_of_the_cpu(tolerances, tmp_path):
    """
    Judges of all families with samples on either device; gradients of all pipelines, rewarded on the CPU; both trainers,
    with all their options and resumed; searches.
    """
    run = run_python(CASES, tmp_path / "results.json", *tolerances)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) >= len(tolerances)
    for name, result in results.items():
        assert "error" not in result, f"{name}: {result['error']}"
        tolerance = tolerances.get(name, max(tolerances.values()))
        assert all(difference <= tolerance for difference in result.values()), f"{name}: {result}"


@pytest.mark.new_process
def test_the_device_is_strict():
    """A tensor that meets one of the CPU is an error in either pass, and NumPy needs `cpu()`."""
    code = """
import os

import torch
from rewarddance_hf.memory.device import register

device = register()
weights = torch.ones(3).to(device).requires_grad_()
assert weights.device == device and not weights.is_cpu
(weights * 2).sum().backward()
assert weights.grad.device == device and weights.grad.tolist() == [2, 2, 2]
assert weights[torch.tensor([0])].tolist() == [1]
index = torch.tensor([0]).to(device)
for wrong in (lambda: weights + torch.ones(3), lambda: torch.ones(3)[index], lambda: weights.detach().numpy()):
    try:
        wrong()
    except (RuntimeError, TypeError) as error:
        assert "same device" in str(error) or "to numpy" in str(error)
    else:
        raise AssertionError("not refused")
os._exit(0)
"""
    run = run_python("-c", f"import sys; sys.path.insert(0, {str(CASES.parent)!r})\n{code}")
    assert run.returncode == 0, run.stderr


@pytest.mark.new_process
def test_memory_is_counted():
    """Weights, what a graph keeps, and gradients, each once, views not at all; without values as with them."""
    code = """
import os

import torch
from rewarddance_hf.memory.device import memory, register

device = register(largest=float(os.environ["LARGEST"]))
weights = torch.ones(100, 50, device=device, requires_grad=True)
assert memory.now == 20_000
inputs = torch.ones(10, 100, device=device)
assert memory.now == 24_000
hidden = (inputs @ weights).sigmoid()  # the product itself is not kept
assert memory.now == 26_000 and memory.peak == 28_000
view = hidden.t()[3:].reshape(-1)[:5]
loss = hidden.sum()
loss.backward()
assert weights.grad.shape == (100, 50)
del view, hidden, loss
assert memory.now == 44_000, memory.now
os._exit(0)
"""
    script = f"import sys; sys.path.insert(0, {str(CASES.parent)!r})\n{code}"
    for largest in ("inf", "100"):
        run = run_python("-c", script, env={**os.environ, "LARGEST": largest})
        assert run.returncode == 0, run.stderr
