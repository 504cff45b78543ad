"""Searches on unmodified pipelines, against plain calls of the same pipelines."""

import functools
import importlib
import json
import os
import random
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from new_process import run_together
from PIL import Image
from tiny_pipelines import TinyPipeline, reward

from rewarddance_hf import RewardDanceScorer, import_utils
from rewarddance_hf.alignment.search import output, paths
from rewarddance_hf.alignment.search.drawing import draw_tree
from rewarddance_hf.alignment.search.replay import replay
from rewarddance_hf.alignment.search.saving import save_search
from rewarddance_hf.alignment.search.search import best_of_n, search_over_paths, zero_order_search


NAMES = ["StableDiffusion", "StableDiffusion3", "Flux", "Sana", "QwenImage", "Wan"]
STEPS = 4
PROMPTS = ["a", "b"]


@functools.cache
def tiny(name: str) -> TinyPipeline:
    return TinyPipeline(name)


def arguments_of(name: str, prompts: list[int] | None = None, **changes):
    """Arguments of a tiny pipeline's call, for some of its two prompts."""
    inputs = {
        key: value[prompts] if prompts is not None and isinstance(value, torch.Tensor) else value
        for key, value in tiny(name).inputs.items()
    }
    return {"num_inference_steps": STEPS, "output_type": "pt", **inputs, **changes}


def plain(name: str, prompts: list[int], seeds: list[int], **changes) -> torch.Tensor:
    """Images of the pipeline alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return tiny(name).pipeline(**arguments_of(name, prompts, **changes), generator=generators)[0]


def judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return reward(images)


class TestPaths:
    @pytest.mark.parametrize("name", NAMES)
    def test_one_branch_without_noise_is_plain_sampling(self, name):
        """With one branch and no re-noising the images are those of the pipeline, bit for bit."""
        results = search_over_paths(
            tiny(name).pipeline, PROMPTS, judge, num_paths=2, num_branches=1, start_step=1, renoise_steps=0,
            denoise_steps=1, num_images=2, **arguments_of(name),
        )  # fmt: skip
        roots = [[node.seed for node in result.nodes if node.parent is None] for result in results]
        images = plain(name, [0, 0, 1, 1], roots[0] + roots[1])
        for prompt, result in enumerate(results):
            for place in range(2):
                number = 2 * prompt + roots[prompt].index(result.lineage(place)[0].seed)
                assert torch.equal(result.images[place], images[number])
            assert result.rewards == sorted(result.rewards, reverse=True)
            assert result.denoiser_evaluations == 2 * STEPS

    @pytest.mark.parametrize("name", NAMES)
    def test_search(self, name):
        """Counts are those of a hooked denoiser, kept paths are the best ones, and the winner's seeds make it again."""
        model, seen = tiny(name), []
        hook = model.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        judged = []

        def verifier(images, prompts):
            judged.extend(prompts)
            assert images.ndim == (5 if name == "Wan" else 4)
            return reward(images)

        results = search_over_paths(
            model.pipeline, PROMPTS, verifier, num_paths=2, num_branches=2, start_step=2, renoise_steps=1,
            denoise_steps=2, **arguments_of(name),
        )  # fmt: skip
        hook.remove()
        # 2 paths make 2 steps; then 2 x 2 branches go back by one step and make two, twice.
        assert [result.denoiser_evaluations for result in results] == [2 * 2 + 2 * (4 * 2)] * 2
        assert sum(result.forward_passes for result in results) == sum(seen)
        assert sum(seen) == (1 if name == "Flux" else 2) * 2 * 20
        assert [result.verifier_calls for result in results] == [8, 8]
        assert sorted(judged) == ["a"] * 8 + ["b"] * 8
        for prompt, result in enumerate(results):
            stages = [[node for node in result.nodes if node.stop_step == stop] for stop in (2, 3, 4)]
            assert [len(stage) for stage in stages] == [2, 4, 4]
            ranked = sorted(stages[1], key=lambda node: -node.reward)
            assert {node.parent for node in stages[2]} == {node.index for node in ranked[:2]}
            assert [node.survived for node in ranked] == [True, True, False, False]
            assert result.rewards == [max(node.reward for node in stages[2])]
            assert result.rewards[0] == pytest.approx(reward(result.images[0][None]).item(), rel=1e-5)
            assert len({node.seed for node in result.nodes}) == 10
            again = replay(model.pipeline, PROMPTS[prompt], result.lineage(), **arguments_of(name, [prompt]))
            torch.testing.assert_close(again, result.images[0], atol=2e-5, rtol=0)

    def test_branches_differ(self):
        """Each branch has noise of its own, and a search for several prompts equals those for each alone."""
        name = "StableDiffusion3"
        options = {"num_paths": 1, "num_branches": 3, "start_step": 2, "renoise_steps": 1, "denoise_steps": 3}
        both = search_over_paths(tiny(name).pipeline, PROMPTS, judge, **options, num_images=3, **arguments_of(name))
        images = both[0].images
        assert min((images[i] - images[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
        first = search_over_paths(
            tiny(name).pipeline, PROMPTS[0], judge, **options, num_images=3, batch_size=1, **arguments_of(name, [0])
        )
        assert [node.seed for node in first.nodes] == [node.seed for node in both[0].nodes]
        torch.testing.assert_close(torch.stack(first.images), torch.stack(images), atol=1e-5, rtol=0)
        other = search_over_paths(tiny(name).pipeline, PROMPTS[0], judge, **options, seed=1, **arguments_of(name, [0]))
        assert not {node.seed for node in other.nodes} & {node.seed for node in first.nodes}


class TestBestOfN:
    @pytest.mark.parametrize("name", NAMES)
    def test_seed_makes_the_image_again(self, name):
        """The winner is the candidate with the highest reward, and the pipeline makes it again from its seed alone."""
        result = best_of_n(tiny(name).pipeline, "b", judge, 3, batch_size=1, **arguments_of(name, [1]))
        candidates = [plain(name, [1], [node.seed])[0] for node in result.nodes]
        rewards = [reward(image[None]).item() for image in candidates]
        best = int(np.argmax(rewards))
        assert result.winners == [best]
        assert [node.reward for node in result.nodes] == pytest.approx(rewards)
        assert torch.equal(result.images[0], candidates[best])
        assert (result.denoiser_evaluations, result.verifier_calls) == (3 * STEPS, 3)

    def test_pruning(self):
        """After the preview step only the best go on; what is kept ends as if it had been alone."""
        name = "StableDiffusion"
        results = best_of_n(
            tiny(name).pipeline, PROMPTS, judge, 4, preview_step=1, num_kept=2, num_images=2, **arguments_of(name)
        )
        for prompt, result in enumerate(results):
            assert result.denoiser_evaluations == 4 * 1 + 2 * (STEPS - 1)
            previews = [node for node in result.nodes if node.stop_step == 1]
            best = sorted(previews, key=lambda node: -node.reward)[:2]
            assert {result.lineage(place)[0].index for place in range(2)} == {node.index for node in best}
            image = plain(name, [prompt], [result.lineage()[0].seed])[0]
            torch.testing.assert_close(result.images[0], image, atol=1e-5, rtol=0)

    def test_tournament_of_a_pairwise_judge(self, scorers):
        """A pairwise judge ranks the candidates as `rank` does, and its questions are counted."""
        name, scorer = "StableDiffusion3", scorers["pairwise"]
        result = best_of_n(
            tiny(name).pipeline, "a circle", scorer, 4, num_images=4, ranking_method="swiss", **arguments_of(name, [0])
        )
        images = [plain(name, [0], [node.seed])[0] for node in result.nodes]
        # The judge sees 8 bits of each pixel, so that the last digits of a batch do not matter.
        ranking = scorer.rank(images, "a circle", ranking_method="swiss")
        assert result.winners == ranking.order
        assert result.rewards == pytest.approx([ranking.scores[i].item() for i in ranking.order], abs=1e-4)
        assert result.verifier_calls == 2 * 2 * 2  # two rounds of two comparisons, in both orders
        alone = best_of_n(tiny(name).pipeline, "a circle", scorer, 1, **arguments_of(name, [0]))
        assert len(alone.images) == 1
        assert np.isnan(alone.rewards[0])
        assert alone.to_dict()["rewards"] == [None]  # NaN is no JSON

    def test_pruning_by_a_pairwise_judge(self, scorers):
        """The previews are ranked too."""
        name = "StableDiffusion3"
        result = best_of_n(
            tiny(name).pipeline, "a circle", scorers["pairwise"], 3, preview_step=2, num_kept=2, num_images=2,
            **arguments_of(name, [0]),
        )  # fmt: skip
        previews = result.nodes[:3]
        assert [node.survived for node in previews].count(True) == 2
        assert result.verifier_calls == 3 * 2 + 2
        assert result.denoiser_evaluations == 3 * 2 + 2 * 2

    def test_clips_are_judged_as_videos(self, scorers):
        """A judge is told that it sees clips, unless the caller names another task."""
        result = best_of_n(tiny("Wan").pipeline, "a circle", scorers["pointwise"], 2, **arguments_of("Wan", [0]))
        clip = result.images[0][None]
        asked = [
            scorers["pointwise"].score(clip, "a circle", task=task).item()
            for task in ("text-to-video", "text-to-image")
        ]
        assert result.rewards[0] == pytest.approx(asked[0], abs=1e-6)
        assert asked[0] != pytest.approx(asked[1], abs=1e-6)
        other = best_of_n(
            tiny("Wan").pipeline, "a circle", scorers["pointwise"], 2, context={"task": "text-to-image"},
            **arguments_of("Wan", [0]),
        )  # fmt: skip
        by_seed = {node.seed: node.reward for node in other.nodes}
        assert by_seed[result.lineage()[0].seed] == pytest.approx(asked[1], abs=1e-6)

    def test_conditions_and_prompts_reach_the_reward(self):
        """Each image is judged with its own prompt and first frame."""
        seen = []

        def verifier(images, prompts, conditions, weight):
            seen.extend(zip(prompts, conditions, strict=True))
            return torch.tensor(weight) * reward(images)

        context = {"conditions": ["first", "second"], "weight": 2.0}
        name = "StableDiffusion3"
        results = best_of_n(tiny(name).pipeline, PROMPTS, verifier, 2, context=context, **arguments_of(name))
        assert seen == [("a", "first")] * 2 + [("b", "second")] * 2
        assert results[1].rewards[0] == pytest.approx(2 * reward(results[1].images[0][None]).item(), rel=1e-5)

    @pytest.mark.parametrize("name", ["StableDiffusion3", "Wan"])
    def test_output_types(self, name):
        """Images are exactly those of the pipeline in each output type."""
        for output_type in ("pil", "np", "pt"):
            arguments = {**arguments_of(name, [0]), "output_type": output_type}
            result = best_of_n(tiny(name).pipeline, "a", judge, 2, batch_size=1, **arguments)
            expected = plain(name, [0], [result.lineage()[0].seed], output_type=output_type)[0]
            frames, wanted = (
                [np.asarray(frame) for frame in (clip if isinstance(clip, list) else [clip])]
                for clip in (result.images[0], expected)
            )
            assert all(np.array_equal(*pair) for pair in zip(frames, wanted, strict=True))
            assert type(result.images[0]) is type(expected)


class TestZeroOrder:
    @pytest.mark.parametrize("name", ["StableDiffusion", "Flux2", "Wan"])
    def test_search(self, name):
        """Each round looks around the best so far, near it, and the winner's seeds make it again."""
        result = zero_order_search(
            tiny(name).pipeline, "b", judge, num_neighbors=3, num_rounds=2, noise_strength=0.3, num_images=7,
            **arguments_of(name, [1]),
        )  # fmt: skip
        assert (result.denoiser_evaluations, result.verifier_calls) == (7 * STEPS, 7)
        best = max(result.nodes[:4], key=lambda node: node.reward)
        assert [node.parent for node in result.nodes] == [None, 0, 0, 0] + [best.index] * 3
        assert result.rewards[0] == max(node.reward for node in result.nodes)
        again = replay(tiny(name).pipeline, "b", result.lineage(), **arguments_of(name, [1]))
        torch.testing.assert_close(again, result.images[0], atol=2e-5, rtol=0)
        # The neighbors are nearer to the center than another noise is.
        images = {result.winners[place]: image for place, image in enumerate(result.images)}
        other = plain(name, [1], [123])[0]
        distances = [(images[i] - images[0]).pow(2).mean() for i in (1, 2, 3)]
        assert max(distances) < (other - images[0]).pow(2).mean()

    def test_a_lost_root(self):
        """A root that cannot be judged does not end the search: other noises are drawn as long as there is budget."""
        name = "StableDiffusion3"
        result = zero_order_search(
            tiny(name).pipeline, "a", failing("nan", {0}), num_neighbors=2, num_rounds=2, **arguments_of(name, [0])
        )
        assert [node.noise for node in result.nodes] == ["fresh"] * 3 + ["mixed"] * 2
        assert result.nodes[0].lost
        assert result.denoiser_evaluations == 5 * STEPS
        assert result.rewards == [max(node.reward for node in result.nodes[1:])]

    def test_a_lost_root_beside_others(self):
        """Its fresh noises and the neighbors of another prompt's root are in one batch. They used to be mixed with each other."""
        name = "StableDiffusion3"
        arguments = arguments_of(name, [0, 1])
        settings = {"num_neighbors": 1, "num_rounds": 2, "num_images": 3, **arguments}
        for lost in (0, 1):
            results = zero_order_search(tiny(name).pipeline, ["a", "b"], failing("nan", {lost}), **settings)
            for index, result in enumerate(results):
                assert [node.lost for node in result.nodes] == [index == lost, False, False]
                assert [node.noise for node in result.nodes] == [
                    "fresh",
                    "fresh" if index == lost else "mixed",
                    "mixed",
                ]
                own = arguments_of(name, [index])
                for place, image in enumerate(result.images):
                    again = replay(tiny(name).pipeline, "ab"[index], result.lineage(place), **own)
                    torch.testing.assert_close(again, image, atol=2e-5, rtol=0)


class TestBudget:
    def test_never_exceeded(self):
        """Whatever is asked for, no prompt gets more evaluations than the budget, each gets an image, and little is left."""
        pipeline, rng = tiny("StableDiffusion3").pipeline, random.Random(0)
        arguments = arguments_of("StableDiffusion3", output_type="pt")
        for trial in range(12):
            budget = rng.choice([4, 5, 7, 9, 13, 18, 26])
            start, back = rng.randint(1, 3), rng.randint(0, 1)
            searches = {
                "best": functools.partial(
                    best_of_n, num_candidates=rng.choice([None, 1, 3, 9]), preview_step=rng.choice([None, 1, 3]),
                    num_kept=rng.randint(1, 3),
                ),
                "zero": functools.partial(
                    zero_order_search, num_neighbors=rng.randint(1, 3), num_rounds=rng.choice([None, 1, 9])
                ),
                "paths": functools.partial(
                    search_over_paths, num_paths=rng.randint(1, 4), num_branches=rng.choice([None, 1, 2, 3]),
                    start_step=start, renoise_steps=back, denoise_steps=back + rng.randint(1, 3),
                ),
            }  # fmt: skip
            method = list(searches)[trial % 3]
            seen = []
            hook = tiny("StableDiffusion3").denoiser.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
            )
            results = searches[method](pipeline, PROMPTS, judge, max_denoiser_evaluations=budget, **arguments)
            hook.remove()
            assert max(result.denoiser_evaluations for result in results) <= budget
            assert sum(seen) == 2 * sum(result.denoiser_evaluations for result in results) <= 2 * 2 * budget
            assert all(len(result.images) == 1 for result in results)
            assert all(result.lineage()[-1].stop_step == STEPS for result in results)

    @pytest.mark.parametrize("budget", [8, 14, 33])
    def test_is_used(self, budget):
        """Without a number of candidates or rounds the search takes as many as it may."""
        pipeline, arguments = tiny("StableDiffusion3").pipeline, arguments_of("StableDiffusion3", [0])
        best = best_of_n(pipeline, "a", judge, max_denoiser_evaluations=budget, **arguments)
        zero = zero_order_search(pipeline, "a", judge, max_denoiser_evaluations=budget, **arguments)
        assert best.denoiser_evaluations == zero.denoiser_evaluations == budget // STEPS * STEPS
        grown = search_over_paths(
            pipeline, "a", judge, num_paths=1, start_step=2, renoise_steps=1, denoise_steps=2,
            max_denoiser_evaluations=budget, **arguments,
        )  # fmt: skip
        # One path of 2 steps, then two stages of 2 steps for each branch; with a single branch there is no choice to make.
        assert grown.denoiser_evaluations == {8: 4, 14: 14, 33: 30}[budget]

    def test_too_small(self):
        """A budget below one image is refused before anything is computed."""
        with pytest.raises(
            ValueError, match="`max_denoiser_evaluations` is 3, but one image takes 4. Raise it, or lower"
        ):
            best_of_n(
                tiny("StableDiffusion3").pipeline, "a", judge, max_denoiser_evaluations=3,
                **arguments_of("StableDiffusion3", [0]),
            )  # fmt: skip


class Unreadable(Exception):
    """What a verifier raises for one image."""


def failing(mode: str, numbers: set[int]):
    """A verifier that fails for some of the images that it meets, however often it is asked about them."""
    known: list[torch.Tensor] = []

    def verifier(images, prompts):
        rewards = reward(images)
        for i, image in enumerate(images):
            number = next((n for n, other in enumerate(known) if torch.equal(image, other)), None)
            if number is None:
                number = len(known)
                known.append(image)
            if number in numbers and mode == "raise":
                raise Unreadable(f"image {number}")
            if number in numbers:
                rewards[i] = float(mode)
        return rewards

    return verifier


class TestFailures:
    @pytest.mark.parametrize("mode", ["raise", "nan", "inf"])
    def test_a_failing_path_is_lost(self, mode, caplog):
        """A path whose reward cannot be had is lost with a warning, and the search goes on with the others."""
        paths.logger.parent.propagate = True
        pipeline, arguments = tiny("StableDiffusion3").pipeline, arguments_of("StableDiffusion3", [0])
        options = {"num_paths": 2, "num_branches": 2, "start_step": 2, "renoise_steps": 1, "denoise_steps": 2}
        result = search_over_paths(pipeline, "a", failing(mode, {0, 2, 3, 5}), **options, **arguments)
        stages = [[node for node in result.nodes if node.stop_step == stop] for stop in (3, 4)]
        assert [node.lost for node in stages[0]] == [True, False, True, True]
        assert [node.lost for node in stages[1]] == [False, True]  # one path was left, with two branches
        assert len(result.images) == 1
        assert not result.lineage()[-1].lost
        assert "The reward of a sample of 'a' is left out: " in caplog.text
        assert ("Unreadable" if mode == "raise" else f"is {mode} for") in caplog.text
        # After a failure each image of the batch is asked about again.
        assert result.verifier_calls == (4 + 4) + (2 + 2)

    @pytest.mark.parametrize("batch_size", [2, 8])  # the prompts are searched one by one, or together
    def test_a_prompt_without_paths(self, batch_size, caplog):
        """A prompt that loses all of its paths has no image; other prompts keep theirs."""
        paths.logger.parent.propagate = True

        def verifier(images, prompts):
            return torch.stack([torch.tensor(float("nan" if p == "a" else "1")) for p in prompts])

        name = "StableDiffusion3"
        lost, found = best_of_n(tiny(name).pipeline, PROMPTS, verifier, 2, batch_size=batch_size, **arguments_of(name))
        assert (lost.images, lost.rewards, lost.winners) == ([], [], [])
        assert lost.denoiser_evaluations == 2 * STEPS
        assert len(found.images) == 1
        assert "All paths of 'a' are lost" in caplog.text
        assert draw_tree(lost).size[1] > 0

    def test_a_verifier_that_never_works(self):
        """A reward function with a mistake in it is an error, which names what it raised."""
        pipeline, arguments = tiny("StableDiffusion3").pipeline, arguments_of("StableDiffusion3", [0])
        with pytest.raises(RuntimeError, match="failed for every path, last with TypeError.*finite number for each"):
            best_of_n(pipeline, "a", lambda images, prompts: reward(images) + "a", 2, **arguments)
        with pytest.raises(ValueError, match="for 2 images, but must return one number for each"):
            best_of_n(pipeline, "a", lambda images, prompts: [1.0], 2, **arguments)

    def test_a_pairwise_judge_that_fails_for_one(self, scorers, monkeypatch, caplog):
        """In a tournament the sample that cannot be compared is found and left out."""
        paths.logger.parent.propagate = True
        name, scorer = "StableDiffusion3", scorers["pairwise"]
        rank, first = RewardDanceScorer.rank, []

        def picky(self, images, prompt, top_k=None, **kwargs):
            first.append(images[1]) if not first else None
            if any(torch.equal(image, first[0]) for image in images):
                raise Unreadable("image 1")
            return rank(self, images, prompt, top_k, **kwargs)

        monkeypatch.setattr(RewardDanceScorer, "rank", picky)
        result = best_of_n(tiny(name).pipeline, "a circle", scorer, 4, num_images=4, **arguments_of(name, [0]))
        assert sorted(result.winners) == [0, 2, 3]
        assert [node.lost for node in result.nodes] == [False, True, False, False]
        assert "1 of 4 samples of 'a circle' are left out" in caplog.text
        assert "Unreadable" in caplog.text


class TestResult:
    def test_save(self, tmp_path):
        """Files hold the images, seeds that make them again, and an image of the tree."""
        name = "StableDiffusion3"
        result = search_over_paths(
            tiny(name).pipeline, "a", judge, num_paths=2, num_branches=2, num_images=2,
            **{**arguments_of(name, [0]), "output_type": "pil"},
        )  # fmt: skip
        files = save_search(result, tmp_path / "new")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
            "image_0.png", "image_1.png", "search.json", "tree.png",
        ]  # fmt: skip
        document = json.loads((tmp_path / "new" / "search.json").read_text())
        assert document["rewards"] == result.rewards
        assert document["denoiser_evaluations"] == result.denoiser_evaluations
        for path, lineage in zip(files, document["lineages"], strict=True):
            again = replay(tiny(name).pipeline, "a", lineage, **{**arguments_of(name, [0]), "output_type": "pil"})
            difference = np.asarray(again, dtype=int) - np.asarray(Image.open(path), dtype=int)
            assert abs(difference).max() <= 1
        tree = np.asarray(Image.open(tmp_path / "new" / "tree.png"))
        green = (tree == (0x1A, 0x7F, 0x37)).all(axis=-1)
        assert green.sum() > 3 * 4 * 72  # frames of the winner's stages

    def test_save_a_clip(self, tmp_path):
        """Clips become animations with every frame."""
        arguments = {**arguments_of("Wan", [0]), "output_type": "pil"}
        result = best_of_n(tiny("Wan").pipeline, "a", judge, 2, **arguments)
        (path,) = save_search(result, tmp_path)
        with Image.open(path) as clip:
            assert clip.n_frames == len(result.images[0]) == 5
            assert np.array_equal(np.asarray(clip.convert("RGB")), np.asarray(result.images[0][0]))

    def test_save_tensors(self, tmp_path):
        """Only PIL images are written."""
        result = best_of_n(tiny("StableDiffusion3").pipeline, "a", judge, 1, **arguments_of("StableDiffusion3", [0]))
        with pytest.raises(ValueError, match="`images` are not PIL images, but `save_search` requires"):
            save_search(result, tmp_path)

    def test_replay_with_other_steps(self):
        """A lineage does not fit another number of steps."""
        name = "StableDiffusion3"
        result = best_of_n(tiny(name).pipeline, "a", judge, 1, **arguments_of(name, [0]))
        with pytest.raises(ValueError, match="lineage ends after step 4, but the pipeline makes 5. Pass the same"):
            replay(tiny(name).pipeline, "a", result.lineage(), **arguments_of(name, [0], num_inference_steps=5))


class TestPassThrough:
    def test_callback_and_other_arguments(self):
        """Arguments of the pipeline's own call keep their meaning, callbacks and `sigmas` too."""
        name, seen = "Flux", []

        def callback(pipeline, step, timestep, kwargs):
            seen.append((step, tuple(kwargs["latents"].shape)))
            return {}

        sigmas = [1.0, 0.6, 0.2]
        arguments = arguments_of(name, [0], sigmas=sigmas, guidance_scale=1.0)
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}
        result = best_of_n(tiny(name).pipeline, "a", judge, 2, preview_step=1, **arguments, **options)
        assert [step for step, _ in seen] == [0, 0, 1]
        assert result.denoiser_evaluations == 2 * 1 + 2
        image = plain(name, [0], [result.lineage()[0].seed], sigmas=sigmas, guidance_scale=1.0)[0]
        torch.testing.assert_close(result.images[0], image, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Prompts are split over processes; each gets all results, which are those of one process, in order."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tiny_pipelines import TinyPipeline, reward\n"
        "from rewarddance_hf.alignment.search.search import best_of_n\n"
        "model = TinyPipeline('StableDiffusion3')\n"
        "inputs = {k: v.repeat(2, *[1] * (v.ndim - 1))[:3] if isinstance(v, torch.Tensor) else v for k, v in model.inputs.items()}\n"
        "def run(distribute):\n"
        "    return best_of_n(model.pipeline, ['a', 'b', 'c'], lambda i, p: reward(i), 2, num_inference_steps=2,\n"
        "                     distribute=distribute, batch_size=1, **inputs)\n"
        "split, alone = ([r.to_dict() for r in run(d)] for d in (True, False))\n"
        "from accelerate import PartialState\n"
        "state = PartialState()\n"
        "def one_too_many(images, prompts):\n"
        "    return [1.0] * (len(images) + state.process_index)\n"
        "def broken(images, prompts):\n"
        "    raise ValueError('always')\n"
        "failures = []\n"
        "for verifier in (one_too_many, broken):\n"
        "    try:\n"
        "        best_of_n(model.pipeline, ['a', 'b', 'c'], verifier, 2, num_inference_steps=2, distribute=True, **inputs)\n"
        "    except Exception as error:\n"
        "        failures.append(str(error))\n"
        f"json.dump([state.num_processes, split, alone, failures], open({str(tmp_path)!r} + f'/{{state.process_index}}.json', 'w'))\n"
    )  # fmt: skip
    for done in run_together(script, env={**os.environ, "ACCELERATE_USE_CPU": "true"}):
        assert done.returncode == 0, done.stderr[-3000:]
    for process in range(2):
        count, split, alone, failures = json.loads((tmp_path / f"{process}.json").read_text())
        assert count == 2
        assert split == alone
        assert [result["prompt"] for result in split] == ["a", "b", "c"]
        own, other = (
            "Reward 'one_too_many' returned a tensor",
            "1 of 2 processes failed, the first with RewardContractError",
        )
        assert failures[0].startswith(own if process == 1 else other)
        assert failures[1].startswith("The reward function failed for every path, last with ValueError('always')")


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (functools.partial(best_of_n), "`num_candidates` and `max_denoiser_evaluations` are None"),
            (functools.partial(best_of_n, num_candidates=0), "`num_candidates` is 0, but must be a positive integer"),
            (
                functools.partial(best_of_n, num_candidates=2, ranking_method="cup"),
                "`ranking_method` is 'cup', but must be one",
            ),
            (
                functools.partial(best_of_n, num_candidates=2, preview_step=4),
                "`preview_step` is 4, but must be less than",
            ),
            (functools.partial(best_of_n, num_candidates=2, seed=-1), "`seed` is -1, but must be 0 or more"),
            (functools.partial(zero_order_search), "`num_rounds` and `max_denoiser_evaluations` are None"),
            (
                functools.partial(zero_order_search, num_rounds=1, noise_strength=0.0),
                "`noise_strength` is 0.0, but must be above",
            ),
            (functools.partial(search_over_paths), "`num_branches` and `max_denoiser_evaluations` are None"),
            (
                functools.partial(search_over_paths, num_branches=2, start_step=5),
                "`start_step` is 5, but must be at most",
            ),
            (
                functools.partial(search_over_paths, num_branches=2, start_step=1, renoise_steps=2),
                "`renoise_steps` is 2, but must be from 0 to `start_step`, 1",
            ),
            (
                functools.partial(search_over_paths, num_branches=2, renoise_steps=1, denoise_steps=1),
                "`denoise_steps` is 1 and `renoise_steps` is 1, but paths must lose more noise than they get",
            ),
        ],
    )
    def test_arguments(self, call, message):
        """Arguments without meaning are refused before an image is made."""
        name = "StableDiffusion3"
        with pytest.raises(ValueError, match=message):
            call(tiny(name).pipeline, "a", judge, **arguments_of(name, [0]))

    def test_what_is_not_searched(self, scorers):
        """Pairwise judges for single samples, latents, empty prompts, unknown arguments and non-functions are refused."""
        name = "StableDiffusion3"
        pipeline, arguments = tiny(name).pipeline, arguments_of(name, [0])
        with pytest.raises(ValueError, match="The reward is pairwise, but this search judges one sample"):
            search_over_paths(pipeline, "a", scorers["pairwise"], num_branches=2, **arguments)
        with pytest.raises(ValueError, match="`output_type` is 'latent', but must be one of"):
            best_of_n(pipeline, "a", judge, 2, **{**arguments, "output_type": "latent"})
        with pytest.raises(ValueError, match=r"`prompt` is \[\], but must be a string or a list"):
            best_of_n(pipeline, [], judge, 2, **arguments)
        with pytest.raises(TypeError, match="`StableDiffusion3Pipeline` takes no argument `sigma`. Leave it out"):
            best_of_n(pipeline, "a", judge, 2, sigma=1.0, **arguments)
        with pytest.raises(TypeError, match=r"is a `str`, but must be callable as `reward\(images"):
            best_of_n(pipeline, "a", "judge", 2, **arguments)
        with pytest.raises(ValueError, match=r"`context\[\"conditions\"\]` has 2 entries for 1 prompts"):
            best_of_n(pipeline, "a", judge, 2, context={"conditions": [1, 2]}, **arguments)

    def test_a_refused_search_spends_nothing(self, scorers, monkeypatch):
        """No sample goes through the denoiser, and none is judged, before what cannot be searched is refused."""
        name = "StableDiffusion"
        pipeline, arguments = tiny(name).pipeline, arguments_of(name, [0])
        spent = []

        def counting(images, prompts):
            spent.append("score")
            return reward(images)

        hook = tiny(name).denoiser.register_forward_pre_hook(lambda *_: spent.append("evaluation"))
        branching = functools.partial(search_over_paths, pipeline, "a", num_branches=2)
        try:
            for scheduler in (diffusers.PNDMScheduler(), diffusers.HeunDiscreteScheduler()):
                with monkeypatch.context() as patch:
                    patch.setattr(pipeline, "scheduler", scheduler)
                    with pytest.raises(NotImplementedError, match="Set `pipeline.scheduler` to a flow-matching"):
                        branching(counting, **arguments)
                    with pytest.raises(NotImplementedError, match="Set `pipeline.scheduler` to a flow-matching"):
                        best_of_n(pipeline, "a", counting, 2, preview_step=2, **arguments)
            with pytest.raises(ValueError, match="The reward is pairwise"):
                branching(scorers["pairwise"], **arguments)
            for unfit in (lambda images: images.mean(), lambda images, prompts, weight: reward(images)):
                with pytest.raises(
                    TypeError, match=r"cannot be called as `reward\(images, .* with \['task'\] as context"
                ):
                    branching(unfit, context={"task": "text-to-image"}, **arguments)
            with pytest.raises(ValueError, match="`max_denoiser_evaluations` is 3, but one image takes 4"):
                branching(counting, max_denoiser_evaluations=3, **arguments)
            with pytest.raises(ValueError, match="`prompt_embeds` has 1 entries for 2 prompts"):
                zero_order_search(pipeline, ["a", "b"], counting, num_rounds=1, **arguments)
        finally:
            hook.remove()
        assert not spent

    def test_missing_diffusers(self, monkeypatch):
        """Without diffusers, the import names the extra that brings it."""
        monkeypatch.setattr(import_utils, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"pip install rewarddance_hf\[diffusers\]"):
            importlib.reload(output)


def test_an_embedding_that_the_reward_function_edits():
    """A search goes on with the prompt embedding that it was given."""
    model = tiny("StableDiffusion3")
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in model.inputs.items()}

    def edits(images, prompts):
        for value in given.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        return reward(images)

    count = len(given["prompt_embeds"])
    settings = {"num_candidates": 3, "num_images": 3, "batch_size": 1, "num_inference_steps": 2, "output_type": "pt"}
    ours = best_of_n(model.pipeline, ["a"] * count, edits, **settings, **given)
    theirs = best_of_n(model.pipeline, ["a"] * count, reward, **settings, **model.inputs)
    for first, second in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.images, second.images, strict=True))
