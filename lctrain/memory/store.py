"""HostStore: moves activations to host memory in the forward, and back for the backward.

Copies run on a CUDA stream of their own (the side stream), beside the computation. In the forward,
at most two tensors wait on the GPU for their copy to end. In the backward, while one layer
computes, the tensors of the layer that comes next in the backward are copied to the GPU, unless the
GPU has them. On a CPU the same code copies within host memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lctrain.memory.arena import Arena, Slot, aligned
from lctrain.warn import warn_caller

MOST_WAITING = 2


class OnDevice:
    """A kept activation that stays on its device; it can replace an OnHost.

    Args:
        x: The activation, of any shape. Its autograd history is dropped.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()

    def get(self) -> Tensor:
        """Returns the activation, without autograd history."""
        return self._x.detach()

    def prefetch(self) -> None:
        """Does nothing: the layer has no group."""


class HostStore:
    """Keeps activations in host memory, in one or more arenas for each kind of activation.

    Attributes:
        counts: Number of tensors that one forward pass stores, by kind of activation, such as
            "input".
        host_bytes: Largest number of bytes of all arenas together; None for no limit.
        tokens: Number of tokens of the longest pack; None if it is unknown.
        left_on_device: Number of tensors that stayed on the GPU because host memory was full.

    Args:
        counts: Number of tensors that one forward pass stores, by kind. The size of a kind's arena
            follows from this number and the kind's first tensor.
        host_bytes: Largest number of bytes of all arenas together; None for no limit.
        tokens: Number of tokens of the longest pack, for which arenas are made. None makes them for
            the packs that arrive.
    """

    def __init__(
        self, counts: dict[str, int], host_bytes: int | None = None, tokens: int | None = None
    ) -> None:
        self.counts = counts
        self.host_bytes = host_bytes
        self.tokens = tokens
        self.left_on_device = 0
        self._arenas: dict[str, list[Arena]] = {}
        self._waiting: deque[tuple[Any, Tensor]] = deque()
        self._stream: Any = None
        self._last: weakref.ref[Group] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        """Returns an empty store with the same settings, for a copy of the model."""
        return HostStore(self.counts, self.host_bytes, self.tokens)

    @property
    def stored_bytes(self) -> int:
        """Number of arena bytes in slots that are in use."""
        return sum(arena.used for arenas in self._arenas.values() for arena in arenas)

    @property
    def capacity(self) -> int:
        """Bytes of all arenas, in use or not."""
        return sum(arena.capacity for arenas in self._arenas.values() for arena in arenas)

    def group(self) -> Group:
        """Returns a new Group for the tensors of the layer that runs next in the forward."""
        return Group(self, self._last)

    def put(self, x: Tensor, kind: str, group: Group, tokens: int) -> OnHost | OnDevice:
        """Starts to copy an activation to the host.

        Args:
            x: Activation of any shape and strides.
            kind: Kind of the activation, a key of `counts`.
            group: Group of the layer.
            tokens: Number of tokens of the pack.

        Returns:
            An object whose `get` returns the activation: OnHost, or OnDevice if host memory is
            full.
        """
        x = x.detach()
        like = torch.empty_like(x, device="meta")  # the strides of a dense copy of x
        size = like.numel() * like.element_size()
        longest = max(self.tokens or 0, tokens)
        slot = self._slot(size, kind, x.device, size * longest // max(tokens, 1))
        if slot is None:
            self.left_on_device += 1
            if self.left_on_device == 1:
                warn_caller(
                    "the host has no room for some tensors, which stay on the device. Raise "
                    "memory.host_gib, or shorten the packs."
                )
            return OnDevice(x)
        view = slot.view(like)
        self._copy(view, x)
        self._waiting.append((self._event(x), x))
        while len(self._waiting) > MOST_WAITING:
            self._finish_one()
        return OnHost(self, slot, view, x.device, group)

    def _slot(self, size: int, kind: str, device: torch.device, largest: int) -> Slot | None:
        """Returns a slot, in a new arena if needed; None if the host memory's limit is reached."""
        arenas = self._arenas.setdefault(kind, [])
        for arena in arenas:
            if (slot := arena.reserve(size)) is not None:
                return slot
        self._drop_unused(arenas)  # they are too small
        needed = self.counts[kind] * aligned(largest)
        if self.host_bytes is not None:
            needed = min(needed, self.host_bytes - self.capacity)
        if needed < aligned(size):
            return None
        arenas.append(Arena(needed, device.type == "cuda", self._stream_of(device)))
        return arenas[-1].reserve(size)

    def _drop_unused(self, arenas: list[Arena]) -> None:
        """Removes arenas without slots, after the copies that may still read or write them."""
        used = [arena for arena in arenas if arena.used > 0]
        if len(used) < len(arenas) and self._stream is not None:
            self._stream.synchronize()
        arenas[:] = used

    def _stream_of(self, device: torch.device) -> Any:
        """Returns the side stream, on which copies run; None on a CPU."""
        if self._stream is None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def side_stream(self, device: torch.device) -> Any:
        """Returns a context in which copies run on the side stream, after all work queued so far.

        On a CPU the context does nothing.
        """
        if device.type != "cuda":
            return contextlib.nullcontext()
        stream = self._stream_of(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        device = source.device if source.device.type == "cuda" else target.device
        with self.side_stream(device):
            target.copy_(source, non_blocking=True)

    def _event(self, x: Tensor) -> Any:
        return self._stream.record_event() if x.device.type == "cuda" else None

    def _finish_one(self) -> None:
        """Makes the compute stream wait for the oldest copy, and drops its source tensor."""
        event, x = self._waiting.popleft()
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)

    def advance(self) -> None:
        """Waits for the oldest copy to the host, and drops its source tensor.

        It is called at each layer that moves no tensor to the host.
        """
        if self._waiting:
            self._finish_one()

    def finish(self) -> None:
        """Waits for all copies to the host, and drops their source tensors."""
        while self._waiting:
            self._finish_one()


class Group:
    """The activations of one layer in one forward pass that are on the host.

    The backward copies them back to the GPU together.

    Args:
        store: The HostStore that holds the activations.
        previous: Weak reference to the group of the last layer before this one that has tensors on
            the host; None for the first.
    """

    def __init__(self, store: HostStore, previous: weakref.ref[Group] | None) -> None:
        self.store = store
        self.previous = previous
        self._members: list[weakref.ref[OnHost]] = []

    def add(self, member: OnHost) -> None:
        """Adds an activation to the group."""
        self._members.append(weakref.ref(member))
        self.store._last = weakref.ref(self)  # a layer without such tensors is passed over

    def fetch(self) -> None:
        """Starts to copy all activations of the group to the GPU, except those that are there."""
        members = [member for reference in self._members if (member := reference()) is not None]
        for member in members:
            member.fetch()
        before = None if self.previous is None else self.previous()
        if not members and before is not None:  # its layer has nothing on the host
            before.fetch()


class OnHost:
    """An activation whose values are in a slot of a host arena.

    Args:
        store: The HostStore that holds the activation.
        slot: Slot with the values. It is released together with this object.
        view: The slot as a tensor with the activation's shape, strides and dtype.
        device: Device on which the activation was computed.
        group: Group of the layer.
    """

    def __init__(
        self, store: HostStore, slot: Slot, view: Tensor, device: torch.device, group: Group
    ) -> None:
        self._store = store
        self._slot = slot
        self._view = view
        self._device = device
        self._group = group
        self._fetched: tuple[Tensor, Any] | None = None
        self._returned: weakref.ref[Any] | None = None  # storage that `get` returned
        group.add(self)

    def fetch(self) -> None:
        """Starts to copy the activation to its device, unless that has started or it is there."""
        returned = None if self._returned is None else self._returned()
        if self._fetched is None and returned is None:
            self._start()

    def _start(self) -> None:
        # Allocated on the compute stream, since that stream uses and frees the tensor.
        x = torch.empty_strided(
            self._view.shape, self._view.stride(), dtype=self._view.dtype, device=self._device
        )
        self._store._copy(x, self._view)
        self._fetched = x, self._store._event(x)

    def get(self) -> Tensor:
        """Returns the activation on its device."""
        self._store.finish()
        if self._fetched is None:
            self._group.fetch()
        if self._fetched is None:  # an earlier result of this function still exists
            self._start()
        assert self._fetched is not None
        x, event = self._fetched
        self._fetched = None
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        self._returned = weakref.ref(x.untyped_storage())
        return x

    def prefetch(self) -> None:
        """Starts to copy the previous layer's group, which the backward needs next."""
        before = None if self._group.previous is None else self._group.previous()
        if before is not None:
            before.fetch()

    def __del__(self) -> None:
        # If `get` was never called, the side stream may still write to the fetched tensor.
        fetched = getattr(self, "_fetched", None)
        if fetched is not None and fetched[1] is not None:
            torch.cuda.current_stream(self._device).wait_event(fetched[1])
