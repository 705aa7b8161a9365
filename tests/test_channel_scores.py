"""Scores of channels against METHODS read literally, token by token, and the contract of every one."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from routes import draw_routes, filled, stats_of
from understudy.channel_scores import ChannelScore, all_channel_scores, get_channel_score, score_channels
from understudy.errors import NumericError, PlanError, StatsError
from understudy.recipe import Selection
from understudy.stats import ExpertStats, Stats

E, WIDTH, H = 5, 6, 4
SILENT = 3
SETTINGS = Selection(ratio=0.5)


@dataclass(frozen=True)
class Expert:
    """What one expert did on its n tokens."""

    h: np.ndarray  # [n, WIDTH] activations
    up: np.ndarray  # [n, WIDTH] and what they are made of
    gate: np.ndarray  # [n, WIDTH]
    d: np.ndarray  # [n, WIDTH] gradient of the loss
    g: np.ndarray  # [n] weight of the router
    down: np.ndarray  # [H, WIDTH]


def draw(seed: int = 0) -> list[Expert]:
    """Draw the experts of a layer; one of them sees no token."""
    rng = np.random.default_rng(seed)
    experts = []
    for e in range(E):
        n = 0 if e == SILENT else 3 + 2 * e
        up, gate, d = rng.normal(size=(3, n, WIDTH)) * (1 + rng.random(WIDTH))
        experts.append(Expert(np.tanh(gate) * up, up, gate, d, rng.random(n), rng.normal(size=(H, WIDTH))))
    return experts


def sums_of(experts: list[Expert]) -> dict[str, np.ndarray]:
    """Return the sums of the layer, expert by expert."""

    def each(term: Callable[[Expert], np.ndarray]) -> np.ndarray:
        return np.stack([term(x) for x in experts])

    def projection(x: Expert) -> np.ndarray:
        y = x.h @ x.down.T
        return ((y @ x.down) * x.h / np.linalg.norm(y, axis=1, keepdims=True)).sum(0)

    return {
        "count": np.array([float(len(x.h)) for x in experts]),
        "activation_sum": each(lambda x: x.h.sum(0)),
        "activation_sq_sum": each(lambda x: (x.h**2).sum(0)),
        "gated_activation_sq_sum": each(lambda x: ((x.g[:, None] * x.h) ** 2).sum(0)),
        "gated_activation_sq_max": each(lambda x: ((x.g[:, None] * x.h) ** 2).max(0, initial=0)),
        "projection_sum": each(projection),
        "up_sq_sum": each(lambda x: (x.up**2).sum(0)),
        "preactivation_sq_sum": each(lambda x: (x.gate**2).sum(0)),
        "down_sq_norm": each(lambda x: (x.down**2).sum(0)),
        "gradient_count": np.array([float(len(x.d)) for x in experts]),
        "gradient_sq_sum": each(lambda x: (x.d**2).sum(0)),
        "effect_sq_sum": each(lambda x: ((x.h * x.d) ** 2).sum(0)),
        "gate_sq_sum": np.array([(x.g**2).sum() for x in experts]),
        "gated_activation_sum": each(lambda x: (x.g[:, None] ** 2 * x.h).sum(0)),
        "activation_gram": each(lambda x: (x.g[:, None] ** 2 * x.h).T @ x.h),
        "down_gram": each(lambda x: x.down.T @ x.down),
        "gradient_down_gram": each(lambda x: x.down.T @ np.diag(range(1, H + 1)) @ x.down),
    }


def stats(seed: int = 0) -> Stats:
    """Statistics of one layer that the experts were drawn for."""
    made = filled(stats_of({"0": draw_routes(experts=E, hidden=H)}, width=WIDTH, channel_bytes=60), seed)
    return replace(made, layers={"0": replace(made.layers["0"], **sums_of(draw(seed)))})


# --- one channel of one expert, read from METHODS 10; `layer` for those that look at the whole of it ---


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def slow_heapr(x: Expert, k: int, layer: list[Expert]) -> float:
    """Mean square of the activation times w^T G w, G the mean outer product of gradients u with w^T u = d."""
    if not len(x.h):
        return -1.0
    return mean([h**2 for h in x.h[:, k]]) * mean([d**2 for d in x.d[:, k]])


def slow_heapr_freq(x: Expert, k: int, layer: list[Expert]) -> float:
    return slow_heapr(x, k, layer) * len(x.h)


def slow_heapr_joint(x: Expert, k: int, layer: list[Expert]) -> float:
    return mean([(h * d) ** 2 for h, d in zip(x.h[:, k], x.d[:, k], strict=True)]) if len(x.h) else -1.0


def slow_camera(x: Expert, k: int, layer: list[Expert]) -> float:
    phi = [(g * h) ** 2 for g, h in zip(x.g, x.h[:, k], strict=True)]
    return sum(w**2 for w in x.down[:, k]) * (0.1 * sum(phi) + 0.9 * max(phi, default=0.0))


def slow_moe_slimming(x: Expert, k: int, layer: list[Expert]) -> float:
    def raw(x: Expert, k: int) -> float:
        return sum(math.sqrt(sum(v**2 for v in part[:, k])) for part in (x.h, x.up, x.gate)) / 3

    return raw(x, k) / mean([raw(other, j) for other in layer for j in range(WIDTH)])


def slow_flap(x: Expert, k: int, layer: list[Expert]) -> float:
    def raw(x: Expert, k: int) -> float:
        middle = mean(list(x.h[:, k]))
        return mean([(h - middle) ** 2 for h in x.h[:, k]]) * sum(w**2 for w in x.down[:, k])

    values = [raw(other, j) for other in layer for j in range(WIDTH)]
    spread = math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))
    return (raw(x, k) - mean(values)) / spread


def slow_tenp(x: Expert, k: int, layer: list[Expert]) -> float:
    found = []
    for h in x.h:
        y = x.down @ h
        found.append(float(h[k] * x.down[:, k] @ y) / math.sqrt(float(y @ y)))
    return mean(found)


REFERENCES = {
    "heapr": slow_heapr,
    "heapr_freq": slow_heapr_freq,
    "heapr_joint": slow_heapr_joint,
    "camera": slow_camera,
    "moe_slimming": slow_moe_slimming,
    "flap": slow_flap,
    "tenp": slow_tenp,
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_slow_reference(name: str, seed: int) -> None:
    made = stats(seed)
    got = score_channels(get_channel_score(name), made, made.model.layers, SETTINGS)["0"]
    layer = draw(seed)
    want = [[REFERENCES[name](x, k, layer) for k in range(WIDTH)] for x in layer]
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("score", all_channel_scores().values(), ids=lambda s: s.name)
class TestEveryChannelScore:
    """The contract of a channel score; a new file comes in by itself."""

    def test_says_where_it_comes_from_and_what_it_reads(self, score: ChannelScore) -> None:
        assert len(score.source) > 10
        assert set(score.needs) <= {f.name for f in fields(ExpertStats)}
        assert re.fullmatch(r"[a-z][a-z0-9_]*", score.name)

    def test_reads_no_more_than_it_says(self, score: ChannelScore) -> None:
        made = stats()
        blank = {f.name: None for f in fields(ExpertStats) if f.name not in score.needs}
        bare = replace(made, layers={"0": replace(made.layers["0"], **blank)})
        compute = (score_channels(score, x, x.model.layers, SETTINGS)["0"] for x in (bare, made))
        np.testing.assert_array_equal(*compute)

    def test_follows_experts_and_channels_that_change_places(self, score: ChannelScore) -> None:
        made = stats(3)
        experts, channels = np.random.default_rng(0).permutation(E), np.random.default_rng(1).permutation(WIDTH)
        moved = {}
        for name, value in made.layers["0"].arrays().items():
            value = value[experts] if value.shape[:1] == (E,) else value
            value = value[:, channels] if value.shape[1:2] == (WIDTH,) else value
            moved[name] = value[:, :, channels] if value.shape == (E, WIDTH, WIDTH) else value
        other = replace(made, layers={"0": ExpertStats(**moved)})
        before, after = (score_channels(score, x, x.model.layers, SETTINGS)["0"] for x in (made, other))
        assert len(np.unique(before)) > E
        np.testing.assert_allclose(after, before[experts][:, channels], rtol=1e-12)

    def test_says_how_to_collect_what_is_missing(self, score: ChannelScore) -> None:
        bare = stats_of({"0": draw_routes(experts=E, hidden=H)}, width=WIDTH)
        with pytest.raises(StatsError, match=rf"channel score {score.name} needs .*; calibrate with --collect "):
            score_channels(score, bare, bare.model.layers, SETTINGS)

    def test_refuses_what_is_not_finite(self, score: ChannelScore) -> None:
        made = stats()
        broken = {}
        for name in score.needs:
            if (value := getattr(made.layers["0"], name)).ndim > 1:
                broken[name] = value.copy()
                broken[name][2, 1] = np.inf
        made = replace(made, layers={"0": replace(made.layers["0"], **broken)})
        with np.errstate(invalid="ignore"), pytest.raises(NumericError, match=r"layer 0: the \w+ score of neuron"):
            score_channels(score, made, made.model.layers, SETTINGS)

    def test_takes_a_layer_in_which_nothing_happened(self, score: ChannelScore) -> None:
        made = stats()
        nothing = {name: np.zeros_like(value) for name, value in made.layers["0"].arrays().items()}
        made = replace(made, layers={"0": ExpertStats(**nothing)})
        assert np.isfinite(score_channels(score, made, made.model.layers, SETTINGS)["0"]).all()


def test_refuses_statistics_of_other_sizes() -> None:
    made = stats()
    layer = made.model.layers["0"].model_copy(update={"width": WIDTH + 1})
    with pytest.raises(StatsError, match=r"layer 0: statistics of \(5, 6\) .* the model has \(5, 7\)"):
        score_channels(get_channel_score("heapr"), made, {"0": layer}, SETTINGS)


def test_an_unknown_score_is_one_clear_line() -> None:
    with pytest.raises(PlanError, match=r"no channel score is named 'heaper' \(did you mean 'heapr'\?\)"):
        get_channel_score("heaper")


def test_scoring_needs_no_torch() -> None:
    code = "import sys\nfrom understudy.channel_scores import all_channel_scores\nall_channel_scores()\n"
    code += "import understudy.selection\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
