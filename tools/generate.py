"""Step 2 of the build: write `book/reproduced.md`, what this build's notebooks measured beside what was expected.

Cards instead of one wide table: they read on a phone.
"""

from pathlib import Path

import nbformat

from scanrnn.claims import Claim, load, rounded, rounded_error
from tools.execute import read_record
from tools.project import Project, write

HEAD = """# What we reproduced

Each card is one number or trend that a chapter takes from a paper or a theorem. The value under *ours* was measured
when these pages were built, and the build stops when it leaves the tolerance. What does not reproduce stays here and
says so.
"""


class RecordsIncomplete(Exception):
    """A record is missing or stale, or a claim was not checked."""


def run(project: Project) -> None:
    """Write the page, or raise `RecordsIncomplete` with every reason not to."""
    notebooks = project.notebooks()
    claims = load(project.book / "claims.toml")
    records = {notebook.stem: read_record(project, notebook) for notebook in notebooks}
    problems = [f"{stem}: its record is missing or stale" for stem, record in records.items() if record is None]
    current = {stem: record for stem, record in records.items() if record is not None}
    measured = {check["id"]: check for record in current.values() for check in record["claims"]}  # the last one counts
    problems += [f"{check['id']}: not met" for check in measured.values() if not check["agrees"]]
    problems += [
        f"{id}: {claim.chapter} does not check it"
        for id, claim in claims.items()
        if id not in measured and records.get(claim.chapter, {}) is not None  # else the record is to blame
    ]
    problems += [f"{id}: checked, but not in claims.toml" for id in measured if id not in claims]
    if problems:
        raise RecordsIncomplete("book/reproduced.md cannot be written:\n" + "\n".join(f"  {line}" for line in problems))
    parts = [HEAD, _summary(list(claims.values()))]
    for notebook in notebooks:
        own = [claim for claim in claims.values() if claim.chapter == notebook.stem]
        parts.append(f"## [{_title(notebook)}]({notebook.stem})\n")
        parts += [_card(claim, measured[claim.id]) for claim in own]
    parts.append(_build_table(notebooks, current))
    write(project.book / "reproduced.md", "\n".join(parts))


def _summary(claims: list[Claim]) -> str:
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in _verdicts(claims)}
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"**{len(claims)} claim{'s' * (len(claims) != 1)}**: {parts}.\n"


def _verdicts(claims: list[Claim]) -> list[str]:
    return [name for name in ("reproduced", "shape only", "differs") if any(claim.verdict == name for claim in claims)]


def _card(claim: Claim, check: dict) -> str:
    tolerance = f"{claim.tolerance:.3g}"
    fields = {
        "ours": _measured(claim, check),
        "expected": f"{rounded(claim.expected, tolerance)} ± {tolerance} ({_one_line(claim.why)})",
        "the paper": claim.paper_value,
        "verdict": f"**{claim.verdict}**{': ' + claim.reason if claim.reason else ''}",
        "source": claim.source,
        "computed": {"live": None, "table": "from a committed result table of a paper-scale run"}[claim.scale],
    }
    lines = [f"(claim-{claim.id})=", f":::{{card}} {_one_line(claim.statement)}"]
    lines += [f":class-card: claim claim-{claim.verdict.replace(' ', '-')}", ""]
    lines += [f":{name}: {_one_line(value)}" for name, value in fields.items() if value]
    return "\n".join([*lines, f":claim: `{claim.id}`", ":::", ""])


def _measured(claim: Claim, check: dict) -> str:
    """As the chapter prints it."""
    if check["standard_error"] is None:
        return rounded(check["measured"], f"{claim.tolerance:.3g}")
    error = rounded_error(check["standard_error"])
    return f"{rounded(check['measured'], error)} ± {error} (standard error)"


def _build_table(notebooks: list[Path], records: dict[str, dict]) -> str:
    rows = []
    for notebook in notebooks:
        record = records[notebook.stem]
        rows.append(f"| {_title(notebook)} | {record['seconds']:.0f} s | {record['peak_memory_mb']} MB |")
    scales = sorted({record["scale"] for record in records.values()})
    versions = {name: version for record in records.values() for name, version in record["versions"].items()}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(
        [
            "## This build",
            "",
            f"Executed at {' and '.join(scales)} scale with {listed}.",
            "",
            "| chapter | run time | peak memory |",
            "|---|---:|---:|",
            *rows,
            "",
        ]
    )


def _title(notebook: Path) -> str:
    first = nbformat.read(notebook, as_version=4).cells[0].source
    return first.splitlines()[0].removeprefix("# ")


def _one_line(text: str) -> str:
    return " ".join(text.split())
