"""transformers' own tests of models and processors, run on the judges of two families: `make test-mixins`."""

import copy
import functools
import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
from tiny_vlms import FAMILIES, random_image, save_tiny_vlm

from rewarddance_hf import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor


SOURCE = Path(os.environ.get("TRANSFORMERS_TESTS", "outputs/transformers_tests"))
if not SOURCE.exists():
    pytest.skip(f"{SOURCE} is missing: `make test-mixins` fetches it", allow_module_level=True)


def import_mixins():
    """
    Import the mixins from the tests in the source distribution of transformers, which lacks those of export and of
    generation. They do not concern a model that generates nothing: their mixins, which others inherit, are empty here.
    """
    image = Path(tempfile.mkdtemp()) / "image.png"  # for tests that would read one from the Hub
    random_image(0, 64, 64).save(image)
    names = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    modules = {
        "transformers_tests": {"__path__": [str(SOURCE)]},
        "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: str(image)},
    }
    for name, mixin in names.items():
        modules[f"transformers_tests.{name.partition('.')[0]}"] = {}
        modules[f"transformers_tests.{name}"] = {mixin: type(mixin, (), {})}
    for name, contents in modules.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(contents)
    return (
        importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin,
        importlib.import_module("transformers_tests.test_processing_common").ProcessorTesterMixin,
    )


ModelTesterMixin, ProcessorTesterMixin = import_mixins()


def expect_failures(reasons: dict[str, str]):
    """
    Decorator of a class of tests: those whose names begin so must fail or be skipped, for a reason. One that passes must
    leave the list.
    """

    def mark(test_class: type) -> type:
        for beginning, reason in reasons.items():
            names = [n for n in dir(test_class) if n.startswith(beginning) and callable(getattr(test_class, n))]
            assert names, beginning
            for name in names:
                test = getattr(test_class, name)

                def run(self, test=test):
                    return test(self)

                run = pytest.mark.xfail(reason=reason, strict=True)(functools.wraps(test)(run))
                setattr(test_class, name, run)
        return test_class

    return mark


class JudgeTester:
    """Configuration and inputs of a tiny judge."""

    batch_size = 7  # as many as the tests of attention take, which cannot add rows with images
    is_training = True

    def __init__(self, family: str) -> None:
        self.vlm_config, self.vlm_processor = FAMILIES[family]()
        # The tests clamp IDs to a smaller vocabulary: those of images must stay.
        self.vlm_config.text_config.vocab_size += 32
        self.text_config = self.vlm_config.text_config.to_dict()
        self.vision_config = self.vlm_config.vision_config.to_dict()
        self.num_hidden_layers = self.text_config["num_hidden_layers"]
        self.num_attention_heads = self.text_config["num_attention_heads"]
        self.hidden_size = self.text_config["hidden_size"]
        placeholder = {"internvl": "<IMG_CONTEXT>", "qwen2_5_vl": "<|image_pad|>"}[family]
        texts = [f"{placeholder} " + "yes or no " * (1 + row % 2) for row in range(self.batch_size)]
        images = [[random_image(row, 28, 28)] for row in range(self.batch_size)]
        self.inputs = dict(
            self.vlm_processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        )
        self.seq_length = self.inputs["input_ids"].shape[1]

    def get_config(self):
        return RewardDanceConfig(vlm_config=copy.deepcopy(self.vlm_config), yes_token_id=290, no_token_id=291)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), copy.deepcopy(self.inputs)


class ModelTests(ModelTesterMixin):
    """All that transformers tests of its own models."""

    all_model_classes = (RewardDanceForYesScoring,)
    _is_composite = True
    family: str

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = JudgeTester(self.family)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:
            inputs["labels"] = torch.ones(len(inputs["input_ids"]))
        for name, value in self.model_tester.inputs.items():  # of tests that give text alone
            if name not in ("input_ids", "attention_mask", "labels"):
                inputs.setdefault(name, value)
        return inputs


RIGHT_PADDING = {
    f"test_eager_matches_sdpa_inference_{number:02}_": "a judge reads the last position, and refuses padding on the right"
    for number in (4, 5, 12, 13, 20, 21)
}
MODELS = {
    **RIGHT_PADDING,
    "test_model_weights_reload_no_missing_tied_weights": "a judge refuses a checkpoint that lacks weights",
    "test_tied_weights_keys": "embeddings are tied by a setting of `vlm_config`, which the test sets in the judge's own",
}


@expect_failures(MODELS)
class InternVLModelTest(ModelTests, unittest.TestCase):
    family = "internvl"


@expect_failures(MODELS)
class Qwen25VLModelTest(ModelTests, unittest.TestCase):
    family = "qwen2_5_vl"


class ProcessorTests(ProcessorTesterMixin):
    """What transformers tests of its own processors."""

    processor_class = RewardDanceProcessor
    family: str

    @classmethod
    def setUpClass(cls) -> None:
        cls.tmpdirname, cls.full_tmpdirname = tempfile.mkdtemp(), None
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_vlm(cls.family, Path(folder))
            RewardDanceProcessor.from_pretrained(folder).save_pretrained(cls.tmpdirname)

    @classmethod
    def prepare_processor_dict(cls):
        saved, _ = RewardDanceProcessor.get_processor_dict(cls.tmpdirname)
        names = ("chat_template", "vlm_processor_class", "vlm_processor_kwargs")
        return {name: saved[name] for name in names if saved[name]}

    def prepare_components(self, **kwargs):
        return {**self.prepare_processor_dict(), **super().prepare_components(**kwargs)}

    def get_component(self, attribute, use_tiny_ckpt=True, **kwargs):
        return super().get_component(
            attribute, **kwargs, **({"backend": "pil"} if attribute == "image_processor" else {})
        )


OTHER_CALL = "a judge's processor is called with images and prompts, and writes the question itself"
PROCESSORS = {
    "test_args_overlap_kwargs": "the parts are no arguments of `from_pretrained`, which reads them from the checkpoint",
    "test_call_arguments_default_none": "`reasons_first` and `return_tensors` are plain arguments of a call",
    "test_call_arguments_not_in_attributes": "`criteria` of a call replace those of the processor",
    "test_call_arguments_not_in_processor_kwargs": "`return_tensors` is an argument of its own",
    "test_chat_template_save_loading": "a template in which an answer is no single token is refused",
    "test_doubly_passed_kwargs": OTHER_CALL,
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": OTHER_CALL,
    "test_init_arguments_not_in_processor_kwargs": "`fps` and `num_frames` belong to the checkpoint: a judge sees clips as in training",
    "test_kwargs_overrides_default_subprocessor_kwargs": OTHER_CALL,
    "test_model_input_names": OTHER_CALL,
    "test_overlapping_text_image_kwargs_handling": OTHER_CALL,
    "test_processor_from_and_save_pretrained": "saving notes the code that travels with a checkpoint (`auto_map`)",
    "test_processor_with_multiple_inputs": OTHER_CALL,
    "test_replacement_offsets": "the test takes the first parent class for `ProcessorMixin`",
    "test_structured_kwargs_nested_from_dict": OTHER_CALL,
    "test_subprocessor_defaults_preserved_by_kwargs": OTHER_CALL,
    "test_tokenizer_decode_defaults": "the test gives the parts alone; a judge also needs the class of the wrapped processor",
    "test_unstructured_kwargs": OTHER_CALL,
}


@expect_failures({**PROCESSORS, "test_apply_chat_template_image": "InternVL cuts an image into several tiles"})
class InternVLProcessorTest(ProcessorTests, unittest.TestCase):
    family = "internvl"


@expect_failures(PROCESSORS)
class Qwen25VLProcessorTest(ProcessorTests, unittest.TestCase):
    family = "qwen2_5_vl"
