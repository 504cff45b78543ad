"""What is released of the shapes world: every folder is whole, verified, and can be read by repository ID."""

import json
import shutil

import pytest
import torch
from datasets import load_dataset
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from snippets import code_blocks

from rewarddance_hf.alignment.refl.weights import LORA_FILE
from rewarddance_hf.hub.clean_process import check_metric
from rewarddance_hf.hub.release import REPO_TYPES
from rewarddance_hf.hub.verification import read_kind, verify_release
from rewarddance_hf.models import RewardDanceForYesScoring
from rewarddance_hf.shapes import release as artifacts
from rewarddance_hf.shapes.edits import ShapesEdits
from rewarddance_hf.shapes.generator import load_generator
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.shapes.preferences import ShapesPreferences


pytest.importorskip("evaluate", reason="needs evaluate: `pip install rewarddance_hf[metrics]`")

NUM_ROWS = {"train": 12, "id": 4, "ood": 4}
NUMBERS = {"accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8, "accuracy_with_ties": 0.75, "num_rows": 9.0}


def verify(folder):
    """Of the metrics only one is verified in a process of its own, which would import `evaluate` each time."""
    if read_kind(folder) == "metric" and folder.name != "preference_accuracy":
        return check_metric(str(folder), None)
    return verify_release(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory, quick_verification):
    """All folders by name, with an untrained judge and random adapters in the place of the demo's. Read only."""
    demo_dir = tmp_path_factory.mktemp("demo")
    for number, name in enumerate(("hacked", "tuned")):
        torch.manual_seed(number)
        transformer = load_generator().transformer
        transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False))
        StableDiffusion3Pipeline.save_lora_weights(demo_dir / name, get_peft_model_state_dict(transformer))
    RewardDanceForYesScoring.from_pretrained(BASE_VLM).save_pretrained(demo_dir / "judge")
    judge_processor().save_pretrained(demo_dir / "judge")
    metrics = {f"judge/{split}/{key}": value for split in ("id", "ood") for key, value in NUMBERS.items()}
    metrics |= {"judge/id/num_ties": 0.0, "judge/ood/num_ties": 0.0, "judge/generated/accuracy": 0.5}
    (demo_dir / "judge" / "metrics.json").write_text(json.dumps(metrics))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "verify_release", verify)
        folders = artifacts.build_artifacts(
            tmp_path_factory.mktemp("release"), "org", "v1", demo_dir, num_rows=NUM_ROWS, judges=["judge"]
        )
    folders = {folder.name: folder for folder in folders}
    released, tuned = folders["shapes-generator-refl"] / LORA_FILE, demo_dir / "tuned" / LORA_FILE
    assert released.read_bytes() == tuned.read_bytes()
    return folders


@pytest.mark.new_process
def test_every_artefact_is_built(built):
    """Judge, generator, its adapter, preferences, metrics and a Space, each of which was verified without the package."""
    kinds = {name: read_kind(folder) for name, folder in built.items()}
    assert kinds == {
        "rewarddance-shapes-judge": "model",
        "shapes-generator": "pipeline",
        "shapes-generator-refl": "adapter",
        "shapes-preferences": "dataset",
        **dict.fromkeys(
            ("gsb", "order_consistency", "preference_accuracy", "reward_calibration", "reward_dynamics"), "metric"
        ),
        "shapes-judge": "space",
    }
    card = (built["rewarddance-shapes-judge"] / "README.md").read_text()
    assert "| org/shapes-preferences (image) | ood | none | 75.0 | 70.0 to 80.0 |" in card
    assert "| samples of org/shapes-generator, compared by the oracle | apache-2.0 |" in card
    settings = json.loads((built["shapes-judge"] / "settings.json").read_text())
    assert (settings["judge"], settings["generator"]) == ("org/rewarddance-shapes-judge", "org/shapes-generator")


@pytest.mark.new_process
def test_preferences_are_the_rows_of_the_world(built, tmp_path):
    """Parquet files hold the rows with their images inside, in groups that can be streamed."""
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
    (edit,) = load_dataset(str(folder), "editing", split="ood", streaming=True).take(1)
    assert edit["task"] == "image-editing"
    assert edit["condition"].tobytes() == ShapesEdits(1, "ood")[0]["condition"].tobytes()


@pytest.mark.new_process
def test_snippets_of_the_cards_run(built, tmp_path, hub, run_client):
    """Each kind can be pushed, dataset and Space be verified by ID; the snippets of the cards run, and a metric loads."""
    push = """
import json, sys
from rewarddance_hf.hub.release import push_release
from rewarddance_hf.hub.verification import verify_release

seen = {}
for folder in sys.argv[1:]:
    repo_id = "org/" + folder.rpartition("/")[2]
    assert push_release(folder, repo_id, "v1").added, folder
    assert push_release(folder, repo_id, "v1").is_released, folder
    if repo_id in ("org/shapes-preferences", "org/shapes-judge"):
        seen[repo_id] = verify_release(repo_id, "v1")
print(json.dumps(seen))
"""
    names = [
        "rewarddance-shapes-judge",
        "shapes-generator",
        "shapes-generator-refl",
        "shapes-preferences",
        "shapes-judge",
        "preference_accuracy",
    ]
    seen = run_client(push, *(built[name] for name in names))
    assert set(seen["org/shapes-preferences"]["prompts"]) == {
        f"{config}/{split}" for config in ("image", "video", "editing") for split in NUM_ROWS
    }
    for name in names:
        repository = hub.repositories[REPO_TYPES[read_kind(built[name])], f"org/{name}"]
        assert not repository.private
    blocks = [
        block
        for name in ("shapes-preferences", "shapes-generator-refl")
        for block in code_blocks((built[name] / "README.md").read_text())
    ]
    metric = """
import json
import evaluate
metric = evaluate.load("org/preference_accuracy", revision="v1")
accuracy = metric.compute(predictions=[0.9, 0.2], references=[1, 1])["accuracy"]
print(json.dumps([next(iter(rows))["prompt"], image.size, accuracy]))
"""
    script = "\n".join(blocks) + metric
    assert run_client(script, token=None, package=False) == [ShapesPreferences(1)[0]["prompt"], [32, 32], 0.5]
