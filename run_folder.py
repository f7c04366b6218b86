"""What a run leaves on disk: weights that load in plain diffusers, checkpoints that survive a kill
and a power cut, curves and pictures.

    runs/<name>/config.json                        every setting
                metrics.jsonl                      one row an epoch; docs/metrics.md defines every key
                rewards.png, progress.png          curves; the same prompts and seeds, by evaluation
                progress/                          the strips of progress.png, one an evaluation
                pytorch_lora_weights.safetensors   for pipe.load_lora_weights(folder); or unet/
                last/                              the newest weights, where the guard kept older ones
                checkpoint/epoch_*.pt              the last two, for --resume
                lock                               while a process writes the run
"""

import contextlib
import fcntl
import json
import math
import os
import secrets
import shlex
import shutil
import socket
import sys
import textwrap
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError

from models import first_line, network_name
from prompts import set_names

LOCKS = {}  # folder of a run that this process writes -> its open lock file
EMPTY = b" \t\r\n\0"  # what a file may be full of after a power cut


def flush(descriptor):
    """Wait until what was written is on the disk. A Mac's fsync leaves it in the disk's own memory."""
    os.fsync(descriptor)
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # network file systems have none
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def sync(path):
    """Wait until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, content):
    """Write a file such that a kill or a power cut leaves the old one or the new one, never a part.

    The order matters: the bytes are on the disk before the name points to them, and the name is on
    the disk before this returns. content: text, bytes, or a function that writes to a binary file.
    Raises OSError, one line that names the file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            flush(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({first_line(error)})") from error


def append(path, line):
    """Add a line to a file and wait until it is on the disk. Raises OSError, which names the file."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
            file.flush()
            flush(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({first_line(error)})") from error


@contextlib.contextmanager
def reserved(folder):
    """Make the folder of a run and lock it for this process, until `release` or the process's end.

    The kernel lets go of the lock when a process ends, however it ends. If the block raises, all that
    was made is removed again. Raises ValueError if another process has the lock.
    """
    folder = Path(folder).resolve()
    if folder in LOCKS:  # this process's own: a run that failed, or one that goes on
        yield
        return
    made, tries = [path for path in (folder, *folder.parents) if not path.exists()], 0
    while folder not in LOCKS:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / "lock", "a+")
        except OSError as error:
            tries += 1
            if isinstance(error, FileNotFoundError) and tries < 1000:
                continue  # another process has just removed what it had made
            raise ValueError(f"{folder}: cannot be written ({first_line(error)}); choose another "
                             "--out") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(f"{folder}: {owner} is writing this run; wait for it, or choose "
                             "another --name") from None
        except OSError as error:  # some network file systems have no locks
            print(f"{folder}: cannot be locked ({first_line(error)}); make sure that only one "
                  "process writes it", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            # a process that removed its lock after we opened it has left us a file without a name
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock")):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                LOCKS[folder] = file
    try:
        yield
    except BaseException:
        release(folder)
        for path in made:
            with contextlib.suppress(OSError):  # not empty: there is more in it than a lock
                path.rmdir()
        raise


def refuse_existing(folder):
    """Raises ValueError if there is anything in the folder that a new run could write over, or if it lies in
    the folder of another run, which may delete it."""
    found = {path.name for path in folder.iterdir() if any(path.iterdir() if path.is_dir() else [True])}
    if found & {"config.json", "metrics.jsonl", "checkpoint"}:
        raise ValueError(f"{folder}: exists already; go on with --resume {shlex.quote(str(folder))}, or "
                         "choose another --name")
    if others := sorted(found - {"lock", "config.json.tmp"}):
        raise ValueError(f"{folder}: has {', '.join(others[:3])} in it, which a new run could write over; "
                         "choose another --name")
    for parent in folder.resolve().parents:
        if (parent / "config.json").exists() and (parent / "metrics.jsonl").exists():
            raise ValueError(f"{folder}: lies in the folder of another run; choose another --out or --name")


def release(folder):
    """Let another process write the run."""
    folder = Path(folder).resolve()
    if folder in LOCKS:
        (folder / "lock").unlink(missing_ok=True)
        LOCKS.pop(folder).close()


def save_weights(pipeline, config, folder):
    """In diffusers' own formats, so that the result loads anywhere; written aside first, then moved
    into place."""
    from peft import get_peft_model_state_dict

    name = network_name(pipeline)
    folder.mkdir(exist_ok=True)
    run = folder.parent if folder.name == "last" else folder
    scratch = folder / "weights.tmp"
    target = folder if config.lora_rank else folder / name
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        if config.lora_rank:
            # keys as peft has them, for every layer: of two styles in one file diffusers drops one
            layers = get_peft_model_state_dict(getattr(pipeline, name))
            # safetensors takes no convolution in channels_last, which a GPU and --compile have
            layers = {key: value.contiguous() for key, value in layers.items()}
            pipeline.save_lora_weights(scratch, **{f"{name}_lora_layers": layers})
        else:
            getattr(pipeline, name).save_pretrained(scratch)
        target.mkdir(exist_ok=True)
        for file in sorted(scratch.iterdir()):  # config.json comes before the weights
            sync(file)
            os.replace(file, target / file.name)
        sync(target), sync(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{target}: weights cannot be written ({error}); the previous checkpoint is "
                      f"intact: make room, then --resume {shlex.quote(str(run))}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_checkpoint(folder, state):
    """At no moment would a kill or a power cut leave less than the previous checkpoint."""
    folder.mkdir(exist_ok=True)
    sync(folder.parent)
    path = folder / f"epoch_{state['epoch']:06d}.pt"
    try:
        write_whole(path, lambda file: torch.save(state, file))
    except OSError as error:
        raise OSError(f"{error}; the previous checkpoint is intact: make room, then --resume "
                      f"{shlex.quote(str(folder.parent))}") from error
    for old in sorted(folder.glob("epoch_*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(folder):
    """The newest checkpoint that is whole, or None where there is none.

    A damaged one is passed over, with a line, for the one before. Raises ValueError if there are
    some and none can be read: to begin again would overwrite the run that they are of.
    """
    folder = Path(folder)
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read ({first_line(error)}); make it readable") from None
    paths = [folder / name for name in names if name.startswith("epoch_") and name.endswith(".pt")]
    for path in paths:
        try:
            file = open(path, "rb")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({first_line(error)}); make it readable, or move "
                             "it away to go on from the one before") from None
        with file:
            try:
                with zipfile.ZipFile(file) as archive:  # torch.load ignores the checksums in it
                    if wrong := archive.testzip():
                        raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged zip raises whatever part of it is missed first
                print(f"{path}: damaged ({type(error).__name__}), going back to the one before",
                      file=sys.stderr)
    if paths:
        raise ValueError(f"{paths[0]}: damaged, and no other can be read; bring back a copy of "
                         f"{folder}, or begin anew with another --name")
    return None


def read_config(folder):
    """The settings of a run, a dict. Where config.json is empty or missing, they are those of the
    newest checkpoint. Raises ValueError, one line."""
    path = Path(folder) / "config.json"
    state, cure = "missing", "give the folder of a run, such as runs/compress"
    if path.exists():
        state, cure = "empty", "without a checkpoint nothing is lost: delete the folder"
        try:
            content = path.read_bytes()
            settings = json.loads(content) if content.strip(EMPTY) else None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({first_line(error)}); make it readable") from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({first_line(error)}); mend it, or delete it, since "
                             "the checkpoint has the settings, too") from None
        if content.strip(EMPTY):
            if not isinstance(settings, dict):
                raise ValueError(f"{path}: not settings but of type {type(settings).__name__}; mend "
                                 "it, or delete it, since the checkpoint has the settings, too")
            return settings
    saved = load_checkpoint(path.parent / "checkpoint")
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise ValueError(f"{path}: {state}; {cure}")
    print(f"{path}: {state}; the settings are those of the checkpoint", file=sys.stderr)
    return saved["config"]


def row_line(row):
    """A row of metrics.jsonl. The gradient's norm is infinite where fp16 overflows; JSON has no infinity."""
    return json.dumps({key: value if value is None or math.isfinite(value) else None
                       for key, value in row.items()})


def read_metrics(path):
    """The rows of metrics.jsonl, a list by epoch. The last row of an epoch counts; a last line that a
    kill has cut off does not. Raises ValueError for any other line that is not a row."""
    path, rows = Path(path), {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip(EMPTY):
            continue
        try:
            row = json.loads(line)
            if type(row["epoch"]) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise ValueError(f"{path} lacks rows: line {number} is damaged; mend it, or begin anew "
                             "with another --name") from None
        rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def plot_rewards(rows, config, path):
    """A panel for the trained reward and one for each watched metric; in each a line for every set of
    prompts that is evaluated."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    views = ["eval", *(f"eval_{name}" for name in set_names(config.eval_prompts))]
    views += ["eval_eta0"] * config.eval_deterministic
    metrics = [key.removeprefix("eval_") for key in rows[0]
               if key.startswith("eval_") and not key.endswith("_std")
               and not any(key.startswith(view + "_") for view in views[1:])]
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.2 * len(metrics), 3.2), squeeze=False)
    trained = [row for row in rows if "reward_mean" in row]
    axes[0, 0].plot([row["images"] for row in trained], [row["reward_mean"] for row in trained],
                    alpha=0.5, label="sampled")
    for axis, metric in zip(axes[0], metrics):
        for view in views:
            evaluated = [row for row in rows if f"{view}_{metric}" in row]
            label = view.removeprefix("eval_").replace("eta0", "η = 0")
            axis.plot([row["images"] for row in evaluated],
                      [row[f"{view}_{metric}"] for row in evaluated], "o-",
                      label="fixed prompts and seeds" if view == "eval" else label)
        if config.guard and f"eval_{metric}_std" in rows[0]:
            floor = rows[0][f"eval_{metric}"] - config.guard * rows[0][f"eval_{metric}_std"]
            axis.axhline(floor, color="gray", ls=":", label="guard")
        axis.set(title=f"{config.reward} (trained)" if metric == "reward" else metric,
                 xlabel="images sampled")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    count = len(metrics)  # fixed margins: tight_layout draws everything twice, after each epoch
    figure.subplots_adjust(left=0.2 / count, right=1 - 0.06 / count, bottom=0.16, top=0.9, wspace=0.28)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
    plt.close(figure)


def open_tracker(config, folder):
    """A function of (row, epoch), or None. Trackers are optional, so they are imported here."""
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")

        def track(row, epoch):
            for key, value in row.items():
                writer.add_scalar(key, value, epoch)
            writer.flush()

        return track
    if config.tracker == "wandb":
        import wandb

        mark = folder / "wandb_id"  # so that a run that is resumed goes on there, too
        if not mark.exists():
            write_whole(mark, secrets.token_hex(4))
        run = wandb.init(project="ddpo", name=config.name, config=asdict(config), dir=str(folder),
                         id=mark.read_text(), resume="allow")
        return lambda row, epoch: run.log(row, step=epoch)
    return None


def wrapped(label, font, width, lines):
    """The label in at most so many lines, each of as many letters as fit into the width, at their
    average width."""
    letters = int(0.95 * width * len(label) / (font.getlength(label) or 1))
    return "\n".join(textwrap.wrap(label, max(1, letters), max_lines=lines, placeholder="…"))


def picture_grid(rows, row_labels=None, column_labels=None, cell=None):
    """A PIL picture: rows is a list of (columns, 3, H, W) uint8 tensors; labels stand on the left and
    on top."""
    cell = cell or max(96, rows[0].shape[-1] // 2)
    font = ImageFont.load_default(size=max(12, cell // 8))
    names = [wrapped(label, font, 2 * cell, 4) for label in row_labels or []]
    titles = [wrapped(label, font, cell, 2) for label in column_labels or []]
    widths = [int(font.getlength(line)) for name in names for line in name.split("\n")]
    left = 12 + max(widths) if names else 0
    top = cell // 6 * max(title.count("\n") + 1 for title in titles) if titles else 0
    columns, step = max(len(row) for row in rows), cell + 2
    grid = Image.new("RGB", (left + columns * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(grid)
    for j, title in enumerate(titles):
        place = left + j * step + cell // 2, top // 2
        draw.text(place, title, "black", font, anchor="mm", align="center")
    for i, row in enumerate(rows):
        if names:
            place = left - 6, top + i * step + cell // 2
            draw.text(place, names[i], "black", font, anchor="rm", align="right")
        for j, image in enumerate(row):
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            picture = picture.resize((cell, cell), Image.Resampling.LANCZOS)
            grid.paste(picture, (left + j * step, top + i * step))
    return grid


def save_picture(picture, path):
    write_whole(path, lambda file: picture.save(file, "PNG"))


def draw_progress(folder, epoch, most=20):
    """progress.png: a strip for each evaluation up to this epoch; where there are more than `most`,
    evenly chosen ones, with the first and the last."""
    paths = sorted((folder / "progress").glob("*.png"))
    paths = [path for path in paths if path.stem.isdecimal() and int(path.stem) <= epoch]
    if len(paths) > most:
        paths = [paths[i * (len(paths) - 1) // (most - 1)] for i in range(most)]
    strips = []
    for path in paths:
        try:
            with Image.open(path) as strip:
                strips.append(strip.convert("RGB"))
        except Exception as error:  # Pillow raises many kinds for a picture that is damaged
            print(f"{path}: not a picture ({type(error).__name__}); left out of progress.png",
                  file=sys.stderr)
    width, height = max(strip.width for strip in strips), sum(strip.height for strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (sheet.width - strip.width, top))
        top += strip.height
    save_picture(sheet, folder / "progress.png")
