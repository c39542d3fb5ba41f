"""Live captions over MQTT, with a real broker and its own subscriber."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import synthetic_clip

from recap_cli import main

pytest.importorskip("paho.mqtt.client", reason="needs recap-hf[mqtt]")
from recap_hf.audio.mqtt import MqttPublisher

BROKER = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/opt/homebrew/sbin")
with_broker = pytest.mark.skipif(not BROKER or not shutil.which("mosquitto_sub"), reason="needs mosquitto")


def start_broker(folder, port, *lines):
    config = folder / "mosquitto.conf"
    config.write_text(
        "\n".join([f"listener {port} 127.0.0.1", "user root", *(lines or ["allow_anonymous true"])]) + "\n"
    )
    process = subprocess.Popen([BROKER, "-c", str(config)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for _ in range(200):
        with socket.socket() as line:
            if line.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.02)
    raise AssertionError("mosquitto does not start")


def end(process):
    process.terminate()
    process.wait()


@pytest.fixture
def port():
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return line.getsockname()[1]


@pytest.fixture
def broker(tmp_path, port):
    process = start_broker(tmp_path, port)
    yield port
    end(process)


def subscriber(port, *topics):
    topics = [word for topic in topics for word in ("-t", topic)]
    process = subprocess.Popen(
        ["mosquitto_sub", "-p", str(port), "-q", "1", "-F", "%r %t %p", *topics], stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.3)
    return process


@with_broker
def test_captions_of_a_live_run(broker, model_folder, monkeypatch, capsys, tmp_path):
    sub = subscriber(broker, "home/kitchen/#", "homeassistant/#")
    sound = np.concatenate([synthetic_clip(2.5, 1), np.zeros(48_000, np.float32), synthetic_clip(1.0, 2)])
    pcm = (sound * 32_767).astype("<i2").tobytes()
    (tmp_path / "sound.pcm").write_bytes(pcm)
    arguments = ["live", "--rate", "48000", "--interval", "1", "--model", model_folder, "--max-new-tokens", "4"]
    with open(tmp_path / "sound.pcm", "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        assert main([*arguments, "--format", "jsonl", "--mqtt", f"127.0.0.1:{broker}/home/kitchen/sound"]) == 0
    time.sleep(0.3)
    end(sub)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lines = [line.split(" ", 2) for line in sub.stdout.read().splitlines()]
    got = [json.loads(text) for _, topic, text in lines if topic == "home/kitchen/sound"]
    names = ("caption", "score", "start", "end")
    assert [{name: one[name] for name in names} for one in got] == [
        {name: one[name] for name in names} for one in printed
    ]
    assert len(got) >= 2 and all("time" in one for one in got)
    assert [text for _, topic, text in lines if topic == "home/kitchen/sound/status"] == ["online", "offline"]
    [(_, topic, text)] = [line for line in lines if line[1].startswith("homeassistant/")]
    assert topic == "homeassistant/sensor/recap_home_kitchen_sound/config"
    sensor = json.loads(text)
    assert sensor["state_topic"] == "home/kitchen/sound"
    assert sensor["availability_topic"] == "home/kitchen/sound/status"
    assert sensor["unique_id"] in sensor["device"]["identifiers"]


@with_broker
def test_a_broker_that_goes_and_comes_back(tmp_path, port):
    process, notes = start_broker(tmp_path, port), []
    segment = {"score": 0.5, "start": 0.0, "end": 1.0, "retrieved": []}
    with MqttPublisher(f"127.0.0.1:{port}/t", notes.append) as publisher:
        publisher.publish({**segment, "caption": "before"})
        end(process)
        publisher.publish({**segment, "caption": "meanwhile"})
        process = start_broker(tmp_path, port)
        sub = subscriber(port, "t")
        latest = time.monotonic() + 20
        while not any("is back" in note for note in notes):
            assert time.monotonic() < latest, notes
            time.sleep(0.05)
        publisher.publish({**segment, "caption": "after"})
        time.sleep(0.3)
    end(sub)
    end(process)
    got = [json.loads(line.split(" ", 2)[2])["caption"] for line in sub.stdout.read().splitlines()]
    # With the quality of service 1 a message may come twice.
    assert [caption for caption in dict.fromkeys(got) if caption != "before"] == ["meanwhile", "after"]
    assert any("is away" in note for note in notes)


@with_broker
def test_what_does_not_arrive_is_said(tmp_path, port, monkeypatch):
    from recap_hf.audio import mqtt

    monkeypatch.setattr(mqtt, "_GOODBYE_S", 0.2)
    process, notes = start_broker(tmp_path, port), []
    with MqttPublisher(f"127.0.0.1:{port}/t", notes.append) as publisher:
        with publisher._changed:
            assert publisher._changed.wait_for(lambda: not publisher._open, 5)
        end(process)
        publisher.publish({"caption": "lost", "score": 0.5, "start": 0.0, "end": 1.0})
    # The caption, and that it is offline.
    assert notes[-1] == f"2 messages did not reach the MQTT broker 127.0.0.1:{port}"


@with_broker
def test_the_status_of_one_that_is_killed(broker):
    script = f"""
from recap_hf.audio.mqtt import MqttPublisher
import os, signal
publisher = MqttPublisher("127.0.0.1:{broker}/t", print)
publisher._changed.acquire()
publisher._changed.wait_for(lambda: not publisher._open, 5)
os.kill(os.getpid(), signal.SIGKILL)
"""
    sub = subscriber(broker, "t/status")
    subprocess.run([sys.executable, "-c", script], check=False)
    time.sleep(0.5)
    end(sub)
    assert [line.split()[2] for line in sub.stdout.read().splitlines()] == ["online", "offline"]


@with_broker
def test_a_broker_that_wants_a_password(tmp_path, port, monkeypatch):
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "me", "s3:cret@"], check=True)
    passwords.chmod(0o644)
    process = start_broker(tmp_path, port, "allow_anonymous false", f"password_file {passwords}")
    try:
        with pytest.raises(OSError, match="refuses: Not authorized"):
            MqttPublisher(f"127.0.0.1:{port}/t", print)
        with MqttPublisher(f"me:s3%3Acret%40@127.0.0.1:{port}/t", print):
            pass
        monkeypatch.setenv("RECAP_MQTT_PASSWORD", "s3:cret@")
        with MqttPublisher(f"me@127.0.0.1:{port}/t", print):
            pass
        # A URL has percent signs of its own, a variable none.
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), "you", "p%41ss"], check=True)
        process.send_signal(signal.SIGHUP)
        monkeypatch.setenv("RECAP_MQTT_PASSWORD", "p%41ss")
        with MqttPublisher(f"you@127.0.0.1:{port}/t", print):
            pass
    finally:
        end(process)


@pytest.mark.parametrize("address", ["localhost", "localhost/", "/t", "http://localhost/t", "localhost/a/+/b", "h/#"])
def test_wrong_addresses(address):
    with pytest.raises(ValueError, match="Expected HOST"):
        MqttPublisher(address, print)


def test_no_broker(capsys, port):
    assert main(["live", "--mqtt", f"127.0.0.1:{port}/t"]) == 1
    assert f"recap live: error: The MQTT broker 127.0.0.1:{port} cannot be reached" in capsys.readouterr().err


def test_topics_have_ids_of_their_own():
    topics = ("home/kitchen", "home/a_b", "home/a/b", "home/a-b", "дом/кухня", "дом/зал")
    found = []
    for topic in topics:
        publisher = MqttPublisher.__new__(MqttPublisher)
        publisher.topic = topic
        found.append(publisher._id)
    assert found[0] == "recap_home_kitchen"
    assert len(set(found)) == len(topics) and all(name.isascii() for name in found)
