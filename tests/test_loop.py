"""Claims about one epoch of ddpo.py, on a tiny random pipeline: its gradient, its sums, what it restores."""

import dataclasses

import pytest
import torch
from torch.distributions import Normal

import ddpo
import models
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
    assert [name for name, _ in moves].count("AutoencoderKL") == 2 * 2  # there and back for each


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
