"""Fixtures shared by all tests: no network, one thread per test process, tiny models built once per process."""

import gc
import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402


HAS_TORCHVISION = os.environ.get("REWARDDANCE_TEST_TORCHVISION") == "1"
if HAS_TORCHVISION:
    import torchvision_shim

import transformers  # noqa: E402
from tiny_vlms import FAMILIES, save_tiny_vlm  # noqa: E402


torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def older_objects_are_left_alone():
    """Trainers and pipelines collect garbage often: what exists before a file's tests, modules above all, is passed over."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    config.addinivalue_line("markers", "new_process: starts Python anew, where torchvision cannot be made importable")
    config.addinivalue_line("markers", "every_family: runs in all families in `make test` too")


# Those that differ most. What is promised of every family (scores of the plain model, whatever the batch; saving and loading)
# is marked `every_family`; in the other families all else is left to `make test-all`.
SOME_FAMILIES = ("gemma3", "internvl", "qwen3_vl")


# `--dist loadfile` gives a process the next file in this order: those that take long come first.
LONG_FILES = [
    "hub/test_release_artifacts.py",
    "alignment/test_refl_trainer.py",
    "trainer/test_rewarddance_trainer.py",
    "examples/test_examples.py",
    "hub/test_remote_code_hub.py",
    "hub/test_release.py",
    "shapes/test_demo.py",
    "trainer/test_learning.py",
    "hub/test_hub_server.py",
    "alignment/test_search.py",
    "alignment/test_second_device.py",
    "examples/test_paper.py",
    "examples/test_search_example.py",
    "data/test_sources.py",
    "scoring/test_reasoning.py",
    "scoring/test_engine.py",
    "models/test_modeling.py",
]


def other_family(item) -> bool:
    """Whether the fixture `family` gives a family that is none of the few. Families that a test names itself are all run."""
    named = any("family" in mark.args[0] for mark in item.iter_markers("parametrize"))
    family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
    return family is not None and not named and family not in SOME_FAMILIES


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    places = {str(Path(__file__).parent / file): place for place, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))
    for item in items:
        if other_family(item) and not item.get_closest_marker("every_family"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("torchvision") and not HAS_TORCHVISION:
            item.add_marker(pytest.mark.skip(reason="needs torchvision: `make test-torchvision`"))
        if item.get_closest_marker("new_process") and HAS_TORCHVISION and torchvision_shim.NEEDED:
            item.add_marker(pytest.mark.skip(reason="torchvision does not load beside this build of torch"))


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory):
    """Function that gives the folder of a family's tiny plain checkpoint. Read only: tests never write there."""
    folders = {}

    def folder(family: str):
        if family not in folders:
            folders[family] = save_tiny_vlm(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def judge(vlm_folder):
    """Folder of a plain checkpoint that judges pairs zero-shot, as commands take it. Read only."""
    return str(vlm_folder("internvl"))


@pytest.fixture(scope="session")
def pointwise_judge(judge, tmp_path_factory):
    """Folder of a saved judge of single images. Read only."""
    from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor

    folder = tmp_path_factory.mktemp("pointwise")
    RewardDanceForYesScoring.from_pretrained(judge, paradigm="pointwise").save_pretrained(folder)
    RewardDanceProcessor.from_pretrained(judge).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param
