"""Prompt sets: what they hold, and how prompts are drawn from them."""

import re
from collections import Counter

import pytest
import torch

from prompts import FOLDER, SETS, load_prompts, sample_prompts


def test_the_sets_have_the_sizes_that_the_documentation_gives():
    sizes = {"animals": 45, "animals_held_out": 24, "objects": 40, "activities": 3, "imagenet_animals": 398,
             "animal_activities": 45 * 3, "animal_objects": 45 * 40, "animal_objects_held_out": 24 * 40, "counting": 45 * 8,
             "animals_plural": 45, "pairs": 8}
    assert {name: len(load_prompts(name)) for name in SETS} == sizes


@pytest.mark.parametrize("name", SETS)
def test_prompts_are_clean_and_different(name):
    prompts = load_prompts(name)
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == " ".join(prompt.split()) and prompt.isascii() and prompt[-1].isalpha() for prompt in prompts)
    assert all(prompt[0].islower() for prompt in prompts)


@pytest.mark.parametrize("name", ["animals", "animals_held_out", "objects", "imagenet_animals", "animal_objects"])
def test_every_noun_has_the_article_that_its_sound_asks_for(name):
    for article, word in re.findall(r"\b(an?) (\w+)", " / ".join(load_prompts(name))):
        vowel = word[0].lower() in "aeiou" and not word.startswith(("European", "uni"))
        assert article == ("an" if vowel else "a"), f"{article} {word}"


def test_held_out_animals_are_held_out():
    assert not set(load_prompts("animals")) & set(load_prompts("animals_held_out"))
    assert not set(load_prompts("animal_objects")) & set(load_prompts("animal_objects_held_out"))
    assert set(load_prompts("pairs")) < set(load_prompts("animal_objects"))


def test_products_read_like_the_papers_prompts():
    assert "a cat riding a bike" in load_prompts("animal_activities")
    assert "a cat with a guitar" in load_prompts("animal_objects")
    assert "an elephant with an umbrella" in load_prompts("animal_objects_held_out")
    assert {"five wolves", "two mice", "three sheep"} <= set(load_prompts("counting"))


def test_a_set_and_its_file_are_the_same():
    assert load_prompts(str(FOLDER / "animals.txt")) == load_prompts("animals")


def test_a_file_is_one_prompt_a_line_without_comments_and_blank_lines(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeff# mine\r\n\r\n  a red cat  \r\na café, at night\r\n   # not this\r\n".encode())
    assert load_prompts(str(file)) == ["a red cat", "a café, at night"]


@pytest.mark.parametrize("spec, says", [("animal", "imagenet_animals"), ("animal", "no such set or file"), ("no/such.txt", "no such set or file"),
                                        ("", "cannot be read"), ("FOLDER", "cannot be read"), ("EMPTY", "no prompt in it"),
                                        ("BINARY", "cannot be read")])
def test_what_holds_no_prompts_is_refused_in_one_line_that_names_it(tmp_path, spec, says):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    spec = {"FOLDER": str(tmp_path), "EMPTY": str(tmp_path / "empty.txt"), "BINARY": str(tmp_path / "binary.txt")}.get(spec, spec)
    with pytest.raises(ValueError) as error:
        load_prompts(spec)
    assert repr(spec) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_the_same_seed_draws_the_same_prompts():
    draws = [sample_prompts(load_prompts("animals"), 16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_groups_stand_in_a_row_and_do_not_repeat_while_prompts_are_left():
    drawn = sample_prompts(load_prompts("animals"), 40, torch.Generator().manual_seed(0), group_size=4)
    assert all(len(set(drawn[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert set(Counter(drawn).values()) == {4}


def test_every_prompt_comes_equally_often_when_there_are_more_draws_than_prompts():
    counts = Counter(sample_prompts(["a", "b", "c"], 32, torch.Generator().manual_seed(0)))
    assert sorted(counts.values()) == [10, 11, 11]


@pytest.mark.parametrize("n, group_size", [(0, 1), (-4, 1), (10, 4), (8, 0)])
def test_a_number_of_prompts_that_groups_cannot_make_is_refused(n, group_size):
    with pytest.raises(ValueError, match="multiple of the group size"):
        sample_prompts(["a cat"], n, group_size=group_size)
