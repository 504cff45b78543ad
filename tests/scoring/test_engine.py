"""The engine against the plain path: the same scores and gradients from less work, which is counted here."""

import copy
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlms import FAMILIES, TEXT, random_image
from transformers import AutoConfig

from rewarddance_hf import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.models.modeling_rewarddance import CACHE_NAME
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.scoring.engine import engine as engine_module
from rewarddance_hf.scoring.engine import proof as proof_module
from rewarddance_hf.scoring.engine import session as session_module
from rewarddance_hf.scoring.engine import states as states_module
from rewarddance_hf.scoring.engine import vision as vision_module
from rewarddance_hf.scoring.engine.tree import TokenizedQuestion, build_tree


IMAGES = [random_image(i, *size) for i, size in enumerate([(40, 40), (60, 30), (28, 56), (40, 40), (33, 41)])]
LAYOUTS = ("images_first", "text_first")
ALL_LAYOUTS = (*LAYOUTS, "text_after_each")
PROMPT = "a red circle"


def round_robin(images, prompt=PROMPT):
    return [Question(images[j], prompt, images[i]) for i, j in itertools.permutations(range(len(images)), 2)]


@pytest.fixture(scope="module")
def make_scorer(vlm_folder):
    """Function that makes a scorer on a tiny model, which is loaded once per family and paradigm. Read only."""
    models = {}

    def make(family="internvl", paradigm="pairwise", layout="images_first", **settings):
        folder = vlm_folder(family)
        if (family, paradigm) not in models:
            torch.manual_seed(0)
            model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm).requires_grad_(False)
            if paradigm == "regressive":
                torch.nn.init.normal_(model.score.weight, std=0.5)
            models[family, paradigm] = model
        processor = RewardDanceProcessor.from_pretrained(folder, prompt_layout=layout)
        return RewardDanceScorer(models[family, paradigm], processor, **{"batch_size": 3, **settings})

    return make


class Meter:
    """Counts from outside what the vision encoder gives and the language model is given: numbers of tokens."""

    def __init__(self, model):
        self.model, self.features, self.tokens, self.graph_tokens, self.shapes = model, 0, 0, 0, set()

    def __enter__(self):
        vlm = self.model.vlm
        self.see = vlm.get_image_features

        def get_image_features(*args, **kwargs):
            output = self.see(*args, **kwargs)
            pooled = output.pooler_output
            pooled = [pooled] if isinstance(pooled, torch.Tensor) else pooled
            self.features += sum(part.numel() // part.shape[-1] for part in pooled)
            return output

        def before(module, args, kwargs):
            rows, length = kwargs["inputs_embeds"].shape[:2]
            self.tokens += rows * length
            self.graph_tokens += rows * length * torch.is_grad_enabled()
            past = kwargs.get(CACHE_NAME)
            self.shapes.add((rows, length, 0 if past is None else past.get_seq_length()))

        vlm.get_image_features = get_image_features
        text_model = getattr(vlm.base_model, "language_model", None) or vlm.base_model.text_model
        self.handle = text_model.register_forward_pre_hook(before, with_kwargs=True)
        return self

    def __exit__(self, *error):
        del self.model.vlm.get_image_features
        self.handle.remove()


def num_features(scorer, *images):
    """Number of tokens of images, each on its own, as the processor of the plain path writes them."""
    ids = scorer.processor(list(images), [PROMPT] * len(images), list(images))["input_ids"]
    return int((ids == scorer.model.config.vlm_config.image_token_id).sum()) // 2


def assert_same(scorer, questions):
    """Questions of the engine are those of the plain path of the same scorer."""
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    with torch.no_grad():
        want, got = plain.ask(questions), scorer.ask(questions)
    assert plain.statistics is None
    assert scorer.statistics.num_questions == len(questions)
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert want[0].std() > 1e-3  # or all scores would agree
    return scorer.statistics


# ---- the same scores ----


@pytest.mark.every_family
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_scores_of_all_families(make_scorer, family, layout):
    """Images of mixed sizes in all orders, several prompts, a clip with first frame: any family, any layout."""
    scorer = make_scorer(family, layout=layout)
    clip = Question(IMAGES[::3], "two", IMAGES[3::-3], condition=IMAGES[0], task="text-to-video")
    others = [Question(IMAGES[4], "two green triangles", IMAGES[1]), Question(IMAGES[4], "a", IMAGES[1])]
    statistics = assert_same(scorer, [*round_robin(IMAGES[:4]), clip, *others])
    assert statistics.num_images == statistics.num_encoded == 5
    assert statistics.minimum_tokens <= statistics.tokens < statistics.plain_tokens


@pytest.mark.parametrize("paradigm", ["pointwise", "regressive"])
def test_scores_without_references(make_scorer, family, paradigm):
    """Single-sample judges share what goes before the image."""
    if paradigm == "regressive" and family not in ("internvl", "qwen3_vl", "gemma3"):
        pytest.skip("the head is the same in all families")
    scorer = make_scorer(family, paradigm, "text_first")
    questions = [Question(image, prompt) for image in IMAGES for prompt in (PROMPT, "two")]
    statistics = assert_same(scorer, [*questions, Question(IMAGES[::3], "a clip", task="text-to-video")])
    # LLaVA-OneVision sees an image that is alone in other ways than a frame.
    assert statistics.num_encoded == (7 if family == "llava_onevision" else 5)


@pytest.mark.parametrize("family", ["internvl", "gemma3"])
def test_answers_alone_give_the_same_scores(make_scorer, family, monkeypatch):
    """With `score_normalization="yes_no"` no other logits are computed."""
    scorer = make_scorer(family)
    monkeypatch.setattr(scorer.model.config, "score_normalization", "yes_no")
    monkeypatch.setattr(scorer.model.config, "score_temperature", 1.7)
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    questions = round_robin(IMAGES[:3])
    with torch.no_grad():
        want = plain.ask(questions)
        handle = scorer.model.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("full head"))
        got = scorer.ask(questions)
        handle.remove()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", ["vocabulary", "yes_no"])
def test_bfloat16(make_scorer, family, normalization):
    """In bfloat16 the engine is as near to float32 as the plain path is: log-odds within 0.03 where logits are below 1."""
    plain = make_scorer(family, engine="plain")
    half = copy.deepcopy(plain.model).to(torch.bfloat16)
    questions = round_robin(IMAGES[:4])
    half.config.score_normalization = normalization
    with torch.no_grad():
        wanted = plain.ask(questions)[0]
        scorers = [RewardDanceScorer(half, plain.processor, batch_size=3, engine=name) for name in ("plain", "auto")]
        errors = [(scorer.ask(questions)[0] - wanted).abs() for scorer in scorers]
    assert errors[1].max() < 0.03
    assert errors[1].square().mean() < 2 * errors[0].square().mean() + 1e-6


@pytest.mark.parametrize("settings", [{"engine": "features"}, {"num_workers": 0}, {"batch_size": 16}])
def test_scores_with_other_settings(make_scorer, settings):
    """Vision features alone, without threads, in large batches."""
    statistics = assert_same(make_scorer("qwen2_5_vl", layout="text_first", **settings), round_robin(IMAGES))
    assert statistics.num_encoded == 5
    if settings.get("engine") == "features":
        assert statistics.tokens >= statistics.plain_tokens


def test_eager_attention_and_others(make_scorer, monkeypatch):
    """Eager attention shares prefixes too; of attention functions that are not known, only features are shared."""
    scorer = make_scorer("qwen3_vl")
    config = scorer.model.config.get_text_config()
    monkeypatch.setattr(config, "_attn_implementation", "eager")
    assert assert_same(scorer, round_robin(IMAGES[:3])).tokens < 3000
    monkeypatch.setattr(config, "_attn_implementation", "sdpa")
    monkeypatch.setattr(engine_module, "EXACT_ATTENTION", ())
    statistics = assert_same(scorer, round_robin(IMAGES[:3]))
    assert statistics.tokens >= statistics.plain_tokens


def test_windows_do_not_matter(make_scorer, monkeypatch):
    """Questions that are planned apart give the same scores; features that were dropped are computed again."""
    monkeypatch.setattr(engine_module, "WINDOW", 7)
    scorer = make_scorer("internvl")
    assert assert_same(scorer, round_robin(IMAGES)).num_encoded == 5
    monkeypatch.setattr(engine_module, "WINDOW", 2)
    monkeypatch.setattr(vision_module, "MAX_FEATURE_TOKENS", 12)
    assert assert_same(scorer, round_robin(IMAGES)).num_encoded > 5


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_windows_are_taken_ahead(make_scorer, engine):
    """Windows of any size are answered in order; with the engine, the next is known before the answer to one is given out."""
    scorer = make_scorer("internvl", engine=engine)
    questions = [replace(question, row=i) for i, question in enumerate(round_robin(IMAGES[:4])[:7])]
    taken, answers = [], []

    def windows():
        for start, stop in ((0, 1), (1, 5), (5, 7)):
            taken.append(stop)
            yield questions[start:stop]

    for logits, _ in scorer.stream_windows(windows()):
        answers.append(logits)
        assert len(taken) == min(len(answers) + (engine == "auto"), 3)
    assert [len(logits) for logits in answers] == [1, 4, 2]
    torch.testing.assert_close(torch.cat(answers), scorer.ask(questions)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_prepared_beside_the_model(make_scorer, monkeypatch, num_workers):
    """Threads decode and preprocess, also those of the next window while this one is scored; each file once."""
    threads, events = [], []
    load_image = RewardDanceProcessor.load_image

    def load(processor, image, name, *arguments, **options):
        threads.append(threading.current_thread() is threading.main_thread())
        events.append(name)
        return load_image(processor, image, name, *arguments, **options)

    monkeypatch.setattr(RewardDanceProcessor, "load_image", load)
    monkeypatch.setattr(engine_module, "WINDOW", 2)
    scorer = make_scorer(num_workers=num_workers)
    handle = scorer.model.get_output_embeddings().register_forward_hook(lambda *_: events.append("score"))
    scorer.score(IMAGES[:4], PROMPT, [IMAGES[4]] * 4)
    handle.remove()
    assert threads == [num_workers == 0] * 6
    assert sorted(events[:3]) == ["images[0]", "images[1]", "references[0]"]
    assert events.count("score") == 2
    if num_workers == 0:
        assert events[-2:] == ["score", "score"]


def test_errors_of_threads_are_raised(make_scorer, tmp_path):
    """A corrupt file in a late window is named by its row."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    samples = [*IMAGES[:4], tmp_path / "broken.png"]
    with pytest.raises(ValueError, match=r"`images\[4\]` cannot be read"):
        list(make_scorer().stream([Question(s, PROMPT, IMAGES[0]) for s in samples], lambda _: None, window=2))


@pytest.mark.parametrize("family_with_limit", ["qwen2_5_vl", "glm4v"])
def test_images_that_a_model_refuses_are_named(make_scorer, family_with_limit):
    """Some image processors refuse very long images, without saying which."""
    scorer = make_scorer(family_with_limit)
    for line in (Image.new("RGB", (3000, 10)), torch.zeros(3, 10, 3000, requires_grad=True)):
        with pytest.raises(ValueError, match=r"`images\[1\]` cannot be prepared .*aspect ratio.* drop the row"):
            scorer.score([IMAGES[0], line, IMAGES[1]], [PROMPT] * 3, IMAGES[:1] * 3)


def internvl_with(folder, **text_config):
    """Tiny InternVL around another language model, and its processor."""
    config = RewardDanceForYesScoring.from_pretrained(folder).config.vlm_config
    processor = RewardDanceProcessor.from_pretrained(folder, prompt_layout="text_first")
    sizes = {name: value for name, value in config.text_config.to_dict().items() if name in (*TEXT, "vocab_size")}
    text = AutoConfig.for_model(**{**sizes, "pad_token_id": 0, **text_config})
    config = type(config).from_dict({**config.to_dict(), "text_config": text.to_dict()})
    own = {"yes_token_id": processor.yes_token_id, "no_token_id": processor.no_token_id}
    torch.manual_seed(0)
    model = RewardDanceForYesScoring(RewardDanceConfig(vlm_config=config, **own)).eval().requires_grad_(False)
    for name, weights in model.named_parameters():
        if weights.ndim >= 2 and "embed" not in name:
            weights.mul_(3)
    return model, processor


@pytest.mark.every_family
def test_trial_passes_tested_families(make_scorer, family):
    """What the tests know to be exact, a trial on a small copy finds as well; it errs on the safe side only."""
    scorer = make_scorer(family)
    got = proof_module.difference_from_plain_path(engine_module.ScoringEngine, scorer.model, scorer.processor)
    # Answers of random Gemma 3 hardly depend on what comes early, which a trial cannot tell from a question that is cut off.
    assert got == ("the answers of a small copy do not tell questions apart" if family == "gemma3" else None)


@pytest.mark.parametrize(
    "text_config",
    [
        {"model_type": "mistral", "sliding_window": 48},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "olmo2"},
        {"model_type": "cohere2", "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ],
    ids=lambda config: "_".join(map(str, config.values()))[:24],
)
def test_models_that_pass_a_trial_are_shared(vlm_folder, text_config):
    """A language model that is in no list, with windows or without, is shared after a trial, and its scores are the same."""
    scorer = RewardDanceScorer(*internvl_with(vlm_folder("internvl"), **text_config), batch_size=4)
    statistics = assert_same(scorer, round_robin(IMAGES[:4]))
    assert statistics.tokens < statistics.plain_tokens / 1.5


@pytest.mark.parametrize(
    ("text_config", "reason"),
    [
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "log-odds of a small copy"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "cannot be"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "depend on the length",
        ),
    ],
    ids=["bidirectional", "convolutions", "dynamic_rope"],
)
def test_models_that_fail_a_trial_are_scored_plainly(vlm_folder, text_config, reason, caplog, monkeypatch):
    """What looks forward, keeps other states or depends on the whole length takes the plain path, and says why."""
    monkeypatch.setattr(engine_module, "EXACT_TEXT_TYPES", ())
    model, processor = internvl_with(vlm_folder("internvl"), **text_config)
    assert reason in proof_module.difference_from_plain_path(engine_module.ScoringEngine, model, processor)
    with caplog.at_level("INFO"):
        scorer = RewardDanceScorer(model, processor)
    assert len(scorer.score(IMAGES[:2], PROMPT, IMAGES[1:3])) == 2
    assert scorer.statistics is None
    with pytest.raises(ValueError, match="`engine` is 'features', but model type 'internvl' is not known"):
        RewardDanceScorer(model, processor, engine="features")


def test_trial_is_made_once(make_scorer, monkeypatch):
    """A configuration is tried out once in a process; the random state of the caller stays."""
    scorer, tried = make_scorer(), []
    monkeypatch.setattr(proof_module, "_known", {})
    monkeypatch.setattr(proof_module, "_try_out", lambda *arguments: tried.append(torch.rand(())) or "no")
    before = torch.get_rng_state()
    for _ in range(2):
        assert (
            proof_module.difference_from_plain_path(engine_module.ScoringEngine, scorer.model, scorer.processor)
            == "no"
        )
    assert len(tried) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_other_caches_are_not_shared(make_scorer, monkeypatch):
    """A model whose cache is of another class goes on without shared prefixes."""
    scorer = make_scorer()
    monkeypatch.setattr(states_module, "DynamicLayer", type("Other", (states_module.DynamicLayer,), {}))
    statistics = assert_same(scorer, round_robin(IMAGES[:3]))
    assert statistics.tokens >= statistics.plain_tokens


def test_wrong_arguments(make_scorer):
    """Arguments out of range are refused by name."""
    for arguments, match in [
        ({"engine": "fast"}, "`engine` is 'fast', but must be one of"),
        ({"num_workers": -1}, "`num_workers` is -1"),
        ({"max_batch_tokens": 0}, "`max_batch_tokens` is 0"),
        ({"pad_to_multiple_of": 1.5}, "`pad_to_multiple_of` is 1.5"),
    ]:
        with pytest.raises(ValueError, match=match):
            make_scorer(**arguments)


def test_arguments_reach_the_engine(vlm_folder):
    """`from_pretrained` takes arguments of the engine beside those of the model."""
    arguments = {"engine": "features", "num_workers": 0, "max_batch_tokens": 300, "pad_to_multiple_of": 8}
    scorer = RewardDanceScorer.from_pretrained(vlm_folder("internvl"), **arguments)
    scorer.rank(IMAGES[:2], PROMPT)
    assert scorer.statistics.tokens % 8 == 0
    assert scorer.statistics.num_forward_passes == 2
    RewardDanceScorer.from_pretrained(vlm_folder("internvl"), engine="plain").rank(IMAGES[:2], PROMPT)


# ---- less work ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_of_a_round_robin(make_scorer, family, layout):
    """Each image is seen once, and few more tokens are computed than there are distinct beginnings of questions."""
    scorer = make_scorer(family, layout=layout, batch_size=8)
    images = [random_image(i) for i in range(8)]
    with Meter(scorer.model) as meter:
        scorer.rank(images, PROMPT)
    statistics = scorer.statistics
    assert statistics.num_images == statistics.num_encoded == 8
    assert meter.tokens == statistics.tokens
    # The least by hand: the text before image 1 once, each image 1 once, all from image 2 on in each question.
    question = scorer.processor([images[1]], [PROMPT], [images[0]])["input_ids"][0].numpy()
    (where,) = np.nonzero(question == scorer.model.config.vlm_config.image_token_id)
    first, second = where[0], where[len(where) // 2]
    assert meter.features == 8 * len(where) // 2
    assert statistics.minimum_tokens == first + 8 * (second - first) + 56 * (len(question) - second)
    assert statistics.plain_tokens == 56 * len(question)
    assert statistics.tokens <= 1.15 * statistics.minimum_tokens


def test_equal_images_are_seen_once(make_scorer, tmp_path):
    """An image is what it shows: path, image, tensor."""
    scorer = make_scorer()
    IMAGES[0].save(tmp_path / "0.png")
    tensor = torch.from_numpy(np.array(IMAGES[0])).permute(2, 0, 1)
    with Meter(scorer.model) as meter:
        scorer.score([tmp_path / "0.png", IMAGES[0].copy(), tensor, IMAGES[1]], PROMPT, [IMAGES[1]] * 4)
    assert scorer.statistics.num_images == 2
    assert meter.features == num_features(scorer, IMAGES[0], IMAGES[1])
    # The first three questions are one.
    assert scorer.statistics.tokens < scorer.statistics.plain_tokens / 1.9


def test_both_orders_share_features(make_scorer):
    """A comparison in both orders sees two images."""
    scorer = make_scorer()
    with Meter(scorer.model) as meter:
        scorer.compare(IMAGES[0], IMAGES[1], PROMPT)
    assert meter.features == num_features(scorer, IMAGES[0], IMAGES[1])
    assert scorer.statistics.num_questions == 2


def test_few_shapes(make_scorer):
    """Lengths and rows are padded to few shapes, for compiled models; scores stay the same."""
    scorer = make_scorer("qwen3_vl", layout="text_first", batch_size=8, pad_to_multiple_of=64)
    with Meter(scorer.model) as meter:
        scorer.rank(IMAGES, PROMPT)
    assert all(length % 64 == 0 and past % 64 == 0 and rows in (1, 2, 4, 8) for rows, length, past in meter.shapes)
    assert len(meter.shapes) <= 5
    assert_same(scorer, round_robin(IMAGES))
    assert_same(make_scorer("gemma3", pad_to_multiple_of=16), round_robin(IMAGES))


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_compiled_language_model(vlm_folder, family):
    """A compiled language model gives the same scores, and is compiled for few shapes."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder(family)).requires_grad_(False)
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family), prompt_layout="text_first")
    want = RewardDanceScorer(model, processor, engine="plain").rank(IMAGES[:4], PROMPT).matrix
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    scorer = RewardDanceScorer(model, processor, compile_model={"backend": backend})
    for images in (IMAGES[:4], IMAGES[:3], IMAGES[:4]):
        got = scorer.rank(images, PROMPT).matrix
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7, equal_nan=True)
    assert 1 < len(graphs) <= 12
    torch._dynamo.reset()


def test_features_are_reused(make_scorer):
    """Inside `reuse` a reference is seen once in all calls; samples with gradient are dropped after each."""
    scorer = make_scorer()
    samples = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    want = scorer.score(samples, PROMPT, IMAGES[:2])
    with scorer.reuse(), scorer.reuse():
        scorer.score([IMAGES[4]], PROMPT, [IMAGES[0]])
        for count in (5, 7):
            got = scorer.score(samples, PROMPT, IMAGES[:2])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert scorer.statistics.num_encoded == count
            assert len(scorer._kept.features) == 3
        assert torch.autograd.grad(got.sum(), samples)[0].abs().sum() > 0
    scorer.score([IMAGES[4]], PROMPT, [IMAGES[0]])
    assert scorer.statistics.num_encoded == 2
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    with plain.reuse():
        torch.testing.assert_close(plain.score(samples, PROMPT, IMAGES[:2]), want, rtol=1e-5, atol=1e-6)


def test_adapter_is_part_of_the_judge(vlm_folder, tmp_path):
    """LoRA changes the scores of both paths alike; prompt learning takes the plain path."""
    peft = pytest.importorskip("peft")
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    before = RewardDanceScorer(model, processor).rank(IMAGES[:3], PROMPT).matrix
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    scorer = RewardDanceScorer(model, processor)
    assert_same(scorer, round_robin(IMAGES[:3]))
    assert (scorer.rank(IMAGES[:3], PROMPT).matrix - before).nan_to_num().abs().max() > 1e-4
    model.peft_config["default"] = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert "virtual tokens" in engine_module.ScoringEngine.unsupported_reason(model, processor)


def test_sharded_models_are_scored_plainly(vlm_folder):
    """Parts of a model whose weights are sharded cannot be called alone."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder("internvl"))
    processor = RewardDanceProcessor.from_pretrained(vlm_folder("internvl"))
    assert engine_module.ScoringEngine.unsupported_reason(model, processor) is None
    next(model.parameters()).device_mesh = "mesh"
    assert "sharded" in engine_module.ScoringEngine.unsupported_reason(model, processor)


def test_out_of_memory_is_survived(make_scorer, caplog):
    """Batches are halved until they fit, and stay small; a question that does not fit alone is an error."""
    scorer = make_scorer(batch_size=8)
    questions = round_robin([random_image(i) for i in range(5)])
    text_model = scorer.model.vlm.base_model.language_model
    budget = [600]
    failures = []

    def allocate(module, args, kwargs):
        rows, length = kwargs["inputs_embeds"].shape[:2]
        if rows * length > budget[0]:
            failures.append(rows)
            raise torch.OutOfMemoryError(f"tried to allocate {rows * length} tokens")

    handle = text_model.register_forward_pre_hook(allocate, with_kwargs=True)
    try:
        with torch.no_grad():
            got = scorer.ask(questions)
        assert failures == [8, 4, 4]
        assert "Memory ran out with 8 rows" in caplog.text
        budget[0] = 100
        with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
            scorer.rank(IMAGES, PROMPT)
    finally:
        handle.remove()
    want = make_scorer(batch_size=8).ask(questions)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)


def test_batches_keep_to_the_budget(make_scorer):
    """No batch has more tokens, cached ones included, than allowed."""
    scorer = make_scorer(batch_size=8, max_batch_tokens=1000)
    with Meter(scorer.model) as meter:
        scorer.rank(IMAGES, PROMPT)
    assert max(rows * (length + past) for rows, length, past in meter.shapes) <= 1000
    assert max(rows for rows, _, _ in meter.shapes) > 1


# ---- gradient ----


@pytest.mark.every_family
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_gradient_of_all_families(make_scorer, family, layout):
    """The gradient of samples is that of the full graph; what goes before them is computed without a graph."""
    scorer = make_scorer(family, layout=layout)
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    samples = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (samples, PROMPT, [IMAGES[0]] * 3)
    want = plain.score(*arguments)
    with Meter(scorer.model) as meter:
        got = scorer.score(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    (want,) = torch.autograd.grad(want.log().sum(), samples)
    (got,) = torch.autograd.grad(got.log().sum(), samples)
    assert (got - want).norm() <= 1e-5 * want.norm()
    question = scorer.processor([IMAGES[3]], [PROMPT], [IMAGES[0]])["input_ids"][0].numpy()
    (where,) = np.nonzero(question == scorer.model.config.vlm_config.image_token_id)
    second = where[len(where) // 2]
    assert meter.graph_tokens == 3 * (len(question) - second)
    assert meter.tokens - meter.graph_tokens == second


@pytest.mark.parametrize("family", ["gemma3", "llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_gradient_of_clips(make_scorer, family):
    """Frames of clips, beside a first frame, get the gradient of the full graph."""
    scorer = make_scorer(family)
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    samples = torch.rand(2, 2, 3, 40, 36, generator=torch.Generator().manual_seed(0)).requires_grad_()
    context = {"conditions": [IMAGES[0], None], "task": "image-to-video"}
    arguments = (samples, ["a red circle", "two"], [[IMAGES[1]] * 3, IMAGES[::3]])
    (want,) = torch.autograd.grad(plain.score(*arguments, **context).log().sum(), samples)
    (got,) = torch.autograd.grad(scorer.score(*arguments, **context).log().sum(), samples)
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_gradient_of_references(make_scorer):
    """References that require a gradient get that of the full graph too, through shared states."""
    scorer = make_scorer("qwen3_vl")
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    reference = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (IMAGES[:4], PROMPT, [reference] * 4)
    (want,) = torch.autograd.grad(plain.score(*arguments).log().sum(), reference)
    (got,) = torch.autograd.grad(scorer.score(*arguments).log().sum(), reference)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_of_distinct_samples(make_scorer, family, layout, monkeypatch):
    """Samples that share nothing have a graph from their own first token on; with a kept reference nothing else is computed."""
    monkeypatch.setattr(engine_module, "MIN_SAVING", 8)  # images are small
    scorer = make_scorer(family, layout=layout)
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    samples = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (samples, [PROMPT, "two green triangles", "a blue square"], IMAGES[:3])
    want = plain.score(*arguments)
    (wanted,) = torch.autograd.grad(want.log().sum(), samples)
    own = 0
    for sample, prompt, reference in zip(*arguments, strict=True):
        ids = scorer.processor([sample.detach()], [prompt], [reference])["input_ids"][0].numpy()
        (where,) = np.nonzero(ids == scorer.model.config.vlm_config.image_token_id)
        own += len(ids) - where[num_features(scorer, reference)]
    with scorer.reuse():
        for is_kept in (False, True):
            with Meter(scorer.model) as meter:
                got = scorer.score(*arguments)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            (gradient,) = torch.autograd.grad(got.log().sum(), samples)
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
            assert own <= meter.graph_tokens <= 1.15 * own
            assert (meter.tokens == meter.graph_tokens) == is_kept


def test_kept_states_are_bounded(make_scorer, monkeypatch):
    """The oldest states make room for new ones; scores are the same with any room."""
    monkeypatch.setattr(engine_module, "MIN_SAVING", 8)  # images are small
    scorer, questions = make_scorer(), round_robin(IMAGES[:4])
    want = make_scorer(engine="plain").ask(questions)
    sizes, limit = [], 1 << 30
    for _ in range(3):
        monkeypatch.setattr(session_module, "MAX_STATE_BYTES", limit)
        with torch.no_grad(), scorer.reuse():
            for _ in range(2):
                got = scorer.ask(questions)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            sizes.append(sum(states.num_bytes for states in scorer._kept.states.values()))
            assert sizes[-1] <= limit
            limit = 0 if len(sizes) == 2 else sizes[0] // 2
    assert sizes[0] > sizes[1] > sizes[2] == 0


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_gradient_checkpointing(make_scorer, family, engine):
    """Layers that are computed again give the same scores and gradient, and keep less."""
    saved = []

    def gradient(scorer):
        samples = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scores = scorer.score(samples, PROMPT, IMAGES[:3])
        saved.append(sum(sizes.values()))
        return scores.detach(), torch.autograd.grad(scores.log().sum(), samples)[0]

    want = gradient(make_scorer(family, engine=engine))
    scorer = make_scorer(family, engine=engine, gradient_checkpointing=True)
    got = gradient(scorer)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-7)
    assert (got[1] - want[1]).norm() <= 1e-5 * want[1].norm()
    assert saved[1] < 0.7 * saved[0]
    assert not any("forward" in vars(module) for module in scorer.model.modules())


# ---- examples and dimensions ----


def make_examples(pairwise=True):
    pairs = [(IMAGES[3], IMAGES[2], "two", True), (IMAGES[1], IMAGES[4], "a circle", False)]
    names = ("image", "reference", "prompt", "verdict")
    rows = [dict(zip(names, pair, strict=True)) for pair in pairs]
    return rows if pairwise else [{name: row[name] for name in names if name != "reference"} for row in rows]


def test_scores_with_examples(make_scorer, family):
    """Questions after examples, of images and of clips with a first frame, and without any, in one call."""
    scorer = make_scorer(family)
    examples = scorer.processor.read_examples(make_examples())
    clip = {
        "image": IMAGES[::3],
        "reference": IMAGES[3::-3],
        "condition": IMAGES[0],
        "prompt": "up",
        "verdict": True,
    }
    clips = scorer.processor.read_examples([clip], "image-to-video")
    video = Question(IMAGES[3::-3], "down", IMAGES[::3], IMAGES[3], "image-to-video", examples=clips)
    questions = [replace(question, examples=examples) for question in round_robin(IMAGES[:2])]
    statistics = assert_same(scorer, [*questions, video, round_robin(IMAGES[:2])[0]])
    assert statistics.num_images == statistics.num_encoded == 5
    assert statistics.tokens < statistics.plain_tokens


@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "gemma3"])
def test_scores_of_single_samples_with_examples(make_scorer, family):
    """A sample that would be seen in tiles if it were alone has company in its examples."""
    scorer = make_scorer(family, "pointwise", "text_first")
    examples = scorer.processor.read_examples(make_examples(False), is_pairwise=False)
    statistics = assert_same(scorer, [Question(image, PROMPT, examples=examples) for image in IMAGES])
    assert statistics.num_encoded == 5


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_examples_are_computed_once(make_scorer, family, layout):
    """Examples cost their own tokens once for all questions of a call, and no graph; samples keep their gradient."""
    scorer = make_scorer(family, layout=layout, batch_size=8)
    images, examples = IMAGES[:4:3], make_examples()
    samples = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (samples, PROMPT, [images[0]] * 3)
    scorer.score(*arguments)
    least = scorer.statistics.minimum_tokens
    with Meter(scorer.model) as meter:
        got = scorer.score(*arguments, examples=examples)
    ids = [scorer.processor(images[:1], [PROMPT], images[1:], examples=shown)["input_ids"] for shown in ([], examples)]
    own = ids[1].shape[1] - ids[0].shape[1]
    assert scorer.statistics.minimum_tokens == least + own
    assert meter.tokens == scorer.statistics.tokens <= 1.15 * (least + own)
    assert meter.tokens - meter.graph_tokens > own
    assert scorer.statistics.num_encoded == 3 + 5  # the reference is in no example
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    want = plain.score(*arguments, examples=examples)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (want,) = torch.autograd.grad(want.log().sum(), samples)
    (got,) = torch.autograd.grad(got.log().sum(), samples)
    assert want.norm() > 0
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_examples_are_seen_once_in_a_tournament(make_scorer):
    """All rounds of a ranking share the features of examples."""
    scorer = make_scorer()
    with Meter(scorer.model) as meter:
        scorer.rank(IMAGES, PROMPT, ranking_method="swiss", examples=make_examples())
    assert meter.features == num_features(scorer, *IMAGES)


DIMENSIONS = ["alignment", "counting", "text", "structure"]


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dimensions_share_images(make_scorer, family, layout, monkeypatch):
    """Each image is seen once for all dimensions; with images first, what goes before the criteria is computed once."""
    monkeypatch.setattr(engine_module, "MIN_SAVING", 8)  # images are small
    scorer = make_scorer(family, layout=layout, batch_size=8)
    with Meter(scorer.model) as meter:
        got = scorer.score(IMAGES[:2], PROMPT, IMAGES[2:4], dimensions=DIMENSIONS)
    assert meter.features == num_features(scorer, *IMAGES[:4])
    rows, before = [], 0
    for sample, reference in zip(IMAGES[:2], IMAGES[2:4], strict=True):
        texts = [scorer.processor.dimension_criteria(name) for name in DIMENSIONS]
        asked = [scorer.processor([sample], [PROMPT], [reference], criteria=text)["input_ids"][0] for text in texts]
        rows += asked
        same = [set(tokens) for tokens in zip(*(ids.tolist() for ids in asked), strict=False)]
        before += [len(tokens) == 1 for tokens in same].index(False)
    # In the paper's layout each row is one question and three endings.
    assert meter.tokens == scorer.statistics.tokens
    if layout == "images_first":
        assert meter.tokens <= 1.15 * (before + sum(map(len, rows)) - 4 * before)
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    want = plain.score(IMAGES[:2], PROMPT, IMAGES[2:4], dimensions=DIMENSIONS)
    assert got.shape == want.shape == (2, 4)
    torch.testing.assert_close(got.logit(), want.logit(), rtol=1e-5, atol=1e-5)


def test_gradient_of_dimensions(make_scorer):
    """Rewards of all dimensions carry the gradient of the full graph to a sample."""
    scorer = make_scorer("qwen3_vl")
    plain = RewardDanceScorer(scorer.model, scorer.processor, engine="plain")
    samples = torch.rand(2, 2, 3, 40, 36, generator=torch.Generator().manual_seed(0)).requires_grad_()
    references = [[IMAGES[1]] * 2, IMAGES[::3]]
    context = {
        "task": "text-to-video",
        "dimensions": ["motion", "physics"],
        "examples": [
            {"image": IMAGES[::3], "reference": IMAGES[3::-3], "prompt": "x", "verdict": "no", "criteria": "c"}
        ],
    }
    gradients = []
    for judge in (scorer, plain):
        scores = judge.score(samples, PROMPT, references, **context)
        assert scores.shape == (2, 2)
        gradients.append([torch.autograd.grad(part.log().sum(), samples, retain_graph=True)[0] for part in scores.T])
    for got, want in zip(*gradients, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()
    assert not torch.allclose(*gradients[1], rtol=1e-2)


# ---- the tree ----


def question(*symbols):
    tokens = np.array(symbols)
    return TokenizedQuestion(tokens, tokens, np.arange(len(tokens))[None], [], [])


def paths(nodes, before=()):
    """Questions that a tree spells, by row."""
    spelled = {}
    for node in nodes:
        assert node.start == len(before)
        here = (*before, *node.question.token_ids[node.start : node.end].tolist())
        spelled |= dict.fromkeys(node.rows, here) | paths(node.children, here)
    return spelled


@pytest.mark.parametrize("min_saving", [1, 4, 1000])
def test_tree_spells_all_questions(min_saving):
    """Whatever is shared, each question can be read from root to leaf; the minimum counts distinct beginnings."""
    generator = np.random.default_rng(0)
    rows = [tuple(generator.integers(0, 2, generator.integers(2, 9)).tolist()) for _ in range(60)]
    roots, minimum = build_tree([question(*row) for row in rows], min_saving)
    assert paths(roots) == dict(enumerate(rows))
    # All distinct beginnings but the whole, and each distinct whole.
    beginnings = {row[:end] for row in rows for end in range(1, len(row))}
    assert minimum == len(beginnings) + len(set(rows))
    if min_saving == 1000:
        assert all(not node.children for node in roots)


def test_tree_of_many_nested_questions():
    """Questions that each continue the one before make a deep tree, not a deep recursion."""
    rows = [tuple([1] * length + [2]) for length in range(1, 1200)]
    _, minimum = build_tree([question(*row) for row in rows], 1)
    assert minimum == 1199 + 1199


def test_all_tested_families_are_shared():
    """The list of models that are known to be exact is that of tested families."""
    assert sorted(make()[0].model_type for make in FAMILIES.values()) == list(engine_module.EXACT_MODEL_TYPES)
