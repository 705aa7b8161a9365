"""What every family must do: slow, obvious references, and the checks that the contract tests run on tiny models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import modeling_utils

import zoo
from understudy.activations import ActivationStore
from understudy.collection import collect
from understudy.data import Blocks
from understudy.entries import Entry
from understudy.facts import LayerFacts
from understudy.kinds import Kind, all_kinds, get_kind
from understudy.layout import model_facts
from understudy.moe import expert_count_keys, expert_dim, find_moe_layers, text_config
from understudy.plans import Plan, PlanModel
from understudy.recipe import Calibration
from understudy.skeleton import Skeleton
from understudy.stats import EXTRA, ExpertStats, Stats
from understudy.sums import groups_for
from understudy.walk import Walk


def tiny_folder(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny random model of a family in several shards."""
    zoo.tiny_model(model_type).to(dtype).save_pretrained(folder, max_shard_size="100KB")
    return folder


def load(folder: Path, model_type: str, **options: Any) -> Any:
    """Load a folder as people do."""
    return zoo.model_class(model_type).from_pretrained(folder, **options).eval()


def ids_of(rows: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Ordinary token ids `[rows, length]`, clear of the special tokens of the tiny configs."""
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def calibrated(folder: Path, work: Path, ids: torch.Tensor, batch_size: int = 2, extra: Sequence[str] = ()) -> Stats:
    """Statistics of a folder by streaming; `extra` groups as in `--collect`."""
    skeleton = Skeleton(folder)
    facts = model_facts(skeleton, folder.name)
    blocks = Blocks(ids.numpy().astype(np.int32), np.zeros(len(ids), np.int16), ("test",), (), "0" * 64)
    layers, probes = collect(skeleton, facts, blocks, Calibration(batch_size=batch_size, collect=tuple(extra)), work)
    return Stats(facts, {}, layers, probes)


def hooked_stats(model: Any, names: dict[str, str], ids: torch.Tensor, num_experts: dict[str, int]) -> dict[str, Any]:
    """Statistics by hooks on the whole model and loops over routes: the reference for streaming."""
    seen: dict[str, list[Any]] = {key: [] for key in names}
    handles = []
    for key, name in names.items():
        keep = seen[key].append
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, kwargs, keep=keep: keep(_triple(args, kwargs)), with_kwargs=True
            )
        )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {k: brute_force(model.get_submodule(names[k]), calls, num_experts[k]) for k, calls in seen.items()}


def _triple(args: Any, kwargs: Any) -> Any:
    order = ("hidden_states", "top_k_index", "top_k_weights")
    values = list(args) + [kwargs[name] for name in order[len(args) :] if name in kwargs]
    values += [v for k, v in kwargs.items() if k not in order]
    return [v.clone() for v in values[:3]]


@torch.no_grad()
def one_expert(experts: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    """Output of one expert for one token, `[H]`, before its gate."""
    return experts(x[None], torch.tensor([[expert]]), torch.ones(1, 1, dtype=x.dtype))[0]


def brute_force(experts: Any, calls: list[Any], num_experts: int) -> ExpertStats:
    """Two passes over explicit lists, in float64."""
    tokens = sum(len(h) for h, _, _ in calls)
    outputs: list[list[np.ndarray]] = [[] for _ in range(num_experts)]
    gates: list[list[float]] = [[] for _ in range(num_experts)]
    for hidden, index, weights in calls:
        for x, chosen, gate in zip(hidden, index, weights, strict=True):
            for e, g in zip(chosen.tolist(), gate.tolist(), strict=True):
                if g == 0:  # a place that the router filled without choosing
                    continue
                outputs[e].append(one_expert(experts, x, e).double().numpy())
                gates[e].append(g)
    size = calls[0][0].shape[1]
    zero = np.zeros(size)
    y = [np.array(o).reshape(-1, size) for o in outputs]
    g = [np.array(w) for w in gates]
    mean = [a.mean(0) if len(a) else zero for a in y]
    weighted = [(w[:, None] ** 2 * a).sum(0) / (w**2).sum() if len(a) and (w**2).sum() else zero for a, w in zip(y, g)]
    norm = [np.linalg.norm(a, axis=1) for a in y]
    return ExpertStats(
        tokens=float(tokens),
        count=np.array([len(a) for a in y], float),
        gate_sum=np.array([w.sum() for w in g]),
        gate_sq_sum=np.array([(w**2).sum() for w in g]),
        norm_sum=np.array([n.sum() for n in norm]),
        gated_norm_sum=np.array([(w * n).sum() for w, n in zip(g, norm)]),
        mean=np.array(mean),
        scatter=np.array([((a - m) ** 2).sum() for a, m in zip(y, mean)]),
        weighted_mean=np.array(weighted),
        weighted_scatter=np.array([(w**2 * ((a - m) ** 2).sum(1)).sum() for a, w, m in zip(y, g, weighted)]),
    )


def uneven_plan(stats: Stats, kind: str = "constant") -> Plan:
    """Replace half of the experts, one more here and one fewer there, at random."""
    rng = np.random.default_rng(0)
    layers = {}
    for position, (key, facts) in enumerate(stats.model.layers.items()):
        count = facts.experts // 2 + (position % 3) - 1
        layers[key] = {kind: sorted(rng.choice(facts.experts, count, replace=False).tolist())}
    return plan_of(stats, layers)


def plan_of(stats: Stats, layers: dict[str, dict[str, Any]]) -> Plan:
    """A plan with these layers for the model of these statistics; ranks fit the smallest of the zoo."""
    fit = {"shared_base": {"rank": 4}, "modulate": {"main_k": 1}}
    how = {kind: settings for kind, settings in fit.items() if any(kind in kinds for kinds in layers.values())}
    return Plan(method="edited", model=PlanModel.of(stats.model), how=how, layers=layers)


def collected_for_kinds() -> list[str]:
    """Groups of sums that the kinds need beyond those that are always there."""
    needs = {name for kind in all_kinds().values() for name in kind.needs}
    return [group for group in groups_for(needs) if group in EXTRA]


def random_plan(kind: Kind, stats: Stats, seed: int = 0) -> Plan:
    """A plan that replaces experts at random by one kind, differently in every layer where the kind allows it."""
    rng = np.random.default_rng(seed)
    facts = stats.model.layers
    if kind.renumbers:
        return plan_of(stats, {key: {kind.name: _evenly(layer, rng)} for key, layer in facts.items()})
    if kind.overlays:  # all layers, the first beside something else
        layers: dict[str, dict[str, Any]] = {key: {kind.name: "all"} for key in facts}
        first = next(iter(facts))
        layers[first]["constant"] = rng.permutation(facts[first].experts)[: facts[first].experts // 3].tolist()
        return plan_of(stats, layers)
    if not kind.losers and kind.form == "ids":  # whole layers
        key, layer = list(facts.items())[len(facts) // 2]
        return plan_of(stats, {key: {kind.name: list(range(layer.experts))}})
    if not kind.whole_numbers:
        return plan_of(stats, _condensed(kind, facts, rng))
    entries = {key: _random_entry(kind, layer, n, rng) for n, (key, layer) in enumerate(facts.items())}
    return plan_of(stats, {key: {kind.name: entry} for key, entry in entries.items()})


def _evenly(layer: LayerFacts, rng: np.random.Generator) -> list[int]:
    groups = np.arange(layer.experts).reshape(layer.groups, -1)
    return sorted(e for group in groups for e in rng.permutation(group)[: len(group) // 2].tolist())


def _condensed(kind: Kind, facts: dict[str, LayerFacts], rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """The first layer with a few experts, the second with none, where one is left then."""
    first, second, *others = [*facts, None]
    few = rng.permutation(facts[first].experts).tolist()
    numbers: dict[Any, float] = dict(zip(few, (0.5, -0.2, 1.0)))
    found = {first: {kind.name: {**numbers, "rest": 0}}}
    return found | ({second: {kind.name: {"rest": 0}}} if others[:-1] else {})


def _random_entry(kind: Kind, layer: LayerFacts, position: int, rng: np.random.Generator) -> Entry:
    order = rng.permutation(layer.experts).tolist()
    count = layer.experts // 2 + (position % 3) - 1
    if kind.form == "ids":
        return tuple(order[:count])
    if kind.form == "groups":
        return (tuple(order[:2]), tuple(order[2 : 2 + count]))[: 1 + position % 2]
    if kind.counts == "ranks":
        return {e: 1 + n % 3 for n, e in enumerate(order[:count])}
    some = order if position % 3 == 1 else order[:count]  # in one of three layers no expert keeps its width
    return {e: (layer.width or 0) * n // (2 * len(some)) for n, e in enumerate(some)}


@torch.no_grad()
def walked(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model by streaming."""
    walk = Walk(skeleton, ids.numpy(), batch_size=2, store=ActivationStore(1 << 30))
    with walk.ready():
        walk.through_layers()
        return torch.cat([walk.logits(number) for number in range(len(walk.batches))])


def close(got: torch.Tensor, expected: torch.Tensor, rounding: float = 0.0) -> bool:
    """Whether logits are equal to 1e-5 of the largest, or ten times what another order of sums does."""
    return float((got - expected).abs().max()) <= max(1e-5 * max(1.0, float(expected.abs().max())), 10 * rounding)


@torch.no_grad()
def rounding_of(model: Any, ids: torch.Tensor) -> float:
    """The largest difference of logits between sequences walked together and alone: some families raise it tenfold."""
    alone = torch.cat([model(input_ids=one, use_cache=False).logits for one in ids.split(1)])
    return float((model(input_ids=ids, use_cache=False).logits - alone).abs().max())


def strongest(index: torch.Tensor, gates: torch.Tensor, most: int, free: Collection[int] = ()) -> torch.Tensor:
    """Gates `[T, k]` with zeros for all but the strongest routes of each token, and those to experts that are free."""
    gates = gates.clone()
    for row, ids in zip(gates, index.tolist()):
        full = [slot for slot, e in enumerate(ids) if e not in free]
        for slot in sorted(full, key=lambda slot: -row[slot])[most:]:
            row[slot] = 0
    return gates


@contextmanager
def masked(model: Any, plan: Plan, stats: Stats) -> Any:
    """The whole original model with its experts run route by route, replaced ones as their kind says they answer."""
    replaced_modules = []
    for key, facts in stats.model.layers.items():
        experts = model.get_submodule(facts.name)
        gone = plan.replaced(key)
        own = experts.forward

        def forward(
            hidden: Any, index: Any, weights: Any, own=own, gone=gone, key=key, experts=experts, facts=facts
        ) -> Any:
            out = torch.zeros_like(hidden)
            if "modulate" in plan.layers.get(key, {}):
                weights = strongest(index, weights, plan.how["modulate"]["main_k"], gone)
            for e in range(facts.experts):
                token, slot = (index == e).nonzero(as_tuple=True)
                if not len(token):
                    continue
                if e in gone:
                    entry, how = plan.layers[key][gone[e]], plan.how.get(gone[e], {})
                    y = get_kind(gone[e]).reference(experts, hidden[token], e, entry, how, stats.layers[key])
                else:
                    y = torch.cat([own(x[None], torch.tensor([[e]]), torch.ones(1, 1)) for x in hidden[token]])
                out.index_add_(0, token, weights[token, slot, None] * y.to(hidden.dtype))
            return out

        experts.forward = forward
        replaced_modules.append(experts)
    try:
        yield model
    finally:
        for experts in replaced_modules:
            del experts.forward


@contextmanager
def condensed(model: Any, plan: Plan, stats: Stats) -> Any:
    """The whole original model with the experts of condensed layers run one by one on every token."""
    changed = {key: kinds["condense"] for key, kinds in plan.layers.items() if "condense" in kinds}
    for key, entry in changed.items():
        experts = model.get_submodule(stats.model.layers[key].name)

        def forward(hidden: Any, *routes: Any, own: Any = experts.forward, entry: Any = entry) -> Any:
            out, index = torch.zeros_like(hidden), torch.zeros(len(hidden), 1, dtype=torch.long)
            for e, w in entry.items():
                out += w * own(hidden, index + e, torch.ones(len(hidden), 1))
            return out

        experts.forward = forward
    try:
        yield model
    finally:
        for key in changed:
            del model.get_submodule(stats.model.layers[key].name).forward


@contextmanager
def without_understudy() -> Any:
    """transformers as it is where understudy was never imported."""
    hooked = modeling_utils.get_hf_quantizer
    modeling_utils.get_hf_quantizer = hooked.__wrapped__
    try:
        yield
    finally:
        modeling_utils.get_hf_quantizer = hooked


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name."""
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def with_experts(model: Any, kept: dict[str, list[int]], reworked: Callable[[str, Any], Any] | None = None) -> Any:
    """A model that has only these experts of each layer, by cutting the state dict in memory.

    `reworked` is given a layer's key and its experts, and returns them with other weights.
    """
    layers = find_moe_layers(model)
    state = dict(model.state_dict())
    for layer in layers:
        ids = torch.tensor(kept[layer.key])
        experts: Any = model.get_submodule(layer.name)
        experts = reworked(layer.key, experts) if reworked else experts
        for name, tensor in experts.named_parameters(recurse=False):
            state[f"{layer.name}.{name}"] = tensor[ids]
        for name in layer.router:
            state[name] = state[name].index_select(expert_dim(tuple(state[name].shape), layer.num_experts), ids)
    config = copy.deepcopy(model.config)
    for name in expert_count_keys(text_config(config), layers[0].num_experts):
        setattr(text_config(config), name, len(kept[layers[0].key]))
    small = type(model)(config).eval()
    small.load_state_dict(state, strict=True)
    return small
