"""Which captions go into a datastore: readable, short, not of clips that are evaluated on; and what was left out."""

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from recap_hf.hub.licences import forbids_commercial_use
from recap_hf.modeling.retrieval_recap import normalize_clip_id, normalize_text

from .sources import SourceOptions, read_source

DUPLICATE_CHOICES = ("keep", "exact", "normalised")
DEFAULT_MAX_TOKENS = 50
_MAX_CHARACTERS = 2000
_TOKENIZED_AT_ONCE = 1024
# Keys of WavCaps' published blacklists -> the ending of its files' names, by which our loader names sources.
_WAVCAPS_PARTS = {"freesound": "fsd", "bbcsoundeffects": "bbc", "soundbible": "sb"}
_WAVCAPS_PARTS |= {"audioset": "as", "audiosetsl": "as"}


@dataclass
class LeakGuard:
    """Clips whose captions must not be retrieved, because captioners are evaluated on them.

    Args:
        clip_ids: folded ids.
        texts: their captions, folded -> the clips that have them. Weakly labelled captions are not among them.
    """

    clip_ids: set[str] = field(default_factory=set)
    texts: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def from_sources(cls, names: Iterable[str | Path], columns: Mapping[str, str] | None = None) -> "LeakGuard":
        """The clips that files of captions name (the test CSVs, say); of a dataset as published, its test split.

        Raises:
            ValueError: if a file names no clip.
        """
        guard = cls()
        # The split decides what is read of a published dataset; a file is read as a whole.
        options = SourceOptions(split="test", captions="published", columns=columns or {})
        for name in names:
            before = len(guard.clip_ids)
            for record in read_source(name, options):
                if record.get("clip_id") is not None:
                    clip_id = normalize_clip_id(record["clip_id"])
                    guard.clip_ids.add(clip_id)
                    guard.texts[normalize_text(record["caption"])].add(clip_id)
            if len(guard.clip_ids) == before:
                raise ValueError(f"{name} names no clip that was not named before: expected a column such as clip_id")
        return guard


@dataclass(frozen=True)
class FilterOptions:
    """What is left out.

    Args:
        max_tokens: captions with more decoder tokens; `None` keeps them.
        duplicates: "keep" them (search gives no text twice anyway, and clip ids stay known), or drop all but the
            first of "exact" or "normalised" equals.
        guard: captions of these clips are left out, weakly labelled ones too.
        guard_texts: leave out every caption with the text of a caption of those clips as well.
        blacklists: see [`read_blacklist`].
        commercial: leave out captions whose licence forbids commercial use.
        check_text: leave out captions without words, or with broken characters.
    """

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    duplicates: str = "keep"
    guard: LeakGuard | None = None
    guard_texts: bool = False
    blacklists: tuple[tuple[str, frozenset[str]], ...] = ()
    commercial: bool = False
    check_text: bool = True

    def __post_init__(self) -> None:
        if self.duplicates not in DUPLICATE_CHOICES:
            raise ValueError(f"`duplicates` must be one of {', '.join(DUPLICATE_CHOICES)}, got {self.duplicates!r}")
        if self.guard_texts and self.guard is None:
            raise ValueError("Removal by identical text needs the captions to compare with: give --exclude-clips FILE")


def read_blacklist(path: str | Path) -> list[tuple[str, frozenset[str]]]:
    """Clip ids by source, as WavCaps publishes them: `{"FreeSound": [ids], "AudioSet": [ids]}`; a list is of all.

    Returns:
        Pairs of what ends the source's name ("" for any) and the folded ids.
    """
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: does not read as JSON ({error})") from error
    if isinstance(contents, list):
        contents = {"": contents}
    if not isinstance(contents, dict) or not all(isinstance(ids, list) for ids in contents.values()):
        raise ValueError(f"{path}: expected a list of clip ids, or lists by source, as WavCaps publishes them")
    found = []
    for key, ids in contents.items():
        folded = "".join(char for char in key.lower() if char.isalnum())
        found.append((_WAVCAPS_PARTS.get(folded, folded), frozenset(normalize_clip_id(each) for each in ids)))
    return found


def text_problem(text: str) -> str | None:
    """Why a caption cannot be used: "empty", "garbled", or `None`."""
    if not any(char.isalnum() for char in text):
        return "empty"
    letters = sum(char.isalpha() or char.isspace() for char in text)
    bad = ("Cc", "Cs", "Co", "Cn")
    broken = "\ufffd" in text or any(unicodedata.category(char) in bad for char in text if char not in "\t\n\r")
    if broken or len(text) > _MAX_CHARACTERS or letters < len(text) / 2:
        return "garbled"
    try:
        # UTF-8 that was read as Windows-1252 ("CafÃ©"): real text hardly ever decodes a second time.
        return None if text.encode("cp1252").decode("utf-8") == text else "garbled"
    except UnicodeError:
        return None


class DuplicateCounter:
    """Counts captions that were there before, and which sources share them; it keeps hashes, not texts."""

    def __init__(self) -> None:
        self.exact = self.normalised = 0
        self._exact: set[int] = set()
        # By hash of the normalized text: a bit for each source that has it.
        self._sources: dict[int, int] = {}
        self._bits: dict[str, int] = {}

    def add(self, caption: str, source: str) -> set[str]:
        """Counts a caption; which choices of `DUPLICATE_CHOICES` call it a duplicate of one counted before."""
        key, folded = _hash(caption), _hash(normalize_text(caption))
        exact, normalised = key in self._exact, folded in self._sources
        self.exact, self.normalised = self.exact + exact, self.normalised + normalised
        self._exact.add(key)
        bit = self._bits.setdefault(source, 1 << len(self._bits))
        self._sources[folded] = self._sources.get(folded, 0) | bit
        return {name for name, found in (("exact", exact), ("normalised", normalised)) if found}

    def report(self) -> dict[str, Any]:
        """`exact` and `normalised` repetitions, `unique` texts, and `shared`: texts by the sources that share them."""
        combinations = Counter(bits for bits in self._sources.values() if bits & (bits - 1))
        shared = {
            " + ".join(name for name, bit in sorted(self._bits.items()) if bits & bit): number
            for bits, number in combinations.most_common()
        }
        unique = {"unique": len(self._exact), "unique_normalised": len(self._sources)}
        return {"exact": self.exact, "normalised": self.normalised, **unique, "shared": shared}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class CaptionFilter:
    """Passes the records that may go into a datastore, and counts the others.

    Args:
        options: what is left out.
        count_tokens: decoder tokens of each of a list of captions; needed for `max_tokens`.
        known: captions that the datastore has already, for the counting of duplicates.
    """

    def __init__(
        self,
        options: FilterOptions,
        count_tokens: Callable[[list[str]], Sequence[int]] | None = None,
        known: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        if options.max_tokens is not None and count_tokens is None:
            raise ValueError("A limit on decoder tokens needs a tokenizer: give a model, or max_tokens=None")
        self.options = options
        self._count_tokens = count_tokens
        # By input: captions read, and their hashes.
        self._inputs: dict[str, tuple[int, set[int]]] = {}
        # By source: how many were read, kept, and left out for each reason.
        self._sources: dict[str, Counter[str]] = defaultdict(Counter)
        self._licences: Counter[str] = Counter()
        self._duplicates = DuplicateCounter()
        self._leaks: Counter[str] = Counter()
        self._leaked_clips: set[str] = set()
        for record in known:
            self._duplicates.add(record["caption"], str(record.get("source")))
        self._duplicates.exact = self._duplicates.normalised = 0

    def filter(self, records: Iterable[dict[str, Any]], name: str = "captions") -> Iterator[dict[str, Any]]:
        """The records of one input that stay, in order."""
        read, seen = self._inputs.get(name, (0, set()))
        records = iter(records)
        while block := list(islice(records, _TOKENIZED_AT_ONCE)):
            seen |= {_hash(record["caption"]) for record in block}
            read += len(block)
            self._inputs[name] = read, seen
            reasons = [self._reason(record) for record in block]
            left = [record for record, reason in zip(block, reasons, strict=True) if reason is None]
            limit = self.options.max_tokens
            # A fast tokenizer refuses an empty batch.
            counted = left if limit is not None else []
            lengths = iter(self._count_tokens([record["caption"] for record in counted]) if counted else ())
            for record, reason in zip(block, reasons, strict=True):
                if reason is None and limit is not None and next(lengths) > limit:
                    reason = "too_long"
                if reason is None:
                    equal = self._duplicates.add(record["caption"], str(record.get("source")))
                    reason = "duplicate" if self.options.duplicates in equal else None
                counts = self._sources[str(record.get("source"))]
                counts.update(["read", reason or "kept"])
                if reason is None:
                    self._licences[str(record.get("licence") or "not stated")] += 1
                    yield record

    def _reason(self, record: Mapping[str, Any]) -> str | None:
        """Why a record is left out, apart from its length and its duplicates."""
        options = self.options
        if options.check_text and (problem := text_problem(record["caption"])):
            return problem
        clip_id = None if record.get("clip_id") is None else normalize_clip_id(record["clip_id"])
        source = str(record.get("source")).lower()
        if any(clip_id in ids and source.endswith(ending) for ending, ids in options.blacklists):
            return "blacklisted"
        if options.commercial and forbids_commercial_use(record.get("licence")):
            return "licence"
        if options.guard is None:
            return None
        if clip_id in options.guard.clip_ids:
            self._leaks.update(["clip", "weak"] if record.get("weak") else ["clip"])
            return "leak_clip"
        clips = options.guard.texts.get(normalize_text(record["caption"]), set())
        self._leaks["text"] += bool(clips)
        self._leaked_clips |= clips
        return "leak_text" if clips and options.guard_texts else None

    def report(self) -> dict[str, Any]:
        """What was read, kept and left out, by input, source, licence and reason."""
        guard = None
        if self.options.guard is not None:
            guard = {
                "clips": len(self.options.guard.clip_ids),
                "removed_by_clip_id": self._leaks["clip"],
                "of_these_weak": self._leaks["weak"],
                "with_identical_text": self._leaks["text"],
                "clips_with_identical_text": len(self._leaked_clips),
                "identical_texts_removed": self.options.guard_texts,
            }
        total = sum(self._sources.values(), Counter())
        inputs = self._inputs.items()
        return {
            "inputs": {name: {"read": read, "exact_duplicates": read - len(seen)} for name, (read, seen) in inputs},
            "read": total["read"],
            "kept": total["kept"],
            "dropped": {reason: total[reason] for reason in sorted(total) if reason not in ("read", "kept")},
            "sources": {name: dict(counts) for name, counts in sorted(self._sources.items())},
            "licences": dict(self._licences.most_common()),
            "duplicates": self._duplicates.report(),
            "leak_guard": guard,
        }
