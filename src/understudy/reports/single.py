"""The page about one compressed model, from what lies in its folder `understudy`; only what is there is shown."""

from __future__ import annotations

import shlex
from pathlib import Path

from pydantic import ValidationError

from understudy.entries import OVERLAYS, Entry, ids_of
from understudy.errors import UnderstudyError
from understudy.kinds import all_kinds
from understudy.methods import all_methods
from understudy.metrics import Metrics
from understudy.plans import Plan
from understudy.recipe import Selection
from understudy.reports import maps, parts, trained
from understudy.reports.folder import ROUTES, Folder, open_folder
from understudy.reports.markup import Child, Html, document, items, join, pairs, table, tag
from understudy.reports.origins import provenance
from understudy.reports.words import NATS, change, few, listed, number, parameters, percent, size
from understudy.scores import get_score, score_layers
from understudy.stats import load_stats

ALL = parts.ALL
_FALLBACK = "reap"  # whose score is shown where a method ranks no single experts


def page(path: Path, full: bool) -> tuple[Html, list[str]]:
    """Return the page about a model folder, and what it lacks; not `full` leaves out the examples.

    Raises:
        UnderstudyError: a file is there but cannot be read.
    """
    found = open_folder(path)
    name = path.resolve().name
    damage, lacks = _damage(found)
    sections: list[tuple[str, Child]] = [
        ("Summary", _summary(found)),
        ("Damage", damage),
        ("Worst examples", _examples(found) if full else None),
        ("What was done", _maps(found)),
        ("Training", trained.section(found.trainings)),
        ("Size, memory and speed", _sizes(found)),
        ("Provenance", provenance(found)),
    ]
    lead = tag("p", f"{name}, made from {found.source}: what became of it, and what that cost.")
    return document(f"Damage report: {name}", lead, sections), lacks


def _summary(found: Folder) -> Child:
    lines: list[Child] = []
    facts: list[tuple[Child, Child]] = []
    after, before = found.nbytes, found.before
    if after is not None and before:
        facts.append(("weights", join(size(after), tag("small", f"{size(before)} before, {change(before, after)}"))))
    if found.plan is not None:
        lines += [_removed(found.plan), *_fewer(found.plan)]
    lines += [trained.sentence(training) for training in found.trainings]
    if after is not None and before:
        lines.append(f"The weights take {size(after)} instead of {size(before)}: {change(before, after)}.")
    metrics = found.metrics
    if metrics is None:
        lines.append("What that cost was not measured: the next section says how to.")
    elif metrics.kl is not None:
        cost, figures = _cost(metrics)
        lines, facts = [*lines, *cost], [*facts, *figures]
    elif metrics.perplexity:
        lines.append(f"Its perplexity is {number(metrics.perplexity[ALL])} over all the text.")
    lines += [tag("span", note, class_="warn") for note in found.notes]
    return join(items(lines), pairs(facts) if facts else None)


def _removed(plan: Plan) -> str:
    """Say what a plan replaces, and by what."""
    experts = sum(plan.model.experts.values())
    entries: dict[str, list[Entry]] = {}
    touched = set()
    for key, kinds in plan.layers.items():
        for kind, entry in kinds.items():
            if kind not in OVERLAYS:
                entries.setdefault(kind, []).append(entry)
                touched.add(key)
    became, total = [], 0
    for kind, listed_ in entries.items():
        count = sum(len(ids_of(entry)) for entry in listed_)
        total += count
        what = all_kinds()[kind].description if kind in all_kinds() else "a kind of another version"
        left = [n for entry in listed_ if isinstance(entry, dict) for n in entry.values()]
        mean = number(sum(left) / len(left)) if left else ""
        of = f"rank {mean}" if maps.counts_ranks(kind) else f"{mean} neurons"
        kept = f", {of} on average" if left else ""
        if kind in all_kinds() and not all_kinds()[kind].whole_numbers:
            kept = f"; {sum(1 for n in left if n)} do"
        became.append(f"{count:,} by “{kind}” ({what}{kept})")
    if not total:
        return f"All {experts:,} routed experts were kept."
    share = f"{total:,} of {experts:,} routed experts ({total / experts:.1%})"
    where = f"in {few(len(touched), 'layer')} of {len(plan.model.experts)}"
    return f"{share}, {where}, were replaced: {'; '.join(became)}."


def _fewer(plan: Plan) -> list[str]:
    """Say where fewer experts run for a token than it chooses."""
    said: dict[str, int] = {}
    for key, kinds in plan.layers.items():
        for kind in sorted(OVERLAYS & kinds.keys()):
            how = plan.how.get(kind, {})
            others = (
                "the others are left out" if how.get("plain") else "vectors of the others rescale what these are given"
            )
            text = f"{how.get('main_k')} of the {plan.model.top_k[key]} experts that a token chooses run, and {others}"
            said[text] = said.get(text, 0) + 1
    return [f"In {few(n, 'layer')} of {len(plan.model.experts)}, {text}." for text, n in said.items()]


def _cost(metrics: Metrics) -> tuple[list[Child], list[tuple[Child, Child]]]:
    """Say what the compression cost: as sentences, and as a few figures."""
    assert metrics.against is not None and metrics.kl_by_source is not None
    before, after = metrics.against["perplexity"], metrics.perplexity
    whole = f"{number(before[ALL])} before, {change(before[ALL], after[ALL])}"
    facts: list[tuple[Child, Child]] = [
        ("KL to the original", join(number(metrics.kl), tag("small", NATS))),
        ("perplexity", join(number(after[ALL]), tag("small", whole))),
        ("top-1 agreement", join(percent(metrics.top1_agreement), tag("small", "of the predicted positions"))),
    ]
    lines: list[Child] = [
        f"On held-out text{_amount(metrics)} it strays {number(metrics.kl)} {NATS} from its original (KL divergence). "
        f"Its perplexity is "
        f"{number(after[ALL])} instead of {number(before[ALL])} ({change(before[ALL], after[ALL])}), and at "
        f"{percent(metrics.top1_agreement)} of the positions both find the same next token most likely."
    ]
    by_source = {name: kl for name, kl in metrics.kl_by_source.items() if name != ALL}
    if len(by_source) > 1:
        ranked = sorted(by_source, key=by_source.__getitem__)
        best, worst = (
            f"{name} (KL {number(by_source[name])}, perplexity {change(before[name], after[name])})"
            for name in (ranked[0], ranked[-1])
        )
        lines.append(f"Least damaged is {best}, most damaged {worst}.")
    if verdict := _task_verdict(metrics.against["tasks"], metrics.tasks):
        lines.append(verdict)
    return lines, facts


def _amount(metrics: Metrics) -> str:
    data = metrics.provenance.get("data") or {}
    blocks = sum((data.get("blocks") or {}).values())
    return f" ({blocks * (data['seq_len'] - 1):,} predicted tokens)" if blocks else ""


def _task_verdict(original: parts.Tasks, model: parts.Tasks) -> str | None:
    """Say which results of tasks differ by more than two standard errors of the difference."""
    clear: list[str] = []
    unclear: list[str] = []
    for task, metrics in model.items():
        for metric, value in metrics.items():
            before = original.get(task, {}).get(metric)
            errors = [x.get(task, {}).get(parts.stderr_of(metric)) for x in (original, model)]
            if value is None or before is None or "_stderr" in metric or None in errors:
                continue
            margin = 2 * sum(e * e for e in errors if e is not None) ** 0.5
            said = f"{task} {metric} {number(value)} instead of {number(before)}"
            (clear if abs(value - before) > margin else unclear).append(said)
    if clear:
        more = f" ({few(len(unclear), 'other')} within sampling error)" if unclear else ""
        return f"Tasks that changed by more than two standard errors: {listed(clear)}{more}."
    return f"No task changed by more than two standard errors: {listed(unclear)}." if unclear else None


def _damage(found: Folder) -> tuple[Child, list[str]]:
    metrics = found.metrics
    shown = shlex.quote(str(found.path))
    if metrics is None:
        command = f"understudy eval {shown} --against {shlex.quote(found.source)} --data HELD-OUT.jsonl"
        lack = f"no figures of quality; this adds them: {command}"
        text = "Not measured yet. This command measures it; then write the report again:"
        return join(tag("p", text), parts.command_lines([command, f"understudy report {shown}"])), [lack]
    against = metrics.against or {}
    rows = [
        parts.Damage(
            name,
            perplexity,
            against.get("perplexity", {}).get(name),
            (metrics.kl_by_source or {}).get(name),
            (metrics.top1_by_source or {}).get(name),
        )
        for name, perplexity in metrics.perplexity.items()
    ]
    lacks = [] if against else ["no comparison with the original: run eval with --against"]
    tasks = parts.task_table(against.get("tasks", {}), metrics.tasks)
    by_source = [tag("h3", "By source of text"), parts.damage_table(rows)] if rows else None
    if rows and metrics.kl is not None:
        by_source = [*(by_source or []), tag("p", _READ, class_="muted")]
    missing = [tag("p", f"{lack[:1].upper()}{lack[1:]}.") for lack in lacks]
    return join(missing, by_source, [tag("h3", "By task"), tasks] if tasks else None, parts.notes(metrics.notes)), lacks


_READ = (
    "KL is the mean of KL(original || model) over the predicted tokens, 0 where both predict alike. Perplexity is the "
    "exponential of the mean negative log-likelihood. Top-1 agreement is the share of positions at which both find the "
    "same token most likely."
)


def _examples(found: Folder) -> Child:
    if not found.examples:
        return None
    said = (
        "The blocks of the text on which model and original differ most, continued by each with its most likely tokens."
    )
    return join(tag("p", said), [parts.example(e, opened=i == 0, level=3) for i, e in enumerate(found.examples)])


def _maps(found: Folder) -> Child:
    if found.plan is None:
        return None
    stats = found.stats
    counts = {key: layer.count for key, layer in stats.layers.items()} if stats else None
    widths = {key: layer.width for key, layer in stats.model.layers.items()} if stats else {}
    shown: list[Child] = [maps.plan_map(found.plan, widths)]
    if counts:
        shown += [maps.frequency(counts), score_map(found.plan, found.file("stats.safetensors"))]
    else:
        shown.append(tag("p", "The folder holds no statistics, so how often experts are used is not known here."))
    return join(shown, maps.layer_table(found.plan, counts))


def score_map(plan: Plan, stats_file: Path) -> Child:
    """Map the score that a plan was chosen by, or REAP's where the method ranks no single experts."""
    method = all_methods().get(plan.method)
    name = (method.score if method else None) or _FALLBACK
    because = (
        ""
        if method and method.score
        else f"Plans of “{plan.method}” do not rank single experts; this is for orientation."
    )
    known = {key: value for key, value in plan.recipe.items() if key in Selection.model_fields}
    try:
        settings = Selection.model_validate({"method": plan.method, **known})
        score = get_score(name)
        scored = score_layers(score, load_stats(stats_file, only=(*ROUTES, *score.needs)), settings)
    except (UnderstudyError, ValidationError, TypeError) as error:
        why = " ".join(str(error).split())[:300]
        return tag("p", f"The score {name} cannot be shown: {why}", class_="muted")
    return maps.scores(name, score.source, scored.layers, because)


def _sizes(found: Folder) -> Child:
    metrics, stats = found.metrics, found.stats
    against = (metrics.against if metrics else None) or {}
    rows: list[tuple[str, str, str, str]] = []
    if found.nbytes is not None:
        before = found.before
        rows.append(
            ("weights on disk", size(before), size(found.nbytes), change(before, found.nbytes) if before else "–")
        )
    for key, name in (("total", "parameters"), ("routed", "in routed experts"), ("active", "active for a token")):
        after = metrics.params.get(key) if metrics else None
        known = {"total": stats.model.params, "routed": stats.model.routed_params}.get(key) if stats else None
        first = against.get("params", {}).get(key, known)
        if after is not None:
            rows.append((name, parameters(first), parameters(after), change(first, after) if first else "–"))
    said = (
        "Weights are what loading takes at least. Peak memory and tokens a second depend on the machine and were not "
        "measured for this folder; ",
        tag("code", "understudy compare"),
        " measures them against the original in the same run.",
    )
    shown = table("Size", ["", "original", "this model", "change"], rows) if rows else None
    return join(shown, tag("p", *said, class_="muted"))
