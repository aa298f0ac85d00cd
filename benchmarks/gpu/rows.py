"""How the parts of the GPU benchmark say what they measured: one line of JSON for each figure."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

MARK = "ROW "


def row(name: str, value: float, unit: str, *, target: str = "", met: bool | None = None, **more: Any) -> None:
    """Print one figure; `met` says whether the target is, None where there is none."""
    print(MARK + json.dumps({"name": name, "value": value, "unit": unit, "target": target, "met": met, **more}))


def microseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median, and the 99th percentile, of durations."""
    ordered = sorted(seconds)
    return {"p50": statistics.median(ordered) * 1e6, "p99": ordered[int(len(ordered) * 0.99)] * 1e6}
