"""The damping of the fine level in every step: a number, a schedule, or one that follows the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfac_dist.config import KFACConfig, check_number, evaluate
from kfac_dist.trust import LevenbergMarquardt


class FineDamping:
    """lambda of every step.

    With ``damping="adaptive"`` it follows the rule of Martens and Grosse 2015, section 6.5: what the loss did against
    what the damped quadratic model said that it would do.

    Args:
        config: the method.

    Attributes:
        trust: the rule; None: the damping does not follow the loss.
        abandoned: steps that were not taken, as every damping that was tried would have raised the loss.
    """

    def __init__(self, config: KFACConfig) -> None:
        self._config = config
        self.trust = LevenbergMarquardt(config.initial_damping) if config.damping == "adaptive" else None
        self.abandoned = 0

    @property
    def adaptive(self) -> bool:
        """Whether it follows the loss."""
        return self.trust is not None

    def value(self, step: int) -> float:
        """The damping with which ``step`` is made.

        Raises:
            ValueError: a schedule gave a number that is not finite or not above 0.
        """
        if self.trust is not None:
            return self.trust.damping
        assert not isinstance(self._config.damping, str)
        return evaluate("damping", self._config.damping, step)

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed run needs; None where nothing adapts."""
        if self.trust is None:
            return None
        return {"value": self.trust.damping, "again": self.trust.again, "abandoned": self.abandoned}

    def read(self, saved: Mapping[str, Any] | None) -> tuple[LevenbergMarquardt, int] | None:
        """The rule and its count as they were saved; as at the start where the saved run did not adapt.

        Raises:
            ValueError: a part is missing or out of its bounds.
        """
        if self.trust is None:
            return None
        if saved is None:
            return LevenbergMarquardt(self._config.initial_damping), 0
        try:
            check_number("value", saved["value"], 0.0, open_low=True)
            return LevenbergMarquardt(float(saved["value"]), bool(saved["again"])), int(saved["abandoned"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's adaptive damping is damaged: {error!r}") from error

    def take(self, read: tuple[LevenbergMarquardt, int] | None) -> None:
        """Take over what :meth:`read` gave."""
        if read is not None:
            self.trust, self.abandoned = read
