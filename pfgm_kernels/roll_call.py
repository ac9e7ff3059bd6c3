# SPDX-License-Identifier: Apache-2.0
"""Who of a group is missing, asked where a collective takes long or breaks, and never else.

Gloo's errors speak of addresses, and a rank that is silent makes none until the timeout. So ranks
that wait look around a few times a second: whether a connection is closed (a receive that is posted
on it raises at once), whether another rank has sent word of an error of its own, and whether the
timeout is over, when all that are there answer to a call of the roll. All that passes between two
ranks by itself; nothing depends on a third, as the store of a group does on the rank that has it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

POLL = timedelta(milliseconds=250)
GRACE = 2.0
"""Seconds that the others have to hear a word or to answer, which they do within `POLL` if they
wait."""
WORD = 512
"""Bytes of a word to another rank: the number of the call, a sentence, and their CRC-32."""
TAGS = 0x7066_0000, 0x7066_0001
"""Of words, and of receives that nothing is sent for."""
LOST = (
    "a rank that holds references is lost: it was killed, ended with an error, which it tells "
    "itself, or was silent for the timeout of the group"
)


class RollCall:
    """What one rank knows of the others of its group.

    calls: how many there have been; the same on each rank, or they do not belong together.
    broken: why there will be no more, after which each raises ConnectionError: what other ranks
    still wait for would meet what comes next.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self._group = ref(group)  # which is to end when its owner ends it
        self.calls = self.sets = 0
        self.broken: str | None = None
        self._peers = [peer for peer in range(self.world) if peer != self.rank]
        self._entered = self._alike = self._told = self._raised = False
        self._posted: dict[int, tuple[Tensor, dist.Work]] = {}
        self._sent: list[dist.Work] = []
        self._timeout: timedelta | None = None
        """None where ranks of the group cannot ask one another, on a GPU."""
        with suppress(RuntimeError):
            backend = group._get_backend(torch.device("cpu"))
            if backend.name() == "gloo":
                self._timeout = backend.options._timeout

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of all ranks. What ends it on this one alone, the others are told."""
        if self.broken:
            raise ConnectionError(self.broken)
        self._begin()
        try:
            yield
        except BaseException as error:
            self._raised = True
            if not self._alike and self.broken is None:
                if self._entered:
                    self._end(self._failed(error))
                else:
                    self._tell(self._failed(error))
            raise

    @contextmanager
    def before(self) -> Iterator[None]:
        """What leads to a call. An error there is that of a call that others may be waiting in."""
        self._raised = False
        try:
            yield
        except BaseException as error:
            if not self._raised:  # not by a call within
                self._begin()
                self._tell(sentence := self._failed(error))
                if sentence in self._heard().values():  # they waited, and that was the end
                    self.broken = sentence
            raise

    def alike(self, error: ValueError) -> ValueError:
        """An error that every rank raises at this place."""
        self._alike = True
        return error

    def gather(self, tensor: Tensor) -> Tensor:
        """(world, *shape) from tensors of one shape."""
        tensor, options = tensor.contiguous(), c10d.AllgatherOptions()
        out = [torch.empty_like(tensor) for _ in range(self.world)]
        self._run(lambda: self.group.allgather([out], [tensor], options), options, tensor)
        return torch.stack(out)

    def sum(self, tensor: Tensor) -> None:
        """Puts the sum over the ranks in its place."""
        options = c10d.AllreduceOptions()
        self._run(lambda: self.group.allreduce([tensor], options), options, tensor)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None
        return group

    def _begin(self) -> None:
        self.calls += 1
        self._entered = self._alike = self._told = False

    def _run(self, start: Callable[[], dist.Work], options: Any, tensor: Tensor) -> None:
        self._entered, listens = True, False
        if self._timeout is not None and tensor.device.type == "cpu":
            listens = True
            # Gloo's own timeout closes all connections of the rank, as if that were the lost one.
            options.timeout = self._timeout + timedelta(seconds=4 * GRACE)
        try:
            work = start()
            if listens:
                self._wait(work)
            work.wait()
        except RuntimeError as error:
            if listens:
                self._look_around(0.0)
            if is_lost(error):
                raise self._end(LOST) from error
            raise

    def _wait(self, work: dist.Work) -> None:
        """Until the work is completed, in success or not."""
        began = time.monotonic()
        while True:
            try:
                work.wait(POLL)
                return
            except RuntimeError:
                if work.is_completed():
                    return
            self._look_around(time.monotonic() - began)

    def _look_around(self, waited: float) -> None:
        """Raises ConnectionError where this call will not be completed."""
        assert self._timeout is not None
        if not self._ended() and waited < self._timeout.total_seconds():
            return
        self._tell("")
        heard = self._ended()
        silent = [peer for peer in self._peers if peer not in heard]
        within = f"within the timeout of the group, {self._timeout.total_seconds():g} s"
        if silent:
            raise self._end(f"{_which(silent)} silent: others wait in a call, to no end {within}")
        raise self._end(f"ranks that hold references are in different calls: none ended {within}")

    def _ended(self) -> dict[int, str]:
        """The words of the others, if none says how the call ended and none is gone."""
        heard = self._heard()
        for sentence in filter(None, heard.values()):
            raise self._end(sentence)
        if closed := [peer for peer in self._closed() if peer not in heard]:
            raise self._end(f"{_which(closed)} lost: killed, or ended with an error told there")
        return heard

    def _end(self, sentence: str) -> ConnectionError:
        self.broken = sentence
        self._tell(sentence)
        if self._timeout is not None:
            # What is left of the call would keep the process from ending until the timeout: a
            # receive that waits in vain makes gloo close all connections.
            peer = self._peers[0]
            with suppress(RuntimeError):
                nothing = torch.zeros(1, device="cpu")
                self.group.recv([nothing], peer, TAGS[1]).wait(timedelta(milliseconds=1))
        return ConnectionError(sentence)

    def _failed(self, error: BaseException) -> str:
        what = " ".join(str(error).split())[: WORD // 2]
        return f"rank {self.rank}, which holds references, failed: {type(error).__name__}: {what}"

    def _tell(self, sentence: str) -> None:
        """Sends word to all, "" for being here, and stays until all have answered or are gone: a
        process that ends at once takes its words with it.
        """
        if self._timeout is None or self._told:
            return
        self._told = True
        word = word_of(self.calls, sentence)
        for peer in self._peers:
            with suppress(RuntimeError):
                self._sent.append(self.group.send([word], peer, TAGS[0]))
        until = time.monotonic() + GRACE
        while len({*self._heard(), *self._closed()}) < self.world - 1 and time.monotonic() < until:
            time.sleep(0.02)

    def _heard(self) -> dict[int, str]:
        """The words of others in this call."""
        heard = {}
        for peer in self._peers:
            while True:
                if peer not in self._posted and not self._post(peer):
                    break
                word = read_word(self._posted[peer][0])
                if word is None or word[0] > self.calls:
                    break
                if word[0] == self.calls:
                    heard[peer] = word[1]
                    break
                del self._posted[peer]  # of a call that ended alike on all ranks
        return heard

    def _post(self, peer: int) -> bool:
        word = torch.zeros(WORD, dtype=torch.uint8, device="cpu")
        with suppress(RuntimeError):
            self._posted[peer] = word, self.group.recv([word], peer, TAGS[0])
        return peer in self._posted

    def _closed(self) -> list[int]:
        """The ranks whose connection to this one has ended."""
        closed = []
        for peer in self._peers:
            try:
                self.group.recv([torch.zeros(1, device="cpu")], peer, TAGS[1])
            except RuntimeError:
                closed.append(peer)
        return closed


_of_groups: WeakKeyDictionary[dist.ProcessGroup, RollCall] = WeakKeyDictionary()


def of(group: dist.ProcessGroup) -> RollCall:
    """The one of a group."""
    if group not in _of_groups:
        _of_groups[group] = RollCall(group)
    return _of_groups[group]


def telling(make: Function) -> Function:
    """The same function, of whose errors the other ranks of its group, if it has one, are told."""

    @wraps(make)
    def run(*args: Any, **options: Any) -> Any:
        group = options.get("group")
        if not isinstance(group, dist.ProcessGroup):
            return make(*args, **options)
        with of(group).before():
            return make(*args, **options)

    return cast(Function, run)


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another rank is gone: gloo's errors have no type of their own, but name
    its sources.
    """
    return "/gloo/" in str(error) or isinstance(error, dist.DistError)


def word_of(call: int, sentence: str) -> Tensor:
    """(WORD,) bytes."""
    text = f"{call} {sentence}".encode()[: WORD - 4].ljust(WORD - 4, b"\0")
    word = text + zlib.crc32(text).to_bytes(4, "little")
    return torch.tensor(list(word), dtype=torch.uint8, device="cpu")


def read_word(word: Tensor) -> tuple[int, str] | None:
    """The number of the call and the sentence, or None while they have not arrived: another thread
    writes the bytes as they are read, in any order.
    """
    text, check = (read := bytes(word.tolist()))[:-4], read[-4:]
    if zlib.crc32(text).to_bytes(4, "little") != check:
        return None
    call, _, sentence = text.rstrip(b"\0").decode(errors="ignore").partition(" ")
    return int(call), sentence


def _which(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}, which holds references, is"
    return f"ranks {', '.join(map(str, ranks))}, which hold references, are"
