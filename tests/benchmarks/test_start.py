import json

import pytest

from benchmarks import start
from benchmarks.report import OURS


def test_the_table_has_medians_and_leaves_out_who_is_absent():
    rounds = [
        {OURS: {"wall_s": wall, "cpu_s": 5.0, "load_s": 1.0}, "other": {"absent": "No module"}}
        for wall in (3.0, 9.0, 4.0)
    ]
    *_, row = start.table(rounds).splitlines()
    assert row == f"| {OURS} |  | 1.00 |  | 4.00 (3.00 to 9.00) | 5.00 |  |"


@pytest.mark.slow
def test_starts_are_measured(tmp_path):
    names = (OURS, start.CACHED, start.COMMAND, start.COMMAND_CACHED)
    start.main(rounds=1, subject=names, quick=True, folder=tmp_path, child=None, weights=None)
    [found] = json.loads((tmp_path / "results" / "start.json").read_text())["rounds"]
    for name in names:
        assert found[name].get("wall_s", 0) > 0, found[name]
    stages = [found[OURS][stage] for stage in start.STAGES]
    assert 0 < sum(stages) < found[OURS]["wall_s"]
