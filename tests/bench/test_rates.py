"""Counts beside the time, and the row in which they stand."""

from __future__ import annotations

import json

import pytest
import torch


def test_calls_from_python_are_counted_and_those_of_operators_are_not(bench):
    x, layer = torch.ones(2, 3), torch.nn.Linear(3, 3)
    assert bench("counts").calls(lambda: x.add(1).mul(2), "cpu") == {"operator_calls": 2}
    # linear is one call, whatever it calls in turn.
    with torch.no_grad():
        assert bench("counts").calls(lambda: layer(x), "cpu") == {"operator_calls": 1}


def test_reads_of_the_device_are_counted(bench):
    x = torch.ones(3)
    assert bench("counts").host_syncs(lambda: x.sum().item() + float(x[0]), "cpu") == 2
    assert bench("counts").host_syncs(lambda: x.sum() + x[0], "cpu") == 0


@pytest.fixture
def row(bench):
    timing, rates = bench("timing"), bench("rates")
    first = rates.Measured(timing.Times(wall=[0.4, 0.2, 0.3]), mebibytes=10.0, syncs=3, ceiling=2e12)
    second = rates.Measured(timing.Times(wall=[0.1, 0.1, 0.2]), calls={"operator_calls": 7}, ceiling=1e12)
    setting = {"batch": 30, "GFLOP": 2.0, "device": "cpu"}
    third = rates.Measured(remark="out of memory")
    return rates.RateRow("throughput", setting, {"third": third, "first": first, "second": second})


def test_a_row_has_rates_mfu_and_ratios_within_the_rounds(row):
    assert row.rates("first") == pytest.approx({"median": 100, "min": 75, "max": 150})
    assert row.mfu("first") == pytest.approx(100 * 2e9 / 2e12)
    assert row.mfu("second") == pytest.approx(300 * 2e9 / 1e12)
    assert row.faster("second") == pytest.approx({"median": 2, "min": 1.5, "max": 4})


def test_who_was_not_timed_says_why(row):
    lines = {line[2]: line for line in row.lines()}
    assert all(len(line) == len(row.HEAD) for line in lines.values())
    assert lines["third"][3] == "" and lines["third"][-1] == "out of memory"
    assert lines["first"][3].startswith("100 ") and lines["second"][5] == "60.0 %"
    record = json.loads(json.dumps(row.to_dict()))["contestants"]
    assert "images_per_second" not in record["third"] and record["second"]["mfu"] == pytest.approx(0.6)


def test_a_report_keeps_every_kind_of_row(bench, row, tmp_path):
    report, ceilings = bench("report"), bench("ceilings")
    written = report.Report(tmp_path, "here")
    found = ceilings.measure(written, device="cpu", tiny=True)
    written.add(row)
    (path,) = tmp_path.glob("*-here.json")
    record = json.loads(path.read_text())
    assert [entry["bench"] for entry in record["rows"]] == ["ceilings", "throughput"]
    assert record["date"] in path.name and record["environment"]["processor"]
    assert found.of("fp32") == record["rows"][0]["flops"]["fp32"] > 0
    assert "| ceiling | setting | measured |" in path.with_suffix(".md").read_text()
    assert "| throughput | batch=30 GFLOP=2.0 | second |" in path.with_suffix(".md").read_text()
