"""Contrastive training of a CLAP on recordings and captions: `recap pretrain clap`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import AT_LEAST_1, NOT_NEGATIVE, AudioTrainingConfig, option, other_default
from ..data import DataSummary, load_encoded, load_splits
from ..task import Step, Task
from .bases import BaseTrainingConfig, load_clap, new_clap_config, set_dropout, train_tokenizer
from .clap_data import ORDER, Mels, PairCollator, PairedClips, Variation, paired_clips, positives
from .contrastive import Towers, contrastive_loss, fix_input_statistics, gather_rows, retrieval_metrics

# What CLAP's text tower is given at most (LAION's setting), if it has room for it.
_MAX_TEXT_TOKENS = 77
_CLIPS_FOR_STATISTICS = 512


@dataclass
class ClapTrainingConfig(BaseTrainingConfig, AudioTrainingConfig):
    """Every setting of a CLAP's training, from scratch or from an existing one."""

    clap: str = option(
        "model",
        "",
        "CLAP or RECAP checkpoint to fine-tune the CLAP of ('embedded': the default's); without it, from scratch",
    )
    size: str = option(
        "model",
        "tiny",
        "from scratch: tiny (3.9 M parameters), small (13 M) or base (118 M: LAION's but for the vocabulary)",
        choices=["tiny", "small", "base"],
    )
    clap_config: str = option("model", "", "from scratch: JSON of a ClapConfig, instead of --size")
    freeze: str = option(
        "model", "none", "tower that is not trained: none, audio or text", choices=["none", "audio", "text"]
    )

    captions_per_clip: int = option(
        "data", 2, "captions of a clip in a step, drawn again in each epoch", check=AT_LEAST_1
    )
    random_crop: bool = option("data", True, "train on a random 10-second window of a longer recording")
    random_gain_db: float = option("data", 0.0, "change the level by at most this, in dB", check=NOT_NEGATIVE)
    mask_frames: int = option("data", 0, "hide at most this number of frames (10 ms) in a row", check=NOT_NEGATIVE)
    mask_bins: int = option("data", 0, "hide at most this number of mel bins in a row", check=NOT_NEGATIVE)

    learning_rate: float = other_default(AudioTrainingConfig, "learning_rate", 1e-4)
    batch_size: int = other_default(
        AudioTrainingConfig, "batch_size", 64, help="clips in a step of all processes, compared with one another"
    )
    num_train_epochs: float = other_default(AudioTrainingConfig, "num_train_epochs", 30.0)
    max_logit_scale: float = option("optimisation", 100.0, "bound of the factor of the similarities", check=AT_LEAST_1)
    metric_for_best_model: str = other_default(
        AudioTrainingConfig, "metric_for_best_model", "map10", choices=["map10", "loss"]
    )

    def check(self) -> None:
        super().check()
        if self.clap and self.clap_config:
            raise ValueError("give either --clap (to fine-tune it), or --clap-config (to start from scratch)")

    def build_task(self, accelerator: Any) -> ClapTask:
        with accelerator.main_process_first():
            splits = load_splits(self)
        texts = chain.from_iterable(splits["train"].dataset["captions"])
        clap, tokenizer, extractor = self._start(texts, accelerator)
        clips, store, summary = load_encoded(self, Mels(extractor, accelerator.device), splits)
        limit = min(_MAX_TEXT_TOKENS, clap.config.text_config.max_position_embeddings - 2)
        paired = {split: paired_clips(own, tokenizer, limit) for split, own in clips.items()}
        if len(paired["train"]) < 2:
            raise ValueError("contrastive training needs at least two clips: it compares them")
        plain = {split: PairedClips(own, store, Variation()) for split, own in paired.items()}
        if not self.clap:
            chosen = np.unique(np.linspace(0, len(paired["train"]) - 1, _CLIPS_FOR_STATISTICS).astype(int))
            mels = np.stack([plain["train"].mel(clip, 0) for clip in chosen])
            fix_input_statistics(clap, torch.from_numpy(mels))
        set_dropout(clap, self.dropout)
        clap.to(accelerator.device)
        varied = (self.captions_per_clip, self.random_crop, self.random_gain_db, self.mask_frames, self.mask_bins)
        examples = PairedClips(paired["train"], store, Variation(*varied, self.seed))
        saved = (clap, tokenizer, _stock_extractor(extractor))
        return ClapTask(self, accelerator, saved, examples, plain.get("validation"), summary)

    def _start(self, texts: Iterable[str], accelerator: Any) -> tuple[Any, Any, Any]:
        """The CLAP to train, its tokenizer and its feature extractor."""
        from transformers import ClapModel

        from recap_hf import RecapFeatureExtractor

        torch.manual_seed(self.seed)
        if self.clap:
            return load_clap(self.clap)
        folder = Path(self.output_dir) / "tokenizer"
        tokenizer = train_tokenizer(texts, "clap", self.vocab_size, _MAX_TEXT_TOKENS + 1, folder, accelerator)
        settings = new_clap_config(self.size, self.clap_config, tokenizer)
        return ClapModel(settings), tokenizer, RecapFeatureExtractor(feature_size=settings.audio_config.num_mel_bins)


def _stock_extractor(extractor: Any) -> Any:
    """The `ClapFeatureExtractor` with the same mel settings."""
    from transformers import ClapFeatureExtractor

    names = inspect.signature(ClapFeatureExtractor).parameters
    return ClapFeatureExtractor(**{name: getattr(extractor, name) for name in names if hasattr(extractor, name)})


class ClapTask(Task):
    """Contrastive training.

    Args:
        config, accelerator: see `Task`.
        saved: the CLAP, its tokenizer and its stock feature extractor.
        examples, validation: training and validation clips; the latter may be None.
        data: what they consist of.
    """

    kind = "clap"
    unit = "clips"
    loss_name = "contrastive loss"
    config: ClapTrainingConfig
    examples: PairedClips

    def __init__(
        self,
        config: ClapTrainingConfig,
        accelerator: Any,
        saved: tuple[Any, Any, Any],
        examples: PairedClips,
        validation: PairedClips | None,
        data: DataSummary,
    ) -> None:
        self.towers = Towers(saved[0], config.freeze)
        super().__init__(config, accelerator, saved[0], self.towers, data)
        self.examples, self.validation, self._saved = examples, validation, saved
        self.collator = PairCollator(saved[1].pad_token_id)
        self.batch_size = min(self.batch_size, len(examples.clips))
        passes = accelerator.num_processes * config.gradient_accumulation_steps
        if self.batch_size < 2 * passes:
            raise ValueError(
                f"{self.batch_size} clips in a step are too few for {passes} passes: each needs at least two"
            )
        self.steps_per_epoch = len(examples.clips) // self.batch_size

    def plan(self, epoch: int) -> list[list[int]]:
        """Every step is full; the clips that remain are left to other epochs."""
        order = np.random.default_rng([self.config.seed, ORDER, epoch]).permutation(len(self.examples.clips)).tolist()
        return [order[number * self.batch_size :][: self.batch_size] for number in range(self.steps_per_epoch)]

    def split(self, step: Sequence[int], parts: int) -> list[list[int]]:
        return [part.tolist() for part in np.array_split(step, parts)]

    def backward(self, step: Step) -> tuple[torch.Tensor, float]:
        """The loss of all clips against all captions of the step; its gradient goes back pass by pass.

        The embeddings of several passes are computed twice: once for the gradient of the loss with respect to each of
        them, and once to continue it to the parameters (Gao et al., "Scaling Deep Contrastive Learning Batch Size
        under Memory Limited Setup", RepL4NLP 2021).
        """
        accelerator, world, passes = self.accelerator, self.accelerator.num_processes, len(step.batches)
        scales, clips = (self.model.logit_scale_a, self.model.logit_scale_t), self.examples.clips
        captions = [[(k.example, n) for k in part for n in self.examples.captions(*k[:2])] for part in step.parts]
        pairs = [(clips[clip], number) for part in captions for clip, number in part]
        positive = positives([clips[key.example] for part in step.parts for key in part], pairs)

        def embed(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.module(*(tensor.to(accelerator.device) for tensor in step.batches[number]))

        outputs = []
        for number in range(passes):
            # With one pass, these are the embeddings that the gradient continues from.
            with step.one_pass(number), torch.set_grad_enabled(passes == 1):
                outputs.append(embed(number))
        audio, texts = (torch.cat(blocks).detach().requires_grad_() for blocks in zip(*outputs, strict=True))
        loss = contrastive_loss(
            gather_rows(audio, _per_process(step.parts, passes), accelerator),
            gather_rows(texts, _per_process(captions, passes), accelerator),
            torch.from_numpy(positive).to(accelerator.device),
            *scales,
            self.config.max_logit_scale,
        )
        audio_gradient, text_gradient, *scale_gradients = torch.autograd.grad(loss, [audio, texts, *scales])
        audio_rows = audio_gradient.split([len(own) for own, _ in outputs])
        text_rows = text_gradient.split([len(own) for _, own in outputs])
        for number in range(passes):
            with step.one_pass(number):
                own_audio, own_texts = embed(number) if passes > 1 else outputs[number]
                total = (own_audio * audio_rows[number]).sum() + (own_texts * text_rows[number]).sum()
                # Every process and pass has the scales' whole gradient, and adds its share of it.
                for scale, gradient in zip(scales, scale_gradients, strict=True):
                    total = total + scale * gradient / (world * passes)
                # Processes average their gradients: the factor turns that into a sum.
                accelerator.backward(total * world)
        return loss.detach() / world, 1.0

    def validate(self, before_training: bool = False) -> dict[str, float]:
        if self.validation is None:
            return {}
        self.module.eval()
        clips, device, size = self.validation.clips, self.accelerator.device, self.config.eval_batch_size
        captions = [(clip, number) for clip in clips for number in range(len(clip.tokens))]

        def embed_texts(rows: range) -> np.ndarray:
            arrays = self.collator.pad([captions[row][0].tokens[captions[row][1]] for row in rows])
            return self.towers.embed_texts(*(array.to(device) for array in arrays)).cpu().numpy()

        def embed_windows(rows: range) -> list[np.ndarray]:
            mels = [torch.from_numpy(self.validation.windows(row)).float() for row in rows]
            embeds = [self.towers.embed_mels(part.to(device)) for part in torch.cat(mels).split(size)]
            return [own.cpu().numpy() for own in torch.cat(embeds).split(list(map(len, mels)))]

        with self.accelerator.autocast():
            texts = np.concatenate(self.in_batches(len(captions), size, embed_texts))
            windows = list(chain.from_iterable(self.in_batches(len(clips), size, embed_windows)))
        # A clip is as similar as the most similar of its windows.
        similarity = np.stack([(own @ texts.T).max(axis=0) for own in windows])
        right = positives(clips, captions)
        return {"loss": self._loss_of(windows, texts, right), **retrieval_metrics(similarity, right)}

    @torch.no_grad()
    def _loss_of(self, windows: Sequence[np.ndarray], texts: np.ndarray, right: np.ndarray) -> float:
        """Of the first windows, in groups as large as a training step, with all captions of each group's clips."""
        audio, total = np.stack([own[0] for own in windows]), 0.0
        scales = (self.model.logit_scale_a, self.model.logit_scale_t)
        for start in range(0, len(audio), self.batch_size):
            rows = slice(start, start + self.batch_size)
            columns = right[rows].any(axis=0)
            arrays = (audio[rows], texts[columns], right[rows][:, columns])
            tensors = (torch.from_numpy(array).to(self.accelerator.device) for array in arrays)
            total += contrastive_loss(*tensors, *scales, self.config.max_logit_scale).item() * len(arrays[0])
        return total / len(audio)

    def save(self, folder: Path) -> None:
        """A folder that `ClapModel`, `AutoTokenizer` and `ClapFeatureExtractor` load."""
        for part in self._saved:
            part.save_pretrained(folder)


def _per_process(parts: Sequence[Sequence[Any]], passes: int) -> list[int]:
    """Items of each process, whose passes follow one another in `parts`."""
    return [sum(map(len, parts[start : start + passes])) for start in range(0, len(parts), passes)]
