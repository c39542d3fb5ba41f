"""Sound from a microphone, by PortAudio through the sounddevice wheel."""

import queue

import numpy as np

from recap_hf.modeling.audio_recap import Mixer

from .stream import MIXER_PATIENCE, Blocks

_BLOCK_S = 0.1


def microphone_blocks(device: str = "", rate: int | None = None, channels: int = 1) -> Blocks:
    """Mono float32 blocks of 0.1 s with their sampling rate, without end.

    Args:
        device (`str`, *optional*): name or number from `python -m sounddevice`; empty: the default microphone.
        rate (`int`, *optional*): sampling rate in Hz; default: the device's.
        channels (`int`, *optional*, defaults to 1): number of channels; they are mixed.

    Raises:
        `ImportError`: without sounddevice.
        `OSError`: without PortAudio (a system package on Linux: libportaudio2) or without this microphone.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise ImportError('Recording from a microphone needs sounddevice: pip install "recap-hf[live]"') from error
    except OSError as error:
        hint = "Install it (on Debian: apt install libportaudio2), or use a pipe: arecord -f cd -t wav | recap live"
        raise OSError(f"sounddevice finds no PortAudio ({error}). {hint}") from error
    chosen = int(device) if device.isdigit() else device or None
    mix = Mixer(MIXER_PATIENCE)
    try:
        rate = rate or int(sounddevice.query_devices(chosen, "input")["default_samplerate"])
        # Unbounded: PortAudio's callback must not block.
        blocks: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        stream = sounddevice.InputStream(
            samplerate=rate,
            blocksize=round(_BLOCK_S * rate),
            device=chosen,
            channels=channels,
            dtype="float32",
            callback=lambda data, *_: blocks.put(np.array(mix(data.T))),
        )
    except (sounddevice.PortAudioError, ValueError) as error:
        hint = "List microphones with: python -m sounddevice"
        raise OSError(f"The microphone {device or '(default)'} cannot be opened: {error}. {hint}") from error
    with stream:
        while True:
            yield blocks.get(), rate
