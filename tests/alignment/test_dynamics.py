"""The monitor of reward hacking: numbers by hand, alarms for hacked runs, silence for healthy ones, nothing lost by a stop."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_refl import PROMPTS, make_trainer, pixel_reward, tiny_sd3, trained_weights
from tiny_vlms import random_image
from transformers import TrainerCallback, TrainingArguments

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.alignment.monitor.callback import RewardDynamicsCallback
from rewarddance_hf.alignment.monitor.dynamics import RewardDynamics
from rewarddance_hf.alignment.monitor.statistics import sample_diversity, student_quantile
from rewarddance_hf.alignment.refl.callbacks import ReFLCallback


HELD_OUT = ["a blue circle", "two red square", "a green circle", "a red square"]


def run(monitor, tuned, held_out, num_steps=100, every=10, batch=16, num_prompts=200, noise=0.1, seed=0):
    """Feed a run whose mean tuned and held-out rewards are functions of the share of the run that is over."""
    rng = np.random.default_rng(seed)
    levels = rng.uniform(-0.3, 0.3, num_prompts)  # hard and easy prompts
    for step in range(num_steps + 1):
        if step:
            monitor.update(step, np.clip(rng.normal(tuned(step / num_steps), 0.25, batch), 0.02, 0.98))
        if step % every == 0:
            values = held_out(step / num_steps) + levels + noise * rng.normal(size=num_prompts)
            monitor.update(step, held_out=(values > 0.5).astype(float))
    return monitor


def kinds(monitor):
    return {warning.kind for warning in monitor.warnings}


class TestStatistics:
    def test_window(self):
        """Mean, standard deviation and saturated share are those of all rewards of the last steps."""
        rng = np.random.default_rng(0)
        steps = [rng.uniform(size=size) for size in (3, 5, 4, 2, 6)]
        monitor = RewardDynamics(window=3)
        for step, rewards in enumerate(steps, 1):
            monitor.update(step, torch.tensor(rewards))
            pooled = np.concatenate(steps[max(0, step - 3) : step])
            record = monitor.history[-1]
            assert record["reward"] == pytest.approx(rewards.mean())
            assert record["reward_mean"] == pytest.approx(pooled.mean())
            assert record["reward_std"] == pytest.approx(pooled.std(ddof=1))
            assert record["saturated"] == pytest.approx(((pooled < 0.01) | (pooled > 0.99)).mean())

    def test_samples_of_one_prompt(self):
        """The standard deviation between samples of a prompt leaves out how prompts differ."""
        rng = np.random.default_rng(0)
        monitor = RewardDynamics(window=2)
        squares = 0.0
        for step in (1, 2):
            rewards = {prompt: level + 0.01 * rng.normal(size=3) for prompt, level in (("a", 0.2), ("b", 0.8))}
            monitor.update(step, np.concatenate([*rewards.values(), [0.5]]), ["a"] * 3 + ["b"] * 3 + ["c"])
            squares += sum(((values - values.mean()) ** 2).sum() for values in rewards.values())
        assert monitor.history[-1]["prompt_std"] == pytest.approx(math.sqrt(squares / 8))
        assert monitor.history[-1]["reward_std"] > 0.2

    def test_changes_are_paired(self):
        """Changes and their errors are those of prompts, in standard deviations of the start; samples are averaged."""
        rng = np.random.default_rng(0)
        first = rng.uniform(size=(50, 2))
        second = first + 0.1 + 0.01 * rng.normal(size=(50, 2))
        monitor = RewardDynamics()
        monitor.update(0, held_out=torch.tensor(first))
        monitor.update(10, held_out=torch.tensor(second))
        record = monitor.history[-1]
        scale, differences = first.mean(1).std(ddof=1), (second - first).mean(1)
        assert record["held_out"] == pytest.approx(second.mean())
        assert record["held_out_error"] == pytest.approx(second.mean(1).std(ddof=1) / math.sqrt(50))
        assert record["held_out_change"] == pytest.approx(differences.mean() / scale)
        assert record["held_out_change_error"] == pytest.approx(differences.std(ddof=1) / math.sqrt(50) / scale)
        assert record["held_out_change_error"] < record["held_out_error"] / 5
        assert monitor.best_step == 10
        assert monitor.is_best

    @pytest.mark.parametrize(
        ("probability", "freedom", "value"),
        [(0.95, 10, 1.8125), (0.995, 10, 3.1693), (0.995, 30, 2.7500), (0.999, 30, 3.3852), (0.995, 120, 2.6174)],
    )
    def test_quantiles(self, probability, freedom, value):
        """Student's quantiles as printed in tables."""
        assert student_quantile(probability, freedom) == pytest.approx(value, rel=2e-2 if freedom == 10 else 2e-3)

    def test_diversity(self):
        """Mean distance of pairs, for images, tensors, clips and features."""
        images = [random_image(i, 8, 8) for i in range(3)]
        arrays = [np.asarray(image).astype(float) / 255 for image in images]
        pairs = [np.sqrt(((arrays[i] - arrays[j]) ** 2).mean()) for i, j in ((0, 1), (0, 2), (1, 2))]
        wanted = pytest.approx([np.mean(pairs), 0.0], rel=1e-6)
        assert sample_diversity([images, images[:1] * 2]).tolist() == wanted
        tensors = torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2)
        assert sample_diversity([tensors, tensors[:1].repeat(2, 1, 1, 1)]).tolist() == wanted
        clips = [[image, image] for image in images]
        assert sample_diversity([clips]).tolist() == pytest.approx([np.mean(pairs)], rel=1e-6)
        got = sample_diversity([[1.0, 4.0]], features=lambda group: torch.tensor(group)[:, None])
        assert got.tolist() == [3.0]
        with pytest.raises(ValueError, match=r"`samples\[1\]` has 1 samples"):
            sample_diversity([images, images[:1]])


class TestVerdicts:
    @pytest.mark.parametrize("seed", range(5))
    def test_hacking_is_seen_before_much_is_lost(self, seed):
        """The tuned reward rises for good, the held-out one rises a little and then falls: seen early, with its figures."""
        monitor, arguments = RewardDynamics(window=20), {"num_steps": 200, "num_prompts": 500, "seed": seed}
        run(monitor, lambda t: 0.3 + 0.5 * t, lambda t: 0.5 + 0.25 * min(t, 0.2) - 0.4 * max(0, t - 0.2), **arguments)
        warning = monitor.warnings[0]
        held_out = {record["step"]: record["held_out"] for record in monitor.history if "held_out" in record}
        assert held_out[warning.step] > max(held_out.values()) - 0.12
        assert "held_out_falls" in kinds(monitor)
        fall = next(warning for warning in monitor.warnings if warning.kind == "held_out_falls")
        assert fall.value > fall.threshold > 0
        assert f"below its best of {max(held_out.values()):.3g} at step {monitor.best_step} by" in fall.message
        assert "while the tuned reward rose from" in fall.message
        assert fall.message in monitor.verdict

    @pytest.mark.parametrize("seed", range(3))
    def test_reward_that_nothing_else_sees(self, seed):
        """The tuned reward rises and the held-out one stays: seen, although nothing falls."""
        monitor = run(RewardDynamics(window=20), lambda t: 0.3 + 0.5 * t, lambda t: 0.5, num_prompts=500, seed=seed)
        assert kinds(monitor) == {"held_out_lags"}
        assert monitor.history[-1]["gap"] > 1

    @pytest.mark.parametrize(("slope", "wanted"), [(0.0, {"held_out_lags"}), (0.6, set())])
    def test_both_rewards_of_the_same_samples(self, slope, wanted):
        """The rise of the tuned reward is that of the held-out samples if it is told, and seen although training is noisy."""
        rng = np.random.default_rng(0)
        monitor = RewardDynamics()
        levels = rng.uniform(size=300)
        for step in range(0, 60, 10):
            monitor.update(step, rng.uniform(size=4))
            tuned = levels + 0.005 * step + 0.01 * rng.normal(size=300)
            held_out = levels + slope * 0.005 * step + 0.05 * rng.normal(size=300)
            if step == 0:
                first = tuned
            monitor.update(step, held_out=held_out, tuned=tuned)
        assert kinds(monitor) == wanted
        changes = (tuned - first) / first.std(ddof=1)
        assert monitor.history[-1]["tuned_change"] == pytest.approx(changes.mean())
        assert monitor.history[-1]["gap"] == pytest.approx(changes.mean() - monitor.history[-1]["held_out_change"])

    def test_healthy_runs_are_silent(self):
        """Runs that rise, level off or do nothing give no warning, however noisy: at most 1 of 30."""
        shapes = [
            (lambda t: 0.4 + 0.3 * t, lambda t: 0.5 + 0.2 * t),
            (lambda t: 0.4 + 0.3 * min(1, 3 * t), lambda t: 0.45 + 0.15 * min(1, 3 * t)),
            (lambda t: 0.5, lambda t: 0.5),
        ]
        warned = [
            run(
                RewardDynamics(window=20), *shape, num_steps=150, num_prompts=prompts, noise=0.3, batch=4, seed=seed
            ).verdict
            for shape in shapes
            for prompts in (20, 200)
            for seed in range(5)
        ]
        assert sum(verdict != "No sign of reward hacking in 150 steps." for verdict in warned) <= 1

    def test_fall_of_both_is_told_apart(self):
        """If the tuned reward falls as well, the message says so."""
        monitor = run(RewardDynamics(window=20), lambda t: 0.8 - 0.5 * t, lambda t: 0.7 - 0.5 * t)
        assert "while the tuned reward fell from" in monitor.verdict

    def test_small_falls_do_not_matter(self):
        """A fall beyond noise, but below `min_drop`, is let pass."""
        levels = np.linspace(0, 1, 100)
        for drop, wanted in ((0.01, set()), (0.02, {"held_out_falls"})):
            monitor = RewardDynamics(min_drop=0.05)
            monitor.update(0, held_out=levels)
            monitor.update(1, held_out=levels - drop)
            assert kinds(monitor) == wanted

    def test_collapse(self):
        """A standard deviation or a diversity far below the start's is seen once, and again after it had gone."""
        rng = np.random.default_rng(0)
        monitor = RewardDynamics(window=5, sample_size=32)
        diversity = rng.uniform(0.1, 0.3, 30)
        for step in range(1, 61):
            std = 0.02 if 20 < step <= 30 or step > 45 else 0.2
            monitor.update(step, rng.normal(0.5, std, 16))
            if step % 10 == 0:
                monitor.update(step, diversity=diversity * (0.3 if step > 40 else 0.8))
        seen = [(warning.kind, warning.step) for warning in monitor.warnings]
        assert seen == [("std_collapsed", 25), ("std_collapsed", 50), ("diversity_collapsed", 50)]
        assert monitor.warnings[0].value == monitor.history[26]["reward_std"] < monitor.warnings[0].threshold

    def test_saturation(self):
        """Probabilities near their ends are counted; rewards without ends do not saturate."""
        for scale, wanted in ((1.0, {"saturated"}), (3.0, set())):
            monitor = RewardDynamics(window=10)
            for step in range(1, 21):
                monitor.update(step, scale * torch.tensor([0.995] * 12 + [0.5] * 4))
            assert kinds(monitor) == wanted
            assert ("75 % of the rewards" in monitor.verdict) == bool(wanted)


class TestStateAndPlot:
    def test_state(self):
        """A run that goes on from a state, by way of JSON, gives the same records and warnings."""
        whole, first = (RewardDynamics(window=20) for _ in range(2))
        arguments = (lambda t: 0.3 + 0.5 * t, lambda t: 0.5 - 0.3 * t)
        run(whole, *arguments)
        cut = next(i for i, record in enumerate(whole.history) if record["step"] == 55)

        class Stop(Exception):
            pass

        update = first.update

        def stopping(step, *args, **kwargs):
            if len(first.history) == cut:
                raise Stop("here")
            return update(step, *args, **kwargs)

        first.update = stopping
        with pytest.raises(Stop, match="here"):
            run(first, *arguments)
        second = RewardDynamics(window=20)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        update = second.update
        second.update = lambda step, *args, **kwargs: update(step, *args, **kwargs) if skipped() else None
        calls = iter(range(1000))
        skipped = lambda: next(calls) >= cut  # noqa: E731
        run(second, *arguments)
        assert second.history == whole.history
        assert second.warnings == whole.warnings
        assert second.state_dict() == whole.state_dict()

    def test_plot(self, tmp_path):
        """Curve, band, bubbles, held-out curve and warnings are drawn with the numbers of the history."""
        monitor = run(RewardDynamics(window=20), lambda t: 0.3 + 0.5 * t, lambda t: 0.6 - 0.4 * t)
        monitor.update(100, diversity=[0.1, 0.2])
        figure = monitor.plot()
        reward, held_out, shares = figure.axes
        means = [record["reward_mean"] for record in monitor.history if "reward_mean" in record]
        assert reward.lines[1].get_ydata().tolist() == means
        band, bubbles = reward.collections
        assert len(band.get_paths()) == 1
        assert len(bubbles.get_offsets()) == 12
        last = monitor.history[-3]["reward_std"] if "reward_std" in monitor.history[-3] else None
        stds = [record["reward_std"] for record in monitor.history if "reward_std" in record]
        assert last is None or last == stds[-1]
        assert bubbles.get_sizes()[-1] == pytest.approx(500 * (stds[-1] / max(stds)) ** 2)
        assert held_out.lines[0].get_ydata().tolist() == [
            record["held_out"] for record in monitor.history if "held_out" in record
        ]
        assert {text.get_text() for text in reward.texts} >= {"held-out reward falls"}
        assert sum(line.get_linestyle() == "--" for line in shares.lines) == len(monitor.warnings)
        figure.savefig(tmp_path / "plot.png")
        with pytest.raises(ValueError, match="The history is empty"):
            RewardDynamics().plot()

    def test_wrong_input(self):
        """What makes no sense is refused."""
        for arguments, match in [
            ({"window": 1}, "`window` is 1"),
            ({"significance": 1.0}, "`significance` is 1.0"),
            ({"min_transfer": 2.0}, "`min_transfer` is 2.0"),
            ({"saturation": 0.5}, "`saturation` is 0.5"),
        ]:
            with pytest.raises(ValueError, match=match):
                RewardDynamics(**arguments)
        monitor = RewardDynamics()
        monitor.update(3, [0.1, 0.2], held_out=[0.0, 1.0, 0.5])
        for arguments, match in [
            ({"step": 2, "rewards": [0.1]}, "`step` is 2, but the last one was 3"),
            ({"step": 4, "rewards": [0.1, math.nan]}, "`rewards` has 1 of 2 values that are NaN"),
            ({"step": 4, "rewards": [[0.1]]}, r"`rewards` has shape \(1, 1\)"),
            ({"step": 4, "rewards": [0.1], "prompts": ["a", "b"]}, "`prompts` has 2 entries for 1 rewards"),
            ({"step": 4, "held_out": [0.0, 1.0]}, "`held_out` is about 2 prompts, but .* about 3"),
            (
                {"step": 4, "held_out": [1.0, 0.0, 0.5], "tuned": [1.0, 0.0]},
                "`tuned` is about 2 prompts, but .* about 3",
            ),
            ({"step": 4, "tuned": [1.0, 0.0, 0.5]}, "`tuned` was given without `held_out`"),
            ({"step": 4, "held_out": [1.0]}, "`held_out` has the value of one prompt"),
        ]:
            with pytest.raises(ValueError, match=match):
                monitor.update(**arguments)


def opposite(images, prompts):
    """A held-out reward that falls as the tuned one rises."""
    return 1 - pixel_reward(images, prompts)


class Rewards(ReFLCallback):
    """Remember the rewards of each update."""

    def __init__(self):
        self.rewards = []

    def on_update(self, trainer, logs):
        self.rewards.append(trainer.last_rewards.tolist())


class TestCallback:
    def test_run_is_watched_and_left_alone(self, tmp_path):
        """
        Weights and logs of training are those of a run without it; the monitor's log has each update and evaluation; the
        plot is there. Updates with an evaluation used to be missing in the trainer's log.
        """
        plain = make_trainer(tmp_path / "plain", max_steps=5)
        plain.train()
        monitor, rewards = RewardDynamicsCallback(pixel_reward, HELD_OUT, eval_steps=2), Rewards()
        trainer = make_trainer(tmp_path / "watched", max_steps=5, callbacks=[monitor, rewards])
        trainer.train()
        for name, weights in trained_weights(plain).items():
            assert torch.equal(weights, trained_weights(trainer)[name])
        losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (plain, trainer)]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 5
        history = monitor.dynamics.history
        assert [record["step"] for record in history] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
        assert [record["reward"] for record in history if "reward" in record] == pytest.approx(
            [np.mean(values) for values in rewards.rewards]
        )
        lines = (tmp_path / "watched" / "reward_dynamics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == history
        assert (tmp_path / "watched" / "reward_dynamics.png").stat().st_size > 10_000
        tuned = [record["tuned_change"] for record in history if "held_out" in record]
        assert tuned == pytest.approx([record["held_out_change"] for record in history if "held_out" in record])
        logged = [entry for entry in trainer.state.log_history if "dynamics/held_out" in entry]
        assert [entry["step"] for entry in logged] == [0, 2, 4, 5]
        assert logged[0]["dynamics/held_out"] < logged[-1]["dynamics/held_out"]

    def test_held_out_samples_stay_the_same(self, tmp_path, vlm_folder):
        """A judge with references in the rows, judged by hand on samples of the same seeds, whatever the batch size."""
        folder = vlm_folder("internvl")
        model = RewardDanceForYesScoring.from_pretrained(folder)
        judge = RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(folder))
        rows = [{"prompt": prompt, "references": [random_image(i)]} for i, prompt in enumerate(HELD_OUT)]
        got = []
        for size in (3, 8):
            monitor = RewardDynamicsCallback(judge, rows, eval_steps=1, plot=False)
            trainer = make_trainer(tmp_path, max_steps=1, callbacks=[monitor], per_device_eval_batch_size=size)
            trainer.train()
            got.append([record for record in monitor.dynamics.history if "held_out" in record])
        assert got[0][0]["held_out"] == pytest.approx(got[1][0]["held_out"], rel=1e-3)
        assert got[0][1]["diversity"] == pytest.approx(got[1][1]["diversity"], rel=1e-2)
        assert got[0][0]["held_out"] != got[0][1]["held_out"]

    @pytest.mark.parametrize("use_ema", [False, True])
    def test_hacked_run_stops_and_rolls_back(self, tmp_path, use_ema, caplog):
        """A falling held-out reward stops the run; it ends with the weights of the best evaluation, here the start's."""
        dynamics = RewardDynamics(window=10, significance=0.3, min_drop=0.01)
        monitor = RewardDynamicsCallback(
            opposite,
            HELD_OUT,
            eval_steps=5,
            num_samples=1,
            stop=True,
            restore_best=True,
            dynamics=dynamics,
            plot=False,
        )
        trainer = make_trainer(tmp_path, max_steps=60, use_ema=use_ema, callbacks=[monitor], learning_rate=2e-2)
        before = trained_weights(trainer)
        images = trainer.sample(HELD_OUT, output_type="pt")
        trainer.train()
        assert 0 < trainer.state.global_step < 60
        assert "held_out_falls" in kinds(monitor.dynamics)
        assert "Reward hacking? Step" in caplog.text
        assert "The run ends with the weights of step 0" in caplog.text
        for name, weights in trained_weights(trainer).items():
            assert torch.equal(weights, before[name])
        assert torch.equal(trainer.sample(HELD_OUT, output_type="pt"), images)

    def test_best_is_kept(self, tmp_path):
        """The best evaluation may lie in the middle: its samples come back."""
        seen = []

        def peak(images, prompts):
            if not seen or not torch.equal(images, seen[-1]):
                seen.append(images)
            height = {1: 0.1, 2: 0.5, 3: 0.9}.get(len(seen), 0.2)
            return height + images.mean(dim=(1, 2, 3)) * 1e-3

        monitor = RewardDynamicsCallback(peak, HELD_OUT, eval_steps=2, num_samples=1, restore_best=True, plot=False)
        trainer = make_trainer(tmp_path, max_steps=8, callbacks=[monitor], per_device_eval_batch_size=4)
        trainer.train()
        assert monitor.dynamics.best_step == 4
        before = len(seen)
        with torch.no_grad():
            monitor._judge(trainer, monitor.rows, range(4))
        assert len(seen) == before + 1
        assert torch.equal(seen[-1], seen[2])

    def test_resumed_run(self, tmp_path):
        """Interrupted after a checkpoint and resumed, history, best weights and log are those of a straight run."""

        def make(folder, **arguments):
            monitor = RewardDynamicsCallback(opposite, HELD_OUT, eval_steps=2, restore_best=True, plot=False)
            settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
            callbacks = [monitor, *arguments.pop("callbacks", [])]
            return make_trainer(tmp_path / folder, callbacks=callbacks, **settings | arguments), monitor

        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    raise KeyboardInterrupt("at step 3")

        whole, whole_monitor = make("whole")
        whole.train()
        first, _ = make("cut", callbacks=[Stop()])
        with pytest.raises(KeyboardInterrupt, match="at step 3"):
            first.train()
        for checkpoint in ("checkpoint-3", "checkpoint-2"):  # saved at the interruption, saved as asked for
            second, monitor = make("cut", pipeline=tiny_sd3())
            second.train(resume_from_checkpoint=str(tmp_path / "cut" / checkpoint))
            assert monitor.dynamics.history == whole_monitor.dynamics.history
            assert monitor.dynamics.state_dict() == whole_monitor.dynamics.state_dict()
            assert monitor.dynamics.best_step < 5
            for name, weights in trained_weights(whole).items():
                assert torch.equal(weights, trained_weights(second)[name])
            log = (tmp_path / "cut" / "reward_dynamics.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in log] == monitor.dynamics.history

    def test_without_held_out(self, tmp_path):
        """Rewards alone can be watched, and diversity without a held-out reward."""
        monitors = [RewardDynamicsCallback(plot=False), RewardDynamicsCallback(None, PROMPTS, 2, plot=False)]
        for monitor in monitors:
            make_trainer(tmp_path, max_steps=2, callbacks=[monitor]).train()
        assert [record["step"] for record in monitors[0].dynamics.history] == [1, 2]
        assert [("diversity" in record) for record in monitors[1].dynamics.history] == [True, False, False, True]

    def test_wrong_arguments(self, tmp_path):
        """What makes no sense is refused before anything is trained."""
        for arguments, match in [
            ({"eval_steps": 0}, "`eval_steps` is 0"),
            ({"held_out": opposite}, "`held_out` was given without `held_out_dataset`"),
            ({"restore_best": True}, "`restore_best` is True without `held_out`"),
            ({"held_out_dataset": ["a"], "held_out": opposite}, "`held_out_dataset` has 1 row"),
            ({"held_out_dataset": PROMPTS, "num_samples": 1}, "there is nothing to measure on it"),
        ]:
            with pytest.raises(ValueError, match=match):
                RewardDynamicsCallback(**arguments)
        monitor = RewardDynamicsCallback(plot=False)
        with pytest.raises(ValueError, match="only `ReFLTrainer` tells of its updates"):
            monitor.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), None, None)
        trainer = make_trainer(tmp_path, callbacks=[monitor], restore_callback_states_from_checkpoint=True)
        with pytest.raises(ValueError, match="`restore_callback_states_from_checkpoint` is True"):
            trainer.train()
