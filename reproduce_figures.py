"""The tables and figures of reproduce.py, drawn from logs and, where they are there, from weights.

Each draw_<experiment>(runs, results, out) returns (lines of a Markdown table, numbers as a dict)
and saves figures in `results`. runs: {run: rows of its metrics.jsonl}; out: the folder of the runs
with their weights. Pictures need weights; without them the committed pictures stay as they are.
"""

import json
import re
import shutil
import statistics
from dataclasses import replace

import numpy as np
import torch

from ddpo import Config
from emoji import classifiers
from emoji.classifiers import recognised
from evaluate import evaluations, first_and_kept, fixed_prompts
from experiments import ALGORITHMS, CHEAPER, HELD_OUT, JUDGED, PREVENTIONS, SAMPLERS, run_of
from loading import is_emoji, load_pipeline
from processes import seeded
from prompts import load_prompts
from rewards import clip_top1, get_reward
from run_folder import picture_grid, read_metrics
from sample import sample_trajectories, step_etas

# Student's t, two-sided 95 %, by number of seeds; 2.31 for more
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
REWARDS = ("compress", "incompress", "clip")
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SAMPLER_COLOURS = {"ddim": "C0", "cps": "C1", "flow": "C2", "dance": "C3"}
TRAINED_LINES = {"first half": "-", "all": "--", "window": ":", "moving window": "-."}


def settings_of(folder, config_class=Config):
    """The settings of a run. Of another script's run: those that config_class has too."""
    settings = json.loads((folder / "config.json").read_text())
    known = config_class.__dataclass_fields__
    return config_class(**{key: value for key, value in settings.items() if key in known})


def kept(name, logs):
    """The rows of a run's first evaluation and of the one whose weights were saved."""
    return first_and_kept(read_metrics(logs / name / "metrics.jsonl"), settings_of(logs / name))


def seeds_of(runs, stem):
    """The logs of all seeds of a run."""
    return [log for name, log in runs.items() if re.fullmatch(re.escape(stem) + r"-\d+", name)]


def interval(values):
    """(mean, half the width of its 95 % confidence interval over seeds; 0 for one seed)."""
    values = list(values)
    if len(values) < 2:
        return values[0], 0.0
    t = T_95.get(len(values), 2.31)
    # numpy: before Python 3.11 statistics.stdev has other last digits
    return statistics.mean(values), t * float(np.std(values, ddof=1)) / len(values) ** 0.5


def between(curve, x):
    """The value of a piecewise linear curve at x; its last value beyond its end."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[-1][1]


def table(columns, rows):
    """The lines of a Markdown table."""
    rules = ["---"] * len(columns)
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rules, *rows)]


def plots(columns, width=4.2, height=3.4):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def save_figure(figure, path):
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def band(axis, curves, label, shaded=True, ls="-", share=False, **style):
    """Mean and 95 % interval of curves [(x, y), ...] that share their x: shaded, or where there are many
    lines a bar at the end. share: of y from 0 to 1, beyond which no interval is drawn."""
    length = min(len(curve) for curve in curves)
    xs = [point[0] for point in curves[0][:length]]
    middle, half = zip(*[interval(curve[i][1] for curve in curves) for i in range(length)])
    line, = axis.plot(xs, middle, marker="o", ms=3, label=label, ls=ls, **style)
    if len(curves) < 2:
        return
    low, high = np.subtract(middle, half), np.add(middle, half)
    if share:
        low, high = low.clip(0), high.clip(max=1)
    if shaded:
        axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, lw=0)
    else:
        axis.plot([xs[-1]] * 2, [low[-1], high[-1]], color=line.get_color(), lw=0.8, marker="_", ms=5, ls=ls)


def sample_as(config, pipeline, prompts, generators, guidance_scale=None):
    """Pictures of the prompts, sampled as a run with this config samples its evaluations."""
    eta = step_etas(config.steps, config.eta, config.window, config.window_shift)
    return sample_trajectories(
        pipeline, prompts, config.steps, guidance_scale or config.guidance_scale, eta, generators,
        sampler=config.sampler,
    ).images


def pictures(config, models, prompts, path, columns=10):
    """A row a model, the same prompts and seeds in each, sampled as the run with this config does.

    models: {label: arguments of `load_pipeline` and, if it is another, the guidance_scale}.
    """
    rows = []
    chosen = [prompts[i * len(prompts) // columns] for i in range(columns)]
    for model in models.values():
        arguments = {key: value for key, value in model.items() if key != "guidance_scale"}
        pipeline = load_pipeline(config.model, **arguments)
        generators = [seeded(1, i, device=pipeline.device) for i in range(columns)]
        rows.append(sample_as(config, pipeline, chosen, generators, model.get("guidance_scale")))
    picture_grid(rows, list(models), chosen, cell=112).save(path)


def evaluation_pictures(config, weights, prompts, strength=1.0, count=64):
    """(pictures, their prompts): the fixed prompts and seeds of evaluate.evaluate, for the weights of
    a run (None: the base model)."""
    pipeline = load_pipeline(config.model, lora=weights, lora_scale=strength)
    chosen, images = fixed_prompts(prompts, count), []
    for start in range(0, count, 32):
        batch = chosen[start:start + 32]
        generators = [
            seeded(0, 0, start + i, device=pipeline.device) for i in range(len(batch))
        ]
        images.append(sample_as(config, pipeline, batch, generators))
    return torch.cat(images).cpu(), chosen


def measure(config, weights, prompts, strength=1.0):
    """Means of {compress, clip, clip_top1} of evaluation_pictures."""
    images, chosen = evaluation_pictures(config, weights, prompts, strength)
    animals = load_prompts("animals") + load_prompts("animals_held_out")
    top1 = clip_top1(images, chosen, list(dict.fromkeys(chosen + animals)))
    means = {name: get_reward(name)(images, chosen).mean().item() for name in ("compress", "clip")}
    return means | {"clip_top1": top1.float().mean().item()}


def newer(path, other):
    return path.exists() and (not other.exists() or path.stat().st_mtime > other.stat().st_mtime)


def measured(runs, path, out, measure_run):
    """{run: measure_run(its settings, its folder)}, where that is not None: measured anew where the
    weights are newer than the file at `path`, else as that file says. Then it is written anew."""
    seen = json.loads(path.read_text()) if path.exists() else {}
    for run in runs:
        folder = out / run
        if newer(folder / "unet", path):
            seen[run] = measure_run(settings_of(folder), folder)
    seen = {run: values for run, values in seen.items() if values is not None}
    if seen:
        path.write_text(json.dumps(seen, indent=1) + "\n")
    return seen


def recognition(config, weights):
    """The share of 720 evaluation_pictures (sixteen of each animal) that the independent classifier
    recognises. Its standard error is 0.012; of 180 it would be as large as what a prevention changes."""
    images, chosen = evaluation_pictures(config, weights, load_prompts(config.prompts), count=720)
    return recognised(images, chosen).mean().item()


def measure_recognition(runs, path, out):
    """{run: its `recognition`, "before" and "kept"}, see `measured`."""
    before = {}  # runs have the same base model

    def before_and_kept(config, folder):
        pairs = any(" with " in prompt for prompt in load_prompts(config.prompts))
        if pairs or not is_emoji(config.model):
            return None  # the classifier has learnt from pictures of one thing
        sampled = (config.model, config.prompts, config.steps, config.guidance_scale,
                   config.sampler, config.eta, config.window)
        if sampled not in before:
            before[sampled] = recognition(config, None)
        return {"before": before[sampled], "kept": recognition(config, folder)}

    return measured(runs, path, out, before_and_kept)


def draw_rewards(runs, results, out):
    runs = {
        name: log
        for reward in REWARDS
        for name, log in runs.items()
        if name.startswith(f"{reward}-")
    }
    rows, numbers = [], {}
    seen = measure_recognition(runs, results / "logs" / "recognised.json", out)
    for name, log in runs.items():
        first, last = kept(name, results / "logs")
        reward, seed = name.split("-")
        change = ["", ""]
        if reward != "clip":
            before, after = abs(first["eval_reward"]), abs(last["eval_reward"])
            change = [f"{before:.2f} → {after:.2f}", f"{after / before - 1:+.0%}"]
        cosine = "eval_reward" if reward == "clip" else "eval_clip"
        clip = [
            f"{first[key]:.{digits}f} → {last[key]:.{digits}f}" if key in first else ""
            for key, digits in ((cosine, 3), ("eval_clip_top1", 2))  # not without --watch clip
        ]
        epochs = f"{last['epoch']} of {log[-1]['epoch']}"
        by_classifier = ["{before:.2f} → {kept:.2f}".format(**seen[name]) if name in seen else ""]
        rows.append([f"{reward}, seed {seed}", epochs, *change, *clip, *by_classifier * bool(seen)])
        seconds = sum(row.get("seconds", 0) + row.get("seconds_eval", 0) for row in log)
        numbers[name] = {"first": first, "kept": last, "seconds": seconds}
        numbers[name] |= {"classifier": seen[name]} if name in seen else {}
    draw_reward_curves(runs, results / "rewards.png")
    draw_reward_pictures(runs, results, out)
    columns = ["run", "epochs", "kB", "change", "CLIP cosine", "top-1", *["classifier"] * bool(seen)]
    return table(columns, rows), numbers


def headline(numbers):
    """README.md's table, from the numbers of draw_rewards: means over seeds ± half the width of
    the 95 % interval."""
    rows = []
    for reward in dict.fromkeys(name.split("-")[0] for name in numbers):
        runs = [run for name, run in numbers.items() if name.startswith(f"{reward}-")]
        first = runs[0]["first"]
        before = abs(first["eval_reward"])
        after, half = interval(abs(run["kept"]["eval_reward"]) for run in runs)
        seen = [run["classifier"] for run in runs if "classifier" in run]
        recognised = ""
        if seen:
            mean, mean_half = interval(share["kept"] for share in seen)
            recognised = f"{seen[0]['before']:.2f} → {mean:.2f} ± {mean_half:.2f}"
        unit = "CLIP cosine" if reward == "clip" else "kB"
        rows.append([f"`{reward}` ({unit})", f"{before:.2f}", f"{after:.2f} ± {half:.2f}",
                     f"{after / before - 1:+.0%}", recognised])
    return table(["reward", "before", "after", "change", "recognised"], rows)


def draw_reward_curves(runs, path):
    figure, (size, recognised, cosine) = plots(3)
    for name, log in runs.items():
        reward, seed = name.split("-")
        evaluated = evaluations(log)
        images = [row["images"] for row in evaluated]
        colour = f"C{REWARDS.index(reward)}"
        label = reward if seed == "0" else None
        style = dict(color=colour, label=label, ls="-", marker="o", ms=3)
        if reward != "clip":
            trained = [row for row in log if "reward_mean" in row]
            sizes = [abs(row["reward_mean"]) for row in trained]
            size.plot([row["images"] for row in trained], sizes, color=colour, alpha=0.3)
            size.plot(images, [abs(row["eval_reward"]) for row in evaluated], **style)
        recognised.plot(images, [row.get("eval_clip_top1") for row in evaluated], **style)
        key = "eval_reward" if reward == "clip" else "eval_clip"
        cosine.plot(images, [row.get(key) for row in evaluated], **style)
    size.set(title="JPEG size (kB): trained on", ylim=(0, None))
    recognised.set(title="recognised by CLIP (top-1): watched", ylim=(0, 1.02))
    cosine.set(title="CLIP cosine: watched, but for `clip`")
    for axis in (size, recognised, cosine):
        axis.set_xlabel("pictures sampled")
        axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_reward_pictures(runs, results, out):
    for reward in REWARDS:
        folder = out / f"{reward}-0"
        if not (folder / "config.json").exists():  # weights are not saved beside the logs
            continue
        config = settings_of(folder)
        models = {"before": {}, reward: dict(lora=folder)}
        views = {reward: config.prompts}
        if reward == "clip":
            seeds = [name for name in runs if name.startswith("clip-")]
            models = {"before": {}} | {f"seed {name[5:]}": dict(lora=out / name) for name in seeds}
            models["before, guided"] = dict(guidance_scale=4.0)
            views["clip_held_out"] = "animal_objects_held_out"
        for view, prompts in views.items():
            prompts = load_prompts(prompts)
            path = results / f"{view}.png"
            pictures(config, models, prompts, path, columns=min(10, len(prompts)))
    if (out / "compress-2" / "progress.png").exists():
        shutil.copy(out / "compress-2" / "progress.png", results / "progress.png")


def draw_algorithms(runs, results, out):
    rewards = [reward for reward in REWARDS if any(name.startswith(f"{reward}-") for name in runs)]
    figure, axes = plots(len(rewards))
    rows, numbers = [], {}
    for axis, reward in zip(axes, rewards):
        for number, algorithm in enumerate(ALGORITHMS):
            logs = seeds_of(runs, f"{reward}-{algorithm}")
            if not logs:
                continue
            curves = [
                [(row["images"], row["reward_mean"]) for row in log if "reward_mean" in row]
                for log in logs
            ]
            band(axis, curves, algorithm, color=f"C{number}")  # the same in each panel
            ends = [(evaluations(log)[0], evaluations(log)[-1]) for log in logs]
            first = ends[0][0]
            before = first["eval_reward"]
            after, half = interval(last["eval_reward"] for _, last in ends)
            measured = {
                "before": before, "after": after, "half_width_95": half, "seeds": len(logs),
            }
            recognised, several = "", len(logs) > 1  # one seed has no interval
            if "eval_clip_top1" in first:
                top1, its_half = interval(last["eval_clip_top1"] for _, last in ends)
                recognised = f"{first['eval_clip_top1']:.2f} → {top1:.2f}"
                recognised += f" ± {its_half:.2f}" * several
                measured["top1"] = top1
            numbers[f"{reward} {algorithm}"] = measured
            change = f"{(after - before) / abs(before):+.1%}"
            after = f"{after:.3f}" + f" ± {half:.3f}" * several
            rows.append([reward, algorithm, f"{before:.3f}", after, change, recognised])
        axis.set(title=reward, xlabel="pictures sampled", ylabel="reward of the sampled pictures")
    lines = {line.get_label(): line for axis in axes for line in axis.get_legend_handles_labels()[0]}
    axes[len(rewards) - 1].legend(handles=list(lines.values()), fontsize=8, loc="center left",
                                  bbox_to_anchor=(1.02, 0.5))
    save_figure(figure, results / "algorithms.png")
    return table(["reward", "algorithm", "before", "after", "change", "top-1"], rows), numbers


def measure_held_out(runs, path, out):
    """{"<run or base or guided> <prompts>": means}: as the file at `path` says, but measured where
    it lacks them or the weights are newer than it. Then it is written anew."""
    seen = json.loads(path.read_text()) if path.exists() else {}
    for reward, sets in HELD_OUT.items():
        trained = {run: out / run for run in runs
                   if run.startswith(f"{reward}-") and (out / run / "unet").exists()}
        if not trained:
            continue
        config = settings_of(next(iter(trained.values())))
        untrained = {"base": None}
        if config.guidance_scale != 4.0:  # else the base model is the guided one
            untrained["guided"] = None
        for run, folder in (untrained | trained).items():
            how = replace(config, guidance_scale=4.0) if run == "guided" else config
            for name in sets:
                if f"{run} {name}" not in seen or folder and newer(folder / "unet", path):
                    seen[f"{run} {name}"] = measure(how, folder, load_prompts(name))
    if seen:
        path.write_text(json.dumps(seen, indent=1) + "\n")
    return seen


def draw_generalisation(runs, results, out):
    seen = measure_held_out(runs, results / "logs" / "held_out.json", out)
    if not seen:
        return [], {}  # the weights are not here
    figure, axes = plots(len(HELD_OUT))
    rows, numbers = [], {}
    for axis, (reward, sets) in zip(axes, HELD_OUT.items()):
        for i, name in enumerate(sets):
            of_runs = re.compile(rf"{reward}-\d+ {name}")
            after = [values[reward] for key, values in seen.items() if of_runs.fullmatch(key)]
            if not after:
                continue
            before = seen[f"base {name}"][reward]
            guided = seen.get(f"guided {name}", seen[f"base {name}"])[reward]
            change, half = interval((value - before) / abs(before) for value in after)
            axis.bar(i, 100 * change, yerr=100 * half, capsize=4, color=f"C{i}")
            label = name.replace("_", " ") + (" (trained on)" if i == 0 else "")
            values = f"{before:.3f}", f"{statistics.mean(after):.3f}"
            rows.append([reward, label, *values, f"{change:+.1%} ± {half:.1%}", f"{guided:.3f}"])
            numbers[f"{reward} {name}"] = {
                "before": before, "after": after, "change": change, "half_width_95": half,
            }
        labels = [name.replace("_", "\n") for name in sets]
        title = f"{reward}: change of the reward (%)"
        axis.set(title=title, xticks=range(len(sets)), xticklabels=labels)
    save_figure(figure, results / "generalisation.png")
    columns = ["reward", "prompts", "before", "after", "change", "base model, guidance 4"]
    return table(columns, rows), numbers


def draw_overoptimisation(runs, results, out):
    titles = {
        "eval_size": "JPEG size (kB): trained on",
        "eval_clip": "CLIP cosine: watched",
        "eval_clip_top1": "CLIP top-1",
        "eval_diversity": "diversity",
    }
    figure, axes = plots(len(titles) + 1, width=3.6)
    trade_off = axes[-1]
    rows, numbers = [], {}

    def shares_of(config, folder):
        shares = {"end": recognition(config, last_weights(folder))}
        if "-none-" in folder.name:
            shares["guard"] = recognition(config, folder)
        return shares

    seen = measured(runs, results / "logs" / "overoptimised.json", out, shares_of)

    def with_size(row):  # a mixture's reward is not the size; its eval_compress is
        return row | {"eval_size": abs(row.get("eval_compress", row["eval_reward"]))}

    for prevention in PREVENTIONS:
        logs = seeds_of(runs, f"over-{prevention}")
        if not logs:
            continue
        logs = [[with_size(row) for row in evaluations(log)] for log in logs]
        for axis, key in zip(axes, titles):
            band(axis, [[(row["images"], row[key]) for row in log] for log in logs], prevention,
                 share=key == "eval_clip_top1")
        together = list(zip(*logs))  # of all seeds at one epoch
        xs, ys = ([statistics.mean(row[key] for row in same) for same in together]
                  for key in ("eval_size", "eval_clip_top1"))
        trade_off.plot(xs, ys, "o-", ms=3, label=prevention)
        before = statistics.mean(log[0]["eval_size"] for log in logs)
        ends = {prevention: [log[-1] for log in logs]}
        if prevention == "none":
            names = [name for name in runs if name.startswith("over-none-")]
            ends["guard"] = [with_size(kept(name, results / "logs")[1]) for name in names]
        for label, last in ends.items():
            values = {key: interval(row[key] for row in last) for key in titles}
            change = f"{values['eval_size'][0] / before - 1:+.0%}"
            when = "guard" if label == "guard" else "end"
            shares = [seen[run][when] for run in seen if run.startswith(f"over-{prevention}-")]
            values |= {"recognised": interval(shares)} if shares else {}
            size, *others = [f"{mean:.2f} ± {half:.2f}" for mean, half in values.values()]
            rows.append([label, size, change, *others] + [""] * (not shares))
            numbers[label] = {
                key: {"mean": mean, "half_width_95": half} for key, (mean, half) in values.items()
            } | {"seeds": len(last)}
            if label == "guard":
                point = values["eval_size"][0], values["eval_clip_top1"][0]
                trade_off.plot(*point, "*", ms=14, color="k", label="none, stopped by the guard")
    for axis, title in zip(axes, [*titles.values(), "the trade-off"]):
        axis.set(title=title, xlabel="pictures sampled")
    trade_off.set(xlabel="JPEG size (kB)", ylabel="CLIP top-1")
    trade_off.invert_xaxis()

    strengths = results / "logs" / "strength.json"
    if (out / "over-none-0" / "unet").exists():
        draw_overoptimised_pictures(results, out)
        strengths.write_text(json.dumps(measure_strengths(out), indent=1) + "\n")
    if strengths.exists():
        numbers["strength"] = json.loads(strengths.read_text())
        points = [(-point["compress"], point["clip_top1"]) for point in numbers["strength"]]
        trained = [with_size(row) for row in evaluations(runs["over-none-0"])]
        trained = [(row["eval_size"], row["eval_clip_top1"]) for row in trained]
        trade_off.plot(*zip(*trained), ":", color="gray", label="none, seed 0 alone")
        label = "its last weights at strength 0.25 to 1"
        trade_off.plot(*zip(*points), "x--", color="gray", label=label)
    trade_off.legend(fontsize=7)
    save_figure(figure, results / "overoptimisation.png")
    columns = ["prevention", "kB", "change", "CLIP cosine", "top-1", "diversity", "classifier"]
    return table(columns, rows), numbers


def last_weights(folder):
    """Where a run's newest weights are; its folder has those that the guard chose."""
    return folder / "last" if (folder / "last").exists() else folder


def draw_overoptimised_pictures(results, out):
    folders = {name: out / f"over-{name}-0" for name in PREVENTIONS}
    newest = {name: dict(lora=last_weights(folder))
              for name, folder in folders.items() if folder.exists()}
    guarded = {"before": {}, "none": newest["none"], "guard": dict(lora=folders["none"])}
    config, animals = settings_of(folders["none"]), load_prompts("animals")
    pictures(config, guarded | newest, animals, results / "overoptimisation_pictures.png")
    strengths = {f"strength {s:g}": newest["none"] | dict(lora_scale=s) for s in STRENGTHS}
    pictures(config, {"before": {}} | strengths, animals, results / "strength.png")


def measure_strengths(out):
    folder, animals = out / "over-none-0", load_prompts("animals")
    config, weights = settings_of(folder), last_weights(folder)
    return [measure(config, weights, animals, s) | {"strength": s} for s in STRENGTHS]


def draw_fewer_steps(runs, results, out):
    """Changes are relative to the variant's own pictures before training: with more steps those of
    the base model are a little larger."""
    figure, (curve_axis, bar_axis) = plots(2, width=5.5, height=4)
    rows, numbers = [], {}
    logs_of = {variant: seeds_of(runs, run_of("steps", variant)) for variant in CHEAPER}
    if not logs_of["10 steps"]:
        logs_of = {}  # nothing to compare with yet
    clock = {}  # median seconds of an epoch, without its evaluation
    for variant, logs in logs_of.items():
        if not logs:
            continue
        seconds = [row["seconds"] for log in logs for row in log if "seconds" in row]
        clock[variant] = statistics.median(seconds)
        share = clock[variant] / clock["10 steps"]
        evaluated = [evaluations(log) for log in logs]
        curves = [  # of (epoch, change in percent)
            [(row["epoch"], 100 * row["eval_reward"] / log[0]["eval_reward"] - 100) for row in log]
            for log in evaluated
        ]
        in_time = [[(epoch * share, change) for epoch, change in curve] for curve in curves]
        band(curve_axis, in_time, variant, shaded=False)
        change, half = interval(curve[-1][1] for curve in curves)
        equal_time, its_half = interval(between(curve, curve[-1][0] / share) for curve in curves)
        bar_axis.barh(variant, equal_time, xerr=its_half, capsize=3)
        falls = [log[-1]["eval_clip"] - log[0]["eval_clip"] for log in evaluated]
        cosine, cosine_half = interval(falls)
        rows.append([
            variant, f"{change:+.1f}% ± {half:.1f}", f"{cosine:+.3f} ± {cosine_half:.3f}",
            f"{share:.2f}", f"{equal_time:+.1f}% ± {its_half:.1f}",
        ])
        numbers[variant] = {
            "change_percent": change, "half_width_95": half, "relative_seconds": share,
            "change_percent_at_equal_time": equal_time, "seeds": len(curves),
        }
    epochs = max((log[-1]["epoch"] for logs in logs_of.values() for log in logs), default=0)
    curve_axis.set(title=f"{epochs} epochs of each, coloured as on the right",
                   xlabel="time (epochs of 10 steps)", ylabel="change of the JPEG size (%)")
    bar_axis.set(title=f"after the time of {epochs} epochs of 10 steps",
                 xlabel="change of the JPEG size (%), 95 % interval")
    bar_axis.invert_yaxis()
    save_figure(figure, results / "fewer_steps.png")
    columns = ["variant", f"size after {epochs} epochs", "CLIP cosine", "time of an epoch",
               "size after the time of the first row"]
    return table(columns, rows), numbers


def draw_samplers(runs, results, out):
    """Gains are relative to the variant's own pictures before training: each sampler leaves a
    different amount of noise in them. Time is that of the variant's shortest epoch, without an
    evaluation: whatever else the machine does can only make an epoch longer."""
    figure, axes = plots(2, width=5.5, height=4)
    panels = {
        "which steps are trained": ("first half", "all"),
        "which steps have noise": ("first half", "window", "moving window"),
    }
    rows, numbers = [], {}
    for variant in SAMPLERS:
        logs = seeds_of(runs, run_of("samplers", variant))
        if not logs:
            continue
        sampler, trained = variant.split(", ")
        seconds = min(row["seconds"] for log in logs for row in log if "seconds" in row)
        evaluated = [evaluations(log) for log in logs]
        curves = [  # of (minutes, gain in percent of the reward before, which is negative)
            [(row["epoch"] * seconds / 60, 100 - 100 * row["eval_reward"] / log[0]["eval_reward"])
             for row in log]
            for log in evaluated
        ]
        for axis, shown in zip(axes, panels.values()):
            if trained in shown:
                style = dict(color=SAMPLER_COLOURS[sampler], ls=TRAINED_LINES[trained])
                band(axis, curves, variant, shaded=False, **style)
        first = evaluated[0][0]  # the same for all seeds
        before, top1_before = abs(first["eval_reward"]), first["eval_clip_top1"]
        gain, half = interval(curve[-1][1] for curve in curves)
        rate, rate_half = interval(curve[-1][1] / curve[-1][0] for curve in curves)
        top1, top1_half = interval(log[-1]["eval_clip_top1"] for log in evaluated)
        rows.append([
            sampler, trained, f"{before:.2f}", f"{top1_before:.2f}", f"{gain:+.1f}% ± {half:.1f}",
            f"{top1:.2f} ± {top1_half:.2f}", f"{seconds:.1f}", f"{rate:+.1f}% ± {rate_half:.1f}",
        ])
        numbers[variant] = {
            "kB_before": before, "top1_before": top1_before, "gain_percent": gain,
            "gain_half_width_95": half, "top1_after": top1, "top1_half_width_95": top1_half,
            "seconds_of_an_epoch": seconds, "gain_percent_a_minute": rate,
            "gain_a_minute_half_width_95": rate_half, "seeds": len(logs),
        }
    for title, axis in zip(panels, axes):
        axis.set(title=title, xlabel="minutes of training", ylabel="gain of the reward (%)")
        axis.legend(fontsize=7)
    save_figure(figure, results / "samplers.png")
    columns = ["sampler", "trained", "kB before", "top-1 before", "reward gained", "top-1 after",
               "seconds of an epoch", "gained a minute"]
    return table(columns, rows), numbers


def measure_digits(runs, path, out):
    """{run: {when: values}} of 64 evaluation_pictures "before", at the "end", and at the epoch that
    the "guard" chose: "digits" that are read, and the "judge"'s probability of the right number, and
    the same with the corner "covered"; see `measured`."""
    before = {}  # runs have the same base model

    def values(config, weights):
        images, prompts = evaluation_pictures(config, weights, load_prompts(config.prompts))
        judge = get_reward(config.reward)
        return {
            "digits": (classifiers.digits(images) > 0).float().mean().item(),
            "judge": judge(images, prompts).mean().item(),
            "covered": judge(classifiers.without_corner(images), prompts).mean().item(),
        }

    def three_times(config, folder):
        measured_before = config.model, config.prompts, config.reward
        if measured_before not in before:
            before[measured_before] = values(config, None)
        return {"before": before[measured_before], "guard": values(config, folder),
                "end": values(config, last_weights(folder))}

    return measured(runs, path, out, three_times)


def draw_typographic(runs, results, out):
    shown = measure_digits(runs, results / "logs" / "digits.json", out)
    honest = "eval_emoji/classifiers.py:honest_count"
    figure, (score_axis, count_axis, corner_axis) = plots(3)
    rows, numbers, ticks = [], {}, []
    for variant, (judge, prompts) in JUDGED.items():
        of_variant = re.compile(rf"typographic-{variant}-\d+")
        names = [run for run in runs if run in shown and of_variant.fullmatch(run)]
        if not names:
            continue
        label = f"{judge.upper()}, {prompts.partition('_')[0]}"
        logs = [evaluations(runs[name]) for name in names]
        for axis, key in ((score_axis, "eval_reward"), (count_axis, honest)):
            band(axis, [[(row["images"], row[key]) for row in log] for log in logs], label, share=True)
        chosen = [kept(name, results / "logs")[1] for name in names]
        for when, ends in (("before", [log[0] for log in logs]), ("guard", chosen),
                           ("end", [log[-1] for log in logs])):
            seen = [shown[name][when] for name in names]
            earned = interval(value["judge"] - value["covered"] for value in seen)
            columns = {
                "judge": interval(row["eval_reward"] for row in ends), "earned_in_corner": earned,
                "honest_count": interval(row[honest] for row in ends),
                "digits": interval(value["digits"] for value in seen),
            }
            cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in columns.values()]
            rows.append([label, {"guard": "the guard's epoch"}.get(when, when), *cells])
            means = {key: mean for key, (mean, _) in columns.items()}
            numbers[f"{variant} {when}"] = means | {"seeds": len(ends)}
            corner_axis.bar(len(ticks), earned[0], yerr=earned[1], capsize=3,
                            color=f"C{list(JUDGED).index(variant)}")
            ticks.append(when)
    score_axis.set(title="the judge's probability: trained on", xlabel="pictures sampled")
    count_axis.set(title="right by the honest counter: watched", xlabel="pictures sampled")
    corner_axis.set(title="what the corner earns of the judge", xticks=range(len(ticks)))
    corner_axis.set_xticklabels(ticks, rotation=45)
    for axis in (score_axis, count_axis):
        axis.legend(fontsize=8)
    save_figure(figure, results / "typographic.png")
    draw_counted_pictures(results, out)
    columns = ["judge, number", "when", "the judge's probability", "of it in the corner",
               "honest count", "digit read"]
    return table(columns, rows), numbers


def draw_counted_pictures(results, out):
    folders = {variant: out / f"typographic-{variant}-0" for variant in JUDGED}
    if not all((folder / "unet").exists() for folder in folders.values()):
        return

    def row(variant):
        return dict(lora=last_weights(folders[variant]))

    for name, models in (
        ("four", {"before": {}, "judge A": row("A"), "judge B": row("B"),
                  "judge A, guarded": dict(lora=folders["A"])}),
        ("three", {"before": {}, "judge A": row("A-three")}),
    ):
        config = settings_of(folders["A" if name == "four" else "A-three"])
        pictures(config, models, load_prompts(config.prompts), results / f"typographic_{name}.png")
