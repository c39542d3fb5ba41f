"""`accelerate launch train.py` and `recap pretrain` on real recordings in Clotho's layout, as users start them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_parts import ACCELERATE_LAUNCH

from benchmarks.clotho_stand_in import make_clotho_stand_in

REPOSITORY = Path(__file__).resolve().parent.parent
RECAP = [sys.executable, "-m", "recap_cli"]


@pytest.fixture(scope="module")
def events(shared_dir: Path, tmp_path_factory) -> Path:
    return make_clotho_stand_in(shared_dir / "data" / "sound_events", tmp_path_factory.mktemp("events") / "clotho")


def start(*command: object, threads: int = 2) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    result = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def test_the_stand_in_is_in_clothos_layout(events: Path):
    from recap_hf.data import load_captions

    train, validation = (load_captions("clotho", events, split=split) for split in ("train", "validation"))
    assert (len(train.dataset), len(validation.dataset)) == (476, 142)
    assert {len(captions) for captions in train.dataset["captions"]} == {5}
    assert not set(train.dataset["clip_id"][:]) & set(validation.dataset["clip_id"][:])


@pytest.mark.slow
def test_training_on_sound_events(events: Path, tmp_path: Path):
    """One process by Accelerate, two by `--num-processes`: the loss falls, and both have the same losses."""
    flags = ["--dataset", "clotho", "--data-dir", events, "--feature-cache", tmp_path / "features", "--device", "cpu"]
    flags += ["--max-train-clips", 160, "--max-validation-clips", 40, "--learning-rate", "1e-3", "--logging-steps", 1]
    flags += ["--num-train-epochs", 2]
    script = [*ACCELERATE_LAUNCH, "--num_cpu_threads_per_process", "2"]
    script += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    start(*script, REPOSITORY / "train.py", *flags, "--output-dir", tmp_path / "one")
    two = start(*RECAP, "train", *flags, "--output-dir", tmp_path / "two", "--num-processes", 2)
    assert "World size 2" in two.stderr
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    for name in ("losses", "evaluations"):
        first, second = ([entry["loss"] for entry in report[name]] for report in reports)
        assert first == pytest.approx(second, abs=1e-4)
    validation = [entry["loss"] for entry in reports[0]["evaluations"]]
    assert validation[2] < validation[1] < validation[0]
    start(
        *RECAP, "train", *flags, "--output-dir", tmp_path / "untrained", "--max-steps", 1, "--learning-rate", "1e-12"
    )
    clips = sorted((events / "evaluation").iterdir())[:12]
    trained, untrained = (captions_of(tmp_path / name, clips) for name in ("one", "untrained"))
    print({clip.name: pair for clip, *pair in zip(clips, untrained, trained, strict=True)})
    assert all(trained)
    assert trained != untrained


def captions_of(model: Path, clips: list[Path]) -> list[str]:
    from transformers import pipeline

    captioner = pipeline("audio-captioning", model=str(model))
    return [captioner(str(clip))["caption"] for clip in clips]


CODE_WORDS = [
    "alfa",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliett",
    "kilo",
    "lima",
    "mike",
    "november",
    "oscar",
    "papa",
    "quebec",
    "romeo",
    "sierra",
    "tango",
    "uniform",
]
CODE_CAPTIONS = (
    "channel {} is active",
    "{}",
    "a signal of type {}",
    "this is {} again",
    "{}, as recorded on site",
)


def write_in_code(folder: Path) -> None:
    """A trade's own words, which no model knows, in the place of the captions: a code word for each event."""
    for table in folder.glob("clotho_captions_*.csv"):
        rows = list(csv.reader(table.open(newline="")))
        names = [row[0] for row in rows[1:]]
        events = sorted({name.split("-")[0] for name in names})
        codes = dict(zip(events, CODE_WORDS, strict=True))
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(rows[0])
            writer.writerows(
                [name, *(form.format(codes[name.split("-")[0]]) for form in CODE_CAPTIONS)] for name in names
            )


@pytest.mark.slow
def test_fine_tuning_a_clap_on_own_words(shared_dir: Path, tmp_path: Path):
    """The embedded CLAP learns code words from the recordings of folds 1 to 4; retrieval on fold 5."""
    splits = {"development": (1, 2, 3, 4), "validation": (5,)}
    data = make_clotho_stand_in(shared_dir / "data" / "sound_events", tmp_path / "clotho", splits)
    write_in_code(data)
    flags = ["--dataset", "clotho", "--data-dir", data, "--output-dir", tmp_path / "clap", "--clap", "embedded"]
    flags += ["--num-train-epochs", 2, "--learning-rate", "3e-4", "--warmup-steps", 2, "--batch-size", 32]
    flags += ["--max-train-clips", 320, "--device", "cpu"]
    start(*RECAP, "pretrain", "clap", *flags)
    evaluations = json.loads((tmp_path / "clap" / "report.json").read_text())["evaluations"]
    print([{name: round(value, 3) for name, value in entry.items()} for entry in evaluations])
    assert evaluations[-1]["map10"] > 2 * evaluations[0]["map10"]


@pytest.mark.slow
def test_a_language_model_of_published_captions(shared_dir: Path, tmp_path: Path):
    """From scratch on Clotho's captions, each behind the other captions of its clip."""
    table = tmp_path / "metadata.csv"
    with open(shared_dir / "data" / "captions" / "clotho_development_enclap.csv", newline="") as source:
        rows = [(row["file_path"], row["caption"]) for row in csv.DictReader(source)]
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *rows[:6000]])
    flags = ["--dataset", "audiofolder", "--data-dir", tmp_path, "--output-dir", tmp_path / "lm"]
    flags += ["--validation-share", "0.05", "--max-steps", 120, "--num-train-epochs", 1, "--warmup-steps", 20]
    flags += ["--learning-rate", "2e-3", "--num-layers", 2, "--width", 128, "--device", "cpu"]
    start(*RECAP, "pretrain", "language-model", *flags)
    evaluations = json.loads((tmp_path / "lm" / "report.json").read_text())["evaluations"]
    print(evaluations)
    assert evaluations[-1]["perplexity"] < evaluations[0]["perplexity"] / 10
