"""The processes that torchrun started: micro-batches are dealt out, gradients summed, and all know if one failed.

Every process packs the whole step, so that what is packed together does not depend on their number, takes its part of
the micro-batches and adds up their gradients; once a step these are summed. torch's DistributedDataParallel would do it
less well here: it takes means where the processes have different numbers of tokens, pairs or rows, wants one `forward`
to wrap where the reference of a preference loss needs two, and starts to exchange in the last backward pass, which
processes with fewer micro-batches do not have.

Before anything is exchanged, all *meet* over gloo, each with a number: it has arrived, it wants a layer (see
`sharding.py`), or it has failed. Who waits for the others hands out layers meanwhile, so none needs as many passes as
another; and a failure reaches the others as the error that it is, before they wait for something that will not come.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from edgelora.data.pack import Batch
from edgelora.device import Choice, compute_threads, physical_cores
from edgelora.errors import ConfigError, EdgeloraError
from edgelora.training.world import Alone, World

T = TypeVar("T")

ARRIVED, FAILED = -1, -2  # what a process may say where it does not want a layer
WAIT = timedelta(minutes=30)  # for a process that is alive and does not come; a dead one is noticed at once
SUMMED_AT_ONCE = 1 << 24  # numbers, 64 MiB of them


@contextmanager
def joined() -> Iterator[World]:
    """All processes of this run: those that torchrun started, else this one alone. An error in one ends them all."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield Alone()
        return
    with reached("torchrun's processes did not come together"):
        dist.init_process_group("gloo", timeout=WAIT)
    try:
        world = Processes()
        try:
            yield world
        except Exception as e:
            world.leave(e)
            raise
    finally:
        dist.destroy_process_group()


def choose_threads(world: World) -> Choice:
    """How many threads torch gets: those of the machine, divided among its processes."""
    asked, mine = os.environ.get("OMP_NUM_THREADS", ""), world.local_size
    # torchrun sets it to 1 wherever nobody set it
    if asked.isdigit() and (mine == 1 or int(asked) > 1):
        return Choice(str(max(1, int(asked))), "OMP_NUM_THREADS says so")
    if mine == 1:
        return Choice(str(compute_threads()), "one for each core")
    return Choice(str(max(1, physical_cores() // mine)), f"the cores, divided among {mine} processes")


class Processes:
    """A `World` of several. `hand_out(layer)` is called in all of them at once when one wants a layer (`sharding.py`).

    `data`: the group in which tensors travel, those of `device`; None: gloo's, over the machine's memory.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank, self.local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        self.device = torch.device("cpu")
        self.data: dist.ProcessGroup | None = None
        self.hand_out: Callable[[int], None] = _nothing
        self._ended = False

    def use(self, device: str) -> None:
        if not device.startswith("cuda"):
            return
        if device != "cuda" or self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                what=f"--device {device}: there is no card for process {self.rank}",
                why=f"{self.local_size} processes on this machine take a card each, of {torch.cuda.device_count()}",
                fix="pass torchrun a smaller --nproc-per-node, and leave the choice of the card to it",
            )
        self.device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(self.device)
        self.meet_for(ARRIVED)
        with reached():
            self.data = dist.new_group(backend="nccl", timeout=WAIT)

    def share(self, batches: Sequence[Batch]) -> list[Batch | None]:
        mine: list[Batch | None] = list(batches[self.rank :: self.size])
        return mine + [None] * (-(-len(batches) // self.size) - len(mine))

    def sum(self, values: list[float]) -> list[float]:
        self.meet_for(ARRIVED)
        totals = torch.tensor(values, dtype=torch.float64)
        with reached():
            dist.all_reduce(totals)
        return totals.tolist()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        self.meet_for(ARRIVED)
        for group in _groups(parameters):
            # a process without a micro-batch has no gradients
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            total = torch.cat([grad.flatten() for grad in grads]).to(self.device)
            with reached():
                dist.all_reduce(total, group=self.data)
            for p, part in zip(group, torch.split(total, [p.numel() for p in group]), strict=True):
                p.grad = part.view_as(p).to(p.device)

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def first(self, make: Callable[[], T]) -> T:
        made = [make() if self.rank == 0 else None]
        self.meet_for(ARRIVED)
        with reached():
            dist.broadcast_object_list(made)
        return made[0]  # type: ignore[return-value]

    def meet_for(self, wish: int) -> None:
        """Meet the others until all have the layer `wish`, or (ARRIVED) until all are here and want none.

        The lowest layer that anyone wants goes first: a process that is behind catches up, and then all go on in step.
        Raises the error of a process that failed.
        """
        while wishes := [said for said in self._meet(wish) if said >= 0]:
            self.hand_out(min(wishes))
            if min(wishes) == wish:
                return

    def _meet(self, says: int) -> list[int]:
        said = torch.empty(self.size, dtype=torch.int64)
        with reached():
            dist.all_gather_single(said, torch.tensor([says]))
        if FAILED in said:
            raise self._exchange(None)
        return said.tolist()

    def leave(self, error: Exception) -> None:
        """Tell the others, at their next meeting, what this process failed with; no news if it is they who told."""
        if not self._ended:
            with suppress(EdgeloraError), reached():  # they may be gone already
                dist.all_gather_single(torch.empty(self.size, dtype=torch.int64), torch.tensor([FAILED]))
                self._exchange(error)

    def _exchange(self, mine: Exception | None) -> EdgeloraError:
        """The error of the first process that has one."""
        self._ended = True
        typed = mine if mine is None or isinstance(mine, EdgeloraError) else _untyped(mine)
        errors: list[EdgeloraError | None] = [None] * self.size
        with reached():
            dist.all_gather_object(errors, typed)
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        error.what = f"process {rank}: {error.what}"
        return error


def _nothing(_: int) -> None:
    raise AssertionError("a layer was asked for, and none is dealt out")


def _groups(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters, in their order, of about SUMMED_AT_ONCE numbers together: few exchanges, and no copy of them all."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        group.append(parameter)
        if sum(p.numel() for p in group) >= SUMMED_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


@contextmanager
def reached(what: str = "another process of this run is gone") -> Iterator[None]:
    """Exchange something in here; raises EdgeloraError where the others cannot be reached, or do not come."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:
        raise EdgeloraError(
            what=what,
            why=f"it was killed, its machine failed, or it hung ({str(e).partition('. ')[0]})",
            fix="its last words, if it had any, are above; go on with --resume",
        ) from e


def _untyped(error: Exception) -> EdgeloraError:
    return EdgeloraError(
        what=f"{type(error).__name__}: {error}",
        why="this is a fault of the program, or of a function that it was given",
        fix="its traceback is above",
    )
