"""Spaces: folders of `evaluate` modules, built from their Python files, and cards of other pages."""

import ast
import doctest
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from ..cards import render_card, templates_folder
from .cards import release_marker_of


GRADIO_VERSION = "6.31.0"


def build_metric(module: str | Path, folder: str | Path) -> Path:
    """Build the Space of an `evaluate` module: its Python file, which is not run, a page on which to try it, and its card."""
    module, folder = Path(module), Path(folder)
    copy_template("metric", folder)
    shutil.copy(module, folder)
    texts = {
        node.targets[0].id: ast.literal_eval(node.value).strip()
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id.startswith("_")
    }
    arguments, _, example = texts["_KWARGS_DESCRIPTION"].partition("Examples:\n")
    card = render_card(
        "metric_card.md",
        _space_data(module.stem.replace("_", " ").capitalize(), ["evaluate", "metric"], "metric"),
        name=module.stem,
        description=texts["_DESCRIPTION"],
        example=re.sub(r"^ {4}", "", example, flags=re.MULTILINE).strip(),
        arguments=arguments.strip(),
        citation=texts["_CITATION"],
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    tried = json.dumps(_first_arguments(example), indent=1) + "\n"
    (folder / "example.json").write_text(tried, encoding="utf-8")
    return folder


def space_card(title: str, text: str, models: Sequence[str] = (), datasets: Sequence[str] = ()) -> str:
    """`README.md` of a Gradio Space, with the repository IDs of the models and datasets that it uses."""
    used = {"models": list(models) or None, "datasets": list(datasets) or None}
    return render_card("space_card.md", _space_data(title, ["rewarddance"], "space", **used), title=title, text=text)


def copy_template(name: str, folder: Path) -> None:
    """Make a folder of nothing but the files of a template in `hub_cards/`, in place of an older one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(templates_folder() / name, folder, ignore=shutil.ignore_patterns("__pycache__"))


def _first_arguments(examples: str) -> dict[str, Any]:
    """Arguments of the first call of `compute` in examples."""
    for example in doctest.DocTestParser().get_examples(examples):
        for node in ast.walk(ast.parse(example.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "compute":
                return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    raise ValueError("`_KWARGS_DESCRIPTION` has no example that calls `compute`. Write one: its arguments are shown.")


def _space_data(title: str, tags: list[str], kind: str, **fields: Any) -> SpaceCardData:
    return SpaceCardData(
        title=title,
        emoji="⚖️",
        colorFrom="blue",
        colorTo="red",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        app_file="app.py",
        pinned=False,
        license="apache-2.0",
        tags=tags,
        **release_marker_of(kind),
        **fields,
    )
