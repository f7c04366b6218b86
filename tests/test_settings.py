"""Claims about the command line: each setting is explained where it is defined, and shown under --help."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import ddpo
import settings
from scripts import ROOT
from settings import field_comments


@pytest.mark.parametrize("script", ["ddpo", "rwr", "forward", "control", "control_loop"])
def test_every_flag_has_a_sentence_which_is_the_comment_in_the_source(script, capsys):
    module = import_module(script)
    comments = dict(entry for _, entries in field_comments(module.Config) for entry in entries)
    assert list(comments) and set(comments) == {field.name for field in fields(module.Config)}
    with pytest.raises(SystemExit):
        module.parse_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, comment in comments.items():
        assert len(comment) >= 8, f"{name}: {comment}"
        assert "--" + name.replace("_", "-") in shown
        start = " ".join(re.split(r"\s", comment)[:4])
        assert start in shown, f"{name}: {comment}"


def test_a_machine_on_which_triton_cannot_compile_is_told_before_the_run(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(settings.kernels, "use_triton", lambda latents: True)
    monkeypatch.setattr(settings, "fused_ddim_step", no_compiler)
    with pytest.raises(ValueError, match="^--kernels auto: Triton .*C compiler.*choose torch$") as error:
        ddpo.check(ddpo.Config(device="cpu"))
    assert "\n" not in str(error.value)


def test_a_setting_that_a_loop_gives_another_default_is_explained_once_by_the_loop():
    from rwr import Config

    groups = dict(field_comments(Config))
    assert "inner_epochs" in dict(groups["RWR"]) and "inner_epochs" not in dict(groups["updates"])


def test_each_process_has_whole_groups_and_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="on each of 3 processes; 24 would do"):
        ddpo.check(ddpo.Config(out=str(tmp_path), device="cpu", images=32, group_size=4, sample_batch=8,
                               updates=2))


@pytest.mark.parametrize("given, says", [
    (dict(seed=2**63), "must be below 2"), (dict(ema=1.0), "must be 0 .none. or below 1"),
    (dict(reward="mine.py:score_std"), "a name that ends in _std"), (dict(patience=0), "must be at least 1"),
    (dict(guidance_scale=0.5), "at least 1, or 0"),
    (dict(sampler="ddim", eta=1e-20), "must be 0, or at least 0.001"),
    (dict(resolution=100000), "at most 8192"),
    (dict(checkpoint_every=0), "must be at least 1"), (dict(warmup=-1), "must not be negative"),
    (dict(weight_decay=-0.1), "must not be negative"), (dict(guard=-1.0), "must not be negative"),
    (dict(grad_clip=0.0), "must be above 0"), (dict(window="0:4", window_shift="7/1"), "cannot move so far")])
def test_a_setting_out_of_its_range_is_named_with_its_value(tmp_path, given, says):
    name = list(given)[-1]
    flag = f"--{name.replace('_', '-')} {given[name]}: "
    with pytest.raises(ValueError, match=f"^{re.escape(flag)}.*{says}") as error:
        ddpo.check(ddpo.Config(device="cpu", out=str(tmp_path), **given))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [
    dict(RANK="1"), dict(RANK="x"), dict(WORLD_SIZE=""), dict(WORLD_SIZE="0"),
    dict(WORLD_SIZE="2", RANK="2")])
def test_a_place_among_processes_that_cannot_be_is_one_line(given, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        ddpo.main(["--reward", "compress"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    names = [name for name in ("RANK", "WORLD_SIZE") if name in given]
    assert error.startswith(" ".join(f"{name}={given[name]}" for name in names) + ": ")


def test_a_share_of_the_steps_is_not_rounded_up_by_a_rounding_error(monkeypatch):
    monkeypatch.setattr(ddpo, "epoch_table", lambda config, *_: (torch.zeros(50, 4), torch.arange(50)))
    for share, steps in ((0.14, 7), (0.28, 14), (0.141, 8), (0.001, 1), (1.0, 50)):  # 0.14 · 50 > 7
        run = SimpleNamespace(config=ddpo.Config(train_first=share, updates=1), pipeline=None, device="cpu")
        assert len(ddpo.epoch_steps(run, 1)[1]) == steps


def test_apples_gpu_is_chosen_by_nobody_but_the_user_and_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.zeros(0))  # no GPU here to ask
    config = ddpo.Config()
    settings.check_machine(config)
    assert config.device == "cpu"
    settings.check_machine(ddpo.Config(device="mps"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^--device mps: gloo knows no mps"):
        settings.check_machine(ddpo.Config(device="mps"))


def test_weights_that_move_are_not_put_into_a_graph(monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: True)  # as if it were installed,
    monkeypatch.setattr(settings.torch, "empty", lambda *_, device: None)  # on a machine with a GPU
    monkeypatch.setattr(settings, "try_kernels", lambda config: None)
    given = dict(device="cuda:0", optimizer="adamw8bit", cuda_graph=True)
    with pytest.raises(ValueError, match="^--optimizer adamw8bit: puts weights in new places"):
        settings.check_machine(ddpo.Config(**given))
    settings.check_machine(ddpo.Config(**given, lora_rank=4))
    settings.check_machine(ddpo.Config(**given | dict(cuda_graph=False)))


@pytest.mark.parametrize("arguments, prompts", [
    ([], "animals"), (["--reward", "align"], "animals"),  # the emoji model knows no activities
    (["--preset", "sd15"], "imagenet_animals"), (["--preset", "sd15", "--reward", "aesthetic"], "animals"),
    (["--preset", "sd15", "--reward", "align=a/vlm@b/encoder"], "animal_activities"),
    (["--preset", "sd15-24gb", "--reward", "incompress"], "imagenet_animals"),
    (["--preset", "sd15", "--reward", "align", "--prompts", "objects"], "objects")])
def test_each_reward_is_trained_on_the_prompts_of_the_paper_where_none_are_given(arguments, prompts):
    assert ddpo.parse_config(arguments)[0].prompts == prompts


def test_help_is_shown_also_where_the_terminal_has_no_greek():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([sys.executable, "ddpo.py", "--help"], cwd=ROOT, env=environment, check=True,
                           capture_output=True, text=True).stdout
    assert "E[ ?_t A ? log p" in shown
