"""
Run all benchmarks, print what is measured, and write `results/<machine>.json`.

    python tests/benchmarks/run.py [--full] [--only PART] [--compare FILE] [--output FILE] [--tables]

Measured ratios that are worse than `thresholds.py` allows end the run with status 1, and so does a measurement that fails: the
others are made all the same. `--only` takes the measurements whose names contain some text. Earlier results of measurements that
are not made stay in the file, with their commits.
"""

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

import torch


FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]  # also the tiny models of the tests

import machine  # noqa: E402
import results_table  # noqa: E402
import thresholds  # noqa: E402


MODULES = (
    "bench_gpu",
    "bench_scoring",
    "bench_vllm",
    "bench_attention",
    "bench_reward_step",
    "bench_gradient",
    "bench_training_memory",
    "bench_judge_memory",
    "bench_refl_memory",
    "bench_encoded_prompts",
    "bench_input",
    "bench_serving",
)
COMPARED = 0.1  # changes by less are not printed


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """All measurements by name, each of which returns numbers by name."""
    found = {}
    for name in MODULES:
        prefix = name.removeprefix("bench_")
        for key, measure in importlib.import_module(name).measurements(is_full).items():
            found[f"{prefix}/{key}"] = measure
    return found


def run(chosen: dict[str, Callable[[], dict[str, float]]], output: Path, names: Collection[str]) -> list[str]:
    """
    Measure, print and write results after each measurement. Returns names of those that failed. Earlier results are kept if
    they are of one of `names`, also where a measurement gives nothing, as what it needs is not installed.
    """
    known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    kept = {key: value for key, value in known.get("results", {}).items() if key.rpartition("/")[0] in names}
    commits = {name: commit for name, commit in known.get("commits", {}).items() if name in names}
    failed = []
    places = {name: place for place, name in enumerate([*names, *chosen])}
    for name, measure in chosen.items():
        start = time.perf_counter()
        try:
            results = measure()
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        if not results:
            continue
        kept = {key: value for key, value in kept.items() if key.rpartition("/")[0] != name}
        kept |= {f"{name}/{key}": value for key, value in results.items()}
        about = machine.describe()
        commits[name] = about["commit"]  # of measurements that are older than the rest of the file, too
        sys.stdout.write(f"{name} ({time.perf_counter() - start:.0f} s)\n")
        for key, value in results.items():
            sys.stdout.write(f"    {key:32} {value:12.4g}\n")
        sys.stdout.flush()
        output.parent.mkdir(parents=True, exist_ok=True)
        ordered = sorted(kept.items(), key=lambda item: places[item[0].rpartition("/")[0]])
        content = about | {"commits": commits, "results": dict(ordered)}
        output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return failed


def compare(old: dict[str, float], new: dict[str, float]) -> list[str]:
    """Lines about what changed by more than a tenth, what is gone, and what is new."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key not in new or key not in old:
            state = "gone" if key not in new else "new"
            lines.append(f"{key}: {state} ({old.get(key, new.get(key)):.4g})")
        elif abs(new[key] - old[key]) > COMPARED * abs(old[key]):
            change = f"{new[key] / old[key]:.2f}x" if old[key] else "was 0"
            lines.append(f"{key}: {old[key]:.4g} -> {new[key]:.4g} ({change})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="make the long measurements too")
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--compare", type=Path, help="file with earlier results, to print what changed")
    parser.add_argument("--output", type=Path, help="file to write, in place of results/<machine>.json")
    parser.add_argument("--tables", action="store_true", help="write the tables of README.md in this folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = arguments.output or FOLDER / "results" / f"{machine.name()}.json"
    # Read before it may be written to
    earlier = json.loads(arguments.compare.read_text(encoding="utf-8")) if arguments.compare else None
    known = measurements(is_full=True)
    possible = known if arguments.full or arguments.only else measurements()
    chosen = {name: measure for name, measure in possible.items() if arguments.only in name}
    if not chosen:
        parser.error(f"no measurement has {arguments.only!r} in its name, only {list(known)}")
    failed = run(chosen, output, known)
    if arguments.tables:
        results_table.main(output)
    results = json.loads(output.read_text(encoding="utf-8"))["results"] if output.exists() else {}
    results = {key: value for key, value in results.items() if key.rpartition("/")[0] in chosen}
    if earlier is not None:
        old = {key: value for key, value in earlier["results"].items() if key.rpartition("/")[0] in chosen}
        sys.stdout.write(f"Against {arguments.compare} of commit {earlier['commit']}:\n")
        sys.stdout.write(
            "".join(f"    {line}\n" for line in compare(old, results) or ["nothing changed by more than 10 %"])
        )
    problems = [f"{name} failed" for name in failed] + thresholds.violations(results)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
