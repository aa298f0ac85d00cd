"""Which transports are installed: the entry points of the group `asyncexec.transports`."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from asyncexec.errors import TransportUnavailable
from asyncexec.transport import Transport

GROUP = "asyncexec.transports"


@dataclass(frozen=True, slots=True)
class TransportInfo:
    """One installed transport.

    Attributes:
        name: what the configuration calls it.
        origin: the object that its entry point names.
        unavailable: why it cannot be used here and what to install; None where it can.
    """

    name: str
    origin: str
    unavailable: str | None


def load_transport(name: str) -> type[Transport]:
    """The transport of that name.

    Raises:
        TransportUnavailable: there is none, its code cannot be imported, or what it needs is missing here.
    """
    installed = _installed()
    if name not in installed:
        raise TransportUnavailable(f"no transport {name!r} is installed; installed: {', '.join(installed)}")
    transport = _load(installed[name])
    reason = transport.unavailable()
    if reason is not None:
        raise TransportUnavailable(f"transport {name!r} cannot be used here: {reason}")
    return transport


def list_transports() -> list[TransportInfo]:
    """Every installed transport by name, the unavailable ones with their reason."""
    return [_describe(entry_point) for entry_point in _installed().values()]


def transport_names() -> list[str]:
    """The names of the installed transports, usable or not."""
    return list(_installed())


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def _load(entry_point: EntryPoint) -> type[Transport]:
    try:
        loaded = entry_point.load()
    except Exception as error:
        raise TransportUnavailable(
            f"transport {entry_point.name!r} ({entry_point.value}) cannot be imported: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
        raise TransportUnavailable(f"transport {entry_point.name!r} ({entry_point.value}) is not a Transport")
    return loaded


def _describe(entry_point: EntryPoint) -> TransportInfo:
    try:
        reason = _load(entry_point).unavailable()
    except TransportUnavailable as error:
        reason = str(error)
    return TransportInfo(entry_point.name, entry_point.value, reason)
