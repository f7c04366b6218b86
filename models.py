"""The model: which ones work here, and what differs between them.

    family      network                  prompt as                        guidance      latents
    SD 1, 2     UNet2DConditionModel     CLIP                             two passes    4 x h x w
    SDXL        UNet2DConditionModel     two CLIPs, size of the picture   two passes    4 x h x w
    SD 3, 3.5   SD3Transformer2DModel    two CLIPs, T5 or zeros           two passes    16 x h x w
    FLUX.1      FluxTransformer2DModel   CLIP, T5                         an input      16 x h x w

These functions know the differences: `encode_prompt`, `passes` and `condition` (prompts), `predict`
(the network), `network_channels`, `check_resolution` and `schedule_inputs` (size and schedule), `blocks`
and `lora_targets` (layers). Another family needs a branch where Stable Diffusion 1's, the last one, does
not suit it; its classes in NETWORKS and CLASSES of loading.py, which refuses other models; and a random
model in tests/families.py. Everything else works with what they return: latents (B, C, H, W), the
network's output of the same shape, and embeddings that it only hands on.
"""

import contextlib
import io
import os
import sys
import warnings
from pathlib import Path

# Both libraries remark on what is fine here, torchvision's absence for one; "warning" lets you hear it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
# diffusers 0.42 calls torch_dtype dtype, which earlier releases do not know
warnings.filterwarnings("ignore", message=".*torch_dtype.*")

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel,
                       SD3Transformer2DModel, UNet2DConditionModel)

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # ρ and → end no run where the terminal has no such letters
for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # of loading; our own bars come later and say more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DECODED_AT_ONCE = 8  # pictures
FLUX_SIZE = 128  # of its latents' sides: 1024 pixels; the other networks' configurations say theirs


def default_dtype(device):
    """The name of the dtype that networks compute in where none is asked for.

    On a GPU fp16, whose rounding moves the ratio ρ less than bf16's (benchmarks/rounding.py). On a
    CPU, which cannot compute in fp16, bf16 if there are instructions for it: it is faster than fp32
    (benchmarks/epoch.py), and the emoji model learns nearly as well. Without them it would take many
    times as long.
    """
    kind, cpu = torch.device(device).type, Path("/proc/cpuinfo")
    if kind == "cuda":
        return "fp16"
    native = kind == "cpu" and cpu.exists() and "avx512_bf16" in cpu.read_text()
    return "bf16" if native else "fp32"


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
    """That of the text encoder that reads most of a prompt: T5 where there is one."""
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
    """The layers of its attention, in transformers also those for the prompt's tokens."""
    targets = "to_q,to_k,to_v,to_out.0"
    if any(name.endswith("add_q_proj") for name, _ in network.named_modules()):
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
                                 f"called {target!r}; choose some, such as {lora_targets(network)}")
        torch.manual_seed(config.seed)  # the adapter starts the same on every process
        try:
            network.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank,
                                           init_lora_weights="gaussian", target_modules=targets))
        except (ValueError, TypeError) as error:  # a layer that is neither linear nor a convolution
            raise ValueError(f"--lora-targets {wanted}: {first_line(error)}; choose others, such "
                             f"as {lora_targets(network)}") from error
    else:
        network.requires_grad_(True)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


# Size and schedule

def check_resolution(resolution, network_class, config, scale):
    """The side of a network's patches of latents. Raises ValueError if they do not fill the picture.

    scale: pixels of a latent's side."""
    patch = 2 if network_class is FluxTransformer2DModel else config.get("patch_size", 1)
    if resolution % (scale * patch) or resolution < 0:
        raise ValueError(f"--resolution {resolution}: must be a multiple of {scale * patch}, or 0 for "
                         "the model's own")
    return patch


def set_resolution(pipeline, model, resolution):
    """Fixes the latents' shape: of the resolution given, or of the one that the network was trained
    on."""
    network, scale = denoiser(pipeline), pipeline.vae_scale_factor
    patch = check_resolution(resolution, type(network), network.config, scale)
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


def latents_shape(pipeline):
    """(C, H, W) of the latents."""
    if not hasattr(pipeline, "latents_shape"):  # a pipeline that load_pipeline has not loaded
        set_resolution(pipeline, "", 0)
    return pipeline.latents_shape


def is_flow(scheduler):
    """Whether a model with this scheduler is one of flow matching."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def prediction_kind(scheduler):
    """What the network predicts: flow, or the prediction_type of the other schedulers."""
    return "flow" if is_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")


def ddim_scheduler(scheduler):
    """The scheduler that we sample with: a flow-matching one as it is, otherwise DDIM with the same
    noise schedule. Settings keep the values that the given scheduler runs with, even those that its
    file left out.

    Raises ValueError, one line, for a scheduler of neither kind, and for options under which the
    steps would be others, or not affine.
    """
    config, name = dict(scheduler.config), type(scheduler).__name__
    if is_flow(scheduler):
        for option in ("stochastic_sampling", "invert_sigmas"):
            if config.get(option):
                raise ValueError(f"scheduler: {option}={config[option]} is another process than the "
                                 f"one we sample; set {option} to false in scheduler/scheduler_config.json")
        return scheduler
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        raise ValueError(f"scheduler: {name} has no noise schedule that we know; give one with a beta "
                         "schedule, such as DDIMScheduler, or FlowMatchEulerDiscreteScheduler")
    for option in ("clip_sample", "thresholding"):
        if config.get(option, False):
            raise ValueError(f"scheduler: {option}=True bends the step, which is then no Gaussian around an "
                             f"affine mean; set {option} to false in scheduler/scheduler_config.json")
        config[option] = False  # DDIMScheduler's own default for clip_sample is True
    if "original_inference_steps" in config:  # LCM, TCD: they ignore the spacing and start at pure noise
        config["timestep_spacing"] = "trailing"
    config.pop("_use_default_values", None)  # or DDIM's defaults would replace those of the given class
    try:
        return DDIMScheduler.from_config(config)
    except NotImplementedError:
        raise ValueError(f"scheduler: beta_schedule {config['beta_schedule']!r} is not one of DDIM's; choose "
                         "linear, scaled_linear or squaredcos_cap_v2, or give trained_betas") from None


def schedule_inputs(pipeline, num_steps):
    """What the pipeline hands to a flow-matching scheduler's set_timesteps, for `ddim_table`:
    FLUX's times before their shift, and a shift mu that grows with the number of the picture's tokens,
    from base_shift at 256 to max_shift at 4096."""
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

    Each different prompt is encoded once and alone, so that its embedding does not depend on the
    others. The text encoders work wherever they are, and what is remembered may lie elsewhere, too.
    """
    cache = {} if cache is None else cache
    device = denoiser(pipeline).device
    for prompt in dict.fromkeys(prompts):
        if prompt not in cache:
            embeds = encode_prompt(pipeline, prompt)
            cache[prompt] = {key: value[0].to(device) for key, value in embeds.items()}
    rows = [cache[prompt] for prompt in prompts]
    embeds = {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}
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
        scale = float(guidance_scale or 1.0)  # 0 means none, too
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
    one_graph = getattr(network, "one_graph", False)  # see training.compile_blocks
    with autocast(latents.device, dtype), torch.set_grad_enabled(torch.is_grad_enabled() or one_graph):
        latents = latents.to(dtype)
        if isinstance(network, FluxTransformer2DModel):
            output = flux_predict(network, latents, timesteps, **inputs)
        elif isinstance(network, SD3Transformer2DModel):
            output = network(latents, timestep=timesteps, **inputs).sample.contiguous()
        else:
            embeds = inputs.pop("encoder_hidden_states")
            added = {"added_cond_kwargs": inputs} if inputs else {}
            output = network(latents, timesteps, encoder_hidden_states=embeds, **added).sample.contiguous()
    return output if torch.is_grad_enabled() else output.detach()


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
def decode(pipeline, latents):
    """(B, C, H, W) latents -> (B, 3, height, width) uint8, in slices, because a decoder's
    activations are large.

    A VAE that waits on the CPU is brought to the latents, and stays there.
    Raises FloatingPointError if latents or pixels are not finite: the pictures would be black.
    """
    vae, config = pipeline.vae.to(latents.device), pipeline.vae.config
    shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if means and stds and kind_of(pipeline) == "StableDiffusionXLPipeline":  # other pipelines ignore them
        shift, std = (latents.new_tensor(values).view(-1, 1, 1) for values in (means, stds))
        scale = scale / std
    images, finite = [], latents.isfinite().all()
    for part in latents.split(DECODED_AT_ONCE):
        pixels = vae.decode((part / scale + shift).to(vae.dtype)).sample
        finite &= pixels.isfinite().all()
        images.append(((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte())
    if not finite:  # asked once a batch, since the answer waits for the device
        raise FloatingPointError("the pictures are not finite")
    return torch.cat(images)
