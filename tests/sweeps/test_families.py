"""
Every image-text-to-text architecture of transformers that can be built tiny, against plain transformers: `make test-families`.

Each check ends as "ok", as a reason why it does not apply (plain transformers cannot do it either, or this package says so
in an error of its own), or as a fault. Outcomes go to a file, which the table in `rewarddance_hf/models/README.md` is made from.
"""

import json
import os
import traceback
from pathlib import Path

import pytest
import tiny_vlms
import torch
from family_inputs import PER_TOKEN, NoInputsError, question
from tiny_architectures import architectures, tiny_config
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForImageTextToText

import rewarddance_hf
from rewarddance_hf import (
    DataCollatorForRewardDance,
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
)


PACKAGE = str(Path(rewarddance_hf.__file__).parent)
RESULTS = Path(os.environ.get("REWARDDANCE_FAMILIES", "outputs/families.json"))
YES, NO = 290, 291
CLOSE = {"rtol": 0, "atol": 2e-5}
# Faults of plain transformers that a check runs into, or of this package that are known and not mended yet
KNOWN: dict[tuple[str, str], str] = {}


class Family:
    """An architecture's plain model, the judge that was made from its checkpoint, and what came of the checks."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.model_type = model_type
        torch.manual_seed(0)
        plain = AutoModelForImageTextToText.from_config(tiny_config(model_type)).eval()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if parameter.ndim >= 2 and "embed" not in name:
                    parameter.mul_(2.0)
                if parameter.abs().max() < 1e-6 and not name.endswith("bias"):  # gates, and vision of SAM
                    parameter.normal_(0, 0.1)
        plain.save_pretrained(folder)
        self.folder = folder
        self.plain, self.info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        self.plain.requires_grad_(False)
        self._judge: RewardDanceForYesScoring | None = None

    @property
    def judge(self) -> RewardDanceForYesScoring:
        if self._judge is None:
            self._judge = RewardDanceForYesScoring.from_pretrained(self.folder, yes_token_id=YES, no_token_id=NO)
            self._judge.requires_grad_(False)
        return self._judge

    def question(self, rows, image_seed: int = 0) -> dict[str, torch.Tensor]:
        try:
            return question(self.plain, rows, image_seed)
        except NoInputsError as error:
            raise NotApplicable(f"no inputs: {error}") from error

    def wanted(self, **inputs) -> torch.Tensor:
        """Logits of the plain model after each question."""
        try:
            return self.plain(**inputs).logits[:, -1]
        except Exception as error:
            raise NotApplicable(f"plain transformers: {error!r}") from error


class NotApplicable(Exception):
    """A check that an architecture cannot be put to, with the reason."""


@pytest.fixture(scope="session")
def results():
    collected: dict[str, dict[str, str]] = {}
    yield collected
    if os.environ.get("PYTEST_XDIST_WORKER"):
        raise RuntimeError("Run the sweep in one process: results go to one file.")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(collected, indent=2) + "\n")


@pytest.fixture(scope="module", params=list(architectures()))
def family(request, tmp_path_factory, results):
    model_type = request.param
    results[model_type] = {}
    try:
        return Family(model_type, tmp_path_factory.mktemp("plain"))
    except Exception as error:
        results[model_type]["built"] = f"{type(error).__name__}: {error}"[:300]
        return model_type


@pytest.fixture
def check(family, results, request):
    """Function that runs a check, and writes down what came of it."""

    def run(work):
        name = request.node.originalname.removeprefix("test_")
        if isinstance(family, str):
            pytest.skip(f"not built: {results[family]['built']}")
        outcomes = results[family.model_type]
        try:
            outcomes[name] = work(family) or "ok"
        except NotApplicable as reason:
            outcomes[name] = f"not applicable: {reason}"[:600]
            pytest.skip(str(reason))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1].filename
            if last.startswith(PACKAGE) and isinstance(error, (ValueError, TypeError, NotImplementedError)):
                outcomes[name] = f"error: {error}"
                return
            outcomes[name] = f"fault: {type(error).__name__}: {error}"[:600]
            if (family.model_type, name) in KNOWN:
                pytest.xfail(KNOWN[family.model_type, name])
            raise

    return run


def test_weights(check):
    """All weights are those that `AutoModelForImageTextToText` has."""

    @check
    def _(family):
        if family.info["missing_keys"]:
            raise NotApplicable(f"plain transformers misses {sorted(family.info['missing_keys'])[:3]}")
        got, wanted = family.judge.vlm.state_dict(), family.plain.state_dict()
        assert got.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert torch.equal(got[name], weight), name


def test_score(check):
    """The score is the softmax of the last position's logits, and the image matters."""

    @check
    def _(family):
        batch = family.question([0])
        with torch.no_grad():
            logits, other = family.wanted(**batch), family.wanted(**family.question([0], image_seed=7))
            output = family.judge(**batch)
        assert logits.isfinite().all()
        assert not torch.equal(logits, other), "the image does not matter"
        wanted = logits.softmax(-1)[:, [YES, NO]]
        torch.testing.assert_close(output.scores, wanted[:, 0], rtol=0, atol=1e-7)
        torch.testing.assert_close(output.answer_log_probs, wanted.log(), **CLOSE)


def test_batch(check):
    """A row scores the same alone and beside a longer one."""

    @check
    def _(family):
        questions = [family.question([0]), family.question([1])]
        with torch.no_grad():
            plain = torch.cat([family.wanted(**batch) for batch in questions]).log_softmax(-1)
            gap = (family.wanted(**family.question([0, 1])).log_softmax(-1) - plain).abs().max()
            alone = [family.judge(**batch).answer_log_probs for batch in questions]
            together = family.judge(**family.question([0, 1])).answer_log_probs
        assert not torch.equal(*alone)
        if gap > CLOSE["atol"]:
            raise NotApplicable(f"plain transformers: log-probabilities depend on padding, by up to {gap:.1e}")
        torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


def test_gradient(check):
    """The gradient reaches the pixels, and is that of the plain model."""

    @check
    def _(family):
        gradients = []
        for score in (
            lambda **batch: family.wanted(**batch).softmax(-1)[:, YES],
            lambda **batch: family.judge(**batch).scores,
        ):
            batch = family.question([0])
            pixels = batch["pixel_values" if "pixel_values" in batch else "flattened_patches"].requires_grad_()
            value = score(**batch).sum()
            if not value.requires_grad:
                raise NotApplicable("plain transformers: no gradient to pixels")
            gradients.append(torch.autograd.grad(value, pixels, allow_unused=True)[0])
            if gradients[-1] is None:
                raise NotApplicable("plain transformers: no gradient to pixels")
        wanted, got = gradients
        assert wanted.isfinite().all()
        assert wanted.abs().max() > 0
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_rationale(check):
    """Answers and rationales that follow the question have the plain model's losses, row by row."""

    @check
    def _(family):
        batch = family.question([0, 1])
        rows, length = batch["input_ids"].shape
        targets = torch.tensor([[YES, 210, 211, 212], [NO, 220, 0, 0]])
        lengths = targets.ne(0).sum(-1)
        extended = dict(batch)
        for name in PER_TOKEN:
            if name in batch:
                new = batch[name][:, -1:].expand(rows, targets.shape[1], *batch[name].shape[2:])
                extended[name] = torch.cat(
                    [batch[name], torch.zeros_like(new) if name.endswith("type_ids") else new], 1
                )
        extended["input_ids"] = torch.cat([batch["input_ids"], targets], 1)
        extended["attention_mask"] = torch.cat([batch["attention_mask"], targets.ne(0).long()], 1)
        labels = pad(targets.where(targets.ne(0), -100), (length, 0), value=-100)
        labels[:, length] = -100  # the answer has a loss of its own
        try:
            with torch.no_grad():
                logits = family.plain(**extended).logits
        except Exception as error:
            raise NotApplicable(f"plain transformers: {error!r}") from error
        with torch.no_grad():
            output = family.judge(
                **extended,
                labels=torch.tensor([1.0, 0.0]),
                rationale_labels=labels,
                answer_index=torch.full((rows,), length - 1),
            )
        wanted = torch.stack(
            [
                cross_entropy(logits[row, length : length + count - 1], targets[row, 1:count])
                for row, count in enumerate(lengths)
            ]
        )
        torch.testing.assert_close(output.rationale_loss, wanted, **CLOSE)
        answers = logits[:, length - 1].log_softmax(-1)[:, [YES, NO]]
        torch.testing.assert_close(output.answer_log_probs, answers, **CLOSE)
        loss = -(answers[0, 0] + answers[1, 1]) / 2 + wanted.mean()
        torch.testing.assert_close(output.loss, loss, **CLOSE)


def test_processor(check, tmp_path):
    """Where there is a tiny processor: questions, training batches with rationales and the engine, as users have them."""

    @check
    def _(family):
        if family.model_type not in tiny_vlms.FAMILIES:
            raise NotApplicable("no tiny processor")
        folder = tiny_vlms.save_tiny_vlm(family.model_type, tmp_path)
        judge, processor = (
            RewardDanceForYesScoring.from_pretrained(folder),
            RewardDanceProcessor.from_pretrained(folder),
        )
        plain = AutoModelForImageTextToText.from_pretrained(folder)
        images = [tiny_vlms.random_image(seed, *size) for seed, size in enumerate([(40, 40), (64, 30), (28, 56)])]
        prompts = ["a red circle", "two green triangles left of a blue square", ""]
        batch = processor(images, prompts, images[::-1])
        with torch.no_grad():
            wanted = plain(**batch).logits[:, -1].softmax(-1)[:, processor.yes_token_id]
            torch.testing.assert_close(judge(**batch).scores, wanted, rtol=0, atol=1e-6)

        rows = [
            {"prompt": prompt, "chosen": image, "rejected": images[0], "rationale": "Image 1 shows a red circle."}
            for prompt, image in zip(prompts, images, strict=True)
        ]
        output = judge.train()(**DataCollatorForRewardDance(processor, with_rationales=True)(rows))
        output.loss.backward()
        assert output.loss.isfinite()
        assert (output.rationale_loss > 0).all()
        judge.eval()

        pixels = torch.rand(1, 3, 40, 40, requires_grad=True)
        judge(**processor(list(pixels), ["a red circle"], [images[0]])).scores.sum().backward()
        assert pixels.grad.abs().max() > 0


def test_engine(check, tmp_path):
    """The scorer's engine takes the family, and its rewards are those of the plain path."""

    @check
    def _(family):
        if family.model_type not in tiny_vlms.FAMILIES:
            raise NotApplicable("no tiny processor")
        folder = tiny_vlms.save_tiny_vlm(family.model_type, tmp_path)
        judge, processor = (
            RewardDanceForYesScoring.from_pretrained(folder),
            RewardDanceProcessor.from_pretrained(folder),
        )
        images = [tiny_vlms.random_image(seed) for seed in range(4)]
        got, wanted = (
            RewardDanceScorer(judge, processor, engine=engine).score(images, ["a red circle"] * 4, images[::-1])
            for engine in ("features", "plain")
        )
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(wanted), rtol=0, atol=1e-6)
