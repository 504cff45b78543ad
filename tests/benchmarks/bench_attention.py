"""
Ways to attend to a prefix that candidates share, beside that of the engine: is there anything to gain?

`copied` is what transformers does with a cache: the states of a prefix are copied to each candidate, heads that share keys are
given a copy of them each, and `sdpa` is asked with a mask. On a CPU the engine takes `grouped` where no gradient is wanted. First, what attention and these copies take
of the time in which candidates are scored against one reference when their images have been seen: no way can gain more. Then the
ways are compared at the shapes of the largest batch there: `grouped` makes the copies for candidates, but not for heads; `apart`
attends to the prefix once for all candidates, and to the rest apart, and merges both by their log-sum-exp; `packed` is FlexAttention
over one sequence of the prefix and all candidates. On a GPU (`bench_gpu.py`) they are compared too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from judges import PROMPT, make_judge, tiny_config
from released_vlms import INTERNVL
from timing import interleaved, peak_of, timed
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rewarddance_hf.scoring.engine.attention import GROUPED


BATCH_SIZE = 8
REPEATS = 5
TYPES = (torch.float32, torch.bfloat16)
# Two layers of InternVL3.5-2B, whose other layers would take as long
TWO_LAYERS = {part: {**config, "num_hidden_layers": 2} for part, config in INTERNVL["2B"].items()}
TWO_LAYERS["text_config"]["vocab_size"] = 1000


class Shape:
    """Random states of a prefix and of what follows in some rows, and the ways to attend to both."""

    def __init__(
        self, rows: int, prefix: int, rest: int, heads: int, kv_heads: int, width: int, dtype: Any, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        self.device = device

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape).to(device, dtype)

        self.rows, self.prefix, self.rest, self.heads, self.kv_heads = rows, prefix, rest, heads, kv_heads
        self.repeats = heads // kv_heads
        self.queries = random(rows, heads, rest, width)
        self.shared = [random(1, kv_heads, prefix, width) for _ in range(2)]  # keys and values
        self.own = [random(rows, kv_heads, rest, width) for _ in range(2)]
        self.mask = torch.ones(rows, 1, rest, prefix + rest, dtype=torch.bool, device=device).tril(prefix)

        def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
            own = key - prefix
            return (own < 0) | ((own // rest == query // rest) & (own <= query))

        self.blocks = create_block_mask(sees, None, None, rows * rest, prefix + rows * rest, device=device)

    def _copied(self) -> list[torch.Tensor]:
        pairs = zip(self.shared, self.own, strict=True)
        return [torch.cat([shared.expand(self.rows, -1, -1, -1), own], dim=2) for shared, own in pairs]

    def copied(self) -> torch.Tensor:
        """As transformers does it: `(rows, heads, rest, width)`, as of all ways."""
        states = (repeat_kv(states, self.repeats) for states in self._copied())
        return scaled_dot_product_attention(self.queries, *states, self.mask)

    def grouped(self) -> torch.Tensor:
        return scaled_dot_product_attention(self.queries, *self._copied(), self.mask, enable_gqa=True)

    def apart(self) -> torch.Tensor:
        ops = torch.ops.aten
        is_cpu = self.device == "cpu"
        flash = ops._scaled_dot_product_flash_attention_for_cpu if is_cpu else ops._scaled_dot_product_flash_attention

        def attend(*states: torch.Tensor, is_causal: bool = False) -> Any:
            return flash(*states, is_causal=is_causal)[:2]  # and the log-sum-exp

        own, own_sum = attend(self.queries, *(repeat_kv(states, self.repeats) for states in self.own), is_causal=True)
        grouped = (self.kv_heads, self.rows, self.repeats * self.rest)
        queries = self.queries.view(self.rows, self.kv_heads, self.repeats * self.rest, -1).transpose(0, 1)
        of_prefix, prefix_sum = attend(queries.reshape(1, self.kv_heads, grouped[1] * grouped[2], -1), *self.shared)
        of_prefix = of_prefix.reshape(*grouped, -1).transpose(0, 1).reshape(own.shape)
        prefix_sum = prefix_sum.reshape(grouped).transpose(0, 1).reshape(own.shape[:3])
        weights = torch.sigmoid(prefix_sum - own_sum.reshape(own.shape[:3]))[..., None]
        return torch.lerp(own, of_prefix, weights.to(own))

    def packed(self) -> torch.Tensor:
        queries, *own = (states.transpose(0, 1).flatten(1, 2)[None] for states in (self.queries, *self.own))
        states = (torch.cat(pair, dim=2) for pair in zip(self.shared, own, strict=True))
        found = compiled_flex()(queries, *states, block_mask=self.blocks, enable_gqa=self.repeats > 1)
        return found.view(self.heads, self.rows, self.rest, -1).transpose(0, 1)


WAYS = ("copied", "grouped", "apart", "packed")


@cache
def compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@torch.no_grad()
def compare(*shape: int, device: str = "cpu", types: tuple[torch.dtype, ...] = TYPES) -> dict[str, float]:
    """Time of all ways over that of `copied`, and how their results differ."""
    found: dict[str, float] = {}
    for dtype in types:
        states = Shape(*shape, dtype, device)
        ways = {way: getattr(states, way) for way in WAYS}
        for way in ways.values():
            way()  # compiled, buffers made
        results, seconds = interleaved(ways, REPEATS)
        for way in WAYS[1:]:
            name = f"{way}_{str(dtype).removeprefix('torch.')}"
            found[f"{name}_time"] = seconds[way] / seconds["copied"]
            found[f"{name}_difference"] = float((results[way] - results["copied"]).abs().max())
    return found


def _measure(measure: Callable[[Callable[[], Any]], None], way: str, *shape: int) -> None:
    with torch.no_grad():
        states = Shape(*shape, torch.float32)
        if way == "packed":
            states.packed()  # the compiler's memory is not that of the way
        measure(getattr(states, way))


def memory(*shape: int) -> dict[str, float]:
    """Peaks of memory in fresh processes."""
    peaks = {way: peak_of(_measure, way, *shape) for way in WAYS}
    return {f"{way}_memory": peaks[way] / peaks["copied"] for way in WAYS[1:]}


@contextmanager
def watched() -> Iterator[tuple[dict[str, float], list[tuple[int, ...]]]]:
    """Seconds in attention and in copies of states inside, and shapes of attention to a prefix."""
    seconds, shapes = {"attention": 0.0, "copies": 0.0}, []
    attend, update = ALL_ATTENTION_FUNCTIONS[GROUPED], DynamicLayer.update

    def timed_attend(module: Any, queries: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
        found, taken = timed(lambda: attend(module, queries, keys, *args, **kwargs))
        if module.is_causal:  # that of vision is not
            seconds["attention"] += taken
            if keys.shape[2] > queries.shape[2]:
                (rows, heads, rest, width), (_, kv_heads, length, _) = queries.shape, keys.shape
                shapes.append((rows, length - rest, rest, heads, kv_heads, width))
        return found

    def timed_update(*args: Any, **kwargs: Any) -> Any:
        found, taken = timed(lambda: update(*args, **kwargs))
        seconds["copies"] += taken
        return found

    ALL_ATTENTION_FUNCTIONS[GROUPED] = timed_attend  # beside the one that all models share
    try:
        with mock.patch.object(DynamicLayer, "update", timed_update):
            yield seconds, shapes
    finally:
        del ALL_ATTENTION_FUNCTIONS[GROUPED]


@torch.no_grad()
def shares(size: str, count: int, num_tokens: int, layout: str) -> tuple[dict[str, float], tuple[int, ...]]:
    """What attention and copies take of the time for candidates of one reference, and the shape of the largest batch."""
    from tiny_vlms import random_image

    from rewarddance_hf import RewardDanceScorer

    configs = TWO_LAYERS if size == "2b_layers" else tiny_config(size)
    scorer = RewardDanceScorer(*make_judge(num_tokens, layout, **configs), BATCH_SIZE)
    images = [random_image(i, 512, 512) for i in range(count + 1)]
    arguments = (images[1:], [PROMPT] * count, images[:1] * count)
    with scorer.reuse():
        scorer.score(*arguments)
        with watched() as (seconds, shapes):
            _, taken = timed(lambda: scorer.score(*arguments))
    return {f"share_of_{part}": value / taken for part, value in seconds.items()}, max(shapes)


def candidates(size: str, count: int, num_tokens: int, layout: str) -> dict[str, float]:
    """Shares, and how the ways compare."""
    found, shape = shares(size, count, num_tokens, layout)
    names = ("rows", "prefix", "rest", "heads", "key_heads", "width")
    found |= dict(zip(names, map(float, shape), strict=True))
    return found | compare(*shape) | (memory(*shape) if layout == "text_first" and count == 16 else {})


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """Candidates of a judge of 13M parameters and of two layers of one of 2B, only if `is_full`: none of these ways is used."""
    cases = [
        (size, *case)
        for size in ("13m", "2b_layers")
        for case in (
            (16, 64, "text_first"),
            (16, 256, "text_first"),
            (16, 256, "images_first"),
            (64, 256, "text_first"),
        )
    ]
    return {
        f"{size}/{n}x{tokens}/{layout}": partial(candidates, size, n, tokens, layout)
        for size, n, tokens, layout in (cases if is_full else [])
    }
