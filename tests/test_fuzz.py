"""A taste of tests/fuzz.py, so that it keeps running."""
import fuzz


def test_bad_input_is_read_or_refused(world, chain):
    counts, failures = fuzz.run_all(12 * len(fuzz.READERS), chain, world)
    assert not failures, failures[0]
    assert all(sum(outcomes.values()) == 12 for outcomes in counts.values())
    assert sum(outcomes["refused"] for outcomes in counts.values()) > 40
