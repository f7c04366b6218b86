"""Claims about the benchmark scripts, in their smallest form: workers take turns, count the same
work, and the records contain it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import epoch, peer_trl, sd15
from sample import guided_step, load_pipeline, sample_trajectories

ROOT = Path(__file__).parents[1]
# the interpreter of the environment that benchmarks/peer_trl.py --help describes
TRL_PYTHON = os.environ.get("TRL_PYTHON")
TINY = dict(images=4, sample_batch=4, train_batch=2, steps=2)
ROWS = 4 * 2 * 2  # pictures, steps, and two for guidance


@pytest.fixture(autouse=True)
def workers_on_one_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(script, *arguments, **settings):
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, f"benchmarks/{script}", *arguments, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_variants_of_an_epoch_do_the_same_work_and_are_compared_with_the_first(tmp_path):
    reference, other = list(epoch.CPU_VARIANTS)[0], list(epoch.CPU_VARIANTS)[-1]
    out = tmp_path / "epoch.json"
    variants = "--variant", reference, "--variant", other
    printed = run("epoch.py", "--rounds", "1", "--out", str(out), *variants, **TINY)
    record, = json.loads(out.read_text()).values()
    work = record["unet_rows_forward_in_sampling_and_update"]
    assert work == {reference: [ROWS, ROWS], other: [ROWS, ROWS]}
    assert record["summary"][reference]["epoch"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert record["summary"][other]["epoch"]["median"] > 0 and f"| {other} | " in printed
    assert record["device"] and record["threads"] == 1
    assert "benchmarks/epoch.py --rounds 1" in record["command"]
    assert printed.strip() in run("epoch.py", "--table", "--out", str(out))


def test_rows_of_a_replayed_graph_are_counted():
    class Replayed:
        """As sample.GraphedStep on a GPU: hooks are called for the trials before a capture, and not
        for a replay."""

        captured = False

        def __call__(self, unet, *inputs):
            if not self.captured:
                [guided_step(unet, *inputs) for _ in range(4)]
            self.captured = True
            return inputs[0], torch.zeros(len(inputs[0]))

    pipeline = load_pipeline("models/emoji", "cpu")
    rows = epoch.count_rows(pipeline.unet)
    step = epoch.count_replays(Replayed(), rows)
    for guidance_scale, factor in ((4.0, 2), (1.0, 1)):
        rows[:] = 0, 0
        prompts = ["a cat"] * 3
        sample_trajectories(pipeline, prompts, 2, guidance_scale=guidance_scale, step=step)
        assert rows == [3 * 2 * factor, 0]


def test_a_models_folder_is_found_from_where_the_command_was_given(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (ROOT / epoch.model_folder("mine")).samefile(tmp_path / "mine")
    assert epoch.model_folder("some/hub-id") == "some/hub-id"


def test_our_half_of_the_comparison_does_the_work_of_its_settings():
    settings = peer_trl.EMOJI | peer_trl.EQUAL | TINY | dict(updates=2, dtype="fp32")
    worker = epoch.launch(settings)
    row = epoch.epoch(worker)
    worker.stdin.close()
    assert (row["rows_sample"], row["rows_update"], worker.wait(200)) == (ROWS, ROWS, 0)
    assert row["seconds"] >= row["seconds_sample"] + row["seconds_update"] > 0


@pytest.mark.skipif(not TRL_PYTHON, reason="needs TRL_PYTHON, an interpreter with TRL 0.23.1")
def test_trl_does_the_same_work(tmp_path):
    out = tmp_path / "peer.json"
    flags = "--rounds", "1", "--train-batch", "3", "--trl-python", TRL_PYTHON, "--out", str(out)
    printed = run("peer_trl.py", *flags, **TINY, updates=2)
    record, = json.loads(out.read_text()).values()
    work = {"rows_sample": ROWS, "rows_update": ROWS, "threads": 1}
    assert record["work"]["ours"] == record["work"]["TRL"] == work
    assert record["versions"]["TRL"]["trl"] == "0.23.1" and "ours over TRL" in printed


def test_a_ratio_compares_turns_of_the_same_round():
    def row(seconds, **more):
        return dict(
            seconds=seconds, seconds_sample=seconds / 4, seconds_update=seconds / 2, **more
        )

    rows = {  # the machine was busy in round 2
        "TRL": [row(4.0), row(40.0), row(6.0)],
        "ours": [row(2.0), row(10.0), row(2.0)],
    }
    summary = peer_trl.summarise(rows, images=8)
    assert summary["ours_over_trl"]["epoch"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert summary["images_per_second"]["ours"] == {"sampling": 16.0, "update": 8.0, "epoch": 4.0}
    lines = peer_trl.table({"summary": summary}).splitlines()
    assert lines[-1].endswith("| 3.00x (2.00 to 4.00) |")
    memory = {side: [row(1.0, peak_memory_gb=gb)] for side, gb in (("TRL", 20.0), ("ours", 15.0))}
    lines = peer_trl.table({"summary": peer_trl.summarise(memory, 8)}).splitlines()
    assert lines[-1].endswith("| 0.75x |")
    lines = epoch.table({"summary": epoch.summarise(memory, 8)}).splitlines()
    same = "1.00x (1.00 to 1.00)"
    assert lines[-1] == f"| ours | 32.00, {same} | 16.00, {same} | 8.00, {same} | 15.0 |"


GOOD = """
for line in iter(input, None):
    print("hello")
    print('{"seconds": 1.0, "rows_sample": 8}', flush=True)
"""
BAD = """
input()
print('{"seconds": 1.0}', flush=True)
input()
raise SystemExit("out of memory")
"""


def test_a_worker_that_dies_is_reported_and_the_others_go_on(tmp_path, capsys):
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    scripts = {name: str(tmp_path / f"{name}.py") for name in ("bad", "good")}
    workers = {name: epoch.launch({}, script=script) for name, script in scripts.items()}
    first, rows = epoch.take_turns(workers, rounds=2)
    assert first == {"good": {"seconds": 1.0, "rows_sample": 8}}
    assert rows == {"good": [{"seconds": 1.0}] * 2}
    assert "bad: out of memory" in capsys.readouterr().err


def test_the_random_model_is_a_stable_diffusion_folder(tmp_path):
    small = dict(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    text = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    unet = small | dict(sample_size=8, cross_attention_dim=32)
    folder = sd15.build(
        tmp_path / "model", sd15.UNET | unet, sd15.VAE | small, sd15.TEXT | text
    )
    pipeline = load_pipeline(str(folder), "cpu")
    trajectories = sample_trajectories(pipeline, ["a cat", "a dog"], num_steps=2)
    assert trajectories.images.shape == (2, 3, 64, 64)
    assert pipeline.tokenizer.model_max_length == 77
    assert sd15.build(folder) == folder  # it is not made twice
