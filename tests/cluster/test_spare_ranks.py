"""What ``rp.connect`` is asked for, before any rank comes."""

from __future__ import annotations

from typing import Any

import pytest

import rpcpipe as rp


@pytest.fixture(autouse=True)
def _three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RPCPIPE_SECRET", raising=False)
    monkeypatch.delenv("RPCPIPE_SECRET_FILE", raising=False)


@pytest.mark.parametrize("given", [2, -1, 1.5, True, "1 or 2"])
def test_more_spares_than_ranks_beside_one_worker_are_refused(given: Any) -> None:
    with pytest.raises(rp.ArgumentError, match=r"spares=.* of WORLD_SIZE=3 ranks .* so 0 to 1 can be spares"):
        rp.connect(spares=given)


@pytest.mark.parametrize("given", ["2", "-1", "some"])
def test_so_are_those_of_the_environment(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPCPIPE_SPARES", given)
    with pytest.raises(rp.ArgumentError, match=f"RPCPIPE_SPARES='{given}'"):
        rp.connect()
    with pytest.raises(rp.RendezvousError, match="no secret"):
        rp.connect(spares=1)  # which goes before it


@pytest.mark.parametrize("given", [-1, "grow", 1.5])
def test_what_heal_cannot_be_is_refused(given: Any) -> None:
    with pytest.raises(rp.ArgumentError, match="heal"):
        rp.connect(heal=given)
