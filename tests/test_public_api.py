"""The public names, and how little importing them costs."""

import subprocess
import sys

import pytest
from new_process import run_python

import rewarddance_hf


def test_all_names_exist_and_are_sorted():
    """Every public name can be imported, the list is sorted, and it agrees with the lazy table."""
    assert rewarddance_hf.__all__ == sorted(rewarddance_hf._PUBLIC_NAMES)
    for name in rewarddance_hf.__all__:
        assert getattr(rewarddance_hf, name).__name__ == name
    assert set(rewarddance_hf.__all__) <= set(dir(rewarddance_hf))


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
