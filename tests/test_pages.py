"""The pages are true: their links lead somewhere, their excerpts and names are in the source, their
tables are those that the commands write, and every metric is defined."""

import importlib
import json
import re

import pytest

from sample import ETAS
from test_tutorials import ROOT, TUTORIALS, check_links, excerpts

FOLDERS = ("results", "benchmarks", "models/emoji", "models/emoji-flow", "emoji/data")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *(ROOT / folder / "README.md" for folder in FOLDERS)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_links_to_what_is_there_and_quotes_what_stands_there(path):
    check_links(path)
    excerpts(path)


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_has_no_comment_which_zsh_would_take_for_arguments(path):
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    assert not [line for block in blocks for line in block.splitlines() if re.search(r"(^|\s)#", line)]


def test_the_readme_is_short_and_shows_the_loop():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 210
    excerpt = text.partition("```py\n# from ddpo.py\n")[2].partition("```")[0]  # excerpts() compares it
    assert 20 <= len(excerpt.splitlines()) <= 30 and "policy_loss" in excerpt


def test_the_readme_lists_every_tutorial_in_its_order():
    listed = re.findall(r"^(\d+)\. \[.*?\]\(tutorials/(.*?)\)", (ROOT / "README.md").read_text(), re.M)
    assert [file for _, file in listed] == [path.name for path in TUTORIALS]
    assert all(file.startswith(f"{number}_") for number, file in listed)


def test_the_readme_lists_every_script_and_folder_of_code():
    listed = (ROOT / "README.md").read_text().partition("## Files")[2].partition("##")[0]
    files = [path.name for path in ROOT.glob("*.py")]
    folders = [f"{path.parent.name}/" for path in ROOT.glob("*/*.py")]
    assert not [name for name in [*files, *folders] if name not in listed]


def test_the_details_name_functions_that_exist():
    named = re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / "docs/implementation_details.md").read_text())
    assert len(named) > 30
    for file, name in named:
        source = (ROOT / file).read_text()
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.M), f"{file}: {name}"


def undefined(keys):
    """Those of the keys that no row of docs/metrics.md defines."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    defined = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    name = r"(?:\\w+|[\\w./]+\\.py:\\w+)"  # of a reward, or a function in a file
    patterns = [key.replace("…", r"\w+").replace("SET", r"\w+") for key in defined]
    patterns = [re.sub("NAME", name, pattern) for pattern in patterns]
    return [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)]


def test_every_metric_of_the_committed_logs_is_defined():
    logs = (ROOT / "results").glob("*/logs/*/metrics.jsonl")
    keys = {key for log in logs for line in log.read_text().splitlines() for key in json.loads(line)}
    assert len(keys) > 20 and not undefined(keys)


def test_every_metric_that_a_loop_writes_is_defined():
    written = set()
    for file in ROOT.glob("*.py"):
        for row in re.findall(r"row (?:\|?=|\|=) \{(.*?)\}", file.read_text(), re.S):
            written |= set(re.findall(r'"(\w+)":', row))
    assert {"ratio_error", "seconds", "weight_max"} <= written and not undefined(written)
    assert undefined({"no_such_metric", "loss"}) == ["no_such_metric"]


def between(text, name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S)[1]


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*/*.md")), ids=lambda file: file.stem)
def test_the_results_show_the_committed_tables(file):
    marker = f"emoji-flow {file.stem}" if file.parent.name == "emoji-flow" else file.stem
    assert between((ROOT / "results/README.md").read_text(), marker) == file.read_text()


def test_the_headline_is_that_of_the_committed_numbers():
    import reproduce_figures

    numbers = json.loads((ROOT / "results/emoji/rewards.json").read_text())
    shown = between((ROOT / "README.md").read_text(), "headline")
    assert shown.splitlines() == reproduce_figures.headline(numbers)


@pytest.mark.parametrize("name", ["epoch", "peer_trl", "time_to_target", "rounding"])
def test_the_benchmarks_show_the_recorded_tables(name, capsys):
    importlib.import_module(f"benchmarks.{name}").main(["--table"])
    printed = capsys.readouterr().out
    assert between((ROOT / "benchmarks/README.md").read_text(), name).strip() == printed.strip()


def test_the_readmes_speed_is_that_of_the_record():
    records = json.loads((ROOT / "benchmarks/peer_trl.json").read_text())
    shown = re.findall(r"\d\.\d\dx \(\d\.\d\d to \d\.\d\d\)", (ROOT / "README.md").read_text())
    recorded = set()
    for record in records.values():
        for value in record["summary"]["ours_over_trl"].values():
            recorded.add("{median:.2f}x ({min:.2f} to {max:.2f})".format(**value))
    assert len(shown) == 3 and set(shown) <= recorded


def test_the_headlines_seconds_are_those_of_the_record():
    from benchmarks import time_to_target_tables

    records = json.loads((ROOT / "benchmarks/time_to_target.json").read_text())
    shown = between((ROOT / "README.md").read_text(), "time_to_target")
    assert shown.strip() == time_to_target_tables.headline(next(iter(records.values())))


DIGITS = {"classifier": 3, "classifier_animals": 3, "clip_top1": 3, "jpeg_kilobytes": 2}


def test_the_flow_models_card_shows_its_figures():
    figures = json.loads((ROOT / "models/emoji-flow/figures.json").read_text())
    card = (ROOT / "models/emoji-flow/README.md").read_text()
    names = {"no noise": "ode"} | {f"{name}, η {eta:g}": name for name, eta in ETAS.items()}
    for label, name in names.items():
        shown = next(line for line in card.splitlines() if line.startswith(f"| {label} |"))
        recorded = [f" {figures[f'{who}_{name}_{kind}']:.{digits}f} "
                    for kind, digits in DIGITS.items() for who in ("flow", "teacher")]
        assert shown.split("|")[2:-1] == recorded
