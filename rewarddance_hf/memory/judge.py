"""Memory of training a judge and of scoring with one, counted."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PrinterCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from .counting import GIB, counting, prepare_arguments, size_of, weights_of
from .device import memory
from .report import Count


def count_training(
    model_name: str,
    args: Any,
    processor: Any,
    rows: Sequence[Any],
    peft_config: Any = None,
    quantized_to: int | None = None,
) -> Count:
    """
    Count an update of [`RewardDanceTrainer`].

    Args:
        model_name (`str`):
            Folder with the configurations of a judge or a vision-language model.
        args ([`RewardDanceTrainingArguments`]):
            Arguments of the run, which are changed.
        processor ([`RewardDanceProcessor`]):
            Processor of the judge.
        rows (`list[dict]`):
            Preference rows, which are repeated to fill a batch.
        peft_config (`peft.PeftConfig`, *optional*):
            Adapter.
        quantized_to (`int`, *optional*):
            Bits of the weights of linear layers under an adapter, e.g. 4.

    Returns:
        [`Count`]: What is allocated on one GPU.
    """
    from ..trainer.rewarddance_trainer import RewardDanceTrainer

    with counting(), tempfile.TemporaryDirectory() as folder:
        first = prepare_arguments(args, folder)
        batch = [rows[index % len(rows)] for index in range(args.per_device_train_batch_size)]
        trainer = RewardDanceTrainer(
            model=model_name,
            args=args,
            train_dataset=batch,
            processing_class=processor,
            peft_config=peft_config,
            callbacks=[first],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        peak = memory.peak / GIB
    model: Any = trainer.model
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = weights_of(model)
    parts = {"weights": weights}
    if peft_config is not None:
        parts = {"weights": weights - size_of(trained), "adapter": size_of(trained)}
    parts |= {"gradients": first.gradients, "optimizer": first.optimizer}
    parts["activations"] = peak - sum(parts.values())
    if quantized_to is not None:  # after the peak is split, whose other parts stay as they are
        parts["weights"] -= _saved_by_quantization(model, quantized_to)
    count, count_trained = (sum(parameter.numel() for parameter in some) for some in (parameters, trained))
    largest, outside = _blocks(model)
    return Count(parts, count, count_trained, largest, outside)


def count_scoring(load: Callable[[], Any], score: Callable[[Any], Any]) -> Count:
    """
    Count a scoring with a [`RewardDanceScorer`].

    Args:
        load (`Callable`):
            Loads the scorer with `from_pretrained`.
        score (`Callable`):
            Scores a batch with it.

    Returns:
        [`Count`]: The weights, and what the batch takes on top at its peak.
    """
    with counting() as device:
        scorer = load()
        scorer.model.to(device)
        parts = {"weights": weights_of(scorer.model)}
        memory.peak = before = memory.now
        score(scorer)
        parts["activations"] = (memory.peak - before) / GIB
    return Count(parts, sum(parameter.numel() for parameter in scorer.model.parameters()), 0)


def _saved_by_quantization(model: nn.Module, bits: int) -> float:
    """Gibibytes that frozen linear layers take less than in their type, all but the language-model head."""
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")]
    weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
    return sum(weight.numel() * (weight.element_size() - bits / 8) for weight in weights) / GIB


def _blocks(model: nn.Module) -> tuple[int, int]:
    """Numbers of parameters that FSDP gathers at a time: of the largest block, and outside of all blocks but the embeddings."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    judge: Any = getattr(model, "get_base_model", lambda: model)()
    embeddings, head = judge.get_input_embeddings(), judge.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        inside.add(id(embeddings.weight))
    largest = max((sum(parameter.numel() for parameter in block.parameters()) for block in blocks), default=0)
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return max(largest, embeddings.weight.numel()), outside
