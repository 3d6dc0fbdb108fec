"""Every refusal names the argument, the value received and what is allowed; abstract values are not looked at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanrnn._checks import (
    is_abstract,
    require_finite,
    require_inexact,
    require_integer,
    require_rank,
    require_values,
    time_length,
)


def positive(value):
    require_values("gain", value, "positive", lambda g: g > 0)


def test_a_value_is_abstract_if_any_leaf_is():
    assert not is_abstract({"a": jnp.ones(2), "b": 1.0, "c": np.ones(3), "d": None})
    seen = []
    jax.jit(lambda x: seen.append((is_abstract(x), is_abstract((1.0, {"x": x})), is_abstract(jnp.shape(x)))))(1.0)
    assert seen == [(True, True, False)]


def test_values_are_refused_with_the_index_of_the_first_bad_one():
    positive(1.0)
    positive(np.ones((2, 2)))
    positive(jnp.zeros((0, 3)))  # nothing to refuse
    with pytest.raises(ValueError, match=r"^gain must be positive, got -1\.5$"):
        positive(-1.5)
    with pytest.raises(ValueError, match=r"^gain must be positive, got -3\.0 at index \(1, 0\)$"):
        positive(jnp.array([[1.0, 2.0], [-3.0, -4.0]]))
    with pytest.raises(ValueError, match="gain must be positive, got nan"):
        positive(float("nan"))  # a comparison with NaN is false


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad, jax.linearize])
def test_traced_values_are_not_looked_at(transform):
    def function(x):
        positive(x)
        require_finite("x", x)
        return x

    argument = -jnp.ones(2) if transform is jax.vmap else -1.0
    transform(function, argument) if transform is jax.linearize else transform(function)(argument)
    with pytest.raises(ValueError, match="gain must be positive"):
        function(argument)


def test_values_are_not_looked_at_inside_scan():
    def step(carry, x):
        positive(x)
        return carry, x

    np.testing.assert_array_equal(jax.lax.scan(step, 0.0, -jnp.ones(2))[1], -jnp.ones(2))


def test_every_floating_leaf_must_be_finite():
    require_finite("inputs", (jnp.ones(2), np.arange(3), 2, 1.0, 1j, None, jax.random.key(0)))
    with pytest.raises(ValueError, match=r"inputs must be finite, got inf at index \(2,\)"):
        require_finite("inputs", {"a": jnp.ones(2), "b": np.array([0.0, 1.0, np.inf])})
    with pytest.raises(ValueError, match=r"inputs must be finite, got \(?nan"):
        require_finite("inputs", jnp.array(complex(np.nan, 0.0)))
    with pytest.raises(ValueError, match=r"inputs must be finite, got nan at index \(0,\)"):
        require_finite("inputs", jnp.array([np.nan], jnp.bfloat16))
    seen = []

    @jax.jit
    def mixed(x):  # the concrete leaf beside a traced one is still checked
        with pytest.raises(ValueError, match="finite"):
            require_finite("inputs", (x, np.array([np.nan])))
        seen.append(True)

    mixed(1.0)
    assert seen


@pytest.mark.parametrize("value", [1, np.arange(3), jnp.ones(2, bool), (jnp.ones(2), jnp.ones(2, int))])
def test_states_must_be_floating_point(value):
    require_inexact("state", (1.0, 1j, jnp.ones(2, jnp.float32), np.ones(2, complex)))
    with pytest.raises(TypeError, match=r"state must be floating point \(real or complex\), got (int|bool)"):
        require_inexact("state", value)
    with pytest.raises(TypeError, match="state must be floating point"):  # a dtype is static
        jax.jit(lambda x: require_inexact("state", x))(value)


def test_ranks():
    require_rank("inputs", np.ones((1, 1)), 2)
    require_rank("inputs", jnp.ones(3), 1, 2)
    with pytest.raises(ValueError, match=r"inputs must have 1 or 2 axes, got shape \(\)"):
        require_rank("inputs", 0.5, 1, 2)
    with pytest.raises(ValueError, match=r"inputs must have 0 axes, got shape \(4, 3\)"):
        jax.jit(lambda x: require_rank("inputs", x, 0))(jnp.ones((4, 3)))


def test_integers():
    require_integer("n", 3, minimum=3)
    require_integer("n", np.int64(3), minimum=0, maximum=3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        require_integer("n", 0, minimum=1)
    with pytest.raises(ValueError, match="n must be between 1 and 4, got 5"):
        require_integer("n", 5, minimum=1, maximum=4)
    for value in (3.0, True, "3", None, np.float64(3)):
        with pytest.raises(TypeError, match=r"n must be an integer, got .* of type"):
            require_integer("n", value, minimum=0)


def test_time_length():
    assert time_length("inputs", jnp.ones((5, 2))) == 5
    assert time_length("inputs", {"a": jnp.ones(4), "b": np.ones((4, 0))}) == 4
    assert jax.jit(lambda x: time_length("inputs", x))(jnp.ones((6, 1))) == 6
    with pytest.raises(ValueError, match=r"inputs must have one common time length, got \[3, 4\]"):
        time_length("inputs", (jnp.ones(3), jnp.ones(4)))
    with pytest.raises(ValueError, match=r"inputs must have at least one time step, got shapes \[\(0, 2\)\]"):
        time_length("inputs", jnp.ones((0, 2)))
    with pytest.raises(ValueError, match=r"inputs must have time as leading axis, got shapes \[\(2,\), \(\)\]"):
        time_length("inputs", (jnp.ones(2), 1.0))
    with pytest.raises(ValueError, match=r"inputs must have time as leading axis, got shapes \[\]"):
        time_length("inputs", None)
