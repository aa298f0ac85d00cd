"""What vLLM's executors on Ray need on a machine without GPUs: a platform whose devices Ray counts as GPUs.

vLLM finds platforms by entry points of installed packages, in the driver and in every actor.  So one that is written to
a folder of our own is put on their paths.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

_ENTRY_POINTS = f"""[vllm.platform_plugins]
ray_cpu = {__name__}:platform
"""


def platform() -> str:
    """What the entry point gives: where vLLM gets the platform from."""
    return f"{__name__}.make_platform"


def make_platform() -> Any:
    """vLLM's platform for CPUs, with a name for its devices that Ray knows."""
    cpu = importlib.import_module("vllm.platforms.cpu").CpuPlatform
    return type("RayCpuPlatform", (cpu,), {"ray_device_key": "GPU"})()


def connect(folder: Path) -> Any:
    """Connect to the Ray at `RAY_ADDRESS`, so that vLLM finds the platform in this process and in its actors.

    Before vLLM is imported.

    Args:
        folder: an empty one, which stays for as long as the connection.

    Returns:
        The module `ray`.
    """
    described = folder / "asyncexec_bench_vllm_ray-0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: asyncexec-bench-vllm-ray\nVersion: 0\n")
    (described / "entry_points.txt").write_text(_ENTRY_POINTS)
    sys.path.append(str(folder))
    ray: Any = importlib.import_module("ray")
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(folder)])
    # vLLM takes the driver's host for another one than Ray does, unless it is told which address to use
    os.environ["VLLM_HOST_IP"] = host = ray.util.get_node_ip_address()
    variables = {"PYTHONPATH": paths, "VLLM_HOST_IP": host}
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, runtime_env={"env_vars": variables})
    return ray
