"""What every training loop here does around its own mathematics: set up a run, sample and score, log, keep, go on after a kill.

`ddpo.py` and `rwr.py` are loops over these functions:

    run = start(config)          models, rewards and settings tried, folder made, an interrupted run read back
    collect(run, epoch)          the epoch's pictures: sampled on all processes, scored
    log(run, row)                a row of metrics.jsonl
    save(run, epoch)             weights and a checkpoint

Everything random in an epoch is drawn from (seed, epoch, index of the picture): there is no state to lose, so a run that is
killed goes on to the same numbers, on any number of processes.
"""

import contextlib
import copy
import functools
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from prompts import load_prompts, sample_prompts, set_names
from rewards import RewardError, get_reward, parse_reward
from run_folder import (load_checkpoint, open_tracker, picture_grid, plot_rewards, read_metrics, save_checkpoint, save_weights, write_whole)
from settings import watched
from sample import (DTYPES, GraphedStep, Trajectories, ddim_table, decode, latents_shape, load_pipeline, predict,
                    sample_trajectories, step_etas)


class RunStopped(Exception):
    """A run that cannot go on, for a reason that lies outside this code. What it has done so far is on disk."""


@dataclass
class Run:
    """A run in memory."""

    config: object
    folder: Path
    device: torch.device
    dtype: torch.dtype  # of the UNet's arithmetic
    rank: int  # of this process, of `world`
    world: int
    prompts: list  # to train on
    components: dict  # name of a trained reward -> weight
    rewards: dict  # name -> function, the watched ones too
    pipeline: object
    eta: torch.Tensor  # (T,) of each step: 0 outside the window
    timesteps: torch.Tensor  # (T,)
    table: torch.Tensor  # (T, 4)
    policy_steps: torch.Tensor  # which of the T steps are actions that may be trained
    parameters: list
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reference: object = None  # a frozen copy of the UNet, where a whole one is trained and compared with it
    ema: list | None = None  # averaged parameters
    saved: dict | None = None  # the checkpoint that it goes on from
    epoch: int = 0  # done
    updates: int = 0  # done
    rows: list = field(default_factory=list)  # of metrics.jsonl
    cache: dict = field(default_factory=dict)  # prompt -> embedding
    step: object = None  # what takes a sampling step, see sample_trajectories
    scorer: object = None  # a thread that computes rewards, or None
    track: object = None
    bar: object = None  # progress bar of the epochs


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

        targets, names = [target.strip() for target in config.lora_targets.split(",")], [name for name, _ in unet.named_modules()]
        for target in targets:  # peft is content when one of them is there
            if not any(f".{name}".endswith(f".{target}") for name in names if name):
                raise ValueError(f"--lora-targets {config.lora_targets}: no layer of the UNet is called {target!r}; choose such as "
                                 "to_q,to_k,to_v,to_out.0")
        torch.manual_seed(config.seed)  # the adapter starts the same on every process
        unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, init_lora_weights="gaussian",
                                    target_modules=targets))
    else:
        unet.requires_grad_(True)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


def make_optimizer(parameters, config):
    kind = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as kind  # moments in 8 bits: 2 bytes a parameter instead of 8
    return kind(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, eps=1e-8)


def start(config, resume=False, reference=False):
    """A Run, ready for epoch run.epoch + 1. Raises ValueError, one line, before anything is written, if it cannot work.

    reference: whether the loop needs the base model's outputs, see reference_output."""
    device, dtype, folder = torch.device(config.device), DTYPES[config.dtype], Path(config.out) / config.name
    if (folder / "config.json").exists() and not resume:
        raise ValueError(f"{folder}: exists already; go on with --resume {folder}, or choose another --name")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # for the VAE, and for the UNet with --dtype fp32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # everything that can be refused is tried before the folder is made
    prompts, components = load_prompts(config.prompts), parse_reward(config.reward)
    for name in set_names(config.eval_prompts):
        load_prompts(name)
    rewards = {name: get_reward(name, device) for name in [*components, *watched(config)]}
    pipeline = load_pipeline(config.model, device, dtype if config.lora_rank else torch.float32)  # what is trained is float32
    unet = pipeline.unet
    eta = step_etas(config.steps, config.eta, config.window)
    timesteps, table = ddim_table(pipeline.scheduler, config.steps, eta)
    policy_steps = (table[:, 2] > 0).nonzero().flatten()  # a step without noise, such as some schedules' last, is no action
    if config.eta and len(policy_steps) == 0:
        raise ValueError(f"--steps {config.steps}: every step of this scheduler is deterministic; choose more steps")
    if config.offload:  # the text encoder works where it is, once a prompt; the VAE comes to the device for each batch
        pipeline.text_encoder.to("cpu"), pipeline.vae.to("cpu")
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    picture = decode(pipeline, torch.zeros(2, *latents_shape(pipeline), device=device))
    for reward in rewards.values():
        reward(picture, prompts[:1] * 2)
    parameters = make_trainable(unet, config)
    if config.compile:
        unet.to(memory_format=torch.channels_last)  # a GPU has it so already; on a CPU it only pays when operations are fused
        # Block by block: compiled as a whole (torch 2.13, CPU) all gradients below the first upsampling come out wrong, without a
        # word. The last norm too, for eager mode is slow at norms of bf16 in channels_last. And rounded as in eager mode: else
        # sampling and training, which are two graphs, round differently in bf16, and the ratio does not start at 1. In place, so
        # that weights keep their names; anew for each batch size, of which there are few.
        for block in filter(None, (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet.conv_norm_out)):
            block.compile(dynamic=False, options={"emulate_precision_casts": True})

    run = Run(config, folder, device, dtype, rank, world, prompts, components, rewards, pipeline, eta, timesteps.to(device), table.to(device),
              policy_steps, parameters, make_optimizer(parameters, config),
              torch.amp.GradScaler(device.type, enabled=dtype == torch.float16))
    if reference and not config.lora_rank:
        run.reference = copy.deepcopy(unet).requires_grad_(False)
    if config.ema:
        run.ema = [p.detach().clone() for p in parameters]
    run.saved = load_checkpoint(folder / "checkpoint") if resume else None
    if run.saved:
        run.epoch = run.saved["epoch"]
        run.updates = run.epoch * config.updates * config.inner_epochs
        with torch.no_grad():
            for p, value in zip(parameters, run.saved["parameters"]):
                p.copy_(value)
            for p, value in zip(run.ema or [], run.saved["ema"] or []):
                p.copy_(value)
        run.optimizer.load_state_dict(run.saved["optimizer"])
        run.scaler.load_state_dict(run.saved["scaler"])
        run.rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["epoch"] <= run.epoch]
        if [row["epoch"] for row in run.rows] != list(range(run.epoch + 1)):
            raise ValueError(f"--resume {folder}: its checkpoint is of epoch {run.epoch}, but metrics.jsonl lacks rows before that, or has a "
                             "damaged line; mend that file, or begin anew with another --name")
    elif resume and rank == 0:
        print(f"{folder}: no checkpoint that can be read; it begins again", file=sys.stderr)
    run.step = GraphedStep() if config.cuda_graph else None
    # Rewards are computed while the next pictures are sampled; but not on a CPU, where a second thread that calls torch makes
    # every operation of the first slower (libgomp no longer spins between them once it counts more threads than cores).
    run.scorer = ThreadPoolExecutor(1) if device.type != "cpu" else None

    gather([rank])  # nobody makes the folder before everybody has seen that it is free
    if rank == 0:
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        (folder / "bad_reward.png").unlink(missing_ok=True)
        write_whole(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in run.rows))
        run.track = open_tracker(config, folder)
    return run


def shard(run, count):
    """The indices of this process among `count` pictures, (count / world,)."""
    return torch.arange(run.rank * count // run.world, (run.rank + 1) * count // run.world)


def progress_bar(run, name, total, position=1):
    """A bar for a part of an epoch, below that of the epochs; gone when it is full."""
    return tqdm(total=total, desc=f"  {name}", leave=False, position=position, disable=True if run.rank else None)  # None: unless on a terminal


def rollout(run, prompts, keys, bar=None, eta=None):
    """Trajectories of a batch, a picture a prompt, each with the random numbers of its key."""
    generators = [seeded(*key, device=run.device) for key in keys]
    return sample_trajectories(run.pipeline, prompts, run.config.steps, run.config.guidance_scale, run.eta if eta is None else eta,
                               generators, run.dtype, bar and bar.update, run.cache, run.step)


def score(run, images, prompts, bar=None):
    """{name: (B,) float32 on the CPU} for every reward, trained or watched. Raises RunStopped, with the picture saved."""
    try:
        values = {name: reward(images, prompts) for name, reward in run.rewards.items()}
    except RewardError as error:
        message, bad = str(error), run.folder / "bad_reward.png"
        if error.image is not None and not bad.exists():  # the first one is what the message is about
            picture_grid([error.image[None]]).save(bad)
            message += f"; the image is {bad}"
        raise RunStopped(f"{message}; after mending it, go on with --resume {run.folder}") from None
    if bar is not None:
        bar.update(len(images))
    return values


def collect(run, epoch):
    """An epoch's pictures: (prompts of all processes, Trajectories of this one, {reward: list over all processes}, seconds).

    seconds: of sampling, and of waiting for rewards that sampling did not hide.
    """
    config, clock = run.config, time.perf_counter()
    for reward in run.rewards.values():  # from here on they count this epoch's pictures, not those of looks
        reward.counts.update(dict.fromkeys(reward.counts, 0))
    prompts = sample_prompts(run.prompts, config.images, seeded(config.seed, epoch, 0), config.group_size)
    indices = shard(run, config.images)
    batches, pending = [], []
    with progress_bar(run, "sampling", len(indices.split(config.sample_batch)) * config.steps) as sampling, \
            progress_bar(run, "scoring", len(indices), position=2) as scoring:
        for index in indices.split(config.sample_batch):
            batch = rollout(run, [prompts[i] for i in index], [(config.seed, epoch, 1, i) for i in index.tolist()], sampling)
            task = functools.partial(score, run, batch.images, batch.prompts, scoring)
            pending.append(run.scorer.submit(task).result if run.scorer else task)
            if config.offload:
                batch.latents = batch.latents.cpu()
            batches.append(batch)
        if run.device.type == "cuda":
            torch.cuda.synchronize()  # for the clock's sake
        seconds_sample = time.perf_counter() - clock
        scored = [result() for result in pending]  # a dict for each batch
    scores = {name: gather(torch.cat([part[name] for part in scored]).tolist()) for name in run.rewards}
    trajectories = Trajectories(torch.cat([batch.latents for batch in batches]), torch.cat([batch.log_probs for batch in batches]),
                         batches[0].timesteps, torch.cat([batch.images for batch in batches]),
                         [prompt for batch in batches for prompt in batch.prompts])
    return prompts, trajectories, scores, (seconds_sample, time.perf_counter() - clock - seconds_sample)


def reward_row(run, scores):
    """The rewards' columns of a row of metrics.jsonl; a reward that is trained on alone is reward_mean itself."""
    trained = sum(weight * np.array(scores[name]) for name, weight in run.components.items())
    row = {"reward_mean": float(trained.mean()), "reward_std": float(trained.std())}
    row |= {f"reward_{name}": float(np.mean(scores[name])) for name in run.rewards if [*run.components] != [name]}
    return row | {f"{name}_{what}": sum(gather([count])) for name, reward in run.rewards.items() for what, count in reward.counts.items()}


def time_row(run, clock, seconds_sample, seconds_reward):
    """The columns of an epoch's time, which began at `clock`, and of a GPU's memory."""
    seconds = time.perf_counter() - clock
    row = {"seconds": seconds, "seconds_sample": seconds_sample, "seconds_reward": seconds_reward,
           "seconds_update": seconds - seconds_sample - seconds_reward, "images_per_second": run.config.images / seconds}
    return row | ({"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if run.device.type == "cuda" else {})


def reference_output(run, *inputs):
    """The base model's output, without gradients: the adapter is off, or a copy of the network runs.

    inputs: those of sample.predict, from the latents to the negative_embeds."""
    with torch.no_grad():
        if run.reference is not None:
            return predict(run.reference, *inputs, run.dtype)
        run.pipeline.unet.disable_adapters()
        output = predict(run.pipeline.unet, *inputs, run.dtype)
        run.pipeline.unet.enable_adapters()
        return output


def describe(run, updates, pairs, kind, teachers=0):
    """What a run is going to do, in numbers, before it starts. pairs: (picture, timestep) of an update;
    teachers: networks that run on each pair without gradient, such as the base model of --kl."""
    config = run.config
    passes = 2 if config.guidance_scale > 1 else 1
    forward = config.images * config.steps * passes
    backward = updates * pairs * (passes if config.train_guidance else 1)
    forward += teachers * backward
    at_once = min(config.train_batch, pairs // run.world)
    trained = sum(p.numel() for p in run.parameters) / 1e6
    return (f"{run.folder}: {config.epochs} epochs of {config.images} pictures of {len(run.prompts)} prompts, "
            f"{config.steps} steps each\n"
            f"  {updates} updates an epoch of {pairs} {kind}; {at_once} at once on each of "
            f"{run.world} x {config.device}; {trained:.2f} M parameters at lr {config.lr:g}, {config.dtype}\n"
            f"  an epoch costs {forward:,} network rows forward and {backward:,} forward and backward, all "
            f"epochs about {config.epochs * (forward + 3 * backward):,} forward rows' worth")


def apply_gradients(run):
    """One update from the gradients that have piled up, on all processes. Returns their norm before clipping."""
    sum_gradients(run.parameters)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.grad_clip).item()
    if not (np.isfinite(norm) or run.scaler.is_enabled()):  # fp16's scaler skips such a step by itself
        raise RunStopped(f"{run.folder}: the gradient is {norm}; start again with an --lr below {run.config.lr:g}")
    run.updates += 1
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.lr * min(1, run.updates / max(1, run.config.warmup))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    for average, p in zip(run.ema or [], run.parameters):
        average.lerp_(p.detach(), 1 - run.config.ema)
    return norm


@contextlib.contextmanager
def using(parameters, values):
    """Inside, the parameters have these values."""
    present = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, values):
            p.copy_(value)
        yield
        for p, value in zip(parameters, present):
            p.copy_(value)


def averaged(run):
    """Inside, the UNet has its averaged weights (--ema), which are those that are evaluated and saved."""
    return using(run.parameters, run.ema or run.parameters)


def log(run, row):
    run.rows.append(row)
    if run.rank == 0:
        with open(run.folder / "metrics.jsonl", "a") as file:
            # JSON knows no infinity, which is what the norm of gradients is where fp16 overflowed
            file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # not to be behind the checkpoint after a power cut
        plot_rewards(run.rows, run.config, run.folder / "rewards.png")
        if run.track:
            run.track(row, row["epoch"])


def save(run, epoch, best=None, **state):
    """Weights and a checkpoint. Where `best` is an epoch before this one, the folder's own weights stay what they were then, and
    the newest go to last/. state: what the caller wants back in run.saved."""
    if run.rank:
        return
    with averaged(run):
        if best in (None, epoch):
            save_weights(run.pipeline, run.config, run.folder)
            shutil.rmtree(run.folder / "last", ignore_errors=True)
        else:
            save_weights(run.pipeline, run.config, run.folder / "last")
    save_checkpoint(run.folder / "checkpoint", state | {
        "epoch": epoch, "parameters": [p.detach().cpu() for p in run.parameters], "ema": run.ema,
        "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()})


def command_line(arguments, parse_config, prepare, fit):
    """The command line of a loop: its exit code is 0, or 2 for settings that cannot work, or 1."""
    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    config = None
    try:
        try:
            config, resume = parse_config(arguments)
            run = prepare(config, resume)
        except ValueError as error:  # settings, models and rewards that cannot work
            print(error, file=sys.stderr)
            sys.exit(2)
        fit(run)
    except (RunStopped, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        folder = Path(config.out) / config.name if config else None
        script = Path(inspect.getfile(fit)).name
        way_on = f"; go on with: python {script} --resume {folder}" if folder and folder.exists() else ""
        print(f"\nstopped{way_on}", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for a reward that is being computed: the disk holds all that is needed
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
