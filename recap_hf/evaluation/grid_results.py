"""The tables and claims of a grid, from the runs that are there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .claims import Claim, ClipScores, difference_claim, gain_claim
from .events import estimate_events, read_events
from .folder import RUN_FILE, SCORES_FILE, EvaluationFolder
from .grid import Grid
from .grid_config import AUDIO_TO_AUDIO, ESTIMATED, LARGE, NEIGHBOUR_LABELS, PREFIX, Run
from .paper_tables import OurRow, PaperTable, paper_table
from .published import TEST_SETS
from .text_tables import COLUMNS, markdown_table

RESULT_FILE, SETTINGS_FILE = "grid.json", "settings.md"
EVENTS_HEADER = ("Training set", "Test set", "Method", "Metric", "One event", "Two events", "Three or more")
STORE_HEADER = ("Training set", "Test set", "Datastore", "Captions", "Index", "Metric", "Score", "Interval")
NOVEL_HEADER = ("Training set", "Test set", "Method", "Words in the references", "Recall")
_BASELINE_CLAIMS = {
    "no_retrieval": "retrieved captions in the prompt help",
    "random_captions": "it matters which captions",
    "audio_hidden": "hearing the audio helps",
    "first_retrieved": "the captioner beats its first retrieved caption",
}
_NEIGHBOUR_CLAIMS = {
    NEIGHBOUR_LABELS[PREFIX]: "the captioner beats a tuned prefix",
    f"{NEIGHBOUR_LABELS[AUDIO_TO_AUDIO]} w/ DS": "captions of similar text beat captions of similar audio",
}


class GridResults:
    """Reads the runs of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.config = grid.config

    def scored(self) -> list[Run]:
        """The runs that are there."""
        return [run for run in self.grid.runs() if self.grid.is_scored(run)]

    def _scores(self, run: Run) -> dict[str, Any]:
        return json.loads((self.grid.path / run.folder / SCORES_FILE).read_text(encoding="utf-8"))

    def clip_scores(self, runs: list[Run], system: str, metric: str) -> ClipScores:
        """Per-clip scores of one row, averaged over its seeds."""
        columns, names = [], ()
        for run in runs:
            path = EvaluationFolder.scores_path(self.grid.path / run.folder, system)
            clips = json.loads(path.read_text(encoding="utf-8"))["clips"]
            names = tuple(clip["clip_id"] for clip in clips)
            columns.append([clip[metric] for clip in clips])
        return ClipScores(names, np.mean(columns, axis=0))

    def tables(self) -> list[PaperTable]:
        """One table a test set, in the layout of the paper, from the runs that are there."""
        tables = []
        for test_set in self.config.domains:
            runs = [run for run in self.scored() if run.test_set == test_set and not run.varies_the_store]
            if not runs:
                continue
            rows = [row for training_set in self.config.training_sets for row in self._rows(training_set, runs)]
            tables.append(paper_table(test_set, rows, notes=self._notes(runs), with_published=test_set in TEST_SETS))
        return tables

    def _rows(self, training_set: tuple[str, ...], runs: list[Run]) -> list[OurRow]:
        rows = []
        groups: dict[tuple[str, int], list[Run]] = {}
        for run in runs:
            if run.training_set == training_set:
                groups.setdefault((self.grid.label(run), run.k), []).append(run)
        for (label, k), members in groups.items():
            label += f", k = {k}" if k not in (0, self.config.k[0]) else ""
            contents = [self._scores(run) for run in members]
            for system in contents[0]["systems"]:
                name = label if system == "recap" else f"{system} ({label})"
                rows.append(
                    OurRow(
                        self.config.training_title(training_set),
                        name,
                        [content["systems"][system]["corpus"] for content in contents],
                        contents[0]["clip_list"]["num_clips"],
                        self._clap_name(),
                    )
                )
        return rows

    def _clap_name(self) -> str:
        """The CLAP checkpoint as the table names it: its Hub id, or the last part of a path."""
        training = self.config.training
        name = str(training.get("clap") or training.get("model") or "of the checkpoint")
        return Path(name).name if Path(name).exists() else name

    def _notes(self, runs: list[Run]) -> list[str]:
        first = self._scores(runs[0])
        clips = first["clip_list"]
        notes = [f"Our rows: {clips['num_clips']} clips of the list {clips['name']} (sha256 {clips['sha256'][:12]})."]
        if self.config.clap_note:
            notes.append(f"CLAP: {self.config.clap_note}.")
        notes += [f"{key} skipped: {reason}" for key, reason in first["skipped"].items()]
        labels_of: dict[str, set[str]] = {}
        for run in runs:
            for note in self._scores(run)["notes"]:
                labels_of.setdefault(note, set()).add(self.grid.label(run))
        everywhere = {self.grid.label(run) for run in runs}
        for note, labels in labels_of.items():
            notes.append(note if labels == everywhere else f"{', '.join(sorted(labels))}: {note}")
        if any(run.neighbour for run in runs):
            notes.append(
                "The neighbours are reimplementations of the idea on the same CLAP and language model, trained by the "
                "same command on the same data; they are not the published systems."
            )
        sources = self._large_sources()
        return [*notes, f"DSlarge: {sources}."] if sources else notes

    def _large_sources(self) -> str:
        """Counts by source and licence of the large datastore, where it is built."""
        path = self.grid.path / "datastores" / LARGE / "captions.jsonl"
        if not path.is_file():
            return ""
        counts: dict[tuple[str, str], int] = {}
        with open(path, encoding="utf-8") as handle:
            for line in handle:
                record = json.loads(line)
                key = record.get("source") or "unnamed source", record.get("licence") or "licence not stated"
                counts[key] = counts.get(key, 0) + 1
        return "; ".join(f"{count:,} captions of {source} ({licence})" for (source, licence), count in counts.items())

    def claims(self) -> list[Claim]:
        """The paper's claims, and whether the captioner beats its dull baselines, on every pair of rows there is."""
        claims = []
        for training_set in self.config.training_sets:
            for test_set in self.config.domains:
                claims += self._claims_of(training_set, test_set)
        return claims

    def _claims_of(self, training_set: tuple[str, ...], test_set: str) -> Iterator[Claim]:
        rows = self.rows_by_label(training_set, test_set)
        main = rows.get("w/ DS")
        if not main:
            return
        metric = self.metric(main[0])
        place = (
            f"trained on {self.config.training_title(training_set)}, tested on {self.config.domains[test_set].title}"
        )
        best = self.clip_scores(main, "recap", metric)

        def better(claim: str, runs: list[Run], system: str, name: str) -> Claim:
            other = self.clip_scores(runs, system, metric)
            return difference_claim(claim, f"{place}: w/ DS minus {name}", metric, other, best, self.config.resamples)

        if test_set not in training_set:
            for label, runs in rows.items():
                if label not in ("w/ DS", "w/ DSlarge") and not runs[0].neighbour:
                    yield better("an in-domain datastore beats an out-of-domain one", runs, "recap", label)
        if "w/ DSlarge" in rows:
            large = self.clip_scores(rows["w/ DSlarge"], "recap", metric)
            setting = f"{place}: w/ DSlarge minus w/ DS"
            claim = "a large datastore improves on it"
            yield difference_claim(claim, setting, metric, best, large, self.config.resamples)
        for system, claim in _BASELINE_CLAIMS.items():
            yield better(claim, main, system, system)
        for label, claim in _NEIGHBOUR_CLAIMS.items():
            if label in rows:
                yield better(claim, rows[label], "recap", label)
        events = self.events(test_set, best.clip_ids)
        if events is not None and len(set(events > 1)) == 2:
            yield gain_claim(
                "retrieval helps clips of several events more",
                f"{place}: gain of w/ DS over no_retrieval, several events minus one",
                metric,
                self.clip_scores(main, "no_retrieval", metric),
                best,
                events > 1,
                self.config.resamples,
            )

    def rows_by_label(self, training_set: tuple[str, ...], test_set: str) -> dict[str, list[Run]]:
        """The finished runs of each row, one a seed, at the table's k (a prefix has none)."""
        rows: dict[str, list[Run]] = {}
        for run in self.scored():
            of_the_table = run.k in (0, self.config.k[0]) and not run.varies_the_store
            if (run.training_set, run.test_set) == (training_set, test_set) and of_the_table:
                rows.setdefault(self.grid.label(run), []).append(run)
        return rows

    def metric(self, run: Run) -> str:
        """The metric of the claims: SPIDEr as in the paper, CIDEr-D where SPICE was skipped."""
        corpus = self._scores(run)["systems"]["recap"]["corpus"]
        metric = next((key for key in ("spider", "cider_d") if corpus.get(key) is not None), None)
        if metric is None:
            raise ValueError(f"{run.folder} has neither SPIDEr nor CIDEr-D, on which the claims are judged")
        return metric

    def events(self, test_set: str, clip_ids: tuple[str, ...]) -> np.ndarray | None:
        """Number of events of each clip, from the domain's file or estimated; None where the domain has neither."""
        source = self.config.domains[test_set].events
        if source is None:
            return None
        if source != ESTIMATED:
            return read_events(source, clip_ids)
        clips = self.grid.clips(test_set)
        references = dict(zip(clips.clip_ids, clips.references, strict=True))
        return np.array([estimate_events(references[clip_id]) for clip_id in clip_ids])

    def compositional(self) -> list[list[str]]:
        """Rows of the table of scores by number of events."""
        rows = []
        for training_set in self.config.training_sets:
            for test_set in self.config.domains:
                by_label = self.rows_by_label(training_set, test_set)
                for label, runs in by_label.items():
                    metric = self.metric(runs[0])
                    systems = list(self._scores(runs[0])["systems"]) if label == "w/ DS" else ["recap"]
                    for system in systems:
                        scores = self.clip_scores(runs, system, metric)
                        events = self.events(test_set, scores.clip_ids)
                        if events is None:
                            continue
                        groups = (events == 1, events == 2, events > 2)
                        cells = [_mean_of(scores.values[group]) for group in groups]
                        place = [self.config.training_title(training_set), self.config.domains[test_set].title]
                        name = label if system == "recap" else f"{system} ({label})"
                        rows.append([*place, name, COLUMNS[metric], *cells])
        return rows

    def stores(self) -> list[list[str]]:
        """Rows of the table of datastore sizes and kinds of index, with the whole datastore searched exactly."""
        rows = []
        for run in self.scored():
            if not (self.config.shares or self.config.indexes) or run.neighbour or run.k != self.config.k[0]:
                continue
            if not run.varies_the_store and run.datastore != self._varied_store(run):
                continue
            metric, scores = self.metric(run), self._scores(run)
            settings = json.loads((self.grid.path / run.folder / RUN_FILE).read_text(encoding="utf-8"))
            store = settings["captioner"]["datastore"]
            low, high = scores["systems"]["recap"]["intervals"][metric]
            place = [self.config.training_title(run.training_set), self.config.domains[run.test_set].title]
            value = scores["systems"]["recap"]["corpus"][metric]
            cells = [
                str(store["captions"]),
                store["index"],
                COLUMNS[metric],
                f"{value:.4f}",
                f"[{low:.4f}, {high:.4f}]",
            ]
            rows.append([*place, self.config.datastore_label(run.datastore, run.training_set, run.test_set), *cells])
        return rows

    def _varied_store(self, run: Run) -> tuple[str, ...]:
        return run.datastore if self.config.large is None and self.grid.is_main(run) else (LARGE,)

    def novel_words(self) -> list[list[str]]:
        """Rows of the table of words that the training captions lack: how many, and how many each row says."""
        rows = []
        for training_set in self.config.training_sets:
            for test_set in self.config.domains:
                for label, runs in self.rows_by_label(training_set, test_set).items():
                    contents = [self._scores(run)["systems"] for run in runs]
                    for system in contents[0] if label == "w/ DS" else ["recap"]:
                        statistics = [content[system]["statistics"] for content in contents]
                        recalls = [entry.get("novel_word_recall") for entry in statistics]
                        if None not in recalls:
                            name = label if system == "recap" else f"{system} ({label})"
                            count = str(statistics[0]["novel_reference_words"])
                            place = [self.config.training_title(training_set), self.config.domains[test_set].title]
                            rows.append([*place, name, count, f"{np.mean(recalls):.3f}"])
        return rows

    def write(self) -> str:
        """Writes `tables.md`, `settings.md` and `grid.json`; returns the text of the first."""
        from .settings import four_settings, settings_markdown

        tables, claims = self.tables(), self.claims()
        analyses = {
            "events": ("Scores by number of events", EVENTS_HEADER, self.compositional()),
            "novel_words": ("Words that no training caption has", NOVEL_HEADER, self.novel_words()),
            "stores": ("Datastore size and index", STORE_HEADER, self.stores()),
        }
        text = "\n".join(table.to_markdown() for table in tables) + "\n" + claims_markdown(claims)
        for title, header, rows in analyses.values():
            if rows:
                text += f"\n### {title}\n\n{markdown_table(header, rows)}"
        settings = four_settings(self)
        page = settings_markdown(settings)
        (self.grid.path / SETTINGS_FILE).write_text(page, encoding="utf-8")
        text += f"\n{page}" if settings else ""
        (self.grid.path / "tables.md").write_text(text, encoding="utf-8")
        content = {
            "tables": [asdict(table) for table in tables],
            **{
                key: {"title": title, "header": header, "rows": rows}
                for key, (title, header, rows) in analyses.items()
            },
            "settings": settings,
            "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in claims],
            "runs": [{**asdict(run), "folder": run.folder, "label": self.grid.label(run)} for run in self.scored()],
        }
        (self.grid.path / RESULT_FILE).write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return text


def _mean_of(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({len(values)} clips)" if len(values) else "-"


def claims_markdown(claims: list[Claim]) -> str:
    """The table of claims."""
    rows = [
        [
            claim.claim,
            claim.setting,
            COLUMNS[claim.metric],
            f"{claim.difference:+.4f}",
            f"[{claim.low:+.4f}, {claim.high:+.4f}]",
            claim.verdict,
        ]
        for claim in claims
    ]
    title = "### Claims\n\nDifferences over clips, averaged over seeds, with 95% bootstrap intervals.\n"
    return f"{title}\n{markdown_table(['Claim', 'Setting', 'Metric', 'Difference', 'Interval', 'Verdict'], rows)}"
