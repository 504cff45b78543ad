"""The gradient to pixels: equal forward, right backward, in all families and for every kind of image."""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf.models import RewardDanceForYesScoring, RewardDanceProcessor, processing_rewarddance
from rewarddance_hf.models.pixels_rewarddance import preprocess_with_gradient, resize_linear


# Smaller and larger than what models take, square and not, odd, thin and tiny.
SIZES = [(40, 40), (61, 33), (30, 101), (128, 96), (160, 9), (7, 5), (28, 28), (97, 150)]
PROMPTS = ["a red circle", "two green triangles left of a blue square", "", "three red squares"]


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Black and white dots: the sharpest edges, whose overshoot is cut off most."""
    dots = np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return Image.fromarray(dots)


def tensor_of(image: Image.Image, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(dtype) / 255


def comparisons(make=random_image) -> tuple[list[Image.Image], list[Image.Image]]:
    """Samples and references of four rows, of all sizes."""
    images = [make(i, *size) for i, size in enumerate(SIZES)]
    return images[::2], images[1::2]


def with_gradient(images, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tensor_of(image, dtype).requires_grad_() for image in images]


def assert_same_batch(got, wanted):
    assert set(got) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0, msg=name)


def assert_reaches_all(gradients, images):
    for gradient, image in zip(gradients, images, strict=True):
        assert gradient.shape == image.shape
        assert gradient.isfinite().all()
        assert (gradient != 0).float().mean() > 0.99  # rounding may hit zero


@pytest.mark.every_family
@pytest.mark.parametrize("make", [random_image, noise])
def test_pixels_are_those_of_images(judge, family, make):
    """The judge sees a tensor as it sees the same image, bit by bit, and every pixel of the sample gets gradient."""
    _, processor = judge(family)
    samples, references = comparisons(make)
    wanted = processor(images=samples, prompts=PROMPTS, references=references)
    images = with_gradient(samples)
    got = processor(images=images, prompts=PROMPTS, references=[tensor_of(image) for image in references])
    assert_same_batch(got, wanted)
    weights = torch.randn(wanted["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    assert_reaches_all(torch.autograd.grad((got["pixel_values"] * weights).sum(), images), images)


def test_scores_are_those_of_images(judge, family):
    """The reward that is tuned is the reward that is reported; both get a gradient, a detached reference none."""
    model, processor = judge(family)
    samples, references = comparisons()
    with torch.no_grad():
        wanted = model(**processor(images=samples, prompts=PROMPTS, references=references)).scores
    images, others = with_gradient(samples), with_gradient(references)

    batch = processor(images=images, prompts=PROMPTS, references=[other.detach() for other in others])
    scores = model(**batch).scores
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    alone = torch.autograd.grad(scores.log().sum(), images)
    assert_reaches_all(alone, images)

    scores = model(**processor(images=images, prompts=PROMPTS, references=others)).scores
    both = torch.autograd.grad(scores.log().sum(), [*images, *others])
    assert_reaches_all(both, [*images, *others])
    for one, other in zip(alone, both[: len(images)], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def keep_float64(monkeypatch):
    """transformers computes norms and rotary embeddings in float32, which finite differences are too fine for."""
    to, to_float = torch.Tensor.to, torch.Tensor.float

    def stay(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            kwargs = {k: torch.float64 if argument is torch.float32 else argument for k, argument in kwargs.items()}
        return to(self, *args, **kwargs)

    sample = torch.nn.functional.grid_sample
    monkeypatch.setattr(torch.nn.functional, "grid_sample", lambda x, grid, **k: sample(x, grid.to(x.dtype), **k))
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to_float(self))


def test_finite_differences(judge, family, monkeypatch):
    """The gradient of P("yes") is that of the judge and its preprocessing without roundings, which both are right."""
    model, processor = judge(family)
    model = copy.deepcopy(model).double()
    keep_float64(monkeypatch)
    samples, references = comparisons()
    images = [(tensor_of(sample, torch.float64) * 0.8 + 0.1).requires_grad_() for sample in samples]
    exact = processor(images=images, prompts=PROMPTS, references=references)

    smooth_path = functools.partial(preprocess_with_gradient, exact=False)
    monkeypatch.setattr(processing_rewarddance, "preprocess_with_gradient", smooth_path)

    def scores(images):
        batch = processor(images=images, prompts=PROMPTS, references=references)
        assert batch["pixel_values"].dtype == torch.float64
        return model(**batch).scores

    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(image.shape, generator=generator, dtype=torch.float64) for image in images]
    gradients = torch.autograd.grad(scores(images).sum(), images)
    slopes = torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)])
    step = 1e-6
    moved = [[i + sign * step * d for i, d in zip(images, directions, strict=True)] for sign in (1, -1)]
    differences = (scores(moved[0]) - scores(moved[1])) / (2 * step)
    torch.testing.assert_close(differences.detach(), slopes, rtol=1e-5, atol=0)

    # What is passed straight through is that very gradient, and the smooth function is near the rounded one.
    smooth = processor(images=images, prompts=PROMPTS, references=references)
    weights = torch.randn(smooth["pixel_values"].shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((exact["pixel_values"] * weights).sum(), images),
        torch.autograd.grad((smooth["pixel_values"] * weights).sum(), images),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    level = 1 / 255 / min(processor.image_processor.image_std)
    assert (smooth["pixel_values"] - exact["pixel_values"]).abs().mean() < level


@pytest.mark.parametrize("resampling", ["BILINEAR", "BICUBIC", "LANCZOS"])
def test_resizing_is_that_of_pillow(resampling):
    """The linear map is Pillow's: with few colors in the middle nothing is cut off, and only roundings differ."""
    generator = np.random.default_rng(0)
    resampling = Image.Resampling[resampling]
    for _ in range(100):
        height, width, new_height, new_width = (int(n) for n in generator.integers(1, 120, 4))
        image = Image.fromarray(generator.integers(100, 156, (height, width, 3), dtype=np.uint8))
        wanted = tensor_of(image.resize((new_width, new_height), resampling)) * 255
        got = resize_linear(tensor_of(image) * 255, new_height, new_width, resampling)
        assert (got - wanted).abs().max() < 1.5


@pytest.mark.parametrize(
    ("family", "images_kwargs"),
    [
        ("internvl", {"crop_to_patches": False}),
        ("internvl", {"crop_to_patches": True, "min_patches": 2, "max_patches": 6}),
        ("internvl", {"do_normalize": False}),
        ("qwen2_5_vl", {"size": {"shortest_edge": 14**2, "longest_edge": 4 * 14**2}}),
        ("smolvlm", {"do_image_splitting": False}),
        (
            "gemma3",
            {
                "do_pan_and_scan": True,
                "pan_and_scan_min_crop_size": 8,
                "pan_and_scan_max_num_crops": 3,
                "pan_and_scan_min_ratio_to_activate": 1.2,
            },
        ),
        ("gemma3", {"size": {"height": 20, "width": 44}, "resample": Image.Resampling.LANCZOS}),
    ],
)
def test_settings_of_the_image_processor(vlm_folder, family, images_kwargs):
    """Settings that are given at each call, such as tiles, hold for tensors too."""
    samples, references = comparisons()
    plain = RewardDanceProcessor.from_pretrained(vlm_folder(family))
    other = plain(images=samples, prompts=PROMPTS, references=references)["pixel_values"]
    processor = RewardDanceProcessor.from_pretrained(vlm_folder(family), vlm_images_kwargs=images_kwargs)
    wanted = processor(images=samples, prompts=PROMPTS, references=references)
    assert wanted["pixel_values"].shape != other.shape or not torch.equal(wanted["pixel_values"], other)

    images = with_gradient(samples)
    got = processor(images=images, prompts=PROMPTS, references=references)
    assert_same_batch(got, wanted)
    weights = torch.randn(wanted["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    assert_reaches_all(torch.autograd.grad((got["pixel_values"] * weights).sum(), images), images)


def test_single_images(judge, family):
    """The pointwise question has one image, which LLaVA-OneVision cuts into tiles."""
    _, processor = judge(family)
    samples, _ = comparisons()
    wanted = processor(images=samples, prompts=PROMPTS)
    images = with_gradient(samples)
    got = processor(images=images, prompts=PROMPTS)
    assert_same_batch(got, wanted)
    weights = torch.randn(wanted["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    assert_reaches_all(torch.autograd.grad((got["pixel_values"] * weights).sum(), images), images)


def test_clips_first_frames_and_mixed_rows(judge, family):
    """A clip is a tensor or a list; rows may mix paths, images and tensors with and without gradient."""
    model, processor = judge(family)
    frames = [random_image(i, 44, 36) for i in range(2)]
    sample, reference, first = random_image(3), random_image(4, 50, 31), random_image(5, 36, 44)
    arguments = {"prompts": ["a red circle"] * 3, "task": ["text-to-image", "text-to-video", "image-to-video"]}
    wanted = processor(
        images=[sample, frames, frames],
        references=[reference, frames[::-1], [reference] * 2],
        conditions=[None, None, first],
        **arguments,
    )
    clip = torch.stack([tensor_of(frame) for frame in frames]).requires_grad_()
    condition, frame = tensor_of(first).requires_grad_(), tensor_of(frames[0]).requires_grad_()
    plain = tensor_of(frames[1])
    got = processor(
        images=[sample, clip, [frame, plain]],
        references=[tensor_of(reference), frames[::-1], [reference] * 2],
        conditions=[None, None, condition],
        **arguments,
    )
    assert_same_batch(got, wanted)
    scores = model(**got).scores
    with torch.no_grad():
        torch.testing.assert_close(scores.detach(), model(**wanted).scores, rtol=0, atol=1e-5)
    images = [clip, condition, frame]
    assert_reaches_all(torch.autograd.grad(scores[1:].log().sum(), images, retain_graph=True), images)
    # Rows do not see each other's images.
    assert not any(gradient.any() for gradient in torch.autograd.grad(scores[0], images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_tensors(judge, dtype):
    """Half precision of a generator is rounded to 8 bits like any other, and its gradient comes back in its own type."""
    _, processor = judge("internvl")
    samples, references = comparisons()
    tensors = [tensor_of(sample).to(dtype) for sample in samples]
    wanted = processor(images=tensors, prompts=PROMPTS, references=references)
    images = [tensor.clone().requires_grad_() for tensor in tensors]
    got = processor(images=images, prompts=PROMPTS, references=references)
    assert got["pixel_values"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got["pixel_values"].float(), wanted["pixel_values"])
    gradients = torch.autograd.grad(got["pixel_values"].square().sum(), images)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    assert_reaches_all(gradients, images)


def test_judge_in_half_precision(vlm_folder, judge):
    """A judge in bfloat16 gives tensors the scores of images, and a gradient in the direction of the float32 one."""
    folder = vlm_folder("internvl")
    half = RewardDanceForYesScoring.from_pretrained(folder, dtype=torch.bfloat16)
    full, processor = judge("internvl")
    samples, references = comparisons()
    gradients = []
    for model in (half, full):
        images = with_gradient(samples)
        batch = processor(images=images, prompts=PROMPTS, references=references)
        scores = model(**batch).scores
        with torch.no_grad():
            wanted = model(**processor(images=samples, prompts=PROMPTS, references=references)).scores
        assert torch.equal(scores.detach(), wanted)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(scores.log().sum(), images)]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_values_between_levels_are_rounded(judge):
    """The image that is judged is the one that would be saved: rounded to 8 bits."""
    _, processor = judge("qwen2_5_vl")
    images = torch.rand(2, 3, 40, 52, generator=torch.Generator().manual_seed(0), requires_grad=True)
    saved = [Image.fromarray((image.detach() * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    got = processor(images=list(images), prompts=PROMPTS[:2])
    assert_same_batch(got, processor(images=saved, prompts=PROMPTS[:2]))


def test_results_of_other_operations(judge):
    """Generators give parts of one tensor, channels last; the gradient arrives at what they were made from."""
    _, processor = judge("internvl")
    latents = torch.rand(2, 40, 52, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = (latents * 2 - 1).permute(0, 3, 1, 2).div(2).add(0.5).clamp(0, 1)
    batch = processor(images=list(images), prompts=PROMPTS[:2], references=[images[1], images[0].detach()])
    batch["pixel_values"].square().sum().backward()
    assert_reaches_all([latents.grad], [latents])


def test_without_gradient_nothing_changes(judge):
    """Under `no_grad` tensors are plain images, as everywhere in torch."""
    _, processor = judge("internvl")
    samples, references = comparisons()
    wanted = processor(images=samples, prompts=PROMPTS, references=references)
    with torch.no_grad():
        got = processor(images=with_gradient(samples), prompts=PROMPTS, references=with_gradient(references))
    assert_same_batch(got, wanted)
    assert not got["pixel_values"].requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_are_made_on_the_device_of_tensors(judge):
    """Gradients do not travel over the CPU; the forward pass is the image processor's all the same."""
    _, processor = judge("internvl")
    samples, references = comparisons()
    wanted = processor(images=samples, prompts=PROMPTS, references=references)
    images = [tensor_of(sample).cuda().requires_grad_() for sample in samples]
    got = processor(images=images, prompts=PROMPTS, references=references)
    assert got["pixel_values"].is_cuda
    assert torch.equal(got["pixel_values"].cpu(), wanted["pixel_values"])
    assert_reaches_all(torch.autograd.grad(got["pixel_values"].square().sum(), images), images)


class ImagesOnly:
    """Stands for the processor of a model whose tokens do not matter here."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, images):
        return self.image_processor(images=[image for row in images for image in row], return_tensors="pt")


@pytest.mark.parametrize(
    "name",
    ["SiglipImageProcessorPil", "CLIPImageProcessorPil", "PixtralImageProcessorPil", "LlavaNextImageProcessorPil"],
)
def test_other_image_processors(name):
    """There is no list of models: cropping in the middle, patches and tiles of others work too."""
    processor = ImagesOnly(getattr(hf, name)())
    samples, _ = comparisons()
    rows = [[sample] for sample in samples]
    images = with_gradient(samples)
    got = preprocess_with_gradient(processor, [[image] for image in images])
    assert_same_batch(got, processor(images=rows))
    gradients = torch.autograd.grad(got["pixel_values"].sum(), images)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


class Inverting(hf.GotOcr2ImageProcessorPil):
    def _preprocess(self, images, *args, **kwargs):
        return super()._preprocess([255 - image for image in images], *args, **kwargs)


class Blurring(hf.GotOcr2ImageProcessorPil):
    def _preprocess(self, images, *args, **kwargs):
        batch = super()._preprocess(images, *args, **kwargs)
        batch["pixel_values"] = batch["pixel_values"] / 2
        return batch


class Shrinking(hf.GotOcr2ImageProcessorPil):
    def process_image(self, image, **kwargs):
        return super().process_image(image, **kwargs)[:, 1:]


class Foreign(hf.image_processing_utils.BaseImageProcessor):
    pass


@pytest.mark.parametrize(
    ("image_processor", "message"),
    [
        (Inverting(), "`Inverting` "),
        (Blurring(), "`Blurring` "),
        (Shrinking(), "`Shrinking` changes images before its `_preprocess`"),
        (Foreign(), "`Foreign` is not built on a backend of transformers"),
        (hf.GotOcr2ImageProcessorPil(resample=Image.Resampling.HAMMING), "resizes by HAMMING"),
        (hf.JanusImageProcessorPil(), "`JanusImageProcessorPil` calculates with pixels in ways of its own"),
    ],
)
def test_gradients_that_cannot_pass(image_processor, message):
    """What an image processor does with pixels is understood and checked, or there is no gradient at all."""
    images = with_gradient(comparisons()[0])
    with pytest.raises(NotImplementedError, match=f'{message}(.|\n)*on `TorchvisionBackend`.*backend="torchvision"'):
        preprocess_with_gradient(ImagesOnly(image_processor), [[image] for image in images])


def test_several_calls_of_the_image_processor():
    """With more than one call it is unclear what becomes of the pixels."""

    class Twice(ImagesOnly):
        def __call__(self, images):
            super().__call__(images)
            return super().__call__(images)

    images = with_gradient(comparisons()[0])
    with pytest.raises(NotImplementedError, match="calls its `_preprocess` 2 times"):
        preprocess_with_gradient(Twice(hf.SiglipImageProcessorPil()), [[image] for image in images])


def test_misuse_of_gradients():
    """A call without any gradient would give pixels without any."""
    with pytest.raises(ValueError, match="`images` has no tensor that requires a gradient"):
        preprocess_with_gradient(ImagesOnly(hf.SiglipImageProcessorPil()), [[random_image(0)]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 8, 8), 1.5), "has values from 1.5 to 1.5, but floats must be finite and in"),
        (torch.full((3, 8, 8), float("nan")), "has values from nan to nan"),
        (torch.zeros(5, 8, 8), r"has shape \(5, 8, 8\)"),
        (torch.zeros(3, 0, 8), r"has size \(8, 0\)"),
        (torch.zeros(0, 3, 8, 8), "is a clip without frames"),
    ],
)
def test_images_are_checked(judge, image, message):
    """Tensors with a gradient are checked like all others."""
    _, processor = judge("internvl")
    with pytest.raises(ValueError, match=rf"`images\[0\]` {message}"):
        processor(images=[image.requires_grad_()], prompts=["a red circle"])


@pytest.fixture(scope="module")
def processors(vlm_folder):
    """Function that gives a family's processors, backed by PIL and by torchvision."""
    loaded = {}

    def load(family: str):
        if family not in loaded:
            loaded[family] = [
                RewardDanceProcessor.from_pretrained(vlm_folder(family), backend=backend)
                for backend in ("pil", "torchvision")
            ]
        return loaded[family]

    return load


@pytest.mark.torchvision
@pytest.mark.parametrize("make", [random_image, noise])
def test_pixels_are_those_of_torchvision(processors, family, make):
    """Tensors become what the image processor in use makes of images, and every pixel gets gradient."""
    _, processor = processors(family)
    assert not type(processor.image_processor).__name__.endswith("Pil")
    samples, references = comparisons(make)
    wanted = processor(images=samples, prompts=PROMPTS, references=references)
    images = with_gradient(samples)
    got = processor(images=images, prompts=PROMPTS, references=references)
    assert_same_batch(got, wanted)
    weights = torch.randn(wanted["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    assert_reaches_all(torch.autograd.grad((got["pixel_values"] * weights).sum(), images), images)


@pytest.mark.torchvision
def test_gradient_is_that_of_the_pil_path(processors, vlm_folder, family):
    """Two implementations of the same preprocessing, torchvision's and the one without it, agree."""
    model = RewardDanceForYesScoring.from_pretrained(vlm_folder(family))
    samples, references = comparisons()
    gradients = []
    for processor in processors(family):
        images = with_gradient(samples)
        scores = model(**processor(images=images, prompts=PROMPTS, references=references)).scores
        gradients.append(torch.autograd.grad(scores.log().sum(), images))
    for one, other in zip(*gradients, strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99


@pytest.mark.torchvision
def test_gradients_that_torchvision_loses():
    """An image processor that cuts the graph off is found out."""

    class Detaching(hf.GotOcr2ImageProcessor):
        def _preprocess(self, images, *args, **kwargs):
            return super()._preprocess([image.detach() for image in images], *args, **kwargs)

    images = with_gradient(comparisons()[0])
    with pytest.raises(NotImplementedError, match="`Detaching` gives pixels of another shape or without gradient"):
        preprocess_with_gradient(ImagesOnly(Detaching()), [[image] for image in images])
