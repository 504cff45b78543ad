"""Cards parse, render, and say what was measured; those of the metric modules are up to date."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from snippets import code_blocks

from rewarddance_hf import RewardDanceConfig
from rewarddance_hf.hub import cards
from rewarddance_hf.hub.licenses import TrainingData, check_training_data, model_license
from rewarddance_hf.hub.measurements import Measurement, model_index, read_measurements
from rewarddance_hf.hub.spaces import build_metric
from rewarddance_hf.trainer.model_card import recorded_data


METRICS = Path(cards.__file__).parents[1] / "evaluation" / "metrics"
NUMBERS = {
    "accuracy": 0.71234,
    "accuracy_low": 0.69,
    "accuracy_high": 0.73,
    "accuracy_with_ties": 0.65,
    "order_consistency": 0.9,
    "ece": 0.05,
    "brier": 0.2,
    "num_rows": 100.0,
    "num_ties": 20.0,
}
FACTS = cards.ModelFacts(
    repo_id="org/judge",
    revision="v1.0",
    config=RewardDanceConfig(paradigm="pairwise"),
    num_parameters=371_000,
    dtype="float32",
    license="apache-2.0",
    base_model="OpenGVLab/InternVL3_5-1B-HF",
    training_data=[TrainingData("ymhao/HPDv2", "apache-2.0")],
    measurements=[Measurement("org/pairs", "test", NUMBERS, "image", rows="0a1b")],
    training={
        "steps": 700,
        "batch_size": 48,
        "learning_rate": 7e-4,
        "hardware": "1 x cpu (x86_64)",
        "versions": {"rewarddance_hf": "0.1.0", "transformers": "5.23.0", "torch": "2.13.0"},
    },
    limits=["It has seen colored shapes only."],
)


def test_every_number_has_its_split_and_tie_rule():
    """The model-index and the table name split and tie rule beside every number."""
    card = ModelCard(cards.model_card(FACTS))
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["accuracy, ties left out, both orders"].metric_value == 0.7123
    assert results["accuracy, ties counted (within 0.05 of one half)"].metric_value == 0.65
    for result in results.values():
        assert result.metric_args == {"rows": "0a1b"}
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == ("org/pairs", "image", "test")
        assert "ties" in result.metric_name
    assert (
        "| org/pairs (image) | test | left out | 71.2 | 69.0 to 73.0 | 90.0 | 0.050 | 0.200 | 80 | 0a1b |" in card.text
    )
    assert "| org/pairs (image) | test | counted | 65.0 | - | - | - | - | 100 | 0a1b |" in card.text


def test_a_card_says_what_is_known():
    """Training data with license, hardware, versions, limits and base model; and nothing that is not known."""
    card = ModelCard(cards.model_card(FACTS))
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "OpenGVLab/InternVL3_5-1B-HF"
    assert card.data.datasets == ["ymhao/HPDv2"]
    for text in (
        "| ymhao/HPDv2 | apache-2.0 |",
        "1 x cpu (x86_64)",
        "700 steps of 48 rows",
        "It has seen colored shapes",
    ):
        assert text in card.text
    assert "In up to 10.0 % of the pairs above the verdict changes" in card.text
    bare = replace(FACTS, base_model=None, training_data=(), measurements=(), training=None, limits=())
    card = ModelCard(cards.model_card(bare))
    assert "Nothing was measured for this release." in card.text
    assert "Not trained by us" in card.text
    assert "Fine-tuned" not in card.text
    assert card.data.eval_results is None


@pytest.mark.parametrize("paradigm", ["pairwise", "pointwise", "regressive"])
def test_cards_render_in_every_paradigm(paradigm):
    """No template leaves a brace or an empty table behind, and snippets are valid Python with the pinned revision."""
    text = cards.model_card(
        replace(FACTS, config=RewardDanceConfig(paradigm=paradigm), non_commercial=["a/b"], license="cc-by-nc-4.0")
    )
    assert "{{" not in text
    assert "{%" not in text
    assert "**Not for commercial use**" in text
    assert not re.search(r"\n\n\n", text)
    blocks = code_blocks(text)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
        assert 'revision="v1.0"' in block


def test_dataset_card():
    """Configurations and splits of a dataset card are what `load_dataset` reads, with the sizes beside."""
    splits = [{"name": "train", "num_rows": 5, "num_bytes": 2_000_000}]
    facts = cards.DatasetFacts(
        "org/pairs",
        "v1",
        "Rows.",
        "A script.",
        "mit",
        [{"name": "image", "splits": splits}],
        {"prompt": "text"},
        ["Few."],
    )
    card = DatasetCard(cards.dataset_card(facts))
    (config,) = yaml.safe_load(card.content.split("---")[1])["configs"]
    assert config == {"config_name": "image", "data_files": [{"split": "train", "path": "image/train-*.parquet"}]}
    assert "| image | train | 5 | 2.0 |" in card.text
    (block,) = code_blocks(card.text)
    compile(block, "card", "exec")


@pytest.mark.parametrize("module", sorted(METRICS.glob("*/*.py")), ids=lambda module: module.stem)
def test_metrics_are_built_from_their_module(module, tmp_path):
    """The Space of a metric holds the module itself, a page with its first example, and a card with its texts."""
    folder = build_metric(module, tmp_path / module.stem)
    files = {path.name: path for path in folder.iterdir()}
    assert set(files) == {module.name, "README.md", "app.py", "example.json", "requirements.txt"}
    assert files[module.name].read_bytes() == module.read_bytes()
    card = files["README.md"].read_text(encoding="utf-8")
    assert "{{" not in card
    assert f'>>> metric = evaluate.load("{module.stem}")' in card
    data = yaml.safe_load(card.split("---")[1])
    assert (data["sdk"], data["app_file"]) == ("gradio", "app.py")
    assert {"evaluate", "metric"} <= set(data["tags"])
    assert cards.release_marker(card)["kind"] == "metric"
    arguments = json.loads(files["example.json"].read_text())
    assert f"predictions={arguments['predictions']}" in module.read_text()


def test_marker_tells_ours_from_others():
    """A card of this tool is known by its metadata; other cards, broken ones and none are not."""
    assert cards.release_marker(cards.model_card(FACTS))["kind"] == "model"
    assert cards.release_marker("---\nlicense: mit\n---\nrewarddance_release") is None
    assert cards.release_marker("---\nrewarddance_release: yes\n---\n") is None
    assert cards.release_marker("---\na: [\n---\n") is None
    assert cards.release_marker("") is None


def test_results_files(tmp_path):
    """Results of the command line become measurements; without split or interval they are refused."""
    good, bad, broken = (tmp_path / name for name in ("good.json", "bad.json", "broken.json"))
    good.write_text(json.dumps({"model": "m", "dataset": "shapes:ood", "split": None, "metrics": NUMBERS}))
    (measurement,) = read_measurements([good])
    assert (measurement.dataset, measurement.split) == ("shapes", "ood")
    part = {"benchmark": "hpdv2", "dataset": "a/b", "config": "c", "split": "test", "limit": 100, "metrics": NUMBERS}
    good.write_text(json.dumps(part))
    (measurement,) = read_measurements([good])
    assert (measurement.dataset, measurement.config, measurement.split) == ("a/b", "c", "test[:100]")
    good.write_text(json.dumps({"dataset": "a/b", "dimension": "VQ", "split": "eval", "metrics": NUMBERS}))
    (measurement,) = read_measurements([good])
    result = model_index(measurement)[0]
    assert (result.dataset_config, result.metric_name) == (None, "VQ: accuracy, ties left out, both orders")
    local = {"dataset": "parquet", "data_files": ["/home/me/pairs.parquet"], "split": "train", "metrics": NUMBERS}
    for document in (local, {"dataset": "/home/me/pairs.parquet", "split": "train", "metrics": NUMBERS}):
        good.write_text(json.dumps(document))
        assert read_measurements([good])[0].dataset == "pairs.parquet (not public)"
    # Where it was measured it was a folder, and not a repository of that name.
    good.write_text(json.dumps({"dataset": "data/pairs", "is_local": True, "split": "train", "metrics": NUMBERS}))
    assert read_measurements([good])[0].dataset == "pairs (not public)"
    drawn = {"dataset": "shapes:ood", "split": None, "seed": 3, "rows_fingerprint": "0a1b", "metrics": NUMBERS}
    good.write_text(json.dumps(drawn))
    (measurement,) = read_measurements([good])
    assert (measurement.split, measurement.rows) == ("ood, seed 3", "0a1b")
    bad.write_text(json.dumps({**drawn, "rows_fingerprint": "ffff"}))
    with pytest.raises(
        ValueError, match="Two results are on 'shapes', split 'ood, seed 3', measured on different rows"
    ):
        read_measurements([good, bad])
    bad.write_text(json.dumps({"dataset": "a/b", "split": None, "metrics": NUMBERS}))
    with pytest.raises(ValueError, match="lacks dataset or split, but no number is published without"):
        read_measurements([bad])
    bad.write_text(json.dumps({"dataset": "a/b", "split": "test", "metrics": {"accuracy": 0.5}}))
    with pytest.raises(ValueError, match="'accuracy_high'"):
        read_measurements([bad])
    broken.write_text("{")
    with pytest.raises(ValueError, match="is no result of `rewarddance evaluate --output`"):
        read_measurements([broken])


class TestLicenses:
    """Non-commercial data never enters a release unnoticed."""

    def test_known_non_commercial_data_is_refused(self):
        """MMRB2 and EditReward-Data are refused under their license, in any case and under the old owner's name."""
        for name in (
            "rl-research/multimodal-rewardbench-2",
            "TIGER-Lab/EditReward-Data",
            "tiger-ai-lab/editreward-data",
        ):
            with pytest.raises(ValueError, match="forbids commercial use of the model"):
                check_training_data([TrainingData(name, "cc-by-nc-4.0")])

    def test_a_wrong_license_is_noticed(self):
        """A license that contradicts what is known of a dataset is refused, whatever is allowed."""
        with pytest.raises(ValueError, match="declared as 'mit', but is 'cc-by-nc-4.0'"):
            check_training_data([TrainingData("TIGER-Lab/EditReward-Data", "mit")], allow_non_commercial=True)

    @pytest.mark.parametrize("license", ["cc-by-nc-4.0", "cc-by-nc-sa-3.0", "my-noncommercial"])
    def test_any_non_commercial_license_counts(self, license):
        """Data that nobody has heard of is judged by its license; allowed, it marks the model's license."""
        data = TrainingData("me/unheard-of", license)
        with pytest.raises(ValueError, match="--allow-non-commercial"):
            check_training_data([data])
        found = check_training_data([data, TrainingData("ymhao/HPDv2", "apache-2.0")], allow_non_commercial=True)
        assert found == [data]
        assert model_license("apache-2.0", found) == license

    def test_recorded_data_must_be_declared(self):
        """What the trainer recorded cannot be left out, nor declared as free when it recorded otherwise."""
        recorded = [{"name": "TIGER-Lab/EditReward-Data", "license": "cc-by-nc-4.0"}]
        with pytest.raises(ValueError, match=r"lacks \['TIGER-Lab/EditReward-Data'\], which the trainer recorded"):
            check_training_data([TrainingData("shapes", "apache-2.0")], recorded)
        with pytest.raises(ValueError, match="declared as 'mit', but the trainer recorded 'cc-by-nc-2.0'"):
            check_training_data([TrainingData("me/x", "mit")], [{"name": "me/x", "license": "cc-by-nc-2.0"}])

    def test_local_files_are_declared_by_a_name_of_their_own(self, tmp_path):
        """`load_dataset("json", data_files=...)` calls its rows "json": they are recorded as local files, and declared as what they are."""
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"}\n')
        rows = datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train")
        recorded = [*recorded_data(rows), {"name": "ymhao/HPDv2", "license": "apache-2.0"}]
        assert recorded[0]["name"] == "local files"
        public = TrainingData("ymhao/HPDv2", "apache-2.0")
        with pytest.raises(ValueError, match=r"lacks \['local files'\], which the trainer recorded"):
            check_training_data([public], recorded)
        assert check_training_data([public, TrainingData("drawings of mine", "mit")], recorded) == []

    def test_nothing_may_be_left_unsaid(self):
        """No declaration, an unknown license and a malformed one are refused."""
        with pytest.raises(ValueError, match="`training_data` is empty"):
            check_training_data([])
        with pytest.raises(ValueError, match="is 'unknown', but must be known"):
            check_training_data([TrainingData("a/b", "unknown")])
        with pytest.raises(ValueError, match="must be NAME=LICENSE"):
            TrainingData.parse("a/b")
        assert TrainingData.parse("a=b/c=MIT") == TrainingData("a=b/c", "mit")

    def test_free_data_passes(self):
        """Known and unknown data under free licenses pass, and leave the model's license alone."""
        data = [TrainingData("ymhao/HPDv2", "apache-2.0"), TrainingData("shapes", "apache-2.0")]
        assert check_training_data(data) == []
        assert model_license("mit", []) == "mit"
