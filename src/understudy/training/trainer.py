"""transformers' Trainer, told what recovery minimises, in which order it reads, and to save only what trains.

One process or several with the same batch take the same steps: each step sees the same sequences, and losses are
divided by the number of predicted tokens of the whole step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

from understudy.errors import NumericError, OutputError, reason
from understudy.training import checkpoints, sharded
from understudy.training.fading import Fade, set_beta
from understudy.training.lessons import NOT_LEARNT
from understudy.training.losses import distillation_loss, lm_loss


class Order(Sampler[int]):
    """Which sequence comes when: all of them shuffled, then again in another order, for as long as the run takes."""

    def __init__(self, sequences: int, length: int, seed: int) -> None:
        self.sequences, self.length, self.seed = sequences, length, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.length
        while left > 0:
            once = torch.randperm(self.sequences, generator=generator)[:left].tolist()
            left -= len(once)
            yield from once


class RecoveryTrainer(Trainer):
    """The Trainer of recovery; `teacher` answers batches with logits where the loss distils."""

    loss_is_scaled_for_ga = True  # by the tokens of all that a step accumulates

    def __init__(
        self, model: Any, args: TrainingArguments, data: Dataset, batch: int, loss: str, temperature: float,
        teacher: Any, fade: Fade | None, before: float, progress: Any,
    ) -> None:  # fmt: skip
        self.batch, self.loss, self.temperature, self.teacher, self.fade = batch, loss, temperature, teacher, fade
        super().__init__(model=model, args=args, train_dataset=data, data_collator=default_collate)
        self.model_accepts_loss_kwargs = True  # in older versions, what loss_is_scaled_for_ga says
        for callback in list(self.callback_handler.callbacks):
            if "Printer" in type(callback).__name__ or "Progress" in type(callback).__name__:
                self.remove_callback(callback)
        self.add_callback(_Watch(self, progress))
        self.start, self.before, self.step_start = time.perf_counter(), before, 0.0
        self.step_loss = torch.zeros((), device=args.device)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, those before it was resumed included."""
        return self.before + time.perf_counter() - self.start

    def losses(self, model: nn.Module, batch: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the sum over predicted tokens of each of the losses named: lm, kd."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
        found = {}
        if "lm" in names:
            found["lm"] = lm_loss(logits, batch["labels"])
        if "kd" in names:
            answers = self.teacher.logits(batch).to(logits.device)
            found["kd"] = distillation_loss(logits, answers, batch["labels"], self.temperature)
        return found

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return what this micro-batch adds to the mean loss of the step, times the processes, which average."""
        assert not return_outputs and num_items_in_batch is not None
        sums = self.losses(model, inputs, tuple(self.loss.split("+")))
        return sum(sums.values()) / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Remember the loss, to stop where it is no number."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Predicted tokens of a step over all processes; position 0 of a sequence is predicted by nothing."""
        count = sum(batch["labels"][:, 1:].ne(NOT_LEARNT).sum() for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count).to(device), "sum")

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return Order(len(self.train_dataset), self.args.max_steps * self.batch, self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step: its share of the originals, and how long it took."""
        if "loss" in logs:
            beta = self.fade.beta(self.state.global_step - 1) if self.fade else 0.0
            logs = logs | {"beta": beta, "seconds": time.perf_counter() - self.step_start}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: nobody asks, and counting takes time."""
        return 0

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains; the rest is on disk as it came."""
        tensors = sharded.trained(self.model)
        if self.args.should_save:
            checkpoints.save_trained(tensors, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the weights were read before the model was wrapped."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer  # Trainer's own would write the whole model, too

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(checkpoint, {"step": self.state.global_step, "seconds": self.seconds})
                checkpoints.tidy(folder)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{checkpoint}: cannot be written ({reason(error)})") from None
        except RuntimeError as error:
            if "inline_container" not in str(error):  # what torch.save says where it cannot write
                raise
            raise OutputError(f"{checkpoint}: cannot be written (is the disk full?)") from None

    @torch.no_grad()
    def measure(self, data: Any) -> dict[str, float]:
        """Return the mean losses over held-out sequences, and the perplexity; all processes are to call this."""
        model, size = self.model.eval(), self.args.per_device_train_batch_size
        names = ("lm", "kd") if "kd" in self.loss else ("lm",)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        totals = torch.zeros(len(names) + 1, dtype=torch.float64, device=self.args.device)
        for first in range(0, len(data), size * world):
            rows = range(min(first + rank * size, len(data)), min(first + (rank + 1) * size, len(data)))
            batch = self._prepare_inputs(default_collate([data[i] for i in rows or range(1)]))
            if not rows:  # the others are at work, and with sharded weights they need this process, too
                batch["labels"] = torch.full_like(batch["labels"], NOT_LEARNT)
            sums = self.losses(model, batch, names)
            count = batch["labels"][:, 1:].ne(NOT_LEARNT).sum()
            totals += torch.stack([*(sums[name].double() for name in names), count.double()])
        *sums_n, count_all = self.accelerator.reduce(totals, "sum").tolist()
        means = {name: total / max(count_all, 1) for name, total in zip(names, sums_n)}
        found = {"loss": means["lm"], "perplexity": math.exp(min(means["lm"], 700.0))}
        return found | ({"kd": means["kd"]} if "kd" in means else {})


class _Watch(TrainerCallback):
    """Fades the originals out, stops at numbers that are none, and reports progress."""

    def __init__(self, trainer: RecoveryTrainer, progress: Any) -> None:
        self.trainer, self.progress = trainer, progress

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.step_start = time.perf_counter()
        trainer.step_loss = torch.zeros_like(trainer.step_loss)
        if trainer.fade and set_beta(trainer.model, trainer.fade.beta(state.global_step)) and trainer.is_fsdp_enabled:
            sharded.forget_dropped(trainer.model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        norms: list[Tensor] = []
        if args.mixed_precision != "fp16":  # there, infinite gradients are skipped, and the scale is lowered
            gradients = [sharded.local(p.grad.detach()) for p in trainer.model.parameters() if p.grad is not None]
            norms = list(torch._foreach_norm(gradients)) if gradients else []
        loss = trainer.step_loss.float()
        bad = sum((~torch.isfinite(norm)).to(loss) for norm in norms)
        # of all processes, which stop together
        loss_sum, bad_sum = trainer.accelerator.reduce(
            torch.stack([loss, torch.as_tensor(bad).to(loss)]), "sum"
        ).tolist()
        if bad_sum or not math.isfinite(loss_sum):
            self._stop(args, state, loss_sum)

    def _stop(self, args: Any, state: Any, loss: float) -> None:
        last = checkpoints.newest(Path(args.output_dir))
        where = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        raise NumericError(
            f"{what} at step {state.global_step + 1} of {args.max_steps}; {where}; "
            f"try a lower --lr than {args.learning_rate:g}, or a --warmup"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, args.max_steps)
