"""
Write the tables of README.md in this folder, and of that of the trainer, from a file of results: `python tests/benchmarks/results_table.py FILE`.

Each goes between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rewarddance_hf.memory.report import CARDS, USABLE


README = Path(__file__).parent / "README.md"
READMES = (README, Path(__file__).parents[2] / "rewarddance_hf" / "trainer" / "README.md")
Results = dict[str, float]


def groups(results: Results, prefix: str) -> dict[str, Results]:
    """Numbers by what was measured, of those measurements whose names begin with `prefix`."""
    found: dict[str, Results] = {}
    for key, value in results.items():
        name, _, what = key.rpartition("/")
        if name.startswith(prefix):
            found.setdefault(name.removeprefix(prefix), {})[what] = value
    return found


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def ratio(values: Results, name: str) -> str:
    return f"{values[name]:.1f}x" if name in values else "-"


def where(written: dict[str, Any], part: str) -> list[str]:
    """A line about where and with what a table was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in written["versions"].items())
    device = written["gpu"] or f"one core of {written['cpu']}" if written["threads"] == 1 else written["cpu"]
    commits = sorted({commit for name, commit in written["commits"].items() if name.startswith(f"{part}/")})
    return [f"Commit {' and '.join(commits)}, {written['date']}, {device}, Python {written['python']}, {versions}."]


def scoring(results: Results) -> list[str]:
    peers = ("batched", "batched_forward", "cross_encoder", "one_by_one", "generation")
    header = [
        "judge",
        "images",
        "tokens each",
        "layout",
        "a batch",
        "its forward alone",
        "`CrossEncoder`",
        "one pair at a time",
    ]
    header += ["a generated verdict", "in theory", "pairs/s"]
    rows = []
    for name, values in groups(results, "scoring/").items():
        if "tokens_over_minimum" not in values:
            continue
        judge, size, layout = name.split("/")
        cells = [judge, *size.split("x"), f"`{layout}`", *(ratio(values, f"speedup_vs_{peer}") for peer in peers)]
        rows.append([*cells, ratio(values, "theoretical_speedup"), f"{values['questions_per_second']:.1f}"])
    lines = table(header, rows)
    rows = [
        [name, ratio(values, "speedup_vs_batched"), f"{values['questions_per_second']:.1f}"]
        for name, values in groups(results, "scoring/distinct_pairs/").items()
    ]
    lines += ["", *table(["distinct pairs, judge", "a batch", "pairs/s"], rows)]
    return lines


def vllm(results: Results) -> list[str]:
    rows = [
        [
            name,
            what.replace("_", " "),
            f"{values[f'{what}_speedup_vs_vllm']:.2f}x",
            *(f"{values[f'{what}_questions_per_second{whose}']:.1f}" for whose in ("", "_vllm")),
            f"{values['largest_difference']:.0e}",
        ]
        for name, values in groups(results, "vllm/").items()
        for what in ("round_robin", "distinct_pairs")
    ]
    header = [
        "judge",
        "questions",
        "speed over vLLM's",
        "pairs/s of ours",
        "of vLLM",
        "largest difference of log-odds",
    ]
    return table(header, rows)


def attention(results: Results) -> list[str]:
    types, ways = ("float32", "bfloat16"), ("grouped", "apart", "packed")
    rows = []
    for name, values in groups(results, "attention/").items():
        judge, size, layout = name.split("/")
        cells = [judge, *size.split("x"), f"`{layout}`"]
        cells += [f"{100 * values[f'share_of_{part}']:.1f} %" for part in ("attention", "copies")]
        for way in ways:
            cells.append(" / ".join(f"{values[f'{way}_{dtype}_time']:.2f}" for dtype in types))
        cells.append(
            " / ".join(f"{values[f'{way}_memory']:.2f}" if f"{way}_memory" in values else "-" for way in ways)
        )
        for dtype in types:
            cells.append(f"{max(values[f'{way}_{dtype}_difference'] for way in ways):.0e}")
        rows.append(cells)
    header = ["judge", "candidates", "tokens each", "layout", "attention", "copies", *(f"`{way}`" for way in ways)]
    return table([*header, "memory of the three", "largest difference, float32", "bf16"], rows)


def reward_step(results: Results) -> list[str]:
    rows = []
    for name, values in groups(results, "reward_step/").items():
        prompts, layout = name.split("/")
        cells = [
            f"{values[f'{way}_{what}_over_full_graph']:.2f}"
            for what in ("time", "memory")
            for way in ("first", "again", "checkpointed")
        ]
        full = [f"{values['full_graph_seconds']:.2f}", f"{values['full_graph_peak_gb']:.2f}"]
        rows.append([prompts.replace("_", " "), f"`{layout}`", *cells, *full])
    ways = ["first", "again", "again, checkpointed"]
    header = ["samples of", "layout", *(f"time, {way}" for way in ways), *(f"memory, {way}" for way in ways)]
    return table([*header, "full graph, s", "full graph, GB"], rows)


def gradient(results: Results) -> list[str]:
    rows = [
        [
            name,
            *(f"{values[f'{way}_{what}_over_full_backprop']:.2f}" for way in WAYS for what in ("memory", "time")),
        ]
        for name, values in groups(results, "gradient/").items()
    ]
    return table(["pipeline", *(f"{way}, {what}" for way in WAYS for what in ("memory", "time"))], rows)


def input_side(results: Results) -> list[str]:
    found = groups(results, "input/")
    numbers = sorted({int(key.split("_")[3]) for values in found.values() for key in values if "_per_second_" in key})
    rows = []
    for name, values in found.items():
        part, kind = name.split("/")
        what, unit = ("images", "threads") if part == "desk" else ("rows", "processes")
        rates = [values.get(f"{what}_per_second_{number}_{unit}") for number in numbers]
        cost = values[f"cpu_ms_per_{what[:-1]}"]
        decoding = f"{values['share_of_decoding']:.2f}" if part == "desk" else "-"
        rows.append(
            [
                part,
                kind.replace("_", ", "),
                what,
                f"{cost:.1f}",
                decoding,
                *("-" if r is None else f"{r:.0f}" for r in rates),
            ]
        )
    header = [
        "",
        "images",
        "of",
        "ms of one core each",
        "share of decoding",
        *(f"a second, {n} worker{'s' * (n > 1)}" for n in numbers),
    ]
    return table(header, rows)


WAYS = ("refl_step", "refl_step_checkpointed_vae", "draft_3")


def training_memory(results: Results) -> list[str]:
    rows = [
        [name, f"{values['labelled_positions_gb']:.2f}", f"{values['full_logits_gb']:.2f}"]
        for name, values in groups(results, "training_memory/").items()
    ]
    return table(["rows with", "GB where there are labels only", "GB with all logits"], rows)


def judge_memory(results: Results) -> list[str]:
    columns = {
        "weights_gib": "weights",
        "score_gib": "8 pairs scored at once",
        "lora_none_1_gib": "LoRA update of 4 pairs",
        "full_none_1_gib": "update of all weights",
    }
    rows = [
        [
            name,
            f"{values['billion_parameters']:.2f}B",
            *(f"{values[part]:.1f}" if part in values else "-" for part in columns),
        ]
        for name, values in groups(results, "judge_memory/").items()
    ]
    return table(["judge", "parameters", *columns.values()], rows)


def engines(results: Results) -> list[str]:
    """What each GPU holds by engine, and for each card how many of them are needed."""
    columns = {
        "none_1": "one GPU",
        "ddp_8": "8, DDP",
        "fsdp2_8": "8, FSDP2",
        "zero2_8": "8, ZeRO-2",
        "zero3_8": "8, ZeRO-3",
    }
    rows = []
    for name, values in groups(results, "judge_memory/").items():
        for kind, title in {"lora": "LoRA", "full": "all"}.items():
            sizes = [f"{values[f'{kind}_{engine}_gib']:.0f}" for engine in columns]
            rows.append([name, title, *sizes, *(_engine(values, kind, card) for card in CARDS)])
    return table(["judge", "weights", *columns.values(), *(f"{card} GB" for card in CARDS)], rows)


def _engine(values: Results, kind: str, card: int) -> str:
    """The simplest way that fits on cards of a size."""
    room = USABLE * card
    if values[f"{kind}_none_1_gib"] <= room:
        return "1, or DDP" if values[f"{kind}_ddp_8_gib"] <= room else "1"
    numbers = sorted(int(key.split("_")[2]) for key in values if key.startswith(f"{kind}_fsdp2_"))
    fits = [number for number in numbers if values[f"{kind}_fsdp2_{number}_gib"] <= room]
    return f"FSDP2 x {fits[0]}" if fits else "-"


def refl_memory(results: Results) -> list[str]:
    found = groups(results, "refl_memory/")
    rows = []
    for name, values in found.items():
        if name.endswith("/judge_elsewhere"):
            continue
        peaks = [values[f"{part}_gib"] for part in ("weights", "before", "update")]
        elsewhere = found.get(f"{name}/judge_elsewhere", {})
        peaks.append(max(elsewhere.get(f"{part}_gib", float("nan")) for part in ("before", "update")))
        rows.append([f"`{name}.yaml`", *(f"{value:.1f}" for value in peaks)])
    header = ["configuration", "weights in an update", "before the first update", "an update", "judges elsewhere"]
    return table(header, rows)


def encoded_prompts(results: Results) -> list[str]:
    found = groups(results, "encoded_prompts/")
    memory, time = found.get("flux_dev", {}), found.get("flux_reduced", {})
    rows = []
    for way, name in (("each_time", "in each update"), ("once", "once before (`precompute_prompts`)")):
        cells = [f"{memory[f'{way}_{part}_gib']:.1f}" if memory else "-" for part in ("before", "update")]
        encoding = "encoding_seconds" if way == "each_time" else "encoding_once_seconds"
        seconds = [f"{time[f'{way}_seconds']:.2f}", f"{time[encoding]:.3f}"] if time else ["-", "-"]
        rows.append([name, *cells, *seconds])
    header = ["prompts are encoded", "GiB before the first update", "GiB in an update"]
    return table([*header, "reduced: seconds of an update", "of which encoding"], rows)


def serving(results: Results) -> list[str]:
    loads = {"throughput": ["0.4M", "16"], "small_requests": ["3M", "4"], "smallest_judge": ["0.4M", "4"]}
    rows = []
    for name, values in groups(results, "serving/").items():
        if name not in loads:
            continue
        lowest, median, highest = (values[f"{each}throughput_over_in_process"] for each in ("lowest_", "", "highest_"))
        times = [f"{1000 * values[key]:.0f}" for key in ("p50_seconds", "p99_seconds")]
        cpu = f"{values['server_cpu_over_in_process']:.2f}"
        rate = f"{values['pairs_per_second']:.0f}"
        rows.append([*loads[name], f"{median:.2f} ({lowest:.2f} to {highest:.2f})", cpu, rate, *times])
    header = ["judge", "samples of a request", "throughput over in-process", "CPU time over in-process", "pairs/s"]
    lines = table([*header, "p50, ms", "p99, ms"], rows)
    if overload := groups(results, "serving/").get("overload"):
        asked, peak = overload["asked_over_bound"], overload["peak_memory_over_twice_asked"]
        refused, lost = overload["refused_for_a_while"], overload["lost"]
        lines += [
            "",
            *table(
                [
                    "asked at once over what it may hold",
                    "peak memory over that when asked twice as much",
                    "told to come again",
                    "lost",
                ],
                [[f"{asked:.0f}x", f"{peak:.2f}x", f"{refused:.0f}", f"{lost:.0f}"]],
            ),
        ]
    return lines


def gpu(results: Results) -> list[str]:
    columns = {
        "score/images_per_second": "score: images/s",
        "rank/questions_per_second": "round robin of 16: pairs/s",
        "rank/speedup_vs_batched": "over a batch",
        "rank/share_of_peak": "share of the matmul peak",
        "rank/peak_gib": "GiB",
        "rank/largest_difference": "largest difference of log-odds",
        **{f"attention/{way}_bfloat16_time": f"attention, `{way}`" for way in ("grouped", "apart", "packed")},
        "train/images_per_second": "LoRA training: images/s",
        "train/tokens_per_second": "tokens/s",
        "train/share_of_peak": "share of the matmul peak",
        "train/peak_gib": "GiB",
        "reward_step/again_time_over_full_graph": "reward step, again: time over the full graph",
        "reward_step/again_memory_over_full_graph": "memory",
    }
    judges: dict[str, Results] = {}
    for name, values in groups(results, "gpu/").items():
        judge, task = name.split("/")
        judges.setdefault(judge, {}).update({f"{task}/{key}": value for key, value in values.items()})
    rows = [
        [judge, *(f"{values[key]:.3g}" if key in values else "-" for key in columns)]
        for judge, values in judges.items()
    ]
    return table(["judge", *columns.values()], rows)


TABLES = {
    "gpu": gpu,
    "scoring": scoring,
    "vllm": vllm,
    "attention": attention,
    "input": input_side,
    "reward_step": reward_step,
    "gradient": gradient,
    "training_memory": training_memory,
    "judge_memory": judge_memory,
    "engines": engines,
    "refl_memory": refl_memory,
    "encoded_prompts": encoded_prompts,
    "serving": serving,
}


# What a table is made from, if that has another name
SOURCES = {"engines": "judge_memory"}


def measured(written: dict[str, Any]) -> list[str]:
    """Names of the tables that a file has results for."""
    return [
        name for name in TABLES if any(each.startswith(f"{SOURCES.get(name, name)}/") for each in written["commits"])
    ]


def write(written: dict[str, Any], text: str, names: list[str] | None = None) -> str:
    """The text with those tables made anew that there are results for, or some of them."""
    for name in measured(written) if names is None else names:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            before, rest = text.split(begin)
            lines = ["", *where(written, SOURCES.get(name, name)), "", *TABLES[name](written["results"]), ""]
            text = before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    return text


def main(path: Path) -> None:
    """Make the tables of both files from a file of results."""
    written = json.loads(path.read_text(encoding="utf-8"))
    for readme in READMES:
        readme.write_text(write(written, readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
