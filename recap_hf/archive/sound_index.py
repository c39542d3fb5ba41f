"""A sound index: the places of an archive's recordings with their embeddings, searched by words or by sound.

It is a datastore keyed by audio ([`CaptionDatastore`]) in a hidden folder of the archive. A row is a place: its
`caption` is the path of the recording inside the archive, `start` and `end` are seconds. The first row of a recording
also has `size`, `mtime_ns` and `sha256` of its file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.datastore_files_recap import MANIFEST_NAME
from recap_hf.modeling.index_recap import ExactIndex, score_again
from recap_hf.modeling.retrieval_recap import CaptionDatastore

from .encoder import SoundEncoder
from .updating import Loader, Progress, check_encoder, check_folder, encoder_of, update_index

INDEX_NAME = ".recap-index"
# Places that a search looks at first, for each recording that it shall find.
_PLACES_PER_RESULT = 4
# An approximate index that finds too few recordings in this many times as many places gives way to exact search.
_MOST_FETCHED = 64


@dataclass(eq=False)
class SoundIndex:
    """The recordings of a folder, found by words or by sound. Make one with [`SoundIndex.update`], open one with
    [`SoundIndex.load`].

    Args:
        folder (`str` or path): the archive.
        store ([`CaptionDatastore`]): its places; see the module.
        source (*optional*): what [`SoundEncoder.of`] takes; it is loaded with the first search.
        loader (*optional*): loads `source` instead of [`SoundEncoder.of`].
        report (`dict`, *optional*): of the update that it comes from: the numbers of `recordings` and `places` in it,
            and of recordings that were `encoded`, `reused` (with the contents of another: moved, copied or touched),
            `unchanged`, `removed` (gone), and are `unreadable`.

    Example:
        >>> index = SoundIndex.update("recordings")
        >>> index.search(text="rain on a tin roof", top=1)
        [{'path': 'recordings/roof.wav', 'start': 3.36, 'end': 6.72, 'score': 0.52}]
    """

    folder: str | os.PathLike
    store: CaptionDatastore
    source: Any = None
    loader: Loader = SoundEncoder.of
    report: dict[str, int] | None = None

    def __post_init__(self) -> None:
        self._encoder: SoundEncoder | None = None

    @classmethod
    def update(
        cls,
        folder: str | os.PathLike,
        encoder: Any = None,
        *,
        index: str | os.PathLike | None = None,
        overwrite: bool = False,
        progress: Progress = lambda done, total, path, problem: None,
        loader: Loader = SoundEncoder.of,
    ) -> SoundIndex:
        """Brings the index of a folder up to date, or makes it where there is none.

        Recordings whose size and time of change are as before are not read. One with the contents of another that is
        in the index, such as one that was moved, is not encoded again. What is done is saved every few seconds: a run
        that was cut off is continued by the next one, and a reader always sees a whole index.

        Args:
            folder (`str` or path): its recordings, in all folders below, are indexed.
            encoder (*optional*): what [`SoundEncoder.of`] takes; default: that of the index, else the embedded one.
            index (`str` or path, *optional*): folder of the index; default: `.recap-index` in `folder`.
            overwrite (`bool`, *optional*, defaults to `False`): encode everything again.
            progress (*optional*): is called for each recording that was encoded: how many of how many are done, the
                path, and why it could not be read (else `None`).
            loader (*optional*): see [`SoundIndex`].

        Returns:
            [`SoundIndex`]: opened; its `report` says what was done.

        Raises:
            `OSError`: if there is no such folder, it cannot be written, or another process is updating the index.
            `ValueError`: if the folder has no recordings, another encoder made the index, or it is of another folder.
        """
        path = index_path(folder, index)
        report, used = update_index(Path(folder), path, encoder, overwrite, progress, loader)
        found = cls.load(folder, used, index=index, loader=loader)
        found.report = report
        return found

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        encoder: Any = None,
        *,
        index: str | os.PathLike | None = None,
        loader: Loader = SoundEncoder.of,
    ) -> SoundIndex:
        """Opens the index of a folder.

        Args:
            folder, index, loader: see [`SoundIndex.update`].
            encoder (*optional*): what [`SoundEncoder.of`] takes; default: the one that made the index.

        Raises:
            `OSError`: if there is none. `ValueError`: if it is damaged, or of another folder.
        """
        path = index_path(folder, index)
        if not (path / MANIFEST_NAME).is_file():
            raise FileNotFoundError(f"{folder}: has no sound index at {path}; make one: recap index {folder}")
        store = CaptionDatastore.open_folder(path)
        made_by = encoder_of(path, store)
        check_folder(store, path, Path(folder))
        source = made_by if encoder is None else encoder
        return cls(folder, store, source, loader)

    @property
    def encoder(self) -> SoundEncoder:
        """The encoder, loaded.

        Raises:
            `OSError`, `ValueError`: if there is no such model, or it is not the one that made the index.
        """
        if self._encoder is None:
            encoder = self.loader(self.source)
            check_encoder(self.store, encoder)
            self._encoder = encoder
        return self._encoder

    @property
    def left_out(self) -> dict[str, str]:
        """The recordings that have no places, by path, and why: they are silent or cannot be read."""
        return {self._path(name): entry[2] for name, entry in self.store.manifest["report"]["left_out"].items()}

    def __len__(self) -> int:
        """The number of places."""
        return len(self.store)

    def search(
        self, text: str | None = None, audio: Any = None, top: int = 10, places: int = 1
    ) -> list[dict[str, Any]]:
        """The places that are nearest to a text or to a recording.

        Args:
            text (`str`, *optional*): what is heard, in plain words ("a dog barking").
            audio (*optional*): instead, a recording, as [`AudioStream`] takes it: nearest are those that sound like
                it. A path inside the archive is not found itself.
            top (`int`, *optional*, defaults to 10): results at the most.
            places (`int`, *optional*, defaults to 1): results of one recording at the most, which do not overlap.

        Returns:
            `list[dict]`: `{"path", "start", "end", "score"}`, best first; seconds, and the cosine of the embeddings.

        Raises:
            `ValueError`: for neither or both of text and audio, a number below 1, or a recording of silence; and what
            reading the recording raises.
        """
        if (text is None) == (audio is None) or (text is not None and not text.strip()):
            raise ValueError("Give either a `text` that is not empty, or `audio` to search for.")
        if top < 1 or places < 1:
            raise ValueError(f"`top` and `places` must be at least 1, got {top} and {places}.")
        query = self.encoder.embed_text(text) if audio is None else self.encoder.embed_audio(audio)
        if query is None:
            raise ValueError("The recording to search for holds nothing but silence.")
        return self.nearest(query, top, places, self._inside(audio))

    def nearest(self, query: np.ndarray, top: int = 10, places: int = 1, own: str | None = None) -> list[dict]:
        """As `search`, for a unit vector of shape `(dimension,)`; `own`: the recording to leave out, as the records of
        the store name it."""
        index, results = self.store.search_index, []
        fetch = least = min(index.max_k, max(_PLACES_PER_RESULT * top * places, index.num_candidates))
        while fetch:
            rows = index.search(query[None], fetch)[0][0]
            hits = score_again(query, self.store.embeddings, rows[rows >= 0], index.exact)
            results = self._choose(hits, top, places, own)
            if len(results) == top or (index.exact and fetch == index.max_k):
                break
            if not index.exact and (fetch == index.max_k or fetch >= _MOST_FETCHED * least):
                index = ExactIndex(self.store.embeddings)
            fetch = min(index.max_k, 4 * fetch)
        return results

    def _choose(self, hits: list[tuple[int, float]], top: int, places: int, own: str | None) -> list[dict[str, Any]]:
        chosen: dict[str, list[dict[str, Any]]] = {}
        results: list[dict[str, Any]] = []
        for row, score in hits:
            record = self.store.records[row]
            name, start, end = record["caption"], record["start"], record["end"]
            others = chosen.setdefault(name, [])
            if name == own or len(others) == places:
                continue
            if all(end <= other["start"] or start >= other["end"] for other in others):
                others.append({"path": self._path(name), "start": start, "end": end, "score": score})
                results.append(others[-1])
                if len(results) == top:
                    break
        return results

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _inside(self, audio: Any) -> str | None:
        """The name of a recording inside the archive, `None` for another."""
        if not isinstance(audio, (str, os.PathLike)):
            return None
        # As it is named first: a link in the archive may point out of it.
        for real in (os.path.abspath, os.path.realpath):
            path, root = Path(real(audio)), real(self.folder)
            if path.is_relative_to(root):
                return path.relative_to(root).as_posix()
        return None

    def duplicates(
        self, threshold: float = 0.85, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[dict[str, Any]]:
        """Recordings that hold the same sound; see [`find_duplicates`]."""
        from .duplicates import find_duplicates

        return find_duplicates(self, threshold, progress)


def index_path(folder: str | os.PathLike, index: str | os.PathLike | None) -> Path:
    """The folder of an archive's index."""
    return Path(folder, INDEX_NAME) if index is None else Path(index)
