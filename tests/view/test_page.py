"""The page in a headless browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.cluster.liveness import ClusterEvent
from rpcpipe.view.file_source import FileSource
from rpcpipe.view.server import Server
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
MILLISECONDS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    playwright.expect.set_options(timeout=MILLISECONDS)
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as started,
    ):
        yield started


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page on which no script fails and nothing is refused by its policy."""
    made, complaints = browser.new_page(), list[str]()
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("console", lambda one: complaints.append(one.text) if "Content Security Policy" in one.text else None)
    yield made
    made.close()
    assert complaints == []


@pytest.fixture
def pipe() -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=sgd, chunks=4)


def train(pipe: rp.Pipeline, count: int = 1) -> list[rp.StepResult]:
    return [pipe.train_step(*batch) for batch in batches(count)]


def test_a_run_is_shown_as_it_goes_on(pipe: rp.Pipeline, page: Any) -> None:
    from playwright.sync_api import expect

    with rp.view(pipe) as view:
        page.goto(view.url)
        expect(page.locator("#state")).to_have_text("live")
        expect(page.locator("#timeline")).to_be_hidden()
        results = train(pipe, 3)
        expect(page).to_have_title("step 2 · rpcpipe")
        expect(page.locator("#title")).to_have_text(re.compile(r"2 stages, 4 micro-batches, 3 steps trained"))
        for name in ("planned", "measured"):
            expect(page.locator(f"svg.{name} rect.span")).to_have_count(16)  # forward and backward of 4 on 2 stages
        expect(page.locator("#tiles .tile").nth(1)).to_have_text(f"{float(f'{results[-1].loss:.4g}'):g}loss")
        expect(page.locator("#charts polyline")).to_have_count(4)
        expect(page.locator("#charts h2").nth(2)).to_have_text(re.compile("^Samples per second: [0-9]"))
        expect(page.locator("#workers tr")).to_have_count(3)
        expect(page.locator("#stages tr").nth(1)).to_contain_text("worker0")
        pipe.cluster.events.append(ClusterEvent("died", "<b>worker1</b>", "host", 7, "<script>"))  # type: ignore[attr-defined]
        train(pipe)
        expect(page).to_have_title("step 3 · rpcpipe")
        with pipe.step() as step:
            loss = step.forward_backward(*next(batches(1)))
            step.optimize()
        expect(page).to_have_title("step 4 · rpcpipe")
        expect(page.locator("#tiles .tile").nth(1)).to_have_text(f"{float(f'{loss:.4g}'):g}loss")
        expect(page.locator("#events li")).to_have_text(re.compile(r"died <b>worker1</b> \(host:7\) <script>"))
    expect(page.locator("#state")).to_have_text(re.compile("no connection"))


def test_token_ids_have_tokens_per_second(page: Any, tmp_path: Path) -> None:
    """Of a live run, and of its file."""
    from playwright.sync_api import expect

    pipe = rp.Pipeline(
        nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 4), nn.Flatten(0, 1)), LocalCluster(2), chunks=4,
        loss=lambda output, target: cross_entropy(output, target.flatten()), optimizer=sgd,
    )  # fmt: skip
    ids = torch.ones(8, 5, dtype=torch.long)
    with rp.view(pipe) as view:
        pipe.on_step(tmp_path / "run.jsonl")
        results = [pipe.train_step(ids, ids) for _ in range(2)]
        shown = f"{float(f'{40 / results[-1].seconds:.4g}'):g}"
        with closing(Server(FileSource(tmp_path / "run.jsonl"))) as server:
            for url, title in (view.url, re.compile("2 steps trained")), (server.url, "run.jsonl"):
                page.goto(url)
                expect(page.locator("#title")).to_have_text(title)
                expect(page.locator("#tiles .tile").nth(3)).to_have_text(f"{shown}tokens per second")
                expect(page.locator("#charts h2").nth(2)).to_have_text(f"Tokens per second: {shown}")


def test_a_file_is_shown_without_what_it_does_not_have(pipe: rp.Pipeline, page: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    pipe.on_step(tmp_path / "run.jsonl")
    train(pipe, 3)
    server = Server(FileSource(tmp_path / "run.jsonl"))
    try:
        page.goto(server.url)
        expect(page).to_have_title("step 2 · rpcpipe")
        expect(page.locator("#title")).to_have_text("run.jsonl")
        expect(page.locator("#charts polyline")).to_have_count(4)
        for name in ("timeline", "workers", "stages", "events"):
            expect(page.locator(f"#{name}")).to_be_hidden()
        train(pipe)
        expect(page).to_have_title("step 3 · rpcpipe")
    finally:
        server.close()
