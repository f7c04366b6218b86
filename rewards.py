"""Rewards: what training makes more of.

A reward takes uint8 pictures (B, 3, H, W) and B prompts. It returns B floats on the CPU. Higher is
better.

    name         what it is                                                   needs
    compress     −kB of the picture as a JPEG of quality 95                   nothing
    incompress   +kB of the same                                              nothing
    clip         cosine of the CLIP embeddings of picture and prompt          models/emoji/clip
    aesthetic    LAION's aesthetic score, about 1 to 10                       CLIP ViT-L/14, a head
    pickscore    PickScore: a CLIP fine-tuned on people's choices             PickScore_v1
    align        BERTScore recall of a VLM's description against the prompt   a VLM, a text encoder
    vqa          a VLM's P("Yes") that the picture shows the prompt           a VLM
    count        share of right answers of a VLM: how many, of what           a VLM

How to write a reward on a command line, and in get_reward:

    compress               a name of the table
    my_file.py:my_reward   a function of yours, my_reward(images, prompts)
    clip=FOLDER_OR_ID      other weights: a folder, or an id on the Hugging Face hub
    align=VLM@ENCODER      two models; @ENCODER alone keeps the default VLM
    compress:0.3,clip:1    a mixture: a weighted sum of components in units of their own std

Without internet access, put a model into models/<last part of its id> beside this file. That folder
is searched first.

A reward cannot change what is trained. It gets copies of the pictures and prompts, and what it
switches in the process (gradient mode, random state, working folder, ...) holds for its own code
alone: see reward_files.py.
"""

import inspect
import io
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from judges import (HERE, answer, bertscore_recall, embed_images, embed_texts, find, generate,
                    load_aesthetic_head, load_clip, load_encoder, load_vlm, to_pil)
from reward_files import Guest, RewardError, checked, load_function, one_line, seed

EMOJI_CLIP = str(HERE / "models" / "emoji" / "clip")
CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_HEAD = "ttj/sac-logos-ava1-l14-linearMSE"  # LAION's .pth of that name as safetensors
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore's own repository has none
VLM = "llava-hf/llava-1.5-7b-hf"
ENCODER = "microsoft/deberta-xlarge-mnli"
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


# JPEG size

def jpeg_kilobytes(images):
    """Size of each picture as a JPEG of quality 95, in kB of 1000 bytes. (B,)"""
    def kilobytes(picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        return file.tell() / 1000

    with ThreadPoolExecutor() as pool:  # Pillow lets go of Python's lock while it encodes
        return torch.tensor(list(pool.map(kilobytes, to_pil(images))))


def compress(device):
    return lambda images, prompts: -jpeg_kilobytes(images)


def incompress(device):
    return lambda images, prompts: jpeg_kilobytes(images)


# CLIP and what is built on it

def clip(device, model=None):
    """The plain cosine, −1 to 1.

    Papers multiply it by 100 or 2.5 (CLIPScore). Advantages do not depend on the factor.
    """
    network = load("clip=", load_clip, model or EMOJI_CLIP, device)

    def reward(images, prompts):
        return (embed_images(network, images) * embed_texts(network, prompts)).sum(1)

    return reward


def aesthetic(device, head=None, clip=None):
    """LAION's predictor: five linear layers on the normalised CLIP image embedding.

    There are no nonlinearities between them.
    """
    layers = load("aesthetic=", load_aesthetic_head, head or AESTHETIC_HEAD, device)
    network = load("aesthetic=@", load_clip, clip or CLIP, device)

    def reward(images, prompts):
        x = embed_images(network, images)  # (B, 768)
        for weight, bias in layers:
            x = F.linear(x, weight, bias)
        return x.squeeze(1)

    return reward


def pickscore(device, model=None, processor=None):
    """exp(logit_scale) · cosine, as its authors report it."""
    processor = load("pickscore=@", find, processor or PICKSCORE_PROCESSOR)
    network = load("pickscore=", load_clip, model or PICKSCORE, device, processor)
    scale = network[0].logit_scale.exp()

    def reward(images, prompts):
        return scale * (embed_images(network, images) * embed_texts(network, prompts)).sum(1)

    return reward


def clip_image_embeddings(images, device=None, model=EMOJI_CLIP):
    """(B, D), L2-normalised, on the CPU.

    For the diversity of a batch: 1 − mean cosine between pictures of a prompt.
    """
    return embed_images(load_clip(model, pick_device(device)), images).cpu()


def clip_top1(images, prompts, candidates, device=None, model=EMOJI_CLIP):
    """Zero-shot recognition: is a picture's prompt the nearest of the candidates?

    (B,) bool, on the CPU.
    """
    embeddings = clip_image_embeddings(images, device, model)
    return embeddings_top1(embeddings, prompts, candidates, device, model)


def embeddings_top1(embeddings, prompts, candidates, device=None, model=EMOJI_CLIP):
    """clip_top1 from the embeddings, (B, D), that clip_image_embeddings made of the pictures."""
    network = load_clip(model, pick_device(device))
    texts = embed_texts(network, candidates)
    nearest = (embeddings.to(texts.device) @ texts.T).argmax(1)
    return torch.tensor([candidates[i] == prompt for i, prompt in zip(nearest.tolist(), prompts)])


# Vision-language models

def align(device, vlm=None, encoder=None):
    """The paper's alignment: BERTScore recall of a VLM's description against the prompt.

    An empty description is worth 0, and reward.log_counts counts them.
    """
    network = load("align=", load_vlm, vlm or VLM, device)
    scorer = load("align=@", load_encoder, encoder or ENCODER, device)

    def reward(images, prompts):
        question = "Answer concisely: what is going on in this image?"
        descriptions = answer(network, images, [question] * len(images))
        reward.log_counts["empty_descriptions"] += descriptions.count("")
        references = [f"The image contains {prompt}" for prompt in prompts]
        return bertscore_recall(scorer, descriptions, references)

    reward.log_counts = {"empty_descriptions": 0}
    return reward


def vqa(device, vlm=None):
    """P("Yes"), over the whole vocabulary. No threshold, so that a small gain counts, too.

    With or without a space before it, in any case: after "Assistant:" SmolVLM says " Yes".
    """
    network = load("vqa=", load_vlm, vlm or VLM, device)
    vocabulary = network[1].tokenizer.get_vocab()
    yes = [i for token, i in vocabulary.items() if token.strip("▁Ġ").lower() == "yes"]
    if not yes:
        raise RewardError(f"reward vqa: {vlm or VLM} has no token for Yes; name another, "
                          "vqa=FOLDER_OR_ID")

    def reward(images, prompts):
        questions = [f"Does this picture show '{prompt}'? Answer Yes or No." for prompt in prompts]
        outputs = generate(network, images, questions, max_new_tokens=1, output_logits=True)
        return torch.cat([output.logits[0].float().softmax(1)[:, yes].sum(1)
                          for output, _ in outputs])

    return reward


def count(device, vlm=None):
    """The paper's counting questions, answers taken at their word: 0, ½ or 1.

    Prompts are a number and a noun in the plural, as in the set `counting`.
    """
    network = load("count=", load_vlm, vlm or VLM, device)
    form = re.compile(rf"({'|'.join(NUMBERS)}) (.+)")

    def reward(images, prompts):
        wanted = [form.fullmatch(prompt.strip().lower()) for prompt in prompts]
        if None in wanted:
            prompt = prompts[wanted.index(None)]
            raise RewardError(f"reward count: prompt {prompt!r} is not a number from zero to "
                              "twelve and a noun, such as 'five wolves'; use the prompts "
                              "`counting`, or write such a file")
        numbers, nouns = zip(*(match.groups() for match in wanted))
        questions = [f"How many {noun} are there in this image?" for noun in nouns]
        how_many = answer(network, images, questions)
        what = answer(network, images, ["What animal is in this image?"] * len(images))
        scores = []
        for said, named, number, noun in zip(how_many, what, numbers, nouns):
            either = {number, str(NUMBERS.index(number))}  # five, 5
            words = re.findall(r"\w+(?:[-.,]\w+)*", said.lower())  # twenty-five and 5,000 are no five
            right_number = not either.isdisjoint(words)
            names = f"{re.escape(noun)}|{re.escape(singular(noun))}"
            right_noun = re.search(rf"\b({names})\b", named.lower()) is not None
            scores.append((right_number + right_noun) / 2)
        return torch.tensor(scores)

    return reward


def singular(noun):
    """wolves -> wolf. Enough for the animals of `counting`, not for English."""
    endings = {"mice": "mouse", "geese": "goose", "lves": "lf", "flies": "fly", "xes": "x", "s": ""}
    for plural, ending in endings.items():
        if noun.endswith(plural):
            return noun.removesuffix(plural) + ending
    return noun


# From a name on the command line to a checked function

REWARDS = {"compress": compress, "incompress": incompress, "clip": clip, "aesthetic": aesthetic,
           "pickscore": pickscore, "align": align, "vqa": vqa, "count": count}


def load(option, loader, model, *arguments):
    """loader(model, *arguments), with whatever it raises turned into one line that says what to do.

    option: how to name another model, such as "align=@".
    """
    try:
        return loader(model, *arguments)
    except Exception as error:  # OSError, ValueError, ImportError, a network library's own, ...
        cure = f"name another, {option}FOLDER_OR_ID"
        if isinstance(error, ImportError):
            cure = "install what it asks for"
        elif model == EMOJI_CLIP:
            cure = "it comes with the repository, and `python emoji/pretrain.py` makes it anew"
        elif not Path(model).exists() and not Path(model).is_absolute():
            place = HERE / "models" / Path(model).name
            cure = (f"where there is internet, `hf download {model} --local-dir {place}`, and "
                    f"bring that folder here; or {cure}")
        raise RewardError(f"reward {option.partition('=')[0]}: cannot load {model} "
                          f"({one_line(error):.200}); {cure}; compress, incompress, clip and "
                          "file.py:function need no download") from error


def parse_reward(spec):
    """{name: weight} of "name", "name:weight" or a mixture "name:weight,name:weight".

    Loads nothing. Raises RewardError, one line.
    """
    weights = {}
    for component in map(str.strip, spec.split(",")):
        name, weight = re.fullmatch(r"(.+?\.py:\w+|[^:]*)(?::(.*))?", component, re.DOTALL).groups("1")
        if ".py:" not in name:
            base, _, models = name.partition("=")
            if base not in REWARDS:
                raise RewardError(f"reward {component!r}: unknown; choose {', '.join(REWARDS)}, or "
                                  "a file.py:function")
            takes = len(inspect.signature(REWARDS[base]).parameters) - 1
            if models and models.count("@") + 1 > takes:
                most = ("no model", "one model", "two models, FIRST@SECOND")[takes]
                raise RewardError(f"reward {name}: {base} takes {most}")
        if name in weights:
            raise RewardError(f"reward {spec}: {name} is there twice")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]) or weights[name] == 0:
            raise RewardError(f"reward {component}: weight {weight!r}; give a number other than 0, "
                              f"as in {name}:0.5")
    return weights


def get_reward(spec, device=None):
    """The checked function reward(images, prompts) -> (B,) for a spec.

    One reward keeps its own scale, times its weight if it has one. A mixture is the weighted sum of
    its components' z-scores within the batch. A loop, which has more than a batch to normalise them
    by, takes them one by one (parse_reward, ddpo.mixed_advantages). A single reward without a
    weight has .log_counts: events for the log that are not errors.
    """
    device = pick_device(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RewardError(f"device {device}: cannot be used here ({one_line(error):.200}); "
                          "choose cpu, or cuda where there is a GPU") from None
    weights, rewards = parse_reward(spec), {}
    for name in weights:
        base, _, models = name.partition("=")
        models = [model or None for model in models.split("@")] if models else []
        if ".py:" in name:
            rewards[name] = checked(*load_function(name))
        else:
            guest = Guest(name)
            with guest.at_work():
                seed(0)
                reward = REWARDS[base](device, *models)
            rewards[name] = checked(reward, guest)

    def mixture(images, prompts):
        # in float64: the float32 mean of equal values may miss them by 1e-7
        total = torch.zeros(len(images), dtype=torch.float64)
        for name, weight in weights.items():
            values = rewards[name](images, prompts).double()
            total += weight * (values - values.mean()) / (values.std(correction=0) + 1e-6)
        return total.float()

    if len(weights) > 1:
        return mixture
    [(name, weight)] = weights.items()
    if weight == 1:
        return rewards[name]
    return lambda images, prompts: weight * rewards[name](images, prompts)


def open_picture(file):
    """(3, H, W) uint8 of a picture file, as a viewer shows it: the right way up, on white where it is
    transparent, 16 bits as 8. Of several frames the first."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode == "F":
        raise ValueError("its pixels are floats, and it does not say which are black and white")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.array(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def pick_device(device):
    return str(device or ("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Score pictures from disk, a line each.")
    parser.add_argument("pictures", nargs="+", help="picture files")
    parser.add_argument("--reward", default="compress",
                        help="as in ddpo.py; a mixture's components are printed one by one")
    parser.add_argument("--prompt", default="", help="what the pictures should show")
    parser.add_argument("--device", help="of the rewards' models (default: cuda, or else cpu)")
    args = parser.parse_args()
    try:
        names = parse_reward(args.reward)
        for name in names:
            blind = name.partition("=")[0] in ("compress", "incompress", "aesthetic") or ".py:" in name
            if not (args.prompt or blind):
                raise ValueError(f"--reward {name}: needs a --prompt, what the pictures should show")
        rewards = {name: get_reward(name, args.device) for name in names}
        for file in args.pictures:
            try:
                picture = open_picture(file)[None]
            except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"{file}: {error}") from None
            scores = [f"{name} {reward(picture, [args.prompt]).item():.4f}"
                      for name, reward in rewards.items()]
            print(*scores, file, sep="  ")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
