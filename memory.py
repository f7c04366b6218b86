"""How much memory of a GPU a run needs, before it is started: networks are built without their
numbers, and the real code runs on them to see which activations it keeps for the backward pass.

    python memory.py                                       every preset for a GPU, one line each
    python memory.py --preset sdxl-24gb --train-batch 4    the same preset with other settings
    python memory.py --model my_model                      a model of your own
    torchrun ...                                           each process needs what is printed

What is counted: weights; gradients, moments and averages of what is trained; activations, with the
copies that autocast makes; an epoch's latents and embeddings; decoding; the rewards' networks. Not
counted: what CUDA itself takes (CONTEXT stands for it), and holes between allocations.
"""

import functools
import math
import sys

import models  # first: it quiets the libraries
from loading import load_pipeline

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from rewards import parse_reward
from settings import PRESETS, Settings, check_values, flags_given, parse_config, watched

GB = 1e9
CONTEXT = 0.7 * GB
# The configurations of the presets' models, as far as they differ from diffusers' defaults, and the
# parameters of the networks beside them: CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5-XXL read the
# prompts.
CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
T5_WO = 24 * 10240 * 4096  # T5's wo weights, in float32 even where its others are in fp16
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
NETWORKS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": dict(
        network=UNet2DConditionModel, sample_size=64, cross_attention_dim=768, readers=CLIP_L,
        tokens=77),
    "stabilityai/stable-diffusion-xl-base-1.0": dict(
        network=UNet2DConditionModel, sample_size=128, cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, readers=CLIP_L + CLIP_G, tokens=77),
    "stabilityai/stable-diffusion-3.5-medium": dict(
        network=SD3Transformer2DModel, sample_size=128, patch_size=2, in_channels=16, num_layers=24,
        attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        readers=CLIP_L + CLIP_G + T5_XXL, tokens=333),
    "black-forest-labs/FLUX.1-dev": dict(
        network=FluxTransformer2DModel, guidance_embeds=True, readers=CLIP_L + T5_XXL, tokens=512),
}
# GB of the networks of the rewards that need some (judges.py): CLIP ViT-L/14 and ViT-H/14 in float32;
# a vision-language model of 7 billion parameters in bfloat16, and DeBERTa-xlarge beside it for align
REWARDS = {"aesthetic": 1.7, "pickscore": 3.9, "align": 17.0, "vqa": 14.0, "count": 14.0}


def storages(*tensors):
    """{storage: bytes} of tensors: views share theirs."""
    found = (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor))
    return {storage._cdata: storage.nbytes() for storage in found}


def as_fake(network):
    """Turns its parameters and buffers into tensors that have a size and a place, but no numbers.
    The place is the CPU, since torch knows no GPU where there is none; norms compute in float32, as
    autocast has them do on a GPU only."""
    for module in network.modules():
        norm = isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
        if norm:
            module.register_forward_pre_hook(lambda _, args: tuple(x.float() for x in args))
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=torch.float32 if norm else p.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def activations(network, inputs, dtype, checkpointing):
    """Bytes that a forward pass keeps for the backward pass. network, inputs: of fake tensors;
    inputs: those of predict."""
    weights = storages(*network.parameters(), *network.buffers())
    kept, alive, largest = {}, [], 0  # alive: the identity of a tensor that is gone may be reused

    def keep(into, tensor):
        alive.append(tensor)
        into.update(storages(tensor))
        return tensor

    def checkpointed(block, *args):  # as torch.utils.checkpoint: keeps inputs, makes the inside anew
        nonlocal largest
        for value in args:
            keep(kept, value)
        inside = {}
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(keep, inside), lambda t: t):
            output = block(*args)
        largest = max(largest, sum(inside.values()))
        return output

    if checkpointing:
        network.enable_gradient_checkpointing(checkpointed)
    with torch.autograd.graph.saved_tensors_hooks(functools.partial(keep, kept), lambda t: t):
        models.predict(network, *inputs, dtype)
    return sum(size for key, size in kept.items() if key not in weights) + largest


def preset_facts(config):
    """What `peak_memory` has to know of a model that is not loaded: one of NETWORKS."""
    facts = dict(NETWORKS[config.model])
    kind, readers, tokens = (facts.pop(name) for name in ("network", "readers", "tokens"))
    readers = readers, T5_WO if readers > T5_XXL else 0
    channels = facts.get("in_channels", 4) if kind is not FluxTransformer2DModel else 16
    models.check_resolution(config.resolution, kind, facts, 8)
    side = config.resolution // 8 or facts.get("sample_size", models.FLUX_SIZE)
    shapes = {"encoder_hidden_states": (tokens, facts.get("cross_attention_dim") or 4096)}
    if kind is not UNet2DConditionModel:
        shapes["pooled_projections"] = (facts.get("pooled_projection_dim", 768),)
    elif "addition_embed_type" in facts:
        shapes |= {"text_embeds": (1280,), "time_ids": (6,)}
    vae = AutoencoderKL, VAE | {"latent_channels": channels}
    return (kind, facts), vae, readers, shapes, (channels, side, side)


def pipeline_facts(pipeline):
    """The same of a pipeline that is loaded."""
    network, embeds = models.denoiser(pipeline), models.encode_prompts(pipeline, [""])
    embeds = embeds if isinstance(embeds, dict) else {"encoder_hidden_states": embeds}
    named = [p for encoder in models.text_encoders(pipeline) for p in encoder.named_parameters()]
    readers = (sum(p.numel() for _, p in named), sum(p.numel() for name, p in named if ".wo." in name))
    shapes = {key: tuple(value.shape[1:]) for key, value in embeds.items()}
    return ((type(network), network.config), (type(pipeline.vae), pipeline.vae.config), readers, shapes,
            models.latents_shape(pipeline))


def peak_memory(config, world=1, pipeline=None):
    """{what: bytes} of one of the `world` processes of a run, under "loading" those before its first
    epoch, and under "peak" the most at one time.

    pipeline: as load_pipeline gives it; without one, config.model is one of NETWORKS."""
    facts = preset_facts(config) if pipeline is None else pipeline_facts(pipeline)
    (kind, network), (vae_kind, vae), (readers, exact), shapes, latents_shape = facts
    dtype, whole = models.DTYPES[config.dtype or "fp16"], not config.lora_rank
    is_flux = kind is FluxTransformer2DModel
    width = 4 if whole or dtype == torch.float32 else 2  # bytes of a weight that is not trained
    readers = readers * width + (2 * exact if width == 2 and dtype == torch.float16 else 0)  # bytes
    with torch.device("meta"):
        network, vae = kind.from_config(network), vae_kind.from_config(vae)
        network.to(torch.float32 if whole else dtype).requires_grad_(False)
        total = sum(p.numel() for p in network.parameters())
        trained = sum(p.numel() for p in models.make_trainable(network, config))
    decoder = 4 * sum(p.numel() for p in vae.parameters())
    two_passes = config.guidance_scale > 1 and config.train_guidance and not is_flux
    rows = config.train_batch * (2 if two_passes else 1)
    with FakeTensorMode():
        as_fake(network), as_fake(vae)
        embeds = {key: torch.zeros(rows, *shape) for key, shape in shapes.items()}
        if is_flux and network.config.guidance_embeds:
            embeds["guidance"] = torch.zeros(rows)
        inputs = torch.zeros(rows, *latents_shape), torch.zeros(rows), embeds, None
        kept = activations(network, inputs, dtype, config.gradient_checkpointing)
        largest = []
        for module in vae.decoder.modules():
            module.register_forward_hook(
                lambda _, __, output: largest.extend(storages(output).values()))
        with torch.no_grad():
            vae.decoder(torch.zeros(min(models.DECODED_AT_ONCE, config.sample_batch), *latents_shape))
    latents = config.images // world * (config.steps + 1) * math.prod(latents_shape) * 4
    prompts = min(config.images, 400) * width * sum(math.prod(shape) for shape in shapes.values())
    moments = 2 if config.optimizer == "adamw8bit" else 8
    parts = {
        "weights": total * width + (0 if config.offload else readers + decoder),
        # gradient and its copy that processes sum, moments, average, an adapter's weights; what
        # forward.py holds of v_old and beside it; the base model beside a whole one for --kl
        "training": trained * (4 + (4 if world > 1 else 0) + moments + (4 if config.ema else 0)
                               + (0 if whole else 4) + (8 if hasattr(config, "old_rise") else 0))
        + (total * 4 if whole and getattr(config, "kl", 0) else 0),
        "activations": kept,
        "latents and embeddings": 0 if config.offload else latents + prompts,
        # input, output and workspace of the largest layer
        "decoding": 3 * max(largest) + (decoder if config.offload else 0),
        "rewards": GB * sum(REWARDS.get(name.partition("=")[0], 0)
                            for name in [*parse_reward(config.reward), *watched(config)]),
        "CUDA": CONTEXT}
    one_of_them = min(parts["activations"], parts["decoding"])  # never there at the same time
    loading = total * width + readers + decoder + CONTEXT  # --offload comes after it
    return parts | {"loading": loading, "peak": max(sum(parts.values()) - one_of_them, loading)}


def estimate(config, world=1, pipeline=None):
    """One line for people."""
    parts = peak_memory(config, world, pipeline)
    peak, loading = parts.pop("peak"), parts.pop("loading")
    shown = ", ".join(f"{key} {value / GB:.1f}" for key, value in parts.items() if value > 5e7)
    shown = f"while it loads the model; later {shown}" if peak == loading else shown
    return f"about {peak / GB:.0f} GB of a GPU's memory on each process ({shown})"


def leave(message):
    print(message, file=sys.stderr)
    sys.exit(2)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = [["--preset", name] for name in PRESETS if name != "emoji"]
    given = flags_given(arguments, Settings, __doc__, beside_resume="--epochs, --patience and --device")
    if given.keys() & {"preset", "model"}:
        chosen = [[]]
    if "resume" in given:
        leave("--resume: the first line of a run on a GPU is its memory; give a --preset and settings")
    try:
        for preset in chosen:
            config, _ = parse_config([*preset, *arguments], Settings, PRESETS, __doc__)
            check_values(config)
            world, pipeline = 8 if config.preset.endswith("8gpu") else 1, None
            if config.model not in NETWORKS:
                pipeline = load_pipeline(config.model, "cpu", resolution=config.resolution)
            print(f"{config.preset}: {estimate(config, world, pipeline)}", flush=True)
    except ValueError as error:
        leave(error)


if __name__ == "__main__":
    main()
