"""Text from users stays text: no spelling of a special token gets through to the tokenizer."""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any


# Splits the spelling of a special token without showing.
ZERO_WIDTH_SPACE = "\u200b"


class ControlTokens:
    """
    Spellings that text from users must not contain.

    Args:
        spellings (`Iterable[str]`):
            Spellings of special tokens and placeholders of images, of two characters or more.
    """

    def __init__(self, spellings: "set[str]") -> None:
        # What has such a space among its first two characters cannot be split by one.
        self.spellings = {spelling for spelling in spellings if ZERO_WIDTH_SPACE not in spelling[:2]}
        self.lengths: "dict[str, set[int]]" = {}
        for spelling in self.spellings:
            self.lengths.setdefault(spelling[0], set()).add(len(spelling))
        self.first = re.compile("|".join(map(re.escape, self.lengths)) or "(?!)")

    def split(self, text: str) -> str:
        """
        Text with a zero-width space after the first character of each spelling, in a time that grows
        with its length alone.
        """
        while True:
            starts = (match.start() for match in self.first.finditer(text))
            cuts = [
                start + 1
                for start in starts
                if any(text[start : start + length] in self.spellings for length in self.lengths[text[start]])
            ]
            if not cuts:
                return text
            # A second look, as the space may be part of a spelling itself.
            text = ZERO_WIDTH_SPACE.join(
                text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
            )


class PlainTextMixin:
    """What [`RewardDanceProcessor`] does with text from users, by its tokenizer."""

    tokenizer: Any
    vlm_processor: Any

    def plain_text(self, text: str, name: str = "text") -> str:
        """
        Make sure that text from users stays text: spellings of special tokens and image placeholders are split by a
        zero-width space.

        Args:
            text (`str`):
                Text from users.
            name (`str`, *optional*, defaults to `"text"`):
                Name of the text in error messages.

        Returns:
            `str`: Text in which the tokenizer finds no special token.

        Raises:
            `ValueError`: If a special token remains, which happens with tokenizers that normalize text first, or the text
                is no valid Unicode.
        """
        return self._plain_texts([(text, name)])[text]

    def _plain_texts(self, named: "Iterable[tuple[str, str]]") -> "dict[str, str]":
        """Texts with their names, each as [`plain_text`] gives it. What has to be tokenized is so in one call, equal texts once."""
        names: "dict[str, str]" = {}
        for text, name in named:
            if text not in names:
                names[text] = name
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"`{name}` is no valid text ({error}). Repair or drop it; it may be cut in an emoji."
                    ) from error
        controls, token_ids = self._control_tokens
        plain = {text: controls.split(text) for text in names}
        if self._reads_spellings_only:
            return plain
        for text, ids in zip(plain, self._token_ids(list(plain.values())), strict=True):
            found = token_ids.intersection(ids)
            if found:
                raise ValueError(
                    f"`{names[text]}` contains the special tokens {self.tokenizer.convert_ids_to_tokens(sorted(found))}, which "
                    "cannot be written as plain text. Remove them."
                )
        return plain

    def _token_ids(self, texts: "list[str]") -> "list[list[int]]":
        """Tokens of each text. A call of a tokenizer costs many times what a short text costs."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    @cached_property
    def _control_tokens(self) -> "tuple[ControlTokens, set[int]]":
        """Spellings and IDs of tokens that text from users must not contain."""
        spellings = {token for token in self.tokenizer.get_added_vocab() if len(token) > 1 and token.strip(" \n\t▁")}
        spellings |= {token for token in self.tokenizer.all_special_tokens if len(token) > 1}
        names = ("image_token", "video_token", "boi_token", "audio_token")
        spellings |= {str(token) for name in names if (token := getattr(self.vlm_processor, name, None))}
        token_ids = set(self.tokenizer.convert_tokens_to_ids(sorted(spellings)))
        # A character that the tokenizer does not know controls nothing, unless its token also ends texts.
        if self.tokenizer.unk_token not in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            token_ids.discard(self.tokenizer.unk_token_id)
        return ControlTokens(spellings), token_ids

    @cached_property
    def _reads_spellings_only(self) -> bool:
        """
        Whether the tokenizer finds control tokens where they are spelled out and nowhere else, so that texts in which spellings are
        split hold none: each is looked for in the text as it is, before that is normalized, and is no token of the vocabulary
        that other text is made of.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return False
        controls, token_ids = self._control_tokens
        added = backend.get_added_tokens_decoder()
        vocabulary = set(backend.get_vocab(with_added_tokens=False).values())
        return all(
            index in added
            and index not in vocabulary
            and not added[index].normalized
            and added[index].content in controls.spellings
            for index in token_ids
        )


__all__ = ["ZERO_WIDTH_SPACE", "ControlTokens", "PlainTextMixin"]
