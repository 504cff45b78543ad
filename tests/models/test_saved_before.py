"""Judges that an earlier version saved load, and score as they did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceScorer


SAVED = Path(__file__).parents[1] / "fixtures" / "saved_0_1"
PROMPTS = ["a red circle", 'two "blue" squares']


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("kind", ["pairwise", "regressive", "adapter"])
def test_scores_are_those_of_the_version_that_saved_it(kind, engine, tmp_path, monkeypatch):
    """Weights, wording, layout, temperature and adapter are found where version 0.1 put them."""
    shutil.copytree(SAVED, tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")  # the adapter names its base model by a relative path
    scorer = RewardDanceScorer.from_pretrained(kind, engine=engine)
    images = [random_image(index, 40, 52) for index in range(4)]
    references = None if kind == "regressive" else images[2:]
    wanted = torch.tensor(json.loads((SAVED / "scores.json").read_text())[kind])
    torch.testing.assert_close(scorer.score(images[:2], PROMPTS, references).cpu(), wanted, rtol=1e-5, atol=0)
    assert scorer.model.config.score_temperature == 1.5
    assert scorer.processor.max_frames == 4
