"""
Every file of `examples/` as it ships: recipes are read from the repository and run by the command in their first lines, from a
folder that is not the checkout, on tiny models and small datasets under the very names that they use. Changed are only numbers
of steps, batches and sizes (`sizes_of`), and what a machine without a GPU has to be told (`WITHOUT_GPU`).
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dataset_layouts import STRING, encoded, hpdv3, parquet
from datasets import Image
from hub_server import LoopbackHub
from new_process import run_python
from tiny_hub import OF_OTHER_SIZES, fill


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = {path.stem: path for path in sorted((EXAMPLES / "configs").glob("*.yaml"))}
ON_HUB = (
    "internvl_open_image_preferences",
    "internvl_editreward",
    "refl_flux_dev",
    "refl_flux_kontext",
    "refl_qwen_image",
    "refl_sd35",
    "refl_wan_t2v",
)
# As the first of those on the Hub, but for the model and how many rows are seen at once
BY_SIZE = ("internvl3_5_1b", "internvl3_5_4b", "internvl3_5_8b", "internvl3_5_38b", "qwen3_vl_8b")
# In the order in which one goes on with what another has saved
SHAPES = ("shapes", "shapes_generated", "refl_shapes", "shapes_video", "shapes_edits")
# What is run elsewhere, or cannot be run.
ELSEWHERE = {
    "context_scaling.py": "tests/examples/test_context_scaling.py, on tiny numbers: it takes minutes to hours",
    "distill_rationales.py": "tests/examples/test_distill_rationales.py, with tiny teachers",
    "images/draw_ranking.py": "nowhere: it needs the judge of `make demo`, and draws the picture of the README",
    "flow_factory_reward.py": "tests/examples/test_serving_examples.py",
    "train_prompt_writer_grpo.py": "tests/examples/test_serving_examples.py",
    "quickstart.ipynb": "tests/examples/test_quickstart.py",
    "score_with_datatrove.py": "tests/examples/test_score_with_datatrove.py",
    "search_at_test_time.py": "tests/examples/test_search_example.py, on tiny numbers",
    "train_judge_grpo.py": "tests/examples/test_train_judge_grpo.py",
    **{
        f"accelerate_configs/{path.name}": "tests/examples/test_accelerate_configs.py, which reads it: it needs GPUs"
        for path in (EXAMPLES / "accelerate_configs").iterdir()
    },
    **{
        path.relative_to(
            EXAMPLES
        ).as_posix(): "tests/examples/test_paper.py, on tiny numbers: it takes an hour and more"
        for ending in ("py", "yaml")
        for path in (EXAMPLES / "paper").rglob(f"*.{ending}")
    },
}
HERE = {
    *(f"configs/{name}.yaml" for name in (*ON_HUB, *BY_SIZE, *SHAPES)),
    "train_reward_model.py",
    "train_refl.py",
    "evaluate_reward_model.py",
    "reward_gradient.py",
}
# On a GPU bfloat16 is computed in by default.
WITHOUT_GPU = {"use_cpu": "true", "bf16": "true"}
BFLOAT16 = "bfloat16"


def command_of(recipe: str) -> list[str]:
    """Command in the first lines of a recipe that names it, without its launcher."""
    text = RECIPES[recipe].read_text(encoding="utf-8")
    (line, *_) = re.findall(rf"^# (?:accelerate|python) .*?(\S+\.py .*{recipe}\.yaml.*)$", text, re.MULTILINE)
    return shlex.split(line)


def sizes_of(recipe: str) -> dict[str, str]:
    """Arguments that make a recipe small."""
    settings = yaml.safe_load(RECIPES[recipe].read_text(encoding="utf-8"))
    sizes: dict[str, object] = {"max_steps": 1, "per_device_train_batch_size": 1}
    if "gradient_accumulation_steps" in settings:
        sizes["gradient_accumulation_steps"] = 1
    pixels = settings.get("pipeline_kwargs", {})
    if "height" in pixels:
        area = {"max_area": 64 * 64} if "max_area" in pixels else {}
        sizes["pipeline_kwargs"] = json.dumps({**pixels, "height": 64, "width": 64, **area})
        sizes |= {"per_device_eval_batch_size": 16, "num_prompts": 2, "held_out_prompts": 2}
    if settings.get("load_best_model_at_end"):
        sizes |= {"eval_steps": 1, "save_steps": 1}
    if "num_prompts" in settings and not pixels.get("height"):  # prompts of shapes are not those of a small dataset
        sizes |= {"num_prompts": 2, "num_eval_prompts": 2, "held_out_prompts": 2, "num_candidates": 2}
    if settings["dataset_name"] == "shapes-generated":
        sizes |= {"shapes_prompts": 8, "shapes_rows": 8}
    return {name: str(value) for name, value in sizes.items()}


def command(recipe: str, **more: str) -> list[str]:
    changes = {**sizes_of(recipe), **more, "disable_tqdm": "true"}
    return [*command_of(recipe), *(part for name, value in changes.items() for part in (f"--{name}", value))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub() as hub:
        fill(hub, tmp_path_factory.mktemp("models"))
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder where a user works: `examples` is there, as commands name it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "examples").symlink_to(EXAMPLES)
    return folder


def environment(hub, home: Path, name: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return hub.environment(home / "user", PYTHONPATH=paths, LOADED_TYPES=str(home / f"{name}.jsonl"))


def run(hub, home: Path, name: str, *commands: list[str]) -> None:
    """Run commands one after the other, in one new process, and look at what they loaded."""
    parts = [part for index, command in enumerate(commands) for part in (["--then"] * (index > 0) + command)]
    done = run_python(ROOT / "tests" / "loaded_types.py", *parts, env=environment(hub, home, name), cwd=home)
    assert done.returncode == 0, done.stderr[-4000:]


def check_types(home: Path, name: str, least: int) -> None:
    """All that was loaded of the Hub has the type of its files."""
    lines = [json.loads(line) for line in (home / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= least, lines
    for line in lines:
        assert set(line["types"]) == {BFLOAT16}, line


def check_outputs(home: Path, recipe: str) -> None:
    """What a user finds after a run."""
    settings = yaml.safe_load(RECIPES[recipe].read_text(encoding="utf-8"))
    output = home / settings["output_dir"]
    weights = (
        "pytorch_lora_weights" if recipe.startswith("refl") else "adapter_model" if "use_peft" in settings else "model"
    )
    assert (output / f"{weights}.safetensors").exists()
    card = (output / "README.md").read_text(encoding="utf-8")
    assert str(home) not in card
    if recipe.startswith("refl_") and recipe != "refl_shapes":
        assert settings["model_name_or_path"] in card
        for part in ("train", "held_out"):
            assert (output / "references" / part / "references.arrow").exists()
        looks = (output / "reward_dynamics.jsonl").read_text().splitlines()
        assert any("held_out" in json.loads(line) for line in looks)


def test_every_file_is_covered():
    """A new script, recipe or notebook is run here, or it is said where, or why not."""
    files = {
        str(path.relative_to(EXAMPLES))
        for ending in ("py", "yaml", "ipynb", "sh")
        for path in EXAMPLES.rglob(f"*.{ending}")
    }
    assert files - HERE - set(ELSEWHERE) == set(), "Run them in this file, or name the test that does in `ELSEWHERE`."
    assert (HERE | set(ELSEWHERE)) - files == set()
    for reason in ELSEWHERE.values():
        if reason.startswith("tests/"):
            assert (ROOT / reason.split(",")[0]).exists(), reason


def test_float32_is_noticed(tmp_path):
    """The check that all recipes go through fails at weights in float32."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"class": "A", "name": "a", "types": {BFLOAT16: 3}}) + "\n")
    check_types(tmp_path, "a", 1)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"class": "A", "name": "a", "types": {BFLOAT16: 3, "float32": 1}}) + "\n"
    )
    with pytest.raises(AssertionError, match="float32"):
        check_types(tmp_path, "b", 1)


def test_recipes_by_size():
    """They are the recipe of 2B for other models, and make updates of as many rows on one GPU, or 8 for the largest."""
    from rewarddance_hf.scripts.train import make_parser

    both = {"per_device_train_batch_size", "gradient_accumulation_steps", "model_name_or_path", "output_dir"}
    first = yaml.safe_load(RECIPES[ON_HUB[0]].read_text(encoding="utf-8"))
    for name in BY_SIZE:
        settings = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
        assert {k: v for k, v in settings.items() if k not in both} == {
            k: v for k, v in first.items() if k not in both
        }
        _, args, model_args = make_parser().parse_args_and_config(
            ["--config", str(RECIPES[name]), "--use_cpu", "true"]
        )
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert rows * (8 if name == "internvl3_5_38b" else 1) == 32
        assert model_args.model_name_or_path in OF_OTHER_SIZES


@pytest.mark.slow
def test_another_family_by_size(hub, home):
    """One recipe by size, whose model is of another family than that of the others."""
    run(hub, home, "by_size", command("qwen3_vl_8b", **WITHOUT_GPU))
    check_types(home, "by_size", least=1)
    check_outputs(home, "qwen3_vl_8b")


@pytest.mark.slow
def test_a_judge_and_a_gated_generator(hub, home):
    """The recipe of a judge, and that of a generator whose conditions one has to accept."""
    recipes = ("internvl_open_image_preferences", "refl_flux_dev")
    run(hub, home, "core", *(command(recipe, **WITHOUT_GPU) for recipe in recipes))
    check_types(home, "core", least=1 + 4 + 2)
    for recipe in recipes:
        check_outputs(home, recipe)


@pytest.mark.slow
def test_edits(hub, home):
    """The recipe of a judge of edits, and that of a generator that edits the source image of each row."""
    recipes = ("internvl_editreward", "refl_flux_kontext")
    run(hub, home, "edits", *(command(recipe, **WITHOUT_GPU) for recipe in recipes))
    check_types(home, "edits", least=1 + 4 + 2)
    for recipe in recipes:
        check_outputs(home, recipe)


@pytest.mark.slow
def test_other_generators(hub, home):
    """All other recipes that name models on the Hub, and the scripts without a recipe by the commands in their docstrings."""
    recipes = ("refl_sd35", "refl_qwen_image", "refl_wan_t2v")
    gradient = re.search(
        r"python (examples/reward_gradient.py --.*\\\\\n.*)\n", (EXAMPLES / "reward_gradient.py").read_text()
    )
    evaluation = ["examples/evaluate_reward_model.py", "--model", "org/my-judge", "--split", "train[:50%]"]
    evaluation += ["--dataset", "data-is-better-together/open-image-preferences-v1-binarized"]
    scripts = [shlex.split(gradient[1].replace("\\\\\n", " ")), evaluation]
    run(hub, home, "generators", *(command(recipe, **WITHOUT_GPU) for recipe in recipes), *scripts)
    check_types(home, "generators", least=6 + 5 + 5 + 6 + 1)
    for recipe in recipes:
        check_outputs(home, recipe)


@pytest.mark.slow
def test_shapes(hub, home):
    """Recipes that need no download, each with what the one before has saved."""
    base = [
        "-m",
        "rewarddance_hf.shapes.clip_base",
        "--output_dir",
        "outputs/shapes_clip_base",
        "--steps",
        "1",
        "--pair_steps",
        "1",
    ]
    done = run_python(*base, env=environment(hub, home, "base"), cwd=home)
    assert done.returncode == 0, done.stderr[-4000:]
    run(hub, home, "shapes", *(command(recipe) for recipe in SHAPES))
    for recipe in SHAPES:
        check_outputs(home, recipe)


COMMANDS = """
import json, sys
from rewarddance_hf.cli import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    if code:
        sys.exit(f"{command} ended with {code}")
"""


@pytest.mark.slow
def test_commands_by_names_of_the_hub(hub, home):
    """A judge from a public set by its name and from pairs with columns of their own, a generator tuned on prompts of the Hub."""
    pairs = [{"caption": f"a circle {i}", "a": encoded(2 * i), "b": encoded(2 * i + 1)} for i in range(4)]
    hub.put("org/pairs", {"train.parquet": parquet(pairs, caption=STRING, a=Image(), b=Image())}, kind="dataset")
    prompts = [{"prompt": f"a square {i}"} for i in range(4)]
    hub.put("org/prompts", {"train.parquet": parquet(prompts, prompt=STRING)}, kind="dataset")
    hub.put("MizzenAI/HPDv3", hpdv3(), kind="dataset")
    small = "--max-steps 1 --per-device-train-batch-size 1 --gradient-accumulation-steps 1 --use-cpu --disable-tqdm true".split()
    columns = ["--columns", "prompt=caption,chosen=a,rejected=b"]
    train = ["train", "--model", "OpenGVLab/InternVL3_5-2B-HF", *small, "--data"]
    tune = ["tune", "--pipeline", "stabilityai/stable-diffusion-3.5-medium", "--judge", "org/my-judge"]
    tune += [
        "--data",
        "org/prompts",
        "--num-candidates",
        "2",
        "--pipeline-kwargs",
        '{"height": 64, "width": 64}',
        *small,
    ]
    commands = [
        [*train, "hpdv3", "--output-dir", "outputs/public"],
        [
            *train,
            "org/pairs",
            *columns,
            "--output-dir",
            "outputs/pairs",
            "--push-to-hub",
            "--hub-model-id",
            "org/new-judge",
        ],
        ["evaluate", "--model", "org/new-judge", "--data", "org/pairs", *columns],
        [
            "score",
            "--model",
            "outputs/pairs",
            "--data",
            "org/pairs",
            "--columns",
            "prompt=caption,image=a,reference=b",
        ],
        [*tune, "--use-peft", "true", "--output-dir", "outputs/tuned"],
    ]
    done = run_python("-c", COMMANDS, json.dumps(commands), env=environment(hub, home, "commands"), cwd=home)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "HPDv3" in (home / "outputs" / "public" / "README.md").read_text(encoding="utf-8")
    assert (home / "outputs" / "tuned" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.slow
def test_under_accelerate_launch(hub, home):
    """The launcher itself starts the script, in a process of its own."""
    shutil.rmtree(home / "outputs" / "internvl3_5_2b_judge", ignore_errors=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [
            *launcher,
            str(ROOT / "tests" / "loaded_types.py"),
            *command("internvl_open_image_preferences", **WITHOUT_GPU),
        ],
        env=environment(hub, home, "launched"),
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    check_types(home, "launched", least=1)
    check_outputs(home, "internvl_open_image_preferences")
