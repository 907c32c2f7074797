"""A Hugging Face Hub on the loopback interface, for offline tests of pushing and loading models.

:class:`HubServer` answers the HTTP requests of the real ``huggingface_hub`` client: tokens, repositories (data sets are
in the name space of models; Spaces are apart by their address), commits of small files (sent in the commit) and large
ones (sent ahead by Git LFS), branches, tags, pull requests, listings and downloads. Everything lives in memory. A
commit is a complete and immutable snapshot, and the one step which makes uploaded data visible is the assignment of a
new commit to a reference: no reader ever sees half an upload.

Left out, because a test can do without it: Xet storage (run the client with ``HF_HUB_DISABLE_XET=1``), multi-part LFS
uploads, downloads by way of a content delivery network or in ranges, what Spaces run, ``.gitignore`` filtering, paged
listings, and what ``model_info`` derives from the model card or the weights.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = (".bin", ".ckpt", ".gz", ".npy", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
LFS_THRESHOLD = 10 * 1024 * 1024
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

REPO = r"(?:/datasets)?/(?P<repo_id>[^/]+/[^/]+)"
API = r"/api/(?:models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"/(?P<revision>[^/]+)"
SPACE_ADDRESS = re.compile(r"/(?:api/)?spaces/([^/]+/[^/.]+)")
SPACE_SUFFIX = "~space"
"""Ends the id of a Space in here, since a model may have the same one."""


def address_of(repo_id: str) -> str:
    """What follows the endpoint in the address of a repository's page."""
    return f"spaces/{repo_id.removesuffix(SPACE_SUFFIX)}" if repo_id.endswith(SPACE_SUFFIX) else repo_id


class HubError(Exception):
    """A refusal: an HTTP status, a message, and the ``X-Error-Code`` from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class Request:
    """One HTTP request, read completely; ``user`` owns the token it was sent with (``None`` when there was none)."""

    query: dict[str, list[str]]
    body: bytes
    user: str | None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Reply:
    """One HTTP response; status 0 stands for a connection which is dropped without any answer."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Self:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class Blob:
    """The content of one file, kept either in git itself or in the large file storage with only a pointer in git."""

    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        spec = "https://git-lfs.github.com/spec/v1"
        return f"version {spec}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        stored = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """What the Hub calls the version of a file: SHA-256 of a large file, git object id of a small one."""
        return self.sha256 if self.is_lfs else self.git_oid

    def lfs_entry(self, digest_key: str) -> dict[str, Any]:
        """The description of a large file; listings call its digest ``oid``, model information ``sha256``."""
        entry = {digest_key: self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return {"lfs": entry} if self.is_lfs else {}

    def tree_entry(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        return {"type": "file", "path": path, "size": size, "oid": self.git_oid, **self.lfs_entry("oid")}


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot of a repository."""

    files: Mapping[str, Blob]
    parent: "Commit | None"
    author: str
    title: str
    description: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z")

    @cached_property
    def sha(self) -> str:
        tree = sorted((path, blob.git_oid) for path, blob in self.files.items())
        identity = [tree, self.parent and self.parent.sha, self.author, self.title, self.description, self.date]
        return hashlib.sha1(json.dumps(identity).encode()).hexdigest()

    def history(self) -> "Iterator[Commit]":
        """This commit and its ancestors, newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent


class Repository:
    """Commits, the references which name them, and the large objects uploaded so far (committed or not)."""

    def __init__(self, repo_id: str, private: bool, gated: bool = False) -> None:
        self.repo_id, self.private, self.gated = repo_id, private, gated
        self.owner = repo_id.partition("/")[0]
        self.refs: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        self.lfs_objects: dict[str, bytes] = {}
        first_files = {".gitattributes": Blob(GIT_ATTRIBUTES, is_lfs=False)}
        self.publish("refs/heads/main", Commit(first_files, None, self.owner, "initial commit"))

    def publish(self, ref: str, commit: Commit) -> None:
        """Let a reference name a new commit: the one step which changes what readers see."""
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha

    def ref(self, revision: str) -> str | None:
        """The full name of the reference which ``revision`` abbreviates."""
        return next((r for r in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}") if r in self.refs), None)

    def commit_at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request (``refs/pr/1``) or a commit hash."""
        ref = self.ref(revision)
        sha = self.refs[ref] if ref else revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def apply(self, operations: list[dict[str, Any]], files: Mapping[str, Blob]) -> Mapping[str, Blob]:
        """The files after the operations of a commit request; raises, changing nothing, if any one is impossible."""
        result = dict(files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"].strip("/")
            if key == "file":
                result[path] = Blob(base64.b64decode(value["content"], validate=True), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs_objects:
                    raise HubError(400, f"The content of the LFS file {path} was never uploaded")
                result[path] = Blob(self.lfs_objects[value["oid"]], is_lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                is_deleted = path.__eq__ if key == "deletedFile" else partial(is_inside, folder=path)
                if not (deleted := [name for name in result if is_deleted(name)]):
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in deleted:
                    del result[name]
            else:
                raise HubError(400, f"Unknown operation: {key}")
        return MappingProxyType(result)


def is_inside(path: str, folder: str) -> bool:
    """Whether a file lies in a folder or below it; everything is inside the folder without a name."""
    return not folder or path.startswith(f"{folder}/")


def tree_entries(files: Mapping[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders in a folder (and, when recursive, below it) as the tree listing describes them."""
    depth = folder.count("/") + 1 if folder else 0
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in files if is_inside(path, folder)):
        parts = path.split("/")
        for end in range(depth + 1, len(parts) if recursive else min(len(parts), depth + 2)):
            name = "/".join(parts[:end])
            oids = "".join(files[path].git_oid for path in sorted(files) if is_inside(path, name))
            oid = hashlib.sha1(oids.encode()).hexdigest()
            entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
        if recursive or len(parts) == depth + 1:
            entries[path] = files[path].tree_entry(path)
    return list(entries.values())


Handler = Callable[..., Reply]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    """Register a method of :class:`HubServer` for a path; the named groups of the pattern become its arguments."""

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


@dataclass
class Fault:
    """An order to spoil requests: let ``after`` matching ones pass, then answer ``count`` of them with ``status``."""

    count: int
    path_substring: str
    status: int
    after: int


class HubServer:
    """A Hub for the duration of a ``with`` block (or from :meth:`start` to :meth:`stop`) on a free loopback port.

    Args:
        tokens: the valid access tokens, each with the name of its user. A user reads every public repository, and
            reads and writes those in the namespace of that name. Of a gated repository, only its owner may download
            more than the card.

    Attributes:
        requests: ``"METHOD /path?query status"`` of each request answered so far.
        faults: the orders of :meth:`fail_next`; clear the list to forget those which are not used up.
    """

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self.tokens = dict(tokens)
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self._repositories: dict[str, Repository] = {}
        self._uploads: dict[str, tuple[Repository, str]] = {}  # ticket -> where the object goes, its SHA-256
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None

    # -- life and controls --

    def start(self) -> Self:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Connection, self))
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Close the port; connections that are still open are dropped at their next request."""
        if self._http is not None:
            http, self._http = self._http, None
            http.shutdown()
            http.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The endpoint, for ``HF_ENDPOINT`` or ``HfApi(endpoint=...)``."""
        if self._http is None:
            raise RuntimeError("the hub is not running")
        return f"http://127.0.0.1:{self._http.server_port}"

    def client_environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose ``huggingface_hub`` talks to this server, with all its caches in ``home``.

        The client reads these variables when it is first imported.
        """
        foreign = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_.*|XDG_CACHE_HOME|.*_proxy", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        flags = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        return environment | dict.fromkeys(flags, "1") | ({"HF_TOKEN": token} if token else {})

    def fail_next(self, count: int, path_substring: str, status: int = 500, after: int = 0) -> None:
        """Spoil the next ``count`` requests whose ``METHOD /path?query`` contains a text, for example ``"/commit/"``.

        ``status`` is the answer they get (0 drops the connection); ``after`` matching requests pass first. The client
        repeats a request of an upload up to five times after a server error, but never the one which makes the commit.
        """
        with self._lock:
            self.faults.append(Fault(count, path_substring, status, after))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository at a revision, read past HTTP and access rights."""
        with self._lock:
            commit = self._repositories[repo_id].commit_at(revision)
        return {path: blob.content for path, blob in sorted(commit.files.items())}

    # -- from a request to its reply --

    def answer(self, method: str, target: str, headers: Message, body: bytes) -> Reply:
        """The reply to a request. Requests are worked on one at a time; reading and sending happen in parallel."""
        if self._http is None:
            return Reply(status=0)
        with self._lock:
            try:
                reply = self._spoil(f"{method} {target}") or self._dispatch(method, target, headers, body)
            except HubError as error:
                reply = Reply.json({"error": error.message}, error.status, error.headers)
            except (ValueError, KeyError, TypeError) as error:
                reply = Reply.json({"error": f"Malformed request: {error!r}"}, 400)
            self.requests.append(f"{method} {target} {reply.status}")
            return reply

    def _spoil(self, line: str) -> Reply | None:
        for fault in self.faults:
            if fault.path_substring in line and fault.after > 0:
                fault.after -= 1
            elif fault.path_substring in line and fault.count > 0:
                fault.count -= 1
                return Reply.json({"error": "Injected failure"}, fault.status, {"Retry-After": "0"})
        return None

    def _dispatch(self, method: str, target: str, headers: Message, body: bytes) -> Reply:
        path, _, query = target.partition("?")
        if space := SPACE_ADDRESS.match(path):
            start = "/api/models/" if path.startswith("/api/") else "/"
            path = f"{start}{space[1]}{SPACE_SUFFIX}{path[space.end() :]}"
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        request = Request(parse_qs(query, keep_blank_values=True), body, self.tokens.get(token))
        for known_method, pattern, handler in ROUTES:
            if known_method == method.replace("HEAD", "GET") and (match := pattern.fullmatch(path)):
                return handler(self, request, **{key: unquote(value) for key, value in match.groupdict("").items()})
        raise HubError(404, f"No such page: {method} {path}")

    def _repository(self, request: Request, repo_id: str, write: bool = False) -> Repository:
        repo = self._repositories.get(repo_id)
        if repo is None or (repo.private and request.user != repo.owner):
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._require_owner(request, repo.owner)
        return repo

    def _require_owner(self, request: Request, namespace: str) -> None:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        if request.user != namespace:
            raise HubError(403, f"You don't have the rights to write in the namespace {namespace}")

    # -- accounts and repositories --

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Reply:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Reply.json({"type": "user", "name": request.user, "fullname": request.user, "orgs": [], "auth": auth})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Reply:
        return Reply.json({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request) -> Reply:
        wanted = request.json()
        kind = wanted.get("type", "model")
        if kind not in ("model", "dataset", "space"):
            raise HubError(400, "This hub holds models, data sets and Spaces only")
        owner = wanted.get("organization") or request.user or ""
        self._require_owner(request, owner)
        repo_id = f"{owner}/{wanted['name']}"
        reply = {"id": repo_id, "name": repo_id, "url": f"{self.url}/{'spaces/' * (kind == 'space')}{repo_id}"}
        repo_id += SPACE_SUFFIX * (kind == "space")
        if repo_id in self._repositories:
            return Reply.json({"error": f"You already created this model repo: {repo_id}", **reply}, 409)
        is_private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # newer and older clients
        self._repositories[repo_id] = Repository(repo_id, is_private)
        return Reply.json(reply)

    @route("GET", rf"{API}(?:/revision{REVISION})?")
    def _model_info(self, request: Request, repo_id: str, revision: str) -> Reply:
        repo = self._repository(request, repo_id)
        commit = repo.commit_at(revision or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in request.query:
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling |= {"size": len(blob.content), "blobId": blob.git_oid, **blob.lfs_entry("sha256")}
        info = {"id": repo_id, "modelId": repo_id, "author": repo.owner, "sha": commit.sha, "private": repo.private}
        info |= {"createdAt": list(commit.history())[-1].date, "lastModified": commit.date, "siblings": siblings}
        return Reply.json(
            info | {"tags": [], "gated": "auto" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0}
        )

    # -- references --

    @route("GET", rf"{API}/refs")
    def _list_refs(self, request: Request, repo_id: str) -> Reply:
        refs = self._repository(request, repo_id).refs
        listing: dict[str, list[dict[str, str]]] = {"converts": []}
        for group, prefix in {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}.items():
            members = {ref.removeprefix(prefix): ref for ref in sorted(refs) if ref.startswith(prefix)}
            listing[group] = [{"name": name, "ref": ref, "targetCommit": refs[ref]} for name, ref in members.items()]
        return Reply.json(listing)

    @route("GET", rf"{API}/commits{REVISION}")
    def _list_commits(self, request: Request, repo_id: str, revision: str) -> Reply:
        history = self._repository(request, repo_id).commit_at(revision).history()
        keys = ("id", "authors", "date", "title", "message")
        entries = ((c.sha, [{"user": c.author}], c.date, c.title, c.description) for c in history)
        return Reply.json([dict(zip(keys, entry, strict=True)) for entry in entries])

    @route("POST", rf"{API}/branch/(?P<branch>[^/]+)")
    def _create_branch(self, request: Request, repo_id: str, branch: str) -> Reply:
        return self._create_ref(request, repo_id, f"refs/heads/{branch}", request.json().get("startingPoint", "main"))

    @route("POST", rf"{API}/tag{REVISION}")
    def _create_tag(self, request: Request, repo_id: str, revision: str) -> Reply:
        return self._create_ref(request, repo_id, f"refs/tags/{request.json()['tag']}", revision)

    def _create_ref(self, request: Request, repo_id: str, ref: str, revision: str) -> Reply:
        repo = self._repository(request, repo_id, write=True)
        commit = repo.commit_at(revision)
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.publish(ref, commit)
        return Reply.json({})

    # -- uploads --

    @route("POST", rf"{API}/preupload{REVISION}")
    def _preupload(self, request: Request, repo_id: str, revision: str) -> Reply:
        """Tell the client how to send each file, and which version of it the repository already has."""
        repo = self._repository(request, repo_id, write="create_pr" not in request.query)
        present = repo.commit_at(revision).files

        def plan(path: str, size: int, sample: str) -> dict[str, Any]:
            is_large = path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD or b"\0" in base64.b64decode(sample)
            known = {"oid": present[path].etag} if path in present else {}
            return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, **known}

        return Reply.json({"files": [plan(**wanted) for wanted in request.json()["files"]]})

    @route("POST", rf"{REPO}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo_id: str) -> Reply:
        """Hand out an upload address for each large object which the repository does not hold yet."""
        wanted = request.json()
        repo = self._repository(request, repo_id, write="ref" in wanted)  # for a pull request there is no ref
        replies = []
        for oid, size in {item["oid"]: item["size"] for item in wanted["objects"]}.items():
            replies.append({"oid": oid, "size": size})
            if oid not in repo.lfs_objects:
                ticket = secrets.token_urlsafe(16)
                self._uploads[ticket] = repo, oid
                replies[-1]["actions"] = {"upload": {"href": f"{self.url}/lfs-upload/{ticket}"}}
        return Reply.json({"transfer": "basic", "objects": replies})

    @route("PUT", r"/lfs-upload/(?P<ticket>[^/]+)")
    def _lfs_upload(self, request: Request, ticket: str) -> Reply:
        """Take a large object from whoever knows its upload address, as object storage does with a signed one."""
        if ticket not in self._uploads:
            raise HubError(403, "Unknown upload address")
        repo, oid = self._uploads[ticket]
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced SHA-256")
        repo.lfs_objects[oid] = request.body
        return Reply()

    @route("POST", rf"{API}/commit{REVISION}")
    def _commit(self, request: Request, repo_id: str, revision: str) -> Reply:
        """Apply the operations of a commit, all or none, to a branch, a pull request, or a new pull request."""
        opens_pull_request = "create_pr" in request.query
        repo = self._repository(request, repo_id, write=not opens_pull_request)
        parent, ref = repo.commit_at(revision), repo.ref(revision)
        if opens_pull_request:
            ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}"
        if request.user is None or ref is None or ref.startswith("refs/tags/"):
            raise HubError(403, "A commit needs a user, and a branch or a pull request to go to")
        header, *operations = [json.loads(line) for line in request.body.splitlines() if line]
        message = header["value"]
        if not parent.sha.startswith(message.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = repo.apply(operations, parent.files)
        commit = Commit(files, parent, request.user, message["summary"], message["description"])
        repo.publish(ref, commit)
        page = f"{self.url}/{address_of(repo_id)}"
        reply = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
        if opens_pull_request:
            reply["pullRequestUrl"] = f"{page}/discussions/{ref.removeprefix('refs/pr/')}"
        return Reply.json(reply)

    # -- listings and downloads --

    @route("GET", rf"{API}/tree{REVISION}(?:/(?P<folder>.+))?")
    def _list_tree(self, request: Request, repo_id: str, revision: str, folder: str) -> Reply:
        files = self._repository(request, repo_id).commit_at(revision).files
        entries = tree_entries(files, folder, recursive=request.query.get("recursive") == ["true"])
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Reply.json(entries)

    @route("POST", rf"{API}/paths-info{REVISION}")
    def _paths_info(self, request: Request, repo_id: str, revision: str) -> Reply:
        files = self._repository(request, repo_id).commit_at(revision).files
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return Reply.json([entry for entry in tree_entries(files, "", recursive=True) if entry["path"] in wanted])

    @route("GET", rf"{REPO}/resolve{REVISION}/(?P<path>.+)")
    def _download(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        repo = self._repository(request, repo_id)
        commit = repo.commit_at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if repo.gated and request.user != repo.owner and path not in ("README.md", ".gitattributes"):
            reason = f"Access to model {repo_id} is restricted."
            raise HubError(403 if request.user else 401, reason, "GatedRepo", headers)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.files[path]
        headers |= {"ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream"}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        return Reply(blob.content, headers=headers)


class _Connection(BaseHTTPRequestHandler):
    """Reads requests from one connection and writes what :meth:`HubServer.answer` replies."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one piece
    disable_nagle_algorithm = True

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self._hub = hub
        super().__init__(*args)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self._hub.answer(self.command, self.path, self.headers, body)
        if reply.status == 0:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output clean; :attr:`HubServer.requests` has the log."""
