from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from tests.optimizers.problems import CASES, floats, make, noisy, run, space_of, sphere, tell_of


def asks_of(kind: str, space: str, seed: int = 5):
    return run(make(kind, space_of(space), seed=seed), noisy, 90)


def test_a_replay_in_a_fresh_process_asks_the_same_bit_for_bit():
    answer = subprocess.run(
        [sys.executable, "-m", "tests.optimizers.problems"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "99", "OPENBLAS_NUM_THREADS": "2"},
    )
    for (kind, space), fresh in zip(CASES, json.loads(answer.stdout), strict=True):
        assert fresh == [[list(g) for g in asks] for asks in asks_of(kind, space)]


@pytest.mark.parametrize(("kind", "space"), CASES)
def test_asks_depend_on_nothing_but_seed_and_tells(kind, space):
    expected = asks_of(kind, space)
    optimizer = make(kind, space_of(space), seed=5)
    for generation, asks in enumerate(expected):
        np.random.seed(generation)
        random.seed(generation)
        np.random.rand(3)
        assert optimizer.ask(generation) == asks
        optimizer.tell(generation, tell_of(asks, noisy)[::-1])


def test_the_number_of_blas_threads_changes_no_bit():
    # Below some 200 dimensions OpenBLAS does not split the eigendecomposition.
    def asks_on(threads: int):
        with threadpool_limits(threads):
            return run(make("cma", floats(300), seed=5), sphere, 240)

    assert asks_on(1) == asks_on(2)


@pytest.mark.parametrize(("kind", "space"), CASES)
def test_the_global_generators_stay_untouched(kind, space):
    np.random.seed(1)
    before = np.random.get_state(legacy=False)["state"], random.getstate()
    asks_of(kind, space)
    after = np.random.get_state(legacy=False)["state"], random.getstate()
    assert after[0]["pos"] == before[0]["pos"]
    assert (after[0]["key"] == before[0]["key"]).all()
    assert after[1] == before[1]


@pytest.mark.parametrize(("kind", "space"), CASES)
def test_another_seed_asks_something_else(kind, space):
    assert asks_of(kind, space, seed=6)[1] != asks_of(kind, space)[1]


@pytest.mark.parametrize("kind", ["cma", "catcma", "tpe", "random"])
def test_nothing_is_written_or_printed(kind, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run(make(kind, floats(3)), noisy, 40)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
