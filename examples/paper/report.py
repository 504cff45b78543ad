"""The report of the study: tables in the paper's numbering, what each claim comes to, and figures."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from clips import SHOWN_FILE
from experiments import Study
from figures import JudgeAndGain, ShownClip, draw_clips, draw_dynamics, draw_paradigms, draw_sizes
from intervals import Estimate, estimate, good_same_bad, rank_correlation, verdict
from jobs import with_needs


PARADIGMS = {
    "regressive": "regressive (scalar head)",
    "pointwise": "pointwise generative",
    "pairwise": "pairwise generative",
}
# Paradigms that Table 7 compares, and credits of rows for that: both orders, or the mean of both
COMPARED = (
    ("pointwise", "regressive", "credits"),
    ("pairwise", "pointwise", "credits"),
    ("pairwise", "regressive", "credits"),
    ("pairwise", "pointwise", "averaged_credits"),
    ("pairwise", "regressive", "averaged_credits"),
)
SPLITS = {"id": "in domain", "ood": "out of domain", "generated": "generator's samples"}
ATTACKED = {
    "self": "the judge",
    "other": "another training",
    "ensemble": "mean of both",
    "augmented": "with noise",
}
GRADIENTS = {"draft": "the last 4 steps (DRaFT-K)", "refl": "one step (ReFL)"}
METHODS = {"best_of_n": "Best-of-N", "paths": "Search over Paths"}

# Late spread of rewards over the early one, below which it has fallen
FALLEN = 0.8

Results = dict[tuple[Any, ...], dict[str, Any]]


def write_report(study: Study, folder: Path) -> str:
    """Write `report.md` and figures of all results that a folder holds, and give the report's path in words."""
    jobs = with_needs(study.jobs())
    done = [result for job in jobs.values() if (result := job.result(folder)) is not None]
    seconds = sum(result["processor_seconds"] for result in done)
    lines = [
        "# The paper's experiments on shapes",
        "",
        f"{len(done)} of {len(jobs)} jobs are done, in {seconds / 60:.0f} minutes of processor time ({_machines(done)}). Figures are means over seeds, "
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
        "clips": _clips,
    }
    for name, write in sections.items():
        results = {
            key: result["metrics"] for key, job in getattr(study, name)().items() if (result := job.result(folder))
        }
        lines += write(results, folder) if results else []
    path = folder / "report.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"The report is {path}."


def _machines(done: Sequence[dict[str, Any]]) -> str:
    """Where results come from, by how many."""
    counts = Counter(result.get("measured_on", "unknown") for result in done)
    return "; ".join(f"{name}: {count}" for name, count in counts.most_common()) or "none yet"


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
    for split in ("id", "ood"):
        lines += [f"By what is wrong with the rejected image, {largest:,} pairs, {SPLITS[split]}, in %:", ""]
        categories = sorted({name for metrics in results.values() for name in metrics[split]["categories"]})
        rows = []
        for name in names:
            at = _of(results, name, largest)
            cells = [
                f"{100 * estimate(_accuracy(at, split, category)).value:.0f}" if at else "-" for category in categories
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
    lines += ["![Accuracy over the amount of preference data](paradigms.png)", ""]
    for split in ("id", "ood"):
        lines += [f"Claims, {SPLITS[split]}:", ""]
        for better, worse, kind in COMPARED:
            for count in counts:
                first, second = _of(results, better, count), _of(results, worse, count)
                if first and second:
                    difference = estimate(*(_accuracy(at, split, kind=kind) for at in (first, second)))
                    asked = ", mean of both orders," if kind == "averaged_credits" else ""
                    lines.append(_claim(f"{better}{asked} above {worse}, {count:,} pairs", difference))
        lines.append("")
    draw_paradigms(results, {name: PARADIGMS[name] for name in names}, counts, folder / "paradigms.png")
    return lines


def _sizes(results: Results, folder: Path) -> list[str]:
    if not any("judge" in key for key in results):  # measurements that other experiments share
        return []
    sizes = sorted({key[0] for key in results if key[0] != "base"}, key=lambda size: float(size.rstrip("m")))
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
    widths = [key[1] for key in results if key[0] == "base"]
    for width in widths:
        lines += _gain_lines(results, sizes, width)
    lines += _search_lines(results, sizes)
    points = _accuracies_and_gains(results, sizes, widths)
    for width in widths:
        of_width = [point for point in points if point.width == width]
        for name, split in (("in-domain", "accuracy_id"), ("out-of-domain", "accuracy_ood")):
            if len(of_width) >= 4:
                found = rank_correlation(
                    [getattr(point, split) for point in of_width], [point.gain for point in of_width]
                )
                lines.append(
                    f"- {name.capitalize()} accuracy and gain by tuning a generator of width {width}, over {len(of_width)} judges: "
                    f"rank correlation {found.value:.2f} ({found.low:.2f} to {found.high:.2f})."
                )
    steps = [*zip(sizes, sizes[1:], strict=False)]
    for small, large in steps if len(steps) < 2 else [*steps, (sizes[0], sizes[-1])]:
        for paradigm in ("pointwise", "pairwise"):
            first, second = (_of(results, size, "judge", paradigm) for size in (large, small))
            if first and second:
                difference = estimate(_accuracy(first, "ood"), _accuracy(second, "ood"))
                lines.append(_claim(f"{large} above {small}, {paradigm}, out of domain", difference))
    draw_sizes(results, sizes, points, folder / "sizes.png")
    return [*lines, "", "![Size, accuracy and gain](sizes.png)", ""]


def _gain_lines(results: Results, sizes: Sequence[str], width: int) -> list[str]:
    """What a generator gains by tuning, by judge."""
    base = results["base", width]
    plain = estimate([base["right"]]).percent()
    measures = {
        "gain": lambda right: estimate(right, [base["right"]]),
        "GSB": lambda right: good_same_bad(right, base["right"]),
    }
    rows = []
    for paradigm in ("pointwise", "pairwise"):
        tuned = {size: [at["right"] for at in _tuned(results, size, paradigm, width).values()] for size in sizes}
        if not any(tuned.values()):
            continue
        for name, measure in measures.items():
            cells = [measure(tuned[size]).points() if tuned[size] else "-" for size in sizes]
            rows.append([f"{paradigm}, {name}", *cells])
    return [
        f"What the generator of width {width} gains by tuning, in points of held-out prompts that it draws right ({plain} % before), and "
        "GSB of tuned against base:",
        "",
        *_table(["judge", *sizes], rows),
    ]


def _tuned(results: Results, size: str, paradigm: str, width: int) -> dict[int, dict[str, Any]]:
    """Generators by seed."""
    return {key[3]: at for key, at in results.items() if key[:3] == (size, "tuned", paradigm) and key[4] == width}


def _accuracies_and_gains(results: Results, sizes: Sequence[str], widths: Sequence[int]) -> list[JudgeAndGain]:
    """Accuracy of each judge that has tuned a generator, and what that gained."""
    points = []
    for width in widths:
        for size in sizes:
            for paradigm in ("pointwise", "pairwise"):
                for seed, at in _tuned(results, size, paradigm, width).items():
                    judge = results.get((size, "judge", paradigm, seed))
                    if judge:
                        gain = estimate([at["right"]], [results["base", width]["right"]]).value
                        accuracies = (judge["id"]["accuracy"], judge["ood"]["accuracy"])
                        points.append(JudgeAndGain(size, paradigm, width, *accuracies, gain))
    return points


def _search_lines(results: Results, sizes: Sequence[str]) -> list[str]:
    """What search gains by method and budget."""
    found = {size: _of(results, size, "search") for size in sizes if _of(results, size, "search")}
    if not found:
        return []
    one = next(iter(found.values()))[0]
    rows = [
        [METHODS[key.split("/")[0]], key.split("/")[1], f"{tokens:,.0f}"]
        + [
            estimate([at[key] for at in of_size], [at["plain"] for at in of_size]).points()
            for of_size in found.values()
        ]
        for key, tokens in one["tokens"].items()
    ]
    return [
        "Search by the pointwise judge: gain in points over plain sampling, by denoiser evaluations for each prompt (a plain image "
        "takes 8) and tokens that the judge reads for it:",
        "",
        *_table(["method", "evaluations", "tokens", *found], rows),
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
    runs = {key: at for key, at in results.items() if key != ("base",)}
    if not base or not runs:
        return []
    lines = ["## Figures 2, 5 and 6: rewards while a generator is tuned", ""]
    rows, kept, gains, named = [], [], [], []
    for size, paradigm in dict.fromkeys(key[:2] for key in runs):
        found = {key[2]: at for key, at in runs.items() if key[:2] == (size, paradigm)}
        warnings = [kind for at in found.values() for _, kind in at["warnings"]]
        shares = {}
        for seed, at in found.items():
            spreads = [record["reward_std"] for record in at["history"] if record.get("reward_std")]
            if spreads:
                shares[seed] = spreads[-1] / spreads[0]
                gain = estimate([at["right"]], [base["right"]])
                kept.append(shares[seed])
                gains.append(gain.value)
                name = f"{size} {paradigm}, seed {seed}: {shares[seed]:.2f} of the spread kept, gain {gain.points()}"
                if (shares[seed] < FALLEN and gain.low > 0) or (shares[seed] >= FALLEN and gain.high < 0):
                    named.append(name)
        rows.append(
            [
                size,
                PARADIGMS[paradigm],
                estimate([at["right"] for at in found.values()], [base["right"]]).points(),
                ", ".join(f"{share:.2f}" for share in shares.values()) or "-",
                ", ".join(f"{kind} ({count})" for kind, count in Counter(warnings).items()) or "none",
            ]
        )
    header = [
        "judge",
        "paradigm",
        "gain in points",
        "late over early std of rewards, by seed",
        "warnings of the monitor",
    ]
    lines += _table(header, rows)
    if len(kept) >= 4:
        found_correlation = rank_correlation(kept, gains)
        lines += [
            f"- Share of the spread that is kept, and gain, over {len(kept)} runs: rank correlation {found_correlation.value:.2f} "
            f"({found_correlation.low:.2f} to {found_correlation.high:.2f}).",
            "- Counter-examples (the spread fell below "
            f"{FALLEN} and the generator gained, or it was kept and the generator lost): {'; '.join(named) or 'none'}.",
            "",
        ]
    draw_dynamics(runs, PARADIGMS, folder / "dynamics.png")
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


def _clips(results: Results, folder: Path) -> list[str]:
    paradigms = [name for name in PARADIGMS if _of(results, "judge", name)]
    if not paradigms:
        return []
    tasks = [key[1] for key in results if key[0] == "base"]
    lines = ["## Table 3: clips", "", "Accuracy of judges in %:", ""]
    rows = []
    for name in paradigms:
        judged = _of(results, "judge", name)
        for task in tasks:
            of_task = [metrics[task] for metrics in judged]
            cells = [estimate(_accuracy(of_task, split)).percent() if split in of_task[0] else "-" for split in SPLITS]
            rows.append([f"{PARADIGMS[name]}, {task}", *cells])
    lines += _table(["judge", *SPLITS.values()], rows)
    rows = []
    tunings = list(dict.fromkeys(key[1:4] for key in results if key[0] == "tuned"))
    for task, name, gradient in tunings:
        base = results["base", task]["right"]
        tuned = [at["right"] for at in _of(results, "tuned", task, name, gradient)]
        cells = (estimate([base]).percent(), estimate(tuned).percent(), estimate(tuned, [base]).points())
        rows.append([task, PARADIGMS[name], GRADIENTS[gradient], *cells, good_same_bad(tuned, base).points()])
    lines += [
        "What generators gain by tuning, in % of held-out prompts that their clips show all of, and GSB of tuned against base:",
        "",
        *_table(["task", "judge", "gradient in", "base", "tuned", "gain in points", "GSB"], rows),
    ]
    for task, name, gradient in tunings:
        categories = results["base", task]["categories"]
        cells = []
        for category in sorted(set(categories)):
            picked = [index for index, of_row in enumerate(categories) if of_row == category]
            before, *after = (
                100 * float(np.mean([at["right"][index] for index in picked]))
                for at in (results["base", task], *_of(results, "tuned", task, name, gradient))
            )
            cells.append(f"{category} {before:.0f} to {float(np.mean(after)):.0f}")
        lines.append(f"- {task}, {name}, {GRADIENTS[gradient]}: {', '.join(cells)}.")
    lines.append("")
    shown = {task: _shown_clips(results, folder / "clips", task) for task in tasks}
    if not all(shown.values()):
        return lines
    draw_clips(shown, folder / "clips.png")
    note = (
        "Of each category the first clip that tuning has put right, or else the first; right ones are framed in green."
    )
    return [*lines, "![Clips before and after tuning](clips.png)", "", note, ""]


def _shown_clips(results: Results, folder: Path, task: str) -> list[ShownClip]:
    """Clips before and after the first of the tunings: of each category the first that it has put right, or else the first."""
    key = next((key for key in results if key[:2] == ("tuned", task)), None)
    if key is None:
        return []
    base, tuned = results["base", task], results[key]
    files = [folder / name / SHOWN_FILE for name in (f"base_{task}", "_".join(map(str, key)))]
    if not all(file.is_file() for file in files):  # results of another machine, without clips
        return []
    before, after = (np.load(file) for file in files)
    shown = []
    for category in sorted(set(base["categories"][: len(before)])):
        picked = [index for index in range(len(before)) if base["categories"][index] == category]
        index = max(picked, key=lambda index: tuned["right"][index] - base["right"][index])
        shown.append(
            ShownClip(base["prompts"][index], before[index], after[index], base["right"][index], tuned["right"][index])
        )
    return shown
