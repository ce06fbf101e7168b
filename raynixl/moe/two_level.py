"""Expert parallelism in two stages: rows go to the hosts that hold their experts, and there to the holders.

A dispatch first goes along the column, the ranks with this one's local index, one in each group (see `grid`): once to
each group that has an expert of the token. The member that receives a row there, its forwarder, sends it on inside the
group, once to each holder. So a rank writes to the members of its column and of its group alone, and a row goes over
the network once for each host. A combine is the mirror: holders to forwarder to source.

**The recipe.** With the weights at the holder, sums are rounded three times: each holder's partial sum once, the sum of
a group's holders in float32 by ascending rank once, and the sum over groups in float32, with biases, once. Flat
expert parallelism rounds twice, so that its last bits may be others. With the weights at the source all pairs travel
back as they are, and the bits are those of flat.

**The order of rows** at a receiver: by the local index of the source, then by its group, then by token. Where a group
has no member of a column, rows of two columns come through one forwarder: they are ordered by its local index first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from raynixl.collectives import Group
from raynixl.errors import ConfigError, RangeError
from raynixl.moe.checks import dtype_of, positive
from raynixl.moe.grid import Grid, make_grid
from raynixl.moe.parallel import ExpertParallel
from raynixl.moe.pending import Pending
from raynixl.moe.placement import NOBODY, Placement
from raynixl.moe.result import Dispatched
from raynixl.moe.staging import Returning, Sending, Shares, TwoLevelDispatched, TwoLevelHandle
from raynixl.moe.whereabouts import hosts_of

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class TwoLevel:
    """One rank of an expert-parallel group that is arranged as a grid; its operations are those of `ExpertParallel`.

    Every member makes one, with the same arguments. It has no layout "slots", and members neither join nor come back:
    who is lost is masked in its column and its group, and what it would have forwarded is missing as well. Make a new
    one without it.

    Raises:
        ConfigError: arguments that make no sense, or that another rank has otherwise.
        TransferTimeout: not all members came.
    """

    def __init__(  # noqa: PLR0913 - those of ExpertParallel
        self, group: Group, *, experts: int, hidden: int, topk: int, max_tokens: int,
        dtype: torch.dtype = torch.bfloat16, placement: Placement | Sequence[int] | None = None, name: str = "moe",
        capacity: int | None = None, deadline: float | None = None, grid: Grid | None = None,
    ) -> None:  # fmt: skip
        self.agent, self.name, self.rank, self.world = group.agent, name, group.rank, group.world
        self.experts, self.hidden = positive(experts, "experts"), positive(hidden, "hidden")
        self.topk, self.max_tokens = positive(topk, "topk"), positive(max_tokens, "max_tokens")
        self.dtype = dtype_of(dtype)
        self.deadline = self.agent.config.transfer_timeout if deadline is None else deadline
        self.grid = make_grid(self.world, hosts_of(group)) if grid is None else grid
        if self.grid.world != self.world:
            raise ConfigError(f"{self.grid} for {self.world} members", hint="give each member a place in the grid")
        self._names = group.members
        self._columns = self.grid.columns_of(self.rank)
        self._turn = threading.RLock()  # held through each operation: they are carried out one after another
        self._worker: ThreadPoolExecutor | None = None
        self._stack = ExitStack()
        self._across: list[ExpertParallel] = []
        self._barred: set[int] = set()
        self._set_placement(Placement.even(self.experts, self.world) if placement is None else placement)
        try:
            self._open(capacity)
        except BaseException:
            self._stack.close()
            raise

    def __repr__(self) -> str:
        return f"TwoLevel({self.name!r}, rank {self.rank} of {self.grid}, {self.experts} experts)"

    def __enter__(self) -> TwoLevel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What it is

    @property
    def active(self) -> tuple[int, ...]:
        """The ranks that take part, ascending, as far as this one has to do with them."""
        gone = self._barred | {
            ranks[rank] for ep, ranks in self._parts() for rank in set(range(len(ranks))) - set(ep.active)
        }
        return tuple(rank for rank in range(self.world) if rank not in gone)

    @property
    def local_experts(self) -> tuple[int, ...]:
        """The physical experts that this rank holds; their place here is their local id."""
        return self.placement.experts_of(self.rank)

    # Operations

    def dispatch(  # noqa: PLR0913 - those of ExpertParallel
        self, x: Any, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, *,
        handle: TwoLevelHandle | None = None, layout: str | None = None, alignment: int | None = None,
        weights_at: str | None = None, extra: Sequence[Tensor] = (), async_: bool = False,
        deadline: float | None = None, stats: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Send each token's row to the ranks that hold its experts; see `ExpertParallel.dispatch`."""
        sending = Sending(x, topk_idx, topk_weights, tuple(extra), handle, layout, alignment, weights_at)
        return self._submit(lambda: self._dispatch(sending, self._shares(deadline), stats), async_)

    def combine(
        self, y: Tensor, handle: TwoLevelHandle, *, bias: Tensor | Sequence[Tensor] | None = None,
        out: Tensor | None = None, summed: bool = True, async_: bool = False, deadline: float | None = None,
        stats: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Bring back what the experts made of the rows, and return each token's sum; see `ExpertParallel.combine`.

        With the weights at the holder the sum is rounded once more than flat: for each group.
        """
        returning = Returning(y, None, handle, bias, out, summed)
        return self._submit(lambda: self._combine(returning, self._shares(deadline), stats)[0], async_)

    def combine_weights(
        self, y: Tensor, weights: Tensor, handle: TwoLevelHandle, *, bias: Any = None, out: Tensor | None = None,
        async_: bool = False, deadline: float | None = None,
    ) -> Any:  # fmt: skip
        """Combine, and bring back what the holders say of each row's weights; see `ExpertParallel.combine_weights`."""
        returning = Returning(y, weights, handle, bias, out, True)
        return self._submit(lambda: self._combine(returning, self._shares(deadline), None), async_)

    # Who takes part

    def place(self, placement: Placement | Sequence[int]) -> None:
        """Use another placement from the next dispatch on; every rank calls it between the same two operations.

        Raises:
            ConfigError: another number of experts, or ranks that cannot be.
        """
        with self._turn:
            self._set_placement(placement)
            for ep in self._across:
                ep.place(self._of_groups)
            self._inside.place(self._of_mates)

    def mask(self, rank: int) -> None:
        """Go on without a rank. All ranks of its column and its group learn of it that this one has to do with."""
        if rank == self.rank or not 0 <= rank < self.world:
            raise ConfigError(f"rank {self.rank} cannot mask rank {rank}", hint="name another rank of the group")
        with self._turn:
            self._barred.add(rank)
            for ep, ranks in self._parts():
                if rank in ranks:
                    ep.mask(ranks.index(rank))

    def close(self) -> None:
        """Withdraw this rank's memory; idempotent. Results that live keep theirs."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._turn:
            self._stack.close()

    # Within

    def _open(self, capacity: int | None) -> None:
        """Meet the members of each column, in ascending order, then those of the group."""
        spread = self.topk * self.max_tokens
        arriving = capacity or min(self.world * self.max_tokens, max(spread + spread // 4, self.max_tokens))
        for column in self._columns:
            ranks, options = self.grid.column(column), {"max_tokens": self.max_tokens, "capacity": capacity}
            self._across.append(self._meet(ranks, f"column{column}", self._of_groups, **options))
        most = self.max_tokens * self._most_served()
        self._inside = self._meet(
            self._mates, f"group{self._group}", self._of_mates, max_tokens=most, capacity=arriving
        )
        every = [*self._across, self._inside]
        for ep in every:
            ep.beside([other for other in every if other is not ep])

    def _meet(self, ranks: Sequence[int], label: str, placement: Placement, **sizes: Any) -> ExpertParallel:
        name = f"{self.name}.{label}"
        group = self._stack.enter_context(Group(self.agent, [self._names[rank] for rank in ranks], name=name))
        ep = ExpertParallel(
            group, experts=self.experts, hidden=self.hidden, topk=self.topk, dtype=self.dtype, placement=placement,
            name=name, deadline=self.deadline, max_ranks=len(ranks), **sizes,
        )  # fmt: skip
        return self._stack.enter_context(ep)

    @property
    def _group(self) -> int:
        return int(self.grid.group_of()[self.rank])

    @property
    def _mates(self) -> tuple[int, ...]:
        return self.grid.groups[self._group]

    def _most_served(self) -> int:
        """Return how many sources' rows a rank forwards at most."""
        targets = self.grid.forwarders()[:, self.grid.local_of()]
        return int(np.bincount(targets.ravel()).max())

    def _parts(self) -> list[tuple[ExpertParallel, tuple[int, ...]]]:
        """Return what this rank takes part in, each with its ranks."""
        columns = [self.grid.column(column) for column in self._columns]
        return [*zip(self._across, columns, strict=True), (self._inside, self._mates)]

    def _set_placement(self, given: Placement | Sequence[int]) -> None:
        placement = given if isinstance(given, Placement) else Placement(given)
        placement.check(experts=self.experts, ranks=self.world)
        holders, group_of, local_of = placement.holders, self.grid.group_of(), self.grid.local_of()
        groups = np.where(holders >= 0, group_of[holders], NOBODY)
        self.placement = placement
        self._of_groups = Placement(groups)
        self._of_mates = Placement(np.where(groups == self._group, local_of[holders], NOBODY))
        self._physical = torch.tensor(self._of_groups.experts_of(self._group), dtype=torch.int64)

    def _shares(self, deadline: float | None) -> Shares:
        """Share the time out: who waits for a forwarder must wait for longer than the forwarder does."""
        turns = [self.grid.columns_of(rank) for rank in range(self.world)]
        order = [max(turn.index(column) for turn in turns if column in turn) for column in self._columns]
        return Shares(self.deadline if deadline is None else deadline, tuple(order), max(map(len, turns)) + 1)

    def _submit(self, operation: Callable[[], T], async_: bool) -> T | Pending[T]:
        if self._worker is None and not async_:
            return operation()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="raynixl-moe")
        pending = Pending(self._worker.submit(operation))
        return pending if async_ else pending.wait()

    def _dispatch(self, sending: Sending, shares: Shares, stats: Tensor | None) -> Dispatched:
        with self._turn, self._alike([*self._across, self._inside], is_combine=False) as left:
            shares.start()
            sending.check(self.placement.digest)
            came: list[Dispatched] = []
            for number, ep in enumerate(self._across):
                options = sending.across(number, self.rank)
                left.remove(ep)
                came.append(ep.dispatch(**options, deadline=shares.left(shares.order[number])))
            options = sending.inside(came, self._physical)
            left.clear()
            r: Dispatched = self._inside.dispatch(**options, deadline=shares.left(shares.count - 1), stats=stats)
            sources, tokens = sending.origins(r)
            across = tuple(one.handle for one in came)
            handle = TwoLevelHandle(across, r.handle, self.placement.digest, sources, tokens)
            extra = r.extra if sending.handle is not None else r.extra[:-1]
            lost = self._lost([*(one.lost for one in came), r.lost])
            return TwoLevelDispatched.of(r, origins=sources, tokens=tokens, extra=extra, lost=lost, handle=handle)

    def _combine(self, returning: Returning, shares: Shares, stats: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with self._turn, self._alike([self._inside, *self._across], is_combine=True) as left:
            shares.start()
            returning.check(self.hidden)
            waited = [torch.zeros(len(ranks), dtype=torch.float64) for _, ranks in self._parts()]
            left.remove(self._inside)
            came = returning.inside(self._inside, shares.left(0), waited[-1])
            outs = []
            for number, ep in enumerate(self._across):
                left.remove(ep)
                seconds = shares.left(1 + shares.order[number])
                outs.append(returning.across(ep, number, came, seconds, waited[number]))
            if stats is not None:
                for each, (_, ranks) in zip(waited, self._parts(), strict=True):
                    stats[list(ranks)] += each
            return outs[0]

    @contextmanager
    def _alike(self, parts: list[ExpertParallel], *, is_combine: bool) -> Iterator[list[ExpertParallel]]:
        """Have all ranks raise what one of them does wrong: those that have yet to take part are told.

        Whoever is in no group of ranks with the culprit shares one with somebody who is.
        """
        try:
            yield parts
        except (ConfigError, RangeError) as exc:
            for ep in parts:
                ep.fail(exc, is_combine=is_combine)
            raise

    def _lost(self, lost: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        ranks = (members for _, members in self._parts())
        return tuple(sorted({members[rank] for some, members in zip(lost, ranks, strict=True) for rank in some}))
