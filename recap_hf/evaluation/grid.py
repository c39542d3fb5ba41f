"""The paper's grid: train, caption and score every combination; what is finished is not done again."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf import read_captions
from recap_hf.data import load_captions
from recap_hf.datastore import build_index, datastore_from_clips
from recap_hf.files import write_json
from recap_hf.modeling.captioning_recap import Captioner
from recap_hf.modeling.options_recap import CaptionOptions
from recap_hf.modeling.retrieval_recap import MANIFEST_NAME, CaptionDatastore
from recap_hf.scoring import ScoringTools

from .clips import EvaluationClips, load_test_clips
from .grid_config import AUDIO_TO_AUDIO, LARGE, PREFIX, RELATED_METHODS, GridConfig, Model, Run
from .runner import SCORES_FILE, caption_clips, score_folder
from .systems import MAIN_SYSTEM, EncodingCache, Systems, load_captioner

REPORT_OF_TRAINING = "report.json"


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
        self._encodings = EncodingCache()
        # Read once for all runs.
        self.clips = cache(self._load_clips)
        self.training_captions = cache(self._load_training_captions)

    def plan(self) -> str:
        """What would be done, in words."""
        folders = [self.model_folder(model) for model in self.config.all_models() if not self._is_given(model)]
        runs = list(self.config.runs())
        lines = [f"{len(folders)} trainings, {len(runs)} evaluations"]
        lines += [f"train {folder}{' (done)' * (folder / REPORT_OF_TRAINING).is_file()}" for folder in folders]
        lines += [f"evaluate {run.folder}{' (done)' * self.is_scored(run)}" for run in runs]
        return "\n".join(lines)

    def _is_given(self, model: Model) -> bool:
        return model.key in self.config.models

    def model_folder(self, model: Model) -> Path:
        """Folder of a captioner."""
        if self._is_given(model):
            return Path(self.config.models[model.key][self.config.seeds.index(model.seed)])
        return self.path / "models" / model.name

    def is_scored(self, run: Run) -> bool:
        """Whether a run is finished."""
        return (self.path / run.folder / SCORES_FILE).is_file()

    def train_all(self) -> None:
        """Trains every captioner that is neither given nor finished. Raises `RuntimeError` if a training fails."""
        for model in self.config.all_models():
            folder = self.model_folder(model)
            if self._is_given(model) or (folder / REPORT_OF_TRAINING).is_file():
                continue
            domains = [self.config.domains[name] for name in model.training_set]
            method = RELATED_METHODS[model.method] | self.config.related_methods[model.method] if model.method else {}
            pairs = [pair for domain in domains for pair in (domain.get("columns") or {}).items()]
            settings = {
                # Encoded clips are found by content: all trainings share them.
                "feature_cache": str(self.path / "features"),
                **self.config.training,
                **method,
                **{key: [d[key] for d in domains if d.get(key)] for key in ("dataset", "data_dir", "audio_dir")},
                "columns": [f"{ours}={theirs}" for ours, theirs in pairs],
                "allow_missing": any(domain.get("allow_missing") for domain in domains),
                "seed": model.seed,
                "output_dir": str(folder),
                "resume": True,
            }
            folder.mkdir(parents=True, exist_ok=True)
            recipe = write_json(folder / "recipe.json", settings)
            self.log(f"training {folder}")
            # A process of its own: nothing of one training can change the next.
            command = [sys.executable, "-m", "recap_cli", "train", "--config", str(recipe)]
            status = subprocess.run(command, check=False).returncode
            if status:
                raise RuntimeError(f"the training of {folder} ended with status {status}; see its messages above")

    def evaluate_all(self) -> None:
        """Captions and scores every run that is not finished."""
        loaded: tuple[Model | None, Captioner | None] = (None, None)
        with self.scoring_tools() as tools:
            for run in self.config.runs():
                if self.is_scored(run):
                    continue
                if loaded[0] != run.model:
                    options = {key: self.config.evaluation.get(key) for key in ("device", "dtype")}
                    loaded = run.model, load_captioner(str(self.model_folder(run.model)), "none", **options)
                self._evaluate(run, loaded[1], tools)

    def scoring_tools(self) -> ScoringTools:
        """What the scores run on, by the settings in `scoring`."""
        return ScoringTools(**{key: value for key, value in self.config.scoring.items() if key != "metrics"})

    def _evaluate(self, run: Run, captioner: Captioner, tools: ScoringTools) -> None:
        self.log(f"evaluating {run.folder}")
        evaluation = self.config.evaluation
        captioner = captioner.with_options(self.config.caption_options.merged_with(CaptionOptions(k=run.k)))
        if run.datastore:
            captioner = captioner.with_datastore(self.datastore(run, captioner))
        names = [MAIN_SYSTEM] if run.model.method == PREFIX else [MAIN_SYSTEM, "first_retrieved"]
        clips = self.clips(run.test_set)
        # All baselines of the row that the claims are about.
        names = None if self.config.is_main(run) and run.k == self.config.k[0] else names
        systems = Systems(captioner, 0, evaluation.get("exclude_references", False), self._encodings)
        sources = {"model": run.model.name, "datastore": self.config.label(run)}
        how = {"names": names, "batch_size": evaluation.get("batch_size", 16), "sources": sources}
        folder = caption_clips(systems, clips, self.path / run.folder, **how)
        known = [record["caption"] for name in run.model.training_set for record in self.training_captions(name)]
        options = {"tools": tools, "metrics": self.config.scoring.get("metrics"), "training_captions": known}
        score_folder(folder, clips.name, resamples=self.config.resamples, notes=clips.notes, **options)

    def _load_clips(self, test_set: str) -> EvaluationClips:
        """The test clips of a domain."""
        domain = self.config.domains[test_set]
        return load_test_clips(**{key: value for key, value in domain.items() if key != "events"})

    def datastore(self, run: Run, captioner: Captioner) -> CaptionDatastore:
        """What a run retrieves from: its datastore, a share of it, or the same with another index.

        The whole datastore is built once for all models of a CLAP.
        """
        by_audio = run.model.method == AUDIO_TO_AUDIO
        folder = self.path / "datastores" / ("+".join(run.datastore) + ("-by-audio" if by_audio else ""))
        if not (folder / MANIFEST_NAME).is_file():
            self.log(f"building {folder}")
            self._build(run.datastore, captioner, by_audio).save_pretrained(folder)
        store = CaptionDatastore.from_pretrained(folder)
        if run.share < 1:
            order = np.random.default_rng(0).permutation(len(store))
            rows = np.sort(order[: max(1, round(run.share * len(store)))])
            return CaptionDatastore([store.records[row] for row in rows], store.embeddings[rows], store.fingerprint)
        if run.index:
            store.set_index(build_index(store.embeddings, run.index))
        return store

    def _build(self, composition: tuple[str, ...], captioner: Captioner, by_audio: bool) -> CaptionDatastore:
        """All training captions of some domains or the large datastore, found by text or by the audio of clips."""
        is_large = composition == (LARGE,)
        names = self.config.domains if is_large else composition
        if by_audio:
            kept = ["clip_id", "audio", "captions", "source", "licence"]
            tables = [self._training_table(name, needs_audio=True).select_columns(kept) for name in names]
            clips = [row for table in tables for row in table]
            return datastore_from_clips(clips, captioner.model, captioner.processor)
        records = [record for name in names for record in self.training_captions(name)]
        for path in self.config.large.get("files", []) if is_large else ():
            records += [{"source": Path(path).name, **record} for record in read_captions(path)]
        return CaptionDatastore.from_captions(records, captioner.model, captioner.processor)

    def _load_training_captions(self, name: str) -> list[dict[str, Any]]:
        """Captions of a domain's training split, with clip, source and licence."""
        return [
            {"caption": caption, **{key: row[key] for key in ("clip_id", "source", "licence")}}
            for row in self._training_table(name, needs_audio=False)
            for caption in row["captions"]
        ]

    def _training_table(self, name: str, needs_audio: bool) -> Any:
        domain = self.config.domains[name]
        wanted = ("data_dir", "columns", *(("audio_dir", "allow_missing") if needs_audio else ()))
        options = {key: domain[key] for key in wanted if key in domain}
        return load_captions(domain["dataset"], split="train", needs_audio=needs_audio, **options).dataset
