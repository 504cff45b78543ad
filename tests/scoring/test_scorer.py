"""The scorer against plain reference computations, on real tiny models."""

import itertools

import pytest
import torch
import transformers
from PIL import Image
from tiny_vlms import CHATML, TEXT, VISION, random_image, tiny_tokenizer

from rewarddance_hf import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.rewards import NonFiniteScoreError
from rewarddance_hf.scoring import judge


PROMPTS = ["a red circle", "two green triangles left of a blue square", "yes", "a blue square", "no"]
SAMPLES = [random_image(i, *size) for i, size in enumerate([(40, 40), (60, 30), (28, 56), (33, 41), (40, 40)])]
REFERENCES = [random_image(10 + i) for i in range(5)]
PARADIGMS = ("pairwise", "pointwise", "regressive")


def make_scorer(folder, paradigm="pairwise", batch_size=2, engine="auto", **settings):
    torch.manual_seed(0)
    model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm, **settings)
    if paradigm == "regressive":
        torch.nn.init.normal_(model.score.weight, std=0.5)
    return RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(folder), batch_size, engine)


@pytest.fixture(scope="module")
def scorers(vlm_folder):
    """One scorer for each paradigm. Read only."""
    return {paradigm: make_scorer(vlm_folder("internvl"), paradigm) for paradigm in PARADIGMS}


def ask(scorer, sample, prompt, reference=None, **context):
    """One question alone, straight through processor and model."""
    batch = scorer.processor([sample], [prompt], None if reference is None else [reference], **context)
    with torch.no_grad():
        return scorer.model(**batch)


# ---- score ----


@pytest.mark.every_family
def test_scores_equal_the_model_one_by_one(vlm_folder, family):
    """Batches of mixed sizes and lengths give the rewards of single questions, in every family."""
    scorer = make_scorer(vlm_folder(family), batch_size=2)
    got = scorer.score(SAMPLES[:3], PROMPTS[:3], references=REFERENCES[:3])
    want = [ask(scorer, *row).scores for row in zip(SAMPLES[:3], PROMPTS, REFERENCES, strict=False)]
    assert got.shape == (3,)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert not scorer.model.training
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("paradigm", ["pointwise", "regressive"])
def test_scores_without_references(scorers, paradigm):
    """Judges of single samples are asked without reference."""
    got = scorers[paradigm].score(SAMPLES, PROMPTS)
    want = torch.cat([ask(scorers[paradigm], *row).scores for row in zip(SAMPLES, PROMPTS, strict=True)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_order_and_batch_size_do_not_matter(scorers):
    """A reward belongs to its row, whatever else is in the batch."""
    scorer = scorers["pairwise"]
    want = scorer.score(SAMPLES, PROMPTS, REFERENCES)
    order = [3, 0, 4, 2, 1]
    for batch_size in (1, 3, 8):
        other = RewardDanceScorer(scorer.model, scorer.processor, batch_size)
        got = other.score(*([column[i] for i in order] for column in (SAMPLES, PROMPTS, REFERENCES)))
        torch.testing.assert_close(got, want[order], rtol=1e-4, atol=1e-6)


def test_scorer_is_a_reward_function(scorers):
    """Calling the scorer is scoring, and one prompt serves all images."""
    scorer = scorers["pairwise"]
    want = scorer.score(SAMPLES, ["a red circle"] * 5, REFERENCES)
    assert torch.equal(scorer(SAMPLES, "a red circle", references=REFERENCES), want)


def test_context_reaches_the_question(scorers):
    """Task, criteria and first frame, for all or one each, are those of single questions."""
    scorer = scorers["pairwise"]
    got = scorer.score(
        SAMPLES[:2],
        PROMPTS[:2],
        REFERENCES[:2],
        conditions=[SAMPLES[4], None],
        task=["image-to-video", "text-to-image"],
        criteria=[None, "quality"],
    )
    first = ask(scorer, SAMPLES[0], PROMPTS[0], REFERENCES[0], conditions=[SAMPLES[4]], task="image-to-video").scores
    second = ask(scorer, SAMPLES[1], PROMPTS[1], REFERENCES[1], criteria="quality").scores
    torch.testing.assert_close(got, torch.cat([first, second]), rtol=1e-4, atol=1e-6)
    plain = scorer.score(SAMPLES[:2], PROMPTS[:2], REFERENCES[:2])
    assert (got - plain).abs().min() > 1e-6


def test_tensors_paths_and_clips(scorers, tmp_path):
    """Tensors of images and clips, paths and lists of frames are the same samples."""
    scorer = scorers["pairwise"]
    pixels = torch.randint(0, 256, (2, 3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames = [list(clip) for clip in pixels]
    want = scorer.score(frames, "a red circle", frames[::-1], task="text-to-video")
    got = scorer.score(pixels.float() / 255, "a red circle", (pixels.float() / 255).flip(0), task="text-to-video")
    assert torch.equal(got, want)
    images = pixels[:, 0]
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    got = scorer.score(images.float() / 255, "a red circle", paths)
    assert torch.equal(got, scorer.score(paths, "a red circle", images))


def test_rewards_carry_the_gradient_of_the_samples(scorers):
    """A sample that requires a gradient gets one through the reward; others do not pay for a graph."""
    scorer = scorers["pairwise"]
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rewards = scorer.score(images, "a red circle", REFERENCES[:2])
    plain = scorer.score(images.detach(), "a red circle", REFERENCES[:2])
    torch.testing.assert_close(rewards.detach(), plain, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(rewards.sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert not plain.requires_grad
    with torch.no_grad():
        assert not scorer.score(images, "a red circle", REFERENCES[:2]).requires_grad


def test_progress_bar_is_silent_unless_asked_for(scorers, capfd):
    """The progress bar goes to stderr, and only on request."""
    scorers["pointwise"].score(SAMPLES[:3], "yes")
    assert capfd.readouterr() == ("", "")
    scorers["pointwise"].score(SAMPLES[:3], "yes", show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err


@pytest.mark.parametrize(
    ("paradigm", "arguments", "error", "match"),
    [
        ("pairwise", {}, ValueError, "`references` is None, but the judge is pairwise"),
        ("pairwise", {"references": [SAMPLES[0], None]}, ValueError, r"`references\[1\]` is None"),
        ("pointwise", {"references": SAMPLES[:2]}, ValueError, "`references` was given, but the judge is pointwise"),
        ("regressive", {"references": SAMPLES[:2]}, ValueError, "`references` was given, but the judge is regressive"),
        ("pairwise", {"references": SAMPLES[:3]}, ValueError, "`references` has 3 entries for 2 images"),
        ("pointwise", {"prompts": ["a"]}, ValueError, "`prompts` has 1 entries for 2 images"),
        ("pointwise", {"prompts": ["a", 3]}, TypeError, r"`prompts\[1\]` is of type `int`"),
        ("pointwise", {"images": []}, ValueError, "`images` is empty"),
        ("pointwise", {"images": SAMPLES[0]}, TypeError, "`images` is of type `Image`"),
        ("pointwise", {"images": torch.rand(3, 8, 8)}, ValueError, r"`images` has shape \(3, 8, 8\)"),
        ("pointwise", {"criteria": ["a"] * 3}, ValueError, "`criteria` has 3 entries"),
        ("pointwise", {"task": "text-to-song"}, ValueError, "`task` is 'text-to-song'"),
    ],
)
def test_wrong_arguments_of_score(scorers, paradigm, arguments, error, match):
    """What cannot be scored is refused by name before the model runs."""
    arguments = {"images": SAMPLES[:2], "prompts": ["a", "b"], **arguments}
    with pytest.raises(error, match=match):
        scorers[paradigm].score(**arguments)


def test_corrupt_image_is_named_by_its_row(scorers, tmp_path):
    """The message counts rows of the whole call, not of the batch."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"`images\[4\]` cannot be read"):
        scorers["pointwise"].score([*SAMPLES[:4], tmp_path / "broken.png"], "yes")


def test_nan_names_rows_and_keeps_scores(vlm_folder):
    """NaN from one row on is an error that names the row and holds the scores before it."""
    scorer = make_scorer(vlm_folder("internvl"), "regressive", batch_size=2, engine="plain")
    want = scorer.score(SAMPLES, PROMPTS)
    calls = itertools.count()

    def spoil(module, arguments, output):
        return output * torch.tensor([[1.0], [torch.nan]]) if next(calls) == 1 else output

    handle = scorer.model.score.register_forward_hook(spoil)
    with pytest.raises(NonFiniteScoreError, match=r"rows \[3\] are NaN") as error:
        scorer.score(SAMPLES, PROMPTS)
    handle.remove()
    assert error.value.rows == [3]
    torch.testing.assert_close(error.value.scores[:3], want[:3])
    assert error.value.scores[3].isnan()


def test_nan_weights_are_refused(vlm_folder):
    """A diverged checkpoint gives an error, not NaN rewards."""
    scorer = make_scorer(vlm_folder("internvl"), "pointwise")
    scorer.model.get_output_embeddings().weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3, 4\] are NaN or infinite"):
        scorer.score(SAMPLES, PROMPTS)


def test_wrong_constructor_arguments(vlm_folder, scorers):
    """A batch size of nothing, and a processor that answers with other words, are refused."""
    scorer = scorers["pairwise"]
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        RewardDanceScorer(scorer.model, scorer.processor, batch_size=0)
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"), yes_word="Yes", no_word="No")
    with pytest.raises(ValueError, match="`processor` answers with token IDs"):
        RewardDanceScorer(scorer.model, processor)


# ---- compare ----


def test_comparison_averages_both_orders(scorers):
    """The probability is the mean over both orders of sigmoid of log-odds, and adds up to 1."""
    scorer = scorers["pairwise"]
    a, b = SAMPLES[:2]
    got = scorer.compare(a, b, "a red circle")
    first = ask(scorer, b, "a red circle", a).logits.sigmoid().item()
    second = 1 - ask(scorer, a, "a red circle", b).logits.sigmoid().item()
    assert got.probability_b == pytest.approx((first + second) / 2, abs=1e-5)
    assert got.probability_a + got.probability_b == pytest.approx(1)
    assert got.winner == ("b" if first + second > 1 else "a")
    assert got.order_consistent == ((first > 0.5) == (second > 0.5))
    assert got.rationale is None
    single = scorer.compare(a, b, "a red circle", swap=False)
    assert single.probability_b == pytest.approx(first, abs=1e-5)
    assert single.order_consistent is None


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_swapped_comparison_is_the_mirror_image(scorers, paradigm):
    """A and B exchanged give exchanged probabilities: no position is favored."""
    got = scorers[paradigm].compare(SAMPLES[0], SAMPLES[1], "a red circle")
    mirrored = scorers[paradigm].compare(SAMPLES[1], SAMPLES[0], "a red circle")
    assert got.probability_a == pytest.approx(mirrored.probability_b, abs=1e-5)
    assert {got.winner, mirrored.winner} == {"a", "b"}
    assert got.order_consistent == mirrored.order_consistent


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_equal_samples_tie(scorers, paradigm):
    """A sample is exactly as good as itself. Asked one by one, because batching rounds rows differently."""
    scorer = RewardDanceScorer(scorers[paradigm].model, scorers[paradigm].processor, batch_size=1)
    got = scorer.compare(SAMPLES[0], SAMPLES[0], "a red circle")
    assert (got.winner, got.probability_a, got.probability_b) == ("tie", 0.5, 0.5)


@pytest.mark.parametrize("paradigm", ["pointwise", "regressive"])
def test_comparison_without_references(scorers, paradigm):
    """Single-sample judges compare by the difference of log-odds."""
    scorer = scorers[paradigm]
    logits = [ask(scorer, sample, "a red circle").logits for sample in SAMPLES[:2]]
    got = scorer.compare(*SAMPLES[:2], "a red circle")
    assert got.probability_b == pytest.approx((logits[1] - logits[0]).sigmoid().item(), abs=1e-5)
    assert got.order_consistent is None


def test_rationale_follows_the_verdict(vlm_folder, family):
    """The rationale is what greedy decoding gives after the verdict, token by token, in every family."""
    scorer = make_scorer(vlm_folder(family))
    a, b = SAMPLES[:2]
    got = scorer.compare(a, b, "a red circle", explain=True, max_new_tokens=5)
    batch = scorer.processor([b], ["a red circle"], [a])
    batch = scorer.processor.append_answers(batch, [got.winner == "b"], [None])
    batch = {name: value for name, value in batch.items() if name not in ("rationale_labels", "answer_index")}
    tokens = []
    for _ in range(5):
        with torch.no_grad():
            token = scorer.model.vlm(**batch).logits[:, -1].argmax(-1, keepdim=True)
        if token.item() == scorer.processor.tokenizer.eos_token_id:
            break
        tokens.append(token.item())
        batch["input_ids"] = torch.cat([batch["input_ids"], token], dim=1)
        batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in batch:
                batch[name] = torch.nn.functional.pad(batch[name], (0, 1))
    assert got.rationale == scorer.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_explanations_need_a_pairwise_judge(scorers):
    """A judge that gives no verdict about two samples has nothing to explain."""
    for pair, name in (((None, SAMPLES[1]), "image_a"), ((SAMPLES[0], None), "image_b")):
        with pytest.raises(TypeError, match=f"`{name}` is of type `NoneType`, but must be an image or a clip"):
            scorers["pairwise"].compare(*pair, PROMPTS[0])
    with pytest.raises(ValueError, match="`explain` is True, but the judge is pointwise"):
        scorers["pointwise"].compare(*SAMPLES[:2], "a red circle", explain=True)


# ---- dimensions and examples ----


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_scores_by_dimension(scorers, paradigm):
    """Each column is the score by the criteria of one dimension, of the task of each row."""
    scorer = scorers[paradigm]
    arguments = {"images": SAMPLES[:2], "prompts": PROMPTS[:2], "task": ["text-to-video", "text-to-image"]}
    if paradigm == "pairwise":
        arguments["references"] = REFERENCES[:2]
    names = ["structure", "alignment"]
    got = scorer.score(**arguments, dimensions=names)
    assert got.shape == (2, 2)
    for column, name in enumerate(names):
        criteria = [scorer.processor.dimension_criteria(name, task) for task in arguments["task"]]
        assert criteria[0] != criteria[1]
        want = scorer.score(**arguments, criteria=criteria)
        torch.testing.assert_close(got[:, column], want, rtol=1e-4, atol=1e-6)
    assert (got[:, 0] - got[:, 1]).abs().min() > 1e-7
    assert scorer.score(**arguments, dimensions=names[:1]).shape == (2, 1)


@pytest.mark.parametrize("paradigm", ["pairwise", "pointwise"])
def test_comparison_by_dimension(scorers, paradigm):
    """Verdicts by dimension are those by their criteria, in both orders, beside the overall one."""
    scorer = scorers[paradigm]
    settings = {"explain": True, "max_new_tokens": 2} if paradigm == "pairwise" else {}
    got = scorer.compare(*SAMPLES[:2], "yes", dimensions=["counting", "text"], **settings)
    want = scorer.compare(*SAMPLES[:2], "yes", **settings)
    assert want.dimensions is None
    assert (got.winner, got.order_consistent, got.rationale) == (want.winner, want.order_consistent, want.rationale)
    assert got.probability_b == pytest.approx(want.probability_b, abs=1e-6)
    assert list(got.dimensions) == ["counting", "text"]
    for name, verdict in got.dimensions.items():
        want = scorer.compare(*SAMPLES[:2], "yes", criteria=scorer.processor.dimension_criteria(name))
        assert (verdict.winner, verdict.order_consistent) == (want.winner, want.order_consistent)
        assert verdict.probability_b == pytest.approx(want.probability_b, abs=1e-6)


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_examples_are_shown_before_each_question(vlm_folder, engine):
    """Scores, comparisons and rankings with examples are those of single questions with the same examples."""
    scorer = make_scorer(vlm_folder("qwen2_5_vl"), engine=engine)
    examples = [
        {"image": REFERENCES[3], "reference": REFERENCES[4], "prompt": "a blue square", "verdict": "yes"},
        {"image": REFERENCES[2], "reference": REFERENCES[1], "prompt": "two", "verdict": False, "criteria": "color"},
    ]
    got = scorer.score(SAMPLES[:3], PROMPTS[:3], REFERENCES[:3], examples=examples, criteria=[None, "x", None])
    for i, criteria in enumerate([None, "x", None]):
        want = ask(scorer, SAMPLES[i], PROMPTS[i], REFERENCES[i], criteria=criteria, examples=examples).scores
        torch.testing.assert_close(got[i], want[0], rtol=1e-4, atol=1e-6)
    assert (
        got - scorer.score(SAMPLES[:3], PROMPTS[:3], REFERENCES[:3], criteria=[None, "x", None])
    ).abs().min() > 1e-7

    comparison = scorer.compare(*SAMPLES[:2], "yes", examples=examples, explain=True, max_new_tokens=2)
    first = ask(scorer, SAMPLES[1], "yes", SAMPLES[0], examples=examples).logits.sigmoid().item()
    second = 1 - ask(scorer, SAMPLES[0], "yes", SAMPLES[1], examples=examples).logits.sigmoid().item()
    assert comparison.probability_b == pytest.approx((first + second) / 2, abs=1e-5)
    ranking = scorer.rank(SAMPLES[:3], "yes", examples=examples)
    want = ask(scorer, SAMPLES[2], "yes", SAMPLES[1], examples=examples).scores
    torch.testing.assert_close(ranking.matrix[1, 2], want[0], rtol=1e-4, atol=1e-6)


def test_plain_batches_have_the_same_examples(scorers):
    """Questions with and without examples in one call are computed apart."""
    scorer = RewardDanceScorer(scorers["pointwise"].model, scorers["pointwise"].processor, engine="plain")
    examples = [{"image": SAMPLES[4], "prompt": "no", "verdict": True}]
    shown = scorer.processor.read_examples(examples, is_pairwise=False)
    questions = [Question(SAMPLES[i], "yes", examples=own) for i, own in enumerate([(), shown, shown, ()])]
    got = scorer.ask(questions)[1]
    for i, own in enumerate([(), examples, examples, ()]):
        torch.testing.assert_close(
            got[i], ask(scorer, SAMPLES[i], "yes", examples=own).scores[0], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"dimensions": ["motion"]},
            ValueError,
            r"`dimension` is 'motion', but the task 'text-to-image' has \['alignment'",
        ),
        (
            {"dimensions": ["text"], "task": "logo"},
            ValueError,
            r"`task` is 'logo', but the processor has dimensions for",
        ),
        ({"dimensions": ["text"], "criteria": "x"}, ValueError, "`criteria` and `dimensions` were both given"),
        ({"dimensions": "text"}, ValueError, "`dimensions` is 'text', but must be a list of different names"),
        ({"dimensions": []}, ValueError, r"`dimensions` is \[\], but must be a list of different names"),
        ({"dimensions": ["text", "text"]}, ValueError, "but must be a list of different names"),
        ({"examples": [{"image": SAMPLES[0], "prompt": "a"}]}, ValueError, r"`examples\[0\]` has the keys"),
        ({"examples": "few"}, TypeError, "`examples` is of type `str`, but must be a list of dicts"),
    ],
)
def test_wrong_dimensions_and_examples(scorers, arguments, error, match):
    """They are refused before the model runs, by `score` and `compare` alike."""
    scorer = scorers["pointwise"]
    handle = scorer.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises(error, match=match):
            scorer.score(SAMPLES[:2], "a", **arguments)
        with pytest.raises(error, match=match):
            scorer.compare(*SAMPLES[:2], "a", **arguments)
    finally:
        handle.remove()


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_errors_of_dimensions_count_rows(vlm_folder, tmp_path, engine):
    """Corrupt images and NaN are named by the row of the call, not by the question; scores until there are kept."""
    scorer = make_scorer(vlm_folder("internvl"), "regressive", batch_size=1, engine=engine)
    names = ["text", "counting", "binding"]
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"`images\[2\]` cannot be read"):
        scorer.score([*SAMPLES[:2], tmp_path / "broken.png"], "yes", dimensions=names)
    want = scorer.score(SAMPLES[:3], "yes", dimensions=names)
    plain = RewardDanceScorer(scorer.model, scorer.processor, batch_size=1, engine="plain")
    calls = itertools.count()
    handle = scorer.model.score.register_forward_hook(
        lambda module, arguments, output: output * (torch.nan if next(calls) == 4 else 1)
    )
    with pytest.raises(NonFiniteScoreError, match=r"rows \[1\] are NaN") as error:
        plain.score(SAMPLES[:3], "yes", dimensions=names)
    handle.remove()
    assert error.value.rows == [1]
    assert error.value.scores.shape == (2, 3)
    torch.testing.assert_close(error.value.scores.flatten()[:4], want.flatten()[:4], rtol=1e-5, atol=1e-6)
    assert error.value.scores.flatten()[4:].isnan().all()


# ---- rank ----


def test_ranking_equals_a_plain_round_robin(scorers):
    """Matrix, scores, wins and order are those of a loop over all ordered pairs."""
    scorer = scorers["pairwise"]
    got = scorer.rank(SAMPLES, "a red circle")
    matrix, yes = torch.full((5, 5), torch.nan), torch.full((5, 5), torch.nan)
    for i, j in itertools.permutations(range(5), 2):
        output = ask(scorer, SAMPLES[j], "a red circle", SAMPLES[i])
        matrix[i, j], yes[i, j] = output.scores, output.logits.sigmoid()
    torch.testing.assert_close(got.matrix, matrix, rtol=1e-4, atol=1e-6, equal_nan=True)
    scores = [matrix[[i for i in range(5) if i != j], j].mean().item() for j in range(5)]
    assert got.scores.tolist() == pytest.approx(scores, rel=1e-4)
    wins = [sum(float(yes[i, j] + 1 - yes[j, i]) / 2 > 0.5 for i in range(5) if i != j) for j in range(5)]
    assert got.wins.tolist() == wins
    assert got.wins.sum() == 10
    assert got.order == sorted(range(5), key=lambda j: (-wins[j], -scores[j], j))
    assert scorer.rank(SAMPLES, "a red circle", top_k=2).order == got.order[:2]


@pytest.mark.parametrize("paradigm", ["pointwise", "regressive"])
def test_ranking_without_references(scorers, paradigm):
    """Single-sample judges rank by their scores."""
    scorer = scorers[paradigm]
    got = scorer.rank(SAMPLES, "a red circle")
    scores = scorer.score(SAMPLES, "a red circle")
    torch.testing.assert_close(got.scores, scores)
    best_first = scores.argsort(descending=True).tolist()
    if paradigm == "regressive":
        assert got.order == best_first
    assert got.matrix.diagonal().isnan().all()
    torch.testing.assert_close((got.matrix + got.matrix.T)[0, 1:], torch.ones(4))
    assert got.wins.sum() == 10


def test_ranking_agrees_with_comparisons(scorers):
    """`rank` of two samples names the winner of `compare`."""
    scorer = scorers["pairwise"]
    for i, j in itertools.combinations(range(3), 2):
        winner = scorer.compare(SAMPLES[i], SAMPLES[j], "yes").winner
        assert scorer.rank([SAMPLES[i], SAMPLES[j]], "yes").order[0] == (0 if winner == "a" else 1)


def test_equal_samples_share_the_win(scorers):
    """A tie gives half a win to both, and the earlier one comes first."""
    for scorer in scorers.values():
        scorer = RewardDanceScorer(scorer.model, scorer.processor, batch_size=1)
        got = scorer.rank([SAMPLES[0], SAMPLES[0]], "a red circle")
        assert got.wins.tolist() == [0.5, 0.5]
        assert got.order == [0, 1]


def test_wrong_arguments_of_rank(scorers):
    """A ranking needs two samples, and no more can be kept than there are."""
    with pytest.raises(ValueError, match="`images` has 1 samples, but a ranking needs at least 2"):
        scorers["pairwise"].rank(SAMPLES[:1], "yes")
    with pytest.raises(ValueError, match="`top_k` is 3, but must be between 1 and the number of images, 2"):
        scorers["pairwise"].rank(SAMPLES[:2], "yes", top_k=3)


def git_scorer(batch_size):
    """Tiny judge of a family that counts padding as text, whose processor knows no chat template either."""
    tokenizer = tiny_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pad="<|endoftext|>", eos="<|im_end|>")
    sizes = {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = RewardDanceProcessor(
        transformers.CLIPImageProcessorPil(**sizes),
        tokenizer,
        chat_template=CHATML.replace("PLACEHOLDER", ""),
        vlm_processor_class="GitProcessor",
    )
    config = transformers.GitConfig(
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        **{
            name: TEXT[name]
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        },
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = RewardDanceForYesScoring(RewardDanceConfig(vlm_config=config, paradigm="pointwise"))
    return RewardDanceScorer(model, processor, batch_size=batch_size)


def test_a_family_that_counts_padding_is_asked_one_by_one(caplog):
    """What is beside a question does not change its score: that such a family is asked one by one is found out and said once."""
    judge.logger.parent.propagate = True
    alone, together = (git_scorer(batch_size).score(SAMPLES, PROMPTS) for batch_size in (1, 3))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-7)
    assert caplog.text.count("Log-odds of 'git' models depend on padding") == 1
    scorer = git_scorer(batch_size=5)
    with torch.no_grad():
        assert (scorer.model(**scorer.processor(SAMPLES, PROMPTS)).scores - alone).abs().max() > 1e-5


def test_one_question_more_is_asked_of_other_families(vlm_folder, caplog):
    """The comparison takes one question, once in the life of a scorer; others keep their batches."""
    judge.logger.parent.propagate = True
    scorer, sizes = make_scorer(vlm_folder("internvl"), batch_size=3, engine="plain"), []
    handle = scorer.model.register_forward_hook(lambda *args: sizes.append(len(args[-1].logits)))
    for _ in range(2):
        scorer.score(SAMPLES, PROMPTS, REFERENCES)
    handle.remove()
    assert sizes == [3, 1, 2, 3, 2]
    assert "depend on padding" not in caplog.text
