"""The tables and the curves of time_to_target.py, from its record alone."""

import math
import statistics
from pathlib import Path

from benchmarks.epoch import markdown

ROOT = Path(__file__).resolve().parents[1]
SIDES = "TRL", "ours"
SIZE_ALONE = "size alone"
COLUMNS = {  # heading: (key of an epoch's row, format)
    "seconds from the first step": ("seconds", ".1f"),
    "to the size alone": (SIZE_ALONE, ".1f"),
    "from the start of the process": ("seconds_from_start", ".1f"),
    "epochs": ("epoch", "d"),
    "pictures": ("pictures", ",d"),
    "UNet rows without gradient": ("rows_sample", ",d"),
    "with gradient": ("rows_update", ",d"),
}


def end_of(trial, key):
    """(reached, value at the target); where it was not reached, the value is that at the last
    epoch, and the real one is more. key SIZE_ALONE: the seconds to the size, recognised or not."""
    rows, reached = trial["epochs"], trial["reached"]
    if key == SIZE_ALONE:
        small = [i for i, row in enumerate(rows)
                 if row.get("size", math.inf) <= trial["target"]["size"]]
        rows, reached, key = rows[:small[0] + 1] if small else rows, bool(small), "seconds"
    return reached, rows[-1][key]


def to_target(trials, key):
    """[end_of] of trials, from the least to the most."""
    return sorted((end_of(trial, key) for trial in trials), key=lambda end: (not end[0], end[1]))


def cell(reached, value, form):
    return f"{'' if reached else '>'}{value:{form}}"


def median(values):
    return values[len(values) // 2]  # of an odd number, in order


def several(trials, key, form):
    """"median (min to max)" of what trials took to the target; a > is for "not by then"."""
    values = to_target(trials, key)
    middle, low, high = (cell(*value, form) for value in (median(values), values[0], values[-1]))
    return f"{middle} ({low} to {high})"


def ratio(record, key):
    """TRL's median over ours."""
    theirs, ours = (median(to_target(record["sides"][side]["trials"], key)) for side in SIDES)
    return cell(theirs[0], theirs[1] / ours[1], ".1f") + "x" if ours[0] else ""


def results(record, columns):
    """[row of a table]: what it took to the target, median (min to max) over the seeds, with the
    pictures there."""
    rows = [["", *columns, "kB", "recognised"]]
    for side in SIDES:
        trials = record["sides"][side]["trials"]
        ends = [trial["epochs"][-1] for trial in trials]
        cells = [several(trials, key, form) for key, form in columns.values()]
        for key in ("size", "recognition"):
            cells.append(f"{statistics.median(row.get(key, math.nan) for row in ends):.2f}")
        rows.append([side, *cells])
    return [*rows, ["TRL over ours", *(ratio(record, key) for key, _ in columns.values()), "", ""]]


def headline(record):
    """The Markdown table of the project's README."""
    return markdown(results(record, dict(list(COLUMNS.items())[:3])))


def table(record):
    """The Markdown tables of a record: `results`, and the settings that the searches found."""
    base, sides, empty = record["base"], record["sides"], [""] * len(COLUMNS)
    rows = results(record, COLUMNS)
    rows.append(["base model", *empty, f"{base['size']:.2f}", f"{base['recognition']:.2f}"])

    searches = [["search", "settings tried", "at the target", "the first, seconds",
                 "the best, seconds", "settings that were better on all seeds"]]
    for side in SIDES:
        tried = sides[side]["search"]
        ends = [(trial["reached"], trial["last"][0]["seconds"]) for trial in tried if trial["last"]]
        reached = [seconds for at_target, seconds in ends if at_target]
        settings = " ".join(f"{key}={value}" for key, value in sides[side]["best"].items())
        first, best = cell(*ends[0], ".1f"), f"{min(reached):.1f}" if reached else ""
        searches.append([side, f"{len(tried)}", f"{len(reached)}", first, best, f"`{settings}`"])
    return f"{markdown(rows)}\n\n{markdown(searches)}"


def tables(records):
    return "\n\n".join(f"{name}\n\n{table(record)}" for name, record in records.items())


def draw(record, path):
    """Size against seconds, a line a trial."""
    from reproduce_figures import plots, save_figure

    smaller = record["rule"]["size"]
    figure, (axis,) = plots(1, width=6.4, height=3.6)
    for colour, side in zip(("C7", "C0"), SIDES):
        for i, trial in enumerate(record["sides"][side]["trials"]):
            rows = [row for row in trial["epochs"] if "size" in row]
            seconds = [row["seconds"] for row in rows]
            sizes = [smaller * row["size"] / trial["target"]["size"] for row in rows]
            label = None if i else side
            axis.plot(seconds, sizes, "o-", ms=3, lw=1, color=colour, label=label)
            if trial["reached"]:
                axis.plot(seconds[-1:], sizes[-1:], "*", ms=11, color=colour)
    axis.axhline(smaller, color="black", lw=1, ls="--", label="target")
    axis.set(xlabel="seconds from the first step", ylabel="JPEG size, base model = 1",
             xlim=(0, None))
    axis.legend(fontsize=8)
    save_figure(figure, path)


def show(records, out):
    """The picture of each record, and the tables in both READMEs, if it is the default record."""
    out = Path(out)
    for i, record in enumerate(records.values()):
        draw(record, out.with_name(f"{out.stem}{f'-{i}' if i else ''}.png"))
    page = ROOT / "benchmarks/README.md"
    if out.resolve().parent == page.parent:
        from reproduce import insert_table

        insert_table(page, "time_to_target", tables(records).splitlines())
        first = next(iter(records.values()))
        insert_table(ROOT / "README.md", "time_to_target", headline(first).splitlines())
