"""The tutorials do what they say: their code runs and prints what they show, their excerpts stand in the
files, and their links lead somewhere.

```python    runs, all blocks of a file in one namespace
```text      right after one: what it prints
```text 5%   the same, but numbers may differ by 5 % (and by one in the last digit shown)
```py        starts `# from FILE`, and stands in that file, line for line, at any indentation
"""

import contextlib
import io
import re
import textwrap
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*_*.md"),
                   key=lambda path: int(path.stem.partition("_")[0]))
FENCE = re.compile(r"^```(\w*)(?: (\d+)%)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?")


class Stale(Exception):
    """FILE:LINE: what a tutorial says and the code does not."""


def run(path):
    """Run a tutorial's code, and check what it prints. Returns the namespace. Raises Stale at the first
    fault."""
    text, namespace = path.read_text(encoding="utf-8"), {"__name__": "tutorial"}
    printed, ended = None, 0  # of the python block before, and where it ended
    for fence in FENCE.finditer(text):
        language, percent, code = fence.groups()
        above = text.count("\n", 0, fence.start(3))  # lines: the block's first line is number above + 1
        if language == "python":
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output):
                    exec(compile("\n" * above + code, str(path), "exec"), namespace)
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                lines = [frame.lineno for frame in frames if frame.filename == str(path)]
                line = lines[-1] if lines else getattr(error, "lineno", above + 1)  # SyntaxError: no frame
                raise Stale(f"{path.name}:{line}: {type(error).__name__}: {error}") from error
            printed, ended = output.getvalue(), fence.end()
        elif language == "text":
            if printed is None or text[ended:fence.start()].strip():
                raise Stale(f"{path.name}:{above + 1}: a text block that does not follow a python block: "
                            "nothing checks it")
            if not agree(printed, code, int(percent or 0) / 100):
                raise Stale(f"{path.name}:{above + 1}: the block above prints\n{printed}not\n{code}")
            printed = None
    return namespace


def excerpts(path):
    """Check that each ```py block stands in the file that it names, line for line, at any indentation."""
    text = path.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        language, _, code = fence.groups()
        above = text.count("\n", 0, fence.start(3))
        if language != "py":
            continue
        first, _, excerpt = code.partition("\n")
        source = first.removeprefix("# from ").strip()
        if not (first.startswith("# from ") and (ROOT / source).is_file()):
            raise Stale(f"{path.name}:{above + 1}: {first!r}: must be '# from FILE', a file of this "
                        "repository")
        whole = "\n" + (ROOT / source).read_text(encoding="utf-8")
        if not any("\n" + textwrap.indent(excerpt, depth * "    ") in whole for depth in range(6)):
            raise Stale(f"{path.name}:{above + 2}: this excerpt is not, or no longer, in {source}")


def check_links(path):
    """Check that each relative link of a page leads to a file, and to a heading of it if it names one."""
    prose = without_code(path)  # a[i](x) in code is no link
    for link in re.finditer(r"\]\(([^)#]*)#?([^)]*)\)", prose):
        file, heading = path.parent / link[1] if link[1] else path, link[2]
        if link[1].startswith(("http://", "https://")):
            continue
        place = f"{path.name}:{prose.count(chr(10), 0, link.start()) + 1}: {link[1]}"
        if not file.exists():
            raise Stale(f"{place}: no such file")
        headings = re.findall(r"^#+ (.*)$", without_code(file), re.MULTILINE) if heading else []
        if heading and heading not in {anchor(text) for text in headings}:
            raise Stale(f"{place}#{heading}: no such heading")


def without_code(path):
    """The text of a page, with empty lines in the place of its blocks of code."""
    text = path.read_text(encoding="utf-8")
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)


def anchor(heading):
    """The id that a code host gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def agree(printed, shown, tolerance):
    """Whether two texts are the same but for numbers that differ by at most the tolerance, relative to the
    one shown, and one in its last digit. tolerance 0: the same to the letter."""
    printed, shown = tidy(printed), tidy(shown)
    if not tolerance or len(printed) != len(shown):
        return printed == shown
    for mine, theirs in zip(printed, shown):
        if NUMBER.sub("#", mine).split() != NUMBER.sub("#", theirs).split():
            return False
        for a, b in zip(NUMBER.findall(mine), NUMBER.findall(theirs)):
            digits = len(b.partition("e")[0].partition(".")[2])
            last = 10.0 ** (int(b.partition("e")[2] or 0) - digits)
            if abs(float(a) - float(b)) > tolerance * abs(float(b)) + 1.001 * last:
                return False
    return True


def tidy(text):
    return [line.rstrip() for line in text.rstrip().splitlines()]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_true(path, monkeypatch):
    import kernels

    if kernels.triton is None and "import triton" in path.read_text(encoding="utf-8"):
        pytest.skip("triton is not installed")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(kernels, "BACKEND", kernels.BACKEND)  # a tutorial may choose another
    excerpts(path)
    run(path)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_links_to_what_is_there_and_shows_all_of_its_figures(path):
    check_links(path)
    number = path.name.partition("_")[0]
    shown = set(re.findall(r"!\[.*?\]\(figures/(.*?)\)", path.read_text(encoding="utf-8"), re.S))
    assert shown == {file.name for file in (ROOT / "tutorials" / "figures").glob(f"{number}_*.png")}


def tutorial(folder, text):
    path = folder / "1_made_up.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_tutorial_without_a_fault_passes_and_returns_its_names(tmp_path):
    path = tutorial(tmp_path, """# T

```python
x = 1
```

Then

```python
print(x + 1, 0.98)
```

```text 5%
2 1.00
```

```py
# from ddpo.py
return -advantages * log_prob
```
[it](1_made_up.md#t), [here](#t)
""")
    check_links(path)
    excerpts(path)
    assert run(path)["x"] == 1


@pytest.mark.parametrize("text, message", [
    ("# T\n\n```python\nprint(1)\n```\n```text\n2\n```\n", r":7: the block above prints\n1\nnot\n2"),
    ("```python\nx = 1\n\n1 / 0\n```\n", r":4: ZeroDivisionError"),
    ("```python\nx = 1\n```\n\n```python\ndef f():\n    return y\n\nf()\n```\n", r":7: NameError"),
    ("```python\nx = 1\nx x\n```\n", r":3: SyntaxError"),
    ("```python\nprint(1)\n```\nwords\n```text\n1\n```\n", r":6: a text block that does not follow"),
    ("\n```py\n# from ddpo.py\ndef sf_loss(another):\n```\n",
     r":4: this excerpt is not, or no longer, in ddpo.py"),
    ("```py\nx = 1\n```\n", r":2: 'x = 1': must be"),
    ("```py\n# from nowhere.py\nx = 1\n```\n", r":2: '# from nowhere.py': must be"),
    ("# T\n\nSee ![it](figures/none.png).\n", r":3: figures/none.png: no such file"),
    ("# T\n\nSee [it](1_made_up.md#u).\n", r":3: 1_made_up.md#u: no such heading"),
    ("```python\nprint(1.1)\n```\n```text 5%\n1.00\n```\n", r":5: the block above prints\n1.1\nnot\n1.00"),
    ("```python\nprint('one', 1.0)\n```\n```text 5%\ntwo 1.0\n```\n", r":5: the block above prints"),
])
def test_a_fault_is_named_with_its_file_and_line(tmp_path, text, message):
    with pytest.raises(Stale, match="1_made_up.md" + message):
        path = tutorial(tmp_path, text)
        run(path)
        excerpts(path)
        check_links(path)


@pytest.mark.parametrize("printed, shown, tolerance, same", [
    ("0.52 kB", "0.50 kB", 0.05, True), ("0.54 kB", "0.50 kB", 0.05, False), ("-0.5", "0.5", 0.05, False),
    ("0.51", "0.50", 0, False), ("a  1", "a 1", 0.05, True), ("a 1", "b 1", 0.05, False),
    ("1\n2", "1", 0.05, False), ("104", "100", 0.05, True), ("1.04e-3", "1.00e-3", 0.05, True),
    ("1.00e-2", "1.00e-3", 0.05, False),
])
def test_numbers_agree_within_the_tolerance_and_words_exactly(printed, shown, tolerance, same):
    assert agree(printed, shown, tolerance) is same
