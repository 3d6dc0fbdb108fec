r"""Claims: every number that the book takes from a paper or a theorem, and the check that it holds.

A measured value $m$ agrees with a claim of expected value $e$ and tolerance $\tau$ when

$$ |m - e| \le \tau , $$

and the tolerance excludes the claim's rival $r$, the value that a wrong theory or a common mistake would give:
$|r - e| > \tau$. So no claim is a tautology.
"""

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from . import _resources

_ALLOWED = {
    "kind": ("exact", "statistical", "trend"),
    "verdict": ("reproduced", "shape only", "differs"),
    "scale": ("live", "table"),
}
_NUMBERS = ("expected", "tolerance", "rival")
_OPTIONAL = {"paper_value": None, "reason": ""}


class ClaimFailed(AssertionError):
    """The measured value does not agree with the claim."""


class UnknownClaim(KeyError):
    """No claim has this id."""

    def __str__(self) -> str:  # KeyError shows the repr of its message
        return self.args[0]


@dataclass(frozen=True)
class Claim:
    """One table of `claims.toml`; creating one checks it.

    - `id`: in kebab-case, prefixed by the chapter's number: `c1-gradient-sum`
    - `chapter`: the notebook's stem: `01_vanishing_gradients`
    - `source`: paper, figure or equation
    - `statement`: what is claimed, in one sentence
    - `kind`: "exact" (no standard error), "statistical" (needs one) or "trend" (takes either)
    - `expected`, `tolerance`: agreement means |measured - expected| <= tolerance
    - `why`: where the tolerance comes from
    - `paper_value`: how the paper puts it, if it does
    - `verdict`: "reproduced", "shape only" or "differs"; the last two need a `reason`
    - `scale`: "live" (computed by the notebook) or "table" (read from a committed result table)
    - `rival`, `rival_is`: the value that a mistake would give, and which mistake

    **Raises** `TypeError` for a field of the wrong type and `ValueError` for a value that is not allowed.
    """

    id: str
    chapter: str
    source: str
    statement: str
    kind: str
    expected: float
    tolerance: float
    why: str
    paper_value: str | None
    verdict: str
    reason: str
    scale: str
    rival: float
    rival_is: str

    def __post_init__(self):
        for field in fields(self):
            _check_field(self.id, field.name, getattr(self, field.name))
        chapter = re.fullmatch(r"(\d\d)_[a-z0-9_]+", self.chapter)
        if chapter is None:
            _refuse(self.id, "chapter", self.chapter, "a notebook's stem such as '01_vanishing_gradients'")
        prefix = f"c{int(chapter[1])}-"
        if not re.fullmatch(prefix + r"[a-z0-9]+(-[a-z0-9]+)*", self.id):
            _refuse(self.id, "id", self.id, f"kebab-case starting with {prefix!r}, as its chapter is {self.chapter!r}")
        if self.tolerance <= 0:
            _refuse(self.id, "tolerance", self.tolerance, "positive")
        if abs(self.rival - self.expected) <= self.tolerance:
            allowed = f"farther than {self.tolerance} from {self.expected}: the tolerance does not exclude the rival"
            _refuse(self.id, "rival", self.rival, allowed)
        if self.verdict != "reproduced" and not self.reason:
            _refuse(self.id, "reason", self.reason, f"given, as the verdict is {self.verdict!r}")


def load(path: str | os.PathLike | None = None) -> dict[str, Claim]:
    """All claims by id, each checked: those of `path`, or of the book's own `claims.toml`.

    **Raises** `ValueError` or `TypeError` naming the claim, the field, its value and what is allowed.
    """
    path = _resources.find("claims.toml") if path is None else Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be valid TOML: {error}") from error
    return {id: _claim(id, table) for id, table in tables.items()}


def agrees(claim: Claim, measured: Any) -> bool:
    """Whether |measured - expected| <= tolerance; NaN never agrees."""
    return abs(_real("measured", measured) - claim.expected) <= claim.tolerance


def check(id: str, measured: Any, standard_error: Any = None) -> None:
    """Print one line that compares `measured` with the claim `id`, record it, and assert that they agree.

    `measured` and `standard_error` are single real numbers: anything that `float` takes. If the environment variable
    `SCANRNN_RECORDS` names a folder, the check, failed or not, is appended to `<chapter>.claims.jsonl` there.

    **Raises** `ClaimFailed` (an `AssertionError`) if they do not agree; `UnknownClaim` (a `KeyError`) for an unknown
    id; `TypeError` if `measured` is not one real number, or if a statistical claim comes without standard error or an
    exact claim with one; `ValueError` if the standard error is not finite and positive, or is larger than half the
    tolerance: the measurement is then too noisy to test the claim.
    """
    claim = _find(id)
    measured = _real("measured", measured)
    standard_error = _standard_error(claim, standard_error)
    good = agrees(claim, measured)
    print(_line(claim, measured, standard_error, good))
    _record(claim, measured, standard_error, good)
    if not good:
        raise ClaimFailed(_failure(claim, measured))


# Reading -------------------------------------------------------------------------------------------------------------


def _claim(id: str, table: Any) -> Claim:
    if not isinstance(table, Mapping):
        raise ValueError(f"claim {id!r} must be a table [{id}], got {table!r}")
    names = {field.name for field in fields(Claim)} - {"id"}
    if unknown := sorted(table.keys() - names):
        raise ValueError(f"claim {id!r} has the unknown field {unknown[0]!r}; allowed are {sorted(names)}")
    if missing := sorted(names - table.keys() - _OPTIONAL.keys()):
        raise ValueError(f"claim {id!r} lacks the field {missing[0]!r}")
    return Claim(id=id, **{**_OPTIONAL, **table})


def _check_field(id: str, name: str, value: Any) -> None:
    if name in _NUMBERS:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(id, name, value, "a number", TypeError)
        if not math.isfinite(value):
            _refuse(id, name, value, "finite")
    elif name not in _OPTIONAL or value != _OPTIONAL[name]:
        if not isinstance(value, str):
            _refuse(id, name, value, "a string", TypeError)
        if not value.strip():
            _refuse(id, name, value, "a non-empty string")
        if value not in _ALLOWED.get(name, (value,)):
            _refuse(id, name, value, f"one of {_ALLOWED[name]}")


def _refuse(id: str, name: str, value: Any, allowed: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"claim {id!r}: {name} must be {allowed}, got {value!r}")


def _find(id: str) -> Claim:
    path = _resources.find("claims.toml")
    claims = load(path)
    if id not in claims:
        close = difflib.get_close_matches(str(id), claims)
        hint = f"closest: {', '.join(close)}" if close else "no id is close to it"
        raise UnknownClaim(f"no claim has the id {id!r} ({hint}); the claims are in {path}")
    return claims[id]


# Measured values -----------------------------------------------------------------------------------------------------


def _real(name: str, value: Any) -> float:
    # float() alone would read a string, take an array of one element, and drop an imaginary part with a warning.
    is_complex = getattr(getattr(value, "dtype", None), "kind", None) == "c"
    if not isinstance(value, str | bytes) and getattr(value, "shape", ()) == () and not is_complex:
        try:
            return float(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be one real number, got {value!r} of type {type(value).__name__}")


def _standard_error(claim: Claim, value: Any) -> float | None:
    if value is None:
        if claim.kind == "statistical":
            raise TypeError(f"claim {claim.id!r} is statistical: standard_error must be given, got None")
        return None
    if claim.kind == "exact":
        raise TypeError(f"claim {claim.id!r} is exact: standard_error must be None, got {value!r}")
    value = _real("standard_error", value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"claim {claim.id!r}: standard_error must be finite and positive, got {value}")
    if value > claim.tolerance / 2:
        raise ValueError(
            f"claim {claim.id!r}: standard_error must be at most half the tolerance {claim.tolerance}, got {value}: "
            "the measurement is too noisy to test the claim"
        )
    return value


def _record(claim: Claim, measured: float, standard_error: float | None, good: bool) -> None:
    folder = os.environ.get("SCANRNN_RECORDS")
    if not folder:
        return
    line = {"id": claim.id, "measured": measured, "standard_error": standard_error, "agrees": good}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / f"{claim.chapter}.claims.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


# Messages ------------------------------------------------------------------------------------------------------------


def _line(claim: Claim, measured: float, standard_error: float | None, good: bool) -> str:
    tolerance = f"{claim.tolerance:.3g}"
    if standard_error is None:
        shown = rounded(measured, tolerance)
    else:
        error = rounded_error(standard_error)
        shown = f"{rounded(measured, error)} ± {error}"
    expected = f"{rounded(claim.expected, tolerance)} ± {tolerance}"
    return f"{'✓' if good else '✗'} {claim.id}: {shown} (expected {expected})"


def rounded_error(error: float) -> str:
    """A standard error to one digit; two after a leading 1, where one digit would be off by up to 50 %."""
    return f"{error:.2g}" if f"{error:e}".startswith("1") else f"{error:.1g}"


def rounded(value: float, error: str) -> str:
    """`value` to the last digit of its `error`."""
    last = int(Decimal(error).normalize().as_tuple().exponent)  # the power of ten of that digit
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if -6 <= last <= 3 and abs(value) < 1e6:
        return f"{value:z.{max(0, -last)}f}"
    return f"{value:.{max(1, math.floor(math.log10(abs(value))) - last + 1)}g}"


def _failure(claim: Claim, measured: float) -> str:
    lines = [
        f"{claim.id}: {claim.statement}",
        f"  measured   {measured!r}",
        f"  expected   {claim.expected!r} ± {claim.tolerance!r} ({claim.why})",
        f"  source     {claim.source}",
    ]
    if abs(measured - claim.rival) <= claim.tolerance:
        lines.append(f"  the measured value is that of a known mistake ({claim.rival!r}): {claim.rival_is}")
    return "\n".join(lines)
