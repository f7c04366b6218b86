"""Prompt sets, and drawing from them. A set is a file in prompts/, one prompt a line, or the product of two such files."""

from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "prompts"
NUMBERS = "two three four five six seven eight nine".split()
PRODUCTS = {  # every first part with every second part
    "animal_activities": ("animals", "{} {}", "activities"),  # a cat riding a bike
    "animal_objects": ("animals", "{} with {}", "objects"),  # a cat with a guitar
    "animal_objects_held_out": ("animals_held_out", "{} with {}", "objects"),
}
SETS = sorted([file.stem for file in FOLDER.glob("*.txt")] + [*PRODUCTS, "counting"])


def load_prompts(spec):
    """The prompts of a set in SETS or of a text file, in order. In a file, blank lines and lines that start with # do not
    count. Raises ValueError, one line, when there is no such set or file, or nothing in it."""
    if spec == "counting":
        return [f"{number} {animals}" for animals in load_prompts("animals_plural") for number in NUMBERS]
    if spec in PRODUCTS:
        first, form, second = PRODUCTS[spec]
        return [form.format(a, b) for a in load_prompts(first) for b in load_prompts(second)]
    file = FOLDER / f"{spec}.txt" if spec in SETS else Path(spec)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"prompts {spec!r}: no such set or file; choose {', '.join(SETS)}, or a text file of one prompt "
                         "a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {spec!r}: cannot be read ({error}); give a UTF-8 text file of one prompt a line") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompts {spec!r}: no prompt in it; write one a line (blank lines and # comments do not count)")
    return prompts


def set_names(specs):
    """The sets in a list such as "animals_held_out,objects"; "" has none."""
    return [name.strip() for name in specs.split(",") if name.strip()]


def sample_prompts(prompts, n, generator=None, group_size=1):
    """n prompts at random, each group_size times in a row. No prompt comes again before all have come once, so the groups of
    a batch have different prompts wherever there are enough. generator: a torch.Generator."""
    if n < 1 or group_size < 1 or n % group_size:
        raise ValueError(f"{n} prompts in groups of {group_size}: the first must be a positive multiple of the group size")
    device = generator.device if generator is not None else "cpu"
    order = []
    while len(order) < n // group_size:
        order += torch.randperm(len(prompts), generator=generator, device=device).tolist()
    return [prompts[i] for i in order[: n // group_size] for _ in range(group_size)]


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Print a random sample of a prompt set.")
    parser.add_argument("prompts", metavar="NAME", help=f"{', '.join(SETS)}, or a text file of one prompt a line")
    parser.add_argument("-n", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--seed", type=int, default=None, help="the same seed prints the same sample")
    args = parser.parse_args()
    try:
        prompts = load_prompts(args.prompts)
        generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
        print(*sample_prompts(prompts, args.n, generator), sep="\n")
        print(f"# {args.n} of {len(prompts)} prompts")
    except ValueError as error:
        parser.exit(2, f"{error}\n")
