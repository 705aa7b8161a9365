"""What is shown of a comparison beside its figures: continuations of text, maps of plans, memory and speed."""

from __future__ import annotations

from understudy.reports import maps, parts
from understudy.reports.markup import Child, by_value, folded, table, tag
from understudy.reports.ranks import Found, ratio_name
from understudy.reports.single import score_map
from understudy.reports.words import few, number, percent, size
from understudy.stats import load_stats


def examples(found: Found, full: bool) -> Child:
    """Show how the leaders, and in full the others, go on with the blocks on which they are worst."""
    shown: list[Child] = []
    for ratio in found.summary.ratios:
        best = found.summary.best[ratio]
        record = next((r for r in found.records(best or "", ratio) if r.examples), None)
        if record is None:
            continue
        shown.append(tag("h3", f"{ratio_name(ratio)}: {best}, which leads there"))
        shown += [parts.example(e, opened=i == 0) for i, e in enumerate(record.examples[: 3 if full else 1])]
    others: list[Child] = []
    for label in found.summary.rows if full else ():
        record = next((r for r in found.records(label, found.middle) if r.examples), None)
        if record is not None and label != found.summary.best[found.middle]:
            others.append(folded(label, [parts.example(e, opened=False) for e in record.examples[:2]]))
    if others:
        shown.append(folded(f"The other methods, {ratio_name(found.middle).lower()}", others))
    said = "The blocks of the test text on which a model differs most from the original, continued by both, greedily."
    return [tag("p", said), *shown] if shown else None


def plans(found: Found, full: bool) -> Child:
    """Map use, scores and what plans did at the middle ratio; in full those of every method."""
    ratio, best = found.middle, found.summary.best[found.middle]
    first = next((r for r in found.records(best or "", ratio) if r.plan), None)
    if first is None or best is None:
        return None
    shown: list[Child] = [tag("p", f"{ratio_name(ratio)}, seed {first.seed}. First {best}, which leads there.")]
    plan = found.plan(first)
    widths = {key: layer.width for key, layer in found.results.model.layers.items()}
    if plan is not None:
        shown.append(maps.plan_map(plan, widths))
    file = found.folder / first.stats if first.stats else None
    if file is not None and file.is_file():
        stats = load_stats(file, only=("count", "tokens"))
        shown.append(maps.frequency({key: layer.count for key, layer in stats.layers.items()}))
        if plan is not None:
            shown.append(score_map(plan, file))
    others: list[Child] = []
    for label in found.summary.rows if full else found.leading:
        record = next((r for r in found.records(label, ratio) if r.plan), None)
        other = found.plan(record) if record is not None and label != best else None
        if other is not None:
            others.append(folded(label, maps.plan_map(other, widths)))
    return [*shown, folded("What the plans of the others did", others) if others else None]


def speed(found: Found) -> Child:
    """List memory and tokens a second of what was measured, the middle ratio in sight and the others folded."""
    measured = [(r, r.speed) for r in found.results.results if r.speed is not None]
    if not measured:
        return None
    one = measured[0][1]
    said = (
        f"On {one.device} in {one.dtype}, {few(one.threads, 'thread')}: {one.prompt_tokens} tokens of prefill, "
        f"{one.decoded_tokens} decoded one by one; medians of {few(one.repeats, 'repeat')}. The original was measured "
        f"in the same minutes, beside the first row with peak memory {size(one.original_peak_memory_bytes)}, prefill "
        f"{number(one.original_prefill)} and decode {number(one.original_decode)} tokens/s."
    )
    shown: list[Child] = [tag("p", said)]
    head = ["method", "peak memory", "of the original's", "prefill, tokens/s", "prefill, × original"]
    head += ["decode, tokens/s", "decode, × original"]
    for ratio in dict.fromkeys(r.ratio for r, _ in measured):
        rows = [
            (
                r.label,
                by_value(size(s.peak_memory_bytes), s.peak_memory_bytes),
                percent(s.peak_memory_bytes / s.original_peak_memory_bytes),
                number(s.prefill),
                number(s.prefill_ratio),
                number(s.decode),
                number(s.decode_ratio),
            )
            for r, s in measured
            if r.ratio == ratio
        ]
        listed = table(f"Memory and speed, {ratio_name(ratio)}", head, rows, sortable=True)
        shown.append(folded(ratio_name(ratio), listed, opened=ratio == found.middle))
    return shown
