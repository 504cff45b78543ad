"""
Prompts that are encoded once. `pipeline.encode_prompt` is answered from what it gave before, whatever arguments it takes and
whatever it returns, so that the pipeline is called with prompts as ever while its text encoders are on the CPU.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from .joining import NotJoinedError, join, learn_to_join


class EncodedPrompts:
    """
    What a pipeline's text encoders give for each prompt, on the CPU: one entry for each prompt and setting of the pipeline,
    equal tensors once. A prompt that is not known yet is encoded when it comes, alone; how those of a batch are put together
    is learned from what the pipeline itself makes of a batch, and checked against it.
    """

    def __init__(self, pipeline: Any, device: torch.device, keeps: bool = True) -> None:
        self.pipeline = pipeline
        self.device = device
        self.keeps = keeps  # else each call encodes its prompts, for which the encoders come to the device
        self.encoders: dict[str, nn.Module] = {
            name: part
            for name, part in pipeline.components.items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
        if not self.encoders or not hasattr(pipeline, "encode_prompt"):
            missing = "method `encode_prompt`" if self.encoders else "component `text_encoder`"
            raise ValueError(
                f"{self._told}, but `{type(pipeline).__name__}` has no {missing}, and encodes prompts in its own way. Set it to "
                "False."
            )
        self.prompts: set[str] = set()  # that were filled in
        self._entries: dict[Any, Any] = {}
        self._tensors: dict[bytes, torch.Tensor] = {}
        self._joins: dict[Any, Any] = {}
        self._on_device = False

    def move_pipeline(self) -> None:
        """Move the pipeline to the device, but its text encoders to the CPU."""
        with _attributes(self.pipeline, dict.fromkeys(self.encoders)):
            self.pipeline.to(self.device)
        self._send_encoders_away()

    @property
    def _told(self) -> str:
        return f"`{'precompute_prompts' if self.keeps else 'offload'}` is True"

    @property
    def num_bytes(self) -> int:
        """Size of all that is kept."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Answer the pipeline's calls of `encode_prompt` within the block, in which it has no text encoders."""
        encode = self.pipeline.encode_prompt
        answer = functools.update_wrapper(functools.partial(self._answer, encode), encode)
        with _attributes(self.pipeline, {**dict.fromkeys(self.encoders), "encode_prompt": answer}):
            try:
                yield
            except AttributeError as error:
                if "NoneType" not in str(error):
                    raise
                raise ValueError(
                    f"{self._told}, but `{type(self.pipeline).__name__}` needs its text encoders outside of `encode_prompt` too "
                    f"({error}). Set it to False."
                ) from error

    def fill(
        self, prompts: Sequence[str], call: Callable[[list[str]], Any], batch_size: int, show_progress: bool = False
    ) -> None:
        """
        Encode prompts that are not known yet: `call(prompts)` calls the pipeline, which goes no further than to its denoiser.
        The shortest and the longest prompt come first, so that a pipeline whose batches cannot be put together is refused at once.
        """
        new = sorted({*prompts} - self.prompts, key=lambda prompt: (len(prompt), prompt))
        if not new:
            return
        new = [*new[:1], *reversed(new[1:])]
        batches = [new[start : start + batch_size] for start in range(0, len(new), batch_size)]
        denoisers = [getattr(self.pipeline, name, None) for name in ("transformer", "transformer_2", "unet")]
        with self._encoders_on_device(), ExitStack() as stack:
            for denoiser in denoisers:
                if isinstance(denoiser, nn.Module):
                    stack.callback(denoiser.register_forward_pre_hook(_stop, prepend=True).remove)
            for batch in tqdm(batches, desc="Encoding prompts", disable=not show_progress):
                with suppress(_StoppedError):
                    call(batch)
        self.prompts.update(new)

    def _answer(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `encode_prompt` gives for these arguments."""
        if not self.keeps:
            with self._encoders_in_pipeline():
                return encode(*args, **kwargs)
        named = {**dict(zip(inspect.signature(encode).parameters, args, strict=False)), **kwargs}
        # One prompt comes as a string, and is the same as in a batch.
        named = {
            name: [value] if isinstance(value, str) and "prompt" in name else value for name, value in named.items()
        }
        count = next((len(value) for value in named.values() if _is_strings(value)), None)
        setting = self._setting_of(named, count)
        keys, calls = [], []
        for index in range(count or 1):
            keys.append((setting, repr([value[index] for value in named.values() if _is_strings(value, count)])))
            alone = [_alone(value, index, count) for value in args]
            calls.append((alone, {name: _alone(value, index, count) for name, value in kwargs.items()}))
        missing = {key: call for key, call in zip(keys, calls, strict=True) if key not in self._entries}
        if missing:
            with self._encoders_in_pipeline():
                for key, (call_args, call_kwargs) in missing.items():
                    self._entries[key] = self._kept(encode(*call_args, **call_kwargs))
        entries = [self._entries[key] for key in keys]
        if len(entries) == 1:
            return self._given(entries[0])
        try:
            joined = join(entries, self._joins.get(setting))
        except NotJoinedError:  # this batch tells more than those before
            with self._encoders_in_pipeline():
                together = self._on_cpu(encode(*args, **kwargs))
            try:
                self._joins[setting] = learn_to_join(entries, together)
                joined = join(entries, self._joins[setting])
            except NotJoinedError as error:
                raise ValueError(
                    f"`precompute_prompts` is True, but what `{type(self.pipeline).__name__}` makes of several prompts at once "
                    f"cannot be put together from those of each ({error}). Set the batch sizes to 1, or "
                    "`precompute_prompts=False`."
                ) from error
        return self._given(joined)

    def _setting_of(self, named: Mapping[str, Any], count: int | None) -> str:
        """All that an encoding depends on beside its prompts."""
        setting = []
        for name, value in named.items():
            if name == "device":
                continue
            if not _is_plain(value):
                raise ValueError(
                    f"`precompute_prompts` is True, but `{type(self.pipeline).__name__}` encodes prompts together with `{name}` of "
                    f"type `{type(value).__name__}`, so that there is not one encoding of a prompt. Set "
                    "`precompute_prompts=False`."
                )
            setting.append((name, "prompts" if _is_strings(value, count) else value))
        autocast = torch.is_autocast_enabled(self.device.type) and torch.get_autocast_dtype(self.device.type)
        return repr((setting, autocast))

    @contextmanager
    def _encoders_on_device(self) -> Iterator[None]:
        if self._on_device:
            yield
            return
        self._on_device = True
        try:
            for encoder in self.encoders.values():
                encoder.to(self.device)
            yield
        finally:
            self._on_device = False
            self._send_encoders_away()

    def _send_encoders_away(self) -> None:
        """Move text encoders to the CPU."""
        for encoder in self.encoders.values():
            encoder.to("cpu")

    @contextmanager
    def _encoders_in_pipeline(self) -> Iterator[None]:
        with self._encoders_on_device(), _attributes(self.pipeline, self.encoders):
            yield

    def _on_cpu(self, output: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), output)

    def _kept(self, output: Any) -> Any:
        """An output as it is kept: equal tensors, such as those of the negative prompt, once."""

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.contiguous()
            content: Any = tensor.flatten().view(torch.uint8).numpy()
            digest = hashlib.blake2b(content, digest_size=16)
            digest.update(repr((tensor.shape, tensor.dtype)).encode())
            return self._tensors.setdefault(digest.digest(), tensor.clone())

        return tree_map_only(torch.Tensor, keep, self._on_cpu(output))

    def _given(self, output: Any) -> Any:
        """An output as the pipeline gets it, which may change it."""
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device, copy=True), output)


@contextmanager
def _attributes(pipeline: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Give a pipeline other attributes for a while, past its `__setattr__`, which would forget the classes of its components."""
    own = vars(pipeline)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


class _StoppedError(Exception):
    """All prompts of a call are encoded."""


def _stop(module: nn.Module, args: Any) -> None:
    raise _StoppedError


def _is_strings(value: Any, count: int | None = None) -> bool:
    """Whether a value is a list of strings, of as many as there are prompts."""
    is_list = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)
    return is_list and count in (None, len(value))


def _alone(value: Any, index: int, count: int | None) -> Any:
    """Argument of a call for one of its prompts."""
    return [value[index]] if _is_strings(value, count) else value


def _is_plain(value: Any) -> bool:
    """Whether a value is told by its `repr`."""
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, torch.dtype, torch.device))
