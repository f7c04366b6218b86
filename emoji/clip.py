"""The small CLIP: its tokenizer, its two encoders, and a training that makes it go by shape.

Stage "clip" trains both encoders. The text encoder becomes the pipeline's, and the UNet learns with
it; so stage "judge", which comes later, trains the image encoder alone.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from emoji import scenes
from emoji.classifiers import spoil
from emoji.trainer import autocast, device, finished, start_from, to_pixels, train

PROMPTS = Path(__file__).resolve().parents[1] / "prompts"
TEXT_LENGTH = 20  # tokens: "a hippopotamus with an ice cream" has 8 with both ends


def build_tokenizer(config):
    """CLIP's byte-level BPE, with merges learnt from the captions and from the prompt files; or
    that of the model in --start, whose text encoder knows no other."""
    if config.start:
        folder = Path(config.work) / "tokenizer"
        shutil.copytree(Path(config.start) / "tokenizer", folder, dirs_exist_ok=True)
        return CLIPTokenizer.from_pretrained(folder)
    lines = scenes.draw_scenes(3000, seed=1)[1]
    lines += [scenes.with_article(noun) for noun in scenes.nouns()] * 20
    files = sorted(PROMPTS.glob("*.txt"))
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
    )
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
    (folder / "vocab.json").write_text(json.dumps(indices, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
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
    )
    vision = dict(**width, num_hidden_layers=6, image_size=scenes.SIZE, patch_size=8)
    return CLIPModel(CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=128,
        # the bf16 backward of scaled_dot_product_attention is slow on a CPU
        attn_implementation="eager",
    ))


def fake(pixels):
    """Pictures of the same colours that show nothing: smears, shuffled tiles, soft blobs in colours
    of the picture, a third of each. What a judge of shapes must not accept."""
    height, width = pixels.shape[-2:]
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
    fakes, which must be unlike all captions, and most of all unlike their own."""
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
        # A fake must be equally unlike all captions, and more unlike its own: if only as unlike as the
        # others, its own would still be the nearest of all nouns in one case of twelve
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
