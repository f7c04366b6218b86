"""Claims about what a run leaves on disk: nothing is lost at a power cut, one process writes a run, and a broken network is
never called a success."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import reproduce
from emoji import pretrain
from test_reproduce import fake_run

ROOT = Path(__file__).parents[1]


# reproduce.py and emoji/pretrain.py

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_run_ends_with_the_experiment_that_started_it(tmp_path):
    """Also where that is killed, so that it could not tell anybody."""
    code = ("import subprocess, sys, time, reproduce\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
            " preexec_fn=reproduce.end_with_parent)\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(50):
        try:
            gone = Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            gone = True
        if gone:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the run outlived the experiment")


def test_fewer_seeds_do_not_replace_a_table_of_more(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        for algorithm in reproduce.ALGORITHMS:
            fake_run(tmp_path / f"results/emoji/logs/compress-{algorithm}-{seed}", seed)
    reproduce.main(["algorithms", "--draw", "--seeds", "1"])
    numbers = json.loads((tmp_path / "results/emoji/algorithms.json").read_text())
    assert {row["seeds"] for row in numbers.values()} == {3}


@pytest.mark.parametrize("setting, value", [
    ("unet_steps", 0), ("clip_batch", -1), ("ema", 1.0), ("vae_lr", float("nan")), ("seed", -1), ("save_every", 0),
    ("caption_dropout", 1.5), ("out", "README.md/emoji"), ("clip_scenes", 10**12)])
def test_pretraining_refuses_what_cannot_work_before_it_starts(setting, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=f"^--{setting.replace('_', '-')} [^\n]+$"):
        pretrain.check(replace(pretrain.Config(), **{setting: value}))
