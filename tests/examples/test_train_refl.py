"""The script that tunes a generator, and its configurations."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_refl import tiny_sd3

from rewarddance_hf import RewardDanceForYesScoring
from rewarddance_hf.scripts.tune import load_pipeline, make_monitor
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("refl_*.yaml"))


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_refl", EXAMPLES / "train_refl.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_refl"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def parse(example, config, *arguments):
    return example.make_parser().parse_args_and_config(
        ["--config", str(config), *arguments], fail_with_unknown_args=True
    )


def test_help_can_be_printed(example, capsys):
    """Every help text can be rendered; a lone percent sign in one of them would raise."""
    with pytest.raises(SystemExit, match="0"):
        example.make_parser().parse_args_and_config(["--help"])
    assert "--reward_transform" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_configurations_can_be_parsed(example, config):
    """Every key of every configuration is an argument, and none is lost on the way."""
    wanted = yaml.safe_load(config.read_text(encoding="utf-8"))
    on_cpu = [] if wanted.get("use_cpu") else ["--bf16", "false", "--use_cpu", "true"]
    parsed = parse(example, config, *on_cpu)
    found = {field.name: getattr(part, field.name) for part in parsed for field in dataclasses.fields(part)}
    for key, value in wanted.items():
        if key != "bf16":
            assert str(getattr(found[key], "value", found[key])) == str(value), key


def test_weights_have_the_type_that_the_configuration_names(example, tmp_path):
    """A configuration names the type in words, which diffusers would take for float32: twice the memory, with a warning only."""
    tiny_sd3().save_pretrained(tmp_path)
    config = EXAMPLES / "configs" / "refl_sd35.yaml"
    cpu = ["--model_name_or_path", str(tmp_path), "--bf16", "false", "--use_cpu", "true"]
    _, args, model_args = parse(example, config, *cpu)
    pipeline = load_pipeline(model_args, args.device)
    assert {pipeline.transformer.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("judge_load_in_8bit", ["false", "true"])
def test_the_shapes_run(judge_load_in_8bit, example, tmp_path):
    """Prompts, references, tuning, grids, adapter and card: the whole script on two prompts, and again to resume."""
    if judge_load_in_8bit == "true":
        pytest.importorskip("bitsandbytes")
    model = RewardDanceForYesScoring.from_pretrained(BASE_VLM, paradigm="pairwise")
    model.save_pretrained(tmp_path / "judge")
    judge_processor().save_pretrained(tmp_path / "judge")
    arguments = {
        "judge": tmp_path / "judge",
        "judge_load_in_8bit": judge_load_in_8bit,
        "output_dir": tmp_path / "tuned",
        "num_prompts": 2,
        "num_eval_prompts": 2,
        "num_candidates": 2,
        "num_references": 1,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_steps": 1,
        "sample_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        # Another judge than the one that is tuned against, or the oracle
        "held_out_judge": "oracle" if judge_load_in_8bit == "true" else tmp_path / "judge",
        "held_out_prompts": 2,
        "held_out_steps": 1,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    flags = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    metrics = example.main(*parse(example, EXAMPLES / "configs" / "refl_shapes.yaml", *flags))
    assert 0 <= metrics["oracle_before"] <= 1
    tuned = tmp_path / "tuned"
    assert (tuned / "pytorch_lora_weights.safetensors").exists()
    assert (tuned / "samples" / "step-000002.png").exists()
    looks = [json.loads(line) for line in (tuned / "reward_dynamics.jsonl").read_text().splitlines()]
    assert sum("held_out" in look for look in looks) == 3
    assert "| judge x 1 |" in (tuned / "README.md").read_text()
    again = example.main(
        *parse(example, EXAMPLES / "configs" / "refl_shapes.yaml", *flags, "--resume_from_checkpoint", "true")
    )
    assert again["oracle_after"] == metrics["oracle_after"]


def test_the_oracle_knows_shapes_only(example):
    """Prompts that the oracle cannot read are refused before anything is sampled."""
    script_args, training_args, _ = parse(
        example, EXAMPLES / "configs" / "refl_shapes.yaml", "--dataset_name", "me/prompts"
    )
    with pytest.raises(ValueError, match="the oracle knows only the prompts of 'shapes'"):
        make_monitor(None, script_args, training_args)
