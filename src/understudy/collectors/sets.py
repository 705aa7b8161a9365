"""Which experts tokens choose together (SHAPE)."""

from __future__ import annotations

from typing import Any

import numpy as np

from understudy.collectors import Collector, Resident
from understudy.tap import Routes


class Sets(Collector):
    """Counts every set of K experts that a token chose; a token whose router chose fewer than K is left out."""

    group = "sets"

    def __init__(self, resident: Resident) -> None:
        super().__init__(resident)
        self._rows: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def hear(self, routes: Routes) -> None:
        """Count the sets of one call."""
        full = (routes.weights_Tk != 0).all(dim=1)
        ids = routes.index_Tk[full].sort(dim=1).values
        rows, counts = np.unique(ids.cpu().numpy().astype(np.int32), axis=0, return_counts=True)
        self._rows.append(rows)
        self._counts.append(counts)

    def sums(self) -> dict[str, Any]:
        """Return the sets, sorted, and how many tokens chose each."""
        rows, where = np.unique(np.concatenate(self._rows), axis=0, return_inverse=True)
        counts = np.bincount(where.ravel(), weights=np.concatenate(self._counts), minlength=len(rows))
        return {"topk_sets": rows, "topk_counts": counts}
