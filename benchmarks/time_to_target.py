"""Seconds to a better model: ddpo.py and TRL's DDPOTrainer (0.23.1), until both reach one target.

    python benchmarks/time_to_target.py --trl-python trl-env/bin/python
                           searches, then measures; peer_trl.py tells how trl-env is made
    python benchmarks/time_to_target.py --table
                           prints the recorded tables again
    python benchmarks/time_to_target.py --draw
                           draws the curves again and puts the tables into the two README.md

The task is that of the first command: smaller JPEGs (the reward `compress`) of animals, with the
emoji model. The target, for the mean of an epoch's pictures, which are sampled with the sampler's
full noise:

- a JPEG size at least 20 % below the base model's;
- recognition at least 0.9 times the base model's, by a classifier that no training has seen
  (emoji/classifiers.py). So destroying the pictures does not count.

Every mean is over at least 96 pictures: where an epoch has fewer, the pictures of the newest epochs
are judged together. Else small epochs would get there by luck. The base model's means are of four
pictures of each prompt, in float32. A trial may choose the number of sampling steps, the guidance
and a window of steps that have noise. They make other pictures, so then the base model is measured
with them, too, and for size and for recognition the harder target counts.

The clock. Each side is a process of its own, one at a time. Each hands its pictures to the same
function in the place of its reward. When all pictures of an epoch have their rewards, the clock of
that side stops. The pictures are written to disk, this process judges them while the other one
waits, and then the clock goes on. So neither the writing nor the judging is timed, on both sides
alike. Two times are recorded: from the first pass through the UNet, and from the start of the
process (so with imports and loading). Both end when the pictures that meet the target have their
rewards; the updates after them do not count. Both sides compute rewards and log as they do by
default. Neither saves weights, watches another metric, or evaluates, except that ddpo.py always
evaluates the base model: that is timed, with one picture.

The search. Each side has a grid of its own (`AXES`), one axis after another, and at most
--minutes-per-search for it. All values of an axis are tried with the others at the best so far, and
the best value is kept. A trial ends at the target, at --minutes-per-trial, when it has taken longer
than the best so far, because it cannot win any more, or when fewer than half as many pictures are
recognised as the target asks, because it has destroyed them. Each of these is decided after an
epoch. The search has a seed that is not among those that are measured. One seed can be lucky, so
the two best settings are measured on all seeds, and those with the better median count. Ours starts
from the settings of the first command. TRL starts from the best that was found by hand
(`TRL_START`): the whole UNet, and a clip range scaled to the size of the latents.
Some axes are ours alone, because TRL does not have them: the warm-up of the learning rate, which
steps are trained (it draws them), and a penalty on the divergence from the base model. TRL can have
advantages relative to a prompt: then its pictures come in groups of one prompt, and its statistics
are those of the group. Its LoRA has a constant rank; the worker changes that constant. Precision is
an axis of both.

Nothing else should run on the machine. Each finished trial is kept in --work, so that the same
command goes on after an interruption. What is there is not run again: remove a side's files after a
change of its code. Results go to benchmarks/time_to_target.json, a record for each device, with a
picture of the curves beside it.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the scripts' folder, in place of this one

from benchmarks.epoch import NEVER, check_out, command_line, count_replays, count_rows, epoch, launch
from benchmarks.epoch import machine, record_as, versions
from benchmarks.peer_trl import make_trainer
from benchmarks.time_to_target_tables import SIDES, median, show, tables

MODEL, PROMPTS = "models/emoji", "animals"
SMALLER, RECOGNISED = 0.8, 0.9  # the target, relative to the base model
JUDGED = 96  # pictures, at least, of a mean
SEARCH_SEED = 100
FINALISTS = 2  # of a search, which are measured on the other seeds

# Ours: settings of ddpo.Config
FIXED = dict(
    model=MODEL, prompts=PROMPTS, reward="compress", watch="", tracker="none", eval_images=1,
    epochs=NEVER, eval_every=NEVER, checkpoint_every=NEVER,
)
SEARCHED = (  # they start at their defaults, those of the first command
    "lr", "lora_rank", "warmup", "clip_range", "train_first", "window", "images", "updates",
    "sample_batch", "train_batch", "advantages", "group_size", "train_guidance", "kl", "steps",
    "guidance_scale", "dtype", "cuda_graph",
)
# TRL's: settings of peer_trl.make_trainer
TRL_START = dict(
    lr=1e-4, lora_rank=0, clip_range=1.6e-3, timestep_fraction=1.0, images=96, updates=4,
    inner_epochs=1, sample_batch=48, train_batch=24, group_size=1, train_guidance=True, steps=10,
    guidance_scale=4.0, dtype="fp32",
)


def lower_rate(settings):
    return {"lr": settings["lr"] / 1.5}


def higher_rate(settings):
    return {"lr": settings["lr"] * 1.5}


def half_train_batch(settings):
    return {"train_batch": settings["train_batch"] // 2}


# axis: what is changed, in turn; a function makes a change from the best settings so far. What
# promises most comes first, because the best so far ends the trials after it.
AXES = {
    "ours": {
        "learning rate, whole UNet or LoRA": [
            dict(lr=2e-4), dict(lr=3e-4), dict(lora_rank=16, lr=3e-3),
        ],
        "clip range": [dict(clip_range=4e-4), dict(clip_range=1.6e-3)],
        "warm-up": [dict(warmup=5), dict(warmup=0)],
        "pictures and updates": [
            dict(images=48, updates=2, sample_batch=48), dict(images=32, updates=2),
            dict(images=96, updates=8),
        ],
        "steps": [dict(steps=7), dict(steps=5)],
        "trained steps": [
            dict(train_first=0.3), dict(train_first=0.7), dict(window="0:4", train_first=1.0),
        ],
        "guidance": [dict(train_guidance=False), dict(guidance_scale=3.0)],
        "groups": [dict(group_size=8), dict(group_size=1, advantages="batch")],
        "divergence from the base model": [dict(kl=0.05)],
        "batches": [dict(train_batch=16), dict(train_batch=64)],
        "learning rate, again": [lower_rate, higher_rate],
        "pictures and updates, again": [
            dict(images=48, updates=1, sample_batch=48),
            dict(images=48, updates=4, sample_batch=48),
            dict(images=64, updates=2, sample_batch=64),
        ],
        "steps, again": [dict(steps=8)],
        "trained steps, again": [dict(train_first=0.2), dict(window="0:3", train_first=1.0)],
        "warm-up, again": [dict(warmup=5)],
        "groups, again": [dict(group_size=8)],
        "learning rate, once more": [lower_rate, higher_rate],
    },
    "TRL": {
        "precision": [dict(dtype="bf16")],
        "groups": [dict(group_size=4)],
        "learning rate, whole UNet or LoRA": [dict(lr=2e-4), dict(lora_rank=4, lr=3e-3)],
        "trained steps": [dict(timestep_fraction=0.5)],
        "clip range": [dict(clip_range=6.4e-3)],
        "pictures and updates": [
            dict(images=48, updates=2, sample_batch=48, train_batch=24),
            dict(images=96, updates=8, sample_batch=48, train_batch=12),
        ],
        "steps": [dict(steps=7), dict(steps=5)],
        "guidance": [dict(train_guidance=False), dict(guidance_scale=3.0)],
        "learning rate, again": [lower_rate, higher_rate],
        "inner epochs": [dict(inner_epochs=2)],
        "batches": [half_train_batch],
    },
}
GPU_AXES = {"ours": {"CUDA graph": [dict(cuda_graph=True)]}, "TRL": {}}


def first_command():
    """Where our search starts."""
    import ddpo

    config = ddpo.check(ddpo.Config(**FIXED))
    return {key: getattr(config, key) for key in SEARCHED}


# The two sides, each a process that runs until nobody asks for another epoch


class Recorder:
    """Stands in the place of a side's reward. When all of an epoch's pictures have theirs, the
    clock stops until this process is asked for another epoch."""

    def __init__(self, job, reward):
        self.job, self.reward, self.log_counts = job, reward, reward.log_counts
        self.first_step = self.rows = None
        self.waited, self.epoch, self.images, self.prompts = 0.0, 0, [], []
        sys.stdin.readline()  # asks for the first epoch

    def watch(self, unet):
        def begin(module, inputs):
            self.first_step = self.first_step or time.monotonic()

        self.rows = count_rows(unet)
        unet.register_forward_pre_hook(begin)

    def __call__(self, images, prompts):
        rewards = self.reward(images, prompts)
        self.images.append(images.cpu())
        self.prompts += prompts
        if len(self.prompts) == self.job["settings"]["images"]:
            self.hand_over()
        return rewards

    def hand_over(self):
        import torch

        stopped = time.monotonic()
        self.epoch += 1
        file = os.path.join(self.job["folder"], f"{self.epoch}.pt")
        torch.save({"images": torch.cat(self.images), "prompts": self.prompts}, file)
        row = {
            "epoch": self.epoch,
            "pictures": self.epoch * len(self.prompts),
            "seconds": stopped - self.first_step - self.waited,
            "seconds_from_start": stopped - self.job["started"] - self.waited,
            "rows_sample": self.rows[0],
            "rows_update": self.rows[1],
            "file": file,
        }
        if self.epoch == 1:
            row["versions"] = versions(*self.job["libraries"])
            row["threads"] = torch.get_num_threads()
        print(json.dumps(row), flush=True)
        self.images, self.prompts = [], []
        if not sys.stdin.readline():
            sys.exit()  # nobody waits for another epoch
        self.waited += time.monotonic() - stopped


def our_worker(job):
    import ddpo

    config = ddpo.Config(**FIXED | job["settings"], seed=job["seed"], out=job["folder"])
    run = ddpo.prepare(config)
    recorder = Recorder(job, run.rewards["compress"])
    recorder.watch(run.pipeline.unet)
    run.step = run.step and count_replays(run.step, recorder.rows)

    def after_evaluation(row, epoch):  # ddpo.py calls a tracker after that of the base model
        run.rewards["compress"] = recorder

    run.track = after_evaluation
    ddpo.fit(run)


def trl_worker(job):
    """Runs in TRL's environment."""
    from prompts import load_prompts
    from rewards import get_reward

    settings, prompts, deck = job["settings"], load_prompts(PROMPTS), []
    recorder = Recorder(job, get_reward("compress"))

    def reward(images, texts, _):
        return recorder((images.float() * 255).round().byte(), list(texts)), {}

    def draw_prompt():  # each group_size times in a row, no prompt again before all have come
        if not deck:
            order = random.sample(prompts, len(prompts))
            deck.extend(prompt for prompt in order for _ in range(settings["group_size"]))
        return deck.pop(), {}

    trainer = make_trainer(settings | {"model": MODEL, "seed": job["seed"]}, reward, draw_prompt)
    recorder.watch(trainer.sd_pipeline.unet)
    global_step = 0
    for epoch_ in itertools.count(1):
        global_step = trainer.step(epoch_, global_step)


# The judge


def recognition(images, prompts):
    """(B,) 0 or 1: whether a classifier that no training has seen finds the prompt in a picture."""
    from emoji.classifiers import recognised

    return recognised(images, prompts)


def judge(images, prompts):
    """{"size": [kB of each picture], "recognition": [0 or 1 for each]}"""
    from rewards import jpeg_kilobytes

    return {
        "size": jpeg_kilobytes(images).tolist(),
        "recognition": recognition(images, prompts).tolist(),
    }


def means(judged):
    """{"size", "recognition"}, over the pictures of the newest epochs, as few of them as have
    JUDGED pictures; {} before there are as many. judged: what `judge` has said of each epoch."""
    pool = {"size": [], "recognition": []}
    for values in reversed(judged):
        for key, pictures in pool.items():
            pictures += values[key]
        if len(pool["size"]) >= JUDGED:
            return {key: statistics.fmean(pictures) for key, pictures in pool.items()}
    return {}


def measure_base(steps, guidance_scale, window):
    """{"size", "recognition", "pictures"} of the base model: four pictures of each prompt."""
    from processes import seeded
    from prompts import load_prompts
    from sample import load_pipeline, sample_trajectories, step_etas

    pipeline = load_pipeline(MODEL)
    prompts = [prompt for prompt in load_prompts(PROMPTS) for _ in range(4)]
    judged = {"size": [], "recognition": []}
    for first in range(0, len(prompts), 32):
        batch = prompts[first:first + 32]
        generators = [
            seeded(SEARCH_SEED, first + i, device=pipeline.device) for i in range(len(batch))
        ]
        images = sample_trajectories(
            pipeline, batch, steps, guidance_scale, step_etas(steps, 1.0, window), generators
        ).images
        for key, values in judge(images.cpu(), batch).items():
            judged[key] += values
    return {key: statistics.fmean(values) for key, values in judged.items()} | {
        "pictures": len(prompts)
    }


def target_of(bases):
    """{"size": at most, "recognition": at least}: the harder ones of the base model's pictures."""
    return {
        "size": SMALLER * min(base["size"] for base in bases),
        "recognition": RECOGNISED * max(base["recognition"] for base in bases),
    }


def meets(row, target):
    """Whether the pictures that a row is about are at the target."""
    return (
        "size" in row
        and row["size"] <= target["size"]
        and row["recognition"] >= target["recognition"]
    )


# Trials


def run_trial(side, settings, seed, limit_s, target, python):
    """One training, from the start of its process to the target, or to an epoch after limit_s."""
    libraries = ["torch", "diffusers", "transformers", "peft"]
    libraries += ["trl", "accelerate"] if side == "TRL" else []
    trial = dict(side=side, settings=settings, seed=seed, limit_s=limit_s, target=target)
    trial |= dict(reached=False, destroyed=False, error=None, epochs=[])
    judged, row = [], {"seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        job = dict(side=side, settings=settings, seed=seed, folder=folder, libraries=libraries)
        process = launch(job | {"started": time.monotonic()}, python, __file__)
        try:
            while not trial["reached"] and not trial["destroyed"] and row["seconds"] < limit_s:
                row = epoch(process)
                judged.append(judge(**load_pictures(row.pop("file"))))
                for key in ("versions", "threads"):
                    trial |= {key: row.pop(key)} if key in row else {}
                row["size_of_epoch"] = statistics.fmean(judged[-1]["size"])
                row |= means(judged)
                trial["epochs"].append(row)
                trial["reached"] = meets(row, target)
                trial["destroyed"] = row.get("recognition", 1) < target["recognition"] / 2
        except RuntimeError as error:
            trial["error"] = str(error)
        finally:
            process.kill()
            process.wait()
    return trial


def load_pictures(file):
    import torch

    pictures = torch.load(file, weights_only=True)
    os.unlink(file)
    return pictures


def seconds_of(trial):
    """To the target; infinite where it was not reached."""
    return trial["epochs"][-1]["seconds"] if trial["reached"] else math.inf


def time_of(trial):
    """What a trial took, in seconds, wherever it ended."""
    return trial["epochs"][-1]["seconds_from_start"] if trial["epochs"] else 0.0


def rank(trial):
    """Sorts trials, the best first: those at the target by their seconds, then the others by the
    smallest pictures that were still recognised."""
    recognised = [
        row["size"] / trial["target"]["size"]
        for row in trial["epochs"]
        if "size" in row and row["recognition"] >= trial["target"]["recognition"]
    ]
    return seconds_of(trial), min(recognised, default=math.inf)


def search(start, axes, limit_s, search_s, run):
    """[(axis, trial)] of a search as described above, which begins no trial after search_s seconds
    of trials (with their loading, without the judging).

    run(settings, limit_s) -> trial. Raises SystemExit if the settings to start from cannot run."""
    best = run(start, limit_s)
    if best["error"] and not best["epochs"]:
        sys.exit(f"{best['side']} cannot run: {best['error']}")
    tried = [("start", best)]
    for axis, changes in axes.items():
        settings = best["settings"]  # all changes of an axis start from the same
        for change in changes:
            candidate = settings | (change(settings) if callable(change) else change)
            if candidate in [trial["settings"] for _, trial in tried]:
                continue
            if sum(time_of(trial) for _, trial in tried) >= search_s:
                return tried
            trial = run(candidate, min(limit_s, seconds_of(best)))
            tried.append((axis, trial))
            best = min(best, trial, key=rank)
    return tried


def remembered(file, make, good_enough=lambda value: True):
    """The JSON in a file; where it is not there, or not good enough, what `make` returns, which is
    then kept there unless it has an "error"."""
    if file.exists():
        value = json.loads(file.read_text())
        if good_enough(value):
            return value
    value = make()
    if not value.get("error"):
        from run_folder import write_whole

        write_whole(file, json.dumps(value, indent=1) + "\n")
    return value


def fingerprint():
    """Of the model that is trained, so that no other model's trials are taken for its own."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / MODEL).glob("*/*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def named(*what):
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Bench:
    """A measurement, and the folder in which its finished parts are kept."""

    work: Path
    trl_python: str
    reference: dict  # settings whose pictures of the base model are the target for all
    place: list  # what else the numbers depend on: the device, the model

    def base(self, settings):
        made_with = settings["steps"], settings["guidance_scale"], settings.get("window", "")
        file = self.work / f"base-{named(made_with, self.place)}.json"
        return remembered(file, lambda: measure_base(*made_with))

    def trial(self, side, settings, seed, limit_s):
        """A trial that is there, if it has run long enough, or a new one."""
        target = target_of([self.base(self.reference), self.base(settings)])
        python = self.trl_python if side == "TRL" else sys.executable
        trial = remembered(
            self.work / f"{side}-{seed}-{named(settings, self.place)}.json",
            lambda: run_trial(side, settings, seed, limit_s, target, python),
            lambda trial: (
                trial["reached"] or trial["destroyed"] or trial["limit_s"] >= limit_s
            ),
        )
        say(trial)
        return trial

    def side(self, side, start, axes, seeds, limit_s, search_s):
        """A side's part of the record: its search, and the better of its two best on the seeds."""
        tried = search(
            start, axes, limit_s, search_s,
            lambda *trial: self.trial(side, trial[0], SEARCH_SEED, trial[1]),
        )
        finalists = sorted((trial for _, trial in tried), key=rank)[:FINALISTS]
        measured = [
            [self.trial(side, finalist["settings"], seed, limit_s) for seed in seeds]
            for finalist in finalists
        ]
        for trial in itertools.chain(*measured):
            if not trial["epochs"]:
                sys.exit(f"{side}, seed {trial['seed']}: {trial['error']}")
        measured.sort(key=lambda trials: median(sorted(map(rank, trials))))
        trials, *others = measured
        keys = "settings", "limit_s", "target", "reached", "destroyed", "error"
        return {
            "best": trials[0]["settings"],
            "search": [
                {"axis": axis} | {key: trial[key] for key in keys} | {"last": trial["epochs"][-1:]}
                for axis, trial in tried
            ],
            "trials": trials,
            "other_finalists": others,
        }


def say(trial):
    end = trial["epochs"][-1] if trial["epochs"] else {}
    result = f"{'reached' if trial['reached'] else 'not'} after {end.get('seconds', 0):.1f} s"
    if "size" in end:
        result += f", {end['size']:.3f} kB, {end['recognition']:.0%} recognised"
    result += f" ({trial['error']})" if trial["error"] else ""
    settings = " ".join(f"{key}={value}" for key, value in trial["settings"].items())
    print(f"{trial['side']}, seed {trial['seed']}: {result}\n  {settings}", file=sys.stderr,
          flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python",
                        help="the interpreter of TRL's environment, see peer_trl.py")
    parser.add_argument("--minutes-per-trial", type=float, default=5.0,
                        help="after which a trial is given up (default 5)")
    parser.add_argument("--minutes-per-search", type=float, default=40.0,
                        help="of all trials of a side's search together (default 40)")
    parser.add_argument("--seeds", default="0,1,2",
                        help=f"an odd number of them, without {SEARCH_SEED} (default 0,1,2)")
    parser.add_argument("--work", default=str(ROOT / "runs/time_to_target"),
                        help="where finished trials are kept (default: runs/time_to_target)")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/time_to_target.json"),
                        help="where the record is put (default: benchmarks/time_to_target.json)")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    parser.add_argument("--draw", action="store_true", help="only draw and show what --out holds")
    args = parser.parse_args(arguments)
    if args.table or args.draw:
        if not Path(args.out).exists():
            parser.exit(2, f"--out {args.out}: there is no such record; measure it first, with "
                           "--trl-python\n")
        records = json.loads(Path(args.out).read_text())
        if args.draw:
            show(records, args.out)
        print(tables(records))
        return
    if not args.trl_python:
        parser.exit(2, "--trl-python: give the interpreter of an environment with TRL 0.23.1; "
                       "benchmarks/peer_trl.py --help says how to make one\n")
    for option, value, example in (
        ("--minutes-per-trial", args.minutes_per_trial, 5),
        ("--minutes-per-search", args.minutes_per_search, 40),
    ):
        if not value > 0:
            parser.exit(2, f"{option} {value:g}: must be above 0, such as {example}\n")
    numbers = args.seeds.split(",")
    seeds = list(dict.fromkeys(int(number) for number in numbers if number.isdecimal()))
    if len(seeds) < len(numbers) or len(seeds) % 2 == 0 or SEARCH_SEED in seeds:
        parser.exit(2, f"--seeds {args.seeds}: give an odd number of different seeds without "
                       f"{SEARCH_SEED}, which the search has, such as 0,1,2\n")

    check_out(parser, args.out)

    import torch

    # a signal as an exception, so that the trial that runs is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    device, start = machine(), {"ours": first_command(), "TRL": TRL_START}
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    place = [device["device"], fingerprint()]
    bench = Bench(work, os.path.abspath(args.trl_python), start["ours"], place)
    sides = {}
    for side in reversed(SIDES):
        axes = AXES[side] | (GPU_AXES[side] if torch.cuda.is_available() else {})
        minutes = args.minutes_per_trial, args.minutes_per_search
        sides[side] = bench.side(side, start[side], axes, seeds, *(60 * value for value in minutes))
    command = command_line("benchmarks/time_to_target.py", arguments)
    command = command.replace(args.trl_python, "trl-env/bin/python")  # as named in peer_trl.py
    record = device | {
        "command": command,
        "base": bench.base(start["ours"]),
        "rule": {"size": SMALLER, "recognition": RECOGNISED, "pictures": JUDGED},
        "search_seed": SEARCH_SEED,
        "sides": sides,
    }
    record_as(args.out, f"{MODEL}, {device['device']}", record)
    records = json.loads(Path(args.out).read_text())
    show(records, args.out)
    print(tables(records))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        job = json.loads(sys.argv[2])
        {"ours": our_worker, "TRL": trl_worker}[job["side"]](job)
    else:
        main()
