"""What a person should change, from what was seen of a run: one rule, one function, plain numbers in and text out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# Below these, something is not worth its time; above those, it is worth a change.
SMALL_GAIN, COARSE_SHARE = 0.05, 0.02
LARGE_SHARE = 0.25
FLAT = 2.0
ILL_CONDITIONED = 1e7
HARD_CLIP = 0.1
NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A run in numbers.

    Attributes:
        steps: optimizer steps that were watched.
        shares: phase of K-FAC -> its share of the time of the training steps, in [0, 1].
        gain: mean decrease of the squared error by the coarse level, over the energy of the direction; None without
            a coarse level.
        rate_free: whether the coarse level also chooses learning rate and momentum.
        clip: mean factor of the KL clip; None where it is off.
        conditions: layer -> condition number of its damped block.
        counts: name in ``kfac.metrics`` -> how often it happened.
        damping: the last lambda.
        factor_every_n_steps: of the run.
        inverse_every_n_steps: of the run.
        factor_samples: the share of the samples that the factors are taken from.
        sides: the factors that are kept, "both" or "input".
        ranks: world size.
        all_inverses_everywhere: whether every rank holds every inverse ("comm_opt").
    """

    steps: int
    shares: Mapping[str, float]
    gain: float | None = None
    rate_free: bool = False
    clip: float | None = None
    conditions: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    damping: float
    factor_every_n_steps: int
    inverse_every_n_steps: int
    factor_samples: float = 1.0
    sides: str = "both"
    ranks: int = 1
    all_inverses_everywhere: bool = True

    def share(self, *phases: str) -> float:
        """The share of some phases together."""
        return sum(self.shares.get(phase, 0.0) for phase in phases)

    def count(self, name: str) -> int:
        """How often it happened."""
        return round(self.counts.get(name, 0))


def coarse_level(seen: Seen) -> str | None:
    """A coarse level that costs time and brings little."""
    share = seen.share("coarse")
    if seen.gain is None or seen.gain >= SMALL_GAIN or share <= COARSE_SHARE:
        return None
    said = f"the coarse level reduced the squared error by {seen.gain:.1%} of the direction's energy at {share:.0%} of "
    if seen.rate_free:
        return (
            said + "the time: as it also chooses the learning rate, solve less often (a coarse every_n_steps above 1)"
        )
    return said + "the time: it is safe to leave it off for this net (coarse=None)"


def inversions(seen: Seen) -> str | None:
    """Inversions that take a large part of the time."""
    share = seen.share("inverses")
    if share <= LARGE_SHARE:
        return None
    said = f"inverses cost {share:.0%} of the time: raise inverse_every_n_steps (now {seen.inverse_every_n_steps})"
    exchanged = seen.ranks > 1 and seen.all_inverses_everywhere
    return said + (" or use distribution='mem_opt', which does not exchange them" if exchanged else "")


def statistics(seen: Seen) -> str | None:
    """Statistics that take a large part of the time."""
    share = seen.share("capture", "factors")
    if share <= LARGE_SHARE:
        return None
    said = f"the factors cost {share:.0%} of the time: raise factor_every_n_steps (now {seen.factor_every_n_steps})"
    return said + (" or take them from a share of the samples (factor_samples)" if seen.factor_samples == 1 else "")


def directions(seen: Seen) -> str | None:
    """Products with the inverses that take a large part of the time."""
    share = seen.share("precondition")
    if share <= LARGE_SHARE:
        return None
    cures = ["factor_sides='input' halves it"] if seen.sides == "both" else []
    if seen.ranks > 1 and seen.all_inverses_everywhere:
        cures.append(f"distribution='mem_opt' spreads it over the {seen.ranks} ranks")
    cures.append("a larger batch dilutes it")
    return f"preconditioning costs {share:.0%} of the time: {', '.join(cures)}"


def flat_spectra(seen: Seen) -> str | None:
    """Layers in which the damping leaves nothing of the curvature."""
    flat = {name: value for name, value in seen.conditions.items() if value < FLAT}
    if not flat:
        return None
    return (
        f"damping dominates the spectrum of {_named(flat)}: the direction there is the gradient times a number; lower "
        f"damping (now {seen.damping:g}), or leave such layers to the optimizer with skip_layers"
    )


def steep_spectra(seen: Seen) -> str | None:
    """Layers whose damped block is at the edge of single precision."""
    steep = {name: value for name, value in seen.conditions.items() if not value <= ILL_CONDITIONED}
    if not steep:
        return None
    return (
        f"the damped block of {_named(steep)} is ill-conditioned, which float32 cannot resolve: raise damping (now "
        f"{seen.damping:g})"
    )


def clip(seen: Seen) -> str | None:
    """A KL clip that decides on every step size."""
    if seen.clip is None or seen.clip >= HARD_CLIP:
        return None
    return (
        f"the KL clip scaled the steps by {seen.clip:.2g} in the mean: it, not lr, sets the step size; lower lr, raise "
        "kl_clip, or raise damping"
    )


def fallbacks(seen: Seen) -> str | None:
    """Factorisations that did not succeed at once."""
    number = seen.count("inverse_fallbacks")
    if not number:
        return None
    return f"{number} factorisations needed float64, jitter or an older inverse: raise damping (now {seen.damping:g})"


def dropped(seen: Seen) -> str | None:
    """Statistics that were not finite."""
    number = seen.count("dropped_statistics")
    if not number:
        return None
    return f"{number} factor updates were dropped, as something was not finite: lower lr, and look at the data"


def failed_solves(seen: Seen) -> str | None:
    """Coarse solves that failed, and steps that were not taken."""
    failed, abandoned = seen.count("coarse/failures"), seen.count("coarse/abandoned")
    if not failed and not abandoned:
        return None
    return (
        f"the coarse level failed {failed} times and gave up {abandoned} of {seen.steps} steps: let its damping adapt "
        "(CoarseConfig(damping='adaptive')) or start it higher (initial_damping)"
    )


RULES: tuple[Callable[[Seen], str | None], ...] = (
    dropped,
    fallbacks,
    failed_solves,
    coarse_level,
    inversions,
    statistics,
    directions,
    flat_spectra,
    steep_spectra,
    clip,
)


def advice(seen: Seen) -> list[str]:
    """What every rule has to say, failures first."""
    return [said for said in (rule(seen) for rule in RULES) if said is not None]


def _named(layers: Mapping[str, float]) -> str:
    shown = [f"{name} (condition {value:.2g})" for name, value in list(layers.items())[:NAMED]]
    more = len(layers) - len(shown)
    plural = "layers" if len(layers) > 1 else "layer"
    return f"{plural} {', '.join(shown)}" + (f" and {more} more" if more else "")
