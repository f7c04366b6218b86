"""Claims about the experiments: every run of every plan is a command that its script accepts, and tables follow from logs."""

import json
import math
import re
import statistics

import pytest

import ddpo
import reproduce
import rwr
from reproduce import EXPERIMENTS, between, finished, interval, kept, plan, run_all


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_command_of_a_plan_is_one_that_its_script_accepts(experiment):
    runs = plan(experiment, 2)
    assert len(set(runs.values())) == len(runs)  # nothing is run twice under two names
    for command in runs.values():
        script, *flags = command.split()
        if script == "ddpo.py":
            ddpo.check(ddpo.parse_config([*flags, "--device", "cpu"])[0])
        else:
            rwr.check(rwr.parse_config([*flags, "--device", "cpu"])[0])


def test_the_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, half = interval(values)
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3), rel=1e-3)
    assert interval([5.0]) == (5.0, 0.0)


def test_a_curve_is_linear_between_its_points():
    assert between([(0, 1.0), (10, 3.0), (20, 2.0)], 5) == 2.0 and between([(0, 1.0), (10, 3.0)], 99) == 3.0


def fake_run(folder, seed, sizes=(2.5, 2.2, 2.0), cosines=(0.66, 0.65, 0.3), **settings):
    """The logs of a run that looked after each epoch and, where it watched CLIP, left the guard at the last."""
    folder.mkdir(parents=True)
    config = ddpo.check(ddpo.Config(seed=seed, device="cpu", epochs=len(sizes) - 1, **settings))
    (folder / "config.json").write_text(json.dumps(vars(config)))
    rows = []
    for epoch, (size, cosine) in enumerate(zip(sizes, cosines)):
        row = {"epoch": epoch, "images": 64 * epoch, "eval_clip_std": 0.05} | ({"reward_mean": -size, "seconds": 1.0} if epoch else {})
        for view in ("eval", "eval_animals_held_out", "eval_objects", "eval_animal_objects_held_out"):
            row |= {f"{view}_reward": -size, f"{view}_clip": cosine, f"{view}_clip_top1": cosine, f"{view}_diversity": 0.2}
        rows.append(row if config.watch else {key: value for key, value in row.items() if "clip" not in key and "diversity" not in key})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_tables_and_curves_are_drawn_from_logs_alone(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(plan(experiment, 2)):
        fake_run(tmp_path / "results/emoji/logs" / name, seed=i)
    held_out = {f"{run} {name}": {"compress": -2.0 - seed, "clip": 0.5} for reward, sets in reproduce.HELD_OUT.items() for name in sets
                for seed, run in enumerate(("base", "guided", f"{reward}-0", f"{reward}-1"))}
    (tmp_path / "results/emoji/logs/held_out.json").write_text(json.dumps(held_out))
    (tmp_path / "results/README.md").write_text(f"before\n<!-- {experiment} -->\nold\n<!-- /{experiment} -->\nafter\n")
    reproduce.main([experiment, "--draw", "--seeds", "2"])
    assert (tmp_path / f"results/emoji/{experiment}.png").stat().st_size > 0
    table = (tmp_path / f"results/emoji/{experiment}.md").read_text().splitlines()
    assert len(table) > 2 and len({row.count("|") for row in table}) == 1
    shown = (tmp_path / "results/README.md").read_text().splitlines()
    assert shown == ["before", f"<!-- {experiment} -->", *table, f"<!-- /{experiment} -->", "after"]
    assert json.loads((tmp_path / f"results/emoji/{experiment}.json").read_text())


def test_the_headline_is_the_mean_of_the_seeds():
    look = lambda reward, top1: {"eval_reward": reward, "eval_clip_top1": top1}
    numbers = {f"compress-{seed}": {"first": look(-2.0, 1.0), "kept": look(-size, 0.8)} for seed, size in enumerate((1.0, 2.0))}
    *_, row = reproduce.headline(numbers)
    half = 12.71 * math.sqrt(0.5) / math.sqrt(2)  # Student's t with one degree of freedom
    assert row == f"| `compress` (kB) | 2.00 | 1.50 ± {half:.2f} | -25% | 1.00 → 0.80 ± 0.00 |"


@pytest.mark.parametrize("experiment", ["rewards", "algorithms"])
def test_another_models_tables_do_without_the_shipped_clip(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(plan(experiment, 2)):
        fake_run(tmp_path / "results/other/logs" / name, seed=i, watch="")
    reproduce.main([experiment, "--draw", "--seeds", "2", "--model", "models/other"])
    assert (tmp_path / f"results/other/{experiment}.png").stat().st_size > 0
    table = (tmp_path / f"results/other/{experiment}.md").read_text()
    assert "| compress" in table and "| clip" not in table and len({row.count("|") for row in table.splitlines()}) == 1
    with pytest.raises(SystemExit):
        reproduce.main(["overoptimisation", "--draw", "--model", "models/other"])
    assert capsys.readouterr().err == "experiment overoptimisation: not for another --model; choose rewards, algorithms\n"


def test_what_a_table_reports_is_the_look_that_was_kept(tmp_path):
    fake_run(tmp_path / "compress-0", 0)
    first, last = kept("compress-0", tmp_path)
    assert (first["epoch"], last["epoch"]) == (0, 1)  # epoch 2 was beyond the guard


def test_a_finished_run_is_not_run_again_and_an_interrupted_one_goes_on(tmp_path):
    (tmp_path / "logs").mkdir()
    runs = {"tiny": "ddpo.py --reward compress --device cpu --images 4 --group-size 2 --sample-batch 4 --train-batch 4 --steps 2 --updates 1 "
                    "--epochs 2 --eval-images 2 --eval-every 1 --watch= --lora-rank 2"}
    assert run_all(runs, tmp_path / "out", tmp_path / "logs", jobs=2, minutes=0)
    log = (tmp_path / "logs/tiny/metrics.jsonl").read_text()
    assert finished(tmp_path / "out/tiny") and len(log.splitlines()) == 3
    run_all(runs, tmp_path / "out", tmp_path / "logs", jobs=2, minutes=0)
    assert (tmp_path / "logs/tiny/metrics.jsonl").read_text() == log  # with its seconds: it was not run again
    (tmp_path / "out/tiny/checkpoint/epoch_000002.pt").unlink()
    assert not finished(tmp_path / "out/tiny")
    run_all(runs, tmp_path / "out", tmp_path / "logs", jobs=2, minutes=0)

    def timeless(text):
        return re.sub(r'"[a-z_]*second[a-z_]*": [\d.e-]+', "", text)

    assert timeless((tmp_path / "logs/tiny/metrics.jsonl").read_text()) == timeless(log)
