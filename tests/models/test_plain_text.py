"""Splitting of special tokens: the same as splitting the first one again and again, but in linear time."""

import random
import re
import time

import pytest

from rewarddance_hf.models.plain_text_rewarddance import ZERO_WIDTH_SPACE, ControlTokens


def split_one_by_one(spellings, text):
    """The definition: the first spelling is split, until none is left."""
    pattern = re.compile("|".join(re.escape(token) for token in sorted(spellings, key=len, reverse=True)))
    while match := pattern.search(text):
        text = text[: match.start() + 1] + ZERO_WIDTH_SPACE + text[match.start() + 1 :]
    return text


@pytest.mark.parametrize("seed", range(5))
def test_same_as_one_by_one(seed):
    """Tokens that overlap, begin with each other or contain the space are split all the same."""
    chance = random.Random(seed)
    letters = "ab<>"
    for _ in range(300):
        count = chance.randint(1, 6)
        spellings = {"".join(chance.choices(letters, k=chance.randint(2, 5))) for _ in range(count)}
        spellings.add(f"ab{ZERO_WIDTH_SPACE}b")
        text = "".join(chance.choices(letters + ZERO_WIDTH_SPACE, k=60))
        assert ControlTokens(spellings).split(text) == split_one_by_one(spellings, text)


def test_nothing_to_split():
    """Without spellings, and with one that no space can split, text stays as it is."""
    assert ControlTokens(set()).split("<a>") == "<a>"
    assert ControlTokens({f"a{ZERO_WIDTH_SPACE}b"}).split(f"a{ZERO_WIDTH_SPACE}b") == f"a{ZERO_WIDTH_SPACE}b"


def test_time_is_linear():
    """5,400 characters of HTML took a minute with the 6,415 added tokens of Gemma 3."""
    tags = [f"<{mark}{name}>" for name in ("div", "table", "li", "h1") for mark in ("", "/")]
    tokens = ControlTokens({*tags, *(f"<unused{i}>" for i in range(6400))})

    def seconds(count):
        start = time.perf_counter()
        tokens.split("<div><li>x</li></div> < y " * count)
        return time.perf_counter() - start

    seconds(10)
    short, long = (min(seconds(count) for _ in range(3)) for count in (500, 4000))
    assert long < 4 * 8 * short  # 64 times if it were quadratic
    assert long < 5
