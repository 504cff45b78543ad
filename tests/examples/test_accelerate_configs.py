"""Configurations of accelerate: the launcher reads each of them, and gives the trainer what it needs."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env


FOLDER = Path(__file__).parents[2] / "examples" / "accelerate_configs"
KINDS = {
    "single_gpu": (DistributedType.NO, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 8),
    "fsdp2": (DistributedType.FSDP, 8),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, 8),
    "deepspeed_zero3": (DistributedType.DEEPSPEED, 8),
}


def test_the_launcher_reads_each():
    """The parser of accelerate, which refuses keys that it does not know, finds the engine and bfloat16."""
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)
    for name, (kind, count) in KINDS.items():
        config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
        assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, count, "bf16"), name
        assert not config.use_cpu


def test_fsdp2_is_what_the_trainer_needs():
    """
    FSDP 2 by layers; whole weights in checkpoints, which `from_pretrained` and other numbers of processes read; activations
    left to `gradient_checkpointing`, beside which the trainer refuses FSDP's own.
    """
    file = str(FOLDER / "fsdp2.yaml")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "train.py"]))
    environment = prepare_multi_gpu_env(args)
    wanted = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }
    assert {name: environment.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_stages(stage):
    """Stage 3 makes weights in pieces from the start and joins them in what is saved, which would be empty otherwise."""
    settings = yaml.safe_load((FOLDER / f"deepspeed_zero{stage}.yaml").read_text())["deepspeed_config"]
    assert settings["zero_stage"] == stage
    assert settings["zero3_init_flag"] == settings.get("zero3_save_16bit_model", False) == (stage == 3)
