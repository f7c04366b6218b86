"""The loss of one stored denoising step and its gradient, in one launch.

The sampler stored x, the step x' that it took, and log p_old of that step. Training runs the
network on x again and asks how likely x' is now (ddim_step.py: r = (x' − μ)/σ,
log p = mean_D[−r²/2] − log σ − ½ log 2π). It multiplies the answer by the sample's advantage A:

    ρ = exp(log p − log p_old)                      1 while the policy is the one that sampled
    importance sampling:  L = max(−A ρ, −A clip(ρ, 1−c, 1+c))
    score function:       L = −A log p              clip_range=None; only right on policy

On policy both losses have the same gradient. log p is a mean over D elements, so ρ is the D-th
root of the true ratio: this is why c is as small as 1e-4.

The gradient is short enough to write down. The unclipped branch wins ties; the clipped one is
constant:

    g = ∂L/∂log p = −A ρ  if −A ρ ≥ −A clip(ρ), else 0                  (score function: −A)
    ∂log p/∂o  = r·c_o/(σ D)                        since ∂log p/∂μ = r/(σ D) and ∂μ/∂o = c_o
    o = (1−w) o_u + w o_c, so ∂L/∂o_u = (1−w) ∂L/∂o and ∂L/∂o_c = w ∂L/∂o

So the pass that computes the loss also has the gradient, and writes it in the network's own
(2B, …) layout: no loss graph, no saved intermediates. `fused_ppo_loss` returns both.
`policy_loss` wraps it for autograd: its forward stores the gradient, its backward returns it.

`scale` carries what would otherwise multiply the loss afterwards: 1/accumulation and the float16
loss scale. The kernel applies it before it rounds. An unscaled gradient of one element, about
1/(D B), would already have lost most of its bits in float16.

Where the time goes, counted by `python benchmarks/kernels.py` as in ddim_step.py:

    loss and gradient in float32       operations   bytes moved per latent element
    as commonly written                        83   296
    with the table of coefficients             57   192
    here                                        1    24

`policy_loss` adds one multiplication of the stored gradient by what autograd hands to it (16
bytes an element with guidance). To leave it out where that factor is 1, the CPU would have to
wait for the GPU.

What is not gained: see ddim_step.py. Beside a large network's forward and backward pass all of
this is small change. A penalty on the distance to a reference network is left to torch: it needs
that network's forward pass, beside which it is free.

How the work is divided. Every element's gradient needs the sum over all elements of its sample.
So one program takes a sample of up to 16,384 elements and keeps its residuals in registers: each
input is read once. Larger samples do not fit. For those, one launch sums the blocks' squares, and
a second reads the inputs again (40 bytes an element, not 24) and writes the gradient. The sums
are those of ddim_step.py, function by function and in the same order, so on policy ρ = 1 exactly,
in every dtype. A NaN anywhere in a sample's inputs makes its loss and its gradient NaN.
"""

import torch

from kernels import triton, use_triton
from kernels.ddim_step import (BLOCKS_PER_PROGRAM, check, check_step, columns, division,
                               gaussian_log_prob, guided, launch_options)


@torch.no_grad()
def reference(
    noise_pred, latents, next_latents, coefficients, old_log_prob, advantages, clip_range,
    guidance_scale=None, scale=1.0,
):
    """fused_ppo_loss in plain torch, on any device, its gradient written out as above."""
    c_x, c_o, sigma, log_sigma = columns(coefficients, latents)
    mean = c_x * latents + c_o * guided(noise_pred, guidance_scale)
    log_prob = gaussian_log_prob(next_latents, mean, sigma, log_sigma)
    ratio = torch.exp(log_prob - old_log_prob)
    if clip_range is None:
        loss, slope = -advantages * log_prob, -advantages
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
    else:
        low, high = 1 - clip_range, 1 + clip_range
        unclipped = -advantages * ratio
        loss = torch.maximum(unclipped, -advantages * ratio.clamp(low, high))
        slope = torch.where(loss > unclipped, 0, unclipped)  # in this order a NaN is kept
        clipped = (ratio < low) | (ratio > high)

    residual = (next_latents - mean) / sigma
    slope = (scale * slope).view(-1, *[1] * (latents.dim() - 1))
    grad = slope * c_o / (sigma * latents[0].numel()) * residual
    if guidance_scale is not None:
        grad = torch.cat([(1 - guidance_scale) * grad, guidance_scale * grad])
    return loss, log_prob, ratio, clipped, grad.to(noise_pred.dtype)


if triton:
    import triton.language as tl

    from kernels.ddim_step import _forward_kernel, log_density, step_mean

    @triton.jit
    def _loss_kernel(
        noise_pred, latents, next_latents, coefficients, old_log_prob, advantages, block_sums,
        loss, log_prob, ratio, clipped, grad, guidance_scale, low, high, scale,
        N: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
        BLOCKS_HERE: tl.constexpr, ROW: tl.constexpr,
        GUIDED: tl.constexpr, CLIP: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr,
    ):
        sample = tl.program_id(0)
        c_x = tl.load(coefficients + sample * ROW).to(tl.float32)
        c_o = tl.load(coefficients + sample * ROW + 1).to(tl.float32)
        sigma = tl.load(coefficients + sample * ROW + 2).to(tl.float32)
        log_sigma = tl.load(coefficients + sample * ROW + 3).to(tl.float32)

        residuals = ()  # unrolled, so these stay in registers
        for i in tl.static_range(BLOCKS_HERE):
            element = (tl.program_id(1) + i) * BLOCK + tl.arange(0, BLOCK)
            mask = element < N
            at = sample.to(tl.int64) * N + element
            mean = step_mean(noise_pred, latents, c_x, c_o, guidance_scale, at, mask, N, GUIDED)
            x = tl.load(next_latents + at, mask, 0.0)
            residuals = residuals + (tl.where(mask, (x.to(tl.float32) - mean) * (1 / sigma), 0.0),)

        squares = 0.0
        if block_sums is None:
            for i in tl.static_range(BLOCKS_HERE):
                squares += tl.sum(residuals[i] * residuals[i], axis=0)
        else:
            for i in range(BLOCKS):
                squares += tl.load(block_sums + sample * BLOCKS + i)

        new = log_density(squares, log_sigma, N)
        rho = tl.exp(new - tl.load(old_log_prob + sample).to(tl.float32))
        advantage = tl.load(advantages + sample).to(tl.float32)
        if CLIP:
            unclipped = -advantage * rho
            limited = -advantage * tl.where(rho < low, low, tl.where(rho > high, high, rho))
            value = tl.where(limited > unclipped, limited, unclipped)  # tl.maximum would drop a NaN
            slope = tl.where(limited > unclipped, 0.0, unclipped)
        else:
            value = -advantage * new
            slope = -advantage
        if tl.program_id(1) == 0:
            tl.store(loss + sample, value)
            tl.store(log_prob + sample, new)
            tl.store(ratio + sample, rho)
            tl.store(clipped + sample, ((rho < low) | (rho > high)) & CLIP)

        if SCALE_ON_DEVICE:
            slope *= tl.load(scale).to(tl.float32)
        else:
            slope *= scale
        slope *= c_o / (sigma * N)
        for i in tl.static_range(BLOCKS_HERE):
            element = (tl.program_id(1) + i) * BLOCK + tl.arange(0, BLOCK)
            at = sample.to(tl.int64) * N + element
            g = slope * residuals[i]
            if GUIDED:
                cond = grad + tl.num_programs(0).to(tl.int64) * N
                tl.store(cond + at, (guidance_scale * g).to(grad.dtype.element_ty), element < N)
                g = (1 - guidance_scale) * g
            tl.store(grad + at, g.to(grad.dtype.element_ty), element < N)


def fused_ppo_loss(
    noise_pred, latents, next_latents, coefficients, old_log_prob, advantages, clip_range,
    guidance_scale=None, scale=1.0,
):
    """(loss (B,), log_prob (B,), ratio (B,), clipped (B,) bool, grad), float32 but for grad.

    grad: that of scale·loss.sum() with respect to noise_pred, like noise_pred, for
      `noise_pred.backward(grad)`. loss itself is not scaled.
    clipped: the ratio lies outside [1 − clip_range, 1 + clip_range]. The gradient is 0 only where
      that side is also the one that the loss limits.
    clip_range: None means the score function, where nothing is clipped.
    noise_pred, latents, coefficients, guidance_scale: as in fused_ddim_step.
    next_latents: like latents, as stored. old_log_prob, advantages: (B,) float32.
    scale: a number, or a tensor of one element on the device, read there.

    Raises ValueError if shapes, dtypes or devices do not fit, or a tensor is not contiguous.
    """
    batch, device = len(latents), latents.device
    check_step(noise_pred, latents, coefficients, guidance_scale, next_latents)
    for name, numbers in (("old_log_prob", old_log_prob), ("advantages", advantages)):
        check(name, numbers, (batch,), device, (torch.float32, torch.float64))
    scale_on_device = isinstance(scale, torch.Tensor)
    if scale_on_device:
        check("scale", scale.flatten(), (1,), device)
    if not use_triton(latents):
        return reference(noise_pred, latents, next_latents, coefficients, old_log_prob, advantages,
                         clip_range, guidance_scale, scale)

    elements, block, blocks, split = division(latents)
    split = split or blocks > BLOCKS_PER_PROGRAM
    # three, not rows of one: Triton compiles again for an address that is not a multiple of 16
    loss, log_prob, ratio = (torch.empty(batch, dtype=torch.float32, device=device) for _ in range(3))
    clipped = torch.empty(batch, dtype=torch.bool, device=device)
    grad = torch.empty_like(noise_pred)
    block_sums = None
    if split:
        block_sums = torch.empty(batch, blocks, dtype=torch.float32, device=device)

    guidance = float(guidance_scale or 0)
    low, high = 1.0 - (clip_range or 0), 1.0 + (clip_range or 0)
    constants = dict(
        N=elements, BLOCK=block, BLOCKS=blocks, BLOCKS_HERE=1 if split else blocks,
        ROW=0 if coefficients.dim() == 1 else 4, GUIDED=guidance_scale is not None,
        **launch_options(block),
    )
    with torch.cuda.device_of(latents):
        if split:
            _forward_kernel[(batch, blocks)](
                noise_pred, latents, coefficients, None, None, next_latents, None, block_sums,
                guidance, SCORE=True, SEED_ON_DEVICE=False, **constants,
            )
        _loss_kernel[(batch, blocks if split else 1)](
            noise_pred, latents, next_latents, coefficients, old_log_prob, advantages, block_sums,
            loss, log_prob, ratio, clipped, grad,
            guidance, low, high, scale if scale_on_device else float(scale),
            CLIP=clip_range is not None, SCALE_ON_DEVICE=scale_on_device, **constants,
        )
    return loss, log_prob, ratio, clipped, grad


class _StoredGradient(torch.autograd.Function):
    """The forward pass computes the gradient too and stores it; the backward pass returns it."""

    @staticmethod
    def forward(ctx, output, *arguments):
        loss, log_prob, ratio, clipped, grad = fused_ppo_loss(output, *arguments)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(loss, log_prob, ratio, clipped)
        ctx.set_materialize_grads(False)  # no zeros for the four outputs without a gradient
        *_, scale = arguments
        return scale * loss.sum(), loss, log_prob, ratio, clipped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        (grad,) = ctx.saved_tensors
        return upstream * grad, *[None] * 8


def policy_loss(
    output, latents, next_latents, coefficients, old_log_prob, advantages, clip_range,
    guidance_scale=None, scale=1.0,
):
    """(objective (), loss (B,), log_prob (B,), ratio (B,), clipped (B,) bool), for autograd.

    objective is scale·loss.sum(), differentiable in output alone, once. The other four are
    detached. Arguments and errors: as in fused_ppo_loss, with output for noise_pred. In float16
    pass the loss scale as `scale`: what multiplies the objective later meets a rounded gradient.
    """
    return _StoredGradient.apply(output, latents, next_latents, coefficients, old_log_prob,
                                 advantages, clip_range, guidance_scale, scale)
