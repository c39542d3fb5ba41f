"""`recap push`: a whole checkpoint or a datastore to the Hub, each in one commit."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .facts import FACTS_FILE, CardFacts
from .prepare import prepare_folder

if TYPE_CHECKING:
    from recap_hf.modeling.hub_recap import PushResult

LINKED_FROM_BYTES = 1_000_000
# A folder of a training also holds optimiser states, logs and intermediate checkpoints: those stay at home.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "clap_tokenizer/*",
    "*_recap.py",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "RECORDINGS.csv",
    "report.json",
    FACTS_FILE,
    "*.png",
)


@dataclass(frozen=True)
class PushOptions:
    """How to push.

    Args:
        private: for repositories that do not exist yet.
        revision: branch to push to, made if it does not exist.
        create_pr: propose the change as a pull request.
        commit_message: of the commit.
        overwrite_card: replace a README.md that the repository has.
        max_shard_size: weights above this size are split into several files.
        token: by default the one that `huggingface_hub` keeps.
    """

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    overwrite_card: bool = False
    max_shard_size: str | int = "5GB"
    token: str | bool | None = None


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    options: PushOptions | None = None,
    datastore_repo: str | None = None,
    facts: CardFacts | None = None,
) -> list[PushResult]:
    """Pushes a saved checkpoint, or a saved datastore, whichever the folder holds; see the two functions below."""
    from recap_hf.modeling.retrieval_recap import MANIFEST_NAME

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
    """Pushes a checkpoint in one commit: weights, processor, travelling code, datastore and card.

    Args:
        folder: what `save_checkpoint` or a training wrote. Optimiser states, logs and the like are left out.
        repo_id: `user/name` of the model repository.
        options: how to push.
        datastore_repo: `user/name` of a dataset repository for the datastore, pushed first; the checkpoint then
            refers to it by id and commit. By default the datastore goes into the checkpoint.
        facts: what the card is to say; by default what `card_facts.json` in the folder holds.

    Returns:
        What was done: for the dataset repository, if there is one, and for the model repository.

    Raises:
        OSError: a push failed; the message names repository, revision and remedy.
        ValueError: the folder holds no RECAP checkpoint, or no datastore where one is to be pushed.
    """
    from recap_hf.modeling.hub_recap import DATASTORE_FOLDER, WEIGHT_FILES, commit_folder, full_repo_id
    from recap_hf.modeling.retrieval_recap import MANIFEST_NAME

    from .describe import describe_checkpoint

    folder, options = Path(folder), options or PushOptions()
    describe_checkpoint(folder)
    repo_id = full_repo_id(repo_id, options.token)
    results = []
    with staged_checkpoint(folder, options) as stage:
        source = folder / DATASTORE_FOLDER
        if datastore_repo:
            if not (source / MANIFEST_NAME).is_file():
                raise ValueError(f"{folder} has no datastore to push to {datastore_repo!r}: {source} is missing")
            results.append(push_datastore(source, datastore_repo, options))
            refer_to_datastore(stage / DATASTORE_FOLDER, results[0])
        prepare_folder(stage, repo_id, facts=facts, datastore_folder=source if datastore_repo else None)
        results.append(
            commit_folder(
                stage,
                repo_id,
                replaces=(*WEIGHT_FILES, f"{DATASTORE_FOLDER}/*", "*_recap.py"),
                **commit_arguments(options, "Upload RECAP checkpoint"),
            )
        )
    return results


def push_datastore(
    folder: str | os.PathLike,
    repo_id: str,
    options: PushOptions | None = None,
    facts: CardFacts | None = None,
) -> PushResult:
    """Pushes a saved datastore as a dataset repository, with Parquet files and a card.

    Args:
        folder: what `CaptionDatastore.save_pretrained` wrote.
        repo_id: `user/name` of the dataset repository.
        options: how to push.
        facts: what the card is to say beyond the datastore's own metadata.

    Raises:
        OSError: the push failed; the message names repository, revision and remedy.
    """
    from recap_hf.modeling.hub_recap import DATASTORE_FILES, commit_folder, full_repo_id

    options = options or PushOptions()
    repo_id = full_repo_id(repo_id, options.token)
    with tempfile.TemporaryDirectory() as stage:
        copy_files(Path(folder), Path(stage), datastore_files(Path(folder)))
        prepare_folder(stage, repo_id, "dataset", facts=facts)
        return commit_folder(
            stage,
            repo_id,
            repo_type="dataset",
            replaces=DATASTORE_FILES,
            **commit_arguments(options, "Upload caption datastore"),
        )


def datastore_files(folder: Path) -> tuple[str, ...]:
    """The files of a datastore: those that its manifest names, the manifest, and what its owner wrote about it."""
    from recap_hf.modeling.retrieval_recap import MANIFEST_NAME

    path = folder / MANIFEST_NAME
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the description of a datastore with files of its own ({error!r})") from error
    return (*files, MANIFEST_NAME, "README.md", "LICENSE*", FACTS_FILE)


def datastore_in_checkpoint(folder: Path) -> tuple[str, ...]:
    """The files of the datastore inside a checkpoint: its own, or those of a reference to another repository."""
    from recap_hf.modeling.hub_recap import DATASTORE_FOLDER
    from recap_hf.modeling.retrieval_recap import MANIFEST_NAME

    manifest = folder / DATASTORE_FOLDER / MANIFEST_NAME
    if not manifest.is_file():
        return ()
    is_reference = "reference" in json.loads(manifest.read_text(encoding="utf-8"))
    names = (MANIFEST_NAME,) if is_reference else datastore_files(manifest.parent)
    return tuple(f"{DATASTORE_FOLDER}/{name}" for name in names)


def commit_arguments(options: PushOptions, message: str) -> dict:
    """The options as arguments of `commit_folder`."""
    return {
        "private": options.private,
        "revision": options.revision,
        "create_pr": options.create_pr,
        "commit_message": options.commit_message or message,
        "overwrite_card": options.overwrite_card,
        "token": options.token,
    }


@contextmanager
def staged_checkpoint(folder: Path, options: PushOptions) -> Iterator[Path]:
    """A temporary folder with what is to be pushed of a checkpoint: code added, large weights split."""
    from recap_hf.modeling.configuration_recap import complete_tokenizer_folder, copy_travelling_files

    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        left_out = copy_files(folder, stage, (*CHECKPOINT_FILES, *datastore_in_checkpoint(folder)))
        if left_out:
            print(f"not pushed: {', '.join(left_out)}", file=sys.stderr)
        if not list(stage.glob("model*.safetensors")):
            raise ValueError(f"{folder} has no model*.safetensors: expected weights that `save_pretrained` wrote")
        if not list(stage.glob("*_recap.py")):
            copy_travelling_files(stage)
        complete_tokenizer_folder(stage)
        split_weights(stage, options.max_shard_size)
        yield stage


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Links or copies the files that match; returns the top-level names that have none that do."""
    from recap_hf.modeling.hub_recap import files_to_push, matches

    files = files_to_push(source)
    chosen = {name for name in files if matches(name, patterns)}
    for name in chosen:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        copy_file(files[name], place)
    kept = {name.split("/")[0] for name in chosen}
    return sorted({name.split("/")[0] for name in files} - kept)


def copy_file(source: Path, target: Path) -> None:
    """A copy; of a large file only a link, if the file system can: nothing writes to large files in a stage."""
    if source.stat().st_size >= LINKED_FROM_BYTES:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            # Another file system, or one without links: copied below.
            pass
    shutil.copyfile(source, target)


def parse_size(size: str | int) -> int:
    """Bytes of a size as transformers writes it: "5GB", "300KB", a number.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)(I?)B?\s*", str(size).upper())
    if match is None:
        raise ValueError(f"{size!r} is no size: expected a number and a unit, as in 5GB or 300MB")
    number, unit, binary = match.groups()
    return int(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " ")


def split_weights(stage: Path, max_shard_size: str | int) -> None:
    """Splits a single weights file that is larger than a shard may be."""
    weights = stage / "model.safetensors"
    if not weights.is_file() or weights.stat().st_size <= parse_size(max_shard_size):
        return
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    if not plan.is_sharded:
        return
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, stage / name, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (stage / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    weights.unlink()


def refer_to_datastore(folder: Path, pushed: PushResult) -> None:
    """Replaces the datastore of a staged checkpoint by a reference to the repository that it was pushed to."""
    from recap_hf.modeling.retrieval_recap import FORMAT_VERSION, MANIFEST_NAME

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reference = {"repo_id": pushed.repo_id, "revision": pushed.commit.oid}
    text = json.dumps({"format_version": FORMAT_VERSION, "reference": reference}, indent=1) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
