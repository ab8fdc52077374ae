"""What every test has: one thread, no network, caches of its own, and the shared data where it exists."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

# Before anything imports torch or huggingface_hub: both read the environment once, at import.
_caches = tempfile.TemporaryDirectory(prefix="tunesmith-test-caches-")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = _caches.name
os.environ["HF_HOME"] = str(Path(_caches.name) / "huggingface")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# For subprocesses that run `python -m tunesmith`, also where the package is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(PROJECT / "src"), str(PROJECT), os.environ.get("PYTHONPATH")])
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A test that trains may have set another number; two workers share two cores."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the project."""
    return PROJECT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the project; skips where it is absent."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: ../shared/data is absent")
    return folder
