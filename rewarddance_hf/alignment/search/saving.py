"""A search on disk."""

import json
import os

from PIL import Image

from ...resumable import write_atomically
from .drawing import draw_tree
from .result import SearchResult


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
    write_atomically(os.path.join(folder, "search.json"), f"{json.dumps(result.to_dict(), indent=2)}\n".encode())
    draw_tree(result).save(os.path.join(folder, "tree.png"))
    paths = []
    for place, frames in enumerate(clips):
        path = os.path.join(folder, f"image_{place}.{'webp' if len(frames) > 1 else 'png'}")
        if len(frames) > 1:
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0, lossless=True)
        else:
            frames[0].save(path)
        paths.append(path)
    return paths
