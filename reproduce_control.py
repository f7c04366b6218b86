"""The experiment `control`: its commands, and its table and figures from the runs' logs.

Plans with DDPO, with --kl and with RWR; the closed loop with a diffusion and a Gaussian policy.
"""

import matplotlib.pyplot as plt

from control import VIEWS
from control_worlds import draw_scene
from reproduce_figures import band, interval, seeds_of, table
from run_folder import load_checkpoint

PLANS = {"ddpo": "", "kl": "--kl 0.02", "rwr": "--algorithm rwr"}
POLICIES = ("diffusion", "gaussian")
LABELS = {"ddpo": "DDPO", "kl": "DDPO, --kl 0.02", "rwr": "RWR", "diffusion": "diffusion, DDPO",
          "gaussian": "Gaussian, PPO"}


def commands(seeds):
    """{run: command}."""
    runs = {}
    for seed in range(seeds):
        for name, flags in PLANS.items():
            runs[f"plan-{name}-{seed}"] = f"control.py --seed {seed} {flags}"
        for policy in POLICIES:
            runs[f"loop-{policy}-{seed}"] = f"control_loop.py --policy {policy} --seed {seed}"
    return runs


def change(logs, metric, digits):
    """("before → after ± half of the 95 % interval over seeds", the numbers behind it)."""
    before, after = (interval(log[i][metric] for log in logs) for i in (0, -1))
    text = " → ".join(f"{mean:.{digits}f}" + f" ± {half:.{digits}f}" * (len(logs) > 1)
                      for mean, half in (before, after))
    return text, {"before": before, "after": after, "seeds": len(logs)}


def draw(runs, results, out):
    """(lines of the table, numbers), and control.png; control_plans.png where the runs are still there."""
    rows, numbers = [], {}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for name in PLANS:
        logs = [[row for row in log if "trained_success" in row]
                for log in seeds_of(runs, f"plan-{name}")]
        if not logs:
            continue
        cells = []
        for metric in [f"{view}_success" for view in VIEWS] + ["trained_length", "trained_routes"]:
            cell, numbers[f"{name} {metric}"] = change(logs, metric, 2)
            cells.append(cell)
        rows.append([f"plans: {LABELS[name]}, seeds: {len(logs)}", *cells, ""])
        for axis, metric in zip(axes, ("goals_success", "trained_routes")):
            curves = [[(row["plans"], row[metric]) for row in log] for log in logs]
            band(axis, curves, LABELS[name])
    for policy in POLICIES:
        logs = [[row for row in log if "eval_return" in row]
                for log in seeds_of(runs, f"loop-{policy}")]
        if not logs:
            continue
        cell, numbers[f"{policy} return"] = change(logs, "eval_return", 0)
        rows.append([f"Pendulum-v1: {LABELS[policy]}, seeds: {len(logs)}", "", "", "", "", "", cell])
        curves = [[(row["env_steps"] / 1000, row["eval_return"]) for row in log] for log in logs]
        band(axes[2], curves, LABELS[policy])
    titles = {"success, unseen goals": "plans sampled", "routes taken, of 4": "plans sampled",
              "return, Pendulum-v1": "steps in the task, thousands"}
    for axis, (title, label) in zip(axes, titles.items()):
        axis.set(title=title, xlabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(results / "control.png", dpi=120)
    plt.close(figure)
    if all((out / f"plan-{name}-0" / "checkpoint").exists() for name in PLANS):
        draw_plans(results, out)
    columns = ["run", "success", "unseen goals", "unseen pillars", "length", "routes of 4", "return"]
    return table(columns, rows), numbers


def draw_plans(results, out):
    """A scene of each view, before and after each kind of training, from the checkpoints."""
    folders = {name: out / f"plan-{name}-0" / "checkpoint" for name in PLANS}
    shown = {name: load_checkpoint(folder)["shown"] for name, folder in folders.items()}
    columns = {"before": shown["ddpo"][0]}
    columns |= {LABELS[name]: plans[max(plans)] for name, plans in shown.items()}
    figure, axes = plt.subplots(len(VIEWS), len(columns), figsize=(11, 8), layout="constrained")
    for column, (title, scenes) in zip(axes.T, columns.items()):
        for axis, view, scene in zip(column, VIEWS, scenes):
            draw_scene(axis, *scene)
            axis.set_ylabel({"trained": "seen strips"}.get(view, f"unseen {view}"))
        column[0].set_title(title)
    figure.savefig(results / "control_plans.png", dpi=100)
    plt.close(figure)
