"""Any module as named layers that a pipeline takes: its forward, recorded on a sample and cut between submodules."""

from rpcpipe.model.splitting.any_module import layers_for, split

__all__ = ["layers_for", "split"]
