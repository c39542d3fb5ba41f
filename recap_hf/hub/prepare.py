"""Adds to a saved checkpoint or datastore what its repository shows: a card, and Parquet files of a datastore.

A README.md that somebody wrote or edited stays as it is.
"""

import json
from pathlib import Path

from recap_hf.modeling.processing_recap import DATASTORE_FOLDER
from recap_hf.modeling.retrieval_recap import MANIFEST_NAME, CaptionDatastore

from .cards import is_unedited, render_datastore_card, render_model_card, save_card
from .describe import describe_checkpoint, describe_datastore
from .facts import FACTS_FILE, CardFacts
from .parquet import PATTERN, write_parquet

NUM_EXAMPLES = 5
PARQUET_FOLDER = "data"


def prepare_folder(
    folder: str | Path, repo_id: str, facts: CardFacts | None = None, datastore_folder: str | Path | None = None
) -> None:
    """Writes the card of a checkpoint.

    Args:
        folder: what `save_pretrained` of model and processor wrote.
        repo_id: the repository that it is going to, or the name of the model.
        facts: what is known beyond the files; default: `card_facts.json` in the folder.
        datastore_folder: the datastore, if the checkpoint only refers to it.
    """
    folder = Path(folder)
    manifest, datastore, reference = folder / DATASTORE_FOLDER / MANIFEST_NAME, None, None
    if manifest.is_file():
        referred = json.loads(manifest.read_text(encoding="utf-8")).get("reference")
        store = CaptionDatastore.from_pretrained(datastore_folder or manifest.parent)
        if referred:
            reference = (referred["repo_id"], referred["revision"])
        else:
            _drop_removed(store, manifest.parent)
        datastore = describe_datastore(store)
    if _may_write_card(folder):
        described = describe_checkpoint(folder)
        card = render_model_card(repo_id, described, facts or read_facts(folder), datastore, reference)
        save_card(card, folder)


def prepare_datastore(folder: Path, repo_id: str, facts: CardFacts | None = None) -> None:
    """Writes the Parquet files and the card of a datastore; `facts` as for `prepare_folder`."""
    datastore = CaptionDatastore.from_pretrained(folder)
    _drop_removed(datastore, folder)
    columns = write_parquet(datastore.records, folder / PARQUET_FOLDER)
    if not _may_write_card(folder):
        return
    step = max(1, len(datastore) // NUM_EXAMPLES)
    examples = list(dict.fromkeys(datastore.captions[::step]))[:NUM_EXAMPLES]
    described, files = describe_datastore(datastore), f"{PARQUET_FOLDER}/{PATTERN}"
    save_card(render_datastore_card(repo_id, described, files, columns, examples, facts or read_facts(folder)), folder)


def read_facts(folder: Path) -> CardFacts:
    """The facts in a folder's `card_facts.json`, if it has one."""
    path = folder / FACTS_FILE
    return CardFacts.from_file(path) if path.is_file() else CardFacts()


def _may_write_card(folder: Path) -> bool:
    card = folder / "README.md"
    return not card.exists() or is_unedited(card)


def _drop_removed(datastore, folder: Path) -> None:
    """Writes a datastore of an earlier format again: its files hold captions that were removed, perhaps because of
    their licence, and those must not be pushed."""
    if "captions" not in datastore.manifest:
        datastore.save_pretrained(folder)
