"""Callbacks that are called after every update of a generator."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .arguments import ReFLTrainingArguments


if TYPE_CHECKING:
    from .trainer import ReFLTrainer


class ReFLCallback(TrainerCallback):
    """
    Callback of [`ReFLTrainer`], which passes itself as the argument. It can sample, log, and stop the run by
    `trainer.control.should_training_stop`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not isinstance(args, ReFLTrainingArguments):
            raise ValueError(
                f"`{type(self).__name__}` was given to a trainer with `{type(args).__name__}`, but only `ReFLTrainer` tells of "
                "its updates. Pass it to that one in `callbacks`."
            )

    def on_run_begin(self, trainer: "ReFLTrainer") -> None:
        """Called before the first update, also of a run that is resumed."""

    def on_update(self, trainer: "ReFLTrainer", logs: dict[str, float]) -> None:
        """
        Called after each update, whatever `logging_steps`.

        Args:
            trainer ([`ReFLTrainer`]):
                Trainer. Its `last_rewards` and `last_prompts` are those of the update.
            logs (`dict[str, float]`):
                What is logged of the update; see [`ReFLTrainer`].
        """

    def on_run_end(self, trainer: "ReFLTrainer") -> None:
        """Called after the last update."""


class TellCallbacks(TrainerCallback):
    """Call the hooks of each [`ReFLCallback`], after those of `TrainerCallback`, and move the average of the weights."""

    def __init__(self, trainer: "ReFLTrainer") -> None:
        self.refl_trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self._listeners():
            callback.on_run_begin(self.refl_trainer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.refl_trainer
        if trainer.ema is not None and not trainer.accelerator.optimizer_step_was_skipped:
            trainer.ema.step(trainer.trained_parameters)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        should_log, should_evaluate = control.should_log, control.should_evaluate
        for callback in self._listeners():
            callback.on_update(self.refl_trainer, dict(self.refl_trainer.last_logs))
        # What a callback logs or evaluates is not that of the update, which would be left out.
        control.should_log |= should_log
        control.should_evaluate |= should_evaluate

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for callback in self._listeners():
            callback.on_run_end(self.refl_trainer)

    def _listeners(self) -> list[ReFLCallback]:
        return [part for part in self.refl_trainer.callback_handler.callbacks if isinstance(part, ReFLCallback)]
