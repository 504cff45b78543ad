"""The web application around a judge: who may ask, what is taken in, and how each request ends."""

import asyncio
import hmac
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..resumable import digest_of
from ..scoring.scorer import RewardDanceScorer
from . import flow_factory
from .answers import write_answer, write_json
from .batching import Answer, Batcher, Job
from .errors import Refusal, describe_error
from .limits import Memory, ServerLimits
from .observing import Metrics, log, log_failure
from .protocol import (
    JSON,
    JUDGE_HEADER,
    PROTOCOL,
    PROTOCOL_HEADER,
    SAFETENSORS,
    check_version,
    unpack,
    unpack_json,
)
from .requests import Asked, RequestReader


CLIENT_IS_GONE = 499  # a status that nobody receives, for logs and metrics
BODY_COPIES = 3  # that exist while a body is read: as it came, as a whole, and as tensors
AT_ONCE = 1 << 16  # bytes of a body, and of what it is decoded to, that no other thread is asked to read
DISCARD_SECONDS = 5.0  # in which the body of a refused request may arrive, so that its client reads why


class JudgeApp:
    """
    A judge behind HTTP.

    Args:
        scorer ([`RewardDanceScorer`]):
            Judge. It belongs to the server from now on.
        name (`str`):
            Name of the judge, for clients.
        token (`str`, *optional*):
            Token that requests must carry. Without one, every request is answered.
        limits ([`ServerLimits`], *optional*):
            Bounds.
        merge_requests (`bool`, *optional*, defaults to `True`):
            Whether requests that wait are answered together.
        log_prompts (`bool`, *optional*, defaults to `False`):
            Whether logs may hold prompts.
        num_workers (`int`, *optional*, defaults to `4`):
            Threads that read and decode requests.
    """

    def __init__(
        self,
        scorer: RewardDanceScorer,
        name: str,
        token: str | None = None,
        limits: ServerLimits | None = None,
        merge_requests: bool = True,
        log_prompts: bool = False,
        num_workers: int = 4,
    ) -> None:
        self.scorer = scorer
        self.name = name
        self.token = token
        self.limits = limits or ServerLimits()
        self.log_prompts = log_prompts
        self.metrics = Metrics()
        self.memory = Memory(self.limits.max_memory_bytes)
        self.metrics.memory.set_function(lambda: self.memory.used)
        self.fingerprint = scorer.fingerprint()
        self.digest = digest_of(self.fingerprint)
        self.reader = RequestReader(scorer, self.limits)
        self.batcher = Batcher(
            scorer,
            max_waiting=self.limits.max_waiting,
            merge=merge_requests,
            on_batch=self.metrics.on_batch,
            on_answers=self._wake,
        )
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="rewarddance-reader")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answered: deque[asyncio.Future] = deque()  # who waits for answers that are there

    def describe(self) -> dict[str, Any]:
        """Description of the judge for clients."""
        config, processor = self.scorer.model.config, self.scorer.processor
        return {
            "model": self.name,
            "revision": getattr(config, "_commit_hash", None),
            "version": __version__,
            "fingerprint": self.fingerprint,
            "judge": self.digest,
            "paradigm": config.paradigm,
            "score_normalization": config.score_normalization,
            "score_temperature": config.score_temperature,
            "criteria": processor.criteria,
            "dimensions": processor.dimensions,
            "limits": asdict(self.limits),
        }

    def make(self) -> Starlette:
        """The application."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> Any:
            self._loop = asyncio.get_running_loop()
            yield
            await asyncio.get_running_loop().run_in_executor(None, self.batcher.close)
            self._threads.shutdown()
            log("end")

        async def health(request: Request) -> Response:
            return Response(write_json({"status": "ok"}), media_type=JSON)

        async def model(request: Request) -> Response:
            return Response(write_json(self.describe()), media_type=JSON)

        async def unknown(request: Request, error: Any) -> Response:
            description = {"type": "HTTPError", "message": f"{request.method} {request.url.path}: {error.detail}."}
            return Response(write_json({"error": description}), error.status_code, error.headers, JSON)

        async def metrics(request: Request) -> Response:
            return Response(self.metrics.write(), media_type="text/plain; version=0.0.4")

        routes = [
            Route("/health", health),
            Route("/v1/model", self._guarded("model", model)),
            Route("/metrics", self._guarded("metrics", metrics)),
            Route("/compute", self._guarded("compute", self._compute), methods=["POST"]),
        ]
        for path in ("score", "gradient", "compare", "rank"):
            routes.append(Route(f"/{path}", self._guarded(path, self._answering(path)), methods=["POST"]))
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: unknown})

    def _wake(self) -> None:
        """Called by any thread: the event loop is woken once for all answers of a batch."""
        if self._answered and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._answered:
            waiting = self._answered.popleft()
            if not waiting.done():
                waiting.set_result(None)

    def _guarded(self, path: str, handle: Callable[[Request], Awaitable[Response]]) -> Callable:
        """A handler that checks the token first, and turns errors into answers."""

        async def guarded(request: Request) -> Response:
            start = time.monotonic()
            facts = request.state.facts = {
                "path": f"/{path}",
                "client": request.client.host if request.client else None,
            }
            try:
                self._check_token(request)
                response = await handle(request)
            except ClientDisconnect:
                response = Response(status_code=CLIENT_IS_GONE)
            except Exception as error:
                response = self._refuse(error, facts)
                if isinstance(error, Refusal) and error.status != 408:
                    await self._discard_body(request)
            seconds = time.monotonic() - start
            self.metrics.requests.labels(path, response.status_code).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            if request.method == "POST" or response.status_code != 200:
                log("request", status=response.status_code, seconds=round(seconds, 4), **facts)
            response.headers[PROTOCOL_HEADER] = str(PROTOCOL)
            response.headers[JUDGE_HEADER] = self.digest
            return response

        return guarded

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise Refusal(401, "TokenError", "The token is missing or wrong. Send `Authorization: Bearer TOKEN`.")

    def _refuse(self, error: Exception, facts: dict[str, Any]) -> Response:
        status, description = describe_error(error)
        facts["error"] = description["type"]
        if status == 500:
            log_failure(error, path=facts["path"])
        headers = {}
        if isinstance(error, Refusal) and error.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(error.retry_after))
            description["retry_after"] = error.retry_after
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(write_json({"error": description}), status, headers, JSON)

    async def _discard_body(self, request: Request) -> None:
        """Let the body of a refused request arrive, but drop it: a client that is cut off while sending reads no answer."""

        async def discard() -> None:
            count = 0
            async for chunk in request.stream():
                count += len(chunk)
                if count > self.limits.max_body_bytes:
                    return

        try:
            await asyncio.wait_for(discard(), DISCARD_SECONDS)
        except (asyncio.TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: it has been read already
            pass

    def _answering(self, path: str) -> Callable[[Request], Awaitable[Response]]:
        async def answering(request: Request) -> Response:
            wanted = request.headers.get(JUDGE_HEADER)
            if wanted not in (None, self.digest):
                raise Refusal(
                    409,
                    "JudgeChangedError",
                    f"The judge here is {self.name!r} with the fingerprint {self.digest}, but {wanted} was expected. It was "
                    "exchanged: start anew with this judge, or ask where the former one is.",
                )
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type not in (JSON, SAFETENSORS) or (path == "gradient" and content_type == JSON):
                raise Refusal(
                    415,
                    "ProtocolError",
                    f"The body of `/{path}` is {content_type!r}, but must be {SAFETENSORS}"
                    f"{'' if path == 'gradient' else f' or {JSON}'}.",
                )

            def read(body: bytes) -> Asked:
                header, tensors = unpack(body) if content_type == SAFETENSORS else (unpack_json(body), {})
                check_version(header)
                return self.reader.read(path, header, tensors)

            def write(answer: Any) -> bytes:
                return write_answer(answer, content_type)

            return Response(await self._answer(request, read, write), media_type=content_type)

        return answering

    async def _compute(self, request: Request) -> Response:
        """What Flow-Factory's reward servers answer."""

        def read(body: bytes) -> Asked:
            return self.reader.read("compute", flow_factory.read_request(unpack_json(body)), {})

        return Response(await self._answer(request, read, flow_factory.write_rewards), media_type=JSON)

    async def _answer(self, request: Request, read: Callable[[bytes], Asked], write: Callable[[Any], bytes]) -> bytes:
        """Read a request, let it wait for the judge, and write the answer, while its memory is counted."""
        loop, facts, taken = asyncio.get_running_loop(), request.state.facts, 0
        length = self._length(request)

        def take(count: int) -> None:
            nonlocal taken
            self.memory.take(count, self.batcher.retry_after)
            taken += count

        is_small = length <= AT_ONCE and not self.reader.is_counting
        done: Future = Future()
        jobs: list[Job] = []

        def submit(asked: Asked) -> None:
            """Decode what is shown, and hand over to the judge."""
            job = asked.make_job()
            job.future = done
            jobs.append(job)
            self.batcher.submit(job)

        def begin(body: bytes) -> None:
            asked = read(body)
            facts.update({"samples": asked.num_samples, "bytes": length})
            if self.log_prompts:
                facts["prompts"] = asked.prompts
            take(asked.num_bytes)
            if is_small and asked.num_bytes > AT_ONCE:
                in_thread(submit, asked)
            else:
                submit(asked)

        def attempt(step: Callable[[Any], None], given: Any) -> None:
            try:
                step(given)
            except Exception as error:
                done.set_exception(error)
                self._wake()

        def in_thread(step: Callable[[Any], None], given: Any) -> None:
            self._threads.submit(attempt, step, given)

        try:
            take(BODY_COPIES * length)
            # Threads that take turns cost more than reading a small body. No name here holds it while it waits.
            (attempt if is_small else in_thread)(begin, await self._read_body(request, length))
            answer = await self._wait(done, jobs, request)
            (job,) = jobs
            self.metrics.wait_seconds.observe(job.waited)
            self.metrics.samples.inc(facts["samples"])
            facts["waited"] = round(job.waited, 4)
            if isinstance(answer, Answer) and answer.gradients:  # as large as images
                return await loop.run_in_executor(self._threads, write, answer)
            return write(answer)
        finally:
            self.memory.give_back(taken)

    def _length(self, request: Request) -> int:
        """Size of the body in bytes, as its client declares it."""
        text, limit = request.headers.get("content-length", ""), self.limits.max_body_bytes
        if not text.isdecimal():
            raise Refusal(411, "LengthError", "The length of the body is not given. Send `Content-Length`.")
        if len(text) > 20 or int(text) > limit:
            raise Refusal(
                413,
                "TooLargeError",
                f"The body has {text[:20]} bytes, but this server takes {limit} at most. Send less.",
            )
        return int(text)

    async def _read_body(self, request: Request, length: int) -> bytes:
        body, received = bytearray(length), 0  # made once: one that grows leaves holes in memory

        async def collect() -> None:
            nonlocal received
            async for chunk in request.stream():
                body[received : received + len(chunk)] = chunk
                received += len(chunk)

        try:
            await asyncio.wait_for(collect(), self.limits.body_timeout)
        except asyncio.TimeoutError as error:
            raise Refusal(
                408,
                "SlowClientError",
                f"{received} of {length} bytes arrived in {self.limits.body_timeout:g} s. Send less at a time.",
            ) from error
        return bytes(body)

    async def _wait(self, done: Future, jobs: list[Job], request: Request) -> Any:
        """The answer to a job. It is withdrawn if its client is gone before the judge begins."""
        answer = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda _: self._answered.append(answer))
        self._wake()  # if it is done already
        gone = asyncio.ensure_future(request.receive())  # after the body nothing comes but the end of the connection
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return done.result()
            if not (jobs and self.batcher.withdraw(jobs[0])):
                await asyncio.wait({answer})  # its images are held until then
            raise ClientDisconnect
        finally:
            gone.cancel()
            answer.cancel()
