"""Flags and YAML files of the scripts."""

import pytest

from rewarddance_hf.scripts import train, tune


@pytest.mark.parametrize("null", ["null", "None"])
def test_what_a_file_sets_can_be_unset(null, tmp_path):
    """What may be None can be said on the command line, in lists and where only some values are allowed too."""
    config = tmp_path / "recipe.yaml"
    config.write_text("rationale: mixed\nlora_target_modules: [q_proj]\nmax_grad_norm: 0.5\neval_steps: 7\n")
    flags = ["--config", str(config), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    _, kept, model = train.make_parser().parse_args_and_config(flags)
    assert (kept.rationale, kept.eval_steps, model.lora_target_modules) == ("mixed", 7, "q_proj")
    flags += ["--rationale", null, "--lora_target_modules", null, f"--eval_steps={null}", "--report_to", "none"]
    _, unset, model = train.make_parser().parse_args_and_config(flags)
    assert (unset.rationale, unset.eval_steps, model.lora_target_modules) == (None, None, None)
    assert unset.report_to == []  # None would mean all
    with pytest.raises(SystemExit):  # a number that may not be None
        train.make_parser().parse_args_and_config([*flags, "--max_grad_norm", null])


def test_none_that_is_a_value(tmp_path):
    """Where "none" is one of the values it stays one."""
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--reward_transform", "none"]
    assert tune.make_parser().parse_args_and_config(flags)[1].reward_transform == "none"


@pytest.mark.parametrize(
    ("script", "flags", "missing"),
    [
        (train, [], "model_name_or_path"),
        (train, ["--model", "org/vlm"], "dataset_name"),
        (tune, [], "model_name_or_path"),
        (tune, ["--pipeline", "org/pipeline"], "judge"),
        (tune, ["--pipeline", "org/pipeline", "--judge", "org/judge"], "dataset_name"),
    ],
)
def test_what_is_needed_is_asked_for_at_once(script, flags, missing, tmp_path):
    """The Hub used to be asked for a model called "None"."""
    parsed = script.make_parser().parse_args_and_config([*flags, "--output_dir", str(tmp_path), "--use_cpu", "true"])
    with pytest.raises(ValueError, match=f"`{missing}` is None, but is needed"):
        script.main(*parsed)
