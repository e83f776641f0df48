"""Imports Triton so that kernels run in its interpreter. Import this before any of them."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
torch = pytest.importorskip("torch")
pytest.importorskip("triton")
