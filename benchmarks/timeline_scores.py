"""How well a timeline fits a recording whose events are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.timeline_recordings import PlacedEvent

TOLERANCES_S = (0.25, 0.5, 1.0, 2.0)


def boundary_figures(segments: Sequence[dict[str, Any]], events: Sequence[PlacedEvent]) -> dict[str, Any]:
    """Share of the events whose beginning and end both have a boundary of the timeline nearby.

    Beside it, because many boundaries are near to anything: the same for as many boundaries at equal distances, and
    the share of the boundaries that are near a beginning or end of an event.

    Args:
        segments: a timeline, without gaps.
        events: what is heard in the recording, in order.

    Returns:
        `dict`: `boundaries`, `truth` (how many there are), and by tolerance in seconds `both_ends`, `starts`, `ends`,
        `both_ends_without_gap` (of the events that touch another), `evenly_spaced` and `precision`.
    """
    found = np.array([segment["start"] for segment in segments[1:]])
    even = np.linspace(0, segments[-1]["end"], len(found) + 2)[1:-1]
    truth = np.array(sorted({time for event in events for time in (event.start, event.end)}))
    touching = _touching(events)
    result: dict[str, Any] = {"boundaries": len(found), "truth": len(truth), "without_gap": int(sum(touching))}
    for tolerance in TOLERANCES_S:
        starts = [_near(found, event.start, tolerance) for event in events]
        ends = [_near(found, event.end, tolerance) for event in events]
        both = np.logical_and(starts, ends)
        evenly = [_near(even, event.start, tolerance) and _near(even, event.end, tolerance) for event in events]
        result[f"{tolerance:g}"] = {
            "both_ends": float(np.mean(both)),
            "starts": float(np.mean(starts)),
            "ends": float(np.mean(ends)),
            "both_ends_without_gap": float(np.mean(both[touching])) if any(touching) else None,
            "evenly_spaced": float(np.mean(evenly)),
            "precision": float(np.mean([_near(truth, time, tolerance) for time in found])) if len(found) else 0.0,
        }
    return result


def _touching(events: Sequence[PlacedEvent]) -> list[bool]:
    ends = [event.end for event in events]
    starts = [event.start for event in events]
    return [
        (index > 0 and event.start - ends[index - 1] < 0.05)
        or (index + 1 < len(events) and starts[index + 1] - event.end < 0.05)
        for index, event in enumerate(events)
    ]


def _near(times: np.ndarray, time: float, tolerance: float) -> bool:
    return bool(len(times)) and bool(np.abs(times - time).min() <= tolerance)


def naming_figures(
    segments: Sequence[dict[str, Any]], events: Sequence[PlacedEvent], named: Callable[[str], set[str]]
) -> dict[str, Any]:
    """Share of the events that the timeline names at their time, and of its names that are right.

    A segment belongs to an event if they share at least half of the shorter one. An event is named if a caption of a
    segment that belongs to it names it; a name is right if its segment belongs to an event of that name.

    Args:
        segments: a timeline.
        events: what is heard in the recording.
        named: the events that a caption names.

    Returns:
        `dict`: `recall`, `precision`, `events`, `names`, `recall_per_event`, and of the time without an event the
        share in which one is named (`false_naming_between_events`).
    """
    right = total = 0
    heard: dict[int, bool] = dict.fromkeys(range(len(events)), False)
    for segment in segments:
        names = named(segment["caption"])
        here = [index for index, event in enumerate(events) if _belongs(segment, event)]
        total += len(names)
        right += len(names & {events[index].event for index in here})
        for index in here:
            heard[index] |= events[index].event in names
    kinds = sorted({event.event for event in events})
    by_kind = {kind: [heard[index] for index, event in enumerate(events) if event.event == kind] for kind in kinds}
    return {
        "recall": float(np.mean(list(heard.values()))),
        "recall_by_kind": float(np.mean([np.mean(hits) for hits in by_kind.values()])),
        "precision": right / total if total else 0.0,
        "events": len(events),
        "names": total,
        "recall_per_event": {kind: round(float(np.mean(hits)), 3) for kind, hits in by_kind.items()},
        "false_naming_between_events": _false_naming(segments, events, named),
    }


def _belongs(segment: dict[str, Any], event: PlacedEvent) -> bool:
    shared = min(segment["end"], event.end) - max(segment["start"], event.start)
    return shared >= 0.5 * min(segment["end"] - segment["start"], event.end - event.start)


def _false_naming(
    segments: Sequence[dict[str, Any]], events: Sequence[PlacedEvent], named: Callable[[str], set[str]]
) -> float:
    """In steps of 50 ms."""
    step = 0.05
    times = np.arange(0, segments[-1]["end"], step) + step / 2
    free = np.ones(len(times), bool)
    for event in events:
        free &= (times < event.start) | (times > event.end)
    naming = np.zeros(len(times), bool)
    for segment in segments:
        if named(segment["caption"]):
            naming |= (times >= segment["start"]) & (times < segment["end"])
    return float(naming[free].mean()) if free.any() else 0.0
