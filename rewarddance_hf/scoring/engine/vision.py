"""Vision features: once per image, in batches, kept as long as there is room."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...models import RewardDanceForYesScoring
from .media_desk import PreparedImage, needs_graph
from .memory import BatchLimit
from .session import EngineSession, Features


MAX_FEATURE_TOKENS = 1 << 16  # image tokens whose features are kept from window to window


class VisionEncoder:
    """Part of the engine that looks at images."""

    def __init__(
        self,
        model: RewardDanceForYesScoring,
        limit: BatchLimit,
        kept_layers: Callable[[Any], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.limit = limit
        self._kept_layers = kept_layers

    def encode(self, futures: list[list[Any]], session: EngineSession) -> list[list[PreparedImage]]:
        """Features of images that have none yet, in batches of those that are ready first."""
        rows: list[list[PreparedImage]] = []
        batch: dict[int, PreparedImage] = {}
        for row in futures:
            rows.append([future.result() for future in row])
            for image in rows[-1]:
                if image.number < 0:
                    image.number = session.num_images
                    session.num_images += 1
                if image.number not in session.features:
                    batch[image.number] = image
            if len(batch) >= self.limit.max_rows or len(rows) == len(futures):
                self._encode_batch(list(batch.values()), session)
                batch = {}
        return rows

    def _encode_batch(self, images: list[PreparedImage], session: EngineSession) -> None:
        groups: dict[Any, list[PreparedImage]] = {}
        for image in images:
            shapes = tuple((name, tuple(value.shape[1:])) for name, value in sorted(image.inputs.items()))
            groups.setdefault((image.requires_grad, shapes), []).append(image)
        for group in groups.values():
            for start in range(0, len(group), self.limit.max_rows):
                part = group[start : start + self.limit.max_rows]
                self.limit.run_in_halves(part, lambda images: self._see(images, session))

    def _see(self, images: list[PreparedImage], session: EngineSession) -> None:
        inputs = {
            name: torch.cat([torch.as_tensor(image.inputs[name]) for image in images]).to(self.model.device)
            for name in images[0].inputs
        }
        with torch.set_grad_enabled(needs_graph(self.model, images[0].requires_grad)), self._kept_layers(self.model):
            output = self.model.vlm.get_image_features(**inputs, return_dict=True)
        counts = [session.writer.num_tokens(image) for image in images]
        self._template = output.pooler_output
        pooled = _flatten(output.pooler_output).split(counts)
        deepstack = [_flatten(layer).split(counts) for layer in getattr(output, "deepstack_features", None) or []]
        for i, image in enumerate(images):
            session.add(image.number, Features(pooled[i], [layer[i] for layer in deepstack], image.key))
            image.inputs = {}
        session.statistics.num_encoded += len(images)
        self._feature_class = type(output)

    def forget(self, session: EngineSession, images: list[list[PreparedImage]]) -> None:
        """Drop the oldest features beyond what may be kept, but none of the window that is scored next."""
        if session.num_tokens <= MAX_FEATURE_TOKENS:
            return
        recent = {image.number for row in images for image in row}
        for number in [number for number in session.features if number not in recent]:
            if session.num_tokens > MAX_FEATURE_TOKENS:
                session.drop(number)

    def output_of(self, features: list[Features]) -> Any:
        """Features of several images in the form in which the vision encoder gives them."""
        pooled = torch.cat([item.pooled for item in features])
        is_list = isinstance(self._template, (list, tuple))
        shaped = [pooled] if is_list else pooled.view(-1, *self._template.shape[1:])
        arguments: dict[str, Any] = {"pooler_output": shaped}
        if features[0].deepstack:
            layers = zip(*(item.deepstack for item in features), strict=True)
            arguments["deepstack_features"] = [[torch.cat(layer)] for layer in layers]
        return self._feature_class(**arguments)


def _flatten(features: Any) -> torch.Tensor:
    """Features `(tokens, hidden_size)` of all images in a row."""
    if isinstance(features, (list, tuple)):
        return torch.cat([_flatten(part) for part in features])
    return features.reshape(-1, features.shape[-1])
