"""A plan to carry out, with all that carrying it out takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ...allocation.plan import Plan
from ...base.report import Report, Silent
from ...base.targets import work_folder
from ...checkpoint.layers import Inventory
from ...checkpoint.layout import Layout
from ...checkpoint.low_disk import Waves, at_once
from ...checkpoint.source import Source
from ...measure.profile import Profile
from ...measure.sensitivity import Sensitivity


@dataclass(frozen=True)
class Artifacts:
    """What was measured for a plan; written beside the weights, so that it is measured once."""

    profile: Profile | None = None
    sensitivity: Sensitivity | None = None


@dataclass(frozen=True)
class Conversion:
    """A plan to carry out.

    Attributes:
        source: a checkpoint whose weights are here.
        inventory: its layers.
        plan: fits them (plan.check_plan).
        target: the folder to make.
        force: replace a checkpoint of ours there, and unfinished work of another kind.
        sentence: let the result write a sentence before it gets its name.
        report: receives progress.
        sensitivity: with its tokens, for quantizers that need inputs and for refining.
        artifacts: what the checkpoint stores of its making beside the plan.
        refine: distil scales and biases on the sensitivity's tokens once all is written.
        allow_nonfinite: don't refuse NaN and infinite weights.
        waves: hands modules over as their shards come (low_disk.py).
        name: the checkpoint's name in its model card; the folder's by default.
        grids: let weights that lie on a grid already keep its codes (quantizers/grid_codes.py).
        base: the source's name on the Hub for its card, where it isn't the source's own.
        elsewhere: what a user may do where the disk has too little room, in words.
    """

    source: Source
    inventory: Inventory
    plan: Plan
    target: Path
    force: bool = False
    sentence: bool = False
    report: Report = field(default_factory=Silent)
    sensitivity: Sensitivity | None = None
    artifacts: Artifacts = field(default_factory=Artifacts)
    refine: bool = False
    allow_nonfinite: bool = False
    waves: Waves = at_once
    name: str | None = None
    grids: bool = True
    base: str | None = None
    elsewhere: str = "choose another folder with -o"

    @property
    def work(self) -> Path:
        """The folder beside the target in which the checkpoint is made."""
        return work_folder(self.target)

    @cached_property
    def layout(self) -> Layout:
        """Shards, headers and places of the checkpoint."""
        return self.plan.layout(self.inventory)
