"""RewardDance model: a vision-language model whose probability of answering "yes" is the reward."""

import inspect
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple, logging

from .checkpoints_rewarddance import (
    ADAPTER_FILES,
    CONFIG_OVERRIDES,
    HUB_ARGUMENTS,
    PICKLED_ADAPTER_FILES,
    AdapterSource,
    find_adapter,
    refuse_pickles,
)
from .configuration_rewarddance import RewardDanceConfig
from .head_rewarddance import answers_in_float32, head_at_positions
from .processing_rewarddance import RewardDanceProcessor


logger = logging.get_logger(__name__)

# Transformers 5.24 renamed `past_key_values`, in outputs and inputs.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
PIXEL_ARGUMENTS = ("pixel_values", "flattened_patches")
# Where images may be: a wrapped model that gets none of these reads the placeholders as text and answers all the same.
IMAGE_ARGUMENTS = (*PIXEL_ARGUMENTS, "mm_encoder_outputs", "inputs_embeds", "past_key_values", "cache")


@dataclass
class RewardDanceOutput(ModelOutput):
    """
    Output of [`RewardDanceForYesScoring`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Mean cross-entropy of answers, plus that of rationales where `rationale_labels` is given.
        logits (`torch.FloatTensor` of shape `(batch_size, 1)`):
            Log-odds `log P("yes") - log P("no")`, or output of the scalar head of the regressive paradigm.
        scores (`torch.FloatTensor` of shape `(batch_size,)`):
            Rewards in `[0, 1]`: `P("yes")` (Eq. 2), or sigmoid of `logits` in the regressive paradigm.
        answer_log_probs (`torch.FloatTensor` of shape `(batch_size, 2)`, *optional*):
            `log P("yes")` and `log P("no")` over the whole vocabulary. Generative paradigms only.
        rationale_loss (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
            Mean cross-entropy over the rationale's tokens of each row, 0 for rows without one.
        cache (`Cache`, *optional*, returned when `use_cache=True`):
            Key/value states of the wrapped model.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned when `output_hidden_states=True`):
            Hidden states of the wrapped model.
        attentions (`tuple[torch.FloatTensor]`, *optional*, returned when `output_attentions=True`):
            Attention weights of the wrapped model.
    """

    loss: "torch.FloatTensor | None" = None
    logits: "torch.FloatTensor | None" = None
    scores: "torch.FloatTensor | None" = None
    answer_log_probs: "torch.FloatTensor | None" = None
    rationale_loss: "torch.FloatTensor | None" = None
    cache: "Any | None" = None
    hidden_states: "tuple[torch.FloatTensor, ...] | None" = None
    attentions: "tuple[torch.FloatTensor, ...] | None" = None


class RewardDancePreTrainedModel(PreTrainedModel):
    """Base of RewardDance models: everything but the score is passed through to the wrapped model."""

    config_class = RewardDanceConfig
    base_model_prefix = "vlm"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class RewardDanceForYesScoring(RewardDancePreTrainedModel):
    r"""
    Vision-language model that judges a generated image or clip by the probability of the token "yes" (Eq. 2 of the
    [RewardDance paper](https://huggingface.co/papers/2509.08826)).

    `from_pretrained` takes a RewardDance checkpoint, or a plain one of a decoder-only image-text-to-text model of
    transformers, which is then a zero-shot judge.

    Args:
        config ([`RewardDanceConfig`]):
            Configuration with that of wrapped model in `vlm_config`.

    Raises:
        `ValueError`: If `config.vlm_config` is missing or not that of a decoder-only image-text-to-text model, or that
            model takes no images.

    Example:

    ```python
    from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor

    model = RewardDanceForYesScoring.from_pretrained("OpenGVLab/InternVL3_5-2B-HF", dtype="auto")
    processor = RewardDanceProcessor.from_pretrained("OpenGVLab/InternVL3_5-2B-HF")
    batch = processor(images=[sample], prompts=["a red circle"], references=[reference])
    model(**batch).scores
    ```
    """

    def __init__(self, config: RewardDanceConfig) -> None:
        super().__init__(config)
        if type(config.vlm_config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"`config.vlm_config` is of model type {getattr(config.vlm_config, 'model_type', None)!r}, but "
                f"`{type(self).__name__}` wraps an image-text-to-text model. Start from a checkpoint that "
                "`AutoModelForImageTextToText` can load, e.g. `OpenGVLab/InternVL3_5-2B-HF`."
            )
        if config.vlm_config.is_encoder_decoder:
            raise ValueError(
                f"`config.vlm_config` is of model type {config.vlm_config.model_type!r}, an encoder-decoder, but the answer "
                "must follow the question in one sequence. Start from a decoder-only model, e.g. "
                "`OpenGVLab/InternVL3_5-2B-HF`."
            )
        self.vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        _check_can_judge(self.vlm)
        if config.has_scalar_head:
            self.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """
        Load a RewardDance checkpoint, wrap that of a plain vision-language model, or put an adapter on either.

        Answer token IDs that the checkpoint does not know are looked up with its processor. An adapter is put on the base
        model that it names, and stays an adapter when saved again; a RewardDance `config.json` beside it replaces the
        base model's. Arguments are those of [`~transformers.PreTrainedModel.from_pretrained`]; fields of
        [`RewardDanceConfig`] (`paradigm`, `score_normalization`, ...) are accepted too. `use_safetensors` is always true.

        Raises:
            `ValueError`: If weights are missing in the checkpoint or stored in pickle files, or it is not that of an
                image-text-to-text model.
            `ImportError`: If an adapter is to be loaded without peft.
        """
        return_loading_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        adapter = find_adapter(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            if adapter.name != os.fspath(pretrained_model_name_or_path):
                kwargs.pop("config", None)  # `AutoModel` has read that of the base model
            model, loading_info = cls._from_adapter(adapter, *model_args, **kwargs)
        else:
            model, loading_info = cls._from_all_weights(pretrained_model_name_or_path, *model_args, **kwargs)
        return (model, loading_info) if return_loading_info else model

    @classmethod
    def _from_adapter(cls, adapter: AdapterSource, *model_args: Any, **kwargs: Any) -> "tuple[Any, dict[str, Any]]":
        refuse_pickles(adapter.name, adapter.arguments, ADAPTER_FILES, PICKLED_ADAPTER_FILES)
        kwargs = {k: v for k, v in kwargs.items() if k not in (*HUB_ARGUMENTS, "adapter_kwargs")}
        if kwargs.get("config") is None:
            overrides = {k: kwargs.pop(k) for k in CONFIG_OVERRIDES if k in kwargs}
            source, arguments = adapter.source_of("config.json")
            kwargs["config"] = RewardDanceConfig.from_pretrained(source, **arguments, **overrides)
            # An adapter that was trained on a base model quantized on the fly knows of it, but its base model does not.
            base_config, _ = RewardDanceConfig.get_config_dict(adapter.base, **adapter.base_arguments)
            kwargs["config"].quantization_config = base_config.get("quantization_config")
            if kwargs["config"].quantization_config is None:
                del kwargs["config"].quantization_config
        config = kwargs["config"]
        if not config.has_scalar_head and config.yes_token_id is None:
            source, arguments = adapter.source_of("processor_config.json")
            processor = RewardDanceProcessor.from_pretrained(source, **arguments)
            config.yes_token_id, config.no_token_id = processor.yes_token_id, processor.no_token_id
        model, loading_info = cls._from_all_weights(adapter.base, *model_args, **adapter.base_arguments, **kwargs)
        missing = set(model.load_adapter(adapter.name, adapter_kwargs=adapter.arguments).missing_keys)
        if missing:
            raise ValueError(
                f"Adapter {adapter.name!r} lacks {len(missing)} weights that its `adapter_config.json` announces (first: "
                f"{sorted(missing)[:3]}), which would be random numbers. Save or download it again."
            )
        if "score" in (adapter.settings.get("modules_to_save") or []):
            loading_info["missing_keys"] = set(loading_info["missing_keys"]) - {"score.weight"}
        return model, loading_info

    @classmethod
    def _from_all_weights(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> "tuple[Any, dict[str, Any]]":
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if pretrained_model_name_or_path is not None:
            refuse_pickles(pretrained_model_name_or_path, hub_arguments, variant=kwargs.get("variant"))
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        missing = set(loading_info["missing_keys"])
        if "score.weight" in missing:
            # The scalar head is new when the regressive paradigm starts from a model of another kind.
            saved, _ = RewardDanceConfig.get_config_dict(pretrained_model_name_or_path, **hub_arguments)
            if saved.get("paradigm") != "regressive":
                missing.remove("score.weight")
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path!r} lacks {len(missing)} weights of its own architecture (first: "
                f"{sorted(missing)[:3]}), which would be random numbers. Download it again, or check that `config.json` belongs "
                "to these weights."
            )
        if not model.config.has_scalar_head and model.config.yes_token_id is None:
            try:
                processor = RewardDanceProcessor.from_pretrained(pretrained_model_name_or_path, **hub_arguments)
            except (OSError, TypeError) as error:
                logger.warning(
                    f"No processor was found in {pretrained_model_name_or_path!r} ({error}). Call "
                    "`model.check_processor(processor)` before scoring, so that the answer tokens are known."
                )
            else:
                model.check_processor(processor)
        return model, loading_info

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vlm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.vlm.set_output_embeddings(new_embeddings)

    def check_processor(self, processor: RewardDanceProcessor) -> None:
        """
        Make sure that a processor asks for the answers that the model reads; a model that knows none takes them over.

        Args:
            processor ([`RewardDanceProcessor`]):
                Processor to be used with this model.

        Raises:
            `ValueError`: If answer token IDs of model and processor differ.
        """
        if self.config.has_scalar_head:
            return
        got = (processor.yes_token_id, processor.no_token_id)
        if self.config.yes_token_id is None:
            self.config.yes_token_id, self.config.no_token_id = got
        wanted = (self.config.yes_token_id, self.config.no_token_id)
        if got != wanted:
            raise ValueError(
                f"`processor` answers with token IDs {got} (yes, no), but the model reads {wanted}. Load both from the "
                "same checkpoint."
            )

    @can_return_tuple
    def forward(
        self,
        input_ids: "torch.LongTensor | None" = None,
        attention_mask: "torch.Tensor | None" = None,
        labels: "torch.Tensor | None" = None,
        rationale_labels: "torch.LongTensor | None" = None,
        answer_index: "torch.LongTensor | None" = None,
        **kwargs: Any,
    ) -> RewardDanceOutput:
        r"""
        Score a batch made by [`RewardDanceProcessor`].

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Token IDs, padded on the left.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Target probabilities of "yes" in `[0, 1]`; 0.5 is a tie. Generative paradigms only.
            rationale_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token IDs of rationales in place, -100 elsewhere. Logits are computed only where they are needed.
            answer_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Position that is followed by the answer; required with `rationale_labels`, else the last position.
            kwargs:
                Inputs of the wrapped model: `pixel_values`, `cache`, `use_cache`, `output_hidden_states`, ...

        Returns:
            [`RewardDanceOutput`], or a tuple with `return_dict=False`.

        Raises:
            `ValueError`: If images are missing, a question ends in padding, the answer tokens are not known, or
            rationales are given to a model whose language-model head is not known.
        """
        kwargs.pop("num_items_in_batch", None)
        kwargs.setdefault("use_cache", False)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if all(kwargs.get(name) is None for name in IMAGE_ARGUMENTS):
            raise ValueError(
                f"None of {IMAGE_ARGUMENTS} was given, so that the images would not be seen. Pass all that the "
                "processor returns; with a Trainer, set `remove_unused_columns=False`."
            )
        if (rationale_labels is None) != (answer_index is None):
            names = ("rationale_labels", "answer_index")
            given, other = names if answer_index is None else reversed(names)
            raise ValueError(
                f"`{given}` was given without `{other}`, but the answer is not at the end of a batch that has both. Make "
                "batches with `DataCollatorForRewardDance`."
            )
        self._check_padding(attention_mask, answer_index)
        if self.config.has_scalar_head:
            if labels is not None or rationale_labels is not None:
                raise ValueError(
                    f"`{'rationale_labels' if labels is None else 'labels'}` was given, but the regressive paradigm has no loss "
                    "of its own: it compares two samples. Train it with `RewardDanceTrainer`, or apply `bradley_terry_loss` to `logits`."
                )
            outputs = self.vlm.base_model(**inputs)
            last = outputs.last_hidden_state[:, -1].to(
                self.score.weight.dtype
            )  # a head that is trained stays in float32
            logits = self.score(last).float()  # (batch_size, 1)
            logits = logits / self.config.score_temperature
            return RewardDanceOutput(logits=logits, scores=logits[:, 0].sigmoid(), **_passed_through(outputs))

        if self.config.yes_token_id is None or self.config.no_token_id is None:
            raise ValueError(
                f"`config.yes_token_id` is {self.config.yes_token_id} and `config.no_token_id` is "
                f"{self.config.no_token_id}, but scoring needs both. Call `model.check_processor(processor)` once."
            )
        rationale_loss = None
        answer_ids = [self.config.yes_token_id, self.config.no_token_id]
        with answers_in_float32(self.get_output_embeddings(), answer_ids):
            if rationale_labels is None or answer_index is None:
                outputs = self.vlm(**inputs, logits_to_keep=1)
                answer_logits = outputs.logits[:, -1].float()  # (batch_size, vocab_size)
            else:
                outputs, answer_logits, rationale_loss = self._forward_with_rationales(
                    inputs, rationale_labels, answer_index
                )

        log_probs = (answer_logits / self.config.score_temperature).log_softmax(-1)
        answers = torch.tensor(answer_ids, device=log_probs.device)
        answer_log_probs = log_probs.index_select(-1, answers)  # (batch_size, 2)
        logits = answer_log_probs[:, :1] - answer_log_probs[:, 1:]
        if self.config.score_normalization == "vocabulary":
            scores = answer_log_probs[:, 0].exp()  # Eq. 2
        else:
            scores = logits[:, 0].sigmoid()

        loss = None
        if labels is not None:
            if labels.shape != scores.shape:
                raise ValueError(
                    f"`labels` has shape {tuple(labels.shape)}, but must hold one target per row: {tuple(scores.shape)}."
                )
            labels = labels.to(answer_log_probs)
            targets = torch.stack([labels, 1 - labels], dim=-1)
            loss = -(targets * answer_log_probs).sum(-1).mean()
            if rationale_loss is not None:
                loss = loss + rationale_loss.mean()
        return RewardDanceOutput(
            loss=loss,
            logits=logits,
            scores=scores,
            answer_log_probs=answer_log_probs,
            rationale_loss=rationale_loss,
            **_passed_through(outputs),
        )

    def _forward_with_rationales(
        self, inputs: "dict[str, Any]", rationale_labels: torch.Tensor, answer_index: torch.Tensor
    ) -> "tuple[ModelOutput, torch.Tensor, torch.Tensor]":
        """Answer logits `(batch_size, vocab_size)` and rationale losses `(batch_size,)` of teacher-forced targets."""
        batch_size, length = rationale_labels.shape
        next_labels = nn.functional.pad(rationale_labels[:, 1:], (0, 1), value=-100)
        is_answer = torch.zeros(batch_size, length, dtype=torch.bool, device=rationale_labels.device)
        is_answer[torch.arange(batch_size, device=is_answer.device), answer_index] = True
        rows, columns = (is_answer | (next_labels != -100)).nonzero(as_tuple=True)
        head = self.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"`rationale_labels` was given, but `{type(self.vlm).__name__}` does not tell its language-model head "
                "(`get_output_embeddings` is None), which rationales are trained through. Train without them."
            )
        with head_at_positions(head, rows, columns):
            outputs = self.vlm(**inputs)
        logits = outputs.logits[0].float()  # (labelled positions, vocab_size)

        targets = next_labels[rows, columns]
        token_losses = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        counts = (next_labels != -100).sum(-1).clamp(min=1)
        rationale_loss = token_losses.new_zeros(batch_size).index_add(0, rows, token_losses) / counts
        return outputs, logits[is_answer[rows, columns]], rationale_loss

    def _check_padding(self, attention_mask: "torch.Tensor | None", answer_index: "torch.Tensor | None") -> None:
        if attention_mask is None or torch.compiler.is_compiling():
            return
        last = attention_mask[:, -1]
        if answer_index is not None:
            last = attention_mask.gather(1, answer_index[:, None])[:, 0]
        if not last.all():
            raise ValueError(
                f"Questions end in padding in {int((last == 0).sum())} of {len(last)} rows, but "
                f"`{type(self).__name__}` reads the position before the answer and requires left padding. Set "
                '`processor.tokenizer.padding_side = "left"`.'
            )


def _check_can_judge(vlm: nn.Module) -> None:
    """Refuse what is registered as an image-text-to-text model, but takes no images, or more than images and text."""
    parameters = inspect.signature(vlm.forward).parameters
    given = ("input_ids", "qformer_input_ids", *PIXEL_ARGUMENTS)
    wanted = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    further = [name for name in wanted if name not in given]
    if further or not parameters.keys() & set(PIXEL_ARGUMENTS):
        fault = f"needs {further} beside images and text" if further else "takes no images"
        raise ValueError(
            f"`config.vlm_config` is of model type {vlm.config.model_type!r}, and `{type(vlm).__name__}` {fault}, so that it "
            "cannot be a judge. Start from a model that answers questions about images, e.g. `OpenGVLab/InternVL3_5-2B-HF`."
        )


def _passed_through(outputs: Any) -> "dict[str, Any]":
    """Outputs of the wrapped model other than its logits."""
    names = {"cache": CACHE_NAME, "hidden_states": "hidden_states", "attentions": "attentions"}
    return {name: outputs.get(theirs) for name, theirs in names.items()}


__all__ = ["RewardDanceForYesScoring", "RewardDanceOutput", "RewardDancePreTrainedModel"]
