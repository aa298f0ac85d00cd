"""The command line: `asyncexec bench`, `demo`, `doctor` and `report`, and `asyncexec --version`."""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import asyncexec
from asyncexec.errors import AsyncExecError, ConfigError, TransportUnavailable
from asyncexec.reporting import fetch_report, running_executors

USAGE_ERROR = 2
"""Exit status of bad arguments and configurations, as argparse has it."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

NEEDED = {"bench": ("rich",), "demo": ("torch", "safetensors", "tokenizers", "rich")}
"""Packages without which a command cannot run; the extra of its name has them."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `--help` has the rest."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _Parser(prog="asyncexec", description="An asyncio-native executor for inference engines.")
    parser.add_argument("--version", action="version", version=f"asyncexec {asyncexec.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    extras = {
        "bench": commands.add_parser(
            "bench", help="what a step costs on each transport, beside what else one would use"
        ),
        "demo": commands.add_parser("demo", help="generate text with a transformer split over worker processes"),
    }
    commands.add_parser("doctor", help="what this machine has, and which transports it can use")
    report = commands.add_parser("report", help="what the ranks of running executors are doing")
    report.add_argument("pid", type=int, nargs="?", help="of the driver's process (default: every one)")
    for name, subparser in extras.items():
        if not _missing(name):
            _module(name).add_arguments(subparser)
    parsed, rest = parser.parse_known_args(arguments)
    if missing := _missing(parsed.command):
        needed = f"{', '.join(missing)}: pip install 'asyncexec[{parsed.command}]'"
        print(f"asyncexec {parsed.command} needs {needed}", file=sys.stderr)
        return USAGE_ERROR
    if rest:
        extras.get(parsed.command, parser).error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _run(parsed)
    except (ConfigError, TransportUnavailable) as error:
        print(f"asyncexec {parsed.command}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except AsyncExecError as error:
        print(f"asyncexec {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has left, as `head` does; what is still buffered has nowhere to go either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(parsed: argparse.Namespace) -> int:
    if parsed.command == "doctor":
        from asyncexec import doctor

        for line in doctor.report():
            print(line)
        return 0
    if parsed.command == "report":
        return _report(parsed.pid)
    status: int = _module(parsed.command).run(parsed)
    return status


def _report(pid: int | None) -> int:
    executors = {name: driver for name, driver in running_executors().items() if pid in (None, driver)}
    if not executors:
        raise AsyncExecError("no executor is running" if pid is None else f"process {pid} runs no executor")
    for name, driver in executors.items():
        print(f"=== process {driver}: {fetch_report(name)}")
    return 0


def _module(command: str) -> Any:
    """The code of a command that has an extra: imported where it is used, and where what it needs is there."""
    return importlib.import_module(f"asyncexec.{command}.command")


def _missing(command: str) -> list[str]:
    return [name for name in NEEDED.get(command, ()) if importlib.util.find_spec(name) is None]
