"""Pretrains the small emoji model: a StableDiffusionPipeline, only tiny.

    python emoji/pretrain.py                       everything, some six hours on two cores
    python emoji/pretrain.py --unet-steps 30000    longer, where there is a GPU
    python emoji/pretrain.py --only flow           that stage alone, from the model in --out
    python emoji/pretrain.py --only cards          the same, for a stage that is not part of everything

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

import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts' folder

from sample import load_pipeline  # first: it quiets the libraries

from emoji import scenes
from emoji.classifiers import recognised
from emoji.clip import build_tokenizer, fake, train_clip
from emoji.diffusion import build_scheduler, export, train_unet, train_vae
from emoji.trainer import draw, of_animals, rounded_mean, to_bytes, to_pixels
from emoji.variants import export_variant, flow_scheduler, report_flow, train_cards, train_flow
from processes import RunStopped
from rewards import clip_top1, jpeg_kilobytes
from run_folder import picture_grid
from settings import flags_given, refuse


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
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and field.name != "seed" and not 1 <= value < 2**31:
            refuse(config, field.name, "must be at least 1 and below 2**31")
        if field.name.endswith("_lr") and not 0 < value < 1:
            refuse(config, field.name, "must be above 0 and below 1")
    for setting in ("out", "work", "flow_out", "cards_out"):
        path = Path(getattr(config, setting))
        if path == Path() or any(map(Path.is_file, (path, *path.parents))):
            refuse(config, setting, "must be a folder, and neither a file nor in one")
    if not 0 <= config.seed < 2**32:
        refuse(config, "seed", "must be at least 0 and below 2**32")
    if not 0 <= config.caption_dropout <= 1:
        refuse(config, "caption_dropout", "must be 0 to 1")
    for setting in ("ema", "flow_ema", "cards_ema"):
        if not 0 <= getattr(config, setting) < 1:
            refuse(config, setting, "must be at least 0 and below 1")
    if config.only not in ("", "flow", "cards"):
        refuse(config, "only", "only the stages flow and cards can run alone")
    if config.start and not (Path(config.start) / "model_index.json").exists():
        refuse(config, "start", "has no model (model_index.json)")
    folders = Path(config.out), ROOT / config.out
    if config.only and not any((folder / "model_index.json").exists() for folder in folders):
        refuse(config, "out", f"has no model for the stage {config.only}; leave out --only, which makes it")
    return config


@torch.no_grad()
def report(folder, images_per_noun=16, scene_count=1000):
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

    nouns = [scenes.with_article(noun) for noun in scenes.nouns()]
    clip = str(Path(folder) / "clip")
    grey = images.float().mean(1, keepdim=True).round().byte().expand(-1, 3, -1, -1)
    figures = {
        "vae_psnr": round(-10 * math.log10(error / 4), 2),
        "clip_fresh_scenes": rounded_mean(clip_top1(images, captions, nouns, model=clip)),
        "clip_grey_scenes": rounded_mean(clip_top1(grey, captions, nouns, model=clip)),
        "clip_fakes": rounded_mean(clip_top1(to_bytes(fake(pixels)).cpu(), captions, nouns, model=clip)),
        "classifier_fresh_scenes": rounded_mean(recognised(images, captions)),
        "classifier_scenes_through_the_vae": rounded_mean(recognised(to_bytes(decoded).cpu(), captions)),
    }
    prompts = nouns * images_per_noun
    for guidance_scale in (3.0, 4.0, 5.0):
        images = draw(pipeline, prompts, 10, guidance_scale, f"guidance {guidance_scale:g}")
        judged = {
            "clip": clip_top1(images, prompts, nouns, model=clip),
            "classifier": recognised(images, prompts),
        }
        for judge, right in judged.items():
            name = f"{judge}_generated_guidance_{guidance_scale:g}"
            figures[name] = rounded_mean(right)
            figures[f"{name}_animals"] = rounded_mean(of_animals(right, images_per_noun))
        if guidance_scale == 4.0:
            figures["jpeg_kilobytes_generated"] = rounded_mean(jpeg_kilobytes(images))
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
    given = flags_given(arguments, Config, __doc__)
    try:
        return check(Config(**given))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def remake(config):
    """All stages that are not done yet, and the exported models."""
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


if __name__ == "__main__":
    config = parse_config()
    try:
        remake(config)
    except (RunStopped, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
