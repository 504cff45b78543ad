"""What the engine does on a CPU beside products (`test_products.py`): the same scores from less work, and a model as it was."""

import itertools
import subprocess
import sys

import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.scoring.engine import attention


IMAGES = [random_image(i, 40, 40) for i in range(3)]
QUESTIONS = [Question(IMAGES[j], "a red circle", IMAGES[i]) for i, j in itertools.permutations(range(3), 2)]


@pytest.fixture
def make_scorer(vlm_folder):
    """Function that makes a scorer on a tiny model of its own."""

    def make(family, **settings):
        torch.manual_seed(0)
        model = RewardDanceForYesScoring.from_pretrained(vlm_folder(family)).requires_grad_(False)
        return RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(vlm_folder(family)), **settings)

    return make


def text_model_of(scorer):
    base_model = scorer.model.vlm.base_model
    return getattr(base_model, "language_model", None) or base_model.text_model


def assert_scores_are_plain(scorer):
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    with torch.no_grad():
        pairs = zip(scorer.ask(QUESTIONS), plain.ask(QUESTIONS), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.every_family
def test_last_layer_computes_answers_alone(make_scorer, family):
    """Behind the attention of the last layer there is one position of each part; before, and in a graph, all are there."""
    scorer = make_scorer(family)
    *_, before, last = text_model_of(scorer).layers
    lengths = {"before": [], "last": []}
    before.mlp.down_proj.register_forward_pre_hook(lambda module, given: lengths["before"].append(given[0].shape[1]))
    last.mlp.down_proj.register_forward_pre_hook(lambda module, given: lengths["last"].append(given[0].shape[1]))
    with torch.no_grad():
        scorer.ask(QUESTIONS)
    assert min(lengths["before"]) > 1
    assert set(lengths["last"]) == {1}
    assert_scores_are_plain(scorer)
    lengths["last"].clear()
    scorer.score(torch.rand(1, 3, 40, 40, requires_grad=True), "a red circle", [IMAGES[0]])
    assert max(lengths["last"]) > 1  # before the sample there is no graph
    assert not last.mlp._forward_pre_hooks
    assert not last.self_attn.o_proj._forward_pre_hooks


@pytest.mark.parametrize("family", ["internvl", "gemma3", "qwen3_vl"])
def test_heads_are_not_repeated(make_scorer, family, monkeypatch):
    """Keys behind a shared prefix keep their number of heads, and the model its attention, also after an error."""
    heads = []
    attend = attention.scaled_dot_product_attention

    def listening(query, key, *args, **kwargs):
        heads.append((query.shape[1], key.shape[1]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", listening)
    scorer = make_scorer(family)
    scorer._engine.min_saving = 4  # images are small
    config = scorer.model.config.get_text_config()
    assert_scores_are_plain(scorer)
    assert set(heads) == {(config.num_attention_heads, config.num_key_value_heads)}
    assert config.num_key_value_heads < config.num_attention_heads
    assert config._attn_implementation == "sdpa"

    def broken(*args, **kwargs):
        raise ValueError("no attention")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", broken)
    with pytest.raises(ValueError, match="no attention"), torch.no_grad():
        scorer.ask(QUESTIONS)
    assert config._attn_implementation == "sdpa"


def test_eager_attention_stays(make_scorer):
    """Another attention than `sdpa` is not replaced."""
    scorer = make_scorer("internvl")
    config = scorer.model.config.get_text_config()
    config._attn_implementation = "eager"
    with attention.grouped_attention(scorer.model):
        assert config._attn_implementation == "eager"
    assert_scores_are_plain(scorer)


FAULTS = """
import resource, torch
from rewarddance_hf.scoring.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        parts = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""


@pytest.mark.slow  # the helper of `new_process` may have freed large blocks before
@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_freed_memory_is_used_again():
    """The system is asked for the memory of tensors once, not each time (pages that are new to the process)."""
    run = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    first, then = map(int, run.stdout.split())
    if first < 20 * 8 * 1024 / 2:
        pytest.skip("memory is kept here by itself")
    assert then < first / 20
