"""The table at the end of a run: where the time went, what the layers look like, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kfac_dist.callbacks.measures import Costs
from kfac_dist.spectra import Spectrum


def phases_table(costs: Costs) -> Table:
    """Phase by phase: milliseconds and bytes per step."""
    table = Table(title=f"K-FAC took {costs.share:.1%} of the time of {costs.steps} steps", title_justify="left")
    for column in ("phase", "ms per step", "share", "bytes per step"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    steps = max(costs.steps, 1)
    for phase in dict.fromkeys([*costs.phases, *costs.payload_bytes]):
        sent = costs.payload_bytes[phase]
        time = costs.phases.get(phase)
        table.add_row(
            phase,
            "" if time is None else f"{time / steps:.2f}",
            "" if time is None else f"{costs.shares.get(phase, 0.0):.1%}",
            f"{sent / steps:,.0f}" if sent else "",
        )
    table.add_row("the whole step", f"{costs.milliseconds / steps:.2f}", "", "", style="dim")
    return table


def layers_table(spectra: Mapping[str, Spectrum], beta: Mapping[str, float]) -> Table:
    """Layer by layer: eigenvalues, condition number and the last coefficients."""
    table = Table(title="eigenvalues of the layers' blocks", title_justify="left")
    for column in ("layer", "smallest", "largest", "damped: smallest", "largest", "condition", "beta"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, spectrum in spectra.items():
        numbers = [*spectrum.range(), *spectrum.damped_range(), spectrum.condition]
        coefficients = [f"{value:.3g}" for key, value in beta.items() if key.rpartition("/")[0] == name]
        table.add_row(name, *(f"{number:.2e}" for number in numbers), ", ".join(coefficients))
    return table


def report(
    costs: Costs,
    spectra: Mapping[str, Spectrum],
    beta: Mapping[str, float],
    counts: Mapping[str, float],
    advice: Sequence[str],
) -> Group:
    """Everything, to print.

    Args:
        costs: of the whole run.
        spectra: of the last look; empty where nobody looked.
        beta: "layer/number of the vector" -> coefficient; empty without a coarse level.
        counts: what happened -> how often.
        advice: lines.
    """
    parts: list[Table | Text] = [phases_table(costs)]
    if spectra:
        parts.append(layers_table(spectra, beta))
    parts.append(Text(", ".join(f"{name} {number:.0f}" for name, number in counts.items())))
    lines = advice or ["nothing to advise"]
    parts.append(Text("\n".join(f"- {line}" for line in lines)))
    return Group(*parts)
