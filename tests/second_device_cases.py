"""
What runs on a second device (`rewarddance_hf.memory.device`), beside the same on the CPU. A script: `second_device_cases.py FILE NAME ...`
writes for each case, or all cases of a group, what differs, as JSON.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_pipelines import BUILDERS, TinyPipeline, relative_difference
from tiny_pipelines import reward as pipeline_reward
from tiny_refl import PROMPTS as REFL_PROMPTS
from tiny_refl import SIZES, make_trainer, pixel_reward, tiny_sd3, trained_weights
from tiny_vlms import FAMILIES, random_image, save_tiny_vlm
from torch.utils._pytree import tree_map_only

from rewarddance_hf import (
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
    RewardDynamicsCallback,
    RewardGradientCallback,
    best_of_n,
    best_of_n_references,
    search_over_paths,
    zero_order_search,
)
from rewarddance_hf.memory.counting import trainers_on
from rewarddance_hf.memory.device import register


PROMPTS = ["a red circle", "two green triangles left of a blue square", "yes"]
REFERENCES = [random_image(10 + index, 30 + 7 * index, 40) for index in range(3)]
MORE_SCORERS = [("pairwise", "plain"), ("pointwise", "auto"), ("regressive", "plain")]
METHODS = {"refl": {"step_index_range": (2, 3)}, "draft": {"num_gradient_steps": 2}}


def judge(folder: Path, device: Any, paradigm: str = "pairwise", **settings: Any) -> RewardDanceScorer:
    model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm)
    if paradigm == "regressive":
        torch.nn.init.normal_(model.score.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    processor = RewardDanceProcessor.from_pretrained(folder)
    return RewardDanceScorer(model.to(device), processor, batch_size=2, **settings)


# ---- judges ----


def scoring_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    for family in sorted(FAMILIES):
        folder = save_tiny_vlm(family, Path(tempfile.mkdtemp()))
        for paradigm, engine in [("pairwise", "auto"), *(MORE_SCORERS if family == "internvl" else [])]:
            yield (
                f"{family}-{paradigm}-{engine}",
                lambda folder=folder, paradigm=paradigm, engine=engine: score(folder, device, paradigm, engine),
            )


def score(folder: Path, device: torch.device, paradigm: str, engine: str) -> dict[str, float]:
    """Scores and gradients of a judge on the device, of samples on either device."""
    references = REFERENCES if paradigm == "pairwise" else None
    shape = (3, 3, 40, 52)
    samples = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255

    def run(scorer: RewardDanceScorer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = images.requires_grad_()
        rewards = scorer.score(images, PROMPTS, references)
        rewards.log().sum().backward()
        assert images.grad is not None
        assert images.grad.device == images.device
        return rewards.detach().cpu(), images.grad.cpu()

    scorer = judge(folder, device, paradigm, engine=engine)
    wanted, wanted_gradient = run(judge(folder, "cpu", paradigm, engine=engine), samples.clone())
    scores, gradients = [], []
    for images in (samples.to(device), samples.clone()):
        values, gradient = run(scorer, images)
        scores.append((values - wanted).abs().max().item())
        gradients.append(relative_difference([gradient], [wanted_gradient]))
    images = [random_image(index) for index in range(3)]
    scorer.score(images, PROMPTS, references)
    if paradigm == "pairwise":
        scorer.rank(images, PROMPTS[0])
        scorer.score(images, PROMPTS, references, dimensions=["alignment", "structure"])
        example = {"reference": images[0], "image": images[1], "prompt": "two cats", "verdict": "yes"}
        scorer.score(images, PROMPTS, references, examples=[example])
    return {"score": max(scores), "gradient": max(gradients)}


# ---- gradients through pipelines ----


def pipeline_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    for name in BUILDERS:
        for method in METHODS if name in ("StableDiffusion-DPM++", "Flux", "Wan") else ("refl",):
            yield f"{name}-{method}", lambda name=name, method=method: gradient(name, device, method)


def gradient(name: str, device: torch.device, method: str) -> dict[str, float]:
    """Images and LoRA gradients of a pipeline on the device, rewarded on the CPU."""
    images, gradients = [], []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = TinyPipeline(name)
        model.pipeline.to(place)
        model.inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(place), model.inputs)  # noqa: B023
        callback = RewardGradientCallback(method=method, vae_checkpointing=True, vae_slicing=True, **METHODS[method])
        if name == "PixArtSigma":
            with callback.attach(model.pipeline):
                sample = model()
        else:
            tensor_inputs = callback.tensor_inputs
            sample = model(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=tensor_inputs)
        assert sample.device == place
        pipeline_reward(sample.cpu()).mean().backward()
        images.append(sample.detach().cpu())
        parameters = [parameter for parameter in model.denoiser.parameters() if parameter.requires_grad]
        gradients.append([parameter.grad.cpu() for parameter in parameters])
    difference = (images[0] - images[1]).abs().max().item()
    return {"score": difference, "gradient": relative_difference(gradients[1], gradients[0])}


# ---- training and search ----


def training_cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    folder = save_tiny_vlm("internvl", Path(tempfile.mkdtemp()))
    yield "refl-sd3", lambda: refl_difference(folder, device)
    for option in ("precompute_prompts", "offload"):
        yield f"refl-sd3-{option}", lambda option=option: refl_difference(folder, device, **{option: True})
    yield "refl-sd3-bf16-full", lambda: finite(folder, device, peft_config=None)
    yield "judge", lambda: judge_difference(folder, device)
    yield "search", lambda: search_difference(folder, device)


def refl(folder: Path, device: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """Weights after an update and one more of a resumed run, with all that a trainer can have beside it."""
    output_dir = Path(tempfile.mkdtemp())
    weights = {}
    for steps in (1, 2):
        pipeline = tiny_sd3()
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        scorer = judge(folder, device)
        size = SIZES[type(pipeline).__name__]
        rows = best_of_n_references(
            pipeline,
            scorer,
            REFL_PROMPTS,
            num_candidates=3,
            top_k=2,
            num_inference_steps=2,
            show_progress=False,
            **size,
        )
        monitor = RewardDynamicsCallback(
            lambda images, prompts: pixel_reward(images.cpu(), prompts), REFL_PROMPTS[:2], eval_steps=1
        )
        pipeline.to("cpu")  # from where the trainer fetches all of it
        trainer = make_trainer(
            output_dir,
            pipeline,
            scorer,
            rows,
            max_steps=steps,
            use_ema=True,
            beta=0.1,
            sample_steps=1,
            eval_dataset=rows,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            callbacks=[monitor],
            **changes,
        )
        trainer.train(resume_from_checkpoint=steps == 2)
        assert {parameter.device for parameter in trainer.trained_parameters} == {torch.device(device)}
        away = {"cpu"} if changes.get("offload") else {torch.device(device).type}
        assert {parameter.device.type for parameter in scorer.model.parameters()} == away
        away = {"cpu"} if changes.get("offload") or changes.get("precompute_prompts") else away
        assert {parameter.device.type for parameter in pipeline.text_encoder.parameters()} == away
        weights = {key: weight.cpu() for key, weight in trained_weights(trainer).items()}
    return weights


def refl_difference(folder: Path, device: torch.device, **changes: Any) -> dict[str, float]:
    with trainers_on(device):
        ours = refl(folder, device, **changes)
    with trainers_on(torch.device("cpu")):
        wanted = refl(folder, torch.device("cpu"))
    return {"gradient": max((ours[key] - wanted[key]).abs().max().item() for key in wanted)}


def finite(folder: Path, device: torch.device, **changes: Any) -> dict[str, float]:
    with trainers_on(device):
        weights = refl(folder, device, bf16=True, **changes)
    return {"gradient": 0.0 if all(weight.isfinite().all() for weight in weights.values()) else float("inf")}


def judge_difference(folder: Path, device: torch.device) -> dict[str, float]:
    """Weights of a judge after two updates."""
    rows = [
        {"prompt": f"a red circle {index}", "chosen": random_image(index), "rejected": random_image(100 + index)}
        for index in range(4)
    ]
    weights = []
    for place in (device, torch.device("cpu")):
        with trainers_on(place):
            arguments = RewardDanceTrainingArguments(
                tempfile.mkdtemp(),
                per_device_train_batch_size=2,
                max_steps=2,
                eval_strategy="steps",
                eval_steps=1,
                gradient_checkpointing=True,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            )
            trainer = RewardDanceTrainer(str(folder), arguments, train_dataset=rows, eval_dataset=rows)
            trainer.train()
        assert {parameter.device for parameter in trainer.model.parameters()} == {place}
        weights.append([parameter.detach().cpu() for parameter in trainer.model.parameters()])
    return {"gradient": relative_difference(*weights)}


def search_difference(folder: Path, device: torch.device) -> dict[str, float]:
    """Images that searches choose."""
    found = []
    for place in (device, torch.device("cpu")):
        pipeline = tiny_sd3()
        pipeline.to(place)
        pipeline.set_progress_bar_config(disable=True)
        scorer = judge(folder, place, "pointwise")
        settings = {"num_inference_steps": 4, "output_type": "pt", **SIZES[type(pipeline).__name__]}
        results = [
            best_of_n(pipeline, REFL_PROMPTS[:2], reward=scorer, num_candidates=3, **settings),
            zero_order_search(pipeline, REFL_PROMPTS[:2], reward=scorer, num_rounds=1, **settings),
            search_over_paths(pipeline, REFL_PROMPTS[:2], reward=scorer, num_paths=2, num_branches=2, **settings),
        ]
        found.append([torch.as_tensor(one.images[0]).cpu() for result in results for one in result])
    return {"score": max((ours - wanted).abs().max().item() for ours, wanted in zip(*found, strict=True))}


GROUPS = {"scoring": scoring_cases, "pipelines": pipeline_cases, "training": training_cases}


def main(file: str, *names: str) -> None:
    torch.set_num_threads(1)
    device = register()
    results = {}
    for group, cases in GROUPS.items():
        for name, case in cases(device):
            if {name, group} & set(names):
                try:
                    results[name] = case()
                except Exception:
                    results[name] = {"error": traceback.format_exc()}
    Path(file).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # torch's threads for the device call Python, which must not be gone
