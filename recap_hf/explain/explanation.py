"""Explanations: for each word of a caption the regions of the recording and the retrieved captions it depends on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recap_hf.modeling.audio_recap import resample, to_mono
from recap_hf.modeling.captioning_recap import Captioner, evaluation_mode
from recap_hf.modeling.generation_recap import RecapEncoderOutput
from recap_hf.modeling.options_recap import PLACEHOLDER, PromptTemplate

from .attribution import METHODS, Attribution, Passage, attribute, hidden_log_probs
from .audio_grid import AudioGrid

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# Fields of a word in `CaptionExplanation.to_dict`, and their decimals.
_DIGITS = dict.fromkeys(("log_probability", "audio_effect", "captions_effect"), 4)
_DIGITS |= dict.fromkeys(("audio_map", "outside", "caption_weights"), 5)
# Regions of a word in `CaptionExplanation.to_text`.
_TOP_REGIONS = 2


@dataclass(frozen=True)
class WordExplanation:
    """One word of a caption.

    Args:
        text (`str`): the word.
        start, end (`int`): its characters in the caption.
        log_probability (`float`): sum over its tokens, in nats.
        audio_effect (`float`): log-probability minus the log-probability with the audio hidden, in nats.
        captions_effect (`float`): the same with the retrieved captions hidden. Both may be negative.
        audio_map (`np.ndarray` of shape `(bands, bins)`): weight of each region; the sum is 1, or 0 if no region has a
            positive weight. Bands from low to high, bins along `CaptionExplanation.time_edges_s`.
        outside (`float`): share of the weights on the padding behind a short recording, which is not in the map.
        cell_weights (`np.ndarray` of shape `(windows, bands, cells)`): the weights before they were merged into
            `audio_map`; the unit depends on the method.
        caption_weights (`np.ndarray` of shape `(k,)`): weight of each retrieved caption; the sum is 1, or 0.
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
    """The result of [`explain_caption`].

    Args:
        caption (`str`): the explained caption.
        method (`str`): how the weights were measured; see [`explain_caption`].
        words (`list[WordExplanation]`): in order.
        retrieved (`list[dict]`): the captions in the prompt as the datastore returned them, each with a `weight`: the
            mean of its weights over the words that depend on any caption. The sum is 1, or 0.
        time_edges_s (`np.ndarray` of shape `(bins + 1,)`): edges of the bins of the maps in seconds.
        band_edges_hz (`np.ndarray` of shape `(bands + 1,)`): edges of the bands of the maps in Hz.
        duration_s (`float`): length of the recording in seconds.
    """

    caption: str
    method: str
    words: list[WordExplanation]
    retrieved: list[dict[str, Any]]
    time_edges_s: np.ndarray
    band_edges_hz: np.ndarray
    duration_s: float

    def map_of(self, start: int, end: int) -> np.ndarray:
        """The mean `(bands, bins)` map of the words in a range of characters of the caption, such as a noun phrase.

        Raises:
            `ValueError`: if there is no word.
        """
        maps = [word.audio_map for word in self.words if word.start < end and word.end > start]
        if not maps:
            raise ValueError(f"No word in the characters {start} to {end} of {self.caption!r}.")
        return np.mean(maps, axis=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, without `cell_weights`."""
        return {
            "caption": self.caption,
            "method": self.method,
            "duration": self.duration_s,
            "time_edges": np.round(self.time_edges_s, 4).tolist(),
            "band_edges_hz": np.round(self.band_edges_hz, 1).tolist(),
            "words": [
                {"word": word.text, "start": word.start, "end": word.end}
                | {name: np.round(getattr(word, name), digits).tolist() for name, digits in _DIGITS.items()}
                for word in self.words
            ],
            "retrieved": self.retrieved,
        }

    def to_text(self) -> str:
        """A few lines: the caption, each word with its effects and strongest regions, each caption with its weight."""
        lines = [self.caption]
        width = max((len(word.text) for word in self.words), default=0)
        if self.words:
            lines.append(f"    {'':{width}}  audio  captions  strongest regions (s, band in kHz)")
        for word in self.words:
            regions = ", ".join(self._regions(word.audio_map)) or "none in the audio"
            effects = f"{word.audio_effect:+5.1f}  {word.captions_effect:+8.1f}"
            lines.append(f"    {word.text:{width}}  {effects}  {regions}")
        lines += [f"    {hit['weight']:.2f}  {' '.join(hit['caption'].split())}" for hit in self.retrieved]
        return "\n".join(lines)

    def _regions(self, audio_map: np.ndarray) -> list[str]:
        times, bands = self.time_edges_s, self.band_edges_hz / 1000
        regions = []
        for index in audio_map.ravel().argsort()[::-1][:_TOP_REGIONS]:
            band, cell = divmod(int(index), audio_map.shape[1])
            share = audio_map[band, cell]
            if share > 0:
                place = f"{times[cell]:.1f}-{times[cell + 1]:.1f} s {bands[band]:.1f}-{bands[band + 1]:.1f} kHz"
                regions.append(f"{place} {share:.0%}")
        return regions


def explain_caption(
    captioner: Captioner,
    audio: Any,
    sampling_rate: int | None = None,
    *,
    caption: str | None = None,
    retrieved: Sequence[dict[str, Any] | str] | None = None,
    method: str = "gradient",
    encoding: RecapEncoderOutput | None = None,
) -> CaptionExplanation:
    """Explains the caption of one recording: the regions of the recording and the retrieved captions that each word
    depends on.

    Works with any attention implementation; the decoder is switched to eager attention while attention maps are read.
    A recording of several windows is explained as it is captioned, all windows together.

    Args:
        captioner ([`Captioner`]): retrieves and generates with its options.
        audio: one recording, `(samples,)` or `(channels, samples)`; floats in [-1, 1], or integers.
        sampling_rate (`int`, *optional*): sampling rate of `audio` in Hz; default: `captioner.sampling_rate`.
        caption (`str`, *optional*): explain this caption instead of the one that the captioner generates.
        retrieved (*optional*): captions in the prompt instead of the retrieved ones: texts, or results of
            `captioner.retrieve`.
        method (`str`, *optional*, defaults to `"gradient"`):
            - `"gradient"`: attention weights times their gradient on the word's log-probability, over all layers and
              heads, positive values only. One backward pass per word.
            - `"insertion"`: log-probability of the word with one region (three cells of one band) alone, minus that
              with the average region, in nats. One row of a forward pass per region: slower.
        encoding ([`RecapEncoderOutput`], *optional*): the result of `captioner.encode` for this recording alone, to
            spare the encoder a second pass.

    Returns:
        [`CaptionExplanation`]

    Raises:
        `ValueError`: for an unknown method, an empty `caption`, empty audio, or a model without cross-attention
            (`conditioning="prefix"` or `"none"`).

    Example:
        >>> explanation = explain_caption(Captioner.from_pretrained(), waveform, sampling_rate=44_100)
        >>> for word in explanation.words:
        ...     second = explanation.time_edges_s[word.audio_map.sum(axis=0).argmax()]
    """
    model, processor = captioner.model, captioner.processor
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}; got {method!r}.")
    if not model.config.decoder.add_cross_attention:
        found = f"this one has conditioning={model.config.conditioning!r}"
        raise ValueError(f"Explanations need a model with cross-attention; {found}.")
    if caption is not None and not caption.strip():
        raise ValueError("`caption` is empty: there is no word to explain.")
    rate = captioner.sampling_rate
    waveform = resample(to_mono(audio), sampling_rate or rate, rate)
    grid = AudioGrid.of(model.config, processor.feature_extractor, len(waveform))
    # Also within a caller's inference mode, whose tensors have no gradients.
    with torch.inference_mode(False), evaluation_mode(model):
        encoding = captioner.encode([waveform]) if encoding is None else encoding
        hits = captioner.retrieve(encoding)[0] if retrieved is None else list(retrieved)
        prompts = processor.build_prompts(retrieved=[hits])
        hits = [{"caption": hit} if isinstance(hit, str) else dict(hit) for hit in prompts["retrieved"][0]]
        if caption is None:
            target = captioner.generate(encoding, [hits])[0].token_ids
        else:
            target = processor.encode_caption(caption)
        if model.config.eos_token_id in target:
            target = target[: target.index(model.config.eos_token_id) + 1]
        prompt = prompts["decoder_input_ids"].to(encoding.last_hidden_state.device)
        passage = Passage(
            # A copy: a tensor from a caller's inference mode cannot be part of a graph.
            states=encoding.last_hidden_state.clone(),
            ids=torch.cat([prompt, prompt.new_tensor([target])], dim=1),
            start=prompt.shape[1],
            captions=caption_tokens(processor, [hit["caption"] for hit in hits]),
            grid=grid.shape,
        )
        text, words = _words_of(target, processor.tokenizer)
        attribution = attribute(model, passage, [tokens for _, _, tokens in words], method)
        hidden = hidden_log_probs(model, passage)
    explained = [_explain_word(index, text, word, attribution, hidden, grid) for index, word in enumerate(words)]
    weights = np.sum([word.caption_weights for word in explained], axis=0) if explained else np.zeros(len(hits))
    weights = weights / weights.sum() if weights.sum() > 0 else weights
    return CaptionExplanation(
        caption=text,
        method=method,
        words=explained,
        retrieved=[{**hit, "weight": round(float(weight), 5)} for hit, weight in zip(hits, weights, strict=True)],
        time_edges_s=grid.time_edges(),
        band_edges_hz=np.array(grid.band_edges_hz),
        duration_s=grid.duration_s,
    )


def caption_tokens(processor: Any, captions: Sequence[str]) -> list[slice]:
    """Where the captions are in the token ids of their prompt; an empty slice for one that the prompt lacks."""
    places = caption_places(processor.prompt, captions)
    text = processor.prompt.build(captions)
    offsets = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    slices = []
    for start, end in places:
        own = [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
        slices.append(slice(own[0], own[-1] + 1) if own else slice(0, 0))
    return slices


def caption_places(prompt: PromptTemplate, captions: Sequence[str]) -> list[tuple[int, int]]:
    """First and last character (exclusive) of each caption in `prompt.build(captions)`; equal for an empty one."""
    place = prompt.template.index(PLACEHOLDER)
    places, separator = [], ""
    for text in map(prompt.cleaned, captions):
        start = place + len(separator) if text else place
        place = start + len(text)
        places.append((start, place))
        separator = prompt.separator if text else separator
    return places


def _explain_word(
    index: int,
    caption: str,
    word: tuple[int, int, list[int]],
    attribution: Attribution,
    hidden: tuple[torch.Tensor, torch.Tensor],
    grid: AudioGrid,
) -> WordExplanation:
    start, end, tokens = word
    cells = attribution.audio[index].cpu().numpy().astype(np.float64)
    audio_map, outside = grid.to_clip(cells)
    captions = attribution.captions[index].cpu().numpy().astype(np.float64)
    log_probability = attribution.log_probs[tokens].sum().item()
    audio_effect, captions_effect = (log_probability - without[tokens].sum().item() for without in hidden)
    return WordExplanation(
        text=caption[start:end],
        start=start,
        end=end,
        log_probability=log_probability,
        audio_effect=audio_effect,
        captions_effect=captions_effect,
        audio_map=audio_map,
        outside=outside,
        cell_weights=cells,
        caption_weights=captions / captions.sum() if captions.sum() > 0 else captions,
    )


def _words_of(tokens: list[int], tokenizer: Any) -> tuple[str, list[tuple[int, int, list[int]]]]:
    """The text of a caption's tokens, and its words: first character, end, and the indices of their tokens."""
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
        if own:
            words.append((match.start() - offset, match.end() - offset, own))
    return text.strip(), words
