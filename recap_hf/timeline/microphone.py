"""Sound of a microphone, by PortAudio through the sounddevice wheel."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import numpy as np

__all__ = ["microphone_blocks"]

_BLOCK_S = 0.1


def microphone_blocks(
    device: str = "", rate: int | None = None, channels: int = 1
) -> Iterator[tuple[np.ndarray, int]]:
    """Mono blocks of 0.1 s with their rate, without end.

    Args:
        device (`str`, *optional*): name or number as `python -m sounddevice` lists them; empty: the default.
        rate (`int`, *optional*): in Hz; default: the device's own.
        channels (`int`, *optional*, defaults to 1): recorded and averaged.

    Raises:
        `ImportError`: without sounddevice.
        `OSError`: without PortAudio (on Linux a system package: libportaudio2) or without such a microphone.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise ImportError('Listening to a microphone needs sounddevice: pip install "recap-hf[live]"') from error
    except OSError as error:
        raise OSError(
            f"sounddevice finds no PortAudio ({error}). On Debian and Ubuntu: apt install libportaudio2. Or pipe the "
            "sound in: arecord -f cd -t wav | recap live"
        ) from error
    chosen = int(device) if device.isdigit() else device or None
    try:
        rate = rate or int(sounddevice.query_devices(chosen, "input")["default_samplerate"])
        # The callback must not wait, so this has no limit: what cannot be captioned yet lies in memory.
        blocks: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        stream = sounddevice.InputStream(
            samplerate=rate,
            blocksize=round(_BLOCK_S * rate),
            device=chosen,
            channels=channels,
            dtype="float32",
            callback=lambda data, *_: blocks.put(data.mean(axis=1)),
        )
    except (sounddevice.PortAudioError, ValueError) as error:
        raise OSError(
            f"No microphone {device or '(default)'} can be opened: {error}. `python -m sounddevice` lists what there "
            "is."
        ) from error
    with stream:
        while True:
            yield blocks.get(), rate
