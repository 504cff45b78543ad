"""Parts of a schedule through unmodified pipelines, against plain calls of the same pipelines."""

import functools
import math

import diffusers
import pytest
import torch
from PIL import Image
from tiny_pipelines import BUILDERS, STABLE_DIFFUSION_BETAS, TinyPipeline, kandinsky, noise, stable_diffusion

from rewarddance_hf.alignment.gradient import RewardGradientCallback
from rewarddance_hf.alignment.pipelines.noise_levels import noise_levels
from rewarddance_hf.alignment.pipelines.stage import Trajectory
from rewarddance_hf.alignment.pipelines.staged import StagedPipeline


SEEDS = (5, 6)


@functools.cache
def tiny(name: str) -> TinyPipeline:
    return TinyPipeline(name)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def start() -> list[Trajectory]:
    return [Trajectory(index, generator) for index, generator in enumerate(generators())]


def staged_of(model: TinyPipeline, **arguments) -> StagedPipeline:
    return StagedPipeline(model.pipeline, ["a", "b"], {"num_inference_steps": 4, **model.inputs, **arguments})


def run(staged: StagedPipeline, trajectories: list[Trajectory], first: int, stop: int):
    ((trajectories, images),) = staged.advance(trajectories, first, stop)
    return trajectories, images


@pytest.mark.parametrize("name", BUILDERS)
def test_parts_equal_the_whole(name):
    """Stopping twice and going on gives the plain pipeline's images bit for bit; multistep schedulers keep their memory."""
    model = tiny(name)
    plain = model(generator=generators())
    staged = staged_of(model)
    trajectories = start()
    for first, stop in ((0, 1), (1, 3), (3, 4)):
        trajectories, images = run(staged, trajectories, first, stop)
    assert torch.equal(images, plain)
    assert staged.evaluations == [4, 4]
    assert not {"set_timesteps", "step", "scale_model_input"} & set(vars(model.pipeline.scheduler))
    assert "prepare_latents" not in vars(model.pipeline)
    assert torch.equal(model(generator=generators()), plain)


@pytest.mark.parametrize("name", ["StableDiffusion", "StableDiffusion3", "Flux", "Sana", "QwenImage", "Wan"])
def test_preview_is_the_clean_prediction(name):
    """What is decoded at the end of a stage is what the reward gradient decodes after the same step, which has its own checks."""
    model = tiny(name)
    _, preview = run(staged_of(model), start(), 0, 3)
    callback = RewardGradientCallback(method="refl", step_index_range=(2, 3))
    with callback.attach(model.pipeline):
        expected = model(generator=generators())
    torch.testing.assert_close(preview, expected.detach(), atol=1e-6, rtol=0)


def test_random_numbers_go_on():
    """A sampler that draws noise in each step draws on where the stage before ended."""
    model = tiny("StableDiffusion")
    plain = model(generator=generators(), eta=1.0)
    assert (plain - model(generator=generators())).abs().max() > 1e-3
    staged = staged_of(model, eta=1.0)
    trajectories, _ = run(staged, start(), 0, 2)
    assert torch.equal(run(staged, trajectories, 2, 4)[1], plain)


def test_multistep_schedulers_remember_each_path():
    """What UniPC remembers goes with each path, whatever batches it runs in: all images are those of the pipeline alone."""
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="epsilon", solver_order=3)
    pipeline, inputs = stable_diffusion(scheduler)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 8, **inputs}
    staged = StagedPipeline(pipeline, ["a", "b"], arguments, batch_size=2)
    trajectories = [Trajectory(seed % 2, torch.Generator().manual_seed(seed)) for seed in range(5)]
    images = []
    for first, stop in ((0, 1), (1, 4), (4, 7), (7, 8)):
        batches = list(staged.advance(trajectories, first, stop))
        # The order in which paths go on changes their batches.
        trajectories = [path for paths, _ in batches for path in paths][::-1]
        images = torch.cat([image for _, image in batches])
    seeds = [t.generator.initial_seed() for t in trajectories][::-1]
    for seed, image in zip(seeds, images, strict=True):
        alone = {k: v[[seed % 2]] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        plain = pipeline(**alone, generator=torch.Generator().manual_seed(seed), output_type="pt").images[0]
        torch.testing.assert_close(image, plain, atol=1e-5, rtol=0)


SCHEDULERS = {
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "inverted flow": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "ddim": diffusers.DDIMScheduler(**STABLE_DIFFUSION_BETAS),
    "euler": diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS),
    "dpm": diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION_BETAS),
    "dpm flow": diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "unipc flow": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}


def forward(scheduler, clean, index, fresh):
    """Forward process of the scheduler's own, to the noise level before a step."""
    timestep = scheduler.timesteps[index : index + 1]
    if hasattr(scheduler, "scale_noise"):
        if scheduler.config.invert_sigmas:  # the class itself has no forward process for this option
            sigma = scheduler.sigmas[index]
            return sigma * clean + (1 - sigma) * fresh
        return scheduler.scale_noise(clean, timestep, fresh)
    return scheduler.add_noise(clean, fresh, timestep)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_renoising_keeps_the_marginals(kind):
    """Latents of step 7 that are noised back to step 3 have the mean and spread of those that were never denoised."""
    scheduler = SCHEDULERS[kind]
    scheduler.set_timesteps(10)
    clean, fresh = torch.full((1, 1, 400, 400), 0.8), noise(1, 1, 1, 400, 400)
    staged = StagedPipeline(tiny("StableDiffusion3").pipeline, ["a"], {})
    staged.__dict__["noise_levels"] = noise_levels(scheduler)
    late = Trajectory(0, torch.Generator(), latents=(forward(scheduler, clean, 7, fresh),))
    (early,) = staged.renoise(late, 7, 3, torch.Generator().manual_seed(2)).latents
    wanted = forward(scheduler, clean, 3, noise(3, 1, 1, 400, 400))
    assert early.mean().item() == pytest.approx(wanted.mean().item(), abs=0.02 * wanted.std().item())
    assert early.std().item() == pytest.approx(wanted.std().item(), rel=0.01)
    assert late.latents[0].std() < 0.9 * early.std()
    share = torch.corrcoef(torch.stack([early.flatten(), fresh.flatten()]))[0, 1].item()
    (signal, sigma), (new_signal, new_sigma) = (noise_levels(scheduler)[index] for index in (7, 3))
    assert share == pytest.approx(new_signal / signal * sigma / new_sigma, abs=0.02)


def test_noise_levels_of_a_flow():
    """Levels are those of the pipeline's call: its number of steps and its shift."""
    staged = staged_of(tiny("StableDiffusion3"), num_inference_steps=5)
    assert staged.num_steps == 5
    for (signal, sigma), timestep in zip(staged.noise_levels, staged._schedule.scheduler.timesteps, strict=True):
        assert signal + sigma == pytest.approx(1)
        assert sigma == pytest.approx(timestep.item() / 1000, rel=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_renoising_by_no_step_branches(eta):
    """Going back by no step leaves the latents as they are, but later random numbers are those of the branch."""
    model = tiny("StableDiffusion")
    staged = staged_of(model, eta=eta)
    trajectories, _ = run(staged, start(), 0, 2)
    branches = [staged.renoise(trajectories[0], 2, 2, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert torch.equal(branches[0].latents[0], trajectories[0].latents[0])
    images = run(staged, branches, 2, 4)[1]
    # Without noise of its own both are equal, but for the place in the batch.
    assert math.isclose(float((images[0] - images[1]).abs().max()), 0, abs_tol=1e-6) == (eta == 0.0)


def test_counts_equal_those_of_a_hook():
    """Evaluations count images and steps; forward passes are the samples that the denoiser sees, guidance included."""
    for name, per_evaluation in (("StableDiffusion3", 2), ("QwenImage", 2), ("Flux", 1), ("ZImage", 2)):
        model, seen = tiny(name), []
        hook = model.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        staged = staged_of(model)
        assert staged.num_steps == 4
        assert seen == []  # the schedule is known before anything is computed
        trajectories, _ = run(staged, start(), 0, 3)
        run(staged, trajectories[:1], 3, 4)
        hook.remove()
        assert staged.evaluations == [4, 3]
        assert sum(seen) == sum(staged.forward_passes) == per_evaluation * 7


def test_everything_is_as_before_when_the_call_raises(monkeypatch):
    """A stage that fails leaves no wrapper behind."""
    model = tiny("StableDiffusion3")
    plain, staged = model(), staged_of(model)
    assert staged.num_steps == 4
    before = set(vars(model.pipeline.scheduler)), set(vars(model.pipeline))
    monkeypatch.setattr(model.denoiser, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        run(staged, start(), 1, 3)
    monkeypatch.undo()
    assert (set(vars(model.pipeline.scheduler)), set(vars(model.pipeline))) == before
    assert torch.equal(model(), plain)


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.PNDMScheduler(skip_prk_steps=True), diffusers.HeunDiscreteScheduler()],
    ids=["pndm", "heun"],
)
def test_schedulers_without_one_timestep_a_step(scheduler):
    """Schedulers that cannot be stopped anywhere are refused with the names of those that can."""
    pipeline, inputs = stable_diffusion(scheduler)
    staged = StagedPipeline(pipeline, ["a", "b"], {"num_inference_steps": 4, **inputs})
    with pytest.raises(
        NotImplementedError, match="makes one step of several timesteps.* Set `pipeline.scheduler` to a flow"
    ):
        staged.noise_levels  # noqa: B018


@pytest.mark.skipif(
    not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"), reason="needs a diffusers version with flow maps"
)
def test_scheduler_of_unknown_kind():
    """Noise levels that are not known are not guessed."""
    with pytest.raises(NotImplementedError, match="`FlowMapEulerDiscreteScheduler`, whose noise levels are not known"):
        noise_levels(diffusers.FlowMapEulerDiscreteScheduler())


def test_schedule_of_a_copied_scheduler():
    """The number of steps is that of the call to come, also where the pipeline copies its scheduler before it sets it."""
    model = tiny("LTX2")
    staged = staged_of(model)
    model(num_inference_steps=2)
    assert staged.num_steps == 4


def test_clips_among_the_arguments_are_not_batched():
    """A clip that all paths begin from has no batch to be joined with; embeddings have."""
    model = tiny("StableDiffusion")
    clip = [Image.new("RGB", (8, 8))] * 2
    for arguments, batch_size in (({"video": clip}, 1), ({"video": noise(0, 1, 2, 3, 8, 8)}, 1), ({"eta": 1.0}, 8)):
        assert StagedPipeline(model.pipeline, ["a"], arguments).batch_size == batch_size


def test_image_to_image():
    """A pipeline that begins in the middle of its schedule runs as a whole, and is refused in parts."""
    model = tiny("StableDiffusion3")
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**model.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {**model.inputs, "image": images, "strength": 0.5, "num_inference_steps": 8}
    staged = StagedPipeline(pipeline, ["a", "b"], arguments)
    assert staged.num_steps == 4
    for row, (_, image) in enumerate(staged.advance(start(), 0, staged.num_steps)):  # one by one
        alone = {name: value[[row]] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        assert torch.equal(image, pipeline(**alone, generator=generators()[row], output_type="pt").images)
    assert staged.evaluations == [4, 4]
    with pytest.raises(
        NotImplementedError, match="makes 4 of the 8 steps of its schedule.* Pass `strength=1.0`.*`best_of_n`"
    ):
        run(staged, start(), 0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": torch.Generator()}, "`generator` was given, but the search makes a generator for each path"),
        ({"latents": noise(1, 2, 4, 8, 8)}, "`latents` was given, but the search draws the noise"),
        ({"num_images_per_prompt": 2}, "`num_images_per_prompt` was given, but the search decides"),
        ({"negative_prompt": ["a", "b", "c"]}, "`negative_prompt` has 3 entries for 2 prompts"),
    ],
)
def test_arguments_of_the_search(arguments, message):
    """Arguments that belong to the search, or do not fit the prompts, are refused at once."""
    with pytest.raises(ValueError, match=message):
        StagedPipeline(tiny("StableDiffusion3").pipeline, ["a", "b"], arguments)


def test_pipeline_without_prepare_latents():
    """A pipeline that draws its noise elsewhere is refused by name."""
    pipeline = diffusers.DDPMPipeline(unet=None, scheduler=diffusers.DDPMScheduler())
    with pytest.raises(
        ValueError, match="`pipeline` is a `DDPMPipeline`, but it must have a scheduler and draw its noise in"
    ):
        StagedPipeline(pipeline, ["a"], {})


def inpainting(strength: float):
    """Stable Diffusion that keeps the left half of one image, for both of its prompts."""
    model = tiny("StableDiffusion")
    pipeline = diffusers.StableDiffusionInpaintPipeline(**model.pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    random = torch.Generator().manual_seed(0)
    image = Image.fromarray(torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=random).numpy())
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 8, 16))
    changes = {"image": image, "mask_image": mask, "strength": strength, "num_inference_steps": 4}
    return pipeline, {**model.inputs, **changes}


@pytest.mark.parametrize("strength", [1.0, 0.75])
def test_inpainting_keeps_its_region_under_refl(strength):
    """The reward sees the kept region as the pipeline ends with it, without the noise of the step that was drawn."""
    pipeline, arguments = inpainting(strength)
    plain = pipeline(**arguments, generator=generators(), output_type="latent").images
    with RewardGradientCallback(method="refl", step_index_range=(1, 2)).attach(pipeline):
        latents = pipeline(**arguments, generator=generators(), output_type="latent").images
    assert latents.requires_grad
    assert torch.equal(latents[..., :4], plain[..., :4])
    assert (latents[..., 4:] - plain[..., 4:]).abs().max() > 1e-3


def test_inpainting_in_parts():
    """A pipeline that puts the noised image into the latents after each step cannot be stopped in between."""
    pipeline, arguments = inpainting(1.0)
    staged = StagedPipeline(pipeline, ["a", "b"], arguments)
    with pytest.raises(NotImplementedError, match="as inpainting does.*`best_of_n` without `preview_step`"):
        list(staged.advance(start(), 0, 2))
    with pytest.raises(NotImplementedError, match="`image` was given.* Stop after two steps or more"):
        list(staged.advance(start(), 0, 1))


def test_seeds_of_pipelines_that_encode_an_image():
    """Noise for the input image comes from each path's own generator, also where pipelines take the first of a batch."""
    pipeline, arguments = inpainting(0.75)
    staged = StagedPipeline(pipeline, ["a", "b"], arguments, batch_size=8)
    for row, (_, image) in enumerate(staged.advance(start(), 0, staged.num_steps)):
        alone = {k: v[[row]] if isinstance(v, torch.Tensor) and "prompt" in k else v for k, v in arguments.items()}
        assert torch.equal(image, pipeline(**alone, generator=generators()[row], output_type="pt").images)


def test_parts_of_pipelines_that_draw_for_their_image():
    """Random numbers that a pipeline draws before its loop, as for the latents of a first frame, are the same in each stage."""
    model = tiny("CogVideoX")
    torch.manual_seed(0)
    config = {**model.denoiser.config, "in_channels": 8}  # the noise and the first frame
    transformer = diffusers.CogVideoXTransformer3DModel.from_config(config).eval()
    pipeline = diffusers.CogVideoXImageToVideoPipeline(**{**model.pipeline.components, "transformer": transformer})
    pipeline.set_progress_bar_config(disable=True)
    inputs = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in model.inputs.items()}
    image = Image.fromarray(torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy())
    arguments = {**inputs, "image": image, "num_inference_steps": 4}
    plain = pipeline(**arguments, generator=generators()[0], output_type="pt")[0]
    staged = StagedPipeline(pipeline, ["a"], arguments)
    trajectories = start()[:1]
    for first, stop in ((0, 2), (2, 3), (3, 4)):
        trajectories, images = run(staged, trajectories, first, stop)
    assert torch.equal(images, plain)


def test_pipeline_without_prompt_and_image_processor():
    """Kandinsky 2.2 denoises under other names, takes no prompt, and leaves tensors in [-1, 1]: images are as plain ones."""
    pipeline, inputs = kandinsky()
    arguments = {"num_inference_steps": 3, **inputs}
    staged = StagedPipeline(pipeline, ["a", "b"], arguments)
    images = run(staged, start(), 0, 3)[1]
    plain = torch.from_numpy(pipeline(**arguments, generator=generators(), output_type="np").images).permute(
        0, 3, 1, 2
    )
    torch.testing.assert_close(images, plain, atol=1e-6, rtol=0)
    assert (staged.evaluations, staged.forward_passes) == ([3, 3], [6, 6])
    trajectories, preview = run(staged, start(), 0, 2)
    assert preview.min() >= 0
    torch.testing.assert_close(run(staged, trajectories, 2, 3)[1], plain, atol=1e-6, rtol=0)
