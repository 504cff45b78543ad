"""Grids of samples, which show how a generator changes while it is tuned."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback, WandbCallback

from ...import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers.utils import make_image_grid  # noqa: E402

from .callbacks import ReFLCallback  # noqa: E402


FRAMES_SHOWN = 8  # of a clip, spread over its length


class SampleGridCallback(ReFLCallback):
    """
    Draw the same prompts from the same noise every few updates, before the first one too, into
    `output_dir/samples/step-000100.png`, TensorBoard and Weights & Biases. A clip is a row of its frames.
    """

    def __init__(self, prompts: list[str], conditions: list[Any] | None = None) -> None:
        self.prompts = prompts
        self.conditions = conditions

    def on_run_begin(self, trainer: Any) -> None:
        if trainer.state.global_step == 0:
            self._draw(trainer)

    def on_update(self, trainer: Any, logs: dict[str, float]) -> None:
        if trainer.state.global_step % trainer.args.sample_steps == 0:
            self._draw(trainer)

    def _draw(self, trainer: Any) -> None:
        step = trainer.state.global_step
        is_main = trainer.is_world_process_zero()
        if not is_main and not trainer.args.shard_denoiser:
            return
        grid = sample_grid(trainer.sample(self.prompts, conditions=self.conditions))
        if not is_main:
            return
        folder = Path(trainer.args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"step-{step:06d}.png")
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                if callback.tb_writer is None:
                    callback._init_summary_writer(trainer.args)
                callback.tb_writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")
            elif isinstance(callback, WandbCallback):
                image = callback._wandb.Image(grid, caption="; ".join(self.prompts))
                callback._wandb.log({"samples": image, "train/global_step": step})


def sample_grid(samples: list[Any]) -> Image.Image:
    """Lay samples out in one image."""
    if isinstance(samples[0], list):
        shown = np.linspace(0, len(samples[0]) - 1, min(len(samples[0]), FRAMES_SHOWN)).round().astype(int)
        rows = [[clip[i] for i in shown] for clip in samples]
        return make_image_grid([frame for row in rows for frame in row], rows=len(rows), cols=len(rows[0]))
    columns = int(np.ceil(np.sqrt(len(samples))))
    count = int(np.ceil(len(samples) / columns))
    blank = Image.new("RGB", samples[0].size, "white")
    padded = [*samples, *[blank] * (count * columns - len(samples))]
    return make_image_grid(padded, rows=count, cols=columns)
