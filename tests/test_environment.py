"""Network, telemetry and threads are decided before anything is imported."""

from __future__ import annotations

import os

import pytest

from evomerge.environment import OFFLINE, THREAD_VARIABLES, prepare


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(os, "environ", {})
    return monkeypatch


@pytest.mark.usefixtures("bare")
def test_a_run_is_offline_quiet_and_on_one_thread() -> None:
    prepare()
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        assert os.environ[name] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        assert os.environ[name] == "1"


@pytest.mark.usefixtures("bare")
def test_a_hub_id_opens_the_network_and_threads_can_be_left_alone() -> None:
    prepare(offline=False, threads=None)
    assert not set(OFFLINE) & set(os.environ)
    assert not set(THREAD_VARIABLES) & set(os.environ)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.usefixtures("bare")
def test_what_the_user_set_wins_but_not_over_telemetry() -> None:
    os.environ.update(OMP_NUM_THREADS="8", HF_HUB_OFFLINE="0", RAY_USAGE_STATS_ENABLED="1")
    prepare(threads=2)
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert os.environ["MKL_NUM_THREADS"] == "2"
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
