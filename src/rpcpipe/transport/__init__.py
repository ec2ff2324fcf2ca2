"""How messages travel: ``base`` is the seam, ``rpc`` the real one, ``local`` a deterministic fake."""
