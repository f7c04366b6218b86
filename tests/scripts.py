"""Scripts as a user runs them, and what they leave."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from run_folder import read_metrics

ROOT = Path(__file__).parents[1]


def flags(**settings):
    return [word for key, value in settings.items()
            for word in ("--" + key.replace("_", "-"), str(value))]


def start(script, *arguments, processes=1, **settings):
    """A process of its own, or torchrun's."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    launcher = launcher if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, script, *arguments, *flags(**settings)], cwd=ROOT,
                            env=os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, timeout=600):
    """(exit code, stdout, stderr)"""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def numbers(folder):
    """What a run computed, without how long it took."""
    return [{key: value for key, value in row.items() if "second" not in key}
            for row in read_metrics(Path(folder) / "metrics.jsonl")]


def learning_rates(monkeypatch):
    """A list, to which every AdamW that is made from now on adds its learning rate at each step."""
    rates, AdamW = [], torch.optim.AdamW

    class Recorded(AdamW):
        def step(self, *_):
            rates.append(self.param_groups[0]["lr"])
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    return rates
