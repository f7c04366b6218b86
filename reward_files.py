"""Running a reward's code, which may be anybody's: a file is loaded, each call is checked, and the
process is afterwards as it was.

A reward cannot change what is trained, evaluated or drawn. It gets copies of the pictures and
prompts. What it switches in the process (gradient mode, random state, working folder, ...) holds
for its own code alone. Where it fails, a RewardError names the reward and the picture.
"""

import contextlib
import functools
import importlib.util
import inspect
import logging
import os
import random
import signal
import sys
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PATIENCE = 60  # seconds, after which a reward that has not answered is named on the screen


class RewardError(ValueError):
    """A reward that cannot be loaded, or whose values cannot be used.

    index, prompt and image (3, H, W) are those of the picture at fault, or None.
    """

    def __init__(self, message, index=None, prompt=None, image=None):
        super().__init__(message)
        self.index, self.prompt, self.image = index, prompt, image


def working_folder():
    try:
        return os.getcwd()
    except FileNotFoundError:  # removed, as a temporary folder is
        return os.sep


def replace(items, value):
    items[:] = value


def signals():
    """What Ctrl-C and SIGTERM do: asyncio changes it, and only the main thread can read or set it."""
    if threading.current_thread() is not threading.main_thread():
        return None
    signal.set_wakeup_fd(wakeup := signal.set_wakeup_fd(-1))
    return wakeup, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


def set_signals(value):
    wakeup, interrupt, terminate = value
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)


def set_streams(value):
    sys.stdout, sys.stderr = value


# (read, write) of what code can switch for the whole process. Each reward has its own values:
# they hold in its file and in each of its calls, and nowhere else.
OWN = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_device,  # None for cpu: any default device slows down all of torch
     lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_rng_state, torch.set_rng_state),
    (np.random.get_state, np.random.set_state),
    (random.getstate, random.setstate),
    (working_folder, os.chdir),
    (lambda: list(sys.path), lambda value: replace(sys.path, value)),
    (lambda: list(warnings.filters), lambda value: replace(warnings.filters, value)),
    (lambda: logging.root.level, logging.root.setLevel),
    (lambda: list(logging.root.handlers), lambda value: replace(logging.root.handlers, value)),
    (np.geterr, lambda value: np.seterr(**value)),
    (lambda: torch.cuda.current_device() if torch.cuda.is_initialized() else None,
     lambda value: None if value is None else torch.cuda.set_device(value)),
)
# These are the process's alone, or change the numbers of all its threads, and on a GPU a reward runs
# while the next pictures are sampled. So they are only put back, after the file and after each call.
SHARED = (
    (signals, set_signals),
    (lambda: (sys.stdout, sys.stderr), set_streams),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (lambda: (torch.are_deterministic_algorithms_enabled(),
              torch.is_deterministic_algorithms_warn_only_enabled()),
     lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (lambda: torch.backends.cudnn.deterministic,
     lambda value: setattr(torch.backends.cudnn, "deterministic", value)),
    (lambda: torch.backends.cudnn.benchmark,
     lambda value: setattr(torch.backends.cudnn, "benchmark", value)),
    # TF32 is read by its new name and written by its old one: a file may use either, and after
    # the new one torch refuses to read the old one.
    (lambda: torch.backends.cuda.matmul.fp32_precision,
     lambda value: setattr(torch.backends.cuda.matmul, "allow_tf32", value == "tf32")),
    (lambda: torch.backends.cudnn.conv.fp32_precision,
     lambda value: setattr(torch.backends.cudnn, "allow_tf32", value == "tf32")),
    (lambda: torch.backends.mkldnn.matmul.fp32_precision,
     lambda value: setattr(torch.backends.mkldnn.matmul, "fp32_precision", value)),
)


@dataclass
class Guest:
    """A reward's code, which may be anybody's. It runs in `with guest.at_work():`, and the process
    is afterwards as it was.

    A file imports from its own folder first, as in `python file.py`. What it imports from there is
    in sys.modules only while the reward's code runs. So its prompts.py is not taken for ours, nor
    ours for its own, and two rewards from two folders may each have a helper.py.
    """

    name: str
    folder: Path | None = None  # of a reward file, unless that lies among ours
    namesakes: frozenset = frozenset()  # names that are in this folder and among ours
    settings: list = field(default_factory=list)  # its values of OWN, once it has run
    modules: dict = field(default_factory=dict)  # what it has imported from its folder

    @contextlib.contextmanager
    def at_work(self):
        ours, shared = [read() for read, _ in OWN], [read() for read, _ in SHARED]
        modules = sys.modules.copy()
        hidden = {name: modules[name] for name in (modules if self.namesakes else ())
                  if top_level(name) in self.namesakes and source_folder(name) == HERE}
        say = functools.partial(tqdm.write, file=sys.stderr)  # around progress bars
        slow = threading.Timer(PATIENCE, say, [f"reward {self.name}: no answer for {PATIENCE} s; "
                                               "still waiting"])
        slow.daemon = True  # it keeps no process from ending
        slow.start()
        with torch.inference_mode(torch.is_inference_mode_enabled()):  # undoes what the reward leaves on
            try:
                for (_, write), value in zip(OWN, self.settings or ours):
                    write(value)
                if self.folder and not self.settings:
                    sys.path.insert(0, str(self.folder))
                for name in hidden:
                    del sys.modules[name]
                sys.modules.update(self.modules)
                yield
            finally:
                slow.cancel()
                self.modules = {
                    name: module for name, module in sys.modules.copy().items()
                    if self.folder and (name in hidden or name not in modules)
                    and source_folder(name) == self.folder}
                for name in self.modules:
                    del sys.modules[name]
                sys.modules.update(hidden)
                self.settings = [read() for read, _ in OWN]
                for (_, write), value in zip(OWN, ours):
                    write(value)
                for (read, write), value in zip(SHARED, shared):
                    if read() != value:
                        write(value)


def seed(*key):
    """A reward's random numbers follow from its pictures, so that the same pictures get the same values,
    also in a resumed run."""
    number = int(np.random.SeedSequence(key).generate_state(1)[0])
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(number)


def top_level(name):
    return name.partition(".")[0]


def source_folder(name):
    """The folder of a module in sys.modules, or of the outermost package that it is in, or None."""
    module = sys.modules.get(top_level(name))
    if hasattr(module, "__path__"):
        return Path(next(iter(module.__path__), "")).parent
    file = getattr(module, "__file__", None)
    return file and Path(file).parent


def load_function(spec):
    """(function, Guest) of "path/my_file.py:my_reward"."""
    file, _, function = spec.rpartition(":")
    if not Path(file).is_file():
        raise RewardError(f"reward {spec}: there is no file {file}")
    folder, name = Path(file).resolve().parent, Path(file).stem
    if name in sys.modules or name in sys.stdlib_module_names or not name.isidentifier():
        name = f"reward_{name}"  # else its own, by which processes that it starts can import it
    guest = Guest(spec)
    if folder != HERE:
        theirs, ours = ({path.stem for path in place.iterdir()} for place in (folder, HERE))
        guest = Guest(spec, folder, frozenset(theirs & ours))
    module_spec = importlib.util.spec_from_file_location(name, Path(file).resolve())
    module = importlib.util.module_from_spec(module_spec)
    try:
        with guest.at_work():
            seed(0)
            sys.modules[name] = module
            module_spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: sys.exit() in a reward must not end a run
        raise RewardError(f"reward {spec}: {file} cannot be imported "
                          f"({one_line(error)})") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        own = [key for key, value in vars(module).items()
               if getattr(value, "__module__", None) == name]
        raise RewardError(f"reward {spec}: {file} has no function {function}; "
                          f"it has {', '.join(own) or 'none'}")
    try:
        inspect.signature(reward).bind("images", "prompts")
    except ValueError:
        pass  # some callables of C have no signature
    except TypeError:
        raise RewardError(f"reward {spec}: {function}{inspect.signature(reward)} in {file} must "
                          "take (images, prompts)") from None
    return reward, guest


def checked(reward, guest):
    """reward, with what goes in and what comes out checked.

    It gets copies. Where it fails, the error names the picture. A reward's log_counts, {event: how many
    so far}, go to the log, epoch by epoch.
    """
    name = guest.name

    def ask(images, prompts):
        with guest.at_work():
            seed(*images.flatten(1).sum(1).tolist())
            return reward(images.clone(), list(prompts))

    def call(images, prompts):
        wrong = images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3
        if wrong or len(prompts) != len(images):
            raise ValueError(f"reward {name}: takes uint8 images (B, 3, H, W) and B prompts, not "
                             f"{images.dtype} {tuple(images.shape)} and {len(prompts)} prompts")
        try:
            values = ask(images, prompts)
        except (RewardError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit, too
            raise find_culprit(name, ask, images, prompts, error) from error
        return check_rewards(name, values, images, prompts)

    call.log_counts = getattr(reward, "log_counts", {})
    if not isinstance(call.log_counts, dict) or not all(
            isinstance(value, int) for value in call.log_counts.values()):
        raise RewardError(f"reward {name}: its log_counts must be a dict of whole numbers, not "
                          f"{call.log_counts!r:.80}")
    return call


def find_culprit(name, ask, images, prompts, error):
    """The RewardError for an exception. Asks for the pictures one by one, to name the first that
    raises alone."""
    for i, prompt in enumerate(prompts):
        try:
            ask(images[i : i + 1], [prompt])
        except KeyboardInterrupt:
            raise
        except BaseException as alone:
            message = f"reward {name}: raised {one_line(alone)}, for image {i}, {prompt!r}"
            return RewardError(message, i, prompt, images[i])
    return RewardError(f"reward {name}: raised {one_line(error)}, for the batch, but for no image "
                       "alone")


def check_rewards(name, values, images, prompts):
    """values as a float32 tensor (B,) on the CPU, a copy: a reward may use one buffer for all.

    Raises RewardError for anything but one finite real number an image.
    """
    count = len(images)
    try:
        if isinstance(values, np.ndarray):  # any strides, any byte order; what is masked is no number
            values = np.ma.filled(values.astype(np.float32, casting="same_kind"), np.nan)
        elif isinstance(values, torch.Tensor) and (values.is_complex() or values.layout != torch.strided):
            raise TypeError
        tensor = torch.as_tensor(values, dtype=torch.float32, device="cpu").detach().clone()
    except Exception:  # TypeError, ValueError, RuntimeError, and those of strange containers
        if inspect.iscoroutine(values):
            values.close()  # or Python would warn below our line
        what = f"{type(values).__name__} {' '.join(repr(values).split()):.80}"
        raise RewardError(f"reward {name}: returned {what}; return one number an image, {count} in "
                          "all") from None
    if tensor.shape != (count,):
        raise RewardError(f"reward {name}: returned shape {tuple(tensor.shape)} for {count} "
                          f"images; return one number an image, shape ({count},)")
    for i in (~tensor.isfinite()).nonzero().flatten().tolist():
        message = f"reward {name}: returned {tensor[i].item()} for image {i}, {prompts[i]!r}"
        raise RewardError(message, i, prompts[i], images[i])
    return tensor


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
