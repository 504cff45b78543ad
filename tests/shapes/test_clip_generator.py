"""Tests of the generator of clips: what it is taught is true, both tasks share its denoiser, and its clips are judged as they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rewarddance_hf.shapes.clip_generator import (
    CLIP_SAMPLING,
    build_clip_generator,
    build_clip_tokenizer,
    load_clip_generator,
)
from rewarddance_hf.shapes.clip_generator_base import TASKS, draw_clips, train_clip_generator
from rewarddance_hf.shapes.clip_oracle import check_clip
from rewarddance_hf.shapes.clips import NUM_FRAMES
from rewarddance_hf.shapes.generated_clips import (
    ShapesClipPrompts,
    check_clips,
    clip_preferences,
    draw_clip,
    plan_prompt,
    sample_clips,
)
from rewarddance_hf.shapes.generator_base import Stage
from rewarddance_hf.shapes.rows import SPLITS, row_rng


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A generator of two updates, saved as the recipe does."""
    folder = tmp_path_factory.mktemp("clip_generator")
    stages = (Stage(1, 1e-3), Stage(1, 1e-3, 0.8))
    train_clip_generator(folder, num_clips=16, autoencoder_steps=2, denoiser_stages=stages)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A generator whose denoiser and text encoder move what they get, as its random weights do."""
    folder = tmp_path_factory.mktemp("untrained_clip_generator")
    pipeline = build_clip_generator()
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.2)
    pipeline.save_pretrained(folder)
    return folder


def test_each_word_is_one_token():
    """Captions of clips of every split are read without unknown tokens, words as one token each."""
    tokenizer = build_clip_tokenizer()
    for split in SPLITS:
        for task in TASKS:
            for row in ShapesClipPrompts(30, split, task):
                tokens = tokenizer.tokenize(row["prompt"])
                assert len(tokens) == len(row["prompt"].replace(",", " ,").split())
                assert tokenizer.unk_token not in tokens
                assert len(tokens) < CLIP_SAMPLING["max_sequence_length"]
    assert tokenizer.unk_token not in tokenizer.tokenize("Zebra-crossing: 7!")


def test_what_it_is_taught():
    """Clips show all of their prompts by their pixels, or not, as the stage asks for; the tasks take turns."""
    for wrong_share in (0.0, 1.0):
        tasks, prompts, clips = draw_clips(60, 3, wrong_share)
        assert tasks == [TASKS[index % 2] for index in range(60)]
        frames = (127.5 * (clips + 1)).round().byte().permute(0, 2, 3, 4, 1).numpy()
        shown = [check_clip(list(clip), prompt).all_hold for clip, prompt in zip(frames, prompts, strict=True)]
        # Without the given frame, another object than there is no fault.
        of_text = [holds for holds, task in zip(shown, tasks, strict=True) if task == "text-to-video"]
        assert np.mean(of_text) == 1 - wrong_share
        assert np.mean(shown) > 0.99 if wrong_share == 0 else np.mean(shown) < 0.3


def test_no_prompt_is_in_two_splits():
    texts = {
        split: {row["prompt"] for task in TASKS for row in ShapesClipPrompts(150, split, task)} for split in SPLITS
    }
    assert not texts["train"] & texts["id"]
    assert not texts["ood"] & (texts["train"] | texts["id"])


def test_prompts_come_with_their_first_frame():
    """The given first frame is one from which a right clip goes on."""
    for index, row in enumerate(ShapesClipPrompts(12, "id", "image-to-video", seed=5)):
        rng = row_rng(ShapesClipPrompts.name, 5, "id", index)
        category, prompt, plan, _ = plan_prompt(rng, "image-to-video", "id")
        frames = draw_clip(plan, rng)
        assert (row["category"], row["prompt"]) == (category, prompt)
        assert check_clip(frames, row["prompt"], row["condition"]).all_hold


@pytest.mark.parametrize("task", TASKS)
def test_recipe_saves_a_stock_pipeline(generator, task):
    """What the recipe saves is loaded for both tasks and draws clips of frames in [0, 1]."""
    rows = list(ShapesClipPrompts(3, "id", task))
    pipeline = load_clip_generator(generator, task)
    assert type(pipeline).__module__.startswith("diffusers.")
    clips = sample_clips(pipeline, rows)
    assert clips.shape == (3, NUM_FRAMES, 3, 32, 32)
    assert 0 <= clips.min() <= clips.max() <= 1
    std = pipeline.vae.latents_std
    assert not torch.equal(std, torch.ones_like(std))


@pytest.mark.parametrize("task", TASKS)
def test_noise_belongs_to_the_place(untrained, task):
    """A clip is the same in any batch, and another for another prompt, noise or given first frame."""
    rows = list(ShapesClipPrompts(4, "id", task))
    pipeline = load_clip_generator(untrained, task)
    together, in_parts = (sample_clips(pipeline, rows, batch_size=size) for size in (4, 3))
    torch.testing.assert_close(together, in_parts, atol=1e-4, rtol=1e-4)
    same = sample_clips(pipeline, [rows[0]] * 2)
    assert not torch.allclose(same[0], same[1], atol=1e-3)
    assert not torch.allclose(together[0], sample_clips(pipeline, rows[:1], seed=1)[0], atol=1e-3)
    other = sample_clips(pipeline, [{**rows[0], "prompt": rows[1]["prompt"]}])
    assert not torch.allclose(together[0], other[0], atol=1e-6)


def test_given_first_frame_is_kept(untrained):
    """The latents of the first frame are those of the given image, encoded by itself."""
    row = ShapesClipPrompts(1, "id", "image-to-video")[0]
    pipeline = load_clip_generator(untrained, "image-to-video")
    settings = {**CLIP_SAMPLING, "image": row["condition"], "output_type": "latent"}
    latents = pipeline(prompt=row["prompt"], **settings).frames
    pixels = pipeline.video_processor.preprocess(row["condition"], height=32, width=32)
    encoded = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()
    given = pipeline._normalize_latents(encoded, pipeline.vae.latents_mean, pipeline.vae.latents_std)
    first = latents[:, : 4 * 4]  # tokens of the first frame come first
    torch.testing.assert_close(first, pipeline._pack_latents(given), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(latents[:, 4 * 4 : 2 * 4 * 4], first, atol=0.1)


def drawn_clips(clips):
    """In place of a pipeline: of four clips for a prompt, the first three are right, the last is what is given for it beside."""
    seen = []

    def call(prompt, **arguments):
        chosen = []
        for text in prompt:
            right, other = clips[text]
            chosen.append(np.stack(other if seen.count(text) % 4 == 3 else right))
            seen.append(text)
        return SimpleNamespace(frames=torch.from_numpy(np.stack(chosen)).permute(0, 1, 4, 2, 3) / 255)

    return call


def test_pairs_of_own_clips():
    """Of two clips the chosen one shows the prompt and the other does not; prompts without such a pair give none."""
    clips, prompts = {}, []
    for index in range(6):
        rng = row_rng("pairs", 0, "train", index)
        _, prompt, right, wrong = plan_prompt(rng, "text-to-video", "train")
        clips[prompt] = draw_clip(right, rng), draw_clip(wrong if index else right, rng)
        prompts.append({"prompt": prompt, "task": "text-to-video"})
    rows = clip_preferences(drawn_clips(clips), prompts)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts[1:]]
    for row in rows:
        assert check_clip(row["chosen"], row["prompt"]).all_hold
        assert not check_clip(row["rejected"], row["prompt"]).all_hold


def test_diverged_clips_are_refused():
    rows = list(ShapesClipPrompts(1))
    clips = torch.full((1, NUM_FRAMES, 3, 32, 32), float("nan"))
    with pytest.raises(ValueError, match="`clips` holds NaN"):
        check_clips(clips, rows)


def test_loading_tells_what_is_wrong(generator, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pipeline"):
        load_clip_generator(tmp_path)
    with pytest.raises(ValueError, match="`task` is 'text-to-image'"):
        load_clip_generator(generator, "text-to-image")
