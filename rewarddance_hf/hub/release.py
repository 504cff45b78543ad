"""Releases: build a folder, verify it without this package, push it so that nothing public is ever half updated."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from ..models import RewardDanceForYesScoring, RewardDanceProcessor, pipeline_rewarddance
from ..scoring.loading import load_judge
from ..scoring.scorer import RewardDanceScorer
from ..trainer.model_card import FACTS_KEY
from .cards import ModelFacts, model_card, release_marker
from .licenses import TrainingData, check_training_data, model_license
from .measurements import read_measurements
from .remote_code import save_with_code
from .verification import read_kind, verify_release, write_sheet


REPO_TYPES = {
    "model": "model",
    "adapter": "model",
    "pipeline": "model",
    "dataset": "dataset",
    "metric": "space",
    "space": "space",
}
# What a new repository holds before anybody has put anything into it.
INITIAL_FILES = {".gitattributes", "README.md"}
NOT_TRAINED = "none"


@dataclass(frozen=True)
class ReleasePlan:
    """What a push does to a repository; the lists hold paths."""

    repo_id: str
    kind: str
    tag: str
    added: list[str]
    changed: list[str]
    deleted: list[str]
    unchanged: list[str]
    num_bytes: int
    head: str | None = None
    is_released: bool = False
    is_first: bool = True

    def __str__(self) -> str:
        repository = f"{REPO_TYPES[self.kind]} repository {self.repo_id}"
        if self.is_released:
            return f"{repository} has this release already, as {self.tag}: nothing to do"
        lines = [f"{repository}, {'new' if self.head is None else 'at ' + self.head[:8]}, to be tagged {self.tag}"]
        for name, sign in (("added", "+"), ("changed", "~"), ("deleted", "-")):
            lines += [f"  {sign} {path}" for path in getattr(self, name)]
        lines.append(f"  {len(self.unchanged)} files stay, {self.num_bytes / 1e6:.1f} MB to upload")
        return "\n".join(lines)


def build_model_release(
    model: str | Path,
    folder: str | Path,
    repo_id: str,
    tag: str,
    training_data: Sequence[TrainingData],
    results: Sequence[str | Path] = (),
    license: str = "apache-2.0",
    base_model: str | None = None,
    limits: Sequence[str] = (),
    media: str = "images",
    allow_non_commercial: bool = False,
) -> Path:
    """
    Build the folder of a judge: weights, processor, code, card, results, and a sheet of images with their scores. It is
    verified in a process without this package before it takes the place of an older one.

    Args:
        model (`str` or `Path`):
            Trained judge: checkpoint, or adapter, which is merged.
        folder (`str` or `Path`):
            Folder to be made. An older release in it is replaced.
        repo_id (`str`):
            Repository that it will be in, for the card.
        tag (`str`):
            Tag of the release, for the card.
        training_data (`list[TrainingData]`):
            All data that the judge was trained on, or only one named `"none"` for an untrained one.
        results (`list` of `str` or `Path`, *optional*):
            Files of `rewarddance evaluate --output`.
        license (`str`, *optional*, defaults to `"apache-2.0"`):
            License of the judge. Replaced by that of the training data if that forbids commercial use.
        base_model (`str`, *optional*):
            Base model. Defaults to the one that the trainer recorded.
        limits (`list[str]`, *optional*):
            Limits to name in the card.
        media (`str`, *optional*, defaults to `"images"`):
            What is judged, for the card.
        allow_non_commercial (`bool`, *optional*, defaults to `False`):
            Whether training data may forbid commercial use.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: If training data is not declared or not allowed, a result is incomplete or of another judge, the folder
            holds something else, or the built folder gives other scores than the judge.
    """
    folder = Path(folder)
    _check_replaceable(folder)
    draft = _read_draft(Path(model))
    training = draft.get(FACTS_KEY)
    non_commercial = check_training_data(
        training_data, (training or {}).get("data", ()), allow_non_commercial=allow_non_commercial
    )
    measurements = read_measurements(results)
    judge, processor = load_judge(model)
    fingerprint = RewardDanceScorer(judge, processor).fingerprint()
    for measurement in measurements:
        measurement.check_judge(fingerprint)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_with_code(judge, processor, partial)
        add_pipeline(partial)
        saved = RewardDanceForYesScoring.from_pretrained(partial)
        write_sheet(saved, RewardDanceProcessor.from_pretrained(partial), partial)
        for file in results:
            (partial / "results").mkdir(exist_ok=True)
            shutil.copy(file, partial / "results" / Path(file).name)
        facts = ModelFacts(
            repo_id=repo_id,
            revision=tag,
            config=saved.config,
            num_parameters=saved.num_parameters(),
            dtype=str(saved.dtype).removeprefix("torch."),
            license=model_license(license, non_commercial),
            base_model=base_model or draft.get("base_model"),
            training_data=[data for data in training_data if data.name != NOT_TRAINED],
            non_commercial=[data.name for data in non_commercial],
            measurements=measurements,
            training=training,
            limits=limits,
            media=media,
        )
        (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
        verify_release(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def add_pipeline(folder: Path) -> None:
    """Let `transformers.pipeline` find the pipeline in the folder of a saved judge, without this package."""
    source = Path(pipeline_rewarddance.__file__)
    shutil.copy(source, folder / source.name)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["custom_pipelines"] = {
        pipeline_rewarddance.TASK: {
            "impl": f"{source.stem}.{pipeline_rewarddance.VisualPreferencePipeline.__name__}",
            "pt": ["AutoModel"],
            "type": "multimodal",
        }
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def plan_push(folder: str | Path, repo_id: str, tag: str, api: HfApi | None = None) -> ReleasePlan:
    """
    Find out what a push would change, by comparing hashes.

    Raises a `ValueError` if the folder is no release, the repository holds something that this package did not release, or
    the tag belongs to other files.
    """
    api, folder = api or HfApi(), Path(folder)
    kind = read_kind(folder)
    local = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    plan = ReleasePlan(repo_id, kind, tag, local, [], [], [], _size(folder, local))
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": REPO_TYPES[kind]}
    try:
        head = api.repo_info(**where, revision="main").sha or "main"
    except RepositoryNotFoundError:
        return plan
    tags = {ref.name for ref in api.list_repo_refs(**where).tags}
    if tag in tags:
        if _differences(api, folder, where, tag) == ([], [], []):
            return replace(plan, added=[], unchanged=local, num_bytes=0, head=head, is_released=True, is_first=False)
        raise ValueError(
            f"Tag {tag!r} of {repo_id!r} exists and holds other files, but a release never changes. Choose another tag."
        )
    _check_is_ours(api, where, head)
    added, changed, deleted = _differences(api, folder, where, head)
    return replace(
        plan,
        added=added,
        changed=changed,
        deleted=deleted,
        unchanged=[path for path in local if path not in {*added, *changed}],
        num_bytes=_size(folder, added + changed),
        head=head,
        is_first=not tags,
    )


def push_release(
    folder: str | Path, repo_id: str, tag: str, private: bool = False, api: HfApi | None = None
) -> ReleasePlan:
    """
    Push a release folder and tag it.

    All files go in one commit, so that an upload that breaks leaves the repository as it was, and can be repeated; what
    has arrived is not sent again. The hashes of the repository are compared with the folder before it is tagged. A new
    repository is private until then.

    Args:
        folder (`str` or `Path`):
            Release folder. It is not verified again: see [`~rewarddance_hf.hub.verification.verify_release`].
        repo_id (`str`):
            Repository on the Hub, created if it does not exist.
        tag (`str`):
            Tag of the release.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository stays private. Others stay what they are.
        api (`HfApi`, *optional*):
            Client of the Hub.

    Returns:
        [`ReleasePlan`]: What was done.

    Raises:
        `ValueError`: As in [`plan_push`], or if the hashes differ after the upload.
        `OSError`: If the Hub cannot be reached or refuses.
    """
    api, folder = api or HfApi(), Path(folder)
    plan = plan_push(folder, repo_id, tag, api)
    if plan.is_released:
        return plan
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": REPO_TYPES[plan.kind]}
    if plan.head is None:
        api.create_repo(**where, private=True, space_sdk="gradio" if where["repo_type"] == "space" else None)
        plan = plan_push(folder, repo_id, tag, api)
    head = plan.head or "main"
    operations: list[Any] = [
        CommitOperationAdd(path, str(folder / path)) for path in sorted({*plan.added, *plan.changed})
    ]
    operations += [CommitOperationDelete(path) for path in plan.deleted]
    if operations:
        # `parent_commit`: if somebody else pushes meanwhile, this fails rather than mixing both.
        head = api.create_commit(
            **where, operations=operations, commit_message=f"Release {tag}", parent_commit=head
        ).oid
    wrong = sorted(path for paths in _differences(api, folder, where, head) for path in paths)
    if wrong:
        raise ValueError(
            f"{repo_id!r} holds other bytes than {str(folder)!r} after the upload, in {wrong[:5]}. It was not tagged. Repeat the "
            "release."
        )
    if plan.is_first and not private:
        api.update_repo_settings(**where, private=False)
    api.create_tag(**where, tag=tag, revision=head)
    return plan


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        try:
            read_kind(folder)
        except ValueError as error:
            raise ValueError(
                f"{str(folder)!r} holds something that is no release, but would be replaced. Choose another folder, or empty it."
            ) from error


def _read_draft(model: Path) -> dict[str, Any]:
    """Metadata of the card that the trainer wrote."""
    card = model / "README.md"
    if not card.is_file():
        return {}
    return ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()


def _check_is_ours(api: HfApi, where: dict[str, Any], head: str) -> None:
    files = set(api.list_repo_files(**where, revision=head))
    if files <= INITIAL_FILES and len(api.list_repo_commits(**where)) <= 1:
        return  # made and left empty, as by an upload that broke
    try:
        card = Path(api.hf_hub_download(**where, filename="README.md", revision=head)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        card = ""
    if release_marker(card) is None:
        raise ValueError(
            f"{where['repo_id']!r} holds {len(files)} files that were not released by this tool (its card has no marker), and is "
            "not overwritten. Choose another repository."
        )


def _differences(
    api: HfApi, folder: Path, where: dict[str, Any], revision: str
) -> tuple[list[str], list[str], list[str]]:
    """Paths that a revision lacks, has with other bytes, and has too many."""
    compared = api.verify_repo_checksums(**where, revision=revision, local_dir=folder)
    deleted = [path for path in compared.missing_paths if path != ".gitattributes"]
    return list(compared.extra_paths), [mismatch["path"] for mismatch in compared.mismatches], deleted


def _size(folder: Path, paths: list[str]) -> int:
    return sum((folder / path).stat().st_size for path in paths)
