"""The tables and claims of a grid, from its finished runs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf import CaptionDatastore
from recap_hf.files import write_json, write_text
from recap_hf.scoring import METRIC_LABELS
from recap_hf.scoring.bootstrap import Difference, gain_difference, mean_difference

from .clips import estimate_events, read_events
from .grid import Grid
from .grid_config import AUDIO_TO_AUDIO, ESTIMATED, LARGE, LARGE_ROW, MAIN_ROW, PREFIX, RELATED_LABELS, Run
from .published import our_cells, paper_table, table_markdown
from .runner import RUN_FILE, SCORES_FILE, read_json, read_predictions, scores_file
from .systems import MAIN_SYSTEM
from .tables import markdown_table

RESULT_FILE, TABLE3_FILE = "grid.json", "settings.md"
# Tables beside those of the paper: title and columns, after training set and test set.
ANALYSES = {
    "events": ("Scores by number of events", ("Method", "Metric", "One event", "Two events", "Three or more")),
    "novel_words": ("Words that no training caption has", ("Method", "Words in the references", "Recall")),
    "stores": ("Datastore size and index", ("Datastore", "Captions", "Index", "Metric", "Score", "Interval")),
}
# What a row, (label, system), is: the label names method and datastore.
Key = tuple[str, str]
MAIN, LARGE_MAIN = (MAIN_ROW, MAIN_SYSTEM), (LARGE_ROW, MAIN_SYSTEM)
PREFIX_MAIN = (RELATED_LABELS[PREFIX], MAIN_SYSTEM)
AUDIO_MAIN = (f"{RELATED_LABELS[AUDIO_TO_AUDIO]} {MAIN_ROW}", MAIN_SYSTEM)
# Claims that the main row is better than another.
_CLAIMS = {
    (MAIN_ROW, "no_captions"): "retrieved captions in the prompt help",
    (MAIN_ROW, "random_captions"): "it matters which captions",
    (MAIN_ROW, "no_audio"): "the audio helps",
    (MAIN_ROW, "first_retrieved"): "the captioner beats its first retrieved caption",
    PREFIX_MAIN: "the captioner beats a tuned prefix",
    AUDIO_MAIN: "captions of similar text beat captions of similar audio",
}


class GridResults:
    """Reads the finished runs of a grid; `settings` are its training sets on its test sets, as far as finished."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.config = grid, grid.config
        self.scored = [run for run in self.config.runs() if grid.is_scored(run)]
        self.scores = cache(lambda run: read_json(self.folder(run) / SCORES_FILE))
        pairs = [(names, test_set) for names in self.config.training_sets for test_set in self.config.domains]
        self.settings = {pair: Setting(self, *pair) for pair in pairs}

    def folder(self, run: Run) -> Path:
        """The folder of a run."""
        return self.grid.path / run.folder

    def metric(self, run: Run) -> str:
        """The metric of the claims: SPIDEr as in the paper, or CIDEr-D if SPICE was skipped."""
        corpus = self.scores(run)["systems"][MAIN_SYSTEM]["corpus"]
        metric = next((key for key in ("spider", "cider_d") if corpus.get(key) is not None), None)
        if metric is None:
            raise ValueError(f"{run.folder} has neither SPIDEr nor CIDEr-D, on which the claims are judged")
        return metric

    def tables(self) -> list[dict[str, Any]]:
        """One table per test set, in the layout of the paper."""
        tables = []
        for test_set in self.config.domains:
            runs = [run for run in self.scored if run.test_set == test_set and not run.varies_datastore]
            settings = [setting for (_, tested), setting in self.settings.items() if tested == test_set]
            rows = [row for setting in settings for row in setting.rows()]
            tables += [paper_table(test_set, rows, self._notes(runs))] if runs else []
        return tables

    def _notes(self, runs: list[Run]) -> list[str]:
        first = self.scores(runs[0])
        clips = first["clip_list"]
        notes = [f"Our rows: {clips['num_clips']} clips of the list {clips['name']} (sha256 {clips['sha256'][:12]})."]
        notes += [f"CLAP: {self.config.clap_note}."] if self.config.clap_note else []
        notes += [f"{key} skipped: {reason}" for key, reason in first["skipped"].items()]
        everywhere = {self.config.label(run) for run in runs}
        for note in dict.fromkeys(note for run in runs for note in self.scores(run)["notes"]):
            labels = {self.config.label(run) for run in runs if note in self.scores(run)["notes"]}
            notes.append(note if labels == everywhere else f"{', '.join(sorted(labels))}: {note}")
        if any(run.model.method for run in runs):
            notes.append(
                "The related methods are reimplementations of the idea on the same CLAP and language model, trained "
                "by the same command on the same data; they are not the published systems."
            )
        if any(run.datastore == (LARGE,) for run in self.scored):
            records = CaptionDatastore.from_pretrained(self.grid.path / "datastores" / LARGE).records
            unknown = {"source": "unnamed source", "licence": "licence not stated"}
            counts = Counter(tuple(record.get(key) or text for key, text in unknown.items()) for record in records)
            parts = [f"{count:,} captions of {source} ({licence})" for (source, licence), count in counts.items()]
            notes.append(f"DSlarge: {'; '.join(parts)}.")
        return notes

    def stores(self) -> Iterator[list[str]]:
        """Cells of the table of datastore sizes and indexes."""
        for run in self.scored if self.config.shares or self.config.indexes else ():
            is_whole = run.k == self.config.k[0] and self.config.is_varied(run)
            if run.model.method or not (run.varies_datastore or is_whole):
                continue
            metric, scores = self.metric(run), self.scores(run)["systems"][MAIN_SYSTEM]
            store = read_json(self.folder(run) / RUN_FILE)["captioner"]["datastore"]
            low, high = scores["intervals"][metric]
            setting = self.settings[run.model.training_set, run.test_set]
            label = self.config.label(replace(run, share=1, index=""))
            figures = [METRIC_LABELS[metric], f"{scores['corpus'][metric]:.4f}", f"[{low:.4f}, {high:.4f}]"]
            yield [*setting.titles, label, str(store["captions"]), store["index"], *figures]

    def write(self) -> str:
        """Writes `tables.md`, `settings.md` and `grid.json`; returns the text of the first."""
        from .table3 import four_settings, settings_markdown

        settings = list(self.settings.values())
        tables, claims = self.tables(), [claim for setting in settings for claim in setting.claims()]
        rows = {
            "events": [row for setting in settings for row in setting.by_events()],
            "novel_words": [row for setting in settings for row in setting.novel_words()],
            "stores": list(self.stores()),
        }
        parts = [*map(table_markdown, tables), claims_markdown(claims)]
        analyses: dict[str, Any] = {}
        for key, (title, columns) in ANALYSES.items():
            header = ("Training set", "Test set", *columns)
            analyses[key] = {"title": title, "header": header, "rows": rows[key]}
            parts += [f"### {title}\n\n{markdown_table(header, rows[key])}"] if rows[key] else []
        table3 = four_settings(self)
        page = settings_markdown(table3)
        write_text(self.grid.path / TABLE3_FILE, page)
        text = "\n".join([*parts, page] if table3 else parts)
        write_text(self.grid.path / "tables.md", text)
        runs = []
        for run in self.scored:
            content = asdict(run)
            runs.append({**content.pop("model"), **content, "folder": run.folder, "label": self.config.label(run)})
        result = {"tables": tables, **analyses, "settings": table3, "claims": claims, "runs": runs}
        write_json(self.grid.path / RESULT_FILE, result)
        return text


class Setting:
    """The finished runs of one training set on one test set, without those of the table of datastore sizes.

    Attributes:
        runs_of: runs by row, one per seed; rows at another k than the first have it in their label.
        titles: names for people of the training set and the test set.
    """

    def __init__(self, results: GridResults, training_set: tuple[str, ...], test_set: str) -> None:
        self.results, self.training_set, self.test_set = results, training_set, test_set
        config = results.config
        self.titles = [config.title(training_set), config.title((test_set,))]
        self.runs_of: dict[Key, list[Run]] = {}
        for run in results.scored:
            if (run.model.training_set, run.test_set) == (training_set, test_set) and not run.varies_datastore:
                label = config.label(run) + (f", k = {run.k}" if run.k not in (0, config.k[0]) else "")
                for system in results.scores(run)["systems"]:
                    self.runs_of.setdefault((label, system), []).append(run)

    def keys(self) -> list[Key]:
        """The rows at the first k; baselines only of the main row."""
        shown = (0, self.results.config.k[0])
        at_k = [key for key, runs in self.runs_of.items() if runs[0].k in shown]
        return [(label, system) for label, system in at_k if system == MAIN_SYSTEM or label == MAIN_ROW]

    @cached_property
    def metric(self) -> str:
        """The metric of the claims."""
        return self.results.metric(self.runs_of[self.keys()[0]][0])

    def predictions(self, key: Key) -> list[dict[str, Any]]:
        """Names, captions, retrieved captions and references of the clips, as the first seed captioned them."""
        return read_predictions(self.results.folder(self.runs_of[key][0]), key[1])

    @cached_property
    def clips(self) -> dict[str, list[str]]:
        """References of the test clips by name, in the order of all scores."""
        return {row["clip_id"]: row["references"] for row in self.predictions(self.keys()[0])}

    @cached_property
    def events(self) -> np.ndarray | None:
        """(num_clips,) number of events, from the domain's file or estimated; None if the domain has neither."""
        source = self.results.config.domains[self.test_set].get("events")
        if source == ESTIMATED:
            return np.array(list(map(estimate_events, self.clips.values())))
        return source and read_events(source, list(self.clips))

    def entries(self, key: Key) -> list[dict[str, Any]]:
        """Scores and statistics of a row in each of its runs."""
        return [self.results.scores(run)["systems"][key[1]] for run in self.runs_of[key]]

    def values(self, key: Key) -> np.ndarray:
        """(num_clips,) scores of a row, the mean over its seeds. Raises `ValueError` if a run has other clips."""
        columns = []
        for run in self.runs_of[key]:
            clips = read_json(scores_file(self.results.folder(run), key[1]))["clips"]
            if [clip["clip_id"] for clip in clips] != list(self.clips):
                raise ValueError(f"{run.folder} is about other clips than the test set {self.test_set}")
            columns.append([clip[self.metric] for clip in clips])
        return np.mean(columns, axis=0)

    def rows(self) -> list[tuple[str, list[str]]]:
        """Title of the training set and cells of every row, for the paper's tables."""
        training = self.results.config.training
        clap = str(training.get("clap") or training.get("model") or "of the checkpoint")
        clap = Path(clap).name if Path(clap).exists() else clap
        rows = []
        for (label, system), runs in self.runs_of.items():
            corpora = [entry["corpus"] for entry in self.entries((label, system))]
            clips = self.results.scores(runs[0])["clip_list"]["num_clips"]
            rows.append((self.titles[0], our_cells(row_name(label, system), corpora, clips, clap)))
        return rows

    def by_events(self) -> Iterator[list[str]]:
        """Cells of the table of scores by number of events."""
        for key in self.keys() if self.runs_of and self.events is not None else ():
            values, events = self.values(key), self.events
            groups = [values[events == 1], values[events == 2], values[events > 2]]
            cells = [f"{group.mean():.3f} ({len(group)} clips)" if len(group) else "-" for group in groups]
            yield [*self.titles, row_name(*key), METRIC_LABELS[self.metric], *cells]

    def novel_words(self) -> Iterator[list[str]]:
        """Cells of the table of words that no training caption has."""
        for key in self.keys():
            statistics = [entry["statistics"] for entry in self.entries(key)]
            recalls = [each.get("novel_word_recall") for each in statistics]
            if None not in recalls:
                words = str(statistics[0]["novel_reference_words"])
                yield [*self.titles, row_name(*key), words, f"{np.mean(recalls):.3f}"]

    def claims(self) -> Iterator[dict[str, Any]]:
        """The paper's claims, and whether the captioner beats its baselines, on the row that the paper calls DS.

        Each has `claim`, `setting`, `metric`, `difference`, `low`, `high` (95 % interval over the clips), `verdict`.
        """
        keys, resamples = self.keys(), self.results.config.resamples
        if MAIN not in keys:
            return
        others = [key for key in keys if key[1] == MAIN_SYSTEM and not self.runs_of[key][0].model.method]
        for key in others if self.test_set not in self.training_set else ():
            if key not in (MAIN, LARGE_MAIN):
                yield self._better("an in-domain datastore beats an out-of-domain one", MAIN, key)
        if LARGE_MAIN in keys:
            yield self._better("a large datastore improves on it", LARGE_MAIN, MAIN)
        for key, text in _CLAIMS.items():
            if key in keys:
                yield self._better(text, MAIN, key)
        if self.events is not None and len(set(self.events > 1)) == 2:
            gains = self.values(MAIN) - self.values((MAIN_ROW, "no_captions"))
            what = f"gain of {MAIN_ROW} over no_captions, several events minus one"
            difference = gain_difference(gains, self.events > 1, resamples)
            yield self._claim("retrieval helps clips of several events more", what, difference)

    def _better(self, text: str, key: Key, other: Key) -> dict[str, Any]:
        names = [label if system == MAIN_SYSTEM else system for label, system in (key, other)]
        difference = mean_difference(self.values(other), self.values(key), self.results.config.resamples)
        return self._claim(text, " minus ".join(names), difference)

    def _claim(self, text: str, what: str, difference: Difference) -> dict[str, Any]:
        place = "trained on {}, tested on {}".format(*self.titles)
        numbers = {name: getattr(difference, name) for name in ("difference", "low", "high", "verdict")}
        return {"claim": text, "setting": f"{place}: {what}", "metric": self.metric, **numbers}


def row_name(label: str, system: str) -> str:
    """Name of a row: its label, after the system for a baseline."""
    return label if system == MAIN_SYSTEM else f"{system} ({label})"


def claims_markdown(claims: Sequence[dict[str, Any]]) -> str:
    """The table of claims."""
    rows = []
    for claim in claims:
        interval = f"[{claim['low']:+.4f}, {claim['high']:+.4f}]"
        figures = [METRIC_LABELS[claim["metric"]], f"{claim['difference']:+.4f}", interval, claim["verdict"]]
        rows.append([claim["claim"], claim["setting"], *figures])
    title = "### Claims\n\nDifferences over clips, means over seeds, with 95% bootstrap intervals.\n"
    return f"{title}\n{markdown_table(['Claim', 'Setting', 'Metric', 'Difference', 'Interval', 'Verdict'], rows)}"
