"""Sampling as a policy: a stochastic DDIM sampler that remembers every step it took and how likely that step was.

    python sample.py --prompt "a cat" --prompt "a fox"                    pictures of the shipped model
    python sample.py --prompt "a cat" --lora runs/compress                before and after fine-tuning, same seeds

Denoising trajectories x_T, ..., x_0. Seen from x_t, the next latents are drawn from a Gaussian whose mean the network sets and
whose width σ the scheduler sets: an action with an exact likelihood, which is all that a policy gradient asks for.

    ε̂  = ε_u + w (ε_c − ε_u)                                        classifier-free guidance
    σ  = η sqrt((1−ᾱ')/(1−ᾱ) · (1 − ᾱ/ᾱ'))                          DDIM, Eq. 16 (Song et al. 2020)
    μ  = sqrt(ᾱ') (x − sqrt(1−ᾱ) ε̂)/sqrt(ᾱ) + sqrt(1−ᾱ'−σ²) ε̂      DDIM, Eq. 12
    x' ~ N(μ, σ²)

μ is affine in x and in the network's output, whatever the network predicts. So four numbers a step are the whole
scheduler: c_x, c_o, σ, log σ. `ddim_table` computes them once; `ddim_step` needs nothing else, and neither do the kernels.
"""

import contextlib
import itertools
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # both libraries remark on what is fine here, torchvision's absence
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # for one; set them to "warning" to hear it

warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # diffusers 0.42 calls it dtype, releases before do not know that

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils.torch_utils import randn_tensor

from kernels.ddim_step import fused_ddim_step
from run_folder import picture_grid

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # of loading; our own bars come later and say more
HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Trajectories:
    """What a batch of samples did. Step t went from latents[:, t] to latents[:, t + 1], with log-density log_probs[:, t]."""

    latents: torch.Tensor  # (B, T+1, C, H, W) float32, from pure noise to x_0
    log_probs: torch.Tensor  # (B, T) float32, mean over C, H, W; 0 where a step had no noise
    timesteps: torch.Tensor  # (T,) int64, descending
    images: torch.Tensor  # (B, 3, height, width) uint8
    prompts: list


def default_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_pipeline(model="models/emoji", device=None, dtype=None, lora=None, lora_scale=1.0):
    """A StableDiffusionPipeline from a folder in diffusers' layout or a hub id, with the scheduler this repo samples with.

    lora: a run's folder: its adapter (pytorch_lora_weights.safetensors), or its whole fine-tuned unet/.
    lora_scale: the strength of what was trained, adapter or whole UNet: 0 (the base model) to 1 (as trained).
    dtype: of the UNet and the text encoder; the VAE stays in float32, because bfloat16 cannot tell 256 levels apart.
    Raises ValueError, one line, if something cannot be loaded or is not a Stable Diffusion of the first generations.
    """
    try:
        device, dtype = torch.device(device or default_device()), dtype or torch.float32
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used here ({first_line(error)}); choose cpu, or cuda where there is a GPU") from error
    source = model if Path(model).exists() or not (HERE / model).exists() else str(HERE / model)  # models/emoji from anywhere
    if Path(source).exists() and not (Path(source) / "model_index.json").exists():
        raise ValueError(f"--model {model}: no model_index.json in it; give a folder in diffusers' layout, or a hub id")
    default = torch.get_default_dtype()
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(source, torch_dtype={"default": dtype, "vae": torch.float32},
                                                           safety_checker=None, requires_safety_checker=False)
    except Exception as error:  # the hub and the loaders raise many kinds; all of them mean the same to the user
        torch.set_default_dtype(default)  # a loader that fails half-way leaves its own
        raise ValueError(f"--model {model}: cannot be loaded as a StableDiffusionPipeline ({first_line(error)}); give a folder in "
                         "diffusers' layout or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5") from error
    if pipeline.unet.config.addition_embed_type or pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise ValueError(f"--model {model}: not a text-to-image Stable Diffusion 1 or 2 (its UNet asks for more than latents, a "
                         "timestep and a prompt); give one such as stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipeline.scheduler = ddim_scheduler(pipeline.scheduler)
    if lora is not None:
        load_tuned(pipeline, Path(lora), lora_scale, dtype)
    if device.type == "cuda":
        pipeline.unet.to(memory_format=torch.channels_last)  # how tensor cores want a convolution's input
    if device.type == "cpu":
        # On a CPU the backward of scaled_dot_product_attention is 16 times slower in bf16 than in fp32; plain matrix
        # products are not, and at these sizes nothing is lost by them.
        pipeline.unet.set_attn_processor(AttnProcessor())
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        module.requires_grad_(False).eval()
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_emoji(model):
    """Whether a folder is the shipped model, however its path is written."""
    return Path(model).name == "emoji"


def load_tuned(pipeline, folder, scale, dtype):
    """Put a run's weights into the pipeline: its whole unet/, or its adapter."""
    try:
        if (folder / "unet").exists():
            tuned = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
            for parameter, base in zip(tuned.parameters(), pipeline.unet.parameters(), strict=True):
                parameter.data = torch.lerp(base.data, parameter.data, scale)
            pipeline.unet = tuned
        elif (folder / "pytorch_lora_weights.safetensors").exists():
            pipeline.load_lora_weights(str(folder), adapter_name="tuned")
            pipeline.set_adapters(["tuned"], [scale])
        else:
            raise ValueError("no pytorch_lora_weights.safetensors and no unet/ in it")
    except Exception as error:  # as above
        raise ValueError(f"--lora {folder}: cannot be loaded ({first_line(error)}); give the folder of a run of this model") from error


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def latents_shape(pipeline):
    """(C, H, W) of the latents that the UNet was trained on."""
    size = pipeline.unet.config.sample_size
    return (pipeline.unet.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))


def ddim_scheduler(scheduler):
    """DDIM with the noise schedule of any diffusers scheduler. Raises ValueError if its steps would not be affine."""
    config = dict(scheduler.config)
    for option in ("clip_sample", "thresholding"):
        if config.get(option, False):
            raise ValueError(f"scheduler: {option}=True bends the step, which is then no Gaussian around an affine mean; "
                             f"set {option} to false in scheduler/scheduler_config.json")
        config[option] = False  # DDIMScheduler's own default for clip_sample is True
    return DDIMScheduler.from_config(config)


def step_etas(steps, eta=1.0, window=""):
    """(T,) the eta of each step: within the window "first:end" of steps that are actions eta, 0 outside it; without one, eta."""
    first, end = map(int, window.split(":")) if window else (0, steps)
    step = torch.arange(steps)
    return torch.where((step >= first) & (step < end), eta, 0.0)


def ddim_table(scheduler, num_steps, eta=1.0):
    """(timesteps (T,) int64, table (T, 4) float32): per step c_x, c_o, σ, log σ, so that μ = c_x x + c_o output.

    eta: one for all steps, or one for each, (T,). Where σ = 0 (all steps at eta 0; the last one of a scheduler with set_alpha_to_one)
    log σ is -inf: a deterministic step.
    Raises ValueError for steps the schedule does not have, an eta outside [0, 1], a step that is not affine, or a schedule under which
    x_0 cannot be told.
    """
    scheduler = ddim_scheduler(scheduler)  # a copy: set_timesteps leaves marks
    total, kind = scheduler.config.num_train_timesteps, scheduler.config.prediction_type
    if not 1 <= num_steps <= total:
        raise ValueError(f"--steps {num_steps}: the schedule has {total}; choose 1 to {total}")
    eta = torch.as_tensor(eta, dtype=torch.float64)
    if not ((eta >= 0) & (eta <= 1)).all():
        raise ValueError(f"--eta {eta.tolist()}: must lie between 0 (deterministic) and 1 (as noisy as DDPM)")
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.cpu()
    if timesteps.max() >= total:
        raise ValueError(f"--steps {num_steps}: with the scheduler's steps_offset the first step would be {timesteps.max()}, past its "
                         f"{total}; choose {total // 2} or fewer")
    previous = timesteps - total // num_steps

    alpha_bar = scheduler.alphas_cumprod.double()
    a = alpha_bar[timesteps]  # ᾱ
    a_prev = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double())  # ᾱ'
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()  # Eq. 16
    direction = (1 - a_prev - sigma**2).clamp(min=0).sqrt()

    # x̂_0 and ε̂, each as (factor of x, factor of the network's output)
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    if kind == "epsilon":
        clean, noise = (1 / a.sqrt(), -(1 - a).sqrt() / a.sqrt()), (zero, one)
    elif kind == "v_prediction":
        clean, noise = (a.sqrt(), -(1 - a).sqrt()), ((1 - a).sqrt(), a.sqrt())
    elif kind == "sample":
        clean, noise = (zero, one), (1 / (1 - a).sqrt(), -a.sqrt() / (1 - a).sqrt())
    else:
        raise ValueError(f"scheduler: prediction_type {kind!r} is unknown; use epsilon, v_prediction or sample")
    c_x, c_o = (a_prev.sqrt() * clean[i] + direction * noise[i] for i in (0, 1))  # Eq. 12
    table = torch.stack([c_x, c_o, sigma, sigma.log()], dim=1).float()
    if not table[:, :3].isfinite().all():
        raise ValueError(f"scheduler: with prediction_type {kind!r} its schedule ends in pure noise, where x_0 cannot be told; such a "
                         "schedule (rescale_betas_zero_snr) needs v_prediction")
    return timesteps, table


def ddim_step(output, latents, coefficients, next_latents=None, generator=None, guidance_scale=None, noise=None):
    """One stochastic DDIM step (Eq. 12), and the log-density of the step taken: (next_latents, log_prob (B,)).

    Draws the next latents when they are not given, scores them when they are: one function for rollout and update, so
    that the two agree to the last bit. The latents are rounded to the dtype they are stored in *before* they are scored.

    output: what the network predicted, (B, C, H, W); with a guidance_scale (2B, C, H, W), unconditional half first.
    coefficients: a row of `ddim_table`, (4,), or one for each sample, (B, 4), on the latents' device.
    noise: normals like the latents; without it they are drawn from generator: one, or a list of one for each sample.
    log_prob is a mean over C, H, W, and 0 where σ is 0.
    """
    if next_latents is None and noise is None:
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=torch.float32)
    if next_latents is not None:
        next_latents = next_latents.contiguous()
    next_latents, log_prob = fused_ddim_step(output.contiguous(), latents.contiguous(), coefficients, guidance_scale, noise=noise,
                                             next_latents=next_latents)
    return next_latents, torch.where(coefficients[..., 2] > 0, log_prob, 0.0)


def signal_and_noise(scheduler, timesteps):
    """(α, s), each (B, 1, 1, 1), of x_t = α x_0 + s ε: √ᾱ and √(1−ᾱ), or 1 − t and t of flow models."""
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_bar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    sigma = timesteps.view(-1, 1, 1, 1) / scheduler.config.num_train_timesteps  # shifted as in sampling
    return 1 - sigma, sigma


def noised(scheduler, clean, noise, timesteps):
    """(x_t, the network's target, |∂x̂_0 / ∂output| (B,)). clean: x_0, (B, C, H, W); timesteps: (B,)."""
    signal, sigma = signal_and_noise(scheduler, timesteps)
    kind = getattr(scheduler.config, "prediction_type", "flow")  # flow schedulers have but one
    target, slope = {"epsilon": (noise, sigma / signal),
                     "v_prediction": (signal * noise - sigma * clean, sigma),
                     "sample": (clean, torch.ones_like(sigma)),
                     "flow": (noise - clean, sigma / (signal + sigma))}[kind]
    return signal * clean + sigma * noise, target, slope.flatten()


def autocast(device, dtype):
    """bf16 and fp16 mean mixed precision: weights may be float32, matrix products are not."""
    device = torch.device(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def predict(unet, latents, timesteps, prompt_embeds, negative_embeds=None, dtype=torch.float32):
    """The network's output (B, C, H, W), or, with negative_embeds, (2B, C, H, W): unconditional half first, in one pass.

    timesteps: (B,). prompt_embeds: (B, L, E). negative_embeds: (1, L, E), of the empty prompt.
    """
    if negative_embeds is not None:
        latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        prompt_embeds = torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])
    with autocast(latents.device, dtype):
        return unet(latents.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype)).sample.contiguous()


@torch.no_grad()
def encode_prompts(pipeline, prompts, cache=None):
    """(B, L, E) embeddings, on the UNet's device. cache: a dict that remembers them, {prompt: (L, E)}.

    Each different prompt is encoded once and alone, so that its embedding does not depend on its company. The text encoder works
    wherever it is: it may stay on the CPU.
    """
    cache = {} if cache is None else cache
    for prompt in prompts:
        if prompt not in cache:
            embeds = pipeline.encode_prompt(prompt, pipeline.text_encoder.device, 1, False)[0][0]
            cache[prompt] = embeds.to(pipeline.unet.device)
    return torch.stack([cache[prompt] for prompt in prompts])


@torch.no_grad()
def decode(pipeline, latents, batch_size=8):
    """(B, C, H, W) latents -> (B, 3, height, width) uint8, in slices, because a decoder's activations are large.

    A VAE that waits on the CPU is brought to the latents for the time that this takes.
    """
    vae, home = pipeline.vae, pipeline.vae.device
    vae.to(latents.device)
    images = []
    for part in latents.split(batch_size):
        pixels = vae.decode(part.to(vae.dtype) / vae.config.scaling_factor).sample
        images.append(((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte())
    vae.to(home)
    return torch.cat(images)


@torch.no_grad()
def sample_trajectories(pipeline, prompts, num_steps=50, guidance_scale=5.0, eta=1.0, generator=None, dtype=None,
                        on_step=None, cache=None, step=None):
    """Sample one picture a prompt and keep the whole trajectory. guidance_scale <= 1 means no guidance (and half the work).

    generator: a torch.Generator, or one for each prompt (then a picture does not depend on its batch).
    eta: one for all steps, or one for each. dtype: what the UNet computes in, by autocast (default: that of its weights); the trajectory
    itself is float32. on_step: called after each step, for a progress bar. cache: see encode_prompts.
    step: what takes a step (default: `guided_step`; or a `GraphedStep`, which launches faster).
    """
    unet, device = pipeline.unet, pipeline.unet.device
    timesteps, table = ddim_table(pipeline.scheduler, num_steps, eta)
    table = table.to(device)  # all that a step needs of the scheduler: no gather on the CPU, no wait for the GPU
    guided = guidance_scale is not None and guidance_scale > 1
    prompt_embeds = encode_prompts(pipeline, prompts, cache)
    negative_embeds = encode_prompts(pipeline, [""], cache) if guided else None

    shape = (len(prompts), *latents_shape(pipeline))
    latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    trajectory, log_probs = [latents], []
    for t, coefficients in zip(timesteps.to(device), table):
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents, log_prob = (step or guided_step)(unet, latents, t.expand(len(prompts)), coefficients, noise, prompt_embeds, negative_embeds,
                                                  guidance_scale if guided else None, dtype or unet.dtype)
        trajectory.append(latents)
        log_probs.append(log_prob)
        if on_step:
            on_step()
    return Trajectories(torch.stack(trajectory, 1), torch.stack(log_probs, 1), timesteps, decode(pipeline, latents), list(prompts))


def guided_step(unet, latents, timesteps, coefficients, noise, prompt_embeds, negative_embeds, guidance_scale, dtype):
    """Predict, guide, step, score: (next_latents, log_prob (B,)). Nothing in it waits for the GPU."""
    output = predict(unet, latents, timesteps, prompt_embeds, negative_embeds, dtype)
    return ddim_step(output, latents, coefficients, guidance_scale=guidance_scale, noise=noise)


class GraphedStep:
    """guided_step as one CUDA graph: a launch for the whole UNet and the step instead of one for each of its operations.

    A graph replays on fixed addresses: inputs are copied into those that it was captured with, weights are read where they
    are (so they may be trained in between, but not replaced), and a batch of another size has a graph of its own.
    """

    def __init__(self):
        self.graphs = {}

    def __call__(self, unet, latents, timesteps, coefficients, noise, prompt_embeds, negative_embeds, guidance_scale, dtype):
        inputs = [latents, timesteps, coefficients, noise, prompt_embeds, negative_embeds]
        key = (latents.shape, prompt_embeds.shape, guidance_scale, dtype)
        if key not in self.graphs:
            fixed = [value if value is None else value.clone() for value in inputs]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries choose and compile their kernels in the first calls
                for _ in range(3):
                    guided_step(unet, *fixed, guidance_scale, dtype)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = guided_step(unet, *fixed, guidance_scale, dtype)
            self.graphs[key] = graph, fixed, outputs
        graph, fixed, outputs = self.graphs[key]
        for place, value in zip(fixed, inputs):
            if value is not None:
                place.copy_(value)
        graph.replay()
        return tuple(value.clone() for value in outputs)


def main(arguments=None):
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", help='may be repeated (default: "a cat", "a fox", "a butterfly", "a panda")')
    parser.add_argument("--lora", help="a run's folder: the base model's pictures and, below, the tuned one's, as the run drew them")
    parser.add_argument("--model", help="a pipeline folder in diffusers' layout, or a hub id (default: the run's, or models/emoji)")
    parser.add_argument("--lora-scale", type=float, nargs="+", default=[1.0],
                        help="strengths of what was trained, 0 to 1; several: one below the other")
    parser.add_argument("--images", type=int, default=4, help="pictures a prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the run's, or 10 for the emoji model, 50 otherwise)")
    parser.add_argument("--guidance-scale", type=float, help="1 for none (default: the run's, or 4)")
    parser.add_argument("--eta", type=float, help="0: deterministic, 1: as noisy as DDPM (default: the run's, or 1)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--out", default="samples.png")
    parser.error = lambda message: parser.exit(2, f"{message}\n")
    args = parser.parse_args(arguments)
    prompts = args.prompt or ["a cat", "a fox", "a butterfly", "a panda"]
    try:
        if args.images < 1:
            raise ValueError(f"--images {args.images}: must be at least 1")
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed {args.seed}: must be at least 0 and below 2**63")
        if not Path(args.out).parent.is_dir() or Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"--out {args.out}: must be a .png, .jpg or .webp file in a folder that exists")
        folder = Path(args.lora or "")
        settings = (folder.parent if folder.name == "last" else folder) / "config.json"  # of the run
        run = json.loads(settings.read_text()) if args.lora and settings.exists() else {}
        model = args.model or run.get("model", "models/emoji")
        steps = args.steps if args.steps is not None else run.get("steps", 10 if is_emoji(model) else 50)
        guidance_scale = args.guidance_scale if args.guidance_scale is not None else run.get("guidance_scale", 4.0)
        eta = args.eta if args.eta is not None else run.get("eta", 1.0)
        if args.eta is None and run.get("window") and steps == run["steps"]:
            eta = step_etas(steps, eta, run["window"])
        models = {"base": load_pipeline(model, args.device, DTYPES[args.dtype])}
        for scale in args.lora_scale if args.lora else []:
            label = "tuned" if len(args.lora_scale) == 1 else f"strength {scale:g}"
            models[label] = load_pipeline(model, args.device, DTYPES[args.dtype], args.lora, scale)
        ddim_table(models["base"].scheduler, steps, eta)
    except ValueError as error:
        parser.exit(2, f"{error}\n")

    from tqdm import tqdm

    rows = {}
    with tqdm(total=len(prompts) * len(models) * steps, desc="sampling") as bar:
        for prompt, (name, pipeline) in itertools.product(prompts, models.items()):
            generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.images)]  # the same noise down a column
            rows[f"{name}: {prompt}" if args.lora else prompt] = sample_trajectories(
                pipeline, [prompt] * args.images, steps, guidance_scale, eta, generators, on_step=bar.update).images
    picture_grid([*rows.values()], [*rows], [f"seed {args.seed + i}" for i in range(args.images)]).save(args.out)
    print(f"{args.out}: {len(prompts)} prompts, seeds {args.seed} to {args.seed + args.images - 1}")


if __name__ == "__main__":
    main()
