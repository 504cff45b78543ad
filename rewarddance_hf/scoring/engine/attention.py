"""Attention on a CPU in which heads that share keys and values are not given a copy of them each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...models import RewardDanceForYesScoring


GROUPED = "rewarddance_grouped_sdpa"  # among the attention functions of transformers


@contextmanager
def grouped_attention(model: RewardDanceForYesScoring) -> Iterator[None]:
    """
    Let the language model of a judge on the CPU attend with grouped heads where it takes `sdpa` and no gradient is wanted. With a
    mask, as there is behind a shared prefix, transformers repeats keys and values first. Results are the same.
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    is_taken = attention_mask is not None and key.shape[1] < query.shape[1] and not kwargs.get("dropout")
    if not is_taken or torch.is_grad_enabled() or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    found = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, _attend)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
