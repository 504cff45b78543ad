"""Text from users stays text: no spelling of a special token gets through to the tokenizer."""

import re


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


__all__ = ["ZERO_WIDTH_SPACE", "ControlTokens"]
