"""Running a judge's web application: until it is stopped, or beside other work in this process."""

import asyncio
import gc
import ipaddress
import threading
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..scoring.scorer import RewardDanceScorer
from .app import JudgeApp
from .observing import log


SHUTDOWN_SECONDS = 300  # after which requests that were accepted are given up
MAX_HEADER_BYTES = 64 << 10


class HeaderLimits(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """Ends connections whose headers take too long or are too large. uvicorn would wait for them for ever."""

    seconds: float
    _timer: asyncio.TimerHandle | None = None
    _num_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait(0)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # a request has begun
            self._forget()
        elif not self.transport.is_closing():
            self._wait(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _wait(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_HEADER_BYTES:
            self.transport.close()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self.transport.close)

    def _forget(self) -> None:
        self._num_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class JudgeServer:
    """
    Server of a judge.

    Args:
        scorer ([`RewardDanceScorer`]):
            Judge. It belongs to the server from now on.
        name (`str`, *optional*, defaults to `"judge"`):
            Name of the judge, for clients.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on. An address that other machines can reach needs a token.
        port (`int`, *optional*, defaults to `0`):
            Port. 0 takes a free one, which is in `url`.
        token, kwargs:
            As in [`~rewarddance_hf.serving.app.JudgeApp`].

    Raises:
        `ValueError`: If there is no token and `host` is not the loopback interface.

    Example:

    ```python
    with JudgeServer(scorer) as server:
        RemoteReward(server.url).score(images, prompts)
    ```
    """

    def __init__(
        self,
        scorer: RewardDanceScorer,
        name: str = "judge",
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not token and not _is_loopback(host):
            raise ValueError(
                f"`host` is {host!r}, which other machines may reach, but there is no token. Set the variable "
                "`REWARDDANCE_TOKEN`, or listen on 127.0.0.1."
            )
        self.judge = JudgeApp(scorer, name, token or None, **kwargs)
        self.host = host
        config = uvicorn.Config(
            self.judge.make(),
            host,
            port,
            http=type("HeaderLimits", (HeaderLimits,), {"seconds": self.judge.limits.header_timeout}),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._server = uvicorn.Server(config)
        self._socket = config.bind_socket()
        self._port = self._socket.getsockname()[1]
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """`str`: Address that clients use."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self._port}"

    def run(self) -> None:
        """Serve until the process is told to end (SIGTERM or SIGINT). What has been accepted is answered first."""
        judge = self.judge
        log("start", url=self.url, model=judge.name, judge=judge.digest, token=judge.token is not None)
        gc.collect()
        gc.freeze()  # all modules of the judge's libraries: each full collection would look at them again
        self._server.run(sockets=[self._socket])

    def start(self) -> "JudgeServer":
        """Serve in a thread."""
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError(f"The server at {self.url} did not start. Its log says why.")
            threading.Event().wait(0.01)
        return self

    def stop(self) -> None:
        """End the thread after all accepted requests are answered."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> "JudgeServer":
        return self.start()

    def __exit__(self, *error: Any) -> None:
        self.stop()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
