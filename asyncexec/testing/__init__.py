"""For authors of transports and engines: a suite that every transport must pass, and faults to inject.

conformance   CHECKS and `check_transport`: what an executor promises, on whatever transport
faults        a transport with faults built in: replies dropped, doubled, delayed, swapped or cut short
"""

from asyncexec.testing.conformance import CHECKS, Recorder, check_transport
from asyncexec.testing.faults import Faults, with_faults

__all__ = ["CHECKS", "Faults", "Recorder", "check_transport", "with_faults"]
