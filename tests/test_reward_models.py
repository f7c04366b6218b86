"""The rewards that need a model, on small random models of the real classes.

The models have their real processors and are loaded from disk. Each number is computed once more by
another way.
"""

import importlib.util
import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (AutoModel, AutoModelForImageTextToText, AutoTokenizer, BertConfig,
                          BertModel, CLIPConfig, CLIPImageProcessor,
                          CLIPModel, CLIPProcessor, DebertaConfig,
                          DebertaModel, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor,
                          PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration,
                          RobertaConfig, RobertaModel)

import judges
import rewards
from rewards import RewardError, get_reward

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PROMPTS = ["a cat", "a dog on the moon", "a cat", "two wolves playing chess", "a bike"]
CANDIDATES = ["a cat sits here", "", "the moon", "It shows a cat, riding a bike.", "image"]
REFERENCES = ["The image contains a cat", "The image contains a dog", "the moon",
              "The image contains a cat", "a fox"]


@pytest.fixture(scope="session")
def images():
    """Coloured tiles. uint8 (5, 3, 48, 40)"""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (5, 3, 3, 2), generator=generator, dtype=torch.uint8)
    return tiles.repeat_interleave(16, 2).repeat_interleave(20, 3)


@pytest.fixture(autouse=True)
def forget_models():
    """Each test loads its own: a loader remembers what it loaded by name."""
    for loader in (rewards.load_clip, rewards.load_vlm, rewards.load_encoder):
        loader.cache_clear()


def save(model, folder, seed=0, scale=0.3):
    """Random weights that depend on nothing but their names.

    They are large enough that different inputs have different outputs.
    """
    for name, weight in model.named_parameters():
        if "norm" not in name.lower():  # a random scale would make all tokens alike
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            weight.data = scale * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def pictures(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


# CLIP

def save_clip(folder, seed=0, size=32):
    vocab = BYTES + [byte + "</w>" for byte in BYTES]
    vocab += ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    write(folder, "vocab.json", {token: i for i, token in enumerate(vocab)})
    write(folder, "merges.txt", "#version: 0.2\nc a\nca t</w>\n")
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 40, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})
    crop = {"height": size, "width": size}
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop).save_pretrained(folder)
    width = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(**width, vocab_size=len(vocab), max_position_embeddings=40,
                bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1)
    vision = dict(**width, image_size=size, patch_size=8)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return save(CLIPModel(config), folder, seed)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def head_file(tmp_path_factory):
    """An aesthetic head for embeddings of 12 numbers, in the layout of LAION's."""
    sizes = {0: (12, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    torch.manual_seed(0)
    state = {}
    for i, (fan_in, fan_out) in sizes.items():
        state[f"layers.{i}.weight"] = torch.randn(fan_out, fan_in) / math.sqrt(fan_in)
        state[f"layers.{i}.bias"] = torch.randn(fan_out)
    file = tmp_path_factory.mktemp("head") / "model.safetensors"
    save_file(state, file)
    return file


def clip_output(folder, images, texts):
    """CLIPModel's own forward pass on PIL pictures: the second way of everything below."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        inputs = processor(images=pictures(images), text=texts, padding=True, return_tensors="pt")
        return model(**inputs), model


def test_clip_is_the_cosine_that_clip_model_computes_from_pil_pictures(clip_folder, images):
    output, model = clip_output(clip_folder, images, PROMPTS)
    scores = get_reward(f"clip={clip_folder}", "cpu")(images, PROMPTS)
    assert scores.dtype == torch.float32 and not scores.requires_grad and scores.std() > 0.01
    expected = output.logits_per_image.diagonal() / model.logit_scale.exp().detach()
    torch.testing.assert_close(scores, expected)


def test_clip_scores_of_a_picture_do_not_depend_on_its_batch(clip_folder, images):
    reward = get_reward(f"clip={clip_folder}", "cpu")
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(reward(images, PROMPTS), torch.cat(alone))
    many = reward(images.repeat(30, 1, 1, 1), PROMPTS * 30)  # more than 64, which are one chunk
    torch.testing.assert_close(many, torch.cat(alone * 30))


def test_clip_cuts_a_prompt_that_is_longer_than_its_context(clip_folder, images):
    reward = get_reward(f"clip={clip_folder}", "cpu")
    assert reward(images, ["a very long story " * 20] * 5).isfinite().all()


def test_clip_models_are_frozen_and_loaded_once(clip_folder):
    model, _ = rewards.load_clip(clip_folder, "cpu")
    assert rewards.load_clip(clip_folder, "cpu")[0] is model
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def test_clip_weights_saved_in_float16_are_used_in_float32(clip_folder, images, tmp_path):
    half = rewards.load_clip(save_clip(tmp_path / "clip"), "cpu")[0].half()
    half.save_pretrained(tmp_path / "clip")
    rewards.load_clip.cache_clear()
    model, _ = rewards.load_clip(str(tmp_path / "clip"), "cpu")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_top1_is_the_argmax_over_the_candidates(clip_folder, images):
    candidates = ["a cat", "a dog on the moon", "two wolves playing chess", "a bike"]
    output, _ = clip_output(clip_folder, images, candidates)
    best = output.logits_per_image.argmax(1).tolist()
    expected = [candidates[i] == prompt for i, prompt in zip(best, PROMPTS)]
    right = rewards.clip_top1(images, PROMPTS, candidates, "cpu", clip_folder)
    assert right.dtype == torch.bool and right.tolist() == expected
    nearest = [candidates[i] for i in best]
    assert rewards.clip_top1(images, nearest, candidates, "cpu", clip_folder).all()


def test_image_embeddings_are_clips_and_have_length_one(clip_folder, images):
    output, _ = clip_output(clip_folder, images, PROMPTS)
    embeddings = rewards.clip_image_embeddings(images, "cpu", clip_folder)
    torch.testing.assert_close(embeddings, output.image_embeds)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5))


def test_pickscore_is_the_logit_of_its_clip_with_another_models_processor(clip_folder, images,
                                                                          tmp_path):
    folder = save_clip(tmp_path / "pick", seed=7)
    tokenizer_files = (tmp_path / "pick").glob("*token*")
    for file in (*tokenizer_files, tmp_path / "pick" / "preprocessor_config.json"):
        file.unlink()  # as in its repository: weights and no processor
    scores = get_reward(f"pickscore={folder}@{clip_folder}", "cpu")(images, PROMPTS)
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        inputs = processor(images=pictures(images), text=PROMPTS, padding=True, return_tensors="pt")
        output = model(**inputs)
    torch.testing.assert_close(scores, output.logits_per_image.diagonal())


def test_aesthetic_is_one_affine_map_of_the_normalised_embedding(clip_folder, head_file, images):
    head = {name: value.double().numpy() for name, value in load_file(head_file).items()}
    weight, bias = np.eye(12), np.zeros(12)  # the five layers multiplied out
    for i in (0, 2, 4, 6, 7):
        layer = head[f"layers.{i}.weight"]
        weight, bias = layer @ weight, layer @ bias + head[f"layers.{i}.bias"]
    output, _ = clip_output(clip_folder, images, PROMPTS)
    scores = get_reward(f"aesthetic={head_file}@{clip_folder}", "cpu")(images, PROMPTS)
    expected = output.image_embeds.double().numpy() @ weight.T + bias
    np.testing.assert_allclose(scores, expected[:, 0], rtol=1e-5)
    assert scores.std() > 0.01


def test_an_aesthetic_head_may_be_a_pth_file_but_not_a_pickled_program(clip_folder, head_file,
                                                                       images, tmp_path):
    torch.save(load_file(head_file), tmp_path / "head.pth")
    scores = [get_reward(f"aesthetic={head}@{clip_folder}", "cpu")(images, PROMPTS)
              for head in (head_file, tmp_path / "head.pth")]
    torch.testing.assert_close(*scores)
    torch.save({"layers.0.weight": print}, tmp_path / "evil.pth")
    with pytest.raises(RewardError, match="UnpicklingError"):
        get_reward(f"aesthetic={tmp_path / 'evil.pth'}@{clip_folder}", "cpu")


# Vision-language models

def save_llava(folder):
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocab = special + BYTES + ["Ye", "Yes"]
    ids = {token: i for i, token in enumerate(vocab)}
    bpe = Tokenizer(models.BPE(ids, [("Y", "e"), ("Ye", "s")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"])
    template = ("{% for m in messages %}Q: {% for c in m.content %}"
                "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}"
                "{% endfor %}{% endfor %}{% if add_generation_prompt %} A:{% endif %}")
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16},
                                         crop_size={"height": 16, "width": 16})
    LlavaProcessor(image_processor, tokenizer, patch_size=8, num_additional_image_tokens=1,
                   vision_feature_select_strategy="default",
                   chat_template=template).save_pretrained(folder)
    width = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(**width, model_type="llama", vocab_size=len(vocab), num_key_value_heads=2,
                bos_token_id=1, eos_token_id=2, pad_token_id=0)
    vision = dict(**width, model_type="clip_vision_model", image_size=16, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4,
                         vision_feature_layer=-2)
    return save(LlavaForConditionalGeneration(config), folder, scale=0.2)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava"))


def llava_logits(folder, image, question, answer=()):
    """Logits of the next token, from one unpadded row that is put together by hand."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer(text, add_special_tokens=False).input_ids
             for text in ("Q: ", f"\n{question} A:")]
    ids = torch.tensor([[1, *words[0], *[4] * 4, *words[1], *answer]])  # <s>, 2 × 2 image patches
    image_processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = image_processor(pictures(image[None]), return_tensors="pt").pixel_values
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids),
                     pixel_values=pixels).logits[0, -1]


def test_vqa_is_the_probability_of_yes_as_the_next_token(llava_folder, images):
    scores = get_reward(f"vqa={llava_folder}", "cpu")(images, PROMPTS)
    yes = AutoTokenizer.from_pretrained(llava_folder)("Yes", add_special_tokens=False).input_ids
    assert len(yes) == 1
    questions = [f"Does this picture show '{prompt}'? Answer Yes or No." for prompt in PROMPTS]
    expected = [llava_logits(llava_folder, image, question).softmax(0)[yes[0]]
                for image, question in zip(images, questions)]
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-6, rtol=1e-3)
    assert len(set(scores.tolist())) == 5


def test_vqa_counts_a_yes_with_a_space_before_it_and_refuses_a_vocabulary_without_one(tmp_path, images):
    folder = Path(save_llava(tmp_path))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    vocab["ĠYes"] = len(vocab)
    merges.append(["Ġ", "Yes"])
    write(folder, "tokenizer.json", tokenizer)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(len(vocab))
    model.save_pretrained(folder)
    scores = get_reward(f"vqa={folder}", "cpu")(images, PROMPTS)
    questions = [f"Does this picture show '{prompt}'? Answer Yes or No." for prompt in PROMPTS]
    spaced = torch.stack([llava_logits(folder, *pair).softmax(0)[[vocab["Yes"], vocab["ĠYes"]]]
                          for pair in zip(images, questions)])
    torch.testing.assert_close(scores, spaced.sum(1), atol=1e-6, rtol=1e-3)
    assert spaced.min() > 0

    for token in ("Yes", "ĠYes"):
        vocab[token + "?"] = vocab.pop(token)
    del merges[-2:]
    write(folder, "tokenizer.json", tokenizer)
    rewards.load_vlm.cache_clear()
    with pytest.raises(RewardError, match="has no token for Yes"):
        get_reward(f"vqa={folder}", "cpu")


def test_a_judge_in_bf16_keeps_the_frequencies_of_its_positions(llava_folder):
    model = judges.load_network(AutoModelForImageTextToText, llava_folder, "cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frequencies = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    for buffer in frequencies:  # in bf16, a token far away would seem to stand elsewhere
        torch.testing.assert_close(buffer, 1e4 ** (-torch.arange(len(buffer)) / len(buffer)))
    assert frequencies


def test_an_answer_is_the_greedy_one_whatever_stands_beside_it_in_the_batch(llava_folder, images):
    # rows of three lengths, and nine of them: more than the eight of a batch
    questions = ["What is it?", "How many cats are there in this image?", "Why?"] * 3
    network = rewards.load_vlm(llava_folder, "cpu")
    answers = rewards.answer(network, images[:3].repeat(3, 1, 1, 1), questions)
    tokenizer = AutoTokenizer.from_pretrained(llava_folder)
    for i in range(3):
        tokens = []
        while len(tokens) < 6 and (not tokens or tokens[-1] != 2):
            logits = llava_logits(llava_folder, images[i], questions[i], tokens)
            tokens.append(logits.argmax().item())
        start = tokenizer.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd")
        assert start and answers[i].startswith(start)
        assert answers[i] == answers[i + 3] == answers[i + 6]


def test_answers_are_greedy_whatever_a_model_brings_along_for_generation(llava_folder, images, tmp_path):
    question, folder = ["What is it?"], tmp_path / "llava"
    shutil.copytree(llava_folder, folder)
    settings = {"eos_token_id": 2, "pad_token_id": 0, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    write(folder, "generation_config.json", settings)  # Qwen2.5-VL's has a repetition penalty
    first, second = (rewards.answer(rewards.load_vlm(str(place), "cpu"), images[:1], question)
                     for place in (llava_folder, folder))
    assert first == second


@pytest.mark.parametrize("how_many, what, score", [
    ("There are five wolves.", "A wolf.", 1), ("5", "wolves", 1), ("Five", "WOLF", 1),
    ("five", "a dog", 0.5), ("6", "wolf", 0.5), ("15 or fiver", "a bird", 0), ("", "", 0),
    ("five", "a werewolf and wolverines", 0.5), ("twenty-five", "wolves", 0.5),
    ("5,000 or 5.5", "wolves", 0.5), ("I see five, all wolves.", "wolf-like: a wolf", 1)])
def test_count_is_the_share_of_right_answers(llava_folder, images, monkeypatch, how_many, what,
                                             score):
    asked = []

    def answer(network, images, questions):
        asked.extend(questions)
        return [how_many if "How many" in question else what for question in questions]

    monkeypatch.setattr(rewards, "answer", answer)
    reward = get_reward(f"count={llava_folder}", "cpu")
    assert reward(images[:2], ["five wolves"] * 2).tolist() == [score] * 2
    assert asked == (["How many wolves are there in this image?"] * 2
                     + ["What animal is in this image?"] * 2)


def test_count_knows_the_singular_of_every_animal_of_its_prompts():
    from prompts import load_prompts
    nouns = [prompt.split(" ", 1)[1] for prompt in load_prompts("animals")]
    assert [rewards.singular(plural) for plural in load_prompts("animals_plural")] == nouns


def test_count_works_with_a_real_model_and_refuses_prompts_without_a_number(llava_folder, images):
    reward = get_reward(f"count={llava_folder}", "cpu")
    assert set(reward(images[:2], ["two cats", "six geese"]).tolist()) <= {0.0, 0.5, 1.0}
    with pytest.raises(RewardError, match="'a cat' is not a number"):
        reward(images[:2], ["two cats", "a cat"])


def save_qwen(folder):
    special = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad",
               "video_pad"]
    special = [f"<|{name}|>" for name in special]
    vocab = BYTES + ["Ye", "Yes"]
    ids = {token: len(vocab) + i for i, token in enumerate(special)}
    write(folder, "vocab.json", {token: i for i, token in enumerate(vocab)})
    write(folder, "merges.txt", "#version: 0.2\nY e\nYe s\n")
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "additional_special_tokens": special[1:],
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False,
                     "normalized": False, "single_word": False} for token, i in ids.items()}})
    write(folder, "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 28 * 28, "max_pixels": 56 * 56, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2})
    write(folder, "chat_template.json", {"chat_template": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")})
    text = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(vocab) + len(special),
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, bos_token_id=None,
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], tie_word_embeddings=True)
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=16,
                  window_size=56, fullatt_block_indexes=[1])
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True,
                              **{name: ids[token] for name, token in names.items()})
    return save(Qwen2_5_VLForConditionalGeneration(config), folder, scale=0.2)


def test_a_qwen_vl_scores_in_a_batch_as_it_does_alone_and_by_hand(images, tmp_path):
    pytest.importorskip("torchvision", reason="transformers' Qwen-VL processors need torchvision")
    folder = save_qwen(tmp_path)
    from transformers import Qwen2VLImageProcessor

    reward = get_reward(f"vqa={folder}", "cpu")
    scores = reward(images, PROMPTS)
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(scores, torch.cat(alone), atol=1e-6, rtol=1e-3)

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = Qwen2VLImageProcessor.from_pretrained(folder)
    inputs = image_processor(pictures(images[1:2]), return_tensors="pt")
    pads = "<|image_pad|>" * (inputs.image_grid_thw.prod().item() // 4)  # a token is 2 × 2 patches
    ids = tokenizer(f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>Does this picture show "
                    f"'{PROMPTS[1]}'? Answer Yes or No.<|im_end|>\n<|im_start|>assistant\n",
                    return_tensors="pt")
    kinds = (ids.input_ids == model.config.image_token_id).int()
    kinds = {"mm_token_type_ids": kinds}  # transformers 5 asks for it
    with torch.no_grad():
        try:
            logits = model(**ids, **inputs, **kinds).logits[0, -1]
        except TypeError:
            logits = model(**ids, **inputs).logits[0, -1]
    yes = tokenizer("Yes").input_ids[0]
    torch.testing.assert_close(scores[1], logits.softmax(0)[yes], atol=1e-6, rtol=1e-3)


# BERTScore

def save_bert(folder, layers=3):
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    words += [*["##" + letter for letter in letters], "cat", "the", "moon"]
    write(folder, "vocab.txt", "\n".join(words))
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64})
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=layers,
                        num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
    return save(BertModel(config), folder)


def save_deberta(folder, layers=3):
    folder.mkdir(parents=True, exist_ok=True)
    vocab = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *BYTES, "Ġc", "Ġca", "Ġcat", "Th", "The"]
    write(folder, "vocab.json", {token: i for i, token in enumerate(vocab)})
    write(folder, "merges.txt", "#version: 0.2\nĠ c\nĠc a\nĠca t\nT h\nTh e\n")
    write(folder, "tokenizer_config.json", {
        "tokenizer_class": "DebertaTokenizer", "model_max_length": 64})
    config = DebertaConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, relative_attention=True,
        position_biased_input=False, pos_att_type="c2p|p2c", type_vocab_size=0)
    return save(DebertaModel(config), folder)


def recall_by_hand(folder, layer, candidates, references):
    """BERTScore recall, in loops. The upper layers are cut off instead of a layer picked."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.encoder.layer = model.encoder.layer[:layer]

    @torch.no_grad()
    def vectors(text):
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()

    def recall(candidate, reference):
        counted = vectors(reference)[1:-1]  # without [CLS] and [SEP]
        best = [max(c @ r / np.sqrt(c @ c * (r @ r)) for c in vectors(candidate)) for r in counted]
        return sum(best) / len(best) if candidate else 0.0

    return [recall(*pair) for pair in zip(candidates, references)]


@pytest.mark.parametrize("save_encoder, name, layers, layer", [
    (save_bert, "bert", 3, 3), (save_deberta, "deberta", 3, 3),
    (save_bert, "bert-base-uncased", 12, 9), (save_deberta, "deberta-xlarge-mnli", 42, 40)])
def test_bertscore_recall_equals_a_computation_in_loops(tmp_path, save_encoder, name, layers,
                                                        layer):
    folder = save_encoder(tmp_path / name, layers)
    scores = rewards.bertscore_recall(rewards.load_encoder(folder, "cpu"), CANDIDATES, REFERENCES)
    expected = recall_by_hand(folder, layer, CANDIDATES, REFERENCES)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    assert scores[1] == 0  # an empty candidate
    assert scores[2] == pytest.approx(1, abs=1e-6)  # one that is equal to its reference


def test_an_encoder_in_the_hubs_cache_is_read_at_its_authors_layer_too(tmp_path):
    folder = save_bert(tmp_path / "models--google-bert--bert-base-uncased/snapshots/86b5e0934494", 12)
    assert rewards.load_encoder(folder, "cpu")[2] == judges.BERTSCORE_LAYER["bert-base-uncased"]


@pytest.mark.parametrize("save_encoder, recorded", [
    (save_bert, [0.9062495, 0, 1, 0.9591755, 0.8852937]),
    (save_deberta, [0.9768890, 0, 1, 0.9816021, 0.9576514])])
def test_bertscore_recall_equals_the_bert_score_package(tmp_path, save_encoder, recorded):
    """recorded: what bert-score 0.3.13 gave (torch 2.13.0, transformers 4.57.6).

    Once more, live: pip install bert-score "transformers<5", then
    pytest tests/test_reward_models.py -k bert_score_package.
    """
    folder = save_encoder(tmp_path / "encoder")
    scores = rewards.bertscore_recall(rewards.load_encoder(folder, "cpu"), CANDIDATES, REFERENCES)
    np.testing.assert_allclose(scores, recorded, atol=2e-6)
    if importlib.util.find_spec("bert_score"):
        import bert_score
        _, recall, _ = bert_score.score(CANDIDATES, REFERENCES, model_type=folder, num_layers=3,
                                        device="cpu")
        np.testing.assert_allclose(scores, recall, atol=2e-6)


def test_align_compares_descriptions_with_the_prompt_and_counts_empty_ones(llava_folder, images,
                                                                           tmp_path, monkeypatch):
    encoder = save_deberta(tmp_path / "encoder")
    reward = get_reward(f"align={llava_folder}@{encoder}", "cpu")
    real = reward(images, PROMPTS)
    assert real.shape == (5,) and real.abs().max() <= 1.0001
    assert reward.log_counts == {"empty_descriptions": 0}
    descriptions = ["a cat", "", "a dog", "", "wolves"]
    monkeypatch.setattr(rewards, "answer", lambda network, images, questions: descriptions)
    scores = reward(images, PROMPTS)
    references = [f"The image contains {prompt}" for prompt in PROMPTS]
    expected = recall_by_hand(encoder, 3, descriptions, references)
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    assert reward.log_counts == {"empty_descriptions": 2} and scores[1] == scores[3] == 0


# What cannot be loaded

@pytest.fixture
def no_network(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)


@pytest.mark.parametrize("name, model", [
    ("aesthetic", "ttj/sac-logos-ava1-l14-linearMSE"),
    ("pickscore=@CLIP", "yuvalkirstain/PickScore_v1"), ("align", "llava-hf/llava-1.5-7b-hf"),
    ("vqa=a/vlm", "a/vlm"), ("clip=a/clip", "a/clip")])
def test_without_a_network_one_line_says_what_to_download(no_network, clip_folder, name, model):
    with pytest.raises(RewardError) as error:
        get_reward(name.replace("CLIP", clip_folder), "cpu")
    said = str(error.value)
    place = rewards.HERE / "models" / model.split("/")[1]
    assert f"hf download {model} --local-dir {place}" in said and "\n" not in said
    assert "compress, incompress, clip" in said  # what works without


def test_the_message_names_the_one_of_two_models_that_is_missing(no_network, clip_folder,
                                                                 llava_folder, head_file):
    for spec, missing in ((f"pickscore={clip_folder}", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
                          (f"align={llava_folder}", "microsoft/deberta-xlarge-mnli"),
                          (f"aesthetic={head_file}", "openai/clip-vit-large-patch14")):
        says = f"cannot load {missing}.*{spec.split('=')[0]}=@FOLDER_OR_ID"
        with pytest.raises(RewardError, match=says):
            get_reward(spec, "cpu")


def test_a_model_put_where_the_message_says_is_found(no_network, tmp_path, monkeypatch, head_file,
                                                     images):
    monkeypatch.setattr(judges, "HERE", tmp_path)
    save_clip(tmp_path / "models" / "clip-vit-large-patch14")
    head = tmp_path / "models" / "sac-logos-ava1-l14-linearMSE"
    head.mkdir()
    save_file(load_file(head_file), head / "model.safetensors")
    assert get_reward("aesthetic", "cpu")(images, PROMPTS).shape == (5,)


def test_an_earlier_download_is_used_when_there_is_no_network(no_network, clip_folder, images,
                                                              monkeypatch):
    import huggingface_hub

    def earlier(model, local_files_only):
        return clip_folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", earlier)
    assert get_reward("clip=a/clip", "cpu")(images, PROMPTS).shape == (5,)


def test_a_folder_of_another_type_is_refused_rather_than_filled_with_random_weights(
        tmp_path, clip_folder, llava_folder):
    bert = save_bert(tmp_path / "bert")
    for spec in (f"clip={bert}", f"vqa={bert}", f"vqa={clip_folder}", f"clip={tmp_path}",
                 f"clip={tmp_path / 'nothing'}", f"aesthetic={clip_folder}",
                 f"align={llava_folder}@{tmp_path}"):
        with pytest.raises(RewardError, match="cannot load") as error:
            get_reward(spec, "cpu")
        assert "\n" not in str(error.value), str(error.value)


def test_a_clip_with_a_missing_weight_is_refused(tmp_path):
    folder = save_clip(tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match="visual_projection.weight"):
        get_reward(f"clip={folder}", "cpu")


def test_a_clip_with_a_weight_of_another_size_is_refused_by_the_name_of_the_weight(tmp_path):
    folder = save_clip(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    write(tmp_path / "clip", "config.json", config | {"projection_dim": 8})
    with pytest.raises(RewardError, match=r"projection.weight has another size .* needs, \(8, 16\)"):
        get_reward(f"clip={folder}", "cpu")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_clip_whose_config_names_fewer_layers_than_it_has_is_refused(tmp_path, part):
    folder = save_clip(tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config[part] |= {"num_hidden_layers": 1}
    write(tmp_path / "clip", "config.json", config)
    with pytest.raises(RewardError, match=r"encoder.layers.1\S+ has no place in the layers of its conf"):
        get_reward(f"clip={folder}", "cpu")


@pytest.mark.parametrize("kind", ["known", "unknown", "tokenizer"])
def test_code_that_comes_with_a_judge_is_never_run(tmp_path, llava_folder, kind):
    """A model that transformers knows is loaded without it; any other is refused in a line."""
    folder = Path(save_bert(tmp_path / "bert"))
    write(folder, "mine.py", f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    file = folder / ("tokenizer_config.json" if kind == "tokenizer" else "config.json")
    config = json.loads(file.read_text())
    if kind == "unknown":
        config["model_type"] = "mine"
    if kind == "tokenizer":
        config["tokenizer_class"] = "Mine"
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model",
                          "AutoTokenizer": ["mine.Mine", None]}
    write(folder, file.name, config)
    if kind == "known":
        get_reward(f"align={llava_folder}@{folder}", "cpu")
    else:
        with pytest.raises(RewardError, match=f"align: cannot load {folder}") as error:
            get_reward(f"align={llava_folder}@{folder}", "cpu")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_template_that_writes_the_start_token_itself_makes_no_second_one(llava_folder, images):
    reward = get_reward(f"vqa={llava_folder}", "cpu")
    scores = reward(images, PROMPTS)
    _, processor = rewards.load_vlm(llava_folder, "cpu")
    processor.chat_template = processor.tokenizer.bos_token + processor.chat_template
    torch.testing.assert_close(reward(images, PROMPTS), scores)


def test_roberta_reads_a_text_as_if_a_space_stood_before_it(tmp_path):
    vocab = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *BYTES, "Ġc", "Ġca", "Ġcat", "Th", "The"]
    write(tmp_path, "vocab.json", {token: i for i, token in enumerate(vocab)})
    write(tmp_path, "merges.txt", "#version: 0.2\nĠ c\nĠc a\nĠca t\nT h\nTh e\n")
    write(tmp_path, "tokenizer_config.json", {
        "tokenizer_class": "RobertaTokenizer", "model_max_length": 64})
    folder = save(RobertaModel(RobertaConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=66, type_vocab_size=1)), tmp_path)
    texts = ["cats", "the moon", "a cat sits here"], ["cat", "cat", "cat"]
    scores = rewards.bertscore_recall(rewards.load_encoder(folder, "cpu"), *texts)
    spaced = ([f" {text}" for text in row] for row in texts)
    np.testing.assert_allclose(scores, recall_by_hand(folder, 3, *spaced), atol=2e-6)


def test_bertscore_reads_at_most_the_512_tokens_that_encoders_have_positions_for(tmp_path):
    folder = Path(save_bert(tmp_path))
    config = BertConfig.from_pretrained(folder, max_position_embeddings=512)
    encoder = rewards.load_encoder(save(BertModel(config), folder), "cpu")
    long, longer = "cat " * 510, "cat " * 510 + "moon " * 100
    scores = rewards.bertscore_recall(encoder, ["the moon"] * 2, [long, longer])
    assert scores[0] == scores[1]


def test_a_vlm_without_a_chat_template_is_refused(tmp_path):
    folder = Path(save_llava(tmp_path))
    for file in folder.glob("chat_template*"):
        file.unlink()
    for file in folder.glob("*_config.json"):
        content = json.loads(file.read_text())
        content.pop("chat_template", None)
        write(folder, file.name, content)
    with pytest.raises(RewardError, match="vqa: cannot load .*it has no chat template") as error:
        get_reward(f"vqa={folder}", "cpu")
    assert "\n" not in str(error.value)


def test_a_prompt_of_count_may_have_capitals_and_spaces_around_it(llava_folder, images, monkeypatch):
    monkeypatch.setattr(rewards, "answer", lambda network, images, questions: [
        "five" if question == "How many wolves are there in this image?" else "a wolf"
        for question in questions])
    reward = get_reward(f"count={llava_folder}", "cpu")
    assert reward(images[:2], ["Five Wolves", " five wolves\t"]).tolist() == [1, 1]


def test_a_path_that_exists_comes_before_a_folder_of_that_name_beside_the_code(tmp_path, monkeypatch):
    mine, beside = tmp_path / "mine/clip", tmp_path / "models/clip"
    beside.mkdir(parents=True)
    monkeypatch.setattr(judges, "HERE", tmp_path)
    assert judges.find(str(mine)) == str(beside)
    mine.mkdir(parents=True)
    assert judges.find(str(mine)) == str(mine)


def test_an_aesthetic_head_saved_in_float16_computes_in_float32(clip_folder, head_file, images, tmp_path):
    half = {name: value.half() for name, value in load_file(head_file).items()}
    save_file(half, tmp_path / "half.safetensors")
    save_file({name: value.float() for name, value in half.items()}, tmp_path / "same.safetensors")
    of_half, of_same = (get_reward(f"aesthetic={tmp_path / name}.safetensors@{clip_folder}", "cpu")(
        images, PROMPTS) for name in ("half", "same"))
    torch.testing.assert_close(of_half, of_same)


def test_an_answer_has_at_most_64_tokens(llava_folder, images, monkeypatch):
    lengths, generate = [], judges.generate
    network = rewards.load_vlm(llava_folder, "cpu")
    monkeypatch.setattr(network[0].generation_config, "eos_token_id", None)  # it never stops

    def counting(*arguments, **settings):
        for output, length in generate(*arguments, **settings):
            lengths.append(output.sequences.shape[1] - length)
            yield output, length

    monkeypatch.setattr(judges, "generate", counting)
    rewards.answer(network, images[:1], ["What is it?"])
    assert lengths == [64]


def test_of_a_published_encoder_bertscore_reads_the_layer_that_its_authors_chose():
    chosen = {  # bert_score.utils.model2layers
        "microsoft/deberta-xlarge-mnli": 40, "microsoft/deberta-large-mnli": 18,
        "microsoft/deberta-base-mnli": 9, "roberta-large": 17, "roberta-base": 10,
        "bert-large-uncased": 18, "bert-base-uncased": 9, "distilbert-base-uncased": 5}
    assert judges.BERTSCORE_LAYER == {Path(model).name: layer for model, layer in chosen.items()}
