"""What is released of the shapes world: every folder is whole, verified, and can be read by repository ID."""

import json
import shutil

import pytest
from datasets import load_dataset

from rewarddance_hf.hub import artifacts
from rewarddance_hf.hub.cards import code_blocks
from rewarddance_hf.hub.release import REPO_TYPES
from rewarddance_hf.hub.verification import read_kind
from rewarddance_hf.models import RewardDanceForYesScoring
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.shapes.preferences import ShapesPreferences


pytest.importorskip("evaluate", reason="needs evaluate: `pip install rewarddance_hf[metrics]`")

NUM_ROWS = {"train": 12, "id": 4, "ood": 4}
NUMBERS = {"accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8, "accuracy_with_ties": 0.75, "num_rows": 9.0}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """All folders by name, with an untrained judge in the place of the demo's. Read only."""
    demo_dir = tmp_path_factory.mktemp("demo")
    RewardDanceForYesScoring.from_pretrained(BASE_VLM).save_pretrained(demo_dir / "judge")
    judge_processor().save_pretrained(demo_dir / "judge")
    metrics = {f"judge/{split}/{key}": value for split in ("id", "ood") for key, value in NUMBERS.items()}
    metrics |= {"judge/id/num_ties": 0.0, "judge/ood/num_ties": 0.0}
    (demo_dir / "judge" / "metrics.json").write_text(json.dumps(metrics))
    folders = artifacts.build_artifacts(
        tmp_path_factory.mktemp("release"), "org", "v1", demo_dir, num_rows=NUM_ROWS, judges=["judge"]
    )
    return {folder.name: folder for folder in folders}


@pytest.mark.new_process
def test_every_artefact_is_built(built):
    """Judge, generator, preferences, five metrics and a Space, each of which was verified without the package."""
    kinds = {name: read_kind(folder) for name, folder in built.items()}
    assert kinds == {
        "rewarddance-shapes-judge": "model",
        "shapes-generator": "pipeline",
        "shapes-preferences": "dataset",
        **dict.fromkeys(
            ("gsb", "order_consistency", "preference_accuracy", "reward_calibration", "reward_dynamics"), "metric"
        ),
        "shapes-judge": "space",
    }
    card = (built["rewarddance-shapes-judge"] / "README.md").read_text()
    assert "| org/shapes-preferences (image) | ood | none | 75.0 | 70.0 to 80.0 |" in card
    settings = json.loads((built["shapes-judge"] / "settings.json").read_text())
    assert (settings["judge"], settings["generator"]) == ("org/rewarddance-shapes-judge", "org/shapes-generator")


@pytest.mark.new_process
def test_preferences_are_the_rows_of_the_world(built, tmp_path):
    """Parquet files hold the rows with their pictures inside, in groups that can be streamed."""
    folder = shutil.copytree(built["shapes-preferences"], tmp_path / "elsewhere")
    for split in NUM_ROWS:
        rows = load_dataset(str(folder), "image", split=split, cache_dir=str(tmp_path / "cache"))
        wanted = ShapesPreferences(NUM_ROWS[split], split)
        assert len(rows) == len(wanted)
        assert rows[1]["prompt"] == wanted[1]["prompt"]
        assert rows[1]["rationale"] == wanted[1]["rationale"]
        assert rows[1]["chosen"].tobytes() == wanted[1]["chosen"].tobytes()
    clips = load_dataset(str(folder), "video", split="id", streaming=True)
    first, second = clips.take(2)
    assert len(first["chosen"]) == 4
    assert first["condition"] is None
    assert second["condition"].size == (32, 32)


@pytest.mark.new_process
def test_snippets_of_the_cards_run(built, tmp_path, hub, run_client):
    """The snippets of dataset and generator run against the Hub, where all is public under the tag."""
    for name, folder in built.items():
        kind = REPO_TYPES[read_kind(folder)]
        hub.put(f"org/{name}", folder, kind=kind)
        repository = hub.repositories[kind, f"org/{name}"]
        repository.tags["v1"] = repository.branches["main"]
    blocks = [
        block
        for name in ("shapes-preferences", "shapes-generator")
        for block in code_blocks((built[name] / "README.md").read_text())
    ]
    script = "\n".join(blocks) + "\nimport json\nprint(json.dumps([next(iter(rows))['prompt'], image.size]))"
    assert run_client(script, package=False) == [ShapesPreferences(1)[0]["prompt"], [32, 32]]
