"""A small diffusion policy for latents that are not pictures: what both control loops share.

The network and its pretraining, the denoising chain, and a run's folder and command line.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import models  # noqa: F401  first: it quiets diffusers

import torch
from diffusers import DDIMScheduler
from torch import nn
from tqdm import tqdm

from processes import RunStopped
from run_folder import (append, load_checkpoint, read_metrics, refuse_existing, reserved, row_line,
                        save_checkpoint, write_whole)
from sample import ddim_step, noised
from settings import (above_zero, at_least, check_folder, check_sizes, flags_given, refuse,
                      resumed_config)


# The first number of an evaluation's keys, which no --seed is: to numpy (1, 0) and (1, 0, 0) are one key.
EVALUATION = 2**63


class Denoiser(nn.Module):
    """Predicts v from latents (B, *shape), timesteps (B,) and a condition (B, K). An MLP.

    frequencies: of the condition's Fourier features, for positions between -1 and 1.
    """

    def __init__(self, shape, condition, width=256, depth=3, frequencies=0):
        super().__init__()
        size = math.prod(shape)
        self.waves = [math.pi * 2**i for i in range(frequencies)]
        self.input = nn.Linear(size + condition * (1 + 2 * frequencies) + 16, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, size)

    def forward(self, latents, timesteps, condition):
        angles = timesteps[:, None] / 1000 * math.pi / 2 * 2.0 ** torch.arange(8)
        features = [latents.flatten(1), condition, angles.sin(), angles.cos()]
        features += [wave(condition * w) for w in self.waves for wave in (torch.sin, torch.cos)]
        h = self.input(torch.cat(features, 1))
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.output(nn.functional.silu(h)).view(latents.shape)


def noise_schedule():
    """Stable Diffusion's, predicting v, which is what so small a network learns best."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         prediction_type="v_prediction", clip_sample=False, steps_offset=1,
                         set_alpha_to_one=False)


def denoising_loss(model, clean, condition, scheduler, generator):
    """(B,) mean_D ‖v − v_θ(x_t, t, condition)‖², t uniform. clean: x_0, (B, C, H, W)."""
    timesteps = torch.randint(len(scheduler), (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    x, target, _ = noised(scheduler, clean, noise, timesteps)
    return (model(x, timesteps, condition) - target).square().flatten(1).mean(1)


def pretrain(model, loss_of, updates, generator, lr=2e-3):
    """Minimise loss_of(generator) -> (B,), with a warmup and a linear decay of lr."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for update in tqdm(range(updates), desc="pretraining", leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = lr * min(1, (update + 1) / 100) * (1 - update / updates)
        optimizer.zero_grad()
        loss_of(generator).mean().backward()
        optimizer.step()


@torch.no_grad()
def sample_chain(model, condition, shape, timesteps, table, generator, spread=1.0):
    """Denoising chains: latents (B, T+1, *shape) from x_T ~ N(0, spread²) on, log_probs (B, T)."""
    latents = spread * torch.randn(len(condition), *shape, generator=generator)
    chain, log_probs = [latents], []
    for t, row in zip(timesteps, table):
        output = model(latents, t.expand(len(latents)), condition)
        noise = torch.randn(latents.shape, generator=generator)
        latents, log_prob = ddim_step(output, latents, row, noise=noise)
        chain.append(latents)
        log_probs.append(log_prob)
    return torch.stack(chain, 1), torch.stack(log_probs, 1)


def apply_gradients(model, optimizer):
    """One update, with the gradients' norm clipped to 1. Returns the norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    if not math.isfinite(norm):
        lr = optimizer.param_groups[0]["lr"]
        raise RunStopped(f"the gradient is {norm}; start again with a learning rate below {lr:g}")
    optimizer.step()
    return norm


# a run: its settings, folder and command line


def check_numbers(config, at_least_1, above_0):
    """What the settings of both loops have in common; all other numbers must not be negative."""
    check_sizes(config)
    at_least(config, 1, *at_least_1)
    above_zero(config, *above_0)
    at_least(config, 0, *(name for name, value in asdict(config).items() if not isinstance(value, str)))
    if config.seed >= 2**63:
        refuse(config, "seed", "must be below 2**63")
    if config.steps > 500:
        refuse(config, "steps", "the schedule has 1000; choose at most 500")


def open_run(config, resume):
    """A run, ready for the epoch after the last of its rows, in a folder that no other process
    writes until `release`. saved: the checkpoint that it goes on from, or None."""
    check_folder(config)
    folder = Path(config.out) / config.name
    with reserved(folder):
        if not resume:
            refuse_existing(folder)
        saved, rows = read_run(config, folder) if resume else (None, [])
        write_whole(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
        write_whole(folder / "metrics.jsonl", "".join(row_line(row) + "\n" for row in rows))
    return SimpleNamespace(config=config, folder=folder, saved=saved, rows=rows, bar=None)


def read_run(config, folder):
    """(checkpoint, rows of metrics.jsonl up to it), or (None, []) of a run that has no checkpoint yet.
    Raises ValueError, one line, if they do not fit together."""
    saved, rows = load_checkpoint(folder / "checkpoint"), read_metrics(folder / "metrics.jsonl")
    if not saved:
        if len(rows) > 1:  # one is logged before the first checkpoint
            raise ValueError(f"--resume {folder}: its checkpoint is gone; begin anew with another --name")
        return None, []
    if saved["epoch"] > config.epochs:
        raise ValueError(f"--epochs {config.epochs}: the run has {saved['epoch']} already")
    rows = rows[:saved["epoch"] + 1]
    if [row["epoch"] for row in rows] != list(range(saved["epoch"] + 1)):
        raise ValueError(f"--resume {folder}: metrics.jsonl lacks rows before its checkpoint's "
                         "epoch; mend that file, or begin anew with another --name")
    return saved, rows


def log(run, row, keeps, **state):
    """A row of metrics.jsonl on the disk, then the checkpoint of its epoch: the present state of
    `keeps` (modules and optimizers by name), and whatever else the loop wants back."""
    run.rows.append(row)
    append(run.folder / "metrics.jsonl", row_line(row))
    state |= {name: part.state_dict() for name, part in keeps.items()}
    state |= {"epoch": row["epoch"], "config": asdict(run.config)}
    save_checkpoint(run.folder / "checkpoint", state)


def restore(run, keeps):
    try:
        for name, part in keeps.items():
            part.load_state_dict(run.saved[name])
    except RuntimeError:
        raise RunStopped(f"--resume {run.folder}: its checkpoint has networks of another size; undo what has "
                         "changed in the task or config.json, or begin anew with another --name") from None


def epochs_of(run):
    """The epochs that are left, with a progress bar, run.bar."""
    first, last = run.rows[-1]["epoch"] + 1, run.config.epochs
    run.bar = tqdm(total=last, initial=first - 1, desc=run.config.name, unit="epoch")
    for epoch in range(first, last + 1):
        yield epoch
        run.bar.update()
    run.bar.close()


def parse(arguments, config_class, doc):
    """(a config_class, resume) from the command line. Raises ValueError, one line."""
    given = flags_given(arguments, config_class, doc, beside_resume="--epochs")
    if "resume" in given:
        return resumed_config(Path(given.pop("resume")).resolve(), given, config_class), True
    return config_class(**given), False
