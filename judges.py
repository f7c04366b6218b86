"""The models that rewards ask: CLIP, LAION's aesthetic head, vision-language models, BERTScore.

Each is loaded once and frozen. Pictures arrive as uint8 (B, 3, H, W) and reach every model through
its own processor, as PIL pictures. Models are found on disk, beside this file in models/, or on the
Hugging Face hub: see `find`. Code that comes with a model is never run.
"""

import re
import string
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
# BERTScore reads the layer that agrees best with people, found by its authors for each model. For
# other models it is the last.
BERTSCORE_LAYER = {"deberta-xlarge-mnli": 40, "deberta-large-mnli": 18, "deberta-base-mnli": 9,
                   "roberta-large": 17, "roberta-base": 10, "bert-large-uncased": 18,
                   "bert-base-uncased": 9, "distilbert-base-uncased": 5}


def check_vocabulary(tokenizer, name="tokenizer"):
    """Raises ValueError if it tells no letters apart: where the files of a vocabulary are missing,
    transformers makes a tokenizer to which all letters are the same."""
    if len({tuple(tokenizer(letter).input_ids) for letter in string.ascii_letters}) == 1:
        raise ValueError(f"its {name} has no vocabulary")


def check_layers(model, unexpected, folder=""):
    """Raises ValueError if among the weights that have no place in the model are further layers of a kind
    that it has: its config.json is that of a smaller one, which transformers makes without a word."""
    kinds = {re.sub(r"\.\d+\.", ".#.", key) for key in model.state_dict()}
    for key in sorted(unexpected):
        if re.sub(r"\.\d+\.", ".#.", key) in kinds:
            raise ValueError(f"its {key} has no place in the layers of its {folder}config.json; give the "
                             "config.json that its weights came with")


# CLIP

@lru_cache(maxsize=None)  # aesthetic and clip may share one, and so may a mixture's components
def load_clip(model, device, processor=None):
    """(CLIPModel, CLIPProcessor).

    float32 on every device, because a reward's differences are small and CLIP is cheap.
    """
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(find(processor or model), trust_remote_code=False)
    check_vocabulary(processor.tokenizer)
    return load_network(CLIPModel, find(model), device, torch.float32), processor


@torch.no_grad()
def embed_images(network, images):
    """(B, D), L2-normalised.

    Not by CLIPModel.get_image_features: what that returns depends on the version of transformers.
    """
    model, processor = network
    embeddings = []
    for chunk in images.split(64):
        inputs = processor(images=to_pil(chunk), return_tensors="pt").to(model.device)
        pooled = model.vision_model(pixel_values=inputs.pixel_values).pooler_output
        embeddings.append(model.visual_projection(pooled))
    return F.normalize(torch.cat(embeddings), dim=1)


@torch.no_grad()
def embed_texts(network, texts):
    """(B, D), L2-normalised. Each different text is encoded once."""
    model, processor = network
    unique = list(dict.fromkeys(texts))
    longest = model.config.text_config.max_position_embeddings
    inputs = processor(text=unique, padding=True, truncation=True, max_length=longest,
                       return_tensors="pt").to(model.device)
    hidden = model.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    embeddings = F.normalize(model.text_projection(hidden.pooler_output), dim=1)
    return embeddings[[unique.index(text) for text in texts]]


def load_aesthetic_head(model, device):
    """[(weight, bias), ...] from a .safetensors or .pth file, a folder, or an id on the hub.

    A .pth is read with weights_only.
    """
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    path = Path(find(model))
    if path.is_dir():
        path = path / "model.safetensors"
    elif not path.is_file():
        path = Path(hf_hub_download(model, "model.safetensors"))
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    names = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]  # 1, 3 and 5 were dropout
    if any(f"{name}.weight" not in state for name in names):
        raise ValueError(f"{path} is no aesthetic head: it has no {names[0]}.weight ... "
                         f"{names[-1]}.weight")
    return [tuple(state[f"{name}.{kind}"].to(device).float() for kind in ("weight", "bias"))
            for name in names]


# Vision-language models

@lru_cache(maxsize=None)
def load_vlm(model, device):
    """(model, processor) of LLaVA, Qwen-VL or another image-text-to-text model of transformers."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(find(model), trust_remote_code=False)
    if not getattr(processor, "chat_template", None):
        raise ValueError("it has no chat template: choose a model tuned to follow instructions")
    check_vocabulary(processor.tokenizer)
    processor.tokenizer.padding_side = "left"  # answers start where the row ends
    dtype = torch.float32
    if torch.device(device).type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if bf16 else torch.float16
    return load_network(AutoModelForImageTextToText, find(model), device, dtype), processor


@torch.no_grad()
def generate(network, images, questions, **settings):
    """Greedy answers, eight pictures at a time, without the penalties that a model may bring along:
    they would punish a noun for being in the question.

    Yields (what model.generate returns, number of tokens of a question).
    """
    model, processor = network
    bos = processor.tokenizer.bos_token
    for start in range(0, len(images), 8):
        texts = []
        for question in questions[start : start + 8]:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
        pictures = [[picture] for picture in to_pil(images[start : start + 8])]
        has_bos = bool(bos) and texts[0].startswith(bos)  # some templates write it themselves
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt",
                           add_special_tokens=not has_bos)
        inputs = inputs.to(model.device, model.dtype)
        output = model.generate(**inputs, do_sample=False, num_beams=1, temperature=None,
                                top_p=None, top_k=None, repetition_penalty=1.0,
                                no_repeat_ngram_size=0, return_dict_in_generate=True,
                                **settings)
        yield output, inputs.input_ids.shape[1]


def answer(network, images, questions):
    """B answers of at most 64 tokens: more than a concise answer takes, and a bound on the cost."""
    tokenizer, answers = network[1].tokenizer, []
    for output, length in generate(network, images, questions, max_new_tokens=64):
        answers += tokenizer.batch_decode(output.sequences[:, length:], skip_special_tokens=True)
    return [text.strip() for text in answers]


# BERTScore

@lru_cache(maxsize=None)
def load_encoder(model, device):
    """(model, tokenizer, layer)"""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find(model), trust_remote_code=False)
    check_vocabulary(tokenizer)
    network = load_network(AutoModel, find(model), device, torch.float32)
    names = str(model).replace("--", "/").split("/")  # the hub's cache: models--OWNER--NAME/snapshots/...
    known = [BERTSCORE_LAYER[name] for name in names if name in BERTSCORE_LAYER]
    return network, tokenizer, known[-1] if known else -1


@torch.no_grad()
def bertscore_recall(encoder, candidates, references):
    """Recall of BERTScore (Zhang et al. 2020, Eq. 1), without idf and rescaling. (B,)

    It is the mean, over a reference's tokens, of the cosine to the nearest token of the candidate.
    As in the authors' code, [CLS] and [SEP] may be that nearest token but are not counted in the
    mean, and an empty candidate scores 0.
    """
    model, tokenizer, layer = encoder
    texts = list(dict.fromkeys(text.strip() for text in [*candidates, *references]))
    space = " " if model.config.model_type == "roberta" else ""  # tokens include the space before
    tokens = tokenizer([space + text for text in texts], padding=True, truncation=True,
                       max_length=512, return_tensors="pt").to(model.device)
    hidden = model(**tokens, output_hidden_states=True).hidden_states[layer]
    hidden = F.normalize(hidden.float(), dim=-1)  # (texts, tokens, D)
    real = tokens.attention_mask.bool()
    special = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id], device=model.device)
    counted = ~torch.isin(tokens.input_ids, special)
    scores = []
    for candidate, reference in zip(candidates, references):
        c, r = texts.index(candidate.strip()), texts.index(reference.strip())
        cosines = hidden[r][real[r] & counted[r]] @ hidden[c][real[c]].T  # (reference, candidate)
        nearest = cosines.amax(1)
        scores.append(nearest.mean() if candidate.strip() else nearest.new_zeros(()))
    return torch.stack(scores)


# Loading

def load_network(auto_class, folder, device, dtype):
    """A frozen model that has all its weights.

    transformers alone would fill gaps with random numbers, and take a BERT for a CLIP.
    """
    # other sizes are let through to be named below; transformers' own error refers to a printed table
    model, info = auto_class.from_pretrained(folder, dtype=dtype, output_loading_info=True,
                                             trust_remote_code=False, ignore_mismatched_sizes=True)
    for key in info["mismatched_keys"]:
        key = key if isinstance(key, str) else key[0]  # since transformers 5 with its shapes
        raise ValueError(f"its {key} has another size than {type(model).__name__} needs, "
                         f"{tuple(model.state_dict()[key].shape)}")
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # not read here
    if missing:
        raise ValueError(f"{len(missing)} weights of {type(model).__name__} are not in it, "
                         f"{missing[0]} for one")
    check_layers(model, info["unexpected_keys"])
    # not .to(dtype): it would round the frequencies of the positions, too
    return model.to(device).eval().requires_grad_(False)


def find(model):
    """What to load for a path or an id.

    In this order: the path; the folder of that name in models/; the id, if the hub answers; an
    earlier download of it.
    """
    beside = HERE / "models" / Path(model).name
    if Path(model).exists() or beside.exists():
        return str(model if Path(model).exists() else beside)
    if Path(model).is_absolute():
        raise FileNotFoundError("no such file or folder")
    from huggingface_hub import HfApi, snapshot_download
    try:
        # one question first: without internet access from_pretrained would ask for minutes
        HfApi().model_info(model, timeout=10)
        return model
    except Exception as error:
        try:
            return snapshot_download(model, local_files_only=True)
        except Exception:
            raise error from None


def to_pil(images):
    """uint8 (B, 3, H, W) -> B pictures, for processors.

    Those would scale a float picture in [0, 1] by 1/255 once more.
    """
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).cpu().numpy()]
