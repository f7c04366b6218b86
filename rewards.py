"""Rewards: what training makes more of. A reward takes uint8 pictures (B, 3, H, W) and B prompts and returns B floats on the
CPU; higher is better.

    name         what it is                                                            needs
    compress     −kB of the picture as a JPEG of quality 95                            nothing
    incompress   +kB
    clip         cosine of the picture's and the prompt's CLIP embeddings              the CLIP in models/emoji/clip
    aesthetic    LAION's aesthetic score, about 1 to 10                                CLIP ViT-L/14, a small head
    pickscore    PickScore: a CLIP fine-tuned on people's choices between pictures     PickScore_v1
    align        BERTScore recall of a VLM's description against the prompt            a VLM, a text encoder
    vqa          a VLM's P("Yes") that the picture shows the prompt                    a VLM
    count        share of right answers of a VLM: how many, of what ("five wolves")    a VLM

How to write a reward on a command line, and in get_reward:

    compress                      a name of the table
    my_file.py:my_reward          a function of yours, my_reward(images, prompts)
    clip=openai/clip-vit-large-patch14     other weights: a folder, or an id on the Hugging Face hub
    align=VLM@ENCODER             two models; @ENCODER alone keeps the default VLM
    compress:0.3,clip:1           a mixture: each part in units of its own standard deviation, times its weight

Where there is no network, put a model into models/<last part of its id> beside this file: it is looked for there first.
"""

import importlib.util
import inspect
import io
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from judges import (HERE, answer, bertscore_recall, embed_images, embed_texts, find, generate, load_aesthetic_head, load_clip, load_encoder,
                    load_vlm, to_pil)

EMOJI_CLIP = str(HERE / "models" / "emoji" / "clip")
CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_HEAD = "ttj/sac-logos-ava1-l14-linearMSE"  # LAION's sac+logos+ava1-l14-linearMSE.pth as safetensors
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore's own repository has none
VLM = "llava-hf/llava-1.5-7b-hf"
ENCODER = "microsoft/deberta-xlarge-mnli"
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


class RewardError(ValueError):
    """A reward that cannot be loaded, or whose values cannot be used. index, prompt and image (3, H, W) are those of the
    picture at fault, or None."""

    def __init__(self, message, index=None, prompt=None, image=None):
        super().__init__(message)
        self.index, self.prompt, self.image = index, prompt, image


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
    """The plain cosine, −1 to 1. (CLIPScore papers multiply it by 100 or 2.5; advantages do not see the difference.)"""
    network = load("clip=", load_clip, model or EMOJI_CLIP, device)
    return lambda images, prompts: (embed_images(network, images) * embed_texts(network, prompts)).sum(1)


def aesthetic(device, head=None, clip=None):
    """LAION's predictor: five linear layers, nothing between them, on the normalised CLIP image embedding."""
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
    return lambda images, prompts: scale * (embed_images(network, images) * embed_texts(network, prompts)).sum(1)


def clip_image_embeddings(images, device=None, model=EMOJI_CLIP):
    """(B, D), L2-normalised, on the CPU: for the diversity of a batch, 1 − mean cosine between pictures of a prompt."""
    return embed_images(load_clip(model, pick_device(device)), images).cpu()


def clip_top1(images, prompts, candidates, device=None, model=EMOJI_CLIP):
    """Zero-shot recognition: is the prompt nearer to its picture than every other of the candidates? (B,) bool, on the CPU"""
    network = load_clip(model, pick_device(device))
    nearest = (embed_images(network, images) @ embed_texts(network, candidates).T).argmax(1)
    return torch.tensor([candidates[i] == prompt for i, prompt in zip(nearest.tolist(), prompts)])


# Vision-language models

def align(device, vlm=None, encoder=None):
    """The paper's alignment: a VLM describes the picture; BERTScore recall of the description against the prompt. An empty
    description is worth 0, and reward.counts counts them."""
    network = load("align=", load_vlm, vlm or VLM, device)
    scorer = load("align=@", load_encoder, encoder or ENCODER, device)

    def reward(images, prompts):
        descriptions = answer(network, images, ["Answer concisely: what is going on in this image?"] * len(images))
        reward.counts["empty_descriptions"] += descriptions.count("")
        return bertscore_recall(scorer, descriptions, [f"The image contains {prompt}" for prompt in prompts])

    reward.counts = {"empty_descriptions": 0}
    return reward


def vqa(device, vlm=None):
    """P("Yes"), over the whole vocabulary: no threshold, so that even a small gain counts."""
    network = load("vqa=", load_vlm, vlm or VLM, device)
    yes = network[1].tokenizer("Yes", add_special_tokens=False).input_ids[0]

    def reward(images, prompts):
        questions = [f"Does this picture show '{prompt}'? Answer Yes or No." for prompt in prompts]
        outputs = generate(network, images, questions, max_new_tokens=1, output_logits=True)
        return torch.cat([output.logits[0].float().softmax(1)[:, yes] for output, _ in outputs])

    return reward


def count(device, vlm=None):
    """The paper's counting questions, answers taken at their word: 0, ½ or 1. Prompts are a number and a noun in the plural,
    as in the set `counting`."""
    network = load("count=", load_vlm, vlm or VLM, device)

    def reward(images, prompts):
        wanted = [re.fullmatch(rf"({'|'.join(NUMBERS)}) (.+)", prompt.strip().lower()) for prompt in prompts]
        if None in wanted:
            raise RewardError(f"reward count: prompt {prompts[wanted.index(None)]!r} is not a number from zero to twelve and a "
                              "noun, such as 'five wolves'; use the prompts `counting`, or write such a file")
        numbers, nouns = zip(*(match.groups() for match in wanted))
        how_many = answer(network, images, [f"How many {noun} are there in this image?" for noun in nouns])
        what = answer(network, images, ["What animal is in this image?"] * len(images))
        scores = []
        for said, named, number, noun in zip(how_many, what, numbers, nouns):
            right_number = not {number, str(NUMBERS.index(number))}.isdisjoint(re.findall(r"\w+", said.lower()))
            right_noun = re.search(rf"\b({re.escape(noun)}|{re.escape(singular(noun))})\b", named.lower()) is not None
            scores.append((right_number + right_noun) / 2)
        return torch.tensor(scores)

    return reward


def singular(noun):
    """wolves -> wolf. Enough for the animals of `counting`, not for English."""
    for plural, ending in ("mice", "mouse"), ("geese", "goose"), ("lves", "lf"), ("flies", "fly"), ("xes", "x"), ("s", ""):
        if noun.endswith(plural):
            return noun.removesuffix(plural) + ending
    return noun


# Loading

def load(option, loader, model, *arguments):
    """loader(model, *arguments), with whatever it raises turned into one line that says what to do. option: how to name
    another model, such as "align=@"."""
    try:
        return loader(model, *arguments)
    except Exception as error:  # OSError, ValueError, ImportError, SafetensorError, a network library's own, ...
        cure = f"name another, {option}FOLDER_OR_ID"
        if isinstance(error, ImportError):
            cure = "install what it asks for"
        elif model == EMOJI_CLIP:
            cure = "it comes with the repository, and `python emoji/pretrain.py` makes it anew"
        elif not Path(model).exists() and not Path(model).is_absolute():
            place = HERE / "models" / Path(model).name
            cure = f"where there is a network, `hf download {model} --local-dir {place}`, and bring that folder here; or {cure}"
        raise RewardError(f"reward {option.partition('=')[0]}: cannot load {model} ({one_line(error):.200}); {cure}; "
                          "compress, incompress, clip and file.py:function need no download") from error


def load_function(spec):
    """The reward function of "path/my_file.py:my_reward"."""
    file, _, function = spec.rpartition(":")
    if not Path(file).is_file():
        raise RewardError(f"reward {spec}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward {spec}: {file} cannot be imported ({one_line(error)})") from error
    reward = getattr(module, function, None)
    if not callable(reward):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise RewardError(f"reward {spec}: {file} has no function {function}; it has {', '.join(own) or 'none'}")
    try:
        inspect.signature(reward).bind("images", "prompts")
    except TypeError:
        raise RewardError(f"reward {spec}: {function}{inspect.signature(reward)} in {file} must take "
                          "(images, prompts)") from None
    return reward


# From a name on the command line to a checked function

REWARDS = {"compress": compress, "incompress": incompress, "clip": clip, "aesthetic": aesthetic, "pickscore": pickscore,
           "align": align, "vqa": vqa, "count": count}


def parse_reward(spec):
    """{name: weight} of "name", "name:weight" or a mixture "name:weight,name:weight". Loads nothing; raises RewardError."""
    weights = {}
    for part in map(str.strip, spec.split(",")):
        name, weight = re.fullmatch(r"(.+?\.py:\w+|[^:]*)(?::(.*))?", part).groups(default="1")
        if ".py:" not in name:
            base, _, models = name.partition("=")
            if base not in REWARDS:
                raise RewardError(f"reward {part!r}: unknown; choose {', '.join(REWARDS)}, or a file.py:function")
            takes = len(inspect.signature(REWARDS[base]).parameters) - 1
            if models and models.count("@") + 1 > takes:
                raise RewardError(f"reward {name}: {base} takes {('no model', 'one model', 'two models, FIRST@SECOND')[takes]}")
        if name in weights:
            raise RewardError(f"reward {spec}: {name} is there twice")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]) or weights[name] == 0:
            raise RewardError(f"reward {part}: weight {weight!r}; give a number other than 0, as in {name}:0.5")
    return weights


def get_reward(spec, device=None):
    """The checked function reward(images, prompts) -> (B,) for a spec. One reward keeps its own scale, times its weight if it
    has one. A mixture is the weighted sum of its parts' z-scores within the batch; parse_reward gives the parts to whoever
    keeps better statistics. Of a single reward without a weight, .counts holds what happened and was no error, for the log."""
    device = pick_device(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RewardError(f"device {device}: cannot be used here ({one_line(error):.200}); choose cpu, or cuda where there is a GPU") from None
    weights, rewards = parse_reward(spec), {}
    for name in weights:
        base, _, models = name.partition("=")
        models = [model or None for model in models.split("@")] if models else []
        rewards[name] = checked(name, load_function(name) if ".py:" in name else REWARDS[base](device, *models))

    def mixture(images, prompts):
        total = torch.zeros(len(images), dtype=torch.float64)  # in float32 the mean of equal values may miss them by 1e-7
        for name, weight in weights.items():
            values = rewards[name](images, prompts).double()
            total += weight * (values - values.mean()) / (values.std(correction=0) + 1e-6)
        return total.float()

    if len(weights) > 1:
        return mixture
    [(name, weight)] = weights.items()
    return rewards[name] if weight == 1 else lambda images, prompts: weight * rewards[name](images, prompts)


def checked(name, reward):
    """reward, with what goes in and what comes out looked at, and with the picture that made it fail in the error."""
    def call(images, prompts):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(prompts) != len(images):
            raise ValueError(f"reward {name}: takes uint8 images (B, 3, H, W) and B prompts, not {images.dtype} "
                             f"{tuple(images.shape)} and {len(prompts)} prompts")
        try:
            values = reward(images, prompts)
        except RewardError:
            raise
        except Exception as error:
            raise find_culprit(name, reward, images, prompts, error) from error
        return check_rewards(name, values, images, prompts)

    call.counts = getattr(reward, "counts", {})
    return call


def find_culprit(name, reward, images, prompts, error):
    """The RewardError for an exception: asks for the pictures one by one, to name the first that raises alone."""
    for i, prompt in enumerate(prompts):
        try:
            reward(images[i : i + 1], [prompt])
        except Exception as alone:
            message = f"reward {name}: raised {one_line(alone)}, for image {i}, {prompt!r}"
            return RewardError(message, i, prompt, images[i])
    return RewardError(f"reward {name}: raised {one_line(error)}, for the batch, but for no image alone")


def check_rewards(name, values, images, prompts):
    """values as a float32 tensor (B,) on the CPU. Raises RewardError for anything but one finite number an image."""
    try:
        values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise RewardError(f"reward {name}: returned {type(values).__name__} {values!r:.80}; return one number an image, "
                          f"{len(images)} in all") from None
    if values.shape != (len(images),):
        raise RewardError(f"reward {name}: returned shape {tuple(values.shape)} for {len(images)} images; return one number an "
                          f"image, shape ({len(images)},)")
    for i in (~values.isfinite()).nonzero().flatten().tolist():
        raise RewardError(f"reward {name}: returned {values[i].item()} for image {i}, {prompts[i]!r}", i, prompts[i], images[i])
    return values


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def pick_device(device):
    return str(device or ("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    import argparse

    import numpy as np

    parser = argparse.ArgumentParser(description="Score pictures from disk, a line each.")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--reward", default="compress", help="as in ddpo.py; a mixture's parts are printed one by one")
    parser.add_argument("--prompt", default="", help="what the pictures should show")
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    try:
        rewards = {name: get_reward(name, args.device) for name in parse_reward(args.reward)}
        for file in args.pictures:
            picture = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]  # (1, 3, H, W)
            scores = [f"{name} {reward(picture, [args.prompt]).item():.4f}" for name, reward in rewards.items()]
            print(*scores, file, sep="  ")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")
