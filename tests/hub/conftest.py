"""A loopback Hub, and clients of it in processes of their own: libraries read `HF_ENDPOINT` when they are imported."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import LoopbackHub
from new_process import run_python

from rewarddance_hf.hub import verification


# Runs before each client: notes what is written outside of its home.
WATCH = """
import os, sys

def _watch(event, arguments):
    if event == "open":
        path, _, flags = arguments
        paths = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
    else:
        paths = {"os.mkdir": arguments[:1], "os.rename": arguments[:2], "os.symlink": arguments[1:2]}.get(event, [])
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(path))
            if not path.startswith((os.environ["HOME"], "/dev/", "/proc/")):
                with open(os.path.join(os.environ["HOME"], "written_elsewhere"), "a") as file:
                    file.write(path + "\\n")

sys.addaudithook(_watch)
"""
# Lets requests of the client's own Hub fail, as `LoopbackHub.inject` does.
INJECT = """
def inject(action, method, url, **others):
    import json, os, urllib.request
    body = json.dumps({"action": action, "method": method, "url": url, **others}).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/_test/fault", body, method="POST"))

def error_of(function, *arguments, **others):
    try:
        return f"no error but {function(*arguments, **others)!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture(scope="module")
def quick_verification() -> Iterator[None]:
    """Processes that verify releases start faster. Only for tests of what they find: how they start is tested without."""

    def run(command, cwd, env, **streams):
        return run_python(*command[1:], env=env, cwd=cwd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
        yield


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """An empty Hub with the tokens `hf_owner` (user "owner" of organization "org") and `hf_stranger`."""
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def run_client(hub, tmp_path):
    """
    Function that runs Python code in a fresh process against the Hub, and gives what its last line says in JSON.

    `home` is all that the process knows as home, cache and temporary folder: it fails when it writes anywhere else.
    `package=False` makes our package impossible to import. The code may call `inject(...)` and `error_of(function, ...)`.
    """

    def run(
        code: str,
        *arguments: str | Path,
        home: str = "home",
        token: str | None = "hf_owner",
        package: bool = True,
        **variables: str,
    ):
        home = tmp_path / home
        environment = hub.environment(home, token, **variables)
        blocked = "" if package else "import sys; sys.modules['rewarddance_hf'] = None\n"
        result = run_python("-c", blocked + INJECT + WATCH + code, *arguments, env=environment, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        written_elsewhere = home / "written_elsewhere"
        assert not written_elsewhere.exists(), written_elsewhere.read_text()
        return json.loads(result.stdout.splitlines()[-1])

    return run
