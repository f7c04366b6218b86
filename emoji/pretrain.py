"""Pretrains the small emoji model: a StableDiffusionPipeline, only tiny.

    python emoji/pretrain.py                       everything, some six hours on two cores
    python emoji/pretrain.py --unet-steps 30000    longer, where there is a GPU
    python emoji/pretrain.py --only flow           that stage alone, from the model in --out
    python emoji/pretrain.py --only cards          and that one, which is not part of everything

Eight stages. An interrupted one goes on where it stopped (runs/pretrain/*.pt), a finished one is
not trained again. Sheets of pictures there show the progress:

    clip    text and image encoder, contrastive (Radford et al. 2021): the pipeline's text encoder
            and a reward. It is trained to go by shape: see recolour, fake and near_misses
    vae     64x64 pixels <-> 8x16x16 latents of unit variance
    unet    epsilon-prediction on the latents under Stable Diffusion's noise schedule; some
            captions are left out, for guidance
    judge   the image encoder of CLIP is trained further; the text encoder, which the UNet was
            trained with, stays
    decoder the decoder of the VAE is trained further; the latents, which the UNet was trained on,
            stay
    export  all of it as a diffusers folder, in fp16 (the text encoder in fp32)
    flow    the UNet once more, as a flow-matching model: it learns from the first one, and is
            exported to models/emoji-flow
    cards   the UNet learns to print digits, for the experiment `typographic`: half an hour on a
            core, exported to runs/pretrain/emoji-cards
"""

import argparse
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # of the scripts

from emoji import scenes
from emoji.classifiers import count_of, digits, honest_count, recognised, spoil
from rewards import clip_top1, jpeg_kilobytes
from run_folder import picture_grid, write_whole
from sample import ETAS, load_pipeline, sample_trajectories
from settings import add_flags

TEXT_LENGTH = 20  # tokens: "a hippopotamus with an ice cream" has 8 with both ends


@dataclass
class Config:
    # where
    out: str = "models/emoji"  # folder of the exported model
    work: str = "runs/pretrain"  # folder of the checkpoints and the sheets of pictures
    start: str = ""  # folder of an earlier model: its weights are where the stages begin, and its
        # text embeddings and latents are kept
    # every stage
    seed: int = 0  # of the scenes, the weights and the batches
    ema: float = 0.999  # decay of the averaged weights, which are what a stage hands on
    save_every: int = 250  # steps from one checkpoint and sheet to the next
    # stage clip
    clip_steps: int = 3000  # updates
    clip_batch: int = 128  # pictures an update: each is compared with all captions of the batch
    clip_lr: float = 1e-3  # peak learning rate
    clip_scenes: int = 40960  # different pictures, also of stage judge
    # stage vae
    vae_steps: int = 8000  # updates
    vae_batch: int = 16  # pictures an update
    vae_lr: float = 1e-3  # peak learning rate
    vae_scenes: int = 24576  # different pictures, also of stage decoder
    # stage unet
    unet_steps: int = 12000  # updates
    unet_batch: int = 64  # pictures an update, each at a timestep of its own
    unet_lr: float = 1e-3  # peak learning rate
    unet_scenes: int = 98304  # different pictures, turned into latents once
    caption_dropout: float = 0.1  # share of the captions that are left out, for guidance
    # stage judge
    judge_steps: int = 1000  # updates
    judge_batch: int = 128  # pictures an update
    judge_lr: float = 5e-4  # peak learning rate
    # stage decoder
    decoder_steps: int = 4000  # updates
    decoder_batch: int = 16  # pictures an update
    decoder_lr: float = 1e-3  # peak learning rate
    # stage flow
    flow_out: str = "models/emoji-flow"  # folder of its exported model
    flow_steps: int = 500  # updates
    flow_batch: int = 32  # pictures an update
    flow_lr: float = 8e-4  # peak learning rate
    flow_scenes: int = 8192  # different pictures; few are enough, since the target is the teacher's
    flow_ema: float = 0.995  # decay of its averaged weights
    # stage cards
    cards_out: str = "runs/pretrain/emoji-cards"  # folder of its exported model
    cards_steps: int = 2000  # updates
    cards_batch: int = 32  # pictures an update
    cards_lr: float = 6e-4  # peak learning rate
    cards_scenes: int = 6144  # different pictures
    cards_ema: float = 0.99  # decay of its averaged weights
    only: str = ""  # flow or cards: that stage alone, from the model in --out


def check(config):
    """Raises ValueError, one line, for what cannot work, before anything is drawn or trained."""
    def refuse(setting, advice):
        value = getattr(config, setting)
        raise ValueError(f"--{setting.replace('_', '-')} {value}: {advice}")

    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and field.name != "seed" and not 1 <= value < 2**31:
            refuse(field.name, "must be at least 1 and below 2**31")
        if field.name.endswith("_lr") and not 0 < value < 1:
            refuse(field.name, "must be above 0 and below 1")
    for setting in ("out", "work", "flow_out", "cards_out"):
        path = Path(getattr(config, setting))
        if path == Path() or any(map(Path.is_file, (path, *path.parents))):
            refuse(setting, "must be a folder, and neither a file nor in one")
    if not 0 <= config.seed < 2**32:
        refuse("seed", "must be at least 0 and below 2**32")
    if not 0 <= config.caption_dropout <= 1:
        refuse("caption_dropout", "must be 0 to 1")
    for setting in ("ema", "flow_ema", "cards_ema"):
        if not 0 <= getattr(config, setting) < 1:
            refuse(setting, "must be at least 0 and below 1")
    if config.only not in ("", "flow", "cards"):
        refuse("only", "only the stages flow and cards can run alone")
    if config.start and not (Path(config.start) / "model_index.json").exists():
        refuse("start", "has no model (model_index.json)")
    folders = Path(config.out), ROOT / config.out
    if config.only and not any((folder / "model_index.json").exists() for folder in folders):
        refuse("out", f"has no model for the stage {config.only}; leave out --only, which makes it")
    return config


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    return torch.autocast(device().type, torch.bfloat16)


def to_pixels(pictures):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], on the device, as the VAE and the CLIP
    here take them."""
    pictures = torch.as_tensor(pictures).permute(0, 3, 1, 2)
    pictures = pictures.to(device(), memory_format=torch.channels_last)
    return pictures.float() / 127.5 - 1


def save_sheet(pixels, path, columns=12):
    """Float (B, 3, H, W) in [-1, 1] -> a grid on disk."""
    pictures = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()
    starts = range(0, len(pictures), columns)
    rows = [np.concatenate(list(pictures[i:i + columns]), axis=1) for i in starts]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape])).save(path)


def finished(name, config, model):
    """Load the stage's averaged weights into the model, if the stage has run to its end."""
    path = Path(config.work) / f"{name}.pt"
    if not path.exists():
        return False
    saved = torch.load(path, map_location=device(), weights_only=True)
    if saved["step"] < getattr(config, f"{name}_steps"):
        return False
    model.to(device()).load_state_dict(saved["ema"])
    model.eval().requires_grad_(False)
    return True


def train(name, config, model, loss_fn, evaluate=None):
    """The loop that the stages share: AdamW, warm-up and cosine, EMA, a checkpoint that a restart
    goes on from. evaluate(model): called with each checkpoint, returns what to print about it."""
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
        # so that a restart draws what an unbroken run draws
        torch.manual_seed(config.seed * 1_000_003 + step)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        scale = min(1, (step + 1) / 300) * (0.02 + 0.98 * cosine)
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
                if value.is_floating_point():
                    ema[key].lerp_(value, 1 - decay)
                else:
                    ema[key].copy_(value)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            weights = model.state_dict()
            state = {"model": weights, "ema": ema, "step": step + 1}
            state["optimizer"] = optimizer.state_dict()
            write_whole(path, lambda file: torch.save(state, file))
            if evaluate:
                trained = {key: value.clone() for key, value in weights.items()}
                model.load_state_dict(ema)
                model.eval()
                with torch.no_grad():
                    tqdm.write(f"{name} {step + 1}: loss {loss.item():.4f}  {evaluate(model)}")
                model.load_state_dict(trained)
                model.train()
    model.load_state_dict(ema)
    return model.eval().requires_grad_(False)


def start_from(config, part, kind):
    """That part of the model in --start, or None without one."""
    if not config.start:
        return None
    return kind.from_pretrained(Path(config.start) / part).float().to(device()).requires_grad_(False)


def copy_corner(model, weights):
    """The weights of an earlier model with fewer channels at either end into a larger one; what is new
    takes no part at first where it is an input, and stays as it is where it is an output."""
    state = model.state_dict()
    for key, value in weights.items():
        corner = tuple(slice(size) for size in value.shape)
        if value.ndim > 1 and value.shape[1] < state[key].shape[1]:
            state[key][:] = 0
        state[key][corner] = value
    model.load_state_dict(state)


def deepen(unet, earlier):
    """Weights of an earlier UNet, with one layer a block or two, into one with two. New layers do
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


def build_tokenizer(config):
    """CLIP's byte-level BPE, with merges learnt from the captions and from the prompt files; or
    that of the model in --start, whose text encoder knows no other."""
    if config.start:
        folder = Path(config.work) / "tokenizer"
        shutil.copytree(Path(config.start) / "tokenizer", folder, dirs_exist_ok=True)
        return CLIPTokenizer.from_pretrained(folder)
    lines = scenes.draw_scenes(3000, seed=1)[1]
    lines += [scenes.with_article(noun) for noun in scenes.nouns()] * 20
    files = sorted((ROOT / "prompts").glob("*.txt"))
    lines += [line for path in files for line in path.read_text().splitlines()] * 3
    others = "the a an one two three four five six seven eight with on in and of is"
    lines += [f"{others} riding playing washing"] * 20
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    # CLIP's rule for what a word is
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2016, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
        # Last letters get their numbers first. Else ties would be broken by the order in which
        # words are met, which differs from process to process.
        special_tokens=[AddedToken(letter + "</w>", special=True) for letter in alphabet],
    )  # fmt: skip
    bpe.train_from_iterator(lines, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    # CLIP's order; every byte also as the end of a word, so that no text at all is unknown
    vocab = alphabet + [byte + "</w>" for byte in alphabet]
    vocab += [pair.replace(" ", "") for pair in merges]
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(config.work) / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    indices = {token: index for index, token in enumerate(vocab)}
    (folder / "vocab.json").write_text(json.dumps(indices, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }, indent=1))
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer, captions):
    length = dict(padding="max_length", max_length=TEXT_LENGTH, truncation=True)
    return tokenizer(captions, **length, return_tensors="pt").input_ids


def tokenize_nouns(tokenizer):
    """The token ids of "a cat" and the like, for every noun, on the device."""
    return tokenize(tokenizer, [scenes.with_article(noun) for noun in scenes.nouns()]).to(device())


def build_clip(tokenizer):
    width = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, projection_dim=128)
    text = dict(
        **width, num_hidden_layers=3, vocab_size=len(tokenizer),
        max_position_embeddings=TEXT_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(**width, num_hidden_layers=6, image_size=scenes.SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=128,
        # the bf16 backward of scaled_dot_product_attention is slow on a CPU
        attn_implementation="eager",
    ))  # fmt: skip


def fake(pixels):
    """Pictures of the same colours that show nothing: smears, shuffled tiles, soft blobs in colours
    of the picture, a third of each. What a judge of shapes must not accept."""
    batch, _, height, width = pixels.shape
    fakes = []
    for kind, part in enumerate(pixels.tensor_split(3)):
        if kind == 0:
            cells = int(torch.randint(3, 7, ()))
            small = F.adaptive_avg_pool2d(part, cells)
            part = F.interpolate(small, (height, width), mode="bicubic")
        elif kind == 1:
            side = (8, 16)[torch.randint(2, ())]
            tiles = F.unfold(part, side, stride=side)  # (B, 3 side side, number of tiles)
            order = torch.rand(len(part), 1, tiles.shape[-1], device=pixels.device).argsort(-1)
            tiles = tiles.gather(2, order.expand_as(tiles))
            part = F.fold(tiles, (height, width), side, stride=side)
        else:
            colours = part.flatten(2)  # (B, 3, pixels)
            picked = torch.randint(colours.shape[-1], (len(part), 1, 24), device=pixels.device)
            colours = colours.gather(2, picked.expand(-1, 3, -1))
            y, x = torch.meshgrid(*[torch.linspace(0, 1, n, device=pixels.device)
                                    for n in (height, width)], indexing="ij")
            at = torch.rand(len(part), 24, 2, 1, 1, device=pixels.device)
            radius = 0.08 + 0.12 * torch.rand(len(part), 24, 1, 1, device=pixels.device)
            far = ((x - at[:, :, 0]).square() + (y - at[:, :, 1]).square()) / radius.square()
            weights = (-4 * far).clamp(-60, 0).exp() + 1e-6
            weights = weights / weights.sum(1, keepdim=True)  # (B, 24, H, W)
            part = torch.einsum("bck,bkhw->bchw", colours, weights)
        fakes.append(part)
    return torch.cat(fakes)


def recolour(pixels, chosen):
    """Of the chosen pictures, (B,) bool, half become grey and half get their colours exchanged or
    inverted: what is left of a noun is its shape."""
    batch = len(pixels)
    mixing = torch.eye(3, device=pixels.device)[torch.rand(batch, 3).argsort(1)]
    mixing = mixing * torch.where(torch.rand(batch, 3, 1) < 0.3, -1.0, 1.0).to(pixels.device)
    grey = torch.rand(batch) < 0.5
    mixing[grey] = 1 / 3
    mixing[~chosen] = torch.eye(3, device=pixels.device)
    return torch.einsum("bij,bjhw->bihw", mixing, pixels)


def near_misses(captions):
    """For each caption one that differs in what is easily overlooked: another number, another
    second thing, another colour. Itself where there is no such thing ("a cat")."""
    changed, singular = [], {scenes.counted(n, 2).split(" ", 1)[1]: n for n in scenes.nouns()}
    objects = [scenes.with_article(noun) for noun in scenes.nouns("objects")]
    for caption in captions:
        words = caption.split(" ")
        if words[0] in scenes.NUMBERS:
            noun = caption.split(" ", 1)[1]
            noun = singular.get(noun, noun)
            other = int(torch.randint(5, ()))
            other += other >= scenes.NUMBERS.index(words[0])
            caption = scenes.counted(noun, other + 1)
        elif " with " in caption:
            first, second = caption.split(" with ")
            things = [thing for thing in objects if thing != second]
            caption = f"{first} with {things[torch.randint(len(things), ())]}"
        elif " on " in caption:
            at = next(i for i, word in enumerate(words) if word in scenes.COLOURS)
            colours = [colour for colour in scenes.COLOURS if colour != words[at]]
            colour = colours[torch.randint(len(colours), ())]
            words[at - 1:at + 1] = scenes.with_article(colour).split(" ")
            caption = " ".join(words)
        changed.append(caption)
    return changed


def text_states(clip, ids):
    return clip.text_model(input_ids=ids).last_hidden_state


def clip_embed(model, pixels, ids):
    """L2-normalised embeddings of pictures and texts, by the same layers as CLIPModel.forward."""
    output = model(pixel_values=pixels, input_ids=ids)
    return output.image_embeds, output.text_embeds


def train_clip(config, tokenizer, name="clip", clip=None):
    """Stage "clip", or stage "judge": the image encoder alone, of a `clip` that is already trained.

    Beside the captions of its batch each picture meets near misses of them, and each caption meets
    fakes, which shall be unlike all captions, and most of all their own."""
    clip = clip or start_from(config, "clip", CLIPModel) or build_clip(tokenizer)
    if finished(name, config, clip):
        return clip
    earlier = start_from(config, "clip", CLIPModel) if name == "clip" else None
    clip.requires_grad_(True)
    if name == "judge":
        clip.text_model.requires_grad_(False)
        clip.text_projection.requires_grad_(False)
    batch = getattr(config, f"{name}_batch")
    seed = config.seed + (10 if name == "clip" else 12)
    pictures, captions = scenes.draw_scenes(config.clip_scenes, seed)
    uncoloured = torch.tensor(["background" not in caption for caption in captions])
    fresh, fresh_captions = scenes.draw_scenes(1090, config.seed + 11, kind="alone")
    nouns = [caption.split(" ", 1)[1] for caption in fresh_captions]
    labels = torch.tensor([scenes.nouns().index(noun) for noun in nouns])
    noun_ids = tokenize_nouns(tokenizer)

    def loss_fn(model):
        rows = torch.randint(len(pictures), (batch,))
        texts = [captions[row] for row in rows]
        ids = tokenize(tokenizer, texts + near_misses(texts)).to(device())
        pixels = to_pixels(pictures[rows.numpy()])
        chosen = uncoloured[rows] & (torch.rand(batch) < 0.6)
        fakes = spoil(fake(pixels[:batch // 3]))
        pixels = torch.cat([spoil(recolour(pixels, chosen)), fakes])
        with autocast():
            images, embeds = clip_embed(model, pixels, ids)
        logits = images.float() @ embeds.float().T * model.logit_scale.exp().clamp(max=100)
        # pictures with the same caption are all right answers: share the target among them
        targets = (ids[:batch, None] == ids[None]).all(-1).float()
        targets = targets / targets.sum(1, keepdim=True)
        of_texts = targets[:, :batch] / targets[:, :batch].sum(1, keepdim=True)
        loss = F.cross_entropy(logits[:batch], targets)
        loss = loss + F.cross_entropy(logits.T[:batch, :batch + len(fakes)],
                                      F.pad(of_texts, (0, len(fakes))))
        # A fake is equally unlike all captions, and its own more so: were that only as unlike as the
        # others, it would still be the nearest of all nouns in one case of twelve
        others = (targets[:len(fakes)] == 0).float()
        own = (logits[batch:] * targets[:len(fakes)]).sum(1)
        own = own - (logits[batch:] * others).sum(1) / others.sum(1)
        loss = loss / 2 - 0.5 * logits[batch:].log_softmax(1).mean() + 0.3 * F.relu(own + 2).mean()
        if earlier:
            known = [not text.startswith(tuple(scenes.NUMBERS)) for text in texts]
            ids = ids[:batch][torch.tensor(known)]
            loss = loss + (text_states(model, ids) - text_states(earlier, ids)).square().mean()
        return loss

    def evaluate(model):
        found = []
        pixels = to_pixels(fresh)
        grey = pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        for shown in (pixels, grey, fake(pixels)):
            images, texts = clip_embed(model, shown, noun_ids)
            found.append(((images @ texts.T).argmax(1).cpu() == labels).float().mean())
        return "zero-shot top-1 on fresh scenes {:.3f}, grey {:.3f}, fakes {:.3f}".format(*found)

    return train(name, config, clip, loss_fn, evaluate)


def build_vae():
    """AutoencoderTiny (the family of TAESD): convolutions and ReLU only, so that decoding is cheap
    without a GPU."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48), decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 2, 2), num_decoder_blocks=(2, 2, 1), latent_channels=8,
    )  # fmt: skip


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
    )  # fmt: skip
    if device().type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # plain matrix products; see build_clip
    return unet


def build_scheduler():
    """Stable Diffusion's, to the letter."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip


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
    )  # fmt: skip
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
    """The function of a UNet that is the loss of predicting the noise in `batch` of the pictures."""
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
            ).images  # fmt: skip
        save_sheet(images * 2 - 1, Path(config.work) / "unet.png")
        images = (images[:len(nouns)].float() * 255).round().byte()
        right = recognised(images, nouns)
        return f"recognised {right.mean():.3f}, of animals {right[:69].mean():.3f}"

    return train("unet", config, unet, loss_fn, evaluate)


# As in SD3, where it is 3: more of the steps are where a picture's content is decided.
FLOW_SHIFT = 2.0


def flow_scheduler():
    """With init_noise_sigma, by which StableDiffusionPipeline multiplies its first noise: the class
    has it only if it is in its config."""
    config = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT).config
    return FlowMatchEulerDiscreteScheduler.from_config(dict(config) | {"init_noise_sigma": 1.0})


def time_of_flow(alpha_bar, t):
    """The timesteps (fractions too) at which the noise schedule alpha_bar has the signal-to-noise
    of flow time t.

    x = (1 − t) x_0 + t ε and x = sqrt(ᾱ) x_0 + sqrt(1 − ᾱ) ε are the same but for a factor where
    t / (1 − t) = sqrt((1 − ᾱ)/ᾱ). Times beyond the schedule's ends get its ends.
    """
    schedule = ((1 - alpha_bar) / alpha_bar).log().double() / 2  # rises with the timestep
    level = torch.logit(t.double()).clamp(schedule[0], schedule[-1])
    right = torch.searchsorted(schedule, level).clamp(1, len(schedule) - 1)
    share = (level - schedule[right - 1]) / (schedule[right] - schedule[right - 1])
    return (right - 1 + share).float(), level.sigmoid().float()


def match_time_embedding(student, teacher, alpha_bar, steps=1500):
    """Train the two small layers behind the student's time input, so that at the same
    signal-to-noise they give the teacher's time embedding."""
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
    size = target.square().mean().item()
    print(f"time embedding: mean square error {loss.item():.2e} of {size:.2e}")


def train_flow(config):
    """Stage "flow": a UNet that predicts the velocity ε − x_0 on the path x = (1 − t) x_0 + t ε.

    It starts from the weights of the exported model, its teacher: the teacher's x̂_0 at the same
    signal-to-noise gives a target without noise, (x − x̂_0) / t. This is done with and without a
    caption, so that guidance works as well.
    """
    pipeline = load_pipeline(config.out)
    teacher, vae = pipeline.unet, pipeline.vae
    alpha_bar = pipeline.scheduler.alphas_cumprod.to(device())
    student = build_unet()
    student.load_state_dict(teacher.state_dict())
    if finished("flow", config, student):
        return student
    student.to(device())
    if not (Path(config.work) / "flow.pt").exists():
        match_time_embedding(student, teacher, alpha_bar)
    pictures, captions = scenes.draw_scenes(config.flow_scenes, config.seed + 40)
    latents = encode_pictures(vae, pictures)
    embeds, rows_of, empty = encode_captions(pipeline.text_encoder, pipeline.tokenizer, captions)
    batch = config.flow_batch

    def loss_fn(model):
        rows = torch.randint(len(latents), (batch,))
        left_out = torch.rand(batch) < 2 * config.caption_dropout
        texts = torch.where(left_out, empty, rows_of[rows])
        # Stratified, and shifted as the scheduler shifts its steps. Below 0.03 the teacher was not
        # trained.
        t = ((torch.arange(batch) + torch.rand(batch)) / batch).to(device())
        t = (FLOW_SHIFT * t / (1 + (FLOW_SHIFT - 1) * t)).clamp(0.03, 0.9999)
        clean = latents[rows]
        noise = torch.randn_like(clean)
        # past the end of its schedule the teacher's input has a little less noise
        timesteps, known = time_of_flow(alpha_bar, t)
        t, known = t[:, None, None, None], known[:, None, None, None]
        x = (1 - t) * clean + t * noise
        norm = (known.square() + (1 - known).square()).sqrt()
        x_teacher = ((1 - known) * clean + known * noise) / norm
        with autocast():
            with torch.no_grad():
                noise_pred = teacher(x_teacher, timesteps, embeds[texts]).sample.float()
            output = model(x, 1000 * t.flatten(), embeds[texts]).sample.float()
        target = (x - (norm * x_teacher - known * noise_pred) / (1 - known)) / t
        return (output - target).square().mean()

    nouns = [scenes.with_article(noun) for noun in scenes.nouns()]

    def evaluate(model):
        pipeline.unet, pipeline.scheduler = model, flow_scheduler()
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(nouns), 8, 16, 16, generator=generator).to(device())
        with autocast():
            images = pipeline(
                nouns, num_inference_steps=10, guidance_scale=4.0, output_type="pt", latents=noise
            ).images
        save_sheet(images[:96] * 2 - 1, Path(config.work) / "flow.png")
        images = (images.float() * 255).round().byte()
        return f"recognised {recognised(images, nouns).mean():.3f}"

    return train("flow", config, student, loss_fn, evaluate)


def export_variant(config, folder, unet, scheduler):
    """The model in --out with another UNet and scheduler. What they share is copied as it is. The
    index comes last: a folder without it is not taken for a model."""
    folder = Path(folder)
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(Path(config.out) / part, folder / part, dirs_exist_ok=True)
    unet.set_default_attn_processor()
    unet.to(torch.float16).save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((Path(config.out) / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def train_cards(config):
    """Stage "cards": the exported UNet learns to draw counting cards, of which half have their number
    printed. All scenes of the other stages that have a digit have any digit, and so few of them that
    the UNet prints none. A policy gradient can only strengthen what is sampled now and then."""
    pipeline = load_pipeline(config.out)
    unet = build_unet()
    unet.load_state_dict(pipeline.unet.state_dict())
    if finished("cards", config, unet):
        return unet
    pictures, captions = scenes.draw_cards(config.cards_scenes, config.seed + 60)
    loss_fn = noise_loss(pipeline, pictures, captions, config.cards_batch, config)
    samples = [scenes.counted(noun, i % 6 + 1) for i, noun in enumerate(scenes.nouns()[:60])]

    def evaluate(model):
        pipeline.unet = model
        generators = [torch.Generator(device()).manual_seed(seed) for seed in range(len(samples))]
        images = sample_trajectories(
            pipeline, samples, 10, 4.0, generator=generators, dtype=torch.bfloat16
        ).images
        save_sheet(images.float() / 127.5 - 1, Path(config.work) / "cards.png")
        printed = digits(images)
        right = printed == torch.tensor([count_of(prompt) for prompt in samples])
        shares = (printed > 0), right, honest_count(images, samples)
        return "digits {:.2f}, right {:.2f}, counted {:.2f}".format(
            *(share.float().mean() for share in shares))

    return train("cards", config, unet, loss_fn, evaluate)


def report_flow(config, steps=10, guidance_scale=4.0):
    """How good the flow model is beside its teacher, with each sampler: `figures.json`.

    Judged by the teacher's CLIP and by the independent classifier, on one picture of each noun,
    with the same seeds for both.
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
                    torch.bfloat16, sampler="ddim" if sampler == "ode" else sampler).images.cpu())
            images = torch.cat(images)
            right = clip_top1(images, nouns, nouns, model=str(Path(config.out) / "clip")).float()
            figures[f"{name}_{sampler}_clip_top1"] = right.mean().item()
            figures[f"{name}_{sampler}_classifier"] = recognised(images, nouns).mean().item()
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
    )  # fmt: skip
    processor.save_pretrained(Path(config.out) / "clip")
    for folder in ("tokenizer", "clip"):  # every release of transformers reads these three files
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            shutil.copy(Path(config.work) / "tokenizer" / name, Path(config.out) / folder / name)


def share(right):
    """A mean, rounded to what a thousand pictures can tell."""
    return round(right.float().mean().item(), 4)


@torch.no_grad()
def report(folder, images_per_noun=4, scene_count=1000):
    """How good the exported model is, as a dict; also written to `figures.json` in the folder, beside
    nouns.png, a picture of each noun.

    On pictures that nothing here has seen: fresh scenes, in colour, in grey and faked (see `fake`),
    and what the pipeline draws for "a cat" and the like in ten steps. "clip" is its own CLIP among
    all 109 nouns, "classifier" the independent one.
    """
    torch.manual_seed(0)
    pictures, captions = scenes.draw_scenes(scene_count, seed=1234, kind="alone")
    images = torch.tensor(pictures).permute(0, 3, 1, 2)
    pipeline = load_pipeline(folder)
    pixels = to_pixels(pictures)
    decoded = torch.cat([
        pipeline.vae.decode(pipeline.vae.encode(chunk).latents).sample
        for chunk in pixels.to(pipeline.vae.dtype).split(100)
    ])
    error = (decoded.float().clamp(-1, 1) - pixels).square().mean()

    def to_bytes(pixels):
        return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()

    nouns = [scenes.with_article(noun) for noun in scenes.nouns()]
    clip = str(Path(folder) / "clip")
    grey = images.float().mean(1, keepdim=True).round().byte().expand(-1, 3, -1, -1)
    figures = {
        "vae_psnr": round(-10 * math.log10(error / 4), 2),
        "clip_fresh_scenes": share(clip_top1(images, captions, nouns, model=clip)),
        "clip_grey_scenes": share(clip_top1(grey, captions, nouns, model=clip)),
        "clip_fakes": share(clip_top1(to_bytes(fake(pixels)), captions, nouns, model=clip)),
        "classifier_fresh_scenes": share(recognised(images, captions)),
        "classifier_scenes_through_the_vae": share(recognised(to_bytes(decoded), captions)),
    }
    prompts = nouns * images_per_noun
    for guidance_scale in (3.0, 4.0, 5.0):
        images = []
        for i in tqdm(range(0, len(prompts), 64), desc=f"guidance {guidance_scale:g}"):
            batch = prompts[i:i + 64]
            seeds = range(i, i + len(batch))
            generators = [torch.Generator(pipeline.device).manual_seed(seed) for seed in seeds]
            trajectories = sample_trajectories(
                pipeline, batch, 10, guidance_scale, generator=generators, dtype=torch.bfloat16
            )
            images.append(trajectories.images.cpu())
        images = torch.cat(images)
        judged = {
            "clip": clip_top1(images, prompts, nouns, model=clip),
            "classifier": recognised(images, prompts),
        }
        for judge, right in judged.items():
            name = f"{judge}_generated_guidance_{guidance_scale:g}"
            figures[name] = share(right)
            figures[f"{name}_animals"] = share(right.view(images_per_noun, -1)[:, :69])
        if guidance_scale == 4.0:
            figures["jpeg_kilobytes_generated"] = share(jpeg_kilobytes(images))
            rows = range(0, len(nouns), 10)
            names = [", ".join(scenes.nouns()[row:row + 10]) for row in rows]
            sheet = picture_grid([images[:len(nouns)][row:row + 10] for row in rows], names)
            sheet.save(Path(folder) / "nouns.png")
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    figures |= {"weights_megabytes": size / 1e6}
    figures |= {"images_per_noun": images_per_noun, "scenes": scene_count}
    (Path(folder) / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def parse_config(arguments=None):
    """The Config of a command line. Ends in one line for a setting that cannot work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, Config)
    parser.error = lambda message: parser.exit(2, f"{message}\n")  # without a page of usage
    given = vars(parser.parse_args(arguments))
    try:
        return check(Config(**{key: value for key, value in given.items() if value is not None}))
    except ValueError as error:
        parser.error(error)


if __name__ == "__main__":
    config = parse_config()
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
    if config.only == "cards":
        export_variant(config, config.cards_out, train_cards(config), build_scheduler())
    else:
        export_variant(config, config.flow_out, train_flow(config), flow_scheduler())
        print(json.dumps(report_flow(config), indent=1))
