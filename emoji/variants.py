"""What is made from the exported model: a flow-matching model, and one that prints digits."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from emoji import scenes
from emoji.classifiers import count_of, digits, honest_count, recognised
from emoji.diffusion import build_unet, encode_captions, encode_pictures, noise_loss
from emoji.trainer import (autocast, device, draw, dtype, finished, of_animals, rounded_mean, save_sheet,
                           train)
from rewards import clip_top1, jpeg_kilobytes
from sample import ETAS, load_pipeline, sample_trajectories

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


def report_flow(config, steps=10, guidance_scale=4.0, images_per_noun=8):
    """How good the flow model is beside its teacher, with each sampler: `figures.json`.

    Judged by the teacher's CLIP and by the independent classifier, on pictures of each noun with the
    same seeds for both; "_animals": of the animals alone.
    """
    prompts = [scenes.with_article(noun) for noun in scenes.nouns()] * images_per_noun
    nouns = prompts[:len(scenes.nouns())]
    figures = {"steps": steps, "guidance_scale": guidance_scale, "images_per_noun": images_per_noun}
    for name, folder in (("flow", config.flow_out), ("teacher", config.out)):
        pipeline = load_pipeline(folder)
        for sampler, eta in (("ode", 0.0), *ETAS.items()):
            images = draw(pipeline, prompts, steps, guidance_scale, f"{name} {sampler}", eta,
                          "ddim" if sampler == "ode" else sampler)
            seen = recognised(images, prompts)
            right = clip_top1(images, prompts, nouns, model=str(Path(config.out) / "clip"))
            figures[f"{name}_{sampler}_clip_top1"] = rounded_mean(right)
            figures[f"{name}_{sampler}_classifier"] = rounded_mean(seen)
            figures[f"{name}_{sampler}_classifier_animals"] = rounded_mean(of_animals(seen, images_per_noun))
            figures[f"{name}_{sampler}_jpeg_kilobytes"] = rounded_mean(jpeg_kilobytes(images))
    size = sum(path.stat().st_size for path in Path(config.flow_out).rglob("*.safetensors"))
    figures["weights_megabytes"] = size / 1e6
    (Path(config.flow_out) / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def train_cards(config):
    """Stage "cards": the exported UNet learns to draw counting cards, half of which have their number
    printed. In the other stages' scenes a digit may be any one, and so few scenes have one that the
    UNet prints none. A policy gradient can only strengthen what is sampled now and then."""
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
            pipeline, samples, 10, 4.0, generator=generators, dtype=dtype()
        ).images
        save_sheet(images.float() / 127.5 - 1, Path(config.work) / "cards.png")
        printed = digits(images)
        right = printed == torch.tensor([count_of(prompt) for prompt in samples])
        shares = (printed > 0), right, honest_count(images, samples)
        return "digits {:.2f}, right {:.2f}, counted {:.2f}".format(
            *(share.float().mean() for share in shares))

    return train("cards", config, unet, loss_fn, evaluate)


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
