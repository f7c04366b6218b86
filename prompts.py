"""Prompt sets, and drawing from them.

A set is a file in prompts/, one prompt a line, or the product of two such files. Your own prompts
are a text file of one prompt a line, or a .jsonl file of one {"prompt": ...} a line.
"""

import codecs
import hashlib
import json
import re
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "prompts"
NUMBERS = "two three four five six seven eight nine".split()
PRODUCTS = {  # every first part with every second part
    "animal_activities": ("animals", "{} {}", "activities"),  # a cat riding a bike
    "animal_objects": ("animals", "{} with {}", "objects"),  # a cat with a guitar
    "animal_objects_held_out": ("animals_held_out", "{} with {}", "objects"),
}
COUNTING = {  # each number with every animal: two cats, three cats ...
    "counting": NUMBERS, "counting_to_six": NUMBERS[:5],
    "three_animals": NUMBERS[1:2], "four_animals": NUMBERS[2:3],
}
SETS = sorted([file.stem for file in FOLDER.glob("*.txt")] + [*PRODUCTS, *COUNTING])


def load_prompts(spec):
    """The prompts of a set in SETS or of a file, in order, with repetitions.

    In a file, blank lines and lines that start with # do not count. Raises ValueError, one line,
    for anything that is no UTF-8 file of prompts, or that holds none.
    """
    if spec in COUNTING:
        animals = load_prompts("animals_plural")
        return [f"{number} {animal}" for animal in animals for number in COUNTING[spec]]
    if spec in PRODUCTS:
        first, form, second = PRODUCTS[spec]
        return [form.format(a, b) for a in load_prompts(first) for b in load_prompts(second)]

    def refuse(fault):
        raise ValueError(f"prompts {spec!r}: {fault}") from None

    file = FOLDER / f"{spec}.txt" if spec in SETS else Path(spec)
    if file.suffix.lower() in (".json", ".csv", ".tsv"):
        refuse(f"{file.suffix} files are not read; write one prompt a line into a .txt file, or "
               'one {"prompt": ...} a line into a .jsonl file')
    try:
        data = file.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            refuse("it is in UTF-16; save it as UTF-8")
        text = data.decode().replace("\ufeff", "")  # the mark that some editors put first
    except FileNotFoundError:
        refuse(f"no such set or file; choose {', '.join(SETS)}, or a file of one prompt a line; in a list a "
               "comma ends a path")
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"cannot be read ({error}); give a UTF-8 text file of one prompt a line")
    if "\0" in text:
        refuse("it has NUL characters, as UTF-16 does when it is read as UTF-8; save it as UTF-8")
    # not splitlines(): U+2028, U+0085 and form feeds come with copied text and end no line
    lines = {number: line.strip() for number, line in enumerate(re.split("\r\n|\n|\r", text), 1)}
    lines = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    if not lines:
        refuse("no prompt in it; write one a line (blank lines and # comments do not count)")
    if file.suffix.lower() != ".jsonl":
        for number, line in lines.items():
            if re.match(r'[\[{]\s*"', line):
                refuse(f"line {number} is JSON; give the file a name that ends in .jsonl")
        return list(lines.values())

    prompts = []
    for number, line in lines.items():
        try:
            row = json.loads(line)
        except ValueError as error:
            refuse(f"line {number} is no JSON ({error})")
        if not isinstance(row, dict) or "prompt" not in row:
            keys = ", ".join(row) or "no key" if isinstance(row, dict) else type(row).__name__
            refuse(f'line {number} has no "prompt", but {keys}; write one {{"prompt": ...}} a line')
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            refuse(f'line {number}: its "prompt" is {prompt!r:.80}; give a text')
        if re.search("[\0\ud800-\udfff]", prompt):
            refuse(f"line {number}: its prompt has a NUL or half a character; mend {prompt!r:.80}")
        prompts.append(prompt.strip())
    return prompts


def digest(content):
    """What tells one text or list from another, 64 digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def cut_prompts(tokenizer, prompts):
    """{prompt: its end, which the text encoder never sees} for the prompts that are too long.

    tokenizer: one of transformers that ends a text with one special token, as CLIP's and T5's do.
    """
    longest, unique = tokenizer.model_max_length, list(dict.fromkeys(prompts))
    rows = tokenizer(unique, truncation=False, verbose=False).input_ids
    return {prompt: tokenizer.decode(tokens[longest - 1 : -1]).strip()
            for prompt, tokens in zip(unique, rows) if len(tokens) > longest}


def cut_notice(tokenizer, prompts):
    """One line about the prompts that the tokenizer cuts, with an example. "" if it cuts none."""
    cut = cut_prompts(tokenizer, prompts)
    if not cut:
        return ""
    prompt, end = next(iter(cut.items()))
    return (f"prompts: {len(cut)} of {len(set(prompts))} have more than the "
            f"{tokenizer.model_max_length} tokens that the text encoder reads; it does not see the "
            f"end, such as {end!r:.80} of {prompt!r:.80}")


def set_names(specs):
    """The sets in a list such as "animals_held_out,objects"; "" has none. So no path may have a comma."""
    return [name.strip() for name in specs.split(",") if name.strip()]


def sample_prompts(prompts, n, generator=None, group_size=1):
    """n prompts at random, each group_size times in a row. generator: a torch.Generator.

    No prompt comes again before all have come once. So the groups of a batch have different prompts
    where there are enough.
    """
    if n < 1 or group_size < 1 or n % group_size:
        raise ValueError(f"{n} prompts in groups of {group_size}: the first must be a positive "
                         "multiple of the group size")
    device = generator.device if generator is not None else "cpu"
    order = []
    while len(order) < n // group_size:
        order += torch.randperm(len(prompts), generator=generator, device=device).tolist()
    return [prompts[i] for i in order[: n // group_size] for _ in range(group_size)]


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Print a random sample of a prompt set.")
    parser.add_argument("prompts", metavar="NAME",
                        help=f"{', '.join(SETS)}, or a .txt or .jsonl file of one prompt a line")
    parser.add_argument("-n", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--seed", type=int, default=None, help="the same seed: the same sample")
    args = parser.parse_args()
    if args.n < 1:
        parser.exit(2, f"-n {args.n}: must be at least 1\n")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.exit(2, f"--seed {args.seed}: must be at least 0 and below 2**63\n")
    try:
        prompts = load_prompts(args.prompts)
        generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
        print(*sample_prompts(prompts, args.n, generator), sep="\n")
        print(f"# {args.n} of {len(prompts)} prompts")
    except ValueError as error:
        parser.exit(2, f"{error}\n")
