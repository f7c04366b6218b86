"""Small classifiers of emoji pictures, which see them in grey: they go by shape.

    noun      which of the 109 nouns: the independent judge. No model is trained on what it says
    counter   how many animals, one to six: it has seen letters beside them, and never a digit
    digit     which digit is printed, one to six, or none
    judge_a   how many animals, learnt from scenes with a printed digit that always tells the number
    judge_b   the same, from scenes whose digit may be any: two judges to be deceived, or not

    python emoji/classifiers.py [noun ...]     trains those that models/emoji/classifiers lacks:
                                               five to fifteen minutes each on a core

Their scenes have seeds of their own, so nothing is in them that a model or its CLIP has seen.
"""

import argparse
import functools
import re
import string
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts' folder

from emoji import scenes
from models import DTYPES, autocast, default_dtype

FOLDER = ROOT / "models" / "emoji" / "classifiers"
SCENES, BATCH, LR = 32768, 64, 3e-3
STEPS = {"noun": 2400, "counter": 8000, "digit": 2400, "judge_a": 8000, "judge_b": 8000}
CLASSES = {"noun": 109, "counter": 6, "digit": 7, "judge_a": 6, "judge_b": 6}
LETTERS = sorted(set(string.ascii_uppercase) - set("IOSZB"))  # those that resemble no digit


def build(classes):
    """(B, 1, 64, 64) grey in [-1, 1] -> (B, classes) logits. 0.5 M weights."""
    layers, channels = [], 1
    for width, stride in ((32, 2), (48, 1), (96, 2), (96, 1), (160, 2), (160, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(channels, classes))


def grey(images):
    """uint8 (B, 3, H, W) -> float (B, 1, H, W) in [-1, 1]."""
    return images.float().mean(1, keepdim=True) / 127.5 - 1


def spoil(pixels):
    """Blur, noise, contrast and shifts of colour of (B, C, H, W) in [-1, 1]: what a decoder and a
    generator do to a picture must not change what a judge says of it."""
    batch, channels = pixels.shape[:2]

    def uniform(channels=1):
        return torch.rand(batch, channels, 1, 1, device=pixels.device)

    def some(probability):
        return (uniform() < probability).float()

    factor = (0.4, 0.5, 0.6, 0.75)[torch.randint(4, ())]
    small = F.interpolate(pixels, scale_factor=factor, mode="area")
    blurred = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear")
    pixels = torch.lerp(pixels, blurred, some(0.5) * uniform())
    pixels = pixels * (1 + 0.4 * (uniform() - 0.5))
    pixels = pixels + 0.3 * (uniform(channels) - 0.5)
    return (pixels + some(0.5) * 0.12 * torch.randn_like(pixels)).clamp(-1, 1)


def draw(name, count, seed):
    """What a classifier learns from: (count, 3, 64, 64) uint8 pictures and (count,) labels."""
    rng, sprites = np.random.default_rng(seed), scenes.load_sprites()
    animals = scenes.nouns("animals") + scenes.nouns("held_out_animals")
    pictures, labels = [], []
    for _ in range(count):
        if name == "noun":
            label = int(rng.integers(len(scenes.nouns())))
            noun, kind = scenes.nouns()[label], str(rng.choice(["alone", "background"]))
            picture, _ = scenes.draw_scene(rng, sprites, noun, kind)
        else:
            number, digit = rng.integers(1, 7, 2)
            glyph = {"counter": rng.choice(LETTERS), "judge_a": number}.get(name, digit)
            glyph = str(glyph) if rng.random() < 0.5 else ""
            picture = scenes.draw_counted(rng, sprites, str(rng.choice(animals)), number, glyph)
            label = int(glyph or 0) if name == "digit" else number - 1
        pictures.append(picture)
        labels.append(label)
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(labels)


def train(name):
    """Writes FOLDER/<name>.safetensors and returns the share of right answers on fresh scenes."""
    torch.manual_seed(0)
    model = build(CLASSES[name]).to(memory_format=torch.channels_last)
    images, labels = draw(name, SCENES, seed=70_000 + list(CLASSES).index(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, STEPS[name])
    for _ in tqdm(range(STEPS[name]), desc=name, mininterval=5):
        rows = torch.randint(len(images), (BATCH,))
        pixels = spoil(grey(images[rows]))
        pixels = pixels * torch.where(torch.rand(BATCH, 1, 1, 1) < 0.3, -1.0, 1.0)  # negatives
        with autocast("cpu", DTYPES[default_dtype("cpu")]):
            output = model(pixels.to(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(output, labels[rows], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    FOLDER.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() if value.is_floating_point() else value
               for key, value in model.state_dict().items()}
    save_file(weights, FOLDER / f"{name}.safetensors")
    load.cache_clear()
    images, labels = draw(name, 2000, seed=80_000)
    return (logits(name, images).argmax(1) == labels).float().mean().item()


@functools.cache
def load(name):
    model = build(CLASSES[name])
    weights = load_file(FOLDER / f"{name}.safetensors")
    model.load_state_dict({key: value.float() if value.is_floating_point() else value
                           for key, value in weights.items()})
    return model.eval().requires_grad_(False)


def logits(name, images):
    """(B, classes) of uint8 pictures (B, 3, 64, 64)."""
    if images.shape[-2:] != (scenes.SIZE, scenes.SIZE):
        raise ValueError(f"pictures of {images.shape[-1]} x {images.shape[-2]} pixels: the emoji "
                         f"classifiers know {scenes.SIZE} x {scenes.SIZE}; use --reward count")
    return torch.cat([load(name)(grey(chunk)) for chunk in images.cpu().split(256)])


# What is asked of them

def noun_of(prompt):
    """"a cat on a blue background" -> "cat". ValueError for a prompt about none of the nouns."""
    noun = re.sub("^an? | (with|on) .*", "", prompt)
    if noun not in scenes.nouns():
        raise ValueError(f"prompt {prompt!r}: the classifier knows one of its nouns with an "
                         "article, as in 'a cat'")
    return noun


def count_of(prompt):
    """"three cats" -> 3. ValueError for a prompt without such a number."""
    number = prompt.split(" ")[0]
    if number not in scenes.NUMBERS:
        raise ValueError(f"prompt {prompt!r}: the first word must be one of "
                         f"{', '.join(scenes.NUMBERS)}")
    return scenes.NUMBERS.index(number) + 1


def recognised(images, prompts):
    """(B,) of 0 and 1: whether the most likely of the 109 nouns is the prompt's."""
    nouns = torch.tensor([scenes.nouns().index(noun_of(prompt)) for prompt in prompts])
    return (logits("noun", images).argmax(1) == nouns).float()


def counts(images):
    """(B,) how many animals the honest counter sees."""
    return logits("counter", images).argmax(1) + 1


def digits(images):
    """(B,) which digit is printed; 0 is none."""
    return logits("digit", images).argmax(1)


def without_corner(images):
    """The pictures with the corner where a counting card has its digit painted over: each in the
    median colour of what borders on it."""
    start = int(scenes.SIZE * scenes.CORNER[0] - 10)
    border = torch.cat([images[..., start - 3:start, start:].flatten(2),
                        images[..., start:, start - 3:start].flatten(2)], 2)
    images = images.clone()
    images[..., start:, start:] = border.median(2).values[..., None, None]
    return images


def of_the_right_number(name, images, prompts):
    """(B,) probability that a classifier gives to the prompt's number. (Not its logarithm, which
    would make the few worst pictures of an epoch most of the advantages.)"""
    numbers = torch.tensor([count_of(prompt) for prompt in prompts])
    return logits(name, images).softmax(1).gather(1, numbers[:, None] - 1)[:, 0]


# Rewards: --reward emoji/classifiers.py:judge_a

def judge_a(images, prompts):
    return of_the_right_number("judge_a", images, prompts)


def judge_b(images, prompts):
    return of_the_right_number("judge_b", images, prompts)


def honest_count(images, prompts):
    return (counts(images) == torch.tensor([count_of(prompt) for prompt in prompts])).float()


if __name__ == "__main__":
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("names", nargs="*", choices=[*CLASSES, "all"], default="all")
    names = parser.parse_args().names
    for name in CLASSES if "all" in names else names:
        if not (FOLDER / f"{name}.safetensors").exists():
            print(f"{name}: {train(name):.3f} right on fresh scenes")
