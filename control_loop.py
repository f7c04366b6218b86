"""Closed loop: DDPO with a critic controls a body, beside a Gaussian policy trained by the same PPO.

    python control_loop.py --task Pendulum-v1                      a diffusion policy
    python control_loop.py --task Pendulum-v1 --policy gaussian    the standard, for comparison
    python control_loop.py --task MountainCarContinuous-v0 --controller my_file.py:my_controller
    python control_loop.py --resume runs/Pendulum-v1-diffusion

The policy sees an observation and denoises a chunk of the next 4 actions: a "picture" with a
channel for each action, 1 row and 4 columns. The chunk is played, then the policy looks again. It
starts as a copy of a mediocre controller. As in DPPO (Ren et al. 2024, arXiv 2409.00588) there are
two decision processes, one inside the other. A critic V(observation) tells how good a chunk was,
by generalised advantage estimation over the episode's chunks; each denoising step of the chunk is
an action that gets the chunk's advantage, discounted by its distance from the chunk:

    ρ_k = exp(log p − log p_old) of step k      L = Σ_k max(−γ_k A ρ_k, −γ_k A clip(ρ_k))

Two more things come from DPPO: only the last steps are trained, and no step has less noise than
--min-sigma, or the policy would hardly try anything new. σ is a column of `ddim_table`'s table, so
that floor is one line. A Gaussian policy is a chain of one step with c_x = 0, c_o = 1 and a σ of
our choice. So it is a table of one row, and all else is the same code for both.

Evaluation plays fixed seeds with the noise that the policy is trained with.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from control_policy import (EVALUATION, Denoiser, apply_gradients, check_numbers, denoising_loss,
                            epochs_of, log, noise_schedule, open_run, parse, pretrain, restore,
                            sample_chain)
from control_worlds import copy_controller, load_controller, make_envs, play, try_controller
from ddpo import clip_range_for, is_loss
from processes import command_line, seeded
from run_folder import release
from sample import ddim_step, ddim_table
from settings import refuse

plt.switch_backend("Agg")  # no screen needed


@dataclass
class Config:
    """Every setting. An epoch plays one episode in each environment."""

    task: str = "Pendulum-v1"  # of gymnasium, with continuous actions; module:Name-v0 of one's own module
    controller: str = ""  # what is copied first: file.py:function, see pendulum_controller
    policy: str = "diffusion"  # diffusion, or gaussian: the usual policy of PPO
    name: str = ""  # of the run's folder (default: the task and the policy)
    out: str = "runs"  # folder of the runs
    seed: int = 0  # of everything random
    demonstrations: int = 4  # episodes of the controller in each environment
    pretrain: int = 3000  # updates on the demonstrations, before the first epoch
    epochs: int = 25  # of fine-tuning
    envs: int = 64  # environments that are played at once
    chunk: int = 4  # actions of a decision
    steps: int = 10  # T, of denoising (diffusion)
    train_last: int = 5  # how many steps are trained: the last ones (diffusion)
    min_sigma: float = 0.1  # floor of a step's σ; actions lie between -1 and 1 (diffusion)
    sigma: float = 0.2  # of an action (gaussian)
    passes: int = 3  # through an epoch's decisions
    decisions: int = 5  # of each environment in an update
    lr: float = 3e-4  # learning rate of the policy
    critic_lr: float = 1e-3  # learning rate of the critic
    clip_range: float = 2.5e-5  # as in ddpo.py: 0.1 for a chunk of 4 actions of one number
    gamma: float = 0.99  # discount of a time step's reward
    gae_lambda: float = 0.95  # of the advantages: 1 trusts the returns, 0 the critic
    denoising_gamma: float = 0.99  # discount of a denoising step's advantage (diffusion)
    eval_every: int = 5  # epochs between evaluations


def gae(rewards, discounts, values, next_values, alive, gae_lambda):
    """(D, N) generalised advantage estimates (Schulman et al. 2015) of D decisions. All (D, N);
    next_values is 0 where an episode has ended for good; alive: False after its end."""
    advantages, later = torch.zeros_like(rewards), 0.0
    for d in reversed(range(len(rewards))):
        error = rewards[d] + discounts[d] * next_values[d] - values[d]
        advantages[d] = later = alive[d] * (error + discounts[d] * gae_lambda * later)
    return advantages


def policy_table(config):
    """(timesteps (T,), table (T, 4)) of the policy's chain."""
    if config.policy == "gaussian":
        return torch.tensor([0]), torch.tensor([[0, 1, config.sigma, math.log(config.sigma)]])
    timesteps, table = ddim_table(noise_schedule(), config.steps)
    table[:, 2].clamp_(min=config.min_sigma)
    table[:, 3] = table[:, 2].log()
    return timesteps, table


def check(config, resume=False):
    """Fill in the name and refuse what cannot work: ValueError, one line."""
    check_numbers(config, ("demonstrations", "pretrain", "epochs", "envs", "chunk", "steps",
                           "train_last", "passes", "decisions", "eval_every"),
                  ("min_sigma", "sigma", "lr", "critic_lr", "clip_range"))
    if config.policy not in ("diffusion", "gaussian"):
        refuse(config, "policy", "unknown; choose diffusion, gaussian")
    for name in ("gamma", "gae_lambda", "denoising_gamma"):
        if getattr(config, name) > 1:
            refuse(config, name, "must be at most 1")
    if config.policy == "diffusion" and config.train_last > config.steps:
        refuse(config, "train_last", f"must be at most --steps {config.steps}")
    config.name = config.name or f"{config.task.replace('/', '_')}-{config.policy}"
    envs = make_envs(config)
    if not (resume and any(Path(config.out, config.name, "checkpoint").glob("epoch_*.pt"))):
        try_controller(config, envs)  # a run that has begun to learn no longer needs it
    return config


def train(config, resume=False):
    """Pretrain and fine-tune as the settings say. Returns the run's folder."""
    return fit(prepare(config, resume))


def prepare(config, resume):
    return open_run(check(config, resume), resume)


def fit(run):
    config, folder = run.config, run.folder
    envs = make_envs(config)
    shape = (envs.single_action_space.shape[0], 1, config.chunk)
    features = envs.single_observation_space.shape[0]
    (timesteps, table), diffusion = policy_table(config), config.policy == "diffusion"
    trained = range(len(table))[-config.train_last :]  # of a Gaussian policy its only one
    clip_range = clip_range_for(config.clip_range, shape)
    torch.manual_seed(config.seed)
    policy = Denoiser(shape, features, width=128, depth=2)
    critic = torch.nn.Sequential(torch.nn.Linear(features, 128), torch.nn.SiLU(),
                                 torch.nn.Linear(128, 128), torch.nn.SiLU(),
                                 torch.nn.Linear(128, 1), torch.nn.Flatten(-2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=config.critic_lr)
    keeps = {"policy": policy, "critic": critic, "optimizer": optimizer,
             "critic_optimizer": critic_optimizer}

    def condition(observations):
        return (torch.as_tensor(observations, dtype=torch.float32) - mean) / std

    def evaluate():
        played = rollout((EVALUATION, 0), seeded(EVALUATION, 1))
        frames = torch.tensor(np.array(played.observations)[:, 0])  # of the first environment
        return {"eval_return": played.returns.mean(), "eval_std": played.returns.std()}, frames

    def rollout(seeds, generator):
        def act(observations):
            chain, log_probs = sample_chain(policy, condition(observations), shape, timesteps,
                                            table, generator, spread=float(diffusion))
            return chain[:, -1, :, 0].numpy(), (chain, log_probs)

        return play(envs, config, seeds, act)

    def save(row):
        log(run, row, keeps, mean=mean, std=std, scale=scale, shown=shown)

    if run.saved:
        restore(run, keeps)
        mean, std, scale, shown = (run.saved[name] for name in ("mean", "std", "scale", "shown"))
    else:
        seen, chunks, to_go, returns = copy_controller(config, envs, load_controller(config))
        mean, std = seen.mean(0), seen.std(0) + 1e-6
        std[(seen == seen[0]).all(0)] = 1  # what the demonstrations do not change may change later
        scale = 1 / (to_go.std().item() + 1e-6)  # of rewards, so that the critic's targets have size 1
        scheduler = noise_schedule()

        def policy_loss(generator):
            batch = torch.randint(len(seen), (512,), generator=generator)
            inputs = chunks[batch], condition(seen[batch])
            if diffusion:
                return denoising_loss(policy, *inputs, scheduler, generator)
            mean_action = policy(0 * inputs[0], torch.zeros(len(batch)), inputs[1])
            return (mean_action - inputs[0]).square().flatten(1).mean(1)

        def critic_loss(generator):
            batch = torch.randint(len(seen), (512,), generator=generator)
            return (critic(condition(seen[batch])) - scale * to_go[batch]).square()

        pretrain(policy, policy_loss, config.pretrain, seeded(config.seed, 0, 0))
        pretrain(critic, critic_loss, config.pretrain // 3, seeded(config.seed, 0, 1))
        row, frames = evaluate()
        shown = {0: frames}
        save({"epoch": 0, "env_steps": 0, "controller_return": returns.mean().item()} | row)

    for epoch in epochs_of(run):
        clock, generator = time.perf_counter(), seeded(config.seed, epoch)

        # 1. play, 2. reward
        played = rollout((config.seed, epoch), generator)
        seen = condition(np.array(played.observations))  # (D, N, O)
        chains, old_log_probs = zip(*played.memory)
        numbers = played.rewards, played.discounts, played.alive, played.terminated
        rewards, discounts, alive, terminated = (torch.tensor(np.array(each), dtype=torch.float32)
                                                 for each in numbers)

        # 3. advantages
        with torch.no_grad():
            values = critic(seen)
            next_values = critic(condition(np.array(played.next_observations))) * (1 - terminated)
        advantages = gae(scale * rewards, discounts, values, next_values, alive, config.gae_lambda)
        targets, count = advantages + values, alive.sum()
        advantages = advantages - advantages.sum() / count
        advantages /= ((advantages * alive).square().sum() / count).sqrt() + 1e-6

        # 4. update: row by row as it was played, so that the ratio starts at exactly 1
        totals, ratio_error, grad_norms = torch.zeros(3), 0.0, []
        for _ in range(config.passes):
            for batch in torch.randperm(len(seen), generator=generator).split(config.decisions):
                optimizer.zero_grad()
                share = count * len(batch) / len(seen)  # decisions of an update, on average
                weights = alive / share / len(trained)
                for d in batch.tolist():
                    for step in trained:
                        x, x_next = chains[d][:, step], chains[d][:, step + 1]
                        old = old_log_probs[d][:, step]
                        output = policy(x, timesteps[step].expand(len(x)), seen[d])
                        _, log_prob = ddim_step(output, x, table[step], x_next)
                        discount = config.denoising_gamma ** (len(table) - 1 - step)
                        loss = is_loss(log_prob, old, discount * advantages[d], clip_range)
                        (loss * weights[d]).sum().backward()
                        with torch.no_grad():
                            away = (torch.exp(log_prob - old) - 1).abs() * alive[d]
                            if not grad_norms:
                                ratio_error = max(ratio_error, away.max().item())
                            kinds = loss, (log_prob - old).square(), (away > clip_range).float()
                            totals += (torch.stack(kinds) * weights[d]).sum(1)
                grad_norms.append(apply_gradients(policy, optimizer))
                critic_optimizer.zero_grad()
                error = (critic(seen[batch]) - targets[batch]).square() * alive[batch]
                (error.sum() / share).backward()
                critic_optimizer.step()

        # 5. log
        loss, square, clipped = (totals / len(grad_norms)).tolist()
        left = ((targets - values) * alive).square().sum() / count
        spread = targets[alive > 0].var(correction=0)
        row = {"epoch": epoch, "env_steps": run.rows[-1]["env_steps"] + played.env_steps,
               "return_mean": played.returns.mean(), "return_std": played.returns.std(),
               "loss": loss, "approx_kl": square / 2, "clip_fraction": clipped,
               "ratio_error": ratio_error, "grad_norm": sum(grad_norms) / len(grad_norms),
               "explained_variance": (1 - left / spread).item(),
               "seconds": time.perf_counter() - clock}
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            evaluated, shown[epoch] = evaluate()
            row |= evaluated
        if epoch in shown:  # before the checkpoint, so that a kill in between leaves no older picture
            draw_progress(config, run.rows + [row], shown, folder / "progress.png")
        save(row)
        run.bar.set_postfix({"return": f"{row['return_mean']:.1f}"})
    release(folder)
    return folder


def draw_progress(config, rows, shown, path):
    """The curve of returns; beside it, the first evaluated episode before and after: a film strip
    of the pendulum, or curves of the observations of another task."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained",
                                width_ratios=(3, 4, 4))
    trained = [row for row in rows if "return_mean" in row]
    axes[0].plot([row["env_steps"] / 1000 for row in trained],
                 [row["return_mean"] for row in trained], alpha=0.5, label="played")
    evaluated = [row for row in rows if "eval_return" in row]
    axes[0].plot([row["env_steps"] / 1000 for row in evaluated],
                 [row["eval_return"] for row in evaluated], "o-", ms=3, label="fixed seeds")
    axes[0].set(title=f"return, {config.policy}", xlabel="steps in the task, thousands")
    axes[0].legend(fontsize=8)
    axes[0].grid(alpha=0.3)
    for axis, epoch in zip(axes[1:], (min(shown), max(shown))):
        axis.set(title=f"epoch {epoch}")
        if config.task != "Pendulum-v1":
            axis.plot(shown[epoch].numpy())  # matplotlib 3.8 takes no tensor of two dimensions
            axis.set(xlabel="decision", ylabel="observation")
            continue
        for i, (cos, sin, _) in enumerate(shown[epoch][::2]):
            x, y = 2.4 * (i % 9), -2.4 * (i // 9)
            axis.plot([x, x - sin], [y, y + cos], "k-", lw=2)
            axis.plot(x - sin, y + cos, "o", ms=4, color="C2" if cos > 0.9 else "C3")
        axis.set(aspect="equal", xticks=[], yticks=[], ylim=(-6.2, 1.4), xlabel="every 8th step, row by row")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_config(arguments):
    return parse(arguments, Config, __doc__)


def main(arguments=None):
    command_line(arguments, parse_config, prepare,
                 lambda run: print(fit(run)))


if __name__ == "__main__":
    main()
