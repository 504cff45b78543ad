"""Terms of public preference datasets, so that a release can refuse data that its model must not be trained on."""

from dataclasses import dataclass


# Organizations that were renamed: old name -> new name. Repositories are looked up under both.
RENAMED_OWNERS = {"THUDM": "zai-org", "KwaiVGI": "KlingTeam", "TIGER-Lab": "TIGER-AI-Lab"}


@dataclass(frozen=True)
class DatasetTerms:
    """
    Terms of use of a dataset.

    Args:
        license (`str`):
            License identifier as on the Hub, or `"unknown"`.
        commercial_training (`bool`, *optional*):
            Whether a model that is trained on it may be released for commercial use. None if that is not known.
        source (`str`):
            Where this is stated.
    """

    license: str
    commercial_training: bool | None
    source: str


_CARD = "license of the dataset card"
_NOT_KNOWN = DatasetTerms("unknown", None, "no license is recorded here: read the dataset card")
# Repository ID, under the owner's new name -> terms. A key that ends in "*" stands for all that begin with it.
_TERMS = {
    "yuvalkirstain/pickapic_v2": DatasetTerms("mit", True, "third-party audit of the dataset card"),
    "ymhao/HPDv2": DatasetTerms("apache-2.0", True, _CARD),
    "MizzenAI/HPDv3": DatasetTerms("mit", True, _CARD),
    "Junjun2333/HPDv3-PlusPlus": DatasetTerms("apache-2.0", True, _CARD),
    "data-is-better-together/open-image-preferences-v1-binarized": DatasetTerms("apache-2.0", True, _CARD),
    "Rapidata/text-2-video-human-preferences*": DatasetTerms("apache-2.0", True, _CARD),
    "KlingTeam/VideoGen-RewardBench": DatasetTerms("apache-2.0", True, _CARD),
    "TIGER-AI-Lab/GenAI-Bench": DatasetTerms("cc-by-4.0", True, _CARD),
    "rl-research/multimodal-rewardbench-2": DatasetTerms("cc-by-nc-4.0", False, f"{_CARD}: evaluation only"),
    "TIGER-AI-Lab/EditReward-Data": DatasetTerms("cc-by-nc-4.0", False, _CARD),
}


def terms_of(repo_id: str) -> DatasetTerms:
    """
    Look up the terms of a dataset.

    Args:
        repo_id (`str`):
            Repository ID on the Hub, under the old or the new name of its owner, in any case.

    Returns:
        [`DatasetTerms`]: `license="unknown"` and `commercial_training=None` for datasets that are not listed.

    Example:
    ```python
    >>> terms_of("TIGER-Lab/EditReward-Data").commercial_training
    False
    ```
    """
    owner, _, name = repo_id.partition("/")
    new_owners = {old.lower(): new for old, new in RENAMED_OWNERS.items()}
    wanted = f"{new_owners.get(owner.lower(), owner)}/{name}".lower()
    for known, terms in _TERMS.items():
        key = known.lower()
        if wanted == key or (key.endswith("*") and wanted.startswith(key[:-1])):
            return terms
    return _NOT_KNOWN
