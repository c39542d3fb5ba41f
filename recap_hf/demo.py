"""The web page of `recap demo`: Gradio's components around one captioner."""

import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recap_hf.assets import examples_path
from recap_hf.audio.stream import AudioStream
from recap_hf.audio.timeline import caption_timeline
from recap_hf.explain import draw_explanation, explain_caption
from recap_hf.modeling.audio_recap import is_silent
from recap_hf.modeling.captioning_recap import READ_ERRORS, Captioner
from recap_hf.modeling.options_recap import CaptionOptions

try:
    import gradio
except ImportError as error:
    raise ImportError('The page needs Gradio: pip install "recap-hf[demo]"') from error

NO_CAPTIONS = "None: the model alone"
OWN_CAPTIONS = "Your own captions, written below"
_MAX_OWN, _MAX_CHARACTERS = 500, 300
# Uploads are deleted after this time, in seconds, and how often Gradio looks for them.
_KEEP_S, _LOOK_S = 1800, 60
_QUEUE_LENGTH = 20
_EXAMPLES = ("sea", "rain", "flute", "clock", "bass_drum")
_TITLE = "What does it sound like?"
_HEAD = f"""# {_TITLE}
Record or upload a sound and get a caption. The model retrieves captions of similar sounds and generates a new caption
from the sound and from them. Other captions to retrieve from give another caption of the same sound.
Your recording is deleted from this server {_KEEP_S // 60} minutes after you sent it, or when the server stops."""


class RefusedError(ValueError):
    """The page does not accept an input; the message is for the visitor."""


@dataclass
class DemoSettings:
    """Settings of the page.

    Args:
        model (`str`, *optional*): folder or Hub id of a captioner, default the embedded recap-tiny.
        datastores (`dict[str, str]`, *optional*): further captions to choose from: name on the page to a datastore's
            folder or Hub id, or a file of captions.
        device (`str`, *optional*): default a GPU if there is one.
        max_seconds (`float`, *optional*, defaults to 120): longest recording.
        max_megabytes (`float`, *optional*, defaults to 25): largest upload, in 10^6 bytes.
    """

    model: str | None = None
    datastores: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    max_seconds: float = 120.0
    max_megabytes: float = 25.0


class DemoCaptioner:
    """A captioner with several datastores to choose from, which describes recordings for the page.

    Args:
        captioner ([`Captioner`])
        settings ([`DemoSettings`], *optional*)

    Raises:
        `ValueError`: if a datastore was made by another text encoder. `OSError`: if there is no such datastore.
    """

    def __init__(self, captioner: Captioner, settings: DemoSettings | None = None) -> None:
        self.captioner = captioner
        self.settings = settings or DemoSettings()
        named = {} if captioner.datastore is None else {"Built in": captioner}
        named |= {name: captioner.with_datastore(source) for name, source in self.settings.datastores.items()}
        self._captioners = {f"{name} ({len(one.datastore):,} captions)": one for name, one in named.items()}
        self._captioners[NO_CAPTIONS] = captioner.with_options(CaptionOptions(k=0))

    @property
    def choices(self) -> list[str]:
        """Names of what captions can be retrieved from, the checkpoint's own datastore first."""
        return [*self._captioners, OWN_CAPTIONS]

    def describe(self, path: str, choice: str, own: str = "") -> Iterator[dict[str, Any]]:
        """Describes a recording; yields parts of the page as they become ready.

        Args:
            path (`str`): file of the recording.
            choice (`str`): one of `choices`.
            own (`str`): a visitor's captions, one in each line, for `OWN_CAPTIONS`.

        Yields:
            `dict`: `caption` (`str`), `retrieved` (rows of similarity and caption), `timeline` (rows of start, end and
            caption, more each time), `explanation` (a `Figure`, or `None` if nothing can be explained).

        Raises:
            `RefusedError`: for a recording that is too long or cannot be read, or captions that are too many or too
                long.
        """
        captioner = self._captioner_of(choice, own)
        waveform = self._read(path)
        result = captioner.caption([waveform])[0].to_dict()
        rows = [[round(hit["score"], 2), hit["caption"]] for hit in result["retrieved"]]
        yield {"caption": result["caption"], "retrieved": rows}
        segments = []
        # In small batches: the first segments are shown early.
        for segment in caption_timeline(captioner, waveform, batch_size=2):
            segments.append([round(segment["start"], 1), round(segment["end"], 1), segment["caption"]])
            yield {"timeline": [*segments]}
        yield {"explanation": self._explain(captioner, waveform, result)}

    def _captioner_of(self, choice: str, own: str) -> Captioner:
        if choice != OWN_CAPTIONS:
            return self._captioners[choice]
        captions = [" ".join(line.split()) for line in own.splitlines() if line.strip()]
        if not 0 < len(captions) <= _MAX_OWN or max(map(len, captions)) > _MAX_CHARACTERS:
            wanted = f"1 to {_MAX_OWN} captions of your own, one in each line, of at most {_MAX_CHARACTERS} characters"
            raise RefusedError(f"Write {wanted}; got {len(captions)}.")
        return self.captioner.with_datastore(captions)

    def _read(self, path: str) -> np.ndarray:
        """The waveform of a file; no more than `max_seconds` are ever in memory."""
        rate = self.captioner.sampling_rate
        # Encoders pad their last packet: a tenth of a second more is accepted.
        left, blocks = int((self.settings.max_seconds + 0.1) * rate), []
        try:
            for block in AudioStream(path, rate):
                left -= len(block)
                if left < 0:
                    longest = f"{self.settings.max_seconds:g} seconds"
                    raise RefusedError(f"The recording is longer than {longest}. Please cut out a part.")
                blocks.append(block)
        except RefusedError:
            raise
        except READ_ERRORS as error:
            raise RefusedError(str(error).replace(path, Path(path).name)) from error
        return np.concatenate(blocks)

    def _explain(self, captioner: Captioner, waveform: np.ndarray, result: dict[str, Any]) -> Any:
        cross_attention = captioner.model.config.decoder.add_cross_attention
        if is_silent(waveform) or not cross_attention or not result["caption"].strip():
            return None
        texts = {"caption": result["caption"], "retrieved": result["retrieved"]}
        explanation = explain_caption(captioner, waveform, **texts)
        extractor = captioner.processor.feature_extractor
        return draw_explanation(explanation, waveform, extractor, captioner.sampling_rate)


def build_page(captioner: DemoCaptioner) -> gradio.Blocks:
    """The page as `gradio.Blocks`."""
    settings, choices = captioner.settings, captioner.choices
    limits = f"up to {settings.max_seconds:g} seconds and {settings.max_megabytes:g} MB"
    with gradio.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(_LOOK_S, _KEEP_S)) as page:
        gradio.Markdown(_HEAD)
        with gradio.Row():
            with gradio.Column(min_width=300):
                audio = {"sources": ["upload", "microphone"], "type": "filepath", "editable": False, "buttons": []}
                recording = gradio.Audio(label=f"Recording, {limits}", **audio)
                paths = [path for name in _EXAMPLES if (path := examples_path() / f"{name}.flac").is_file()]
                if paths:
                    labels = [path.stem.replace("_", " ").capitalize() for path in paths]
                    gradio.Examples([[str(path)] for path in paths], recording, example_labels=labels)
                # The browser's part of `Audio` takes files of the types audio/* alone.
                video = gradio.UploadButton("Or the sound of a video", file_types=["video"], size="sm")
                choice = gradio.Radio(choices, value=choices[0], label="Captions to retrieve from")
                text = "church bells ring in the distance\na tram brakes and squeals"
                own = gradio.Textbox(label="Your own captions, one in each line", placeholder=text, lines=4)
                button = gradio.Button("Caption", variant="primary")
            with gradio.Column(min_width=300):
                table = partial(gradio.Dataframe, interactive=False, wrap=True)
                text = "Timeline in seconds: choose a row to listen from there"
                parts = {
                    "caption": gradio.Textbox(label="Caption", interactive=False),
                    "retrieved": table(headers=["similarity", "caption"], label="Retrieved captions"),
                    "timeline": table(headers=["start", "end", "caption"], label=text, type="array"),
                }
        parts["explanation"] = gradio.Plot(label="Explanation: regions of the sound that each word depends on")

        def describe(path: str | None, chosen: str, text: str) -> Iterator[dict[Any, Any]]:
            if path is None:
                raise gradio.Error("Record or upload a sound, or choose an example.", print_exception=False)
            yield dict.fromkeys(parts.values())
            try:
                for update in captioner.describe(path, chosen, text):
                    yield {parts[name]: value for name, value in update.items()}
            except RefusedError as error:
                # Gradio shows messages as HTML.
                raise gradio.Error(html.escape(str(error)), print_exception=False) from error

        event = {"fn": describe, "inputs": [recording, choice, own], "outputs": [*parts.values()]}
        # The model serves one visitor at a time; the others wait.
        event |= {"concurrency_limit": 1, "concurrency_id": "describe", "api_visibility": "private"}
        gradio.on([button.click, recording.upload, recording.stop_recording], **event)
        video.upload(lambda path: path, video, recording, api_visibility="private").then(**event)

        def listen(rows: Any, selected: gradio.SelectData) -> Any:
            return gradio.update(playback_position=float(rows[selected.index[0]][0]))

        parts["timeline"].select(listen, parts["timeline"], recording, api_visibility="private")
    return page


def launch(
    settings: DemoSettings | None = None,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    captioner: Captioner | None = None,
) -> None:
    """Serves the page until it is interrupted.

    Args:
        settings ([`DemoSettings`], *optional*): model, datastores, limits.
        host, port (*optional*): default Gradio's: 127.0.0.1 and the first free port from 7860 on, or what its
            environment variables say, as those of a Space do.
        share (`bool`, *optional*, defaults to `False`): ask Gradio's servers for a public address.
        captioner ([`Captioner`], *optional*): default: it is loaded as the settings say.

    Raises:
        `OSError`: if the port is taken.
    """
    settings = settings or DemoSettings()
    if captioner is None:
        captioner = Captioner.from_pretrained(settings.model, device=settings.device)
    page = build_page(DemoCaptioner(captioner, settings))
    page.queue(max_size=_QUEUE_LENGTH, api_open=False)
    page.launch(server_name=host, server_port=port, share=share, **launch_options(settings))


def launch_options(settings: DemoSettings) -> dict[str, Any]:
    """Arguments of `Blocks.launch`: fonts of the visitor's machine, limits. Nothing is loaded from another server."""
    return {
        "theme": gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        "max_file_size": int(settings.max_megabytes * 1e6),
        "footer_links": [],
        "ssr_mode": False,
        "enable_monitoring": False,
    }
