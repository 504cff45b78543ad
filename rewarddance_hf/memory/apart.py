"""A function in a process of its own, as the counting device stays with its process."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


# What tells a process that it is one of several
_OF_A_LAUNCHER = (
    "ACCELERATE_",
    "FSDP_",
    "MASTER_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_",
)


def run_apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    What a function returns, run in a new process, which sees no GPU and knows nothing of a launcher.

    Args:
        function (`Callable`):
            Function of a module, whose arguments and result can be pickled.
        args, kwargs:
            Its arguments.

    Raises:
        `RuntimeError`: If it fails, with the end of what it has written.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, result = Path(folder) / "call", Path(folder) / "result"
        call.write_bytes(pickle.dumps((function, args, kwargs)))
        code = f"from {__name__} import _run; _run(*__import__('sys').argv[1:])"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCHER)}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", code, str(call), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not result.exists():
            raise RuntimeError(f"`{function.__name__}` failed in a process of its own:\n{done.stderr[-3000:]}")
        return pickle.loads(result.read_bytes())


def _run(call: str, result: str) -> None:
    function, args, kwargs = pickle.loads(Path(call).read_bytes())
    Path(result).write_bytes(pickle.dumps(function(*args, **kwargs)))
    os._exit(0)  # torch's threads for the device call Python, which must not be gone
