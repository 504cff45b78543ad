"""RewardDance model configuration."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


PARADIGMS = ("pairwise", "pointwise", "regressive")
SCORE_NORMALIZATIONS = ("vocabulary", "yes_no")
# Of `quantization_config`: modules that are not quantized, by name
SKIPPED_MODULES = ("llm_int8_skip_modules", "modules_to_not_convert")


class RewardDanceConfig(PretrainedConfig):
    r"""
    Configuration of a [`RewardDanceForYesScoring`] model: what a checkpoint remembers.

    Args:
        vlm_config (`PretrainedConfig` or `dict`, *optional*):
            Configuration of wrapped vision-language model.
        yes_token_id (`int`, *optional*):
            Token ID whose probability is the reward (Eq. 2 of the
            [RewardDance paper](https://huggingface.co/papers/2509.08826)). Found by [`RewardDanceProcessor`].
        no_token_id (`int`, *optional*):
            Token ID of the opposite answer.
        paradigm (`str`, *optional*, defaults to `"pairwise"`):
            Training variant (Section 3.2.3): `"pairwise"` (reference and sample, generative), `"pointwise"` (sample
            only, generative) or `"regressive"` (sample only, scalar head on last hidden state).
        score_normalization (`str`, *optional*, defaults to `"vocabulary"`):
            `"vocabulary"` makes `scores` the probability of "yes" among all tokens (Eq. 2), `"yes_no"` its probability
            among the two answers. Does not matter to the regressive paradigm.
        score_temperature (`float`, *optional*, defaults to `1.0`):
            Positive number that divides logits before they become scores. Fitted by [`RewardDanceEvaluator`].
        num_labels (`int`, *optional*, defaults to `1`):
            Number of rewards of a sample. Only `1` is supported.

    Raises:
        `ValueError`: If `paradigm`, `score_normalization`, `score_temperature` or `num_labels` is not one of the above.
    """

    model_type = "rewarddance"
    sub_configs = {"vlm_config": AutoConfig}

    def __init__(
        self,
        vlm_config: "PretrainedConfig | dict[str, Any] | None" = None,
        yes_token_id: "int | None" = None,
        no_token_id: "int | None" = None,
        paradigm: str = "pairwise",
        score_normalization: str = "vocabulary",
        score_temperature: float = 1.0,
        num_labels: int = 1,
        **kwargs: Any,
    ) -> None:
        if isinstance(vlm_config, dict):
            vlm_config = _config_from_dict(vlm_config)
        self.vlm_config = vlm_config
        self.yes_token_id = yes_token_id
        self.no_token_id = no_token_id
        self.paradigm = paradigm
        self.score_normalization = score_normalization
        self.score_temperature = score_temperature
        if paradigm not in PARADIGMS:
            raise ValueError(f"`paradigm` is {paradigm!r}, but must be one of {PARADIGMS}.")
        if score_normalization not in SCORE_NORMALIZATIONS:
            raise ValueError(
                f"`score_normalization` is {score_normalization!r}, but must be one of {SCORE_NORMALIZATIONS}."
            )
        if not 0 < score_temperature < float("inf"):
            raise ValueError(
                f"`score_temperature` is {score_temperature!r}, but must be a positive number. `1.0` leaves scores as they are."
            )
        if num_labels != 1:
            raise ValueError(
                f"`num_labels` is {num_labels!r}, but a reward model has one reward per sample: leave it at 1."
            )
        super().__init__(num_labels=num_labels, **kwargs)

    @property
    def uses_reference(self) -> bool:
        """`bool`: Whether a question shows a reference beside the sample."""
        return self.paradigm == "pairwise"

    @property
    def has_scalar_head(self) -> bool:
        """`bool`: Whether the reward is the output of a scalar head, and not the probability of an answer."""
        return self.paradigm == "regressive"

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> "tuple[dict[str, Any], dict[str, Any]]":
        """Read a configuration file; that of a plain vision-language model becomes `vlm_config` of a new judge."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict and config_dict.get("model_type") != cls.model_type:
            dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
            quantization = config_dict.pop("quantization_config", None)
            config_dict = {"model_type": cls.model_type, "vlm_config": config_dict, "dtype": dtype}
            if quantization is not None:
                config_dict["quantization_config"] = _for_wrapped_model(quantization)
        return config_dict, kwargs

    def __getattr__(self, name: str) -> Any:
        """
        Parts of the wrapped model's configuration by their own names (`vision_config`, ...): conversions of weights
        look for them on this configuration, and would otherwise permute weights by a default.
        """
        vlm_config = vars(self).get("vlm_config")
        if vlm_config is not None and (name in vlm_config.sub_configs or name == "num_attention_heads"):
            return getattr(vlm_config, name)
        raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`.")

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """Configuration of the language model inside the wrapped vision-language model."""
        if self.vlm_config is None:
            return self
        return self.vlm_config.get_text_config(*args, **kwargs)


def _for_wrapped_model(quantization: "dict[str, Any]") -> "dict[str, Any]":
    """How stored weights are quantized, with the names that modules have within `RewardDanceForYesScoring`."""
    names = {key: quantization[key] for key in SKIPPED_MODULES if quantization.get(key)}
    return {**quantization, **{key: [*value, *(f"vlm.{name}" for name in value)] for key, value in names.items()}}


def _config_from_dict(vlm_config: "dict[str, Any]") -> PretrainedConfig:
    model_type = vlm_config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`vlm_config` has `model_type={model_type!r}`, which this version of transformers does not know. Upgrade "
            "transformers, or start from a vision-language model that is part of it (for InternVL: a `*-HF` checkpoint)."
        )
    return CONFIG_MAPPING[model_type].from_dict(vlm_config)


__all__ = ["RewardDanceConfig"]
