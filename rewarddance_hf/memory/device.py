"""
A second device without a GPU: tensors that hold CPU memory, but are as strict as CUDA's about which tensors meet.

`register()` makes `torch.device("second")` known to this process, for good: it is for processes of their own (`apart`). A
tensor on it that meets one on the CPU is an error, also in a backward pass, as is a way to NumPy other than over `cpu()`.
Numbers are those of the CPU. Kernels and speed of a GPU are not what it can tell about.

`register(largest=n)` gives values to no tensor of more than `n` floats: these take no memory and no time, so that models of
any size run, to count what they would allocate (`memory`), also by autocast and attention as on CUDA. What is read out of
them is 0 for a single number, else 0.5, 1 or True; no index is one of True.
"""

import math
import weakref
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


NAME = "second"
aten = torch.ops.aten
# CUDA too takes CPU tensors here: what is copied, and indices.
ACROSS_DEVICES = {aten._to_copy.default}
WITH_CPU_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# These write into a tensor that they resize, which a wrapper would not notice.
FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm")
LOW_PRECISION = ("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "conv1d", "conv2d", "conv3d", "convolution")
# Of those that autocast runs in float32 on CUDA: what models of ours keep large results of.
FULL_PRECISION = ("layer_norm", "group_norm", "rms_norm", "pow.Tensor_Scalar", "rsqrt", "exp")
# One kernel on CUDA, but several operations on a device that is not known to torch
ONE_KERNEL = ("silu_backward", "mish_backward")
_libraries: list[torch.library.Library] = []
_largest: float = float("inf")
_casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of weights, which autocast keeps until its end


class Memory:
    """Bytes that are allocated on the device, each storage once."""

    now = 0
    peak = 0


memory = Memory()
_allocations: "weakref.WeakValueDictionary[int, _Allocation]" = weakref.WeakValueDictionary()


class _Allocation:
    """A storage on the device, as long as a tensor has it."""

    def __init__(self, size: int) -> None:
        self.size = size
        memory.now += size
        memory.peak = max(memory.peak, memory.now)

    def __del__(self, memory: Memory = memory) -> None:
        memory.now -= self.size


class SecondDeviceTensor(torch.Tensor):
    """Tensor on the second device around one on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
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
        storage = inner.untyped_storage()
        self.allocation = _allocations.get(storage._cdata)
        if self.allocation is None:
            self.allocation = _allocations[storage._cdata] = _Allocation(storage.nbytes())

    def __repr__(self) -> str:  # torch's own would print the result of operations of this class
        return f"SecondDeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is aten._local_scalar_dense.default:
            return _item(args[0])
        if func is aten.equal.default and any(tensor.inner.is_meta for tensor in tensors):
            return True
        if func is aten._conj.default:  # a lazy one would be unknown to the wrapper
            return cls(args[0].inner.conj_physical())
        if func is aten.copy_.default:
            return _copy(args[1], args[0])
        if func not in ACROSS_DEVICES:
            strict = tree_leaves((args[0], args[2:]) if func in WITH_CPU_INDICES else (args, kwargs))
            if any(isinstance(leaf, torch.Tensor) and not isinstance(leaf, cls) and leaf.ndim for leaf in strict):
                devices = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
                raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {devices}")
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = "cpu"
        to_cpu = device is not None and torch.device(device).type == "cpu"
        args_inside, kwargs_inside = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs))
        inside = [leaf for leaf in tree_leaves((args_inside, kwargs_inside)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_meta for tensor in inside):
            if func is aten.nonzero.default:  # of checks for what is not finite, which nothing is
                return cls(torch.zeros(0, args[0].ndim, dtype=torch.int64))
            if to_cpu:
                # Without memory there too: models that leave the device take none
                return torch.full((), 0.5, dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
            args_inside, kwargs_inside = _without_values(func, args_inside, kwargs_inside)
            if device is not None:
                kwargs_inside["device"] = "meta"
        result = func(*args_inside, **kwargs_inside)
        if to_cpu:
            return result
        if func._schema.name.endswith("_") and isinstance(args[0], cls):
            return args[0]
        given = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, cls)}
        return tree_map_only(torch.Tensor, lambda t: given[id(t)] if id(t) in given else _wrap(t), result)

    @classmethod
    def run(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Run an operation as it is."""
        return cls.__torch_dispatch__(func, (), args, kwargs)

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.ndim == 0 else repr(self), specification)

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
    if tensor.is_meta and tensor.ndim == 0 and tensor.is_floating_point():
        return SecondDeviceTensor(torch.zeros((), dtype=tensor.dtype))  # what is compared or printed: no difference
    if tensor.is_floating_point() and tensor.untyped_storage().nbytes() > _largest * tensor.element_size():
        tensor = tensor.to("meta")
    return SecondDeviceTensor(tensor)


def _copy(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    inside = [tensor.inner if isinstance(tensor, SecondDeviceTensor) else tensor for tensor in (source, target)]
    if inside[0].is_meta and not inside[1].is_meta:
        inside[1].fill_(0.5)
    else:
        inside[1].copy_(inside[0])
    return target


def _place(size: Any, dtype: torch.dtype | None) -> str:
    dtype = dtype or torch.get_default_dtype()
    return "meta" if dtype.is_floating_point and math.prod(size) > _largest else "cpu"


def _item(tensor: SecondDeviceTensor) -> Any:
    if not tensor.inner.is_meta:
        return tensor.inner.item()
    return True if tensor.dtype == torch.bool else 0.5 if tensor.dtype.is_floating_point else 1


def _without_values(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments as tensors without values, of which masks become as many indices as they have."""
    if func in WITH_CPU_INDICES:
        indices: list[Any] = []
        for index in args[1]:
            mask = index is not None and index.dtype == torch.bool
            indices += index.nonzero(as_tuple=True) if mask else [index]
        args = (args[0], indices, *args[2:])
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast makes of a tensor; a weight is cast once."""
    if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
        return tensor
    is_weight = tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32
    if _largest == float("inf") or not (is_weight and torch.is_autocast_cache_enabled()):
        return tensor.to(dtype)
    if id(tensor) not in _casts:
        _casts[id(tensor)] = (tensor, tensor.to(dtype))
    return _casts[id(tensor)][1]


class _FusedAttention(torch.autograd.Function):
    """Attention as fused kernels allocate for it, without values."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # In the order in which they come from their layers, with heads behind positions
        *first, heads, length, _ = query.shape
        output = query.new_zeros(*first, length, heads, value.shape[-1]).transpose(-2, -3)
        ctx.save_for_backward(query, key, value, output, query.new_zeros(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


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


def register(largest: float = float("inf")) -> torch.device:
    """
    Make the device known to torch. `Module.to` replaces parameters on the way there.

    Args:
        largest (`float`, *optional*):
            Number of elements beyond which a tensor of floats has no values. Defaults to none: all have.
    """
    global _largest
    if _libraries:
        if largest != _largest:
            raise ValueError(
                f"`largest` is {largest}, but the device is registered with {_largest}, for good. Use a new process."
            )
        return torch.device(NAME, 0)
    _largest = largest
    # Without this, a thread of torch for each device calls Python, also while the process ends, which aborts it.
    torch.autograd.set_multithreading_enabled(False)
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    fallback = torch.library.Library("_", "IMPL")
    _libraries.extend((library, fallback))

    def empty(
        size: Any,
        dtype: Any = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: Any = None,
        memory_format: Any = None,
    ) -> Any:
        place = _place(size, dtype)
        return _wrap(torch.empty(size, dtype=dtype, memory_format=memory_format, device=place))

    def empty_strided(
        size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
    ) -> Any:
        return _wrap(torch.empty_strided(size, stride, dtype=dtype, device=_place(size, dtype)))

    def factory(name: str) -> Any:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        return lambda *args, device=None, pin_memory=None, **kwargs: _wrap(operation(*args, device="cpu", **kwargs))

    def under_autocast(name: str, dtype: torch.dtype | None) -> Any:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                wanted = dtype or torch.get_autocast_dtype(NAME)
                cast = partial(_cast, dtype=wanted)
                return operation(*tree_map_only(torch.Tensor, cast, args), **tree_map_only(torch.Tensor, cast, kwargs))

        return run

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy, "PrivateUse1")
    library.impl("_local_scalar_dense", _item, "PrivateUse1")
    for name in FACTORIES:
        library.impl(name, factory(name), "PrivateUse1")
    if largest != float("inf"):

        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return _FusedAttention.apply(query, key, value)

        library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
        library.impl("scaled_dot_product_attention", attention, "PrivateUse1")
        library.impl(
            "scaled_dot_product_attention",
            under_autocast("scaled_dot_product_attention", None),
            "AutocastPrivateUse1",
        )
        for name in ONE_KERNEL:
            library.impl(name, partial(SecondDeviceTensor.run, getattr(aten, name).default), "AutogradPrivateUse1")
        for name in FULL_PRECISION:
            library.impl(name, under_autocast(name, torch.float32), "AutocastPrivateUse1")
        clear = torch.clear_autocast_cache

        def clear_all() -> None:
            clear()
            _casts.clear()

        torch.clear_autocast_cache = clear_all  # type: ignore[assignment]
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOW_PRECISION:
        library.impl(name, under_autocast(name, None), "AutocastPrivateUse1")
    return torch.device(NAME, 0)
