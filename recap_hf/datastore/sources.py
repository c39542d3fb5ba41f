"""Captions of files and datasets as records: caption, clip id, source, licence, split and further columns."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recap_hf.data import LoadOptions, load_captions
from recap_hf.data.caption_tables import CAPTION_SUFFIXES, RESULT_COLUMNS, caption_columns, captions_in, read_rows
from recap_hf.data.loading import NAMED_DATASETS
from recap_hf.data.published import LICENCES, find_recap_table, parse_abstract_captions
from recap_hf.data.schema import SPLITS, canonical_split, listed
from recap_hf.modeling.retrieval_recap import MANIFEST_NAME, CaptionDatastore

CAPTION_CHOICES = ("all", "published", "weak")
WEAK_PREFIX = "recap-weak"
# Where files of the published datasets and of their followers keep the clip, the surest first.
_CLIP_COLUMNS = ("clip_id", "youtube_id", "file_name", "file_path", "audio_path", "fname", "audio", "id")
_MAPPED_COLUMNS = frozenset({"clip_id", "audio", "source", "licence", "split"})
_USED_COLUMNS = RESULT_COLUMNS | {"abstract_captions", "source", "licence", "license", "split", "weak"}


@dataclass(frozen=True)
class SourceOptions:
    """What is known of captions beyond their files; it replaces what the files state.

    Args:
        source, licence, split: of all captions.
        columns: our column name -> the file's (`caption`, `clip_id`, `source`, `licence`, `split`).
        captions: "all", or "published" or "weak" of files that hold weakly labelled captions too.
    """

    source: str | None = None
    licence: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    captions: str = "all"

    def __post_init__(self) -> None:
        if self.captions not in CAPTION_CHOICES:
            raise ValueError(f"`captions` must be one of {', '.join(CAPTION_CHOICES)}, got {self.captions!r}")
        for ours, theirs in self.columns.items():
            if not caption_columns([ours]) and ours not in _MAPPED_COLUMNS:
                known = ", ".join(("caption", "caption_1", *sorted(_MAPPED_COLUMNS)))
                raise ValueError(f"The mapping {ours}={theirs} names no column of ours: expected one of {known}")


def read_sources(
    names: Iterable[str | Path], options: SourceOptions | None = None
) -> Iterator[tuple[str | Path, Iterator[dict[str, Any]]]]:
    """The name and the records of each source in turn; see [`read_source`].

    Raises:
        ValueError: after the last source, if none had a column that `options.columns` maps.
    """
    options, used = options or SourceOptions(), set()
    for name in names:
        yield name, read_source(name, options, used)
    missing = [f"{ours}={theirs}" for ours, theirs in options.columns.items() if theirs not in used]
    if missing:
        raise ValueError(f"No source has the column that a mapping names: {', '.join(missing)}")


def read_source(
    name: str | Path, options: SourceOptions | None = None, used: set[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The captions of one source, one record each, streamed where the format can be.

    Args:
        name: a table of captions (see [`recap_hf.read_captions`]), the folder of a datastore or of a saved `datasets`
            dataset, `NAME:FOLDER` of a dataset as published (clotho, audiocaps, recap, wavcaps, audiofolder), or
            `hub:USER/NAME` of a `datasets` dataset.
        options: what is known beyond the files.
        used: the mapped columns that are met are added to it.

    Raises:
        OSError: there is no such source. ValueError: it does not read, or has no captions.
    """
    options, used = options or SourceOptions(), set() if used is None else used
    kind, _, rest = str(name).partition(":")
    if rest and (kind in NAMED_DATASETS or kind == "hub"):
        # Its loader refuses a mapping of a column that it has not.
        used.update(options.columns.values())
        return _read_named(rest if kind == "hub" else kind, None if kind == "hub" else rest, options)
    path = Path(name)
    if path.is_dir():
        return _read_folder(path, options, used)
    if not path.is_file():
        kinds = f"a {', '.join(CAPTION_SUFFIXES)} file, a datastore, or a dataset such as {NAMED_DATASETS[0]}:FOLDER"
        raise FileNotFoundError(f"{name}: no such file of captions. Expected {kinds} or hub:USER/NAME")
    return records_of_rows(read_rows(path), path.name, options, used)


def records_of_rows(
    rows: Iterable[Mapping[str, Any]], name: str, options: SourceOptions, used: set[str]
) -> Iterator[dict[str, Any]]:
    """Records of a table's rows; a row with several captions gives several.

    Captions that the authors of RECAP labelled weakly (`abstract_captions`, repeated on each row of a clip) come once
    per clip, marked `weak`, under a source of their own.

    Raises:
        ValueError: where the table has no caption column.
    """
    weak_seen: set[tuple[str, str]] = set()
    for row in rows:
        # Of several files, only some may have the mapped columns.
        mapped = {theirs: ours for ours, theirs in options.columns.items() if theirs in row}
        used.update(mapped)
        # An underscore tells a column that has the name of a mapped one.
        names = {key: mapped.get(key) or (f"{key}_" if key in mapped.values() else key) for key in row if key}
        row = {names[key]: row[key] for key in names}
        columns = caption_columns(row)
        if not columns and "abstract_captions" not in row:
            found = f"{name} has the columns {listed(list(row))}, none of which holds captions"
            hint = "If they stand under another name, map it: --columns caption=YOURS"
            raise ValueError(f"{found}: expected 'caption', 'captions' or 'caption_1', ... {hint}")
        clip = next((row[key] for key in _CLIP_COLUMNS if isinstance(row.get(key), (str, int))), None)
        common = _common(row, name, options) | ({} if clip is None else {"clip_id": str(clip)})
        if options.captions != "weak":
            left_out = _USED_COLUMNS.union(columns, _CLIP_COLUMNS)
            extra = {key: value for key, value in row.items() if key not in left_out and _is_plain(value)}
            yield from ({"caption": text, **common, **extra} for text in captions_in(row, columns))
        if options.captions != "published" and isinstance(row.get("abstract_captions"), str):
            for text in parse_abstract_captions(row["abstract_captions"]):
                if (str(clip), text) not in weak_seen:
                    weak_seen.add((str(clip), text))
                    domain = str(common["source"]).removeprefix("recap-")
                    yield {"caption": text, **common, "source": f"{WEAK_PREFIX}-{domain}", "weak": True}


def _common(row: Mapping[str, Any], name: str, options: SourceOptions) -> dict[str, Any]:
    source, licence = guess_source(name, row)
    found = {
        "source": options.source or row.get("source") or source,
        "licence": options.licence or row.get("licence") or row.get("license") or licence,
        "split": options.split or row.get("split") or guess_split(name),
        "weak": bool(row.get("weak")),
    }
    return {key: value for key, value in found.items() if value}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, (str, int, float, bool))


def guess_source(name: str, columns: Iterable[str]) -> tuple[str, str | None]:
    """Source and licence of a file of a published dataset, known by its name and columns; else the file's name."""
    columns, stem = set(columns), Path(name).stem
    domain = next((each for each in ("audiocaps", "clotho") if each in name.lower()), None)
    if "abstract_captions" in columns:
        return f"recap-{domain or 'captions'}", None
    if {"id", "download_link"} <= columns:
        return f"wavcaps-{stem.removesuffix('_final')}", LICENCES["wavcaps"]
    if domain == "clotho":
        return "clotho", LICENCES["clotho"]
    if domain == "audiocaps" or {"youtube_id", "start_time"} <= columns:
        return "audiocaps", LICENCES["audiocaps"]
    return stem, None


def guess_split(name: str) -> str | None:
    """The split that is part of a file's name, or `None`."""
    words = "".join(char if char.isalnum() else " " for char in Path(name).stem.lower()).split()
    known = {spelling for spellings in SPLITS.values() for spelling in spellings}
    return next((canonical_split(word) for word in words if word in known), None)


def _read_folder(path: Path, options: SourceOptions, used: set[str]) -> Iterator[dict[str, Any]]:
    for folder in (path, path / "datastore"):
        if (folder / MANIFEST_NAME).is_file():
            return records_of_rows(CaptionDatastore.from_pretrained(folder).records, path.name, options, used)
    if not (path / "dataset_info.json").is_file():
        kinds = f"a datastore ({MANIFEST_NAME}) or a saved dataset (dataset_info.json)"
        hint = f"For a dataset as published write NAME:{path}, with NAME one of {', '.join(NAMED_DATASETS)}"
        raise ValueError(f"{path}: a folder is read as {kinds}, and this holds neither. {hint}")
    from datasets import Audio, load_from_disk

    table = load_from_disk(str(path))
    # Only captions are wanted: decoding audio for them would cost hours, and needs codecs.
    table = table.remove_columns([name for name, kind in table.features.items() if isinstance(kind, Audio)])
    return records_of_rows(table, path.name, options, used)


def _read_named(name: str, folder: str | None, options: SourceOptions) -> Iterator[dict[str, Any]]:
    split = options.split or "train"
    data = load_captions(name, folder, split=split, columns=dict(options.columns) or None, needs_audio=False)
    for row in data.dataset.remove_columns("audio"):
        yield from clip_records(row, options)
    if name == "recap" and options.captions != "published":
        table = find_recap_table(LoadOptions(folder, canonical_split(split), needs_audio=False))
        weak = SourceOptions(options.source, options.licence, options.split, options.columns, "weak")
        yield from records_of_rows(read_rows(table), table.name, weak, set())


def clip_records(clip: Mapping[str, Any], options: SourceOptions) -> list[dict[str, Any]]:
    """One record for each caption of a clip, as `recap_hf.data.load_captions` gives clips."""
    known = {key: value for key, value in clip.items() if value is not None and key not in ("audio", "captions")}
    known |= {key: value for key in ("source", "licence") if (value := getattr(options, key))}
    return [{"caption": text, **known} for text in clip["captions"]]
