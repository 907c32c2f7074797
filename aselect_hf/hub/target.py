"""Write to a Hub repository by one commit, which keeps text that people wrote and removes outdated files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from aselect_hf.hub.card_merge import merge_cards
from aselect_hf.hub.examples import PICTURES
from aselect_hf.hub.upload import Upload

REPLACED = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "selection.json",
    "selection.png",
    "audit.json",
    "audit.png",
    "training.json",
    "notebook.ipynb",
    ".eval_results/aselect-*.yaml",
    PICTURES,
)
"""Files that describe the previous model: a push removes those that it does not replace."""
COMMIT_MESSAGE = "Push model with aselect-hf"


class PushError(OSError):
    """The Hub refused a push, or the connection broke."""


@dataclass
class PushTarget:
    """Where and how to push: checked against the server first, then written by one commit.

    Args:
        repo_id: Repository, as `user/name`, or `name` in your own namespace.
        private: Visibility of a new repository; an existing one must already have it (default: your account's).
        revision: Branch to push to; created if missing (default: the main branch).
        tag: Tag for the commit, such as `v1.0`; it must not exist yet.
        create_pr: Open a pull request instead of committing to the branch.
        commit_message: Title of the commit (default: Push model with aselect-hf).
        token: Token for the Hub (default: the one you logged in with).

    Raises:
        ValueError: an argument is wrong.
        PushError: the Hub does not know who you are.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    tag: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        validate_repo_id(self.repo_id)
        if self.tag and self.create_pr:
            raise ValueError("tag and create_pr cannot be combined: tag the commit after the pull request is merged")
        self.api = HfApi(token=self.token)
        with self.errors():
            user = self.api.whoami()["name"]
        if "/" not in self.repo_id:
            self.repo_id = f"{user}/{self.repo_id}"

    def commit(self, upload: Upload, local_card: Path | None = None) -> CommitInfo:
        """Push the files; `local_card` is merged into the card if the repository has none yet."""
        with self.errors():
            parent = self._prepare_repository()
            present = self.api.list_repo_files(self.repo_id, revision=parent)
            card = self._merge_card(upload.card, parent, local_card)
            files = upload.files | {"README.md": str(card).encode()}
            stale = [path for path in present if path not in files and _is_replaced(path)]
            commit = self.api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationAdd(path, content) for path, content in files.items()),
                    *(CommitOperationDelete(path) for path in stale),
                ],
                commit_message=self.commit_message or COMMIT_MESSAGE,
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=parent,
            )
        if self.tag:
            with self.errors(f"{commit.commit_url} was pushed, but tag {self.tag!r} could not be created"):
                self.api.create_tag(self.repo_id, tag=self.tag, revision=commit.oid)
        return commit

    def _prepare_repository(self) -> str:
        """The commit to build on, in a repository and branch that are created if missing."""
        try:
            info = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo_id, private=self.private)
            info = self.api.model_info(self.repo_id)
        if self.private is not None and bool(info.private) != self.private:
            visibility = "private" if info.private else "public"
            raise ValueError(
                f"private={self.private}, but {self.repo_id} is already {visibility}: change that in its settings"
            )
        if self.tag and self.tag in {ref.name for ref in self.api.list_repo_refs(self.repo_id).tags}:
            raise ValueError(f"tag {self.tag!r} already exists in {self.repo_id}")
        if self.revision is None:
            return str(info.sha)
        try:
            return str(self.api.model_info(self.repo_id, revision=self.revision).sha)
        except RevisionNotFoundError:
            self.api.create_branch(self.repo_id, branch=self.revision)
            return str(info.sha)

    def _merge_card(self, card: ModelCard, parent: str, local_card: Path | None) -> ModelCard:
        """Merge the new card with the one on the Hub or, if absent, the one beside the model."""
        with TemporaryDirectory() as folder:
            try:
                path = Path(self.api.hf_hub_download(self.repo_id, "README.md", revision=parent, local_dir=folder))
            except RemoteEntryNotFoundError:
                if local_card is None or not local_card.is_file():
                    return card
                path = local_card
            try:
                present = ModelCard.load(path, ignore_metadata_errors=True)
            except (yaml.YAMLError, ValueError) as error:
                where = "beside the model" if path == local_card else f"in {self.repo_id}"
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"README.md {where} has broken metadata: repair it, then push again ({reason})"
                ) from error
            return merge_cards(card, present)

    @contextmanager
    def errors(self, what: str = "") -> Iterator[None]:
        """Turn the errors of the Hub's client into one clear line."""
        what = what or f"push to {self.repo_id} failed"
        try:
            yield
        except LocalTokenNotFoundError as error:
            raise PushError(f"{what}: no token; log in with `hf auth login`, or pass token") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            reason = error.server_message or str(error).strip().splitlines()[0]
            hint = {
                401: "; the token is invalid: log in with `hf auth login`, or pass token",
                403: "; this token may not write there: use one with write access, or create_pr",
                412: "; someone else committed in the meantime: push again",
            }.get(status, "")
            raise PushError(f"{what} ({status}): {reason}{hint}") from error
        except (HTTPError, ConnectionError, RuntimeError) as error:  # RuntimeError: a large file was not uploaded
            raise PushError(f"{what}: {str(error).strip().splitlines()[-1]}") from error


def _is_replaced(path: str) -> bool:
    """Whether a file describes the previous model; files in other folders belong to people."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in REPLACED)
