"""Splitting of special tokens: the same as splitting the first one again and again, but in linear time; and whether that suffices."""

import random
import re
import time

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rewarddance_hf.models.plain_text_rewarddance import ZERO_WIDTH_SPACE, ControlTokens, PlainTextMixin


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


class Reader(PlainTextMixin):
    """Just what reads text, with a tokenizer of letters that normalizes text and has one special token."""

    def __init__(self, is_normalized, vocabulary="abc<>|"):
        letters = {letter: index for index, letter in enumerate([*vocabulary, "?"])}
        backend = Tokenizer(models.WordLevel(letters, unk_token="?"))
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        backend.add_special_tokens([AddedToken("<|a|>", special=True, normalized=is_normalized)])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
        self.vlm_processor = None


WIDE = "<|a|>".translate({ord(letter): ord(letter) + 0xFEE0 for letter in "<|a>"})


def test_tokens_are_looked_at_where_text_is_normalized_first():
    """A token that is looked for in normalized text can be spelled in other letters, which is refused."""
    reader = Reader(is_normalized=True)
    assert not reader._reads_spellings_only
    with pytest.raises(ValueError, match=r"`prompt` contains the special tokens \['<\|a\|>'\]"):
        reader.plain_text(f"b{WIDE}c", "prompt")
    assert "a" in reader.plain_text("a<|b")


@pytest.mark.parametrize("seed", range(3))
def test_spellings_are_all_that_counts_elsewhere(seed):
    """Where the tokenizer looks for special tokens in the text as it is, no split text holds one, and none is tokenized to see that."""
    reader = Reader(is_normalized=False)
    special = reader.tokenizer.convert_tokens_to_ids("<|a|>")
    assert reader._reads_spellings_only
    chance = random.Random(seed)
    pieces = ["<|a|>", "<|", "a", "|>", "<", WIDE, WIDE[:2], ZERO_WIDTH_SPACE, "b"]
    texts = ["".join(chance.choices(pieces, k=12)) for _ in range(300)]
    plain = [reader.plain_text(text) for text in texts]
    assert any(special in ids for ids in reader._token_ids(texts))
    assert not any(special in ids for ids in reader._token_ids(plain))
    reader._token_ids = None
    assert reader.plain_text("<|a|>") == f"<{ZERO_WIDTH_SPACE}|a|>"


def test_tokens_are_looked_at_where_the_vocabulary_holds_special_ones():
    """A special token that other text can be made of is no matter of spelling alone."""
    reader = Reader(is_normalized=False, vocabulary=["a", "<|a|>"])
    assert not reader._reads_spellings_only
