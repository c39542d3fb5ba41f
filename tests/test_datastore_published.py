"""All published captions that RECAP's datastores are made of, in one datastore: counts, licences, leak guard."""

from __future__ import annotations

import ast
import csv
import json

import pytest

from recap_cli import main

# Facts of the files, counted when they were gathered (and again below where a loop over the rows can).
ROWS = {
    "audiocaps_test.csv": 4875,
    "audiocaps_train.csv": 49838,
    "audiocaps_val.csv": 2475,
    "clotho_development_enclap.csv": 19175,
    "recap_dev_audiocaps.csv": 1725,
    "recap_dev_clotho.csv": 4125,
    "recap_test_audiocaps.csv": 3740,
    "recap_test_clotho.csv": 4105,
    "recap_train_clotho.csv": 11090,
}
WEAK_ENTRIES = 148_295
EXACT_DUPLICATES_OF_AUDIOCAPS = 4122
TEST_CLIPS_WITH_A_REFERENCE_IN_TRAINING = 242


@pytest.fixture(scope="module")
def published(shared_dir):
    """Rows of every file, and the weak captions of each clip."""
    folder = shared_dir / "data" / "captions"
    captions, weak, entries = {}, {}, 0
    for name in ROWS:
        with open(folder / name, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        captions[name] = [row["caption"] for row in rows]
        pairs = set()
        for row in rows:
            for part in ast.literal_eval(row.get("abstract_captions") or "[]"):
                entries += len(part)
                # A few are blank.
                pairs |= {(row["file_name"], text.strip()) for text in part if text.strip()}
        weak[name] = pairs
    return folder, captions, weak, entries


def test_the_files_are_those_that_were_counted(published):
    _, captions, _, entries = published
    assert {name: len(texts) for name, texts in captions.items()} == ROWS
    assert entries == WEAK_ENTRIES
    train = captions["audiocaps_train.csv"]
    assert len(train) - len(set(train)) == EXACT_DUPLICATES_OF_AUDIOCAPS


@pytest.mark.slow
def test_all_of_them_in_one_datastore(published, tmp_path, capsys):
    """Nothing is lost: every row is kept or counted as left out, weak captions once per clip and file."""
    folder, captions, weak, _ = published
    files = [str(folder / name) for name in ROWS]
    store = str(tmp_path / "all")
    command = ["datastore", "build", *files, "--output", store, "--embeddings-dtype", "float16", "--max-tokens", "0"]
    assert main([*command, "--device", "cpu", "--format", "json"]) == 0
    capsys.readouterr()
    assert main(["datastore", "info", store, "--format", "json"]) == 0
    info = json.loads(capsys.readouterr().out)
    with capsys.disabled():
        print("\n" + json.dumps({key: info[key] for key in info if key != "report"}, indent=1))
    report = info["report"]
    read = {name: counts["read"] for name, counts in report["inputs"].items()}
    assert read == {name: ROWS[name] + len(weak[name]) for name in ROWS}
    # AudioCaps' rows and its exact duplicates, as they were counted.
    assert report["inputs"]["audiocaps_train.csv"] == {"read": 49838, "exact_duplicates": 4122}
    assert report["dropped"] == {}
    texts = [text for name in ROWS for text in captions[name]] + [text for name in ROWS for _, text in weak[name]]
    assert info["captions"] == len(texts)
    assert info["duplicates"]["exact"] == len(texts) - len(set(texts))
    assert info["sources"] == {
        "audiocaps": 4875 + 49838 + 2475,
        "clotho": 19175,
        "recap-audiocaps": 1725 + 3740,
        "recap-clotho": 4125 + 4105 + 11090,
        "recap-weak-audiocaps": sum(len(pairs) for name, pairs in weak.items() if "audiocaps" in name),
        "recap-weak-clotho": sum(len(pairs) for name, pairs in weak.items() if "clotho" in name),
    }
    assert info["licences"]["MIT"] == info["sources"]["audiocaps"]
    assert info["non_commercial"] == info["sources"]["clotho"]
    assert info["recall"]["text"] >= 0.93
    assert info["recall"]["audio"] >= 0.93


def test_captions_of_test_clips_stay_out(published, tmp_path, capsys):
    """By clip id, the weak captions of those clips too; by identical text on request, and counted either way."""
    from recap_hf.datastore import FilterOptions, LeakGuard, read_source
    from recap_hf.datastore.filters import CaptionFilter
    from recap_hf.modeling.retrieval_recap import normalize_text

    folder, captions, _, _ = published
    tests = [folder / "audiocaps_test.csv", folder / "recap_test_clotho.csv"]
    reports = {}
    for by_text in (False, True):
        guard = LeakGuard.from_sources(tests)
        passed = CaptionFilter(FilterOptions(max_tokens=None, guard=guard, guard_texts=by_text))
        left = [record for name in ROWS for record in passed.filter(read_source(folder / name), name)]
        reports[by_text] = passed.report()["leak_guard"]
        stems = {record["clip_id"].removesuffix(".wav") for record in left if record.get("clip_id")}
        with open(folder / "recap_test_clotho.csv", newline="", encoding="utf-8") as file:
            assert not stems & {row["file_name"].removesuffix(".wav") for row in csv.DictReader(file)}
        if by_text:
            references = {normalize_text(text) for path in tests for text in captions[path.name]}
            assert not references & {normalize_text(record["caption"]) for record in left if not record.get("weak")}
    with capsys.disabled():
        print("\n" + json.dumps(reports))
    assert reports[False]["of_these_weak"] > 0
    guard = LeakGuard.from_sources(tests[:1])
    train = CaptionFilter(FilterOptions(max_tokens=None, guard=guard))
    assert sum(1 for _ in train.filter(read_source(folder / "audiocaps_train.csv"))) == 49838
    found = train.report()["leak_guard"]
    assert (found["removed_by_clip_id"], found["clips"]) == (0, 975)
    assert found["clips_with_identical_text"] == TEST_CLIPS_WITH_A_REFERENCE_IN_TRAINING
