"""Claims about one epoch of ddpo.py, on a tiny random pipeline: its gradient, its sums, what it restores."""

import dataclasses

import pytest
import torch
from torch.distributions import Normal

import ddpo
import forward
import models
import rwr
import training
from ddpo import Config
from prompts import load_prompts
from run_folder import load_checkpoint, read_metrics
from sample import ddim_table, encode_prompts, predict
from stable_diffusion import save_pipeline

SMALL = dict(
    device="cpu",
    dtype="fp32",
    watch="",
    images=8,
    sample_batch=4,
    train_batch=3,
    steps=4,
    group_size=4,
    updates=2,
    epochs=1,
    eval_images=2,
    guidance_scale=3.0,
    train_first=1.0,
    ema=0.0,
    warmup=0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("models") / "model")


def advantages_by_hand(rewards, config):
    """Leave-one-out within the group, over the root mean square of the batch. float64."""
    rewards = torch.tensor(rewards, dtype=torch.float64).view(-1, config.group_size)
    others = torch.stack([(row.sum() - row) / (len(row) - 1) for row in rewards])
    difference = (rewards - others).flatten()
    return difference / difference.square().mean().sqrt()


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(algorithm="sf", updates=1),
        dict(step_weights="equal"),
        dict(advantage_clip=0.5),
        dict(lora_rank=4),
        dict(reward="compress:200,incompress:-100", advantage_clip=2.0),
        dict(kl=0.3),
    ],
)
def test_the_first_updates_gradient_is_that_of_the_formula(model, tmp_path, monkeypatch, settings):
    """p.grad of the loop against a backward through torch.distributions, one picture and step at a time."""
    config = ddpo.check(Config(model=model, out=str(tmp_path), **SMALL | settings))
    run = ddpo.prepare(config)
    seen, gradients = [], []
    monkeypatch.setattr(
        ddpo, "collect", lambda *inputs: seen.append(training.collect(*inputs)) or seen[0]
    )

    def first_gradient(run):
        gradients.append([p.grad.clone() for p in run.parameters])
        raise InterruptedError

    monkeypatch.setattr(ddpo, "apply_gradients", first_gradient)
    with torch.no_grad():  # away from the base model, where the divergence has no gradient
        for i, p in enumerate(run.parameters):
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    with pytest.raises(InterruptedError):
        ddpo.fit(run)

    for p in run.parameters:
        p.grad = None
    prompts, trajectories, scores, _ = seen[0]
    most = config.advantage_clip
    advantages = sum(
        weight * advantages_by_hand(scores[name], config).clamp(-most, most)
        for name, weight in run.components.items()
    )
    _, table = ddim_table(run.pipeline.scheduler, config.steps, 1.0)
    weights = torch.ones(config.steps)
    if config.step_weights == "equal":
        weights = table[:, 2] / table[:, 1].abs()
        weights = weights / weights.mean()
    negative = encode_prompts(run.pipeline, [""])
    images = range(0, config.images, config.updates)  # of the first update
    for i in images:
        embeds = encode_prompts(run.pipeline, [prompts[i]])
        for step in range(config.steps):
            x, x_next = (
                trajectories.latents[i : i + 1, step],
                trajectories.latents[i : i + 1, step + 1],
            )
            inputs = x, trajectories.timesteps[step : step + 1], embeds, negative
            unconditional, conditional = predict(run.pipeline.unet, *inputs).chunk(2)
            output = unconditional + 3.0 * (conditional - unconditional)
            c_x, c_o, sigma, _ = table[step]
            log_prob = Normal(c_x * x + c_o * output, sigma).log_prob(x_next).mean()
            ratio = torch.exp(log_prob - log_prob.detach())  # on policy: 1, with a gradient
            loss = (
                -advantages[i] * weights[step] * (log_prob if config.algorithm == "sf" else ratio)
            )
            if config.kl:
                unconditional, conditional = training.reference_output(run, *inputs).chunk(2)
                base = unconditional + 3.0 * (conditional - unconditional)
                loss = loss + config.kl * (output - base).square().mean()
            (loss / (len(images) * config.steps)).backward()
    by_hand = torch.cat([p.grad.flatten() for p in run.parameters])
    loop = torch.cat([grad.flatten() for grad in gradients[0]])
    assert by_hand.norm() > 0
    assert (loop - by_hand).norm() < 1e-3 * by_hand.norm()


def test_resumed_prompt_statistics_give_the_same_run(model, tmp_path):
    """The buffer of rewards decides the advantages of later epochs, so a resumed run needs it back."""
    config = Config(
        model=model,
        out=str(tmp_path),
        name="whole",
        **SMALL | dict(epochs=3, advantages="prompt", min_count=2, buffer_size=4)
    )
    whole = ddpo.train(dataclasses.replace(config))
    ddpo.train(dataclasses.replace(config, name="halves", epochs=1))
    halves = ddpo.train(dataclasses.replace(config, name="halves"), resume=True)
    a, b = (load_checkpoint(folder / "checkpoint") for folder in (whole, halves))
    assert all(torch.equal(x, y) for x, y in zip(a["parameters"], b["parameters"], strict=True))
    assert (
        a["statistics"] == b["statistics"]
        and max(map(len, a["statistics"]["compress"].values())) >= 2
    )


def test_the_logged_sums_are_means_over_all_pairs(model, tmp_path, monkeypatch):
    """loss and approx_kl in metrics.jsonl against the values of the batches."""
    losses, squares = [], []

    def recording(output, x, x_next, rows, old, *others, real=ddpo.policy_loss):
        objective, loss, log_prob = real(output, x, x_next, rows, old, *others)
        losses.extend(loss.tolist()), squares.extend((log_prob - old).square().tolist())
        return objective, loss, log_prob

    monkeypatch.setattr(ddpo, "policy_loss", recording)
    folder = ddpo.train(
        Config(model=model, out=str(tmp_path), **SMALL | dict(lr=1e-3, train_batch=4))
    )
    row = read_metrics(folder / "metrics.jsonl")[-1]
    assert len(losses) == 8 * 4  # every picture, every step, once
    assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-7)
    assert row["approx_kl"] == pytest.approx(sum(squares) / len(squares) / 2, rel=1e-4)
    assert row["approx_kl"] > 0 and row["ratio_error"] == 0.0


def test_offload_keeps_what_waits_in_the_computers_memory(model, tmp_path, monkeypatch):
    """On a CPU both places are the same, so this checks the moves: who is sent where, and when."""
    moves = []
    real = torch.nn.Module.to

    def to(module, *where, **how):
        moves.append((type(module).__name__, str(where[0]) if where else ""))
        return real(module, *where, **how)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    sent = {}  # how often each part was sent to the CPU while the run was set up
    for offload in (False, True):
        del moves[:]
        settings = SMALL | dict(offload=offload, name=f"offload-{offload}")
        run = ddpo.prepare(Config(model=model, out=str(tmp_path), **settings))
        for name in ("CLIPTextModel", "AutoencoderKL"):
            sent[name, offload] = moves.count((name, "cpu"))
    for name in ("CLIPTextModel", "AutoencoderKL"):
        assert sent[name, True] == sent[name, False] + 1
    del moves[:]
    copied, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copied.append(x.shape) or copy(x))
    training.collect(run, 1)
    assert copied.count(torch.Size([4, 5, 4, 8, 8])) == 2  # the trajectories of two batches
    # asked to be there before each, and sent back after the last
    assert [name for name, _ in moves].count("AutoencoderKL") == 2 + 1


def test_offload_reads_all_prompts_before_the_text_encoders_leave_the_device(model, tmp_path, monkeypatch):
    """T5 on a CPU would need minutes for a prompt, and the other processes would wait for it."""
    settings = SMALL | dict(offload=True, eval_prompts="objects", epochs=1)
    run = ddpo.prepare(Config(model=model, out=str(tmp_path), **settings))
    assert run.cache.keys() == {*run.prompts, *load_prompts("objects"), ""}
    monkeypatch.setattr(models, "encode_prompt", None)
    rows = read_metrics(ddpo.fit(run) / "metrics.jsonl")
    plain = Config(model=model, out=str(tmp_path), name="plain", **settings | dict(offload=False))
    monkeypatch.undo()
    assert rows[1]["reward_mean"] == read_metrics(ddpo.train(plain) / "metrics.jsonl")[1]["reward_mean"]


def test_the_clip_fraction_is_the_share_of_the_ratios_beyond_the_clip_range(model, tmp_path, monkeypatch):
    outside = []

    def recording(output, x, x_next, rows, old, advantages, clip_range, *others, real=ddpo.policy_loss):
        objective, loss, log_prob = real(output, x, x_next, rows, old, advantages, clip_range, *others)
        outside.extend(((log_prob - old).exp() - 1).abs() > clip_range)
        return objective, loss, log_prob

    monkeypatch.setattr(ddpo, "policy_loss", recording)
    settings = SMALL | dict(lr=1e-3, clip_range=1e-6, inner_epochs=2)  # only the first update is within it
    row = read_metrics(ddpo.train(Config(model=model, out=str(tmp_path), **settings)) / "metrics.jsonl")[-1]
    assert row["clip_fraction"] == pytest.approx(sum(outside).item() / len(outside), rel=1e-5)
    assert 0.5 < row["clip_fraction"] <= 0.75


def test_the_logged_divergence_is_the_mean_without_its_weight(model, tmp_path, monkeypatch):
    seen, real = [], ddpo.kl_loss
    monkeypatch.setattr(ddpo, "kl_loss", lambda *inputs: seen.append(real(*inputs)) or seen[-1])
    folder = ddpo.train(Config(model=model, out=str(tmp_path), **SMALL | dict(kl=0.1, lr=1e-3)))
    logged = read_metrics(folder / "metrics.jsonl")[1]["kl"]
    assert logged == pytest.approx(torch.cat(seen).mean().item(), rel=1e-4)


def test_a_share_of_the_steps_is_drawn_for_each_picture_and_anew_in_each_inner_epoch(model, tmp_path):
    settings = SMALL | dict(steps=8, timestep_fraction=0.5, inner_epochs=2)
    run = ddpo.prepare(Config(model=model, out=str(tmp_path), **settings))
    _, policy_steps, steps_per_picture, pairs = ddpo.epoch_steps(run, 1)
    assert (len(policy_steps), steps_per_picture, pairs) == (8, 4, 8 // 2 * 4)
    drawn = []
    for inner in (0, 1):
        updates = (2 * inner, 2 * inner + 1)
        batches = [batch for update in updates
                   for batch in ddpo.update_pairs(run, 1, update, policy_steps, steps_per_picture)]
        drawn.append({(i.item(), s.item()) for images, steps in batches for i, s in zip(images, steps)})
        assert sorted(i for i, _ in drawn[-1]) == [i for i in range(8) for _ in range(4)]
    assert drawn[0] != drawn[1]


def test_the_gradient_is_cut_to_grad_clip_and_its_norm_before_that_is_returned(model, tmp_path):
    run = ddpo.prepare(Config(model=model, out=str(tmp_path), **SMALL | dict(grad_clip=0.25)))
    for p in run.parameters:
        p.grad = torch.ones_like(p)
    cut = []
    run.optimizer.step = lambda: cut.append(torch.cat([p.grad.flatten() for p in run.parameters]).norm())
    norm = training.apply_gradients(run)
    assert norm == pytest.approx(sum(p.numel() for p in run.parameters)**0.5, rel=1e-4)
    assert cut[0].item() == pytest.approx(0.25, rel=1e-3)


def test_without_train_guidance_the_training_batch_has_no_unconditional_half(model, tmp_path):
    for guided, expected in ((True, 3.0), (False, None)):
        settings = SMALL | dict(name=str(guided), train_guidance=guided)
        run = ddpo.prepare(Config(model=model, out=str(tmp_path), **settings))
        _, negative, scale = training.training_inputs(run, ["a cat"])
        assert scale == expected and (negative is None) == (expected is None)


def test_the_learning_rate_rises_during_the_warmup_also_after_a_resume(model, tmp_path):
    config = Config(model=model, out=str(tmp_path), **SMALL | dict(inner_epochs=2, warmup=8, lr=1e-3))
    ddpo.train(dataclasses.replace(config))
    run = ddpo.prepare(dataclasses.replace(config, epochs=2), resume=True)
    rates = []
    for _ in range(5):
        for p in run.parameters:
            p.grad = torch.ones_like(p)
        training.apply_gradients(run)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3 * n / 8 for n in (5, 6, 7, 8, 8)])


def test_runs_of_two_seeds_draw_other_noise(model, tmp_path):
    drawn = []
    for seed in (0, 1):
        run = ddpo.prepare(Config(model=model, out=str(tmp_path), name=str(seed), seed=seed, **SMALL))
        drawn.append(training.collect(run, 1)[1].latents[:, 0])
    assert not (drawn[0] == drawn[1]).flatten(1).all(1).any()


@pytest.mark.parametrize("loop", [ddpo, forward, rwr])
def test_all_random_numbers_of_an_epoch_follow_from_the_seed(model, tmp_path, monkeypatch, loop):
    keys, real = [], loop.seeded
    monkeypatch.setattr(loop, "seeded", lambda *key, **where: keys.append(key) or real(*key, **where))
    names = {field.name for field in dataclasses.fields(loop.Config)}
    settings = {name: value for name, value in SMALL.items() if name in names}
    loop.train(loop.Config(model=model, out=str(tmp_path), seed=7, **settings))
    assert keys and all(key[:2] == (7, 1) for key in keys)


def test_rewards_of_a_mixture_are_logged_with_their_weights(model, tmp_path):
    settings = SMALL | dict(reward="compress:3,incompress:1", name="mix")
    folder = ddpo.train(Config(model=model, out=str(tmp_path), **settings))
    row = read_metrics(folder / "metrics.jsonl")[1]
    assert row["reward_mean"] == pytest.approx(2 * row["reward_compress"]) and row["reward_mean"] < 0
    assert row["eval_reward"] == pytest.approx(2 * row["eval_compress"])


def test_a_resumed_run_has_the_scale_of_its_gradients_back(model, tmp_path, monkeypatch):
    scaler, config = torch.amp.GradScaler, Config(model=model, out=str(tmp_path), **SMALL)
    for scale, resume in ((8.0, False), (64.0, True)):
        monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=scale))
        run = ddpo.prepare(dataclasses.replace(config, epochs=1 + resume), resume)
        if not resume:
            ddpo.fit(run)
    assert run.scaler.get_scale() == 8.0
