"""``python -m rpcpipe``."""

from rpcpipe.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
