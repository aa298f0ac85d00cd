"""asyncexec: an asyncio-native executor framework for distributed inference engines.

    async with create_executor(config, "my_engine.worker:ModelWorker") as executor:
        output = await executor.execute_model(scheduler_output)

The layers, from the bottom; imports go downward only:

    errors  config  outputs  device     what everybody speaks of
    wire  codec  worker  inspection     frames, how values travel, what an engine author writes, what a rank is doing
    transport  runtime                  the Transport contract, and the code that serves a rank on every transport
    registry  window  future            installed transports; calls in flight; what callers hold
    connectors  aggregate               merging what the ranks report
    supervision  reporting              whether the ranks are well; telling people
    executor  submission  calls  driver  the interface, and its one implementation over any transport
    run  cli  demo                      the event loop, the command line, a real engine

The transports live beside this package, each in one of its own: `asyncexec_local`, `asyncexec_nccl`,
`asyncexec_ray`.
"""

from asyncexec.aggregate import Aggregator, AllRanks, Chain, FirstRank
from asyncexec.config import ExecutorConfig, ReconfigureDistributedRequest, Timeouts
from asyncexec.connectors import ECOutputAggregator, KVOutputAggregator, PendingTransfer
from asyncexec.device import HostCopier
from asyncexec.driver import create_executor
from asyncexec.errors import (
    AggregationError,
    AsyncExecError,
    CallError,
    ConfigError,
    ExecutorBusy,
    ExecutorClosed,
    ExecutorFailed,
    PayloadError,
    RankUnhealthy,
    ReplyLost,
    StepTimeout,
    TransportUnavailable,
    WireError,
    WorkerDied,
    WorkerError,
    WorkerStartError,
)
from asyncexec.executor import Executor
from asyncexec.future import StepFuture, StepTiming
from asyncexec.inspection import RankReport, Report
from asyncexec.outputs import DeferredOutput, ECConnectorOutput, IntermediateTensors, KVConnectorOutput, ModelOutput
from asyncexec.run import run
from asyncexec.worker import ProcessGroups, RankContext, Worker

__version__ = "0.1.0"

__all__ = [
    "AggregationError",
    "Aggregator",
    "AllRanks",
    "AsyncExecError",
    "CallError",
    "Chain",
    "ConfigError",
    "DeferredOutput",
    "ECConnectorOutput",
    "ECOutputAggregator",
    "Executor",
    "ExecutorBusy",
    "ExecutorClosed",
    "ExecutorConfig",
    "ExecutorFailed",
    "FirstRank",
    "HostCopier",
    "IntermediateTensors",
    "KVConnectorOutput",
    "KVOutputAggregator",
    "ModelOutput",
    "PayloadError",
    "PendingTransfer",
    "ProcessGroups",
    "RankContext",
    "RankReport",
    "RankUnhealthy",
    "ReconfigureDistributedRequest",
    "ReplyLost",
    "Report",
    "StepFuture",
    "StepTimeout",
    "StepTiming",
    "Timeouts",
    "TransportUnavailable",
    "WireError",
    "Worker",
    "WorkerDied",
    "WorkerError",
    "WorkerStartError",
    "__version__",
    "create_executor",
    "run",
]
