"""
Scoring with the engine, against a plain forward pass of well-filled batches and against one pair at a time.

All is measured side by side in one process, end to end from images to scores; medians of interleaved repeats. Baselines
do the same work for each pair and are timed on some of the pairs. The CPU models are small ones with the proportions of
released models: `InternVL3.5-1B` has 0.69 parameters of the vision encoder to one of the language model's layers, and
`InternVL3.5-2B` 0.22. With CUDA, the models have the sizes of InternVL3.5-1B, -2B and -8B, random weights, and bfloat16.
"""

import ctypes
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode


PROMPT = "two green triangles left of a blue square, watercolor"
REPEATS = 3

VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
TEXT = {
    "hidden_size": 320,
    "intermediate_size": 960,
    "num_hidden_layers": 5,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
}
VISION_LAYERS = {"1b": 6, "2b": 2}
# InternVL3.5: one vision encoder, language models of Qwen3.
CUDA_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
CUDA_TEXT = {
    "1b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
CUDA_HEADS = {"num_key_value_heads": 8, "head_dim": 128}


def make_judge(num_tokens: int, layout: str, proportions: str = "1b"):
    """Random judge of InternVL's classes, whose images are squares of `num_tokens` tokens, and its processor."""
    import tiny_vlms

    from rewarddance_hf import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor
    from rewarddance_hf.models.prompting_rewarddance import CRITERIA, PROMPT_TEXTS

    cuda = torch.cuda.is_available()
    # A tokenizer that knows the words of the question, as those of released models do.
    words = [*CRITERIA.values(), *PROMPT_TEXTS.values(), PROMPT, *tiny_vlms.CORPUS, "yes", "no"]
    with mock.patch.object(tiny_vlms, "CORPUS", words):
        _, tiny = tiny_vlms.internvl()
    side = round(num_tokens**0.5) * 28
    vision = CUDA_VISION if cuda else {**VISION, "num_hidden_layers": VISION_LAYERS[proportions]}
    vlm_config = transformers.InternVLConfig(
        text_config={
            "model_type": "qwen3",
            **tiny_vlms._text_ids(tiny.tokenizer),
            "max_position_embeddings": 4096,
            **(CUDA_TEXT[proportions] | CUDA_HEADS if cuda else TEXT),
        },
        vision_config={"model_type": "internvl_vision", "image_size": side, "patch_size": 14, **vision},
        image_token_id=tiny.tokenizer.context_image_token_id,
        image_seq_length=num_tokens,
        tie_word_embeddings=False,
    )
    processor = RewardDanceProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": side, "width": side}, crop_to_patches=False
        ),
        tokenizer=tiny.tokenizer,
        chat_template=tiny.chat_template,
        vlm_processor_class="InternVLProcessor",
        vlm_processor_kwargs={"image_seq_length": num_tokens},
        vlm_images_kwargs={"crop_to_patches": False},
        prompt_layout=layout,
    )
    config = RewardDanceConfig(
        vlm_config=vlm_config,
        yes_token_id=processor.yes_token_id,
        no_token_id=processor.no_token_id,
        score_normalization="yes_no",
    )
    torch.manual_seed(0)
    model = RewardDanceForYesScoring(config).requires_grad_(False).eval()
    return (model.to("cuda", torch.bfloat16) if cuda else model), processor


def make_cross_encoder(model, processor):
    """
    `CrossEncoder` of sentence-transformers on the same model, with pairs of images asked by the same questions, or
    None where sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import InputModule
        from sentence_transformers.cross_encoder.modules import LogitScore
    except ImportError:
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
            references, samples = (list(column) for column in zip(*inputs, strict=True))
            return dict(processor(samples, [PROMPT] * len(samples), references))

        def forward(self, features, **kwargs):
            features["causal_logits"] = self.model.vlm(**features, use_cache=False, logits_to_keep=1).logits
            return features

        def save(self, *args, **kwargs):
            raise NotImplementedError

    score = LogitScore(processor.yes_token_id, processor.no_token_id)
    return CrossEncoder(modules=[Questions(), score], num_labels=1, device=str(model.device))


def timed(function: Callable, *args):
    """Result, seconds on the wall, and seconds of CPU time of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - cpu


@torch.no_grad()
def round_robin(num_images: int, num_tokens: int, layout: str, proportions: str = "1b", repeats: int = REPEATS):
    """One round robin: all ways of scoring, interleaved."""
    from tiny_vlms import random_image

    from rewarddance_hf import RewardDanceScorer

    model, processor = make_judge(num_tokens, layout, proportions)
    batch_size = 32 if torch.cuda.is_available() else 8
    engine = RewardDanceScorer(model, processor, batch_size)
    batched = RewardDanceScorer(model, processor, batch_size, engine="plain")
    naive = RewardDanceScorer(model, processor, 1, engine="plain")
    images = [random_image(i, 512, 512) for i in range(num_images)]
    pairs = [(images[j], images[i]) for i, j in itertools.permutations(range(num_images), 2)]
    some = pairs[:: max(1, len(pairs) // batch_size)][:batch_size]
    few = some[: batch_size // 2]
    samples, references = (list(column) for column in zip(*some, strict=True))
    ready = processor(samples, [PROMPT] * len(some), references).to(model.device)

    plan = [
        ("engine", score_pairs, (engine, pairs), len(pairs)),
        ("batched", score_pairs, (batched, some), len(some)),
        ("batched_forward", lambda: model(**ready), (), len(some)),
        ("naive", score_pairs, (naive, few), len(few)),
    ]
    cross_encoder = make_cross_encoder(model, processor)
    if cross_encoder is None:
        sys.stderr.write("sentence-transformers is not installed: no comparison with its `CrossEncoder`.\n")
    else:
        couples = [(reference, sample) for sample, reference in some]
        plan.append(("cross_encoder", lambda: cross_encoder.predict(couples, batch_size=batch_size), (), len(some)))
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for name, function, arguments, count in plan:
            result, *both = timed(function, *arguments)
            seconds.setdefault(name, []).append(tuple(value / count for value in both))
            if name == "engine":
                got, counted = result, engine.statistics
            elif name == "batched":
                want = result
            elif name == "cross_encoder":
                torch.testing.assert_close(torch.tensor(result), want.float().cpu(), rtol=2e-2, atol=1e-2)
    wall, cpu = ({name: statistics.median(v[i] for v in values) for name, values in seconds.items()} for i in (0, 1))
    index = [pairs.index(pair) for pair in some]
    peak = matrix_product_peak(model)
    operations = {"engine": flops(engine, pairs) / len(pairs), "batched": flops(batched, some) / len(some)}
    others = {"speedup_vs_cross_encoder": wall["cross_encoder"] / wall["engine"]} if cross_encoder else {}
    return {
        **others,
        "images_per_second": num_images / len(pairs) / wall["engine"],
        "questions_per_second": 1 / wall["engine"],
        "speedup_vs_batched": wall["batched"] / wall["engine"],
        "speedup_vs_batched_cpu_time": cpu["batched"] / cpu["engine"],
        "speedup_vs_batched_forward": wall["batched_forward"] / wall["engine"],
        "speedup_vs_naive": wall["naive"] / wall["engine"],
        "theoretical_speedup": operations["batched"] / operations["engine"],
        "share_of_peak": operations["engine"] / wall["engine"] / peak,
        "share_of_peak_batched": operations["batched"] / wall["batched"] / peak,
        "tokens_over_minimum": counted.tokens / counted.minimum_tokens,
        "tokens_saved": counted.plain_tokens / counted.tokens,
        "tokens_per_question": counted.plain_tokens / len(pairs),
        "encodings_per_image": counted.num_encoded / num_images,
        "largest_difference": float((got[index].logit() - want.logit()).abs().max()),
    }


def score_pairs(scorer, pairs) -> torch.Tensor:
    """Scores of pairs of a sample and a reference."""
    samples, references = (list(column) for column in zip(*pairs, strict=True))
    return scorer.score(samples, PROMPT, references)


def flops(scorer, pairs) -> int:
    """Floating-point operations of products and attention."""
    with FlopCounterMode(display=False) as counter:
        score_pairs(scorer, pairs)
    return counter.get_total_flops()


def matrix_product_peak(model, size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations per second of the best of some large matrix products on the model's device."""
    size *= 8 if model.device.type == "cuda" else 1
    a, b = (torch.randn(size, size, device=model.device, dtype=model.dtype) for _ in range(2))
    return 2 * size**3 / min(timed(torch.matmul, a, b)[1] for _ in range(repeats))


def reward_step(scorer, images, samples) -> torch.Tensor:
    """Gradient of the rewards of some samples against one reference, as ReFL needs it."""
    rewards = scorer.score(samples, PROMPT, [images[0]] * len(samples))
    return torch.autograd.grad(rewards.log().sum(), samples)[0]


def _judge_for_steps(layout: str, engine: str):
    from tiny_vlms import random_image

    from rewarddance_hf import RewardDanceScorer

    scorer = RewardDanceScorer(*make_judge(64, layout), engine=engine)
    samples = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return scorer, [random_image(0, 224, 224)], samples.to(scorer.model.device).requires_grad_()


def reward_steps(layout: str) -> dict[str, float]:
    """Time and memory of the gradient with the reference's prefix cached, against the full graph."""
    judges = {engine: _judge_for_steps(layout, engine) for engine in ("auto", "plain")}
    seconds: dict[str, list[float]] = {}
    gradients = {}
    for _ in range(REPEATS + 1):
        for engine, arguments in judges.items():
            gradients[engine], wall, _ = timed(reward_step, *arguments)
            seconds.setdefault(engine, []).append(wall)
    median = {engine: statistics.median(values[1:]) for engine, values in seconds.items()}
    peaks = {engine: _peak("reward_step", layout, engine) for engine in judges}
    difference = (gradients["auto"] - gradients["plain"]).norm() / gradients["plain"].norm()
    return {
        "speedup_vs_full_graph": median["plain"] / median["auto"],
        "memory_over_full_graph": peaks["auto"] / peaks["plain"],
        "peak_gb": peaks["auto"] / 1e9,
        "peak_gb_full_graph": peaks["plain"] / 1e9,
        "relative_difference_of_gradient": float(difference),
    }


def memory() -> dict[str, float]:
    """Memory of a round robin of 8 images."""
    peaks = {engine: _peak("rank", "text_first", engine) for engine in ("auto", "plain")}
    return {"peak_gb": peaks["auto"] / 1e9, "peak_gb_batched": peaks["plain"] / 1e9}


def _peak(task: str, layout: str, engine: str) -> float:
    """Bytes at the peak of one step above those before it, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(task, layout, engine, sender))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def _send_peak(task: str, layout: str, engine: str, connection) -> None:
    torch.set_num_threads(1)
    scorer, images, samples = _judge_for_steps(layout, engine)

    def step(samples):
        if task == "rank":
            scorer.rank([*samples.detach(), *samples.detach().flip(-1)], PROMPT)
        else:
            reward_step(scorer, images, samples)

    step(samples[:1].detach().requires_grad_())  # libraries are loaded, buffers made
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(samples)
        connection.send(torch.cuda.max_memory_allocated() - before)
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, which a child inherits
    before = _resident("VmRSS")
    step(samples)
    connection.send(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes in memory, now or at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def tournaments(num_images: int = 32) -> dict[str, float]:
    """Questions of each method, over those of a round robin."""
    from rewarddance_hf.scoring.ranking import rank_samples

    def brightness(images, prompts, references):
        return torch.stack([image.mean() - other.mean() for image, other in zip(images, references, strict=True)])

    brightness.is_pairwise = True
    images = torch.rand(num_images, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    full, swiss, halving = (
        rank_samples(brightness, images, "a", ranking_method=method).num_questions
        for method in ("round_robin", "swiss", "halving")
    )
    return {"swiss_over_round_robin": swiss / full, "halving_over_round_robin": halving / full}


CASES = {
    "round_robin_16": (16, 64, "text_first"),
    "round_robin_16_images_first": (16, 64, "images_first"),
    "round_robin_16_256_tokens": (16, 256, "text_first", "1b", 1),
    "round_robin_16_2b": (16, 64, "text_first", "2b", 1),
    "round_robin_4": (4, 64, "text_first"),
}
CUDA_CASES = {"round_robin_16_8b": (16, 256, "text_first", "8b", 1)}


def run(only: str | None = None) -> dict[str, float]:
    """
    Measure all cases.

    Args:
        only (`str`, *optional*):
            Name of the one case to measure.

    Returns:
        `dict[str, float]`: Flat keys `case/what`.
    """
    round_robins = CASES | (CUDA_CASES if torch.cuda.is_available() else {})
    cases: dict[str, Callable[[], dict[str, float]]] = {
        name: (lambda arguments=arguments: round_robin(*arguments)) for name, arguments in round_robins.items()
    }
    cases |= {
        f"reward_step_{layout}": (lambda layout=layout: reward_steps(layout))
        for layout in ("images_first", "text_first")
    }
    cases |= {"round_robin_8_memory": memory, "tournament_32": tournaments}
    results = {name: case() for name, case in cases.items() if only in (None, name)}
    return {f"{name}/{key}": value for name, values in results.items() for key, value in values.items()}
