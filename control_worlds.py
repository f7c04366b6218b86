"""The worlds of the two control loops: a plane with two pillars, and any task of gymnasium.

The plane: scenes, a noisy planner whose plans are copied first, and a judge of plans. Tasks: an
episode in many environments at once, played in chunks of actions, and a controller to copy first.
"""

import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch

from models import first_line
from processes import RunStopped
from settings import refuse

SHAPE = (2, 1, 16)  # of a plan: x and y of 16 waypoints
SCALE = 2.0  # latents = SCALE · position: their spread is then about 1, that of the noise
RADIUS = 0.22  # of a pillar, with the robot's own radius added
REACH = 0.12  # a plan arrives if it ends this near the goal


# plans on the plane


def strips(n, reach, held_out, generator):
    """(n,) heights within ±reach. Of strips 0.1 wide, every other one is held out of training."""
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
            "route": above[:, 0] + 2 * above[:, 1]}


def draw_scene(axis, scene, plans, success):
    """Pillars, start, goal, and the plans of one scene: green arrives, red does not."""
    for x, y in scene[4:].view(-1, 2).tolist():
        axis.add_patch(plt.Circle((x, y), RADIUS, color="0.75"))
    axis.add_patch(plt.Circle(scene[2:4].tolist(), REACH, fill=False, color="C0"))
    axis.plot(*scene[:2], "ko", ms=3)
    for path, arrived in zip(paths_of(scene.expand(len(plans), -1), plans), success):
        axis.plot(*path.T, color="C2" if arrived else "C3", lw=0.8, alpha=0.8)
    axis.set(xlim=(-1.15, 1.25), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")


# tasks of gymnasium


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
    sys.path.append(str(Path(path).resolve().parent))  # for what it imports from there
    try:
        controller = runpy.run_path(path).get(name)
    except (Exception, SystemExit) as error:  # it is somebody else's code
        refuse(config, "controller", f"cannot be imported ({type(error).__name__}: {error})")
    if not callable(controller):
        refuse(config, "controller", f"{path} has no function {name!r}")
    return controller


def try_controller(config, envs):
    """Raises ValueError, one line, if the controller cannot play the task, or nobody can."""
    controller, space = load_controller(config), envs.single_action_space
    try:
        observations = reset(envs, 0)
        envs.step(np.repeat(space.low[None], envs.num_envs, 0))
    except Exception as error:  # it is somebody else's code
        refuse(config, "task", f"fails ({type(error).__name__}: {first_line(error)}); mend its reset or step")
    ask_controller(config, controller, envs, observations, np.random.default_rng(0))


def ask_controller(config, controller, envs, observations, generator):
    """A controller's actions, (N, A). Raises ValueError, one line, for anything else."""
    shape = len(observations), *envs.single_action_space.shape
    try:
        actions = np.asarray(controller(observations.copy(), generator))  # a copy, which it may change
        broken = actions[~np.isfinite(actions)]
    except Exception as error:  # it is somebody else's code
        refuse(config, "controller", f"fails ({type(error).__name__}: {error})")
    if actions.shape != shape:
        refuse(config, "controller", f"its actions have shape {actions.shape}, and must have {shape}")
    if len(broken):
        refuse(config, "controller", f"its actions must be finite numbers, not {broken[0]}")
    return actions


def make_envs(config):
    """The task, --envs times. Raises ValueError if it is not one that this file can play."""
    try:
        import gymnasium
    except ImportError:
        refuse(config, "task", "needs gymnasium; pip install gymnasium")
    try:
        envs = gymnasium.make_vec(config.task, config.envs, vectorization_mode="sync")
    except Exception as error:  # it is somebody else's code
        refuse(config, "task", f"gymnasium cannot make it ({first_line(error)})")
    action, observation = envs.single_action_space, envs.single_observation_space
    with np.errstate(over="ignore"):  # bounds so far apart that their distance is none
        if not (isinstance(action, gymnasium.spaces.Box) and len(action.shape) == 1
                and action.dtype.kind == "f" and np.isfinite(action.high - action.low).all()
                and (action.high > action.low).all()):
            refuse(config, "task", "its actions are no bounded vector of real numbers with low < high; "
                                   "choose one such as Pendulum-v1")
    if not isinstance(observation, gymnasium.spaces.Box) or len(observation.shape) != 1:
        refuse(config, "task", "its observations are no vector; choose one such as Pendulum-v1")
    if not envs.spec.max_episode_steps:
        refuse(config, "task", "its episodes have no time limit; register it with max_episode_steps")
    if config.chunk > envs.spec.max_episode_steps:
        refuse(config, "chunk", f"an episode has only {envs.spec.max_episode_steps} steps")
    return envs


def reset(envs, *key):
    seeds = np.random.SeedSequence(key).generate_state(envs.num_envs)
    return envs.reset(seed=[int(seed) for seed in seeds])[0]


def play(envs, config, seeds, act):
    """An episode in each environment. act: observations (N, O) -> actions (N, A, chunk) in ±1 and
    anything that is to be remembered. Returns a namespace of lists, one entry a decision:

    observations, next_observations (N, O); rewards (N,), discounted within the chunk; discounts
    (N,) of what follows it; alive, terminated (N,) bool; memory. And returns (N,), undiscounted,
    and env_steps, the number of steps of all episodes.
    An environment that is done before the others waits: it is no longer alive.
    """
    space, observations = envs.single_action_space, reset(envs, *seeds)
    low, high = space.low, space.high
    over, terminated = np.zeros(len(observations), bool), np.zeros(len(observations), bool)
    lists = ("observations", "next_observations", "rewards", "discounts", "alive", "terminated",
             "memory")
    rollout = SimpleNamespace(returns=0, env_steps=0, **{name: [] for name in lists})
    for _ in range(math.ceil(envs.spec.max_episode_steps / config.chunk)):
        actions, memory = act(observations)
        rollout.alive.append(~over)
        rollout.observations.append(observations)
        rollout.memory.append(memory)
        rewards, discounts = np.zeros(len(over)), np.ones(len(over))
        for action in np.moveaxis(actions, 2, 0):  # (N, A)
            action = np.clip(low + (action + 1) / 2 * (high - low), low, high)
            new, reward, ends, cut, _ = envs.step(action.astype(space.dtype))
            reward = np.where(over, 0, reward)
            rewards, rollout.returns = rewards + discounts * reward, rollout.returns + reward
            discounts = np.where(over, discounts, discounts * config.gamma)
            observations = np.where(over[:, None], observations, new)
            terminated |= ends & ~over
            rollout.env_steps += int((~over).sum())
            over = over | ends | cut
        if np.isfinite(actions).all() and not np.isfinite(np.c_[rewards, observations]).all():
            raise RunStopped(f"--task {config.task}: an observation or a reward is no finite number; "
                             "mend the environment")
        rollout.next_observations.append(observations)
        rollout.rewards.append(rewards)
        rollout.discounts.append(discounts)
        rollout.terminated.append(terminated.copy())
        if over.all():
            break
    return rollout


def copy_controller(config, envs, controller):
    """What the demonstrations give: observations (n, O), chunks (n, A, 1, chunk) in ±1, discounted
    returns (n,); returns (episodes,) for the log."""
    space, seen, chunks, to_go, returns = envs.single_action_space, [], [], [], []
    one_step = SimpleNamespace(**vars(config) | {"chunk": 1})
    for episode in range(config.demonstrations):
        generator = np.random.default_rng((config.seed, 0, episode))

        def act(observations):
            try:
                actions = ask_controller(config, controller, envs, observations, generator)
            except ValueError as error:
                raise RunStopped(str(error)) from None
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
    if sum(map(len, seen)) < 2:  # observations are given in standard deviations
        raise RunStopped(f"--chunk {config.chunk}: the controller's {config.demonstrations * config.envs} "
                         "episodes give fewer than 2 chunks to copy; choose another --name, and a "
                         "smaller chunk, more --demonstrations, or a controller whose episodes last longer")
    arrays = (np.concatenate(each) for each in (seen, chunks, to_go, returns))
    return [torch.as_tensor(each, dtype=torch.float32) for each in arrays]
