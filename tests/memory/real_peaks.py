"""
Peaks of memory of real trainings on the CPU, by torch's profiler of its allocator: `real_peaks.py FILE`, whose content is JSON with
the flags of `rewarddance estimate` by name, writes gibibytes by name to the end of its output.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
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


def generator(script_args: Any, args: Any, model_args: Any) -> None:
    from datasets import Dataset

    from rewarddance_hf.alignment.refl.trainer import ReFLTrainer
    from rewarddance_hf.memory.generator import Elsewhere
    from rewarddance_hf.scripts.tune import add_references, load_judge, load_pipeline

    pipeline = load_pipeline(model_args, "cpu")
    with_own_memory(*(part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)))
    reward: Any = Elsewhere()
    if script_args.judge is not None:
        reward = load_judge(script_args.judge, script_args, "cpu")
        with_own_memory(reward.model)
    rows = Dataset.from_list([{"prompt": f"{PROMPT}, {index}"} for index in range(4)])
    rows = add_references(rows, pipeline, reward, script_args, args, "train")
    trainer = ReFLTrainer(
        pipeline, {"judge": reward}, args, train_dataset=rows, peft_config=get_peft_config(model_args)
    )
    trainer.train()


def measure(arguments: Sequence[str]) -> float:
    task = find_task(arguments)
    own = ["--use_cpu", "true", "--max_steps", "2", "--save_strategy", "no", "--report_to", "none"]
    own += ["--output_dir", tempfile.mkdtemp(), "--disable_tqdm", "true"]
    how, script_args, args, model_args = make_parser(task).parse_args_and_config([*arguments, *own])
    if task == "tune":
        return peak_of(lambda: generator(script_args, args, model_args))
    return peak_of(lambda: judge(how, args, model_args))


if __name__ == "__main__":
    torch.set_num_threads(1)
    peaks = {name: measure(flags) for name, flags in json.loads(Path(sys.argv[1]).read_text()).items()}
    sys.stdout.write("\n" + json.dumps(peaks) + "\n")
    sys.stdout.flush()
    os._exit(0)
