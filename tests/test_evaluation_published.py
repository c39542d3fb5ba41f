"""The paper's tables as data, against the paper's text, and their layout with our rows."""

from __future__ import annotations

import pytest

from recap_hf.evaluation.paper_tables import OurRow, paper_table
from recap_hf.evaluation.published import METRIC_KEYS, TRAINING_SETS, published_rows


def test_every_row_stands_in_the_paper(shared_dir):
    lines = (shared_dir / "paper" / "recap_paper.txt").read_text(encoding="utf-8").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(("Table 1.", "Table 2."))]
    for row in published_rows():
        printed = " ".join([row.label, *(row.printed[key] for key in METRIC_KEYS)])
        # A row follows the caption of its own table: Table 1 lies before Table 2.
        places = [number for number, line in enumerate(lines) if line.strip() == printed]
        assert len(places) == 1, printed
        assert starts[row.table - 1] < places[0] and (row.table == 2 or places[0] < starts[1]), printed
    in_paper = sum(line.startswith("RECAP (w/") for line in lines)
    assert in_paper == sum(bool(row.datastore) for row in published_rows()) == 14


def test_blocks_are_in_the_order_of_the_paper():
    blocks = list(dict.fromkeys((row.table, row.training_set) for row in published_rows()))
    assert blocks == [
        (1, "clotho"),
        (1, "audiocaps"),
        (1, "clotho+audiocaps"),
        (2, "audiocaps"),
        (2, "clotho"),
        (2, "clotho+audiocaps"),
    ]
    assert {row.training_set for row in published_rows()} == set(TRAINING_SETS)


def test_spider_is_the_mean_of_its_parts_for_the_others_and_never_for_recap():
    for row in published_rows():
        parts, printed = row.spider_from_parts, row.value("spider")
        if parts is None:
            assert row.method == "Eren et al."
        elif row.datastore:
            assert abs(parts - printed) > 0.001, row
        else:
            assert parts == pytest.approx(printed, abs=0.00101), row
    in_domain = [row for row in published_rows() if row.test_set == row.training_set == "clotho" and row.datastore]
    assert [row.printed["spider"] for row in in_domain] == ["0.214", "0.224"]
    assert [row.spider_from_parts for row in in_domain] == pytest.approx([0.260, 0.268])


def test_misprinted_spice_is_read_as_what_it_can_be():
    misprinted = [row for row in published_rows() if row.misprinted_spice]
    assert [row.printed["spice"] for row in misprinted] == ["0.988", "1.004"]
    assert [row.value("spice") for row in misprinted] == [0.0988, 0.1004]
    assert all(0 < row.value("spice") < 0.3 for row in published_rows() if row.value("spice") is not None)


def ours(**scores):
    seeds = [
        {**dict.fromkeys(METRIC_KEYS), **{key: value + step for key, value in scores.items()}} for step in (0, 0.02)
    ]
    return OurRow("AudioCaps", "w/ DS", seeds, 1045, "laion/clap-htsat-unfused")


def test_table_has_our_rows_in_their_block():
    table = paper_table("clotho", [ours(cider_d=0.3, spice=0.1)], notes=["list: Clotho evaluation"])
    methods = [row[1] for row in table.rows]
    assert len(methods) == 22
    place = methods.index("recap_hf: w/ DS")
    assert table.ours == [number == place for number in range(22)]
    assert (
        methods[place - 1] == "RECAP (w/ DSlarge)" and table.rows[place][0] == table.rows[place - 1][0] == "AudioCaps"
    )
    cells = dict(zip(table.header, table.rows[place], strict=True))
    # Two seeds, 0.30 and 0.32: mean 0.31, standard deviation 0.02 / sqrt(2).
    assert cells["CIDEr-D"] == "0.310 ±0.014"
    assert cells["BLEU-1"] == "-" and cells["Clips"] == "1045" and cells["Seeds"] == "2"
    assert cells["(CIDEr + SPICE) / 2 [a]"] == "0.2100"
    markdown = table.to_markdown()
    assert "0.988 [b]" in markdown and "[c] The caption" in markdown and "list: Clotho evaluation" in markdown


def test_other_test_sets_have_no_published_rows():
    table = paper_table("yard", [ours(cider_d=0.3)], with_published=False)
    assert len(table.rows) == 1 and table.title == "Evaluation on yard" and table.notes == []
    with pytest.raises(ValueError, match="the paper has no table on 'yard'; it has clotho, audiocaps"):
        paper_table("yard", [])
    assert "[c]" not in paper_table("audiocaps", []).to_markdown()
