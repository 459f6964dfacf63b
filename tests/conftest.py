"""What all tests share: one thread, so that sums are added in one order; the same examples every time; and, where there
is no GPU, a reason, and Triton's interpreter. `pytest --hypothesis-profile random` looks for new examples."""

import gc
import os
from contextlib import suppress

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "0")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by transformers at the latest

import pytest
import tiny

with suppress(ImportError):  # the tests on a GPU do without
    import hypothesis

    hypothesis.settings.register_profile("random", derandomize=False)
    unchecked = [hypothesis.HealthCheck.too_slow]  # of a busy machine it says nothing of the examples
    hypothesis.settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=unchecked)
    hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """GPU tests say why they do not run."""
    if torch.cuda.is_available():
        return
    why = f"there is no CUDA device (torch {torch.__version__})"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish(session):
    """What the imports have made, a million objects, is looked through no more: each run collects what it leaves."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch):
    """A fifth of a small run is spent on flushes, which nobody needs whose machine does not lose its power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A two-layer Llama with random weights and a byte-level tokenizer, saved as a user would have it."""
    return tiny.save_model(tmp_path_factory.mktemp("model"))
