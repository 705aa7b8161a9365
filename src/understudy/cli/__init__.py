"""The command line: parse, call the function of the same name, show what it returns.

Nothing here imports torch: a plan takes less time than that import. Commands import what they call.
"""

from __future__ import annotations

import inspect as introspection
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import understudy
from understudy._version import __version__
from understudy.cli.arguments import (
    AsJson,
    Materialise,
    MaxShardSize,
    Model,
    Out,
    PlanFile,
    PlanFiles,
    ResultFolder,
    StatsFile,
    TrustRemoteCode,
    trust,
)
from understudy.cli.options import build, flags, keyword, settings_of
from understudy.cli.screen import Screen
from understudy.cli.shown import each, facts_of, planned
from understudy.recipe import Calibration, Comparison, Evaluation, Recovery, Search, Selection

app = typer.Typer(
    name="understudy",
    help="Shrink Mixture-of-Experts language models by replacing the experts they can spare.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # help texts hold brackets, which are no markup
    pretty_exceptions_enable=False,
)


def command(name: str, view: str) -> Callable[[Callable[..., dict[str, Any] | None]], Callable[..., None]]:
    """Register a function as a command: settings among its parameters become flags, what it returns is shown.

    `view` names the function of `cli.tables` that makes a table of the result.
    """

    def register(function: Callable[..., dict[str, Any] | None]) -> Callable[..., None]:
        models = settings_of(function)
        own = [
            keyword(p.name, p.annotation, p.default)
            for p in introspection.signature(function, eval_str=True).parameters.values()
            if p.name != "screen" and p.name not in models
        ]

        def run(**given: Any) -> None:
            screen, as_json = Screen(), given.pop("json")
            try:
                with screen.working():
                    data = function(screen, **build(models, given), **given)
                if data is not None:
                    screen.show(data, partial(_view, view), as_json)
            except BrokenPipeError:
                raise  # whoever read stdout has gone; typer ends quietly
            except (Exception, KeyboardInterrupt) as error:
                if screen.debug:
                    raise
                raise typer.Exit(screen.fail(error)) from None

        parameters = [*own, *flags(models.values()).values(), keyword("json", AsJson, False)]
        run.__signature__ = introspection.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {}
        app.command(name, help=function.__doc__)(run)
        return run

    return register


def _view(name: str, data: dict[str, Any]) -> Any:
    from understudy.cli import tables

    view = getattr(tables, name)
    return tables.several(data["plans"], view) if "plans" in data else view(data)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"understudy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    pass


@command("inspect", view="inspect")
def inspect(screen: Screen, model: Model, trust_remote_code: TrustRemoteCode = trust.default) -> dict[str, Any]:
    """Say what a model is made of, and what can be done with it."""
    return understudy.inspect(model, trust_remote_code=trust_remote_code).to_dict()


@command("calibrate", view="calibrate")
def calibrate(screen: Screen, model: Model, out: Out, settings: Calibration) -> dict[str, Any]:
    """Run text through a model and write the statistics of its experts."""
    stats = understudy.calibrate(model, out, settings=settings, progress=partial(screen.step, "calibrate"))
    return {
        "out": str(out),
        "model": stats.model.source,
        "family": stats.model.family,
        "fingerprint": stats.model.fingerprint,
        "layers": len(stats.model.layers),
        "experts": stats.model.experts,
        "unseen": {key: int((layer.count == 0).sum()) for key, layer in stats.layers.items()},
        "data": stats.data,
        "notes": list(stats.data.get("notes", ())),
    }


@command("plan", view="plan")
def plan(screen: Screen, stats: StatsFile, out: Out, settings: Selection) -> dict[str, Any]:
    """Choose the experts to replace, and write that as a plan to look at; reads no weights."""
    result = understudy.plan(stats, out, settings=settings)
    scores = result.scores
    return planned(result.plan, out) | {
        "source_bytes": result.facts.nbytes,
        "expected_bytes": result.expected_bytes,
        "load_bytes": result.load_bytes,
        "notes": list(result.notes),
        "scores": scores
        and {
            "name": scores.name,
            "source": scores.source,
            "layers": {key: values.tolist() for key, values in scores.layers.items()},
        },
    }


@command("search", view="plan")
def search(
    screen: Screen, model: Model, stats: StatsFile, out: Out, selection: Selection, settings: Search
) -> dict[str, Any]:
    """Find a plan by running the model on text: experts that each layer gives up, or as the method does."""
    found = understudy.search(model, stats, out, selection=selection, settings=settings, progress=screen.step)
    return planned(found.plan, out) | {
        "source_bytes": found.facts.nbytes,
        "expected_bytes": found.expected_bytes,
        "load_bytes": found.expected_bytes - found.facts.unloaded_bytes,
        "fitness": found.fitness,
        "start_fitness": found.start_fitness,
        "evaluations": found.evaluations,
        "notes": list(found.notes),
    }


@command("show", view="show")
def show(screen: Screen, plans: PlanFiles) -> dict[str, Any]:
    """Show which experts of which layer a plan replaces."""
    return each(plans, understudy.show)


@command("check", view="check")
def check(
    screen: Screen,
    plans: PlanFiles,
    stats: Annotated[Path | None, typer.Option("--stats", help="check against the model of these statistics")] = None,
    model: Annotated[str | None, typer.Option("--model", help="check against this model")] = None,
    trust_remote_code: TrustRemoteCode = trust.default,
) -> dict[str, Any]:
    """Check a plan after editing; with statistics or a model, against that model as well."""
    facts = facts_of(stats, model, trust_remote_code)
    return each(plans, lambda plan: understudy.check(plan, facts))


@command("diff", view="diff")
def diff(screen: Screen, first: PlanFile, second: PlanFile) -> dict[str, Any]:
    """Compare two plans, expert by expert."""
    return understudy.diff(first, second)


@command("apply", view="apply")
def apply(
    screen: Screen,
    model: Model,
    plan: PlanFile,
    out: Out,
    stats: Annotated[Path | None, typer.Option("--stats", help="statistics that stand-ins are made of")] = None,
    max_shard_size: MaxShardSize = None,
    materialise: Materialise = False,
    trust_remote_code: TrustRemoteCode = trust.default,
) -> dict[str, Any]:
    """Write the smaller model that a plan describes, and verify it."""
    applied = understudy.apply(
        model,
        plan,
        out,
        stats=stats,
        max_shard_size=max_shard_size,
        materialise=materialise,
        trust_remote_code=trust_remote_code,
        progress=screen.step,
    )
    full = "nothing is saved: experts that the plan merges or shrinks were written at full size (--materialise)"
    return {
        "out": str(applied.folder),
        "bytes": applied.nbytes,
        "source_bytes": applied.source_nbytes,
        "loads": applied.loads,
        "notes": [*applied.notes, *([full] if applied.at_full_size else [])],
    }


@command("compress", view="compress")
def compress(
    screen: Screen,
    model: Model,
    out: Out,
    calibration: Calibration,
    selection: Selection,
    max_shard_size: MaxShardSize = None,
    repair: Annotated[
        int, typer.Option("--repair", help="rounds in which all that each layer is linear in is fitted together")
    ] = 0,
) -> dict[str, Any] | None:
    """Calibrate, plan and apply in one go."""
    compressed = understudy.compress(
        model,
        out,
        calibration=calibration,
        selection=selection,
        max_shard_size=max_shard_size,
        repair=repair,
        progress=screen.step,
    )
    return compressed.to_dict() if compressed else None


@command("recover", view="recover")
def recover(
    screen: Screen,
    model: Model,
    out: Out,
    settings: Recovery,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="the original: to distil from, and what fades out of the stand-ins")
    ] = None,
    materialise: Materialise = False,
    max_shard_size: MaxShardSize = None,
) -> dict[str, Any] | None:
    """Train what stands in for the experts, or more, and write the model that comes out."""
    told = {"teacher": teacher, "settings": settings, "materialise": materialise, "max_shard_size": max_shard_size}
    recovered = understudy.recover(model, out, **told, progress=screen.step)
    return recovered.to_dict() if recovered else None


@command("eval", view="evaluate")
def evaluate(
    screen: Screen,
    model: Model,
    settings: Evaluation,
    against: Annotated[str | None, typer.Option("--against", help="the original, to compare with")] = None,
) -> dict[str, Any]:
    """Measure a model on held-out text and tasks, alone or against its original."""
    return understudy.eval(model, against=against, settings=settings, progress=screen.step).to_dict()


@command("compare", view="compare")
def compare(
    screen: Screen,
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="a folder; what it holds already is added to", show_default=False)],
    settings: Comparison,
) -> dict[str, Any]:
    """Compare methods on one model at equal bytes: what each leaves of its quality, and how fast it is."""
    from understudy.comparison import summarise

    results = understudy.compare(model, out, settings=settings, progress=screen.step)
    return {"out": str(out), "summary": summarise(results).model_dump(mode="json")} | results.model_dump(mode="json")


@command("report", view="report")
def report(screen: Screen, folder: ResultFolder) -> dict[str, Any]:
    """Write DIR/report.html: what a compressed model, or a comparison of methods, lost and where."""
    return understudy.report(folder).to_dict()


def main() -> None:
    """Run the command line."""
    app(prog_name="understudy")
