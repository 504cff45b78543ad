"""Draft of a model card, written by the trainer from what it knows of its run."""

from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from .training_args import RewardDanceTrainingArguments


TEXT = """---
{card_data}
---

# {model_name}

A [RewardDance](https://huggingface.co/papers/2509.08826) judge of generated images and video ({paradigm} paradigm),
fine-tuned from [{base_model}](https://huggingface.co/{base_model}). The reward is the probability of the token "yes".

```python
from rewarddance_hf import RewardDanceScorer

scorer = RewardDanceScorer.from_pretrained("{model_name}")
{call}
```

Trained for {steps} steps of {batch_size} rows at learning rate {learning_rate}, with rewarddance_hf {version} and
transformers {transformers_version}.

{metrics}
## Citation

```bibtex
@article{{rewarddance2025,
    title  = {{RewardDance: Reward Scaling in Visual Generation}},
    year   = {{2025}},
    eprint = {{2509.08826}},
}}
```
"""


def training_card(model: Any, args: RewardDanceTrainingArguments, state: Any, model_name: str, tags: list[str]) -> str:
    """
    Fill the draft of a model card.

    Args:
        model ([`RewardDanceForYesScoring`] or `peft.PeftModel`):
            Trained judge.
        args ([`RewardDanceTrainingArguments`]):
            Arguments of its run.
        state (`transformers.TrainerState`):
            State of its run, with its logs.
        model_name (`str`):
            Repository ID, or name of the folder.
        tags (`list[str]`):
            Tags of the repository.

    Returns:
        `str`: Text of the card in Markdown, with metadata.
    """
    metrics = _last_eval_metrics(state.log_history)
    base_model = model.config._name_or_path or "unknown"
    card_data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        tags=[*tags, "generated_from_trainer"],
        model_name=model_name,
        eval_results=[
            EvalResult("visual-preference", name, name, "accuracy", value) for name, value in metrics.items()
        ],
    )
    rows = "".join(f"| {name} | {100 * value:.1f} |\n" for name, value in metrics.items())
    table = f"| held-out rows | accuracy % (ties left out) |\n|---|---|\n{rows}\n" if rows else ""
    references = ", references=[reference]" if args.paradigm == "pairwise" else ""
    text = TEXT.format(
        card_data=card_data.to_yaml(),
        model_name=model_name,
        paradigm=args.paradigm,
        base_model=base_model,
        call=f'scorer.score([sample], ["a red circle"]{references})',
        steps=state.global_step,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=args.learning_rate,
        version=__version__,
        transformers_version=transformers.__version__,
        metrics=table,
    )
    return str(ModelCard(text))


def _last_eval_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of each evaluation set at its last evaluation."""
    metrics = {}
    for logs in log_history:
        for key, value in logs.items():
            if key.startswith("eval_") and key.endswith("accuracy"):
                metrics[key.removeprefix("eval_").removesuffix("accuracy").strip("_") or "eval"] = value
    return metrics
