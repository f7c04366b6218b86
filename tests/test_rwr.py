"""Claims about reward-weighted regression: its weights, its loss, and that a run of it is a run like
any other."""

import json
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

import ddpo
import rwr
import scripts
from scripts import finish, flags, numbers
from run_folder import load_checkpoint, read_metrics
from rwr import Config, denoising_loss, exp_weights, sparse_weights, weigh
from sample import encode_prompts, load_pipeline
from stable_diffusion import small_model

ROOT = Path(__file__).parents[1]
SMALL = dict(
    model=small_model(), preset="emoji", images=8, sample_batch=4, train_batch=4, steps=3, epochs=2,
    eval_images=2, eval_every=2, group_size=4, watch="", updates=2, inner_epochs=2, lora_rank=8,
    lr=3e-3, warmup=0, device="cpu",
)


start = partial(scripts.start, "rwr.py")


def test_weights_are_softmax_with_mean_one():
    rewards = torch.tensor([1.0, 2.0, 4.0, -3.0])
    weights = exp_weights(rewards, 0.7)
    torch.testing.assert_close(weights, torch.exp(0.7 * rewards) / torch.exp(0.7 * rewards).mean())
    assert exp_weights(torch.tensor([1e4, 1e4 + 1]), 100.0).isfinite().all()


def test_without_beta_all_count_alike_with_much_of_it_only_the_best():
    rewards = torch.tensor([0.5, 3.0, -1.0, 2.0])
    assert exp_weights(rewards, 0.0).tolist() == [1, 1, 1, 1]
    assert exp_weights(rewards, 1e6).tolist() == [0, 4, 0, 0]
    assert exp_weights(torch.tensor([3.0, 3.0, 1.0, 2.0]), 1e6).tolist() == [2, 2, 0, 0]  # a tie is shared


def test_sparse_weights_are_one_over_the_share_for_the_top_decile_and_nothing_below():
    rewards = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float()
    weights = sparse_weights(rewards, 0.1)
    torch.testing.assert_close(weights, (rewards >= 90).float() * 10)
    assert sparse_weights(torch.tensor([1.0, 5.0, 5.0, 2.0]), 0.25).tolist() == [
        0, 2, 2, 0,
    ]  # both are at the border: both are in
    assert sparse_weights(torch.tensor([1.0, 7.0, 5.0]), 0.01).tolist() == [0, 3, 0]  # at least one
    assert sparse_weights(torch.ones(7), 0.1).tolist() == [1] * 7


@pytest.mark.parametrize("weights", ["exp", "sparse"])
@pytest.mark.parametrize("per_prompt", [True, False])
def test_weights_do_not_depend_on_the_rewards_unit_and_have_mean_one(weights, per_prompt):
    prompts = ["a"] * 3 + ["b"] * 5 + ["a"] * 2
    rewards = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = Config(weights=weights, per_prompt=per_prompt, beta=1.5)
    result = weigh(rewards, prompts, config)
    assert result.mean().item() == pytest.approx(1)
    torch.testing.assert_close(weigh(1000 * rewards - 7, prompts, config), result, rtol=1e-4, atol=1e-5)
    if per_prompt:
        a = torch.tensor([prompt == "a" for prompt in prompts])
        assert result[a].mean().item() == pytest.approx(1) and result[~a].mean().item() == pytest.approx(1)
        torch.testing.assert_close(
            weigh(rewards + 50.0 * a, prompts, config), result
        )  # that a prompt is easy is no merit


def test_beta_counts_in_standard_deviations():
    rewards = torch.tensor([-2.5, -2.0, -3.5, -2.1])
    weights = weigh(rewards, ["a"] * 4, Config(beta=0.8))
    assert (weights[0] / weights[2]).log().item() == pytest.approx(
        0.8 * 1.0 / rewards.std(correction=0).item(), rel=1e-4
    )


def test_equal_rewards_have_equal_weights():
    for weights in ("exp", "sparse"):
        assert weigh(torch.full((6,), -2.3), ["a", "b"] * 3, Config(weights=weights)).tolist() == [1] * 6


# the loss


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def batch(size=4):
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, size, 4, 8, 8, generator=generator)
    return (
        clean,
        noise,
        torch.tensor([0, 300, 700, 999][:size]),
        torch.randn(size, 5, 8, generator=generator),
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_the_loss_is_that_of_diffusers_training_recipe(tiny, kind, guidance_scale):
    schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)
    clean, noise, timesteps, embeds = batch()
    empty = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))
    loss = denoising_loss(
        SimpleNamespace(unet=tiny, scheduler=DDIMScheduler(**schedule)),
        clean,
        noise,
        timesteps,
        embeds,
        None if guidance_scale is None else empty,
        guidance_scale,
    )

    scheduler = DDPMScheduler(**schedule)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    output = tiny(noisy, timesteps, embeds).sample
    if guidance_scale:
        unconditional = tiny(noisy, timesteps, empty.expand_as(embeds)).sample
        output = unconditional + guidance_scale * (output - unconditional)
    target = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": scheduler.get_velocity(clean, noise, timesteps),
    }[kind]
    torch.testing.assert_close(
        loss, F.mse_loss(output, target, reduction="none").mean((1, 2, 3)), rtol=1e-4, atol=1e-5
    )


def test_the_gradient_of_the_weighted_loss_is_the_weighted_sum_of_the_pictures_gradients(tiny):
    pipeline, parameters = SimpleNamespace(unet=tiny, scheduler=DDIMScheduler()), [*tiny.parameters()]
    inputs, weights = batch(), exp_weights(torch.tensor([0.3, 2.0, -1.0, 0.5]), 1.0)

    def gradient(loss):
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    alone = [
        gradient(denoising_loss(pipeline, *(value[i : i + 1] for value in inputs)).sum()) for i in range(4)
    ]
    together = gradient((weights * denoising_loss(pipeline, *inputs)).mean())
    torch.testing.assert_close(
        together, sum(w * g for w, g in zip(weights, alone)) / 4, rtol=1e-3, atol=1e-6
    )


# runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    code, out, err = finish(start("--reward", "compress", **SMALL | dict(out=folder)))
    assert code == 0, err
    assert out.splitlines()[-1].startswith("next: python sample.py")
    return folder / "compress-rwr"


def test_a_run_leaves_what_a_run_of_ddpo_leaves(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert {
        "images", "reward_mean", "reward_std", "loss", "grad_norm", "weight_max", "weight_share",
        "seconds", "seconds_sample", "seconds_reward", "seconds_update", "images_per_second",
        "eval_reward",
    } <= set(rows[-1])
    assert 1 / 8 <= rows[-1]["weight_share"] <= 1 <= rows[-1]["weight_max"] <= 4  # of a group of 4
    for name in (
        "config.json",
        "rewards.png",
        "progress.png",
        "pytorch_lora_weights.safetensors",
        "checkpoint/epoch_000002.pt",
    ):
        assert (run / name).stat().st_size > 0
    assert not {"clip_range", "algorithm", "kl"} & set(json.loads((run / "config.json").read_text()))


def test_a_run_that_is_killed_ends_with_the_same_numbers(run, tmp_path):
    process = start("--reward", "compress", **SMALL | dict(out=tmp_path))
    folder = tmp_path / "compress-rwr"
    while len(read_metrics(folder / "metrics.jsonl")) < 2 and process.poll() is None:
        time.sleep(0.02)  # the first epoch is logged: it may or may not be in a checkpoint by now
    process.send_signal(signal.SIGKILL)
    finish(process)
    code, _, err = finish(start("--resume", str(folder)))
    assert code == 0, err
    resumed, whole = load_checkpoint(folder / "checkpoint"), load_checkpoint(run / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(resumed["parameters"], whole["parameters"], strict=True))
    assert numbers(folder) == numbers(run)


def test_two_processes_train_like_one(tmp_path):
    settings = SMALL | dict(
        dtype="fp32", sample_batch=2, train_batch=2, lr=1e-4, epochs=1, eval_every=1, weights="sparse",
        out=str(tmp_path),
    )
    split = start("--reward", "compress", processes=2, **settings | dict(name="split"))
    rwr.train(Config(name="whole", **settings))
    code, _, err = finish(split)
    assert code == 0, err
    whole, split = (load_checkpoint(tmp_path / name / "checkpoint") for name in ("whole", "split"))
    difference = torch.cat(
        [(a - b).abs().flatten() for a, b in zip(split["parameters"], whole["parameters"], strict=True)]
    )
    assert difference.max() <= 1e-5 and difference.mean() <= 1e-7
    rows = [numbers(tmp_path / name)[1] for name in ("whole", "split")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        dict(weights="exp", beta=2.0),
        dict(weights="sparse", top=0.3),
        dict(weights="sparse", per_prompt=False),
        dict(reward="compress:0.5,incompress:0.1", train_guidance=False),
    ],
)
def test_however_the_weights_fall_a_loss_of_one_everywhere_is_one(tmp_path, monkeypatch, settings):
    """Where weights of 0 are passed over, the others must not count too much or too little."""
    real = rwr.denoising_loss
    monkeypatch.setattr(rwr, "denoising_loss", lambda *inputs: 1 + 0 * real(*inputs))
    folder = rwr.train(
        Config(
            out=str(tmp_path), name="constant", **SMALL | dict(epochs=1, steps=2, eval_every=1) | settings
        )
    )
    assert read_metrics(folder / "metrics.jsonl")[1]["loss"] == pytest.approx(1, abs=1e-5)


def test_it_learns_to_denoise_the_pictures_that_count(tmp_path, monkeypatch):
    seen = []
    real = rwr.weigh
    monkeypatch.setattr(
        rwr, "collect", lambda run, epoch, real=rwr.collect: seen.append(real(run, epoch)) or seen[0]
    )
    monkeypatch.setattr(rwr, "weigh", lambda *inputs: seen.append(real(*inputs)) or seen[1])
    folder = rwr.train(
        Config(
            out=str(tmp_path),
            weights="sparse",
            per_prompt=False,
            top=0.25,
            **SMALL
            | dict(model="models/emoji", epochs=1, steps=6)
            | dict(inner_epochs=25, updates=1, train_batch=8, ema=0.0),
        )
    )
    (prompts, trajectories, _, _), weights = seen
    best = weights.nonzero().flatten().repeat(8)
    noise, timesteps = (
        torch.randn(16, 8, 16, 16, generator=torch.Generator().manual_seed(5)),
        torch.arange(16) * 60,
    )

    def loss(pipeline):
        embeds, empty = encode_prompts(pipeline, [prompts[i] for i in best]), encode_prompts(pipeline, [""])
        return (
            denoising_loss(pipeline, trajectories.latents[best, -1], noise, timesteps, embeds, empty, 4.0)
            .mean()
            .item()
        )

    with torch.no_grad():
        assert loss(load_pipeline(device="cpu", lora=folder)) < 0.9 * loss(load_pipeline(device="cpu"))


# what cannot work


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--weights", "linear"], "exp, sparse"),
        (["--beta", "-1"], "beta"),
        (["--beta", "nan"], "beta"),
        (["--beta", "inf"], "beta"),
        (["--top", "0"], "top"),
        (["--top", "1.5"], "top"),
        (["--group-size", "1"], "--no-per-prompt"),
        (["--images", "10"], "multiple of"),
        (["--updates", "5"], "multiple of"),
        (["--reward", "beauty"], "beauty"),
        (["--preset", "huge"], "huge"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--clip-range", "1e-3"], "unrecognized arguments: --clip-range"),
        (["--algorithm", "sf"], "--algorithm"),
        (["--kl", "0.1"], "--kl"),
        (["--resume", "no/such/run"], "no/such/run"),
        (["--resume", "DDPO"], "not that of a run"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, arguments, names):
    (tmp_path / "ddpo").mkdir()
    (tmp_path / "ddpo/config.json").write_text(json.dumps({"algorithm": "sf", "clip_range": 1e-4}))
    arguments = [str(tmp_path / "ddpo") if word == "DDPO" else word for word in arguments]
    if arguments[0] != "--resume":
        safe = dict(out=tmp_path / "runs", epochs=1, steps=2)  # should a check fail, what starts ends soon
        arguments += flags(**{key: value for key, value in safe.items() if f"--{key}" not in arguments})
    with pytest.raises(SystemExit) as stop:
        rwr.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and names in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_every_preset_has_settings_that_can_work():
    for preset in rwr.PRESETS:
        config = rwr.check(rwr.parse_config(["--preset", preset, "--device", "cpu"])[0])
        assert isinstance(config, Config) and config.images % (config.updates * config.group_size) == 0


def test_each_pass_over_the_pictures_has_its_own_noise_and_steps(tmp_path, monkeypatch):
    seen, real = [], rwr.denoising_loss
    monkeypatch.setattr(
        rwr,
        "denoising_loss",
        lambda pipeline, clean, noise, *rest: seen.append(noise) or real(pipeline, clean, noise, *rest),
    )
    rwr.train(Config(out=str(tmp_path), **SMALL | dict(epochs=1)))
    noise = torch.cat(seen).flatten(1)
    assert len(noise.unique(dim=0)) == len(noise) == 8 * 2


def test_a_mixtures_weights_count_in_what_is_weighed(tmp_path, monkeypatch):
    seen, scores, real, collect = [], [], rwr.weigh, rwr.collect
    monkeypatch.setattr(rwr, "collect", lambda run, epoch: scores.append(collect(run, epoch)) or scores[-1])
    monkeypatch.setattr(rwr, "weigh", lambda rewards, *rest: seen.append(rewards) or real(rewards, *rest))
    settings = SMALL | dict(epochs=1, name="mix", reward="compress:1,incompress:3")
    rwr.train(Config(out=str(tmp_path), **settings))
    torch.testing.assert_close(seen[0], 2 * ddpo.batch_advantages(scores[0][2]["incompress"]))
