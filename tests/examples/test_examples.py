"""Examples run as a user would run them."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from new_process import run_python, run_together

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor
from rewarddance_hf.scripts.train import load_rows
from rewarddance_hf.shapes.demo import GENERATED_PROMPTS
from rewarddance_hf.shapes.models import JUDGE_BASE


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


SCRIPT = str(EXAMPLES / "train_reward_model.py")
SHAPES_CONFIG = ["--config", str(EXAMPLES / "configs" / "shapes.yaml")]
COMMON = {"learning_rate": "0.05", "warmup_steps": "0", "optim": "sgd", "max_grad_norm": "0"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a judge that one process trained, with two batches of 4 rows for each update. Read only."""
    folder = tmp_path_factory.mktemp("trained")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", SCRIPT]
    done = run_python(
        *launch, *SHAPES_CONFIG, *arguments(folder, gradient_accumulation_steps="2", **COMMON), env=ON_CPU
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


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


def test_training_and_evaluation_scripts(trained, tmp_path):
    """`accelerate launch` trains a judge that the evaluation script can load."""
    assert (trained / "README.md").exists()
    evaluation = load_example("evaluate_reward_model")
    metrics = evaluation.main(
        evaluation.EvaluationArguments(str(trained), "shapes:id", limit=8, calibrate_to=str(tmp_path / "fitted"))
    )
    assert 0 <= metrics["accuracy"] <= 1
    fitted = RewardDanceForYesScoring.from_pretrained(tmp_path / "fitted")
    assert fitted.config.score_temperature != 1.0


def test_rows_of_a_generator(trained, tmp_path, monkeypatch):
    """Half of the rows are pairs of the generator's samples, which a second run reads; the judge is asked as it was before."""
    monkeypatch.setitem(GENERATED_PROMPTS, "id", 8)
    example = load_example("train_reward_model")
    config = ["--config", str(EXAMPLES / "configs" / "shapes_generated.yaml")]
    changes = {"model_name_or_path": str(trained), "shapes_prompts": "8", "shapes_rows": "8"}
    flags = [*config, *arguments(tmp_path, **changes)]
    example.main(*example.make_parser().parse_args_and_config(flags))
    pairs = datasets.Dataset.from_file(str(tmp_path / "pairs_train_8" / "pairs.arrow"))
    written = (tmp_path / "pairs_train_8" / "pairs.arrow").stat().st_mtime_ns
    script_args, training_args, _ = example.make_parser().parse_args_and_config(flags)
    training_args.eval_strategy = "steps"
    rows, evaluation = load_rows(script_args, training_args)
    assert (tmp_path / "pairs_train_8" / "pairs.arrow").stat().st_mtime_ns == written
    assert len(rows) == 8
    prompts = {row["prompt"] for row in pairs}
    assert all(rows[index]["prompt"] in prompts for index in range(4, 8))
    assert any(rows[index]["prompt"] not in prompts for index in range(4))
    assert list(evaluation) == ["id", "ood", "generated"]
    assert not prompts & set(evaluation["generated"]["prompt"])
    layouts = {RewardDanceProcessor.from_pretrained(folder).prompt_layout for folder in (trained, tmp_path)}
    assert layouts == {"text_after_each"}


def test_two_processes_equal_one(trained, tmp_path):
    """Two processes with 4 rows each make the same steps as one process that accumulates two batches of 4 rows."""
    runs = run_together(SCRIPT, *SHAPES_CONFIG, *arguments(tmp_path, **COMMON), env=ON_CPU)
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr[-3000:]
    first, second = (RewardDanceForYesScoring.from_pretrained(folder) for folder in (trained, tmp_path))
    start = RewardDanceForYesScoring.from_pretrained(JUDGE_BASE)
    moved = 0.0
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)
        moved = max(moved, float((value - start.state_dict()[name]).abs().max()))
    assert moved > 1e-3
