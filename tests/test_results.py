"""The README's tables are those that the recorded numbers give."""

import csv
from pathlib import Path

from benchmarks import learning, ppo_speed

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_learning_table_in_the_readme_is_that_of_the_records():
    assert set(learning.ROWS) == {path.stem.removeprefix("learning_") for path in ROOT.glob("results/learning_*.csv")}
    assert learning.table() in README


def test_speed_table_in_the_readme_is_that_of_the_records():
    lines = (ROOT / "results" / "ppo_speed.csv").read_text().splitlines()
    rows = [(int(repeat), name, int(speed)) for repeat, name, speed in list(csv.reader(lines[1:]))[1:]]
    assert ppo_speed.markdown_table(rows) in README


def test_speed_ratios_compare_neighbours_in_time():
    rows = [(0, "sb3", 100), (0, "ppo_torch", 200), (0, "ppo_torch --compile", 300)]
    rows += [(1, "sb3", 50), (1, "ppo_torch", 150), (1, "ppo_torch --compile", 250)]
    assert ppo_speed.markdown_table(rows).splitlines()[2:] == [
        "| sb3 | 75 (50 to 100) | 1.00 (1.00 to 1.00) |",
        "| ppo_torch | 175 (150 to 200) | 2.50 (2.00 to 3.00) |",
        "| ppo_torch --compile | 275 (250 to 300) | 4.00 (3.00 to 5.00) |",
    ]


def test_every_figure_of_the_readme_is_there():
    assert all(
        (ROOT / line.split("](")[1].rstrip(")")).exists() for line in README.splitlines() if line.startswith("![")
    )
