"""
Images that carry gradient, from any diffusers pipeline (reward fine-tuning, Sec. 3.3.1 of the
[RewardDance paper](https://huggingface.co/papers/2509.08826)).

A pipeline runs under `torch.no_grad()`. A callback may switch the gradient on for later steps, and the pipeline switches
it off when its call ends. [ReFL](https://huggingface.co/papers/2304.05977) needs gradient in one late step, drawn at
random, whose prediction of the clean image is decoded; [DRaFT-K](https://huggingface.co/papers/2309.17400) needs it in
the last K steps. The paper uses ReFL; DRaFT-K is an addition.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers.callbacks import PipelineCallback  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.models.autoencoders.vae import DecoderOutput  # noqa: E402

from .pipelines.clean_prediction import detach_state, step_to_clean  # noqa: E402


ATTACH = "`with callback.attach(pipeline): images = pipeline(...).images`"


class RewardGradientCallback(PipelineCallback):
    r"""
    Callback that lets the images of a pipeline carry gradient to the weights of its denoiser.

    Pass it to a pipeline that has `callback_on_step_end`, with `output_type="pt"`:

    ```python
    callback = RewardGradientCallback(method="refl")
    images = pipeline(
        prompt,
        output_type="pt",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=callback.tensor_inputs,
    ).images
    loss = -reward(images, [prompt]).mean()
    loss.backward()
    ```

    For pipelines without step-end callback (PixArt, HunyuanVideo 1.5, ...) use [`~RewardGradientCallback.attach`]. It
    works for every pipeline, and alone allows gradient in the very first step. Some of these pipelines ignore the
    callback without a word; [`~RewardGradientCallback.check_pipeline`] raises for them.

    Images have shape `(batch_size, 3, height, width)`, clips `(batch_size, num_frames, 3, height, width)`, both in
    `[0, 1]`. Pixels that the pipeline clamps to 0 or 1 get no gradient. Text encoders run before the first step and get
    none either. The pipeline may be called under `torch.no_grad()`, but not under `torch.inference_mode()`. Models that
    are offloaded (`enable_model_cpu_offload()`) are not where the backward pass needs them.

    Note: This callback mutates the scheduler (its `step`), the pipeline (`_interrupt`) and the VAE (its `decode`, if one
    of the options below is used) for the time of the call. They are as before when the call ends, also by an exception.

    Args:
        method (`str`, *optional*, defaults to `"refl"`):
            `"refl"` for gradient in one step drawn at random, the prediction of the clean image there being decoded;
            `"draft"` for gradient in the last `num_gradient_steps` steps, which leaves the images as they are.
        step_index_range (`tuple[int, int]`, *optional*):
            First step that `"refl"` may draw, and the step after the last one. Steps count from 0, which is pure
            noise.
        step_ratio_range (`tuple[float, float]`, *optional*):
            The same as ratios of the number of steps. Defaults to `(0.75, 1.0)`, the last quarter, if neither is
            given.
        num_gradient_steps (`int`, *optional*, defaults to `1`):
            Number of steps with gradient of `"draft"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the `generator` that draws one step for each call of the pipeline.
        vae_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to compute the VAE's activations again in the backward pass, so that they are not kept beside those
            of the reward model.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether to decode images one by one, as `vae.enable_slicing()` does. With `vae_checkpointing`, the VAE's
            activations of only one image exist at a time.
        vae_scale (`float`, *optional*, defaults to `1.0`):
            Factor by which width and height of the latents shrink before they are decoded. Smaller images cost less
            memory.

    Attributes:
        generator (`torch.Generator`):
            Generator of the random step.
        last_step (`int`, *optional*):
            Index of the first step that had gradient in the latest call: the one that `"refl"` drew.

    Raises:
        `ValueError`: If an argument has no meaning.
    """

    tensor_inputs = ["latents"]

    @register_to_config
    def __init__(
        self,
        method: str = "refl",
        step_index_range: tuple[int, int] | None = None,
        step_ratio_range: tuple[float, float] | None = None,
        num_gradient_steps: int = 1,
        seed: int = 0,
        vae_checkpointing: bool = False,
        vae_slicing: bool = False,
        vae_scale: float = 1.0,
    ):
        # `PipelineCallback.__init__` is left out: it would put cut-off steps into the config.
        if method not in ("refl", "draft"):
            raise ValueError(f"`method` is {method!r}, but must be 'refl' or 'draft'.")
        if step_index_range is not None and step_ratio_range is not None:
            raise ValueError(
                f"`step_index_range` is {step_index_range} and `step_ratio_range` is {step_ratio_range}, but only one "
                "of them may be given. Drop the other."
            )
        if step_index_range is not None and not 0 <= step_index_range[0] < step_index_range[1]:
            raise ValueError(
                f"`step_index_range` is {step_index_range}, but must be the first step and the step after the last "
                "one, as in `range`. Swap or widen them."
            )
        if step_ratio_range is not None and not 0.0 <= step_ratio_range[0] < step_ratio_range[1] <= 1.0:
            raise ValueError(
                f"`step_ratio_range` is {step_ratio_range}, but must be two growing ratios between 0.0 and 1.0. "
                "Give numbers of steps as `step_index_range`."
            )
        if num_gradient_steps < 1:
            raise ValueError(f"`num_gradient_steps` is {num_gradient_steps}, but must be at least 1.")
        if not 0.0 < vae_scale <= 1.0:
            raise ValueError(f"`vae_scale` is {vae_scale}, but must be above 0.0 and at most 1.0.")
        self.method = method
        self.step_index_range = step_index_range
        self.step_ratio_range = step_ratio_range
        self.num_gradient_steps = num_gradient_steps
        self.vae_checkpointing = vae_checkpointing
        self.vae_slicing = vae_slicing
        self.vae_scale = vae_scale
        self.generator = torch.Generator().manual_seed(seed)
        self.last_step: int | None = None
        self._run: _Run | None = None

    @staticmethod
    def check_pipeline(pipeline: Any) -> None:
        """
        Make sure that a pipeline calls the callbacks that it is given.

        Some pipelines take and ignore unknown arguments, so that the callback would have no effect.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                Pipeline that shall get the callback.

        Raises:
            `ValueError`: If it has no step-end callback.
        """
        if "callback_on_step_end" not in inspect.signature(type(pipeline).__call__).parameters:
            raise ValueError(
                f"`{type(pipeline).__name__}` has no argument `callback_on_step_end`, but the callback must be called "
                f"after each step. Use {ATTACH}."
            )

    def callback_fn(
        self,
        pipeline: Any,
        step_index: int,
        timestep: int | torch.Tensor,
        callback_kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        run = self._run or self._begin_in_callback(pipeline, step_index)
        if not run.attached:
            run.finish_step(step_index)
        return callback_kwargs

    def _begin_in_callback(self, pipeline: Any, step_index: int) -> "_Run":
        """Change the scheduler until the denoising loop ends, and the VAE until it has decoded."""
        call = _running_call(pipeline)
        bar: Any = call.get("progress_bar")
        if step_index != 0 or bar is None:
            raise RuntimeError(
                f"`{type(pipeline).__name__}` called the callback first after step {step_index} and "
                f"{'without' if bar is None else 'with'} a progress bar, but the callback needs to be called from the "
                f"first step on, within `pipeline.progress_bar(...)`. Use {ATTACH}."
            )
        _check_call(pipeline, call)
        first_step = self._draw_step(pipeline.num_timesteps, 1)
        run = _Run(self, pipeline, pipeline.num_timesteps, first_step)
        exception = sys.exc_info()[1]

        def close() -> None:
            run.close()
            # An exception that is new since the call began is leaving the denoising loop: nothing will be decoded.
            if self._changes_decode and call.get("output_type") == "pt" and sys.exc_info()[1] is exception:
                self._change_next_decode(pipeline.vae)
            bar.close()

        # The progress bar is closed when the denoising loop ends, also by an exception. Nothing else that a pipeline
        # calls tells of that.
        run.changes.enter_context(_replaced(bar, "close", close))
        run.changes.enter_context(_replaced(pipeline.scheduler, "step", run.scheduler_step(pipeline.scheduler.step)))
        return run

    @contextmanager
    def attach(self, pipeline: Any) -> Iterator["RewardGradientCallback"]:
        """
        Make the images of a pipeline carry gradient through its scheduler instead of a step-end callback.

        Works for pipelines that have no step-end callback, and alone allows gradient in the first step. One step is
        drawn for each call of the pipeline in the `with` block.

        Note: `pipeline.scheduler` and `pipeline.vae` are changed within the block, and as before after it.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                Pipeline that is called in the block, once or more.

        Example:
        ```python
        callback = RewardGradientCallback(method="refl")
        with callback.attach(pipeline):
            images = pipeline(prompt, output_type="pt").images
        ```
        """
        scheduler = pipeline.scheduler
        step, set_timesteps = scheduler.step, scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def begin_call(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            self._end_run()
            num_steps = len(scheduler.timesteps)
            run = _Run(self, pipeline, num_steps, self._draw_step(num_steps, 0), attached=True)
            run.finish_step(-1)

        @functools.wraps(step)
        def run_step(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run is None:
                raise RuntimeError(
                    "`scheduler.step` was called before `scheduler.set_timesteps`, but the number of steps must be "
                    "known. Call the pipeline itself within `attach`."
                )
            if run.step_index == 0:
                call = _running_call(pipeline)
                _check_call(pipeline, call)
                timesteps = call.get("timesteps", scheduler.timesteps)
                if len(timesteps) != run.num_steps:
                    raise NotImplementedError(
                        f"`{type(pipeline).__name__}` makes {len(timesteps)} of the scheduler's {run.num_steps} steps, "
                        "but `attach` requires all of them. Pass the callback as `callback_on_step_end`."
                    )
            output = run.scheduler_step(step)(*args, **kwargs)
            run.finish_step(run.step_index)
            return output

        with ExitStack() as changes:
            changes.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            changes.callback(self._end_run)
            changes.enter_context(_replaced(scheduler, "set_timesteps", begin_call))
            changes.enter_context(_replaced(scheduler, "step", run_step))
            if self._changes_decode:
                changes.enter_context(_replaced(pipeline.vae, "decode", self._decode(pipeline.vae.decode)))
            yield self

    def _draw_step(self, num_steps: int, earliest: int) -> int:
        """First step with gradient: random for ReFL, fixed for DRaFT-K."""
        if self.method == "draft":
            arguments = f"num_gradient_steps={self.num_gradient_steps}"
            start, stop = num_steps - self.num_gradient_steps, num_steps
        elif self.step_index_range is not None:
            arguments = f"step_index_range={tuple(self.step_index_range)}"
            start, stop = self.step_index_range
        else:
            ratios = self.step_ratio_range or (0.75, 1.0)
            arguments = f"step_ratio_range={tuple(ratios)}"
            start, stop = (int(num_steps * ratio) for ratio in ratios)
        if not earliest <= start < stop <= num_steps:
            reason = (
                "" if earliest == 0 or start > 0 else f" (step 0 has ended when a callback is called; use {ATTACH})"
            )
            raise ValueError(
                f"The pipeline makes {num_steps} steps, but `{arguments}` requires steps {start} to {stop - 1} with "
                f"gradient, out of {earliest} to {num_steps - 1}{reason}. Raise `num_inference_steps` or change the "
                "argument."
            )
        if self.method == "draft":
            self.last_step = start
        else:
            self.last_step = int(torch.randint(start, stop, (1,), generator=self.generator))
        return self.last_step

    def _end_run(self) -> None:
        if self._run is not None:
            self._run.close()

    @property
    def _changes_decode(self) -> bool:
        return self.vae_checkpointing or self.vae_slicing or self.vae_scale < 1.0

    def _change_next_decode(self, vae: Any) -> None:
        """Decode with the memory options, once."""
        changes = ExitStack()
        decode = self._decode(vae.decode)

        def decode_once(*args: Any, **kwargs: Any) -> DecoderOutput | tuple[torch.Tensor]:
            with changes:
                return decode(*args, **kwargs)

        changes.enter_context(_replaced(vae, "decode", decode_once))

    def _decode(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """A VAE's `decode` with the memory options."""

        @functools.wraps(decode)
        def wrapper(z: torch.Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            if self.vae_scale < 1.0:
                z = _shrink(z, self.vae_scale)
            slices = z.split(1) if self.vae_slicing else (z,)
            images = []
            for index, latents in enumerate(slices):
                # Tensors with one entry for each image, such as the timestep of some video VAEs
                arguments = [
                    value[index : index + 1] if len(slices) > 1 and isinstance(value, torch.Tensor) else value
                    for value in args
                ]
                if self.vae_checkpointing:
                    output = checkpoint(decode, latents, *arguments, return_dict=False, use_reentrant=False, **kwargs)
                else:
                    output = decode(latents, *arguments, return_dict=False, **kwargs)
                images.append(output[0])
            sample = torch.cat(images)
            return DecoderOutput(sample=sample) if return_dict else (sample,)

        return wrapper


class _Run:
    """
    One call of a pipeline: which step is under way, and what is undone at its end.

    Args:
        callback ([`RewardGradientCallback`]):
            Callback that the run belongs to.
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline that is running.
        num_steps (`int`):
            Number of steps that the pipeline makes.
        first_step (`int`):
            First step with gradient.
        attached (`bool`, *optional*, defaults to `False`):
            Whether the steps are counted by calls of the scheduler.
    """

    def __init__(
        self,
        callback: RewardGradientCallback,
        pipeline: Any,
        num_steps: int,
        first_step: int,
        attached: bool = False,
    ):
        self.pipeline = pipeline
        self.num_steps = num_steps
        self.first_step = first_step
        self.attached = attached
        self.refl = callback.method == "refl"
        self.step_index = 0
        self.clean: Any = None
        # Pipelines without this attribute make all steps.
        self.interruptible = hasattr(pipeline, "_interrupt")
        self.changes = ExitStack()
        callback._run = self
        self.changes.callback(setattr, callback, "_run", None)
        self.changes.callback(detach_state, pipeline.scheduler)
        if self.interruptible:
            self.changes.callback(setattr, pipeline, "_interrupt", pipeline._interrupt)

    def close(self) -> None:
        self.clean = None
        self.changes.close()

    def finish_step(self, step_index: int) -> None:
        """Open the gradient if the step after this one is the first that needs it."""
        self.step_index = step_index + 1
        if self.step_index == self.first_step:
            torch.set_grad_enabled(True)

    def scheduler_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` of a scheduler, whose result is the clean prediction from ReFL's random step on."""
        signature = inspect.signature(step)

        @functools.wraps(step)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self.refl or self.step_index < self.first_step:
                return step(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs)
            return_dict = arguments.arguments.get("return_dict", True)
            if self.clean is None:
                self.clean = step_to_clean(self.pipeline.scheduler, step, arguments)
                detach_state(self.pipeline.scheduler)
                if self.interruptible:
                    self.pipeline._interrupt = True
            elif self.step_index > self.first_step:
                self.interruptible = False
            # Steps that the pipeline makes all the same hold the prediction and need no gradient.
            torch.set_grad_enabled(self.interruptible or self.step_index == self.num_steps - 1)
            return self.clean if return_dict else self.clean.to_tuple()

        return wrapper


def _running_call(pipeline: Any) -> dict[str, Any]:
    """Progress bar, timesteps and output type of the running call of `pipeline`, as far as it is one."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            variables = frame.f_locals
            if variables.get("self") is pipeline:
                names = ("progress_bar", "timesteps", "output_type")
                return {name: variables[name] for name in names if name in variables}
        frame = frame.f_back
    return {}


def _check_call(pipeline: Any, call: dict[str, Any]) -> None:
    """Refuse calls whose images could not carry gradient."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "The pipeline runs in `torch.inference_mode()`, but gradient requires normal mode or `torch.no_grad()`. "
            "Call the pipeline outside of inference mode."
        )
    output_type = call.get("output_type", "pt")
    if output_type not in ("pt", "latent"):
        raise ValueError(
            f"`output_type` is {output_type!r}, but only tensors carry gradient. Call the pipeline with "
            '`output_type="pt"`.'
        )
    for name in ("safety_checker", "watermark"):
        if output_type == "pt" and getattr(pipeline, name, None) is not None:
            raise ValueError(
                f"`pipeline.{name}` is a `{type(getattr(pipeline, name)).__name__}`, but it turns images into arrays, "
                f"which cuts the gradient. Set `pipeline.{name} = None`."
            )
    frozen = ("text_encoder", "image_encoder", "vae", "safety_checker")
    models = {
        name: model
        for name, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module) and not name.startswith(frozen)
    }
    if not any(parameter.requires_grad for model in models.values() for parameter in model.parameters()):
        raise ValueError(
            f"No parameter of {', '.join(f'`pipeline.{name}`' for name in models)} requires grad, but the images "
            "shall carry gradient to at least one. Add an adapter with `add_adapter(lora_config)` or call "
            "`requires_grad_(True)`."
        )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an instance for a while."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _shrink(latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Average latents over space, `(batch_size, channels, [num_frames,] height, width)`."""
    height, width = (max(1, round(size * scale)) for size in latents.shape[-2:])
    frames = latents.reshape(latents.shape[0], -1, *latents.shape[-2:])
    return F.interpolate(frames, size=(height, width), mode="area").reshape(*latents.shape[:-2], height, width)
