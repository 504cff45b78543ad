"""Processes of `new_process` are like those that Python starts."""

import json
import signal

import pytest
from new_process import run_python, run_together


STATE = """
import json, os, sys, tempfile
print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), sys.path[:2], sys.stdin.read(), tempfile.gettempdir(), __name__]))
print(sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(3)
"""


def test_state(tmp_path):
    """Arguments, folder, environment and paths are the given ones, and nothing that reads settings of the Hub is imported."""
    environment = {"HF_ENDPOINT": "http://here", "TMPDIR": str(tmp_path), "PYTHONPATH": "/one", "OMP_NUM_THREADS": "1"}
    done = run_python("-c", STATE, "a", tmp_path, env=environment, cwd=tmp_path)
    assert done.returncode == 3
    state = json.loads(done.stdout)
    assert state == [
        ["-c", "a", str(tmp_path)], str(tmp_path), environment, ["", "/one"], "", str(tmp_path), "__main__"
    ]  # fmt: skip
    readers = {"accelerate", "datasets", "diffusers", "evaluate", "huggingface_hub", "peft", "transformers", "trl"}
    for name in readers | {"rewarddance_hf"}:
        assert repr(name) not in done.stderr
    assert "'torch'" in done.stderr


def test_endings():
    """Exceptions give a traceback and 1, signals their number, and the next process starts all the same."""
    done = run_python("-c", "1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert run_python("-c", "import os; os.kill(os.getpid(), 15)").returncode == -signal.SIGTERM
    assert run_python("-c", "print('here')").stdout == "here\n"


@pytest.mark.slow
def test_processes_together():
    """Processes of one call find each other; where one fails, those that wait for it end."""
    code = "import os, torch.distributed as d; d.init_process_group('gloo'); "
    done = run_together("-c", code + "print(d.get_rank(), d.get_world_size()); d.destroy_process_group()", count=3)
    assert [(one.returncode, one.stdout) for one in done] == [(0, f"{rank} 3\n") for rank in range(3)]
    done = run_together("-c", code + "1 / (1 - d.get_rank()); d.barrier()")
    assert [bool(one.returncode) for one in done] == [True, True]
    assert "ZeroDivisionError" in done[1].stderr
