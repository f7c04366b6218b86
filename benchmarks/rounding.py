"""How far rounding alone moves the importance ratio ρ, in each precision.

    python benchmarks/rounding.py                  the emoji model's UNet on latents of Stable
                                                   Diffusion's size
    python benchmarks/rounding.py --model MODEL    a model of your own, on its latents

This is why Stable Diffusion trains in fp16 here, and not in bf16. At each of 20 steps a step is
drawn, then scored again after every weight has changed by a ten-millionth of itself. Such a change
means nothing, so ρ − 1 is then due to activations that were rounded differently. PPO's clip should
not react to it, but it takes the gradient of each pair with a negative advantage whose ρ has fallen
below 1 − 1e-4. On a CPU nearly all of the eight minutes go into fp16, which is emulated there. The
record is written to benchmarks/rounding.json.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the scripts' folder, in place of this one

from benchmarks.epoch import command_line, machine, record_as
from sample import DTYPES, ddim_step, ddim_table, encode_prompts, latents_shape
from sample import load_pipeline, predict

CLIP_RANGE, STEPS, GUIDANCE_SCALE, CHANGE = 1e-4, 20, 5.0, 1e-7


@torch.no_grad()
def ratios(pipeline, shape, dtype, steps=STEPS):
    """(steps,) ρ − 1 of each step of one trajectory of "a cat" in this precision, after a tiny
    random change of the weights."""
    unet, device = pipeline.unet, pipeline.device
    timesteps, table = ddim_table(pipeline.scheduler, steps)
    inputs = encode_prompts(pipeline, ["a cat"]), encode_prompts(pipeline, [""])
    noise = torch.Generator(device).manual_seed(0)
    latents = torch.randn(1, *shape, generator=noise, device=device)
    weights = [p.clone() for p in unet.parameters()]
    away = []
    for timestep, coefficients in zip(timesteps.to(device), table.to(device)):
        output = predict(unet, latents, timestep.expand(1), *inputs, dtype)
        next_latents, old_log_prob = ddim_step(
            output, latents, coefficients, generator=noise, guidance_scale=GUIDANCE_SCALE
        )
        for p in unet.parameters():
            p.mul_(1 + CHANGE * torch.randn_like(p))
        output = predict(unet, latents, timestep.expand(1), *inputs, dtype)
        _, log_prob = ddim_step(
            output, latents, coefficients, next_latents, guidance_scale=GUIDANCE_SCALE
        )
        for p, weight in zip(unet.parameters(), weights):
            p.copy_(weight)
        away.append(torch.expm1((log_prob - old_log_prob).double()))
        latents = next_latents
    return torch.cat(away).cpu()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder in diffusers' layout, or a hub id "
                                        "(default: models/emoji on 4x64x64 latents)")
    parser.add_argument("--dtype", action="append", choices=DTYPES,
                        help="only this one; may be repeated")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/rounding.json"),
                        help="where the record is put (default: benchmarks/rounding.json)")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    pipeline = load_pipeline(args.model or str(ROOT / "models/emoji"), dtype=torch.float32)
    shape = latents_shape(pipeline) if args.model else (4, 64, 64)
    record = machine() | {
        "command": command_line("benchmarks/rounding.py", arguments),
        "latents": list(shape),
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "clip_range": CLIP_RANGE,
    }
    for dtype in args.dtype or DTYPES:
        away = ratios(pipeline, shape, DTYPES[dtype])
        found = record[dtype] = {
            "outside": (away.abs() > CLIP_RANGE).double().mean().item(),
            "below": (away < -CLIP_RANGE).double().mean().item(),
            "median": away.abs().median().item(),
            "max": away.abs().max().item(),
            "ratios_minus_1": away.tolist(),
        }
        outside = f"{found['outside']:.0%} of steps outside 1 ± {CLIP_RANGE:g}"
        print(f"{dtype}: {outside}, {found['below']:.0%} below; |ρ − 1| {found['median']:.1e} in "
              f"the median, {found['max']:.1e} at most", flush=True)
    record_as(args.out, f"{args.model or 'models/emoji'}, {record['device']}", record)


if __name__ == "__main__":
    main()
