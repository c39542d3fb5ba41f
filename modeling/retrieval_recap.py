"""The caption datastore: texts, their CLAP embeddings, and search that leaves a clip's own captions out.

On disk a datastore is a folder of data, never of code: see `datastore_files_recap`. Search goes through an index
(`index_recap`): exact by default, or FAISS; captions in a Milvus collection need the package `recap_hf`.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .caption_tables_recap import CAPTION_SUFFIXES, read_captions
from .datastore_files_recap import (
    AUDIO_KEYS,
    FORMAT_VERSION,
    KEYS,
    MANIFEST_NAME,
    TEXT_KEYS,
    Int8Embeddings,
    array_blocks,
    locked,
    open_embeddings,
    open_files,
    publish,
    read_reference,
    write_new,
)
from .hub_recap import fetch_datastore, upload_datastore
from .index_recap import ExactIndex, SearchIndex, StoredIndex

Hit = tuple[int, float]
# Another text encoder gives cosines near 0; bf16 weights or another device stay above 0.999.
_SAME_ENCODER_COSINE = 0.99
# Scores this close are the same score: float32 dot products of unit vectors differ by less between libraries.
_TIE = 1e-6
_QUERIES_AT_ONCE = 256
# Of an index's candidates an eighth, and no fewer than 32, are scored in float64.
_RESCORED_SHARE, _RESCORED_AT_LEAST = 8, 32
# Diverse captions are chosen from this many times as many.
_POOL = 8
# Audio, and the features that published lists name in its place.
_AUDIO_SUFFIX = re.compile(r"\.(wav|flac|mp3|ogg|opus|m4a|webm|mp4|mkv|aiff?|au|caf|wma|aac|npy)$", re.IGNORECASE)
# AudioSet releases put a Y before the 11 characters of a YouTube id.
_YOUTUBE_PREFIX = re.compile(r"^Y(?=[A-Za-z0-9_-]{11}$)")


class CaptionDatastore:
    """Captions with their text embeddings, searched by cosine similarity (paper, Section 3.1).

    Build one with [`CaptionDatastore.from_captions`], load one with [`CaptionDatastore.from_pretrained`].

    Args:
        records (`Sequence[Mapping]`): one mapping per caption: `caption` (kept verbatim) and any other JSON values,
            of which `clip_id`, `source` and `licence` have a meaning here.
        embeddings (`np.ndarray` of shape `(num_captions, dimension)`): rows of unit length.
        fingerprint (`np.ndarray` of shape `(4, dimension)`, *optional*): `model.embed_fingerprint(processor)` of the
            encoder that made the embeddings. Without it the encoder cannot be checked.
        keys (`str`, *optional*, defaults to `"text"`): what the embeddings are of, the captions or (`"audio"`) their
            clips; `recap_hf.datastore.datastore_from_clips` makes the latter.

    Raises:
        `ValueError`: if captions and embeddings do not match, or a record has no caption.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        embeddings: np.ndarray,
        fingerprint: np.ndarray | None = None,
        keys: str = TEXT_KEYS,
    ) -> None:
        embeddings = np.asanyarray(embeddings)
        if embeddings.ndim != 2 or len(embeddings) != len(records):
            raise ValueError(
                f"A datastore needs one embedding per caption: got {len(records)} captions and embeddings of shape "
                f"{embeddings.shape}, expected ({len(records)}, dimension)."
            )
        for row, record in enumerate(records):
            if not isinstance(record.get("caption"), str) or not record["caption"].strip():
                raise ValueError(f"Row {row} has no caption: expected a text under 'caption', got {record!r:.200}.")
        self._set([dict(record) for record in records], embeddings, fingerprint, keys)

    def _set(
        self,
        records: Sequence[Any],
        embeddings: Any,
        fingerprint: Any,
        keys: str,
        index: StoredIndex | None = None,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        if keys not in KEYS:
            raise ValueError(f"The keys of a datastore are 'text' or 'audio', got {keys!r}.")
        self.records, self.embeddings, self.keys = records, embeddings, keys
        self.fingerprint = None if fingerprint is None else np.asarray(fingerprint, dtype=np.float32)
        self._index: SearchIndex | None = index
        self._manifest = manifest
        self._forget()

    def _forget(self) -> None:
        """Drops all that is derived from records and embeddings, and made again when it is needed."""
        self._texts: dict[int, str] = {}
        self._rows_of_clip: dict[str, list[int]] | None = None
        self._exact: ExactIndex | None = None
        # Rows of a plain array are taken in half the time of those of a memory map, whose memory it shares.
        self._vectors = np.asarray(self.embeddings) if isinstance(self.embeddings, np.ndarray) else self.embeddings

    # ---------------------------------------------------------- construction

    @classmethod
    def from_captions(
        cls, captions: Sequence[str | Mapping[str, Any]], model: Any, processor: Any, batch_size: int = 64
    ) -> CaptionDatastore:
        """Embeds captions with the text tower of `model`.

        Args:
            captions (`Sequence[str | Mapping]`): texts, or mappings with a `caption` and, where known, `clip_id`,
                `source`, `licence` and other values.
            model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the encoder and its tokenizer.
            batch_size (`int`, *optional*, defaults to 64): captions per forward pass.
        """
        records = [{"caption": item} if isinstance(item, str) else dict(item) for item in captions]
        for row, record in enumerate(records):
            if not isinstance(record.get("caption"), str) or not record["caption"].strip():
                raise ValueError(f"Caption {row} is empty or no text: {record.get('caption')!r}.")
        embeddings = model.embed_captions([record["caption"] for record in records], processor, batch_size=batch_size)
        return cls(records, embeddings, model.embed_fingerprint(processor))

    @classmethod
    def from_embeddings(
        cls,
        captions: Sequence[str | Mapping[str, Any]],
        embeddings: np.ndarray,
        fingerprint: np.ndarray | None = None,
        keys: str = TEXT_KEYS,
    ) -> CaptionDatastore:
        """A datastore of captions that are embedded already; rows are scaled to unit length."""
        records = [{"caption": item} if isinstance(item, str) else dict(item) for item in captions]
        embeddings = np.asarray(embeddings, dtype=np.float32)
        norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise ValueError("Embeddings must be finite and not zero: a cosine similarity with them is undefined.")
        return cls(records, embeddings / norms, fingerprint, keys)

    @classmethod
    def from_clips(cls, *args: Any, **kwargs: Any) -> CaptionDatastore:
        """Moved to `recap_hf.datastore`."""
        raise AttributeError("`CaptionDatastore.from_clips` is now `recap_hf.datastore.datastore_from_clips`.")

    def __deepcopy__(self, memo: Any) -> CaptionDatastore:
        twin = self.__class__.__new__(self.__class__)
        # Files that are memory-mapped never change: copies share them.
        shared = (np.memmap, Int8Embeddings)
        for name, value in self.__dict__.items():
            if not name.startswith(("_texts", "_rows_of_clip", "_exact", "_vectors")):
                twin.__dict__[name] = value if isinstance(value, shared) else copy.deepcopy(value, memo)
        twin._forget()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Memory-mapped files are pickled as their paths and opened again."""
        state = {name: self.__dict__[name] for name in ("records", "embeddings", "keys", "fingerprint")}
        raw = getattr(self.embeddings, "codes", self.embeddings)
        if getattr(raw, "filename", None):
            state["embeddings"] = Path(raw.filename)
        return state | {"index": self._index, "manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["embeddings"], Path):
            state = {**state, "embeddings": open_embeddings(state["embeddings"])}
        self._set(**state)

    # ------------------------------------------------------------ properties

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"CaptionDatastore({len(self)} captions, dimension {self.dimension})"

    @property
    def captions(self) -> list[str]:
        """The captions, verbatim, in the order of the rows."""
        return [record["caption"] for record in self.records]

    @property
    def dimension(self) -> int:
        """Width of the embeddings: the projection dimension of the CLAP that made them."""
        return self.embeddings.shape[1]

    @property
    def index(self) -> dict[str, Any] | None:
        """Kind, settings and measurements of the approximate index, or `None`: search is exact."""
        return self.search_index.description

    @property
    def search_index(self) -> SearchIndex:
        """The index that `search` uses."""
        return self._exact_index() if self._index is None else self._index

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The `datastore.json` of a loaded datastore, or `None` for one made in memory."""
        return self._manifest

    def set_index(self, index: StoredIndex | None) -> None:
        """Searches through `index`, which `recap_hf.datastore.build_index` made of this datastore; `None`: exactly.

        Raises:
            `ValueError`: if it is of another datastore.
        """
        if index is not None and (index.num_rows, index.dimension) != (len(self), self.dimension):
            raise ValueError(
                f"The index has {index.num_rows} rows of dimension {index.dimension}, the datastore "
                f"{len(self)} of dimension {self.dimension}: it was made of another one."
            )
        self._index = index

    def check_encoder(self, fingerprint: np.ndarray) -> None:
        """Refuses an encoder that did not make this datastore.

        Args:
            fingerprint (`np.ndarray` of shape `(4, dimension)`): `model.embed_fingerprint(processor)`.

        Raises:
            `ValueError`: if the dimensions differ or the lowest cosine is below 0.99.
        """
        again = (
            "Build it again with this model: CaptionDatastore.from_captions(store.records, model, processor), or "
            "`recap datastore reembed`."
        )
        if self.dimension != fingerprint.shape[1]:
            raise ValueError(
                f"The datastore's embeddings have {self.dimension} dimensions and the model's have "
                f"{fingerprint.shape[1]}: it was made by another CLAP. {again}"
            )
        if self.fingerprint is None:
            return
        cosine = float((self.fingerprint * fingerprint).sum(axis=1).min())
        if cosine < _SAME_ENCODER_COSINE:
            raise ValueError(
                f"The datastore was made by another CLAP: embeddings of the same texts have a cosine of {cosine:.3f}, "
                f"expected at least {_SAME_ENCODER_COSINE}. {again}"
            )

    # ---------------------------------------------------------------- search

    def search(
        self,
        queries: Any,
        k: int = 4,
        exclude_clip_ids: Sequence[Any] | None = None,
        exclude_texts: Sequence[Sequence[str]] | None = None,
        diversity: float = 0.0,
        score_threshold: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The k captions nearest to each query, most similar first, ties to the lower row, no text twice.

        Args:
            queries (array or tensor of shape `(batch_size, dimension)` or `(batch_size, num_windows, dimension)`):
                Unit vectors. Each window of a clip is searched, and the results are merged round-robin: all first
                results, then all second ones. Windows of zeros are absent.
            k (`int`, *optional*, defaults to 4): captions per clip; fewer where the datastore has fewer.
            exclude_clip_ids (`Sequence`, *optional*): for each clip its id, or `None`. Captions of that id are left
                out, and so is every caption with the text of one of them.
            exclude_texts (`Sequence[Sequence[str]]`, *optional*): for each clip texts to leave out.
            diversity (`float`, *optional*, defaults to 0): 0 to 1, maximal marginal relevance: see [`choose_diverse`].
            score_threshold (`float`, *optional*): captions whose cosine is below it are left out.

        Returns:
            `list[list[dict]]`: for each clip `{"caption", "score", "row", ...metadata}`; `score` is the cosine. With
                keys of audio no clip comes twice either.

        Raises:
            `ValueError`: for queries of another shape, and for values out of their range.
        """
        queries = queries.detach().float().cpu().numpy() if hasattr(queries, "detach") else queries
        queries = np.asarray(queries, dtype=np.float32)
        queries = queries[:, None] if queries.ndim == 2 else queries
        if queries.ndim != 3 or queries.shape[2] != self.dimension:
            raise ValueError(
                f"Queries must have the shape (batch_size, {self.dimension}) or (batch_size, num_windows, "
                f"{self.dimension}), got {queries.shape}."
            )
        if not isinstance(k, (int, np.integer)) or k < 0:
            raise ValueError(f"`k` must be an integer of at least 0, got {k!r}.")
        check_choice(diversity, score_threshold)
        for name, value in (("exclude_clip_ids", exclude_clip_ids), ("exclude_texts", exclude_texts)):
            if value is not None and len(value) != len(queries):
                raise ValueError(f"`{name}` needs one entry per clip: got {len(value)} for {len(queries)} clips.")
        clips, windows = np.nonzero(np.abs(queries).max(axis=2) > 0)
        if not k or not len(self):
            clips, windows = clips[:0], windows[:0]
        excluded = {
            clip: self._excluded(
                None if exclude_clip_ids is None else exclude_clip_ids[clip],
                () if exclude_texts is None else exclude_texts[clip],
            )
            for clip in set(clips.tolist())
        }
        found: list[list[list[Hit]]] = [[] for _ in queries]
        pool = int(k) * _POOL if diversity else int(k)
        for start in range(0, len(clips), _QUERIES_AT_ONCE):
            block = slice(start, start + _QUERIES_AT_ONCE)
            nearest = self._nearest(queries[clips[block], windows[block]], pool, [excluded[c] for c in clips[block]])
            for clip, hits in zip(clips[block], nearest, strict=True):
                if score_threshold is not None:
                    hits = [hit for hit in hits if hit[1] >= score_threshold]
                found[clip].append(choose_diverse(hits, self._vectors, int(k), diversity))
        merged = [merge_round_robin(of_clip, int(k), self._text) for of_clip in found]
        return [[self._result(row, score) for row, score in hits] for hits in merged]

    def _excluded(self, clip_id: Any, texts: Sequence[str]) -> tuple[set[int], set[str]]:
        """Rows and normalized texts that a clip must not retrieve."""
        excluded_texts = {normalize_text(text) for text in texts}
        if clip_id is None:
            return set(), excluded_texts
        rows = self._rows_of(normalize_clip_id(clip_id))
        return set(rows), excluded_texts | {self._text(row) for row in rows}

    def _rows_of(self, clip: str) -> Sequence[int]:
        """Rows of a clip, given its normalized id."""
        if self._rows_of_clip is None:
            self._rows_of_clip = defaultdict(list)
            for row, record in enumerate(self.records):
                if record.get("clip_id") is not None:
                    self._rows_of_clip[normalize_clip_id(record["clip_id"])].append(row)
        return self._rows_of_clip.get(clip, [])

    def _text(self, row: int) -> str:
        text = self._texts.get(row)
        if text is None:
            # Normalized on first use: a store of a million captions must not be normalized to answer one query.
            caption = self.records[row]["caption"]
            text = self._texts[row] = normalize_text(caption) or caption
        return text

    def _exact_index(self) -> ExactIndex:
        if self._exact is None:
            self._exact = ExactIndex(self.embeddings)
        return self._exact

    def _nearest(self, queries: np.ndarray, k: int, excluded: Sequence[tuple[set[int], set[str]]]) -> list[list[Hit]]:
        """For each query up to k pairs (row, cosine), sorted, without excluded rows and repeated texts."""
        results: list[list[Hit]] = [[] for _ in queries]
        pending = list(range(len(queries)))
        index = self.search_index
        fetch = min(index.max_k, max(4 * k, index.num_candidates))
        # An index that cannot fill k places, because most of what it finds is excluded, gives way to exact search.
        limit = min(16 * fetch, index.max_k)
        while pending:
            candidates = index.search(queries[pending], fetch)[0]
            still_pending = []
            for query, rows in zip(pending, candidates, strict=True):
                scored = self._rescore(queries[query], rows[rows >= 0], index.exact)
                kept = self._keep(scored, k, *excluded[query])
                # Complete when nothing that was not fetched can belong among the kept.
                complete = len(kept) == k and (not index.exact or scored[-1][1] < kept[-1][1] - _TIE)
                if complete or (index.exact and fetch == index.max_k):
                    results[query] = kept
                else:
                    still_pending.append(query)
            pending = still_pending
            if not index.exact and fetch >= limit:
                index = self._exact_index()
            fetch = min(index.max_k, fetch * 4)
        return results

    def _rescore(self, query: np.ndarray, rows: np.ndarray, exact: bool) -> list[Hit]:
        """Pairs (row, cosine) in order: most similar first, ties to the lower row.

        In float64 and row by row, so that a score does not depend on which rows or queries were computed with it.
        """
        vectors = self._vectors[rows]
        if not exact and len(rows) > 2 * _RESCORED_AT_LEAST:
            # Of many candidates of an index most are far off: those are dropped by their scores in float32.
            kept = max(_RESCORED_AT_LEAST, len(rows) // _RESCORED_SHARE)
            rough = vectors.astype(np.float32, copy=False) @ query
            chosen = np.flatnonzero(rough >= np.partition(rough, -kept)[-kept] - 1e-5)
            rows, vectors = rows[chosen], vectors[chosen]
        scores = np.round((vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1), 9)
        order = np.lexsort((rows, -scores))
        return list(zip(rows[order].tolist(), scores[order].tolist(), strict=True))

    def _keep(self, scored: list[Hit], k: int, rows: set[int], texts: set[str]) -> list[Hit]:
        kept, seen, clips = [], set(texts), set()
        for row, score in scored:
            # Captions of one clip have the same key of audio: the first of them is taken.
            clip = (self.records[row].get("clip_id") or row) if self.keys == AUDIO_KEYS else row
            if row in rows or clip in clips or self._text(row) in seen:
                continue
            seen.add(self._text(row))
            clips.add(clip)
            kept.append((row, score))
            if len(kept) == k:
                break
        return kept

    def _result(self, row: int, score: float) -> dict[str, Any]:
        record = {key: value for key, value in self.records[row].items() if value is not None}
        # Columns of a record that have these names do not replace the result.
        found = {"caption": record["caption"], "score": score, "row": row}
        return found | {key: value for key, value in record.items() if key not in found}

    # ------------------------------------------------------------ files, Hub

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the datastore into a folder. The manifest comes last and at once: a reader sees all or nothing, also
        where an older datastore is replaced."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.embeddings.dtype) if self.embeddings.dtype in (np.float16, np.int8) else "float32"
        with locked(folder) if (folder / MANIFEST_NAME).is_file() else nullcontext():
            new = write_new(folder, self.records, array_blocks(self.embeddings), self.embeddings.shape, dtype)
            contents = {
                "num_captions": len(self),
                "dimension": self.dimension,
                "keys": self.keys,
                "dtype": dtype,
                "fingerprint": None if self.fingerprint is None else self.fingerprint.round(7).tolist(),
                "report": (self._manifest or {}).get("report"),
            }
            publish(folder, contents, new, self._index)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Saves the datastore and pushes it as a dataset repository. `recap push` adds a card and Parquet files.

        Args:
            repo_id (`str`): `user/name`; made if it does not exist.
            options: `private`, `token`, `revision`, `create_pr` and `commit_message`, as in
                `huggingface_hub.HfApi.upload_folder`.

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_datastore(folder, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        subfolder: str = "",
        repo_type: str | None = None,
        verify: bool = True,
        **hub_kwargs: Any,
    ) -> CaptionDatastore:
        """Loads a datastore from a folder or from the Hub.

        Args:
            name_or_path (`str` or path): a folder with a `datastore.json`, a Hub id, or a collection of Milvus:
                `milvus:captions.db#captions`, `milvus://host:19530#captions`.
            subfolder (`str`, *optional*): the folder inside.
            repo_type (`str`, *optional*): kind of Hub repository, `"dataset"` or `"model"` for the datastore inside
                a checkpoint. By default the first that there is.
            verify (`bool`, *optional*, defaults to `True`): compare the files with their checksums.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and what else `snapshot_download` takes.

        A datastore may be a reference to another repository at a fixed revision, as `recap push --datastore-repo`
        leaves it in a checkpoint: it is followed.

        Raises:
            `OSError`: if there is no datastore. `ValueError`: if it is damaged, tampered with or of a newer format.
            `ImportError`: for a collection of Milvus where `recap_hf` is not installed.
        """
        if str(name_or_path).startswith("milvus:"):
            try:
                milvus = importlib.import_module("recap_hf.datastore.milvus")
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "recap_hf":
                    raise
                message = f"{name_or_path}: captions in Milvus need recap_hf: pip install recap-hf[milvus]"
                raise ImportError(message) from error
            return milvus.MilvusCaptionDatastore.from_pretrained(name_or_path, **hub_kwargs)
        folder = Path(name_or_path, subfolder)
        if not Path(name_or_path).is_dir():
            folder = fetch_datastore(str(name_or_path), repo_type=repo_type, subfolder=subfolder, **hub_kwargs)
        reference = read_reference(folder / MANIFEST_NAME)
        if reference is not None:
            # Once only: what is referred to must be a datastore, not the next reference.
            folder = fetch_datastore(repo_type="dataset", **{**hub_kwargs, **reference})
        return cls.open_folder(folder, verify)

    @classmethod
    def open_folder(cls, folder: str | os.PathLike, verify: bool = True) -> CaptionDatastore:
        """As [`CaptionDatastore.from_pretrained`], for a folder alone."""
        records, embeddings, index, manifest = open_files(Path(folder), verify)
        store = cls.__new__(cls)
        store._set(records, embeddings, manifest["fingerprint"], manifest["keys"], index, manifest)
        return store


def check_choice(diversity: Any, score_threshold: Any) -> None:
    """A `ValueError` unless `diversity` is from 0 to 1 and `score_threshold` from -1 to 1, or `None`."""
    for name, value, low in (("diversity", diversity, 0), ("score_threshold", score_threshold, -1)):
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not (number and low <= value <= 1) and not (value is None and low == -1):
            raise ValueError(f"`{name}` must be a number from {low} to 1, got {value!r}.")


def _by_similarity(hit: Hit) -> tuple[float, int]:
    return -hit[1], hit[0]


def merge_round_robin(found: Sequence[Sequence[Hit]], k: int, text_of: Callable[[int], str]) -> list[Hit]:
    """Merges the windows' results: all first ones, then all second ones, until there are k texts.

    Args:
        found: for each window its hits (row, cosine), most similar first.
        k: hits to give.
        text_of: the text of a row; no text comes twice.
    """
    if len(found) == 1:
        return list(found[0])
    merged: dict[str, Hit] = {}
    for rank in range(k):
        for row, score in sorted((hits[rank] for hits in found if rank < len(hits)), key=_by_similarity):
            text = text_of(row)
            if text in merged:
                # Another window found it too: its best similarity counts.
                merged[text] = min(merged[text], (row, score), key=_by_similarity)
            elif len(merged) < k:
                merged[text] = (row, score)
    return sorted(merged.values(), key=_by_similarity)


def choose_diverse(hits: Sequence[Hit], embeddings: Any, k: int, diversity: float) -> list[Hit]:
    """Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): k of the hits that are near the query and far
    from each other. Each next one has the largest `(1 - diversity) * cosine to the query - diversity * largest cosine
    to those chosen before`.

    Args:
        hits: (row, cosine), most similar first; the first is always chosen.
        embeddings: unit vectors of all rows.
        k: how many.
        diversity: 0 gives the first k, 1 looks at nothing but the distance from each other.

    Returns:
        Those chosen, most similar first.
    """
    if len(hits) <= k or not diversity:
        return list(hits[:k])
    vectors = np.asarray(embeddings[np.array([row for row, _ in hits])], dtype=np.float32)
    relevance = (1 - diversity) * np.array([score for _, score in hits])
    chosen = [0]
    nearest = vectors @ vectors[0]
    while len(chosen) < k:
        gain = relevance - diversity * nearest
        gain[chosen] = -np.inf
        best = int(np.argmax(gain))
        chosen.append(best)
        nearest = np.maximum(nearest, vectors @ vectors[best])
    return [hits[number] for number in sorted(chosen)]


def normalize_text(text: str) -> str:
    """A caption without case, punctuation and repeated white space, for comparison.

    >>> normalize_text("A dog barks, twice.") == normalize_text("a  dog barks twice")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char if char.isalnum() else " " for char in folded).split())


def normalize_clip_id(clip_id: Any) -> str:
    """A clip id without folder, audio suffix, AudioSet's Y, case and punctuation, for comparison.

    >>> normalize_clip_id("development/Santa Motor.wav") == normalize_clip_id("Santa_Motor")
    True
    >>> normalize_clip_id("Y7fmOlUlwoNg.wav") == normalize_clip_id("7fmOlUlwoNg")
    True
    """
    name = str(clip_id).replace("\\", "/").rpartition("/")[2]
    return normalize_text(_YOUTUBE_PREFIX.sub("", _AUDIO_SUFFIX.sub("", name))) or name


def open_datastore(source: Any, model: Any, processor: Any) -> CaptionDatastore:
    """A datastore out of whatever names one.

    Args:
        source: a [`CaptionDatastore`], a folder or Hub id of one, a table of captions, or a list of captions.
        model, processor: embed the captions of a table or a list.
    """
    if isinstance(source, (list, tuple)):
        return CaptionDatastore.from_captions(source, model, processor)
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    if path.is_file():
        return CaptionDatastore.from_captions(read_captions(path), model, processor)
    if path.suffix.lower() in CAPTION_SUFFIXES and not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file of captions.")
    if path.is_dir() and not (path / MANIFEST_NAME).is_file() and (path / "datastore" / MANIFEST_NAME).is_file():
        # A checkpoint folder stands for the datastore inside it.
        path = path / "datastore"
    return CaptionDatastore.from_pretrained(path if path.is_dir() else str(source))


__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "CaptionDatastore",
    "normalize_clip_id",
    "normalize_text",
    "open_datastore",
    "read_captions",
]
