"""Examples run as a user would run them."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from new_process import run_python, run_together

from rewarddance_hf import RewardDanceForYesScoring


EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(path for path in (EXAMPLES / "configs").glob("*.yaml") if not path.name.startswith("refl_"))


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ON_CPU = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def arguments(output_dir: Path, **changes: str) -> list[str]:
    settings = {
        "output_dir": str(output_dir),
        "max_steps": "2",
        "per_device_train_batch_size": "4",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": "1",
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def shapes_config():
    return ["--config", str(EXAMPLES / "configs" / "shapes.yaml")]


def test_help_can_be_printed(capsys):
    """Every help text can be rendered; a lone percent sign in one of them would raise."""
    parser = load_example("train_reward_model").make_parser()
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args_and_config(["--help"])
    assert "--rationale_weight" in capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_configurations_can_be_parsed(config):
    """Every key of every configuration is an argument, and none is lost on the way."""
    example = load_example("train_reward_model")
    wanted = yaml.safe_load(config.read_text(encoding="utf-8"))
    on_cpu = [] if wanted.get("use_cpu") else ["--bf16", "false", "--use_cpu", "true"]
    parsed = example.make_parser().parse_args_and_config(
        ["--config", str(config), *on_cpu], fail_with_unknown_args=True
    )
    found = {field.name: getattr(part, field.name) for part in parsed for field in dataclasses.fields(part)}
    for key, value in wanted.items():
        if key != "bf16":
            assert str(getattr(found[key], "value", found[key])) == str(value), key


def test_training_and_evaluation_scripts(tmp_path, shapes_config):
    """`accelerate launch` trains a judge that the evaluation script can load."""
    script = str(EXAMPLES / "train_reward_model.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script]
    command = [*launch, *shapes_config, *arguments(tmp_path / "judge")]
    done = subprocess.run(command, capture_output=True, text=True, env=ON_CPU, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "judge" / "README.md").exists()
    evaluation = load_example("evaluate_reward_model")
    metrics = evaluation.main(
        evaluation.EvaluationArguments(
            str(tmp_path / "judge"), "shapes:id", limit=8, calibrate_to=str(tmp_path / "fitted")
        )
    )
    assert 0 <= metrics["accuracy"] <= 1
    fitted = RewardDanceForYesScoring.from_pretrained(tmp_path / "fitted")
    assert fitted.config.score_temperature != 1.0


def test_rows_of_a_generator(tmp_path):
    """Half of the rows are pairs of the generator's samples, which a second run reads instead of sampling them again."""
    example = load_example("train_reward_model")
    config = ["--config", str(EXAMPLES / "configs" / "shapes_generated.yaml")]
    changes = {"model_name_or_path": str(load_base()), "shapes_prompts": "8", "shapes_rows": "8"}
    flags = [*config, *arguments(tmp_path, **changes)]
    example.main(*example.make_parser().parse_args_and_config(flags))
    pairs = datasets.load_from_disk(tmp_path / "pairs_train_8")
    written = (tmp_path / "pairs_train_8" / "state.json").stat().st_mtime_ns
    script_args, training_args, _ = example.make_parser().parse_args_and_config(flags)
    training_args.eval_strategy = "steps"
    rows, evaluation = example.load_rows(script_args, training_args)
    assert (tmp_path / "pairs_train_8" / "state.json").stat().st_mtime_ns == written
    assert len(rows) == 8
    prompts = {row["prompt"] for row in pairs}
    assert all(rows[index]["prompt"] in prompts for index in range(4, 8))
    assert any(rows[index]["prompt"] not in prompts for index in range(4))
    assert list(evaluation) == ["id", "ood", "generated"]
    assert not prompts & set(evaluation["generated"]["prompt"])


def test_two_processes_equal_one(tmp_path, shapes_config):
    """Two processes with 4 rows each make the same steps as one process that accumulates two batches of 4 rows."""
    script = str(EXAMPLES / "train_reward_model.py")
    common = {"learning_rate": "0.05", "warmup_steps": "0", "optim": "sgd", "max_grad_norm": "0"}
    one = arguments(tmp_path / "one", gradient_accumulation_steps="2", **common)
    runs = [run_python(script, *shapes_config, *one, env=ON_CPU)]
    two = arguments(tmp_path / "two", **common)
    runs += run_together(script, *shapes_config, *two, env=ON_CPU)
    assert [run.returncode for run in runs] == [0, 0, 0], runs[-1].stderr[-3000:]
    first, second = (RewardDanceForYesScoring.from_pretrained(tmp_path / name) for name in ("one", "two"))
    start = RewardDanceForYesScoring.from_pretrained(load_base())
    moved = 0.0
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)
        moved = max(moved, float((value - start.state_dict()[name]).abs().max()))
    assert moved > 1e-3


def load_base() -> Path:
    from rewarddance_hf.shapes.models import BASE_VLM

    return BASE_VLM
