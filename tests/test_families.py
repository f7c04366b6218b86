"""Claims about SDXL, SD3 and FLUX.1, on random pipelines of the real classes that are saved to disk
and loaded."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import (FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

import ddpo
import forward
import rwr
from families import BUILD, ROOT, flux, save_family
from models import (condition, decode, denoiser, encode_prompts, latents_shape, main_tokenizer,
                    make_trainable, predict, schedule_inputs)
from prompts import cut_prompts
from run_folder import read_metrics
from sample import ddim_step, ddim_table, load_pipeline, sample_trajectories
from training import start

CLASSES = {"sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline,
           "sd3-without-t5": StableDiffusion3Pipeline, "flux": FluxPipeline}
SMALL = dict(images=4, sample_batch=2, train_batch=2, steps=2, epochs=1, eval_images=2, eval_every=9,
             group_size=2, watch="", updates=2, lora_rank=2, device="cpu", dtype="fp32", lr=1e-2,
             warmup=0, ema=0.0,
             guidance_scale=3.5, resolution=16, train_first=1.0, guard=0.0)
PROMPTS = ["a cat", "a fox on a horse"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_family(tmp_path_factory.mktemp("families") / family, family) for family in BUILD}


def plain_pipeline(folder, family):
    absent = dict(text_encoder_3=None, tokenizer_3=None) if family == "sd3-without-t5" else {}
    pipeline = CLASSES[family].from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_latents(pipeline, noise):
    """x_0 that the pipeline's own call makes of noise (B, C, H, W), and its pictures in [0, 1]."""
    is_flux = isinstance(pipeline, FluxPipeline)
    size = noise.shape[-1] * 2
    if is_flux:
        noise = pipeline._pack_latents(noise, *noise.shape)
    settings = dict(num_inference_steps=3, latents=noise, guidance_scale=3.5, height=size, width=size)
    latents = pipeline(PROMPTS, output_type="latent", **settings).images
    if is_flux:
        latents = pipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor)
    return latents, pipeline(PROMPTS, output_type="pt", **settings).images


@pytest.mark.parametrize("resolution", [16, 24])
@pytest.mark.parametrize("family", BUILD)
def test_without_noise_it_draws_what_the_plain_pipeline_draws(folders, family, resolution):
    ours = load_pipeline(folders[family], "cpu", resolution=resolution)
    drawn = sample_trajectories(ours, PROMPTS, 3, 3.5, 0.0, torch.Generator().manual_seed(0))
    latents, images = plain_latents(plain_pipeline(folders[family], family), drawn.latents[:, 0])
    size = resolution // 2
    assert drawn.latents.shape[2:] == latents_shape(ours) == (latents.shape[1], size, size)
    torch.testing.assert_close(drawn.latents[:, -1], latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn.images.float() / 255, images, rtol=0, atol=0.003)
    assert (latents[0] - latents[1]).abs().max() > 0.1  # prompt or noise matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BUILD)
def test_what_is_drawn_is_scored_again_to_the_last_bit(folders, family, dtype):
    pipeline = load_pipeline(folders[family], "cpu", dtype, resolution=16)
    drawn = sample_trajectories(pipeline, PROMPTS, 3, 3.5, 1.0, torch.Generator().manual_seed(0))
    timesteps, table = ddim_table(pipeline.scheduler, 3, 1.0, **schedule_inputs(pipeline, 3))
    *embeds, guidance_scale = condition(pipeline, PROMPTS, 3.5)
    assert (guidance_scale is None) == (family == "flux")
    for i in range(3):
        x, x_next = drawn.latents[:, i], drawn.latents[:, i + 1]
        with torch.no_grad():
            output = predict(denoiser(pipeline), x, timesteps[i].expand(2), *embeds, dtype)
        _, log_prob = ddim_step(output, x, table[[i, i]], x_next, guidance_scale=guidance_scale)
        assert torch.equal(log_prob, drawn.log_probs[:, i])


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_a_run_begins_with_a_ratio_of_one_and_its_weights_load_in_the_plain_pipeline(
        folders, tmp_path, family, lora_rank):
    settings = SMALL | dict(lora_rank=lora_rank, gradient_checkpointing=lora_rank == 0, offload=lora_rank > 0)
    folder = ddpo.train(ddpo.Config(model=folders[family], out=str(tmp_path), **settings))
    row = read_metrics(folder / "metrics.jsonl")[-1]
    assert row["ratio_error"] == 0.0 and row["grad_norm"] > 0
    tuned = load_pipeline(folders[family], "cpu", lora=folder, resolution=16)
    drawn = sample_trajectories(tuned, PROMPTS, 3, 3.5, 0.0, torch.Generator().manual_seed(0))
    plain = plain_pipeline(folders[family], family)
    base, _ = plain_latents(plain, drawn.latents[:, 0])
    if lora_rank:
        plain.load_lora_weights(str(folder))
    else:
        name = "unet" if family == "sdxl" else "transformer"
        setattr(plain, name, type(denoiser(plain)).from_pretrained(folder / name))
    latents, _ = plain_latents(plain, drawn.latents[:, 0])
    torch.testing.assert_close(drawn.latents[:, -1], latents, rtol=1e-4, atol=1e-4)
    assert (latents - base).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(folders, tmp_path, family):
    whole, parts = (ddpo.Config(model=folders[family], out=str(tmp_path), name=name, **SMALL | dict(epochs=2))
                    for name in ("whole", "parts"))
    expected = read_metrics(ddpo.train(whole) / "metrics.jsonl")
    parts.epochs = 1
    ddpo.train(parts)
    parts.epochs = 2
    rows = read_metrics(ddpo.train(parts, resume=True) / "metrics.jsonl")
    timeless = [[{key: value for key, value in row.items()
                  if "second" not in key and not key.startswith("eval")}
                 for row in run if row["epoch"]] for run in (expected, rows)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 2


@pytest.mark.parametrize("loop", [rwr, forward])
def test_other_loops_train_a_flow_model(folders, tmp_path, loop):
    names = {field for field in loop.Config.__dataclass_fields__}
    settings = {key: value for key, value in SMALL.items() if key in names} | dict(train_guidance=False)
    folder = loop.train(loop.Config(model=folders["flux"], out=str(tmp_path), **settings))
    row = read_metrics(folder / "metrics.jsonl")[-1]
    assert row["grad_norm"] > 0 and row["loss"] == row["loss"]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_two_processes_make_the_run_of_one(folders, tmp_path, family):
    settings = SMALL | dict(model=folders[family], out=str(tmp_path), prompts="animals", sample_batch=1,
                            train_batch=1)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, "ddpo.py", *flags, "--name", "two"], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"})
    ddpo.main([*flags, "--name", "one"])
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two"))
    assert one["ratio_error"] == two["ratio_error"] == 0.0 and one["reward_mean"] == two["reward_mean"]
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_prompts_are_encoded_once_and_guidance_is_told_to_flux_alone(folders):
    for family in BUILD:
        pipeline, cache = load_pipeline(folders[family], "cpu", resolution=16), {}
        embeds, negative, scale = condition(pipeline, [*PROMPTS, PROMPTS[0]], 3.5, cache)
        assert set(cache) == {*PROMPTS, *([] if family == "flux" else [""])}
        assert all(torch.equal(value[0], value[2]) and not value.requires_grad for value in embeds.values())
        expected = (True, None, True) if family == "flux" else (False, 3.5, False)
        assert (negative is None, scale, "guidance" in embeds) == expected
        one_pass, negative, scale = condition(pipeline, PROMPTS, 3.5, cache, two_passes=False)
        assert negative is None and scale is None and ("guidance" in one_pass) == (family == "flux")
    network, latents = denoiser(pipeline), torch.zeros(2, 16, 8, 8)
    embeds = [condition(pipeline, PROMPTS, scale, cache)[0] for scale in (1, 5)]
    outputs = [predict(network, latents, torch.full((2,), 500.0), inputs) for inputs in embeds]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-5
    assert condition(pipeline, PROMPTS, 0.0)[0]["guidance"].tolist() == [1.0, 1.0]  # both mean none


def test_sd3_reads_a_prompt_through_t5_where_there_is_one(folders):
    ours = [load_pipeline(folders[family], "cpu", resolution=16) for family in ("sd3", "sd3-without-t5")]
    with_t5, without = (encode_prompts(pipeline, ["a cat"])["encoder_hidden_states"] for pipeline in ours)
    assert with_t5.shape == (1, 20 + 256, 32)
    assert without.shape in (with_t5.shape, (1, 20 + 20, 32))  # the latter in diffusers 0.35
    assert (without[:, 20:] == 0).all() and not (with_t5[:, 20:] == 0).all()  # after CLIP's 20 tokens


def test_an_sd3_downloaded_without_t5_is_told_how_to_do_without(folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "model")
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(ValueError, match=r"text_encoder_3/ is missing; .* \[null, null\]"):
        load_pipeline(str(folder), "cpu", resolution=16)
    index = json.loads((folder / "model_index.json").read_text())
    index |= dict(text_encoder_3=[None, None], tokenizer_3=[None, None])
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(str(folder), "cpu", resolution=16).text_encoder_3 is None


def test_flux_schnell_has_no_guidance_and_dynamic_shift_grows_with_the_picture(tmp_path, folders):
    torch.manual_seed(0)
    flux(guidance_embeds=False).save_pretrained(tmp_path / "schnell")
    pipeline = load_pipeline(str(tmp_path / "schnell"), "cpu", resolution=16)
    assert "guidance" not in condition(pipeline, PROMPTS, 3.5)[0]
    mu = [schedule_inputs(load_pipeline(folders["flux"], "cpu", resolution=side), 4)["mu"]
          for side in (64, 128)]  # 256 and 1024 tokens
    assert mu[0] == pytest.approx(0.5) and mu[1] == pytest.approx(0.5 + 0.65 * (1024 - 256) / 3840)


def test_a_size_that_does_not_fit_a_family_is_refused(folders):
    for family, resolution, names in (
            ("sd3", 18, "multiple of 4"), ("flux", 18, "multiple of 4"), ("sd3", 64, "too large"),
            ("sdxl", 15, "multiple of 2"), ("sdxl", -16, "multiple of 2")):
        with pytest.raises(ValueError, match=f"--resolution {resolution}: .*{names}"):
            load_pipeline(folders[family], "cpu", resolution=resolution)
    assert latents_shape(load_pipeline(folders["sdxl"], "cpu")) == (4, 8, 8)
    largest = load_pipeline(folders["sd3"], "cpu", resolution=32)
    assert latents_shape(largest) == (16, 16, 16)


def test_weights_that_the_configuration_has_no_place_for_are_not_dropped(folders, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "model")
    settings = json.loads((folder / "transformer/config.json").read_text())
    (folder / "transformer/config.json").write_text(json.dumps(settings | {"qk_norm": None}))
    with pytest.raises(ValueError, match="weights of its transformer have no place .*norm_added_k"):
        load_pipeline(str(folder), "cpu", resolution=16)


def test_decoding_shifts_and_scales_as_the_vae_says(folders):
    pipeline = load_pipeline(folders["sd3"], "cpu", resolution=16)
    latents = torch.randn(1, 16, 8, 8)
    pixels = pipeline.vae.decode(latents / 1.5 + 0.06).sample
    assert torch.equal(decode(pipeline, latents), ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte())


def test_compiled_blocks_are_those_of_transformers_and_checkpointing_leaves_the_gradient(folders, tmp_path):
    from models import blocks

    for family, count in (("sd3", 2), ("flux", 2)):
        assert len(blocks(denoiser(load_pipeline(folders[family], "cpu", resolution=16)))) == count
    gradients = []
    for checkpointing in (False, True):
        settings = SMALL | dict(gradient_checkpointing=checkpointing, lora_rank=0)
        config = ddpo.Config(model=folders["flux"], out=str(tmp_path), name=str(checkpointing), **settings)
        run = start(ddpo.check(config))
        x, embeds = torch.ones(2, 16, 8, 8), condition(run.pipeline, PROMPTS, 3.5)[0]
        predict(denoiser(run.pipeline), x, torch.full((2,), 500.0), embeds).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", BUILD)
def test_what_is_told_to_be_cut_is_what_the_encoders_do_not_see(family, folders):
    """The pipelines hand T5 another number of tokens than its saved tokenizer's model_max_length."""
    pipeline = load_pipeline(folders[family], "cpu", resolution=16)
    tokenizer = main_tokenizer(pipeline)
    fits = "cat " * (tokenizer.model_max_length - len(tokenizer("").input_ids))
    prompts = [fits.strip(), fits + "fox", fits + "panda", fits[:-4] + "fox"]
    cut = cut_prompts(tokenizer, prompts)
    assert cut == {prompts[1]: "fox", prompts[2]: "panda"}
    _, fox, panda, last = (pipeline_embeds(pipeline, prompt) for prompt in prompts)
    assert torch.equal(fox, panda) and not torch.equal(fox, last)


def pipeline_embeds(pipeline, prompt):
    return encode_prompts(pipeline, [prompt])["encoder_hidden_states"]


def test_an_empty_prompt_is_zeros_to_sdxl_where_its_index_says_nothing_else(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    for force, zeros in ((None, True), (True, True), (False, False)):  # None: older folders have no such line
        index.pop("force_zeros_for_empty_prompt", None)
        index |= {} if force is None else {"force_zeros_for_empty_prompt": force}
        (folder / "model_index.json").write_text(json.dumps(index))
        embeds = encode_prompts(load_pipeline(str(folder), "cpu"), [""])
        for key in ("encoder_hidden_states", "text_embeds"):
            assert (embeds[key] == 0).all() == zeros, (force, key)


def test_guidance_and_size_are_told_to_a_network_in_float32_whatever_it_computes_in(folders):
    told = {}
    for family, name in (("flux", "guidance"), ("sdxl", "time_ids")):
        pipeline = load_pipeline(folders[family], "cpu", torch.bfloat16, resolution=16)
        network = denoiser(pipeline)
        network.register_forward_pre_hook(
            lambda _, __, inputs: told.update(inputs | inputs.get("added_cond_kwargs", {})), with_kwargs=True)
        embeds, *_ = condition(pipeline, PROMPTS, 3.3)
        predict(network, torch.zeros(2, *latents_shape(pipeline)), torch.full((2,), 500.0), embeds,
                dtype=torch.bfloat16)
        assert told[name].dtype == torch.float32
    assert told["guidance"].tolist() == [pytest.approx(3.3)] * 2


def test_an_adapter_of_a_transformer_is_on_the_attention_of_pictures_and_of_prompts(folders):
    for family in ("sdxl", "sd3", "flux"):
        network = denoiser(load_pipeline(folders[family], "cpu", resolution=16))
        make_trainable(network, SimpleNamespace(lora_rank=2, lora_targets="", seed=0))
        trained = {re.search(r"(\w+(\.0)?)\.lora_[AB]\.", name)[1]
                   for name, p in network.named_parameters() if p.requires_grad}
        of_prompts = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"} if family != "sdxl" else set()
        assert trained == {"to_q", "to_k", "to_v", "to_out.0"} | of_prompts


def test_flux_draws_pictures_of_1024_pixels_where_no_size_is_asked_for(folders):
    pipeline = load_pipeline(folders["flux"], "cpu")
    assert latents_shape(pipeline) == (16, 1024 // 8, 1024 // 8)  # FLUX.1's VAE scales by 8


def test_the_dynamic_shift_of_sd3_counts_its_patches_as_tokens(folders):
    pipeline = load_pipeline(folders["sd3"], "cpu", resolution=24)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokens = pipeline.transformer.pos_embed(torch.zeros(1, *latents_shape(pipeline))).shape[1]
    assert schedule_inputs(pipeline, 4)["mu"] == pytest.approx(calculate_shift(tokens))


def test_a_network_that_would_not_hear_of_a_pictures_size_is_no_sdxl(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    settings = json.loads((folder / "unet/config.json").read_text()) | {"addition_embed_type": None}
    UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="addition_embed_type None"):
        load_pipeline(str(folder), "cpu")


def test_an_sdxl_s_latents_are_scaled_by_channel_where_its_vae_says_so(folders, tmp_path):
    folder = shutil.copytree(folders["sdxl"], tmp_path / "model")
    settings = json.loads((folder / "vae/config.json").read_text())
    settings |= dict(latents_mean=[-1.6, 1.1, 0.1, -0.5], latents_std=[8.4, 5.9, 5.0, 5.8],
                     scaling_factor=0.5)
    (folder / "vae/config.json").write_text(json.dumps(settings))
    ours = load_pipeline(str(folder), "cpu", resolution=16)
    drawn = sample_trajectories(ours, PROMPTS, 3, 3.5, 0.0, torch.Generator().manual_seed(0))
    _, images = plain_latents(plain_pipeline(folder, "sdxl"), drawn.latents[:, 0])
    torch.testing.assert_close(drawn.images.float() / 255, images, rtol=0, atol=0.003)
