"""The loopback Hub behaves like the real one towards the real clients, also when things go wrong."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import LoopbackHub


REPOSITORIES = """
import json, os, sys
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

api, folder = HfApi(), Path(sys.argv[1])
api.create_repo("org/judge")
api.create_repo("org/judge", exist_ok=True)
first = api.upload_folder(repo_id="org/judge", folder_path=folder, commit_message="first")
copy = Path(snapshot_download("org/judge"))
api.create_tag("org/judge", tag="v1")
api.create_branch("org/judge", branch="next")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="org/judge", revision="next")
api.delete_file("code/one.py", "org/judge")
api.create_repo("org/page", repo_type="space", space_sdk="gradio", private=True)

def read(name, **others):
    return Path(hf_hub_download("org/judge", name, **others)).read_text()

files = HfFileSystem()
info = api.model_info("org/judge", files_metadata=True)
answer = {
    "user": api.whoami()["name"],
    "same": all((copy / path).read_bytes() == (folder / path).read_bytes() for path in ("model.safetensors", "code/one.py")),
    "tagged": read("code/one.py", revision="v1"),
    "of commit": read("config.json", revision=first.oid[:8]),
    "of branch": read("config.json", revision="next"),
    "files": api.list_repo_files("org/judge"),
    "large": {file.rfilename: file.lfs.size for file in info.siblings if file.lfs},
    "pipeline": info.pipeline_tag,
    "titles": [commit.title for commit in api.list_repo_commits("org/judge")],
    "refs": [[ref.name for ref in refs] for refs in (api.list_repo_refs("org/judge").branches, api.list_repo_refs("org/judge").tags)],
    "range": files.cat_file("org/judge/model.safetensors", start=5, end=9).hex(),
    "folder": sorted(path.rsplit("/")[-1] for path in files.ls("org/judge@v1", detail=False)),
    "again": error_of(api.create_repo, "org/judge"),
    "no sdk": error_of(api.create_repo, "org/other", repo_type="space", space_sdk=None),
    "conflict": error_of(
        api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="org/judge", parent_commit=first.oid
    ),
    "no revision": error_of(hf_hub_download, "org/judge", "config.json", revision="v9"),
    "no file": error_of(hf_hub_download, "org/judge", "nothing.json"),
    "no repository": error_of(api.model_info, "org/nothing"),
}
api.update_repo_settings("org/judge", private=True)
answer["anonymous"] = error_of(api.model_info, "org/judge", token=False)
answer["stranger"] = error_of(api.model_info, "org/judge", token="hf_stranger")
answer["wrong token"] = error_of(api.model_info, "org/judge", token="hf_wrong")
api.update_repo_settings("org/judge", private=False)
answer["foreign"] = error_of(
    api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="org/judge", token="hf_stranger"
)
answer["foreign name"] = error_of(api.create_repo, "org/new", token="hf_stranger")
api.delete_repo("org/page", repo_type="space")
answer["gone"] = api.repo_exists("org/page", repo_type="space")
print(json.dumps(answer))
"""


def judge_files():
    return {
        "README.md": b"---\nlicense: mit\npipeline_tag: visual-preference\n---\n# A judge\n",
        "config.json": b'{"a": 1}',
        "model.safetensors": bytes(range(256)) * 1000,
        "code/one.py": b"one",
        "code/two.py": b"two",
        "empty.txt": b"",
    }


def write_files(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_repositories(hub, run_client, tmp_path):
    """Repositories, commits, revisions and rights are as huggingface_hub expects them."""
    files = judge_files()
    answer = run_client(REPOSITORIES, write_files(tmp_path / "judge", files))
    assert answer["user"] == "owner"
    assert answer["same"]
    assert (answer["tagged"], answer["of commit"], answer["of branch"]) == ("one", '{"a": 1}', "{}")
    assert answer["files"] == sorted({".gitattributes", *files} - {"code/one.py"})
    assert answer["large"] == {"model.safetensors": 256_000}
    assert answer["pipeline"] == "visual-preference"
    assert answer["titles"][1:] == ["first", "initial commit"]
    assert answer["refs"] == [["main", "next"], ["v1"]]
    assert answer["range"] == "05060708"
    assert answer["folder"] == sorted({".gitattributes", "code", *files} - {"code/one.py", "code/two.py"})
    wanted = {
        "again": "HfHubHTTPError: .*409",
        "no sdk": "ValueError",
        "conflict": "HfHubHTTPError: .*412",
        "no revision": "RevisionNotFoundError: 404",
        "no file": "RemoteEntryNotFoundError: 404",
        "no repository": "RepositoryNotFoundError: 404",
        "anonymous": "RepositoryNotFoundError: 401",
        "stranger": "RepositoryNotFoundError: 404",
        "wrong token": "HfHubHTTPError: .*401.*Invalid credentials",
        "foreign": "HfHubHTTPError: .*403",
        "foreign name": "HfHubHTTPError: .*403",
    }
    for name, error in wanted.items():
        with pytest.raises(AssertionError, match=f"(?s)^{error}"):
            raise AssertionError(answer[name])
    assert not answer["gone"]
    assert "x" not in hub.read("org/judge")


FAULTS = """
import json, os, sys
from pathlib import Path
from huggingface_hub import HfApi, constants, snapshot_download

constants.DOWNLOAD_CHUNK_SIZE = 10_000  # only whole pieces are kept when a download breaks, and they have 10 MB
api, folder = HfApi(), sys.argv[1]
answer = {}
api.create_repo("org/judge")

def upload(**others):
    return api.upload_folder(repo_id="org/judge", folder_path=folder, **others)

def files():
    return api.list_repo_files("org/judge")

# Uploads: large files are tried again by the client; all else leaves the repository as it was.
inject("status", "PUT", "/_large/", status=403)
answer["refused"] = [error_of(upload), files()]
inject("drop", "POST", "/commit/")
answer["commit cut"] = [error_of(upload), files()]
answer["after cut"] = [upload().oid, files()]
api.delete_folder("code", "org/judge")
inject("lose_answer", "POST", "/commit/")
answer["answer lost"] = [error_of(upload), files()]
answer["repeated"] = upload().oid == api.model_info("org/judge").sha
Path(folder, "other.safetensors").write_bytes(os.urandom(200_000))
inject("drop", "PUT", "/_large/")
inject("status", "POST", "/preupload/", status=503)
upload()

# Downloads
inject("drop", "GET", "/resolve/.*model.safetensors", times=2)
inject("status", "GET", "/resolve/.*other.safetensors", status=429)
copy = Path(snapshot_download("org/judge"))
answer["same"] = all((copy / path.name).read_bytes() == path.read_bytes() for path in Path(folder).iterdir() if path.is_file())
inject("corrupt", "GET", "/resolve/.*model.safetensors")
other = {"cache_dir": Path(os.environ["HOME"], "other")}
corrupted = snapshot_download("org/judge", **other)
answer["corrupted"] = Path(corrupted, "model.safetensors").read_bytes() != (copy / "model.safetensors").read_bytes()
answer["mismatches"] = [
    [mismatch["path"] for mismatch in api.verify_repo_checksums("org/judge", **where).mismatches] for where in ({}, other)
]
print(json.dumps(answer))
"""


@pytest.mark.slow
def test_faults(hub, run_client, tmp_path):
    """Broken connections end well or change nothing, and hashes tell what sizes do not."""
    files = judge_files()
    answer = run_client(FAULTS, write_files(tmp_path / "home" / "judge", files))
    everything = sorted({".gitattributes", *files})
    assert "403" in answer["refused"][0] or "Error while uploading" in answer["refused"][0]
    assert answer["refused"][1] == [".gitattributes"]
    assert "no error" not in answer["commit cut"][0]
    assert answer["commit cut"][1] == [".gitattributes"]
    assert answer["after cut"][1] == everything
    assert "no error" not in answer["answer lost"][0]
    assert answer["answer lost"][1] == everything
    assert answer["repeated"]
    assert answer["same"]

    uploads = [logged.status for logged in hub.requests if logged.method == "PUT" and "/_large/" in logged.url]
    assert uploads == [403, 200, 0, 200]  # what has arrived is not sent again
    downloads = [
        logged.status
        for logged in hub.requests
        if logged.method == "GET" and logged.url.endswith("model.safetensors") and "/resolve/" in logged.url
    ]
    assert downloads[:3] == [0, 0, 206]  # resumed
    # huggingface_hub compares sizes when it downloads, and hashes only when it is asked to.
    assert answer["corrupted"]
    assert answer["mismatches"] == [[], ["model.safetensors"]]


def test_large_files_on_another_host(tmp_path):
    """As with the real Hub, large files come from elsewhere, which never sees the token."""
    code = (
        "from huggingface_hub import hf_hub_download; from pathlib import Path; "
        "print(Path(hf_hub_download('org/judge', 'model.safetensors')).stat().st_size)"
    )
    with LoopbackHub(large_file_host="localhost") as hub:
        hub.put("org/judge", judge_files(), private=True)
        result = subprocess.run(
            [sys.executable, "-c", code], env=hub.environment(tmp_path), capture_output=True, text=True, check=True
        )
        assert result.stdout.split() == ["256000"]
        assert [logged.authorized for logged in hub.requests if "/_large/" in logged.url] == [False]
        assert all(logged.authorized for logged in hub.requests if "/resolve/" in logged.url)


def test_as_a_process(tmp_path):
    """`python tests/hub_server.py` serves on a port and says its address."""
    command = [sys.executable, os.path.join(os.path.dirname(__file__), "..", "hub_server.py"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip()
            code = "import json, os, urllib.request; print(urllib.request.urlopen(os.environ['URL'] + '/_test/requests').read())"
            environment = {**os.environ, "URL": url}
            result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert result.stdout == "b'[]'\n", result.stderr
        finally:
            server.terminate()


METRIC = '''
import datasets
import evaluate


class Share(evaluate.Metric):
    """Share of ones."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of ones.",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": datasets.Value("int64")}),
        )

    def _compute(self, predictions):
        return {"share": sum(predictions) / len(predictions)}
'''
LIBRARIES = """
import json, os, sys
import evaluate
from datasets import Dataset, Features, Image, Value, get_dataset_config_names, load_dataset
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image as PIL

features = Features(prompt=Value("string"), chosen=Image())
rows = {"prompt": ["a", "b", "c"], "chosen": [PIL.new("RGB", (8, 8 + i)) for i in range(3)]}
dataset = Dataset.from_dict(rows, features=features)
dataset.push_to_hub("org/pairs", split="train", private=True)
dataset.select([0]).push_to_hub("org/pairs", "video", split="test")
loaded = load_dataset("org/pairs", split="train")
streamed = list(load_dataset("org/pairs", split="train", streaming=True))
unet = UNet2DModel(
    sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
)
DDIMPipeline(unet, DDIMScheduler()).push_to_hub("org/generator")
generator = DiffusionPipeline.from_pretrained("org/generator")
print(json.dumps({
    "configurations": get_dataset_config_names("org/pairs"),
    "sizes": [[row["chosen"].size for row in rows] for rows in (loaded, streamed)],
    "private": error_of(load_dataset, "org/pairs", token="hf_stranger", cache_dir=os.environ["HOME"] + "/other"),
    "no revision": error_of(load_dataset, "org/pairs", revision="v9"),
    "metric": evaluate.load("org/share").compute(predictions=[1, 0, 0, 1]),
    "generator": [type(generator).__name__, bool((generator.unet.conv_in.weight == unet.conv_in.weight).all())],
}))
"""


@pytest.mark.slow
def test_libraries(hub, run_client):
    """datasets, evaluate and diffusers find what they uploaded, or what was put there, by repository ID."""
    hub.put("org/share", {"share.py": METRIC.encode(), "README.md": b"---\nsdk: gradio\n---\n"}, kind="space")
    answer = run_client(LIBRARIES)
    assert answer["configurations"] == ["default", "video"]
    assert answer["sizes"] == [[[8, 8], [8, 9], [8, 10]]] * 2
    assert "NotFoundError" in answer["private"]
    assert "v9" in answer["no revision"]
    assert answer["metric"] == {"share": 0.5}
    assert answer["generator"] == ["DDIMPipeline", True]
    assert hub.repositories["dataset", "org/pairs"].private
    assert json.loads(hub.read("org/generator")["model_index.json"])["_class_name"] == "DDIMPipeline"
