"""Claims about Stable Diffusion, on random pipelines of its classes: what saves memory or time
changes no result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import ddpo
import rwr
from ddpo import Config, PRESETS, kl_loss, parse_config, reference_output, step_weights
from loading import find_variant, is_emoji
from models import blocks, latents_shape
from run_folder import read_metrics, save_weights
from sample import ddim_table, encode_prompts, load_pipeline, predict, step_etas
from stable_diffusion import ROOT, save_pipeline
from training import make_trainable, start

SMALL = dict(images=8, sample_batch=4, train_batch=4, steps=4, epochs=1, eval_images=4, group_size=2,
             watch="", updates=2, lora_rank=4, device="cpu", dtype="fp32", lr=1e-3)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def epsilon_model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("models") / "model")


def weights(folder):
    path = folder / "pytorch_lora_weights.safetensors"
    return load_file(path if path.exists() else folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_both_predictions_train_and_begin_with_a_ratio_of_one(model, tmp_path, lora_rank, dtype):
    settings = SMALL | dict(lora_rank=lora_rank, dtype=dtype)
    folder = ddpo.train(Config(model=model, out=str(tmp_path), **settings))
    row = read_metrics(folder / "metrics.jsonl")[-1]
    assert row["ratio_error"] == 0.0 and row["grad_norm"] > 0


@pytest.mark.parametrize("settings", [
    dict(gradient_checkpointing=True), dict(train_batch=1), dict(train_batch=3), dict(offload=True),
    dict(gradient_checkpointing=True, lora_rank=0), dict(offload=True, lora_rank=0)])
def test_what_saves_memory_leaves_the_update_as_it_is(epsilon_model, tmp_path, settings):
    plain = SMALL | dict(lora_rank=settings.get("lora_rank", 4), lr=1e-4, warmup=0, ema=0.0)
    folders = [ddpo.train(Config(model=epsilon_model, out=str(tmp_path), name=name, **plain | changes))
               for name, changes in (("plain", {}), ("saving", settings))]
    whole, saving = map(weights, folders)
    difference = torch.cat([(whole[key] - saving[key]).abs().flatten() for key in whole])
    # Adam turns a gradient of 1e-9 into a step of either sign
    assert (difference > 1e-5).float().mean() < 1e-3
    norms = [read_metrics(folder / "metrics.jsonl")[-1]["grad_norm"] for folder in folders]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiling_changes_no_gradient_and_sampling_still_rounds_as_training_does(tmp_path):
    model = save_pipeline(tmp_path / "model", block_out_channels=[32], mid_block_type=None,
                          down_block_types=["CrossAttnDownBlock2D"],
                          up_block_types=["UpBlock2D"])  # little to compile, and a layer of each kind
    gradients = []
    for compiled in (False, True):
        settings = SMALL | dict(compile=compiled, dtype="bf16", lora_rank=0)
        config = Config(model=model, out=str(tmp_path), name=f"compiled-{compiled}", **settings)
        run = start(ddpo.check(config))
        output = predict(run.pipeline.unet, *inputs(run), run.dtype)
        with torch.no_grad():
            assert torch.equal(output, predict(run.pipeline.unet, *inputs(run), run.dtype))
        output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in run.parameters]))
    eager, compiled = gradients
    assert (compiled - eager).norm() < 0.02 * eager.norm()  # bf16


def test_plain_diffusers_draws_the_same_picture_from_the_adapter(model, tmp_path):
    folder = ddpo.train(Config(model=model, out=str(tmp_path), **SMALL | dict(warmup=0, ema=0.0, lr=1e-2)))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(["a cat"], num_inference_steps=4, latents=noise, output_type="pt").images

    plain = StableDiffusionPipeline.from_pretrained(model)
    base = draw(plain)
    plain.load_lora_weights(str(folder))
    tuned = draw(plain)
    assert (tuned - base).abs().max() > 0.01
    torch.testing.assert_close(tuned, draw(load_pipeline(model, "cpu", lora=folder)), rtol=0, atol=1e-3)


LAYERS = ["to_q", "proj_in", "proj_out", "conv_in", "conv_out", "conv1", "conv2", "conv_shortcut",
          "time_emb_proj", "linear_1", "ff.net.0.proj", "ff.net.2", "conv"]


@pytest.mark.parametrize("targets", [",".join(LAYERS), "to_k,conv_in", "conv_out,to_v", "proj_in"])
def test_an_adapter_on_any_layer_comes_back_whole_in_plain_diffusers_and_here(
        epsilon_model, tmp_path, targets):
    pipeline, config = load_pipeline(epsilon_model, "cpu"), Config(lora_rank=3, lora_targets=targets)
    parameters = make_trainable(pipeline.unet, config)
    with torch.no_grad():
        for p in parameters:
            p.normal_(0, 0.1)
    pipeline.unet.to(memory_format=torch.channels_last)  # as on a GPU, and with --compile
    save_weights(pipeline, config, tmp_path / "run")
    plain = StableDiffusionPipeline.from_pretrained(epsilon_model)
    plain.load_lora_weights(str(tmp_path / "run"))
    torch.manual_seed(0)
    x, embeds = torch.randn(1, 4, 8, 8), torch.randn(1, 20, 32)
    tuned = predict(pipeline.unet, x, torch.tensor([500]), embeds)
    assert sum("lora_" in name for name, _ in plain.unet.named_parameters()) == len(parameters)
    for other in (plain, load_pipeline(epsilon_model, "cpu", lora=tmp_path / "run")):
        output = predict(other.unet, x, torch.tensor([500]), embeds)
        torch.testing.assert_close(output, tuned, rtol=1e-4, atol=1e-5)


def test_an_adapter_or_a_unet_that_fits_in_part_is_refused(epsilon_model, tmp_path):
    pipeline, config = load_pipeline(epsilon_model, "cpu"), Config(lora_rank=3)
    make_trainable(pipeline.unet, config)
    save_weights(pipeline, config, tmp_path / "run")
    file = tmp_path / "run/pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    renamed = [key for key in tensors if "attn2.to_q" in key]
    save_file({key.replace("attn2.to_q", "attn2.to_r"): value for key, value in tensors.items()}, file)
    counts = f"{len(tensors)} tensors .* {len(tensors) - len(renamed)}"
    with pytest.raises(ValueError, match=f"--lora .* {counts}") as error:
        load_pipeline(epsilon_model, "cpu", lora=tmp_path / "run")
    assert "\n" not in str(error.value)
    load_pipeline(epsilon_model, "cpu").unet.save_pretrained(tmp_path / "whole/unet")
    file = tmp_path / "whole/unet/diffusion_pytorch_model.safetensors"
    rest = {key: value for key, value in load_file(file).items() if key != "conv_out.bias"}
    save_file(rest, file, {"format": "pt"})
    with pytest.raises(ValueError, match="--lora .*1 weights of its unet.* conv_out.bias"):
        load_pipeline(epsilon_model, "cpu", lora=tmp_path / "whole")
    other = save_pipeline(tmp_path / "other", block_out_channels=(32, 96))
    load_pipeline(other, "cpu").unet.save_pretrained(tmp_path / "foreign/unet")
    with pytest.raises(ValueError, match="--lora .*other layers"):
        load_pipeline(epsilon_model, "cpu", lora=tmp_path / "foreign")


def lacks(component, key):
    def damage(folder):
        file, = (folder / component).glob("*.safetensors")
        rest = {name: value for name, value in load_file(file).items() if not name.endswith(key)}
        save_file(rest, file, {"format": "pt"})
    return damage


def edited(file, **changes):
    def damage(folder):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | changes))
    return damage


def unfused(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    make_trainable(pipeline.unet, Config(lora_rank=2))
    pipeline.save_pretrained(folder)


def code(component, entry):
    """A folder that asks diffusers to run its Python file, as releases before 0.38 do."""
    def damage(folder):
        (folder / component).mkdir(exist_ok=True)
        (folder / component / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
        edited("model_index.json", **{component or "_class_name": entry})(folder)
    return damage


@pytest.mark.parametrize("damage, names", [
    (lacks("text_encoder", "layers.0.mlp.fc2.weight"), "1 weights of its text_encoder"),
    (lacks("text_encoder", "final_layer_norm.bias"), "1 weights of its text_encoder"),
    (lacks("vae", "decoder.conv_out.weight"), "1 weights of its vae"),
    (lacks("unet", "conv_in.weight"), "1 weights of its unet"),
    (unfused, "fuse_lora"),
    (lambda folder: (folder / "vae/diffusion_pytorch_model.safetensors").unlink(),
     "no weights in its folder vae/"),
    (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer/ is missing"),
    (lambda folder: (folder / "tokenizer/tokenizer_config.json").unlink(),
     "does not say how many tokens it reads"),
    (lambda folder: shutil.copytree(ROOT / "models/emoji/text_encoder", folder / "text_encoder",
                                    dirs_exist_ok=True), "its parts do not fit together"),
    (edited("unet/config.json", sample_size=None), "sample_size null; give --resolution"),
    (edited("unet/config.json", encoder_hid_dim=32, encoder_hid_dim_type="text_proj"), "weights of its unet"),
    (edited("vae/config.json", latent_channels=9), "cannot be loaded"),
    (edited("text_encoder/config.json", hidden_size=64), "cannot be loaded"),
    (edited("text_encoder/config.json", num_hidden_layers=1),
     "has no place in the layers of its text_encoder/config.json"),
    (edited("model_index.json", _class_name="StableDiffusionInpaintPipeline"), "StableDiffusion3Pipeline"),
    (edited("model_index.json", _class_name=None), "none of the families"),
    (edited("model_index.json", vae=["transformers", "CLIPTextModel"]), "its vae is"),
    (edited("model_index.json", text_encoder=[None, None]), "its text_encoder is"),
    (edited("model_index.json", text_encoder=["os", "system"]), "its text_encoder is"),
    (lambda folder: (folder / "model_index.json").write_text("[]"), "cannot be loaded"),
    (code("", ["evil", "Evil"]), "none of the families"),
    (code("unet", ["evil", "Evil"]), "evil.py"),
    (code("text_encoder", ["transformers", "CLIPTextModel"]), "evil.py"),
])
def test_a_folder_with_a_hole_or_with_code_is_one_line_and_nothing_runs(
        epsilon_model, tmp_path, capsys, damage, names):
    model = tmp_path / "model"
    shutil.copytree(epsilon_model, model)
    damage(model)
    default = torch.get_default_dtype()
    with pytest.raises(SystemExit) as stop:
        ddpo.main(["--model", str(model), "--out", str(tmp_path / "runs"), "--device", "cpu", "--epochs", "1",
                   "--prompts", "animals"])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")]
    assert stop.value.code == 2 and len(err) == 1 and names in err[0] and f"--model {model}" in err[0]
    assert not (tmp_path / "runs").exists() and not (model / "ran").exists()
    assert torch.get_default_dtype() == default


@pytest.mark.parametrize("settings", [
    dict(time_cond_proj_dim=16), dict(class_embed_type="timestep"), dict(num_class_embeds=3),
    dict(in_channels=9),
    dict(out_channels=8), dict(addition_embed_type="text", addition_embed_type_num_heads=4),
    dict(attention_type="gated"),
    dict(cross_attention_dim=48)])
def test_a_network_that_asks_for_more_or_gives_something_else_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="^--model .*(asks for more|do not fit|predicts)") as error:
        load_pipeline(save_pipeline(tmp_path / "model", **settings), "cpu")
    assert "\n" not in str(error.value)


def test_a_folder_of_one_variant_is_loaded_and_a_null_size_is_given_by_resolution(epsilon_model, tmp_path):
    plain = load_pipeline(epsilon_model, "cpu")
    theirs = StableDiffusionPipeline.from_pretrained(epsilon_model).to(torch.float16)
    theirs.save_pretrained(tmp_path / "model", variant="fp16")
    edited("unet/config.json", sample_size=None)(tmp_path / "model")
    half = load_pipeline(str(tmp_path / "model"), "cpu", resolution=16)
    assert latents_shape(half) == latents_shape(plain) == (4, 8, 8)
    assert latents_shape(load_pipeline(epsilon_model, "cpu", resolution=32)) == (4, 16, 16)
    for a, b in zip(plain.unet.parameters(), half.unet.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)
    with pytest.raises(ValueError, match="--resolution 15: must be a multiple of 2"):
        load_pipeline(epsilon_model, "cpu", resolution=15)


def test_a_tokenizer_without_a_vocabulary_is_refused(epsilon_model, tmp_path):
    shutil.copytree(epsilon_model, tmp_path / "model")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / "model/tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="its tokenizer has no vocabulary|protobuf"):  # releases before 5
        load_pipeline(tmp_path / "model", "cpu")


def test_a_folder_of_ones_own_called_emoji_is_not_the_shipped_model(epsilon_model, tmp_path, monkeypatch):
    shutil.copytree(epsilon_model, tmp_path / "models/emoji")
    assert is_emoji("models/emoji") and is_emoji(ROOT / "models/emoji")
    assert not is_emoji(tmp_path / "models/emoji")
    (tmp_path / "link").symlink_to(ROOT / "models/emoji")
    assert is_emoji(tmp_path / "link") and not is_emoji("someone/emoji")
    monkeypatch.chdir(tmp_path)
    assert not is_emoji("models/emoji") and parse_config(["--model", "models/emoji"])[0].preset == "sd15"
    monkeypatch.chdir(tmp_path / "models")
    assert is_emoji("models/emoji") and not is_emoji("emoji")
    monkeypatch.setattr(type(tmp_path), "resolve", lambda path: path)  # a Mac keeps the E of Emoji
    assert is_emoji(tmp_path / "link")


def inputs(run, batch=3):
    torch.manual_seed(1)
    return (torch.randn(batch, 4, 8, 8), torch.tensor([1, 500, 900]),
            encode_prompts(run.pipeline, ["a cat"] * batch), encode_prompts(run.pipeline, [""]))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_divergence_is_zero_at_the_base_model_and_positive_away_from_it(
        epsilon_model, tmp_path, lora_rank):
    settings = SMALL | dict(lora_rank=lora_rank, kl=1.0)
    run = ddpo.prepare(Config(model=epsilon_model, out=str(tmp_path), **settings))
    output, reference = predict(run.pipeline.unet, *inputs(run)), reference_output(run, *inputs(run))
    assert kl_loss(output, reference, 4.0).tolist() == [0, 0, 0]
    with torch.no_grad():
        for p in run.parameters:
            p.add_(0.05 * torch.randn_like(p))
    output = predict(run.pipeline.unet, *inputs(run))
    assert output.requires_grad  # comparing with the base model has not switched the adapter off
    away = kl_loss(output, reference_output(run, *inputs(run)), 4.0)
    assert (away > 0).all()
    unconditional, conditional = (output - reference).chunk(2)
    by_hand = (unconditional + 4.0 * (conditional - unconditional)).square().mean((1, 2, 3))
    torch.testing.assert_close(away, by_hand, rtol=1e-4, atol=1e-7)


def test_a_divergence_weight_holds_the_model_back(epsilon_model, tmp_path):
    moved = []
    for kl in (0.0, 1e4):
        folder = ddpo.train(Config(model=epsilon_model, out=str(tmp_path), name=f"kl{kl}",
                                   **SMALL | dict(epochs=3, updates=4, kl=kl)))
        settings = SMALL | dict(epochs=3, updates=4, kl=kl or 1.0)
        config = Config(model=epsilon_model, out=str(tmp_path), name=f"kl{kl}", **settings)
        run = ddpo.prepare(config, resume=True)
        outputs = predict(run.pipeline.unet, *inputs(run)), reference_output(run, *inputs(run))
        moved.append(kl_loss(*outputs, 4.0).mean().item())
    assert ("kl" in read_metrics(folder / "metrics.jsonl")[-1]) and moved[1] < 0.5 * moved[0]


@pytest.mark.skipif(ddpo.kernels.triton is None, reason="no triton on this machine")
def test_the_divergence_joins_the_fused_kernels_gradient(epsilon_model, tmp_path, monkeypatch):
    trained = {}
    for backend in ("torch", "triton"):
        monkeypatch.setattr(ddpo.kernels, "BACKEND", "auto")
        settings = SMALL | dict(images=4, steps=2, kl=1e3, warmup=0, ema=0.0, kernels=backend, device="")
        config = Config(model=epsilon_model, out=str(tmp_path), name=backend, **settings)
        trained[backend] = weights(ddpo.train(config))
    difference = max((trained["torch"][key] - trained["triton"][key]).abs().max() for key in trained["torch"])
    assert difference <= 1e-4  # without the divergence: 1.7e-3


def test_outside_the_window_steps_are_deterministic_and_are_no_actions(epsilon_model, tmp_path):
    settings = SMALL | dict(steps=10, window="2:5")
    run = start(ddpo.check(Config(model=epsilon_model, out=str(tmp_path), **settings)))
    assert step_etas(10, run.config.eta, run.config.window).tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    table, policy_steps, steps_per_picture, _ = ddpo.epoch_steps(run, 1)
    assert policy_steps.tolist() == [2, 3] and steps_per_picture == 2
    _, stochastic = ddim_table(run.pipeline.scheduler, 10, 1.0)
    _, deterministic = ddim_table(run.pipeline.scheduler, 10, 0.0)
    assert torch.equal(table[2:5], stochastic[2:5]) and torch.equal(table[5:, :3], deterministic[5:, :3])


def test_equal_step_weights_take_out_what_the_schedule_multiplies_a_steps_gradient_with(epsilon_model):
    _, table = ddim_table(load_pipeline(epsilon_model, "cpu").scheduler, 20)
    steps = torch.arange(20)
    weighted = step_weights(table, steps, "equal")
    gradient = table[:, 1].abs() / table[:, 2]  # of log p in the output, for noise of size 1
    torch.testing.assert_close(weighted * gradient, torch.full((20,), (weighted * gradient)[0].item()))
    assert weighted.mean().item() == pytest.approx(1)
    assert step_weights(table, steps, "none").tolist() == [1] * 20
    assert step_weights(table, steps[:5], "equal")[:5].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_possible_and_explicit_flags_win(preset, tmp_path):
    processes = 8 if preset.endswith("8gpu") else 1
    config, _ = parse_config(["--preset", preset, "--device", "cpu", "--epochs", "3"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(processes))
        ddpo.check(config)
    assert config.epochs == 3 and config.preset == preset
    if preset != "emoji":
        assert config.prompts == "imagenet_animals" and config.watch == ""
        assert parse_config(["--preset", preset, "--reward", "aesthetic"])[0].prompts == "animals"
        assert parse_config(["--preset", preset, "--prompts", "objects"])[0].prompts == "objects"


def test_the_whole_unet_of_another_model_has_a_smaller_learning_rate():
    rates = {(model, rank): ddpo.check(Config(model=model, lora_rank=rank, device="cpu")).lr
             for model in ("models/emoji", "sd") for rank in (0, 4)}
    assert rates == {("models/emoji", 0): 1.3e-4, ("models/emoji", 4): 3e-3, ("sd", 0): 1e-5, ("sd", 4): 3e-4}


def test_a_model_of_ones_own_that_is_like_the_shipped_one_learns_as_fast_where_the_preset_says_so():
    for loop, lr in ((ddpo, 1.3e-4), (rwr, 1.3e-4 / 4)):
        for flags in (["--model", "mine", "--preset", "emoji"], []):
            assert loop.check(loop.parse_config([*flags, "--device", "cpu"])[0]).lr == lr


@pytest.mark.parametrize("arguments, names", [
    (["--window", "5:3"], "window"), (["--window", "x"], "window"), (["--window", "0:99"], "window"),
    (["--kl", "-1"], "kl"), (["--ema", "1"], "ema"), (["--guard", "-1"], "guard"),
    (["--patience", "0"], "patience"), (["--cuda-graph"], "cuda-graph"),
    (["--train-first", "0"], "train-first"), (["--step-weights", "odd"], "step-weights"),
    (["--optimizer", "sgd"], "optimizer"),
    (["--eval-prompts", "no_such"], "no_such"), (["--model", "SDXL"], "not a text-to-image Stable Diffusion"),
    (["--model", "FLUX"], "cannot be loaded"),
])
def test_what_cannot_work_is_one_line(tmp_path, capsys, arguments, names):
    if "SDXL" in arguments:
        arguments[1] = save_pipeline(tmp_path / "xl", addition_embed_type="text_time",
                                     addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)
    if "FLUX" in arguments:
        shutil.copytree(save_pipeline(tmp_path / "flux"), tmp_path / "model")
        index = tmp_path / "model/model_index.json"
        other = {"unet": ["diffusers", "FluxTransformer2DModel"]}
        index.write_text(json.dumps(json.loads(index.read_text()) | other))
        arguments[1] = str(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        ddpo.main(["--out", str(tmp_path / "runs"), "--device", "cpu", "--epochs", "1", *arguments])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and names in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_the_vae_stays_float32_whatever_the_network_computes_in(epsilon_model):
    pipeline = load_pipeline(epsilon_model, "cpu", torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    assert pipeline.vae.dtype == torch.float32


def test_every_part_of_a_unet_with_attention_or_convolutions_is_compiled(epsilon_model):
    unet = load_pipeline(epsilon_model, "cpu").unet
    inside = {id(p) for block in blocks(unet) for p in block.parameters()}
    outside = {name.split(".")[0] for name, p in unet.named_parameters() if id(p) not in inside}
    assert outside == {"conv_in", "time_embedding", "conv_out"}


def test_of_several_variants_fp16_is_loaded_and_plain_weights_before_any(tmp_path):
    for name, variant in (("model.bf16-00001-of-00002.safetensors", "bf16"),
                          ("diffusion_pytorch_model.non_ema.bin", "bf16"), ("model.fp16.safetensors", "fp16"),
                          ("model.safetensors", None)):
        (tmp_path / name).touch()
        assert find_variant(tmp_path) == variant


def test_the_scales_that_other_trainers_save_beside_an_adapter_do_not_count_as_its_weights(
        epsilon_model, tmp_path):
    pipeline, config = load_pipeline(epsilon_model, "cpu"), Config(lora_rank=4)
    make_trainable(pipeline.unet, config)
    save_weights(pipeline, config, tmp_path)
    file, theirs = tmp_path / "pytorch_lora_weights.safetensors", {}
    for key, value in load_file(file).items():  # as kohya's scripts name them
        layer, _, matrix = key.removeprefix("unet.").partition(".lora_")
        layer = "lora_unet_" + layer.replace(".", "_")
        theirs[f"{layer}.lora_{'down' if matrix.startswith('A') else 'up'}.weight"] = value
        theirs[f"{layer}.alpha"] = torch.tensor(4.0)
    save_file(theirs, file)
    tuned = load_pipeline(epsilon_model, "cpu", lora=tmp_path).unet.state_dict()
    assert sum(".tuned." in key for key in tuned) == len(theirs) * 2 // 3


def test_an_adapter_starts_the_same_for_a_seed_and_otherwise_for_another(epsilon_model):
    def adapter(seed):
        unet = load_pipeline(epsilon_model, "cpu").unet
        parameters = make_trainable(unet, Config(lora_rank=2, seed=seed))
        return torch.cat([p.flatten() for p in parameters])

    assert torch.equal(adapter(3), adapter(3)) and not torch.equal(adapter(3), adapter(4))


def test_a_loaded_model_is_frozen(epsilon_model):
    pipeline = load_pipeline(epsilon_model, "cpu")
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("only", [("unet", "vae", "text_encoder"), ("unet",)])
def test_a_hub_s_model_of_fp16_weights_alone_is_loaded_from_them(tmp_path, monkeypatch, only):
    folder, asked = Path(save_pipeline(tmp_path / "hub")), []
    for weights in folder.glob("*/*.safetensors"):
        if weights.parent.name in only:
            weights.rename(weights.with_suffix(".fp16.safetensors"))

    def download(model, variant=None, **_):
        asked.append(variant)  # without one, diffusers fetches plain weights alone
        left_out = shutil.ignore_patterns(*([] if variant else ["*.fp16.*"]))
        return shutil.copytree(folder, tmp_path / "cache", ignore=left_out, dirs_exist_ok=True)

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    assert load_pipeline("someone/model", "cpu").unet and asked == [None, "fp16"]
