"""Image editing by instruction: EditReward-Data, EditReward-Bench; and benchmarks that have it in them: MMRB2, GenAI-Bench."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers.utils import logging

from .media import VideoFiles
from .repository import DatasetRepository
from .rows import DIMENSION_CRITERIA, make_row, ranked_pairs, rows_from_table
from .source import Benchmark, DatasetTerms, Source


logger = logging.get_logger(__name__)

IMAGE_PLACEHOLDER = re.compile(r"\s*<image_\d+>\s*")
GENAI_COLUMNS = {
    "image_generation": ["prompt", "left_image", "right_image", "vote_type"],
    "image_edition": ["instruct_prompt", "source_image", "left_output_image", "right_output_image", "vote_type"],
    "video_generation": ["prompt", "left_video", "right_video", "vote_type"],
}
# Share of votes for the left sample.
EDITREWARD_VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tie": 0.5, "tievote": 0.5}
# What annotators gave 1 to 4 points for; the overall score is their sum.
EDITREWARD_CRITERIA = {
    "overall": None,
    "instruction_following": "how exactly it carries out the instruction, and nothing else",
    "quality_aesthetic": DIMENSION_CRITERIA["aesthetics"],
}
GENAI_VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}


def _edit_of(source_image: Any) -> dict[str, Any]:
    """Columns of a row about edits of an image."""
    return {"task": "image-editing", "condition": source_image}


def _read_editreward(repository: DatasetRepository, split: str, streaming: bool, dimension: str) -> Any:
    columns = ["instruction", "source_img", "left_output_image", "right_output_image"]
    columns += ["vote_type"] if dimension == "overall" else [f"{side}_{dimension}_score" for side in ("left", "right")]
    table = repository.table(None, split, columns, streaming)
    return rows_from_table(table, partial(_editreward_data_rows, dimension=dimension))


def _editreward_data_rows(row: Mapping[str, Any], dimension: str) -> list[dict[str, Any]]:
    if dimension == "overall":
        vote = row["vote_type"]
        if vote not in EDITREWARD_VOTES:
            raise ValueError(
                f"`vote_type` is {vote!r}, but EditReward-Data has {sorted(EDITREWARD_VOTES)}. Its schema has moved."
            )
        share = EDITREWARD_VOTES[vote]
    else:
        left, right = (row[f"{side}_{dimension}_score"] for side in ("left", "right"))
        if left is None or right is None:
            return []
        share = 0.5 if left == right else float(left > right)
    images = row["left_output_image"], row["right_output_image"]
    criteria = EDITREWARD_CRITERIA[dimension]
    return [make_row(row["instruction"], *images, share, criteria=criteria, **_edit_of(row["source_img"]))]


def _read_mmrb2(repository: DatasetRepository, split: str, streaming: bool, config: str) -> Any:
    columns = ["pair_id", "prompt_text", "prompt_images", "response_a_images", "response_b_images", "chosen"]
    table = repository.table(config, split, columns, streaming, optional=["prompt_source"])
    return rows_from_table(table, partial(_mmrb2_rows, config=config))


def _mmrb2_rows(row: Mapping[str, Any], config: str) -> list[dict[str, Any]]:
    verdict = str(row["chosen"]).lower()
    if verdict not in ("a", "b"):
        raise ValueError(f"`chosen` of pair {row['pair_id']!r} is {row['chosen']!r}, but must be 'a' or 'b'.")
    images = [row[column] or [] for column in ("prompt_images", "response_a_images", "response_b_images")]
    counts = [len(part) for part in images]
    if counts not in ([config == "edit", 1, 1], [0, 1, 1]):
        logger.warning(
            f"Pair {row['pair_id']!r} is left out: it has {counts} images in prompt, response a and response b, but a "
            "preference row holds one of each."
        )
        return []
    condition = images[0][0] if images[0] else None
    return [
        make_row(
            IMAGE_PLACEHOLDER.sub(" ", row["prompt_text"]).strip(),
            images[1][0],
            images[2][0],
            float(verdict == "a"),
            category=row.get("prompt_source"),
            **({} if condition is None else _edit_of(condition)),
        )
    ]


def _read_editreward_bench(
    repository: DatasetRepository, split: str, streaming: bool, config: str | None, subset: str | None
) -> Any:
    columns = ["id", "instruction", "dataset", "ranking", "source_image", "candidate_1", "candidate_2"]
    table = repository.table(config, split, columns, streaming, optional=["candidate_3", "candidate_4"])
    return rows_from_table(table, partial(_editreward_rows, subset=subset))


def _editreward_rows(row: Mapping[str, Any], subset: str | None) -> list[dict[str, Any]]:
    if subset is not None and row["dataset"] != subset:
        return []
    candidates = [row[f"candidate_{i}"] for i in range(1, 5) if row.get(f"candidate_{i}") is not None]
    # "C>A" is about two candidates, of which A is the first one; ties of two may say how good both are.
    ranking = re.sub(r"\s|=(GOOD|BAD)$", "", row["ranking"].upper())
    if "<" in ranking:
        ranking = ">".join(reversed(ranking.split("<")))
    tiers = [tier.split("=") for tier in ranking.split(">")]
    letters = sorted(letter for tier in tiers for letter in tier)
    if len(set(letters)) != len(candidates) or len(letters) != len(candidates) or not "".join(letters).isalpha():
        raise ValueError(
            f"`ranking` of {row['id']!r} is {row['ranking']!r} for {len(candidates)} candidates, but must name each once, as "
            "in 'B>A' or 'A=B'."
        )
    places = {letter: place for place, tier in enumerate(tiers) for letter in tier}
    context = {**_edit_of(row["source_image"]), "category": row["dataset"]}
    pairs = ranked_pairs(candidates, [places[letter] for letter in letters])
    return [make_row(row["instruction"], *pair, **context) for pair in pairs]


def _read_genai_bench(repository: DatasetRepository, split: str, streaming: bool, config: str, both_bad: str) -> Any:
    table = repository.table(config, split, GENAI_COLUMNS[config], streaming)
    videos = VideoFiles(repository, streaming) if config == "video_generation" else None
    return rows_from_table(table, partial(_genai_rows, config=config, both_bad=both_bad), videos)


def _genai_rows(row: Mapping[str, Any], config: str, both_bad: str) -> list[dict[str, Any]]:
    vote = row["vote_type"]
    if vote not in GENAI_VOTES:
        raise ValueError(f"`vote_type` is {vote!r}, but GenAI-Bench has {sorted(GENAI_VOTES)}. Its schema has moved.")
    if vote == "bothbad_vote" and both_bad == "drop":
        return []
    prompt, *condition, left, right, _ = (row[column] for column in GENAI_COLUMNS[config])
    context: dict[str, Any] = {}
    if config == "image_edition":
        context = _edit_of(condition[0])
    elif config == "video_generation":
        context = {"task": "text-to-video"}
    return [make_row(prompt, left, right, GENAI_VOTES[vote], **context)]


SOURCES = (
    Source(
        "editreward",
        "EditReward-Data",
        "TIGER-Lab/EditReward-Data",
        "[Paper](https://huggingface.co/papers/2509.26346). 170,772 pairs of edits (338 GB; read it streaming) with their source "
        "image as `condition`. Votes are `overall`; by another `dimension` the edit with more points is preferred, and equal "
        "points are a tie.",
        _read_editreward,
        split="train",
        terms=DatasetTerms("cc-by-nc-4.0", False),
        options={"dimension": tuple(EDITREWARD_CRITERIA)},
    ),
    Source(
        "mmrb2",
        "Multimodal RewardBench 2",
        "rl-research/multimodal-rewardbench-2",
        "[Paper](https://huggingface.co/papers/2512.16899), for evaluation only. `config` is `t2i` or `edit`, whose rows have "
        "the image to be edited as `condition`: responses of the others are more than an image. Rows with several prompt "
        "images, or none or several in a response, are left out with a warning. The source of the prompt is the category.",
        _read_mmrb2,
        split="test",
        terms=DatasetTerms("cc-by-nc-4.0", False, "license of the dataset card: evaluation only"),
        options={"config": ("t2i", "edit")},
        benchmarks={
            "mmrb2-t2i": Benchmark("Multimodal RewardBench 2, T2I", "test", {"config": "t2i"}),
            "mmrb2-edit": Benchmark("Multimodal RewardBench 2, Edit", "test", {"config": "edit"}),
        },
    ),
    Source(
        "editreward-bench",
        "EditReward-Bench (TIGER-Lab)",
        "TIGER-Lab/EditReward-Bench",
        "[Paper](https://huggingface.co/papers/2509.26346); `EditScore/EditReward-Bench` is another benchmark. Rankings such as "
        "'B>A' or 'A=B' become pairs, with the source image as `condition`. `subset` keeps only rows with this value of "
        "`dataset`, which is the category; `config` is for repositories that have several. The paper's figures are no "
        "accuracies of pairs: of 3 and 4 candidates the whole ranking must be right, and of 2 a tie counts too, with the "
        "threshold that fits the benchmark best.",
        _read_editreward_bench,
        split="train",
        terms=DatasetTerms("apache-2.0", True),
        options={"config": (), "subset": (None, "2pair", "3pair", "4pair")},
        benchmarks={
            "editreward-bench": Benchmark("EditReward-Bench (TIGER-Lab)", "train"),
            "editreward-bench-2pair": Benchmark(
                "EditReward-Bench (TIGER-Lab), pairs of two candidates", "train", {"subset": "2pair"}
            ),
        },
    ),
    Source(
        "genai-bench",
        "GenAI-Bench (TIGER-Lab)",
        "TIGER-Lab/GenAI-Bench",
        "[Paper](https://huggingface.co/papers/2406.04485); `BaiqiL/GenAI-Bench` is another dataset. Splits `test` and "
        "`test_v1`. Rows of `config=image_edition` have the source image as `condition`. Votes of 'both bad' become ties, or "
        "are left out with `both_bad='drop'` (41 % of the edits).",
        _read_genai_bench,
        split="test_v1",
        terms=DatasetTerms("cc-by-4.0", True),
        options={"config": tuple(GENAI_COLUMNS), "both_bad": ("tie", "drop")},
        benchmarks={
            f"genai-bench-{short}": Benchmark(f"GenAI-Bench (TIGER-Lab), {name}", "test_v1", {"config": config})
            for short, name, config in (
                ("image", "image generation", "image_generation"),
                ("edit", "image editing", "image_edition"),
                ("video", "video generation", "video_generation"),
            )
        },
    ),
)
