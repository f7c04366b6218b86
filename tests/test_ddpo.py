"""Claims about the estimators and the loop: advantages, losses, runs that learn, runs that are killed,
settings that cannot work."""

import dataclasses
import inspect
import json
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import ddpo
import models
import processes
import scripts
from ddpo import Config, PromptStats, batch_advantages, clip_range_for, group_advantages, is_loss, sf_loss
from models import default_dtype
from scripts import finish, flags, numbers
from run_folder import load_checkpoint, read_metrics, save_checkpoint, save_weights
from sample import ddim_step, load_pipeline
from stable_diffusion import small_model

ROOT = Path(__file__).parents[1]
SMALL = dict(
    model=small_model(), preset="emoji", images=8, sample_batch=4, train_batch=4, steps=4, epochs=2,
    eval_images=4, eval_every=1, group_size=2, watch="", updates=2, lora_rank=8, lr=3e-3, device="cpu",
)


start = partial(scripts.start, "ddpo.py")


def test_a_prompt_is_compared_with_the_batch_until_it_has_enough_rewards_then_with_itself():
    stats = PromptStats(buffer_size=4, min_count=3)
    first = stats.advantages(["a", "a", "b"], [1.0, 3.0, 8.0])
    rewards = torch.tensor([1.0, 3.0, 8.0])
    torch.testing.assert_close(first, (rewards - 4.0) / (rewards.std(correction=0) + 1e-6))
    second = stats.advantages(
        ["a", "b"], [5, 8]
    )  # whole numbers, and "a" now has 1, 3, 5: extended first, then normalised
    torch.testing.assert_close(
        second[0].item(), 2.0 / (torch.tensor([1.0, 3, 5]).std(correction=0).item() + 1e-6)
    )
    assert second.dtype == torch.float32
    stats.advantages(["a", "a"], [7.0, 9.0])
    assert list(stats.buffers["a"]) == [3.0, 5.0, 7.0, 9.0]  # the oldest is forgotten


def test_large_weights_of_a_mixture_keep_their_proportion():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(16, generator=generator).tolist() for name in ("a", "b")}

    def mixed(**weights):
        config = Config(images=16, group_size=4)
        return ddpo.mixed_advantages(SimpleNamespace(config=config, components=weights), [], scores, None)

    torch.testing.assert_close(mixed(a=30.0, b=-70.0) / 100, mixed(a=0.3, b=-0.7))


def test_equal_rewards_have_no_advantage():
    equal = [torch.tensor(-120.3).item()] * 24  # not a binary fraction, so float32 means miss it
    for advantages in (
        PromptStats(32, 16).advantages(["a cat"] * 24, equal),
        batch_advantages(equal),
        group_advantages(equal, 3),
    ):
        assert advantages.tolist() == [0] * 24 and advantages.dtype == torch.float32
    for advantages in (
        PromptStats().advantages(["a"] * 4, [2.0] * 4),
        batch_advantages([2.0] * 4),
        group_advantages([2.0] * 4, 2),
    ):
        assert advantages.tolist() == [0, 0, 0, 0]


def test_a_group_is_compared_with_the_mean_of_its_other_pictures():
    advantages = group_advantages([1.0, 2.0, 6.0, 10.0, 10.0, 10.0], 3)
    difference = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    torch.testing.assert_close(advantages, difference / difference.square().mean().sqrt())


def test_both_estimators_have_the_same_gradient_on_policy():
    log_prob = torch.randn(16, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(16, dtype=torch.float64)
    (sf,) = torch.autograd.grad(sf_loss(log_prob, advantages).sum(), log_prob)
    (importance,) = torch.autograd.grad(
        is_loss(log_prob, log_prob.detach(), advantages, 1e-4).sum(), log_prob
    )
    torch.testing.assert_close(sf, importance)


def test_the_clip_stops_a_picture_that_has_moved_far_enough_and_only_then():
    log_ratio = torch.tensor([0.2, 0.2, -0.2, -0.2, 0.05], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    loss = is_loss(log_ratio, torch.zeros_like(advantages), advantages, 0.1)
    ratio = log_ratio.exp()
    expected = torch.stack([-torch.tensor(1.1), ratio[1], -ratio[2], torch.tensor(0.9), -ratio[4]]).double()
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(
        gradient, torch.stack([ratio[0] * 0, ratio[1], -ratio[2], ratio[3] * 0, -ratio[4]]).detach()
    )


@pytest.mark.skipif(ddpo.kernels.triton is None, reason="no triton on this machine")
@pytest.mark.parametrize("clip_range", [0.01, None])
def test_the_kernels_loss_is_that_of_the_formulas_where_it_is_clipped_too(monkeypatch, clip_range):
    device, generator = "cuda" if torch.cuda.is_available() else "cpu", torch.Generator().manual_seed(0)
    x, x_next, output = torch.randn(3, 10, 4, 8, 8, generator=generator).to(device)
    row = torch.tensor([0.9, -0.3, 1.0, 0.0], device=device)
    off = torch.tensor([0.5, -0.5, 1.5, -1.5, 5.0] * 2, device=device)  # clip ranges away from 1
    old = ddim_step(output, x, row, x_next)[1] - 0.01 * off
    advantages = torch.tensor([1.5] * 5 + [-0.7] * 5, device=device)
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(ddpo.kernels, "BACKEND", backend)
        leaf = output.clone().requires_grad_()
        objective, *values = ddpo.policy_loss(leaf, x, x_next, row, old, advantages, clip_range, None,
                                              torch.tensor(0.1, device=device))
        objective.backward()
        found.append([*values, leaf.grad])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_the_clip_range_means_the_same_nats_for_every_latent():
    assert clip_range_for(1e-4, (4, 64, 64)) == 1e-4
    assert clip_range_for(1e-4, (4, 16, 16)) * 4 * 16 * 16 == pytest.approx(1e-4 * 4 * 64 * 64)


def test_the_public_signatures_are_these():
    assert list(inspect.signature(is_loss).parameters) == [
        "log_prob", "old_log_prob", "advantages", "clip_range",
    ]
    assert list(inspect.signature(PromptStats).parameters) == ["buffer_size", "min_count"]
    assert list(inspect.signature(PromptStats.advantages).parameters) == ["self", "prompts", "rewards"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    code, out, err = finish(start("--reward", "compress", **SMALL | dict(epochs=3, out=folder)))
    assert code == 0, err
    assert out.splitlines()[-1].startswith("next: python sample.py")
    return folder / "compress"


def test_a_run_leaves_what_the_readme_says(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert {
        "images", "reward_mean", "reward_std", "loss", "approx_kl", "clip_fraction", "ratio_error",
        "grad_norm", "seconds", "images_per_second", "eval_reward",
    } <= set(rows[-1])
    for name in (
        "config.json",
        "rewards.png",
        "progress.png",
        "pytorch_lora_weights.safetensors",
        "checkpoint/epoch_000003.pt",
    ):
        assert (run / name).stat().st_size > 0
    assert set(json.loads((run / "config.json").read_text())) == set(Config.__dataclass_fields__)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_numbers(run, tmp_path):
    moments = random.Random(
        seed := time.time_ns()
    )  # any moment must do, so each run of this test tries others
    print("moments:", seed)
    process = start("--reward", "compress", **SMALL | dict(epochs=3, out=tmp_path))
    while not (tmp_path / "compress/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        time.sleep(moments.uniform(0, 4))
        process.send_signal(signal_number)
        _, _, err = finish(process)
        if signal_number == signal.SIGTERM and process.returncode not in (0, -signal.SIGTERM):
            assert process.returncode == 130 and "--resume" in err
        process = start("--resume", str(tmp_path / "compress"))
        time.sleep(moments.uniform(5, 8))
    code, _, err = finish(process)
    assert code == 0, err
    resumed, whole = load_checkpoint(tmp_path / "compress/checkpoint"), load_checkpoint(run / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(resumed["parameters"], whole["parameters"], strict=True))
    assert numbers(tmp_path / "compress") == numbers(run)


def test_a_run_with_damaged_metrics_is_not_resumed_over_them_and_one_without_checkpoint_says_so(
    run, tmp_path, capsys
):
    shutil.copytree(run, tmp_path / "broken")
    damaged = "{" + (run / "metrics.jsonl").read_text()
    (tmp_path / "broken/metrics.jsonl").write_text(damaged)
    with pytest.raises(SystemExit) as stop:
        ddpo.main(["--resume", str(tmp_path / "broken"), "--epochs", "4"])
    assert stop.value.code == 2 and "metrics.jsonl lacks rows" in capsys.readouterr().err
    assert (tmp_path / "broken/metrics.jsonl").read_text() == damaged
    (tmp_path / "broken/metrics.jsonl").write_text(damaged[1:])
    shutil.rmtree(tmp_path / "broken/checkpoint")
    ddpo.main(["--resume", str(tmp_path / "broken"), "--epochs", "1"])
    assert "no checkpoint yet; it begins again" in capsys.readouterr().err
    assert numbers(tmp_path / "broken")[2:] == numbers(run)[2:]  # the log is not shortened


def test_an_existing_run_is_never_overwritten(run, capsys):
    with pytest.raises(SystemExit) as stop:
        ddpo.main(flags(reward="compress", out=run.parent))
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    newest = tmp_path / "checkpoint/epoch_000003.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert load_checkpoint(tmp_path / "checkpoint")["epoch"] == 2
    assert "epoch_000003.pt: damaged" in capsys.readouterr().err


def test_plain_diffusers_loads_the_adapter_and_draws_the_same_picture(run):
    def draw(pipeline):
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipeline(
            ["a cat", "a fox"], num_inference_steps=5, guidance_scale=4.0, latents=noise, output_type="pt"
        ).images

    plain = StableDiffusionPipeline.from_pretrained(small_model(), torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    base = draw(plain)
    plain.load_lora_weights(str(run))
    plain.scheduler = load_pipeline(small_model(), "cpu").scheduler
    tuned = draw(plain)
    assert (tuned - base).abs().max() > 1e-3
    torch.testing.assert_close(
        tuned, draw(load_pipeline(small_model(), "cpu", lora=run)), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize(
    "settings", [dict(dtype="fp32"), dict(), dict(lora_rank=0)]
)  # and in bf16, where it is the default: elsewhere it takes minutes
def test_the_ratio_is_one_before_the_first_update(tmp_path, settings):
    settings = SMALL | dict(model="models/emoji") | settings
    folder = ddpo.train(Config(out=str(tmp_path), **settings))
    assert [row["ratio_error"] for row in read_metrics(folder / "metrics.jsonl")[1:]] == [0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        dict(algorithm="sf", updates=1, advantages="batch"),
        dict(advantages="prompt", min_count=2, inner_epochs=2),
        dict(reward="compress:0.5,incompress:0.1", lora_rank=0),
        dict(train_guidance=False, guidance_scale=1.0),
    ],
)
def test_every_variant_runs_and_changes_the_weights(tmp_path, settings):
    folder = ddpo.train(Config(out=str(tmp_path), name="variant", **SMALL | dict(epochs=1) | settings))
    assert read_metrics(folder / "metrics.jsonl")[1]["grad_norm"] > 0
    if settings.get("lora_rank") == 0:
        tuned, base = (
            load_file(folder_ / "unet/diffusion_pytorch_model.safetensors")
            for folder_ in (folder, Path(small_model()))
        )
        assert any(not torch.equal(tuned[key], base[key].float()) for key in tuned)
    else:
        up = [
            value
            for key, value in load_file(folder / "pytorch_lora_weights.safetensors").items()
            if "lora_B" in key or ".up." in key
        ]
        assert any(value.abs().max() > 0 for value in up)


@pytest.mark.skipif(ddpo.kernels.triton is None, reason="no triton on this machine")
def test_the_triton_kernels_give_the_same_training_curve(tmp_path, monkeypatch):
    rows = {}
    for backend in ("torch", "triton"):  # triton: in its interpreter where there is no GPU
        monkeypatch.setattr(ddpo.kernels, "BACKEND", "auto")
        folder = ddpo.train(
            Config(
                out=str(tmp_path),
                name=backend,
                kernels=backend,
                dtype="fp32",
                **SMALL | dict(steps=3, device=""),
            )
        )
        rows[backend] = [
            {key: row[key] for key in ("reward_mean", "loss", "grad_norm", "eval_reward")}
            for row in numbers(folder)[1:]
        ]
        assert [row["ratio_error"] for row in numbers(folder)[1:]] == [0.0, 0.0]
    for torch_row, triton_row in zip(rows["torch"], rows["triton"]):
        assert triton_row == pytest.approx(torch_row, rel=2e-2, abs=2e-5)  # Adam magnifies the last bits


def test_a_short_run_raises_its_reward_beyond_chance(tmp_path):
    config = Config(
        out=str(tmp_path),
        watch="",
        device="cpu",
        images=48,
        sample_batch=24,
        steps=5,
        guidance_scale=1.0,  # half the work
        epochs=3,
        warmup=0,
        lr=2e-4,
        ema=0.0,
        eval_images=32,
        eval_every=3,
    )
    rows = read_metrics(ddpo.train(config) / "metrics.jsonl")
    standard_error = rows[-1]["reward_std"] / 32**0.5
    assert (
        rows[-1]["eval_reward"] - rows[0]["eval_reward"] > standard_error
    )  # the same prompts and seeds: a fraction of that is chance


COUNTING = """
def seen(images, prompts):
    seen.log_counts["pictures"] += len(images)
    return [0.0] * len(images)

seen.log_counts = {"pictures": 0}
"""


def test_what_a_reward_counts_is_of_each_epochs_pictures_also_after_a_resume(tmp_path):
    (tmp_path / "seen.py").write_text(COUNTING)
    config = Config(
        out=str(tmp_path), reward="compress", **SMALL | dict(watch=f"{tmp_path}/seen.py:seen", epochs=1)
    )
    folder = ddpo.train(config)
    ddpo.train(dataclasses.replace(config, epochs=2), resume=True)
    assert [row[f"{config.watch}_pictures"] for row in numbers(folder)[1:]] == [
        8,
        8,
    ]  # and not those of evaluations


def test_two_processes_train_like_one(tmp_path):
    (tmp_path / "seen.py").write_text(COUNTING)
    settings = SMALL | dict(
        dtype="fp32", sample_batch=2, train_batch=2, lr=1e-4, warmup=0, advantages="prompt",
        min_count=2, watch=f"{tmp_path}/seen.py:seen",
    )
    split = start("--reward", "compress", processes=2, **settings | dict(out=tmp_path, name="split"))
    ddpo.train(Config(reward="compress", **settings | dict(out=str(tmp_path), name="whole")))
    code, _, err = finish(split)
    assert code == 0, err
    whole, split = (load_checkpoint(tmp_path / name / "checkpoint") for name in ("whole", "split"))
    difference = torch.cat(
        [(a - b).abs().flatten() for a, b in zip(split["parameters"], whole["parameters"], strict=True)]
    )
    assert (
        difference.max() <= 1e-5 and difference.mean() <= 1e-7
    )  # four steps of 1e-4 by Adam, which magnifies the last bits
    assert [
        row[f"{settings['watch']}_pictures"]
        for name in ("whole", "split")
        for row in numbers(tmp_path / name)[1:]
    ] == [8] * 4
    whole, split = (numbers(tmp_path / name)[1:] for name in ("whole", "split"))
    for a, b in zip(whole, split, strict=True):
        assert a["reward_mean"] == pytest.approx(
            b["reward_mean"], abs=0.01
        )  # a JPEG is some bytes longer or shorter
        assert a["approx_kl"] > 0  # a sum over the pairs of all processes
        assert a["approx_kl"] == pytest.approx(b["approx_kl"], rel=0.05)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", {"epoch": 1, "parameters": [torch.zeros(1000)]})
    pipeline = load_pipeline("models/emoji", "cpu")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # the system refuses to write on, as when a disk is full
    try:
        with pytest.raises(OSError, match="make room, then --resume"):
            save_checkpoint(tmp_path / "checkpoint", {"epoch": 2, "parameters": [torch.zeros(1_000_000)]})
        with pytest.raises(OSError, match="make room, then --resume"):
            save_weights(pipeline, Config(lora_rank=0), tmp_path)
        with pytest.raises(
            OSError, match=f"--resume {tmp_path}$"
        ):  # the run's folder, not that of its newest weights
            save_weights(pipeline, Config(lora_rank=0), tmp_path / "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["epoch_000001.pt"]
    assert not (tmp_path / "weights.tmp").exists()
    assert load_checkpoint(tmp_path / "checkpoint")["epoch"] == 1


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--reward", "beauty"], "beauty"),
        (["--reward", "no_such_file.py:f"], "no_such_file.py"),
        (["--watch", "beauty"], "beauty"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--preset", "huge"], "huge"),
        (["--dtype", "int8"], "int8"),
        (["--dtype", "fp16"], "fp16"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
        (["--kernels", "triton"], "--kernels triton: "),
        (["--device", "meta"], "--device meta: cannot be used here"),
        (["--prompts", "no_such.txt"], "no_such.txt"),
        (["--prompts", "EMPTY"], "no prompt"),
        (["--epochs", "0"], "epochs"),
        (["--lr", "nan"], "lr"),
        (["--lr", "-1"], "lr"),
        (["--clip-range", "0"], "clip-range"),
        (["--images", "10"], "multiple of"),
        (["--images", "-8"], "images"),
        (["--group-size", "1"], "group-size"),
        (["--steps", "2000"], "2000"),
        (["--eta", "0"], "eta"),
        (["--eta", "inf"], "eta"),
        (["--timestep-fraction", "0"], "timestep-fraction"),
        (["--algorithm", "ppo"], "ppo"),
        (["--algorithm", "sf", "--updates", "2"], "sf"),
        (["--lora-rank", "4", "--lora-targets", "no_such_layer"], "no_such_layer"),
        (["--lora-targets", "to_q"], "needs --lora-rank"),
        (["--model", "./no/such/folder"], "no such folder"),
        (["--resume", "no/such/run"], "no/such/run"),
        (["--resume", "models/emoji/unet"], "not that of a run"),
        (["--epochs", "x"], "epochs"),
        (["--reward", "WRONG_SHAPE"], "shape"),
        (["--reward", "NAN"], "nan"),
        (["--watch", "some.py:score_std"], "_std"),
        (["--watch", "clip:0.5"], "write clip"),
        (["--lora-rank", "4", "--lora-targets", "to_q,to_kk"], "'to_kk'"),
        (["--guidance-scale", "-2"], "guidance-scale"),
        (["--advantages", "prompt", "--buffer-size", "8"], "--min-count 16"),
        (["--images", "40"], "32 would do"),
        (["--reward", "compress:x"], "weight"),
        (["--tracker", "abacus"], "abacus"),
        (["--model", "BENT"], "thresholding"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing_behind(
    tmp_path, capsys, monkeypatch, arguments, names
):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "bad.py").write_text(
        "def shape(images, prompts): return [0.0]\n"
        "def nan(images, prompts): return [float('nan')] * len(images)\n"
    )
    if "BENT" in arguments:
        shutil.copytree(ROOT / "models/emoji", tmp_path / "bent")
        config = tmp_path / "bent/scheduler/scheduler_config.json"
        config.write_text(config.read_text().replace('"thresholding": false', '"thresholding": true'))
    places = {"EMPTY": "empty.txt", "WRONG_SHAPE": "bad.py:shape", "NAN": "bad.py:nan", "BENT": "bent"}
    arguments = [str(tmp_path / places[word]) if word in places else word for word in arguments]
    if arguments[0] != "--resume":
        safe = dict(
            out=tmp_path / "runs", epochs=1, steps=2, device="cpu"
        )  # should a check fail, what starts ends soon
        arguments += flags(**{key: value for key, value in safe.items() if f"--{key}" not in arguments})
    with pytest.raises(SystemExit) as stop:
        ddpo.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and names in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_each_process_needs_a_picture_to_look_at_and_takes_its_own_gpu_also_after_a_resume(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--eval-images 1: must be at least 2"):
        ddpo.check(Config(device="cpu", eval_images=1))
    used = []
    monkeypatch.setattr(
        torch, "empty", lambda *size, device: used.append(device) or torch.zeros(0)
    )  # no GPU here to ask
    for device in ("cuda", "cuda:0"):  # as given, and as the config.json of rank 0 has it
        ddpo.check(Config(device=device, images=64))
    assert set(used) == {"cuda:1"}


def test_the_default_dtype_is_one_that_this_machine_is_fast_in():
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(5):
            clock = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - clock)
        seconds[name] = min(times)
    # without instructions for bf16 it takes fifty to a hundred times as long, with them less than fp32
    assert seconds[ddpo.check(ddpo.Config(device="cpu")).dtype] < 4 * min(seconds.values())


def test_a_gpu_computes_in_fp16_but_for_flux_and_trains_in_the_batches_it_samples_in():
    assert default_dtype("cuda:1") == "fp16"  # whose rounding the clip range bears
    for name, preset in ddpo.PRESETS.items():
        assert name == "emoji" or preset["sample_batch"] == preset["train_batch"]
        assert preset.get("dtype") == ("bf16" if "flux" in name else None)


@pytest.mark.parametrize(
    "error, raised",
    [
        (RuntimeError("Connection closed by peer"), processes.PeerLost),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError),
        (processes.OURS[-1]("an illegal memory access"), processes.OURS[-1]),
    ],
)
def test_only_what_the_others_did_is_put_down_to_them(error, raised):
    with pytest.raises(raised), processes.peers():
        raise error


def test_a_collective_that_fails_where_nobody_has_ended_says_why(monkeypatch, capsys):
    def fail(arguments):
        with processes.peers():
            raise torch.distributed.DistBackendError("NCCL error, unhandled system error\nLast error: shm")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit) as stop:
        processes.command_line([], fail, None, None)
    assert stop.value.code == 1 and "unhandled system error" in capsys.readouterr().err


def test_the_shipped_model_has_its_preset_however_its_path_is_written():
    for model in ("models/emoji", "./models/emoji/", str(ROOT / "models/emoji")):
        assert ddpo.parse_config(["--model", model])[0].preset == "emoji"
    assert ddpo.parse_config(["--model", "other/model"])[0].preset == "sd15"


def test_a_reward_that_breaks_half_way_stops_the_run_and_names_the_picture(tmp_path, capsys):
    (tmp_path / "late.py").write_text(
        "calls = []\ndef reward(images, prompts):\n    calls.append(0)\n"
        "    return [float('nan') if len(calls) > 6 else 1.0 + i for i in range(len(images))]\n"
    )
    with pytest.raises(SystemExit) as stop:
        ddpo.main(
            flags(reward=tmp_path / "late.py:reward", name="late", **SMALL | dict(out=tmp_path, epochs=9))
        )
    message = str(stop.value.code)
    assert "nan" in message and "--resume" in message and len(message.splitlines()) == 1
    picture = tmp_path / "late/bad_reward.png"
    assert (
        picture.exists()
        and str(picture) in message
        and load_checkpoint(tmp_path / "late/checkpoint")["epoch"] >= 1
    )


def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(monkeypatch):
    for flags_, dtype in (("avx512f avx512_bf16", "bf16"), ("avx512f", "fp32")):
        monkeypatch.setattr(
            models,
            "Path",
            lambda _, flags_=flags_: SimpleNamespace(exists=lambda: True, read_text=lambda: flags_),
        )
        assert default_dtype("cpu") == dtype and default_dtype("mps") == "fp32"
