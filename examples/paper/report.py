"""The report of the study: tables in the paper's numbering, what each claim comes to, and figures."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import Study
from figures import draw_dynamics, draw_paradigms, draw_sizes
from intervals import Estimate, estimate, good_same_bad, rank_correlation, verdict
from jobs import Job, with_needs


PARADIGMS = {
    "regressive": "regressive (scalar head)",
    "pointwise": "pointwise generative",
    "pairwise": "pairwise generative",
}
SPLITS = {"id": "in domain", "ood": "out of domain", "generated": "generator's samples"}
ATTACKED = {
    "self": "the judge",
    "other": "another training",
    "ensemble": "mean of both",
    "augmented": "with noise",
}
METHODS = {"best_of_n": "Best-of-N", "paths": "Search over Paths"}

Results = dict[tuple[Any, ...], dict[str, Any]]


def write_report(study: Study, folder: Path) -> str:
    """Write `report.md` and figures of all results that a folder holds, and give the report's path in words."""
    jobs = with_needs(study.jobs())
    done = [result for job in jobs.values() if (result := job.result(folder)) is not None]
    seconds = sum(result["processor_seconds"] for result in done)
    lines = [
        "# The paper's experiments on shapes",
        "",
        f"{len(done)} of {len(jobs)} jobs are done, in {seconds / 60:.0f} minutes of processor time. Figures are means over seeds, "
        "with the 95 % interval of a bootstrap that draws seeds and held-out rows. A claim holds, or does not, where the interval of "
        "the difference lies on one side of zero; else it is undecided.",
        "",
    ]
    sections: dict[str, Callable[[Results, Path], list[str]]] = {
        "paradigms": _paradigms,
        "sizes": _sizes,
        "references": _references,
        "reasons": _reasons,
        "dynamics": _dynamics,
        "attacks": _attacks,
    }
    for name, write in sections.items():
        results = {
            key: result["metrics"] for key, job in getattr(study, name)().items() if (result := _result(job, folder))
        }
        if name in ("references", "dynamics") and (base := _result(study.base_generator(), folder)):
            results["base",] = base["metrics"]
        lines += write(results, folder) if results else []
    path = folder / "report.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"The report is {path}."


def _result(job: Job, folder: Path) -> dict[str, Any] | None:
    return job.result(folder)


def _accuracy(
    results: Sequence[dict[str, Any]], split: str, category: str | None = None, kind: str = "credits"
) -> list[list[float]]:
    """Credits of rows by seed; of one category, if it is given."""
    return [
        [
            credit
            for credit, of_row in zip(metrics[split][kind], metrics[split]["categories"], strict=True)
            if category in (None, of_row)
        ]
        for metrics in results
    ]


def _of(results: Results, *beginning: Any) -> list[dict[str, Any]]:
    """Results of all seeds of what a key begins with."""
    return [metrics for key, metrics in results.items() if key[: len(beginning)] == beginning]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)] + [""]


def _claim(text: str, difference: Estimate) -> str:
    return f"- {text}: **{verdict(difference)}**, {difference.points()} points."


def _paradigms(results: Results, folder: Path) -> list[str]:
    names = [name for name in PARADIGMS if _of(results, name)]
    counts = sorted({key[1] for key in results})
    lines = ["## Table 7: paradigms, over the amount of preference data", ""]
    for split in ("id", "ood"):
        rows = []
        for name in names:
            found = [_of(results, name, count) for count in counts]
            rows.append([PARADIGMS[name], *(estimate(_accuracy(at, split)).percent() if at else "-" for at in found)])
            if name == "pairwise":
                averaged = [_accuracy(at, split, kind="averaged_credits") for at in found]
                rows.append(
                    ["the same, mean of both orders", *(estimate(at).percent() if at else "-" for at in averaged)]
                )
        lines += [f"Accuracy {SPLITS[split]} in %, by number of pairs (0: zero-shot):", ""]
        lines += _table(["paradigm", *(f"{count:,}" for count in counts)], rows)
    largest = counts[-1]
    lines += [f"By what is wrong with the rejected image, {largest:,} pairs, out of domain, in %:", ""]
    categories = sorted({name for metrics in results.values() for name in metrics["ood"]["categories"]})
    rows = []
    for name in names:
        at = _of(results, name, largest)
        cells = [
            f"{100 * estimate(_accuracy(at, 'ood', category)).value:.0f}" if at else "-" for category in categories
        ]
        rows.append([PARADIGMS[name], *cells])
    lines += _table(["paradigm", *categories], rows)
    lines += [f"Calibration and order, {largest:,} pairs, means over seeds:", ""]
    rows = []
    for name in names:
        at = _of(results, name, largest)
        if not at:
            continue
        means = [
            sum(metrics[split][key] for metrics in at) / len(at)
            for key in ("ece", "order_consistency")
            for split in ("id", "ood")
        ]
        rows.append([PARADIGMS[name], *(f"{value:.3f}" for value in means)])
    header = ["ECE, in domain", "out of domain", "order consistency, in domain", "out of domain"]
    lines += _table(["paradigm", *header], rows)
    lines += ["![Accuracy over the amount of preference data](paradigms.png)", "", "Claims, out of domain:", ""]
    for better, worse in (("pointwise", "regressive"), ("pairwise", "pointwise"), ("pairwise", "regressive")):
        for count in counts:
            first, second = _of(results, better, count), _of(results, worse, count)
            if first and second:
                difference = estimate(_accuracy(first, "ood"), _accuracy(second, "ood"))
                lines.append(_claim(f"{better} above {worse}, {count:,} pairs", difference))
    draw_paradigms(results, {name: PARADIGMS[name] for name in names}, counts, folder / "paradigms.png")
    return [*lines, ""]


def _sizes(results: Results, folder: Path) -> list[str]:
    sizes = sorted({key[0] for key in results if key != ("base",)}, key=lambda size: float(size.rstrip("m")))
    base = results.get(("base",))
    lines = [
        "## Table 2 and Figure 7: the size of the judge",
        "",
        "Accuracy in %; zero-shot is before any preference:",
        "",
    ]
    rows = []
    for paradigm in ("pointwise", "pairwise"):
        for split, title in SPLITS.items():
            for kind, label in (("untrained", "zero-shot"), ("judge", "trained")):
                cells = [_of(results, size, kind, paradigm) for size in sizes]
                texts = [estimate(_accuracy(at, split)).percent() if at else "-" for at in cells]
                rows.append([f"{paradigm}, {title}, {label}", *texts])
    lines += _table(["judge", *sizes], rows)
    points: list[tuple[str, float, float, float]] = []
    gains: dict[str, dict[str, Estimate]] = {"tuned": {}, "search": {}}
    for size in sizes:
        tuned = _of(results, size, "tuned")
        if tuned and base:
            gains["tuned"][size] = estimate([at["right"] for at in tuned], [base["right"]])
        found = _of(results, size, "search")
        if found:
            budget = max((key for key in found[0] if key.startswith("paths/")), key=lambda key: int(key.split("/")[1]))
            gains["search"][size] = estimate([at[budget] for at in found], [at["plain"] for at in found])
        for seed in sorted({key[3] for key in results if key[0] == size and key[1:2] == ("tuned",)}):
            judge, of_seed = results.get((size, "judge", "pairwise", seed)), results[size, "tuned", "pairwise", seed]
            if judge and base:
                gain = estimate([of_seed["right"]], [base["right"]]).value
                points.append((size, judge["id"]["accuracy"], judge["ood"]["accuracy"], gain))
    if base:
        plain = estimate([base["right"]]).percent()
        lines += [
            f"What the generator gains, in points of held-out prompts that it draws right ({plain} % before):",
            "",
        ]
        rows = [
            [title, *(gains[kind][size].points() if size in gains[kind] else "-" for size in sizes)]
            for kind, title in (("tuned", "tuned by the pairwise judge"), ("search", "search by the pointwise judge"))
        ]
        tuned = {size: [at["right"] for at in _of(results, size, "tuned")] for size in sizes}
        texts = [good_same_bad(tuned[size], base["right"]).points() if tuned[size] else "-" for size in sizes]
        rows.append(["GSB of tuned against base, in points", *texts])
        lines += _table(["", *sizes], rows)
    lines += _search_lines(results, sizes)
    if len(points) >= 4:
        for number, split in ((1, "in-domain"), (2, "out-of-domain")):
            found_correlation = rank_correlation([point[number] for point in points], [point[3] for point in points])
            lines.append(
                f"- {split.capitalize()} accuracy and gain by tuning over {len(points)} judges: rank correlation "
                f"{found_correlation.value:.2f} ({found_correlation.low:.2f} to {found_correlation.high:.2f})."
            )
    for small, large in zip(sizes, sizes[1:], strict=False):
        for paradigm in ("pointwise", "pairwise"):
            first, second = (_of(results, size, "judge", paradigm) for size in (large, small))
            if first and second:
                difference = estimate(_accuracy(first, "ood"), _accuracy(second, "ood"))
                lines.append(_claim(f"{large} above {small}, {paradigm}, out of domain", difference))
    draw_sizes(results, sizes, points, folder / "sizes.png")
    return [*lines, "", "![Size, accuracy and gain](sizes.png)", ""]


def _search_lines(results: Results, sizes: Sequence[str]) -> list[str]:
    """What search gains by method and budget."""
    found = {size: _of(results, size, "search") for size in sizes if _of(results, size, "search")}
    if not found:
        return []
    keys = [key for key in next(iter(found.values()))[0] if key != "plain"]
    rows = [
        [METHODS[key.split("/")[0]], key.split("/")[1]]
        + [
            estimate([at[key] for at in of_size], [at["plain"] for at in of_size]).points()
            for of_size in found.values()
        ]
        for key in keys
    ]
    return [
        "Search by the pointwise judge, gain in points over plain sampling, by denoiser evaluations for each prompt (a plain image "
        "takes 8):",
        "",
        *_table(["method", "evaluations", *found], rows),
    ]


def _references(results: Results, folder: Path) -> list[str]:
    base = results.get(("base",))
    names = list(dict.fromkeys(key[0] for key in results if key != ("base",)))
    if not base or not names:
        return []
    lines = ["## Table 8: references of the pairwise judge", ""]
    found = {name: _of(results, name) for name in names}
    rows = [
        [
            name,
            f"{100 * sum(at['references'] for at in of_name) / len(of_name):.1f}",
            estimate([at["right"] for at in of_name]).percent(),
            estimate([at["right"] for at in of_name], [base["right"]]).points(),
        ]
        for name, of_name in found.items()
    ]
    lines += _table(["references", "right references, %", "generator right, %", "gain in points"], rows)
    first = found[names[0]]
    for name in names[1:]:
        difference = estimate([at["right"] for at in first], [at["right"] for at in found[name]])
        lines.append(_claim(f"{names[0]} above {name}", difference))
    return [*lines, ""]


def _reasons(results: Results, folder: Path) -> list[str]:
    names = list(dict.fromkeys(key[0] for key in results))
    lines = ["## Table 9: reasons", "", "Accuracy of the pairwise judge in %:", ""]
    rows = [[name, *(estimate(_accuracy(_of(results, name), split)).percent() for split in SPLITS)] for name in names]
    lines += _table(["judge", *SPLITS.values()], rows)
    if len(names) == 2:
        with_reasons, without = _of(results, names[1]), _of(results, names[0])
        for split, title in SPLITS.items():
            difference = estimate(_accuracy(with_reasons, split), _accuracy(without, split))
            lines.append(_claim(f"{names[1]} above {names[0]}, {title}", difference))
    return [*lines, ""]


def _dynamics(results: Results, folder: Path) -> list[str]:
    base = results.get(("base",))
    names = [name for name in PARADIGMS if _of(results, name)]
    if not base or not names:
        return []
    lines = ["## Figures 2, 5 and 6: rewards while a generator is tuned", ""]
    rows = []
    for name in names:
        found = _of(results, name)
        warnings = [kind for at in found for _, kind in at["warnings"]]
        spreads = [[record["reward_std"] for record in at["history"] if "reward_std" in record] for at in found]
        rows.append(
            [
                PARADIGMS[name],
                estimate([at["right"] for at in found], [base["right"]]).points(),
                ", ".join(f"{of_seed[0]:.2g}" for of_seed in spreads if of_seed) or "-",
                ", ".join(f"{of_seed[-1]:.2g}" for of_seed in spreads if of_seed) or "-",
                ", ".join(f"{kind} ({count})" for kind, count in Counter(warnings).items()) or "none",
            ]
        )
    header = ["judge", "gain in points", "std of the first rewards, by seed", "of the last", "warnings of the monitor"]
    lines += _table(header, rows)
    draw_dynamics(results, {name: PARADIGMS[name] for name in names}, folder / "dynamics.png")
    return [*lines, "![Rewards and truth](dynamics.png)", ""]


def _attacks(results: Results, folder: Path) -> list[str]:
    lines = [
        "## Not in the paper: adversarial pixels",
        "",
        "Share of rejected images that are preferred in %, after their pixels were changed by at most so much along the judge's gradient "
        "(of 255): by the judge itself, another training of it, the mean of both, and the judge where it sees copies with noise.",
        "",
    ]
    rows = []
    for (size, paradigm), metrics in results.items():
        radii = [key.split("/")[1] for key in metrics if key.startswith("self/")]
        for radius in radii:
            cells = [f"{100 * estimate([metrics[f'{name}/{radius}']]).value:.0f}" for name in ATTACKED]
            rows.append([size, paradigm, f"{255 * float(radius):.0f}", *cells])
    return [*lines, *_table(["size", "judge", "radius", *ATTACKED.values()], rows)]
