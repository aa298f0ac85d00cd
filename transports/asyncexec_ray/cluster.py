"""This process's connection to Ray.

Ray has one connection per process, and so has this module: the executors of a process share it.  Where it was not there
before the first of them, it ends with the last.
"""

import importlib
import threading
from typing import Any

from asyncexec.errors import ConfigError

LOCAL_SYSTEM_CONFIG = {"worker_niceness": 0}
"""Ray would start its workers at niceness 15: whatever else runs on the machine would hold up every step."""


class _Connection:
    """A connection that executors made, and the thread that holds it.

    The daemons of a local Ray end with the thread that started them: that must be one that lasts.
    """

    def __init__(self, address: str | None) -> None:
        self.users = 0
        self._address = address
        self._failure: Exception | None = None
        self._up, self._unused = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hold, name="asyncexec-ray", daemon=True)
        self._thread.start()
        self._up.wait()
        if self._failure is not None:
            raise ConfigError(f"Ray cannot be reached: {self._failure}") from self._failure

    def end(self) -> None:
        """Disconnect; ends the cluster if it was started for us, and no other."""
        self._unused.set()
        self._thread.join()

    def _hold(self) -> None:
        ray: Any = importlib.import_module("ray")
        try:
            _connect(ray, self._address)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is for the thread that waits
            self._failure = error
        self._up.set()
        if self._failure is None:
            self._unused.wait()
            ray.shutdown()


class Cluster:
    """The connection of this process, counted.

    Attributes:
        made: the connection that the first executor made; None where there is none, or somebody else made it.
    """

    def __init__(self) -> None:
        self.made: _Connection | None = None
        self._lock = threading.Lock()

    def acquire(self, address: str | None) -> None:
        """Connect this process to Ray unless it is, and use that; blocks for seconds where Ray is started.

        Raises:
            ConfigError: there is no cluster at `address`, or this process is connected to another.
        """
        ray: Any = importlib.import_module("ray")
        with self._lock:
            if not ray.is_initialized():
                self.made = _Connection(address)
            elif address not in (None, "auto", connected := ray.get_runtime_context().gcs_address):
                raise ConfigError(f"options.ray.address is {address!r}, and this process is connected to {connected!r}")
            if self.made is not None:
                self.made.users += 1

    def release(self) -> None:
        """The reverse of `acquire`, once for each; blocks while Ray ends."""
        with self._lock:
            if self.made is not None:
                self.made.users -= 1
                if self.made.users == 0:
                    self.made.end()
                    self.made = None


CLUSTER = Cluster()
"""The one of this process, as Ray has it."""


def _connect(ray: Any, address: str | None) -> None:
    if address is not None:
        ray.init(address=address)
        return
    try:
        ray.init(address="auto")
    except ConnectionError:
        ray.init(address="local", include_dashboard=False, _system_config=LOCAL_SYSTEM_CONFIG)
