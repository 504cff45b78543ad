"""Criteria of each task, and named dimensions of them, from plain text files (task-aware instructions, Section 3.2.1)."""

import os
from pathlib import Path


OVERALL = "overall"
FOLDER = Path(__file__).parent / "criteria"


def read_criteria(folder: "str | os.PathLike" = FOLDER) -> "tuple[dict[str, str], dict[str, dict[str, str]]]":
    """
    Read the criteria of tasks from text files, one for each task. Those of this package are the example of their form.

    Args:
        folder (`str` or `os.PathLike`, *optional*):
            Folder with files `TASK.txt`. Defaults to that of this package.

    Returns:
        `tuple`: Criteria by task, and criteria by task and dimension: arguments `criteria` and `dimensions` of
        [`RewardDanceProcessor`].

    Raises:
        `ValueError`: If there are no such files, a paragraph has no name or no text, or a name is there twice.

    Example:

    ```python
    criteria, dimensions = read_criteria("my_criteria")
    processor = RewardDanceProcessor.from_pretrained("org/my-vlm", criteria=criteria, dimensions=dimensions)
    ```
    """
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise ValueError(f"`folder` {os.fspath(folder)!r} has no file `TASK.txt`, e.g. `text-to-image.txt`. Add one.")
    criteria, dimensions = {}, {}
    for file in files:
        named = _read_paragraphs(file)
        if OVERALL in named:
            criteria[file.stem] = named.pop(OVERALL)
        dimensions[file.stem] = named
    return criteria, dimensions


def _read_paragraphs(file: Path) -> "dict[str, str]":
    lines = file.read_text(encoding="utf-8").splitlines()
    paragraphs = "\n".join(line.strip() for line in lines if not line.startswith("#")).split("\n\n")
    named: "dict[str, str]" = {}
    for paragraph in filter(None, map(str.strip, paragraphs)):
        name, _, text = (part.strip() for part in " ".join(paragraph.split()).partition(":"))
        if not text or len(name.split()) != 1 or name in named:
            raise ValueError(
                f"{os.fspath(file)!r} has the paragraph {paragraph[:40]!r}, but each must be a name of its own in one word, a "
                f"colon and a text, e.g. '{OVERALL}: how well it shows the prompt'. Repair it."
            )
        named[name] = text
    return named


# Next to code that came with a checkpoint there are no text files: its processor finds what it was saved with.
CRITERIA, DIMENSIONS = read_criteria() if FOLDER.is_dir() else ({}, {})
