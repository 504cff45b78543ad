"""
Scoring with the engine against its peers: the loop of a model card, a well-filled batch, `CrossEncoder`, a generated verdict.

All is measured side by side in one process, end to end from images to scores. Peers do the same work for each pair and are
timed on some of the pairs. Where a round robin would take too long, the engine is timed on the pairs of some references: the
first ones, when features of all images are made, and as many again, which stand for the rest.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import torch
from judges import PROMPT, make_judge, tiny_config
from timing import interleaved, matrix_product_peak, peak_of
from torch.utils.flop_counter import FlopCounterMode


BATCH_SIZE = 8
LAYOUTS = ("text_first", "images_first")
# Round robins that `make bench` leaves to `make bench-full`
LONG = {
    "13m/16x256/text_first",
    "3m/64x64/images_first",
    "3m/64x256/images_first",
    "3m/16x1024/images_first",
    "3m/64x1024/text_first",
    "3m/64x1024/images_first",
}


@dataclass(frozen=True)
class RoundRobin:
    """All pairs of some images of `num_tokens` tokens each."""

    num_images: int
    num_tokens: int
    layout: str
    size: str = "3m"
    repeats: int = 1
    references: int | None = None  # on whose pairs the engine is timed
    peer_pairs: int = BATCH_SIZE
    with_generation: bool = False
    bound: float = 1e-4  # on differences of log-odds between the engine and its peers


def cases(is_full: bool = False) -> dict[str, RoundRobin]:
    """Round robins by name, a choice of them if not `is_full`."""
    found = {}
    for layout in LAYOUTS:
        found[f"13m/16x64/{layout}"] = RoundRobin(16, 64, layout, "13m", 3 if is_full else 2, with_generation=True)
    found["13m/16x256/text_first"] = RoundRobin(16, 256, "text_first", "13m")
    found["13m_2b/16x64/text_first"] = RoundRobin(16, 64, "text_first", "13m_2b")
    some = {64: (None, 8, 8), 256: (None, 4, 8), 1024: (4, 1, 4)}  # references of 16, of 64, and pairs of peers
    for num_tokens, (of_16, of_64, peer_pairs) in some.items():
        for num_images, references in ((16, of_16), (64, of_64)):
            for layout in LAYOUTS:
                case = RoundRobin(num_images, num_tokens, layout, references=references, peer_pairs=peer_pairs)
                found[f"3m/{num_images}x{num_tokens}/{layout}"] = case
    return found if is_full else {name: case for name, case in found.items() if name not in LONG}


@torch.no_grad()
def round_robin(case: RoundRobin, judge: tuple[Any, Any] | None = None) -> dict[str, float]:
    """Speed of the engine over that of its peers, and what the engine computes; by a judge and its processor, if given."""
    from tiny_vlms import random_image

    from rewarddance_hf import RewardDanceScorer

    model, processor = judge or make_judge(case.num_tokens, case.layout, **tiny_config(case.size))
    scorer = RewardDanceScorer(model, processor, BATCH_SIZE)
    images = [random_image(i, 512, 512) for i in range(case.num_images)]
    pairs = [(images[j], images[i]) for i, j in itertools.permutations(range(case.num_images), 2)]
    part = len(pairs) if case.references is None else case.references * (case.num_images - 1)
    rows = list(range(0, part, max(1, part // case.peer_pairs)))[: case.peer_pairs]
    others, counts = peer_ways(model, processor, [pairs[row] for row in rows], case.with_generation)
    score_pairs(scorer, pairs[:2])  # libraries are loaded, buffers made
    ways = {"engine": lambda: score_pairs(scorer, pairs[:part])}
    if part == len(pairs):
        results, seconds = interleaved(ways | others, case.repeats)
        counted = scorer.statistics
    else:
        with scorer.reuse():
            ways["following"] = lambda: score_pairs(scorer, pairs[part : 2 * part])
            results, seconds = interleaved(ways, 1)
            counted = scorer.statistics
        more, of_others = interleaved(others, case.repeats)
        results, seconds = results | more, seconds | of_others
        seconds["engine"] += (len(pairs) / part - 1) * seconds.pop("following")
    each = {name: taken / counts.get(name, len(pairs)) for name, taken in seconds.items()}

    got = results["engine"].logit()[rows]
    differences = [(results[name] - got).abs().max() for name in ("batched", "cross_encoder") if name in results]
    if not max(differences) <= case.bound:
        raise RuntimeError(f"Log-odds of {case} differ by {max(differences)} between the engine and its peers.")
    found = {f"speedup_vs_{name}": each[name] / each["engine"] for name in others}
    found |= {
        "questions_per_second": 1 / each["engine"],
        "largest_difference": float(max(differences)),
        "tokens_over_minimum": counted.tokens / counted.minimum_tokens,
        "tokens_per_question": counted.plain_tokens / counted.num_questions,
        "encodings_per_image": counted.num_encoded / case.num_images,
    }
    if part == len(pairs):
        peak = matrix_product_peak(model.device.type, model.dtype)
        engine, batched = flops(ways["engine"]) / len(pairs), flops(others["batched"]) / len(rows)
        found |= {
            "theoretical_speedup": batched / engine,
            "share_of_peak": engine / each["engine"] / peak,
            "share_of_peak_batched": batched / each["batched"] / peak,
        }
    return found


def peer_ways(
    model: Any, processor: Any, pairs: peers.Pairs, with_generation: bool = False
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Peers on some pairs, and on how many each is asked."""
    few = pairs[: max(1, len(pairs) // 2)]
    ready = peers.encode(processor, pairs, model.device)
    ways = {
        "batched": lambda: peers.batched(model, processor, pairs),
        "batched_forward": lambda: model.vlm(**ready, use_cache=False, logits_to_keep=1),
        "one_by_one": lambda: peers.one_by_one(model, processor, few),
    }
    encoder = peers.cross_encoder(model, processor, BATCH_SIZE)
    if encoder is not None:
        ways["cross_encoder"] = lambda: encoder(pairs)
    if with_generation:
        ways["generation"] = lambda: peers.generate_and_parse(model, processor, pairs)
    return ways, {name: len(few if name == "one_by_one" else pairs) for name in ways}


def score_pairs(scorer: Any, pairs: peers.Pairs) -> torch.Tensor:
    """Scores of pairs of a sample and a reference."""
    samples, references = (list(column) for column in zip(*pairs, strict=True))
    return scorer.score(samples, PROMPT, references)


def _linear_flops(given: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(given) * weight[0]


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of products and attention, those of oneDNN too."""
    has_onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    more = {torch.ops.mkldnn._linear_pointwise: _linear_flops} if has_onednn else {}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        function()
    return counter.get_total_flops()


def distinct_pairs(
    num_pairs: int = 24,
    num_tokens: int = 64,
    size: str = "13m",
    repeats: int = 3,
    judge: tuple[Any, Any] | None = None,
) -> dict[str, float]:
    """Pairs that share nothing but the words of the question: other images, other prompts."""
    from tiny_vlms import random_image

    from rewarddance_hf import RewardDanceScorer

    model, processor = judge or make_judge(num_tokens, "text_first", **tiny_config(size))
    scorer = RewardDanceScorer(model, processor, BATCH_SIZE)
    images = [random_image(i, 512, 512) for i in range(2 * num_pairs)]
    words = PROMPT.split()
    prompts = [" ".join(words[i % 7 :] + words[: i % 7]) + f" {i}" for i in range(num_pairs)]
    arguments = (images[::2], prompts, images[1::2])

    def batched() -> torch.Tensor:
        parts = []
        for start in range(0, num_pairs, BATCH_SIZE):
            inputs = processor(*(column[start : start + BATCH_SIZE] for column in arguments)).to(model.device)
            logits = model.vlm(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            parts.append(peers.log_odds(logits, processor))
        return torch.cat(parts)

    with torch.no_grad():
        scorer.score(*(column[:2] for column in arguments))
        results, seconds = interleaved({"engine": lambda: scorer.score(*arguments), "batched": batched}, repeats)
    return {
        "questions_per_second": num_pairs / seconds["engine"],
        "speedup_vs_batched": seconds["batched"] / seconds["engine"],
        "largest_difference": float((results["engine"].logit() - results["batched"]).abs().max()),
    }


def memory() -> dict[str, float]:
    """Memory of a round robin of 8 images."""
    peaks = {engine: peak_of(_measure, engine) for engine in ("auto", "plain")}
    return {"peak_gb": peaks["auto"] / 1e9, "peak_gb_batched": peaks["plain"] / 1e9}


def _measure(measure: Callable[[Callable[[], Any]], None], engine: str) -> None:
    from tiny_vlms import random_image

    from rewarddance_hf import RewardDanceScorer

    scorer = RewardDanceScorer(*make_judge(64, "text_first", **tiny_config("13m")), engine=engine)
    images = [random_image(i, 224, 224) for i in range(8)]
    scorer.rank(images[:2], PROMPT)  # libraries are loaded, buffers made
    measure(lambda: scorer.rank(images, PROMPT))


def tournaments(num_images: int = 32) -> dict[str, float]:
    """Questions of each method, over those of a round robin."""
    from rewarddance_hf.scoring.ranking import rank_samples

    def brightness(images, prompts, references):
        return torch.stack([image.mean() - other.mean() for image, other in zip(images, references, strict=True)])

    brightness.is_pairwise = True
    images = torch.rand(num_images, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    full, swiss, halving = (
        rank_samples(brightness, images, "a", ranking_method=method).num_questions
        for method in ("round_robin", "swiss", "halving")
    )
    return {"swiss_over_round_robin": swiss / full, "halving_over_round_robin": halving / full}


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """
    What is measured.

    Args:
        is_full (`bool`, *optional*, defaults to `False`):
            Whether to measure the long round robins too.

    Returns:
        `dict[str, Callable]`: Functions that measure one case each, by name.
    """
    found = {name: (lambda case=case: round_robin(case)) for name, case in cases(is_full).items()}
    found |= {"distinct_pairs/13m": distinct_pairs, "distinct_pairs/3m": lambda: distinct_pairs(64, size="3m")}
    return found | {"round_robin_memory": memory, "tournament_32": tournaments}
