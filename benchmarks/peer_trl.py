"""The same work in TRL's DDPOTrainer (0.23.1, the last release that has it) and in ddpo.py.

TRL needs older libraries, so it has an environment of its own (on a GPU leave the second line out):

    python3 -m venv trl-env
    trl-env/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    trl-env/bin/pip install "trl==0.23.1" "diffusers<0.36" "transformers<5" "datasets<5" peft

    python benchmarks/peer_trl.py --trl-python trl-env/bin/python
                           the emoji model (four minutes on two CPU cores); options:
        --train-batch 80   ours with more pairs at once than TRL can have
        --compile          ours compiled, which TRL does not offer
        --sd15             a model of Stable Diffusion 1.5's size, on a GPU
    python benchmarks/peer_trl.py --table
                           prints the recorded tables again

Both sides take turns, an epoch each. The first epoch is not counted.

The same on both sides: model folder, images an epoch, steps, guidance in sampling and in training,
every step trained, updates an epoch, LoRA (rank 4 on to_q, to_k, to_v, to_out.0, which is what TRL
has built in), AdamW, learning rate, threads, images denoised at once, (picture, step) pairs through
the UNet at once (so twice as many rows, with guidance; unless --train-batch), reward (the JPEG size
of rewards.py), advantages over the batch. Nothing is logged or saved while the clock runs. Each
side counts the rows that went through its UNet, with gradients and without; if the counts differ,
there is no comparison. Precision is each side's default, or with --dtype the same. Everything else
is each side's default.

What remains different, on purpose, since it is what is compared:

- ddpo.py draws its pairs from all steps of all pictures of an update. TRL takes train_batch pictures
  and goes through their steps. So it cannot have more pairs at once than an update has pictures (16
  with the emoji model, which is what it has here). ddpo.py can: --train-batch.
- ddpo.py keeps latents, log-probabilities and its VAE in float32. With bf16 or fp16 TRL has all
  three in that precision.
- LoRA in bf16 or fp16: both have float32 adapters on frozen half-precision weights, under autocast
  in the UNet.
- Attention on a CPU: ddpo.py uses plain matrix products, TRL (diffusers' default)
  scaled_dot_product_attention. On a GPU both use the latter.
- A GPU: ddpo.py has its convolutions in channels_last, fused kernels for the policy's step and
  loss, and rewards that are computed while the next batch is sampled. TRL waits for the GPU at each
  step, to gather ᾱ from a table on the CPU.
- ddpo.py encodes a prompt once a run, TRL once a picture. ddpo.py draws each picture's noise from a
  generator of its own.
- The versions of diffusers, transformers and peft; they are in the record.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the scripts' folder, in place of this one

from benchmarks.epoch import PHASES, check_out, command_line, count_rows, launch, machine, markdown
from benchmarks.epoch import model_folder, ratios
from benchmarks.epoch import print_tables, record_as, setting, take_turns, times_faster, versions
from benchmarks.epoch import __file__ as OUR_WORKER

EMOJI = dict(
    model="models/emoji", images=64, sample_batch=32, train_batch=16, updates=4, steps=10,
    guidance_scale=4.0,
)
SD15 = dict(images=16, sample_batch=8, train_batch=4, updates=2, steps=10, guidance_scale=5.0)
EQUAL = dict(lora_rank=4, lr=3e-4, seed=0)


def make_trainer(settings, reward, draw_prompt):
    """TRL's trainer with its model loaded, in TRL's environment. Settings as in EMOJI, EQUAL, and
    those that time_to_target.py adds; lora_rank 0 is the whole UNet.

    reward, draw_prompt: as TRL wants them. Where draw_prompt gives each prompt group_size times,
    advantages are relative to the pictures of that prompt."""
    import torch
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    from trl.models import modeling_sd_base

    on_cpu = not torch.cuda.is_available()
    # TRL writes to accelerate's log before it has made this state, which accelerate refuses
    PartialState(cpu=on_cpu)
    pictures = settings["images"] // settings["updates"]  # of an update
    group_size = settings.get("group_size", 1)
    config = DDPOConfig(
        mixed_precision={"fp32": "no"}.get(settings["dtype"], settings["dtype"]),
        seed=settings["seed"],
        sample_num_steps=settings["steps"],
        sample_guidance_scale=settings["guidance_scale"],
        sample_batch_size=settings["sample_batch"],
        sample_num_batches_per_epoch=settings["images"] // settings["sample_batch"],
        train_batch_size=settings["train_batch"],
        train_gradient_accumulation_steps=pictures // settings["train_batch"],
        train_learning_rate=settings["lr"],
        train_clip_range=settings.get("clip_range", 1e-4),
        train_timestep_fraction=settings.get("timestep_fraction", 1.0),
        train_num_inner_epochs=settings.get("inner_epochs", 1),
        train_cfg=settings.get("train_guidance", True),
        per_prompt_stat_tracking=group_size > 1,
        per_prompt_stat_tracking_buffer_size=group_size,
        per_prompt_stat_tracking_min_count=group_size,
        save_freq=10**9,
        accelerator_kwargs={"cpu": on_cpu},
    )
    rank, lora_config = settings["lora_rank"], modeling_sd_base.LoraConfig

    def lora_config_of_rank(**options):  # in TRL it is a constant
        return lora_config(**options | {"r": rank, "lora_alpha": rank})

    modeling_sd_base.LoraConfig = lora_config_of_rank
    pipeline = DefaultDDPOStableDiffusionPipeline(settings["model"], use_lora=rank > 0)
    trainer = DDPOTrainer(config, reward, draw_prompt, pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)  # TRL draws a bar of the steps
    return trainer


def trl_worker(settings):
    """Train as TRL does; before each epoch wait for a line, after each print a line of JSON. Runs
    in TRL's environment."""
    import torch

    from prompts import load_prompts
    from rewards import get_reward

    prompts, compress = load_prompts("animals"), get_reward("compress")

    def reward(images, texts, _):
        return compress((images.float() * 255).round().byte(), list(texts)), {}

    def draw_prompt():
        return random.choice(prompts), {}

    trainer = make_trainer(settings, reward, draw_prompt)
    seconds, rows = {}, count_rows(trainer.sd_pipeline.unet)
    methods = {
        "seconds_sample": "_generate_samples",
        "seconds_reward": "compute_rewards",
        "seconds_update": "_train_batched_samples",
    }
    for key, method in methods.items():
        setattr(trainer, method, timed(getattr(trainer, method), key, seconds))
    step, global_step = timed(trainer.step, "seconds", seconds), 0
    for epoch in itertools.count(1):
        if not sys.stdin.readline():
            return  # nobody waits for another epoch
        rows[:] = 0, 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        global_step = step(epoch, global_step)
        row = seconds | {"rows_sample": rows[0], "rows_update": rows[1]}
        row["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.empty_cache()  # for the other side to use
        if epoch == 1:
            libraries = "torch", "trl", "diffusers", "transformers", "peft", "accelerate"
            row["versions"] = versions(*libraries)
        print(json.dumps(row), flush=True)


def timed(function, key, seconds):
    """The function, which then leaves its wall time in seconds[key]."""
    import torch

    def timed_function(*args, **kwargs):
        clock = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[key] = time.perf_counter() - clock
        return result

    return timed_function


def summarise(rows, images):
    """Ours over TRL's speed, round by round; images a second; peak memory."""
    from statistics import median

    summary = {
        "ours_over_trl": {
            phase: ratios(rows["TRL"], rows["ours"], key) for phase, key in PHASES.items()
        },
        "images_per_second": {
            side: {
                phase: images / median(row[key] for row in epochs) for phase, key in PHASES.items()
            }
            for side, epochs in rows.items()
        },
    }
    if "peak_memory_gb" in rows["ours"][0]:
        summary["peak_memory_gb"] = {
            side: max(row["peak_memory_gb"] for row in epochs) for side, epochs in rows.items()
        }
    return summary


def table(record):
    summary = record["summary"]
    rows = [["", *PHASES]]
    for side in ("TRL", "ours"):
        speeds = summary["images_per_second"][side].values()
        rows.append([f"{side}, images/s", *(f"{speed:.2f}" for speed in speeds)])
    rows.append(["ours over TRL", *map(times_faster, summary["ours_over_trl"].values())])
    memory = summary.get("peak_memory_gb")
    if memory:
        ratio = f"{memory['ours'] / memory['TRL']:.2f}x"
        cells = "peak GB", f"{memory['TRL']:.1f}", f"{memory['ours']:.1f}", ratio
        rows = [[*row, cell] for row, cell in zip(rows, cells)]
    return markdown(rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", help="the interpreter of TRL's environment, see above")
    parser.add_argument("--model", help="a folder in diffusers' layout (default: models/emoji)")
    parser.add_argument("--sd15", action="store_true",
                        help="a model of SD 1.5's size with random weights, in runs/sd15-random")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each side that count")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "own"), default="own",
                        help="of both sides; own: what each takes by default, here fp16 on a GPU and bf16 "
                        "on a CPU that has it, in TRL fp16, or fp32 on a CPU (default own)")
    parser.add_argument("--train-batch", type=int,
                        help="ours: pairs at once (default: as many as TRL)")
    parser.add_argument("--compile", action="store_true",
                        help="ours with torch.compile: minutes more")
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="KEY=VALUE",
                        help="of both sides: images, sample_batch, train_batch, updates, steps, "
                        "guidance_scale, lr, seed")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/peer_trl.json"),
                        help="where the record is put (default: benchmarks/peer_trl.json)")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    args = parser.parse_args(arguments)
    check_out(parser, args.out)
    if args.table:
        print_tables(args.out, table)
        return
    if not args.trl_python:
        parser.exit(2, "--trl-python: give the interpreter of an environment with TRL 0.23.1; "
                       "--help says how to make one\n")

    import torch

    from models import default_dtype

    settings = dict(EMOJI, model=str(ROOT / "models/emoji"))
    if args.sd15 or args.model:
        from benchmarks.sd15 import build

        settings = SD15 | {"model": model_folder(args.model or build(ROOT / "runs/sd15-random"))}
    settings |= EQUAL | dict(args.set)
    our_dtype = trl_dtype = args.dtype
    if args.dtype == "own":
        on_gpu = torch.cuda.is_available()
        our_dtype, trl_dtype = default_dtype("cuda" if on_gpu else "cpu"), "fp16" if on_gpu else "fp32"
    units = settings["sample_batch"], settings["updates"] * settings["train_batch"]
    if any(settings["images"] % unit for unit in units):
        parser.exit(2, f"--set images={settings['images']}: must be a multiple of sample_batch "
                       f"{units[0]}, and of updates x train_batch {units[1]}\n")
    ours = {"train_batch": args.train_batch or settings["train_batch"], "compile": args.compile}
    trl_python = os.path.abspath(args.trl_python)
    workers = {
        "ours": launch(settings | ours | {"dtype": our_dtype}, script=OUR_WORKER),
        "TRL": launch(settings | {"dtype": trl_dtype}, trl_python, __file__),
    }
    first, rows = take_turns(workers, args.rounds)
    if len(rows) < 2:
        sys.exit("one side could not run")
    counted = "rows_sample", "rows_update", "threads"
    work = {side: {key: first[side][key] for key in counted} for side in first}
    print(f"UNet rows an epoch and threads: {work}")
    if work["ours"] != work["TRL"]:
        sys.exit("the two sides did not do the same work: no comparison")
    settings["model"] = args.model or "models/emoji"
    if args.sd15 and not args.model:
        settings["model"] = "SD 1.5's size, random weights"
    command = command_line("benchmarks/peer_trl.py", arguments)
    our_versions = versions("torch", "diffusers", "transformers", "peft")
    record = machine() | {
        "command": command.replace(args.trl_python, "trl-env/bin/python"),  # as named above
        "versions": {"ours": our_versions, "TRL": first["TRL"]["versions"]},
        "settings": settings,
        "dtype": {"ours": our_dtype, "TRL": trl_dtype},
        "ours": ours,
        "work": work,
        "summary": summarise(rows, settings["images"]),
        "rounds": rows,
    }
    name = f"ours {our_dtype}, TRL {trl_dtype}"
    if our_dtype == trl_dtype:
        name = f"{our_dtype} in both"
    if args.train_batch:
        name += f", ours with train batch {args.train_batch}"
    if args.compile:
        name += ", ours compiled"
    record_as(args.out, f"{settings['model']}, {name}, {record['device']}", record)
    print(table(record))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        trl_worker(json.loads(sys.argv[2]))
    else:
        main()
