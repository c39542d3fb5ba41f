"""What is captioned in a measurement: a model, a processor with captions to retrieve, and clips."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ClapConfig, ClapFeatureExtractor, GenerationMixin, GPT2Config

from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.configuration_recap import RecapConfig
from recap_hf.modeling.generation_recap import RecapEncoderOutput
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.processing_recap import RecapProcessor
from recap_hf.modeling.readings_recap import NO_READINGS, reading_options
from recap_hf.modeling.retrieval_recap import CaptionDatastore, read_captions

CLIP_SECONDS = 10.0
# About as long as Clotho's: with four of them and GPT-2's tokens a prompt has some 90.
_CAPTIONS_PER_LINE = 3
# By the number of readings: as published, and listening, and reading.
_SHARES = {
    1: NO_READINGS,
    2: {"promptless_weight": 0.5, "soundless_weight": 0.0},
    3: {"promptless_weight": 0.4, "soundless_weight": 0.3},
}


@dataclass(frozen=True)
class BenchmarkOptions:
    """What `recap bench` measures; see its flags."""

    model: str | None = None
    audio: tuple[str, ...] = ()
    captions: str | None = None
    datastore_size: int = 0
    batch_sizes: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8")
    clips: int = 8
    num_beams: int = 3
    readings: int = 1
    new_tokens: int = 20
    max_minutes: float = 10.0
    device: str = "cpu"
    seed: int = 0


@dataclass
class Workload:
    """A captioner and clips: waveforms at the model's rate, and the files that they come from, if any."""

    model: RecapForConditionalGeneration
    processor: RecapProcessor
    waveforms: list[np.ndarray]
    options: BenchmarkOptions
    files: list[str] = field(default_factory=list)

    @property
    def rate(self) -> int:
        """Sampling rate of the waveforms in Hz."""
        return self.processor.feature_extractor.sampling_rate

    @property
    def generation(self) -> dict[str, Any]:
        """What either side is asked for: so many beams, and exactly so many tokens if any were named.

        As published, whatever a checkpoint's own decoding, unless more readings are asked for: transformers alone
        knows no others.
        """
        tokens = self.options.new_tokens
        exactly = {"min_new_tokens": tokens, "max_new_tokens": tokens} if tokens else {}
        shares = reading_options(self.processor, _SHARES[self.options.readings], self.model.generation_config)
        return {"num_beams": self.options.num_beams, **exactly, **shares}

    def with_model(self, model: RecapForConditionalGeneration) -> Workload:
        """The same with another model."""
        return Workload(model, self.processor, self.waveforms, self.options, self.files)

    def reference(self) -> ReferencePath:
        """transformers alone on this workload, with a model of its own."""
        return ReferencePath(copy.deepcopy(self.model), self.processor, self.generation)

    @torch.no_grad()
    def caption(self, waveforms: list[np.ndarray]) -> list[str]:
        """Our path on one batch, from waveforms to texts."""
        device = self.model.device
        inputs = self.processor(audio=waveforms, sampling_rate=self.rate, return_tensors="pt", device=device)
        encoding = self.model.encode_audio(**inputs)
        prompts = self.processor.build_prompts(encoding.audio_embeds)
        prompts.pop("retrieved")
        ids = self.model.generate(encoder_outputs=encoding, **prompts, **self.generation)
        return self.processor.batch_decode(ids)


class ReferencePath:
    """The straightforward way, a clip at a time: the stock extractor and transformers' own `generate` and caches."""

    def __init__(self, model: Any, processor: Any, generation: dict[str, Any]) -> None:
        ours = processor.feature_extractor
        names = ("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size", "truncation")
        settings = {name: getattr(ours, name) for name in (*names, "frequency_min", "frequency_max", "padding")}
        self.extractor = ClapFeatureExtractor(**settings)
        self.model, self.processor = model, processor
        self.generation = {name: value for name, value in generation.items() if name not in NO_READINGS}

    @torch.no_grad()
    def caption(self, waveform: np.ndarray) -> str:
        """From a waveform to a text."""
        features = self.extractor(waveform, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        encoding = self.model.encode_audio(features["input_features"][:, :1])
        prompts = self.processor.build_prompts(encoding.audio_embeds)
        prompts.pop("retrieved")
        ids = GenerationMixin.generate(
            self.model, encoder_outputs=RecapEncoderOutput(**encoding), **prompts, **self.generation
        )
        return self.processor.batch_decode(ids)[0]


def make_workload(options: BenchmarkOptions) -> Workload:
    """The checkpoint that `options` name, or the paper's sizes with random weights; recordings, or noise."""
    if options.model:
        model = RecapForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
        processor = RecapProcessor.from_pretrained(options.model)
        if options.captions:
            processor.datastore = CaptionDatastore.from_captions(read_captions(options.captions), model, processor)
    else:
        model, processor = _full_size(options)
    if options.datastore_size:
        processor.datastore = grown(processor.datastore, options.datastore_size, options.seed)
    model.to(options.device)
    workload = Workload(model, processor, [], options, list(options.audio))
    workload.waveforms = _waveforms(workload)
    return workload


def _full_size(options: BenchmarkOptions) -> tuple[RecapForConditionalGeneration, RecapProcessor]:
    records = read_captions(options.captions) if options.captions else _grammar_captions(options.seed)
    texts = [record if isinstance(record, str) else record["caption"] for record in records]
    config = RecapConfig(clap=ClapConfig(), decoder=GPT2Config())
    decoder_tokenizer, clap_tokenizer = _tokenizer(texts, "<|endoftext|>"), _tokenizer(texts, "<s>")
    config.eos_token_id = config.bos_token_id = config.pad_token_id = decoder_tokenizer.eos_token_id
    torch.manual_seed(options.seed)
    model = RecapForConditionalGeneration(config).eval()
    processor = RecapProcessor.from_config(config, decoder_tokenizer, clap_tokenizer)
    # Random encoders embed at random; so many directions are as good as those of the text tower, and quicker.
    generator = np.random.default_rng(options.seed)
    embeddings = generator.standard_normal((len(texts), config.clap.projection_dim), dtype=np.float32)
    processor.datastore = CaptionDatastore.from_embeddings(texts, embeddings)
    return model, processor


def _grammar_captions(seed: int) -> list[str]:
    """Captions of the embedded default's datastore, joined until they are as long as Clotho's."""
    from recap_hf.assets import default_model_path

    short = CaptionDatastore.from_pretrained(default_model_path() / "datastore").captions
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(short), size=(600, _CAPTIONS_PER_LINE))
    return list(dict.fromkeys(" while ".join(short[row] for row in rows) for rows in chosen))


def _tokenizer(texts: list[str], end: str) -> Any:
    """A byte-level BPE of these texts: the real vocabularies are downloads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=[end, "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token="<pad>")


def grown(store: CaptionDatastore, size: int, seed: int) -> CaptionDatastore:
    """`size` rows: the captions of `store` repeated under numbers, with random embeddings behind the first ones."""
    captions = store.captions
    texts = [captions[row] if row < len(captions) else f"{captions[row % len(captions)]} {row}" for row in range(size)]
    embeddings = np.random.default_rng(seed).standard_normal((size, store.dimension), dtype=np.float32)
    kept = min(size, len(captions))
    embeddings[:kept] = np.asarray(store.embeddings[:kept], dtype=np.float32)
    return CaptionDatastore.from_embeddings(texts, embeddings, store.fingerprint)


def _waveforms(workload: Workload) -> list[np.ndarray]:
    options, rate = workload.options, workload.rate
    if not workload.files:
        generator = np.random.default_rng(options.seed)
        length = int(CLIP_SECONDS * rate)
        return [_sweep(length, rate, generator) for _ in range(options.clips)]
    waveforms = []
    for path in workload.files:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; recordings to measure with are files.")
        waveform, source_rate = load_audio(path)
        # The reference path crops what is longer at random: both sides get the first window.
        waveforms.append(resample(to_mono(waveform), source_rate, rate)[: int(CLIP_SECONDS * rate)])
    return waveforms


def _sweep(length: int, rate: int, generator: np.random.Generator) -> np.ndarray:
    """A gliding tone in noise: clips that differ, loud enough to be heard."""
    time = np.arange(length) / rate
    low, slope, level = generator.uniform(100, 2_000), generator.uniform(-50, 400), generator.uniform(0.01, 0.3)
    tone = np.sin(2 * np.pi * (low + slope * time / 2) * time)
    return (0.3 * tone + level * generator.standard_normal(length)).astype(np.float32)
