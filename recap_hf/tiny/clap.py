"""The CLAP of recap-tiny, from scratch: contrastive with hard negatives, and two training-only tagging heads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from recap_hf.pretraining.bases import ClapSize, clap_config
from recap_hf.pretraining.contrastive import contrastive_loss, fix_input_statistics
from recap_hf.pretraining.contrastive import embed_texts as embed_tokens

from .grammar import Caption, Scene, compatible, contradict, render
from .lexicon import HEARD, SPECIAL, vocabulary_sounds
from .mixtures import TIME_STEPS, Example, MixtureConfig, draw_example
from .rewording import reword
from .sounds import SoundBank
from .tokenization import draw_text_scene
from .trainer import TrainConfig, is_main_process, train

if TYPE_CHECKING:
    from transformers import ClapModel, PreTrainedTokenizerBase

__all__ = ["TAGS", "ClapRecipe", "ClapTrainee", "audio_batch", "build_clap", "embed_texts", "train_clap"]

TAGS: tuple[str, ...] = (*HEARD, *SPECIAL)
_MAX_LOGIT_SCALE = 4.0  # exp(4) = 55


@dataclass(frozen=True)
class ClapRecipe:
    """Sizes and shares of the training of the CLAP.

    A step is `batches_per_step` batches, each contrasted within itself, on one process or on several. The second phase
    begins where the recordings of the training are known by heart: they are varied strongly, a step is a single batch,
    and captions are also those of other people.
    """

    patch_embeds_hidden_size: int = 64
    depths: tuple[int, ...] = (1, 2, 2)
    num_attention_heads: tuple[int, ...] = (2, 4, 8)
    text_hidden_size: int = 192
    text_layers: int = 2
    projection_dim: int = 128
    batch_size: int = 32
    batches_per_step: int = 2
    text_scenes: int = 12
    tag_weight: float = 2.0
    frame_weight: float = 1.0
    text_weight: float = 0.3
    # Share of the captions of the second phase that are in the words of other people.
    reworded_share: float = 0.35
    # Single sounds first: their share falls from this to the mixtures' own.
    first_singles: float = 0.85
    curriculum_steps: int = 1200
    second_phase_from: int = 3600
    bfloat16: bool = True
    mixtures: MixtureConfig = field(default_factory=MixtureConfig)


def build_clap(tokenizer: PreTrainedTokenizerBase, recipe: ClapRecipe) -> ClapModel:
    """A `ClapModel` with random weights."""
    from transformers import ClapModel

    size = ClapSize(
        recipe.patch_embeds_hidden_size,
        recipe.depths,
        recipe.num_attention_heads,
        recipe.text_hidden_size,
        recipe.text_layers,
        recipe.projection_dim,
    )
    return ClapModel(clap_config(size, tokenizer))


class ClapTrainee(nn.Module):
    """A CLAP with the two heads that only its training uses: tags of the whole clip and of each of 32 time steps."""

    def __init__(self, clap: ClapModel):
        super().__init__()
        self.clap = clap
        width = clap.config.audio_config.hidden_size
        self.tags = nn.Linear(width, len(TAGS))
        self.frame_tags = nn.Linear(width, len(TAGS))

    def forward(self, input_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 1, 1001, 64) -> L2-normalised embeddings (B, P), tag logits (B, T), frame tag logits (B, 32, T)."""
        self.clap.audio_model.audio_encoder.batch_norm.eval()
        output = self.clap.audio_model(input_features=input_features)
        embeds = F.normalize(self.clap.audio_projection(output.pooler_output).float(), dim=-1)
        steps = output.last_hidden_state.float().mean(dim=2).transpose(1, 2)
        return embeds, self.tags(output.pooler_output.float()), self.frame_tags(steps)


def fix_statistics(clap: ClapModel, bank: SoundBank, folds: tuple[int, ...], recipe: ClapRecipe) -> None:
    """Give the audio tower's input normalisation the statistics of 512 examples, and freeze it."""
    rng = np.random.default_rng([0xBA7C, len(folds)])
    examples = [draw_example(bank, folds, rng, recipe.mixtures) for _ in range(512)]
    fix_input_statistics(clap, audio_batch(examples, clap.device)[:, 0])


def embed_texts(clap: ClapModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """L2-normalised text embeddings (N, P)."""
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(clap.device)
    return embed_tokens(clap, encoded["input_ids"], encoded["attention_mask"])


def audio_batch(examples: list[Example], device: torch.device | str = "cpu") -> torch.Tensor:
    """`input_features` (B, 1, 1001, 64) in dB."""
    power = torch.from_numpy(np.stack([example.power for example in examples])).to(device)
    return (10 * torch.log10(power.clamp_min(1e-10)))[:, None]


def _targets(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    tags = torch.zeros(len(examples), len(TAGS))
    frames = torch.zeros(len(examples), TIME_STEPS, len(TAGS))
    for row, example in enumerate(examples):
        for event, active in example.activity.items():
            tags[row, TAGS.index(event)] = 1
            frames[row, :, TAGS.index(event)] = torch.from_numpy(active).float()
    return tags, frames


def positives(captions: list[Caption], scenes: list[Scene]) -> torch.Tensor:
    """(scenes, captions) bool: the caption is true of the scene."""
    return torch.tensor([[compatible(caption, scene) for caption in captions] for scene in scenes])


class _Batches:
    """Draws batches and computes the loss of one step."""

    def __init__(self, trainee: ClapTrainee, tokenizer, bank: SoundBank, folds: tuple[int, ...], recipe: ClapRecipe):
        self.trainee, self.tokenizer, self.bank, self.folds, self.recipe = trainee, tokenizer, bank, folds, recipe

    def _word(self, scene: Scene, rng: np.random.Generator, reworded_share: float, *how: float) -> Caption:
        return reword(scene, rng) if rng.random() < reworded_share else render(scene, rng, *how)

    def __call__(self, rng: np.random.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        recipe, clap = self.recipe, self.trainee.clap
        mixtures = recipe.mixtures.with_singles(recipe.first_singles, step / recipe.curriculum_steps)
        second_phase = step >= recipe.second_phase_from
        if second_phase:
            mixtures = mixtures.strongly_varied()
        share = recipe.reworded_share if second_phase else 0.0
        examples = [draw_example(self.bank, self.folds, rng, mixtures) for _ in range(recipe.batch_size)]
        scenes = [example.scene for example in examples]
        captions = [self._word(scene, rng, share) for scene in scenes]
        captions += [self._word(contradict(scene, rng, TAGS), rng, share) for scene in scenes]
        # Of sounds that are never heard, the text tower learns from text alone: two wordings of one scene agree, and
        # differ from a scene that is nearly the same.
        other = [draw_text_scene(rng, invented=0.15) for _ in range(recipe.text_scenes)]
        keys = vocabulary_sounds()
        pairs = [self._word(scene, rng, share, 1.0, 1.0) for scene in [*other, *other]]
        pairs += [self._word(contradict(scene, rng, keys), rng, share, 1.0, 1.0) for scene in other]
        device = clap.device
        positive = positives(captions + pairs, scenes).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16):
            embeds, tag_logits, frame_logits = self.trainee(audio_batch(examples, device))
            texts = embed_texts(clap, self.tokenizer, [caption.text for caption in captions + pairs])
        contrastive = contrastive_loss(
            embeds, texts, positive, clap.logit_scale_a, clap.logit_scale_t, math.exp(_MAX_LOGIT_SCALE)
        )
        tags, frames = (target.to(device) for target in _targets(examples))
        tag_loss = F.binary_cross_entropy_with_logits(tag_logits, tags) * len(TAGS) / 4
        frame_loss = F.binary_cross_entropy_with_logits(frame_logits, frames) * len(TAGS) / 4
        count = recipe.text_scenes
        first, second = texts[len(captions) :][:count], texts[len(captions) :][count:]
        against = torch.cat([second, texts[: len(captions)]])
        scale = clap.logit_scale_t.clamp(max=_MAX_LOGIT_SCALE).exp()
        text_loss = F.cross_entropy(first @ against.T * scale, torch.arange(count, device=device))
        loss = contrastive + recipe.tag_weight * tag_loss + recipe.frame_weight * frame_loss
        loss = loss + recipe.text_weight * text_loss
        with torch.no_grad():
            best = (embeds @ texts.T).argmax(dim=1)
            exact = positive.gather(1, best[:, None]).float().mean().item()
        figures = {"contrastive": contrastive.item(), "tags": tag_loss.item(), "frames": frame_loss.item()}
        return loss, figures | {"text": text_loss.item(), "first": exact}


def train_clap(
    bank: SoundBank,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    folds: tuple[int, ...],
    recipe: ClapRecipe,
    config: TrainConfig,
    stop_after: int | None = None,
) -> ClapTrainee:
    """Train a CLAP on `folds` and save it to `folder` (a `ClapModel`); resumes from `folder/checkpoint.pt`."""
    folder = Path(folder)
    torch.manual_seed(config.seed)
    trainee = ClapTrainee(build_clap(tokenizer, recipe)).to(config.device)
    fix_statistics(trainee.clap, bank, folds, recipe)
    batches = _Batches(trainee, tokenizer, bank, folds, recipe)
    config = replace(config, batches_per_step=recipe.batches_per_step, one_batch_from=recipe.second_phase_from)
    train(trainee, batches, config, folder / "checkpoint.pt", "clap", stop_after)
    if is_main_process():
        trainee.clap.save_pretrained(folder)
    return trainee
