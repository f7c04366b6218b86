"""The experiments: which variants each of them compares, and the commands that it runs.

A new experiment is a function here, {run: command} of a number of seeds; a function in
reproduce_figures.py that draws what came out; and a line in `EXPERIMENTS` in reproduce.py.
Runs are named <variant>-<seed>. Experiments may share runs, if they give them the same commands.
"""

import itertools

# "a cat with a guitar", without guidance: then alignment can improve, and a step costs half
CLIP = "--prompts pairs --guidance-scale 1 --images 128 --group-size 16"
FLAGS = {
    # After these epochs the backgrounds are full and begin to cover the animals. With cps, which draws
    # the base model's animals better, more are left, and with smaller steps the seeds differ less.
    "incompress": "--sampler cps --lr 5.7e-5 --epochs 5",
    "clip": f"{CLIP} --lr 1.5e-4 --epochs 20 --eval-every 2 --eval-prompts animal_objects_held_out",
}
# Learns several times as fast as the first command, which keeps a little more of the pictures. Where
# variants are compared, or trained past the optimum, speed counts.
FEW, WIDE = "--images 48 --sample-batch 48", "--clip-range 4e-4"
FAST = f"{FEW} --updates 2 {WIDE}"
ALGORITHMS = {
    "DDPO-IS": "ddpo.py",
    "DDPO-SF": "ddpo.py --algorithm sf",
    "RWR": "rwr.py",
    "RWR-sparse": "rwr.py --weights sparse",
    "RWR-no-reward": "rwr.py --beta 0",  # what the regression alone does, see rwr.py
    "NFT": "forward.py",
    "AWM": "forward.py --loss awm",
    "NFT-no-reward": "forward.py --advantages zero",  # its control: nothing moves, so one run shows it
}
FLAGS_OF = {  # of an algorithm's script, for clip and for the other rewards
    "ddpo.py": (f"{CLIP} --lr 1.5e-4", f"{FEW} --lr 1e-4 {WIDE}"),
    "rwr.py": (f"{CLIP} --lr 4e-5", f"{FEW} --lr 3e-5"),
    "forward.py": (f"{CLIP} --lr 1e-4", f"{FEW} --lr 1e-4"),
}
HELD_OUT = {  # the prompts that a reward is trained on, then others
    "compress": ["animals", "animals_held_out", "objects"],
    "clip": ["pairs", "animal_objects", "animal_objects_held_out"],
}
# Past the optimum: --patience 99 saves the weights that the guard chooses, and trains on.
PREVENTIONS = {
    "none": "--reward compress",
    "kl": "--reward compress --kl 0.05",
    "ema": "--reward compress --ema 0.9",
    "mixture": "--reward compress:0.5,clip:1",
}
CHEAPER = {
    "10 steps": "",
    "first three": "--train-first 0.3",
    "20 steps": "--steps 20",
    "50 steps": "--steps 50 --timestep-fraction 0.4",
    "all trained": "--train-first 1",
    "half at random": "--train-first 1 --timestep-fraction 0.5",
    "last two dropped": "--train-first 0.8 --timestep-fraction 0.625",
    "equal weights": "--train-first 1 --timestep-fraction 0.5 --step-weights equal",
    "window of 5": "--window 0:5 --train-first 1",
}
WINDOW = "--train-first 1 --window 0:4"
SAMPLERS = {
    f"{sampler}, {trained}": f"--sampler {sampler} {flags}"
    for trained, samplers, flags in (
        ("first half", ("ddim", "cps", "flow", "dance"), "--train-first 0.5"),
        ("all", ("ddim", "cps", "flow", "dance"), "--train-first 1"),
        ("window", ("ddim", "flow"), WINDOW),
        ("moving window", ("ddim", "flow"), f"{WINDOW} --window-shift 1/1"),
    )
    for sampler in samplers
}

JUDGED = {  # who judges the number, and the prompts
    "A": ("a", "four_animals"),
    "B": ("b", "four_animals"),
    "A-three": ("a", "three_animals"),
}


def train_on(rewards, seeds):
    return {
        f"{reward}-{seed}": f"ddpo.py --reward {reward} --seed {seed} {FLAGS.get(reward, '')}"
        for seed in range(seeds)
        for reward in rewards
    }


def rewards(seeds):
    return train_on(["compress", "clip", "incompress"], seeds)


def generalisation(seeds):
    return train_on(HELD_OUT, seeds)


def algorithms(seeds):
    runs = {}
    for reward, seed in itertools.product(("compress", "clip", "incompress"), range(seeds)):
        for name, command in ALGORITHMS.items():
            if name == "NFT-no-reward" and (reward, seed) != ("compress", 0):
                continue
            if name == "RWR-no-reward" and reward == "incompress":
                continue  # the same pictures as those of compress
            of_clip, of_others = FLAGS_OF[command.split()[0]]
            flags = of_clip if reward == "clip" else of_others
            runs[f"{reward}-{name}-{seed}"] = (
                f"{command} --reward {reward} --seed {seed} {flags} "
                "--epochs 5 --warmup 0 --guard 0 --ema 0 --eval-every 5"
            )
    return runs


def overoptimisation(seeds):
    runs = {}
    for seed, (name, flags) in itertools.product(range(seeds), PREVENTIONS.items()):
        ema = "" if "--ema" in flags else "--ema 0"
        runs[f"over-{name}-{seed}"] = (
            f"ddpo.py {flags} --seed {seed} {FAST} "
            f"--epochs 10 --eval-every 2 --patience 99 {ema}"
        )
    return runs


def run_of(experiment, variant):
    """The name of the runs of a variant, without their seed."""
    return f"{experiment}-{variant.replace(', ', '-').replace(' ', '-')}"


def short_runs(experiment, variants, seeds, flags):
    """Few epochs, the newest weights: enough to compare how fast variants learn."""
    return {
        f"{run_of(experiment, variant)}-{seed}": (
            f"ddpo.py --reward compress --seed {seed} {own_flags} {flags} "
            "--guard 0 --ema 0 --eval-images 32"
        )
        for seed, (variant, own_flags) in itertools.product(range(seeds), variants.items())
    }


def fewer_steps(seeds):
    return short_runs("steps", CHEAPER, seeds, f"{FAST} --warmup 4 --epochs 4 --eval-every 2")


def samplers(seeds):
    return short_runs("samplers", SAMPLERS, seeds,
                      "--images 64 --lr 2e-4 --warmup 4 --epochs 4 --eval-every 2")


def typographic(seeds):
    """Two judges of "four cats": where A learnt, a printed digit always told the number. And A with a
    number that the model rarely prints. The newest weights are in last/; beside it are those chosen by
    the guard, which watches an honest counter."""
    return {
        f"typographic-{variant}-{seed}": (
            f"ddpo.py --preset emoji --model runs/pretrain/emoji-cards --seed {seed} "
            f"--reward emoji/classifiers.py:judge_{judge} --prompts {prompts} "
            "--watch emoji/classifiers.py:honest_count --guard 0.1 --patience 99 "
            "--images 128 --group-size 8 --epochs 4 --eval-every 1 --train-first 0.7 "
            "--lr 2e-4 --warmup 4 --clip-range 5e-4 --ema 0"
        )
        for seed, (variant, (judge, prompts)) in itertools.product(range(seeds), JUDGED.items())
    }
