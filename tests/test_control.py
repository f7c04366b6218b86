"""Claims about the two control loops: their worlds, their gradients and critic, runs that learn, are
killed or cannot work."""

import json
import math
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import control
import control_loop
from control import reward_of
from control_loop import gae, policy_table
from control_policy import (EVALUATION, Denoiser, apply_gradients, denoising_loss, noise_schedule,
                            pretrain, sample_chain)
from control_worlds import (RADIUS, SCALE, SHAPE, clearance, copy_controller, demonstrate,
                            draw_scene, draw_scenes, judge, load_controller, make_envs,
                            paths_of, pendulum_controller, play, reset)
from ddpo import clip_range_for, is_loss
from run_folder import load_checkpoint, read_metrics
from scripts import finish, flags, learning_rates, numbers, start
from sample import ddim_step, ddim_table
from processes import RunStopped, seeded

ROOT = Path(__file__).parents[1]
PLANS = dict(pretrain=20, epochs=3, scenes=4, group_size=4, batch=8, steps=4, eval_every=2,
             eval_scenes=2)
LOOP = dict(pretrain=20, epochs=3, envs=3, demonstrations=1, steps=3, train_last=2, passes=1,
            decisions=20, eval_every=2)


# plans


def scene(start=(-1, 0), goal=(1, 0), pillars=((-0.4, 0), (0.4, 0))):
    return torch.tensor([[*start, *goal, *pillars[0], *pillars[1]]], dtype=torch.float32)


def plan(points):
    """Latents of a path whose 16 waypoints lie evenly on the line through points, start first."""
    points = np.array(points, dtype=float)
    at = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    even = np.linspace(0, at[-1], SHAPE[-1] + 1)[1:]
    xy = np.stack([np.interp(even, at, points[:, i]) for i in (0, 1)])
    return SCALE * torch.tensor(xy, dtype=torch.float32)[None, :, None]


def test_clearance_is_that_of_a_dense_path():
    generator = seeded(0)
    paths = 2 * torch.rand(200, 6, 2, generator=generator) - 1
    paths[0, 2] = paths[0, 1]  # a segment of length 0
    pillars = 2 * torch.rand(200, 3, 2, generator=generator) - 1
    share = torch.linspace(0, 1, 2001)[:, None]
    dense = paths[:, :-1, None] * (1 - share) + paths[:, 1:, None] * share  # (200, 5, 2001, 2)
    nearest = torch.cdist(dense.flatten(1, 2), pillars).amin((1, 2))
    torch.testing.assert_close(clearance(paths, pillars), nearest - RADIUS, atol=1e-3, rtol=0)


@pytest.mark.parametrize("points, success, length, roughness, route", [
    ([(-1, 0), (1, 0)], 0, 1, 0, None),  # through both pillars
    ([(-1, 0), (-1, 0.5), (1, 0.5), (1, 0)], 1, 1.5, 0.2652, 3),  # above both
    ([(-1, 0), (-1, -0.5), (1, -0.5), (1, 0)], 1, 1.5, 0.2652, 0),  # below both
    ([(-1, 0), (-1, 0.5), (1, 0.5), (1, 0.14)], 0, 1.43, None, 3),  # stops short
    ([(-1, 0), (-1, 0.5), (1, 0.5), (1, 0.1)], 1, 1.45, None, 3),  # near enough
    ([(-1, 0), (-0.4, 0.6), (0, 0), (0.4, -0.6), (1, 0)], 1, None, None, 1),  # over, under
    ([(-1, 0), (-0.4, -0.6), (0, 0), (0.4, 0.6), (1, 0)], 1, None, None, 2),
])
def test_hand_made_plans_are_judged_as_they_look(points, success, length, roughness, route):
    seen = judge(scene(), plan(points))
    assert seen["success"].item() == success
    if length is not None:  # the corners between two waypoints are cut
        assert seen["length"].item() == pytest.approx(length, abs=0.06)
    if roughness is not None:
        corners = 2 * math.sqrt(2) * 3 / 16 / 2  # a right angle turns a step by √2 of its length
        assert seen["roughness"].item() == pytest.approx(corners if roughness else 0, abs=0.05)
    if route is not None:
        assert seen["route"].item() == route


def test_the_reward_of_a_straight_free_path_is_1_and_its_parts_add_up():
    free = scene(pillars=((-0.4, 0.8), (0.4, 0.8)))
    seen = judge(free, plan([(-1, 0), (1, 0)]))
    assert reward_of(seen, control.Config()).item() == pytest.approx(1, abs=1e-5)
    seen = {"success": torch.tensor([1.0]), "length": torch.tensor([1.5]),
            "roughness": torch.tensor([2.0])}
    config = control.Config(length=0.4, roughness=0.1)
    assert reward_of(seen, config).item() == pytest.approx(1 - 0.4 * 0.5 - 0.1 * 2)


def test_held_out_goals_and_pillars_never_stand_where_those_of_training_do():
    def strips(scenes, columns):
        place = (scenes[:, columns].flatten() + 1) * 10
        inside = (place - place.round()).abs() > 1e-4  # rounding moves a point on an edge
        return set(place[inside].floor().int().tolist())

    trained, goals, pillars = (draw_scenes(4000, seeded(0), *held_out)
                               for held_out in control.VIEWS.values())
    assert len(strips(trained, [3])) == 8 and len(strips(trained, [5, 7])) == 4
    assert not strips(trained, [3]) & strips(goals, [3])
    assert strips(trained, [5, 7]) == strips(goals, [5, 7])
    assert not strips(trained, [5, 7]) & strips(pillars, [5, 7])


def test_the_planner_takes_every_route_and_fails_now_and_then():
    scenes = draw_scenes(2000, seeded(0))
    seen = judge(scenes, demonstrate(scenes, seeded(1)))
    assert 0.65 < seen["success"].mean() < 0.85
    assert (seen["route"].bincount(minlength=4) / 2000 > 0.2).all()
    assert (seen["length"] > 0.95).all() and 1.1 < seen["length"].mean() < 1.4


# the policy


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_a_step_has_the_density_of_a_normal_whose_sigma_has_the_floor(policy):
    config = control_loop.Config(policy=policy, min_sigma=0.3, sigma=0.25)
    _, table = policy_table(config)
    assert table[:, 2].min() == pytest.approx(0.25 if policy == "gaussian" else 0.3)
    output, x = torch.randn(2, 5, 2, 1, 4, generator=seeded(0))
    for row in table:
        x_next, log_prob = ddim_step(output, x, row, generator=seeded(1))
        normal = torch.distributions.Normal(row[0] * x + row[1] * output, row[2])
        expected = normal.log_prob(x_next).flatten(1).mean(1)
        torch.testing.assert_close(log_prob, expected, atol=1e-5, rtol=1e-5)


def test_the_policy_gradient_of_a_one_step_plan_is_its_closed_form():
    """Plans x = θ + σ z with r = −mean_D (x − g)²: ∇_θ E[r] = −2 (θ − g) / D. log_prob is a mean
    over D, so the loss's gradient is that divided by D."""
    n, target, sigma = 400_000, torch.tensor([0.5, -1.0]), 0.4
    theta = torch.tensor([0.2, 0.3], requires_grad=True)
    row = torch.tensor([0.0, 1.0, sigma, math.log(sigma)])
    output = theta.view(1, 2, 1, 1).expand(n, -1, -1, -1)
    plans, old = ddim_step(output.detach(), torch.zeros(n, 2, 1, 1), row, generator=seeded(0))
    reward = -(plans.flatten(1) - target).square().mean(1)
    _, log_prob = ddim_step(output, torch.zeros(n, 2, 1, 1), row, plans)
    assert torch.equal(log_prob, old)
    loss = is_loss(log_prob, old, reward - reward.mean(), clip_range_for(1e-4, (2, 1, 1)))
    loss.mean().backward()
    closed_form = -2 * (theta.detach() - target) / 2  # of the expected reward
    torch.testing.assert_close(-2 * theta.grad, closed_form, atol=0.01, rtol=0)


def test_pretraining_learns_what_it_is_shown_and_the_chain_draws_it():
    """Two places to go, told apart by the condition alone."""
    torch.manual_seed(0)
    model = Denoiser((1, 1, 2), condition=1, width=64)
    scheduler = noise_schedule()

    def loss_of(generator):
        condition = torch.randint(2, (256, 1), generator=generator) * 2.0 - 1
        clean = condition.view(-1, 1, 1, 1) * torch.tensor([1.0, -0.5])
        return denoising_loss(model, clean, condition, scheduler, generator)

    pretrain(model, loss_of, 400, seeded(1))
    condition = torch.tensor([[1.0], [-1.0]]).repeat(50, 1)
    timesteps, table = ddim_table(noise_schedule(), 10)
    chain, log_probs = sample_chain(model, condition, (1, 1, 2), timesteps, table, seeded(2))
    assert chain.shape == (100, 11, 1, 1, 2) and log_probs.shape == (100, 10)
    wanted = condition * torch.tensor([1.0, -0.5])
    assert (chain[:, -1].flatten(1) - wanted).abs().mean() < 0.15


# the closed loop


class Countdown(gymnasium.Env):
    """Time runs: each step earns 1 + action, and the episode ends after `lives` steps, for good or
    by the time limit."""

    observation_space = gymnasium.spaces.Box(-100, 100, (2,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        self.lives = self.lives if seed is None else 3 + seed % 4  # 3 to 6; None: autoreset
        self.time = 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.time, self.lives], dtype=np.float32)

    def step(self, action):
        self.time += 1
        return self.observe(), 1.0 + float(action[0]), self.time >= self.lives, False, {}


if "Countdown-v0" not in gymnasium.registry:  # this file is also a controller's, below
    gymnasium.register("Countdown-v0", entry_point=Countdown, max_episode_steps=5)
GAMMA = 0.9


def countdown(observations, generator):
    return np.zeros((len(observations), 1))


def played(chunk, act=lambda observations: (np.zeros((len(observations), 1, 4)), None)):
    config = control_loop.Config(task="Countdown-v0", envs=16, chunk=chunk, gamma=GAMMA)
    cut = lambda observations: (act(observations)[0][:, :, :chunk], None)
    return play(make_envs(config), config, (0,), cut)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_an_episode_in_chunks_is_one_step_by_step(chunk):
    rollout = played(chunk)
    lives = rollout.observations[0][:, 1]
    assert set(lives) == {3, 4, 5, 6}
    steps = np.minimum(lives, 5)  # 5 is the time limit
    assert rollout.returns.tolist() == steps.tolist() and rollout.env_steps == steps.sum()
    for d, alive in enumerate(rollout.alive):
        assert alive.tolist() == (d * chunk < steps).tolist()
        for i in np.flatnonzero(alive):
            count = int(min(chunk, steps[i] - d * chunk))
            assert rollout.rewards[d][i] == pytest.approx(sum(GAMMA**k for k in range(count)))
            assert rollout.discounts[d][i] == pytest.approx(GAMMA**count)
            assert rollout.next_observations[d][i].tolist() == [d * chunk + count, lives[i]]
            ended = d * chunk + count == lives[i]
            assert rollout.terminated[d][i] == ended


def test_actions_are_scaled_to_the_task_and_clipped():
    act = lambda observations: (np.full((len(observations), 1, 4), 3.0), None)
    rollout = played(4, act)
    assert rollout.returns.tolist() == (3 * np.minimum(rollout.observations[0][:, 1], 5)).tolist()


def value(observations, limit=math.inf):
    """Of Countdown at action 0: V = (1 − γ^left) / (1 − γ)."""
    time, lives = np.moveaxis(np.asarray(observations, dtype=np.float64), -1, 0)
    return torch.tensor((1 - GAMMA ** (lives - time)) / (1 - GAMMA))


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_a_critic_that_is_right_finds_nothing_better_or_worse_than_expected(chunk, gae_lambda):
    """An end by the time limit is none: what would have followed is the critic's to say."""
    rollout = played(chunk)
    alive, discounts, rewards, terminated = (
        torch.tensor(np.array(getattr(rollout, name)), dtype=torch.float64)
        for name in ("alive", "discounts", "rewards", "terminated"))
    next_values = value(rollout.next_observations) * (1 - terminated)
    advantages = gae(rewards, discounts, value(rollout.observations), next_values, alive, gae_lambda)
    assert advantages.abs().max() < 1e-9 and terminated.any() and not terminated[-1].all()


def test_gae_is_the_sum_of_its_paper_and_its_ends_are_td_and_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.rand(3, 6, 2, generator=generator, dtype=torch.float64)
    next_values[:-1] = values[1:]
    discounts, alive = torch.full((6, 2), GAMMA, dtype=torch.float64), torch.ones(6, 2)
    errors = rewards + GAMMA * next_values - values
    for gae_lambda in (0.0, 0.6, 1.0):
        expected = torch.stack([sum((GAMMA * gae_lambda) ** (k - d) * errors[k]
                                    for k in range(d, 6)) for d in range(6)])
        found = gae(rewards, discounts, values, next_values, alive, gae_lambda)
        torch.testing.assert_close(found, expected)
    returns = sum(GAMMA**k * rewards[k] for k in range(6)) + GAMMA**6 * next_values[-1]
    torch.testing.assert_close(found[0], returns - values[0])


def test_a_controller_that_changes_its_observations_changes_only_a_copy():
    def clumsy(observations, generator):
        observations *= 0
        return np.zeros((len(observations), 1))

    config = control_loop.Config(task="Countdown-v0", envs=4, chunk=3)
    seen = copy_controller(config, make_envs(config), clumsy)[0]
    assert torch.equal(seen, copy_controller(config, make_envs(config), countdown)[0]) and seen.any()


def test_demonstrations_are_cut_into_chunks_that_lie_within_an_episode():
    config = control_loop.Config(task="Countdown-v0", envs=16, chunk=3, gamma=GAMMA)
    config.demonstrations = 1
    ramp = lambda observations, generator: observations[:, :1] / 5  # the time, in the task's units
    seen, chunks, to_go, returns = copy_controller(config, make_envs(config), ramp)
    assert chunks.shape == (len(seen), 1, 1, 3)
    times, lives = seen.T
    torch.testing.assert_close(chunks[:, 0, 0], (times[:, None] + torch.arange(3)) / 5 / 2)
    steps = lives.clamp(max=5)
    assert (times + 3 <= steps).all()
    first = steps[times == 0]  # one entry for each of the 16 episodes
    assert len(first) == 16 and len(seen) == (first - 2).sum()
    left = [sum(GAMMA**k * (1 + (t + k) / 5) for k in range(int(n - t)))
            for t, n in zip(times.tolist(), steps.tolist())]
    torch.testing.assert_close(to_go, torch.tensor(left), atol=1e-4, rtol=1e-4)
    assert len(returns) == 16


def test_a_critic_fitted_to_a_known_chain_knows_it():
    config = control_loop.Config(task="Countdown-v0", envs=64, chunk=1, gamma=GAMMA)
    seen, _, to_go, _ = copy_controller(config, make_envs(config), countdown)
    torch.manual_seed(0)
    critic = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))
    pretrain(critic, lambda _: (critic(seen)[:, 0] - to_go).square(), 3000, seeded(0), lr=1e-2)
    endless = seen[:, 1] <= 5  # where the time limit does not cut the episode
    with torch.no_grad():
        error = (critic(seen)[:, 0] - value(seen)).abs()[endless]
    assert error.max() < 0.15  # values lie between 1 and 4.1


def test_the_mediocre_controller_is_better_than_none_and_leaves_room():
    config = control_loop.Config(envs=16, demonstrations=1)
    returns = copy_controller(config, make_envs(config), pendulum_controller)[3]
    assert -900 < returns.mean() < -400  # doing nothing: about -1200; the best: about -150


# runs


def test_ddpo_makes_plans_better_and_the_ratio_starts_at_exactly_1(tmp_path):
    config = control.Config(out=str(tmp_path), **PLANS | dict(
        epochs=40, lr=5e-4, scenes=32, group_size=8, batch=64, eval_every=99))
    rows = read_metrics(control.train(config) / "metrics.jsonl")
    assert [row["ratio_error"] for row in rows[1:]] == [0.0] * 40
    first, last = ([row["reward_mean"] for row in part] for part in (rows[1:5], rows[-4:]))
    assert min(last) > max(first)
    assert any(row["clip_fraction"] > 0 for row in rows[1:])


def test_a_strong_divergence_weight_keeps_the_plans(tmp_path):
    settings = PLANS | dict(out=str(tmp_path), epochs=12, lr=1e-3, eval_every=99)
    free, held = (read_metrics(control.train(control.Config(name=f"kl-{kl}", kl=kl, **settings)) /
                               "metrics.jsonl") for kl in (1e-9, 3.0))
    assert held[-1]["kl"] < free[-1]["kl"] / 3


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_the_closed_loop_earns_more_and_the_ratio_starts_at_exactly_1(policy, tmp_path):
    controller = tmp_path / "mine.py"
    controller.write_text("import numpy as np\ndef idle(observations, generator):\n"
                          "    return 0.5 * generator.standard_normal((len(observations), 1))\n")
    config = control_loop.Config(
        task="Countdown-v0", controller=f"{controller}:idle", policy=policy, out=str(tmp_path),
        envs=32, chunk=2, pretrain=200, epochs=10, decisions=1, lr=2e-3)
    folder = control_loop.train(config)
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["ratio_error"] for row in rows[1:]] == [0.0] * 10
    assert rows[-1]["eval_return"] > 1.2 * rows[0]["eval_return"]
    assert (folder / "progress.png").stat().st_size > 0


@pytest.fixture
def one_thread():
    """As in the processes that `start` starts: sums are split among threads, so bits depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("script, settings", [
    ("control.py", PLANS | {"kl": 0.1}), ("control.py", PLANS | {"algorithm": "rwr"}),
    ("control_loop.py", LOOP),
    ("control.py", LOOP | {"task": "Pendulum-v1", "policy": "gaussian"})])
def test_a_run_that_is_killed_ends_with_the_same_numbers(script, settings, tmp_path, capsys,
                                                         one_thread):
    killed = start(script, name="killed", out=tmp_path, **settings)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while len(read_metrics(metrics)) < 2 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    finish(killed)
    assert len(read_metrics(metrics)) < 4  # it was killed on its way
    import_module(Path(script).stem).main(flags(name="whole", out=tmp_path, **settings))
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "whole"
    import_module(Path(script).stem).main(["--resume", str(tmp_path / "killed")])
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    states = [load_checkpoint(tmp_path / name / "checkpoint") for name in ("whole", "killed")]
    for name in ("model", "policy", "critic"):
        for key, tensor in states[0].get(name, {}).items():
            assert torch.equal(tensor, states[1][name][key])
    for name in ("progress.png", "config.json", "checkpoint/epoch_000003.pt"):
        assert (tmp_path / "whole" / name).stat().st_size > 0


@pytest.mark.parametrize("script, arguments, names", [
    (control, ["--algorithm", "ppo"], "ddpo, rwr"), (control, ["--epochs", "0"], "at least 1"),
    (control, ["--group-size", "1"], "at least 2"), (control, ["--batch", "100"], "1024"),
    (control, ["--lr", "0"], "above 0"), (control, ["--lr", "nan"], "finite"),
    (control, ["--kl", "-1"], "negative"), (control, ["--steps", "501"], "500"),
    (control, ["--algorithm", "rwr", "--kl", "1"], "--kl"), (control, ["--seed", "-1"], "negative"),
    (control, ["--name", "..", "--pretrain", "1"], "outside of --out"),
    (control, ["--name", "/tmp", "--pretrain", "1"], "outside of --out"),
    (control, ["--epochs", "many"], "--epochs"), (control, ["--reward", "x"], "--reward"),
    (control, ["--resume", "no/such/run"], "no/such/run"),
    (control, ["--resume", "LOOP"], "not that of a run of control.py"),
    (control_loop, ["--task", "Nothing-v0"], "Nothing-v0"),
    (control_loop, ["--task", "CartPole-v1"], "no bounded vector"),
    (control_loop, ["--task", "MountainCarContinuous-v0"], "--controller"),
    (control_loop, ["--controller", "none.py:f"], "no such file"),
    (control_loop, ["--controller", f"{__file__}:nothing"], "no function 'nothing'"),
    (control_loop, ["--controller", f"{__file__}:start"], "fails"),
    (control_loop, ["--controller", f"{Path(__file__).parents[1] / 'README.md'}:f"], "cannot be imported"),
    (control_loop, ["--task", "no_such_module:Task-v0"], "gymnasium cannot make it"),
    (control_loop, ["--controller", f"{__file__}:countless"], "shape"),
    (control_loop, ["--controller", f"{__file__}:boundless"], "finite"),
    (control_loop, ["--controller", f"{__file__}:wordy"], "fails"),
    (control_loop, ["--policy", "beta"], "diffusion, gaussian"),
    (control_loop, ["--task", ".x:y"], "gymnasium cannot make it"),
    (control, ["--algorithm", "rwr", "--batch", "1"], "at least 2"),
    (control, ["--scenes", "99999999999"], "at most 1000000"), (control, ["--kl", "1e40"], "at most 1e12"),
    (control_loop, ["--train-last", "11"], "--steps 10"), (control_loop, ["--gamma", "2"], "gamma"),
    (control_loop, ["--chunk", "201"], "200 steps"), (control_loop, ["--min-sigma", "0"], "above 0"),
])
def test_what_cannot_work_is_one_line_and_leaves_nothing_behind(
        script, arguments, names, tmp_path, capsys):
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/config.json").write_text(json.dumps({"reward": "compress"}))
    arguments = [str(tmp_path / "loop") if word == "LOOP" else word for word in arguments]
    if arguments[0] != "--resume":
        arguments += ["--out", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and names in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def countless(observations, generator):
    return observations


def boundless(observations, generator):
    return np.full((len(observations), 1), np.nan)


def wordy(observations, generator):
    return [["left"]] * len(observations)


def test_a_run_does_not_write_over_another_and_says_how_to_go_on(tmp_path, capsys):
    (tmp_path / "control").mkdir()
    (tmp_path / "control/config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        control.main(["--out", str(tmp_path)])
    assert stop.value.code == 2 and f"--resume {tmp_path / 'control'}" in capsys.readouterr().err


def test_a_run_whose_checkpoint_is_gone_or_that_has_more_epochs_is_refused_and_kept(tmp_path, capsys):
    control.main(flags(name="run", out=tmp_path, **PLANS))
    log = (tmp_path / "run/metrics.jsonl").read_text()
    for arguments, names in ((["--epochs", "2"], "--epochs 2: the run has 3"), ([], "checkpoint is gone")):
        with pytest.raises(SystemExit) as stop:
            control.main(["--resume", str(tmp_path / "run"), *arguments])
        assert stop.value.code == 2 and names in capsys.readouterr().err
        assert (tmp_path / "run/metrics.jsonl").read_text() == log
        shutil.rmtree(tmp_path / "run/checkpoint", ignore_errors=True)


@pytest.mark.parametrize("script, settings", [(control, PLANS), (control_loop, LOOP)])
def test_a_log_without_a_run_is_not_written_over(script, settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"epoch": 0}\n')
    with pytest.raises(SystemExit) as stop:
        script.main(flags(name="run", out=tmp_path, **settings))
    assert stop.value.code == 2 and "exists already" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"epoch": 0}\n'


def test_a_run_that_has_begun_goes_on_without_its_controllers_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def idle(observations, generator):\n    return 0 * observations[:, :1]\n")
    settings = LOOP | dict(task="Countdown-v0", controller=f"{file}:idle", chunk=2, epochs=1,
                           out=str(tmp_path))
    folder = control_loop.train(control_loop.Config(name="run", **settings))
    file.unlink()
    control_loop.main(["--resume", str(folder), "--epochs", "2"])
    assert [row["epoch"] for row in read_metrics(folder / "metrics.jsonl")] == [0, 1, 2]
    with pytest.raises(ValueError, match="no such file"):
        control_loop.prepare(control_loop.Config(name="new", **settings), False)


def test_beside_resume_the_flags_are_named_that_the_script_has(tmp_path, capsys):
    folder = control.train(control.Config(out=str(tmp_path), **PLANS | dict(epochs=1)))
    with pytest.raises(SystemExit):
        control.main(["--resume", str(folder), "--lr", "1"])
    assert capsys.readouterr().err.endswith("beside it may only be given --epochs\n")


def test_a_gradient_that_explodes_is_named_with_the_learning_rate(tmp_path, capsys):
    settings = [word for key, value in (PLANS | {"lr": 1e12}).items()
                for word in ("--" + key.replace("_", "-"), str(value))]
    with pytest.raises(SystemExit) as stop:
        control.main(["--out", str(tmp_path), *settings])
    assert "learning rate below 1e+12" in str(stop.value.code)


def test_without_gymnasium_one_sentence_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(SystemExit) as stop:
        control_loop.main(["--task", "Pendulum-v1", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "pip install gymnasium" in capsys.readouterr().err


def test_an_update_of_plans_has_the_mean_gradient_of_its_steps(tmp_path, monkeypatch):
    made, each, updates = [], [], []
    denoiser, loss, apply = control.Denoiser, control.is_loss, control.apply_gradients

    def is_loss(*inputs):
        value = loss(*inputs)
        each.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(
            value.mean(), [*made[0].parameters()], retain_graph=True)]))
        return value

    def apply_gradients(model, optimizer):
        updates.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return apply(model, optimizer)

    monkeypatch.setattr(control, "Denoiser",
                        lambda *shape, **size: made.append(denoiser(*shape, **size)) or made[-1])
    monkeypatch.setattr(control, "is_loss", is_loss)
    monkeypatch.setattr(control, "apply_gradients", apply_gradients)
    control.train(control.Config(out=str(tmp_path), **PLANS | dict(epochs=1)))
    assert len(each) == 4 * len(updates)  # PLANS has 4 steps
    torch.testing.assert_close(updates[0], sum(each[:4]) / 4, rtol=1e-4, atol=1e-7)


def test_nothing_follows_an_end_for_good_and_the_critic_says_what_follows_a_time_limit(tmp_path, monkeypatch):
    next_values, played, real, play = [], [], control_loop.gae, control_loop.play
    monkeypatch.setattr(control_loop, "play", lambda *inputs: played.append(play(*inputs)) or played[-1])
    monkeypatch.setattr(control_loop, "gae", lambda rewards, discounts, values, following, *rest:
                        next_values.append(following) or real(rewards, discounts, values, following, *rest))
    (tmp_path / "mine.py").write_text(
        "def idle(observations, generator):\n    return 0 * observations[:, :1]\n")
    control_loop.train(control_loop.Config(
        task="Countdown-v0", controller=f"{tmp_path}/mine.py:idle", out=str(tmp_path),
        **LOOP | dict(envs=16, chunk=2, epochs=1)))
    terminated = torch.tensor(np.array(played[1].terminated))  # played[0]: the first evaluation
    assert torch.equal(next_values[0] == 0, terminated) and 0 < terminated[-1].sum() < 16


def test_the_last_steps_are_trained_with_advantages_discounted_by_their_distance(tmp_path, monkeypatch):
    seen, real = [], control_loop.is_loss
    steps, taken = [], control_loop.ddim_step

    def step(output, x, row, x_next):
        steps.append(row)
        return taken(output, x, row, x_next)

    monkeypatch.setattr(control_loop, "ddim_step", step)
    monkeypatch.setattr(control_loop, "is_loss", lambda log_prob, old, advantages, clip:
                        seen.append(advantages) or real(log_prob, old, advantages, clip))
    config = control_loop.Config(out=str(tmp_path), denoising_gamma=0.5, **LOOP | dict(epochs=1))
    control_loop.train(config)
    table = control_loop.policy_table(config)[1]
    for i in range(0, len(seen), 2):
        assert torch.equal(torch.stack(steps[i:i + 2]), table[-2:])
        torch.testing.assert_close(seen[i], 0.5 * seen[i + 1])  # the last but one, and the last


def test_an_evaluation_starts_from_no_state_that_a_run_of_any_seed_trains_on():
    envs = make_envs(control_loop.Config(envs=2))
    starts = [reset(envs, *key) for seed in (0, 1, 2, 2**63 - 1)
              for key in ((seed, 0), (seed, 0, 0), (seed, 0, 1), (seed, 1))]
    assert not any(np.array_equal(reset(envs, EVALUATION, 0), start) for start in starts)
    assert np.array_equal(reset(envs, 1, 0), reset(envs, 1, 0, 0))  # which is why it has a number of its own


def test_each_demonstration_has_its_own_start_and_its_own_shaky_hand():
    config, hands = control_loop.Config(task="Countdown-v0", envs=16, chunk=1, gamma=GAMMA), []
    config.demonstrations = 3

    def controller(observations, generator):
        if (observations[:, 0] == 0).all():
            hands.append(generator.random())
        return countdown(observations, generator)

    seen, *_ = copy_controller(config, make_envs(config), controller)
    lives = seen[seen[:, 0] == 0][:, 1].view(3, 16)
    assert len({tuple(row) for row in lives.tolist()}) == len(set(hands)) == 3


def test_demonstrations_with_less_than_two_chunks_are_one_line():
    config = control_loop.Config(task="Countdown-v0", envs=1, demonstrations=1, chunk=5)
    with pytest.raises(RunStopped, match=r"--chunk 5.* 1 episodes .*more --demonstrations"):
        copy_controller(config, make_envs(config), countdown)


def test_a_kill_after_the_last_checkpoint_leaves_the_picture_of_the_last_epoch(tmp_path, monkeypatch):
    for script, settings in ((control, PLANS), (control_loop, LOOP)):
        config = script.Config(out=str(tmp_path), name=script.__name__, **settings | dict(epochs=1))
        picture, seen, real = tmp_path / script.__name__ / "progress.png", [], script.log
        monkeypatch.setattr(script, "log", lambda *row, **state: (
            seen.append(picture.exists()), real(*row, **state)))
        script.train(config)
        assert seen == [False, True]  # at the rows of epochs 0 and 1


class Brief(Countdown):
    """Once an episode is over, the next one ends at its first step."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.lives = 1 if seed is None else self.lives
        return self.observe(), {}


def test_an_episode_cut_by_the_time_limit_is_not_ended_by_the_one_after_it():
    gymnasium.register("Brief-v0", entry_point=Brief, max_episode_steps=5)
    try:
        config = control_loop.Config(task="Brief-v0", envs=16, chunk=4, gamma=GAMMA)
        rollout = play(make_envs(config), config, (0,), lambda seen: (np.zeros((len(seen), 1, 4)), None))
    finally:
        gymnasium.registry.pop("Brief-v0")
    lives = rollout.observations[0][:, 1]
    assert rollout.terminated[-1].tolist() == (lives <= 5).tolist() and (lives > 5).any()


def test_a_controller_may_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "strength_of_mine.py").write_text("STRENGTH = 3")
    (tmp_path / "mine.py").write_text("from strength_of_mine import STRENGTH\n"
                                      "def act(observations, generator): return STRENGTH\n")
    config = control_loop.Config(task="Countdown-v0", controller=f"{tmp_path}/mine.py:act")
    assert load_controller(config)(None, None) == 3


def test_an_update_follows_a_gradient_that_is_cut_to_a_norm_of_one():
    for size, moved in ((30.0, 1.0), (0.5, 0.5)):
        model = torch.nn.Linear(1, 1, bias=False)
        before, optimizer = model.weight.item(), torch.optim.SGD(model.parameters(), lr=1.0)
        model.weight.grad = torch.full((1, 1), size)
        assert apply_gradients(model, optimizer) == size
        assert before - model.weight.item() == pytest.approx(moved, rel=1e-4)


def test_pretraining_warms_up_and_ends_with_a_rate_of_nearly_0(monkeypatch):
    rates = learning_rates(monkeypatch)
    model = torch.nn.Linear(1, 1)
    pretrain(model, lambda _: model(torch.ones(1, 1)).square(), 1000, seeded(0), lr=1.0)
    assert rates == pytest.approx([min(1, (i + 1) / 100) * (1 - i / 1000) for i in range(1000)])


def test_a_picture_of_plans_has_the_successful_ones_in_green():
    axis = plt.figure().subplots()
    ways = torch.cat([plan([(-1, 0), (1, 0)]), plan([(-1, 0), (-1, 0.5), (1, 0.5), (1, 0)])])
    draw_scene(axis, scene()[0], ways, judge(scene().expand(2, -1), ways)["success"])
    start, through, above = axis.get_lines()
    assert (through.get_color(), above.get_color()) == ("C3", "C2")
    assert max(through.get_ydata()) == 0 and max(above.get_ydata()) == pytest.approx(0.5, abs=0.05)
    assert len(axis.patches) == 3  # two pillars and the goal
    plt.close(axis.figure)


def test_a_chain_begins_with_noise_of_the_spread_that_is_asked_for():
    model, condition = Denoiser((1, 1, 2), condition=1, width=4), torch.zeros(2000, 1)
    timesteps, table = ddim_table(noise_schedule(), 2)
    for spread in (0.0, 0.5, 1.0):
        chain, _ = sample_chain(model, condition, (1, 1, 2), timesteps, table, seeded(0), spread)
        assert chain[:, 0].std().item() == pytest.approx(spread, rel=0.05)


def test_the_planner_goes_from_start_to_goal_in_even_steps():
    scenes = draw_scenes(2000, seeded(0))
    steps = paths_of(scenes, demonstrate(scenes, seeded(1)))[..., 0].diff(dim=1).mean(0)
    torch.testing.assert_close(steps, torch.full((16,), 2 / 16), rtol=0, atol=0.005)


def test_a_row_that_is_later_than_the_checkpoint_is_written_anew(tmp_path, one_thread):
    control.main(flags(name="run", out=tmp_path, **PLANS))
    whole = numbers(tmp_path / "run")
    (tmp_path / "run/checkpoint/epoch_000003.pt").unlink()  # a kill between the two
    control.main(["--resume", str(tmp_path / "run")])
    assert numbers(tmp_path / "run") == whole


def test_pretraining_asks_at_all_timesteps_for_the_velocity():
    told, scheduler = [], noise_schedule()

    def model(x, timesteps, clean):
        told.extend(timesteps.tolist())
        alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (x - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean

    clean = torch.randn(4000, 2, 1, 3, generator=seeded(0))
    assert denoising_loss(model, clean, clean, scheduler, seeded(1)).max() < 1e-4
    assert min(told) < 10 and max(told) > 990 and abs(np.mean(told) - 499.5) < 20


def test_a_position_is_told_by_waves_of_one_and_of_two_periods():
    seen = []
    model = Denoiser((1, 1, 2), condition=1, width=4, frequencies=2)
    model.input.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -4:]))
    for position in (-0.3, 0.8):
        model(torch.zeros(1, 1, 1, 2), torch.tensor([5]), torch.tensor([[position]]))
        waves = [wave(k * math.pi * position) for k in (1, 2) for wave in (math.sin, math.cos)]
        torch.testing.assert_close(seen[-1], torch.tensor(waves))


def custom(monkeypatch, **parts):
    """A task like Countdown, with other parts."""
    task = type("Custom", (Countdown,), parts)
    spec = gymnasium.envs.registration.EnvSpec("Custom-v0", entry_point=task, max_episode_steps=5)
    monkeypatch.setitem(gymnasium.registry, "Custom-v0", spec)


@pytest.mark.parametrize("low, high, dtype", [
    (0, 10, np.int32), (-100, 100, np.int8), (0, 0, np.float32), (-3e38, 3e38, np.float32)])
def test_actions_that_cannot_be_scaled_are_refused(low, high, dtype, monkeypatch):
    custom(monkeypatch, action_space=gymnasium.spaces.Box(low, high, (1,), dtype))
    with pytest.raises(ValueError, match="no bounded vector of real numbers"):
        make_envs(control_loop.Config(task="Custom-v0"))


def test_no_action_leaves_its_bounds_by_rounding(monkeypatch):
    space, taken = gymnasium.spaces.Box(-0.4, -0.1, (1,)), []

    def step(self, action):
        taken.append(action)
        return self.observe(), 0.0, False, False, {}

    custom(monkeypatch, action_space=space, step=step)
    config = control_loop.Config(task="Custom-v0", envs=1)
    act = lambda seen: (np.array([[[-2, -1, 1, 2]]], np.float32), None)
    play(make_envs(config), config, (0,), act)
    assert all(space.contains(action) for action in taken) and space.low in taken and space.high in taken


@pytest.mark.parametrize("name, part, names", [
    ("__init__", lambda self: {}["x"], "cannot make it"),
    ("reset", lambda self, seed=None, options=None: options["start"], "mend its reset or step"),
    ("reset", lambda self: None, "mend its reset or step"),  # as gym had it, as are the next two
    ("reset", lambda self, seed=None, options=None: np.zeros(2, np.float32), "mend its reset or step"),
    ("step", lambda self, action: (self.observe(), 0.0, False, {}), "mend its reset or step")])
def test_a_task_that_fails_at_once_is_one_line(name, part, names, monkeypatch, tmp_path, capsys):
    custom(monkeypatch, **{name: part})
    with pytest.raises(SystemExit) as stop:
        control_loop.main(flags(task="Custom-v0", controller=f"{__file__}:countdown", out=tmp_path / "runs"))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and err.startswith("--task Custom-v0: ") and names in err, err
    assert len(err.splitlines()) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("observation, reward", [(np.nan, 0.0), (0.0, np.nan), (0.0, -np.inf)])
def test_a_task_whose_numbers_are_not_finite_is_named(observation, reward, monkeypatch):
    def step(self, action):
        return np.full(2, observation, dtype=np.float32), reward, True, False, {}

    custom(monkeypatch, step=step)
    config = control_loop.Config(task="Custom-v0", envs=2)
    with pytest.raises(RunStopped, match="--task Custom-v0: an observation or a reward"):
        copy_controller(config, make_envs(config), countdown)


def test_a_number_that_never_changes_in_the_demonstrations_keeps_its_unit(monkeypatch, tmp_path):
    custom(monkeypatch, observe=lambda self: np.array([self.time, 0.1], dtype=np.float32))
    folder = control_loop.train(control_loop.Config(
        task="Custom-v0", controller=f"{__file__}:countdown", out=str(tmp_path), **LOOP | dict(epochs=1)))
    assert load_checkpoint(folder / "checkpoint")["std"][1] == 1


def test_a_task_without_a_time_limit_is_told_how_to_get_one(monkeypatch):
    custom(monkeypatch)
    gymnasium.registry["Custom-v0"].max_episode_steps = None
    with pytest.raises(ValueError, match="register it with max_episode_steps"):
        make_envs(control_loop.Config(task="Custom-v0"))


def test_all_decisions_of_an_epoch_count_alike_where_few_episodes_are_long(tmp_path, monkeypatch):
    gradients, real = [], control_loop.is_loss

    def is_loss(*inputs):
        loss = real(*inputs)
        loss.register_hook(gradients.append)  # the weights of its decisions
        return loss

    monkeypatch.setattr(control_loop, "is_loss", is_loss)
    control_loop.train(control_loop.Config(
        task="Countdown-v0", controller=f"{__file__}:countdown", out=str(tmp_path),
        **LOOP | dict(envs=16, chunk=1, epochs=1, decisions=1, train_last=1)))
    weights = torch.stack(gradients)
    assert (weights == 0).any() and len(weights[weights > 0].unique()) == 1


def test_a_task_whose_observations_have_changed_does_not_go_on(monkeypatch, tmp_path):
    custom(monkeypatch)
    folder = control_loop.train(control_loop.Config(
        task="Custom-v0", controller=f"{__file__}:countdown", out=str(tmp_path), **LOOP | dict(epochs=1)))
    custom(monkeypatch, observation_space=gymnasium.spaces.Box(-9, 9, (3,)),
           observe=lambda self: np.zeros(3, np.float32))
    with pytest.raises(SystemExit, match="networks of another size"):
        control_loop.main(["--resume", str(folder), "--epochs", "2"])
