"""The model: loading a pipeline, encoding prompts, calling its network, decoding its latents.

Everything else in this project works with what these functions return, and knows nothing of the networks behind it.
"""

import contextlib
import os
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # both libraries remark on what is fine here, torchvision's absence
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # for one; set them to "warning" to hear it

warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # diffusers 0.42 calls it dtype, releases before do not know that

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # of loading; our own bars come later and say more
HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_pipeline(model="models/emoji", device=None, dtype=None, lora=None, lora_scale=1.0):
    """A StableDiffusionPipeline from a folder in diffusers' layout or a hub id, with the scheduler this repo samples with.

    lora: a run's folder: its adapter (pytorch_lora_weights.safetensors), or its whole fine-tuned unet/.
    lora_scale: the strength of what was trained, adapter or whole UNet: 0 (the base model) to 1 (as trained).
    dtype: of the UNet and the text encoder; the VAE stays in float32, because bfloat16 cannot tell 256 levels apart.
    Raises ValueError, one line, if something cannot be loaded or is not a Stable Diffusion of the first generations.
    """
    try:
        device, dtype = torch.device(device or default_device()), dtype or torch.float32
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used here ({first_line(error)}); choose cpu, or cuda where there is a GPU") from error
    source = model if Path(model).exists() or not (HERE / model).exists() else str(HERE / model)  # models/emoji from anywhere
    if Path(source).exists() and not (Path(source) / "model_index.json").exists():
        raise ValueError(f"--model {model}: no model_index.json in it; give a folder in diffusers' layout, or a hub id")
    default = torch.get_default_dtype()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(source, torch_dtype={"default": dtype, "vae": torch.float32},
                                                           safety_checker=None, requires_safety_checker=False)
    except Exception as error:  # the hub and the loaders raise many kinds; all of them mean the same to the user
        torch.set_default_dtype(default)  # a loader that fails half-way leaves its own
        raise ValueError(f"--model {model}: cannot be loaded as a StableDiffusionPipeline ({first_line(error)}); give a folder in "
                         "diffusers' layout or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5") from error
    if pipeline.unet.config.addition_embed_type or pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ValueError(f"--model {model}: not a text-to-image Stable Diffusion 1 or 2 (its UNet asks for more than latents, a "
                         "timestep and a prompt); give one such as stable-diffusion-v1-5/stable-diffusion-v1-5")
    from sample import ddim_scheduler  # not above: sample.py imports this file

    pipeline.scheduler = ddim_scheduler(pipeline.scheduler)
    if lora is not None:
        load_tuned(pipeline, Path(lora), lora_scale, dtype)
    if device.type == "cuda":
        pipeline.unet.to(memory_format=torch.channels_last)  # how tensor cores want a convolution's input
    if device.type == "cpu":
        # On a CPU the backward of scaled_dot_product_attention is 16 times slower in bf16 than in fp32; plain matrix
        # products are not, and at these sizes nothing is lost by them.
        pipeline.unet.set_attn_processor(AttnProcessor())
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False).eval()
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_emoji(model):
    """Whether a folder is the shipped model, however its path is written."""
    return Path(model).name == "emoji"


def load_tuned(pipeline, folder, scale, dtype):
    """Put a run's weights into the pipeline: its whole unet/, or its adapter."""
    try:
        if (folder / "unet").exists():
            tuned = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
            for parameter, base in zip(tuned.parameters(), pipeline.unet.parameters(), strict=True):
                parameter.data = torch.lerp(base.data, parameter.data, scale)
            pipeline.unet = tuned
        elif (folder / "pytorch_lora_weights.safetensors").exists():
            pipeline.load_lora_weights(str(folder), adapter_name="tuned")
            pipeline.set_adapters(["tuned"], [scale])
        else:
            raise ValueError("no pytorch_lora_weights.safetensors and no unet/ in it")
    except Exception as error:  # as above
        raise ValueError(f"--lora {folder}: cannot be loaded ({first_line(error)}); give the folder of a run of this model") from error


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def latents_shape(pipeline):
    """(C, H, W) of the latents that the UNet was trained on."""
    size = pipeline.unet.config.sample_size
    return (pipeline.unet.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))


def autocast(device, dtype):
    """bf16 and fp16 mean mixed precision: weights may be float32, matrix products are not."""
    device = torch.device(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def predict(unet, latents, timesteps, prompt_embeds, negative_embeds=None, dtype=torch.float32):
    """The network's output (B, C, H, W), or, with negative_embeds, (2B, C, H, W): unconditional half first, in one pass.

    timesteps: (B,). prompt_embeds: (B, L, E). negative_embeds: (1, L, E), of the empty prompt.
    """
    if negative_embeds is not None:
        latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        prompt_embeds = torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])
    with autocast(latents.device, dtype):
        return unet(latents.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype)).sample.contiguous()


@torch.no_grad()
def encode_prompts(pipeline, prompts, cache=None):
    """(B, L, E) embeddings, on the UNet's device. cache: a dict that remembers them, {prompt: (L, E)}.

    Each different prompt is encoded once and alone, so that its embedding does not depend on its company. The text encoder works
    wherever it is: it may stay on the CPU.
    """
    cache = {} if cache is None else cache
    for prompt in prompts:
        if prompt not in cache:
            embeds = pipeline.encode_prompt(prompt, pipeline.text_encoder.device, 1, False)[0][0]
            cache[prompt] = embeds.to(pipeline.unet.device)
    return torch.stack([cache[prompt] for prompt in prompts])


@torch.no_grad()
def decode(pipeline, latents, batch_size=8):
    """(B, C, H, W) latents -> (B, 3, height, width) uint8, in slices, because a decoder's activations are large.

    A VAE that waits on the CPU is brought to the latents for the time that this takes.
    Raises FloatingPointError if latents or pixels are not finite: they would be black.
    """
    vae, home = pipeline.vae, pipeline.vae.device
    vae.to(latents.device)
    images, finite = [], latents.isfinite().all()
    for part in latents.split(batch_size):
        pixels = vae.decode(part.to(vae.dtype) / vae.config.scaling_factor).sample
        finite &= pixels.isfinite().all()
        images.append(((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte())
    vae.to(home)
    if not finite:  # asked once a batch, since the answer waits for the device
        raise FloatingPointError("the pictures are not finite")
    return torch.cat(images)
