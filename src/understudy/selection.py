"""How a budget is spread over the channels of experts: scores of channels and a ratio in, a width for each expert out.

A width is how many of its neurons an expert keeps; which ones is for the kind `slim` to say, by the same scores. Every
allocator leaves each layer at least one neuron, never touches experts that the problem protects, and removes the share
of the channels' bytes that the ratio says, of the layers that may be touched, rounded up to a whole channel.

Letters: E experts, I expert width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from understudy.entries import Entry
from understudy.methods import Choice, Problem

Channels = dict[str, np.ndarray]  # float64 [E, I] by layer key: a score for each channel, higher = keep
Widths = dict[str, np.ndarray]  # int64 [E] by layer key
_CLOSE = 1 - 1e-9  # a ratio that is a whole number of channels but for rounding takes no further one
_GRID = 128  # widths that are tried as classes, about
_WHOLE, _STEP = 64, 8  # experts of so many neurons have classes of a multiple of 8, rows of 16 bytes in any dtype


def by_rank(problem: Problem, scores: Channels, ratio: float, *, constant: bool = False) -> Widths:
    """Remove the lowest channels of the whole model (HEAPr, FLAP).

    With `constant`, or where the settings ask for a refit, every expert that loses a channel costs a vector of the
    hidden size, which the ratio has to pay.
    """
    constant |= problem.settings.refit
    removed = _lowest(problem, list(problem.layers), scores, ratio, constant)
    return {key: scores[key].shape[1] - removed[key] for key in problem.layers}


def by_layer(problem: Problem, scores: Channels, ratio: float, *, constant: bool = False) -> Widths:
    """Remove the lowest channels of each layer, the same share everywhere, from all its experts together (CAMERA).

    With `constant`, or where the settings ask for a refit, as in `by_rank`.
    """
    constant |= problem.settings.refit
    removed: Widths = {}
    for key in problem.layers:
        removed |= _lowest(problem, [key], scores, ratio, constant)
    return {key: scores[key].shape[1] - removed[key] for key in problem.layers}


def by_coverage(
    problem: Problem, scores: Channels, sensitivity: dict[str, float], importance: Channels, ratio: float
) -> Widths:
    """Let layers and experts keep the largest channels up to a share of their total (MoE-Slimming, METHODS 10.3).

    A layer keeps the fewest channels whose scores reach `s * sensitivity` of the layer's total, an expert the fewest
    that reach `t * sqrt(importance)` of the expert's; `s` is one number for the model and `t` one for the layer, such
    that the ratio is met. The paper bisects them. A channel is kept from a certain `s` (or `t`) on, so ranking channels
    by that number is the same, without a rest to hand out afterwards.

    Args:
        problem: what may be touched.
        scores: of channels, not negative.
        sensitivity: positive, by layer key.
        importance: not negative, [E] by layer key; an expert with 0 keeps about one channel.
        ratio: share of the channels' bytes to remove.
    """
    from_s = {}
    for key in problem.layers:
        free = free_in(problem, key)
        reach = np.zeros_like(scores[key])
        reach[free] = _reach(scores[key][free].reshape(1, -1)).reshape(-1, scores[key].shape[1])
        from_s[key] = -reach / sensitivity[key]
    removed = _lowest(problem, list(problem.layers), from_s, ratio)
    widths = {}
    for key in problem.layers:
        free, score = free_in(problem, key), scores[key]
        width = np.full(len(score), score.shape[1])
        count = int((width - removed[key])[free].sum())
        width[free] = _experts_by_coverage(score[free], importance[key][free], count)
        widths[key] = width
    return widths


def in_two_tiers(problem: Problem, importance: Channels, protected: dict[str, int], ratio: float) -> Widths:
    """Keep the most important experts of a layer whole and the others at one width, the same ratio everywhere (TENP).

    What is left over when the others are equal gives a neuron more to the most important of them.

    Args:
        problem: what may be touched; experts that it protects are whole in any case.
        importance: [E] by layer key.
        protected: how many experts of the layer stay whole, as far as the ratio allows.
        ratio: share of the channels' bytes to remove.
    """
    widths = {}
    for key, layer in problem.layers.items():
        E, width = len(importance[key]), layer.width or 0
        budget = max(1, int(E * width * (1 - ratio) / _CLOSE))
        ranked = np.argsort(-importance[key], kind="stable")
        free = free_in(problem, key)[ranked]
        ranked = np.concatenate((ranked[~free], ranked[free]))  # those that must stay come first
        whole = max(min(protected[key], budget // width), int((~free).sum()))
        left, others = max(0, budget - whole * width), E - whole
        each, rest = divmod(left, others) if others else (0, 0)
        found = np.full(E, width)
        found[ranked[whole:]] = np.minimum(each + (np.arange(others) < rest), width)
        widths[key] = found
    return widths


def choose_widths(
    problem: Problem, scores: Channels, widths: Widths, order: str, *, constant: bool = False, refit: bool = False,
    classes: int = 0,
) -> Choice:  # fmt: skip
    """Make a choice of widths, rounded to classes where the settings ask for it, or else to the method's own number.

    `order` is the name of the channel score that `scores` come from, `constant` and `refit` are settings of `slim`.
    """
    if problem.settings.width_classes is not None:
        classes = problem.settings.width_classes
    refit |= problem.settings.refit
    constant |= refit
    layers: dict[str, dict[str, Entry]] = {}
    empty = left = 0
    for key, width in widths.items():
        free = free_in(problem, key)
        if classes:
            wanted, width = int(width.sum()) + left, width.copy()
            width[free] = in_classes(scores[key][free], width[free], classes, left)
            left = wanted - int(width.sum())  # the next layer has them
        entry = {int(e): int(width[e]) for e in np.flatnonzero(width < scores[key].shape[1])}
        empty += sum(w == 0 for w in entry.values())
        if entry:
            layers[key] = {problem.kind.name: entry}
    how: dict[str, bool | int | float | str] = {"order": order}
    how |= {name: True for name, wanted in (("constant", constant), ("refit", refit)) if wanted}
    notes = []
    if not layers:
        notes.append("the ratio is less than one neuron; nothing is replaced")
    if empty:
        notes.append(f"{empty} experts keep no neuron")
    return Choice(layers, {problem.kind.name: how} if layers else {}, notes=tuple(notes))


def in_classes(score: np.ndarray, widths: np.ndarray, classes: int, more: int = 0) -> np.ndarray:
    """Round the widths of a layer to at most so many different ones, losing as little of the score as may be.

    At a price for each neuron, dynamic programming finds the best partition of the experts, sorted by width, into runs
    that share one width; the price is raised until the neurons are no more than before, and what is then left over goes
    where it saves most. Widths of 0 and whole ones count as a class each. Experts of 64 neurons and more get widths
    that are multiples of 8, which kernels take as they are. The sum never exceeds that of `widths` and `more`, and is
    less by fewer such steps than the smallest class has experts.

    Args:
        score: [E, I].
        widths: [E].
        classes: how many widths there may be.
        more: neurons that may be kept beyond the sum of `widths`.
    """
    ranked, width = np.argsort(widths, kind="stable"), score.shape[1]
    step = _STEP if width >= _WHOLE and width % _STEP == 0 else 1
    if len(np.unique(widths)) <= classes and not (widths % step).any():
        return widths
    lost = lost_by_width(score[ranked])
    apart = step * max(1, width // (_GRID * step))
    grid = np.unique(np.append(np.arange(0, width + 1, apart), width))
    total, prices = int(widths.sum()) + more, np.unique(score)
    low, high = 0, len(prices)  # prices are marginal scores; past the largest everything goes
    found = np.zeros(len(widths), np.int64)
    while low < high:
        middle = (low + high) // 2
        tried = grid[_partition(lost[:, grid] + prices[middle] * grid, classes)]
        if tried.sum() <= total:
            high, found = middle, tried
        else:
            low = middle + 1
    rounded = np.empty_like(found)
    rounded[ranked] = _fill(lost, found, total, step)
    if (
        widths.any() and not rounded.any()
    ):  # less than a step is left, and a layer needs a neuron: of an awkward width, then
        rounded[int(widths.argmax())] = min(total, width)
    return rounded


def lost_by_width(score: np.ndarray) -> np.ndarray:
    """Sum up what each expert loses that keeps its best neurons, by how many these are: `[E, I]` to `[E, I + 1]`."""
    lowest_first = np.sort(score, axis=1)
    return np.concatenate((np.zeros((len(score), 1)), np.cumsum(lowest_first, axis=1)), axis=1)[:, ::-1]


def free_in(problem: Problem, key: str) -> np.ndarray:
    """Say which experts of a layer may be touched, bool `[E]`."""
    free = np.ones(problem.layers[key].experts, bool)
    free[list(problem.protected.get(key, ()))] = False
    return free


def _lowest(problem: Problem, keys: Sequence[str], scores: Channels, ratio: float, constant: bool = False) -> Widths:
    """How many channels each expert loses when the lowest of some layers go; of equals those that come first."""
    layers = [problem.layers[key] for key in keys]
    values, places, first = [], [], 0  # a place is an expert, numbered through all layers
    for key, layer in zip(keys, layers, strict=True):
        free = free_in(problem, key)
        value = scores[key][free].ravel()
        place = np.repeat(first + np.flatnonzero(free), scores[key].shape[1])
        if free.all():  # the highest stays: the last of equals, as the others go first
            best = len(value) - 1 - int(value[::-1].argmax())
            value, place = np.delete(value, best), np.delete(place, best)
        values.append(value)
        places.append(place)
        first += layer.experts
    ranked = np.argsort(np.concatenate(values), kind="stable")
    place = np.concatenate(places)[ranked]
    freed = np.repeat([layer.channel_bytes for layer in layers], [layer.experts for layer in layers])[place]
    if constant:
        touched = np.unique(place, return_index=True)[1]
        vector = np.repeat([x.hidden * x.element_bytes for x in layers], [x.experts for x in layers])
        freed[touched] -= vector[place[touched]]
    total = sum(layer.experts * scores[key].shape[1] * layer.channel_bytes for key, layer in zip(keys, layers))
    wanted = ratio * total * _CLOSE
    count = int(np.searchsorted(np.maximum.accumulate(np.cumsum(freed)), wanted)) + 1 if wanted > 0 else 0
    lost = np.bincount(place[:count], minlength=first)
    ends = np.cumsum([layer.experts for layer in layers])
    return dict(zip(keys, np.split(lost, ends[:-1]), strict=True))


def _reach(score: np.ndarray) -> np.ndarray:
    """Share of a row's total that is reached before a channel, taking the largest first; infinite where that is all."""
    ranked = np.argsort(-score, axis=1, kind="stable")
    sorted_ = np.take_along_axis(score, ranked, axis=1)
    total = sorted_.sum(axis=1, keepdims=True)
    before = np.cumsum(sorted_, axis=1) - sorted_
    share = np.where(sorted_ > 0, before / np.where(total > 0, total, 1), np.inf)
    found = np.empty_like(score)
    np.put_along_axis(found, ranked, share, axis=1)
    return found


def _experts_by_coverage(score: np.ndarray, importance: np.ndarray, count: int) -> np.ndarray:
    """Widths of the experts of a layer that keep `count` channels together; of equals the more important stay."""
    weight = np.sqrt(importance)[:, None]
    reach = _reach(score)
    with np.errstate(divide="ignore", invalid="ignore"):
        from_t = np.where(reach > 0, reach / weight, 0.0)  # the first of every expert is kept from 0 on
    effect = score * importance[:, None]
    ranked = np.lexsort((-score.ravel(), -effect.ravel(), from_t.ravel()))
    return np.bincount(ranked[:count] // score.shape[1], minlength=len(score))


def _partition(cost: np.ndarray, classes: int) -> np.ndarray:
    """Cut rows into at most so many runs, with one column each, at least cost: cost [E, G] to columns [E]."""
    rows, _ = cost.shape
    upto = np.concatenate((np.zeros((1, cost.shape[1])), np.cumsum(cost, axis=0)))  # [E + 1, G]
    best = np.full(rows + 1, np.inf)
    best[0] = 0.0
    starts = []  # by number of runs: what the run before ended with, less what its rows would cost in each column
    for _ in range(classes):
        start = best[:, None] - upto
        starts.append(start)
        best = (upto + np.minimum.accumulate(start, axis=0)).min(axis=1)
    columns = np.zeros(rows, np.int64)
    end = rows
    for start in reversed(starts):
        if not end:
            break
        column = int((upto[end] + start[:end].min(axis=0)).argmin())
        begin = int(start[:end, column].argmin())
        columns[begin:end], end = column, begin
    return columns


def _fill(lost: np.ndarray, widths: np.ndarray, total: int, step: int) -> np.ndarray:
    """Raise a class, or an expert to the next class, while neurons are left over; what saves most a neuron first.

    Lost scores by width are [E, I + 1].
    """
    widths, rows, most = widths.copy(), np.arange(len(widths)), lost.shape[1] - 1
    while (left := total - int(widths.sum())) > 0:
        here, moves = np.unique(widths), []
        for at, width in enumerate(here):
            members = rows[widths == width]
            upper = int(here[at + 1]) if at + 1 < len(here) else most
            if (by := min(left // len(members), upper - int(width)) // step * step) > 0:
                saved = float((lost[members, width] - lost[members, width + by]).sum())
                moves.append((saved / (by * len(members)), members, int(width) + by))
            if at + 1 < len(here) and upper - width <= left:
                saved_each = lost[members, width] - lost[members, upper]
                one = int(saved_each.argmax())
                moves.append((float(saved_each[one]) / (upper - int(width)), members[[one]], upper))
        if not moves:
            break
        _, members, width = max(moves, key=lambda move: move[0])
        widths[members] = width
    return widths
