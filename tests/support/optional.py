"""Tests that need an optional package say so where it is absent."""

from __future__ import annotations

import importlib.util

import pytest

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='needs bitsandbytes: pip install "tunesmith[gpu]"'
)
