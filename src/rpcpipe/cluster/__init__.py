"""Start worker processes on this host or join those of several hosts, and watch over them while they live.

``launch`` and ``connect`` make a ``Cluster`` of ``Worker``s. It names what dies, hangs or prints, and ends
all workers with the driver. What runs on a worker is ``rpcpipe.worker``; this package does not know it.
"""

from rpcpipe.cluster.cluster import Cluster
from rpcpipe.cluster.connect import connect
from rpcpipe.cluster.launch import launch
from rpcpipe.cluster.rendezvous import Worker

__all__ = ["Cluster", "Worker", "connect", "launch"]
