r"""Linear system identification: students of many kinds imitate a linear teacher, as Zucchet & Orvieto (2024) do.

    L(student) = ½ Σ_{k<T} (1 - k/T) |κ_student(k) - κ_teacher(k)|²

which is the loss expected of sequences of T white inputs, exactly (`theory.population_loss`); or, with `batch`, the
loss of sequences drawn afresh at every step, as the paper's runs have it.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from . import curvature, theory
from .eigenvalues import Cartesian, DirectNormalizer, ExponentialModulus, LearnedNormalizer, normalizer, ring
from .layers import LRU, S5, DiagonalRNN, LinearRNN
from .layers._base import LinearLayer
from .realizations import rotated
from .tasks import LinearTeacher
from .training import levenberg_marquardt, train

Student = Callable[..., LinearLayer]  # student(min_modulus=..., max_phase=..., key=...)

WIDTH = 64  # of the paper's students
LENGTH = 300  # of its sequences


# Students ------------------------------------------------------------------------------------------------------------


def rnn(*, min_modulus: float, max_phase: float, key: PRNGKeyArray, blocks: int = 1, width: int = WIDTH) -> LinearRNN:
    """The dense network, or one of equal blocks. As in the paper its moduli start from 0, whatever `min_modulus`."""
    return LinearRNN(1, width, 1, blocks=blocks, max_phase=max_phase, key=key)


def block_diagonal(**start: Any) -> LinearRNN:
    """64 real units in 32 blocks of two."""
    return rnn(**start, blocks=WIDTH // 2)


def block_diagonal_wide(**start: Any) -> LinearRNN:
    """128 real units in 64 blocks of two, as many eigenvalues as `complex_diagonal` has."""
    return rnn(**start, blocks=WIDTH, width=2 * WIDTH)


def dense_from_blocks(**start: Any) -> LinearRNN:
    """The dense network that starts as `block_diagonal`: the zeros between the blocks are parameters."""
    blocks = block_diagonal(**start)
    return LinearRNN.from_weights(blocks.matrix(), blocks.input_weight, blocks.output_weight, blocks.feedthrough)


def rotated_blocks(*, min_modulus: float, max_phase: float, key: PRNGKeyArray) -> LinearRNN:
    """`dense_from_blocks` in orthonormal coordinates drawn at random: the same network, no entry of A zero."""
    start_key, rotation_key = jr.split(key)
    return rotated(dense_from_blocks(min_modulus=min_modulus, max_phase=max_phase, key=start_key), rotation_key)


def complex_diagonal(*, min_modulus: float, max_phase: float, key: PRNGKeyArray) -> DiagonalRNN:
    """λ = a + ib, γ = 1: the paper's complex diagonal network."""
    lam, key = _ring(key, min_modulus, max_phase)
    return DiagonalRNN(1, WIDTH, 1, eigenvalues=Cartesian.from_eigenvalues(lam), key=key)


def complex_gamma(*, min_modulus: float, max_phase: float, key: PRNGKeyArray) -> DiagonalRNN:
    """λ = a + ib, and γ a parameter that starts at √(1 - |λ|²)."""
    lam, key = _ring(key, min_modulus, max_phase)
    return DiagonalRNN(
        1,
        WIDTH,
        1,
        eigenvalues=Cartesian.from_eigenvalues(lam),
        normalization=DirectNormalizer(normalizer(lam)),
        key=key,
    )


def complex_gamma_released(*, min_modulus: float, max_phase: float, key: PRNGKeyArray) -> DiagonalRNN:
    """`complex_gamma` as released: γ starts at √(1 - (Re λ)²), since a + ib is taken for modulus and phase there."""
    lam, key = _ring(key, min_modulus, max_phase)
    gamma = DirectNormalizer(normalizer(lam.real))
    return DiagonalRNN(1, WIDTH, 1, eigenvalues=Cartesian.from_eigenvalues(lam), normalization=gamma, key=key)


def lru(*, min_modulus: float, max_phase: float, key: PRNGKeyArray) -> LRU:
    """λ = exp(-e^ω_ν + i e^ω_θ), its phase counted from 0 to 2π, and γ = e^ω_γ."""
    return LRU(1, WIDTH, 1, min_modulus=min_modulus, max_modulus=1.0, max_phase=max_phase, key=key)


def lru_signed_phase(*, min_modulus: float, max_phase: float, key: PRNGKeyArray) -> DiagonalRNN:
    """λ = exp(-e^ω_ν + iθ) with the phase itself as parameter, of either sign, and γ = e^ω_γ."""
    lam, key = _ring(key, min_modulus, max_phase)
    return DiagonalRNN(
        1,
        WIDTH,
        1,
        eigenvalues=ExponentialModulus.from_eigenvalues(lam),
        normalization=LearnedNormalizer.from_eigenvalues(lam),
        key=key,
    )


def zero_order_hold(*, min_modulus: float, max_phase: float, key: PRNGKeyArray) -> S5:
    """λ = e^{ΔA} with a Δ for each unit: Re A = -1 and Δ = -log ν at the start, as in the released S4 variant."""
    lam, key = _ring(key, min_modulus, max_phase)
    step = -jnp.log(jnp.abs(lam))
    times = jnp.zeros_like(step), jnp.angle(lam) / step, jnp.log(step)
    return eqx.tree_at(lambda s: (s.log_decay, s.frequency, s.log_step), S5(1, WIDTH, 1, key=key), times)


def _ring(key: PRNGKeyArray, min_modulus: float, max_phase: float) -> tuple[Array, PRNGKeyArray]:
    eigenvalues_key, weights_key = jr.split(key)
    return ring(eigenvalues_key, WIDTH, min_modulus=min_modulus, max_modulus=1.0, max_phase=max_phase), weights_key


# Teachers ------------------------------------------------------------------------------------------------------------


def authors(*, min_modulus: float, max_phase: float, seed: int) -> LinearTeacher:
    """The released teacher, whatever the seed."""
    return LinearTeacher.released(min_modulus=min_modulus, max_phase=max_phase)


def fresh(*, min_modulus: float, max_phase: float, seed: int) -> LinearTeacher:
    """A teacher of its own for each seed, drawn from the law of the released one (10 units)."""
    return LinearTeacher(10, min_modulus=min_modulus, max_phase=max_phase, key=jr.key(seed))


# The experiment ------------------------------------------------------------------------------------------------------


def identify(
    point: dict[str, Any],
    *,
    student: Student,
    teacher: Callable[..., LinearTeacher],
    steps: int = 10_000,
    length: int = LENGTH,
    batch: int | None = None,
    optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
    observe: Callable[[Any, Any, Any, Any], Any] | None = None,
    every: int = 100,
) -> dict[str, Array]:
    r"""One run at one point of a grid, for `scanrnn.sweep.sweep`.

    **Arguments:** `point` with the numbers `nu0` (least modulus of the teacher's eigenvalues, and of the student's
    first ones), `max_phase` (the same for phases), `learning_rate`, `seed` (of the student) and `teacher_seed`;
    `student` and `teacher`, functions of this module; `optimizer`, a function of a learning-rate schedule; `batch`, how
    many sequences to draw at each step, or None for their expectation; `observe(student, optimizer_state, optimizer,
    learning_rate)`, called before every `every`-th step. The rate falls along a cosine from `learning_rate` to
    $10^{-7}$, or to a hundredth of it if that is less.

    **Returns** the columns

    - `final_loss`: mean of the last `every` losses; NaN if the run diverged
    - `diverged`: whether a loss or a gradient was not finite
    - `zero_loss`: the loss of predicting 0
    - `exact_loss`: the expected loss of the student at the end
    - `negative_eigenvalues`: how many eigenvalues of the teacher are real and negative
    - `curve`: mean loss of every `every` steps, (steps / every,)
    - the columns that `observe` returns, (steps / every,) each; entry e is from before step e · `every`.
    """
    system, start, data_key = _teacher_and_student(point, teacher, student)
    target = system.impulse_response(length)

    def exact(layer: LinearLayer) -> Float[Array, ""]:
        return theory.population_loss(layer.impulse_response(length), target)

    def sampled(layer: LinearLayer, key: PRNGKeyArray) -> Float[Array, ""]:
        kernel, inputs = layer.impulse_response(length), jr.normal(key, (batch or 1, length, 1))
        return jnp.mean(jax.vmap(theory.sampled_loss, (None, None, 0))(kernel, target, inputs))

    rate = point["learning_rate"]
    schedule = optax.cosine_decay_schedule(1.0, steps)
    floor = jnp.minimum(1e-7, rate / 100)  # the paper's; plain gradient descent begins below it
    rate_at = lambda k: floor + (rate - floor) * schedule(k)  # noqa: E731
    chosen = optimizer(rate_at)
    trained, _, record = train(
        exact if batch is None else sampled,
        start,
        chosen,
        steps,
        key=None if batch is None else data_key,
        observe=None if observe is None else lambda layer, state, k: observe(layer, state, chosen, rate_at(k)),
        every=every,
    )
    curve = jnp.mean(record.loss.reshape(-1, every), axis=1)
    diverged = record.steps_taken < steps
    columns = {
        "final_loss": jnp.where(diverged, jnp.nan, curve[-1]),
        "diverged": diverged,
        "zero_loss": theory.population_loss(jnp.zeros_like(target), target),
        "exact_loss": exact(trained),
        "negative_eigenvalues": _real_negative(system.eigenvalues()),
        "curve": curve,
    }
    return columns if observe is None else columns | record.observed


def _teacher_and_student(
    point: dict[str, Any], teacher: Callable[..., LinearTeacher], student: Student
) -> tuple[LinearTeacher, LinearLayer, PRNGKeyArray]:
    """Those of the point, and a key for the data."""
    where = {"min_modulus": point["nu0"], "max_phase": point["max_phase"]}
    student_key, data_key = jr.split(jr.key(point["seed"]))
    return teacher(**where, seed=point["teacher_seed"]), student(**where, key=student_key), data_key


def _real_negative(lam: Array) -> Array:
    return jnp.sum((jnp.abs(lam.imag) < 1e-6) & (lam.real < 0))


def identify_by_gauss_newton(
    point: dict[str, Any],
    *,
    student: Student,
    teacher: Callable[..., LinearTeacher],
    steps: int = 200,
    length: int = LENGTH,
    every: int = 1,
) -> dict[str, Array]:
    """`identify` by `training.levenberg_marquardt` on the expected loss; `learning_rate` is not used. In float64."""
    system, start, _ = _teacher_and_student(point, teacher, student)
    target = system.impulse_response(length)
    weights = jnp.sqrt(1 - jnp.arange(length) / length)

    def residuals(layer: LinearLayer) -> Array:
        return weights * (layer.impulse_response(length) - target)[:, 0, 0]

    trained, record = levenberg_marquardt(residuals, start, steps)
    final = theory.population_loss(trained.impulse_response(length), target)
    return {
        "final_loss": final,
        "diverged": ~jnp.isfinite(final),
        "zero_loss": theory.population_loss(jnp.zeros_like(target), target),
        "exact_loss": final,
        "negative_eigenvalues": _real_negative(system.eigenvalues()),
        "curve": jnp.mean(record.loss.reshape(-1, every), axis=1),
    }


def constant_adam(schedule: Callable[[int], float]) -> optax.GradientTransformation:
    """For `identify`: Adam at the first rate of the schedule, throughout."""
    return optax.adam(schedule(0))


SUMMARY = ("least", "quartile1", "median", "quartile3", "greatest", "not_positive", "above_base")


def rates_by_group(layer: LinearLayer, state: Any, optimizer: Any, _: Array) -> dict[str, Array]:
    """To observe in `identify` under `constant_adam`: effective learning rates of each array of parameters.

    `released` is `curvature.released_effective_learning_rate`, `clean` `curvature.effective_learning_rate`, both per
    unit of the base rate η; (arrays, 7) each, in the order of `curvature.groups` and of `SUMMARY`.
    """
    base = optimizer.init(layer)
    eta = -optimizer.update(jax.tree.map(jnp.ones_like, layer), base)[0].feedthrough.ravel()[0]
    released = curvature.released_effective_learning_rate(optimizer, state)
    clean = curvature.effective_learning_rate(state, eta)

    def summary(rates: Array) -> Array:
        ratios = rates.ravel() / eta
        quantiles = jnp.quantile(ratios, jnp.array([0, 0.25, 0.5, 0.75, 1]))
        return jnp.concatenate([quantiles, jnp.stack([jnp.mean(ratios <= 0), jnp.mean(ratios > 1)])])

    return {
        "released": jnp.stack([summary(leaf) for leaf in jax.tree.leaves(released)]),
        "clean": jnp.stack([summary(leaf) for leaf in jax.tree.leaves(clean)]),
    }


OBSERVED = ("released_rate", "negative", "rate")


def rates_of_recurrent_weights(layer: LinearRNN, state: Any, optimizer: Any, learning_rate: Array) -> dict[str, Array]:
    r"""To observe in `identify`: mean effective learning rates of A, over its stored entries.

    - `released_rate`: $10^{\langle\log_{10}(\max(r,0)+10^{-8})\rangle}$ with r the rates of
      `curvature.released_effective_learning_rate`
    - `negative`: the share of entries with r <= 0, which the paper's figures leave out or count as $10^{-8}$
    - `rate`: the geometric mean of `curvature.effective_learning_rate`
    """
    released = curvature.released_effective_learning_rate(optimizer, state).recurrent
    clean = curvature.effective_learning_rate(state, learning_rate).recurrent
    return {
        "released_rate": 10 ** jnp.mean(jnp.log10(jnp.maximum(released, 0) + 1e-8)),
        "negative": jnp.mean(released <= 0),
        "rate": 10 ** jnp.mean(jnp.log10(clean)),
    }
