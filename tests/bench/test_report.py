"""Tables, the closing sentence, findings about growth, and a text that is held to its JSON; pictures."""

import json
from pathlib import Path

import pytest

from charrnn_fast.bench import plots, report

README = Path(__file__).parents[2] / "README.md"
PAGE = "Before\n<!-- results: results/cpu.json -->\nold\n<!-- end of results -->\nAfter\n"


def test_the_table_has_a_column_for_every_side_and_shows_slower_results(content):
    table = report.cells(content)
    assert table[0] == [
        *("what", "configuration", "ms", "torch.nn.RNN", "JAX scan", "over the floor", "MB", "of torch.nn.RNN's")
    ]
    assert table[1][:5] == ["forward", "d2l", "2", "4.0 (3.6-4.4)", "2.0 (1.8-2.2)"]
    assert table[2][4:] == ["0.5 (0.5-0.6)", "2.00", "3.0", "0.40"]
    assert table[3][2:5] == ["150", "2.0 (1.8-2.2)", ""]
    assert table[4][2] == "not measured: the time was up"
    assert len({len(row) for row in table}) == 1
    text = report.text(content)
    assert "not run, JAX scan: jax is not installed (1 rows)" in text and all(row[1] in text for row in table)


def test_the_devices_time_is_a_column_of_its_own(content):
    """With the sides that have one; a side that could not be captured has an empty cell."""
    plain = report.cells(content)
    row = next(row for row in content["rows"] if "not_measured" not in row)
    (first, *others) = row["ratios"]
    row["device"] = {"charrnn_fast": {"ms": 0.5}, first: {"ms": 1.0, "ratio": "2.0 (1.9-2.1)"}}
    row["device"] |= {name: {"none": "it waits"} for name in others}
    table = report.cells(content)
    at = table[0].index("ms on the device")
    assert table[0][at : at + 2] == ["ms on the device", f"{first} there"]
    assert ["0.5", "2.0 (1.9-2.1)"] in [line[at : at + 2] for line in table]
    assert {len(line) for line in table} == {len(plain[0]) + 2}
    assert [line[:at] + line[at + 2 :] for line in table if line[2].startswith("not")] == [
        line for line in plain if line[2].startswith("not")
    ]


def test_the_sentence_names_the_fastest_and_where_it_is_not(content):
    assert report.sentence(content) == (
        "Fastest here: charrnn_fast in 2 of 3 rows, at 2.0 times the best other side's speed in the median row, but "
        "JAX scan is 2.0 times as fast as it (forward and backward santa)."
    )
    content["rows"] = content["rows"][:1]
    assert report.sentence(content).endswith("at the least 2.0 times (forward d2l).")
    content["rows"] = []
    assert report.sentence(content).startswith("Nothing was compared")


def test_growth_beyond_the_work_is_a_finding(content):
    (line,) = report.growth(content["sweeps"])
    assert "exponents 1.00, 2.00, of the work 1" in line
    assert line.endswith("FINDING: it grows faster than the work from 64 to 256")
    content["sweeps"][-1]["ms"] = 16.0
    assert "FINDING" not in report.growth(content["sweeps"])[0]


def test_a_text_is_held_to_its_json(content, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    report.write(content, tmp_path / "results" / "cpu.json")
    arguments = ["--readme", str(page)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    filled = page.read_text()
    assert filled.startswith("Before\n<!-- results") and filled.endswith("<!-- end of results -->\nAfter\n")
    assert "Recorded by `charrnn-fast bench`" in filled and "| forward | d2l | 2 | 4.0 (3.6-4.4) |" in filled
    content["rows"][0]["ms"] = 3.0
    report.write(content, tmp_path / "results" / "cpu.json")
    assert report.main([*arguments, "--check"]) == 1
    page.write_text("no block")
    assert report.main([*arguments, "--check"]) == 1
    assert "has no block" in capsys.readouterr().err


def test_readme_is_what_its_json_says():
    page = README.read_text()
    assert report.BLOCK.search(page), "README has no '<!-- results: FILE -->' block"
    assert report.filled(page, README.parent) == page, "run python -m charrnn_fast.bench.report --readme README.md"


def test_a_recorded_run_is_printed_and_drawn(content, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    content["rows"] += content.pop("grid")
    path.write_text(json.dumps(content))
    assert report.main([str(path), "--plots", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    names = ["speedup.png", "growth.png", "roofline.png", "grid.png"]
    assert [line.rpartition("/")[2] for line in out.splitlines()[-4:]] == names
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_a_sweep_that_lacks_a_side_is_drawn(content, tmp_path):
    pytest.importorskip("matplotlib")
    for row in content["sweeps"]:
        row["peer_ms"] = {}
    assert tmp_path / "growth.png" in plots.draw(content, tmp_path)


def test_pictures_without_data_are_not_drawn(content, tmp_path):
    pytest.importorskip("matplotlib")
    content["rows"], content["sweeps"] = [], []
    assert plots.draw(content, tmp_path) == []
