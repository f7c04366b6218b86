"""Draws the tutorials' figures, from what the tutorials' own code computed: each is run, then drawn from its names.

    python tutorials/figures.py          all
    python tutorials/figures.py 1 3      those of tutorials 1 and 3
"""

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
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12, "figure.dpi": 150,
                     "savefig.bbox": "tight", "legend.frameon": False})


def save(name):
    plt.savefig(FOLDER / name)
    plt.close()


def plane(axis, points=None, title="", limit=2.6, **style):
    """A square view of the plane, with a cloud in it."""
    if points is not None:
        axis.scatter(*points.T, **{"s": 4, "color": BLUE, "alpha": 0.5, "linewidths": 0} | style)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title)
    axis.spines[:].set_visible(False)


def denoising_is_a_policy(n):
    latents = n["latents"].flatten(2)  # (2000, 21, 2)
    paths = [((n["distance"] < 0.2) & (n["blob"] == blob)).nonzero()[0].item() for blob in (0, 2, 4)]
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.2))
    for axis, step in zip(axes, (0, 10, 15, 18, 20)):
        plane(axis, latents[:, step], f"after {step} steps" if step else "noise", color=GREY)
        for path, colour in zip(paths, (BLUE, ORANGE, GREEN)):
            axis.plot(*latents[path, max(step - 4, 0):step + 1].T, color=colour, lw=1.8)
            axis.scatter(*latents[path, step], color=colour, s=60, zorder=3, edgecolors="white")
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
    drawn, log_prob = ddim_step(output, x, coefficients, generator=torch.Generator().manual_seed(0))
    figure, axis = plt.subplots(figsize=(6.4, 5))
    colours = axis.scatter(*drawn.flatten(1).T, c=log_prob, s=18, cmap="viridis", alpha=0.8, linewidths=0)
    for radius, line in ((1, "-"), (2, ":")):
        axis.add_patch(plt.Circle(mean.tolist(), radius * sigma.item(), fill=False, color="0.25", ls=line, lw=1.3, zorder=3))
    axis.annotate("", mean.tolist(), state.tolist(), arrowprops=dict(arrowstyle="-|>", lw=2.2, shrinkA=0, shrinkB=0), zorder=4)
    axis.scatter(*state, color="black", s=60, zorder=4)
    axis.scatter(*n["centres"][1], marker="+", s=160, color=ORANGE, lw=2.5, zorder=4)
    for text, place, shift in (("state $x_t$", state, (0, -20)), (r"$\mu$", mean, (8, 6)), ("middle of a blob", n["centres"][1], (70, 14))):
        axis.annotate(text, place.tolist(), shift, textcoords="offset points", ha="center", zorder=5, fontsize=12,
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1))
    plane(axis)
    (x, y), half = mean.tolist(), 0.85
    axis.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
    plt.colorbar(colours, label="log-probability", shrink=0.8)
    save("1_step.png")

    moments = (0, 5, 10, 15, 18, 20)
    trajectories = n["trajectories"].latents
    pictures = [decode(n["pipeline"], trajectories[i, list(moments)]) for i in range(len(trajectories))]
    picture_grid(pictures, n["prompts"], ["noise", *(f"{step} steps" for step in moments[1:])], cell=128).save(FOLDER / "1_emoji.png")


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
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, title, values in zip(axes, ("reward, −kB", "advantage in the batch", "advantage in the group"),
                                   (rewards, n["batch_advantages"](rewards), n["group_advantages"](rewards, 4))):
        for i, (name, colour) in enumerate((("zebra", BLUE), ("fish", ORANGE))):
            own = values[4 * i:4 * i + 4]
            axis.bar(range(5 * i, 5 * i + 4), own, color=[colour if value >= 0 or "reward" in title else GREY for value in own])
            axis.text(5 * i + 1.5, -0.04, name, color=colour, ha="center", va="top", transform=axis.get_xaxis_transform())
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=title, xticks=[])
        axis.spines["bottom"].set_visible(False)
    figure.text(0.5, -0.05, "coloured: made likelier; grey: made rarer", ha="center", color="0.35")
    save("2_advantages.png")


def update_the_policy(n):
    figure, axes = plt.subplots(1, 5, figsize=(15, 3.3))
    for axis, batch in zip(axes, (0, 5, 10, 20, 39)):
        axis.scatter(*n["centres"].T, marker="+", s=80, color=GREY)
        axis.scatter(*n["centres"][0], marker="o", s=420, facecolors="none", edgecolors=ORANGE, lw=1.8)
        plane(axis, n["clouds"][batch], f"after {batch} updates" if batch else "before", limit=2.1, s=7)
    plt.tight_layout()
    save("3_cloud.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    left.plot(n["sf_curve"], color=BLUE, label="SF, one update a batch")
    left.plot(n["is_curve"], color=ORANGE, label="IS, four updates a batch")
    left.set(xlabel="batches of 512 points", title="mean reward")
    left.legend()
    fractions = n["clip_fractions"][:48]  # twelve batches
    right.bar([i / 4 for i in range(len(fractions))], [100 * value for value in fractions], width=0.2, align="edge", color=ORANGE)
    right.set(xlabel="batches, four updates each", title="steps outside the clip range, %")
    save("3_curves.png")

    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    for dtype, colour in ((torch.bfloat16, ORANGE), (torch.float16, BLUE)):
        errors = [n["ratio_errors"](step, dtype, round_first=False).quantile(0.9).item() for step in range(50)]
        axis.semilogy(range(1, 51), errors, color=colour, lw=2, label=str(dtype).removeprefix("torch."))
    axis.axhline(1e-4, color="black", lw=1, ls="--")
    axis.text(1, 1.15e-4, "clip range", va="bottom")
    axis.set(xlabel="step", ylabel=r"$|\rho - 1|$ before any update", xlim=(0, 51))
    axis.legend()
    save("3_rounding.png")


def fuse_the_step(n):
    ways = {(row["function"], row["way"]): row for row in n["log"]["traffic"] if row["dtype"] == "float32"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4))
    for axis, key, title, fused in zip(axes, ("operations", "bytes_per_element"), ("operations", "bytes an element"), ((1, 1), (20, 24))):
        for i, function in enumerate(("step", "loss")):
            values = [ways[function, "eager, as common"][key], ways[function, "eager, table"][key], fused[i]]
            for j, (value, colour) in enumerate(zip(values, (GREY, BLUE, ORANGE))):
                axis.barh(4 * i + j, value, color=colour, label=("as commonly written", "with the table", "fused")[j] if i == 0 else None)
                axis.text(value, 4 * i + j, f" {value}", va="center")
        axis.set(title=title, yticks=[1, 5], yticklabels=["sampling step", "loss and\ngradient"], xticks=[])
        axis.invert_yaxis()
        axis.tick_params(left=False)
        axis.spines[["left", "bottom"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.1))
    save("4_traffic.png")


def watch_it_hack_the_reward(n):
    rows, points, _ = n["runs"]["none"]
    figure, axes = plt.subplots(1, 5, figsize=(15, 2.7), gridspec_kw={"width_ratios": [1.3, 1, 1, 1, 1]})
    epochs = [row["epoch"] for row in rows]
    axes[0].axvline(n["kept"]["epoch"], color="0.6", ls=":")
    axes[0].text(n["kept"]["epoch"] + 1, -2.9, "the guard\nkeeps this", color="0.35", fontsize=10)
    for key, label, colour in (("eval_reward", "proxy", BLUE), ("truth", "truth", ORANGE), ("eval_ring", "on the ring", GREEN)):
        axes[0].plot(epochs, [row[key] for row in rows], color=colour, lw=2, label=label)
    axes[0].set(xlabel="epoch", ylim=(-3.2, 4.2))
    axes[0].legend(loc=(0.66, 0.5), fontsize=10)
    circle = torch.linspace(0, 2 * torch.pi, 200)
    for axis, look in zip(axes[1:], (0, 4, 7, 13)):
        axis.plot(circle.cos(), circle.sin(), color=GREEN, lw=6, alpha=0.25)
        plane(axis, points[look][:600], f"epoch {epochs[look]}" if look else "before")
        axis.set(xlim=(-1.4, 5.2), ylim=(-2.2, 2.2))
    plt.tight_layout()
    save("5_goodhart.png")

    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for name, label, style in (("none", "no brake", dict(color="black", marker="o")), ("kl 0.1", "KL 0.1", dict(color="#8ecfb4", marker="o")),
                               ("kl 0.4", "KL 0.4", dict(color=GREEN, marker="o")), ("kl 1", "KL 1", dict(color="#14513a", marker="o")),
                               ("ema", "average", dict(color=BLUE, marker="s", mfc="white", ls="--", zorder=3))):
        axis.plot(*zip(*[(row["eval_reward"], row["truth"]) for row in n["runs"][name][0]]), **{"ms": 4.5, "lw": 1.3, "label": label} | style)
    axis.plot(*zip(*[(row["eval_reward"], row["truth"]) for row in n["strengths"][:2]]), "x", ms=10, mew=2.5, color=ORANGE, zorder=4,
              label="no brake, at strength ¼ and ½")
    axis.plot(n["kept"]["eval_reward"], n["kept"]["truth"], "*", ms=19, color="gold", mec="black", zorder=5, label="no brake, at the guard")
    axis.set(xlabel="proxy (trained on)", ylabel="truth (wished for)", xlim=(-0.1, 2.5), ylim=(-0.75, 0.8))
    axis.legend(loc=(0.27, 0.02), fontsize=10)
    save("5_trade_off.png")

    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    for folder, colour in zip(sorted(n["logs"].glob("compress-[0-9]")), (BLUE, ORANGE, GREEN, "0.3")):
        rows, config = n["read_metrics"](folder / "metrics.jsonl"), n["settings_of"](folder)
        looks = [row for row in rows if "eval_reward" in row]
        size = [-row["eval_reward"] for row in looks]
        fall = [(row["eval_clip"] - looks[0]["eval_clip"]) / looks[0]["eval_clip_std"] for row in looks]
        axis.plot(size, fall, "o-", ms=4.5, color=colour, label=f"seed {config.seed}")
        kept = [row["epoch"] for row in looks].index(n["guard"](rows, config)[0] or looks[-1]["epoch"])
        axis.plot(size[kept], fall[kept], "*", ms=17, color=colour, mec="black", zorder=5)
    axis.axhline(-config.guard, color="black", lw=1, ls="--")
    axis.text(size[0], -config.guard, "the guard", va="bottom")
    axis.set(xlabel="JPEG size (kB)", ylabel="CLIP cosine, in standard\ndeviations of the base model's")
    axis.invert_xaxis()
    axis.legend(loc="lower left")
    save("5_guard.png")


def bring_your_own(n):
    """The run for redness whose command the tutorial shows."""
    settings = dict(images=32, train_first=1.0, epochs=8, lr=1.2e-4, warmup=0, ema=0.0, guard=0.0, eval_every=8)
    folder = n["ddpo"].train(n["ddpo"].Config(reward=f"{n['file']}:redness", name="figure", out=n["scratch"].name, device="cpu", **settings))
    prompts, rows = ["a cat", "a fox", "a frog", "a whale", "a butterfly", "a turtle", "a chicken", "a zebra"], []
    for lora in (None, folder):
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        rows.append(sample_trajectories(load_pipeline(device="cpu", lora=lora), prompts, 10, 4.0, generator=generators).images)
    picture_grid(rows, ["before", "after"], prompts).save(FOLDER / "6_red.png")


DRAW = {"1": denoising_is_a_policy, "2": collect_and_score, "3": update_the_policy, "4": fuse_the_step,
        "5": watch_it_hack_the_reward, "6": bring_your_own}  # a tutorial's number -> from its names

if __name__ == "__main__":
    os.chdir(ROOT)
    FOLDER.mkdir(exist_ok=True)
    for number in sys.argv[1:] or DRAW:
        path, = (ROOT / "tutorials").glob(f"{number}_*.md")
        DRAW[number](run(path))
        print(*sorted(file.name for file in FOLDER.glob(f"{number}_*.png")))
