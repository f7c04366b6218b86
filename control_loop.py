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

Two more things are theirs: only the last steps are trained, and no step has less noise than
--min-sigma, or the policy would hardly try anything new. σ is a column of `ddim_table`'s table, so
that floor is one line. A Gaussian policy is a chain of one step with c_x = 0, c_o = 1 and a σ of
our choice. So it is a table of one row, and all else is the same code for both.

Evaluation plays fixed seeds with the noise that the policy is trained with.
"""

import importlib.util
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from control_policy import (Denoiser, check_numbers, denoising_loss, fit, log, main, noise_schedule,
                            open_run, refuse, sample_chain, setting)
from ddpo import clip_range_for, is_loss
from sample import ddim_step, ddim_table
from training import seeded

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt


@dataclass
class Config:
    """Every setting. An epoch plays one episode in each environment."""

    task: str = setting("Pendulum-v1", "an environment of gymnasium with continuous actions")
    controller: str = setting("", "what is copied first: file.py:function, see pendulum_controller")
    policy: str = setting("diffusion", "diffusion, or gaussian: the usual policy of PPO")
    name: str = setting("", "of the run's folder (default: the task and the policy)")
    out: str = setting("runs", "folder of the runs")
    seed: int = setting(0, "of everything random")
    demonstrations: int = setting(4, "episodes of the controller in each environment")
    pretrain: int = setting(3000, "updates on them, before the first epoch")
    epochs: int = setting(25, "of fine-tuning")
    envs: int = setting(64, "environments that are played at once")
    chunk: int = setting(4, "actions of a decision")
    steps: int = setting(10, "T, of denoising (diffusion)")
    train_last: int = setting(5, "of the steps, as many are trained (diffusion)")
    min_sigma: float = setting(0.1, "floor of a step's σ; actions lie between -1 and 1 (diffusion)")
    sigma: float = setting(0.2, "of an action (gaussian)")
    passes: int = setting(3, "over an epoch's decisions")
    decisions: int = setting(5, "of each environment in an update")
    lr: float = setting(3e-4, "learning rate of the policy")
    critic_lr: float = setting(1e-3, "learning rate of the critic")
    clip_range: float = setting(2.5e-5, "as in ddpo.py: 0.1 for a chunk of 4 actions")
    gamma: float = setting(0.99, "discount of a time step's reward")
    gae_lambda: float = setting(0.95, "of the advantages: 1 trusts the returns, 0 the critic")
    denoising_gamma: float = setting(0.99, "discount of a denoising step's advantage (diffusion)")
    eval_every: int = setting(5, "epochs between evaluations")


# the task


def pendulum_controller(observations, generator):
    """Actions (N, A) in the task's units for observations (N, O): swings up by adding energy, holds
    the rod near the top, and has a shaky hand. generator: a numpy.random.Generator."""
    cos, sin, speed = observations.T
    angle, energy = np.arctan2(sin, cos), speed**2 / 6 + 5 * cos  # 5 is the energy at the top
    swing = 2 * np.sign(speed) * np.clip(0.15 * (5 - energy), -1, 1)
    torque = np.where(np.abs(angle) < 0.4, -8 * angle - 2 * speed, swing)
    return np.clip(torque + 2 * generator.standard_normal(len(torque)), -2, 2)[:, None]


def load_controller(config):
    if not config.controller:
        if config.task == "Pendulum-v1":
            return pendulum_controller
        refuse(config, "task", "has no controller to start from; give one as "
                               "--controller file.py:function, or choose Pendulum-v1")
    path, _, name = config.controller.rpartition(":")
    if not Path(path).is_file():
        refuse(config, "controller", "no such file; write file.py:function")
    spec = importlib.util.spec_from_file_location("controller", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        refuse(config, "controller", f"{path} has no function {name}")
    return getattr(module, name)


def make_envs(config):
    """The task, --envs times. Raises ValueError if it is not one that this file can play."""
    try:
        import gymnasium
    except ImportError:
        refuse(config, "task", "needs gymnasium; pip install gymnasium")
    try:
        envs = gymnasium.make_vec(config.task, config.envs, vectorization_mode="sync")
    except gymnasium.error.Error as error:
        refuse(config, "task", f"gymnasium cannot make it ({str(error).splitlines()[0]})")
    action, observation = envs.single_action_space, envs.single_observation_space
    if not (isinstance(action, gymnasium.spaces.Box) and len(action.shape) == 1
            and np.isfinite([action.low, action.high]).all()):  # fmt: skip
        refuse(config, "task", "its actions are no bounded vector; choose such as Pendulum-v1")
    if not isinstance(observation, gymnasium.spaces.Box) or len(observation.shape) != 1:
        refuse(config, "task", "its observations are no vector; choose such as Pendulum-v1")
    if not envs.spec.max_episode_steps:
        refuse(config, "task", "its episodes have no time limit; choose such as Pendulum-v1")
    return envs


def reset(envs, *key):
    seeds = np.random.SeedSequence(key).generate_state(envs.num_envs)
    return envs.reset(seed=[int(seed) for seed in seeds])[0]


def play(envs, config, seeds, act):
    """An episode in each environment. act: observations (N, O) -> actions (N, A, chunk) in ±1 and
    anything that is to be remembered. Returns a namespace of lists, one entry a decision:

    observations, next_observations (N, O); rewards (N,), discounted within the chunk; discounts
    (N,) of what follows it; alive, terminated (N,) bool; memory. And returns (N,), undiscounted.
    An environment that is done before the others waits: it is no longer alive.
    """
    space, observations = envs.single_action_space, reset(envs, *seeds)
    low, high = space.low, space.high
    over, terminated = np.zeros(len(observations), bool), np.zeros(len(observations), bool)
    rollout = SimpleNamespace(env_steps=0, observations=[], next_observations=[], rewards=[], discounts=[],
                              alive=[], terminated=[], memory=[], returns=0)  # fmt: skip
    for _ in range(math.ceil(envs.spec.max_episode_steps / config.chunk)):
        actions, memory = act(observations)
        rollout.alive.append(~over)
        rollout.observations.append(observations)
        rollout.memory.append(memory)
        rewards, discounts = np.zeros(len(over)), np.ones(len(over))
        for action in np.moveaxis(actions, 2, 0):  # (N, A)
            action = low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)
            new, reward, ends, cut, _ = envs.step(action.astype(space.dtype))
            reward = np.where(over, 0, reward)
            rewards, rollout.returns = rewards + discounts * reward, rollout.returns + reward
            discounts = np.where(over, discounts, discounts * config.gamma)
            observations = np.where(over[:, None], observations, new)
            terminated |= ends & ~over
            rollout.env_steps += int((~over).sum())
            over = over | ends | cut
        rollout.next_observations.append(observations)
        rollout.rewards.append(rewards)
        rollout.discounts.append(discounts)
        rollout.terminated.append(terminated.copy())
        if over.all():
            break
    return rollout


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


# the loop


def check(config):
    """Fill in the name and refuse what cannot work: ValueError, one line."""
    check_numbers(config, ("demonstrations", "pretrain", "epochs", "envs", "chunk", "steps",
                           "train_last", "passes", "decisions", "eval_every"),
                  ("min_sigma", "sigma", "lr", "critic_lr", "clip_range"))  # fmt: skip
    if config.policy not in ("diffusion", "gaussian"):
        refuse(config, "policy", "unknown; choose diffusion, gaussian")
    for name in ("gamma", "gae_lambda", "denoising_gamma"):
        if getattr(config, name) > 1:
            refuse(config, name, "must be at most 1")
    if config.train_last > config.steps:
        refuse(config, "train_last", f"must be at most --steps {config.steps}")
    load_controller(config)
    make_envs(config)
    config.name = config.name or f"{config.task.replace('/', '_')}-{config.policy}"
    return config


def copy_controller(config, envs, controller):
    """What the demonstrations give: observations (n, O), chunks (n, A, 1, chunk) in ±1, discounted
    returns (n,); returns (episodes,) for the log."""
    space, seen, chunks, to_go, returns = envs.single_action_space, [], [], [], []
    one_step = SimpleNamespace(**vars(config) | {"chunk": 1})
    for episode in range(config.demonstrations):
        generator = np.random.default_rng((config.seed, 0, episode))

        def act(observations):
            actions = controller(observations, generator)
            actions = 2 * (actions - space.low) / (space.high - space.low) - 1
            return actions[:, :, None], actions

        played = play(envs, one_step, (config.seed, 0, episode), act)
        returns.append(played.returns)
        reward, alive = np.array(played.rewards), np.array(played.alive)  # (T, N)
        for t in reversed(range(len(reward) - 1)):
            reward[t] += config.gamma * reward[t + 1]  # from here on: the discounted return
        actions = np.array(played.memory)  # (T, N, A)
        for t in range(len(reward) - config.chunk + 1):
            whole = alive[t + config.chunk - 1]  # the chunk ends before the episode does
            seen.append(played.observations[t][whole])
            chunks.append(np.moveaxis(actions[t : t + config.chunk, whole], 0, 2)[:, :, None])
            to_go.append(reward[t][whole])
    arrays = (np.concatenate(each) for each in (seen, chunks, to_go, returns))
    return [torch.as_tensor(each, dtype=torch.float32) for each in arrays]


def train(config, resume=False):
    """Pretrain and fine-tune as the settings say. Returns the run's folder."""
    return fine_tune(config, *open_run(check(config), resume))


def fine_tune(config, folder, saved, rows):
    envs = make_envs(config)
    shape = (envs.single_action_space.shape[0], 1, config.chunk)
    features = envs.single_observation_space.shape[0]
    (timesteps, table), diffusion = policy_table(config), config.policy == "diffusion"
    trained = range(len(table))[-config.train_last :] if diffusion else range(1)
    clip_range = clip_range_for(config.clip_range, shape)
    torch.manual_seed(config.seed)
    policy = Denoiser(shape, features, width=128, depth=2)
    critic = torch.nn.Sequential(torch.nn.Linear(features, 128), torch.nn.SiLU(),
                                 torch.nn.Linear(128, 128), torch.nn.SiLU(),
                                 torch.nn.Linear(128, 1), torch.nn.Flatten(-2))  # fmt: skip
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=config.critic_lr)
    keeps = {"policy": policy, "critic": critic, "optimizer": optimizer,
             "critic_optimizer": critic_optimizer}  # fmt: skip

    def condition(observations):
        return (torch.as_tensor(observations, dtype=torch.float32) - mean) / std

    def evaluate():
        played = rollout((1, 0), seeded(1, 1))
        frames = np.array(played.observations)[:, 0]  # of the first environment
        return {"eval_return": played.returns.mean(), "eval_std": played.returns.std()}, frames

    def rollout(seeds, generator):
        def act(observations):
            latents = torch.randn(len(observations), *shape, generator=generator) * diffusion
            chain, log_probs = sample_chain(policy, condition(observations), latents, timesteps,
                                            table, generator)  # fmt: skip
            return chain[:, -1, :, 0].numpy(), (chain, log_probs)

        return play(envs, config, seeds, act)

    def save(row):
        log(folder, rows, row, {name: part.state_dict() for name, part in keeps.items()} |
            {"mean": mean, "std": std, "scale": scale, "shown": shown})  # fmt: skip

    if saved:
        for name, part in keeps.items():
            part.load_state_dict(saved[name])
        mean, std, scale, shown = (saved[name] for name in ("mean", "std", "scale", "shown"))
    else:
        seen, chunks, to_go, returns = copy_controller(config, envs, load_controller(config))
        mean, std = seen.mean(0), seen.std(0) + 1e-6
        scale = 1 / (to_go.std().item() + 1e-6)  # of rewards, so that the critic's task is of size 1
        alphas_cumprod = noise_schedule().alphas_cumprod

        def policy_loss(generator):
            batch = torch.randint(len(seen), (512,), generator=generator)
            inputs = chunks[batch], condition(seen[batch])
            if diffusion:
                return denoising_loss(policy, *inputs, alphas_cumprod, generator)
            mean_action = policy(0 * inputs[0], torch.zeros(len(batch)), inputs[1])
            return (mean_action - inputs[0]).square().flatten(1).mean(1)

        def critic_loss(generator):
            batch = torch.randint(len(seen), (512,), generator=generator)
            return (critic(condition(seen[batch])) - scale * to_go[batch]).square()

        fit(policy, policy_loss, config.pretrain, seeded(config.seed, 0, 0))
        fit(critic, critic_loss, config.pretrain // 3, seeded(config.seed, 0, 1))
        row, frames = evaluate()
        shown = {0: frames}
        save({"epoch": 0, "env_steps": 0, "controller_return": returns.mean().item()} | row)

    bar = tqdm(total=config.epochs, initial=rows[-1]["epoch"], desc=config.name, unit="epoch")
    for epoch in range(rows[-1]["epoch"] + 1, config.epochs + 1):
        clock, generator = time.perf_counter(), seeded(config.seed, epoch)

        # 1. play, 2. reward
        played = rollout((config.seed, epoch), generator)
        seen = condition(np.array(played.observations))  # (D, N, O)
        chains, old_log_probs = zip(*played.memory)
        numbers = played.rewards, played.discounts, played.alive, played.terminated
        rewards, discounts, alive, terminated = (torch.tensor(np.array(each), dtype=torch.float32)
                                                 for each in numbers)  # fmt: skip

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
        for update_pass in range(config.passes):
            for batch in torch.randperm(len(seen), generator=generator).split(config.decisions):
                optimizer.zero_grad()
                weights = alive / alive[batch].sum() / len(trained)
                for d in batch.tolist():
                    for step in trained:
                        x, x_next, old = chains[d][:, step], chains[d][:, step + 1], old_log_probs[d][:, step]
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
                grad_norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
                optimizer.step()
                critic_optimizer.zero_grad()
                error = (critic(seen[batch]) - targets[batch]).square() * alive[batch]
                (error.sum() / alive[batch].sum()).backward()
                critic_optimizer.step()

        # 5. log
        loss, square, clipped = (totals / len(grad_norms)).tolist()
        left = ((targets - values) * alive).square().sum() / count
        spread = targets[alive > 0].var(correction=0)
        row = {"epoch": epoch, "env_steps": rows[-1]["env_steps"] + played.env_steps,
               "return_mean": played.returns.mean(), "return_std": played.returns.std(),
               "loss": loss, "approx_kl": square / 2, "clip_fraction": clipped,
               "ratio_error": ratio_error, "grad_norm": sum(grad_norms) / len(grad_norms),
               "explained_variance": (1 - left / spread).item(),
               "seconds": time.perf_counter() - clock}  # fmt: skip
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            evaluated, shown[epoch] = evaluate()
            row |= evaluated
        save(row)
        if epoch in shown:
            draw_progress(config, rows, shown, folder / "progress.png")
        bar.set_postfix({"return": f"{row['return_mean']:.1f}"})
        bar.update()
    bar.close()
    return folder


def draw_progress(config, rows, shown, path):
    """The curve of returns; beside it, the first evaluated episode before and after: a film strip
    of the pendulum, or curves of the observations of another task."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained",
                                width_ratios=(3, 4, 4))  # fmt: skip
    trained = [row for row in rows if "return_mean" in row]
    axes[0].plot([row["env_steps"] for row in trained], [row["return_mean"] for row in trained],
                 alpha=0.5, label="played")  # fmt: skip
    evaluated = [row for row in rows if "eval_return" in row]
    axes[0].plot([row["env_steps"] for row in evaluated], [row["eval_return"] for row in evaluated],
                 "o-", ms=3, label="fixed seeds")  # fmt: skip
    axes[0].set(title=f"return, {config.policy}", xlabel="steps in the task")
    axes[0].legend(fontsize=8)
    axes[0].grid(alpha=0.3)
    for axis, epoch in zip(axes[1:], (min(shown), max(shown))):
        axis.set(title=f"epoch {epoch}")
        if config.task != "Pendulum-v1":
            axis.plot(shown[epoch])
            axis.set(xlabel="decision", ylabel="observation")
            continue
        for i, (cos, sin, _) in enumerate(shown[epoch][::2]):
            x, y = 2.4 * (i % 9), -2.4 * (i // 9)
            axis.plot([x, x - sin], [y, y + cos], "k-", lw=2)
            axis.plot(x - sin, y + cos, "o", ms=4, color="C2" if cos > 0.9 else "C3")
        axis.set(aspect="equal", xticks=[], yticks=[], xlabel="every 8th step, row by row")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:], sys.modules[__name__])
