"""What a run leaves on disk: weights that load in plain diffusers, checkpoints that survive a kill, curves and pictures.

    runs/<name>/config.json                        every setting
                metrics.jsonl                      one row an epoch; the README defines every key
                rewards.png, progress.png          the curves; the same prompts and seeds, look by look
                pytorch_lora_weights.safetensors   for pipe.load_lora_weights(folder); or unet/, the whole UNet
                checkpoint/epoch_*.pt              the last two, for --resume
"""

import json
import os
import shutil
import sys
import textwrap
from dataclasses import asdict

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError

from models import network_name
from prompts import set_names


def write_whole(path, text):
    """Under a temporary name, then renamed: a kill leaves the old file or the new one."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def save_weights(pipeline, config, folder):
    """In diffusers' own formats, so that the result loads anywhere; written aside first, then moved into place."""
    from peft import get_peft_model_state_dict

    name = network_name(pipeline)
    folder.mkdir(exist_ok=True)
    run = folder.parent if folder.name == "last" else folder
    scratch = folder / "weights.tmp"
    target = folder if config.lora_rank else folder / name
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        if config.lora_rank:
            # keys as peft has them, for every layer: of a file with two styles of keys diffusers drops one
            layers = get_peft_model_state_dict(getattr(pipeline, name))
            pipeline.save_lora_weights(scratch, **{f"{name}_lora_layers": layers})
        else:
            getattr(pipeline, name).save_pretrained(scratch)
        target.mkdir(exist_ok=True)
        for file in sorted(scratch.iterdir()):  # config.json comes before the weights
            os.replace(file, target / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{target}: weights cannot be written ({error}); the checkpoint before is intact: make room, then "
                      f"--resume {run}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_checkpoint(folder, state):
    """Under a temporary name, then renamed: there is no moment at which a kill leaves less than the checkpoint before."""
    folder.mkdir(exist_ok=True)
    path = folder / f"epoch_{state['epoch']:06d}.pt"
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        path.with_suffix(".tmp").unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error}); the checkpoint before it is intact: make room, then "
                      f"--resume {folder.parent}") from error
    for old in sorted(folder.glob("epoch_*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(folder):
    """The newest checkpoint that can be read, or None."""
    for path in sorted(folder.glob("epoch_*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a truncated zip raises whatever part of it is missed first
            print(f"{path}: damaged ({type(error).__name__}), going back to the one before", file=sys.stderr)
    return None


def read_metrics(path):
    """The rows of metrics.jsonl, without a last line that a kill may have cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_rewards(rows, config, path):
    """A panel for the trained reward and one for each thing that is watched; in each a line for every set of prompts looked at."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    views = ["eval", *(f"eval_{name}" for name in set_names(config.eval_prompts))] + ["eval_eta0"] * config.eval_deterministic
    metrics = [key.removeprefix("eval_") for key in rows[0] if key.startswith("eval_") and not key.endswith("_std")
               and not any(key.startswith(view + "_") for view in views[1:])]
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.2), squeeze=False)
    trained = [row for row in rows if "reward_mean" in row]
    axes[0, 0].plot([row["images"] for row in trained], [row["reward_mean"] for row in trained], alpha=0.5, label="sampled")
    for axis, metric in zip(axes[0], metrics):
        for view in views:
            looks = [row for row in rows if f"{view}_{metric}" in row]
            label = "fixed prompts and seeds" if view == "eval" else view.removeprefix("eval_").replace("eta0", "η = 0")
            axis.plot([row["images"] for row in looks], [row[f"{view}_{metric}"] for row in looks], "o-", label=label)
        if config.guard and f"eval_{metric}_std" in rows[0]:
            axis.axhline(rows[0][f"eval_{metric}"] - config.guard * rows[0][f"eval_{metric}_std"], color="gray", ls=":", label="guard")
        axis.set(title=f"{config.reward} (trained)" if metric == "reward" else metric, xlabel="images sampled")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def open_tracker(config, folder):
    """A function of (row, epoch), or None. Trackers are optional, so they are imported here."""
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")
        return lambda row, epoch: [writer.add_scalar(key, value, epoch) for key, value in row.items()] and writer.flush()
    if config.tracker == "wandb":
        import wandb

        run = wandb.init(project="ddpo", name=config.name, config=asdict(config), dir=str(folder))
        return lambda row, epoch: run.log(row, step=epoch)
    return None


def wrapped(label, font, width, lines):
    """The label in at most so many lines of as many letters as have room, at its average letter's width."""
    letters = int(0.95 * width * len(label) / (font.getlength(label) or 1))
    return "\n".join(textwrap.wrap(label, max(1, letters), max_lines=lines, placeholder="…"))


def picture_grid(rows, row_labels=None, column_labels=None, cell=None):
    """A PIL picture: rows is a list of (columns, 3, H, W) uint8 tensors; labels stand on the left and on top."""
    cell = cell or max(96, rows[0].shape[-1] // 2)
    font = ImageFont.load_default(size=max(12, cell // 8))
    names = [wrapped(label, font, 2 * cell, 4) for label in row_labels or []]
    titles = [wrapped(label, font, cell, 2) for label in column_labels or []]
    left = 12 + max(int(font.getlength(line)) for name in names for line in name.split("\n")) if names else 0
    top = cell // 6 * max(title.count("\n") + 1 for title in titles) if titles else 0
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (left + columns * (cell + 2), top + len(rows) * (cell + 2)), "white")
    draw = ImageDraw.Draw(grid)
    for j, title in enumerate(titles):
        draw.text((left + j * (cell + 2) + cell // 2, top // 2), title, "black", font, anchor="mm", align="center")
    for i, row in enumerate(rows):
        if names:
            draw.text((left - 6, top + i * (cell + 2) + cell // 2), names[i], "black", font, anchor="rm", align="right")
        for j, image in enumerate(row):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).resize((cell, cell), Image.Resampling.LANCZOS)
            grid.paste(picture, (left + j * (cell + 2), top + i * (cell + 2)))
    return grid


def stack_pictures(paths, out):
    strips = [Image.open(path) for path in paths]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (sheet.width - strip.width, top))
        top += strip.height
    sheet.save(out)
