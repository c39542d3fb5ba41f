"""`recap live`: captions of sound that is still coming in, from a pipe or a microphone."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import IO, Any

from recap_cli.numbers import positive
from recap_cli.options import add_captioner_arguments, load_captioner

FORMATS = ("text", "jsonl", "csv", "tsv", "srt", "vtt", "audacity")
# As in recap_hf.timeline.pcm, which needs numpy.
SAMPLE_FORMATS = ("u8", "s16le", "s16be", "s24le", "s32le", "f32le", "f64le")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Caption sound while it comes in: WAV or raw PCM from standard input, a named pipe or a device, or a "
        "microphone. No sound is thrown away: when the model is slower than the sound, captions cover more of it at "
        "once (up to the encoder's window, several in a batch); once --buffer seconds wait, the source waits too."
    )
    parser.add_argument("input", nargs="?", default="-", metavar="PIPE", help="default: standard input")
    parser.add_argument("--rate", type=positive, metavar="HZ", help="of raw PCM; WAV says it itself")
    parser.add_argument("--channels", type=positive, default=1, help="of raw PCM, interleaved (default: %(default)s)")
    parser.add_argument("--sample-format", choices=SAMPLE_FORMATS, default="s16le", help="default: %(default)s")
    parser.add_argument(
        "--microphone",
        nargs="?",
        const="",
        metavar="DEVICE",
        help='listen to the default microphone, or one by name or number (needs "recap-hf[live]")',
    )
    parser.add_argument("--interval", type=float, default=5.0, metavar="S", help="a caption every S (default: 5)")
    parser.add_argument("--silence-db", type=float, default=-60.0, help="level of silence (default: %(default)s dBFS)")
    parser.add_argument("--buffer", type=float, default=600.0, metavar="S", help="sound that may wait (default: 600)")
    parser.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=8, help="pieces per pass when behind (default: 8)")
    add_captioner_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the stream ends or Ctrl-C ends it; what has come in is captioned first."""
    from recap_hf.timeline.live import LiveSound

    if args.microphone is not None and args.input != "-":
        print("recap live: error: --microphone and a pipe exclude each other.", file=sys.stderr)
        return 2
    with _blocks(args) as blocks:
        # Before the model is loaded, which takes longer than a pipe holds.
        sound = LiveSound(blocks, args.buffer).start()
        # What cannot be read is said at once, not after the model is loaded.
        if not sound.wait(1, timeout_s=0.5) and sound.error is not None:
            raise sound.error
        with _stop_on_interrupt(sound):
            return _caption(args, sound)


def _caption(args: argparse.Namespace, sound: Any) -> int:
    from recap_hf.timeline.formats import WRITERS
    from recap_hf.timeline.live import LiveCaptioner

    live = LiveCaptioner(load_captioner(args), args.interval, args.silence_db, args.batch_size)
    writer = WRITERS[args.format](sys.stdout)
    writer.name = args.input
    # The head of a CSV or VTT at once, for readers that wait for it.
    sys.stdout.flush()
    print("recap live: listening, Ctrl-C ends", file=sys.stderr, flush=True)
    count = 0
    for segment in live.run(sound):
        if args.format != "jsonl":
            del segment["delay"]
        writer.write(segment)
        count += 1
    writer.close()
    waited = "; the source had to wait" if sound.paused else ""
    print(
        f"recap live: {live.seconds:.1f} s heard, {count} captions, longest delay {live.longest_delay:.2f} s{waited}",
        file=sys.stderr,
    )
    return 0


@contextlib.contextmanager
def _stop_on_interrupt(sound: Any) -> Iterator[None]:
    """The first Ctrl-C ends the stream, and what has come in is captioned; a second one ends at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sound.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _blocks(args: argparse.Namespace) -> Iterator[Any]:
    from recap_hf.timeline.pcm import PcmFormat, pcm_blocks

    if args.microphone is not None:
        from recap_hf.timeline.microphone import microphone_blocks

        yield microphone_blocks(args.microphone, args.rate, args.channels)
        return
    raw = PcmFormat(args.rate, args.channels, args.sample_format) if args.rate else None
    with _opened(args.input) as file:
        yield pcm_blocks(file, raw)


def _opened(name: str) -> IO[bytes]:
    """Unbuffered: a portion is what has come in, and a thread that waits for more holds no lock when Python ends."""
    if name == "-":
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    try:
        return open(name, "rb", buffering=0)
    except OSError as error:
        raise OSError(f"{name}: {(error.strerror or str(error)).lower()}.") from error
