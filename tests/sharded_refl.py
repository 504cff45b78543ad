"""Runs of `ReFLTrainer` whose denoiser is split over processes, for processes that tests start together: all in one group."""

import os
import sys
from pathlib import Path

import torch
from tiny_refl import make_trainer, pixel_reward, rows, tiny_flux, tiny_sd3, tiny_wan, tiny_wan_22, trained_weights
from torch.distributed.tensor import DTensor

from rewarddance_hf.alignment.monitor.callback import RewardDynamicsCallback


PIPELINES = {"sd3": tiny_sd3, "flux": tiny_flux, "wan": tiny_wan, "wan22": tiny_wan_22}
SETTINGS = {
    "max_steps": 2,
    "optim": "adamw_torch",
    "adam_epsilon": 1e-3,  # rounding of small gradients would decide the first updates
    "learning_rate": 1e-2,
    "max_grad_norm": 1e-4,
    "lr_scheduler_type": "constant",
    "save_strategy": "steps",
    "save_steps": 1,
    "reward_transform": "log",
}


def settings_of(name: str, count: int, **changes) -> dict:
    kind, way = name.split("-")
    own = {"pipeline": PIPELINES[kind](), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // count}
    if way == "full":
        own |= {"peft_config": None, "learning_rate": 1e-3, "gradient_checkpointing": True}
    return {**SETTINGS, **own, **changes}


def run(folder: Path, name: str, count: int, resume: Path | None = None, **changes) -> dict:
    """Weights after two updates, with all that samples in between."""
    monitor = RewardDynamicsCallback(pixel_reward, rows(3), eval_steps=1, plot=False)
    watched = {"callbacks": [monitor], "eval_dataset": rows(3), "sample_steps": 1}
    trainer = make_trainer(folder, **settings_of(name, count, **watched, **changes))
    if changes.get("shard_denoiser"):
        parameters = list(trainer.model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        assert sum(parameter.to_local().numel() for parameter in parameters) < 0.6 * sum(p.numel() for p in parameters)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.save_model(str(folder / "final"))
    if changes.get("shard_denoiser"):  # also after calls without backward pass
        held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        assert all(isinstance(parameter, DTensor) for parameter in [*held, *trainer.model.parameters()])
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    result = {"weights": trained_weights(trainer), "metrics": trainer.evaluate(), "history": monitor.dynamics.history}
    return {**result, "norms": [float(norm) for norm in norms], "rewards": trainer.last_rewards.sort()[0]}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    for name in names:
        place = Path(folder) / name
        options = {"precompute_prompts": True} if name == "sd3-lora" else {}
        results = {"whole": run(place / "two", name, 2, shard_denoiser=True, **options)}
        for start in ("one", "two"):
            resume = place / start / "checkpoint-1"
            results[f"resumed from {start}"] = run(place / f"again-{start}", name, 2, resume, shard_denoiser=True)
        torch.save(results, place / f"result-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
