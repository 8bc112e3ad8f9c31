"""The report as HTML: what it says is the report's, and which tokens stay is what the model did."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

import tokenpass
from tests import tiny
from tests.page.pictures import png
from tokenpass import HiPrune, OptionError, Refusal, Report
from tokenpass.report_page import KeptTokens

GRID = (tiny.SIDE // tiny.PATCH,) * 2
KEEPS = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def report() -> Report:
    """Of four blocks, with a refusal that is added."""
    found = tokenpass.explain(tiny.encoder(depth=4), tiny.images(), method=HiPrune(keep=0.5))
    stack = 'File "<model>.py", line 3, in forward'
    return Report(found.graphs, [Refusal("it <rolls> & rolls", "roll_1", stack)])


def data_of(page: str) -> Any:
    (data,) = re.findall(r'<script id="data"[^>]*>(.*?)</script>', page)
    return json.loads(data)


def test_every_block_and_refusal_is_there(report: Report) -> None:
    """Breaks if a row, the proof or a refusal is left out, or markup in them gets through."""
    text = report._repr_html_()
    body = text.split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr>") == 4
    assert "-&gt;" in body
    assert "it &lt;rolls&gt; &amp; rolls" in text
    assert "roll_1" in text
    assert "&lt;model&gt;.py" in text
    assert "<rolls>" not in text
    assert "a grid of 4 x 4 positions" in text
    assert report._summary().splitlines()[0] in text


def test_rows_are_those_of_the_printed_table(report: Report) -> None:
    """Breaks if a notebook shows other tokens than the terminal."""
    printed = str(report)
    text = report._repr_html_()
    for row in report.graphs[0].blocks:
        tokens, *_ = row.cells
        assert tokens in printed
        assert f"<td>{tokens.replace('>', '&gt;')}</td>" in text


def test_equal_reasons_are_one_entry() -> None:
    """Breaks if forty equal refusals fill the page."""
    many = Report((), [Refusal("no grid", f"node_{n}") for n in range(40)])
    text = many._repr_html_()
    assert text.count("<details>") == 1
    assert "no grid (40 times)" in text
    assert "node_39" in text


@pytest.mark.slow
def test_kept_tokens_are_what_a_model_compiled_for_the_budget_keeps() -> None:
    """Breaks if the slider shows tokens of another budget, or another cost."""
    model, images = tiny.encoder(depth=4), tiny.images(1)
    found = tokenpass.kept_by_budget(model, images, keeps=KEEPS)
    assert [choice.keep for choice in found] == list(KEEPS)
    for choice in found[:-1]:
        torch._dynamo.reset()
        options: dict[str, Any] = {"keep": choice.keep, "inner": "eager"}
        alone = torch.compile(model, backend="tokenpass", options=options)
        with torch.no_grad():
            alone(images)
        assert list(choice.positions) == tokenpass.kept(alone)[0].tolist()
        cost = tokenpass.stats(alone)
        assert choice.flops == pytest.approx(cost.flops / cost.flops_before)
    assert found[-1].positions == tuple(range(tiny.TOKENS))


@pytest.mark.slow
def test_asking_for_kept_tokens_often_costs_no_recompilation() -> None:
    """Breaks if asking again and again uses up what Dynamo allows a model."""
    model, images = tiny.encoder(depth=4), tiny.images(1)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        (found,) = tokenpass.kept_by_budget(model, images, keeps=[0.5])
        assert len(found.positions) == tiny.TOKENS // 2


def test_page_holds_the_choices(report: Report) -> None:
    """Breaks if the data of the slider is not what was passed."""
    kept = [KeptTokens(0.5, (1, 2), 0.75), KeptTokens(0.25, (2,), 0.5)]
    page = tokenpass.html_report(report, title="a < b", image=png(16), kept=kept, grid=GRID)
    found = data_of(page)
    assert (found["rows"], found["columns"]) == GRID
    assert [choice["keep"] for choice in found["choices"]] == [0.25, 0.5]
    assert [choice["positions"] for choice in found["choices"]] == [[2], [1, 2]]
    assert "<title>a &lt; b</title>" in page
    assert report._repr_html_() in page


def test_page_without_a_picture(report: Report) -> None:
    """Breaks if a picture is needed."""
    page = tokenpass.html_report(report)
    assert 'id="keep"' not in page
    assert report._repr_html_() in page


def test_page_names_no_address(report: Report) -> None:
    """Breaks if the page refers to anything that is not in it."""
    page = tokenpass.html_report(report, image=png(4), kept=[KeptTokens(1.0, (0,), 1)], grid=GRID)
    used = re.findall(r"""(?:src|href)=["']?([^"'> ]{1,20})""", page)
    assert used
    assert all(address.startswith("data:") for address in used)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": b"text"}, "PNG, JPEG, GIF or WebP"),
        ({"image": png(4)}, "pass kept="),
        ({"image": png(4), "kept": [KeptTokens(1.0, (0,), 1.0)]}, r"grid=\(rows, columns\)"),
        (
            {"image": png(4), "kept": [KeptTokens(1.0, (9,), 1.0)], "grid": (3, 3)},
            "fewer tokens than were kept",
        ),
    ],
)
def test_what_does_not_fit_is_refused(report: Report, given: Any, message: str) -> None:
    """Breaks if a page is made that shows nothing, or something wrong."""
    with pytest.raises(OptionError, match=message):
        tokenpass.html_report(report, **given)


def test_only_pruning_keeps_tokens() -> None:
    """Breaks if gating is asked which tokens stay."""
    with pytest.raises(OptionError, match="only pruning"):
        tokenpass.kept_by_budget(tiny.encoder(), tiny.images(), method=tokenpass.Eventful())  # type: ignore[arg-type]
