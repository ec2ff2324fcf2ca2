"""Run steps: issue a schedule's calls to the workers, collect their reports, gate and apply the update."""

from rpcpipe.driver.callbacks import JsonLines, TensorBoard
from rpcpipe.driver.driver import Driver
from rpcpipe.driver.remote_batches import RemoteBatches
from rpcpipe.driver.result import StepResult, StreamResult
from rpcpipe.driver.runtime import Runtime

__all__ = ["Driver", "JsonLines", "RemoteBatches", "Runtime", "StepResult", "StreamResult", "TensorBoard"]
