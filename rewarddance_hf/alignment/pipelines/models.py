"""Models of a pipeline: those that the gradient may reach, and what tells one pipeline from another."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ...resumable import describe_weights, digest_of
from .hooks import Hooks


# Parts of a pipeline that may be its denoiser
DENOISERS = ("transformer", "transformer_2", "unet")
# What pipelines, hooks and trainers change of a denoiser for a while, by name of the attribute
CALL_STATE = ("training", "processor", "_force_inference_output")
# What gradient checkpointing of diffusers leaves out of its calls, by class of the block. Chroma's images were others with it.
LEFT_OUT = {"ChromaSingleTransformerBlock": "attention_mask"}


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Models that the gradient may reach."""
    frozen = ("text_encoder", "image_encoder", "vae", "safety_checker")
    return {
        name: model
        for name, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module) and not name.startswith(frozen)
    }


def trained_models(pipeline: Any) -> list[str]:
    """Names of those that train."""
    return [name for name, model in models_of(pipeline).items() if any(p.requires_grad for p in model.parameters())]


def makers_of_steps(pipeline: Any) -> list[str]:
    """Name of the denoiser that makes each step of a schedule that is set, for a pipeline with two; empty for others."""
    if getattr(pipeline, "transformer_2", None) is None:
        return []
    scheduler, ratio = pipeline.scheduler, getattr(pipeline.config, "boundary_ratio", None)
    boundary = 0.0 if ratio is None else ratio * scheduler.config.num_train_timesteps
    return ["transformer" if timestep >= boundary else "transformer_2" for timestep in scheduler.timesteps.tolist()]


def listed(names: Iterable[str]) -> str:
    """Names of components, as messages tell them."""
    return ", ".join(f"`pipeline.{name}`" for name in names)


def clone_inputs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """
    Hook before a model's call: gradient needs its inputs as they were, but some pipelines write each step's result into the
    latents that they gave it (Kandinsky 5 from an image).
    """
    if not torch.is_grad_enabled():
        return None

    def clone(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(clone(value) for value in args), {name: clone(value) for name, value in kwargs.items()}


class CachedKeys:
    """
    Hooks around a model's call, for pipelines whose denoiser computes keys and values of reference images once, for all steps
    (Flux 2 Klein KV in its first step, GLM-Image before). They follow from trained weights, so that this pass needs gradient too.
    Such calls do without gradient checkpointing, which would read the cache again when the pipeline has cleared it.
    """

    def __init__(self, model: torch.nn.Module, hooks: Hooks, is_attached: bool) -> None:
        self.is_attached = is_attached
        hooks.callback(model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(self._after, with_kwargs=True).remove)
        hooks.callback(self._checkpoint_again, model)
        self.is_on = self.was_checkpointing = False

    @staticmethod
    def _mode(kwargs: dict[str, Any]) -> str | None:
        caches = getattr(kwargs.get("kv_caches"), "caches", None)
        return caches[0].mode if caches else kwargs.get("kv_cache_mode")

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = self._mode(kwargs)
        if self.is_attached and mode in ("extract", "write") and not torch.is_grad_enabled():
            self.is_on = True
            torch.set_grad_enabled(True)
        elif not self.is_attached and mode in ("cached", "read") and torch.is_grad_enabled():
            raise NotImplementedError(
                f"`{type(model).__name__}` has computed keys and values of the reference images already when a step-end "
                "callback is called, so that a part of the gradient would be lost. Use `with callback.attach(pipeline):`."
            )
        if mode is not None and getattr(model, "gradient_checkpointing", False):
            self.was_checkpointing, model.gradient_checkpointing = True, False

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.is_on:
            self.is_on = False
            torch.set_grad_enabled(False)
        self._checkpoint_again(model)

    def _checkpoint_again(self, model: Any) -> None:
        if self.was_checkpointing:
            self.was_checkpointing, model.gradient_checkpointing = False, True


def checkpoint_as_called(model: torch.nn.Module, hooks: Hooks) -> None:
    """
    Let gradient checkpointing compute blocks again as they were in the call. Their backward pass comes when pipelines have given
    them other attention processors again (perturbed attention guidance), and hooks and trainers their mode.
    """
    given: dict[str, Any] = {}

    def remember(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.update({name: kwargs.get(name) for name in LEFT_OUT.values()})

    def checkpoint_alike(checkpoint: Callable[..., Any], block: Any, *args: Any, **kwargs: Any) -> Any:
        name = LEFT_OUT.get(type(block).__name__)
        left_out = {name: given[name]} if name else {}
        states = {
            module: {name: value for name, value in vars(module).items() if name in CALL_STATE}
            for module in (block.modules() if isinstance(block, torch.nn.Module) else ())
        }

        def call(*args: Any) -> Any:
            with ExitStack() as stack:
                for module, state in states.items():
                    stack.callback(vars(module).update, {name: vars(module)[name] for name in state})
                    vars(module).update(state)
                return block(*args, **kwargs, **left_out)

        return checkpoint(call, *args)  # that of diffusers takes no others, though HunyuanImage passes some

    hooks.callback(model.register_forward_pre_hook(remember, with_kwargs=True).remove)
    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):
            name = "_gradient_checkpointing_func"
            hooks.set(module, name, partial(checkpoint_alike, getattr(module, name)))


def check_caches(pipeline: Any, what: str) -> None:
    """Refuse denoisers that use outputs of earlier steps again (`enable_cache`)."""
    for name, model in models_of(pipeline).items():
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(
                f"`pipeline.{name}` uses what earlier steps have computed again, but {what} requires that each step computes its "
                f"own. Call `pipeline.{name}.disable_cache()`."
            )


def save_copies(_: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Hook in place of a method that writes into what the backward pass needs (Kandinsky 5 and Marigold, after the last step)."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        return method(*args, **kwargs)


def check_trained(pipeline: Any) -> None:
    """Refuse calls whose images could not carry gradient."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "The pipeline runs in `torch.inference_mode()`, but gradient requires normal mode or `torch.no_grad()`. "
            "Call the pipeline outside of inference mode."
        )
    check_caches(pipeline, "gradient")
    if not trained_models(pipeline):
        raise ValueError(
            f"No parameter of {listed(models_of(pipeline))} requires grad, but the images "
            "must carry gradient to at least one. Add an adapter with `add_adapter(lora_config)` or call "
            "`requires_grad_(True)`."
        )


def describe_pipeline(pipeline: Any) -> dict[str, Any]:
    """Fingerprint of a generator: class, scheduler, some entries of all weights."""
    description = {"class": type(pipeline).__name__}
    for name, component in sorted(pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            description[name] = describe_weights(component)
        elif hasattr(component, "timesteps"):
            # Private entries list names in an order that differs from process to process.
            config = {key: value for key, value in component.config.items() if not key.startswith("_")}
            description[name] = f"{type(component).__name__} {digest_of(config)}"
    return description
