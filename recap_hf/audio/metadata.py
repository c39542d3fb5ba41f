"""Captions and tags in a recording's own metadata: WAV by its chunks, other formats by mutagen.

The audio data stays as it is, to the bit. The new file replaces the old one in one step.
"""

import os
import shutil
import struct
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from recap_hf.files import replacing

from .containers import payload_hash

try:
    import mutagen
    from mutagen.aiff import AIFF
    from mutagen.flac import FLAC
    from mutagen.id3 import COMM, TXXX
    from mutagen.mp3 import MP3
    from mutagen.mp4 import MP4, MP4FreeForm
    from mutagen.oggflac import OggFLAC
    from mutagen.oggopus import OggOpus
    from mutagen.oggvorbis import OggVorbis
except ImportError:
    mutagen = None

# Heads of files whose metadata is not written, and their names.
_REFUSED = {b"RF64": "RF64", b"BW64": "BW64", b"RIFX": "RIFX", b"riff": "W64"}
_UNKNOWN_SIZE, _LARGEST_RIFF = 0xFFFFFFFF, 0xFFFFFFFF
# EBU Tech 3285: Description, Originator, its reference, date, time, time reference, version, the rest.
_BEXT, _BEXT_DESCRIPTION = struct.Struct("<256s32s32s10s8sQH254s"), 256
# The fields of caption, tags and model.
_COMMENTS = ("DESCRIPTION", "KEYWORDS", "CAPTION_MODEL")
_ID3 = ("COMM", "TXXX:KEYWORDS", "TXXX:CAPTION_MODEL")
_MP4 = ("desc", "keyw", "----:com.apple.iTunes:CAPTION_MODEL")
_LARGEST_TEXT_CHUNK = 1 << 24
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class SoundDescription:
    """What is written into a recording.

    Args:
        caption (`str`): a sentence.
        tags (`tuple[str, ...]`): names of sounds, most probable first.
        model (`str`): what made them.
    """

    caption: str
    tags: tuple[str, ...] = ()
    model: str = ""

    @property
    def keywords(self) -> str:
        """The tags in one text."""
        return "; ".join(self.tags)


def require_mutagen() -> None:
    """Raises `ImportError` where mutagen is not installed."""
    if mutagen is None:
        raise ImportError('Writing metadata needs mutagen and PyAV: pip install "recap-hf[metadata]"')


def write_metadata(
    path: str | os.PathLike, description: SoundDescription, overwrite: bool = False, dry_run: bool = False
) -> dict[str, str]:
    """Writes caption, tags and the model's name into a recording.

    | format | caption | tags | model |
    | --- | --- | --- | --- |
    | WAV | `bext` Description, iXML `NOTE`, INFO `ICMT` | iXML `KEYWORDS`, INFO `IKEY` | iXML `MODEL`, INFO `ISFT` |
    | FLAC, Ogg Vorbis, Opus | `DESCRIPTION` | `KEYWORDS`, one each | `CAPTION_MODEL` |
    | MP3, AIFF (ID3) | `COMM` | `TXXX:KEYWORDS` | `TXXX:CAPTION_MODEL` |
    | MP4, m4a | `desc` | `keyw` | `CAPTION_MODEL` |

    Args:
        path (`str` or path): the recording. A link stays a link.
        description ([`SoundDescription`])
        overwrite (`bool`, *optional*, defaults to `False`): replace these fields; by default a field that has a value
            keeps it. Other fields are always kept.
        dry_run (`bool`, *optional*, defaults to `False`): write nothing.

    Returns:
        `dict[str, str]`: the fields that were written, or would be, with their values; none if all have values.

    Raises:
        `ValueError`: for a recording whose format has no such fields, that is cut off or damaged, that may not be
            written, or that another program changed meanwhile. `OSError`: if it cannot be read, or the disk is full.
            `ImportError`: without mutagen or PyAV.
    """
    require_mutagen()
    path = Path(path).resolve()
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] in _REFUSED:
        raise ValueError(f"{path}: metadata of {_REFUSED[head[:4]]} files is not written: convert it to WAV or FLAC")
    before = os.stat(path)
    editor = _WavEditor(path) if head[:4] == b"RIFF" and head[8:] == b"WAVE" else _TagEditor(path)
    changes = editor.changes(description, overwrite)
    if dry_run or not changes:
        return changes
    if not os.access(path, os.W_OK):
        raise ValueError(f"{path}: may not be written (it is read-only)")
    with replacing(path) as temporary:
        editor.write(temporary)
        if payload_hash(path) != payload_hash(temporary):
            raise ValueError(f"{path}: its audio data would not stay as it is: nothing is written")
        _keep_attributes(path, temporary, before)
        now = os.stat(path)
        if (now.st_mtime_ns, now.st_size) != (before.st_mtime_ns, before.st_size):
            raise ValueError(f"{path}: another program changed it meanwhile: nothing is written")
    return changes


def _keep_attributes(path: Path, temporary: Path, before: os.stat_result) -> None:
    """Permissions, owner and extended attributes of the old file. The time of change is new, for backups."""
    shutil.copystat(path, temporary)
    os.utime(temporary, (before.st_atime, time.time()))
    if hasattr(os, "chown"):
        with suppress(PermissionError):
            os.chown(temporary, before.st_uid, before.st_gid)


class _TagEditor:
    """Fields that mutagen writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = self._open(path)
        self.id3 = isinstance(self.file, (MP3, AIFF))
        self._values: dict[str, Any] = {}

    def _open(self, path: Path) -> Any:
        try:
            file = mutagen.File(path)
        except mutagen.MutagenError as error:
            raise ValueError(f"{self.path}: its metadata cannot be read: {error}") from error
        if not isinstance(file, (FLAC, OggVorbis, OggOpus, OggFLAC, MP3, MP4, AIFF)):
            kind = "such" if file is None else type(file).__name__
            raise ValueError(
                f"{self.path}: metadata of {kind} files is not written: expected WAV, FLAC, Ogg, Opus, "
                "MP3, AIFF or MP4"
            )
        if file.tags is None:
            file.add_tags()
        return file

    def changes(self, description: SoundDescription, overwrite: bool) -> dict[str, str]:
        names = _ID3 if self.id3 else _MP4 if isinstance(self.file, MP4) else _COMMENTS
        texts = dict(zip(names, (description.caption, description.keywords, description.model), strict=True))
        there = {key for key in texts if (self._id3(key) if self.id3 else self.file.tags.get(key))}
        chosen = {key: text for key, text in texts.items() if text and (overwrite or key not in there)}
        self._values = {key: [*description.tags] if key == "KEYWORDS" else [text] for key, text in chosen.items()}
        return chosen

    def _id3(self, key: str) -> list[Any]:
        """The frames of a field: comments with another description are other fields."""
        frames = self.file.tags.getall(key)
        return [frame for frame in frames if frame.desc == ""] if key == "COMM" else frames

    def write(self, temporary: Path) -> None:
        shutil.copyfile(self.path, temporary)
        self.file = self._open(temporary)
        tags, options = self.file.tags, {}
        for key, value in self._values.items():
            if key == "COMM":
                others = [frame for frame in tags.getall(key) if frame.desc]
                tags.setall(key, [*others, COMM(encoding=3, lang="eng", desc="", text=value)])
            elif self.id3:
                tags.setall(key, [TXXX(encoding=3, desc=key.partition(":")[2], text=value)])
            else:
                tags[key] = [MP4FreeForm(text.encode()) for text in value] if key.startswith("----") else value
        if isinstance(self.file, MP3) and tags.version[:2] == (2, 3):
            # Players that read the older version alone still read it.
            tags.update_to_v23()
            options = {"v2_version": 3}
        try:
            self.file.save(temporary, **options)
        except mutagen.MutagenError as error:
            raise ValueError(f"{self.path}: its metadata cannot be written: {error}") from error


@dataclass
class _Chunk:
    name: bytes
    start: int
    size: int
    # What replaces the contents.
    new: bytes | None = None


class _WavEditor:
    """`bext`, `iXML` and `LIST INFO` chunks of a WAV file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = os.path.getsize(path)
        with open(path, "rb") as file:
            self.chunks = list(self._read_chunks(file))
            self.end = max((chunk.start + (chunk.size + 1) // 2 * 2 for chunk in self.chunks), default=12)
            if not {b"fmt ", b"data"} <= {chunk.name for chunk in self.chunks}:
                raise ValueError(f"{path}: not a WAV file with a fmt and a data chunk")
            self.bext = self._content(file, b"bext")
            self.ixml = self._content(file, b"iXML")
            self.info = self._content(file, b"LIST", b"INFO")

    def _read_chunks(self, file: IO[bytes]) -> Iterator[_Chunk]:
        _, riff = struct.unpack("<4sI", file.read(8))
        end, place = min(riff + 8, self.size), 12
        while place + 8 <= end:
            file.seek(place)
            name, size = struct.unpack("<4sI", file.read(8))
            if size == _UNKNOWN_SIZE or place + 8 + size > self.size:
                raise ValueError(
                    f"{self.path}: cut off, or of unknown length, in its {name.decode('latin-1')!r} chunk"
                )
            if name == b"data" and size == 0:
                raise ValueError(f"{self.path}: its header does not say how long it is")
            yield _Chunk(name, place + 8, size)
            place += 8 + size + size % 2

    def _content(self, file: IO[bytes], name: bytes, kind: bytes = b"") -> tuple[_Chunk | None, bytes]:
        """The first chunk of a name (and form), and what it holds."""
        for chunk in self.chunks:
            if chunk.name == name and chunk.size <= _LARGEST_TEXT_CHUNK:
                file.seek(chunk.start)
                content = file.read(chunk.size)
                if content.startswith(kind):
                    return chunk, content
        return None, b""

    def changes(self, description: SoundDescription, overwrite: bool) -> dict[str, str]:
        bext = self._bext(description, overwrite)
        ixml = self._ixml(description, overwrite)
        return {**bext, **ixml, **self._info(description, overwrite)}

    def _set(self, chunk: _Chunk | None, name: bytes, content: bytes) -> None:
        if chunk is not None:
            chunk.new = content
        else:
            # Broadcast software looks for `bext` before the samples.
            self.chunks.insert(0 if name == b"bext" else len(self.chunks), _Chunk(name, 0, 0, content))

    def _bext(self, description: SoundDescription, overwrite: bool) -> dict[str, str]:
        chunk, content = self.bext
        if content[:_BEXT_DESCRIPTION].strip(b"\0 ") and not overwrite:
            return {}
        # The standard asks for ASCII.
        text, model = (one.encode("ascii", "replace") for one in (description.caption, description.model))
        rest = (content or _BEXT.pack(b"", model, b"", b"", b"", 0, 1, b""))[_BEXT_DESCRIPTION:]
        text = text[:_BEXT_DESCRIPTION]
        self._set(chunk, b"bext", text.ljust(_BEXT_DESCRIPTION, b"\0") + rest)
        return {"bext Description": text.decode("ascii")}

    def _ixml(self, description: SoundDescription, overwrite: bool) -> dict[str, str]:
        chunk, content = self.ixml
        texts = {"NOTE": description.caption, "USER/KEYWORDS": description.keywords, "USER/MODEL": description.model}
        if content.strip(b"\0 \r\n"):
            # An entity may stand for anything.
            if b"<!" in content.replace(b"<!--", b""):
                raise ValueError(f"{self.path}: its iXML chunk has declarations that are not read")
            parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
            try:
                root = ElementTree.fromstring(content.rstrip(b"\0"), parser)
            except ElementTree.ParseError as error:
                raise ValueError(f"{self.path}: its iXML chunk is not valid XML ({error})") from error
        else:
            root = ElementTree.Element("BWFXML")
            ElementTree.SubElement(root, "IXML_VERSION").text = "1.61"
        written = {}
        for place, text in texts.items():
            element = root
            for name in place.split("/") if text else ():
                found = element.find(name)
                element = ElementTree.SubElement(element, name) if found is None else found
            if text and (overwrite or not (element.text or "").strip()):
                element.text = written[f"iXML {place}"] = text
        if written:
            self._set(chunk, b"iXML", ElementTree.tostring(root, "utf-8", xml_declaration=True))
        return written

    def _info(self, description: SoundDescription, overwrite: bool) -> dict[str, str]:
        chunk, content = self.info
        texts = {b"ICMT": description.caption, b"IKEY": description.keywords, b"ISFT": description.model}
        entries, place = [], 4
        while place + 8 <= len(content):
            name, size = struct.unpack_from("<4sI", content, place)
            entries.append((name, content[place + 8 : place + 8 + size]))
            place += 8 + size + size % 2
        there = {name for name, value in entries if value.strip(b"\0 ")}
        written = {name: text for name, text in texts.items() if text and (overwrite or name not in there)}
        entries = [entry for entry in entries if entry[0] not in written]
        entries += [(name, text.encode() + b"\0") for name, text in written.items()]
        if written:
            self._set(chunk, b"LIST", b"INFO" + b"".join(_chunk(name, value) for name, value in entries))
        return {f"INFO {name.decode()}": text for name, text in written.items()}

    def write(self, temporary: Path) -> None:
        sizes = [chunk.size if chunk.new is None else len(chunk.new) for chunk in self.chunks]
        riff = 4 + sum(8 + size + size % 2 for size in sizes)
        if riff > _LARGEST_RIFF:
            raise ValueError(f"{self.path}: with its metadata it would be larger than a WAV file can be (4 GiB)")
        with open(self.path, "rb") as source, open(temporary, "wb") as target:
            target.write(b"RIFF" + struct.pack("<I", riff) + b"WAVE")
            for chunk in self.chunks:
                if chunk.new is not None:
                    target.write(_chunk(chunk.name, chunk.new))
                else:
                    target.write(struct.pack("<4sI", chunk.name, chunk.size))
                    _copy(source, chunk.start, chunk.size, target)
                    target.write(b"\0" * (chunk.size % 2))
            # What stands behind the chunks, such as an ID3 tag of an old program.
            _copy(source, self.end, max(0, self.size - self.end), target)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)


def _copy(source: IO[bytes], start: int, size: int, target: IO[bytes]) -> None:
    source.seek(start)
    while size:
        block = source.read(min(size, _COPY_BYTES))
        if not block:
            raise ValueError(f"{source.name}: it became shorter while it was read")
        target.write(block)
        size -= len(block)
