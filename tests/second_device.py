"""
A second device without a GPU: tensors that hold CPU memory, but are as strict as CUDA's about which tensors meet.

`register()` makes `torch.device("second")` known to this process, for good: only processes that tests start use it. A
tensor on it that meets one on the CPU is an error, also in a backward pass, as is a way to NumPy other than over `cpu()`.
Numbers are those of the CPU. Kernels, speed and memory of a GPU are not what it can tell about.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


NAME = "second"
aten = torch.ops.aten
# CUDA too takes CPU tensors here.
ACROSS_DEVICES = {aten._to_copy.default}
WITH_CPU_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# These write into a tensor that they resize, which a wrapper would not notice.
FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm")
LOW_PRECISION = ("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "conv1d", "conv2d", "conv3d", "convolution")
_libraries: list[torch.library.Library] = []


class SecondDeviceTensor(torch.Tensor):
    """Tensor on the second device around one on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # torch's own would print the result of operations of this class
        return f"SecondDeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is aten._local_scalar_dense.default:
            return func(args[0].inner)
        if func is aten._conj.default:  # a lazy one would be unknown to the wrapper
            return cls(args[0].inner.conj_physical())
        if func is aten.copy_.default:
            return _copy(args[1], args[0])
        if func not in ACROSS_DEVICES | WITH_CPU_INDICES:
            if any(not isinstance(tensor, cls) and tensor.ndim for tensor in tensors):
                devices = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
                raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {devices}")
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = "cpu"
        args_inside, kwargs_inside = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs))
        result = func(*args_inside, **kwargs_inside)
        if device is not None and torch.device(device).type == "cpu":
            return result
        given = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, cls)}
        return tree_map_only(torch.Tensor, lambda t: given[id(t)] if id(t) in given else _wrap(t), result)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy. Use `cpu()` first.")

    # What files are written from

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def storage(self) -> Any:
        return self.inner.storage()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


def _wrap(tensor: torch.Tensor) -> SecondDeviceTensor:
    return SecondDeviceTensor(tensor)


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    inside = [tensor.inner if isinstance(tensor, SecondDeviceTensor) else tensor for tensor in (source, target)]
    inside[1].copy_(inside[0])
    return target


class _Backend:
    """What torch asks a device's module for."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> torch.device:
    """Make the device known to torch. `Module.to` replaces parameters on the way there."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    fallback = torch.library.Library("_", "IMPL")
    _libraries.extend((library, fallback))

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return _wrap(torch.empty(size, dtype=dtype, memory_format=memory_format))

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return _wrap(torch.empty_strided(size, stride, dtype=dtype))

    def factory(name: str) -> Any:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        return lambda *args, device=None, pin_memory=None, **kwargs: _wrap(operation(*args, device="cpu", **kwargs))

    def in_low_precision(name: str) -> Any:
        operation = getattr(aten, name).default
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

        def run(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                dtype = torch.get_autocast_dtype(NAME)
                args, kwargs = tree_map_only(
                    torch.Tensor,
                    lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor,
                    (args, kwargs),
                )
                return operation(*args, **kwargs)

        return run

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy, "PrivateUse1")
    library.impl("_local_scalar_dense", lambda tensor: tensor.inner.item(), "PrivateUse1")
    for name in FACTORIES:
        library.impl(name, factory(name), "PrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOW_PRECISION:
        library.impl(name, in_low_precision(name), "AutocastPrivateUse1")
    return torch.device(NAME, 0)
