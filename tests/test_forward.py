"""Claims about forward-process RL: its two losses, and that a run of it is a run like ddpo.py's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scripts import numbers
from stable_diffusion import save_pipeline

import forward
from forward import Config, awm_loss, matching_error, nft_loss, old_decay, optimality
from run_folder import load_checkpoint, read_metrics
from sample import ddim_table, load_pipeline, noised

ROOT = Path(__file__).parents[1]
KINDS = ["epsilon", "v_prediction", "sample", "flow"]
LOSSES = {"nft": nft_loss, "awm": awm_loss}
SMALL = dict(
    reward="compress", watch="", preset="emoji", images=8, sample_batch=4, train_batch=4, steps=3,
    epochs=2, eval_every=1, eval_images=2, group_size=4, updates=2, inner_epochs=2, lr=1e-3, warmup=0,
    guidance_scale=2.0, device="cpu", dtype="fp32",
)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scheduler_of(kind):
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         prediction_type=kind)


# the losses

def test_r_clips_as_published():
    advantages = torch.tensor([-7.0, -5.0, -2.5, 0.0, 1.0, 5.0, 9.0])
    expected = torch.tensor([0, 0, 0.25, 0.5, 0.6, 1, 1])
    torch.testing.assert_close(optimality(advantages, 5.0), expected)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_is_a_linear_advantage_term_and_a_trust_region(beta):
    output, old, target = draw(3, 5, 4, 8, 8)
    r = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64)
    e, delta = old - target, output - old

    def mean(x):
        return x.flatten(1).mean(1)

    linear, trust_region = 2 * (2 * r - 1) * mean(e * delta), beta * mean(delta**2)
    expected = mean(e**2) / beta + linear + trust_region
    actual = nft_loss(output, old, target, r, beta)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_nft_is_that_of_x_0_with_each_branch_divided_by_its_error(kind, beta):
    """Written out in x̂_0, which is how the published code has it."""
    scheduler, timesteps = scheduler_of(kind), torch.tensor([20, 400, 700, 990])
    clean, noise, output, old = draw(4, 4, 4, 8, 8, seed=1)
    r = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    noisy, target, slope = noised(scheduler, clean, noise, timesteps)
    if kind == "flow":
        signal, sigma = 1 - timesteps / 1000, timesteps / 1000
    else:
        alpha_bar = scheduler.alphas_cumprod[timesteps]
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    signal, sigma = signal.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    denoise = {
        "epsilon": lambda o: (noisy - sigma * o) / signal,
        "v_prediction": lambda o: signal * noisy - sigma * o,
        "sample": lambda o: o,
        "flow": lambda o: noisy - sigma * o,
    }[kind]

    def normalised(v):
        error = denoise(v) - clean
        return error.square().mean((1, 2, 3)) / error.abs().mean((1, 2, 3))

    positive = normalised((1 - beta) * old + beta * output)
    negative = normalised((1 + beta) * old - beta * output)
    expected = (r * positive + (1 - r) * negative) / beta
    actual = nft_loss(output, old, target, r, beta, slope)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)  # ᾱ is float32


def network():
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(6, 4, 3, padding=1))
    return torch.nn.Sequential(*layers).double()


def gradient(loss, net):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss.sum(), [*net.parameters()])])


@pytest.mark.parametrize("slope", [None, torch.tensor([0.1, 1.0, 14.0])])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_advantage_the_gradient_at_the_old_weights_is_exactly_0(loss, slope):
    net, (x, target) = network(), draw(2, 3, 4, 8, 8)
    old, half = net(x).detach(), torch.full((3,), 0.5)

    def of(r):
        return gradient(LOSSES[loss](net(x), old, target, r, beta=0.5, slope=slope), net)

    assert not of(half).any() and of(half + 0.1).any()
    assert gradient(matching_error(net(x), target, slope), net).any()  # RWR's, with all weights 1


@pytest.mark.parametrize("slope", [None, torch.tensor([0.1, 1.0, 14.0, 2.0])])
@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_the_gradient_is_the_advantage_times_that_of_the_matching_loss(loss, slope):
    net, (x, target) = network(), draw(2, 4, 4, 8, 8)
    advantages = torch.tensor([-1.0, -0.3, 0.2, 1.0], dtype=torch.float64)
    expected = gradient(advantages * matching_error(net(x), target, slope), net)
    old, r = net(x).detach(), advantages / 2 + 0.5
    actual = gradient(LOSSES[loss](net(x), old, target, r, beta=0.3, slope=slope), net)
    torch.testing.assert_close(actual, expected)


def test_awm_stops_where_its_ratio_leaves_the_clip_range_and_its_trust_region_does_not():
    target, old = torch.zeros(2, 1, 1, 1), torch.full((2, 1, 1, 1), 0.5)
    r = torch.tensor([1.0, 0.0])
    output = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1).requires_grad_()  # both have moved as they should
    ratio = torch.exp(torch.tensor([0.25 - 0.01, 0.25 - 0.81]))
    loss = awm_loss(output, old, target, r, beta=0.0, clip_range=2.0)
    torch.testing.assert_close(loss, torch.stack([-ratio[0], ratio[1]]))
    loss = awm_loss(output, old, target, r, beta=0.5, clip_range=0.1)
    torch.testing.assert_close(loss, torch.tensor([-1.1, 0.9]) + 0.5 * 0.4**2)
    slope = torch.autograd.grad(loss.sum(), output)[0].flatten()
    torch.testing.assert_close(slope, torch.tensor([-0.4, 0.4]))


@pytest.mark.parametrize("kind", KINDS)
def test_noised_pictures_and_targets_are_those_of_diffusers(kind):
    scheduler, (clean, noise) = scheduler_of(kind), draw(2, 3, 4, 8, 8).float()
    if kind == "flow":
        timesteps = scheduler.timesteps[[5, 300, 999]]
        expected = scheduler.scale_noise(clean, timesteps, noise), noise - clean
    else:
        timesteps, reference = torch.tensor([0, 500, 999]), DDPMScheduler.from_config(scheduler.config)
        velocity = reference.get_velocity(clean, noise, timesteps)
        target = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[kind]
        expected = reference.add_noise(clean, noise, timesteps), target
    noisy, target, slope = noised(scheduler, clean, noise, timesteps)
    torch.testing.assert_close((noisy, target), expected)
    assert slope.shape == (3,) and (slope > 0).all()


def test_a_flow_matching_model_is_one_whatever_else_its_configuration_says():
    """Some files name a prediction_type, too, which such a scheduler ignores."""
    scheduler = scheduler_of("flow")
    odd = type(scheduler).from_config(dict(scheduler.config) | {"prediction_type": "epsilon"})
    clean, noise = draw(2, 3, 4, 8, 8).float()
    timesteps = scheduler.timesteps[[5, 300, 999]]
    expected = noised(scheduler, clean, noise, timesteps)
    torch.testing.assert_close(noised(odd, clean, noise, timesteps), expected)
    torch.testing.assert_close(ddim_table(odd, 10)[1], ddim_table(scheduler, 10)[1])


def test_the_old_weights_follow_as_published():
    decays = [old_decay(updates, 0, 0.001, 0.5) for updates in (0, 100, 499, 5000)]
    assert decays == pytest.approx([0, 0.1, 0.499, 0.5])
    decays = [old_decay(updates, 75, 0.0075, 0.999) for updates in (10, 75, 95, 5000)]
    assert decays == pytest.approx([0, 0, 0.15, 0.999])


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_both_reach_the_known_optimum_of_a_toy(loss, beta):
    """Pictures are points of N(0, I) in the plane, and 2r − 1 = ⟨c, x_0⟩: the optimum is N(c/β, I).

    Its flow is that of N(0, I) minus t (c/β) / ((1 − t)² + t²), whatever x_t: a bias for each t.
    """
    c, times = torch.tensor([0.04, -0.02]), torch.linspace(0.1, 0.9, 9)
    t, bias = times.view(9, 1, 1), torch.zeros(9, 2, requires_grad=True)
    clean, noise = torch.randn(2, 9, 10000, 2, generator=torch.Generator().manual_seed(0))
    clean, noise = torch.cat([clean, -clean], 1), torch.cat([noise, -noise], 1)
    noisy, target, r = (1 - t) * clean + t * noise, noise - clean, clean @ c / 2 + 0.5
    old = (2 * t - 1) / ((1 - t)**2 + t**2) * noisy
    optimizer = torch.optim.LBFGS([bias], line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        pairs = (value.flatten(0, 1) for value in (old + bias[:, None], old, target))
        total = LOSSES[loss](*pairs, r.flatten(), beta).mean()
        total.backward()
        return total

    optimizer.step(closure)
    optimum = -times[:, None] * (c / beta) / ((1 - times)**2 + times**2)[:, None]
    torch.testing.assert_close(bias.detach(), optimum, rtol=0.05, atol=0.002)


# runs

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def first(model):
    """The weights of the model before training, as one vector."""
    return torch.cat([p.flatten() for p in load_pipeline(model, "cpu").unet.parameters()])


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """One small run that nothing disturbed."""
    return train(tmp_path_factory.mktemp("runs"), model=model, old_rise=0.05, kl=0.1)


def train(folder, resume=False, **settings):
    return forward.train(Config(out=str(folder), **SMALL | settings), resume)


def weights(folder, key="parameters"):
    return torch.cat([value.flatten() for value in load_checkpoint(folder / "checkpoint")[key]])


def test_a_run_leaves_what_a_run_of_ddpo_leaves(run, first):
    assert run.name == "compress-nft"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert {"images", "reward_mean", "reward_std", "loss", "deviation", "kl", "grad_norm", "seconds",
            "seconds_update", "images_per_second", "eval_reward"} <= set(rows[-1])
    for name in ("config.json", "rewards.png", "progress.png", "unet", "checkpoint"):
        assert (run / name).exists()
    assert not torch.equal(weights(run), first)


def test_a_run_that_is_interrupted_ends_with_the_same_numbers(run, model, tmp_path, first):
    """Also the weights v_old, which trail the new ones with a decay that rises with each update."""
    settings = dict(model=model, old_rise=0.05, kl=0.1)
    folder = train(tmp_path, **settings, epochs=1)
    old = weights(folder, "old")
    torch.testing.assert_close(old, 0.2 * first + 0.8 * weights(folder))  # 4 updates an epoch
    train(tmp_path, resume=True, **settings)
    torch.testing.assert_close(weights(folder, "old"), 0.4 * old + 0.6 * weights(folder))
    assert numbers(folder) == numbers(run)
    for key in ("parameters", "old"):
        assert torch.equal(weights(folder, key), weights(run, key))


@pytest.mark.parametrize("loss", LOSSES)
def test_without_advantages_a_run_does_not_move_the_model(model, tmp_path, loss, first):
    """Exactly: the gradient is 0, and so is each of Adam's steps."""
    folder = train(tmp_path, model=model, loss=loss, advantages="zero", weight_decay=0.0,
                   weighting="adaptive", epochs=1, steps=2)
    assert torch.equal(weights(folder), first)
    assert numbers(folder)[1]["grad_norm"] == 0 == numbers(folder)[1]["deviation"]


def test_two_processes_train_like_one(model, tmp_path):
    settings = SMALL | dict(model=model, out=str(tmp_path), epochs=1, loss="awm", lr=1e-4,
                            sample_batch=2, train_batch=2)
    words = [word for key, value in settings.items()
             for word in ("--" + key.replace("_", "-"), str(value))]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    split = subprocess.Popen([sys.executable, *torchrun, "forward.py", *words, "--name", "split"],
                             cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    whole = forward.train(Config(**settings, name="whole"))
    out, err = split.communicate(timeout=300)
    assert split.returncode == 0, err
    assert out.splitlines()[-1].startswith("next: python sample.py")
    difference = (weights(whole) - weights(tmp_path / "split")).abs()
    assert difference.max() <= 1e-5 and difference.mean() <= 1e-7
    one, two = (numbers(folder)[1] for folder in (whole, tmp_path / "split"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert one["reward_mean"] == two["reward_mean"]


def save_flow_pipeline(folder):
    """The tiny pipeline, as a flow-matching model."""
    save_pipeline(folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.mark.parametrize("kind, settings", [
    ("epsilon", dict(reward="compress:0.5,incompress:0.1", lora_rank=2, kl=0.1)),
    ("v_prediction", dict(weighting="adaptive", guidance_scale=1.0, dtype="bf16", eta=0.0)),
    ("flow", dict(train_guidance=False, loss="awm")),
])
def test_mixtures_adapters_and_other_families_train_too(tmp_path, kind, settings):
    model = tmp_path / "model"
    model = save_flow_pipeline(model) if kind == "flow" else save_pipeline(model, kind)
    folder = train(tmp_path, model=model, **settings, epochs=1, steps=2)
    row = numbers(folder)[1]
    assert row["grad_norm"] > 0 and row["deviation"] > 0 and weights(folder).isfinite().all()


# what cannot work

@pytest.mark.parametrize("arguments, names", [
    (["--loss", "ddpo"], "nft, awm"),
    (["--weighting", "equal"], "none, adaptive"),
    (["--advantages", "prompt"], "group, zero"),
    (["--beta", "-0.1"], "--beta"),
    (["--beta", "nan"], "--beta nan"),
    (["--clip-range", "-1"], "--clip-range"),
    (["--kl", "-1"], "--kl"),
    (["--advantage-clip", "0"], "--advantage-clip"),
    (["--old-ceiling", "1"], "--old-ceiling"),
    (["--old-rise", "-1"], "--old-rise"),
    (["--old-rise", "inf"], "finite"),
    (["--group-size", "1"], "at least 2 pictures"),
    (["--updates", "5"], "multiple of"),
    (["--eta", "-0.5"], "--eta"),
    (["--algorithm", "sf"], "unrecognized arguments"),
    (["--resume", "DDPO"], "not that of a run of forward.py"),
])
def test_what_cannot_work_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, arguments, names):
    (tmp_path / "ddpo").mkdir()
    ddpo_config = {"algorithm": "sf", "clip_range": 1e-4}
    (tmp_path / "ddpo/config.json").write_text(json.dumps(ddpo_config))
    arguments = [str(tmp_path / "ddpo") if word == "DDPO" else word for word in arguments]
    if arguments[0] != "--resume":  # should a check fail, what starts ends soon
        arguments += ["--out", str(tmp_path / "runs"), "--epochs", "1", "--steps", "2"]
    with pytest.raises(SystemExit) as stop:
        forward.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and names in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_every_preset_has_settings_that_can_work():
    for preset in forward.PRESETS:
        arguments = ["--preset", preset, "--device", "cpu"]
        config = forward.check(forward.parse_config(arguments)[0])
        assert isinstance(config, Config) and config.images % (config.updates * config.group_size) == 0


def test_each_pass_over_the_pictures_has_other_steps_and_other_noise(model, tmp_path, monkeypatch):
    seen, real = [], forward.noised

    def recording(scheduler, *inputs):
        seen.append(inputs)
        return real(scheduler, *inputs)

    monkeypatch.setattr(forward, "noised", recording)
    forward.train(Config(model=model, out=str(tmp_path), **SMALL | dict(epochs=1)))
    clean, noise, t = (torch.cat(each) for each in zip(*seen))
    assert len(noise.flatten(1).unique(dim=0)) == len(noise) == 8 * 2
    for picture in clean.unique(dim=0):
        assert len(t[(clean == picture).flatten(1).all(1)].unique()) == 2


def test_pictures_are_sampled_with_the_old_weights(model, tmp_path, monkeypatch):
    sampled, real = [], forward.collect

    def recording(run, epoch):
        sampled.append([p.detach().clone() for p in run.parameters])
        return real(run, epoch)

    monkeypatch.setattr(forward, "collect", recording)
    folder = forward.train(Config(model=model, out=str(tmp_path), **SMALL | dict(old_rise=0.05)))
    saved = torch.load(folder / "checkpoint/epoch_000001.pt", weights_only=True)
    assert all(map(torch.equal, sampled[1], saved["old"]))
    assert not all(map(torch.equal, sampled[1], saved["parameters"]))


def test_the_clip_range_and_the_weighting_of_the_settings_count(model, tmp_path):
    def weights(name, **settings):
        config = Config(model=model, out=str(tmp_path), name=name, **SMALL | dict(epochs=1) | settings)
        saved = load_checkpoint(forward.train(config) / "checkpoint")
        return torch.cat([p.flatten() for p in saved["parameters"]])

    wide, narrow = (weights(f"clip{c}", loss="awm", clip_range=c) for c in (1.0, 1e-6))
    adaptive, none = (weights(kind, weighting=kind) for kind in ("adaptive", "none"))
    assert not torch.equal(wide, narrow) and not torch.equal(adaptive, none)


def test_the_largest_advantage_of_a_mixture_counts_its_negative_weights(model, tmp_path, monkeypatch):
    largest, real = [], forward.optimality
    monkeypatch.setattr(forward, "optimality", lambda a, clip: largest.append(clip) or real(a, clip))
    settings = SMALL | dict(reward="compress:2,incompress:-1", epochs=1, advantage_clip=4.0)
    forward.train(Config(model=model, out=str(tmp_path), name="mix", **settings))
    assert largest == [4.0 * 3]
