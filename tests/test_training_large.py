"""Data of the size that people have: 500 recordings with broken ones among them, and features of AudioCaps' size."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from training_parts import captions_of, make_captioner, write_clip, write_clotho

pytestmark = pytest.mark.slow

CLIPS = 500
BROKEN = {
    7: "missing",
    100: "missing",
    33: "unreadable",
    34: "unreadable",
    260: "unreadable",
    261: "unreadable",
    499: "unreadable",
    12: "empty-caption",
    13: "empty-caption",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """500 clips: two without a file, five that do not decode (text, nothing, one sample, NaN, cut off), and two clips
    of which a caption is empty."""
    folder = tmp_path_factory.mktemp("large")
    model, processor = make_captioner()
    model.save_pretrained(folder / "untrained")
    processor.save_pretrained(folder / "untrained")
    clotho = write_clotho(folder / "clotho", train=1, validation=2)
    lines = ["file_name,caption_1,caption_2"]
    for number in range(CLIPS):
        path = write_clip(clotho / "development" / f"{number}.wav", number)
        texts = captions_of(number, 2) if BROKEN.get(number) != "empty-caption" else [captions_of(number)[0], " "]
        lines.append(f'{number}.wav,"{texts[0]}","{texts[1]}"')
        if BROKEN.get(number) == "missing":
            path.unlink()
    (clotho / "clotho_captions_development.csv").write_text("\n".join(lines) + "\n")
    clips = clotho / "development"
    (clips / "33.wav").write_text("this is not audio")
    (clips / "34.wav").write_bytes(b"")
    soundfile.write(clips / "260.wav", np.array([0.5], dtype=np.float32), 8000)
    soundfile.write(clips / "261.wav", np.full(800, np.nan, dtype=np.float32), 8000, subtype="FLOAT")
    content = (clips / "499.wav").read_bytes()
    (clips / "499.wav").write_bytes(content[:30])
    return folder


def command(start: Path, output: Path, *more: str) -> list[str]:
    flags = ["--dataset", "clotho", "--data-dir", start / "clotho", "--model", start / "untrained", "--allow-missing"]
    flags += ["--output-dir", output, "--feature-cache", start / "features", "--max-steps", "1", "--device", "cpu"]
    return [str(part) for part in (sys.executable, "-m", "recap_cli", "train", *flags, *more)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> dict:
    result = subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((Path(arguments[1]) / "report.json").read_text())


def test_killed_while_encoding_then_all_is_named_and_read_again(start: Path):
    """SIGKILL after the first shard of 256 clips; the second run encodes the rest, the third nothing."""
    with subprocess.Popen(
        command(start, start / "a"), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if re.search(r"Encoding audio: 256 of", line):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    second = run(start, start / "a")
    counts = second["data"]["splits"]["train"]
    encodable = CLIPS - sum(kind in ("missing", "unreadable") for kind in BROKEN.values())
    broken_in_first = 256 - counts["clips_reused"]
    assert 0 <= broken_in_first <= 5
    assert counts["clips_reused"] + counts["clips_encoded"] == counts["clips"] == encodable
    expected = {(f"{number}.wav", kind) for number, kind in BROKEN.items()}
    assert {(clip["clip_id"], clip["kind"]) for clip in second["left_out"]["clips"]} == expected
    assert second["left_out"]["counts"] == {"missing": 2, "unreadable": 5, "empty-caption": 2}
    assert all(clip["detail"] for clip in second["left_out"]["clips"])
    third = run(start, start / "b")
    counts = third["data"]["splits"]["train"]
    assert (counts["clips_reused"], counts["clips_encoded"]) == (encodable, 0)
    assert third["left_out"] == second["left_out"]


FEATURES = """
import sys, numpy as np
from recap_hf.training.features import CLIPS_PER_SHARD, FeatureStore
store = FeatureStore(sys.argv[1], {"weights": "random"})
clips = int(sys.argv[2])
rng = np.random.default_rng(0)
for start in range(0, clips, CLIPS_PER_SHARD):
    keys = [f"{number:032x}" for number in range(start, min(clips, start + CLIPS_PER_SHARD))]
    states = rng.integers(0, 15360, (len(keys), 1, 64, 768), dtype=np.uint16).view(np.float16)
    embeds = np.ones((1, 512), dtype=np.float32)
    store.add_shard({key: {"states": own, "embeds": embeds} for key, own in zip(keys, states)})
"""

READER = """
import resource, sys, numpy as np
from recap_hf.training.features import FeatureStore
store = FeatureStore(sys.argv[1], {"weights": "random"})
clips = int(sys.argv[2])
assert len(store) == clips
total = 0.0
order = np.random.default_rng(1).permutation(clips)
for start in range(0, clips, 32):
    batch = np.stack([store.read(f"{number:032x}", "states") for number in order[start : start + 32]])
    total += float(batch[0, 0, 0, 0])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_features_of_audiocaps_size(tmp_path: Path):
    """5,000 clips of the true shape (RECAP_CLIPS: as many as wanted): bytes a clip, and the reader's peak memory."""
    clips = int(os.environ.get("RECAP_CLIPS", "5000"))
    for code in (FEATURES, READER):
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(clips)],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    per_clip = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / clips
    peak = int(result.stdout)
    print(f"{per_clip:,.0f} bytes a clip, {per_clip * 50_000 / 1e9:.2f} GB for 50,000; peak {peak / 1e9:.2f} GB")
    # 64 x 768 in fp16 and 512 in float32 are 100,352 bytes.
    assert 100_352 <= per_clip < 100_352 * 1.01
    assert per_clip * 50_000 < 12e9
    assert peak < 4e9
