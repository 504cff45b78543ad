"""Best-of-N references: the right candidates, drawn again from their seeds, and nothing lost by an interruption."""

import io
import itertools
import json
import math
import re

import datasets
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_refl import tiny_sd, tiny_wan
from tiny_vlms import random_image

from rewarddance_hf.alignment.refl.candidates import candidate_seed
from rewarddance_hf.alignment.refl.references import best_of_n_references


PROMPTS = ["a red circle", "two blue square"]
MANY_PROMPTS = [
    f"{shape} {word}" for shape in ("circle", "square", "star", "tree") for word in ("red", "blue", "on", "under")
]
KWARGS = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 6.0}


@pytest.fixture(scope="module")
def pipeline():
    return quiet(tiny_sd())


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def references_of(pipeline, scorer, prompts=PROMPTS, **arguments):
    settings = {"num_candidates": 4, "batch_size": 3, "show_progress": False, **KWARGS}
    return best_of_n_references(pipeline, scorer, prompts, **settings | arguments)


def draw_again(pipeline, prompt, seed, **kwargs):
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **KWARGS | kwargs)[0][0]


def distance(a, b):
    """Largest difference of two images, in levels of 255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


@pytest.mark.parametrize("paradigm", ["pairwise", "pointwise"])
def test_order_is_that_of_a_round_robin(pipeline, scorers, paradigm):
    """All candidates in order: wins counted by hand, each image drawn again by a plain call with its seed."""
    scorer = scorers[paradigm]
    rows = references_of(pipeline, scorer, top_k=4)
    assert rows["prompt"] == PROMPTS
    assert len(set(rows["seeds"][0] + rows["seeds"][1])) == 8
    for row in rows:
        for image, seed in zip(row["references"], row["seeds"], strict=True):
            assert distance(image, draw_again(pipeline, row["prompt"], seed)) <= 1
        wins = [0.0] * 4
        for i, j in itertools.combinations(range(4), 2):
            winner = scorer.compare(row["references"][i], row["references"][j], row["prompt"]).winner
            wins[i] += {"a": 1, "tie": 0.5, "b": 0}[winner]
            wins[j] += {"a": 0, "tie": 0.5, "b": 1}[winner]
        assert row["wins"] == wins == sorted(wins, reverse=True)
        if paradigm == "pointwise":
            assert row["scores"] == pytest.approx(scorer.score(row["references"], row["prompt"]).tolist(), rel=1e-4)


def test_top_bottom_and_random(pipeline, scorers):
    """Both ends of one order; random ones are the first candidates, and no judge is asked."""
    scorer = scorers["pairwise"]
    everything = references_of(pipeline, scorer, top_k=4)
    top, bottom = (references_of(pipeline, scorer, top_k=2, method=method) for method in ("top", "bottom"))
    assert top["seeds"] == [seeds[:2] for seeds in everything["seeds"]]
    assert bottom["seeds"] == [seeds[:1:-1] for seeds in everything["seeds"]]
    calls = []
    handle = pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    chance = references_of(pipeline, None, top_k=2, method="random")
    handle.remove()
    assert sum(calls) == 2 * len(PROMPTS)
    assert chance["wins"] == [None, None]
    assert {*chance["seeds"][0]} < {*everything["seeds"][0]}


def test_candidates_depend_on_their_prompt_only(pipeline, scorers):
    """Another list, another batch size: the same references. Another seed: others."""
    both = references_of(pipeline, scorers["pairwise"])
    one = references_of(pipeline, scorers["pairwise"], prompts=PROMPTS[1:], batch_size=1)
    assert one["seeds"][0] == both["seeds"][1]
    assert distance(one["references"][0][0], both["references"][1][0]) <= 1
    assert references_of(pipeline, scorers["pairwise"], seed=1)["seeds"] != both["seeds"]


@pytest.mark.parametrize("method", ["top", "random"])
def test_prompts_share_batches(pipeline, scorers, method, caplog, tmp_path):
    """A batch takes the candidates of several prompts, after a trial; they are what each prompt gives alone, and broken ones are made up for."""
    prompts, sizes, broken = MANY_PROMPTS, [], []

    def hook(_, inputs, output):
        sizes.append(len(output))
        if len(output) > 2:
            output[broken] = torch.nan
        return output

    settings = {"top_k": 2, "method": method, "prompts": prompts}
    trial, batches = [1, 1, 1, 2], [8] * 8 if method == "top" else [8] * 4
    handle = pipeline.vae.decoder.register_forward_hook(hook)
    try:
        alone = references_of(pipeline, scorers["pairwise"], batch_size=1, **settings)
        assert sizes == [1] * (64 if method == "top" else 32)
        sizes.clear()
        together = references_of(pipeline, scorers["pairwise"], batch_size=9, output_dir=tmp_path, **settings)
        assert sizes == trial + batches
        assert together["seeds"] == alone["seeds"]
        for ours, theirs in zip(together, alone, strict=True):
            for image, other in zip(ours["references"], theirs["references"], strict=True):
                assert distance(image, other) <= 1
        broken.append(2)
        sizes.clear()
        got = references_of(pipeline, scorers["pairwise"], batch_size=9, **settings)
    finally:
        handle.remove()
    if method == "random":  # two are drawn of each prompt: the third of a batch is the first of its second prompt
        assert "Candidate 0 of `prompts[1]" in caplog.text
        assert sizes == trial + [8, 1] * 4
        assert got["seeds"][1] == [candidate_seed(0, prompts[1], candidate) for candidate in (1, 2)]
    else:
        assert "Candidate 2 of `prompts[0]" in caplog.text
        assert candidate_seed(0, prompts[0], 2) not in got["seeds"][0]
        assert got["seeds"][1] == alone["seeds"][1]


def test_prompts_that_do_not_go_together(pipeline, scorers):
    """A pipeline that mixes up the prompts of a batch without a word, or takes one at a time, draws each prompt's candidates alone."""
    prompts = MANY_PROMPTS
    settings = {"top_k": 1, "num_candidates": 1, "method": "random", "prompts": prompts, "batch_size": 8}
    wanted = references_of(pipeline, None, **{**settings, "batch_size": 1})

    class Mixing(type(pipeline)):
        def encode_prompt(self, prompt, *arguments, **kwargs):
            first = [prompt[0]] * len(prompt) if isinstance(prompt, list) else prompt
            return super().encode_prompt(first, *arguments, **kwargs)

    class Single(type(pipeline)):
        def __call__(self, prompt, **kwargs):
            if not isinstance(prompt, str):
                raise ValueError("Passing a list of prompts is not supported.")
            return super().__call__(prompt, **kwargs)

    for kind in (Mixing, Single):
        got = references_of(quiet(kind(**pipeline.components, requires_safety_checker=False)), None, **settings)
        assert got["seeds"] == wanted["seeds"]
        for ours, theirs in zip(got["references"], wanted["references"], strict=True):
            assert distance(ours[0], theirs[0]) <= 1


def test_tournament_and_reward_function(pipeline, scorers):
    """Swiss rounds ask less; any function orders by its rewards, and is told what it can take."""
    swiss = references_of(
        pipeline, scorers["pairwise"], num_candidates=6, top_k=6, ranking_method="swiss", num_rounds=1
    )
    assert swiss["wins"] == [[1.0] * 3 + [0.0] * 3] * 2

    def redness(images, prompts, criteria=None):
        assert prompts == ["a"] * 4
        assert criteria == ["as red as can be"] * 4
        return torch.tensor([float(np.asarray(image)[..., 0].mean()) for image in images])

    prompts = datasets.Dataset.from_dict(
        {"prompt": ["a"], "criteria": ["as red as can be"], "task": ["text-to-image"]}
    )
    rows = references_of(pipeline, redness, prompts, top_k=4)
    red = [float(np.asarray(image)[..., 0].mean()) for image in rows[0]["references"]]
    assert rows[0]["scores"] == pytest.approx(red)
    assert red == sorted(red, reverse=True)
    assert rows[0]["wins"] == [3.0, 2.0, 1.0, 0.0]


def test_pairwise_reward_function(pipeline):
    """A pairwise reward that is no judge plays the tournament too: against each other candidate, in both orders."""

    class Redder:
        is_pairwise = True

        def __call__(self, images, prompts, references):
            red = [[float(np.asarray(image)[..., 0].mean()) for image in samples] for samples in (images, references)]
            return torch.tensor([a - b for a, b in zip(*red, strict=True)]).sigmoid()

    (row,) = references_of(pipeline, Redder(), PROMPTS[:1], top_k=4)
    red = [float(np.asarray(image)[..., 0].mean()) for image in row["references"]]
    assert red == sorted(red, reverse=True)
    assert row["wins"] == [3.0, 2.0, 1.0, 0.0]


def test_columns_are_used_and_kept(pipeline, scorers):
    """First frames reach the pipeline, criteria the judge; other columns stay as they are."""
    image_to_image = quiet(
        diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    )
    frames = [random_image(i, 16, 16) for i in range(2)]
    rows = {"prompt": PROMPTS, "condition": frames, "criteria": ["color", None], "id": [7, 8]}
    features = {
        "prompt": datasets.Value("string"),
        "condition": datasets.Image(),
        "criteria": datasets.Value("string"),
    }
    prompts = datasets.Dataset.from_dict(rows, datasets.Features(features | {"id": datasets.Value("int32")}))
    kwargs = {"num_inference_steps": 3, "strength": 0.5}
    scorer = scorers["pairwise"]
    got = best_of_n_references(image_to_image, scorer, prompts, 3, top_k=3, show_progress=False, **kwargs)
    assert got.column_names == [*rows, "references", "wins", "scores", "seeds"]
    assert got["id"] == [7, 8]
    assert got.features["id"] == datasets.Value("int32")
    for row, frame in zip(got, frames, strict=True):
        assert distance(row["condition"], frame) == 0
        generator = torch.Generator().manual_seed(row["seeds"][0])
        again = image_to_image(row["prompt"], image=frame, generator=generator, **kwargs)[0][0]
        assert distance(row["references"][0], again) <= 1
        context = {"condition": frame, "criteria": row["criteria"]}
        ranking = scorer.rank(row["references"], row["prompt"], **context)
        assert ranking.order == [0, 1, 2]
        assert row["scores"] == pytest.approx(ranking.scores.tolist(), rel=1e-4)
        without = scorer.rank(row["references"], row["prompt"]).scores.tolist()
        assert without != pytest.approx(row["scores"], rel=1e-4)


def test_clips(scorers):
    """References of a video pipeline are lists of frames, judged as text-to-video."""
    pipeline = quiet(tiny_wan())
    kwargs = {"num_inference_steps": 2, "height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 6}
    rows = best_of_n_references(
        pipeline, scorers["pairwise"], PROMPTS[:1], 2, top_k=2, batch_size=2, show_progress=False, **kwargs
    )
    assert rows.features["references"] == datasets.List(datasets.List(datasets.Image()))
    first, second = rows[0]["references"]
    assert len(first) == len(second) == 5
    again = pipeline(
        PROMPTS[0], generator=torch.Generator().manual_seed(rows[0]["seeds"][0]), output_type="pil", **kwargs
    )
    assert max(distance(a, b) for a, b in zip(first, again.frames[0], strict=True)) <= 1
    ranking = scorers["pairwise"].rank([first, second], PROMPTS[0], task="text-to-video")
    assert ranking.order == [0, 1]


def test_images_travel(pipeline, scorers, tmp_path):
    """Saved, reloaded and exported, images are bytes and no paths."""
    rows = references_of(pipeline, scorers["pairwise"], output_dir=tmp_path / "run")
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "rows.parquet")
    for file in (tmp_path / "run").rglob("*.arrow"):
        file.unlink()
    for copy in (
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache")),
    ):
        encoded = copy.cast_column("references", datasets.List(datasets.Image(decode=False)))[1]["references"]
        assert all(entry["path"] is None for entry in encoded)
        for entry, seed in zip(encoded, copy[1]["seeds"], strict=True):
            assert distance(Image.open(io.BytesIO(entry["bytes"])), draw_again(pipeline, PROMPTS[1], seed)) <= 1


def test_interrupted_run_goes_on(pipeline, scorers, tmp_path):
    """A repeated call draws what is missing and gives what an uninterrupted one gives; prompts may be added."""
    prompts = [*PROMPTS, "a"]
    whole = references_of(pipeline, scorers["pairwise"], prompts)
    drawn = []

    def stop(_, inputs):
        drawn.append(len(inputs[0]))
        if len(drawn) == 4:  # within the second prompt
            raise KeyboardInterrupt("second prompt")

    handle = pipeline.vae.decoder.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt, match="second prompt"):
        references_of(pipeline, scorers["pairwise"], prompts[:2], output_dir=tmp_path)
    (tmp_path / "rows" / "00000001-0.part").write_bytes(b"cut off")
    assert drawn == [3, 1, 3, 1]
    first = references_of(pipeline, scorers["pairwise"], prompts[:2], output_dir=tmp_path)
    assert drawn[4:] == [3, 1]
    rows = references_of(pipeline, scorers["pairwise"], prompts, output_dir=tmp_path)
    assert drawn[6:] == [3, 1]
    again = references_of(pipeline, scorers["pairwise"], prompts, output_dir=tmp_path)
    assert len(drawn) == 8
    handle.remove()
    for got in (rows, again):
        for column in ("prompt", "wins", "seeds"):
            assert got[column] == whole[column]
        for i in range(3):
            for a, b in zip(got[i]["references"], whole[i]["references"], strict=True):
                assert distance(a, b) == 0
    assert distance(first[1]["references"][0], whole[1]["references"][0]) == 0  # not torn away by the later calls


def test_how_long_it_takes_is_said(pipeline, scorers, tmp_path, capsys):
    """After the first prompt, with what is kept where; bars of the pipeline's single calls are left out for the time."""
    pipeline.set_progress_bar_config(disable=False, leave=True)
    references_of(pipeline, scorers["pointwise"], ["a", *PROMPTS], output_dir=tmp_path, show_progress=True)
    output = "".join(capsys.readouterr())
    said = r"References of 3 of 3 prompts, 4 candidates each, on 1 process: [0-9.]+ s a prompt at first, about 0:00:\d\d in all"
    assert re.search(said, output)
    assert f"Each is kept in {tmp_path} when it is done." in output
    assert "3/3" in output
    assert "it/s" not in output
    assert pipeline._progress_bar_config == {"disable": False, "leave": True}
    pipeline.set_progress_bar_config(disable=True)


def test_folder_of_another_run_is_refused(pipeline, scorers, vlm_folder, tmp_path):
    """References of two generators, judges, settings or prompt lists are never mixed."""
    references_of(pipeline, scorers["pairwise"], output_dir=tmp_path)

    def again(*arguments, **kwargs):
        references_of(*arguments or (pipeline, scorers["pairwise"]), output_dir=tmp_path, **kwargs)

    for kwargs, match in [
        ({"seed": 1}, r"\['seed'\] were others"),
        ({"top_k": 1, "num_candidates": 5}, r"\['num_candidates', 'top_k'\] were others"),
        ({"guidance_scale": 2.0}, r"\['guidance_scale'\] were others"),
        ({"prompts": PROMPTS[::-1]}, r"result of another row in the place of row 0"),
        ({"prompts": PROMPTS[:1]}, r"results of the rows \[1\], but there are 1 rows"),
    ]:
        with pytest.raises(ValueError, match=match):
            again(**kwargs)
    with pytest.raises(ValueError, match=r"\['reward'\] were others"):
        again(pipeline, scorers["pointwise"])
    parameter = next(pipeline.unet.parameters())
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(ValueError, match=r"\['pipeline'\] were others"):
        again()
    with torch.no_grad():
        parameter.sub_(1)
    (judge,) = json.loads((tmp_path / "arguments.json").read_text())["reward"].values()
    assert "weights" in judge


def test_broken_image_loses_its_candidate(pipeline, scorers, caplog):
    """A candidate with NaN pixels is left out with a warning; too few left is an error that names the prompt."""
    whole = references_of(pipeline, scorers["pairwise"], PROMPTS[:1], top_k=4)[0]
    broken = []

    def hook(_, inputs, output):
        output[broken] = torch.nan
        return output

    handle = pipeline.vae.decoder.register_forward_hook(hook)
    try:
        broken[:] = [1]
        got = references_of(pipeline, scorers["pairwise"], PROMPTS[:1], top_k=3, batch_size=4)[0]
        assert "Candidate 1 of `prompts[0] ('a red circle')` is left out: it has pixels that are NaN" in caplog.text
        assert {*got["seeds"]} < {*whole["seeds"]}
        assert sum(got["wins"]) == 3
        broken[:] = [0, 1, 2]
        with pytest.raises(
            ValueError, match=r"Only 1 of 4 candidates of `prompts\[0\] \('a red circle'\)` are left, but"
        ):
            references_of(pipeline, scorers["pairwise"], PROMPTS[:1], top_k=2, batch_size=4)
    finally:
        handle.remove()


@pytest.mark.parametrize("paradigm", ["pairwise", "pointwise", "function"])
def test_score_that_is_not_finite_loses_its_candidate(pipeline, scorers, caplog, paradigm):
    """An image that the judge sees as NaN is left out with a warning, and the others are ranked."""
    scorer = scorers.get(paradigm)
    rows = references_of(pipeline, scorer or scorers["pairwise"], PROMPTS[:1], top_k=4)[0]
    brightness = sorted((float(np.asarray(image).mean()), i) for i, image in enumerate(rows["references"]))
    brightest = rows["seeds"][brightness[-1][1]]

    if scorer is None:

        def scorer(images, prompts):
            values = torch.tensor([float(np.asarray(image).mean()) for image in images])
            return values.masked_fill(values == brightness[-1][0], torch.nan)

        got = references_of(pipeline, scorer, PROMPTS[:1], top_k=3)[0]
    else:
        seen, threshold = [], math.inf

        def blind(_, arguments, keywords, output):
            means = {**dict(zip(["pixel_values"], arguments, strict=False)), **keywords}["pixel_values"].mean(
                dim=(1, 2, 3)
            )
            seen.extend(means.tolist())
            output.last_hidden_state[means > threshold] = torch.nan

        handle = scorer.model.vlm.model.vision_tower.register_forward_hook(blind, with_kwargs=True)
        scorer.rank(rows["references"], PROMPTS[0])
        threshold = sum(sorted(set(seen))[-2:]) / 2
        try:
            got = references_of(pipeline, scorer, PROMPTS[:1], top_k=3)[0]
        finally:
            handle.remove()
    assert caplog.text.count("is left out: its score is NaN or infinite") == 1
    assert {*got["seeds"]} == {*rows["seeds"]} - {brightest}
    assert sum(got["wins"]) == 3


def test_wrong_arguments(pipeline, scorers):
    """What makes no sense is refused before anything is drawn."""
    scorer = scorers["pairwise"]
    captions = datasets.Dataset.from_dict({"caption": PROMPTS})
    for prompts, kwargs, match in [
        ([], {}, "`prompts` is empty"),
        (captions, {}, r"`prompts` has the columns \['caption'\], but needs `prompt`"),
        (captions.rename_column("caption", "prompt").add_column("wins", [1, 2]), {}, r"columns \['wins'\], but these"),
        (PROMPTS, {"num_candidates": 0}, "`num_candidates` is 0"),
        (PROMPTS, {"top_k": 5}, "`top_k` is 5, but only 4 candidates"),
        (PROMPTS, {"method": "best"}, "`method` is 'best'"),
        (PROMPTS, {"ranking_method": "duel"}, "`ranking_method` is 'duel'"),
        (PROMPTS, {"num_rounds": 2}, "`num_rounds` is 2, but belongs to tournaments"),
        (PROMPTS, {"output_type": "np", "latents": None}, r"\['latents', 'output_type'\] were given"),
    ]:
        with pytest.raises(ValueError, match=match):
            references_of(pipeline, scorer, prompts, **kwargs)
    with pytest.raises(TypeError, match="`prompts` is of type `str`"):
        references_of(pipeline, scorer, "a red circle")
    with pytest.raises(TypeError, match=r"`prompts\[1\]` is of type `int`"):
        references_of(pipeline, scorer, ["a", 1])
    with pytest.raises(TypeError, match="`reward` is of type `NoneType`, but `method='top'` needs a judge"):
        references_of(pipeline, None)
    with pytest.raises(ValueError, match=r"shape \(4, 1\) for 4 images"):
        references_of(pipeline, lambda images, prompts: torch.zeros(len(images), 1))
