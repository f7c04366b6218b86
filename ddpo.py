"""DDPO: reinforcement learning for diffusion models (Black et al. 2023, arXiv 2305.13301).

    python ddpo.py --reward compress                   the shipped emoji model, minutes on two cores
    python ddpo.py --reward my_file.py:my_reward --prompts my.txt
    python ddpo.py --reward aesthetic --preset sd15    Stable Diffusion 1.5 on a GPU
    torchrun --nproc_per_node 8 ddpo.py --reward aesthetic --preset sd15-8gpu
    python ddpo.py --resume runs/compress

Denoising is a decision process of T steps. The state is (prompt, t, x_t), the action is x_{t-1}, and
the policy is the Gaussian that the sampler draws it from. The reward comes once, for the finished
picture, so every step of a picture gets that picture's advantage A. Two estimators of the gradient:

    SF   ∇ E[r] ∝ E[ Σ_t A ∇ log p(x_{t-1} | x_t) ]                 score function (REINFORCE)
    IS   ∇ E[r] ∝ E[ Σ_t A ∇ ρ_t ],  ρ_t = exp(log p − log p_old)   importance sampling

SF is right for pictures of the present policy only: one update an epoch. IS is clipped as in PPO and
makes several. It is ∝, since log p is a mean over the latents, not a sum. All randomness in an epoch
comes from (seed, epoch, picture), so a resumed run gives the same numbers (on a GPU up to the order of sums).
"""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

import kernels.ppo_loss
import settings
from evaluate import begin, end_epoch, finish
from kernels.ddim_step import guided
from models import denoiser, latents_shape, predict
from processes import command_line, reduce, seeded
from sample import ddim_step, step_weights
from settings import PRESETS, Settings, above_zero, at_least, check_choices, refuse
from training import (apply_gradients, collect, describe, epoch_table, progress_bar,
                      reference_output, reward_row, shard, start, time_row, training_inputs)


@dataclass
class Config(Settings):
    """The shared settings (settings.py), and DDPO's own."""

    # DDPO
    algorithm: str = "is"  # is, sf: the estimator
    advantages: str = "group"  # prompt (a buffer for each, as in the paper), group (the pictures of
        # one prompt in an epoch), batch
    buffer_size: int = 32  # rewards remembered for each prompt (--advantages prompt)
    min_count: int = 16  # rewards until a prompt's statistics replace the batch's (--advantages prompt)
    advantage_clip: float = 5.0  # largest |A|, of each component of a mixture
    train_first: float = 0.5  # share of the steps, from the first on, that are trained: they decide
        # the content of a picture, the others its sharpness
    timestep_fraction: float = 1.0  # share of --train-first's steps trained for each picture, drawn anew
    step_weights: str = "none"  # none, or equal: every step has the same share of the gradient
    clip_range: float = 1e-4  # of the ratio, for 4x64x64 latents, see clip_range_for (--algorithm is)
    kl: float = 0.0  # weight of the divergence from the base model, see kl_loss


def sf_loss(log_prob, advantages):
    """(B,) DDPO-SF, the score function estimator: right for pictures of the present policy only."""
    return -advantages * log_prob


def is_loss(log_prob, old_log_prob, advantages, clip_range):
    """(B,) DDPO-IS with PPO's clip: a step has no gradient once its ratio has left the range on
    the side to which the advantage pushes it. kernels/ppo_loss.py computes both losses on a GPU."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def clip_range_for(clip_range, latents_shape):
    """log p is a *mean* over D elements, so ρ is the D-th root of the true ratio, and a clip range
    means something only together with D: 1e-4 at the paper's D = 16384 is 1.6 nats. Scaled by D, the
    setting means 1.6 nats for every latent size."""
    return clip_range * 4 * 64 * 64 / math.prod(latents_shape)


def kl_loss(output, reference, guidance_scale=None):
    """(B,) mean_D ‖ε̂ − ε̂_ref‖² between the guided predictions of the policy and of the base model.
    The exact divergence of a step's two Gaussians (x-space) is c_o² ‖ε̂ − ε̂_ref‖² / (2σ²). Its factor
    is nearly even over the steps, but some fifty times as large in the last but one: where that step
    is trained, the exact divergence consists of little else (tutorial 5 tries both)."""
    difference = guided(output, guidance_scale) - guided(reference, guidance_scale)
    return difference.float().square().flatten(1).mean(1)


def exact(rewards):
    """float32 rewards as float64: sums of equal ones are exact, so their advantages are 0. In float32
    the mean misses them by a rounding error, which the division by std + 1e-6 makes as large as 1."""
    return torch.as_tensor(rewards, dtype=torch.float32).double()


class PromptStats:
    """Advantages relative to a prompt's own recent rewards: some prompts are easier than others."""

    def __init__(self, buffer_size=32, min_count=16):
        self.buffer_size, self.min_count = buffer_size, min_count
        self.buffers = {}  # prompt -> its latest rewards

    def advantages(self, prompts, rewards):
        """(B,) float32. Extends the buffers first, then normalises: by the prompt's own mean and std
        once it has min_count rewards, by the batch's until then."""
        rewards = exact(rewards)
        for prompt, reward in zip(prompts, rewards.tolist()):
            buffer = self.buffers.get(prompt, []) + [reward]
            self.buffers[prompt] = buffer[-self.buffer_size:]
        advantages = []
        for prompt, reward in zip(prompts, rewards):
            buffer = exact(self.buffers[prompt])
            known = buffer if len(buffer) >= self.min_count else rewards
            advantages.append((reward - known.mean()) / (known.std(correction=0) + 1e-6))
        return torch.stack(advantages).float()


def group_advantages(rewards, group_size):
    """(B,) float32. Groups are consecutive pictures of one prompt. Each is compared with the mean of
    the *others* of its group, in units of the batch's std of that difference. With its own reward in
    the baseline both would be smaller by 1/group_size, so the advantages would be the same."""
    groups = exact(rewards).view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    difference = (groups - others).flatten()
    return (difference / (difference.square().mean().sqrt() + 1e-6)).float()


def batch_advantages(rewards):
    """(B,) float32, (r − mean) / std over the batch."""
    rewards = exact(rewards)
    return ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)).float()


def fit(run):
    """The loop: sample, reward, advantages, update, log. Returns the run's folder."""
    config, device, network = run.config, run.device, denoiser(run.pipeline)
    updates = config.updates * config.inner_epochs  # of an epoch
    clip_range = clip_range_for(config.clip_range, latents_shape(run.pipeline))
    clip_range = {"is": clip_range, "sf": None}[config.algorithm]
    mine = shard(run, config.images)  # indices of this process's pictures
    statistics = {name: PromptStats(config.buffer_size, config.min_count) for name in run.components}
    for name, buffers in (run.saved["statistics"] if run.saved else {}).items():
        statistics[name].buffers = buffers

    pairs = epoch_steps(run, run.epoch + 1)[-1]
    over = begin(run, describe(run, updates, pairs, "(picture, step) pairs", int(config.kl > 0)))
    while not over:
        epoch, clock = run.epoch + 1, time.perf_counter()
        table, policy_steps, steps_per_picture, pairs = epoch_steps(run, epoch)
        weights = step_weights(table, policy_steps, config.step_weights)

        # 1. sample, 2. reward
        prompts, trajectories, scores, seconds = collect(run, epoch)
        latents, old_log_probs = trajectories.latents, trajectories.log_probs  # (B, T+1, ...), (B, T)

        # 3. advantages
        advantages = mixed_advantages(run, prompts, scores, statistics)[mine].to(device)

        # 4. update
        totals, grad_norms = torch.zeros(4, device=device), []
        ratio_error = torch.zeros((), device=device)
        updating = progress_bar(run, "updating", updates * pairs // run.world)
        for update in range(updates):
            scale = run.scaler.scale(torch.full((), 1 / pairs, device=device))  # mean over pairs
            for image, step in update_pairs(run, epoch, update, policy_steps, steps_per_picture):
                x, x_next = (latents[image, step + i].to(device) for i in (0, 1))
                *embeds, guidance_scale = training_inputs(run, [trajectories.prompts[i] for i in image])
                image, step = image.to(device), step.to(device)
                old, advantage = old_log_probs[image, step], advantages[image] * weights[step]
                inputs = x, run.timesteps[step], *embeds
                output = predict(network, *inputs, run.dtype)
                loss, losses, log_prob = policy_loss(output, x, x_next, table[step], old, advantage,
                                                     clip_range, guidance_scale, scale)
                kl = torch.zeros((), device=device)
                if config.kl:
                    kl = kl_loss(output, reference_output(run, *inputs), guidance_scale).sum()
                (loss + config.kl * scale * kl).backward()
                with torch.no_grad():  # diagnostics
                    square = (log_prob - old).square()
                    away = (torch.exp(log_prob - old) - 1).abs()  # |ρ − 1|
                    outside = away > clip_range if clip_range else torch.zeros_like(away)
                    totals += torch.stack([losses.sum(), square.sum(), outside.sum(), kl])
                    if update == 0:  # no weight has changed yet: ρ is 1
                        ratio_error = torch.maximum(ratio_error, away.max())
                updating.update(len(image))
            grad_norms.append(apply_gradients(run))
        updating.close()
        del trajectories, latents  # so that they are not held beside the next epoch's

        # 5. log
        means = (reduce(totals) / (pairs * updates)).tolist()
        row = {"epoch": epoch, "images": epoch * config.images} | reward_row(run, scores)
        row |= {"loss": means[0], "approx_kl": means[1] / 2, "clip_fraction": means[2]}
        row |= {"kl": means[3]} if config.kl else {}
        row |= {"ratio_error": reduce(ratio_error, dist.ReduceOp.MAX).item(),
                "grad_norm": sum(grad_norms) / len(grad_norms)}
        row |= time_row(run, clock, *seconds)
        buffers = {name: stats.buffers for name, stats in statistics.items()}
        over = end_epoch(run, row, clock, statistics=buffers)
    return finish(run)


def mixed_advantages(run, prompts, scores, statistics):
    """(images,) over all processes: each component in its own units, clipped, then weighted."""
    config, total = run.config, torch.zeros(run.config.images)
    for name, weight in run.components.items():
        if config.advantages == "prompt":
            advantages = statistics[name].advantages(prompts, scores[name])
        elif config.advantages == "group":
            advantages = group_advantages(scores[name], config.group_size)
        elif config.advantages == "batch":
            advantages = batch_advantages(scores[name])
        total += weight * advantages.clamp(-config.advantage_clip, config.advantage_clip)
    return total


def epoch_steps(run, epoch):
    """(table (T, 4), steps to choose from, how many for each picture, pairs of an update). The
    epoch matters only where the window moves."""
    config = run.config
    table, policy_steps = epoch_table(config, run.pipeline, epoch)
    policy_steps = policy_steps[:max(1, math.ceil(config.train_first * len(policy_steps) - 1e-9))]
    steps_per_picture = max(1, round(config.timestep_fraction * len(policy_steps)))
    pairs = config.images // config.updates * steps_per_picture
    return table.to(run.device), policy_steps, steps_per_picture, pairs


def update_pairs(run, epoch, update, policy_steps, steps_per_picture):
    """Yields the (picture, step) pairs of an update on this process, --train-batch at a time.

    Each inner epoch draws `steps_per_picture` steps for each picture. Update j takes the pictures j,
    j + updates, ..., so that the pictures of a group are spread over the updates."""
    config = run.config
    inner, part = divmod(update, config.updates)
    mine = shard(run, config.images)
    generator = seeded(config.seed, epoch, 2, inner)
    order = torch.rand(config.images, len(policy_steps), generator=generator).argsort(1)
    steps = policy_steps[order[mine, :steps_per_picture]]  # (B, steps_per_picture)
    chosen = (mine % config.updates == part).nonzero().flatten()
    image, step = chosen.repeat_interleave(steps_per_picture), steps[chosen].flatten()
    yield from zip(image.split(config.train_batch), step.split(config.train_batch))


def policy_loss(output, x, x_next, coefficients, old_log_prob, advantages, clip_range,
                guidance_scale, scale):
    """(scale · Σ loss with its gradient, loss (B,), log_prob (B,)) of stored steps: one fused kernel
    where Triton runs, autograd of the formulas above elsewhere. clip_range None: SF."""
    if kernels.use_triton(x):
        return kernels.ppo_loss.policy_loss(output, x, x_next, coefficients, old_log_prob, advantages,
                                            clip_range, guidance_scale, scale)[:3]
    _, log_prob = ddim_step(output, x, coefficients, x_next, guidance_scale=guidance_scale)
    loss = (is_loss(log_prob, old_log_prob, advantages, clip_range) if clip_range
            else sf_loss(log_prob, advantages))
    return loss.sum() * scale, loss.detach(), log_prob.detach()


def check(config):
    """Fills in the settings that follow from others. Raises ValueError, one line, for bad ones."""
    at_least(config, 1, "buffer_size", "min_count")
    at_least(config, 0, "kl")
    above_zero(config, "advantage_clip", "clip_range")
    above_zero(config, "timestep_fraction", "train_first", at_most=1)
    if config.eta == 0:
        refuse(config, "eta", "must be above 0, since a deterministic sampler is no policy")
    check_choices(config, algorithm=("is", "sf"), advantages=("prompt", "group", "batch"),
                  step_weights=("none", "equal"))
    if config.advantages == "group" and config.group_size < 2:
        refuse(config, "group_size", "a group needs at least 2 pictures to compare; or choose "
               "--advantages batch or prompt")
    if config.advantages == "prompt" and config.buffer_size < config.min_count:
        refuse(config, "buffer_size", f"must be at least --min-count {config.min_count}, or no prompt "
               "would ever have enough rewards")
    at_least(config, 2 if config.advantages == "batch" else 1, "images")
    config.updates = config.updates or (4 if config.algorithm == "is" else 1)
    if config.algorithm == "sf" and config.updates * config.inner_epochs > 1:
        refuse(config, "updates" if config.updates > 1 else "inner_epochs",
               "sf is only right on policy: give 1, or choose --algorithm is")
    return settings.check(config)


def parse_config(arguments):
    return settings.parse_config(arguments, Config, PRESETS, __doc__)


def prepare(config, resume=False):
    config = check(config)
    return start(config, resume, reference=config.kl > 0)


def train(config, resume=False):
    """Fine-tunes as the settings say. Returns the run's folder (metrics.jsonl, rewards.png,
    progress.png, weights, checkpoint/). Raises ValueError before anything is written if the settings
    cannot work, RunStopped if a reward fails during the run."""
    return fit(prepare(config, resume))


def main(arguments=None):
    command_line(arguments, parse_config, prepare, fit)


if __name__ == "__main__":
    main()
