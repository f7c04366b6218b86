"""Claims about the benchmark scripts, in their smallest form: workers take turns, count the same
work, and the records contain it."""

import functools
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

import ddpo
import reproduce_figures
import sample
from benchmarks import epoch, peer_trl, rounding, sd15, time_to_target, time_to_target_tables
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


def words(settings):
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def run(script, *arguments, **settings):
    command = [sys.executable, f"benchmarks/{script}", *arguments, *words(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_variants_of_an_epoch_do_the_same_work_and_are_compared_with_the_first(tmp_path, capsys):
    reference, other = "fp32, scaled_dot_product_attention", "fp32, plain matrix products"
    assert reference == list(epoch.CPU_VARIANTS)[0] and other in epoch.CPU_VARIANTS
    out = tmp_path / "epoch.json"
    variants = "--variant", reference, "--variant", other
    epoch.main(["--rounds", "1", "--out", str(out), *variants, *words(TINY)])
    printed = capsys.readouterr().out
    record, = json.loads(out.read_text()).values()
    work = record["unet_rows_forward_in_sampling_and_update"]
    assert work == {reference: [ROWS, ROWS], other: [ROWS, ROWS]}
    assert record["summary"][reference]["epoch"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert record["summary"][other]["epoch"]["median"] > 0 and f"| {other} | " in printed
    assert record["device"] and record["threads"] == 1
    assert "benchmarks/epoch.py --rounds 1" in record["command"]
    epoch.main(["--table", "--out", str(out)])
    assert printed.strip() in capsys.readouterr().out


def test_a_record_that_could_not_be_written_or_would_replace_a_fuller_one_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for arguments, says in (
            (["--out", str(tmp_path / "notes.txt")], "a file of records"),
            (["--out", str(tmp_path / "none/x.json")], "in a folder that exists"),
            (["--out", str(tmp_path)], "a file of records"),
            (["--dtype", "fp32"], "of all variants")):
        with pytest.raises(SystemExit) as stop:
            rounding.main(arguments)
        assert stop.value.code == 2 and says in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    for arguments, says in (
            (["--sd15", "--model", "x", "--out", str(tmp_path / "x.json")], "not with --sd15"),
            (["--set", "images=4"], "of all variants")):
        with pytest.raises(SystemExit) as stop:
            epoch.main(arguments)
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_the_random_models_command_does_not_take_the_file_beside_it_for_the_package_kernels(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "model_index.json").write_text("{}")  # as if it were made already
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path[1:]])
    monkeypatch.setattr(sys, "argv", ["sd15.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks/sd15.py"), run_name="__main__")
    assert sys.path[0] == str(ROOT) and capsys.readouterr().out.strip() == str(tmp_path)


def test_the_kernels_benchmark_tries_its_out_before_it_measures(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path[1:]])
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--batch", "1", "--out", "none/x.json"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "benchmarks/kernels.py"), run_name="__main__")
    assert stop.value.code == 2 and "in a folder that exists" in capsys.readouterr().err


def test_rounding_moves_the_ratio_more_the_fewer_digits_a_precision_has(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "STEPS", 3)
    monkeypatch.setattr(rounding, "SIDE", 8)
    out, measure, used = tmp_path / "rounding.json", rounding.ratios, []
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(rounding, "ratios", lambda *arguments: (
        used.append((cudnn.enabled, cudnn.allow_tf32)), measure(*arguments))[1])
    rounding.main(["--dtype", "fp32", "--dtype", "bf16", "--out", str(out)])
    assert used == [(True, False)] * 2  # the convolutions of training, but in float32
    record, = json.loads(out.read_text()).values()
    assert record["latents"] == [8, 8, 8] and len(record["bf16"]["ratios_minus_1"]) == 3
    assert record["fp32"]["median"] < 1e-5 < record["bf16"]["median"]
    rounding.main(["--table", "--out", str(out)])
    assert rounding.table(record) in capsys.readouterr().out


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


def test_the_rows_of_a_compiled_network_count_as_trained_only_where_they_go_back():
    pipeline = load_pipeline("models/emoji", "cpu")
    rows, unet = epoch.count_rows(pipeline.unet), pipeline.unet.requires_grad_(True)
    unet.one_graph = True  # as training.compile_blocks sets it
    trajectories = sample_trajectories(pipeline, ["a cat"] * 3, 2)
    assert rows == [3 * 2 * 2, 0]
    x, t = trajectories.latents[:, 0], torch.full((3,), 500)
    embeds = torch.zeros(3, 4, unet.config.cross_attention_dim)
    unet(x, t, encoder_hidden_states=embeds).sample.sum().backward()
    assert rows == [3 * 2 * 2, 3]


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
    run("peer_trl.py", *flags, "--dtype", "fp32", **TINY, updates=2)  # a row beside the other
    records = json.loads(out.read_text())
    same = records[next(name for name in records if "fp32 in both" in name)]
    assert len(records) == 2 and same["dtype"] == {"ours": "fp32", "TRL": "fp32"}
    headings = [line for line in run("peer_trl.py", "--table", "--out", str(out)).splitlines()
                if line in records]
    assert headings == list(records)


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


# time_to_target.py

TARGET = {"size": 2.0, "recognition": 0.8}


def judged(size, recognition, count):
    return {"size": [size] * count, "recognition": [recognition] * count}


def test_the_target_is_met_by_small_pictures_that_are_still_recognised():
    bases = [{"size": 2.5, "recognition": 0.9}, {"size": 2.4, "recognition": 0.95}]
    target = time_to_target.target_of(bases)  # of each the harder one
    assert target == {"size": pytest.approx(1.92), "recognition": pytest.approx(0.855)}
    for size, recognition, met in (
        (1.92, 0.86, True), (1.93, 0.86, False), (1.92, 0.85, False), (1.0, 0.0, False)
    ):
        assert time_to_target.meets({"size": size, "recognition": recognition}, target) == met
    assert not time_to_target.meets({}, target)  # too few pictures so far


def test_small_epochs_are_judged_together():
    means = time_to_target.means
    small, large = judged(2.0, 1.0, 32), judged(1.0, 0.0, 96)
    assert means([small] * 2) == {}
    assert means([large, small, small]) == pytest.approx({"size": 1.4, "recognition": 0.4})
    assert means([large, *[small] * 3]) == {"size": 2.0, "recognition": 1.0}
    assert means([small, small, large]) == {"size": 1.0, "recognition": 0.0}


def trial(settings, seconds, limit_s=300.0, seed=0, side="ours", size=1.9, **more):
    """As run_trial returns it. seconds: to the target; one that lasts longer ends at its limit."""
    reached = seconds <= limit_s
    end = min(seconds, limit_s)
    start = {"epoch": 1, "pictures": 96, "seconds": end / 2, "seconds_from_start": end / 2 + 8,
             "rows_sample": 1000, "rows_update": 500}
    last = start | {"epoch": 2, "pictures": 192, "seconds": end, "seconds_from_start": end + 8,
                    "size": size if reached else 2.2, "recognition": 0.9}
    return dict(side=side, settings=settings, seed=seed, limit_s=limit_s, reached=reached,
                target=TARGET, destroyed=False, error=None, epochs=[start, last]) | more


def best_of(tried):
    return min((trial for _, trial in tried), key=time_to_target.rank)


def test_a_search_keeps_the_fastest_of_each_axis_and_ends_what_cannot_win():
    seconds = {(1, 32): 80.0, (2, 32): 60.0, (4, 32): 90.0, (2, 16): 70.0, (2, 8): 50.0,
               (1, 8): math.inf}
    ran = []

    def run(settings, limit_s):
        ran.append((settings["lr"], settings["images"], limit_s))
        return trial(settings, seconds[settings["lr"], settings["images"]], limit_s)

    axes = {"lr": [dict(lr=2), dict(lr=4)], "images": [dict(images=16), dict(images=8)],
            "lr, again": [(lambda settings: dict(lr=settings["lr"] / 2)), dict(lr=2)]}
    tried = time_to_target.search(dict(lr=1, images=32), axes, 300.0, math.inf, run)
    best = best_of(tried)
    assert ran == [(1, 32, 300.0), (2, 32, 80.0), (4, 32, 60.0), (2, 16, 60.0), (2, 8, 60.0),
                   (1, 8, 50.0)]  # the last change is what was tried already
    assert best["settings"] == dict(lr=2, images=8)
    assert [axis for axis, _ in tried] == ["start", "lr", "lr", "images", "images", "lr, again"]
    ran.clear()
    best = best_of(time_to_target.search(dict(lr=1, images=32), axes, 300.0, 150.0, run))
    assert len(ran) == 2 and best["settings"] == dict(lr=2, images=32)  # 88 + 68 s, with loading


def test_where_no_trial_reaches_the_target_the_smallest_recognised_pictures_win():
    def run(settings, limit_s):
        made = trial(settings, math.inf, limit_s)
        made["epochs"][-1] |= {1: dict(size=2.4), 2: dict(size=2.1),
                               3: dict(size=1.5, recognition=0.1)}[settings["lr"]]
        return made

    axes = {"lr": [dict(lr=2), dict(lr=3)]}
    best = best_of(time_to_target.search(dict(lr=1), axes, 300.0, math.inf, run))
    assert best["settings"] == dict(lr=2) and not best["reached"]
    with pytest.raises(SystemExit, match="ours cannot run: no module trl"):
        time_to_target.search({}, {}, 1.0, math.inf, lambda *_: trial({}, 1.0) | dict(
            epochs=[], reached=False, error="no module trl"))


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path, monkeypatch):
    ran, patience = [], [4]

    def run_trial(side, settings, seed, limit_s, target, python):
        if len(ran) == patience[0]:
            raise KeyboardInterrupt
        ran.append((settings["lr"], seed))
        return trial(settings, settings["lr"] * 10.0, limit_s, seed)

    monkeypatch.setattr(time_to_target, "run_trial", run_trial)
    monkeypatch.setattr(time_to_target, "measure_base",
                        lambda steps, scale, window: {"size": 2.5, "recognition": 0.9})
    reference = dict(lr=5, steps=10, guidance_scale=4.0)

    def measure(limit_s, place="here"):
        bench = time_to_target.Bench(tmp_path, "python", reference, [place])
        axes = {"lr": [dict(lr=3), dict(lr=4)]}
        return bench.side("ours", reference, axes, (0, 1, 2), limit_s, math.inf)

    with pytest.raises(KeyboardInterrupt):
        measure(300.0)
    patience[0] = 100
    part = measure(300.0)
    assert ran == [(5, 100), (3, 100), (4, 100), *((lr, seed) for lr in (3, 5) for seed in range(3))]
    assert part["best"]["lr"] == 3 and [trial["seed"] for trial in part["trials"]] == [0, 1, 2]
    assert measure(300.0) == part and len(ran) == 9
    measure(20.0)  # what has reached the target, or lasted longer, need not run again
    assert len(ran) == 9
    measure(300.0, place="on another device")
    assert len(ran) == 18


def side_where_the_faster_fails(side, seeds, tmp_path, monkeypatch):
    """A search between lr 1 and a faster lr 2, which fails on the seeds."""
    def run_trial(side, settings, seed, limit_s, target, python):
        fails = settings["lr"] == 2 and seed in seeds
        return trial(settings, math.inf if fails else {1: 90.0, 2: 50.0}[settings["lr"]], limit_s, seed)

    monkeypatch.setattr(time_to_target, "run_trial", run_trial)
    monkeypatch.setattr(time_to_target, "measure_base",
                        lambda steps, scale, window: {"size": 2.5, "recognition": 0.9})
    start = dict(lr=1, steps=10, guidance_scale=4.0)
    bench = time_to_target.Bench(tmp_path, "python", start, ["here"])
    return bench.side(side, start, {"lr": [dict(lr=2)]}, (0, 1, 2), 300.0, math.inf)


def test_the_runner_up_of_a_search_counts_where_the_best_was_lucky(tmp_path, monkeypatch):
    assert time_to_target.SEARCH_SEED not in (0, 1, 2)
    part = side_where_the_faster_fails("TRL", (0, 1, 2), tmp_path, monkeypatch)
    assert part["best"]["lr"] == 1 and all(trial["reached"] for trial in part["trials"])
    others, = part["other_finalists"]
    assert [trial["settings"]["lr"] for trial in others] == [2] * 3
    assert not any(trial["reached"] for trial in others)


def test_a_trial_that_was_given_up_early_runs_again_when_there_is_more_time(tmp_path):
    file, limits = tmp_path / "trial.json", []

    def remembered(limit_s):
        def make():
            limits.append(limit_s)
            return trial({}, 100.0, limit_s)

        return time_to_target.remembered(
            file, make, lambda kept: kept["reached"] or kept["limit_s"] >= limit_s
        )

    assert [remembered(limit_s)["reached"] for limit_s in (60, 30, 200, 300)] == [
        False, False, True, True
    ]
    assert limits == [60, 200]
    file.unlink()
    assert time_to_target.remembered(file, lambda: {"error": "killed"}) and not file.exists()


SHRINKING = """
import json, sys, time, torch
job = json.loads(sys.argv[2])
for epoch in range(1, 5):
    input()
    if epoch == 4:
        raise SystemExit("out of memory")
    torch.manual_seed(epoch)
    noise = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8)
    pictures = {"images": noise // 4 ** (epoch - 1), "prompts": ["a cat"] * 8}
    file = f"{job['folder']}/{epoch}.pt"
    torch.save(pictures, file)
    row = {"epoch": epoch, "seconds": float(epoch), "file": file}
    row |= {"versions": {}, "threads": 1} if epoch == 1 else {}
    print(json.dumps(row), flush=True)
"""


@pytest.fixture
def easily_judged(monkeypatch):
    """Eight pictures are enough, and all are recognised: not for the judge's own sake."""
    monkeypatch.setattr(time_to_target, "JUDGED", 8)
    monkeypatch.setattr(time_to_target, "recognition", lambda images, _: torch.ones(len(images)))


def test_a_trial_ends_at_its_target_at_its_limit_destroyed_or_with_its_process(
    tmp_path, monkeypatch, easily_judged
):
    script = tmp_path / "shrinking.py"
    script.write_text(SHRINKING)
    launch = functools.partial(epoch.launch, script=str(script))
    monkeypatch.setattr(time_to_target, "launch", lambda job, python, _: launch(job, python))

    def run_trial(size, limit_s):
        target = {"size": size, "recognition": 1.0}
        return time_to_target.run_trial("ours", {}, 0, limit_s, target, sys.executable)

    failed = run_trial(0.0, 100.0)
    sizes = [row["size"] for row in failed["epochs"]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert failed["error"] == "out of memory" and not failed["reached"]
    reached, late = run_trial(sizes[1], 100.0), run_trial(0.0, 1.5)
    assert reached["reached"] and len(reached["epochs"]) == 2 and reached["threads"] == 1
    assert not late["reached"] and len(late["epochs"]) == 2 and not late["error"]
    monkeypatch.setattr(time_to_target, "recognition",  # which the last of the pictures have lost
                        lambda images, _: (images.float().mean(dim=(1, 2, 3)) > 8).float())
    destroyed = run_trial(0.0, 100.0)
    assert destroyed["destroyed"] and not destroyed["reached"] and not destroyed["error"]
    assert [row["recognition"] for row in destroyed["epochs"]] == [1.0, 1.0, 0.0]


def test_a_sides_clock_stops_while_its_pictures_are_judged(tmp_path, monkeypatch, capsys):
    class Judge:
        def readline(self):
            time.sleep(0.5)
            return "\n"

    class UNet(torch.nn.Linear):
        def forward(self, latents):
            return (super().forward(latents),)  # as diffusers' do

    def compress(images, prompts):
        return -torch.ones(len(images))

    compress.log_counts = {}
    monkeypatch.setattr(sys, "stdin", Judge())
    job = dict(folder=str(tmp_path), settings=dict(images=4), libraries=[])
    job["started"] = time.monotonic()
    recorder, unet = time_to_target.Recorder(job, compress), UNet(1, 1)
    recorder.watch(unet)
    for batch in range(4):  # two epochs of two batches
        with torch.set_grad_enabled(batch == 3):
            output, = unet(torch.zeros(2, 1))
        if batch == 3:
            output.sum().backward()
        pictures = torch.full((2, 3, 8, 8), batch, dtype=torch.uint8)
        assert recorder(pictures, [f"prompt {batch}"] * 2).tolist() == [-1, -1]
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert 0 < first["seconds"] <= second["seconds"] < 0.4
    assert first["seconds_from_start"] >= 0.5  # the process had to wait before its first epoch
    assert second["seconds_from_start"] - first["seconds_from_start"] < 0.4
    assert [first["pictures"], second["pictures"]] == [4, 8]
    assert [second["rows_sample"], second["rows_update"]] == [6, 2]
    shown = torch.load(second["file"])
    assert shown["images"][:, 0, 0, 0].tolist() == [2, 2, 3, 3]
    assert shown["prompts"] == ["prompt 2"] * 2 + ["prompt 3"] * 2


MINIATURE = dict(images=8, steps=2, updates=2)


def two_epochs(side, settings, monkeypatch, python):
    monkeypatch.setattr(time_to_target, "meets", lambda row, target: row["epoch"] == 2)
    made = time_to_target.run_trial(side, settings | MINIATURE, 0, 600.0, TARGET, python)
    assert not made["error"] and made["reached"]
    first, second = made["epochs"]
    assert [first["pictures"], second["pictures"]] == [8, 16]
    assert first["seconds"] < second["seconds"] < second["seconds_from_start"]
    assert 1.0 < first["size"] < 5.0
    return [[row["rows_sample"], row["rows_update"]] for row in made["epochs"]]


def test_our_side_of_a_trial_is_ddpo(monkeypatch, easily_judged):
    settings = time_to_target.first_command() | dict(sample_batch=4)
    rows = two_epochs("ours", settings, monkeypatch, sys.executable)
    evaluation, sampled, updated = 1 * 2 * 2, 8 * 2 * 2, 8 * 1 * 2  # half of the steps is trained
    assert rows == [[evaluation + sampled, 0], [evaluation + 2 * sampled, updated]]


@pytest.mark.skipif(not TRL_PYTHON, reason="needs TRL_PYTHON, an interpreter with TRL 0.23.1")
@pytest.mark.parametrize("more", [dict(), dict(lora_rank=8, group_size=4, inner_epochs=2)])
def test_trls_side_of_a_trial_is_its_trainer(monkeypatch, easily_judged, more):
    settings = time_to_target.TRL_START | dict(sample_batch=8, train_batch=4) | more
    rows = two_epochs("TRL", settings, monkeypatch, TRL_PYTHON)
    sampled = 8 * 2 * 2
    assert rows == [[sampled, 0], [2 * sampled, sampled * settings["inner_epochs"]]]


def changed(settings, change):
    return settings | (change(settings) if callable(change) else change)


def test_every_change_of_a_grid_can_follow_every_other():
    start = time_to_target.first_command()
    assert set(start) == set(time_to_target.SEARCHED)
    names = list(time_to_target.AXES["ours"])
    for first, second in itertools.combinations(names, 2):
        for before, after in itertools.product(*(time_to_target.AXES["ours"][name]
                                                 for name in (first, second))):
            settings = changed(changed(start, before), after)
            config = ddpo.check(ddpo.Config(**time_to_target.FIXED | settings))
            assert {key: getattr(config, key) for key in settings} == settings
    axes = time_to_target.AXES["TRL"]
    for changes in itertools.product(axes["pictures and updates"], axes["batches"],
                                     axes["groups"]):
        settings = functools.reduce(changed, changes, time_to_target.TRL_START)
        assert set(settings) == set(time_to_target.TRL_START)
        assert settings["images"] % settings["sample_batch"] == 0
        assert settings["sample_batch"] % settings["train_batch"] == 0  # TRL refuses others
        assert settings["images"] // settings["updates"] % settings["train_batch"] == 0
        assert settings["images"] % settings["group_size"] == 0


def small_record(theirs, ours):
    """A record of trials that took so many seconds, with 300 as the limit."""
    sides = {}
    for side, times in (("TRL", theirs), ("ours", ours)):
        trials = [trial(dict(lr=1e-4), seconds, seed=seed, side=side)
                  for seed, seconds in enumerate(times)]
        tried = [entry | {"last": entry["epochs"][-1:]} for entry in trials[:2]]
        sides[side] = {"best": dict(lr=1e-4), "search": tried, "trials": trials}
    return {"base": {"size": 2.5, "recognition": 0.9}, "rule": {"size": 0.8}, "sides": sides}


def test_the_table_has_medians_and_marks_what_was_not_reached(tmp_path):
    results, searches = time_to_target_tables.table(
        small_record([200.0, math.inf, 250.0], [25.0, 20.0, 40.0])
    ).split("\n\n")
    _, _, theirs, ours, over, base = results.splitlines()
    assert theirs.startswith("| TRL | 250.0 (200.0 to >300.0) | 250.0 (200.0 to >300.0) "
                             "| 258.0 (208.0 to >308.0) | 2 (2 ")
    assert ours.startswith("| ours | 25.0 (20.0 to 40.0) | 25.0 (20.0 to 40.0) "
                           "| 33.0 (28.0 to 48.0) | 2 (2 to 2) |")
    assert ours.endswith("| 192 (192 to 192) | 1,000 (1,000 to 1,000) | 500 (500 to 500) "
                         "| 1.90 | 0.90 |")
    assert over.startswith("| TRL over ours | 10.0x | 10.0x | 7.8x | 1.0x |")
    assert base.endswith("| 2.50 | 0.90 |")
    assert searches.splitlines()[2] == "| TRL | 2 | 1 | 200.0 | 200.0 | `lr=0.0001` |"
    lost = small_record([math.inf] * 3, [20.0] * 3)
    for entry in lost["sides"]["TRL"]["trials"]:  # small enough after 150 s, but not recognised
        entry["epochs"][0] |= dict(size=1.9, recognition=0.1)
    assert ">300.0 (>300.0 to >300.0) | 150.0 (150.0 to 150.0)" in time_to_target_tables.table(lost)
    unreached = time_to_target_tables.table(small_record([math.inf] * 3, [20.0] * 3)).splitlines()
    assert "| >300.0 (>300.0 to >300.0) |" in unreached[2] and "| >15.0x |" in unreached[4]
    worse = time_to_target_tables.table(small_record([20.0] * 3, [math.inf] * 3)).splitlines()
    assert worse[4].replace("|", "").split() == ["TRL", "over", "ours"]


def test_table_and_curves_come_from_the_record_alone(tmp_path, capsys):
    def printed(flag):
        time_to_target.main([flag, "--out", str(out)])
        return capsys.readouterr().out

    out = tmp_path / "time.json"
    with pytest.raises(SystemExit) as ended:
        printed("--table")
    refusal = capsys.readouterr().err
    assert ended.value.code == 2 and f"--out {out}: there is no such record" in refusal
    record = small_record([200.0, math.inf, 250.0], [25.0, 20.0, 40.0])
    out.write_text(json.dumps({"models/emoji, a CPU": record}))
    tables = printed("--draw")
    assert tables.startswith("models/emoji, a CPU\n\n| | seconds from the first step |")
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")
    assert printed("--table") == tables


@pytest.mark.parametrize("flags", [
    ["--minutes-per-trial", "0"], ["--minutes-per-search", "nan"], ["--seeds", "0,1"],
    ["--seeds", "0,1,1"], ["--seeds", "0,a,b"],
    ["--seeds", "100"], ["--seeds", ""], ["--out", "none/x.json"],
])
def test_bad_flags_are_refused_before_anything_runs(tmp_path, capsys, flags):
    work = tmp_path / "work"
    with pytest.raises(SystemExit) as ended:
        time_to_target.main(["--trl-python", sys.executable, "--work", str(work), *flags])
    assert ended.value.code == 2 and f"{flags[0]} {flags[1]}: " in capsys.readouterr().err
    assert not work.exists()


def test_the_base_model_is_measured_with_a_seed_for_each_picture_and_noise_in_the_window_alone(monkeypatch):
    seeds, noise = [], []

    def sample_trajectories(pipeline, prompts, steps, guidance_scale, etas, generators):
        seeds.extend(generator.initial_seed() for generator in generators)
        noise.append((steps, guidance_scale, etas.tolist()))
        return SimpleNamespace(images=torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8))

    monkeypatch.setattr(sample, "load_pipeline", lambda model: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(sample, "sample_trajectories", sample_trajectories)
    monkeypatch.setattr(time_to_target, "recognition", lambda images, _: torch.ones(len(images)))
    base = time_to_target.measure_base(5, 3.0, "1:3")
    assert base["pictures"] == len(set(seeds)) == 4 * 45
    assert all(each == (5, 3.0, [0, 1, 1, 0, 0]) for each in noise)


def test_of_two_finalists_the_one_with_the_better_median_counts_not_the_one_with_a_lucky_seed(
        tmp_path, monkeypatch):
    part = side_where_the_faster_fails("ours", (1, 2), tmp_path, monkeypatch)
    assert part["best"]["lr"] == 1
    assert [trial["reached"] for trial in part["other_finalists"][0]] == [True, False, False]


def test_of_the_steps_outside_the_clip_range_those_below_it_are_told_apart(
        tmp_path, monkeypatch, capsys):
    away = torch.tensor([-2e-4, -3e-4, 5e-4, 0.0], dtype=torch.float64)
    monkeypatch.setattr(rounding, "ratios", lambda *_: away)
    rounding.main(["--dtype", "fp16", "--out", str(tmp_path / "rounding.json")])
    record, = json.loads((tmp_path / "rounding.json").read_text()).values()
    found = record["fp16"]
    assert (found["outside"], found["below"], found["max"]) == (0.75, 0.5, 5e-4)
    assert "| fp16 | 75% | 50% | 2.0e-04 | 5.0e-04 |" in capsys.readouterr().out


def test_the_random_model_has_as_many_weights_as_stable_diffusion():
    with torch.device("meta"):
        networks = (UNet2DConditionModel(**sd15.UNET), AutoencoderKL(**sd15.VAE),
                    CLIPTextModel(CLIPTextConfig(**sd15.TEXT)))
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]


def test_the_curves_are_in_units_of_the_base_model(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(reproduce_figures, "save_figure", lambda figure, _: figures.append(figure))
    record = small_record([200.0], [25.0])  # both end at 1.9 kB; 2 is 0.8 of the base model's
    time_to_target_tables.draw(record, tmp_path / "curves.png")
    lines = {line.get_label(): line.get_data() for line in figures[0].axes[0].get_lines()}
    for side, seconds in (("TRL", 200.0), ("ours", 25.0)):
        assert [list(axis) for axis in lines[side]] == [[seconds], [pytest.approx(1.9 / 2.5)]]
    assert list(lines["target"][1]) == [0.8, 0.8]


def test_a_variants_memory_is_the_most_of_its_rounds_and_its_speed_the_median():
    rows = [dict(seconds=seconds, seconds_sample=1.0, seconds_update=1.0, peak_memory_gb=gigabytes)
            for seconds, gigabytes in ((1.0, 3.0), (4.0, 5.0), (2.0, 4.0))]
    summary = epoch.summarise({"fp32": rows}, images=8)["fp32"]
    assert summary["peak_memory_gb"] == 5.0 and summary["images_per_second"]["epoch"] == 4.0
