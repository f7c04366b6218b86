"""The settings that all training loops share: their defaults, presets, checks, and the command line.

Each loop (`ddpo.py`, `rwr.py`, ...) has a `Config` that inherits `Settings` and adds its own. The comment
after a field is also its text in `--help`, and a comment line above several is their heading there.
"""

import argparse
import importlib.util
import inspect
import math
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import kernels
from kernels.ddim_step import fused_ddim_step
from loading import default_device, is_emoji, usable_device
from models import DTYPES, default_dtype, first_line
from processes import place
from rewards import parse_reward
from run_folder import read_config
from sample import ETAS, MAX_ETAS, WINDOW, WINDOW_SHIFT


@dataclass
class Settings:
    """Defaults suit the emoji model on two CPU cores. PRESETS holds what differs elsewhere."""

    # the run
    reward: str = "compress"  # a name, a file.py:function, or a mixture such as "compress:0.3,clip:1"
    watch: str = "clip"  # watched metrics: rewards that are logged and not trained on ("" for none)
    prompts: str = "animals"  # a set of prompts.py, or a file: .txt with a prompt a line, or .jsonl
    model: str = "models/emoji"  # a folder in diffusers' layout, or a hub id
    preset: str = ""  # settings that go together, see PRESETS; other flags override them (default:
        # emoji for the shipped models, whose defaults are shown here, sd15 for all others)
    name: str = ""  # of the run's folder (default: the reward)
    out: str = "runs"  # the folder in which the run's folder is made
    seed: int = 0  # everything random follows from it
    epochs: int = 6  # at most, see --guard and --patience

    # sampling
    images: int = 96  # pictures an epoch, over all processes
    sample_batch: int = 32  # pictures denoised at once, on each process
    resolution: int = 0  # pixels of a picture's side (0: what the model was trained on)
    steps: int = 10  # T, denoising steps of a picture
    guidance_scale: float = 4.0  # of classifier-free guidance; 1 for none
    sampler: str = ""  # ddim, cps, flow, dance: how a step adds its noise, see sample.ddim_table (default:
        # flow for models of flow matching, ddim for others)
    eta: float = -1.0  # how much noise, in the sampler's own meaning; 0 is deterministic, which
        # ddpo.py cannot train (default: ddim 1, cps 0.7, flow 0.7, dance 0.3)
    window: str = ""  # "5:15": only these steps have noise, and so can be trained ("" for all)
    window_shift: str = ""  # "2/5": the window moves on by 2 steps every 5 epochs, from the last place back
        # to the first ("" for a fixed one)
    group_size: int = 4  # pictures of each prompt in an epoch

    # updates
    updates: int = 0  # of each inner epoch (0: the algorithm's own default)
    inner_epochs: int = 1  # passes over an epoch's pictures
    train_batch: int = 32  # rows through the network at once: memory, not mathematics
    train_guidance: bool = True  # train the guided prediction, which is the one that samples
    lora_rank: int = 0  # 0: train the whole network; on one as small as the emoji model that is
        # faster, and the pictures suffer less
    lora_targets: str = ""  # layers that get an adapter, with --lora-rank, such as "to_q,proj_in" (default:
        # those of the attention, see models.lora_targets)
    lr: float = 0.0  # 0: 3e-3 for LoRA and 1.3e-4 for the whole network on the shipped models, or with
        # --preset emoji; on others 3e-4 and 1e-5
    warmup: int = 10  # updates over which the learning rate rises, because Adam's first steps have
        # full length, however noisy the gradient is
    weight_decay: float = 1e-4  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient
    optimizer: str = "adamw"  # adamw, or adamw8bit (needs bitsandbytes and a GPU)

    # against over-optimisation
    ema: float = 0.9  # evaluate and save weights averaged over about 1 / (1 - ema) updates (0: the newest)
    guard: float = 0.4  # how far a watched metric may fall, in standard deviations of the base
        # model's pictures (0: no guard)
    patience: int = 2  # evaluations in a row that fail the guard, or are no better on --eval-prompts,
        # before the run ends

    # evaluation and saving
    eval_every: int = 2  # epochs between evaluations (always before the first and after the last)
    eval_images: int = 64  # pictures of an evaluation, two of each prompt
    eval_prompts: str = ""  # more prompt sets to evaluate, such as "animals_held_out,objects"; the
        # weights that are best for them are saved
    eval_deterministic: bool = False  # evaluate the training prompts without the sampler's noise, too
    checkpoint_every: int = 1  # epochs between checkpoints
    tracker: str = "none"  # none, tensorboard, wandb

    # the machine
    device: str = ""  # cpu, cuda, mps (default: cuda where there is one, else cpu)
    dtype: str = ""  # of the network's arithmetic: bf16, fp16, fp32 (default: fp16 on a GPU,
        # bf16 on a CPU that has it, else fp32); log-probs are always float32
    kernels: str = "auto"  # triton, torch, or auto: triton on a GPU
    compile: bool = False  # the network, with torch.compile, which takes minutes at first
    cuda_graph: bool = False  # launch a sampling step as one CUDA graph
    gradient_checkpointing: bool = False  # a third more arithmetic, much less memory
    offload: bool = False  # keep the text encoder, trajectories and, during updates, the VAE in the
        # computer's memory


# The paper's settings (table 3 and app. D), with LoRA as in ddpo-pytorch. The shipped CLIP knows icons
# only, so it cannot watch photographs. Batches are the same in sampling and in training: a GPU may
# choose another kernel for another size, which rounds differently.
PAPER = dict(
    model="stable-diffusion-v1-5/stable-diffusion-v1-5", epochs=100, images=256, sample_batch=4,
    steps=50, guidance_scale=5.0, advantages="prompt", group_size=1, train_first=1.0, warmup=0, ema=0.0,
    train_batch=4, lora_rank=4, eval_every=10, eval_images=16, checkpoint_every=5, watch="",
)
# A sixteenth of the paper's work an epoch: groups, 20 steps, half of them trained.
SMALLER = PAPER | dict(steps=20, images=64, advantages="group", group_size=4, timestep_fraction=0.5)
# The same for larger models; the flow-matching ones with 10 steps and 512 pixels.
SDXL = SMALLER | dict(model="stabilityai/stable-diffusion-xl-base-1.0", sample_batch=2, train_batch=2,
                      gradient_checkpointing=True, offload=True)
SD35 = SMALLER | dict(model="stabilityai/stable-diffusion-3.5-medium", steps=10, resolution=512,
                      guidance_scale=4.5, lora_rank=32, sample_batch=2, train_batch=2,
                      gradient_checkpointing=True, offload=True)
FLUX = SD35 | dict(model="black-forest-labs/FLUX.1-dev", guidance_scale=3.5, sample_batch=4, train_batch=4,
                   dtype="bf16", offload=False)  # the range of fp16 is too small for it
# How much GPU memory a process of each needs: `python memory.py`
PRESETS = {
    "emoji": {},
    "sd15": PAPER,  # for as long as it takes
    "sd15-24gb": SMALLER,
    "sd15-10gb": SMALLER | dict(sample_batch=1, train_batch=1, gradient_checkpointing=True, offload=True),
    "sd15-8gpu": PAPER,  # torchrun: 32 pictures on each of 8
    "sdxl-24gb": SDXL,
    "sdxl-24gb-8gpu": SDXL | dict(images=256),
    "sd35-medium-24gb": SD35,
    "sd35-medium-24gb-8gpu": SD35 | dict(images=256),
    "flux-dev-80gb": FLUX,
    "flux-dev-80gb-8gpu": FLUX | dict(images=256),
}
PAPER_PROMPTS = {"compress": "imagenet_animals", "incompress": "imagenet_animals",
                 "align": "animal_activities"}  # for other rewards: animals


def refuse(config, setting, advice):
    raise ValueError(f"--{setting.replace('_', '-')} {getattr(config, setting)}: {advice}")


def watched(config):
    """The watched metrics: the rewards of --watch that are not trained on."""
    names = dict.fromkeys(name.strip() for name in config.watch.split(","))
    return [name for name in names if name and name not in parse_reward(config.reward)]


def check_sizes(config):
    """Raises ValueError, one line, for a number that is not finite, or too large to work with."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not abs(value) <= 1e12:
            refuse(config, field.name, "must be a finite number, at most 1e12")
        if isinstance(value, int) and field.name != "seed" and abs(value) > 10**6:
            refuse(config, field.name, "must be at most 1000000")


def check_values(config):
    """Raises ValueError, one line, for a value that can work on no machine."""
    check_sizes(config)
    for name, weight in parse_reward(config.reward).items():
        if abs(weight) > 1e6:
            refuse(config, "reward", f"the weight of {name} must be at most 1e6")
    at_least(config, 1, "epochs", "images", "sample_batch", "steps", "group_size", "inner_epochs",
             "train_batch", "patience", "eval_every", "eval_images", "checkpoint_every")
    at_least(config, 0, "updates", "lora_rank", "lr", "weight_decay", "warmup", "seed", "guard", "resolution")
    if config.guidance_scale < 1 and config.guidance_scale != 0:
        refuse(config, "guidance_scale", "must be at least 1, or 0; both mean none")
    if config.resolution > 8192:
        refuse(config, "resolution", "must be at most 8192")
    above_zero(config, "grad_clip")
    if config.seed >= 2**63:
        refuse(config, "seed", "must be below 2**63")
    check_choices(config, dtype=("", *DTYPES), kernels=("auto", "triton", "torch"),
                  optimizer=("adamw", "adamw8bit"), tracker=("none", "tensorboard", "wandb"),
                  sampler=("", *ETAS))
    if config.lora_targets and not config.lora_rank:
        refuse(config, "lora_targets", "needs --lora-rank, such as 4; else the whole network is trained")
    if not 0 <= config.ema < 1:
        refuse(config, "ema", "must be 0 (none) or below 1")
    window = re.fullmatch(WINDOW, config.window or f"0:{config.steps}")
    if not window or not int(window[1]) < int(window[2]) <= config.steps:
        refuse(config, "window", "give the first step and the one after the last, such as "
               f"0:{config.steps // 2}, of --steps {config.steps}")
    check_window_shift(config)


def check(config):
    """Fills in the settings that follow from others. Raises ValueError, one line, for what cannot work."""
    check_values(config)
    if config.sampler:
        set_sampler(config)
    check_machine(config)

    config.updates = config.updates or 1
    lora_lr, whole_lr = (3e-3, 1.3e-4) if emoji_sized(config) else (3e-4, 1e-5)
    config.lr = config.lr or (lora_lr if config.lora_rank else whole_lr)
    config.name = config.name or re.sub(r"[^\w.-]+", "_", config.reward).lstrip("._")
    check_folder(config)
    _, world = place()
    if config.eval_images < world:
        refuse(config, "eval_images", f"must be at least {world}, one for each process")
    unit = math.lcm(config.group_size, config.sample_batch, config.updates) * world
    for setting in ("group_size", "sample_batch", "updates"):
        if config.images % (getattr(config, setting) * world):
            processes = f" on each of {world} processes" if world > 1 else ""
            refuse(config, "images", f"must be a multiple of --{setting.replace('_', '-')} "
                   f"{getattr(config, setting)}{processes}; {max(config.images // unit, 1) * unit} would do")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        refuse(config, "tracker", f"is not installed; pip install {config.tracker}, or choose none")
    for name in watched(config):
        if parse_reward(name) != {name: 1.0}:
            refuse(config, "watch", f"a watched metric has no weight; write {name.rpartition(':')[0]}")
    for setting, names in (("reward", parse_reward(config.reward)), ("watch", watched(config))):
        if any(name.endswith("_std") for name in names):
            refuse(config, setting, "a name that ends in _std means the spread of a metric in the log; "
                   "rename the function")
    return config


def emoji_sized(config):
    """Whether the network is like the shipped ones, 110 times smaller than Stable Diffusion, and needs larger
    steps. Of a model of one's own, such as runs/pretrain/emoji-cards, --preset emoji says so."""
    return config.preset == "emoji" or is_emoji(config.model)


def check_folder(config):
    out, folder = os.path.abspath(config.out), os.path.abspath(os.path.join(config.out, config.name))
    if folder == out or os.path.commonpath([out, folder]) != out:
        refuse(config, "name", f"would be outside of --out {config.out}; give a name, such as first")


def set_sampler(config, flow=False):
    """Fills in the sampler, for a flow-matching model or another, and its noise. Without --sampler, this
    waits until the model is loaded: only its scheduler says of which kind it is."""
    config.sampler = config.sampler or ("flow" if flow else "ddim")
    if config.eta == -1:
        config.eta = ETAS[config.sampler]
    if config.eta and not 1e-3 <= config.eta <= MAX_ETAS[config.sampler]:
        refuse(config, "eta", f"must be 0, or at least 0.001 and at most {MAX_ETAS[config.sampler]:g} with "
               f"--sampler {config.sampler}")


def at_least(config, bound, *settings):
    for setting in settings:
        if not getattr(config, setting) >= bound:
            refuse(config, setting, f"must be at least {bound}" if bound else "must not be negative")


def above_zero(config, *settings, at_most=math.inf):
    for setting in settings:
        if not 0 < getattr(config, setting) <= at_most:
            bound = "" if at_most == math.inf else f" and at most {at_most}"
            refuse(config, setting, f"must be above 0{bound}")


def check_window_shift(config):
    """Raises ValueError, one line, if the window cannot move as --window-shift says."""
    if not config.window_shift:
        return
    shift = re.fullmatch(WINDOW_SHIFT, config.window_shift)
    if not shift:
        refuse(config, "window_shift", "give steps/epochs, such as 2/5: on by 2 steps every 5 epochs")
    if not config.window:
        refuse(config, "window_shift", "needs a window to move, such as --window "
               f"0:{max(config.steps // 4, 1)}")
    end = int(config.window.split(":")[1])
    if end + int(shift[1]) > config.steps:
        refuse(config, "window_shift", f"--window {config.window} cannot move so far within --steps "
               f"{config.steps}; choose a window that starts earlier, a shorter one, or a smaller move")


def check_choices(config, **choices):
    """check_choices(config, dtype=("bf16", "fp32")): each setting has one of its values."""
    for setting, values in choices.items():
        if getattr(config, setting) not in values:
            refuse(config, setting, f"unknown; choose {', '.join(filter(None, values))}")


def check_machine(config):
    """Raises ValueError, one line, if this machine cannot do what the settings ask for. Fills in the device
    of this process and its dtype, and chooses the kernels."""
    config.device = config.device or str(default_device())
    _, world = place()
    if config.device == "cuda" or config.device.startswith("cuda:") and world > 1:
        config.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # a GPU for each of torchrun's processes
    usable_device(config.device)
    if config.device.startswith("mps") and world > 1:
        refuse(config, "device", "gloo knows no mps; run one process, or choose cpu")
    on_gpu = config.device.startswith("cuda")
    if config.dtype == "fp16" and not on_gpu:
        refuse(config, "dtype", "needs a CUDA device; choose bf16 or fp32")
    if config.cuda_graph and not on_gpu:
        refuse(config, "cuda_graph", "needs a CUDA device; leave it out")
    if config.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        refuse(config, "optimizer", "needs bitsandbytes; pip install bitsandbytes, or choose adamw")
    if config.optimizer == "adamw8bit" and config.cuda_graph and not config.lora_rank:
        refuse(config, "optimizer", "puts weights in new places, which --cuda-graph would not see; leave "
               "out one of them, or give a --lora-rank")
    kernels.BACKEND = config.kernels
    try_kernels(config)
    config.dtype = config.dtype or default_dtype(config.device)


def try_kernels(config):
    """One step on one number: Triton compiles a launcher when it first runs, which needs a C compiler."""
    try:
        if not kernels.use_triton(torch.empty(0, device=config.device)):
            return
    except ValueError:
        refuse(config, "kernels", "needs triton installed, and a GPU; choose auto or torch")
    number = torch.zeros(1, 1, 1, 1, device=config.device)
    try:
        fused_ddim_step(number, number, torch.ones(4, device=config.device), noise=number)
    except Exception as error:
        refuse(config, "kernels", f"Triton cannot run here ({first_line(error)}); "
               "install gcc and Python's headers, or choose torch")


def field_comments(config_class):
    """[(heading, [(field name, comment)])] of a dataclass and those it inherits from, as in their source.

    A comment line that is indented deeper than the fields continues the comment above it.
    """
    groups = [("", [])]
    for base in reversed(config_class.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if heading := re.fullmatch(r"    # (.*)", line):
                groups.append((heading[1], []))
            elif setting := re.fullmatch(r"    (\w+): \w+ = .*?  # (.*)", line):
                for _, comments in groups:  # a loop may give a shared setting another default
                    comments[:] = [entry for entry in comments if entry[0] != setting[1]]
                groups[-1][1].append([setting[1], setting[2]])
            elif (more := re.fullmatch(r"        +# (.*)", line)) and groups[-1][1]:
                groups[-1][1][-1][1] += " " + more[1]
    return [group for group in groups if group[1]]


def add_flags(parser, config_class):
    """A flag for each field of a dataclass: its comment is the help text, under the source's headings."""
    defaults = {field.name: field.default for field in fields(config_class)}
    for heading, comments in field_comments(config_class):
        group = parser.add_argument_group(heading or None)
        for name, comment in comments:
            default = defaults[name]
            kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool)
                    else dict(type=type(default), metavar=type(default).__name__.upper()))
            shown = "" if default == "" or "default:" in comment else f" (default {default})"
            group.add_argument("--" + name.replace("_", "-"), default=None,
                               help=comment.replace("%", "%%") + shown, **kind)


def flags_given(arguments, config_class, doc, beside_resume=""):
    """{setting: value} of the flags on a command line. doc: the text above them in --help.

    beside_resume: the flags that go with --resume; "" leaves --resume out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if beside_resume:
        parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; only "
                            f"{beside_resume} may be given beside it")
    add_flags(parser, config_class)
    parser.error = lambda message: parser.exit(2, f"{message}\n")  # one line, without a page of usage
    return {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}


def parse_config(arguments, config_class, presets, doc):
    """(a config_class, resume) from the command line: the preset's values, then the flags that were given.

    doc: the loop's docstring, shown above the flags. Raises ValueError, one line.
    """
    given = flags_given(arguments, config_class, doc, "--epochs, --patience and --device")
    if "resume" in given:
        return resumed_config(Path(given.pop("resume")).resolve(), given, config_class), True
    preset = given.get("preset", "emoji" if is_emoji(given.get("model", config_class.model)) else "sd15")
    if preset not in presets:
        raise ValueError(f"--preset {preset}: unknown; choose {', '.join(presets)}")
    names = {field.name for field in fields(config_class)}
    settings = {key: value for key, value in presets[preset].items() if key in names}
    settings |= given | {"preset": preset}
    if preset != "emoji":
        reward = settings.get("reward", config_class.reward).partition("=")[0]
        settings.setdefault("prompts", PAPER_PROMPTS.get(reward, "animals"))
    return config_class(**settings), False


def resumed_config(run, given, config_class):
    """The settings of the run in this folder, with the few flags that may be given beside --resume."""
    settings, defaults = read_config(run), {field.name: field.default for field in fields(config_class)}
    beside = [name for name in ("epochs", "patience", "device") if name in defaults]
    if set(given) - set(beside):
        raise ValueError(f"--resume {run}: its settings are those of its config.json; beside it may only "
                         f"be given --{', --'.join(beside)}")
    if settings.keys() != defaults.keys():
        differ = ", ".join(sorted(settings.keys() ^ defaults.keys())[:4])
        raise ValueError(f"--resume {run}: its config.json is not that of a run of "
                         f"{Path(inspect.getfile(config_class)).name} of this version (only one of them has "
                         f"{differ}); go on with the script that made it")
    for name, value in settings.items():
        kind = type(defaults[name])
        if kind is float and type(value) is int and abs(value) < 2**53:
            settings[name] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"{run / 'config.json'}: {name} is {value!r:.80}; it must be of type "
                             f"{kind.__name__}")
    config = config_class(**settings | given)
    config.out, config.name = os.path.relpath(run.parent), run.name
    return config
