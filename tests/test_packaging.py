"""The wheel and the sdist hold what they should, and the wheel runs without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site", "shared")

PROGRAM = """
import torch, transformers, rpcpipe as rp
config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0)
ids = torch.randint(0, 64, (4, 8))
with rp.launch(workers=2, threads=1) as cluster:
    pipe = rp.from_transformers(config, cluster, chunks=2, optimizer=torch.optim.SGD)
    print(pipe.train_step({"input_ids": ids}, {"labels": ids}).loss > 0, rp.__file__)
"""
EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"dev"})


def build(source: Path, out: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, so that nothing is written into the checkout."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "rpcpipe", ignore=LEFT))


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist, and of the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    build(checkout, out)
    return out


def wheel(folder: Path) -> zipfile.ZipFile:
    [file] = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def contents(folder: Path) -> dict[str, bytes]:
    with wheel(folder) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(folder: Path) -> Message:
    found = contents(folder)
    [name] = [name for name in found if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(found[name])


def test_the_wheel_has_every_file_of_the_package_and_no_other(dist: Path, checkout: Path) -> None:
    package = {str(path.relative_to(checkout / "src")) for path in (checkout / "src" / "rpcpipe").rglob("*")}
    wanted = {name for name in package if (checkout / "src" / name).is_file() and "__pycache__" not in name}
    assert "rpcpipe/py.typed" in wanted
    assert {name for name in contents(dist) if ".dist-info/" not in name} == wanted


def test_the_sdist_gives_the_wheel_of_the_checkout(
    dist: Path, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("direct")
    build(checkout, out, "--wheel")
    assert contents(out) == contents(dist)


def test_the_sdist_has_what_the_checks_need(dist: Path) -> None:
    [file] = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "README.md",
        "CHANGELOG.md",
        "docs/index.md",
        "examples/gpt.py",
        "mkdocs.yml",
        "scripts/test",
        "tests/conftest.py",
    ):
        assert name in found
    assert not [name for name in found if "__pycache__" in name or ".venv" in name]


def test_the_metadata_is_the_projects(dist: Path) -> None:
    found = metadata(dist)
    assert (found["Name"], found["Version"]) == (PROJECT["name"], PROJECT["version"])
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert found["Summary"] == PROJECT["description"]
    assert set(found.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert found.get_all("Classifier") == PROJECT["classifiers"]
    assert str(found.get_payload()).startswith("# rpcpipe")


def test_the_version_is_stated_once_more_in_the_package() -> None:
    import rpcpipe

    assert rpcpipe.__version__ == PROJECT["version"]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A new environment, which finds what this one has installed from an index, and nothing of the checkout."""
    found, venv = tmp_path / "dependencies", tmp_path / "venv"
    found.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "rpcpipe" not in entry.name and entry.suffix != ".pth":
            (found / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{found}\n")
    return venv


def test_the_wheel_and_its_extras_run_in_a_new_environment(dist: Path, environment: Path, tmp_path: Path) -> None:
    [file] = dist.glob("*.whl")
    python = str(environment / "bin" / "python")
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-compile"]
    # Without an index, so it fails unless the requirements of all extras are those that this environment has met.
    subprocess.run([sys.executable, *install, f"{file}[{','.join(EXTRAS)}]"], check=True, timeout=100)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(script)], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
    trained, where = done.stdout.split()
    assert trained == "True"
    assert Path(where).is_relative_to(environment)
    assert (environment / "bin" / "rpcpipe").exists()  # the command
