"""Judges of generators, shared by the tests of references, searches and tuning."""

import pytest

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer


@pytest.fixture(scope="module")
def scorers(vlm_folder):
    """Real tiny judges by paradigm."""
    folder = vlm_folder("internvl")
    processor = RewardDanceProcessor.from_pretrained(folder)
    return {
        paradigm: RewardDanceScorer(RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm), processor)
        for paradigm in ("pairwise", "pointwise")
    }
