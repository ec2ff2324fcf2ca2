from __future__ import annotations

import rpcpipe as rp
from rpcpipe import _tables


def test_columns_line_up() -> None:
    assert _tables.text(("a", "bb"), [("ccc", "d"), ("e", "")]) == "  a    bb\n  ccc  d\n  e"


def test_markup_is_escaped() -> None:
    assert _tables.markup("<t>", ("a",), [("<b>",)]) == (
        "<b>&lt;t&gt;</b><table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>"
    )


def test_sizes() -> None:
    assert _tables.mebibytes(1 << 20) == "1.0 MiB"
    assert _tables.mebibytes(9 << 30) == "9.0 GiB"


def test_a_schedules_table() -> None:
    shown = repr(rp.schedules.get("interleaved", 2, 4, 2))
    assert shown.splitlines()[0] == "Schedule(interleaved: 2 workers, 4 stages, 4 micro-batches)"
    assert shown.splitlines()[2].startswith("  worker 0  0, 2    16       0F0 0F1 2F0 ")
