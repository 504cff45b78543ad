"""Judges from checkpoints, plain models and adapters."""

import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi, constants
from new_process import run_python
from peft import LoraConfig, get_peft_model
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.availability import check_available
from rewarddance_hf.shapes.models import BASE_VLM


SAMPLE, REFERENCE = random_image(0), random_image(1)


def rewards(scorer):
    return scorer.score([SAMPLE], "a red circle", [REFERENCE] if scorer.is_pairwise else None)


def save_adapter(vlm_folder, folder, family="internvl", with_config=True, with_processor=True, **settings):
    """Save an adapter with random weights; give the rewards that it should have."""
    base = vlm_folder(family)
    words = {"yes_word": "Yes", "no_word": "No"}
    processor = RewardDanceProcessor.from_pretrained(base, **(words if with_processor else {}))
    torch.manual_seed(0)
    model = RewardDanceForYesScoring.from_pretrained(base, **settings)
    model.config.yes_token_id = model.config.no_token_id = None
    model.check_processor(processor)
    head = ["score"] if model.config.paradigm == "regressive" else None
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=head))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if with_config:
        model.config.save_pretrained(folder)
    if with_processor:
        processor.save_pretrained(folder)
    return rewards(RewardDanceScorer(model, processor))


def test_checkpoint_and_plain_model(vlm_folder, tmp_path):
    """A plain model is a zero-shot judge, and a saved judge scores the same, with frozen weights."""
    scorer = RewardDanceScorer.from_pretrained(vlm_folder("internvl"), batch_size=3, score_normalization="yes_no")
    assert scorer.batch_size == 3
    assert scorer.model.config.score_normalization == "yes_no"
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    scorer.save_pretrained(tmp_path / "judge")
    loaded = RewardDanceScorer.from_pretrained(tmp_path / "judge")
    assert loaded.model.config.score_normalization == "yes_no"
    assert torch.equal(rewards(loaded), rewards(scorer))


def test_dtype_is_passed_on(vlm_folder):
    """Weights are loaded in the wanted type; rewards are float32 all the same."""
    scorer = RewardDanceScorer.from_pretrained(vlm_folder("internvl"), dtype=torch.bfloat16)
    assert scorer.model.dtype == torch.bfloat16
    assert rewards(scorer).dtype == torch.float32


@pytest.mark.parametrize("paradigm", ["pairwise", "pointwise", "regressive"])
def test_adapter_with_configuration(vlm_folder, tmp_path, paradigm):
    """Paradigm, temperature, answer words and the scalar head come from the adapter's folder, not from its base model."""
    want = save_adapter(vlm_folder, tmp_path, paradigm=paradigm, score_temperature=2.0)
    scorer = RewardDanceScorer.from_pretrained(tmp_path)
    assert scorer.model.config.paradigm == paradigm
    assert scorer.model.config.score_temperature == 2.0
    assert scorer.processor.yes_word == "Yes"
    torch.testing.assert_close(rewards(scorer), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "gemma3"])
def test_bare_adapter(vlm_folder, tmp_path, family):
    """An adapter without configuration and processor takes those of its base model."""
    want = save_adapter(vlm_folder, tmp_path, family, with_config=False, with_processor=False)
    torch.testing.assert_close(rewards(RewardDanceScorer.from_pretrained(tmp_path)), want, rtol=1e-5, atol=1e-7)


def test_adapter_with_processor_only(vlm_folder, tmp_path):
    """Without a configuration the answer tokens are those of the adapter's processor."""
    want = save_adapter(vlm_folder, tmp_path, with_config=False)
    torch.testing.assert_close(rewards(RewardDanceScorer.from_pretrained(tmp_path)), want, rtol=1e-5, atol=1e-7)


def test_configuration_arguments_reach_an_adapter(vlm_folder, tmp_path):
    """Arguments win over the adapter's configuration."""
    save_adapter(vlm_folder, tmp_path, score_temperature=2.0)
    scorer = RewardDanceScorer.from_pretrained(tmp_path, score_temperature=3.0, score_normalization="yes_no")
    assert scorer.model.config.score_temperature == 3.0
    assert scorer.model.config.score_normalization == "yes_no"


def test_adapter_is_saved_with_its_configuration(vlm_folder, tmp_path):
    """An adapter that was loaded, calibrated and saved stays an adapter and keeps its temperature."""
    save_adapter(vlm_folder, tmp_path / "first", paradigm="regressive")
    scorer = RewardDanceScorer.from_pretrained(tmp_path / "first")
    scorer.model.config.score_temperature = 5.0
    scorer.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second" / "model.safetensors").exists()
    loaded = RewardDanceScorer.from_pretrained(tmp_path / "second")
    assert loaded.model.config.score_temperature == 5.0
    assert torch.equal(rewards(loaded), rewards(scorer))


def test_adapter_without_its_weights(vlm_folder, tmp_path):
    """Weights that the adapter announces and lacks would be random numbers."""
    from safetensors.torch import load_file, save_file

    save_adapter(vlm_folder, tmp_path, paradigm="regressive")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights that its `adapter_config.json` announces"):
        RewardDanceScorer.from_pretrained(tmp_path)


def test_adapter_without_base_model(vlm_folder, tmp_path):
    """An adapter has to say what it adapts."""
    save_adapter(vlm_folder, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="`base_model_name_or_path` in `adapter_config.json`"):
        RewardDanceScorer.from_pretrained(tmp_path)


def test_random_scalar_head_is_refused(vlm_folder, tmp_path):
    """A plain model has no scalar head, neither has an adapter without it: their scores would be random."""
    with pytest.raises(ValueError, match="has no weights of the scalar head"):
        RewardDanceScorer.from_pretrained(vlm_folder("internvl"), paradigm="regressive")
    save_adapter(vlm_folder, tmp_path)
    with pytest.raises(ValueError, match="has no weights of the scalar head"):
        RewardDanceScorer.from_pretrained(tmp_path, paradigm="regressive")


def test_whole_checkpoint_beside_an_adapter_file(vlm_folder, tmp_path):
    """A folder that holds all weights is loaded as such, whatever else lies there."""
    shutil.copytree(vlm_folder("internvl"), tmp_path / "judge")
    want = rewards(RewardDanceScorer.from_pretrained(tmp_path / "judge"))
    save_adapter(vlm_folder, tmp_path / "adapter", with_config=False, with_processor=False)
    for file in (tmp_path / "adapter").glob("adapter*"):
        shutil.copy(file, tmp_path / "judge")
    assert not torch.equal(rewards(RewardDanceScorer.from_pretrained(tmp_path / "adapter")), want)
    # transformers puts the adapter on the weights beside it.
    got = rewards(RewardDanceScorer.from_pretrained(tmp_path / "judge"))
    assert torch.equal(got, rewards(RewardDanceScorer.from_pretrained(tmp_path / "adapter")))


def test_a_saved_judge_keeps_its_card(vlm_folder, tmp_path):
    """What is saved with a fitted temperature used to lose the record of its training and its base model."""
    for name, text in (
        ("judge", "---\nbase_model: org/vlm\ntags: [rewarddance]\n---\n"),
        ("vlm", "another model's card"),
    ):
        shutil.copytree(vlm_folder("internvl"), tmp_path / name)
        (tmp_path / name / "README.md").write_text(text)
        RewardDanceScorer.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-saved")
    assert (tmp_path / "judge-saved" / "README.md").read_text() == (tmp_path / "judge" / "README.md").read_text()
    assert not (tmp_path / "vlm-saved" / "README.md").exists()


def test_a_mistyped_folder_is_named_at_once(tmp_path, monkeypatch):
    """Without a network, three minutes of retries ended in a message that did not name the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "shapes_judge").mkdir(parents=True)
    for load in (RewardDanceScorer.from_pretrained, check_available):
        with pytest.raises(
            OSError, match=r"'outputs/shapes_jugde' is no folder here, .* Did you mean 'outputs/shapes_judge'"
        ):
            load("outputs/shapes_jugde")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("rewarddance_hf.availability.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(
        OSError, match="'nobody/nothing' is no folder here, not in the cache, and http://127.0.0.1:9 cannot be"
    ):
        check_available("nobody/nothing")


@pytest.mark.new_process
def test_device_map_without_accelerate():
    """A core install has no accelerate: `device_map="auto"` is then one device, and no error."""
    code = f"""
import sys
sys.modules["accelerate"] = None
from rewarddance_hf import RewardDanceScorer
for device_map in ("auto", "cpu"):
    scorer = RewardDanceScorer.from_pretrained({str(BASE_VLM)!r}, device_map=device_map)
    print(scorer.model.device)
"""
    done = run_python("-c", code)
    assert done.stdout.split() == ["cpu", "cpu"], done.stderr[-2000:]
