"""How much memory of a GPU a run needs, before it is started: networks are built without their numbers, and the real code
runs on them to see which activations it keeps for the backward pass.

    python memory.py                                       every preset, one line each
    python memory.py --preset sdxl-24gb --train-batch 4    the same preset with other settings
    torchrun ...                                           each process needs what is printed

What is counted: weights; gradients, moments and averages of what is trained; activations, with the copies that autocast
makes; an epoch's latents and embeddings; decoding; the rewards' networks. Not counted: what CUDA itself takes (CONTEXT
stands for it), and holes between allocations.
"""

import sys

import models  # first: it quiets the libraries

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

GB = 1e9
CONTEXT = 0.7 * GB
# The configurations of the presets' models, as far as they differ from diffusers' defaults, and the parameters of the
# networks beside them: CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5-XXL read the prompts.
CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656
VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4)
NETWORKS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": dict(
        network=UNet2DConditionModel, sample_size=64, cross_attention_dim=768, readers=CLIP_L, tokens=77),
    "stabilityai/stable-diffusion-xl-base-1.0": dict(
        network=UNet2DConditionModel, sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, readers=CLIP_L + CLIP_G, tokens=77),
    "stabilityai/stable-diffusion-3.5-medium": dict(
        network=SD3Transformer2DModel, sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        out_channels=16, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        readers=CLIP_L + CLIP_G + T5_XXL, tokens=333),
    "black-forest-labs/FLUX.1-dev": dict(
        network=FluxTransformer2DModel, guidance_embeds=True, readers=CLIP_L + T5_XXL, tokens=512),
}
# Parameters of the networks of the rewards that need some, and the bytes of one (judges.py): CLIP ViT-L/14 and ViT-H/14 in
# float32; a vision-language model of 7 billion parameters in bfloat16, and DeBERTa-xlarge beside it for align.
REWARDS = {"aesthetic": 1.7, "pickscore": 3.9, "align": 17.0, "vqa": 14.0, "count": 14.0}  # GB


def storages(*tensors):
    """{storage: bytes} of tensors: views share theirs."""
    found = (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor))
    return {storage._cdata: storage.nbytes() for storage in found}


def as_fake(network):
    """Its parameters and buffers as tensors that have a size and a place, but no numbers. The place is the CPU, since torch
    knows no GPU where there is none; norms compute in float32, as autocast has them do on a GPU alone."""
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
    """(bytes that a forward pass keeps for the backward, largest single output in bytes). network: of fake tensors."""
    weights = storages(*network.parameters(), *network.buffers())
    kept, largest, alive = {}, [0, 0], []

    def keep(tensor):
        alive.append(tensor)  # or another storage would get its identity
        kept.update(storages(tensor))
        return tensor

    def checkpointed(block, *args):  # in place of torch.utils.checkpoint: keeps inputs, makes the inside anew
        for value in args:
            if isinstance(value, torch.Tensor):
                keep(value)
        inside = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: alive.append(t) or inside.update(storages(t)) or t, lambda t: t):
            output = block(*args)
        largest[1] = max(largest[1], sum(inside.values()))
        return output

    def measure(module, args, output):
        largest[0] = max([largest[0], *storages(output).values()])

    if checkpointing:
        network.enable_gradient_checkpointing(checkpointed)
        network.train()
    hooks = [module.register_forward_hook(measure) for module in network.modules()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        models.predict(network, *inputs, dtype)
    for hook in hooks:
        hook.remove()
    return sum(size for key, size in kept.items() if key not in weights) + largest[1], largest[0]


def peak_memory(config, world=1):
    """{what: bytes} of a process of a run of one of the presets' models, and under "peak" the most at one time."""
    from training import make_trainable

    facts = dict(NETWORKS[config.model])
    kind, readers, tokens = (facts.pop(name) for name in ("network", "readers", "tokens"))
    dtype, whole = models.DTYPES[config.dtype or "bf16"], not config.lora_rank
    width = 4 if whole or dtype == torch.float32 else 2
    channels = facts.get("in_channels", 4) if kind is not FluxTransformer2DModel else 16
    side = (config.resolution or 8 * facts.get("sample_size", models.FLUX_SIZE)) // 8
    passes = 2 if config.guidance_scale > 1 and kind is not FluxTransformer2DModel else 1
    with torch.device("meta"):
        network = kind(**facts).to(torch.float32 if whole else dtype).requires_grad_(False)
        frozen = sum(p.numel() for p in network.parameters())
        trained = sum(p.numel() for p in make_trainable(network, config))
        vae = AutoencoderKL(**VAE, latent_channels=channels)
    with FakeTensorMode():
        as_fake(network), as_fake(vae)
        embeds = {"encoder_hidden_states": torch.zeros(1, tokens, facts.get("cross_attention_dim") or 4096)}
        if kind is not UNet2DConditionModel:
            embeds["pooled_projections"] = torch.zeros(1, network.config.pooled_projection_dim)
        elif facts.get("addition_embed_type"):
            embeds |= {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        stored = sum(value.numel() * width for value in embeds.values())  # of one prompt
        if kind is FluxTransformer2DModel:
            embeds["guidance"] = torch.zeros(1)
        rows = config.train_batch * (passes if config.train_guidance else 1)
        inputs = (torch.zeros(rows, channels, side, side), torch.zeros(rows),
                  {key: value.expand(rows, *value.shape[1:]) for key, value in embeds.items()}, None)
        kept, _ = activations(network, inputs, dtype, config.gradient_checkpointing)
        with torch.no_grad():
            latents = torch.zeros(min(8, config.sample_batch), channels, side, side)
            outputs = []
            for module in vae.decoder.modules():
                module.register_forward_hook(lambda _, __, output: outputs.extend(storages(output).values()))
            vae.decoder(latents)
    moments = 2 if config.optimizer == "adamw8bit" else 8
    parts = {
        "weights": frozen * (4 if whole else width) + (0 if config.offload else readers * width + 84e6 * 4),
        "training": trained * (4 + moments + (4 if config.ema else 0) + (0 if whole else 4))
        + (frozen * 4 if whole and getattr(config, "kl", 0) else 0),
        "activations": kept,
        "trajectories": (0 if config.offload else config.images // world * (config.steps + 1) * channels * side**2 * 4)
        + min(config.images, 400) * stored,
        "decoding": 3 * max(outputs) + (84e6 * 4 if config.offload else 0),  # input, output and workspace of the largest layer
        "rewards": GB * sum(REWARDS.get(name.partition("=")[0], 0) for name in [*config_rewards(config)]),
        "CUDA": CONTEXT}
    parts["peak"] = sum(parts.values()) - min(parts["activations"], parts["decoding"])  # not at the same time
    return parts


def config_rewards(config):
    from rewards import parse_reward
    from settings import watched

    return [*parse_reward(config.reward), *watched(config)]


def line(name, config, parts):
    peak, whole = parts["peak"] / GB, {key: value for key, value in parts.items() if key != "peak"}
    return f"{name}: {peak:.1f} GB ({', '.join(f'{key} {value / GB:.1f}' for key, value in whole.items())})"


def main(arguments=None):
    import ddpo
    from settings import PRESETS

    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = [[]] if "--preset" in arguments else [["--preset", name] for name in PRESETS if name != "emoji"]
    for preset in chosen:
        config, _ = ddpo.parse_config([*preset, *arguments])
        world = 8 if config.preset.endswith("8gpu") else 1
        print(line(config.preset, config, peak_memory(config, world)), flush=True)


if __name__ == "__main__":
    main()
