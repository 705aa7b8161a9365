"""One process of a run or several, as `accelerate launch` or `torchrun` start them, and sums over all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from understudy.stats import ExpertStats


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; every method is to be called by all of them."""

    rank: int = 0
    world: int = 1
    group: Any = None  # of CPU tensors, whatever the model runs on: the sums are float64 in memory

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier(group=self.group)

    def minimum(self, value: int) -> int:
        """Return the smallest value that a process has."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return int(tensor)

    def merged(self, local: ExpertStats) -> ExpertStats:
        """Return the sums of all processes, merged in the order of their rank."""
        if self.world == 1:
            return local
        gathered: list[dict[str, np.ndarray]] = [{} for _ in range(self.world)]
        torch.distributed.all_gather_object(gathered, local.arrays(), group=self.group)  # sets differ in number
        total = None
        for arrays in gathered:
            part = ExpertStats(**arrays)  # what a process lacks, the result lacks
            total = part if total is None else total + part
        assert total is not None
        return total


def join_processes(device: torch.device) -> Processes:
    """Join the other processes of this run, where it was started with several; sets this one's accelerator."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu")  # opens the default group with the backend that suits the device
    group = torch.distributed.new_group(backend="gloo")
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), group)
