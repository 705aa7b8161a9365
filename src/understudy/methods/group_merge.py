"""Group and merge: experts that hold the same knowledge, told by centred kernel alignment, become their average."""

from __future__ import annotations

from understudy.grouping import Groups, by_layer, cosines, led, linked, most_by_layer
from understudy.methods import Choice, Method, Problem
from understudy.stats import ExpertStats


def group(key: str, stats: ExpertStats, ids: list[int], groups: int) -> Groups:
    """Partition by the linear CKA of outputs, all experts fed all tokens (METHODS 6).

    CKA is the cosine of two experts' HSIC. The paper partitions the graph of similarities into r groups without saying
    more in what is known of it here; average linkage on 1 - CKA does it.
    """
    return led(linked(1 - cosines(stats.dense_hsic), ids, groups), stats.count)


def choose(problem: Problem, ratio: float) -> Choice:
    """Partition each layer down to its share of the experts and average uniformly, the paper's default.

    Raises:
        PlanError: the ratio would leave a layer without an expert.
    """
    layers, notes = by_layer(problem, ratio, group)
    return Choice(layers, how={"merge": {"weights": "uniform", "align": "none"}}, notes=notes)


GROUP_MERGE = Method(
    name="group_merge",
    kind="merge",
    kinds=("merge",),
    choose=choose,
    needs=("count", "dense_hsic"),
    most=most_by_layer,
    paper="Diversifying the expert knowledge (group and merge by CKA; router rows stay, gates add), arXiv 2407.09590",
)
