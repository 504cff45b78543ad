"""What goes wrong between two machines, and what each side then says. No failure is ever a reward."""

import base64
import contextlib
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from serving.conftest import load_scorer
from tiny_vlms import random_image

from rewarddance_hf import JudgeChangedError, JudgeServer, NonFiniteScoreError, RemoteReward, RemoteRewardError
from rewarddance_hf.serving.limits import ServerLimits
from rewarddance_hf.serving.protocol import pack


IMAGE, REFERENCE = random_image(0), random_image(1)
ASKED = ([IMAGE], ["a circle"], [REFERENCE])


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def png(image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


BODY = {"images": [png(IMAGE)], "prompts": ["a circle"], "references": [png(REFERENCE)]}


def giant_png(side: int) -> bytes:
    """A PNG of a few bytes that says that it is very large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def small(vlm_folder):
    """A server with narrow bounds, whose judge can be held."""
    limits = ServerLimits(
        max_body_bytes=100_000,
        max_memory_bytes=500_000,
        max_questions=4,
        max_pixels=10_000,
        max_frames=3,
        max_characters=50,
        max_waiting=4,
        header_timeout=1.5,
        body_timeout=0.3,
    )
    with JudgeServer(load_scorer(vlm_folder("internvl")), limits=limits) as server:
        yield server


@pytest.fixture
def send(small):
    with httpx2.Client(base_url=small.url) as client:
        yield lambda path="/score", **arguments: client.post(path, **arguments)


def test_wrong_token(server):
    """Only health is told without the token; the answer to a large body arrives, too."""
    for token in (None, "secre", "secret2"):
        with pytest.raises(RemoteRewardError, match="status 401, TokenError"):
            RemoteReward(server.url, token=token, max_wait=1)
    for path in ("/v1/model", "/metrics"):
        assert httpx2.get(server.url + path).status_code == 401
    answer = httpx2.post(server.url + "/score", content=b"x" * 5_000_000)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert httpx2.get(server.url + "/health").json()["status"] == "ok"


def test_wrong_protocol(send, small, monkeypatch):
    """Another version is refused by each side, and so is what is no request."""
    answer = send(json={**BODY, "protocol": 2})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "ProtocolError")
    assert "speaks 1" in answer.json()["error"]["message"]
    monkeypatch.setattr("rewarddance_hf.serving.remote.PROTOCOL", 2)
    with pytest.raises(RemoteRewardError, match="speak version 1 of the protocol, but this client 2"):
        RemoteReward(small.url, max_wait=1)
    monkeypatch.undo()
    bodies = [
        b"",
        b"no safetensors",
        (1 << 40).to_bytes(8, "little") + b"{}",
        pack({}, {})[:-3],
        b"\x80\x04cos\nsystem\n",
    ]
    types = {"content-type": "application/x-safetensors"}
    assert [send(content=body, headers=types).status_code for body in bodies] == [400] * len(bodies)
    without_header = torch.zeros(1)
    import safetensors.torch

    assert send(content=safetensors.torch.save({"a": without_header}), headers=types).status_code == 400
    assert send(content=b"[1]", headers={"content-type": "application/json"}).status_code == 400
    assert send(content=b"[" * 90_000, headers={"content-type": "application/json"}).status_code == 400
    assert send(content=b"x", headers={"content-type": "application/python-pickle"}).status_code == 415
    assert send("/gradient", json=BODY).status_code == 415


def test_bounds(send):
    """Each bound has an error that names it; nothing large is decoded to find out."""
    long_clip = [BODY["images"][0]] * 4
    refused = {
        "has 30000 x 30000 pixels, but this server takes 10000|larger than the 10000 pixels": {
            "images": [base64.b64encode(giant_png(30_000)).decode()]
        },
        "has 200 x 200 pixels": {"images": [base64.b64encode(giant_png(200)).decode()]},
        r"`images\[0\]` has 4 frames, but this server takes 3": {"images": [long_clip]},
        "has 5 images, but this server takes 4": {"images": BODY["images"] * 5},
        "has 8 questions, but this server takes 4": {"dimensions": ["a"] * 8},
        "`prompts` has 60 characters, but this server takes 50": {"prompts": ["x" * 60]},
        "`criteria` has 60 characters": {"criteria": "x" * 60},
        r"`/score` was given \['image'\]": {"image": 1},
        "cannot be read as an image": {"images": [BODY["images"][0][:-400]]},
        "is no base64 text": {"images": ["/etc/passwd"]},
        "is of type `int`": {"references": [5]},
    }
    for match, changes in refused.items():
        answer = send(json={**BODY, **changes})
        assert answer.status_code == 422, match
        with pytest.raises(AssertionError, match=match):
            raise AssertionError(answer.json()["error"]["message"])
    answer = send(content=b"x" * 200_000, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "TooLargeError")
    answer = send(content=iter([b"{", b"}"]), headers={"content-type": "application/json"})
    assert answer.status_code == 411
    assert send(json=BODY).status_code == 200


def test_no_text_is_taken_for_a_path(send, tmp_path):
    """A server opens no file or address that a client names, in any form."""
    path = tmp_path / "secret.png"
    IMAGE.save(path)
    for image in (
        str(path),
        {"path": str(path)},
        {"file": str(path)},
        {"bytes": str(path)},
        [str(path)],
        f"file://{path}",
    ):
        assert send(json={**BODY, "images": [image]}).status_code == 422
        body = pack({**BODY, "images": [image]}, {"a": torch.zeros(1)})
        assert send(content=body, headers={"content-type": "application/x-safetensors"}).status_code == 422


def test_slow_client(send, small):
    """A body that does not arrive is not waited for, and others are served meanwhile."""
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        assert send(json=BODY).status_code == 200
        slow.settimeout(20)
        assert b" 408 " in slow.recv(4096).splitlines()[0]
    assert small.judge.memory.used == 0


def test_slow_headers(send, small):
    """A connection whose headers do not arrive, on its first request or a later one, or are too large, is ended."""
    host, port = small.url.removeprefix("http://").split(":")
    begun = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    with contextlib.ExitStack() as stack:
        silent, slow, second, large = (
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(4)
        )
        second.sendall(begun + b"\r\n")
        assert b" 200 " in second.recv(4096).splitlines()[0]
        for one in (slow, second, large):
            one.sendall(begun)
        large.sendall(b"a: " + b"b" * 100_000)
        time.sleep(0.5)
        start = time.monotonic()
        slow.sendall(b"a: b\r\n")  # no reason to wait for longer
        assert send(json=BODY).status_code == 200
        for one in (silent, slow, second, large):
            with contextlib.suppress(ConnectionError):
                while one.recv(4096):
                    pass
        assert time.monotonic() - start < 1.5 + 5
    assert send(json=BODY).status_code == 200


def test_unknown_paths(send):
    """They are answered in the form of all errors."""
    for answer, status in ((send("/nothing"), 404), (send("/health"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "HTTPError"


def test_busy_server(small, send):
    """Beyond what may wait a server says when to come again; clients do, and nothing is lost or computed twice."""
    scorer = small.judge.scorer
    reward = RemoteReward(small.url, max_wait=60)
    with ThreadPoolExecutor(12) as clients:
        with scorer.held():
            first = clients.submit(reward.score, *ASKED)
            scorer.entered.wait(20)
            waiting = [clients.submit(send, json={**BODY, "prompts": [f"circle {i}"]}) for i in range(11)]
            wait_for(lambda: sum(one.done() for one in waiting) >= 7)
            refused = [one.result() for one in waiting if one.done()]
            late = clients.submit(reward.score, [IMAGE], ["late"], [REFERENCE])
            time.sleep(0.3)
        answers = [one.result() for one in waiting]
        assert first.result().isfinite().all()
        assert late.result().isfinite().all()
    assert [one.status_code for one in refused] == [429] * 7
    assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
    assert [one.status_code for one in answers].count(200) == 4
    assert small.judge.memory.used == 0
    large = pack({"images": [{"image": "a"}] * 4, "prompts": "x"}, {"a": torch.zeros(90_000, dtype=torch.uint8)})
    types = {"content-type": "application/x-safetensors"}
    with ThreadPoolExecutor(4) as clients:
        with scorer.held():
            first = clients.submit(send, json=BODY)
            scorer.entered.wait(20)
            others = [clients.submit(send, content=large, headers=types) for _ in range(3)]
            time.sleep(0.3)
            assert small.judge.memory.used <= small.judge.limits.max_memory_bytes
    assert first.result().status_code == 200
    assert {one.result().status_code for one in others} <= {422, 429}


@pytest.mark.parametrize("bad", [None, 3])
def test_requests_are_answered_together(server, local, bad):
    """What waits is asked at once, each client gets its own scores, and who fails fails alone."""
    scorer, batcher = server.judge.scorer, server.judge.batcher
    batches = []
    batcher.on_batch, kept = lambda *batch: batches.append(batch), batcher.on_batch
    rewards = [RemoteReward(server.url, token="secret", max_wait=20) for _ in range(6)]
    prompts = [f"circle {i}" for i in range(6)]
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(reward):
        return torch.autograd.grad(reward.score(images, ["x"], [REFERENCE]).sum(), images)[0]

    with ThreadPoolExecutor(10) as clients:
        with scorer.held():
            first = clients.submit(rewards[0].score, *ASKED)
            assert scorer.entered.wait(20)
            asked = [
                clients.submit(reward.score, [IMAGE], [prompt], [REFERENCE], task="no-task" if i == bad else None)
                for i, (reward, prompt) in enumerate(zip(rewards, prompts, strict=True))
            ]
            wait_for(lambda: batcher.waiting >= 6)
            gradients = [clients.submit(gradient, reward) for reward in rewards[:2]]
            wait_for(lambda: batcher.waiting >= 8)
        for i, one in enumerate(asked):
            if i == bad:
                with pytest.raises(ValueError, match="`task` is 'no-task'"):
                    one.result()
            else:
                want = local.score([IMAGE], [prompts[i]], [REFERENCE])
                torch.testing.assert_close(one.result(), want, rtol=0, atol=1e-6)
        want = gradient(local)
        for one in gradients:
            torch.testing.assert_close(one.result(), want, rtol=0, atol=1e-6)
        assert first.result().isfinite().all()
    batcher.on_batch = kept
    assert [jobs for jobs, *_ in batches] == [1, 6, 2]


def test_judge_says_nan(vlm_folder):
    """The error of a local judge, with the rows and the scores that are known; others that waited get theirs."""
    scorer = load_scorer(vlm_folder("internvl"))
    (token,) = scorer.processor.tokenizer("☢", add_special_tokens=False)["input_ids"][-1:]
    with torch.no_grad():
        scorer.model.vlm.get_input_embeddings().weight[token] = torch.nan
    with JudgeServer(scorer) as server:
        reward = RemoteReward(server.url, max_wait=5)
        asked = ([IMAGE] * 4, ["a", "b", "☢", "c"], [REFERENCE] * 4)
        with pytest.raises(NonFiniteScoreError, match=r"rows \[2\] are NaN") as caught:
            reward.score(*asked)
        assert caught.value.rows == [2]
        assert caught.value.scores[:2].isfinite().all()
        images = torch.rand(4, 3, 20, 20).requires_grad_()
        with pytest.raises(NonFiniteScoreError, match=r"rows \[2\]"):
            reward.score(images, *asked[1:])
        with ThreadPoolExecutor(4) as clients, scorer.held():
            first = clients.submit(reward.score, *ASKED)
            scorer.entered.wait(20)
            bad, good = clients.submit(reward.score, *asked), clients.submit(reward.score, *ASKED)
            wait_for(lambda: server.judge.batcher.waiting >= 5)
            scorer.gate.set()
            assert first.result().isfinite().all()
            assert good.result().isfinite().all()
            with pytest.raises(NonFiniteScoreError):
                bad.result()


class Proxy:
    """Stands between client and server, and cuts the next connections off: before the answer, or in the middle of it."""

    def __init__(self, url: str):
        host, port = url.removeprefix("http://").split(":")
        self.target = (host, int(port))
        self.cuts: list[int] = []  # bytes of the answer that pass
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.forward, args=(client,), daemon=True).start()

    def forward(self, client):
        server = socket.create_connection(self.target)
        cut = self.cuts.pop() if self.cuts else None

        def requests():
            while data := client.recv(65536):
                server.sendall(data)

        threading.Thread(target=requests, daemon=True).start()
        while data := server.recv(65536):
            client.sendall(data if cut is None else data[:cut])
            if cut is not None:
                break
        client.shutdown(socket.SHUT_RDWR)
        client.close()


def test_dropped_connections(server, local):
    """A connection that ends before or in the answer is tried again; if that does not help, the samples are named."""
    proxy = Proxy(server.url)
    want = local.score(*ASKED)
    for cuts in ([0], [20], [400, 0]):
        reward = RemoteReward(proxy.url, token="secret", max_wait=20)
        reward.close()  # no connection is open
        reward = RemoteReward(proxy.url, token="secret", max_wait=20)
        reward._transport._client.close()
        reward._transport._client = httpx2.Client(headers={"Authorization": "Bearer secret"})
        proxy.cuts = list(cuts)
        assert torch.equal(reward.score(*ASKED), want)
        assert not proxy.cuts
    proxy.socket.close()
    reward = RemoteReward([server.url, proxy.url], token="secret", max_wait=1)
    assert torch.equal(reward.score(*ASKED), want)  # by the other address
    lost = RemoteReward(server.url, token="secret", max_wait=0.5)
    lost._transport.urls = [proxy.url]
    lost._transport._resting_until = {proxy.url: 0.0}
    with pytest.raises(
        RemoteRewardError, match=r"within 0.5 s, in \d+ tries.*Samples \[0, 1\] have no reward"
    ) as caught:
        lost.score([IMAGE] * 2, "a circle", [REFERENCE] * 2)
    assert caught.value.rows == [0, 1]


def test_replicas(vlm_folder, server, local):
    """Several addresses share a call; one that ends is no obstacle; another judge among them is one."""
    images, prompts, references = [IMAGE] * 5, [f"circle {i}" for i in range(5)], [REFERENCE] * 5
    want = local.score(images, prompts, references)
    with JudgeServer(load_scorer(vlm_folder("internvl")), token="secret") as replica:
        reward = RemoteReward([server.url, replica.url], token="secret", max_wait=20)
        torch.testing.assert_close(reward.score(images, prompts, references), want, rtol=0, atol=1e-6)
        assert replica.judge.metrics.samples._value.get() > 0
    torch.testing.assert_close(reward.score(images, prompts, references), want, rtol=0, atol=1e-6)
    with JudgeServer(load_scorer(vlm_folder("internvl"), seed=1), token="secret") as other:
        reward = RemoteReward([server.url, other.url], token="secret", max_wait=20)
        with pytest.raises(JudgeChangedError, match="was exchanged"):
            reward.score(images, prompts, references)


def test_judge_exchanged_behind_the_same_address(vlm_folder):
    """The fingerprint tells, in both directions, before anything is judged."""
    with JudgeServer(load_scorer(vlm_folder("internvl"))) as server:
        reward = RemoteReward(server.url, max_wait=20)
        port = int(server.url.rpartition(":")[2])
        reward.score(*ASKED)
    with JudgeServer(load_scorer(vlm_folder("internvl"), seed=1), "other", port=port) as server:
        with pytest.raises(JudgeChangedError, match="The judge here is 'other' with the fingerprint"):
            reward.score(*ASKED)
        assert server.judge.metrics.samples._value.get() == 0


def test_graceful_end(vlm_folder):
    """What has been accepted is answered before a server ends."""
    scorer = load_scorer(vlm_folder("internvl"))
    server = JudgeServer(scorer).start()
    reward = RemoteReward(server.url, max_wait=0.2)
    with ThreadPoolExecutor(4) as clients:
        with scorer.held():
            asked = [clients.submit(reward.score, *ASKED)]
            scorer.entered.wait(20)
            asked.append(clients.submit(reward.score, *ASKED))
            wait_for(lambda: server.judge.batcher.waiting >= 1)
            end = clients.submit(server.stop)
            wait_for(lambda: server._server.should_exit)
            time.sleep(0.3)
            with pytest.raises(RemoteRewardError):
                RemoteReward(server.url, max_wait=0.1)
        assert all(one.result().isfinite().all() for one in asked)
        end.result()


def test_clients_that_leave(server):
    """Questions of a client that is gone are not asked."""
    scorer, batcher = server.judge.scorer, server.judge.batcher
    before = server.judge.metrics.samples._value.get()
    headers = {"Authorization": "Bearer secret"}
    with ThreadPoolExecutor(2) as clients:
        with scorer.held():
            first = clients.submit(httpx2.post, server.url + "/score", json=BODY, headers=headers, timeout=30)
            scorer.entered.wait(20)
            held = server.judge.memory.used
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(server.url + "/score", json=BODY, headers=headers, timeout=0.5)
            wait_for(lambda: server.judge.memory.used <= held)
        assert first.result().status_code == 200
    assert batcher.waiting == 0
    assert server.judge.metrics.samples._value.get() == before + 1


def test_what_operators_see(server, caplog):
    """Metrics and a line of JSON for each request, without texts of users."""
    with caplog.at_level(logging.INFO, logger="rewarddance_hf.serving"):
        RemoteReward(server.url, token="secret", max_wait=5).score([IMAGE], ["a private wish"], [REFERENCE])
        with pytest.raises(ValueError, match="private task"):
            RemoteReward(server.url, token="secret", max_wait=5).score(
                [IMAGE], ["x"], [REFERENCE], task="private task"
            )
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    asked = [line for line in lines if line["path"] == "/score"]
    assert [(line["status"], line["samples"]) for line in asked] == [(200, 1), (422, 1)]
    assert asked[1]["error"] == "ValueError"
    assert "private" not in caplog.text
    server.judge.log_prompts = True
    with caplog.at_level(logging.INFO, logger="rewarddance_hf.serving"):
        RemoteReward(server.url, token="secret", max_wait=5).score([IMAGE], ["a private wish"], [REFERENCE])
    server.judge.log_prompts = False
    assert "a private wish" in caplog.text
    metrics = httpx2.get(server.url + "/metrics", headers={"Authorization": "Bearer secret"}).text
    for name in (
        'requests_total{path="score",status="200"}',
        "batch_questions_count",
        "waiting_questions 0.0",
        "memory_bytes 0.0",
    ):
        assert f"rewarddance_{name}" in metrics


def test_other_machines_need_a_token(local):
    """A server that others may reach without a token does not start."""
    with pytest.raises(ValueError, match="REWARDDANCE_TOKEN"):
        JudgeServer(local, host="0.0.0.0")
    with pytest.raises(ValueError, match="must be an address"):
        RemoteReward("judge:8000")
