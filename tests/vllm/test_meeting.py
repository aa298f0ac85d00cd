"""Where ranks meet: removed with all that is named after it, and swept up after executors that were killed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from asyncexec.integrations.vllm.meeting import MeetingPlace

HOLDS_ONE = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from asyncexec.integrations.vllm.meeting import MeetingPlace
print(MeetingPlace().store, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_nothing_is_left_of_one_that_is_removed(folder: Path) -> None:
    meeting = MeetingPlace()
    memory = Path("/dev/shm") / f"{meeting.store.parent.name}-memory"
    for memory_is_there in (meeting.all_have_met, meeting.remove):
        memory.touch()
        memory_is_there()
        assert not memory.exists()
    meeting.remove()
    assert not list(folder.iterdir())


def test_those_of_killed_executors_are_removed_by_the_next_one_and_no_others(folder: Path) -> None:
    command = [sys.executable, "-c", HOLDS_ONE, str(folder)]
    holders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    stores = []
    for holder in holders:
        assert holder.stdout is not None
        stores.append(Path(holder.stdout.readline().strip()))
    memories = [Path("/dev/shm") / f"{store.name}-memory" for store in stores]
    for memory in memories:
        memory.touch()
    os.kill(holders[0].pid, signal.SIGKILL)
    holders[0].wait(10)
    meeting = MeetingPlace()
    assert [store.parent.exists() for store in stores] == [False, True]
    assert [memory.exists() for memory in memories] == [False, True]
    assert meeting.lock.exists()
    holders[1].communicate("", timeout=10)
    MeetingPlace().remove()
    assert not any(memory.exists() for memory in memories)
    meeting.remove()
    assert not list(folder.iterdir())
