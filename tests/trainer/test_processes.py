"""Training and evaluation by several processes, which share all weights (DDP) or parts of them (FSDP 2), against one process."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from judge_trainings import train
from new_process import run_python, run_together
from transformers.conversion_mapping import get_model_conversion_mapping

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceTrainingArguments
from rewarddance_hf.memory.report import GIB, Count, on_each_gpu
from rewarddance_hf.trainer.sharding import check_engine, forget_unused_renamings, prepare_sharding


TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
ENGINES = {"fsdp": "fsdp2", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3"}
VISION = "base_model.vision_tower"


def one_process(case, folder, count=2):
    """The case by one process that accumulates the rows of all."""
    return train({**case, "gradient_accumulation_steps": count * case.get("gradient_accumulation_steps", 1)}, folder)


def launched(engine):
    """What the launcher sets in the environment for the configuration of an engine."""
    if engine == "ddp":
        return {}
    config = EXAMPLES / "accelerate_configs" / f"{ENGINES[engine]}.yaml"
    command = ["--config_file", str(config), "--mixed_precision", "no", "--main_process_port", "0", "train.py"]
    args, settings, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if engine == "fsdp":
        return {name: value for name, value in prepare_multi_gpu_env(args).items() if "FSDP" in name}
    args.deepspeed_fields_from_accelerate_config = ",".join(settings.deepspeed_config)
    settings = {name: value for name, value in prepare_deepspeed_cmd_env(args)[1].items() if "ACCELERATE" in name}
    return settings | {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}


def several_processes(cases, folder, engine, count=2, **environment):
    """Results of cases by name, a list of those of each process. They run one after the other, because starting takes long."""
    folder.mkdir(parents=True, exist_ok=True)
    # DeepSpeed finds the CPU by itself.
    on_cpu = {"use_cpu": False, "ddp_backend": "gloo"} if engine.startswith("zero") else {}
    (folder / "cases.json").write_text(json.dumps([{**case, **on_cpu} for case in cases]))
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", **launched(engine), **environment}
    variables["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    runs = run_together(TESTS / "judge_trainings.py", folder / "cases.json", folder, count=count, env=variables)
    assert not any(run.returncode for run in runs), "\n".join(run.stderr[-3000:] for run in runs)
    names = [case["name"] for case in cases]
    return {name: [torch.load(folder / f"{name}-{i}.pt", weights_only=False) for i in range(count)] for name in names}


def assert_same(results, want, engine, name, logs=slice(None), tolerance=1e-5):
    """All processes have the weights, losses and evaluations of one, and FSDP and ZeRO-3 have really split every weight."""
    keys = ["loss"] if tolerance > 1e-5 else ["loss", "grad_norm", "accuracy", "margin", "mean_reward", "epoch"]
    for got in results:
        assert "error" not in got, (name, got["error"])
        assert got["sharded"] == (engine in ("fsdp", "zero3")), name
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
    """What an engine saved has files, configuration and code of one process, and loads with the weights that were trained."""
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {path.name for path in other.iterdir() if path.is_file()}
    for name in filter(lambda name: name.endswith((".py", "config.json")), files):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    loaded = RewardDanceForYesScoring.from_pretrained(folder)
    weights = {name.replace("base_model.model.", ""): value for name, value in results[0]["weights"].items()}
    for name, value in loaded.named_parameters():
        if "original_module" in name:  # PEFT's copy of a new head before training: never used, never saved
            continue
        assert torch.equal(value, weights[name].to(value.dtype)), name  # adapters take the type of their base model
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
        if engine != "ddp":
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


def test_unused_renamings_are_forgotten(vlm_folder):
    """Under ZeRO-3 transformers keeps all renamings of weights with a model, also those that loading has not used."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    used = model._weight_conversions
    model._weight_conversions = [*used, *get_model_conversion_mapping(model)]
    assert len(model._weight_conversions) > len(used)
    forget_unused_renamings(model)
    assert model._weight_conversions == used


@pytest.mark.parametrize("engine", ["FSDP", "DeepSpeed"])
def test_another_engine_than_was_asked_for_is_told(engine, tmp_path, monkeypatch, caplog):
    """accelerate passes over what it cannot do on a CPU."""
    args = RewardDanceTrainingArguments(str(tmp_path), use_cpu=True)
    accelerator = Accelerator(cpu=True)
    with caplog.at_level("WARNING", logger="transformers"):
        check_engine(accelerator, args)
        assert not caplog.text
        monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
        check_engine(accelerator, args)
    assert f"{engine} was asked for, but accelerate runs NO (1 process on cpu): nothing is split" in caplog.text
    # As a launcher with a configuration for GPUs starts processes: accelerate takes each for the only one.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError, match="2 processes were launched, but each takes itself for the only one"):
        check_engine(accelerator, args)


def launch(script, recipe, output, *flags):
    """Two processes of an example by `accelerate launch` with the configuration for FSDP 2."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "accelerate_configs" / "fsdp2.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]
    recipe = ["--config", EXAMPLES / "configs" / f"{recipe}.yaml", "--output_dir", output, "--report_to", "none"]
    return run_python(*launcher, EXAMPLES / script, *recipe, *flags)


@pytest.mark.slow
@pytest.mark.new_process
def test_launched_with_another_engine_than_runs(tmp_path):
    """
    On a CPU with a configuration for FSDP: judges are trained by plain data parallelism, and one process says so; generators are
    refused, and so are processes that do not know of each other.
    """
    few = ["--shapes_rows", "16", "--max_steps", "1", "--eval_strategy", "no", "--per_device_train_batch_size", "2"]
    done = launch("train_reward_model.py", "shapes", tmp_path / "judge", *few)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("FSDP was asked for, but accelerate runs MULTI_CPU (2 processes on cpu)") == 1
    apart = launch("train_reward_model.py", "shapes", tmp_path / "apart", *few, "--use_cpu", "false")
    assert apart.returncode == 1
    assert "2 processes were launched, but each takes itself for the only one" in apart.stderr
    refused = launch("train_refl.py", "refl_shapes", tmp_path / "generator")
    assert refused.returncode == 1
    assert "FSDP was asked for, but the pipeline calls its denoiser outside of its wrapper" in refused.stderr


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
def test_processes_hold_what_is_estimated(vlm_folder, tmp_path):
    """Weights, gradients and states of the optimizer: the shares of two processes are those of `rewarddance estimate`."""
    common = {"vlm": str(vlm_folder("internvl")), "optim": "adamw_torch", "max_steps": 1}
    cases = [
        {"name": "all", **common},
        {"name": "frozen", "frozen": VISION, **common},
        {"name": "lora", "lora": {}, "model_init_kwargs": {"dtype": "bfloat16"}, **common},
    ]
    for name, results in several_processes(cases, tmp_path, "fsdp").items():
        sizes = results[0]["sizes"]
        parts = {
            "weights": sizes["frozen bytes"] / GIB,
            "activations": 0.0,
            **({"adapter": 0.0} if name == "lora" else {}),
        }
        share = on_each_gpu(Count(parts, sizes["all"], sizes["trained"]), "fsdp2", len(results)).parts
        for part in ("weights", "gradients", "optimizer"):
            held = [got["bytes"][part] / GIB for got in results]
            assert sum(held) / len(held) == pytest.approx(share[part], rel=0.01), (name, part)
            assert max(held) < 1.1 * share[part], (name, part)


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
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: `make test-deepspeed`")
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_equals_one_process(engine, vlm_folder, tmp_path):
    """All weights, tied ones, adapters and frozen parts; runs resume, but not under another engine."""
    adamw = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    common = {"vlm": str(vlm_folder("internvl")), **adamw}
    saves = {"count": 12, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    cases = [
        {"name": "tied", "rationale": "mixed", "with_rationales": "half", **common, "vlm": str(vlm_folder("gemma3"))},
        {"name": "pointwise", "paradigm": "pointwise", "eval_count": 5, **common},
        {"name": "regressive-lora", "paradigm": "regressive", "lora": {}, **common},
        {"name": "frozen", "frozen": VISION, "gradient_accumulation_steps": 2, **common},
        {"name": "bfloat16-base", "lora": {}, "model_init_kwargs": {"dtype": "bfloat16"}, **common},
        {"name": "full", **saves, **common},
        {"name": "lora", "lora": {}, **saves, **common},
    ]
    if engine == "zero3":  # which holds and computes all in one type
        cases = [case for case in cases if case["name"] != "bfloat16-base"]
    results = compare(cases, tmp_path, engine)
    for name in ("full", "lora"):
        case = next(case for case in cases if case["name"] == name)
        checkpoint = str(tmp_path / "several" / name / "checkpoint-2")
        resumed = several_processes(
            [{**case, "name": "again", "resume": checkpoint}], tmp_path / f"again-{name}", engine
        )
        assert_same(resumed["again"], results[name][0], engine, name, slice(-2, None))
        with pytest.raises(ValueError, match="or by DeepSpeed. Resume under DeepSpeed"):
            one_process({**case, "name": "plain", "resume": checkpoint}, tmp_path / "one")
        RewardDanceForYesScoring.from_pretrained(checkpoint)
        for got in results[name]:  # half of the two moments
            assert got["bytes"]["optimizer"] == pytest.approx(got["sizes"]["trained"] * 8 / 2, rel=0.01)


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
