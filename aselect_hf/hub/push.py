"""Push a model to the Hub: everything is prepared first, then a single commit publishes it.

A repository gets the weights (safetensors only), config, remote code and image processor that `save_model` writes, the
card, the selection and its audit with their pictures, the results in both formats of the Hub, the training record, a
`handler.py` and a notebook.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo

from aselect_hf.audit import Audit
from aselect_hf.conversion import save_model
from aselect_hf.files import as_path, disk_errors
from aselect_hf.hub.examples import load_examples, may_share
from aselect_hf.hub.licenses import check_base_license
from aselect_hf.hub.space import push_space
from aselect_hf.hub.target import PushTarget
from aselect_hf.hub.upload import Results, prepare_folder, prepare_upload, read_config
from aselect_hf.modeling.noisy_pretrained import NoisyPreTrainedModel
from aselect_hf.selection import TimestepSelection


def push_to_hub(
    model: NoisyPreTrainedModel,
    repo_id: str,
    *,
    selection: TimestepSelection | None = None,
    results: Results | None = None,
    dataset: str | None = None,
    training: dict[str, Any] | None = None,
    audit: Audit | None = None,
    license: str | None = None,
    accept_base_license: bool = False,
    **target: Any,
) -> CommitInfo:
    """Push a model with its card, selection, audit and results, in one commit.

    An existing repository is updated. Text in its card outside of the generated parts is kept.

    Args:
        repo_id: `"user/name"`, or `"name"` in your own namespace.
        selection: how the timestep was chosen, after `selection.apply(model)` (default: the config's).
        results: a `Comparison`, or a list of `aselect_hf.hub.EvaluationResult`.
        dataset: Hub id of the data set of the comparison, whose figure is then added to the metadata.
        training: record of a training run, as in a training script's `training.json`.
        audit: of the model's timestep, by `aselect_hf.audit.audit_timestep`.
        license: Hub identifier of a license no less restrictive than the base model's (default: the latter).
        accept_base_license: you have read the license of the base model, and it permits you to publish these weights.
            Needed if it is gated, non-commercial, forbids changed versions, or is not a common one.
        target: `private`, `revision`, `tag`, `create_pr`, `commit_message` and `token`, see `PushTarget`.

    Returns:
        The commit: `.commit_url`, `.oid`, and for a pull request `.pr_url`.

    Raises:
        TypeError: an unknown argument.
        ValueError: an argument is wrong, the license is less restrictive than the base model's or needs to be accepted,
            the tag exists, or the
            repository does not have the requested visibility.
        PushError: the Hub refused, or the connection broke.
    """
    check_base_license(model.config, accept_base_license)
    place = PushTarget(repo_id, **target)
    with TemporaryDirectory() as folder:
        with disk_errors(f"the copy to push, in {folder} (set TMPDIR to move it),"):
            save_model(model, folder)
        upload = prepare_upload(
            folder,
            place.repo_id,
            selection=selection,
            results=results,
            dataset=dataset,
            training=training,
            audit=audit,
            license=license,
        )
        return place.commit(upload)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    dataset: str | None = None,
    audit: Audit | None = None,
    license: str | None = None,
    examples: bool | None = None,
    accept_base_license: bool = False,
    space: bool = False,
    **target: Any,
) -> CommitInfo:
    """Push a saved model, with the `selection`, `compare`, `results`, `training` and `audit` `.json` beside it.

    Args:
        folder: what `save_pretrained`, `aselect select --save-model` or a training script wrote. Nothing else in it is
            pushed. Its `README.md` is merged if the repository has no card yet.
        audit: of the model's timestep (default: the folder's).
        examples: whether to push the example pictures of a training, with the model's answers (default: if they are of
            a public data set on the Hub whose license permits it).
        space: also create or update the Space of the same id, a page that shows the model, see `space.py`.

    Other arguments, result and errors are those of `push_to_hub`.
    """
    place = PushTarget(repo_id, **target)
    if space and place.create_pr:
        raise ValueError("space and create_pr cannot be combined: the Space shows the model of the main branch")
    if examples is None:
        found = load_examples(as_path(folder))
        examples = found is not None and may_share(found["dataset"], place.api)
    upload = prepare_folder(
        folder, place.repo_id, dataset=dataset, audit=audit, license=license, examples=examples, space=space
    )
    check_base_license(read_config(as_path(folder)), accept_base_license)
    commit = place.commit(upload, as_path(folder) / "README.md")
    if space:
        push_space(place, upload.card.data.get("license"))
    return commit
