"""Engines of vLLM, each started once; only `make test-vllm` has vLLM."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.serving.support import HuggingFace, Vllm

    def pytest_collection_modifyitems(items):
        """vLLM's build for processors without AVX-512 has not been tried, and is slow: VLM_FIX_SERVING=1 tries it."""
        cpu = Path("/proc/cpuinfo")
        if (cpu.exists() and "avx512f" in cpu.read_text()) or os.environ.get("VLM_FIX_SERVING"):
            return
        untried = pytest.mark.skip(reason="vLLM's build without AVX-512 has not been tried; VLM_FIX_SERVING=1 tries it")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(untried)

    @pytest.fixture(scope="session")
    def hf():
        return HuggingFace()

    @pytest.fixture(scope="session")
    def engine():
        """Started for all that a stack may need; tests choose which it serves."""
        return Vllm("var+vcd+memvr")

    @pytest.fixture(scope="session")
    def cached():
        """Prompts in chunks of 48 tokens at most, and a prefix cache."""
        return Vllm("pai:alpha=1", max_num_batched_tokens=48)

    @pytest.fixture(scope="session")
    def pruned():
        """16 of an image's 64 tokens; tests choose by which method."""
        return Vllm("hiprune:keep=16")
