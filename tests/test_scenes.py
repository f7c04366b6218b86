"""Claims about the emoji world and the model that was pretrained on it."""

import json
import math
import re
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPModel

from emoji import clip, diffusion, pretrain, scenes, trainer, variants
import prompts
from processes import RunStopped
from rewards import clip_top1, get_reward
from sample import encode_prompts, load_pipeline
from scripts import learning_rates


def test_the_same_seed_draws_the_same_scenes():
    first, captions = scenes.draw_scenes(20, seed=5)
    again, captions_again = scenes.draw_scenes(20, seed=5)
    assert np.array_equal(first, again) and captions == captions_again
    assert first.shape == (20, 64, 64, 3) and first.dtype == np.uint8


def test_captions_are_of_their_kinds():
    for kind, words in {"background": " background", "pair": " with a"}.items():
        assert all(words in caption for caption in scenes.draw_scenes(30, seed=0, kind=kind)[1])
    assert set(scenes.draw_scenes(30, seed=0, kind="alone")[1]) <= set(with_articles())


def with_articles(group=None):
    return [scenes.with_article(noun) for noun in scenes.nouns(group)]


def regions(mask):
    """How many separate regions a mask has, by flooding each."""
    mask, found = mask.copy(), 0
    while mask.any():
        found += 1
        front = [tuple(np.argwhere(mask)[0])]
        while front:
            y, x = front.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
                mask[y, x] = False
                front += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return found


@pytest.mark.parametrize("count", range(1, 7))
def test_a_counted_scene_has_as_many_separate_things_as_it_says(count):
    disc = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(disc).ellipse((10, 10, 54, 54), fill=(255, 0, 255, 255))  # no background's
    for seed in range(12):
        glyph = "3" if seed % 2 else ""
        picture = scenes.draw_counted(
            np.random.default_rng(seed), {"cat": [disc] * 4}, "cat", count, glyph
        )
        magenta = np.abs(picture - (255, 0, 255)).max(-1) < 30
        assert regions(magenta) == count, (seed, glyph)
    assert scenes.counted("cat", count).split(" ")[0] == scenes.NUMBERS[count - 1]


def test_counted_captions_have_the_words_of_the_prompt_sets():
    captions = set(scenes.draw_scenes(400, seed=3, kind="count")[1])
    assert {caption.split(" ")[0] for caption in captions} == set(scenes.NUMBERS)
    ours = [scenes.counted(noun, n) for noun in scenes.nouns("animals") for n in range(2, 7)]
    assert ours == prompts.load_prompts("counting_to_six")
    assert scenes.counted("fox", 1) == "one fox" and scenes.counted("fox", 2) == "two foxes"
    assert scenes.counted("hippopotamus", 3) == "three hippopotamuses"


def test_a_printed_digit_is_what_tells_two_scenes_apart():
    def draw(glyph):
        rng, sprites = np.random.default_rng(4), scenes.load_sprites()
        return scenes.draw_counted(rng, sprites, "frog", 2, glyph).astype(int)

    assert np.array_equal(draw("5"), draw("5"))
    changed = np.abs(draw("5") - draw("2")).max(-1) > 8
    rows, columns = np.argwhere(changed).T
    assert 10 < changed.sum() < 300 and np.ptp(rows) <= 20 and np.ptp(columns) <= 20


def test_the_prompt_files_name_what_was_drawn():
    assert prompts.load_prompts("animals") == with_articles("animals")
    assert prompts.load_prompts("animals_held_out") == with_articles("held_out_animals")
    assert prompts.load_prompts("objects") == with_articles("objects")


def test_every_noun_has_a_sprite_in_every_style():
    assert len(scenes.nouns()) == 109
    for noun, sprites in scenes.load_sprites().items():
        opacity = [np.asarray(sprite)[..., 3].mean() for sprite in sprites]
        assert len(sprites) == 4 and min(opacity) > 20, noun


def test_the_clip_recognises_fresh_scenes():
    pictures, captions = scenes.draw_scenes(300, seed=987, kind="alone")
    right = clip_top1(torch.tensor(pictures).permute(0, 3, 1, 2), captions, with_articles())
    assert right.float().mean() >= 0.945  # 0.968 of a thousand, less two standard errors


def test_the_clip_recognises_what_the_model_draws():
    nouns, pipeline = with_articles(), load_pipeline("models/emoji", "cpu")
    images = trainer.draw(pipeline, nouns, 10, 4.0, "nouns")
    assert clip_top1(images, nouns, nouns).float().mean() >= 0.92  # 0.96, less two standard errors


def test_a_stage_that_was_made_with_other_settings_is_refused(tmp_path):
    config = pretrain.Config(work=str(tmp_path), vae_steps=1, save_every=1)
    loss_fn = lambda model: model(torch.ones(1, 3, device=trainer.device())).square().mean()
    trainer.train("vae", config, torch.nn.Linear(3, 1), loss_fn)
    assert trainer.finished("vae", config, torch.nn.Linear(3, 1))
    config.unet_lr, config.vae_steps = 0.5, 2  # another stage's; and it may go on
    assert not trainer.finished("vae", config, torch.nn.Linear(3, 1))
    for name, value in (("vae_lr", 0.5), ("seed", 7), ("vae_batch", 8)):
        other = pretrain.Config(**vars(config) | {name: value})
        flag = f"^--{name.replace('_', '-')} {value}: .*vae.pt was made with "
        for stage in (trainer.finished, trainer.train):
            with pytest.raises(RunStopped, match=flag):
                stage("vae", other, torch.nn.Linear(3, 1), *[loss_fn] * (stage is trainer.train))


def test_no_text_is_unknown_to_the_tokenizer():
    tokenizer = load_pipeline("models/emoji", "cpu").tokenizer
    for text in ["a cat riding a bike", "qüixotic żółw 7", "日本"]:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in tokens
        assert tokenizer.decode(tokens).replace(" ", "") == text.replace(" ", "")


def test_the_text_encoder_of_the_pipeline_is_that_of_the_clip():
    """On any release of transformers: some know the weights' names with a prefix only, and would
    leave the weights random."""
    pipeline = load_pipeline("models/emoji", "cpu")
    model = CLIPModel.from_pretrained(pretrain.ROOT / "models/emoji/clip")
    ids = clip.tokenize(pipeline.tokenizer, ["a cat with a guitar"])
    expected = model.float().text_model(ids).last_hidden_state
    encoded = pipeline.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-4)


def test_a_stage_that_is_stopped_goes_on_to_the_same_weights(tmp_path):
    def stage(work, stop_at=None):
        def loss_fn(model):
            loss_fn.calls += 1
            if loss_fn.calls == stop_at:
                raise KeyboardInterrupt
            return model(torch.randn(8, 3, device=trainer.device())).square().mean()

        loss_fn.calls = 0
        torch.manual_seed(0)
        config = pretrain.Config(work=str(work), vae_steps=4, save_every=2)
        return trainer.train("vae", config, torch.nn.Linear(3, 1), loss_fn).state_dict()

    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = stage(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "stopped", stop_at=4)
    resumed = stage(tmp_path / "stopped")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_stage_of_counting_cards_makes_a_model_of_its_own(tmp_path, monkeypatch):
    sample = variants.sample_trajectories  # in two steps instead of ten
    monkeypatch.setattr(variants, "sample_trajectories", lambda pipeline, prompts, steps, *rest, **more:
                        sample(pipeline, prompts, 2, *rest, **more))
    config = pretrain.check(pretrain.Config(
        out=str(pretrain.ROOT / "models/emoji"), work=str(tmp_path), cards_out=str(tmp_path / "cards"),
        cards_steps=1, cards_scenes=8, cards_batch=4))
    unet = variants.train_cards(config)
    variants.export_variant(config, config.cards_out, unet, diffusion.build_scheduler())
    shipped, cards = load_pipeline("models/emoji"), load_pipeline(str(tmp_path / "cards"))
    for part, same in (("unet", False), ("vae", True), ("text_encoder", True)):
        weights = getattr(shipped, part).state_dict()
        trained = getattr(cards, part).state_dict()
        assert all(torch.equal(weights[key], trained[key]) for key in weights) == same, part
    assert not (tmp_path / "cards/README.md").exists()  # the shipped model's card says other things


def test_a_deeper_unet_begins_with_what_the_earlier_one_predicts():
    torch.manual_seed(0)
    config = diffusion.build_unet().config
    earlier = UNet2DConditionModel.from_config(
        dict(config) | dict(layers_per_block=1, in_channels=4, out_channels=4)
    )
    unet = diffusion.build_unet()
    diffusion.deepen(unet, earlier)
    x, t, embeds = torch.randn(2, 8, 16, 16), torch.tensor([10, 700]), torch.randn(2, 20, 128)
    with torch.no_grad():
        expected = earlier(x[:, :4], t, embeds).sample
        output = unet(x, t, embeds).sample
        again = diffusion.build_unet()
        diffusion.deepen(again, unet)
        assert torch.equal(again(x, t, embeds).sample, output)
    torch.testing.assert_close(output[:, :4], expected, rtol=1e-4, atol=1e-5)
    assert output[:, 4:].abs().max() > 0  # the new channels are there to be trained


def test_fakes_have_the_colours_of_their_pictures_and_not_the_shapes():
    pixels = trainer.to_pixels(scenes.draw_scenes(30, seed=8, kind="alone")[0])
    torch.manual_seed(0)
    smeared, shuffled, blobs = clip.fake(pixels).tensor_split(3)
    of_smeared, of_shuffled, of_blobs = pixels.tensor_split(3)
    torch.testing.assert_close(smeared.mean((2, 3)), of_smeared.mean((2, 3)), rtol=0, atol=0.1)
    same = [picture.flatten(1).sort().values for picture in (shuffled, of_shuffled)]
    assert torch.equal(*same)  # the same pixels, elsewhere
    for faked, picture in ((blobs, of_blobs), (smeared, of_smeared), (shuffled, of_shuffled)):
        assert (faked - picture).abs().mean() > 0.05
        assert (faked <= picture.amax((2, 3), keepdim=True) + 0.35).all()


def test_recoloured_pictures_keep_their_shapes_and_the_others_everything():
    pixels = trainer.to_pixels(scenes.draw_scenes(40, seed=8, kind="alone")[0])
    chosen = torch.arange(40) % 2 == 0
    torch.manual_seed(0)
    recoloured = clip.recolour(pixels, chosen)
    assert torch.equal(recoloured[~chosen], pixels[~chosen]) and recoloured.abs().max() < 1.001
    grey = (recoloured.std(1) < 1e-5).all((1, 2))
    assert 4 <= grey[chosen].sum() <= 16 and not grey[~chosen].any()


def test_a_near_miss_differs_from_its_caption_where_there_is_something_to_overlook():
    captions = ["a cat", "three mice", "one fox", "a cat with a guitar",
                "an owl on an orange striped background", "a pig on a blue background"]
    torch.manual_seed(0)
    for _ in range(20):
        plain, mice, fox, guitar, owl, pig = clip.near_misses(captions)
        assert plain == "a cat" and mice in {scenes.counted("mouse", n) for n in (1, 2, 4, 5, 6)}
        assert fox in {scenes.counted("fox", n) for n in range(2, 7)}
        assert guitar.startswith("a cat with a") and guitar != captions[3]
        assert owl.endswith("striped background") and owl.startswith("an owl on a")
        assert owl != captions[4] and pig != captions[5]


@pytest.mark.parametrize("flags, message", [
    (["--clip-steps", "0"], "--clip-steps 0: must be at least 1"),
    (["--unet-batch", "-3"], "--unet-batch -3: must be at least 1"),
    (["--vae-lr", "nan"], "--vae-lr nan: must be above 0"),
    (["--ema", "1"], "--ema 1.0: must be at least 0 and below 1"),
    (["--caption-dropout", "1.5"], "--caption-dropout 1.5: must be 0 to 1"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--work", "{file}"], "--work {file}: must be a folder"),
    (["--out", "{file}/model"], "--out {file}/model: must be a folder"),
    (["--start", "{file}.none"], "--start {file}.none: has no model"),
    (["--only", "vae"], "--only vae: only the stages flow and cards can run alone"),
    (["--only", "flow", "--out", "{file}.none"], "--out {file}.none: has no model"),
    (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
])
def test_a_setting_that_cannot_work_is_named_in_one_line(flags, message, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as stop:
        pretrain.parse_config([flag.format(file=file) for flag in flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message.format(file=file)) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_help_explains_every_setting_of_the_pretraining(capsys):
    with pytest.raises(SystemExit):
        pretrain.parse_config(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for field in fields(pretrain.Config):
        flag = "--" + field.name.replace("_", "-")
        explained = re.search(rf" {flag} {field.type.__name__.upper()} (?!--)(\w+)", words)
        assert explained, flag
    assert pretrain.parse_config(["--vae-batch", "4"]) == pretrain.Config(vae_batch=4)


def test_the_shipped_weights_stay_small():
    folder = pretrain.ROOT / "models/emoji"
    megabytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
    assert megabytes <= 32
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["weights_megabytes"] == pytest.approx(megabytes)


def test_a_picture_s_seed_is_its_place_also_in_a_later_batch(monkeypatch):
    seeds = []

    def sample_trajectories(pipeline, prompts, steps, guidance_scale, eta, generators, *_, **__):
        seeds.extend(generator.initial_seed() for generator in generators)
        return SimpleNamespace(images=torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8))

    monkeypatch.setattr(trainer, "sample_trajectories", sample_trajectories)
    images = trainer.draw(SimpleNamespace(device="cpu"), ["a cat"] * 150, 10, 4.0, "cats")
    assert len(images) == 150 and seeds == list(range(150))


def test_the_animals_share_is_of_the_pictures_of_animals():
    prompts_ = scenes.nouns() * 3
    chosen = trainer.of_animals(torch.arange(len(prompts_)), 3).flatten().tolist()
    animals = {*scenes.nouns("animals"), *scenes.nouns("held_out_animals")}
    assert chosen == [i for i, noun in enumerate(prompts_) if noun in animals]


def small_stage(work, steps=4, evaluate=None, **settings):
    """(config, weights) of a stage that trains three numbers."""
    torch.manual_seed(0)
    config = pretrain.Config(work=str(work), vae_steps=steps, **settings)
    model = trainer.train("vae", config, torch.nn.Linear(3, 1), lambda model: model(
        torch.randn(8, 3, device=trainer.device())).square().mean(), evaluate)
    return config, model.state_dict()


def test_a_finished_stage_hands_on_its_averaged_weights_and_an_unfinished_one_nothing(tmp_path):
    config, weights = small_stage(tmp_path, vae_lr=0.1)
    model = torch.nn.Linear(3, 1)
    assert trainer.finished("vae", config, model)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    newest = torch.load(tmp_path / "vae.pt", map_location=trainer.device())["model"]
    assert not torch.equal(newest["weight"], weights["weight"])
    config.vae_steps = 5
    assert not trainer.finished("vae", config, model)


def test_a_stage_that_shows_its_averaged_weights_trains_on_with_its_newest(tmp_path):
    shown = []

    def evaluate(model):
        shown.append(model.weight.clone())
        assert not model.training
        return "fine"

    (tmp_path / "shown").mkdir()
    _, plain = small_stage(tmp_path, vae_lr=0.1, save_every=2)
    _, weights = small_stage(tmp_path / "shown", evaluate=evaluate, vae_lr=0.1, save_every=2)
    assert len(shown) == 2 and torch.equal(shown[-1], plain["weight"])
    assert all(torch.equal(plain[key], weights[key]) for key in plain)


def test_a_stages_learning_rate_rises_for_300_updates_and_falls_to_a_fiftieth(tmp_path, monkeypatch):
    rates = learning_rates(monkeypatch)
    small_stage(tmp_path, steps=1200, vae_lr=0.5, save_every=2000)
    peak = rates.index(max(rates))
    assert len(rates) == 1200 and 250 <= peak <= 300 and 0.4 < rates[peak] < 0.5
    assert rates[0] == pytest.approx(0.5 / 300) and rates[-1] == pytest.approx(0.01, rel=1e-2)
    assert rates[:peak + 1] == sorted(rates[:peak + 1]) and rates[peak:] == sorted(rates[peak:])[::-1]
    assert rates[600] == pytest.approx(0.5 * 0.51)  # half-way down


def test_the_loss_of_noise_has_min_snr_weights_and_a_tenth_of_the_captions_is_left_out(monkeypatch):
    device, seen = trainer.device(), []
    monkeypatch.setattr(diffusion, "encode_pictures", lambda *_: torch.zeros(5, 8, 4, 4, device=device))
    monkeypatch.setattr(diffusion, "encode_captions", lambda *_: (
        torch.tensor([[0.0], [1.0]], device=device), torch.zeros(5, dtype=torch.long), 1))

    def model(noisy, timesteps, embeds):
        seen.append(embeds)
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    scheduler = diffusion.build_scheduler()
    pipeline = SimpleNamespace(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)
    torch.manual_seed(0)
    loss = diffusion.noise_loss(pipeline, None, None, 4000, pretrain.Config())(model)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    assert loss.item() == pytest.approx((snr.clamp(max=5) / snr).mean().item(), rel=0.01)
    assert seen[0].mean().item() == pytest.approx(0.1, abs=0.02)


def test_a_flow_time_is_the_timestep_of_the_same_signal_to_noise():
    alpha_bar = diffusion.build_scheduler().alphas_cumprod.double()
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    t = noise / (signal + noise)  # (1 − t) x_0 + t ε, but for a factor
    timesteps, known = variants.time_of_flow(alpha_bar, t)
    torch.testing.assert_close(timesteps, torch.arange(1000.0), rtol=0, atol=0.01)
    torch.testing.assert_close(known, t.float())
    timesteps, known = variants.time_of_flow(alpha_bar, torch.tensor([1e-4, 0.9999]))  # beyond its ends
    torch.testing.assert_close(timesteps, torch.tensor([0.0, 999.0]))
    torch.testing.assert_close(known, t[[0, -1]].float())


def test_an_exported_flow_model_is_sampled_with_the_scheduler_of_the_shipped_one(tmp_path):
    config = pretrain.Config(out=str(pretrain.ROOT / "models/emoji"))
    unet = load_pipeline("models/emoji-flow").unet
    variants.export_variant(config, tmp_path, unet, variants.flow_scheduler())
    exported, shipped = (load_pipeline(model).scheduler for model in (str(tmp_path), "models/emoji-flow"))
    ours, theirs = ({key: value for key, value in scheduler.config.items() if key != "_diffusers_version"}
                    for scheduler in (exported, shipped))
    assert type(exported) is type(shipped) and ours == theirs


def test_captions_are_encoded_in_training_as_the_pipeline_encodes_prompts():
    pipeline = load_pipeline("models/emoji", trainer.device())
    captions = ["a fox", "a hippopotamus with an ice cream", "a fox"]
    embeds, rows, empty = diffusion.encode_captions(pipeline.text_encoder, pipeline.tokenizer, captions)
    assert len(embeds) == 3  # each different one once, and the empty one
    expected = encode_prompts(pipeline, [*captions, ""])
    torch.testing.assert_close(embeds[[*rows.tolist(), empty]], expected, rtol=1e-4, atol=1e-4)


def test_an_export_is_a_model_of_the_networks_that_were_given(tmp_path):
    shipped, work = pretrain.ROOT / "models/emoji", tmp_path / "work"
    shutil.copytree(shipped / "tokenizer", work / "tokenizer")
    config, given = pretrain.Config(out=str(tmp_path / "model"), work=str(work)), load_pipeline(shipped)
    networks = CLIPModel.from_pretrained(shipped / "clip"), given.vae, given.unet
    diffusion.export(config, given.tokenizer, *networks)
    exported, given = load_pipeline(config.out), load_pipeline(shipped)
    for part in ("unet", "vae", "text_encoder"):
        weights = getattr(exported, part).state_dict()
        for key, value in getattr(given, part).state_dict().items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
    assert '"float32"' in (tmp_path / "model/text_encoder/config.json").read_text()
    pictures, captions = scenes.draw_scenes(8, seed=0)
    images = torch.tensor(pictures).permute(0, 3, 1, 2)
    scores = [get_reward(f"clip={folder}/clip", "cpu")(images, captions) for folder in (config.out, shipped)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


def test_a_digit_beside_counted_animals_tells_nothing_of_their_number(monkeypatch):
    drawn = []
    monkeypatch.setattr(scenes, "draw_counted", lambda rng, sprites, noun, count, glyph:
                        drawn.append((count, glyph)) or np.zeros((64, 64, 3), np.uint8))
    scenes.draw_scenes(1000, seed=0, kind="count")
    beside = [(count, int(glyph)) for count, glyph in drawn if glyph]
    assert 0.25 < len(beside) / 1000 < 0.35  # three in ten
    right = np.mean([count == digit for count, digit in beside])
    assert len(set(beside)) == 36 and 0.1 < right < 0.25


def test_a_caption_names_the_background_that_is_drawn(monkeypatch):
    drawn, draw = [], scenes.draw_background
    monkeypatch.setattr(scenes, "draw_background", lambda rng, *background: (
        drawn.append(background) or draw(rng, *background)))
    _, captions = scenes.draw_scenes(100, seed=0, kind="background")
    for caption, (pattern, colour) in zip(captions, drawn, strict=True):
        named = f"{scenes.with_article(colour)} {scenes.PATTERNS[pattern]}background"
        assert caption.endswith(f" on {named}"), caption


def test_a_pair_is_an_animal_with_a_thing_on_either_side_of_it(monkeypatch):
    centres, paste = [], scenes.paste
    monkeypatch.setattr(scenes, "paste", lambda *drawing: (
        centres.append(drawing[-1][0]) or paste(*drawing)))
    animals = {*with_articles("animals"), *with_articles("held_out_animals")}
    for caption in scenes.draw_scenes(100, seed=0, kind="pair")[1]:
        first, second = caption.split(" with ")
        assert first in animals and second in with_articles("objects")
    on_the_left = [animal < 0.5 < thing for animal, thing in zip(centres[::2], centres[1::2])]
    assert 30 < sum(on_the_left) < 70


def test_the_corner_of_a_counting_card_is_kept_free_of_animals():
    block = Image.new("RGBA", (64, 64), (255, 0, 255, 255))  # no background's colour
    for seed in range(20):
        picture = scenes.draw_counted(np.random.default_rng(seed), {"cat": [block] * 4}, "cat",
                                      seed % 6 + 1, "3", corner=True)
        magenta = np.abs(picture - (255.0, 0, 255)).max(-1) < 30
        assert magenta.any() and not magenta[48:62, 48:62].any(), seed


def test_bytes_become_pixels_and_bytes_again():
    pictures = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = trainer.to_pixels(pictures)
    assert pixels.shape == (1, 3, 16, 16) and pixels.aminmax() == (-1, 1)
    for off in (-0.4, 0.4):  # to the nearest, and not beyond 255
        again = trainer.to_bytes(pixels + off / 127.5).cpu()
        assert np.array_equal(again.permute(0, 2, 3, 1).numpy(), pictures)
    assert trainer.to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_a_stage_may_average_its_weights_in_its_own_way(tmp_path):
    for ema, newest in ((0.0, True), (0.5, False)):
        (tmp_path / str(ema)).mkdir()
        config = pretrain.Config(work=str(tmp_path / str(ema)), flow_steps=3, flow_lr=0.1,
                                 flow_ema=ema)
        weights = trainer.train("flow", config, torch.nn.Linear(3, 1), lambda model: (
            model(torch.ones(8, 3, device=trainer.device())) - 9).square().mean()).state_dict()
        saved = torch.load(tmp_path / str(ema) / "flow.pt", map_location=trainer.device())["model"]
        assert torch.equal(weights["weight"], saved["weight"]) == newest


def test_a_stages_gradient_is_cut_to_a_norm_of_one(tmp_path, monkeypatch):
    norms, AdamW = [], torch.optim.AdamW

    class Recorded(AdamW):
        def step(self, *_):
            grads = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat(grads).norm().item())
            return super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    config = pretrain.Config(work=str(tmp_path), vae_steps=2)
    trainer.train("vae", config, torch.nn.Linear(3, 1), lambda model: 1000 * model(
        torch.ones(8, 3, device=trainer.device())).square().mean())
    assert norms == pytest.approx([1.0, 1.0], rel=1e-3)


def loss_of_stage(stage, module, monkeypatch):
    """The loss that a stage gives to `train`, and the model, which is not trained."""
    given = []
    monkeypatch.setattr(module, "train", lambda name, config, model, loss_fn, evaluate: (
        given.append((loss_fn, model))))
    monkeypatch.setattr(module, "finished", lambda *_: False)
    stage()
    return given[0]


def test_the_flow_model_learns_the_velocity_of_its_teachers_picture_at_its_own_times(
        tmp_path, monkeypatch):
    """A teacher that knows its one latent, so the velocity is (x − x_0) / t, whatever the noise."""
    device, times, said = trainer.device(), [], []
    clean = torch.full((1, 8, 16, 16), 0.7, device=device)
    scheduler = diffusion.build_scheduler()
    alpha_bar = scheduler.alphas_cumprod.to(device).double()
    of_noise = ((1 - alpha_bar) / alpha_bar).log()  # which the timesteps between are linear in

    def teacher(x, timesteps, _):
        below, above = of_noise[timesteps.floor().long()], of_noise[timesteps.ceil().long()]
        level = torch.lerp(below, above, timesteps.double() % 1).view(-1, 1, 1, 1)
        noise = (x - (-level).sigmoid().sqrt() * clean) / level.sigmoid().sqrt()
        return SimpleNamespace(sample=noise)

    def model(x, timesteps, embeds):
        times.extend((timesteps / 1000).tolist())
        said.append(embeds.mean().item())
        return SimpleNamespace(sample=(x - clean) / (timesteps / 1000).view(-1, 1, 1, 1))

    teacher.state_dict = diffusion.build_unet().state_dict
    monkeypatch.setattr(variants, "load_pipeline", lambda _: SimpleNamespace(
        unet=teacher, vae=None, scheduler=scheduler, text_encoder=None, tokenizer=None))
    captions = torch.arange(2.0, device=device)[:, None], torch.zeros(1, dtype=torch.long), 1
    for name, value in (("match_time_embedding", None), ("encode_pictures", clean),
                        ("encode_captions", captions)):
        monkeypatch.setattr(variants, name, lambda *_, value=value: value)
    monkeypatch.setattr(scenes, "draw_scenes", lambda *_: (None, None))
    config = pretrain.Config(work=str(tmp_path), flow_batch=512)
    loss_fn, _ = loss_of_stage(lambda: variants.train_flow(config), variants, monkeypatch)
    torch.manual_seed(0)
    assert loss_fn(model) < 1e-4
    quantiles = torch.tensor(times).quantile(torch.tensor([0.25, 0.5, 0.75]))
    expected = torch.tensor([2 * t / (1 + t) for t in (0.25, 0.5, 0.75)])  # its shift is 2
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.01)
    assert said[0] == pytest.approx(2 * config.caption_dropout, abs=0.06)  # the empty caption


def test_a_fake_costs_clip_the_less_the_less_it_is_like_one_caption(tmp_path, monkeypatch):
    names = with_articles()[:9]
    monkeypatch.setattr(scenes, "draw_scenes", lambda *_, **__: (
        np.zeros((9, 64, 64, 3), np.uint8), names))
    tokenizer = load_pipeline("models/emoji", trainer.device()).tokenizer
    config = pretrain.Config(work=str(tmp_path), judge_batch=9)
    loss_fn, network = loss_of_stage(lambda: clip.train_clip(
        config, tokenizer, "judge", clip.build_clip(tokenizer)), clip, monkeypatch)
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"vision_model", "visual_projection", "logit_scale"}  # the texts stay

    directions = torch.eye(10, device=trainer.device())
    monkeypatch.setattr(torch, "randint", lambda *_: torch.arange(9))  # each picture once
    for name in ("fake", "spoil", "near_misses"):
        monkeypatch.setattr(clip, name, lambda unchanged: unchanged)

    def loss_where_fakes_are(direction):
        def embed(_, pixels, ids):
            said = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            texts = directions[[names.index(text) for text in said]]
            return torch.cat([texts[:9], directions[direction].expand(3, 10)]), texts

        monkeypatch.setattr(clip, "clip_embed", embed)
        scale = torch.tensor(2.0, device=trainer.device())
        return loss_fn(SimpleNamespace(logit_scale=scale)).item()

    like_none, like_another = loss_where_fakes_are(9), loss_where_fakes_are(8)
    assert like_none < like_another < loss_where_fakes_are(0)  # 0: for one of three its own


def test_a_decoder_that_is_trained_further_leaves_its_latents_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scenes", lambda *_: (np.zeros((2, 64, 64, 3), np.uint8), []))
    for name, encoder in (("vae", True), ("decoder", False)):
        config = pretrain.Config(work=str(tmp_path))
        given = None if name == "vae" else diffusion.build_vae().requires_grad_(False)
        with monkeypatch.context() as patch:
            _, vae = loss_of_stage(
                lambda: diffusion.train_vae(config, name, given), diffusion, patch)
        assert all(p.requires_grad for p in vae.decoder.parameters())
        assert all(p.requires_grad == encoder for p in vae.encoder.parameters())


def test_the_report_of_a_model_has_the_psnr_of_pixels_from_minus_one_to_one(tmp_path, monkeypatch):
    vae = SimpleNamespace(dtype=torch.float32,
                          encode=lambda pixels: SimpleNamespace(latents=pixels),
                          decode=lambda x: SimpleNamespace(sample=x - 0.1 * x.sign()))
    monkeypatch.setattr(pretrain, "load_pipeline", lambda _: SimpleNamespace(vae=vae))
    seen = []
    for name in ("clip_top1", "recognised"):
        monkeypatch.setattr(pretrain, name, lambda images, *_, **__: (
            seen.append(images.float()) or torch.ones(len(images))))
    monkeypatch.setattr(pretrain, "draw", lambda _, prompts, *__: (
        torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8)))
    figures = pretrain.report(tmp_path, images_per_noun=1, scene_count=4)
    assert figures["vae_psnr"] == round(10 * math.log10(2**2 / 0.1**2), 2)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    plain, grey, faked = seen[:3]
    assert (grey - plain.mean(1, keepdim=True)).abs().max() <= 0.5 and not torch.equal(faked, plain)


def test_a_flow_models_time_is_matched_with_the_timestep_of_its_signal_to_noise_at_all_times():
    alpha_bar, told, asked = diffusion.build_scheduler().alphas_cumprod, [], []
    teacher = SimpleNamespace(time_proj=lambda timesteps: told.append(timesteps),
                              time_embedding=lambda _: torch.ones(512, 1))
    student = SimpleNamespace(time_proj=lambda times: asked.append(times) or times[:, None] / 1000,
                              time_embedding=torch.nn.Linear(1, 1))
    variants.match_time_embedding(student, teacher, alpha_bar, steps=10)
    t = torch.cat(asked) / 1000
    assert t.min() < 0.03 and t.max() > 0.99 and t.mean().item() == pytest.approx(0.51, abs=0.02)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    inside = t < (noise / (signal + noise)).max()  # beyond it the teacher has no timestep
    known = torch.cat(told)[inside].round().long().clamp(0, 999)
    matched = (noise / (signal + noise))[known]
    torch.testing.assert_close(matched, t[inside], rtol=0, atol=0.02)


def test_a_vae_learns_latents_of_unit_variance_that_decode_alike_with_a_little_noise(
        tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scenes", lambda *_: (np.zeros((2, 64, 64, 3), np.uint8), []))
    config = pretrain.Config(work=str(tmp_path), vae_batch=64)
    loss_fn, _ = loss_of_stage(lambda: diffusion.train_vae(config), diffusion, monkeypatch)
    torch.manual_seed(0)
    losses, noise = [], []
    for std in (1.0, 2.0, 0.5):
        latents = std * torch.randn(64, 8, 16, 16, device=trainer.device())

        def decode(noisy, latents=latents):
            noise.append((noisy - latents).std().item())
            return SimpleNamespace(sample=-torch.ones(64, 3, 64, 64, device=trainer.device()))

        encoded = SimpleNamespace(latents=latents)
        losses.append(loss_fn(SimpleNamespace(
            encode=lambda _, encoded=encoded: encoded, decode=decode)).item())
    assert losses[0] < 1e-3  # what is decoded here is right
    assert losses[1:] == pytest.approx([0.02 * math.log(4) ** 2] * 2, rel=0.05)
    assert noise == pytest.approx([0.05] * 3, rel=0.05)


def test_scenes_are_of_all_kinds_in_their_shares():
    captions = scenes.draw_scenes(400, seed=0)[1]
    shares = {"background": 0.18, " with ": 0.2, tuple(scenes.NUMBERS): 0.17}
    for words, share in shares.items():
        found = sum(caption.startswith(words) if isinstance(words, tuple) else words in caption
                    for caption in captions)
        assert found / 400 == pytest.approx(share, abs=0.07), words
