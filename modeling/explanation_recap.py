"""Why a caption says what it says: for each word the places of the recording and the captions it rests on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .attribution_recap import METHODS, Attribution, Passage, attribute, hidden_log_probs
from .audio_grid_recap import AudioGrid
from .audio_recap import resample, to_mono
from .generation_recap import RecapEncoderOutput

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True)
class WordExplanation:
    """One word of a caption.

    Args:
        text (`str`): the word.
        start, end (`int`): its characters in the caption.
        log_probability (`float`): of its tokens together, in nats.
        audio_effect (`float`): how many nats of that it owes to the audio: it loses so many with the audio hidden.
        captions_effect (`float`): the same of the retrieved captions. Both may be negative.
        audio_map (`np.ndarray` of shape `(bands, bins)`): where in the recording; the sum is 1, or 0 where nothing
            in the audio speaks for the word. Bands from low to high, bins along `CaptionExplanation.time_edges_s`.
        outside (`float`): share of the weights that lay on the padding behind a short recording, not in the map.
        cell_weights (`np.ndarray` of shape `(windows, bands, cells)`): as measured, before they were brought together
            in `audio_map`; the unit is the method's.
        caption_weights (`np.ndarray` of shape `(k,)`): how much each retrieved caption weighed; the sum is 1, or 0.
    """

    text: str
    start: int
    end: int
    log_probability: float
    audio_effect: float
    captions_effect: float
    audio_map: np.ndarray
    outside: float
    cell_weights: np.ndarray
    caption_weights: np.ndarray


@dataclass(frozen=True)
class CaptionExplanation:
    """What `explain` returns.

    Args:
        caption (`str`): the caption that is explained.
        method (`str`): how the weights were measured; see [`RecapExplanationMixin.explain`].
        words (`list[WordExplanation]`): in order.
        retrieved (`list[dict]`): the captions of the prompt as the datastore returned them, each with a `weight`: the
            mean of its weights over the words that any caption speaks for; their sum is 1, or 0.
        time_edges_s (`np.ndarray` of shape `(bins + 1,)`): edges of the maps' bins in seconds of the recording.
        band_edges_hz (`np.ndarray` of shape `(bands + 1,)`): edges of the maps' bands.
        duration_s (`float`): length of the recording.
    """

    caption: str
    method: str
    words: list[WordExplanation]
    retrieved: list[dict[str, Any]]
    time_edges_s: np.ndarray
    band_edges_hz: np.ndarray
    duration_s: float

    def map_of(self, start: int, end: int) -> np.ndarray:
        """The mean `(bands, bins)` map of the words within some characters of the caption (a noun phrase, say).

        Raises:
            `ValueError`: if there is no word.
        """
        maps = [word.audio_map for word in self.words if word.start < end and word.end > start]
        if not maps:
            raise ValueError(f"No word in the characters {start} to {end} of {self.caption!r}.")
        return np.mean(maps, axis=0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists, numbers and texts, ready for JSON; `cell_weights` left out."""
        return {
            "caption": self.caption,
            "method": self.method,
            "duration": self.duration_s,
            "time_edges": _rounded(self.time_edges_s, 4),
            "band_edges_hz": _rounded(self.band_edges_hz, 1),
            "words": [
                {
                    "word": word.text,
                    "start": word.start,
                    "end": word.end,
                    "log_probability": round(word.log_probability, 4),
                    "audio_effect": round(word.audio_effect, 4),
                    "captions_effect": round(word.captions_effect, 4),
                    "audio_map": [_rounded(band, 5) for band in word.audio_map],
                    "outside": round(word.outside, 5),
                    "caption_weights": _rounded(word.caption_weights, 5),
                }
                for word in self.words
            ],
            "retrieved": self.retrieved,
        }


class RecapExplanationMixin:
    """`explain` of [`RecapForConditionalGeneration`]."""

    def explain(
        self,
        audio: Any,
        processor: Any,
        sampling_rate: int = 48_000,
        caption: str | None = None,
        retrieved: Sequence[dict[str, Any] | str] | None = None,
        k: int | None = None,
        method: str = "gradient",
        encoder_outputs: RecapEncoderOutput | None = None,
        **generate_kwargs: Any,
    ) -> CaptionExplanation:
        """Explains the caption of one recording: where in it each word looked, and which retrieved captions it used.

        Works with whatever attention implementation the model has: the decoder is eager for a moment where maps are
        read. A recording of several windows is explained as it is captioned, all windows at once.

        Args:
            audio: one recording, `(samples,)` or `(channels, samples)`; floats in [-1, 1], or integers.
            processor ([`RecapProcessor`]): its datastore is searched.
            sampling_rate (`int`, *optional*, defaults to 48,000): of `audio`, in Hz.
            caption (`str`, *optional*): explain this caption instead of the one that the model generates.
            retrieved (*optional*): captions for the prompt instead of the retrieved ones: texts, or results of
                `processor.retrieve`.
            k (`int`, *optional*): captions in the prompt, default the processor's.
            method (`str`, *optional*, defaults to `"gradient"`):
                - `"gradient"`: attention weights times their effect on the word's log-probability, over all layers
                  and heads, what speaks for the word alone. One backward pass a word.
                - `"insertion"`: how much more probable the word is when the cross-attention hears one place alone
                  (0.94 s of one band) than with the average place, in nats. One row of a forward pass a place: slower.
                - `"occlusion"`: how much less probable the word is when that place is hidden.
                - `"attention"`: the bare attention weights, the mean over layers and heads. Which states a layer
                  mixes says little about what the word rests on: see the measurements in docs/explanations.md.
            encoder_outputs ([`RecapEncoderOutput`], *optional*): what `encode_audio` made of this recording alone,
                where it is at hand; spares a second pass of the encoder.
            generate_kwargs: for `generate` (`num_beams`, `max_new_tokens`, ...).

        Returns:
            [`CaptionExplanation`]

        Raises:
            `ValueError`: on an unknown method, an empty `caption`, audio that is empty, or a model without
                cross-attention (`conditioning="prefix"`).

        Example:
            >>> explanation = model.explain(waveform, processor, sampling_rate=44_100)
            >>> for word in explanation.words:
            ...     second = explanation.time_edges_s[word.audio_map.sum(axis=0).argmax()]
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
        if not self.config.decoder.add_cross_attention:
            raise ValueError("Explanations read the cross-attention, and this model hears by a prefix instead.")
        was_training = self.training
        self.eval()
        try:
            # Also inside somebody's inference mode, whose tensors know no gradients.
            with torch.inference_mode(False):
                prompted = self._prompted(audio, processor, sampling_rate, retrieved, k, encoder_outputs)
                return self._explain(*prompted, processor, caption, method, generate_kwargs)
        finally:
            self.train(was_training)

    def _prompted(
        self,
        audio: Any,
        processor: Any,
        sampling_rate: int,
        retrieved: Sequence[dict[str, Any] | str] | None,
        k: int | None,
        encoding: RecapEncoderOutput | None,
    ) -> tuple[AudioGrid, RecapEncoderOutput, Any]:
        processor.check_model(self)
        extractor = processor.feature_extractor
        waveform = resample(to_mono(audio), sampling_rate, extractor.sampling_rate)
        if encoding is None:
            with torch.no_grad():
                inputs = processor(audio=[waveform], sampling_rate=extractor.sampling_rate, return_tensors="pt")
                encoding = self.encode_audio(**inputs)
        chosen = None if retrieved is None else [list(retrieved)]
        prompts = processor.build_prompts(encoding.audio_embeds, k=k, retrieved=chosen)
        return AudioGrid.of(self.config, extractor, len(waveform)), encoding, prompts

    def _explain(
        self,
        grid: AudioGrid,
        encoding: RecapEncoderOutput,
        prompts: Any,
        processor: Any,
        caption: str | None,
        method: str,
        generate_kwargs: dict[str, Any],
    ) -> CaptionExplanation:
        hits = [{"caption": hit} if isinstance(hit, str) else dict(hit) for hit in prompts.pop("retrieved")[0]]
        prompt = prompts["decoder_input_ids"]
        if caption is not None and not caption.strip():
            raise ValueError("`caption` is empty: there is no word to explain.")
        if caption is None:
            from .captioning_recap import Captioner
            from .options_recap import CaptionOptions

            names = [name for name in CaptionOptions.names() if name in generate_kwargs]
            options = CaptionOptions(**{name: generate_kwargs.pop(name) for name in names})
            captioner = Captioner(self, processor, options=options, generate_kwargs=generate_kwargs)
            target = captioner.generate(encoding, [hits])[0].token_ids
        else:
            target = processor.encode_caption(caption)
        answer = torch.tensor([self._up_to_end(target)], device=prompt.device, dtype=prompt.dtype)
        passage = Passage(
            # A copy: one made in inference mode could not be in a graph.
            states=encoding.last_hidden_state.clone(),
            ids=torch.cat([prompt, answer], dim=1),
            start=prompt.shape[1],
            captions=processor.caption_tokens([hit["caption"] for hit in hits]),
            grid=grid.shape,
        )
        return self._assemble(passage, grid, processor, hits, method)

    def _up_to_end(self, target: list[int]) -> list[int]:
        end = self.config.eos_token_id
        return target[: target.index(end) + 1] if end in target else target

    def _assemble(
        self, passage: Passage, grid: AudioGrid, processor: Any, hits: list[dict[str, Any]], method: str
    ) -> CaptionExplanation:
        caption, words = _words_of(passage.targets.tolist(), processor.tokenizer)
        result = attribute(self, passage, [tokens for _, _, tokens in words], method)
        deaf, blind = hidden_log_probs(self, passage)
        explained = [
            _explain_word(index, caption, word, result, grid, deaf, blind) for index, word in enumerate(words)
        ]
        weights = np.sum([word.caption_weights for word in explained], axis=0) if explained else np.zeros(len(hits))
        weights = weights / weights.sum() if weights.sum() > 0 else weights
        return CaptionExplanation(
            caption=caption,
            method=method,
            words=explained,
            retrieved=[{**hit, "weight": round(float(weight), 5)} for hit, weight in zip(hits, weights, strict=True)],
            time_edges_s=grid.time_edges(),
            band_edges_hz=np.array(grid.band_edges_hz),
            duration_s=grid.duration_s,
        )


def _explain_word(
    index: int,
    caption: str,
    word: tuple[int, int, list[int]],
    result: Attribution,
    grid: AudioGrid,
    deaf: torch.Tensor,
    blind: torch.Tensor,
) -> WordExplanation:
    start, end, tokens = word
    cells = result.audio[index].cpu().numpy().astype(np.float64)
    audio_map, outside = grid.to_clip(cells)
    captions = result.captions[index].cpu().numpy().astype(np.float64)
    log_probability = result.log_probs[tokens].sum().item()
    return WordExplanation(
        text=caption[start:end],
        start=start,
        end=end,
        log_probability=log_probability,
        audio_effect=log_probability - deaf[tokens].sum().item(),
        captions_effect=log_probability - blind[tokens].sum().item(),
        audio_map=audio_map,
        outside=outside,
        cell_weights=cells,
        caption_weights=captions / captions.sum() if captions.sum() > 0 else captions,
    )


def _words_of(tokens: list[int], tokenizer: Any) -> tuple[str, list[tuple[int, int, list[int]]]]:
    """The text of a caption's tokens, and its words: first character, end, and the tokens that write it."""
    # By growing prefixes: a token of a byte-level vocabulary need not be a whole character.
    prefixes = [
        tokenizer.decode(tokens[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for count in range(len(tokens) + 1)
    ]
    text = prefixes[-1]
    ends = [min(len(prefix), len(text)) for prefix in prefixes]
    offset = len(text) - len(text.lstrip())
    words = []
    for match in _WORD.finditer(text):
        own = [index for index in range(len(tokens)) if ends[index] < match.end() and ends[index + 1] > match.start()]
        words.append((match.start() - offset, match.end() - offset, own))
    return text.strip(), [word for word in words if word[2]]


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]


__all__ = ["CaptionExplanation", "RecapExplanationMixin", "WordExplanation"]
