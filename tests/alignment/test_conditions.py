"""Rows with a condition: pipelines are called for several at once where that gives each row its own sample."""

import diffusers
import numpy as np
import pytest
import torch
from tiny_editing import CALLS, EDITORS, sd3_img2img, small_sources
from tiny_pipelines import ready
from tiny_refl import PROMPTS, make_trainer, pixel_reward, trained_weights
from tiny_vlms import random_image

from rewarddance_hf.alignment.refl.candidates import CandidateDrawer
from rewarddance_hf.shapes.clip_generator import CLIP_SAMPLING, build_clip_generator


SGD = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
CLIP_CALL = {
    key: value for key, value in CLIP_SAMPLING.items() if key not in ("num_inference_steps", "guidance_scale")
}


def ltx_image_to_video():
    components = build_clip_generator().components
    torch.nn.init.normal_(components["transformer"].proj_out.weight, std=0.1)  # zero before it is trained
    return diffusers.LTXImageToVideoPipeline(**components)


class FirstImageForAll(diffusers.StableDiffusion3Img2ImgPipeline):
    """Takes lists of images, and uses the first."""

    def __call__(self, *args, image=None, **kwargs):
        return super().__call__(*args, image=[image[0]] * len(image) if isinstance(image, list) else image, **kwargs)


class OneImage(diffusers.StableDiffusion3Img2ImgPipeline):
    """Takes no lists of images."""

    def __call__(self, *args, image=None, **kwargs):
        return super().__call__(*args, image=image.convert("RGB"), **kwargs)


BUILDERS = {**EDITORS, "ltx": ltx_image_to_video}
TOGETHER = {"flux_kontext", "instruct_pix2pix", "sd3_img2img", "ltx"}


def counted(pipeline):
    """Number of prompts of each call from now on."""
    calls, call = [], type(pipeline).__call__

    class Counted(type(pipeline)):
        def __call__(self, *args, prompt=None, **kwargs):
            calls.append(1 if isinstance(prompt, str) else len(prompt))
            return call(self, *args, prompt=prompt, **kwargs)

    Counted.__name__ = type(pipeline).__name__
    pipeline.__class__ = Counted
    return calls


def trainer_of(name, tmp_path, pipeline=None, sizes=((16, 16),) * 3, **arguments):
    width, height = (32, 32) if name == "ltx" else (None, None)
    sources = [random_image(index, width or size[0], height or size[1]) for index, size in enumerate(sizes, 1)]
    rows = [{"prompt": prompt, "condition": source} for prompt, source in zip(PROMPTS, sources, strict=False)]
    call = CLIP_CALL if name == "ltx" else CALLS[name]
    guidance = {"guidance_scale": None if name.startswith("qwen") else 3.0}
    defaults = {"train_dataset": rows, "pipeline_kwargs": call, "max_steps": 1, **guidance, **SGD}
    return make_trainer(tmp_path, pipeline or BUILDERS[name](), **{**defaults, **arguments})


@pytest.mark.parametrize("name", BUILDERS)
def test_an_update_of_a_batch_is_that_of_its_rows(name, tmp_path):
    """
    Updates of pipelines that take several conditions are those of rows that are sampled one by one; the two that show all images
    to one prompt, or take one only, are found out.
    """
    changes, numbers = [], []
    with small_sources():
        for is_alone in (False, True):
            trainer = trainer_of(name, tmp_path)
            if is_alone:
                trainer.condition_trial.holds = False
            calls = counted(trainer.pipeline)
            before = trained_weights(trainer)
            trainer.train()
            assert trainer.condition_trial.holds == (name in TOGETHER and not is_alone)
            numbers.append(calls)
            changes.append({key: value - before[key] for key, value in trained_weights(trainer).items()})
    assert numbers[1] == [1] * 4  # two rows before training, two in the update
    if name in TOGETHER:
        assert numbers[0] == [1, 1, 1, 2, 2, 2]  # the trial, two rows before training, the update
    length = torch.cat([change.flatten() for change in changes[1].values()]).norm()
    assert length > 1e-6
    for key, change in changes[0].items():
        torch.testing.assert_close(change, changes[1][key], rtol=1e-3, atol=1e-4 * length.item())


@pytest.mark.parametrize("pipeline_class", [FirstImageForAll, OneImage])
def test_pipelines_that_take_no_lists(pipeline_class, tmp_path):
    """One that shows the first image to all prompts would edit another image than the judge sees."""
    pipeline = pipeline_class(**sd3_img2img().components)
    trainer = trainer_of("sd3_img2img", tmp_path, pipeline)
    trainer.train()
    assert trainer.condition_trial.holds is False


def test_batches_of_several_sizes_are_sampled_one_by_one(tmp_path):
    """Kontext edits each source at its size, and gives results of the size that the call asks for."""
    with small_sources():
        trainer = trainer_of("flux_kontext", tmp_path, sizes=[(8, 8), (16, 8), (8, 12)])
        calls = counted(trainer.pipeline)
        trainer.train()
    assert trainer.condition_trial.holds
    assert calls == [1, 1, 1, 2, 1, 1, 1, 1]


def test_a_trial_leaves_no_trace(tmp_path):
    """Random numbers, the mode of the denoiser and the drawn step are those of a run without it."""
    results = []
    for holds in (None, True):
        trainer = trainer_of("sd3_img2img", tmp_path, max_steps=2)
        trainer.condition_trial.holds = holds
        trainer.model.train()
        state = torch.get_rng_state()
        trainer.encode_prompts(PROMPTS[:2], random_image(1, 16, 16))
        assert torch.equal(state, torch.get_rng_state())
        assert trainer.model.training
        trainer.train()
        results.append(trained_weights(trainer))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("name", ["sd3_img2img", "qwen_image_edit"])
def test_candidates_of_a_condition(name):
    """Candidates are those that are drawn one by one, in fewer calls where the pipeline takes several images."""
    row = {"prompt": PROMPTS[0], "condition": random_image(1, 16, 16)}
    settings = {"num_inference_steps": 4, **CALLS[name]}  # with less, nothing of the source is left
    found, numbers = [], []
    with small_sources():
        for batch_size in (4, 1):
            pipeline = ready(EDITORS[name]())
            calls = counted(pipeline)
            found.append(CandidateDrawer(pipeline, settings, batch_size).draw([row], ["prompts[0]"], [range(4)])[0])
            numbers.append(calls)
    assert numbers[1] == [1] * 4
    assert numbers[0][-1] == (4 if name == "sd3_img2img" else 1)
    for index in range(4):
        ours, theirs = (torch.from_numpy(np.array(samples[index], float)) for samples in found)
        assert (ours - theirs).abs().max() <= 1


def test_a_broken_condition_is_named(tmp_path):
    """A condition that is no image is told before anything is sampled."""
    trainer = trainer_of("sd3_img2img", tmp_path, reward=pixel_reward)
    with pytest.raises((TypeError, ValueError), match="condition"):
        trainer.sample(PROMPTS[:2], conditions=[b"no image", random_image(1, 16, 16)])
