"""The loopback Hub against the real client: every call below goes through ``huggingface_hub`` and HTTP."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .conftest import ClientProcess, RemoteApi
from .server import HubServer

LARGE = bytes(range(256)) * (20 * 1024 * 1024 // 256)


def requests_of(hub: HubServer, text: str) -> list[str]:
    return [line for line in hub.requests if text in line]


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)


# -- accounts and repositories --


def test_tokens(ada: RemoteApi, client: ClientProcess) -> None:
    assert ada.whoami()["name"] == "ada"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as failure:
        RemoteApi(client, "hf_wrong").whoami()
    assert failure.value.response.status_code == 401
    ada.create_repo("ada/for-anyone")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        RemoteApi(client, "hf_wrong").model_info("ada/for-anyone")


def test_create_repo(hub: HubServer, ada: RemoteApi, bob: RemoteApi, anonymous: RemoteApi) -> None:
    assert ada.create_repo("created") == f"{hub.url}/ada/created"
    assert ada.create_repo("ada/created", exist_ok=True).repo_id == "ada/created"
    with pytest.raises(HfHubHTTPError, match="409"):
        ada.create_repo("ada/created")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.create_repo("ada/other")
    with pytest.raises(HfHubHTTPError, match="401"):
        anonymous.create_repo("ada/other")
    assert ada.list_repo_files("ada/created") == [".gitattributes"]
    assert not ada.repo_exists("ada/other")


def test_private_repo(ada: RemoteApi, bob: RemoteApi, anonymous: RemoteApi) -> None:
    ada.create_repo("ada/private", private=True)
    ada.create_repo("ada/public")
    assert ada.model_info("ada/private").private is True
    assert ada.model_info("ada/public").private is False
    assert [user.repo_exists("ada/private") for user in (ada, bob, anonymous)] == [True, False, False]
    assert [user.repo_exists("ada/public") for user in (ada, bob, anonymous)] == [True, True, True]
    with pytest.raises(RepositoryNotFoundError):
        anonymous.hf_hub_download("ada/private", "config.json")
    assert not bob.file_exists("ada/private", ".gitattributes")


# -- uploads and commits --


def test_small_file(hub: HubServer, ada: RemoteApi, tmp_path: Path) -> None:
    ada.create_repo("ada/small")
    commit = ada.upload_file(path_or_fileobj=b"{}\n", path_in_repo="config.json", repo_id="ada/small")
    assert commit == f"{hub.url}/ada/small/commit/{commit.oid}"
    assert not requests_of(hub, "/ada/small.git/info/lfs")
    assert Path(ada.hf_hub_download("ada/small", "config.json", cache_dir=tmp_path)).read_bytes() == b"{}\n"
    metadata = ada.get_hf_file_metadata(url=f"{hub.url}/ada/small/resolve/main/config.json")
    git_oid = hashlib.sha1(b"blob 3\0{}\n").hexdigest()
    assert (metadata.commit_hash, metadata.etag, metadata.size) == (commit.oid, git_oid, 3)


def test_large_file(hub: HubServer, ada: RemoteApi, tmp_path: Path) -> None:
    ada.create_repo("ada/large")
    source = tmp_path / "model.safetensors"
    source.write_bytes(LARGE)
    upload = {"path_or_fileobj": str(source), "path_in_repo": source.name, "repo_id": "ada/large"}
    commit = ada.upload_file(**upload)
    puts = len(requests_of(hub, "PUT /lfs-upload/"))
    assert ada.upload_file(**upload).oid == commit.oid, "an unchanged file makes no commit"
    assert len(requests_of(hub, "PUT /lfs-upload/")) == puts, "and is not sent again"

    sha256 = hashlib.sha256(LARGE).hexdigest()
    metadata = ada.get_hf_file_metadata(url=f"{hub.url}/ada/large/resolve/main/{source.name}")
    assert (metadata.commit_hash, metadata.etag, metadata.size) == (commit.oid, sha256, len(LARGE))
    connection = HTTPConnection(hub.url.removeprefix("http://"))
    connection.request("HEAD", f"/ada/large/resolve/main/{source.name}")
    head = connection.getresponse()
    linked = {name: head.headers[name] for name in ("X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size")}
    connection.close()
    assert linked == {"X-Repo-Commit": commit.oid, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(LARGE))}
    sibling = ada.model_info("ada/large", files_metadata=True).siblings[-1]
    assert (sibling.rfilename, sibling.size, sibling.lfs.sha256) == (source.name, len(LARGE), sha256)
    downloaded = ada.hf_hub_download("ada/large", source.name, cache_dir=tmp_path / "cache")
    assert Path(downloaded).read_bytes() == LARGE


def test_folder(ada: RemoteApi, tmp_path: Path) -> None:
    for name, content in {"a.txt": b"a", "sub/b.txt": b"b", "sub/deep/c.bin": b"c", "skip.log": b"-"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    ada.create_repo("ada/folder")
    commit = ada.upload_folder(
        repo_id="ada/folder", folder_path=tmp_path, ignore_patterns="*.log", commit_message="All", delete_patterns="*"
    )
    history = ada.list_repo_commits("ada/folder")
    assert [(entry.title, entry.authors) for entry in history] == [("All", ["ada"]), ("initial commit", ["ada"])]
    assert history[0].commit_id == commit.oid
    assert ada.list_repo_files("ada/folder") == [".gitattributes", "a.txt", "sub/b.txt", "sub/deep/c.bin"]
    assert [entry.path for entry in ada.list_repo_tree("ada/folder")] == [".gitattributes", "a.txt", "sub"]
    assert [entry.path for entry in ada.list_repo_tree("ada/folder", "sub")] == ["sub/b.txt", "sub/deep"]
    assert ada.list_repo_tree("ada/folder", "sub/deep")[0].lfs.size == 1
    with pytest.raises(RemoteEntryNotFoundError):
        ada.list_repo_tree("ada/folder", "nowhere")


def test_commit_is_all_or_nothing(hub: HubServer, ada: RemoteApi) -> None:
    ada.create_repo("ada/commits")
    first = ada.create_commit(
        "ada/commits", [add(path, path.encode()) for path in ("a", "b", "dir/c", "dir/d")], commit_message="Four files"
    )
    ada.create_commit(
        "ada/commits",
        [
            CommitOperationDelete("a"),
            CommitOperationDelete("dir/"),
            CommitOperationCopy("b", "copied"),
            add("weights.bin", b"\0"),
        ],
        commit_message="Change everything",
        parent_commit=first.oid,
    )
    expected = {"b": b"b", "copied": b"b", "weights.bin": b"\0"}
    assert {path: content for path, content in hub.files("ada/commits").items() if path != ".gitattributes"} == expected
    with pytest.raises(HfHubHTTPError, match="412"):
        ada.create_commit("ada/commits", [add("e", b"e")], commit_message="Outdated", parent_commit=first.oid)
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        ada.create_commit("ada/commits", [add("e", b"e"), CommitOperationDelete("f")], commit_message="Impossible")
    assert not ada.file_exists("ada/commits", "e")
    ada.delete_file("b", "ada/commits")
    assert not ada.file_exists("ada/commits", "b")
    assert ada.file_exists("ada/commits", "b", revision=first.oid)


def test_uploaded_data_is_invisible_until_the_commit(hub: HubServer, ada: RemoteApi) -> None:
    ada.create_repo("ada/ahead")
    ada.preupload_lfs_files("ada/ahead", [add("weights.safetensors", b"12345678")])
    assert requests_of(hub, "PUT /lfs-upload/")[-1].endswith(" 200")
    assert list(hub.files("ada/ahead")) == [".gitattributes"]


def upload_in_threads(repo_id: str, names: list[str]) -> None:
    from huggingface_hub import upload_file

    with ThreadPoolExecutor(len(names)) as pool:
        list(
            pool.map(lambda name: upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id=repo_id), names)
        )


def test_concurrent_commits(hub: HubServer, ada: RemoteApi, client: ClientProcess) -> None:
    ada.create_repo("ada/concurrent")
    names = [f"{number}.{suffix}" for number in range(4) for suffix in ("txt", "bin")]
    client.run(upload_in_threads, "ada/concurrent", names)
    assert sorted(hub.files("ada/concurrent")) == [".gitattributes", *sorted(names)]
    assert len(ada.list_repo_commits("ada/concurrent")) == 1 + len(names)


# -- revisions and pull requests --


def test_revisions(ada: RemoteApi, tmp_path: Path) -> None:
    ada.create_repo("ada/versions")

    def upload(content: bytes, revision: str | None = None) -> str:
        return ada.upload_file(
            path_or_fileobj=content, path_in_repo="version", repo_id="ada/versions", revision=revision
        ).oid

    def download(revision: str | None) -> bytes:
        return Path(ada.hf_hub_download("ada/versions", "version", revision=revision, cache_dir=tmp_path)).read_bytes()

    first = upload(b"1")
    ada.create_tag("ada/versions", tag="v1")
    second = upload(b"2")
    ada.create_branch("ada/versions", branch="feature/x", revision=first)
    ada.create_branch("ada/versions", branch="feature/x", exist_ok=True)
    third = upload(b"3", revision="feature/x")
    assert [download(name) for name in (None, "main", first, "v1", "feature/x")] == [b"2", b"2", b"1", b"1", b"3"]

    refs = ada.list_repo_refs("ada/versions")
    branches = {"feature/x": third, "main": second}
    assert {branch.name: branch.target_commit for branch in refs.branches} == branches
    assert [(tag.name, tag.ref, tag.target_commit) for tag in refs.tags] == [("v1", "refs/tags/v1", first)]
    assert ada.model_info("ada/versions", revision="v1").sha == first
    for call in (
        lambda: download("v2"),
        lambda: ada.model_info("ada/versions", revision="v2"),
        lambda: upload(b"", "v2"),
    ):
        with pytest.raises(RevisionNotFoundError):
            call()
    with pytest.raises(HfHubHTTPError, match="409"):
        ada.create_tag("ada/versions", tag="v1")
    with pytest.raises(HfHubHTTPError, match="403"):
        upload(b"4", revision="v1")


def test_pull_request(hub: HubServer, ada: RemoteApi, bob: RemoteApi, anonymous: RemoteApi, tmp_path: Path) -> None:
    ada.create_repo("ada/reviewed")
    upload = {"path_or_fileobj": b"\0bob", "path_in_repo": "weights.bin", "repo_id": "ada/reviewed"}
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.upload_file(**upload)
    with pytest.raises(HfHubHTTPError, match=r"401|403"):
        anonymous.upload_file(**upload, create_pr=True)
    commit = bob.upload_file(**upload, create_pr=True)
    assert (commit.pr_revision, commit.pr_url) == ("refs/pr/1", f"{hub.url}/ada/reviewed/discussions/1")
    assert not ada.file_exists("ada/reviewed", "weights.bin")
    ada.upload_file(path_or_fileobj=b"ada", path_in_repo="note", repo_id="ada/reviewed", revision="refs/pr/1")
    assert list(hub.files("ada/reviewed", "refs/pr/1")) == [".gitattributes", "note", "weights.bin"]
    downloaded = ada.hf_hub_download("ada/reviewed", "weights.bin", revision="refs/pr/1", cache_dir=tmp_path)
    assert Path(downloaded).read_bytes() == b"\0bob"
    requests = ada.list_repo_refs("ada/reviewed", include_pull_requests=True).pull_requests
    assert [request.ref for request in requests] == ["refs/pr/1"]


def test_snapshot_and_missing_entries(ada: RemoteApi, tmp_path: Path) -> None:
    ada.create_repo("ada/snapshot")
    files = {"config.json": b"{}", "sub/weights.bin": b"\0\1"}
    commit = ada.create_commit(
        "ada/snapshot", [add(path, content) for path, content in files.items()], commit_message="Files"
    )
    for revision, cache in ((None, "by-branch"), (commit.oid, "by-hash")):
        folder = Path(ada.snapshot_download("ada/snapshot", revision=revision, cache_dir=tmp_path / cache))
        assert folder.name == commit.oid
        assert {path: (folder / path).read_bytes() for path in files} == files
    with pytest.raises(RemoteEntryNotFoundError) as failure:
        ada.hf_hub_download("ada/snapshot", "missing.json", cache_dir=tmp_path)
    assert failure.value.response.headers["X-Repo-Commit"] == commit.oid


# -- injected failures --


def test_server_error_at_the_commit(hub: HubServer, ada: RemoteApi) -> None:
    ada.create_repo("ada/broken-commit")
    before = ada.model_info("ada/broken-commit").sha
    operations = [add("config.json", b"{}"), add("weights.bin", b"\0\1")]
    hub.fail_next(1, "/commit/")
    with pytest.raises(HfHubHTTPError, match="500"):
        ada.create_commit("ada/broken-commit", operations, commit_message="Files")
    assert requests_of(hub, "PUT /lfs-upload/")[-1].endswith(" 200"), "the failure came after the large file"
    assert ada.model_info("ada/broken-commit").sha == before
    assert ada.list_repo_files("ada/broken-commit") == [".gitattributes"]
    ada.create_commit("ada/broken-commit", operations, commit_message="Again")
    assert list(hub.files("ada/broken-commit")) == [".gitattributes", "config.json", "weights.bin"]


@pytest.mark.parametrize("status", [403, 500])
def test_error_in_the_middle_of_a_large_upload(hub: HubServer, ada: RemoteApi, status: int) -> None:
    repo_id = f"ada/broken-put-{status}"
    ada.create_repo(repo_id)
    operations = [add(f"{number}.bin", bytes([0, number])) for number in range(3)]
    hub.fail_next(100, "PUT /lfs-upload/", status, after=1)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        ada.create_commit(repo_id, operations, commit_message="Files")
    assert list(hub.files(repo_id)) == [".gitattributes"]


@pytest.mark.parametrize("status", [500, 0], ids=["server-error", "dropped-connection"])
def test_client_repeats_a_failed_large_upload(hub: HubServer, ada: RemoteApi, status: int) -> None:
    repo_id = f"ada/repeated-{status}"
    ada.create_repo(repo_id)
    hub.fail_next(1, "PUT /lfs-upload/", status)
    ada.upload_file(path_or_fileobj=b"\0", path_in_repo="weights.bin", repo_id=repo_id)
    failed, repeated = requests_of(hub, "PUT /lfs-upload/")[-2:]
    assert (failed.split()[-1], repeated.split()[-1]) == (str(status), "200")
    assert hub.files(repo_id)["weights.bin"] == b"\0"


def test_stopped_hub_answers_nobody(tmp_path: Path) -> None:
    with HubServer(tokens={}) as hub:
        client = ClientProcess(hub.client_environment(tmp_path))
        api = RemoteApi(client, False)
        assert not api.repo_exists("ada/any")
    with pytest.raises(Exception, match=r"refused|disconnected"):
        api.repo_exists("ada/any")
    client.stop()


# -- what builds on the client --


def push_model_card(repo_id: str) -> str:
    from huggingface_hub import ModelCard

    card = ModelCard("---\nlicense: apache-2.0\n---\n# A card\n")
    card.validate()
    card.push_to_hub(repo_id)
    return ModelCard.load(repo_id).data.license


def test_model_card(hub: HubServer, ada: RemoteApi, client: ClientProcess) -> None:
    ada.create_repo("ada/card")
    assert client.run(push_model_card, "ada/card") == "apache-2.0"
    assert requests_of(hub, "POST /api/validate-yaml")


def push_tiny_config(repo_id: str) -> None:
    from transformers import BertConfig

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(vocab_size=16, max_position_embeddings=8, intermediate_size=8, **sizes).push_to_hub(
        repo_id, private=True
    )


def push_tiny_model(repo_id: str, seed: int) -> str:
    import torch
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    return AutoModel.from_config(AutoConfig.from_pretrained(repo_id)).push_to_hub(repo_id).oid


def load_tiny_model(repo_id: str, cache: Path, revision: str | None = None) -> tuple[str, int, float]:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(repo_id, cache_dir=cache, revision=revision)
    model = AutoModel.from_pretrained(repo_id, cache_dir=cache, revision=revision)
    return type(model).__name__, config.hidden_size, model.embeddings.word_embeddings.weight.sum().item()


def test_transformers(hub: HubServer, ada: RemoteApi, client: ClientProcess, tmp_path: Path) -> None:
    client.run(push_tiny_config, "ada/tiny")
    assert ada.model_info("ada/tiny").private is True
    first = client.run(push_tiny_model, "ada/tiny", seed=1)
    assert list(hub.files("ada/tiny")) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    name, hidden_size, first_sum = client.run(load_tiny_model, "ada/tiny", tmp_path / "first")
    assert (name, hidden_size) == ("BertModel", 8)

    hub.fail_next(1, "/commit/")
    with pytest.raises(HfHubHTTPError, match="500"):
        client.run(push_tiny_model, "ada/tiny", seed=2)
    assert ada.model_info("ada/tiny").sha == first
    assert client.run(load_tiny_model, "ada/tiny", tmp_path / "unchanged")[2] == first_sum

    client.run(push_tiny_model, "ada/tiny", seed=2)
    assert client.run(load_tiny_model, "ada/tiny", tmp_path / "second")[2] != first_sum
    assert client.run(load_tiny_model, "ada/tiny", tmp_path / "pinned", revision=first)[2] == first_sum
