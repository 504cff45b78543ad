"""The language-model head of a wrapped model while a question is answered."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def head_at_positions(head: nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Let the language-model head see the hidden states of some positions only, as one row of a batch."""

    def select(module: nn.Module, arguments: "tuple[torch.Tensor, ...]") -> "tuple[torch.Tensor, ...]":
        hidden_states, *rest = arguments
        return (hidden_states[rows, columns][None], *rest)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def answers_in_float32(head: "nn.Module | None", answer_ids: "list[int]") -> Iterator[None]:
    """
    Let a head in low precision give the logits of the answers in float32: bfloat16 rounds logits to steps of up to an eighth,
    and their difference is the reward. Heads that are no plain product of weights at hand are left as they are.
    """

    def refine(module: nn.Linear, arguments: "tuple[torch.Tensor, ...]", logits: torch.Tensor) -> torch.Tensor:
        weight, bias = module.weight, module.bias
        if logits.dtype not in (torch.bfloat16, torch.float16) or weight.device.type == "meta":
            return logits
        with torch.autocast(logits.device.type, enabled=False):
            answers = torch.tensor(answer_ids, device=weight.device)
            bias = None if bias is None else bias[answers].float()
            exact = nn.functional.linear(arguments[0].float(), weight[answers].float(), bias)
        return logits.float().index_copy_(-1, answers, exact)

    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        yield
        return
    handle = head.register_forward_hook(refine)
    try:
        yield
    finally:
        handle.remove()
