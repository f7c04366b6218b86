"""Claims about the table of coefficients: every sampler's published formula on every kind of schedule."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler,
                       EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
                       FlowMatchHeunDiscreteScheduler, LCMScheduler, PNDMScheduler, StableDiffusionPipeline,
                       TCDScheduler)

import ddpo
import kernels
from kernels.ddim_step import fused_ddim_step
from kernels.ppo_loss import fused_ppo_loss
from run_folder import read_metrics
from sample import (ETAS, ddim_scheduler, ddim_step, ddim_table, encode_prompts, load_pipeline, predict,
                    sample_trajectories, step_etas, window_places)
from stable_diffusion import save_pipeline
from training import epoch_table

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STABLE_DIFFUSION = BETAS | dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                                timestep_spacing="leading")
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # its schedule, in float64
SAMPLERS = [("ddim", 1.0), ("ddim", 0.4), ("cps", 0.7), ("cps", 1.0), ("flow", 0.7), ("dance", 0.3)]


def stable_diffusion(**changes):
    return DDIMScheduler(**(STABLE_DIFFUSION | changes))


def flow_times(steps, shift):
    """The times of FlowMatchEulerDiscreteScheduler: its ends are shifted, and the steps between once more."""
    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)

    return [*shifted(np.linspace(1, shifted(1 / 1000), steps)), 0.0]


def published(sampler, eta, t, t_next):
    """(c_x, c_v, σ) of a step of x = (1 − t) x_0 + t ε with v = ε − x_0, as each paper writes it."""
    delta = t_next - t
    if sampler == "ddim":  # x̂_0 = x − t v, ε̂ = x + (1 − t) v
        rho = t_next * (1 - t) / (t * (1 - t_next))
        sigma = t_next * eta * math.sqrt(1 - rho**2)
        noise = math.sqrt(t_next**2 - sigma**2)
        return 1 - t_next + noise, -t * (1 - t_next) + (1 - t) * noise, sigma
    if sampler == "cps":
        sigma = t_next * math.sin(eta * math.pi / 2)
        noise = math.sqrt(t_next**2 - sigma**2)
        return 1 - t_next + noise, -t * (1 - t_next) + (1 - t) * noise, sigma
    if sampler == "flow":  # at pure noise the next time stands in for t in 1 − t
        std = eta * math.sqrt(t / (1 - (t if t < 1 else t_next)))
    else:
        std = eta
    return 1 + std**2 / (2 * t) * delta, (1 + std**2 * (1 - t) / (2 * t)) * delta, std * math.sqrt(-delta)


def old_table(alpha_bar, timesteps, final, eta, kind):
    """The table as it was computed when there was nothing but DDIM, in ᾱ."""
    a = alpha_bar[timesteps]
    a_prev = torch.cat([alpha_bar[timesteps[1:]], final.view(1)])
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    direction = (1 - a_prev - sigma**2).clamp(min=0).sqrt()
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    clean, noise = {
        "epsilon": ((1 / a.sqrt(), -(1 - a).sqrt() / a.sqrt()), (zero, one)),
        "v_prediction": ((a.sqrt(), -(1 - a).sqrt()), ((1 - a).sqrt(), a.sqrt())),
        "sample": ((zero, one), (1 / (1 - a).sqrt(), -a.sqrt() / (1 - a).sqrt()))}[kind]
    c_x, c_o = (a_prev.sqrt() * clean[i] + direction * noise[i] for i in (0, 1))
    return torch.stack([c_x, c_o, sigma, sigma.log()], dim=1).float()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to_one", [False, True])
def test_the_table_of_recorded_runs_is_the_same_to_the_last_bit(kind, to_one):
    scheduler = stable_diffusion(prediction_type=kind, set_alpha_to_one=to_one)
    final = torch.ones(1).double() if to_one else scheduler.alphas_cumprod[0].double()
    for steps in (1, 4, 7, 10, 20, 30, 50, 100, 500):
        for eta in (1.0, 0.3, 0.0):
            timesteps, table = ddim_table(scheduler, steps, eta)
            expected = old_table(scheduler.alphas_cumprod.double(), timesteps, final, eta, kind)
            assert torch.equal(table, expected)


def test_the_emoji_model_s_table_in_numbers():
    timesteps, table = ddim_table(stable_diffusion(), 10)
    assert timesteps.tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    recorded = [[1.6154109239578247, -1.0034246444702148, 0.7763321399688721],
                [1.0573256015777588, -0.3409658968448639, 0.040984250605106354]]
    torch.testing.assert_close(table[[0, 8], :3], torch.tensor(recorded), rtol=0, atol=0)


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
@pytest.mark.parametrize("steps, shift", [(4, 1.0), (10, 1.0), (10, 3.0), (28, 3.0), (50, 0.5)])
def test_a_flow_model_s_rows_are_the_published_formula(sampler, eta, steps, shift):
    timesteps, table = ddim_table(FlowMatchEulerDiscreteScheduler(shift=shift), steps, eta, sampler)
    times = flow_times(steps, shift)
    assert table.shape == (steps, 4) and timesteps.dtype == torch.float32
    torch.testing.assert_close(timesteps.double(), 1000 * torch.tensor(times[:-1]), rtol=1e-6, atol=0)
    expected = torch.tensor([published(sampler, eta, t, t_next) for t, t_next in zip(times, times[1:])])
    torch.testing.assert_close(table[:, :3].double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(table[:, 3], table[:, 2].log())


@pytest.mark.parametrize("sampler, eta", SAMPLERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [5, 10, 50])
def test_stable_diffusion_s_rows_are_the_published_formula_in_other_coordinates(sampler, eta, kind, steps):
    """x / k with k = α + s is a point of a flow at time s / k, whose v = ε − x_0 follows from the output."""
    timesteps, table = ddim_table(stable_diffusion(prediction_type=kind), steps, eta, sampler)
    alpha_bar = np.append(ALPHA_BAR[timesteps], ALPHA_BAR[0])
    alpha, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    for row in range(steps):
        a, b, k, k_next = alpha[row], s[row], alpha[row] + s[row], alpha[row + 1] + s[row + 1]
        c_x, c_v, sigma = published(sampler, eta, b / k, s[row + 1] / k_next)
        v_of_x, v_of_output = {"epsilon": (-1 / a, k / a), "v_prediction": (b - a, k),
                               "sample": (1 / b, -k / b)}[kind]
        expected = [k_next * (c_x / k + c_v * v_of_x), k_next * c_v * v_of_output, k_next * sigma]
        torch.testing.assert_close(table[row, :3].double(), torch.tensor(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("sampler", ETAS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_every_sampler_is_the_flow_model_s_own_ode(sampler, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    timesteps, table = ddim_table(theirs, 10, 0.0, sampler)
    theirs.set_timesteps(10)
    assert torch.equal(timesteps, theirs.timesteps)
    x = torch.randn(2, 4, 8, 8)
    for t, (c_x, c_o, sigma, _) in zip(timesteps, table):
        output = torch.randn_like(x)
        expected = theirs.step(output, t, x).prev_sample
        torch.testing.assert_close(c_x * x + c_o * output, expected, rtol=1e-5, atol=2e-6)
        assert sigma == 0
        x = expected


@pytest.mark.parametrize("sampler", ETAS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_without_noise_every_sampler_is_stable_diffusion_s_own_ode(sampler, kind):
    theirs = stable_diffusion(prediction_type=kind)
    theirs.set_timesteps(10)
    timesteps, table = ddim_table(theirs, 10, 0.0, sampler)
    for t, (c_x, c_o, sigma, _) in zip(timesteps, table.double()):
        x, output = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
        expected = theirs.step(output, t, x, eta=0.0).prev_sample
        torch.testing.assert_close(c_x * x + c_o * output, expected, rtol=2e-5, atol=2e-5)
        assert sigma == 0


def schedules():
    """Every spacing of diffusers, with step counts that do not divide 1000."""
    for cls in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler):
        for spacing in ("leading", "trailing", "linspace"):
            for offset in (0, 1):
                for steps in (7, 10):
                    settings = BETAS | dict(steps_offset=offset, timestep_spacing=spacing)
                    settings |= dict(clip_sample=False) if cls is DDIMScheduler else {}
                    name = f"{cls.__name__}-{spacing}-{offset}-{steps}"
                    yield pytest.param(cls(**settings), steps, id=name)


@pytest.mark.parametrize("scheduler, steps", [*schedules()])
@pytest.mark.parametrize("sampler", ["ddim", "dance"])
def test_each_step_ends_at_the_noise_that_the_next_one_is_told(scheduler, steps, sampler):
    """With a perfect network of one picture x = sqrt(ᾱ) x_0 + sqrt(1 − ᾱ) ε, the ᾱ of the timestep told."""
    timesteps, table = ddim_table(scheduler, steps, 0.0, sampler)
    assert (timesteps.diff() < 0).all() and len(timesteps) == steps
    alpha_bar = ALPHA_BAR[timesteps]
    clean, noise = 0.8, -1.3
    x = np.sqrt(alpha_bar[0]) * clean + np.sqrt(1 - alpha_bar[0]) * noise
    for row in range(steps - 1):
        x = table[row, 0].item() * x + table[row, 1].item() * noise
        told = np.sqrt(alpha_bar[row + 1]) * clean + np.sqrt(1 - alpha_bar[row + 1]) * noise
        assert abs(x - told) < 1e-4
        x = told


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_there_are_as_many_steps_as_were_asked_for(spacing):
    scheduler = stable_diffusion(timestep_spacing=spacing)
    for steps in (1, 7, 50, 61, 103, 206, 500):
        timesteps, table = ddim_table(scheduler, steps, torch.ones(steps))
        assert len(timesteps) == len(table) == steps and timesteps.min() >= 0


@pytest.mark.parametrize("settings, more", [
    (dict(shift=3.0), {}), (dict(use_karras_sigmas=True), {}), (dict(use_exponential_sigmas=True), {}),
    (dict(shift_terminal=0.1), {}), (dict(use_dynamic_shifting=True), dict(mu=0.9)),
    (dict(use_dynamic_shifting=True, time_shift_type="linear"),
     dict(mu=0.9, sigmas=np.linspace(1, 0.1, 10).tolist()))])
def test_a_flow_schedule_of_any_options_is_walked_as_diffusers_walks_it(settings, more):
    theirs = FlowMatchEulerDiscreteScheduler(**settings)
    theirs.set_timesteps(10, **more)
    timesteps, table = ddim_table(FlowMatchEulerDiscreteScheduler(**settings), 10, 0.0, **more)
    assert torch.equal(timesteps, theirs.timesteps)
    x = torch.randn(1, 4, 8, 8)
    for t, (c_x, c_o, _, _) in zip(timesteps, table):
        output = torch.randn_like(x)
        expected = theirs.step(output, t, x).prev_sample
        torch.testing.assert_close(c_x * x + c_o * output, expected, rtol=1e-5, atol=2e-6)
        x = expected


def final_std(scheduler, steps, eta, sampler):
    """Of x, where the data are 0: a perfect network says ε̂ = x / s, so a step scales x and adds noise."""
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    timesteps, table = ddim_table(scheduler, steps, eta, sampler)
    s = timesteps.double().numpy() / 1000 if flow else np.sqrt(1 - ALPHA_BAR[timesteps])
    variance = s[0] ** 2
    for (c_x, c_o, sigma), level in zip(table[:, :3].double().tolist(), s):
        variance = (c_x + c_o / level) ** 2 * variance + sigma**2
    return math.sqrt(variance)


@pytest.mark.parametrize("sampler, eta", [("ddim", 1.0), ("ddim", 0.3), ("cps", 0.7), ("cps", 1.0)])
def test_ddim_and_cps_leave_no_noise_in_a_picture(sampler, eta):
    for steps in (5, 10, 50):
        for shift in (1.0, 3.0):
            assert final_std(FlowMatchEulerDiscreteScheduler(shift=shift), steps, eta, sampler) < 1e-6
        expected = math.sqrt(1 - ALPHA_BAR[0])  # Stable Diffusion's schedule ends there
        assert abs(final_std(stable_diffusion(), steps, eta, sampler) - expected) < 1e-5


@pytest.mark.parametrize("sampler, eta", [("flow", 0.7), ("dance", 0.3)])
def test_flow_and_dance_leave_noise_that_vanishes_with_the_number_of_steps(sampler, eta):
    expected = math.sqrt(1 - ALPHA_BAR[0])
    excess = [final_std(stable_diffusion(), steps, eta, sampler) - expected for steps in (5, 20, 100, 500)]
    assert excess[0] > 0.03 and 5 * excess[-1] < excess[0]
    assert all(after < before for before, after in zip(excess, excess[1:]))


@pytest.mark.parametrize("sampler", ETAS)
def test_the_log_prob_of_a_flow_step_is_that_of_a_normal_distribution(sampler):
    torch.manual_seed(0)
    _, table = ddim_table(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, ETAS[sampler], sampler)
    for row in (0, 4, 8):
        x, output = torch.randn(2, 3, 4, 8, 8)
        drawn, log_prob = ddim_step(output, x, table[row])
        c_x, c_o, sigma, _ = table[row].double()
        density = torch.distributions.Normal(c_x * x.double() + c_o * output.double(), sigma)
        expected = density.log_prob(drawn.double()).mean((1, 2, 3))
        torch.testing.assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-4)
        again, scored = ddim_step(output, x, table[row], next_latents=drawn)
        assert torch.equal(again, drawn) and torch.equal(scored, log_prob)


@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("sampler", ETAS)
def test_the_kernels_take_a_flow_step_as_plain_torch_does(sampler, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, table = ddim_table(FlowMatchEulerDiscreteScheduler(shift=3.0), 10, ETAS[sampler], sampler)
    rows = table[[0, 4, 8]].to(device)
    output, x, noise = torch.randn(6, 4, 5, 7, device=device), *torch.randn(2, 3, 4, 5, 7, device=device)
    advantages, both = torch.tensor([1.0, -1.0, 0.5], device=device), {}
    for backend in ("torch", "triton"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        stored, log_prob = fused_ddim_step(output, x, rows, 4.0, noise=noise)
        loss, again, ratio, clipped, grad = fused_ppo_loss(
            output, x, stored, rows, log_prob, advantages, 1e-4, 4.0)
        assert torch.equal(again, log_prob) and (ratio == 1).all() and not clipped.any()
        both[backend] = stored, log_prob, loss, grad
    for ours, theirs in zip(both["torch"], both["triton"]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler, eta", [
    ("ddim", 1.1), ("cps", 1.1), ("flow", 2.5), ("dance", -0.1), ("flow", math.nan)])
def test_an_eta_beyond_the_sampler_s_range_is_refused(sampler, eta):
    with pytest.raises(ValueError, match=f"--eta .*{sampler}"):
        ddim_table(stable_diffusion(), 10, eta, sampler)


def test_an_unknown_sampler_is_refused_by_name():
    with pytest.raises(ValueError, match="--sampler euler: unknown; choose ddim, cps, flow, dance"):
        ddim_table(stable_diffusion(), 10, sampler="euler")


@pytest.mark.parametrize("scheduler, names", [
    (EDMEulerScheduler(), "EDMEulerScheduler"),
    (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler"),
    (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "DPMSolver"),
    (DDPMScheduler(beta_schedule="sigmoid", clip_sample=False), "sigmoid"),
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "stochastic_sampling"),
    (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting")])
def test_a_scheduler_that_we_cannot_sample_with_is_refused_in_one_line(scheduler, names):
    with pytest.raises(ValueError, match=names) as error:
        ddim_table(scheduler, 10)
    assert "\n" not in str(error.value)


def test_the_scheduler_that_we_sample_with_is_ddim_or_the_model_s_own_flow():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert ddim_scheduler(flow) is flow
    assert isinstance(ddim_scheduler(EulerDiscreteScheduler(**BETAS)), DDIMScheduler)


@pytest.mark.parametrize("file, spacing", [
    (dict(_class_name="DDIMScheduler"), "leading"), (dict(_class_name="DDPMScheduler"), "leading"),
    (dict(_class_name="PNDMScheduler", skip_prk_steps=True), "leading"),
    (dict(_class_name="DPMSolverMultistepScheduler"), "linspace")])
def test_what_a_file_leaves_out_is_what_the_plain_pipeline_runs_with(tmp_path, file, spacing):
    folder = save_pipeline(tmp_path / "model")
    (tmp_path / "model/scheduler/scheduler_config.json").write_text(json.dumps(file | BETAS))
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    index["scheduler"] = ["diffusers", file["_class_name"]]
    (tmp_path / "model/model_index.json").write_text(json.dumps(index))
    plain = StableDiffusionPipeline.from_pretrained(folder).scheduler
    ours = load_pipeline(folder, "cpu").scheduler
    assert type(plain).__name__ == file["_class_name"]
    assert not ours.config.clip_sample and ours.config.steps_offset == 1
    assert ours.config.timestep_spacing == plain.config.timestep_spacing == spacing
    assert ours.config.set_alpha_to_one == (file["_class_name"] != "PNDMScheduler")  # the class's default
    timesteps, _ = ddim_table(ours, 10)
    assert timesteps[[0, -1]].tolist() == ([901, 1] if spacing == "leading" else [999, 0])


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory):
    """A random Stable Diffusion with a flow scheduler, as plain diffusers saves and loads it."""
    folder = save_pipeline(tmp_path_factory.mktemp("flow") / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    config = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    # StableDiffusionPipeline asks for init_noise_sigma, which this class has only if its file says so
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config) | {"init_noise_sigma": 1.0})
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sampler", ETAS)
def test_a_flow_model_s_picture_is_that_of_the_plain_pipeline(flow_folder, sampler):
    pytest.importorskip("diffusers", minversion="0.35", reason="its pipeline takes no flow scheduler")
    plain = StableDiffusionPipeline.from_pretrained(flow_folder, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = plain("a cat", num_inference_steps=6, guidance_scale=4.0, latents=noise,
                   output_type="latent").images
    ours = sample_trajectories(load_pipeline(flow_folder, "cpu"), ["a cat"], 6, 4.0, 0.0,
                               generator=torch.Generator().manual_seed(3), sampler=sampler).latents[:, -1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flow_trajectory_scores_as_it_did_when_it_was_sampled(flow_folder, sampler, dtype):
    pipeline, prompts = load_pipeline(flow_folder, "cpu"), ["a cat", "a dog"]
    stored = sample_trajectories(pipeline, prompts, 5, 4.0, ETAS[sampler], torch.Generator().manual_seed(0),
                                 dtype, sampler=sampler)
    _, table = ddim_table(pipeline.scheduler, 5, ETAS[sampler], sampler)
    embeds, negative = encode_prompts(pipeline, prompts), encode_prompts(pipeline, [""])
    for step, t in enumerate(stored.timesteps):
        x, x_next = stored.latents[:, step], stored.latents[:, step + 1]
        output = predict(pipeline.unet, x, t.expand(2), embeds, negative, dtype)
        _, log_prob = ddim_step(output, x, table[step], x_next, guidance_scale=4.0)
        assert torch.equal(log_prob, stored.log_probs[:, step])
    assert stored.log_probs[:, :-1].abs().min() > 0


SMALL = dict(images=4, sample_batch=4, group_size=2, train_batch=4, updates=2, steps=4, eval_images=2,
             watch="", device="cpu", dtype="bf16", ema=0.0)


@pytest.mark.parametrize("sampler", ETAS)
def test_the_ratio_of_a_run_starts_at_1_with_every_sampler(flow_folder, sampler, tmp_path):
    config = ddpo.Config(model=flow_folder, out=str(tmp_path), sampler=sampler, epochs=1, **SMALL)
    row = read_metrics(ddpo.train(config) / "metrics.jsonl")[-1]
    assert config.eta == ETAS[sampler] and row["ratio_error"] == 0 and row["grad_norm"] > 0


def test_a_window_moves_on_and_begins_again():
    assert window_places(10) == [(0, 10)] and window_places(10, "2:5") == [(2, 5)]
    assert window_places(10, "0:4", "2/5") == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert window_places(10, "1:4", "3/1") == [(1, 4), (4, 7), (7, 10)]
    noisy = [step_etas(10, 0.7, "0:4", "2/5", epoch).nonzero().flatten()[0].item() for epoch in range(1, 23)]
    assert noisy == [0] * 5 + [2] * 5 + [4] * 5 + [6] * 5 + [0] * 2
    assert step_etas(4, 0.5, "0:2", "1/1", 2).tolist() == [0, 0.5, 0.5, 0]


def test_a_run_trains_the_steps_of_its_moving_window_alone(flow_folder, tmp_path, monkeypatch):
    settings = SMALL | dict(epochs=4, window="0:2", window_shift="1/1", train_first=1.0, sampler="ddim")
    seen, real = [], ddpo.update_pairs

    def update_pairs(run, epoch, *rest):
        for image, step in real(run, epoch, *rest):
            seen.append((epoch, *step.tolist()))
            yield image, step

    drawn, collect = [], ddpo.collect
    monkeypatch.setattr(ddpo, "collect", lambda run, epoch: drawn.append(collect(run, epoch)) or drawn[-1])
    monkeypatch.setattr(ddpo, "update_pairs", update_pairs)
    folder = ddpo.train(ddpo.Config(model=flow_folder, out=str(tmp_path), **settings))
    rows = read_metrics(folder / "metrics.jsonl")
    trained = {epoch: set() for epoch in range(1, 5)}
    for epoch, *steps in seen:
        trained[epoch] |= set(steps)
    assert trained == {1: {0, 1}, 2: {1, 2}, 3: {2}, 4: {0, 1}}  # the last step of all has no noise
    for epoch, (_, trajectories, _, _) in enumerate(drawn, 1):
        assert set((trajectories.log_probs != 0).any(0).nonzero().flatten().tolist()) == trained[epoch]
    assert all(row["ratio_error"] == 0 for row in rows[1:])


@pytest.mark.parametrize("settings, names", [
    (dict(sampler="euler"), "--sampler euler"), (dict(sampler="cps", eta=1.5), "--eta 1.5"),
    (dict(eta=0.0), "--eta 0.0"), (dict(window_shift="1/2"), "--window-shift 1/2: needs a window"),
    (dict(window="0:4", window_shift="0/2"), "0/2"), (dict(window="0:4", window_shift="2"), "-shift 2:"),
    (dict(window="7:10", window_shift="1/1"), "7:10"),
    (dict(window="8:12"), "--window 8:12")])
def test_a_sampler_or_window_that_cannot_be_is_one_line(settings, names):
    with pytest.raises(ValueError, match=names) as error:
        ddpo.check(ddpo.Config(device="cpu", **settings))
    assert "\n" not in str(error.value)


def test_a_window_of_steps_without_noise_is_refused_before_a_folder_is_made(flow_folder, tmp_path):
    with pytest.raises(ValueError, match="from 3 to 4 .* deterministic"):
        ddpo.train(ddpo.Config(model=flow_folder, out=str(tmp_path / "runs"), window="0:1",
                               window_shift="1/1", epochs=1, sampler="ddim", **SMALL))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("sampler, eta, chosen", [
    ("", -1.0, ("flow", 0.7)), ("", 0.3, ("flow", 0.3)), ("ddim", -1.0, ("ddim", 1.0))])
def test_a_model_of_flow_matching_has_its_own_default(flow_folder, tmp_path, sampler, eta, chosen):
    run = ddpo.prepare(ddpo.Config(model=flow_folder, out=str(tmp_path), sampler=sampler, eta=eta, **SMALL))
    assert (run.config.sampler, run.config.eta) == chosen
    _, table = ddim_table(run.pipeline.scheduler, SMALL["steps"], chosen[1], chosen[0])
    torch.testing.assert_close(epoch_table(run.config, run.pipeline, 1)[0], table)


def test_the_defaults_are_the_sampler_of_the_paper(tmp_path):
    config = ddpo.prepare(ddpo.Config(out=str(tmp_path), **SMALL)).config
    assert (config.sampler, config.eta, config.window, config.window_shift) == ("ddim", 1.0, "", "")


def test_noise_that_the_default_sampler_cannot_have_is_one_line_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="--eta 1.5: must be .* at most 1 with --sampler ddim"):
        ddpo.train(ddpo.Config(out=str(tmp_path / "runs"), eta=1.5, **SMALL))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
def test_a_distilled_model_starts_at_the_timestep_that_its_own_scheduler_starts_at(scheduler):
    theirs = scheduler(**BETAS)
    for steps in (2, 4, 8):
        theirs.set_timesteps(steps)
        ours, _ = ddim_table(theirs, steps)
        assert ours[0] == theirs.timesteps[0] == 999
        assert (ours - theirs.timesteps).abs().max() <= 20  # one of its 50 original steps
