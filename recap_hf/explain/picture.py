"""An explanation as a picture: the spectrogram, a map over it per word, and the weights of the retrieved captions."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from recap_hf.modeling.audio_recap import resample, to_mono

from .audio_grid import MelAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .explanation import CaptionExplanation, WordExplanation

_COLUMNS = 4
_MAX_WORDS = 16
_TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000)
_MARK = (0.90, 0.33, 0.05)
_DYNAMIC_RANGE_DB = 70.0


def require_matplotlib() -> None:
    """Raises `ImportError` if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('Drawing an explanation needs matplotlib: pip install "recap-hf[explain]"') from error


def clip_spectrogram(waveform: Any, sampling_rate: int, feature_extractor: Any) -> np.ndarray:
    """The encoder's log-mel spectrogram of a whole recording, `(frames, mels)` in dB.

    Args:
        waveform: `(samples,)` or `(channels, samples)`.
        sampling_rate: of `waveform`, in Hz.
        feature_extractor ([`RecapFeatureExtractor`]): its windows are joined, repetitions left out.
    """
    rate, hop = feature_extractor.sampling_rate, feature_extractor.hop_length
    mono = resample(to_mono(waveform), sampling_rate, rate)
    windows = feature_extractor([mono], sampling_rate=rate)["input_features"][0]
    frames = max(1, -(-len(mono) // hop))
    silence = feature_extractor.silence_level
    spectrogram = np.full((frames, windows.shape[-1]), silence, dtype=np.float32)
    for start, window in zip(feature_extractor.window_starts(len(mono)), windows, strict=True):
        part = window[: frames - start // hop]
        spectrogram[start // hop : start // hop + len(part)] = part
    return spectrogram / feature_extractor.decibel


def draw_explanation(
    explanation: "CaptionExplanation", waveform: Any, feature_extractor: Any, sampling_rate: int | None = None
) -> "Figure":
    """Draws an explanation: the spectrogram under the caption; for each word the same with its map in colour, paler
    for a word that depends less on the audio; and the weight of each retrieved caption for each word.

    Args:
        explanation ([`CaptionExplanation`]): from [`explain_caption`].
        waveform: the explained recording, `(samples,)` or `(channels, samples)`.
        feature_extractor ([`RecapFeatureExtractor`]): the processor's.
        sampling_rate (`int`, *optional*): of `waveform`, in Hz; default: the feature extractor's.

    Returns:
        `matplotlib.figure.Figure`, attached to no window: `figure.savefig(path)`.

    Raises:
        `ImportError`: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    words = explanation.words[:_MAX_WORDS]
    spectrogram = clip_spectrogram(waveform, sampling_rate or feature_extractor.sampling_rate, feature_extractor)
    columns = min(_COLUMNS, max(1, len(words)))
    word_rows = -(-len(words) // columns)
    table_height = 0.5 + 0.42 * len(explanation.retrieved) if explanation.retrieved else 0.0
    heights = [1.9] + [1.45] * word_rows + [table_height] * bool(table_height)
    figure = Figure(figsize=(10, sum(heights) + 0.5), layout="constrained", dpi=110)
    rows = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    top = figure.add_subplot(rows[0, :])
    _draw_spectrogram(top, spectrogram, explanation, feature_extractor)
    top.set_title("\n".join(textwrap.wrap(f"“{explanation.caption}”", 90)), fontsize=12, parse_math=False)
    top.set_xlabel("seconds", fontsize=8)
    for index, word in enumerate(words):
        axes = figure.add_subplot(rows[1 + index // columns, index % columns])
        _draw_spectrogram(axes, spectrogram, explanation, feature_extractor, labels=index % columns == 0)
        _draw_map(axes, word.audio_map, explanation, _strength(word, words))
        axes.set_title(f"{word.text}   {word.audio_effect:+.1f}", fontsize=9, parse_math=False)
    figure.supxlabel(
        f"Colour: {explanation.method}, paler for a word that depends less on the audio. Number: decrease of the "
        "word's log-probability in nats if the audio is hidden.",
        fontsize=8,
    )
    if explanation.retrieved:
        _draw_captions(figure.add_subplot(rows[-1, :]), explanation, words)
    return figure


def _draw_spectrogram(
    axes: "Axes", spectrogram: np.ndarray, explanation: "CaptionExplanation", extractor: Any, labels: bool = True
) -> None:
    low = max(spectrogram.min(), spectrogram.max() - _DYNAMIC_RANGE_DB)
    axes.imshow(
        spectrogram.T,
        origin="lower",
        aspect="auto",
        cmap="gray_r",
        vmin=low,
        vmax=spectrogram.max() + 1e-3,
        extent=(0, explanation.duration_s, 0, spectrogram.shape[1]),
        # In the small panels several frames share a pixel: none, such as a click, may be left out.
        interpolation="antialiased",
    )
    axes.set_xlim(0, explanation.duration_s)
    axes.set_ylim(0, spectrogram.shape[1])
    axes.tick_params(labelsize=7)
    ticks = [hz for hz in _TICKS_HZ if extractor.frequency_min < hz < extractor.frequency_max] if labels else []
    axis = MelAxis(extractor)
    axes.set_yticks([axis.place(hz) for hz in ticks], [f"{hz / 1000:g} kHz" for hz in ticks])


def _strength(word: "WordExplanation", words: "list[WordExplanation]") -> float:
    """Opacity of a word's map, 0 to 1: 1 for the word with the most weight on the audio."""
    most = max(other.cell_weights.sum() for other in words)
    # The square root, so that a word with a tenth of the weight is still visible.
    return float(np.sqrt(word.cell_weights.sum() / most)) if most > 0 else 0.0


def _draw_map(axes: "Axes", audio_map: np.ndarray, explanation: "CaptionExplanation", opacity: float) -> None:
    # By density: the last bin may be shorter than the others.
    density = audio_map / np.diff(explanation.time_edges_s)
    density /= density.max() if density.max() > 0 else 1.0
    colours = np.empty((*density.shape, 4))
    colours[..., :3] = _MARK
    colours[..., 3] = 0.75 * opacity * density
    axes.pcolorfast(explanation.time_edges_s, np.linspace(0, axes.get_ylim()[1], len(density) + 1), colours)


def _draw_captions(axes: "Axes", explanation: "CaptionExplanation", words: "list[WordExplanation]") -> None:
    """Rows are captions with their mean weight, columns are words."""
    table = np.array([word.caption_weights for word in words]).T.reshape(len(explanation.retrieved), len(words))
    axes.imshow(table, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks(range(len(words)), [word.text for word in words], fontsize=8, parse_math=False)
    axes.xaxis.tick_top()
    texts = [textwrap.shorten(hit["caption"], 60, placeholder="…") for hit in explanation.retrieved]
    labels = [f"{text}   {hit['weight']:.2f}" for text, hit in zip(texts, explanation.retrieved, strict=True)]
    axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    axes.tick_params(length=0)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
