"""Pure parts: medians, ratios, tables, and the gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

TOLERANCE = 0.15
"""How much worse than the baseline a ratio may be."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement of one row."""

    cpu_us: float
    """CPU time of the server for one unit."""
    rate: float
    """Units a second."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    sends: float = 0.0
    """Chunks of HTTP a stream."""
    load_share: float = 0.0
    """Of one CPU, what the load generator took."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The medians of a row's rounds."""

    section: str
    server: str
    unit: str
    samples: Sequence[Sample]
    peak_rss_bytes: int = 0
    note: str = ""

    def median(self, field: str) -> float:
        """Of one field over the rounds."""
        return float(median(getattr(sample, field) for sample in self.samples))

    def as_json(self) -> dict[str, Any]:
        """For the saved result."""
        fields = ("cpu_us", "rate", "p50_ms", "p99_ms", "sends", "load_share")
        return {
            "section": self.section,
            "server": self.server,
            "unit": self.unit,
            "rounds": len(self.samples),
            **{field: round(self.median(field), 3) for field in fields},
            "cpu_us_rounds": [round(sample.cpu_us, 1) for sample in self.samples],
            "peak_rss_bytes": self.peak_rss_bytes,
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One figure that says how messagesd does, free of the machine's own speed."""

    name: str
    value: float
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"
    gated: bool = True
    """Compared with the baseline. What hangs on the disk, or shows the harness itself, is not."""

    @property
    def met(self) -> bool:
        """Whether the target is."""
        if self.target is None:
            return True
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def paired(above: Row, below: Row, field: str = "cpu_us") -> float:
    """The median over the rounds of one row by the other: what slows a whole round cancels out."""
    return float(
        median(
            getattr(a, field) / getattr(b, field)
            for a, b in zip(above.samples, below.samples, strict=True)
            if getattr(b, field) > 0
        )
    )


def regressions(
    ratios: Sequence[Ratio], baseline: Mapping[str, float], tolerance: float = TOLERANCE
) -> list[str]:
    """A line for each gated ratio that is worse than the baseline beyond ``tolerance``."""
    found = []
    for ratio in ratios:
        before = baseline.get(ratio.name)
        if before is None or not ratio.gated or before <= 0:
            continue
        worse = ratio.value / before if ratio.better == "lower" else before / max(ratio.value, 1e-9)
        if worse > 1 + tolerance:
            found.append(
                f"{ratio.name}: {ratio.value:.3f},"
                f" {(worse - 1) * 100:.0f}% worse than the baseline's {before:.3f}"
            )
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its columns aligned; the first two to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if i < 2 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def rows_table(rows: Sequence[Row]) -> str:
    """Every row with its absolute figures."""
    head = (
        "row",
        "server",
        "CPU µs",
        "per",
        "units/s",
        "p50 ms",
        "p99 ms",
        "sends/stream",
        "peak MiB",
        "note",
    )

    def shown(number: float, digits: int = 1) -> str:
        return f"{number:,.{digits}f}" if number else "-"

    return markdown(
        head,
        [
            (
                row.section,
                row.server,
                shown(row.median("cpu_us")),
                row.unit,
                shown(row.median("rate"), 0),
                shown(row.median("p50_ms")),
                shown(row.median("p99_ms")),
                shown(row.median("sends")),
                shown(row.peak_rss_bytes / 2**20, 0),
                row.note,
            )
            for row in rows
        ],
    )


def ratios_table(ratios: Sequence[Ratio], baseline: Mapping[str, float]) -> str:
    """Every ratio beside its target and the baseline's."""
    rows = []
    for ratio in ratios:
        sign = "≤" if ratio.better == "lower" else "≥"
        before = baseline.get(ratio.name)
        rows.append(
            (
                ratio.name,
                "-" if ratio.target is None else "met" if ratio.met else "MISSED",
                f"{ratio.value:.3f}",
                "-" if ratio.target is None else f"{sign} {ratio.target:g}",
                "-" if before is None else f"{before:.3f}",
            )
        )
    return markdown(("ratio", "target is", "value", "target", "baseline"), rows)
