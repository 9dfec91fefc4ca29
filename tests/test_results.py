import json

import pytest

from em_lightning.studies import combine, markdown_table, write_results

ROWS = [{"method": "EM", "score": 1.23456, "count": 3}, {"method": "other", "score": -2.0, "count": 4}]


def test_a_table_is_written_for_people_and_for_programs(tmp_path):
    text = write_results(tmp_path / "new", "Title", ["A note."], ROWS, seed=7)
    assert (tmp_path / "new" / "results.md").read_text() == text
    assert text.startswith("# Title\n\nA note.\n\n| method | score | count |\n|---|---|---|\n| EM | 1.235 | 3 |")
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["rows"] == ROWS and content["seed"] == 7


def test_seeds_are_combined_as_mean_and_deviation(tmp_path):
    for seed, score in enumerate((1.0, 2.0, 3.0)):
        write_results(tmp_path / str(seed), "Title", [], [{"method": "EM", "score": score}])
    paths = [tmp_path / str(seed) / "results.json" for seed in range(3)]
    assert combine(paths) == [{"method": "EM", "score": "2 ± 1"}]
    assert combine(paths[:1]) == [{"method": "EM", "score": "1"}]
    assert "| EM | 2 ± 1 |" in markdown_table(combine(paths))


def test_different_tables_are_not_combined(tmp_path):
    write_results(tmp_path / "a", "Title", [], [{"method": "EM", "score": 1.0}])
    write_results(tmp_path / "b", "Title", [], [{"method": "other", "score": 1.0}])
    with pytest.raises(ValueError, match="different rows"):
        combine([tmp_path / "a" / "results.json", tmp_path / "b" / "results.json"])
