"""The emoji world: pictures with captions, drawn when they are needed. The small model knows
nothing else.

A scene is one emoji in one of four drawing styles, turned, flipped and placed at random, over a
background that may be plain (a small JPEG file) or busy (a large one). In some there is a second,
smaller emoji beside the first; in others one to six small ones, and sometimes a printed digit.

    python emoji/scenes.py        writes scenes.png: a sheet of them with their captions
"""

import functools
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DATA = Path(__file__).parent / "data"
SIZE, COLUMNS = 64, 11  # the cells of the sheets, see emoji/data/collect.py
STYLES = ("noto", "twemoji", "fluent_3d", "fluent_flat")
COLOURS = {
    "white": (245, 245, 245), "black": (30, 30, 34), "gray": (140, 144, 150),
    "red": (214, 60, 60), "orange": (244, 148, 60), "yellow": (248, 216, 88),
    "green": (86, 172, 96), "teal": (64, 172, 172), "blue": (70, 120, 220),
    "purple": (142, 92, 196), "pink": (244, 160, 190), "brown": (140, 98, 68),
}
PATTERNS = {  # name: the word for it in a caption
    "plain": "",
    "gradient": "",
    "stripes": "striped ",
    "checks": "checkered ",
    "dots": "dotted ",
    "noise": "",
    "blobs": "",
}
CORNER = (0.85, 0.85)  # where a counting card has its digit
NUMBERS = "one two three four five six".split()
PLURALS = {
    "mouse": "mice", "goose": "geese", "wolf": "wolves",
    **{noun: noun for noun in ("sheep", "deer", "fish")},
}
GRID_Y, GRID_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@functools.cache
def nouns(group=None):
    """The nouns of one group ("animals", "held_out_animals", "objects"), or all of them in the
    order of the sheets."""
    groups = json.loads((DATA / "nouns.json").read_text())
    return groups[group] if group else [noun for names in groups.values() for noun in names]


def with_article(noun):
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def counted(noun, count):
    """("cat", 3) -> "three cats". Enough for the animals, not for English."""
    hissing = noun.endswith(("s", "x"))
    plural = PLURALS.get(noun, re.sub("ly$", "lie", noun) + ("es" if hissing else "s"))
    return f"{NUMBERS[count - 1]} {noun if count == 1 else plural}"


def load_sprites():
    """noun -> one RGBA picture of 64x64 per style."""
    sprites = {noun: [] for noun in nouns()}
    for style in STYLES:
        sheet = Image.open(DATA / f"{style}.png").convert("RGBA")
        for index, noun in enumerate(sprites):
            x, y = index % COLUMNS * SIZE, index // COLUMNS * SIZE
            sprites[noun].append(sheet.crop((x, y, x + SIZE, y + SIZE)))
    return sprites


def draw_background(rng, pattern, colour):
    """(64, 64, 3) float32. `colour` names the dominant colour; the second one is any other."""
    jitter = rng.uniform(-18, 18, 3)
    first = np.clip(np.array(COLOURS[colour]) + jitter, 0, 255)
    other = str(rng.choice([name for name in COLOURS if name != colour]))
    second = np.array(COLOURS[other], dtype=np.float32)
    if pattern in ("gradient", "blobs"):
        second = (first + second) / 2  # soft, so that the named colour still dominates
    angle = rng.uniform(0, np.pi)
    along = GRID_X * np.cos(angle) + GRID_Y * np.sin(angle)
    across = GRID_Y * np.cos(angle) - GRID_X * np.sin(angle)
    period, phase = rng.uniform(8, 20), rng.uniform(0, 20, 2)
    if pattern == "plain":
        mask = np.zeros_like(GRID_X)
    elif pattern == "gradient":
        mask = (along - along.min()) / (along.max() - along.min())
    elif pattern == "stripes":
        mask = np.clip(np.sin((along + phase[0]) * 2 * np.pi / period) * 3 - 0.6, 0, 1)
    elif pattern == "checks":
        wave_along = np.sin((along + phase[0]) * 2 * np.pi / period)
        wave_across = np.sin((across + phase[1]) * 2 * np.pi / period)
        mask = np.clip(wave_along * wave_across * 5, 0, 1)
    elif pattern == "dots":
        from_dot_along = (along + phase[0]) % period - period / 2
        from_dot_across = (across + phase[1]) % period - period / 2
        distance = np.hypot(from_dot_along, from_dot_across)
        mask = np.clip(0.28 * period - distance + 0.5, 0, 1)
    elif pattern == "noise":
        noise = rng.normal(0, rng.uniform(8, 30), (SIZE, SIZE, 3))
        return np.clip(first + noise, 0, 255).astype(np.float32)
    elif pattern == "blobs":
        centres, radii = rng.uniform(0, SIZE, (2, 4)), rng.uniform(8, 16, 4)
        mask = np.zeros(1)
        for x, y, r in zip(*centres, radii):
            mask = mask + np.exp(-((GRID_X - x) ** 2 + (GRID_Y - y) ** 2) / (2 * r * r))
        mask = np.clip(mask, 0, 1)
    return (first + (second - first) * mask[..., None]).astype(np.float32)


def paste(rng, picture, sprite, scale, centre):
    """Blend one turned, flipped sprite into the picture, in place. `scale`: its size as a share of
    the frame."""
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # premultiplied alpha ("RGBa"): otherwise the colour of transparent pixels bleeds into the edges
    sprite = sprite.convert("RGBa").rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    side = round(scale * SIZE)
    method = Image.Resampling.BOX if side < 40 else Image.Resampling.BICUBIC
    sprite = np.asarray(sprite.resize((side, side), method), np.float32)
    left, top = round(centre[0] * SIZE - side / 2), round(centre[1] * SIZE - side / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, SIZE), min(top + side, SIZE)
    sprite = sprite[y0 - top:y1 - top, x0 - left:x1 - left]
    region = picture[y0:y1, x0:x1]
    region[:] = region * (1 - sprite[..., 3:] / 255) + sprite[..., :3]


def draw_glyph(rng, picture, glyph, centre, colour=None):
    """Print one character, 15 pixels high, in the given colour or in any, with a dark or light rim."""
    fill = COLOURS[colour or str(rng.choice(list(COLOURS)))]
    rim = COLOURS["black" if sum(fill) > 380 else "white"]
    canvas = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(canvas).text(
        (centre[0] * SIZE, centre[1] * SIZE), glyph, fill, ImageFont.load_default(19),
        anchor="mm", stroke_width=1, stroke_fill=rim,
    )
    picture[:] = np.asarray(canvas)


def to_bytes(picture):
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def places(rng, count, scale, corner=False):
    """`count` centres (x, y), as shares of the frame, that are at least `scale` apart, and away from
    the character in the corner if there is one. None if there was no room for them."""
    def distance(a, b):
        return max(abs(a[0] - b[0]), abs(a[1] - b[1]))

    centres = []
    for _ in range(60 * count):
        new = rng.uniform(scale / 2, 1 - scale / 2, 2).tolist()  # few numbers: lists are faster
        apart = all(distance(new, centre) >= scale for centre in centres)
        if apart and not (corner and distance(new, CORNER) < scale / 2 + 0.12):
            centres.append(new)
        if len(centres) == count:
            return centres
    return None


def draw_counted(rng, sprites, noun, count, glyph="", corner=False):
    """One picture with `count` sprites of a noun beside each other, and with a printed character if
    there is a `glyph`: anywhere in any colour, or in white in the `corner`, which is then kept free;
    (64, 64, 3) uint8."""
    colour, style = str(rng.choice(list(COLOURS))), rng.integers(len(STYLES))
    pattern = str(rng.choice(list(PATTERNS), p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]))
    picture = draw_background(rng, pattern, colour)
    scale = rng.uniform(0.9, 1.1) * (0.6, 0.44, 0.38, 0.35, 0.33, 0.31)[count - 1]
    anywhere = bool(glyph) and not corner
    while (centres := places(rng, count + anywhere, scale, corner)) is None:
        scale = 0.97 * scale
    for centre in centres[:count]:
        paste(rng, picture, sprites[noun][style], scale, centre)
    if anywhere:
        draw_glyph(rng, picture, glyph, centres[-1])
    elif glyph:
        draw_glyph(rng, picture, glyph, CORNER, "white")
    return to_bytes(picture)


def draw_cards(count, seed):
    """Counting cards: (count, 64, 64, 3) uint8 pictures of one to six animals, and their captions.
    Half of them have their number printed in the corner, which the caption does not mention."""
    rng, sprites = np.random.default_rng(seed), load_sprites()
    animals = nouns("animals") + nouns("held_out_animals")
    pictures, captions = [], []
    for _ in range(count):
        noun, number = str(rng.choice(animals)), int(rng.integers(1, 7))
        glyph = str(number) if rng.random() < 0.5 else ""
        pictures.append(draw_counted(rng, sprites, noun, number, glyph, corner=True))
        captions.append(counted(noun, number))
    return np.stack(pictures), captions


def draw_scene(rng, sprites, noun=None, kind=None):
    """One picture, (64, 64, 3) uint8, and its caption.

    kind: "alone" ("a cat"), "background" ("a cat on a blue striped background"), "pair" ("a cat
    with a guitar") or "count" ("three cats", three times in ten beside a digit, any from 1 to 6,
    which the caption does not mention); without it, any of them.
    """
    kinds = {"alone": 0.45, "background": 0.18, "pair": 0.2, "count": 0.17}
    kind = kind or str(rng.choice(list(kinds), p=list(kinds.values())))
    animals = nouns("animals") + nouns("held_out_animals")
    noun = noun or str(rng.choice(animals if kind in ("pair", "count") else nouns()))
    if kind == "count":
        count, digit = rng.integers(1, 7, 2)
        glyph = str(digit) if rng.random() < 0.3 else ""
        return draw_counted(rng, sprites, noun, count, glyph), counted(noun, count)
    colour = str(rng.choice(list(COLOURS)))
    # half of the backgrounds are quiet
    pattern = str(rng.choice(list(PATTERNS), p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]))
    picture = draw_background(rng, pattern, colour)
    style = rng.integers(len(STYLES))
    sprite, caption = sprites[noun][style], with_article(noun)
    if kind == "pair":
        thing = str(rng.choice(nouns("objects")))
        side = rng.choice([-1, 1])  # the animal on one side, the thing low on the other
        scale, height = rng.uniform(0.6, 0.7), rng.uniform(0.4, 0.5)
        paste(rng, picture, sprite, scale, (0.5 - side * 0.17, height))
        scale, height = rng.uniform(0.4, 0.48), rng.uniform(0.66, 0.74)
        paste(rng, picture, sprites[thing][style], scale, (0.5 + side * 0.25, height))
        caption = f"{caption} with {with_article(thing)}"
    else:
        scale = rng.uniform(0.65, 0.95)
        slack = (1 - scale) / 2
        paste(rng, picture, sprite, scale, rng.uniform(0.5 - slack, 0.5 + slack, 2))
        if kind == "background":
            caption = f"{caption} on {with_article(colour)} {PATTERNS[pattern]}background"
    return to_bytes(picture), caption


def draw_scenes(count, seed, **kwargs):
    """`count` pictures, (count, 64, 64, 3) uint8, and their captions: the same for each seed."""
    rng, sprites = np.random.default_rng(seed), load_sprites()
    pictures, captions = zip(*(draw_scene(rng, sprites, **kwargs) for _ in range(count)))
    return np.stack(pictures), list(captions)


if __name__ == "__main__":
    pictures, captions = draw_scenes(96, seed=0)
    rows = [np.concatenate(list(pictures[i:i + 12]), axis=1) for i in range(0, 96, 12)]
    Image.fromarray(np.concatenate(rows)).save("scenes.png")
    print("scenes.png:", "; ".join(captions[:12]))
