"""
Images that carry gradient, from diffusers pipelines (reward fine-tuning, Sec. 3.3.1 of the
[RewardDance paper](https://huggingface.co/papers/2509.08826)).

A pipeline runs under `torch.no_grad()`. A callback may switch the gradient on for later steps, and the pipeline switches
it off when its call ends. [ReFL](https://huggingface.co/papers/2304.05977) needs gradient in one late step, drawn at
random, whose prediction of the clean image is decoded; [DRaFT-K](https://huggingface.co/papers/2309.17400) needs it in
the last K steps. The paper uses ReFL; DRaFT-K is an addition.
"""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers.callbacks import PipelineCallback  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402

from .pipelines.hooks import Hooks, argument_of  # noqa: E402
from .pipelines.models import (  # noqa: E402
    CachedKeys,
    check_trained,
    checkpoint_as_called,
    clone_inputs,
    listed,
    makers_of_steps,
    models_of,
    save_copies,
    trained_models,
)
from .pipelines.noise_levels import detach_state, place_of, step_to_clean  # noqa: E402
from .pipelines.schedule import steps_announced, steps_known  # noqa: E402
from .pipelines.vae import decode_in_parts  # noqa: E402
from .steps import ATTACH, StepChoice  # noqa: E402


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
    works for every pipeline that calls `scheduler.step`, and is the only way to gradient in the very first step. Some
    of these pipelines silently ignore the callback; [`~RewardGradientCallback.check_pipeline`] raises for them.

    Images have shape `(batch_size, 3, height, width)`, clips `(batch_size, num_frames, 3, height, width)`, both in
    `[0, 1]`. Pixels that the pipeline clamps to 0 or 1 get no gradient. Text encoders run before the first step and get
    none either. The pipeline may be called under `torch.no_grad()`, but not under `torch.inference_mode()`. Models that
    are offloaded (`enable_model_cpu_offload()`) are not where the backward pass needs them.

    Note: This callback hooks methods of the pipeline, its scheduler, VAE and image processor for the time of the call. They
    are as before when the call ends. A call that fails leaves hooks without effect, which go when the next one begins;
    [`~RewardGradientCallback.attach`] undoes everything at once.

    Args:
        method (`str`, *optional*, defaults to `"refl"`):
            `"refl"` for gradient in one step drawn at random, the prediction of the clean image there being decoded;
            `"draft"` for gradient in the last `num_gradient_steps` steps, which leaves the images as they are.
        step_index_range (`tuple[int, int]`, *optional*):
            First step that `"refl"` may draw, and the step after the last one. Steps count from 0, which is pure
            noise.
        step_ratio_range (`tuple[float, float]`, *optional*):
            The same as ratios of the number of steps. Defaults to `(0.75, 1.0)`, the last quarter, if neither is
            given. Of two denoisers (Wan 2.2) it is the last quarter of the steps of each one that trains. Only steps of those
            are drawn in any case.
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
        steps_of (`dict[str, list[int]]`):
            For a pipeline with two denoisers, steps of the latest call that could have had gradient, by the name of the
            denoiser that makes them. Empty for others.

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
        self.steps = StepChoice(method, step_index_range, step_ratio_range, num_gradient_steps)
        if not 0.0 < vae_scale <= 1.0:
            raise ValueError(f"`vae_scale` is {vae_scale}, but must be above 0.0 and at most 1.0.")
        self.vae_checkpointing = vae_checkpointing
        self.vae_slicing = vae_slicing
        self.vae_scale = vae_scale
        self.generator = torch.Generator().manual_seed(seed)
        self.last_step: int | None = None
        self.steps_of: dict[str, list[int]] = {}
        self._attached = False
        self._run: _Run | None = None

    @staticmethod
    def check_pipeline(pipeline: Any) -> None:
        """
        Make sure that a pipeline calls the callbacks that it is given.

        Some pipelines accept and ignore unknown arguments, so the callback would have no effect.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                Pipeline that the callback is for.

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
        if self._attached:
            return callback_kwargs
        if step_index == 0 and not torch.is_grad_enabled():  # pipelines run under `torch.no_grad()`
            hooks = Hooks(pipeline)
            try:
                self._hook(pipeline, hooks, hooks.close, set_timesteps=_before(hooks.close))
                self._begin(pipeline, steps_known(pipeline, pipeline.scheduler), 1)
            except BaseException:
                hooks.close()
                raise
        elif self._run is None or self._run.num_steps_made != step_index + 1:
            raise NotImplementedError(
                f"The callback was called after step {step_index} of `{type(pipeline).__name__}`, but needs to be called "
                "from the first step on, within a call of the pipeline, and once for each step that `pipeline.scheduler` "
                f"itself makes. Use {ATTACH}."
            )
        return callback_kwargs

    @contextmanager
    def attach(self, pipeline: Any) -> Iterator["RewardGradientCallback"]:
        """
        Make the images of a pipeline carry gradient through its scheduler instead of a step-end callback.

        Works for pipelines without a step-end callback, and is the only way to gradient in the first step. One step is
        drawn for each call of the pipeline in the `with` block.

        Note: The hooks are removed at the end of the block.

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

        is_set_up = False

        def set_up(_: Any, set_timesteps: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            nonlocal is_set_up
            is_set_up = True
            return set_timesteps(*args, **kwargs)

        def begin(_: Any, progress_bar: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            try:
                self._begin(pipeline, steps_announced(pipeline, pipeline.scheduler, progress_bar, args, kwargs), 0)
            except ValueError:
                if is_set_up:  # else the bar is of something before, such as a prior with a scheduler of its own
                    raise
            return progress_bar(*args, **kwargs)

        def end() -> None:
            nonlocal is_set_up
            is_set_up = False
            self._end()

        with Hooks(pipeline) as hooks:
            hooks.callback(torch.set_grad_enabled, torch.is_grad_enabled())
            hooks.set(self, "_attached", True)
            self._hook(pipeline, hooks, end, progress_bar=begin, set_timesteps=set_up)
            try:
                yield self
            except RuntimeError as error:
                _explain_arrays(pipeline, error)
                raise

    def _hook(self, pipeline: Any, hooks: Hooks, end: Callable[[], None], **more: Callable[..., Any]) -> None:
        """
        Hook a pipeline for one call or several, each of which calls `end` when it has its images; `more` are hooks of methods of
        the pipeline or its scheduler.
        """
        hooks.callback(self._end)
        if hasattr(pipeline, "_interrupt"):
            hooks.callback(setattr, pipeline, "_interrupt", pipeline._interrupt)
        for model in models_of(pipeline).values():
            CachedKeys(model, hooks, self._attached)
            hooks.callback(model.register_forward_pre_hook(clone_inputs, with_kwargs=True).remove)
            # HiDream's denoiser gives another layout in training mode, but its experts give no gradient in evaluation mode.
            hooks.set(model, "training", False)
            for experts in (module for module in model.modules() if hasattr(module, "moe_infer")):
                hooks.set(experts, "training", True)
                hooks.set(experts, "_force_inference_output", False)  # by a setting of its configuration
            checkpoint_as_called(model, hooks)
        hooks.wrap(pipeline.scheduler, step=self._step, add_noise=self._noise, scale_noise=self._noise, **more)
        hooks.wrap(pipeline, maybe_free_model_hooks=_before(self._check_steps, end), **more)
        hooks.wrap(pipeline, normalize_first_frame=save_copies, normalize_normals=save_copies)
        hooks.wrap(pipeline, decode_latents=_without_arrays)
        for name in ("vae", "movq"):
            if getattr(pipeline, name, None) is not None:
                hooks.wrap(getattr(pipeline, name), decode=functools.partial(self._decode, pipeline))
        for name in ("image_processor", "video_processor"):
            if getattr(pipeline, name, None) is not None:
                hooks.wrap(getattr(pipeline, name), postprocess=self._output, postprocess_video=self._output)

    def _begin(self, pipeline: Any, num_steps: int, num_steps_made: int) -> None:
        """Begin the denoising loop of one call."""
        self._end()
        check_trained(pipeline)
        first_step = self._draw_step(pipeline, num_steps, num_steps_made)
        self._run = _Run(self, pipeline, num_steps, first_step, num_steps_made)

    def _end(self) -> None:
        if self._run is not None:
            for scheduler in self._run.schedulers:
                detach_state(scheduler)
        self._run = None

    def _check_steps(self) -> None:
        if self._run is not None and self._run.num_steps_made <= self._run.first_step:
            run = self._run
            raise NotImplementedError(
                f"`{type(run.pipeline).__name__}` made {run.num_steps_made} of the {run.num_steps} steps that it announced, "
                f"but the first with gradient is step {run.first_step}. Raise `strength` if it takes one, or use another pipeline."
            )

    def _draw_step(self, pipeline: Any, num_steps: int, earliest: int) -> int:
        """First step with gradient: random for ReFL, fixed for DRaFT-K."""
        makers = makers_of_steps(pipeline)
        if len(makers) != num_steps:  # one denoiser, or a pipeline that leaves out some of the schedule
            makers = []
        steps, self.steps_of = self.steps.among(num_steps, earliest, makers, trained_models(pipeline))
        if self.steps.method == "draft":
            self.last_step = steps[0]
        else:
            self.last_step = steps[int(torch.randint(len(steps), (1,), generator=self.generator))]
        return self.last_step

    # What is called in place of the pipeline's methods

    def _step(self, scheduler: Any, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            raise NotImplementedError(
                "`scheduler.step` was called before `pipeline.progress_bar`, but the number of steps must be known. Call the "
                "pipeline itself within `attach`, or take another one if it has no `progress_bar` around its steps."
            )
        return self._run.step(scheduler, step, args, kwargs)

    def _noise(self, scheduler: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Inpainting keeps a region as it is: noised after each step, and clean beside the clean prediction."""
        holds = self._run is not None and id(scheduler) in self._run.clean
        return argument_of(method, args, kwargs) if holds else method(*args, **kwargs)

    def _decode(self, pipeline: Any, _: Any, decode: Callable[..., Any], /, z: Any, *args: Any, **kwargs: Any) -> Any:
        if self._run is None or not z.requires_grad:  # somebody else's latents
            return decode(z, *args, **kwargs)
        for name in ("safety_checker", "watermark"):
            if getattr(pipeline, name, None) is not None:
                raise ValueError(
                    f"`pipeline.{name}` is a `{type(getattr(pipeline, name)).__name__}`, but it turns images into arrays, "
                    f"which cuts the gradient. Set `pipeline.{name} = None`. A pipeline that does not run without (Cosmos) can be "
                    'called with `output_type="latent"` and its latents decoded, but not be tuned by `ReFLTrainer`.'
                )
        if self.vae_checkpointing or self.vae_slicing or self.vae_scale < 1.0:
            decode = decode_in_parts(decode, self.vae_checkpointing, self.vae_slicing, self.vae_scale)
        return decode(z, *args, **kwargs)

    def _output(self, _: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        output_type = argument_of(method, args, kwargs, "output_type")
        if output_type in ("pil", "np") and argument_of(method, args, kwargs).requires_grad:
            raise ValueError(
                f"`output_type` is {output_type!r}, but only tensors carry gradient. Call the pipeline with "
                '`output_type="pt"`.'
            )
        return method(*args, **kwargs)


class _Run:
    """The denoising loop of one call of a pipeline. `num_steps_made` steps were made before it was known."""

    def __init__(
        self, callback: RewardGradientCallback, pipeline: Any, num_steps: int, first_step: int, num_steps_made: int
    ) -> None:
        self.pipeline = pipeline
        self.num_steps = num_steps
        self.first_step = first_step
        self.refl = callback.steps.method == "refl"
        self.begins_at = self.num_steps_made = num_steps_made
        # Some pipelines copy their scheduler: each copy counts its own steps and has its own prediction.
        self.schedulers: list[Any] = []
        self.steps: dict[int, int] = {}
        self.places: dict[int, Any] = {}
        self.clean: dict[int, Any] = {}
        # Pipelines without this attribute make all steps.
        self.interruptible = hasattr(pipeline, "_interrupt")
        torch.set_grad_enabled(num_steps_made == first_step)

    def step(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step of a scheduler. From ReFL's random step on, its result is the clean prediction."""
        timestep = argument_of(step, args, kwargs, "timestep")
        if id(scheduler) not in self.steps:
            self.schedulers.append(scheduler)
            self._check_schedule(scheduler, timestep)
        place = place_of(scheduler, timestep)
        if place is not None and place == self.places.get(id(scheduler)):
            raise NotImplementedError(
                f"`{type(self.pipeline).__name__}` calls `scheduler.step` several times for each of its steps, but gradient "
                "requires one call for each. Use another pipeline."
            )
        self.places[id(scheduler)] = place
        index = self.steps.get(id(scheduler), self.begins_at)
        if self.refl and index >= self.first_step:
            output = self._hold(scheduler, step, args, kwargs, index)
        else:
            output = step(*args, **kwargs)
        if index == (self.first_step if self.refl else self.num_steps - 1) and index == self.num_steps_made:
            self._check_gradient(index, output[0])
        self.steps[id(scheduler)] = index + 1
        self.num_steps_made = max(self.num_steps_made, index + 1)
        if index + 1 == self.first_step:
            torch.set_grad_enabled(True)
        return output

    def _hold(
        self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], index: int
    ) -> Any:
        arguments = inspect.signature(step).bind(*args, **kwargs)
        return_dict = arguments.arguments.get("return_dict", True)
        if id(scheduler) not in self.clean:
            with torch.enable_grad():
                self.clean[id(scheduler)] = step_to_clean(scheduler, step, arguments)
            if self.interruptible:
                self.pipeline._interrupt = True
        else:
            self.interruptible = False
        # Steps that the pipeline makes all the same hold the prediction and need no gradient.
        torch.set_grad_enabled(self.interruptible or index == self.num_steps - 1)
        clean = self.clean[id(scheduler)]
        return clean if return_dict else clean.to_tuple()

    def _check_schedule(self, scheduler: Any, timestep: Any) -> None:
        """Refuse pipelines that silently leave out the first steps."""
        if self.begins_at or self.num_steps != len(scheduler.timesteps) or torch.as_tensor(timestep).numel() != 1:
            return
        times = scheduler.timesteps.tolist()
        skipped = times.index(float(timestep)) if float(timestep) in times else 0
        if skipped:
            raise NotImplementedError(
                f"`{type(self.pipeline).__name__}` makes {self.num_steps - skipped} of the scheduler's {self.num_steps} "
                "steps, but gradient requires all of them. Pass `strength=1.0`."
            )

    def _check_gradient(self, index: int, latents: torch.Tensor) -> None:
        if not latents.requires_grad:
            raise ValueError(
                f"Step {index} ran without gradient: the denoiser that made it has no parameter that requires grad, while "
                f"{listed(trained_models(self.pipeline))} has. Put the adapter on the denoiser of this step, or choose other steps."
            )


def _without_arrays(pipeline: Any, decode_latents: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Refuse pipelines that make arrays of their images, whatever they were asked for (T2I adapters)."""
    try:
        return decode_latents(*args, **kwargs)
    except RuntimeError as error:
        if "numpy()" not in str(error):
            raise
        raise NotImplementedError(
            f"`{type(pipeline).__name__}` makes arrays of its images whatever its `output_type`, which cuts the gradient. Use "
            "another pipeline."
        ) from error


def _explain_arrays(pipeline: Any, error: RuntimeError) -> None:
    """Say what to do where a pipeline without image processor has made arrays of its images (Kandinsky, DeepFloyd IF)."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if "numpy()" in str(error) and frame.f_code.co_filename == inspect.getfile(type(pipeline)):
        raise ValueError(
            f"`{type(pipeline).__name__}` made arrays of its images, but only tensors carry gradient. Call it with "
            '`output_type="pt"`, or use another pipeline if it does so all the same.'
        ) from error


def _before(*actions: Callable[[], None]) -> Callable[..., Any]:
    """Hook that does something else before a method is called."""

    def hook(_: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        for action in actions:
            action()
        return method(*args, **kwargs)

    return hook
