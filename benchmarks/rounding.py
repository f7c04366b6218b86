"""How far rounding alone moves the importance ratio ρ, in each precision.

    python benchmarks/rounding.py                  the emoji model's UNet on latents of Stable
                                                   Diffusion's size
    python benchmarks/rounding.py --model MODEL    a model of your own, on its latents

This is why fp16, and not bf16, is the default on a GPU. At each of 20 timesteps a step is
drawn, then scored again after every weight has changed by a ten-millionth of itself. Such a change
means nothing, so ρ − 1 is then due to activations that were rounded differently. PPO's clip should
not react to it, but it removes the gradient of each pair with a negative advantage whose ρ has fallen
below 1 − 1e-4. On a CPU without instructions for a precision most of the time goes into its emulation. The
record is written to benchmarks/rounding.json.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the scripts' folder, in place of this one

from benchmarks.epoch import check_out, command_line, machine, markdown, print_tables, record_as
from sample import DTYPES, ddim_step, ddim_table, encode_prompts, latents_shape
from sample import load_pipeline, predict

CLIP_RANGE, STEPS, GUIDANCE_SCALE, CHANGE = 1e-4, 20, 5.0, 1e-7
SIDE = 48  # of the emoji model's latents, which then have about as many numbers as 4 x 64 x 64


@torch.no_grad()
def ratios(pipeline, shape, dtype, steps):
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


def table(record):
    """The Markdown table of a record."""
    rows = [["", f"steps outside 1 ± {CLIP_RANGE:g}", "below it", "\\|ρ − 1\\|, median", "at most"]]
    for dtype in DTYPES:
        if found := record.get(dtype):
            outside = found["outside"], found["below"]
            away = found["median"], found["max"]
            rows.append([dtype, *(f"{x:.0%}" for x in outside), *(f"{x:.1e}" for x in away)])
    return markdown(rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder in diffusers' layout, or a hub id "
                                        "(default: models/emoji, on larger latents)")
    parser.add_argument("--dtype", action="append", choices=DTYPES,
                        help="only this one; may be repeated")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/rounding.json"),
                        help="where the record is put (default: benchmarks/rounding.json)")
    parser.add_argument("--table", action="store_true", help="only print what --out holds")
    args = parser.parse_args(arguments)
    check_out(parser, args.out, partial=not args.table and bool(args.dtype))
    if args.table:
        print_tables(args.out, table)
        return
    torch.manual_seed(0)
    pipeline = load_pipeline(args.model or str(ROOT / "models/emoji"), dtype=torch.float32)
    shape = latents_shape(pipeline)
    if not args.model:
        shape = shape[0], SIDE, SIDE
    record = machine() | {
        "command": command_line("benchmarks/rounding.py", arguments),
        "latents": list(shape),
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "clip_range": CLIP_RANGE,
    }
    for dtype in args.dtype or DTYPES:
        # else fp32's convolutions would not be fp32; without enabled=True they would not be cuDNN's
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            away = ratios(pipeline, shape, DTYPES[dtype], STEPS)
        found = record[dtype] = {
            "outside": (away.abs() > CLIP_RANGE).double().mean().item(),
            "below": (away < -CLIP_RANGE).double().mean().item(),
            "median": away.abs().median().item(),
            "max": away.abs().max().item(),
            "ratios_minus_1": away.tolist(),
        }
    record_as(args.out, f"{args.model or 'models/emoji'}, {record['device']}", record)
    print(table(record))


if __name__ == "__main__":
    main()
