"""Arguments and flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from understudy.recipe import Calibration

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a local folder or a hub id", show_default=False)]
PlanFiles = Annotated[list[Path], typer.Argument(metavar="PLAN...", help="a plan, or several", show_default=False)]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="a plan", show_default=False)]
ResultFolder = Annotated[Path, typer.Argument(metavar="DIR", help="what compare or compress wrote", show_default=False)]
StatsFile = Annotated[Path, typer.Argument(metavar="STATS", help="statistics of `calibrate`", show_default=False)]
Out = Annotated[Path, typer.Option("--out", help="what to write; must not exist", show_default=False)]
MaxShardSize = Annotated[str | None, typer.Option("--max-shard-size", help="size of a shard file, as 5GB")]
Materialise = Annotated[
    bool, typer.Option("--materialise", help="write an ordinary checkpoint at full size; it saves nothing")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, and nothing else there")]
trust = Calibration.model_fields["trust_remote_code"]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help=trust.description)]
