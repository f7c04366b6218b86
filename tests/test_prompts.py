"""Prompt sets and files: what they hold, and how prompts are drawn from them."""

import json
import re
import runpy
import sys
from collections import Counter

import pytest
import torch
from transformers import CLIPTokenizer

import prompts
from prompts import FOLDER, SETS, cut_notice, cut_prompts, load_prompts, sample_prompts


def test_the_sets_have_the_sizes_that_the_documentation_gives():
    sizes = {"animals": 45, "animals_held_out": 24, "objects": 40, "activities": 3,
             "imagenet_animals": 398, "animal_activities": 45 * 3, "animal_objects": 45 * 40,
             "animal_objects_held_out": 24 * 40, "counting": 45 * 8, "counting_to_six": 45 * 5,
             "three_animals": 45, "four_animals": 45, "animals_plural": 45, "pairs": 8}
    assert {name: len(load_prompts(name)) for name in SETS} == sizes


@pytest.mark.parametrize("name", SETS)
def test_prompts_are_clean_and_different(name):
    prompts = load_prompts(name)
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == " ".join(prompt.split()) and prompt.isascii() for prompt in prompts)
    assert all(prompt[0].islower() and prompt[-1].isalpha() for prompt in prompts)


@pytest.mark.parametrize("name", ["animals", "animals_held_out", "objects", "imagenet_animals",
                                  "animal_objects"])
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
    text = "\ufeff# mine\r\n\r\n  a red cat  \r\na café, at night\r\n   # not this\r\n"
    file.write_bytes(text.encode())
    assert load_prompts(str(file)) == ["a red cat", "a café, at night"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_alone_end_a_line(tmp_path, end):
    """str.splitlines has eight more, which come with text that was copied from elsewhere."""
    others = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
    prompts = [f"a cat{other} in the rain" for other in others]
    (tmp_path / "mine.txt").write_bytes(end.join(prompts).encode())
    assert load_prompts(str(tmp_path / "mine.txt")) == prompts


def test_repeated_prompts_stay_and_lines_of_spaces_do_not(tmp_path):
    (tmp_path / "mine.txt").write_bytes("a cat\n \t \na dog\n\u3000\u2028\na cat\n\n".encode())
    assert load_prompts(str(tmp_path / "mine.txt")) == ["a cat", "a dog", "a cat"]


def test_the_mark_at_the_start_of_a_file_is_no_part_of_a_prompt_where_two_were_joined(tmp_path):
    parts = ["a cat\n", "# more\n", "a dog\n"]
    (tmp_path / "mine.txt").write_bytes(b"".join(part.encode("utf-8-sig") for part in parts))
    assert load_prompts(str(tmp_path / "mine.txt")) == ["a cat", "a dog"]


def test_the_prompts_of_a_jsonl_file_are_its_prompt_fields(tmp_path):
    prompts = ["a cat", "a \"café\"\u2028at night", "# not a comment", "a cat", "two\nlines"]
    rows = [json.dumps({"id": i, "prompt": f" {prompt} "}, ensure_ascii=i % 2 == 0)
            for i, prompt in enumerate(prompts)]
    (tmp_path / "mine.jsonl").write_bytes("\ufeff# mine\r\n\r\n".encode()
                                          + "\r\n".join(rows).encode())
    assert load_prompts(str(tmp_path / "mine.jsonl")) == prompts


UNREADABLE = {
    "empty.txt": (b"# nothing\n\n", "no prompt in it"), "empty.jsonl": (b"\n", "no prompt in it"),
    "latin.txt": ("a café".encode("latin-1"), "cannot be read"),
    "marked.txt": ("a cat\na dog\n".encode("utf-16"), "in UTF-16; save it as UTF-8"),
    "big.txt": (b"\xfe\xff" + "a cat\n".encode("utf-16-be"), "in UTF-16; save it as UTF-8"),
    "unmarked.txt": ("a cat\na dog\n".encode("utf-16-le"), "NUL characters, as UTF-16"),
    "unmarked_big.jsonl": ('{"prompt": "a"}'.encode("utf-16-be"), "NUL characters, as UTF-16"),
    "nul.txt": (b"a cat\na \0 dog\n", "NUL characters"),
    "array.json": (b'["a cat"]', ".json files are not read"),
    "table.csv": (b"id,prompt\n1,a cat\n", ".csv files are not read"),
    "TABLE.CSV": (b"id,prompt\n1,a cat\n", ".CSV files are not read"),
    "rows.txt": (b'\n{"prompt": "a cat"}\n', "line 2 is JSON"),
    "text.jsonl": (b'{"prompt": "a"}\n{"text": "a cat", "id": 1}',
                   'line 2 has no "prompt", but text, id'),
    "none.jsonl": (b"\n{}", 'line 2 has no "prompt", but no key'),
    "list.jsonl": (b'["a cat"]', 'line 1 has no "prompt", but list'),
    "words.jsonl": (b'{"prompt": "a"}\na cat', "line 2 is no JSON"),
    "number.jsonl": (b'{"prompt": 3}', 'line 1: its "prompt" is 3; give a text'),
    "blank.jsonl": (b'{"prompt": " "}', "line 1: its \"prompt\" is ' '; give a text"),
    "escaped.jsonl": (b'{"prompt": "a \\u0000 cat"}', "line 1: its prompt has a NUL"),
    "half.jsonl": (b'{"prompt": "a \\ud83d cat"}', "half a character")}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_not_one_of_prompts_is_refused_in_one_line_that_names_it(tmp_path, name):
    content, says = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_prompts(str(tmp_path / name))
    said = str(error.value)
    assert repr(str(tmp_path / name)) in said and says in said and "\n" not in said


@pytest.mark.parametrize("spec, says", [
    ("animal", "imagenet_animals"), ("animal", "no such set or file"),
    ("no/such.txt", "no such set or file"), ("no/such.jsonl", "no such set or file"),
    ("", "cannot be read"), (str(FOLDER), "cannot be read")])
def test_what_is_no_set_and_no_file_is_refused_in_one_line_that_names_it(spec, says):
    with pytest.raises(ValueError) as error:
        load_prompts(spec)
    said = str(error.value)
    assert repr(spec) in said and says in said and "\n" not in said


@pytest.fixture
def tokenizer():
    """CLIP's, of 20 tokens: start, 18 of the text, end. Each animal of the emoji set is a token."""
    return CLIPTokenizer.from_pretrained(FOLDER.parent / "models/emoji/tokenizer")


def test_what_the_tokenizer_cuts_off_is_what_stands_behind_its_last_token(tokenizer):
    fits, long = "cat " * 17 + "dog", "cat " * 18 + "dog fox"
    cut = cut_prompts(tokenizer, ["a cat", fits, long, long, fits])
    assert cut == {long: "dog fox"}
    seen = [tokenizer(text, truncation=True).input_ids for text in (long, "cat " * 18)]
    assert seen[0] == seen[1]  # so the two are one prompt to the text encoder


def test_one_line_tells_how_many_prompts_are_cut_with_an_example(tokenizer):
    assert cut_notice(tokenizer, ["a cat", "a dog"]) == ""
    long = ["cat " * 18 + animal for animal in ("dog", "fox")]
    said = cut_notice(tokenizer, [*long, long[0], "a cat"])
    assert said.startswith("prompts: 2 of 3 have more than the 20 tokens")
    assert "such as 'dog' of 'cat cat" in said and "\n" not in said


def test_a_run_says_once_which_prompts_are_cut(tmp_path, capsys):
    import ddpo
    import training
    (tmp_path / "mine.txt").write_text("cat " * 18 + "dog\na cat\n")
    settings = dict(prompts=str(tmp_path / "mine.txt"), out=str(tmp_path), watch="", images=4,
                    group_size=2, sample_batch=4, updates=1, steps=2, epochs=1, eval_images=2,
                    device="cpu", dtype="fp32")
    training.start(ddpo.check(ddpo.Config(**settings)))
    said = capsys.readouterr().err
    assert said.count("prompts: 1 of 2 have more than the 20 tokens") == 1
    assert "Token indices" not in said and "truncated" not in said


def test_the_same_seed_draws_the_same_prompts():
    draws = [sample_prompts(load_prompts("animals"), 16, torch.Generator().manual_seed(seed))
             for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_groups_stand_in_a_row_and_do_not_repeat_while_prompts_are_left():
    generator = torch.Generator().manual_seed(0)
    drawn = sample_prompts(load_prompts("animals"), 40, generator, group_size=4)
    assert all(len(set(drawn[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert set(Counter(drawn).values()) == {4}


def test_every_prompt_comes_equally_often_when_there_are_more_draws_than_prompts():
    counts = Counter(sample_prompts(["a", "b", "c"], 32, torch.Generator().manual_seed(0)))
    assert sorted(counts.values()) == [10, 11, 11]


@pytest.mark.parametrize("n, group_size", [(0, 1), (-4, 1), (10, 4), (8, 0)])
def test_a_number_of_prompts_that_groups_cannot_make_is_refused(n, group_size):
    with pytest.raises(ValueError, match="multiple of the group size"):
        sample_prompts(["a cat"], n, group_size=group_size)


def test_the_command_line_shows_the_sample_of_its_seed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prompts.py", "animals", "-n", "5", "--seed", "3"])
    runpy.run_path(prompts.__file__, run_name="__main__")
    animals = load_prompts("animals")
    drawn = sample_prompts(animals, 5, torch.Generator().manual_seed(3))
    assert capsys.readouterr().out.splitlines() == [*drawn, f"# 5 of {len(animals)} prompts"]
    monkeypatch.setattr(sys, "argv", ["prompts.py", "animals", "-n", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(prompts.__file__, run_name="__main__")
    assert capsys.readouterr().err == "-n 0: must be at least 1\n"


def test_a_set_of_one_number_is_of_the_number_that_it_is_named_after():
    for number in ("three", "four"):
        expected = [f"{number} {animal}" for animal in load_prompts("animals_plural")]
        assert load_prompts(f"{number}_animals") == expected
