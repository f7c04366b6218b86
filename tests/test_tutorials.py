"""The tutorials do what they say: their code runs, prints what they show, quotes what the files hold, and links to what is there.

```python  runs, all blocks of a file in one namespace        ```text  right after one: what it prints
```py      starts `# from FILE`, and stands in that file, line for line
"""

import contextlib
import io
import re
import textwrap
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]_*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Stale(Exception):
    """FILE:LINE: what a tutorial says and the code does not."""


def run(path):
    """Run a tutorial's code, and check what it prints. Returns the namespace. Raises Stale at the first fault."""
    text, namespace = path.read_text(encoding="utf-8"), {"__name__": "tutorial"}
    printed, ended = None, 0  # of the python block before, and where it ended
    for fence in FENCE.finditer(text):
        language, code = fence.groups()
        above = text.count("\n", 0, fence.start(2))  # lines, so that the block's first line is number above + 1
        if language == "python":
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output):
                    exec(compile("\n" * above + code, str(path), "exec"), namespace)
            except Exception as error:
                lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
                line = lines[-1] if lines else getattr(error, "lineno", above + 1)  # a SyntaxError has no frame here
                raise Stale(f"{path.name}:{line}: {type(error).__name__}: {error}") from error
            printed, ended = output.getvalue(), fence.end()
        elif language == "text":
            if printed is None or text[ended:fence.start()].strip():
                raise Stale(f"{path.name}:{above + 1}: a text block that does not follow a python block: nothing checks it")
            if tidy(printed) != tidy(code):
                raise Stale(f"{path.name}:{above + 1}: the block above prints\n{printed}not\n{code}")
            printed = None
    return namespace


def excerpts(path):
    """Check that each ```py block stands in the file that it names, line for line, at whatever indentation."""
    text = path.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        language, code = fence.groups()
        above = text.count("\n", 0, fence.start(2))
        if language != "py":
            continue
        first, _, excerpt = code.partition("\n")
        source = first.removeprefix("# from ").strip()
        if not (first.startswith("# from ") and (ROOT / source).is_file()):
            raise Stale(f"{path.name}:{above + 1}: {first!r}: must be '# from FILE', a file of this repository")
        whole = "\n" + (ROOT / source).read_text(encoding="utf-8")
        if not any("\n" + textwrap.indent(excerpt, depth * "    ") in whole for depth in range(6)):
            raise Stale(f"{path.name}:{above + 2}: this excerpt is not, or no longer, in {source}")


def check_links(path):
    prose = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), path.read_text(encoding="utf-8"))  # a[i](x) in code is no link
    for link in re.finditer(r"\]\(([^)#]+)[^)]*\)", prose):
        if not link[1].startswith(("http://", "https://")) and not (path.parent / link[1]).exists():
            raise Stale(f"{path.name}:{prose.count(chr(10), 0, link.start()) + 1}: {link[1]}: no such file")


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
    shown = set(re.findall(r"!\[.*?\]\(figures/(.*?)\)", path.read_text(encoding="utf-8")))
    assert shown == {file.name for file in (ROOT / "tutorials" / "figures").glob(f"{path.name[0]}_*.png")}


def tutorial(folder, text):
    path = folder / "1_made_up.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_tutorial_without_a_fault_passes_and_returns_its_names(tmp_path):
    path = tutorial(tmp_path, "# T\n\n```python\nx = 1\n```\n\nThen\n\n```python\nprint(x + 1)\n```\n\n```text\n2\n```\n\n"
                                   "```py\n# from ddpo.py\ndef sf_loss(log_prob, advantages):\n```\n[it](1_made_up.md#t)\n")
    check_links(path)
    excerpts(path)
    assert run(path)["x"] == 1


@pytest.mark.parametrize("text, message", [
    ("# T\n\n```python\nprint(1)\n```\n```text\n2\n```\n", r":7: the block above prints\n1\nnot\n2"),
    ("```python\nx = 1\n\n1 / 0\n```\n", r":4: ZeroDivisionError"),
    ("```python\nx = 1\n```\n\n```python\ndef f():\n    return y\n\nf()\n```\n", r":7: NameError"),
    ("```python\nx = 1\nx x\n```\n", r":3: SyntaxError"),
    ("```python\nprint(1)\n```\nwords\n```text\n1\n```\n", r":6: a text block that does not follow"),
    ("\n```py\n# from ddpo.py\ndef sf_loss(another):\n```\n", r":4: this excerpt is not, or no longer, in ddpo.py"),
    ("```py\nx = 1\n```\n", r":2: 'x = 1': must be"),
    ("```py\n# from nowhere.py\nx = 1\n```\n", r":2: '# from nowhere.py': must be"),
    ("# T\n\nSee ![it](figures/none.png).\n", r":3: figures/none.png: no such file"),
])
def test_a_fault_is_named_with_its_file_and_line(tmp_path, text, message):
    with pytest.raises(Stale, match="1_made_up.md" + message):
        path = tutorial(tmp_path, text)
        run(path)
        excerpts(path)
        check_links(path)


def test_there_are_tutorials():
    assert [path.name[0] for path in TUTORIALS] == [str(i) for i in range(1, len(TUTORIALS) + 1)] and TUTORIALS
