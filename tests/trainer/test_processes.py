"""Training and evaluation by several processes, which share all weights (DDP) or parts of them (FSDP 2), against one process."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from judge_trainings import train
from new_process import run_together

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor
from rewarddance_hf.trainer.sharding import prepare_sharding


TESTS = Path(__file__).parents[1]
CONFIG = TESTS.parent / "examples" / "accelerate_configs" / "fsdp2.yaml"
VISION = "base_model.vision_tower"


def one_process(case, folder, count=2):
    """The case by one process that accumulates the rows of all."""
    return train({**case, "gradient_accumulation_steps": count * case.get("gradient_accumulation_steps", 1)}, folder)


def several_processes(cases, folder, engine, count=2, **environment):
    """Results of cases by name, a list of those of each process. They run one after the other, because starting takes long."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    variables["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    if engine == "fsdp":  # as the launcher sets it
        command = launch_command_parser().parse_args(["--config_file", str(CONFIG), "train.py"])
        settings = prepare_multi_gpu_env(_validate_launch_command(command)[0])
        variables |= {name: value for name, value in settings.items() if "FSDP" in name} | environment
    runs = run_together(TESTS / "judge_trainings.py", folder / "cases.json", folder, count=count, env=variables)
    assert not any(run.returncode for run in runs), "\n".join(run.stderr[-3000:] for run in runs)
    names = [case["name"] for case in cases]
    return {name: [torch.load(folder / f"{name}-{i}.pt", weights_only=False) for i in range(count)] for name in names}


def assert_same(results, want, engine, name, logs=slice(None), tolerance=1e-5):
    """All processes have the weights, losses and evaluations of one, and FSDP has really split every weight."""
    keys = ["loss"] if tolerance > 1e-5 else ["loss", "grad_norm", "accuracy", "margin", "mean_reward", "epoch"]
    for got in results:
        assert "error" not in got, (name, got["error"])
        assert got["sharded"] == (engine == "fsdp"), name
        assert got["weights"].keys() == want["weights"].keys()
        for key, value in want["weights"].items():
            torch.testing.assert_close(
                got["weights"][key], value, atol=tolerance, rtol=tolerance, msg=f"{name}: {key}"
            )
        for ours, theirs in zip(got["logs"][logs], want["logs"][logs], strict=True):
            for key in keys:
                assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=tolerance), (name, key)
        assert len(got["metrics"]) == len(want["metrics"])
        for ours, theirs in zip(got["metrics"], want["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name


def assert_loads(results, folder, other):
    """What FSDP saved has files, configuration and code of one process, and loads with the weights that were trained."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {path.name for path in other.iterdir() if path.is_file()}
    for name in filter(lambda name: name.endswith((".py", "config.json")), files):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    loaded = RewardDanceForYesScoring.from_pretrained(folder)
    weights = {name.replace("base_model.model.", ""): value for name, value in results[0]["weights"].items()}
    for name, value in loaded.named_parameters():
        if "original_module" in name:  # PEFT's copy of a new head before training: never used, never saved
            continue
        assert torch.equal(value, weights[name]), name
    RewardDanceProcessor.from_pretrained(folder)


def compare(cases, folder, engine, count=2):
    """Run cases by several processes and by one."""
    results = several_processes(cases, folder / "several", engine, count)
    for case in cases:
        want = one_process(case, folder / "one", count)
        name = case["name"]
        # bfloat16 products on a CPU depend on where in memory the weights lie.
        assert_same(results[name], want, engine, name, tolerance=1e-3 if "bfloat16" in name else 1e-5)
        seen = [row for batches in zip(*(got["seen"] for got in results[name]), strict=True) for row in batches]
        assert seen[: len(want["seen"])] == want["seen"], name
        if engine == "fsdp":
            assert_loads(results[name], folder / "several" / name, folder / "one" / name)
    return results


@pytest.mark.slow
def test_fsdp_equals_one_process(vlm_folder, tmp_path):
    """Tied weights, rationales on one process only, and an evaluation of 7 rows before and after."""
    case = {"vlm": str(vlm_folder("gemma3")), "rationale": "mixed", "with_rationales": "half", "eval_count": 7}
    results = compare([{"name": "tied", "evaluate_first": True, "max_steps": 1, **case}], tmp_path, "fsdp")
    layers = {"FSDPGemma3DecoderLayer", "FSDPSiglipEncoderLayer"}
    assert results["tied"][0]["units"] >= layers


def test_what_cannot_be_sharded_is_refused():
    """FSDP 1, and buffers in a checkpoint that accelerate would not find where only process 0 has read it."""
    model = torch.nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="`fsdp_version` is 1, but tied and frozen weights need FSDP 2"):
        prepare_sharding(FullyShardedDataParallelPlugin(fsdp_version=1), model)
    with pytest.raises(ValueError, match="has 3 .first: 'running_mean'.. Set it to false"):
        prepare_sharding(FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True), model)
    prepare_sharding(FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False), model)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_every_kind_of_training(engine, vlm_folder, tmp_path):
    """Paradigms, rationales, adapters, frozen parts and precisions."""
    vlm = {"vlm": str(vlm_folder("internvl"))}
    cases = [
        {"name": "pairwise", "rationale": "decision_first", **vlm},
        {"name": "pairwise-lora", "lora": {}, "rationale": "mixed", "with_rationales": "half", **vlm},
        {"name": "no-rationales", "rationale": "reasons_first", "with_rationales": "none", **vlm},
        {"name": "pointwise", "paradigm": "pointwise", "eval_count": 5, **vlm},
        {"name": "pointwise-lora", "paradigm": "pointwise", "lora": {}, "gradient_checkpointing": False, **vlm},
        {"name": "regressive-lora", "paradigm": "regressive", "lora": {}, **vlm},
        {"name": "frozen", "frozen": VISION, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, **vlm},
        {"name": "streamed", "files": 3, "count": 8, **vlm},
        {"name": "bfloat16-base", "lora": {}, "model_init_kwargs": {"dtype": "bfloat16"}, **vlm},
    ]
    results = compare(cases, tmp_path, engine)
    for got in results["bfloat16-base"]:
        assert got["trained types"] == {torch.float32}
        assert got["frozen types"] == {torch.bfloat16}


@pytest.mark.slow
def test_fsdp_of_every_family(vlm_folder, tmp_path):
    """Each family is split by the layers of its language model and its vision tower."""
    families = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm", "glm4v", "idefics3")
    cases = [{"name": f, "vlm": str(vlm_folder(f)), "rationale": "decision_first", "max_steps": 1} for f in families]
    for name, results in compare(cases, tmp_path, "fsdp").items():
        layers = [unit for unit in results[0]["units"] if unit.endswith(("Layer", "Block"))]
        assert len(layers) == 2, (name, results[0]["units"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_resuming_on_another_number_of_processes(engine, vlm_folder, tmp_path):
    """From 2 to 1, from 1 to 2 and from 2 to 2, over the end of an epoch: the run that was not interrupted."""
    adamw = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    settings = {**adamw, "count": 12, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    kinds = {
        "full": {"vlm": str(vlm_folder("gemma3")), **settings},
        "lora": {"vlm": str(vlm_folder("internvl")), "lora": {}, "paradigm": "pointwise", **settings},
    }
    want = {name: one_process({"name": name, **kind}, tmp_path / "one") for name, kind in kinds.items()}
    cases = []
    for name, kind in kinds.items():
        cases.append({"name": name, **kind})
        for start, folder in (("one", "one"), ("two", "two")):
            checkpoint = str(tmp_path / folder / name / "checkpoint-2")
            cases.append({"name": f"{name} from {start}", "resume": checkpoint, **kind})
    results = several_processes(cases, tmp_path / "two", engine)
    for case in cases:
        name = case["name"]
        kind = name.split()[0]
        assert_same(results[name], want[kind], engine, name, slice(-2, None))
    for name, kind in kinds.items():
        checkpoint = str(tmp_path / "two" / name / "checkpoint-2")
        got = one_process({"name": f"{name} from two", "resume": checkpoint, **kind}, tmp_path / "one")
        assert_same([got], want[name], "none", name, slice(-2, None))
        assert got["seen"][:4] == want[name]["seen"][4:8]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_three_processes(engine, vlm_folder, tmp_path):
    """Numbers of rows that three processes cannot share evenly are evaluated once each, fewer than processes too."""
    vlm = {"vlm": str(vlm_folder("internvl")), "count": 12, "max_steps": 1}
    cases = [{"name": f"{count}-rows", "eval_count": count, **vlm} for count in (1, 7)]
    cases.append({"name": "pointwise", "paradigm": "pointwise", "lora": {}, "eval_count": 5, **vlm})
    compare(cases, tmp_path, engine, count=3)


@pytest.mark.slow
def test_shards_in_checkpoints(vlm_folder, tmp_path):
    """With SHARDED_STATE_DICT, the last save is whole all the same, and checkpoints are refused by runs that cannot read them."""
    case = {"vlm": str(vlm_folder("internvl")), "save_strategy": "steps", "save_steps": 1}
    checkpoint = str(tmp_path / "sharded" / "first" / "checkpoint-1")
    cases = [{"name": "first", **case}, {"name": "resumed", "resume": checkpoint, **case}]
    results = several_processes(cases, tmp_path / "sharded", "fsdp", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
    want = one_process({"name": "first", **case}, tmp_path / "one")
    assert_same(results["first"], want, "fsdp", "first")
    assert_same(results["resumed"], want, "fsdp", "resumed", slice(-1, None))
    assert_loads(results["first"], tmp_path / "sharded" / "first", tmp_path / "one" / "first")
    refused = several_processes([{"name": "whole", "resume": checkpoint, **case}], tmp_path / "whole", "fsdp")
    for result in refused["whole"]:
        assert "was written with `fsdp_state_dict_type: SHARDED_STATE_DICT`" in result["error"]
    with pytest.raises(ValueError, match="was written with `fsdp_state_dict_type: SHARDED_STATE_DICT`"):
        one_process({"name": "plain", "resume": checkpoint, **case}, tmp_path / "one")
