"""Processes of `new_process` are like those that Python starts."""

import json
import signal

from new_process import run_python


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
