"""Folders to and from the Hugging Face Hub: one commit per push, and errors that say what to do.

It travels with a checkpoint, so that a model loaded by `trust_remote_code=True` pushes in the same way.
"""

from __future__ import annotations

import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

HUB_ERRORS = (HFValidationError, HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, HTTPError)
CARD = "README.md"
AGAIN = "Run the same command again: what has arrived is not sent a second time."
PREPARERS = "recap_hf.hub"
PARQUET_FOLDER = "data"
DEFAULT_SHARD_SIZE = "5GB"
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
DATASTORE_FOLDER = "datastore"
DATASTORE_FILES = (f"{PARQUET_FOLDER}/*.parquet", "*.json", "*.jsonl", "*.npy", "*.faiss", "*.bin")
PUSH_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
    "overwrite_card",
)
NEVER_PUSHED = (
    ".git/*",
    ".git*",
    ".cache/*",
    "*/__pycache__/*",
    "__pycache__/*",
    "*.pyc",
    ".DS_Store",
    "*.lock",
    "*.tmp",
    ".building*/*",
)


@dataclass
class PushResult:
    """What a push did.

    Args:
        commit: the commit, with `commit_url`, `oid` and, for a pull request, `pr_url` and `pr_revision`.
        repo_id, repo_type: where it went.
        card_kept: the repository had a card, which was left as it is.
        deleted: files of an earlier push that this one no longer has.
    """

    commit: CommitInfo
    repo_id: str
    repo_type: str
    card_kept: bool = False
    deleted: list[str] = field(default_factory=list)


@contextmanager
def hub_errors(action: str, repo_id: str, repo_type: str = "model", revision: str | None = None) -> Iterator[None]:
    """Turns the client's errors into an `OSError` that names the repository, the revision and the remedy.

    Args:
        action: what was tried, as in "cannot `action` ...": "push to", "load the datastore from".
    """
    where = f"cannot {action} the {repo_type} repository {repo_id!r} at revision {revision or 'main'!r}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{where}: {error}") from error
    except GatedRepoError as error:
        raise OSError(f"{where}: its owners grant access one by one. Ask for it on its page, then log in.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{where}: there is no such repository (nor a folder of this name), or it is private and the token in use "
            f"may not see it ({token_state()}). Check the spelling; for a private repository run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{where}: there is no such revision. Give a branch, a tag or a full commit id.") from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{where}: it is not in the local cache, and the Hub was not asked or did not answer. Unset "
            "HF_HUB_OFFLINE and check the connection, or download it once while online."
        ) from error
    except EntryNotFoundError as error:
        raise OSError(f"{where}: a file is missing there: {error}") from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"{where}: offline mode is on. Unset HF_HUB_OFFLINE and try again.") from error
    except HfHubHTTPError as error:
        raise OSError(f"{where}: {http_reason(error)}") from error
    except HTTPError as error:
        raise OSError(f"{where}: the connection failed ({type(error).__name__}: {error}). {AGAIN}") from error
    except RuntimeError as error:
        # So the client reports an upload that failed after several tries; the reason is its cause.
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise OSError(f"{where}: {str(error).rstrip('.')}{reason}. {AGAIN}") from error


@contextmanager
def loading_errors(what: str, name_or_path: str | os.PathLike, revision: str | None = None) -> Iterator[None]:
    """Explains what transformers' `from_pretrained` raises about the Hub as [`hub_errors`] does.

    Its own messages do not always name repository and revision. Errors about a local folder pass unchanged.

    Args:
        what: what is loaded ("the model").
    """
    try:
        yield
    except OSError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HUB_ERRORS):
            cause = cause.__cause__ or cause.__context__
        if cause is None or os.path.isdir(name_or_path):
            raise
        with hub_errors(f"load {what} from", str(name_or_path), "model", revision):
            raise cause from error


def token_state() -> str:
    """In words, whether a token is in use: it is taken from where `huggingface_hub` keeps it."""
    return "a token is set" if get_token() else "no token is set"


def http_reason(error: HfHubHTTPError) -> str:
    """What an answer of the Hub means for the user."""
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message") or error.server_message or str(error).splitlines()[0]
    if status == 401:
        return f"the Hub does not accept the token, or there is none ({token_state()}): {said} Run `hf auth login`."
    if status == 403:
        return (
            f"the token may not write there: {said} Log in with a token that may write to it, or propose the change "
            "as a pull request (`create_pr=True`, `--create-pr`)."
        )
    if status == 412:
        return f"somebody else has pushed in the meantime: {said} Run the same command again."
    if status >= 500:
        return f"the Hub answered {status}: {said} Try later. {AGAIN}"
    return f"the Hub answered {status}: {said}"


def full_repo_id(repo_id: str, token: str | bool | None = None) -> str:
    """`user/name` for an id; for a name alone, the user is the one whose token is in use.

    Raises:
        OSError: there is no token that tells.
    """
    if "/" in repo_id:
        return repo_id
    with hub_errors("find the owner of", repo_id):
        try:
            return f"{HfApi(token=token, library_name='recap_hf').whoami()['name']}/{repo_id}"
        except LocalTokenNotFoundError as error:
            raise OSError(
                f"{repo_id!r} names no user and no token is set: give user/name, or run `hf auth login`"
            ) from error


def files_to_push(folder: str | os.PathLike) -> dict[str, Path]:
    """The files of a folder by their path in the repository, sorted; hidden and temporary ones left out."""
    folder = Path(folder)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path for name, path in found.items() if not any(fnmatch.fnmatch(name, each) for each in NEVER_PUSHED)
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path in a repository matches a pattern of the same depth: `*.json` names no file in a subfolder."""
    return any(name.count("/") == each.count("/") and fnmatch.fnmatch(name, each) for each in patterns)


def commit_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload with recap_hf",
    commit_description: str | None = None,
    token: str | bool | None = None,
    overwrite_card: bool = False,
    replaces: Iterable[str] = (),
) -> PushResult:
    """Pushes a folder in one commit: all of it becomes visible, or nothing does.

    Files that the repository has already are not sent; a push that was cut off goes on where it stopped, file by
    file, when it is run again.

    Args:
        folder: everything in it is pushed, with its subfolders.
        repo_id: `user/name`; made if it does not exist.
        repo_type: "model" or "dataset".
        private: for a repository that does not exist yet; None takes the owner's default.
        revision: branch, made if it does not exist; the main branch by default.
        create_pr: propose the change as a pull request.
        token: by default the one that `huggingface_hub` keeps (`hf auth login`, `HF_TOKEN`).
        overwrite_card: replace a README.md that the repository has.
        replaces: patterns of files that this push stands in for: those that only the repository has are deleted.

    Raises:
        OSError: the push failed; the message names repository, revision and remedy.
        ValueError: `folder` holds nothing, or `repo_id` is not one.
    """
    files = files_to_push(folder)
    if not files:
        raise ValueError(f"{folder} holds no file to push")
    api = HfApi(token=token, library_name="recap_hf")
    with hub_errors("push to", repo_id, repo_type, revision):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, repo_type=repo_type, revision=revision))
        card_kept = CARD in files and CARD in there and not overwrite_card
        if card_kept:
            del files[CARD]
        patterns = tuple(replaces)
        deleted = sorted(name for name in there - set(files) - {CARD, ".gitattributes"} if matches(name, patterns))
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in deleted),
            ],
            commit_message=commit_message,
            commit_description=commit_description,
            repo_type=repo_type,
            revision=revision,
            create_pr=create_pr,
        )
    return PushResult(commit, repo_id, repo_type, card_kept, deleted)


def fetch_folder(
    repo_id: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    subfolder: str = "",
    action: str = "load from",
    either: bool = False,
    **kwargs: Any,
) -> Path:
    """Downloads a repository, or one folder of it, into the usual cache and returns the local folder.

    Args:
        revision: branch, tag or commit id; the main branch by default.
        subfolder: only this folder.
        action: for the error message.
        either: for the error message, a dataset repository has been tried before.
        kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `ignore_patterns` of
            `huggingface_hub.snapshot_download`.

    Raises:
        OSError: it cannot be had; the message names repository, revision and remedy.
    """
    patterns = [f"{subfolder}/*"] if subfolder else None
    with hub_errors(action, repo_id, "dataset or model" if either else repo_type, revision):
        folder = snapshot_download(
            repo_id, repo_type=repo_type, revision=revision, allow_patterns=patterns, library_name="recap_hf", **kwargs
        )
    return Path(folder, subfolder)


def fetch_datastore(
    repo_id: str, *, repo_type: str | None = None, revision: str | None = None, subfolder: str = "", **kwargs: Any
) -> Path:
    """Downloads a datastore into the usual cache and returns its local folder.

    Args:
        repo_id: id of a dataset repository that is a datastore, or of a model repository that has one inside.
        repo_type: "dataset" or "model"; None tries both, in this order.
        revision: branch, tag or commit id; the main branch by default.
        subfolder: the folder inside; for a model "datastore" by default.
        kwargs: see [`fetch_folder`].

    Raises:
        OSError: it cannot be had; the message names repository, revision and remedy.
    """
    if Path(repo_id).is_file():
        raise NotADirectoryError(
            f"{repo_id}: a file, not the folder of a datastore. Make one of its captions: recap datastore build."
        )
    action = "load a datastore from"
    if repo_type != "model":
        # The Parquet files are for the viewer and `load_dataset`; the datastore does not read them.
        options = {"revision": revision, "subfolder": subfolder, "ignore_patterns": [f"{PARQUET_FOLDER}/*"], **kwargs}
        try:
            return fetch_folder(repo_id, repo_type="dataset", action=action, **options)
        except OSError as error:
            if repo_type == "dataset" or not is_absent(error.__cause__):
                raise
    options = {"revision": revision, "subfolder": subfolder or DATASTORE_FOLDER, **kwargs}
    return fetch_folder(repo_id, repo_type="model", action=action, either=repo_type is None, **options)


def is_absent(error: BaseException | None) -> bool:
    """Whether an error says that a repository is not there (online) or not in the cache (offline)."""
    absent = (RepositoryNotFoundError, LocalEntryNotFoundError)
    return isinstance(error, absent) and not isinstance(error, GatedRepoError)


def take_push_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments of [`HubPushMixin.push_to_hub`] out of those of a `save_pretrained`."""
    return {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}


def prepare_folder(folder: str | os.PathLike, repo_id: str, repo_type: str, tags: list[str] | None = None) -> None:
    """Adds what a repository should have beside the saved files: a card, and for a datastore its Parquet files.

    An installed `recap_hf` does it; where the package is not installed, nothing is added.
    """
    for entry in entry_points(group=PREPARERS):
        try:
            prepare: Callable[..., None] = entry.load()
        except ImportError:
            continue
        prepare(folder, repo_id, repo_type, tags=tags)
        return


class HubPushMixin:
    """`push_to_hub` in one commit for what has a `save_pretrained`; stands before transformers' own mixin.

    `hub_name` is what the object is called in a commit message, `hub_repo_type` the kind of its repository, and
    `hub_files` are the patterns of the files that a push replaces as a whole.
    """

    hub_name = "files"
    hub_repo_type = "model"
    hub_files: tuple[str, ...] = ()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = DEFAULT_SHARD_SIZE,
        tags: list[str] | None = None,
        overwrite_card: bool = False,
    ) -> CommitInfo:
        """Saves the object and pushes it in one commit, with the code that it needs.

        Args:
            repo_id: `user/name`; made if it does not exist.
            commit_message, commit_description: of the commit.
            private: for a repository that does not exist yet.
            token: by default the one that `huggingface_hub` keeps.
            revision: branch to push to, made if it does not exist.
            create_pr: propose the change as a pull request.
            max_shard_size: weights above this size are split into several files.
            tags: added to a newly written card.
            overwrite_card: replace a README.md that the repository has.

        Raises:
            OSError: the push failed; the message names repository, revision and remedy.
        """
        repo_id = full_repo_id(repo_id, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_for_hub(folder, max_shard_size)
            prepare_folder(folder, repo_id, self.hub_repo_type, tags)
            result = commit_folder(
                folder,
                repo_id,
                repo_type=self.hub_repo_type,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {self.hub_name}",
                commit_description=commit_description,
                overwrite_card=overwrite_card,
                replaces=self.hub_files,
            )
        return result.commit

    def push_saved(self, save_directory: str | os.PathLike, options: dict[str, Any]) -> None:
        """What `save_pretrained(..., push_to_hub=True)` does after saving: only this object goes to the Hub, not what
        else the folder holds. `options` are arguments of [`push_to_hub`], `repo_id` by default the folder's name."""
        options = dict(options)
        self.push_to_hub(options.pop("repo_id", None) or Path(save_directory).resolve().name, **options)

    def save_for_hub(self, folder: str, max_shard_size: int | str | None) -> None:
        """Saves the object as it is to be pushed."""
        self.save_pretrained(folder)


__all__ = [
    "CARD",
    "DATASTORE_FILES",
    "DATASTORE_FOLDER",
    "DEFAULT_SHARD_SIZE",
    "PARQUET_FOLDER",
    "WEIGHT_FILES",
    "HubPushMixin",
    "PushResult",
    "commit_folder",
    "fetch_datastore",
    "fetch_folder",
    "files_to_push",
    "full_repo_id",
    "hub_errors",
    "loading_errors",
    "matches",
    "prepare_folder",
    "take_push_options",
]
