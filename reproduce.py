"""The paper's experiments, at the scale of the machine at hand. Results go to results/<model>/.

    python reproduce.py rewards            before and after, for each reward
    python reproduce.py algorithms         DDPO, RWR, NFT, AWM and controls: reward against images
    python reproduce.py generalisation     trained animals, unseen animals, objects
    python reproduce.py overoptimisation   far past the optimum, and what each prevention changes
    python reproduce.py fewer_steps        cheaper ways to sample and train: reward against time
    python reproduce.py samplers           where a step's noise comes from: four samplers, windows
    python reproduce.py typographic        a judge that reads digits, and one that does not
    python reproduce.py control            plans and closed-loop control instead of pictures
    python reproduce.py --draw             all tables and pictures again, from the logs

experiments.py has the commands that are run, reproduce_figures.py the drawing. Experiments share
runs. An interrupted run goes on where it stopped, a finished one is not run again. --jobs 2 runs
two at a time on half of the cores each, which gets more done than one on all of them;
`fewer_steps` and `samplers` compare times, so nothing but their own runs should be beside them.

results/<model>/ holds logs/<run>/ (config.json, metrics.jsonl) and, for each experiment, a table
(.md), its numbers (.json) and pictures. A table shows every seed that has logs. The tables of the
shipped models are also put into results/README.md, where it has markers for them, and a summary of
the first into README.md.

`--model models/emoji-flow` has all but `typographic` and `control`, whose models are their own. With
a model that is not shipped there are `rewards` and `algorithms`, without `clip`: the shipped CLIP,
which the other experiments use as a judge or as a watched metric, knows icons only.
"""

import argparse
import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from tqdm import tqdm

import experiments
import reproduce_control
import reproduce_figures
from evaluate import guard
from loading import SHIPPED, is_emoji
from reproduce_figures import headline, settings_of
from run_folder import read_config, read_metrics, write_whole

HERE = Path(__file__).parent
EXPERIMENTS = {  # name: (its commands, its table and figures)
    "rewards": (experiments.rewards, reproduce_figures.draw_rewards),
    "algorithms": (experiments.algorithms, reproduce_figures.draw_algorithms),
    "generalisation": (experiments.generalisation, reproduce_figures.draw_generalisation),
    "overoptimisation": (experiments.overoptimisation, reproduce_figures.draw_overoptimisation),
    "fewer_steps": (experiments.fewer_steps, reproduce_figures.draw_fewer_steps),
    "samplers": (experiments.samplers, reproduce_figures.draw_samplers),
    "typographic": (experiments.typographic, reproduce_figures.draw_typographic),
    "control": (reproduce_control.commands, reproduce_control.draw),
}
FOR_OTHER_MODELS = ["rewards", "algorithms"]
# Their models are their own, whatever --model. That of typographic is made when it is missing.
OWN_MODELS = ["typographic", "control"]
MADE = {"typographic": ("runs/pretrain/emoji-cards", "emoji/pretrain.py --only cards")}


def plan(experiment, seeds):
    """{run: command} of an experiment, in the order in which they are worth having."""
    commands, _ = EXPERIMENTS[experiment]
    return {run: " ".join(command.split()) for run, command in commands(seeds).items()}


def finished(folder, script="ddpo.py"):
    """Whether a run is over: at its last epoch, or stopped by the guard. Either way its last row
    has an evaluation and its last epoch a checkpoint."""
    if not (folder / "config.json").exists():
        return False
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        return False
    config = settings_of(folder, import_module(Path(script).stem).Config)
    stopped = hasattr(config, "guard") and guard(rows, config)[1]  # control.py has no guard
    if rows[-1]["epoch"] < config.epochs and not stopped:
        return False
    return (folder / "checkpoint" / f"epoch_{rows[-1]['epoch']:06d}.pt").exists()


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent():
    """Runs in a child, before its program: Linux will send it SIGTERM when this process dies,
    even of a SIGKILL. Else it would go on, and a second start would train in the same folder."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def make_model(folder, command):
    """Run the command that makes the model in the folder, if it is not there."""
    if (Path(folder) / "model_index.json").exists():
        return
    print(f"python {command}", flush=True)
    made = subprocess.run([sys.executable, *command.split()],
                          preexec_fn=end_with_parent if LIBC else None)
    if made.returncode:
        raise SystemExit(f"python {command} ended with exit code {made.returncode}; it makes {folder}")


def start_run(name, command, out, threads, quiet):
    """(process, its output if it is quiet), of a new run or of one that goes on."""
    script, *flags = shlex.split(command)
    if (out / name / "config.json").exists():
        flags = ["--resume", str(out / name)]
    else:
        flags += ["--name", name, "--out", str(out)]
    tqdm.write(" ".join(["python", script, *flags]))
    output = tempfile.TemporaryFile("w+") if quiet else None
    process = subprocess.Popen(
        [sys.executable, script, *flags], stdout=output, stderr=output,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        preexec_fn=end_with_parent if LIBC else None,
    )
    return process, output


# A run fills these in, so they are compared only where a command gives them
FILLED_IN = {"out", "name", "device", "dtype", "updates", "lr", "sampler", "eta", "beta"}


def check_same(folder, command):
    """Ends the program if the folder has a run of other settings than the command's, whose numbers would
    be shown as the command's."""
    if not (folder / "config.json").exists():
        return
    script, *flags = shlex.split(command)
    found, given = read_config(folder), {flag[2:].partition("=")[0].replace("-", "_") for flag in flags}
    for name, value in vars(import_module(Path(script).stem).parse_config(flags)[0]).items():
        if found.get(name) != value and (name in given or name not in FILLED_IN):
            raise SystemExit(f"{folder}: its {name} is {found.get(name)!r}, and this command asks for "
                             f"{value!r}; move the folder away, or give the flags that made it")


def run_all(runs, out, logs, jobs, minutes):
    """Bring every run to its end, `jobs` at a time, and copy their logs. After the minutes no
    further run is started. Returns the names of the runs that are left."""

    def is_finished(name):
        return finished(out / name, runs[name].split()[0])

    for name, command in runs.items():
        check_same(out / name, command)
    waiting = [name for name in runs if not is_finished(name)]
    deadline = time.time() + 60 * minutes if minutes else float("inf")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running = {}
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="runs", unit="run")
    try:
        while running or (waiting and time.time() < deadline):
            while waiting and len(running) < jobs and time.time() < deadline:
                name = waiting.pop(0)  # quiet beside others: several would write over each other
                running[name] = start_run(name, runs[name], out, threads, quiet=jobs > 1)
            for name, (process, output) in list(running.items()):
                if process.poll() is None:
                    continue
                if process.returncode:
                    said = ""
                    if output:
                        output.seek(0)
                        said = output.read()[-500:]
                    code = f"{name} ended with exit code {process.returncode}"
                    raise SystemExit(f"{code}: python {runs[name]} {said}")
                del running[name]
                bar.update()
            time.sleep(0.5)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()  # or the same command, given again at once, would find it in its folder
        bar.close()
        for name in runs:
            if is_finished(name):
                (logs / name).mkdir(parents=True, exist_ok=True)
                for file in ("config.json", "metrics.jsonl"):
                    shutil.copy(out / name / file, logs / name / file)
    return waiting


def read_logs(experiment, logs):
    """{run: rows of its metrics.jsonl} of every run that has logs, of all seeds."""
    endings = [path.name.rpartition("-")[2] for path in logs.iterdir()]
    seeds = [int(ending) for ending in endings if ending.isdecimal()]
    runs = plan(experiment, max(seeds, default=-1) + 1)
    files = {run: logs / run / "metrics.jsonl" for run in runs}
    return {run: read_metrics(file) for run, file in files.items() if file.exists()}


def insert_table(page, name, lines):
    """Put the table between the page's markers, so that nobody copies it by hand."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if start not in text or end not in text:
        print(f"{page}: no markers {start.strip()} and {end}; the table is not shown there")
        return
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    write_whole(page, before + start + "\n".join(lines) + "\n" + end + after)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT",
                        help=f"{', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--model", default="models/emoji", help="a folder or a hub id")
    parser.add_argument("--flags", default="",
                        help='for every run, such as "--preset sd15-24gb --epochs 50"')
    parser.add_argument("--seeds", type=int, default=3,
                        help="how many to run; tables show all that have logs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=0, help="start no run after so many")
    parser.add_argument("--draw", action="store_true",
                        help="run nothing: tables and pictures from the logs")
    parser.error = lambda message: parser.exit(2, f"{message}\n")
    args = parser.parse_args(arguments)

    path = Path(args.model).resolve()
    if path.exists() and path != (HERE / args.model).resolve():
        args.model = str(path)  # the commands run in HERE
    if not is_emoji(args.model) and Path(args.model).name in (*SHIPPED, "control"):
        parser.error(f"--model {args.model}: results/{Path(args.model).name} is that of another model; "
                     "give the folder another name")
    choices = list(EXPERIMENTS) if is_emoji(args.model) else FOR_OTHER_MODELS
    if Path(args.model).name != "emoji":
        choices = [name for name in choices if name not in OWN_MODELS]
    for name in args.experiments:
        if name not in choices:
            why = "not for another --model" if name in EXPERIMENTS else "unknown"
            parser.error(f"experiment {name}: {why}; choose {', '.join(choices)}")
    try:
        given = {word.partition("=")[0] for word in shlex.split(args.flags)}
    except ValueError as error:
        parser.error(f"--flags {args.flags}: {error}")
    if own := sorted(given & {"--seed", "--name", "--out", "--resume"}):
        parser.error(f"--flags {args.flags}: {', '.join(own)} is given by each run itself")
    if args.seeds < 1 or args.jobs < 1 or not args.minutes >= 0:
        given = f"--seeds {args.seeds} --jobs {args.jobs} --minutes {args.minutes:g}"
        parser.error(f"{given}: must be at least 1, 1 and 0")
    args.experiments = args.experiments or choices
    return args


def main(arguments=None):
    args = parse(arguments)
    os.chdir(HERE)  # so that logs hold paths relative to the repository
    # a signal as an exception, so that the runs are ended too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))
    model = Path(args.model).name
    shipped = is_emoji(args.model)
    default = shipped and model == "emoji"
    flags = args.flags if default else f"--model {shlex.quote(args.model)} {args.flags}"
    for name in args.experiments:
        room = "control" if name == "control" else model  # its models are its own
        results, out = Path("results") / room, Path("runs/reproduce") / room
        (results / "logs").mkdir(parents=True, exist_ok=True)
        if not args.draw:
            if name in MADE:
                make_model(*MADE[name])
            runs = {
                run: f"{command} {flags}".strip()
                for run, command in plan(name, args.seeds).items()
                if shipped or not run.startswith("clip-")
            }
            left = run_all(runs, out, results / "logs", args.jobs, args.minutes)
            if left:
                print(f"{name}: {len(left)} of {len(runs)} runs are left; the same command goes on")
        logs = read_logs(name, results / "logs")
        if not logs:
            continue
        _, draw = EXPERIMENTS[name]
        lines, numbers = draw(logs, results, out)
        if not lines:
            continue
        write_whole(results / f"{name}.md", "\n".join(lines) + "\n")
        write_whole(results / f"{name}.json", json.dumps(numbers, indent=1) + "\n")
        print(f"{results / name}.md\n\n" + "\n".join(lines) + "\n")
        if shipped:  # the page's markers of the other shipped model begin with its name
            insert_table(Path("results/README.md"), name if default else f"{model} {name}", lines)
        if default and name == "rewards":
            insert_table(Path("README.md"), "headline", headline(numbers))


if __name__ == "__main__":
    main()
