"""Fixtures shared by all tests: no network, one thread per test process, tiny models built once per process."""

import os


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


def pytest_configure(config):
    config.addinivalue_line("markers", "new_process: starts Python anew, where torchvision cannot be made importable")


def pytest_collection_modifyitems(items):
    for item in items:
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


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param
