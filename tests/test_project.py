"""Requirements, dependency blocks, Makefile and CI agree, and no file of the repository names a machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.stem.rpartition("_")[2] in ("torch", "jax", "mlx"))
WITH_BLOCK = sorted(
    path for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")] if "# /// script" in path.read_text()
)
REQUIREMENTS = sorted(ROOT.glob("requirements/*.txt"))
# written so that they do not match themselves
NOT_TO_BE_SHIPPED = (
    rb"/(?:work|opt|root)/|find[-_]links|index[-_]url|pypi[.]org/simple|pythonhosted[.]org|download[.]pytorch[.]org"
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def block(source: str) -> dict:
    """The metadata that `uv run` reads, by the rules of PEP 723."""
    found = re.search(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source)
    assert found, "no dependency block"
    return tomllib.loads(re.sub(r"(?m)^# ?", "", found["content"]))


def pins(path: Path) -> list[str]:
    """The requirements in a file and in those that it includes, as written."""
    lines = [line.split(" #")[0].strip() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    included = [pin for line in lines if line.startswith("-r ") for pin in pins(path.parent / line[3:])]
    return included + [line for line in lines if line and not line.startswith("-")]


def imported(source: str) -> set[str]:
    """Top-level names of all imports outside the standard library, those inside functions included."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.split(".")[0] for module in names} - sys.stdlib_module_names


def uncovered(source: str) -> list[str]:
    """The imports of a script that its dependency block does not bring, other scripts of the repository included."""
    listed = {canonicalize_name(Requirement(pin).name) for pin in block(source)["dependencies"]}
    brings = packages_distributions()
    return sorted(m for m in imported(source) if not listed & {canonicalize_name(d) for d in brings.get(m, [])})


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_block_is_of_the_requirements_of_its_backend(path):
    """All of them, but for what the script does not import (a replay buffer's psutil, a solver's scipy)."""
    requirements = ROOT / "requirements" / f"{path.stem.rpartition('_')[2]}.txt"
    left_out = {pin.split("==")[0] for pin in set(pins(requirements)) - set(block(path.read_text())["dependencies"])}
    assert set(block(path.read_text())["dependencies"]) <= set(pins(requirements))
    assert left_out <= {"psutil", "scipy"} - imported(path.read_text())


@pytest.mark.parametrize("path", WITH_BLOCK, ids=name)
def test_block_covers_the_imports(path):
    metadata = block(path.read_text())
    assert metadata["requires-python"] == ">=3.11,<3.13"
    assert uncovered(path.read_text()) == []
    assert set(metadata["dependencies"]) <= set(pins(ROOT / "requirements/all.txt"))


def test_uncovered_import_is_seen():
    source = '# /// script\n# dependencies = ["numpy==2.4.6"]\n# ///\nimport os, numpy.random\n'
    assert uncovered(source) == []
    assert uncovered(source + "def f():\n    from tqdm import tqdm\n    import ppo_torch\n") == ["ppo_torch", "tqdm"]


def test_all_holds_every_requirement():
    everything = set(pins(ROOT / "requirements/all.txt"))
    assert {pin for path in REQUIREMENTS for pin in pins(path)} == everything
    packages = {(canonicalize_name(r.name), r.marker) for r in map(Requirement, everything)}
    assert len(packages) == len(everything), "two requirements files pin a package differently"


@pytest.mark.parametrize("path", REQUIREMENTS, ids=name)
def test_pins_are_what_is_installed(path):
    for requirement in map(Requirement, pins(path)):
        assert [s.operator for s in requirement.specifier] == ["=="], f"{requirement} is no pin"
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement


def test_no_file_names_a_machine():
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    for path in filter(Path.is_file, (ROOT / file for file in listed.stdout.split("\0") if file)):
        found = re.search(NOT_TO_BE_SHIPPED, path.read_bytes())
        assert not found, f"{name(path)} holds {found[0].decode()}"


def test_ci_runs_what_a_developer_runs():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make lint", "make test"]


# Stands for a Python: `-m venv` makes a .venv around it; what else it is asked to do, it only writes down.
PYTHON = """#!/bin/sh
case "$*" in "-c "*|*" --version") exit 0 ;; esac
echo "${0##*/} $*" >> calls
case "$*" in
    "-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *"pip install"*) exit ${PIP_FAILS:-0} ;;
esac
"""
SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


@pytest.fixture
def make(tmp_path):
    """Runs make on a fresh machine that has the given Pythons; returns its result and what the Pythons were asked."""
    repository, commands = tmp_path / "repository", tmp_path / "commands"
    shutil.copytree(ROOT / "requirements", repository / "requirements")
    commands.mkdir()
    for file in ["Makefile", "ppo_torch.py", "compare.py"]:
        shutil.copy(ROOT / file, repository)
    for tool in ["bash", "sh", "cp", "mkdir", "rm", "touch", "uname"]:
        (commands / tool).symlink_to(shutil.which(tool))

    def run(*arguments: str, pythons: dict[str, str], **environment):
        for python, text in pythons.items():
            (commands / python).write_text(text)
            (commands / python).chmod(0o755)
        (repository / "calls").write_text("")
        result = subprocess.run(
            [shutil.which("make"), *arguments],
            check=False,
            cwd=repository,
            env={"PATH": str(commands)} | environment,
            capture_output=True,
            text=True,
        )
        return result, (repository / "calls").read_text().splitlines()

    run.repository = repository
    return run


def test_make_alone_starts_nothing(make):
    result, calls = make(pythons={"python3.11": PYTHON})
    assert (result.returncode, calls) == (0, [])
    assert {"make run", "make test", "make lint"} <= set(re.findall("^make [a-z]+", result.stdout, re.MULTILINE))


def test_make_run_installs_once(make):
    install, train = "python -m pip install --quiet --disable-pip-version-check -r requirements/{}.txt", "python {}"
    result, calls = make("run", "ARGS=--seed 3", pythons={"python3.11": SHIM, "python3.12": PYTHON})
    assert result.returncode == 0, result.stderr
    assert calls == ["python3.12 -m venv --clear .venv", install.format("torch"), train.format("ppo_torch.py --seed 3")]
    assert make("run", pythons={})[1] == ["python ppo_torch.py"]
    assert make("run", "SCRIPT=compare.py", pythons={})[1] == [install.format("all"), "python compare.py"]
    together = "python -m pytest -m not clock -n logical --dist worksteal"
    assert make("test", pythons={})[1] == [together, "python -m pytest -m clock"]
    os.utime(make.repository / "requirements/torch.txt", (time.time() + 5,) * 2)
    assert make("run", pythons={})[1] == [install.format("torch"), "python ppo_torch.py"]
    os.utime(make.repository / "requirements/torch.txt", (time.time() - 5,) * 2)
    assert make("lint", pythons={})[1] == ["python -m ruff check", "python -m ruff format --check"]


def test_make_run_installs_again_after_a_failure(make):
    result, calls = make("run", pythons={"python3.11": PYTHON, "python3.12": PYTHON}, PIP_FAILS="1")
    assert result.returncode == 2 and len(calls) == 2 and calls[0] == "python3.11 -m venv --clear .venv"
    assert len(make("run", pythons={})[1]) == 2


def test_make_run_replaces_a_venv_whose_python_is_gone(make):
    calls = make("run", pythons={"python3.11": PYTHON})[1]
    (make.repository / ".venv/bin/python").unlink()
    (make.repository / ".venv/bin/python").symlink_to("gone")
    assert make("run", pythons={})[1] == calls and len(calls) == 3


def test_make_without_a_python(make):
    result, calls = make("run", pythons={"python3.11": SHIM, "python3": "#!/bin/sh\nexit 1\n"})
    first, last = result.stderr.splitlines()
    assert "needs Python 3.11 or 3.12" in first and "Error 1" in last
    assert (result.returncode, result.stdout, calls) == (2, "", [])


def test_make_run_of_a_script_that_is_not_there(make):
    result, calls = make("run", "SCRIPT=sacc_torch.py", pythons={"python3.11": PYTHON})
    assert result.returncode == 2 and "sacc_torch.py" in result.stderr and calls == []


def code_lines(source: str, first: str, last: str) -> int:
    """Lines between two headings that hold code: no blank ones, comments or docstrings"""
    lines = source.splitlines()
    start, end = (next(n for n, line in enumerate(lines, 1) if line.endswith(f"- {part}")) for part in (first, last))
    defined = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    docstrings = [node.body[0] for node in defined if ast.get_docstring(node) is not None]
    in_docstrings = {n for node in docstrings for n in range(node.lineno, node.end_lineno + 1)}
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if start < n < end and n not in in_docstrings]
    return sum(bool(line) and not line.startswith("#") for _, line in numbered)


def test_code_lines():
    source = '# -- networks\n\ndef f():\n    """One\n    two"""\n    # why\n    return 1  # one\n# -- rollout\n'
    assert code_lines(source, "networks", "rollout") == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_the_part_of_the_paper_stays_short(path):
    assert code_lines(path.read_text(), "networks", "rollout") <= (120 if path.stem == "vpg_torch" else 250)


def test_the_readme_says_how_long_a_script_is():
    lengths = [round(len(path.read_text().splitlines()), -2) for path in SCRIPTS]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"to edit, of {min(lengths):,} to {max(lengths):,} lines" in text


def test_functions_that_the_readme_links_are_there():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", (ROOT / "README.md").read_text())
    assert len(links) > 30
    for name, script in links:
        assert re.search(rf"^(def|class) {name}\b", (ROOT / script).read_text(), re.M), f"{name} is not in {script}"
