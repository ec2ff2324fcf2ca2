"""Settings of training as attributes of a pipeline."""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar, overload

from rpcpipe.pipeline.deploy import change_settings

T = TypeVar("T")


class Setting(Generic[T]):
    """An attribute that reads a setting of a pipeline's runtime; a value set is checked, and holds from then on."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: Any) -> Self: ...

    @overload
    def __get__(self, instance: Any, owner: Any) -> T: ...

    def __get__(self, instance: Any, owner: Any) -> Self | T:
        if instance is None:
            return self
        value: T = getattr(instance.runtime.settings, self._name)
        return value

    def __set__(self, instance: Any, value: T) -> None:
        runtime = instance.runtime
        runtime.turn.run(self._name, change_settings, runtime, **{self._name: value})
