from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rpcpipe as rp
from rpcpipe.__main__ import main


def test_a_schedule_is_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, page = tmp_path / "s.csv", tmp_path / "s.html"
    assert (
        main(["schedule", "interleaved", "--workers", "2", "--chunks", "4", "--csv", str(csv), "--html", str(page)])
        == 0
    )
    out = capsys.readouterr().out
    assert "interleaved: 2 workers, 4 stages, 4 micro-batches" in out
    assert rp.schedules.get("interleaved", 2, 4, 2).simulate().to_text() in out
    assert page.exists()
    assert main(["schedule", str(csv)]) == 0
    assert "s: 2 workers, 4 stages, 4 micro-batches" in capsys.readouterr().out


def test_the_table_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--list", "--workers", "4", "--chunks", "6"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in rp.schedules.names())
    assert "needs at least 8 micro-batches" in out


def test_wrong_arguments_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "zigzag"]) == 2
    assert "unknown schedule 'zigzag'" in capsys.readouterr().err
    assert main(["schedule", "no-such-file.csv"]) == 2


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rpcpipe", "schedule", "1f1b"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "bubble 27.3%" in done.stdout


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "24", "--hidden", "1024", "--heads", "16", "--vocab", "50257", "--seq", "1024"]
    machine = [
        "--workers",
        "8",
        "--memory",
        "16GiB",
        "--flops",
        "125e12",
        "--bandwidth",
        "16e9",
        "--batch",
        "64",
        "--draw",
    ]
    assert main(["plan", "gpt", *sizes, *machine]) == 0
    out = capsys.readouterr().out
    assert "GPT of 0.41 billion parameters" in out
    assert "why" in out
    assert "worker 0 |" in out
    assert main(["plan", "gpt", *sizes, *machine, "--memory", "100MB"]) == 2
    assert "What would do" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "gpt", *sizes, *machine, "--memory", "much"])


def test_plan_by_dtype_and_undo_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, found = tmp_path / "memory.svg", {}
    for dtype, undo in (("float32", "copy"), ("float32", "off"), ("bfloat16", "copy"), ("float16", "off")):
        assert main(["plan", "gpt", *SIZES, "--dtype", dtype, "--undo", undo, "--svg", str(picture)]) == 0
        out = capsys.readouterr().out
        assert f"  undo            {undo}" in out
        table = out.partition("memory of a worker at its peak\n")[2].splitlines()
        found[dtype, undo] = [float(cell) for cell in re.findall(r"([0-9.]+) MiB", table[1])]
        assert ("copy" in table[0]) == (undo == "copy")
        assert "<title>worker 0: weights" in picture.read_text()
    weights = {key: figures[0] for key, figures in found.items()}
    assert weights["bfloat16", "copy"] == weights["float16", "off"] == weights["float32", "copy"] / 2
    assert found["float32", "copy"][-1] > found["float32", "off"][-1] > found["float16", "off"][-1]
    assert "choose from" in refusal(capsys, ["plan", "gpt", *SIZES, "--dtype", "int8"])
    assert "choose from" in refusal(capsys, ["plan", "gpt", *SIZES, "--undo", "maybe"])


def test_plan_for_several_hosts_counts_snapshots(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt", *SIZES, "--hosts", "2"]) == 0
    assert "snapshots" in capsys.readouterr().out.partition("memory of a worker at its peak\n")[2].splitlines()[0]
    assert "--hosts=3 are more than the 2 workers" in refusal(capsys, ["plan", "gpt", *SIZES, "--hosts", "3"])


SIZES = ["--layers", "4", "--hidden", "64", "--heads", "4", "--vocab", "100", "--seq", "16", "--workers", "2"]
SIZES += ["--memory", "1GiB", "--flops", "1e12", "--bandwidth", "1e9", "--batch", "8"]
WRONG = {
    "whole": ("0", "-1", "1.5", "nan", "x", "", "9" * 30, "True"),
    "positive": ("0", "-1", "nan", "inf", "x", ""),
    "not negative": ("-1", "nan", "inf", "x", ""),
    "share": ("0", "-1", "nan", "inf", "1.01", "x"),
    "bytes": ("lots", "0", "-1", "1.2.3", "", "5XB", "nan"),
}
PLAN = {
    **dict.fromkeys(("layers", "hidden", "heads", "vocab", "seq", "workers", "batch", "chunks"), "whole"),
    "replicas": "whole", "hosts": "whole",
    "flops": "positive", "bandwidth": "positive", "latency": "not negative", "efficiency": "share", "memory": "bytes",
}  # fmt: skip
DRAW = {"workers": "whole", "chunks": "whole", "virtual": "whole", "width": "whole", "latency": "not negative"}
COMMANDS = [(["plan", "gpt", *SIZES], name, kind) for name, kind in PLAN.items()]
COMMANDS += [(["schedule", "interleaved"], name, kind) for name, kind in DRAW.items()]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Return the one line that the command prints, which exits with 2."""
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse's
        status = int(str(error.code))
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, ""), arguments
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("rpcpipe")
    return captured.err


@pytest.mark.parametrize(("command", "name", "kind"), COMMANDS, ids=lambda value: str(value)[:12])
def test_every_number_is_refused_in_one_sentence(
    command: list[str], name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in WRONG[kind]:
        said = refusal(capsys, [*command, f"--{name}={value}"])
        assert f"--{name}" in said
        assert value[:100] in said


def test_costs_other_words_and_large_sizes_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for value in WRONG["not negative"]:
        assert "--costs" in refusal(capsys, ["schedule", "1f1b", "--costs", "1", value, "1"])
    assert "write such as 80GiB" in refusal(capsys, ["plan", "gpt", *SIZES, "--memory", "lots"])
    assert "a schedule has at most 1,048,576" in refusal(capsys, ["schedule", "1f1b", "--chunks", str(10**9)])
    assert "cannot be shared among heads" in refusal(capsys, ["plan", "gpt", *SIZES, "--heads", "7"])
    for arguments in ([], ["zigzag"], ["plan", "bert", *SIZES], ["plan", "gpt"], ["schedule", "1f1b", "--what"]):
        refusal(capsys, arguments)


def test_files_that_are_no_csv_are_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.csv"
    for content in (b"", b"x", b"0F0,\xff", b"0F0\n\x00", b'"' + b"x" * 200_000, b"0F0,0B0\n0F0,0B0", b"9999999999F0"):
        file.write_bytes(content)
        refusal(capsys, ["schedule", str(file)])
    refusal(capsys, ["schedule", str(tmp_path)])
    refusal(capsys, ["schedule", f"{tmp_path}.csv"])


@pytest.mark.parametrize("command", ["doctor", "worker", "plan", "schedule"])
def test_the_help_says_what_a_command_does_and_every_option_and_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    usage, _, rest = text.partition("-h, --help")
    assert len(usage.partition("] ")[2]) > 80  # a description
    for name, kind in {"plan": PLAN, "schedule": DRAW}.get(command, {}).items():
        assert re.search(rf"--{name} [A-Z]+ \w", rest), (name, kind)
    defaults = {"plan": ("0.5", "1e-05", "1536"), "schedule": ("4", "8", "(1, 1, 1)", "0.0", "100")}
    for value in defaults.get(command, ()):
        assert f"(default: {value})" in rest
    assert "default: None" not in rest
