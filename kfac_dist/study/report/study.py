"""What a report is about: problems, each with its protocol and methods. What was found is in the runs' files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfac_dist.study.protocol import Protocol
from kfac_dist.study.run import Run


@dataclass(frozen=True, kw_only=True)
class Study:
    """The contents of a study.

    Attributes:
        name: of the study.
        title: of the report.
        command: what runs it again.
        protocols: problem -> what every method gets there.
        methods: problem -> the methods.
        side: problem -> runs of every space and correction at fixed settings, and of the one-level form (the method
            that ``Method.one_level`` names) at the same ones.
        profile: in words, what kind of study this is.
        left_out: method -> why it could not run.

    Raises:
        ValueError: methods or side runs of a problem without a protocol.
    """

    name: str
    title: str
    command: str
    protocols: Mapping[str, Protocol]
    methods: Mapping[str, tuple[str, ...]]
    side: Mapping[str, tuple[Run, ...]] = field(default_factory=dict)
    profile: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in (self.methods, self.side):
            without = [problem for problem in part if problem not in self.protocols]
            if without:
                raise ValueError(f"no protocol for {', '.join(without)}: add it to protocols={list(self.protocols)}")
