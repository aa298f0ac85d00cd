"""The `local` transport: one rank on a thread of this process, for laptops, debugging and single GPUs."""

from asyncexec_local.transport import LocalTransport

__all__ = ["LocalTransport"]
