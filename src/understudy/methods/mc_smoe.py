"""MC-SMoE: merge, then compress; here its first half, the merging."""

from __future__ import annotations

from understudy.errors import PlanError
from understudy.grouping import cosines, free_ids, joined, merge_entry, notes, ranked
from understudy.methods import Choice, Method, Problem


def choose(problem: Problem, ratio: float) -> Choice:
    """Let the most frequent experts of the whole model dominate, at least one a layer; the others join them.

    An expert joins the dominant of its layer whose router logits are most like its own, by their cosine over all tokens
    (METHODS 5, and 3.10 for what published code makes of it: the last batch only, and half of the pairs).

    Raises:
        PlanError: the ratio would leave a layer without an expert.
    """
    assert problem.scores is not None
    frequency = {key: problem.scores.layers[key] for key in problem.layers}
    order = {key: ranked(frequency[key], free_ids(problem, key)) for key in problem.layers}
    total = sum(layer.experts for layer in problem.layers.values())
    left = sum(map(len, order.values())) - round(ratio * total)
    if left < sum(map(bool, order.values())):
        raise PlanError(
            f"ratio {ratio:g} would leave a layer without an expert; mc_smoe can merge away {_away(order)} of {total} "
            f"at most (ratio {_away(order) / total:.6g})"
        )
    dominants = {key: ids[:1] for key, ids in order.items()}  # the first of each layer dominates in any case
    rest = [(key, i) for key, ids in order.items() for i in ids[1:]]
    rest.sort(key=lambda pair: -float(frequency[pair[0]][pair[1]]))
    for key, i in rest[: left - sum(map(len, dominants.values()))]:
        dominants[key].append(i)
    found = {}
    for key, leading in dominants.items():
        if others := order[key][len(leading) :]:
            found[key] = joined(cosines(problem.stats.layers[key].logit_gram), leading, others)
    return Choice(
        {key: {"merge": merge_entry(groups)} for key, groups in found.items()},
        how={"merge": {"weights": "count", "align": "weights"}},
        scores=problem.scores,
        notes=notes(problem, found, f"ratio {ratio:g} merges nothing; one expert is ratio {1 / total:.6g}"),
    )


def most(problem: Problem) -> float:
    """Return the ratio that leaves one expert in each layer, beside the protected ones."""
    order = {key: free_ids(problem, key) for key in problem.layers}
    return _away(order) / sum(layer.experts for layer in problem.layers.values())


def _away(order: dict[str, list[int]]) -> int:
    """Return how many experts can be merged away at most."""
    return sum(max(len(ids) - 1, 0) for ids in order.values())


MC_SMOE = Method(
    name="mc_smoe",
    score="frequency",
    kind="merge",
    kinds=("merge",),
    choose=choose,
    needs=("count", "logit_gram"),
    most=most,
    paper="MC-SMoE: merge, then compress (the merging; router rows stay, gates add), arXiv 2310.01334",
)
