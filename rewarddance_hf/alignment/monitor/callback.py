"""The monitor of reward hacking inside of [`ReFLTrainer`]: held-out evaluations, early stop, roll-back, plot and log."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ...checks import check_integers
from ...import_utils import require_extra


require_extra("train", "accelerate", "datasets")

from ...resumable import write_atomically  # noqa: E402
from ...rewards import as_reward  # noqa: E402
from ..refl.callbacks import ReFLCallback  # noqa: E402
from ..refl.conditions import check_conditions  # noqa: E402
from ..refl.rows import PromptRows, collate_rows, context_of, seed_of  # noqa: E402
from ..refl.sharding import refuse_split_judges  # noqa: E402
from .dynamics import RewardDynamics  # noqa: E402
from .statistics import sample_diversity  # noqa: E402


logger = logging.get_logger(__name__)

LOG_FILE = "reward_dynamics.jsonl"
PLOT_FILE = "reward_dynamics.png"
BEST_FILE = "reward_dynamics_best.pt"
LOGGED = ("held_out", "held_out_change", "gap", "diversity", "reward_mean", "reward_std")


class RewardDynamicsCallback(ReFLCallback, ExportableState):
    r"""
    Watch a [`ReFLTrainer`] for reward hacking.

    Each update's rewards go into a [`RewardDynamics`]. Before the first update, every `eval_steps` updates and after the
    last one, the held-out prompts are sampled, always from the same seeds, and scored by the held-out reward, and by the
    tuned reward if it is not pairwise or all rows have references. What is seen is logged as a warning, and the run may stop
    or end with the weights of the best evaluation.

    `output_dir` gets `reward_dynamics.jsonl`, the history with one record in each line, and `reward_dynamics.png`, the
    plot. Evaluations are also logged by the trainer as `dynamics/...`. Random states of the training are left alone, and a
    run that is resumed goes on with the history of its checkpoint.

    Args:
        held_out (`Callable`, *optional*):
            Reward that is not tuned: another judge, or an oracle. Called like the rewards of the trainer, with images as
            float tensors; needs no gradient. If None, only diversity is measured on the held-out prompts.
        held_out_dataset (`list[str]` or `datasets.Dataset`, *optional*):
            Prompts that are not trained on, or rows with `prompt` and what the rewards take, such as `references`. A
            few hundred prompts are needed to show falls of a few points. If None, nothing is sampled, and only rewards
            are watched.
        eval_steps (`int`, *optional*, defaults to `25`):
            Number of updates between two evaluations.
        num_samples (`int`, *optional*, defaults to `2`):
            Number of samples of each held-out prompt. Diversity needs 2.
        features (`Callable`, *optional*):
            Features that diversity is measured in, as in
            [`~rewarddance_hf.alignment.monitor.statistics.sample_diversity`]. Defaults to pixels.
        stop (`bool`, *optional*, defaults to `False`):
            Whether the first warning stops the run.
        restore_best (`bool`, *optional*, defaults to `False`):
            Whether the run ends with the weights of the best evaluation of the held-out reward, which may be those of the
            start. A copy of the trained weights is kept on the CPU for it. Checkpoints keep the weights of their step.
        dynamics ([`RewardDynamics`], *optional*):
            Monitor with its own thresholds. Defaults to one whose window is a tenth of the run, at most the paper's
            1000 steps and at least 10.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the held-out samples.
        plot (`bool`, *optional*, defaults to `True`):
            Whether to draw the plot, which needs matplotlib.

    Raises:
        `ValueError`: If an argument is out of range, or a held-out reward comes without prompts.

    Example:

    ```python
    monitor = RewardDynamicsCallback(other_judge, held_out_prompts, eval_steps=25, stop=True, restore_best=True)
    trainer = ReFLTrainer(pipeline, reward=scorer, args=args, train_dataset=references, callbacks=[monitor])
    trainer.train()
    print(monitor.dynamics.verdict)
    ```
    """

    def __init__(
        self,
        held_out: Callable[..., torch.Tensor] | None = None,
        held_out_dataset: Any = None,
        eval_steps: int = 25,
        num_samples: int = 2,
        features: Callable[[list[Any]], torch.Tensor] | None = None,
        stop: bool = False,
        restore_best: bool = False,
        dynamics: RewardDynamics | None = None,
        seed: int = 0,
        plot: bool = True,
    ) -> None:
        check_integers(eval_steps=eval_steps, num_samples=num_samples)
        if held_out is not None and held_out_dataset is None:
            raise ValueError("`held_out` was given without `held_out_dataset`, but needs prompts to be evaluated on.")
        if held_out_dataset is not None and held_out is None and num_samples == 1:
            raise ValueError(
                "`held_out_dataset` was given, but there is nothing to measure on it. Pass `held_out`, or `num_samples=2` for "
                "diversity."
            )
        if restore_best and held_out is None:
            raise ValueError("`restore_best` is True without `held_out`, which tells what is best. Pass both.")
        if plot:
            require_extra("demo", "matplotlib")
        self.held_out = None if held_out is None else as_reward(held_out)
        self.rows: PromptRows | None = None
        if held_out_dataset is not None:
            if isinstance(held_out_dataset, (list, tuple)) and all(isinstance(row, str) for row in held_out_dataset):
                held_out_dataset = [{"prompt": prompt} for prompt in held_out_dataset]
            needs_references = self.held_out is not None and self.held_out.is_pairwise
            self.rows = PromptRows(held_out_dataset, "held_out_dataset", needs_references)
            if len(self.rows) < 2:
                raise ValueError(
                    "`held_out_dataset` has 1 row, but noise can only be told from 2 or more. Add prompts."
                )
        self.eval_steps = eval_steps
        self.num_samples = num_samples
        self.features = features
        self.stop = stop
        self.restore_best = restore_best
        self.seed = seed
        self.plot = plot
        self.has_own_window = dynamics is None
        self.dynamics = dynamics or RewardDynamics()
        self._empty = self.dynamics.state_dict()
        self._best_weights: dict[str, Any] | None = None
        self._evaluated_step: int | None = None
        self._tuned_can_judge = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint remembers; see [`~transformers.trainer_callback.ExportableState`]."""
        return {
            "args": {},
            "attributes": {"dynamics": self.dynamics.state_dict(), "evaluated_step": self._evaluated_step},
        }

    def on_run_begin(self, trainer: Any) -> None:
        args, state = trainer.args, trainer.state
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "`restore_callback_states_from_checkpoint` is True, but would put a callback without held-out reward in the "
                "place of this one, which restores itself. Set it to False."
            )
        if args.shard_denoiser and self.restore_best:
            raise ValueError(
                "`restore_best` is True, but needs a copy of the weights, which are split over processes by `shard_denoiser`. Set it "
                "to False, and keep checkpoints instead."
            )
        if self.rows is not None and self.rows.has_conditions:
            check_conditions(trainer.pipeline, "held_out_dataset", trainer.args.pipeline_kwargs or {})
        if self.held_out is not None:
            refuse_split_judges(self.held_out)
            if trainer.offload is not None:
                trainer.offload.take(self.held_out)
        if self.rows is not None:
            trainer.encode_prompts(self.rows.prompts(), self.rows[0].get("condition"))
        if self.has_own_window:
            self.dynamics = RewardDynamics(window=min(1000, max(10, state.max_steps // 10)))
        self.dynamics.load_state_dict(self._empty)
        self._evaluated_step, self._best_weights = None, None
        self._tuned_can_judge = self.rows is not None and (
            not trainer.rewards.is_pairwise
            or all(self.rows[index].get("references") for index in range(len(self.rows)))
        )
        if state.global_step > 0:
            self._resume(args, state)
        if trainer.is_world_process_zero():
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self._write_log(args, "w", self.dynamics.history)
        is_due = not self.dynamics.history or state.global_step % self.eval_steps == 0
        if is_due and self._evaluated_step != state.global_step:
            self._evaluate(trainer)

    def on_update(self, trainer: Any, logs: dict[str, float]) -> None:
        step = trainer.state.global_step
        self._tell(trainer, self.dynamics.update(step, trainer.last_rewards, trainer.last_prompts))
        if step % self.eval_steps == 0:
            self._evaluate(trainer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._best_weights is not None and args.should_save and checkpoint.is_dir():
            _save(self._best_weights, checkpoint / BEST_FILE)

    def on_run_end(self, trainer: Any) -> None:
        step = trainer.state.global_step
        if self._evaluated_step != step:
            self._evaluate(trainer)
        if self.restore_best and self.dynamics.best_step != step:
            self._restore_best(trainer)
        self._draw(trainer)

    # ---- evaluation ----

    def _evaluate(self, trainer: Any) -> None:
        """Sample the held-out prompts and judge them; each process has its share."""
        if self.rows is None:
            return
        all_rows, device = self.rows, trainer.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            results = trainer.work_on_rows(lambda indices: self._judge(trainer, all_rows, indices), len(all_rows))
        values: dict[str, Any] = {name: torch.tensor([result[name] for result in results]) for name in results[0]}
        step = trainer.state.global_step
        new = self.dynamics.update(step, **values)
        self._evaluated_step = step
        self._tell(trainer, new)
        if self.restore_best and self.dynamics.is_best:
            self._keep_best(trainer)
        record = self.dynamics.history[-1]
        trainer.log({f"dynamics/{name}": record[name] for name in LOGGED if name in record})

    def _judge(self, trainer: Any, all_rows: PromptRows, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Held-out reward, tuned reward and diversity of the samples of rows, `eval_batch_size` samples at a time."""
        judges = {"held_out": self.held_out, "tuned": trainer.rewards if self._tuned_can_judge else None}
        count = self.num_samples
        per_batch = max(1, trainer.args.eval_batch_size // count)
        results: list[dict[str, Any]] = []
        for start in range(0, len(indices), per_batch):
            part = indices[start : start + per_batch]
            columns = collate_rows([row for index in part for row in [all_rows[index]] * count])
            prompts = columns["prompt"]
            seeds = [seed_of(self.seed, "held out", index, i) for index in part for i in range(count)]
            images = trainer.sample(prompts, seeds, "pt", columns.get("condition")).float()
            values: dict[str, list[Any]] = {}
            for name, judge in judges.items():
                if self.held_out is not None and judge is not None:
                    with trainer.judges_on_device(judge), torch.no_grad():
                        rewards = judge(images, prompts, **context_of(columns))
                    values[name] = rewards.reshape(len(part), count).tolist()
            if count > 1:
                values["diversity"] = sample_diversity(list(images.split(count)), self.features).tolist()
            results += [{name: value[i] for name, value in values.items()} for i in range(len(part))]
        return results

    def _tell(self, trainer: Any, new: list[Any]) -> None:
        """Write the last record, and act on its warnings."""
        if trainer.is_world_process_zero():
            self._write_log(trainer.args, "a", self.dynamics.history[-1:])
        for warning in new:
            logger.warning(f"Reward hacking? Step {warning.step}: {warning.message}")
        if new:
            self._draw(trainer)
            if self.stop:
                trainer.control.should_training_stop = True

    # ---- weights of the best evaluation ----

    def _keep_best(self, trainer: Any) -> None:
        self._best_weights = {
            "step": trainer.state.global_step,
            "weights": [_on_cpu(parameter) for parameter in trainer.trained_parameters],
            "ema": None if trainer.ema is None else tree_map_only(torch.Tensor, _on_cpu, trainer.ema.state_dict()),
        }
        if trainer.args.should_save:
            _save(self._best_weights, Path(trainer.args.output_dir) / BEST_FILE)

    def _restore_best(self, trainer: Any) -> None:
        best = self._best_weights
        if best is None:
            logger.warning(
                f"The weights of step {self.dynamics.best_step}, the best one, are no longer available. The run ends with those "
                "of its last step."
            )
            return
        with torch.no_grad():
            for parameter, weights in zip(trainer.trained_parameters, best["weights"], strict=True):
                parameter.copy_(weights)
        if trainer.ema is not None:
            trainer.ema.load_state_dict(best["ema"])
            trainer.ema.to(trainer.args.device)
        logger.warning(f"The run ends with the weights of step {best['step']}, where the held-out reward was best.")

    def _resume(self, args: Any, state: Any) -> None:
        known = (state.stateful_callbacks or {}).get(type(self).__name__)
        if known is None:
            logger.warning(
                "The checkpoint was made without this monitor, which therefore takes its step for the start of the run."
            )
            return
        self.dynamics.load_state_dict(known["attributes"]["dynamics"])
        self._evaluated_step = known["attributes"]["evaluated_step"]
        if not self.restore_best:
            return
        for folder in (Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(args.output_dir)):
            if (folder / BEST_FILE).is_file():
                best = torch.load(folder / BEST_FILE, map_location="cpu", weights_only=True)
                if best["step"] == self.dynamics.best_step:
                    self._best_weights = best
                    return
        logger.warning(f"The weights of step {self.dynamics.best_step}, the best one, are not in {args.output_dir}.")

    # ---- files ----

    def _write_log(self, args: Any, mode: str, records: Sequence[dict[str, Any]]) -> None:
        with open(Path(args.output_dir) / LOG_FILE, mode, encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def _draw(self, trainer: Any) -> None:
        if self.plot and trainer.is_world_process_zero() and self.dynamics.history:
            self.dynamics.plot().savefig(Path(trainer.args.output_dir) / PLOT_FILE, dpi=120)


def _on_cpu(weights: torch.Tensor) -> torch.Tensor:
    return weights.detach().to("cpu", copy=True)


def _save(weights: dict[str, Any], file: Path) -> None:
    stream = io.BytesIO()
    torch.save(weights, stream)
    write_atomically(file, stream.getvalue())
