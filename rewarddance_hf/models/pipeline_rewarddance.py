"""RewardDance pipeline: the task "visual-preference" of `transformers.pipeline`."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from transformers import Pipeline

from .question_rewarddance import Question


TASK = "visual-preference"
INPUT_KEYS = ("prompt", "images", "image", "reference", "condition", "task", "criteria", "dimensions", "examples")


class VisualPreferencePipeline(Pipeline):
    r"""
    Judge generated images or clips with [`RewardDanceForYesScoring`], by `transformers.pipeline("visual-preference")`.

    An input is a `dict` with `prompt` (`str`) and either `images`, samples of that prompt that are compared with each
    other, or `image`, a single sample; a pairwise judge needs a `reference` for the latter. `condition` (first frame
    of image-to-video, source image of an edit), `task`, `criteria` and `examples` are those of [`RewardDanceProcessor`] and
    optional. With `dimensions` (`list[str]`) a single `image` is scored by each of these, in place of `criteria`. Samples are
    anything that [`RewardDanceProcessor.load_frames`] takes: images, paths, bytes, or clips.

    Args:
        questions_per_batch (`int`, *optional*, defaults to `8`):
            Largest number of questions per forward pass. `n` images make `n * (n - 1)` questions to a pairwise judge.

    Returns:
        `dict`, or a `list` of them for a list of inputs:
        - `score` (`float`): reward of `image` in `[0, 1]`, the probability of "yes" (Eq. 2);
        - `dimensions` (`dict[str, float]`): reward of `image` by each of `dimensions`, in place of `score`;
        - `scores` (`list[float]`): reward of each of `images`: its mean over all others as references for a pairwise
          judge;
        - `wins` (`list[float]`): number of the others that each of `images` wins against; a tie gives one half. A pairwise
          judge is asked about each pair in both orders;
        - `order` (`list[int]`): indices of `images`, best first: by wins, then by score.

    Raises:
        `TypeError`: If an input is not a `dict`, or a prompt is not a string.
        `ValueError`: If an input lacks a key or has one too many, or an image cannot be read.

    Example:

    ```python
    from transformers import pipeline

    judge = pipeline("visual-preference", model="org/my-judge", trust_remote_code=True)
    judge({"prompt": "a red circle", "images": ["a.png", "b.png"]})["order"]
    judge({"prompt": "a red circle", "image": "a.png", "reference": "b.png"})["score"]
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.eval()
        judge: Any = self.model
        judge.check_processor(self.processor)

    def _sanitize_parameters(
        self, questions_per_batch: "int | None" = None
    ) -> "tuple[dict[str, Any], dict[str, Any], dict[str, Any]]":
        if questions_per_batch is None:
            return {}, {}, {}
        if questions_per_batch < 1:
            raise ValueError(f"`questions_per_batch` is {questions_per_batch}, but must be 1 or more. Leave it at 8.")
        return {}, {"questions_per_batch": questions_per_batch}, {}

    def preprocess(self, inputs: "dict[str, Any]") -> "dict[str, Any]":
        config = self.model.config
        if not isinstance(inputs, dict):
            raise TypeError(
                f"An input is of type `{type(inputs).__name__}`, but must be a dict with `prompt` and `images`, or `prompt`, "
                "`image` and `reference`."
            )
        unknown = sorted(set(inputs) - set(INPUT_KEYS))
        if unknown or "prompt" not in inputs or ("images" in inputs) == ("image" in inputs):
            raise ValueError(
                f"An input has the keys {sorted(inputs)}, but must have `prompt`, either `images` or `image`, and of the others "
                f"only {INPUT_KEYS[3:]}."
            )
        reference, dimensions = inputs.get("reference"), inputs.get("dimensions")
        if dimensions is not None and (inputs.get("criteria") is not None or "images" in inputs or not dimensions):
            raise ValueError(
                f"`dimensions` is {dimensions!r}, but must be names that a single `image` is scored by, without `criteria`. Leave "
                "it out, or the other."
            )
        is_ranking = "images" in inputs
        if is_ranking and len(inputs["images"]) < 2:
            raise ValueError(
                f"`images` has {len(inputs['images'])} entries, but must have 2 or more. Pass one as `image`."
            )
        if is_ranking and reference is not None:
            raise ValueError("`reference` was given with `images`, which are compared with each other. Leave it out.")
        if not is_ranking and config.uses_reference != (reference is not None):
            wanted = "needs one" if config.uses_reference else "looks at one sample only"
            given = "is None" if reference is None else "was given"
            raise ValueError(f"`reference` {given}, but a {config.paradigm} judge {wanted}.")
        task = inputs.get("task")
        asked = {name: inputs.get(name) for name in ("prompt", "condition", "task", "criteria")}
        asked["examples"] = self.processor.read_examples(inputs.get("examples"), task, config.uses_reference)
        if is_ranking:
            samples = []
            for i, image in enumerate(inputs["images"]):
                names = (f"images[{i}]", "reference", "condition")
                samples.append(self.processor.load(Question(sample=image, **asked), names=names))
                asked["condition"] = samples[0].condition  # loaded once
            pairs: list[Any] = [None]
            if config.uses_reference:
                pairs = list(permutations(range(len(samples)), 2))
                questions = [replace(samples[j], reference=samples[i].sample) for i, j in pairs]
            else:
                questions = samples
        else:
            question = self.processor.load(Question(sample=inputs["image"], reference=reference, **asked))
            pairs, questions = [None], [question]
            if dimensions is not None:
                lookup = self.processor.dimension_criteria
                questions = [replace(question, criteria=lookup(name, question.task)) for name in dimensions]
        return {
            "request": {"questions": questions, "pairs": pairs, "dimensions": dimensions, "is_ranking": is_ranking}
        }

    def _forward(self, model_inputs: "dict[str, Any]", questions_per_batch: int = 8) -> "dict[str, Any]":
        requests = model_inputs["request"]
        is_batch = isinstance(requests, list)  # by `batch_size=` of the pipeline
        requests = requests if is_batch else [requests]
        questions = [question for request in requests for question in request["questions"]]
        logits, scores = [], []
        for start in range(0, len(questions), questions_per_batch):
            batch = self.processor.encode(questions[start : start + questions_per_batch])
            output = self.model(**batch.to(self.device))
            logits += output.logits[:, 0].double().tolist()
            scores += output.scores.double().tolist()
        answers = []
        for request in requests:
            count = len(request["questions"])
            answers.append({"request": request, "logits": logits[:count], "scores": scores[:count]})
            logits, scores = logits[count:], scores[count:]
        return {"answer": answers if is_batch else answers[0]}

    def postprocess(self, model_outputs: "dict[str, Any]") -> "dict[str, Any]":
        answer = model_outputs["answer"]
        request, logits, scores = (
            answer["request"],
            torch.tensor(answer["logits"], dtype=torch.float64),
            answer["scores"],
        )
        bad = sum(not (-float("inf") < value < float("inf")) for value in [*answer["logits"], *scores])
        if bad:
            raise ValueError(
                f"{bad} scores are NaN or infinite, but must be finite. Check the weights for NaN, or load them in another type "
                "(`dtype=torch.float32`)."
            )
        if request["dimensions"] is not None:
            return {"dimensions": dict(zip(request["dimensions"], scores, strict=True))}
        if not request["is_ranking"]:
            return {"score": scores[0]}
        if self.model.config.uses_reference:
            count = max(max(pair) for pair in request["pairs"]) + 1
            yes = dict(zip(request["pairs"], logits.sigmoid().tolist(), strict=True))
            margins = {(i, j): yes[i, j] - yes[j, i] for i, j in yes}
            by_pair = dict(zip(request["pairs"], scores, strict=True))
            scores = [sum(by_pair[i, j] for i in range(count) if i != j) / (count - 1) for j in range(count)]
        else:
            count = len(scores)
            margins = {(i, j): float(logits[j] - logits[i]) for i, j in permutations(range(count), 2)}
        wins = [
            sum((margins[i, j] > 0) + 0.5 * (margins[i, j] == 0) for i in range(count) if i != j) for j in range(count)
        ]
        order = sorted(range(count), key=lambda j: (-wins[j], -scores[j], j))
        return {"scores": scores, "wins": wins, "order": order}


__all__ = ["TASK", "VisualPreferencePipeline"]
