"""torch.distributed.rpc: the only file that imports it.

The agent is built directly over a store of our own instead of by ``init_rpc``, whose process-wide
counters make a second group in one process wait for ever, and calls go to the binding below
``rpc_async``. The private names this takes are pinned by a test.

No exception crosses the wire (torch would rebuild it as ``type(message)``): endpoints answer with
``errors.Failure`` values. Handlers never block; where the answer takes time they return a future.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import itertools
import logging
import os
import pickle
import queue
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import cloudpickle
import psutil
import torch
from torch import nn
from torch.distributed import autograd as dist_autograd
from torch.distributed import rpc
from torch.distributed.rpc import api, internal
from torch.utils import _pytree as pytree

from rpcpipe.errors import Failure, RpcPipeError, StageError, WorkerLost
from rpcpipe.transport.interrupts import Deferred, Interruptible
from rpcpipe.transport.rpc_store import ExchangeStore
from rpcpipe.transport.torch_log import hush

# uv: the default shm transport keeps a core busy per process even when idle. basic: through the socket.
_TRANSPORTS, _CHANNELS = ["uv"], ["basic"]
# Handlers only file what they get, so two threads serve any number of messages.
_HANDLER_THREADS = 2
# Seconds that the process watch has to say that a worker has died.
_GRACE = 0.5

# The functions that rpc_async and remote end in.
_BINDINGS: Any = torch._C._distributed_rpc

# (generation, the object whose methods are the verbs)
_endpoint: tuple[str, Any] | None = None

log = logging.getLogger("rpcpipe")


DRIVER = "driver"


class _Membership:
    """This process's agent and the others it knows.

    The agent outlives the group: RRefs go through the first agent that a process had and no other
    (torch's RRefContext), so a second one would never tell owners that their RRefs are let go. Hence
    a group without fixed members, whose members each process enters itself under names and numbers
    that are never used again; nothing of torch's own protocol for that, which does not survive a
    death, is used.
    """

    def __init__(self, agent: Any, store: ExchangeStore, interface: str) -> None:
        self.agent, self.store, self.interface = agent, store, interface
        self._others: list[str] = []

    def admit(self, others: Mapping[str, int]) -> None:
        for name, number in others.items():
            self.agent._update_group_membership(rpc.WorkerInfo(name, number), [], {}, True)  # type: ignore[attr-defined]
            self._others.append(name)

    def part(self) -> None:
        """The others are dead. torch keeps their entries: it hands out references into its tables."""
        for name in self._others:
            # A message to the dead: the agent looks at a connection only when it is used, and would
            # keep its descriptors otherwise.
            with contextlib.suppress(RuntimeError):
                _invoke(_BINDINGS._invoke_rpc_python_udf, name, _receive, ("", "", ()))
        self._others = []

    @property
    def alone(self) -> bool:
        return not self._others

    @property
    def listening(self) -> bool:
        """Does the agent still listen? It stops for good when a stranger connects and goes."""
        port = int(self.store.said[f"addrs/{DRIVER}"].rpartition(":")[2])
        found = psutil.Process().net_connections("tcp")
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)


_membership: _Membership | None = None
_numbers = itertools.count(1)
_MOST = (1 << 15) - 1  # torch numbers workers in 16 bits


def fresh_numbers(names: Sequence[str]) -> dict[str, int]:
    """A number for the driver, 0, and for each worker one that this process has not given before."""
    found = {DRIVER: 0, **{name: next(_numbers) for name in names}}
    if max(found.values()) > _MOST:
        raise RpcPipeError(f"this process has launched {_MOST} workers, all that torch can number; start a fresh one")
    return found


def _wire_name(name: str, generation: str) -> str:
    """What torch calls a worker: another name in every generation.

    torch retries some messages by name; one to a worker that has died must not reach its successor.
    """
    return name if name == DRIVER else f"{name}-{generation[:8]}"


def join(store: ExchangeStore, name: str, numbers: Mapping[str, int], generation: str, *, interface: str) -> None:
    """Form the group of ``numbers``: returns once every other one has published its address in ``store``.

    Raises RpcPipeError if this process is in a group already, and whatever ``store`` raises.
    """
    global _membership
    known = _membership
    if rpc._is_current_rpc_agent_set() and (known is None or not known.alone):  # type: ignore[attr-defined]
        raise RpcPipeError("this process already runs torch RPC; close the cluster, or call rpc.shutdown(), first")
    if known is not None and not known.listening:
        log.warning(
            "torch's RPC agent has lost its listener, to a stranger's connection or a worker that died while it"
            " connected; a second agent works, but RRefs do not know their owners and are not let go there:"
            " start a fresh process when you can"
        )
        shutdown()
        known = None
    if known is None:
        agent = _make_agent(store, _wire_name(name, generation), numbers[name], interface)
        known = _membership = _Membership(agent, store, interface)
    elif known.interface != interface:
        raise RpcPipeError(
            f"this process's torch RPC listens on {known.interface} and cannot change to {interface};"
            " use a fresh process for workers of another network"
        )
    else:
        known.store.adopt(store)
    known.admit({_wire_name(other, generation): number for other, number in numbers.items() if other != name})


def _make_agent(store: ExchangeStore, name: str, number: int, interface: str) -> Any:
    os.environ["TP_SOCKET_IFNAME"] = interface
    dist_autograd._init(number)  # type: ignore[attr-defined]
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=_HANDLER_THREADS,
        rpc_timeout=0,  # deadlines are the driver's; an expired call would not stop the remote work
        _transports=_TRANSPORTS,
        _channels=_CHANNELS,
    )
    hush()
    agent = rpc.TensorPipeAgent(store, name, number, None, options, {}, [])  # type: ignore[attr-defined]
    api._init_rpc_states(agent)  # type: ignore[no-untyped-call]
    return agent


def leave() -> None:
    """Leave the group, whose other members have ended; the agent stays for the next one."""
    serve(None)
    if _membership is not None:
        _membership.part()


def shutdown() -> None:
    """End the agent, and with it this process's use of torch RPC."""
    global _membership
    leave()
    if _membership is not None:
        _membership = None
        rpc.shutdown(graceful=False)


def serve(endpoint: tuple[str, Any] | None) -> None:
    """From now on messages of the given generation go to the given endpoint."""
    global _endpoint
    _endpoint = endpoint


def _receive(generation: str, verb: str, args: tuple[Any, ...]) -> Any:
    if _endpoint is None or _endpoint[0] != generation:
        return None  # a message of a group that is no more
    return getattr(_endpoint[1], verb)(*args)


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _receive_later(generation: str, verb: str, args: tuple[Any, ...]) -> torch.futures.Future[Any]:
    answer: torch.futures.Future[Any] = torch.futures.Future()
    result = _receive(generation, verb, args)
    if isinstance(result, Future):
        result.add_done_callback(lambda done: answer.set_result(done.result()))
    else:
        answer.set_result(result)
    return answer


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _receive_chained(generation: str, verb: str, args: tuple[Any, ...]) -> torch.futures.Future[Any]:
    """Like ``_receive_later`` once the RRefs among ``args`` have been fetched.

    The fetches are issued on this handler's thread, where the caller's distributed-autograd context
    is in force, so the graph spans the workers; nothing waits here.
    """
    leaves, spec = pytree.tree_flatten(args)
    fetches = [rpc.rpc_async(leaf.owner(), _local_value, args=(leaf,)) if _is_rref(leaf) else None for leaf in leaves]
    answer: torch.futures.Future[Any] = torch.futures.Future()

    def fetched(_: object) -> None:
        try:
            values = [leaf if fetch is None else fetch.value() for leaf, fetch in zip(leaves, fetches, strict=True)]
            result = _receive(generation, verb, pytree.tree_unflatten(values, spec))
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
    """Of calls made by hand the user fetches the value himself, so torch's way of reporting applies.

    torch decodes the message's escapes, which mangles non-ASCII text unless it was escaped here.
    """
    return internal.RemoteException(message.encode("unicode_escape").decode("ascii"), RuntimeError)


def _is_rref(value: object) -> bool:
    return isinstance(value, rpc.PyRRef)  # type: ignore[attr-defined]


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def _local_value(rref: Any) -> torch.futures.Future[Any]:
    """Waits for the value on a thread of its own: calls made by hand are few, handlers must be free."""
    answer: torch.futures.Future[Any] = torch.futures.Future()
    threading.Thread(target=lambda: answer.set_result(rref.local_value()), daemon=True).start()
    return answer


class _Pickler(pickle.Pickler):
    """Tensors go beside the bytes, as in torch's own RPC pickler, whose set-up costs more than the pickling."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: self._beside, nn.Parameter: self._beside}

    def reducer_override(self, value: Any) -> Any:
        """What a script or a REPL defines is sent by value: a worker's ``__main__`` is another one."""
        if type(value).__module__ == "__main__" or getattr(value, "__module__", None) == "__main__":
            return cloudpickle.loads, (cloudpickle.dumps(value),)
        return NotImplemented

    def _beside(self, tensor: torch.Tensor) -> tuple[Any, tuple[int]]:
        self.tensors.append(tensor)
        return _tensor, (len(self.tensors) - 1,)


def _tensor(index: int) -> torch.Tensor:
    """Runs while torch unpickles a call."""
    found: torch.Tensor = internal._thread_local_tensor_tables.recv_tables[index]
    return found


def _invoke(send: Any, to: str, function: Any, args: tuple[Any, ...]) -> Any:
    """``rpc_async`` or ``remote``, at half of their cost: straight to the binding they end in.

    A call costs the compute thread 0.5 ms through the public functions (caches are cold after a
    kernel), 0.27 ms this way.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(internal.PythonUDF(function, args, {}))
    later = hasattr(function, "_wrapped_async_rpc_function")
    return send(api._to_worker_info(to), buffer.getvalue(), pickler.tensors, 0.0, later)  # type: ignore[no-untyped-call]


class RpcTransport:
    """Messages of one generation of workers, as seen from the driver or from a worker."""

    def __init__(self, generation: str) -> None:
        self._generation = generation
        self._lock = threading.Lock()
        self._pending: dict[str, set[Future[Any]]] = {}
        self._lost: dict[str, WorkerLost] = {}

    def _wire(self, to: str) -> str:
        return _wire_name(to, self._generation)

    def tell(self, to: str, verb: str, *args: Any) -> None:
        _invoke(_BINDINGS._invoke_rpc_python_udf, self._wire(to), _receive, (self._generation, verb, args))

    def post(self, to: str, verb: str, *args: Any) -> Future[Any]:
        reply: Future[Any] = Future()
        with self._lock:
            if to in self._lost:
                reply.set_exception(self._lost[to])
                return reply
            self._pending.setdefault(to, set()).add(reply)
        answer = _invoke(
            _BINDINGS._invoke_rpc_python_udf, self._wire(to), _receive_later, (self._generation, verb, args)
        )
        answer.add_done_callback(lambda done: self._settle(to, reply, done))
        return reply

    def _settle(self, to: str, reply: Future[Any], answer: torch.futures.Future[Any]) -> None:
        """Runs on a thread of the agent."""
        try:
            outcome, error = answer.value(), None
        except Exception as raised:
            outcome, error = None, raised
        with self._lock:
            if reply not in self._pending.get(to, ()):
                return  # failed by `lose` in the meantime
            if error is None:
                self._pending[to].discard(reply)
        if error is None:
            reply.set_result(outcome)
        else:
            # A broken connection is usually a death, which the watch reports in a moment with its
            # cause; only what is no death is reported as it is.
            late = threading.Timer(_GRACE, self._fail, (to, reply, RpcPipeError(f"the call to {to} failed: {error}")))
            late.daemon = True
            late.start()

    def _fail(self, to: str, reply: Future[Any], error: RpcPipeError) -> None:
        with self._lock:
            if reply not in self._pending.get(to, ()):
                return
            self._pending[to].discard(reply)
        reply.set_exception(error)

    def lose(self, worker: str, error: WorkerLost) -> None:
        """``worker`` is gone: its pending and future calls end with ``error``."""
        with self._lock:
            self._lost.setdefault(worker, error)
            pending = self._pending.pop(worker, set())
        for reply in pending:
            reply.set_exception(error)

    def hold(self, to: str, verb: str, *args: Any, later: bool = False) -> object:
        function = _receive_later if later else _receive
        call = (self._generation, verb, args)
        try:
            return _invoke(_BINDINGS._invoke_remote_python_udf, self._wire(to), function, call)
        except RuntimeError as broken:
            # Unlike a call, `remote` raises at once where the connection is known to be broken. What a call
            # makes of it is the cause: the death, if it is one.
            raise self.post(to, "clock").exception() or broken from None

    def chain(self, to: str, verb: str, *args: Any) -> object:
        return rpc.remote(self._wire(to), _receive_chained, args=(self._generation, verb, args))

    def wait(self, replies: Collection[Future[Any]], timeout: float) -> tuple[set[Future[Any]], set[Future[Any]]]:
        # Not torch's Future.wait, which ignores Ctrl-C until the call ends, and not concurrent.futures.wait,
        # which a Ctrl-C can leave with the futures' locks held. A SimpleQueue cannot be torn.
        first: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        with Deferred():
            for reply in replies:
                reply.add_done_callback(first.put)
        try:
            with Interruptible():
                first.get(timeout=timeout)
        except queue.Empty:
            pass
        done = {reply for reply in replies if reply.done()}
        return done, set(replies) - done

    def context(self) -> AbstractContextManager[int]:
        return dist_autograd.context()

    def file(self, context_id: int, root: torch.Tensor) -> None:
        dist_autograd.backward(context_id, [root])  # type: ignore[attr-defined]

    def collect(self, context_id: int) -> Mapping[torch.Tensor, torch.Tensor]:
        gradients: Mapping[torch.Tensor, torch.Tensor] = dist_autograd.get_gradients(context_id)  # type: ignore[attr-defined]
        return gradients
