"""Recordings in, captions out: the one place where a recording becomes a caption.

`read -> encode -> retrieve -> generate`, in [`Captioner`]. The pipeline, every command, timelines, evaluation and the
page hold one.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from .audio_recap import SILENCE_CAPTION, is_silent, load_audio, resample, to_mono
from .configuration_recap import UNTRAINED, loading
from .generation_recap import RecapEncoderOutput, complete_config, until_end
from .index_recap import from_package
from .modeling_recap import RecapForConditionalGeneration
from .options_recap import NO_RERANKING, RERANKING, UNRECOGNISED_CAPTION, CaptionOptions
from .processing_recap import RecapProcessor
from .retrieval_recap import open_datastore

try:
    from recap_hf.assets import default_model_path

    # Generation that computes a prompt once for all its beams: the same captions, several times as fast.
    from recap_hf.fast_generation.search import fast_generate
except ImportError:
    default_model_path = fast_generate = None

# Captions of known sounds have a higher score, nearly all of words that the decoder never read a lower one.
_UNWRITABLE = 0.02
# What a broken recording can raise; anything else is a fault of the program and must be seen.
READ_ERRORS = (OSError, ValueError, ImportError, RuntimeError, TypeError, MemoryError)


@dataclass
class CaptionResult:
    """The caption of one recording.

    Args:
        caption (`str`): the caption.
        score (`float`): exponential of the mean log-probability of its tokens, 0 to 1.
        retrieved (`list[dict]`): `{"caption", "score", ...}` of each caption in the prompt, most similar first.
        fits (`bool`, *optional*): whether the datastore has a caption that reaches the `retrieval_score_threshold`,
            where there is one. Without such a caption the recording is "an unrecognised sound", with score 0.
        similarity (`float`, *optional*): cosine of caption and recording in CLAP's space, where it was reranked.
        candidates (`list[dict]`, *optional*): `{"caption", "score"}` of the different captions to choose from, best
            first, where the caller asked for candidates, reranking (with `"similarity"`) or several sequences.
        token_ids (`list[int]`): of the caption, as the decoder generated it.
        copied (`bool`, *optional*): true if the caption is a retrieved one: see `copy_margin`.
        untrained (`bool`, *optional*): true with `conditioning="none"`: CLAP chose a retrieved or generated caption.
    """

    caption: str
    score: float
    retrieved: list[dict[str, Any]]
    fits: bool | None = None
    similarity: float | None = None
    candidates: list[dict[str, Any]] | None = None
    token_ids: list[int] = field(default_factory=list, repr=False)
    copied: bool | None = None
    untrained: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, without the token ids, as plain data."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "token_ids"}


class Captioner:
    """Captions recordings. Model, processor and arguments are not changed.

    Args:
        model ([`RecapForConditionalGeneration`]): on any device, in any mode: it captions in evaluation mode.
        processor ([`RecapProcessor`]): features, prompts and, by default, the datastore.
        datastore (*optional*): captions to retrieve from instead of the processor's: what [`open_datastore`] takes.
        options ([`CaptionOptions`], *optional*): what they do not set is the checkpoint's choice.
        generate_kwargs (`dict`, *optional*): further arguments of `generate`. With `num_return_sequences` above 1 all
            sequences are returned as candidates.

    Raises:
        `ValueError`: if model, processor and datastore do not belong together.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        datastore: Any = None,
        options: CaptionOptions | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.options = options or CaptionOptions()
        self.generate_kwargs = dict(generate_kwargs or {})
        # The processor's datastore is not searched where there is another one.
        processor.check_model(model, check_datastore=datastore is None)
        self._datastore = None
        if datastore is not None:
            self._datastore = open_datastore(datastore, model, processor)
            self._datastore.check_encoder(model.embed_fingerprint(processor))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        datastore: Any = None,
        options: CaptionOptions | None = None,
        **kwargs: Any,
    ) -> Captioner:
        """Loads a captioner by name.

        Args:
            name_or_path (`str` or path, *optional*): folder or Hub id; default: the one that the package ships.
            device (*optional*): of torch; default: a GPU where there is one, else the CPU.
            dtype (*optional*): of the weights, a `torch.dtype` or its name; default: the checkpoint's.
            datastore, options: see [`Captioner`].
            kwargs: of `from_pretrained` of model and processor, such as `revision` and `token`.

        Raises:
            `OSError`: if there is no such checkpoint. `ValueError`: for a GPU on a machine without one.
        """
        loaded = load_pretrained(name_or_path, device, dtype, **kwargs)
        with loading(name_or_path or "the default", "model, processor and datastore"):
            return cls(*loaded, datastore, options)

    def with_options(self, options: CaptionOptions) -> Captioner:
        """The same captioner, with those options changed that `options` sets; a `ValueError` if it cannot be so."""
        other = copy.copy(self)
        other.options = self.options.merged_with(options)
        _Reranking.of(other.options, other.generation_config())
        if other.options.projection_temperature:
            from_package("datastore.projection", "`projection_temperature`").check_states(self.model.config)
        return other

    def with_datastore(self, datastore: Any) -> Captioner:
        """The same captioner with another datastore."""
        return Captioner(self.model, self.processor, datastore, self.options, self.generate_kwargs)

    @property
    def datastore(self) -> Any:
        """The datastore that captions are retrieved from, or `None`."""
        return self.processor.datastore if self._datastore is None else self._datastore

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of waveforms in Hz."""
        return self.processor.feature_extractor.sampling_rate

    def read(self, source: Any) -> np.ndarray:
        """A recording as a mono float32 waveform at `sampling_rate`.

        Args:
            source: what [`load_audio`] takes, or a row of `datasets` with such an `"audio"`. An array, tensor or list
                of numbers is a waveform at `sampling_rate`, `(samples,)` or `(channels, samples)`.

        Raises:
            `ValueError`: for a recording that is empty or holds NaN or infinite samples; and what `load_audio` raises.
        """
        if isinstance(source, (np.ndarray, torch.Tensor, list)):
            return to_mono(source, "The recording")
        if hasattr(source, "keys") and "audio" in source:
            source = source["audio"]
        waveform, rate = load_audio(source)
        return resample(to_mono(waveform, "The recording"), rate, self.sampling_rate)

    def encode(self, waveforms: Sequence[np.ndarray], **excluded: Any) -> RecapEncoderOutput:
        """States and query embeddings of waveforms; `excluded`: of `recap_hf.datastore.projection.project`."""
        with evaluation_mode(self.model), torch.no_grad():
            options = {"sampling_rate": self.sampling_rate, "return_tensors": "pt", "device": self.model.device}
            encoding = self.model.encode_audio(**self.processor(audio=list(waveforms), **options))
        temperature = self.processor.retrieval_options.merged_with(self.options).projection_temperature
        if not temperature or self.datastore is None:
            return encoding
        package = from_package("datastore.projection", "`projection_temperature`")
        return package.project_encoding(encoding, self.model.config, self.datastore, temperature, **excluded)

    def retrieve(self, encoding: RecapEncoderOutput) -> list[list[dict[str, Any]]]:
        """The captions nearest to each recording, `{"caption", "score", ...}`, most similar first."""
        return self.processor.retrieve(encoding.audio_embeds, datastore=self._datastore, options=self.options)

    def generate(
        self,
        encoding: RecapEncoderOutput,
        retrieved: Sequence[Sequence[dict[str, Any] | str]],
        batch_size: int | None = None,
    ) -> list[CaptionResult]:
        """Captions of encoded recordings.

        Args:
            encoding ([`RecapEncoderOutput`]): from `encode`.
            retrieved (`Sequence[Sequence]`): the captions of each prompt, from `retrieve`; texts are taken, too.
            batch_size (`int`, *optional*): recordings that are decoded together, those with prompts of like lengths;
                default: all.
        """
        chosen = self.processor.retrieval_options.merged_with(self.options)
        must_fit = chosen.k and chosen.retrieval_score_threshold is not None
        fits = True if must_fit and self.datastore is not None else None
        results = [CaptionResult(UNRECOGNISED_CAPTION, 0.0, [], fits=False) for _ in retrieved]
        known = [row for row, hits in enumerate(retrieved) if len(hits) or not fits]
        if not known:
            return results
        if len(known) < len(results):
            encoding = encoding.rows(torch.tensor(known, device=encoding.last_hidden_state.device))
        prompts = self.processor.build_prompts(retrieved=[retrieved[row] for row in known])
        used = prompts.pop("retrieved")
        with evaluation_mode(self.model):
            for rows, part, part_prompts in _decoding_batches(encoding, prompts, batch_size):
                decoded = self.decode(part, part_prompts, [used[row] for row in rows])
                for row, result in zip(rows, decoded, strict=True):
                    result.fits = fits
                    results[known[row]] = result
        return results

    def caption(self, waveforms: Sequence[np.ndarray], batch_size: int | None = None) -> list[CaptionResult]:
        """Captions of waveforms at `sampling_rate`.

        A recording with nothing above two steps of 16-bit audio is captioned "silence" without the model.
        `batch_size`: see `generate`.
        """
        results = [CaptionResult(SILENCE_CAPTION, 1.0, []) for _ in waveforms]
        rows = [row for row, waveform in enumerate(waveforms) if not is_silent(waveform)]
        if rows:
            encoding = self.encode([waveforms[row] for row in rows])
            for row, result in zip(rows, self.generate(encoding, self.retrieve(encoding), batch_size), strict=True):
                results[row] = result
        return results

    def caption_stream(
        self, sources: Iterable[Any], batch_size: int = 8
    ) -> Iterator[tuple[Any, CaptionResult | Exception]]:
        """Captions of recordings of any number, in order; one that cannot be read stops no other.

        Args:
            sources (`Iterable`): what `read` takes. They are read ahead by threads.
            batch_size (`int`, *optional*, defaults to 8): recordings that are decoded together.

        Yields:
            `tuple`: each source, and its [`CaptionResult`] or the exception that reading it raised.
        """
        return from_package("streaming", "captioning a stream").caption_stream(self, sources, batch_size)

    def decode(
        self, encoding: RecapEncoderOutput, prompts: Any, retrieved: Sequence[Sequence[dict[str, Any] | str]]
    ) -> list[CaptionResult]:
        """Captions that continue given prompts, scored and reranked; `generate` builds the prompts, too.

        Args:
            encoding ([`RecapEncoderOutput`]): from `encode`.
            prompts (`Mapping`): `decoder_input_ids` and `decoder_attention_mask` of shape `(batch_size, length)`.
            retrieved (`Sequence[Sequence]`): the captions in them, which are part of the results.
        """
        config = self.generation_config()
        rerank = _Reranking.of(self.options, config)
        kwargs = {**self.generate_kwargs, **self.options.generate_kwargs()}
        if rerank is not None:
            kwargs |= rerank.candidate_options(config)
        ends = self.model.config.eos_token_id if config.eos_token_id is None else config.eos_token_id
        sequences, scores = self._search(encoding, prompts, kwargs, ends)
        untrained = self.model.config.conditioning == UNTRAINED or None
        count = len(sequences) // len(retrieved)
        captions = self.processor.batch_decode(sequences)
        targets = sequences[:, prompts["decoder_input_ids"].shape[1] :]
        counted = until_end(targets, ends)
        similarities = values = None
        if rerank is not None:
            similarities = self.similarities(captions, encoding.audio_embeds.repeat_interleave(count, dim=0))
            values = rerank.values(scores, similarities, counted.sum(dim=1).cpu().numpy(), config)
        asked = self.options.rerank or self.options.candidates or self.generate_kwargs.get("num_return_sequences")
        results = []
        for row, hits in enumerate(retrieved):
            own = range(row * count, (row + 1) * count)
            # Of equally good captions the first, more probable one is chosen.
            order = list(own) if values is None else sorted(own, key=lambda one: (-values[one], one))
            best = order[0]
            hits = [{"caption": hit} if isinstance(hit, str) else hit for hit in hits]
            found = {"token_ids": targets[best][counted[best]].tolist(), "untrained": untrained}
            found["similarity"] = None if similarities is None else float(similarities[best])
            found["candidates"] = _candidates(order, captions, scores, similarities) if count > 1 and asked else None
            results.append(CaptionResult(captions[best], scores[best], hits, **found))
        if rerank is not None and rerank.copy_margin is not None:
            self._copy_nearer(encoding, prompts, results, rerank.copy_margin)
        return results

    def _copy_nearer(self, encoding: Any, prompts: Any, results: list[CaptionResult], margin: float) -> None:
        """A retrieved caption whose cosine is higher than the result's by `margin` takes its place, if the decoder
        cannot write it: it has no words that it never read. What it could have written, it decided against."""
        hits = [(row, hit) for row, result in enumerate(results) for hit in result.retrieved]
        least = [result.similarity + margin for result in results]
        # What is not even near the window that it was found by is not embedded. Texts of the caller have no score.
        near = [(row, hit["caption"]) for row, hit in hits if hit.get("score", 1.0) > least[row]]
        cosines = self.similarities([text for _, text in near], encoding.audio_embeds[[row for row, _ in near]])
        found = sorted((cosine, row, text) for cosine, (row, text) in zip(cosines.tolist(), near, strict=True))
        nearest = {row: (cosine, text) for cosine, row, text in found if cosine > least[row]}  # The nearest is last.
        if not nearest:
            return
        rows = prompts["decoder_input_ids"].new_tensor(list(nearest))
        ids = [rows.new_tensor(self.processor.encode_caption(text)) for _, text in nearest.values()]
        own = {name: value[rows] for name, value in prompts.items()}
        # Each has its end token: what makes the shorter ones as long as the longest does not count.
        targets = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(ids[0][-1]))
        sequences = torch.cat([own["decoder_input_ids"], targets], dim=1)
        scores = self.model.score_captions(encoding.rows(rows), sequences, own)
        for (row, (cosine, text)), tokens, score in zip(nearest.items(), ids, scores, strict=True):
            result = results[row]
            if score < _UNWRITABLE or result.untrained:
                result.caption, result.score, result.similarity = text, score, cosine
                result.token_ids, result.copied = tokens.tolist(), True
                if result.candidates:
                    result.candidates[:0] = _candidates([0], [text], [score], [cosine])

    def generation_config(self) -> GenerationConfig:
        """The decoding of this captioner: the checkpoint's, with its `generate_kwargs` and options. A copy."""
        config = complete_config(self.generate_kwargs.get("generation_config"), self.model.generation_config)
        for name, value in {**self.generate_kwargs, **self.options.generate_kwargs()}.items():
            # Not `update`, which checks the settings and warns: `generate` will do that, once.
            if hasattr(config, name):
                setattr(config, name, value)
        return config

    def _search(
        self, encoding: RecapEncoderOutput, prompts: Any, kwargs: dict[str, Any], ends: int | list[int]
    ) -> tuple[torch.LongTensor, list[float]]:
        """Sequences, those of a recording together and the best first, and their scores."""
        arguments = {"encoder_outputs": encoding, **prompts, **kwargs}
        if fast_generate is not None:
            found = fast_generate(self.model, **arguments)
            if found is not None:
                return found
        sequences = self.model.generate(**arguments)
        sequences = getattr(sequences, "sequences", sequences)
        return sequences, self.model.score_captions(encoding, sequences, prompts, ends)

    def similarities(self, captions: Sequence[str], audio_embeds: torch.Tensor) -> np.ndarray:
        """Cosines of captions and their recordings in CLAP's space, the mean over a recording's windows.

        Args:
            captions (`Sequence[str]`): one for each recording. An empty one stands for silence.
            audio_embeds (`torch.Tensor` of shape `(len(captions), windows, dimension)`): from `encode`.

        Returns:
            `np.ndarray` of shape `(len(captions),)`, float32.
        """
        if not len(captions):
            return np.empty(0, dtype=np.float32)
        captions = [caption or SILENCE_CAPTION for caption in captions]
        # Beams of a clip often differ in nothing but their end: each text is embedded once.
        unique = sorted(set(captions))
        rows = dict(zip(unique, self.model.embed_captions(unique, self.processor), strict=True))
        audio = audio_embeds.float().cpu().numpy()
        present = np.abs(audio).sum(axis=-1) > 0
        cosines = np.einsum("bwd,bd->bw", audio, np.stack([rows[caption] for caption in captions]))
        return (cosines * present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)


@dataclass(frozen=True)
class _Reranking:
    """The number of captions that are reranked, the weight of the cosine (`None`: the cosine alone decides), and how
    much nearer a retrieved caption must be (`None`: none is copied)."""

    candidates: int | None
    weight: float | None
    copy_margin: float | None = None

    @classmethod
    def of(cls, options: CaptionOptions, config: GenerationConfig) -> _Reranking | None:
        """What the options say, else the `GenerationConfig`; `None`: nothing is reranked (default of samples)."""
        rerank, *settings = (
            getattr(config, name, None) if getattr(options, name) is None else getattr(options, name)
            for name in CaptionOptions.names(RERANKING)
        )
        if options.rerank is None and config.do_sample:
            rerank = None
        if rerank in (None, NO_RERANKING):
            options.check_no_reranking()
            return None
        return cls(*settings)

    def candidate_options(self, config: GenerationConfig) -> dict[str, Any]:
        """Arguments of `generate` that give the candidates: beams, or samples with `do_sample`."""
        asked = config.num_return_sequences if (config.num_return_sequences or 1) > 1 else None
        count = self.candidates or asked or config.num_beams or 1
        beams = 1 if config.do_sample else max(config.num_beams or 1, count)
        return {"num_return_sequences": count, "num_beams": beams}

    def values(
        self, scores: Sequence[float], similarities: np.ndarray, lengths: np.ndarray, config: GenerationConfig
    ) -> np.ndarray:
        """What candidates are ranked by. The score of the search is the log-probability over
        `length ** length_penalty`."""
        if self.weight is None or np.isinf(self.weight):
            return similarities
        penalty = 1.0 if config.length_penalty is None else config.length_penalty
        with np.errstate(divide="ignore"):
            searched = np.log(np.asarray(scores)) * lengths ** (1.0 - penalty)
        return searched + self.weight * similarities


def load_pretrained(
    name_or_path: str | os.PathLike | None = None, device: Any = None, dtype: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """Model, in evaluation mode, and processor of a checkpoint; see [`Captioner.from_pretrained`]."""
    if name_or_path is None:
        if default_model_path is None:
            raise ValueError("Name a checkpoint, or install the package, which has a default: pip install recap-hf")
        name_or_path = default_model_path()
    device = chosen_device(device)
    dtypes = {} if dtype is None else {"dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    # Without a choice transformers asks on standard input, where sound may come in, whether to run a folder's code.
    kwargs.setdefault("trust_remote_code", False)
    model = RecapForConditionalGeneration.from_pretrained(str(name_or_path), **dtypes, **kwargs)
    return model.eval().to(device), RecapProcessor.from_pretrained(str(name_or_path), **kwargs)


def chosen_device(device: Any = None) -> torch.device:
    """A device of torch; of `None` a GPU where there is one. A `ValueError` for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"The device must be one of torch, such as 'cpu' or 'cuda:0', got {device!r}.") from error
    backend = torch.backends.mps if found.type == "mps" else getattr(torch, found.type, None)
    if found.type != "cpu" and not (hasattr(backend, "is_available") and backend.is_available()):
        raise ValueError(f"The device {str(device)!r} is not there: torch finds none on this machine. Use 'cpu'.")
    return found


def _candidates(
    order: Sequence[int], captions: Sequence[str], scores: Sequence[float], similarities: np.ndarray | None
) -> list[dict[str, Any]]:
    """Every different caption once, in `order`."""
    seen: dict[str, dict[str, Any]] = {}
    for row in order:
        entry = {"caption": captions[row], "score": scores[row]}
        if similarities is not None:
            entry["similarity"] = round(float(similarities[row]), 6)
        seen.setdefault(captions[row], entry)
    return list(seen.values())


def _decoding_batches(
    encoding: RecapEncoderOutput, prompts: dict[str, torch.Tensor], batch_size: int | None
) -> Iterator[tuple[list[int], RecapEncoderOutput, dict[str, torch.Tensor]]]:
    """Parts of a batch to be decoded one after the other: recordings with prompts of nearly equal length.

    An encoder is fastest with as many windows as fit, a decoder with as many clips as keep it busy and prompts that
    need no padding. Yields the rows of a part, its encoding, and its prompts without padding that all of them share.
    """
    device = encoding.last_hidden_state.device
    prompts = {name: value.to(device) for name, value in prompts.items()}
    mask = prompts["decoder_attention_mask"]
    num_clips, length = mask.shape
    if batch_size is None or num_clips <= batch_size:
        yield list(range(num_clips)), encoding, prompts
        return
    lengths = mask.sum(dim=1).tolist()
    order = sorted(range(num_clips), key=lambda row: -lengths[row])
    for start in range(0, num_clips, batch_size):
        rows = order[start : start + batch_size]
        index = torch.tensor(rows, device=device)
        # The first one is the longest.
        kept = slice(length - lengths[rows[0]], None)
        yield rows, encoding.rows(index), {name: value[index, kept] for name, value in prompts.items()}


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode, and the caller's mode afterwards: a model in training mode captions with dropout."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = ["CaptionResult", "Captioner"]
