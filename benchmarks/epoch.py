"""Where an epoch's time goes, and what makes it shorter: whole epochs of ddpo.py, in turns.

    python benchmarks/epoch.py              the emoji model: dtype and attention on a CPU
                                            (four minutes on two cores)
    python benchmarks/epoch.py --sd15       a model of Stable Diffusion 1.5's size with random
                                            weights, on a GPU (eight minutes)
    python benchmarks/epoch.py --variant bf16 --variant "bf16, torch.compile" --out two.json
    python benchmarks/epoch.py --table      prints the recorded tables again

Each variant is a process of its own that trains as `python ddpo.py` would. It does one epoch when
it is its turn, while the others sleep. The first epoch is not counted (it compiles, captures
graphs, fills caches). Each turn is compared with the first variant's turn of the same round, so
that a busy machine slows all of them alike: medians of these ratios, with min and max. On a GPU the
tables also have images a second and peak memory, as in metrics.jsonl. Results go to
benchmarks/epoch.json, a record for each model and device.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the scripts' folder, in place of this one

# scaled_dot_product_attention; matrix products and a softmax
ATTENTION = {"sdpa": "AttnProcessor2_0", "plain": "AttnProcessor"}

# name: settings of ddpo.Config, and "attention"; each row is compared with the first
CPU_VARIANTS = {
    "fp32, scaled_dot_product_attention": dict(dtype="fp32", attention="sdpa"),
    "bf16, scaled_dot_product_attention": dict(dtype="bf16", attention="sdpa"),
    "fp32, plain matrix products": dict(dtype="fp32", attention="plain"),
    # what loading.load_pipeline chooses on a CPU
    "bf16, plain matrix products": dict(dtype="bf16", attention="plain"),
}
GPU_VARIANTS = {
    "fp32": dict(dtype="fp32"),  # its matrix products in TF32, see training.py
    "fp16": dict(dtype="fp16"),
    "bf16": dict(dtype="bf16"),
    "bf16, plain matrix products": dict(dtype="bf16", attention="plain"),
    "bf16, CUDA graph": dict(dtype="bf16", cuda_graph=True),
    "bf16, torch.compile": dict(dtype="bf16", compile=True),
    "bf16, train batch 1": dict(dtype="bf16", train_batch=1),
    "bf16, gradient checkpointing": dict(dtype="bf16", gradient_checkpointing=True),
    "bf16, train batch 1, gradient checkpointing, offload": dict(
        dtype="bf16", train_batch=1, gradient_checkpointing=True, offload=True
    ),
}
EMOJI = dict(
    model="models/emoji", images=32, sample_batch=32, train_batch=32, steps=5, guidance_scale=4.0
)
SD15 = dict(images=8, sample_batch=4, train_batch=4, steps=10, guidance_scale=5.0, lora_rank=4)
PHASES = {"sampling": "seconds_sample", "update": "seconds_update", "epoch": "seconds"}
NEVER = 10**6
EQUAL = dict(  # epochs and nothing else, until told to end
    reward="compress", watch="", prompts="animals", advantages="batch", updates=1,
    train_first=1.0, timestep_fraction=1.0, tracker="none",
    epochs=NEVER, eval_every=NEVER, checkpoint_every=NEVER,
)


def count_rows(unet):
    """[rows that only go forward through a UNet, rows that go back, too] from now on. Whether both
    sides of a comparison do the same work is decided by this, not by their settings."""
    rows = [0, 0]

    def back(gradient):
        rows[0] -= len(gradient)
        rows[1] += len(gradient)

    def count(module, inputs, output):
        rows[0] += len(output[0])
        if output[0].requires_grad:  # in sampling, too, where it is compiled: compile_blocks
            output[0].register_hook(back)

    unet.register_forward_hook(count)
    return rows


def count_replays(step, rows):
    """A sample.GraphedStep that counts its rows itself: a replay calls no hooks, and a capture
    calls them for trials, too."""
    def counted(unet, latents, *inputs):
        before = rows[0]
        outputs = step(unet, latents, *inputs)
        negative_embeds = inputs[4]
        rows[0] = before + len(latents) * (1 if negative_embeds is None else 2)
        return outputs

    return counted


def worker(settings):
    """Train as ddpo.py does. Before it loads, and after each epoch's line of JSON, it waits for a line."""
    import torch
    from diffusers.models import attention_processor

    import ddpo

    attention = settings.pop("attention", None)

    def turn(row, epoch):  # ddpo.py calls a tracker between epochs, when no clock runs
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the next variant to use
        if epoch:
            work = {"rows_sample": rows[0], "rows_update": rows[1]}
            print(json.dumps(row | work | {"threads": torch.get_num_threads()}), flush=True)
        if epoch and not sys.stdin.readline():
            sys.exit()  # nobody waits for another epoch
        rows[:] = 0, 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    if not sys.stdin.readline():  # one after another: all at once would not fit into a GPU's memory
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        config = ddpo.Config(**EQUAL | settings, eval_images=settings["sample_batch"], out=folder)
        run = ddpo.prepare(config)
        run.track, rows = turn, count_rows(run.pipeline.unet)
        run.step = run.step and count_replays(run.step, rows)
        if attention:
            processor = getattr(attention_processor, ATTENTION[attention])
            run.pipeline.unet.set_attn_processor(processor())
        ddpo.fit(run)


def launch(settings, python=sys.executable, script=__file__):
    """A worker process, which waits until it is told to load its model."""
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [python, script, "--worker", json.dumps(settings)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
    )
    process.errors = errors
    return process


def epoch(process):
    """One epoch of a worker: its row. Raises RuntimeError, with its last line, if it cannot."""
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has died; why stands in its errors
    for line in process.stdout:
        if line.startswith("{"):  # other lines are for people
            return json.loads(line)
    process.errors.seek(0)
    said = process.errors.read().strip().splitlines()
    raise RuntimeError(said[-1] if said else "it ended without a message")


def take_turns(workers, rounds):
    """({name: row of the first epoch, which does not count}, {name: [row of each round]}). A worker
    that dies (usually for lack of memory) is reported, and the others go on."""
    first, rows = {}, {}
    for round_ in range(rounds + 1):
        for name, process in list(workers.items()):
            try:
                row = epoch(process)
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                workers.pop(name), first.pop(name, None), rows.pop(name, None)
                continue
            if round_ == 0:
                first[name], rows[name] = row, []
            else:
                measured = [key for key in row if "second" in key or key == "peak_memory_gb"]
                rows[name].append({key: row[key] for key in measured})
            progress = f"round {round_} of {rounds}, {name}: {row['seconds']:.2f} s"
            print(progress, file=sys.stderr, flush=True)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    return first, rows


def model_folder(model):
    """A folder as the workers find it, which run in the repository's; a hub id as it is."""
    return os.path.relpath(model, ROOT) if Path(model).exists() else model


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(reference, rows, key):
    """How many times faster, round by round, than the reference in the same round."""
    return spread([other[key] / row[key] for other, row in zip(reference, rows)])


def machine():
    """The device's name, and what else a timing depends on."""
    import torch

    device = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    cpus = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)", cpus, re.M)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif name:
        device = name[1].strip()
    return {"device": device, "torch": torch.__version__}


def command_line(script, arguments=None):
    """The command as one would type it. arguments: those of main, None for those of the process."""
    return shlex.join(["python", script, *(sys.argv[1:] if arguments is None else arguments)])


def versions(*packages):
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def check_out(parser, path, partial=False):
    """Ends the program if the record could not be written, before anything is measured. partial: it is
    one of fewer variants, which the default file is not for."""
    try:
        records = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    except (OSError, ValueError):
        records = None
    if not isinstance(records, dict) or not Path(path).parent.is_dir():
        parser.exit(2, f"--out {path}: must be a file of records, or a new one in a folder that exists\n")
    if partial and str(path) == str(parser.get_default("out")):
        parser.exit(2, f"--out {path}: is for records of all variants; give another --out\n")


def record_as(path, name, record):
    """Put the record under its name into a file that holds others, too."""
    records = json.loads(Path(path).read_text()) if Path(path).exists() else {}
    Path(path).write_text(json.dumps(records | {name: record}, indent=1) + "\n")


def print_tables(path, table):
    """--table: what table(record) makes of each record in the file."""
    for name, record in json.loads(Path(path).read_text()).items():
        print(f"{name}\n\n{table(record)}\n")


def summarise(rows, images):
    """{variant: what the table shows}."""
    reference = rows[next(iter(rows))]
    summary = {}
    for name, epochs in rows.items():
        summary[name] = {phase: ratios(reference, epochs, key) for phase, key in PHASES.items()}
        if "peak_memory_gb" in epochs[0]:
            summary[name]["images_per_second"] = {
                phase: images / statistics.median(row[key] for row in epochs)
                for phase, key in PHASES.items()
            }
            summary[name]["peak_memory_gb"] = max(row["peak_memory_gb"] for row in epochs)
    return summary


def markdown(rows):
    """A Markdown table of rows of text, the first of which is its heading."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("|  |", "| |")


def table(record):
    """The Markdown table of a record: ratios everywhere; on a GPU, where they mean something to
    others, absolute figures too."""
    rows = record["summary"]
    absolute = "peak_memory_gb" in next(iter(rows.values()))
    columns = ["variant", *PHASES]
    if absolute:
        columns = ["variant", *(f"{phase}, images/s" for phase in PHASES), "peak GB"]
    lines = [columns]
    for name, row in rows.items():
        cells = [times_faster(row[phase]) for phase in PHASES]
        if absolute:
            speeds = [f"{row['images_per_second'][phase]:.2f}" for phase in PHASES]
            cells = [f"{speed}, {cell}" for speed, cell in zip(speeds, cells)]
            cells.append(f"{row['peak_memory_gb']:.1f}")
        lines.append([name, *cells])
    return markdown(lines)


def times_faster(ratio):
    """A `spread` as a table shows it."""
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"


def setting(text):
    """key=value, the value a number where it looks like one."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value.lower())
    except json.JSONDecodeError:
        return key, value


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model",
                        help="a folder in diffusers' layout, or a hub id (default: models/emoji)")
    parser.add_argument("--sd15", action="store_true",
                        help="a model of SD 1.5's size with random weights, in runs/sd15-random")
    parser.add_argument("--rounds", type=int,
                        help="turns of each variant that count (default: 8 on a CPU, 3 on a GPU)")
    parser.add_argument("--variant", action="append", help="only this one; may be repeated")
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="KEY=VALUE",
                        help="a setting of ddpo.Config for all")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/epoch.json"),
                        help="where the record is put (default: benchmarks/epoch.json)")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    args = parser.parse_args(arguments)
    check_out(parser, args.out, partial=not args.table and bool(args.variant or args.set))
    if args.table:
        print_tables(args.out, table)
        return
    if args.sd15 and args.model:
        parser.exit(2, f"--model {args.model}: not with --sd15, which is a model of its own\n")

    import torch

    gpu = torch.cuda.is_available()
    variants = GPU_VARIANTS if gpu else CPU_VARIANTS
    for name in args.variant or []:
        if name not in variants:
            parser.exit(2, f"--variant {name}: unknown; choose {'; '.join(variants)}\n")
    settings = EMOJI
    if args.sd15 or args.model:
        from benchmarks.sd15 import build

        settings = SD15 | {"model": model_folder(args.model or build(ROOT / "runs/sd15-random"))}
    settings = settings | dict(args.set)
    chosen = args.variant or variants
    workers = {
        name: launch(settings | variant) for name, variant in variants.items() if name in chosen
    }
    first, rows = take_turns(workers, args.rounds or (3 if gpu else 8))
    if not rows:
        sys.exit("no variant could run")
    record = machine() | {
        "command": command_line("benchmarks/epoch.py", arguments),
        "threads": next(iter(first.values()))["threads"],
        "versions": versions("diffusers", "transformers", "peft"),
        "settings": settings,
        "unet_rows_forward_in_sampling_and_update": {
            name: [row["rows_sample"], row["rows_update"]] for name, row in first.items()
        },
        "summary": summarise(rows, settings["images"]),
        "rounds": rows,
    }
    name = "SD 1.5's size, random weights" if args.sd15 else settings["model"]
    record_as(args.out, f"{name}, {record['device']}", record)
    print(table(record))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
    else:
        main()
