"""The loop that all stages of pretraining share, and the few things that each of them needs."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import models
from emoji import scenes
from processes import RunStopped
from run_folder import write_whole
from sample import sample_trajectories


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype():
    """bfloat16 also on a GPU: in float16 small gradients would be lost, since no loss is scaled here."""
    return torch.float32 if models.default_dtype(device()) == "fp32" else torch.bfloat16


def autocast():
    return models.autocast(device(), dtype())


def to_pixels(pictures):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1], on the device, as the VAE and the CLIP
    here take them."""
    pictures = torch.as_tensor(pictures).permute(0, 3, 1, 2)
    pictures = pictures.to(device(), memory_format=torch.channels_last)
    return pictures.float() / 127.5 - 1


def to_bytes(pixels):
    """The way back: float (B, 3, H, W) in [-1, 1] -> uint8."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def save_sheet(pixels, path, columns=12):
    """Float (B, 3, H, W) in [-1, 1] -> a grid on disk."""
    pictures = to_bytes(pixels).permute(0, 2, 3, 1).cpu().numpy()
    starts = range(0, len(pictures), columns)
    rows = [np.concatenate(list(pictures[i:i + columns]), axis=1) for i in starts]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape])).save(path)


def draw(pipeline, prompts, steps, guidance_scale, label, eta=1.0, sampler="ddim"):
    """A picture of each prompt, (B, 3, H, W) uint8 on the CPU; its seed is its place. label: of the
    progress bar."""
    images = []
    for i in tqdm(range(0, len(prompts), 64), desc=label):
        batch = prompts[i:i + 64]
        seeds = range(i, i + len(batch))
        generators = [torch.Generator(pipeline.device).manual_seed(seed) for seed in seeds]
        images.append(sample_trajectories(
            pipeline, batch, steps, guidance_scale, eta, generators, dtype(), sampler=sampler
        ).images.cpu())
    return torch.cat(images)


def rounded_mean(values):
    """A mean, rounded to what a thousand pictures can tell."""
    return round(values.float().mean().item(), 4)


def of_animals(values, images_per_noun):
    """The values of the animals' pictures, of one for each picture of `scenes.nouns() * images_per_noun`,
    of which the animals are the first."""
    animals = len(scenes.nouns("animals")) + len(scenes.nouns("held_out_animals"))
    return values.view(images_per_noun, -1)[:, :animals]


# What a stage reads besides the seed and the settings of its own name
SHARED = {"clip": {"start"}, "vae": {"start"}, "unet": {"start", "caption_dropout"}, "judge": {"clip_scenes"},
          "decoder": {"vae_scenes"}, "flow": {"caption_dropout"}, "cards": {"caption_dropout"}}


def settings_of(name, config):
    """The settings that a stage's weights follow from, except the number of its updates, as a dict."""
    own = {key for key in vars(config)
           if key.startswith(f"{name}_") and not key.endswith(("_steps", "_out"))}
    keys = own | SHARED[name] | {"seed"} | ({"ema"} if f"{name}_ema" not in own else set())
    return {key: getattr(config, key) for key in sorted(keys)}


def load_stage(name, config):
    """The stage's checkpoint in --work, or None. Raises RunStopped, one line, for one of other settings."""
    path = Path(config.work) / f"{name}.pt"
    if not path.exists():
        return None
    saved = torch.load(path, map_location=device(), weights_only=True)
    for key, value in settings_of(name, config).items():
        before = saved.get("settings", {}).get(key, value)
        if before != value:
            raise RunStopped(f"--{key.replace('_', '-')} {value}: {path} was made with {before}; give that, "
                             "or another --work")
    return saved


def finished(name, config, model):
    """Load the stage's averaged weights into the model, if the stage has run to its end."""
    saved = load_stage(name, config)
    if saved is None or saved["step"] < getattr(config, f"{name}_steps"):
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
    if saved := load_stage(name, config):
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
            state |= {"optimizer": optimizer.state_dict(), "settings": settings_of(name, config)}
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
