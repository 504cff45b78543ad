"""Gradient through pipelines. Independent loops differentiate the same steps without the callback."""

import contextlib
import functools
import importlib
import inspect
import runpy
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny_pipelines import (
    BUILDERS,
    STABLE_DIFFUSION_BETAS,
    VIDEO,
    TinyPipeline,
    image_vae,
    noise,
    relative_difference,
    reward,
)
from transformers import CLIPConfig

from rewarddance_hf import import_utils
from rewarddance_hf.alignment import gradient
from rewarddance_hf.alignment.gradient import RewardGradientCallback


STEPS = 4
WITHOUT_CALLBACK = {"PixArtSigma"}  # these take and ignore the callback: `attach`
WITHOUT_INTERRUPT = {"PixArtSigma", "AuraFlow", "Lumina2"}
TOLERANCE = 1e-5

draft = functools.partial(RewardGradientCallback, method="draft", num_gradient_steps=2)
refl = functools.partial(RewardGradientCallback, method="refl", step_index_range=(2, 3))


@functools.cache
def tiny(name: str) -> TinyPipeline:
    return TinyPipeline(name)


@pytest.fixture(params=BUILDERS)
def model(request):
    return tiny(request.param)


def name_of(model: TinyPipeline) -> str:
    return next(name for name in BUILDERS if tiny(name) is model)


def with_callback(model: TinyPipeline, callback, **kwargs) -> torch.Tensor:
    """Images of a pipeline that gets the callback in the way that is documented for it."""
    if isinstance(callback, RewardGradientCallback) and name_of(model) in WITHOUT_CALLBACK:
        with callback.attach(model.pipeline):
            return model(**kwargs)
    return model(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs, **kwargs)


@functools.cache
def plain(model: TinyPipeline) -> torch.Tensor:
    """Images of the pipeline alone, sampled once."""
    return model()


@functools.cache
def sampled(model: TinyPipeline, make) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images with the callback and their gradient, computed once."""
    images = with_callback(model, make())
    assert images.requires_grad
    return images.detach(), model.gradients(images)


# The pipeline's own code with gradient all along. A scheduler's step that is given detached tensors cuts it.


def whole_call(model: TinyPipeline):
    return functools.partial(inspect.unwrap(type(model.pipeline).__call__), model.pipeline)


@contextlib.contextmanager
def steps_of(scheduler, change):
    """Give each step of a scheduler and its copies to `change(scheduler, index, step, model_output, timestep, sample)`."""
    kind, step, counts = type(scheduler), type(scheduler).step, {}

    @functools.wraps(step)
    def changed(self, model_output, timestep, sample, **kwargs):
        counts[id(self)] = counts.get(id(self), -1) + 1
        return change(self, counts[id(self)], functools.partial(step, self, **kwargs), model_output, timestep, sample)

    kind.step = changed
    try:
        yield
    finally:
        kind.step = step


def independent_draft(model: TinyPipeline, first_step: int, **kwargs) -> torch.Tensor:
    def change(scheduler, index, step, model_output, timestep, sample):
        if index < first_step:
            model_output, sample = model_output.detach(), sample.detach()
        return step(model_output, timestep, sample)

    with steps_of(model.pipeline.scheduler, change):
        return model(whole_call(model), **kwargs)


def independent_refl(model: TinyPipeline, drawn_step: int, clean_of=None, **kwargs) -> torch.Tensor:
    clean = {}

    def change(scheduler, index, step, model_output, timestep, sample):
        if index < drawn_step:
            return step(model_output.detach(), timestep, sample.detach())
        if index == drawn_step:
            clean[scheduler] = (clean_of or textbook_clean)(scheduler, index, model_output, timestep, sample.detach())
        return (clean[scheduler],)

    with steps_of(model.pipeline.scheduler, change):
        return model(whole_call(model), **kwargs)


def textbook_clean(scheduler, index, model_output, timestep, sample):
    """Clean prediction from the noise level alone, with the formulas of the papers."""
    prediction_type = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction_type == "flow_prediction":
        return sample - scheduler.sigmas[index] * model_output
    # Noise level at the timestep, interpolated as the samplers of the k-diffusion family do
    log_sigmas = (((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5).double().log()
    low = int(timestep)
    fraction = float(timestep) - low
    sigma = (log_sigmas[low] * (1 - fraction) + log_sigmas[min(low + 1, 999)] * fraction).exp().item()
    alpha = 1 / (1 + sigma**2) ** 0.5
    if scheduler.init_noise_sigma > 1:  # samples of this family are not scaled by alpha
        sample = sample * alpha
    clean = {
        "epsilon": lambda: (sample - alpha * sigma * model_output) / alpha,
        "v_prediction": lambda: alpha * sample - alpha * sigma * model_output,
        "sample": lambda: model_output,
    }[prediction_type]()
    if scheduler.config.get("clip_sample") and not isinstance(scheduler, diffusers.CogVideoXDDIMScheduler):
        clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return clean


class TestPipelines:
    def test_draft_leaves_images_as_they_are(self, model):
        """DRaFT-K only adds gradient: images are bit-equal to those of the plain pipeline, in the documented layout."""
        images, _ = sampled(model, draft)
        assert torch.equal(images, plain(model))
        assert not plain(model).requires_grad
        assert images.ndim == (5 if name_of(model) in VIDEO else 4)
        assert images.shape[-3] == 3
        assert 0 <= images.min() < images.max() <= 1

    def test_draft_gradients_equal_independent_loop(self, model):
        """Gradient of the last K steps equals that of a loop that cuts the graph before them."""
        theirs = model.gradients(independent_draft(model, STEPS - 2))
        assert relative_difference(sampled(model, draft)[1], theirs) < TOLERANCE

    def test_refl_equals_independent_loop(self, model):
        """Image and gradient of the random step equal those of the textbook formula of the clean prediction."""
        (images, gradients), expected = sampled(model, refl), independent_refl(model, 2)
        torch.testing.assert_close(images, expected.detach(), atol=2e-6, rtol=1e-5)
        assert relative_difference(gradients, model.gradients(expected)) < TOLERANCE

    @pytest.mark.parametrize("make", [draft, refl], ids=["draft", "refl"])
    def test_every_lora_parameter_gets_gradient(self, model, make):
        """No adapter weight is left out."""
        assert all(gradient.abs().max() > 0 for gradient in sampled(model, make)[1])

    @pytest.mark.parametrize("make", [draft, refl], ids=["draft", "refl"])
    def test_frozen_weights_get_no_gradient(self, make):
        """No frozen weight of denoiser or VAE gets a gradient."""
        model = tiny("StableDiffusion3")
        reward(with_callback(model, make())).mean().backward()
        for name, parameter in model.denoiser.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        assert all(parameter.grad is None for parameter in model.pipeline.vae.parameters())
        model.denoiser.zero_grad()

    @pytest.mark.parametrize("make", [draft, refl], ids=["draft", "refl"])
    def test_attach_equals_callback(self, model, make):
        """The way through the scheduler gives the same images and gradients in every pipeline."""
        with make().attach(model.pipeline):
            attached = model()
        images, gradients = sampled(model, make)
        assert torch.equal(attached, images)
        assert relative_difference(model.gradients(attached), gradients) == 0

    def test_gradient_checkpointing_changes_nothing(self, model):
        """Gradient checkpointing of the denoiser gives the same gradients."""
        model.denoiser.enable_gradient_checkpointing()
        try:
            checkpointed = model.gradients(with_callback(model, refl()))
        finally:
            model.denoiser.disable_gradient_checkpointing()
        assert relative_difference(checkpointed, sampled(model, refl)[1]) < TOLERANCE

    def test_remaining_steps_are_skipped_where_possible(self, model):
        """ReFL stops after its step, unless the pipeline ignores `_interrupt` and has to hold the prediction."""
        calls = []
        hook = model.denoiser.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        with_callback(model, refl())
        hook.remove()
        per_step = len(calls) // (STEPS if name_of(model) in WITHOUT_INTERRUPT else 3)
        steps = calls[::per_step]
        # Only the drawn step keeps activations.
        assert steps == [False, False, True, False][: len(steps)]
        assert len(steps) == (STEPS if name_of(model) in WITHOUT_INTERRUPT else 3)


# Loops written without the pipeline's `__call__` and without `scheduler.step`


def decode(vae, latents):
    return (vae.decode(latents, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)


def flow_loop(velocity, latents, sigmas, method):
    """Euler steps of a flow, with gradient as `method` wants it."""
    for i in range(STEPS):
        with torch.set_grad_enabled(i >= 2):
            v = velocity(latents, sigmas[i])
            if method == "refl" and i == 2:
                return latents - sigmas[i] * v
            latents = latents + (sigmas[i + 1] - sigmas[i]) * v
    return latents


def shifted_sigmas(shift, start=1.0, stop=1 / STEPS):
    sigmas = torch.linspace(start, stop, STEPS, dtype=torch.float64)
    return torch.cat([shift * sigmas / (1 + (shift - 1) * sigmas), torch.zeros(1)]).float()


def stable_diffusion_loop(model, latents, method):
    pipeline, embeds, scale = model.pipeline, model.inputs, model.inputs["guidance_scale"]
    alphas = pipeline.scheduler.alphas_cumprod
    embeds = torch.cat([embeds["negative_prompt_embeds"], embeds["prompt_embeds"]])
    for i in range(STEPS):
        t = 1000 // STEPS * (STEPS - 1 - i) + 1
        with torch.set_grad_enabled(i >= 2):
            without, given = model.denoiser(torch.cat([latents] * 2), t, encoder_hidden_states=embeds).sample.chunk(2)
            epsilon = without + scale * (given - without)
            clean = (latents - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
            if method == "refl" and i == 2:
                latents = clean
                break
            previous = alphas[t - 1000 // STEPS] if i < STEPS - 1 else torch.tensor(1.0)
            latents = previous.sqrt() * clean + (1 - previous).sqrt() * epsilon
    return decode(pipeline.vae, latents / pipeline.vae.config.scaling_factor)


def stable_diffusion_3_loop(model, latents, method):
    inputs, vae = model.inputs, model.pipeline.vae

    def velocity(latents, sigma):
        without, given = (
            model.denoiser(
                hidden_states=latents,
                timestep=(sigma * 1000).expand(2),
                encoder_hidden_states=inputs[prefix + "prompt_embeds"],
                pooled_projections=inputs[prefix + "pooled_prompt_embeds"],
            ).sample
            for prefix in ("negative_", "")
        )
        return without + inputs["guidance_scale"] * (given - without)

    # The noise levels of the trained range are shifted once, those of the sampler again.
    latents = flow_loop(velocity, latents, shifted_sigmas(3.0, 1.0, 3 * 0.001 / (1 + 2 * 0.001)), method)
    return decode(vae, latents / vae.config.scaling_factor + vae.config.shift_factor)


def flux_loop(model, latents, method):
    inputs, vae = model.inputs, model.pipeline.vae
    ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1)

    def velocity(latents, sigma):
        return model.denoiser(
            hidden_states=latents,
            timestep=sigma.expand(2),
            guidance=torch.full((2,), inputs["guidance_scale"]),
            pooled_projections=inputs["pooled_prompt_embeds"],
            encoder_hidden_states=inputs["prompt_embeds"],
            txt_ids=torch.zeros(7, 3),
            img_ids=ids,
        ).sample

    mu = 0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)
    latents = flow_loop(velocity, latents, shifted_sigmas(torch.tensor(mu).double().exp().item()), method)
    latents = latents.reshape(2, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 8)
    return decode(vae, latents / vae.config.scaling_factor + vae.config.shift_factor)


def wan_loop(model, latents, method):
    inputs, vae = model.inputs, model.pipeline.vae

    def velocity(latents, sigma):
        given, without = (
            model.denoiser(
                hidden_states=latents,
                timestep=(sigma * 1000).expand(2),
                encoder_hidden_states=inputs[prefix + "prompt_embeds"],
            ).sample
            for prefix in ("", "negative_")
        )
        return without + inputs["guidance_scale"] * (given - without)

    latents = flow_loop(velocity, latents, shifted_sigmas(3.0, 1.0, 3 * 0.001 / (1 + 2 * 0.001)), method)
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return decode(vae, latents / (1 / std) + mean).transpose(1, 2)


LOOPS = {
    "StableDiffusion": (stable_diffusion_loop, (2, 4, 8, 8)),
    "StableDiffusion3": (stable_diffusion_3_loop, (2, 4, 8, 8)),
    "Flux": (flux_loop, (2, 16, 16)),
    "Wan": (wan_loop, (2, 4, 2, 2, 2)),
}


@contextlib.contextmanager
def scheduler_of(model, scheduler):
    before, model.pipeline.scheduler = model.pipeline.scheduler, scheduler
    try:
        yield
    finally:
        model.pipeline.scheduler = before


class TestExplicitLoops:
    @pytest.mark.parametrize("make", [draft, refl], ids=["draft", "refl"])
    @pytest.mark.parametrize("name", LOOPS)
    def test_gradients_equal_hand_written_loop(self, name, make):
        """Images and gradients equal those of a sampler written out from the formulas, without pipeline or scheduler."""
        model = tiny(name)
        loop, shape = LOOPS[name]
        latents = noise(5, *shape)
        scheduler = model.pipeline.scheduler
        if name == "Wan":  # Euler steps are easily written out, those of UniPC are not
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        with scheduler_of(model, scheduler):
            images = with_callback(model, make(), latents=latents)
            expected = loop(model, latents, make().config.method)
        torch.testing.assert_close(images, expected, atol=2e-6, rtol=1e-5)
        assert relative_difference(model.gradients(images), model.gradients(expected)) < TOLERANCE

    def test_attach_allows_gradient_in_all_steps(self):
        """DRaFT over all steps, which a callback comes too late for, equals back-propagation through the sampler."""
        model = tiny("StableDiffusion3")
        with RewardGradientCallback(method="draft", num_gradient_steps=STEPS).attach(model.pipeline):
            images = model()
        assert relative_difference(model.gradients(images), model.gradients(model(whole_call(model)))) == 0

    def test_attach_allows_first_step(self):
        """ReFL may draw step 0, the only step of distilled generators, in `attach`."""
        model = tiny("StableDiffusion3")
        with RewardGradientCallback(step_index_range=(0, 1)).attach(model.pipeline):
            images = model()
        expected = independent_refl(model, 0)
        assert relative_difference(model.gradients(images), model.gradients(expected)) < TOLERANCE

    def test_attach_passes_over_the_bar_of_a_prior(self, monkeypatch):
        """A bar over less steps, before the schedule is set up, is not that of the denoising (StableUnCLIP); each call is checked."""
        model = tiny("StableDiffusion3")
        pipeline, check_inputs = model.pipeline, model.pipeline.check_inputs

        def with_prior(*args, **kwargs):
            list(pipeline.progress_bar(torch.arange(STEPS - 1)))
            return check_inputs(*args, **kwargs)

        monkeypatch.setattr(pipeline, "check_inputs", with_prior)
        with RewardGradientCallback(step_index_range=(STEPS - 1, STEPS)).attach(pipeline):
            images = [model(), model()]
        for image in images:
            expected = independent_refl(model, STEPS - 1)
            assert relative_difference(model.gradients(image), model.gradients(expected)) < TOLERANCE
        callback = RewardGradientCallback(step_index_range=(STEPS, STEPS + 1))
        with callback.attach(pipeline), pytest.raises(ValueError, match=f"The pipeline makes {STEPS} steps, but"):
            model()


NOISE_SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DDIM-clip_sample": functools.partial(diffusers.DDIMScheduler, clip_sample=True, clip_sample_range=0.5),
    "DDPM": functools.partial(diffusers.DDPMScheduler, clip_sample=False),
    "PNDM": functools.partial(diffusers.PNDMScheduler, skip_prk_steps=True),
    "Euler": diffusers.EulerDiscreteScheduler,
    "EulerAncestral": diffusers.EulerAncestralDiscreteScheduler,
    "Heun": functools.partial(diffusers.HeunDiscreteScheduler, clip_sample=False),
    "KDPM2": diffusers.KDPM2DiscreteScheduler,
    "DPM++": diffusers.DPMSolverMultistepScheduler,
    "DPM++-SDE": functools.partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "DPM++-singlestep": functools.partial(diffusers.DPMSolverSinglestepScheduler, lower_order_final=True),
    "UniPC": diffusers.UniPCMultistepScheduler,
    "DEIS": diffusers.DEISMultistepScheduler,
    "SASolver": diffusers.SASolverScheduler,
    "TCD": diffusers.TCDScheduler,
}
SAMPLE_PREDICTION = {"DDIM", "DDIM-clip_sample", "Euler", "DPM++", "UniPC"}
FLOW_SCHEDULERS = {
    "FlowMatchEuler": diffusers.FlowMatchEulerDiscreteScheduler,
    "FlowMatchEuler-stochastic": functools.partial(
        diffusers.FlowMatchEulerDiscreteScheduler, stochastic_sampling=True
    ),
    "FlowMatchHeun": diffusers.FlowMatchHeunDiscreteScheduler,
    "FlowMatchLCM": diffusers.FlowMatchLCMScheduler,
    "DPM++-flow": functools.partial(
        diffusers.DPMSolverMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True
    ),
    "UniPC-flow": functools.partial(
        diffusers.UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True
    ),
}


def noise_scheduler(name, prediction_type):
    betas = dict(STABLE_DIFFUSION_BETAS)
    if name == "DPM++-singlestep":  # has no such argument
        betas.pop("steps_offset")
    return NOISE_SCHEDULERS[name](**betas, prediction_type=prediction_type)


class TestSchedulers:
    @pytest.mark.parametrize(
        ("name", "prediction_type"),
        [
            (name, prediction_type)
            for name in NOISE_SCHEDULERS
            for prediction_type in ("epsilon", "v_prediction", "sample")
            if prediction_type != "sample" or name in SAMPLE_PREDICTION
        ],
    )
    def test_noise_schedulers(self, name, prediction_type):
        """ReFL decodes the textbook's clean prediction, and DRaFT the plain images, with every scheduler."""
        model = tiny("StableDiffusion")
        with scheduler_of(model, noise_scheduler(name, prediction_type)):
            images, expected = with_callback(model, refl()), independent_refl(model, 2)
            torch.testing.assert_close(images, expected, atol=2e-5, rtol=1e-4)
            assert relative_difference(model.gradients(images), model.gradients(expected)) < 1e-4
            assert torch.equal(with_callback(model, draft()), model())

    @pytest.mark.parametrize("name", FLOW_SCHEDULERS)
    def test_flow_schedulers(self, name):
        """The same for flow matching."""
        model = tiny("StableDiffusion3")
        with scheduler_of(model, FLOW_SCHEDULERS[name]()):
            images, expected = with_callback(model, refl()), independent_refl(model, 2)
            torch.testing.assert_close(images, expected, atol=2e-5, rtol=1e-4)
            assert relative_difference(model.gradients(images), model.gradients(expected)) < 1e-4
            assert torch.equal(with_callback(model, draft()), model())

    def test_inverted_flow(self):
        """A path whose noise levels grow towards the image ends at level 1."""
        model = tiny("StableDiffusion3")

        def clean_of(scheduler, index, model_output, timestep, sample):
            return sample + (1 - timestep.item() / 1000) * model_output

        with scheduler_of(model, diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)):
            images, expected = with_callback(model, refl()), independent_refl(model, 2, clean_of)
        assert relative_difference(model.gradients(images), model.gradients(expected)) < TOLERANCE

    def test_thresholding(self):
        """Dynamic thresholding of DPM-Solver++ holds for the prediction as it does within the solver."""
        model = tiny("StableDiffusion")
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **STABLE_DIFFUSION_BETAS, thresholding=True, sample_max_value=0.5
        )

        def clean_of(scheduler, *arguments):
            return scheduler._threshold_sample(textbook_clean(scheduler, *arguments))

        with scheduler_of(model, scheduler):
            images, expected = with_callback(model, refl()), independent_refl(model, 2, clean_of)
        torch.testing.assert_close(images, expected, atol=2e-5, rtol=1e-4)

    def test_lcm(self):
        """A consistency model's clean prediction is the one that its scheduler calls `denoised`."""
        model = tiny("StableDiffusion")
        scheduler = diffusers.LCMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=50
        )
        with scheduler_of(model, scheduler):
            callback = refl(step_index_range=(3, 4))
            # The last step of this scheduler ends in its clean prediction.
            assert torch.equal(with_callback(model, callback), model())

    def test_cogvideox_dpm(self):
        """A scheduler whose step has other arguments, and whose pipeline wants two results, works as well."""
        model = tiny("CogVideoX")
        scheduler = diffusers.CogVideoXDPMScheduler.from_config(model.pipeline.scheduler.config)
        with scheduler_of(model, scheduler):
            images = with_callback(model, refl())
            assert all(gradient.abs().max() > 0 for gradient in model.gradients(images))
            assert torch.equal(with_callback(model, draft()), model())

    @pytest.mark.parametrize("make", [draft, refl], ids=["draft", "refl"])
    @pytest.mark.parametrize("name", ["DPM++", "UniPC", "DEIS", "PNDM", "Heun"])
    def test_history_keeps_no_graph(self, name, make):
        """What a multistep scheduler remembers after the call holds no activations."""
        model = tiny("StableDiffusion")
        with scheduler_of(model, noise_scheduler(name, "epsilon")):
            with_callback(model, make())
            remembered = []
            for value in vars(model.pipeline.scheduler).values():
                remembered += value if isinstance(value, list) else [value]
            tensors = [value for value in remembered if isinstance(value, torch.Tensor)]
            assert tensors
            assert not any(tensor.requires_grad for tensor in tensors)

    def test_scheduler_without_prediction_is_refused(self):
        """ReFL names the scheduler that has no clean prediction; DRaFT works with it."""
        model = tiny("StableDiffusion")
        with scheduler_of(model, diffusers.IPNDMScheduler()):
            with pytest.raises(NotImplementedError, match='`IPNDMScheduler`, but .* Use `method="draft"`'):
                with_callback(model, refl())
            assert with_callback(model, draft()).requires_grad


class TestRandomStep:
    def test_seed_decides_the_steps(self):
        """Callbacks of one seed draw the same steps, and each call of a pipeline draws one."""
        model = tiny("StableDiffusion3")

        def steps(seed):
            callback = RewardGradientCallback(step_index_range=(1, 4), seed=seed)
            drawn = []
            for _ in range(12):
                with_callback(model, callback)
                drawn.append(callback.last_step)
            return drawn

        first = steps(0)
        assert first == steps(0)
        assert first != steps(1)
        assert set(first) == {1, 2, 3}

    def test_attach_draws_once_for_each_call(self):
        """Calls within one `attach` draw the same steps as calls with the callback."""
        model = tiny("StableDiffusion3")
        callback, other = (RewardGradientCallback(step_index_range=(1, 4)) for _ in range(2))
        drawn = []
        with callback.attach(model.pipeline):
            for _ in range(6):
                model()
                drawn.append(callback.last_step)
        for step in drawn:
            with_callback(model, other)
            assert other.last_step == step

    def test_ratio_range(self):
        """Ratios are of the number of steps; the default is the last quarter."""
        model = tiny("StableDiffusion3")
        callback = RewardGradientCallback(step_ratio_range=(0.5, 0.75))
        with_callback(model, callback, num_inference_steps=8)
        assert callback.last_step in (4, 5)
        callback = RewardGradientCallback()
        with_callback(model, callback)
        assert callback.last_step == 3

    def test_two_calls_give_equal_images(self):
        """A callback that was used before does what a new one does."""
        model = tiny("Wan")
        callback = refl()
        first, second = with_callback(model, callback), with_callback(model, callback)
        assert torch.equal(first, second)
        assert relative_difference(model.gradients(first), model.gradients(second)) == 0

    def test_config_round_trip(self, tmp_path):
        """The callback is saved and loaded as other callbacks of diffusers are."""
        callback = RewardGradientCallback(method="draft", num_gradient_steps=3, vae_slicing=True)
        callback.save_config(tmp_path)
        loaded = RewardGradientCallback.from_config(RewardGradientCallback.load_config(tmp_path))
        assert all(
            loaded.config[name] == callback.config[name] for name in inspect.signature(type(callback)).parameters
        )
        assert "cutoff_step_ratio" not in callback.config


class Failure(Exception):
    """Raised on purpose."""


class FailingCallback(PipelineCallback):
    tensor_inputs = []

    def __init__(self, step_index):
        self.step_index = step_index

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == self.step_index:
            raise Failure
        return callback_kwargs


def state_of(model):
    """What a call may change for a while, apart from what every call of the pipeline sets anew."""
    pipeline = model.pipeline
    return {
        "scheduler": {name: value for name, value in vars(pipeline.scheduler).items() if callable(value)},
        "pipeline": {k: v for k, v in vars(pipeline).items() if k in ("_interrupt", "_hooks") or inspect.isroutine(v)},
        "vae": {name: value for name, value in vars(pipeline.vae).items() if name == "decode"},
        "slicing": pipeline.vae.use_slicing,
    }


def fail(*args, **kwargs):
    raise Failure


def failing_after(function, count):
    calls = iter(range(1000))

    @functools.wraps(function)
    def failing(*args, **kwargs):
        return function(*args, **kwargs) if next(calls) < count else fail()

    return failing


class TestRestoration:
    @pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
    @pytest.mark.parametrize("make", [draft, refl], ids=["draft", "refl"])
    @pytest.mark.parametrize(
        "name", ["StableDiffusion-DPM++", "StableDiffusion3", "PixArtSigma", "AuraFlow", "LTX2", "Wan"]
    )
    def test_all_is_as_before(self, name, make, grad_mode):
        """Grad mode, scheduler, pipeline and VAE are as before after a call, and the next plain call is bit-equal."""
        model = tiny(name)
        expected, before = plain(model), state_of(model)
        callback = make(vae_checkpointing=True)
        with torch.set_grad_enabled(grad_mode):
            images = with_callback(model, callback)
            assert torch.is_grad_enabled() == grad_mode
        assert images.requires_grad
        assert state_of(model) == before
        assert callback._run is None
        assert torch.equal(model(), expected)

    @pytest.mark.parametrize(("route", "grad_mode"), [("callback", True), ("callback", False), ("attach", True)])
    @pytest.mark.parametrize("name", ["StableDiffusion-DPM++", "AuraFlow"])
    @pytest.mark.parametrize(
        "place",
        [
            *(f"denoiser-{step}" for step in range(STEPS)),
            *(f"scheduler-{step}" for step in range(STEPS)),
            *(f"callback-{step}" for step in range(STEPS)),
            "decode-0",
            "postprocess-0",
        ],
    )
    def test_all_is_as_before_when_the_call_raises(self, name, place, route, grad_mode, monkeypatch):
        """The same when an exception is raised, wherever it comes from: at once in `attach`, else when the next call begins."""
        model = tiny(name)
        pipeline = model.pipeline
        expected, clean = plain(model), state_of(model)
        callback = refl(vae_checkpointing=True, vae_slicing=True)
        where, step = place.split("-")
        callbacks = [FailingCallback(int(step))] if where == "callback" else []
        if where == "denoiser":
            monkeypatch.setattr(model.denoiser, "forward", failing_after(model.denoiser.forward, int(step)))
        elif where == "scheduler":
            monkeypatch.setattr(pipeline.scheduler, "step", failing_after(pipeline.scheduler.step, int(step)))
        elif where == "decode":
            monkeypatch.setattr(pipeline.vae, "decode", fail)
        elif where == "postprocess":
            monkeypatch.setattr(pipeline.image_processor, "postprocess", fail)
        before = state_of(model)
        if route == "callback":
            callbacks = [callback, *callbacks]
        together = MultiPipelineCallbacks(callbacks)
        raised = True
        with torch.set_grad_enabled(grad_mode):
            try:
                with callback.attach(pipeline) if route == "attach" else contextlib.nullcontext():
                    with_callback(model, together)
                raised = False
            except Failure:
                assert torch.is_grad_enabled() == grad_mode
                if route == "attach":
                    assert state_of(model) == before
                    assert callback._run is None
        # A pipeline that was interrupted or whose scheduler is not asked again does not get to the later steps.
        reached = {"denoiser": 2, "callback": 2, "scheduler": 2}.get(where, 0)
        assert raised or int(step) > reached
        monkeypatch.undo()
        assert torch.equal(model(), expected)
        assert state_of(model) == clean
        assert callback._run is None
        assert with_callback(model, callback).requires_grad


class TestMemory:
    @pytest.mark.parametrize("name", ["StableDiffusion", "QwenImage", "LTX", "Wan", "CogVideoX", "HunyuanVideo"])
    @pytest.mark.parametrize(
        "options",
        [{"vae_checkpointing": True}, {"vae_slicing": True}, {"vae_checkpointing": True, "vae_slicing": True}],
        ids=["checkpointing", "slicing", "both"],
    )
    def test_options_change_nothing(self, name, options):
        """Checkpointed and sliced decoding give the same images and gradients."""
        model = tiny(name)
        (expected, gradients), images = sampled(model, refl), with_callback(model, refl(**options))
        # Convolutions of one image add up in another order than those of a batch.
        tolerance = 1e-4 if "vae_slicing" in options else 0
        torch.testing.assert_close(images.detach(), expected, atol=tolerance / 10, rtol=0)
        assert relative_difference(model.gradients(images), gradients) <= tolerance

    def test_checkpointing_keeps_less(self):
        """The VAE's activations are not kept until the backward pass."""

        def kept(**options):
            size = 0

            def pack(tensor):
                nonlocal size
                size += tensor.numel() * tensor.element_size()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                with_callback(tiny("StableDiffusion"), refl(**options))
            return size

        assert kept(vae_checkpointing=True) < 0.8 * kept()

    @pytest.mark.parametrize("route", ["callback", "attach"])
    @pytest.mark.parametrize("name", ["StableDiffusion3", "Wan"])
    def test_reduced_resolution(self, name, route):
        """Latents are averaged before they are decoded: smaller images that look like the large ones, with gradient."""
        model = tiny(name)
        options = {"method": "draft", "vae_scale": 0.5}
        full = with_callback(model, draft())
        if route == "attach":
            with RewardGradientCallback(**options).attach(model.pipeline):
                images = model()
        else:
            images = with_callback(model, RewardGradientCallback(**options))
        assert images.shape[-2:] == (full.shape[-2] // 2, full.shape[-1] // 2)
        assert images.shape[:-2] == full.shape[:-2]
        assert all(gradient.abs().max() > 0 for gradient in model.gradients(images))
        assert torch.equal(model(), full)

    def test_latent_output(self):
        """With `output_type="latent"`, latents carry the gradient and nothing is left on the VAE for later calls."""
        model = tiny("StableDiffusion3")
        latents = with_callback(model, refl(vae_scale=0.5), output_type="latent")
        assert latents.requires_grad
        assert "decode" not in vars(model.pipeline.vae)


class TestComposition:
    def test_other_callbacks(self):
        """Other callbacks work beside ours, in `MultiPipelineCallbacks` and in a function of the user's own."""
        model = tiny("StableDiffusion")
        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
        # The official callback keeps one prompt only.
        inputs = {name: noise(1, 1, 7, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
        together = with_callback(model, MultiPipelineCallbacks([cutoff, draft()]), **inputs)
        assert torch.equal(together, with_callback(model, cutoff, **inputs))
        assert together.requires_grad

        seen, callback = [], refl()

        def own(pipeline, step_index, timestep, callback_kwargs):
            seen.append(step_index)
            callback(pipeline, step_index, timestep, callback_kwargs)
            return {}

        images = model(callback_on_step_end=own, callback_on_step_end_tensor_inputs=["latents"])
        assert seen == [0, 1, 2]
        assert relative_difference(model.gradients(images), model.gradients(with_callback(model, refl()))) == 0

    def test_attached_and_passed(self):
        """A callback that is attached and passed at once acts once."""
        model = tiny("StableDiffusion3")
        callback = refl()
        with callback.attach(model.pipeline):
            images = with_callback(model, callback)
        assert torch.equal(images, with_callback(model, refl()))

    def test_image_to_image(self):
        """Pipelines that begin in the middle of the schedule count their own steps."""
        model = tiny("StableDiffusion3")
        pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**model.pipeline.components)
        pipeline.set_progress_bar_config(disable=True)
        arguments = {"image": torch.rand(1, 3, 8, 8), "strength": 0.5, "num_inference_steps": 8}
        callback = RewardGradientCallback(step_ratio_range=(0.5, 1.0))
        images = model(
            pipeline,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=callback.tensor_inputs,
            **arguments,
        )
        assert callback.last_step in (2, 3)
        assert all(gradient.abs().max() > 0 for gradient in model.gradients(images))
        with RewardGradientCallback(step_ratio_range=(0.5, 1.0)).attach(pipeline) as attached:
            assert torch.equal(model(pipeline, **arguments), images)
        assert attached.last_step == callback.last_step

    def test_half_precision(self):
        """In bfloat16 the prediction keeps the pipeline's dtype, and gradients are finite."""
        model = TinyPipeline("StableDiffusion3")
        model.pipeline.to(torch.bfloat16)
        model.inputs = {
            name: value.bfloat16() if isinstance(value, torch.Tensor) else value
            for name, value in model.inputs.items()
        }
        callback = refl()
        images = model(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs)
        gradients = torch.autograd.grad(images.float().mean(), model.parameters)
        assert all(gradient.isfinite().all() for gradient in gradients)


class TestExample:
    def test_tiny_pipeline(self, capsys):
        """The example runs without download, with a real judge, and prints a gradient that is not zero."""
        path = Path(__file__).parents[2] / "examples" / "reward_gradient.py"
        example = runpy.run_path(str(path))
        example["main"](
            example["tiny_pipeline"](), example["load_judge"](None), "a red circle", example["tiny_inputs"]()
        )
        assert float(capsys.readouterr().out.split()[-1]) > 0


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "ddpo"}, "`method` is 'ddpo', but must be 'refl' or 'draft'"),
            (
                {"step_index_range": (1, 2), "step_ratio_range": (0.5, 1.0)},
                "but only one of them may be given. Drop the other",
            ),
            ({"step_index_range": (3, 3)}, r"`step_index_range` is \(3, 3\), but must be the first step"),
            ({"step_ratio_range": (0.5, 1.5)}, r"`step_ratio_range` is \(0.5, 1.5\), but must be two growing ratios"),
            ({"num_gradient_steps": 0}, "`num_gradient_steps` is 0, but must be at least 1"),
            ({"vae_scale": 0.0}, "`vae_scale` is 0.0, but must be above 0.0 and at most 1.0"),
        ],
    )
    def test_arguments(self, arguments, message):
        """Arguments without meaning are refused at once."""
        with pytest.raises(ValueError, match=message):
            RewardGradientCallback(**arguments)

    @pytest.mark.parametrize(
        ("callback", "message"),
        [
            (draft(num_gradient_steps=4), r"`num_gradient_steps=4` requires steps 0 to 3 .* out of 1 to 3 \(step 0"),
            (draft(num_gradient_steps=5), "makes 4 steps, but `num_gradient_steps=5` requires"),
            (refl(step_index_range=(2, 9)), r"`step_index_range=\(2, 9\)` requires steps 2 to 8 .* Raise `num_inf"),
            (
                refl(step_index_range=None, step_ratio_range=(0.8, 0.9)),
                r"`step_ratio_range=\(0.8, 0.9\)` holds none of them, out of 1 to 3",
            ),
            (refl(step_index_range=(0, 2)), "step 0 has ended when a callback is called; use `with callback.attach"),
        ],
    )
    def test_too_few_steps(self, callback, message):
        """A range that the number of steps does not hold is refused before the second step, and leaves no trace."""
        model = tiny("StableDiffusion3")
        model.pipeline._interrupt = False  # as each call begins
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            with_callback(model, callback)
        assert state_of(model) == before

    @pytest.mark.parametrize("route", ["callback", "attach"])
    def test_calls_that_cannot_carry_gradient(self, route, monkeypatch):
        """Arrays, frozen weights, array-making components and inference mode are refused by name."""
        model = tiny("StableDiffusion")
        callback = refl()

        def call(**kwargs):
            if route == "callback":
                return with_callback(model, callback, **kwargs)
            with callback.attach(model.pipeline):
                return model(**kwargs)

        with pytest.raises(ValueError, match="`output_type` is 'pil', but only tensors carry gradient"):
            call(output_type="pil")
        with torch.inference_mode(), pytest.raises(RuntimeError, match="Call the pipeline outside of inference mode"):
            call()
        layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        checker = StableDiffusionSafetyChecker(
            CLIPConfig(vision_config={**layers, "image_size": 16, "patch_size": 8}, text_config=layers)
        )
        monkeypatch.setattr(model.pipeline, "safety_checker", checker)
        with pytest.raises(ValueError, match="`pipeline.safety_checker` is a `StableDiffusionSafetyChecker`, but it "):
            call()
        monkeypatch.undo()
        for parameter in model.parameters:
            parameter.requires_grad_(False)
        try:
            with pytest.raises(ValueError, match="No parameter of `pipeline.unet` requires grad"):
                call()
        finally:
            for parameter in model.parameters:
                parameter.requires_grad_(True)
        assert call().requires_grad

    def test_pipeline_without_callback(self):
        """`check_pipeline` names the way for pipelines that would ignore the callback without a word."""
        RewardGradientCallback.check_pipeline(tiny("Flux").pipeline)
        with pytest.raises(ValueError, match="`PixArtSigmaPipeline` has no argument .* Use `with callback.attach"):
            RewardGradientCallback.check_pipeline(tiny("PixArtSigma").pipeline)

    def test_missing_diffusers(self, monkeypatch):
        """Without diffusers, the import names the extra that brings it."""
        monkeypatch.setattr(import_utils, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install rewarddance_hf\[diffusers\]"):
            importlib.reload(gradient)

    def test_callback_outside_of_a_pipeline(self):
        """A callback that is not called from a pipeline's denoising loop names the other way."""
        with pytest.raises(RuntimeError, match="needs to be called from the first step on.*Use `with callback.attach"):
            refl()(tiny("Flux").pipeline, 0, 1000, {})

    def test_adapter_on_the_other_denoiser(self):
        """A pipeline of two denoisers whose late steps have nothing to train is refused, and not trained by nothing."""
        model = TinyPipeline("Wan")
        other = diffusers.WanTransformer3DModel.from_config(model.pipeline.transformer.config).requires_grad_(False)
        model.pipeline.register_modules(transformer_2=other)
        model.pipeline.register_to_config(boundary_ratio=0.9)
        for callback in (refl(), draft()):
            with (
                callback.attach(model.pipeline),
                pytest.raises(ValueError, match="denoisers that train make others .`transformer` 0 to 1."),
            ):
                model()

    def test_scheduler_without_pipeline(self):
        """Within `attach`, a scheduler that was not told the number of steps is refused."""
        model = tiny("StableDiffusion3")
        with refl().attach(model.pipeline), pytest.raises(NotImplementedError, match="Call the pipeline itself"):
            model.pipeline.scheduler.step(noise(0, 1), 1.0, noise(1, 1))


def tiny_hidream(force_inference_output: bool) -> tuple[diffusers.HiDreamImagePipeline, dict]:
    torch.manual_seed(0)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 6],
        text_emb_dim=5,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
        force_inference_output=force_inference_output,
    )
    absent = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.HiDreamImagePipeline(scheduler, image_vae(), transformer=transformer, **absent).to(
        torch.float64
    )
    pipeline.default_sample_size = 8  # to which all sizes are scaled
    pipeline.set_progress_bar_config(disable=True)
    inputs = {
        "prompt_embeds_t5": noise(1, 1, 7, 8).double(),
        "prompt_embeds_llama3": noise(2, 2, 1, 7, 6).double(),
        "pooled_prompt_embeds": noise(3, 1, 5).double(),
    }
    settings = {"guidance_scale": 1.0, "num_inference_steps": 1, "output_type": "pt"}
    return pipeline, inputs | settings | {"latents": noise(4, 1, 4, 8, 8).double()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("training", "force_inference_output"), [(True, False), (False, False), (True, True)])
def test_experts_get_their_gradient(training, force_inference_output, checkpointing):
    """
    HiDream's denoiser fails in training mode, and its experts are under `no_grad` in evaluation mode, also where they are
    computed again in the backward pass, after the hooks.
    """
    pipeline, inputs = tiny_hidream(force_inference_output)
    pipeline.vae.requires_grad_(False).eval()
    pipeline.transformer.train(training)
    if checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    with draft(num_gradient_steps=1).attach(pipeline):
        images = pipeline(**inputs).images
    assert all(module.training == training for module in pipeline.transformer.modules())
    weight = pipeline.transformer.single_stream_blocks[0].block.ff_i.experts[0].w2.weight
    (gradient,) = torch.autograd.grad(images.sum(), weight)
    pipeline.transformer.eval()
    differences = []
    for change in (1e-5, -1e-5):
        with torch.no_grad():
            weight += change * noise(5, *weight.shape)
            differences.append(pipeline(**inputs).images.sum() / change / 2)
            weight -= change * noise(5, *weight.shape)
    assert gradient.abs().max() > 0
    torch.testing.assert_close((gradient * noise(5, *weight.shape)).sum(), sum(differences), rtol=1e-3, atol=0)


def test_a_callback_refuses_a_pipeline_that_steps_with_copies_of_its_scheduler():
    """SkyReels copies its scheduler for each frame before the first step-end callback."""
    wan, inputs = BUILDERS["Wan"]()
    config = {**wan.transformer.config, "inject_sample_info": False}
    transformer = diffusers.SkyReelsV2Transformer3DModel.from_config(config)
    pipeline = diffusers.SkyReelsV2DiffusionForcingPipeline(None, None, transformer, wan.vae, wan.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    callback = draft(num_gradient_steps=1)
    arguments = {"num_inference_steps": 3, "output_type": "pt", "callback_on_step_end": callback, **inputs}
    with pytest.raises(
        RuntimeError, match="for each step that `pipeline.scheduler` itself makes. Use `with callback.attach"
    ):
        pipeline(None, **arguments)
