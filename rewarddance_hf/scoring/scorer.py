"""Scorer: rewards, comparisons and rankings from a trained judge."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from itertools import groupby, islice
from typing import Any, TypeAlias

import torch
from tqdm.auto import tqdm

from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..models.processing_rewarddance import load_image
from ..models.question_rewarddance import Example
from ..rewards import NonFiniteScoreError, frozen
from .dataset import score_into_file
from .engine.engine import ScoringEngine
from .engine.session import EngineSession, ScoringStatistics
from .loading import load_judge
from .ranking import check_ranking, rank_by_comparisons, rank_by_scores
from .reasoning import ReasonedScores, generate_texts, score_with_reasons
from .results import Comparison, Judgement, Ranking


ENGINES = ("auto", "features", "plain")
ENGINE_ARGUMENTS = ("engine", "max_batch_tokens", "num_workers", "pad_to_multiple_of", "compile_model")
RANK_WINDOW = 4096  # judgements of a ranking that are planned together: they have few images

Examples: TypeAlias = Sequence[Mapping[str, Any] | Example] | None


class RewardDanceScorer:
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
            Largest number of judgements per forward pass.
        engine (`str`, *optional*, defaults to `"auto"`):
            `"auto"` computes vision features once per image and key/value states once per shared prefix, where scores
            are known to stay the same, and else goes the plain path. `"features"` shares vision features only.
            `"plain"` computes each judgement on its own.
        max_batch_tokens (`int`, *optional*, defaults to `32768`):
            Largest number of tokens per forward pass of the engine. Halved whenever memory runs out.
        num_workers (`int`, *optional*, defaults to `2`):
            Number of threads that decode and preprocess images beside the model.
        pad_to_multiple_of (`int`, *optional*):
            Multiple that the engine pads lengths to, so that few shapes occur: for compiled models and CUDA graphs. Defaults
            to 64 with `compile_model`, else to no padding.
        compile_model (`bool` or `dict`, *optional*, defaults to `False`):
            Whether to compile the language model in place for the engine, or arguments of `torch.compile` to do it with.

    After each call, `statistics` holds what the engine computed ([`~rewarddance_hf.scoring.engine.session.ScoringStatistics`]), or
    None if the call took the plain path.

    Raises:
        `ValueError`: If model and processor disagree about the answer tokens, an argument is out of range, or `engine`
            is `"features"` and the model is not known to be scored equally.

    Example:

    ```python
    from rewarddance_hf import RewardDanceScorer

    scorer = RewardDanceScorer.from_pretrained("org/my-judge", device_map="auto")
    scorer.score(images, prompts, references=references)  # tensor of shape (n,)
    scorer.compare(image_a, image_b, "a red circle").winner
    scorer.rank(images, "a red circle", top_k=2).order
    ```
    """

    def __init__(
        self,
        model: RewardDanceForYesScoring,
        processor: RewardDanceProcessor,
        batch_size: int = 8,
        engine: str = "auto",
        max_batch_tokens: int = 32768,
        num_workers: int = 2,
        pad_to_multiple_of: int | None = None,
        compile_model: bool | dict[str, Any] = False,
    ) -> None:
        least = {
            "batch_size": (batch_size, 1),
            "max_batch_tokens": (max_batch_tokens, 1),
            "num_workers": (num_workers, 0),
        }
        if pad_to_multiple_of is not None:
            least["pad_to_multiple_of"] = (pad_to_multiple_of, 1)
        for name, (value, minimum) in least.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                wanted = "a positive integer" if minimum else "0 or a positive integer"
                raise ValueError(f"`{name}` is {value!r}, but must be {wanted}. Pass {minimum} or more.")
        if engine not in ENGINES:
            raise ValueError(f"`engine` is {engine!r}, but must be one of {ENGINES}.")
        model.check_processor(processor)
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.statistics: ScoringStatistics | None = None
        self._engine: ScoringEngine | None = None
        self._kept: EngineSession | None = None
        reason = None if engine == "plain" else ScoringEngine.unsupported_reason(model)
        if engine == "features" and reason is not None:
            raise ValueError(
                f"`engine` is 'features', but {reason}, so that scores may differ. Pass `engine=\"plain\"`, or leave it out."
            )
        if engine != "plain" and reason is None:
            self._engine = ScoringEngine(
                model,
                processor,
                batch_size=batch_size,
                max_batch_tokens=max_batch_tokens,
                num_workers=num_workers,
                share_prefixes=engine == "auto",
                pad_to_multiple_of=pad_to_multiple_of,
                compile_model=compile_model,
            )

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
                Devices of the model, e.g. `"auto"`. Defaults to the CPU.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Type of the weights. `"auto"` takes the one that they were saved in.
            batch_size (`int`, *optional*, defaults to `8`):
                Largest number of judgements per forward pass.
            kwargs:
                Further arguments of [`RewardDanceScorer`]: `engine`, `num_workers`, ...; and of
                [`RewardDanceForYesScoring.from_pretrained`]: `revision`, `token`, `paradigm`, ...

        Returns:
            [`RewardDanceScorer`]

        Raises:
            `ValueError`: If weights are missing.
            `ImportError`: If an adapter is to be loaded without peft.
        """
        settings = {name: kwargs.pop(name) for name in ENGINE_ARGUMENTS if name in kwargs}
        model, processor = load_judge(pretrained_model_name_or_path, device_map=device_map, dtype=dtype, **kwargs)
        return cls(model.requires_grad_(False), processor, batch_size=batch_size, **settings)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Save the judge so that [`~RewardDanceScorer.from_pretrained`] finds all of it: weights or adapter, configuration
        with its temperature, and processor.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, made if it is missing.
        """
        self.model.save_pretrained(save_directory)
        if getattr(self.model, "peft_config", None):  # adapters are saved without a configuration
            self.model.config.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)

    @property
    def is_pairwise(self) -> bool:
        """Whether a sample is judged relative to a reference."""
        return self.model.config.paradigm == "pairwise"

    def __call__(
        self,
        images: Any,
        prompts: str | Sequence[str],
        references: Any = None,
        conditions: Sequence[Any] | None = None,
        task: str | Sequence[str] = "text-to-image",
        criteria: str | Sequence[str | None] | None = None,
        dimensions: Sequence[str] | None = None,
        examples: Examples = None,
    ) -> torch.Tensor:
        """Same as [`~RewardDanceScorer.score`]."""
        return self.score(images, prompts, references, conditions, task, criteria, dimensions, examples)

    def score(
        self,
        images: Any,
        prompts: str | Sequence[str],
        references: Any = None,
        conditions: Sequence[Any] | None = None,
        task: str | Sequence[str] = "text-to-image",
        criteria: str | Sequence[str | None] | None = None,
        dimensions: Sequence[str] | None = None,
        examples: Examples = None,
        show_progress: bool = False,
    ) -> torch.Tensor:
        r"""
        Compute rewards of samples.

        Rewards carry a gradient if an image does that is given as a tensor: samples, and references and first frames if
        they are not detached. The model's weights get none, whatever their `requires_grad`.

        Args:
            images (`list` or `torch.Tensor` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`):
                Samples: images, paths, or lists of those as frames of clips; or a tensor of floats in `[0, 1]`.
            prompts (`str` or `list[str]`):
                Prompts that the samples were generated from, one for all or one each.
            references (`list` or `torch.Tensor`, *optional*):
                One sample to compare with for each, in the same forms as `images`. Required in the pairwise paradigm,
                refused in the others.
            conditions (`list`, *optional*):
                First frames that were given to an image-to-video generator.
            task (`str` or `list[str]`, *optional*, defaults to `"text-to-image"`):
                Task whose criteria are used, for all or one each.
            criteria (`str` or `list`, *optional*):
                Criteria in place of those of `task`, for all or one each.
            dimensions (`list[str]`, *optional*):
                Names of dimensions to score by, each on its own, in place of the criteria of `task`: those of
                `processor.dimensions[task]`, e.g. `["alignment", "motion"]`. The engine sees images once for all.
            examples (`list[dict]`, *optional*):
                Judgements with known verdicts that the judge is shown before each question (in-context examples), as in
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
            `NotImplementedError`: If an image requires a gradient that cannot pass through the image processor.
        """
        judgements = self._questions(images, prompts, references, conditions, task, criteria, examples)
        if dimensions is not None:
            by_row = [self._by_dimension(judgement, dimensions) for judgement in judgements]
            judgements = [judgement for row in by_row for judgement in row]
        media = [(judgement.sample, judgement.reference, judgement.condition) for judgement in judgements]
        with torch.set_grad_enabled(torch.is_grad_enabled() and _requires_grad(media)), frozen(self.model):
            if dimensions is None:
                return self._judge(judgements, show_progress)[1]
            width = len(dimensions)
            try:
                return self._judge(judgements, show_progress)[1].view(-1, width)
            except NonFiniteScoreError as error:
                rows = sorted({index // width for index in error.rows})
                known = torch.nn.functional.pad(error.scores, (0, -len(error.scores) % width), value=torch.nan)
                raise _non_finite_error(rows, known.view(-1, width)) from error

    def reason(
        self,
        images: Any,
        prompts: str | Sequence[str],
        references: Any = None,
        conditions: Sequence[Any] | None = None,
        task: str | Sequence[str] = "text-to-image",
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
            images (`list` or `torch.Tensor`):
                Samples; these and all up to `criteria` as in [`~RewardDanceScorer.score`].
            prompts (`str` or `list[str]`):
                Prompts that the samples were generated from, one for all or one each.
            references (`list` or `torch.Tensor`, *optional*):
                One sample to compare with for each, in the pairwise paradigm.
            conditions (`list`, *optional*):
                First frames that were given to an image-to-video generator.
            task (`str` or `list[str]`, *optional*, defaults to `"text-to-image"`):
                Task whose criteria are used, for all or one each.
            criteria (`str` or `list`, *optional*):
                Criteria in place of those of `task`, for all or one each.
            num_samples (`int`, *optional*, defaults to `1`):
                Number of chains of thought for each sample.
            max_new_tokens (`int`, *optional*, defaults to `512`):
                Maximum length of a chain. A longer one reaches no answer: its score is NaN, and it is counted.
            temperature (`float`, *optional*):
                Temperature of sampling. Defaults to 0 (the most probable chain) for one chain, and to 0.7 for several.
            seed (`int`, *optional*, defaults to `0`):
                Seed of sampling. The random state outside stays as it is.
            show_progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            [`~rewarddance_hf.scoring.reasoning.ReasonedScores`]: Mean and spread of the rewards, those after each chain, and
            the chains.

        Raises:
            `ValueError`: As in [`~RewardDanceScorer.score`], and if an argument is out of range.
            `NoAnswerError`: If no chain reached an answer; a `ValueError` with the `texts`.
        """
        return score_with_reasons(
            self.model,
            self.processor,
            lambda batch: self._inputs(batch, reasons_first=True),
            self._questions(images, prompts, references, conditions, task, criteria),
            self.batch_size,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            show_progress=show_progress,
        )

    def score_dataset(
        self,
        rows: Sequence[Mapping[str, Any]],
        output_file: str | os.PathLike,
        save_every: int = 256,
        show_progress: bool = True,
        examples: Examples = None,
    ) -> int:
        r"""
        Score a dataset into a file of JSON lines, `{"row": 0, "score": 0.5}`.

        An interrupted call goes on where it stopped when it is repeated: rows that are in the file are not scored again,
        and a last line that was cut off is removed first. References that come again are shared if their rows are near.
        The file does not know by which judge and after which examples it was scored: repeat the call with the same ones.

        Args:
            rows (`datasets.Dataset` or `list[dict]`):
                Rows with `image` (image, or list of frames) and `prompt`, with `reference` for a pairwise judge, and
                optional `condition`, `task` and `criteria`, as in [`~RewardDanceScorer.score`].
            output_file (`str` or `os.PathLike`):
                File to write to, or to go on with.
            save_every (`int`, *optional*, defaults to `256`):
                Number of rows that are scored between two writes.
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show a progress bar.
            examples (`list[dict]`, *optional*):
                Judgements with known verdicts that the judge is shown before each question, as in
                [`~RewardDanceScorer.score`]. Those that name no `task` have the task of the row.

        Returns:
            `int`: Number of rows that were scored by this call.

        Raises:
            `ValueError`: If the file belongs to other rows, an example lacks something, or a row cannot be scored. What is in
                the file stays.
        """

        @cache
        def examples_of(task: str) -> tuple[Example, ...]:
            return self.processor.read_examples(examples, task, self.is_pairwise)

        return score_into_file(
            self._stream, self.is_pairwise, examples_of, rows, output_file, save_every, show_progress
        )

    @torch.no_grad()
    def compare(
        self,
        image_a: Any,
        image_b: Any,
        prompt: str,
        swap: bool = True,
        explain: bool = False,
        condition: Any = None,
        task: str = "text-to-image",
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
            image_a (image or `list` of images):
                Image or clip A.
            image_b (image or `list` of images):
                Image or clip B.
            prompt (`str`):
                Prompt that both were generated from.
            swap (`bool`, *optional*, defaults to `True`):
                Whether to ask in both orders and to average the probabilities. Pairwise paradigm only.
            explain (`bool`, *optional*, defaults to `False`):
                Whether to generate the rationale that follows the verdict. Pairwise paradigm only.
            condition (image, *optional*):
                First frame that was given to an image-to-video generator.
            task (`str`, *optional*, defaults to `"text-to-image"`):
                Task whose criteria are used.
            criteria (`str`, *optional*):
                Criteria in place of those of `task`.
            max_new_tokens (`int`, *optional*, defaults to `256`):
                Maximum length of the rationale.
            dimensions (`list[str]`, *optional*):
                Names of dimensions to compare by beside the criteria of `task`, as in [`~RewardDanceScorer.score`].
            examples (`list[dict]`, *optional*):
                Judgements with known verdicts that the judge is shown before each question (in-context examples), as in
                [`RewardDanceProcessor.read_examples`]. They are computed once.

        Returns:
            [`~rewarddance_hf.scoring.results.Comparison`]: By the criteria of `task`, with those by `dimensions` in it.

        Raises:
            `ValueError`: If an image cannot be read, a score is not finite, `explain` is used without a pairwise judge, a
                dimension does not exist, both `criteria` and `dimensions` are given, or an example lacks something.
        """
        if explain and not self.is_pairwise:
            raise ValueError(
                f"`explain` is True, but the judge is {self.model.config.paradigm} and gives no verdict about two samples. "
                "Pass `explain=False`, or load a pairwise judge."
            )
        frames_a, frames_b = (
            self.processor.load_frames(image, name, task)
            for image, name in ((image_a, "image_a"), (image_b, "image_b"))
        )
        shown = self.processor.read_examples(examples, task, self.is_pairwise)
        question = Judgement(frames_a, prompt, condition=condition, task=task, criteria=criteria, examples=shown)
        questions = [question, *([] if dimensions is None else self._by_dimension(question, dimensions))]
        judgements = []
        for judgement_a in questions:
            judgement_b = replace(judgement_a, sample=frames_b)
            if self.is_pairwise:
                in_order = replace(judgement_b, reference=frames_a)
                judgements += [in_order, replace(judgement_a, reference=frames_b)] if swap else [in_order]
            else:
                judgements += [judgement_a, judgement_b]
        logits = self._judge(judgements)[0].double().view(len(questions), -1)
        overall, *others = map(self._verdict, logits)
        rationale = self._explain(judgements[0], overall.winner == "b", max_new_tokens) if explain else None
        by_dimension = None if dimensions is None else dict(zip(dimensions, others, strict=True))
        return replace(overall, rationale=rationale, dimensions=by_dimension)

    def _verdict(self, logits: torch.Tensor) -> Comparison:
        """Verdict by the log-odds of both orders, or of one, or of A and B alone."""
        order_consistent = None
        if self.is_pairwise:
            yes = logits.sigmoid().tolist()
            swap = len(yes) == 2
            margin = yes[0] - (yes[1] if swap else 0.5)  # above 0 if B is better
            probability_b = 0.5 + margin / 2 if swap else yes[0]
            if swap:
                order_consistent = _winner(yes[0] - 0.5) == _winner(0.5 - yes[1])
        else:
            margin = float(logits[1] - logits[0])
            probability_b = float((logits[1] - logits[0]).sigmoid())
        return Comparison(
            probability_a=1 - probability_b,
            probability_b=probability_b,
            winner=_winner(margin),
            order_consistent=order_consistent,
        )

    @torch.no_grad()
    def rank(
        self,
        images: Any,
        prompt: str,
        top_k: int | None = None,
        condition: Any = None,
        task: str = "text-to-image",
        criteria: str | None = None,
        show_progress: bool = False,
        ranking_method: str = "round_robin",
        num_rounds: int | None = None,
        examples: Examples = None,
    ) -> Ranking:
        r"""
        Rank samples of a prompt.

        A pairwise judge compares samples in both orders, which are two judgements; a comparison is won by the average of
        both. By default all are compared with all, `n * (n - 1)` judgements. Tournaments find the best of many with
        fewer: 64 samples take 4032 judgements as a round robin, 384 by Swiss rounds, at most 250 by halving. Other
        judges score each sample once, whatever the method.

        Args:
            images (`list` or `torch.Tensor` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`):
                Two or more samples, as in [`~RewardDanceScorer.score`].
            prompt (`str`):
                Prompt that all were generated from.
            top_k (`int`, *optional*, defaults to all):
                Number of best samples to keep in `order`.
            condition (image, *optional*):
                First frame that was given to an image-to-video generator.
            task (`str`, *optional*, defaults to `"text-to-image"`):
                Task whose criteria are used.
            criteria (`str`, *optional*):
                Criteria in place of those of `task`.
            show_progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.
            ranking_method (`str`, *optional*, defaults to `"round_robin"`):
                `"round_robin"` compares all with all. `"swiss"` plays `num_rounds` rounds of `n // 2` comparisons, in
                which neighbors in the standings meet. `"halving"` plays `num_rounds` such rounds, drops the worse half and
                goes on until `top_k` samples (or one) are left: less than `num_rounds * n` comparisons.
            num_rounds (`int`, *optional*):
                Number of rounds. Defaults to the binary logarithm of `n`, rounded up, for `"swiss"`, and to 2 for
                `"halving"`.
            examples (`list[dict]`, *optional*):
                Judgements with known verdicts that the judge is shown before each question (in-context examples), as in
                [`RewardDanceProcessor.read_examples`]. They are computed once.

        Returns:
            [`~rewarddance_hf.scoring.results.Ranking`]

        Raises:
            `ValueError`: If there are fewer than two samples, `top_k`, `ranking_method` or `num_rounds` is out of range, an image
                cannot be read, or a score is not finite.
        """
        samples = [
            self.processor.load_frames(image, f"images[{i}]", task)
            for i, image in enumerate(_as_list(images, "images"))
        ]
        check_ranking(len(samples), self.is_pairwise, top_k, ranking_method, num_rounds)
        shown = self.processor.read_examples(examples, task, self.is_pairwise)
        questions = [Judgement(sample, prompt, None, condition, task, criteria, shown) for sample in samples]
        if not self.is_pairwise:
            logits, scores = (values.cpu() for values in self._judge(questions, show_progress))
            return rank_by_scores(logits, scores, top_k)

        def ask(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
            asked = [replace(questions[j], reference=questions[i].sample) for i, j in pairs]
            logits, rewards = self._judge(asked, show_progress, session, RANK_WINDOW)
            return logits.double().sigmoid(), rewards

        with self._session() as session:  # each sample is seen once in all rounds
            return rank_by_comparisons(ask, len(samples), top_k, ranking_method, num_rounds)

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """
        Keep images and their features from call to call inside this context, e.g. references that come in every step
        of a training run. The weights of the judge must not change meanwhile. Images with a gradient are not kept.

        Example:

        ```python
        with scorer.reuse():
            for samples in generator:
                scorer.score(samples, prompts, references).mean().backward()
        ```
        """
        if self._engine is None or self._kept is not None:
            yield
            return
        with self._engine.session() as self._kept:
            try:
                yield
            finally:
                self._kept = None

    @contextmanager
    def _session(self) -> Iterator[EngineSession | None]:
        """Judgements of one session share images and features. Without an engine there is nothing to share."""
        self.statistics = None
        if self._engine is None:
            yield None
        elif self._kept is not None:
            self.statistics = self._kept.statistics
            try:
                yield self._kept
            finally:
                self._engine.vision.drop_gradients(self._kept)
        else:
            with self._engine.session() as session:
                self.statistics = session.statistics
                yield session

    def _questions(
        self,
        images: Any,
        prompts: str | Sequence[str],
        references: Any,
        conditions: Sequence[Any] | None,
        task: str | Sequence[str],
        criteria: str | Sequence[str | None] | None,
        examples: Examples = None,
    ) -> list[Judgement]:
        """One question for each sample, from the arguments of [`~RewardDanceScorer.score`]."""
        samples = _as_list(images, "images")
        count = len(samples)
        if count == 0:
            raise ValueError("`images` is empty, but must hold at least one sample.")
        references = None if references is None else _as_list(references, "references")
        if self.is_pairwise and references is None:
            raise ValueError(
                "`references` is None, but the judge is pairwise: its reward is relative to another sample of the same "
                "prompt. Pass one reference per image, use `compare` or `rank`, or load a pointwise judge."
            )
        if not self.is_pairwise and references is not None:
            raise ValueError(
                f"`references` was given, but the judge is {self.model.config.paradigm} and looks at one sample only. "
                "Leave `references` out, or load a pairwise judge."
            )
        prompts = _spread(prompts, count, "prompts")
        references = _spread(references, count, "references")
        for i in range(count):
            if not isinstance(prompts[i], str):
                raise TypeError(f"`prompts[{i}]` is of type `{type(prompts[i]).__name__}`, but must be a string.")
            if self.is_pairwise and references[i] is None:
                raise ValueError(f"`references[{i}]` is None, but a pairwise judge needs a reference for every image.")
        columns = {
            "sample": samples,
            "prompt": prompts,
            "reference": references,
            "condition": _spread(conditions, count, "conditions"),
            "task": _spread(task, count, "task"),
            "criteria": _spread(criteria, count, "criteria"),
        }
        shown = self.processor.read_examples(examples, columns["task"], self.is_pairwise)
        rows = zip(*columns.values(), strict=True)
        return [Judgement(**dict(zip(columns, row, strict=True)), examples=shown, row=i) for i, row in enumerate(rows)]

    def _by_dimension(self, judgement: Judgement, dimensions: Sequence[str]) -> list[Judgement]:
        """The same question by the criteria of each dimension."""
        if isinstance(dimensions, str) or not dimensions or len(set(dimensions)) < len(dimensions):
            raise ValueError(
                f"`dimensions` is {dimensions!r}, but must be a list of different names, e.g. `['alignment']`."
            )
        if judgement.criteria is not None:
            raise ValueError(
                "`criteria` and `dimensions` were both given, but a question is asked by one of them. Leave one out; own "
                "dimensions are an argument of `RewardDanceProcessor.from_pretrained`."
            )
        lookup = self.processor.dimension_criteria
        return [replace(judgement, criteria=lookup(name, judgement.task)) for name in dimensions]

    def _judge(
        self,
        judgements: list[Judgement],
        show_progress: bool = False,
        session: EngineSession | None = None,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-odds and scores of judgements, each of shape `(n,)`. All rewards come from here."""
        with tqdm(total=len(judgements), desc="Scoring", unit="judgement", disable=not show_progress) as progress:
            logits, scores = zip(*self._stream(judgements, progress.update, session, window), strict=True)
        return torch.cat(logits), torch.cat(scores)

    def _stream(
        self,
        judgements: Iterable[Judgement],
        on_progress: Callable[[int], Any],
        session: EngineSession | None = None,
        window: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-odds and scores of the next judgements, checked, as soon as they are known."""
        count, known = 0, []
        with nullcontext(session) if session is not None else self._session() as session:
            if self._engine is None or session is None:
                batches = self._judge_plainly(judgements, on_progress)
            else:
                batches = self._engine.judge(judgements, session, on_progress, window)
            for logits, scores in batches:
                known.append(scores.detach())
                finite = logits.isfinite() & scores.isfinite()
                if not finite.all():
                    rows = [count + i for i in (~finite).nonzero()[:, 0].tolist()]
                    raise _non_finite_error(rows, torch.cat(known))
                count += len(finite)
                yield logits, scores

    def _judge_plainly(
        self, judgements: Iterable[Judgement], on_progress: Callable[[int], Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-odds and scores of batches, each judgement computed on its own."""
        start = 0
        for _, rest in groupby(judgements, key=lambda judgement: judgement.examples):
            while batch := list(islice(rest, self.batch_size)):
                output = self.model(**self._inputs(batch, start).to(self.model.device))
                on_progress(len(batch))
                yield output.logits[:, 0].float(), output.scores.float()
                start += len(batch)

    def _inputs(self, judgements: list[Judgement], start: int = 0, reasons_first: bool = False) -> Any:
        """
        Inputs of the model for one batch, all with the same examples; `start` is the index of its first judgement, for
        error messages.
        """
        samples, references, conditions = [], [], []
        for index, judgement in enumerate(judgements, start):
            i = index if judgement.row is None else judgement.row
            task = judgement.task
            samples.append(self.processor.load_frames(judgement.sample, f"images[{i}]", task, keep_gradient=True))
            if judgement.reference is not None:
                reference = self.processor.load_frames(judgement.reference, f"references[{i}]", task, True)
                references.append(reference)
            condition = judgement.condition
            if condition is not None:
                condition = load_image(condition, f"conditions[{i}]", keep_gradient=True)
            conditions.append(condition)
        return self.processor(
            images=samples,
            prompts=[judgement.prompt for judgement in judgements],
            references=references or None,
            conditions=conditions,
            task=[judgement.task for judgement in judgements],
            criteria=[judgement.criteria for judgement in judgements],
            reasons_first=reasons_first,
            examples=judgements[0].examples,
        )

    def _explain(self, judgement: Judgement, answer: bool, max_new_tokens: int) -> str:
        """Text that the judge continues with after an answer ("decision first", Section 3.2.1)."""
        batch = self.processor.append_answers(self._inputs([judgement]), [answer], [None])
        return generate_texts(self.model, self.processor, batch, max_new_tokens)[0]


def _as_list(media: Any, name: str) -> list[Any]:
    """Samples of a batch, which is a list or a tensor."""
    if isinstance(media, torch.Tensor):
        if media.ndim not in (4, 5):
            raise ValueError(
                f"`{name}` has shape {tuple(media.shape)}, but a tensor must be of shape `(n, 3, height, width)` or "
                "`(n, frames, 3, height, width)`. Add the batch dimension, e.g. `image[None]`."
            )
        return list(media)
    if not isinstance(media, (list, tuple)):
        raise TypeError(
            f"`{name}` is of type `{type(media).__name__}`, but must be a list with one entry per sample, or a tensor. Wrap "
            "a single sample in a list."
        )
    return list(media)


def _requires_grad(media: Any) -> bool:
    if isinstance(media, (list, tuple)):
        return any(_requires_grad(frame) for frame in media)
    return isinstance(media, torch.Tensor) and media.requires_grad


def _spread(values: Any, count: int, name: str) -> list[Any]:
    """One value per row, from one for all (a string or None) or a sequence."""
    if values is None or isinstance(values, str):
        return [values] * count
    values = list(values)
    if len(values) != count:
        raise ValueError(
            f"`{name}` has {len(values)} entries for {count} images, but must have one per image. Make both equally long."
        )
    return values


def _non_finite_error(rows: list[int], scores: torch.Tensor) -> NonFiniteScoreError:
    return NonFiniteScoreError(
        f"Scores of the rows {rows} are NaN or infinite, but must be finite. Check the weights for NaN, or load them in "
        "another type (`dtype=torch.float32`). Scores until there are in `scores` of this error.",
        rows,
        scores,
    )


def _winner(margin: float) -> str:
    return "tie" if margin == 0 else "b" if margin > 0 else "a"
