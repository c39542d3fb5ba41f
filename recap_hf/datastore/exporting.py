"""The captions of a datastore as files that other programs read."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from recap_hf.files import replacing
from recap_hf.hub.parquet import column_names, to_table

EXPORT_SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet")


def export_datastore(store: Any, path: str | Path, embeddings: str | Path | None = None) -> int:
    """Writes captions, and on request their embeddings, and returns how many.

    Args:
        store ([`CaptionDatastore`]): the datastore.
        path: `.jsonl`, `.json`, `.csv` or `.parquet` with all that is known, or `.txt` with a caption a line.
        embeddings: a `.npy` file for the embeddings, in the order of the captions.

    Raises:
        ValueError: for another suffix, or a caption of several lines in a `.txt` file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in EXPORT_SUFFIXES:
        raise ValueError(f"{path}: captions are exported to {', '.join(EXPORT_SUFFIXES)} files, not to {suffix!r}")
    for target in (path, *([] if embeddings is None else [Path(embeddings)])):
        target.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".parquet":
        with replacing(path) as temporary:
            pyarrow.parquet.write_table(to_table(store.records), temporary)
    elif suffix == ".csv":
        columns = column_names(store.records)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(store.records)
    else:
        if suffix == ".txt":
            lines = (_line(record["caption"], row) for row, record in enumerate(store.records))
        else:
            lines = (json.dumps(record, ensure_ascii=False) for record in store.records)
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
            if suffix == ".json":
                file.write("[\n" + ",\n".join(lines) + "\n]\n")
            else:
                file.writelines(line + "\n" for line in lines)
    if embeddings is not None:
        with replacing(embeddings) as temporary, open(temporary, "wb") as file:
            np.save(file, np.asarray(store.embeddings), allow_pickle=False)
    return len(store)


def _line(caption: str, row: int) -> str:
    if len(caption.splitlines()) > 1:
        raise ValueError(f"row {row}: a caption of several lines cannot be written to a .txt file; export to .jsonl")
    return caption
