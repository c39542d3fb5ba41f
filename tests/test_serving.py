"""`recap serve`: answers, limits, refusals, and a worker that ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
from conftest import same_results, synthetic_clip
from test_audio import BROKEN, encode

from recap_cli import build_parser, main
from recap_cli.options import load_captioner

uvicorn = pytest.importorskip("uvicorn", reason="the service needs recap-hf[serve]")
httpx = pytest.importorskip("httpx")
serving = pytest.importorskip("recap_hf.serving.app", reason="the service needs recap-hf[serve]")

from recap_hf import Captioner  # noqa: E402
from recap_hf.archive import SoundIndex  # noqa: E402
from recap_hf.serving.process import WorkerProcess  # noqa: E402
from recap_hf.serving.worker import Models, open_index  # noqa: E402

OPTIONS = ("--max-new-tokens", "5", "--batch-size", "2")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for number in range(12):
        soundfile.write(folder / f"{number:02}.wav", synthetic_clip(0.4 + number / 10, number), 48_000)
    return folder


@pytest.fixture(scope="module")
def worker(model_folder, recordings):
    args = build_parser("serve").parse_args(["serve", "--model", model_folder, *OPTIONS])
    SoundIndex.update(recordings, model_folder)
    models = Models(functools.partial(load_captioner, args), str(recordings), 2, max_seconds=5.0)
    notes: list[str] = []
    process = WorkerProcess(models, stalled_s=60.0, note=notes.append)
    process.notes = notes
    process.start()
    yield process
    process.stop()


@contextlib.contextmanager
def served(worker, **limits):
    """A client of the service on a free port."""
    app = serving.create_app(worker, "tiny", serving.Limits(**limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(worker):
    with served(worker, max_bytes=1_000_000) as client:
        yield client


@contextlib.contextmanager
def stopped(worker):
    """The worker answers nothing meanwhile."""
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.pid, signal.SIGCONT)


def wait_until(condition, seconds=60.0):
    latest = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < latest
        time.sleep(0.02)


def caption(client, data, name="a.wav", **fields):
    return client.post("/v1/audio/captions", files={"file": (name, data)}, data=fields)


def test_answers_of_many_clients_are_those_of_the_command(client, recordings, model_folder, capsys):
    assert (
        main(["caption", str(recordings), "--no-recursive", "--model", model_folder, *OPTIONS, "--format", "jsonl"])
        == 0
    )
    expected = {os.path.basename(row["file"]): row for row in map(json.loads, capsys.readouterr().out.splitlines())}

    def ask(path):
        return path.name, caption(client, path.read_bytes(), path.name)

    with ThreadPoolExecutor(8) as pool:
        for name, response in pool.map(ask, sorted(recordings.glob("*.wav")) * 3):
            assert response.status_code == 200
            answer = response.json()
            assert answer["file"] == name
            assert answer["caption"] == expected[name]["caption"]
            assert answer["score"] == pytest.approx(expected[name]["score"], rel=1e-4)
            assert [hit["caption"] for hit in answer["retrieved"]] == [
                hit["caption"] for hit in expected[name]["retrieved"]
            ]
    assert len({row["caption"] for row in expected.values()}) > 3


def test_options_are_fields(client):
    answer = caption(client, encode("wav"), k=1, num_beams=1, max_new_tokens=2).json()
    assert len(answer["retrieved"]) == 1
    assert len(caption(client, encode("wav")).json()["retrieved"]) == 2


def test_timestamps(client):
    sound = np.concatenate([synthetic_clip(1.5, 1), np.zeros(96_000, np.float32)])
    answer = caption(client, encode("wav", sound), timestamps="true").json()
    assert answer["segments"][0]["start"] == 0 and answer["segments"][-1]["end"] == 3.5
    assert answer["segments"][-1]["caption"] == "silence"
    assert answer["caption"]


def test_a_cut_recording_is_answered_with_a_warning(client):
    whole = encode("flac")
    answer = caption(client, whole[: len(whole) // 2], "cut.flac").json()
    assert answer["warnings"][0].startswith("cut.flac: cut off or damaged")
    assert "warnings" not in caption(client, whole).json()


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_recording(client, name):
    data, _ = BROKEN[name]
    response = caption(client, data, "mine.wav")
    assert response.status_code in (415, 422)
    error = response.json()["error"]
    assert error["type"] == {415: "not_a_recording", 422: "unreadable_recording"}[response.status_code]
    # By its own name, not that of our copy.
    assert "mine.wav" in error["message"] and "/tmp" not in error["message"]


def test_no_audio_at_all(client):
    response = caption(client, b"I am no sound. " * 99, "mine.wav")
    assert response.status_code == 415
    assert response.json()["error"]["message"].startswith("mine.wav: not a recording that can be read")


@pytest.mark.parametrize(
    ("path", "fields", "status", "message"),
    [
        ("captions", {"num_beams": "0"}, 422, "`num_beams` must be an integer of at least 1, got 0"),
        ("captions", {"num_beams": "many"}, 422, "num_beams: "),
        ("captions", {"length_penalty": "300"}, 422, "`length_penalty` must be a number from -100 to 100, got 300"),
        ("captions", {"projection_temperature": "0.1"}, 422, "this one is on 'hidden' states"),
        ("captions", {"num_beams": "33"}, 422, "num_beams: Input should be less than or equal to 32"),
        ("captions", {"beams": "2"}, 422, "Unknown fields: beams. Known: candidates, copy_margin, do_sample, file"),
        ("captions", {"rerank": "none", "candidates": "3"}, 422, "Without reranking `candidates`"),
        # What depends on the checkpoint: this one reranks nothing by itself.
        ("captions", {"candidates": "3"}, 422, "Without reranking `candidates`"),
        ("tags", {"top": "0"}, 422, "top: "),
        ("tags", {}, 501, "no classification head"),
        ("search", {"text": "rain"}, 422, "either a `text` or a `file`"),
    ],
)
def test_refused_fields(client, path, fields, status, message):
    response = client.post(f"/v1/audio/{path}", files={"file": ("a.wav", encode("wav"))}, data=fields)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_refused_requests(client):
    assert caption(client, b"\0" * 1_100_000).status_code == 413

    def endless():
        for _ in range(20):
            yield b"\0" * 100_000

    # Without a length before the body.
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    chunks = (chunk for part in ((start,), endless()) for chunk in part)
    response = client.post("/v1/audio/captions", content=chunks, headers=form)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "upload_too_large")
    long = caption(client, encode("flac", np.zeros(6 * 48_000, np.float32), 48_000), "long.flac")
    assert (long.status_code, long.json()["error"]["type"]) == (413, "recording_too_long")
    assert "long.flac: longer than 5 s" in long.json()["error"]["message"]
    for response, status in (
        (client.post("/v1/audio/captions", data={"k": 1}), 422),
        (client.post("/v1/audio/captions", content=b"rubbish", headers=form), 400),
        (client.get("/v1/audio/captions"), 405),
        (client.get("/v1/nothing"), 404),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"type", "message"}


def test_facts(client):
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["captions_to_retrieve"] == 2 and not model["tags"]
    paths = client.get("/openapi.json").json()
    fields = paths["components"]["schemas"]["Body_captions_v1_audio_captions_post"]["properties"]
    assert {"file", "timestamps", "num_beams", "rerank_weight"} <= set(fields)
    assert client.get("/docs").status_code == 200


def test_a_token(worker):
    with served(worker, token="s3cret") as client:
        for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}):
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_full_queue_and_a_late_answer(worker):
    with served(worker, queue=1) as client, ThreadPoolExecutor(1) as pool, stopped(worker):
        first = pool.submit(caption, client, encode("wav"))
        wait_until(lambda: worker.waiting == 1)
        response = caption(client, encode("wav"))
        assert (response.status_code, response.json()["error"]["type"]) == (429, "queue_full")
        assert int(response.headers["Retry-After"]) >= 1
        os.kill(worker.pid, signal.SIGCONT)
        assert first.result().status_code == 200
    with served(worker, timeout_s=0.3) as client:
        with stopped(worker):
            response = caption(client, encode("wav"))
            assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout")
        # A form of which the end does not come.
        form = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": "1000"}
        with socket.create_connection((client.base_url.host, client.base_url.port)) as line:
            head = "".join(f"{name}: {value}\r\n" for name, value in form.items())
            line.sendall(f"POST /v1/audio/captions HTTP/1.1\r\nHost: x\r\n{head}\r\n--x\r\n".encode())
            assert b"408" in line.recv(100)


def test_a_worker_that_hangs_is_killed_and_started_again(worker, client, monkeypatch):
    before = caption(client, encode("wav")).json()
    monkeypatch.setattr(worker, "stalled_s", 0.5)
    os.kill(worker.pid, signal.SIGSTOP)
    response = caption(client, encode("wav"))
    assert (response.status_code, response.json()["error"]["type"]) == (503, "worker_lost")
    assert response.headers["Retry-After"]
    assert client.get("/health").status_code == 503
    assert caption(client, encode("wav")).status_code == 503
    wait_until(lambda: client.get("/health").status_code == 200)
    assert caption(client, encode("wav")).json() == before
    assert "the process of the model ended (-9), requests lost: 1" in worker.notes


def test_requests_one_after_the_other_do_not_hide_a_worker_that_hangs(worker, monkeypatch):
    monkeypatch.setattr(worker, "stalled_s", 1.5)
    lost = worker.pid
    with served(worker, timeout_s=0.4) as client:
        assert caption(client, encode("wav")).status_code == 200
        os.kill(lost, signal.SIGSTOP)
        wait_until(lambda: caption(client, encode("wav")).status_code == 503)
        wait_until(lambda: client.get("/health").status_code == 200)
    assert worker.pid != lost


def test_a_request_that_timed_out_and_was_left_out_is_no_hanging_worker(worker, monkeypatch):
    with served(worker, timeout_s=0.3) as client, stopped(worker):
        assert [caption(client, encode("wav")).status_code for _ in range(3)] == [504, 504, 504]
    monkeypatch.setattr(worker, "stalled_s", 60.0)
    pid = worker.pid
    with served(worker) as client:
        assert caption(client, encode("wav")).status_code == 200
        wait_until(lambda: not worker._unanswered)
    assert worker.pid == pid


def test_a_model_that_is_not_there(capsys):
    assert main(["serve", "--model", "/no/such/folder", "--port", "0"]) == 1
    assert "/no/such/folder" in capsys.readouterr().err


def test_copies_of_uploads_are_deleted(client, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert caption(client, encode("wav")).status_code == 200
    assert caption(client, b"rubbish").status_code == 415
    assert list(tmp_path.iterdir()) == []


def test_search(client, recordings):
    index = SoundIndex.load(recordings)
    answer = client.post("/v1/audio/search", data={"text": "rain falls", "top": 3}).json()
    assert same_results(answer["results"], index.search(text="rain falls", top=3))
    path = recordings / "03.wav"
    answer = client.post("/v1/audio/search", files={"file": ("03.wav", path.read_bytes())}, data={"top": 1}).json()
    # An upload is no recording of the archive: it finds itself.
    assert answer["results"][0]["path"] == str(path)
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-3)
    response = client.post("/v1/audio/search", data={"text": "  "})
    assert (response.status_code, response.json()["error"]["type"]) == (422, "invalid_field")


def test_the_captioners_clap_searches_its_own_index(model_folder, recordings, worker, tmp_path):
    captioner = Captioner.from_pretrained(model_folder)
    assert open_index(str(recordings), captioner).encoder.clap is captioner.model.clap
    soundfile.write(tmp_path / "a.wav", synthetic_clip(1.0, 1), 48_000)
    SoundIndex.update(tmp_path)
    other = open_index(str(tmp_path), captioner)
    assert other.encoder.clap is not captioner.model.clap
    assert [hit["path"] for hit in other.search(text="rain", top=1)] == [str(tmp_path / "a.wav")]
