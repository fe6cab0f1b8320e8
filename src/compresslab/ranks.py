"""Several processes on one run: `torchrun --nproc-per-node 2 -m compresslab.cli compress ...`.

Every rank walks its own calibration batches through the network (layerwise.py). Where the walks meet at a layer, its statistic
travels: rank 0 adds its batches and hands on, rank 1 adds its own to that, and so on; the last one gives the sum to all. So the
same numbers are added in the same order as in one process, and the codes are the same bit for bit; an all-reduce, which adds in
another order, would not give that. A Gram matrix travels in stripes, so that while one rank works on a stripe the next one works
on the stripe before it, and none waits.

Layers that read one tensor (query, key and value; gate and up) are solved at the same time, by different ranks, and exchanged.
Only rank 0, the leader, touches the output folder, but for the checkpoints of trainings, of which every rank writes and reads its
own part. So each machine needs the model and the data at the path that the command names, its own copies will do (their
hashes are compared), and the artifact lies on that of rank 0; but where something is trained, all must see the output folder. A
rank that fails or dies ends the run: torchrun stops the others, and the same command, with any number of ranks, goes on after the
last finished block.

A refiner (AutoRound) computes the gradient of each batch where that is walked, and all add them in the order of batches. A
training is shared out by examples (trainer.py): each rank takes its part of every batch, and accelerate adds up the gradients.
The sums are those of one process, but for the order of adding, so the weights agree to rounding and not bit for bit. Where
memory is short, each keeps a part of the network (sharding.py).

gloo carries what lies in main memory. NCCL is asked for what lies on GPUs; no run on several GPUs has been made yet. Without
torchrun there is one rank, and nothing is sent.
"""

from __future__ import annotations

import datetime
import functools
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.numerics.gram import Gram, GroupedGram, Statistic

if TYPE_CHECKING:  # solving.py imports this module
    from compresslab.plan import Unit
    from compresslab.solving import BlockState, Sink, Solved

# A rank may wait while the leader measures; one that died is noticed by its closed connection, not by this.
PATIENCE = datetime.timedelta(days=2)

NOTICED_S = 5.0  # until what one machine writes to a shared file system is seen by all others

Value = TypeVar("Value")


def _names_the_ranks(method: Callable[..., Value]) -> Callable[..., Value]:
    """A method of Ranks whose failing connections are told as one line."""

    @functools.wraps(method)
    def wrapped(self: Ranks, *args: Any, **kwargs: Any) -> Value:
        try:
            return method(self, *args, **kwargs)
        except RuntimeError as error:  # what gloo and NCCL raise
            raise CompressLabError(
                f"another rank has ended ({str(error).splitlines()[0][:120]}): see what it said, and run the same command again"
            ) from error

    return wrapped


class Ranks:
    """The processes of a run, and this one's place among them.

    Attributes:
        rank: 0 for the leader.
        size: how many there are; 1 without torchrun.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Something that the leader does before the others do: what it fetches they find."""
        if not self.leads:
            self.told(None)
        yield
        if self.leads:
            self.told(None)

    def share(self, count: int) -> range:
        """The batches that this rank walks: neighbours, as many as the others have, give or take one."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def holder(self, index: int, count: int) -> int:
        """The rank that walks a batch."""
        return next(rank for rank in range(self.size) if index < (rank + 1) * count // self.size)

    @_names_the_ranks
    def handed_out_(self, tensor: Tensor, source: int) -> Tensor:
        """What a rank has in a tensor, put into everybody's."""
        dist.broadcast(tensor, src=source)
        return tensor

    @_names_the_ranks
    def earliest(self, order: float) -> float:
        """The smallest number that any rank has."""
        if self.is_alone:
            return order
        found = torch.tensor([order], dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return float(found)

    def told(self, value: Value) -> Value:
        """What the leader has; the others' values do not count."""
        return self._handed_out(value, source=0)

    def share_of_batch(self, batch: int) -> int:
        """How many examples of every batch of a training are this rank's."""
        if batch % self.size:
            raise CompressLabError(
                f"a batch of {batch} cannot be shared out evenly among {self.size} ranks: choose a multiple with "
                f"--set training.batch={self.size * math.ceil(batch / self.size)}"
            )
        return batch // self.size

    @_names_the_ranks
    def take_leaders_(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values that the leader has."""
        for tensor in () if self.is_alone else tensors:
            dist.broadcast(tensor.data, src=0)

    @_names_the_ranks
    def gathered(self, values: Sequence[Value]) -> list[Value]:
        """Everybody's values, by rank."""
        if self.is_alone:
            return list(values)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, list(values))
        return [value for part in found for value in part]

    def check_alike(self, what: Mapping[str, Any]) -> None:
        """CompressLabError on every rank, naming what they do not all have alike: each machine may work on its own copies."""
        rows = self.gathered([dict(what)])
        differing = [name for name in what if any(row.get(name) != rows[0].get(name) for row in rows)]
        if differing:
            raise CompressLabError(
                f"the ranks have another {', '.join(differing)}: give every machine the same, or they would not work on one run"
            )

    def check_sees(self, folder: Path) -> None:
        """CompressLabError on every rank unless all of them see what the leader writes into a folder."""
        if self.is_alone:
            return
        probe, mine = folder / "seen", uuid.uuid4().hex
        if self.leads:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text(mine, encoding="ascii")
        written, waited = self.told(mine), 0.0
        while not (sees := probe.exists() and probe.read_text(encoding="ascii") == written) and waited < NOTICED_S:
            time.sleep(NOTICED_S / 10)
            waited += NOTICED_S / 10
        all_see = all(self.gathered([sees]))
        if self.leads:
            probe.unlink()
        if not all_see:
            raise CompressLabError(
                f"{folder}, where rank 0 keeps the checkpoints of a training, is not seen by all ranks: on several machines the "
                "output of what trains must lie on a file system that they share"
            )

    def shared_out(self, costs: Mapping[str, float], work: Callable[[str], Value]) -> dict[str, Value]:
        """`work` on every name, each done by one rank, the dearest first; everybody gets all results.

        Raises:
            CompressLabError: on every rank, if the work fails on any of them.
        """
        if self.is_alone:
            return {name: work(name) for name in costs}
        busy, owner = [0.0] * self.size, {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owner[name] = busy.index(min(busy))
            busy[owner[name]] += costs[name]
        mine: list[tuple[str, Value | CompressLabError]] = []
        for name in costs:
            if owner[name] == self.rank:
                try:
                    mine.append((name, work(name)))
                except CompressLabError as error:
                    mine.append((name, error))
        found = dict(self.gathered(mine))
        for result in found.values():
            if isinstance(result, CompressLabError):
                raise result
        return {name: found[name] for name in costs}

    # -- statistics --------------------------------------------------------------------------------------------------

    @_names_the_ranks
    def sum_up(
        self,
        shape: tuple[int, ...] | None,
        inputs: Sequence[tuple[Tensor, Tensor]],
        make: Callable[..., Statistic],
    ) -> Statistic | None:
        """The statistic of all ranks' inputs, as if one had added them in the order of ranks; None if nobody has any.

        Args:
            shape: what `make` takes, where this rank has inputs.
            inputs: x [..., in], and what observers shall see of it.

        Raises:
            ValueError: if an input of this rank holds a NaN or an infinity.
        """
        known = next((found for found in self.gathered([shape]) if found is not None), None)
        if known is None:
            return None
        statistic = make(*known)
        if isinstance(statistic, GroupedGram):  # small, and no matrix to cut into stripes: everybody adds everything
            where = statistic.parts[0].largest.device
            for x, watched in self.gathered([(x.cpu(), watched.cpu()) for x, watched in inputs]):
                statistic.add_(x.to(where), watched.to(where))
        else:
            self._travel_(statistic, inputs)
        return statistic

    def _travel_(self, gram: Gram, inputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        last = self.size - 1
        rows = [part for x, _ in inputs for part in gram.rows_of(x)]
        if self.rank > 0:
            _put_counted(gram, _received(self.rank - 1))
        for part in rows:
            gram.count_(part)
        for _, watched in inputs:
            gram.observe_(watched)
        on_the_way = []
        if self.rank < last:
            dist.send_object_list([_counted(gram)], dst=self.rank + 1)
        for start, stop in gram.stripes:
            stripe = gram.stripe(start, stop)
            if self.rank > 0:
                arrived = torch.empty(stripe.shape, device=stripe.device)
                dist.recv(arrived, src=self.rank - 1)
                stripe.copy_(arrived)
            for part in rows:
                gram.add_stripe_(part, start, stop)
            if self.rank < last:
                leaving = stripe.contiguous()
                on_the_way.append((dist.isend(leaving, dst=self.rank + 1), leaving))
        for sent, _ in on_the_way:
            assert sent is not None
            sent.wait()
        _put_counted(gram, self._handed_out(_counted(gram), source=last))
        dist.broadcast(gram.stripe(0, gram.features), src=last)

    @_names_the_ranks
    def add_drift_(self, statistic: Statistic, pairs: int, add: Callable[[], object]) -> None:
        """Have every rank in turn add its pairs to the drift of a Gram matrix that all of them have."""
        if self.is_alone or not sum(self.gathered([pairs])):
            add()
            return
        for part in statistic.parts:
            part.drift = torch.zeros_like(part.matrix)
            if self.rank > 0:
                dist.recv(part.drift, src=self.rank - 1)
        add()
        for part in statistic.parts:
            assert part.drift is not None
            if self.rank < self.size - 1:
                dist.send(part.drift, dst=self.rank + 1)
            dist.broadcast(part.drift, src=self.size - 1)

    @_names_the_ranks
    def _handed_out(self, value: Any, source: int) -> Any:
        if self.is_alone:
            return value
        box = [value if self.rank == source else None]
        dist.broadcast_object_list(box, src=source)
        return box[0]


def _counted(gram: Gram) -> tuple[int, Tensor, Tensor, list[Any]]:
    return gram.tokens, gram.total.cpu(), gram.largest.cpu(), list(gram.observers.values())


def _put_counted(gram: Gram, found: tuple[int, Tensor, Tensor, list[Any]]) -> None:
    tokens, total, largest, observers = found
    gram.tokens, gram.total, gram.largest = tokens, total.to(gram.total.device), largest.to(gram.largest.device)
    gram.observers = dict(zip(gram.observers, observers, strict=True))


def _received(source: int) -> Any:
    box = [None]
    dist.recv_object_list(box, src=source)
    return box[0]


@dataclass(frozen=True)
class SharedSink:
    """The leader's sink, of which the others know what it holds, and to which they write nothing."""

    ranks: Ranks
    sink: Sink | None

    def is_done(self, unit: str) -> bool:
        return self.ranks.told(self.sink is not None and self.sink.is_done(unit))

    def write(self, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor], state: BlockState | None) -> None:
        if self.sink is not None:
            self.sink.write(unit, solved, floats, state)

    def last_state(self, units: Sequence[str]) -> BlockState:
        found = None if self.sink is None else self.sink.last_state(units)
        if self.ranks.is_alone or found is None:
            return self.ranks.told(found)  # type: ignore[return-value]
        return self.ranks.told(type(found)(outputs=list(found.outputs), references=list(found.references)))


ALONE = Ranks()


def started() -> Ranks:
    """The ranks of this process's run: those that torchrun has started, joined here, or itself alone.

    Raises:
        CompressLabError: if they do not find each other.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise CompressLabError(f"the {size} ranks did not find each other: {error}") from None
    return Ranks(dist.get_rank(), dist.get_world_size())
