"""Where an epoch's time goes, and what makes it shorter: the UNet's passes that sampling and updating consist of.

    python benchmarks/epoch.py                     prints a table, writes benchmarks/epoch.json (two minutes on two cores)

Variants take turns, round after round, and each is compared with fp32 in the same round, so that a busy machine slows all of
them alike. A sampling pass is one guided step of a batch without gradients; an update pass is the same with LoRA gradients.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the scripts' folder, in place of this one

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from ddpo import Config, make_trainable
from sample import encode_prompts, load_pipeline, predict

VARIANTS = {  # name: (dtype, attention)
    "fp32, scaled_dot_product_attention": (torch.float32, AttnProcessor2_0),
    "bf16, scaled_dot_product_attention": (torch.bfloat16, AttnProcessor2_0),
    "fp32, plain matrix products": (torch.float32, AttnProcessor),
    "bf16, plain matrix products": (torch.bfloat16, AttnProcessor),  # what sample.load_pipeline chooses on a CPU
}


def passes(pipeline, config, dtype):
    """Seconds of one sampling pass and of one update pass."""
    latents = torch.randn(config.sample_batch, 4, 16, 16, device=pipeline.device)
    timesteps = torch.randint(0, 1000, (config.sample_batch,), device=pipeline.device)
    embeds, negative = encode_prompts(pipeline, ["a cat"] * config.sample_batch), encode_prompts(pipeline, [""])
    seconds = []
    for grad in (False, True):
        clock = time.perf_counter()
        with torch.set_grad_enabled(grad):
            output = predict(pipeline.unet, latents, timesteps, embeds, negative, dtype)
            if grad:
                output.float().square().mean().backward()
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - clock)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/epoch.json"))
    args = parser.parse_args()
    config = Config()
    pipeline = load_pipeline(config.model)
    make_trainable(pipeline.unet, config)
    times = {name: [] for name in VARIANTS}
    for round_ in range(args.rounds + 1):
        for name, (dtype, attention) in VARIANTS.items():
            pipeline.unet.set_attn_processor(attention())
            seconds = passes(pipeline, config, dtype)
            if round_:  # the first round warms up
                times[name].append(seconds)
    reference, rows = times[next(iter(VARIANTS))], {}
    for name, measured in times.items():
        ratios = [[ref[i] / own[i] for ref, own in zip(reference, measured)] for i in (0, 1)]
        rows[name] = {key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                      for key, values in zip(("sampling", "update"), ratios)}
    record = {"command": "python benchmarks/epoch.py", "device": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "batch": config.sample_batch, "rounds": args.rounds, "speed_relative_to_fp32": rows}
    if pipeline.device.type == "cuda":
        record["device"] = torch.cuda.get_device_name()
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    print("| UNet in | sampling | update |\n| --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[key]['median']:.2f}x ({row[key]['min']:.2f} to {row[key]['max']:.2f})" for key in row) + " |")


if __name__ == "__main__":
    main()
