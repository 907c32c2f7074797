"""Push a feature set to the Hub as a data set."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from aselect_hf.data.feature_set import RECORD, FeatureSet
from aselect_hf.files import as_path, read_json
from aselect_hf.hub.target import PushTarget

SHARDS = "features-*.parquet"
CARD = """---
configs:
- config_name: default
  data_files:
  - split: {split}
    path: {shards}
---
# Features of {data}

{images:,} images, by {model}, in {dtype}. `{record}` says how each column was computed.

{columns}

```python
from datasets import load_dataset

load_dataset("{repo_id}", split="{split}")
```
"""


def push_features(folder: str | Path, repo_id: str, **target: Any) -> str:
    """Push a complete feature set (`write_feature_set`) to a data set repository, in one commit, and return its URL.

    Shards of an earlier push are replaced. The repository's card is kept; one is written if there is none.

    Args:
        target: `private`, `revision`, `create_pr`, `commit_message` and `token`, see `PushTarget`.

    Raises:
        ValueError: the folder holds no feature set, or shards are missing.
        PushError: the Hub refused, or the connection broke.
    """
    folder = as_path(folder)
    try:
        record = read_json(folder / RECORD)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no feature set ({error})") from error
    present = len(list(folder.glob(SHARDS)))
    if present != record["num_shards"]:
        raise ValueError(
            f"{folder} has {present} of {record['num_shards']} shards: run the same command again, then push"
        )
    place = PushTarget(repo_id, **target)
    repository: dict[str, Any] = {"repo_id": place.repo_id, "repo_type": "dataset"}
    with place.errors():
        place.api.create_repo(**repository, private=place.private, exist_ok=True)
        if place.revision:
            place.api.create_branch(**repository, branch=place.revision, exist_ok=True)
        on_hub = place.api.list_repo_files(**repository, revision=place.revision)
        files = [*sorted(folder.glob(SHARDS)), folder / RECORD]
        operations: list[Any] = [CommitOperationAdd(path.name, path) for path in files]
        if "README.md" not in on_hub:
            counted = record | {"images": FeatureSet(folder, record).num_images}
            operations.append(CommitOperationAdd("README.md", _card(counted, place.repo_id).encode()))
        names = {path.name for path in files}
        operations += [CommitOperationDelete(name) for name in on_hub if fnmatch(name, SHARDS) and name not in names]
        commit = place.api.create_commit(
            **repository,
            operations=operations,
            revision=place.revision,
            create_pr=place.create_pr,
            commit_message=place.commit_message or "Push features with aselect-hf",
        )
    return str(commit.pr_url or commit.commit_url)


def _card(record: dict[str, Any], repo_id: str) -> str:
    columns = "\n".join(
        f"- `{name}`: {each['feature']} at t = {each['timestep']} (sigma {each['sigma']:.4g}), {each['shape']}"
        for name, each in record["columns"].items()
    )
    return CARD.format(**record | {"columns": columns, "record": RECORD, "shards": SHARDS, "repo_id": repo_id})
