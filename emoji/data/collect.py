"""Collects the emoji sprites that the small model is pretrained on: one sheet per drawing style.

    python emoji/data/collect.py        only to rebuild the sheets; needs npm, apt-get, dpkg-deb and
                                        `pip install cairosvg`

Every sheet is a grid of 64x64 RGBA cells, COLUMNS to a row, in the order of `nouns.json`, so a
sheet is both the data and a picture of it. Sources and licences are in emoji/data/README.md. A noun
is the same emoji in all four styles: a face where people know the animal by its face, else a whole
body.
"""

import io
import json
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
SIZE, COLUMNS = 64, 11

ANIMALS = {  # the 45 animals of the DDPO paper's prompts
    "cat": "1f431", "dog": "1f436", "horse": "1f434", "monkey": "1f412", "rabbit": "1f430",
    "zebra": "1f993", "spider": "1f577", "bird": "1f426", "sheep": "1f411", "deer": "1f98c",
    "cow": "1f42e", "goat": "1f410", "lion": "1f981", "tiger": "1f42f", "bear": "1f43b",
    "raccoon": "1f99d", "fox": "1f98a", "wolf": "1f43a", "lizard": "1f98e", "beetle": "1fab2",
    "ant": "1f41c", "butterfly": "1f98b", "fish": "1f420", "shark": "1f988", "whale": "1f433",
    "dolphin": "1f42c", "squirrel": "1f43f", "mouse": "1f42d", "rat": "1f400", "snake": "1f40d",
    "turtle": "1f422", "frog": "1f438", "chicken": "1f414", "duck": "1f986", "goose": "1fabf",
    "bee": "1f41d", "pig": "1f437", "turkey": "1f983", "fly": "1fab0", "llama": "1f999",
    "camel": "1f42b", "bat": "1f987", "gorilla": "1f98d", "hedgehog": "1f994", "kangaroo": "1f998",
}
HELD_OUT_ANIMALS = {  # known to the base model, never in the prompts of reinforcement learning
    "elephant": "1f418", "giraffe": "1f992", "hippopotamus": "1f99b", "rhinoceros": "1f98f",
    "panda": "1f43c", "koala": "1f428", "sloth": "1f9a5", "otter": "1f9a6", "skunk": "1f9a8",
    "badger": "1f9a1", "swan": "1f9a2", "owl": "1f989", "flamingo": "1f9a9", "peacock": "1f99a",
    "parrot": "1f99c", "penguin": "1f427", "octopus": "1f419", "crab": "1f980", "lobster": "1f99e",
    "snail": "1f40c", "crocodile": "1f40a", "dragon": "1f409", "scorpion": "1f982", "seal": "1f9ad",
}
OBJECTS = {
    "car": "1f697", "bus": "1f68c", "train": "1f682", "airplane": "2708", "boat": "26f5",
    "bicycle": "1f6b2", "rocket": "1f680", "house": "1f3e0", "tree": "1f333", "cactus": "1f335",
    "flower": "1f33b", "mushroom": "1f344", "apple": "1f34e", "banana": "1f34c", "pizza": "1f355",
    "burger": "1f354", "cake": "1f382", "ice cream": "1f366", "cup": "2615", "book": "1f4d5",
    "clock": "23f0", "lamp": "1f4a1", "guitar": "1f3b8", "piano": "1f3b9", "drum": "1f941",
    "ball": "26bd", "hat": "1f3a9", "shoe": "1f45f", "umbrella": "2602", "key": "1f511",
    "hammer": "1f528", "robot": "1f916", "ghost": "1f47b", "snowman": "2603", "moon": "1f319",
    "sun": "1f31e", "cloud": "2601", "castle": "1f3f0", "tent": "26fa", "gift": "1f381",
}
NOUNS = {**ANIMALS, **HELD_OUT_ANIMALS, **OBJECTS}


def spellings(code):
    """File names with and without the emoji variation selector; the sets do not agree on it."""
    return [code, f"{code}-fe0f"]


def first_existing(folder, code, suffix):
    for name in spellings(code):
        if (folder / f"{name}{suffix}").exists():
            return folder / f"{name}{suffix}"
    raise FileNotFoundError(f"no {code}{suffix} in {folder}")


def noto(folder):
    font = next(folder.rglob("NotoColorEmoji.ttf"))
    font = ImageFont.truetype(str(font), 109)  # a bitmap font: 109 is the only size it holds

    def draw(code):
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), chr(int(code, 16)), font=font, embedded_color=True)
        return image

    return draw


def twemoji(folder):
    return lambda code: Image.open(first_existing(folder / "package/img/twitter/64", code, ".png"))


def fluent_3d(folder):
    return lambda code: Image.open(first_existing(folder / "package/assets", code, ".webp"))


def fluent_flat(folder):
    import cairosvg

    icons = json.loads((folder / "package/icons.json").read_text())
    slugs = json.loads((folder / "package/chars.json").read_text())

    def draw(code):
        slug = next(slugs[name] for name in spellings(code) if name in slugs)
        while slug in icons.get("aliases", {}):
            slug = icons["aliases"][slug]["parent"]
        body = icons["icons"][slug]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
        png = cairosvg.svg2png(svg.encode(), output_width=256, output_height=256)
        return Image.open(io.BytesIO(png))

    return draw


STYLES = {  # sheet name: how to fetch it, how to draw one emoji from it
    "noto": ("apt-get download fonts-noto-color-emoji", noto),
    "twemoji": ("npm pack --silent emoji-datasource-twitter@16.0.0", twemoji),
    "fluent_3d": ("npm pack --silent @lobehub/fluent-emoji-3d@1.1.0", fluent_3d),
    "fluent_flat": ("npm pack --silent @iconify-json/fluent-emoji-flat@1.2.6", fluent_flat),
}


def fit(image):
    """Crop to what is drawn, then scale the longer side to the cell."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = SIZE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(size, Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (SIZE, SIZE))
    cell.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return cell


def collect():
    groups = {"animals": ANIMALS, "held_out_animals": HELD_OUT_ANIMALS, "objects": OBJECTS}
    names = {group: list(nouns) for group, nouns in groups.items()}
    (HERE / "nouns.json").write_text(json.dumps(names, indent=1))
    for style, (command, reader) in STYLES.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command.split(), cwd=folder, check=True, stdout=subprocess.DEVNULL)
            archive = next(Path(folder).iterdir())
            unpack = ["tar", "xzf", archive, "-C", folder]
            if archive.suffix == ".deb":
                unpack = ["dpkg-deb", "-x", archive, folder]
            subprocess.run(unpack, check=True)
            draw = reader(Path(folder))
            sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(NOUNS) // COLUMNS) * SIZE))
            for index, code in enumerate(NOUNS.values()):
                sheet.paste(fit(draw(code)), (index % COLUMNS * SIZE, index // COLUMNS * SIZE))
        path = HERE / f"{style}.png"
        sheet.save(path, optimize=True)
        print(f"{path.name}  {len(NOUNS)} sprites  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    collect()
