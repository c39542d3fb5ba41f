"""Contrastive training of a CLAP on recordings and captions: `recap pretrain clap`."""

import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..config import AT_LEAST_1, NOT_NEGATIVE, AudioTrainingConfig, option, other_default
from ..data import Clip, DataSummary, load_encoded, load_splits
from ..task import Step, Task
from .bases import (
    BaseTrainingConfig,
    add_classes,
    load_clap,
    new_clap_config,
    set_dropout,
    train_tokenizer,
    with_new_text_tower,
)
from .caption_classes import CaptionClasses
from .clap_data import PairCollator, PairedClips, SoftTargets, StoredAudio, Variation, paired_clips, positives
from .contrastive import Towers, contrastive_loss, fix_input_statistics, gather_rows, retrieval_metrics

logger = logging.getLogger(__name__)

# What CLAP's text tower is given at most (LAION's setting), if it has room for it.
_MAX_TEXT_TOKENS = 77
_CLIPS_FOR_STATISTICS = 512
# The stream of random numbers for the order of clips; `clap_data` has another.
_ORDER = 10
_SIZES = "from scratch: tiny (3.9 M parameters), small (13 M) or base (118 M: LAION's but for the vocabulary)"


@dataclass
class ClapTrainingConfig(BaseTrainingConfig, AudioTrainingConfig):
    """Every setting of a CLAP's training, from scratch or from an existing one."""

    clap: str = option("model", "", "CLAP or RECAP checkpoint to fine-tune its CLAP, or 'embedded'; else from scratch")
    size: str = option("model", "tiny", _SIZES, choices=["tiny", "small", "base"])
    clap_config: str = option("model", "", "from scratch: JSON of a ClapConfig, instead of --size")
    freeze: str = option(
        "model",
        "none",
        "what is not trained: none, audio, text, or audio_model (the audio tower but not its projection); a frozen "
        "audio tower runs once for each recording",
        choices=["none", "audio", "text", "audio_model"],
    )

    captions_per_clip: int = option("data", 2, "captions of a clip in a step, drawn anew each epoch", check=AT_LEAST_1)
    random_crop: bool = option("data", True, "train on a random 10-second window of a longer recording")
    random_gain_db: float = option("data", 0.0, "change the level by at most this, in dB", check=NOT_NEGATIVE)
    mask_frames: int = option("data", 0, "hide at most this number of frames (10 ms) in a row", check=NOT_NEGATIVE)
    mask_bins: int = option("data", 0, "hide at most this number of mel bins in a row", check=NOT_NEGATIVE)

    caption_classes: str = option(
        "targets",
        "",
        "CSV with the columns name, words (a regular expression) and parents: classes of sounds that captions name. A "
        "caption is then right for every clip whose classes, in the columns classes and class_scores, it names",
    )
    class_loss_weight: float = option(
        "targets",
        0.0,
        "weight of the loss of the classification head against class_scores; classes that it lacks are added",
        check=NOT_NEGATIVE,
    )

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
        if self.audio_is_frozen and (self.random_gain_db or self.mask_frames or self.mask_bins):
            hint = "--random-gain-db, --mask-frames and --mask-bins need an audio tower that is trained"
            raise ValueError(f"--freeze {self.freeze} encodes each recording once: {hint}")

    @property
    def audio_is_frozen(self) -> bool:
        """Whether the audio tower's outputs never change."""
        return self.freeze in ("audio", "audio_model")

    def build_task(self, accelerator: Any) -> "ClapTask":
        with accelerator.main_process_first():
            splits = load_splits(self)
        texts = chain.from_iterable(splits["train"].dataset["captions"])
        clap, tokenizer, extractor = self._start(texts, accelerator)
        clap.to(accelerator.device)
        stored = StoredAudio(extractor, clap.eval() if self.audio_is_frozen else None, accelerator.device)
        clips, store, summary = load_encoded(self, stored, splits)
        limit = min(_MAX_TEXT_TOKENS, clap.config.text_config.max_position_embeddings - 2)
        paired = {split: paired_clips(own, tokenizer, limit) for split, own in clips.items()}
        train, texts = paired["train"]
        if len(train) < 2:
            raise ValueError("contrastive training needs at least two clips: it compares them")
        plain = {split: PairedClips(own, store, Variation()) for split, (own, _) in paired.items()}
        if not self.clap:
            chosen = np.unique(np.linspace(0, len(train) - 1, _CLIPS_FOR_STATISTICS).astype(int))
            mels = np.stack([plain["train"].audio(clip, 0) for clip in chosen])
            fix_input_statistics(clap, torch.from_numpy(mels))
        set_dropout(clap, self.dropout)
        varied = (self.captions_per_clip, self.random_crop, self.random_gain_db, self.mask_frames, self.mask_bins)
        varied += (self.seed, extractor.silence_level, extractor.decibel)
        examples = PairedClips(train, store, Variation(*varied))
        targets = self._targets(clap, clips["train"], texts)
        saved = (clap, tokenizer, extractor)
        return ClapTask(self, accelerator, saved, examples, plain.get("validation"), summary, targets)

    def _start(self, texts: Iterable[str], accelerator: Any) -> tuple[Any, Any, Any]:
        """The CLAP to train, its tokenizer and its feature extractor."""
        from recap_hf import RecapFeatureExtractor
        from recap_hf.modeling.encoder_recap import RecapClapEncoder

        torch.manual_seed(self.seed)
        clap, tokenizer, extractor = load_clap(self.clap) if self.clap else (None, None, None)
        if tokenizer is None:
            folder = Path(self.output_dir) / "tokenizer"
            tokenizer = train_tokenizer(texts, "clap", self.vocab_size, _MAX_TEXT_TOKENS + 1, folder, accelerator)
            if clap is not None:
                return with_new_text_tower(clap, tokenizer), tokenizer, extractor
            settings = new_clap_config(self.size, self.clap_config, tokenizer)
            extractor = RecapFeatureExtractor(feature_size=settings.audio_config.num_mel_bins)
            clap = RecapClapEncoder(settings)
        return clap, tokenizer, extractor

    def _targets(self, clap: Any, clips: list[Clip], texts: list[str]) -> "Targets":
        """What the audio is trained towards, besides its own captions."""
        heard = any(clip.classes for clip in clips)
        if (self.caption_classes or self.class_loss_weight) and not heard:
            raise ValueError("--caption-classes and --class-loss-weight need the columns classes and class_scores")
        soft = scores = None
        if self.caption_classes:
            soft = SoftTargets(CaptionClasses.from_csv(self.caption_classes), clips, texts)
        if self.class_loss_weight:
            if not hasattr(clap, "classifier"):
                raise ValueError("--class-loss-weight: the CLAP has no classification head")
            unknown = {name for clip in clips for name in clip.classes} - set(clap.config.id2label.values())
            if unknown:
                logger.info("Adding %d classes to the classification head: %s", len(unknown), sorted(unknown))
                add_classes(clap, sorted(unknown))
            numbers = {name: number for number, name in clap.config.id2label.items()}
            scores = np.zeros((len(clips), len(numbers)), dtype=np.float32)
            for row, clip in zip(scores, clips, strict=True):
                row[[numbers[name] for name in clip.classes]] = list(clip.classes.values())
        return Targets(soft, scores)


@dataclass(frozen=True)
class Targets:
    """Targets by the classes of clips.

    Args:
        soft: how well captions fit clips, or None.
        scores: class scores `(clips, classes)` for the classification head, or None.
    """

    soft: SoftTargets | None = None
    scores: np.ndarray | None = None


def _stock_extractor(extractor: Any) -> Any:
    """The `ClapFeatureExtractor` with the same mel settings."""
    from transformers import ClapFeatureExtractor

    names = inspect.signature(ClapFeatureExtractor).parameters
    return ClapFeatureExtractor(**{name: getattr(extractor, name) for name in names if hasattr(extractor, name)})


class ClapTask(Task):
    """Contrastive training.

    Args:
        config, accelerator: see `Task`.
        saved: the CLAP, its tokenizer and its feature extractor.
        examples, validation: training and validation clips; the latter may be None.
        data: what they consist of.
        targets: besides the clips' own captions.
    """

    kind = "clap"
    unit = "clips"
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
        targets: Targets,
    ) -> None:
        self.towers = Towers(saved[0], config.freeze, config.audio_is_frozen, bool(config.class_loss_weight))
        self.targets = targets
        super().__init__(config, accelerator, saved[0], self.towers, data)
        self.examples, self.validation, self._saved = examples, validation, saved
        self.collator = PairCollator(saved[1].pad_token_id)
        self.batch_size = min(self.batch_size, len(examples.clips))
        passes = accelerator.num_processes * config.gradient_accumulation_steps
        if self.batch_size < 2 * passes:
            raise ValueError(f"{self.batch_size} clips in a step are too few for {passes} passes: each needs two")
        self.steps_per_epoch = len(examples.clips) // self.batch_size

    def plan(self, epoch: int) -> list[list[int]]:
        """Every step is full; the clips that remain are left to other epochs."""
        order = np.random.default_rng([self.config.seed, _ORDER, epoch]).permutation(len(self.examples.clips)).tolist()
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
        clap, clips = self.model, self.examples.clips
        scales = (clap.logit_scale_a, clap.logit_scale_t)
        captions = [[(k.example, n) for k in part for n in self.examples.captions(*k[:2])] for part in step.parts]
        pairs = [(clips[clip], number) for part in captions for clip, number in part]
        chosen = [clips[key.example] for part in step.parts for key in part]
        target = positives(chosen, pairs).astype(np.float32)
        if self.targets.soft is not None:
            target = np.maximum(target, self.targets.soft(chosen, pairs))

        def embed(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            return self.module(*(tensor.to(accelerator.device) for tensor in step.batches[number]))

        outputs = []
        for number in range(passes):
            # With one pass, these are the embeddings that the gradient continues from.
            with step.one_pass(number), torch.set_grad_enabled(passes == 1):
                outputs.append(embed(number))
        blocks = zip(*(own[:2] for own in outputs), strict=True)
        audio, texts = (torch.cat(block).detach().requires_grad_() for block in blocks)
        loss = contrastive_loss(
            gather_rows(audio, _per_process(step.parts, passes), accelerator),
            gather_rows(texts, _per_process(captions, passes), accelerator),
            torch.from_numpy(target).to(accelerator.device),
            *scales,
            self.config.max_logit_scale,
        )
        audio_gradient, text_gradient, *scale_gradients = torch.autograd.grad(loss, [audio, texts, *scales])
        audio_rows = audio_gradient.split([len(own) for own, *_ in outputs])
        text_rows = text_gradient.split([len(own) for _, own, _ in outputs])
        reported = loss.detach() / world
        for number in range(passes):
            with step.one_pass(number):
                own_audio, own_texts, scores = embed(number) if passes > 1 else outputs[number]
                total = (own_audio * audio_rows[number]).sum() + (own_texts * text_rows[number]).sum()
                # Every process and pass has the scales' whole gradient, and adds its share of it.
                for scale, gradient in zip(scales, scale_gradients, strict=True):
                    total = total + scale * gradient / (world * passes)
                if scores is not None:
                    part = step.parts[accelerator.process_index * passes + number]
                    class_loss = self._class_loss(scores, [key.example for key in part]) / len(chosen)
                    total, reported = total + class_loss, reported + class_loss.detach()
                # Processes average their gradients: the factor turns that into a sum.
                accelerator.backward(total * world)
        return reported, 1.0

    def _class_loss(self, scores: torch.Tensor, clips: list[int]) -> torch.Tensor:
        """Weighted binary cross-entropy of class scores `(N, classes)`, summed over clips and classes."""
        target = torch.from_numpy(self.targets.scores[clips]).to(scores.device)
        return F.binary_cross_entropy(scores, target, reduction="sum") * self.config.class_loss_weight

    def validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        self.module.eval()
        clips, device, size = self.validation.clips, self.accelerator.device, self.config.eval_batch_size
        captions = [(clip, number) for clip in clips for number in range(len(clip.tokens))]

        def embed_texts(rows: range) -> np.ndarray:
            arrays = self.collator.pad([captions[row][0].tokens[captions[row][1]] for row in rows])
            return self.model.encode_text(*(array.to(device) for array in arrays)).cpu().numpy()

        def embed_windows(rows: range) -> list[np.ndarray]:
            mels = [torch.from_numpy(self.validation.windows(row)).float() for row in rows]
            parts = (self.towers.features(part.to(device)) for part in torch.cat(mels).split(size))
            embeds = [self.model.embed_features(part) for part in parts]
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
        """A folder that `AutoModel`, `AutoTokenizer` and `AutoFeatureExtractor` load; LAION's CLAP as `ClapModel`."""
        from transformers import ClapConfig, ClapModel

        clap, tokenizer, extractor = self._saved
        if isinstance(clap.config, ClapConfig):
            state, extractor = clap.state_dict(), _stock_extractor(extractor)
            clap = ClapModel(clap.config)
            clap.load_state_dict(state)
        for part in (clap, tokenizer, extractor):
            part.save_pretrained(folder)


def _per_process(parts: Sequence[Sequence[Any]], passes: int) -> list[int]:
    """Items of each process, whose passes follow one another in `parts`."""
    return [sum(map(len, parts[start : start + passes])) for start in range(0, len(parts), passes)]
