"""The model: which ones work here, and what differs between them.

    family      network                  prompt as                        guidance      latents
    SD 1, 2     UNet2DConditionModel     CLIP                             two passes    4 x h x w
    SDXL        UNet2DConditionModel     two CLIPs, size of the picture   two passes    4 x h x w
    SD 3, 3.5   SD3Transformer2DModel    two CLIPs, T5 or zeros           two passes    16 x h x w
    FLUX.1      FluxTransformer2DModel   CLIP, T5                         an input      16 x h x w

`load_pipeline`, `condition`, `predict` and `decode` know these differences. Everything else works
with what they return: latents (B, C, H, W), the network's output of the same shape, and embeddings
that it only hands on.
"""

import contextlib
import inspect
import json
import os
import re
import warnings
from pathlib import Path

# Both libraries remark on what is fine here, torchvision's absence for one; "warning" lets you hear it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# diffusers 0.42 calls torch_dtype dtype, which releases before do not know
warnings.filterwarnings("ignore", message=".*torch_dtype.*")

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel,
                       SD3Transformer2DModel, UNet2DConditionModel)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # of loading; our own bars come later and say more
HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NETWORKS = {
    "StableDiffusionPipeline": UNet2DConditionModel, "StableDiffusionXLPipeline": UNet2DConditionModel,
    "StableDiffusion3Pipeline": SD3Transformer2DModel, "FluxPipeline": FluxTransformer2DModel}
CLASSES = {  # that a folder may name for a component: nothing in these runs code from the folder
    "vae": "AutoencoderKL|AutoencoderTiny", "scheduler": r"\w+Scheduler",
    "tokenizer": "(CLIP|T5)Tokenizer(Fast)?",
    "text_encoder": "CLIPTextModel|CLIPTextModelWithProjection|T5EncoderModel",
    "unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel|FluxTransformer2DModel"}
OPTIONAL = {"text_encoder_3", "tokenizer_3"}  # SD3's T5: without it CLIP alone reads the prompts
UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}  # not loaded
FLUX_SIZE = 128  # of its latents' sides: 1024 pixels; the other networks' configurations say theirs
FURTHER_INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim",
                  "encoder_hid_dim_type")  # of UNets: distilled guidance, class labels, image prompts


def default_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# Loading

def locate(model):
    """The folder of a model: as given, or below this file (models/emoji from anywhere); or the hub
    id as it is."""
    return str(model) if Path(model).exists() or not (HERE / model).exists() else str(HERE / model)


def is_emoji(model):
    """Whether it is one of the shipped models, however its path is written; a user's own folder of
    that name is not."""
    shipped = [(HERE / "models" / name).resolve() for name in ("emoji", "emoji-flow")]
    return Path(locate(model)).resolve() in shipped


def load_pipeline(model="models/emoji", device=None, dtype=None, lora=None, lora_scale=1.0,
                  resolution=0):
    """A diffusers pipeline of one of the families above, with the scheduler that this project
    samples with.

    model: a folder in diffusers' layout, or a hub id.
    dtype: of the network and the text encoders; the VAE stays in float32: SDXL's overflows in
    float16, and bfloat16 cannot tell 256 levels apart.
    lora: a run's folder: its adapter (pytorch_lora_weights.safetensors), or its whole fine-tuned
    unet/ or transformer/.
    lora_scale: the strength of what was trained: 0 (the base model) to 1 (as trained).
    resolution: pixels of a side; 0: what the model was trained on.
    Raises ValueError, one line, if something is missing, does not fit together, or is of no family
    above.
    """
    try:
        device, dtype = torch.device(device or default_device()), dtype or torch.float32
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used here ({first_line(error)}); choose cpu, "
                         "or cuda where there is a GPU") from error
    source = locate(model)
    if Path(source).exists() and not (Path(source) / "model_index.json").exists():
        raise ValueError(f"--model {model}: no model_index.json in it; give a folder in diffusers' "
                         "layout, or a hub id")
    default = torch.get_default_dtype()
    try:
        if not Path(source).exists():
            source = diffusers.DiffusionPipeline.download(source, **dict.fromkeys(UNUSED))
        pipeline = load_components(Path(source), dtype)
        check_network(pipeline)
    except Exception as error:  # the hub and the loaders raise many kinds, which all mean the same
        torch.set_default_dtype(default)  # a loader that fails half-way leaves its own
        raise ValueError(f"--model {model}: cannot be loaded ({first_line(error)}); give a folder in "
                         "diffusers' layout or a hub id such as "
                         "stable-diffusion-v1-5/stable-diffusion-v1-5") from error
    pipeline.scheduler = ddim_scheduler(pipeline.scheduler)
    network = denoiser(pipeline)
    if lora is not None:
        load_tuned(pipeline, Path(lora), lora_scale, dtype)
        network = denoiser(pipeline)
    set_resolution(pipeline, model, resolution)
    if isinstance(network, UNet2DConditionModel) and device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # how tensor cores want a convolution's input
    if isinstance(network, UNet2DConditionModel) and device.type == "cpu":
        # On a CPU the backward of scaled_dot_product_attention is 16 times slower in bf16 than in
        # fp32; plain matrix products are not, and at these sizes nothing is lost by them.
        network.set_attn_processor(AttnProcessor())
    for module in (network, *text_encoders(pipeline), pipeline.vae):
        module.requires_grad_(False).eval()
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    try_out(pipeline, f"{model} --lora {lora}" if lora else model, dtype)
    return pipeline


def load_components(folder, dtype):
    """The pipeline that model_index.json names, put together from classes of diffusers and
    transformers alone. Releases of diffusers before 0.38 run Python files of a folder whose index
    names them; we neither let one lie there nor ask."""
    index = json.loads((folder / "model_index.json").read_text())
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise ValueError(f"a {first_line(kind)}, of none of the families that work: "
                         f"{', '.join(NETWORKS)}")
    scripts = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    if scripts:
        raise ValueError(f"a model needs no Python file, and {scripts[0]} is one; look what it does, "
                         "and remove it")
    pipeline_class = getattr(diffusers, kind)
    components = {}
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if name == "self" or name in UNUSED or parameter.default is not inspect.Parameter.empty:
            continue
        entry = index.get(name) or [None, None]
        if entry == [None, None] and name in OPTIONAL:
            components[name] = None
            continue
        allowed = CLASSES[re.sub(r"_\d$", "", name)]
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
                and entry[0] in ("diffusers", "transformers") and re.fullmatch(allowed, entry[1])):
            raise ValueError(f"its {name} is {entry}, not one of {allowed.replace('|', ', ')}")
        library = diffusers if entry[0] == "diffusers" else transformers
        components[name] = load_component(folder / name, getattr(library, entry[1]), dtype)
    if not isinstance(components.get("unet", components.get("transformer")), NETWORKS[kind]):
        raise ValueError(f"its network is not the {NETWORKS[kind].__name__} of a {kind}")
    options = {"requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
    if kind == "StableDiffusionXLPipeline":
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    unused = inspect.signature(pipeline_class.__init__).parameters.keys() & UNUSED
    return pipeline_class(**components, **dict.fromkeys(unused), **options)


def load_component(folder, component_class, dtype):
    """A tokenizer, a scheduler, or a network that has all its weights: loaders fill gaps with
    random numbers."""
    if not folder.is_dir():
        raise ValueError(f"its folder {folder.name}/ is missing")
    if not issubclass(component_class, torch.nn.Module):
        return component_class.from_pretrained(folder)
    dtype = torch.float32 if folder.name == "vae" else dtype
    network, info = component_class.from_pretrained(
        folder, torch_dtype=dtype, variant=find_variant(folder), output_loading_info=True)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if any("lora_" in key for key in unexpected):
        raise ValueError(f"its {folder.name} was saved with a LoRA beside its weights; call "
                         "pipe.fuse_lora() and pipe.unload_lora_weights() before pipe.save_pretrained()")
    if missing:
        raise ValueError(f"{len(missing)} weights of its {folder.name} are not in it, {missing[0]} for "
                         "one")
    return network


def find_variant(folder):
    """The variant of a folder's weights, such as fp16 of model.fp16.safetensors; None where there
    are plain ones."""
    pattern = (r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?"
               r"\.(?:safetensors|bin)")
    found = [re.fullmatch(pattern, file.name) for file in folder.iterdir()]
    variants = sorted({match[1] or match[2] or "" for match in filter(None, found)})
    if not variants:
        raise ValueError(f"no weights in its folder {folder.name}/")
    return None if "" in variants else "fp16" if "fp16" in variants else variants[0]


def check_network(pipeline):
    """Refuses networks that ask for more than latents, time and prompt, which would be left without
    it in silence."""
    network, config = denoiser(pipeline), denoiser(pipeline).config
    asks = [f"{option} {config[option]}" for option in FURTHER_INPUTS
            if config.get(option) is not None]
    if isinstance(network, UNet2DConditionModel):
        added = "text_time" if kind_of(pipeline) == "StableDiffusionXLPipeline" else None
        if config.addition_embed_type != added:
            asks.append(f"addition_embed_type {config.addition_embed_type}")
        if "gated" in config.attention_type:
            asks.append(f"attention_type {config.attention_type}")
    channels = pipeline.vae.config.latent_channels
    if network_channels(network) != channels:
        asks.append(f"{network_channels(network)} channels of latents, and its VAE gives {channels}")
    if asks:
        raise ValueError("not a text-to-image Stable Diffusion or FLUX: its network asks for more than "
                         f"latents, a timestep and a prompt, {asks[0]}")


def set_resolution(pipeline, model, resolution):
    """Fixes the latents' shape: of the resolution given, or of the one that the network was trained
    on."""
    network, scale = denoiser(pipeline), pipeline.vae_scale_factor
    patch = 2 if kind_of(pipeline) == "FluxPipeline" else network.config.get("patch_size", 1)
    if resolution % (scale * patch) or resolution < 0:
        raise ValueError(f"--resolution {resolution}: must be a multiple of {scale * patch}, or 0 for "
                         "the model's own")
    size = resolution // scale or network.config.get("sample_size", FLUX_SIZE)
    if not size:
        raise ValueError(f"--model {model}: its network's config.json has sample_size null; give "
                         "--resolution")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    largest = patch * network.config.get("pos_embed_max_size", height + width)
    if max(height, width) > largest:
        raise ValueError(f"--resolution {resolution}: too large for this model; choose {largest * scale} "
                         "or less")
    pipeline.latents_shape = (pipeline.vae.config.latent_channels, height, width)


@torch.no_grad()
def try_out(pipeline, model, dtype):
    """One prediction on small latents, of two pictures because group norms need two numbers: what does
    not fit together, or is not finite, is found before a run begins."""
    network, device = denoiser(pipeline), denoiser(pipeline).device
    latents = torch.zeros(2, latents_shape(pipeline)[0], 8, 8, device=device)
    try:
        inputs = condition(pipeline, ["", ""], 1.0)
        output = predict(network, latents, torch.full((2,), 500, device=device), *inputs[:2], dtype)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"--model {model}: its parts do not fit together "
                         f"({first_line(error)})") from error
    if output.shape != latents.shape:
        raise ValueError(f"--model {model}: its network predicts {output.shape[1]} channels, not the "
                         f"{latents.shape[1]} of the latents; give another model")
    if not output.isfinite().all():
        raise ValueError(f"--model {model}: its network predicts numbers that are not finite; give "
                         "another model")


def is_flow(scheduler):
    """Whether a model with this scheduler is one of flow matching."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def ddim_scheduler(scheduler):
    """The scheduler that we sample with: a flow-matching one as it is, otherwise DDIM with the same
    noise schedule. Settings keep the values that the given scheduler runs with, also those that its
    file left out.

    Raises ValueError, one line, for a scheduler of neither kind, and for options under which the
    steps would be others, or not affine.
    """
    config, name = dict(scheduler.config), type(scheduler).__name__
    if is_flow(scheduler):
        for option in ("stochastic_sampling", "invert_sigmas"):
            if config.get(option):
                raise ValueError(f"scheduler: {option}={config[option]} is another process than the one that "
                                 f"we sample; set {option} to false in scheduler/scheduler_config.json")
        return scheduler
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        raise ValueError(f"scheduler: {name} has no noise schedule that we know; give one with a beta "
                         "schedule, such as DDIMScheduler, or FlowMatchEulerDiscreteScheduler")
    for option in ("clip_sample", "thresholding"):
        if config.get(option, False):
            raise ValueError(f"scheduler: {option}=True bends the step, which is then no Gaussian around an "
                             f"affine mean; set {option} to false in scheduler/scheduler_config.json")
        config[option] = False  # DDIMScheduler's own default for clip_sample is True
    config.pop("_use_default_values", None)  # or DDIM's defaults would replace those of the given class
    try:
        return DDIMScheduler.from_config(config)
    except NotImplementedError:
        raise ValueError(f"scheduler: beta_schedule {config['beta_schedule']!r} is not one of DDIM's; choose "
                         "linear, scaled_linear or squaredcos_cap_v2, or give trained_betas") from None


def load_tuned(pipeline, folder, scale, dtype):
    """Put a run's weights into the pipeline: its whole network, or its adapter. All of them, or
    ValueError."""
    network, name = denoiser(pipeline), network_name(pipeline)
    adapter = folder / "pytorch_lora_weights.safetensors"
    try:
        if (folder / name).exists():
            tuned = load_component(folder / name, type(network), dtype)
            base, new = dict(network.named_parameters()), dict(tuned.named_parameters())
            if {key: p.shape for key, p in base.items()} != {key: p.shape for key, p in new.items()}:
                raise ValueError(f"its {name} has other layers than the model's")
            for key, parameter in new.items():
                parameter.data = torch.lerp(base[key].data, parameter.data, scale)
            setattr(pipeline, name, tuned)
        elif adapter.exists():
            wanted = sum(not key.endswith("alpha") for key in load_file(adapter))
            pipeline.load_lora_weights(str(folder), weight_name=adapter.name, adapter_name="tuned")
            loaded = sum(".tuned." in key for module in (network, *text_encoders(pipeline))
                         for key, _ in module.named_parameters())
            if loaded != wanted:
                raise ValueError(f"of the {wanted} tensors in its adapter the model takes {loaded}")
            pipeline.set_adapters(["tuned"], [scale])
        else:
            raise ValueError(f"no {adapter.name} and no {name}/ in it")
        if not all(p.isfinite().all() for p in denoiser(pipeline).parameters()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # as above
        raise ValueError(f"--lora {folder}: cannot be loaded ({first_line(error)}); give the folder of "
                         "a run of this model") from error


# The parts of a pipeline

def kind_of(pipeline):
    return type(pipeline).__name__


def network_name(pipeline):
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def denoiser(pipeline):
    """The network that is trained."""
    return getattr(pipeline, network_name(pipeline))


def text_encoders(pipeline):
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None]


def main_tokenizer(pipeline):
    """Of the text encoder that reads most of a prompt: T5 where there is one."""
    return (getattr(pipeline, "tokenizer_3", None) or getattr(pipeline, "tokenizer_2", None)
            or pipeline.tokenizer)


def network_channels(network):
    """Channels of the latents that it works on: FLUX's are packed by squares of 2 x 2."""
    return network.config.in_channels // (4 if isinstance(network, FluxTransformer2DModel) else 1)


def blocks(network):
    """The parts that torch.compile compiles, each by itself."""
    if isinstance(network, UNet2DConditionModel):
        # the last norm too, for eager mode is slow at norms of bf16 in channels_last
        parts = (*network.down_blocks, network.mid_block, *network.up_blocks, network.conv_norm_out)
        return [part for part in parts if part is not None]
    return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]


def lora_targets(network):
    """Its attention's layers, where transformers have some for the prompt's tokens, too."""
    targets = "to_q,to_k,to_v,to_out.0"
    if not isinstance(network, UNet2DConditionModel):
        targets += ",add_q_proj,add_k_proj,add_v_proj,to_add_out"
    return targets


def make_trainable(network, config):
    """The parameters to train, in float32, whatever the frozen ones are in."""
    if config.lora_rank:
        from peft import LoraConfig

        wanted = config.lora_targets or lora_targets(network)
        targets = [target.strip() for target in wanted.split(",")]
        names = [name for name, _ in network.named_modules() if name]
        for target in targets:  # peft is content when one of them is there
            if not any(f".{name}".endswith(f".{target}") for name in names):
                raise ValueError(f"--lora-targets {wanted}: no layer of the {type(network).__name__} is "
                                 f"called {target!r}; choose such as {lora_targets(network)}")
        torch.manual_seed(config.seed)  # the adapter starts the same on every process
        try:
            network.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank,
                                           init_lora_weights="gaussian", target_modules=targets))
        except (ValueError, TypeError) as error:  # a layer that is neither linear nor a convolution
            raise ValueError(f"--lora-targets {wanted}: {first_line(error)}; choose such as "
                             f"{lora_targets(network)}") from error
    else:
        network.requires_grad_(True)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


def latents_shape(pipeline):
    """(C, H, W) of the latents."""
    if not hasattr(pipeline, "latents_shape"):  # a pipeline that load_pipeline has not loaded
        set_resolution(pipeline, "", 0)
    return pipeline.latents_shape


def schedule_inputs(pipeline, num_steps):
    """What the pipeline hands to a flow-matching scheduler's set_timesteps, for `ddim_table`:
    FLUX's first times, and a shift mu that grows with the number of the picture's tokens, from
    base_shift at 256 to max_shift at 4096."""
    config, kind = pipeline.scheduler.config, kind_of(pipeline)
    inputs = {}
    if kind == "FluxPipeline" and not config.get("use_flow_sigmas"):
        inputs["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    if config.get("use_dynamic_shifting"):
        _, height, width = latents_shape(pipeline)
        patch = 2 if kind == "FluxPipeline" else pipeline.transformer.config.patch_size
        tokens = (height // patch) * (width // patch)
        fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, greatest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        inputs["mu"] = least + (greatest - least) * (tokens - fewest) / (most - fewest)
    return inputs


# Prompts

@torch.no_grad()
def encode_prompts(pipeline, prompts, cache=None):
    """What the network is told of the prompts, on its device: (B, L, E) for Stable Diffusion 1 and
    2, and otherwise a dict of the network's inputs, each (B, ...). cache: a dict that remembers
    them by prompt.

    Each different prompt is encoded once and alone, so that its embedding does not depend on its
    company. The text encoders work wherever they are: they may stay on the CPU.
    """
    cache = {} if cache is None else cache
    device = denoiser(pipeline).device
    for prompt in dict.fromkeys(prompts):
        if prompt not in cache:
            embeds = encode_prompt(pipeline, prompt)
            cache[prompt] = {key: value[0].to(device) for key, value in embeds.items()}
    rows = [cache[prompt] for prompt in prompts]
    embeds = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return embeds["encoder_hidden_states"] if len(embeds) == 1 else embeds


def encode_prompt(pipeline, prompt):
    """One prompt, (1, ...) of each input, as the pipeline's own call computes them."""
    kind, device = kind_of(pipeline), text_encoders(pipeline)[0].device
    if kind == "StableDiffusionXLPipeline":
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, device=device,
                                                      do_classifier_free_guidance=False)
        if prompt == "" and pipeline.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        height, width = (side * pipeline.vae_scale_factor for side in latents_shape(pipeline)[1:])
        time_ids = torch.tensor([[height, width, 0.0, 0.0, height, width]])  # full size, not cropped
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}
    if kind == "StableDiffusion3Pipeline":
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, device=device,
                                                      do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    if kind == "FluxPipeline":
        embeds, pooled, _ = pipeline.encode_prompt(prompt, device=device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    return {"encoder_hidden_states": pipeline.encode_prompt(prompt, device, 1, False)[0]}


def passes(pipeline, guidance_scale):
    """How many passes through the network a guided prediction takes. FLUX.1-dev has learnt to guide
    itself: it takes the scale as an input of its one pass."""
    guided = guidance_scale is not None and guidance_scale > 1
    return 2 if guided and kind_of(pipeline) != "FluxPipeline" else 1


def condition(pipeline, prompts, guidance_scale, cache=None, two_passes=True):
    """(prompt_embeds, negative_embeds, guidance_scale) for `predict` and for the step after it.

    Where guidance takes two passes, negative_embeds are those of the empty prompt. With one pass,
    or not two_passes, negative_embeds and guidance_scale are None.
    """
    prompt_embeds = encode_prompts(pipeline, prompts, cache)
    network = denoiser(pipeline)
    if isinstance(network, FluxTransformer2DModel) and network.config.guidance_embeds:
        scale = 1.0 if guidance_scale is None else float(guidance_scale)
        prompt_embeds["guidance"] = torch.full((len(prompts),), scale, device=network.device)
    if not two_passes or passes(pipeline, guidance_scale) == 1:
        return prompt_embeds, None, None
    return prompt_embeds, encode_prompts(pipeline, [""], cache), guidance_scale


# The network

def autocast(device, dtype):
    """bf16 and fp16 mean mixed precision: weights may be float32, matrix products are not."""
    device = torch.device(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def predict(network, latents, timesteps, prompt_embeds, negative_embeds=None, dtype=torch.float32):
    """The network's output (B, C, H, W), or, with negative_embeds, (2B, C, H, W): unconditional
    half first, in one pass.

    latents: (B, C, H, W). timesteps: (B,), in units of which a schedule has 1000. prompt_embeds: as
    `encode_prompts` gives them, for B prompts. negative_embeds: for one, the empty prompt.
    """
    if torch.is_tensor(prompt_embeds):
        prompt_embeds = {"encoder_hidden_states": prompt_embeds}
        negative_embeds = None if negative_embeds is None else {"encoder_hidden_states": negative_embeds}
    if negative_embeds is not None:
        latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        prompt_embeds = {key: torch.cat([negative_embeds[key].expand_as(value), value])
                         for key, value in prompt_embeds.items()}
    exact = ("time_ids", "guidance")  # numbers, not embeddings
    inputs = {key: value if key in exact else value.to(dtype) for key, value in prompt_embeds.items()}
    with autocast(latents.device, dtype):
        latents = latents.to(dtype)
        if isinstance(network, FluxTransformer2DModel):
            return flux_predict(network, latents, timesteps, **inputs)
        if isinstance(network, SD3Transformer2DModel):
            return network(latents, timestep=timesteps, **inputs).sample.contiguous()
        embeds = inputs.pop("encoder_hidden_states")
        added = {"added_cond_kwargs": inputs} if inputs else {}
        return network(latents, timesteps, encoder_hidden_states=embeds, **added).sample.contiguous()


def flux_predict(network, latents, timesteps, encoder_hidden_states, **inputs):
    """FLUX sees squares of 2 x 2 latents as tokens (B, h/2 · w/2, 4 C), and is told where each one
    lies."""
    batch, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = latents.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    tokens = tokens.flatten(1, 2).flatten(2)
    row = torch.arange(rows, device=latents.device, dtype=torch.float32).repeat_interleave(columns)
    column = torch.arange(columns, device=latents.device, dtype=torch.float32).repeat(rows)
    output = network(tokens, encoder_hidden_states, timestep=timesteps / 1000, **inputs,
                     img_ids=torch.stack([torch.zeros_like(row), row, column], 1),
                     txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=latents.device)).sample
    output = output.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(batch, channels, height, width)


@torch.no_grad()
def decode(pipeline, latents, batch_size=8):
    """(B, C, H, W) latents -> (B, 3, height, width) uint8, in slices, because a decoder's
    activations are large.

    A VAE that waits on the CPU is brought to the latents for the time that this takes.
    Raises FloatingPointError if latents or pixels are not finite: they would be black.
    """
    vae, home, config = pipeline.vae, pipeline.vae.device, pipeline.vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
    vae.to(latents.device)
    images, finite = [], latents.isfinite().all()
    for part in latents.split(batch_size):
        pixels = vae.decode((part / scale + shift).to(vae.dtype)).sample
        finite &= pixels.isfinite().all()
        images.append(((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte())
    vae.to(home)
    if not finite:  # asked once a batch, since the answer waits for the device
        raise FloatingPointError("the pictures are not finite")
    return torch.cat(images)
