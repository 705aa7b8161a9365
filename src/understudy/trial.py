"""A smaller model against its original on held-out text: the original is walked once, then any number of models.

Letters: N blocks, S tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from understudy.activations import ActivationStore
from understudy.comparison import ALL, Original, SourceFigures, WorstBlock
from understudy.data import Blocks
from understudy.errors import UnderstudyError
from understudy.examples import worst_blocks, worst_examples
from understudy.facts import parse_bytes
from understudy.quality import AGREE, KL, NLL, ORIGINAL_NLL, TOKENS, by_source, predict, run
from understudy.recipe import Comparison
from understudy.sizes import RouteCounter, count_params
from understudy.skeleton import Skeleton
from understudy.speed import measure_speed
from understudy.walk import Walk

Report = Callable[[str, int, int], None]
_WORST = 8  # blocks that are named
_SILENT: Report = lambda what, done, total: None  # noqa: E731


class Trial:
    """The original on the test text, and what is measured against it.

    Args:
        original: the whole model.
        blocks: the test text.
        settings: batch size, memory, number of examples, and whether speed is wanted.
        tokenizer: of the original.
    """

    def __init__(self, original: Skeleton, blocks: Blocks, settings: Comparison, tokenizer: Any) -> None:
        self.original, self.blocks, self.settings, self.tokenizer = original, blocks, settings, tokenizer
        self._walk = self._walk_of(original)

    def walk_original(self, report: Report) -> Original:
        """Walk the original, keep what its last layer put out, and return its figures.

        Raises:
            NumericError: NaN or infinity in a layer's output or in what is predicted.
        """
        routes = RouteCounter(self.original)
        run(self._walk, routes.observe, "walk original", report)
        found = {n: x for n, x in by_source(self.blocks, predict([self._walk], report)).items() if x[TOKENS]}
        return Original(
            bytes=self.original.checkpoint.nbytes,
            params=count_params(self.original, routes.means()),
            tokens={name: int(x[TOKENS]) for name, x in found.items()},
            perplexity={name: float(np.exp(x[NLL] / x[TOKENS])) for name, x in found.items()},
        )

    def figures(self, model: Skeleton) -> tuple[dict[str, Any], np.ndarray]:
        """Return the fields of a record that the text gives, and the mean KL of each block, `[N]` nats a token.

        Raises:
            NumericError: NaN or infinity in a layer's output or in what is predicted.
        """
        routes, walk = RouteCounter(model), self._walk_of(model)
        run(walk, routes.observe, "walk model", _SILENT)
        sums_N5 = predict([walk, self._walk], _SILENT)
        sources = {
            name: SourceFigures.of(int(x[TOKENS]), x[NLL], x[ORIGINAL_NLL], x[KL], int(x[AGREE]))
            for name, x in by_source(self.blocks, sums_N5).items()
            if x[TOKENS]
        }
        kl_N, total = sums_N5[:, KL] / sums_N5[:, TOKENS], sources[ALL]
        fields = {
            "bytes": model.checkpoint.nbytes,
            "params": count_params(model, routes.means()),
            "sources": sources,
            "perplexity": total.perplexity,
            "kl": total.kl,
            "top1_agreement": total.top1_agreement,
            "worst": [self._worst(i, sums_N5[i]) for i in worst_blocks(kl_N, _WORST)],
        }
        return fields, kl_N

    def run_whole(self, model: Skeleton, kl_N: np.ndarray) -> tuple[dict[str, Any], list[str]]:
        """Return the fields of a record that need the whole model in memory; where it cannot be, a note says so."""
        fields: dict[str, Any] = {}
        try:
            if not self.settings.no_speed:
                fields["speed"] = measure_speed(model, self.original, self.blocks.ids[0])
            if count := self.settings.examples:
                fields["examples"] = worst_examples(
                    model, self.original, self.blocks, kl_N, self.tokenizer, count=count
                )
        except UnderstudyError as error:
            return fields, [f"not measured in full: {error}"]
        return fields, []

    def _worst(self, block: int, sums_5: np.ndarray) -> WorstBlock:
        tokens = sums_5[TOKENS]
        return WorstBlock(
            source=self.blocks.names[self.blocks.source[block]],
            block=block,
            kl=float(sums_5[KL] / tokens),
            perplexity=float(np.exp(min(sums_5[NLL] / tokens, 700.0))),
            original_perplexity=float(np.exp(min(sums_5[ORIGINAL_NLL] / tokens, 700.0))),
        )

    def _walk_of(self, skeleton: Skeleton) -> Walk:
        # the original's outputs are held to the end, so that the two share what may be held in memory
        store = ActivationStore(parse_bytes(self.settings.activation_memory) // 2, device=skeleton.device)
        return Walk(skeleton, self.blocks.ids, self.settings.batch_size, store)
