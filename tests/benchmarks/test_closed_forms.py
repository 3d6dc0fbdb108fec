"""How fast the curves of Zucchet & Orvieto's Figs 1, 2, 6 and 7 are there, beside the way of the released notebooks.

Run by `make bench`; never part of the test suite. Two ways take turns, each in a fresh process that remembers no
compilation, since that is what a reader of the page or of the notebook waits for:

- ours: all curves of Figs 1, 2 and 6 in one compiled program, a second derivative as two forward derivatives along a
  whole grid; each descent of Fig. 7 in one compiled scan, its three parametrisations together;
- the notebooks', written anew from their description: operation by operation, one call per curve, second derivatives
  by `jax.hessian` of the loss as printed, mapped over the points; in Fig. 7 a Python loop that calls a compiled step
  and collects what it returns in lists; the maps of the loss point by point.

Both work in double precision and must give the same numbers. "Curves" is the time from JAX imported to all numbers in
NumPy, compilation and (ours) the import of scanrnn included; "process" adds the start of Python and of JAX. Nothing is
plotted.
"""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

# Neither pytest nor scanrnn up here: the processes that are timed run this file.

RHOS = np.array([0.0, 0.9, 0.99, 0.999, 1.0])
TEACHERS = 1 - np.array([0.64, 0.32, 0.16, 0.08, 0.04, 0.02, 0.01])  # λ*
REAL = 1 - 10 ** np.linspace(-4, 0, 1000)  # λ of Figs 1 A and 2
MODULI, PHASES = np.linspace(0, 1, 1000), np.linspace(-np.pi, np.pi, 1000)  # of λ in Fig. 1 B and C

# Fig. 6: grids of ω_ν, and of x, where ω_θ = πx as in the released code, so that d²L/dx² = π² d²L/dω_θ². Along the
# first the phases are 0, which is the given ω_θ; along the second λ* has the phase π/100, and |λ| = |λ*| the given ω_ν.
PHASE = np.pi / 100
GRIDS = {
    "polar": (np.linspace(0, 1, 10_000), 0.0, np.linspace(-1, 1, 1000), TEACHERS),
    "exp": (np.linspace(-9, 2, 10_000), -np.inf, np.linspace(-3, np.log10(np.pi), 10_000), np.log(-np.log(TEACHERS))),
    "opt": (np.linspace(-2.0001, 5, 10_000), 0.0, np.linspace(-5, 5, 10_000), np.arctanh(TEACHERS)),
}

# Fig. 7, where ν = tanh ω_ν in all three parametrisations: polar, exp, opt. MAPS: ω_ν and ω_θ of the maps of the loss.
# The student starts at .99 e^{iπ/4}.
TEACHER = 0.99 * np.exp(1j * PHASE)
OPTIMAL_START = np.pi / 4 * 0.99 * np.sqrt(1 + 0.99**2) / (1 - 0.99**2)
STARTS = [(np.arctanh(0.99), omega_theta) for omega_theta in (np.pi / 4, np.log(np.pi / 4), OPTIMAL_START)]
MAPS = [
    (np.linspace(1.5, 3, 1000), np.linspace(-0.2, 1.2, 1000)),
    (np.linspace(0.5, 3, 1000), np.linspace(-5, 1, 1000)),
    (np.linspace(0.5, 3, 1000), np.linspace(-20, 80, 1000)),
]
RATE, STEPS = 1e-3, 50_000
# Then Adam has reached the minimum, where it divides rounding errors by rounding errors.
COMPARED_STEPS = 5_000

ROUNDS = 3


def adam():
    import optax

    return optax.adam(RATE)


def released_adam():
    """Adam whose state is thrown away after each step, as in the released code: the sign of the gradient."""
    import optax

    keeping = optax.adam(RATE)

    def update(updates, state, params=None):
        return keeping.update(updates, keeping.init(updates), params)[0], state

    return optax.GradientTransformation(keeping.init, update)


# --- Ours


def ours_figures_1_2_6():
    from scanrnn.eigenvalues import Exponential, Optimal, Polar
    from scanrnn.theory import one_dim_loss, sensitivity_variance, state_variance

    def value_and_curvature(loss, x):
        ones = jnp.ones_like(x)  # each point has its own number, so one direction serves all

        def slope(x):
            return jax.jvp(loss, (x,), (ones,))[1]

        return loss(x), jax.jvp(slope, (x,), (ones,))[1]

    def figure_6(law, moduli, no_phase, phases, modulus):
        star = TEACHERS[:, None]

        def along_moduli(omega):
            return one_dim_loss(law(omega, jnp.full_like(omega, no_phase))(), star, normalized=True)

        def along_phases(x):
            lam = law(jnp.asarray(modulus)[:, None], jnp.pi * x)()
            return one_dim_loss(lam, star * np.exp(1j * PHASE), normalized=True)

        grids = (along_moduli, jnp.asarray(moduli)), (along_phases, jnp.asarray(phases))
        return [curve for loss, grid in grids for curve in value_and_curvature(loss, grid)]

    @jax.jit
    def curves():
        rho, star = RHOS[:, None], TEACHERS[:, None]
        state, sensitivity = state_variance(REAL, rho), sensitivity_variance(REAL, rho)
        squared_gamma = 1 - REAL**2
        squared_slope = jax.scipy.special.xlogy(REAL, REAL) ** 2  # (dλ/dω)² of λ = exp(-e^ω)
        return {
            "1A": [sensitivity, state[-1:]],
            "1BC": [one_dim_loss(MODULI, star), one_dim_loss(star * np.exp(1j * PHASES), star)],
            "2": [squared_gamma * state, squared_gamma * squared_slope * sensitivity],
            "6 polar": figure_6(Polar, *GRIDS["polar"]),
            "6 exp": figure_6(Exponential, *GRIDS["exp"]),
            "6 opt": figure_6(Optimal, *GRIDS["opt"]),
        }

    return curves()


def ours_figure_7(make_optimizer):
    from scanrnn.eigenvalues import Optimal, Polar
    from scanrnn.theory import one_dim_loss
    from scanrnn.training import descend

    laws = (lambda a, b: Polar(jnp.tanh(a), b), lambda a, b: Polar(jnp.tanh(a), jnp.exp(b)), Optimal)

    def losses(omegas):
        return one_dim_loss(jnp.stack([law(*omega)() for law, omega in zip(laws, omegas, strict=True)]), TEACHER)

    # Adam treats each parameter by itself, so on the sum of the losses each student descends as if alone.
    start = [jnp.array(omega) for omega in STARTS]
    _, history = descend(lambda omegas: losses(omegas).sum(), start, make_optimizer(), STEPS)

    @jax.jit
    def curves(visited):
        maps = [law(jnp.asarray(x), jnp.asarray(y)[:, None])() for law, (x, y) in zip(laws, MAPS, strict=True)]
        trajectories = jnp.stack(visited).swapaxes(1, 2)
        return {"7": [jax.vmap(losses, out_axes=1)(visited), trajectories, one_dim_loss(jnp.stack(maps), TEACHER)]}

    return curves(history.parameters)


# --- The notebooks' way


def plain_loss(lam, star):
    variances = 1 / (1 - jnp.abs(lam) ** 2) + 1 / (1 - jnp.abs(star) ** 2)
    return 0.5 * (variances - 2 * (1 / (1 - lam * jnp.conj(star))).real)


def normalized_loss(lam, star):
    gamma, gamma_star = jnp.sqrt(1 - jnp.abs(lam) ** 2), jnp.sqrt(1 - jnp.abs(star) ** 2)
    variances = gamma**2 / (1 - jnp.abs(lam) ** 2) + gamma_star**2 / (1 - jnp.abs(star) ** 2)  # both 1
    return 0.5 * (variances - 2 * gamma * gamma_star * (1 / (1 - lam * jnp.conj(star))).real)


def polar_law(nu, theta):
    return nu * jnp.exp(1j * theta)


def exp_law(omega_nu, omega_theta):
    return polar_law(jnp.exp(-jnp.exp(omega_nu)), jnp.exp(omega_theta))


def opt_law(omega_nu, omega_theta):
    nu = jnp.tanh(omega_nu)
    return polar_law(nu, omega_theta * (1 - nu**2) / (nu * jnp.sqrt(1 + nu**2)))


def notebooks_figures_1_2_6():
    def state(lam, rho):
        return (1 + rho * lam) / ((1 - rho * lam) * (1 - lam**2))

    def sensitivity(lam, rho):
        top = (1 + lam**2) * (1 - lam**2 * rho**2) + 2 * (1 - lam**2) * lam * rho
        return top / ((1 - lam**2) ** 3 * (1 - lam * rho) ** 2)

    def figure_6(law, moduli, no_phase, phases, modulus):
        moduli, phases = jnp.asarray(moduli), jnp.asarray(phases)
        curves = [], [], [], []
        for star, omega_nu in zip(jnp.asarray(TEACHERS), jnp.asarray(modulus), strict=True):

            def along_moduli(omega, star=star):
                return normalized_loss(law(omega, no_phase), star)

            def along_phases(x, star=star, omega_nu=omega_nu):
                return normalized_loss(law(omega_nu, jnp.pi * x), star * jnp.exp(1j * PHASE))

            curves[0].append(along_moduli(moduli))
            curves[1].append(jax.vmap(jax.hessian(along_moduli))(moduli))
            curves[2].append(along_phases(phases))
            curves[3].append(jax.vmap(jax.hessian(along_phases))(phases))
        return curves

    lam, moduli, phases, teachers = map(jnp.asarray, (REAL, MODULI, PHASES, TEACHERS))
    slope = jax.vmap(jax.grad(lambda omega: jnp.exp(-jnp.exp(omega))))(jnp.log(-jnp.log(lam)))
    return {
        "1A": [[sensitivity(lam, rho) for rho in RHOS], [state(lam, 1.0)]],
        "1BC": [
            [plain_loss(moduli, star) for star in teachers],
            [plain_loss(star * jnp.exp(1j * phases), star) for star in teachers],
        ],
        "2": [
            [(1 - lam**2) * state(lam, rho) for rho in RHOS],
            [(1 - lam**2) * slope**2 * sensitivity(lam, rho) for rho in RHOS],
        ],
        "6 polar": figure_6(polar_law, *GRIDS["polar"]),
        "6 exp": figure_6(exp_law, *GRIDS["exp"]),
        "6 opt": figure_6(opt_law, *GRIDS["opt"]),
    }


def notebooks_figure_7(make_optimizer):
    import optax

    optimizer = make_optimizer()
    laws = lambda a, b: polar_law(jnp.tanh(a), b), lambda a, b: polar_law(jnp.tanh(a), jnp.exp(b)), opt_law
    curves = [], [], []
    for law, start, (x, y) in zip(laws, STARTS, MAPS, strict=True):

        def loss(omega, law=law):
            return plain_loss(law(*omega), TEACHER)

        @jax.jit
        def step(omega, state, loss=loss):
            value, gradient = jax.value_and_grad(loss)(omega)
            updates, state = optimizer.update(gradient, state)
            return value, optax.apply_updates(omega, updates), state

        omega, losses, visited = jnp.array(start), [], []
        state = optimizer.init(omega)
        for _ in range(STEPS):
            visited.append(omega)
            value, omega, state = step(omega, state)
            losses.append(value)
        curves[0].append(np.asarray(losses))  # as plotting does
        curves[1].append(np.stack(visited).T)  # the notebook's jnp.stack of 50,000 arrays takes minutes in recent JAX
        curves[2].append(jax.vmap(lambda x, y, loss=loss: loss(jnp.stack([x, y])))(*jnp.meshgrid(x, y)))
    return {"7": curves}


# --- Side by side

CASES = {
    "Figs 1, 2, 6": {"ours": ours_figures_1_2_6, "notebooks": notebooks_figures_1_2_6},
    "Fig. 7, as released": {
        "ours": lambda: ours_figure_7(released_adam),
        "notebooks": lambda: notebooks_figure_7(released_adam),
    },
    "Fig. 7, with Adam": {"ours": lambda: ours_figure_7(adam), "notebooks": lambda: notebooks_figure_7(adam)},
}


def compute_and_report(figures, way, file=None):
    """What a process does: all curves, their seconds to standard output, and to `file` the numbers if it is given."""
    began = time.perf_counter()
    groups = CASES[figures][way]()
    curves = {f"{name}, {i}": np.asarray(curve) for name, group in groups.items() for i, curve in enumerate(group)}
    print(time.perf_counter() - began)
    if file is not None:
        np.savez(file, **curves)  # pyright: ignore[reportArgumentType]


def process(figures, way, *file):
    """Seconds of a fresh process, whole and for the curves."""
    environment = {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    began = time.perf_counter()
    command = [sys.executable, __file__, figures, way, *map(str, file)]
    output = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE).stdout
    return {"process": time.perf_counter() - began, "curves": float(output)}


def assert_same_numbers(ours, theirs):
    """Up to rounding, which the formulas as printed make worse: there 1 - |λ|² has lost the digits of |λ|² ≈ 1."""
    tolerance = 4 * np.finfo(float).eps / (1 - 0.9999**2)
    assert set(ours) == set(theirs)
    for name, got in ours.items():
        # Without the ends of a grid: there λ = 1, or log λ or the derivative of |λ| does not exist (λ = 0).
        compared = slice(1, COMPARED_STEPS if name.startswith("7") else -1)
        got, want = got[..., compared], theirs[name][..., compared]
        # Moments are products, right in each digit that is left; losses are differences of terms as large as a curve
        scale = np.abs(want) if name.startswith(("1A", "2")) else np.abs(want).max(axis=-1, keepdims=True)
        assert np.all(np.abs(got - want) <= tolerance * scale), name


def pytest_generate_tests(metafunc):
    metafunc.parametrize("figures", CASES)


def test_same_curves_faster(benchmark, figures, tmp_path):
    files = {way: tmp_path / f"{way}.npz" for way in CASES[figures]}
    for way, file in files.items():  # untimed: the first process of its kind also waits for the disk
        process(figures, way, file)
    with np.load(files["ours"]) as ours, np.load(files["notebooks"]) as theirs:
        assert_same_numbers(dict(ours), dict(theirs))

    times = {way: [] for way in files}

    def notebooks_first():  # they take turns, so that a busy moment of the machine meets both
        times["notebooks"].append(process(figures, "notebooks"))

    benchmark.pedantic(
        lambda: times["ours"].append(process(figures, "ours")), setup=notebooks_first, rounds=ROUNDS, iterations=1
    )
    print(f"\n\n{figures:20}{'ours s':>8}{'notebooks s':>13}{'ratio':>7}   (wanted: 5)")
    for part in ("curves", "process"):  # the least of the rounds: whatever else the machine does only adds
        ours, theirs = (min(seconds[part] for seconds in times[way]) for way in ("ours", "notebooks"))
        print(f"  {part:18}{ours:8.2f}{theirs:13.2f}{theirs / ours:7.1f}")
        benchmark.extra_info[f"ratio, {part}"] = theirs / ours
        assert ours < theirs


if __name__ == "__main__":
    compute_and_report(*sys.argv[1:])
