"""A remote judge is the local one: scores to the bit, gradients, verdicts, all kinds of media, errors."""

import base64
import inspect
import io
import json
from dataclasses import replace

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from serving.conftest import load_scorer
from tiny_vlms import random_image

from rewarddance_hf import Clip, Example, JudgeServer, Question, RemoteReward, RewardDanceScorer


COUNT = 5
PROMPTS = [f"{name} circle" for name in ("a red", "two green", "no", "yes, a", 'a "quoted"\n')]
IMAGES = [random_image(i, 40 + 3 * i, 40) for i in range(COUNT)]
REFERENCES = [random_image(10 + i, 30 + 7 * i, 40) for i in range(COUNT)]


def random_tensor(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def test_the_same_calls():
    """Whatever a judge is called with, a remote one is, too."""
    for name in ("score", "__call__", "compare", "rank", "score_dataset"):
        here, there = (inspect.signature(getattr(judge, name)) for judge in (RewardDanceScorer, RemoteReward))
        assert [str(one) for one in here.parameters.values()] == [str(one) for one in there.parameters.values()]
    assert RewardDanceScorer.is_probability == RemoteReward.is_probability


def test_scores_to_the_bit(local, remote):
    """Scores, verdicts and rankings are those of the judge in this process, and so is the fingerprint."""
    assert remote.is_pairwise
    assert remote.fingerprint() == local.fingerprint()
    assert torch.equal(remote.score(IMAGES, PROMPTS, REFERENCES), local.score(IMAGES, PROMPTS, REFERENCES))
    names = ["alignment", "counting"]
    for several in (names, names[:1]):
        asked = (IMAGES, "a circle", REFERENCES)
        assert torch.equal(remote.score(*asked, dimensions=several), local.score(*asked, dimensions=several))
    assert remote.compare(*IMAGES[:2], "a circle", dimensions=names) == local.compare(
        *IMAGES[:2], "a circle", dimensions=names
    )
    explained = {"swap": False, "explain": True, "max_new_tokens": 4, "criteria": "color"}
    assert remote.compare(*IMAGES[:2], "x", **explained) == local.compare(*IMAGES[:2], "x", **explained)
    for method in ({}, {"ranking_method": "swiss", "top_k": 2}):
        got, want = (judge.rank(IMAGES, "a circle", **method) for judge in (remote, local))
        assert (got.order, got.num_questions) == (want.order, want.num_questions)
        for name in ("wins", "scores", "matrix"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0, equal_nan=True)
    example = {"image": IMAGES[0], "reference": REFERENCES[0], "prompt": "a square", "verdict": "yes"}
    shown = remote.score(IMAGES, PROMPTS, REFERENCES, examples=[example])
    assert torch.equal(shown, local.score(IMAGES, PROMPTS, REFERENCES, examples=[example]))


@pytest.mark.parametrize("shape", [(COUNT, 3, 40, 52), (COUNT, 3, 3, 31, 44)], ids=["images", "clips"])
def test_gradients(local, remote, shape):
    """Samples, references and first frames have the gradient that they have in this process, weighted and by dimensions."""
    images, condition = random_tensor(*shape).requires_grad_(), random_tensor(3, 20, 20).requires_grad_()
    reference = random_tensor(3, 30, 40).requires_grad_()
    references = [reference, reference, *REFERENCES[2:]]
    conditions = [condition, None, None, None, IMAGES[0]]
    task = "image-to-video" if len(shape) == 5 else None
    for dimensions in (None, ["alignment", "structure"]):
        found = []
        for judge in (local, remote):
            rewards = judge.score(images, PROMPTS, references, conditions, task, dimensions=dimensions)
            weights = random_tensor(*rewards.shape) + 0.5
            found.append(
                (
                    rewards.detach(),
                    *torch.autograd.grad((weights * rewards.log()).sum(), [images, reference, condition]),
                )
            )
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
        assert all((gradient != 0).float().mean() > 0.9 for gradient in found[1][1:])
    rewards = remote.score(images, PROMPTS, REFERENCES)
    (gradient,) = torch.autograd.grad(rewards[1], images, create_graph=True)
    assert gradient[1].any()
    assert not gradient[[0, 2, 3, 4]].any()
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), images)
    with torch.no_grad():
        assert not remote.score(images, PROMPTS, REFERENCES).requires_grad


def test_all_kinds_of_media(local, remote, tmp_path):
    """Whatever a judge takes in this process it takes from afar, and sees the same."""
    turned = Image.Exif()
    turned[0x0112] = 6
    faded = IMAGES[0].convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(faded.size))
    animation = encoded(
        IMAGES[0], "GIF", save_all=True, append_images=[image.resize((40, 40)) for image in IMAGES[1:3]]
    )
    (tmp_path / "photo.jpg").write_bytes(encoded(IMAGES[1], "JPEG", exif=turned))
    clip = Clip([random_image(i) for i in range(6)], fps=4.0)
    media = [
        tmp_path / "photo.jpg",
        str(tmp_path / "photo.jpg"),
        encoded(IMAGES[0]),
        {"bytes": encoded(IMAGES[0]), "path": None},
        Image.open(tmp_path / "photo.jpg"),
        faded,
        encoded(faded, "WEBP", lossless=True),
        faded.convert("LA"),
        IMAGES[0].convert("P"),
        IMAGES[0].convert("L"),
        np.array(IMAGES[0]),
        np.array(faded),
        torch.from_numpy(np.array(IMAGES[2])).permute(2, 0, 1),
        random_tensor(3, 40, 40),
        random_tensor(4, 40, 40).to(torch.bfloat16),
        Image.open(io.BytesIO(animation)),
        animation,
        clip,
        list(clip),
        random_tensor(4, 3, 30, 30),
        np.stack([np.array(frame) for frame in clip]),
    ]
    asked = (media, "a circle", [IMAGES[0]] * len(media))
    assert torch.equal(remote.score(*asked), local.score(*asked))


def test_errors_are_those_of_a_local_judge(local, remote):
    """What cannot be judged has the same class and message, with the number of its row in the call."""
    bad = encoded(IMAGES[0])[:-200]
    calls = [
        {"images": [*IMAGES[:3], bad, IMAGES[4]]},
        {"images": [*IMAGES[:4], "https://example.org/a.png"]},
        {"images": [*IMAGES[:4], "/no/such/file.png"]},
        {"images": random_tensor(COUNT, 3, 8, 8) + 1},
        {"images": [*IMAGES[:4], 7]},
        {"references": None},
        {"references": [*REFERENCES[:4], None]},
        {"prompts": PROMPTS[:3]},
        {"prompts": [*PROMPTS[:4], 3]},
        {"task": "no-such-task"},
        {"dimensions": ["alignment", "no-such-dimension"]},
        {"dimensions": ["alignment"], "criteria": "x"},
        {"examples": [{"image": IMAGES[0], "prompt": "x"}]},
        {"images": []},
    ]
    for changes in calls:
        arguments = {"images": IMAGES, "prompts": PROMPTS, "references": REFERENCES, **changes}
        with pytest.raises((ValueError, TypeError)) as want:
            local.score(**arguments)
        with pytest.raises((ValueError, TypeError)) as got:
            remote.score(**arguments)
        assert type(got.value) in type(want.value).__mro__, changes
        assert str(got.value) == str(want.value)


def test_paradigms(vlm_folder):
    """Judges of single samples, too; what does not belong to them is refused before anything is sent."""
    for paradigm in ("pointwise", "regressive"):
        local = load_scorer(vlm_folder("internvl"), paradigm)
        with JudgeServer(load_scorer(vlm_folder("internvl"), paradigm)) as server:
            remote = RemoteReward(server.url, max_wait=5)
            assert not remote.is_pairwise
            images = random_tensor(COUNT, 3, 40, 52).requires_grad_()
            found = [judge.score(images, PROMPTS) for judge in (remote, local)]
            torch.testing.assert_close(*found, rtol=0, atol=1e-6)
            torch.testing.assert_close(*(torch.autograd.grad(one.sum(), images) for one in found), rtol=0, atol=1e-6)
            assert remote.rank(IMAGES, "a circle").order == local.rank(IMAGES, "a circle").order
            with pytest.raises(ValueError, match="looks at one sample only"):
                remote.score(IMAGES, PROMPTS, REFERENCES)


def test_questions_that_a_server_is_not_asked(remote):
    """A question with reasons first, or examples of its own, is refused rather than asked otherwise."""
    question = Question(IMAGES[0], "x", REFERENCES[0])
    example = Example(Question(IMAGES[1], "y", REFERENCES[1]), True)
    for other in (replace(question, reasons_first=True), replace(question, examples=(example,))):
        with pytest.raises(NotImplementedError, match="Load the judge"):
            list(remote.stream([question, other]))


def test_large_calls_are_sent_in_parts(local, vlm_folder):
    """A call beyond the bounds of the server becomes several requests; rows and scores keep their places."""
    from rewarddance_hf.serving.limits import ServerLimits

    limits = ServerLimits(max_questions=2, max_body_bytes=40_000, max_memory_bytes=1 << 20)
    with JudgeServer(load_scorer(vlm_folder("internvl")), limits=limits) as server:
        remote = RemoteReward(server.url, max_wait=5)
        torch.testing.assert_close(
            remote.score(IMAGES, PROMPTS, REFERENCES), local.score(IMAGES, PROMPTS, REFERENCES), rtol=0, atol=1e-6
        )
        images = random_tensor(COUNT, 3, 40, 52).requires_grad_()
        found = [
            torch.autograd.grad(judge.score(images, PROMPTS, REFERENCES).sum(), images) for judge in (remote, local)
        ]
        torch.testing.assert_close(*found, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match=r"images\[3\]` cannot be read"):
            remote.score([*IMAGES[:3], b"no image", IMAGES[4]], PROMPTS, REFERENCES)
        with pytest.raises(ValueError, match=r"images\[1\]` and what it is shown with have"):
            remote.score([IMAGES[0], random_image(0, 200, 200)], PROMPTS[:2], REFERENCES[:2])


def test_json_for_people(local, server):
    """`curl` with base64 gives the same scores; NaN of a ranking is null."""
    shown = [base64.b64encode(encoded(image)).decode() for image in IMAGES[:2]]
    body = {
        "images": [shown[0], f"data:image/png;base64,{shown[1]}"],
        "prompts": "a circle",
        "references": shown[::-1],
    }
    send = httpx2.Client(base_url=server.url, headers={"Authorization": "Bearer secret"})
    answer = send.post("/score", json=body).json()
    want = local.score(IMAGES[:2], "a circle", IMAGES[1::-1])
    assert torch.equal(torch.tensor(answer["scores"]), want)
    assert answer["protocol"] == 1
    clips = send.post(
        "/score", json={**body, "images": [[shown[0], shown[0]], {"frames": [shown[1]] * 2, "fps": 2}]}
    ).json()
    assert torch.equal(
        torch.tensor(clips["scores"]),
        local.score([[IMAGES[0]] * 2, Clip([IMAGES[1]] * 2, fps=2)], "a circle", IMAGES[1::-1]),
    )
    ranking = send.post("/rank", json={"images": shown, "prompt": "a circle"}).json()
    assert ranking["order"] == local.rank(IMAGES[:2], "a circle").order
    assert ranking["matrix"][0][0] is None
    verdict = send.post("/compare", json={"image_a": shown[0], "image_b": shown[1], "prompt": "a circle"}).json()
    assert verdict["winner"] == local.compare(*IMAGES[:2], "a circle").winner
    model = send.get("/v1/model").json()
    assert model["fingerprint"] == local.fingerprint()
    assert model["criteria"] == local.processor.criteria
    json.dumps(model, allow_nan=False)
