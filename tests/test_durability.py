"""Claims about what a run leaves on disk: nothing is lost at a kill or a power cut, one process writes a run,
what is damaged is named and never overwritten, and a broken network is never called a success."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ddpo
import experiments
import reproduce
import run_folder
import rwr
import sample
import processes
import prompts
import resume
import training
from ddpo import Config
from emoji import pretrain
from run_folder import (draw_progress, load_checkpoint, read_metrics, refuse_existing, release, reserved,
                        row_line, save_checkpoint, write_whole)
from scripts import flags, numbers
from stable_diffusion import save_pipeline
from test_reproduce import fake_run

ROOT = Path(__file__).parents[1]
SMALL = dict(images=4, sample_batch=2, train_batch=4, steps=2, group_size=2, eval_images=2, updates=2,
             epochs=2, warmup=0, watch="", lora_rank=2, device="cpu", dtype="fp32", lr=1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A run of two epochs that nothing disturbed."""
    return ddpo.train(Config(model=model, out=str(tmp_path_factory.mktemp("runs")), name="whole", **SMALL))


@pytest.fixture(scope="module")
def longer(run):
    """The same, of three epochs."""
    return resumed(shutil.copytree(run, run.parent / "longer"))


def resumed(folder, epochs=3):
    ddpo.main(["--resume", str(folder), "--epochs", str(epochs)])
    return folder


def refusal(capsys, arguments, loop=ddpo):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        loop.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(error.splitlines()) == 1, error
    return error


def assert_same(folder, other):
    ours, theirs = (load_checkpoint(path / "checkpoint") for path in (folder, other))
    assert all(torch.equal(a, b) for a, b in zip(ours["parameters"], theirs["parameters"], strict=True))
    assert numbers(folder) == numbers(other)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# a power cut

def test_a_mac_empties_the_disks_own_memory_too(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_folder.fcntl, "F_FULLFSYNC", 51, raising=False)  # as a Mac has it
    monkeypatch.setattr(run_folder.fcntl, "fcntl", lambda descriptor, what: asked.append(what))
    run_folder.write_whole(tmp_path / "file", "x")
    run_folder.append(tmp_path / "file", "y")
    assert asked == [51] * 3  # the file, its folder, the file again


@pytest.mark.parametrize("lora_rank", [2, 0])
def test_bytes_are_on_the_disk_before_their_name_is_and_the_log_before_the_checkpoint(
        model, tmp_path, monkeypatch, lora_rank):
    events, fsync, rename = [], os.fsync, os.replace

    def logged_fsync(descriptor):
        fsync(descriptor)
        events.append(("fsync", os.fstat(descriptor).st_ino))

    def logged_rename(source, target):
        target = Path(target)
        events.append(("rename", os.stat(source).st_ino, target.parent.stat().st_ino, target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_rename)
    settings = SMALL | dict(epochs=1, lora_rank=lora_rank)
    folder = ddpo.train(Config(model=model, out=str(tmp_path), name="run", **settings))
    renames = [i for i, event in enumerate(events) if event[0] == "rename"]
    for before, i in zip([0, *renames], renames):
        _, file, parent, target = events[i]
        assert ("fsync", file) in events[before:i], f"{target}: renamed before it was on the disk"
        assert ("fsync", parent) in events[i:], f"{target}: its new name was not on the disk"
    written = {event[3] for event in events if event[0] == "rename"}
    assert {path for path in folder.rglob("*") if path.is_file()} == written  # there is no other way
    order = [event[3].name for event in events if event[0] == "rename"]
    assert order[0] == "config.json" and order[-1] == "epoch_000001.pt"
    assert ("fsync", (folder / "metrics.jsonl").stat().st_ino) in events[:renames[-1]]


def torn_row(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "images"')


DAMAGES = {
    "empty config": lambda folder: (folder / "config.json").write_bytes(b""),
    "config of NULs": lambda folder: (folder / "config.json").write_bytes(b"\0" * 100),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "empty picture": lambda folder: (folder / "progress/000000.png").write_bytes(b""),
    "garbage picture": lambda folder: (folder / "progress/000001.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(500)),
    "foreign picture": lambda folder: (folder / "progress/notes.png").write_bytes(b"mine"),
    "empty sheet": lambda folder: (folder / "progress.png").write_bytes(b""),
    "torn row": torn_row,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_goes_on_from_what_a_power_cut_leaves(run, longer, tmp_path, capsys, damage):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    damage(folder)
    assert_same(resumed(folder), longer)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4  # a row an epoch
    assert json.loads((folder / "config.json").read_text())["epochs"] == 3
    Image.open(folder / "progress.png").verify()
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_with_an_empty_config_and_nothing_else_says_what_to_do(tmp_path, capsys):
    (tmp_path / "young").mkdir()
    (tmp_path / "young/config.json").touch()
    assert "delete the folder" in refusal(capsys, ["--resume", str(tmp_path / "young")])
    assert "exists already" in refusal(capsys, ["--out", str(tmp_path), "--name", "young", "--device", "cpu"])


def test_a_log_is_never_shortened(run, longer, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "checkpoint/epoch_000002.pt").unlink()  # a kill between the row and the checkpoint of epoch 2
    counts, log = [], training.log

    def counting(*arguments):
        log(*arguments)
        counts.append(len((folder / "metrics.jsonl").read_text().splitlines()))

    monkeypatch.setattr("evaluate.log", counting)
    assert_same(resumed(folder), longer)
    assert counts == [3, 4]


def test_the_last_row_of_an_epoch_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = ['{"epoch": 0, "x": 1}', '{"epoch": 1, "x": 2}', '{"epoch": 0, "x": 3}', "",
            '{"epoch": 1, "x": 4}']
    path.write_text("\n".join([*rows, '{"epoch"']))
    assert read_metrics(path) == [{"epoch": 0, "x": 3}, {"epoch": 1, "x": 4}]
    path.write_text('{"epoch": 0, "x": 1}\n{"epoch": 1, "x\n{"epoch": 2, "x": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_metrics(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_is_named(tmp_path):
    write_whole(tmp_path / "file", "old")

    def fail(file):
        file.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match=re.escape(f"{tmp_path / 'file'}: cannot be written (no space left)")):
        write_whole(tmp_path / "file", fail)
    assert contents(tmp_path) == {"file": b"old"}


# checkpoints

def flip(path, position=0.5):
    damaged = bytearray(path.read_bytes())
    damaged[int(position * len(damaged))] ^= 1
    path.write_bytes(damaged)


def plain(value):
    """Dicts, lists and tensors as what == compares."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def test_any_flipped_byte_of_a_checkpoint_is_found_or_harmless(run, tmp_path, capsys):
    path = run / "checkpoint/epoch_000002.pt"
    whole, found, moments = load_checkpoint(run / "checkpoint"), 0, random.Random(0)
    (tmp_path / "checkpoint").mkdir()
    for _ in range(100):
        shutil.copy(path, tmp_path / "checkpoint")
        flip(tmp_path / "checkpoint" / path.name, moments.random())
        try:
            state = load_checkpoint(tmp_path / "checkpoint")
        except ValueError:
            found += 1
        else:
            assert plain(state) == plain(whole)
    assert found > 20  # the rest of a small file is padding and names


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(run, longer, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    newest = folder / "checkpoint/epoch_000002.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert_same(resumed(folder), longer)
    assert "epoch_000002.pt: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_text("a shopping list"),
    lambda path: path.write_bytes(path.read_bytes()[:2000]), lambda path: (path.unlink(), path.mkdir()),
    lambda path: torch.save(SimpleNamespace(), path)],
    ids=["empty", "text", "truncated", "a folder", "another pickle"])
def test_a_run_whose_checkpoints_cannot_be_read_is_left_as_it_is(run, tmp_path, capsys, damage):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    for path in (folder / "checkpoint").iterdir():
        damage(path)
    before = contents(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        ddpo.main(["--resume", str(folder)])
    *fallbacks, line = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and "checkpoint/epoch_000002.pt" in line
    assert all("going back to the one before" in each for each in fallbacks)
    assert contents(folder) == before


def first(state):
    return state["parameters"][0]


@pytest.mark.parametrize("change, names", [
    (lambda state: state["parameters"].__setitem__(0, torch.zeros(1)), "(1,)"),
    (lambda state: state["parameters"].__setitem__(0, first(state).double()), "float64"),
    (lambda state: state["parameters"].__setitem__(0, "zeros"), "str"),
    (lambda state: first(state).view(-1).__setitem__(0, float("nan")), "not finite"),
    (lambda state: state.update(parameters=state["parameters"][:10]), "10 instead of"),
    (lambda state: state.update(parameters=state["parameters"] + [torch.zeros(1)]), "instead of"),
    (lambda state: state["ema"][0].view(-1).__setitem__(0, float("inf")), "ema: tensor 0 is not finite"),
    (lambda state: state.update(ema=None), "--ema"),
    (lambda state: state["optimizer"]["state"].pop(0), "optimizer"),
    (lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)), "exp_avg"),
    (lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"), "optimizer"),
    (lambda state: state["optimizer"]["state"][0].update(step=torch.tensor(float("nan"))), "not finite"),
    (lambda state: state["optimizer"]["state"][0].update(nested={"absmax": torch.full((2,), float("inf"))}),
     "not finite"),
    (lambda state: state.update(optimizer=[]), "optimizer"),
    (lambda state: state.update(scaler={"scale": 1.0}), "scaler"),
    (lambda state: state.update(epoch=-1), "-1"),
    (lambda state: state.update(epoch="2"), "'2'"),
    (lambda state: [state.pop(key) for key in ("config", "scaler")], "another version"),
    (lambda state: state["config"].pop("lr"), "lr"),
    (lambda state: state["config"].update(reward="incompress"), "--reward 'incompress'"),
    (lambda state: state["config"].update(watch="clip"), "--watch 'clip'"),
    (lambda state: state["config"].update(eval_prompts="objects"), "--eval-prompts 'objects'"),
    (lambda state: state.update(prompts=prompts.digest([["a cat"], []])), "of other prompts than"),
    (lambda state: state.clear(), "another version"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_overwritten(
        run, tmp_path, capsys, change, names):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    state = load_checkpoint(folder / "checkpoint")
    change(state)
    torch.save(state, folder / "checkpoint/epoch_000002.pt")
    before = contents(folder)
    assert names in refusal(capsys, ["--resume", str(folder)])
    assert contents(folder) == before


def test_an_optimizers_state_may_be_nested_as_that_of_bitsandbytes_is(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    state = load_checkpoint(folder / "checkpoint")
    for values in state["optimizer"]["state"].values():
        values["quantisation"] = {"absmax": torch.ones(2), "map": torch.arange(4, dtype=torch.uint8)}
    torch.save(state, folder / "checkpoint/epoch_000002.pt")
    ddpo.main(["--resume", str(folder), "--epochs", "3"])
    assert numbers(folder)[:3] == numbers(run) and len(numbers(folder)) == 4


def test_a_run_is_gone_on_with_by_the_script_that_made_it(run, tmp_path, capsys):
    before = contents(run)
    assert "rwr.py" in refusal(capsys, ["--resume", str(run)], rwr)
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    settings = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder / "checkpoint")
    theirs = rwr.train(rwr.Config(model=settings["model"], out=str(tmp_path), name="theirs",
                                  **SMALL | dict(epochs=1, updates=1)))
    shutil.copytree(theirs / "checkpoint", folder / "checkpoint")
    assert "another script" in refusal(capsys, ["--resume", str(folder)])
    assert contents(run) == before


# files that a person has edited

@pytest.mark.parametrize("edit, names", [
    (dict(lr="fast"), "lr"), (dict(images=8.0), "images"), (dict(compile=1), "compile"),
    (dict(steps=None), "steps"), (dict(reward=["compress"]), "reward"), (dict(epochs=True), "epochs"),
    (dict(lr=float("nan")), "lr"), (dict(lr=1e308), "lr"), (dict(images=10**12), "images"),
    (dict(eval_images=10**400), "eval-images"), (dict(kl=-1.0), "kl"), (dict(colour="red"), "colour"),
    (dict(lora_rank=3), "instead of"), (dict(ema=0.0), "--ema is 0"),
    (dict(prompts="no_such.txt"), "no_such.txt"),
    ("{", "not JSON"), ("[1]", "list"), ("\xff", "config.json"), ("null", "config.json")])
def test_an_edited_config_is_refused_in_a_line(run, tmp_path, capsys, edit, names):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    path = folder / "config.json"
    content = edit if isinstance(edit, str) else json.dumps(json.loads(path.read_text()) | edit)
    path.write_text(content, encoding="latin-1")
    before = contents(folder)
    assert names in refusal(capsys, ["--resume", str(folder)])
    assert contents(folder) == before


def test_a_config_that_lacks_a_setting_is_refused_and_one_that_is_changed_is_reported(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    settings = json.loads((folder / "config.json").read_text())
    lacking = {key: value for key, value in settings.items() if key != "lr"}
    (folder / "config.json").write_text(json.dumps(lacking))
    assert "lr" in refusal(capsys, ["--resume", str(folder)])
    (folder / "config.json").write_text(json.dumps(settings | {"lr": 0.5}))
    resumed(folder, 2)
    assert "lr 0.001 -> 0.5" in capsys.readouterr().err


def test_a_run_says_that_its_rewards_file_was_changed_and_has_no_fewer_epochs_than_are_done(
        model, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("def mine(images, prompts): return images.float().mean((1, 2, 3))")
    config = Config(model=model, reward=f"{file}:mine", out=str(tmp_path), name="run", **SMALL)
    folder = ddpo.train(config)
    resumed(folder, 3)
    assert "was changed" not in capsys.readouterr().err
    file.write_text(file.read_text().replace("return", "return 9 *"))
    assert "--epochs 2: " in refusal(capsys, ["--resume", str(folder), "--epochs", "2"])
    resumed(folder, 4)
    assert f"the file of reward {file}:mine was changed: metrics up to epoch 3 are" in capsys.readouterr().err


@pytest.mark.parametrize("edit", [
    lambda rows: rows.__setitem__(1, "gone"), lambda rows: rows.__setitem__(0, "[]"),
    lambda rows: rows.__setitem__(1, '{"epoch": "1"}'), lambda rows: rows.__setitem__(1, '{"epoch": 1}'),
    lambda rows: rows.pop(1), lambda rows: rows.clear(),
    lambda rows: rows.__setitem__(0, re.sub('"eval_reward": [^,}]*', '"eval_reward": null', rows[0])),
    lambda rows: rows.__setitem__(0, rows[0].replace('"eval_reward"', '"my_reward"')),
    lambda rows: rows.__setitem__(1, re.sub('"reward_mean": [^,]*', '"reward_mean": "high"', rows[1]))])
def test_an_edited_log_is_refused_in_a_line_that_names_it(run, tmp_path, capsys, edit):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    edit(rows)
    (folder / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))
    before = contents(folder)
    assert "metrics.jsonl" in refusal(capsys, ["--resume", str(folder)])
    assert contents(folder) == before


@pytest.mark.parametrize("arguments, names", [
    (["--name", "../elsewhere"], "--out"), (["--name", "/elsewhere"], "--out"), (["--name", "."], "--out"),
    (["--images", str(10**12)], "images"), (["--epochs", str(10**12)], "epochs"), (["--kl", "1e308"], "kl"),
    (["--reward", "compress:1e308,incompress:1"], "reward"), (["--buffer-size", str(10**30)], "buffer-size"),
    (["--out", "README.md/runs"], "README.md")])
def test_absurd_settings_and_places_are_refused_in_a_line(tmp_path, capsys, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    assert names in refusal(capsys, ["--device", "cpu", "--epochs", "1", *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# one writer

def forked(function):
    """The pid of a process that runs the function, and ends with its exit code."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        code = function() or 0
    finally:
        os._exit(code)


def ended(pid, seconds=20):
    """The exit code, or minus the signal, of a forked process."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("it did not end")


def test_of_processes_that_start_a_run_at_once_one_gets_it(tmp_path):
    def start():
        try:
            with reserved(folder):
                while not (tmp_path / "all have tried").exists():
                    time.sleep(0.001)
            return 0
        except ValueError as error:
            open(tmp_path / "refused", "a").write(f"{error}\n")
            return 1

    for attempt in range(20):
        folder = tmp_path / f"runs/{attempt}"
        processes = [forked(start) for _ in range(3)]
        while not (tmp_path / "refused").exists() or len((tmp_path / "refused").read_text().splitlines()) < 2:
            time.sleep(0.001)
        (tmp_path / "all have tried").touch()
        assert sorted(ended(pid) for pid in processes) == [0, 1, 1]
        for line in (tmp_path / "refused").read_text().splitlines():
            assert line.startswith(str(folder)) and "is writing this run" in line
        (tmp_path / "refused").unlink(), (tmp_path / "all have tried").unlink()


def test_the_kernel_lets_go_of_a_killed_runs_lock_and_a_refusal_leaves_no_folder(tmp_path):
    folder = tmp_path / "runs/killed"

    def hold():
        with reserved(folder):
            (folder / "held").touch()
            time.sleep(60)

    pid = forked(hold)
    while not (folder / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"process {pid} on .* is writing this run"):
        with reserved(folder):
            pass
    assert (folder / "lock").exists()  # the refused one leaves the other's
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    with reserved(folder):
        with reserved(folder):  # the same process: a run that has failed in a notebook goes on there
            pass
    release(folder)
    assert not (folder / "lock").exists()
    with pytest.raises(RuntimeError, match="no such model"):
        with reserved(tmp_path / "new/run"):
            raise RuntimeError("no such model")
    assert not (tmp_path / "new").exists()


def test_a_run_that_another_process_writes_is_neither_started_nor_resumed(run, model, tmp_path, capsys):
    folder, before = Path(shutil.copytree(run, tmp_path / "run")), contents(run)

    def hold():
        with reserved(folder):
            (folder / "held").touch()
            time.sleep(60)

    pid = forked(hold)
    while not (folder / "held").exists():
        time.sleep(0.01)
    (folder / "held").unlink()
    again = flags(model="no/such/model", out=tmp_path, name="run", device="cpu")  # before models load
    for arguments in (["--resume", str(folder), "--epochs", "3"], again):
        assert f"process {pid}" in refusal(capsys, arguments)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    (folder / "lock").unlink()
    assert contents(folder) == before


# a broken network

@pytest.mark.parametrize("settings", [
    dict(updates=1, lora_rank=0), dict(updates=2), dict(updates=1, eval_every=9)])
def test_a_broken_network_ends_the_run_before_anything_of_it_is_saved(model, tmp_path, capsys, settings):
    settings = SMALL | dict(epochs=1, model=model, out=tmp_path, name="broken", ema=0.0, lr=1e10) | settings
    with pytest.raises(SystemExit) as stop:
        ddpo.main(flags(**settings))
    assert re.fullmatch(r"[^\n]* (is|are) (nan|inf|not finite)[^\n]*--lr below 1e\+10", str(stop.value.code))
    folder = tmp_path / "broken"
    assert [row["epoch"] for row in read_metrics(folder / "metrics.jsonl")] == [0]
    assert not (folder / "checkpoint").exists() and not list(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_pictures_that_are_not_finite_are_no_pictures(model, part):
    pipeline = sample.load_pipeline(model, "cpu")
    network = pipeline.unet if part == "unet" else pipeline.vae.decoder
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        sample.sample_trajectories(pipeline, ["a cat"], 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_an_adapter_that_is_broken_is_refused_by_the_sampler(run, tmp_path, capsys, value):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    path = folder / "pytorch_lora_weights.safetensors"
    save_file({key: torch.full_like(tensor, value) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--lora", str(folder), "--prompt", "a cat", "--images", "1", "--device", "cpu",
                     "--out", str(tmp_path / "cat.png")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and re.fullmatch(r"--[^\n]*lora [^\n]* not finite[^\n]*", error)
    assert not (tmp_path / "cat.png").exists()


def test_the_sampler_tries_its_output_before_it_works(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "sample_trajectories", lambda *_, **__: pytest.fail("it has sampled"))
    (tmp_path / "cat.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        sample.main(["--lora", str(run), "--device", "cpu", "--out", str(tmp_path / "cat.png")])
    assert stop.value.code == 2 and "cat.png" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_logged(model, tmp_path):
    run = ddpo.prepare(Config(model=model, out=str(tmp_path), name="weights", **SMALL))
    run.parameters[-1].data.view(-1)[0] = float("inf")
    with pytest.raises(processes.RunStopped, match="weights are not finite after epoch 1"):
        training.log(run, {"epoch": 1, "images": 4})
    assert not (run.folder / "metrics.jsonl").read_text()
    training.close(run)


# parts that only a GPU uses by itself

def test_the_scaler_and_the_scorers_thread_change_no_number(model, run, tmp_path):
    config = Config(model=model, out=str(tmp_path), name="run", **SMALL)
    ours = ddpo.prepare(config)
    ours.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # powers of two are exact
    ours.scorer = ThreadPoolExecutor(1)
    folder = ddpo.fit(ours)
    assert numbers(folder) == numbers(run)
    saved, whole = load_checkpoint(folder / "checkpoint"), load_checkpoint(run / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(saved["parameters"], whole["parameters"], strict=True))
    assert saved["scaler"]["scale"] == 2.0**10


def test_the_scaler_skips_an_overflow_and_stops_where_it_never_ends(model, tmp_path):
    run = ddpo.prepare(Config(model=model, out=str(tmp_path), name="run", **SMALL))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in run.parameters]

    def update(gradient):
        for p in run.parameters:
            p.grad = torch.full_like(p, gradient) * run.scaler.scale(torch.ones(()))
        return training.apply_gradients(run)

    assert update(float("inf")) == float("inf") and run.scaler.get_scale() == 2.0
    assert all(torch.equal(p, value) for p, value in zip(run.parameters, before))
    count = sum(p.numel() for p in run.parameters)
    assert update(0.5) == pytest.approx(0.5 * count**0.5, rel=1e-5)  # the norm is of the gradient itself
    assert not any(torch.equal(p, value) for p, value in zip(run.parameters, before))
    with pytest.raises(processes.RunStopped, match="gradient is nan"):
        for _ in range(4):
            update(float("nan"))
    training.close(run)


def test_a_reward_that_fails_in_the_scorers_thread_drops_the_batches_that_wait(model, tmp_path):
    run = ddpo.prepare(Config(model=model, out=str(tmp_path), name="run", **SMALL | dict(images=40)))
    run.scorer, calls = ThreadPoolExecutor(1), []

    def failing(images, prompts):
        calls.append(len(images))
        time.sleep(0.1)
        raise training.RewardError("reward failing: raised ValueError")

    failing.log_counts = {}
    run.rewards = {"compress": failing}
    with pytest.raises(processes.RunStopped, match="reward failing"):
        training.collect(run, 1)
    run.scorer.shutdown()
    assert len(calls) < 20  # of 20 batches
    training.close(run)


def test_what_an_epoch_needs_no_more_is_let_go(run, model, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    settings = json.loads((folder / "config.json").read_text())
    config = Config(**settings | {"out": str(tmp_path), "name": "run"})
    again = ddpo.prepare(config, resume=True)
    assert again.saved.keys() == {"statistics"}  # the tensors of the checkpoint are gone
    _, trajectories, _, _ = training.collect(again, 3)
    assert trajectories.images is None and len(trajectories.latents) == 4
    training.close(again)


def test_an_epochs_trajectories_are_let_go_before_the_next_epochs_are_sampled(model, tmp_path, monkeypatch):
    collect, held, alive = training.collect, [], []

    def collecting(*arguments):
        alive.extend(reference() is not None for reference in held)
        collected = collect(*arguments)
        held.append(weakref.ref(collected[1].latents))
        return collected

    monkeypatch.setattr(ddpo, "collect", collecting)
    ddpo.train(Config(model=model, out=str(tmp_path), name="run", **SMALL | dict(epochs=2)))
    assert alive == [False]


def test_compiled_blocks_have_room_for_each_batch_and_what_stays_eager_is_said(model, tmp_path, capsys):
    from torch._dynamo import config as dynamo, utils

    limits = dynamo.recompile_limit, dynamo.accumulated_recompile_limit
    try:
        run = ddpo.prepare(Config(model=model, out=str(tmp_path), name="run", **SMALL | dict(compile=True)))
        assert dynamo.recompile_limit >= 100 and dynamo.accumulated_recompile_limit >= 1000  # not 8, 256
        training.say_what_is_eager(run)
        assert not capsys.readouterr().err
        dynamo.recompile_limit = 1
        for size in (1, 2, 3):
            doubled(torch.ones(size))
        for _ in range(2):
            training.say_what_is_eager(run)
        err = capsys.readouterr().err
        assert err.count("in eager mode") == 1
        assert "recompile limit" in err.replace("_", " ")  # torch 2.10 writes recompile_limit
        training.close(run)
    finally:
        dynamo.recompile_limit, dynamo.accumulated_recompile_limit = limits
        utils.counters.clear()
        torch._dynamo.reset()


@torch.compile(backend="eager", dynamic=False)
def doubled(x):
    return 2 * x


def test_progress_shows_at_most_twenty_evaluations_the_first_and_the_last_among_them(tmp_path):
    (tmp_path / "progress").mkdir()
    for epoch in range(60):
        Image.new("RGB", (4, 2), (epoch, 0, 0)).save(tmp_path / f"progress/{epoch:06d}.png")
    for last, shown in ((59, 20), (6, 7)):
        draw_progress(tmp_path, last)
        sheet = Image.open(tmp_path / "progress.png")
        epochs = [sheet.getpixel((0, 2 * i))[0] for i in range(sheet.height // 2)]
        assert len(epochs) == shown and epochs[0] == 0 and epochs[-1] == last
        steps = [b - a for a, b in zip(epochs, epochs[1:])]
        assert max(steps) - min(steps) <= 1


# signals, and many processes

def test_a_signal_ends_a_process_also_in_a_callback_that_swallows_exceptions():
    class Callback:
        def __del__(self):  # an exception here would be printed and ignored
            os.write(ready, b"r")
            time.sleep(60)

    def main():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        with processes.stop_signals(lambda number: os.write(ready, bytes([number]))):
            Callback()
        return 1

    for number in (signal.SIGTERM, signal.SIGINT):
        heard, ready = os.pipe()
        pid = forked(main)
        assert os.read(heard, 1) == b"r"
        os.kill(pid, number)
        assert ended(pid) == 130 and os.read(heard, 1) == bytes([number])


def test_a_process_that_a_reward_forks_is_stopped_alone():
    def main():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever a test before this one has set
        with processes.stop_signals(lambda number: os.write(told, b"the run is stopped")):
            worker = forked(lambda: os.write(told, b"ready") and time.sleep(60))
            assert os.read(heard, 5) == b"ready"
            os.kill(worker, signal.SIGTERM)
            code = ended(worker)
            time.sleep(0.5)
        os.write(told, str(code).encode())

    heard, told = os.pipe()
    ended(forked(main))
    assert os.read(heard, 100) == str(-signal.SIGTERM).encode()


FAILING = """
import os
calls = []

def reward(images, prompts):
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) > 4:
        raise RuntimeError("the judge has left")
    return [float(i) for i in range(len(images))]
"""


def test_a_process_that_fails_ends_the_others_at_once_and_its_line_is_the_last(model, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    reward = f"{tmp_path}/failing.py:reward"
    settings = SMALL | dict(model=model, out=tmp_path, name="run", epochs=1000, reward=reward)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "ddpo.py"]
    process = subprocess.Popen([*command, *flags(**settings, preset="emoji")], cwd=ROOT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    lines, failed = [], None
    try:
        for line in process.stderr:
            lines.append(line.rstrip())
            failed = failed or "the judge has left" in line and time.time()
        code = process.wait(60)
    finally:
        process.kill()
    assert code == 1 and time.time() - failed < 15
    said = [line for line in lines if line and set(line) != {"="}]
    assert "the judge has left" in said[-1] and said[-1].endswith(f"--resume {tmp_path}/run")
    ours = lines[:next(i for i, line in enumerate(lines) if "the judge has left" in line)]
    assert not any("Traceback" in line or "Connection" in line for line in ours)  # torchrun adds its own


# reproduce.py and emoji/pretrain.py

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_run_ends_with_the_experiment_that_started_it():
    """Also where that is killed, so that it could not tell anybody."""
    heard, told = os.pipe()

    def experiment():
        child = subprocess.Popen(["sleep", "60"], preexec_fn=reproduce.end_with_parent)
        os.write(told, str(child.pid).encode())
        time.sleep(60)

    parent = forked(experiment)
    child = int(os.read(heard, 20))
    os.kill(parent, signal.SIGKILL)
    ended(parent)
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the run outlived the experiment")


def test_fewer_seeds_do_not_replace_a_table_of_more(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        for algorithm in ("DDPO-IS", "RWR"):
            fake_run(tmp_path / f"results/emoji/logs/compress-{algorithm}-{seed}", seed)
    reproduce.main(["algorithms", "--draw", "--seeds", "1"])
    table = json.loads((tmp_path / "results/emoji/algorithms.json").read_text())
    assert {row["seeds"] for row in table.values()} == {3}


@pytest.mark.parametrize("setting, value", [
    ("unet_steps", 0), ("clip_batch", -1), ("ema", 1.0), ("vae_lr", float("nan")), ("seed", -1),
    ("save_every", 0), ("caption_dropout", 1.5), ("out", "README.md/emoji"), ("clip_scenes", 10**12)])
def test_pretraining_refuses_what_cannot_work_before_it_starts(setting, value, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=f"^--{setting.replace('_', '-')} [^\\n]+$"):
        pretrain.check(replace(pretrain.Config(), **{setting: value}))


def test_a_resumed_run_has_the_optimizers_settings_of_its_config(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"weight_decay": 0.5}))
    again = ddpo.prepare(*ddpo.parse_config(["--resume", str(folder), "--epochs", "3"]))
    assert [group["weight_decay"] for group in again.optimizer.param_groups] == [0.5]
    assert again.optimizer.state  # with the moments of the checkpoint


def test_what_may_be_given_beside_resume_is_not_reported_as_a_change(run, tmp_path, capsys):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    capsys.readouterr()
    ddpo.main(["--resume", str(folder), "--epochs", "3", "--patience", "9", "--device", "cpu"])
    assert "was changed" not in capsys.readouterr().err


def test_a_resumed_run_has_the_newest_and_the_averaged_weights_of_its_checkpoint(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    saved = load_checkpoint(folder / "checkpoint")
    again = ddpo.prepare(*ddpo.parse_config(["--resume", str(folder), "--epochs", "3"]))
    for name, tensors in (("parameters", again.parameters), ("ema", again.ema)):
        assert all(torch.equal(p, value) for p, value in zip(tensors, saved[name], strict=True)), name
    assert not all(torch.equal(p, average) for p, average in zip(again.parameters, again.ema))


def test_a_whole_number_in_an_edited_config_stands_for_the_float_that_it_is(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"guidance_scale": 4, "lr": 1}))
    config, _ = ddpo.parse_config(["--resume", str(folder)])
    assert (config.guidance_scale, config.lr) == (4.0, 1.0)
    assert isinstance(config.guidance_scale, float) and isinstance(config.lr, float)


def test_a_signal_that_is_ignored_as_under_nohup_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    theirs = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with processes.stop_signals(lambda number: None):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.default_int_handler)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, theirs)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for epoch in range(1, 5):
        save_checkpoint(tmp_path / "checkpoint", {"epoch": epoch})
    assert sorted(contents(tmp_path / "checkpoint")) == ["epoch_000003.pt", "epoch_000004.pt"]


def test_pictures_stand_below_each_other_whatever_room_the_labels_beside_them_take(tmp_path):
    (tmp_path / "progress").mkdir()
    for epoch, label in ((0, 3), (10, 5)):  # labels of so many white pixels, then the picture
        strip = Image.new("RGB", (label + 4, 2), "white")
        strip.paste((0, 0, 0), (label, 0, label + 4, 2))
        strip.save(tmp_path / f"progress/{epoch:06d}.png")
    draw_progress(tmp_path, 10)
    sheet = Image.open(tmp_path / "progress.png")
    dark = [[x for x in range(sheet.width) if sheet.getpixel((x, y)) == (0, 0, 0)] for y in (0, 2)]
    assert dark == [[5, 6, 7, 8]] * 2


def test_a_log_needs_the_spread_of_what_is_watched_in_its_first_row_alone(tmp_path):
    first = {"epoch": 0, "images": 0, "eval_reward": 1.0, "eval_clip": 0.7, "eval_clip_std": 0.1}
    later = {"epoch": 1, "images": 4, "eval_reward": 1.0, "eval_clip": 0.7}
    log = SimpleNamespace(folder=tmp_path)
    resume.check_rows(log, 1, [first, later])
    for row, missing in ((first, "eval_clip_std"), (later, "eval_clip"), (first, "eval_clip")):
        broken = [each | ({missing: None} if each is row else {}) for each in (first, later)]
        with pytest.raises(ValueError, match=f"epoch {row['epoch']} lacks numbers .{missing}"):
            resume.check_rows(log, 1, broken)


def test_a_number_that_json_has_not_is_null_in_a_log(tmp_path):
    row = {"epoch": 1, "grad_norm": float("inf"), "loss": float("nan"), "kl": None, "x": 0.5}
    logged = json.loads(row_line(row), parse_constant=pytest.fail)
    assert logged == row | {"grad_norm": None, "loss": None}


def test_a_new_run_leaves_alone_what_others_have_put_into_its_folder(tmp_path):
    (tmp_path / "mine/last").mkdir(parents=True)
    (tmp_path / "mine/last/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine: has last in it, .*; choose another --name"):
        ddpo.prepare(Config(out=str(tmp_path), name="mine", device="cpu"))
    assert (tmp_path / "mine/last/thesis.txt").read_text() == "years of work"
    run = tmp_path / "first"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_text("")
    with pytest.raises(ValueError, match="lies in the folder of another run"):
        ddpo.prepare(Config(out=str(run), name="last", device="cpu"))
    assert not (run / "last").exists()


def test_what_a_killed_start_leaves_does_not_stop_the_next(tmp_path):
    (tmp_path / "progress").mkdir()
    for name in ("lock", "config.json.tmp"):
        (tmp_path / name).write_text("x")
    refuse_existing(tmp_path)


def test_a_folder_that_can_never_be_made_is_one_line(tmp_path, monkeypatch):
    def mkdir(path, **_):
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ValueError, match="cannot be written .*choose another --out"):
        with reserved(tmp_path / "run"):
            pass


def test_each_process_may_count_other_events(monkeypatch):
    def reward(images, prompts):
        return [0.0]

    reward.log_counts = {"cats": 2}
    monkeypatch.setattr(training, "gather", lambda counts: [*counts, {"mine_dogs": 1, "mine_cats": 3}])
    run = SimpleNamespace(components={"mine": 1.0}, rewards={"mine": reward})
    row = training.reward_row(run, {"mine": [0.0]})
    assert (row["mine_cats"], row["mine_dogs"]) == (5, 1)
