"""DDPO: reinforcement learning for diffusion models (Black et al. 2023, arXiv 2305.13301), in one loop.

    python ddpo.py --reward compress                                  the shipped emoji model, minutes on two CPU cores
    python ddpo.py --reward my_file.py:my_reward --prompts my.txt
    python ddpo.py --reward aesthetic --preset sd15                   Stable Diffusion 1.5 on a GPU
    torchrun --nproc_per_node 8 ddpo.py --reward aesthetic --preset sd15
    python ddpo.py --resume runs/compress

Denoising is a decision process of T steps: the state is (prompt, t, x_t), the action is x_{t-1}, the policy is the Gaussian
that the sampler draws it from, and the reward comes once, for the finished picture. So every step of a picture
gets that picture's advantage A, and the policy gradient is

    SF   ∇ E[r] = E[ Σ_t A ∇ log p(x_{t-1} | x_t) ]                     score function (REINFORCE): one update a batch
    IS   ∇ E[r] = E[ Σ_t A ∇ ρ_t ],   ρ_t = exp(log p − log p_old)      importance sampling, clipped as in PPO: several

An epoch samples pictures, scores them, and turns the same pictures into updates. Everything random in an epoch is drawn
from (seed, epoch, index of the picture): a run that is killed goes on to the same numbers, on any number of processes.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import kernels
from evaluate import evaluate, guard, summary
from kernels.ddim_step import guided
from kernels.ppo_loss import fused_ppo_loss
from rewards import parse_reward
from sample import DTYPES, ddim_step, default_device, encode_prompts, is_emoji, latents_shape, predict
from training import (RunStopped, apply_gradients, collect, finish, log, progress_bar, reduce, reward_row, save, seeded, shard, start, time_row,
                      watched)


@dataclass
class Config:
    """Every setting, with the value that suits the emoji model on two CPU cores. PRESETS holds what differs elsewhere."""

    reward: str = "compress"  # a name, a file.py:function, or a mixture such as "compress:0.3,clip:1"
    watch: str = "clip"  # rewards that are logged and never trained on: the first sign of reward hacking ("" for none)
    prompts: str = "animals"  # a set of prompts.py, or a text file of one prompt a line
    model: str = "models/emoji"  # a folder in diffusers' layout, or a hub id
    preset: str = ""  # emoji, sd15: settings that go together; flags that are given win
    name: str = ""  # of the run's folder (default: the reward)
    out: str = "runs"
    seed: int = 0
    epochs: int = 14  # at most: see guard

    # sampling
    images: int = 96  # an epoch, over all processes
    sample_batch: int = 32  # pictures denoised at once, on each process
    steps: int = 10  # T
    guidance_scale: float = 4.0  # 1 for none
    eta: float = 1.0  # must be above 0: a deterministic sampler is no policy
    window: str = ""  # "5:15": only these steps are stochastic and trained, the others deterministic ("" for all)

    # advantages
    advantages: str = "group"  # prompt (a buffer for each, as in the paper), group (pictures of one prompt), batch
    group_size: int = 4  # pictures of each prompt in an epoch
    buffer_size: int = 32  # rewards remembered for each prompt
    min_count: int = 16  # until a prompt has so many, the batch's statistics stand in
    advantage_clip: float = 5.0

    # updates
    algorithm: str = "is"  # is, sf
    updates: int = 0  # of each inner epoch; 0: 4 for is, 1 for sf, which is only right on policy
    inner_epochs: int = 1  # passes over an epoch's pictures
    train_first: float = 0.5  # share of the steps, from the first on, that are trained: these decide what is where, the rest how sharp
    timestep_fraction: float = 1.0  # of these, the share that is trained on of each picture, drawn anew each inner epoch
    step_weights: str = "none"  # equal: takes out of each step's gradient that some speak louder than others, see step_weights
    train_batch: int = 32  # (picture, step) pairs through the UNet at once: memory, not mathematics
    train_guidance: bool = True  # train the guided policy, which is the one that sampled
    clip_range: float = 1e-4  # for latents of 4x64x64; see clip_range_for
    lora_rank: int = 0  # 0: fine-tune the whole UNet, which on so small a one is both faster and kinder to the pictures
    lora_targets: str = "to_q,to_k,to_v,to_out.0"
    lr: float = 0.0  # 0: 3e-3 for LoRA, 1e-4 for the whole UNet; on another model than the emoji's 3e-4 and 1e-5
    warmup: int = 20  # updates in which the learning rate rises: Adam's first steps are of full length, however noisy the gradient
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    optimizer: str = "adamw"  # adamw, adamw8bit (needs bitsandbytes and a GPU)

    # staying near what the base model knows
    kl: float = 0.0  # weight of the divergence from the base model, see kl_loss
    ema: float = 0.9  # look at, and keep, weights averaged over about 1 / (1 - ema) updates (0: the newest)
    guard: float = 0.6  # how far a watched reward may fall, in standard deviations of the base model's pictures; 0: no guard at all
    patience: int = 2  # looks in a row beyond the guard, or no better on --eval-prompts, that end the run

    # watching and keeping
    eval_every: int = 1  # epochs between looks at fixed prompts and seeds (always before the first and after the last)
    eval_images: int = 64  # two of a prompt
    eval_prompts: str = ""  # more sets to look at, such as "animals_held_out,objects"; what is best for them is kept, see guard
    eval_deterministic: bool = False  # look at the training prompts without the sampler's noise, too
    checkpoint_every: int = 1  # epochs
    tracker: str = "none"  # none, tensorboard, wandb

    # the machine
    device: str = ""  # cpu, cuda, mps (default: the best there is)
    dtype: str = ""  # of the UNet's arithmetic: bf16, fp16, fp32 (default: bf16; fp32 on mps). Log-probs are always float32
    kernels: str = "auto"  # triton, torch, or auto: triton on a GPU
    compile: bool = False  # the UNet, by torch.compile: minutes of waiting first
    cuda_graph: bool = False  # a sampling step as one launch
    gradient_checkpointing: bool = False  # a third more arithmetic for much less memory
    offload: bool = False  # text encoder, VAE and trajectories wait in the computer's memory


# The paper's settings (table 3 and app. D), with LoRA as in ddpo-pytorch; the shipped CLIP knows icons alone, so it cannot watch.
PAPER = dict(model="stable-diffusion-v1-5/stable-diffusion-v1-5", epochs=100, images=256, sample_batch=8, steps=50, guidance_scale=5.0,
             advantages="prompt", group_size=1, train_first=1.0, warmup=0, ema=0.0, train_batch=8, lora_rank=4, eval_every=10,
             eval_images=16, checkpoint_every=5, watch="")
SMALLER = PAPER | dict(steps=20, images=64, advantages="group", group_size=4, timestep_fraction=0.5, sample_batch=4)
PRESETS = {
    "emoji": {},
    "sd15": PAPER,  # one GPU with 24 GB or more, for as long as it takes
    "sd15-24gb": SMALLER | dict(train_batch=4),  # a sixteenth of the paper's work an epoch: groups, 20 steps, half of them trained
    "sd15-10gb": SMALLER | dict(sample_batch=2, train_batch=1, gradient_checkpointing=True, offload=True),
    "sd15-8gpu": PAPER | dict(sample_batch=16, train_batch=4),  # torchrun --nproc_per_node 8: 32 pictures each, as in the paper
}
PAPER_PROMPTS = {"compress": "imagenet_animals", "incompress": "imagenet_animals", "align": "animal_activities"}  # others: animals


class PromptStats:
    """Advantages against what the same prompt has earned lately: some prompts are easy, and that is no merit of a picture."""

    def __init__(self, buffer_size=32, min_count=16):
        self.min_count = min_count
        self.buffers = defaultdict(lambda: deque(maxlen=buffer_size))

    def advantages(self, prompts, rewards):
        """(B,) float32. Extends the buffers first, then normalises: by the prompt's own mean and std once it has min_count
        rewards, by the batch's until then. Population std, epsilon 1e-6."""
        rewards = torch.as_tensor(rewards, dtype=torch.float32)
        for prompt, reward in zip(prompts, rewards.tolist()):
            self.buffers[prompt].append(reward)
        advantages = torch.empty_like(rewards)
        for i, prompt in enumerate(prompts):
            own_rewards = torch.tensor(self.buffers[prompt]) if len(self.buffers[prompt]) >= self.min_count else rewards
            advantages[i] = (rewards[i] - own_rewards.mean()) / (own_rewards.std(correction=0) + 1e-6)
        return advantages


def group_advantages(rewards, group_size):
    """(B,). Groups are consecutive pictures of one prompt: each is compared with the mean of the *others* of its group (with
    its own reward in the baseline, the gradient would shrink by 1/group_size), in units of the batch's std of that."""
    groups = torch.as_tensor(rewards, dtype=torch.float32).view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    difference = (groups - others).flatten()
    return difference / (difference.square().mean().sqrt() + 1e-6)


def batch_advantages(rewards):
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)


def sf_loss(log_prob, advantages):
    """(B,) DDPO-SF, the score function estimator: only right for pictures of the present policy."""
    return -advantages * log_prob


def is_loss(log_prob, old_log_prob, advantages, clip_range):
    """(B,) DDPO-IS, with PPO's clip: past the range, a picture has no more to say in this epoch."""
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def kl_loss(output, reference, guidance_scale=None):
    """(B,) mean_D ‖ε̂ − ε̂_ref‖² between the guided predictions of the policy and of the base model.

    The exact divergence of the two Gaussians of a step (x-space) is c_o² ‖ε̂ − ε̂_ref‖² / (2σ²): the same, but for a weight that is
    nearly even over the steps and some fifty times as large in the last but one: where that step is trained, it would be all that is
    held, for better or worse (tutorial 5 tries both)."""
    return (guided(output, guidance_scale) - guided(reference, guidance_scale)).float().square().flatten(1).mean(1)


def clip_range_for(clip_range, latents_shape):
    """log p is a *mean* over D elements, so ρ is the D-th root of the true ratio, and a clip range only means something
    together with D: 1e-4 at the paper's D = 16384 is 1.6 nats. Scaled by D, the setting means 1.6 nats for every latent size.
    """
    return clip_range * 4 * 64 * 64 / math.prod(latents_shape)


def check(config):
    """Fill in what follows from other settings, and refuse what cannot work: ValueError, one line, before anything is made."""
    def refuse(setting, advice):
        raise ValueError(f"--{setting.replace('_', '-')} {getattr(config, setting)}: {advice}")

    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            refuse(field.name, "must be a finite number")
    for setting in ("epochs", "images", "sample_batch", "steps", "group_size", "buffer_size", "min_count", "inner_epochs",
                    "train_batch", "patience", "eval_every", "eval_images", "checkpoint_every"):
        if getattr(config, setting) < 1:
            refuse(setting, "must be at least 1")
    if config.seed >= 2**63:
        refuse("seed", "must be below 2**63")
    for setting in ("updates", "lora_rank", "lr", "weight_decay", "warmup", "seed", "kl", "guard", "guidance_scale"):
        if getattr(config, setting) < 0:
            refuse(setting, "must not be negative")
    for setting in ("advantage_clip", "clip_range", "grad_clip"):
        if getattr(config, setting) <= 0:
            refuse(setting, "must be above 0")
    for setting, choices in {"algorithm": ("is", "sf"), "advantages": ("prompt", "group", "batch"), "dtype": ("", *DTYPES),
                             "kernels": ("auto", "triton", "torch"), "step_weights": ("none", "equal"),
                             "optimizer": ("adamw", "adamw8bit"), "tracker": ("none", "tensorboard", "wandb")}.items():
        if getattr(config, setting) not in choices:
            refuse(setting, f"unknown; choose {', '.join(filter(None, choices))}")
    if not 0 <= config.ema < 1:
        refuse("ema", "must be 0 (none) or below 1")
    window = re.fullmatch(r"(\d+):(\d+)", config.window or f"0:{config.steps}")
    if not window or not int(window[1]) < int(window[2]) <= config.steps:
        refuse("window", f"give the first step and the one after the last, such as 0:{config.steps // 2}, of --steps {config.steps}")
    if not 0 < config.eta <= 1:
        refuse("eta", "must be above 0, since a deterministic sampler is no policy, and at most 1")
    for setting in ("timestep_fraction", "train_first"):
        if not 0 < getattr(config, setting) <= 1:
            refuse(setting, "must be above 0 and at most 1")
    if config.advantages == "group" and config.group_size < 2:
        refuse("group_size", "a group needs at least 2 pictures to compare; or choose --advantages batch or prompt")
    if config.advantages == "prompt" and config.buffer_size < config.min_count:
        refuse("buffer_size", f"must be at least --min-count {config.min_count}, or no prompt would ever have enough rewards")
    if config.advantages == "batch" and config.images < 2:
        refuse("images", "advantages over a batch need at least 2")

    config.device = config.device or str(default_device())
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.device == "cuda" or config.device.startswith("cuda:") and world > 1:  # torchrun's processes take one each
        config.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        refuse("device", f"cannot be used here ({str(error).splitlines()[0]}); choose cpu, or cuda where there is a GPU")
    if config.dtype == "fp16" and not config.device.startswith("cuda"):
        refuse("dtype", "needs a CUDA device; choose bf16 or fp32")
    if config.cuda_graph and not config.device.startswith("cuda"):
        refuse("cuda_graph", "needs a CUDA device; leave it out")
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        refuse("optimizer", "needs bitsandbytes; pip install bitsandbytes, or choose adamw")
    kernels.BACKEND = config.kernels
    kernels.use_triton(torch.empty(0, device=config.device))  # says so where triton cannot run

    config.dtype = config.dtype or ("fp32" if config.device == "mps" else "bf16")
    config.updates = config.updates or (4 if config.algorithm == "is" else 1)
    emoji = is_emoji(config.model)  # 160 times smaller than Stable Diffusion: it takes, and needs, larger steps
    config.lr = config.lr or ((3e-3 if emoji else 3e-4) if config.lora_rank else (1e-4 if emoji else 1e-5))
    config.name = config.name or re.sub(r"[^\w.-]+", "_", config.reward)
    if config.algorithm == "sf" and config.updates * config.inner_epochs > 1:
        refuse("updates" if config.updates > 1 else "inner_epochs", "sf is only right on policy, so 1; or choose --algorithm is")
    if config.eval_images < world:
        refuse("eval_images", f"must be at least {world}, one for each process")
    unit = math.lcm(config.group_size, config.sample_batch, config.updates) * world
    for setting in ("group_size", "sample_batch", "updates"):
        if config.images % (getattr(config, setting) * world):
            processes = f" on each of {world} processes" if world > 1 else ""
            refuse("images", f"must be a multiple of --{setting.replace('_', '-')} {getattr(config, setting)}{processes}; "
                             f"{max(config.images // unit, 1) * unit} would do")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        refuse("tracker", f"is not installed; pip install {config.tracker}, or choose none")
    for name in watched(config):
        if parse_reward(name) != {name: 1.0}:
            refuse("watch", f"a watched reward has no weight; write {name.rpartition(':')[0]}")
    return config


def reference_output(run, *inputs):
    """What the base model would have predicted: the adapter switched off, or the copy of the whole UNet. No gradients."""
    with torch.no_grad():
        if run.reference is not None:
            return predict(run.reference, *inputs, run.dtype)
        run.pipeline.unet.disable_adapters()
        output = predict(run.pipeline.unet, *inputs, run.dtype)
        run.pipeline.unet.enable_adapters()
        return output


def step_weights(table, policy_steps, kind):
    """(T,) factors of the steps' losses, of mean 1 over those that are trained.

    ∂ log p / ∂ output is z c_o / σ. Under Stable Diffusion's schedule |c_o / σ| is nearly even (0.6 to 1.1 at T = 20), but 5.4 in the
    last but one: that step speaks loudest, of details at most. "equal" takes the factor out again."""
    weights = torch.ones_like(table[:, 0])
    if kind == "equal":
        weights[policy_steps] = (table[:, 2] / table[:, 1].abs())[policy_steps]
    return weights / weights[policy_steps].mean()


def train(config, resume=False):
    """Fine-tune as the settings say. Returns the run's folder (metrics.jsonl, rewards.png, progress.png, weights, checkpoint/).

    Raises ValueError before anything is written if the settings cannot work, RunStopped if a reward fails half-way.
    """
    return fit(start(check(config), resume))


def describe(run, trained_steps):
    """The effective numbers, before the work starts."""
    config = run.config
    passes = 2 if config.guidance_scale > 1 else 1
    updates = config.updates * config.inner_epochs
    pairs = config.images // config.updates * trained_steps  # of an update
    forward, backward = config.images * config.steps * passes, updates * pairs * (passes if config.train_guidance else 1)
    trained = sum(p.numel() for p in run.parameters) / 1e6
    return (f"{run.folder}: {config.epochs} epochs of {config.images} pictures of {len(run.prompts)} prompts, {config.steps} steps each, "
            f"{trained_steps} of them trained on\n"
            f"  {updates} updates an epoch of {pairs} (picture, step) pairs, {min(config.train_batch, pairs // run.world)} at once on each of "
            f"{run.world} x {config.device}; {trained:.2f} M parameters at lr {config.lr:g}, {config.dtype}\n"
            f"  an epoch costs {forward:,} UNet rows forward and {backward:,} forward and backward, all epochs about "
            f"{config.epochs * (forward + 3 * backward):,} forward rows' worth")


def fit(run):
    """The loop: sample, reward, advantages, update, log."""
    config, device, unet = run.config, run.device, run.pipeline.unet
    trained_steps = max(1, round(config.timestep_fraction * len(run.policy_steps)))  # of each picture
    pairs = config.images // config.updates * trained_steps  # of an update, over all processes
    clip_range = clip_range_for(config.clip_range, latents_shape(run.pipeline)) if config.algorithm == "is" else None
    guidance_scale = config.guidance_scale if config.train_guidance and config.guidance_scale > 1 else None
    weights = step_weights(run.table, run.policy_steps, config.step_weights)
    statistics = {name: PromptStats(config.buffer_size, config.min_count) for name in run.components}
    for name, buffers in (run.saved or {"statistics": {}})["statistics"].items():
        for prompt, values in buffers.items():
            statistics[name].buffers[prompt].extend(values)

    if run.rank == 0:
        print(describe(run, trained_steps), flush=True)
    if run.epoch == 0:
        log(run, {"epoch": 0, "images": 0} | evaluate(run, 0))
    best, stop = guard(run.rows, config)
    mine = shard(run, config.images)  # the indices of this process's pictures
    bar = tqdm(total=config.epochs, initial=run.epoch, desc=config.name, unit="epoch", disable=run.rank > 0)
    while run.epoch < config.epochs and not stop:
        epoch, clock = run.epoch + 1, time.perf_counter()

        # 1. sample, 2. reward
        all_prompts, trajectories, scores, (seconds_sample, seconds_reward) = collect(run, epoch)
        latents, old_log_probs, home = trajectories.latents, trajectories.log_probs, trajectories.latents.device  # (B, T+1, C, H, W), (B, T)

        # 3. advantages: each part of a mixture in its own units, then weighted
        advantages = torch.zeros(config.images)
        for name, weight in run.components.items():
            if config.advantages == "prompt":
                advantages += weight * statistics[name].advantages(all_prompts, scores[name])
            elif config.advantages == "group":
                advantages += weight * group_advantages(scores[name], config.group_size)
            else:
                advantages += weight * batch_advantages(scores[name])
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)[mine].to(device)

        # 4. update
        prompt_embeds = encode_prompts(run.pipeline, trajectories.prompts, run.cache)
        negative_embeds = encode_prompts(run.pipeline, [""], run.cache) if guidance_scale else None
        totals, ratio_error, grad_norms = torch.zeros(4, device=device), torch.zeros((), device=device), []
        # totals: of the loss, (log ρ)², clipped pairs, divergence
        updating = progress_bar(run, "updating", config.inner_epochs * len(mine) * trained_steps)
        for inner in range(config.inner_epochs):
            order = torch.rand(config.images, len(run.policy_steps), generator=seeded(config.seed, epoch, 2, inner)).argsort(1)[mine]
            steps = run.policy_steps[order[:, :trained_steps]]  # (B, K): which steps of each picture
            for update in range(config.updates):
                chosen = (mine % config.updates == update).nonzero().flatten()  # a group's pictures are spread over the updates
                pair_image, pair_step = chosen.repeat_interleave(trained_steps), steps[chosen].flatten()
                for image, step in zip(pair_image.split(config.train_batch), pair_step.split(config.train_batch)):
                    x = latents[image.to(home), step.to(home)].to(device)
                    x_next = latents[image.to(home), step.to(home) + 1].to(device)
                    image, step = image.to(device), step.to(device)
                    old, advantage = old_log_probs[image, step], advantages[image] * weights[step]
                    inputs = x, run.timesteps[step], prompt_embeds[image], negative_embeds
                    reference = reference_output(run, *inputs) if config.kl else None
                    output = predict(unet, *inputs, run.dtype)
                    scale = run.scaler.scale(torch.full((), 1 / pairs, device=device))  # the mean over the update, times fp16's loss scale
                    if kernels.use_triton(x):  # loss and gradient in one launch
                        loss, log_prob, _, _, grad = fused_ppo_loss(output.detach(), x, x_next, run.table[step], old, advantage,
                                                                    clip_range, guidance_scale, scale)
                        roots, gradients = [output], [grad]
                    else:  # the same, as the formulas have it
                        _, log_prob = ddim_step(output, x, run.table[step], x_next, guidance_scale=guidance_scale)
                        loss = is_loss(log_prob, old, advantage, clip_range) if clip_range else sf_loss(log_prob, advantage)
                        roots, gradients = [loss.sum() * scale], [None]
                    if config.kl:
                        divergence = kl_loss(output, reference, guidance_scale)
                        roots.append(config.kl * divergence.sum() * scale)
                        gradients.append(None)
                        totals[3] += divergence.detach().sum()
                    torch.autograd.backward(roots, gradients)
                    with torch.no_grad():
                        away = (torch.exp(log_prob - old) - 1).abs()  # |ρ − 1|
                        outside = away > clip_range if clip_range else torch.zeros_like(away)
                        totals[:3] += torch.stack([loss.sum(), (log_prob - old).square().sum(), outside.sum()])
                        if inner == update == 0:  # nothing has been updated yet: whatever is not 0 here is an error
                            ratio_error = torch.maximum(ratio_error, away.max())
                    updating.update(len(image))
                grad_norms.append(apply_gradients(run))
        updating.close()

        # 5. log
        mean_loss, mean_square, clip_fraction, mean_kl = (reduce(totals) / (pairs * config.updates * config.inner_epochs)).tolist()
        row = {"epoch": epoch, "images": epoch * config.images} | reward_row(run, scores)
        row |= {"loss": mean_loss, "approx_kl": mean_square / 2, "clip_fraction": clip_fraction}
        row |= {"kl": mean_kl} if config.kl else {}
        row |= {"ratio_error": reduce(ratio_error, dist.ReduceOp.MAX).item(), "grad_norm": sum(grad_norms) / len(grad_norms)}
        row |= time_row(run, clock, seconds_sample, seconds_reward)
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= evaluate(run, epoch)
            row["seconds_eval"] = time.perf_counter() - clock - row["seconds"]
        log(run, row)
        best, stop = guard(run.rows, config)
        if epoch % config.checkpoint_every == 0 or epoch in (best, config.epochs) or stop:
            save(run, epoch, best, statistics={name: {prompt: list(values) for prompt, values in stats.buffers.items()}
                                               for name, stats in statistics.items()})
        run.epoch = epoch
        bar.set_postfix(reward=f"{row['reward_mean']:.3f}", **{name: f"{row[f'reward_{name}']:.3f}" for name in watched(config)})
        bar.update()
    bar.close()
    return finish(run)


def parse_config(arguments, script=sys.modules[__name__]):
    """(Config, resume) from the command line: the preset's values, then the flags that were given. script: whose Config and PRESETS."""
    parser = argparse.ArgumentParser(description=script.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; only --epochs, --patience and --device may be given "
                                                        "beside it")
    for field in fields(script.Config):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type is bool else dict(type=type(field.default))
        parser.add_argument("--" + field.name.replace("_", "-"), default=None, help=f"(default {field.default!r})", **kind)
    parser.error = lambda message: parser.exit(2, f"{message}\n")  # one line, without argparse's page of usage
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if "resume" in given:
        run = Path(given.pop("resume")).resolve()
        if set(given) - {"epochs", "patience", "device"}:
            raise ValueError(f"--resume {run}: its settings are those of its config.json; only --epochs, --patience and --device may be given "
                             "beside it")
        if not (run / "config.json").exists():
            raise ValueError(f"--resume {run}: no config.json in it; give the folder of a run, such as runs/compress")
        try:
            config = script.Config(**json.loads((run / "config.json").read_text()) | given)
        except (TypeError, json.JSONDecodeError):
            raise ValueError(f"--resume {run}: its config.json is not that of a run of {Path(script.__file__).name}; give the folder of one, or "
                             "go on with the script that made it") from None
        config.out, config.name = os.path.relpath(run.parent), run.name
        return config, True
    preset = given.get("preset", "emoji" if is_emoji(given.get("model", script.Config.model)) else "sd15")
    if preset not in script.PRESETS:
        raise ValueError(f"--preset {preset}: unknown; choose {', '.join(script.PRESETS)}")
    settings = script.PRESETS[preset] | given | {"preset": preset}
    if preset != "emoji":
        reward = settings.get("reward", script.Config.reward)
        settings.setdefault("prompts", PAPER_PROMPTS.get(reward.partition("=")[0], "animals"))
    return script.Config(**settings), False


def main(arguments=None, script=sys.modules[__name__]):
    """The command line of a script with a Config, PRESETS, check and fit of its own: this one, or rwr.py."""
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    config = None
    try:
        try:
            config, resume = parse_config(arguments, script)
            run = start(script.check(config), resume)
        except ValueError as error:  # settings, models and rewards that cannot work
            print(error, file=sys.stderr)
            sys.exit(2)
        script.fit(run)
        if run.rank == 0:
            print(summary(run))
    except (RunStopped, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        folder = Path(config.out) / config.name if config else None
        way_on = f"; go on with: python {Path(script.__file__).name} --resume {folder}" if folder and folder.exists() else ""
        print(f"\nstopped{way_on}", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for a reward that is being computed: the disk already holds all that is needed
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
