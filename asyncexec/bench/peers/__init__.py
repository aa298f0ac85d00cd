"""The peers by name.  Each module is imported only where it is used: what it needs may be missing."""

import importlib

from asyncexec.bench.peer import Peer
from asyncexec.errors import ConfigError

PEERS = {
    "floor": "floor:Floor",
    "floor-codec": "floor:DecodingFloor",
    "memcpy": "memcpy:Memcpy",
    "local": "executors:Local",
    "nccl": "executors:Nccl",
    "ray": "executors:RayDirect",
    "ray-documented": "executors:RayDocumented",
    "futures": "futures:Futures",
    "pipes": "pipes:Pipes",
    "zeromq": "zeromq:ZeroMq",
    "ray-actors": "ray_actors:RayActors",
    "ray-graph": "ray_graph:RayGraph",
    "ray-graph-awaited": "ray_graph:RayGraphAwaited",
    "count": "aggregators:Counting",
    "kv-aggregator": "aggregators:AsyncExecKV",
    "vllm-kv-aggregator": "aggregators:VllmKV",
    "vllm-mp": "vllm_executors:VllmMultiproc",
    "vllm-ray": "vllm_executors:VllmRay",
    "vllm-ray-v2": "vllm_executors:VllmRayV2",
    "vllm-asyncexec": "vllm_executors:VllmAsyncExec",
    "vllm-mp-step": "vllm_executors:VllmMultiprocStep",
    "vllm-ray-step": "vllm_executors:VllmRayStep",
    "vllm-ray-v2-step": "vllm_executors:VllmRayV2Step",
    "vllm-asyncexec-step": "vllm_executors:VllmAsyncExecStep",
}
"""Module in this package and class, by the name that results and tables have for the peer."""


def load_peer(name: str) -> type[Peer]:
    """The class of that peer.

    Raises:
        ConfigError: there is no such peer.
    """
    if name not in PEERS:
        raise ConfigError(f"no peer {name!r}; valid: {', '.join(PEERS)}")
    module, _, attribute = PEERS[name].partition(":")
    loaded: type[Peer] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return loaded
