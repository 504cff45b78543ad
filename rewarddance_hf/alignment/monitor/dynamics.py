"""
Reward dynamics: the history of a reward-tuned generator, and the signs of reward hacking in it (Sec. 4.1 and Figures
2, 5 and 6 of the [RewardDance paper](https://huggingface.co/papers/2509.08826)).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...checks import check_integers
from .rules import DiversityCollapsed, DynamicsWarning, HeldOutFalls, HeldOutLags, Saturated, StdCollapsed
from .statistics import HeldOutRewards, Moments, TrainingRewards, checked_values


if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RewardDynamics:
    r"""
    Monitor of reward fine-tuning that sees reward hacking.

    It is told rewards and evaluations by [`~RewardDynamics.update`], and warns when it first sees

    | kind | what |
    |---|---|
    | `held_out_falls` | the held-out reward is below its best by more than its noise and than `min_drop` |
    | `held_out_lags` | the tuned reward has risen, and less than `min_transfer` of that has arrived in the held-out reward |
    | `std_collapsed` | the standard deviation in the window is below `min_std_ratio` of the start |
    | `diversity_collapsed` | diversity is below `min_diversity_ratio` of the start by more than its noise |
    | `saturated` | more than `max_saturated` of the rewards in the window are saturated |

    [`rewarddance_hf.alignment.monitor.rules`] says where the rules come from. In simulations of 20 evaluations at a plateau,
    of an oracle that is right or wrong about 2 samples of each prompt, 0 to 2 of 100 runs gave a false `held_out_falls`; a
    fall by 1 point in each evaluation was seen after 14 points (median) with 100 prompts, after 10 with 200 and after 5 to 7
    with 500.

    Args:
        window (`int`, *optional*, defaults to `1000`):
            Number of steps that mean, standard deviation and share of saturated rewards are taken over. The default is the
            paper's; choose a tenth of a short run.
        sample_size (`int`, *optional*, defaults to `128`):
            Number of rewards that tell the start (the first ones) and where the tuned reward is now (the last ones), both
            rounded up to whole steps.
        significance (`float`, *optional*, defaults to `0.001`):
            Probability of a false warning at one evaluation.
        min_drop (`float`, *optional*, defaults to `0.05`):
            Smallest fall of the held-out reward that matters, in standard deviations of the start (2.5 points of an
            oracle that is right in half of the samples).
        min_transfer (`float`, *optional*, defaults to `0.25`):
            Share of the tuned reward's rise that must arrive in the held-out reward, both in standard deviations of the
            start.
        min_std_ratio (`float`, *optional*, defaults to `0.25`):
            Smallest standard deviation, relative to the start.
        min_diversity_ratio (`float`, *optional*, defaults to `0.5`):
            Smallest diversity, relative to the start.
        max_saturated (`float`, *optional*, defaults to `0.5`):
            Largest share of saturated rewards.
        saturation (`float`, *optional*, defaults to `0.01`):
            How near to 0 or 1 a reward is saturated. Rewards are taken to be probabilities as long as none is outside of
            [0, 1]; others do not saturate.

    Attributes:
        history (`list[dict]`):
            One record for each update: `step`; `reward` (mean of the step), `reward_mean`, `reward_std`, `prompt_std` and
            `saturated` (of the window); `held_out` and `held_out_error` (mean and its standard error), `held_out_change`
            and `held_out_change_error` (from the start), `tuned_change`, `gap` (the tuned reward's change less the held-out
            one's; all four in standard deviations of the start), `diversity`; `warnings` (kinds). Missing if not known.
        warnings (`list[DynamicsWarning]`):
            All that was seen, each kind again only after it has gone.

    Raises:
        `ValueError`: If an argument is out of range.

    Example:

    ```python
    dynamics = RewardDynamics(window=50)
    for step in range(1, 201):
        ...
        dynamics.update(step, rewards, prompts)
        if step % 10 == 0:
            for warning in dynamics.update(step, held_out=oracle_values):
                print(warning.message)
    dynamics.plot().savefig("dynamics.png")
    ```
    """

    def __init__(
        self,
        window: int = 1000,
        sample_size: int = 128,
        significance: float = 0.001,
        min_drop: float = 0.05,
        min_transfer: float = 0.25,
        min_std_ratio: float = 0.25,
        min_diversity_ratio: float = 0.5,
        max_saturated: float = 0.5,
        saturation: float = 0.01,
    ) -> None:
        check_integers(2, window=window, sample_size=sample_size)
        if not 0 < significance < 0.5:
            raise ValueError(f"`significance` is {significance}, but must be a small probability. Pass e.g. 0.001.")
        if not 0 <= saturation < 0.5:
            raise ValueError(
                f"`saturation` is {saturation}, but must be a distance from 0 or 1 below 0.5. Pass e.g. 0.01."
            )
        for name, share in (
            ("min_drop", min_drop),
            ("min_transfer", min_transfer),
            ("min_std_ratio", min_std_ratio),
            ("min_diversity_ratio", min_diversity_ratio),
            ("max_saturated", max_saturated),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` is {share}, but must be between 0 and 1.")
        self.window = window
        self.reward_rules = (StdCollapsed(min_std_ratio), Saturated(max_saturated))
        self.held_out_rules = (HeldOutFalls(min_drop, significance), HeldOutLags(min_transfer, significance))
        self.diversity_rules = (DiversityCollapsed(min_diversity_ratio, significance),)
        self.history: list[dict[str, Any]] = []
        self.warnings: list[DynamicsWarning] = []
        self._training = TrainingRewards(window, sample_size, saturation)
        self._held_out = HeldOutRewards()
        self._first_diversity: list[float] = []
        self._active: set[str] = set()

    def update(
        self,
        step: int,
        rewards: torch.Tensor | Sequence[float] | None = None,
        prompts: Sequence[str] | None = None,
        held_out: torch.Tensor | Sequence[float] | None = None,
        tuned: torch.Tensor | Sequence[float] | None = None,
        diversity: torch.Tensor | Sequence[float] | None = None,
    ) -> list[DynamicsWarning]:
        """
        Add what was seen at a step.

        Args:
            step (`int`):
                Number of updates of the generator until now. Updates come in order; several of one step are allowed.
            rewards (`torch.Tensor` of shape `(n,)`, *optional*):
                Tuned rewards of the step's samples.
            prompts (`list[str]`, *optional*):
                Prompts of these samples, for the standard deviation between samples of one prompt.
            held_out (`torch.Tensor` of shape `(num_prompts,)` or `(num_prompts, num_samples)`, *optional*):
                Held-out rewards, of the same prompts and seeds in every call. Pass the first before the first step.
            tuned (`torch.Tensor` of the same shape, *optional*):
                Tuned rewards of these samples, in every call or none. Without them the rise of the tuned reward is that of
                the training samples, which is known less exactly.
            diversity (`torch.Tensor` of shape `(num_prompts,)`, *optional*):
                Diversity of the samples of each prompt, as from
                [`~rewarddance_hf.alignment.monitor.statistics.sample_diversity`], of the same prompts in every call.

        Returns:
            `list[DynamicsWarning]`: Warnings that are new.

        Raises:
            `ValueError`: If a value is NaN or infinite, lengths differ, a step is earlier than the last, or `tuned` comes
                without `held_out`.
        """
        if self.history and step < self.history[-1]["step"]:
            raise ValueError(
                f"`step` is {step}, but the last one was {self.history[-1]['step']}. Updates must come in order; load the "
                "state of the checkpoint that the run goes on from."
            )
        if tuned is not None and held_out is None:
            raise ValueError("`tuned` was given without `held_out`, but is compared with it. Pass both.")
        record: dict[str, Any] = {"step": int(step)}
        checks: list[tuple[Any, Any]] = []
        if rewards is not None:
            record |= self._training.add(checked_values(rewards, "rewards"), prompts)
            checks += [(rule, self._training) for rule in self.reward_rules]
        if held_out is not None:
            values = checked_values(held_out, "held_out", 2, self._held_out.first)
            same = None if tuned is None else checked_values(tuned, "tuned", 2, values)
            evaluation = self._held_out.add(record["step"], values, same, self._training)
            record |= evaluation.record()
            checks += [(rule, evaluation) for rule in self.held_out_rules]
        if diversity is not None:
            values = checked_values(diversity, "diversity", first=self._first_diversity)
            self._first_diversity = self._first_diversity or values.tolist()
            record["diversity"] = float(values.mean())
            checks += [(rule, (values, np.array(self._first_diversity))) for rule in self.diversity_rules]
        found = [rule.check(record["step"], evidence) for rule, evidence in checks]
        seen = [warning for warning in found if warning is not None]
        new = [warning for warning in seen if warning.kind not in self._active]
        self._active -= {rule.kind for rule, _ in checks}
        self._active |= {warning.kind for warning in seen}
        self.warnings += new
        if new:
            record["warnings"] = [warning.kind for warning in new]
        self.history.append(record)
        return new

    @property
    def is_best(self) -> bool:
        """Whether the last evaluation is the best one."""
        return bool(self.history) and "held_out" in self.history[-1] and self.history[-1]["step"] == self.best_step

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation of the held-out reward."""
        return self._held_out.best_step

    @property
    def verdict(self) -> str:
        """What was seen, in words."""
        if not self.warnings:
            return f"No sign of reward hacking in {self.history[-1]['step'] if self.history else 0} steps."
        return "\n".join(f"Step {warning.step}: {warning.message}" for warning in self.warnings)

    def state_dict(self) -> dict[str, Any]:
        """
        Return all that a resumed run needs, ready for JSON.

        Returns:
            `dict`: State, without the arguments of the class.
        """
        training, held_out = self._training, self._held_out
        return {
            "history": [dict(record) for record in self.history],
            "warnings": [asdict(warning) for warning in self.warnings],
            "recent": [asdict(moments) for moments in training.recent],
            "start": asdict(training.start),
            "num_rewards": training.count,
            "is_probability": training.is_probability,
            "first_held_out": held_out.first,
            "first_tuned": held_out.first_tuned,
            "best_held_out": held_out.best,
            "best_step": held_out.best_step,
            "best_tuned": None if held_out.best_tuned is None else asdict(held_out.best_tuned),
            "num_evaluations": held_out.count,
            "first_diversity": self._first_diversity,
            "active": sorted(self._active),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Go on from a state.

        Args:
            state (`dict`):
                What [`~RewardDynamics.state_dict`] returned.
        """
        training, held_out = self._training, self._held_out
        self.history = [dict(record) for record in state["history"]]
        self.warnings = [DynamicsWarning(**warning) for warning in state["warnings"]]
        training.recent = deque((Moments(**moments) for moments in state["recent"]), maxlen=self.window)
        training.window = sum(training.recent, Moments())
        training.start = Moments(**state["start"])
        training.count = state["num_rewards"]
        training.is_probability = state["is_probability"]
        held_out.first = list(state["first_held_out"])
        held_out.first_tuned = list(state["first_tuned"])
        held_out.best = list(state["best_held_out"])
        held_out.best_step = state["best_step"]
        held_out.best_tuned = None if state["best_tuned"] is None else Moments(**state["best_tuned"])
        held_out.count = state["num_evaluations"]
        self._first_diversity = list(state["first_diversity"])
        self._active = set(state["active"])

    def plot(self) -> "Figure":
        """
        Draw the paper's reward-dynamics plot (Figure 5): the mean in the window as a curve, its standard deviation as a
        band and as bubbles, with the held-out reward, diversity, saturated rewards and warnings.

        Returns:
            `matplotlib.figure.Figure`: The figure, which `savefig` writes.

        Raises:
            `ImportError`: If matplotlib is not installed.
            `ValueError`: If there is nothing to draw.
        """
        from .plot import plot_dynamics

        return plot_dynamics(self)
