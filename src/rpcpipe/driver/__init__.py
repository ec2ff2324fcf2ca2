"""Runs steps: issues a schedule's calls to the workers, collects their reports, gates and applies the update."""

from rpcpipe.driver.callbacks import JsonLines, TensorBoard
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.result import StepResult, StreamResult
from rpcpipe.driver.runtime import Runtime

__all__ = ["Driver", "JsonLines", "Runtime", "StepResult", "StreamResult", "TensorBoard"]
