"""Copies of memory: what carrying an array costs at least, one copy for each rank."""

from collections.abc import Awaitable
from typing import Any

import numpy as np

from asyncexec.bench.payload import Array, Payload
from asyncexec.bench.peer import WithoutRanks


class Memcpy(WithoutRanks):
    """The driver copies the array as often as there would be, one copy after the other."""

    requests = False

    async def start(self) -> None:
        """Nothing was copied yet."""
        self._targets: list[Array] = []

    def submit(self, value: Payload) -> Awaitable[Any]:
        """Copy it into memory that has been touched before."""
        if not isinstance(value, np.ndarray):
            raise TypeError(f"only arrays are copied, not a {type(value).__qualname__}")
        return self._copy(value)

    async def _copy(self, value: Array) -> int:
        if not self._targets or self._targets[0].nbytes != value.nbytes:
            self._targets = [np.ones_like(value) for _ in range(self.ranks)]
        for target in self._targets:
            np.copyto(target, value)
        return value.nbytes
