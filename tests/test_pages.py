"""The pages say what is so: their links lead somewhere, their excerpts and names are in the source, their tables are those
that the commands write, and every metric is defined."""

import json
import re
import subprocess
import sys

import pytest

from test_tutorials import ROOT, TUTORIALS, check_links, excerpts

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md", ROOT / "benchmarks/README.md",
         ROOT / "models/emoji/README.md", ROOT / "emoji/data/README.md"]
WIDTH = 110


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_links_to_what_is_there_and_quotes_what_stands_there(path):
    check_links(path)
    excerpts(path)


def test_the_readme_is_short_and_shows_the_loop():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 210
    assert "```py\n# from ddpo.py\n" in text and "# 4. update" in text  # excerpts() holds it to the file


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_too_wide(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        free = line.startswith("|") or "](" in line or "http" in line or ".venv" in line  # tables, links, the two commands
        assert free or len(line) <= WIDTH, f"{path.name}:{number}: {len(line)} characters"


def test_the_details_name_functions_that_exist():
    named = re.findall(r"`([\w/]+\.py):(\w+)`", (ROOT / "docs/implementation_details.md").read_text())
    assert len(named) > 30
    for file, name in named:
        source = (ROOT / file).read_text()
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.M), f"{file}: {name}"


def defined_metrics():
    """The pattern of each key in the first column of docs/metrics.md."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    keys = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    return [re.compile(re.sub("NAME|SET", r"\\w+", key.replace("…", r"\w+"))) for key in keys]


def test_every_metric_of_the_committed_logs_is_defined():
    keys = {key for log in (ROOT / "results").glob("*/logs/*/metrics.jsonl") for line in log.read_text().splitlines() for key in json.loads(line)}
    assert len(keys) > 20
    assert not [key for key in keys if not any(pattern.fullmatch(key) for pattern in defined_metrics())]


def test_every_metric_that_a_loop_writes_is_defined():
    written = {"weight_max", "weight_share"}
    for file in ("ddpo.py", "rwr.py", "evaluate.py", "run.py", "training.py", "forward.py"):
        source = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        for row in re.findall(r"row \|?= \{(.*?)\}", source, re.S):
            written |= set(re.findall(r'"(\w+)":', row))
    assert "ratio_error" in written and "seconds" in written
    assert not [key for key in written if not any(pattern.fullmatch(key) for pattern in defined_metrics())]


def between(text, name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S)[1]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "results/emoji").glob("*.md"))])
def test_the_results_show_the_committed_tables(name):
    shown = between((ROOT / "results/README.md").read_text(), name)
    assert shown == (ROOT / f"results/emoji/{name}.md").read_text()


def test_the_headline_is_that_of_the_committed_numbers():
    import reproduce

    numbers = json.loads((ROOT / "results/emoji/rewards.json").read_text())
    assert between((ROOT / "README.md").read_text(), "headline").splitlines() == reproduce.headline(numbers)


@pytest.mark.parametrize("name", ["epoch", "peer_trl"])
def test_the_benchmarks_show_the_recorded_tables(name):
    printed = subprocess.run([sys.executable, f"benchmarks/{name}.py", "--table"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert between((ROOT / "benchmarks/README.md").read_text(), name).strip() == printed.strip()


def test_the_readmes_speed_is_that_of_the_record():
    records = json.loads((ROOT / "benchmarks/peer_trl.json").read_text())
    shown = re.findall(r"\d\.\d\dx \(\d\.\d\d to \d\.\d\d\)", (ROOT / "README.md").read_text())
    recorded = {f"{value['median']:.2f}x ({value['min']:.2f} to {value['max']:.2f})" for record in records.values()
                for value in record["summary"]["ours_over_trl"].values()}
    assert len(shown) == 6 and set(shown) <= recorded
