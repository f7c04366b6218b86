"""A model of Stable Diffusion 1.5's shape with random weights, for measuring without a hub:

    python benchmarks/sd15.py runs/sd15-random         a StableDiffusionPipeline folder of 2.1 GB

Every layer has the size and type that it has in SD 1.5, so it costs the same time and memory; its
pictures are grey. Prompts are cut into the emoji model's tokens, padded to SD's 77.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

UNET = dict(
    sample_size=64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
    block_out_channels=(320, 640, 1280, 1280),
)
VAE = dict(
    sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    latent_channels=4, scaling_factor=0.18215,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)
TEXT = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
    num_attention_heads=12, projection_dim=768, max_position_embeddings=77, hidden_act="quick_gelu",
    bos_token_id=2016, eos_token_id=2017, pad_token_id=2017,
)
SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    set_alpha_to_one=False, clip_sample=False,
)


def build(folder, unet=UNET, vae=VAE, text=TEXT):
    """Write the folder, in float16, unless it is there already. Returns its path."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = Path(folder)
    if (folder / "model_index.json").exists():  # written last
        return folder
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(ROOT / "models/emoji/tokenizer", scratch / "words")
    file = scratch / "words/tokenizer_config.json"
    length = {"model_max_length": text["max_position_embeddings"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | length))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a billion random numbers
        networks = dict(
            unet=UNet2DConditionModel(**unet),
            vae=AutoencoderKL(**vae),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        )
    pipeline = StableDiffusionPipeline(
        **{name: network.half() for name, network in networks.items()},
        scheduler=DDIMScheduler(**SCHEDULER),
        tokenizer=CLIPTokenizer.from_pretrained(scratch / "words"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.save_pretrained(scratch)
    del networks, pipeline
    torch.cuda.empty_cache()  # whoever called this will measure others' memory
    shutil.rmtree(scratch / "words")
    scratch.rename(folder)
    return folder


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder, whose kernels.py is another
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default=ROOT / "runs/sd15-random")
    print(build(parser.parse_args().folder))
