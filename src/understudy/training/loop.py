"""A training run: on transformers' Trainer and accelerate, killed and resumed without a trace, on any processes.

`accelerate launch` decides how many processes there are and whether weights are replicated (DDP) or spread (FSDP2).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TrainingArguments

from understudy._version import __version__
from understudy.errors import OutputError, UnderstudyError, reason
from understudy.processes import Processes, join_processes
from understudy.recipe import Recovery
from understudy.runtime import pick_device, quiet_transformers
from understudy.training import checkpoints, sharded
from understudy.training.fading import Fade, set_beta
from understudy.training.lessons import Lessons
from understudy.training.teacher import Teacher
from understudy.training.trainable import masked_rows
from understudy.training.trainer import RecoveryTrainer

Progress = Callable[[int, int], None]  # steps done, steps of the run
_WITHOUT_EFFECT = {  # settings that change how a run is run, or reach it by another way, but not what comes out
    "train", "held_out", "end_ratio", "schedule", "micro_batch", "gradient_checkpointing", "save_every", "device",
    "trust_remote_code",
}  # fmt: skip
_NEW_NAME = any(field.name == "activation_checkpointing" for field in dataclasses.fields(TrainingArguments))
_CHECKPOINTING = "activation_checkpointing" if _NEW_NAME else "gradient_checkpointing"  # transformers 5.23 renamed it
_HOOKS = ("_require_grads_hook", "_require_grads_hooks")
_SAMPLE = 4096  # elements of a tensor by which it is known


@dataclass(frozen=True)
class Run:
    """What a training run was like.

    `losses` has one entry for each step, from 1: {step, loss, lr, beta, seconds}; `loss` is the mean over the predicted
    tokens of the step. `held_out` is measured at the end, without originals: {loss, perplexity} and, with distillation,
    {kd}. `layers`: where layers were trained one by one, for each {layer, before, after}, errors on held-out text; then
    `losses` tell the {layer}, too. `peak_memory_of` says whether the peak is of what torch allocated on the accelerator
    of this process, or of its resident memory since it started.
    """

    end_ratio: float
    losses: list[dict[str, float]]
    held_out: dict[str, float]
    seconds: float
    peak_memory_bytes: int
    peak_memory_of: str
    layers: list[dict[str, float]] = field(default_factory=list)


def train(
    model: Any,
    settings: Recovery,
    lessons: Lessons,
    held: Lessons,
    *,
    fade: Fade | None,
    teacher: Teacher | None = None,
    folder: Path,
    progress: Progress | None = None,
) -> Run:
    """Train what requires a gradient, in place, and measure the outcome; a run that was killed goes on where it was.

    Args:
        model: on any device; the final weights are left in it, but where FSDP2 spread it over processes only those
            that train, on the CPU. Its originals, if it has any, are gone in the end.
        settings: of the run; `end_ratio` and `schedule` are not looked at, `fade` is.
        lessons: what to train on.
        held: what to measure on.
        fade: the share of the originals at each step, or None.
        teacher: where the loss distils.
        folder: for checkpoints, in a folder of their own for each run; to be removed by the caller when all is done.
        progress: called after each step with the steps done and their number.

    Raises:
        UnderstudyError: settings that do not fit the processes or the device.
        NumericError: a loss or gradient that is not finite; says where, and the last good checkpoint.
        CheckpointError: a checkpoint of other weights.
        OutputError: a checkpoint cannot be written.
    """
    assert (teacher is None) == ("kd" not in settings.loss), "a teacher is there to distil from"
    device = _device(settings, model)
    processes = join_processes(device)
    micro, accumulate = batches(settings, processes.world)
    work = Path(folder) / _shared(_key(model, settings, lessons, fade), processes)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{work}: cannot be written ({reason(error)})") from None
    start = checkpoints.newest(work)
    if processes.minimum(0 if start is None else 1) == 0:
        start = None  # processes that do not share a disk start together
    begun = checkpoints.sealed(start) if start else None
    if start is not None and begun is not None:
        checkpoints.load_trained(model, start)
        if fade is not None:
            set_beta(model, fade.beta(begun["step"]))
    with quiet_transformers(), _for_training(model, settings.gradient_checkpointing):
        arguments = _arguments(settings, work, device, micro, accumulate)
        trainer = RecoveryTrainer(
            model, arguments, lessons, settings.batch, settings.loss, settings.temperature, teacher, fade,
            begun["seconds"] if begun else 0.0, progress,
        )  # fmt: skip
        _refuse_other_engines(trainer)
        if trainer.is_fsdp_enabled:
            sharded.send_from_first(model, trainer.accelerator.state.fsdp_plugin, processes.group)
        reset_peak(device)
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        if set_beta(trainer.model, 0.0) and trainer.is_fsdp_enabled:
            sharded.forget_dropped(trainer.model)
        held_out = trainer.measure(held)
        run = Run(fade.end_ratio if fade else 0.0, _losses(trainer), held_out, trainer.seconds, *peak_of(device))
        if trainer.is_fsdp_enabled:
            sharded.keep_trained(trainer.model)
    return run


def batches(settings: Recovery, world: int) -> tuple[int, int]:
    """Return how many sequences run together in a process, and how often that makes a step.

    Raises:
        UnderstudyError: the batch cannot be divided so.
    """
    micro = settings.micro_batch or max(1, settings.batch // world)
    if settings.batch % (micro * world):
        at_once = f"{micro} (--micro-batch) x {world} processes" if world > 1 else f"--micro-batch {micro}"
        raise UnderstudyError(f"--batch {settings.batch} cannot be divided by {at_once}; choose a multiple")
    return micro, settings.batch // (micro * world)


def _device(settings: Recovery, model: nn.Module) -> torch.device:
    device = pick_device(settings.device)
    if device.index:
        raise UnderstudyError(
            f"--device {device}: training takes the first accelerator that it sees; choose with CUDA_VISIBLE_DEVICES"
        )
    if device.type == "cpu" and settings.precision == "fp16":
        raise UnderstudyError("--precision fp16 needs an accelerator; on a CPU use bf16 or no")
    if settings.precision == "fp16" and any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        raise UnderstudyError("--precision fp16 needs weights in --dtype float32")
    return device


def _key(model: nn.Module, settings: Recovery, lessons: Lessons, fade: Fade | None) -> str:
    """Hash all that the outcome depends on, so that only the same run is ever continued."""
    chosen = settings.model_dump(exclude=_WITHOUT_EFFECT)
    facts = [__version__, chosen, lessons.digest, fade and dataclasses.asdict(fade)]
    known = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        known.update(f"{name} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        flat = tensor.detach().reshape(-1)
        known.update(flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu().numpy().tobytes())
    return known.hexdigest()[:12]


def _shared(text: str, processes: Processes) -> str:
    """Return what the first process has."""
    if processes.world == 1:
        return text
    texts = [text]
    torch.distributed.broadcast_object_list(texts, src=0, group=processes.group)
    return texts[0]


def _arguments(settings: Recovery, work: Path, device: torch.device, micro: int, accumulate: int) -> TrainingArguments:
    options: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        options = {_CHECKPOINTING: True, f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    try:
        arguments = TrainingArguments(
            output_dir=str(work),
            max_steps=settings.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulate,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.lr_schedule if settings.lr_schedule != "constant" else "constant_with_warmup",
            warmup_steps=round(settings.warmup * settings.steps),
            weight_decay=settings.weight_decay,
            optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            seed=settings.seed,
            use_cpu=device.type == "cpu",
            save_strategy="steps",
            save_steps=settings.save_every or max(1, settings.steps // 10),
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            ddp_find_unused_parameters=True,  # experts that no token of a process reaches
            report_to="none",
            disable_tqdm=True,
            **options,
        )
    except ValueError as error:
        raise UnderstudyError(" ".join(str(error).split())) from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several accelerators are for several processes
    return arguments


def _refuse_other_engines(trainer: RecoveryTrainer) -> None:
    if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        raise UnderstudyError("accelerate is set to DeepSpeed or FSDP 1; use DDP, or FSDP with --fsdp_version 2")
    if trainer.is_fsdp_enabled and masked_rows(trainer.model):
        raise UnderstudyError("FSDP would also train experts that stay as they are beside these stand-ins; use DDP")


@contextmanager
def _for_training(model: Any, checkpointing: bool) -> Iterator[None]:
    """Keep caches and router losses out of the way, and leave nothing of the training machinery on a model."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}.values()
    names = ("use_cache", "output_router_logits")
    before = [(c, name, getattr(c, name)) for c in configs for name in names if hasattr(c, name)]
    own = {name: model.__dict__[name] for name in ("forward",) if name in model.__dict__}
    for config, name, _ in before:
        setattr(config, name, False)
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)
        for name in ("forward", "_original_forward", "_is_accelerate_prepared", *_HOOKS):
            model.__dict__.pop(name, None)
        model.__dict__.update(own)
        if checkpointing:
            getattr(model, f"{_CHECKPOINTING}_disable")()
            if "_require_grads_hook" in vars(model):  # of frozen embeddings
                model.disable_input_require_grads()
        model.zero_grad()
        model.eval()


def _losses(trainer: RecoveryTrainer) -> list[dict[str, float]]:
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {"step": "step", "loss": "loss", "lr": "learning_rate", "beta": "beta", "seconds": "seconds"}
    return [{name: entry[theirs] for name, theirs in names.items()} for entry in steps]


def reset_peak(device: torch.device) -> None:
    """Forget the most that was allocated on an accelerator so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_of(device: torch.device) -> tuple[int, str]:
    """Return the most bytes that were held, and of what: on an accelerator, or resident since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(), "allocated on the accelerator"
    what = "resident in the process"
    try:
        import resource
    except ImportError:  # on Windows
        return int(psutil.Process().memory_info().peak_wset), what
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, what
