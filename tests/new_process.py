"""
New Python processes for tests, which do not pay for the import of torch each time.

A helper process imports torch and other libraries that read no setting of the Hub, and forks for every call. What reads
such settings when it is imported (huggingface_hub, transformers, datasets, ...) and our own package are imported by each
child anew, in the environment, folder and with the arguments that the test gives.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
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
    "torch._inductor.select_algorithm",
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
    "httpx2",
    "requests",
    "anyio",
    "networkx",
    "filelock",
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

# Of processes that work together, which have one environment.
PRELOADED_TOGETHER = ("accelerate", "datasets", "peft", "transformers.trainer", "diffusers.training_utils")

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
    return _run(command, [{}], env, cwd)[0]


def run_together(
    *command: str | Path, count: int = 2, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> "list[subprocess.CompletedProcess[str]]":
    """
    Run a command in several processes that know of each other, as `torchrun` would. Where one fails, the others end.

    Args:
        command, env, cwd:
            As in [`run_python`].
        count (`int`, *optional*, defaults to 2):
            Number of processes.

    Returns:
        `list[subprocess.CompletedProcess]`: Exit code of each, and what it wrote.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    added = [{key: str(value) for key, value in {**shared, "RANK": i, "LOCAL_RANK": i}.items()} for i in range(count)]
    return _run(command, added, env, cwd)


def _run(command, added, env, cwd) -> "list[subprocess.CompletedProcess[str]]":
    """A process for each addition to the environment."""
    arguments = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            {
                "command": arguments,
                "environment": {**(os.environ if env is None else env), **variables},
                "cwd": str(cwd or os.getcwd()),
                "outputs": [str(Path(folder, f"{name}_{index}")) for name in ("out", "err")],
            }
            for index, variables in enumerate(added)
        ]
        helper = _start_helper()
        helper.stdin.write(json.dumps(requests) + "\n")
        helper.stdin.flush()
        codes = json.loads(helper.stdout.readline())
        return [
            subprocess.CompletedProcess(
                [sys.executable, *arguments],
                code,
                *(Path(file).read_text(errors="replace") for file in request["outputs"]),
            )
            for code, request in zip(codes, requests, strict=True)
        ]


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
    """Forks for each line of requests on standard input and answers with the exit codes. Returns in the children, and at the end."""
    _import(PRELOADED)
    while line := sys.stdin.readline():
        requests = json.loads(line)
        if len(requests) > 1 and (leader := os.fork()):
            os.waitpid(leader, 0)
            continue
        if len(requests) > 1:  # what processes that work together import is imported once, in their environment
            _take_environment(requests[0])
            _import(PRELOADED_TOGETHER)
        processes: list[int] = []
        for request in requests:
            process = os.fork()
            if not process:
                return request
            processes.append(process)
        codes: dict[int, int] = {}
        while len(codes) < len(processes):
            process, status = os.wait()
            codes[process] = os.waitstatus_to_exitcode(status)
            if codes[process]:
                for other in set(processes) - set(codes):
                    os.kill(other, signal.SIGTERM)
        sys.stdout.write(json.dumps([codes[process] for process in processes]) + "\n")
        sys.stdout.flush()
        if len(requests) > 1:
            os._exit(0)
    return None


def _import(names: tuple[str, ...]) -> None:
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # children share these objects, and collect other garbage only


def _take_environment(request: dict) -> None:
    os.environ.clear()
    os.environ.update(request["environment"], OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))


def _become(request: dict) -> None:
    """What a new interpreter would find: environment, folder, standard streams, paths and arguments."""
    for descriptor, file in enumerate((os.devnull, *request["outputs"])):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["cwd"])
    _take_environment(request)
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
