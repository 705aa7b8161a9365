"""The figures of an evaluation, and the file that they are kept in."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Metrics:
    """Figures of one model; those by source of text have the total of all sources under "all".

    Attributes:
        perplexity: exponential of the mean negative log-likelihood, in nats a predicted token; empty without text.
        kl: mean KL(original || model) in nats a predicted token; None without an original or text, as those below.
        kl_by_source: the same for each source.
        top1_agreement: share of predicted positions at which both models find the same token most likely.
        top1_by_source: the same for each source.
        bytes: of all tensors of the checkpoint.
        params: `total`, `routed` (in routed experts and their stand-ins), `active` (that a token passes through).
        tasks: lm-eval's results by task and metric.
        against: perplexity, bytes, params and tasks of the original, None without one.
        provenance: what was evaluated, on what, with which settings.
        notes: what a reader of the figures should know, a sentence each.
    """

    perplexity: dict[str, float]
    kl: float | None
    kl_by_source: dict[str, float] | None
    top1_agreement: float | None
    top1_by_source: dict[str, float] | None
    bytes: int
    params: dict[str, int]
    tasks: dict[str, dict[str, float | None]]
    against: dict[str, Any] | None
    provenance: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `--json` prints it and `metrics.json` holds it."""
        return {"format": FORMAT, **asdict(self), "notes": list(self.notes)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the figures as JSON, under a temporary name first; equal figures give equal bytes.

        Raises:
            OSError: the place cannot be written.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".tmp")
        partial.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, target)
        return target
