"""Live captions as MQTT messages, which Home Assistant finds by itself."""

import contextlib
import datetime
import json
import os
import re
import threading
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from recap_hf.version import __version__

try:
    from paho.mqtt import client as mqtt
except ImportError:
    mqtt = None

_PASSWORD_VARIABLE = "RECAP_MQTT_PASSWORD"
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_CONNECT_S, _GOODBYE_S = 10.0, 5.0
# Messages to keep while the broker is away, and the longest time in seconds between two attempts to reach it.
_MOST_QUEUED, _LONGEST_PAUSE_S = 10_000, 60
# At least once; a broker that is back gets what was captioned meanwhile.
_QOS = 1
# Home Assistant's longest state.
_LONGEST_STATE = 255


class MqttPublisher(contextlib.AbstractContextManager):
    """Publishes captions to an MQTT broker, and keeps the connection.

    `TOPIC` gets a JSON object for each caption (`caption`, `score`, `start` and `end` in seconds, `time` of its
    publication), `TOPIC/status` is `online` or `offline`, and `homeassistant/sensor/.../config` makes it a sensor of
    Home Assistant; the last two are retained.

    Args:
        address (`str`): `[mqtt[s]://][USER[:PASSWORD]@]HOST[:PORT]/TOPIC`; the password may be in the variable
            `RECAP_MQTT_PASSWORD` instead.
        note (`Callable[[str], None]`): receives a message when the connection is lost and when it is back.

    Raises:
        `ValueError`: for an address of another form. `OSError`: if the broker cannot be reached, or refuses.
        `ImportError`: without paho-mqtt.
    """

    def __init__(self, address: str, note: Callable[[str], None]) -> None:
        if mqtt is None:
            raise ImportError('MQTT needs paho-mqtt: pip install "recap-hf[mqtt]"')
        url = urlsplit(address if "://" in address else f"mqtt://{address}")
        self.topic = url.path.strip("/")
        # `#` and `+` stand for many topics; nothing is published to them.
        wrong = url.fragment or url.query or "+" in self.topic
        if url.scheme not in _PORTS or not url.hostname or not self.topic or wrong:
            raise ValueError(f"Expected HOST[:PORT]/TOPIC, such as localhost/home/kitchen/sound, got {address!r}.")
        self.broker = f"{url.hostname}:{url.port or _PORTS[url.scheme]}"
        self._note = note
        self._answered = threading.Event()
        self._refusal = ""
        # Messages without an acknowledgement of the broker.
        self._open, self._changed = 0, threading.Condition()
        self._client = client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        client.max_queued_messages_set(_MOST_QUEUED)
        client.reconnect_delay_set(1, _LONGEST_PAUSE_S)
        client.will_set(f"{self.topic}/status", "offline", _QOS, retain=True)
        client.on_connect, client.on_disconnect = self._connected, self._disconnected
        client.on_publish = lambda *_: self._count(-1)
        if url.username:
            password = unquote(url.password or "") or os.environ.get(_PASSWORD_VARIABLE) or None
            client.username_pw_set(unquote(url.username), password)
        if url.scheme == "mqtts":
            client.tls_set()
        try:
            client.connect(url.hostname, url.port or _PORTS[url.scheme])
        except OSError as error:
            raise OSError(f"The MQTT broker {self.broker} cannot be reached: {error}") from error
        client.loop_start()
        if not self._answered.wait(_CONNECT_S) or self._refusal:
            client.loop_stop()
            raise OSError(f"The MQTT broker {self.broker} refuses: {self._refusal or 'no answer'}")

    def _connected(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._refusal = str(reason)
        else:
            if self._answered.is_set():
                self._note(f"the MQTT broker {self.broker} is back")
            self._send(self._discovery_topic, json.dumps(self._discovery()), retain=True)
            self._send(f"{self.topic}/status", "online", retain=True)
        self._answered.set()

    def _disconnected(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure and self._answered.is_set() and not self._refusal:
            self._note(f"the MQTT broker {self.broker} is away ({reason}); captions wait for it")

    @property
    def _id(self) -> str:
        name = "recap_" + re.sub(r"\W+", "_", self.topic, flags=re.ASCII)
        # Other topics may have the same letters: `home/a_b`, `home/a/b`.
        plain = re.fullmatch("[A-Za-z0-9/]+", self.topic)
        return name if plain else f"{name}_{zlib.crc32(self.topic.encode()):08x}"

    @property
    def _discovery_topic(self) -> str:
        return f"homeassistant/sensor/{self._id}/config"

    def _discovery(self) -> dict[str, Any]:
        device = {"identifiers": [self._id], "name": f"recap live {self.topic}", "sw_version": __version__}
        return {
            "name": "Caption",
            "unique_id": self._id,
            "state_topic": self.topic,
            "value_template": f"{{{{ value_json.caption[:{_LONGEST_STATE}] }}}}",
            "json_attributes_topic": self.topic,
            "availability_topic": f"{self.topic}/status",
            "icon": "mdi:ear-hearing",
            "device": device,
        }

    def publish(self, segment: dict[str, Any]) -> None:
        """Publishes a segment of [`LiveCaptioner`]. It does not wait for the broker."""
        message = {name: segment[name] for name in ("caption", "score", "start", "end")}
        message["time"] = datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
        if not self._send(self.topic, json.dumps(message, ensure_ascii=False)):
            self._note(f"a caption is not published: {_MOST_QUEUED} wait for the MQTT broker")

    def _send(self, topic: str, text: str, retain: bool = False) -> bool:
        """Whether the message is sent, or waits for the broker."""
        self._count(1)
        queued = self._client.publish(topic, text, _QOS, retain).rc != mqtt.MQTT_ERR_QUEUE_SIZE
        self._count(0 if queued else -1)
        return queued

    def _count(self, change: int) -> None:
        with self._changed:
            self._open += change
            self._changed.notify_all()

    def __exit__(self, *_: Any) -> None:
        self._send(f"{self.topic}/status", "offline", retain=True)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._open, _GOODBYE_S):
                self._note(f"{self._open} messages did not reach the MQTT broker {self.broker}")
        self._client.disconnect()
        self._client.loop_stop()
