"""Which steps of a pipeline have gradient."""

from collections.abc import Sequence
from dataclasses import dataclass


ATTACH = "`with callback.attach(pipeline): images = pipeline(...).images`"


@dataclass(frozen=True)
class StepChoice:
    """Steps that [`RewardGradientCallback`] was told to choose from; its arguments."""

    method: str
    step_index_range: tuple[int, int] | None
    step_ratio_range: tuple[float, float] | None
    num_gradient_steps: int

    def __post_init__(self) -> None:
        if self.method not in ("refl", "draft"):
            raise ValueError(f"`method` is {self.method!r}, but must be 'refl' or 'draft'.")
        if self.step_index_range is not None and self.step_ratio_range is not None:
            raise ValueError(
                f"`step_index_range` is {self.step_index_range} and `step_ratio_range` is {self.step_ratio_range}, but only one "
                "of them may be given. Drop the other."
            )
        if self.step_index_range is not None and not 0 <= self.step_index_range[0] < self.step_index_range[1]:
            raise ValueError(
                f"`step_index_range` is {self.step_index_range}, but must be the first step and the step after the last "
                "one, as in `range`. Swap or widen them."
            )
        if self.step_ratio_range is not None and not 0.0 <= self.step_ratio_range[0] < self.step_ratio_range[1] <= 1.0:
            raise ValueError(
                f"`step_ratio_range` is {self.step_ratio_range}, but must be two growing ratios between 0.0 and 1.0. "
                "Give numbers of steps as `step_index_range`."
            )
        if self.num_gradient_steps < 1:
            raise ValueError(f"`num_gradient_steps` is {self.num_gradient_steps}, but must be at least 1.")

    def among(
        self, num_steps: int, earliest: int, makers: Sequence[str], trained: Sequence[str]
    ) -> tuple[list[int], dict[str, list[int]]]:
        """
        Steps of a run from which ReFL draws one, or with which DRaFT has gradient, in order.

        Args:
            num_steps (`int`):
                Number of steps of the pipeline.
            earliest (`int`):
                First step that can have gradient.
            makers (`list[str]`):
                Denoiser that makes each step, if there are two: only steps of those that train are chosen.
            trained (`list[str]`):
                Models that train.

        Returns:
            `tuple[list[int], dict[str, list[int]]]`: The steps, and those of each trained denoiser if there are two.
        """
        own = {name: [i for i, maker in enumerate(makers) if maker == name] for name in trained if name in makers}
        start, stop, told = self._range(num_steps)
        steps = list(range(start, stop))
        if own and self._is_default:  # the last quarter of the steps of each
            steps = sorted(step for part in own.values() for step in part[-max(1, len(part) // 4) :])
            start = steps[0]
        if not earliest <= start < stop <= num_steps:
            reason = (
                "" if earliest == 0 or start > 0 else f" (step 0 has ended when a callback is called; use {ATTACH})"
            )
            required = f"requires steps {start} to {stop - 1} with gradient" if start < stop else "holds none of them"
            raise ValueError(
                f"The pipeline makes {num_steps} steps, but `{told}` {required}, out of {earliest} to {num_steps - 1}{reason}. "
                "Raise `num_inference_steps` or change the argument."
            )
        if not makers:
            return steps, {}
        steps_of = {name: [step for step in steps if makers[step] == name] for name in trained}
        if not any(steps_of.values()):
            advice = "Raise it" if self.method == "draft" else "Choose among these by `step_index_range`"
            whose = ", ".join(f"`{name}` {part[0]} to {part[-1]}" for name, part in own.items()) or "none"
            raise ValueError(
                f"`{told}` requires gradient in steps {start} to {stop - 1}, but the denoisers that train make others "
                f"({whose}). {advice}, or train the other denoiser."
            )
        if self.method == "draft":
            return steps, steps_of
        return sorted(step for part in steps_of.values() for step in part), steps_of

    @property
    def _is_default(self) -> bool:
        return self.method == "refl" and self.step_index_range is None and self.step_ratio_range is None

    def _range(self, num_steps: int) -> tuple[int, int, str]:
        """First step, the step after the last one, and the argument that they come from."""
        if self.method == "draft":
            return num_steps - self.num_gradient_steps, num_steps, f"num_gradient_steps={self.num_gradient_steps}"
        if self.step_index_range is not None:
            return (*self.step_index_range, f"step_index_range={tuple(self.step_index_range)}")
        first, last = self.step_ratio_range or (0.75, 1.0)
        return int(num_steps * first), int(num_steps * last), f"step_ratio_range={(first, last)}"
