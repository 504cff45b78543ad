"""Matrix products by oneDNN: the same scores, gradients as ever, and a model as it was."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from rewarddance_hf import RewardDanceScorer
from rewarddance_hf.scoring.engine import products
from rewarddance_hf.shapes.models import BASE_VLM
from rewarddance_hf.shapes.preferences import ShapesPreferences


pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch has no oneDNN here",
)


@pytest.fixture
def calls(monkeypatch):
    """oneDNN is taken on any processor; numbers of rows of its products."""
    rows = []
    plain = products._linear

    def linear(layer, given):
        found = plain(layer, given)
        if not torch.is_grad_enabled():
            rows.append(given.numel() // given.shape[-1])
        return found

    monkeypatch.setattr(products, "is_slow_otherwise", lambda: True)
    monkeypatch.setattr(products, "_linear", linear)
    return rows


def test_scores_are_the_same(calls, monkeypatch):
    """Log-odds of the engine with oneDNN, with torch's products, and of the plain path."""
    rows = list(ShapesPreferences(12))
    given = [[row[name] for row in rows] for name in ("chosen", "prompt", "rejected")]
    scorer, plain = (RewardDanceScorer.from_pretrained(BASE_VLM, engine=engine) for engine in ("auto", "plain"))
    ours = torch.as_tensor(scorer.score(given[0], given[1], given[2])).logit()
    assert len(calls) > 10
    assert all("forward" not in vars(module) for module in scorer.model.modules())
    monkeypatch.setattr(scorer._engine, "_products", lambda model: nullcontext())
    calls.clear()
    by_torch = torch.as_tensor(scorer.score(given[0], given[1], given[2])).logit()
    assert not calls
    torch.testing.assert_close(ours, by_torch, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, torch.as_tensor(plain.score(*given)).logit(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 0, 5), (1, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_all_shapes(calls, shape, bias):
    """Any number of dimensions, also without rows, with strides of their own, and without a bias."""
    layer = nn.Linear(5, 7, bias=bias)
    for given in (torch.randn(shape), torch.randn(*shape, 2)[..., 0]):
        expected = functional.linear(given, layer.weight, layer.bias)
        with torch.no_grad(), products.products_by_onednn(layer):
            found = layer(given)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_other_types_and_replaced_calls_stay(calls):
    """Where a gradient is wanted, in lower precision and under autocast, and where somebody replaced the call, torch computes."""
    layer = nn.Linear(5, 7)
    given = torch.randn(3, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(given).square().sum(), given)
    with products.products_by_onednn(layer):
        (found,) = torch.autograd.grad(layer(given).square().sum(), given)
    assert torch.equal(found, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), products.products_by_onednn(layer):
        assert layer(given).dtype == torch.bfloat16
    half = nn.Linear(5, 7, dtype=torch.bfloat16)
    with torch.no_grad(), products.products_by_onednn(half):
        assert "forward" not in vars(half)
    hooked = nn.Linear(5, 7)
    hooked.forward = own = lambda given: given
    with products.products_by_onednn(hooked):
        assert hooked.forward is own
    assert hooked.forward is own


def test_model_is_as_before_after_an_error(calls):
    """An error in between leaves no replaced call."""
    layer = nn.Linear(5, 7)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        _call(layer, torch.randn(3, 6))
    assert "forward" not in vars(layer)


def _call(layer, given):
    with torch.no_grad(), products.products_by_onednn(layer):
        assert "forward" in vars(layer)
        layer(given)
