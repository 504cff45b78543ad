"""ReFLTrainer on real tiny pipelines: what moves, what is equal however it is split, what resumes, what is refused."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import ModelCard
from new_process import run_python, run_together
from peft import LoHaConfig
from PIL import Image
from safetensors.torch import load_file
from tiny_refl import (
    PROMPTS,
    SIZES,
    make_trainer,
    pixel_reward,
    rows,
    run,
    tiny_img2img,
    tiny_sd,
    tiny_sd3,
    tiny_wan,
    trained_weights,
)
from tiny_refl import (
    lora as lora_config,
)
from tiny_vlms import random_image

from rewarddance_hf.alignment.monitor.callback import RewardDynamicsCallback
from rewarddance_hf.alignment.refl.arguments import ReFLTrainingArguments
from rewarddance_hf.alignment.refl.callbacks import ReFLCallback
from rewarddance_hf.alignment.refl.rows import seed_of
from rewarddance_hf.alignment.refl.weights import LORA_FILE


HELPER = Path(__file__).parents[1] / "tiny_refl.py"
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true"}
SGD = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 10.0}


def assert_equal(first, second, tolerance=0.0):
    """Every weight is equal, up to a difference relative to the largest weight of its tensor."""
    assert first.keys() == second.keys()
    for name in first:
        difference = (first[name] - second[name]).abs().max() / second[name].abs().max().clamp(min=1e-12)
        assert difference <= tolerance, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("make_pipeline", [tiny_sd3, tiny_sd, tiny_wan])
def test_the_adapter_moves_and_nothing_else(make_pipeline, tmp_path):
    """Every trained weight changes within two updates; all other weights of all components stay bit-equal."""
    pipeline = make_pipeline()
    trainer = make_trainer(tmp_path, pipeline)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    before = {(name, key): value.clone() for name, part in models.items() for key, value in part.state_dict().items()}
    trained = {id(parameter) for parameter in trainer.trained_parameters}
    trainer.train()
    for name, part in models.items():
        for key, value in part.state_dict(keep_vars=True).items():
            assert torch.equal(value, before[name, key]) != (id(value) in trained), (name, key)
    logs = trainer.state.log_history[-2]
    assert {"reward", "reward_std", "reward_saturated", "rewards/pixel_reward", "step_index"} <= logs.keys()
    assert logs["reward"] == pytest.approx(trainer.last_rewards.mean().item())
    assert 1 <= logs["step_index"] <= 3


def test_full_tuning_moves_the_whole_denoiser(tmp_path):
    """Without `peft_config` every weight that the prediction depends on is trained."""
    trainer = make_trainer(tmp_path, peft_config=None, learning_rate=1e-3, reward_transform="log")
    before = trained_weights(trainer)
    trainer.train()
    after = trained_weights(trainer)
    same = [name for name in after if torch.equal(after[name], before[name])]
    # The last block throws its text stream away, so that its queries decide nothing.
    assert same == ["transformer_blocks.1.attn.add_q_proj.weight", "transformer_blocks.1.attn.add_q_proj.bias"]


def plain_sd3_loss(pipeline, prompts, seeds, step, num_steps, guidance_scale):
    """ReFL on Stable Diffusion 3, written out: Euler steps without gradient, then one clean prediction with it."""
    with torch.no_grad():
        embeds = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, max_sequence_length=8, negative_prompt=[""] * len(prompts)
        )
    prompt_embeds = torch.cat([embeds[1], embeds[0]])
    pooled = torch.cat([embeds[3], embeds[2]])
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    pipeline.scheduler.set_timesteps(num_steps)
    sigmas, timesteps = pipeline.scheduler.sigmas, pipeline.scheduler.timesteps
    for index in range(step + 1):
        with torch.set_grad_enabled(index == step):
            velocity = pipeline.transformer(
                hidden_states=torch.cat([latents, latents]),
                timestep=timesteps[index].expand(2 * len(prompts)),
                encoder_hidden_states=prompt_embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
            without, conditioned = velocity.chunk(2)
            velocity = without + guidance_scale * (conditioned - without)
            end = sigmas[index + 1] if index < step else 0.0
            latents = latents + (end - sigmas[index]) * velocity
    decoded = pipeline.vae.decode(latents / 1.5 + 0.06, return_dict=False)[0]
    return -pixel_reward((decoded / 2 + 0.5).clamp(0, 1), prompts).mean()


def test_an_update_equals_one_written_out(tmp_path):
    """One SGD update is the gradient of minus the mean reward of the clean prediction at the drawn step."""
    trainer = make_trainer(tmp_path, max_steps=1, **SGD)
    before = trained_weights(trainer)
    draws = list(trainer._get_train_sampler())[:2]
    trainer.train()
    after = trained_weights(trainer)

    reference = make_trainer(tmp_path)
    loss = plain_sd3_loss(
        reference.pipeline,
        [rows()[row]["prompt"] for row, _ in draws],
        [seed_of(42, "latents", draw) for _, draw in draws],
        int(trainer.state.log_history[0]["step_index"]),
        4,
        3.0,
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, reference.trained_parameters)
    for (name, value), gradient in zip(after.items(), gradients, strict=True):
        torch.testing.assert_close(value - before[name], -10.0 * gradient, rtol=1e-3, atol=1e-6)


def test_accumulation_does_not_change_the_update(tmp_path):
    """One batch of 8 rows and four of 2 give the same weights, over the end of an epoch too."""
    weights = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **SGD
        )
        start_weights = trained_weights(trainer)
        trainer.train()
        weights.append(trained_weights(trainer))
        assert set(trainer.last_prompts) == set(PROMPTS)
        assert len(trainer.last_rewards) == len(trainer.last_prompts) == 8
    first, second, before = (
        torch.cat([value.flatten() for value in each.values()]) for each in (*weights, start_weights)
    )
    assert (first - before).norm() > 1e-3 * before.norm()
    assert (first - second).norm() < 1e-6 * second.norm()
    assert_equal(*weights, tolerance=1e-5)


@pytest.mark.parametrize("anew", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_equal_one(anew, tmp_path):
    """
    Two processes make the updates of one with twice the accumulation, and each knows all rewards, evaluations, records of
    the monitor and references, which are those of one.
    """
    settings = {"per_device_train_batch_size": 2, "max_steps": 2, "use_ema": True, "sample_steps": 1, "watches": True}
    settings |= SGD
    one = run(tmp_path / "one", gradient_accumulation_steps=2, **settings)
    command = [str(HELPER), str(tmp_path / "two"), json.dumps(settings)]
    if anew:  # ranks also hash strings differently: nothing may depend on the order of a set
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**ON_CPU, "OMP_NUM_THREADS": "1"}
        runs = [subprocess.run([*launch, *command], capture_output=True, text=True, env=environment, check=False)]
    else:
        runs = run_together(*command, env=ON_CPU)
    assert not any(done.returncode for done in runs), runs[-1].stderr[-3000:]
    for rank in range(2):
        two = torch.load(tmp_path / "two" / f"result-{rank}.pt", weights_only=False)
        assert_equal(two["weights"], one["weights"], tolerance=1e-5)
        torch.testing.assert_close(two["rewards"].sort()[0], one["rewards"].sort()[0], rtol=1e-5, atol=1e-6)
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert two["references in files"] == two["references in memory"] == one["references in memory"]
        for ours, theirs in zip(two["history"], one["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert (tmp_path / "two" / "samples" / "step-000002.png").exists()


def test_a_killed_run_resumes_exactly(tmp_path):
    """After SIGKILL in the middle of an epoch, resuming ends with the weights and averages of an uninterrupted run."""
    settings = {
        "max_steps": 5,
        "use_ema": True,
        "beta": 0.5,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "sample_steps": 3,
    }
    kill_at = 3 + seed_of(os.getpid()) % 3  # any update after the first checkpoint
    killed = run_python(HELPER, tmp_path / "killed", json.dumps({**settings, "kill_at": kill_at}), env=ON_CPU)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]

    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trained_weights(resumed), trained_weights(whole))
    for ours, theirs in zip(resumed.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)
    logs = [[entry.get("reward") for entry in trainer.state.log_history[:-1]] for trainer in (resumed, whole)]
    assert logs[0] == logs[1]


def test_resuming_passes_over_an_unfinished_checkpoint(tmp_path):
    """A checkpoint whose state was cut off by a kill is not taken for the newest one."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    shutil.rmtree(tmp_path / "checkpoint-3")
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trained_weights(resumed), trained_weights(whole))
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_run_is_not_whole_while_it_is_written_again(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **settings).train()
    optimizer = tmp_path / "checkpoint-1" / "optimizer.pt"
    optimizer.unlink()
    optimizer.mkdir()  # where writing breaks off
    with pytest.raises((RuntimeError, OSError)):
        make_trainer(tmp_path, **settings).train()
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("make_pipeline", [tiny_sd3, tiny_sd, tiny_wan])
def test_a_saved_adapter_draws_the_same_images(make_pipeline, tmp_path):
    """`load_lora_weights` on a fresh pipeline gives the trainer's samples, alpha and all."""
    trainer = make_trainer(tmp_path, make_pipeline(), learning_rate=0.1)
    before = trainer.sample(PROMPTS[:2], output_type="pt")
    trainer.train()
    trainer.save_model()
    seeds = [3, 4]
    samples = trainer.sample(PROMPTS[:2], seeds, output_type="pt")
    fresh = make_pipeline()
    fresh.load_lora_weights(tmp_path, weight_name=LORA_FILE)  # the name is optional where there is a network
    again = fresh(
        prompt=PROMPTS[:2],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
        **SIZES[type(fresh).__name__],
    )[0]
    torch.testing.assert_close(again, samples)
    assert (before - trainer.sample(PROMPTS[:2], output_type="pt")).abs().max() > 1e-3


def test_a_fully_tuned_denoiser_is_saved_in_the_layout_of_diffusers(tmp_path):
    """The whole denoiser loads with its class, holds the averaged weights, and resumes from the raw ones."""
    settings = {"peft_config": None, "learning_rate": 1e-2, "use_ema": True, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, max_steps=2, **settings)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    loaded = type(trainer.model).from_pretrained(tmp_path, subfolder="transformer")
    for ours, average in zip(loaded.parameters(), trainer.ema.shadow_params, strict=True):
        assert torch.equal(ours, average)
    raw = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2", subfolder="transformer")
    assert_equal(dict(raw.named_parameters()), trained_weights(trainer))
    assert any(not torch.equal(*pair) for pair in zip(raw.parameters(), loaded.parameters(), strict=True))
    fresh = make_trainer(tmp_path, max_steps=3, **settings)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fresh.state.global_step == 3
    assert 'subfolder="transformer"' in (tmp_path / "README.md").read_text()


def test_samples_come_from_the_average_and_leave_training_alone(tmp_path):
    """With `use_ema`, samples and files show the average; sampling in between does not change the weights."""
    plain = make_trainer(tmp_path / "plain", max_steps=3, use_ema=True)
    plain.train()
    watched = make_trainer(tmp_path / "watched", max_steps=3, use_ema=True, sample_steps=1, sample_prompts=PROMPTS[:3])
    watched.train()
    assert_equal(trained_weights(watched), trained_weights(plain))
    grids = sorted((tmp_path / "watched" / "samples").iterdir())
    assert [grid.name for grid in grids] == [f"step-{step:06d}.png" for step in range(4)]
    assert Image.open(grids[0]).size == (16, 16)  # three images of 8 pixels in two rows

    averaged = watched.sample(PROMPTS[:2], output_type="pt")
    watched.ema.copy_to(watched.trained_parameters)
    watched.ema, average = None, watched.ema
    torch.testing.assert_close(watched.sample(PROMPTS[:2], output_type="pt"), averaged, rtol=0, atol=0)
    watched.ema = average
    watched.save_model()
    saved = load_file(tmp_path / "watched" / "pytorch_lora_weights.safetensors")
    assert sorted(float(value.double().sum()) for value in saved.values()) == pytest.approx(
        sorted(float(value.double().sum()) for value in average.shadow_params)
    )


def test_sample_gives_each_prompt_its_seed(tmp_path):
    """A sample depends on its prompt and seed, not on its batch; bad seeds are refused."""
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
    together = trainer.sample(PROMPTS[:3], [5, 6, 7], output_type="pt")
    alone = trainer.sample(PROMPTS[2:3], [7], output_type="pt")
    torch.testing.assert_close(together[2:], alone, rtol=1e-5, atol=1e-6)
    images = trainer.sample(PROMPTS[:3])
    assert [image.size for image in images] == [(8, 8)] * 3
    with pytest.raises(ValueError, match="`seeds` has 1 entries, but there are 3 prompts"):
        trainer.sample(PROMPTS[:3], [1])


@pytest.mark.parametrize("together", [True, False])
def test_each_row_is_sampled_from_its_own_condition(together, tmp_path):
    """
    The condition of a row reaches pipeline and reward alike, in training, evaluation and samples, and all rows of an update
    share the drawn step. All rows used to be generated from the one image of `pipeline_kwargs`.
    """
    pipeline = tiny_img2img()
    frames = [random_image(i, 16, 16) for i in range(3)]
    rows = [{"prompt": prompt, "condition": frame} for prompt, frame in zip(PROMPTS, frames, strict=False)]
    judged, steps = [], []

    def reward(images, prompts, conditions):
        judged.append((images.detach().clone(), list(prompts), conditions))
        return pixel_reward(images, prompts)

    kwargs = {"strength": 0.5}  # the last half of the steps
    monitor = RewardDynamicsCallback(reward, rows, eval_steps=1, num_samples=1, plot=False)
    trainer = make_trainer(
        tmp_path,
        pipeline,
        reward=reward,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[monitor],
        pipeline_kwargs=kwargs,
        max_steps=1,
        sample_steps=1,
    )
    assert trainer.callback_handler.callbacks[-1].conditions == frames
    draw_step = trainer.gradient_callback._draw_step
    trainer.gradient_callback._draw_step = lambda *args: steps.append(draw_step(*args)) or steps[-1]
    trainer.condition_trial.holds = together
    trainer.train()
    calls = 1 if together else 2  # of an update, and as many before training
    assert len(steps) == 2 * calls
    assert len({*steps[calls:]}) == 1
    judged.clear()
    trainer.evaluate()
    seen = {
        prompt: (image, frame) for images, *rest in judged for image, prompt, frame in zip(images, *rest, strict=True)
    }
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt", **kwargs}
    for index, row in enumerate(rows):
        generator = torch.Generator().manual_seed(seed_of(42, "eval", index))
        alone = pipeline(row["prompt"], image=row["condition"], generator=generator, **settings)[0][0]
        torch.testing.assert_close(seen[row["prompt"]][0], alone)
        assert seen[row["prompt"]][1] == row["condition"]
    assert (seen[PROMPTS[0]][0] - seen[PROMPTS[1]][0]).abs().max() > 1e-3

    with pytest.raises(ValueError, match="`StableDiffusion3Pipeline` takes no `image` to give it to"):
        make_trainer(tmp_path, train_dataset=rows)
    with pytest.raises(ValueError, match="`image` was given as an argument of the pipeline, but `train_dataset`"):
        make_trainer(tmp_path, tiny_img2img(), train_dataset=rows, pipeline_kwargs={"image": frames[0]})


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_regularizer_is_the_distance_of_outputs(full, tmp_path):
    """`beta` adds the mean squared difference of both denoisers' outputs in the step with gradient."""
    trainer = make_trainer(tmp_path, beta=0.7, peft_config=None if full else "lora")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.trained_parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    calls = []
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    columns = {"prompt": PROMPTS[:2], "draw": [0, 1]}
    loss, record = trainer._loss(columns)
    assert len(calls) == 1
    untouched = tiny_sd3().transformer
    with torch.no_grad():
        base_output = untouched(**calls[0])[0]
    distance = F.mse_loss(trainer.model(**calls[0])[0], base_output)
    assert distance > 1e-4
    assert record["base_distance"] == pytest.approx(distance.item(), rel=1e-5)
    trainer.base_distance, measured = None, trainer.base_distance
    plain, _ = trainer._loss(columns)
    trainer.base_distance = measured
    assert loss.item() == pytest.approx((plain + 0.7 * distance).item(), rel=1e-6)
    expected = torch.autograd.grad(plain + 0.7 * distance, trainer.trained_parameters)
    found = torch.autograd.grad(loss, trainer.trained_parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_strong_regularizer_holds_the_generator(tmp_path):
    """The distance to the un-tuned denoiser stays smaller with a large `beta`."""
    distances = []
    for beta in (1e-6, 100.0):
        trainer = make_trainer(tmp_path, beta=beta, max_steps=4, learning_rate=4e-2)
        trainer.train()
        distances.append(trainer.state.log_history[-2]["base_distance"])
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(dropout, tmp_path):
    """Activations computed again give the same update, also beside the regularizer, and with the same dropout."""
    weights = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path,
            gradient_checkpointing=checkpointing,
            beta=0.1,
            peft_config=lora_config(lora_dropout=dropout),
            **SGD,
        )
        assert trainer.model.is_gradient_checkpointing == checkpointing
        trainer.train()
        weights.append(trained_weights(trainer))
    assert_equal(*weights, tolerance=1e-6)


def test_mixed_precision_keeps_the_gradient(tmp_path):
    """
    In bf16 the adapter stays in float32 and gets about the gradient of float32.

    Autocast caches its casts of weights; one made in a step without gradient would cut the gradient of the next.
    """
    gradients = {}
    for bf16 in (False, True):
        pipeline = tiny_sd3()
        if bf16:
            pipeline.to(torch.bfloat16)
        trainer = make_trainer(tmp_path, pipeline, bf16=bf16)
        loss, _ = trainer._loss({"prompt": PROMPTS[:2], "draw": [0, 1]})
        assert {parameter.dtype for parameter in trainer.trained_parameters} == {torch.float32}
        gradients[bf16] = torch.cat(
            [gradient.flatten() for gradient in torch.autograd.grad(loss, trainer.trained_parameters)]
        )
    assert F.cosine_similarity(gradients[False], gradients[True], dim=0) > 0.95


def test_draft_and_its_options_reach_the_callback(tmp_path):
    """`method="draft"` keeps gradient in the last steps; the VAE's memory options do not change the update."""
    weights = []
    for options in ({}, {"vae_checkpointing": True, "vae_slicing": True}):
        trainer = make_trainer(
            tmp_path, method="draft", step_ratio_range=None, num_gradient_steps=2, max_steps=1, **options, **SGD
        )
        trainer.train()
        assert trainer.state.log_history[0]["step_index"] == 2
        weights.append(trained_weights(trainer))
    assert_equal(*weights, tolerance=1e-5)


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({}, lambda reward: reward),
        ({"reward_transform": "log"}, torch.log),
        ({"reward_transform": "log_odds"}, torch.logit),
        ({"reward_clip": 0.1}, lambda reward: reward.clamp(max=0.1)),
    ],
)
def test_what_is_maximised(settings, objective, tmp_path):
    """The loss is minus the mean of reward, logarithm or log-odds; a clipped reward gives no gradient above."""
    trainer = make_trainer(tmp_path, **settings)
    loss, record = trainer._loss({"prompt": PROMPTS[:2], "draw": [0, 1]})
    rewards = torch.tensor(record["rewards"]["reward"])
    assert loss.item() == pytest.approx(-objective(rewards).mean().item(), rel=1e-5)


class Monitor(ReFLCallback):
    """A callback by the trainer's contract: told of the run and of every update."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.seen = []

    def on_update(self, trainer, logs):
        self.seen.append({**logs, "update": trainer.state.global_step, "all": trainer.last_rewards.clone()})
        if trainer.state.global_step == self.stop_at:
            trainer.control.should_training_stop = True


def test_a_monitor_is_told_of_every_update(tmp_path):
    """`on_update` comes once per update with the values of that update, whatever `logging_steps`, and may stop the run."""
    monitor = Monitor(stop_at=5)
    trainer = make_trainer(tmp_path, max_steps=9, logging_steps=3, callbacks=[monitor])
    trainer.train()
    assert [seen["update"] for seen in monitor.seen] == [1, 2, 3, 4, 5]
    assert trainer.state.global_step == 5
    for seen in monitor.seen:
        assert seen["reward"] == pytest.approx(seen["all"].mean().item())
        assert seen["reward_std"] == pytest.approx(seen["all"].std(correction=0).item())
        assert len(seen["all"]) == 2
    assert len([entry for entry in trainer.state.log_history if "reward" in entry]) == 1
    assert set(trainer.last_prompts) <= set(PROMPTS)


def test_every_row_is_seen_once_an_epoch(tmp_path):
    """Epochs differ in order, and what fills the last update up gets another noise."""
    trainer = make_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    sampler = trainer._get_train_sampler()
    epochs = []
    for sampler.epoch in range(2):
        epochs.append(list(sampler))
    assert len(sampler) == 8
    for epoch in epochs:
        assert sorted(row for row, _ in epoch[:5]) == list(range(5))
    assert [row for row, _ in epochs[0]] != [row for row, _ in epochs[1]]
    draws = [draw for epoch in epochs for _, draw in epoch]
    assert len(set(draws)) == 16


def test_several_epochs_without_max_steps(tmp_path):
    """`num_train_epochs` counts passes over the rows."""
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.epoch == 2.0


def test_evaluation_and_best_model(tmp_path):
    """Held-out rewards come from fixed noise; the best checkpoint is loaded at the end."""
    held_out = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="reward",
        greater_is_better=True,
        per_device_eval_batch_size=2,
        learning_rate=0.1,
    )
    trainer.train()
    measured = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(measured) == 4
    seeds = [seed_of(42, "eval", index) for index in range(3)]
    images = trainer.sample(PROMPTS[:3], seeds, output_type="pt")
    assert pixel_reward(images, PROMPTS[:3]).mean().item() == pytest.approx(max(measured), rel=1e-5)
    assert len(set(measured)) == 4


def test_the_card_says_what_was_done(tmp_path):
    """Metadata parse; adapter, rewards, figures and images are named."""
    trainer = make_trainer(tmp_path, max_steps=3, sample_steps=3, reward={"pixels": pixel_reward})
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "diffusers"
    assert {"refl", "lora"} <= set(card.data.tags)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert f"| {rewards[0]:.3f} | {rewards[-1]:.3f} |" in card.text
    assert "pixels x 1" in card.text
    assert "rank 2, alpha 4" in card.text
    assert "samples/step-000003.png" in card.text


def test_grids_reach_tensorboard(tmp_path):
    """The same image as on disk is written to TensorBoard, which can also show the denoiser's configuration."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, sample_steps=1, report_to="tensorboard")
    trainer.train()
    folder = next(path.parent for path in tmp_path.rglob("events.out*"))
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 1, 2]
    assert "train/reward" in events.Tags()["scalars"]


# Bad input


def no_gradient(images, prompts):
    return pixel_reward(images.detach(), prompts)


def not_finite(images, prompts):
    return pixel_reward(images, prompts) * torch.tensor([1.0, math.nan])


class Pairwise:
    is_pairwise = True

    def __call__(self, images, prompts, references):
        return pixel_reward(images, prompts)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (not_finite, ValueError, r"'not_finite' is nan for 1 of 2 samples, the first of the prompt"),
        (lambda images, prompts: pixel_reward(images, prompts).mean(), ValueError, r"shape \(\) for 2 images"),
        (lambda images, prompts: pixel_reward(images, prompts)[:, None], ValueError, r"shape \(2, 1\) for 2 images"),
        (lambda images, prompts: [0.5, 0.5], TypeError, "carries no gradient"),
        (lambda images, prompts: ["good", "bad"], TypeError, "returned a `list`, but must return a tensor"),
        (no_gradient, ValueError, "'no_gradient' carries no gradient"),
        (lambda images, prompts: 0 * pixel_reward(images, prompts), ValueError, "No gradient of the reward reaches"),
    ],
)
def test_rewards_that_do_not_fit_are_known_before_training(reward, error, message, tmp_path):
    """The first rows are tried before anything changes."""
    trainer = make_trainer(tmp_path, reward=reward)
    with pytest.raises(error, match=message):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward": []}, ValueError, "`reward` is empty"),
        ({"reward": "judge"}, TypeError, "is a `str`, but must be callable"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "has 2 entries, but there are 1 rewards"),
        ({"reward_weights": [0.0]}, ValueError, "at least one weight must differ from 0"),
        ({"train_dataset": []}, ValueError, "`train_dataset` is empty"),
        ({"train_dataset": [{"caption": "a"}]}, ValueError, r"lacks `prompt`; it has \['caption'\]"),
        ({"train_dataset": [{"prompt": "a"}, {"prompt": None}]}, TypeError, r"train_dataset\[1\]` is a `NoneType`"),
        ({"train_dataset": (row for row in rows())}, TypeError, "must have a length and rows"),
        ({"reward": Pairwise()}, ValueError, r"`references` of `train_dataset\[0\]` is missing"),
        ({"peft_config": LoHaConfig(target_modules=["to_q"])}, TypeError, "is a `LoHaConfig`, but must be a plain"),
        ({"peft_config": lora_config(target_modules=["nothing"])}, ValueError, "Name some of its linear layers"),
        ({"step_ratio_range": [0.5]}, ValueError, "must have two entries"),
        ({"sample_steps": 1, "sample_prompts": []}, ValueError, "there is no prompt to sample"),
        ({"beta": -1.0}, ValueError, "`beta` is -1.0"),
        ({"reward_transform": "square"}, ValueError, "`reward_transform` is 'square'"),
        ({"pipeline_kwargs": {"generator": 1}}, ValueError, r"`pipeline_kwargs` has \['generator'\]"),
        ({"ema_decay": 1.0}, ValueError, "`ema_decay` is 1.0"),
        ({"sample_steps": -1}, ValueError, "`sample_steps` is -1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, error, message, tmp_path):
    """What can be seen without sampling is refused when the trainer is made."""
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **changes)


def test_columns_of_a_dataset_are_checked(tmp_path):
    """Prompts and references of a `datasets.Dataset` are checked in all rows, without decoding images."""
    image = Image.new("RGB", (8, 8))
    features = datasets.Features({"prompt": datasets.Value("string"), "references": datasets.List(datasets.Image())})

    def dataset(references):
        prompts = PROMPTS[: len(references)]
        return datasets.Dataset.from_dict({"prompt": prompts, "references": references}, features=features)

    make_trainer(tmp_path, train_dataset=dataset([[image], [image, image]]), reward=Pairwise())
    for missing in ([], None):
        with pytest.raises(ValueError, match=r"`references` of `train_dataset\[1\]` is missing or empty"):
            make_trainer(tmp_path, train_dataset=dataset([[image], missing]), reward=Pairwise())
    with pytest.raises(ValueError, match="lacks the column `references`"):
        make_trainer(tmp_path, train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}), reward=Pairwise())
    with pytest.raises(TypeError, match=r"`prompt` of `train_dataset\[1\]` is a `NoneType`"):
        make_trainer(tmp_path, train_dataset=datasets.Dataset.from_dict({"prompt": ["a", None]}))
    with pytest.raises(ValueError, match=r"lacks the column `prompt`; it has \['text'\]"):
        make_trainer(tmp_path, train_dataset=datasets.Dataset.from_dict({"text": PROMPTS}))
    single = datasets.Dataset.from_dict({"prompt": PROMPTS[:1], "references": ["a.png"]})
    with pytest.raises(TypeError, match="`references` of `train_dataset` is a column of"):
        make_trainer(tmp_path, train_dataset=single, reward=Pairwise())


def test_pipelines_that_cannot_be_tuned_are_refused(tmp_path):
    """No LoRA support, an adapter that is there already, and half precision in full."""
    no_lora = tiny_sd3()
    no_lora.transformer = torch.nn.Linear(2, 2)
    no_lora.transformer.dtype, no_lora.transformer.config = torch.float32, {}
    with pytest.raises(ValueError, match="with `Linear` does not support LoRA"):
        make_trainer(tmp_path, no_lora)
    adapted = tiny_sd3()
    adapted.transformer.add_adapter(lora_config())
    with pytest.raises(ValueError, match="Merge them first"):
        make_trainer(tmp_path, adapted)
    half = tiny_sd3().to(torch.bfloat16)
    with pytest.raises(ValueError, match="Set `bf16=True`"):
        make_trainer(tmp_path, half, peft_config=None)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharding_is_refused(engine, tmp_path):
    """FSDP would shard a denoiser that the pipeline calls without its wrapper."""
    with pytest.raises(NotImplementedError, match="was asked for, but the pipeline calls"):
        ReFLTrainingArguments(str(tmp_path), use_cpu=True, **{engine: True})


def test_nothing_is_lost_when_a_reward_fails_late(tmp_path):
    """A reward that turns NaN in the third update leaves a checkpoint of the second, from which a mended run goes on."""
    settings = {"max_steps": 4, "use_ema": True}
    calls = []

    def fails_late(images, prompts):
        calls.append(len(images))
        reward = pixel_reward(images, prompts)
        return reward * math.nan if len(calls) == 4 else reward  # the first call is the trial

    trainer = make_trainer(tmp_path / "failed", reward=fails_late, **settings)
    with pytest.raises(ValueError, match="'fails_late' is nan for 2 of 2 samples"):
        trainer.train()
    assert [path.name for path in (tmp_path / "failed").iterdir()] == ["checkpoint-2"]

    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "failed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(trained_weights(resumed), trained_weights(whole))


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(tmp_path):
    """A finite reward with an infinite gradient stops the run before the optimizer's step."""
    calls = []

    def infinite_slope(images, prompts):
        calls.append(1)
        reward = pixel_reward(images, prompts)
        if len(calls) < 3:
            return reward
        return reward + (reward - reward.detach()).clamp(min=0).sqrt()

    trainer = make_trainer(tmp_path, reward=infinite_slope)
    with pytest.raises(ValueError, match="The gradient of update 2 is NaN or infinite"):
        trainer.train()
    assert all(weight.isfinite().all() for weight in trained_weights(trainer).values())
    assert (tmp_path / "checkpoint-1" / "pytorch_lora_weights.safetensors").exists()


def test_checkpoints_of_another_run_are_refused(tmp_path):
    """Another rank, full tuning, or no average: what is missing is named before training starts."""
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="differs from the one that is trained in 16 weights"):
        make_trainer(tmp_path, peft_config=lora_config(r=3)).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="has no folder `transformer` with a whole denoiser"):
        make_trainer(tmp_path, peft_config=None).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="has no file ema.pt"):
        make_trainer(tmp_path, use_ema=True).train(resume_from_checkpoint=checkpoint)


def test_images_beyond_their_range_are_refused(tmp_path):
    """A pipeline that leaves what its VAE gives, in [-1, 1], is refused before anything is tuned."""
    pipeline = tiny_sd3()
    pipeline.image_processor = VaeImageProcessor(do_normalize=False)
    with pytest.raises(
        ValueError, match=r"`StableDiffusion3Pipeline` gave tensors .* but rewards take images in \[0, 1\]"
    ):
        make_trainer(tmp_path, pipeline=pipeline).train()
