"""Every setting of a run, each with its one default; stages and command line read them from here."""

from __future__ import annotations

import os
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from understudy.errors import UnderstudyError

Scope = Literal["layer", "model", "mass"]
Start = Literal["zero", "residual"]  # of low-rank parts on a base
Extra = Literal["sets", "subsets", "dense", "candidates", "channels", "grams", "gradients", "modulation", "low_rank"]
_SPEC = (
    "text: a file, .jsonl[.xz|.gz|.zst][:field], folder or hf:name[config]:split:field, with =WEIGHT if wanted; "
    "repeat it for several"
)
_DATA = f"{_SPEC}; default: the bundled text"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Text(_Settings):
    """Which text, and how much of it."""

    data: tuple[str, ...] = Field((), description=_DATA)
    samples: int = Field(128, gt=0, description="blocks to draw")
    seq_len: int = Field(512, gt=1, description="tokens in a block")
    seed: int = Field(0, ge=0, description="seed of the draw")


class _Running(_Settings):
    """How a model is run."""

    dtype: str = Field("auto", description="dtype to compute in; auto = the checkpoint's own")
    device: str = Field("auto", description="device to compute on; auto = an accelerator if there is one")
    batch_size: int = Field(4, gt=0, description="blocks that run together")
    activation_memory: str = Field("4GB", description="past this size, activations go to files that are memory-mapped")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the checkpoint")


class _Reading(_Running, _Text):  # the text comes first among the flags
    """What every stage that runs text through a model is told."""


class Calibration(_Reading):
    """Settings of `calibrate`."""

    experts: str = Field("auto", description="transformers' experts implementation; auto = its own default")
    collect: tuple[Extra, ...] = Field(
        (),
        description="sums that cost more, commas between them: sets, subsets, dense, candidates, channels, grams, "
        "gradients, modulation, low_rank",
    )
    gradient_samples: int | None = Field(
        None,
        gt=0,
        description="gradients: blocks that are also walked back through, evenly spread; default: all, or with "
        "`compress` the share that the method asks for",
    )
    dense_tokens: int = Field(
        2048, gt=1, description="tokens sent through every expert, with --collect dense or candidates"
    )
    main_k: int | None = Field(
        None, gt=0, description="modulation: experts that run for a token; default: half of those it chooses"
    )
    vectors: int = Field(
        1, description="modulation: vectors of an expert, 1 on the hidden state or 3 on its projections"
    )
    renormalise: bool = Field(False, description="modulation: scale the gates of those that run up to the sum of all")
    fit_tokens: int = Field(8192, gt=1, description="modulation: tokens of each layer that vectors are fitted on")
    sequential: str | None = Field(
        None, description="method by which each layer is replaced before the next is calibrated: ream, camera"
    )
    sequential_ratio: float | None = Field(None, description="the ratio of --sequential")
    base: str | None = Field(None, description="the checkpoint that this one was trained from, for router_norm_change")
    weights_only: bool = Field(False, description="read no text; for methods that need only the weights, like aimer")

    @field_validator("collect", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _by_commas(value)


class Selection(_Settings):
    """Settings of `plan`."""

    method: str = Field("mone", description="how experts are scored, and what the losers become")
    ratio: float | None = Field(None, description="share of the routed experts to replace, 0 to 1")
    size: str | None = Field(None, description="bytes that the written weights may take: 4.8GB, 4.5GiB")
    model_ratio: float | None = Field(None, description="share of the whole model's parameters to remove, 0 to 1")
    scope: Scope | None = Field(
        None, description="rank in each layer, over the whole model, or by mass (LightMoE); default: the method's own"
    )
    alpha: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="by mass: how much less goes where router logits are large; default: the method's own",
    )
    keep_layers: str | None = Field(None, description="layers to leave as they are, like 0,3,12-15")
    keep_super: bool = Field(False, description="never replace super experts, whose outputs reach extremes")
    width_classes: int | None = Field(
        None, ge=0, description="slim: different widths in a layer at most, 0 = any number; default: the method's own"
    )
    refit: bool = Field(
        False, description="slim: the down columns that stay take over what they can of the others, with a constant"
    )
    bases: int = Field(3, gt=0, description="lightmoe: groups of replaced experts in a layer, each with one base")
    rank: int = Field(16, gt=0, description="lightmoe: rank of what each replaced expert adds to its base")
    start: Start = Field(
        "zero", description="lightmoe: what is added to a base starts as nothing, or as the best of what the base lacks"
    )
    grouping: Literal["dominants", "kmeans"] = Field(
        "dominants", description="lightmoe: by likeness to the strongest of the replaced experts, or by clustering"
    )
    keep_experts: int = Field(
        6, ge=0, description="cd_moe: experts that a condensed layer keeps, at most all; 0 = shared experts only"
    )
    layers: int | None = Field(None, gt=0, description="cd_moe: layers to condense, in place of --ratio")
    weights: Literal["mean", "fitted"] = Field(
        "mean", description="cd_moe: weigh what is kept by its mean gate over tokens that chose it, or by least squares"
    )
    beam: int = Field(1, gt=0, description="cd_moe: choices that are held from one step to the next")
    main_k: int | None = Field(
        None,
        gt=0,
        description="of the experts that a token chooses, how many run; compressed_experts: half by default",
    )
    vectors: int = Field(
        1, description="with --main-k: vectors of an expert, 1 on the hidden state or 3 on its projections"
    )
    renormalise: bool = Field(
        False, description="with --main-k: scale the gates of those that run up to the sum of all"
    )
    fit: bool = Field(
        False, description="compressed_experts: start from vectors fitted on the calibration text, not from ones"
    )
    plain: bool = Field(
        False, description="compressed_experts: no vectors, an ordinary checkpoint that asks for fewer experts"
    )
    kind: str | None = Field(None, description="what the losers become; the default is the method's own")
    gate: Literal["all-tokens", "routed"] = Field("all-tokens", description="mone: mean gate over all or routed tokens")
    seed: int = Field(0, ge=0, description="seed of what is drawn: random scores, low-rank parts")


class Search(_Reading):
    """Settings of `search`."""

    samples: int = Field(32, gt=0, description="blocks to draw")
    generations: int = Field(10, gt=0, description="rounds after the first")
    population: int = Field(16, gt=1, description="candidates in a round")
    criterion: Literal["js", "l2", "kl"] = Field(
        "js",
        description="cd_moe: distance of hidden states, as divergence of their softmax or relative; "
        "kl = of what the model predicts, with experts chosen by l2",
    )
    dense_tokens: int = Field(2048, gt=1, description="cd_moe: tokens sent through every expert")


class Evaluation(_Reading):
    """Settings of `eval`."""

    data: tuple[str, ...] = Field((), description=f"held-out {_DATA}")
    samples: int = Field(64, gt=0, description="blocks to draw")
    examples: int = Field(3, ge=0, description="with --against: blocks that differ most, to show as generated text")
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks, commas between them")
    include_path: str | None = Field(None, description="folder with task files of your own")
    limit: int | None = Field(None, gt=0, description="items of each task, for a quick look")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each task item; the task's own by default")


class Recovery(_Settings):
    """Settings of `recover`."""

    train: tuple[str, ...] = Field((), description=f"training {_SPEC}")
    steps: int = Field(2000, gt=0, description="optimiser steps; with --loss layers those of each layer")
    lr: float = Field(1e-4, gt=0, description="learning rate at its highest")
    batch: int = Field(32, gt=0, description="sequences in a step, over all processes")
    micro_batch: int | None = Field(None, gt=0, description="sequences that run together; default: a step's at once")
    seq_len: int = Field(1024, gt=1, description="tokens in a sequence")
    seed: int = Field(0, ge=0, description="seed of the order of the text, and of low-rank parts")
    end_ratio: tuple[float, ...] = Field(
        (), description="share of the steps over which the originals fade out, 0 = never there; several: the best stays"
    )
    schedule: Literal["linear", "exp"] = Field("linear", description="how the originals fade out")
    loss: Literal["lm", "kd", "lm+kd", "layers", "repair"] = Field(
        "lm",
        description="next token, distillation from the teacher, both; or one layer in memory at a time, each toward "
        "what the teacher's puts out: layers trains it, repair solves for what its output is linear in",
    )
    rounds: int = Field(16, gt=0, description="with --loss repair: passes over the text in each layer")
    sequences: int | None = Field(
        None, gt=1, description="sequences of the text to use at most; default: those the steps take, 512 for repair"
    )
    train_what: str | None = Field(
        None,
        description="stand-ins|stand-ins+lora|lora|vectors|vectors+lora|experts|router|answers|all; the default is the "
        "method's own",
    )
    rank: int | None = Field(
        None, gt=0, description="of low-rank parts on kept experts; default: that of the stand-ins, or 16"
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="how the rate falls")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps over which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    temperature: float = Field(1.0, gt=0, description="of distillation")
    held_out: float = Field(0.05, gt=0, lt=1, description="share of the training text to measure on, never trained on")
    dtype: str = Field("float32", description="dtype of the weights in training; auto = the checkpoint's own")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision on top of that")
    gradient_checkpointing: bool = Field(False, description="less memory for more time")
    save_every: int | None = Field(None, gt=0, description="steps between checkpoints; default: a tenth of the steps")
    device: str = Field("auto", description="device to compute on; auto = an accelerator if there is one")
    trust_remote_code: bool = Field(False, description="run modelling code that comes with the checkpoint")

    @field_validator("end_ratio", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _by_commas(value)


class Comparison(_Running):
    """Settings of `compare`."""

    methods: tuple[str, ...] = Field(
        (), description="methods to compare; a kind or settings may follow: reap:constant, heapr:width_classes=4"
    )
    ratios: tuple[float, ...] = Field(
        (0.25, 0.5, 0.75), description="shares of the bytes in routed experts that every method is to save"
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), description="one calibration each, on another draw of blocks")
    data: tuple[str, ...] = Field((), description=f"calibration {_DATA}")
    samples: int = Field(128, gt=0, description="blocks to calibrate on")
    seq_len: int = Field(512, gt=1, description="tokens in a block of these")
    test: tuple[str, ...] = Field((), description="held-out text, likewise")
    test_samples: int = Field(64, gt=0, description="blocks of held-out text")
    test_seq_len: int = Field(512, gt=1, description="tokens in a block of these")
    gradient_samples: int | None = Field(
        None,
        gt=0,
        description="gradients: blocks that are also walked back through, evenly spread; default: all, or with "
        "`compress` the share that the method asks for",
    )
    dense_tokens: int = Field(2048, gt=1, description="tokens sent through every expert, for methods that need it")
    base: str | None = Field(None, description="the checkpoint that this one was trained from, for router_norm_change")
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks, commas between them; models are written for them")
    include_path: str | None = Field(None, description="folder with task files of your own")
    limit: int | None = Field(None, gt=0, description="items of each task, for a quick look")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each task item; the task's own by default")
    examples: int = Field(2, ge=0, description="blocks that differ most, to show as generated text; first seed only")
    no_speed: bool = Field(False, description="leave out memory and tokens a second; else with the first seed")

    @field_validator("methods", "ratios", "seeds", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _by_commas(value)


def _by_commas(value: Any) -> Any:
    items = (value,) if isinstance(value, str | int | float) else value
    parts = [list(filter(None, item.split(","))) if isinstance(item, str) else [item] for item in items]
    return tuple(part for several in parts for part in several)


def repairing(text: Calibration | Comparison, seed: int, rounds: int) -> Recovery:
    """Return the settings that repair a model on the text that it was calibrated on.

    At least four blocks are held out, as one alone tells of one kind of text, but no more than a quarter.
    """
    held_out = min(max(4 / text.samples, Recovery.model_fields["held_out"].default), 0.25)
    same = {name: getattr(text, name) for name in ("seq_len", "device", "trust_remote_code")}
    return Recovery(loss="repair", rounds=rounds, batch=text.batch_size, seed=seed, held_out=held_out, **same)


T = TypeVar("T", bound=_Settings)


def settings_from(cls: type[T], settings: T | None, options: dict[str, Any]) -> T:
    """Build settings from an object or from named options, not both.

    Raises:
        UnderstudyError: an unknown option or a value out of range.
    """
    if settings is not None:
        if options:
            raise UnderstudyError(f"give either settings or {', '.join(sorted(options))}, not both")
        return settings
    options = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    for name in {"data", "tasks", "test", "train"} & options.keys():
        if isinstance(options[name], str):
            options[name] = (options[name],)
    try:
        return cls(**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise UnderstudyError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from None
