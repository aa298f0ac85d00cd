"""vLLM's v1 engine on asyncexec.

`LLM(..., distributed_executor_backend="asyncexec.integrations.vllm.AsyncExecExecutor")`

Raises UnsupportedVllm, an ImportError, where the installed vLLM is not one that it knows; see `versions.py`.
"""

from asyncexec.integrations.vllm.versions import SUPPORTED, UnsupportedVllm, check_version

check_version()

from asyncexec.integrations.vllm.executor import AsyncExecExecutor  # noqa: E402 - needs a vLLM that it knows

__all__ = ["SUPPORTED", "AsyncExecExecutor", "UnsupportedVllm"]
