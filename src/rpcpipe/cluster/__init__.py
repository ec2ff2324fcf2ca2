"""Processes, hosts, and who is alive: workers are started, joined, watched and ended here."""

from rpcpipe.cluster.cluster import Cluster, Worker
from rpcpipe.cluster.connect import connect
from rpcpipe.cluster.launch import launch

__all__ = ["Cluster", "Worker", "connect", "launch"]
