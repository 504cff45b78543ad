"""Rows of the shapes world by name, as commands and recipes call them."""

from .clips import ShapesClipPreferences
from .edits import ShapesEdits
from .preferences import ShapesPreferences
from .rows import ShapesRows


EDITS = "edit-"
# Rows of clips by the beginning of a split's name, e.g. "t2v-id".
CLIP_TASKS = {"video-": None, "t2v-": "text-to-video", "i2v-": "image-to-video"}


def load_shapes(name: str, num_rows: int, seed: int = 0) -> ShapesRows:
    """
    Rows of the shapes world by name: `"train"`, `"id"` or `"ood"` for images; with `"edit-"` before it for edits; with
    `"video-"` for clips of both tasks, with `"t2v-"` or `"i2v-"` for those of one, and `"-shuffled"` after it for frames
    without their order, e.g. `"t2v-id-shuffled"`.
    """
    if name.startswith(EDITS):
        return ShapesEdits(num_rows, name.removeprefix(EDITS), seed)
    for beginning, task in CLIP_TASKS.items():
        if name.startswith(beginning):
            split = name.removeprefix(beginning)
            shuffled = split.endswith("-shuffled")
            return ShapesClipPreferences(num_rows, split.removesuffix("-shuffled"), task, seed, shuffled=shuffled)
    return ShapesPreferences(num_rows, name, seed)
