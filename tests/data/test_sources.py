"""Adapters of public datasets, on small copies of their exact layouts behind a loopback Hub and in local folders."""

import gzip
import json
import math
from importlib.util import find_spec
from pathlib import Path

import dataset_layouts as layouts
import datasets
import pyarrow.parquet
import pytest
from hub_server import LoopbackHub
from new_process import run_python

from rewarddance_hf import load_preferences
from rewarddance_hf.data.preference import check_row
from rewarddance_hf.data.rows import PreferenceRows
from rewarddance_hf.data.sources import SOURCES, terms_of
from rewarddance_hf.data.sources.media import MediaFiles
from rewarddance_hf.data.sources.repository import DatasetRepository
from rewarddance_hf.data.sources.rows import check_schema, make_row, share_of_votes, vote_margin


HAS_AV = find_spec("av") is not None
LOG3 = round(math.log(3), 3)  # margin of 3 votes to 1
MOST = round(math.log(99), 3)  # margin of a unanimous vote

# Repository on the Hub -> its files. Some are under the old, some under the new name of their owner.
REPOSITORIES = {
    "yuvalkirstain/pickapic_v2": layouts.pickapic,
    "ymhao/HPDv2": layouts.hpdv2,
    "MizzenAI/HPDv3": layouts.hpdv3,
    "Junjun2333/HPDv3-PlusPlus": layouts.hpdv3_plus_plus,
    "THUDM/ImageRewardDB": layouts.imagereward_db,
    "data-is-better-together/open-image-preferences-v1-binarized": layouts.open_image_preferences,
    "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3": layouts.rapidata_700k,
    "Rapidata/open-image-preferences-v1-more-results": layouts.rapidata_pairs,
    "TIGER-AI-Lab/GenAI-Bench": lambda: layouts.genai_bench(with_videos=HAS_AV),
    "rl-research/multimodal-rewardbench-2": layouts.mmrb2,
    "TIGER-Lab/EditReward-Bench": layouts.editreward_bench,
    "TIGER-Lab/EditReward-Data": layouts.editreward_data,
}
VIDEO_REPOSITORIES = {
    "Rapidata/text-2-video-human-preferences": layouts.rapidata_videos,
    "Rapidata/image-2-video-human-preferences-seedance-1-pro": lambda: layouts.rapidata_videos(from_images=True),
    "KwaiVGI/VideoGen-RewardBench": layouts.videogen_rewardbench,
    "chungimungi/VideoDPO-10k": layouts.videodpo,
}

# Function, its arguments -> license, and of each row: chosen, rejected, tie, margin, condition, category.
CASES = [
    ("pickapic", {"split": "test"}, "mit", [
        (0, 1, False, None, None, None), (3, 2, False, None, None, None), (4, 5, True, None, None, None)]),
    ("hpdv2", {}, "apache-2.0", [
        (1, 0, False, LOG3, None, None), (0, 2, False, LOG3, None, None), (1, 2, False, MOST, None, None)]),
    ("hpdv2", {"split": "train"}, "apache-2.0", [
        (11, 10, False, None, None, None), (11, 10, False, None, None, None), (11, 12, False, None, None, None),
        (11, 12, True, None, None, None)]),
    ("hpdv3", {}, "mit", [
        (0, 1, False, LOG3, None, None), (2, 3, False, None, None, None), (1, 3, False, MOST, None, None)]),
    ("hpdv3", {"split": "test", "min_confidence": 0.95}, "mit", [(1, 3, False, MOST, None, None)]),
    ("hpdv3pp", {"split": "test_tf"}, "apache-2.0", [(0, 1, False, None, None, None)]),
    ("imagereward", {}, "unknown", [
        (0, 1, False, None, None, "People"), (0, 2, False, None, None, "People"), (1, 2, True, None, None, "People"),
        (11, 10, False, None, None, "Animals")]),
    ("open-image-preferences", {}, "apache-2.0", [(1, 0, False, None, None, "Anime")]),
    ("rapidata-images",
        {"repo_id": "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3", "split": "train_0001"}, "unknown", [
        (0, 1, False, round(math.log(20 / 6), 3), None, None), (3, 2, False, MOST, None, None),
        (4, 5, True, 0.0, None, None)]),
    ("rapidata-images", {}, "unknown", [(1, 0, False, LOG3, None, None)]),
    ("rapidata-images", {"dimension": "coherence"}, "unknown", [(0, 1, True, 0.0, None, None)]),
    ("genai-bench", {}, "cc-by-4.0", [
        (0, 1, False, None, None, None), (3, 2, False, None, None, None), (4, 5, True, None, None, None),
        (6, 7, True, None, None, None)]),
    ("genai-bench", {"config": "image_edition", "split": "test", "both_bad": "drop"}, "cc-by-4.0", [
        (0, 1, False, None, 100, None), (3, 2, False, None, 101, None), (4, 5, True, None, 102, None)]),
    ("mmrb2", {}, "cc-by-nc-4.0", [(0, 1, False, None, None, "OneIG"), (3, 2, False, None, None, "EvalMuse")]),
    ("mmrb2", {"config": "edit"}, "cc-by-nc-4.0", [
        (1, 0, False, None, 100, "OneIG"), (2, 3, False, None, 101, "EvalMuse")]),
    ("editreward", {}, "cc-by-nc-4.0", [
        (0, 1, False, None, 100, None), (3, 2, False, None, 101, None), (4, 5, True, None, 102, None)]),
    ("editreward", {"dimension": "instruction_following"}, "cc-by-nc-4.0", [
        (0, 1, False, None, 100, None), (2, 3, True, None, 101, None), (5, 4, False, None, 102, None)]),
    ("editreward-bench", {}, "apache-2.0", [
        (1, 0, False, None, 100, "2pair"), (2, 3, True, None, 100, "2pair"), (11, 10, False, None, 100, "2pair"),
        (5, 4, False, None, 100, "3pair"),
        (7, 6, False, None, 100, "4pair"), (6, 8, True, None, 100, "4pair"), (6, 9, False, None, 100, "4pair"),
        (7, 8, False, None, 100, "4pair"), (7, 9, False, None, 100, "4pair"), (8, 9, False, None, 100, "4pair")]),
    ("editreward-bench", {"subset": "3pair"}, "apache-2.0", [(5, 4, False, None, 100, "3pair")]),
]  # fmt: skip
VIDEO_CASES = [
    ("genai-bench", {"config": "video_generation"}, "cc-by-4.0", [
        (0, 1, False, None, None, None), (3, 2, False, None, None, None), (4, 5, True, None, None, None),
        (6, 7, True, None, None, None)]),
    ("rapidata-videos", {}, "apache-2.0", [(1, 0, False, LOG3, None, None)]),
    ("rapidata-videos",
        {"repo_id": "Rapidata/image-2-video-human-preferences-seedance-1-pro", "dimension": "coherence"}, "unknown", [
        (0, 1, False, round(math.log(9), 3), 100, None)]),
    ("videogen-rewardbench", {}, "apache-2.0", [
        (0, 1, False, None, None, None), (3, 2, False, None, None, None), (1, 3, True, None, None, None)]),
    ("videogen-rewardbench", {"dimension": "VQ"}, "apache-2.0", [
        (0, 1, False, None, None, None), (3, 2, False, None, None, None), (1, 3, True, None, None, None)]),
    ("videodpo", {}, "unknown", [(4, 5, False, None, None, None), (6, 5, False, None, None, None)]),
]  # fmt: skip

# What a client does with all cases: it loads each, streaming and not, and tells what it found.
CLIENT = """
import json, sys
from dataset_layouts import number_of
from rewarddance_hf import load_preferences
from rewarddance_hf.data.rows import keep_images_encoded

def told(row):
    condition = None if row["condition"] is None else number_of(row["condition"])
    margin = None if row["margin"] is None else round(row["margin"], 3)
    return [number_of(row["chosen"]), number_of(row["rejected"]), row["tie"], margin, condition, row["category"]]

def error_of(function, **arguments):
    try:
        return f"no error but {function(**arguments)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found = {"cases": [], "errors": {}}
for name, arguments in json.loads(sys.argv[1]):
    answers = {}
    for streaming in (False, True):
        rows = load_preferences(name, streaming=streaming, **arguments)
        encoded = next(iter(keep_images_encoded(rows)))
        answers[streaming] = {
            "kind": type(rows).__name__,
            "rows": [told(row) for row in rows],
            "texts": [[row["prompt"], row["task"], row["criteria"]] for row in keep_images_encoded(rows)],
            "license": rows.info.license,
            "homepage": rows.info.homepage,
            "encoded": isinstance(encoded["chosen"], (dict, str)),
        }
    found["cases"].append([answers[False], answers[True]])
for name, arguments in {
    "private": {"repo_id": "stranger/private"},
    "missing": {"repo_id": "THUDM/ImageRewardDB-2"},
    "revision": {"revision": "v9"},
}.items():
    found["errors"][name] = error_of(load_preferences, name="pickapic", **arguments)
found["errors"]["split"] = error_of(load_preferences, name="pickapic", split="dev")
found["errors"]["schema"] = error_of(load_preferences, name="pickapic", repo_id="owner/no-images", split="test")
found["errors"]["rapidata"] = error_of(load_preferences, name="rapidata-images", repo_id="owner/no-images", split="test")
found["errors"]["broken"] = error_of(load_preferences, name="hpdv3", repo_id="owner/half-archive")
found["errors"]["again"] = error_of(load_preferences, name="hpdv3", repo_id="owner/half-archive")
found["pinned"] = len(load_preferences("hpdv3", repo_id="owner/half-archive", revision=sys.argv[2]))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What one client process told about all cases, and the requests that the Hub had."""
    repositories = REPOSITORIES | (VIDEO_REPOSITORIES if HAS_AV else {})
    cases = CASES + (VIDEO_CASES if HAS_AV else [])
    home = tmp_path_factory.mktemp("home")
    with LoopbackHub() as hub:
        for name, make in repositories.items():
            hub.put(name, make(), kind="dataset")
        hub.put("stranger/private", layouts.pickapic(), kind="dataset", private=True)
        without_images = layouts.parquet(
            [{"caption": "a", "label_0": 1.0}], caption=layouts.STRING, label_0=layouts.FLOAT
        )
        hub.put("owner/no-images", {"test.parquet": without_images}, kind="dataset")
        whole = layouts.hpdv3()
        good = hub.put("owner/half-archive", whole, kind="dataset")
        hub.put("owner/half-archive", {"images.tar.gz.ac": whole["images.tar.gz.ac"][:20]}, kind="dataset")
        environment = hub.environment(home, PYTHONPATH=str(Path(__file__).parents[1]))
        arguments = json.dumps([[name, arguments] for name, arguments, *_ in cases])
        client = run_python("-c", CLIENT, arguments, good, env=environment)
        assert client.returncode == 0, client.stderr[-3000:]
        return json.loads(client.stdout.splitlines()[-1]), hub.requests, home


@pytest.mark.parametrize(
    ("number", "case"),
    list(enumerate(CASES + VIDEO_CASES)),
    ids=lambda x: x if isinstance(x, int) else f"{x[0]}{x[1]}",
)
def test_rows_from_the_hub(answers, number, case):
    """Each adapter finds every row of the exact layout, streaming and not, with its soft votes, ties and license."""
    if number >= len(CASES) and not HAS_AV:
        pytest.skip("needs PyAV")
    _, _, license_name, want = case
    whole, streamed = answers[0]["cases"][number]
    assert [tuple(row) for row in whole["rows"]] == want
    assert [tuple(row) for row in streamed["rows"]] == want
    assert whole["texts"] == streamed["texts"]
    assert (whole["kind"], streamed["kind"]) == ("Dataset", "IterableDataset")
    assert (whole["license"], streamed["license"]) == (license_name, license_name)
    assert whole["encoded"], "images must stay encoded until they are asked for"
    assert streamed["encoded"]
    assert all(prompt and task for prompt, task, _ in whole["texts"])


def test_texts(answers):
    """Criteria say what annotators were asked where that is not the overall preference; edits are told by their task."""
    texts = {f"{n}{a}": c[0]["texts"][0] for (n, a, *_), c in zip(CASES, answers[0]["cases"], strict=False)}
    assert texts["pickapic{'split': 'test'}"] == ["caption 0", "text-to-image", None]
    assert "alignment" in texts["hpdv3pp{'split': 'test_tf'}"][2]
    assert "coherence" in texts["rapidata-images{'dimension': 'coherence'}"][2]
    prompt, task, criteria = texts["mmrb2{'config': 'edit'}"]
    # Without the placeholder of the prompt's image
    assert (prompt, task, criteria) == ("draw 0", "image-editing", None)
    assert texts["mmrb2{}"][1] == "text-to-image"
    assert texts["editreward-bench{}"][1:] == ["image-editing", None]
    assert texts["editreward{}"] == ["instruction 0", "image-editing", None]
    prompt, task, criteria = texts["editreward{'dimension': 'instruction_following'}"]
    assert task == "image-editing"
    assert "instruction" in criteria
    first = next(name for name in texts if "image_edition" in name)
    assert texts[first] == ["instruction 0", "image-editing", None]


@pytest.mark.skipif(not HAS_AV, reason="needs PyAV")
def test_texts_of_videos(answers):
    """Rows of videos name their task, and the dimension that is judged."""
    first = [case[0]["texts"][0] for case in answers[0]["cases"][len(CASES) :]]
    assert [task for _, task, _ in first] == ["text-to-video"] * 2 + ["image-to-video"] + ["text-to-video"] * 3
    assert "visual quality" in first[4][2]
    assert first[5][0] == "a storm"


def test_moved_repositories_are_named_as_found(answers):
    """A dataset that is only under the other name of its owner is found there, and its rows say so."""
    homepages = {case[0]["homepage"].removeprefix("https://huggingface.co/datasets/") for case in answers[0]["cases"]}
    assert {"zai-org/ImageRewardDB", "TIGER-AI-Lab/GenAI-Bench", "ymhao/HPDv2"} <= homepages
    assert "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3" in homepages


def test_only_what_is_needed_is_downloaded(answers):
    """Splits that are not asked for are not touched, and streamed rows read zip archives in parts."""
    requests = [(request.method, request.url) for request in answers[1]]
    assert not any("data/train-" in url and "pickapic" in url for method, url in requests if method == "GET")
    assert not any("train_0002" in url for method, url in requests if method == "GET")
    assert any("test_1.zip" in url for _, url in requests)


def test_errors_from_the_hub(answers):
    """What cannot be read is named: repository, split, columns found and wanted, archive."""
    errors = answers[0]["errors"]
    assert (
        "There is no dataset under any of ['stranger/private'] on the Hub, or your token may not read"
        in errors["private"]
    )
    assert "['THUDM/ImageRewardDB-2', 'zai-org/ImageRewardDB-2']" in errors["missing"]
    assert "RevisionNotFoundError" in errors["revision"]
    assert "`split` is 'dev', but 'yuvalkirstain/pickapic_v2' has ['test', 'test_unique', 'train']" in errors["split"]
    assert (
        "lacks the columns ['jpg_0', 'jpg_1', 'label_1', 'has_label']; it has ['caption', 'label_0']"
        in errors["schema"]
    )
    assert "'weighted_results_image1_preference'" in errors["rapidata"]


def test_half_an_archive_leaves_nothing(answers):
    """An archive that lacks a part is named, leaves no folder that would be taken for whole, and can be mended."""
    found, _, home = answers
    for error in (found["errors"]["broken"], found["errors"]["again"]):
        assert "Archive 'images.tar.gz' of 'owner/half-archive' cannot be read" in error
    assert found["pinned"] == 3
    extracted = [path for path in home.rglob("images.tar.gz") if path.is_dir() and "half-archive" in str(path)]
    assert len(extracted) == 1  # that of the revision that is whole
    assert not list(home.rglob("unfinished-*"))


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Caches of this process in a folder of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path


def test_local_folder_of_the_same_layout(caches, tmp_path):
    """A local copy works offline, with loose files as with archives, and keeps the license of the original."""
    loose = write(tmp_path / "loose", layouts.hpdv2(loose=True))
    rows = load_preferences("hpdv2", "test", repo_id=loose)
    assert [layouts.number_of(row["chosen"]) for row in rows] == [1, 0, 1]
    assert rows.info.license == "apache-2.0"
    assert not (tmp_path / "assets").exists()
    packed = write(tmp_path / "packed", layouts.mmrb2())
    assert load_preferences("mmrb2", repo_id=packed, streaming=True).info.license == "cc-by-nc-4.0"


def test_rows_go_into_training(caches, tmp_path):
    """Rows pass the checks of the trainer, and images are decoded by nobody on the way."""
    folder = write(tmp_path / "bench", layouts.editreward_bench())
    rows = PreferenceRows(load_preferences("editreward-bench", repo_id=folder), "bench")
    assert len(rows) == 10
    for i in range(10):
        check_row(rows[i], f"row {i}")
        assert set(rows[i]["chosen"]) == {"bytes", "path"}
        assert rows[i]["condition"]["bytes"] == layouts.image(100)


@pytest.mark.skipif(not HAS_AV, reason="needs PyAV")
def test_videos_go_into_training(caches, tmp_path):
    """Videos of map-style rows are paths, whatever view the trainer has of them."""
    folder = write(tmp_path / "videos", layouts.videogen_rewardbench())
    rows = PreferenceRows(load_preferences("videogen-rewardbench", repo_id=folder), "videos")
    assert [layouts.number_of(rows[i]["chosen"]) for i in range(3)] == [0, 3, 1]
    assert isinstance(rows[0]["chosen"], str)
    assert rows[0]["condition"] is None


@pytest.mark.skipif(not HAS_AV, reason="needs PyAV")
def test_name_of_several_videos(caches, tmp_path):
    """A name that fits several videos of a repository is refused, and one that fits none too."""
    files = layouts.rapidata_videos()
    folder = write(tmp_path / "videos", files | {"Videos/other/wan/0.mp4": files["Videos/wan/0.mp4"]})
    rows = load_preferences("rapidata-videos", repo_id=folder, streaming=True)
    with pytest.raises(
        ValueError, match=r"'wan/0.mp4' may be any of \['Videos/other/wan/0.mp4', 'Videos/wan/0.mp4'\]"
    ):
        next(iter(rows))
    (folder / "Videos/other/wan/0.mp4").unlink()
    (folder / "Videos/wan/0.mp4").unlink()
    with pytest.raises(ValueError, match="has no file for 'wan/0.mp4'"):
        next(iter(load_preferences("rapidata-videos", repo_id=folder, streaming=True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda record: record.pop("rank"),
            r"test.json of .* lacks the columns \['rank'\]; it has \['image_path', 'prompt'",
        ),
        (
            lambda record: record["rank"].pop(),
            r"'three bears' of HPDv2 has 3 images, and rankings of \[2, 3, 3, 3, 3\]",
        ),
        (lambda record: record["image_path"].__setitem__(0, "gone.jpg"), "has no file for 'gone.jpg'"),
        (lambda record: record["image_path"].__setitem__(0, "../../secret.png"), "has no file for '../../secret.png'"),
    ],
)
def test_schema_that_has_moved(caches, tmp_path, change, message):
    """A record without its columns, or whose images are not there, is an error with its name."""
    files = layouts.hpdv2(loose=True)
    records = json.loads(files["test.json"])
    change(records[0])
    folder = write(tmp_path / "copy", files | {"test.json": json.dumps(records).encode()})
    (tmp_path / "secret.png").write_bytes(layouts.image(1))
    with pytest.raises(ValueError, match=message):
        list(load_preferences("hpdv2", "test", repo_id=folder, streaming=True))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hpdv2", {"split": "dev"}, "`split` is 'dev', but HPDv2 has"),
        ("hpdv3pp", {"split": "test"}, r"HPDv3\+\+ has \['train_aes', 'train_tf', 'test_aes', 'test_tf'\]"),
        ("rapidata-images", {"dimension": "beauty"}, "`dimension` is 'beauty'"),
        ("rapidata-videos", {"dimension": "beauty"}, "`dimension` is 'beauty'"),
        ("genai-bench", {"config": "images"}, "`config` is 'images'"),
        ("genai-bench", {"both_bad": "keep"}, "`both_bad` is 'keep'"),
        ("mmrb2", {"config": "interleaved"}, "`config` is 'interleaved'"),
        ("videogen-rewardbench", {"dimension": "XQ"}, "`dimension` is 'XQ'"),
        ("videogen-rewardbench", {"split": "test"}, r"VideoGen-RewardBench has \['eval'\]"),
        ("hpdv", {}, "There is no source 'hpdv', but pickapic, hpdv2, hpdv3"),
        ("hpdv3", {"min_confidenc": 0.9}, r"HPDv3 has no options \['min_confidenc'\], but \['min_confidence'\]"),
        ("videodpo", {"split": "test"}, r"VideoDPO has \['train'\]"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    """Wrong arguments end before anything is looked up."""
    with pytest.raises(ValueError, match=message):
        load_preferences(name, **arguments)


@pytest.mark.parametrize(
    ("name", "make", "column", "value", "message"),
    [
        ("genai-bench", "genai_bench", "vote_type", "draw", "`vote_type` is 'draw'"),
        ("mmrb2", "mmrb2", "chosen", "tie", "`chosen` of pair 'pair0' is 'tie'"),
        ("editreward-bench", "editreward_bench", "ranking", "B>C>A", "for 2 candidates"),
        ("editreward-bench", "editreward_bench", "ranking", "B>B", "must name each once"),
    ],
)
def test_unknown_verdicts(caches, tmp_path, name, make, column, value, message):
    """A verdict that an adapter does not know is an error, and no label."""
    folder = write(
        tmp_path / "copy", getattr(layouts, make)(**({"with_videos": False} if make == "genai_bench" else {}))
    )
    for path in folder.rglob("*.parquet"):
        table = pyarrow.parquet.read_table(path)
        place = table.column_names.index(column)
        pyarrow.parquet.write_table(table.set_column(place, column, [[value] * len(table)]), path)
    with pytest.raises(ValueError, match=message):
        list(load_preferences(name, repo_id=folder, streaming=True))


def test_archive_members_stay_inside(caches, tmp_path):
    """A tar archive that would write elsewhere is refused."""
    evil = layouts.tar_gz({"../../evil.jpg": layouts.image(1)})
    folder = write(tmp_path / "copy", {"images.tar.gz": evil})
    with pytest.raises(ValueError, match=r"Archive 'images.tar.gz' .* cannot be read"):
        MediaFiles(DatasetRepository(folder), streaming=False)("images/0.jpg")
    assert not list(tmp_path.rglob("evil.jpg"))


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_archive_that_was_cut(caches, tmp_path, kind):
    """An archive that was cut is noticed wherever the cut is, also between two members."""
    members = {f"images/{i}.jpg": layouts.image(i) for i in range(3)}
    whole = layouts.zipped(members) if kind == "zip" else layouts.tar_gz(members)
    whole = gzip.decompress(whole) if kind == "tar" else whole
    for end in (700, 2048, 3072) if kind == "tar" else (len(whole) // 3, len(whole) // 2, len(whole) - 9):
        folder = write(tmp_path / f"cut{end}", {f"images.{kind}": whole[:end]})
        with pytest.raises(ValueError, match=rf"Archive 'images.{kind}' of .* cannot be read"):
            MediaFiles(DatasetRepository(folder), streaming=False)("images/2.jpg")
    folder = write(tmp_path / "whole", {f"images.{kind}": whole})
    assert MediaFiles(DatasetRepository(folder), streaming=False)("images/2.jpg").endswith("2.jpg")


def test_votes():
    """Shares of votes become log-odds, clipped, and back again; impossible votes are refused."""
    for share in (0.5, 0.6, 0.75, 0.9, 0.99):
        assert 1 / (1 + math.exp(-vote_margin(share))) == pytest.approx(share)
    assert vote_margin(1.0) == vote_margin(0.99)
    assert vote_margin(0.2) == 0  # most are against the label
    assert share_of_votes(1, 3, "row") == 0.25
    assert share_of_votes(0, 0, "row") == 0.5
    for votes in ((None, 1), (-1, 2), (math.nan, 1)):
        with pytest.raises(ValueError, match="Votes of row are"):
            share_of_votes(*votes, "row")
    with pytest.raises(ValueError, match="must be in"):
        vote_margin(1.1)


def test_row_of_two_samples():
    """The sample with more votes is chosen; a tie keeps the order; a plain label has no margin."""
    assert make_row("a", "x", "y", 0.0)["chosen"] == "y"
    tie = make_row("a", "x", "y", 0.5, is_soft=True)
    assert (tie["chosen"], tie["tie"], tie["margin"]) == ("x", True, 0.0)
    assert make_row("a", "x", "y", 1.0)["margin"] is None
    with pytest.raises(ValueError, match=r"data lacks the columns \['b'\]; it has \['a'\], and \['a', 'b'\] are read"):
        check_schema(["a"], ["a", "b"], "data")


def test_every_source_is_whole():
    """Each dataset says what it is, and its benchmarks are splits and options that it has."""
    for name, source in SOURCES.items():
        assert name == source.name
        assert source.description.endswith(".")
        source.complete(source.split, {})
        for benchmark in source.benchmarks.values():
            assert benchmark.title.startswith(source.title)
            source.complete(benchmark.split, benchmark.options)


def test_terms():
    """Data that forbids commercial training is known under any name of its owner; of other data nothing is claimed."""
    assert terms_of("rl-research/multimodal-rewardbench-2").commercial_training is False
    assert terms_of("tiger-ai-lab/editreward-data") == terms_of("TIGER-Lab/EditReward-Data")
    assert terms_of("TIGER-Lab/EditReward-Data").license == "cc-by-nc-4.0"
    assert terms_of("Rapidata/text-2-video-human-preferences-veo3").commercial_training is True
    assert terms_of("someone/else").commercial_training is None
