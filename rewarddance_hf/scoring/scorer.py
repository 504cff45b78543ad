"""Scorer: rewards, comparisons and rankings from a trained judge."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..models.checkpoints_rewarddance import HUB_ARGUMENTS
from ..models.question_rewarddance import Question
from ..parallel import own_device
from ..rewards import NonFiniteScoreError, frozen
from .dataset import DatasetScoring
from .judge import Judge, non_finite_error
from .loading import copy_card, load_judge
from .questions import Examples, as_list, by_dimension, make_questions
from .ranking import check_ranking, rank_by_comparisons, rank_by_scores
from .reasoning import ReasonedScores, generate_texts, score_with_reasons
from .results import Comparison, Ranking


ENGINE_ARGUMENTS = (
    "engine",
    "max_batch_tokens",
    "num_workers",
    "pad_to_multiple_of",
    "compile_model",
    "gradient_checkpointing",
)


class RewardDanceScorer(Judge, DatasetScoring):
    r"""
    Frozen judge as a reward function: `reward(images, prompts, **context) -> Tensor (n,)`.

    The reward is the probability of the answer "yes" (Eq. 2 of the
    [RewardDance paper](https://huggingface.co/papers/2509.08826)), relative to a reference in the pairwise paradigm.

    Args:
        model ([`RewardDanceForYesScoring`]):
            Judge, alone or with a PEFT adapter. Put into evaluation mode.
        processor ([`RewardDanceProcessor`]):
            Processor of the judge.
        batch_size (`int`, *optional*, defaults to `8`):
            Largest number of questions per forward pass.
        engine (`str`, *optional*, defaults to `"auto"`):
            `"auto"` computes vision features once per image and key/value states once per shared prefix, where scores
            are known to stay the same, and otherwise takes the plain path. `"features"` shares vision features only.
            `"plain"` computes each question on its own.
        max_batch_tokens (`int`, *optional*, defaults to `32768`):
            Largest number of tokens per forward pass of the engine. Halved whenever memory runs out.
        num_workers (`int`, *optional*, defaults to `2`):
            Number of threads that decode and preprocess images beside the model.
        pad_to_multiple_of (`int`, *optional*):
            Multiple that the engine pads lengths to, so that few shapes occur: for compiled models and CUDA graphs. Defaults
            to 64 with `compile_model`, else to no padding.
        compile_model (`bool` or `dict`, *optional*, defaults to `False`):
            Whether to compile the language model in place for the engine, or arguments of `torch.compile` to do it with.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether layers are computed again in the backward pass of a gradient, in place of being kept: about a third more time
            for much less memory.

    After each call, `statistics` holds what the engine computed ([`~rewarddance_hf.scoring.engine.session.ScoringStatistics`]), or
    None if the call took the plain path.

    Raises:
        `ValueError`: If model and processor disagree about the answer tokens, an argument is out of range, or `engine`
            is `"features"` and the model is not known to be scored equally.

    Example:

    ```python
    from rewarddance_hf import RewardDanceScorer

    scorer = RewardDanceScorer.from_pretrained("org/my-judge")
    scorer.score(images, prompts, references=references)  # tensor of shape (n,)
    scorer.compare(image_a, image_b, "a red circle").winner
    scorer.rank(images, "a red circle", top_k=2).order
    ```
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        device_map: Any = None,
        dtype: Any = "auto",
        batch_size: int = 8,
        **kwargs: Any,
    ) -> "RewardDanceScorer":
        """
        Load a judge from the Hub or a local folder, with frozen weights.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                RewardDance checkpoint, plain image-text-to-text model (a zero-shot judge), or LoRA adapter of either.
            device_map (`str` or `dict`, *optional*):
                Devices of the model, e.g. `"auto"`. Defaults to the GPU, or the CPU if there is none.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Type of the weights. `"auto"` takes the one that they were saved in.
            batch_size (`int`, *optional*, defaults to `8`):
                As in [`RewardDanceScorer`].
            kwargs:
                Further arguments of [`RewardDanceScorer`] (`engine`, ...) and of
                [`RewardDanceForYesScoring.from_pretrained`] (`revision`, `token`, `paradigm`, ...).

        Returns:
            [`RewardDanceScorer`]

        Raises:
            `ValueError`: If weights are missing.
            `ImportError`: If an adapter is to be loaded without peft.
        """
        settings = {name: kwargs.pop(name) for name in ENGINE_ARGUMENTS if name in kwargs}
        model, processor = load_judge(pretrained_model_name_or_path, device_map=device_map, dtype=dtype, **kwargs)
        if device_map is None and torch.cuda.is_available() and model.device.type == "cpu":
            model.to(own_device())  # type: ignore[arg-type]
        scorer = cls(model.requires_grad_(False), processor, batch_size=batch_size, **settings)
        hub_arguments = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        scorer._source = (os.fspath(pretrained_model_name_or_path), hub_arguments)
        return scorer

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Save weights or adapter, configuration with its temperature, processor, and the card that the judge came with, for
        [`~RewardDanceScorer.from_pretrained`].

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, created if it is missing.
        """
        self.model.save_pretrained(save_directory)
        if getattr(self.model, "peft_config", None):  # adapters are saved without a configuration
            self.model.config.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)
        if self._source is not None:
            copy_card(*self._source, save_directory)

    def score(
        self,
        images: Any,
        prompts: str | Sequence[str],
        references: Any = None,
        conditions: Sequence[Any] | None = None,
        task: str | Sequence[str | None] | None = None,
        criteria: str | Sequence[str | None] | None = None,
        dimensions: Sequence[str] | None = None,
        examples: Examples = None,
        show_progress: bool = False,
    ) -> torch.Tensor:
        r"""
        Compute rewards of samples.

        Rewards carry a gradient if an image that is passed as a tensor does: a sample, or a reference or condition
        that is not detached. The model's weights get none, whatever their `requires_grad`.

        Args:
            images (`list` or `torch.Tensor` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`):
                Samples: images, paths, or lists of those as frames of clips; or a tensor of floats in `[0, 1]`, or an array
                with the channels last: what pipelines of diffusers give, whatever their `output_type`.
            prompts (`str` or `list[str]`):
                Prompts that the samples were generated from, one for all or one each.
            references (`list` or `torch.Tensor`, *optional*):
                One sample to compare with for each, in the same forms as `images`. Required in the pairwise paradigm,
                refused in the others.
            conditions (`list`, *optional*):
                Images that were given to the generator beside the prompt: first frame of image-to-video, source image of an
                edit.
            task (`str` or `list[str]`, *optional*):
                Task whose criteria are used, for all or one each. By default `"text-to-image"` for images, `"text-to-video"`
                for clips, and with a condition `"image-editing"` and `"image-to-video"`.
            criteria (`str` or `list`, *optional*):
                Criteria in place of those of `task`, for all or one each.
            dimensions (`list[str]`, *optional*):
                Names of dimensions to score by, each on its own, in place of the criteria of `task`: those of
                `processor.dimensions[task]`, e.g. `["alignment", "motion"]`. The engine sees images once for all.
            examples (`list[dict]`, *optional*):
                Questions with known verdicts that the judge is shown before each one (in-context examples), as in
                [`RewardDanceProcessor.read_examples`]. They are computed once.
            show_progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `torch.Tensor` of shape `(n,)`, or `(n, len(dimensions))` with `dimensions`: Rewards in `[0, 1]`, as float32 on the
            model's device.

        Raises:
            `ValueError`: If lists differ in length, references are missing or not wanted, an image cannot be read, a
                dimension does not exist, both `criteria` and `dimensions` are given, or an example lacks something.
            `NonFiniteScoreError`: If a score is NaN or infinite; a `ValueError` with the `scores` until there.
            `NotImplementedError`: If an image requires a gradient that cannot pass through the image processor or the model.
        """
        questions = make_questions(self, images, prompts, references, conditions, task, criteria, examples)
        media = [(question.sample, question.reference, question.condition) for question in questions]
        with torch.set_grad_enabled(torch.is_grad_enabled() and _requires_grad(media)), frozen(self.model):
            if dimensions is None:
                return self._check_gradient(self.ask(questions, len(questions), show_progress)[1])
            width = len(dimensions)
            asked = (new for question in questions for new in by_dimension(self.processor, question, dimensions))
            try:
                scores = self.ask(asked, width * len(questions), show_progress)[1]
                return self._check_gradient(scores).view(-1, width)
            except NonFiniteScoreError as error:
                rows = sorted({index // width for index in error.rows})
                known = torch.nn.functional.pad(error.scores, (0, -len(error.scores) % width), value=torch.nan)
                raise non_finite_error(rows, known.view(-1, width)) from error

    def _check_gradient(self, scores: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not scores.requires_grad:
            raise NotImplementedError(
                f"An image requires a gradient, but none reaches it through {self.model.config.vlm_config.model_type!r} models, "
                "which turn images into discrete tokens. Pass `images.detach()`, or take a judge of another family."
            )
        return scores

    __call__ = score  # so that signatures tell what a scorer takes as a reward function

    def reason(
        self,
        images: Any,
        prompts: str | Sequence[str],
        references: Any = None,
        conditions: Sequence[Any] | None = None,
        task: str | Sequence[str | None] | None = None,
        criteria: str | Sequence[str | None] | None = None,
        num_samples: int = 1,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        seed: int = 0,
        show_progress: bool = False,
    ) -> ReasonedScores:
        r"""
        Compute rewards of samples after reasons ("reasons first", Section 3.2.1): the judge is asked for its reasons, then
        the reward is P("yes") where they end. For judges that were trained with `rationale="reasons_first"` or `"mixed"`.

        Rewards carry no gradient. With several chains of thought (self-consistency) they are means.

        Args:
            images, prompts, references, conditions, task, criteria, show_progress:
                As in [`~RewardDanceScorer.score`].
            num_samples (`int`, *optional*, defaults to `1`):
                Number of chains of thought for each sample.
            max_new_tokens (`int`, *optional*, defaults to `512`):
                Maximum length of a chain. A longer one reaches no answer: its score is NaN, and it is counted.
            temperature (`float`, *optional*):
                Temperature of sampling. Defaults to 0 (the most probable chain) for one chain, and to 0.7 for several.
            seed (`int`, *optional*, defaults to `0`):
                Seed of sampling. The random state outside stays as it is.

        Returns:
            [`~rewarddance_hf.scoring.reasoning.ReasonedScores`]: Mean and spread of the rewards, those after each chain, and
            the chains.

        Raises:
            `ValueError`: As in [`~RewardDanceScorer.score`], and if an argument is out of range.
            `NoAnswerError`: If no chain reached an answer; a `ValueError` with the `texts`.
        """
        questions = make_questions(self, images, prompts, references, conditions, task, criteria, reasons_first=True)
        return score_with_reasons(self, questions, num_samples, max_new_tokens, temperature, seed, show_progress)

    @torch.no_grad()
    def compare(
        self,
        image_a: Any,
        image_b: Any,
        prompt: str,
        swap: bool = True,
        explain: bool = False,
        condition: Any = None,
        task: str | None = None,
        criteria: str | None = None,
        max_new_tokens: int = 256,
        dimensions: Sequence[str] | None = None,
        examples: Examples = None,
    ) -> Comparison:
        r"""
        Decide which of two samples of a prompt is better.

        A pairwise judge is asked whether B (image 2) is better than A (image 1); the probability is that of "yes" among
        the two answers. For other judges it is the sigmoid of the difference of both samples' `logits`.

        Args:
            image_a, image_b (image or `list` of images):
                Images or clips A and B.
            prompt (`str`):
                Prompt that both were generated from.
            swap (`bool`, *optional*, defaults to `True`):
                Whether to ask in both orders and to average the probabilities. Pairwise paradigm only.
            explain (`bool`, *optional*, defaults to `False`):
                Whether to generate the rationale that follows the verdict. Pairwise paradigm only.
            condition, task, criteria, examples:
                As in [`~RewardDanceScorer.score`], for this prompt.
            max_new_tokens (`int`, *optional*, defaults to `256`):
                Maximum length of the rationale.
            dimensions (`list[str]`, *optional*):
                Names of dimensions to compare by beside the criteria of `task`, as in [`~RewardDanceScorer.score`].

        Returns:
            [`~rewarddance_hf.scoring.results.Comparison`]: By the criteria of `task`, with those by `dimensions` in it.

        Raises:
            `ValueError`: As in [`~RewardDanceScorer.score`], and if `explain` is True without a pairwise judge.
        """
        if explain and not self.is_pairwise:
            raise ValueError(
                f"`explain` is True, but the judge is {self.model.config.paradigm} and gives no verdict about two samples. "
                "Pass `explain=False`, or load a pairwise judge."
            )
        for name, image in (("image_a", image_a), ("image_b", image_b)):
            if image is None:
                raise TypeError(f"`{name}` is of type `NoneType`, but must be an image or a clip. Pass one.")
        shown = self.processor.read_examples(examples, task, self.is_pairwise)
        question = Question(image_a, prompt, None, condition, task, criteria, shown)
        alone_a = self.processor.load(question, names=("image_a", "reference", "condition"))
        alone_b = self.processor.load(replace(alone_a, sample=image_b), names=("image_b", "reference", "condition"))
        questions = [alone_a, alone_b]
        if self.is_pairwise:
            in_order = replace(alone_b, reference=alone_a.sample)
            questions = [in_order, replace(alone_a, reference=alone_b.sample)] if swap else [in_order]
        asked = list(questions)
        if dimensions is not None:  # both orders of each dimension stand together
            by_order = [by_dimension(self.processor, question, dimensions) for question in questions]
            asked += [question for orders in zip(*by_order, strict=True) for question in orders]
        logits = self.ask(asked)[0].double().view(-1, len(questions))
        overall, *others = (Comparison.from_log_odds(odds, self.is_pairwise) for odds in logits)
        rationale = None
        if explain:  # what it continues with after the answer ("decision first", Section 3.2.1)
            encoded = self.processor.encode(questions[:1])
            batch = self.processor.append_answers(encoded, [overall.winner == "b"], [None])
            rationale = generate_texts(self.model, self.processor, batch, max_new_tokens)[0]
        found = None if dimensions is None else dict(zip(dimensions, others, strict=True))
        return replace(overall, rationale=rationale, dimensions=found)

    @torch.no_grad()
    def rank(
        self,
        images: Any,
        prompt: str,
        top_k: int | None = None,
        condition: Any = None,
        task: str | None = None,
        criteria: str | None = None,
        show_progress: bool = False,
        ranking_method: str = "round_robin",
        num_rounds: int | None = None,
        examples: Examples = None,
    ) -> Ranking:
        r"""
        Rank samples of a prompt.

        A pairwise judge compares samples in both orders, which are two questions; a comparison is won by the average
        of both. By default all are compared with all, in `n * (n - 1)` questions. Tournaments find the best of many
        samples with fewer: 64 samples take 4032 questions as a round robin, 384 by Swiss rounds, at most 250 by
        halving. Other judges score each sample once, whatever the method.

        Args:
            images (`list` or `torch.Tensor` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`):
                Two or more samples, as in [`~RewardDanceScorer.score`].
            prompt (`str`):
                Prompt that all were generated from.
            top_k (`int`, *optional*, defaults to all):
                Number of best samples to keep in `order`.
            condition, task, criteria, examples, show_progress:
                As in [`~RewardDanceScorer.score`], for this prompt.
            ranking_method (`str`, *optional*, defaults to `"round_robin"`):
                `"round_robin"` compares all with all. `"swiss"` plays `num_rounds` rounds of `n // 2` comparisons, in
                which neighbors in the standings meet. `"halving"` plays `num_rounds` such rounds, drops the worse half and
                goes on until `top_k` samples (or one) are left: less than `num_rounds * n` comparisons.
            num_rounds (`int`, *optional*):
                Number of rounds. Defaults to the binary logarithm of `n`, rounded up, for `"swiss"`, and to 2 for
                `"halving"`.

        Returns:
            [`~rewarddance_hf.scoring.results.Ranking`]

        Raises:
            `ValueError`: As in [`~RewardDanceScorer.score`], and if there are fewer than two samples, or `top_k`,
                `ranking_method` or `num_rounds` is out of range.
        """
        samples = as_list(images, "images")
        check_ranking(len(samples), self.is_pairwise, top_k, ranking_method, num_rounds)
        shown = self.processor.read_examples(examples, task, self.is_pairwise)
        questions: list[Question] = []
        for i, sample in enumerate(samples):  # each is loaded once, and so is the condition of all
            first = questions[0] if questions else Question(sample, prompt, None, condition, task, criteria, shown)
            questions.append(self.processor.load(replace(first, sample=sample, row=i)))
        if not self.is_pairwise:
            logits, scores = (values.cpu() for values in self.ask(questions, len(questions), show_progress))
            return rank_by_scores(logits, scores, top_k)

        def ask(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
            asked = [replace(questions[j], reference=questions[i].sample) for i, j in pairs]
            logits, rewards = self.ask(asked, len(asked), show_progress, session, window=4096)  # of few images
            return logits.double().sigmoid(), rewards

        with self.session() as session:  # each sample is seen once in all rounds
            return rank_by_comparisons(ask, len(samples), top_k, ranking_method, num_rounds)


def _requires_grad(media: Any) -> bool:
    if isinstance(media, (list, tuple)):
        return any(_requires_grad(frame) for frame in media)
    return isinstance(media, torch.Tensor) and media.requires_grad
