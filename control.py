"""Beyond pictures: the same policy gradient plans paths. (control_loop.py: it controls a body.)

    python control.py                       a plan is the action: pretrain, then DDPO
    python control.py --kl 0.02             the same, held near the demonstrations
    python control.py --algorithm rwr       reward-weighted regression, for contrast
    python control.py --task Pendulum-v1    closed loop: the same as python control_loop.py
    python control.py --resume runs/control

A point robot crosses a plane with two pillars. A plan of 16 waypoints is a "picture" with 2
channels, 1 row and 16 columns; the scene (start, goal, pillars) takes the place of the prompt.
`pretrain` fits a diffusion model to demonstrations of a noisy scripted planner, which passes each
pillar on a random side, touches some and dawdles. DDPO then improves it by the reward alone:

    r = [arrives and touches nothing] − w_l (length / distance − 1) − w_r roughness

`ddim_table`, `ddim_step`, `is_loss`, `kl_loss`, `group_advantages` and `clip_range_for` are those
that train Stable Diffusion. They take latents of any shape (B, C, H, W), so nothing is changed.

Everything random in an epoch is drawn from (seed, epoch), so a run that was killed goes on to the
same numbers. It leaves runs/<name>/: config.json, metrics.jsonl, progress.png, checkpoint/.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from control_policy import (EVALUATION, Denoiser, apply_gradients, check_numbers, denoising_loss,
                            epochs_of, log, noise_schedule, open_run, parse, pretrain, restore,
                            sample_chain)
from control_worlds import SHAPE, demonstrate, draw_scene, draw_scenes, judge
from ddpo import clip_range_for, group_advantages, is_loss, kl_loss
from processes import command_line, seeded
from run_folder import release
from rwr import exp_weights
from sample import ddim_step, ddim_table
from settings import refuse

plt.switch_backend("Agg")  # no screen needed
VIEWS = {"trained": (0, 0), "goals": (1, 0), "pillars": (0, 1)}  # held-out goals? pillars?


@dataclass
class Config:
    """Every setting. An epoch samples scenes · group_size plans."""

    name: str = ""  # of the run's folder (default: control, or control-rwr)
    out: str = "runs"  # folder of the runs
    seed: int = 0  # of everything random
    algorithm: str = "ddpo"  # ddpo, or rwr: reward-weighted regression
    pretrain: int = 3000  # updates on demonstrations, before the first epoch
    epochs: int = 60  # of fine-tuning
    scenes: int = 64  # of an epoch, drawn anew in each
    group_size: int = 16  # plans of each scene, which are compared with each other
    steps: int = 10  # T, of denoising; all of them are trained
    batch: int = 256  # plans of an update
    lr: float = 3e-4  # learning rate of the fine-tuning
    clip_range: float = 1e-4  # as in ddpo.py: for 16,384 elements, see clip_range_for (ddpo)
    kl: float = 0.0  # weight of the divergence from the pretrained model (ddpo)
    beta: float = 2.0  # in weights exp(beta · reward), rewards in standard deviations (rwr)
    length: float = 0.5  # w_l, the price of a path twice as long as the straight line
    roughness: float = 0.3  # w_r, the price of turns, see judge
    eval_every: int = 10  # epochs between evaluations of fixed scenes and seeds
    eval_scenes: int = 64  # of an evaluation, for each of: seen strips, unseen goals, unseen pillars


def reward_of(seen, config):
    """(B,) rewards of what `judge` has seen."""
    cost = config.length * (seen["length"] - 1) + config.roughness * seen["roughness"]
    return seen["success"] - cost


def check(config):
    """Fill in the name and refuse what cannot work: ValueError, one line."""
    check_numbers(config, ("pretrain", "epochs", "scenes", "steps", "batch", "eval_every",
                           "eval_scenes"), ("lr", "clip_range"))
    if config.algorithm not in ("ddpo", "rwr"):
        refuse(config, "algorithm", "unknown; choose ddpo, rwr")
    if config.algorithm == "rwr" and config.kl:
        refuse(config, "kl", "only ddpo has it; leave it out, or choose --algorithm ddpo")
    if config.group_size < 2:
        refuse(config, "group_size", "a group needs at least 2 plans to compare")
    if config.algorithm == "rwr" and config.batch < 2:
        refuse(config, "batch", "must be at least 2, since plans are weighed against the others of a batch")
    if config.scenes * config.group_size % config.batch:
        refuse(config, "batch", f"must divide the {config.scenes * config.group_size} plans of an "
                                "epoch, --scenes · --group-size")
    config.name = config.name or {"ddpo": "control", "rwr": "control-rwr"}[config.algorithm]
    return config


def evaluate(model, config, timesteps, table):
    """({view_metric: value} over fixed scenes and seeds, the plans of a scene of each view).

    length: of plans that succeed. routes: how many, of four, a scene's 16 plans succeed on.
    """
    row, shown = {}, []
    for view, held_out in VIEWS.items():
        scenes = draw_scenes(config.eval_scenes, seeded(EVALUATION, 0, *held_out), *held_out)
        scenes = scenes.repeat_interleave(16, 0)
        chain, _ = sample_chain(model, scenes, SHAPE, timesteps, table, seeded(EVALUATION, 1))
        seen = judge(scenes, chain[:, -1])
        success, groups = seen["success"], zip(seen["route"].split(16), seen["success"].split(16))
        length = (seen["length"] * success).sum() / success.sum().clamp(min=1)
        routes = [len(route[arrived > 0].unique()) for route, arrived in groups]
        row |= {f"{view}_success": success.mean().item(), f"{view}_length": length.item(),
                f"{view}_routes": sum(routes) / len(routes)}
        shown.append((scenes[0], chain[:16, -1], success[:16]))
    return row, shown


def train(config, resume=False):
    """Pretrain and fine-tune as the settings say. Returns the run's folder."""
    return fit(prepare(config, resume))


def prepare(config, resume):
    return open_run(check(config), resume)


def fit(run):
    config, folder = run.config, run.folder
    scheduler = noise_schedule()
    timesteps, table = ddim_table(scheduler, config.steps)
    clip_range = clip_range_for(config.clip_range, SHAPE)
    torch.manual_seed(config.seed)
    model = Denoiser(SHAPE, condition=8, frequencies=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)

    base = copy.deepcopy(model).requires_grad_(False)  # what is to become the pretrained model
    keeps = {"model": model, "base": base, "optimizer": optimizer}

    def loss_on_demonstrations(generator):
        scenes = draw_scenes(512, generator)
        plans = demonstrate(scenes, generator)
        return denoising_loss(model, plans, scenes, scheduler, generator)

    if run.saved:
        restore(run, keeps)
        shown = run.saved["shown"]
    else:
        pretrain(model, loss_on_demonstrations, config.pretrain, seeded(config.seed, 0))
        base.load_state_dict(model.state_dict())
        row, plans = evaluate(model, config, timesteps, table)
        shown = {0: plans}  # what progress.png shows of each evaluation
        log(run, {"epoch": 0, "plans": 0} | row, keeps, shown=shown)

    for epoch in epochs_of(run):
        clock, generator = time.perf_counter(), seeded(config.seed, epoch)

        # 1. sample: in the batches of the updates, since a matrix product of another size rounds
        # differently, and the ratio of an unchanged policy would not be exactly 1
        scenes = draw_scenes(config.scenes, generator).repeat_interleave(config.group_size, 0)
        sampled = [sample_chain(model, batch, SHAPE, timesteps, table, generator)
                   for batch in scenes.split(config.batch)]

        # 2. reward, 3. advantages
        seen = judge(scenes, torch.cat([chain[:, -1] for chain, _ in sampled]))
        reward = reward_of(seen, config)
        advantages = group_advantages(reward, config.group_size).clamp(-5, 5)

        # 4. update: RWR gets as many rows through the network as DDPO, with t and ε drawn anew
        totals = torch.zeros(4)  # loss, (log ρ)²/2, clipped, divergence
        ratio_error, grad_norms = 0.0, []
        parts = zip(scenes.split(config.batch), advantages.split(config.batch), sampled)
        for update, (scene, advantage, (chain, old_log_probs)) in enumerate(parts):
            optimizer.zero_grad()
            for step in range(config.steps):
                x, x_next, old = chain[:, step], chain[:, step + 1], old_log_probs[:, step]
                if config.algorithm == "rwr":
                    loss = denoising_loss(model, chain[:, -1], scene, scheduler, generator)
                    loss = exp_weights(advantage, config.beta) * loss
                else:
                    inputs = x, timesteps[step].expand(len(x)), scene
                    output = model(*inputs)
                    _, log_prob = ddim_step(output, x, table[step], x_next)
                    loss = is_loss(log_prob, old, advantage, clip_range)
                    away = (torch.exp(log_prob - old) - 1).abs().detach()  # |ρ − 1|
                    if update == 0:
                        ratio_error = max(ratio_error, away.max().item())
                    totals[1] += (log_prob - old).square().mean().item() / 2
                    totals[2] += (away > clip_range).float().mean().item()
                if config.kl:
                    divergence = kl_loss(output, base(*inputs).detach())
                    loss = loss + config.kl * divergence
                    totals[3] += divergence.mean().item()
                (loss.mean() / config.steps).backward()
                totals[0] += loss.mean().item()
            grad_norms.append(apply_gradients(model, optimizer))

        # 5. log
        row = {"epoch": epoch, "plans": epoch * len(scenes), "reward_mean": reward.mean().item(),
               "reward_std": reward.std(correction=0).item(),
               "success": seen["success"].mean().item(),
               "grad_norm": sum(grad_norms) / len(grad_norms)}
        means = (totals / len(sampled) / config.steps).tolist()
        names = ["loss"] if config.algorithm == "rwr" else ["loss", "approx_kl", "clip_fraction"]
        row |= dict(zip(names + ["kl"] * (config.kl > 0), means))
        row |= {"ratio_error": ratio_error} if config.algorithm == "ddpo" else {}
        row["seconds"] = time.perf_counter() - clock
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            evaluated, shown[epoch] = evaluate(model, config, timesteps, table)
            row |= evaluated
        if epoch in shown:  # before the checkpoint, so that a kill in between leaves no older picture
            draw_progress(run.rows + [row], shown, folder / "progress.png")
        log(run, row, keeps, shown=shown)
        run.bar.set_postfix(reward=f"{row['reward_mean']:.2f}", success=f"{row['success']:.2f}")
    release(folder)
    return folder


def draw_progress(rows, shown, path):
    """Above, the plans of the same scenes and seeds, evaluation by evaluation; below, curves."""
    epochs = list(shown)[:: math.ceil(len(shown) / 6)]  # at most 6
    evaluated = [row for row in rows if "trained_success" in row]
    figure = plt.figure(figsize=(2.4 * max(4, len(epochs)), 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    for column, epoch in zip(above.subplots(2, len(epochs), squeeze=False).T, epochs):
        for axis, (view, scene) in zip(column, list(zip(VIEWS, shown[epoch]))[::2]):
            draw_scene(axis, *scene)
            axis.set_title(f"epoch {epoch}, {view}", fontsize=8)
    for axis, metric in zip(below.subplots(1, 3), ("success", "length", "routes")):
        for view in VIEWS:
            points = [(row["plans"], row[f"{view}_{metric}"]) for row in evaluated]
            axis.plot(*zip(*points), "o-", ms=3, label=view)
        axis.set(title=metric, xlabel="plans sampled")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_config(arguments):
    return parse(arguments, Config, __doc__)


def is_closed_loop(arguments):
    """Whether the arguments are for control_loop.py: a --task, or the --resume of a run that has one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?", const="missing")
    parser.add_argument("--resume", nargs="?", const="", default="")
    given, _ = parser.parse_known_args(arguments)
    config = Path(given.resume) / "config.json"
    return bool(given.task) or config.is_file() and '"task"' in config.read_text(errors="replace")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    if is_closed_loop(arguments):
        from control_loop import main as closed_loop  # it needs gymnasium

        return closed_loop(arguments)
    command_line(arguments, parse_config, prepare,
                 lambda run: print(fit(run)))


if __name__ == "__main__":
    main()
