"""
A Hugging Face Hub on loopback, for tests: the part of its HTTP API that huggingface_hub, transformers, datasets,
diffusers and evaluate use to download and upload. Standard library only; everything is kept in memory.

In a test, `with LoopbackHub() as hub:` serves from a thread, and a client is a process started with
`env=hub.environment(home)`. By hand:

    python tests/hub_server.py --port 8765
    HF_ENDPOINT=http://127.0.0.1:8765 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_owner python client.py

Beside the Hub's own addresses there are two for clients that are tests: `POST /_test/fault` takes the arguments of
[`LoopbackHub.inject`] as JSON, and `GET /_test/requests` gives [`LoopbackHub.requests`].
"""

import argparse
import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit


KINDS = ("model", "dataset", "space")
LARGE_FILES = tuple(
    "*.safetensors *.bin *.pt *.pth *.ckpt *.pkl *.parquet *.arrow *.zip *.tar *.gz *.npz *.h5 *.mp4 *.png *.jpg *.jpeg "
    "*.webp *.gif".split()
)
LARGE_SIZE = 10 * 1024 * 1024
DATE = "2026-01-01T00:00:00.000Z"


class User(NamedTuple):
    """Who a token belongs to; may write to repositories under their own name and those of their organizations."""

    name: str
    organizations: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.organizations)


TOKENS = {"hf_owner": User("owner", ("org",)), "hf_stranger": User("stranger")}
ACCEPTED = ("owner",)  # users who have accepted the conditions of gated repositories


class HubError(Exception):
    """An answer that is no success, with the code that clients tell apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Request(NamedTuple):
    method: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    user: User | None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[-1].lower() in ("true", "1")


class Response(NamedTuple):
    body: bytes
    status: int = 200
    headers: dict[str, str] = {}
    content_type: str = "application/octet-stream"


class Logged(NamedTuple):
    """A request that was answered; `authorized` tells whether a token came with it."""

    method: str
    url: str
    status: int
    authorized: bool


def to_json(value: Any, status: int = 200, **headers: str) -> Response:
    headers = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response(json.dumps(value).encode(), status, headers, "application/json; charset=utf-8")


def git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


# Repositories


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit. Large ones stand in git as a pointer that names their SHA-256."""

    content: bytes
    is_large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    @cached_property
    def blob_id(self) -> str:
        return git_hash("blob", self.pointer if self.is_large else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.is_large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    files: dict[str, StoredFile]
    title: str
    message: str = ""
    parent: "Commit | None" = None

    @cached_property
    def sha(self) -> str:
        names = sorted((path, file.blob_id) for path, file in self.files.items())
        return git_hash("commit", repr((names, self.title, self.message, self.parent and self.parent.sha)).encode())

    def entries(self, folder: str = "", recursive: bool = False) -> list[dict[str, Any]]:
        """Files and folders under a folder."""
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            depth = len(parts) if recursive else 1
            for i in range(1, min(len(parts), depth + 1)):
                name = prefix + "/".join(parts[:i])
                found[name] = {"type": "directory", "path": name, "size": 0, "oid": git_hash("tree", name.encode())}
            if len(parts) <= depth:
                found[path] = file.describe(path)
        if folder and not found:
            raise HubError(404, f"{folder} does not exist on {self.sha}", "EntryNotFound")
        return list(found.values())


@dataclass
class Repository:
    kind: str
    id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rules = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES)
        self.commit("main", {".gitattributes": StoredFile(rules.encode(), is_large=False)}, "initial commit")

    def commit(self, branch: str, files: dict[str, StoredFile], title: str, message: str = "") -> Commit:
        commit = Commit(files, title, message, self.branches.get(branch))
        self.commits[commit.sha] = self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> Commit:
        """Commit of a branch, a tag, or a commit's name of at least 7 characters."""
        revision = re.sub("^refs/(heads|tags)/", "", unquote(revision))
        for names in (self.branches, self.tags):
            if revision in names:
                return names[revision]
        matches = [commit for sha, commit in self.commits.items() if len(revision) >= 7 and sha.startswith(revision)]
        if len(matches) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return matches[0]

    @property
    def path(self) -> str:
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"


# Faults


@dataclass
class Fault:
    """What goes wrong with requests that match. See [`LoopbackHub.inject`]."""

    action: str
    method: str
    url: str
    times: int
    status: int


ACTIONS = ("status", "drop", "lose_answer", "corrupt")


# The server


ROUTES: list[tuple[str, "re.Pattern[str]", Callable[..., Response]]] = []


def route(methods: str, pattern: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Let a method of the Hub answer requests; named groups of the pattern are its arguments."""

    def register(function: Callable[..., Response]) -> Callable[..., Response]:
        ROUTES.append((methods, re.compile(pattern), function))
        return function

    return register


NAME = r"(?P<name>[^/]+/[^/]+?)"
API = rf"/api/(?P<kind>model|dataset|space)s/{NAME}"
FILES = rf"/(?:(?P<kind>dataset|space)s/)?{NAME}"
REVISION = r"(?P<revision>refs/(?:heads|tags|convert|pr)/[^/]+|[^/]+)"


class LoopbackHub:
    """
    The Hub: repositories, large files, tokens, and the server's thread.

    Args:
        port (`int`, *optional*, defaults to `0`):
            Port on 127.0.0.1; 0 takes a free one.
        tokens (`dict[str, User]`, *optional*):
            Users by token. Defaults to `hf_owner` (user "owner" of organization "org") and `hf_stranger`.
        large_file_host (`str`, *optional*):
            Another name of this machine, e.g. "localhost", to which downloads of large files are redirected, as the
            real Hub does. By default they are answered directly.

    Attributes:
        url (`str`):
            Address of the Hub, for `HF_ENDPOINT`.
        requests (`list[Logged]`):
            Requests that were answered, or cut by a fault (status 0), oldest first.
    """

    def __init__(
        self, port: int = 0, tokens: dict[str, User] | None = None, large_file_host: str | None = None
    ) -> None:
        self.tokens = TOKENS if tokens is None else tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Logged] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self._port = self._server.server_address[1]
        self._large_file_host = large_file_host
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # For tests

    def environment(self, home: str | os.PathLike, token: str | None = "hf_owner", **others: str) -> dict[str, str]:
        """
        Environment of a client process that talks to this Hub only and writes under one folder only.

        Args:
            home (`str` or `os.PathLike`):
                Folder for `HOME`, `HF_HOME` and temporary files; made if it is missing.
            token (`str`, *optional*, defaults to `"hf_owner"`):
                Token to send; None sends none.
            others (`str`):
                Other variables.
        """
        home = Path(home)
        temporary = home / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TRANSFORMERS_", "HUGGINGFACE"))
        }
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_DISABLE_XET": "1",  # uploads would ask for a protocol that this Hub does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(temporary / "torchinductor"),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **({} if token is None else {"HF_TOKEN": token}),
            **others,
        }

    def inject(self, action: str, method: str, url: str, times: int = 1, status: int = 500) -> None:
        """
        Let the next matching requests fail.

        Args:
            action (`str`):
                - `"status"`: the request is refused with `status`.
                - `"drop"`: the connection ends in the middle of the transfer, which is that of the request's body for
                  `PUT` and `POST`, that of the answer's for `GET`.
                - `"lose_answer"`: the request is carried out, and the connection ends before the answer.
                - `"corrupt"`: a byte in the middle of the answer is another one.
            method (`str`):
                HTTP method.
            url (`str`):
                Regular expression that is searched in the path, e.g. `"/resolve/.*model.safetensors"`; large files are
                uploaded to `/_large/<sha256>`.
            times (`int`, *optional*, defaults to 1):
                Number of requests that fail.
            status (`int`, *optional*, defaults to 500):
                Status of action `"status"`.
        """
        if action not in ACTIONS:
            raise ValueError(f"`action` is {action!r}, but must be one of {ACTIONS}.")
        self.faults.append(Fault(action, method, url, times, status))

    def put(
        self,
        name: str,
        files: str | os.PathLike | dict[str, bytes],
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
    ) -> str:
        """
        Commit files without HTTP, to a repository that is made if it is missing.

        Args:
            name (`str`):
                Repository ID.
            files (`str`, `os.PathLike` or `dict[str, bytes]`):
                Folder, or content by path.
            kind (`str`, *optional*, defaults to `"model"`):
                `"model"`, `"dataset"` or `"space"`.
            private (`bool`, *optional*, defaults to `False`):
                Whether a new repository is private.
            gated (`bool`, *optional*, defaults to `False`):
                Whether files of a new repository are for those only who have accepted its conditions: [`ACCEPTED`].
            revision (`str`, *optional*, defaults to `"main"`):
                Branch.

        Returns:
            `str`: Name of the commit.
        """
        if not isinstance(files, dict):
            folder = Path(files)
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        stored = {path: StoredFile(content, self._is_large(path, len(content))) for path, content in files.items()}
        with self.lock:
            self.objects.update({file.sha256: file.content for file in stored.values() if file.is_large})
            repository = self.repositories.setdefault((kind, name), Repository(kind, name, private, gated))
            parent = repository.at(revision)
            return repository.commit(revision, {**parent.files, **stored}, "put").sha

    def read(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Content of all files of a revision by path."""
        return {path: file.content for path, file in self.repositories[kind, name].at(revision).files.items()}

    @route("POST", "/_test/fault")
    def _inject(self, request: Request) -> Response:
        self.inject(**request.json())
        return to_json({})

    @route("GET", "/_test/requests")
    def _list_requests(self, request: Request) -> Response:
        return to_json([logged._asdict() for logged in self.requests])

    # Accounts and repositories

    def _signed_in(self, request: Request) -> User:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        return request.user

    def _repository(self, request: Request, kind: str | None, name: str, write: bool = False) -> Repository:
        """A repository that the user may read, or write; one that they may not read does not exist for them."""
        repository = self.repositories.get((kind or "model", unquote(name)))
        allowed = request.user is not None and unquote(name).split("/")[0] in request.user.namespaces
        if repository is None or (repository.private and not allowed):
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._signed_in(request)
            if not allowed:
                raise HubError(403, "Forbidden: you don't have the rights to write to this repository")
        return repository

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Response:
        user = self._signed_in(request)
        organizations = [{"type": "org", "name": name} for name in user.organizations]
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return to_json(
            {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "isPro": False}
            | {"orgs": organizations, "auth": token}
        )

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Response:
        form, user = request.json(), self._signed_in(request)
        kind, owner = form.get("type") or "model", form.get("organization") or user.name
        if kind not in KINDS:
            raise HubError(400, f"Invalid repository type {kind}")
        if owner not in user.namespaces:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}".')
        if kind == "space" and not form.get("sdk"):
            raise HubError(400, "A Space needs an SDK")
        private = bool(form.get("private")) or form.get("visibility") == "private"
        repository = Repository(kind, f"{owner}/{form['name']}", private)
        place = {"url": f"{self.url}/{repository.path}", "name": repository.id}
        if (kind, repository.id) in self.repositories:
            return to_json({**place, "error": f"You already created this {kind} repo"}, 409)
        self.repositories[kind, repository.id] = repository
        return to_json(place)

    @route("DELETE", "/api/repos/delete")
    def _delete(self, request: Request) -> Response:
        form, user = request.json(), self._signed_in(request)
        name = f"{form.get('organization') or user.name}/{form['name']}"
        repository = self._repository(request, form.get("type"), name, write=True)
        del self.repositories[repository.kind, repository.id]
        return to_json({})

    @route("PUT", API + "/settings")
    def _settings(self, request: Request, kind: str, name: str) -> Response:
        repository, form = self._repository(request, kind, name, write=True), request.json()
        if "visibility" in form or "private" in form:
            repository.private = bool(form.get("private")) or form.get("visibility") == "private"
        return to_json(form)

    @route("GET HEAD", API + "(?:/revision/" + REVISION + ")?")
    def _info(self, request: Request, kind: str, name: str, revision: str | None) -> Response:
        repository = self._repository(request, kind, name)
        commit = repository.at(revision or "main")
        siblings = []
        for path, file in sorted(commit.files.items()):
            entry = file.describe(path)
            sibling = {"rfilename": path}
            if request.flag("blobs"):
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                sibling |= {"lfs": {**entry["lfs"], "sha256": file.sha256}} if file.is_large else {}
            siblings.append(sibling)
        readme = commit.files.get("README.md")
        front_matter = re.match(r"---\n(.*?)\n---", readme.content.decode() if readme else "", re.DOTALL)
        scalars = dict(
            re.findall(r"(?m)^(library_name|pipeline_tag|sdk): *(\S+)$", front_matter[1] if front_matter else "")
        )
        return to_json(
            {"_id": repository.id, "id": repository.id, "author": repository.id.split("/")[0], "sha": commit.sha}
            | {"private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False}
            | {"lastModified": DATE}
            | {"createdAt": DATE, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
            | scalars
        )

    @route("GET", API + "/refs")
    def _refs(self, request: Request, kind: str, name: str) -> Response:
        repository = self._repository(request, kind, name)
        return to_json(
            {"converts": []}
            | {
                group: [
                    {"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": commit.sha}
                    for ref, commit in refs.items()
                ]
                for group, folder, refs in (
                    ("branches", "heads", repository.branches),
                    ("tags", "tags", repository.tags),
                )
            }
        )

    @route("GET", API + "/commits/" + REVISION)
    def _commits(self, request: Request, kind: str, name: str, revision: str) -> Response:
        commit: Commit | None = self._repository(request, kind, name).at(revision)
        listed = []
        while commit is not None:
            listed.append(
                {"id": commit.sha, "title": commit.title, "message": commit.message, "date": DATE, "authors": []}
            )
            commit = commit.parent
        return to_json(listed)

    @route("POST DELETE", API + "/(?P<group>branch|tag)/(?P<ref>.+)")
    def _change_ref(self, request: Request, kind: str, name: str, group: str, ref: str) -> Response:
        repository, form = self._repository(request, kind, name, write=True), request.json()
        refs, ref = repository.branches if group == "branch" else repository.tags, unquote(ref)
        if request.method == "DELETE":
            if ref not in refs:
                raise HubError(404, f"{group} {ref} does not exist", "RevisionNotFound")
            del refs[ref]
            return to_json({})
        if group == "tag":  # the address names the revision here
            ref, start = form["tag"], ref
        else:
            start = form.get("startingPoint") or "main"
        if ref in refs:
            raise HubError(409, f"Reference already exists: {ref}")
        refs[ref] = repository.at(start)
        return to_json({})

    @route("GET HEAD", API + "/tree/" + REVISION + "(?:/(?P<folder>.*))?")
    def _tree(self, request: Request, kind: str, name: str, revision: str, folder: str | None) -> Response:
        commit = self._repository(request, kind, name).at(revision)
        entries = commit.entries(unquote(folder or "").strip("/"), request.flag("recursive"))
        return to_json(self._dated(entries, commit) if request.flag("expand") else entries)

    @route("POST", API + "/paths-info/" + REVISION)
    def _paths_info(self, request: Request, kind: str, name: str, revision: str) -> Response:
        commit = self._repository(request, kind, name).at(revision)
        if "json" in request.headers.get("Content-Type", ""):
            form = request.json()
        else:
            form = parse_qs(request.body.decode())
        entries = {entry["path"]: entry for entry in commit.entries(recursive=True)}
        wanted = [entries[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in entries]
        return to_json(self._dated(wanted, commit))

    def _dated(self, entries: list[dict[str, Any]], commit: Commit) -> list[dict[str, Any]]:
        last = {"id": commit.sha, "title": commit.title, "date": DATE}
        return [{**entry, "lastCommit": last} for entry in entries]

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Response:
        return to_json({"errors": [], "warnings": []})

    # Uploads: ask how (preupload), bring large files to their store, then commit all at once

    def _is_large(self, path: str, size: int) -> bool:
        return size > LARGE_SIZE or any(fnmatch.fnmatch(path.rsplit("/")[-1], pattern) for pattern in LARGE_FILES)

    @route("POST", API + "/preupload/" + REVISION)
    def _preupload(self, request: Request, kind: str, name: str, revision: str) -> Response:
        commit = self._repository(request, kind, name, write=True).at(revision)
        answers = []
        for file in request.json()["files"]:
            mode = "lfs" if self._is_large(file["path"], file["size"]) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in commit.files:
                answer["oid"] = commit.files[file["path"]].etag
            answers.append(answer)
        return to_json({"files": answers})

    @route("POST", FILES + r"\.git/info/lfs/objects/batch")
    def _large_file_batch(self, request: Request, kind: str | None, name: str) -> Response:
        self._repository(request, kind, name, write=True)
        answers = []
        for item in request.json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                place = f"{self.url}/_large/{item['oid']}"
                answer["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            answers.append(answer)
        return to_json({"transfer": "basic", "objects": answers})

    @route("PUT", "/_large/(?P<sha256>[0-9a-f]{64})")
    def _store_large_file(self, request: Request, sha256: str) -> Response:
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "The content does not match its SHA-256")
        self.objects[sha256] = request.body
        return Response(b"")

    @route("POST", "/_large/(?P<sha256>[0-9a-f]{64})/verify")
    def _verify_large_file(self, request: Request, sha256: str) -> Response:
        if len(self.objects.get(sha256, b"")) != request.json()["size"]:
            raise HubError(404, "There is no such large file")
        return to_json({})

    @route("POST", API + "/commit/" + REVISION)
    def _commit(self, request: Request, kind: str, name: str, revision: str) -> Response:
        repository = self._repository(request, kind, name, write=True)
        branch = unquote(revision)
        parent = repository.at(branch)
        if branch not in repository.branches:
            raise HubError(400, f"{branch} is not a branch")
        files, header = dict(parent.files), {}
        for line in request.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                header = value
            else:
                self._change_files(files, operation["key"], value)
        if header.get("parentCommit", parent.sha) != parent.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        commit = repository.commit(branch, files, header.get("summary", ""), header.get("description", ""))
        address = f"{self.url}/{repository.path}/commit/{commit.sha}"
        return to_json({"success": True, "commitOid": commit.sha, "commitUrl": address})

    def _change_files(self, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]), is_large=False)
        elif key == "lfsFile":
            content = self.objects.get(value["oid"])
            if content is None or len(content) != value.get("size", len(content)):
                raise HubError(400, f"Large file of {path} was not uploaded, or has another size")
            files[path] = StoredFile(content, is_large=True)
        elif key in ("deletedFile", "deletedFolder"):
            prefix = path.rstrip("/") + "/"
            doomed = [old for old in files if old == path or (key == "deletedFolder" and old.startswith(prefix))]
            if not doomed:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for old in doomed:
                del files[old]
        else:
            raise HubError(400, f"Operation {key} is not supported here")

    # Downloads

    @route("GET HEAD", FILES + "/resolve/" + REVISION + "/(?P<path>.+)")
    def _resolve(self, request: Request, kind: str | None, name: str, revision: str, path: str) -> Response:
        repository = self._repository(request, kind, name)
        if repository.gated and (request.user is None or request.user.name not in ACCEPTED):
            message = f"Access to {repository.kind} {repository.id} is restricted."
            raise HubError(401 if request.user is None else 403, message, "GatedRepo")
        commit = repository.at(revision)
        file = commit.files.get(unquote(path))
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        if file.is_large:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            if self._large_file_host:
                place = f"http://{self._large_file_host}:{self._port}/_large/{file.sha256}/{quote(path)}"
                return Response(b"", 302, headers | {"Location": place})
        return self._part(request, file.content, headers)

    @route("GET HEAD", "/_large/(?P<sha256>[0-9a-f]{64})/(?P<path>.+)")
    def _large_file(self, request: Request, sha256: str, path: str) -> Response:
        return self._part(request, self.objects[sha256], {"ETag": f'"{sha256}"'})

    def _part(self, request: Request, content: bytes, headers: dict[str, str]) -> Response:
        """The bytes that the request's `Range` asks for, or all."""
        size = len(content)
        headers["Accept-Ranges"] = "bytes"
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if wanted is None:
            return Response(content, 200, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if start >= size:
            return Response(b"", 416, {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return Response(content[start:end], 206, headers)

    # Dispatch

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.url, unquote(path)):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Response:
        address = urlsplit(url)
        try:
            authorization = headers.get("Authorization", "")
            user = self.tokens.get(authorization.removeprefix("Bearer "))
            if authorization and user is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            request = Request(method, parse_qs(address.query), headers, body, user)
            for methods, pattern, function in ROUTES:
                match = pattern.fullmatch(address.path)
                if match and method in methods.split():
                    with self.lock:
                        return function(self, request, **match.groupdict())
            raise HubError(404, f"This Hub does not know {method} {address.path}")
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            response = to_json({"error": str(error)}, error.status)
            return response._replace(
                headers={"X-Error-Message": str(error), **code, **error.headers},
            )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: LoopbackHub


class _Handler(BaseHTTPRequestHandler):
    """Moves bytes between the socket and the Hub, and breaks the connection where a fault wants it."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        fault = None if path.startswith("/_test/") else hub.take_fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        is_upload = self.command in ("PUT", "POST")
        if fault and fault.action == "drop" and is_upload:
            self.rfile.read(length // 2)
            return self._hang_up()
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        if fault and fault.action == "status":
            return self._send(to_json({"error": "injected"}, fault.status))
        response = hub.answer(self.command, self.path, self.headers, body)
        if fault and fault.action == "lose_answer":
            return self._hang_up()
        if fault and fault.action == "corrupt":
            content = bytearray(response.body)
            content[len(content) // 2] ^= 1
            response = response._replace(body=bytes(content))
        self._send(response, cut=fault is not None and fault.action == "drop")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, response: Response, cut: bool = False) -> None:
        self._log(0 if cut else response.status)
        self.send_response(response.status)
        headers = {"Content-Type": response.content_type, "Content-Length": str(len(response.body))}
        for name, value in {**headers, **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if cut else response.body)
        if cut:
            self._close()

    def _hang_up(self) -> None:
        self._log(0)
        self._close()

    def _close(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _log(self, status: int) -> None:
        if not self.path.startswith("/_test/"):
            logged = Logged(self.command, unquote(self.path), status, "Authorization" in self.headers)
            self.server.hub.requests.append(logged)

    def log_message(self, *args: Any) -> None:
        """Say nothing on standard error."""


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face Hub on loopback, for tests.")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    with LoopbackHub(arguments.port) as hub:
        sys.stdout.write(f"{hub.url}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
