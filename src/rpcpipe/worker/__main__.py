"""Run ``python -m rpcpipe.worker``."""

from rpcpipe.worker.main import main

main()
