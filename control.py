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

import copy
import math
import sys
import time
from dataclasses import dataclass

import matplotlib
import torch
from tqdm import tqdm

from control_policy import (Denoiser, check_numbers, denoising_loss, fit, log, main, noise_schedule,
                            open_run, refuse, sample_chain, setting)
from ddpo import clip_range_for, group_advantages, is_loss, kl_loss
from rwr import exp_weights
from sample import ddim_step, ddim_table
from training import seeded

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

SHAPE = (2, 1, 16)  # of a plan: x and y of 16 waypoints
SCALE = 2.0  # latents = SCALE · position: their spread is then about 1, that of the noise
RADIUS = 0.22  # of a pillar, with the robot's own radius added
REACH = 0.12  # a plan arrives if it ends this near to the goal
VIEWS = {"trained": (0, 0), "goals": (1, 0), "pillars": (0, 1)}  # held-out goals? pillars?


@dataclass
class Config:
    """Every setting. An epoch samples scenes · group_size plans."""

    name: str = setting("", "of the run's folder (default: control, or control-rwr)")
    out: str = setting("runs", "folder of the runs")
    seed: int = setting(0, "of everything random")
    algorithm: str = setting("ddpo", "ddpo, or rwr: reward-weighted regression")
    pretrain: int = setting(3000, "updates on demonstrations, before the first epoch")
    epochs: int = setting(60, "of fine-tuning")
    scenes: int = setting(64, "an epoch, drawn anew in each")
    group_size: int = setting(16, "plans of each scene, which are compared with each other")
    steps: int = setting(10, "T, of denoising; all of them are trained")
    batch: int = setting(256, "plans of an update")
    lr: float = setting(3e-4, "learning rate of the fine-tuning")
    clip_range: float = setting(1e-4, "as in ddpo.py: for 16,384 elements, see clip_range_for")
    kl: float = setting(0.0, "weight of the divergence from the pretrained model (ddpo)")
    beta: float = setting(2.0, "weights exp(beta · reward), in standard deviations (rwr)")
    length: float = setting(0.5, "w_l, the price of a path twice as long as the straight line")
    roughness: float = setting(0.3, "w_r, the price of turns, see judge")
    eval_every: int = setting(10, "epochs between evaluations of fixed scenes and seeds")
    eval_scenes: int = setting(64, "of an evaluation: seen strips, unseen goals, unseen pillars")


# the world


def strips(n, reach, held_out, generator):
    """(n,) heights within ±reach. Even strips, 0.1 wide, are for training, odd ones are held out."""
    strip = 2 * torch.randint(round(reach / 0.1), (n,), generator=generator) + held_out
    return 0.1 * (strip + torch.rand(n, generator=generator)) - reach


def draw_scenes(n, generator, unseen_goals=0, unseen_pillars=0):
    """(n, 8): x, y of the start, of the goal and of two pillars. Paths lead from left to right."""
    start = torch.stack([-torch.ones(n), 1.2 * torch.rand(n, generator=generator) - 0.6], 1)
    goal = torch.stack([torch.ones(n), strips(n, 0.8, unseen_goals, generator)], 1)
    x = torch.tensor([-0.4, 0.4]) + 0.2 * torch.rand(n, 2, generator=generator) - 0.1
    y = torch.stack([strips(n, 0.4, unseen_pillars, generator) for _ in range(2)], 1)
    return torch.cat([start, goal, torch.stack([x, y], 2).flatten(1)], 1)


def demonstrate(scenes, generator):
    """(n, 2, 1, 16) latents of a noisy planner. Of its plans, about three in four succeed."""

    def normal(*size):
        return torch.randn(len(scenes), *size, generator=generator)

    start, goal, pillars = scenes[:, :2], scenes[:, 2:4], scenes[:, 4:].view(-1, 2, 2)
    side = normal(2).sign()  # above or below each pillar
    height = pillars[..., 1] + side * (RADIUS + 0.16 + 0.07 * normal(2))
    end = goal + 0.04 * normal(2)
    knots_x = torch.cat([start[:, :1], pillars[..., 0], end[:, :1]], 1)  # (n, 4)
    knots_y = torch.cat([start[:, 1:], height, end[:, 1:]], 1)
    time = torch.linspace(0, 1, SHAPE[-1] + 1)[1:]
    x = start[:, :1] + (end - start)[:, :1] * time  # (n, 16)
    knot = (x[..., None] > knots_x[:, None, 1:3]).sum(-1)  # the last knot that x has passed
    (x0, y0), (x1, y1) = ([k.gather(1, knot + i) for k in (knots_x, knots_y)] for i in (0, 1))
    y = y0 + (y1 - y0) * (1 - torch.cos(math.pi * (x - x0) / (x1 - x0))) / 2
    phase, waves = (torch.rand(len(scenes), 2, 1, generator=generator) for _ in range(2))
    dawdle = torch.sin(2 * math.pi * ((1 + 2 * waves) * time + phase)) * torch.sin(math.pi * time)
    return SCALE * (torch.stack([x, y], 1) + 0.04 * normal(2, 1) * dawdle)[:, :, None]


def paths_of(scenes, plans):
    """(B, 17, 2) positions, from the start on."""
    return torch.cat([scenes[:, :2, None], plans[:, :, 0] / SCALE], 2).transpose(1, 2)


def clearance(paths, pillars):
    """(B,) distance of the path, as a chain of segments, from the nearest pillar's edge; negative
    inside one. paths: (B, N, 2); pillars: (B, P, 2)."""
    start, along = paths[:, :-1, None], paths.diff(dim=1)[:, :, None]  # (B, N-1, 1, 2)
    to_pillar = pillars[:, None] - start
    share = (to_pillar * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)
    nearest = share.clamp(0, 1)[..., None] * along
    return (to_pillar - nearest).norm(dim=-1).amin((1, 2)) - RADIUS


def judge(scenes, plans):
    """{name: (B,)}: success (0 or 1), length and roughness in units of the distance from start to
    goal (roughness: how much the steps change), route (0 to 3: which pillars are passed above)."""
    paths, pillars = paths_of(scenes, plans), scenes[:, 4:].view(-1, 2, 2)
    arrives = (paths[:, -1] - scenes[:, 2:4]).norm(dim=1) < REACH
    distance = (scenes[:, 2:4] - scenes[:, :2]).norm(dim=1)
    steps = paths.diff(dim=1)
    at_pillar = (paths[:, None, :, 0] < pillars[..., :1]).sum(-1).clamp(max=SHAPE[-1])  # (B, 2)
    above = paths[..., 1].gather(1, at_pillar) > pillars[..., 1]
    return {"success": (arrives & (clearance(paths, pillars) > 0)).float(),
            "length": steps.norm(dim=2).sum(1) / distance,
            "roughness": steps.diff(dim=1).norm(dim=2).sum(1) / distance,
            "route": above[:, 0] + 2 * above[:, 1]}  # fmt: skip


def reward_of(seen, config):
    """(B,) from what judge has seen."""
    cost = config.length * (seen["length"] - 1) + config.roughness * seen["roughness"]
    return seen["success"] - cost


def sample_plans(model, scenes, timesteps, table, generator):
    latents = torch.randn(len(scenes), *SHAPE, generator=generator)
    return sample_chain(model, scenes, latents, timesteps, table, generator)


def check(config):
    """Fill in the name and refuse what cannot work: ValueError, one line."""
    check_numbers(config, ("pretrain", "epochs", "scenes", "steps", "batch", "eval_every",
                           "eval_scenes"), ("lr", "clip_range"))  # fmt: skip
    if config.algorithm not in ("ddpo", "rwr"):
        refuse(config, "algorithm", "unknown; choose ddpo, rwr")
    if config.algorithm == "rwr" and config.kl:
        refuse(config, "kl", "only ddpo has it; leave it out, or choose --algorithm ddpo")
    if config.group_size < 2:
        refuse(config, "group_size", "a group needs at least 2 plans to compare")
    plans = config.scenes * config.group_size
    if plans % config.batch:
        refuse(config, "batch", f"must divide --scenes · --group-size, {plans}")
    config.name = config.name or ("control-rwr" if config.algorithm == "rwr" else "control")
    return config


# the loop


def evaluate(model, config, timesteps, table):
    """({view_metric: value} over fixed scenes and seeds, the plans of a scene of each view).

    routes: how many different ones, of four, the 16 plans of a scene take that succeed.
    """
    row, shown = {}, []
    for view, held_out in VIEWS.items():
        scenes = draw_scenes(config.eval_scenes, seeded(1, 0, *held_out), *held_out)
        scenes = scenes.repeat_interleave(16, 0)
        chain, _ = sample_plans(model, scenes, timesteps, table, seeded(1, 1))
        seen, arrived = judge(scenes, chain[:, -1]), []
        for route, success in zip(seen["route"].split(16), seen["success"].split(16)):
            arrived.append(len(route[success > 0].unique()))
        success = seen["success"]
        row[f"{view}_success"] = success.mean().item()
        row[f"{view}_reward"] = reward_of(seen, config).mean().item()
        row[f"{view}_length"] = ((seen["length"] * success).sum() / success.sum()).item()
        row[f"{view}_routes"] = sum(arrived) / len(arrived)
        shown.append((scenes[0], chain[:16, -1], success[:16]))
    return row, shown


def train(config, resume=False):
    """Pretrain and fine-tune as the settings say. Returns the run's folder."""
    return fine_tune(config, *open_run(check(config), resume))


def fine_tune(config, folder, saved, rows):
    timesteps, table = ddim_table(noise_schedule(), config.steps)
    alphas_cumprod = noise_schedule().alphas_cumprod
    clip_range = clip_range_for(config.clip_range, SHAPE)
    torch.manual_seed(config.seed)
    model = Denoiser(SHAPE, condition=8, frequencies=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)

    def loss_on_demonstrations(generator):
        scenes = draw_scenes(512, generator)
        plans = demonstrate(scenes, generator)
        return denoising_loss(model, plans, scenes, alphas_cumprod, generator)

    def state():
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "base": base.state_dict(), "shown": shown}  # fmt: skip

    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        base = copy.deepcopy(model)  # the pretrained model
        base.load_state_dict(saved["base"])
        shown = saved["shown"]
    else:
        fit(model, loss_on_demonstrations, config.pretrain, seeded(config.seed, 0))
        base = copy.deepcopy(model)
        row, plans = evaluate(model, config, timesteps, table)
        shown = {0: plans}  # what progress.png shows of each evaluation
        log(folder, rows, {"epoch": 0, "plans": 0} | row, state())

    bar = tqdm(total=config.epochs, initial=rows[-1]["epoch"], desc=config.name, unit="epoch")
    for epoch in range(rows[-1]["epoch"] + 1, config.epochs + 1):
        clock, generator = time.perf_counter(), seeded(config.seed, epoch)

        # 1. sample: in the batches of the updates, since a matrix product of another size rounds
        # differently, and the ratio of an unchanged policy would not be exactly 1
        scenes = draw_scenes(config.scenes, generator).repeat_interleave(config.group_size, 0)
        sampled = [sample_plans(model, batch, timesteps, table, generator)
                   for batch in scenes.split(config.batch)]  # fmt: skip

        # 2. reward, 3. advantages
        seen = judge(scenes, torch.cat([chain[:, -1] for chain, _ in sampled]))
        reward = reward_of(seen, config)
        advantages = group_advantages(reward, config.group_size).clamp(-5, 5)

        # 4. update: RWR gets as many rows through the network as DDPO, with t and ε drawn anew
        totals, ratio_error = torch.zeros(4), 0.0  # totals: loss, (log ρ)², clipped, divergence
        parts = zip(scenes.split(config.batch), advantages.split(config.batch), sampled)
        for update, (scene, advantage, (chain, old_log_probs)) in enumerate(parts):
            optimizer.zero_grad()
            for step in range(config.steps):
                x, x_next, old = chain[:, step], chain[:, step + 1], old_log_probs[:, step]
                if config.algorithm == "rwr":
                    loss = denoising_loss(model, chain[:, -1], scene, alphas_cumprod, generator)
                    loss = exp_weights(advantage, config.beta) * loss
                else:
                    inputs = x, timesteps[step].expand(len(x)), scene
                    output = model(*inputs)
                    _, log_prob = ddim_step(output, x, table[step], x_next)
                    loss = is_loss(log_prob, old, advantage, clip_range)
                    away = (torch.exp(log_prob - old) - 1).abs().detach()  # |ρ − 1|
                    if update == 0:
                        ratio_error = max(ratio_error, away.max().item())
                    totals[1] += (log_prob - old).square().mean().item()
                    totals[2] += (away > clip_range).float().mean().item()
                if config.kl:
                    with torch.no_grad():
                        reference = base(*inputs)
                    divergence = kl_loss(output, reference)
                    loss = loss + config.kl * divergence
                    totals[3] += divergence.mean().item()
                (loss.mean() / config.steps).backward()
                totals[0] += loss.mean().item()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            optimizer.step()

        # 5. log
        loss, square, clipped, divergence = (totals / len(sampled) / config.steps).tolist()
        row = {"epoch": epoch, "plans": epoch * len(scenes), "reward_mean": reward.mean().item(),
               "reward_std": reward.std(correction=0).item(),
               "success": seen["success"].mean().item(), "loss": loss, "grad_norm": grad_norm}
        if config.algorithm == "ddpo":
            row |= {"approx_kl": square / 2, "clip_fraction": clipped, "ratio_error": ratio_error}
        row |= {"kl": divergence} if config.kl else {}
        row["seconds"] = time.perf_counter() - clock
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            evaluated, shown[epoch] = evaluate(model, config, timesteps, table)
            row |= evaluated
        log(folder, rows, row, state())
        if epoch in shown:
            draw_progress(rows, shown, folder / "progress.png")
        bar.set_postfix(reward=f"{row['reward_mean']:.2f}", success=f"{row['success']:.2f}")
        bar.update()
    bar.close()
    return folder


def draw_scene(axis, scene, plans, success):
    """Pillars, start, goal, and the plans of one scene: green arrives, red does not."""
    for x, y in scene[4:].view(-1, 2).tolist():
        axis.add_patch(plt.Circle((x, y), RADIUS, color="0.75"))
    axis.add_patch(plt.Circle(scene[2:4].tolist(), REACH, fill=False, color="C0"))
    axis.plot(*scene[:2], "ko", ms=3)
    for path, arrived in zip(paths_of(scene.expand(len(plans), -1), plans), success):
        axis.plot(*path.T, color="C2" if arrived else "C3", lw=0.8, alpha=0.8)
    axis.set(xlim=(-1.15, 1.25), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")


def draw_progress(rows, shown, path):
    """Above, the plans of the same scenes and seeds, evaluation by evaluation; below, curves."""
    epochs = list(shown)[:: math.ceil(len(shown) / 6)]  # at most 6
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 3))
    for column, epoch in zip(above.subplots(2, len(epochs), squeeze=False).T, epochs):
        for axis, view, scene in zip(column, VIEWS, shown[epoch]):  # but for the last view
            draw_scene(axis, *scene)
            axis.set_title(f"epoch {epoch}, {view}", fontsize=8)
    evaluated = [row for row in rows if "trained_success" in row]
    for axis, metric in zip(below.subplots(1, 3), ("success", "length", "routes")):
        for view in VIEWS:
            axis.plot([row["plans"] for row in evaluated],
                      [row[f"{view}_{metric}"] for row in evaluated], "o-", ms=3, label=view)
        axis.set(title=metric, xlabel="plans sampled")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    script = sys.modules[__name__]
    if any(argument.partition("=")[0] == "--task" for argument in sys.argv[1:]):
        import control_loop as script  # it needs gymnasium
    main(sys.argv[1:], script)
