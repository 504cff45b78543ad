"""
Peaks of memory of real trainings on the CPU: `real_peaks.py FILE`, whose content is JSON with the flags of `rewarddance estimate` by
name, writes gibibytes by name to the end of its output. Of judges it is what torch's profiler sees of the allocator; of generators
what operations return, without the workspaces of CPU kernels for convolutions.
"""

import json
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl import get_peft_config

from rewarddance_hf.memory.counting import GIB
from rewarddance_hf.scripts.estimate import PROMPT, find_task, make_parser, make_rows


def peak_of(run: Callable[[], Any]) -> float:
    """Gibibytes that are allocated at the peak of a run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / GIB


class Results(TorchDispatchMode):
    """Bytes that results of operations hold, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            storage = result.untyped_storage() if isinstance(result, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return results


def results_of(run: Callable[[], Any]) -> float:
    """Gibibytes that results of operations hold at the peak of a run."""
    with Results() as results:
        run()
    return results.peak / GIB


def with_own_memory(*models: torch.nn.Module) -> None:
    """Weights that are parts of a file so far are allocated."""
    for model in models:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def judge(how: Any, args: Any, model_args: Any) -> None:
    from rewarddance_hf import RewardDanceTrainer
    from rewarddance_hf.trainer.processor import load_processor

    args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = RewardDanceTrainer(
        model_args.model_name_or_path,
        args,
        train_dataset=make_rows(how.image_size, False) * (2 * args.per_device_train_batch_size),
        processing_class=load_processor(model_args.model_name_or_path),
        peft_config=get_peft_config(model_args),
    )
    with_own_memory(trainer.model)
    trainer.train()


def generator(args: Any, model_args: Any) -> None:
    from datasets import Dataset

    from rewarddance_hf.alignment.refl.trainer import ReFLTrainer
    from rewarddance_hf.memory.generator import Elsewhere
    from rewarddance_hf.scripts.tune import load_pipeline

    pipeline = load_pipeline(model_args, "cpu")
    with_own_memory(*(part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)))
    rows = Dataset.from_list([{"prompt": f"{PROMPT}, {index}"} for index in range(4)])
    trainer = ReFLTrainer(
        pipeline, {"judge": Elsewhere()}, args, train_dataset=rows, peft_config=get_peft_config(model_args)
    )
    trainer.train()


def measure(arguments: Sequence[str]) -> float:
    task = find_task(arguments)
    own = ["--use_cpu", "true", "--max_steps", "2", "--save_strategy", "no", "--report_to", "none"]
    own += ["--output_dir", tempfile.mkdtemp(), "--disable_tqdm", "true"]
    how, _, args, model_args = make_parser(task).parse_args_and_config([*arguments, *own])
    if task == "tune":
        return results_of(lambda: generator(args, model_args))
    return peak_of(lambda: judge(how, args, model_args))


if __name__ == "__main__":
    torch.set_num_threads(1)
    peaks = {name: measure(flags) for name, flags in json.loads(Path(sys.argv[1]).read_text()).items()}
    sys.stdout.write("\n" + json.dumps(peaks) + "\n")
    sys.stdout.flush()
    os._exit(0)
