"""
What a tiny pipeline is put to. Each check returns None, or raises: `NotApplicableError` where the pipeline alone cannot do it,
an error of this package, or whatever else, which is a fault.
"""

import contextlib
import copy
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler, SCMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from PIL import Image
from tiny_pipelines import relative_difference, reward

from rewarddance_hf.alignment.gradient import RewardGradientCallback
from rewarddance_hf.alignment.refl.arguments import ReFLTrainingArguments
from rewarddance_hf.alignment.refl.trainer import ReFLTrainer
from rewarddance_hf.alignment.search.replay import replay
from rewarddance_hf.alignment.search.search import best_of_n, search_over_paths, zero_order_search


STEPS, STRENGTH = 3, 0.8
FRAMES, SIDE = 5, 32  # of clips whose tests leave them open
AREA = 64 * 64  # of images that a pipeline makes of those that it is given
OTHER_PROMPT = "a circle"
ROUNDING = 2e-6  # layers whose weights train may run in other kernels
DENOISERS = ("transformer", "transformer_2", "unet")
# Arguments that a search and the trainer set themselves
OWN_ARGUMENTS = (
    "prompt",
    "generator",
    "output_type",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "return_dict",
    "batch_size",
)


class NotApplicableError(Exception):
    """A check that the pipeline alone cannot be put to, with the reason."""


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def limit_area(pipeline: Any) -> None:
    """Some pipelines work at a megapixel, whatever the size of what they are given."""
    if hasattr(pipeline, "resolutions"):
        pipeline.resolutions = [(64, 64)]
    module: Any = inspect.getmodule(type(pipeline))
    whole = getattr(module, "calculate_dimensions", None)
    if whole is not None:
        module.calculate_dimensions = lambda area, ratio: inspect.unwrap(whole)(min(area, AREA), ratio)
        module.calculate_dimensions.__wrapped__ = inspect.unwrap(whole)


class Tiny:
    """A pipeline whose denoisers train, and the arguments of its call."""

    def __init__(self, build: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
        self.pipeline, inputs = build()
        limit_area(self.pipeline)
        self.pipeline.set_progress_bar_config(disable=True)
        for model in self.pipeline.components.values():
            if isinstance(model, torch.nn.Module):
                model.eval().requires_grad_(False)
        self.denoisers = [getattr(self.pipeline, name) for name in DENOISERS if getattr(self.pipeline, name, None)]
        torch.manual_seed(1)
        for denoiser in self.denoisers:
            for parameter in denoiser.parameters():
                if (
                    not 1e-6 < parameter.abs().max() < 1e6
                ):  # gates and outputs that begin at zero, or are not set at all
                    parameter.data.normal_(0, 0.1)
        self.inputs = {name: value for name, value in inputs.items() if name not in OWN_ARGUMENTS[1:]}
        self.given_steps = self.inputs.get("num_inference_steps")
        if "num_inference_steps" in self.inputs:
            self.inputs["num_inference_steps"] = STEPS
        if self.inputs.get("strength") is not None:  # of which a small one leaves no step
            self.inputs["strength"] = max(self.inputs["strength"], STRENGTH)
        self.takes = inspect.signature(type(self.pipeline).__call__).parameters
        if "use_resolution_binning" in self.takes:
            self.inputs["use_resolution_binning"] = False  # which would make a megapixel of it
        if "num_frames" in self.takes:
            self.inputs.setdefault("num_frames", FRAMES)
            if "height" in self.takes and not any(
                word in name for name in inputs for word in ("image", "video", "_frames")
            ):
                self.inputs = {"height": SIDE, "width": SIDE, **self.inputs}
        prompt = inputs.get("prompt", "a circle")
        self.prompt = prompt if isinstance(prompt, str) else prompt[0]
        self.gives_prompt = "prompt" in inputs and inputs["prompt"] is not None
        self.settings = {name: value for name, value in self.inputs.items() if name != "prompt"}
        self.by_seed: dict[int, torch.Tensor] = {}
        self.global_seed = 3  # for pipelines that draw random numbers without their generator

    @functools.cached_property
    def image(self) -> torch.Tensor:
        """Image of the pipeline alone."""
        try:
            image = plain(self)
        except NotApplicableError as reason:  # distilled to a number of steps
            if "num_inference_steps" not in str(reason):
                raise
            self.inputs["num_inference_steps"] = self.settings["num_inference_steps"] = self.given_steps
            image = plain(self)
        if not image.isfinite().all():
            raise NotApplicableError("the pipeline alone makes an image that is not finite")
        if image.max() > 1.001:
            raise NotApplicableError("the pipeline alone makes values beyond 1 (high dynamic range)")
        if torch.equal(image, plain(self, seed=8)):
            raise NotApplicableError("the pipeline alone makes the same image of every seed")
        return image

    @functools.cached_property
    def _steps_and_passes(self) -> tuple[int, int]:
        if not hasattr(self.pipeline, "scheduler"):
            raise NotApplicableError("the pipeline alone has no scheduler")
        made = []

        def change(scheduler, index, step, model_output, timestep, sample):
            made.append(index)
            return step(model_output, timestep, sample)

        with steps_of(self.pipeline.scheduler, change), counted(self) as counts:
            plain(self)
        if not made:
            raise NotApplicableError("the pipeline alone calls no `scheduler.step`")
        return max(made) + 1, sum(counts)

    def check_same(self, images: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
        """Images that a seed shall make again, if the pipeline alone does."""
        difference = (images - expected).abs().max().item()
        if difference > tolerance and not (tolerance and are_rounded_apart(images, expected)):
            self.global_seed += 1
            is_chance = not torch.equal(plain(self), self.image)
            self.global_seed -= 1
            if is_chance:
                raise NotApplicableError("the pipeline alone draws random numbers without its generator")
            raise AssertionError(f"{what} off by {difference:.1e}")

    @property
    def num_steps(self) -> int:
        """Number of steps that the pipeline alone makes."""
        return self._steps_and_passes[0]

    @property
    def num_passes(self) -> int:
        """Number of samples that the denoiser of the pipeline alone sees."""
        return self._steps_and_passes[1]

    @functools.cached_property
    def prompts(self) -> list[str]:
        """Two prompts, which are the same if the vocabulary of the text encoder has one only."""
        try:
            plain(self, prompt=OTHER_PROMPT)
        except NotApplicableError:
            return [self.prompt, self.prompt]
        return [self.prompt, OTHER_PROMPT]

    @functools.cached_property
    def batch_size(self) -> int:
        """2 if the pipeline alone takes two prompts at a time, else 1."""
        try:
            return len(plain(self, seed=[1, 2], prompt=self.prompts)) if self.gives_prompt else 2
        except NotApplicableError:
            return 1

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for denoiser in self.denoisers for parameter in denoiser.parameters()]

    def train(self) -> None:
        if not self.denoisers:
            raise NotApplicableError("it has neither `transformer` nor `unet`")
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __call__(
        self, call: Callable[..., Any] | None = None, seed: int | list[int] = 7, **changes: Any
    ) -> torch.Tensor:
        """Images of the pipeline, or of another function with the same arguments."""
        arguments = self._arguments(seed) | changes
        # Without a processor, a pipeline leaves tensors as its decoder gives them, while a search takes its arrays.
        with_gradient = torch.is_grad_enabled()
        output_type = "pt" if self.has_processor or with_gradient else "np"
        images = tensor_of((call or self.pipeline)(**arguments, output_type=output_type)[0])
        if not self.has_processor and with_gradient and self.is_unscaled:
            images = (images / 2 + 0.5).clamp(0, 1)
        return images

    @property
    def has_processor(self) -> bool:
        return hasattr(self.pipeline, "image_processor") or hasattr(self.pipeline, "video_processor")

    @functools.cached_property
    def is_unscaled(self) -> bool:
        """Whether tensors of the pipeline alone are in [-1, 1], though its arrays are in [0, 1]."""
        tensors = tensor_of(self.pipeline(**self._arguments(7), output_type="pt")[0])
        return bool((tensors - self.image).abs().max() > 1e-3)

    def _arguments(self, seed: int | list[int]) -> dict[str, Any]:
        torch.manual_seed(self.global_seed)
        arguments = {name: clone(value) for name, value in self.inputs.items()}
        if "generator" in self.takes:
            seeds = seed if isinstance(seed, list) else [seed]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            arguments["generator"] = generators if isinstance(seed, list) else generators[0]
        return arguments

    def search_arguments(self) -> dict[str, Any]:
        return {name: clone(value) for name, value in self.settings.items()} | {"output_type": "pt"}


def are_rounded_apart(images: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether images of 8 bits, as Cosmos makes them, differ by one of 255 levels in less than one of a thousand values."""
    levels = [255 * values for values in (images, expected)]
    apart = (levels[0] - levels[1]).abs()
    is_8_bit = all((values - values.round()).abs().max() < 1e-3 for values in levels)
    return is_8_bit and apart.max().item() < 1.5 and (apart > 0.5).float().mean().item() < 1e-3


def tensor_of(images: Any) -> torch.Tensor:
    """Images as a pipeline gives them with `output_type="pt"`: some give lists, and some arrays all the same."""
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).movedim(-1, -3)
    if isinstance(images, torch.Tensor):
        return images
    return torch.stack([tensor_of(image) for image in images])


def plain(tiny: Tiny, **changes: Any) -> torch.Tensor:
    """Images of the pipeline alone."""
    try:
        with torch.no_grad():
            images = tiny(**changes)
    except Exception as error:
        raise NotApplicableError(f"the pipeline alone: {type(error).__name__}: {error}") from error
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise NotApplicableError(f"the pipeline alone makes no images, but {tuple(images.shape)}")
    return images


# Gradient


def attached(tiny: Tiny, callback: RewardGradientCallback) -> torch.Tensor:
    with callback.attach(tiny.pipeline):
        return tiny()


def refl(step: int) -> RewardGradientCallback:
    return RewardGradientCallback(method="refl", step_index_range=(step, step + 1))


def draft() -> RewardGradientCallback:
    return RewardGradientCallback(method="draft", num_gradient_steps=1)


def gradients(tiny: Tiny, images: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(reward(images).mean(), tiny.parameters, allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(found, tiny.parameters, strict=True)
    ]


@contextlib.contextmanager
def steps_of(scheduler: Any, change: Callable[..., Any]) -> Iterator[None]:
    """Give each step of a scheduler and its copies to `change(scheduler, index, step, model_output, timestep, sample)`."""
    kind, step = type(scheduler), type(scheduler).step
    counts: dict[int, int] = {}
    latest: dict[int, Any] = {}
    alive = []  # so that no two of them have the same address

    @functools.wraps(step)
    def changed(self, model_output, timestep, sample, *args, **kwargs):
        alive.append(self)
        place = (getattr(self, "_step_index", None) or 0, timestep)
        if not hasattr(self, "_step_index") or place != latest.get(id(self)):  # Cosmos steps twice from the same place
            counts[id(self)] = counts.get(id(self), -1) + 1
        latest[id(self)] = place
        more = inspect.signature(step).bind(self, model_output, timestep, sample, *args, **kwargs).arguments
        more = {
            name: value for name, value in more.items() if name not in ("self", "model_output", "timestep", "sample")
        }
        return change(self, counts[id(self)], functools.partial(step, self, **more), model_output, timestep, sample)

    kind.step = changed
    try:
        yield
    finally:
        kind.step = step


@contextlib.contextmanager
def whole_call(tiny: Tiny) -> Iterator[Callable[..., Any]]:
    """
    The pipeline's own code with gradient all along, also in experts, which it computes without (HiDream). Denoisers work on
    copies of the latents, which some pipelines write into (Kandinsky 5), and what the backward pass needs is copied.
    """

    def copy_inputs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def copied(value: Any) -> Any:
            return value * 1.0 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return tuple(copied(value) for value in args), {name: copied(value) for name, value in kwargs.items()}

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved))
        for denoiser in tiny.denoisers:
            stack.callback(denoiser.register_forward_pre_hook(copy_inputs, with_kwargs=True).remove)
            for kind in {type(module) for module in denoiser.modules() if hasattr(module, "moe_infer")}:
                stack.callback(setattr, kind, "moe_infer", kind.moe_infer)
                kind.moe_infer = inspect.unwrap(kind.moe_infer)
        yield functools.partial(inspect.unwrap(type(tiny.pipeline).__call__), tiny.pipeline)


def independent_draft(tiny: Tiny, num_steps: int) -> torch.Tensor:
    def change(scheduler, index, step, model_output, timestep, sample):
        if index < num_steps - 1:
            model_output, sample = model_output.detach(), sample.detach()
        return step(model_output, timestep, sample)

    with steps_of(tiny.pipeline.scheduler, change), whole_call(tiny) as call:
        return tiny(call)


def independent_refl(tiny: Tiny, drawn_step: int) -> torch.Tensor:
    clean = {}

    def change(scheduler, index, step, model_output, timestep, sample):
        if index < drawn_step:
            return step(model_output.detach(), timestep, sample.detach())
        if index == drawn_step:
            clean[scheduler] = textbook_clean(scheduler, index, step, model_output, timestep, sample.detach())
        returns_tuple = step.keywords.get("return_dict") is False
        # Some pipelines decode what consistency models predict beside the latents.
        count = 2 if isinstance(scheduler, (LCMScheduler, SCMScheduler)) else 1
        return (clean[scheduler],) * count if returns_tuple else SchedulerOutput(prev_sample=clean[scheduler])

    with steps_of(tiny.pipeline.scheduler, change), whole_call(tiny) as call:
        return tiny(call)


def textbook_clean(scheduler, index, step, model_output, timestep, sample):
    """Clean prediction with the formulas of the papers, or the one that the scheduler's step returns."""
    if step.keywords.get("per_token_timesteps") is not None:
        raise NotApplicableError("no independent clean prediction of tokens with noise levels of their own")
    name = type(scheduler).__name__
    if (
        name.startswith("FlowMatch")
        and not scheduler.config.get("invert_sigmas")
        and torch.as_tensor(timestep).ndim == 0
    ):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        return sample - scheduler.sigmas[scheduler.step_index] * model_output
    if name.startswith(("DPMSolverMultistep", "UniPC")):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        sigma = scheduler.sigmas[scheduler.step_index]
        scheduler._step_index += 1
        model_output = model_output[:, : sample.shape[1]]
        if scheduler.config.prediction_type == "flow_prediction":
            return sample - sigma * model_output
        if scheduler.config.prediction_type == "epsilon" and scheduler.config.use_flow_sigmas:  # SkyReels V2
            return (sample - sigma * model_output) / (1 - sigma)
        if scheduler.config.prediction_type == "epsilon":
            return sample * (1 + sigma**2).sqrt() - sigma * model_output
    if name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler") and scheduler.config.prediction_type == "epsilon":
        alpha = scheduler.alphas_cumprod[int(timestep)]
        clean = (sample - (1 - alpha).sqrt() * model_output[:, : sample.shape[1]]) / alpha.sqrt()
        if scheduler.config.get("clip_sample"):
            clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
        return clean
    output = functools.partial(step.func, *step.args, **step.keywords | {"return_dict": True})(
        model_output, timestep, sample
    )
    clean = getattr(output, "pred_original_sample", getattr(output, "denoised", None))
    if clean is None:
        raise NotApplicableError(f"no independent clean prediction of {name}")
    return clean


def check_images(tiny: Tiny) -> None:
    """With the callback and gradient in the last step, images are those of the pipeline alone, on both routes."""
    expected, num_steps = tiny.image, tiny.num_steps
    tiny.train()
    images = attached(tiny, draft())
    assert images.requires_grad, "no gradient"
    difference = (images - expected).abs().max().item()
    assert difference < ROUNDING, f"images differ by {difference:.1e}"
    difference = (plain(tiny) - expected).abs().max().item()
    assert difference < ROUNDING, f"images of the pipeline alone differ by {difference:.1e} after the call"
    # Both raise with advice to use `attach`.
    with contextlib.suppress(ValueError, NotImplementedError):
        RewardGradientCallback.check_pipeline(tiny.pipeline)
        if num_steps > 1:
            callback = draft()
            names = callback.tensor_inputs
            images = tiny(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
            assert images.requires_grad, "no gradient with `callback_on_step_end`"
            difference = (images - expected).abs().max().item()
            assert difference < ROUNDING, f"images with `callback_on_step_end` differ by {difference:.1e}"


def inside(images: torch.Tensor) -> None:
    share = ((images > 0) & (images < 1)).float().mean().item()
    if share < 0.02:
        raise NotApplicableError(f"the pipeline alone clamps {1 - share:.0%} of its pixels")


def check_draft(tiny: Tiny) -> None:
    """Gradient of the last step against the pipeline's own code, differentiated with the earlier steps cut off."""
    num_steps = tiny.num_steps
    inside(tiny.image)
    tiny.train()
    ours = gradients(tiny, attached(tiny, draft()))
    theirs = gradients(tiny, independent(independent_draft, tiny, num_steps))
    compare(ours, theirs)


def check_refl(tiny: Tiny) -> None:
    """Image and gradient of a later step against the pipeline's own code that goes on with the clean prediction."""
    num_steps = tiny.num_steps
    tiny.train()
    for step in sorted({min(1, num_steps - 1), num_steps - 1}):
        images = attached(tiny, refl(step))
        expected = independent(independent_refl, tiny, step)
        inside(expected)
        difference = (images - expected).abs().max().item()
        assert difference < 1e-4, f"step {step}: images differ by {difference:.1e}"
        compare(gradients(tiny, images), gradients(tiny, expected), f"step {step}: ")


def independent(route: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    try:
        images = route(*args)
    except NotApplicableError:
        raise
    except Exception as error:
        raise NotApplicableError(f"the pipeline's own code with gradient: {type(error).__name__}: {error}") from error
    if not images.requires_grad:
        raise NotApplicableError("the pipeline's own code cuts the gradient")
    return images


def compare(ours: list[torch.Tensor], theirs: list[torch.Tensor], where: str = "") -> None:
    if all(gradient.abs().max() == 0 for gradient in theirs):
        raise NotApplicableError("the gradient is zero")
    difference = relative_difference(ours, theirs)
    assert difference < 1e-4, f"{where}gradient off by {difference:.1e}"


def check_finite_differences(tiny: Tiny) -> None:
    """Gradient of the first step, before which nothing depends on the weights, against finite differences."""
    tiny.image, tiny.num_steps  # noqa: B018 (raise where the pipeline alone does not run)
    with in_float64(tiny):
        _check_finite_differences(tiny)


@contextlib.contextmanager
def in_float64(tiny: Tiny) -> Iterator[None]:
    """In double precision, if the pipeline alone runs there."""

    def cast(dtype: torch.dtype) -> None:
        for name, model in tiny.pipeline.components.items():
            if isinstance(model, torch.nn.Module) and name != "safety_checker":
                model.to(dtype)
        floats = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        tiny.inputs = inputs | {name: value.to(dtype) for name, value in floats.items() if value.is_floating_point()}

    inputs = tiny.inputs
    try:
        cast(torch.float64)
        try:
            plain(tiny)
        except NotApplicableError:
            cast(torch.float32)
        yield
    finally:
        cast(torch.float32)
        tiny.inputs = inputs


def _check_finite_differences(tiny: Tiny) -> None:
    tiny.train()
    before = [parameter.detach().clone() for parameter in tiny.parameters]
    images = attached(tiny, refl(0))
    inside(images)
    gradient = gradients(tiny, images)
    size = torch.cat([part.flatten() for part in gradient]).double().norm()
    if size == 0:
        raise NotApplicableError("the gradient is zero")
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in gradient]
    length = torch.cat([part.flatten() for part in noise]).norm()
    direction = [part / size + other / length for part, other in zip(gradient, noise, strict=True)]
    expected = sum((part * way).double().sum() for part, way in zip(gradient, direction, strict=True)).item()
    slopes: list[float] = []
    for width in (0.03, 0.01, 0.1, 0.003, 3e-4, 3e-5):  # Sana Sprint bends within less than 1e-3
        values = []
        for sign in (1, -1, 0):  # forth, back, and as it was
            with torch.no_grad():
                for parameter, way, old in zip(tiny.parameters, direction, before, strict=True):
                    parameter.copy_(old + sign * width * way.to(old.dtype))
            if sign:
                values.append(reward(attached(tiny, refl(0)).detach()).double().mean().item())
        slopes.append((values[0] - values[1]) / (2 * width))
        if abs(slopes[-1] - expected) < 0.02 * abs(expected):
            return
    if max(slopes) - min(slopes) > 0.2 * abs(sum(slopes) / len(slopes)):
        raise NotApplicableError("finite differences do not settle")
    raise AssertionError(f"{expected:.3e} against " + ", ".join(f"{slope:.3e}" for slope in slopes))


# Training


def pil_image(image: Any) -> Any:
    """First image of an argument, as rows hold it."""
    if isinstance(image, (list, tuple)):
        image = image[0]
    if isinstance(image, torch.Tensor):
        image = image.detach().reshape(-1, *image.shape[-3:])[0].movedim(0, -1).float().numpy()
    if isinstance(image, np.ndarray):
        low = image.min()
        image = Image.fromarray((((image + 1) / 2 if low < 0 else image).clip(0, 1) * 255).astype("uint8")[..., :3])
    return image


def check_trainer(tiny: Tiny) -> None:
    """Two updates run, are finite and change the weights; rows with their own image are generated from it."""
    if not tiny.gives_prompt:
        raise NotApplicableError("it was built without text encoders")
    tiny.image, tiny.num_steps  # noqa: B018
    prompts = tiny.prompts
    settings = {name: clone(value) for name, value in tiny.settings.items()}
    steps = settings.pop("num_inference_steps", None)
    rows = [{"prompt": prompt} for prompt in prompts]
    if settings.get("image") is not None and "image" in tiny.takes:
        given = settings["image"]
        conditions = [pil_image(given), pil_image(given).transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
        try:
            plain(tiny, image=conditions[0])
        except NotApplicableError:
            conditions = None
        if conditions is not None:
            del settings["image"]
            rows = [row | {"condition": condition} for row, condition in zip(rows, conditions, strict=True)]
    seen = []

    def differentiable(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.extend(images.detach())
        return reward(images)

    with tempfile.TemporaryDirectory() as folder:
        trainer = ReFLTrainer(
            pipeline=tiny.pipeline,
            reward=differentiable,
            args=ReFLTrainingArguments(
                folder,
                per_device_train_batch_size=tiny.batch_size,
                max_steps=2,
                learning_rate=1e-3,
                num_inference_steps=steps,
                step_ratio_range=[0.0, 1.0],
                pipeline_kwargs=settings,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=rows,
        )
        before = [parameter.detach().clone() for parameter in trainer.trained_parameters]
        trainer.train()
    after = list(trainer.trained_parameters)
    assert trainer.state.global_step == 2
    assert trainer.last_rewards.isfinite().all(), "a reward is not finite"
    assert all(parameter.isfinite().all() for parameter in after), "a weight is not finite"
    share = np.mean([not torch.equal(old, new) for old, new in zip(before, after, strict=True)])
    assert share > 0, "no weight changed"
    assert not torch.equal(seen[-2], seen[-1]), "two samples are the same"


# Search


@contextlib.contextmanager
def counted(tiny: Tiny) -> Iterator[list[int]]:
    """Number of samples of each call of a denoiser."""
    counts: list[int] = []

    def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [kwargs[name] for name in ("hidden_states", "sample", "x") if name in kwargs]
        counts.append(len([*args, *values, *kwargs.values()][0]))

    hooks = [denoiser.register_forward_pre_hook(count, with_kwargs=True) for denoiser in tiny.denoisers]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return reward(torch.as_tensor(images).float())


def by_seed(tiny: Tiny, node: Any) -> torch.Tensor:
    """Image of the pipeline alone, from the seed of a candidate."""
    if node.seed not in tiny.by_seed:
        tiny.by_seed[node.seed] = plain(tiny, seed=node.seed)[0]
    return tiny.by_seed[node.seed]


def check_count(result: Any, counts: list[int], num_steps: int, passes: int, evaluations: int) -> None:
    got = result.denoiser_evaluations
    assert got == evaluations, f"{got} evaluations instead of {evaluations}"
    assert result.forward_passes == sum(counts), (
        f"{result.forward_passes} forward passes, but the hook saw {sum(counts)}"
    )
    assert sum(counts) * num_steps == passes * evaluations, (
        f"{sum(counts)} samples for {evaluations} evaluations, but the pipeline alone {passes} for {num_steps}"
    )


def in_double_if_need_be(check: Callable[[Tiny], None]) -> Callable[[Tiny], None]:
    """Repeat a check where batches round otherwise: ShapE samples where it has found something, and shows the last digit."""

    @functools.wraps(check)
    def wrapper(tiny: Tiny) -> None:
        try:
            check(tiny)
        except AssertionError:
            if tiny.batch_size == 1:
                raise
            tiny.by_seed = {}
            with in_float64(tiny):
                check(tiny)
            tiny.by_seed = {}

    return wrapper


@in_double_if_need_be
def check_best_of_n(tiny: Tiny) -> None:
    """Denoiser evaluations are those that a hook counts, and each seed makes its candidate with the pipeline alone."""
    _, num_steps, passes = tiny.image, tiny.num_steps, tiny.num_passes
    for batch_size in range(1, tiny.batch_size + 1):
        torch.manual_seed(3)
        with counted(tiny) as counts:
            result = best_of_n(
                tiny.pipeline, tiny.prompt, judge, 2, num_images=2, batch_size=batch_size, **tiny.search_arguments()
            )
        check_count(result, counts, num_steps, passes, 2 * num_steps)
        for place, image in enumerate(result.images):
            expected = by_seed(tiny, result.lineage(place)[0])
            tolerance = 0 if batch_size == 1 else 2e-4
            tiny.check_same(tensor_of(image), expected, tolerance, f"batch size {batch_size}:")


def check_preview(tiny: Tiny) -> None:
    """What is kept after a preview is the image of the pipeline alone."""
    _, num_steps, passes = tiny.image, tiny.num_steps, tiny.num_passes
    if num_steps < 3:
        raise NotApplicableError(f"it makes {num_steps} steps")
    with counted(tiny) as counts:
        result = best_of_n(
            tiny.pipeline, tiny.prompt, judge, 2, preview_step=2, batch_size=1, **tiny.search_arguments()
        )
    check_count(result, counts, num_steps, passes, 2 * 2 + num_steps - 2)
    difference = (tensor_of(result.images[0]) - by_seed(tiny, result.lineage()[0])).abs().max().item()
    assert difference == 0, f"off by {difference:.1e}"


def check_paths(tiny: Tiny) -> None:
    """One branch without noise is plain sampling; branches are counted, and their seeds make them again."""
    _, num_steps, passes = tiny.image, tiny.num_steps, tiny.num_passes
    if num_steps < 3:
        raise NotApplicableError(f"it makes {num_steps} steps")
    with counted(tiny) as counts:
        result = search_over_paths(
            tiny.pipeline, tiny.prompt, judge, num_paths=2, num_branches=1, start_step=2, renoise_steps=0, denoise_steps=1,
            num_images=2, batch_size=1, **tiny.search_arguments(),
        )  # fmt: skip
    check_count(result, counts, num_steps, passes, 2 * num_steps)
    for place, image in enumerate(result.images):
        difference = (tensor_of(image) - by_seed(tiny, result.lineage(place)[0])).abs().max().item()
        assert difference == 0, f"one branch: off by {difference:.1e}"
    with counted(tiny) as counts:
        result = search_over_paths(
            tiny.pipeline, tiny.prompt, judge, num_paths=1, num_branches=2, start_step=2, renoise_steps=1, denoise_steps=2,
            batch_size=tiny.batch_size, **tiny.search_arguments(),
        )  # fmt: skip
    check_count(result, counts, num_steps, passes, 2 + 2 * 2 * (num_steps - 2))
    check_replay(tiny, result)


@in_double_if_need_be
def check_zero_order(tiny: Tiny) -> None:
    """Neighbors are counted, and their seeds make them again."""
    _, num_steps, passes = tiny.image, tiny.num_steps, tiny.num_passes
    with counted(tiny) as counts:
        result = zero_order_search(
            tiny.pipeline, tiny.prompt, judge, num_neighbors=2, num_rounds=1, num_images=3, batch_size=tiny.batch_size,
            **tiny.search_arguments(),
        )  # fmt: skip
    check_count(result, counts, num_steps, passes, 3 * num_steps)
    images = torch.stack([tensor_of(image) for image in result.images])
    assert (images[0] - images[1]).abs().max() > 0, "neighbors are the same"
    check_replay(tiny, result)


def check_replay(tiny: Tiny, result: Any) -> None:
    torch.manual_seed(3)
    again = tensor_of(replay(tiny.pipeline, tiny.prompt, result.lineage(), **tiny.search_arguments()))
    tiny.check_same(again, tensor_of(result.images[0]), 2e-4, "replay")


CHECKS: dict[str, Callable[[Tiny], None]] = {
    "images": check_images,
    "draft": check_draft,
    "refl": check_refl,
    "finite differences": check_finite_differences,
    "best of n": check_best_of_n,
    "preview": check_preview,
    "paths": check_paths,
    "zero order": check_zero_order,
    "trainer": check_trainer,  # the last one: it changes the weights
}
