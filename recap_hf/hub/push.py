"""Pushes a checkpoint or a datastore to the Hugging Face Hub, each in one commit.

Only known files are pushed: the folder of a training also has optimiser states, logs and notes.
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

from recap_hf.files import write_json
from recap_hf.modeling.configuration_recap import copy_remote_code
from recap_hf.modeling.datastore_files_recap import FORMAT_VERSION, MANIFEST_NAME
from recap_hf.modeling.processing_recap import DATASTORE_FOLDER

from .describe import describe_checkpoint
from .facts import CardFacts
from .prepare import prepare_datastore, prepare_folder, read_facts

CARD = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.json", "merges.txt")
DOCUMENTS = (CARD, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "RECORDINGS.csv")
CHECKPOINT_FILES = ("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json")
CHECKPOINT_FILES += ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
CHECKPOINT_FILES += (*(f"clap_tokenizer/{name}" for name in ("config.json", *TOKENIZER_FILES)), *TOKENIZER_FILES)
CHECKPOINT_FILES += ("chat_template.jinja", *DOCUMENTS)
_AGAIN = "Run the same command again: files that have arrived are not sent a second time."
# Files of an earlier push, which this one replaces or deletes.
CHECKPOINT_REPLACES = ("model*.safetensors", "model.safetensors.index.json", "datastore/*", "*_recap.py")
DATASTORE_REPLACES = ("data/*.parquet", "*.jsonl", "*.npy", "*.faiss", "*.bin", "*.arrow")


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Args:
        private: for repositories that do not exist yet; None takes the owner's default.
        revision: branch to push to, made if it does not exist; default: main.
        create_pr: propose the change as a pull request.
        commit_message: of the commit.
        overwrite_card: replace a README.md that the repository has.
        token: default: the one that `huggingface_hub` keeps.
    """

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    overwrite_card: bool = False
    token: str | bool | None = None


@dataclass(frozen=True)
class PushResult:
    """What a push did: the commit of huggingface_hub, the repository, and whether its README.md was kept."""

    commit: CommitInfo
    repo_id: str
    card_kept: bool = False


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    options: PushOptions | None = None,
    datastore_repo: str | None = None,
    facts: CardFacts | None = None,
) -> list[PushResult]:
    """Pushes a saved checkpoint or a saved datastore; see `push_checkpoint` and `push_datastore`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected a saved checkpoint or datastore")
    if (folder / MANIFEST_NAME).is_file():
        if datastore_repo:
            raise ValueError(f"{folder} is a datastore itself: give its repository as REPO, without --datastore-repo")
        return [push_datastore(folder, repo_id, options, facts)]
    return push_checkpoint(folder, repo_id, options, datastore_repo, facts)


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    options: PushOptions | None = None,
    datastore_repo: str | None = None,
    facts: CardFacts | None = None,
) -> list[PushResult]:
    """Pushes a checkpoint in one commit: weights, processor, remote code, datastore and card.

    Args:
        folder: what `save_pretrained` or a training wrote. Other files in it are not pushed, and its remote code is
            replaced by the package's, with a warning where they differ.
        repo_id: `user/name` of the model repository.
        options: how to push.
        datastore_repo: `user/name` of a dataset repository for the datastore, pushed first; the checkpoint then
            refers to it by id and commit. Default: the datastore goes into the checkpoint.
        facts: for the card; default: `card_facts.json` in the folder.

    Returns:
        One result for the dataset repository, if there is one, and one for the model repository.

    Raises:
        OSError: the push failed, or a file is a link that leaves the folder.
        ValueError: the folder holds no RECAP checkpoint, or no datastore where one is to be pushed.
    """
    folder, options = Path(folder), options or PushOptions()
    describe_checkpoint(folder)
    if not list(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} has no model*.safetensors: expected weights that `save_pretrained` wrote")
    source, results = folder / DATASTORE_FOLDER, []
    has_datastore = (source / MANIFEST_NAME).is_file()
    if datastore_repo and not has_datastore:
        raise ValueError(f"{folder} has no datastore to push to {datastore_repo!r}: {source} is missing")
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        copy_files(folder, stage, CHECKPOINT_FILES)
        copy_remote_code(stage)
        for path in sorted(stage.glob("*_recap.py")):
            if (folder / path.name).is_file() and (folder / path.name).read_bytes() != path.read_bytes():
                warnings.warn(f"{folder / path.name} differs from the package's file, which is pushed", stacklevel=2)
        if datastore_repo:
            pushed = push_datastore(source, datastore_repo, options)
            results.append(pushed)
            (stage / DATASTORE_FOLDER).mkdir()
            reference = {"repo_id": pushed.repo_id, "revision": pushed.commit.oid}
            manifest = {"format_version": FORMAT_VERSION, "reference": reference}
            write_json(stage / DATASTORE_FOLDER / MANIFEST_NAME, manifest)
        elif has_datastore:
            copy_files(source, stage / DATASTORE_FOLDER, datastore_files(source))
        prepare_folder(stage, repo_id, facts or read_facts(folder), source if datastore_repo else None)
        results.append(upload(stage, repo_id, "model", options, CHECKPOINT_REPLACES))
    return results


def push_datastore(
    folder: str | os.PathLike, repo_id: str, options: PushOptions | None = None, facts: CardFacts | None = None
) -> PushResult:
    """Pushes a saved datastore as a dataset repository, with Parquet files for the viewer and a card.

    Args:
        folder: what `CaptionDatastore.save_pretrained` wrote.
        repo_id: `user/name` of the dataset repository.
        options: how to push.
        facts: for the card, beyond the datastore's own metadata.

    Raises:
        OSError: the push failed, or a file is a link that leaves the folder.
        ValueError: the folder holds no datastore with files of its own.
    """
    folder, options = Path(folder), options or PushOptions()
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        copy_files(folder, stage, datastore_files(folder))
        prepare_datastore(stage, repo_id, facts or read_facts(folder))
        return upload(stage, repo_id, "dataset", options, DATASTORE_REPLACES)


def push_store(store: Any, repo_id: str, **options: Any) -> CommitInfo:
    """Saves a datastore and pushes its files; see `CaptionDatastore.push_to_hub`.

    Args:
        options: fields of `PushOptions`.
    """
    options.setdefault("commit_message", "Upload caption datastore")
    with tempfile.TemporaryDirectory() as name:
        store.save_pretrained(name)
        return upload(Path(name), repo_id, "dataset", PushOptions(**options), DATASTORE_REPLACES[1:]).commit


def datastore_files(folder: Path) -> tuple[str, ...]:
    """Names of the files of a datastore: its manifest, the files that the manifest names, card and licence."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = () if "reference" in manifest else manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of a datastore: {error!r}") from error
    return (MANIFEST_NAME, *files, *DOCUMENTS)


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copies the files whose path in `source` matches a pattern of the same depth.

    Raises:
        OSError: one of them is a symbolic link to a file outside of `source`.
    """
    allowed = [source.resolve()]
    if source.parent.name == "snapshots" or source.parent.parent.name == "snapshots":
        # The cache of huggingface_hub: a snapshot consists of links to files beside it.
        snapshots = source.parent if source.parent.name == "snapshots" else source.parent.parent
        allowed.append((snapshots.parent / "blobs").resolve())
    patterns = tuple(patterns)
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        wanted = any(name.count("/") == each.count("/") and fnmatch(name, each) for each in patterns)
        if not (wanted and path.is_file()):
            continue
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise OSError(f"{path} is a link to {path.resolve()}, outside of the folder. Replace it by a copy.")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def upload(folder: Path, repo_id: str, repo_type: str, options: PushOptions, replaces: Iterable = ()) -> PushResult:
    """Pushes all of a folder in one commit; files that the repository already has are not sent again.

    Args:
        folder: its files, with their paths.
        repo_id: `user/name`, or a name of the user whose token is used; made if it does not exist.
        repo_type: "model" or "dataset".
        options: how to push.
        replaces: patterns of files in the repository that are deleted where the folder has no such file.
    """
    api = HfApi(token=options.token, library_name="recap_hf")
    place: dict[str, Any] = {"repo_type": repo_type, "revision": options.revision}
    with hub_errors(repo_id, repo_type, options.revision):
        repo_id = api.create_repo(repo_id, repo_type=repo_type, private=options.private, exist_ok=True).repo_id
        if options.revision and not options.create_pr and not options.revision.startswith("refs/pr/"):
            api.create_branch(repo_id, repo_type=repo_type, branch=options.revision, exist_ok=True)
        card_kept = not options.overwrite_card and api.file_exists(repo_id, CARD, **place)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=[CARD] if card_kept else None,
            delete_patterns=list(replaces),
            commit_message=options.commit_message or f"Upload RECAP {repo_type}",
            create_pr=options.create_pr,
            **place,
        )
    return PushResult(commit, repo_id, card_kept and (folder / CARD).is_file())


@contextmanager
def hub_errors(repo_id: str, repo_type: str, revision: str | None = None) -> Iterator[None]:
    """Turns errors of huggingface_hub into an `OSError` of one line with the repository and what to do."""
    where = f"cannot push to the {repo_type} repository {repo_id!r} at revision {revision or 'main'!r}"
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{where}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"{where}: offline mode is on. Unset HF_HUB_OFFLINE and try again.") from error
    except HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or str(error).splitlines()[0]
        remedy = _AGAIN
        if status in (401, 403, 404):
            token = "a token is set" if get_token() else "no token is set"
            remedy = f"Check the names, and that the token may write there ({token}; hf auth login), or --create-pr."
        raise OSError(f"{where}: the Hub answered {status}: {said} {remedy}") from error
    except (HTTPError, RuntimeError) as error:
        # huggingface_hub raises a RuntimeError for an upload that failed after several tries.
        said = f"{str(error).rstrip('.')} ({error.__cause__ or type(error).__name__})."
        raise OSError(f"{where}: {said} {_AGAIN}") from error
