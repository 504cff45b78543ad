"""Public benchmarks: rows, statistics, tables and model-index, in process and over a loopback Hub by repository ID."""

import json
from importlib.util import find_spec
from pathlib import Path

import dataset_layouts as layouts
import datasets
import numpy as np
import pytest
from hub_server import LoopbackHub
from huggingface_hub import EvalResult, ModelCard
from new_process import run_python
from tiny_clip import save_tiny_clip

from rewarddance_hf import RewardDanceEvaluator, RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.data.sources import BENCHMARKS
from rewarddance_hf.evaluation.benchmarks import (
    BenchmarkRun,
    best_accuracy_with_ties,
    published_figures,
    write_model_index,
)


def red(images, prompts, **context):
    """Score that the numbers of the layouts' images are told by: the odd ones of each pair win."""
    return [image.getpixel((0, 0))[0] for image in images]


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def genai_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return write_files(tmp_path / "genai", layouts.genai_bench(with_videos=False))


def test_run_on_a_local_copy(genai_folder, vlm_folder):
    """A judge and a function meet the same rows; the judge's metrics are those of the evaluator."""
    run = BenchmarkRun("genai-bench-image", repo_id=genai_folder)
    scorer = RewardDanceScorer.from_pretrained(vlm_folder("internvl"))
    metrics = run("judge", scorer)
    want = RewardDanceEvaluator(list(run.rows))(scorer)
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-4)
    metrics = run("red", red)
    assert metrics["accuracy"] == 0.5  # right where the second one is preferred
    assert (metrics["num_rows"], metrics["num_ties"]) == (4, 2)
    assert metrics["accuracy_with_ties_best"] == 0.5
    table = run.table()
    assert "split test_v1" in table
    assert "4 pairs, of which 2 are ties" in table
    assert "| red | test_v1 | 50.0 |" in table
    assert (
        "| GPT-4o | v1 | 45.6 | 4-way including both-bad, not comparable to the others | GenAI-Bench v1 leaderboard |"
        in table
    )


def test_part_of_a_benchmark_says_so(genai_folder):
    """With a limit only the first rows are measured, and the table says that they are not all."""
    run = BenchmarkRun("genai-bench-image", split="test", limit=1, repo_id=genai_folder)
    assert run("red", red)["accuracy"] == 0
    assert "the first 1 at most: not comparable" in run.table()
    assert run.eval_results("red")[0].metric_args["limit"] == 1
    assert run.document()["split"] == "test"


@pytest.mark.skipif(find_spec("av") is None, reason="needs PyAV")
def test_a_dimension_is_no_configuration(tmp_path, monkeypatch):
    """Results of two dimensions of one dataset stand beside each other in a card, and neither is called a configuration."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    folder = write_files(tmp_path / "videogen", layouts.videogen_rewardbench())
    card = tmp_path / "README.md"
    for name in ("videogen-rewardbench-vq", "videogen-rewardbench", "videogen-rewardbench-vq"):
        run = BenchmarkRun(name, repo_id=folder)
        run("length", lambda images, prompts, **context: [float(len(clip)) for clip in images])
        write_model_index(card, "org/judge", run.eval_results("length"))
    assert (run.document()["config"], run.document()["dimension"]) == (None, "VQ")
    results = ModelCard.load(card).data.eval_results
    assert {(r.dataset_type, r.dataset_name) for r in results} == {
        ("KlingTeam/VideoGen-RewardBench", "VideoGen-RewardBench")
    }
    assert {r.dataset_config for r in results} == {None}
    names = [r.metric_name for r in results if "both orders, ties left out" in r.metric_name]
    assert sorted(name.split(": ")[0] for name in names if name.endswith("ties left out")) == [
        "Overall", "Overall", "VQ", "VQ",
    ]  # fmt: skip


def test_unknown_benchmark():
    """A wrong name is answered with the right ones."""
    with pytest.raises(ValueError, match="There is no benchmark 'genai', but pickapic, hpdv2"):
        BenchmarkRun("genai")


def test_best_accuracy_with_ties_equals_a_search():
    """The best tie margin is that of trying all, also where probabilities are equal."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        count = generator.integers(1, 12)
        probabilities = generator.integers(0, 7, size=count) / 6
        ties = generator.random(count) < 0.4
        accuracies = []
        for margin in (-1, *np.abs(probabilities - 0.5)):
            called = np.abs(probabilities - 0.5) <= margin
            accuracies.append(np.where(called, ties, ~ties & (probabilities > 0.5)).mean())
        assert best_accuracy_with_ties(probabilities, ties) == pytest.approx(max(accuracies))


def test_published_figures():
    """Figures are those of their sources, and none stands without split, tie rule and source."""
    figures = {(name, f.judge, f.source, f.ties): f.accuracy for name in BENCHMARKS for f in published_figures(name)}
    assert figures["hpdv3", "HPSv3", "HPSv3 README", "not stated"] == 76.9
    assert figures["pickapic", "PickScore", "imscore, own re-run", "not stated"] == 80.2
    assert figures["videogen-rewardbench", "VideoReward-2B", "VideoAlign README", "without ties"] == 73.6
    assert figures["videogen-rewardbench-mq", "VideoReward-2B", "VideoAlign README", "with ties"] == 66.0
    assert (
        figures[
            "editreward-bench", "EditReward-7B", "RationalRewards Table 1 (secondary, two notes agree)", "not stated"
        ]
        == 56.99
    )
    for name in BENCHMARKS:
        assert published_figures(name), f"{name} has none"
        for figure in published_figures(name):
            assert all((figure.judge, figure.split, figure.ties, figure.source))
            assert 30 < figure.accuracy < 100


def result(value, dataset="org/bench", split="test"):
    return EvalResult("visual-preference", dataset, "Bench", "accuracy", value, dataset_split=split, metric_name="a")


def test_model_index_of_a_card(tmp_path):
    """New results replace those of the same benchmark; other results, metadata and text of the card stay."""
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n# My judge\n")
    write_model_index(card, "org/judge", [result(0.5), result(0.6, "org/other")])
    write_model_index(card, "another name", [result(0.7), result(0.4, split="dev")])
    loaded = ModelCard.load(card)
    assert loaded.text.strip() == "# My judge"
    assert loaded.data.license == "apache-2.0"
    assert loaded.data.model_name == "org/judge"
    found = {(r.dataset_type, r.dataset_split): r.metric_value for r in loaded.data.eval_results}
    assert found == {("org/bench", "test"): 0.7, ("org/other", "test"): 0.6, ("org/bench", "dev"): 0.4}
    write_model_index(tmp_path / "new.yaml", "org/judge", [result(0.5)])
    assert ModelCard.load(tmp_path / "new.yaml").data.eval_results[0].metric_value == 0.5
    card.write_text("---\nmodel-index: 3\n---\n")
    with pytest.raises(ValueError, match="The metadata of .* cannot be read"):
        write_model_index(card, "org/judge", [result(0.5)])


# Runs commands given as JSON, and tells their exit codes and outputs.
CLIENT = """
import contextlib, io, json, sys
from rewarddance_hf.cli import main
found = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    found.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(found))
"""


def test_command_over_the_hub(vlm_folder, tmp_path):
    """`rewarddance evaluate --benchmark` by repository IDs: judge, untrained VLM, CLIPScore, PickScore, a function."""
    judge = tmp_path / "judge"
    RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"), paradigm="pointwise").save_pretrained(judge)
    RewardDanceProcessor.from_pretrained(vlm_folder("internvl")).save_pretrained(judge)
    for name in ("clip", "pickscore"):
        (tmp_path / name).mkdir()
    clip = save_tiny_clip(tmp_path / "clip")
    pickscore = save_tiny_clip(tmp_path / "pickscore", seed=1)
    weights = ("model.safetensors", "config.json")
    (tmp_path / "my_rewards.py").write_text(
        "def red(images, prompts, **context):\n    return [image.getpixel((0, 0))[0] for image in images]\n"
    )
    with LoopbackHub() as hub:
        revision = hub.put("TIGER-Lab/GenAI-Bench", layouts.genai_bench(with_videos=False), kind="dataset")
        hub.put("org/judge", judge)
        hub.put("org/vlm", vlm_folder("internvl"))
        hub.put("openai/clip-vit-large-patch14", clip)
        hub.put("yuvalkirstain/PickScore_v1", {name: (pickscore / name).read_bytes() for name in weights})
        hub.put("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", pickscore)
        base = ["evaluate", "--model", "org/judge", "--benchmark", "genai-bench-image"]
        others = ["org/vlm", "clipscore", "pickscore", "my_rewards:red"]
        commands = [
            [*base, "--compare", *others, "--json", "--output", "out.json", "--model-index", "README.md"],
            [*base, "--limit", "2", "--compare", "my_rewards:blue"],
            ["evaluate", "--model", "org/judge", "--benchmark", "hpdv2"],
        ]
        environment = hub.environment(tmp_path / "home", PYTHONPATH=str(Path(__file__).parents[2]))
        client = run_python("-c", CLIENT, json.dumps(commands), env=environment, cwd=tmp_path)
    assert client.returncode == 0, client.stderr[-3000:]
    full, broken, missing = json.loads(client.stdout.splitlines()[-1])

    assert full[0] == 0, full[2][-2000:]
    document = json.loads(full[1])
    assert list(document["results"]) == ["org/judge", *others]
    assert document["metrics"] == document["results"]["org/judge"]
    assert (document["dataset"], document["config"], document["split"]) == (
        "TIGER-Lab/GenAI-Bench", "image_generation", "test_v1",
    )  # fmt: skip
    assert document["revision"] == revision
    assert document["results"]["my_rewards:red"]["accuracy"] == 0.5
    assert all(metrics["num_ties"] == 2 for metrics in document["results"].values())
    assert document["results"]["clipscore"]["mean_reward"] != document["results"]["pickscore"]["mean_reward"]
    assert json.loads((tmp_path / "out.json").read_text()) == document
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {r.dataset_revision for r in results} == {revision}
    assert results[0].metric_name == "accuracy, both orders, ties left out"
    assert results[0].metric_value == round(document["metrics"]["accuracy"], 4)
    assert len(results) == 4

    code, out, err = broken  # the second judge fails, and the first one's result is still there
    assert code == 1
    assert "'my_rewards' has no callable 'blue'" in err.splitlines()[-1]
    assert "| org/judge | test_v1 |" in out

    code, out, err = missing
    assert (code, out) == (1, "")
    assert "There is no dataset under any of ['ymhao/HPDv2'] on the Hub" in err.splitlines()[-1]
