"""Asking all ranks what they do, and judging from it whether they are well."""

import time
from collections.abc import Sequence

import anyio
import msgspec

from asyncexec.errors import RankUnhealthy
from asyncexec.inspection import RankReport, RankState, Report, boot_id
from asyncexec.transport import KernelState, Transport

_WITHOUT_AN_ANSWER: dict[str, RankState] = {"running": "silent", "stopped": "stopped", "dead": "dead"}


async def inspect_ranks(transport: Transport, ranks: Sequence[int], limit: float, *, stacks: bool = True) -> Report:
    """Ask every rank at once; of one that does not answer within `limit` seconds, tell what the kernel says."""
    reports: dict[int, RankReport] = {}

    async def ask(rank: int) -> None:
        try:
            with anyio.move_on_after(limit):
                asked = time.monotonic_ns()
                answer = await transport.inspect(rank, stacks)
                reports[rank] = _on_our_clock(msgspec.msgpack.decode(answer, type=RankReport), asked)
        except (ConnectionError, msgspec.DecodeError):
            pass  # it is gone, or could not say: the kernel knows something
        if rank not in reports:
            reports[rank] = _from_kernel(rank, transport.kernel_state(rank))

    async with anyio.create_task_group() as asking:
        for rank in ranks:
            asking.start_soon(ask, rank)
    return Report.of([reports[rank] for rank in ranks])


def require_health(report: Report, limit: float) -> None:
    """Return if every rank is idle, or in a call and made progress within `limit` seconds.

    Raises:
        RankUnhealthy: names the ranks that are not, with the report.
    """
    ill = [
        rank
        for rank in report.ranks
        if rank.state in ("stopped", "silent", "dead") or (rank.state == "running" and rank.stalled > limit)
    ]
    if ill:
        reasons = "; ".join(map(str, ill))
        raise RankUnhealthy(f"no progress for {limit:g} s: {reasons}", [rank.rank for rank in ill], report)


def _on_our_clock(report: RankReport, asked: int) -> RankReport:
    """Say how far the rank's clock is off, by the middle of the round trip (as NTP does)."""
    if report.boot == boot_id():
        return report
    answered = time.monotonic_ns()
    offset, error = report.clock - (asked + answered) // 2, (answered - asked + 1) // 2
    return msgspec.structs.replace(report, clock_offset=offset, clock_error=error)


def _from_kernel(rank: int, kernel: KernelState) -> RankReport:
    return RankReport(rank, _WITHOUT_AN_ANSWER[kernel.state], kernel=kernel.words)
