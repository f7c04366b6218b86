"""One denoising step of the sampler, and the log-probability of the step it took, in one launch.

The scheduler's table holds four numbers for each timestep: c_x, c_o, σ and log σ. A step is affine
in the latents x and in the network's output, whether the network predicts the noise ε or the
velocity v: only c_x and c_o differ. For a sample of D = C·H·W elements,

    o  = o_u + w (o_c − o_u)                   classifier-free guidance: (2B, …) is (uncond, cond)
    μ  = c_x·x + c_o·o                         Eq. 12 of DDIM (Song et al. 2020)
    x' = round(μ + σ z),  z ~ N(0, 1)          rounded to the dtype in which latents are stored
    log p = mean_D[ −r²/2 ] − log σ − ½ log 2π,     r = (x' − μ)/σ

The rounding stands before the log-probability on purpose. Training reads x' back from memory and
computes its density again. If the unrounded value had been scored, the two numbers would differ by
the rounding error, and the importance ratio of an unchanged policy would not be 1. Where σ = 0 the
step is deterministic and has no density: x' is right, log p is NaN.

Where the time goes. Written out in torch this is a chain of small operations. Each is a launch,
reads its inputs from memory and writes its result back. `python benchmarks/kernels.py` counts them,
without a GPU too:

    a step in float32                  operations   bytes moved per latent element
    as commonly written                        39   164
    with the table of coefficients             17   112
    here                                        1    20, or 16 with the noise drawn in the kernel

Common code also gathers ᾱ from a table that lives on the CPU: a wait for the GPU and a copy back,
at each step. The table on the device removes that with no kernel at all, and torch.compile fuses
most of the rest; so the benchmark compares with those. The kernel adds three things: a fixed order
of rounding and summation (the log-probability is bit for bit that of ppo_loss.py); one launch that
is compiled once for all batch sizes; and noise from a seed that lives on the device, so that each
replay of a captured CUDA graph draws new noise.

What is not gained: a faster Stable Diffusion. At batch 8 its UNet takes some 99 % of a step. The
kernels matter for small networks, for large batches of small latents, and under CUDA graphs, where
nothing else of such a step is left to remove.

How the work is divided. A sample is cut into blocks of BLOCK elements. One program takes a sample
and adds up its blocks' sums in order. With a few large samples most of a GPU would be idle that
way. For those each block gets a program of its own, the sums go through memory, and a second, tiny
launch adds them up in the same order. So log_prob depends neither on the division nor on the batch
around the sample, and there are no atomics: the same inputs give the same bits. Where the second
launch begins to pay is reasoned here, not measured yet: see the constants below.
"""

import math
import random

import torch

from kernels import triton, use_triton

BLOCK = 4096  # elements whose squares are summed at once; at 8 elements a thread, 16 warps
# 16,384 elements, 4×64×64: the most whose residuals ppo_loss.py can keep in registers
BLOCKS_PER_PROGRAM = 4
# An H100's multiprocessors. With fewer samples than this, and more blocks a sample than
# BLOCKS_PER_PROGRAM, each block gets a program of its own.
FEW_SAMPLES = 132
# True or False overrules both constants. benchmarks/kernels.py measures both divisions, to tell
# what the constants should be.
SPLIT = None


def guided(noise_pred, guidance_scale):
    """o_u + w (o_c − o_u) from the (2B, ...) output of the network, in at least float32. Without a
    guidance_scale, the output itself."""
    noise_pred = noise_pred.to(torch.promote_types(noise_pred.dtype, torch.float32))
    if guidance_scale is None:
        return noise_pred
    uncond, cond = noise_pred.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def columns(coefficients, latents):
    """c_x, c_o, σ, log σ, each shaped to broadcast over (B, ...) latents, from one row for all
    samples or one for each."""
    return coefficients.view(-1, 4, *[1] * (latents.dim() - 1)).unbind(1)


def gaussian_log_prob(next_latents, mean, sigma, log_sigma):
    """(B,) log-density of the latents as they are stored: a mean over a sample's elements, because
    with a sum of 16,384 the ratio would overflow or vanish. So exp of a difference is the true ratio
    to the power 1/D."""
    squares = ((next_latents - mean) / sigma).square()
    # in two means: torch would divide one long sum differently at B = 1
    squares = squares.mean(-1).reshape(len(squares), -1).mean(1)
    return -0.5 * squares - log_sigma.flatten() - 0.5 * math.log(2 * math.pi)


def reference(
    noise_pred, latents, coefficients, guidance_scale=None, noise=None, seed=None, next_latents=None
):
    """fused_ddim_step in plain torch, on any device. Differentiable in noise_pred, through the
    log-probability alone."""
    c_x, c_o, sigma, log_sigma = columns(coefficients, latents)
    mean = c_x * latents + c_o * guided(noise_pred, guidance_scale)
    if next_latents is None:
        if noise is None:
            seed, offset = seed.tolist() if isinstance(seed, torch.Tensor) else (seed, 0)
            # torch's CPU generator ignores a seed's upper half
            mixed = random.Random(f"{seed} {offset}").getrandbits(32)
            generator = torch.Generator(latents.device).manual_seed(mixed)
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        # detached: the action is a number, not a function of the policy
        next_latents = (mean + sigma * noise).to(latents.dtype).detach()
    return next_latents, gaussian_log_prob(next_latents, mean, sigma, log_sigma)


if triton:
    import triton.language as tl

    @triton.jit
    def step_mean(
        noise_pred, latents, c_x, c_o, guidance_scale, at, mask,
        N: tl.constexpr, GUIDED: tl.constexpr,
    ):
        """μ at the elements `at`. Both kernels call this one function, so that they round alike."""
        output = tl.load(noise_pred + at, mask, 0.0).to(tl.float32)
        if GUIDED:
            rows = tl.num_programs(0).to(tl.int64) * N  # B rows further
            cond = tl.load(noise_pred + rows + at, mask, 0.0).to(tl.float32)
            output = output + guidance_scale * (cond - output)
        return c_x * tl.load(latents + at, mask, 0.0).to(tl.float32) + c_o * output

    @triton.jit
    def log_density(squares, log_sigma, N: tl.constexpr):
        return squares * (-0.5 / N) - log_sigma - 0.9189385332046727  # ½ log 2π

    @triton.jit
    def standard_normal(seed, offset, sample, first, BLOCK: tl.constexpr):
        """A block of normals, four to a counter (element // 4, sample, offset) of Philox-4x32-10
        keyed by the seed. No two draws share a word, and none depends on how the work is divided.
        Box and Muller turn words into normals in pairs."""
        four = first // 4 + tl.arange(0, BLOCK // 4)
        zero = (four * 0).to(tl.uint32)
        low, high = (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32).to(tl.uint32)
        a, b, c, d = tl.philox(seed, four, zero + sample.to(tl.uint32), zero + low, zero + high)
        p, q = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
        r, s = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d))
        return tl.reshape(tl.join(tl.join(p, q), tl.join(r, s)), [BLOCK])

    # without this the seed 1 and every multiple of 16 would be compiled anew
    @triton.jit(do_not_specialize=["seed"])
    def _forward_kernel(
        noise_pred, latents, coefficients, noise, seed, next_latents, log_prob, block_sums,
        guidance_scale,
        N: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
        BLOCKS_HERE: tl.constexpr, ROW: tl.constexpr,
        GUIDED: tl.constexpr, SCORE: tl.constexpr, SEED_ON_DEVICE: tl.constexpr,
    ):
        sample = tl.program_id(0)
        c_x = tl.load(coefficients + sample * ROW).to(tl.float32)
        c_o = tl.load(coefficients + sample * ROW + 1).to(tl.float32)
        sigma = tl.load(coefficients + sample * ROW + 2).to(tl.float32)
        log_sigma = tl.load(coefficients + sample * ROW + 3).to(tl.float32)
        squares = 0.0
        for i in range(BLOCKS_HERE):  # all of the sample's BLOCKS, or one
            first = (tl.program_id(1) + i) * BLOCK
            element = first + tl.arange(0, BLOCK)
            mask = element < N
            at = sample.to(tl.int64) * N + element
            mean = step_mean(noise_pred, latents, c_x, c_o, guidance_scale, at, mask, N, GUIDED)
            if SCORE:
                x = tl.load(next_latents + at, mask, 0.0)
            else:
                if noise is not None:
                    z = tl.load(noise + at, mask, 0.0).to(tl.float32)
                elif SEED_ON_DEVICE:
                    z = standard_normal(tl.load(seed), tl.load(seed + 1), sample, first, BLOCK)
                else:
                    z = standard_normal(seed, tl.full((), 0, tl.int64), sample, first, BLOCK)
                x = (mean + sigma * z).to(next_latents.dtype.element_ty)
                tl.store(next_latents + at, x, mask)
            residual = tl.where(mask, (x.to(tl.float32) - mean) * (1 / sigma), 0.0)
            squares += tl.sum(residual * residual, axis=0)
        if block_sums is None:
            tl.store(log_prob + sample, log_density(squares, log_sigma, N))
        else:
            tl.store(block_sums + sample * BLOCKS + tl.program_id(1), squares)

    @triton.jit
    def _finish_kernel(
        block_sums, coefficients, log_prob,
        N: tl.constexpr, BLOCKS: tl.constexpr, ROW: tl.constexpr,
    ):
        sample = tl.program_id(0)
        squares = 0.0
        for i in range(BLOCKS):
            squares += tl.load(block_sums + sample * BLOCKS + i)
        log_sigma = tl.load(coefficients + sample * ROW + 3).to(tl.float32)
        tl.store(log_prob + sample, log_density(squares, log_sigma, N))


FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64


def check(name, tensor, shape, device, dtypes=FLOATS, why=""):
    """A one-line ValueError for what a kernel could only answer with garbage."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}; must be {tuple(shape)}{why}")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}; must be on {device}, with the latents")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}; must be {' or '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        strides = tensor.stride()
        raise ValueError(f"{name}: not contiguous, strides {strides}; pass {name}.contiguous()")


def check_step(noise_pred, latents, coefficients, guidance_scale, next_latents=None):
    """What fused_ddim_step and fused_ppo_loss demand alike."""
    if latents.numel() == 0:
        raise ValueError(f"latents: shape {tuple(latents.shape)}; must hold at least one sample")
    batch, *sample_shape = latents.shape
    rows, why = batch, ", without a guidance_scale"
    if guidance_scale is not None:
        rows, why = 2 * batch, ", (uncond, cond), with a guidance_scale"
    check("latents", latents, latents.shape, latents.device)
    check("noise_pred", noise_pred, (rows, *sample_shape), latents.device, why=why)
    rows = (4,) if coefficients.dim() == 1 else (batch, 4)
    numbers, why = (torch.float32, torch.float64), ", rows of c_x, c_o, σ, log σ"
    check("coefficients", coefficients, rows, latents.device, numbers, why)
    if next_latents is not None:
        check("next_latents", next_latents, latents.shape, latents.device, (latents.dtype,))


def division(latents):
    """(elements a sample, elements a block, blocks a sample, whether each block gets a program).

    The first three fix the order of summation, so they depend on the sample's size alone."""
    elements = latents.numel() // len(latents)
    # a power of two; the noise comes in fours
    block = min(BLOCK, max(4, 1 << (elements - 1).bit_length()))
    blocks = -(-elements // block)
    split = len(latents) < FEW_SAMPLES and blocks > BLOCKS_PER_PROGRAM if SPLIT is None else SPLIT
    return elements, block, blocks, split


def launch_options(block):
    """8 elements a thread. Without fused multiply-adds, which the compiler would place differently
    in each kernel."""
    return dict(num_warps=max(1, block // 256), enable_fp_fusion=False)


def fused_ddim_step(
    noise_pred, latents, coefficients, guidance_scale=None, noise=None, seed=None, next_latents=None
):
    """Draws x', or scores the next_latents given.

    Returns (next_latents, of the latents' shape and dtype; log_prob (B,) float32).

    noise_pred: (2B, ...), (uncond, cond), with a guidance_scale; (B, ...) without. May be half
      precision beside float32 latents.
    coefficients: (4,) for all samples, or (B, 4): rows of c_x, c_o, σ, log σ, float32. With float64
      ones plain torch returns log_prob in float64.
    Exactly one of:
      noise: like latents, so that torch's generator decides;
      seed: an int, or an int64 device tensor (seed, offset) that the kernel reads and does not
        write. To draw afresh at each replay of a captured graph, add 1 to seed[1] between replays,
        or capture `seed[1] += 1` behind the step. The reference takes seeds too, but draws other
        noise from them;
      next_latents: like latents; scored, returned as they are.

    The kernel records no autograd graph. Where gradients are on and noise_pred requires one, the
    reference runs.
    Raises ValueError if shapes, dtypes or devices do not fit, or a tensor is not contiguous.
    """
    check_step(noise_pred, latents, coefficients, guidance_scale, next_latents)
    if (noise is None) + (seed is None) + (next_latents is None) != 2:
        raise ValueError("noise, seed, next_latents: give exactly one of them")
    if noise is not None:
        check("noise", noise, latents.shape, latents.device)
    seed_on_device = isinstance(seed, torch.Tensor)
    if seed_on_device:
        check("seed", seed, (2,), latents.device, (torch.int64,), ", (seed, offset)")

    differentiated = torch.is_grad_enabled() and noise_pred.requires_grad
    if differentiated or not use_triton(latents):
        return reference(
            noise_pred, latents, coefficients, guidance_scale, noise, seed, next_latents
        )

    batch, device = len(latents), latents.device
    elements, block, blocks, split = division(latents)
    score = next_latents is not None
    next_latents = next_latents if score else torch.empty_like(latents)
    log_prob = torch.empty(batch, dtype=torch.float32, device=device)
    block_sums = None
    if split:
        block_sums = torch.empty(batch, blocks, dtype=torch.float32, device=device)
    sizes = dict(N=elements, BLOCKS=blocks, ROW=0 if coefficients.dim() == 1 else 4)
    with torch.cuda.device_of(latents):
        _forward_kernel[(batch, blocks if split else 1)](
            noise_pred, latents, coefficients, noise, seed, next_latents, log_prob, block_sums,
            float(guidance_scale or 0),
            BLOCK=block, BLOCKS_HERE=1 if split else blocks, GUIDED=guidance_scale is not None,
            SCORE=score, SEED_ON_DEVICE=seed_on_device, **sizes, **launch_options(block),
        )
        if split:
            _finish_kernel[(batch,)](block_sums, coefficients, log_prob, **sizes,
                                     num_warps=1, enable_fp_fusion=False)
    return next_latents, log_prob
