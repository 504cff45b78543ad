"""The public names, and how little importing them costs."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from new_process import run_python

import rewarddance_hf
from rewarddance_hf.models import RewardDanceForYesScoring
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor


def test_all_names_exist_and_are_sorted():
    """Every public name can be imported, and the list is sorted and agrees with the lazy table."""
    assert sorted(rewarddance_hf.__all__) == sorted(rewarddance_hf._MODULES)
    for name in rewarddance_hf.__all__:
        assert getattr(rewarddance_hf, name).__name__ == name
    assert set(rewarddance_hf.__all__) <= set(dir(rewarddance_hf))


def test_type_checkers_see_the_same_names():
    """What is imported for type checkers is what the lazy table gives."""
    tree = ast.parse(Path(rewarddance_hf.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    assert rewarddance_hf._PUBLIC_NAMES == {node.module: [name.name for name in node.names] for node in block.body}


def test_wheel(tmp_path):
    """The wheel holds the mark of types, the criteria, the card templates and the shipped models."""
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(Path(__file__).parents[1]))
    (wheel,) = builder.build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = "rewarddance_hf"
    files = ["py.typed", "__main__.py", "models/criteria/text-to-image.txt", "hub_cards/model_card.md"]
    assert {f"{folder}/{file}" for file in [*files, "shapes/base_vlm/model.safetensors"]} <= names
    assert all(name.startswith(folder) for name in names)
    assert {name for name in names if name.endswith("README.md")} == {f"{folder}/hub_cards/README.md"}


def test_unknown_name_is_an_attribute_error():
    """A misspelled name fails as in any module."""
    with pytest.raises(AttributeError, match="has no attribute 'RewardDancer'"):
        rewarddance_hf.RewardDancer  # noqa: B018


def test_import_is_light():
    """Importing the package, its version and its command line loads neither torch nor transformers."""
    code = (
        "import sys, rewarddance_hf, rewarddance_hf.cli; rewarddance_hf.__version__; "
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'diffusers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_judge_works_without_the_extras():
    """Model, processor, scorer and evaluator need torch and transformers only: the extras are not imported on the way."""
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'datasets', 'peft', 'trl', 'diffusers', 'evaluate', 'matplotlib'}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer\n"
        "from rewarddance_hf import RewardDanceEvaluator\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.new_process
def test_missing_extras_are_named():
    """What needs an extra says which: a name of `datasets` that could not be imported used to be all that was said."""
    code = """
import sys
sys.modules["datasets"] = None
import rewarddance_hf
for name in ("RewardDanceTrainer", "RewardDanceTrainingArguments", "best_of_n_references", "load_preferences"):
    try:
        getattr(rewarddance_hf, name)
    except ImportError as error:
        print(name, error)
"""
    done = run_python("-c", code)
    assert (
        done.stdout.count(
            "datasets is needed here, but not installed. Install it with `pip install rewarddance_hf[train]`"
        )
        == 4
    )


@pytest.mark.parametrize(
    "code",
    [
        "import rewarddance_hf\nfrom transformers import AutoModel\nAutoModel.from_pretrained(FOLDER)",
        pytest.param(
            "from transformers import pipeline\nimport rewarddance_hf\npipeline('visual-preference', model=FOLDER)",
            marks=pytest.mark.slow,
        ),
        "import rewarddance_hf\nfrom transformers import pipeline\npipeline('visual-preference', model=FOLDER)",
    ],
    ids=["model", "pipeline-first", "pipeline"],
)
@pytest.mark.new_process
def test_judges_are_known_to_transformers(code, tmp_path):
    """The import of this package is enough, in any order, and nothing asks for trust. A class had to be imported before."""
    RewardDanceForYesScoring.from_pretrained(BASE_VLM).save_pretrained(tmp_path)
    judge_processor().save_pretrained(tmp_path)
    done = run_python("-c", f"FOLDER = {str(tmp_path)!r}\n{code}")
    assert done.returncode == 0, done.stderr[-2000:]
