"""Editing generators: each row's own source image is edited, and judged beside it, in tuning, references and search."""

import datasets
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from tiny_editing import CALLS, EDIT_STEPS, EDITORS, flux_kontext, small_sources
from tiny_pipelines import TinyPipeline, ready
from tiny_refl import PROMPTS, make_trainer, pixel_reward, trained_weights
from tiny_vlms import random_image

from rewarddance_hf.alignment.gradient import RewardGradientCallback
from rewarddance_hf.alignment.monitor.callback import RewardDynamicsCallback
from rewarddance_hf.alignment.refl.references import best_of_n_references
from rewarddance_hf.alignment.refl.rows import seed_of
from rewarddance_hf.alignment.search.search import best_of_n, search_over_paths, zero_order_search


SOURCES = [random_image(1, 8, 8), random_image(2, 16, 8), random_image(3, 8, 12)]
# Those that edit a source of the size that it has, and so need it to be one that they can.
LARGE = [random_image(1, 16, 16), random_image(2, 16, 16), random_image(3, 16, 16)]


@pytest.fixture(autouse=True)
def few_pixels():
    with small_sources():
        yield


def rows_of(name):
    sources = LARGE if name in ("instruct_pix2pix", "sd3_img2img") else SOURCES
    return [{"prompt": prompt, "condition": source} for prompt, source in zip(PROMPTS, sources, strict=False)]


def trainer_of(name, tmp_path, pipeline=None, **arguments):
    guidance = {} if name.startswith("qwen") else {"guidance_scale": 3.0}
    defaults = {"train_dataset": rows_of(name), "pipeline_kwargs": CALLS[name], "max_steps": 1, "guidance_scale": None}
    return make_trainer(tmp_path, pipeline or EDITORS[name](), **{**defaults, **guidance, **arguments})


class Judge:
    """A reward of pixels that remembers what it was told."""

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts, conditions, task):
        self.seen += zip(images.detach().clone(), prompts, conditions, task, strict=True)
        return pixel_reward(images, prompts)


@pytest.mark.parametrize("name", EDITORS)
def test_each_row_edits_its_own_source(name, tmp_path):
    """
    Training, evaluation and monitor edit the source image of each row, and judge the result beside it as an edit. Samples are
    those of the pipeline alone.
    """
    rows, judge = rows_of(name), Judge()
    monitor = RewardDynamicsCallback(judge, rows, eval_steps=1, num_samples=1, plot=False)
    trainer = trainer_of(name, tmp_path, reward=judge, eval_dataset=rows, callbacks=[monitor])
    before = trained_weights(trainer)
    trainer.train()
    assert any((value - before[key]).abs().max() > 0 for key, value in trained_weights(trainer).items())
    assert {task for *_, task in judge.seen} == {"image-editing"}
    own = {row["prompt"]: row["condition"] for row in rows}
    assert all(own[prompt] == source for _, prompt, source, _ in judge.seen)
    judge.seen.clear()
    trainer.evaluate()
    assert len(judge.seen) == len(rows)
    for index, row in enumerate(rows):
        settings = {"num_inference_steps": EDIT_STEPS, "output_type": "pt", **CALLS[name]}
        if not name.startswith("qwen"):
            settings["guidance_scale"] = 3.0
        generator = torch.Generator().manual_seed(seed_of(42, "eval", index))
        with torch.no_grad():
            alone = trainer.pipeline(prompt=row["prompt"], image=row["condition"], generator=generator, **settings)[0]
        torch.testing.assert_close(judge.seen[index][0], alone[0], rtol=0, atol=1e-5)
    assert "pipeline_tag: image-to-image" in trainer._card("my-editor")


def packed(latents):
    """Patches of two by two as tokens."""
    _, channels, height, width = latents.shape
    parts = latents.reshape(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    return parts.reshape(1, height * width // 4, channels * 4)


def ids_of(height, width, kind):
    """Kind, row and column of each token."""
    return torch.tensor([[kind, row, column] for row in range(height // 2) for column in range(width // 2)]).float()


def plain_kontext_loss(pipeline, prompts, sources, seeds, step, num_steps, guidance_scale):
    """ReFL on FLUX Kontext, written out for each row: Euler steps without gradient, then a clean prediction with it."""
    losses = []
    vae, scheduler = pipeline.vae.config, pipeline.scheduler
    for prompt, source, seed in zip(prompts, sources, seeds, strict=True):
        with torch.no_grad():
            embeds, pooled, text_ids = pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=8)
            pixels = torch.from_numpy(np.array(source)).permute(2, 0, 1)[None] / 127.5 - 1
            encoded = (pipeline.vae.encode(pixels).latent_dist.mode() - vae.shift_factor) * vae.scaling_factor
        given = packed(encoded)
        ids = torch.cat([ids_of(8, 8, 0), ids_of(*encoded.shape[2:], 1)])
        latents = packed(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)))
        shift = calculate_shift(latents.shape[1], 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=shift)
        for index in range(step + 1):
            with torch.set_grad_enabled(index == step):
                velocity = pipeline.transformer(
                    hidden_states=torch.cat([latents, given], dim=1),
                    timestep=scheduler.timesteps[index : index + 1] / 1000,
                    guidance=torch.tensor([guidance_scale]),
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=text_ids,
                    img_ids=ids,
                    return_dict=False,
                )[0][:, : latents.shape[1]]
                end = scheduler.sigmas[index + 1] if index < step else 0.0
                latents = latents + (end - scheduler.sigmas[index]) * velocity
        grid = latents.reshape(4, 4, 4, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 4, 8, 8)
        decoded = pipeline.vae.decode(grid / vae.scaling_factor + vae.shift_factor, return_dict=False)[0]
        losses.append(-pixel_reward((decoded / 2 + 0.5).clamp(0, 1), [prompt]))
    return torch.cat(losses).mean()


def test_an_update_equals_one_written_out(tmp_path):
    """One SGD update of Kontext is the gradient of minus the mean reward of edits of two sources, of different shape."""
    sgd = {"optim": "sgd", "learning_rate": 10.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    trainer = trainer_of("flux_kontext", tmp_path, **sgd)
    before = trained_weights(trainer)
    draws = list(trainer._get_train_sampler())[:2]
    trainer.train()
    after = trained_weights(trainer)
    reference, rows = trainer_of("flux_kontext", tmp_path), rows_of("flux_kontext")
    loss = plain_kontext_loss(
        reference.pipeline,
        [rows[row]["prompt"] for row, _ in draws],
        [rows[row]["condition"] for row, _ in draws],
        [seed_of(42, "latents", draw) for _, draw in draws],
        int(trainer.state.log_history[0]["step_index"]),
        EDIT_STEPS,
        3.0,
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, reference.trained_parameters)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-6
    for (name, value), gradient in zip(after.items(), gradients, strict=True):
        torch.testing.assert_close(value - before[name], -10.0 * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["flux_kontext", "instruct_pix2pix"])
def test_gradient_of_edits(name):
    """The gradient of the reward through an edit is that of finite differences, and another source gives another one."""
    pipeline = ready(EDITORS[name]())
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    parameters = [p.requires_grad_() for key, p in denoiser.named_parameters() if key.endswith("to_q.weight")]
    gradients = []
    for row in rows_of(name)[:2]:

        def run(row=row):
            settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", **CALLS[name]}
            generator = torch.Generator().manual_seed(0)
            return pipeline(prompt=PROMPTS[0], image=row["condition"], generator=generator, **settings)[0]

        with RewardGradientCallback("draft", num_gradient_steps=2).attach(pipeline):
            value = 1e3 * pixel_reward(run(), PROMPTS[:1]).sum()
        gradients.append(torch.autograd.grad(value, parameters))
        length = sum(gradient.double().square().sum() for gradient in gradients[-1]).sqrt()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                for parameter, gradient in zip(parameters, gradients[-1], strict=True):
                    parameter += sign * 1e-2 * gradient / length
                values.append(1e3 * pixel_reward(run().double().float(), PROMPTS[:1]).sum().double())
                for parameter, gradient in zip(parameters, gradients[-1], strict=True):
                    parameter -= sign * 1e-2 * gradient / length
        torch.testing.assert_close((values[0] - values[1]) / 2e-2, length, rtol=3e-2, atol=0)
    one, other = (torch.cat([gradient.flatten() for gradient in part]) for part in gradients)
    assert (one - other).norm() > 1e-3 * one.norm()


def test_results_of_different_shape(tmp_path):
    """
    A pipeline that takes the shape of the source gives samples that no batch holds: the error says what to do, and a batch of
    one does it.
    """
    kwargs = {"true_cfg_scale": 2.0, "negative_prompt": "a"}
    trainer = trainer_of("qwen_image_edit", tmp_path, pipeline_kwargs=kwargs)
    with pytest.raises(
        ValueError, match=r"made samples of the shapes \[\(3, .*Set `height` and `width` in `pipeline_kwargs`, or"
    ):
        trainer.train()
    trainer = trainer_of(
        "qwen_image_edit",
        tmp_path,
        pipeline_kwargs=kwargs,
        eval_dataset=rows_of("qwen_image_edit"),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=3,
    )
    trainer.train()
    assert len(trainer.last_rewards) == 3
    assert np.isfinite(trainer.evaluate()["eval_reward"])


def test_precomputed_prompts_of_edits(tmp_path):
    """Prompts of Kontext are encoded once for all sources; those of Qwen-Image-Edit depend on the image, and are refused."""
    samples = []
    for precompute in (False, True):
        trainer = trainer_of("flux_kontext", tmp_path, precompute_prompts=precompute)
        rows = rows_of("flux_kontext")
        trainer.encode_prompts([row["prompt"] for row in rows], rows[0]["condition"])
        samples.append(
            trainer.sample(
                [row["prompt"] for row in rows], output_type="pt", conditions=[row["condition"] for row in rows]
            )
        )
    torch.testing.assert_close(*samples, rtol=0, atol=1e-6)
    trainer = trainer_of("qwen_image_edit", tmp_path, precompute_prompts=True)
    with pytest.raises(ValueError, match="encodes prompts together with `image` .* Set `precompute_prompts=False`"):
        trainer.train()


def search_settings(name):
    guidance = {} if name.startswith("qwen") else {"guidance_scale": 3.0}
    return {"num_inference_steps": EDIT_STEPS, **guidance, **CALLS[name]}


@pytest.mark.parametrize("name", EDITORS)
def test_references_of_edits(name, scorers):
    """Candidates of a row edit its source image, and a pairwise judge ranks them beside it."""
    pipeline, rows = ready(EDITORS[name]()), rows_of(name)[:2]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    found = best_of_n_references(
        pipeline,
        scorers["pairwise"],
        datasets.Dataset.from_dict(
            columns, features=datasets.Features(prompt=datasets.Value("string"), condition=datasets.Image())
        ),
        num_candidates=2,
        top_k=2,
        show_progress=False,
        **search_settings(name),
    )
    for row, got in zip(rows, found, strict=True):
        for reference, seed in zip(got["references"], got["seeds"], strict=True):
            alone = pipeline(
                prompt=row["prompt"],
                image=row["condition"],
                generator=torch.Generator().manual_seed(seed),
                **search_settings(name),
            )[0][0]
            assert np.abs(np.asarray(reference, float) - np.asarray(alone, float)).max() <= 1
        want = scorers["pairwise"].rank(
            got["references"], row["prompt"], condition=row["condition"], task="image-editing"
        )
        assert want.order[0] == 0
        assert got["scores"] == pytest.approx(want.scores[want.order].tolist(), abs=1e-4)


@pytest.mark.parametrize("name", EDITORS)
def test_search_for_edits(name, scorers):
    """`conditions` are edited by the pipeline and shown to the judge; the reward is that of the edit."""
    pipeline, rows, scorer = ready(EDITORS[name]()), rows_of(name)[:2], scorers["pointwise"]
    prompts, sources = [row["prompt"] for row in rows], [row["condition"] for row in rows]
    arguments = {"context": {"conditions": sources}, **search_settings(name)}
    results = best_of_n(pipeline, prompts, scorer, num_candidates=2, **arguments)
    for prompt, source, result in zip(prompts, sources, results, strict=True):
        generator = torch.Generator().manual_seed(result.lineage()[0].seed)
        alone = pipeline(prompt=prompt, image=source, generator=generator, **search_settings(name))[0][0]
        assert np.abs(np.asarray(result.images[0], float) - np.asarray(alone, float)).max() <= 1
        want = scorer.score(result.images, prompt, conditions=[source], task="image-editing")
        assert result.rewards == pytest.approx(want.tolist(), abs=1e-4)
        assert result.rewards != pytest.approx(scorer.score(result.images, prompt).tolist(), abs=1e-6)


def test_other_searches_for_edits(scorers):
    """Search over Paths and around the best noise edit the source image of each prompt too."""
    pipeline, rows, scorer = ready(flux_kontext()), rows_of("flux_kontext")[:2], scorers["pointwise"]
    prompts, sources = [row["prompt"] for row in rows], [row["condition"] for row in rows]
    arguments = {"context": {"conditions": sources}, **search_settings("flux_kontext")}
    steps = {"start_step": 3, "renoise_steps": 1, "denoise_steps": 2}
    for results in (
        search_over_paths(pipeline, prompts, scorer, num_paths=1, num_branches=2, **steps, **arguments),
        zero_order_search(pipeline, prompts, scorer, num_neighbors=2, num_rounds=2, **arguments),
    ):
        for prompt, source, result in zip(prompts, sources, results, strict=True):
            want = scorer.score(result.images, prompt, conditions=[source])
            assert result.rewards == pytest.approx(want.tolist(), abs=1e-4)


def test_sources_of_searches_are_checked(scorers, caplog):
    """One source for each prompt, or none; an image that only the pipeline sees is told of."""
    pipeline, scorer = ready(flux_kontext()), scorers["pointwise"]
    settings = search_settings("flux_kontext")
    with pytest.raises(ValueError, match=r"`context\[\"conditions\"\]\[1\]` is None, but others are images"):
        best_of_n(pipeline, PROMPTS[:2], scorer, 1, context={"conditions": [SOURCES[0], None]}, **settings)
    best_of_n(pipeline, PROMPTS[0], scorer, 1, image=SOURCES[0], **settings)
    assert "`image` was given to the pipeline, but the reward does not see it" in caplog.text


def test_search_for_edits_of_flux_2():
    """Flux 2 takes its source image as `image` too, and makes other images of other sources."""
    tiny = TinyPipeline("Flux2")
    sources = [random_image(index, 64, 64) for index in (1, 2)]
    settings = {"num_inference_steps": 2, "output_type": "pt", **tiny.inputs}
    results = best_of_n(
        tiny.pipeline, PROMPTS[:2], Judge(), num_candidates=1, context={"conditions": sources}, **settings
    )
    for index, (source, result) in enumerate(zip(sources, results, strict=True)):
        own = {**settings, "prompt_embeds": tiny.inputs["prompt_embeds"][index : index + 1]}
        generator = torch.Generator().manual_seed(result.lineage()[0].seed)
        with torch.no_grad():
            alone = tiny.pipeline(image=source, generator=generator, **own)[0]
        torch.testing.assert_close(result.images[0], alone[0], rtol=0, atol=1e-5)
