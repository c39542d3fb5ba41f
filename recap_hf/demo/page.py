"""The page: Gradio's components and their events."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import gradio
except ImportError as error:
    raise ImportError('The page needs Gradio: pip install "recap-hf[demo]"') from error

from . import views
from .captioner import DemoCaptioner
from .handlers import READY, Handlers, Update
from .recordings import duration
from .settings import DemoSettings

_STATIC = Path(__file__).parent / "static"
# An upload whose handler never ran, because the tab was closed, is deleted after this.
_FORGOTTEN_UPLOAD_S = 300
_QUEUE_LENGTH = 20
_EXAMPLES = ("sea", "rain", "flute", "clock", "bass_drum")


def example_recordings() -> dict[str, Path]:
    """The package's own recordings by their name on the page."""
    from recap_hf.assets import examples_path

    paths = {name.replace("_", " ").capitalize(): examples_path() / f"{name}.flac" for name in _EXAMPLES}
    return {name: path for name, path in paths.items() if path.is_file()}


def build_page(captioner: DemoCaptioner, settings: DemoSettings | None = None) -> gradio.Blocks:
    """The page as `gradio.Blocks`; its handlers are at `.recap_handlers`."""
    settings = settings or DemoSettings()
    handlers = Handlers(captioner, settings, example_recordings())
    model_name = Path(settings.model).name if settings.model else "recap-tiny"
    with gradio.Blocks(
        title="What does it sound like?",
        analytics_enabled=False,
        delete_cache=(60, _FORGOTTEN_UPLOAD_S),
    ) as page:
        gradio.HTML(views.render("header", settings=settings, model_name=model_name))
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=3, min_width=320):
                recorders = _recorders(settings)
                gradio.HTML(views.render("too_large", settings=settings), elem_id="rc-too-large")
                examples = {}
                with gradio.Row(elem_classes="rc-examples"):
                    gradio.HTML("Examples:", elem_classes="rc-try")
                    for name in handlers.examples:
                        examples[name] = gradio.Button(name, size="sm", elem_classes="rc-example")
                pieces = {"status": gradio.HTML(views.status(READY), elem_id="rc-status")}
                for name in ("caption", "recording", "timeline", "explanation"):
                    pieces[name] = gradio.HTML(elem_id=f"rc-{name}", elem_classes="rc-piece")
                forget = gradio.Button("Delete this recording", size="sm", elem_id="rc-forget")
            with gradio.Column(scale=2, min_width=300):
                gradio.HTML("<h2>Captions to retrieve from</h2>", elem_classes="rc-heading")
                choices = gradio.Radio(
                    captioner.choices, value=captioner.choices[0], label="Datastore", elem_id="rc-choices"
                )
                own = gradio.Textbox(
                    label="Your own captions, one in each line",
                    info=f"At most {settings.max_captions:,}. They are deleted together with your recording.",
                    placeholder="church bells ring in the distance\na tram brakes and squeals",
                    lines=6,
                    max_lines=14,
                    elem_id="rc-own",
                )
                use_own = gradio.Button("Use my captions", variant="primary", elem_id="rc-use-own")
                pieces["comparison"] = gradio.HTML(elem_id="rc-comparison", elem_classes="rc-piece")
        controls = {"choices": choices, "own": own, "use_own": use_own, "forget": forget}
        _connect(page, handlers, recorders, examples, controls, pieces)
    page.recap_handlers = handlers
    return page


def _recorders(settings: DemoSettings) -> dict[str, gradio.Audio]:
    """Two tabs with text instead of two icons below one box."""
    limit = duration(settings.max_seconds)
    tabs = (
        ("upload", "Upload a file", "upload", f"A sound file, up to {limit}, {settings.max_megabytes:g} MB"),
        ("record", "Record", "microphone", f"Your microphone, up to {limit}"),
    )
    recorders = {}
    with gradio.Tabs():
        for name, title, source, label in tabs:
            with gradio.Tab(title):
                recorders[name] = gradio.Audio(
                    sources=[source], label=label, elem_id=f"rc-{name}", type="filepath", editable=False, buttons=[]
                )
    return recorders


def _connect(
    page: gradio.Blocks,
    handlers: Handlers,
    recorders: dict[str, gradio.Audio],
    examples: dict[str, gradio.Button],
    controls: dict[str, Any],
    pieces: dict[str, gradio.HTML],
) -> None:
    """Connects events to handlers. The model serves one visitor at a time; the others wait."""
    components = {**pieces, **recorders, "choices": controls["choices"]}

    def outputs(updates: Iterator[Update]) -> Iterator[dict[Any, Any]]:
        for update in updates:
            if "choices" in update:
                names, chosen = update["choices"]
                update = {**update, "choices": gradio.update(choices=names, value=chosen)}
            yield {components[name]: value for name, value in update.items()}

    def receiver(name: str | None) -> Callable[..., Iterator[dict[Any, Any]]]:
        def call(path: str | None, request: gradio.Request) -> Iterator[dict[Any, Any]]:
            if path is not None:
                file = inside_uploads(path)
                # The recorder is emptied, because its file is deleted.
                emptied = dict.fromkeys(recorders.values())
                for update in outputs(handlers.receive(request.session_hash, file, name or file.name)):
                    yield {**emptied, **update}
                    emptied = {}

        return call

    def with_text(handler: Callable[..., Iterator[Update]]) -> Callable[..., Iterator[dict[Any, Any]]]:
        def call(text: str, request: gradio.Request) -> Iterator[dict[Any, Any]]:
            yield from outputs(handler(request.session_hash, text))

        return call

    def without(handler: Callable[..., Iterator[Update]], *values: Any) -> Callable[..., Iterator[dict[Any, Any]]]:
        def call(request: gradio.Request) -> Iterator[dict[Any, Any]]:
            yield from outputs(handler(request.session_hash, *values))

        return call

    def left(request: gradio.Request) -> None:
        handlers.sessions.forget(request.session_hash)

    event = {
        "outputs": list(components.values()),
        "concurrency_limit": 1,
        "concurrency_id": "model",
        "show_progress": "minimal",
        "show_progress_on": pieces["status"],
        "api_visibility": "private",
    }
    recorders["upload"].upload(receiver(None), recorders["upload"], **event)
    recorders["record"].stop_recording(receiver("Your recording"), recorders["record"], **event)
    for name, button in examples.items():
        button.click(without(handlers.example, name), None, **event)
    controls["choices"].input(with_text(handlers.choose), controls["choices"], **event)
    controls["use_own"].click(with_text(handlers.use_own), controls["own"], **event)
    controls["forget"].click(without(handlers.forget), None, **event)
    page.unload(left)


def inside_uploads(path: str | Path) -> Path:
    """`path`, resolved. Raises `ValueError` if it is outside the folder of uploads: such a file is not deleted."""
    path = Path(path).resolve()
    if not path.is_relative_to(Path(gradio.utils.get_upload_folder()).resolve()):
        raise ValueError("An upload came from outside the folder of uploads.")
    return path


def launch_options(settings: DemoSettings) -> dict[str, Any]:
    """Arguments of `Blocks.launch`: theme, script, limits. Nothing is loaded from another server."""
    # Strings are fonts of the visitor's machine; those of the themes come from a server.
    theme = gradio.themes.Default(
        primary_hue="teal",
        neutral_hue="zinc",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(
        # Those of the theme are too pale to read: these have a contrast of 5 and more.
        body_text_color_subdued="#52525b",
        body_text_color_subdued_dark="#a1a1aa",
        block_info_text_color="#52525b",
        block_info_text_color_dark="#a1a1aa",
        block_label_text_color="#3f3f46",
        block_title_text_color="#3f3f46",
        input_placeholder_color="#71717a",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#115e59",
        checkbox_background_color_selected="#0f766e",
        checkbox_border_color_selected="#0f766e",
        checkbox_border_color="#71717a",
    )
    script = (_STATIC / "page.js").read_text(encoding="utf-8")
    return {
        "theme": theme,
        "css": (_STATIC / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>{script}</script>",
        "max_file_size": settings.max_bytes,
        "footer_links": [],
        "ssr_mode": False,
        "enable_monitoring": False,
        "show_error": False,
    }


def launch(
    settings: DemoSettings | None = None,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    on_ready: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Loads the captioner and serves the page until it is interrupted.

    An upload is written to Gradio's folder (`GRADIO_TEMP_DIR`) and deleted as soon as it has been read.

    Args:
        settings ([`DemoSettings`], *optional*): model, datastores, limits.
        host, port (*optional*): default Gradio's: 127.0.0.1 and the first free port from 7860 on, or what its
            environment variables say, as those of a Space do.
        share (`bool`, *optional*, defaults to `False`): ask Gradio's servers for a public address.
        on_ready (*optional*): called with the page's address when it can be visited.
        stop (*optional*): serve until this is set instead.

    Raises:
        `OSError`: if the port is taken.
    """
    settings = settings or DemoSettings()
    stop = stop or threading.Event()
    page = build_page(DemoCaptioner.load(settings), settings)
    threading.Thread(target=page.recap_handlers.sessions.sweep_until, args=(stop,), daemon=True).start()
    page.queue(max_size=_QUEUE_LENGTH, api_open=False)
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            quiet=True,
            prevent_thread_lock=True,
            **launch_options(settings),
        )
        if on_ready is not None:
            on_ready(public or address)
        stop.wait()
    finally:
        stop.set()
        page.close(verbose=False)
