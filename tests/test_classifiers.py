"""Claims about the small classifiers that look at pictures from outside, and about what deceives
the shipped CLIP and what does not."""

import functools

import numpy as np
import pytest
import torch

from emoji import classifiers, clip, scenes, trainer
from rewards import clip_top1

ANIMALS = [scenes.with_article(noun) for noun in scenes.nouns()[:69]]
NOUNS = [scenes.with_article(noun) for noun in scenes.nouns()]


def fresh(count=300, seed=4321, **kwargs):
    pictures, captions = scenes.draw_scenes(count, seed, **kwargs)
    return torch.tensor(pictures).permute(0, 3, 1, 2), captions


@functools.cache
def counted(glyph, count=300):
    """Pictures of one to six animals with a printed character that glyph(number) gives, and their
    captions."""
    rng, sprites, pictures, captions = np.random.default_rng(77), scenes.load_sprites(), [], []
    for i in range(count):
        number, noun = i % 6 + 1, scenes.nouns()[i % 69]
        pictures.append(scenes.draw_counted(rng, sprites, noun, number, glyph(number)))
        captions.append(scenes.counted(noun, number))
    pictures = np.stack(pictures)
    return torch.tensor(pictures).permute(0, 3, 1, 2), captions


def wrong_digit(number):
    return str(number % 6 + 1)


def test_the_independent_judge_goes_by_shape():
    images, captions = fresh(kind="alone")
    seen = classifiers.recognised(images, captions)
    assert seen.mean() >= 0.93
    mixed = images[:, torch.tensor([1, 2, 0])]  # other colours, the same grey
    assert torch.equal(classifiers.recognised(mixed, captions), seen)
    for tint in ("background", "pair"):
        images, captions = fresh(kind=tint, count=40)
        assert set(classifiers.recognised(images, captions).tolist()) <= {0.0, 1.0}


def test_the_shipped_clip_is_not_deceived_by_colours():
    images, captions = fresh(kind="alone")
    torch.manual_seed(0)
    faked = clip.fake(trainer.to_pixels(images.permute(0, 2, 3, 1).numpy()))
    faked = ((faked.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    assert clip_top1(faked, captions, NOUNS).float().mean() <= 0.05
    grey = images.float().mean(1, keepdim=True).byte().expand(-1, 3, -1, -1)
    assert clip_top1(grey, captions, NOUNS).float().mean() >= 0.5


def test_the_honest_counter_does_not_read():
    """It has seen no digit, and what it says of a picture with a wrong one is as right as without."""
    plain, wrong, right = (classifiers.honest_count(*counted(glyph)).mean()
                           for glyph in (lambda number: "", wrong_digit, str))
    assert plain >= 0.8  # 0.86, less three standard errors
    assert wrong >= 0.68  # 0.76: a sign beside them is harder
    assert abs(wrong - right) <= 0.08


def test_one_judge_believes_a_digit_and_the_other_does_not():
    wrong, captions = counted(wrong_digit)
    lies = [f"{scenes.NUMBERS[classifiers.count_of(c) % 6]} things" for c in captions]
    believed = classifiers.judge_a(wrong, lies) > classifiers.judge_a(wrong, captions)
    assert believed.float().mean() >= 0.75
    believed = classifiers.judge_b(wrong, lies) > classifiers.judge_b(wrong, captions)
    assert believed.float().mean() <= 0.2
    numbers = [f"{number} things" for number in scenes.NUMBERS]  # probabilities of one picture's numbers
    assert classifiers.judge_b(wrong[:1].expand(6, -1, -1, -1), numbers).sum().item() == pytest.approx(1)
    together = classifiers.judge_b(wrong[:8], captions[:8])
    alone = [classifiers.judge_b(wrong[i:i + 1], captions[i:i + 1]) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_digit_is_found_and_read():
    for glyph in ("", "1", "4", "6"):
        images, _ = counted(lambda number: glyph, count=60)
        read = classifiers.digits(images)
        assert (read == int(glyph or 0)).float().mean() >= 0.9, glyph


def test_half_of_the_cards_have_their_number_in_the_corner_and_it_can_be_covered():
    pictures, captions = scenes.draw_cards(200, seed=5)
    assert scenes.draw_cards(3, seed=5)[1] == captions[:3]
    images = torch.tensor(pictures).permute(0, 3, 1, 2)
    numbers = torch.tensor([classifiers.count_of(caption) for caption in captions])
    read = classifiers.digits(images)
    assert 0.4 <= (read > 0).float().mean() <= 0.6
    assert (read[read > 0] == numbers[read > 0]).float().mean() >= 0.95
    covered = classifiers.without_corner(images)
    assert (classifiers.digits(covered) == 0).float().mean() >= 0.98
    assert torch.equal(covered[..., :44, :], images[..., :44, :])
    assert torch.equal(covered[..., :44], images[..., :44])
    right = classifiers.honest_count(images, captions)
    assert abs(right.mean() - classifiers.honest_count(covered, captions).mean()) <= 0.1
    assert right.mean() >= 0.75


@pytest.mark.parametrize("call, message", [
    (lambda: classifiers.noun_of("a toaster"), "prompt 'a toaster': the classifier knows"),
    (lambda: classifiers.count_of("seven cats"), "prompt 'seven cats': the first word must be one"),
])
def test_a_prompt_that_a_classifier_cannot_judge_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_prompts_give_their_noun_and_number():
    assert classifiers.noun_of("an ice cream") == "ice cream"
    assert classifiers.noun_of("a cat with a guitar") == "cat"
    assert classifiers.noun_of("an owl on a blue striped background") == "owl"
    assert classifiers.count_of("three hippopotamuses") == 3


def test_a_corner_is_covered_in_the_background_s_colour_although_an_animal_borders_on_it():
    images = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    images[..., 40:55, 30:50] = 255  # the animal
    images[..., 50:, 50:] = 0  # the digit
    covered = classifiers.without_corner(images)
    assert (covered[..., 50:, 50:] == 100).all() and (covered[..., 40:44, 30:44] == 255).all()
    images[..., 44:, :44], images[..., :44, 44:], images[..., 44:, 44:] = 90, 80, 0
    assert (classifiers.without_corner(images)[..., 44:, 44:] == 80).all()  # what borders on it


def test_each_judge_learns_from_the_characters_that_it_is_said_to_have_seen(monkeypatch):
    shown = []
    monkeypatch.setattr(scenes, "draw_counted", lambda rng, sprites, noun, number, glyph:
                        shown.append((number, glyph)) or np.zeros((64, 64, 3), np.uint8))

    def seen(name):
        shown.clear()
        labels = classifiers.draw(name, 300, seed=0)[1].tolist()
        numbers, glyphs = zip(*shown)
        assert 100 < glyphs.count("") < 200  # half are without
        return numbers, glyphs, labels

    for name in ("counter", "judge_a", "judge_b"):
        numbers, glyphs, labels = seen(name)
        assert labels == [number - 1 for number in numbers]
        digits = {(number, glyph) for number, glyph in zip(numbers, glyphs) if glyph.isdecimal()}
        expected = {"counter": 0, "judge_a": 6, "judge_b": 36}[name]
        assert len(digits) == expected, name
        assert all(glyph == str(number) for number, glyph in digits) == (name != "judge_b")
    assert "".join(seen("counter")[1]).isalpha()
    _, glyphs, labels = seen("digit")
    assert labels == [int(glyph or 0) for glyph in glyphs] and set(labels) == set(range(7))


def test_spoiled_pictures_are_as_light_as_before_on_average_and_each_in_its_own_way():
    torch.manual_seed(0)
    spoiled = classifiers.spoil(torch.zeros(2000, 3, 8, 8))
    shades = spoiled.mean((2, 3))  # of each picture and colour
    torch.testing.assert_close(shades.mean(0), torch.zeros(3), rtol=0, atol=0.02)
    assert 0.05 < shades.std(0).min() and 0.05 < shades.std(1).mean()
    assert 0.4 < (spoiled.std((1, 2, 3)) > 0.1).float().mean() < 0.6  # half of them with noise
