"""RWR: reward-weighted regression on the model's own pictures (the baseline of arXiv 2305.13301, sec. 4.2).

    python rwr.py --reward compress                       every picture counts, good ones more
    python rwr.py --reward compress --weights sparse      only the best count
    python rwr.py --resume runs/compress-rwr

Sample pictures, weigh each by its reward, and train on them as on any data set, with the ordinary
denoising loss. Then sample anew from the better model.

    RWR          w = exp(β r) / Z(c)                        Z: so that the mean weight is 1
    RWR-sparse   w = 1 / share where r is in the top 10 % (at least one picture a prompt), else 0
    loss         E[ w(x_0, c) ‖ε − ε̂_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t, c)‖² ],   t uniform, ε normal

To maximise E[w log p(x_0 | c)] would be right, but a diffusion model does not know log p(x_0 | c). The
loss takes its place as a bound. DDPO needs no bound: its actions are the steps, whose likelihoods are
known (`ddpo.py`).

`--beta 0` is the control: all weights are 1, the reward has no influence, and the pictures change all the
same. A guided prediction is not the denoiser of the pictures that it draws, so fitting it to them moves
it: the pictures of the emoji model wash out and become smaller files (with --no-train-guidance larger
ones). Pictures drawn without guidance, in few steps, are smoother than the data that the model was
trained on, so each generation is smoother than the last. The effect of the reward is the difference
from the control (`python reproduce.py algorithms`).
"""

import time
from dataclasses import dataclass

import torch

import settings
from ddpo import batch_advantages
from evaluate import begin, end_epoch, finish
from kernels.ddim_step import guided
from models import denoiser, predict
from processes import command_line, gather, reduce, seeded
from sample import noised
from settings import Settings, above_zero, at_least, check_choices, emoji_sized, refuse
from training import (apply_gradients, collect, describe, progress_bar, reward_row, shard, start,
                      time_row, training_inputs)


@dataclass
class Config(Settings):
    """The shared settings (settings.py), and RWR's own. An epoch makes updates · inner_epochs updates
    of images / updates pictures each."""

    # RWR
    weights: str = "exp"  # exp (RWR), sparse (RWR-sparse)
    beta: float = 2.0  # in exp(β r): 1/temperature, with r in standard deviations, see weigh
    top: float = 0.1  # share of the pictures that RWR-sparse trains on, at least one a prompt: a
        # quarter with groups of 4
    per_prompt: bool = True  # weigh a picture among those of its prompt, not among all of the epoch
    inner_epochs: int = 5  # passes over the pictures, with new t and ε each time: as many network
        # rows as ddpo.py's 5 steps of each picture
    lr: float = 0.0  # 0: that of ddpo.py, but only a quarter of it for the emoji models, whose
        # pictures wash out above that


# The paper: 10k pictures an iteration, 400 updates of 128. Here a tenth of the pictures, in groups,
# because weights compare the pictures of a prompt.
PRESETS = {name: preset and preset | dict(images=1024, updates=8, group_size=4, epochs=20,
                                          eval_every=2, checkpoint_every=1)
           for name, preset in settings.PRESETS.items()}


def exp_weights(rewards, beta):
    """(n,) exp(β r) / Z, of mean 1. β = 0: all count alike; β → ∞: the best alone."""
    return len(rewards) * torch.softmax(beta * rewards, 0)


def sparse_weights(rewards, top):
    """(n,) equal weights for the best, as many as `top` says and those that tie with the last of them;
    0 for the others. Mean 1."""
    count = max(1, round(top * len(rewards)))
    best = (rewards >= rewards.topk(count).values[-1]).to(rewards.dtype)
    return best / best.mean()


def weigh(rewards, prompts, config):
    """(n,) weights of mean 1: over the epoch's pictures, or over those of each prompt.

    β multiplies rewards in units of their standard deviation, over the epoch and, per prompt, around
    each prompt's mean. The paper's β = 0.2 multiplied the rewards themselves: with kilobytes of a
    512-pixel JPEG, a picture that is 10 kB smaller weighs e² times as much; with aesthetic points
    nearly all pictures weigh the same.
    """
    groups = [torch.arange(len(prompts))]
    if config.per_prompt:
        groups = [torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
                  for prompt in dict.fromkeys(prompts)]
    rewards, weights = rewards.clone(), torch.empty_like(rewards)
    for group in groups:
        rewards[group] -= rewards[group].mean()
    rewards /= rewards.std(correction=0) + 1e-6
    for group in groups:
        if config.weights == "exp":
            weights[group] = exp_weights(rewards[group], config.beta)
        else:
            weights[group] = sparse_weights(rewards[group], config.top)
    return weights


def denoising_loss(pipeline, clean, noise, timesteps, prompt_embeds, negative_embeds=None,
                   guidance_scale=None, dtype=torch.float32):
    """(B,) mean_D ‖target − guided prediction‖², the loss of every diffusion model.

    clean: x_0, (B, C, H, W); noise: like it; timesteps: (B,), of those of the pipeline's scheduler."""
    x, target, _ = noised(pipeline.scheduler, clean, noise, timesteps)
    output = predict(denoiser(pipeline), x, timesteps, prompt_embeds, negative_embeds, dtype)
    return (guided(output, guidance_scale) - target).square().flatten(1).mean(1)


def check(config):
    """Fills in the settings that follow from others. Raises ValueError, one line, for bad ones."""
    check_choices(config, weights=("exp", "sparse"))
    at_least(config, 0, "beta")
    above_zero(config, "top", at_most=1)
    if config.per_prompt and config.group_size == 1:
        refuse(config, "group_size", "a picture that is alone with its prompt always weighs 1; choose "
               "at least 2, or --no-per-prompt")
    suffix = "" if config.name else "-rwr-sparse" if config.weights == "sparse" else "-rwr"
    slower = 4 if config.lr == 0 and emoji_sized(config) else 1
    config = settings.check(config)
    config.name += suffix  # beside the runs of ddpo.py
    config.lr /= slower
    return config


def parse_config(arguments):
    return settings.parse_config(arguments, Config, PRESETS, __doc__)


def prepare(config, resume=False):
    return start(check(config), resume)


def train(config, resume=False):
    """As ddpo.train: the run's folder."""
    return fit(prepare(config, resume))


def fit(run):
    """The loop: sample, reward, weights, update, log. Returns the run's folder."""
    config, device, pipeline = run.config, run.device, run.pipeline
    pairs = config.images // config.updates  # (picture, t, ε) of an update, over all processes
    updates = config.updates * config.inner_epochs  # of an epoch
    timesteps = pipeline.scheduler.timesteps.sort().values  # all of the network's, not the sampler's

    over = begin(run, describe(run, updates, pairs, "(picture, t, ε)"))
    while not over:
        epoch, clock = run.epoch + 1, time.perf_counter()

        # 1. sample, 2. reward
        prompts, trajectories, scores, seconds = collect(run, epoch)
        clean = torch.cat(gather([trajectories.latents[:, -1].cpu().clone()]))  # (images, C, H, W)
        del trajectories  # how the pictures came about is of no use here

        # 3. weights: each component of a mixture in its own units
        rewards = sum(weight * batch_advantages(scores[name])
                      for name, weight in run.components.items())
        weights = weigh(rewards, prompts, config)
        chosen = weights.nonzero().flatten()  # no pass through the network for a weight of 0
        share = len(chosen) / len(weights)  # the mean over the chosen, times this, is that over all

        # 4. update
        losses, grad_norms = torch.zeros((), device=device), []
        updating = progress_bar(run, "updating", updates * len(shard(run, pairs)))
        for update in range(updates):
            inner, part = divmod(update, config.updates)
            order = torch.randperm(len(chosen), generator=seeded(config.seed, epoch, 2, inner))
            order = chosen[order].repeat(-(-config.images // len(chosen)))[:config.images]
            generator = seeded(config.seed, epoch, 3, inner, part)
            t = timesteps[torch.randint(len(timesteps), (pairs,), generator=generator)]
            noise = torch.randn(pairs, *clean.shape[1:], generator=generator)
            for mine in shard(run, pairs).split(config.train_batch):
                index = order[part * pairs + mine]  # which pictures
                embeds = training_inputs(run, [prompts[i] for i in index])
                loss = denoising_loss(pipeline, clean[index].to(device), noise[mine].to(device),
                                      t[mine].to(device), *embeds, run.dtype)
                loss = (share * weights[index].to(device) * loss).sum() / pairs
                run.scaler.scale(loss).backward()
                losses += loss.detach()
                updating.update(len(mine))
            grad_norms.append(apply_gradients(run))
        updating.close()

        # 5. log
        row = {"epoch": epoch, "images": epoch * config.images} | reward_row(run, scores)
        row |= {"loss": (reduce(losses) / updates).item(),
                "grad_norm": sum(grad_norms) / len(grad_norms), "weight_max": weights.max().item()}
        effective = weights.sum()**2 / weights.square().sum()  # sample size, (Σw)² / Σw²
        row |= {"weight_share": (effective / len(weights)).item()} | time_row(run, clock, *seconds)
        over = end_epoch(run, row, clock)
    return finish(run)


def main(arguments=None):
    command_line(arguments, parse_config, prepare, fit)


if __name__ == "__main__":
    main()
