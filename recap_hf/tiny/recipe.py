"""The stages that make recap-tiny, with the settings that made the shipped one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .naming import NamingRules
    from .trainer import TrainConfig

__all__ = ["Recipe"]

_LEARNING_RATES = {"clap": 1e-3, "language-model": 1.5e-3, "captioner": 1e-3}
_WARMUP_STEPS = {"captioner": 10}
# The learning rate starts again after so many steps, each time.
_CYCLES = {"clap": (3600,), "language-model": (2400, 1200)}


def earlier_cycles(stage: str, steps: int) -> tuple[int, ...]:
    """The cycles of the learning rate before the last one of a run of so many steps: a shorter run has fewer."""
    cycles = _CYCLES.get(stage, ())
    return tuple(length for index, length in enumerate(cycles) if sum(cycles[: index + 1]) < steps)


@dataclass(frozen=True)
class Recipe:
    """Stages over one folder of sounds; everything is written below `work_dir`, each stage resumes.

    Without `heard_words`, the language model and its tokenizer never read the name of a sound that the CLAP hears, and
    their folders and the one of the transfer with them end in "-unheard".
    """

    sounds: str | Path | None
    work_dir: Path
    folds: tuple[int, ...] = (1, 2, 3, 4)
    seed: int = 0
    heard_words: bool = True
    device: str = "cpu"

    def run(self, stage: str, steps: int, learning_rate: float | None = None, stop_after: int | None = None) -> Path:
        """Run a stage and return the folder of its result.

        Raises:
            FileNotFoundError: an earlier stage is missing.
        """
        from .trainer import is_main_process

        config = self._config(stage, steps, learning_rate)
        folder = self.folder(stage)
        if stage == "tokenizers":
            from .tokenization import train_tokenizers

            train_tokenizers(folder, heard_words=self.heard_words)
        elif stage == "clap":
            from .clap import ClapRecipe, train_clap

            train_clap(self._bank(), self._tokenizer("clap"), folder, self.folds, ClapRecipe(), config, stop_after)
        elif stage == "language-model":
            from .language_model import LanguageModelRecipe, train_language_model

            language = LanguageModelRecipe(heard_words=self.heard_words)
            train_language_model(self._tokenizer("gpt2"), folder, language, config, stop_after)
        else:
            from .captioner import CaptionerRecipe, train_captioner
            from .sounds import write_recordings

            recipe = CaptionerRecipe()
            train_captioner(self._parts(), self._bank(), folder, self.folds, recipe, config, stop_after=stop_after)
            folder = folder / "model"
            if is_main_process():
                write_recordings(self.sounds, self.folds, folder / "RECORDINGS.csv")
        return folder

    def transfer(
        self,
        steps: int,
        learning_rate: float | None,
        fold: int,
        rules: NamingRules,
        groups: tuple[int, ...],
        decoding: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Train captioners without a quarter of the events each and evaluate them on `fold`; see `transfer.py`."""
        from .captioner import CaptionerRecipe
        from .transfer import run_transfer

        config = self._config("captioner", steps, learning_rate)
        folder, recipe = self.folder("transfer"), CaptionerRecipe()
        return run_transfer(
            self._parts(),
            self._bank(),
            self.sounds,
            folder,
            self.folds,
            fold,
            recipe,
            config,
            rules,
            groups,
            decoding,
        )

    def _config(self, stage: str, steps: int, learning_rate: float | None) -> TrainConfig:
        from .trainer import TrainConfig

        return TrainConfig(
            steps,
            learning_rate or _LEARNING_RATES.get(stage, 0.0),
            warmup_steps=_WARMUP_STEPS.get(stage, 100),
            cycles=earlier_cycles(stage, steps),
            seed=self.seed,
            device=self.device,
        )

    def _parts(self) -> tuple[Path, Path, Path]:
        return self._earlier("clap"), self._earlier("language-model"), self._earlier("tokenizers")

    def folder(self, stage: str) -> Path:
        """Where a stage writes."""
        apart = not self.heard_words and stage in ("tokenizers", "language-model", "transfer")
        return self.work_dir / (f"{stage}-unheard" if apart else stage)

    def _earlier(self, stage: str) -> Path:
        folder = self.folder(stage)
        if not folder.is_dir():
            flag = " --without-heard-words" if folder.name != stage else ""
            raise FileNotFoundError(
                f"{folder} does not exist: run `recap tiny {stage}{flag}` with the same --work-dir first"
            )
        return folder

    def _tokenizer(self, name: str):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._earlier("tokenizers") / name)

    def _bank(self):
        from .sounds import SoundBank

        return SoundBank.load(self.sounds, self.work_dir / "mel_cache")
