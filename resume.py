"""An interrupted run goes on: what its checkpoint and metrics.jsonl must hold, and their way back.

Nothing in them is trusted unchecked. A file that was cut off, edited, or written by other code or
settings is refused in one line, since torch would silently broadcast a tensor of another shape.
"""

import math
import sys
from dataclasses import asdict

import torch

from run_folder import load_checkpoint, read_metrics


def restore(run):
    """Go on from the newest checkpoint of the run's folder, or begin again where there is none. Rows of
    metrics.jsonl that are later than it will be written anew. Raises ValueError, one line."""
    folder = run.folder
    rows, saved = read_metrics(folder / "metrics.jsonl"), load_checkpoint(folder / "checkpoint")
    if saved is None:
        run.later_rows = rows
        if run.rank == 0:
            print(f"{folder}: no checkpoint yet; it begins again", file=sys.stderr)
        return
    check_checkpoint(saved, run)
    check_rows(run, saved["epoch"], rows)
    run.epoch = saved.pop("epoch")
    if run.epoch > run.config.epochs:
        raise ValueError(f"--epochs {run.config.epochs}: {folder} has {run.epoch} already")
    run.updates = run.epoch * run.config.updates * run.config.inner_epochs
    run.rows, run.later_rows = rows[:run.epoch + 1], rows[run.epoch + 1:]
    with torch.no_grad():
        for p, value in zip(run.parameters, saved.pop("parameters"), strict=True):
            p.copy_(value)
        for p, value in zip(run.ema or [], saved.pop("ema") or [], strict=True):
            p.copy_(value)
    # the settings of the optimizer are those of config.json, so that they have one source
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict(saved.pop("optimizer") | {"param_groups": groups})
    run.scaler.load_state_dict(saved.pop("scaler"))
    saved.pop("prompts")
    edited = [name for name, digest in saved.pop("files").items() if digest != run.files[name]]
    if edited and run.rank == 0:
        print(f"{folder}: the file of reward {', '.join(edited)} was changed: metrics up to epoch "
              f"{run.epoch} are of the old one", file=sys.stderr)
    was, run.saved = saved.pop("config"), saved
    changed = [f"{key} {was[key]!r} -> {value!r}" for key, value in asdict(run.config).items()
               if value != was[key] and key not in ("name", "out", "device", "epochs", "patience")]
    if changed and run.rank == 0:
        print(f"{folder}: config.json was changed since the checkpoint: {', '.join(changed)}",
              file=sys.stderr)


def check_checkpoint(saved, run):
    """Raises ValueError, one line, unless the checkpoint fits the run: as many tensors, each of the
    same shape and dtype, all finite."""
    config, count = asdict(run.config), len(run.parameters)

    def refuse(problem):
        raise ValueError(f"{run.folder / 'checkpoint'}: {problem}; go on with the script and the "
                         "settings that wrote it, or begin anew with another --name")

    def kind(value):
        if isinstance(value, torch.Tensor):
            return f"{tuple(value.shape)} {value.dtype}"
        return type(value).__name__

    def check_tensors(name, tensors):
        if not isinstance(tensors, list):
            refuse(f"{name}: {kind(tensors)} instead of a list")
        if len(tensors) != count:
            refuse(f"{name}: {len(tensors)} instead of {count} tensors")
        for i, (tensor, p) in enumerate(zip(tensors, run.parameters)):
            if kind(tensor) != kind(p.data):
                refuse(f"{name}: tensor {i} is {kind(tensor)} instead of {kind(p.data)}")
            if not tensor.isfinite().all():
                refuse(f"{name}: tensor {i} is not finite")

    keys = {"epoch", "config", "prompts", "files", "parameters", "ema", "optimizer", "scaler"}
    if not isinstance(saved, dict) or not keys <= saved.keys():
        refuse("of another version of this code: it lacks "
               + ", ".join(sorted(keys - saved.keys() if isinstance(saved, dict) else keys)))
    if type(saved["epoch"]) is not int or saved["epoch"] < 0:
        refuse(f"its epoch is {saved['epoch']!r}")
    theirs = saved["config"] if isinstance(saved["config"], dict) else {}
    if differ := theirs.keys() ^ config.keys():
        refuse("of another script or another version of this code, which differ in the settings "
               + ", ".join(sorted(map(str, differ))[:4]))
    for key in ("reward", "watch", "eval_prompts"):  # metrics.jsonl has columns of these
        if theirs[key] != config[key]:
            refuse(f"of --{key.replace('_', '-')} {theirs[key]!r}, and config.json has {config[key]!r}")
    if saved["prompts"] != run.digest:
        refuse(f"of other prompts than those of --prompts {config['prompts']} and --eval-prompts "
               f"{config['eval_prompts'] or 'none'} are now")
    check_tensors("parameters", saved["parameters"])
    if (saved["ema"] is None) != (run.ema is None):
        refuse(f"--ema is {run.config.ema:g}, and it has {kind(saved['ema'])} for averaged weights")
    if run.ema:
        check_tensors("ema", saved["ema"])
    for name in saved.keys() - keys:  # what the loop has given
        if isinstance(saved[name], list):
            check_tensors(name, saved[name])
    try:
        moments = saved["optimizer"]["state"]
        if moments.keys() not in (set(), set(range(count))):  # none: fp16 has skipped every update
            refuse(f"optimizer: of {len(moments)} instead of {count} tensors")
        if isinstance(run.optimizer, torch.optim.AdamW) and moments:
            for name in ("exp_avg", "exp_avg_sq"):
                check_tensors(f"optimizer: {name}", [moments[i][name] for i in range(count)])
        for i, values in moments.items():
            if not all(torch.as_tensor(value).isfinite().all() for value in leaves(values)):
                refuse(f"optimizer: the state of tensor {i} is not finite")
        scaler = saved["scaler"]
        finite = all(map(math.isfinite, scaler.values()))
        if scaler.keys() != run.scaler.state_dict().keys() or not finite:
            refuse(f"scaler: not one of --dtype {run.config.dtype}")
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        refuse(f"optimizer or scaler: damaged ({type(error).__name__})")


def leaves(state):
    """The values of an optimizer's state: that of bitsandbytes has dicts in it."""
    for value in state.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def check_rows(run, epoch, rows):
    """Raises ValueError unless metrics.jsonl has all that the guard and the curves read."""
    path, rows = run.folder / "metrics.jsonl", rows[:epoch + 1]
    if [row["epoch"] for row in rows] != list(range(epoch + 1)):
        raise ValueError(f"{path} lacks rows before the checkpoint's epoch, {epoch}; mend "
                         "that file, or begin anew with another --name")
    evaluated = ["eval_reward", *(key for key in rows[0] if key.startswith("eval_"))]
    for row in rows:
        needed = ["images"] if row["epoch"] else ["images", "eval_reward"]
        if "eval_reward" in row:
            needed += [key for key in evaluated if row is rows[0] or not key.endswith("_std")]
        bad = [key for key in needed if row.get(key) is None]
        bad += [key for key, value in row.items() if not isinstance(value, (int, float, type(None)))]
        if bad:
            raise ValueError(f"{path}: the row of epoch {row['epoch']} lacks numbers "
                             f"({', '.join(bad[:4])}); mend it, or begin anew with another --name")
