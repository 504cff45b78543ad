"""How much a server accepts: in one request, and in all together."""

import threading
from dataclasses import asdict, dataclass

from .errors import Refusal


@dataclass(frozen=True)
class ServerLimits:
    """
    Bounds of a server. A request beyond one is refused with an error that names it.

    Args:
        max_body_bytes (`int`, *optional*, defaults to 256 MiB):
            Size of the body of a request.
        max_questions (`int`, *optional*, defaults to `256`):
            Questions of a request: samples times dimensions.
        max_ranked (`int`, *optional*, defaults to `64`):
            Samples of a ranking, whose questions grow with their square.
        max_pixels (`int`, *optional*, defaults to 2 ** 26):
            Pixels of an image, read from its header before it is decoded.
        max_frames (`int`, *optional*, defaults to `512`):
            Frames of a clip.
        max_characters (`int`, *optional*, defaults to `20000`):
            Length of a prompt, and of criteria.
        max_waiting (`int`, *optional*, defaults to `1024`):
            Questions that wait for the judge.
        max_memory_bytes (`int`, *optional*, defaults to 2 GiB):
            Bodies and decoded images of all requests that are read, wait or are answered.
        header_timeout (`float`, *optional*, defaults to `20.0`):
            Seconds in which the headers of a request must have arrived.
        body_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds in which a body must have arrived.
    """

    max_body_bytes: int = 256 << 20
    max_questions: int = 256
    max_ranked: int = 64
    max_pixels: int = 1 << 26
    max_frames: int = 512
    max_characters: int = 20_000
    max_waiting: int = 1024
    max_memory_bytes: int = 2 << 30
    header_timeout: float = 20.0
    body_timeout: float = 60.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"`{name}` is {value!r}, but must be positive.")
        if self.max_memory_bytes < 4 * self.max_body_bytes:
            raise ValueError(
                f"`max_memory_bytes` is {self.max_memory_bytes}, but must be at least four times `max_body_bytes`, "
                f"{self.max_body_bytes}: a body is held as it came, as tensors, and decoded."
            )

    def check_size(self, width: int, height: int, name: str) -> int:
        """Refuse an image that is too large. Returns the bytes that it takes when it is decoded."""
        if width * height > self.max_pixels:
            raise ValueError(
                f"`{name}` has {width} x {height} pixels, but this server takes {self.max_pixels} at most. Send a smaller one."
            )
        return 3 * width * height

    def check_frames(self, count: int, name: str) -> None:
        """Refuse a clip that is too long."""
        if count > self.max_frames:
            raise ValueError(
                f"`{name}` has {count} frames, but this server takes {self.max_frames} at most. Send fewer of them."
            )

    def check_text(self, text: str, name: str) -> None:
        """Refuse a text that is too long."""
        if len(text) > self.max_characters:
            raise ValueError(
                f"`{name}` has {len(text)} characters, but this server takes {self.max_characters} at most. Shorten it."
            )


class Memory:
    """Bytes that all requests together hold."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._lock = threading.Lock()

    def take(self, count: int, retry_after: float) -> None:
        with self._lock:
            if self.used + count > self.limit:
                raise Refusal(
                    429,
                    "BusyError",
                    f"The server holds {self.used} of {self.limit} bytes. Try again later.",
                    retry_after,
                )
            self.used += count

    def give_back(self, count: int) -> None:
        with self._lock:
            self.used -= count
