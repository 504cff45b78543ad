"""Write the table of pipelines into `rewarddance_hf/alignment/README.md`, from the results of the sweep: `make pipelines-table`."""

import json
from pathlib import Path


RESULTS = Path("outputs/pipelines")
README = Path("rewarddance_hf/alignment/README.md")
BEGIN, END = "<!-- pipelines: begin -->", "<!-- pipelines: end -->"
COLUMNS = {
    "images": ("images",),
    "gradient": ("refl", "draft", "finite differences"),
    "training": ("trainer",),
    "Best-of-N": ("best of n", "preview"),
    "paths": ("paths",),
    "zero-order": ("zero order",),
}


def kind(outcome: str) -> str:
    """What an outcome counts as."""
    if outcome == "ok" or outcome.startswith("fault"):
        return outcome[:5]
    return "refused" if outcome.startswith("error") else "-"


def cell(outcomes: list[dict[str, str]], checks: tuple[str, ...]) -> str:
    """What the table says of one class of pipelines: the worst of what its checks and its builds say, "-" if there is none."""
    kinds = {kind(outcome[check]) for outcome in outcomes for check in checks if check in outcome}
    return next((name for name in ("fault", "refused", "ok") if name in kinds), "-")


def table(results: list[dict]) -> str:
    """Classes with equal outcomes share a row; those that were not built are listed below."""
    by_class: dict[str, list[dict[str, str]]] = {}
    others = []
    for result in results:
        if "not built" in result:
            others.append(result["name"].partition(" [")[0])
        elif kind(result["outcomes"]["images"]) == "-":
            others.append(result["class"])
        else:
            by_class.setdefault(result["class"], []).append(result["outcomes"])
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, outcomes in sorted(by_class.items()):
        cells = tuple(cell(outcomes, checks) for checks in COLUMNS.values())
        rows.setdefault(cells, []).append(name.removesuffix("Pipeline"))
    lines = [f"| pipelines | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for cells, names in sorted(rows.items(), key=lambda row: (-row[0].count("ok"), -len(row[1]), row[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(cells)} |")
    missing = sorted(
        {name.removesuffix("Pipeline") for name in others} - {name.removesuffix("Pipeline") for name in by_class}
    )
    return "\n".join([*lines, "", f"Not tested: {', '.join(missing) or 'none'}."])


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
