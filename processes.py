"""One run as several processes, and how a process ends: collectives, signals, exit codes.

torchrun starts a process for each GPU, and each takes its share of the pictures. What they compute
is summed here. A process that fails says so in one line and ends the others; Ctrl-C and SIGTERM end
the run at any moment, because what it needs to go on is on disk.
"""

import contextlib
import inspect
import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class RunStopped(Exception):
    """A run that cannot go on, for a reason outside this code. What it has done is on disk."""


class PeerLost(Exception):
    """Another process of this run has ended. What it said is what matters."""


def seeded(*key, device="cpu"):
    """A generator that depends on the key alone: it has no state that a resumed run could lose."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)  # numpy 1 has no uint64 >> int


def gather(values):
    """The lists of all processes, in the order of their ranks, as one list."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    with peers():
        dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def place():
    """(rank of this process, how many there are), as torchrun has set them. Raises ValueError, one line."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        rank = world = 0
    if not 0 <= rank < world:
        given = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ]
        raise ValueError(f"{' '.join(given)}: must be a rank below the number of processes; torchrun sets "
                         "both; unset them for one process")
    return rank, world


def reduce(tensor, operation=dist.ReduceOp.SUM):
    """The tensor, summed, or as the operation says, over all processes, in place."""
    if dist.is_initialized():
        with peers():
            dist.all_reduce(tensor, operation)
    return tensor


# RuntimeErrors of this process that may show only in a collective, which waits for the GPU
OURS = torch.OutOfMemoryError, torch.AcceleratorError


@contextlib.contextmanager
def peers():
    """Raises PeerLost where a collective fails because another process has ended."""
    try:
        yield
    except OURS:
        raise
    except RuntimeError as error:  # gloo's; NCCL's are subclasses of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PeerLost(f"another process of this run has ended, or cannot be reached ({reason})") from None


def sum_gradients(parameters):
    """One flat all-reduce, by hand: DistributedDataParallel only syncs what is called through its
    wrapper, and a pipeline calls the bare UNet."""
    if dist.is_initialized():
        flat = reduce(torch.cat([p.grad.flatten() for p in parameters]))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p))


@contextlib.contextmanager
def stop_signals(say):
    """Inside, Ctrl-C and SIGTERM call say(signal number) and end the process, with exit code 130.

    A thread does it. Python itself would raise KeyboardInterrupt in the main thread: lost
    while that thread is in a callback, and late while it waits for a process that is gone. The disk
    holds all that is needed.
    """
    def wait():
        while number := os.read(arrived, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):  # torch's DataLoader has a handler for SIGCHLD
                say(number[0])
                os._exit(130)

    arrived, wake = os.pipe()
    os.set_blocking(wake, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored, as under nohup: left so
            HANDLERS[number] = signal.signal(number, lambda *_: None)
    before = signal.set_wakeup_fd(wake)  # Python writes the number there at once
    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        restore_signals(before)
        os.close(wake)  # the thread ends


HANDLERS = {}  # signal number -> its handler before `stop_signals`


def restore_signals(wakeup=-1):
    if HANDLERS:
        signal.set_wakeup_fd(wakeup)
    while HANDLERS:
        signal.signal(*HANDLERS.popitem())


# a process that a reward forks may be stopped without stopping the run
os.register_at_fork(after_in_child=restore_signals)


def leave(message, code):
    """With several processes: ends this one, so that the others end, too, and torchrun's report ends
    with the message. It waits for nothing: what it would wait for may be gone."""
    rank, world = place()
    if world == 1:
        return
    if rank:
        time.sleep(2)  # if all of them fail, torchrun ends this one here, and the line appears once
    print(message, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))
    os._exit(code)


def command_line(arguments, parse_config, prepare, fit):
    """The command line of a loop. Exit codes: 0; 2 for settings that cannot work; 1 for a run that
    cannot go on; 130 for one that was stopped. All but 0 come with one line, an error of
    our own with its traceback, too."""
    try:
        rank, world = place()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

    def stopped(number):
        if rank or world > 1 and number == signal.SIGTERM:
            return  # by torchrun, because another process has failed: that one's line matters
        folder = Path(config.out) / config.name if config else None
        message = "stopped"
        if folder and (folder / "config.json").exists():
            script = Path(inspect.getfile(fit)).name
            message += f"; go on with: python {script} --resume {shlex.quote(str(folder))}"
        print(f"\n{message}", file=sys.stderr, flush=True)

    config = run = None
    with stop_signals(stopped):
        try:
            try:
                config, resume = parse_config(arguments)
                run = prepare(config, resume)
            except ValueError as error:  # settings, models and rewards that cannot work
                leave(str(error), 2)
                print(error, file=sys.stderr)
                sys.exit(2)
            fit(run)
        except (RunStopped, OSError) as error:
            if run and run.bar:
                run.bar.close()  # else its end would be drawn below the message
            leave(str(error), 1)
            sys.exit(str(error))
        except PeerLost as error:
            if world == 1:
                raise
            time.sleep(5)  # torchrun ends this one, too; ending first, it would be in the report
            leave(str(error), 1)  # nobody else has failed: NCCL itself cannot work, and says why
        except Exception as error:
            if world > 1:
                traceback.print_exc()
            leave(f"{type(error).__name__}: {error}", 1)
            raise
