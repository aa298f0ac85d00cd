"""The command line: clear output, and one line for what is wrong."""

import asyncio
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import asyncexec
from asyncexec import TransportUnavailable, cli, registry


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "asyncexec: the following arguments are required: COMMAND; see asyncexec --help"),
        (["paint"], "asyncexec: argument COMMAND: invalid choice: 'paint'"),
        (["demo", "--tp", "two"], "asyncexec demo: argument --tp: invalid int value: 'two'"),
        (["demo", "--layers", "3"], "asyncexec demo: unrecognized arguments: --layers 3"),
        (["demo", "--model", "/nowhere"], "asyncexec demo: /nowhere: no such directory"),
        (["demo", "--tp", "0"], "asyncexec demo: tensor_parallel_size is 0; valid: whole numbers from 1"),
        (
            ["demo", "--transport", "pigeon"],
            "asyncexec demo: no transport 'pigeon' is installed; installed: local, nccl",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    output, errors = capsys.readouterr()
    assert status == 2
    assert output == ""
    assert errors.startswith(message)
    assert errors.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"asyncexec {asyncexec.__version__}\n"


def test_the_doctor_names_every_transport(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    for line in ("Python  ", "torch   ", "transport    local: usable", "transport    nccl: usable"):
        assert line in output


async def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m asyncexec doctor | head -n 1; exit ${{PIPESTATUS[0]}}",
        executable="/bin/bash",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert output.startswith(b"asyncexec ")
    assert b"Traceback" not in errors


def test_transports_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("broken", "no_such_package:Transport", registry.GROUP),
        EntryPoint("wrong", "builtins:int", registry.GROUP),
        EntryPoint("local", "asyncexec_local:LocalTransport", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    described = {info.name: info.unavailable for info in registry.list_transports()}
    assert described["local"] is None
    assert "No module named 'no_such_package'" in str(described["broken"])
    assert "is not a Transport" in str(described["wrong"])
    for name in ("broken", "wrong"):
        with pytest.raises(TransportUnavailable, match=name):
            registry.load_transport(name)
    with pytest.raises(TransportUnavailable, match="installed: broken, local, wrong"):
        registry.load_transport("nccl")


def test_a_transport_whose_dependency_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TransportUnavailable, match=r"torch is not installed: pip install 'asyncexec\[nccl\]'"):
        registry.load_transport("nccl")
