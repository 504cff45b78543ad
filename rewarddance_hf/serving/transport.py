"""HTTP to one judge at several addresses: time-outs, retries with back-off, and errors that say what failed."""

import json
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ..import_utils import require_extra
from .errors import JudgeChangedError, RemoteRewardError, error_of
from .protocol import JSON, JUDGE_HEADER, PROTOCOL, PROTOCOL_HEADER, SAFETENSORS, unpack


require_extra("serve", "httpx2")

import httpx2  # noqa: E402


logger = logging.get_logger(__name__)

# Statuses after which the same request may be answered, there or elsewhere
BUSY = (408, 429, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0  # seconds between tries
REST = 5.0  # seconds for which an address that did not answer is asked only if no other is left


class Transport:
    """
    Requests to replicas of a judge.

    Args:
        urls (`list[str]`):
            Addresses.
        token (`str`, *optional*):
            Token that the servers want.
        timeout (`float`):
            Seconds for one try.
        max_wait (`float`):
            Seconds for all tries of one request.
    """

    def __init__(self, urls: Sequence[str], token: str | None, timeout: float, max_wait: float) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.max_wait = max_wait
        self.judge: str | None = None  # digest of the fingerprint of the judge that is wanted
        self._resting_until = dict.fromkeys(self.urls, 0.0)
        self._next = 0
        self._lock = threading.Lock()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx2.Limits(max_keepalive_connections=None, max_connections=None, keepalive_expiry=30.0)
        self._client = httpx2.Client(timeout=timeout, headers=headers, limits=limits)

    def close(self) -> None:
        self._client.close()

    def get(self, path: str) -> dict[str, Any]:
        """JSON of a path."""
        return self._try("GET", path, None, [])[1].json()

    def post_json(self, path: str, body: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """JSON that answers JSON, of servers that are not ours."""
        return self._try("POST", path, json.dumps(body).encode(), rows, JSON)[1].json()

    def post(self, path: str, body: bytes, rows: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Header and tensors of the answer to a request about samples."""
        url, response = self._try("POST", path, body, rows)
        if response.headers.get(JUDGE_HEADER) != self.judge:
            raise JudgeChangedError(
                f"{url} was answered by the judge {response.headers.get(JUDGE_HEADER)}, but {self.judge} was expected.",
                rows,
            )
        return unpack(response.content)

    def _try(
        self, method: str, path: str, body: bytes | None, rows: list[int], content_type: str = SAFETENSORS
    ) -> tuple[str, httpx2.Response]:
        """Address and successful answer, by the first address that gives one."""
        urls = self.urls
        end, tries, pause = time.monotonic() + self.max_wait, 0, FIRST_PAUSE
        headers = {PROTOCOL_HEADER: str(PROTOCOL)}
        if body is not None:
            headers |= {"Content-Type": content_type} | ({JUDGE_HEADER: self.judge} if self.judge else {})
        while True:
            url = self._choose()
            tries += 1
            wanted_pause = 0.0
            try:
                response = self._client.request(method, url + path, content=body, headers=headers)
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            except httpx2.InvalidURL as error:
                raise ValueError(f"`url` is {url!r}, which is no address ({error}).") from error
            else:
                if response.status_code == 200:
                    self._resting_until[url] = 0.0
                    return url, response
                description = _description(response)
                if response.status_code not in BUSY:
                    raise error_of(description, response.status_code, url + path, rows)
                reason = f"status {response.status_code}, {description['message']}"
                wanted_pause = float(description.get("retry_after") or 0.0)
            with self._lock:
                self._resting_until[url] = time.monotonic() + REST
            if any(self._resting_until[other] < time.monotonic() for other in urls):
                continue  # at once, by another address
            seconds = min(max(pause, wanted_pause), LONGEST_PAUSE) * random.uniform(0.75, 1.25)
            if time.monotonic() + seconds > end:
                of_rows = f" Samples {_shortened(rows)} have no reward." if rows else ""
                raise RemoteRewardError(
                    f"No judge answered at {', '.join(urls)} within {self.max_wait:g} s, in {tries} tries; the last one ended in "
                    f"{reason}.{of_rows} Start the server, or raise `max_wait`.",
                    rows,
                )
            logger.warning(f"{url}{path} did not answer ({reason}). Trying again in {seconds:.1f} s.")
            time.sleep(seconds)
            pause *= 2

    def _choose(self) -> str:
        """The next address in turn; one that did not answer only if all did not, the one that rests longest first."""
        now = time.monotonic()
        with self._lock:
            self._next += 1
            turn = [self.urls[(self._next + i) % len(self.urls)] for i in range(len(self.urls))]
            return min(turn, key=lambda url: max(self._resting_until[url] - now, 0.0))


def _description(response: httpx2.Response) -> dict[str, Any]:
    """What a server says about an error; a proxy before it may say it otherwise."""
    try:
        return {"type": "HTTPError", "message": "", **response.json()["error"]}
    except (ValueError, KeyError, TypeError):
        return {"type": "HTTPError", "message": response.text[:200]}


def _shortened(rows: list[int]) -> str:
    return str(rows) if len(rows) <= 20 else f"{str(rows[:20])[:-1]}, ... ({len(rows)} in all)]"
