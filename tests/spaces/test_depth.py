from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.space_config import Groups, Smooth
from evomerge.spaces.depth import check_depth, control_names, over_depth, positions

finite = st.floats(-3, 3)


@given(st.data(), st.integers(2, 40))
def test_a_smooth_curve_is_linear_interpolation_between_equally_spaced_layers(data, layers):
    controls = data.draw(st.lists(finite, min_size=2, max_size=layers))
    values = over_depth(controls, Smooth(smooth=len(controls)), layers)
    expected = np.interp(np.arange(layers), np.linspace(0, layers - 1, len(controls)), controls)
    np.testing.assert_allclose(values[1:-1], expected, rtol=0, atol=1e-12)
    assert (values[0], values[-1]) == (controls[0], controls[-1])
    assert min(controls) <= min(values)
    assert max(values) <= max(controls)


@given(st.data(), st.integers(2, 40))
def test_a_logarithmic_curve_interpolates_the_logarithm(data, layers):
    controls = data.draw(st.lists(st.floats(1e-3, 10), min_size=2, max_size=layers))
    values = over_depth(controls, Smooth(smooth=len(controls)), layers, log=True)
    expected = np.exp(
        np.interp(np.arange(layers), np.linspace(0, layers - 1, len(controls)), np.log(controls))
    )
    np.testing.assert_allclose(values[1:-1], expected, rtol=1e-12)


@given(finite, st.integers(2, 40), st.integers(2, 5))
def test_a_curve_between_equal_controls_is_exactly_flat(value, layers, count):
    count = min(count, layers)
    assert set(over_depth([value] * count, Smooth(smooth=count), layers)) == {value}


def test_an_integer_curve_is_rounded_between_its_knots():
    assert over_depth([1.0, 4.0], Smooth(smooth=2), 5, integer=True) == (1, 1, 2, 3, 3, 4, 4)


@given(st.data(), st.integers(1, 60))
def test_groups_are_consecutive_and_differ_by_one_layer_at_most(data, layers):
    count = data.draw(st.integers(1, layers))
    values = over_depth([float(i) for i in range(count)], Groups(groups=count), layers)
    assert list(values) == sorted(values)
    sizes = np.bincount(np.array(values[1:-1], dtype=int), minlength=count)
    assert sizes.max() - sizes.min() <= 1
    assert (values[0], values[-1]) == (0, count - 1)


def test_single_values_and_layers_cover_all_positions():
    assert positions(3) == ("pre", 0, 1, 2, "post")
    assert over_depth([0.5], "global", 3) == (0.5,) * 5
    assert over_depth([0.1, 0.2, 0.3], "layers", 3) == (0.1, 0.1, 0.2, 0.3, 0.3)


def test_control_values_are_named_by_place():
    assert control_names("global", 4) == ("",)
    assert control_names(Smooth(smooth=2), 4) == ("1/2", "2/2")
    assert control_names(Groups(groups=3), 4) == ("layers 0-1", "layer 2", "layer 3")
    assert control_names("layers", 2) == ("layer 0", "layer 1")


@pytest.mark.parametrize("depth", [Groups(groups=5), Smooth(smooth=5)])
def test_more_controls_than_layers_are_refused(depth):
    check_depth(depth, 5)
    with pytest.raises(ValueError, match="more than the model's 4 layers; give at most 4"):
        check_depth(depth, 4)
