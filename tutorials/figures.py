"""Draws the tutorials' figures from what the tutorials' own code computed: each tutorial is run,
then its figures are drawn from the names in its namespace.

    python tutorials/figures.py          all
    python tutorials/figures.py 1 3      those of tutorials 1 and 3
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # Triton's interpreter, where there is no GPU; before anything imports triton

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from run_folder import picture_grid
from sample import ddim_step, decode, load_pipeline, sample_trajectories
from test_tutorials import run

FOLDER = ROOT / "tutorials" / "figures"
BLUE, ORANGE, GREEN, GREY = "#3366aa", "#dd7733", "#2a9d6f", "#b8bec6"
plt.rcParams.update({
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "legend.frameon": False,
})


def save(name):
    plt.savefig(FOLDER / name)
    plt.close()


def plane(axis, points=None, title="", limit=2.6, **style):
    """A square view of the plane, with a cloud in it."""
    if points is not None:
        style = {"s": 4, "color": BLUE, "alpha": 0.5, "linewidths": 0} | style
        axis.scatter(*points.T, **style)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title)
    axis.spines[:].set_visible(False)


def denoising_is_a_policy(n):
    latents = n["latents"].flatten(2)  # (2000, 21, 2)
    near = n["distance"] < 0.2
    paths = [(near & (n["blob"] == blob)).nonzero()[0].item() for blob in (0, 2, 4)]
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.2))
    for axis, step in zip(axes, (0, 10, 15, 18, 20)):
        plane(axis, latents[:, step], f"after {step} steps" if step else "noise", color=GREY)
        for path, colour in zip(paths, (BLUE, ORANGE, GREEN)):
            axis.plot(*latents[path, max(step - 4, 0):step + 1].T, color=colour, lw=1.8)
            point = latents[path, step]
            axis.scatter(*point, color=colour, s=60, zorder=3, edgecolors="white")
    plt.tight_layout()
    save("1_chain.png")

    step, many = 17, 300
    coefficients = n["table"][step]
    c_x, c_o, sigma, _ = coefficients
    state = 0.6 * n["centres"][1]
    x = state.view(1, 2, 1, 1).expand(many, 2, 1, 1)
    with torch.no_grad():
        output = n["net"](x, n["timesteps"][step].expand(many))
    mean = c_x * state + c_o * output[0].flatten()
    generator = torch.Generator().manual_seed(0)
    drawn, log_prob = ddim_step(output, x, coefficients, generator=generator)
    figure, axis = plt.subplots(figsize=(6.4, 5))
    points = drawn.flatten(1).T
    colours = axis.scatter(*points, c=log_prob, s=18, cmap="viridis", alpha=0.8, linewidths=0)
    for radius, line in ((1, "-"), (2, ":")):
        style = dict(fill=False, color="0.25", ls=line, lw=1.3, zorder=3)
        axis.add_patch(plt.Circle(mean.tolist(), radius * sigma.item(), **style))
    arrow = dict(arrowstyle="-|>", lw=2.2, shrinkA=0, shrinkB=0)
    axis.annotate("", mean.tolist(), state.tolist(), arrowprops=arrow, zorder=4)
    axis.scatter(*state, color="black", s=60, zorder=4)
    centre = n["centres"][1]
    axis.scatter(*centre, marker="+", s=160, color=ORANGE, lw=2.5, zorder=4)
    labels = {
        "state $x_t$": (state, (0, -20)),
        r"$\mu$": (mean, (8, 6)),
        "middle of a blob": (centre, (70, 14)),
    }
    for text, (place, shift) in labels.items():
        axis.annotate(
            text, place.tolist(), shift, textcoords="offset points", ha="center", zorder=5,
            fontsize=12, bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1),
        )
    plane(axis)
    (x, y), half = mean.tolist(), 0.85
    axis.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
    plt.colorbar(colours, label="log-probability", shrink=0.8)
    save("1_step.png")

    moments = (0, 5, 10, 15, 18, 20)
    trajectories = n["trajectories"].latents
    pictures = [decode(n["pipeline"], latents[list(moments)]) for latents in trajectories]
    titles = ["noise", *(f"{step} steps" for step in moments[1:])]
    picture_grid(pictures, n["prompts"], titles, cell=128).save(FOLDER / "1_emoji.png")


def collect_and_score(n):
    figure, axes = plt.subplots(4, 4, figsize=(7, 8))
    for row, i in zip(axes, range(0, 16, 4)):
        row[0].set_ylabel(n["prompts"][i], fontsize=13)
        order = sorted(range(i, i + 4), key=lambda j: -n["rewards"][j])
        for axis, j in zip(row, order):
            axis.imshow(n["trajectories"].images[j].permute(1, 2, 0), interpolation="lanczos")
            axis.set_title(f"{-n['rewards'][j]:.2f} kB", fontsize=11)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    plt.tight_layout()
    save("2_sizes.png")

    rewards = n["example"]
    panels = {
        "reward, −kB": rewards,
        "advantage in the batch": n["batch_advantages"](rewards),
        "advantage in the group": n["group_advantages"](rewards, 4),
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, (title, values) in zip(axes, panels.items()):
        for i, (name, colour) in enumerate((("zebra", BLUE), ("fish", ORANGE))):
            group = values[4 * i:4 * i + 4]
            coloured = ["reward" in title or value >= 0 for value in group]
            colours = [colour if is_coloured else GREY for is_coloured in coloured]
            axis.bar(range(5 * i, 5 * i + 4), group, color=colours)
            below = dict(ha="center", va="top", transform=axis.get_xaxis_transform())
            axis.text(5 * i + 1.5, -0.04, name, color=colour, **below)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=title, xticks=[])
        axis.spines["bottom"].set_visible(False)
    figure.text(0.5, -0.05, "coloured: made likelier; grey: made rarer", ha="center", color="0.35")
    save("2_advantages.png")


def update_the_policy(n):
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.3))
    for axis, batch in zip(axes, (0, 5, 10, 20, 39)):
        axis.scatter(*n["centres"].T, marker="+", s=80, color=GREY)
        ring = dict(marker="o", s=420, facecolors="none", edgecolors=ORANGE, lw=1.8)
        axis.scatter(*n["centres"][0], **ring)
        title = f"after {batch} updates" if batch else "before"
        plane(axis, n["clouds"][batch], title, limit=2.1, s=7)
    plt.tight_layout()
    save("3_cloud.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    left.plot(n["sf_curve"], color=BLUE, label="SF, one update a batch")
    left.plot(n["is_curve"], color=ORANGE, label="IS, four updates a batch")
    left.set(xlabel="batches of 512 points", title="mean reward")
    left.legend()
    fractions = n["clip_fractions"][:48]  # twelve batches
    batches = [i / 4 for i in range(len(fractions))]
    percent = [100 * value for value in fractions]
    right.bar(batches, percent, width=0.2, align="edge", color=ORANGE)
    right.set(xlabel="batches, four updates each", title="steps outside the clip range, %")
    save("3_curves.png")

    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    for dtype, colour in ((torch.bfloat16, ORANGE), (torch.float16, BLUE)):
        errors = [n["ratio_errors"](step, dtype, round_first=False) for step in range(50)]
        errors = [error.quantile(0.9).item() for error in errors]
        label = str(dtype).removeprefix("torch.")
        axis.semilogy(range(1, 51), errors, color=colour, lw=2, label=label)
    axis.axhline(1e-4, color="black", lw=1, ls="--")
    axis.text(1, 1.15e-4, "clip range", va="bottom")
    axis.set(xlabel="step", ylabel=r"$|\rho - 1|$ before any update", xlim=(0, 51))
    axis.legend()
    save("3_rounding.png")


def fuse_the_step(n):
    rows = [row for row in n["log"]["traffic"] if row["dtype"] == "float32"]
    ways = {(row["function"], row["way"]): row for row in rows}
    panels = {  # key: (title, the kernels' own, of the step and of the loss)
        "operations": ("operations", (1, 1)),
        "bytes_per_element": ("bytes an element", (20, 24)),
    }
    labels, colours = ("as commonly written", "with the table", "fused"), (GREY, BLUE, ORANGE)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4))
    for axis, (key, (title, fused)) in zip(axes, panels.items()):
        for i, function in enumerate(("step", "loss")):
            eager = [ways[function, way][key] for way in ("eager, as common", "eager, table")]
            for j, value in enumerate([*eager, fused[i]]):
                label = labels[j] if i == 0 else None
                axis.barh(4 * i + j, value, color=colours[j], label=label)
                axis.text(value, 4 * i + j, f" {value}", va="center")
        names = ["sampling step", "loss and\ngradient"]
        axis.set(title=title, yticks=[1, 5], yticklabels=names, xticks=[])
        axis.invert_yaxis()
        axis.tick_params(left=False)
        axis.spines[["left", "bottom"]].set_visible(False)
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.1))
    save("4_traffic.png")


def watch_it_hack_the_reward(n):
    rows, points, _ = n["runs"]["none"]
    widths = {"width_ratios": [1.3, 1, 1, 1, 1]}
    figure, axes = plt.subplots(1, 5, figsize=(15, 2.7), gridspec_kw=widths)
    epochs = [row["epoch"] for row in rows]
    axes[0].axvline(n["kept"]["epoch"], color="0.6", ls=":")
    axes[0].text(n["kept"]["epoch"] + 1, -2.9, "the guard\nsaves this", color="0.35", fontsize=10)
    curves = {
        "eval_reward": ("proxy", BLUE),
        "truth": ("truth", ORANGE),
        "eval_ring": ("on the ring", GREEN),
    }
    for key, (label, colour) in curves.items():
        axes[0].plot(epochs, [row[key] for row in rows], color=colour, lw=2, label=label)
    axes[0].set(xlabel="epoch", ylim=(-3.2, 4.2))
    axes[0].legend(loc=(0.66, 0.5), fontsize=10)
    circle = torch.linspace(0, 2 * torch.pi, 200)
    for axis, evaluation in zip(axes[1:], (0, 4, 7, 13)):
        axis.plot(circle.cos(), circle.sin(), color=GREEN, lw=6, alpha=0.25)
        title = f"epoch {epochs[evaluation]}" if evaluation else "before"
        plane(axis, points[evaluation][:600], title)
        axis.set(xlim=(-1.4, 5.2), ylim=(-2.2, 2.2))
    plt.tight_layout()
    save("5_goodhart.png")

    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    preventions = {
        "none": dict(label="no prevention", color="black", marker="o"),
        "kl 0.1": dict(label="KL 0.1", color="#8ecfb4", marker="o"),
        "kl 0.4": dict(label="KL 0.4", color=GREEN, marker="o"),
        "kl 1": dict(label="KL 1", color="#14513a", marker="o"),
        "ema": dict(label="average", color=BLUE, marker="s", mfc="white", ls="--", zorder=3),
    }

    def plot(rows, *marker, **style):
        points = [(row["eval_reward"], row["truth"]) for row in rows]
        axis.plot(*zip(*points), *marker, **style)

    for name, style in preventions.items():
        plot(n["runs"][name][0], **{"ms": 4.5, "lw": 1.3} | style)
    plot(n["strengths"][:2], "x", ms=10, mew=2.5, color=ORANGE, zorder=4,
         label="no prevention, at strength ¼ and ½")
    plot([n["kept"]], "*", ms=19, color="gold", mec="black", zorder=5,
         label="no prevention, at the guard")
    axis.set(xlabel="proxy (trained on)", ylabel="truth (wished for)",
             xlim=(-0.1, 2.5), ylim=(-0.75, 0.8))
    axis.legend(loc=(0.27, 0.02), fontsize=10)
    save("5_trade_off.png")

    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    folders = sorted(n["logs"].glob("compress-[0-9]"))
    for folder, colour in zip(folders, (BLUE, ORANGE, GREEN, "0.3")):
        rows, config = n["read_metrics"](folder / "metrics.jsonl"), n["settings_of"](folder)
        evaluated = [row for row in rows if "eval_reward" in row]
        size = [-row["eval_reward"] for row in evaluated]
        clip, std = evaluated[0]["eval_clip"], evaluated[0]["eval_clip_std"]
        fall = [(row["eval_clip"] - clip) / std for row in evaluated]
        axis.plot(size, fall, "o-", ms=4.5, color=colour, label=f"seed {config.seed}")
        saved = n["guard"](rows, config)[0] or evaluated[-1]["epoch"]
        kept = [row["epoch"] for row in evaluated].index(saved)
        axis.plot(size[kept], fall[kept], "*", ms=17, color=colour, mec="black", zorder=5)
    axis.axhline(-config.guard, color="black", lw=1, ls="--")
    axis.text(size[0], -config.guard, "the guard", va="bottom")
    axis.set(xlabel="JPEG size (kB)",
             ylabel="CLIP cosine, in standard\ndeviations of the base model's")
    axis.invert_xaxis()
    axis.legend(loc="center left")
    save("5_guard.png")


def bring_your_own(n):
    """The run for redness whose command the tutorial shows."""
    config = n["ddpo"].Config(
        reward=f"{n['file']}:redness", name="figure", out=n["scratch"].name, device="cpu",
        images=32, train_first=1.0, epochs=8, lr=1.2e-4, warmup=0, ema=0.0, guard=0.0, eval_every=8,
    )
    folder = n["ddpo"].train(config)
    animals = "cat", "fox", "frog", "whale", "butterfly", "turtle", "chicken", "zebra"
    prompts, rows = [f"a {animal}" for animal in animals], []
    for lora in (None, folder):
        pipeline = load_pipeline(device="cpu", lora=lora)
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        trajectories = sample_trajectories(pipeline, prompts, 10, 4.0, generator=generators)
        rows.append(trajectories.images)
    picture_grid(rows, ["before", "after"], prompts).save(FOLDER / "6_red.png")


def flow_matching(n):
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.2))
    for axis, (name, cloud) in zip(axes, n["clouds"].items()):
        plane(axis, cloud, "no noise" if name == "ode" else name)
    plt.tight_layout()
    save("7_clouds.png")


DRAW = {  # by the tutorial's number: what draws its figures
    "1": denoising_is_a_policy,
    "2": collect_and_score,
    "3": update_the_policy,
    "4": fuse_the_step,
    "5": watch_it_hack_the_reward,
    "6": bring_your_own,
    "7": flow_matching,
}

if __name__ == "__main__":
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("tutorials", nargs="*", choices=[*DRAW, "all"], default="all")
    numbers = parser.parse_args().tutorials
    os.chdir(ROOT)
    FOLDER.mkdir(exist_ok=True)
    for number in DRAW if "all" in numbers else numbers:
        path, = (ROOT / "tutorials").glob(f"{number}_*.md")
        DRAW[number](run(path))
        print(*sorted(file.name for file in FOLDER.glob(f"{number}_*.png")))
