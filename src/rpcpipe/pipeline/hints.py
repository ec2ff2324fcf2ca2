"""What a pipeline says to who takes it for an ``nn.Module``, or sets what is fixed when it is made."""

from __future__ import annotations

import inspect
from typing import Any

# What modules and optimizers have, and a pipeline has under another name or not at all.
_INSTEAD = {
    "eval": "pipe(inputs), pipe.predict and pipe.evaluate run in eval mode, train_step and train in training mode",
    "parameters": "the parameters are on the workers: pipe.parameter_rrefs(), pipe.state_dict(), or"
    " pipe.stages[k].call(lambda module: …)",
    "buffers": "the buffers are on the workers: pipe.state_dict(), or pipe.stages[k].call(lambda module: …)",
    "modules": "the layers are on the workers: pipe.stages, and pipe.stages[k].call(lambda module: …)",
    "to": "a stage is on its worker's device: rp.launch(workers, device=…); for another dtype convert the model before"
    " Pipeline(model, …), or pass autocast=",
    "forward": "pipe(inputs) returns the model's output",
    "backward": "pipe.train_step(inputs, targets) runs forward, backward and update; by hand: with pipe.step() as s",
    "zero_grad": "gradients are cleared with every update; pipe.optimizer.zero_grad() drops accumulated ones",
    "requires_grad_": "freeze the model's parameters before Pipeline(model, …), or by pipe.stages[k].call",
    "generate": "rp.generate(pipe, prompts, …) returns a list of the prompts with what follows each",
    "save_pretrained": "pipe.save(directory) writes a checkpoint; a model of transformers here takes"
    " model.load_state_dict(pipe.state_dict()) and has save_pretrained",
    "fit": "for result in pipe.train(batches): …",
}
_SAME = {
    "named_parameters": "parameters", "named_buffers": "buffers",
    "children": "modules", "named_modules": "modules", "named_children": "modules",
    "cuda": "to", "cpu": "to", "half": "to", "float": "to", "double": "to", "bfloat16": "to", "device": "to",
    "apply": "modules",
}  # fmt: skip

# Arguments of a pipeline that a live one changes by another call.
_CHANGED_BY = {
    "balance": "pipe.resize(balance=[…]) cuts the model anew",
    "replicas": "pipe.resize(replicas=…) goes on with another number of replicas",
    "virtual_stages": "pipe.schedule = rp.schedules.get(name, workers, chunks, virtual_stages=…) has another number",
    "plan": "pipe.resize(plan=…) goes on as a plan says",
    "cluster": "pipe.resize(workers) goes on over more or fewer workers of the same cluster",
    "optimizer": "set its options by pipe.optimizer.param_groups; for another optimizer make a new Pipeline and"
    " pipe.load_state_dict",
    "stages": "pipe.resize(balance=[…]) cuts the model anew",
    "scaler": "pipe.scaler.load_state_dict(…) sets what it counts",
    "callbacks": "pipe.on_step(callback) adds one, and pipe.callbacks is a list to change",
}
_OWN = ("recipe", "runtime")


class Hints:
    """Refuses attributes that a pipeline does not have, and says what to use."""

    def __getattr__(self, name: str) -> Any:
        about = _INSTEAD.get(_SAME.get(name, name), "")
        raise AttributeError(
            f"a Pipeline has no attribute {name!r}{f': {about}' if about else ''}", name=name, obj=self
        )

    def __setattr__(self, name: str, value: Any) -> None:
        known = inspect.getattr_static(type(self), name, None)
        settable = hasattr(known, "__set__") and getattr(known, "fset", self.__setattr__) is not None
        if name not in _OWN and not settable:
            raise AttributeError(_why(type(self), name, value), name=name, obj=self)
        super().__setattr__(name, value)


def _why(kind: type, name: str, value: Any) -> str:
    given = f"pipe.{name} = {value!r:.80} is not possible"
    if name in _CHANGED_BY:
        return f"{given}: {_CHANGED_BY[name]}"
    if name in inspect.signature(kind).parameters:
        return f"{given}: it is decided when the Pipeline is made; make another one with {name}=…"
    return f"{given}: a Pipeline has no such setting; keep values of your own elsewhere"
