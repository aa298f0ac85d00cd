"""The cases by name."""

from asyncexec.bench.case import Case
from asyncexec.bench.cases.aggregation import AGGREGATION
from asyncexec.bench.cases.demo import DEMO
from asyncexec.bench.cases.failure import FAILURE
from asyncexec.bench.cases.idle import IDLE
from asyncexec.bench.cases.life import LIFE
from asyncexec.bench.cases.overlap import OVERLAP
from asyncexec.bench.cases.rpc import RPC
from asyncexec.bench.cases.steps import STEPS

CASES: dict[str, Case] = {case.name: case for case in (STEPS, RPC, IDLE, LIFE, FAILURE, OVERLAP, AGGREGATION, DEMO)}
