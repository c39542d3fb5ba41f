"""Datastores on the Hub: downloaded, and uploaded in one commit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def fetch_datastore(
    repo_id: str, *, repo_type: str | None = None, revision: str | None = None, subfolder: str = "", **kwargs: Any
) -> Path:
    """Downloads a datastore into the cache of huggingface_hub and returns its local folder.

    Args:
        repo_id: id of a dataset repository that is a datastore, or of a model repository that contains one.
        repo_type: "dataset" or "model"; None tries both, in this order.
        revision: branch, tag or commit id; default: main.
        subfolder: the folder inside; default: the root of a dataset, "datastore" of a model.
        kwargs: `token`, `cache_dir`, `local_files_only` and other arguments of `huggingface_hub.snapshot_download`.

    Raises:
        OSError: it cannot be downloaded; the message names repository, revision and what to do.
    """
    if Path(repo_id).is_file():
        raise NotADirectoryError(
            f"{repo_id}: a file, not the folder of a datastore. Make one of its captions: recap datastore build."
        )
    kinds = (repo_type,) if repo_type else ("dataset", "model")
    where = f"cannot load a datastore from the {' or '.join(kinds)} repository {repo_id!r}, revision "
    where += repr(revision or "main")
    for kind in kinds:
        inside = subfolder or ("datastore" if kind == "model" else "")
        patterns = [f"{inside}/*"] if inside else None
        options = {"repo_type": kind, "revision": revision, "allow_patterns": patterns, **kwargs}
        try:
            # The Parquet files are for the viewer; the datastore does not read them.
            return Path(snapshot_download(repo_id, ignore_patterns=["data/*"], **options), inside)
        except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
            if kind != kinds[-1] and not isinstance(error, GatedRepoError):
                continue
            remedy = "Check the spelling; for a private or gated repository run `hf auth login`."
            if isinstance(error, LocalEntryNotFoundError):
                remedy = "It is not in the local cache: check the connection and HF_HUB_OFFLINE."
            raise OSError(f"{where}: not found. {remedy}") from error
        except RevisionNotFoundError as error:
            raise OSError(f"{where}: no such revision. Give a branch, a tag or a full commit id.") from error
        except HFValidationError as error:
            raise OSError(f"{where}: neither a folder nor a valid repository id. {error}") from error
        except (HfHubHTTPError, HTTPError) as error:
            raise OSError(f"{where}: {str(error).splitlines()[0]}") from error
    raise AssertionError("unreachable: the last kind returns or raises")


def upload_datastore(folder: str | os.PathLike, repo_id: str, **options: Any) -> CommitInfo:
    """Pushes the files of a datastore in one commit, and deletes those of an earlier push.

    Args:
        options: see `CaptionDatastore.push_to_hub`.
    """
    api = HfApi(token=options.get("token"))
    place = {"repo_id": repo_id, "repo_type": "dataset"}
    place["repo_id"] = api.create_repo(**place, private=options.pop("private", None), exist_ok=True).repo_id
    if options.get("revision") and not options.get("create_pr"):
        api.create_branch(**place, branch=options["revision"], exist_ok=True)
    options.setdefault("commit_message", "Upload caption datastore")
    patterns = ["*.jsonl", "*.npy", "*.faiss", "*.bin", "*.arrow"]
    return api.upload_folder(**place, folder_path=folder, delete_patterns=patterns, **options)


__all__ = ["fetch_datastore", "upload_datastore"]
