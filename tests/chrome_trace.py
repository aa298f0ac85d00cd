"""The Trace Event Format of the Chromium project, as far as traces use it: reads a file and refuses what is not valid.

What Perfetto's importer asks beyond the fields: slices of a track nest, asynchronous slices of an id too, an arrow
begins once, before it goes on, and each of its ends is in a slice.
"""

import collections
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

Event = dict[str, Any]
Slices = dict[tuple[int, int], list[tuple[int, int]]]

NUMBER = (int, float)
PLACE: dict[str, Any] = {"name": str, "pid": int, "tid": int, "ts": NUMBER, "cat": str}
FIELDS: dict[str, dict[str, Any]] = {
    "M": {"name": str, "pid": int, "args": dict},
    "X": PLACE | {"dur": NUMBER, "args": dict},
    "b": PLACE | {"id": str, "args": dict},
    "e": PLACE | {"id": str, "args": dict},
    "i": PLACE | {"s": str},
    "s": PLACE | {"id": str},
    "t": PLACE | {"id": str},
    "f": PLACE | {"id": str, "bp": str},
}
"""What each kind of event must have."""

METADATA: dict[str, dict[str, Any]] = {
    "process_name": {"name": str},
    "thread_name": {"name": str},
    "process_sort_index": {"sort_index": int},
}


def ns(microseconds: float) -> int:
    """Nanoseconds, which is what traces are written from."""
    return round(microseconds * 1000)


def read(path: Path) -> list[Event]:
    """The events of a trace that is valid."""
    events: list[Event] = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    assert isinstance(events, list), "the JSON array form"
    check(events)
    return events


def check(events: Sequence[Event]) -> None:
    """Raises AssertionError where a viewer would drop or misplace something."""
    for event in events:
        _check_fields(event)
    _check_names(events)
    timed = sorted((event for event in events if event["ph"] != "M"), key=lambda event: ns(event["ts"]))
    slices: Slices = collections.defaultdict(list)
    for event in timed:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((ns(event["ts"]), ns(event["ts"]) + ns(event["dur"])))
    for track in slices.values():
        _check_nesting(track)
    for own in _by_id(event for event in timed if event["ph"] in "be"):
        _check_asynchronous(own)
    for own in _by_id(event for event in timed if event["ph"] in "stf"):
        _check_flow(own, slices)


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is no JSON")


def _check_fields(event: Event) -> None:
    fields = FIELDS[event["ph"]]
    for name, kind in fields.items():
        assert isinstance(event.get(name), kind), f"{name} of {event}"
        assert not isinstance(event[name], bool), f"{name} of {event}"
    assert event["name"], event
    assert event.get("ts", 0) >= 0, event
    assert event.get("dur", 0) >= 0, event
    assert event["ph"] != "i" or event["s"] in ("g", "p", "t"), event
    assert event["ph"] != "f" or event["bp"] == "e", event
    if event["ph"] == "M":
        for name, kind in METADATA[event["name"]].items():
            assert isinstance(event["args"][name], kind), event


def _check_names(events: Sequence[Event]) -> None:
    """Every process and thread has one name, and no two processes have a thread of the same number."""
    processes = collections.Counter(event["pid"] for event in events if event["name"] == "process_name")
    threads = collections.Counter((e["pid"], e["tid"]) for e in events if e["name"] == "thread_name")
    used = {(event["pid"], event["tid"]) for event in events if event["ph"] != "M"}
    assert {pid for pid, _ in used} <= processes.keys(), "a process without a name"
    assert used <= threads.keys(), "a thread without a name"
    assert set(processes.values()) | set(threads.values()) <= {1}, "named twice"
    assert len({tid for _, tid in threads}) == len(threads), "a thread in two processes"


def _check_nesting(track: list[tuple[int, int]]) -> None:
    open_until: list[int] = []
    for began, ended in sorted(track, key=lambda one: (one[0], -one[1])):
        while open_until and open_until[-1] <= began:
            open_until.pop()
        assert not open_until or ended <= open_until[-1], "slices of a track overlap"
        open_until.append(ended)


def _by_id(events: Iterable[Event]) -> list[list[Event]]:
    """The events of each id, in the order of time, and of the file where the times are the same."""
    grouped: dict[tuple[str, str], list[Event]] = collections.defaultdict(list)
    for event in events:
        grouped[event["cat"], event["id"]].append(event)
    return list(grouped.values())


def _check_asynchronous(events: Sequence[Event]) -> None:
    names: list[str] = []
    for event in events:
        if event["ph"] == "b":
            names.append(event["name"])
        else:
            assert names, f"an end without a beginning: {event}"
            assert names.pop() == event["name"], f"not the innermost one: {event}"
    assert not names, f"never ended: {names}"


def _check_flow(events: Sequence[Event], slices: Slices) -> None:
    kinds = "".join(event["ph"] for event in events)
    assert kinds[0] == "s", f"an arrow that begins nowhere: {events}"
    assert "s" not in kinds[1:], f"an arrow that begins twice: {events}"
    assert "f" not in kinds[:-1], f"an arrow that goes on after its end: {events}"
    for first, second in itertools.pairwise(events):
        assert first["name"] == second["name"], events
    for event in events:
        at, track = ns(event["ts"]), slices[event["pid"], event["tid"]]
        assert any(began <= at <= ended for began, ended in track), f"an arrow outside of all slices: {event}"
