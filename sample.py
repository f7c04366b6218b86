"""Sampling as a policy: a stochastic sampler that keeps every step it took and how likely that step was.

    python sample.py --prompt "a cat" --prompt "a fox"              pictures of the shipped model
    python sample.py --prompt "a cat" --lora runs/compress          before and after fine-tuning, same seeds
    python sample.py --prompt "a cat" --model models/emoji-flow     a flow-matching model

Sampling takes T denoising steps, x_T, ..., x_0. Each draws the next latents from a Gaussian: the network sets
its mean, the sampler its width σ. So each step is an action with an exact likelihood, which is all that a
policy gradient needs. For Stable Diffusion and its usual sampler (`ddim`) a step is

    ε̂  = ε_u + w (ε_c − ε_u)                                     classifier-free guidance
    σ  = η sqrt((1−ᾱ')/(1−ᾱ) · (1 − ᾱ/ᾱ'))                       DDIM, Eq. 16 (Song et al. 2020)
    μ  = sqrt(ᾱ') (x − sqrt(1−ᾱ) ε̂)/sqrt(ᾱ) + sqrt(1−ᾱ'−σ²) ε̂   DDIM, Eq. 12
    x' ~ N(μ, σ²)

μ is affine in x and in the network's output, whatever the network predicts. That also holds for flow-matching
models, and for the other samplers here. So four numbers a step are the whole scheduler: c_x, c_o, σ, log σ.
`ddim_table` derives and computes them once; `ddim_step` and the kernels need nothing else.
"""

import copy
import functools
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from models import (DTYPES, condition, ddim_scheduler, decode, denoiser, encode_prompts, is_flow,
                    latents_shape, main_tokenizer, predict, prediction_kind,
                    schedule_inputs)  # first: it quiets the libraries
from loading import is_emoji, load_pipeline

import torch
from diffusers.utils.torch_utils import randn_tensor

from kernels.ddim_step import fused_ddim_step
from prompts import cut_notice
from run_folder import picture_grid, read_config


@dataclass
class Trajectories:
    """What a batch of samples did: step t went from latents[:, t] to latents[:, t + 1], with log-density
    log_probs[:, t]."""

    latents: torch.Tensor  # (B, T+1, C, H, W) float32, from pure noise to x_0
    log_probs: torch.Tensor  # (B, T) float32, mean over C, H, W; 0 where a step had no noise
    timesteps: torch.Tensor  # (T,) as the network is told them, descending
    images: torch.Tensor  # (B, 3, height, width) uint8; None in training, once they are scored
    prompts: list


def noise_levels(scheduler, num_steps, mu=None, sigmas=None):
    """(timesteps (T,), α (T+1,), s (T+1,) float64): step i leads from α_i x_0 + s_i ε to level i + 1.

    mu, sigmas: what the pipelines of some flow-matching models hand to their scheduler's set_timesteps.
    """
    scheduler = copy.deepcopy(ddim_scheduler(scheduler))  # set_timesteps leaves marks
    total = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"--steps {num_steps}: the schedule has {total}; choose 1 to {total}")
    if is_flow(scheduler):
        if scheduler.config.use_dynamic_shifting and mu is None:
            raise ValueError("scheduler: use_dynamic_shifting needs the shift mu of the picture's size, "
                             "which this model does not give; set it to false in "
                             "scheduler/scheduler_config.json")
        scheduler.set_timesteps(num_steps, sigmas=sigmas, **{} if mu is None else {"mu": mu})
        s = scheduler.sigmas.cpu().double()
        return scheduler.timesteps.cpu(), 1 - s, s
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.cpu()[:num_steps]  # "trailing" rounds to one more at 61, 103, ...
    if timesteps.max() >= total:
        raise ValueError(f"--steps {num_steps}: with the scheduler's steps_offset the first step would be "
                         f"{timesteps.max()}, past its {total}; choose {total // 2} or fewer")
    # A step ends where the next one begins. t - 1000/T, where DDIM ends it, is elsewhere under some spacings.
    alpha_bar = torch.cat([scheduler.alphas_cumprod[timesteps], scheduler.final_alpha_cumprod.view(1)])
    return timesteps, alpha_bar.double().sqrt(), (1 - alpha_bar.double()).sqrt()


WINDOW, WINDOW_SHIFT = r"(\d+):(\d+)", r"([1-9]\d*)/([1-9]\d*)"  # first:end, steps/epochs


def window_places(steps, window="", shift=""):
    """[(first, end)] of the steps that are actions: several places where the window moves.

    window: "first:end", its first place. shift: "2/5" moves it on by 2 steps every 5 epochs, as in MixGRPO
    (arXiv 2507.21802). Where it would pass the last step, it starts again from its first place."""
    first, end = map(int, window.split(":")) if window else (0, steps)
    if not shift:
        return [(first, end)]
    places = range(first, steps - (end - first) + 1, int(shift.split("/")[0]))
    return [(place, place + end - first) for place in places]


def step_etas(steps, eta=1.0, window="", shift="", epoch=1):
    """(T,) the eta of each step: `eta` within the window of steps that are actions, 0 outside it.

    window, shift: see window_places; without a window all steps are actions. epoch: the first one is 1."""
    places = window_places(steps, window, shift)
    moves = (epoch - 1) // int(shift.split("/")[1]) if shift else 0
    first, end = places[moves % len(places)]
    step = torch.arange(steps)
    return torch.where((step >= first) & (step < end), eta, 0.0)


# η of each sampler where nothing else is asked for. 1 is DDPM's noise; flow and dance have their papers'
# value, cps has Flow-GRPO's. Above MAX_ETAS ddim could add more noise than s', and cps would add less again.
ETAS = {"ddim": 1.0, "cps": 0.7, "flow": 0.7, "dance": 0.3}
MAX_ETAS = {"ddim": 1.0, "cps": 1.0, "flow": 2.0, "dance": 2.0}


def ddim_table(scheduler, num_steps, eta=1.0, sampler="ddim", mu=None, sigmas=None):
    """(timesteps (T,), table (T, 4) float32): c_x, c_o, σ, log σ of each step: μ = c_x x + c_o output.

    A noisy sample is x = α x_0 + s ε. Stable Diffusion has α = sqrt(ᾱ) and s = sqrt(1 − ᾱ), flow matching
    α = 1 − t and s = t. The network's output o and x give x̂_0 and ε̂, both affine in (x, o):

        epsilon   ε̂ = o               v      x̂_0 = α x − s o
        sample    x̂_0 = o             flow   x̂_0 = (x − s o)/(α + s),   o = ε − x_0

    The other of the two follows from x = α x̂_0 + s ε̂. A step to (α', s') puts the two together anew, with
    less of the old noise ε̂ where it adds new: μ = α' x̂_0 + b ε̂. With b = s' and σ = 0 that is the model's
    ODE, in any coordinates. The samplers differ in σ and b:

        ddim    σ = η s' sqrt(1 − (α s'/(α' s))²)       b = sqrt(s'² − σ²)      Eq. 16 and 12; η = 1: DDPM
        cps     σ = s' sin(η π/2)                       b = sqrt(s'² − σ²)      arXiv 2509.05952
        flow    σ = η k' sqrt(t/(1 − t)) sqrt(t − t')   b = s' − σ²/(2 k' t)    Flow-GRPO, arXiv 2505.05470
        dance   σ = η k' sqrt(t − t')                   b = s' − σ²/(2 k' t)    DanceGRPO, arXiv 2505.07818

    k = α + s takes any x to flow coordinates: x/k at time t = s/k. There the last two are Euler–Maruyama
    steps of an SDE with g² = σ²/(t − t') and drift v + g²/(2t) ε̂. Such a step is right only to
    first order in its length, so some noise stays in the picture.

    eta: η, one for all steps or one for each, (T,), in the sampler's own meaning (see ETAS). Where σ = 0 (at
    η = 0, and in a last step that ends without noise) log σ is -inf: a deterministic step.
    timesteps: what the network is told, int64, or float32 with a flow-matching scheduler.
    mu, sigmas: see noise_levels.
    Raises ValueError for steps that the schedule does not have, an unknown sampler, an eta out of its range,
    a step that is not affine, or a schedule under which x_0 cannot be recovered.
    """
    if sampler not in ETAS:
        raise ValueError(f"--sampler {sampler}: unknown; choose {', '.join(ETAS)}")
    eta = torch.as_tensor(eta, dtype=torch.float64)
    if not ((eta >= 0) & (eta <= MAX_ETAS[sampler])).all():
        raise ValueError(f"--eta {eta.tolist()}: must lie between 0 (deterministic) and "
                         f"{MAX_ETAS[sampler]:g} (with --sampler {sampler})")
    timesteps, alpha, s = noise_levels(scheduler, num_steps, mu, sigmas)
    alpha, alpha_next, s, s_next = alpha[:-1], alpha[1:], s[:-1], s[1:]

    if sampler == "ddim":
        sigma = eta * s_next * (1 - (alpha * s_next / (alpha_next * s)) ** 2).sqrt()
    elif sampler == "cps":
        sigma = s_next * (eta * math.pi / 2).sin()
    elif sampler in ("flow", "dance"):
        k_next, t = alpha_next + s_next, s / (alpha + s)
        t_next = s_next / k_next
        sigma = eta * k_next * (t - t_next).sqrt()
        if sampler == "flow":
            sigma *= (t / (1 - torch.where(t < 1, t, t_next))).sqrt()  # 1 − t is 0 at pure noise
    if sampler in ("ddim", "cps"):
        b = (s_next**2 - sigma**2).clamp(min=0).sqrt()
    else:
        b = s_next - sigma**2 / (2 * k_next * t)

    # x̂_0 and ε̂, each as (factor of x, factor of the network's output)
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    kind = prediction_kind(scheduler)
    if kind == "epsilon":
        clean, noise = (1 / alpha, -s / alpha), (zero, one)
    elif kind == "v_prediction":
        clean, noise = (alpha, -s), (s, alpha)
    elif kind == "sample":
        clean, noise = (zero, one), (1 / s, -alpha / s)
    elif kind == "flow":
        clean, noise = (one / (alpha + s), -s / (alpha + s)), (one / (alpha + s), alpha / (alpha + s))
    else:
        raise ValueError(f"scheduler: prediction_type {kind!r} is unknown; use epsilon, v_prediction or "
                         "sample, or FlowMatchEulerDiscreteScheduler")
    c_x, c_o = (alpha_next * clean[i] + b * noise[i] for i in (0, 1))
    table = torch.stack([c_x, c_o, sigma, sigma.log()], dim=1).float()
    if not table[:, :3].isfinite().all():
        raise ValueError(f"scheduler: with prediction_type {kind!r} its schedule ends in pure noise, where "
                         "x_0 cannot be recovered; such a schedule (rescale_betas_zero_snr) needs "
                         "v_prediction")
    return timesteps, table


def step_weights(table, policy_steps, kind):
    """(T,) factors of the steps' losses, of mean 1 over the trained ones.

    ∂ log p / ∂ output is z c_o / (σ D). Under Stable Diffusion's schedule |c_o / σ| is nearly even (0.6 to
    1.1 at T = 20), but 5.4 in the last but one: that step, which settles only fine details, has
    the largest gradient. "equal" divides by the factor."""
    weights = torch.ones_like(table[:, 0])
    if kind == "equal":
        weights[policy_steps] = (table[:, 2] / table[:, 1].abs())[policy_steps]
    return weights / weights[policy_steps].mean()


def ddim_step(output, latents, coefficients, next_latents=None, generator=None, guidance_scale=None,
              noise=None):
    """One stochastic step (Eq. 12), and the log-density of the step taken: (next_latents, log_prob (B,)).

    Draws the next latents when they are not given, and scores them when they are: one function for rollout
    and update, so that the two agree to the last bit. The latents are rounded to the dtype they are stored
    in *before* they are scored.

    output: what the network predicted, (B, C, H, W); with a guidance_scale (2B, C, H, W), unconditional half
    first.
    coefficients: a row of `ddim_table`, (4,), or one for each sample, (B, 4), on the latents' device.
    noise: normals like the latents; without it they are drawn from generator: one, or one for each sample.
    log_prob is a mean over C, H, W, and 0 where σ is 0.
    """
    if next_latents is None and noise is None:
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=torch.float32)
    if next_latents is not None:
        next_latents = next_latents.contiguous()
    next_latents, log_prob = fused_ddim_step(output.contiguous(), latents.contiguous(), coefficients,
                                             guidance_scale, noise=noise, next_latents=next_latents)
    return next_latents, torch.where(coefficients[..., 2] > 0, log_prob, 0.0)


def signal_and_noise(scheduler, timesteps):
    """(α, s), each (B, 1, 1, 1), of x_t = α x_0 + s ε: √ᾱ and √(1−ᾱ), or 1 − t and t of flow models."""
    if is_flow(scheduler):
        sigma = timesteps.view(-1, 1, 1, 1) / scheduler.config.num_train_timesteps  # shifted as in sampling
        return 1 - sigma, sigma
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)  # stays there
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def noised(scheduler, clean, noise, timesteps):
    """(x_t, the network's target, |∂x̂_0 / ∂output| (B,)). clean: x_0, (B, C, H, W); timesteps: (B,)."""
    signal, sigma = signal_and_noise(scheduler, timesteps)
    target, slope = {"epsilon": (noise, sigma / signal),
                     "v_prediction": (signal * noise - sigma * clean, sigma),
                     "sample": (clean, torch.ones_like(sigma)),
                     "flow": (noise - clean, sigma / (signal + sigma))}[prediction_kind(scheduler)]
    return signal * clean + sigma * noise, target, slope.flatten()


@torch.no_grad()
def sample_trajectories(pipeline, prompts, num_steps=50, guidance_scale=5.0, eta=1.0, generator=None,
                        dtype=None, on_step=None, cache=None, step=None, sampler="ddim"):
    """Samples one picture a prompt and keeps the whole trajectory: Trajectories.

    guidance_scale: 1 or less means no guidance, and half the work.
    generator: a torch.Generator, or one for each prompt (then a picture does not depend on its batch).
    eta, sampler: see ddim_table.
    dtype: what the network computes in, by autocast (default: that of its weights). The trajectory
    itself is float32.
    on_step: called after each step, for a progress bar. cache: see encode_prompts.
    step: what takes a step: `guided_step` (the default), or a `GraphedStep`, which launches faster.
    """
    network = denoiser(pipeline)
    device, dtype = network.device, dtype or network.dtype
    inputs = schedule_inputs(pipeline, num_steps)
    timesteps, table = ddim_table(pipeline.scheduler, num_steps, eta, sampler, **inputs)
    table = table.to(device)  # all that a step needs of the scheduler: no wait for the GPU
    *embeds, guidance_scale = condition(pipeline, prompts, guidance_scale, cache)
    shape = (len(prompts), *latents_shape(pipeline))
    latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    trajectory, log_probs = [latents], []
    for t, coefficients in zip(timesteps.to(device), table):
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents, log_prob = (step or guided_step)(network, latents, t.expand(len(prompts)), coefficients,
                                                  noise, *embeds, guidance_scale, dtype)
        trajectory.append(latents)
        log_probs.append(log_prob)
        if on_step:
            on_step()
    return Trajectories(torch.stack(trajectory, 1), torch.stack(log_probs, 1), timesteps,
                        decode(pipeline, latents), list(prompts))


def guided_step(network, latents, timesteps, coefficients, noise, prompt_embeds, negative_embeds,
                guidance_scale, dtype):
    """Predict, guide, step, score: (next_latents, log_prob (B,)). Nothing in it waits for the GPU."""
    output = predict(network, latents, timesteps, prompt_embeds, negative_embeds, dtype)
    return ddim_step(output, latents, coefficients, guidance_scale=guidance_scale, noise=noise)


def tensors_in(inputs):
    """The tensors of a list of tensors, dicts of tensors, and None."""
    flat = [value for entry in inputs
            for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [value for value in flat if value is not None]


class GraphedStep:
    """guided_step as one CUDA graph: one launch instead of one for each operation of the network.

    A graph replays on fixed addresses. Inputs are copied into those that it was captured with, weights
    are read where they are (so they may be trained in between, but not replaced), and a batch of another
    size has a graph of its own.
    """

    def __init__(self):
        self.graphs = {}

    def __call__(self, network, latents, timesteps, coefficients, noise, prompt_embeds, negative_embeds,
                 guidance_scale, dtype):
        inputs = [latents, timesteps, coefficients, noise, prompt_embeds, negative_embeds]
        key = (*(value.shape for value in tensors_in(inputs)), guidance_scale, dtype)
        if key not in self.graphs:
            fixed = [{key: value.clone() for key, value in entry.items()} if isinstance(entry, dict)
                     else entry if entry is None else entry.clone() for entry in inputs]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries choose their kernels in the first calls
                for _ in range(3):
                    guided_step(network, *fixed, guidance_scale, dtype)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = guided_step(network, *fixed, guidance_scale, dtype)
            self.graphs[key] = graph, tensors_in(fixed), outputs
        graph, places, outputs = self.graphs[key]
        for place, value in zip(places, tensors_in(inputs), strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(value.clone() for value in outputs)


@torch.no_grad()
def set_strength(pipeline, scale, base=None, tuned=None):
    """Sets how much of what was trained counts, from 0, the base model, to 1, as trained.

    base, tuned: the parameters of a whole network that was trained, which are blended in place. Without them
    an adapter's weight is set."""
    if base is None:
        pipeline.set_adapters(["tuned"], [scale])
    else:
        for parameter, start, end in zip(denoiser(pipeline).parameters(), base, tuned, strict=True):
            parameter.copy_(torch.lerp(start, end, scale))


# How pictures are drawn where neither a flag nor a run says otherwise
DRAWING = {"guidance_scale": 4.0, "dtype": "fp32", "sampler": "ddim", "sample_batch": 8, "window": "",
           "window_shift": "", "lora_rank": 0, "resolution": 0}


def run_settings(lora):
    """The settings in the config.json of the run that --lora names, a dict; {} without one. Raises
    ValueError, one line, for what no run writes there."""
    folder = Path(lora or "")
    folder = folder.parent if folder.name == "last" else folder
    if not lora or not (folder / "config.json").exists():
        return {}
    run = read_config(folder)
    forms = {"dtype": "|".join(DTYPES), "sampler": "|".join(ETAS), "window": f"({WINDOW})?",
             "window_shift": f"({WINDOW_SHIFT})?"}
    for key, like in (DRAWING | {"model": "", "steps": 1, "eta": 1.0}).items():
        value = run.get(key, like)
        kinds = (float, int) if type(like) is float else (type(like),)
        if type(value) not in kinds or key in forms and not re.fullmatch(forms[key], value):
            raise ValueError(f"{folder / 'config.json'}: {key} is {value!r:.80}, which no run "
                             "writes; mend it")
    return run


def drawing_settings(args):
    """What is drawn and how, a dict: the flags, then the settings of the run that --lora names, then
    defaults. Raises ValueError, one line."""
    for setting, value in (("images", args.images), ("batch", args.batch), ("steps", args.steps)):
        if value is not None and value < 1:
            raise ValueError(f"--{setting} {value}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: must be at least 0 and below 2**63")
    suffix = Path(args.out).suffix.lower()
    if not Path(args.out).parent.is_dir() or suffix not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {args.out}: must be a .png, .jpg or .webp file in a folder that exists")
    if args.guidance_scale not in (None, 0.0) and not 1 <= args.guidance_scale < math.inf:
        raise ValueError(f"--guidance-scale {args.guidance_scale}: must be at least 1, or 0; both mean none")
    if args.lora_scale and not args.lora:
        raise ValueError(f"--lora-scale {' '.join(map(str, args.lora_scale))}: needs --lora, the run whose "
                         "strength it is")
    args.lora_scale = args.lora_scale or [1.0]
    if not all(map(math.isfinite, args.lora_scale)):
        raise ValueError(f"--lora-scale {' '.join(map(str, args.lora_scale))}: must be numbers")
    run = run_settings(args.lora)
    model = args.model or run.get("model", "models/emoji")
    run = DRAWING | {"steps": 10 if is_emoji(model) else 50} | run | {"model": model}
    flags = {"model": args.model, "steps": args.steps, "guidance_scale": args.guidance_scale,
             "dtype": args.dtype, "sampler": args.sampler, "eta": args.eta, "sample_batch": args.batch,
             "resolution": args.resolution}
    given = {key: value for key, value in flags.items() if value is not None}
    sampler = given.get("sampler", run["sampler"])
    if sampler != run["sampler"] or "eta" not in run:
        run["eta"] = ETAS[sampler]
    if "eta" in given or given.get("steps", run["steps"]) != run["steps"]:
        run["window"] = run["window_shift"] = ""  # a window counts the run's own steps
    return run | given


def main(arguments=None):
    import argparse

    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--prompt", action="append",
                        help='may be repeated (default: "a cat", "a fox", "a butterfly", "a panda")')
    parser.add_argument("--lora", metavar="RUN", help="a run's folder: the base model's pictures and, below, "
                        "the tuned one's, as the run drew them in its evaluations")
    parser.add_argument("--model", help="a pipeline folder in diffusers' layout, or a hub id (default: "
                        "the run's, or models/emoji)")
    parser.add_argument("--lora-scale", type=float, nargs="+", help="strengths of what was trained: 0 is "
                        "the base model, 1 as trained (default 1); several: one below the other")
    parser.add_argument("--images", type=int, default=4, help="pictures a prompt (default 4)")
    parser.add_argument("--batch", type=int, help="pictures drawn at once (default: the run's, or 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt (default 0)")
    parser.add_argument("--resolution", type=int, help="pixels of a side (default: the run's, or the "
                        "model's)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the run's, or 10 for the "
                        "shipped models, 50 otherwise)")
    parser.add_argument("--guidance-scale", type=float, help="1 for none (default: the run's, or 4)")
    parser.add_argument("--sampler", choices=ETAS, help="how noise is added (default: the run's, or ddim)")
    parser.add_argument("--eta", type=float, help="how much noise; 0 is none (default: the run's, or "
                        + ", ".join(f"{name} {eta:g}" for name, eta in ETAS.items()) + ")")
    parser.add_argument("--device", help="cpu, cuda, mps (default: cuda where there is one, else "
                        "cpu)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="of the network's arithmetic (default: the run's, or fp32)")
    parser.add_argument("--out", default="samples.png", help="the picture file (default samples.png)")
    parser.error = lambda message: parser.exit(2, f"{message}\n")
    args = parser.parse_args(arguments)
    prompts = args.prompt or ["a cat", "a fox", "a butterfly", "a panda"]
    base = tuned = None
    try:
        run = drawing_settings(args)
        steps, dtype, sampler = run["steps"], DTYPES[run["dtype"]], run["sampler"]
        eta = step_etas(steps, run["eta"], run["window"], run["window_shift"])  # the window's first place
        # a whole network is trained in float32, and computes in dtype by autocast
        weights_dtype = torch.float32 if args.lora and not run["lora_rank"] else dtype
        load = functools.partial(load_pipeline, run["model"], args.device, weights_dtype,
                                 resolution=run["resolution"])
        pipeline = load(lora=args.lora)
        ddim_table(pipeline.scheduler, steps, eta, sampler, **schedule_inputs(pipeline, steps))
        if args.lora and not getattr(denoiser(pipeline), "peft_config", None):
            base = [*denoiser(load()).parameters()]
            tuned = [p.clone() for p in denoiser(pipeline).parameters()]
        if notice := cut_notice(main_tokenizer(pipeline), prompts):
            print(notice, file=sys.stderr)
        new = not Path(args.out).exists()
        open(args.out, "ab").close()  # fails before the work, not after it
        if new:
            Path(args.out).unlink()
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")

    from tqdm import tqdm

    labels = [(None, "")]
    if args.lora:
        names = [f"strength {scale:g}: " for scale in args.lora_scale]
        names = ["tuned: "] if len(names) == 1 else names
        labels = [(0.0, "base: "), *zip(args.lora_scale, names)]
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.images)]  # a column per seed
    batches = [jobs[i:i + run["sample_batch"]] for i in range(0, len(jobs), run["sample_batch"])]
    drawn, cache = {}, {}
    try:
        with tqdm(total=len(batches) * len(labels) * steps, desc="sampling") as bar:
            for scale, label in labels:
                if scale is not None:
                    set_strength(pipeline, scale, base, tuned)
                pictures = []
                for batch in batches:
                    generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
                    pictures.append(sample_trajectories(
                        pipeline, [prompt for prompt, _ in batch], steps, run["guidance_scale"], eta,
                        generators, dtype, bar.update, cache, sampler=sampler).images)
                drawn |= zip([label + prompt for prompt in prompts], torch.cat(pictures).split(args.images))
    except FloatingPointError as error:
        parser.exit(1, f"{args.lora or run['model']}: {error} with --dtype {run['dtype']}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped\n")
    names = [label + prompt for prompt in prompts for _, label in labels]
    titles = [f"seed {args.seed + i}" for i in range(args.images)]
    sheet = picture_grid([drawn[name] for name in names], names, titles)
    try:
        sheet.save(args.out)
    except (ValueError, OSError) as error:  # formats other than PNG have a largest size
        png = Path(args.out).with_suffix(".png")
        args.out = f"{args.out}.png" if png.exists() else str(png)
        try:
            sheet.save(args.out)
        except OSError as again:
            parser.exit(1, f"--out {args.out}: cannot be written ({again})\n")
        print(f"{error}; saved as {args.out}", file=sys.stderr)
    print(f"{args.out}: {len(prompts)} prompts, seeds {args.seed} to {args.seed + args.images - 1}")


if __name__ == "__main__":
    main()
