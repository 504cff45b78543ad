"""transformers' own tests of models and processors, run on the judges of two families: `make test-mixins`."""

import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
from tiny_vlms import FAMILIES

from rewarddance_hf import RewardDanceConfig, RewardDanceForYesScoring


SOURCE = Path(os.environ.get("TRANSFORMERS_TESTS", "outputs/transformers_tests"))


def import_mixins():
    """
    Import the mixins from the tests in the source distribution of transformers. It has no tests of export and generation,
    which do not concern a model that generates nothing; their mixins, which others inherit, are empty here.
    """
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE)]
    sys.modules[package.__name__] = package
    for name, mixin in {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}.items():
        module = types.ModuleType(f"transformers_tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[module.__name__.rpartition(".")[0]] = types.ModuleType(module.__name__.rpartition(".")[0])
        sys.modules[module.__name__] = module
    files = types.ModuleType("fetch_hub_objects_for_ci")
    files.url_to_local_path = lambda url, *args, **kwargs: url
    sys.modules[files.__name__] = files
    return (
        importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin,
        importlib.import_module("transformers_tests.test_processing_common").ProcessorTesterMixin,
    )


ModelTesterMixin, ProcessorTesterMixin = import_mixins()


class JudgeTester:
    """Configuration and inputs of a tiny judge."""

    batch_size = 2
    is_training = True

    def __init__(self, family: str) -> None:
        self.vlm_config, self.vlm_processor = FAMILIES[family]()

    def get_config(self):
        if os.environ.get("PLAIN"):
            return self.vlm_config
        return RewardDanceConfig(vlm_config=self.vlm_config, yes_token_id=290, no_token_id=291)

    def prepare_config_and_inputs_for_common(self):
        from tiny_vlms import random_image

        image_token = self.vlm_processor.image_token
        texts = [f"a red circle {image_token} yes or no", f"{image_token} two blue squares of the image, yes or no"]
        images = [[random_image(i, 28, 28)] for i in range(2)]
        inputs = dict(self.vlm_processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"))
        return self.get_config(), inputs


class ModelTests(ModelTesterMixin):
    all_model_classes = (RewardDanceForYesScoring,)
    _is_composite = True
    test_resize_embeddings = True

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = JudgeTester(self.family)
        if os.environ.get("PLAIN"):
            from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            self.all_model_classes = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self.model_tester.vlm_config)],)


class InternVLModelTest(ModelTests, unittest.TestCase):
    family = "internvl"


class Qwen25VLModelTest(ModelTests, unittest.TestCase):
    family = "qwen2_5_vl"
