"""Chats that differ in one text from users: the chat template is rendered once for all of them, where that gives the same."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any


# Fewer different texts are rendered one by one, as finding out what they share takes two renderings.
MIN_ALIKE = 6
# Longer texts are rendered, in case a template looks at lengths.
MAX_LENGTH = 2000


def render_alike(render: "Callable[[str], str]", texts: "list[str]", chat_template: Any) -> "list[str]":
    """
    Chats `render(text)` for each of several texts. What stands around the text, which a chat may hold more than once, is taken
    from renderings of two other texts where these agree, so that the template puts the text somewhere and leaves it as it is; a
    text that holds any piece of the template's own strings, which it may look for, is rendered all the same.
    """
    distinct = dict.fromkeys(texts)
    common = None
    if isinstance(chat_template, str) and len(distinct) >= MIN_ALIKE:
        common = _common_parts(render)
    if common is None:
        chats = {text: render(text) for text in distinct}
    else:
        is_plain = _looks_for_nothing_in(chat_template)
        chats = {text: text.join(common) if is_plain(text) else render(text) for text in distinct}
    return [chats[text] for text in texts]


def _common_parts(render: "Callable[[str], str]") -> "tuple[str, ...] | None":
    """What stands around a text whatever it is, or None if it depends on the text or the text is changed."""
    every_character = "".join(map(chr, range(32, 127))) + "äß赤🟥 "
    found = set()
    for probe in ('"?"', '"' + every_character * (MAX_LENGTH // len(every_character)) + '"'):
        parts = tuple(render(probe).split(probe))
        found.add(parts if len(parts) > 1 else None)
    return found.pop() if len(found) == 1 else None


@lru_cache(maxsize=8)
def _looks_for_nothing_in(chat_template: str) -> "Callable[[str], bool]":
    """Function that tells whether a text holds no string of a template that is longer than a character, and no piece of one."""
    # Cut at quotes and backslashes, strings of the template are among the parts, whatever else is. A string with another
    # kind of escape than of quotes could be missed: such templates are rendered for each text.
    if re.search(r"\\[^'\"\\nrt]", chat_template):
        return lambda text: False
    parts = {part.lower() for part in re.split(r"['\"]|\\.", chat_template) if len(part) > 1 or not part.isascii()}

    def is_plain(text: str) -> bool:
        lower = text.lower()
        return len(text) <= MAX_LENGTH and not any(part in lower for part in parts)

    return is_plain


__all__ = ["MIN_ALIKE", "render_alike"]
