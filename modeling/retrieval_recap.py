"""The caption datastore: texts, their CLAP embeddings, and search that leaves one's own captions out.

On disk a datastore is a folder of data, never of code: `datastore.json` (what it is), captions (one JSON object a
line), embeddings and, for a large one, a search index: see `datastore_files_recap` and `datastore_index_recap`.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from .datastore_choice_recap import POOL, check_choice, choose_diverse, cut_at_drop, take_turns
from .datastore_files_recap import (
    AUDIO_KEYS,
    FORMAT_VERSION,
    MANIFEST_NAME,
    TEXT_KEYS,
    LiveEmbeddings,
    OpenedFiles,
    check_keys,
    open_files,
    read_reference,
)
from .datastore_index_recap import DeviceSearch, SearchIndex, exact_neighbours, open_index, searchable
from .datastore_writing_recap import copy_files, locked, write_manifest, write_segment
from .folding_recap import normalize_clip_id, normalize_text
from .hub_recap import DATASTORE_FILES, HubPushMixin, fetch_datastore

try:
    import faiss
except ImportError:
    faiss = None

logger = logging.getLogger(__name__)

# Another text encoder gives cosines near 0; bf16 weights or another device stay above 0.999.
_SAME_ENCODER_COSINE = 0.99
# Scores this close are the same score: float32 dot products of unit vectors differ by less between libraries.
_TIE = 1e-6
_QUERIES_AT_ONCE = 256
# Of an index's candidates an eighth, and no fewer than 32, are scored in float64.
_RESCORED_SHARE, _RESCORED_AT_LEAST = 8, 32


class CaptionDatastore(HubPushMixin):
    """Captions with their text embeddings, searched by cosine similarity (paper, Section 3.1).

    Build one with [`CaptionDatastore.from_captions`], load one with [`CaptionDatastore.from_pretrained`].

    Args:
        records (`Sequence[Mapping]`): one mapping per caption: `caption` (kept verbatim) and any other JSON values,
            of which `clip_id`, `source` and `licence` have a meaning here.
        embeddings (`np.ndarray` of shape `(num_captions, dimension)`): rows of unit length.
        fingerprint (`np.ndarray` of shape `(4, dimension)`, *optional*): `model.embed_fingerprint(processor)` of the
            encoder that made the embeddings. Without it the encoder cannot be checked.
        keys (`str`, *optional*, defaults to `"text"`): what the embeddings are of, the captions or (`"audio"`) their
            clips; see [`CaptionDatastore.from_clips`].

    Raises:
        `ValueError`: if captions and embeddings do not match, or a record has no caption.
    """

    hub_name = "caption datastore"
    hub_repo_type = "dataset"
    hub_files = DATASTORE_FILES

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
        self.records = [dict(record) for record in records]
        self.embeddings = embeddings
        self.keys = check_keys(keys)
        self.fingerprint = None if fingerprint is None else np.asarray(fingerprint, dtype=np.float32)
        self._reset(files=None)

    def _reset(self, files: OpenedFiles | None, index: SearchIndex | None = None) -> None:
        self._files = files
        self._index = index
        self._texts: dict[int, str] = {}
        # Rows of a plain array are taken in half the time of those of a memory-mapped one, which it shares.
        self._vectors = np.asarray(self.embeddings) if isinstance(self.embeddings, np.ndarray) else self.embeddings
        self._rows_of_clip: dict[str, list[int]] | None = None
        self._device_search: DeviceSearch | None = None
        self._parts: list[Any] | None = None

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
    def from_clips(
        cls, clips: Sequence[Mapping[str, Any]], model: Any, processor: Any, batch_size: int = 16
    ) -> CaptionDatastore:
        """A datastore keyed by audio: a search finds the most similar recordings, and gives a caption of each.

        Args:
            clips (`Sequence[Mapping]`): for each clip `audio` (what `load_audio` takes, or a waveform with its rate),
                `captions`, and where known `clip_id`, `source`, `licence` and other values.
            model, processor, batch_size: see [`CaptionDatastore.from_captions`]; a batch is of recordings.
        """
        from .audio_keys_recap import embed_clips

        records, embeddings = embed_clips(clips, model, processor, batch_size)
        return cls(records, embeddings, model.embed_fingerprint(processor), AUDIO_KEYS)

    @classmethod
    def from_embeddings(
        cls,
        captions: Sequence[str | Mapping[str, Any]],
        embeddings: np.ndarray,
        fingerprint: np.ndarray | None = None,
        keys: str = TEXT_KEYS,
    ) -> CaptionDatastore:
        """A datastore of captions whose embeddings are there already; rows are scaled to unit length."""
        records = [{"caption": item} if isinstance(item, str) else dict(item) for item in captions]
        embeddings = np.asarray(embeddings, dtype=np.float32)
        norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise ValueError("Embeddings must be finite and not zero: a cosine similarity with them is undefined.")
        return cls(records, embeddings / norms, fingerprint, keys)

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
        """Kind, settings and measurements of the approximate index, or `None`: the search is exact."""
        return None if self._index is None else self._index.description

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the `datastore.json` of a loaded datastore says, or `None` for one made in memory."""
        return None if self._files is None else self._files.manifest

    def set_index(self, index: SearchIndex | None) -> None:
        """Searches through `index`, which `recap_hf.datastore.build_index` made of this datastore, or exactly.

        Raises:
            `ValueError`: if it is of another datastore.
        """
        if index is not None and (index.num_rows > self._num_positions or index.dimension != self.dimension):
            raise ValueError(
                f"The index has {index.num_rows} rows of dimension {index.dimension}, the datastore "
                f"{self._num_positions} of dimension {self.dimension}: it was made of another one."
            )
        self._index = index

    def set_device(self, device: Any = None, dtype: str = "float32") -> None:
        """Searches exactly on a device of torch that holds all embeddings as `dtype`; with `None` as before."""
        self._device_search = None if device is None else DeviceSearch(self.embeddings, device, dtype)

    @property
    def _num_positions(self) -> int:
        """Rows, removed ones counted."""
        return int(self.embeddings.starts[-1]) if isinstance(self.embeddings, LiveEmbeddings) else len(self.embeddings)

    def check_encoder(self, fingerprint: np.ndarray) -> None:
        """Refuses an encoder that did not make this datastore.

        Args:
            fingerprint (`np.ndarray` of shape `(4, dimension)`): `model.embed_fingerprint(processor)`.

        Raises:
            `ValueError`: if the dimensions differ or the lowest cosine is below 0.99.
        """
        if self.dimension != fingerprint.shape[1]:
            raise ValueError(
                f"The datastore's embeddings have {self.dimension} dimensions and the model's have "
                f"{fingerprint.shape[1]}: it was made by another CLAP. Build it again with this model: "
                "CaptionDatastore.from_captions(store.records, model, processor), or `recap datastore reembed`."
            )
        if self.fingerprint is None:
            return
        cosine = float((self.fingerprint * fingerprint).sum(axis=1).min())
        if cosine < _SAME_ENCODER_COSINE:
            raise ValueError(
                f"The datastore was made by another CLAP: embeddings of the same texts have a cosine of {cosine:.3f}, "
                f"expected at least {_SAME_ENCODER_COSINE}. Build it again with this model: "
                "CaptionDatastore.from_captions(store.records, model, processor), or `recap datastore reembed`."
            )

    # ---------------------------------------------------------------- search

    def search(
        self,
        queries: Any,
        k: int = 4,
        exclude_clip_ids: Sequence[Any] | None = None,
        exclude_texts: Sequence[Sequence[str]] | None = None,
        diversity: float = 0.0,
        score_drop: float | None = None,
    ) -> list[list[dict[str, Any]]]:
        """The k captions nearest to each query, most similar first, ties to the lower row, no text twice.

        Args:
            queries (array or tensor of shape `(batch_size, dimension)` or `(batch_size, num_windows, dimension)`):
                Unit vectors. The windows of a clip each retrieve, and their results are merged in turns, so that
                every part of the clip has its say; windows of zeros are absent.
            k (`int`, *optional*, defaults to 4): captions per clip; fewer where the datastore has fewer.
            exclude_clip_ids (`Sequence`, *optional*): for each clip its id, or `None`. Captions of that id are left
                out, and so is every caption with the text of one of them.
            exclude_texts (`Sequence[Sequence[str]]`, *optional*): for each clip texts to leave out.
            diversity (`float`, *optional*, defaults to 0): 0 to 1, maximal marginal relevance: see [`choose_diverse`].
            score_drop (`float`, *optional*): leaves captions out that score so much less than a clip's best.

        Returns:
            `list[list[dict]]`: for each clip `{"caption", "score", "row", ...metadata}`; `score` is the cosine. With
                keys of audio no clip comes twice either.
        """
        queries = queries.detach().float().cpu().numpy() if hasattr(queries, "detach") else queries
        queries = np.asarray(queries, dtype=np.float32)
        if queries.ndim == 2:
            queries = queries[:, None]
        if queries.ndim != 3 or queries.shape[2] != self.dimension:
            raise ValueError(
                f"Queries must have the shape (batch_size, {self.dimension}) or (batch_size, num_windows, "
                f"{self.dimension}), got {queries.shape}."
            )
        if not isinstance(k, (int, np.integer)) or k < 0:
            raise ValueError(f"`k` must be an integer of at least 0, got {k!r}.")
        check_choice(diversity, score_drop)
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
        found: list[list[list[tuple[int, float]]]] = [[] for _ in queries]
        for start in range(0, len(clips), _QUERIES_AT_ONCE):
            block = slice(start, start + _QUERIES_AT_ONCE)
            pool = int(k) * POOL if diversity else int(k)
            nearest = self._nearest(queries[clips[block], windows[block]], pool, [excluded[c] for c in clips[block]])
            for clip, hits in zip(clips[block], nearest, strict=True):
                found[clip].append(choose_diverse(hits, self._vectors, int(k), diversity) if diversity else hits)
        merged = [take_turns(of_clip, int(k), self._text) for of_clip in found]
        if score_drop is not None:
            merged = [cut_at_drop(hits, score_drop) for hits in merged]
        return [[self._result(row, score) for row, score in hits] for hits in merged]

    def _excluded(self, clip_id: Any, texts: Sequence[str]) -> tuple[set[int], set[str]]:
        """Rows and normalized texts that a clip must not retrieve."""
        excluded_texts = {normalize_text(text) for text in texts}
        if clip_id is None:
            return set(), excluded_texts
        if self._rows_of_clip is None:
            self._rows_of_clip = defaultdict(list)
            for row, record in enumerate(self.records):
                if record.get("clip_id") is not None:
                    self._rows_of_clip[normalize_clip_id(record["clip_id"])].append(row)
        rows = self._rows_of_clip.get(normalize_clip_id(clip_id), [])
        return set(rows), excluded_texts | {self._text(row) for row in rows}

    def _text(self, row: int) -> str:
        text = self._texts.get(row)
        if text is None:
            # Folded on first use: a store of a million captions must not be folded to answer one query.
            caption = self.records[row]["caption"]
            text = self._texts[row] = normalize_text(caption) or caption
        return text

    def _nearest(
        self, queries: np.ndarray, k: int, excluded: Sequence[tuple[set[int], set[str]]]
    ) -> list[list[tuple[int, float]]]:
        """For each query up to k pairs (row, cosine), sorted, without excluded rows and repeated texts."""
        results: list[list[tuple[int, float]]] = [[] for _ in queries]
        pending = list(range(len(queries)))
        exact = self._index is None or self._device_search is not None
        fetch = min(self._num_positions, max(4 * k, 32 if exact else self._index.num_candidates))
        # An index that cannot fill k places, because most of what it finds is excluded, gives way to the exact search.
        limit = 16 * fetch
        while pending:
            candidates = self._candidates(queries[pending], fetch, exact)
            still_pending = []
            for query, row_ids in zip(pending, candidates, strict=True):
                scored = self._rescore(queries[query], row_ids, exact)
                kept = self._keep(scored, k, *excluded[query])
                # Complete when nothing that was not fetched can belong among the kept.
                complete = len(kept) == k and (not exact or scored[-1][1] < kept[-1][1] - _TIE)
                if complete or (exact and fetch == self._num_positions):
                    results[query] = kept
                else:
                    still_pending.append(query)
            pending = still_pending
            exact = exact or fetch >= min(limit, self._num_positions)
            fetch = min(self._num_positions, fetch * 4)
        return results

    def candidate_rows(self, queries: np.ndarray, count: int) -> list[np.ndarray]:
        """Rows that a search for `count` captions looks at, in any order, repeated texts and all clips among them."""
        exact = self._index is None or self._device_search is not None
        fetch = min(self._num_positions, count if exact else max(count, self._index.num_candidates))
        return self._candidates(queries, fetch, exact)

    def _candidates(self, queries: np.ndarray, count: int, exact: bool) -> list[np.ndarray]:
        """Rows of the `count` nearest embeddings for each query, in any order."""
        several = isinstance(self.embeddings, LiveEmbeddings)
        if self._device_search is not None:
            return list(self._device_search.search(queries, min(count, len(self))))
        if self._parts is None:
            self._parts = [searchable(part) for part in (self.embeddings.parts if several else [self.embeddings])]
        covered = 0 if exact else self._index.num_rows
        found = [] if exact else [self._index.search(queries, min(count, covered))]
        start = 0
        for part in self._parts:
            if start >= covered:
                found.append(exact_neighbours(queries, part, count, faiss) + start)
            start += len(part)
        # faiss pads with -1 where an index has fewer rows than asked for.
        positions = [each[each >= 0] for each in (found[0] if len(found) == 1 else np.concatenate(found, axis=1))]
        live = self.embeddings.live if several else None
        return positions if live is None else [_rows_at(each, live) for each in positions]

    def _rescore(self, query: np.ndarray, rows: np.ndarray, exact: bool) -> list[tuple[int, float]]:
        """Pairs (row, cosine) in order: most similar first, ties to the lower row.

        In float64 and row by row, so that a score does not depend on which rows or queries were computed with it.
        """
        vectors = self._vectors[rows]
        if not exact and len(rows) > 2 * _RESCORED_AT_LEAST:
            # Of many candidates of an index most are far off: those go by their scores in float32.
            kept = max(_RESCORED_AT_LEAST, len(rows) // _RESCORED_SHARE)
            rough = vectors.astype(np.float32, copy=False) @ query
            chosen = np.flatnonzero(rough >= np.partition(rough, -kept)[-kept] - 1e-5)
            rows, vectors = rows[chosen], vectors[chosen]
        scores = np.round((vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1), 9)
        order = np.lexsort((rows, -scores))
        return [(int(rows[i]), float(scores[i])) for i in order]

    def _keep(
        self, scored: list[tuple[int, float]], k: int, rows: set[int], texts: set[str]
    ) -> list[tuple[int, float]]:
        kept, seen, clips = [], set(texts), set()
        for row, score in scored:
            # Captions of one clip have one key of audio: the first of them speaks for it.
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
        record = self.records[row]
        metadata = {key: value for key, value in record.items() if key != "caption" and value is not None}
        return {"caption": record["caption"], "score": score, "row": row, **metadata}

    # ------------------------------------------------------------ files, Hub

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the datastore into a folder, without what was removed from it. The manifest comes last and at once:
        a reader sees all or nothing, also where an older datastore is replaced."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = str(self.embeddings.dtype) if self.embeddings.dtype in (np.float16, np.int8) else "float32"
        replaced = (folder / MANIFEST_NAME).is_file()
        with locked(folder) if replaced else nullcontext():
            files: dict[str, Any] = {}
            if self._files is not None and self._files.live is None:
                segments = self._files.manifest["segments"]
                copy_files(self._files, folder, files)
            else:
                segments = [write_segment(folder, self.records, self.embeddings, files, dtype, not replaced)]
            index = None
            if self._index is not None and self._files is not None and self._files.live is not None:
                logger.warning("%s: saved without its index, which counts removed captions. Make it anew.", folder)
            elif self._index is not None:
                index = self._index.write(folder, files)
            write_manifest(
                folder,
                {
                    "num_captions": len(self),
                    "dimension": self.dimension,
                    "keys": self.keys,
                    "dtype": dtype,
                    "fingerprint": None if self.fingerprint is None else self.fingerprint.round(7).tolist(),
                    "segments": segments,
                    "index": index,
                    "report": None if self._files is None else self._files.manifest["report"],
                    "files": files,
                },
            )

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
                `milvus:captions.db#captions`, `milvus://host:19530#captions` (see [`MilvusCaptionDatastore`]).
            subfolder (`str`, *optional*): the folder inside.
            repo_type (`str`, *optional*): kind of Hub repository, `"dataset"` or `"model"` for the datastore inside
                a checkpoint. By default the first that there is.
            verify (`bool`, *optional*, defaults to `True`): compare the files with their checksums.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and what else `snapshot_download` takes.

        A datastore may be a reference to another repository at a fixed revision, as `recap push --datastore-repo`
        leaves it in a checkpoint: it is followed.

        Raises:
            `OSError`: if there is no datastore. `ValueError`: if it is damaged, tampered with or of a newer format.
        """
        if str(name_or_path).startswith("milvus:"):
            from .datastore_milvus_recap import MilvusCaptionDatastore

            return MilvusCaptionDatastore.from_pretrained(name_or_path, **hub_kwargs)
        folder = Path(name_or_path, subfolder)
        if not Path(name_or_path).is_dir():
            folder = fetch_datastore(str(name_or_path), repo_type=repo_type, subfolder=subfolder, **hub_kwargs)
        reference = read_reference(folder / MANIFEST_NAME)
        if reference is not None:
            # Once only: what is referred to must be a datastore, not the next reference.
            folder = fetch_datastore(repo_type="dataset", **{**hub_kwargs, **reference})
        files = open_files(folder, verify, lambda folder, manifest: open_index(folder, manifest, faiss))
        store = cls.__new__(cls)
        store.records, store.embeddings, store.keys = files.records, files.embeddings, files.manifest["keys"]
        fingerprint = files.manifest["fingerprint"]
        store.fingerprint = None if fingerprint is None else np.asarray(fingerprint, dtype=np.float32)
        store._reset(files, files.index)
        return store


def _rows_at(positions: np.ndarray, live: np.ndarray) -> np.ndarray:
    """Rows of the positions that are not removed."""
    rows = np.minimum(np.searchsorted(live, positions), max(len(live) - 1, 0))
    return rows[live[rows] == positions] if len(live) else rows[:0]


__all__ = ["FORMAT_VERSION", "MANIFEST_NAME", "CaptionDatastore", "normalize_clip_id", "normalize_text"]
