"""Valid recordings of every format, and mutants of files, checkpoints and datastores. All depend on a seed alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr

from recap_hf import examples_path, load_audio
from recap_hf.modeling.datastore_files_recap import MANIFEST_NAME, manifest_checksum

# Suffix: format and subtype of libsndfile, or container and codec of FFmpeg.
_SOUNDFILE = {
    "16.wav": ("WAV", "PCM_16"),
    "24.wav": ("WAV", "PCM_24"),
    "float.wav": ("WAV", "FLOAT"),
    "ulaw.wav": ("WAV", "ULAW"),
    "adpcm.wav": ("WAV", "MS_ADPCM"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis.ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
}
_FFMPEG = {
    "m4a": ("ipod", "aac"),
    "alac.m4a": ("ipod", "alac"),
    "mp4": ("mp4", "aac"),
    "mov": ("mov", "pcm_s16le"),
    "3gp": ("3gp", "amr_nb"),
    "amr": ("amr", "amr_nb"),
    "aac": ("adts", "aac"),
    "webm": ("webm", "libopus"),
    "mkv": ("matroska", "flac"),
    "wma": ("asf", "wmav2"),
    "avi": ("avi", "libmp3lame"),
    "ac3": ("ac3", "ac3"),
    "ts": ("mpegts", "mp2"),
    "flv": ("flv", "aac"),
    "tta": ("tta", "tta"),
    "wv": ("wv", "wavpack"),
}
FORMATS = (*_SOUNDFILE, *_FFMPEG)
_WITH_VIDEO = ("mp4", "mkv", "avi")
_SOUNDS = ("sea", "clock", "flute", "bass_drum")
_NASTY_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_NASTY_VALUES = (None, True, -1, 0, 1, 2**31, 10**30, 1e308, float("nan"), "", "x", "\x00", "x" * 10_000, [], {}, [1])


# ------------------------------------------------------------------ recordings


def valid_recordings(folder: Path, seconds: float = 2.0, sounds: tuple[str, ...] = _SOUNDS) -> list[Path]:
    """Writes a recording of each sound in each format, mono and stereo in turn, and returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, sound in enumerate(sounds):
        waveform, rate = load_audio(examples_path() / f"{sound}.flac")
        mono = waveform.mean(axis=0)[: int(seconds * rate)]
        for form in FORMATS:
            rate_of = 8_000 if form in ("3gp", "amr") else 48_000 if form in ("opus", "webm") else 44_100
            samples = 0.9 * soxr.resample(mono, rate, rate_of)
            channels = 1 if rate_of == 8_000 or (number + len(form)) % 2 else 2
            files.append(folder / f"{sound}.{form}")
            write_recording(files[-1], form, np.stack([samples, 0.5 * samples][:channels]), rate_of)
    return files


def write_recording(path: Path, form: str, channels: np.ndarray, rate: int) -> None:
    """Writes float32 samples of shape `(channels, samples)` in one of `FORMATS`."""
    if form in _SOUNDFILE:
        kind, subtype = _SOUNDFILE[form]
        soundfile.write(path, channels.T, rate, format=kind, subtype=subtype)
        return
    container, codec = _FFMPEG[form]
    with av.open(str(path), "w", format=container, options={"strict": "experimental"}) as output:
        video = output.add_stream("mpeg4", rate=10) if form in _WITH_VIDEO else None
        layout = "mono" if len(channels) == 1 else "stereo"
        audio = output.add_stream(codec, rate=rate, layout=layout)
        if codec in ("wmav2", "amr_nb"):
            audio.bit_rate = 64_000 if codec == "wmav2" else 12_200
        if video is not None:
            video.width = video.height = 32
            for number in range(int(10 * channels.shape[1] / rate)):
                picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * number % 256, np.uint8))
                picture.pts, picture.time_base = number, Fraction(1, 10)
                output.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels, np.float32), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in (frame, None):
            output.mux(audio.encode(part))


def cut(path: Path, folder: Path, share: float) -> Path:
    """A copy of the first `share` of a file."""
    data, target = path.read_bytes(), folder / f"cut.{path.name}"
    target.write_bytes(data[: int(share * len(data))])
    return target


def mutate_recording(path: Path, folder: Path, rng: random.Random) -> tuple[str, Path]:
    """A mutant of a recording: what was done to it, and its file in `folder`."""
    data, done = path.read_bytes(), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        operation = rng.choice(_OPERATIONS)
        data = bytes(operation(bytearray(data), rng))
        done.append(operation.__name__.strip("_"))
    name = path.name
    if rng.random() < 0.1:
        name, done = f"{path.stem}.{rng.choice(FORMATS)}", [*done, "suffix"]
    target = folder / f"mutant.{name}"
    target.write_bytes(data)
    return "+".join(done), target


# ----------------------------------------------------------------------- bytes


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 2, 5, 50))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _flip_head(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 2, 5))):
        if data:
            data[rng.randrange(min(200, len(data)))] ^= 1 << rng.randrange(8)
    return data


def _truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: int(rng.choice((rng.random(), rng.random() ** 4)) * len(data))]


def _field(data: bytearray, rng: random.Random) -> bytearray:
    """A number beside the name of a chunk, or anywhere in the head, is another one."""
    names = [match.start() for match in re.finditer(rb"[A-Za-z ]{4}", bytes(data[:4096]) + bytes(data[-4096:]))]
    shift = max(0, len(data) - 8192)
    places = [at if at < 4096 else at + shift for at in names] or [0]
    place = rng.choice(places) + rng.choice((-4, 4, 8, 12)) if rng.random() < 0.7 else rng.randrange(200)
    width = rng.choice((1, 2, 4, 4, 8))
    value = rng.choice(_NASTY_NUMBERS) if rng.random() < 0.7 else rng.getrandbits(32)
    place = max(0, min(place, len(data) - width))
    data[place : place + width] = (value % 256**width).to_bytes(width, rng.choice(("little", "big")))
    return data


def _part(data: bytearray, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 64, 1024, len(data) // 4 + 1)))


def _duplicate(data: bytearray, rng: random.Random) -> bytearray:
    start, end = _part(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 1, 3)) + data[end:]


def _remove(data: bytearray, rng: random.Random) -> bytearray:
    start, end = _part(data, rng)
    return data[:start] + data[end:]


def _blank(data: bytearray, rng: random.Random) -> bytearray:
    start, end = _part(data, rng)
    data[start:end] = bytes([rng.choice((0, 0xFF))]) * (end - start)
    return data


def _noise(data: bytearray, rng: random.Random) -> bytearray:
    start, end = _part(data, rng)
    data[start:end] = rng.randbytes(end - start)
    return data


def _insert(data: bytearray, rng: random.Random) -> bytearray:
    start, _ = _part(data, rng)
    return data[:start] + rng.randbytes(rng.choice((1, 3, 100, 4096))) + data[start:]


def _move(data: bytearray, rng: random.Random) -> bytearray:
    start, end = _part(data, rng)
    moved = data[start:end]
    del data[start:end]
    place = rng.randrange(len(data) + 1)
    return data[:place] + moved + data[place:]


_OPERATIONS = (_flip, _flip_head, _truncate, _field, _field, _duplicate, _remove, _blank, _noise, _insert, _move)


# --------------------------------------------------- checkpoints and datastores


class Planted:
    """Unpickling it writes `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.marker, "w")


def linked_copy(source: Path, target: Path) -> None:
    """A copy of a folder whose files share their bytes with the source's; a mutant replaces them."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)


def _replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def mutate_checkpoint(source: Path, target: Path, marker: Path, rng: random.Random) -> str:
    """Makes a mutant of a checkpoint in `target` and returns what was done to it."""
    linked_copy(source, target)
    if rng.random() < 0.1:
        return _plant_code(target, marker, rng)
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
    path = rng.choice([one for one in files if one.parent.name != "datastore"])
    return _mutate_file(path, files, marker, rng) + f" ({path.parent.name})" * (path.parent != target)


def mutate_datastore(source: Path, target: Path, marker: Path, rng: random.Random) -> str:
    """Makes a mutant of a datastore in `target` and returns what was done to it.

    Half of them have right checksums again, as of a careless or a hostile tool. Not those of FAISS's files: their
    reader does not claim to withstand that.
    """
    linked_copy(source, target)
    files = sorted(path for path in target.iterdir() if path.is_file())
    path = rng.choice(files)
    done = _mutate_file(path, files, marker, rng)
    if path.suffix != ".faiss" and rng.random() < 0.5 and _seal(target / MANIFEST_NAME):
        done += ", sealed"
    return done


def _mutate_file(path: Path, files: list[Path], marker: Path, rng: random.Random) -> str:
    data, kind = path.read_bytes(), rng.random()
    name = re.sub("[0-9a-f]{16}", "*", path.name)
    if kind < 0.06:
        path.unlink()
        return f"{name} missing"
    if kind < 0.1:
        other = rng.choice(files)
        _replace(path, other.read_bytes())
        return f"{name} is {re.sub('[0-9a-f]{16}', '*', other.name)}"
    if kind < 0.14:
        _replace(path, pickle.dumps(Planted(marker)))
        return f"{name} a pickle"
    if path.suffix == ".json" and kind < 0.7:
        return f"{name}: {_mutate_json(path, data, rng)}"
    if path.suffix == ".jsonl" and kind < 0.5:
        lines = data.decode("utf-8").splitlines()
        row = rng.randrange(len(lines))
        record = json.loads(lines[row])
        record[rng.choice(sorted(record))] = rng.choice(_NASTY_VALUES)
        lines[row] = rng.choice((json.dumps(record), "[]", "", "{", "null"))
        _replace(path, "".join(f"{line}\n" for line in lines).encode())
        return f"{name}: a line"
    if path.suffix == ".npy" and kind < 0.6:
        _replace(path, _mutate_array(data, marker, rng))
        return f"{name}: another array"
    if path.suffix == ".safetensors" and kind < 0.6:
        _replace(path, _mutate_safetensors(data, rng))
        return f"{name}: header"
    operation = rng.choice(_OPERATIONS)
    _replace(path, bytes(operation(bytearray(data), rng)))
    return f"{name}: {operation.__name__.strip('_')}"


def _mutate_json(path: Path, data: bytes, rng: random.Random) -> str:
    content = json.loads(data)
    places = [place for place in _places(content) if len(place) < 6]
    if not places:
        _replace(path, json.dumps(rng.choice(_NASTY_VALUES)).encode())
        return "another value"
    # Large vocabularies would be nearly all of the places.
    place = rng.choice([one for one in places if len(one) == rng.choice((1, 1, 2, 3))] or places)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if rng.random() < 0.25:
        del parent[place[-1]]
        done = "without"
    else:
        parent[place[-1]] = rng.choice(_NASTY_VALUES)
        done = f"{parent[place[-1]]!r:.20} as"
    _replace(path, json.dumps(content).encode())
    return f"{done} {'.'.join(map(str, place))}"


def _places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from _places(value, (*place, key))


def _mutate_array(data: bytes, marker: Path, rng: random.Random) -> bytes:
    array, buffer = np.load(io.BytesIO(data)), io.BytesIO()
    with np.errstate(all="ignore"):
        changed = rng.choice(
            (
                array[:-1],
                array[:, :-1],
                array[0],
                array[None],
                array.astype(np.float64),
                array.astype(np.int8),
                np.full_like(array, np.nan),
                np.full_like(array, np.inf),
                np.zeros_like(array),
                np.asfortranarray(array),
                np.array([Planted(marker)], dtype=object),
            )
        )
    np.save(buffer, changed, allow_pickle=True)
    header = buffer.getvalue()
    if rng.random() < 0.3:
        # A shape of many terabytes.
        header = re.sub(rb"\(\d+", lambda found: b"(" + b"9" * (len(found[0]) - 1), header, count=1)
    return header


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry, kind = header[name], rng.randrange(6)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[f"{name}.other"] = header.pop(name)
    elif kind == 2:
        entry["shape"] = rng.choice(([], [10**12], [-1], entry["shape"][::-1], [*entry["shape"], 1], "x"))
    elif kind == 3:
        entry["dtype"] = rng.choice(("I64", "F16", "BOOL", "x", None))
    elif kind == 4:
        entry["data_offsets"] = rng.choice(([0, 10**15], [-5, 10], [10, 0], [0], None))
    else:
        return rng.choice(_NASTY_NUMBERS).to_bytes(8, "little") + data[8:]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _plant_code(target: Path, marker: Path, rng: random.Random) -> str:
    """Code that a checkpoint asks to run: a module of its own, or weights that are a pickle."""
    if rng.random() < 0.4:
        (target / "model.safetensors").unlink()
        name = rng.choice(("pytorch_model.bin", "model.safetensors", "tf_model.h5"))
        (target / name).write_bytes(pickle.dumps(Planted(marker)))
        return f"a pickle as {name}"
    (target / "planted.py").write_text(f"open({str(marker)!r}, 'w')\n\nclass Planted:\n    pass\n", encoding="utf-8")
    classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor")
    names = ("config.json", "tokenizer_config.json", "processor_config.json")
    for name in rng.sample(names, rng.randint(1, 3)):
        content = json.loads((target / name).read_text(encoding="utf-8"))
        content["auto_map"] = dict.fromkeys(classes, "planted.Planted")
        for key in ("tokenizer_class", "processor_class", "model_type", "architectures"):
            if rng.random() < 0.5:
                content.pop(key, None)
        _replace(target / name, json.dumps(content).encode())
    return "a module of its own"


def _seal(path: Path) -> bool:
    """Gives a datastore the checksums of the files that it has; `False` if its manifest is none."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            data = (path.parent / name).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _replace(path, json.dumps({**manifest, "checksum": manifest_checksum(manifest)}).encode())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
