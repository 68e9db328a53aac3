"""The short form of tests/faults.py: every script, the cheapest configuration, moments and damages of a fixed seed."""

import contextlib
import json
import random
from pathlib import Path

import pytest

import vpg_torch
from tests import faults
from tests.faults import SCRIPTS, Script

TIMES = {  # of each fault
    faults.killed: 1,
    faults.fuzzed: 40,
    faults.any_input: 8,
    faults.not_a_number: 1,
}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request, tmp_path_factory) -> Script:
    return Script(request.param, tmp_path_factory.mktemp(request.param))


def assert_held(function, script: Script, times: int) -> None:
    problems = list(function(script, times, random.Random(0)))
    assert problems == [None] * times, problems


@pytest.mark.parametrize("function", TIMES, ids=lambda function: function.__name__)
def test_fault(function, script):
    assert_held(function, script, TIMES[function])


def test_an_environment_that_hangs(tmp_path):
    assert_held(faults.worker, Script("vpg_torch", tmp_path), 1)


def test_a_reward_that_is_no_number_is_named():
    kwargs = json.dumps({"what": "two rewards", "at": 1})
    config = vpg_torch.Config(env_id="tests.environments:Faulty-v0", env_kwargs=kwargs, vectorization="async")
    with contextlib.closing(vpg_torch.make_vector(config, 2, is_evaluation=False)) as vector:
        vector.reset()
        with pytest.raises(ValueError, match=r"a reward of shape \(2,\) is not a number") as raised:
            vpg_torch.call_environments(vector, config.env_id, "step", vector.action_space.sample())
    assert raised.value.__notes__ == ["in the step of tests.environments:Faulty-v0"]


def test_what_cannot_be_tried_is_left_out(tmp_path: Path):
    def needs_root() -> None:
        raise NotImplementedError("mount is not allowed here")

    def fault(script, times, rng):
        yield faults.tried(needs_root)

    row = faults.run(Script("vpg_torch", tmp_path), faults.Fault("kind", "name", 1, fault), 1, random.Random(0))
    assert (row.tried, row.held) == (0, 0)


def test_what_does_not_hold_is_told(tmp_path: Path):
    """A driver that finds nothing wrong with anything would pass all tests."""

    def breaks() -> None:
        raise AssertionError("it broke")

    def fault(script, times, rng):
        yield faults.tried(breaks)
        yield faults.tried(int)

    row = faults.run(Script("vpg_torch", tmp_path), faults.Fault("kind", "name", 2, fault), 2, random.Random(0))
    assert row == ("vpg_torch", "kind", "name", 2, 1)
    cells = faults.markdown_table([row._replace(fault=faults.FAULTS[0].name)]).splitlines()[2].split("|")[2:-1]
    assert [cell.strip() for cell in cells] == ["2", "`vpg_torch`: **1 of 2**"]
