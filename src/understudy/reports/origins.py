"""Where a compressed model and its figures come from, and the commands that make them again."""

from __future__ import annotations

import shlex
from typing import Any

from pydantic import ValidationError

from understudy.card import commands
from understudy.methods import all_methods
from understudy.recipe import Calibration, Selection
from understudy.reports import parts, trained
from understudy.reports.folder import Folder
from understudy.reports.markup import Child, join, pairs, tag
from understudy.stats import file_hash


def provenance(found: Folder) -> Child:
    """Say which model, text, seeds, hashes and versions the page stands on, and how to repeat it."""
    rows: list[tuple[str, str]] = []
    if found.plan is not None:
        rows += [("original", found.plan.model.source), ("fingerprint of the original", found.plan.model.fingerprint)]
        method = all_methods().get(found.plan.method)
        rows += [
            ("family", found.plan.model.family),
            ("method", f"{found.plan.method}{f' ({method.paper})' if method else ''}"),
        ]
    if found.stats is not None:
        rows += data_rows("calibration", found.stats.data)
    evaluated = found.metrics.provenance if found.metrics else {}
    if evaluated:
        rows.append(("fingerprint of this model", evaluated["model"]["fingerprint"]))
        rows.append(("computed in", f"{evaluated['model']['dtype']}, batches of {evaluated['batch_size']}"))
        rows += data_rows("test", evaluated["data"] or {})
        if tasks := evaluated["tasks"]:
            limit = f", the first {tasks['limit']} items" if tasks["limit"] else ""
            rows.append(("tasks", f"{', '.join(tasks['names'])}{limit}; lm-eval {tasks['lm_eval']}"))
    parents = (found.provenance or {}).get("parents", {})
    for name, file in (("plan", "plan.yaml"), ("stats", "stats.safetensors")):
        if name in parents and found.file(file).is_file():
            same = file_hash(found.file(file)) == parents[name]
            rows.append(
                (
                    f"hash of {file}",
                    f"{parents[name]} ({'as recorded' if same else 'CHANGED since the model was written'})",
                )
            )
    written = [(found.provenance or {}).get("understudy"), evaluated.get("understudy")]
    versions = [f"{v} ({what})" for v, what in zip(written, ("written", "evaluated"), strict=True) if v]
    rows.append(("Understudy", ", ".join(versions) or "–"))
    named = [(name, tag("code", value)) for name, value in rows]
    return join(pairs(named, class_="facts"), tag("h3", "To make it again"), parts.command_lines(_again(found)))


def data_rows(what: str, data: dict[str, Any]) -> list[tuple[str, str]]:
    """Say in rows what text was read; merged statistics hold that of each run."""
    if "merged" in data:
        return [row for i, part in enumerate(data["merged"], 1) for row in data_rows(f"{what}, run {i}", part)]
    if not data:
        return []
    drawn = ", ".join(f"{name} {n}" for name, n in (data.get("blocks") or {}).items())
    seed, length = data.get("seed"), data.get("seq_len")
    rows = [(f"{what} text", f"{drawn or '–'} (blocks of {length} tokens, seed {seed})")]
    return [*rows, (f"digest of the {what} tokens", str(data["digest"]))] if data.get("digest") else rows


def _again(found: Folder) -> list[str]:
    shown = shlex.quote(str(found.path))
    lines: list[str] = []
    recipe, first = found.recipe, trained.first_folder(found.trainings, found.path)
    if recipe:
        try:
            calibration = Calibration.model_validate(recipe["calibration"])
            selection = Selection.model_validate(recipe["selection"])
            limit = recipe.get("apply", {}).get("max_shard_size")
            lines += commands(recipe["model"], first, calibration, selection, limit)
        except (KeyError, ValidationError, TypeError):
            lines.append("# recipe.json is of another version of understudy; it lists every setting")
    elif found.plan is not None:
        lines.append(
            f"understudy apply {shlex.quote(found.source)} {shown}/understudy/plan.yaml --stats STATS --out "
            f"{shlex.quote(first) if found.trainings else 'NEW'}"
        )
    lines += trained.again(found.trainings, found.source, str(found.path))
    if evaluated := found.metrics.provenance if found.metrics else None:
        against = ["--against", evaluated["against"]["source"]] if evaluated["against"] else []
        data, tasks = evaluated["data"] or {}, evaluated["tasks"] or {}
        given = [word for spec in data.get("specs", ()) for word in ("--data", spec)]
        block = (
            [
                "--samples",
                str(sum(data["blocks"].values())),
                "--seq-len",
                str(data["seq_len"]),
                "--seed",
                str(data["seed"]),
            ]
            if data
            else []
        )
        asked = ["--tasks", ",".join(tasks["names"])] if tasks else []
        lines.append(shlex.join(["understudy", "eval", str(found.path), *against, *given, *block, *asked]))
    return [*lines, f"understudy report {shown}"]
