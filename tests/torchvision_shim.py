"""
Make torchvision of PyPI importable beside the CPU build of torch.

Its compiled operators do not load there, and the import fails as it describes two of them to `torch.compile`. What image
processors use is written in Python and works once these two are declared.
"""

import torch


LIBRARY = torch.library.Library("torchvision", "DEF")  # must stay alive
for _name in ("nms", "qnms"):
    try:
        LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # declared already: the compiled operators do load
        pass
