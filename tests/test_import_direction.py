"""Imports run one way, and heavy libraries stay where they belong."""

import ast
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "rewarddance_hf"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder may import the folders that stand before it, and itself.
ORDER = ["models", "cards", "rewards", "data", "scoring", "trainer", "evaluation", "alignment", "hub", "shapes", "cli"]
SIBLINGS = {
    ("trainer", "evaluation"),
    ("evaluation", "trainer"),
    ("alignment", "trainer"),
    ("alignment", "evaluation"),
}
# Folders (or files) in which an optional library may be imported.
HOMES = {
    "trl": set(),
    "evaluate": {"evaluation"},
    "diffusers": {"alignment", "shapes"},
    "matplotlib": {"shapes", "alignment"},
    "peft": {"trainer", "scoring", "alignment", "shapes"},
    "datasets": {"data", "trainer", "evaluation", "alignment", "hub", "shapes", "cli"},
}


def imports(path: Path):
    """Every imported module as (absolute name or dotted name inside the package, whether it is ours)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module
            else:
                base = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
                yield ".".join([*base, *(node.module or "").split(".")]).strip(".")


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    """No folder imports one that stands after it, and trainer, evaluation and alignment do not know each other."""
    here = folder_of(path)
    if here not in ORDER:
        return
    for name in imports(path):
        if not name.startswith("rewarddance_hf."):
            continue
        there = name.split(".")[1]
        if there in ORDER:
            assert ORDER.index(there) <= ORDER.index(here), f"{path} imports {name}"
            assert (here, there) not in SIBLINGS, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_libraries_stay_at_home(path):
    """Each optional library is imported in the folders that are about it only."""
    for name in imports(path):
        library = name.partition(".")[0]
        if library in HOMES:
            assert folder_of(path) in HOMES[library], f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*_rewarddance.py")), ids=lambda path: path.name)
def test_hub_files_can_travel(path):
    """Files that are copied to the Hub import siblings as `from .name import Name`, and nothing else of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            assert node.module, ast.unparse(node)
            assert "." not in node.module, ast.unparse(node)
    allowed = {"torch", "transformers", "PIL", "numpy", "tqdm"}
    if path.name == "video_rewarddance.py":
        allowed.add("av")  # in a `try`, which loading by remote code does not demand
    for name in imports(path):
        library = name.partition(".")[0]
        standard = library in __import__("sys").stdlib_module_names
        assert standard or library in allowed or name.startswith("rewarddance_hf.models."), name
