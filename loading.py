"""Loading a model, and what was trained of it, from a folder in diffusers' layout or a hub id.

Nothing in a folder runs: it names its classes, and only those of the families in models.py are
taken. What is missing, does not fit together or would be ignored in silence is refused in one line.
"""

import inspect
import json
import os
import re
from pathlib import Path

from models import (condition, ddim_scheduler, denoiser, first_line, kind_of, latents_shape,
                    main_tokenizer, network_channels, network_name, predict, prediction_kind,
                    set_resolution, text_encoders)  # first: it quiets the libraries

import diffusers
import torch
import transformers
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file

from judges import check_layers, check_vocabulary

HERE = Path(__file__).parent

NETWORKS = {
    "StableDiffusionPipeline": UNet2DConditionModel, "StableDiffusionXLPipeline": UNet2DConditionModel,
    "StableDiffusion3Pipeline": SD3Transformer2DModel, "FluxPipeline": FluxTransformer2DModel}
CLASSES = {  # that a folder may name for a component: nothing in these runs code from the folder
    "vae": "AutoencoderKL|AutoencoderTiny", "scheduler": r"\w+Scheduler",
    "tokenizer": "CLIPTokenizer|CLIPTokenizerFast|T5Tokenizer|T5TokenizerFast",
    "text_encoder": "CLIPTextModel|CLIPTextModelWithProjection|T5EncoderModel",
    "unet": "UNet2DConditionModel", "transformer": "SD3Transformer2DModel|FluxTransformer2DModel"}
OPTIONAL = {"text_encoder_3", "tokenizer_3"}  # SD3's T5: without it CLIP alone reads the prompts
UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}  # not loaded
FURTHER_INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim",
                  "encoder_hid_dim_type")  # of UNets: distilled guidance, class labels, image prompts


def default_device():
    """Never mps, which only --device chooses: nothing here has run on it, and its attention takes
    another kernel without gradients, so that the ratio would not start at exactly 1."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device):
    """torch.device(device). Raises ValueError, one line, for one that cannot be used on this machine."""
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("of another type")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used here ({first_line(error)}); choose cpu, "
                         "or cuda where there is a GPU") from error
    return torch.device(device)


def locate(model):
    """The folder of a model: as given, or below this file (models/emoji from anywhere); or the hub
    id as it is."""
    return str(model) if Path(model).exists() or not (HERE / model).exists() else str(HERE / model)


SHIPPED = "emoji", "emoji-flow"


def is_emoji(model):
    """Whether it is one of the shipped models, however its path is written; a user's own folder of
    that name is not."""
    folder, shipped = Path(locate(model)), [HERE / "models" / name for name in SHIPPED]
    return folder.exists() and any(path.exists() and folder.samefile(path) for path in shipped)


def load_pipeline(model="models/emoji", device=None, dtype=None, lora=None, lora_scale=1.0,
                  resolution=0):
    """A diffusers pipeline of one of the families in models.py, with the scheduler that this project
    samples with.

    model: a folder in diffusers' layout, or a hub id.
    dtype: of the network and the text encoders; the VAE stays in float32: SDXL's overflows in
    float16, and bfloat16 rounds pixel values by a level or more.
    lora: a run's folder: its adapter (pytorch_lora_weights.safetensors), or its whole fine-tuned
    unet/ or transformer/.
    lora_scale: the strength of what was trained: 0 (the base model) to 1 (as trained).
    resolution: pixels of a side; 0: what the model was trained on.
    Raises ValueError, one line, if something is missing, does not fit together, or is of another
    family.
    """
    device, dtype = usable_device(device or default_device()), dtype or torch.float32
    source = locate(model)
    if not Path(source).exists() and source.startswith((".", os.sep, "~")):
        raise ValueError(f"--model {model}: there is no such folder")
    if source.endswith((".safetensors", ".ckpt")) and not Path(source).is_dir():
        raise ValueError(f"--model {model}: a single file; make a folder of it, such as by diffusers' "
                         "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)")
    if Path(source).exists() and not (Path(source) / "model_index.json").exists():
        raise ValueError(f"--model {model}: no model_index.json in it; give a folder in diffusers' "
                         "layout, or a hub id")
    default = torch.get_default_dtype()
    try:
        if not Path(source).exists():
            source = download(source)
        pipeline = load_components(Path(source), dtype)
        check_network(pipeline)
    except Exception as error:  # the hub and the loaders raise many kinds, which all mean the same
        torch.set_default_dtype(default)  # a loader that fails half-way leaves its own
        raise ValueError(f"--model {model}: cannot be loaded ({first_line(error)}); give a folder in "
                         "diffusers' layout or a hub id such as "
                         "stable-diffusion-v1-5/stable-diffusion-v1-5") from error
    pipeline.scheduler = ddim_scheduler(pipeline.scheduler)
    tokenizer, options = main_tokenizer(pipeline), inspect.signature(pipeline.encode_prompt).parameters
    if "max_sequence_length" in options and not isinstance(tokenizer, transformers.CLIPTokenizer):
        # what the pipeline hands to T5, whatever the tokenizer's own configuration says
        tokenizer.model_max_length = options["max_sequence_length"].default
    if lora is not None:
        load_tuned(pipeline, Path(lora), lora_scale, dtype)
    network = denoiser(pipeline)
    set_resolution(pipeline, model, resolution)
    if isinstance(network, UNet2DConditionModel) and device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # how tensor cores want a convolution's input
    if isinstance(network, UNet2DConditionModel) and device.type == "cpu":
        # On a CPU the backward of scaled_dot_product_attention is 16 times slower in bf16 than in
        # fp32; plain matrix products are not, and at these sizes nothing is lost by them.
        network.set_attn_processor(AttnProcessor())
    for module in (network, *text_encoders(pipeline), pipeline.vae):
        module.requires_grad_(False).eval()
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    try_out(pipeline, f"{model} --lora {lora}" if lora else model, dtype)
    return pipeline


def download(model):
    """The folder of a hub id: its plain weights, or those in fp16 where a part has no others."""
    absent = dict.fromkeys(UNUSED)
    for variant in (None, "fp16"):
        folder = Path(diffusers.DiffusionPipeline.download(model, variant=variant, **absent))
        if all(variants(config.parent) for config in folder.glob("*/config.json")):
            break
    return folder


def load_components(folder, dtype):
    """The pipeline that model_index.json names, put together from classes of diffusers and
    transformers alone. Releases of diffusers before 0.38 run Python files of a folder whose index
    names them; here a folder with one is refused, and that loader is not called."""
    index = json.loads((folder / "model_index.json").read_text())
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise ValueError(f"a {first_line(kind)}, of none of the families that work: "
                         f"{', '.join(NETWORKS)}")
    scripts = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    if scripts:
        raise ValueError(f"a model needs no Python file, and {scripts[0]} is one; look at what it "
                         "does, and remove it")
    pipeline_class = getattr(diffusers, kind)
    components = {}
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if name == "self" or name in UNUSED or parameter.default is not inspect.Parameter.empty:
            continue
        entry = index.get(name) or [None, None]
        if entry == [None, None] and name in OPTIONAL:
            components[name] = None
            continue
        allowed = CLASSES[re.sub(r"_\d$", "", name)]
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
                and entry[0] in ("diffusers", "transformers") and re.fullmatch(allowed, entry[1])):
            raise ValueError(f"its {name} is {entry}, not one of {allowed.replace('|', ', ')}")
        library = diffusers if entry[0] == "diffusers" else transformers
        components[name] = load_component(folder / name, getattr(library, entry[1]), dtype)
    if not isinstance(components.get("unet", components.get("transformer")), NETWORKS[kind]):
        raise ValueError(f"its network is not the {NETWORKS[kind].__name__} of a {kind}")
    options = {"requires_safety_checker": False} if kind == "StableDiffusionPipeline" else {}
    if kind == "StableDiffusionXLPipeline":
        zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    unused = inspect.signature(pipeline_class.__init__).parameters.keys() & UNUSED
    return pipeline_class(**components, **dict.fromkeys(unused), **options)


def load_component(folder, component_class, dtype):
    """A tokenizer, a scheduler, or a network that has all its weights: loaders fill gaps with
    random numbers."""
    if not folder.is_dir():
        without = ("; to do without T5, make text_encoder_3 and tokenizer_3 [null, null] in its "
                   "model_index.json") if folder.name in OPTIONAL else ""
        raise ValueError(f"its folder {folder.name}/ is missing{without}")
    if not issubclass(component_class, torch.nn.Module):
        component = component_class.from_pretrained(folder)
        if folder.name.startswith("tokenizer"):
            check_vocabulary(component, folder.name)
        if component_class.__name__.startswith("CLIP") and component.model_max_length > 10**6:
            raise ValueError(f"its {folder.name} does not say how many tokens it reads; its "
                             "tokenizer_config.json has a model_max_length, 77 for CLIP")
        return component
    dtype = torch.float32 if folder.name == "vae" else dtype
    network, info = component_class.from_pretrained(
        folder, torch_dtype=dtype, variant=find_variant(folder), output_loading_info=True)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if any("lora_" in key for key in unexpected):
        raise ValueError(f"its {folder.name} was saved with a LoRA beside its weights; call "
                         "pipe.fuse_lora() and pipe.unload_lora_weights() before pipe.save_pretrained()")
    if unexpected and folder.name in ("unet", "transformer"):  # text encoders have some by habit
        raise ValueError(f"{len(unexpected)} weights of its {folder.name} have no place in the "
                         f"network of its config.json, {unexpected[0]} for one; give the config.json "
                         "that they came with")
    check_layers(network, unexpected, f"{folder.name}/")
    if missing:
        raise ValueError(f"{len(missing)} weights of its {folder.name} are not in it, {missing[0]} for "
                         "one")
    return network


def variants(folder):
    """The variants of a folder's weights: fp16 of model.fp16.safetensors, "" of plain ones."""
    pattern = (r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?"
               r"\.(?:safetensors|bin)")
    found = [re.fullmatch(pattern, file.name) for file in folder.iterdir()]
    return sorted({match[1] or match[2] or "" for match in filter(None, found)})


def find_variant(folder):
    """The variant to load; None where there are plain weights."""
    found = variants(folder)
    if not found:
        raise ValueError(f"no weights in its folder {folder.name}/")
    return None if "" in found else "fp16" if "fp16" in found else found[0]


def check_network(pipeline):
    """Refuses networks that ask for more than latents, time and prompt, and would be left without
    it in silence."""
    network, config = denoiser(pipeline), denoiser(pipeline).config
    asks = [f"{option} {config[option]}" for option in FURTHER_INPUTS
            if config.get(option) is not None]
    if isinstance(network, UNet2DConditionModel):
        added = "text_time" if kind_of(pipeline) == "StableDiffusionXLPipeline" else None
        if config.addition_embed_type != added:
            asks.append(f"addition_embed_type {config.addition_embed_type}")
        if "gated" in config.attention_type:
            asks.append(f"attention_type {config.attention_type}")
    channels = pipeline.vae.config.latent_channels
    if network_channels(network) != channels:
        asks.append(f"{network_channels(network)} channels of latents, and its VAE gives {channels}")
    if asks:
        raise ValueError("not a text-to-image Stable Diffusion or FLUX: its network asks for more than "
                         f"latents, a timestep and a prompt, {asks[0]}")


@torch.no_grad()
def try_out(pipeline, model, dtype):
    """One prediction on small latents, of two pictures because group norms need two numbers: what does
    not fit together, or is not finite, is found before a run begins."""
    network, device = denoiser(pipeline), denoiser(pipeline).device
    latents = torch.zeros(2, latents_shape(pipeline)[0], 8, 8, device=device)
    try:
        inputs = condition(pipeline, ["", ""], 1.0)
        output = predict(network, latents, torch.full((2,), 500, device=device), *inputs[:2], dtype)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"--model {model}: its parts do not fit together "
                         f"({first_line(error)})") from error
    if output.shape != latents.shape:
        raise ValueError(f"--model {model}: its network predicts {output.shape[1]} channels, not the "
                         f"{latents.shape[1]} of the latents; give another model")
    if not output.isfinite().all():
        raise ValueError(f"--model {model}: its network predicts numbers that are not finite; give "
                         "another model")


def check_kind(pipeline, folder):
    """Raises ValueError where a run's own model predicts something other than this one does, though
    its network has the same layers."""
    config = folder / "config.json"
    model = Path(locate(json.loads(config.read_text()).get("model", ""))) if config.exists() else folder
    path = model / "scheduler" / "scheduler_config.json"
    if not path.exists():  # not a run, or of a model of the hub
        return
    theirs = getattr(diffusers, json.loads(path.read_text())["_class_name"]).from_pretrained(path.parent)
    if prediction_kind(theirs) != prediction_kind(pipeline.scheduler):
        raise ValueError(f"it is a run of {model}, whose network predicts something else")


def load_tuned(pipeline, folder, scale, dtype):
    """Put a run's weights into the pipeline: its whole network, or its adapter. All of them, or
    ValueError."""
    network, name = denoiser(pipeline), network_name(pipeline)
    adapter = folder / "pytorch_lora_weights.safetensors"
    try:
        check_kind(pipeline, folder)
        if (folder / name).exists():
            tuned = load_component(folder / name, type(network), dtype)
            base, new = dict(network.named_parameters()), dict(tuned.named_parameters())
            if {key: p.shape for key, p in base.items()} != {key: p.shape for key, p in new.items()}:
                raise ValueError(f"its {name} has other layers than the model's")
            for key, parameter in new.items():
                parameter.data = torch.lerp(base[key].data, parameter.data, scale)
            setattr(pipeline, name, tuned)
        elif adapter.exists():
            tensors = load_file(adapter)
            wanted = sum(not key.endswith("alpha") for key in tensors)
            pipeline.load_lora_weights(str(folder), weight_name=adapter.name, adapter_name="tuned")
            loaded = sum(".tuned." in key for module in (network, *text_encoders(pipeline))
                         for key, _ in module.named_parameters())
            if loaded != wanted:
                raise ValueError(f"of the {wanted} tensors in its adapter the model takes {loaded}")
            pipeline.set_adapters(["tuned"], [scale])
            # diffusers rounds it to the network's dtype, and a run trains it in float32
            exact = {key.removeprefix(f"{name}.").replace(".weight", ".tuned.weight"): value
                     for key, value in tensors.items()}
            for key, parameter in network.named_parameters():
                if ".tuned." in key:
                    parameter.data = exact.get(key, parameter.data).float()
        else:
            raise ValueError(f"no {adapter.name} and no {name}/ in it")
        if not all(p.isfinite().all() for p in denoiser(pipeline).parameters()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # loaders raise many kinds, which all mean the same
        raise ValueError(f"--lora {folder}: cannot be loaded ({first_line(error)}); give the folder of "
                         "a run of this model") from error
