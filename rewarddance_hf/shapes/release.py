"""
Build everything of the shapes world that is released: judges, generator, preferences, metrics and a Space, as folders that
`rewarddance release` pushes. Run it with `make release-artifacts`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..alignment.refl.weights import LORA_FILE
from ..evaluation import statistics
from ..hub.cards import DatasetFacts, PipelineFacts, dataset_card, pipeline_card
from ..hub.licenses import TrainingData
from ..hub.release import build_model_release
from ..hub.spaces import build_metric, copy_template, space_card
from ..hub.verification import verify_release
from ..models.tasks_rewarddance import TASKS
from .clips import ShapesClipPreferences
from .demo import EVALUATION_ROWS, TRAINING_STEPS
from .edits import ShapesEdits
from .generator import BASE_GENERATOR, SAMPLING
from .judges_demo import evaluate, train
from .models import JUDGE_BASE
from .preferences import ALIGNMENT_CRITERIA, QUALITY_CRITERIA, ShapesPreferences
from .rows import SPLITS


LICENSE = "apache-2.0"
JUDGES = {
    "judge": "rewarddance-shapes-judge",
    "pointwise": "rewarddance-shapes-judge-pointwise",
    "regressive": "rewarddance-shapes-judge-regressive",
}
GENERATOR, ADAPTER, PREFERENCES, SPACE = (
    "shapes-generator",
    "shapes-generator-refl",
    "shapes-preferences",
    "shapes-judge",
)
METRICS = Path(statistics.__file__).parent / "metrics"
# diffusers loads Stable Diffusion 3 without its T5 encoder only when told so.
LOADING = {"text_encoder_3": None, "tokenizer_3": None}
# Rows that are read at once when a dataset is streamed.
ROWS_PER_GROUP = 100
NUM_ROWS = {"train": 4000, "id": EVALUATION_ROWS, "ood": EVALUATION_ROWS}
LIMITS = (
    "It has seen colored shapes in images of 32 x 32 pixels only, and means nothing about others.",
    "It is often wrong about which object is left of, above or larger than another.",
)
COLUMNS = {
    "prompt": "what the images should show; of edits the instruction",
    "chosen": "the better image, or clip as a list of frames",
    "rejected": "the worse one",
    "task": " or ".join(f"`{task}`" for task in TASKS),
    "criteria": "what the verdict is about",
    "rationale": "the reasons after the verdict `yes` (the chosen one is image 2) and `no`",
    "category": "what is wrong with the rejected one",
    "condition": "what the generator was given beside the prompt: first frame of image-to-video (configuration `video`), source "
    "image of an edit (configuration `editing`)",
    "edit": "what the instruction asks for: `color`, `remove`, `add`, `move` or `size` (configuration `editing` only)",
}
PROMPTS = ("a red circle", "two blue squares", "a red circle and a blue square", "a large green triangle")

Rows = Callable[[int, str], Any]
# Configuration of the dataset -> rows of a split.
CONFIGURATIONS: dict[str, Rows] = {
    "image": ShapesPreferences,
    "video": ShapesClipPreferences,
    "editing": ShapesEdits,
}


def build_artifacts(
    output_dir: str | Path,
    namespace: str,
    tag: str,
    demo_dir: str | Path = "outputs/demo",
    num_rows: dict[str, int] | None = None,
    judges: Sequence[str] = tuple(JUDGES),
    training_steps: int = TRAINING_STEPS,
) -> list[Path]:
    """
    Build the folders in the order in which they should be pushed, and verify each in a process without this package.

    `namespace` is the user or organization that cards and Space name. Judges that are not in `demo_dir`, the folder of
    `rewarddance demo`, are trained by its recipe in `training_steps` updates.
    """
    output_dir, demo_dir = Path(output_dir), Path(demo_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    folders = []
    for name in judges:
        _say(f"Building {JUDGES[name]} ...")
        folders.append(_build_judge(name, output_dir, namespace, tag, demo_dir, training_steps))
    adapter = demo_dir / "tuned" / LORA_FILE
    others = [
        _build_generator(output_dir / GENERATOR, namespace, tag),
        *([_build_adapter(adapter, output_dir / ADAPTER, namespace, tag)] if adapter.is_file() else []),
        build_preferences(output_dir / PREFERENCES, f"{namespace}/{PREFERENCES}", tag, num_rows or NUM_ROWS),
        *(build_metric(module, output_dir / module.stem) for module in sorted(METRICS.glob("*/*.py"))),
        build_space(output_dir / SPACE, f"{namespace}/{JUDGES['judge']}", tag, f"{namespace}/{GENERATOR}"),
    ]
    for folder in others:
        _say(f"Verifying {folder.name} ...")
        verify_release(folder)
    return folders + others


def build_preferences(folder: Path, repo_id: str, tag: str, num_rows: dict[str, int]) -> Path:
    """Write the preference rows of the shapes world as parquet files with encoded images, and their card."""
    _make_empty(folder)
    configurations = []
    for name, make_rows in CONFIGURATIONS.items():
        splits = []
        for split in SPLITS:
            rows = make_rows(num_rows[split], split)
            file = folder / name / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(exist_ok=True)
            _write_parquet(rows, file)
            splits.append({"name": split, "num_rows": len(rows), "num_bytes": file.stat().st_size})
        configurations.append({"name": name, "splits": splits})
    facts = DatasetFacts(
        repo_id=repo_id,
        revision=tag,
        description="Preference pairs of colored shapes whose truth is known: the chosen image shows strictly more of its "
        "prompt, or is drawn better. Split `ood` has pairs of color and shape, paraphrases and drawing conditions that no "
        "row of `train` has.",
        source="A script (`rewarddance_hf.shapes` of the package rewarddance_hf); no person or generator was involved, and "
        "labels are exact. Rows depend on their index and split only.",
        license=LICENSE,
        configurations=configurations,
        columns=COLUMNS,
        limits=["A small world: images of 32 x 32 pixels, a few hundred words. It is for tests and lessons."],
    )
    (folder / "README.md").write_text(dataset_card(facts), encoding="utf-8")
    return folder


def build_space(
    folder: Path,
    judge: str,
    tag: str,
    generator: str | None = None,
    title: str = "A judge of shapes",
    explains: bool = True,
) -> Path:
    """
    Write the Space of a judge, its repository ID or folder, with a `generator` that draws images to be judged, if there is one.
    `explains` tells whether the judge was trained to write reasons.
    """
    copy_template("space", folder)
    settings = {
        "title": title,
        "text": f"[{judge}](https://huggingface.co/{judge}) is asked which of two images shows the prompt better. It is shown "
        "both orders; an honest judge answers yes to one of them.",
        "judge": judge,
        "revision": tag,
        "generator": generator,
        "loading": LOADING,
        "sampling": SAMPLING,
        "criteria": [ALIGNMENT_CRITERIA, QUALITY_CRITERIA],
        "prompts": list(PROMPTS),
        "explains": explains,
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    models = [name for name in (judge, generator) if name]
    (folder / "README.md").write_text(space_card(title, "Compare two images, or rank many.", models), encoding="utf-8")
    return folder


def _build_judge(name: str, output_dir: Path, namespace: str, tag: str, demo_dir: Path, training_steps: int) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        source = demo_dir / name
        if not (source / "model.safetensors").is_file():
            source = Path(scratch) / name
            _say(f"  {demo_dir / name} holds no judge: training {training_steps} steps ...")
            train(name, str(source), training_steps)
        metrics_file = source / "metrics.json"
        if not metrics_file.is_file():
            metrics_file = Path(scratch) / "metrics.json"
            evaluate(name, str(source), str(metrics_file))
        metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
        results = _write_results(metrics, name, namespace, Path(scratch))
        training_data = [TrainingData(f"{namespace}/{PREFERENCES}", LICENSE)]
        # The demo measures judges on pairs of the generator's samples if it has trained them on such.
        if any(key.startswith(f"{name}/generated/") for key in metrics):
            training_data.append(TrainingData(f"samples of {namespace}/{GENERATOR}, compared by the oracle", LICENSE))
        return build_model_release(
            source,
            output_dir / JUDGES[name],
            f"{namespace}/{JUDGES[name]}",
            tag,
            training_data,
            results,
            license=LICENSE,
            base_model=f"the tiny InternVL of the shapes world ({JUDGE_BASE.name}, trained from scratch)",
            limits=LIMITS,
        )


def _write_results(metrics: dict[str, float], name: str, namespace: str, folder: Path) -> list[Path]:
    """Metrics of the demo as files like those of `rewarddance evaluate --output`, one for each split."""
    files = []
    for split in ("id", "ood"):
        prefix = f"{name}/{split}/"
        document = {
            "model": f"{namespace}/{JUDGES[name]}",
            "dataset": f"{namespace}/{PREFERENCES}",
            "config": "image",
            "split": split,
            "metrics": {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)},
        }
        files.append(folder / f"{split}.json")
        files[-1].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return files


def _build_generator(folder: Path, namespace: str, tag: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(BASE_GENERATOR, folder)
    facts = PipelineFacts(
        repo_id=f"{namespace}/{GENERATOR}",
        revision=tag,
        description="A text-to-image model of colored shapes: a stock Stable Diffusion 3 pipeline of 1.2M parameters. It is "
        "wrong often enough for a reward to have something to mend.",
        source="`python -m rewarddance_hf.shapes.generator_base`, from scratch on drawings of a script.",
        license=LICENSE,
        prompt=PROMPTS[0],
        sampling=SAMPLING,
        loading=LOADING,
        limits=LIMITS[:1],
    )
    (folder / "README.md").write_text(pipeline_card(facts), encoding="utf-8")
    return folder


def _build_adapter(file: Path, folder: Path, namespace: str, tag: str) -> Path:
    _make_empty(folder)
    shutil.copy(file, folder / file.name)
    facts = PipelineFacts(
        repo_id=f"{namespace}/{ADAPTER}",
        revision=tag,
        description="LoRA weights with which the generator of shapes pleases its judge more (reward fine-tuning, ReFL).",
        source=f"`rewarddance demo`, by the gradient of {namespace}/{JUDGES['judge']}.",
        license=LICENSE,
        prompt=PROMPTS[0],
        sampling=SAMPLING,
        loading=LOADING,
        limits=(LIMITS[0], "What pleases its judge need not be right: see the report of the demo for both."),
        base_repo_id=f"{namespace}/{GENERATOR}",
    )
    (folder / "README.md").write_text(pipeline_card(facts), encoding="utf-8")
    return folder


def _write_parquet(rows: Any, file: Path) -> None:
    def encode(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [encode(frame) for frame in value]
        # `Image()` encodes an image as PNG; as bytes it is inside of the file, whatever writes that.
        return datasets.Image().encode_example(value)

    images = ("chosen", "rejected", "condition")
    read = [rows[i] for i in range(len(rows))]
    values = {name: value for row in read for name, value in row.items() if value is not None}
    features: dict[str, Any] = {}
    for name, value in values.items():
        if name in images:
            features[name] = datasets.List(datasets.Image()) if isinstance(value, (list, tuple)) else datasets.Image()
        elif isinstance(value, dict):
            features[name] = {key: datasets.Value("string") for key in value}
        else:
            features[name] = datasets.Value("string")
    table = {
        name: [encode(row[name]) if name in images and row.get(name) is not None else row.get(name) for row in read]
        for name in values
    }
    dataset = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    dataset.to_parquet(str(file), batch_size=ROWS_PER_GROUP)


def _make_empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="outputs/release")
    parser.add_argument("--demo_dir", default="outputs/demo")
    parser.add_argument("--namespace", default="rewarddance", help="user or organization on the Hub")
    parser.add_argument("--tag", default="v0.1.0")
    args = parser.parse_args()
    for folder in build_artifacts(args.output_dir, args.namespace, args.tag, args.demo_dir):
        _say(f"rewarddance release --folder {folder} --repo-id {args.namespace}/{folder.name} --tag {args.tag}")


if __name__ == "__main__":
    main()
