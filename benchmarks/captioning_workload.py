"""What a speed measurement captions: a model, a processor with captions to retrieve, and clips."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import ClapConfig, ClapFeatureExtractor, GPT2Config

from recap_hf.assets import default_model_path
from recap_hf.data.caption_tables import read_captions
from recap_hf.fast_generation import prepare_for_cpu
from recap_hf.modeling.audio_recap import load_audio, resample, to_mono
from recap_hf.modeling.captioning_recap import Captioner
from recap_hf.modeling.configuration_recap import RecapConfig
from recap_hf.modeling.encoder_recap import RecapClapEncoder
from recap_hf.modeling.modeling_recap import RecapForConditionalGeneration
from recap_hf.modeling.options_recap import NO_RERANKING, CaptionOptions
from recap_hf.modeling.processing_recap import RecapProcessor
from recap_hf.modeling.retrieval_recap import CaptionDatastore

CLIP_SECONDS = 10.0
# As long together as one of Clotho's captions: a prompt of four has about 90 tokens.
_SHORT_CAPTIONS = 3


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured; see the flags of `python -m benchmarks.captioning`.

    Args:
        model: folder or Hub id; None: the paper's sizes with random weights.
        beside: folder or Hub id of a second captioner; see `run_beside`.
        audio: recordings; none: sweeps in noise.
        captions: file with the captions of the datastore; None: the model's own.
        datastore_size: rows of the datastore; 0: as it is.
        batch_sizes, dtypes, clips: of our side.
        num_beams: of both sides.
        new_tokens: exact number of tokens in a caption; 0: as the model ends it.
        max_minutes: for rounds to begin in.
        device, seed: of torch; of weights and waveforms.
    """

    model: str | None = None
    beside: str | None = None
    audio: tuple[str, ...] = ()
    captions: str | None = None
    datastore_size: int = 0
    batch_sizes: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("float32",)
    clips: int = 8
    num_beams: int = 3
    new_tokens: int = 20
    max_minutes: float = 10.0
    device: str = "cpu"
    seed: int = 0


@dataclass
class Workload:
    """A captioner and waveforms at its rate."""

    model: RecapForConditionalGeneration
    processor: RecapProcessor
    waveforms: list[np.ndarray]
    options: BenchmarkOptions
    retrieval: CaptionOptions = field(default_factory=CaptionOptions)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def rate(self) -> int:
        """Sampling rate of the waveforms in Hz."""
        return self.processor.feature_extractor.sampling_rate

    def generate_kwargs(self, new_tokens: int | None = None) -> dict[str, Any]:
        """Arguments of `generate` on both sides; `new_tokens` overrides that of the options."""
        tokens = self.options.new_tokens if new_tokens is None else new_tokens
        exactly = {"min_new_tokens": tokens, "max_new_tokens": tokens} if tokens else {}
        return {"num_beams": self.options.num_beams, **exactly}

    def captioner(self, new_tokens: int | None = None) -> Captioner:
        """Our side: fast generation where the package has it. Nothing is reranked."""
        options = replace(self.retrieval, rerank=NO_RERANKING)
        return Captioner(self.model, self.processor, options=options, generate_kwargs=self.generate_kwargs(new_tokens))

    def in_dtype(self, dtype: str) -> Workload:
        """The same with a copy of the model, its weights in `dtype` and laid out for the device.

        Raises:
            ValueError: for int8 on a GPU, or float16 on a CPU.
        """
        model, on_cpu = copy.deepcopy(self.model), self.device.type == "cpu"
        if dtype == ("float16" if on_cpu else "int8"):
            raise ValueError(f"{dtype} is not for {self.device.type}; float32 and bfloat16 are, int8 on a CPU.")
        model = prepare_for_cpu(model, dtype) if on_cpu else model.to(getattr(torch, dtype))
        return replace(self, model=model)

    def reference(self) -> ReferencePath:
        """Stock transformers on this workload, with a model of its own."""
        return ReferencePath(copy.deepcopy(self.model), self.processor, self.generate_kwargs())


class ReferencePath:
    """Stock transformers, one clip at a time: `ClapFeatureExtractor` and `generate` without fast generation.

    YAMNet's log-mel is not in transformers: a captioner with it has the package's on both sides.
    """

    def __init__(self, model: Any, processor: Any, generate_kwargs: dict[str, Any]) -> None:
        self.extractor = ours = processor.feature_extractor
        if isinstance(model.clap, RecapClapEncoder):
            names = ("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size", "truncation")
            names = (*names, "frequency_min", "frequency_max", "padding")
            self.extractor = ClapFeatureExtractor(**{name: getattr(ours, name) for name in names})
        self.model, self.processor, self.generate_kwargs = model, processor, generate_kwargs

    @torch.no_grad()
    def caption(self, waveform: np.ndarray) -> str:
        """The caption of a waveform at the model's rate."""
        features = self.extractor(waveform, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        inputs = features["input_features"][:, :1].to(self.model.device, self.model.dtype)
        encoding = self.model.encode_audio(inputs)
        prompts = self.processor.build_prompts(encoding.audio_embeds)
        prompts.pop("retrieved")
        prompts = {name: value.to(self.model.device) for name, value in prompts.items()}
        ids = self.model.generate(encoder_outputs=encoding, **prompts, **self.generate_kwargs)
        return self.processor.batch_decode(ids)[0]


def make_workload(options: BenchmarkOptions) -> Workload:
    """The checkpoint that `options` name, or the paper's sizes with random weights; recordings, or sweeps in noise."""
    if options.model:
        name = str(default_model_path()) if options.model == "default" else options.model
        model = RecapForConditionalGeneration.from_pretrained(name, dtype=torch.float32).eval()
        processor = RecapProcessor.from_pretrained(name)
        if options.captions:
            processor.datastore = CaptionDatastore.from_captions(read_captions(options.captions), model, processor)
    else:
        model, processor = _full_size(options)
    if options.datastore_size:
        processor.datastore = grown(processor.datastore, options.datastore_size, options.seed)
    # A sweep may be like no caption: it is captioned nevertheless.
    processor.retrieval_score_threshold = None
    model.to(options.device)
    rate = processor.feature_extractor.sampling_rate
    return Workload(model, processor, _waveforms(options, rate), options)


def _full_size(options: BenchmarkOptions) -> tuple[RecapForConditionalGeneration, RecapProcessor]:
    records = read_captions(options.captions) if options.captions else _grammar_captions(options.seed)
    texts = [record if isinstance(record, str) else record["caption"] for record in records]
    config = RecapConfig(clap=ClapConfig(), decoder=GPT2Config())
    decoder_tokenizer, clap_tokenizer = _tokenizer(texts, "<|endoftext|>"), _tokenizer(texts, "<s>")
    config.eos_token_id = config.bos_token_id = config.pad_token_id = decoder_tokenizer.eos_token_id
    torch.manual_seed(options.seed)
    model = RecapForConditionalGeneration(config).eval()
    processor = RecapProcessor.from_config(config, decoder_tokenizer, clap_tokenizer)
    # A random text tower embeds at random, too, and slower.
    generator = np.random.default_rng(options.seed)
    embeddings = generator.standard_normal((len(texts), config.clap.projection_dim), dtype=np.float32)
    processor.datastore = CaptionDatastore.from_embeddings(texts, embeddings)
    return model, processor


def _grammar_captions(seed: int) -> list[str]:
    """Captions of the embedded default's datastore, joined until they are as long as Clotho's."""
    short = CaptionDatastore.from_pretrained(default_model_path() / "datastore").captions
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(short), size=(600, _SHORT_CAPTIONS))
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
    """`size` rows: the captions of `store`, then numbered copies of them with random embeddings."""
    captions = store.captions
    texts = [captions[row] if row < len(captions) else f"{captions[row % len(captions)]} {row}" for row in range(size)]
    embeddings = np.random.default_rng(seed).standard_normal((size, store.dimension), dtype=np.float32)
    kept = min(size, len(captions))
    embeddings[:kept] = np.asarray(store.embeddings[:kept], dtype=np.float32)
    return CaptionDatastore.from_embeddings(texts, embeddings, store.fingerprint)


def _waveforms(options: BenchmarkOptions, rate: int) -> list[np.ndarray]:
    samples = int(CLIP_SECONDS * rate)
    if not options.audio:
        generator = np.random.default_rng(options.seed)
        return [_sweep(samples, rate, generator) for _ in range(options.clips)]
    waveforms = []
    for path in options.audio:
        waveform, source_rate = load_audio(path)
        # The reference path crops what is longer at random: both sides get the first window.
        waveforms.append(resample(to_mono(waveform), source_rate, rate)[:samples])
    return waveforms


def _sweep(length: int, rate: int, generator: np.random.Generator) -> np.ndarray:
    """A gliding tone in noise, another one each time."""
    time = np.arange(length) / rate
    low, slope, level = generator.uniform(100, 2_000), generator.uniform(-50, 400), generator.uniform(0.01, 0.3)
    tone = np.sin(2 * np.pi * (low + slope * time / 2) * time)
    return (0.3 * tone + level * generator.standard_normal(length)).astype(np.float32)
