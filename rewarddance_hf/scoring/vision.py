"""Vision features: once per picture, in batches, kept as long as there is room."""

from typing import Any

import torch

from ..models import RewardDanceForYesScoring
from .memory import BatchLimit
from .pictures import PreparedPicture, needs_graph
from .session import EngineSession, Features


MAX_FEATURE_TOKENS = 1 << 16  # picture tokens whose features are kept from window to window


class VisionEncoder:
    """
    Part of the engine that looks at pictures.

    Args:
        model ([`RewardDanceForYesScoring`]):
            Judge.
        limit ([`BatchLimit`]):
            Limit of rows in a batch.
    """

    def __init__(self, model: RewardDanceForYesScoring, limit: BatchLimit) -> None:
        self.model = model
        self.limit = limit

    def encode(self, futures: list[list[Any]], session: EngineSession) -> list[list[PreparedPicture]]:
        """Features of pictures that have none yet, in batches of those that are ready first."""
        rows, batch = [], {}
        for row in futures:
            rows.append([future.result() for future in row])
            for picture in rows[-1]:
                if picture.number < 0:
                    picture.number = session.num_pictures
                    session.num_pictures += 1
                if picture.number not in session.features and picture.number not in batch:
                    batch[picture.number] = picture
            if len(batch) >= self.limit.max_rows:
                self._encode_batch(list(batch.values()), session)
                batch = {}
        if batch:
            self._encode_batch(list(batch.values()), session)
        return rows

    def _encode_batch(self, pictures: list[PreparedPicture], session: EngineSession) -> None:
        groups: dict[Any, list[PreparedPicture]] = {}
        for picture in pictures:
            shapes = tuple((name, tuple(value.shape[1:])) for name, value in sorted(picture.inputs.items()))
            groups.setdefault((picture.requires_grad, shapes), []).append(picture)
        for group in groups.values():
            for start in range(0, len(group), self.limit.max_rows):
                self.limit.run_in_halves(
                    group[start : start + self.limit.max_rows], lambda part: self._see(part, session)
                )

    def _see(self, pictures: list[PreparedPicture], session: EngineSession) -> None:
        inputs = {
            name: torch.cat([torch.as_tensor(picture.inputs[name]) for picture in pictures]).to(self.model.device)
            for name in pictures[0].inputs
        }
        with torch.set_grad_enabled(needs_graph(self.model, pictures[0].requires_grad)):
            output = self.model.vlm.get_image_features(**inputs, return_dict=True)
        counts = [session.writer.num_tokens(picture) for picture in pictures]
        self._template = output.pooler_output
        pooled = _flatten(output.pooler_output).split(counts)
        deepstack = [_flatten(layer).split(counts) for layer in getattr(output, "deepstack_features", None) or []]
        for i, picture in enumerate(pictures):
            session.features[picture.number] = Features(pooled[i], [layer[i] for layer in deepstack])
            picture.inputs = {}
        session.statistics.num_encoded += len(pictures)
        self._feature_class = type(output)

    def forget(self, session: EngineSession, pictures: list[list[PreparedPicture]]) -> None:
        """Drop the oldest features beyond what may be kept, but none of the window that is scored next."""
        recent = {picture.number for row in pictures for picture in row}
        count = sum(len(features.pooled) for features in session.features.values())
        dropped = set()
        for number in list(session.features):
            if count <= MAX_FEATURE_TOKENS:
                break
            if number not in recent:
                count -= len(session.features.pop(number).pooled)
                dropped.add(number)
        session.desk.forget(dropped)

    def drop_gradients(self, session: EngineSession) -> None:
        """Forget pictures that carry a gradient, and with them the graph of their features."""
        numbers = {number for number, features in session.features.items() if features.pooled.requires_grad}
        for number in numbers:
            del session.features[number]
        session.desk.forget(numbers)

    def output_of(self, features: list[Features]) -> Any:
        """Features of several pictures in the form in which the vision encoder gives them."""
        pooled = torch.cat([item.pooled for item in features])
        is_list = isinstance(self._template, (list, tuple))
        arguments: dict[str, Any] = {
            "pooler_output": [pooled] if is_list else pooled.view(-1, *self._template.shape[1:])
        }
        if features[0].deepstack:
            layers = zip(*(item.deepstack for item in features), strict=True)
            arguments["deepstack_features"] = [[torch.cat(layer)] for layer in layers]
        return self._feature_class(**arguments)


def _flatten(features: Any) -> torch.Tensor:
    """Features `(tokens, hidden_size)` of all pictures in a row."""
    if isinstance(features, (list, tuple)):
        return torch.cat([_flatten(part) for part in features])
    return features.reshape(-1, features.shape[-1])
