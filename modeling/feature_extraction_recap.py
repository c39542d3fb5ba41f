"""Log-mel features of CLAP and of YAMNet in torch: batched, on any device, the same for a clip wherever it stands."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ClapFeatureExtractor
from transformers.utils import TensorType

from .audio_recap import check_sampling_rate, is_silent, resample, to_mono
from .configuration_recap import AUTO_MAP

# CLAP's floor under the mel power and so under the decibels: 10 * log10(1e-10) = -100 dB.
_MEL_FLOOR = 1e-10
# Frames of 1,024 samples in one transform on a CPU: as many as its nearer caches hold; all 1,001 of a window take half
# as long again. On other devices the number of windows that fills them (0.5 GB).
_FRAMES_AT_ONCE_CPU, _WINDOWS_AT_ONCE = 128, 64
_CLAP_SETTINGS = (
    "feature_size",
    "sampling_rate",
    "hop_length",
    "max_length_s",
    "fft_window_size",
    "frequency_min",
    "frequency_max",
    "truncation",
    "padding",
)
CLAP_SPECTROGRAM, YAMNET_SPECTROGRAM = "clap", "yamnet"
# YAMNet's log-mel (tensorflow/models, research/audioset/yamnet/params.py): 25 ms of 16 kHz audio each 10 ms, HTK
# filters on magnitudes. Its 1,008 frames of 10.08 s begin 120 samples before the frame's own 10 ms.
_YAMNET_SETTINGS = {
    "sampling_rate": 16_000,
    "fft_window_size": 512,
    "hop_length": 160,
    "frequency_min": 125,
    "frequency_max": 7_500,
    "max_length_s": 10.08,
    "padding": "pad",
}
_YAMNET_FRAME, _YAMNET_OFFSET = 400, 1e-3


class RecapFeatureExtractor(ClapFeatureExtractor):
    r"""
    Log-mel spectrograms as `ClapFeatureExtractor` makes them (64 bins, 0 to 14 kHz, 1,024-point Hann windows every
    480 samples at 48 kHz, decibels), computed in torch.

    A clip of at most `max_length_s` seconds is repeated and padded as there (`repeatpad`). A longer one is never
    cropped at random: it becomes consecutive windows of that length, the last one aligned to the clip's end.

    Against the stock extractor, in float32: at most 0.1 dB apart, in bins of near-silence, and 1e-4 dB on average; in
    float64 within 1e-4 dB.

    Args:
        spectrogram (`str`, *optional*, defaults to `"clap"`):
            `"clap"`, or `"yamnet"`: the features of a [`MobileNetClapModel`], `log(mel + 0.001)` of 64 bins from 125
            to 7,500 Hz at 16 kHz, 25 ms each 10 ms, in windows of 10.08 s that are padded with silence.
        max_length_s (`int`, *optional*, defaults to 10): length of a window in seconds.
        truncation (`str`, *optional*, defaults to `"rand_trunc"`, and to `"fusion"` with `"yamnet"`):
            Named so because CLAP's own configurations say which mel filters they go with in this field: the Slaney
            filters with `"rand_trunc"` (unfused checkpoints), the HTK filters with `"fusion"` (fused ones). Nothing
            is truncated here.
        compute_dtype (`str`, *optional*, defaults to `"float32"`): `"float32"` or `"float64"`, for the STFT.
        kwargs: the other parameters of `ClapFeatureExtractor`.

    Raises:
        `ValueError`: on an unknown `truncation`, `padding` or `compute_dtype`, or an impossible `sampling_rate`.
    """

    model_input_names = ["input_features", "input_features_mask"]  # noqa: RUF012

    def __init__(
        self,
        truncation: str | None = None,
        compute_dtype: str = "float32",
        spectrogram: str = CLAP_SPECTROGRAM,
        **kwargs: Any,
    ) -> None:
        if spectrogram not in (CLAP_SPECTROGRAM, YAMNET_SPECTROGRAM):
            raise ValueError(f"`spectrogram` must be 'clap' or 'yamnet', got {spectrogram!r}.")
        if spectrogram == YAMNET_SPECTROGRAM:
            kwargs = {**_YAMNET_SETTINGS, **kwargs}
        if truncation is None:
            truncation = "fusion" if spectrogram == YAMNET_SPECTROGRAM else "rand_trunc"
        # `top_db` is read by nobody in CLAP; `nb_max_samples` and the like are derived and come back from JSON.
        super().__init__(truncation=truncation, **kwargs)
        if truncation not in ("rand_trunc", "fusion"):
            raise ValueError(f"`truncation` must be 'rand_trunc' or 'fusion', got {truncation!r}.")
        if self.padding not in ("repeatpad", "repeat", "pad"):
            raise ValueError(f"`padding` must be 'repeatpad', 'repeat' or 'pad', got {self.padding!r}.")
        check_sampling_rate(self.sampling_rate, "The feature extractor")
        if compute_dtype not in ("float32", "float64"):
            raise ValueError(f"`compute_dtype` must be 'float32' or 'float64', got {compute_dtype!r}.")
        self.compute_dtype = compute_dtype
        self.spectrogram = spectrogram

    @classmethod
    def from_clap_pretrained(cls, clap: str | os.PathLike, **kwargs: Any) -> RecapFeatureExtractor:
        """The extractor for a published CLAP: its mel settings are kept (LAION's start at 50 Hz, not at 0).

        Args:
            clap (`str` or path): Hub id or folder with a `ClapFeatureExtractor`'s or `ClapProcessor`'s settings.
            kwargs: settings to change.

        Raises:
            `OSError`: if there are no such settings.
        """
        if "spectrogram" in cls.get_feature_extractor_dict(clap)[0]:
            return cls.from_pretrained(clap, **kwargs)
        stock = ClapFeatureExtractor.from_pretrained(clap)
        return cls(**{**{name: getattr(stock, name) for name in _CLAP_SETTINGS}, **kwargs})

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | Sequence[int] | None = None,
        return_tensors: str | TensorType | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            raw_speech (array, tensor, or a list of these):
                One clip as a one-dimensional array, or a batch: a list of clips of any lengths, or an array of shape
                `(batch_size, num_samples)`. A clip inside a list may have channels, `(channels, num_samples)` or
                `(num_samples, channels)` (the shorter side is the channels'); they are averaged. Floats are expected
                in [-1, 1]; integers are scaled from the range of their type.
            sampling_rate (`int` or a list of one per clip):
                In Hz. Clips at other rates than the extractor's `sampling_rate` (48 kHz) are resampled (soxr, high
                quality).
            return_tensors (`str`, *optional*): `"pt"` or `"np"`.
            device (*optional*, defaults to the CPU): where the features are computed and left, for `"pt"`.

        Returns:
            `BatchFeature` with `input_features`, float32 of shape `(batch_size, num_windows, num_frames, 64)` in dB
            (`"yamnet"`: natural logarithms), and `input_features_mask` of shape `(batch_size, num_windows)`, 1 for the
            windows of a clip that hold sound (all of them for a silent clip).

        Raises:
            `ValueError`: without a sampling rate, or for a clip that is empty or holds NaN or infinity.
        """
        if kwargs:
            raise TypeError(f"RecapFeatureExtractor got unexpected arguments: {', '.join(sorted(kwargs))}.")
        clips = _as_clips(raw_speech)
        windows_per_clip = [
            self.split_windows(self._prepare_clip(clip, rate, index))
            for index, (clip, rate) in enumerate(zip(clips, _rates(sampling_rate, len(clips)), strict=True))
        ]
        # Windows without sound are neither encoded nor retrieved for; of a silent clip all are, for want of others.
        sounding = [[not is_silent(window) for window in windows] for windows in windows_per_clip]
        flat = [self._pad_window(window) for windows in windows_per_clip for window in windows]
        on_cpu = torch.device(device or "cpu").type == "cpu"
        # One copy less for each window where it is worked on alone.
        at_once = 1 if on_cpu else _WINDOWS_AT_ONCE
        constants = self._taper_and_filters(device)
        mels = torch.cat(
            [
                self._log_mel(torch.from_numpy(part[0][None] if at_once == 1 else np.stack(part)), *constants)
                for start in range(0, len(flat), at_once)
                for part in [flat[start : start + at_once]]
            ]
        )
        num_windows = max(len(windows) for windows in windows_per_clip)
        mask = torch.zeros(len(clips), num_windows, dtype=torch.long, device=mels.device)
        for row, windows in enumerate(windows_per_clip):
            mask[row, : len(windows)] = 1
        features = mels.new_zeros(len(clips), num_windows, *mels.shape[1:])
        features[mask.bool()] = mels
        for row, has_sound in enumerate(sounding):
            if any(has_sound):
                mask[row, : len(has_sound)] = torch.tensor(has_sound, dtype=mask.dtype)
        batch = {"input_features": features, "input_features_mask": mask}
        if return_tensors not in ("pt", TensorType.PYTORCH):
            batch = {name: value.cpu().numpy() for name, value in batch.items()}
        return BatchFeature(batch, tensor_type=return_tensors)

    @property
    def silence_level(self) -> float:
        """The value of digital silence in `input_features`."""
        return math.log(_YAMNET_OFFSET) if self.spectrogram == YAMNET_SPECTROGRAM else 10 * math.log10(_MEL_FLOOR)

    @property
    def decibel(self) -> float:
        """What a change of level by 1 dB adds to `input_features`."""
        return math.log(10) / 20 if self.spectrogram == YAMNET_SPECTROGRAM else 1.0

    def split_windows(self, waveform: np.ndarray) -> list[np.ndarray]:
        """Consecutive windows of `max_length_s` seconds, the last one aligned to the clip's end.

        Args:
            waveform (`np.ndarray` of shape `(num_samples,)`): one channel at `sampling_rate`.
        """
        length = int(self.nb_max_samples)
        return [waveform[start : start + length] for start in self.window_starts(len(waveform))]

    def window_starts(self, num_samples: int) -> list[int]:
        """First samples of the windows of a clip of `num_samples` samples at `sampling_rate`."""
        last = max(num_samples - int(self.nb_max_samples), 0)
        return [*range(0, last, int(self.nb_max_samples)), last]

    def log_mel(self, waveform: np.ndarray) -> torch.Tensor:
        """Features of the whole frames in a waveform, `(num_samples,)` -> `(num_frames, num_mel_bins)`: no padding."""
        return self._log_mel(torch.from_numpy(waveform[None]), *self._taper_and_filters(None))[0]

    def _prepare_clip(self, clip: Any, sampling_rate: int, index: int) -> np.ndarray:
        return resample(to_mono(clip, f"Clip {index}"), sampling_rate, self.sampling_rate)

    def _pad_window(self, window: np.ndarray) -> np.ndarray:
        """The window at its full length, as `padding` says, with half a frame mirrored at either end (`"yamnet"`: with
        silence, so that a frame is centred on its own 10 ms)."""
        length, half = int(self.nb_max_samples), self.fft_window_size // 2
        if self.spectrogram == YAMNET_SPECTROGRAM:
            half = (_YAMNET_FRAME - self.hop_length) // 2
        padded = np.zeros(length + 2 * half, dtype=window.dtype)
        inner = padded[half : half + length]
        times = {"repeat": -(-length // len(window)), "repeatpad": length // len(window), "pad": 1}[self.padding]
        for number in range(times):
            part = inner[number * len(window) : (number + 1) * len(window)]
            part[:] = window[: len(part)]
        if self.spectrogram == CLAP_SPECTROGRAM:
            padded[:half] = inner[half:0:-1]
            padded[half + length :] = inner[-2 : -2 - half : -1]
        return padded

    def _log_mel(self, windows: torch.Tensor, taper: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        """(N, samples with both margins) -> (N, frames, mels), float32, where taper and filters are."""
        windows = windows.to(device=taper.device, dtype=taper.dtype)
        # A view: frames that overlap are not copied before the window function is laid on them.
        frames = windows.unfold(1, len(taper), self.hop_length)
        mels = torch.empty(*frames.shape[:2], filters.shape[1], dtype=windows.dtype, device=windows.device)
        at_once = _FRAMES_AT_ONCE_CPU if windows.device.type == "cpu" else frames.shape[1]
        for part, of in zip(mels.split(at_once, dim=1), frames.split(at_once, dim=1), strict=True):
            if windows.device.type == "cpu" and not (of[:, -1].any() or of[..., : self.hop_length].any()):
                part.zero_()  # Behind a clip that is shorter than its window.
                continue
            spectrum = torch.fft.rfft(of * taper, n=self.fft_window_size)[..., : len(filters)]
            # Frame by frame in memory: `torch.stft` and a sum over (real, imaginary) take four times as long.
            power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
            if self.spectrogram == YAMNET_SPECTROGRAM:
                power.sqrt_()
            part.copy_(torch.matmul(power, filters))
        if self.spectrogram == YAMNET_SPECTROGRAM:
            return mels.add_(_YAMNET_OFFSET).log_().float()
        return mels.clamp_(min=_MEL_FLOOR).log10_().mul_(10.0).float()

    def _taper_and_filters(self, device: str | torch.device | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The Hann window, and the mel filters down to their last bin: nothing above it is used."""
        dtype = getattr(torch, self.compute_dtype)
        length = _YAMNET_FRAME if self.spectrogram == YAMNET_SPECTROGRAM else self.fft_window_size
        taper = torch.hann_window(length, dtype=dtype, device=device)
        filters = self.mel_filters_slaney if self.truncation == "rand_trunc" else self.mel_filters
        num_bins = int(np.flatnonzero(filters.any(axis=1)).max()) + 1
        return taper, torch.from_numpy(filters[:num_bins]).to(device=device, dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # Also inside a processor's file: AutoFeatureExtractor looks there for the code.
        output["auto_map"] = {"AutoFeatureExtractor": AUTO_MAP["AutoFeatureExtractor"]}
        return output


def _as_clips(audio: Any) -> list[Any]:
    """A list of clips out of one clip, an array of clips or a list of clips."""
    if isinstance(audio, (np.ndarray, torch.Tensor)):
        return [audio] if audio.ndim == 1 else list(audio)
    if not isinstance(audio, (list, tuple)):
        hint = "To read a file use `load_audio`."
        raise TypeError(f"`audio` must be an array, a tensor or a list of these, got {type(audio).__name__}. {hint}")
    if not audio:
        raise ValueError("`audio` is an empty list: there is no clip to describe.")
    return [np.asarray(audio)] if np.isscalar(audio[0]) else list(audio)


def _rates(sampling_rate: int | Sequence[int] | None, num_clips: int) -> list[int]:
    if sampling_rate is None:
        raise ValueError("`sampling_rate` is missing: give the rate of `audio` in Hz. Features depend on it.")
    rates = list(sampling_rate) if isinstance(sampling_rate, (list, tuple)) else [sampling_rate] * num_clips
    if len(rates) != num_clips:
        raise ValueError(f"`sampling_rate` has {len(rates)} entries for {num_clips} clips: give one, or one per clip.")
    for rate in rates:
        check_sampling_rate(rate)
    return rates


__all__ = ["RecapFeatureExtractor"]
