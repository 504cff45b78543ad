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
    "Best-of-N": ("best of n",),
    "zero-order": ("zero order",),
    "preview, paths": ("preview", "paths"),
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


def short(result: dict) -> str:
    """Name of the class of pipelines, also of one that was not built."""
    return result.get("class", result["name"].partition(" [")[0]).removesuffix("Pipeline")


def listed(title: str, names: set[str]) -> list[str]:
    return [f"- {title}: {', '.join(sorted(names))}"] if names else []


def table(results: list[dict]) -> str:
    """Classes with equal outcomes share a row. Below are those of which nothing is known, with the reason."""
    by_class: dict[str, list[dict[str, str]]] = {}
    not_built, without_images = set(), set()
    for result in results:
        if "not built" in result:
            not_built.add(short(result))
        elif all(kind(outcome) == "-" for outcome in result["outcomes"].values()):
            without_images.add(short(result))
        else:
            by_class.setdefault(short(result), []).append(result["outcomes"])
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, outcomes in sorted(by_class.items()):
        rows.setdefault(tuple(cell(outcomes, checks) for checks in COLUMNS.values()), []).append(name)
    versions, commits = (sorted({result[name] for result in results}) for name in ("diffusers", "commit"))
    num_builds = sum(map(len, by_class.values()))
    lines = [
        f"With diffusers {', '.join(versions)}: {num_builds} builds of {len(by_class)} pipelines, at {', '.join(commits)}.",
        "",
        f"| pipelines | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for cells, names in sorted(rows.items(), key=lambda row: (-row[0].count("ok"), -len(row[1]), row[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(cells)} |")
    one_by_one = {short(result) for result in results if result.get("batch size") == 1} & set(by_class)
    return "\n".join(
        [
            *lines,
            "",
            *listed("One prompt at a time (`batch_size=1`), which is how they were tested", one_by_one),
            *listed(
                "Not tested, as the tiny pipeline makes no images or fails by itself", without_images - set(by_class)
            ),
            *listed("Not tested, as it was not built", not_built - without_images - set(by_class)),
        ]
    )


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    README.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
