"""For processes of vLLM on a machine without CUDA: PyPI's torchvision loads once two operators are declared."""

import contextlib
import importlib.util


if importlib.util.find_spec("torchvision") is not None:
    with contextlib.suppress(ImportError):
        import torchvision_shim  # noqa: F401
