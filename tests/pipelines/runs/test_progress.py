"""What a person reads while a stage works and after it."""

import pytest

from pipelines.runs.progress import QUIET_S, Progress, bottleneck, duration


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (119, "119 s"), (121, "2 min"), (7300, "2.0 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_slowest_step_is_the_bottleneck_unless_most_of_the_time_was_start_up():
    steps = {"read": 1.0, "decode": 12.0, "model": 7.0}
    assert bottleneck(steps, 2, 14.0).endswith("(summed over 2 workers); bottleneck: decode")
    assert bottleneck(steps, 2, 40.0).endswith("bottleneck: start-up, 30 s")


def test_a_line_counts_shards_images_and_what_was_left_out(capsys):
    progress = Progress("embed", 4, skipped=2)
    progress.shard(90, left_out=10)
    first, line = capsys.readouterr().err.splitlines()
    assert first == "embed: 2 of 6 shards already done, skipped"
    assert line.startswith("embed: shards 1/4 · 100 images · ") and "10.00 % quarantined · ETA " in line
    progress.shard(300, shards=3)
    assert "shards 4/4 · 400 images" in (last := capsys.readouterr().err) and " took " in last


def test_a_quick_stage_says_its_first_line_and_its_last(capsys):
    progress = Progress("fit", 50)
    for _ in range(50):
        progress.shard(1000)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("fit: shards 1/50") and last.startswith("fit: shards 50/50")


def test_a_million_shards_take_some_hundred_lines(capsys):
    progress = Progress("fit", 1_000_000)
    for _ in range(1000):
        progress.said -= QUIET_S  # as if that long had passed
        progress.shard(1000, shards=1000)
    assert 190 <= len(capsys.readouterr().err.splitlines()) <= 210
