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
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path


# The slow part of what transformers, datasets and evaluate import. None of them is ours or one of theirs.
PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
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
    return _run([str(part) for part in command], [dict(os.environ if env is None else env)], cwd)[0]


def run_ranks(
    count: int, *command: str | Path, env: Mapping[str, str] | None = None
) -> "list[subprocess.CompletedProcess[str]]":
    """
    Run `python *command` as several processes of one group, with the variables that `torch.distributed.run` sets. When one
    fails, the others are killed.

    Args:
        count (`int`):
            Number of processes.
        command (`str` or `Path`):
            As in [`run_python`].
        env (`Mapping[str, str]`, *optional*):
            Their environment, that of this process by default.

    Returns:
        `list[subprocess.CompletedProcess]`: Exit code and output of each rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**(os.environ if env is None else env), **{name: str(value) for name, value in group.items()}}
    environments = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return _run([str(part) for part in command], environments, None)


def _run(
    command: list[str], environments: Sequence[dict[str, str]], cwd: str | Path | None
) -> "list[subprocess.CompletedProcess[str]]":
    with tempfile.TemporaryDirectory() as folder:
        outputs = [
            [str(Path(folder, f"{rank}.{name}")) for name in ("out", "err")] for rank in range(len(environments))
        ]
        request = {
            "command": command,
            "environments": environments,
            "cwd": str(cwd or os.getcwd()),
            "outputs": outputs,
        }
        helper = _start_helper()
        helper.stdin.write(json.dumps(request) + "\n")
        helper.stdin.flush()
        codes = json.loads(helper.stdout.readline())
        texts = [[Path(file).read_text(errors="replace") for file in files] for files in outputs]
    return [
        subprocess.CompletedProcess([sys.executable, *command], code, *text)
        for code, text in zip(codes, texts, strict=True)
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


def _serve() -> "tuple[dict, int] | None":
    """Forks for each request on standard input and answers with exit codes. Returns in the children only, and at the end."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    while line := sys.stdin.readline():
        request = json.loads(line)
        ranks = {}
        for rank in range(len(request["environments"])):
            process = os.fork()
            if not process:
                return request, rank
            ranks[process] = rank
        codes = [0] * len(ranks)
        while ranks:
            process, status = os.wait()
            code = codes[ranks.pop(process)] = os.waitstatus_to_exitcode(status)
            if code:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()
    return None


def _become(request: dict, rank: int) -> None:
    """What a new interpreter would find: environment, folder, standard streams, paths and arguments."""
    for descriptor, file in enumerate((os.devnull, *request["outputs"][rank])):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environments"][rank], OMP_NUM_THREADS="1")
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
    served = _serve()
    if served:
        _become(*served)
        first, *others = served[0]["command"]
        if first == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(others[0], "<string>", "exec"), main.__dict__)
        elif first == "-m":
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(first, run_name="__main__")
