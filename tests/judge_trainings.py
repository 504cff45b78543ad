"""Trainings as several processes run them and as one does, for `trainer/test_processes.py`. As a script: `judge_trainings.py CASES FOLDER`."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from tiny_vlms import random_image
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rewarddance_hf import (
    RewardDanceEvaluator,
    RewardDanceForYesScoring,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
)


ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
RATIONALE = {"yes": "Image 1: worse. Image 2: better.", "no": "Image 1: better. Image 2: worse."}


def shard_on_cpu() -> None:
    """
    Let accelerate shard on the CPU. Version 1.15 passes over FSDP there without a word and trains as DDP does, because
    `MULTI_CPU` is not among the types for which it reads the settings of FSDP.
    """
    import accelerate.state as state

    plain = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = init


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a weight, put together if it is split by FSDP 2 or ZeRO-3. All processes must call it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameter):
            return parameter.detach().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def size(parameter: torch.Tensor) -> int:
    """Number of elements, of the whole weight."""
    return getattr(parameter, "ds_numel", parameter.numel())


class Held(TrainerCallback):
    """Bytes that this process holds of weights, their gradients and the states of the optimizer, at the end of an update."""

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = list(model.parameters())
        states = [value for state in optimizer.state.values() for value in state.values()]
        self.bytes = {
            "weights": held(parameters),
            "gradients": held(parameter.grad for parameter in parameters if parameter.grad is not None),
            "optimizer": held(value for value in states if isinstance(value, torch.Tensor) and value.ndim),
        }


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, or of the shares that this process has of them, each storage once."""
    shares = [t.to_local() if isinstance(t, DTensor) else getattr(t, "ds_tensor", t) for t in tensors]
    storages = {share.untyped_storage().data_ptr(): share.untyped_storage().nbytes() for share in shares}
    return sum(storages.values())


def make_rows(count: int = 8, with_rationales: str = "all") -> datasets.Dataset:
    """Rows with images of several sizes, of which all, none, or those of every other batch of two have rationales."""
    return datasets.Dataset.from_list(
        [
            {
                "prompt": f"a red circle {i}",
                "chosen": random_image(i, 40 + 8 * (i % 3)),
                "rejected": random_image(100 + i),
                "rationale": RATIONALE
                if with_rationales == "all" or (with_rationales == "half" and i % 4 < 2)
                else None,
            }
            for i in range(count)
        ]
    )


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """
    Train, evaluate and save into a subfolder of the case's name. Beside arguments of the trainer, a case may have `vlm` (folder),
    `lora` (arguments of it), `frozen` (name of a module), `count` (of rows), `with_rationales`, `files` (that rows are streamed
    from), `eval_count`, `evaluate_first`, and `resume` (checkpoint).
    """
    case = dict(case)
    output = folder / case.pop("name")
    model, resume, eval_count = case.pop("vlm"), case.pop("resume", None), case.pop("eval_count", 0)
    rows = make_rows(case.pop("count", 8), case.pop("with_rationales", "all"))
    if files := case.pop("files", 0):
        rows = rows.to_iterable_dataset(num_shards=files)
    if frozen := case.pop("frozen", None):
        model = RewardDanceForYesScoring.from_pretrained(model)
        model.vlm.get_submodule(frozen).requires_grad_(False)
    if (lora := case.pop("lora", None)) is not None:
        from peft import LoraConfig

        lora = LoraConfig(r=2, init_lora_weights=False, **lora)
    holdings = Held()
    evaluates_first = case.pop("evaluate_first", False)
    trainer = RewardDanceTrainer(
        model,
        RewardDanceTrainingArguments(str(output), **{**ARGUMENTS, **case}),
        train_dataset=rows,
        eval_dataset=make_rows(eval_count) if eval_count else None,
        evaluator=RewardDanceEvaluator(make_rows(eval_count), bootstrap_samples=10) if eval_count else None,
        peft_config=lora,
        callbacks=[holdings],
    )
    seen, collate = [], trainer.data_collator

    def watch(batch: list[dict[str, Any]]) -> Any:
        seen.append([row["row"] for row in batch])
        return collate(batch)

    trainer.data_collator = watch
    metrics = [trainer.evaluate()] if evaluates_first else []
    trainer.train(resume_from_checkpoint=resume)
    parameters = dict(trainer.model.named_parameters())
    result = {
        "sharded": all(
            isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in parameters.values()
        ),
        "units": {type(module).__name__ for module in trainer.model.modules() if isinstance(module, FSDPModule)},
        "trained types": {parameter.dtype for parameter in parameters.values() if parameter.requires_grad},
        "frozen types": {parameter.dtype for parameter in parameters.values() if not parameter.requires_grad},
        "weights": {name: whole(parameter) for name, parameter in parameters.items()},
        "bytes": holdings.bytes,
        "sizes": {
            "all": sum(size(parameter) for parameter in parameters.values()),
            "trained": sum(size(p) for p in parameters.values() if p.requires_grad),
            "frozen bytes": sum(size(p) * p.element_size() for p in parameters.values() if not p.requires_grad),
        },
        "seen": seen,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
    }
    if eval_count:
        metrics.append(trainer.evaluate())
    result["metrics"] = [
        {name: value for name, value in each.items() if not name.endswith(("runtime", "_per_second", "_time"))}
        for each in metrics
    ]
    trainer.save_model()
    return result


def main(cases: str, folder: str) -> None:
    from accelerate.state import AcceleratorState

    for case in json.loads(Path(cases).read_text()):
        try:
            result = train(case, Path(folder))
        except ValueError as error:  # raised by all processes
            result = {"error": str(error)}
        torch.save(result, Path(folder, f"{case['name']}-{torch.distributed.get_rank()}.pt"))
        torch.distributed.barrier()
        AcceleratorState._reset_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    main(*sys.argv[1:])
