"""Claims about the experiments: every planned run is a command that its script accepts, tables
follow from logs, and no run outlives `reproduce.py`."""

import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ddpo
import experiments
import reproduce
import reproduce_control
import reproduce_figures
from reproduce import EXPERIMENTS, finished, plan, run_all
from reproduce_figures import between, interval, kept, measure
from run_folder import read_metrics
from scripts import finish

ROOT = Path(__file__).parents[1]
TINY = (
    "ddpo.py --reward compress --device cpu --images 4 --group-size 2 --sample-batch 4 "
    "--train-batch 4 --steps 2 --updates 1 --epochs 2 --eval-images 2 --eval-every 1 --watch= "
    "--lora-rank 2"
)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_command_of_a_plan_is_one_that_its_script_accepts(experiment):
    runs = plan(experiment, 2)
    assert len(set(runs.values())) == len(runs)  # nothing is run twice under two names
    for command in runs.values():
        script, *flags = command.split()
        module = import_module(Path(script).stem)
        if "device" in module.Config.__dataclass_fields__:
            flags += ["--device", "cpu"]
        module.check(module.parse_config(flags)[0])


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    expected = 4.303 * statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3)
    assert half == pytest.approx(expected, rel=1e-3)
    assert interval([5.0]) == (5.0, 0.0)


def test_a_curve_is_linear_between_its_points():
    assert between([(0, 1.0), (10, 3.0), (20, 2.0)], 5) == 2.0
    assert between([(0, 1.0), (10, 3.0)], 99) == 3.0
    assert between([(0, 1.0), (10, 3.0), (20, 2.0)], 10) == 3.0


def fake_run(folder, seed, sizes=(2.5, 2.2, 2.0), cosines=(0.66, 0.65, 0.3), **settings):
    """The logs of a run that was evaluated after each epoch and, where it watched CLIP, left the
    guard at the last."""
    folder.mkdir(parents=True)
    epochs = len(sizes) - 1
    config = ddpo.check(ddpo.Config(seed=seed, device="cpu", epochs=epochs, **settings))
    (folder / "config.json").write_text(json.dumps(vars(config)))
    views = "eval", "eval_animals_held_out", "eval_objects", "eval_animal_objects_held_out"
    lines = []
    for epoch, (size, cosine) in enumerate(zip(sizes, cosines)):
        row = {"epoch": epoch, "images": 64 * epoch, "eval_clip_std": 0.05}
        row |= {"eval_emoji/classifiers.py:honest_count": 0.6}
        if epoch:
            row |= {"reward_mean": -size, "seconds": 1.0}
        for view in views:
            row |= {f"{view}_reward": -size, f"{view}_clip": cosine}
            row |= {f"{view}_clip_top1": cosine, f"{view}_diversity": 0.2}
        if not config.watch:
            row = {key: row[key] for key in row if "clip" not in key and "diversity" not in key}
        lines.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture(autouse=True)
def handler_of_this_process():
    """`reproduce.main` sets its own, for the process that it is."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty folder in the place of this one."""
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name != "control"])
def test_tables_and_curves_are_drawn_from_logs_alone(experiment, repository, capsys):
    for i, name in enumerate(plan(experiment, 2)):
        fake_run(repository / "results/emoji/logs" / name, seed=i)
    held_out = {
        f"{run} {name}": {"compress": -2.0 - i, "clip": 0.5}
        for reward, sets in experiments.HELD_OUT.items()
        for name in sets
        for i, run in enumerate(("base", "guided", f"{reward}-0", f"{reward}-1"))
    }
    (repository / "results/emoji/logs/held_out.json").write_text(json.dumps(held_out))
    values = {"digits": 0.3, "judge": 0.7, "covered": 0.4}
    digits = {f"typographic-{variant}-{seed}": {when: values for when in ("before", "guard", "end")}
              for variant in experiments.JUDGED for seed in range(2)}
    (repository / "results/emoji/logs/digits.json").write_text(json.dumps(digits))
    reproduce.main([experiment, "--draw", "--seeds", "2"])
    results = repository / "results/emoji"
    assert (results / f"{experiment}.png").stat().st_size > 0
    table = (results / f"{experiment}.md").read_text().splitlines()
    assert len(table) > 2 and len({row.count("|") for row in table}) == 1
    assert json.loads((results / f"{experiment}.json").read_text())


@pytest.mark.parametrize("room, experiment", [
    (path.parent.name, path.stem) for path in sorted((ROOT / "results").glob("*/*.md"))
])
def test_the_committed_tables_follow_from_the_committed_logs(room, experiment, repository, capsys):
    shutil.copytree(ROOT / "results" / room / "logs", repository / "results" / room / "logs")
    page = repository / "results/README.md"
    marker = f"{room} {experiment}" if room == "emoji-flow" else experiment
    page.write_text(f"before\n<!-- {marker} -->\nan old table\n<!-- /{marker} -->\nafter\n")
    model = "models/emoji-flow" if room == "emoji-flow" else "models/emoji"
    # all seeds are drawn nevertheless
    reproduce.main([experiment, "--draw", "--seeds", "1", "--model", model])
    table = (ROOT / "results" / room / f"{experiment}.md").read_text()
    assert (repository / "results" / room / f"{experiment}.md").read_text() == table
    assert page.read_text() == f"before\n<!-- {marker} -->\n{table}<!-- /{marker} -->\nafter\n"
    numbers = (ROOT / "results" / room / f"{experiment}.json").read_text()
    assert (repository / "results" / room / f"{experiment}.json").read_text() == numbers


def test_the_headline_is_the_mean_of_the_seeds():
    numbers = {
        f"compress-{seed}": {"first": {"eval_reward": -2.0}, "kept": {"eval_reward": -size},
                             "classifier": {"before": 1.0, "kept": 0.8}}
        for seed, size in enumerate((1.0, 2.0))
    }
    *_, line = reproduce_figures.headline(numbers)
    half = 12.71 * math.sqrt(0.5) / math.sqrt(2)  # Student's t with one degree of freedom
    assert line == f"| `compress` (kB) | 2.00 | 1.50 ± {half:.2f} | -25% | 1.00 → 0.80 ± 0.00 |"


@pytest.mark.parametrize("experiment", reproduce.FOR_OTHER_MODELS)
def test_another_models_tables_do_without_the_shipped_clip(experiment, repository, capsys):
    for i, name in enumerate(plan(experiment, 2)):
        if not name.startswith("clip-"):
            fake_run(repository / "results/other/logs" / name, seed=i, watch="")
    reproduce.main([experiment, "--draw", "--model", "models/other"])
    assert (repository / f"results/other/{experiment}.png").stat().st_size > 0
    table = (repository / f"results/other/{experiment}.md").read_text()
    assert "| compress" in table and "| clip" not in table
    assert len({row.count("|") for row in table.splitlines()}) == 1
    with pytest.raises(SystemExit):
        reproduce.main(["overoptimisation", "--draw", "--model", "models/other"])
    message = "not for another --model; choose rewards, algorithms"
    assert capsys.readouterr().err == f"experiment overoptimisation: {message}\n"


def test_each_models_table_is_put_between_its_own_markers(repository):
    for i, name in enumerate(plan("fewer_steps", 2)):
        fake_run(repository / "results/emoji-flow/logs" / name, seed=i)
    page = repository / "results/README.md"
    first = "<!-- fewer_steps -->\nits table\n<!-- /fewer_steps -->\n"
    start, end = "<!-- emoji-flow fewer_steps -->\n", "<!-- /emoji-flow fewer_steps -->\n"
    page.write_text(first + start + end)
    reproduce.main(["fewer_steps", "--draw", "--model", "models/emoji-flow"])
    table = (repository / "results/emoji-flow/fewer_steps.md").read_text()
    assert page.read_text() == first + start + table + end


def test_where_weights_are_needed_and_not_there_nothing_is_drawn(repository):
    logs = repository / "results/emoji-flow/logs"
    fake_run(logs / "compress-0", seed=0)
    reproduce.main(["generalisation", "--draw", "--model", "models/emoji-flow"])
    assert list(logs.parent.iterdir()) == [logs] and [path.name for path in logs.iterdir()] == ["compress-0"]


def test_a_share_has_no_interval_beyond_one():
    _, (axis, other) = reproduce_figures.plots(2)
    curves = [[(0, 0.9), (1, 1.0)], [(0, 0.9), (1, 0.8)]]
    reproduce_figures.band(axis, curves, "shares", share=True)
    reproduce_figures.band(other, curves, "many lines", shaded=False)
    reach = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (reach.min(), reach.max()) == (0, 1)
    half = 12.71 * 0.1  # of the values at the end, whose standard error is 0.1
    assert other.lines[1].get_ydata() == pytest.approx([0.9 - half, 0.9 + half])


def test_samplers_are_compared_by_what_each_gains_on_its_own_pictures(repository):
    """And in its own time: here the second sampler starts from larger files and takes twice as long."""
    def log(before, after, seconds):
        return [{"epoch": epoch, "eval_reward": -before + (before - after) * epoch / 6,
                 "eval_clip_top1": 0.9 - 0.01 * epoch} | ({"seconds": seconds} if epoch else {})
                for epoch in (0, 3, 6)]

    runs = {}
    for seed, after in enumerate((1.8, 1.64)):
        runs[f"samplers-ddim-first-half-{seed}"] = log(2.0, after, seconds=10.0)
        runs[f"samplers-flow-moving-window-{seed}"] = log(4.0, 2 * after, seconds=20.0)
    lines, numbers = reproduce_figures.draw_samplers(runs, repository, repository)
    half = 12.71 * 4  # of gains of 10 and 18 %: Student's t with one degree of freedom
    assert lines[2:] == [
        f"| ddim | first half | 2.00 | 0.90 | +14.0% ± {half:.1f} | 0.84 ± 0.00 | 10.0 "
        f"| +14.0% ± {half:.1f} |",
        f"| flow | moving window | 4.00 | 0.90 | +14.0% ± {half:.1f} | 0.84 ± 0.00 | 20.0 "
        f"| +7.0% ± {half / 2:.1f} |",
    ]
    assert [*numbers] == ["ddim, first half", "flow, moving window"]


def test_what_a_table_reports_is_the_evaluation_whose_weights_were_saved(tmp_path):
    fake_run(tmp_path / "compress-0", 0)
    first, last = kept("compress-0", tmp_path)
    assert (first["epoch"], last["epoch"]) == (0, 1)  # epoch 2 was beyond the guard


def without_seconds(file):
    return re.sub(r'"[a-z_]*second[a-z_]*": [\d.e-]+', "", file.read_text())


def test_a_finished_run_is_not_run_again_and_an_interrupted_one_goes_on(tmp_path):
    (tmp_path / "logs").mkdir()
    arguments = {"tiny": TINY}, tmp_path / "out", tmp_path / "logs"
    log = tmp_path / "logs/tiny/metrics.jsonl"
    ddpo.main([*TINY.split()[1:], "--name", "tiny", "--out", str(tmp_path / "out")])
    assert run_all(*arguments, jobs=2, minutes=0) == []  # which copies the log
    before = log.read_text(), without_seconds(log)
    assert finished(tmp_path / "out/tiny") and len(before[0].splitlines()) == 3
    run_all(*arguments, jobs=2, minutes=0)
    assert log.read_text() == before[0]  # with its seconds: it was not run again
    (tmp_path / "out/tiny/checkpoint/epoch_000002.pt").unlink()
    assert not finished(tmp_path / "out/tiny")
    run_all(*arguments, jobs=2, minutes=0)
    assert without_seconds(log) == before[1]


def test_a_run_of_other_settings_is_not_taken_for_the_commands_own(tmp_path):
    (tmp_path / "logs").mkdir()
    settings = vars(ddpo.parse_config(TINY.split()[1:])[0])
    own = {"epochs", "device"}  # which fake_run sets itself
    fake_run(tmp_path / "out/tiny", **{key: settings[key] for key in settings.keys() - own})
    arguments = tmp_path / "out", tmp_path / "logs", 1, 1e-9
    for flags, names in (("--lr 0.5", "lr"), ("--model other --preset emoji", "model"),
                         ("--epochs 9", "epochs"), ("--kl 0.5", "kl")):
        with pytest.raises(SystemExit, match=f"its {names} is"):
            run_all({"tiny": f"{TINY} {flags}"}, *arguments)
    with pytest.raises(SystemExit, match="its lora_rank is 2"):
        run_all({"tiny": TINY.replace("--lora-rank 2", "")}, *arguments)
    assert run_all({"tiny": TINY}, *arguments) == ["tiny"]  # no checkpoint yet; and no time to go on


@pytest.mark.parametrize("given, says", [
    (["--flags=--seed 5"], "--seed is given by each run itself"),
    (["--flags=--lr 1 --out=x"], "--out is given"),
    (["--flags", '"'], "No closing quotation"), (["--minutes", "nan"], "--minutes nan")])
def test_flags_that_a_run_gives_itself_are_refused(given, says, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.parse(["rewards", *given])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and len(error.splitlines()) == 1


def test_a_models_folder_may_have_a_space_but_not_the_name_of_anothers_results(
        tmp_path, monkeypatch, capsys):
    for name in ("my model", "emoji", "control"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert reproduce.parse(["--model", "my model"]).model == str(tmp_path / "my model")
    for name in ("emoji", "control"):
        with pytest.raises(SystemExit):
            reproduce.parse(["--model", str(tmp_path / name)])
        assert "another name" in capsys.readouterr().err


def test_where_weights_are_pictures_and_measurements_are_taken_of_them_as_the_run_samples(tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    command = TINY.replace("--eval-images 2", "--eval-images 64").replace("--watch=", "")
    command = command.replace("--epochs 2", "--epochs 1") + " --sampler flow --guidance-scale 1"
    ddpo.main([*command.split()[1:], "--name", "compress-0", "--out", str(out)])
    shutil.copytree(out / "compress-0", results / "logs/compress-0")
    runs = {"compress-0": read_metrics(results / "logs/compress-0/metrics.jsonl")}
    reproduce_figures.draw_rewards(runs, results, out)
    grid = Image.open(results / "compress.png")
    assert 10 * 112 <= grid.width and 2 * 112 <= grid.height < 3 * 112  # before and after

    config = reproduce_figures.settings_of(out / "compress-0")
    animals = reproduce_figures.load_prompts("animals")
    first, last = kept("compress-0", results / "logs")
    measured = measure(config, out / "compress-0", animals)
    evaluated = last["eval_reward"], last["eval_clip"], last["eval_clip_top1"]
    assert tuple(measured.values()) == pytest.approx(evaluated, rel=2e-2)  # bfloat16 there
    assert first["eval_reward"] != last["eval_reward"]


SLEEPER = """
import os, pathlib, sys, time
assert sys.argv[1:3] == ["--name", "sleeper-0"] and sys.argv[3] == "--out"
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(600)
"""
WITH_ONE_SLEEPING_RUN = """
import pathlib, reproduce, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
reproduce.EXPERIMENTS["rewards"] = lambda seeds: {"sleeper-0": "sleeper.py"}, None
reproduce.HERE = pathlib.Path.cwd()
reproduce.main(["rewards"])
"""


@pytest.mark.parametrize("killed_by", [
    signal.SIGTERM,
    signal.SIGINT,
    pytest.param(signal.SIGKILL, marks=pytest.mark.skipif(sys.platform != "linux", reason="prctl")),
])
def test_no_run_outlives_the_command_that_started_it(tmp_path, killed_by):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WITH_ONE_SLEEPING_RUN], cwd=tmp_path,
                               env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 300  # on a busy machine its imports take long
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    run = int((tmp_path / "pid").read_text())
    process.send_signal(killed_by)
    _, _, errors = finish(process, timeout=100)
    if killed_by == signal.SIGTERM:
        assert errors.splitlines()[-1] == "stopped; the same command goes on"
    while is_alive(run):
        assert time.time() < deadline and killed_by == signal.SIGKILL  # the others have waited
        time.sleep(0.05)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_typographic_run_is_measured_before_at_the_guard_s_weights_and_at_its_last(tmp_path, monkeypatch):
    seen = []

    def evaluation_pictures(config, weights, prompts):
        seen.append(weights)
        return torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ["two cats"] * 2

    monkeypatch.setattr(reproduce_figures, "evaluation_pictures", evaluation_pictures)
    for run in ("guarded", "whole"):
        fake_run(tmp_path / run, seed=0, prompts="counting_to_six")
        (tmp_path / run / "unet").mkdir()
    (tmp_path / "guarded/last").mkdir()
    numbers = reproduce_figures.measure_digits(["guarded", "whole"], tmp_path / "digits.json", tmp_path)
    guarded, whole = tmp_path / "guarded", tmp_path / "whole"
    assert seen == [None, guarded, guarded / "last", whole, whole]  # one base model
    assert all(set(each) == {"before", "guard", "end"} for each in numbers.values())


def test_held_out_prompts_are_measured_of_the_base_model_also_with_the_guidance_of_sampling(
        tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce_figures, "measure", lambda config, weights, prompts: (
        seen.append((config.guidance_scale, weights)) or {"clip": len(seen)}))
    fake_run(tmp_path / "clip-0", seed=0, guidance_scale=1.0)
    (tmp_path / "clip-0/unet").mkdir()
    file = tmp_path / "held_out.json"
    numbers = reproduce_figures.measure_held_out(["clip-0"], file, tmp_path)
    sets = experiments.HELD_OUT["clip"]
    assert list(numbers) == [f"{run} {name}" for run in ("base", "guided", "clip-0") for name in sets]
    assert [*dict.fromkeys(seen)] == [(1.0, None), (4.0, None), (1.0, tmp_path / "clip-0")]
    assert reproduce_figures.measure_held_out(["clip-0"], file, tmp_path) == numbers
    assert len(seen) == 3 * len(sets)  # once each


def test_weights_are_measured_once_and_anew_where_they_are_newer(tmp_path):
    taken, file = [], tmp_path / "measured.json"
    for run in ("a", "b"):
        fake_run(tmp_path / run, seed=0)
        (tmp_path / run / "unet").mkdir()

    def measured():
        return reproduce_figures.measured(["a", "b"], file, tmp_path, lambda config, folder: (
            taken.append(folder.name) or len(taken)))

    assert measured() == measured() == {"a": 1, "b": 2} == json.loads(file.read_text())
    os.utime(tmp_path / "a/unet", (2e9, 2e9))
    shutil.rmtree(tmp_path / "b/unet")
    assert measured() == {"a": 3, "b": 2} and taken == ["a", "b", "a"]


def test_a_run_that_the_guard_has_stopped_is_finished_before_its_last_epoch(tmp_path):
    for patience, over in ((1, True), (2, False)):
        folder = tmp_path / str(patience)
        fake_run(folder, seed=0, patience=patience)  # beyond the guard at its last evaluation alone
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"epochs": 9}))
        assert not finished(folder)  # without a checkpoint
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint/epoch_000002.pt").touch()
        assert finished(folder) == over


def test_after_the_minutes_no_run_is_started(tmp_path, monkeypatch):
    started, clock = [], [0.0]

    def ends():
        clock[0] += 50.0
        return 0

    of_clock = SimpleNamespace(time=lambda: clock[0], sleep=lambda _: None)
    monkeypatch.setattr(reproduce, "time", of_clock)
    monkeypatch.setattr(reproduce, "start_run", lambda name, *_, **__: (
        started.append(name) or (SimpleNamespace(poll=ends, returncode=0), None)))
    left = run_all(dict.fromkeys("abc", "ddpo.py"), tmp_path, tmp_path, jobs=1, minutes=1.5)
    assert started == ["a", "b"] and left == ["c"]


@pytest.mark.parametrize("seeds", [*reproduce_figures.T_95, 9])
def test_the_quantiles_are_students(seeds):
    half = interval([0.0] * (seeds - 1) + [1.0])[1]
    quantile = half * math.sqrt(seeds) / statistics.stdev([0.0] * (seeds - 1) + [1.0])
    freedom, t = seeds - 1, torch.linspace(0, quantile, 200_001, dtype=torch.float64)
    density = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = density * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 2 * torch.trapezoid(density, t).item() == pytest.approx(0.95, abs=1e-3)


def test_pictures_of_a_run_have_noise_where_its_evaluations_have_it(monkeypatch):
    asked = []

    def sample_trajectories(pipeline, prompts, steps, guidance_scale, eta, generators, sampler):
        asked.append((steps, guidance_scale, eta.tolist(), sampler))
        return SimpleNamespace(images=None)

    monkeypatch.setattr(reproduce_figures, "sample_trajectories", sample_trajectories)
    config = ddpo.Config(steps=4, guidance_scale=3.0, eta=0.5, window="1:3", window_shift="1/1",
                         sampler="cps")
    reproduce_figures.sample_as(config, None, ["a cat"], None)
    reproduce_figures.sample_as(config, None, ["a cat"], None, guidance_scale=5.0)
    assert asked == [(4, scale, [0, 0.5, 0.5, 0], "cps") for scale in (3.0, 5.0)]


def test_each_strength_is_measured_with_the_newest_weights_at_that_strength(tmp_path, monkeypatch):
    fake_run(tmp_path / "over-none-0", seed=0)
    (tmp_path / "over-none-0/last").mkdir()
    monkeypatch.setattr(reproduce_figures, "measure", lambda _, weights, prompts, strength=1.0: {
        "weights": weights, "measured at": strength})
    for point in reproduce_figures.measure_strengths(tmp_path):
        assert point["weights"] == tmp_path / "over-none-0/last"
        assert point["measured at"] == point["strength"]


def test_the_plans_shown_are_those_before_and_those_of_the_last_evaluation(tmp_path, monkeypatch):
    drawn, plans = [], {epoch: [f"epoch {epoch}, {view}" for view in reproduce_control.VIEWS]
                        for epoch in (0, 10, 5)}
    monkeypatch.setattr(reproduce_control, "load_checkpoint", lambda folder: {"shown": {
        epoch: [(folder.parent.name, plan) for plan in each] for epoch, each in plans.items()}})
    monkeypatch.setattr(reproduce_control, "draw_scene", lambda axis, *shown: drawn.append(shown))
    reproduce_control.draw_plans(tmp_path, tmp_path)
    runs = [("plan-ddpo-0", 0), *((f"plan-{name}-0", 10) for name in reproduce_control.PLANS)]
    assert drawn == [(run, plan) for run, epoch in runs for plan in plans[epoch]]
    assert (tmp_path / "control_plans.png").stat().st_size > 0


def test_runs_beside_each_other_share_the_cores(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(reproduce, "start_run", lambda name, command, out, share, quiet: (
        threads.append(share) or (SimpleNamespace(poll=lambda: 0, returncode=0), None)))
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(time=time.time, sleep=lambda _: None))
    for jobs in (1, 2, 16):
        run_all({"a": "ddpo.py"}, tmp_path, tmp_path, jobs, minutes=0)
    assert threads == [8, 4, 1]


def test_rows_of_pictures_have_the_same_prompts_and_seeds(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce_figures, "load_pipeline", lambda model, **how: (
        SimpleNamespace(device="cpu", how=how)))

    def sample_as(config, pipeline, prompts, generators, guidance_scale):
        seeds = [generator.initial_seed() for generator in generators]
        asked.append((prompts, seeds, pipeline.how, guidance_scale))

    monkeypatch.setattr(reproduce_figures, "sample_as", sample_as)
    empty = Image.new("RGB", (1, 1))
    monkeypatch.setattr(reproduce_figures, "picture_grid", lambda *_, **__: empty)
    models = {"before": {}, "after": dict(lora="run"), "guided": dict(guidance_scale=4.0)}
    prompts = [f"prompt {i}" for i in range(20)]
    reproduce_figures.pictures(ddpo.Config(), models, prompts, tmp_path / "a.png", columns=5)
    assert [row[2:] for row in asked] == [({}, None), (dict(lora="run"), None), ({}, 4.0)]
    assert asked[0][0] == prompts[::4] and len(set(asked[0][1])) == 5
    assert all(row[:2] == asked[0][:2] for row in asked)


def test_a_change_of_one_seed_has_no_interval():
    for seeds, text in ((1, "1.0 → 2.5"), (2, "1.0 ± 0.0 → 2.5 ± 0.0")):
        logs = [[{"x": 1.0}, {"x": 7.0}, {"x": 2.5}]] * seeds
        told, behind = reproduce_control.change(logs, "x", 1)
        assert told == text
        assert behind == {"before": (1.0, 0.0), "after": (2.5, 0.0), "seeds": seeds}
