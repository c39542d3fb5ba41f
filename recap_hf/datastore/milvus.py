"""Captions in a Milvus collection, searched like any other datastore.

The same code serves Milvus Lite (a path that ends in `.db`, embedded in this process: tests and small use) and a
cluster (an address). Milvus proposes candidates with the index that the collection has; they are scored again in
float64 with the stored embeddings, so that scores and order are those of a datastore in files.

A collection has the fields `row` (primary key, counted from 0), `embedding`, `caption`, `clip` (the clip id,
normalized for comparison) and `record` (all other values, JSON); its properties state which encoder made it.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from recap_hf.modeling.retrieval_recap import CaptionDatastore, normalize_clip_id

PREFIX = "milvus:"
DEFAULT_COLLECTION = "captions"
# Milvus gives no more than this many results, whatever the index.
MAX_LIMIT = 16_384
# Half of what a message of the protocol may have by default.
_BYTES_AT_ONCE = 32 << 20
_ROWS_AT_ONCE = 4096
_LONGEST_TEXT = 65_535
_LONGEST_CLIP = 1024
_FORMAT = 1
_FIELDS = ["caption", "record", "embedding"]
# What is built and how hard is searched, where the caller does not say. Other kinds take their parameters from him.
_DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FLAT": ({}, {}),
    "AUTOINDEX": ({}, {}),
    "HNSW": ({"M": 32, "efConstruction": 200}, {"ef": 128}),
    "IVF_FLAT": ({"nlist": 1024}, {"nprobe": 64}),
    "IVF_SQ8": ({"nlist": 1024}, {"nprobe": 64}),
    "DISKANN": ({}, {"search_list": 128}),
}
# Search depths that Milvus wants to be no smaller than the number of results.
_DEPTHS = {"HNSW": "ef", "HNSW_SQ": "ef", "HNSW_PQ": "ef", "DISKANN": "search_list"}


def is_milvus_name(name: Any) -> bool:
    """Whether a name means a Milvus collection: `milvus:captions.db#captions`, `milvus://host:19530#captions`."""
    return isinstance(name, (str, os.PathLike)) and os.fspath(name).startswith(PREFIX)


def parse_milvus_name(name: str | os.PathLike) -> tuple[str, str]:
    """Address and collection of `milvus:ADDRESS#COLLECTION`; the collection is `captions` where none is named.

    >>> parse_milvus_name("milvus://host:19530")
    ('http://host:19530', 'captions')
    """
    address, _, collection = os.fspath(name).removeprefix(PREFIX).partition("#")
    if address.startswith("//") and not address.startswith("///"):
        address = f"http:{address}"
    address = address[2:] if address.startswith("///") else address
    if not address:
        raise ValueError(f"{name!r} names no Milvus: expected milvus:FILE.db#COLLECTION or milvus://HOST:PORT#...")
    return address, collection or DEFAULT_COLLECTION


def refuse_milvus(folder: str | os.PathLike) -> None:
    """A `ValueError` for the name of a collection where a folder is needed."""
    if is_milvus_name(folder):
        hint = "build a datastore of it, change that, and export it to Milvus with --overwrite"
        where = f"{folder} is in Milvus, where captions are added and removed, searched and exported"
        raise ValueError(f"{where}. For this export them into a file, {hint}")


def connect(address: str, token: str | None = None) -> Any:
    """A client of Milvus Lite (a path) or of a cluster (an address).

    Args:
        address: `captions.db`, `http://host:19530`, ...
        token: of a cluster, "user:password" or an API key; by default the environment variable MILVUS_TOKEN.

    Raises:
        `ImportError`: without pymilvus. `OSError`: if nothing answers there.
    """
    try:
        from pymilvus import MilvusClient, MilvusException

        try:
            return MilvusClient(address, token=token or os.environ.get("MILVUS_TOKEN", ""))
        except MilvusException as error:
            raise OSError(f"{address}: no Milvus answers there ({error.message}).") from error
    except ImportError as error:
        raise ImportError(f"{address}: captions in Milvus need: pip install recap-hf[milvus] ({error})") from error


class MilvusCollection:
    """Rows of one collection, read as they are asked for; those of the latest search are kept. It is the
    [`StoredIndex`] of its datastore, which takes its results for complete, whatever index Milvus has."""

    exact = True
    num_candidates = 32

    def __init__(self, client: Any, name: str, search_params: Mapping[str, Any] | None = None) -> None:
        self.client = client
        self.name = name
        about = client.describe_collection(name)
        fields = {field["name"]: field for field in about["fields"]}
        if not {"row", "embedding", "caption", "clip", "record"} <= set(fields):
            found = f"has the fields {', '.join(fields)}, and is no datastore of captions"
            hint = "make one with `recap datastore export STORE --to milvus`"
            raise ValueError(f"The Milvus collection {name!r} {found}: {hint}.")
        self.dimension = int(fields["embedding"]["params"]["dim"])
        self.properties = about.get("properties") or {}
        if self.properties.get("recap.complete") != "1":
            raise ValueError(f"The Milvus collection {name!r} is not complete: its export broke off. Export it again.")
        self.index = dict(client.describe_index(name, "embedding") or {})
        self.kind = str(self.index.get("index_type", "FLAT"))
        stored = json.loads(self.properties.get("recap.search_params", "{}"))
        self.search_params = dict(stored if search_params is None else search_params)
        client.load_collection(name)
        self.kept: dict[int, tuple[dict[str, Any], np.ndarray]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Counts the rows again; where some were removed, the places of the others are read."""
        self.kept.clear()
        self.count = int(self.client.query(self.name, filter="", output_fields=["count(*)"])[0]["count(*)"])
        beyond = self.client.query(self.name, filter=f"row >= {self.count}", output_fields=["row"], limit=1)
        self.keys: np.ndarray | None = None
        if beyond:
            keys = [row["row"] for page in self._pages("row >= 0", ["row"]) for row in page]
            self.keys = np.sort(np.array(keys, dtype=np.int64))

    def _pages(self, condition: str, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
        pages = self.client.query_iterator(self.name, _ROWS_AT_ONCE, filter=condition, output_fields=fields)
        try:
            while page := pages.next():
                yield page
        finally:
            pages.close()

    def key(self, row: int) -> int:
        return int(row if self.keys is None else self.keys[row])

    def rows(self, keys: Sequence[int]) -> np.ndarray:
        """Rows of primary keys; those that were removed meanwhile are left out."""
        keys = np.asarray(keys, dtype=np.int64)
        if self.keys is None:
            return keys[keys < self.count]
        places = np.minimum(np.searchsorted(self.keys, keys), max(len(self.keys) - 1, 0))
        return places[self.keys[places] == keys] if len(self.keys) else places[:0]

    def fetch(self, rows: Sequence[int]) -> list[tuple[dict[str, Any], np.ndarray]]:
        """Records and embeddings of rows, in their order.

        Raises:
            `LookupError`: if one was removed since the rows were counted.
        """
        rows = [int(row) for row in rows]
        found = {row: self.kept[row] for row in rows if row in self.kept}
        missing = sorted(set(rows) - found.keys())
        for start in range(0, len(missing), _ROWS_AT_ONCE):
            keys = {self.key(row): row for row in missing[start : start + _ROWS_AT_ONCE]}
            options = {"filter": f"row in {list(keys)}", "output_fields": _FIELDS, "limit": len(keys)}
            found |= {keys[each["row"]]: _taken(each) for each in self.client.query(self.name, **options)}
        lost = [row for row in missing if row not in found]
        if lost:
            raise LookupError(f"Row {lost[0]} is not in the Milvus collection {self.name!r}: open it again.")
        return [found[row] for row in rows]

    @property
    def max_k(self) -> int:
        """Results that Milvus gives at most."""
        return min(self.count, MAX_LIMIT)

    @property
    def description(self) -> dict[str, Any]:
        """Kind and settings of Milvus's index."""
        others = ("index_name", "field_name", "index_type")
        known = {key: value for key, value in self.index.items() if key not in others}
        return {"backend": "milvus", "kind": self.kind, **known, "search": self.search_params}

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See [`ExactIndex.search`]."""
        params = dict(self.search_params)
        if self.kind in _DEPTHS:
            depth = _DEPTHS[self.kind]
            params[depth] = max(int(params.get(depth, 0)), k)
        data, settings = list(np.ascontiguousarray(queries, dtype=np.float32)), {"metric_type": "IP", "params": params}
        options = {"anns_field": "embedding", "limit": k, "search_params": settings, "output_fields": _FIELDS}
        answers = self.client.search(self.name, data=data, **options)
        rows, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        for query, answer in enumerate(answers):
            # A row comes twice where it was written twice.
            found = {int(row): hit for hit in answer for row in self.rows([hit["row"]])}
            self.kept |= {row: _taken(hit["entity"]) for row, hit in found.items()}
            rows[query, : len(found)] = list(found)
            scores[query, : len(found)] = [hit["distance"] for hit in found.values()]
        return rows, scores


def _taken(found: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Record and embedding of an answer of Milvus."""
    record = {"caption": found["caption"], **(found["record"] or {})}
    return record, np.asarray(found["embedding"], dtype=np.float32)


class MilvusRecords(Sequence):
    """The records of a collection, fetched when they are asked for."""

    part = 0

    def __init__(self, collection: MilvusCollection) -> None:
        self._collection = collection

    def __len__(self) -> int:
        return self._collection.count

    def _fetch(self, rows: Sequence[int]) -> list[Any]:
        return [found[self.part] for found in self._collection.fetch(rows)]

    def __getitem__(self, row: Any) -> Any:
        rows = range(len(self))[row]
        return self._fetch(rows) if isinstance(row, slice) else self._fetch([rows])[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield from self[start : start + _ROWS_AT_ONCE]

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None


class MilvusEmbeddings(MilvusRecords):
    """The embeddings of a collection, fetched when they are asked for; used like an array of shape
    `(rows, dimension)`."""

    part = 1
    ndim = 2
    dtype = np.dtype(np.float32)
    # They are held by Milvus.
    nbytes = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._collection.dimension

    def __getitem__(self, row: Any) -> np.ndarray:
        rows = np.arange(len(self))[row]
        if not rows.ndim:
            return self._fetch([int(rows)])[0]
        return np.stack(self._fetch(rows)) if len(rows) else np.empty((0, self.shape[1]), dtype=self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


class MilvusCaptionDatastore(CaptionDatastore):
    """A [`CaptionDatastore`] whose captions and embeddings are in Milvus.

    Open one by [`CaptionDatastore.from_pretrained`] with a name such as `milvus:captions.db#captions`, make one by
    [`MilvusCaptionDatastore.from_datastore`]. `search` is the same. Milvus returns at most 16,384 candidates: where
    more than that are excluded, or repeat one text, fewer than k captions are found.

    Args:
        client (`pymilvus.MilvusClient`): see [`connect`].
        name (`str`): of the collection.
        search_params (`Mapping`, *optional*): of the index (`ef`, `nprobe`, `search_list`, ...); by default those that
            were stored with the collection.
        address (`str`, *optional*): that the client is connected to, by which a pickled datastore connects again.

    Raises:
        `OSError`: if there is no such collection. `ValueError`: if it is none of captions, or not complete.
    """

    def __init__(self, client: Any, name: str, search_params: Mapping | None = None, address: str | None = None):
        if not client.has_collection(name):
            found = ", ".join(client.list_collections()) or "none"
            raise FileNotFoundError(f"Milvus has no collection {name!r} (it has: {found}).")
        self.collection = MilvusCollection(client, name, search_params)
        self.address = address
        self.reopen()

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> "MilvusCaptionDatastore":
        """Opens `milvus:ADDRESS#COLLECTION`.

        Args:
            name_or_path: the name.
            kwargs: `token`, `search_params`.
        """
        address, collection = parse_milvus_name(name_or_path)
        if "://" not in address and not os.path.exists(address):
            # Milvus Lite would make one.
            raise FileNotFoundError(f"{address}: no such file of Milvus Lite.")
        return cls(connect(address, kwargs.get("token")), collection, kwargs.get("search_params"), address)

    @classmethod
    def from_datastore(
        cls,
        store: CaptionDatastore,
        name: str,
        index_type: str = "HNSW",
        index_params: Mapping[str, Any] | None = None,
        search_params: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        token: str | None = None,
    ) -> "MilvusCaptionDatastore":
        """Copies a datastore into a Milvus collection, block by block; it has its name when all of it is there.

        Args:
            store: any datastore.
            name: `milvus:ADDRESS#COLLECTION`.
            index_type: of Milvus: FLAT, AUTOINDEX, HNSW, IVF_FLAT, IVF_SQ8, IVF_PQ, DISKANN, ... Milvus Lite knows
                only some of them.
            index_params, search_params: of that index; stored with the collection.
            overwrite: replace a collection of that name.
            token: see [`connect`].

        Raises:
            `FileExistsError`: if there is such a collection. `ValueError`: if Milvus refuses the index.
        """
        from pymilvus import MilvusException

        address, collection = parse_milvus_name(name)
        client = connect(address, token)
        if client.has_collection(collection) and not overwrite:
            properties = client.describe_collection(collection).get("properties") or {}
            if properties.get("recap.complete") == "1":
                raise FileExistsError(f"{address} has a collection {collection!r} already; overwrite it if it may go.")
        defaults = _DEFAULTS.get(index_type, ({}, {}))
        index_params = defaults[0] if index_params is None else index_params
        search_params = defaults[1] if search_params is None else search_params
        loading = f"{collection}__loading"
        if client.has_collection(loading):
            client.drop_collection(loading)
        try:
            _create(client, loading, store, index_type, index_params, search_params)
            insert_rows(client, loading, store.records, store.embeddings)
            client.flush(loading)
            # Only a collection that is loaded afresh tells whether its index could be built.
            client.release_collection(loading)
            client.load_collection(loading)
        except MilvusException as error:
            client.drop_collection(loading)
            raise ValueError(f"{address}: Milvus refuses the datastore as {index_type}: {error.message}") from error
        client.alter_collection_properties(loading, {"recap.complete": "1"})
        if client.has_collection(collection):
            client.drop_collection(collection)
        client.rename_collection(loading, collection)
        return cls(client, collection, address=address)

    def set_index(self, index: Any) -> None:
        """Milvus has its own index: export the datastore again for another kind."""
        raise ValueError("A datastore in Milvus is searched by Milvus's own index; export it again for another kind.")

    def add(self, records: Sequence[Mapping[str, Any]], embeddings: np.ndarray) -> None:
        """Adds captions with their embeddings (unit vectors of the same encoder) behind the others."""
        collection = self.collection
        first = collection.key(collection.count - 1) + 1 if collection.count else 0
        insert_rows(collection.client, collection.name, records, embeddings, first)
        self.reopen()

    def remove(self, rows: Sequence[int]) -> None:
        """Removes rows; those behind them move up, as in files."""
        keys = [self.collection.key(range(len(self))[row]) for row in rows]
        for start in range(0, len(keys), _ROWS_AT_ONCE):
            self.collection.client.delete(self.collection.name, filter=f"row in {keys[start : start + _ROWS_AT_ONCE]}")
        self.reopen()

    def reopen(self) -> None:
        """Reads again how many rows there are, after others have added or removed some."""
        collection = self.collection
        collection.refresh()
        fingerprint = json.loads(collection.properties.get("recap.fingerprint", "null"))
        keys = collection.properties.get("recap.keys", "text")
        self._set(MilvusRecords(collection), MilvusEmbeddings(collection), fingerprint, keys, collection)

    def search(self, *args: Any, **kwargs: Any) -> list[list[dict[str, Any]]]:
        """See [`CaptionDatastore.search`]."""
        self.collection.kept.clear()
        return super().search(*args, **kwargs)

    def _rows_of(self, clip: str) -> Sequence[int]:
        collection = self.collection
        found = collection.client.query(collection.name, filter=f"clip == {json.dumps(clip)}", output_fields=["row"])
        return collection.rows([each["row"] for each in found]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        # A connection cannot be copied: it is made again. The token comes from the environment.
        if self.address is None:
            raise TypeError("A Milvus datastore is copied by its address: open it by CaptionDatastore.from_pretrained")
        return _reopen, (self.address, self.collection.name, self.collection.search_params)

    def __deepcopy__(self, memo: Any) -> "MilvusCaptionDatastore":
        return type(self)(self.collection.client, self.collection.name, self.collection.search_params, self.address)


def _reopen(address: str, name: str, search_params: Mapping[str, Any]) -> MilvusCaptionDatastore:
    return MilvusCaptionDatastore(connect(address), name, search_params, address)


def _create(
    client: Any, name: str, store: CaptionDatastore, index_type: str, index_params: Mapping, search_params: Mapping
) -> None:
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=store.dimension)
    schema.add_field("caption", DataType.VARCHAR, max_length=_LONGEST_TEXT)
    schema.add_field("clip", DataType.VARCHAR, max_length=_LONGEST_CLIP)
    schema.add_field("record", DataType.JSON)
    index = MilvusClient.prepare_index_params()
    index.add_index("embedding", index_type=index_type, metric_type="IP", params=dict(index_params))
    properties = {"recap.format": str(_FORMAT), "recap.search_params": json.dumps(dict(search_params))}
    properties["recap.keys"] = getattr(store, "keys", "text")
    if store.fingerprint is not None:
        properties["recap.fingerprint"] = json.dumps(store.fingerprint.astype(float).round(6).tolist())
    options = {"schema": schema, "index_params": index, "properties": properties}
    client.create_collection(name, consistency_level="Strong", **options)


def insert_rows(client: Any, name: str, records: Sequence[Mapping[str, Any]], embeddings: Any, first: int = 0) -> None:
    """Inserts records with their embeddings under the primary keys from `first` on.

    Raises:
        `ValueError`: if a caption or clip id is longer than Milvus stores.
    """
    step = max(1, min(_ROWS_AT_ONCE, _BYTES_AT_ONCE // (8 * embeddings.shape[1])))
    for start in range(0, len(records), step):
        vectors = np.asarray(embeddings[start : start + step], dtype=np.float32)
        rows, pairs = [], zip(records[start : start + step], vectors, strict=True)
        for key, (record, vector) in enumerate(pairs, first + start):
            caption, clip_id = record["caption"], record.get("clip_id")
            clip = "" if clip_id is None else normalize_clip_id(clip_id)
            if len(caption.encode()) > _LONGEST_TEXT or len(clip.encode()) > _LONGEST_CLIP:
                raise ValueError(f"Row {key}: the caption or its clip id is longer than Milvus stores.")
            others = {field: value for field, value in record.items() if field != "caption"}
            rows.append({"row": key, "embedding": vector, "caption": caption, "clip": clip, "record": others})
        client.insert(name, rows)
