"""Where the ranks of one executor meet: a directory of this user's alone, with a name that no other executor has."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "vllm-asyncexec-"


class MeetingPlace:
    """Makes the directory, and removes those of executors that were killed before they could.

    vLLM ends a server's engine core by SIGKILL, with all processes below it.  An executor keeps its directory locked;
    the kernel unlocks it with the process.

    Attributes:
        store: the file that vLLM's process groups meet in.  vLLM's CPU workers name their shared memory after it; those
            of older versions after what follows its last colon.
        lock: a file to lock.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        hidden = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))  # until it is locked
        self._descriptor = os.open(hidden, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._path = hidden.rename(hidden.with_name(hidden.name[1:]))
        self.store = self._path / f":{self._path.name}"
        self.lock = self._path / "lock"
        self.lock.touch()

    def all_have_met(self) -> None:
        """Forget the names of the ranks' shared memory, which all have mapped now: it ends with them."""
        _unlink_memory(self._path.name)

    def remove(self) -> None:
        """Remove all of it; may be called again."""
        _remove(self._path)
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def _remove_if_left(path: Path) -> None:
    """Remove the directory of an executor that is gone; leaves those of other users, and what is removed meanwhile."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    _unlink_memory(path.name)
    with contextlib.suppress(FileNotFoundError):
        # renamed first: a process group that ends just now writes to its file once more, and would make it anew
        shutil.rmtree(path.rename(path.with_name(f"{path.name}-removed")), ignore_errors=True)


def _unlink_memory(name: str) -> None:
    for memory in Path("/dev/shm").glob(f"*{name}-*"):
        memory.unlink(missing_ok=True)
