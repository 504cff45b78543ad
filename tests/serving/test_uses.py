"""A remote judge wherever a judge is used: training, references, search, monitor, evaluation, and every command."""

import base64
import io
import json
from dataclasses import fields

import httpx2
import pyarrow.parquet as pq
import pytest
import torch
from serving.conftest import load_scorer
from tiny_refl import PROMPTS, SIZES, make_trainer, rows, tiny_sd3, trained_weights
from tiny_vlms import random_image

from rewarddance_hf import (
    JudgeServer,
    RemoteReward,
    RemoteRewardError,
    RewardDanceEvaluator,
    RewardDynamicsCallback,
    as_reward,
    best_of_n,
    best_of_n_references,
    merge_shards,
    score_shards,
)
from rewarddance_hf.cli import main
from rewarddance_hf.cli.serve import LIMITS, MIB
from rewarddance_hf.serving.groups import GRPOReward
from rewarddance_hf.serving.limits import ServerLimits


@pytest.fixture(scope="module")
def single(vlm_folder):
    """A server without a token, of a judge of single samples."""
    with JudgeServer(load_scorer(vlm_folder("internvl"), "pointwise"), "single") as server:
        yield server


@pytest.fixture(scope="module")
def judges(single, vlm_folder):
    return RemoteReward(single.url, max_wait=10), load_scorer(vlm_folder("internvl"), "pointwise")


def test_addresses_are_rewards(single, judges):
    """What takes rewards takes an address, alone or among others."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = as_reward({"judge": single.url, "brightness": lambda images, prompts: images.mean(dim=(1, 2, 3))})
    values = found.by_name(images, PROMPTS[:2])
    assert torch.equal(values["judge"], judges[1].score(images, PROMPTS[:2]))
    assert as_reward(f"{single.url},{single.url}").fingerprint()["RemoteReward"]["weight"] == 1.0
    with pytest.raises(TypeError, match="or an address"):
        as_reward("judge:8000")


def test_refl_makes_the_same_updates(judges, tmp_path):
    """A generator that is tuned by a remote judge has the weights of one that is tuned by a local one."""
    weights = []
    for judge in judges:
        monitor = RewardDynamicsCallback(judge, PROMPTS[:2], eval_steps=1, plot=False)
        trainer = make_trainer(
            tmp_path / type(judge).__name__, reward=judge, callbacks=[monitor], eval_dataset=rows(3)
        )
        before = trained_weights(trainer)
        trainer.train()
        weights.append({**trained_weights(trainer), "metrics": torch.tensor(list(trainer.evaluate().values())[:1])})
        weights[-1]["held out"] = torch.tensor([entry["held_out"] for entry in _means(monitor.dynamics.history)])
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=1e-6, msg=name)
    assert any(not torch.equal(value, before[name]) for name, value in trained_weights(trainer).items())


def _means(history):
    return [{"held_out": value} for entry in history for value in entry.values() if isinstance(value, float)]


def test_references_and_search(judges, remote, local):
    """Best-of-N chooses the same samples, by single scores and by comparisons."""
    size = {"num_inference_steps": 2, **SIZES["StableDiffusion3Pipeline"]}
    for pair in (judges, (remote, local)):
        found = []
        for judge in pair:
            pipeline = tiny_sd3()
            pipeline.set_progress_bar_config(disable=True)
            references = best_of_n_references(
                pipeline, judge, PROMPTS[:2], num_candidates=3, top_k=1, show_progress=False, **size
            )
            (result,) = best_of_n(pipeline, PROMPTS[:1], judge, max_denoiser_evaluations=6, **size)
            found.append((references.to_list(), result.rewards, result.images))
        assert found[0] == found[1]


def test_evaluation(remote, local, judges, tmp_path):
    """Metrics are the same to the last digit, log-odds among them; files of scores can be gone on with by either."""
    dataset = [{"prompt": f"circle {i}", "chosen": random_image(i), "rejected": random_image(9 + i)} for i in range(5)]
    for pair in ((remote, local), judges):
        assert RewardDanceEvaluator(dataset)(pair[0]) == RewardDanceEvaluator(dataset)(pair[1])
    with pytest.raises(ValueError, match="stores no temperature"):
        RewardDanceEvaluator(dataset).calibrate(remote)
    images = [{"image": row["chosen"], "prompt": row["prompt"]} for row in dataset]
    assert judges[0].score_dataset(images, tmp_path / "scores.jsonl", show_progress=False) == 5
    assert judges[1].score_dataset(images, tmp_path / "scores.jsonl", show_progress=False) == 0
    scores = [json.loads(line)["score"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert scores == judges[1].score([row["image"] for row in images], [row["prompt"] for row in images]).tolist()
    assert score_shards(judges[0], images, tmp_path / "shards", show_progress=False) == 5
    assert pq.read_table(merge_shards(tmp_path / "shards"))["score"].to_pylist() == scores


def test_commands(capsys, server, vlm_folder, tmp_path, monkeypatch):
    """`--model http://...` gives what the folder of the judge gives; the token comes from the environment."""
    monkeypatch.setenv("REWARDDANCE_TOKEN", "secret")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        random_image(i).save(path)
    commands = [
        ["score", "--image", *paths[:2], "--prompt", "a circle", "--reference", paths[2], "--json"],
        [
            "score",
            "--image",
            *paths,
            "--prompt",
            "a circle",
            "--reference",
            paths[0],
            "--output",
            str(tmp_path / "scores"),
            "--json",
        ],
        ["rank", *paths, "--prompt", "a circle", "--json"],
        ["evaluate", "--dataset", "shapes:id", "--limit", "3", "--json"],
    ]
    for command in commands:
        found = []
        for model in (server.url, str(vlm_folder("internvl"))):
            capsys.readouterr()
            assert main([*command, "--model", model]) == 0, capsys.readouterr().err
            document = json.loads(capsys.readouterr().out)
            document.pop("model", None)
            found.append(document)
        assert found[0] == found[1]
    calibrate = ["--dataset", "shapes:id", "--calibrate", str(tmp_path / "c")]
    assert main(["evaluate", "--model", server.url, *calibrate]) == 2
    assert main(["serve", "--model", server.url]) == 1
    assert (
        main(["serve", "--model", str(vlm_folder("internvl")), "--host", "0.0.0.0", "--token-file", "/dev/null"]) == 1
    )
    assert "which is empty" in capsys.readouterr().err


def test_help_tells_the_bounds():
    """Defaults in the help of `serve` are those of the server, sizes in MiB."""
    for field in fields(ServerLimits):
        value = field.default // MIB if field.name.endswith("_bytes") else field.default
        assert f"(default: {int(value)})" in LIMITS[field.name]


def test_reward_server_of_flow_factory(single, server, judges, local):
    """`/compute` takes what its clients send; a pairwise judge compares the samples of a prompt with each other."""
    images, prompts = [random_image(i) for i in range(5)], ["a", "a", "b", "b", "b"]
    body = {"prompt": prompts, "image": [png(image) for image in images], "video": None, "kwargs": None}
    found = httpx2.post(f"{single.url}/compute", json=body).json()
    assert found["rewards"] == judges[1].score(images, prompts).double().tolist()
    template = {"prompts": prompts, "images": body["image"], "extra": {"task": "text-to-image", "seed": 3}}
    assert httpx2.post(f"{single.url}/compute", json=template).json()["rewards"] == found["rewards"]
    videos = {
        "prompt": prompts[:1],
        "video": [[png(image) for image in images[:3]]],
        "condition_images": [[png(images[0])]],
    }
    want = judges[1].score([images[:3]], prompts[:1], conditions=images[:1])
    assert httpx2.post(f"{single.url}/compute", json=videos).json()["rewards"] == want.double().tolist()

    token = {"Authorization": "Bearer secret"}
    found = httpx2.post(f"{server.url}/compute", json=body, headers=token).json()["rewards"]
    groups = [local.rank(images[:2], "a").scores, local.rank(images[2:], "b").scores]
    assert found == pytest.approx(torch.cat(groups).tolist(), abs=1e-6)
    with_references = {**body, "kwargs": {"references": body["image"][::-1]}}
    found = httpx2.post(f"{server.url}/compute", json=with_references, headers=token).json()["rewards"]
    assert found == local.score(images, prompts, images[::-1]).double().tolist()
    for changes in (
        {"prompt": ["a", "a", "b", "b", "c"]},
        {"image": None},
        {"condition_videos": [1]},
        {"prompt": "a"},
    ):
        answer = httpx2.post(f"{server.url}/compute", json={**body, **changes}, headers=token)
        assert (answer.status_code, answer.json()["error"]["type"]) == (422, "ValueError")


def png(image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_reward_function_of_trl(single, judges, remote, local):
    """Texts are drawn, images are taken as they are; groups are compared; what cannot be drawn has its own reward."""
    images = {str(i): random_image(i) for i in range(4)}
    reward = GRPOReward(single.url, render=lambda texts: [images.get(text) for text in texts], undrawn=-1.0)
    chats = [[{"role": "user", "content": prompt}] for prompt in ("a", "a", "b")]
    completions = [[{"role": "assistant", "content": text}] for text in ("0", "no such image", "2")]
    found = reward(prompts=chats, completions=completions, completion_ids=[[1]] * 3, trainer_state=None)
    want = judges[1].score([images["0"], images["2"]], ["a", "b"]).tolist()
    assert found == [want[0], -1.0, want[1]]
    samples = list(images.values())
    found = GRPOReward(remote)(["a"] * 4, samples)
    assert found == pytest.approx(local.rank(samples, "a").scores.tolist(), abs=1e-6)
    found = GRPOReward(remote)(["a"] * 4, samples, reference=samples[::-1], seed=[1] * 4)
    assert found == local.score(samples, ["a"] * 4, samples[::-1]).tolist()
    with pytest.raises(ValueError, match="has a single sample and no reference"):
        GRPOReward(remote)(["a", "b"], samples[:2])
    with pytest.raises(RemoteRewardError):
        RemoteReward("http://127.0.0.1:9", max_wait=0.1)
