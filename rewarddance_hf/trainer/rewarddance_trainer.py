"""Trainer of judges: `transformers.Trainer` with the names and habits of TRL."""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    TrainerCallback,
    enable_full_determinism,
    set_seed,
)
from transformers.utils import logging

from ..availability import check_available
from ..data.collator import DataCollatorForRewardDance
from ..data.resizing import resize_images
from ..data.rows import prepare_rows
from ..import_utils import require_extra
from ..models import RewardDanceForYesScoring, RewardDanceOutput, RewardDanceProcessor
from ..parallel import Processes
from .common import CommonTrainer, SetEpochCallback
from .losses import answer_cross_entropy, bradley_terry_loss, pointwise_loss
from .model_card import training_card
from .processor import load_processor
from .sharding import forget_unused_renamings, own_class
from .training_args import RewardDanceTrainingArguments


logger = logging.get_logger(__name__)

# Arguments of loading that say where files are from, for the processor as for the model.
SOURCE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class RewardDanceTrainer(CommonTrainer):
    r"""
    Train a [`RewardDanceForYesScoring`] judge on preference rows (Section 3.2.3 of the
    [RewardDance paper](https://huggingface.co/papers/2509.08826)).

    Args:
        model (`str` or [`RewardDanceForYesScoring`]):
            Judge or plain vision-language model to start from: repository ID, folder, or a loaded judge. Without a `dtype`
            in `args.model_init_kwargs`, weights are loaded in float32 if all of them are trained, and as they were saved
            under an adapter.
        args ([`RewardDanceTrainingArguments`], *optional*):
            Arguments of the run. Defaults to those with `output_dir="rewarddance_output"`.
        train_dataset (`datasets.Dataset`, `datasets.IterableDataset` or `torch.utils.data.Dataset`, *optional*):
            Preference rows, see [`~rewarddance_hf.data.preference.check_row`].
        eval_dataset (the same, or a `dict` of them by name, *optional*):
            Held-out preference rows. Each is judged in one fixed order of its images.
        processing_class ([`RewardDanceProcessor`], *optional*):
            Processor of the judge. By default loaded from where `model` comes from, at the same revision.
        data_collator ([`DataCollatorForRewardDance`], *optional*):
            Collator in place of the one that follows from `args`.
        evaluator (`Callable`, *optional*):
            Function of model and processor that returns further metrics at each evaluation of all of `eval_dataset`,
            e.g. a [`RewardDanceEvaluator`]: accuracy with its interval, order consistency, calibration. Every process
            calls it; a [`RewardDanceEvaluator`] then scores a share of the rows on each.
        compute_metrics (`Callable`, *optional*):
            Metrics in place of `accuracy`, `margin`, `mean_reward`, `min_reward` and `max_reward`. `predictions` are the
            log-odds that the chosen sample is better, of shape `(rows,)`, and scores, of shape `(rows, 1 or 2)`.
        callbacks (`list`, *optional*):
            Callbacks beside the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        peft_config (`peft.PeftConfig`, *optional*):
            Adapter to train in place of the whole model. Without `target_modules`, all linear layers of the language model
            get it; the vision tower stays as it is. Its `task_type` is not used.

    Raises:
        `ValueError`: If a dataset is empty or lacks a column, or model, processor and arguments do not fit together.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from rewarddance_hf import RewardDanceTrainer, RewardDanceTrainingArguments

    trainer = RewardDanceTrainer(
        model="OpenGVLab/InternVL3_5-2B-HF",
        args=RewardDanceTrainingArguments(output_dir="my-judge"),
        train_dataset=load_dataset("data-is-better-together/open-image-preferences-v1-binarized", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64),  # leave it out to train all weights
    )
    trainer.train()
    ```
    """

    _tag_names = ["rewarddance", "reward-model", "visual-preference"]
    learning_rates = (1e-4, 1e-5)

    def __init__(
        self,
        model: str | RewardDanceForYesScoring,
        args: RewardDanceTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: RewardDanceProcessor | None = None,
        data_collator: Callable | None = None,
        evaluator: Callable[[Any, RewardDanceProcessor], dict[str, float]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or RewardDanceTrainingArguments(output_dir="rewarddance_output")
        # A new scalar head or adapter is drawn here, before `Trainer` sets the seed.
        if args.full_determinism:
            enable_full_determinism(args.seed)
        else:
            set_seed(args.seed)
        source: dict[str, Any] = {}
        if isinstance(model, str):
            init_kwargs = dict(args.model_init_kwargs or {})
            check_available(model, **init_kwargs)
            if init_kwargs.get("dtype") is None:
                keeps_type = peft_config is not None or init_kwargs.get("quantization_config") is not None
                init_kwargs["dtype"] = "auto" if keeps_type else torch.float32
            model = RewardDanceForYesScoring.from_pretrained(model, paradigm=args.paradigm, **init_kwargs)
            source = {name: value for name, value in init_kwargs.items() if name in SOURCE_ARGUMENTS}
        elif args.model_init_kwargs is not None:
            raise ValueError("`model_init_kwargs` was given, but `model` is loaded already. Drop one of the two.")
        if not isinstance(model, RewardDanceForYesScoring):
            raise TypeError(
                f"`model` is a `{type(model).__name__}`, but must be a `RewardDanceForYesScoring` or a path. Load it with "
                "`RewardDanceForYesScoring.from_pretrained(...)`, which also wraps a plain image-text-to-text model."
            )
        if model.config.paradigm != args.paradigm:
            raise ValueError(
                f"`args.paradigm` is {args.paradigm!r}, but the model's is {model.config.paradigm!r}. Load the model with "
                f"`paradigm={args.paradigm!r}`, or pass its path as `model`."
            )
        if processing_class is None:
            processing_class = load_processor(model.config._name_or_path, **source)
        model.check_processor(processing_class)
        if model.config.score_temperature != 1.0:
            logger.warning(
                f"`score_temperature` of the model is {model.config.score_temperature:.3g} and is set to 1 for training. Fit "
                "it again afterwards with `RewardDanceEvaluator.calibrate`."
            )
            model.config.score_temperature = 1.0
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        forget_unused_renamings(model)
        _freeze_unused_parameters(model)
        if peft_config is None:
            _warn_of_low_precision(model)
        model.add_model_tags(self._tag_names)
        self.judge_config = model.config
        if peft_config is not None:
            model = _add_adapter(model, peft_config, args)

        if args.resize_images:
            with args.main_process_first(desc="resizing images"):
                train_dataset = _resize_images(train_dataset, processing_class, args, "train_dataset")
                eval_dataset = _resize_images(eval_dataset, processing_class, args, "eval_dataset")
        if data_collator is None:
            data_collator = DataCollatorForRewardDance(
                processing_class,
                args.paradigm,
                with_rationales=args.rationale is not None,
                seed=args.seed,
                rationale_format=args.rationale or "decision_first",
            )
        # Evaluation asks for the verdict only, and keeps its order whatever the epoch. Reasons of a row would tell it.
        self._eval_collator = DataCollatorForRewardDance(processing_class, args.paradigm, seed=args.seed)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # which layers of a vision tower are used depends on the model

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=prepare_rows(train_dataset, "train_dataset"),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or _compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        self.evaluator = evaluator
        self.label_names = ["labels"]
        self.can_return_loss = True
        self._records: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if hasattr(data_collator, "set_epoch"):
            self.add_callback(SetEpochCallback(data_collator.set_epoch))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs = dict(inputs)
        labels, margin = inputs.pop("labels"), inputs.pop("margin", None)
        outputs: RewardDanceOutput = model(**inputs)
        logits, scores = outputs.logits[:, 0], outputs.scores
        kept = slice(None if model.training else self._rows_that_count(len(labels)))
        margin = None if margin is None else margin[kept]
        if self.judge_config.uses_reference:
            loss = answer_cross_entropy(outputs.answer_log_probs[kept], labels[kept], margin)
            if outputs.rationale_loss is not None:
                loss = loss + self.args.rationale_weight * outputs.rationale_loss[kept].mean()
            preferences = torch.where(labels < 0.5, -logits, logits)
            scores = scores[:, None]
        else:
            chosen, rejected = logits.chunk(2)
            if self.judge_config.has_scalar_head:
                loss = bradley_terry_loss(chosen[kept], rejected[kept], labels[kept], margin)
            else:
                first, second = outputs.answer_log_probs.chunk(2)
                answers = (chosen[kept], first[kept]), (rejected[kept], second[kept])
                loss = pointwise_loss(*answers, labels[kept], self.args.answer_weight, margin)
            preferences = chosen - rejected
            scores = torch.stack(scores.chunk(2), dim=-1)
        if model.training:
            self._records.append((preferences.detach(), scores.detach(), labels))
        return (loss, {"preferences": preferences, "scores": scores}) if return_outputs else loss

    def _rows_that_count(self, batch_size: int) -> int | None:
        """
        Number of rows of an evaluation batch before repetitions: accelerate fills up the last one with the first rows of the
        dataset, and cuts them off what is gathered, but they are in a mean. None is for batches without, or of nothing else.
        """
        state = self.accelerator.gradient_state
        count = state.remainder - self.args.process_index * batch_size if state.end_of_dataloader else 0
        return count if 0 < count < batch_size else None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        _check_finite(loss, "evaluation", self.state.global_step)
        state = self.accelerator.gradient_state
        if state.in_dataloader and state.remainder < 0:  # of a stream, the last batch is not cut to its rows
            loss = loss.repeat(len(inputs["labels"]))
        if prediction_loss_only:
            return loss, None, None
        return loss, (outputs["preferences"], outputs["scores"]), inputs["labels"]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.evaluator is not None and eval_dataset is None:
            results = self.evaluator(self.accelerator.unwrap_model(self.model), self.processing_class)
            results = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
            self.log(dict(results))
            metrics.update(results)
        return metrics

    def _training_logs(self) -> dict[str, float]:
        if not self._records:
            return {}
        preferences, scores, labels = (torch.cat(column) for column in zip(*self._records, strict=True))
        self._records.clear()
        _check_finite(preferences, "training", self.state.global_step)
        return _metrics(self.accelerator.gather(_summarize(preferences, scores, labels)[None]))

    def _prepare_rows(self, dataset: Any, name: str) -> Any:
        if dataset is not None and not hasattr(dataset, "__len__") and Processes.current().count > 1:
            raise ValueError(
                f"`{name}` is streamed and has no length, so that several processes could not tell which rows are repeated to "
                "fill the last batch. Take a part of it, e.g. `list(dataset.take(1000))`."
            )
        return prepare_rows(dataset, name)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset")
            # With persistent workers the loader of an earlier evaluation would be used again, with its dataset.
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        with self._collator(self._eval_collator):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._collator(self._eval_collator):
            return super().get_test_dataloader(self._prepare_rows(test_dataset, "test_dataset"))

    @contextmanager
    def _collator(self, collator: Callable) -> Iterator[None]:
        """Collator of evaluations, which see all rows."""
        train_settings = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = train_settings

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Resuming reads weights with `load_state_dict`, under the names of the running model. `save_pretrained` writes
        # the names of the original checkpoint, which differ for many VLMs and would then load nothing.
        # See https://github.com/huggingface/transformers/issues/43701; to be removed when it is fixed at our floor.
        saved = self.accelerator.unwrap_model(self.model)
        if not isinstance(saved, PreTrainedModel):
            super()._save_checkpoint(model, trial)
            return
        saved.save_pretrained = functools.partial(saved.save_pretrained, save_original_format=False)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            del saved.save_pretrained

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        with own_class(model):
            super()._save(output_dir, state_dict)
        if self.args.should_save and not isinstance(model, PreTrainedModel):
            # The folder of an adapter holds no configuration, but the judge's paradigm and answer tokens are needed.
            model.get_base_model().config.save_pretrained(output_dir or self.args.output_dir)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        missing = set(load_result.missing_keys) - set(getattr(model, "all_tied_weights_keys", {}))
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of the model (first: {sorted(missing)[:3]}) and has "
                f"{len(load_result.unexpected_keys)} unknown ones (first: {sorted(load_result.unexpected_keys)[:3]}). Resume "
                "from a checkpoint that this trainer wrote for the same model, adapter and paradigm."
            )

    def _card(self, model_name: str) -> str:
        model = self.accelerator.unwrap_model(self.model)
        return training_card(model, self.args, self.state, model_name, self._tag_names, self.train_dataset)


def _add_adapter(model: RewardDanceForYesScoring, peft_config: Any, args: RewardDanceTrainingArguments) -> nn.Module:
    require_extra("train", "peft")
    from peft import get_peft_model

    # A judge is no language model to PEFT, whatever the flags of other trainers say by default.
    peft_config = copy(peft_config)
    peft_config.task_type = None
    if getattr(peft_config, "target_modules", "other") is None and not getattr(peft_config, "target_parameters", None):
        peft_config.target_modules = _language_layers(model)
    if model.config.has_scalar_head and "score" not in (peft_config.modules_to_save or []):
        peft_config.modules_to_save = [*(peft_config.modules_to_save or []), "score"]  # the head is new
    model = get_peft_model(model, peft_config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _language_layers(model: RewardDanceForYesScoring) -> str:
    """Expression for the names of all linear layers of the language model, without its head."""
    decoder = model.vlm.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), None)
    if not name or name == model.base_model_prefix:
        return "all-linear"
    kinds = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(name)}\..*\.({'|'.join(sorted(kinds))})"


def _warn_of_low_precision(model: RewardDanceForYesScoring) -> None:
    low = {p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if low:
        logger.warning(
            f"All weights are trained, and they are {', '.join(map(str, low))}, in which small updates are rounded away. Load "
            "the model with `dtype=torch.float32` (`bf16=True` still computes in bfloat16), or pass a `peft_config`."
        )


def _freeze_unused_parameters(model: RewardDanceForYesScoring) -> None:
    """
    Freeze what would never get a gradient, because DDP with gradient checkpointing and resuming with FSDP2 fail on it:
    the language-model head under a scalar head, and what follows the vision layer that LLaVA-like models read.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.has_scalar_head and head is not None and head.weight is not embeddings.weight:
        head.requires_grad_(False)
    layer = getattr(model.config.vlm_config, "vision_feature_layer", None)
    tower = getattr(model.vlm.base_model, "vision_tower", None)
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if isinstance(layer, int) and layers is not None:
        num_used = layer if layer >= 0 else len(layers) + 1 + layer  # hidden state 0 is the input of the first layer
        for unused in layers[num_used:]:
            unused.requires_grad_(False)
        if getattr(tower, "post_layernorm", None) is not None:
            tower.post_layernorm.requires_grad_(False)


def _summarize(preferences: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums, counts and extremes, from which metrics over batches and processes follow."""
    decided = labels != 0.5
    correct = (preferences > 0).double() + 0.5 * (preferences == 0).double()
    scores = scores.double()
    return torch.stack(
        [
            decided.sum().double(),
            (correct * decided).sum(),
            (preferences.double() * decided).sum(),
            torch.tensor(scores.numel(), dtype=torch.double, device=scores.device),
            scores.sum(),
            scores.min(),
            scores.max(),
        ]
    ).float()


def _metrics(summaries: torch.Tensor) -> dict[str, float]:
    decided, correct, preference, count, score = summaries[:, :5].sum(0).tolist()
    metrics = {"mean_reward": score / count, "min_reward": summaries[:, 5].min().item()}
    metrics["max_reward"] = summaries[:, 6].max().item()
    if decided > 0:
        metrics.update(accuracy=correct / decided, margin=preference / decided)
    return metrics


def _resize_images(
    dataset: Any, processor: RewardDanceProcessor, args: RewardDanceTrainingArguments, name: str
) -> Any:
    """A dataset, a dict of them, or None, with images as [`resize_images`] gives them."""
    if isinstance(dataset, dict):
        return {key: _resize_images(rows, processor, args, f"{name}[{key!r}]") for key, rows in dataset.items()}
    return None if dataset is None else resize_images(dataset, processor, args.dataset_num_proc, name)


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    preferences, scores = (torch.as_tensor(array) for array in prediction.predictions)
    return _metrics(_summarize(preferences, scores, torch.as_tensor(prediction.label_ids))[None])


def _check_finite(values: torch.Tensor, mode: str, step: int) -> None:
    if not values.isfinite().all():
        raise ValueError(
            f"{mode.capitalize()} gave NaN or infinite values by step {step}. Checkpoints already written are not affected: "
            "resume from the last one with a smaller `learning_rate`, or in float32 if this was fp16."
        )
