"""A kind for tests that makes every form of stand-in at once, told by a number for each expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import understudy.kinds as kinds
from contract import one_expert
from understudy.channels import channel_width, neurons, rest, set_neurons, set_rest, sliced
from understudy.entries import Entry
from understudy.facts import LayerFacts
from understudy.standins import ABSENT, CONSTANT, MERGED, SLIM, StandIn
from understudy.stats import ExpertStats

INTO = 1000  # a number from here on: merged into the expert that is left of it


class Mixture(kinds.Kind):
    """0 is a constant, 1 is absent, 1000 + e is merged into e, other numbers are widths; odd ones with a constant."""

    name = "mixture"
    description = "every form of stand-in, for tests"
    needs = ("mean",)
    unseen = "are tested"
    losers = False
    form = "numbers"

    def stored_bytes(self, layer: LayerFacts, entry: Entry) -> int:
        total = 0
        for expert, s in self.stand_ins(entry, {}).items():
            width = s.width or 0
            full, vector = layer.expert_bytes, layer.hidden * layer.element_bytes
            total += full * (s.into == expert) + vector * s.constant
            total += (full - ((layer.width or 0) - width) * layer.channel_bytes) * bool(width)
        return total

    def most(self, layer: LayerFacts) -> int:
        return layer.experts

    def check(self, layers: Mapping[str, LayerFacts], entries: Mapping[str, Entry]) -> None:
        pass

    def stand_ins(self, entry: Entry, how: Mapping[str, Any], layer: LayerFacts | None = None) -> dict[int, StandIn]:
        assert isinstance(entry, dict)
        return {expert: _stand_in(number) for expert, number in entry.items()}

    def fill(self, made: Any, source: Any, entry: Entry, how: Mapping[str, Any], stats: ExpertStats | None) -> None:
        for expert, stand_in in self.stand_ins(entry, how).items():
            if stand_in.into == expert:
                members = [e for e, s in made.stand_ins.items() if s.into == expert]
                set_neurons(made, made.rows[expert], sum(neurons(source, e) for e in members) / len(members))
                set_rest(made, made.rows[expert], sum(rest(source, e) for e in members) / len(members))
            if stand_in.width is not None:
                child, row = made.slim_place(expert)
                set_neurons(child, row, neurons(source, expert)[-stand_in.width :])
                set_rest(child, row, rest(source, expert))
            if stand_in.constant:
                vector = torch.from_numpy(np.asarray(stats.mean[expert], np.float32))
                made.constants.data[made.constant_row(expert)] = vector.to(made.constants.dtype)

    def reference(self, source: Any, hidden: Any, expert: int, entry: Entry, how: Any, stats: Any) -> Any:
        stand_in, width = self.stand_ins(entry, how)[expert], channel_width(source)
        answer = torch.zeros(len(hidden), source.down_proj.shape[2 if getattr(source, "is_transposed", 0) else 1])
        if stand_in.into is not None:
            members = [e for e, s in self.stand_ins(entry, how).items() if s.into == stand_in.into]
            mean = sliced(source, [members[0]], torch.arange(width)[None])
            set_neurons(mean, 0, sum(neurons(source, e) for e in members) / len(members))
            set_rest(mean, 0, sum(rest(source, e) for e in members) / len(members))
            answer = torch.stack([one_expert(mean, x, 0) for x in hidden])
        if stand_in.width is not None:
            narrow = sliced(source, [expert], torch.arange(width - stand_in.width, width)[None])
            answer = torch.stack([one_expert(narrow, x, 0) for x in hidden])
        if stand_in.constant:
            answer = answer + torch.from_numpy(np.asarray(stats.mean[expert], np.float32))
        return answer.float()


def _stand_in(number: int) -> StandIn:
    if number < 2:
        return StandIn(ABSENT if number else CONSTANT)
    if number >= INTO:
        return StandIn(MERGED, into=number - INTO)
    return StandIn(SLIM, width=number, constant=number % 2 == 1)


@contextmanager
def registered() -> Iterator[Mixture]:
    """Make the kind known."""
    own = kinds.all_kinds
    mixture = Mixture()
    kinds.all_kinds = lambda: {**own(), mixture.name: mixture}
    try:
        yield mixture
    finally:
        kinds.all_kinds = own
