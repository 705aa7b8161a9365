"""The statistics of a comparison: one file a seed that plans are cut from, and those that belong to one method alone.

stats-seed0.safetensors              of the whole model
stats-seed0-channels.safetensors     likewise, with sums that methods added later ask for
stats-seed0-ream-0.25.safetensors    of the model as REAM compressed it before each layer
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.contest import Entrant, groups_of
from understudy.data import Blocks, token_blocks
from understudy.errors import StatsError, UnsupportedModelError
from understudy.recipe import Calibration, Comparison, Extra
from understudy.stats import Stats, file_hash, load_stats

logger = logging.getLogger(__name__)
Calibrate = Callable[[Path, Calibration, Blocks], Stats]


@dataclass(frozen=True)
class Calibrated:
    """Statistics, their file and its hash."""

    stats: Stats
    file: Path
    digest: str


class Calibrations:
    """Calibrates where a folder does not have the statistics yet.

    Args:
        folder: where the files are.
        settings: which text, and how the model is run.
        tokenizer: of the model.
        calibrate: called with the file to write, the settings, and the blocks that these draw.
    """

    def __init__(self, folder: Path, settings: Comparison, tokenizer: Any, calibrate: Calibrate) -> None:
        self.folder, self.settings, self.tokenizer, self.calibrate = folder, settings, tokenizer, calibrate
        self._drawn: dict[int, Blocks] = {}  # by seed: to tokenise a large text takes longer than to calibrate on it

    def shared(self, seed: int, entrants: Iterable[Entrant]) -> Calibrated:
        """Return statistics of a seed with all that these methods need, as far as the family shows it.

        Raises:
            StatsError: the folder holds statistics of other text.
        """
        groups = groups_of(entrants)
        try:
            return self._shared(seed, groups)
        except UnsupportedModelError as error:
            rest = tuple(group for group in groups if group != "gradients")
            if rest == groups:
                raise
            logger.warning("calibrating without gradients: %s", error)
            return self._shared(seed, rest)

    def _shared(self, seed: int, groups: tuple[Extra, ...]) -> Calibrated:
        plain, extended = self._file(seed), self._file(seed, *groups)
        for file in (plain, extended):
            if file.exists():
                stats = self._read(file, seed)
                if set(groups) <= set(stats.data.get("collect", ())):
                    return Calibrated(stats, file, file_hash(file))
        return self._new(extended if plain.exists() else plain, self._calibration(seed, collect=groups))

    def sequential(self, entrant: Entrant, ratio: float, seed: int) -> Calibrated:
        """Return statistics in which each layer follows layers as this method compresses them at this ratio.

        Raises:
            StatsError: the folder holds statistics of other text.
        """
        name = entrant.method.name
        file = self._file(seed, name, f"{ratio:g}")
        if file.exists():
            return Calibrated(self._read(file, seed), file, file_hash(file))
        return self._new(file, self._calibration(seed, sequential=name, sequential_ratio=ratio))

    def _file(self, seed: int, *words: str) -> Path:
        return self.folder / f"{'-'.join([f'stats-seed{seed}', *words])}.safetensors"

    def _new(self, file: Path, settings: Calibration) -> Calibrated:
        stats = self.calibrate(file, settings, self.blocks(settings.seed))
        return Calibrated(stats, file, file_hash(file))

    def _calibration(self, seed: int, **more: Any) -> Calibration:
        known = set(Calibration.model_fields) & set(Comparison.model_fields)
        if "gradients" not in more.get("collect", ()):
            known.discard("gradient_samples")
        return Calibration(seed=seed, **{name: getattr(self.settings, name) for name in known}, **more)

    def _read(self, file: Path, seed: int) -> Stats:
        stats = load_stats(file)
        if self.blocks(seed).digest != stats.data.get("digest"):
            raise StatsError(f"{file} was made of other text than --data is now; choose another --out")
        return stats

    def blocks(self, seed: int) -> Blocks:
        """Return the text of a seed."""
        settings = self.settings
        if seed not in self._drawn:
            self._drawn[seed] = token_blocks(
                settings.data, self.tokenizer, seq_len=settings.seq_len, samples=settings.samples, seed=seed
            )
        return self._drawn[seed]
