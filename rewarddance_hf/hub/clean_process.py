"""
Checks of releases, each run as `python clean_process.py KIND SOURCE REVISION THREADS` in a process in which this package
cannot be imported. A check fails with the reason, or its last line is JSON with what was seen.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def check_model(source: str, revision: str | None) -> dict[str, Any]:
    """Scores of the sheet's rows, by the code of the repository."""
    import torch
    from huggingface_hub import snapshot_download
    from transformers import pipeline

    folder = Path(source if Path(source).is_dir() else snapshot_download(source, revision=revision))
    judge: Any = pipeline("visual-preference", model=source, revision=revision, trust_remote_code=True, device="cpu")  # type: ignore
    assert type(judge.model).__module__.startswith("transformers_modules."), type(judge.model).__module__
    rows = json.loads((folder / "verification" / "scores.json").read_text())["rows"]
    log_odds, scores = [], []
    for row in rows:
        question = {"prompt": row["prompt"]}
        question |= {name: str(folder / row[name]) for name in ("image", "reference") if name in row}
        references = [question["reference"]] if "reference" in row else None
        inputs = judge.processor(images=[question["image"]], prompts=[row["prompt"]], references=references)
        with torch.no_grad():
            log_odds.append(judge.model(**inputs).logits.item())
        scores.append(judge(question)["score"])
    return {"log_odds": log_odds, "scores": scores}


def check_dataset(source: str, revision: str | None) -> dict[str, Any]:
    """The first prompt of each split of each configuration."""
    import datasets

    prompts = {}
    for config in datasets.get_dataset_config_names(source, revision=revision):
        splits = datasets.load_dataset(source, config, revision=revision, streaming=True)
        for split, dataset in splits.items():
            row = next(iter(dataset))
            missing = {"prompt", "chosen", "rejected"} - set(row)
            assert not missing, f"{config}/{split} lacks {missing}"
            prompts[f"{config}/{split}"] = row["prompt"]
    assert prompts, "there is no configuration"
    return {"prompts": prompts}


def check_metric(source: str, revision: str | None) -> dict[str, Any]:
    """Number of the examples of an `evaluate` module, which must be true."""
    import doctest
    from types import SimpleNamespace

    import evaluate

    (module,) = (path for path in Path(source).glob("*.py") if path.name != "app.py")
    metric = evaluate.load(str(module), keep_in_memory=True)
    names = {"evaluate": SimpleNamespace(load=lambda name: metric)}
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(metric.inputs_description, names, module.stem, None, 0))
    results = runner.summarize()
    assert results.failed == 0 < results.attempted, "its examples are not true"
    return {"examples": results.attempted}


def check_space(source: str, revision: str | None) -> dict[str, Any]:
    """Whether a Space has its files, and its page compiles."""
    compile((Path(source) / "app.py").read_text(encoding="utf-8"), "app.py", "exec")
    assert (Path(source) / "requirements.txt").is_file(), "there is no requirements.txt"
    return {}


def check_pipeline(source: str, revision: str | None) -> dict[str, Any]:
    """Class of a pipeline that diffusers can load."""
    import diffusers

    index = json.loads((Path(source) / "model_index.json").read_text())
    absent = {name: None for name, part in index.items() if part == [None, None]}
    diffusers.DiffusionPipeline.from_pretrained(source, **absent)
    return {"class": index["_class_name"]}


def check_adapter(source: str, revision: str | None) -> dict[str, Any]:
    """Number of the tensors of an adapter."""
    from safetensors import safe_open

    with safe_open(next(Path(source).glob("*.safetensors")), "np") as file:
        names = list(file.keys())
    assert any("lora" in name for name in names), "there are no LoRA weights"
    return {"tensors": len(names)}


CHECKS: dict[str, Callable[[str, str | None], dict[str, Any]]] = {
    "model": check_model,
    "dataset": check_dataset,
    "metric": check_metric,
    "space": check_space,
    "pipeline": check_pipeline,
    "adapter": check_adapter,
}


def main(kind: str, source: str, revision: str, threads: str) -> None:
    sys.modules["rewarddance_hf"] = None  # type: ignore[assignment]  # importing it raises ImportError
    del sys.path[0]  # the folder of this file: its neighbours are not what others mean by these names
    if kind == "model":
        import torch

        torch.set_num_threads(int(threads))
    seen = CHECKS[kind](source, revision or None)
    sys.stdout.write(f"\n{json.dumps(seen)}\n")
    sys.stdout.flush()
    os._exit(0)  # readers of a stream that was not read to its end can abort the process when Python ends it


if __name__ == "__main__":
    main(*sys.argv[1:])
