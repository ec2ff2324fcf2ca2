"""Put a forward's operations into groups, one for each layer, in an order in which they can run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush

import torch
from torch import nn

from rpcpipe.model.splitting.program import Operation, Ref, State, stand_ins
from rpcpipe.model.splitting.recording import Recording

# Which group an operation is in, by its number.
Groups = dict[int, int]


def grouped(model: nn.Module, recording: Recording) -> list[list[int]]:
    """Return the numbers of the operations of each layer, in an order in which the layers can run.

    A call of a submodule with parameters or buffers begins a group, and what follows joins it. Groups become one if
    they call the same module, unless one call needs the other and the module changes nothing of itself; if a buffer
    changes that they use; if one changes a tensor in place that the other uses; and if they need each other.
    """
    operations = _needed(recording)
    group_of = _in_order(model, operations)
    graph = _Graph(group_of, operations, recording)
    graph.join(_changed_together(recording, operations))
    for calls in _shared_calls(model, operations).values():
        stateful = any(True for _ in model.get_submodule(operations[calls[0]].target).buffers())
        changes = any(_of(name, operations[calls[0]].target) for name in recording.changed)
        for one in calls[1:]:
            if stateful or changes or calls[0] not in _ancestors(operations, one):
                graph.join([(calls[0], one)])
    return graph.layers()


def _needed(recording: Recording) -> dict[int, Operation]:
    """Return the operations without those that make numbers which nobody uses."""
    used = {ref.op for ref in stand_ins(recording.output) if isinstance(ref, Ref)}
    kept: dict[int, Operation] = {}
    for index, one in reversed(recording.operations.items()):
        if not one.number or index in used:
            kept[index] = one
            used |= {ref.op for ref in _refs(one)}
    return dict(sorted(kept.items()))


def _refs(one: Operation) -> Iterator[Ref]:
    return (used for used in stand_ins((one.args, one.kwargs)) if isinstance(used, Ref))


def _in_order(model: nn.Module, operations: Mapping[int, Operation]) -> Groups:
    """Return the group of each operation that makes tensors, in the forward's order, and of what asks for sizes."""
    group_of: Groups = {}
    current, began = 0, False
    for index, one in operations.items():
        if one.number or one.checks:
            continue
        if one.kind == "module" and _has_state(model.get_submodule(one.target)):
            current, began = (current + 1 if began else current), True
        group_of[index] = current
    return group_of | _of_sizes(operations, group_of)


def _of_sizes(operations: Mapping[int, Operation], group_of: Mapping[int, int]) -> Groups:
    """Return the groups of the operations on numbers: where these are used, if the tensors whose they are are there.

    Otherwise, and for checks, it is where the last of the tensors is made.
    """
    there = {(ref, group_of[index]) for index, one in operations.items() if index in group_of for ref in _refs(one)}
    tensors: dict[int, set[Ref]] = {}
    users = defaultdict[int, list[int]](list)
    for index, one in operations.items():
        for ref in _refs(one):
            users[ref.op].append(index)
        if index not in group_of:
            found = [tensors.get(ref.op, {ref}) for ref in _refs(one)]
            tensors[index] = {ref for refs in found for ref in refs}
    placed: Groups = {}
    for index in reversed(tensors):
        made = max((group_of.get(ref.op, 0) for ref in tensors[index]), default=0)
        groups = {placed[user] if user in placed else group_of[user] for user in users[index]}
        only = groups.pop() if len(groups) == 1 else made
        near = all((ref, only) in there or group_of.get(ref.op, 0) == only for ref in tensors[index])
        placed[index] = only if near else made
    return placed


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _of(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _shared_calls(model: nn.Module, operations: Mapping[int, Operation]) -> dict[str, list[int]]:
    """Return by path the calls of the modules that are called several times, and have what must be one."""
    calls = defaultdict[str, list[int]](list)
    for index, one in operations.items():
        if one.kind == "module":
            calls[one.target].append(index)
    return {path: found for path, found in calls.items() if len(found) > 1}


def _ancestors(operations: Mapping[int, Operation], operation: int) -> set[int]:
    """Return the operations whose results ``operation`` needs, directly or not."""
    needed = {index: {ref.op for ref in _refs(one) if ref.op in operations} for index, one in operations.items()}
    return _reachable(needed, operation)


def _changed_together(recording: Recording, operations: Mapping[int, Operation]) -> Iterator[tuple[int, int]]:
    """Yield pairs of operations that must be in one layer, because of what changes in place or is one graph."""
    users = defaultdict[Ref, list[int]](list)
    states = defaultdict[str, list[int]](list)
    for index, one in operations.items():
        for used in stand_ins((one.args, one.kwargs)):
            if isinstance(used, Ref):
                users[used].append(index)
            elif isinstance(used, State):
                states[used.name].append(index)
        if one.kind == "module":
            for name in recording.changed:
                if _of(name, one.target):
                    states[name].append(index)
        if one.target is torch.autograd.grad:  # of what has one graph, with all between
            yield from ((index, ref.op or next(iter(operations))) for ref in _refs(one))
    for name in recording.changed & states.keys():
        yield from ((states[name][0], other) for other in states[name][1:])
    for mutation, storage in recording.mutations:
        for ref, found in recording.storages.items():
            later = [user for user in users[ref] if user > mutation]
            if found == storage and ref.op < mutation and later:
                together = [mutation, *later, *([ref.op] if ref.op in operations else [])]
                yield from ((together[0], other) for other in together[1:])


class _Graph:
    """Groups of operations, which group needs which, and which have become one."""

    def __init__(self, group_of: Groups, operations: Mapping[int, Operation], recording: Recording) -> None:
        self._group_of = group_of
        self._parent = {group: group for group in group_of.values()}
        self._edges = {
            (group_of[ref.op], group_of[index])
            for index, one in operations.items()
            for ref in _refs(one)
            if ref.op in group_of
        }
        self._edges |= set(_readers_first(group_of, operations, recording))

    def root(self, operation: int) -> int:
        """Return what stands for the group of an operation."""
        return self._root(self._group_of[operation])

    def _root(self, group: int) -> int:
        while self._parent[group] != group:
            group = self._parent[group]
        return group

    def join(self, pairs: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> None:
        """Make one group of those of each pair of operations."""
        for one, other in pairs:
            a, b = sorted((self.root(one), self.root(other)))
            self._parent[b] = a

    def _successors(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {self._root(group): set() for group in self._parent}
        for source, target in self._edges:
            if (a := self._root(source)) != (b := self._root(target)):
                found[a].add(b)
        return found

    def layers(self) -> list[list[int]]:
        """Return the operations of each group, in an order in which they can run: that of the forward, if possible."""
        self._join_circles()
        members = defaultdict[int, list[int]](list)
        for operation in sorted(self._group_of):
            members[self.root(operation)].append(operation)
        successors = self._successors()
        waiting = dict.fromkeys(successors, 0)
        for targets in successors.values():
            for target in targets:
                waiting[target] += 1
        ready = [group for group, count in waiting.items() if not count]
        heapify(ready)
        order = []
        while ready:
            order.append(group := heappop(ready))
            for target in successors[group]:
                waiting[target] -= 1
                if not waiting[target]:
                    heappush(ready, target)
        return [members[group] for group in order]

    def _join_circles(self) -> None:
        """Make one group of those that need each other."""
        for _ in self._parent:
            successors = self._successors()
            reached = {group: _reachable(successors, group) for group in successors}
            circle = next(((a, b) for a in reached for b in reached[a] if a != b and a in reached[b]), None)
            if circle is None:
                return
            self._parent[max(circle)] = min(circle)


def _reachable(successors: Mapping[int, set[int]], start: int) -> set[int]:
    found, left = set[int](), [start]
    while left:
        for target in successors[left.pop()] - found:
            found.add(target)
            left.append(target)
    return found


def _readers_first(
    group_of: Groups, operations: Mapping[int, Operation], recording: Recording
) -> Iterator[tuple[int, int]]:
    """Yield (reader, changer) for each tensor that is used before it is changed in place."""
    changed = {storage for _, storage in recording.mutations}
    readers = defaultdict[int, list[int]](list)
    for index, one in operations.items():
        for ref in _refs(one):
            if (storage := recording.storages.get(ref)) in changed and storage is not None:
                readers[storage].append(index)
    for mutation, storage in recording.mutations:
        for reader in readers[storage]:
            if reader < mutation and mutation in group_of:
                yield group_of[reader], group_of[mutation]
