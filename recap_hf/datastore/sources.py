"""Captions from wherever they lie, as records: caption, clip id, source, licence, split and what else stands there."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recap_hf.data.audiofolder import captions_of, find_caption_columns
from recap_hf.data.loading import NAMED_DATASETS
from recap_hf.data.recap_csv import parse_abstract_captions
from recap_hf.data.schema import SPLITS, canonical_split, listed

FILE_SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
CAPTION_CHOICES = ("all", "published", "weak")
WEAK_PREFIX = "recap-weak"
# Where files of the published datasets and of their followers keep the clip, the surest first.
_CLIP_COLUMNS = ("clip_id", "youtube_id", "file_name", "file_path", "audio_path", "fname", "audio", "id")
_USED_COLUMNS = ("abstract_captions", "source", "licence", "license", "split", "weak", "score", "row")


@dataclass(frozen=True)
class SourceOptions:
    """What is known of captions beyond what their files say; it wins over the files.

    Args:
        source, licence, split: of all captions.
        columns: our column name -> the file's (`caption`, `clip_id`, `source`, `licence`, `split`).
        captions: "all", or "published" or "weak" of files that hold weakly labelled captions too.
        extra: keep further columns.
    """

    source: str | None = None
    licence: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    captions: str = "all"
    extra: bool = True

    def __post_init__(self) -> None:
        if self.captions not in CAPTION_CHOICES:
            raise ValueError(f"`captions` must be one of {', '.join(CAPTION_CHOICES)}, got {self.captions!r}")


def read_source(name: str | Path, options: SourceOptions | None = None) -> Iterator[dict[str, Any]]:
    """The captions of one source, one record each, streamed where the format can be.

    Args:
        name: a file (.txt with a caption a line, .csv, .tsv, .json, .jsonl, .parquet), the folder of a datastore or
            of a saved `datasets` dataset, `NAME:FOLDER` of a dataset as published (clotho, audiocaps, recap,
            wavcaps, audiofolder), or `hub:USER/NAME` of a `datasets` dataset.
        options: what is known beyond the files.

    Raises:
        OSError: there is no such source. ValueError: it does not read, or has no captions.
    """
    options = options or SourceOptions()
    text = str(name)
    kind, _, rest = text.partition(":")
    if kind in NAMED_DATASETS and rest:
        return _read_named(kind, rest, options)
    if kind == "hub" and rest:
        return _read_named(rest, None, options)
    path = Path(text)
    if path.is_dir():
        return _read_folder(path, options)
    if not path.is_file():
        raise FileNotFoundError(
            f"{text}: no such file of captions. Expected a {', '.join(FILE_SUFFIXES)} file, a datastore, or a dataset "
            f"such as {NAMED_DATASETS[0]}:FOLDER or hub:USER/NAME"
        )
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise ValueError(f"{path}: captions are read from {', '.join(FILE_SUFFIXES)} files, not from {path.suffix!r}")
    return records_of_rows(read_rows(path), path.name, options)


def read_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, streamed (JSON apart, which is read at once)."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix == ".txt":
                for line in file:
                    if line.strip():
                        yield {"caption": line.strip()}
            elif suffix in (".csv", ".tsv"):
                yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
            elif suffix == ".jsonl":
                for line in file:
                    if line.strip():
                        yield _as_row(json.loads(line), path)
            else:
                for item in _json_items(json.load(file), path):
                    yield _as_row(item, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Save it as UTF-8") from error
    except (json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: does not read as {suffix[1:].upper()} ({error})") from error


def _json_items(contents: Any, path: Path) -> list[Any]:
    # WavCaps keeps its rows under "data".
    items = contents.get("data") if isinstance(contents, Mapping) else contents
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list of captions, or an object with one under 'data'")
    return items


def _as_row(item: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(item, str):
        return {"caption": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"{path}: expected objects or texts, found {item!r:.80}")
    return item


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: does not read as PARQUET ({error})") from error


def records_of_rows(
    rows: Iterable[Mapping[str, Any]], name: str, options: SourceOptions | None = None
) -> Iterator[dict[str, Any]]:
    """Records of a table's rows; a row with several captions gives several.

    Captions that the authors of RECAP labelled weakly (`abstract_captions`, repeated on each row of a clip) come once
    per clip, marked `weak`, under a source of their own.

    Raises:
        ValueError: where the table has no caption column.
    """
    options = options or SourceOptions()
    columns: list[str] | None = None
    weak_seen: set[tuple[str, str]] = set()
    for row in rows:
        # Of several files, only some may have the mapped columns.
        mapped = {theirs: ours for ours, theirs in options.columns.items() if theirs in row}
        row = {_our_name(key, mapped): value for key, value in row.items() if key}
        if columns is None:
            columns = find_caption_columns(list(row))
            if not columns and "abstract_captions" not in row:
                raise ValueError(
                    f"{name} has the columns {listed(list(row))}, none of which holds captions: expected 'caption', "
                    "'captions' or 'caption_1', ... If they stand under another name, map it: --columns caption=YOURS"
                )
        clip = next((row[key] for key in _CLIP_COLUMNS if _is_id(row.get(key))), None)
        common = _common(row, name, options) | ({} if clip is None else {"clip_id": str(clip)})
        if options.captions != "weak":
            extra = _extra(row, columns) if options.extra else {}
            for text in captions_of(row, columns):
                yield {"caption": str(text), **common, **extra}
        if options.captions != "published" and isinstance(row.get("abstract_captions"), str):
            for text in parse_abstract_captions(row["abstract_captions"]):
                if (str(clip), text) not in weak_seen:
                    weak_seen.add((str(clip), text))
                    domain = str(common["source"]).removeprefix("recap-")
                    yield {"caption": text, **common, "source": f"{WEAK_PREFIX}-{domain}", "weak": True}


def _is_id(value: Any) -> bool:
    return isinstance(value, (str, int)) and value != ""


def _our_name(column: str, mapped: Mapping[str, str]) -> str:
    """Our name of a file's column; one that bears the name of a mapped one gives way."""
    return mapped.get(column) or (f"{column}_" if column in mapped.values() else column)


def _common(row: Mapping[str, Any], name: str, options: SourceOptions) -> dict[str, Any]:
    source, licence = guess_source(name, list(row))
    found = {
        "source": options.source or row.get("source") or source,
        "licence": options.licence or row.get("licence") or row.get("license") or licence,
        "split": options.split or row.get("split") or guess_split(name),
    }
    if row.get("weak"):
        found["weak"] = True
    return {key: value for key, value in found.items() if value}


def _extra(row: Mapping[str, Any], caption_columns: Sequence[str]) -> dict[str, Any]:
    left_out = {*caption_columns, *_USED_COLUMNS, *_CLIP_COLUMNS}
    return {str(key): value for key, value in row.items() if key not in left_out and _is_plain(value) and value != ""}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool))


def guess_source(name: str, columns: Sequence[str]) -> tuple[str, str | None]:
    """Source and licence of a file of a published dataset, told by its name and columns; otherwise the file's name."""
    from recap_hf.data import audiocaps, clotho, wavcaps

    folded = name.lower()
    domain = next((each for each in ("audiocaps", "clotho") if each in folded), None)
    if "abstract_captions" in columns:
        return f"recap-{domain or 'captions'}", None
    if {"id", "download_link"} <= set(columns):
        return f"wavcaps-{Path(name).stem.removesuffix('_final')}", wavcaps.LICENCE
    if domain == "clotho":
        return "clotho", clotho.LICENCE
    if domain == "audiocaps" or {"youtube_id", "start_time"} <= set(columns):
        return "audiocaps", audiocaps.LICENCE
    return Path(name).stem, None


def guess_split(name: str) -> str | None:
    """The split that a file's name tells, if it does."""
    words = "".join(char if char.isalnum() else " " for char in Path(name).stem.lower()).split()
    known = {spelling for spellings in SPLITS.values() for spelling in spellings}
    return next((canonical_split(word) for word in words if word in known), None)


def _read_folder(path: Path, options: SourceOptions) -> Iterator[dict[str, Any]]:
    from recap_hf.modeling.retrieval_recap import MANIFEST_NAME, CaptionDatastore

    for folder in (path, path / "datastore"):
        if (folder / MANIFEST_NAME).is_file():
            return records_of_rows(CaptionDatastore.from_pretrained(folder).records, path.name, options)
    if (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        table = load_from_disk(str(path))
        return records_of_rows(_without_audio(table), path.name, options)
    raise ValueError(
        f"{path}: a folder is read as a datastore ({MANIFEST_NAME}) or a saved dataset (dataset_info.json), and this "
        f"holds neither. For a dataset as published write NAME:{path}, with NAME one of {', '.join(NAMED_DATASETS)}"
    )


def _without_audio(table: Any) -> Any:
    """Only captions are wanted: decoding audio for them would cost hours, and needs codecs."""
    from datasets import Audio

    return table.remove_columns([name for name, kind in table.features.items() if isinstance(kind, Audio)])


def _read_named(name: str, folder: str | None, options: SourceOptions) -> Iterator[dict[str, Any]]:
    from recap_hf.data import load_captions

    split = options.split or "train"
    data = load_captions(name, folder, split=split, columns=dict(options.columns) or None, needs_audio=False)
    for row in data.dataset.remove_columns("audio"):
        given = {key: value for key, value in row.items() if value is not None}
        given |= {key: value for key in ("source", "licence") if (value := getattr(options, key))}
        for text in given.pop("captions"):
            yield {"caption": text, **given}
    if name == "recap" and options.captions != "published":
        from recap_hf.data import LoadOptions
        from recap_hf.data.recap_csv import find_table

        table = find_table(LoadOptions(folder, canonical_split(split), needs_audio=False))
        weak = SourceOptions(options.source, options.licence, options.split, options.columns, "weak")
        yield from records_of_rows(read_rows(table), table.name, weak)


__all__ = ["CAPTION_CHOICES", "FILE_SUFFIXES", "SourceOptions", "read_rows", "read_source", "records_of_rows"]
