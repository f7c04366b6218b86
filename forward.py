"""Forward-process RL: no sampler's likelihood, only noised finished pictures (AWM and DiffusionNFT).

    python forward.py --reward compress                       DiffusionNFT (arXiv 2509.16117)
    python forward.py --reward compress --loss awm            advantage weighted matching (2509.25050)
    python forward.py --reward compress --guidance-scale 1    no guidance at all, as published
    python forward.py --reward compress --advantages zero     the control: must not move the model
    python forward.py --resume runs/compress-nft

Sample pictures x_0 with the weights v_old, score them, noise them again to x_t = α x_0 + s ε, and
train the network v_θ at x_t, where v is the target that it was pretrained on:

    r     clip(A / (2 A_max) + 1/2, 0, 1)          how good a picture is: 1/2 is no better than others
    nft   ( r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖² ) / β,   v± = v_old ± β (v_θ − v_old)
    awm   −(2r − 1) exp(log p_θ − log p_old), clipped, + β ‖v_θ − v_old‖²,   log p = −‖v_θ − v‖²

With e = v_old − v and δ = v_θ − v_old, nft is ‖e‖²/β + 2 (2r − 1) ⟨e, δ⟩ + β ‖δ‖²: a term that is
linear in the advantage, and a trust region around the weights that sampled. awm is the same to first
order. Where r = 1/2 the gradient at v_old is 0: the model cannot drift as that of rwr.py does (tutorial 11).

v is the network's own target: ε, VP's v, x_0, or the flow's ε − x_0. At a given x_t each is an affine
function of any other, so their errors differ by a factor that depends on t alone, a weight of the
timesteps. --weighting adaptive takes the errors of x̂_0, whatever the network predicts.
"""

import math
import time
from dataclasses import dataclass

import torch

import settings
from ddpo import is_loss, kl_loss, mixed_advantages
from evaluate import begin, end_epoch, finish
from kernels.ddim_step import guided
from models import denoiser
from sample import noised, predict
from settings import Settings, check_choices, refuse
from training import (apply_gradients, collect, command_line, describe, gather, progress_bar, reduce,
                      reference_output, reward_row, seeded, shard, start, time_row, training_inputs, using)


@dataclass
class Config(Settings):
    """The shared settings (settings.py), and those of the forward process."""

    # forward process
    loss: str = "nft"  # nft (DiffusionNFT), awm (advantage weighted matching)
    beta: float = 1.0  # of the trust region, see the formulas above; smaller is faster and less stable
    weighting: str = "none"  # of the timesteps: none, or adaptive, see matching_error
    clip_range: float = 1.0  # of awm's ratio; as published so wide that it seldom acts
    advantages: str = "group"  # group (of the pictures of one prompt in an epoch), or zero: the control
    advantage_clip: float = 5.0  # A_max: advantages beyond it count as it
    train_first: float = 1.0  # share of the sampler's steps, from the first on, whose t are trained
    old_flat: int = 0  # updates in which v_old is the newest v_θ, see old_decay
    old_rise: float = 0.001  # by which the decay of v_old rises with each update after these
    old_ceiling: float = 0.5  # largest decay of v_old
    kl: float = 0.0  # weight of the divergence from the base model, mean_D ‖v_θ − v_ref‖²
    inner_epochs: int = 4  # passes over the pictures, with new t and ε each time: with those of v_old
        # nearly as much work as ddpo.py's 5 steps of each picture


# Advantages of groups, as published, also where DDPO's paper has those of each prompt's buffer.
PRESETS = {name: preset and preset | dict(advantages="group", group_size=4, inner_epochs=8)
           for name, preset in settings.PRESETS.items()}


def optimality(advantages, advantage_clip):
    """(B,) r of DiffusionNFT: the advantage, clipped to ±advantage_clip and mapped to [0, 1]."""
    return (advantages / advantage_clip / 2 + 0.5).clamp(0, 1)


def matching_error(output, target, slope=None):
    """(B,) mean_D (output − target)², what the network was pretrained on. With the slope of `noised`, (B,):
    that of x̂_0, divided by mean_D |x̂_0 − x_0| without its gradient, so that no timestep outweighs the others
    (adaptive weighting, DiffusionNFT, sec. 3.3)."""
    error = (output - target).flatten(1)
    if slope is None:
        return error.square().mean(1)
    error = slope[:, None] * error
    return error.square().mean(1) / error.abs().mean(1).detach().clamp(min=1e-5)


def nft_loss(output, old, target, r, beta, slope=None):
    """(B,) DiffusionNFT, Eq. 5, over β. output, old: v_θ and v_old at x_t, (B, C, H, W); r: (B,).
    A good picture draws v⁺ to its target, a bad one draws the mirror image v⁻, and so pushes v_θ away."""
    delta = beta * (output - old)
    positive = matching_error(old + delta, target, slope)
    negative = matching_error(old - delta, target, slope)
    return (r * positive + (1 - r) * negative) / beta


def awm_loss(output, old, target, r, beta, slope=None, clip_range=1.0):
    """(B,) AWM: the loss of DDPO-IS with −matching_error for log p, plus β ‖v_θ − v_old‖², without
    which nothing would bound the error of a bad picture, which is to grow."""
    log_prob, old_log_prob = (-matching_error(v, target, slope) for v in (output, old))
    return is_loss(log_prob, old_log_prob, 2 * r - 1, clip_range) + beta * matching_error(output, old)


def old_decay(updates, flat, rise, ceiling):
    """The decay of v_old after so many updates, in v_old ← decay v_old + (1 − decay) v_θ after each epoch.
    Published are (0, 0.001, 0.5), (75, 0.0075, 0.999) for text in pictures, and (0, 0.001, 0.3) for AWM."""
    return min(max(updates - flat, 0) * rise, ceiling)


def check(config):
    """Fills in the settings that follow from others. Raises ValueError, one line, for what cannot work."""
    check_choices(config, loss=("nft", "awm"), weighting=("none", "adaptive"), advantages=("group", "zero"))
    for setting in ("beta", "clip_range", "advantage_clip"):
        if not getattr(config, setting) > 0:
            refuse(config, setting, "must be above 0")
    for setting in ("kl", "old_flat", "old_rise", "old_ceiling"):
        if not getattr(config, setting) >= 0:
            refuse(config, setting, "must not be negative")
    if not config.old_ceiling < 1:
        refuse(config, "old_ceiling", "must be below 1, where v_old would stand still")
    if not 0 < config.train_first <= 1:
        refuse(config, "train_first", "must be above 0 and at most 1")
    if config.group_size < 2:
        refuse(config, "group_size", "a group needs at least 2 pictures to compare")
    suffix = "" if config.name else f"-{config.loss}"
    config = settings.check(config)
    config.name += suffix  # beside the runs of ddpo.py
    return config


def parse_config(arguments):
    """(Config, resume) from the command line."""
    return settings.parse_config(arguments, Config, PRESETS, __doc__)


def prepare(config, resume=False):
    return start(check(config), resume, reference=config.kl > 0)


def train(config, resume=False):
    """As ddpo.train: the run's folder."""
    return fit(prepare(config, resume))


def fit(run):
    """The loop: sample, reward, advantages, update, log. Returns the run's folder."""
    config, device, pipeline, parameters = run.config, run.device, run.pipeline, run.parameters
    network = denoiser(pipeline)
    timesteps = run.timesteps[:math.ceil(config.train_first * len(run.timesteps))]  # those of the sampler
    adaptive = config.weighting == "adaptive"
    pairs = config.images // config.updates  # (picture, t, ε) of an update, over all processes
    updates = config.updates * config.inner_epochs  # of an epoch
    old = [value.detach().to(device, copy=True) for value in (run.saved["old"] if run.saved else parameters)]

    over = begin(run, describe(run, updates, pairs, "(picture, t, ε)", teachers=1 + (config.kl > 0)))
    while not over:
        epoch, clock = run.epoch + 1, time.perf_counter()

        # 1. sample with v_old, 2. reward
        with using(parameters, old):
            prompts, trajectories, scores, seconds = collect(run, epoch)
        clean = torch.cat(gather([trajectories.latents[:, -1].cpu().clone()]))  # (images, C, H, W): x_0
        del trajectories  # how the pictures came about is of no use here

        # 3. advantages
        r = torch.full((config.images,), 0.5)
        if config.advantages == "group":
            r = optimality(mixed_advantages(run, prompts, scores, None), config.advantage_clip)

        # 4. update
        totals, grad_norms = torch.zeros(3, device=device), []
        steps = torch.rand(config.images, len(timesteps), generator=seeded(config.seed, epoch, 2)).argsort(1)
        updating = progress_bar(run, "updating", updates * len(shard(run, pairs)))
        for update in range(updates):
            inner, part = divmod(update, config.updates)
            order = torch.randperm(config.images, generator=seeded(config.seed, epoch, 3, inner))
            noise = torch.randn(pairs, *clean.shape[1:], generator=seeded(config.seed, epoch, 4, update))
            for mine in shard(run, pairs).split(config.train_batch):
                index = order.split(pairs)[part][mine]  # which pictures
                t = timesteps[steps[index, inner % len(timesteps)].to(device)]
                x, target, slope = noised(pipeline.scheduler, clean[index].to(device), noise[mine].to(device), t)
                *embeds, guidance_scale = training_inputs(run, [prompts[i] for i in index])
                inputs = x, t, *embeds
                with torch.no_grad(), using(parameters, old):
                    v_old = guided(predict(network, *inputs, run.dtype), guidance_scale)
                output = predict(network, *inputs, run.dtype)
                v = guided(output, guidance_scale)
                common = v, v_old, target, r[index].to(device), config.beta, slope if adaptive else None
                loss = nft_loss(*common) if config.loss == "nft" else awm_loss(*common, config.clip_range)
                kl = loss.new_zeros(())
                if config.kl:
                    kl = kl_loss(output, reference_output(run, *inputs), guidance_scale).sum()
                run.scaler.scale((loss.sum() + config.kl * kl) / pairs).backward()
                totals += torch.stack([loss.sum(), matching_error(v, v_old).sum(), kl]).detach()
                updating.update(len(index))
            grad_norms.append(apply_gradients(run))
        updating.close()
        decay = old_decay(run.updates, config.old_flat, config.old_rise, config.old_ceiling)
        for value, p in zip(old, parameters):
            value.lerp_(p.detach(), 1 - decay)

        # 5. log
        loss, deviation, kl = (reduce(totals) / (pairs * updates)).tolist()
        row = {"epoch": epoch, "images": epoch * config.images} | reward_row(run, scores)
        row |= {"loss": loss, "deviation": deviation, "old_decay": decay} | ({"kl": kl} if config.kl else {})
        row |= {"grad_norm": sum(grad_norms) / len(grad_norms)} | time_row(run, clock, *seconds)
        over = end_epoch(run, row, clock, old=[value.cpu() for value in old])
    return finish(run)


def main(arguments=None):
    command_line(arguments, parse_config, prepare, fit)


if __name__ == "__main__":
    main()
