"""Pushing a model to the Hub: everything is prepared first, then one commit makes all of it visible, or nothing.

A repository gets the weights (safetensors only), config, remote code and image processor that `save_model` writes, the
card, the selection and its audit with their pictures, the results in both formats of the Hub, the training record and
a `handler.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from transformers import PreTrainedModel

from aselect_hf.audit import Audit
from aselect_hf.conversion import save_model
from aselect_hf.files import as_path, disk_errors
from aselect_hf.hub.card_merge import merge_cards
from aselect_hf.hub.examples import PICTURES, load_examples, may_share
from aselect_hf.hub.upload import Results, Upload, prepare_folder, prepare_upload
from aselect_hf.selection import TimestepSelection

REPLACED = (
    "model*.safetensors", "model.safetensors.index.json", "selection.json", "selection.png", "audit.json",
    "audit.png", "training.json", ".eval_results/aselect-*.yaml", PICTURES,
)  # fmt: skip
"""Files that describe the model before: a push that does not bring them anew removes them from the repository."""


class PushError(OSError):
    """The Hub refused a push, or the connection broke: the repository shows nothing of it."""


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    selection: TimestepSelection | None = None,
    results: Results | None = None,
    dataset: str | None = None,
    training: dict[str, Any] | None = None,
    audit: Audit | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push a model with all that tells its story, in one commit.

    A repository that exists is updated: what people wrote in its card outside the generated parts is kept.

    Args:
        model: any model of this package.
        repo_id: `"user/name"`, or `"name"` in your own namespace.
        selection: how the timestep was chosen, after `selection.apply(model)`; default what the config remembers.
        results: a `Comparison`, or a list of `aselect_hf.hub.EvaluationResult`.
        dataset: Hub id of the data set of the comparison: its figure then enters the metadata.
        training: record of a training run, as the training scripts write to `training.json`.
        audit: of the model's timestep, by `aselect_hf.audit.audit_timestep`.
        license: Hub identifier; default that of the base model, and never a freer one.
        private: visibility of a new repository; an existing one must already have it.
        revision: branch to push to; created where missing.
        tag: name for the commit, such as `"v1.0"`; must not exist yet.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: title of the commit.
        token: default the one you are logged in with.

    Returns:
        The commit: `.commit_url`, `.oid`, and for a pull request `.pr_url`.

    Raises:
        ValueError: an argument is wrong, the license is freer than the base model's, the tag exists, or the repository
            does not have the visibility asked for.
        PushError: the Hub refused, or the connection broke.
    """
    target = _Target(repo_id, revision, tag, create_pr, token)
    with TemporaryDirectory() as folder:
        with disk_errors(f"the copy to push, in {folder} (another place: set TMPDIR),"):
            save_model(model, folder)  # type: ignore[arg-type]
        upload = prepare_upload(
            folder, target.repo_id, selection=selection, results=results, dataset=dataset, training=training,
            audit=audit, license=license,
        )  # fmt: skip
        return target.commit(upload, private, commit_message)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    dataset: str | None = None,
    audit: Audit | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    examples: bool | None = None,
) -> CommitInfo:
    """Push a saved model, with the `selection`, `compare`, `results`, `training` and `audit` `.json` beside it.

    Args:
        folder: what `save_pretrained`, `aselect select --save-model` or a training script wrote. Nothing else in it is
            pushed, and its `README.md` takes part where the repository has no card yet.
        audit: default the folder's.
        examples: whether the example pictures of a training go along, with the model's answers; default: if they are of
            a data set on the Hub that is public and whose license permits it.

    Other arguments, result and errors as in `push_to_hub`.
    """
    target = _Target(repo_id, revision, tag, create_pr, token)
    if examples is None:
        found = load_examples(as_path(folder))
        examples = found is not None and may_share(found["dataset"], target.api)
    upload = prepare_folder(folder, target.repo_id, dataset=dataset, audit=audit, license=license, examples=examples)
    return target.commit(upload, private, commit_message, as_path(folder) / "README.md")


class _Target:
    """A place on the Hub to push to: checked against the server first, then written by one commit."""

    def __init__(self, repo_id: str, revision: str | None, tag: str | None, create_pr: bool, token: str | None) -> None:
        validate_repo_id(repo_id)
        if tag and create_pr:
            raise ValueError("tag and create_pr exclude each other: tag the commit once the pull request is merged")
        self.api, self.revision, self.tag, self.create_pr = HfApi(token=token), revision, tag, create_pr
        self.repo_id = repo_id
        with self._errors():
            user = self.api.whoami()["name"]
        if "/" not in repo_id:
            self.repo_id = f"{user}/{repo_id}"

    def commit(
        self, upload: Upload, private: bool | None, commit_message: str | None, local_card: Path | None = None
    ) -> CommitInfo:
        with self._errors():
            parent = self._prepare_repository(private)
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
                commit_message=commit_message or "Push model with aselect-hf",
                revision=self.revision,
                create_pr=self.create_pr,
                parent_commit=parent,
            )
        if self.tag:
            with self._errors(f"{commit.commit_url} was pushed, but tag {self.tag!r} could not be created"):
                self.api.create_tag(self.repo_id, tag=self.tag, revision=commit.oid)
        return commit

    def _prepare_repository(self, private: bool | None) -> str:
        """The commit to build on, in a repository (and branch) that is created where missing."""
        try:
            info = self.api.model_info(self.repo_id)
        except RepositoryNotFoundError:
            self.api.create_repo(self.repo_id, private=private)
            info = self.api.model_info(self.repo_id)
        if private is not None and bool(info.private) != private:
            visibility = "private" if info.private else "public"
            raise ValueError(
                f"private={private}, but {self.repo_id} exists and is {visibility}: change it in its settings"
            )
        if self.tag and self.tag in {ref.name for ref in self.api.list_repo_refs(self.repo_id).tags}:
            raise ValueError(f"tag {self.tag!r} exists already in {self.repo_id}")
        if self.revision is None:
            return str(info.sha)
        try:
            return str(self.api.model_info(self.repo_id, revision=self.revision).sha)
        except RevisionNotFoundError:
            self.api.create_branch(self.repo_id, branch=self.revision)
            return str(info.sha)

    def _merge_card(self, card: ModelCard, parent: str, local_card: Path | None) -> ModelCard:
        """The new card with what people wrote into the one on the Hub or, where there is none, beside the model."""
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
    def _errors(self, what: str = "") -> Iterator[None]:
        """One clear line for whatever the client raises."""
        what = what or f"push to {self.repo_id} failed"
        try:
            yield
        except LocalTokenNotFoundError as error:
            raise PushError(f"{what}: no token; log in with `hf auth login`, or pass token") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            reason = error.server_message or str(error).strip().splitlines()[0]
            hint = {
                401: "; the token is not valid: log in with `hf auth login`, or pass token",
                403: "; this token may not write there: use one with write access, or create_pr",
                412: "; somebody else has committed meanwhile: push again",
            }.get(status, "")
            raise PushError(f"{what} ({status}): {reason}{hint}") from error
        except (HTTPError, ConnectionError, RuntimeError) as error:  # RuntimeError: a large file that did not get there
            raise PushError(f"{what}: {str(error).strip().splitlines()[-1]}") from error


def _is_replaced(path: str) -> bool:
    """Whether a file of the repository describes the model before; those in other folders are somebody's own."""
    return any(fnmatch(path, pattern) and path.count("/") == pattern.count("/") for pattern in REPLACED)
