"""Carry messages by torch.distributed.rpc; the only file that imports it.

The agent is built directly over ``ExchangeStore`` instead of by ``init_rpc``, whose counters make a second group wait
for ever, and calls go to the binding below ``rpc_async``. A test pins the private names of torch that this takes.

No exception crosses the wire (torch would rebuild it as ``type(message)``): endpoints answer with ``errors.Failure``
values. Handlers never block; where the answer takes time they return a future.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.rpc import api, internal
from torch.utils import _pytree as pytree

from rpcpipe.errors import Failure, RpcPipeError, StageError, StateError, WorkerLost
from rpcpipe.transport.base import Endpoint
from rpcpipe.transport.contexts import Contexts
from rpcpipe.transport.gate import Gate
from rpcpipe.transport.lane_calls import LaneCalls
from rpcpipe.transport.lanes import Lanes
from rpcpipe.transport.listen_hook import before_listening
from rpcpipe.transport.message_pickling import TensorsAside, in_bounds
from rpcpipe.transport.replies import Replies, Waiting
from rpcpipe.transport.roster import Roster, Seat
from rpcpipe.transport.rpc_store import ExchangeStore
from rpcpipe.transport.served import Served
from rpcpipe.transport.torch_log import hush

# uv: the default, shm, keeps a core busy per process even when idle. basic: through the socket.
_TRANSPORTS, _CHANNELS = ["uv"], ["basic"]
_HANDLER_THREADS = 2  # handlers only queue what they get, so two serve any number of messages
_GRACE = 0.5  # seconds that the monitor has to report that a worker has died

_BINDINGS: Any = torch._C._distributed_rpc  # rpc_async and remote end in its functions
_AUTOGRAD: Any = torch._C._distributed_autograd
# Verbs whose messages only file values, which the compute thread takes from the lane, and of calls, for it alone.
_BY_LANE = ("deliver", "deliver_tensors", "supply")
_CALLS_BY_LANE = ("submit",)

_SHUT_DOWN = (
    "torch RPC was shut down here, by torch.distributed.rpc.shutdown(); leave that to rpcpipe, and launch again"
)

log = logging.getLogger("rpcpipe")


class _Agent:
    """This process's torch agent and the other processes it knows.

    The agent outlives a group of workers: RRefs go through the first agent that a process had (torch's RRefContext), so
    a second one would never tell owners that their RRefs are deleted. Hence a group without fixed members, which each
    process enters itself under names and numbers never used again: torch's protocol for that survives no death.
    """

    def __init__(self, store: ExchangeStore, own: Seat, interface: str) -> None:
        self.store, self.interface = store, interface
        self._own = own
        self._agent = _start_agent(store, *own, interface)
        self.gate = store.own_gate()
        self._others: set[str] = set()

    def admit(self, others: Iterable[Seat]) -> None:
        """Enter other processes; each has published its address in the store, or will."""
        for seat in others:
            if seat != self._own and seat.wire not in self._others:
                self._agent._update_group_membership(rpc.WorkerInfo(*seat), [], {}, True)  # type: ignore[attr-defined]
                self._others.add(seat.wire)
                self.gate.places.add(self.store.place(seat.wire))

    def part(self, others: Iterable[Seat] | None = None) -> None:
        """Close the connections to others, all by default, which are dead; torch keeps their entries, as it needs."""
        for wire in self._others.copy() if others is None else [seat.wire for seat in others]:
            # A message to the dead: the agent would keep a connection's descriptors until it is used.
            with contextlib.suppress(RuntimeError, StateError):
                _invoke(_BINDINGS._invoke_rpc_python_udf, wire, _receive, ("", "", ()))
            self._others.discard(wire)

    @property
    def alone(self) -> bool:
        return not self._others


def _start_agent(store: ExchangeStore, name: str, number: int, interface: str) -> Any:
    os.environ["TP_SOCKET_IFNAME"] = interface
    dist_autograd._init(number)  # type: ignore[attr-defined]
    options = rpc.TensorPipeRpcBackendOptions(  # no timeout: an expired call would not stop the remote work
        num_worker_threads=_HANDLER_THREADS, rpc_timeout=0, _transports=_TRANSPORTS, _channels=_CHANNELS
    )
    hush()
    agent = rpc.TensorPipeAgent(store, name, number, None, options, {}, [])  # type: ignore[attr-defined]
    with before_listening(Gate.close_before_listening):
        api._init_rpc_states(agent)  # type: ignore[no-untyped-call]
    return agent


class RpcProcess(Served):
    """This process's part in torch RPC: its agent, the group it is in, what it serves.

    torch has one agent per process, so there is one instance, ``this_process``. The main thread joins and leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.agent: _Agent | None = None

    def join(self, store: ExchangeStore, roster: Roster, *, interface: str) -> None:
        """Form the group of ``roster``; return once all others' addresses are in ``store``, and they may connect.

        Raises StateError if this process is in a group already, and whatever ``store`` raises.
        """
        agent, running = self.agent, rpc._is_current_rpc_agent_set()  # type: ignore[attr-defined]
        if running and (agent is None or not agent.alone):
            raise StateError("this process already runs torch RPC; close the cluster, or call rpc.shutdown(), first")
        if agent is not None and not (running and agent.gate.listening):
            log.warning("torch's RPC agent has ended; a second one never lets RRefs go: use a fresh process")
            self._stop_agent()
            agent = None
        if agent is None:
            agent = self.agent = _Agent(store, roster.own, interface)
        elif agent.interface != interface:
            raise StateError(
                f"this process's torch RPC listens on {agent.interface} and cannot change to {interface};"
                " use a fresh process for workers of another network"
            )
        else:
            agent.store.adopt(store)
        agent.admit(roster.seats.values())
        agent.gate.open()

    def leave(self) -> None:
        """Leave the group, whose other members have ended; the agent stays for the next one."""
        self.stop()
        if self.agent is not None:
            self.agent.gate.close()
            self.agent.part()

    def shutdown(self) -> None:
        """Leave, and end the agent: this process uses torch RPC no longer."""
        self.leave()
        self._stop_agent()

    def _stop_agent(self) -> None:
        if self.agent is not None:
            self.agent = None
            with contextlib.suppress(RuntimeError):  # somebody else has done it
                rpc.shutdown(graceful=False)


this_process = RpcProcess()


# --- handlers: called by torch's threads, never block. Pickled by name: they stay functions of this module ---


def _receive_answer(stamp: str, number: int, error: str, outcome: Any) -> None:
    this_process.answer(stamp, number, error, outcome)


def _receive(stamp: str, verb: str, args: tuple[Any, ...]) -> Any:
    return this_process.dispatch(stamp, verb, args)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _receive_later(stamp: str, verb: str, args: tuple[Any, ...]) -> torch.futures.Future[Any]:
    answer: torch.futures.Future[Any] = torch.futures.Future()
    result = _receive(stamp, verb, args)
    if isinstance(result, Future):
        result.add_done_callback(lambda done: answer.set_result(done.result()))
    else:
        answer.set_result(result)
    return answer


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _receive_chained(stamp: str, verb: str, args: tuple[Any, ...]) -> torch.futures.Future[Any]:
    """Do as ``_receive_later`` once the RRefs among ``args`` have been fetched.

    They are fetched on this handler's thread, where the caller's context is in force, so the graph spans the workers.
    """
    leaves, spec = pytree.tree_flatten(args)
    fetches = [_fetch(leaf) if isinstance(leaf, _BINDINGS.PyRRef) else None for leaf in leaves]
    answer: torch.futures.Future[Any] = torch.futures.Future()

    def fetched(_: object) -> None:
        try:
            values = [leaf if fetch is None else _fetched(fetch) for leaf, fetch in zip(leaves, fetches, strict=True)]
            result = _receive(stamp, verb, pytree.tree_unflatten(values, spec))
        except Exception as error:
            answer.set_result(_raised_by_to_here(f"{type(error).__name__}: {error}"))
        else:
            result.add_done_callback(answered)

    def answered(done: Future[Any]) -> None:
        outcome = done.result()
        failed = isinstance(outcome, Failure)
        answer.set_result(_raised_by_to_here(str(StageError(outcome))) if failed else outcome)

    torch.futures.collect_all([fetch for fetch in fetches if fetch is not None]).add_done_callback(fetched)
    return answer


def _raised_by_to_here(message: str) -> internal.RemoteException:
    """Return the value for which ``to_here()``, called by the user on a handle, raises RuntimeError(message)."""
    # torch decodes the message's escapes, which mangles non-ASCII text unless it was escaped here.
    return internal.RemoteException(message.encode("unicode_escape").decode("ascii"), RuntimeError)


def _fetch(rref: Any) -> torch.futures.Future[Any]:
    # An owner sends its RRef to nobody: if the call that makes the value has not arrived yet, torch forgets the RRef
    # once this process has received it from itself, and makes another one for the value.
    owner = None if rref.is_owner() else rref.owner()
    answer: torch.futures.Future[Any]
    answer = _local_value(rref) if owner is None else rpc.rpc_async(owner, _local_value, args=(rref,))
    return answer


def _fetched(answer: torch.futures.Future[Any]) -> Any:
    internal._handle_exception(value := answer.value())  # type: ignore[no-untyped-call]  # torch does it for messages
    return value


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _local_value(rref: Any) -> torch.futures.Future[Any]:
    """Wait for the value on a thread of its own: calls made by hand are few, handlers must be free."""
    answer: torch.futures.Future[Any] = torch.futures.Future()

    def fetch() -> None:
        try:
            value = rref.local_value()
        except Exception as error:  # the call that makes the value has failed
            value = _raised_by_to_here(str(error))
        answer.set_result(value)

    threading.Thread(target=fetch, daemon=True).start()  # until the call that makes the value ends, or the process
    return answer


class _Pickler(TensorsAside):
    """Collects tensors beside the bytes, as torch's own RPC pickler, whose set-up costs more than the pickling."""

    def aside(self, tensor: torch.Tensor) -> tuple[Any, tuple[int]]:
        self.tensors.append(in_bounds(tensor))
        return _tensor, (len(self.tensors) - 1,)


def _tensor(index: int) -> torch.Tensor:
    """Return the message's tensor ``index``; runs while torch unpickles the message."""
    tensor: torch.Tensor = internal._thread_local_tensor_tables.recv_tables[index]
    return tensor


def _invoke(send: Any, to: str, function: Any, args: tuple[Any, ...]) -> Any:
    """Call ``send``, the binding in which ``rpc_async`` or ``remote`` ends; return its future or RRef.

    A call costs the compute thread 0.5 ms through the public functions, 0.27 ms this way.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(internal.PythonUDF(function, args, {}))
    later = hasattr(function, "_wrapped_async_rpc_function")
    if not rpc._is_current_rpc_agent_set():  # type: ignore[attr-defined]
        raise StateError(_SHUT_DOWN)
    return send(api._to_worker_info(to), buffer.getvalue(), pickler.tensors, 0.0, later)  # type: ignore[no-untyped-call]


def _context() -> int | None:
    """Return the id of this thread's distributed-autograd context, if any; only a message by RPC makes it known."""
    if int(_AUTOGRAD._get_debug_info()["num_autograd_contexts"]):  # of any thread: the quicker question
        with contextlib.suppress(RuntimeError):
            return int(_AUTOGRAD._current_context()._context_id())
    return None


_contexts = Contexts(dist_autograd.context, _context, _AUTOGRAD._release_context)


class RpcTransport:
    """Messages between the processes of ``roster``, as seen from one of them."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self._replies = Replies()
        self._lanes = Lanes(roster)
        self._calls = LaneCalls(roster, self._lanes, self._replies, self._dispatch, self._answer)
        self._waiting = Waiting(lambda seconds: self._lanes.receive(seconds, interruptible=True), self._lanes.wake)

    def serve(self, name: str, endpoint: Endpoint) -> None:
        this_process.serve(endpoint, self.roster)
        this_process.expect(self._calls, self.roster)
        self._lanes.serve(lambda verb, args: self._calls.run(verb, args) or self._dispatch(verb, args))

    def _dispatch(self, verb: str, args: tuple[Any, ...]) -> Any:
        return this_process.run(self.roster, verb, args)

    def _answer(self, to: str, number: int, error: str, outcome: Any) -> None:
        """Answer a call that came by a lane."""
        with contextlib.suppress(RuntimeError):  # who asked has ended
            self._invoke_call(to, _receive_answer, number, error, outcome)

    def admit(self, seats: Mapping[str, Seat], without: Collection[str] = ()) -> list[Seat]:
        """Let processes stand for names from now on, none for those ``without``; return the seats left, of the dead.

        The addresses are in the store. Threads that send meanwhile reach the dead or the successor.
        """
        agent = this_process.agent
        assert agent is not None, "a group is joined first"
        agent.admit(seats.values())
        former = self.roster.seats
        gone = self.roster.seat(seats, without)
        self._lanes.forget({*seats, *without, *(former.keys() - self.roster.seats.keys())})
        for name in seats:
            self._replies.forget(name)
        agent.part(gone)
        return gone

    @property
    def gate(self) -> Gate:
        """Return the gate through which processes connect to this one, open while they do."""
        assert this_process.agent is not None, "a group is joined first"
        return this_process.agent.gate

    def leave(self) -> None:
        self._lanes.close()
        this_process.leave()

    def lose(self, worker: str, error: WorkerLost) -> None:
        self._replies.lose(worker, error)
        self._lanes.lose(worker)
        self._calls.lose(worker)

    def is_near(self, to: str) -> bool:
        return self._lanes.reach(to)

    def send(self, to: str, verb: str, *args: Any) -> None:
        if not (verb in _BY_LANE and self._lanes.send(to, verb, args)):
            self._invoke_call(to, _receive, verb, args)

    def receive(self, timeout: float | None) -> bool:
        return self._lanes.receive(timeout)

    def wake(self) -> None:
        self._lanes.wake()

    def call(self, to: str, verb: str, *args: Any) -> Future[Any]:
        reply = self._replies.open(to)
        by_lane = verb in _CALLS_BY_LANE and _context() is None and self._calls.call(to, reply, verb, args)
        if not (by_lane or reply.done()):
            answer = self._invoke_call(to, _receive_later, verb, args)
            answer.add_done_callback(lambda done: self._complete(to, reply, done))
        return reply

    def _invoke_call(self, to: str, function: Any, *args: Any) -> Any:
        message = (self.roster.stamp(to), *args)
        return _invoke(_BINDINGS._invoke_rpc_python_udf, self.roster.seats[to].wire, function, message)

    def _complete(self, to: str, reply: Future[Any], answer: torch.futures.Future[Any]) -> None:
        try:  # on a thread of the agent
            outcome = answer.value()
        except Exception as raised:
            # Usually a death, which the monitor reports in a moment; only what is no death is reported as it is.
            self._replies.fail(to, reply, RpcPipeError(f"the call to {to} failed: {raised}"), after=_GRACE)
        else:
            self._replies.complete(to, reply, outcome)

    def remote(self, to: str, verb: str, *args: Any, later: bool = False) -> object:
        how, message = _receive_later if later else _receive, (self.roster.stamp(to), verb, args)
        try:
            return _invoke(_BINDINGS._invoke_remote_python_udf, self.roster.seats[to].wire, how, message)
        except RuntimeError as broken:  # unlike a call, at once; a call tells the cause
            raise self.call(to, "clock").exception() or broken from None

    def remote_chained(self, to: str, verb: str, *args: Any) -> object:
        message = (self.roster.stamp(to), verb, pytree.tree_map(in_bounds, args))
        return rpc.remote(self.roster.seats[to].wire, _receive_chained, args=message)

    def wait(self, replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
        return self._waiting.wait(replies, timeout)

    def context(self) -> AbstractContextManager[int]:
        return _contexts.new()

    def accumulate(self, context_id: int, root: torch.Tensor) -> None:
        dist_autograd.backward(context_id, [root])  # type: ignore[attr-defined]

    def get_gradients(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]:
        gradients: Mapping[torch.Tensor, torch.Tensor] = dist_autograd.get_gradients(context_id)  # type: ignore[attr-defined]
        return gradients
