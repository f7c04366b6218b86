"""Claims about the sampler: its step is diffusers' DDIM, its log-probabilities are those of a Gaussian, and
its command line draws what it is asked for."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from PIL import Image

import loading
import sample
from run_folder import save_weights
from sample import ddim_step, ddim_table, decode, encode_prompts, load_pipeline, predict, sample_trajectories
from stable_diffusion import save_pipeline
from training import make_trainable

ROOT = Path(__file__).parents[1]
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")


def scheduler(**changes):
    return DDIMScheduler(**(STABLE_DIFFUSION | changes))


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("models/emoji", "cpu")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps, eta", [(50, 1.0), (20, 1.0), (10, 0.3), (7, 0.0), (500, 1.0)])
def test_every_step_is_the_step_of_diffusers_ddim(prediction_type, steps, eta):
    theirs = scheduler(prediction_type=prediction_type)
    theirs.set_timesteps(steps)
    timesteps, table = ddim_table(theirs, steps, eta)
    assert timesteps.tolist() == theirs.timesteps.tolist()
    for row in [*range(0, steps, max(1, steps // 9)), steps - 1]:  # the last one has no timestep before it
        x, output, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
        expected = theirs.step(output, timesteps[row], x, eta=eta, variance_noise=noise).prev_sample
        c_x, c_o, sigma, _ = table[row].double()
        torch.testing.assert_close(c_x * x + c_o * output + sigma * noise, expected, rtol=2e-5, atol=2e-5)


def test_fifty_steps_of_stable_diffusion_start_at_981_and_end_at_1():
    timesteps, _ = ddim_table(scheduler(), 50)
    assert timesteps[[0, 1, -1]].tolist() == [981, 961, 1]


def test_the_log_prob_is_the_mean_log_density_of_a_normal_distribution():
    torch.manual_seed(0)
    _, table = ddim_table(scheduler(), 20)
    for row in (0, 10, 19):
        x, output = torch.randn(2, 3, 4, 8, 8)
        drawn, log_prob = ddim_step(output, x, table[row])
        c_x, c_o, sigma, _ = table[row].double()
        density = torch.distributions.Normal(c_x * x.double() + c_o * output.double(), sigma)
        expected = density.log_prob(drawn.double()).mean((1, 2, 3))
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_drawn_step_scores_the_same_bit_for_bit_when_it_is_scored_again(dtype):
    _, table = ddim_table(scheduler(), 50)
    for row in range(50):
        x, output = torch.randn(2, 5, 4, 8, 8).to(dtype)
        drawn, log_prob = ddim_step(output, x, table[row])
        assert drawn.dtype == dtype
        again, scored = ddim_step(output, x, table[row], next_latents=drawn)
        assert torch.equal(again, drawn) and torch.equal(scored, log_prob)


def test_rows_may_have_their_own_timesteps():
    _, table = ddim_table(scheduler(), 20)
    x, output, x_next = torch.randn(3, 4, 4, 8, 8)
    together = ddim_step(output, x, table[[0, 5, 10, 19]], x_next)[1]
    alone = [ddim_step(output[i:i + 1], x[i:i + 1], table[row], x_next[i:i + 1])[1]
             for i, row in enumerate([0, 5, 10, 19])]
    assert torch.equal(together, torch.cat(alone))


def test_a_step_without_noise_is_deterministic_and_its_log_prob_is_0():
    _, table = ddim_table(scheduler(set_alpha_to_one=True), 20)
    assert table[-1, 2] == 0 and (table[:-1, 2] > 0).all()
    x, output = torch.randn(2, 2, 4, 8, 8)
    (first, log_prob), (second, _) = ddim_step(output, x, table[-1]), ddim_step(output, x, table[-1])
    assert torch.equal(first, second) and log_prob.tolist() == [0, 0]


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
def test_a_scheduler_that_bends_the_step_is_refused(option):
    with pytest.raises(ValueError, match=option):
        ddim_table(scheduler(**{option: True}), 20)


@pytest.mark.parametrize("steps, eta", [
    (0, 1.0), (1000, 1.0), (1001, 1.0), (20, -0.1), (20, 1.5), (20, math.nan)])
def test_steps_and_eta_out_of_range_are_refused(steps, eta):
    with pytest.raises(ValueError, match="steps" if eta == 1.0 else "eta"):
        ddim_table(scheduler(), steps, eta)


def test_guidance_in_the_step_is_guidance_before_the_step():
    _, table = ddim_table(scheduler(), 20)
    uncond, cond, x, x_next = torch.randn(4, 3, 4, 8, 8)
    fused = ddim_step(torch.cat([uncond, cond]), x, table[3], x_next, guidance_scale=4.0)[1]
    torch.testing.assert_close(fused, ddim_step(uncond + 4.0 * (cond - uncond), x, table[3], x_next)[1])


@pytest.mark.parametrize("dtype, steps", [(torch.float32, 6), (torch.bfloat16, 2)])
def test_a_stored_walk_scores_as_it_did_when_it_was_sampled(pipeline, dtype, steps):
    prompts = ["a cat", "a dog", "a fox"]
    generator = torch.Generator().manual_seed(0)
    walk = sample_trajectories(pipeline, prompts, steps, 4.0, generator=generator, dtype=dtype)
    assert walk.latents.shape == (3, steps + 1, 8, 16, 16) and walk.latents.dtype == torch.float32
    assert walk.log_probs.shape == (3, steps) and walk.timesteps.shape == (steps,)
    assert walk.images.shape == (3, 3, 64, 64) and walk.images.dtype == torch.uint8
    _, table = ddim_table(pipeline.scheduler, steps)
    embeds, negative = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""])
    for step, t in enumerate(walk.timesteps):
        x, x_next = walk.latents[:, step], walk.latents[:, step + 1]
        output = predict(pipeline.unet, x, t.expand(3), embeds, negative, dtype)
        _, log_prob = ddim_step(output, x, table[step], x_next, guidance_scale=4.0)
        assert torch.equal(log_prob, walk.log_probs[:, step])
    assert torch.equal(decode(pipeline, walk.latents[:, -1]), walk.images)


def test_a_picture_with_its_own_generator_does_not_depend_on_its_batch(pipeline):
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = sample_trajectories(pipeline, ["a cat", "a dog"], 5, 4.0, generator=generators(1, 2)).images
    alone = sample_trajectories(pipeline, ["a dog"], 5, 4.0, generator=generators(2)).images
    assert (together[1].int() - alone[0].int()).abs().max() <= 1  # other batch sizes may round otherwise


def test_sampling_without_noise_agrees_with_diffusers_own_pipeline(pipeline):
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipeline("a frog", num_inference_steps=10, guidance_scale=4.0, eta=0.0, latents=noise,
                      output_type="pt").images
    generator = torch.Generator().manual_seed(3)
    ours = sample_trajectories(pipeline, ["a frog"], 10, 4.0, 0.0, generator=generator).images
    assert ((theirs * 255).round() - ours).abs().max() <= 2


@pytest.mark.parametrize("model", ["emoji", "emoji-flow"])
def test_the_model_card_s_example_runs_in_plain_diffusers(model, monkeypatch):
    if model == "emoji-flow":
        pytest.importorskip("diffusers", minversion="0.35", reason="its pipeline takes no flow scheduler")
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", Path(f"models/{model}/README.md").read_text(), re.S)[1]
    names = {}
    exec(code.replace("StableDiffusionPipeline.from", "picture = StableDiffusionPipeline.from"), names)
    assert names["picture"].size == (64, 64)


def test_the_flow_model_draws_what_the_plain_pipeline_draws():
    pytest.importorskip("diffusers", minversion="0.35", reason="its pipeline takes no flow scheduler")
    ours = load_pipeline("models/emoji-flow", "cpu")
    plain = StableDiffusionPipeline.from_pretrained(ROOT / "models/emoji-flow", safety_checker=None,
                                                    torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = plain("a frog", num_inference_steps=10, guidance_scale=4.0, latents=noise,
                   output_type="latent").images
    generator = torch.Generator().manual_seed(3)
    drawn = sample_trajectories(ours, ["a frog"], 10, 4.0, 0.0, generator=generator).latents[:, -1]
    torch.testing.assert_close(drawn, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model, names", [
    ("no/such/model", "no/such/model"), ("prompts", "model_index.json"),
    ("no/such.safetensors", "from_single_file"), ("such.ckpt", "from_single_file")])
def test_a_model_that_cannot_be_loaded_is_one_line(model, names):
    with pytest.raises(ValueError, match=names) as error:
        load_pipeline(model, "cpu")
    assert "\n" not in str(error.value)


def test_the_command_line_draws_a_grid(tmp_path):
    sample.main(["--prompt", "a cat", "--prompt", "a fox", "--images", "2", "--steps", "2",
                 "--out", str(tmp_path / "grid.png")])
    width, height = Image.open(tmp_path / "grid.png").size
    assert width >= 2 * 96 and height >= 2 * 96


def test_a_sheet_too_large_for_its_format_is_saved_as_png_and_cut_prompts_are_told(
        tmp_path, capsys, monkeypatch):
    black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(sample, "sample_trajectories", lambda _, prompts, *rest, **more: SimpleNamespace(
        images=black.expand(len(prompts), -1, -1, -1)))
    arguments = ["--prompt", "a cat " * 20, "--images", "180", "--out", str(tmp_path / "grid.webp")]
    sample.main(arguments)
    assert Image.open(tmp_path / "grid.png").width > 16383
    (tmp_path / "grid.png").write_text("somebody's")
    sample.main(arguments)  # not over that one
    assert Image.open(tmp_path / "grid.webp.png").width > 16383
    assert (tmp_path / "grid.png").read_text() == "somebody's"
    said = capsys.readouterr().err
    assert "prompts: 1 of 1 have more than the 20 tokens" in said and "saved as" in said


def test_weights_are_not_taken_for_those_of_a_model_that_predicts_something_else(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model": "models/emoji"}')
    shutil.copytree(ROOT / "models/emoji/unet", tmp_path / "unet")  # the same layers in both models
    assert load_pipeline("models/emoji", "cpu", lora=tmp_path)
    with pytest.raises(ValueError, match="predicts something else"):
        load_pipeline("models/emoji-flow", "cpu", lora=tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("small") / "model")


def save_run(folder, model, lora_rank, **settings):
    """The folder of a run that has moved every weight a little."""
    pipeline = load_pipeline(model, "cpu")
    config = SimpleNamespace(lora_rank=lora_rank, seed=0, lora_targets="to_q,to_k,to_v,to_out.0")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in make_trainable(pipeline.unet, config):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(pipeline, config, folder)
    defaults = dict(model=model, steps=3, guidance_scale=4.0, eta=1.0, lora_rank=lora_rank, dtype="fp32")
    (folder / "config.json").write_text(json.dumps(defaults | settings))


def test_an_adapter_stays_float32_whatever_the_network_computes_in(small, tmp_path):
    save_run(tmp_path / "run", small, 4)
    exact, half = (load_pipeline(small, "cpu", dtype, lora=tmp_path / "run").unet.state_dict()
                   for dtype in (torch.float32, torch.bfloat16))
    adapter = [key for key in exact if ".tuned." in key]
    assert adapter and all(torch.equal(half[key], exact[key]) for key in adapter)
    assert half["conv_in.weight"].dtype == torch.bfloat16


@pytest.fixture
def grids(monkeypatch):
    """What the command line draws: (rows, names, titles) of each grid."""
    seen, grid = [], sample.picture_grid
    monkeypatch.setattr(sample, "picture_grid", lambda *arguments: seen.append(arguments) or grid(*arguments))
    return seen


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_each_strength_is_drawn_as_a_pipeline_of_its_own_would(small, lora_rank, tmp_path, grids):
    save_run(tmp_path / "run", small, lora_rank)
    sample.main(["--lora", str(tmp_path / "run"), "--lora-scale", "0.5", "1", "--prompt", "a cat", "--prompt",
                 "a fox", "--images", "2", "--batch", "3", "--out", str(tmp_path / "grid.png")])
    (rows, names, titles), = grids
    assert names == [f"{label}: {prompt}" for prompt in ("a cat", "a fox")
                     for label in ("base", "strength 0.5", "strength 1")]
    assert titles == ["seed 0", "seed 1"] and not torch.equal(rows[0], rows[2])
    for i, scale in enumerate((None, 0.5, 1.0)):
        tuned = {} if scale is None else dict(lora=tmp_path / "run", lora_scale=scale)
        own = load_pipeline(small, "cpu", **tuned)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        expected = sample_trajectories(own, ["a fox"] * 2, 3, 4.0, generator=generators).images
        assert (rows[3 + i].int() - expected.int()).abs().max() <= 1  # other batch sizes may round otherwise


def test_labels_are_wrapped():
    rows = [torch.zeros(2, 3, 64, 64, dtype=torch.uint8)]
    grid = sample.picture_grid(rows, ["an otter " * 50], ["an otter with a trumpet " * 50] * 2)
    assert grid.size[0] < 5 * 98


def test_a_run_is_drawn_with_the_settings_that_it_was_trained_with(small, tmp_path, monkeypatch):
    save_run(tmp_path / "run", small, 0, guidance_scale=1.0, eta=0.5, window="1:2", dtype="bf16",
             sampler="cps", sample_batch=2)
    shutil.copytree(tmp_path / "run", tmp_path / "run/last")
    (tmp_path / "run/last/config.json").unlink()
    asked = []
    real = sample.sample_trajectories

    def sample_trajectories(pipeline, prompts, steps, guidance_scale, eta, generators, dtype, *rest, sampler):
        assert pipeline.unet.dtype == torch.float32  # as it was trained
        asked.append((len(prompts), steps, guidance_scale, eta.tolist(), dtype, sampler))
        return real(pipeline, prompts, steps, guidance_scale, eta, generators, dtype, *rest, sampler=sampler)

    monkeypatch.setattr(sample, "sample_trajectories", sample_trajectories)
    command = ["--prompt", "a cat", "--images", "4", "--out", str(tmp_path / "a.png"), "--lora"]
    for folder in ("run", "run/last"):  # the newest weights, where the guard has kept older ones
        sample.main([*command, str(tmp_path / folder)])
    # two models, two batches, two folders
    assert asked == [(2, 3, 1.0, [0.0, 0.5, 0.0], torch.bfloat16, "cps")] * 8
    asked.clear()
    run = str(tmp_path / "run")
    sample.main([*command, run, "--steps", "2", "--guidance-scale", "5"])  # the window is of three steps
    sample.main([*command, run, "--eta", "0", "--batch", "4", "--dtype", "fp32"])
    sample.main([*command, run, "--sampler", "dance", "--batch", "4"])
    sample.main([*command, run, "--eta", "0.25", "--batch", "4"])  # asked for: in every step
    assert asked == ([(2, 2, 5.0, [0.5, 0.5], torch.bfloat16, "cps")] * 4
                     + [(4, 3, 1.0, [0.0] * 3, torch.float32, "cps")] * 2
                     + [(4, 3, 1.0, [0.0, pytest.approx(0.3), 0.0], torch.bfloat16, "dance")] * 2
                     + [(4, 3, 1.0, [0.25] * 3, torch.bfloat16, "cps")] * 2)


@pytest.mark.parametrize("arguments, names", [
    (["--steps", "0"], "--steps 0"), (["--device", "toaster"], "toaster"), (["--images", "0"], "--images 0"),
    (["--lora", "prompts"], "--lora prompts"), (["--out", "no/such/folder/a.png"], "--out"),
    (["--eta", "2"], "--eta"), (["--seed", "18446744073709551616"], "--seed"), (["--steps", "x"], "--steps"),
    (["--sampler", "euler"], "--sampler"), (["--batch", "0"], "--batch 0"),
    (["--guidance-scale", "nan"], "--guidance-scale nan"), (["--guidance-scale", "-3"], "-3"),
    (["--lora", "prompts", "--lora-scale", "nan"], "--lora-scale nan"),
    (["--lora-scale", "0.5"], "--lora-scale 0.5: needs --lora")])
def test_what_the_command_line_cannot_do_is_one_line(tmp_path, capsys, arguments, names):
    with pytest.raises(SystemExit) as stop:
        sample.main(arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path / "grid.png")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and names in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content, names", [
    ("", "config.json: empty"), ("[1]", "list"), ('{"steps": "ten"}', "steps is 'ten'"),
    ('{"dtype": "fp8"}', "dtype is 'fp8'"), ('{"window": "x"}', "window is 'x'"), ('{"eta": null}', "eta"),
    ('{"sampler": "euler"}', "sampler"), ('{"model": 3}', "model")])
def test_a_runs_settings_are_not_believed_unseen(small, tmp_path, capsys, content, names):
    save_run(tmp_path / "run", small, 4)
    (tmp_path / "run/config.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--lora", str(tmp_path / "run"), "--model", small, "--out", str(tmp_path / "grid.png")])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and names in error and "config.json" in error and "\n" not in error


def test_strength_0_stands_beside_the_base_model_and_is_it(small, tmp_path, grids):
    save_run(tmp_path / "run", small, 4)
    sample.main(["--lora", str(tmp_path / "run"), "--lora-scale", "0", "--prompt", "a cat", "--images", "1",
                 "--out", str(tmp_path / "grid.png")])
    (rows, names, _), = grids
    assert names == ["base: a cat", "tuned: a cat"] and torch.equal(*rows)


def test_a_loader_that_fails_half_way_leaves_torch_s_default_dtype(monkeypatch):
    def fails(folder, dtype):
        torch.set_default_dtype(dtype)
        raise OSError("half of a file")

    monkeypatch.setattr(loading, "load_components", fails)
    try:
        with pytest.raises(ValueError, match="half of a file"):
            load_pipeline("models/emoji", "cpu", torch.bfloat16)
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_run_is_drawn_in_the_size_that_it_was_trained_in(small, tmp_path, grids):
    save_run(tmp_path / "run", small, 4, resolution=24)
    command = ["--lora", str(tmp_path / "run"), "--prompt", "a cat", "--images", "1", "--steps", "1",
               "--out", str(tmp_path / "grid.png")]
    sample.main(command)
    sample.main([*command, "--resolution", "16"])
    assert [rows[0].shape[-2:] for rows, *_ in grids] == [(24, 24), (16, 16)]


def test_a_grid_has_a_row_below_a_row_and_a_column_beside_a_column():
    rows = [torch.zeros(3, 3, 64, 64, dtype=torch.uint8) for _ in range(2)]
    for i, row in enumerate(rows):
        for j in range(3):
            row[j] = torch.tensor([100 * i, 80 * j, 30]).view(3, 1, 1)
    grid = sample.picture_grid(rows, cell=96)
    colours = [[grid.getpixel((98 * j + 48, 98 * i + 48)) for j in range(3)] for i in range(2)]
    assert colours == [[(100 * i, 80 * j, 30) for j in range(3)] for i in range(2)]
    for shown in (rows, [rows[0][:1], rows[1]]):  # no room for labels, and for the longest row
        assert sample.picture_grid(shown, cell=96).size == (3 * 98, 2 * 98)


def test_the_seeds_named_are_drawn_in_10_steps_of_the_shipped_model_and_50_of_others(
        small, tmp_path, monkeypatch, grids):
    asked, black = [], torch.zeros(2, 3, 64, 64, dtype=torch.uint8)

    def sample_trajectories(pipeline, prompts, steps, guidance_scale, eta, generators, *_, **__):
        asked.append((steps, guidance_scale, [each.initial_seed() for each in generators]))
        return SimpleNamespace(images=black)

    monkeypatch.setattr(sample, "sample_trajectories", sample_trajectories)
    for model in ("models/emoji", small):
        sample.main(["--model", model, "--prompt", "a cat", "--images", "2", "--seed", "5",
                     "--out", str(tmp_path / "grid.png")])
    assert asked == [(10, 4.0, [5, 6]), (50, 4.0, [5, 6])]
    assert [titles for *_, titles in grids] == [["seed 5", "seed 6"]] * 2


def test_weights_of_a_model_that_predicts_v_are_not_taken_for_those_of_one_that_predicts_noise(
        small, tmp_path):
    predicts_v = save_pipeline(tmp_path / "v", "v_prediction")
    save_run(tmp_path / "run", predicts_v, 4)
    assert load_pipeline(predicts_v, "cpu", lora=tmp_path / "run")
    with pytest.raises(ValueError, match="predicts something else"):
        load_pipeline(small, "cpu", lora=tmp_path / "run")


def test_without_a_strength_weights_are_drawn_as_they_were_trained(small, tmp_path, monkeypatch):
    save_run(tmp_path / "run", small, 4)
    scales, set_strength = [], sample.set_strength
    monkeypatch.setattr(sample, "set_strength", lambda pipeline, scale, *weights: (
        scales.append(scale) or set_strength(pipeline, scale, *weights)))
    sample.main(["--lora", str(tmp_path / "run"), "--prompt", "a cat", "--images", "1",
                 "--steps", "1", "--out", str(tmp_path / "grid.png")])
    assert scales == [0.0, 1.0]  # the base model, and the run
