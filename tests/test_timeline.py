"""The report's timeline: every piece of work once, none beside another in a lane, no pauses."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from driftbook.batch import plan, shards
from driftbook.figures import timeline as drawn
from driftbook.publishing import timeline
from test_shards import finish, many  # noqa: F401

PIECES = st.lists(
    st.tuples(st.sampled_from("ab"), st.floats(0, 5000), st.floats(0.1, 400)), min_size=1
)


@given(PIECES)
@settings(max_examples=50, deadline=None)
def test_lanes_hold_one_piece_at_a_time_and_pauses_are_left_out(pieces):
    work = pd.DataFrame(pieces, columns=["host", "began", "seconds"])
    work = work.sort_values("began", kind="stable").reset_index(drop=True)
    work = work.assign(lane=drawn.lanes(work), start=drawn.without_pauses(work))
    for _, rows in work.groupby("lane"):
        assert rows.host.nunique() == 1
        ends = rows.began + rows.seconds
        assert (rows.began.iloc[1:].to_numpy() >= ends.iloc[:-1].to_numpy()).all()
    assert work.start.iloc[0] == 0
    assert work.start.is_monotonic_increasing
    gaps = work.start - (work.start + work.seconds).cummax().shift(fill_value=0.0)
    assert gaps.max() <= drawn.PAUSE + 1e-6
    steps = work.start.diff().fillna(0) - work.began.diff().fillna(0)
    assert (steps <= 1e-6).all(), "no time is put in"


def test_the_report_shows_what_the_marks_say(many):  # noqa: F811
    assert timeline.figure(many) is None, "nothing was done"
    plan.write(many, 2)
    assert timeline.figure(many) is None
    worked = finish(many, "train")
    work = timeline.work(many)
    assert set(work.run_id) == set(worked)
    assert work.stage.eq("train").all()
    assert work.seconds.ge(0).all()
    shown = timeline.figure(many)
    assert f"{len(worked)} pieces of work" in shown["caption"]
    assert "on 1 machine, at most 1 at once" in shown["caption"]
    assert work.host.iloc[0] not in shown["caption"]
    fig = drawn.timeline(work)
    bars = [bar for bars in fig.axes[0].containers for bar in bars]
    assert len(bars) == len(work)
    assert sum(bar.get_width() for bar in bars) == pytest.approx(work.seconds.sum() / 60)
    plt.close(fig)
    assert plan.write(many, 1) == ""
    again, once = (
        one.sort_values("began", ignore_index=True) for one in (timeline.work(many), work)
    )
    pd.testing.assert_frame_equal(again, once)
    assert shards.read_shards(many).workers == 1


def test_pieces_of_two_machines_at_other_times_are_not_at_once():
    rows = [("a", 0.0, 10.0), ("b", 1000.0, 10.0), ("a", 1005.0, 5.0), ("a", 1010.0, 5.0)]
    work = pd.DataFrame(rows, columns=["host", "began", "seconds"])
    assert timeline._most_at_once(work) == 2
    assert timeline._most_at_once(work[:2]) == 1
