"""
Peaks of memory of real trainings on the CPU, by torch's profiler of its allocator, beside the counted ones: a script that
writes both as JSON, in gibibytes. `real_peaks.py judge FOLDER FLAG ...` or `real_peaks.py pipeline FOLDER JUDGE FLAG ...`
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch


GIB = 2**30


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


def judge(folder: str, *flags: str) -> float:
    """Peak of two updates of a judge."""
    from trl import get_peft_config

    from rewarddance_hf import RewardDanceTrainer
    from rewarddance_hf.scripts.estimate import make_parser, make_rows
    from rewarddance_hf.trainer.processor import load_processor

    arguments = ["--model", folder, *flags, "--use_cpu", "true", "--max_steps", "2", "--save_strategy", "no"]
    arguments += ["--report_to", "none", "--output_dir", tempfile.mkdtemp()]
    how, _, args, model_args = make_parser("train").parse_args_and_config(arguments)
    args.model_init_kwargs = {"dtype": model_args.dtype}

    def train() -> None:
        trainer = RewardDanceTrainer(
            folder,
            args,
            train_dataset=make_rows(how.image_size, False) * (2 * args.per_device_train_batch_size),
            processing_class=load_processor(folder),
            peft_config=get_peft_config(model_args),
        )
        for parameter in trainer.model.parameters():  # which are parts of a file so far
            parameter.data = parameter.data.clone()
        trainer.train()

    return peak_of(train)


def main(kind: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    peak = {"judge": judge}[kind](*arguments)
    sys.stdout.write("\n" + json.dumps({"peak": peak}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
