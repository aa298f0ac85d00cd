"""Runs the parts of the GPU benchmark, each in a process of its own and within a limit, and prints one table.

python benchmarks/gpu/run.py --json results.json
python benchmarks/gpu/run.py --parts steps,hop_alone,ray_peer
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rows import MARK

HERE = Path(__file__).parent
PARTS: dict[str, tuple[list[str], int]] = {
    "floor": (["floor.py"], 60),
    "steps": (["steps.py"], 120),
    "hop_alone": (["hop_alone.py"], 90),
    "ray_peer": (["ray_peer.py"], 90),
    "ray_transport": (["ray_transport.py"], 120),
    "model": (["model.py"], 120),
    "equality": (["equality.py"], 150),
    "decode": (["decode.py"], 120),
    "weights": (["weights.py"], 90),
    "kills": (["kills.py"], 180),
}
"""Name: what is run, and its limit in seconds."""


def run_part(command: list[str], limit: float) -> tuple[list[dict[str, Any]], str]:
    """The figures of one part, and how it ended if not well."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        ended = "" if process.returncode == 0 else f"ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        ended = f"took longer than {limit:g} s"
    figures = [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]
    if ended:
        print("\n".join(output.splitlines()[-60:]))
    return figures, ended


def environment() -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    nccl: Any = torch.cuda.nccl  # whose function torch leaves without hints
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "gpus": names,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())),
        "kernel": platform.release(),
        "commit": os.environ.get("ASYNCEXEC_COMMIT") or _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, by name")
    parser.add_argument("--json", type=Path, help="where to write the figures to")
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "parts": {}}
    for name in args.parts.split(","):
        began = time.monotonic()
        command, limit = PARTS[name]
        figures, ended = run_part(command, limit)
        seconds = time.monotonic() - began
        result["parts"][name] = {"rows": figures, "seconds": round(seconds, 1), "problem": ended}
        print(f"{name}: {seconds:.0f} s {ended}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    compare_with_ray(result["parts"])
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def compare_with_ray(parts: dict[str, Any]) -> None:
    """How often our step fits into Ray's, where both were measured."""
    if "steps" not in parts or "ray_peer" not in parts:
        return
    ours = [one["value"] for one in parts["steps"]["rows"] if one["name"].startswith("awaited two-stage step, 1 MiB")]
    for ray_row in list(parts["ray_peer"]["rows"]):
        ratio = ray_row["value"] / max(ours)
        how = ray_row["name"].rsplit(", ", 1)[-1]
        target = {"target": ">= 9 x", "met": ratio >= 9} if how == "awaited" else {"target": "", "met": None}
        parts["ray_peer"]["rows"].append(
            {"name": f"Ray's step over ours, {how}", "value": ratio, "unit": "x", **target}
        )


def print_table(result: dict[str, Any]) -> None:
    """One line for each figure."""
    print(json.dumps(result["environment"]))
    for name, part in result["parts"].items():
        for one in part["rows"]:
            met = {True: "met", False: "MISSED", None: ""}[one["met"]]
            print(f"{name:10} {one['name']:88} {one['value']:12.4g} {one['unit']:9} {one['target']:10} {met}")
        if part["problem"]:
            print(f"{name:10} {part['problem']}")


if __name__ == "__main__":
    main()
