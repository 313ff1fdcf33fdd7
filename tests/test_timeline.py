"""A controller's life cut into phases: no hole, no overlap."""

from orchestrator.page.timeline import Stretch, laid_over, phases


def test_phases_fill_a_controllers_life_and_refinements_take_nothing_from_it() -> None:
    events = [
        {"event": "phase", "time": at, "name": name} for at, name in ((1.0, "start"), (4.0, "step"), (3.0, "save"))
    ]
    found = phases(0.0, 9.0, events)
    assert [(one.start, one.end, one.name) for one in found] == [(0, 1, "other"), (1, 4, "start"), (4, 9, "save")]
    laid = laid_over(found, "eval", [(3.0, 5.0), (4.5, 6.0), (8.0, 20.0)], {"save"})
    assert [(one.start, one.end, one.name) for one in laid[2:]] == [(4, 6, "eval"), (6, 8, "save"), (8, 9, "eval")]
    assert all(one.end == following.start for one, following in zip(laid, laid[1:], strict=False))


def test_a_run_without_phase_events_has_a_timeline_from_the_others() -> None:
    told = (("reserve", 1.0), ("start", 2.0), ("initialise", 3.0), ("failure", 5.0), ("decision", 6.0))
    found = phases(0.0, 7.0, [{"event": event, "time": at, "attempt": 1} for event, at in told])
    assert found == [
        *(Stretch(0.0, 1.0, "reserve", 1), Stretch(1.0, 3.0, "start", 1), Stretch(3.0, 5.0, "step", 1)),
        *(Stretch(5.0, 6.0, "down", 1), Stretch(6.0, 7.0, "reserve", 1)),
    ]
