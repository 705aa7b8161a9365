"""Collectors: the groups of sums beside the tap's own, a file each, found by looking in this folder.

A collector watches one MoE layer while its decoder layer is resident and runs over all batches. It changes no bit of
what runs, leaves no hook behind, and where a family does not show what a sum is made of, it leaves the sum out.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from torch import nn

from understudy.checkpoint import Checkpoint
from understudy.moe import MoELayer
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stats import EXTRA, ExpertStats, Probe
from understudy.tap import Routes, Tap


@dataclass(frozen=True)
class Resident:
    """A MoE layer whose weights are in memory, and the run that it is part of."""

    skeleton: Skeleton
    layer: MoELayer
    decoder: nn.Module  # the decoder layer
    settings: Calibration
    batches: Sequence[np.ndarray] = field(default_factory=list)  # this process's token ids, [B, S] each
    first: int = 0  # tokens of the processes before this one
    total: int = 0  # tokens of all processes
    base: Checkpoint | None = None  # what the model was trained from, where it was given

    @property
    def experts(self) -> Any:
        """The experts module."""
        return self.skeleton.model.get_submodule(self.layer.name)

    @property
    def block(self) -> nn.Module:
        """The module that holds experts and router; the decoder layer itself in a few families."""
        return self.skeleton.model.get_submodule(self.layer.block)

    @property
    def seq_len(self) -> int:
        """Tokens in a block of text."""
        return int(self.batches[0].shape[1]) if self.batches else 0


class Collector(ABC):
    """Adds up one group of sums of one MoE layer; made while the layer is resident."""

    group: ClassVar[str]  # of fields of ExpertStats
    reads_text: ClassVar[bool] = True

    def __init__(self, resident: Resident) -> None:
        self.resident = resident

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the run of the layer over all batches while the context is open; hooks are gone afterwards.

        The walk also calls the decoder layer to learn its arguments, and leaves that call by an exception: a pre-hook
        of the decoder layer is called twice for a batch, its forward hook once.
        """
        yield

    def hear(self, routes: Routes) -> None:  # noqa: B027  (most collectors do not care)
        """Take what one call of the experts showed, in the middle of that call: do not call the module here."""

    @abstractmethod
    def sums(self) -> dict[str, Any]:
        """Return the sums by field of ExpertStats, as NumPy arrays; the layer is still resident, hooks are gone.

        What the family does not show is missing.
        """


@functools.cache
def all_collectors() -> dict[str, type[Collector]]:
    """Return every collector by the name of its group."""
    found: dict[str, type[Collector]] = {}
    for info in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{info.name}")).values():
            if isinstance(value, type) and issubclass(value, Collector) and value is not Collector:
                assert found.setdefault(value.group, value) is value, f"two collectors of the group {value.group!r}"
    return dict(sorted(found.items()))


def collectors_for(settings: Calibration) -> list[type[Collector]]:
    """Return what runs with these settings: cheap groups and those that are asked for, or those without text."""
    wanted = [c for c in all_collectors().values() if c.group not in EXTRA or c.group in settings.collect]
    return [c for c in wanted if not (settings.weights_only and c.reads_text)]


class Watch:
    """The tap of one MoE layer with all of its collectors."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.collectors = [collector(resident) for collector in collectors_for(resident.settings)]
        hearing = [c.hear for c in self.collectors if type(c).hear is not Collector.hear]
        self.tap = Tap(resident.experts, resident.layer.num_experts, hearing)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Observe the run of the layer over all batches while the context is open."""
        with ExitStack() as stack:
            for collector in self.collectors:
                stack.enter_context(collector.attached())
            stack.enter_context(self.tap.attached())
            yield

    def result(self) -> tuple[ExpertStats, Probe]:
        """Return all sums, and a few tokens."""
        stats, probe = self.tap.stats, self.tap.probe
        assert stats is not None and probe is not None, f"layer {self.resident.layer.key} was never called"
        return replace(stats, **self.sums()), probe

    def sums(self) -> dict[str, Any]:
        """Return what the collectors have added up."""
        return {name: value for collector in self.collectors for name, value in collector.sums().items()}
