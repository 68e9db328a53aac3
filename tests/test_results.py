"""The README's tables are those that the recorded numbers give."""

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import compare
import ppo_torch
from benchmarks import (
    files,
    gymnax_speed,
    learning,
    long_runs,
    mpo_solvers,
    processes,
    recording,
    speed,
    unfenced,
    widths,
)
from tests import faults

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PPO_ON_ANOTHER_MACHINE = ROOT / "results" / "speed_ppo_another_machine.csv"


def assert_in_readme(markdown_table: Callable, read: Callable, name: str) -> None:
    """With its command and machine below it"""
    path = ROOT / "results" / f"{name}.csv"
    assert f"{markdown_table(read(path))}\n\n{files.caption(path)}\n" in README


def test_learning_table_in_the_readme_is_that_of_the_records():
    expected = {learning.recorded(name, script) for name, row in learning.ROWS.items() for script in row.scripts}
    assert set(ROOT.glob("results/learning_*.csv")) <= expected
    assert learning.table() in README


def test_the_ppo_scripts_learn_alike():
    """The 95 % intervals of their evaluations on CartPole overlap, two by two."""
    records = [compare.read_csv(learning.recorded("cartpole", script)) for script in learning.PPO]
    returns = [np.array([run.summary["evaluation_return"] for run in runs]) for runs in records]
    assert [len(values) for values in returns] == [5, 5, 5]
    intervals = [compare.bootstrap_interval(values) for values in returns]
    assert max(low for low, _ in intervals) <= min(high for _, high in intervals)


def test_speed_tables_in_the_readme_are_those_of_the_records():
    paths = {speed.recorded(name): name for name in speed.SUITES} | {PPO_ON_ANOTHER_MACHINE: "ppo"}
    assert set(ROOT.glob("results/speed_*.csv")) == paths.keys()
    for path, name in paths.items():
        table = speed.markdown_table(speed.read(path), list(speed.SUITES[name]().references))
        assert f"{table}\n\n{files.caption(path)}\n" in README


def test_the_speed_in_the_opening_is_that_of_the_records():
    rows = speed.read(speed.recorded("ppo"))
    speeds = {(row.repeat, row.contestant): row.steps_per_second for row in rows}

    def times_as_fast(contestant: str) -> float:
        return statistics.median(speeds[row.repeat, contestant] / speeds[row.repeat, "SB3"] for row in rows)

    torch, compiled_torch, jax = map(times_as_fast, ("`ppo_torch.py`", "`ppo_torch.py --compile`", "`ppo_jax.py`"))
    opening = " ".join(README.split("| script |")[0].split())
    expected = f"{torch:.1f} (PyTorch), {compiled_torch:.1f} (PyTorch, compiled) and {jax:.1f} (JAX) times as fast"
    assert expected in opening
    assert f"{times_as_fast('`ppo_jax.py`, gymnax'):.0f} times where the environments are in JAX too" in opening
    assert f"MLX, on a CPU, {times_as_fast('`ppo_mlx.py`'):.1f} times" in opening


def test_each_turn_begins_with_the_next_contestant(monkeypatch):
    monkeypatch.setattr(files, "in_own_process", lambda *_, **__: "1.5")
    rows = speed.in_turns("ppo", speed.Suite("", 1, 1, {"a": len}, {"b": len, "c": len}), 3, 1)
    assert [row.contestant for row in rows] == [*"abc", *"bca", *"cab"]


def test_a_measurement_that_fails_is_shown(tmp_path):
    path = tmp_path / "measure.py"
    path.write_text("import os, sys; print(os.environ['JAX_PLATFORMS'], os.environ['MORE'], sys.argv[1])")
    assert files.in_own_process(str(path), 3, MORE="more") == "cpu more 3\n"
    path.write_text("raise ValueError('what was wrong')")
    with pytest.raises(SystemExit, match="what was wrong"):
        files.in_own_process(str(path))


def test_speed_ratios_compare_neighbours_in_time(tmp_path):
    rows = [(0, "a peer", 100.0), (0, "alone", 200.0), (0, "`ours`", 200.0)]
    rows = [speed.Row(*row) for row in (*rows, (1, "a peer", 50.0), (1, "alone", 500.0), (1, "`ours`", 150.0))]
    files.save(tmp_path / "rows.csv", "python this", ["numpy"], speed.Row._fields, rows)
    assert speed.read(tmp_path / "rows.csv") == rows
    assert speed.markdown_table(rows, ["alone", "a peer"]).splitlines() == [
        "|  | steps/s, median (min to max) | s / 1000 steps, mean ± std | speed / alone | speed / a peer |",
        "| --- | --- | --- | --- | --- |",
        "| a peer | 75 (50 to 100) | 15 ± 7.1 | 0.30 (0.10 to 0.50) | 1 |",
        "| alone | 350 (200 to 500) | 3.5 ± 2.1 | 1 | 6.00 (2.00 to 10.00) |",
        "| `ours` | 175 (150 to 200) | 5.83 ± 1.2 | 0.65 (0.30 to 1.00) | 2.50 (2.00 to 3.00) |",
    ]


def test_table_of_the_device_in_the_readme_is_that_of_the_records():
    assert_in_readme(gymnax_speed.markdown_table, gymnax_speed.recorded, "gymnax_speed")


def test_gains_of_devices_in_the_readme_are_those_of_the_records():
    rows = gymnax_speed.recorded(ROOT / "results" / "gymnax_speed.csv")
    speeds = {row[:5]: row.steps_per_second for row in rows}

    def ratios(which, to):
        found = [speeds[repeat, *which, True] / speeds[repeat, *to, True] for repeat in {row.repeat for row in rows}]
        return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"

    single, text = (64, 1, 1), " ".join(README.split())
    assert f"gain {ratios((64, 2, 1), single)} with 64" in text
    assert f"environments, {ratios((1024, 2, 1), (1024, 1, 1))} with 1024" in text
    assert f"eight at once take {ratios(single, (64, 2, 8))} of the time of eight runs one after the other" in text
    assert f"where they have two, and {ratios(single, (64, 1, 8))} where they have one" in text


def test_ratios_on_the_device_compare_neighbours_in_time():
    rows = [(0, 4, 1, 1, False, 100, 50), (0, 4, 1, 1, True, 300, 70), (1, 4, 1, 1, False, 50, 50)]
    rows = [gymnax_speed.Row(*row) for row in [*rows, (1, 4, 1, 1, True, 250, 90)]]
    assert gymnax_speed.markdown_table(rows).splitlines()[2:] == [
        "| SB3 (PyTorch) | 4 | 1 | 1 | 75 (50 to 100) | 1.0 (1.0 to 1.0) | 50 |",
        "| `ppo_jax.py`, gymnax | 4 | 1 | 1 | 275 (250 to 300) | 4.0 (3.0 to 5.0) | 80 |",
    ]


def test_processes_table_in_the_readme_is_that_of_the_records():
    assert_in_readme(processes.markdown_table, processes.read, "processes")


def test_ratios_of_processes_compare_neighbours_in_time():
    rows = [(0, "vpg_torch.py", "A", 1, 100), (0, "vpg_torch.py", "A", 2, 150)]
    rows += [(1, "vpg_torch.py", "A", 1, 300), (1, "vpg_torch.py", "A", 2, 600)]
    expected = "| `vpg_torch.py` | A | 200 | 375 | 1.75 (1.50 to 2.00) |"
    assert processes.markdown_table(rows).splitlines()[2:] == [expected]


def test_unfenced_table_in_the_readme_is_that_of_the_records():
    assert_in_readme(unfenced.markdown_table, unfenced.read, "unfenced")


def test_widths_table_in_the_readme_is_that_of_the_records():
    assert_in_readme(widths.markdown_table, widths.read, "widths")


def test_solver_table_in_the_readme_is_that_of_the_records():
    assert_in_readme(lambda records: mpo_solvers.markdown_table(*records), mpo_solvers.read, "mpo_solvers")


def test_recording_table_in_the_readme_is_that_of_the_records():
    assert_in_readme(recording.markdown_table, recording.read, "recording")


def test_costs_of_recording_compare_neighbours_in_time(monkeypatch):
    monkeypatch.setattr(recording, "SCRIPTS", {"ppo_jax": {"env_id": "A"}})
    turns = [(10.0, 11.0), (20.0, 24.0), (40.0, 40.0), (30.0, 30.0), (50.0, 70.0)]  # 10, 20, 0, 0 and 40 % more
    rows = [(turn, "ppo_jax", *seconds) for turn, seconds in enumerate(turns)]
    expected = "| `ppo_jax` | A | 1500.0 | 10.0 (0.0 to 20.0) |"
    assert recording.markdown_table(rows).splitlines()[2:] == [expected]


def test_every_other_block_is_recorded_and_timed(monkeypatch):
    """Of the first turn, which does not count, and of two more"""
    recorded, timed = [], []

    class Run(ppo_torch.Run):
        def record(self, *arguments):
            recorded.append(self.iteration)
            super().record(*arguments)

        def send_row(self, *arguments):
            if "times/loss" in self.row:
                timed.append(self.iteration)
            super().send_row(*arguments)

    monkeypatch.setattr(ppo_torch, "Run", Run)
    flags = {"num_envs": 1, "num_steps": 8, "wandb_mode": "disabled", "env_id": "CartPole-v1"}
    monkeypatch.setattr(recording, "SCRIPTS", {"ppo_torch": flags})
    assert len(recording.measure("ppo_torch", turns=2)) == 2
    assert recorded == [*range(21, 61), *range(101, 121)]  # neither both | both neither | neither both
    assert timed == [40, 60, 120]
    assert recording.in_turns([9.0, 9.0, 1.1, 1.0, 2.0, 2.2]) == [(1.0, 1.1), (2.0, 2.2)]


def test_long_runs_table_in_the_readme_is_that_of_the_records():
    assert_in_readme(long_runs.markdown_table, long_runs.read, "long_runs")


def test_faults_table_in_the_readme_is_that_of_the_records():
    rows = faults.read()
    names = {row.fault for row in rows}
    assert names <= {fault.name for fault in faults.FAULTS}
    assert Counter((row.script, row.fault) for row in rows) == Counter(itertools.product(faults.SCRIPTS, names))
    assert_in_readme(faults.markdown_table, lambda path: rows, "faults")


def test_a_fault_that_was_not_held_is_in_the_table():
    first, second, _ = (fault.name for fault in faults.FAULTS[:3])
    rows = [faults.Row("ppo_jax", "", first, 5, 5), faults.Row("td3_jax", "", first, 5, 3)]
    rows += [faults.Row("ppo_jax", "", second, 2, 2), faults.Row("td3_jax", "", second, 1, 1)]
    assert faults.markdown_table(rows).splitlines()[2:] == [
        f"| {first} | 5 | `td3_jax`: **3 of 5** |",
        f"| {second} | 1 or 2 | all |",
    ]


def test_the_figures_are_those_of_the_readme():
    figures = re.findall(r"!\[[^]]*\]\((images/\w+\.png)\)", README)
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("images/*")} == set(figures)
