"""The tables and claims of a grid, from the runs that are there."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .claims import Claim, ClipScores, difference_claim, gain_claim
from .folder import SCORES_FILE, EvaluationFolder
from .grid import Grid, Run
from .grid_config import LARGE
from .paper_tables import OurRow, PaperTable, paper_table
from .published import TEST_SETS
from .text_tables import COLUMNS, markdown_table

RESULT_FILE = "grid.json"
NOVEL_HEADER = ("Training set", "Test set", "Method", "Words in the references", "Recall")
_BASELINE_CLAIMS = {
    "no_retrieval": "retrieved captions in the prompt help",
    "random_captions": "it matters which captions",
    "audio_hidden": "hearing the audio helps",
    "first_retrieved": "the captioner beats its first retrieved caption",
}


class GridResults:
    """Reads the runs of a grid."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.config = grid.config

    def _scores(self, run: Run) -> dict[str, Any]:
        return json.loads((self.grid.path / run.folder / SCORES_FILE).read_text(encoding="utf-8"))

    def _clip_scores(self, runs: list[Run], system: str, metric: str) -> ClipScores:
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
            runs = [run for run in self.grid.runs() if run.test_set == test_set and self.grid.is_scored(run)]
            if not runs:
                continue
            rows = [row for training_set in self.config.training_sets for row in self._rows(training_set, runs)]
            tables.append(paper_table(test_set, rows, notes=self._notes(runs), with_published=test_set in TEST_SETS))
        return tables

    def _rows(self, training_set: tuple[str, ...], runs: list[Run]) -> list[OurRow]:
        rows = []
        groups: dict[tuple[tuple[str, ...], int], list[Run]] = {}
        for run in runs:
            if run.training_set == training_set:
                groups.setdefault((run.datastore, run.k), []).append(run)
        for (datastore, k), members in groups.items():
            label = self.config.datastore_label(datastore, training_set, members[0].test_set)
            label += f", k = {k}" if k != self.config.k[0] else ""
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
        rows = self._rows_by_label(training_set, test_set)
        main = rows.get("w/ DS")
        if not main:
            return
        metric = self._metric(main[0])
        place = (
            f"trained on {self.config.training_title(training_set)}, tested on {self.config.domains[test_set].title}"
        )
        best = self._clip_scores(main, "recap", metric)

        def better(claim: str, runs: list[Run], system: str, name: str) -> Claim:
            other = self._clip_scores(runs, system, metric)
            return difference_claim(claim, f"{place}: w/ DS minus {name}", metric, other, best, self.config.resamples)

        if test_set not in training_set:
            for label, runs in rows.items():
                if label not in ("w/ DS", "w/ DSlarge"):
                    yield better("an in-domain datastore beats an out-of-domain one", runs, "recap", label)
        if "w/ DSlarge" in rows:
            large = self._clip_scores(rows["w/ DSlarge"], "recap", metric)
            setting = f"{place}: w/ DSlarge minus w/ DS"
            claim = "a large datastore improves on it"
            yield difference_claim(claim, setting, metric, best, large, self.config.resamples)
        for system, claim in _BASELINE_CLAIMS.items():
            yield better(claim, main, system, system)
        events = self._events(test_set, best.clip_ids)
        if events is not None:
            yield gain_claim(
                "retrieval helps clips of several events more",
                f"{place}: gain of w/ DS over no_retrieval, several events minus one",
                metric,
                self._clip_scores(main, "no_retrieval", metric),
                best,
                events > 1,
                self.config.resamples,
            )

    def _rows_by_label(self, training_set: tuple[str, ...], test_set: str) -> dict[str, list[Run]]:
        """The finished runs of each row, one a seed, at the table's k."""
        wanted = (training_set, test_set, self.config.k[0])
        rows: dict[str, list[Run]] = {}
        for run in self.grid.runs():
            if (run.training_set, run.test_set, run.k) == wanted and self.grid.is_scored(run):
                rows.setdefault(self.grid.label(run), []).append(run)
        return rows

    def _metric(self, run: Run) -> str:
        """The metric of the claims: SPIDEr as in the paper, CIDEr-D where SPICE was skipped."""
        corpus = self._scores(run)["systems"]["recap"]["corpus"]
        metric = next((key for key in ("spider", "cider_d") if corpus.get(key) is not None), None)
        if metric is None:
            raise ValueError(f"{run.folder} has neither SPIDEr nor CIDEr-D, on which the claims are judged")
        return metric

    def _events(self, test_set: str, clip_ids: tuple[str, ...]) -> np.ndarray | None:
        """Number of events of each clip, from the domain's file; None where there is no file."""
        path = self.config.domains[test_set].events
        if path is None:
            return None
        from recap_hf.scoring import match_clips

        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle))
        if not rows or not {"clip_id", "events"} <= rows[0].keys():
            raise ValueError(f"{path}: expected the columns clip_id and events")
        counts = np.zeros(len(clip_ids), dtype=int)
        for position, row in match_clips(clip_ids, [row["clip_id"] for row in rows]):
            counts[position] = int(rows[row]["events"])
        if not counts.all():
            raise ValueError(f"{path} has no number of events for the clip {clip_ids[int(np.argmin(counts))]!r}")
        return counts

    def novel_words(self) -> list[list[str]]:
        """Rows of the table of words that the training captions lack: how many, and how many each row says."""
        rows = []
        for training_set in self.config.training_sets:
            for test_set in self.config.domains:
                for label, runs in self._rows_by_label(training_set, test_set).items():
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
        """Writes `tables.md` and `grid.json`; returns the text."""
        tables, claims, novel = self.tables(), self.claims(), self.novel_words()
        text = "\n".join(table.to_markdown() for table in tables) + "\n" + claims_markdown(claims)
        if novel:
            text += f"\n### Words that no training caption has\n\n{markdown_table(NOVEL_HEADER, novel)}"
        (self.grid.path / "tables.md").write_text(text, encoding="utf-8")
        content = {
            "tables": [asdict(table) for table in tables],
            "novel_words": {"header": NOVEL_HEADER, "rows": novel},
            "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in claims],
            "runs": [
                {**asdict(run), "folder": run.folder, "label": self.grid.label(run)}
                for run in self.grid.runs()
                if self.grid.is_scored(run)
            ],
        }
        (self.grid.path / RESULT_FILE).write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return text


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
