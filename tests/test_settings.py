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
