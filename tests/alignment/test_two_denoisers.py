"""Pipelines with two denoisers (Wan 2.2): the gradient goes to the one that made the step, and both are saved and loaded."""

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from tiny_refl import PROMPTS, SIZES, make_trainer, pixel_reward, rows, tiny_wan_22, trained_weights

from rewarddance_hf.alignment.refl.rows import seed_of
from rewarddance_hf.alignment.refl.weights import LORA_FILE


SGD = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 10.0}


def written_out_loss(pipeline, prompts, seeds, step):
    """ReFL on Wan 2.2 with four steps, written out."""
    with torch.no_grad():
        embeds = pipeline.encode_prompt(prompt=prompts, negative_prompt=[""] * len(prompts), max_sequence_length=8)
    shape = (1, 4, 2, 2, 2)
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    pipeline.scheduler.set_timesteps(4)
    sigmas, timesteps = pipeline.scheduler.sigmas, pipeline.scheduler.timesteps
    for index in range(step + 1):
        denoiser = pipeline.transformer if timesteps[index] >= 800 else pipeline.transformer_2
        with torch.set_grad_enabled(index == step):
            time = timesteps[index].expand(len(prompts))
            given, without = (
                denoiser(latents, timestep=time, encoder_hidden_states=one, return_dict=False)[0] for one in embeds
            )
            end = sigmas[index + 1] if index < step else 0.0
            latents = latents + (end - sigmas[index]) * (without + 3.0 * (given - without))
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    clips = pipeline.vae.decode(latents * std + mean, return_dict=False)[0]
    return -pixel_reward((clips / 2 + 0.5).clamp(0, 1).transpose(1, 2), prompts).mean()


@pytest.mark.parametrize(
    "chosen",
    [None, *(pytest.param([name], marks=pytest.mark.slow) for name in ("transformer", "transformer_2"))],
    ids=str,
)
def test_updates_equal_those_written_out(chosen, tmp_path):
    """
    Each update is the gradient of a loop that is written out, in the adapter of the denoiser that made the drawn step; the other
    adapter stays as it is. Without a range, steps are drawn among those of the denoisers that are tuned.
    """
    trainer = make_trainer(tmp_path, tiny_wan_22(), denoisers=chosen, max_steps=4, step_ratio_range=None, **SGD)
    reference = make_trainer(tmp_path, tiny_wan_22(), denoisers=chosen)
    draws = list(trainer._get_train_sampler())
    seen = []

    def compare(trainer, logs):
        step = int(logs["step_index"])
        seen.append(step)
        update = trainer.state.global_step - 1
        drawn = (draws if update < 3 else [*draws, *next_draws])[2 * update : 2 * update + 2]
        loss = written_out_loss(
            reference.pipeline,
            [rows()[row]["prompt"] for row, _ in drawn],
            [seed_of(42, "latents", draw) for _, draw in drawn],
            step,
        )
        gradients = torch.autograd.grad(loss, reference.trained_parameters, allow_unused=True)
        after = dict(trainer.model.named_parameters())
        for (name, weight), gradient in zip(
            reference.model.named_parameters(), _filled(reference, gradients), strict=True
        ):
            change = after[name].detach() - weight.detach()
            wanted = torch.zeros_like(change) if gradient is None else -10.0 * gradient
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-6)
            weight.data.copy_(after[name])

    trainer._sampler.epoch = 1
    next_draws = list(trainer._sampler)
    trainer._sampler.epoch = 0
    from rewarddance_hf.alignment.refl.callbacks import ReFLCallback

    class Compare(ReFLCallback):
        def on_update(self, trainer, logs):
            compare(trainer, logs)

    trainer.add_callback(Compare())
    trainer.train()
    own = {"transformer": 1, "transformer_2": 3}  # the last quarter of the steps of each
    assert set(seen) == {own[name] for name in chosen or own}


def _filled(trainer, gradients):
    """Gradients of all parameters, None for those that are not trained."""
    found = dict(zip(map(id, trainer.trained_parameters), gradients, strict=True))
    return [found.get(id(parameter)) for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_both_are_saved_loaded_and_resumed(full, tmp_path):
    """A pipeline that loads what was saved draws the trainer's samples, as the card tells; a resumed run goes on as it was."""
    settings = {"peft_config": None} if full else {}
    settings |= {"use_ema": True, "beta": 0.1, "save_strategy": "steps", "save_steps": 2}
    settings |= {"lr_scheduler_type": "constant", "step_ratio_range": [0.0, 1.0], "max_steps": 3}
    trainer = make_trainer(tmp_path, tiny_wan_22(), **settings)
    before = trained_weights(trainer)
    trainer.train()
    trainer.save_model()
    changed = {name.split(".")[0] for name, value in trained_weights(trainer).items() if not value.equal(before[name])}
    assert changed == {"transformer", "transformer_2"}
    samples = trainer.sample(PROMPTS[:2], [3, 4], output_type="pt")
    fresh = tiny_wan_22()
    if full:
        for name in ("transformer", "transformer_2"):
            fresh.register_modules(**{name: diffusers.WanTransformer3DModel.from_pretrained(tmp_path, subfolder=name)})
    else:
        fresh.load_lora_weights(tmp_path, weight_name=LORA_FILE)
        second = {"subfolder": "transformer_2", "load_into_transformer_2": True}
        fresh.load_lora_weights(tmp_path, weight_name=LORA_FILE, **second)
    again = fresh(
        prompt=PROMPTS[:2],
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
        **SIZES["WanPipeline"],
    )[0]
    torch.testing.assert_close(again, samples)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md").text
    wanted = 'subfolder="transformer_2"' if full else 'subfolder="transformer_2", load_into_transformer_2=True)'
    assert wanted in card
    assert "transformer_2=transformer_2" in card or not full

    resumed = make_trainer(tmp_path, tiny_wan_22(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(trained_weights(resumed)[name], weight), name


def test_denoisers_that_would_get_no_gradient_are_refused(tmp_path):
    """A range that one denoiser makes no step of, and names that the pipeline has not."""
    with pytest.raises(ValueError, match="`pipeline.transformer` is to be tuned, but makes none of the steps with"):
        make_trainer(tmp_path, tiny_wan_22(), step_index_range=[2, 4], step_ratio_range=None).train()
    with pytest.raises(ValueError, match="requires gradient in steps 0 to 1, but .*`transformer_2` 2 to 3"):
        make_trainer(tmp_path, tiny_wan_22(), denoisers=["transformer_2"], step_ratio_range=[0.0, 0.5]).train()
    with pytest.raises(
        ValueError, match="`num_gradient_steps=1` requires gradient in steps 3 to 3, .* Raise it, or train"
    ):
        make_trainer(tmp_path, tiny_wan_22(), denoisers=["transformer"], step_ratio_range=None, method="draft").train()
    with pytest.raises(ValueError, match=r"`denoisers` is \['unet'\], but `WanPipeline` denoises with"):
        make_trainer(tmp_path, tiny_wan_22(), denoisers=["unet"])
    whole = tiny_wan_22()
    whole.register_to_config(boundary_ratio=None)  # `transformer` makes all steps
    with pytest.raises(ValueError, match="`pipeline.transformer_2` is to be tuned, but makes none"):
        make_trainer(tmp_path, whole).train()
