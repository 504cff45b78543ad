"""Check of release folders in a separate process, in which this package cannot be imported."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from PIL import Image, ImageDraw

from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from . import clean_process
from .cards import release_marker


SHEET = "verification/scores.json"
NUM_IMAGES = 6
PROMPTS = ("a red circle", "two blue squares left of a green triangle", 'a sign that says "no", at night')
# Largest difference of log-odds between two processes, by type of the weights.
TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}


def write_sheet(model: RewardDanceForYesScoring, processor: RewardDanceProcessor, folder: Path) -> None:
    """Write fixed images and the judge's scores of them to `verification/` in a release folder."""
    sheet = folder / SHEET
    sheet.parent.mkdir()
    images = [_image(number) for number in range(NUM_IMAGES)]
    names = [f"{sheet.parent.name}/{number}.png" for number in range(NUM_IMAGES)]
    for image, name in zip(images, names, strict=True):
        image.save(folder / name)
    rows: list[dict[str, Any]] = []
    for number in range(NUM_IMAGES):
        other = (number + 1) % NUM_IMAGES
        prompt = PROMPTS[number % len(PROMPTS)]
        row = {"prompt": prompt, "image": names[number]}
        references = None
        if model.config.uses_reference:
            row["reference"], references = names[other], [images[other]]
        inputs = processor(images=[images[number]], prompts=[prompt], references=references).to(model.device)
        with torch.no_grad():
            output = model.eval()(**inputs)
        rows.append({**row, "score": output.scores.item(), "log_odds": output.logits.item()})
    dtype = str(model.dtype).removeprefix("torch.")
    document = {"tolerance": TOLERANCES.get(dtype, max(TOLERANCES.values())), "dtype": dtype, "rows": rows}
    sheet.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def verify_release(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """
    Load a release, a folder or a repository ID, in a process without this package, and compare.

    A judge is loaded by the code of its own repository, and must give the scores of its sheet (`max_difference` of the
    result). A dataset must give a row of each configuration and split, a metric its own examples. Raises a `ValueError` if
    the release was not made by this package, is not there, cannot be loaded, or gives other scores.
    """
    folder = Path(source)
    if not folder.is_dir():
        kind, source = _find_release(str(source), revision)
        folder = Path(source)
    else:
        kind = read_kind(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as elsewhere:
        environment["HF_MODULES_CACHE"] = f"{elsewhere}/modules"
        if folder.is_dir():
            source = folder.resolve()
            environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{elsewhere}/datasets"}
        threads = str(torch.get_num_threads())
        command = [sys.executable, clean_process.__file__, kind, str(source), revision or "", threads]
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
            raise ValueError(
                f"{str(source)!r} cannot be used without this package: {last}. Nothing was uploaded. Build it again; its process "
                f"said:\n{done.stderr[-2000:]}"
            )
    seen = json.loads(done.stdout.splitlines()[-1])
    if kind == "model":
        file = folder / SHEET if folder.is_dir() else hf_hub_download(str(source), SHEET, revision=revision)
        sheet = json.loads(Path(file).read_text(encoding="utf-8"))
        # A score differs by a quarter of what its log-odds do, or less.
        difference = max(
            abs(got - row[name])
            for name, values in {"log_odds": seen["log_odds"], "score": seen["scores"]}.items()
            for got, row in zip(values, sheet["rows"], strict=True)
        )
        if not difference <= sheet["tolerance"]:
            raise ValueError(
                f"{str(source)!r} gives log-odds that differ by {difference:.2g} from those of its sheet, but at most "
                f"{sheet['tolerance']:g} is allowed. Nothing was uploaded. Its code or weights are not those that were built: "
                "build it again."
            )
        seen["max_difference"] = difference
    return seen


def read_kind(folder: Path) -> str:
    """Kind of release of a folder by its card, a key of `clean_process.CHECKS`, or a `ValueError` if it is none."""
    card = folder / "README.md"
    marker = release_marker(card.read_text(encoding="utf-8")) if card.is_file() else None
    if marker is None or marker["kind"] not in clean_process.CHECKS:
        raise ValueError(
            f"{str(folder)!r} has no card of a release, but only folders that `rewarddance release --model` or `make "
            "release-artifacts` built are released. Build it first."
        )
    return marker["kind"]


def _find_release(repo_id: str, revision: str | None) -> tuple[str, str]:
    """Kind of a released repository, and its ID or where its files were downloaded to."""
    for repo_type in ("model", "dataset", "space"):
        try:
            card = hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=revision)
        except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):
            continue
        kind = read_kind(Path(card).parent)
        if kind in ("model", "dataset"):
            return kind, repo_id
        return kind, snapshot_download(repo_id, repo_type=repo_type, revision=revision)
    raise ValueError(
        f"{repo_id!r} is neither a release folder nor a repository with a card that can be seen. Check its name and your token."
    )


def _image(number: int) -> Image.Image:
    """A drawing of two shapes; sizes and proportions differ so that each way of preprocessing is seen."""
    size = ((64, 64), (96, 48), (48, 96), (80, 80), (33, 57), (128, 72))[number % 6]
    image = Image.new("RGB", size, (40 * number % 256, 200, 255 - 30 * number % 256))
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), fill=(220, 30 * number % 256, 30))
    draw.rectangle((width // 2, height // 2, width - 5, height - 5), fill=(20, 60, 90 + 25 * number % 166))
    return image
