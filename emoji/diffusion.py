"""The small Stable Diffusion: VAE, UNet, scheduler, their training, and the folder that they become."""

import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPTextModel

from emoji import scenes
from emoji.classifiers import recognised
from emoji.clip import tokenize
from emoji.trainer import autocast, device, finished, save_sheet, start_from, to_pixels, train


def copy_corner(model, weights):
    """Copies the weights of an earlier model with fewer channels at either end into a larger one; what is
    new takes no part at first where it is an input, and stays as it is where it is an output."""
    state = model.state_dict()
    for key, value in weights.items():
        corner = tuple(slice(size) for size in value.shape)
        if value.ndim > 1 and value.shape[1] < state[key].shape[1]:
            state[key][:] = 0
        state[key][corner] = value
    model.load_state_dict(state)


def deepen(unet, earlier):
    """Copies an earlier UNet, with one layer a block or two, into one with two. New layers do
    nothing at first: what they add is zero."""
    state = unet.state_dict()
    for key in state:
        if key.endswith((".conv2.weight", ".conv2.bias", ".proj_out.weight", ".proj_out.bias")):
            state[key][:] = 0
        if key.startswith("up_blocks") and key.endswith("resnets.1.conv_shortcut.weight"):
            state[key][:] = torch.eye(*state[key].shape[:2])[..., None, None]
            state[key.replace("weight", "bias")][:] = 0
    unet.load_state_dict(state)
    if earlier.config.layers_per_block == unet.config.layers_per_block:
        return copy_corner(unet, earlier.state_dict())
    # the skip connections come in reverse: an up block's last layer has the level's first input
    last = re.compile(r"(up_blocks\.\d\.(?:resnets|attentions))\.1\.")
    weights = {last.sub(r"\1.2.", key): value for key, value in earlier.state_dict().items()}
    copy_corner(unet, weights)


def build_vae():
    """AutoencoderTiny (the family of TAESD): convolutions and ReLU only, so that decoding is cheap
    without a GPU."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48), decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 2, 2), num_decoder_blocks=(2, 2, 1), latent_channels=8,
    )


def gradients(pixels):
    return pixels.diff(dim=-1), pixels.diff(dim=-2)


def train_vae(config, name="vae", vae=None):
    """Stage "vae", or stage "decoder": the decoder alone, of a `vae` that is already trained."""
    earlier = start_from(config, "vae", AutoencoderTiny) if name == "vae" else None
    vae = (vae or build_vae()).to(memory_format=torch.channels_last)
    if finished(name, config, vae):
        return vae
    if earlier:
        copy_corner(vae, earlier.state_dict())
    vae.requires_grad_(True)
    vae.encoder.requires_grad_(name == "vae")
    batch = getattr(config, f"{name}_batch")
    seed = config.seed + (20 if name == "vae" else 22)
    pictures, _ = scenes.draw_scenes(config.vae_scenes, seed)
    fresh = to_pixels(scenes.draw_scenes(192, config.seed + 21)[0])

    def loss_fn(model):
        pixels = to_pixels(pictures[torch.randint(len(pictures), (batch,)).numpy()])
        with autocast():
            latents = model.encode(pixels).latents.float()
            # noise on the latents: a diffusion model is never exact, so near-by latents must decode
            # to similar pictures
            decoded = model.decode(latents + 0.05 * torch.randn_like(latents)).sample.float()
        edges = sum((a - b).abs().mean() for a, b in zip(gradients(decoded), gradients(pixels)))
        # unit variance and zero mean per channel: what the noise schedule assumes
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        normal = (mean.square() + variance.log().square()).mean()
        loss = (decoded - pixels).abs().mean() + edges + 0.02 * normal
        loss = loss + (decoded - pixels).square().mean()
        if earlier:
            with torch.no_grad(), autocast():
                target = earlier.encode(pixels).latents.float()
            loss = loss + 0.3 * (latents[:, :target.shape[1]] - target).square().mean()
        return loss

    def evaluate(model):
        with autocast():
            latents = model.encode(fresh).latents
            decoded = model.decode(latents).sample.float()
        save_sheet(torch.stack([fresh, decoded], 1).flatten(0, 1)[:96],
                   Path(config.work) / "vae.png")
        psnr = 10 * torch.log10(4 / (decoded.clamp(-1, 1) - fresh).square().mean())
        mean, std = latents.float().mean(), latents.float().std()
        return f"PSNR {psnr:.2f} dB, latents mean {mean:.2f} std {std:.2f}"

    return train(name, config, vae, loss_fn, evaluate)


def build_unet():
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=8, out_channels=8, layers_per_block=2,
        block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    )
    if device().type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # plain matrix products; see build_clip
    return unet


def build_scheduler():
    """Stable Diffusion's, to the letter."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )


def build_pipeline(tokenizer, clip, vae, unet):
    text_encoder = CLIPTextModel(clip.config.text_config)
    prefix, weights = "text_model.", clip.state_dict()
    weights = {key: value for key, value in weights.items() if key.startswith(prefix)}
    if not set(weights) & set(text_encoder.state_dict()):  # transformers 5 dropped the prefix
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    text_encoder.load_state_dict(weights, strict=False)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder.to(device()).eval(), tokenizer=tokenizer, unet=unet,
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode_pictures(vae, pictures):
    """(N, 8, 16, 16) latents of pictures, (N, 64, 64, 3) uint8."""
    with autocast():
        return torch.cat([
            vae.encode(to_pixels(pictures[i:i + 256])).latents.float()
            for i in tqdm(range(0, len(pictures), 256), desc="latents")
        ])


@torch.no_grad()
def encode_captions(text_encoder, tokenizer, captions):
    """(embeddings of the different captions and of the empty one, each caption's row in them, the
    row of the empty one)."""
    vocabulary = sorted(set(captions)) + [""]
    index = {caption: row for row, caption in enumerate(vocabulary)}
    ids = tokenize(tokenizer, vocabulary).to(device())
    embeds = torch.cat([text_encoder(batch).last_hidden_state for batch in ids.split(512)])
    return embeds, torch.tensor([index[caption] for caption in captions]), index[""]


def noise_loss(pipeline, pictures, captions, batch, config):
    """The loss, as a function of the UNet, of predicting the noise in `batch` of the pictures."""
    alpha_bar = pipeline.scheduler.alphas_cumprod.to(device())
    latents = encode_pictures(pipeline.vae, pictures)
    embeds, rows_of, empty = encode_captions(pipeline.text_encoder, pipeline.tokenizer, captions)

    def loss_fn(model):
        rows = torch.randint(len(latents), (batch,))
        left_out = torch.rand(batch) < config.caption_dropout
        texts = torch.where(left_out, empty, rows_of[rows])
        # stratified timesteps: the same uniform law, less variance
        timesteps = ((torch.arange(batch) + torch.rand(batch)) * 1000 / batch).long()
        timesteps, clean = timesteps.to(device()), latents[rows]
        noise = torch.randn_like(clean)
        a = alpha_bar[timesteps][:, None, None, None]
        with autocast():
            noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
            output = model(noisy, timesteps, embeds[texts]).sample
        # min-SNR weights (Hang et al. 2023, arXiv 2303.09556): the timesteps with hardly any noise
        # would make up most of the loss, but what a picture shows is decided in the others
        weights = (5 * (1 - a) / a).clamp(max=1)  # min(SNR, 5) / SNR
        return (weights * (output.float() - noise).square()).mean()

    return loss_fn


def train_unet(config, tokenizer, clip, vae):
    unet = build_unet()
    if finished("unet", config, unet):
        return unet
    if earlier := start_from(config, "unet", UNet2DConditionModel):
        deepen(unet, earlier)
    pipeline = build_pipeline(tokenizer, clip, vae, unet)
    pictures, captions = scenes.draw_scenes(config.unet_scenes, config.seed + 30)
    loss_fn = noise_loss(pipeline, pictures, captions, config.unet_batch, config)
    nouns = [scenes.with_article(noun) for noun in scenes.nouns()]
    samples = nouns + ["a cat on a blue background", "a dog on a green striped background",
                       "a fox with a guitar", "a panda with a cup", "two cats", "three frogs",
                       "four bees", "five crabs", "six pigs", "two sharks", "five owls"]

    def evaluate(model):
        pipeline.unet = model
        generator = torch.Generator(device()).manual_seed(0)
        with autocast():
            images = pipeline(
                samples, num_inference_steps=10, guidance_scale=4.0, eta=1.0, output_type="pt",
                generator=generator,
            ).images
        save_sheet(images * 2 - 1, Path(config.work) / "unet.png")
        images = (images[:len(nouns)].float() * 255).round().byte()
        right = recognised(images, nouns)  # the 69 animals come first
        return f"recognised {right.mean():.3f}, of animals {right[:69].mean():.3f}"

    return train("unet", config, unet, loss_fn, evaluate)


def export(config, tokenizer, clip, vae, unet):
    unet.set_default_attn_processor()
    pipeline = build_pipeline(tokenizer, clip, vae, unet).to(torch.float16)
    pipeline.save_pretrained(config.out, safe_serialization=True)
    # the names that all published text encoders have; transformers before 5.6 knows no others
    path, prefix = Path(config.out) / "text_encoder" / "model.safetensors", "text_model."
    weights = {
        prefix + key.removeprefix(prefix): value.float() for key, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    # transformers 5 loads in the dtype of the file, diffusers in float32: they must agree
    settings = path.with_name("config.json")
    settings.write_text(settings.read_text().replace('"float16"', '"float32"'))
    clip.to(torch.float16).save_pretrained(Path(config.out) / "clip", safe_serialization=True)
    processor = CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE},
        crop_size={"height": scenes.SIZE, "width": scenes.SIZE},
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
    )
    processor.save_pretrained(Path(config.out) / "clip")
    for folder in ("tokenizer", "clip"):  # every release of transformers reads these three files
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(Path(config.work) / "tokenizer" / name, Path(config.out) / folder / name)
