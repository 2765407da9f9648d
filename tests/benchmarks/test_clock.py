"""What other processes take of the machine while something is timed."""

import pytest

from benchmarks.speed import clock


def test_load_of_others_is_their_share_of_all_processors(monkeypatch):
    readings = iter([(10.0, 100.0), (13.0, 110.0)])
    monkeypatch.setattr(clock, "_read_processor_s", lambda: next(readings))
    with clock.OtherLoad() as others:
        pass
    assert others.share == pytest.approx(0.3)
    monkeypatch.setattr(clock, "_read_processor_s", lambda: None)
    with clock.OtherLoad() as others:
        pass
    assert others.share is None
