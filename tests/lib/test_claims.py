import dataclasses
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanrnn import _resources, claims

GOOD = {
    "id": "c1-edge-gain",
    "chapter": "01_vanishing_gradients",
    "source": "Somebody 2020, Fig. 3",
    "statement": "The edge lies at a gain of 1.74.",
    "kind": "statistical",
    "expected": 1.74,
    "tolerance": 0.03,
    "why": "six standard errors of 400 trials",
    "paper_value": "about 1.7",
    "verdict": "reproduced",
    "reason": "",
    "scale": "live",
    "rival": 1.0,
    "rival_is": "the edge of a network without input",
}
OTHERS = [
    {**GOOD, "id": "c1-identity", "kind": "exact", "expected": 0.6931471805599453, "tolerance": 1e-10},
    {**GOOD, "id": "c1-slope", "kind": "trend"},
]


def toml(*tables):
    lines = []
    for table in tables:
        lines.append(f"[{table['id']}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "id" and value is not None]
    return "\n".join(lines)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A claims file of three claims, one of each kind, in the place of the book's own."""
    path = tmp_path / "claims.toml"
    path.write_text(toml(GOOD, *OTHERS))
    monkeypatch.setattr(_resources, "find", lambda name: path)
    monkeypatch.delenv("SCANRNN_RECORDS", raising=False)
    return path


@pytest.fixture
def records(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "yet" / "there"
    monkeypatch.setenv("SCANRNN_RECORDS", str(folder))
    return folder


def recorded(folder):
    return [json.loads(line) for line in (folder / "01_vanishing_gradients.claims.jsonl").read_text().splitlines()]


# The claims file -----------------------------------------------------------------------------------------------------


def test_fields_are_those_of_the_contract():
    assert [field.name for field in dataclasses.fields(claims.Claim)] == list(GOOD)


def test_load_reads_every_field(file):
    loaded = claims.load()
    assert list(loaded) == ["c1-edge-gain", "c1-identity", "c1-slope"]
    assert dataclasses.asdict(loaded["c1-edge-gain"]) == GOOD
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded["c1-edge-gain"].tolerance = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_paper_value_and_reason_may_be_left_out(tmp_path):
    short = {key: value for key, value in GOOD.items() if key not in ("paper_value", "reason")}
    (tmp_path / "a.toml").write_text(toml(short))
    claim = claims.load(tmp_path / "a.toml")["c1-edge-gain"]
    assert claim.paper_value is None
    assert claim.reason == ""


@pytest.mark.parametrize(
    ("field", "value", "error", "allowed"),
    [
        ("kind", "Exact", ValueError, "('exact', 'statistical', 'trend')"),
        ("verdict", "confirmed", ValueError, "('reproduced', 'shape only', 'differs')"),
        ("scale", "paper", ValueError, "('live', 'table')"),
        ("tolerance", 0.0, ValueError, "positive"),
        ("tolerance", -0.1, ValueError, "positive"),
        ("expected", math.nan, ValueError, "finite"),
        ("rival", math.inf, ValueError, "finite"),
        ("expected", "1.74", TypeError, "a number"),
        ("tolerance", True, TypeError, "a number"),
        ("rival", 1.75, ValueError, "the tolerance does not exclude the rival"),
        ("statement", 3, TypeError, "a string"),
        ("rival_is", " ", ValueError, "a non-empty string"),
        ("paper_value", "", ValueError, "a non-empty string"),
        ("paper_value", 1.7, TypeError, "a string"),
        ("chapter", "../01_vanishing_gradients", ValueError, "a notebook's stem"),
        ("chapter", "02_curse_of_memory", ValueError, "starting with 'c2-'"),
        ("verdict", "differs", ValueError, "given, as the verdict is 'differs'"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(tmp_path, field, value, error, allowed):
    with pytest.raises(error) as raised:
        claims.Claim(**{**GOOD, field: value})
    for part in ["'c1-edge-gain'", field, allowed]:
        assert part in str(raised.value)
    if math.isfinite(value) if isinstance(value, float) else True:  # JSON and TOML spell NaN differently
        (tmp_path / "a.toml").write_text(toml({**GOOD, field: value}))
        with pytest.raises(error, match="c1-edge-gain"):
            claims.load(tmp_path / "a.toml")


@pytest.mark.parametrize("id", ["c1-Edge", "c1_edge", "c2-edge", "edge", "c1-", "c1-edge-", "c10-edge"])
def test_ids_are_kebab_case_and_prefixed_by_their_chapter(id):
    with pytest.raises(ValueError, match=r"kebab-case starting with 'c1-'"):
        claims.Claim(**{**GOOD, "id": id})


def test_a_verdict_other_than_reproduced_needs_its_reason():
    assert claims.Claim(**{**GOOD, "verdict": "differs", "reason": "the paper averages over seeds"}).reason


def test_a_rival_just_outside_the_tolerance_is_excluded():
    claims.Claim(**{**GOOD, "expected": 1.0, "tolerance": 0.5, "rival": 1.5625})
    with pytest.raises(ValueError, match="does not exclude the rival"):
        claims.Claim(**{**GOOD, "expected": 1.0, "tolerance": 0.5, "rival": 1.5})


def test_load_names_unknown_and_missing_fields(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(toml({**GOOD, "tolerence": 1.0}))
    with pytest.raises(
        ValueError, match=r"'c1-edge-gain' has the unknown field 'tolerence'; allowed are .*'tolerance'"
    ):
        claims.load(path)
    path.write_text(toml({key: value for key, value in GOOD.items() if key != "why"}))
    with pytest.raises(ValueError, match=r"'c1-edge-gain' lacks the field 'why'"):
        claims.load(path)
    path.write_text("answer = 42")
    with pytest.raises(ValueError, match=r"'answer' must be a table"):
        claims.load(path)
    path.write_text("[c1-edge-gain")
    with pytest.raises(ValueError, match=r"a\.toml must be valid TOML"):
        claims.load(path)


# Agreement -----------------------------------------------------------------------------------------------------------


def test_agrees_includes_the_tolerance_and_never_nan():
    claim = claims.Claim(**{**GOOD, "expected": 1.0, "tolerance": 0.5, "rival": 2.0})  # all exact in binary
    assert claims.agrees(claim, 1.5)
    assert claims.agrees(claim, 0.5)
    assert not claims.agrees(claim, np.nextafter(1.5, 2))
    assert not claims.agrees(claim, math.nan)
    assert not claims.agrees(claim, math.inf)


@pytest.mark.parametrize(
    ("id", "measured", "standard_error", "line"),
    [
        ("c1-edge-gain", 1.74213, 0.0042, "✓ c1-edge-gain: 1.742 ± 0.004 (expected 1.74 ± 0.03)"),
        ("c1-edge-gain", 1.74213, 0.0142, "✓ c1-edge-gain: 1.742 ± 0.014 (expected 1.74 ± 0.03)"),
        ("c1-edge-gain", 1.74213, 0.00996, "✓ c1-edge-gain: 1.74 ± 0.01 (expected 1.74 ± 0.03)"),
        ("c1-slope", 1.74213, None, "✓ c1-slope: 1.74 (expected 1.74 ± 0.03)"),
        ("c1-slope", 1.74213, 0.0042, "✓ c1-slope: 1.742 ± 0.004 (expected 1.74 ± 0.03)"),
        ("c1-identity", math.log(2), None, "✓ c1-identity: 0.6931471806 (expected 0.6931471806 ± 1e-10)"),
    ],
)
def test_check_prints_one_rounded_line(file, capsys, id, measured, standard_error, line):
    claims.check(id, measured, standard_error)
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (-0.001, "0.03", "0.00"),
        (0.0, "1e-10", "0"),
        (3.2e-17, "1e-10", "3e-17"),
        (3.21e-9, "1e-10", "3.2e-09"),
        (1234.6, "20", "1235"),
        (1.234e8, "2e+06", "1.23e+08"),
        (0.125, "0.25", "0.12"),
        (math.inf, "0.03", "inf"),
    ],
)
def test_rounding_keeps_lines_short(value, error, shown):
    assert claims.rounded(value, error) == shown


@pytest.mark.parametrize("number", [float, np.float32, np.float64, jnp.float32, jnp.asarray, np.asarray])
def test_any_real_scalar_is_measured(file, number):
    claims.check("c1-edge-gain", number(1.742), number(0.004))


@pytest.mark.parametrize("value", [np.ones(1), jnp.ones((1, 1)), [1.7], 1.7 + 0j, np.complex64(1.7), "1.7", None])
def test_what_is_not_one_real_number_is_refused(file, value):
    with pytest.raises(TypeError, match=r"measured must be one real number, got .* of type"):
        claims.check("c1-edge-gain", value, 0.004)


def test_a_traced_value_is_refused(file):
    with pytest.raises(TypeError, match="measured must be one real number"):
        jax.jit(lambda x: claims.check("c1-slope", x))(1.74)


# Standard errors -----------------------------------------------------------------------------------------------------


def test_statistical_claims_need_a_standard_error(file):
    with pytest.raises(TypeError, match=r"'c1-edge-gain' is statistical: standard_error must be given, got None"):
        claims.check("c1-edge-gain", 1.74)


def test_exact_claims_refuse_one(file):
    with pytest.raises(TypeError, match=r"'c1-identity' is exact: standard_error must be None, got 0\.1"):
        claims.check("c1-identity", math.log(2), 0.1)


@pytest.mark.parametrize("value", [0.0, -0.001, math.nan, math.inf])
def test_a_standard_error_is_finite_and_positive(file, value):
    with pytest.raises(ValueError, match=r"standard_error must be finite and positive, got"):
        claims.check("c1-edge-gain", 1.74, value)


@pytest.mark.parametrize("id", ["c1-edge-gain", "c1-slope"])
def test_a_measurement_too_noisy_to_test_the_claim_is_refused(file, id):
    claims.check(id, 1.74, 0.015)
    with pytest.raises(ValueError, match=r"at most half the tolerance 0\.03, got 0\.0151.*too noisy"):
        claims.check(id, 1.74, 0.0151)


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_failing_claim_says_everything(file, capsys):
    with pytest.raises(claims.ClaimFailed) as error:
        claims.check("c1-edge-gain", 1.7749123456, 0.004)
    assert isinstance(error.value, AssertionError)
    message = str(error.value)
    for part in ["c1-edge-gain", GOOD["statement"], "1.7749123456", "1.74 ± 0.03", GOOD["why"], GOOD["source"]]:
        assert part in message
    assert GOOD["rival_is"] not in message
    assert capsys.readouterr().out == "✗ c1-edge-gain: 1.775 ± 0.004 (expected 1.74 ± 0.03)\n"


def test_the_rival_put_in_for_the_measured_value_fails_and_is_recognised(file):
    with pytest.raises(claims.ClaimFailed, match=r"known mistake.*the edge of a network without input"):
        claims.check("c1-edge-gain", 1.01, 0.004)


def test_every_rival_of_the_book_fails():
    book = claims.load()
    assert book
    for claim in book.values():
        standard_error = None if claim.kind == "exact" else claim.tolerance / 2
        with pytest.raises(claims.ClaimFailed, match="known mistake"):
            claims.check(claim.id, claim.rival, standard_error)


def test_nan_fails(file):
    with pytest.raises(claims.ClaimFailed, match="measured   nan"):
        claims.check("c1-slope", math.nan)


def test_an_unknown_id_names_the_closest_ones_and_the_file(file):
    with pytest.raises(KeyError) as error:
        claims.check("c1-edgegain", 1.74, 0.004)
    assert type(error.value) is claims.UnknownClaim
    assert str(error.value) == f"no claim has the id 'c1-edgegain' (closest: c1-edge-gain); the claims are in {file}"
    with pytest.raises(claims.UnknownClaim, match="no id is close to it"):
        claims.check("zzz", 1.74, 0.004)


# Records -------------------------------------------------------------------------------------------------------------


def test_checks_are_recorded_failed_ones_too(file, records):
    claims.check("c1-edge-gain", 1.74213, 0.0042)
    with pytest.raises(claims.ClaimFailed):
        claims.check("c1-slope", 3)
    assert recorded(records) == [
        {"id": "c1-edge-gain", "measured": 1.74213, "standard_error": 0.0042, "agrees": True},
        {"id": "c1-slope", "measured": 3.0, "standard_error": None, "agrees": False},
    ]


def test_refused_measurements_are_not_recorded(file, records):
    with pytest.raises(ValueError, match="too noisy"):
        claims.check("c1-edge-gain", 1.74, 1.0)
    assert not records.exists()


def test_nothing_is_written_without_a_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    claims.check("c1-slope", 1.74)
    assert [path.name for path in tmp_path.iterdir()] == ["claims.toml"]


def test_claims_need_neither_jax_nor_matplotlib():
    code = "import sys, scanrnn.claims; sys.exit(len({'jax', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
