"""The README's tables are those that the recorded numbers give."""

import csv
from pathlib import Path

from benchmarks import gymnax_speed, learning, off_policy_speed, ppo_speed, processes, unfenced, widths
from tests import faults

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_learning_table_in_the_readme_is_that_of_the_records():
    expected = {learning.recorded(name, script) for name, row in learning.ROWS.items() for script in row.scripts}
    assert set(ROOT.glob("results/learning_*.csv")) <= expected
    assert learning.table() in README


def test_speed_table_in_the_readme_is_that_of_the_records():
    lines = (ROOT / "results" / "ppo_speed.csv").read_text().splitlines()
    rows = [(int(repeat), name, int(speed)) for repeat, name, speed in list(csv.reader(lines[1:]))[1:]]
    assert ppo_speed.markdown_table(rows, ppo_speed.TITLES) in README


def test_speed_ratios_compare_neighbours_in_time():
    rows = [(0, "sb3", 100), (0, "sbx", 50), (0, "ppo_torch", 200)]
    rows += [(1, "sb3", 50), (1, "sbx", 50), (1, "ppo_torch", 150)]
    assert ppo_speed.markdown_table(rows, ppo_speed.TITLES).splitlines()[2:] == [
        "| sb3 | 75 (50 to 100) | 1.00 (1.00 to 1.00) | 1.50 (1.00 to 2.00) |",
        "| sbx | 50 (50 to 50) | 0.75 (0.50 to 1.00) | 1.00 (1.00 to 1.00) |",
        "| ppo_torch | 175 (150 to 200) | 2.50 (2.00 to 3.00) | 3.50 (3.00 to 4.00) |",
    ]


def test_table_of_the_device_in_the_readme_is_that_of_the_records():
    assert gymnax_speed.markdown_table(gymnax_speed.recorded(ROOT / "results" / "gymnax_speed.csv")) in README


def test_ratios_on_the_device_compare_neighbours_in_time():
    rows = [(0, 4, 1, 1, False, 100, 50), (0, 4, 1, 1, True, 300, 70), (1, 4, 1, 1, False, 50, 50)]
    rows = [gymnax_speed.Row(*row) for row in [*rows, (1, 4, 1, 1, True, 250, 90)]]
    assert gymnax_speed.markdown_table(rows).splitlines()[2:] == [
        "| SB3 (PyTorch) | 4 | 1 | 1 | 75 (50 to 100) | 1.0 (1.0 to 1.0) | 50 |",
        "| `ppo_jax.py`, gymnax | 4 | 1 | 1 | 275 (250 to 300) | 4.0 (3.0 to 5.0) | 80 |",
    ]


def test_off_policy_ratios_compare_neighbours_in_time():
    rows = [(0, "sac", "sb3", 8.0), (0, "sac", "sbx", 4.0), (0, "sac", "ours", 2.0), (0, "mpo", "ours", 6.0)]
    rows += [(1, "sac", "sb3", 6.0), (1, "sac", "sbx", 2.0), (1, "sac", "ours", 1.5), (1, "mpo", "ours", 6.0)]
    assert off_policy_speed.markdown_table(rows).splitlines()[2:] == [
        "| SAC | SB3 (PyTorch) | 7.00 ± 1.41 | 2.50 (2.00 to 3.00) | 1.00 (1.00 to 1.00) |",
        "| SAC | SBX (JAX) | 3.00 ± 1.41 | 1.00 (1.00 to 1.00) | 0.42 (0.33 to 0.50) |",
        "| SAC | `sac_jax.py` | 1.75 ± 0.35 | 0.62 (0.50 to 0.75) | 0.25 (0.25 to 0.25) |",
        "| MPO | `mpo_jax.py` | 6.00 ± 0.00 | 2.25 (1.50 to 3.00) | 0.88 (0.75 to 1.00) |",
    ]


def test_processes_table_in_the_readme_is_that_of_the_records():
    lines = (ROOT / "results" / "processes.csv").read_text().splitlines()
    rows = [(int(k), *names, int(number), int(x)) for k, *names, number, x in list(csv.reader(lines[1:]))[1:]]
    assert processes.markdown_table(rows) in README


def test_ratios_of_processes_compare_neighbours_in_time():
    rows = [(0, "vpg_torch.py", "A", 1, 100), (0, "vpg_torch.py", "A", 2, 150)]
    rows += [(1, "vpg_torch.py", "A", 1, 300), (1, "vpg_torch.py", "A", 2, 600)]
    expected = "| `vpg_torch.py` | A | 200 | 375 | 1.75 (1.50 to 2.00) |"
    assert processes.markdown_table(rows).splitlines()[2:] == [expected]


def test_unfenced_table_in_the_readme_is_that_of_the_records():
    lines = (ROOT / "results" / "unfenced.csv").read_text().splitlines()
    found = {(script, phase, clock): float(ms) for script, phase, clock, ms in list(csv.reader(lines[1:]))[1:]}
    assert unfenced.markdown_table(found) in README


def test_widths_table_in_the_readme_is_that_of_the_records():
    lines = (ROOT / "results" / "widths.csv").read_text().splitlines()
    rows = [(name, int(width), phase, float(ms)) for name, width, phase, ms in list(csv.reader(lines[1:]))[1:]]
    assert widths.markdown_table(rows) in README


def test_faults_table_in_the_readme_is_that_of_the_records():
    rows = faults.read()
    assert {row.fault for row in rows} <= {fault.name for fault in faults.FAULTS}
    assert faults.markdown_table(rows) in README


def test_every_figure_of_the_readme_is_there():
    assert all(
        (ROOT / line.split("](")[1].rstrip(")")).exists() for line in README.splitlines() if line.startswith("![")
    )
