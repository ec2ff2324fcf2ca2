"""Where a model of transformers is cut: its parts in the order of its forward, and what each of them needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rpcpipe.model.hf.recipe import Recipe
from rpcpipe.model.hf.skeleton import Handler


@dataclass(frozen=True)
class Body:
    """The blocks: the path of their list, and how they are called.

    ``hidden`` is the name of the argument that takes the hidden states, "" for the first; ``width``: a block returns
    a tuple of so many values that begins with them, or them alone if it is 0.
    """

    path: str
    blocks: tuple[str, ...]
    hidden: str = ""
    width: int = 0

    def returned(self, hidden: Any, beside: Any = None) -> Any:
        """Return ``hidden`` as a block returns it, ``beside`` for the other values that it returns."""
        return (hidden, *[beside] * (self.width - 1)) if self.width else hidden

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Return the hidden states in a block's arguments, and the other arguments."""
        if self.hidden:
            return kwargs[self.hidden], args, {name: value for name, value in kwargs.items() if name != self.hidden}
        return args[0], args[1:], kwargs

    def passing(self) -> dict[str, Handler]:
        """Return handlers of the blocks that return their hidden states as they are."""
        return dict.fromkeys(self.blocks, lambda args, kwargs: self.returned(self.split(args, kwargs)[0]))

    @property
    def owner(self) -> str:
        """The path of the module that has the list of blocks."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Shortcut:
    """The module at ``path`` has the blocks and returns a ``kind`` with the result before the last part as ``key``."""

    path: str
    kind: type[Any]
    key: str

    def output(self, result: Any) -> Any:
        """Return the output with ``result`` in it."""
        return self.kind(**{self.key: result})


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The parts of a model in the order of its forward, by their paths, and what they need.

    ``embedding``: the path of the layer before the blocks, which has the children ``children`` of the module there, or
    is that module if there are none. ``tail``: the modules behind the blocks; ``live``: for each of them which
    earlier results go into it or into a later one, -1 for the last block's and else the place in ``tail``.
    ``idle``: modules with weights that the forward does not call. ``inputs``: what the model may be given.
    ``blocks_see_ids`` and ``tail_sees_ids``: input_ids are needed behind the embedding. ``records``: router logits
    go along with the hidden states. ``direct``: which modules of ``tail`` are called with the result before them and
    nothing else. ``shortcut``: what the last of them needs of the forward before it, if it is known. ``cache``: the
    argument of the forward that takes a key-value cache, "" if generation cannot use one. ``causal``: no token is
    known to see later ones. ``beside``: for every block, which leaves of its other arguments depend on weights of the
    part before the blocks, and which of the values that go along from there each of them is.
    """

    recipe: Recipe
    body: Body
    embedding: str
    children: tuple[str, ...]
    tail: tuple[str, ...]
    live: tuple[tuple[int, ...], ...]
    idle: tuple[str, ...]
    inputs: tuple[str, ...]
    blocks_see_ids: bool
    tail_sees_ids: bool
    records: bool
    direct: tuple[bool, ...]
    shortcut: Shortcut | None
    cache: str
    causal: bool
    beside: tuple[tuple[tuple[int, int], ...], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Anatomy:
        return self

    def __repr__(self) -> str:
        return f"Anatomy({self.recipe})"

    @property
    def values(self) -> tuple[int, ...]:
        """The values that go along from the part before the blocks, by their numbers in ``beside``."""
        return tuple(sorted({value for leaves in self.beside for _, value in leaves}))

    @property
    def stand_ins(self) -> tuple[str, ...]:
        """The paths of the modules that a skeleton has not."""
        return (*self.body.blocks, *self.tail, *self.idle)


def part_of(name: str, paths: Iterable[str]) -> str:
    """Return the one of ``paths`` that the tensor ``name`` is in, the innermost; "" if none."""
    return max((path for path in paths if name.startswith(f"{path}.")), key=len, default="")
