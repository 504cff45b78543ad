"""Searches on disk: one, or those of many prompts, which survive a kill."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ...resumable import check_fingerprint, write_atomically
from .drawing import draw_tree
from .result import SearchResult


DOCUMENT = "search.json"


def save_search(result: SearchResult, folder: str | os.PathLike) -> list[str]:
    """
    Write the images of a search, `search.json` with seeds and rewards, and `tree.png` with the tree of paths.

    Args:
        result ([`SearchResult`]):
            Result of a search for one prompt.
        folder (`str` or `os.PathLike`):
            Folder, created if it is missing. Clips become animated WebP files.

    Returns:
        `list[str]`: Files of the images, best first.

    Raises:
        `ValueError`: If the images are not PIL images.
    """
    clips = [image if isinstance(image, list) else [image] for image in result.images]
    if not all(isinstance(frame, Image.Image) for clip in clips for frame in clip):
        raise ValueError(
            "`images` are not PIL images, but `save_search` requires those. Leave `output_type` of the search at 'pil'."
        )
    os.makedirs(folder, exist_ok=True)
    draw_tree(result).save(os.path.join(folder, "tree.png"))
    paths = []
    for place, frames in enumerate(clips):
        path = os.path.join(folder, f"image_{place}.{'webp' if len(frames) > 1 else 'png'}")
        if len(frames) > 1:
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0, lossless=True)
        else:
            frames[0].save(path)
        paths.append(path)
    # Comes last: where it is, all is
    write_atomically(os.path.join(folder, DOCUMENT), f"{json.dumps(result.to_dict(), indent=2)}\n".encode())
    return paths


class SearchFolder:
    """
    Results of a search for many prompts, each in a folder of its own, so that a search that was stopped goes on.

    Args:
        folder (`str` or `os.PathLike`):
            Folder, created if it is missing.
        prompts (`list[str]`):
            All prompts.
        fingerprint (`dict`):
            All that results depend on beside the prompts, as in [`~rewarddance_hf.resumable.check_fingerprint`].

    Raises:
        `ValueError`: If the folder belongs to another search.
    """

    def __init__(self, folder: str | os.PathLike, prompts: Sequence[str], fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.prompts = Path(folder), prompts
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = f"`output_dir` {os.fspath(folder)!r}"
        check_fingerprint(self.folder / "arguments.json", fingerprint, self.name)

    def read(self, index: int) -> SearchResult | None:
        """Finished result of a prompt, with the files of its images; None if there is none."""
        folder = self.folder / f"prompt_{index}"
        if not (folder / DOCUMENT).exists():
            return None
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        if document["prompt"] != self.prompts[index]:
            raise ValueError(
                f"{self.name} has a search for {document['prompt']!r} in the place of prompt {index}, "
                f"{self.prompts[index]!r}. Repeat the call with the same prompts (new ones at the end), or choose another "
                "folder."
            )
        images = [str(next(folder.glob(f"image_{place}.*"))) for place in range(len(document["rewards"]))]
        return SearchResult.from_dict(document, images)

    def write(self, index: int, result: SearchResult) -> SearchResult:
        """Keep the result of a prompt, unless all of its paths were lost; returns it with the files of its images."""
        if not result.images:
            return result
        return replace(result, images=save_search(result, self.folder / f"prompt_{index}"))
