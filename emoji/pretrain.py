"""Pretrains the small emoji model that ships in models/emoji: a real StableDiffusionPipeline, only tiny.

    python emoji/pretrain.py                          everything, about two hours on two cores
    python emoji/pretrain.py --unet-steps 30000       longer, where there is a GPU; finished stages are kept
    python emoji/pretrain.py --only flow              the last stage alone, from the model in --out

Seven stages, each started again where it stopped (runs/pretrain/*.pt), with sheets of pictures to look at:

    clip     text and image encoder, contrastive (Radford et al. 2021): the pipeline's text encoder and a reward
    vae      64x64 pixels <-> 4x16x16 latents of unit variance
    unet     epsilon-prediction on the latents under Stable Diffusion's noise schedule, captions dropped for guidance
    judge    the image encoder of CLIP goes on alone; its text encoder stays as the UNet knows it
    decoder  the decoder of the VAE goes on alone; the latents stay as the UNet knows them
    export   all of it as a diffusers folder, in fp16 (the text encoder in fp32)
    flow     a UNet for flow matching, taught by the first one; exported to models/emoji-flow
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler,
                       StableDiffusionPipeline, UNet2DConditionModel)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of the scripts

from emoji import scenes
from rewards import clip_top1, jpeg_kilobytes
from sample import ETAS, load_pipeline, sample_trajectories

TEXT_LENGTH = 20  # tokens: "a hippopotamus with an ice cream" has 8 with both ends


@dataclass
class Config:
    out: str = "models/emoji"
    work: str = "runs/pretrain"  # checkpoints and sample sheets
    seed: int = 0
    clip_steps: int = 1800
    clip_batch: int = 128
    clip_lr: float = 1e-3
    vae_steps: int = 2200
    vae_batch: int = 16
    vae_lr: float = 1e-3
    unet_steps: int = 7600
    unet_batch: int = 64
    unet_lr: float = 1e-3
    clip_scenes: int = 32768  # different pictures that a stage sees
    vae_scenes: int = 16384
    unet_scenes: int = 40960  # turned into latents once
    caption_dropout: float = 0.1
    judge_steps: int = 1500
    judge_batch: int = 128
    judge_lr: float = 5e-4
    decoder_steps: int = 2000
    decoder_batch: int = 16
    decoder_lr: float = 1e-3
    flow_out: str = "models/emoji-flow"
    flow_steps: int = 800
    flow_batch: int = 32
    flow_lr: float = 8e-4
    flow_scenes: int = 8192  # repeats do no harm: what is learnt is the teacher's answer
    flow_ema: float = 0.995
    only: str = ""  # "flow": that stage alone
    ema: float = 0.999
    save_every: int = 250  # steps


def check(config):
    """Refuse what cannot work before anything is drawn or trained: ValueError, one line."""
    def refuse(setting, advice):
        value = getattr(config, setting)
        raise ValueError(f"--{setting.replace('_', '-')} {value}: {advice}")

    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and field.name != "seed" and not 1 <= value < 2**31:
            refuse(field.name, "must be at least 1 and below 2**31")
        if field.name.endswith("_lr") and not 0 < value < 1:
            refuse(field.name, "must be above 0 and below 1")
        if field.type is str and any(path.is_file() for path in (Path(value), *Path(value).parents)):
            refuse(field.name, "a file stands there; give a folder")
    if not 0 <= config.seed < 2**32:
        refuse("seed", "must be at least 0 and below 2**32")
    if not 0 <= config.caption_dropout <= 1:
        refuse("caption_dropout", "must be 0 to 1")
    if not 0 <= config.ema < 1:
        refuse("ema", "must be at least 0 and below 1")
    if config.only not in ("", "flow"):
        refuse("only", "only the stage flow can run alone")
    return config


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    return torch.autocast(device().type, torch.bfloat16)


def to_pixels(pictures):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], on the device: what the VAE and the CLIP here take."""
    pictures = torch.as_tensor(pictures).permute(0, 3, 1, 2).to(device(), memory_format=torch.channels_last)
    return pictures.float() / 127.5 - 1


def save_sheet(pixels, path, columns=12):
    """Float (B, 3, H, W) in [-1, 1] -> a grid on disk."""
    pictures = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(pictures[i:i + columns]), axis=1) for i in range(0, len(pictures), columns)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape])).save(path)


def finished(name, config, model):
    """Load the stage's averaged weights into the model, if the stage has run to its end."""
    path = Path(config.work) / f"{name}.pt"
    saved = torch.load(path, map_location=device(), weights_only=True) if path.exists() else {"step": -1}
    if saved["step"] < getattr(config, f"{name}_steps"):
        return False
    model.to(device()).load_state_dict(saved["ema"])
    model.eval().requires_grad_(False)
    return True


def train(name, config, model, loss_fn, look=None):
    """The loop that the stages share: AdamW, warm-up and cosine, EMA, a checkpoint that a restart goes on from."""
    steps, lr = getattr(config, f"{name}_steps"), getattr(config, f"{name}_lr")
    path = Path(config.work) / f"{name}.pt"
    model.to(device()).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    start = 0
    if path.exists():
        saved = torch.load(path, map_location=device(), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, start = saved["ema"], saved["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=2)
    for step in bar:
        torch.manual_seed(config.seed * 1_000_003 + step)  # so that a restart draws what an unbroken run draws
        scale = min(1, (step + 1) / 300) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        loss = loss_fn(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(getattr(config, f"{name}_ema", config.ema), (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                ema[key].lerp_(value, 1 - decay) if value.is_floating_point() else ema[key].copy_(value)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            if look:
                trained = {key: value.clone() for key, value in model.state_dict().items()}
                model.load_state_dict(ema)
                model.eval()
                with torch.no_grad():
                    tqdm.write(f"{name} {step + 1}: loss {loss.item():.4f}  {look(model)}")
                model.load_state_dict(trained)
                model.train()
    model.load_state_dict(ema)
    return model.eval().requires_grad_(False)


def build_tokenizer(config):
    """CLIP's byte-level BPE, with merges learnt from the captions and from the repo's prompt files."""
    lines = scenes.draw_scenes(3000, seed=1)[1] + [scenes.with_article(noun) for noun in scenes.nouns()] * 20
    lines += [line for path in sorted((ROOT / "prompts").glob("*.txt")) for line in path.read_text().splitlines()] * 3
    lines += ["the a an one two three four five six seven eight with on in and of is riding playing washing"] * 20
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's rule for what a word is
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # last letters get their numbers first, or the order in which words are met, another in each process, would break ties
    bpe.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=2016, initial_alphabet=alphabet, special_tokens=[AddedToken(letter + "</w>", special=True) for letter in alphabet],
        end_of_word_suffix="</w>", show_progress=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order; every byte also as the end of a word, so that no text at all is unknown
    vocab = alphabet + [byte + "</w>" for byte in alphabet] + [pair.replace(" ", "") for pair in merges]
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(config.work) / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}, indent=1))
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


def build_clip(tokenizer):
    width = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, projection_dim=128)
    return CLIPModel(CLIPConfig(
        text_config=dict(**width, num_hidden_layers=3, vocab_size=len(tokenizer), max_position_embeddings=TEXT_LENGTH,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(**width, num_hidden_layers=6, image_size=scenes.SIZE, patch_size=8),
        projection_dim=128, attn_implementation="eager"))  # eager: scaled_dot_product_attention's bf16 backward crawls on a CPU


def spoil(pixels):
    """Blur, noise, contrast and shifts of colour: what the decoder and a generator do to a picture must not fool the reward."""
    batch = len(pixels)

    def some(probability):
        return (torch.rand(batch, 1, 1, 1, device=pixels.device) < probability).float()

    small = F.interpolate(pixels, scale_factor=(0.4, 0.5, 0.6, 0.75)[torch.randint(4, ())], mode="area")
    blurred = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    pixels = torch.lerp(pixels, blurred, some(0.5) * torch.rand(batch, 1, 1, 1, device=pixels.device))
    pixels = pixels * (1 + 0.4 * (torch.rand(batch, 1, 1, 1, device=pixels.device) - 0.5))
    pixels = pixels + 0.3 * (torch.rand(batch, 3, 1, 1, device=pixels.device) - 0.5)
    return (pixels + some(0.5) * 0.12 * torch.randn_like(pixels)).clamp(-1, 1)


def clip_embed(model, pixels, ids):
    """L2-normalised embeddings of pictures and texts, through the same layers as CLIPModel.forward."""
    output = model(pixel_values=pixels, input_ids=ids)
    return output.image_embeds, output.text_embeds


def train_clip(config, tokenizer, name="clip", clip=None):
    """Stage "clip" from scratch, or stage "judge": the image encoder alone, of a `clip` that is already trained."""
    clip = clip or build_clip(tokenizer)
    if finished(name, config, clip):
        return clip
    clip.requires_grad_(True)
    if name == "judge":
        for part in (clip.text_model, clip.text_projection):
            part.requires_grad_(False)
    batch = getattr(config, f"{name}_batch")
    pictures, captions = scenes.draw_scenes(config.clip_scenes, config.seed + (10 if name == "clip" else 12))
    ids = tokenize(tokenizer, captions).to(device())
    fresh, fresh_captions = scenes.draw_scenes(1090, config.seed + 11, kind="alone")
    labels = torch.tensor([scenes.nouns().index(caption.split(" ", 1)[1]) for caption in fresh_captions])
    noun_ids = tokenize(tokenizer, [scenes.with_article(noun) for noun in scenes.nouns()]).to(device())

    def loss_fn(model):
        rows = torch.randint(len(pictures), (batch,))
        batch_ids = ids[rows]
        with autocast():
            images, texts = clip_embed(model, spoil(to_pixels(pictures[rows.numpy()])), batch_ids)
        logits = images.float() @ texts.float().T * model.logit_scale.exp().clamp(max=100)
        # pictures with the same caption are all right answers: share the target among them
        targets = (batch_ids[:, None] == batch_ids[None]).all(-1).float()
        targets = targets / targets.sum(1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    def look(model):
        images, texts = clip_embed(model, to_pixels(fresh), noun_ids)
        return f"zero-shot top-1 on fresh scenes {((images @ texts.T).argmax(1).cpu() == labels).float().mean():.3f}"

    return train(name, config, clip, loss_fn, look)


def build_vae():
    """AutoencoderTiny (the family of TAESD): convolutions and ReLU only, so that decoding is cheap without a GPU."""
    return AutoencoderTiny(encoder_block_out_channels=(48, 48, 48), decoder_block_out_channels=(48, 48, 48),
                           num_encoder_blocks=(1, 2, 2), num_decoder_blocks=(2, 2, 1), latent_channels=4)


def gradients(pixels):
    return pixels.diff(dim=-1), pixels.diff(dim=-2)


def train_vae(config, name="vae", vae=None):
    """Stage "vae" from scratch, or stage "decoder": the decoder alone, of a `vae` that is already trained."""
    vae = (vae or build_vae()).to(memory_format=torch.channels_last)
    if finished(name, config, vae):
        return vae
    vae.requires_grad_(True)
    vae.encoder.requires_grad_(name == "vae")
    batch = getattr(config, f"{name}_batch")
    pictures, _ = scenes.draw_scenes(config.vae_scenes, config.seed + (20 if name == "vae" else 22))
    fresh = to_pixels(scenes.draw_scenes(48, config.seed + 21)[0])

    def loss_fn(model):
        pixels = to_pixels(pictures[torch.randint(len(pictures), (batch,)).numpy()])
        with autocast():
            latents = model.encode(pixels).latents.float()
            # noise on the latents: near-by latents must decode alike, since a diffusion model is never exact
            decoded = model.decode(latents + 0.08 * torch.randn_like(latents)).sample.float()
        edges = sum((a - b).abs().mean() for a, b in zip(gradients(decoded), gradients(pixels)))
        # unit variance and zero mean per channel: what the noise schedule assumes
        mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
        return (decoded - pixels).abs().mean() + edges + 0.02 * (mean.square() + variance.log().square()).mean()

    def look(model):
        with autocast():
            latents = model.encode(fresh).latents
            decoded = model.decode(latents).sample.float()
        save_sheet(torch.stack([fresh, decoded], 1).flatten(0, 1), Path(config.work) / "vae.png")
        psnr = 10 * torch.log10(4 / (decoded.clamp(-1, 1) - fresh).square().mean())
        return f"PSNR {psnr:.2f} dB, latents mean {latents.float().mean():.2f} std {latents.float().std():.2f}"

    return train(name, config, vae, loss_fn, look)


def build_unet():
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(48, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
    if device().type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # plain matrix products; see build_clip
    return unet


def build_scheduler():
    """Stable Diffusion's, to the letter."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading")


def build_pipeline(tokenizer, clip, vae, unet):
    text_encoder = CLIPTextModel(clip.config.text_config)
    weights = {key: value for key, value in clip.state_dict().items() if key.startswith("text_model.")}
    if not set(weights) & set(text_encoder.state_dict()):  # transformers 5 dropped the prefix
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    text_encoder.load_state_dict(weights, strict=False)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder.to(device()).eval(), tokenizer=tokenizer, unet=unet,
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_unet(config, tokenizer, clip, vae):
    unet = build_unet()
    if finished("unet", config, unet):
        return unet
    pipeline = build_pipeline(tokenizer, clip, vae, unet)
    alpha_bar = pipeline.scheduler.alphas_cumprod.to(device())
    pictures, captions = scenes.draw_scenes(config.unet_scenes, config.seed + 30)
    with torch.no_grad(), autocast():
        latents = torch.cat([vae.encode(to_pixels(pictures[i:i + 256])).latents.float()
                             for i in tqdm(range(0, len(pictures), 256), desc="latents")])
    vocabulary = sorted(set(captions)) + [""]
    index = {caption: row for row, caption in enumerate(vocabulary)}
    rows_of = torch.tensor([index[caption] for caption in captions])
    with torch.no_grad():
        embeds = torch.cat([pipeline.text_encoder(tokenize(tokenizer, vocabulary[i:i + 512]).to(device())).last_hidden_state
                            for i in range(0, len(vocabulary), 512)])

    def loss_fn(model):
        rows = torch.randint(len(latents), (config.unet_batch,))
        texts = torch.where(torch.rand(config.unet_batch) < config.caption_dropout, index[""], rows_of[rows])
        # stratified timesteps: the same uniform law, less variance
        timesteps = ((torch.arange(config.unet_batch) + torch.rand(config.unet_batch)) * 1000 / config.unet_batch).long()
        timesteps, clean = timesteps.to(device()), latents[rows]
        noise = torch.randn_like(clean)
        a = alpha_bar[timesteps][:, None, None, None]
        with autocast():
            output = model(a.sqrt() * clean + (1 - a).sqrt() * noise, timesteps, embeds[texts]).sample
        # min-SNR weights (Hang et al. 2023, arXiv 2303.09556): the steps that hardly have noise would fill most of the loss,
        # and what a picture shows is decided in the others
        weights = (5 * (1 - a) / a).clamp(max=1)  # min(SNR, 5) / SNR
        return (weights * (output.float() - noise).square()).mean()

    samples = [scenes.with_article(noun) for noun in scenes.nouns()[:69]] + ["a cat on a blue background",
               "a dog on a green striped background", "a fox with a guitar"]

    def look(model):
        pipeline.unet = model
        with autocast():
            images = pipeline(samples, num_inference_steps=20, guidance_scale=4.0, output_type="pt",
                              generator=torch.Generator().manual_seed(0)).images * 2 - 1
        save_sheet(images, Path(config.work) / "unet.png")
        image_embeds, text_embeds = clip_embed(clip, images[:69].float(), tokenize(
            tokenizer, [scenes.with_article(noun) for noun in scenes.nouns()]).to(device()))
        top1 = ((image_embeds @ text_embeds.T).argmax(1).cpu() == torch.arange(69)).float().mean()
        return f"zero-shot top-1 on generated animals {top1:.3f}"

    return train("unet", config, unet, loss_fn, look)


FLOW_SHIFT = 2.0  # as in SD3, where it is 3: puts more of the steps where a picture's content is decided


def flow_scheduler():
    """StableDiffusionPipeline multiplies its first noise by init_noise_sigma, which this class has only if
    its file says so."""
    config = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT).config
    return FlowMatchEulerDiscreteScheduler.from_config(dict(config) | {"init_noise_sigma": 1.0})


def time_of_flow(alpha_bar, t):
    """(timesteps, t): where the noise schedule alpha_bar has the signal-to-noise of flow time t, (B,) each.

    x = (1 − t) x_0 + t ε and x = sqrt(ᾱ) x_0 + sqrt(1 − ᾱ) ε are the same but for a factor, where
    t / (1 − t) = sqrt((1 − ᾱ)/ᾱ). Timesteps are fractional. Times beyond the schedule's ends get its ends.
    """
    schedule = ((1 - alpha_bar) / alpha_bar).log().double() / 2  # rises with the timestep
    level = torch.logit(t.double()).clamp(schedule[0], schedule[-1])
    right = torch.searchsorted(schedule, level).clamp(1, len(schedule) - 1)
    share = (level - schedule[right - 1]) / (schedule[right] - schedule[right - 1])
    return (right - 1 + share).float(), level.sigmoid().float()


def match_time_embedding(student, teacher, alpha_bar, steps=1500):
    """Train the two small layers behind the student's time input so that it sees time as its teacher does."""
    student.time_embedding.requires_grad_(True)
    optimizer = torch.optim.Adam(student.time_embedding.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    torch.manual_seed(0)
    for _ in range(steps):
        t = torch.rand(512, device=alpha_bar.device) * 0.98 + 0.02
        target = teacher.time_embedding(teacher.time_proj(time_of_flow(alpha_bar, t)[0]))
        loss = (student.time_embedding(student.time_proj(1000 * t)) - target).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"time embedding: mean square error {loss.item():.2e} of {target.square().mean().item():.2e}")


def train_flow(config):
    """Stage "flow": a UNet that predicts the velocity ε − x_0 on the straight path x = (1 − t) x_0 + t ε.

    It starts from the weights of the exported model, which then teaches it: that model's x̂_0 at the same
    signal-to-noise gives a target without noise, (x − x̂_0) / t. Some captions are empty, for guidance.
    """
    pipeline = load_pipeline(config.out)
    teacher, vae, alpha_bar = pipeline.unet, pipeline.vae, pipeline.scheduler.alphas_cumprod.to(device())
    student = build_unet()
    student.load_state_dict(teacher.state_dict())
    if finished("flow", config, student):
        return pipeline, student
    student.to(device())
    if not (Path(config.work) / "flow.pt").exists():
        match_time_embedding(student, teacher, alpha_bar)
    pictures, captions = scenes.draw_scenes(config.flow_scenes, config.seed + 40)
    with torch.no_grad(), autocast():
        latents = torch.cat([vae.encode(to_pixels(pictures[i:i + 256])).latents.float()
                             for i in tqdm(range(0, len(pictures), 256), desc="latents")])
    vocabulary = sorted(set(captions)) + [""]
    index = {caption: row for row, caption in enumerate(vocabulary)}
    rows_of = torch.tensor([index[caption] for caption in captions])
    with torch.no_grad():
        ids = tokenize(pipeline.tokenizer, vocabulary).to(device())
        embeds = torch.cat([pipeline.text_encoder(part).last_hidden_state for part in ids.split(512)])

    def loss_fn(model):
        rows = torch.randint(len(latents), (config.flow_batch,))
        empty = torch.rand(config.flow_batch) < 2 * config.caption_dropout
        texts = torch.where(empty, index[""], rows_of[rows])
        # stratified, and shifted as the scheduler shifts its steps; below 0.03 the teacher knows nothing
        t = (torch.arange(config.flow_batch) + torch.rand(config.flow_batch)).to(device()) / config.flow_batch
        t = (FLOW_SHIFT * t / (1 + (FLOW_SHIFT - 1) * t)).clamp(0.03, 0.9999)
        clean = latents[rows]
        noise = torch.randn_like(clean)
        timesteps, known = time_of_flow(alpha_bar, t)  # the teacher never sees pure noise, but almost
        t, known = t[:, None, None, None], known[:, None, None, None]
        x, norm = (1 - t) * clean + t * noise, (known.square() + (1 - known).square()).sqrt()
        x_teacher = ((1 - known) * clean + known * noise) / norm
        with autocast():
            with torch.no_grad():
                noise_pred = teacher(x_teacher, timesteps, embeds[texts]).sample.float()
            output = model(x, 1000 * t.flatten(), embeds[texts]).sample.float()
        target = (x - (norm * x_teacher - known * noise_pred) / (1 - known)) / t
        return (output - target).square().mean()

    nouns = [scenes.with_article(noun) for noun in scenes.nouns()]

    def look(model):
        pipeline.unet, pipeline.scheduler = model, flow_scheduler()
        noise = torch.randn(len(nouns), 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(device())
        with autocast():
            images = pipeline(nouns, num_inference_steps=10, guidance_scale=4.0, latents=noise,
                              output_type="pt").images
        save_sheet(images[:96].float() * 2 - 1, Path(config.work) / "flow.png")
        images = (images.float() * 255).round().byte()
        right = clip_top1(images, nouns, nouns, model=str(Path(config.out) / "clip"))
        return f"zero-shot top-1 on generated nouns {right.float().mean():.3f}"

    return pipeline, train("flow", config, student, loss_fn, look)


def export_flow(config, pipeline, unet):
    """The same pipeline with the other UNet and the flow scheduler. The other parts are copied as they are."""
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(Path(config.out) / part, Path(config.flow_out) / part, dirs_exist_ok=True)
    unet.set_default_attn_processor()
    unet.to(torch.float16).save_pretrained(Path(config.flow_out) / "unet", safe_serialization=True)
    flow_scheduler().save_pretrained(Path(config.flow_out) / "scheduler")
    index = json.loads((Path(config.out) / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (Path(config.flow_out) / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def report_flow(config, steps=10, guidance_scale=4.0):
    """How good the flow model is beside its teacher, with and without the sampler's noise; `figures.json`.

    Judged by the teacher's CLIP on one picture of each noun, with the same seeds for both.
    """
    nouns = [scenes.with_article(noun) for noun in scenes.nouns()]
    figures = {"steps": steps, "guidance_scale": guidance_scale, "pictures": len(nouns)}
    for name, folder in (("flow", config.flow_out), ("teacher", config.out)):
        pipeline = load_pipeline(folder)
        for sampler, eta in (("ode", 0.0), *ETAS.items()):
            images = []
            for i in tqdm(range(0, len(nouns), 64), desc=f"{name} {sampler}"):
                seeds = range(i, min(i + 64, len(nouns)))
                generators = [torch.Generator(pipeline.device).manual_seed(seed) for seed in seeds]
                images.append(sample_trajectories(
                    pipeline, nouns[i:i + 64], steps, guidance_scale, eta, generators,
                    sampler="ddim" if sampler == "ode" else sampler).images.cpu())
            images = torch.cat(images)
            right = clip_top1(images, nouns, nouns, model=str(Path(config.out) / "clip")).float()
            figures[f"{name}_{sampler}_clip_top1"] = right.mean().item()
            figures[f"{name}_{sampler}_jpeg_kilobytes"] = jpeg_kilobytes(images).mean().item()
    size = sum(path.stat().st_size for path in Path(config.flow_out).rglob("*.safetensors"))
    figures["weights_megabytes"] = size / 1e6
    (Path(config.flow_out) / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def export(config, tokenizer, clip, vae, unet):
    unet.set_default_attn_processor()
    pipeline = build_pipeline(tokenizer, clip, vae, unet).to(torch.float16)
    pipeline.save_pretrained(config.out, safe_serialization=True)
    # the names that all published text encoders have; transformers before 5.6 knows no others
    path = Path(config.out) / "text_encoder" / "model.safetensors"
    weights = {"text_model." + key.removeprefix("text_model."): value.float() for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    settings = path.with_name("config.json")  # transformers 5 loads in the dtype of the file, diffusers in float32: they must agree
    settings.write_text(settings.read_text().replace('"float16"', '"float32"'))
    clip.to(torch.float16).save_pretrained(Path(config.out) / "clip", safe_serialization=True)
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessor(size={"shortest_edge": scenes.SIZE}, crop_size={"height": scenes.SIZE, "width": scenes.SIZE},
                       image_mean=half, image_std=half).save_pretrained(Path(config.out) / "clip")
    for folder in ("tokenizer", "clip"):  # written by hand: every release of transformers reads these three
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(Path(config.work) / "tokenizer" / name, Path(config.out) / folder / name)


def report(folder, images_per_noun=1, scene_count=1000):
    """How good the exported model is, judged by its own CLIP among all nouns; `figures.json` in the folder.

    On pictures the CLIP has never seen: fresh scenes, and what the pipeline draws for "a cat" and the like (20 steps).
    """
    pictures, captions = scenes.draw_scenes(scene_count, seed=1234, kind="alone")
    nouns = [scenes.with_article(noun) for noun in scenes.nouns()]
    clip = str(Path(folder) / "clip")
    right = clip_top1(torch.tensor(pictures).permute(0, 3, 1, 2), captions, nouns, model=clip)
    figures = {"clip_top1_fresh_scenes": right.float().mean().item()}
    pipeline = load_pipeline(folder)
    for guidance_scale in (3.0, 4.0, 5.0):
        prompts = nouns * images_per_noun
        images = []
        for i in tqdm(range(0, len(prompts), 64), desc=f"guidance {guidance_scale:g}"):
            part = prompts[i:i + 64]
            generators = [torch.Generator(pipeline.device).manual_seed(i + j) for j in range(len(part))]
            images.append(sample_trajectories(pipeline, part, 20, guidance_scale, generator=generators).images.cpu())
        images = torch.cat(images)
        right = clip_top1(images, prompts, nouns, model=clip).float()
        figures[f"clip_top1_generated_guidance_{guidance_scale:g}"] = right.mean().item()
        figures[f"clip_top1_generated_animals_guidance_{guidance_scale:g}"] = right.view(images_per_noun, -1)[:, :69].mean().item()
        if guidance_scale == 4.0:
            figures["jpeg_kilobytes_generated"] = jpeg_kilobytes(images).mean().item()
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    figures |= {"weights_megabytes": size / 1e6, "images_per_noun": images_per_noun, "scenes": scene_count}
    (Path(folder) / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=field.default)
    parser.error = lambda message: parser.exit(2, f"{message}\n")
    try:
        config = check(Config(**vars(parser.parse_args())))
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    Path(config.work).mkdir(parents=True, exist_ok=True)
    if not config.only:
        tokenizer = build_tokenizer(config)
        clip = train_clip(config, tokenizer)
        vae = train_vae(config)
        unet = train_unet(config, tokenizer, clip, vae)
        judge = train_clip(config, tokenizer, "judge", clip)
        decoder = train_vae(config, "decoder", vae)
        export(config, tokenizer, judge, decoder, unet)
        print(json.dumps(report(config.out), indent=1))
    export_flow(config, *train_flow(config))
    print(json.dumps(report_flow(config), indent=1))
