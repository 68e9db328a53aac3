"""Code that stands word for word in several scripts is marked, and stays the same in all of them.

The mark stands on the line above a function, class or method, above its decorators, and names the other scripts:

    # twin: ppo_mlx ppo_jax
    def save_arrays(path, arrays): ...

A script's own name may be among them, so that the mark can be copied with the code. Names of scripts that are not
written yet are let through. Methods that hold a single statement (a derived size of a config, say) need no mark.
"""

import ast
import re
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"\s*# *twin\b:?(.*)")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Piece(NamedTuple):
    text: str  # decorators and comments included
    twins: frozenset[str]  # the scripts that its mark names, empty without a mark
    is_short: bool  # a method with a single statement


def pieces(source: str) -> tuple[dict[str, Piece], list[int]]:
    """The functions, classes and methods of a script by qualified name, and the lines of marks above none of them."""
    lines = source.splitlines()
    marks = {number: set(m[1].split()) for number, line in enumerate(lines, 1) if (m := MARK.fullmatch(line))}
    found = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, Definition):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                is_short = bool(prefix) and len(node.body) - (ast.get_docstring(node) is not None) < 2
                text = "\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno])
                found[prefix + node.name] = Piece(text, frozenset(marks.pop(first - 1, ())), is_short)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse(source).body, "")
    return found, sorted(marks)


def problems(sources: dict[str, str]) -> list[str]:
    """What is wrong with the marks in these scripts, given as {name: source}; a line of text for each."""
    scripts, found = {}, []
    for name, source in sources.items():
        scripts[name], stray = pieces(source)
        found += [f"{name}.py:{line}: the mark stands above no def or class" for line in stray]
    for name, script in scripts.items():
        for piece, (_, twins, _) in script.items():
            for other in sorted(twins & scripts.keys() - {name}):
                if piece not in scripts[other]:
                    found.append(f"{piece}: {name}.py names {other}.py, which has none")
                elif name not in scripts[other][piece].twins:
                    found.append(f"{piece}: {name}.py names {other}.py, which does not name it back")
    for (name, script), (other, second) in combinations(scripts.items(), 2):
        same = {piece for piece in script.keys() & second.keys() if script[piece].text == second[piece].text}
        for piece in script.keys() & second.keys():
            is_marked = other in script[piece].twins or name in second[piece].twins
            if is_marked and piece not in same:
                found.append(f"{piece}: differs between {name}.py and {other}.py, though marked as a twin")
            is_part = piece.rpartition(".")[0] in same  # then the class needs the mark
            if piece in same and not (is_marked or is_part or script[piece].is_short):
                found.append(f"{piece}: the same in {name}.py and {other}.py, and not marked")
    return sorted(found)


def test_scripts():
    sources = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
    assert "ppo_torch" in sources
    assert problems(sources) == []


FUNCTION = "@cache\ndef f(x):\n    # why\n    return x  # (B,)\n"


def marked(twins: str, text: str = FUNCTION) -> str:
    return f"import a\n\n\n# twin: {twins}\n{text}\n\ny = 1\n"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": marked("b"), "b": marked("a")}, []),
        ({"a": marked("a b c"), "b": marked("a b c")}, []),  # c is not written yet
        ({"a": marked("b c"), "b": marked("a c"), "c": marked("a b")}, []),
        ({"a": FUNCTION, "b": FUNCTION.replace("x", "z")}, []),
        ({"a": marked("b"), "b": marked("a", FUNCTION.replace("return x", "return -x"))}, ["f: differs"]),
        ({"a": marked("b"), "b": marked("a", FUNCTION.replace("@cache\n", ""))}, ["f: differs"]),
        ({"a": marked("b"), "b": marked("a", FUNCTION.replace("why", "how"))}, ["f: differs"]),
        ({"a": marked("b"), "b": marked("a", FUNCTION.replace("(B,)", "(T,)"))}, ["f: differs"]),
        ({"a": FUNCTION, "b": "x = 1\n" + FUNCTION}, ["f: the same in a.py and b.py"]),
        ({"a": marked("c"), "b": marked("c")}, ["f: the same in a.py and b.py"]),
        ({"a": marked("b"), "b": FUNCTION}, ["f: a.py names b.py, which does not"]),
        ({"a": FUNCTION, "b": marked("a")}, ["f: b.py names a.py, which does not"]),
        ({"a": marked("b"), "b": "x = 1"}, ["f: a.py names b.py, which has none"]),
        ({"a": marked("b c"), "b": marked("a c"), "c": marked("a")}, ["f: b.py names c.py, which does not"]),
        ({"a": "# twin: b\nx = 1\n"}, ["a.py:1: the mark stands above no"]),
        ({"a": "# twin: b\n\n" + FUNCTION}, ["a.py:1: the mark stands above no"]),
        ({"a": FUNCTION.replace("\ndef", "\n# twin: b\ndef")}, ["a.py:2: the mark stands above no"]),
    ],
)
def test_problems(sources, expected):
    found = problems(sources)
    assert len(found) == len(expected), found
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


SAVE = "    def save(self):\n        x = 1\n        return x\n"
SIZE = '    def size(self):\n        """In steps."""\n        return 2\n'


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "class C:\n" + SAVE, "b": "class C:\n" + SAVE}, ["C: the same"]),
        ({"a": "class C:\n    y = 1\n" + SAVE, "b": "class C:\n" + SAVE}, ["C.save: the same"]),
        ({"a": "class C:\n    y = 1\n" + SIZE, "b": "class C:\n" + SIZE}, []),
        ({"a": marked("b", "class C:\n" + SAVE), "b": marked("a", "class C:\n" + SAVE)}, []),
        ({"a": f"class C:\n    # twin: b\n{SAVE}", "b": f"class C:\n    y = 1\n    # twin: a\n{SAVE}"}, []),
        (
            {"a": f"class C:\n    # twin: b\n{SIZE}", "b": f"class C:\n    # twin: a\n{SIZE.replace('2', '3')}"},
            ["C.size: differs"],
        ),
    ],
)
def test_problems_in_classes(sources, expected):
    test_problems(sources, expected)
