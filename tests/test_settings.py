"""Claims about the command line: each setting is explained where it is defined, and shown under --help."""

import re
from dataclasses import fields
from importlib import import_module

import pytest

import ddpo
import settings
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
    (dict(checkpoint_every=0), "must be at least 1"), (dict(warmup=-1), "must not be negative"),
    (dict(weight_decay=-0.1), "must not be negative"), (dict(guard=-1.0), "must not be negative"),
    (dict(grad_clip=0.0), "must be above 0"), (dict(window="0:4", window_shift="7/1"), "cannot move so far")])
def test_a_setting_out_of_its_range_is_named_with_its_value(tmp_path, given, says):
    name = list(given)[-1]
    flag = f"--{name.replace('_', '-')} {given[name]}: "
    with pytest.raises(ValueError, match=f"^{re.escape(flag)}.*{says}") as error:
        ddpo.check(ddpo.Config(device="cpu", out=str(tmp_path), **given))
    assert "\n" not in str(error.value)


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
