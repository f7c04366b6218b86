"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is
first imported."""

import fcntl
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # as many workers as cores: more threads would only wait

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def auto_backend(monkeypatch):
    """ddpo.check() sets it for the whole process."""
    import kernels

    monkeypatch.setattr(kernels, "BACKEND", "auto")


@pytest.fixture(autouse=True)
def quick_folders(monkeypatch):
    """A run in a process of its own draws rewards.png and waits for the disk. In the tests' process the
    picture is small and nothing waits: both take as long as a tiny epoch."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)  # a Mac's
    if "training" in sys.modules:
        from run_folder import write_whole

        monkeypatch.setattr("training.plot_rewards", lambda rows, config, path: write_whole(
            path, lambda file: Image.new("L", (8, 8)).save(file, "png")))
