"""
Make torchvision of PyPI importable beside the CPU build of torch.

Its compiled operators do not load there, and the import fails as it describes two of them to `torch.compile`. What image
processors use is written in Python and works once these two are declared.
"""

import importlib.util
from pathlib import Path

import torch


def operators_load() -> bool:
    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        for library in folder.glob("_C.*"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


NEEDED = not operators_load()
if NEEDED:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # must stay alive
    for operator in ("nms", "qnms"):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
