"""The path on a GPU of one `ExpertParallel`: comes to agreements, keeps its layer there, and carries operations out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from raynixl.errors import ConfigError, Masked, RaynixlError
from raynixl.moe import cuda_device
from raynixl.moe.cuda_agreement import Agreed, Agreement
from raynixl.moe.cuda_combine import CudaCombine
from raynixl.moe.cuda_dispatch import QUEUE_SECONDS, CudaDispatch, Scene, refused
from raynixl.moe.cuda_layer import GpuLayer, nanoseconds
from raynixl.moe.cuda_need import Need, usual_need
from raynixl.moe.cuda_nothing import arrive_at, give_nothing, send_nothing, sum_nothing, take_nothing
from raynixl.moe.cuda_result import LostRanks
from raynixl.moe.cuda_structs import Kind, Refusal
from raynixl.moe.lines import ranks_of

if TYPE_CHECKING:
    from raynixl.moe.cuda_calls import CudaCombineCall, CudaDispatchCall
    from raynixl.moe.meeting import Meeting
    from raynixl.moe.placement import Placement
    from raynixl.moe.result import Combined, Dispatched
    from raynixl.moe.session import Session
    from raynixl.region import Region

T = TypeVar("T")
logger = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 10.0
_LATE: Final = "it did not come in time, or has ended"
_ALL: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Facts:
    """What stays the same of an `ExpertParallel`."""

    topk: int
    max_tokens: int
    hidden: int
    itemsize: int
    renormalises: bool


class CudaPath:
    """Operations on tensors of one GPU. All ranks use it for the same operations."""

    def __init__(
        self, session: Session, meeting: Meeting, facts: Facts, placement: Callable[[], Placement], *, let_in_at: int
    ) -> None:
        self._session, self._facts, self._placement = session, facts, placement
        self._agreement = Agreement(session, meeting, facts.max_tokens, facts.topk, let_in_at=let_in_at)
        self._agreed = Agreed()
        self._layer: GpuLayer | None = None
        self._gpu: int | None = None
        self._number = 0
        self._tables: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._told = 0
        self._stuck: list[object] = []
        self._kept: list[GpuLayer] = []  # of former agreements, that graphs have captured
        self._held: list[Region] = []  # and their windows
        self.is_used = False
        """Whether the last operation was one on a GPU."""

    @property
    def reason(self) -> str:
        """Why rows go through the host, if they do; '' where kernels put them into the peers' memory."""
        return self._agreed.reason

    @property
    def gpu(self) -> int | None:
        """The GPU whose tensors it takes."""
        return self._gpu

    # Agreements

    def synchronise(self, need: Need, gpu: int | None, until: float) -> None:
        """Agree with all ranks, at the same time, on who takes part and on windows for such needs.

        Raises:
            Masked: the others have gone on without us.
        """
        session, former = self._session, self._agreed
        self.look()
        number = self._gpu if gpu is None else gpu
        agreed = self._agreement.come_to(
            former, self._usual().with_(need), number, placement=self._placement().digest, until=until,
            settle=lambda: self._settle(until), prepare=lambda made: self._prepare(made, number, until),
        )  # fmt: skip
        self._gpu, self._agreed = number, agreed
        self._number, self._told = agreed.number << 20, 0
        if agreed.reason:
            self._let_go(until)
            if number is not None:
                name = session.members.names[session.members.me]
                logger.warning("rows of %r go through the host: %s", name, agreed.reason)
        own = None if agreed.reason else agreed.own
        for region in {id(one): one for one in (former.own, agreed.own) if one is not None}.values():
            if region is not own and region not in self._held:
                self._withdraw(region)
        agreed.own = own

    def _prepare(self, agreed: Agreed, gpu: int | None, until: float) -> None:
        """Have a layer for an agreement: the one there is, if nothing has another address."""
        assert gpu is not None
        session = self._session
        mask = session.members.mask & _ALL
        if self._layer is not None and self._layer.serves(agreed):
            self._layer.renew(agreed, mask)
            return
        self._let_go(until)
        self._layer = GpuLayer(
            cuda_device.gpu(gpu), agreed, session.agent.native, me=session.members.me, mask=mask,
            look=self._look_safely,
        )  # fmt: skip

    def is_ready(self, need: Need) -> bool:
        """Whether such an operation can be carried out without another agreement: alike on all ranks."""
        if self._agreed.number == 0:
            return False
        if self._agreed.reason:
            return True
        assert self._agreed.frame is not None
        return need.is_met_by(self._agreed.frame) and self._experts() <= self._agreed.frame.experts

    def _usual(self) -> Need:
        facts, frame = self._facts, self._agreed.frame
        usual = usual_need(
            hidden_nbytes=facts.hidden * facts.itemsize, columns=facts.hidden, topk=facts.topk,
            capacity=facts.max_tokens, experts=self._experts(),
        )  # fmt: skip
        if frame is None:
            return usual
        return usual.with_(Need(frame.row_nbytes, frame.item_nbytes, frame.items, frame.experts))

    def _experts(self) -> int:
        placement, ranks = self._placement(), self._session.members.names
        return max(1, *(len(placement.experts_of(rank)) for rank in ranks))

    def _settle(self, until: float) -> None:
        """Wait until nothing is left of what was put on streams, replays of graphs on this thread's among them."""
        layer = self._layer
        if layer is not None:
            layer.note_replays()
            if not layer.presence.wait_idle(until):
                self._let_go(until)

    def _let_go(self, until: float) -> None:
        """Give the layer up that there is; what graphs have captured stays, with its window, until we are closed."""
        layer, self._layer = self._layer, None
        if layer is None:
            return
        if layer.presence.is_held:
            logger.warning("windows of %r are others now: capture graphs anew", self._session.agent.name)
            self._kept.append(layer)
            if self._agreed.own is not None:
                self._held.append(self._agreed.own)
        else:
            self._close_layer(layer, until)

    def _close_layer(self, layer: GpuLayer, until: float) -> None:
        layer.note_replays()
        if not layer.close(until):
            self._stuck.append(layer)
            logger.error("a GPU does not end what it does for %r: its memory stays", self._session.agent.name)

    def _withdraw(self, region: Region) -> None:
        agent = self._session.agent
        if region.is_registered and not agent.is_closed:
            agent.deregister(region)

    def settle(self, until: float) -> None:
        """Wait until nothing is left of what was put on streams, or it is late; learn from the GPU who is lost.

        Raises:
            Masked: the others have gone on without us.
        """
        layer = self._layer
        if layer is not None:
            layer.note_replays()
            layer.presence.wait_idle(until)
        self.look()

    # Operations

    def dispatch(self, call: CudaDispatchCall, error: RaynixlError | None, seconds: float) -> Dispatched | RaynixlError:
        """Carry a dispatch out; return what is wrong with a rank's call.

        Raises:
            Masked: the others have gone on without us.
        """
        before = self._told
        layer = self._begin()
        if isinstance(layer, RaynixlError):
            return layer
        layer.known_refusals |= (error is not None) << self._session.members.me
        self._number += 1
        is_new = call.handle is None or call.has_other_weights
        number = self._number if is_new or call.handle is None else call.handle.number
        work = CudaDispatch(layer, self._scene(layer), call, number, seconds, error, self.look)
        result = work.run(self._absent())
        self.look()
        if isinstance(result, RaynixlError):
            return result
        lost = _lost_since(layer, before)
        if work.needs_host:
            return _with_lost(result, tuple(lost()))
        return _with_lost(result, LostRanks(lost))

    def combine(self, call: CudaCombineCall, error: RaynixlError | None, seconds: float) -> Combined | RaynixlError:
        """Carry a combine out. Returns and raises as `dispatch` does."""
        layer = self._begin()
        if isinstance(layer, RaynixlError):
            return layer
        layer.known_refusals |= (error is not None) << self._session.members.me
        facts = self._facts
        return CudaCombine(layer, call, facts.topk, facts.renormalises, seconds, error).run(self._absent())

    def grows(self, kind: Kind, seconds: float) -> RaynixlError | None:
        """In place of an operation that needs larger windows: hear whether all ranks need them, or what is wrong."""
        layer = self._layer
        if layer is None:
            return None  # there are none yet
        found = self._begin()
        if isinstance(found, RaynixlError):
            return found
        topk, deadline, is_dispatch = self._facts.topk, nanoseconds(seconds), kind == Kind.DISPATCH
        self._number += is_dispatch  # those for whom it is a dispatch like others count it, too
        with layer.begin(self._absent()) as op:
            if op.is_captured:
                return ConfigError("windows cannot grow while a graph is captured", hint="run it once before")
            first = (send_nothing if is_dispatch else give_nothing)(layer, topk, Refusal.GROWS)
            op.launch("send" if is_dispatch else "give", first, (1, 1, 1))
            op.launch("arrive", arrive_at(layer, kind, deadline), (1, 1, 1))
            layer.wait_ticket(seconds + QUEUE_SECONDS, self.look)
            statuses, came = layer.statuses(), self._session.members.ranks
            last = (take_nothing if is_dispatch else sum_nothing)(layer, topk, deadline)
            op.launch("take" if is_dispatch else "sum", last, (1, 1, 1))
        self.look()
        others = [rank for rank in came if rank < layer.ranks and statuses[rank] != Refusal.GROWS]
        for rank in others:
            if not layer.lost >> rank & 1:
                return refused(rank, statuses[rank] or Refusal.DIFFERS, self._session.members.names)
        return None

    def look(self) -> None:
        """Learn from the GPU who is lost, and tell it who is gone.

        Raises:
            Masked: the others have gone on without us.
        """
        layer, session = self._layer, self._session
        if layer is None:
            return
        layer.note_gone(sum(1 << rank for rank in session.members.ranks if session.is_gone(rank)))
        layer.excuse(session.members.mask & _ALL)
        for rank in ranks_of(layer.lost & ~self._told):
            self._told |= 1 << rank
            if session.members.is_active(rank):
                session.lose(rank, _LATE)
        by = layer.masked_by
        if by is not None:
            names, me = session.members.names, session.members.me
            raise Masked(
                f"rank {me} ({names.get(me)!r}) was masked by rank {by}: it did not come in time",
                hint="rejoin() brings it back, and synchronise() on the others lets it in",
            )

    def close(self) -> None:
        """Let go of everything once the GPU is through; no graph that has captured operations is replayed any more."""
        self._agreement.close()
        until = time.monotonic() + _CLOSE_SECONDS
        layers = [*self._kept, *([] if self._layer is None else [self._layer])]
        self._layer = None
        self._kept.clear()
        for layer in layers:
            self._close_layer(layer, until)
        regions = [*self._held, *([] if self._agreed.own is None else [self._agreed.own])]
        self._agreed = Agreed()
        self._held.clear()
        for region in regions:
            self._withdraw(region)
        self._tables.clear()

    def _begin(self) -> GpuLayer | RaynixlError:
        """Return the layer, or what was wrong with a rank's call before, of which we have not heard yet."""
        layer = self._layer
        assert layer is not None
        self.look()
        status = layer.take_refusal()
        return layer if status is None else refused(*status, self._session.members.names)

    def _look_safely(self) -> None:
        """On a watch's thread: who is gone need not be waited for, by replays of what is captured neither."""
        layer = self._layer
        if layer is not None:
            layer.excuse(sum(1 << rank for rank in self._session.members.ranks if self._session.is_gone(rank)))
        for kept in tuple(self._kept):
            kept.excuse(kept.presence.closed())

    def _absent(self) -> int:
        return self._session.members.mask & _ALL

    def _scene(self, layer: GpuLayer) -> Scene:
        session, facts, placement = self._session, self._facts, self._placement()
        members = session.members
        holders, local = self._holders(placement)
        return Scene(
            facts.topk, facts.max_tokens, layer.ranks, members.me, placement.digest, holders, local, self._experts(),
            len(placement.experts_of(members.me)), session.key, members.names,
        )  # fmt: skip

    def _holders(self, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by expert its rank and its local id, on the GPU; what graphs have captured stays."""
        key = (placement.digest, self._gpu or 0)
        if key not in self._tables:
            gpu = cuda_device.gpu(self._gpu or 0)
            self._tables[key] = (gpu.put(placement.holders), gpu.put(placement.local))
        return self._tables[key]


def _lost_since(layer: GpuLayer, before: int) -> Callable[[], tuple[int, ...]]:
    """Return what tells who was lost since then."""
    number = layer.number
    return lambda: ranks_of(layer.lost_of(number) & ~before)


def _with_lost(result: Dispatched, lost: Any) -> Dispatched:
    return replace(result, lost=lost, handle=replace(result.handle, lost=lost))
