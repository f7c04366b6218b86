"""What every training loop does around its own mathematics: set up a run, sample and score, log, save, and
resume after a kill.

The training loops call the first two, and evaluate.py the others, around the epochs:

    run = start(config)    locks the folder, tries models and rewards, reads an interrupted run back
    collect(run, epoch)    the epoch's pictures: sampled on all processes, scored
    log(run, row)          a row of metrics.jsonl
    save(run, epoch)       weights and a checkpoint
    close(run)             lets another process write the folder

Everything random in an epoch is drawn from (seed, epoch, index of the picture). There is no state to lose,
so a run that is killed goes on to the same numbers, on any number of processes.
"""

import contextlib
import copy
import functools
import json
import os
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from loading import load_pipeline
from memory import estimate
from models import (DTYPES, blocks, condition, decode, denoiser, encode_prompts, is_flow, latents_shape,
                    main_tokenizer, make_trainable, passes, predict, schedule_inputs, text_encoders)
from processes import RunStopped, gather, place, seeded, sum_gradients
from prompts import cut_notice, digest, load_prompts, sample_prompts, set_names
from rewards import RewardError, get_reward, parse_reward
from run_folder import (append, open_tracker, picture_grid, plot_rewards, refuse_existing, release, reserved,
                        row_line, save_checkpoint, save_picture, save_weights, sync, write_whole)
from resume import restore
from sample import (GraphedStep, Trajectories, ddim_table, sample_trajectories, step_etas,
                    window_places)
from settings import set_sampler, watched


@dataclass
class Run:
    """A run in memory."""

    config: object
    folder: Path
    device: torch.device
    dtype: torch.dtype  # of the network's arithmetic
    rank: int  # of this process, of `world`
    world: int
    prompts: list  # to train on
    held_out: dict  # name of a set of --eval-prompts -> its prompts
    digest: str  # of both, which a resumed run must find unchanged
    components: dict  # name of a trained reward -> weight
    rewards: dict  # name -> function, the watched ones too
    files: dict  # name of a reward in a file -> digest of the file
    pipeline: object
    timesteps: torch.Tensor  # (T,)
    parameters: list
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reference: object = None  # a frozen copy of a network that is trained as a whole, for --kl
    ema: list | None = None  # averaged parameters
    saved: dict | None = None  # the state that a loop gave to `save`, when the run is resumed
    epoch: int = 0  # done
    updates: int = 0  # done
    rows: list = field(default_factory=list)  # of metrics.jsonl, up to this epoch
    later_rows: list = field(default_factory=list)  # those after it, which will be computed again
    eager: int = 0  # places of a compiled network that run in eager mode
    cache: dict = field(default_factory=dict)  # prompt -> embedding
    step: object = None  # what takes a sampling step, see sample_trajectories
    scorer: object = None  # a thread that computes rewards, or None
    track: object = None
    bar: object = None  # progress bar of the epochs


def make_optimizer(parameters, config):
    kind = torch.optim.AdamW
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit as kind  # moments of 2 bytes a parameter, not 8
    return kind(parameters, lr=config.lr, betas=(0.9, 0.999), eps=1e-8,
                weight_decay=config.weight_decay)


def start(config, resume=False, reference=False):
    """A Run, ready for epoch run.epoch + 1, in a folder that no other process writes until `close`.

    reference: whether the loop needs the base model's outputs, see reference_output.
    Raises ValueError, one line, before anything is written, if the run cannot work.
    """
    folder = Path(config.out) / config.name
    if place()[0]:
        return set_up(config, folder, resume, reference)
    with reserved(folder):
        if not resume:
            refuse_existing(folder)
        return set_up(config, folder, resume, reference)


def close(run):
    """After the last epoch: lets another process write the folder. A run that fails ends without
    it, because a collective with a process that is gone may never return."""
    if run.rank == 0:
        release(run.folder)
    if run.scorer:
        run.scorer.shutdown()
    if dist.is_initialized():
        dist.destroy_process_group()


def set_up(config, folder, resume, reference):
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    rank, world = place()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 in matrix products, for a network in float32 alone: the rewards get it too, and their
        # differences are small. Convolutions, the VAE's for one, have it by torch's own default.
        torch.backends.cuda.matmul.allow_tf32 = dtype == torch.float32
    if world > 1 and not dist.is_initialized():
        # NCCL gives up after ten minutes, and a reward on one process may take longer to answer
        backend, patience = "nccl" if device.type == "cuda" else "gloo", timedelta(hours=2)
        dist.init_process_group(backend, timeout=patience)

    # everything that can be refused is tried before the folder is made
    prompts, components = load_prompts(config.prompts), parse_reward(config.reward)
    held_out = {name: load_prompts(name) for name in set_names(config.eval_prompts)}
    others = sum(held_out.values(), [])
    rewards = {name: get_reward(name, device) for name in [*components, *watched(config)]}
    files = {name: digest(Path(name.rpartition(":")[0]).read_text("utf-8", errors="replace"))
             for name in rewards if ".py:" in name}
    # what is trained is float32
    pipeline = load_pipeline(config.model, device, dtype if config.lora_rank else torch.float32,
                             resolution=config.resolution)
    notice = cut_notice(main_tokenizer(pipeline), prompts + others)
    if notice and rank == 0:
        print(notice, file=sys.stderr)
    if device.type == "cuda" and rank == 0:
        print(estimate(config, world, pipeline), flush=True)
    network = denoiser(pipeline)
    set_sampler(config, is_flow(pipeline.scheduler))
    timesteps = check_steps(config, pipeline)
    cache = {}
    if config.offload:  # the VAE comes back while pictures are sampled
        read_prompts(pipeline, [*prompts, *others, ""], cache, rank)
        for module in (*text_encoders(pipeline), pipeline.vae):
            module.to("cpu")
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    try:
        picture = decode(pipeline, torch.zeros(2, *latents_shape(pipeline), device=device))
    except FloatingPointError as error:
        raise ValueError(f"--model {config.model}: {error}; its VAE is broken, choose another "
                         "model") from None
    for reward in rewards.values():
        reward(picture, prompts[:1] * 2)
    parameters = make_trainable(network, config)
    if config.compile:
        compile_blocks(network)

    run = Run(config, folder, device, dtype, rank, world, prompts, held_out, digest([prompts, others]),
              components, rewards, files, pipeline, timesteps.to(device), parameters,
              make_optimizer(parameters, config),
              torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), cache=cache)
    if reference and not config.lora_rank:
        run.reference = copy.deepcopy(network).requires_grad_(False)
        if config.compile:  # which copies do not inherit
            compile_blocks(run.reference)
    if config.ema:
        run.ema = [p.detach().clone() for p in parameters]
    if resume:
        restore(run)
    run.step = GraphedStep() if config.cuda_graph else None
    # Rewards are computed while the next pictures are sampled. Not on a CPU: a second thread that
    # calls torch makes every operation of the first slower (libgomp no longer spins between them
    # once it counts more threads than cores). On mps it kills the process (pytorch issue 197805).
    if device.type == "cuda":
        # a thread has a CUDA device of its own, which is the first one until it is set
        run.scorer = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))

    gather([rank])  # nobody makes the folder before everybody has seen that it is free
    if rank == 0:
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        (folder / "bad_reward.png").unlink(missing_ok=True)
        sync(folder.parent), sync(folder)
        write_whole(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
        write_rows(run)
        run.track = open_tracker(config, folder)
    return run


def read_prompts(pipeline, prompts, cache, rank):
    """--offload: puts the embeddings of all prompts into the cache, in the computer's memory, while the
    text encoders are still on the device. A CPU would need minutes for a prompt of T5 in fp16."""
    shown = dict(desc="reading prompts", leave=False, disable=True if rank else None)
    for prompt in tqdm(dict.fromkeys(prompts), **shown):
        encode_prompts(pipeline, [prompt], cache)
        cache[prompt] = {key: value.cpu() for key, value in cache[prompt].items()}


def check_steps(config, pipeline):
    """The sampler's timesteps, (T,). Raises ValueError where no step would be an action."""
    timesteps, table = ddim_table(pipeline.scheduler, config.steps, config.eta, config.sampler,
                                  **schedule_inputs(pipeline, config.steps))
    for first, end in window_places(config.steps, config.window, config.window_shift):
        if config.eta and not (table[first:end, 2] > 0).any():
            within = "of the window " if config.window else ""
            raise ValueError(f"--steps {config.steps}: every step {within}from {first} to {end} of "
                             "this scheduler is deterministic; choose more steps, or another --window")
    return timesteps


def compile_blocks(network):
    """--compile. Block by block: compiled as a whole (torch 2.13, CPU), all gradients below the first
    upsampling are wrong, and nothing says so. In place, so that weights keep their names."""
    # torch counts the compilations of a function, which all blocks of a kind share, and runs the blocks
    # past its limit in eager mode
    limits = torch.compiler.config
    limits.recompile_limit, limits.accumulated_recompile_limit = 1024, 65536
    # on a GPU a UNet is so already; on a CPU it only pays where operations are fused
    network.to(memory_format=torch.channels_last)
    # Without gradients torch makes another graph, which rounds differently in bf16, and the ratio would
    # not start at 1. So sampling runs the graph of training. dynamic=False: one for each batch
    # size, of which there are few.
    network.one_graph = True
    for block in blocks(network):
        block.compile(dynamic=False)


def epoch_table(config, pipeline, epoch):
    """(table (T, 4) of an epoch's sampling, which of its T steps are actions that may be trained).

    A step without noise, outside the window or the last one of some schedules, is no action."""
    eta = step_etas(config.steps, config.eta, config.window, config.window_shift, epoch)
    _, table = ddim_table(pipeline.scheduler, config.steps, eta, config.sampler,
                          **schedule_inputs(pipeline, config.steps))
    return table, (table[:, 2] > 0).nonzero().flatten()


def write_rows(run):
    rows = run.rows + run.later_rows
    write_whole(run.folder / "metrics.jsonl", "".join(row_line(row) + "\n" for row in rows))


def shard(run, count):
    """The indices of this process among `count` pictures, (count / world,)."""
    return torch.arange(run.rank * count // run.world, (run.rank + 1) * count // run.world)


def progress_bar(run, name, total, position=1):
    """A bar for a part of an epoch, below that of the epochs; gone when it is full."""
    disable = True if run.rank else None  # None: not drawn where there is no terminal
    return tqdm(total=total, desc=f"  {name}", leave=False, position=position, disable=disable)


def remedy(run):
    """Which setting to change where numbers have overflowed."""
    config = run.config
    kl = getattr(config, "kl", 0)
    if run.updates:
        lower = f"start again with an --lr below {config.lr:g}"
        return lower + (f", or a --kl below {kl:g}" if kl > 1 else "")
    return ("nothing has been trained yet, so choose --dtype bf16 or fp32, a --guidance-scale below "
            f"{config.guidance_scale:g}, or smaller weights in --reward")


def rollout(run, prompts, keys, bar, eta=None, epoch=1):
    """Trajectories of a batch, a picture a prompt, each with the random numbers of its key.

    A moving window stands where that epoch has it. Evaluations keep to its first place, so that they
    do not depend on the epoch. Raises RunStopped if the network is broken: its black pictures are the
    best for some rewards.
    """
    config, generators = run.config, [seeded(*key, device=run.device) for key in keys]
    if eta is None:
        eta = step_etas(config.steps, config.eta, config.window, config.window_shift, epoch)
    try:
        return sample_trajectories(run.pipeline, prompts, config.steps, config.guidance_scale, eta,
                                   generators, run.dtype, bar.update, run.cache, run.step,
                                   config.sampler)
    except FloatingPointError as error:
        raise RunStopped(f"{run.folder}: {error}; {remedy(run)}") from None


def score(run, images, prompts, bar=None):
    """{name: (B,) float32 on the CPU} for every reward, trained or watched. Raises RunStopped, with
    the picture saved."""
    try:
        values = {name: reward(images, prompts) for name, reward in run.rewards.items()}
    except RewardError as error:
        message, bad = str(error), run.folder / "bad_reward.png"
        if error.image is not None and not bad.exists():  # the message is about the first one
            save_picture(picture_grid([error.image[None]]), bad)
            message += f"; the image is {bad}"
        folder = shlex.quote(str(run.folder))
        raise RunStopped(f"{message}; after mending it, go on with --resume {folder}") from None
    if bar is not None:
        bar.update(len(images))
    return values


def collect(run, epoch):
    """An epoch's pictures: (prompts of all processes, Trajectories of this one, {reward: list over
    all processes}, seconds).

    The trajectories are without their images, which nobody needs once they are scored.
    seconds: of sampling, and of waiting for rewards that sampling did not hide.
    Raises RunStopped, as rollout and score do.
    """
    config, clock = run.config, time.perf_counter()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for reward in run.rewards.values():  # from here on they count this epoch's pictures alone
        reward.log_counts.update(dict.fromkeys(reward.log_counts, 0))
    prompts = sample_prompts(run.prompts, config.images, seeded(config.seed, epoch, 0),
                             config.group_size)
    indices = shard(run, config.images).split(config.sample_batch)
    batches, tasks, futures = [], [], []  # tasks: of scoring; futures: of those of the scorer's thread
    try:
        with progress_bar(run, "sampling", len(indices) * config.steps) as sampling, \
                progress_bar(run, "scoring", sum(map(len, indices)), position=2) as scoring:
            for index in indices:
                keys = [(config.seed, epoch, 1, i) for i in index.tolist()]
                batch = rollout(run, [prompts[i] for i in index], keys, sampling, epoch=epoch)
                task = functools.partial(score, run, batch.images, batch.prompts, scoring)
                if run.scorer:
                    futures.append(run.scorer.submit(task))
                    task = futures[-1].result
                tasks.append(task)
                batch.images = None  # let go once they are scored
                if config.offload:
                    batch.latents = batch.latents.cpu()
                batches.append(batch)
                for future in futures:
                    if future.done():
                        future.result()  # raises what the reward has raised
            if config.offload:  # decoding has brought it to the device
                run.pipeline.vae.to("cpu")
            if run.device.type == "cuda":
                torch.cuda.synchronize()  # for the clock's sake
            seconds_sample = time.perf_counter() - clock
            scored = [task() for task in tasks]  # a dict for each batch
    finally:  # where a reward has failed, the batches that still wait for it are dropped
        for future in futures:
            future.cancel()
    scores = {name: gather(torch.cat([part[name] for part in scored]).tolist()) for name in run.rewards}
    trajectories = Trajectories(torch.cat([batch.latents for batch in batches]),
                                torch.cat([batch.log_probs for batch in batches]), batches[0].timesteps,
                                None, [prompt for batch in batches for prompt in batch.prompts])
    seconds = seconds_sample, time.perf_counter() - clock - seconds_sample
    return prompts, trajectories, scores, seconds


def reward_row(run, scores):
    """The rewards' columns of a row of metrics.jsonl; a reward that is trained on alone is
    reward_mean itself."""
    trained = sum(weight * np.array(scores[name]) for name, weight in run.components.items())
    row = {"reward_mean": float(trained.mean()), "reward_std": float(trained.std())}
    alone = [*run.components]
    row |= {f"reward_{name}": float(np.mean(scores[name])) for name in run.rewards if alone != [name]}
    counts = [{f"{name}_{what}": count for what, count in reward.log_counts.items()}
              for name, reward in run.rewards.items()]
    for counted in gather(counts):  # not every process has seen every event
        row |= {key: row.get(key, 0) + count for key, count in counted.items()}
    return row


def time_row(run, clock, seconds_sample, seconds_reward):
    """The columns of an epoch's time, which began at `clock`, and of a GPU's memory."""
    seconds = time.perf_counter() - clock
    row = {"seconds": seconds, "seconds_sample": seconds_sample, "seconds_reward": seconds_reward,
           "seconds_update": seconds - seconds_sample - seconds_reward,
           "images_per_second": run.config.images / seconds}
    if run.device.type == "cuda":
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9  # since `collect` began
    return row


def training_inputs(run, prompts):
    """(prompt_embeds, negative_embeds, guidance_scale) of a training batch, see models.condition."""
    config = run.config
    return condition(run.pipeline, prompts, config.guidance_scale, run.cache, config.train_guidance)


def reference_output(run, *inputs):
    """The base model's output, without gradients: the adapter is off, or a copy of the network runs.

    inputs: those of models.predict, from the latents to the negative_embeds."""
    with torch.no_grad():
        if run.reference is not None:
            return predict(run.reference, *inputs, run.dtype)
        network = denoiser(run.pipeline)
        network.disable_adapters()
        output = predict(network, *inputs, run.dtype)
        network.enable_adapters()
        return output


def describe(run, updates, pairs, kind, teachers=0):
    """What a run is going to do, in numbers, before it starts. pairs: (picture, timestep) of an update;
    teachers: networks that run on each pair without gradient, such as the base model of --kl."""
    config = run.config
    rows = passes(run.pipeline, config.guidance_scale)
    forward = config.images * config.steps * rows
    backward = updates * pairs * (rows if config.train_guidance else 1)
    forward += teachers * backward
    at_once = min(config.train_batch, pairs // run.world)
    trained = sum(p.numel() for p in run.parameters) / 1e6
    return (f"{run.folder}: {config.epochs} epochs of {config.images} pictures of "
            f"{len(run.prompts)} prompts, "
            f"{config.steps} steps each\n"
            f"  {updates} updates an epoch of {pairs} {kind}; {at_once} at once on each of "
            f"{run.world} x {config.device}; {trained:.2f} M parameters at lr {config.lr:g}, {config.dtype}\n"
            f"  an epoch costs {forward:,} network rows forward and {backward:,} forward and backward, all "
            f"epochs about {config.epochs * (forward + 3 * backward):,} forward rows' worth"
            + unguarded(config))


def unguarded(config):
    """A line where nothing is watched and --guard therefore has nothing to go by."""
    if config.guard and not (watched(config) or config.eval_prompts):
        why = f", since {config.watch} is trained on" if config.watch else ""
        return (f"\n  nothing is watched{why}: --guard and --patience have no effect; --watch another "
                "metric, or give --eval-prompts")
    return ""


def apply_gradients(run):
    """One update from the gradients that have piled up, on all processes. Returns their norm before
    clipping. Raises RunStopped if it is not finite."""
    sum_gradients(run.parameters)
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.parameters, run.config.grad_clip).item()
    # fp16's scaler skips such a step and halves its scale, which helps unless the network is broken
    if not (np.isfinite(norm) or run.scaler.is_enabled() and run.scaler.get_scale() >= 1):
        raise RunStopped(f"{run.folder}: the gradient is {norm}; {remedy(run)}")
    run.updates += 1
    for group in run.optimizer.param_groups:  # a formula in run.updates, which `restore` computes
        group["lr"] = run.config.lr * min(1, run.updates / max(1, run.config.warmup))
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    for average, p in zip(run.ema or [], run.parameters):
        average.lerp_(p.detach(), 1 - run.config.ema)
    return norm


@contextlib.contextmanager
def using(parameters, values):
    """Inside, the parameters have these values, and no gradients are recorded."""
    present = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, value in zip(parameters, values):
            p.copy_(value)
        try:
            yield
        finally:
            for p, value in zip(parameters, present):
                p.copy_(value)


def averaged(run):
    """Inside, the network has its averaged weights (--ema), which are evaluated and saved."""
    return using(run.parameters if run.ema else [], run.ema or [])


def log(run, row):
    """A row of metrics.jsonl. Raises RunStopped instead if the weights are not finite any more."""
    if not torch.stack([p.isfinite().all() for p in run.parameters]).all():
        raise RunStopped(f"{run.folder}: the weights are not finite after epoch {row['epoch']}; "
                         f"{remedy(run)}")
    again = bool(run.later_rows)
    run.rows.append(row)
    run.later_rows = [later for later in run.later_rows if later["epoch"] > row["epoch"]]
    if run.rank == 0:
        if again:  # replaces the row of an epoch that is done again
            write_rows(run)
        else:  # on the disk before the checkpoint is, so that a power cut leaves no gap
            append(run.folder / "metrics.jsonl", row_line(row))
        plot_rewards(run.rows, run.config, run.folder / "rewards.png")
        if run.track:
            run.track(row, row["epoch"])
        say_what_is_eager(run)


def say_what_is_eager(run):
    """With --compile, once: what torch could not compile and runs in eager mode."""
    if run.config.compile and not run.eager:
        from torch._dynamo.utils import counters

        reasons = [*counters["unimplemented"], *counters["graph_break"]]
        run.eager = len(reasons)
        if run.eager:
            tqdm.write(f"--compile: torch runs parts of the network in eager mode "
                       f"({reasons[0].splitlines()[0]})", file=sys.stderr)


def save(run, epoch, best=None, **state):
    """Weights and a checkpoint. Where `best` is an epoch before this one, the folder's own weights
    stay what they were then, and the newest go to last/. state: what the loop wants back in
    run.saved."""
    if run.rank:
        return
    with averaged(run):
        if best in (None, epoch):
            save_weights(run.pipeline, run.config, run.folder)
            shutil.rmtree(run.folder / "last", ignore_errors=True)
        else:
            save_weights(run.pipeline, run.config, run.folder / "last")
    save_checkpoint(run.folder / "checkpoint", state | {
        "epoch": epoch, "config": asdict(run.config), "prompts": run.digest, "files": run.files,
        "parameters": [p.detach().cpu() for p in run.parameters], "ema": run.ema,
        "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()})
