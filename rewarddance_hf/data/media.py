"""Images and videos of own data: those of a folder, and whether one can be read. Needs no optional library."""

import hashlib
import os
from pathlib import Path
from typing import Any

from ..models.clips_rewarddance import ClipReader
from ..models.media_rewarddance import load_image, open_media, read_clip


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi")


def media_of_folder(folder: str | os.PathLike) -> list[str]:
    """Paths of the images and videos of a folder, in the order of their names. Raises a `ValueError` if there are none."""
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
    media = [str(path) for path in paths if path.suffix.lower() in IMAGES + VIDEOS]
    if not media:
        raise ValueError(
            f"The folder {os.fspath(folder)!r} has no images ({', '.join(IMAGES + VIDEOS)}). Check the path."
        )
    return media


def read_media(media: Any, name: str) -> str:
    """
    Read an image, or the first and the last frame of a clip, as a judge does. Gives a digest of what is seen. Errors are those
    of [`~rewarddance_hf.models.media_rewarddance.load_image`], and name the file.
    """
    if isinstance(media, str) and not os.path.isfile(media):
        raise ValueError(f"`{name}`: there is no file {media!r}")
    try:
        found = open_media(media, name, lambda image: load_image(image, name))
        images = read_clip(found.sample(max_frames=2)) if isinstance(found, ClipReader) else [found]
    except (ValueError, TypeError, ImportError, OSError) as error:
        if not isinstance(media, str) or media in str(error):
            raise
        raise ValueError(f"{media}: {error}") from error
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()
