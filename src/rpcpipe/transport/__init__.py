"""Carry messages between the driver and its workers.

``base`` defines the seam, ``rpc`` implements it over torch RPC, ``local`` in one process, shuffling every
message. No other package knows which of the two it uses, except ``cluster``, which starts real workers.
"""

from rpcpipe.transport.base import Endpoint, Transport

__all__ = ["Endpoint", "Transport"]
