"""Write the table of families into `rewarddance_hf/models/README.md`, from the results of the sweep: `make families-table`."""

import json
from pathlib import Path


RESULTS = Path("outputs/families.json")
README = Path("rewarddance_hf/models/README.md")
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
CHECKS = ("weights", "score", "batch", "gradient", "rationale", "engine")


def cell(outcomes: dict[str, str], check: str) -> str:
    """What the table says of a check."""
    outcome = outcomes.get(check, "")
    if outcome == "ok":
        return "yes"
    return "fault" if outcome.startswith("fault") else "no"


def table(results: dict[str, dict[str, str]]) -> str:
    """Families with equal outcomes share a row; those that cannot be judges, or were not built, are listed below."""
    rows: dict[tuple[str, ...], list[str]] = {}
    others: dict[str, list[str]] = {
        "Refused with an error": [],
        "Weights equal, not shown an image": [],
        "Not built": [],
    }
    for family, outcomes in sorted(results.items()):
        cells = tuple(cell(outcomes, check) for check in CHECKS)
        if cells[1] != "no":
            rows.setdefault(cells, []).append(family)
        elif "built" in outcomes:
            others["Not built"].append(family)
        else:
            refused = any(outcomes[check].startswith("error") for check in ("weights", "score"))
            others["Refused with an error" if refused else "Weights equal, not shown an image"].append(family)
    lines = [f"| family | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    for cells, families in sorted(rows.items(), key=lambda row: (-row[0].count("yes"), -len(row[1]))):
        lines.append(f"| {', '.join(f'`{family}`' for family in families)} | {' | '.join(cells)} |")
    for title, families in others.items():
        lines += ["", f"{title}: {', '.join(f'`{family}`' for family in families) or 'none'}."]
    return "\n".join(lines)


def main() -> None:
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    text = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
