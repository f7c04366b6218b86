"""Runs the experiments that this repository reports, and writes what they show into results/.

    python reproduce.py main            the README's table, picture and curves (emoji model, about 25 minutes on two CPU cores)
    python reproduce.py main --draw     only the table and pictures again, from the logs that are there

A run that was interrupted goes on where it stopped, one that is finished is not run again. What an experiment leaves in
results/<model>/<experiment>/: each run's config.json and metrics.jsonl, a table (table.md) and pictures.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from training import seeded
from prompts import load_prompts
from run_folder import read_metrics
from sample import load_pipeline, picture_grid, sample_trajectories

HERE = Path(__file__).parent
MAIN = {  # run: flags of ddpo.py beside the defaults
    "compress-seed-0": "--reward compress --seed 0",
    "compress-seed-1": "--reward compress --seed 1",
    "compress-seed-2": "--reward compress --seed 2",
    "incompress": "--reward incompress",
    "clip": "--reward clip --prompts animal_objects --watch compress",
}


def finish(name, flags, out):
    """Run ddpo.py to its end, from wherever it is."""
    folder = out / name
    if (folder / "config.json").exists():
        epochs = json.loads((folder / "config.json").read_text())["epochs"]
        rows = read_metrics(folder / "metrics.jsonl")
        if rows and rows[-1]["epoch"] == epochs:
            return
        command = ["--resume", str(folder)]
    else:
        command = [*flags.split(), "--name", name, "--out", str(out)]
    print(f"python ddpo.py {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "ddpo.py", *command], check=True)


def looks(rows, key):
    """(images sampled, value) of the rows that looked at fixed prompts and seeds."""
    return zip(*[(row["images"], row[key]) for row in rows if key in row])


def table(logs):
    """Markdown: first and last look of every run."""
    lines = ["| run | kB | change | CLIP cosine | top-1 |", "| --- | --- | --- | --- | --- |"]
    for name, rows in logs.items():
        first, last = rows[0], rows[-1]
        sizes = [abs(row["eval_reward"] if "compress" in name else row["eval_compress"]) for row in (first, last)]
        cosines = [row["eval_reward"] if name == "clip" else row["eval_clip"] for row in (first, last)]
        top1 = f"{first['eval_clip_top1']:.2f} → {last['eval_clip_top1']:.2f}"
        lines.append(f"| `{MAIN[name]}` | {sizes[0]:.2f} → {sizes[1]:.2f} | {sizes[1] / sizes[0] - 1:+.0%} | "
                     f"{cosines[0]:.3f} → {cosines[1]:.3f} | {top1} |")
    return "\n".join(lines) + "\n"


def draw_curves(logs, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for name, rows in logs.items():
        size, recognised, cosine = axes
        if name != "clip":
            trained = [(row["images"], abs(row["reward_mean"])) for row in rows if "reward_mean" in row]
            line, = size.plot(*zip(*trained), alpha=0.35)
            size.plot(*[np.abs(values) for values in looks(rows, "eval_reward")], "o-", color=line.get_color(), label=name)
            recognised.plot(*looks(rows, "eval_clip_top1"), "o-", color=line.get_color(), label=name)
        cosine.plot(*looks(rows, "eval_reward" if name == "clip" else "eval_clip"), "o-", label=name)
    size.set(title="JPEG size (kB): trained on", xlabel="images sampled", ylim=(0, None))
    recognised.set(title="recognised by CLIP (top-1): watched", xlabel="images sampled", ylim=(0, 1))
    cosine.set(title="CLIP cosine: watched, but for `clip`", xlabel="images sampled")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_before_and_after(runs, path, prompts, columns=10):
    """One row a model, the same prompts and seeds in each; `runs`: label -> run folder, or None for the base model."""
    rows = []
    for folder in runs.values():
        pipeline = load_pipeline(lora=folder)
        generators = [seeded(1, i, device=pipeline.device) for i in range(columns)]
        rows.append(sample_trajectories(pipeline, prompts[:columns], 20, 4.0, generator=generators).images)
    picture_grid(rows, list(runs), prompts[:columns], cell=112).save(path)


def main_experiment(out, folder, draw_only):
    if not draw_only:
        for name, flags in MAIN.items():
            finish(name, flags, out)
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in ("config.json", "metrics.jsonl", "progress.png"):
                shutil.copy(out / name / file, folder / name / file)
    logs = {name: read_metrics(folder / name / "metrics.jsonl") for name in MAIN if (folder / name).exists()}
    (folder / "table.md").write_text(table(logs))
    print((folder / "table.md").read_text())
    draw_curves(logs, folder / "curves.png")
    animals, pairs = load_prompts("animals"), load_prompts("animal_objects")
    for label, run, prompts in (("compress", "compress-seed-0", animals), ("incompress", "incompress", animals), ("clip", "clip", pairs)):
        if (out / run / "unet").exists():  # the weights are not kept beside the logs
            draw_before_and_after({"before": None, label: out / run}, folder / f"{label}.png", prompts[:: len(prompts) // 10])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["main"])
    parser.add_argument("--draw", action="store_true", help="only the table and the curves, from the logs in results/")
    args = parser.parse_args()
    os.chdir(HERE)  # so that logs hold paths relative to the repository
    results = Path("results/emoji") / args.experiment
    results.mkdir(parents=True, exist_ok=True)
    main_experiment(Path("runs") / args.experiment, results, args.draw)
