"""A comparison in plain words: who leads at which size, and who cannot be told from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from understudy.comparison import ALL, Record, ResultSet
from understudy.plans import Plan, load_plan
from understudy.reports.markup import Child, items, join, pairs, tag
from understudy.reports.words import NATS, change, few, listed, number, percent, size, spread
from understudy.summary import Cell, Summary


@dataclass(frozen=True)
class Found:
    """A comparison with what it sums up to; `leading` are the methods that get a colour."""

    folder: Path
    results: ResultSet
    summary: Summary
    leading: tuple[str, ...]

    @property
    def middle(self) -> float:
        """The ratio that examples and maps are of where one has to do."""
        ratios = [ratio for ratio in self.summary.ratios if self.summary.best[ratio]]
        return ratios[len(ratios) // 2]

    def records(self, label: str, ratio: float) -> list[Record]:
        """Return the records of a method at a ratio that have figures."""
        found = self.results.results
        return [r for r in found if (r.label, r.ratio) == (label, ratio) and r.skipped is None]

    def ranked(self, ratio: float) -> list[tuple[str, Cell]]:
        """Return the methods that have figures at a ratio, lowest KL first."""
        there = [(label, row[ratio]) for label, row in self.summary.rows.items() if ratio in row and row[ratio].seeds]
        return sorted(there, key=lambda pair: pair[1].mean["kl"])

    def plan(self, record: Record) -> Plan | None:
        """Return the plan of a record, if it is still there."""
        file = self.folder / (record.plan or "")
        return load_plan(file) if record.plan and file.is_file() else None


def ratio_name(ratio: float) -> str:
    """Name a ratio: the share of the bytes in routed experts that is saved."""
    return f"{ratio * 100:g}% of the routed bytes saved"


def size_at(results: ResultSet, ratio: float) -> str:
    """Say what all methods may take at a ratio."""
    budget = next(r.budget_bytes for r in results.results if r.ratio == ratio)
    return f"at most {size(budget)} of {size(results.original.bytes)}"


def verdict(label: str, cell: Cell, best: str | None) -> str:
    """Say how a method stands against the best at its ratio."""
    if label == best:
        return "best"
    return {True: "not told apart", False: "behind", None: "one seed: open"}[cell.tied]


def summary(results: ResultSet, found: Summary) -> Child:
    """Say in plain words what a comparison found."""
    done = [r for r in results.results if r.skipped is None]
    labels = {r.label for r in done}
    seeds = {r.seed for r in done}
    tokens = results.original.tokens.get(ALL, 0)
    lines: list[Child] = [
        f"{few(len(labels), 'method')} at {few(len(found.ratios), 'size')}, with {few(len(seeds), 'calibration seed')} "
        f"each, on {tokens:,} predicted tokens of held-out text. All get the same bytes. KL is KL(original || model), "
        f"in {NATS}; lower is better."
    ]
    lines += [_at(results, found, ratio) for ratio in found.ratios if found.best[ratio]]
    lines += [_domains(results, found, ratio) for ratio in found.ratios[-1:] if found.best[ratio]]
    if skipped := {r.label for r in results.results if r.skipped}:
        lines.append(f"Skipped at some size: {listed(sorted(skipped))}; the reasons are below.")
    lines.append(_rule(found, seeds))
    original = results.original
    facts: list[tuple[Child, Child]] = [
        ("the original", join(size(original.bytes), tag("small", f"perplexity {number(original.perplexity.get(ALL))}")))
    ]
    for ratio in found.ratios:
        if best := found.best[ratio]:
            cell = found.rows[best][ratio]
            small = f"{best}, {size(round(cell.mean['bytes']))}"
            facts.append(
                (f"best KL at {ratio * 100:g}%", join(spread(cell.mean["kl"], cell.sd["kl"]), tag("small", small)))
            )
    return join(items(lines), pairs(facts))


def _at(results: ResultSet, found: Summary, ratio: float) -> Child:
    """Say who leads at one ratio, who cannot be told apart, and who comes next."""
    best = found.best[ratio]
    assert best is not None
    cell = found.rows[best][ratio]
    before, after = results.original.perplexity.get(ALL), cell.mean.get("perplexity")
    cost = f", perplexity {number(after)} ({change(before, after)})" if before and after else ""
    agree = cell.mean.get("top1_agreement")
    cost += f", top-1 agreement {percent(agree)}" if agree is not None else ""
    others = {
        label: row[ratio] for label, row in found.rows.items() if ratio in row and row[ratio].seeds and label != best
    }
    tied = sorted((label for label, c in others.items() if c.tied), key=lambda x: others[x].mean["kl"])
    behind = sorted((label for label, c in others.items() if c.tied is False), key=lambda x: others[x].mean["kl"])
    judged = any(c.tied is not None for c in others.values())
    said = f" {'leads with' if judged else 'has the lowest'} KL {spread(cell.mean['kl'], cell.sd['kl'])}{cost}."
    if tied:
        said += f" Not told apart from it: {listed(tied)}."
    if behind:
        next_ = others[behind[0]]
        said += f" Of those clearly behind, {behind[0]} is best (KL {spread(next_.mean['kl'], next_.sd['kl'])})."
    return join(f"{ratio_name(ratio)}, {size_at(results, ratio)}: ", tag("strong", best), said)


def _domains(results: ResultSet, found: Summary, ratio: float) -> Child:
    """Say on which source the leader at a ratio loses least and most."""
    best = found.best[ratio]
    records = [r for r in results.results if (r.label, r.ratio) == (best, ratio) and r.skipped is None]
    names = [name for name in results.original.tokens if name != ALL and all(name in r.sources for r in records)]
    if len(names) < 2:
        return "There is one source of text, so damage by source is not known."
    kl = {name: sum(r.sources[name].kl for r in records) / len(records) for name in names}
    least, most = min(kl, key=kl.__getitem__), max(kl, key=kl.__getitem__)
    return (
        f"At the smallest size {best} loses least on {least} (KL {number(kl[least])}) and most on {most} (KL "
        f"{number(kl[most])})."
    )


def _rule(found: Summary, seeds: set[int]) -> str:
    if len(seeds) < 2:
        return "With one seed the spread is not known, so no difference between methods is called one."
    return (
        f"Differences smaller than the spread over seeds are not called differences ({found.rule}). Figures are means "
        "± standard deviation over the seeds."
    )
