"""compare.py: its readers against real W&B records, its statistics against literals, its figures by their pixels."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compare
from benchmarks.records import whole
from compare import EVALUATION, Histogram, Run

SCRIPT = Path(compare.__file__)
CONFIG = {
    "env_id": "CartPole-v1",
    "exp_name": "ppo_torch",
    "framework": "torch",
    "seed": 1,
    "device": "cpu",
    "cpu": "A CPU",
    "versions": {"torch": "2.13.0"},
    "resumed_at": 0,
    "run_dir": "/home/somebody/runs",
}
SETTINGS = wandb.Settings(silent=True, x_disable_stats=True, x_disable_machine_info=True)
WAIT_FOR_A_KILL = """
import json, signal, sys, wandb
run = wandb.init(mode="offline", dir=sys.argv[1], id="killed", config=json.loads(sys.argv[2]),
                 settings=wandb.Settings(silent=True, x_transaction_log_flush_interval=1))
for step in range(512, 5120, 512):
    run.log({"global_step": step, "charts/episodic_return": float(step)})
signal.pause()
"""


def record(directory: Path, rows: list[dict], run_id: str, **config) -> Path:
    """A real offline record, as a training script writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        mode="offline",
        dir=directory,
        id=run_id,
        project="test",
        config=CONFIG | config,
        reinit="create_new",
        settings=SETTINGS,
    )
    run.define_metric("*", step_metric="global_step")
    for row in rows:
        run.log(row)
    finish(run)
    return directory


def finish(run: wandb.Run) -> None:
    run.finish()
    (file,) = Path(run.dir).parent.glob("run-*.wandb")
    whole(file)


def training_rows(seed: int, speed: float = 1.0) -> list[dict]:
    """40 iterations of 512 steps, every fourth one timed phase by phase."""
    rows = []
    for iteration in range(1, 41):
        value = 10.0 * iteration + seed
        row = {"global_step": 512 * iteration, "charts/episodic_return": value, "charts/return_last_100": value - 1}
        row |= {"losses/policy_loss": -0.01 * seed, "losses/new_loss": 1.0 / iteration, "charts/learning_rate": 1e-3}
        row |= {"times/forward": 0.004 * speed, "times/step": 0.002, "charts/SPS": 1000.0 * seed}
        if iteration % 4 == 0:
            row |= {"times/loss": 0.005, "times/kl": 0.001, "times/gae": 0.0005, "times/weight_update": 0.003}
            row |= {"times/loss/policy": 0.002, "times/other": 0.0005, "times/iteration": 0.012 + 0.004 * speed}
            row["histograms/episodic_return"] = wandb.Histogram(np.linspace(1.2345, value, 20))
        else:
            row |= {"times/update": 0.006, "times/other": 0.0001, "times/iteration": 0.0081 + 0.004 * speed}
        rows.append(row)
    rows[-1]["charts/evaluation_return"] = 400.0 + 10 * seed
    return rows


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Two frameworks, three seeds each, and a note of nothing else."""
    folder = tmp_path_factory.mktemp("runs")
    for framework, speed in (("torch", 1.0), ("jax", 2.0)):
        for seed in (1, 2, 3):
            script = f"ppo_{framework}"
            versions = {framework: "1.0"}
            settings = {"seed": seed, "framework": framework, "exp_name": script, "versions": versions}
            record(
                folder / f"CartPole-v1__{script}__{seed}", training_rows(seed, speed), f"{framework}{seed}", **settings
            )
    return folder


@pytest.fixture(scope="module")
def runs(recorded) -> list[Run]:
    return compare.read_runs([str(recorded)])


def compare_in_process(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    environment |= {"HOME": "/nonexistent", "NETRC": "/nonexistent/netrc"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("backwards", [False, True])
def test_segments_join_without_gap_or_double(tmp_path, monkeypatch, backwards):
    first = [{"global_step": step, "charts/SPS": 1.0} for step in (100, 200, 300, 400)]
    second = [{"global_step": step, "charts/SPS": 2.0} for step in (250, 350, 450)]
    record(tmp_path / "run", first, "same")
    record(tmp_path / "run", second, "same", resumed_at=200)
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *arguments: sorted(glob(*arguments), reverse=backwards))
    (run,) = compare.read_runs([str(tmp_path)])
    steps, values = run.curve("charts/SPS")
    assert [row["global_step"] for row in run.rows] == [100, 200, 250, 350, 450]
    assert steps.tolist() == [50, 150, 225, 300, 400]
    assert values.tolist() == [1, 1, 2, 2, 2]
    assert run.summary["steps"] == 450


def test_runs_in_one_folder_are_told_apart(tmp_path):
    for run_id, seed in (("one", 1), ("two", 2)):
        record(tmp_path, [{"global_step": 100, "charts/SPS": float(seed)}], run_id, seed=seed)
    runs = compare.read_runs([str(tmp_path)])
    assert [(run.id, run.config["seed"], run.curve("charts/SPS")[1].tolist()) for run in runs] == [
        ("one", 1, [1]),
        ("two", 2, [2]),
    ]


def test_config_that_is_added_later_is_read(tmp_path):
    run = wandb.init(mode="offline", dir=tmp_path, config=CONFIG, reinit="create_new", settings=SETTINGS)
    run.config.update({"env_id": "Acrobot-v1"}, allow_val_change=True)
    run.log({"global_step": 1, "charts/SPS": 1.0})
    finish(run)
    assert compare.read_runs([str(tmp_path)])[0].env_id == "Acrobot-v1"


def test_the_last_value_of_a_step_counts_and_other_keys_of_it_stay():
    rows = [{"global_step": 8, "charts/a": 1, "charts/b": 2}, {"global_step": 8, "charts/a": 3}]
    assert compare.join_segments([(0, rows)]) == [{"global_step": 8, "charts/a": 3, "charts/b": 2}]


def test_a_history_from_wandb_is_split_where_its_steps_fall():
    rows = [{"global_step": step, "charts/n": n} for n, step in enumerate((10, 20, 30, 20, 30, 40))]
    rows[1]["charts/undone"] = 1.0
    joined = compare.join_segments(compare.split_where_steps_fall(rows))
    assert [(row["global_step"], row["charts/n"]) for row in joined] == [(10, 0), (20, 3), (30, 4), (40, 5)]
    assert not any("charts/undone" in row for row in joined)


def test_a_killed_and_a_truncated_record_are_read_up_to_the_end(tmp_path, capsys):
    run_dir = tmp_path / "killed"
    run_dir.mkdir()
    process = subprocess.Popen([sys.executable, "-c", WAIT_FOR_A_KILL, str(run_dir), json.dumps(CONFIG)])
    deadline = time.monotonic() + 60
    last = b"charts/episodic_return\x82\x01\x044608"  # W&B's server, which outlives the process, writes more after it
    while not (files := list(run_dir.glob("wandb/*run-*/*.wandb"))) or last not in files[0].read_bytes():
        assert process.poll() is None and time.monotonic() < deadline
    process.kill()
    process.wait()
    (run,) = compare.read_runs([str(run_dir)])
    assert run.curve("charts/episodic_return")[1].tolist() == list(range(512, 5120, 512))
    (file,) = run_dir.glob("wandb/*run-*/*.wandb")
    content = file.read_bytes()
    file.write_bytes(content[: content.index(last)])
    (cut,) = compare.read_runs([str(run_dir)])
    assert cut.curve("charts/episodic_return")[1].tolist() == list(range(512, 4608, 512))
    assert "has no end: its run was killed, or goes on" in capsys.readouterr().err


def test_rows_on_disk_and_rows_of_the_api_read_alike_and_drop_what_is_not_drawn():
    nested = {"_type": "histogram", "bins": [0, 1, 2], "values": [3, 4]}
    disk = {"histograms/episodic_return.bins": [0, 1, 2], "histograms/episodic_return.values": [3, 4]}
    other = {"_step": 4, "global_step": 7.0, "charts/x": 1.5, "charts/nan": "NaN", "losses/inf": float("inf"), "y": 1}
    packed = {"_type": "histogram", "packedBins": {"min": 0, "size": 1.0, "count": 2}, "values": [3, 4]}
    for item in (other | {"histograms/episodic_return": nested}, other | {compare.RETURNS: packed}, other | disk):
        row = compare.read_item(item)
        assert row.keys() == {"global_step", "charts/x", "histograms/episodic_return"}
        assert row["global_step"] == 7
        assert row["charts/x"] == 1.5
        assert row["histograms/episodic_return"].edges.tolist() == [0, 1, 2]
        assert row["histograms/episodic_return"].counts.tolist() == [3, 4]


def test_a_network_that_goes_away_is_one_line(monkeypatch):
    class Lazy:
        id = "abc"

        @property
        def config(self):
            raise wandb.errors.CommError("connection lost")

        def scan_history(self):
            return iter([{"global_step": 10, "charts/SPS": 5.0}])

    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda path, filters: [Lazy()]))
    with pytest.raises(compare.BadInput, match=r"team/project: .*connection lost"):
        compare.read_runs(["team/project"])


def test_a_loose_record_and_one_whose_beginning_is_damaged_are_told_apart(recorded, tmp_path, capsys):
    record = next(recorded.rglob("run-*.wandb"))
    loose, damaged = tmp_path / "loose", tmp_path / "run/wandb/offline-run-1"
    for folder in (loose, damaged):
        folder.mkdir(parents=True)
        shutil.copy(record, folder)
    with pytest.raises(compare.BadInput, match="a run directory holds"):
        compare.read_runs([str(loose)])
    content = bytearray(record.read_bytes())
    content[20:40] = bytes(20)
    (damaged / record.name).write_bytes(content)
    with pytest.raises(compare.BadInput, match="no run with a recorded row"):
        compare.read_runs([str(tmp_path / "run")])
    notes = capsys.readouterr().err
    assert "its beginning is damaged" in notes and "nothing yet" not in notes


@pytest.mark.parametrize("damage", ["cell", "env_id", "steps"])
def test_saved_numbers_that_lack_something_are_one_line(runs, damage, tmp_path):
    path = tmp_path / "saved.csv"
    compare.write_csv(runs, path)
    if damage == "cell":
        path.write_text(path.read_text() + "x" * 200_000)
    else:
        text = path.with_suffix(".json").read_text()
        path.with_suffix(".json").write_text(text.replace(f'"{damage}"', '"other"', 1))
    with pytest.raises(compare.BadInput, match="not as --save wrote them"):
        compare.read_runs([str(path)])


def test_runs_that_began_with_a_model_are_told_from_runs_that_did_not():
    rows = [(0, [{"global_step": 1, "charts/SPS": 1.0}])]
    runs = [compare.make_run(str(n), CONFIG | {"seed": n, "load_model": n or None}, rows, "")[0] for n in (0, 1)]
    assert [note for note in compare.pooling_notes(runs) if "differ in load_model" in note]


def test_runs_on_wandb_are_read_through_its_api(monkeypatch):
    class Online:
        id = "abc"
        config = CONFIG | {"env_id": "Acrobot-v1"}

        def scan_history(self):
            return iter([{"global_step": 10, "charts/SPS": 5.0}, {"_step": 1}, {"global_step": 20, "charts/SPS": 7.0}])

    class Api:
        def runs(self, path, filters):
            assert (path, filters) == ("team/project", {"group": "ALE/Pong-v5__ppo_torch"})
            return [Online()]

    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "Api", Api)
    (run,) = compare.read_runs(["team/project/ALE/Pong-v5__ppo_torch"])
    assert run.env_id == "Acrobot-v1"
    assert run.curve("charts/SPS")[1].tolist() == [5, 7]


# ---------------------------------------------------------------------------------------------------------- statistics


def test_interquartile_mean_is_that_of_the_middle_half():
    assert compare.interquartile_mean(np.array([0.0, 10.0, 20.0, 1000.0])) == 15
    assert compare.interquartile_mean(np.array([-500.0, 1.0, 2.0, 6.0, 900.0])) == 3  # floor(5/4) = 1 off each end


def test_bootstrap_interval_is_the_slow_one():
    values = np.random.default_rng(1).normal(size=(5, 3)) * [1, 10, 100]
    draws = np.random.default_rng(0).integers(5, size=(2000, 5))
    slow = [[np.sort(values[draw, column])[1:4].mean() for draw in draws] for column in range(3)]
    low, high = compare.bootstrap_interval(values)
    np.testing.assert_allclose(low, np.percentile(slow, 2.5, axis=1))
    np.testing.assert_allclose(high, np.percentile(slow, 97.5, axis=1))


@pytest.mark.parametrize("number, percent", [(3, 75), (4, 87), (5, 90), (10, 94)])
def test_how_often_an_interval_of_few_seeds_holds_the_truth(number, percent):
    """The README says so; 4000 experiments tell it to half a percent."""
    low, high = compare.bootstrap_interval(np.random.default_rng(0).normal(size=(number, 4000)))
    assert abs(100 * np.mean((low <= 0) & (high >= 0)) - percent) <= 1


def test_smooth_takes_the_mean_within_half_a_window():
    steps = np.array([0.0, 10, 20, 30, 100])
    assert compare.smooth(steps, np.array([1.0, 3, 5, 10, 7]), 20).tolist() == [2, 3, 6, 7.5, 7]


def test_a_mean_stands_in_the_middle_of_its_steps_and_an_evaluation_at_its_own():
    rows = [{"global_step": s, "charts/x": s / 10} | ({EVALUATION: 1.0} if s == 30 else {}) for s in (10, 20, 30)]
    run = Run("", {}, {}, [*rows, {"global_step": 40}, {"global_step": 50, "charts/x": 5.0}])
    assert [x.tolist() for x in run.curve("charts/x")] == [[5, 15, 25, 45], [1, 2, 3, 5]]
    assert [x.tolist() for x in run.curve(EVALUATION)] == [[30], [1]]


def test_common_grid_covers_what_all_seeds_cover():
    rows = [[{"global_step": s, EVALUATION: s / 10} for s in steps] for steps in ([0, 10, 20, 30], [10, 25, 40])]
    grid, values = compare.on_common_grid([Run("", {}, {}, one) for one in rows], EVALUATION, points=3)
    assert grid.tolist() == [10, 20, 30]
    np.testing.assert_allclose(values, [[1, 2, 3], [1, 2, 3]])


def test_thin_keeps_the_means_of_stretches():
    rows = [{"global_step": n, "charts/x": float(n)} | ({"charts/rare": 5.0} if n == 3 else {}) for n in range(1, 12)]
    thinned = compare.thin(rows, at_most=6)
    assert [row["global_step"] for row in thinned] == [2, 4, 6, 8, 10, 11]
    assert [row["charts/x"] for row in thinned] == [1.5, 3.5, 5.5, 7.5, 9.5, 11.0]
    assert [row.get("charts/rare") for row in thinned] == [None, 5.0, None, None, None, None]
    assert compare.thin(rows[:6], at_most=6) == rows[:6]
    assert compare.merge([{"global_step": 1, "charts/x": 200 / 3}], 0)["charts/x"] == 66.667


def test_a_row_weighs_as_many_steps_as_it_covers():
    """W&B gets a row of several iterations where they are fast: the mean of them."""
    rows = [{"global_step": step, "times/step": seconds} for step, seconds in ((120, 1.0), (180, 5.0))]
    assert compare.merge(rows, start_step=100)["times/step"] == (20 * 1.0 + 60 * 5.0) / 80


def test_thinned_evaluations_stand_at_their_own_steps():
    rows = [{"global_step": n, "charts/x": float(n)} | ({EVALUATION: n} if n % 5 == 0 else {}) for n in range(1, 13)]
    thinned = compare.thin(rows, at_most=5)
    assert [(row["global_step"], row.get(EVALUATION)) for row in thinned] == [
        (2, None),
        (5, 5),
        (8, None),
        (10, 10),
        (12, None),
    ]
    assert [row["charts/x"] for row in thinned] == [1.5, 4, 7, 9.5, 11.5]
    several = compare.merge([{"global_step": step, EVALUATION: step} for step in (5, 10)], 0)
    assert several == {"global_step": 10, EVALUATION: 10}


def test_merged_histograms_keep_every_episode_and_its_place():
    early = Histogram(np.array([0.0, 10.0]), np.array([7.0]))
    late = Histogram(np.array([90.0, 100.0]), np.array([5.0]))
    merged = compare.merge([{"global_step": n, compare.RETURNS: h} for n, h in enumerate((early, late))], 0)
    histogram = merged[compare.RETURNS]
    assert (histogram.edges[0], histogram.edges[-1]) == (0, 100)
    assert np.round(histogram.below(np.array([0, 15, 85, 100]))).tolist() == [0, 7, 7, 12]


def test_episode_shares_spread_a_histogram_over_the_steps_since_the_one_before():
    first, second = Histogram(np.array([0.0, 2.0]), np.array([4.0])), Histogram(np.array([1.0, 2.0]), np.array([9.0]))
    run = Run("", {}, {}, [{"global_step": 20, compare.RETURNS: first}, {"global_step": 40, compare.RETURNS: second}])
    shares = compare.episode_shares([run], np.array([0, 10, 20, 30, 40]), np.array([0, 1, 2]))
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0, 0], [0.5, 0.5, 1, 1]])


def test_summary_separates_timed_from_fused_iterations_and_divides_steps_by_time():
    rows = [
        {"global_step": 100, "times/iteration": 2.0, "times/update": 1.0, "charts/SPS": 50.0},
        {"global_step": 200, "times/iteration": 4.0, "times/loss": 3.0, "times/other": 1.0, "charts/SPS": 25.0},
        {"global_step": 500, "times/iteration": 3.0, "times/update": 2.0, "charts/SPS": 100.0},  # 3 iterations
        {"global_step": 500, "times/compile": 9.0},
    ]
    assert compare.summarise(rows) == {
        "steps": 500,
        "steps_per_second": pytest.approx(500 / 9),
        "timed/iteration": 4.0,
        "timed/loss": 3.0,
        "timed/other": 1.0,
        "fused/iteration": (2.0 + 3 * 3.0) / 4,
        "fused/update": (1.0 + 3 * 2.0) / 4,
    }


def test_summary_has_the_mean_of_the_last_five_evaluations():
    rows = [{"global_step": k, "charts/evaluation_return": float(k**2)} for k in range(1, 8)]
    assert compare.summarise(rows)["evaluation_return_last_5"] == (9 + 16 + 25 + 36 + 49) / 5
    assert "evaluation_return_last_5" not in compare.summarise(rows[:4])


# ----------------------------------------------------------------------------------------------------- tables and files


RETURNS_TABLE = """\
| environment | script | seeds | steps | training return (last 100 episodes) | \
evaluation return | worst seed (last 100) | steps/s (median) |
| --- | --- | --- | --- | --- | --- | --- | --- |
| CartPole-v1 | ppo_torch | 3 | 20,480 | 401.0 [400.0, 402.0] | 420.0 [410.0, 430.0] | 400.0 | 2,000 |
| CartPole-v1 | ppo_jax | 3 | 20,480 | 401.0 [400.0, 402.0] | 420.0 [410.0, 430.0] | 400.0 | 2,000 |"""
TIMES_TABLE = """\
| environment | script | forward (ms) | step (ms) | gae (ms) | loss (ms) | kl (ms) | weight_update (ms) | other (ms) | \
iteration (ms) | fused update (ms) | fused iteration (ms) |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| CartPole-v1 | ppo_torch | 4.00 | 2.00 | 0.50 | 5.00 | 1.00 | 3.00 | 0.50 | 16.00 | 6.00 | 12.10 |
| CartPole-v1 | ppo_jax | 8.00 | 2.00 | 0.50 | 5.00 | 1.00 | 3.00 | 0.50 | 20.00 | 6.00 | 16.10 |"""


def test_tables_of_real_records(runs):
    assert compare.returns_table(runs) == RETURNS_TABLE
    assert compare.times_table(runs) == TIMES_TABLE
    assert compare.machines(runs) == "jax 1.0 on cpu · torch 1.0 on cpu · A CPU"
    assert compare.pooling_notes(runs) == []


def test_fewer_than_three_seeds_get_no_interval_and_missing_ones_are_counted():
    one, two = (Run("", CONFIG, {"steps": 1, "return_last_100": value}, []) for value in (12.0, 3.456))
    assert compare.estimate([one, two], "return_last_100") == "12.0 and 3.46"
    assert compare.estimate([one, Run("", CONFIG, {"steps": 1}, [])], "return_last_100") == "12.0 (1 of 2 seeds)"
    assert compare.estimate([one], "evaluation_return") == "–"


def test_pooling_notes_name_what_makes_runs_no_seeds_of_one_another():
    runs = [Run(str(n), CONFIG | {"num_envs": n, "cpu": f"CPU {n}"}, {"steps": 1000 * n}, []) for n in (1, 2)]
    notes = compare.pooling_notes(runs)
    assert len(notes) == 4
    assert "differ in num_envs" in notes[0]
    assert "different machines: CPU 1 (cpu) and CPU 2 (cpu)" in notes[1]
    assert "several runs of one seed" in notes[2]
    assert "1,000 to 2,000 steps" in notes[3]


def test_saved_numbers_give_the_same_tables_figures_and_file(runs, tmp_path):
    compare.write_csv(runs, tmp_path / "deep" / "saved.csv")
    again = compare.read_runs([str(tmp_path / "deep" / "saved.csv")])
    assert compare.returns_table(again) == RETURNS_TABLE
    assert compare.times_table(again) == TIMES_TABLE
    compare.write_csv(again, tmp_path / "again.csv")
    for suffix in (".csv", ".json"):
        saved = (tmp_path / "deep" / "saved.csv").with_suffix(suffix).read_text()
        assert saved == (tmp_path / "again.csv").with_suffix(suffix).read_text()
        assert "/home/somebody" not in saved
    first = compare.draw_all(runs, compare.Config(output=tmp_path / "first"))
    second = compare.draw_all(again, compare.Config(output=tmp_path / "second"))
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


# -------------------------------------------------------------------------------------------------------------- figures


def test_every_figure_is_drawn_in_the_colours_of_its_scripts(recorded, tmp_path):
    result = compare_in_process(recorded, "--output", tmp_path, "--prefix", "x", "--save", tmp_path / "numbers.csv")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"{RETURNS_TABLE}\n\n3 seeds; mean and range\n" in result.stdout
    assert TIMES_TABLE in result.stdout
    names = ["returns", "times", "phases", "losses", "density"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(f"x_{name}.png" for name in names)
    scripts = [compare.SCRIPT_COLOURS[script] for script in ("ppo_torch", "ppo_jax")]
    phases = [
        compare.PHASE_COLOURS[phase] for phase in ("forward", "step", "gae", "loss", "kl", "weight_update", "other")
    ]
    for name, expected in zip(names, (scripts, phases, scripts, scripts, []), strict=True):
        pixels = np.round(255 * imread(tmp_path / f"x_{name}.png")[:, :, :3]).astype(int)
        assert pixels.shape[1] == 1600
        assert pixels.shape[0] > 500
        present, counts = np.unique(pixels.reshape(-1, 3) @ [65536, 256, 1], return_counts=True)
        assert len(present) > 200, name
        for colour in expected:
            assert counts[present == int(colour[1:], 16)].sum() > 100, (name, colour)


def test_a_figure_without_its_keys_is_left_out_and_named(tmp_path, capsys):
    rows = [{"global_step": step, "losses/only_here": 1.0 * step} for step in (1, 2, 3)]
    run = Run("", CONFIG, {"steps": 3}, rows)
    written = compare.draw_all([run], compare.Config(output=tmp_path))
    assert [path.name for path in written] == ["compare_losses.png"]
    notes = capsys.readouterr().err.splitlines()
    assert [note.split()[2] for note in notes] == [
        f"compare_{name}.png," for name in ("returns", "times", "phases", "density")
    ]


def test_seeds_are_a_band_from_three_on_and_lines_before(runs):
    (axis,) = compare.draw_returns(runs, "title").axes
    assert (len(axis.lines), len(axis.collections)) == (2, 2)
    figure = compare.draw_returns([run for run in runs if run.config["seed"] < 3], "title")
    assert (len(figure.axes[0].lines), len(figure.axes[0].collections)) == (4, 0)
    assert figure.legends[0].texts[0].get_text() == "ppo_torch (2 seeds, each drawn)"


def test_a_script_by_itself_shows_each_seed_too(runs):
    figure = compare.draw_returns([run for run in runs if run.config["exp_name"] == "ppo_jax"], "title")
    (axis,) = figure.axes
    assert (len(axis.lines), len(axis.collections)) == (1 + 3, 1)
    assert sorted(line.get_ydata()[-1] for line in axis.lines[1:]) == [401, 402, 403]
    assert figure.legends[0].texts[0].get_text() == "ppo_jax (3 seeds, each drawn)"


def test_a_phase_that_takes_no_time_is_no_error(tmp_path):
    rows = [{"global_step": step, "times/loss": 0.0, "times/step": 0.1} for step in (1, 2)]
    figure = compare.draw_phases([Run("", CONFIG, {"steps": 2}, rows)], "title")
    figure.savefig(tmp_path / "phases.png")
    assert [axis.get_title() for axis in figure.axes] == ["environment step", "loss and gradient"]


@pytest.mark.parametrize("fused", [True, False])
def test_the_figure_of_times_has_the_fused_update_where_there_is_one(fused):
    rows = [{"global_step": 1, "times/iteration": 0.3, "times/loss": 0.2, "times/other": 0.1}]
    rows += [{"global_step": step, "times/update": 0.1} for step in (2, 3)] * fused
    run = Run("", CONFIG, {"steps": 3} | compare.summarise(rows), rows)
    labels = [text.get_text() for text in compare.draw_times([run], "title").legends[0].get_texts()]
    assert labels == ["loss and gradient", "other", *["fused update"] * fused]


def test_iterations_of_different_sizes_are_labelled():
    rows = [{"global_step": 1, "times/iteration": 0.3, "times/loss": 0.2, "times/other": 0.1}]
    sizes = {"ppo_torch": {"num_envs": 4, "num_steps": 128}, "td3_jax": {"log_interval": 1000}}
    summary = {"steps": 1} | compare.summarise(rows)
    runs = [Run(name, CONFIG | size | {"exp_name": name}, summary, rows) for name, size in sizes.items()]
    texts = {text.get_text() for text in compare.draw_times(runs, "title").subfigs[0].axes[0].get_yticklabels()}
    assert texts == {"ppo_torch\n(512 steps)", "td3_jax (torch)\n(1,000 steps)"}


def test_the_estimator_of_groups_of_three_and_of_five_seeds():
    runs = [Run(str(n), CONFIG | {"env_id": "A" if n < 3 else "B", "seed": n}, {"steps": 1}, []) for n in range(8)]
    assert compare.estimator(runs).endswith("95 % bootstrap interval; of 3 or 4 seeds their range")
    assert "range" not in compare.estimator(runs[3:])


def test_a_log_axis_begins_above_a_phase_that_once_took_no_time():
    rows = [{"global_step": step, "times/record": 0.1 * (step > 1)} for step in (1, *range(50, 101))]
    (axis,) = compare.draw_phases([Run("", CONFIG, {"steps": 100}, rows)], "title").axes
    assert axis.get_ylim()[0] >= 50


def test_explained_variance_is_shown_from_minus_one_on():
    rows = [{"global_step": step, "losses/explained_variance": value} for step, value in ((1, -600.0), (2, 0.9))]
    (axis,) = compare.draw_losses([Run("", CONFIG, {"steps": 2}, rows)], "title").axes
    assert axis.get_ylim() == (-1, 1)


def test_each_column_of_the_density_adds_up_to_one(runs):
    for axis in compare.draw_density(runs, "title").axes[:2]:
        (mesh,) = axis.collections
        sums = np.where(mesh.get_array() > 0.003, mesh.get_array(), 0).sum(axis=0)
        np.testing.assert_allclose(sums, 1, atol=0.05)


def test_a_log_scale_ends_at_labelled_ticks_even_for_one_value(runs):
    drawn = [axis for axis in compare.draw_phases(runs, "title").axes if axis.get_visible()]
    assert len(drawn) == 8
    for axis in drawn:
        (low, high), ticks = axis.get_ylim(), axis.get_yticks()
        assert (low, high) == (ticks[0], ticks[-1])
        assert axis.lines[0].get_ydata().min() >= low
        assert len(ticks) >= 2


def test_panels_hold_every_recorded_loss_known_ones_first(runs):
    figure = compare.draw_losses(runs, "title")
    assert [axis.get_title() for axis in figure.axes] == ["policy loss", "new loss", "learning rate"]


def test_each_panel_of_returns_has_the_steps_of_its_own_environment():
    def run(env_id: str, steps: int) -> Run:
        rows = [{"global_step": step, "charts/episodic_return": 1.0} for step in range(0, steps + 1, steps // 10)]
        return Run(env_id, {"env_id": env_id, "exp_name": "mine", "framework": "", "seed": 1}, {"steps": steps}, rows)

    figure = compare.draw_returns([run("Short-v0", 1000), run("Long-v0", 5000)], "title")
    assert {axis.get_title(): axis.get_xlim() for axis in figure.axes} == {
        "Short-v0\ntraining": (0, 1),
        "Long-v0\ntraining": (0, 5),
    }


def test_other_scripts_get_colours_of_their_own():
    names = ["ppo_jax", "mine", "yours"]
    runs = [Run(name, {"env_id": "E", "exp_name": name, "framework": ""}, {}, []) for name in names]
    palette = compare.colours(runs)
    assert palette["ppo_jax"] == "#009E73"
    assert len(set(palette.values())) == 3


def test_colours_are_left_for_a_script_beside_all_eight():
    names = [*compare.SCRIPT_COLOURS, "mine"]
    runs = [Run(name, {"env_id": "E", "exp_name": name, "framework": ""}, {}, []) for name in names]
    assert len(compare.colours(runs)) == 9


# ------------------------------------------------------------------------------------------------------------ bad input


def bad_inputs(folder: Path) -> dict[str, str]:
    """Argument: what its one line must mention."""
    (folder / "empty").mkdir()
    broken = folder / "broken" / "wandb" / "offline-run-1-x" / "run-x.wandb"
    broken.parent.mkdir(parents=True)
    broken.write_text("this is no transaction log")
    (folder / "columns.csv").write_text("run,speed\na,1\n")
    (folder / "columns.json").write_text("{}")
    header = ",".join(compare.IDENTITY)
    (folder / "section.csv").write_text(f"{header},weather/rain\n")
    (folder / "section.json").write_text("{}")
    (folder / "alone.csv").write_text(f"{header},charts/x\na,E,s,f,1,5,2.0\n")
    (folder / "number.csv").write_text(f"{header},charts/x\na,E,s,f,1,5,two\n")
    (folder / "number.json").write_text("{}")
    return {
        str(folder / "empty"): "no recorded run",
        str(folder / "broken"): "cannot read this record",
        str(folder / "columns.csv"): "columns run,speed",
        str(folder / "section.csv"): "weather/rain",
        str(folder / "alone.csv"): "alone.json",
        str(folder / "number.csv"): "two",
        str(folder / "nowhere"): "give a folder with runs",
        "no-such-team/no-such-project": "wandb login",
    }


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    for argument, mention in bad_inputs(tmp_path).items():
        monkeypatch.setattr(sys, "argv", ["compare.py", argument, "--output", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as stop:
            compare.main()
        output = capsys.readouterr()
        assert stop.value.code == 2
        assert len(output.err.splitlines()) == 1, (argument, output.err)
        assert mention in output.err, (argument, output.err)
        assert output.out == ""
    assert not (tmp_path / "out").exists()


def test_save_takes_a_csv_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "nowhere", "--save", "numbers.json"])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "compare.py: --save numbers.json: must end in .csv; a .json of the same name goes beside it\n"
    )


def test_without_a_login_nothing_asks_for_one():
    result = compare_in_process("no-such-team/no-such-project")
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == "compare.py: no-such-team/no-such-project: no such folder here, and from W&B: log in with `wandb login`\n"
    )


def test_a_record_of_something_else_names_what_it_lacks(tmp_path):
    run = wandb.init(mode="offline", dir=tmp_path, project="test", reinit="create_new", settings=SETTINGS)
    run.log({"global_step": 1, "charts/x": 1.0})
    run.finish()
    with pytest.raises(compare.BadInput, match="lacks env_id and seed"):
        compare.read_runs([str(tmp_path)])


def test_an_unwritable_output_is_one_line(runs, tmp_path, monkeypatch, capsys):
    compare.write_csv(runs, tmp_path / "saved.csv")
    (tmp_path / "file").write_text("")
    arguments = ["compare.py", str(tmp_path / "saved.csv"), "--output", str(tmp_path / "file" / "images")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "number, subtitle, legend",
    [
        (1, "1 seed; smoothed over 3 % of training", "ppo_torch (1 seed)"),
        (2, "2 seeds; one by one; smoothed over 3 % of training", "ppo_torch (2 seeds, each drawn)"),
        (
            3,
            "3 seeds; mean and range; smoothed over 3 % of training",
            "ppo_torch (3 seeds, each drawn)",
        ),
    ],
)
def test_a_figure_says_what_is_drawn_of_how_many_seeds(number, subtitle, legend):
    rows = [{"global_step": step, compare.RETURN: float(step)} for step in (10, 20)]
    config = {"env_id": "E", "exp_name": "ppo_torch", "framework": "torch"}
    runs = [Run(str(n), config | {"seed": n}, {"steps": 20}, rows) for n in range(number)]
    figure = compare.draw_returns(runs, "E, masked")
    assert figure.get_suptitle() == f"E, masked: return\n{subtitle}"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [legend]
    assert [axis.get_title() for axis in figure.axes] == ["training"]  # the heading says which environment
