"""Forward-process RL: no likelihood, any sampler; only finished pictures, noised again (NFT and AWM).

    python forward.py --reward compress                       DiffusionNFT (arXiv 2509.16117)
    python forward.py --reward compress --loss awm            advantage weighted matching (2509.25050)
    python forward.py --reward compress --guidance-scale 1    no guidance at all, as published
    python forward.py --reward compress --advantages zero     the control: must not move the model

Sample pictures x_0 with the weights v_old, score them, noise them to x_t = α x_0 + s ε, and train the
network v_θ there, where v is the target that it was pretrained on:

    r     clip(A / (2 A_max) + 1/2, 0, 1)         how good a picture is; 1/2: as good as the others
    nft   ( r ‖v⁺ − v‖² + (1 − r) ‖v⁻ − v‖² ) / β,   v± = v_old ± β (v_θ − v_old)
    awm   −(2r − 1) exp(log p_θ − log p_old), clipped, + β ‖v_θ − v_old‖²,   log p = −‖v_θ − v‖²

With e = v_old − v and δ = v_θ − v_old, nft is ‖e‖²/β + 2 (2r − 1) ⟨e, δ⟩ + β ‖δ‖²: a term that is
linear in the advantage, and a trust region around the weights that sampled. To first order awm is the
same. At r = 1/2 its gradient is 0: the model cannot drift as rwr.py's does (tutorial 11).

v is the network's own target: ε, VP's v, x_0, or the flow's ε − x_0. At a given x_t each is affine in any
other, so their errors differ by a factor of t alone: a weight of the timesteps. --weighting adaptive, the
default and DiffusionNFT's, takes the errors of x̂_0, each branch over its own size; none takes those of v,
and the identity is exact.
"""

import time
from dataclasses import dataclass

import torch

import settings
from ddpo import is_loss, kl_loss, mixed_advantages
from evaluate import begin, end_epoch, finish
from kernels.ddim_step import guided
from models import denoiser, predict
from processes import command_line, gather, reduce, seeded
from sample import noised
from settings import Settings, above_zero, at_least, check_choices, refuse
from training import (apply_gradients, collect, describe, progress_bar, reference_output, reward_row,
                      shard, start, time_row, training_inputs, using)


@dataclass
class Config(Settings):
    """The shared settings (settings.py), and those of the forward process."""

    # forward process
    loss: str = "nft"  # nft (DiffusionNFT), awm (advantage weighted matching)
    beta: float = 0.0  # of the trust region; smaller is faster and less stable (0: 0.2 for nft, 0.5 for awm)
    weighting: str = "adaptive"  # of the timesteps: adaptive, or none, see matching_error
    clip_range: float = 1.0  # of awm's ratio; so wide, as published, that it seldom acts
    advantages: str = "group"  # group (the pictures of one prompt in an epoch), zero: the control
    advantage_clip: float = 5.0  # A_max: larger advantages count as this
    old_flat: int = 0  # updates before v_old trails v_θ, see old_decay
    old_rise: float = 0.001  # rise of the decay of v_old with each update after --old-flat
    old_ceiling: float = 0.5  # largest decay of v_old
    kl: float = 0.0  # weight of the divergence from the base model, mean_D ‖v_θ − v_ref‖²
    inner_epochs: int = 4  # passes over the pictures; with v_old's, nearly the work of 5 steps in ddpo.py


# In groups, as published, even where DDPO's paper has a buffer for each prompt.
PRESETS = {name: preset and preset | dict(advantages="group", group_size=4, inner_epochs=8)
           for name, preset in settings.PRESETS.items()}


def optimality(advantages, advantage_clip):
    """(B,) r of DiffusionNFT: the advantage, clipped to ±advantage_clip and mapped to [0, 1]."""
    return (advantages / advantage_clip / 2 + 0.5).clamp(0, 1)


def matching_error(output, target, slope=None):
    """(B,) mean_D (output − target)². With the slope of sample.noised, (B,): that of x̂_0, divided by
    mean_D |x̂_0 − x_0| without its gradient (adaptive weighting, DiffusionNFT, sec. 3.3)."""
    error = (output - target).flatten(1)
    if slope is None:
        return error.square().mean(1)
    error = slope[:, None] * error
    return error.square().mean(1) / error.abs().mean(1).detach().clamp(min=1e-5)


def nft_loss(output, old, target, r, beta, slope=None):
    """(B,) DiffusionNFT, Eq. 5, over β. output, old: v_θ and v_old at x_t, (B, C, H, W); r: (B,).
    A good picture draws v⁺ to its target; a bad one draws the mirror image v⁻, which pushes v_θ away."""
    delta = beta * (output - old)
    positive = matching_error(old + delta, target, slope)
    negative = matching_error(old - delta, target, slope)
    return (r * positive + (1 - r) * negative) / beta


def awm_loss(output, old, target, r, beta, slope=None, clip_range=1.0):
    """(B,) AWM: DDPO-IS with −matching_error for log p, plus β ‖v_θ − v_old‖². For a bad picture
    the first term pushes the error up, ever more weakly as the ratio falls. While 2r − 1 > −β the
    second holds it from the start, else only once the ratio is below β / (1 − 2r). With a slope, 2r − 1
    in effect has the adaptive weight as a factor, large at the noisy steps. Inputs as in nft_loss."""
    log_prob, old_log_prob = (-matching_error(v, target, slope) for v in (output, old))
    ratio_term = is_loss(log_prob, old_log_prob, 2 * r - 1, clip_range)
    return ratio_term + beta * matching_error(output, old)


def old_decay(updates, flat, rise, ceiling):
    """The decay in v_old ← decay v_old + (1 − decay) v_θ, after an epoch. Published (flat, rise, ceiling):
    (0, 0.001, 0.5), or (75, 0.0075, 0.999) for text in pictures. AWM's (0, 0.001, 0.3) are only for
    its trust region: its pictures and log p_old come from the newest weights."""
    return min(max(updates - flat, 0) * rise, ceiling)


def check(config):
    """Fills in the settings that follow from others. Raises ValueError, one line, if they cannot work."""
    check_choices(config, loss=("nft", "awm"), weighting=("none", "adaptive"), advantages=("group", "zero"))
    above_zero(config, "clip_range", "advantage_clip")
    at_least(config, 0, "beta", "kl", "old_flat", "old_rise", "old_ceiling")
    if not config.old_ceiling < 1:
        refuse(config, "old_ceiling", "must be below 1, where v_old would stand still")
    if config.group_size < 2:
        refuse(config, "group_size", "a group needs at least 2 pictures to compare")
    config.beta = config.beta or {"nft": 0.2, "awm": 0.5}[config.loss]  # see awm_loss
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
    pairs = config.images // config.updates  # (picture, t, ε) of an update, over all processes
    updates = config.updates * config.inner_epochs  # of an epoch
    old = [value.detach().to(device, copy=True) for value in (run.saved["old"] if run.saved else parameters)]

    over = begin(run, describe(run, updates, pairs, "(picture, t, ε)", teachers=1 + (config.kl > 0)))
    while not over:
        epoch, clock = run.epoch + 1, time.perf_counter()

        # 1. sample with v_old, 2. reward
        with using(parameters, old):
            prompts, trajectories, scores, seconds = collect(run, epoch)
        clean = torch.cat(gather([trajectories.latents[:, -1].cpu().clone()])).to(device)  # (images, C, H, W)
        del trajectories  # how the pictures came about is of no use here

        # 3. advantages
        advantages = torch.zeros(config.images)  # the control
        if config.advantages == "group":
            advantages = mixed_advantages(run, prompts, scores, None)
        largest = config.advantage_clip * sum(map(abs, run.components.values()))  # of a mixture
        r = optimality(advantages, largest)

        # 4. update
        totals, grad_norms = torch.zeros(3, device=device), []
        steps = torch.rand(config.images, config.steps, generator=seeded(config.seed, epoch, 2)).argsort(1)
        updating = progress_bar(run, "updating", updates * len(shard(run, pairs)))
        for update in range(updates):
            inner, part = divmod(update, config.updates)
            order = torch.randperm(config.images, generator=seeded(config.seed, epoch, 3, inner))
            noise = torch.randn(pairs, *clean.shape[1:], generator=seeded(config.seed, epoch, 4, update))
            for mine in shard(run, pairs).split(config.train_batch):
                index = order[part * pairs + mine]  # which pictures
                t = run.timesteps[steps[index, inner % config.steps].to(device)]  # of the sampler
                x, target, slope = noised(pipeline.scheduler, clean[index], noise[mine].to(device), t)
                *embeds, guidance_scale = training_inputs(run, [prompts[i] for i in index])
                inputs = x, t, *embeds
                with using(parameters, old):  # without gradients
                    v_old = guided(predict(network, *inputs, run.dtype), guidance_scale)
                output = predict(network, *inputs, run.dtype)
                v = guided(output, guidance_scale)
                weighed = slope if config.weighting == "adaptive" else None
                common = v, v_old, target, r[index].to(device), config.beta, weighed
                loss = nft_loss(*common) if config.loss == "nft" else awm_loss(*common, config.clip_range)
                kl = torch.zeros((), device=device)
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
