"""Engines of vLLM, each started once; only `make test-vllm` has vLLM."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.serving.support import HuggingFace, Vllm

    @pytest.fixture(scope="session")
    def hf():
        return HuggingFace()

    @pytest.fixture(scope="session")
    def engine():
        """Started for a stack that needs hooks, passes beside the batch and whole prompts; tests choose what it serves."""
        return Vllm("var+vcd")

    @pytest.fixture(scope="session")
    def cached():
        """Prompts in chunks of 48 tokens at most, and a prefix cache."""
        return Vllm("pai:alpha=1", max_num_batched_tokens=48)

    @pytest.fixture(scope="session")
    def pruned():
        """16 of an image's 64 tokens; tests choose by which method."""
        return Vllm("hiprune:keep=16")
