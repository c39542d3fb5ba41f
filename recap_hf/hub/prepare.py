"""What a repository should have beside the saved files: a card, and Parquet for a datastore."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .cards import is_unedited, render_datastore_card, render_model_card, save_card
from .describe import describe_checkpoint, describe_datastore
from .facts import FACTS_FILE, CardFacts
from .parquet import PATTERN, write_parquet

if TYPE_CHECKING:
    from recap_hf import CaptionDatastore

NUM_EXAMPLES = 5
PARQUET_FOLDER = "data"


def prepare_folder(
    folder: str | Path,
    repo_id: str,
    repo_type: str = "model",
    tags: Sequence[str] | None = None,
    facts: CardFacts | None = None,
    datastore_folder: str | Path | None = None,
) -> None:
    """Adds a card to a saved checkpoint or datastore, and Parquet files to the latter.

    A README.md that somebody has written or edited stays as it is. Facts are read from `card_facts.json` in the
    folder where none are given.

    Args:
        folder: what `save_pretrained` wrote; files are added to it.
        repo_id: where it is going to be pushed.
        repo_type: "model" or "dataset".
        tags: added to the card's tags.
        facts: what is known beyond the files.
        datastore_folder: where the datastore of a checkpoint is, if the checkpoint only refers to it.
    """
    folder = Path(folder)
    if facts is None and (folder / FACTS_FILE).is_file():
        facts = CardFacts.from_file(folder / FACTS_FILE)
    facts = facts or CardFacts()
    facts = replace(facts, tags=[*facts.tags, *(tags or [])])
    if repo_type == "dataset":
        prepare_datastore(folder, repo_id, facts)
    elif (folder / "config.json").is_file() and may_write_card(folder):
        # A processor alone has no config.json: the card comes with the model.
        prepare_checkpoint(folder, repo_id, facts, datastore_folder)


def may_write_card(folder: Path) -> bool:
    """Whether there is no card, or one that nobody has touched since it was rendered."""
    card = folder / "README.md"
    return not card.exists() or is_unedited(card)


def prepare_checkpoint(
    folder: Path, repo_id: str, facts: CardFacts, datastore_folder: str | Path | None = None
) -> None:
    """Writes the card of a checkpoint, with what is known of the datastore inside or referred to."""
    from recap_hf.modeling.processing_recap import DATASTORE_FOLDER
    from recap_hf.modeling.retrieval_recap import MANIFEST_NAME, CaptionDatastore

    manifest, datastore, reference = folder / DATASTORE_FOLDER / MANIFEST_NAME, None, None
    if manifest.is_file():
        referred = json.loads(manifest.read_text(encoding="utf-8")).get("reference")
        store = CaptionDatastore.from_pretrained(datastore_folder or manifest.parent)
        if not referred:
            drop_removed(store, manifest.parent)
        datastore = describe_datastore(store)
        reference = (referred["repo_id"], referred["revision"]) if referred else None
    save_card(render_model_card(repo_id, describe_checkpoint(folder), facts, datastore, reference), folder)


def drop_removed(datastore: CaptionDatastore, folder: Path) -> None:
    """Writes a datastore of an earlier format again: its files hold captions that were removed, for their licence
    perhaps, and those must not be pushed."""
    if "captions" not in datastore.manifest:
        datastore.save_pretrained(folder)


def prepare_datastore(folder: Path, repo_id: str, facts: CardFacts) -> None:
    """Writes the Parquet files of a datastore and, unless it has one, its card."""
    from recap_hf.modeling.retrieval_recap import CaptionDatastore

    datastore = CaptionDatastore.from_pretrained(folder)
    drop_removed(datastore, folder)
    columns = write_parquet(datastore.records, folder / PARQUET_FOLDER)
    if not may_write_card(folder):
        return
    step = max(1, len(datastore) // NUM_EXAMPLES)
    examples = list(dict.fromkeys(datastore.captions[::step]))[:NUM_EXAMPLES]
    card = render_datastore_card(
        repo_id, describe_datastore(datastore), f"{PARQUET_FOLDER}/{PATTERN}", columns, examples, facts=facts
    )
    save_card(card, folder)
