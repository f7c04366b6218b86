"""Both halves of kernels/, torch and Triton, held against float64 and against each other. On a CPU
Triton interprets."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ddpo
import kernels
import sample
from kernels import ddim_step
from kernels.ddim_step import fused_ddim_step, gaussian_log_prob
from kernels.ppo_loss import fused_ppo_loss, policy_loss

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP = 1e-4
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# of the network's output and of the latents
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]
# relative; the interpreter cuts bfloat16 off rather than rounding it
ROUNDING = {F32: 1e-5, F16: 1e-3, BF16: 8e-3}
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def backend(request, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", request.param)
    return request.param


def textbook_mean(prediction, output, x, a, a_prev, sigma):
    """Eq. 12 of DDIM, by way of the predicted sample and the predicted noise."""
    if prediction == "epsilon":
        x0, epsilon = (x - (1 - a).sqrt() * output) / a.sqrt(), output
    else:
        x0, epsilon = a.sqrt() * x - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * x
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma**2).sqrt() * epsilon


def problem(shape, prediction="epsilon", guidance_scale=5.0, dtypes=(F32, F32)):
    """A step at a noise level of its own for each sample: `call`, the arguments of the kernels;
    `mean`, `sigma` and `log_prob` in float64."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)
    a = torch.linspace(0.2, 0.9, shape[0], dtype=torch.float64, device=DEVICE)
    a = a.view(-1, *[1] * (len(shape) - 1))
    a_prev = a + 0.05
    sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    c_x = textbook_mean(prediction, zero, one, a, a_prev, sigma)
    c_o = textbook_mean(prediction, one, zero, a, a_prev, sigma)
    rows = shape[0] * (1 if guidance_scale is None else 2)
    call = dict(
        noise_pred=draw(rows, *shape[1:]).to(dtypes[0]),
        latents=draw(*shape).to(dtypes[1]),
        coefficients=torch.cat([c_x, c_o, sigma, sigma.log()], dim=1).view(-1, 4).float(),
        guidance_scale=guidance_scale,
    )

    def mean(noise_pred):
        output = noise_pred
        if guidance_scale is not None:
            uncond, cond = noise_pred.chunk(2)
            output = (1 - guidance_scale) * uncond + guidance_scale * cond
        return textbook_mean(prediction, output, call["latents"].double(), a, a_prev, sigma)

    def log_prob(next_latents, noise_pred):
        density = torch.distributions.Normal(mean(noise_pred), sigma)
        return density.log_prob(next_latents.double()).flatten(1).mean(1)

    return SimpleNamespace(
        call=call, noise=draw(*shape), advantages=draw(shape[0]),
        mean=mean, sigma=sigma, log_prob=log_prob,
    )


def exact_loss(log_prob, old_log_prob, advantages, clip_range):
    """(loss, ratio) by the formulas of DDPO, in the dtype of log_prob."""
    ratio = (log_prob - old_log_prob).exp()
    if clip_range is None:
        return -advantages * log_prob, ratio
    limited = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, limited), ratio


def assert_gradient(ours, exact, rtol):
    """Close, and 1e-5 of the largest element where an element is nearly 0."""
    atol = 1e-5 * exact.abs().max().item()
    torch.testing.assert_close(ours.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 3, 5, 7), (2, 1, 1, 3)])
def test_a_step_is_eq_12_and_its_log_prob_that_of_the_rounded_latents(
    backend, shape, dtypes, prediction, guidance_scale
):
    p = problem(shape, prediction, guidance_scale, dtypes)
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    noise_pred = p.call["noise_pred"].double()
    exact = p.mean(noise_pred) + p.sigma * p.noise
    assert stored.dtype == dtypes[1] and log_prob.dtype == F32
    torch.testing.assert_close(stored.double(), exact, rtol=ROUNDING[dtypes[1]], atol=1e-5)
    exact_log_prob = p.log_prob(stored, noise_pred)
    torch.testing.assert_close(log_prob.double(), exact_log_prob, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("clip_range", [CLIP, None])
@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_loss_and_gradient_are_those_of_float64_autograd(
    backend, dtypes, prediction, guidance_scale, clip_range
):
    p = problem((6, 3, 5, 7), prediction, guidance_scale, dtypes)
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    # two inside the clip, two above, two below
    off = torch.tensor([0.5, -0.5, 3.0, 3.0, -3.0, -3.0], device=DEVICE)
    advantages = torch.tensor([1.5, -0.7, 1.5, -0.7, 1.5, -0.7], device=DEVICE)
    old_log_prob = log_prob - off * CLIP
    scale = 1000 * torch.rand((), generator=torch.Generator().manual_seed(1)).item()
    policy = dict(next_latents=stored, old_log_prob=old_log_prob, advantages=advantages)
    policy["clip_range"] = clip_range
    loss, again, ratio, clipped, grad = fused_ppo_loss(**p.call, **policy, scale=scale)

    noise_pred = p.call["noise_pred"].double().requires_grad_()
    exact_log_prob = p.log_prob(stored, noise_pred)
    exact, exact_ratio = exact_loss(exact_log_prob, old_log_prob, advantages, clip_range)
    (scale * exact.sum()).backward()
    torch.testing.assert_close(again.double(), exact_log_prob, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(ratio.double(), exact_ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert clipped.tolist() == [clip_range is not None and abs(o) > 1 for o in off.tolist()]
    assert grad.dtype == dtypes[0] and grad.shape == noise_pred.shape
    assert_gradient(grad, noise_pred.grad, rtol=ROUNDING[dtypes[0]])
    if clip_range is not None:  # the loss limits gains above 1 + c and losses below 1 − c alone
        moves = grad.view(-1, 6, *grad.shape[1:]).abs().amax(dim=(0, 2, 3, 4)) > 0
        assert moves.tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize("clip_range", [CLIP, None])
@pytest.mark.parametrize("guidance_scale", [None, 5.0])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_policy_loss_is_differentiated_as_float64_autograd_would_do_it(
    backend, dtypes, guidance_scale, clip_range
):
    p = problem((6, 3, 5, 7), "epsilon", guidance_scale, dtypes)
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    off = CLIP * torch.tensor([0.5, -0.5, 3.0, 3.0, -3.0, -3.0], device=DEVICE)
    policy = dict(p.call, next_latents=stored, old_log_prob=log_prob - off, advantages=p.advantages)
    policy = {key: value for key, value in policy.items() if key != "noise_pred"}
    scale = torch.tensor(37.0, device=DEVICE)
    upstream = torch.tensor(-1.7, device=DEVICE)  # what a caller's own arithmetic hands back

    output = p.call["noise_pred"].clone().requires_grad_()
    objective, loss, *rest = policy_loss(output, **policy, clip_range=clip_range, scale=scale)
    (upstream * objective).backward()

    exact_output = p.call["noise_pred"].double().requires_grad_()
    exact_log_prob = p.log_prob(stored, exact_output)
    exact, _ = exact_loss(exact_log_prob, policy["old_log_prob"], p.advantages, clip_range)
    (upstream.double() * scale * exact.sum()).backward()

    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective, scale * loss.sum())
    assert output.grad.dtype == dtypes[0]
    # the stored gradient is rounded, and so is its product
    assert_gradient(output.grad, exact_output.grad, rtol=2 * ROUNDING[dtypes[0]])
    of_kernel = fused_ppo_loss(output.detach(), **policy, clip_range=clip_range, scale=scale)
    for ours, theirs in zip((loss, *rest), of_kernel):  # loss, log_prob, ratio, clipped
        assert not ours.requires_grad and torch.equal(ours, theirs)


def test_policy_loss_adds_up_with_another_loss_of_the_same_output(backend):
    p = problem((4, 3, 5, 7))
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    policy = dict(next_latents=stored, old_log_prob=log_prob, advantages=p.advantages)
    policy |= dict(clip_range=CLIP, scale=1 / 32)
    call = dict(p.call)
    output = call.pop("noise_pred").requires_grad_()
    gradient = lambda loss: torch.autograd.grad(loss, output)[0]
    alone = gradient(policy_loss(output, **call, **policy)[0])
    penalty = gradient(output.square().mean())
    both = gradient(policy_loss(output, **call, **policy)[0] + output.square().mean())
    torch.testing.assert_close(both, alone + penalty)
    assert alone.abs().max() > 0 and penalty.abs().max() > 0


def test_in_float16_the_scale_inside_keeps_what_a_scale_outside_would_lose(backend):
    p = problem((2, 4, 32, 32), dtypes=(F16, F32))
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    policy = dict(next_latents=stored, old_log_prob=log_prob, advantages=1e-3 * p.advantages)
    call = dict(p.call)
    output = call.pop("noise_pred").requires_grad_()
    gradient = lambda loss: torch.autograd.grad(loss, output)[0].double()
    inside = gradient(policy_loss(output, **call, **policy, clip_range=None, scale=2.0**12)[0])
    exact = output.detach().double().requires_grad_()
    (2.0**12 * -policy["advantages"] * p.log_prob(stored, exact)).sum().backward()
    error = lambda got: ((got - exact.grad).norm() / exact.grad.norm()).item()
    assert error(inside) < 1e-3
    if backend == "triton":  # torch computes in float32 and rounds once, at the end
        outside = gradient(2.0**12 * policy_loss(output, **call, **policy, clip_range=None)[0])
        assert error(outside) > 10 * error(inside)


LARGE_AND_ODD = [(2, 4, 63, 65), (1, 4, 64, 64), (1, 5, 115, 117), (1, 4, 128, 128)]


@pytest.mark.parametrize("shape", LARGE_AND_ODD)
def test_large_and_odd_samples_match_float64_too(backend, shape):
    p = problem(shape)
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    noise_pred = p.call["noise_pred"].double().requires_grad_()
    exact_log_prob = p.log_prob(stored, noise_pred)
    torch.testing.assert_close(log_prob.double(), exact_log_prob, rtol=2e-6, atol=5e-6)
    policy = dict(next_latents=stored, old_log_prob=log_prob, advantages=p.advantages)
    _, _, _, _, grad = fused_ppo_loss(**p.call, **policy, clip_range=CLIP)
    exact_log_prob.backward(-p.advantages.double())
    assert_gradient(grad, noise_pred.grad, rtol=1e-5)


@pytest.mark.parametrize("drawn", ["noise", "seed"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (1, 4, 63, 65)])
def test_before_the_first_update_the_ratio_is_exactly_one(backend, shape, dtypes, drawn):
    p = problem(shape, dtypes=dtypes)
    source = dict(noise=p.noise) if drawn == "noise" else dict(seed=1)
    stored, log_prob = fused_ddim_step(**p.call, **source)
    assert torch.equal(fused_ddim_step(**p.call, next_latents=stored)[1], log_prob)
    policy = dict(next_latents=stored, old_log_prob=log_prob, advantages=p.advantages)
    _, again, ratio, clipped, _ = fused_ppo_loss(**p.call, **policy, clip_range=CLIP)
    assert torch.equal(again, log_prob)
    assert torch.equal(ratio, torch.ones_like(ratio)) and not clipped.any()


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (3, 4, 63, 65), (2, 4, 128, 128)])
def test_a_sample_has_the_same_log_prob_bits_alone_as_in_a_batch_and_however_the_work_is_divided(
    backend, shape, monkeypatch
):
    if DEVICE == "cuda" and backend == "torch":
        pytest.skip("torch's own sums on a GPU are cut by the batch size")
    p = problem(shape)
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    for i in range(shape[0]):
        one = slice(i, i + 1)
        alone = dict(
            noise_pred=p.call["noise_pred"].unflatten(0, (2, -1))[:, i].contiguous(),
            latents=p.call["latents"][one],
            coefficients=p.call["coefficients"][i],
            next_latents=stored[one],
            guidance_scale=5.0,
        )
        policy = dict(old_log_prob=log_prob[one], advantages=p.advantages[one], clip_range=CLIP)
        for split in [None] if backend == "torch" else [False, True]:
            monkeypatch.setattr(ddim_step, "SPLIT", split)
            assert torch.equal(fused_ddim_step(**alone)[1], log_prob[one])
            assert torch.equal(fused_ppo_loss(**alone, **policy)[1], log_prob[one])


def test_at_a_tie_the_unclipped_branch_wins_so_on_policy_both_losses_have_one_gradient(backend):
    p = problem((4, 3, 5, 7))
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    policy = dict(next_latents=stored, old_log_prob=log_prob, advantages=p.advantages)
    clip_ranges = None, CLIP, 0.0
    grads = [fused_ppo_loss(**p.call, **policy, clip_range=value)[4] for value in clip_ranges]
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


WITH_NAN = ["noise_pred", "latents", "next_latents", "old_log_prob", "advantages"]


@pytest.mark.parametrize("where", WITH_NAN)
def test_a_nan_in_one_sample_makes_its_loss_and_whole_gradient_nan_and_no_others(backend, where):
    p = problem((2, 3, 5, 7))
    stored, log_prob = fused_ddim_step(**p.call, noise=p.noise)
    call = dict(p.call, next_latents=stored, old_log_prob=log_prob, advantages=p.advantages)
    call[where] = call[where].clone()
    call[where].view(-1)[0] = math.nan
    loss, again, _, _, grad = fused_ppo_loss(**call, clip_range=CLIP)
    assert loss.isnan().tolist() == [True, False]
    assert again.isnan().tolist() == [where in ("noise_pred", "latents", "next_latents"), False]
    assert grad[[0, 2]].isnan().all() and not grad[[1, 3]].isnan().any()
    if where != "old_log_prob":  # the score function has no ratio
        loss, _, _, _, grad = fused_ppo_loss(**call, clip_range=None)
        assert loss.isnan().tolist() == [True, False]
        assert grad[0].isnan().any() and not grad[[1, 3]].isnan().any()
    if where in ("noise_pred", "latents"):
        redrawn, log_prob = fused_ddim_step(**{key: call[key] for key in p.call}, noise=p.noise)
        assert redrawn[0].isnan().any() and not redrawn[1].isnan().any()
        assert log_prob.isnan().tolist() == [True, False]


def draw(seed, shape=(2, 4, 64, 64)):
    """The noise itself: with μ = 0 and σ = 1 the step is the noise."""
    zeros = torch.zeros(shape, device=DEVICE)
    row = torch.tensor([0.0, 0.0, 1.0, 0.0], device=DEVICE)
    return fused_ddim_step(zeros, zeros, row, seed=seed)[0]


def test_noise_from_a_seed_is_normal_and_independent_across_elements_samples_offsets_and_seeds(
    backend
):
    seeds = [3, 0], [3, 1], [3, 2**32], [4, 0]
    zs = [draw(torch.tensor(seed, device=DEVICE)).double() for seed in seeds]
    z = torch.stack(zs).flatten()
    # 131,072: a mean has a standard error of 1/√n, a variance √2/√n, a fourth moment √96/√n
    n = len(z)
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((z.abs() > 2).double().mean() - 0.0455) < 4 * (0.0455 / n) ** 0.5
    for lag in (1, 2, 3, 4, 64, 4096, 16384):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / n**0.5, lag
    draws, same = torch.stack(zs).view(8, -1), torch.eye(8, device=DEVICE)  # four of two samples
    pairs, squares = torch.corrcoef(draws) - same, torch.corrcoef(draws**2) - same
    assert pairs.abs().max() < 5 / 16384**0.5 and squares.abs().max() < 5 / 16384**0.5


def test_the_same_seed_draws_the_same_noise_as_a_number_or_on_the_device_and_however_it_is_divided(
    backend, monkeypatch
):
    z = draw(5)
    for seed in (5, torch.tensor([5, 0], device=DEVICE)):
        for split in (False, True):
            monkeypatch.setattr(ddim_step, "SPLIT", split)
            assert torch.equal(draw(seed), z)
    assert not torch.equal(draw(torch.tensor([5, 1], device=DEVICE)), z)
    assert draw(2**40 + 1, (1, 1, 1, 3)).isfinite().all()
    assert draw(-1, (1, 3, 5, 7)).isfinite().all()


def test_one_row_of_coefficients_serves_all_samples(backend):
    p = problem((3, 3, 5, 7))
    row = p.call["coefficients"][1].contiguous()
    for_all = dict(p.call, coefficients=row)
    for_each = dict(p.call, coefficients=row.expand(3, 4).contiguous())
    steps = (fused_ddim_step(**call, noise=p.noise) for call in (for_all, for_each))
    for one, each in zip(*steps):
        assert torch.equal(one, each)
    policy = dict(next_latents=p.noise, advantages=p.advantages, clip_range=CLIP)
    policy["old_log_prob"] = torch.zeros(3, device=DEVICE)
    losses = (fused_ppo_loss(**call, **policy) for call in (for_all, for_each))
    for one, each in zip(*losses):
        assert torch.equal(one, each)


def test_a_scale_on_the_device_is_the_same_as_a_number(backend):
    p = problem((2, 3, 5, 7), dtypes=(F16, F32))
    policy = dict(next_latents=p.noise, advantages=p.advantages, clip_range=None)
    policy["old_log_prob"] = torch.zeros(2, device=DEVICE)
    number = fused_ppo_loss(**p.call, **policy, scale=512.0)[4]
    for scale in (torch.tensor(512.0, device=DEVICE), torch.tensor([512.0], device=DEVICE)):
        assert torch.equal(fused_ppo_loss(**p.call, **policy, scale=scale)[4], number)


def transposed(tensor):
    """The same elements with other strides."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


WRONG = {
    "noise_pred: shape": lambda c: c.update(noise_pred=c["noise_pred"][:2]),
    "noise_pred: not contiguous": lambda c: c.update(noise_pred=transposed(c["noise_pred"])),
    "latents: torch.int64": lambda c: c.update(latents=c["latents"].long()),
    "latents: not contiguous": lambda c: c.update(
        latents=c["latents"].contiguous(memory_format=torch.channels_last)
    ),
    "latents: shape (0, 3, 5, 7)": lambda c: c.update(latents=c["latents"][:0]),
    "coefficients: shape": lambda c: c.update(coefficients=c["coefficients"][:, :3]),
    "coefficients: torch.float16": lambda c: c.update(coefficients=c["coefficients"].half()),
    "coefficients: on meta": lambda c: c.update(coefficients=c["coefficients"].to("meta")),
    "next_latents: torch.float16": lambda c: c.update(next_latents=c["next_latents"].half()),
    "next_latents: shape": lambda c: c.update(next_latents=c["next_latents"][:1]),
    "old_log_prob: shape": lambda c: c.update(old_log_prob=c["old_log_prob"][:1]),
    "advantages: torch.int64": lambda c: c.update(advantages=c["advantages"].long()),
    "scale: shape": lambda c: c.update(scale=torch.ones(2, device=DEVICE)),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named_in_one_line_before_anything_runs(backend, message):
    p = problem((2, 3, 5, 7))
    call = dict(p.call, next_latents=p.noise, advantages=p.advantages, clip_range=CLIP)
    call["old_log_prob"] = torch.zeros(2, device=DEVICE)
    WRONG[message](call)
    step = {key: call[key] for key in (*p.call, "next_latents")}
    takes = [lambda: fused_ppo_loss(**call), lambda: policy_loss(call.pop("noise_pred"), **call)]
    if message.partition(":")[0] in step:
        takes.append(lambda: fused_ddim_step(**step))
    for take in takes:
        with pytest.raises(ValueError) as error:
            take()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_step_takes_exactly_one_of_noise_seed_and_next_latents(backend):
    p = problem((2, 3, 5, 7))
    for wrong in ({}, dict(noise=p.noise, seed=1), dict(next_latents=p.noise, seed=1)):
        with pytest.raises(ValueError, match="exactly one"):
            fused_ddim_step(**p.call, **wrong)
    with pytest.raises(ValueError, match="^noise: shape"):
        fused_ddim_step(**p.call, noise=p.noise[:1])
    with pytest.raises(ValueError, match="^seed: torch.int32"):
        fused_ddim_step(**p.call, seed=torch.zeros(2, dtype=torch.int32, device=DEVICE))


def test_asked_for_a_gradient_the_step_is_differentiable_through_its_log_prob_alone(backend):
    p = problem((2, 3, 5, 7))
    noise_pred = p.call.pop("noise_pred").requires_grad_()
    stored, log_prob = fused_ddim_step(noise_pred, **p.call, noise=p.noise)
    assert not stored.requires_grad
    log_prob.sum().backward()
    exact = noise_pred.detach().double().requires_grad_()
    p.log_prob(stored, exact).sum().backward()
    torch.testing.assert_close(noise_pred.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_an_unknown_backend_is_refused_and_float64_always_goes_to_torch(monkeypatch):
    p = problem((2, 3, 5, 7))
    monkeypatch.setattr(kernels, "BACKEND", "cuda")
    with pytest.raises(ValueError, match="choose auto, triton or torch"):
        fused_ddim_step(**p.call, noise=p.noise)
    for backend in ("auto", "triton", "torch"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        assert kernels.use_triton(p.noise.double()) is False
    monkeypatch.setattr(kernels, "BACKEND", "auto")
    assert kernels.use_triton(p.noise) == (DEVICE == "cuda" and kernels.triton is not None)


def test_without_triton_the_torch_path_works():
    code = """
import sys; sys.modules["triton"] = None
import torch
from kernels import ddim_step, ppo_loss
x = torch.randn(2, 4, 8, 8)
row = torch.tensor([1.0, -0.1, 0.5, -0.7])
x1, log_prob = ddim_step.fused_ddim_step(x, x, row, seed=1)
assert ppo_loss.fused_ppo_loss(x, x, x1, row, log_prob, torch.ones(2), 1e-4)[2].tolist() == [1, 1]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@needs_triton
def test_the_benchmark_runs_here_and_finds_the_kernels_right(tmp_path):
    def run(*flags):
        command = [sys.executable, "benchmarks/kernels.py", *flags]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    out = tmp_path / "out.json"
    printed = run("--batch", "1", "--dtype", "float32", "--out", str(out))
    record = json.loads(out.read_text())
    assert record["errors"][0]["same_bits"] and record["errors"][0]["grad"] < 1e-5
    assert {row["way"] for row in record["rows"]} >= {"eager, as common", "eager, table", "fused"}
    moved = {(row["function"], row["way"]): 1000 * row["gb_s"] * row["us"]
             for row in record["rows"]}
    if DEVICE == "cpu":  # bytes of 4 x 8 x 8 latent elements, as ddim_step.py and ppo_loss.py count
        for function, way, each in (("step", "fused", 20), ("step", "fused, noise drawn", 16),
                                    ("loss", "fused", 24)):
            assert moved[function, way] == pytest.approx(each * 256)
    assert run("--table", str(out)) == printed
    assert ("times mean nothing" in printed) == (DEVICE == "cpu")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_captured_step_draws_fresh_noise_on_each_replay(monkeypatch):
    seed = torch.tensor([5, 0], device=DEVICE)
    expected = [draw(torch.tensor([5, offset], device=DEVICE)) for offset in range(3)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    zeros = torch.zeros(2, 4, 64, 64, device=DEVICE)
    row = torch.tensor([0.0, 0.0, 1.0, 0.0], device=DEVICE)
    with torch.cuda.graph(graph):
        z, _ = fused_ddim_step(zeros, zeros, row, seed=seed)
        seed[1] += 1
    for offset in range(3):
        graph.replay()
        assert torch.equal(z, expected[offset])


def test_a_large_sample_scores_alone_as_in_a_batch_on_several_threads_too():
    """16 x 64 x 64 are the latents of SD3 and FLUX.1 at 512 pixels."""
    drawn, mean = torch.randn(2, 8, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    one, zero, threads = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = [gaussian_log_prob(*pair, one, zero) for pair in zip(drawn.split(1), mean.split(1))]
        together = gaussian_log_prob(drawn, mean, one, zero)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)


@needs_triton
def test_the_ways_that_the_benchmark_times_compute_the_same(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    from benchmarks import kernels as benchmark

    monkeypatch.setattr(kernels, "BACKEND", "triton")
    found = benchmark.ways(3, "float32", compiled=False)
    results = {way: call() for way, (call, *_) in found.items() if way[1] != "fused, noise drawn"}
    for (function, way), values in results.items():
        for i in (0, 1) if function == "step" else (0, -1):  # latents, density; loss, gradient
            fused = results[function, "fused"][i]
            atol = 1e-5 * fused.abs().max().item()
            torch.testing.assert_close(values[i], fused, rtol=1e-3, atol=atol)
