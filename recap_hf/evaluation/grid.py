"""The paper's grid: train, caption and score every combination, leaving alone what is there already."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .captioner import Captioner, EncodingCache, load_captioner
from .data import load_test_clips
from .folder import SCORES_FILE
from .grid_config import AUDIO_TO_AUDIO, LARGE, NEIGHBOURS, PREFIX, GridConfig, Run
from .run import EvaluationClips, caption_clips, score_folder

REPORT_OF_TRAINING = "report.json"
# In every run; the other baselines only beside the row that the paper calls DS.
_ALWAYS = ("recap", "first_retrieved")


class Grid:
    """A grid in a folder; everything that is there already is not done again.

    Args:
        config: what to run.
        output_dir: folder of the grid.
        log: called with each line of progress.
    """

    def __init__(self, config: GridConfig, output_dir: str | Path, log: Callable[[str], None] = print) -> None:
        self.config = config
        self.path = Path(output_dir)
        self.log = log
        self._clips: dict[str, EvaluationClips] = {}
        self._encodings = EncodingCache()

    # ------------------------------------------------------------------ plan

    def runs(self) -> Iterator[Run]:
        """Every evaluation, those of one model together; every k for the main row, the first for the others."""
        for training_set in self.config.training_sets:
            for seed in self.config.seeds:
                for test_set in self.config.domains:
                    yield from self._runs_of_recap(training_set, seed, test_set)
                for neighbour in self.config.neighbours:
                    for test_set in self.config.domains:
                        yield from self._runs_of_neighbour(training_set, seed, test_set, neighbour)

    def _runs_of_recap(self, training_set: tuple[str, ...], seed: int, test_set: str) -> Iterator[Run]:
        first = self.config.k[0]
        varied: Run | None = None
        for datastore in self.config.datastores(training_set):
            run = Run(training_set, seed, test_set, datastore, first)
            yield from (replace(run, k=k) for k in (self.config.k if self.is_main(run) else [first]))
            if datastore == (LARGE,) or (self.config.large is None and self.is_main(run)):
                varied = varied or run
        if varied:
            yield from (replace(varied, share=share) for share in self.config.shares)
            yield from (replace(varied, index=index) for index in self.config.indexes)

    def _runs_of_neighbour(
        self, training_set: tuple[str, ...], seed: int, test_set: str, neighbour: str
    ) -> Iterator[Run]:
        if neighbour == PREFIX:
            yield Run(training_set, seed, test_set, (), 0, neighbour)
            return
        for datastore in dict.fromkeys([training_set, (test_set,)]):
            yield Run(training_set, seed, test_set, datastore, self.config.k[0], neighbour)

    def model_folder(self, training_set: tuple[str, ...], seed: int, neighbour: str = "") -> Path:
        """Where the captioner of a training set and seed lies."""
        key = "+".join(training_set) + (f":{neighbour}" if neighbour else "")
        given = self.config.models.get(key)
        if given:
            return Path(given[self.config.seeds.index(seed)])
        return self.path / "models" / f"{'+'.join(training_set)}-seed{seed}{f'-{neighbour}' if neighbour else ''}"

    def trainings(self) -> list[tuple[tuple[str, ...], int, str]]:
        """Training set, seed and neighbour of every captioner that is not given."""
        return [
            (names, seed, neighbour)
            for names in self.config.training_sets
            for seed in self.config.seeds
            for neighbour in ("", *self.config.neighbours)
            if "+".join(names) + (f":{neighbour}" if neighbour else "") not in self.config.models
        ]

    def plan(self) -> str:
        """What would be done, in words."""
        runs = list(self.runs())
        trainings = [self.model_folder(*training) for training in self.trainings()]
        lines = [f"{len(trainings)} trainings, {len(runs)} evaluations"]
        lines += [
            f"train {folder}{' (done)' if (folder / REPORT_OF_TRAINING).is_file() else ''}" for folder in trainings
        ]
        lines += [f"evaluate {run.folder}{' (done)' if self.is_scored(run) else ''}" for run in runs]
        return "\n".join(lines)

    # ------------------------------------------------------------------- run

    def train_all(self) -> None:
        """Trains every captioner that is not there yet.

        Raises:
            RuntimeError: if a training fails.
        """
        for training_set, seed, neighbour in self.trainings():
            folder = self.model_folder(training_set, seed, neighbour)
            if not (folder / REPORT_OF_TRAINING).is_file():
                self._train(training_set, seed, neighbour, folder)

    def _train(self, training_set: tuple[str, ...], seed: int, neighbour: str, folder: Path) -> None:
        domains = [self.config.domains[name] for name in training_set]
        settings: dict[str, Any] = {
            **self.config.training,
            **(NEIGHBOURS[neighbour] | self.config.neighbours[neighbour] if neighbour else {}),
            "dataset": [domain.dataset for domain in domains],
            "data_dir": [domain.data_dir for domain in domains if domain.data_dir],
            "audio_dir": [domain.audio_dir for domain in domains if domain.audio_dir],
            "columns": [f"{ours}={theirs}" for domain in domains for ours, theirs in (domain.columns or {}).items()],
            "allow_missing": any(domain.allow_missing for domain in domains),
            "seed": seed,
            "output_dir": str(folder),
            # Encoded clips are addressed by content: all trainings share them.
            "feature_cache": self.config.training.get("feature_cache", str(self.path / "features")),
            "resume": True,
        }
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.json"
        recipe.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        self.log(f"training {folder}")
        done = subprocess.run([sys.executable, "-m", "recap_cli", "train", "--config", str(recipe)], check=False)
        if done.returncode:
            raise RuntimeError(
                f"the training of {folder} ended with status {done.returncode}; its messages stand above"
            )

    def evaluate_all(self) -> None:
        """Captions and scores every run that is not there yet."""
        from recap_hf.scoring import JavaTools

        loaded: tuple[Path, Captioner] | None = None
        known: list[str] = []
        options = self._scoring_options()
        with JavaTools(options.pop("java", None)) as tools:
            for run in self.runs():
                if self.is_scored(run):
                    continue
                folder = self.model_folder(run.training_set, run.seed, run.neighbour)
                if loaded is None or loaded[0] != folder:
                    loaded = folder, self._load(folder)
                    known = [record["caption"] for name in run.training_set for record in self.training_captions(name)]
                self._evaluate(run, loaded[1], {**options, "tools": tools, "training_captions": known})

    def _load(self, folder: Path) -> Captioner:
        options = self.config.evaluation
        generation = {key: options[key] for key in ("num_beams", "max_new_tokens") if key in options}
        chosen = {key: options[key] for key in ("device", "dtype", "exclude_references") if key in options}
        return load_captioner(str(folder), "none", generation=generation, encodings=self._encodings, **chosen)

    def _evaluate(self, run: Run, captioner: Captioner, scoring: dict[str, Any]) -> None:
        self.log(f"evaluating {run.folder}")
        captioner.processor.datastore = self.datastore_of(run, captioner)
        captioner.processor.check_model(captioner.model)
        captioner.k = run.k
        main = self.is_main(run) and run.k == self.config.k[0]
        systems = None if main else _ALWAYS[:1] if run.neighbour == PREFIX else _ALWAYS
        clips = self.clips(run.test_set)
        folder = caption_clips(
            captioner,
            clips,
            self.path / run.folder,
            systems=systems,
            batch_size=self.config.evaluation.get("batch_size", 16),
            names={"model": run.model, "datastore": self.label(run)},
        )
        score_folder(folder, clips.name, resamples=self.config.resamples, notes=clips.notes, **scoring)

    def _scoring_options(self) -> dict[str, Any]:
        from recap_hf.scoring import FenseModels

        options = dict(self.config.scoring)
        parts = [options.pop(key, None) for key in ("sentence_model", "error_detector", "error_detector_encoder")]
        return {**options, "fense_models": FenseModels(*parts)} if parts[0] else options

    def clips(self, test_set: str) -> EvaluationClips:
        """The test clips of a domain."""
        if test_set not in self._clips:
            domain = asdict(self.config.domains[test_set])
            for key in ("name", "events"):
                domain.pop(key)
            self._clips[test_set] = load_test_clips(domain.pop("dataset"), domain.pop("data_dir"), **domain)
        return self._clips[test_set]

    def datastore_of(self, run: Run, captioner: Captioner) -> Any:
        """What a run retrieves from: a whole datastore, a share of it, or another search in it; None for nothing."""
        if not run.datastore:
            return None
        if run.neighbour == AUDIO_TO_AUDIO:
            return self.datastore_by_audio(run.datastore, captioner)
        store = self.datastore(run.datastore, captioner)
        if run.share < 1:
            from recap_hf import CaptionDatastore

            order = np.random.default_rng(0).permutation(len(store))
            rows = np.sort(order[: max(1, round(run.share * len(store)))])
            return CaptionDatastore([store.records[row] for row in rows], store.embeddings[rows], store.fingerprint)
        if run.index:
            from recap_hf.datastore import build_index

            store.set_index(build_index(store.embeddings, run.index))
        return store

    def datastore_by_audio(self, composition: tuple[str, ...], captioner: Captioner) -> Any:
        """The training captions of some domains, found by the audio of their clips; built once for all models."""
        from recap_hf import CaptionDatastore
        from recap_hf.data import load_captions

        folder = self.path / "datastores" / f"{'+'.join(composition)}-by-audio"
        if (folder / "datastore.json").is_file():
            return CaptionDatastore.from_pretrained(folder)
        self.log(f"building {folder}")
        clips: list[dict[str, Any]] = []
        for name in composition:
            domain = self.config.domains[name]
            options = {"audio_dir": domain.audio_dir, "columns": domain.columns, "allow_missing": domain.allow_missing}
            table = load_captions(domain.dataset, domain.data_dir, split="train", **options).dataset
            clips += [{key: value for key, value in row.items() if key != "split"} for row in table]
        store = CaptionDatastore.from_clips(clips, captioner.model, captioner.processor)
        store.save_pretrained(folder)
        return store

    def datastore(self, composition: tuple[str, ...], captioner: Captioner) -> Any:
        """The datastore of some domains' training captions, or the large one; built once for all models of a CLAP."""
        from recap_hf import CaptionDatastore

        folder = self.path / "datastores" / "+".join(composition)
        if (folder / "datastore.json").is_file():
            return CaptionDatastore.from_pretrained(folder)
        self.log(f"building {folder}")
        large = composition == (LARGE,)
        records = [
            record
            for name in (self.config.domains if large else composition)
            for record in self.training_captions(name)
        ]
        if large:
            from recap_hf import read_captions

            for path in self.config.large.get("files", []):
                records += [{"source": Path(path).name, **record} for record in read_captions(path)]
        store = CaptionDatastore.from_captions(records, captioner.model, captioner.processor)
        store.save_pretrained(folder)
        return store

    def training_captions(self, name: str) -> list[dict[str, Any]]:
        """Captions of a domain's training split, with clip, source and licence."""
        from recap_hf.data import load_captions

        domain = self.config.domains[name]
        table = load_captions(
            domain.dataset, domain.data_dir, split="train", columns=domain.columns, needs_audio=False
        ).dataset
        return [
            {"caption": caption, "clip_id": row["clip_id"], "source": row["source"], "licence": row["licence"]}
            for row in table
            for caption in row["captions"]
        ]

    def is_scored(self, run: Run) -> bool:
        """Whether a run is finished."""
        return (self.path / run.folder / SCORES_FILE).is_file()

    def is_main(self, run: Run) -> bool:
        """Whether a run belongs to the row that the paper calls DS."""
        return self.label(run) == "w/ DS"

    def label(self, run: Run) -> str:
        """Name of a run's row."""
        return self.config.run_label(run)
