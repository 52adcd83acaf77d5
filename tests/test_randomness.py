"""Random streams: independent, reproducible, and the same on every machine."""

from __future__ import annotations

import numpy as np

from evomerge.randomness import generator


def test_streams_stay_what_recorded_runs_know() -> None:
    assert generator(0, "blocks").bit_generator.random_raw(2).tolist() == [
        13521639744000193945,
        6770291767774660154,
    ]
    assert generator(7, "cma", 3, "x").random() == 0.3437684599840012


def test_a_stream_can_be_opened_again() -> None:
    first = generator(3, "blocks", 5)
    first.random(1000)
    again = generator(3, "blocks", 5)
    assert np.array_equal(generator(3, "blocks", 5).random(1000), again.random(1000))
    assert first.random() != generator(3, "blocks", 5).random()


def test_every_argument_makes_a_stream_of_its_own() -> None:
    arguments = [
        (0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a", 1, 1), (0, "a", 11), (-1, "a"),
        (0, "a", "x"), (0, "a", "xy"), (0, "a", "x", "y"), (10, "a"), (1, "0", "a"), (2**70, "a"),
    ]  # fmt: skip
    starts = {tuple(generator(*a).integers(2**63, size=2)) for a in arguments}  # type: ignore[arg-type]
    assert len(starts) == len(arguments)


def test_neighbouring_streams_are_uncorrelated() -> None:
    streams = np.stack(
        [generator(0, "noise", generation).standard_normal(20_000) for generation in range(12)]
    )
    correlations = np.corrcoef(streams)[~np.eye(12, dtype=bool)]
    # The standard error of a correlation over n pairs is 1/sqrt(n); 132 of them stay within 4.5 of it.
    assert np.abs(correlations).max() < 4.5 / np.sqrt(20_000)
    assert np.abs(streams.mean(axis=1)).max() < 4.5 / np.sqrt(20_000)


def test_numpys_global_generator_is_left_alone() -> None:
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    generator(0, "blocks").random(10)
    assert np.random.random() == expected
