"""The paper's experiments, at the scale of the machine at hand; what they show goes to results/<model>/.

    python reproduce.py rewards            before and after, for each reward: the README's table and pictures
    python reproduce.py algorithms         DDPO-IS, DDPO-SF, RWR, RWR-sparse: reward against pictures sampled
    python reproduce.py generalisation     trained animals, unseen animals, objects
    python reproduce.py overoptimisation   far past the optimum, and what each prevention does about it
    python reproduce.py fewer_steps        cheaper ways to sample and train: reward against time
    python reproduce.py --draw             all tables and pictures again, from the logs that are there

Runs are shared between experiments, go on where they were interrupted, and are not run again once finished. --jobs 2 runs two at
a time on half of the cores each, which gets more done than one on all of them; `fewer_steps` compares times, so nothing else
should run beside it. Left in results/<model>/: logs/<run>/ (config.json, metrics.jsonl) and, for each experiment, a table (.md),
its numbers (.json) and pictures. The shipped model's tables are also put into results/README.md, between its markers, and a
summary of the first into README.md.

With another --model there are `rewards` and `algorithms`, without `clip`: the shipped CLIP, which the other experiments need as a
judge or as a witness, knows icons alone.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ddpo import Config
from evaluate import first_and_kept, fixed_prompts, guard, evaluations
from prompts import load_prompts
from rewards import clip_top1, get_reward
from run_folder import picture_grid, read_metrics
from sample import is_emoji, load_pipeline, sample_trajectories
from training import seeded

HERE = Path(__file__).parent
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, two-sided 95 %, by number of seeds; 2.31 for 9
# "a cat with a guitar", without guidance: then alignment has something to improve, and a step costs half
CLIP = "--prompts pairs --guidance-scale 1 --images 128 --group-size 16"
FLAGS = {"clip": f"{CLIP} --lr 1.5e-4 --epochs 20 --eval-every 2 --eval-prompts animal_objects_held_out"}
ALGORITHMS = {"DDPO-IS": "ddpo.py", "DDPO-SF": "ddpo.py --algorithm sf", "RWR": "rwr.py", "RWR-sparse": "rwr.py --weights sparse",
              "RWR-no-reward": "rwr.py --beta 0"}  # the last: what the regression alone does, see rwr.py
HELD_OUT = {"compress": ["animals", "animals_held_out", "objects"], "clip": ["pairs", "animal_objects", "animal_objects_held_out"]}
PREVENTIONS = {  # past the optimum: --patience 99 keeps the best look within the guard and goes on beyond it
    "none": "--reward compress",
    "kl": "--reward compress --kl 0.05",
    "ema": "--reward compress --ema 0.9",
    "mixture": "--reward compress:0.5,clip:1",
}
CHEAPER = {
    "10 steps": "",
    "20 steps": "--steps 20",
    "50 steps": "--steps 50 --timestep-fraction 0.4",
    "all trained": "--train-first 1",
    "half at random": "--train-first 1 --timestep-fraction 0.5",
    "last two dropped": "--train-first 0.8 --timestep-fraction 0.625",
    "equal weights": "--train-first 1 --timestep-fraction 0.5 --step-weights equal",
    "window of 5": "--window 0:5 --train-first 1",
}


def plan(experiment, seeds):
    """{run: command} of an experiment, in the order in which they are worth having."""
    runs = {}
    if experiment == "algorithms":
        for reward, seed, (name, script) in itertools.product(("compress", "clip", "incompress"), range(seeds), ALGORITHMS.items()):
            flags = f"{CLIP} --lr {'4e-5' if 'rwr' in script else '1.5e-4'}" if reward == "clip" else "--images 64"
            runs[f"{reward}-{name}-{seed}"] = (f"{script} --reward {reward} --seed {seed} {flags} --epochs 5 --warmup 0 --guard 0 --ema 0 "
                                               "--eval-every 5")
    for seed in range(seeds):
        if experiment in ("rewards", "generalisation"):
            for reward in ("compress", "clip", "incompress") if experiment == "rewards" else HELD_OUT:
                runs[f"{reward}-{seed}"] = f"ddpo.py --reward {reward} --seed {seed} {FLAGS.get(reward, '')}"
        if experiment == "overoptimisation":
            for name, flags in PREVENTIONS.items():
                newest = "" if "ema" in flags else "--ema 0"
                runs[f"over-{name}-{seed}"] = (f"ddpo.py {flags} --seed {seed} --images 64 --lr 1.5e-4 --epochs 12 --eval-every 2 "
                                               f"--patience 99 {newest}")
        if experiment == "fewer_steps":
            for name, flags in CHEAPER.items():
                runs[f"steps-{name.replace(' ', '-')}-{seed}"] = (f"ddpo.py --reward compress --seed {seed} {flags} --images 64 --eval-images 32 "
                                                                  "--epochs 6 --guard 0 --ema 0 --eval-every 3")
    return {name: " ".join(command.split()) for name, command in runs.items()}


def settings_of(folder):
    """The Config of a run, of ddpo.py or rwr.py; the latter has some settings more."""
    settings = json.loads((folder / "config.json").read_text())
    return Config(**{key: value for key, value in settings.items() if key in Config.__dataclass_fields__})


def finished(folder):
    """A run is over at its last epoch, or where the guard has stopped it: either way its last row is a look and has a checkpoint."""
    if not (folder / "config.json").exists():
        return False
    rows = read_metrics(folder / "metrics.jsonl")
    over = rows and (rows[-1]["epoch"] == settings_of(folder).epochs or guard(rows, settings_of(folder))[1])
    return bool(over) and (folder / "checkpoint" / f"epoch_{rows[-1]['epoch']:06d}.pt").exists()


def run_all(runs, out, logs, jobs, minutes):
    """Bring every run to its end, `jobs` at a time, until the minutes are used up; copy the logs."""
    waiting = [name for name in runs if not finished(out / name)]
    deadline = time.time() + 60 * minutes if minutes else float("inf")
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    running = {}
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="runs", unit="run")
    try:
        while running or (waiting and time.time() < deadline):
            while waiting and len(running) < jobs and time.time() < deadline:
                name = waiting.pop(0)
                script, *flags = runs[name].split()
                resume = (out / name / "config.json").exists()
                command = [script, "--resume", str(out / name)] if resume else [script, *flags, "--name", name, "--out", str(out)]
                tqdm.write("python " + " ".join(command))
                log = tempfile.TemporaryFile("w+") if jobs > 1 else None  # several at once would write over each other
                running[name] = log, subprocess.Popen([sys.executable, *command], stdout=log, stderr=log,
                                                      env=os.environ | {"OMP_NUM_THREADS": threads})
            for name, (log, process) in list(running.items()):
                if process.poll() is not None:
                    if process.returncode:
                        said = log.seek(0) or log.read()[-500:] if log else ""
                        raise SystemExit(f"{name} ended with exit code {process.returncode}: python {runs[name]} {said}")
                    del running[name]
                    bar.update()
            time.sleep(0.5)
    finally:
        for _, process in running.values():
            process.terminate()
        bar.close()
        for name in runs:
            if finished(out / name):
                (logs / name).mkdir(parents=True, exist_ok=True)
                for file in ("config.json", "metrics.jsonl"):
                    shutil.copy(out / name / file, logs / name / file)
    return not waiting


def read(runs, logs):
    """{run: rows} of the runs that have logs."""
    return {name: read_metrics(logs / name / "metrics.jsonl") for name in runs if (logs / name / "metrics.jsonl").exists()}


def kept(name, logs):
    """(first look, the look whose weights were kept) of a run."""
    return first_and_kept(read_metrics(logs / name / "metrics.jsonl"), settings_of(logs / name))


def interval(values):
    """(mean, half the width of its 95 % confidence interval over seeds; 0 for one seed)."""
    values = list(values)
    if len(values) < 2:
        return values[0], 0.0
    return statistics.mean(values), T_95.get(len(values), 2.31) * statistics.stdev(values) / len(values) ** 0.5


def plots(columns, width=4.2, height=3.4):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def save_figure(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def band(axis, curves, label, shaded=True):
    """Mean and, shaded, 95 % interval of curves [(x, y), ...] that share their x."""
    length = min(len(curve) for curve in curves)
    xs = [point[0] for point in curves[0][:length]]
    middle, half = zip(*[interval(curve[i][1] for curve in curves) for i in range(length)])
    line, = axis.plot(xs, middle, "o-", ms=3, label=label)
    if shaded and len(curves) > 1:
        low, high = [m - h for m, h in zip(middle, half)], [m + h for m, h in zip(middle, half)]
        axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, lw=0)


def seeds_of(runs, stem):
    """The rows of all seeds of a run."""
    return [rows for name, rows in runs.items() if re.fullmatch(re.escape(stem) + r"-\d+", name)]


def kilobytes(row, reward, view="eval"):
    return abs(row[f"{view}_reward"]) if reward.endswith("compress") else None


def pictures(config, weights, prompts, path, columns=10):
    """A row a model, the same prompts and seeds in each, sampled as the run with this config does. weights: {label: folder,
    (folder, strength) or (folder, strength, guidance_scale)}; folder None: the base model."""
    rows = []
    chosen = [prompts[i * len(prompts) // columns] for i in range(columns)]
    for source in weights.values():
        source = source if isinstance(source, tuple) else (source,)
        folder, strength, guidance_scale = source + (1.0, config.guidance_scale)[len(source) - 1:]
        pipeline = load_pipeline(config.model, lora=folder, lora_scale=strength)
        generators = [seeded(1, i, device=pipeline.device) for i in range(columns)]
        rows.append(sample_trajectories(pipeline, chosen, config.steps, guidance_scale, generator=generators).images)
    picture_grid(rows, list(weights), chosen, cell=112).save(path)


def measure(config, folder, prompts, strength=1.0):
    """The fixed pictures of evaluate.look, for a run's weights (None: the base model): means of {compress, clip, clip_top1}."""
    chosen, pipeline = fixed_prompts(prompts, 64), load_pipeline(config.model, lora=folder, lora_scale=strength)
    candidates = list(dict.fromkeys(chosen + load_prompts("animals") + load_prompts("animals_held_out")))
    images = torch.cat([sample_trajectories(pipeline, chosen[i:i + 32], config.steps, config.guidance_scale, generator=[
        seeded(0, 0, j, device=pipeline.device) for j in range(i, i + 32)]).images for i in (0, 32)])
    means = {name: get_reward(name)(images, chosen).mean().item() for name in ("compress", "clip")}
    return means | {"clip_top1": clip_top1(images, chosen, candidates).float().mean().item()}


def draw_rewards(runs, results, out):
    lines = ["| run | epochs | kB | change | CLIP cosine | top-1 |", "| --- | --- | --- | --- | --- | --- |"]
    numbers = {}
    runs = {name: runs[name] for reward in ("compress", "incompress", "clip") for name in runs if name.startswith(f"{reward}-")}
    for name, rows in runs.items():
        first, last = kept(name, results / "logs")
        reward, seed = name.split("-")
        size = [kilobytes(look, reward) for look in (first, last)]
        clip = "eval_reward" if reward == "clip" else "eval_clip"
        change = f"{size[0]:.2f} → {size[1]:.2f} | {size[1] / size[0] - 1:+.0%}" if size[0] else " | "
        cosine = f"{first[clip]:.3f} → {last[clip]:.3f}" if clip in first else ""  # without --watch clip there is neither
        top1 = f"{first['eval_clip_top1']:.2f} → {last['eval_clip_top1']:.2f}" if "eval_clip_top1" in first else ""
        lines.append(f"| {reward}, seed {seed} | {last['epoch']} of {rows[-1]['epoch']} | {change} | {cosine} | {top1} |")
        numbers[name] = {"first": first, "kept": last, "seconds": sum(row.get("seconds", 0) + row.get("seconds_eval", 0) for row in rows)}
    figure, (size, recognised, cosine) = plots(3)
    for name, rows in runs.items():
        looks = evaluations(rows)
        images, reward = [row["images"] for row in looks], name.split("-")[0]
        colour = {"compress": "C0", "incompress": "C1", "clip": "C2"}[reward]
        style = dict(color=colour, label=reward if name.endswith("-0") else None, ls="-", marker="o", ms=3)
        if reward != "clip":
            trained = [row for row in rows if "reward_mean" in row]
            size.plot([row["images"] for row in trained], [abs(row["reward_mean"]) for row in trained], color=colour, alpha=0.3)
            size.plot(images, [abs(row["eval_reward"]) for row in looks], **style)
        recognised.plot(images, [row.get("eval_clip_top1") for row in looks], **style)
        cosine.plot(images, [row.get("eval_reward" if reward == "clip" else "eval_clip") for row in looks], **style)
    size.set(title="JPEG size (kB): trained on", ylim=(0, None))
    recognised.set(title="recognised by CLIP (top-1): watched", ylim=(0, 1.02))
    cosine.set(title="CLIP cosine: watched, but for `clip`")
    for axis in (size, recognised, cosine):
        axis.set_xlabel("pictures sampled")
        axis.legend(fontsize=8)
    save_figure(figure, results / "rewards.png")
    for reward, held_out in (("compress", ""), ("incompress", ""), ("clip", ""), ("clip", "animal_objects_held_out")):
        folder = out / f"{reward}-0"
        if (folder / "config.json").exists():  # weights are not kept beside the logs
            config = settings_of(folder)
            rows = {"before": None, reward: folder}
            if reward == "clip":
                seeds = {f"seed {name[-1]}": out / name for name in runs if name.startswith("clip-")}
                rows = {"before": None} | seeds | {"before, guided": (None, 1.0, 4.0)}
            prompts = load_prompts(held_out or config.prompts)
            path = results / f"{reward}{'_held_out' if held_out else ''}.png"
            pictures(config, rows, prompts, path, columns=min(10, len(prompts)))
    if (out / "compress-2" / "progress.png").exists():
        shutil.copy(out / "compress-2" / "progress.png", results / "progress.png")
    return lines, numbers


def draw_algorithms(runs, results, out):
    rewards = [reward for reward in ("compress", "incompress", "clip") if any(name.startswith(reward + "-") for name in runs)]
    figure, axes = plots(len(rewards))
    lines, numbers = ["| reward | algorithm | before | after | change | top-1 |", "| --- | --- | --- | --- | --- | --- |"], {}
    for axis, reward in zip(axes, rewards):
        for algorithm in ALGORITHMS:
            logs = seeds_of(runs, f"{reward}-{algorithm}")
            if not logs:
                continue
            curves = [[(row["images"], row["reward_mean"]) for row in rows if "reward_mean" in row] for rows in logs]
            band(axis, curves, algorithm)
            looks = [evaluations(rows) for rows in logs]
            first, (last, half) = looks[0][0]["eval_reward"], interval(look[-1]["eval_reward"] for look in looks)
            numbers[f"{reward} {algorithm}"] = {"before": first, "after": last, "half_width_95": half, "seeds": len(curves)}
            recognised = ""
            if "eval_clip_top1" in looks[0][0]:
                top1, its_half = interval(look[-1]["eval_clip_top1"] for look in looks)
                recognised = f"{looks[0][0]['eval_clip_top1']:.2f} → {top1:.2f} ± {its_half:.2f}"
                numbers[f"{reward} {algorithm}"]["top1"] = top1
            lines.append(f"| {reward} | {algorithm} | {first:.3f} | {last:.3f} ± {half:.3f} | {(last - first) / abs(first):+.1%} | {recognised} |")
        axis.set(title=reward, xlabel="pictures sampled", ylabel="reward of the sampled pictures")
        axis.legend(fontsize=8)
    save_figure(figure, results / "algorithms.png")
    return lines, numbers


def draw_generalisation(runs, results, out):
    """From the kept weights, where they are there, or else from the numbers that were taken of them before."""
    path = results / "logs" / "held_out.json"
    seen = json.loads(path.read_text()) if path.exists() else {}
    for reward, sets in HELD_OUT.items():
        trained = {run: out / run for run in runs if run.startswith(reward + "-") and (out / run / "unet").exists()}
        if not trained:
            continue
        config = settings_of(next(iter(trained.values())))
        # with guidance 4 the base model is the guided one
        untrained = {"base": None} if config.guidance_scale == 4.0 else {"base": None, "guided": None}
        for run, folder in (untrained | trained).items():
            for name in sets:
                if f"{run} {name}" not in seen:
                    how = replace(config, guidance_scale=4.0) if run == "guided" else config
                    seen[f"{run} {name}"] = measure(how, folder, load_prompts(name))
    path.write_text(json.dumps(seen, indent=1) + "\n")
    figure, axes = plots(len(HELD_OUT))
    lines, numbers = ["| reward | prompts | before | after | change | base model, guidance 4 |", "| --- | --- | --- | --- | --- | --- |"], {}
    for axis, (reward, sets) in zip(axes, HELD_OUT.items()):
        for i, name in enumerate(sets):
            before = seen[f"base {name}"][reward]
            after = [values[reward] for key, values in seen.items() if re.fullmatch(rf"{reward}-\d+ {name}", key)]
            if not after:
                continue
            change, half = interval((value - before) / abs(before) for value in after)
            axis.bar(i, 100 * change, yerr=100 * half, capsize=4, color=f"C{i}")
            label = f"{name.replace('_', ' ')}{' (trained on)' if i == 0 else ''}"
            guided = seen.get(f"guided {name}", seen[f"base {name}"])[reward]
            lines.append(f"| {reward} | {label} | {before:.3f} | {statistics.mean(after):.3f} | {change:+.1%} ± {half:.1%} | {guided:.3f} |")
            numbers[f"{reward} {name}"] = {"before": before, "after": after, "change": change, "half_width_95": half}
        axis.set(title=f"{reward}: change of the reward (%)", xticks=range(len(sets)), xticklabels=[name.replace("_", "\n") for name in sets])
    save_figure(figure, results / "generalisation.png")
    return lines, numbers


def draw_overoptimisation(runs, results, out):
    names = {"eval_size": "JPEG size (kB): trained on", "eval_clip": "CLIP cosine: watched", "eval_clip_top1": "recognised (top-1)",
             "eval_diversity": "diversity"}
    figure, axes = plots(len(names) + 1, width=3.6)
    lines, numbers = ["| prevention | kB | change | CLIP cosine | top-1 | diversity |", "| --- | --- | --- | --- | --- | --- |"], {}
    for prevention in PREVENTIONS:
        logs = [[row | {"eval_size": abs(row.get("eval_compress", row["eval_reward"]))} for row in evaluations(rows)]
                for rows in seeds_of(runs, f"over-{prevention}")]
        if not logs:
            continue
        for axis, key in zip(axes, names):
            band(axis, [[(row["images"], row[key]) for row in rows] for rows in logs], prevention)
        length = min(map(len, logs))
        points = [[statistics.mean(rows[i][key] for rows in logs) for i in range(length)] for key in ("eval_size", "eval_clip_top1")]
        axes[-1].plot(*points, "o-", ms=3, label=prevention)
        ends = {prevention: [rows[-1] for rows in logs]}
        if prevention == "none":
            guarded = [kept(name, results / "logs")[1] for name in runs if name.startswith("over-none-")]
            ends["guard"] = [row | {"eval_size": abs(row["eval_reward"])} for row in guarded]
        for label, rows in ends.items():
            values = {key: interval(row[key] for row in rows) for key in names}
            before = statistics.mean(rows[0]["eval_size"] for rows in logs)
            shown = [f"{values[key][0]:.2f} ± {values[key][1]:.2f}" for key in names]
            lines.append(f"| {label} | {shown[0]} | {values['eval_size'][0] / before - 1:+.0%} | {' | '.join(shown[1:])} |")
            numbers[label] = {key: {"mean": mean, "half_width_95": half} for key, (mean, half) in values.items()} | {"seeds": len(rows)}
            if label == "guard":
                axes[-1].plot(values["eval_size"][0], values["eval_clip_top1"][0], "*", ms=14, color="k", label="none, stopped by the guard")
    for axis, title in zip(axes, [*names.values(), "the trade-off"]):
        axis.set(title=title, xlabel="pictures sampled")
    axes[-1].set(xlabel="JPEG size (kB)", ylabel="recognised (top-1)")
    axes[-1].invert_xaxis()
    if (out / "over-none-0" / "unet").exists():
        folders = {name: out / f"over-{name}-0" for name in PREVENTIONS if (out / f"over-{name}-0").exists()}
        newest = {name: folder / "last" if (folder / "last").exists() else folder for name, folder in folders.items()}
        weights = {"before": None, "none": newest["none"], "guard": folders["none"]} | newest  # but for "guard", at their last epoch
        config = settings_of(out / "over-none-0")
        pictures(config, weights, load_prompts("animals"), results / "overoptimisation_pictures.png")
        strengths = {f"strength {s:g}": (newest["none"], s) for s in (0.25, 0.5, 0.75, 1.0)}
        pictures(config, {"before": None} | strengths, load_prompts("animals"), results / "strength.png")
        turned_down = [measure(config, newest["none"], load_prompts("animals"), s) | {"strength": s} for s in (0.25, 0.5, 0.75, 1.0)]
        (results / "logs" / "strength.json").write_text(json.dumps(turned_down, indent=1) + "\n")
    if (results / "logs" / "strength.json").exists():
        numbers["strength"] = turned_down = json.loads((results / "logs" / "strength.json").read_text())
        axes[-1].plot([-point["compress"] for point in turned_down], [point["clip_top1"] for point in turned_down], "x--", color="gray",
                      label="none, at strength 0.25 to 1 (seed 0)")
    axes[-1].legend(fontsize=7)
    save_figure(figure, results / "overoptimisation.png")
    return lines, numbers


def draw_fewer_steps(runs, results, out):
    """Changes are relative to the variant's own pictures before training: with more steps the base model's are a little larger."""
    figure, (curve_axis, bar_axis) = plots(2, width=5.5, height=4)
    lines, numbers = ["| variant | size after 6 epochs | CLIP cosine | time of an epoch | size after the time of the first row |",
                      "| --- | --- | --- | --- | --- |"], {}
    clock = {}  # median seconds of an epoch, without looks
    for variant in CHEAPER:
        logs = seeds_of(runs, f"steps-{variant.replace(' ', '-')}")
        if not logs:
            continue
        clock[variant] = statistics.median(row["seconds"] for rows in logs for row in rows if "seconds" in row)
        if "10 steps" not in clock:
            break  # nothing to compare with yet
        share = clock[variant] / clock["10 steps"]
        looks = [evaluations(rows) for rows in logs]
        curves = [[(row["epoch"], 100 * row["eval_reward"] / rows[0]["eval_reward"] - 100) for row in rows] for rows in looks]
        band(curve_axis, [[(epoch * share, change) for epoch, change in curve] for curve in curves], variant, shaded=False)
        change, half = interval(curve[-1][1] for curve in curves)
        at_equal_time, its_half = interval(between(curve, curve[-1][0] / share) for curve in curves)
        bar_axis.barh(variant, at_equal_time, xerr=its_half, capsize=3)
        cosine, its = interval(rows[-1]["eval_clip"] - rows[0]["eval_clip"] for rows in looks)
        lines.append(f"| {variant} | {change:+.1f}% ± {half:.1f} | {cosine:+.3f} ± {its:.3f} | {share:.2f} | {at_equal_time:+.1f}% ± {its_half:.1f} |")
        numbers[variant] = {"change_percent": change, "half_width_95": half, "relative_seconds": share,
                            "change_percent_at_equal_time": at_equal_time, "seeds": len(curves)}
    curve_axis.set(title="6 epochs of each, mean of the seeds", xlabel="time (epochs of 10 steps)", ylabel="change of the JPEG size (%)")
    bar_axis.set(title="after the time of 6 epochs of 10 steps", xlabel="change of the JPEG size (%), 95 % interval")
    bar_axis.invert_yaxis()
    curve_axis.legend(fontsize=7)
    save_figure(figure, results / "fewer_steps.png")
    return lines, numbers


def between(curve, x):
    """The value of a piecewise linear curve at x; its last value beyond its end."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[-1][1]


def headline(numbers):
    """README.md's table: the mean of the seeds of each reward ± half its 95 % interval, from draw_rewards' numbers."""
    lines = ["| reward | before | after | change | top-1 |", "| --- | --- | --- | --- | --- |"]
    for reward in dict.fromkeys(name.split("-")[0] for name in numbers):
        runs = [run for name, run in numbers.items() if name.startswith(f"{reward}-")]
        before = abs(runs[0]["first"]["eval_reward"])
        after, half = interval(abs(run["kept"]["eval_reward"]) for run in runs)
        top1, its_half = interval(run["kept"]["eval_clip_top1"] for run in runs)
        what = f"`{reward}` (CLIP cosine)" if reward == "clip" else f"`{reward}` (kB)"
        lines.append(f"| {what} | {before:.2f} | {after:.2f} ± {half:.2f} | {after / before - 1:+.0%} | "
                     f"{runs[0]['first']['eval_clip_top1']:.2f} → {top1:.2f} ± {its_half:.2f} |")
    return lines


def insert_table(page, name, lines):
    """Put a table between a page's markers, where it has them, so that none is copied by hand."""
    if page.exists():
        text = page.read_text()
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        page.write_text(marked.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text))


EXPERIMENTS = {"rewards": draw_rewards, "algorithms": draw_algorithms, "generalisation": draw_generalisation,
               "overoptimisation": draw_overoptimisation, "fewer_steps": draw_fewer_steps}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"{', '.join(EXPERIMENTS)} (default: all that there are)")
    parser.add_argument("--model", default="models/emoji")
    parser.add_argument("--flags", default="", help='for every run, such as "--preset sd15-24gb --epochs 50"')
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=0, help="start no new run after so many")
    parser.add_argument("--draw", action="store_true", help="run nothing: tables and pictures from the logs that are there")
    parser.error = lambda message: parser.exit(2, f"{message}\n")
    args = parser.parse_args(arguments)
    shipped = is_emoji(args.model)
    choices = list(EXPERIMENTS) if shipped else ["rewards", "algorithms"]
    for name in args.experiments:
        if name not in choices:
            parser.exit(2, f"experiment {name}: {'not for another --model' if name in EXPERIMENTS else 'unknown'}; choose {', '.join(choices)}\n")
    if args.seeds < 1 or args.jobs < 1 or args.minutes < 0:
        parser.exit(2, f"--seeds {args.seeds} --jobs {args.jobs} --minutes {args.minutes:g}: at least 1, 1 and 0\n")
    os.chdir(HERE)  # so that logs hold paths relative to the repository
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))  # and its runs are stopped too
    results, out = Path("results") / Path(args.model).name, Path("runs/reproduce") / Path(args.model).name
    (results / "logs").mkdir(parents=True, exist_ok=True)
    model = "" if shipped else f" --model {args.model}"
    for name in args.experiments or choices:
        runs = {run: f"{command}{model} {args.flags}".strip() for run, command in plan(name, args.seeds).items()
                if shipped or not run.startswith("clip-")}
        complete = args.draw or run_all(runs, out, results / "logs", args.jobs, args.minutes)
        logs = read(runs, results / "logs")
        if logs:
            lines, numbers = EXPERIMENTS[name](logs, results, out)
            (results / f"{name}.md").write_text("\n".join(lines) + "\n")
            (results / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
            if shipped:
                insert_table(Path("results/README.md"), name, lines)
                if name == "rewards":
                    insert_table(Path("README.md"), "headline", headline(numbers))
            print(f"{results / name}.md\n\n" + "\n".join(lines) + "\n")
        if not complete:
            print(f"{name}: {len(logs)} of {len(runs)} runs are done; the same command goes on")


if __name__ == "__main__":
    main()
