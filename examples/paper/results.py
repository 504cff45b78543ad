"""Results of the study in one file, to travel from machine to machine."""

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import RESULT_FILE, Job

from rewarddance_hf.resumable import write_atomically


def pack_results(jobs: Mapping[str, Job], folder: Path, file: Path) -> int:
    """Write the results of all jobs that are done into one file, and give their number."""
    lines = []
    for name, job in jobs.items():
        result = job.result(folder)
        if result is not None:
            lines.append(json.dumps({"name": name, **{key: result[key] for key in sorted(result)}}))
    # Without a time stamp, so that equal results are equal files
    write_atomically(file, gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    return len(lines)


def take_results(jobs: Mapping[str, Job], folder: Path, file: Path) -> int:
    """
    Write those results of a file of [`pack_results`] into a folder that fit these jobs and are not there yet, and give their number.
    They are marked: what they came with, such as the weights of judges, is not there, so that a job is done again if another needs it.
    """
    num_taken = 0
    for result in _read(file):
        name = result.pop("name")
        job = jobs.get(name)
        if job is None or job.fingerprint() != result["fingerprint"] or job.result(folder) is not None:
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        content = json.dumps({**result, "is_taken": True}, indent=1) + "\n"
        write_atomically(folder / name / RESULT_FILE, content.encode())
        num_taken += 1
    return num_taken


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        content = file.read_bytes()
        if not content:
            raise EOFError("it is empty")
        return [json.loads(line) for line in gzip.decompress(content).decode().splitlines()]
    except FileNotFoundError:
        raise SystemExit(
            f"There is no file {str(file)!r}, but `--results` wants one that `--pack` has written."
        ) from None
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise SystemExit(
            f"{str(file)!r} cannot be read ({error}), but `--results` wants a file that `--pack` has written. Was it cut off, or "
            "is it another kind of file?"
        ) from error
