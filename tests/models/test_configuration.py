"""Tests of the configuration: what a checkpoint remembers."""

import json

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText, InternVLConfig

from rewarddance_hf.models import RewardDanceConfig


def test_defaults():
    """Changed defaults would change what old checkpoints mean."""
    config = RewardDanceConfig()
    assert config.vlm_config is None
    assert config.yes_token_id is None
    assert config.no_token_id is None
    assert config.paradigm == "pairwise"
    assert config.score_normalization == "vocabulary"
    assert config.score_temperature == 1.0
    assert config.num_labels == 1
    assert config.model_type == "rewarddance"


def test_json_round_trip(family, vlm_folder, tmp_path):
    """A setting that is lost on the way to the Hub changes scores without a word."""
    config = RewardDanceConfig(
        vlm_config=AutoConfig.from_pretrained(vlm_folder(family)),
        yes_token_id=5,
        no_token_id=7,
        paradigm="pointwise",
        score_normalization="yes_no",
        score_temperature=2.5,
    )
    config.save_pretrained(tmp_path)
    for loaded in (
        RewardDanceConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        RewardDanceConfig.from_dict(json.loads(config.to_json_string())),
    ):
        assert type(loaded) is RewardDanceConfig
        assert type(loaded.vlm_config) is type(config.vlm_config)
        assert loaded.vlm_config.to_dict() == config.vlm_config.to_dict()
        for name in ("yes_token_id", "no_token_id", "paradigm", "score_normalization", "score_temperature"):
            assert getattr(loaded, name) == getattr(config, name)


def test_plain_config_is_wrapped(family, vlm_folder):
    """Any field of a plain model that wrapping drops would give another architecture than the weights were made for."""
    plain = AutoConfig.from_pretrained(vlm_folder(family))
    config = RewardDanceConfig.from_pretrained(vlm_folder(family), paradigm="pointwise")
    assert type(config.vlm_config) is type(plain)
    assert config.vlm_config.to_dict() | {"_name_or_path": ""} == plain.to_dict() | {"_name_or_path": ""}
    assert config.dtype == plain.dtype
    assert config.paradigm == "pointwise"


def test_text_config_is_that_of_the_wrapped_model(family, vlm_folder):
    """Libraries that size heads, caches and adapters ask for the text configuration."""
    config = RewardDanceConfig.from_pretrained(vlm_folder(family))
    assert config.get_text_config() is config.vlm_config.get_text_config()
    assert config.get_text_config(decoder=True).hidden_size == 64
    empty = RewardDanceConfig()
    assert empty.get_text_config() is empty


def test_wrapped_config_is_usable(vlm_folder):
    """The wrapped configuration alone builds the plain model."""
    config = RewardDanceConfig.from_pretrained(vlm_folder("internvl"))
    assert isinstance(config.vlm_config, InternVLConfig)
    assert type(AutoModelForImageTextToText.from_config(config.vlm_config)).__name__ == (
        "InternVLForConditionalGeneration"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paradigm": "generative"}, "`paradigm` is 'generative', but must be one of"),
        ({"score_normalization": "softmax"}, "`score_normalization` is 'softmax', but must be one of"),
        ({"score_temperature": 0}, "`score_temperature` is 0, but must be a positive number"),
        ({"score_temperature": -1.0}, "`score_temperature` is -1.0"),
        ({"score_temperature": float("nan")}, "`score_temperature` is nan"),
        ({"score_temperature": float("inf")}, "`score_temperature` is inf"),
        ({"num_labels": 2}, "`num_labels` is 2, but a reward model has one reward"),
        ({"vlm_config": {"model_type": "internvl_chat"}}, "`model_type='internvl_chat'`, which this version"),
        ({"vlm_config": {}}, "`model_type=None`"),
    ],
)
def test_invalid_values(arguments, message):
    """A wrong setting is refused when it is made, not when scores look odd."""
    with pytest.raises(ValueError, match=message):
        RewardDanceConfig(**arguments)


def test_unknown_model_type_in_a_folder(tmp_path):
    """Checkpoints that need code of their own (the original InternVL) are refused with the way out."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    with pytest.raises(ValueError, match=r"for InternVL: a `\*-HF` checkpoint"):
        RewardDanceConfig.from_pretrained(tmp_path)
