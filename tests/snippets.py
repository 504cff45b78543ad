"""Blocks of Markdown documents, which tests run."""

import re
import shlex
from itertools import dropwhile


def code_blocks(text: str, language: str = "python") -> list[str]:
    """Text of all blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def printed_blocks(text: str) -> list[tuple[str, str]]:
    """Python blocks that a block of plain text follows at once, and that text: what they print."""
    return re.findall(r"```python\n((?:(?!```).)*)```\n\n```text\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Words of all shell commands, without comments; lines that end with a backslash go on."""
    lines = "\n".join(code_blocks(text, "bash")).replace("\\\n", " ").splitlines()
    found = [[*dropwhile(is_variable, shlex.split(line, comments=True))] for line in lines]
    return [words for words in found if words]


def is_variable(word: str) -> bool:
    """Whether a word sets a variable of the environment for the command that follows."""
    return re.match(r"[A-Z_]+=", word) is not None


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as the Hub and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    """Targets of all links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
