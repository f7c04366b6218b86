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
import functools
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import kernels
from kernels.ppo_loss import fused_ppo_loss
from prompts import load_prompts, sample_prompts
from rewards import RewardError, clip_top1, get_reward, parse_reward
from run_folder import (load_checkpoint, open_tracker, plot_rewards, read_metrics, save_checkpoint, save_weights, stack_pictures,
                        summary, write_whole)
from sample import (DTYPES, ddim_step, ddim_table, decode, default_device, encode_prompts, latents_shape, load_pipeline,
                    picture_grid, predict, sample_trajectories)


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
    epochs: int = 12

    # sampling
    images: int = 64  # an epoch, over all processes
    sample_batch: int = 32  # pictures denoised at once, on each process
    steps: int = 20  # T
    guidance_scale: float = 4.0  # 1 for none
    eta: float = 1.0  # must be above 0: a deterministic sampler is no policy

    # advantages
    advantages: str = "group"  # prompt (a buffer for each, as in the paper), group (pictures of one prompt), batch
    group_size: int = 4  # pictures of each prompt in an epoch
    buffer_size: int = 32  # rewards remembered for each prompt
    min_count: int = 16  # until a prompt has so many, the batch's statistics stand in
    advantage_clip: float = 5.0

    # updates
    algorithm: str = "is"  # is, sf
    updates: int = 0  # an epoch and inner epoch; 0: 4 for is, 1 for sf, which is only right on policy
    inner_epochs: int = 1  # passes over an epoch's pictures
    timestep_fraction: float = 0.5  # of the steps of each picture that are trained on, drawn anew each epoch
    train_batch: int = 32  # (picture, step) pairs through the UNet at once: memory, not mathematics
    train_guidance: bool = True  # train the guided policy, which is the one that sampled
    clip_range: float = 1e-4  # for latents of 4x64x64; see clip_range_for
    lora_rank: int = 0  # 0: fine-tune the whole UNet, which on so small a one is both faster and kinder to the pictures
    lora_targets: str = "to_q,to_k,to_v,to_out.0"
    lr: float = 0.0  # 0: 3e-3 for LoRA, 1.2e-4 for the whole UNet
    weight_decay: float = 1e-4
    grad_clip: float = 1.0

    # watching and keeping
    eval_every: int = 6  # epochs between looks at fixed prompts and seeds (always before the first and after the last)
    eval_images: int = 48
    checkpoint_every: int = 1  # epochs
    device: str = ""  # cpu, cuda, mps (default: the best there is)
    dtype: str = ""  # of the UNet's arithmetic: bf16, fp16, fp32 (default: bf16; fp32 on mps). Log-probs are always float32
    kernels: str = "auto"  # triton, torch, or auto: triton on a GPU
    tracker: str = "none"  # none, tensorboard, wandb


PRESETS = {
    "emoji": {},
    "sd15": dict(  # the paper's table (app. D), with LoRA as in ddpo-pytorch
        model="stable-diffusion-v1-5/stable-diffusion-v1-5", epochs=100, images=256, sample_batch=8, steps=50, guidance_scale=5.0,
        advantages="prompt", group_size=1, timestep_fraction=1.0, train_batch=8, lora_rank=4, lr=3e-4, eval_every=10,
        eval_images=16, checkpoint_every=5, watch=""),  # the shipped CLIP knows icons alone
}


class RunStopped(Exception):
    """A run that cannot go on, for a reason that lies outside this code. What it has done so far is on disk."""


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
            known = torch.tensor(self.buffers[prompt]) if len(self.buffers[prompt]) >= self.min_count else rewards
            advantages[i] = (rewards[i] - known.mean()) / (known.std(correction=0) + 1e-6)
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


def clip_range_for(clip_range, latents_shape):
    """log p is a *mean* over D elements, so ρ is the D-th root of the true ratio, and a clip range only means something
    together with D: 1e-4 at the paper's D = 16384 is 1.6 nats. Scaled by D, the setting means 1.6 nats for every latent size.
    """
    return clip_range * 4 * 64 * 64 / math.prod(latents_shape)


def seeded(*key, device="cpu"):
    """A generator that depends on the key alone: no state to carry, so nothing that a resumed run could lose."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def gather(values):
    """The lists of all processes, in the order of their ranks, as one list."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def reduce(tensor, operation=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def sum_gradients(parameters):
    """One flat all-reduce, by hand: DistributedDataParallel only syncs what is called through its wrapper, which a pipeline
    that holds the bare UNet does not do."""
    if dist.is_initialized():
        flat = reduce(torch.cat([p.grad.flatten() for p in parameters]))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))


def make_trainable(unet, config):
    """The parameters to train, in float32, whatever the frozen ones are in."""
    if config.lora_rank:
        from peft import LoraConfig

        torch.manual_seed(config.seed)  # the adapter starts the same on every process
        unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, init_lora_weights="gaussian",
                                    target_modules=config.lora_targets.split(",")))
    else:
        unet.requires_grad_(True)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


def check(config):
    """Fill in what follows from other settings, and refuse what cannot work: ValueError, one line, before anything is made."""
    def refuse(setting, advice):
        raise ValueError(f"--{setting.replace('_', '-')} {getattr(config, setting)}: {advice}")

    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            refuse(field.name, "must be a finite number")
    for setting in ("epochs", "images", "sample_batch", "steps", "group_size", "buffer_size", "min_count", "inner_epochs",
                    "train_batch", "eval_every", "eval_images", "checkpoint_every"):
        if getattr(config, setting) < 1:
            refuse(setting, "must be at least 1")
    if config.seed >= 2**63:
        refuse("seed", "must be below 2**63")
    for setting in ("updates", "lora_rank", "lr", "weight_decay", "seed"):
        if getattr(config, setting) < 0:
            refuse(setting, "must not be negative")
    for setting in ("advantage_clip", "clip_range", "grad_clip"):
        if getattr(config, setting) <= 0:
            refuse(setting, "must be above 0")
    for setting, choices in {"algorithm": ("is", "sf"), "advantages": ("prompt", "group", "batch"), "dtype": ("", *DTYPES),
                             "kernels": ("auto", "triton", "torch"), "tracker": ("none", "tensorboard", "wandb")}.items():
        if getattr(config, setting) not in choices:
            refuse(setting, f"unknown; choose {', '.join(filter(None, choices))}")
    if not 0 < config.eta <= 1:
        refuse("eta", "must be above 0, since a deterministic sampler is no policy, and at most 1")
    if not 0 < config.timestep_fraction <= 1:
        refuse("timestep_fraction", "must be above 0 and at most 1")
    if config.advantages == "group" and config.group_size < 2:
        refuse("group_size", "a group needs at least 2 pictures to compare; or choose --advantages batch or prompt")
    if config.advantages == "batch" and config.images < 2:
        refuse("images", "advantages over a batch need at least 2")

    config.device = config.device or str(default_device())
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.device == "cuda":  # torchrun's processes take one each
        config.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        refuse("device", f"cannot be used here ({str(error).splitlines()[0]}); choose cpu, or cuda where there is a GPU")
    if config.dtype == "fp16" and not config.device.startswith("cuda"):
        refuse("dtype", "needs a CUDA device; choose bf16 or fp32")
    kernels.BACKEND = config.kernels
    kernels.use_triton(torch.empty(0, device=config.device))  # says so where triton cannot run

    config.dtype = config.dtype or ("fp32" if config.device == "mps" else "bf16")
    config.updates = config.updates or (4 if config.algorithm == "is" else 1)
    config.lr = config.lr or (3e-3 if config.lora_rank else 1.2e-4)
    config.name = config.name or re.sub(r"[^\w.-]+", "_", config.reward)
    if config.algorithm == "sf" and config.updates * config.inner_epochs > 1:
        refuse("updates" if config.updates > 1 else "inner_epochs", "sf is only right on policy, so 1; or choose --algorithm is")
    for setting in ("group_size", "sample_batch", "updates"):
        unit = getattr(config, setting) * world
        if config.images % unit:
            processes = f" on each of {world} processes" if world > 1 else ""
            refuse("images", f"must be a multiple of --{setting.replace('_', '-')} {getattr(config, setting)}{processes}; "
                             f"{max(config.images // unit, 1) * unit} would do")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        refuse("tracker", f"is not installed; pip install {config.tracker}, or choose none")
    for name in watched(config):
        parse_reward(name)
    return config


def watched(config):
    names = [name.strip() for name in config.watch.split(",")]
    return [name for name in names if name and name not in parse_reward(config.reward)]


def train(config, resume=False):
    """Fine-tune as the settings say. Returns the run's folder (metrics.jsonl, rewards.png, progress.png, weights, checkpoint/).

    Raises ValueError before anything is written if the settings cannot work, RunStopped if a reward fails half-way.
    """
    config = check(config)
    device, dtype, folder = torch.device(config.device), DTYPES[config.dtype], Path(config.out) / config.name
    if (folder / "config.json").exists() and not resume:
        raise ValueError(f"{folder}: exists already; go on with --resume {folder}, or choose another --name")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # for the VAE; the UNet has autocast
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # everything that can be refused is tried before the folder is made
    prompt_set = load_prompts(config.prompts)
    parts = parse_reward(config.reward)  # {name: weight}
    rewards = {name: get_reward(name, device) for name in [*parts, *watched(config)]}
    pipeline = load_pipeline(config.model, device, dtype if config.lora_rank else torch.float32)  # what is trained is float32
    unet = pipeline.unet
    timesteps, table = ddim_table(pipeline.scheduler, config.steps, config.eta)
    policy_steps = (table[:, 2] > 0).nonzero().flatten()  # a last step without noise is no action
    if len(policy_steps) == 0:
        raise ValueError(f"--steps {config.steps}: every step of this scheduler is deterministic; choose more steps")
    trained_steps = max(1, round(config.timestep_fraction * len(policy_steps)))
    table, timesteps = table.to(device), timesteps.to(device)
    clip_range = clip_range_for(config.clip_range, latents_shape(pipeline)) if config.algorithm == "is" else None
    train_guidance = config.guidance_scale if config.train_guidance and config.guidance_scale > 1 else None
    picture = decode(pipeline, torch.zeros(2, *latents_shape(pipeline), device=device))
    for reward in rewards.values():
        reward(picture, prompt_set[:1] * 2)

    parameters = make_trainable(unet, config)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, eps=1e-8)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    statistics = {name: PromptStats(config.buffer_size, config.min_count) for name in parts}
    start, rows = 0, []
    saved = load_checkpoint(folder / "checkpoint") if resume else None
    if saved:
        start = saved["epoch"]
        with torch.no_grad():
            for p, value in zip(parameters, saved["parameters"]):
                p.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        for name, buffers in saved["statistics"].items():
            for prompt, values in buffers.items():
                statistics[name].buffers[prompt].extend(values)
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["epoch"] <= start]

    gather([rank])  # nobody makes the folder before everybody has seen that it is free
    if rank == 0:
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        (folder / "bad_reward.png").unlink(missing_ok=True)
        write_whole(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder}: {config.epochs} epochs of {config.images} pictures, {config.steps} steps each, {trained_steps} of them "
              f"trained on\n  {config.updates * config.inner_epochs} updates an epoch, {config.images // config.updates * trained_steps} "
              f"(picture, step) pairs each; {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters trained at lr {config.lr:g}"
              f"\n  {len(prompt_set)} prompts, {world} x {config.device}, {config.dtype}", flush=True)
    track = open_tracker(config, folder) if rank == 0 else None
    bar = tqdm(total=config.epochs, initial=start, desc=config.name, unit="epoch", disable=rank > 0)
    # Rewards are computed while the next pictures are sampled; but not on a CPU, where a second thread that calls torch makes
    # every operation of the first slower (libgomp no longer spins between them once it counts more threads than cores).
    scorer = ThreadPoolExecutor(1) if device.type != "cpu" else None

    def rollout(prompts, keys):
        generators = [seeded(*key, device=device) for key in keys]
        return sample_trajectories(pipeline, prompts, config.steps, config.guidance_scale, config.eta, generators, dtype)

    def score(images, prompts):
        try:
            return {name: reward(images, prompts) for name, reward in rewards.items()}
        except RewardError as error:
            message, bad = str(error), folder / "bad_reward.png"
            if error.image is not None and not bad.exists():  # the first one is what the message is about
                picture_grid([error.image[None]]).save(bad)
                message += f"; the image is {bad}"
            raise RunStopped(f"{message}; after mending it: python ddpo.py --resume {folder}") from None

    stride = max(len(prompt_set) // config.eval_images, 1)  # spread over a long list, again and again over a short one
    eval_prompts = [prompt_set[i * stride % len(prompt_set)] for i in range(config.eval_images)]
    candidates = list(dict.fromkeys(eval_prompts + load_prompts("animals") + load_prompts("animals_held_out")))

    def evaluate(epoch):
        """The same prompts and seeds each time, so that what changes is the model."""
        own = range(rank * config.eval_images // world, (rank + 1) * config.eval_images // world)
        results, pictures = [], []
        for batch in (own[i:i + config.sample_batch] for i in range(0, len(own), config.sample_batch)):
            prompts = [eval_prompts[i] for i in batch]
            images = rollout(prompts, [(0, 0, i) for i in batch]).images
            values = {name: value.tolist() for name, value in score(images, prompts).items()}
            if "clip" in rewards:
                values["clip_top1"] = clip_top1(images, prompts, candidates, device).float().tolist()
            results += [dict(zip(values, row)) for row in zip(*values.values())]
            pictures += [image.cpu() for i, image in zip(batch, images) if i < 8]
        results, pictures = gather(results), gather(pictures)
        means = {name: sum(row[name] for row in results) / len(results) for name in results[0]}
        if rank == 0:
            strip = picture_grid([torch.stack(pictures)], [f"epoch {epoch}"], eval_prompts[:8] if epoch == 0 else None)
            strip.save(folder / "progress" / f"{epoch:06d}.png")
            looks = sorted(path for path in (folder / "progress").glob("*.png") if int(path.stem) <= epoch)
            stack_pictures(looks, folder / "progress.png")
        trained = sum(weight * means[name] for name, weight in parts.items())
        return {"eval_reward": trained} | {f"eval_{name}": value for name, value in means.items() if [*parts] != [name]}

    def log(row):
        rows.append(row)
        if rank == 0:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            plot_rewards(rows, config, folder / "rewards.png")
            if track:
                track(row, row["epoch"])

    if start == 0:
        log({"epoch": 0, "images": 0} | evaluate(0))

    mine = torch.arange(rank * config.images // world, (rank + 1) * config.images // world)  # this process's pictures
    for epoch in range(start + 1, config.epochs + 1):
        clock = time.perf_counter()

        # 1. sample
        all_prompts = sample_prompts(prompt_set, config.images, seeded(config.seed, epoch, 0), config.group_size)
        batches, pending = [], []
        for index in mine.split(config.sample_batch):
            batch = rollout([all_prompts[i] for i in index], [(config.seed, epoch, 1, i) for i in index.tolist()])
            batches.append(batch)
            pending.append(scorer.submit(score, batch.images, batch.prompts).result if scorer
                           else functools.partial(score, batch.images, batch.prompts))
        latents = torch.cat([batch.latents for batch in batches])  # (B, T+1, C, H, W)
        old_log_probs = torch.cat([batch.log_probs for batch in batches])  # (B, T)
        if device.type == "cuda":
            torch.cuda.synchronize()  # for the clock's sake
        seconds_sample = time.perf_counter() - clock

        # 2. reward
        scored = [result() for result in pending]  # a dict for each batch
        scores = {name: gather(torch.cat([part[name] for part in scored]).tolist()) for name in rewards}
        seconds_reward = time.perf_counter() - clock - seconds_sample

        # 3. advantages: each part of a mixture in its own units, then weighted
        advantages = torch.zeros(config.images)
        for name, weight in parts.items():
            if config.advantages == "prompt":
                advantages += weight * statistics[name].advantages(all_prompts, scores[name])
            elif config.advantages == "group":
                advantages += weight * group_advantages(scores[name], config.group_size)
            else:
                advantages += weight * batch_advantages(scores[name])
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)[mine].to(device)

        # 4. update
        prompt_embeds = torch.cat([encode_prompts(pipeline, batch.prompts) for batch in batches])  # batch by batch, as when sampling
        negative_embeds = encode_prompts(pipeline, [""]) if train_guidance else None
        pairs = config.images // config.updates * trained_steps  # of an update, over all processes
        totals, ratio_error, grad_norms = torch.zeros(3, device=device), torch.zeros((), device=device), []
        for inner in range(config.inner_epochs):
            order = torch.rand(config.images, len(policy_steps), generator=seeded(config.seed, epoch, 2, inner)).argsort(1)[mine]
            steps = policy_steps[order[:, :trained_steps]]  # (B, K): which steps of each picture
            for update in range(config.updates):
                chosen = (mine % config.updates == update).nonzero().flatten()  # each group gives a picture to each update
                pair_image, pair_step = chosen.repeat_interleave(trained_steps), steps[chosen].flatten()
                for image, step in zip(pair_image.split(config.train_batch), pair_step.split(config.train_batch)):
                    image, step = image.to(device), step.to(device)
                    x, x_next = latents[image, step], latents[image, step + 1]
                    old, advantage = old_log_probs[image, step], advantages[image]
                    output = predict(unet, x, timesteps[step], prompt_embeds[image], negative_embeds, dtype)
                    scale = scaler.scale(torch.full((), 1 / pairs, device=device))  # the mean over the update, times fp16's loss scale
                    if kernels.use_triton(x):  # loss and gradient in one launch
                        loss, log_prob, _, _, grad = fused_ppo_loss(output.detach(), x, x_next, table[step], old, advantage,
                                                                    clip_range, train_guidance, scale)
                        output.backward(grad)
                    else:  # the same, as the formulas have it
                        _, log_prob = ddim_step(output, x, table[step], x_next, guidance_scale=train_guidance)
                        loss = is_loss(log_prob, old, advantage, clip_range) if clip_range else sf_loss(log_prob, advantage)
                        (loss.sum() * scale).backward()
                    with torch.no_grad():
                        away = (torch.exp(log_prob - old) - 1).abs()  # |ρ − 1|
                        outside = away > clip_range if clip_range else torch.zeros_like(away)
                        totals += torch.stack([loss.sum(), (log_prob - old).square().sum(), outside.sum()])
                        if inner == update == 0:  # nothing has been updated yet: whatever is not 0 here is an error
                            ratio_error = torch.maximum(ratio_error, away.max())
                sum_gradients(parameters)
                scaler.unscale_(optimizer)
                grad_norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip).item())
                if not (math.isfinite(grad_norms[-1]) or scaler.is_enabled()):  # fp16's scaler skips such a step by itself
                    raise RunStopped(f"epoch {epoch}: the gradient is {grad_norms[-1]}; start again with an --lr below {config.lr:g}")
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

        # 5. log
        loss, squared, outside = (reduce(totals) / (pairs * config.updates * config.inner_epochs)).tolist()
        seconds = time.perf_counter() - clock
        row = {"epoch": epoch, "images": epoch * config.images}
        trained = sum(weight * np.array(scores[name]) for name, weight in parts.items())
        row |= {"reward_mean": float(trained.mean()), "reward_std": float(trained.std())}
        row |= {f"reward_{name}": float(np.mean(scores[name])) for name in rewards if [*parts] != [name]}
        row |= {"loss": loss, "approx_kl": squared / 2, "clip_fraction": outside,
                "ratio_error": reduce(ratio_error, dist.ReduceOp.MAX).item(), "grad_norm": float(np.mean(grad_norms)),
                "seconds": seconds, "seconds_sample": seconds_sample, "seconds_reward": seconds_reward,
                "seconds_update": seconds - seconds_sample - seconds_reward, "images_per_second": config.images / seconds}
        if device.type == "cuda":
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            row |= evaluate(epoch)
            row["seconds_eval"] = time.perf_counter() - clock - seconds
        log(row)
        bar.set_postfix(reward=f"{row['reward_mean']:.3f}", **{name: f"{row[f'reward_{name}']:.3f}" for name in watched(config)})
        bar.update()
        if rank == 0 and (epoch % config.checkpoint_every == 0 or epoch == config.epochs):
            save_weights(pipeline, config, folder)
            save_checkpoint(folder / "checkpoint", {
                "epoch": epoch, "parameters": [p.detach().cpu() for p in parameters], "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "statistics": {name: {prompt: list(values) for prompt, values in stats.buffers.items()}
                               for name, stats in statistics.items()}})
    bar.close()
    return folder


def parse_config(arguments):
    """(Config, resume) from the command line: the preset's values, then the flags that were given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; only --epochs may be given beside it")
    for field in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if field.type in (bool, "bool") else dict(type=type(field.default))
        parser.add_argument("--" + field.name.replace("_", "-"), default=None, help=f"(default {field.default!r})", **kind)
    parser.error = lambda message: parser.exit(2, f"{message}\n")  # one line, without argparse's page of usage
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    if "resume" in given:
        run = Path(given.pop("resume")).resolve()
        if set(given) - {"epochs"}:
            raise ValueError(f"--resume {run}: its settings are those of its config.json; only --epochs may be given beside it")
        if not (run / "config.json").exists():
            raise ValueError(f"--resume {run}: no config.json in it; give the folder of a run, such as runs/compress")
        try:
            config = Config(**json.loads((run / "config.json").read_text()) | given)
        except (TypeError, json.JSONDecodeError):
            raise ValueError(f"--resume {run}: its config.json is not that of a run; give the folder of a run") from None
        config.out, config.name = os.path.relpath(run.parent), run.name
        return config, True
    preset = given.get("preset", "emoji" if given.get("model", "models/emoji") == "models/emoji" else "sd15")
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; choose {', '.join(PRESETS)}")
    return Config(**PRESETS[preset] | given | {"preset": preset}), False


def main(arguments=None):
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    config = None
    try:
        config, resume = parse_config(arguments)
        folder = train(config, resume)
        if int(os.environ.get("RANK", 0)) == 0:
            print(summary(folder))
    except ValueError as error:  # settings, models and rewards that cannot work
        print(error, file=sys.stderr)
        sys.exit(2)
    except (RunStopped, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        folder = Path(config.out) / config.name if config else None
        print(f"\nstopped; go on with: python ddpo.py --resume {folder}" if folder and folder.exists() else "\nstopped", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for a reward that is being computed: the disk already holds all that is needed
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
