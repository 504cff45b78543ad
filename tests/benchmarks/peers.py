"""How others get a reward out of a vision-language model, each end to end from images: plain transformers, CrossEncoder, ..."""

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from judges import PROMPT


Pairs = list[tuple[Any, Any]]
NEW_TOKENS = 32  # of a generated verdict, about as many as UnifiedReward's three scores or a sentence


def log_odds(logits: torch.Tensor, processor: Any) -> torch.Tensor:
    """Of the answers, from logits over the vocabulary."""
    return logits[..., processor.yes_token_id].float() - logits[..., processor.no_token_id].float()


def encode(processor: Any, pairs: Pairs, device: Any) -> Any:
    samples, references = (list(column) for column in zip(*pairs, strict=True))
    return processor(samples, [PROMPT] * len(samples), references).to(device)


def one_by_one(model: Any, processor: Any, pairs: Pairs) -> torch.Tensor:
    """The loop of a model card: one pair at a time, logits of all positions."""
    rows = [model.vlm(**encode(processor, [pair], model.device), use_cache=False).logits[0, -1] for pair in pairs]
    return log_odds(torch.stack(rows), processor)


def batched(model: Any, processor: Any, pairs: Pairs) -> torch.Tensor:
    """A well-filled batch of transformers, logits of the last position only."""
    inputs = encode(processor, pairs, model.device)
    return log_odds(model.vlm(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1], processor)


def generate_and_parse(model: Any, processor: Any, pairs: Pairs) -> list[str | None]:
    """A verdict in words, which is then looked for in the text, as UnifiedReward does. Random weights rarely give one."""
    inputs = encode(processor, pairs, model.device)
    length = inputs["input_ids"].shape[1]
    tokens = model.vlm.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    texts = processor.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    found = [re.search(r"\b(yes|no)\b", text.lower()) for text in texts]
    return [match and match[1] for match in found]


def cross_encoder(model: Any, processor: Any, batch_size: int) -> Callable[[Pairs], torch.Tensor] | None:
    """`CrossEncoder` of sentence-transformers with `LogitScore` on the same model and questions; None without it."""
    try:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import InputModule
        from sentence_transformers.cross_encoder.modules import LogitScore
    except ImportError:
        sys.stderr.write("sentence-transformers is not installed: no comparison with its `CrossEncoder`.\n")
        return None

    class Questions(InputModule):
        def __init__(self):
            super().__init__()
            self.model = model
            self.tokenizer = processor.tokenizer

        @property
        def modalities(self):
            return ["image"]

        def preprocess(self, inputs, prompt=None, **kwargs):
            return dict(encode(processor, inputs, model.device))

        def forward(self, features, **kwargs):
            features["causal_logits"] = self.model.vlm(**features, use_cache=False, logits_to_keep=1).logits
            return features

        def save(self, *args, **kwargs):
            raise NotImplementedError

    score = LogitScore(processor.yes_token_id, processor.no_token_id)
    encoder = CrossEncoder(modules=[Questions(), score], num_labels=1, device=str(model.device))
    return lambda pairs: torch.as_tensor(
        encoder.predict(pairs, batch_size=batch_size, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    )
