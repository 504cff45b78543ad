"""Run all benchmarks, print a table and write `outputs/bench.json`. Ratios are measured side by side in one run."""

import importlib
import json
import sys
from pathlib import Path

import torch


FOLDER = Path(__file__).parent
OUTPUT = Path("outputs/bench.json")


def main() -> None:
    sys.path.insert(0, str(FOLDER.parent))  # the tiny models of the tests
    torch.set_num_threads(1)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, float] = {}
    for path in sorted(FOLDER.glob("bench_*.py")):
        results |= importlib.import_module(path.stem).run()
        OUTPUT.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    width = max(map(len, results))
    for key, value in results.items():
        sys.stdout.write(f"{key:{width}}  {value:10.3f}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER))
    main()
