"""Lines fit a split view, and imports point one way: no circle, and nothing imports a training loop
but what runs or compares the loops."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WIDTH = 110  # the bound; 100 is the norm
LOOPS = ["ddpo", "rwr", "forward", "control_loop", "control"]  # each may use those before it
ABOVE_LOOPS = {"reproduce", "reproduce_control", "reproduce_figures", "benchmarks", "tests", "tutorials"}
MAY_IMPORT = {  # of our own modules, for those that stand below the others
    "kernels": {"kernels"},
    "prompts": set(),
    "judges": set(),
    "reward_files": set(),
    "rewards": {"judges", "prompts", "reward_files"},
}


def files(*suffixes):
    """The tracked files, or all of them where git is absent."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        outside = {"runs", "venv", "env", "site-packages"}
        paths = [path for path in ROOT.rglob("*") if not outside & set(path.parts)]
    return sorted(path for path in paths if path.suffix in suffixes and path.is_file())


def too_wide(name, text):
    """["file:line: width"] of the lines over the bound. Tables of Markdown, and lines with a link
    that cannot be broken, may be longer."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        table = name.endswith(".md") and line.lstrip().startswith("|")
        if len(line) > WIDTH and not table and not re.search(r"https?://|!\[.*\]\(.*\)", line):
            found.append(f"{name}:{number}: {len(line)}")
    return found


def module_of(path):
    """kernels/__init__.py -> kernels, emoji/scenes.py -> emoji.scenes"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, modules):
    """(ours, others): which of our modules a source imports, anywhere in it, and the first names
    of all that is not ours."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inside]
        else:
            continue
        for name in names:
            if name in modules:
                ours.add(name)
            else:
                others.add(name.partition(".")[0])
    return ours, others


def circle(graph):
    """A list of modules of which each imports the next and the last the first, or None."""
    done = set()

    def visit(module, path):
        if module in path:
            return path[path.index(module):]
        if module in done:
            return None
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return None

    return next(filter(None, (visit(module, []) for module in sorted(graph))), None)


@pytest.fixture(scope="module")
def graph():
    """{module: (ours, others)}"""
    sources = {module_of(path): path.read_text(encoding="utf-8") for path in files(".py")}
    return {module: imports(source, sources) for module, source in sources.items()}


def test_no_line_is_wider_than_a_split_view():
    found = []
    for path in files(".py", ".md"):
        found += too_wide(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


def test_no_imports_form_a_circle(graph):
    assert circle({module: ours for module, (ours, _) in graph.items()}) is None


def test_nothing_imports_a_loop_but_what_runs_or_compares_loops(graph):
    for module, (ours, _) in graph.items():
        first = module.partition(".")[0]
        if first not in ABOVE_LOOPS:
            before = LOOPS[:LOOPS.index(first)] if first in LOOPS else []
            imported = ours & set(LOOPS) - set(before)
            assert not imported, f"{module} imports {imported}"


def test_what_stands_below_the_others_imports_nothing_above_it(graph):
    for module, (ours, others) in graph.items():
        first = module.partition(".")[0]
        if first in MAY_IMPORT:
            above = {name for name in ours if name.partition(".")[0] not in MAY_IMPORT[first]}
            assert not above, f"{module} imports {above}"
        if first == "kernels":
            libraries = others - set(sys.stdlib_module_names)
            assert libraries <= {"torch", "triton"}, f"{module} imports {libraries}"


def test_these_checks_find_what_they_look_for():
    wide = "x" * (WIDTH + 1)
    page = f"| {wide} |\n{wide}\nhttps://{wide}\n![a](b) {wide}"
    assert too_wide("a.md", page) == ["a.md:2: 111"]
    assert too_wide("a.py", f"{wide[1:]}\n| {wide}") == ["a.py:2: 113"]
    source = "import os\ndef f():\n    from emoji import scenes\n    from ddpo import train"
    modules = {"emoji.scenes", "ddpo"}
    assert imports(source, modules) == (modules, {"os"})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert {module_of(path) for path in files(".py")} >= {"ddpo", "kernels", "emoji.scenes"}
