"""Files that replace others in one step."""

import os

from recap_hf.files import replacing, write_text


def test_the_longest_names(tmp_path):
    for name in ("a" * 251 + ".txt", "字" * 83 + ".txt"):
        assert 252 <= len(os.fsencode(name)) <= 255
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_names_with_the_same_beginning_do_not_meet(tmp_path):
    first, second = (tmp_path / ("a" * 100 + end) for end in ("1", "2"))
    with replacing(first) as one, replacing(second) as other:
        one.write_text("1")
        other.write_text("2")
    assert (first.read_text(), second.read_text()) == ("1", "2")
    assert len(os.listdir(tmp_path)) == 2
