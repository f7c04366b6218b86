"""Random pipelines of the real classes, small enough for a test: SDXL, SD3 with and without T5,
FLUX.1."""

from pathlib import Path

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline,
                       FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config,
                          T5EncoderModel, T5TokenizerFast)

ROOT = Path(__file__).parents[1]
WORDS = "a cat fox panda dog horse in on the".split()


def clip(tokenizer, model=CLIPTextModelWithProjection):
    return model(CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def t5():
    pieces = [(piece, -1.0) for piece in ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS)]]
    words = Tokenizer(models.Unigram(pieces, unk_id=2))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = T5TokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                unk_token="<unk>", extra_ids=0, model_max_length=16)
    config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                      feed_forward_proj="gated-gelu")
    return tokenizer, T5EncoderModel(config)


def vae(channels, **settings):
    return AutoencoderKL(block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
                         up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=channels,
                         norm_num_groups=4, **settings)


def sdxl(**settings):
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), use_linear_projection=True, cross_attention_dim=32, norm_num_groups=4,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionXLPipeline(vae(4, scaling_factor=0.13), clip(tokenizer, CLIPTextModel),
                                     clip(tokenizer), tokenizer, tokenizer, unet, scheduler,
                                     add_watermarker=False, **settings)


def sd3(with_t5=True):
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/tokenizer")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8, qk_norm="rms_norm")
    tokenizer_3, text_encoder_3 = t5() if with_t5 else (None, None)
    decoder = vae(16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), decoder, clip(tokenizer),
        tokenizer, clip(tokenizer), tokenizer, text_encoder_3, tokenizer_3)


def flux(guidance_embeds=True):
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/tokenizer")
    tokenizer_2, text_encoder_2 = t5()
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5,
                                                max_shift=1.15)
    return FluxPipeline(scheduler, vae(16, scaling_factor=0.36, shift_factor=0.12),
                        clip(tokenizer, CLIPTextModel), tokenizer, text_encoder_2, tokenizer_2, transformer)


BUILD = {"sdxl": sdxl, "sd3": sd3, "sd3-without-t5": lambda: sd3(False), "flux": flux}


def save_family(folder, family):
    torch.manual_seed(0)
    pipeline = BUILD[family]()
    for module in (pipeline.vae, pipeline.unet if family == "sdxl" else pipeline.transformer):
        for p in module.parameters():  # no layer that starts at 0, as some do
            if p.abs().max() == 0:
                torch.nn.init.normal_(p, std=0.02)
    pipeline.save_pretrained(folder)
    return str(folder)
