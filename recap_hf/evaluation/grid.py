"""The paper's grid: train, caption and score every combination; what is finished is not done again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.files import write_json
from recap_hf.modeling.captioning_recap import Captioner
from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.modeling.retrieval_recap import CaptionDatastore
from recap_hf.scoring import FenseModels, ScoringTools

from .clips import EvaluationClips, load_test_clips
from .folder import SCORES_FILE
from .grid_config import AUDIO_TO_AUDIO, LARGE, MAIN_ROW, PREFIX, RELATED_METHODS, GridConfig, Run
from .runner import caption_clips, score_folder
from .systems import MAIN_SYSTEM, EncodingCache, Systems, load_captioner

REPORT_OF_TRAINING = "report.json"
Training = tuple[tuple[str, ...], int, str]  # training set, seed, related method or ""


class Grid:
    """A grid in a folder.

    Args:
        config: what to run.
        output_dir: folder of models, datastores, runs and tables.
        log: called with each line of progress.
    """

    def __init__(self, config: GridConfig, output_dir: str | Path, log: Callable[[str], None] = print) -> None:
        self.config = config
        self.path = Path(output_dir)
        self.log = log
        self._clips: dict[str, EvaluationClips] = {}
        self._captions: dict[str, list[dict[str, Any]]] = {}
        self._encodings = EncodingCache()

    # ------------------------------------------------------------------ plan

    def runs(self) -> Iterator[Run]:
        """Every evaluation, those of one model together."""
        for training_set in self.config.training_sets:
            for seed in self.config.seeds:
                for test_set in self.config.domains:
                    yield from self._runs_of_recap(training_set, seed, test_set)
                for method in self.config.related_methods:
                    for test_set in self.config.domains:
                        stores = [()] if method == PREFIX else dict.fromkeys([training_set, (test_set,)])
                        k = 0 if method == PREFIX else self.config.k[0]
                        yield from (Run(training_set, seed, test_set, store, k, method) for store in stores)

    def _runs_of_recap(self, training_set: tuple[str, ...], seed: int, test_set: str) -> Iterator[Run]:
        """Every datastore at the first k, the main row at every k, and one datastore in shares and by index."""
        first, varied = self.config.k[0], None
        for datastore in self.config.datastores(training_set):
            run = Run(training_set, seed, test_set, datastore, first)
            yield from (replace(run, k=k) for k in (self.config.k if self.is_main(run) else [first]))
            if varied is None and datastore == self.varied_datastore(run):
                varied = run
        if varied:
            yield from (replace(varied, share=share) for share in self.config.shares)
            yield from (replace(varied, index=index) for index in self.config.indexes)

    def varied_datastore(self, run: Run) -> tuple[str, ...]:
        """The datastore whose size and index are varied: the large one, or that of the main row."""
        return run.datastore if self.config.large is None and self.is_main(run) else (LARGE,)

    def model_folder(self, training_set: tuple[str, ...], seed: int, method: str = "") -> Path:
        """Folder of the captioner of a training set and seed."""
        given = self.config.models.get(_key(training_set, method))
        if given:
            return Path(given[self.config.seeds.index(seed)])
        return self.path / "models" / Run(training_set, seed, "", (), 0, method).model

    def trainings(self) -> list[Training]:
        """Every captioner that is not given."""
        return [
            (training_set, seed, method)
            for training_set in self.config.training_sets
            for seed in self.config.seeds
            for method in ("", *self.config.related_methods)
            if _key(training_set, method) not in self.config.models
        ]

    def plan(self) -> str:
        """What would be done, in words."""
        runs = list(self.runs())
        models = [self.model_folder(*training) for training in self.trainings()]
        done = [(model / REPORT_OF_TRAINING).is_file() for model in models]
        lines = [f"{len(models)} trainings, {len(runs)} evaluations"]
        lines += [f"train {model}{' (done)' * ready}" for model, ready in zip(models, done, strict=True)]
        lines += [f"evaluate {run.folder}{' (done)' * self.is_scored(run)}" for run in runs]
        return "\n".join(lines)

    # ------------------------------------------------------------------- run

    def train_all(self) -> None:
        """Trains every captioner that is not finished. Raises `RuntimeError` if a training fails."""
        for training in self.trainings():
            folder = self.model_folder(*training)
            if not (folder / REPORT_OF_TRAINING).is_file():
                self._train(training, folder)

    def _train(self, training: Training, folder: Path) -> None:
        training_set, seed, method = training
        domains = [self.config.domains[name] for name in training_set]
        settings: dict[str, Any] = {
            # Encoded clips are found by content: all trainings share them.
            "feature_cache": str(self.path / "features"),
            **self.config.training,
            **(RELATED_METHODS[method] | self.config.related_methods[method] if method else {}),
            "dataset": [domain.dataset for domain in domains],
            "data_dir": [domain.data_dir for domain in domains if domain.data_dir],
            "audio_dir": [domain.audio_dir for domain in domains if domain.audio_dir],
            "columns": [f"{ours}={theirs}" for domain in domains for ours, theirs in (domain.columns or {}).items()],
            "allow_missing": any(domain.allow_missing for domain in domains),
            "seed": seed,
            "output_dir": str(folder),
            "resume": True,
        }
        folder.mkdir(parents=True, exist_ok=True)
        recipe = write_json(folder / "recipe.json", settings)
        self.log(f"training {folder}")
        # A process of its own: nothing of one training can change the next.
        done = subprocess.run([sys.executable, "-m", "recap_cli", "train", "--config", str(recipe)], check=False)
        if done.returncode:
            raise RuntimeError(f"the training of {folder} ended with status {done.returncode}; see its messages above")

    def evaluate_all(self) -> None:
        """Captions and scores every run that is not finished."""
        loaded: tuple[Path, Captioner] | None = None
        with self.scoring_tools() as tools:
            for run in self.runs():
                if self.is_scored(run):
                    continue
                folder = self.model_folder(run.training_set, run.seed, run.method)
                if loaded is None or loaded[0] != folder:
                    options = {key: self.config.evaluation.get(key) for key in ("device", "dtype")}
                    loaded = folder, load_captioner(str(folder), "none", **options)
                self._evaluate(run, loaded[1], tools)

    def scoring_tools(self) -> ScoringTools:
        """What the scores run on, by the settings in `scoring`."""
        scoring = self.config.scoring
        parts = [scoring.get(key) for key in ("sentence_model", "error_detector", "error_detector_encoder")]
        return ScoringTools(
            scoring.get("java"), scoring.get("spice_models"), FenseModels(*parts) if parts[0] else None
        )

    def _evaluate(self, run: Run, captioner: Captioner, tools: ScoringTools) -> None:
        self.log(f"evaluating {run.folder}")
        evaluation = self.config.evaluation
        store = self.datastore_of(run, captioner)
        captioner = captioner.with_options(self.config.caption_options.merged_with(CaptionOptions(k=run.k)))
        captioner = captioner if store is None else captioner.with_datastore(store)
        names: list[str] | None = [MAIN_SYSTEM] + ([] if run.method == PREFIX else ["first_retrieved"])
        if self.is_main(run) and run.k == self.config.k[0]:
            names = None
        clips = self.clips(run.test_set)
        folder = caption_clips(
            Systems(captioner, 0, evaluation.get("exclude_references", False), self._encodings),
            clips,
            self.path / run.folder,
            names=names,
            batch_size=evaluation.get("batch_size", 16),
            sources={"model": run.model, "datastore": self.label(run)},
        )
        known = [record["caption"] for name in run.training_set for record in self.training_captions(name)]
        score_folder(
            folder,
            clips.name,
            resamples=self.config.resamples,
            notes=clips.notes,
            tools=tools,
            metrics=self.config.scoring.get("metrics"),
            training_captions=known,
        )

    # ------------------------------------------------------------------ data

    def clips(self, test_set: str) -> EvaluationClips:
        """The test clips of a domain."""
        if test_set not in self._clips:
            domain = asdict(self.config.domains[test_set])
            del domain["name"], domain["events"]
            self._clips[test_set] = load_test_clips(**domain)
        return self._clips[test_set]

    def datastore_of(self, run: Run, captioner: Captioner) -> CaptionDatastore | None:
        """What a run retrieves from: a datastore, a share of it, or the same with an index; None for nothing."""
        if not run.datastore:
            return None
        store = self.datastore(run.datastore, captioner, by_audio=run.method == AUDIO_TO_AUDIO)
        if run.share < 1:
            order = np.random.default_rng(0).permutation(len(store))
            rows = np.sort(order[: max(1, round(run.share * len(store)))])
            return CaptionDatastore([store.records[row] for row in rows], store.embeddings[rows], store.fingerprint)
        if run.index:
            from recap_hf.datastore import build_index

            store.set_index(build_index(store.embeddings, run.index))
        return store

    def datastore(
        self, composition: tuple[str, ...], captioner: Captioner, by_audio: bool = False
    ) -> CaptionDatastore:
        """The datastore of some domains' training captions, or the large one; built once for all models of a CLAP.

        `by_audio`: the captions are found by the audio of their clips instead of by their text.
        """
        folder = self.path / "datastores" / ("+".join(composition) + ("-by-audio" if by_audio else ""))
        if (folder / "datastore.json").is_file():
            return CaptionDatastore.from_pretrained(folder)
        self.log(f"building {folder}")
        names = self.config.domains if composition == (LARGE,) else composition
        if by_audio:
            from recap_hf.datastore import datastore_from_clips

            clips = [row for name in names for row in self._training_table(name, needs_audio=True)]
            clips = [{key: value for key, value in row.items() if key != "split"} for row in clips]
            store = datastore_from_clips(clips, captioner.model, captioner.processor)
        else:
            records = [record for name in names for record in self.training_captions(name)]
            records += self._further_captions() if composition == (LARGE,) else []
            store = CaptionDatastore.from_captions(records, captioner.model, captioner.processor)
        store.save_pretrained(folder)
        return store

    def _further_captions(self) -> list[dict[str, Any]]:
        from recap_hf import read_captions

        files = self.config.large.get("files", [])
        return [{"source": Path(path).name, **record} for path in files for record in read_captions(path)]

    def training_captions(self, name: str) -> list[dict[str, Any]]:
        """Captions of a domain's training split, with clip, source and licence."""
        if name not in self._captions:
            self._captions[name] = [
                {"caption": caption, **{key: row[key] for key in ("clip_id", "source", "licence")}}
                for row in self._training_table(name, needs_audio=False)
                for caption in row["captions"]
            ]
        return self._captions[name]

    def _training_table(self, name: str, needs_audio: bool) -> Any:
        from recap_hf.data import load_captions

        domain = self.config.domains[name]
        options: dict[str, Any] = {"split": "train", "columns": domain.columns, "needs_audio": needs_audio}
        if needs_audio:
            options |= {"audio_dir": domain.audio_dir, "allow_missing": domain.allow_missing}
        return load_captions(domain.dataset, domain.data_dir, **options).dataset

    # ------------------------------------------------------------------ rows

    def is_scored(self, run: Run) -> bool:
        """Whether a run is finished."""
        return (self.path / run.folder / SCORES_FILE).is_file()

    def is_main(self, run: Run) -> bool:
        """Whether a run belongs to the row that the paper calls DS."""
        return self.label(run) == MAIN_ROW

    def label(self, run: Run) -> str:
        """Name of a run's row."""
        return self.config.run_label(run)


def _key(training_set: tuple[str, ...], method: str) -> str:
    return "+".join(training_set) + (f":{method}" if method else "")
