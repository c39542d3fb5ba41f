"""Captions from an exported model, without torch and transformers: ONNX Runtime, NumPy and tokenizers.

`recap export onnx FOLDER OUT` writes the folder that `OnnxCaptioner` runs. Audio is read, captions are retrieved and
prompts are built by the same code as with torch; the log-mel, greedy search and beam search are here, in NumPy.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.modeling.audio_recap import SILENCE_CAPTION, is_silent, load_audio, resample, to_mono
from recap_hf.modeling.options_recap import UNRECOGNISED_CAPTION, PromptTemplate
from recap_hf.modeling.retrieval_recap import CaptionDatastore

try:
    import onnxruntime
    from tokenizers import Tokenizer
except ImportError as error:
    raise ImportError(f"running an exported model needs {error.name}: pip install 'recap-hf[onnx]'") from error

FORMAT_VERSION = 1
SETTINGS = "recap_onnx.json"
AUDIO_ENCODER = "audio_encoder.onnx"
CROSS_ATTENTION = "cross_attention.onnx"
DECODER = "decoder.onnx"
MEL_FILTERS = "mel_filters.npy"
TOKENIZER = "tokenizer.json"
DATASTORE_FOLDER = "datastore"
_MEL_FLOOR = 1e-10
# Bytes of 20 million weights, as in `recap_cli.options`.
_SMALL_MODEL = 80_000_000
# YAMNet's log-mel: 25 ms at 16 kHz, and what is added under the logarithm; as in `RecapFeatureExtractor`.
_YAMNET_FRAME, _YAMNET_OFFSET = 400, 1e-3

Caches = list[np.ndarray]


class OnnxCaptioner:
    """Captions recordings with the graphs that `recap export onnx` wrote.

    Args:
        folder: what the export made.
        datastore: captions to retrieve from instead of the exported ones: a `CaptionDatastore` or a folder of one.
        providers: of ONNX Runtime, the first available is used; default: the CPU.
        num_threads: of ONNX Runtime; default: 1 for a small model, as of `recap caption`, else its own choice.

    Raises:
        FileNotFoundError: the folder lacks a file of the export.
        ValueError: another version's format, or a datastore that another encoder made.

    Example:
        >>> captioner = OnnxCaptioner("exported")
        >>> captioner("dog.wav")["caption"]
        'a dog barks twice'
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        datastore: CaptionDatastore | str | os.PathLike | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        num_threads: int | None = None,
    ) -> None:
        folder = Path(folder)
        for name in (SETTINGS, AUDIO_ENCODER, CROSS_ATTENTION, DECODER, MEL_FILTERS, TOKENIZER):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: make the folder with `recap export onnx`")
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        found = settings.get("format_version")
        if found != FORMAT_VERSION:
            known = f"this version reads {FORMAT_VERSION}: export the model again"
            raise ValueError(f"{folder / SETTINGS} is of format {found!r}, {known}")
        self._settings = settings
        self.prompt = PromptTemplate(**settings["prompt"])
        self.num_beams: int = settings["generation"]["num_beams"]
        self.sampling_rate: int = settings["mel"]["sampling_rate"]
        self._filters = np.load(folder / MEL_FILTERS, allow_pickle=False)
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        options = onnxruntime.SessionOptions()
        small = sum(path.stat().st_size for path in folder.glob("*.onnx*")) < _SMALL_MODEL
        # 0 leaves it to ONNX Runtime.
        options.intra_op_num_threads = num_threads or int(small)
        self._audio, self._cross, self._decoder = (
            onnxruntime.InferenceSession(str(folder / name), options, providers=list(providers))
            for name in (AUDIO_ENCODER, CROSS_ATTENTION, DECODER)
        )
        self._pairs = [f"{layer}.{kind}" for layer in range(settings["num_layers"]) for kind in ("key", "value")]
        if datastore is None and (folder / DATASTORE_FOLDER).is_dir():
            datastore = folder / DATASTORE_FOLDER
        if datastore is not None and not isinstance(datastore, CaptionDatastore):
            datastore = CaptionDatastore.from_pretrained(datastore)
        if datastore is not None:
            datastore.check_encoder(np.asarray(settings["fingerprint"], dtype=np.float32))
        self.datastore: CaptionDatastore | None = datastore

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | None = None,
        k: int | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
    ) -> dict[str, Any]:
        """The caption of one recording.

        Args:
            audio: a path, URL or bytes, or a waveform of shape (samples,) or (channels, samples).
            sampling_rate: of a waveform, in Hz.
            k, num_beams, max_new_tokens: default: the exported model's.

        Returns:
            ``{"caption", "score", "retrieved"}`` as from ``pipeline("audio-captioning")``: the score is the
            exponential of the mean log-probability of the caption's tokens.
        """
        waveform = self._waveform(audio, sampling_rate)
        if is_silent(waveform):
            return {"caption": SILENCE_CAPTION, "score": 1.0, "retrieved": []}
        windows = self._windows(waveform)
        # As with torch: windows without sound are neither encoded nor retrieved for.
        sounding = [window for window in windows if not is_silent(window)] or windows
        hidden, embeds = self.encode(np.stack([self._window_mel(window) for window in sounding]))
        k = self._settings["num_retrieved_captions"] if k is None else k
        # Graphs that were exported by earlier versions lack these settings.
        diversity = self._settings.get("retrieval_diversity") or 0.0
        threshold = self._settings.get("retrieval_score_threshold")
        hits = []
        if self.datastore is not None:
            hits = self.datastore.search(embeds[None], k, None, None, diversity, threshold)[0]
        fits = {} if self.datastore is None or not k or threshold is None else {"fits": bool(hits)}
        if fits and not hits:
            return {"caption": UNRECOGNISED_CAPTION, "score": 0.0, "retrieved": [], **fits}
        prompt, used = self._fit_prompt(hits)
        beams = self.num_beams if num_beams is None else num_beams
        longest = self._settings["generation"]["max_new_tokens"] if max_new_tokens is None else max_new_tokens
        caches, mask = self.cross_caches(hidden), self.states_mask(hidden)
        tokens, log_probability = self.search(prompt, caches, beams, longest, mask)
        kept = [token for token in prompt + tokens if token not in self._settings["special_token_ids"]]
        text = self._tokenizer.decode(kept, skip_special_tokens=False)
        score = float(np.exp(log_probability / len(tokens)))
        return {"caption": self.prompt.strip(text), "score": score, "retrieved": hits[:used], **fits}

    def _waveform(self, audio: Any, sampling_rate: int | None) -> np.ndarray:
        if not isinstance(audio, np.ndarray):
            audio, sampling_rate = load_audio(audio)
        elif sampling_rate is None:
            raise ValueError("`sampling_rate` is missing: give the rate of the waveform in Hz")
        return resample(to_mono(audio, "The recording"), sampling_rate, self.sampling_rate)

    def log_mel(self, waveform: np.ndarray) -> np.ndarray:
        """Log-mel windows, float32 (windows, frames, mels), of a mono waveform at the model's rate.

        As `RecapFeatureExtractor` makes them: consecutive windows, the last one aligned to the end; a short clip is
        repeated or padded. The transform is done in float64.
        """
        return np.stack([self._window_mel(window) for window in self._windows(waveform)])

    def _windows(self, waveform: np.ndarray) -> list[np.ndarray]:
        size = self._settings["mel"]["window_samples"]
        starts = [0]
        if len(waveform) > size:
            starts = list(range(0, len(waveform) - size + 1, size))
            if starts[-1] != len(waveform) - size:
                starts.append(len(waveform) - size)
        return [waveform[start : start + size] for start in starts]

    def _window_mel(self, window: np.ndarray) -> np.ndarray:
        mel = self._settings["mel"]
        missing = mel["window_samples"] - len(window)
        if missing > 0:
            if mel["padding"] != "pad":
                copies = mel["window_samples"] // len(window) + (mel["padding"] == "repeat")
                window = np.tile(window, copies)[: mel["window_samples"]]
            window = np.pad(window, (0, mel["window_samples"] - len(window)))
        size, hop, window = mel["fft_window_size"], mel["hop_length"], window.astype(np.float64)
        # Folders that earlier versions exported are all of this kind.
        is_yamnet = mel.get("spectrogram", "clap") == "yamnet"
        length = _YAMNET_FRAME if is_yamnet else size
        padded = np.pad(window, (length - hop) // 2) if is_yamnet else np.pad(window, size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, length)[::hop]
        # The periodic Hann window, as torch.hann_window makes it.
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
        magnitudes = np.abs(np.fft.rfft(frames * hann, size, axis=1))
        if is_yamnet:
            return np.log(magnitudes @ self._filters + _YAMNET_OFFSET).astype(np.float32)
        return (10 * np.log10(np.maximum(magnitudes**2 @ self._filters, _MEL_FLOOR))).astype(np.float32)

    def encode(self, mel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-mel windows of one clip to its states (1, windows * n, d) and one unit query per window (windows, P)."""
        hidden, embeds = self._audio.run(["hidden_states", "audio_embeds"], {"input_features": mel})
        return hidden.reshape(1, -1, hidden.shape[-1]), embeds

    @staticmethod
    def states_mask(hidden: np.ndarray) -> np.ndarray:
        """1 for the states (batch, n, d) that the decoder attends to, int64 (batch, n): those that hold more than
        zeros, or all of a clip that has no other."""
        holds = (hidden != 0).any(axis=-1)
        return (holds | ~holds.any(axis=1, keepdims=True)).astype(np.int64)

    def cross_caches(self, hidden: np.ndarray) -> Caches:
        """Keys and values of every block's cross-attention, (1, heads, n, head size)."""
        return self._cross.run([f"cross.{pair}" for pair in self._pairs], {"hidden_states": hidden})

    def empty_caches(self, batch_size: int) -> Caches:
        """The caches of the self-attention before the first token."""
        shape = (batch_size, self._settings["num_heads"], 0, self._settings["head_size"])
        return [np.zeros(shape, dtype=np.float32) for _ in self._pairs]

    def step(
        self, ids: np.ndarray, past: Caches, cross: Caches, states_mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Caches]:
        """Logits (batch, vocabulary) after the last of `ids` (batch, length), and the grown caches. `states_mask`
        (1 or batch, n): 1 for the states to attend to; default: all."""
        batch, length = ids.shape
        if states_mask is None:
            states_mask = np.ones((1, cross[0].shape[2]), dtype=np.int64)
        feeds = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((batch, past[0].shape[2] + length), dtype=np.int64),
            "encoder_attention_mask": np.repeat(states_mask, batch // len(states_mask), axis=0),
        }
        feeds.update({f"past.{pair}": cache for pair, cache in zip(self._pairs, past, strict=True)})
        feeds.update({f"cross.{pair}": cache for pair, cache in zip(self._pairs, cross, strict=True)})
        logits, *present = self._decoder.run(["logits", *(f"present.{pair}" for pair in self._pairs)], feeds)
        return logits, present

    def _fit_prompt(self, hits: list[dict[str, Any]]) -> tuple[list[int], int]:
        for count in range(len(hits), -1, -1):
            text = self.prompt.build([hit["caption"] for hit in hits[:count]])
            tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(tokens) <= self._settings["max_prompt_tokens"]:
                return tokens, count
        raise ValueError(f"a prompt without captions has {len(tokens)} tokens, more than the decoder takes")

    def search(
        self, prompt: list[int], cross: Caches, num_beams: int, max_new_tokens: int, states_mask: Any = None
    ) -> tuple[list[int], float]:
        """The best continuation of `prompt`: greedy for one beam, else beam search as transformers defines it.

        At each step the best ``2 * num_beams`` continuations of all beams are looked at. Those that end and are among
        the first `num_beams` are finished, scored by log-probability over ``length ** length_penalty``; the best that
        do not end go on. With early stopping the search is over once `num_beams` are finished; without, once no beam
        can have a better score.

        Returns:
            Its tokens, the end token included, and the sum of their log-probabilities.
        """
        generation = self._settings["generation"]
        penalty, groups = generation["length_penalty"], np.asarray(generation.get("no_repeat_token_groups") or [])
        logits, past = self.step(np.asarray([prompt]), self.empty_caches(1), cross, states_mask)
        # Continuations that go on, all of one length, best first; and the best finished ones with their scores.
        beams: list[tuple[list[int], float]] = [([], 0.0)]
        finished: list[tuple[float, list[int], float]] = []
        while True:
            length = len(beams[0][0]) + 1
            totals = _log_softmax(logits) + np.asarray([[total] for _, total in beams])
            if len(groups):
                for row, (tokens, _) in enumerate(beams):
                    totals[row, np.isin(groups, groups[tokens]) & (groups > 0)] = -np.inf
            rows, survivors = [], []
            for rank, (row, token, total) in enumerate(_top(totals, 2 * num_beams if num_beams > 1 else 1)):
                tokens = [*beams[row][0], token]
                if token == generation["eos_token_id"] or length >= max_new_tokens:
                    if rank < num_beams:
                        finished.append((total / length**penalty, tokens, total))
                elif len(survivors) < num_beams:
                    rows.append(row)
                    survivors.append((tokens, total))
            # Stable: of equal scores the earlier one stays first.
            finished = sorted(finished, key=lambda entry: -entry[0])[:num_beams]
            full = len(finished) == num_beams
            if not survivors or (
                full and (generation["early_stopping"] or survivors[0][1] / length**penalty <= finished[-1][0])
            ):
                return finished[0][1:]
            if rows != list(range(len(past[0]))):
                past = [cache[rows] for cache in past]
            if len(cross[0]) != len(rows):
                cross = [np.repeat(cache[:1], len(rows), axis=0) for cache in cross]
            beams = survivors
            logits, past = self.step(np.asarray([[tokens[-1]] for tokens, _ in beams]), past, cross, states_mask)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _top(scores: np.ndarray, count: int) -> list[tuple[int, int, float]]:
    """The `count` highest scores of (beams, vocabulary) as (beam, token, score), best first."""
    flat = scores.reshape(-1)
    count = min(count, flat.size)
    chosen = np.argpartition(-flat, count - 1)[:count]
    chosen = chosen[np.lexsort((chosen, -flat[chosen]))]
    return [(int(index // scores.shape[1]), int(index % scores.shape[1]), float(flat[index])) for index in chosen]
