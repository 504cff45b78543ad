"""Imports run one way and in no circle, heavy libraries stay where they belong, and modules stay short."""

import ast
import functools
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "rewarddance_hf"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A room may import the rooms of the lines before its own, and itself.
ROOMS = [
    ["import_utils", "checks"],
    ["parallel", "cards", "availability"],
    ["resumable", "models"],
    ["rewards", "data", "registration"],
    ["scoring"],
    ["trainer", "evaluation", "serving"],
    ["alignment"],
    ["hub"],
    ["shapes", "memory"],
    ["scripts"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
FLOOR[""] = FLOOR["registration"] + 1  # the package itself
# Rooms in which an optional library may be imported.
HOMES = {
    "trl": {"scripts"},
    "evaluate": {"evaluation"},
    "diffusers": {"alignment", "shapes", "memory"},
    "matplotlib": {"shapes", "alignment"},
    "peft": {"trainer", "scoring", "alignment", "shapes", "memory"},
    "accelerate": {"parallel", "trainer", "alignment", "shapes", "memory"},
    **dict.fromkeys(("httptools", "httpx2", "prometheus_client", "starlette", "uvicorn"), {"serving"}),
    "datasets": {"data", "trainer", "evaluation", "alignment", "hub", "shapes", "scripts", "cli"},
}
LONGEST = 450  # lines of a module, unless its docstring says why it has more lines


@functools.cache
def imports(name: str) -> list[str]:
    """Absolute names of the modules that a module imports at some time, those for type checkers left out."""
    return list(_imports(name))


def _imports(name: str) -> Iterator[str]:
    path = FILES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:  # a module of the package, or a name in it
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in FILES else module
        nodes += ast.iter_child_nodes(node)


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    """No room imports one that stands above it or beside it."""
    here = room_of(name)
    for imported in filter(FILES.get, imports(name)):
        there = room_of(imported)
        if there and there != here:
            assert FLOOR[there] < FLOOR[here], f"{name} imports {imported}"


def test_imports_run_in_no_circle():
    """Inside a room, too, no module imports one that imports it, in functions neither."""
    graph = {name: {imported for imported in imports(name) if imported in FILES} - {name} for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # names the modules of a circle


@pytest.mark.parametrize("name", FILES)
def test_optional_libraries_stay_at_home(name):
    """Each optional library is imported in the rooms that are about it only."""
    for imported in imports(name):
        library = imported.partition(".")[0]
        allowed = library not in HOMES or room_of(name) in HOMES[library] or name.endswith(".hub.clean_process")
        assert allowed, f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("_rewarddance")])
def test_hub_files_can_travel(name):
    """Files that are copied to the Hub import siblings as `from .name import Name`, and nothing else of ours."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, ast.unparse(node)
            assert node.module, ast.unparse(node)
            assert "." not in node.module, ast.unparse(node)
    allowed = {"torch", "transformers", "PIL", "numpy", "tqdm", *sys.stdlib_module_names}
    if name.endswith(".video_rewarddance"):
        allowed.add("av")  # in a `try`, which loading by remote code does not demand
    for imported in imports(name):
        assert imported.partition(".")[0] in allowed or imported.startswith("rewarddance_hf.models."), imported


@pytest.mark.parametrize("name", FILES)
def test_modules_are_short(name):
    """A module has one purpose: one that is longer says in its docstring why it has so many lines."""
    text = FILES[name].read_text(encoding="utf-8")
    is_short = text.count("\n") <= LONGEST
    assert is_short or "lines" in (ast.get_docstring(ast.parse(text)) or "")
