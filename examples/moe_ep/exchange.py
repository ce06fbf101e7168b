"""All-to-all of rows by one-sided writes: each rank writes straight into its own slot of every other's inbox."""

import torch
from torch import Tensor

import raynixl as rx

TIMEOUT = 10.0  # seconds to wait for a peer


class Words:
    """Keeps the notifications that come in, whatever their order, until somebody asks for them."""

    def __init__(self, agent: rx.Agent) -> None:
        self.agent = agent
        self._counts: dict[tuple[str, str], int] = {}

    def wait(self, about: str, peer: str) -> int:
        """Return how many rows the peer has sent under this heading, once they are here."""
        while (about, peer) not in self._counts:
            note = self.agent.wait_notification(TIMEOUT)
            heading, count = note.payload.decode().split("=")
            self._counts[heading, note.peer] = int(count)
        return self._counts.pop((about, peer))


class Exchange:
    """Swaps rows of floats among ranks; one for each phase, of the same name and sizes on every rank.

    Each rank's inbox has a private slot for every source, so nobody has to agree on sizes or places first: rows are
    written, and the word behind them says how many. Two phases that answer each other, as dispatch and combine do,
    need no barrier: a rank that has the answers of all others knows that they are through with its rows.
    """

    def __init__(self, name: str, members: list[str], words: Words, *, capacity: int, width: int) -> None:
        self.name, self.members, self.words, self.agent = name, members, words, words.agent
        self.rank = members.index(self.agent.name)
        self.row_nbytes, self.slot_nbytes = 4 * width, 4 * width * capacity
        self.round = 0
        nbytes, shape = len(members) * self.slot_nbytes, (len(members), capacity, width)
        self.outbox = self.agent.empty(nbytes, name=f"{name}-outbox")
        self.inbox = self.agent.empty(nbytes, name=f"{name}-inbox")
        self.going, self.come = (box.tensor(torch.float32, shape) for box in (self.outbox, self.inbox))

    def swap(self, rows: list[Tensor]) -> list[Tensor]:
        """Send rows[r] to rank r; return what each rank has sent here, as views that the next swap overwrites."""
        self.round += 1
        about = f"{self.name} {self.round}"
        transfers = []
        for rank, part in enumerate(rows):
            if len(part):
                transfers.append(self._write(rank, part, about))
            else:
                self.agent.notify(self.members[rank], f"{about}=0".encode())
        for transfer in transfers:
            transfer.wait(timeout=TIMEOUT)
        counts = [self.words.wait(about, member) for member in self.members]
        return [slot[:count] for slot, count in zip(self.come, counts, strict=True)]

    def _write(self, rank: int, rows: Tensor, about: str) -> rx.Transfer:
        """Write rows into our slot of a rank's inbox, with the word that says how many."""
        count = len(rows)
        self.going[rank, :count] = rows
        theirs = self.agent.peer(self.members[rank], timeout=TIMEOUT).region(f"{self.name}-inbox", timeout=TIMEOUT)
        nbytes = count * self.row_nbytes
        return self.agent.write(
            self.outbox.span(rank * self.slot_nbytes, nbytes),
            theirs.span(self.rank * self.slot_nbytes, nbytes),
            notify=f"{about}={count}".encode(),
        )
