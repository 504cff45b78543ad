"""
New Python processes for tests, which do not pay for the import of torch each time.

A helper process imports torch and other libraries that read no setting of the Hub, and forks for every call. What reads
such settings when it is imported (huggingface_hub, transformers, datasets, ...) and our own package are imported by each
child anew, in the environment, folder and with the arguments that the test gives.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path


# The slow part of what transformers, datasets and evaluate import. None of them is ours or one of theirs.
PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "torch.utils.checkpoint",
    "torch.utils.data",
    "sympy.polys",
    "scipy.optimize",
    "scipy.stats",
    "pandas",
    "pyarrow.parquet",
    "aiohttp",
    "httpx",
    "requests",
    "jinja2",
    "yaml",
    "tqdm.auto",
    "safetensors.torch",
    "tokenizers",
    "dill",
    "multiprocess",
    "fsspec",
    "PIL.Image",
)

_helper: "subprocess.Popen[str] | None" = None


def run_python(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """
    Run `python *command` to its end, as `subprocess.run` would.

    Args:
        command (`str` or `Path`):
            `"-c"` and code, `"-m"` and a module, or a script; then its arguments.
        env (`Mapping[str, str]`, *optional*):
            Its environment, that of this process by default. `OMP_NUM_THREADS` is always 1.
        cwd (`str` or `Path`, *optional*):
            Its folder.

    Returns:
        `subprocess.CompletedProcess`: Exit code, and what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "err")]
        request = {
            "command": [str(part) for part in command],
            "environment": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
            "outputs": outputs,
        }
        helper = _start_helper()
        helper.stdin.write(json.dumps(request) + "\n")
        helper.stdin.flush()
        code = int(helper.stdout.readline())
        texts = [Path(file).read_text(errors="replace") for file in outputs]
    return subprocess.CompletedProcess([sys.executable, *request["command"]], code, *texts)


def _start_helper() -> "subprocess.Popen[str]":
    global _helper
    if _helper is None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        _helper = subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_helper.stdin.close)
    return _helper


def _serve() -> dict | None:
    """Forks for each request on standard input and answers with its exit code. Returns in the children, and at the end."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    while line := sys.stdin.readline():
        process = os.fork()
        if not process:
            return json.loads(line)
        _, status = os.waitpid(process, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return None


def _become(request: dict) -> None:
    """What a new interpreter would find: environment, folder, standard streams, paths and arguments."""
    for descriptor, file in enumerate((os.devnull, *request["outputs"])):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"], OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *others = request["command"]
    start = {"-c": "", "-m": request["cwd"]}.get(first, os.path.dirname(first))
    sys.path[:1] = [start, *paths]  # in the place of this file's folder
    sys.argv[:] = ["-c", *others[1:]] if first == "-c" else others if first == "-m" else request["command"]
    importlib.invalidate_caches()


if __name__ == "__main__":
    request = _serve()
    if request:
        _become(request)
        first, *others = request["command"]
        if first == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(others[0], "<string>", "exec"), main.__dict__)
        elif first == "-m":
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(first, run_name="__main__")
