"""Contrastive training of a CLAP on recordings and captions: `recap pretrain clap`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recap_hf.data.schema import Problem
from recap_hf.training.corpus import data_sources, load_splits
from recap_hf.training.encoding import store_features
from recap_hf.training.features import FeatureStore
from recap_hf.training.loop import Step, TrainingLoop, global_batch_size
from recap_hf.training.main import log_data, open_run

from .arguments import ClapPretrainingConfig
from .bases import load_clap, new_clap_config, set_dropout, train_tokenizer
from .clips import (
    ClapPass,
    Mels,
    PairBuilder,
    PairedClip,
    Variation,
    pad_tokens,
    paired_clips,
    plan_epoch,
    positives,
)
from .contrastive import (
    Towers,
    clap_tokens,
    contrastive_loss,
    embed_mels,
    embed_texts,
    fix_input_statistics,
    gather_rows,
)
from .report import finish_base
from .retrieval import retrieval_figures

logger = logging.getLogger(__name__)

# What CLAP's text tower is given at most (LAION's setting), where it has room for it.
_MAX_TEXT_TOKENS = 77
_STATISTICS_FROM = 512


def pretrain_clap(config: ClapPretrainingConfig) -> dict[str, Any]:
    """Train a CLAP and write it to `config.output_dir`, with its tokenizer and its mel settings.

    Returns:
        The report, on every process.

    Raises:
        ValueError, OSError, RuntimeError: with what to change.
    """
    run = open_run(config)
    started = time.monotonic()
    with run.accelerator.main_process_first():
        train, validation = load_splits(config)
    texts = [text for captions in train.dataset["captions"] for text in captions]
    clap, tokenizer, extractor = _start(config, texts, run.accelerator)
    pairs = _prepare(config, train, validation, clap, tokenizer, extractor, run.accelerator)
    log_data(pairs.counts, pairs.problems)
    if not config.clap:
        fix_input_statistics(clap, _sample(pairs))
    set_dropout(clap, config.dropout)
    clap.to(run.accelerator.device)
    loop = ClapLoop(config, clap, pairs, run.accelerator)
    prepared = time.monotonic() - started
    progress = run.go(loop)
    report = finish_base(config, "clap", pairs, loop, progress, prepared, _Saved(clap, tokenizer, extractor))
    run.accelerator.end_training()
    return report


@dataclass
class Pairs:
    """Everything that a run reads.

    Args:
        train, validation: the clips.
        store: their mels.
        pad_token_id: of the tokenizer.
    """

    train: list[PairedClip]
    validation: list[PairedClip]
    store: FeatureStore
    pad_token_id: int
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)


class _Saved:
    """The trained CLAP as a folder that `ClapModel`, `AutoTokenizer` and `ClapFeatureExtractor` load."""

    def __init__(self, clap: Any, tokenizer: Any, extractor: Any) -> None:
        self._clap, self._tokenizer, self._extractor = clap, tokenizer, extractor

    def save_pretrained(self, folder: Path) -> None:
        """Write all three."""
        from transformers import ClapFeatureExtractor

        names = ("feature_size", "sampling_rate", "hop_length", "max_length_s", "fft_window_size", "frequency_min")
        names += ("frequency_max", "truncation", "padding")
        stock = ClapFeatureExtractor(**{name: getattr(self._extractor, name) for name in names})
        for part in (self._clap, self._tokenizer, stock):
            part.save_pretrained(folder)


def _start(config: ClapPretrainingConfig, texts: list[str], accelerator: Any) -> tuple[Any, Any, Any]:
    """The CLAP to train, its tokenizer and its feature extractor."""
    from transformers import AutoTokenizer, ClapModel

    from recap_hf import RecapFeatureExtractor

    torch.manual_seed(config.seed)
    if config.clap:
        clap, tokenizer, extractor = load_clap(config.clap)
        return clap, tokenizer, extractor
    folder = Path(config.output_dir) / "tokenizer"
    if accelerator.is_main_process:
        train_tokenizer(texts, "clap", config.vocab_size, _MAX_TEXT_TOKENS + 1).save_pretrained(folder)
    accelerator.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = new_clap_config(config.size, config.clap_config, tokenizer)
    return ClapModel(settings), tokenizer, RecapFeatureExtractor(feature_size=settings.audio_config.num_mel_bins)


def _prepare(
    config: ClapPretrainingConfig,
    train: Any,
    validation: Any,
    clap: Any,
    tokenizer: Any,
    extractor: Any,
    accelerator: Any,
) -> Pairs:
    """Mels of every clip, and its captions as tokens."""
    limit = min(_MAX_TEXT_TOKENS, clap.config.text_config.max_position_embeddings - 2)
    encoder = Mels(extractor, accelerator.device)
    pairs = Pairs([], [], None, tokenizer.pad_token_id, sources=data_sources(train))
    for split, data in (("train", train), ("validation", validation)):
        if data is None:
            continue
        encoded = store_features(data.dataset, encoder, config.encoding_options())
        rows = [row for row, key in enumerate(encoded.keys) if key is not None]
        pairs.problems += [(split, problem) for problem in (*data.problems, *encoded.problems)]
        if not rows:
            raise ValueError(f"no clip of the {split} split could be read: {encoded.problems[0].detail}")
        ids, captions = data.dataset["clip_id"][:], data.dataset["captions"][:]
        captions = [captions[row] for row in rows]
        tokens = iter(clap_tokens(tokenizer, [text for own in captions for text in own], limit))
        clips = paired_clips([ids[row] for row in rows], [encoded.keys[row] for row in rows], captions, tokens)
        setattr(pairs, split, clips)
        pairs.store = encoded.store
        pairs.counts[split] = {"clips": len(clips), "captions": sum(map(len, captions))}
        pairs.counts[split] |= {"clips_reused": encoded.reused, "clips_encoded": encoded.encoded}
    if len(pairs.train) < 2:
        raise ValueError("contrastive training needs at least two clips: they are told from each other")
    return pairs


def _sample(pairs: Pairs) -> torch.Tensor:
    """First windows of up to 512 training clips, spread over all."""
    chosen = np.unique(np.linspace(0, len(pairs.train) - 1, _STATISTICS_FROM).astype(int))
    plain = PairBuilder(pairs.train, pairs.store, Variation(1, False, 0.0, 0, 0, 0), pairs.pad_token_id)
    return torch.from_numpy(np.stack([plain.mel(clip, 0) for clip in chosen]))


class ClapLoop(TrainingLoop):
    """One contrastive training run.

    Args:
        config: its settings.
        clap, pairs: what is trained on what.
        accelerator: Accelerate's.
    """

    unit = "clips"

    def __init__(self, config: ClapPretrainingConfig, clap: Any, pairs: Pairs, accelerator: Any) -> None:
        self.pairs = pairs
        towers = Towers(clap, config.freeze)
        size = min(global_batch_size(config, accelerator.num_processes), len(pairs.train))
        passes = accelerator.num_processes * config.gradient_accumulation_steps
        if size < 2 * passes:
            raise ValueError(f"{size} clips in a step are too few for {passes} passes: each needs at least two")
        trained = {name: parameter for name, parameter in clap.named_parameters() if parameter.requires_grad}
        super().__init__(config, clap, towers, trained, accelerator, size, len(pairs.train) // size)
        variation = Variation(
            config.captions_per_clip,
            config.random_crop,
            config.random_gain_db,
            config.mask_frames,
            config.mask_bins,
            config.seed,
        )
        self._builder = PairBuilder(pairs.train, pairs.store, variation, pairs.pad_token_id)
        logger.info("Training %s parameters of CLAP", f"{sum(p.numel() for p in trained.values()):,}")

    def _steps(self, epoch: int, first: int) -> Iterator[Step]:
        builder, accelerator = self._builder, self.accelerator
        own = range(accelerator.process_index * self.accumulation, (accelerator.process_index + 1) * self.accumulation)
        for chosen in plan_epoch(len(self.pairs.train), self.batch_size, self.config.seed, epoch)[first:]:
            shares = np.array_split(chosen, accelerator.num_processes * self.accumulation)
            captions = [[(c, number) for c in share for number in builder.captions(c, epoch)] for share in shares]
            clips = [self.pairs.train[clip] for clip in chosen]
            pairs = [(self.pairs.train[clip], number) for part in captions for clip, number in part]
            parts = _Parts(
                [builder.build(shares[place], epoch) for place in own],
                positives(clips, pairs),
                self._per_process([len(share) for share in shares]),
                self._per_process([len(part) for part in captions]),
            )
            yield Step(len(chosen), [parts])

    def _per_process(self, counts: list[int]) -> list[int]:
        return [sum(counts[start : start + self.accumulation]) for start in range(0, len(counts), self.accumulation)]

    def _backward(self, step: Step) -> float:
        """The loss of all clips against all captions of the step; its gradient goes back pass by pass.

        The embeddings of several passes are computed twice: once to know the loss's gradient with respect to each of
        them, once more to take it further (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
        Limited Setup", RepL4NLP 2021).
        """
        (parts,) = step.parts
        accelerator, world = self.accelerator, self.accelerator.num_processes
        scales = (self.model.logit_scale_a, self.model.logit_scale_t)
        several = len(parts.passes) > 1
        with torch.set_grad_enabled(not several):
            outputs = [self._embed(number, item) for number, item in enumerate(parts.passes)]
        audio, texts = (torch.cat(blocks).detach().requires_grad_() for blocks in zip(*outputs, strict=True))
        loss = contrastive_loss(
            gather_rows(audio, parts.clips, accelerator),
            gather_rows(texts, parts.captions, accelerator),
            torch.from_numpy(parts.positive).to(accelerator.device),
            *scales,
            self.config.max_logit_scale,
        )
        audio_gradient, text_gradient, *scale_gradients = torch.autograd.grad(loss, [audio, texts, *scales])
        audio_rows = audio_gradient.split([len(own) for own, _ in outputs])
        text_rows = text_gradient.split([len(own) for _, own in outputs])
        for number, item in enumerate(parts.passes):
            with self._no_sync_until_last(number, parts.passes):
                own_audio, own_texts = self._embed(number, item) if several else outputs[number]
                total = (own_audio * audio_rows[number]).sum() + (own_texts * text_rows[number]).sum()
                # Every process and pass knows the scales' whole gradient, and adds its share of it.
                for scale, gradient in zip(scales, scale_gradients, strict=True):
                    total = total + scale * gradient / (world * len(parts.passes))
                # Averaging over processes is undone beforehand.
                accelerator.backward(total * world)
        self._record(loss / world)
        return 1.0

    def _embed(self, number: int, item: ClapPass) -> tuple[torch.Tensor, torch.Tensor]:
        self._seed_noise(number)
        device = self.accelerator.device
        arrays = (item.mels, item.input_ids, item.attention_mask)
        return self.module(*(torch.from_numpy(array).to(device) for array in arrays))

    def _validate(self) -> dict[str, float]:
        if not self.pairs.validation:
            return {}
        self.module.eval()
        similarity, right, loss = self._validation_scores()
        return {"loss": loss} | retrieval_figures(similarity, right)

    @torch.no_grad()
    def _validation_scores(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Similarities of clips (the most similar of their windows) and captions, what belongs together, the loss."""
        clips = self.pairs.validation
        captions = [(clip, number) for clip in clips for number in range(len(clip.tokens))]
        texts = self._embed_all(len(captions), lambda rows: self._texts([captions[row] for row in rows]))
        windows = [(clip, window) for clip in clips for window in range(self.pairs.store.windows(clip.key))]
        audio = self._embed_all(len(windows), lambda rows: self._windows([windows[row] for row in rows]))
        starts = np.cumsum([0, *(self.pairs.store.windows(clip.key) for clip in clips)])[:-1]
        similarity = np.maximum.reduceat(audio @ texts.T, starts, axis=0)
        right = positives(clips, captions)
        return similarity, right, self._mean_loss(audio[starts], texts, right)

    def _embed_all(self, count: int, embed: Any) -> np.ndarray:
        """Embeddings of `count` rows: batches are the same whatever the number of processes, and dealt out in turn."""
        from accelerate.utils import gather_object

        size = self.config.eval_batch_size
        batches = [range(start, min(count, start + size)) for start in range(0, count, size)]
        own = []
        for number in range(self.accelerator.process_index, len(batches), self.accelerator.num_processes):
            with self.accelerator.autocast():
                own.append((number, embed(batches[number]).float().cpu().numpy()))
        return np.concatenate([block for _, block in sorted(gather_object(own), key=lambda item: item[0])])

    def _texts(self, captions: Sequence[tuple[PairedClip, int]]) -> torch.Tensor:
        arrays = pad_tokens([clip.tokens[number] for clip, number in captions], self.pairs.pad_token_id)
        return embed_texts(self.model, *(torch.from_numpy(array).to(self.accelerator.device) for array in arrays))

    def _windows(self, windows: Sequence[tuple[PairedClip, int]]) -> torch.Tensor:
        store = self.pairs.store
        mels = []
        for clip, window in windows:
            frames = store.hidden_states(clip.key)
            mels.append(frames.reshape(store.windows(clip.key), -1, frames.shape[-1])[window])
        return embed_mels(self.model, torch.from_numpy(np.stack(mels)).float().to(self.accelerator.device))

    def _mean_loss(self, audio: np.ndarray, texts: np.ndarray, right: np.ndarray) -> float:
        """Of the first windows, in groups as large as a training step, with all captions of each group's clips."""
        device = self.accelerator.device
        losses, counts = [], []
        for start in range(0, len(audio), self.batch_size):
            rows = slice(start, start + self.batch_size)
            columns = right[rows].any(axis=0)
            arrays = (audio[rows], texts[columns], right[rows][:, columns])
            scales = (self.model.logit_scale_a, self.model.logit_scale_t)
            tensors = (torch.from_numpy(array).to(device) for array in arrays)
            losses.append(contrastive_loss(*tensors, *scales, self.config.max_logit_scale).item())
            counts.append(len(arrays[0]))
        return float(np.average(losses, weights=counts))


@dataclass
class _Parts:
    """A step: this process's passes, what belongs together in the whole step, and clips and captions per process."""

    passes: list[ClapPass]
    positive: np.ndarray
    clips: list[int]
    captions: list[int]
