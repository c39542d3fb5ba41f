"""The tables and claims of a grid, from its finished runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.files import write_json, write_text
from recap_hf.scoring import METRIC_LABELS, Difference
from recap_hf.scoring.bootstrap import gain_difference, mean_difference

from .clips import estimate_events, read_events
from .folder import RUN_FILE, SCORES_FILE, EvaluationFolder
from .grid import Grid
from .grid_config import AUDIO_TO_AUDIO, ESTIMATED, LARGE, LARGE_ROW, MAIN_ROW, PREFIX, RELATED_LABELS, Run
from .paper_tables import OurRow, PaperTable, paper_table
from .published import TEST_SETS
from .systems import MAIN_SYSTEM
from .tables import markdown_table

RESULT_FILE, TABLE3_FILE = "grid.json", "settings.md"
# Tables beside those of the paper: title and columns, after training set and test set.
ANALYSES = {
    "events": ("Scores by number of events", ("Method", "Metric", "One event", "Two events", "Three or more")),
    "novel_words": ("Words that no training caption has", ("Method", "Words in the references", "Recall")),
    "stores": ("Datastore size and index", ("Datastore", "Captions", "Index", "Metric", "Score", "Interval")),
}
_BASELINE_CLAIMS = {
    "no_captions": "retrieved captions in the prompt help",
    "random_captions": "it matters which captions",
    "no_audio": "the audio helps",
    "first_retrieved": "the captioner beats its first retrieved caption",
}
_RELATED_CLAIMS = {
    RELATED_LABELS[PREFIX]: "the captioner beats a tuned prefix",
    f"{RELATED_LABELS[AUDIO_TO_AUDIO]} {MAIN_ROW}": "captions of similar text beat captions of similar audio",
}


@dataclass(frozen=True)
class Row:
    """One row of a table: a system of some runs, one run per seed, at the k of the tables (a prefix has none)."""

    training_set: tuple[str, ...]
    test_set: str
    label: str
    system: str
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """Name of the row: its label, after the system for a baseline."""
        return self.label if self.system == MAIN_SYSTEM else f"{self.system} ({self.label})"


class GridResults:
    """Reads the finished runs of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.config = grid, grid.config
        self.scored = [run for run in grid.runs() if grid.is_scored(run)]
        self._scores: dict[Run, dict[str, Any]] = {}

    def scores(self, run: Run) -> dict[str, Any]:
        """The scores of a run: the content of its `scores.json`."""
        if run not in self._scores:
            path = self.grid.path / run.folder / SCORES_FILE
            self._scores[run] = json.loads(path.read_text(encoding="utf-8"))
        return self._scores[run]

    def rows(self, training_set: tuple[str, ...], test_set: str, every_k: bool = False) -> list[Row]:
        """The rows of the tables, all systems of each label; `every_k`: also those at other k than the first."""
        runs_of: dict[str, list[Run]] = {}
        for run in self.scored:
            other_k = run.k not in (0, self.config.k[0])
            if (run.training_set, run.test_set) != (training_set, test_set) or run.varies_datastore:
                continue
            if every_k or not other_k:
                runs_of.setdefault(self.grid.label(run) + (f", k = {run.k}" if other_k else ""), []).append(run)
        return [
            Row(training_set, test_set, label, system, tuple(runs))
            for label, runs in runs_of.items()
            for system in self.scores(runs[0])["systems"]
        ]

    def all_rows(self) -> Iterator[Row]:
        """The rows of all training and test sets; baselines only of the main row."""
        for training_set in self.config.training_sets:
            for test_set in self.config.domains:
                for row in self.rows(training_set, test_set):
                    if row.system == MAIN_SYSTEM or row.label == MAIN_ROW:
                        yield row

    def clip_scores(self, row: Row, metric: str) -> tuple[tuple[str, ...], np.ndarray]:
        """Names of the clips and scores of a row, (num_clips,), the mean over its seeds."""
        columns, names = [], ()
        for run in row.runs:
            path = EvaluationFolder.scores_path(self.grid.path / run.folder, row.system)
            clips = json.loads(path.read_text(encoding="utf-8"))["clips"]
            names = tuple(clip["clip_id"] for clip in clips)
            columns.append([clip[metric] for clip in clips])
        return names, np.mean(columns, axis=0)

    def metric(self, run: Run) -> str:
        """The metric of the claims: SPIDEr as in the paper, or CIDEr-D if SPICE was skipped."""
        corpus = self.scores(run)["systems"][MAIN_SYSTEM]["corpus"]
        metric = next((key for key in ("spider", "cider_d") if corpus.get(key) is not None), None)
        if metric is None:
            raise ValueError(f"{run.folder} has neither SPIDEr nor CIDEr-D, on which the claims are judged")
        return metric

    def titles(self, training_set: tuple[str, ...], test_set: str) -> list[str]:
        """Names for people of a training set and a test set."""
        return [self.config.training_title(training_set), self.config.domains[test_set].title]

    def events(self, test_set: str, clip_ids: Sequence[str]) -> np.ndarray | None:
        """Number of events of each clip, from the domain's file or estimated; None if the domain has neither."""
        source = self.config.domains[test_set].events
        if source is None or source != ESTIMATED:
            return source and read_events(source, clip_ids)
        references = self.references(test_set)
        return np.array([estimate_events(references[clip_id]) for clip_id in clip_ids])

    def references(self, test_set: str) -> dict[str, list[str]]:
        """References of a domain's test clips, by clip."""
        clips = self.grid.clips(test_set)
        return dict(zip(clips.clip_ids, clips.references, strict=True))

    # ---------------------------------------------------------------- tables

    def tables(self) -> list[PaperTable]:
        """One table per test set, in the layout of the paper."""
        tables = []
        for test_set in self.config.domains:
            runs = [run for run in self.scored if run.test_set == test_set and not run.varies_datastore]
            if runs:
                rows = [row for sets in self.config.training_sets for row in self.rows(sets, test_set, every_k=True)]
                ours, notes = list(map(self._our_row, rows)), self._notes(runs)
                tables.append(paper_table(test_set, ours, notes=notes, with_published=test_set in TEST_SETS))
        return tables

    def _our_row(self, row: Row) -> OurRow:
        training = self.config.training
        clap = str(training.get("clap") or training.get("model") or "of the checkpoint")
        contents = [self.scores(run) for run in row.runs]
        return OurRow(
            self.config.training_title(row.training_set),
            row.name,
            [content["systems"][row.system]["corpus"] for content in contents],
            contents[0]["clip_list"]["num_clips"],
            Path(clap).name if Path(clap).exists() else clap,
        )

    def _notes(self, runs: list[Run]) -> list[str]:
        first = self.scores(runs[0])
        clips = first["clip_list"]
        notes = [f"Our rows: {clips['num_clips']} clips of the list {clips['name']} (sha256 {clips['sha256'][:12]})."]
        if self.config.clap_note:
            notes.append(f"CLAP: {self.config.clap_note}.")
        notes += [f"{key} skipped: {reason}" for key, reason in first["skipped"].items()]
        everywhere = {self.grid.label(run) for run in runs}
        for note in dict.fromkeys(note for run in runs for note in self.scores(run)["notes"]):
            labels = {self.grid.label(run) for run in runs if note in self.scores(run)["notes"]}
            notes.append(note if labels == everywhere else f"{', '.join(sorted(labels))}: {note}")
        if any(run.method for run in runs):
            notes.append(
                "The related methods are reimplementations of the idea on the same CLAP and language model, trained "
                "by the same command on the same data; they are not the published systems."
            )
        sources = self._large_sources()
        return [*notes, f"DSlarge: {sources}."] if sources else notes

    def _large_sources(self) -> str:
        """Counts by source and licence of the large datastore, if it is built."""
        from recap_hf import CaptionDatastore

        folder = self.grid.path / "datastores" / LARGE
        if not (folder / "datastore.json").is_file():
            return ""
        records = CaptionDatastore.from_pretrained(folder).records
        counts = Counter(
            (record.get("source") or "unnamed source", record.get("licence") or "licence not stated")
            for record in records
        )
        return "; ".join(f"{count:,} captions of {source} ({licence})" for (source, licence), count in counts.items())

    def analysis(self, name: str) -> list[list[str]]:
        """The rows of one of `ANALYSES`."""
        if name == "stores":
            return [self._store_cells(run) for run in self.scored if self._shows_store(run)]
        cells_of = self._event_cells if name == "events" else self._novel_cells
        rows = [(row, cells_of(row)) for row in self.all_rows()]
        return [[*self.titles(row.training_set, row.test_set), row.name, *cells] for row, cells in rows if cells]

    def _event_cells(self, row: Row) -> list[str]:
        metric = self.metric(row.runs[0])
        clip_ids, values = self.clip_scores(row, metric)
        events = self.events(row.test_set, clip_ids)
        if events is None:
            return []
        groups = [values[events == 1], values[events == 2], values[events > 2]]
        cells = [f"{group.mean():.3f} ({len(group)} clips)" if len(group) else "-" for group in groups]
        return [METRIC_LABELS[metric], *cells]

    def _novel_cells(self, row: Row) -> list[str]:
        statistics = [self.scores(run)["systems"][row.system]["statistics"] for run in row.runs]
        recalls = [entry.get("novel_word_recall") for entry in statistics]
        return [] if None in recalls else [str(statistics[0]["novel_reference_words"]), f"{np.mean(recalls):.3f}"]

    def _shows_store(self, run: Run) -> bool:
        if not (self.config.shares or self.config.indexes) or run.method or run.k != self.config.k[0]:
            return False
        return run.varies_datastore or run.datastore == self.grid.varied_datastore(run)

    def _store_cells(self, run: Run) -> list[str]:
        metric, scores = self.metric(run), self.scores(run)["systems"][MAIN_SYSTEM]
        settings = json.loads((self.grid.path / run.folder / RUN_FILE).read_text(encoding="utf-8"))
        store = settings["captioner"]["datastore"]
        low, high = scores["intervals"][metric]
        label = self.config.datastore_label(run.datastore, run.training_set, run.test_set)
        cells = [str(store["captions"]), store["index"], METRIC_LABELS[metric], f"{scores['corpus'][metric]:.4f}"]
        return [*self.titles(run.training_set, run.test_set), label, *cells, f"[{low:.4f}, {high:.4f}]"]

    # ---------------------------------------------------------------- claims

    def claims(self) -> list[dict[str, Any]]:
        """The paper's claims, and whether the captioner beats its baselines, on every pair of rows.

        Each has `claim`, `setting`, `metric`, `difference`, `low`, `high` (95 % interval over the clips), `verdict`.
        """
        sets = [(names, test_set) for names in self.config.training_sets for test_set in self.config.domains]
        return [claim for names, test_set in sets for claim in self._claims_of(names, test_set)]

    def _claims_of(self, training_set: tuple[str, ...], test_set: str) -> Iterator[dict[str, Any]]:
        rows = {(row.label, row.system): row for row in self.rows(training_set, test_set)}
        main = rows.get((MAIN_ROW, MAIN_SYSTEM))
        if main is None:
            return
        metric, resamples = self.metric(main.runs[0]), self.config.resamples
        place = "trained on {}, tested on {}".format(*self.titles(training_set, test_set))
        clip_ids, best = self.clip_scores(main, metric)

        def claim(text: str, what: str, difference: Difference) -> dict[str, Any]:
            numbers = {"difference": difference.difference, "low": difference.low, "high": difference.high}
            return {
                "claim": text,
                "setting": f"{place}: {what}",
                "metric": metric,
                **numbers,
                "verdict": difference.verdict,
            }

        def better(text: str, name: str, row: Row) -> dict[str, Any]:
            other = self._same_clips(row, metric, clip_ids)
            return claim(text, f"{MAIN_ROW} minus {name}", mean_difference(other, best, resamples))

        if test_set not in training_set:
            for (label, system), row in rows.items():
                if system == MAIN_SYSTEM and label not in (MAIN_ROW, LARGE_ROW) and not row.runs[0].method:
                    yield better("an in-domain datastore beats an out-of-domain one", label, row)
        if (LARGE_ROW, MAIN_SYSTEM) in rows:
            large = self._same_clips(rows[LARGE_ROW, MAIN_SYSTEM], metric, clip_ids)
            difference = mean_difference(best, large, resamples)
            yield claim("a large datastore improves on it", f"{LARGE_ROW} minus {MAIN_ROW}", difference)
        for system, text in _BASELINE_CLAIMS.items():
            yield better(text, system, rows[MAIN_ROW, system])
        for label, text in _RELATED_CLAIMS.items():
            if (label, MAIN_SYSTEM) in rows:
                yield better(text, label, rows[label, MAIN_SYSTEM])
        events = self.events(test_set, clip_ids)
        if events is not None and len(set(events > 1)) == 2:
            gains = best - self._same_clips(rows[MAIN_ROW, "no_captions"], metric, clip_ids)
            what = f"gain of {MAIN_ROW} over no_captions, several events minus one"
            yield claim(
                "retrieval helps clips of several events more", what, gain_difference(gains, events > 1, resamples)
            )

    def _same_clips(self, row: Row, metric: str, clip_ids: tuple[str, ...]) -> np.ndarray:
        names, values = self.clip_scores(row, metric)
        if names != clip_ids:
            raise ValueError(f"{row.runs[0].folder} is about other clips than the main row of its table")
        return values

    # ---------------------------------------------------------------- output

    def write(self) -> str:
        """Writes `tables.md`, `settings.md` and `grid.json`; returns the text of the first."""
        from .table3 import four_settings, settings_markdown

        tables, claims = self.tables(), self.claims()
        parts = [table.to_markdown() for table in tables] + [claims_markdown(claims)]
        analyses = {}
        for key, (title, columns) in ANALYSES.items():
            header, rows = ("Training set", "Test set", *columns), self.analysis(key)
            analyses[key] = {"title": title, "header": header, "rows": rows}
            parts += [f"### {title}\n\n{markdown_table(header, rows)}"] if rows else []
        settings = four_settings(self)
        page = settings_markdown(settings)
        write_text(self.grid.path / TABLE3_FILE, page)
        text = "\n".join([*parts, page] if settings else parts)
        write_text(self.grid.path / "tables.md", text)
        runs = [{**asdict(run), "folder": run.folder, "label": self.grid.label(run)} for run in self.scored]
        content = {"tables": [asdict(table) for table in tables], **analyses, "settings": settings, "claims": claims}
        write_json(self.grid.path / RESULT_FILE, {**content, "runs": runs})
        return text


def claims_markdown(claims: Sequence[dict[str, Any]]) -> str:
    """The table of claims."""
    rows = [
        [
            claim["claim"],
            claim["setting"],
            METRIC_LABELS[claim["metric"]],
            f"{claim['difference']:+.4f}",
            f"[{claim['low']:+.4f}, {claim['high']:+.4f}]",
            claim["verdict"],
        ]
        for claim in claims
    ]
    title = "### Claims\n\nDifferences over clips, means over seeds, with 95% bootstrap intervals.\n"
    return f"{title}\n{markdown_table(['Claim', 'Setting', 'Metric', 'Difference', 'Interval', 'Verdict'], rows)}"
