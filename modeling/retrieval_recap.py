"""The caption datastore: texts, their CLAP embeddings, and search that leaves a clip's own captions out.

On disk a datastore is a folder of data, never of code: see `datastore_files_recap`. Search goes through an index
(`index_recap`): exact by default, or FAISS; captions in a Milvus collection need the package `recap_hf`.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .datastore_files_recap import (
    AUDIO_KEYS,
    KEYS,
    MANIFEST_NAME,
    TEXT_KEYS,
    Int8Embeddings,
    copy_files,
    fetch_datastore,
    normalize_clip_id,
    normalize_text,
    open_embeddings,
    open_files,
    read_reference,
)
from .index_recap import ExactIndex, Hit, choose_diverse, from_package, merge_round_robin, score_again
from .options_recap import CaptionOptions

# Another text encoder gives cosines near 0; bf16 weights or another device stay above 0.999.
_SAME_ENCODER_COSINE = 0.99
# Scores this close are the same score: float32 dot products of unit vectors differ by less between libraries.
_TIE = 1e-6
_QUERIES_AT_ONCE = 256
# Diverse captions are chosen from this many times as many, and from 200 at least.
_POOL, _POOL_AT_LEAST = 8, 200
# Files that are read as a table of captions.
CAPTION_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")


class CaptionDatastore:
    """Captions with their text embeddings, searched by cosine similarity (paper, Section 3.1).

    Build one with [`CaptionDatastore.from_captions`], load one with [`CaptionDatastore.from_pretrained`].

    Args:
        records (`Sequence[str | Mapping]`): texts, or mappings with a `caption` (kept verbatim) and any other JSON
            values, of which `clip_id`, `source` and `licence` have a meaning here.
        embeddings (`np.ndarray` of shape `(num_captions, dimension)`): rows of unit length.
        fingerprint (`np.ndarray` of shape `(4, dimension)`, *optional*): `model.embed_fingerprint(processor)` of the
            encoder that made the embeddings. Without it the encoder cannot be checked.
        keys (`str`, *optional*, defaults to `"text"`): what the embeddings are of, the captions or (`"audio"`) their
            clips; `recap_hf.datastore.datastore_from_clips` makes the latter.

    `manifest` is the `datastore.json` of a loaded datastore, and `None` for one made in memory.

    Raises:
        `ValueError`: if captions and embeddings do not match, or a record has no caption.
    """

    def __init__(
        self,
        records: Sequence[str | Mapping[str, Any]],
        embeddings: np.ndarray,
        fingerprint: np.ndarray | None = None,
        keys: str = TEXT_KEYS,
    ) -> None:
        # A view of a memory map would be pickled as all of its file.
        embeddings = np.asarray(embeddings)
        if embeddings.ndim != 2 or len(embeddings) != len(records):
            raise ValueError(
                f"A datastore needs one embedding per caption: got {len(records)} captions and embeddings of shape "
                f"{embeddings.shape}, expected ({len(records)}, dimension)."
            )
        self._set(_as_records(records), embeddings, fingerprint, keys)

    def _set(
        self,
        records: Sequence[Any],
        embeddings: Any,
        fingerprint: Any,
        keys: str,
        index: Any = None,
        manifest: dict[str, Any] | None = None,
    ) -> None:
        if keys not in KEYS:
            raise ValueError(f"The keys of a datastore are 'text' or 'audio', got {keys!r}.")
        self.records, self.embeddings, self.keys = records, embeddings, keys
        self.fingerprint = None if fingerprint is None else np.asarray(fingerprint, dtype=np.float32)
        self._index = index
        self.manifest = manifest
        # What follows is derived from records and embeddings, and made when it is needed.
        self._texts: dict[int, str] = {}
        self._rows_of_clip: dict[str, list[int]] | None = None
        self._exact: ExactIndex | None = None
        # Rows of a plain array are taken in half the time of those of a memory map, whose memory it shares.
        self._vectors = np.asarray(embeddings) if isinstance(embeddings, np.ndarray) else embeddings

    @classmethod
    def from_captions(
        cls, captions: Sequence[str | Mapping[str, Any]], model: Any, processor: Any, batch_size: int = 64
    ) -> CaptionDatastore:
        """Embeds captions with the text tower of `model`.

        Args:
            captions (`Sequence[str | Mapping]`): see `records` of this class.
            model ([`RecapForConditionalGeneration`]), processor ([`RecapProcessor`]): the encoder and its tokenizer.
            batch_size (`int`, *optional*, defaults to 64): captions per forward pass.
        """
        records = _as_records(captions)
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
        embeddings = np.asarray(embeddings, dtype=np.float32)
        norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
        if not np.isfinite(norms).all() or (norms == 0).any():
            raise ValueError("Embeddings must be finite and not zero: a cosine similarity with them is undefined.")
        return cls(captions, embeddings / norms, fingerprint, keys)

    def __deepcopy__(self, memo: Any) -> CaptionDatastore:
        # Files that are memory-mapped never change: copies share them.
        shared = isinstance(self.embeddings, (np.memmap, Int8Embeddings))
        embeddings = self.embeddings if shared else self.embeddings.copy()
        others = (self.fingerprint, self.keys, self._index, self.manifest)
        twin = self.__class__.__new__(self.__class__)
        twin._set(copy.deepcopy(self.records, memo), embeddings, *copy.deepcopy(others, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Memory-mapped files are pickled as their paths and opened again."""
        state = {name: self.__dict__[name] for name in ("records", "embeddings", "keys", "fingerprint")}
        raw = getattr(self.embeddings, "codes", self.embeddings)
        if getattr(raw, "filename", None):
            state["embeddings"] = Path(raw.filename)
        return state | {"index": self._index, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["embeddings"], Path):
            state = {**state, "embeddings": open_embeddings(state["embeddings"])}
        self._set(**state)

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
    def search_index(self) -> Any:
        """The index that `search` uses."""
        return self._exact_index() if self._index is None else self._index

    def _exact_index(self) -> ExactIndex:
        if self._exact is None:
            self._exact = ExactIndex(self.embeddings)
        return self._exact

    def set_index(self, index: Any) -> None:
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
        if self.dimension != fingerprint.shape[1]:
            problem = f"its embeddings have {self.dimension} dimensions and the model's have {fingerprint.shape[1]}"
        elif self.fingerprint is None:
            return
        else:
            cosine = float((self.fingerprint * fingerprint).sum(axis=1).min())
            if cosine >= _SAME_ENCODER_COSINE:
                return
            problem = f"embeddings of the same texts have a cosine of {cosine:.3f}, expected {_SAME_ENCODER_COSINE}"
        raise ValueError(
            f"The datastore was made by another CLAP: {problem}. Build it again with this model: "
            "CaptionDatastore.from_captions(store.records, model, processor), or `recap datastore reembed`."
        )

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
            diversity (`float`, *optional*, defaults to 0): 0 to 1, captions that differ: see [`choose_diverse`].
            score_threshold (`float`, *optional*): captions whose cosine is below it are left out.

        Returns:
            `list[list[dict]]`: for each clip `{"caption", "score", "row", ...metadata}`; `score` is the cosine. With
                keys of audio no clip comes twice for a window either.

        Raises:
            `ValueError`: for queries of another shape, and for values out of their range.
        """
        queries = queries.detach().float().cpu().numpy() if hasattr(queries, "detach") else queries
        queries = np.asarray(queries, dtype=np.float32)
        queries = queries[:, None] if queries.ndim == 2 else queries
        if queries.ndim != 3 or queries.shape[2] != self.dimension:
            shapes = f"(batch_size, {self.dimension}) or (batch_size, num_windows, {self.dimension})"
            raise ValueError(f"Queries must have the shape {shapes}, got {queries.shape}.")
        k = CaptionOptions.check("k", k)
        diversity = CaptionOptions.check("retrieval_diversity", diversity, "diversity")
        if score_threshold is not None:
            CaptionOptions.check("retrieval_score_threshold", score_threshold, "score_threshold")
        for name, value in (("exclude_clip_ids", exclude_clip_ids), ("exclude_texts", exclude_texts)):
            if value is not None and len(value) != len(queries):
                raise ValueError(f"`{name}` needs one entry per clip: got {len(value)} for {len(queries)} clips.")
        clips, windows = np.nonzero(np.abs(queries).max(axis=2) > 0)
        if not k or not len(self):
            clips, windows = clips[:0], windows[:0]
        ids = [None] * len(queries) if exclude_clip_ids is None else exclude_clip_ids
        texts = [()] * len(queries) if exclude_texts is None else exclude_texts
        excluded = {clip: self._excluded(ids[clip], texts[clip]) for clip in set(clips.tolist())}
        found: list[list[list[Hit]]] = [[] for _ in queries]
        pool = max(k * _POOL, _POOL_AT_LEAST) if diversity else k
        for start in range(0, len(clips), _QUERIES_AT_ONCE):
            block = slice(start, start + _QUERIES_AT_ONCE)
            own = queries[clips[block], windows[block]]
            nearest = self._nearest(own, pool, [excluded[c] for c in clips[block]])
            for clip, query, hits in zip(clips[block], own, nearest, strict=True):
                if score_threshold is not None:
                    hits = [hit for hit in hits if hit[1] >= score_threshold]
                found[clip].append(choose_diverse(query, hits, self._vectors, k, diversity))
        merged = [merge_round_robin(of_clip, k, self._text) for of_clip in found]
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

    def _nearest(self, queries: np.ndarray, k: int, excluded: Sequence[tuple[set[int], set[str]]]) -> list[list[Hit]]:
        """For each query up to k pairs (row, cosine), sorted, without excluded rows and repeated texts."""
        results: list[list[Hit]] = [[] for _ in queries]
        pending = list(range(len(queries)))
        index = self.search_index
        fetch = min(index.max_k, k + index.num_candidates if index.exact else max(4 * k, index.num_candidates))
        # An index that cannot fill k places, because most of what it finds is excluded, gives way to exact search.
        limit = min(16 * fetch, index.max_k)
        while pending:
            candidates = index.search(queries[pending], fetch)[0]
            still_pending = []
            for query, rows in zip(pending, candidates, strict=True):
                scored = score_again(queries[query], self._vectors, rows[rows >= 0], index.exact)
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

    def _keep(self, scored: list[Hit], k: int, rows: set[int], texts: set[str]) -> list[Hit]:
        kept, seen, clips = [], set(texts), set()
        for row, score in scored:
            # Captions of one clip have the same key of audio: the first of them is taken.
            clip = self.records[row].get("clip_id") if self.keys == AUDIO_KEYS else None
            clip = (row,) if clip is None else clip
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

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes the datastore into a folder. The manifest comes last and at once: a reader sees all or nothing, also
        where an older datastore is replaced. Where `recap_hf` is not installed, the files of a loaded datastore are
        copied.

        Raises:
            `OSError`: if another process is writing there. `ImportError`: where `recap_hf` is not installed and the
                datastore was not loaded from files.
        """
        path = getattr(self.records, "path", None)
        try:
            files = from_package("datastore.files", "saving captions that were not loaded from a datastore")
        except ImportError:
            if path is None:
                raise
            copy_files(Path(path).parent, Path(save_directory))
        else:
            files.save_datastore(self, save_directory)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Saves the datastore and pushes it as a dataset repository. `recap push` adds a card and Parquet files.

        Args:
            repo_id (`str`): `user/name`; made if it does not exist.
            options: `private`, `token`, `revision`, `create_pr` and `commit_message`, as in
                `huggingface_hub.HfApi.upload_folder`; the result is its `CommitInfo`.

        Raises:
            `OSError`: if the push failed. `ImportError`: where `recap_hf` is not installed.
        """
        return from_package("hub.push", "pushing a datastore").push_store(self, repo_id, **options)

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
            repo_type (`str`, *optional*): `"dataset"`, or `"model"` for the datastore inside a checkpoint on the Hub;
                default: the first that exists.
            verify (`bool`, *optional*, defaults to `True`): compare the files with their checksums.
            hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as in transformers.

        A datastore may be a reference to another repository at a fixed revision, as `recap push --datastore-repo`
        leaves it in a checkpoint: it is followed.

        Raises:
            `OSError`: if there is no datastore. `ValueError`: if it is damaged, tampered with or of a newer format.
            `ImportError`: for a collection of Milvus, or a format below 3, where `recap_hf` is not installed.
        """
        if str(name_or_path).startswith("milvus:"):
            milvus = from_package("datastore.milvus", f"{name_or_path}: a datastore in Milvus")
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


def _as_records(captions: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of captions, copied; a `ValueError` for one without a text."""
    records = [{"caption": item} if isinstance(item, str) else dict(item) for item in captions]
    for row, record in enumerate(records):
        if not isinstance(record.get("caption"), str) or not record["caption"].strip():
            raise ValueError(f"Row {row} has no caption: expected a text under 'caption', got {record!r:.200}.")
    return records


def open_datastore(source: Any, model: Any, processor: Any) -> CaptionDatastore:
    """A datastore out of whatever names one.

    Args:
        source: a [`CaptionDatastore`], a folder or Hub id of one, a file of captions (text, CSV, JSON, ...), or a list
            of captions.
        model, processor: embed the captions of a file or a list.

    Raises:
        `OSError`: if there is none. `ImportError`: for a file of captions where `recap_hf` is not installed.
    """
    if isinstance(source, (list, tuple)):
        return CaptionDatastore.from_captions(source, model, processor)
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    if not path.is_dir() and (path.is_file() or path.suffix.lower() in CAPTION_SUFFIXES):
        tables = from_package("data.caption_tables", f"{path}: reading a file of captions")
        return CaptionDatastore.from_captions(tables.read_captions(path), model, processor)
    if path.is_dir() and not (path / MANIFEST_NAME).is_file() and (path / "datastore" / MANIFEST_NAME).is_file():
        # A checkpoint folder stands for the datastore inside it.
        path = path / "datastore"
    return CaptionDatastore.from_pretrained(path if path.is_dir() else str(source))


__all__ = ["MANIFEST_NAME", "CaptionDatastore", "normalize_clip_id", "normalize_text", "open_datastore"]
