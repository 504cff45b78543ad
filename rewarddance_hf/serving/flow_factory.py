"""
The form in which Flow-Factory asks its remote reward models (`/compute`), for training of generators that needs no gradient:
`{"prompt": [...], "image": [base64, ...]}` or `"video": [[base64, ...], ...]`, answered by `{"rewards": [...]}`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from .answers import write_json
from .batching import Answer


# Its client and the template of its server name the same things differently.
PLURALS = {"prompts": "prompt", "images": "image", "videos": "video", "extra": "kwargs"}
# Columns of the rows that it hands on, by our names
COLUMNS = ("references", "task", "criteria", "dimensions")


def read_request(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same as a request of `/score`."""
    found = {PLURALS.get(name, name): value for name, value in given.items() if value is not None}
    images, videos = found.get("image"), found.get("video")
    if (images is None) == (videos is None):
        raise ValueError("`/compute` was given both or none of `image` and `video`, but needs one of them.")
    if found.get("condition_videos") is not None:
        raise ValueError("`condition_videos` was given, but a judge compares with single frames only. Leave it out.")
    header: dict[str, Any] = {"prompts": found.get("prompt"), "images": images if videos is None else videos}
    conditions = found.get("condition_images")
    if conditions is not None:
        header["conditions"] = [_first(several, i) for i, several in enumerate(conditions)]
    extra = found.get("kwargs") or {}
    return {**header, **{name: extra[name] for name in COLUMNS if name in extra}}


def write_rewards(answer: Answer | torch.Tensor) -> bytes:
    """Rewards; of several dimensions their mean."""
    scores = (answer if isinstance(answer, torch.Tensor) else answer.scores).double()
    return write_json({"rewards": (scores if scores.ndim == 1 else scores.mean(dim=1)).tolist()})


def _first(several: Any, row: int) -> Any:
    if isinstance(several, list):
        if len(several) > 1:
            raise ValueError(f"`condition_images[{row}]` has {len(several)} images, but a judge sees one.")
        return several[0] if several else None
    return several
