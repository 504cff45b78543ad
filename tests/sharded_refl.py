"""Runs of `ReFLTrainer` whose denoiser is split over processes, for processes that tests start together: all in one group."""

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tiny_refl import make_trainer, pixel_reward, rows, tiny_flux, tiny_sd3, tiny_wan, tiny_wan_22, trained_weights
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rewarddance_hf import RemoteReward, RewardDanceScorer
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


def run(
    folder: Path, name: str, count: int, resume: Path | None = None, held_out: Any = pixel_reward, **changes
) -> dict:
    """Weights after two updates, with all that samples in between."""
    monitor = RewardDynamicsCallback(held_out, rows(3), eval_steps=1, plot=False)
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


def with_judges(folder: Path, address: str, vlm: str) -> None:
    """Tuned by a judge that is whole, served, or placed in parts. One that is split as the denoiser is, is refused."""
    scorer = RewardDanceScorer.from_pretrained(vlm, paradigm="pointwise")
    results = {"whole": run(folder / "whole", "sd3-lora", 2, shard_denoiser=True, reward={"judge": scorer})}
    with closing(RemoteReward(address)) as served:
        results["served"] = run(folder / "served", "sd3-lora", 2, shard_denoiser=True, reward={"judge": served})
    parts = {f"vlm.model.{name}": "cpu" for name, _ in scorer.model.vlm.model.named_children()} | {
        "vlm.lm_head": "cpu"
    }
    files = {"offload_folder": folder / f"offloaded-{os.environ['RANK']}"}
    parts["vlm.model.language_model"] = "disk"  # whose layers are read for the time of their calls
    placed = RewardDanceScorer.from_pretrained(vlm, paradigm="pointwise", device_map=parts, **files)
    results["placed"] = run(
        folder / "placed", "sd3-lora", 2, shard_denoiser=True, offload=True, reward={"judge": placed}
    )
    for layer in scorer.model.vlm.get_decoder().layers:
        fully_shard(layer)
    for options in ({"reward": scorer}, {"held_out": scorer}):
        try:
            run(folder / "split", "sd3-lora", 2, shard_denoiser=True, **options)
        except ValueError as error:
            results[f"split {next(iter(options))}"] = str(error)
    torch.save(results, folder / f"result-{os.environ['RANK']}.pt")


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    if names[0] == "judges":
        return with_judges(Path(folder), *names[1:])
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
