"""What the transitions of devices, and of what is measured change, word by word; see `row_changes`."""

from __future__ import annotations

import pytest
from row_changes import SECOND_NS, START_NS, Cases, Operation, RowChanges, raised
from row_changes import it as it  # the fixture

from mpmm.shared_state.layout import Device, Header, Instance
from mpmm.shared_state.poll_claims import claim_late_looks, claim_late_polls, times_of_polls
from mpmm.shared_state.transaction import Transaction

CASES = Cases()


# ---- devices ---------------------------------------------------------------------------------------------------


@CASES.case("""
    device 3: STATE=1 TOTAL_MB=5000 EXTERNAL_MB=nan EXTERNAL_LEAST_MB=nan CONFIGURED_AT=now MEASURED=1 UUID=6
      UUID[1]='uuid-9' NAME=5 NAME[1]='gpu 9'
    returns [3, 1]
""")
def describe_a_new_device(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.describe(t, [(b"uuid-9", b"gpu 9", 5000.0), (b"uuid-1", b"gpu", 8999.0)])


@CASES.case("""
    device 1: TOTAL_MB=9500 MEASURED=0
    returns [1]
""")
def describe_a_device_that_has_grown(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.describe(t, [(b"uuid-1", b"gpu", 9500.0)], measured=False)


@CASES.case("""
    device 0: TOTAL_MB=5000 USED_MB=0 SAMPLED=0 PEAK_MB=0 HIGHEST_MB=0 EXTERNAL_MB=nan EXTERNAL_LEAST_MB=nan
      RING_NEXT=0 CONFIGURED_AT=now UUID[1]='uuid-9' NAME=5 NAME[1]='gpu 9' RING=0 RING[178]=0 RING[180]=0
      RING[182]=0 RING[184]=0 RING[186]=0 RING[188]=0 RING[190]=0 RING[192]=0 RING[194]=0 RING[196]=0
      RING[198]=0 RING[200]=0 RING[202]=0 RING[204]=0 RING[206]=0 RING[208]=0 RING[210]=0 RING[212]=0
      RING[214]=0 RING[216]=0 RING[218]=0 RING[220]=0 RING[222]=0 RING[224]=0 RING[226]=0 RING[228]=0
      RING[230]=0 RING[232]=0 RING[234]=0 RING[236]=0 RING[238]=0 RING[240]=0 RING[242]=0 RING[244]=0
      RING[246]=0 RING[248]=0 RING[250]=0 RING[252]=0 RING[254]=0
    returns [0, 1]
""")
def describe_other_devices(it: RowChanges) -> Operation:
    """Device 0 is free, and its row another one's; on device 2 lies a copy."""
    it.sample(0, 800.0)
    return lambda t: it.to.devices.describe(t, [(b"uuid-9", b"gpu 9", 5000.0), (b"uuid-1", b"gpu", 8999.0)], True)


@CASES.case("""
    device 0: STATE=0
    device 3: TOTAL_MB=0
    returns [1]
""")
def describe_what_can_be_measured_beside_what_was_stated(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"stated", b"stated", 5000.0)], measured=False))
    it.active(devices=(3,))
    return lambda t: it.to.devices.describe(t, [(b"uuid-1", b"gpu", 8999.0)], True)


@CASES.case("""
    device 0: TOTAL_MB=5000 USED_MB=0 SAMPLED=0 PEAK_MB=0 HIGHEST_MB=0 EXTERNAL_MB=nan EXTERNAL_LEAST_MB=nan
      CONFIGURED_AT=now UUID[1]='uuid-9' NAME=5 NAME[1]='gpu 9' RING=0 RING[2]=0 RING[4]=0 RING[178]=0
      RING[180]=0 RING[182]=0 RING[184]=0 RING[186]=0 RING[188]=0 RING[190]=0 RING[192]=0 RING[194]=0
      RING[196]=0 RING[198]=0 RING[200]=0 RING[202]=0 RING[204]=0 RING[206]=0 RING[208]=0 RING[210]=0
      RING[212]=0 RING[214]=0 RING[216]=0 RING[218]=0 RING[220]=0 RING[222]=0 RING[224]=0 RING[226]=0
      RING[228]=0 RING[230]=0 RING[232]=0 RING[234]=0 RING[236]=0 RING[238]=0 RING[240]=0 RING[242]=0
      RING[244]=0 RING[246]=0 RING[248]=0 RING[250]=0 RING[252]=0 RING[254]=0
    returns [0, 1]
""")
def describe_a_device_in_the_row_of_another_with_many_figures(it: RowChanges) -> Operation:
    for place, mb in ((0, 100.0), (1, 200.0), (2, 300.0), (127, 400.0)):
        it.poke(it.tables.device(0) + Device.RING_NEXT, place)
        it.sample(0, mb)
    return lambda t: it.to.devices.describe(t, [(b"uuid-9", b"gpu 9", 5000.0), (b"uuid-1", b"gpu", 8999.0)], True)


@CASES.case("""
    device 0: STATE=0
    device 1: MEASURED=0
    returns [1]
""")
def describe_other_devices_that_are_stated_too(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"stated", b"stated", 5000.0)], measured=False))
    it.active(devices=(3,))
    return lambda t: it.to.devices.describe(t, [(b"uuid-1", b"gpu", 8999.0)], True, measured=False)


@CASES.case("""
    returns TableFullError
""")
def describe_more_devices_than_there_are_rows(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"uuid-3", b"gpu", 5000.0)]))
    return lambda t: raised(lambda: it.to.devices.describe(t, [(b"uuid-3", b"gpu", 1.0), (b"uuid-4", b"gpu", 1.0)]))


@CASES.case("""
    device 3: STATE=0
""")
def forget_what_was_stated(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"stated", b"stated", 5000.0)], measured=False))
    return lambda t: it.to.devices.forget_stated(t, 3)


@CASES.case("")
def forget_nothing_that_was_stated_and_is_in_use(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"stated", b"stated", 5000.0)], measured=False))
    it.active(devices=(3,))
    return lambda t: it.to.devices.forget_stated(t, 3)


@CASES.case("")
def forget_nothing_that_is_measured(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.forget_stated(t, 1)


@CASES.case("""
    device 1: TRIED=now-1
""")
def try_to_take_a_figure(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.note_try(t, 1, it.now - SECOND_NS)


@CASES.case("""
    device 1: UNRELATED_MB=70
""")
def note_what_is_unrelated(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.note_unrelated(t, 1, 70.0)


@CASES.case("""
    device 1: USED_MB=800 SAMPLED=now-0.5 PEAK_MB=800 HIGHEST_MB=800 EXTERNAL_MB=300 EXTERNAL_LEAST_MB=300
      RING_NEXT=1 RING=now-0.5 RING[1]=800
    returns True
""")
def take_a_figure(it: RowChanges) -> Operation:
    it.active()
    it.do(lambda t: it.to.devices.note_unrelated(t, 1, 70.0))
    return lambda t: it.to.devices.sample(t, 1, 800.0, it.now - SECOND_NS // 2)


@CASES.case("""
    device 1: USED_MB=700 EXTERNAL_MB=700 EXTERNAL_LEAST_MB=700 RING_NEXT=2 RING[2]=now-1 RING[3]=700
    returns True
""")
def take_a_second_figure(it: RowChanges) -> Operation:
    it.sample(1, 800.0)
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now - SECOND_NS)


@CASES.case("""
    returns False
""")
def take_a_figure_that_is_too_old(it: RowChanges) -> Operation:
    it.sample(1, 800.0)
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now - SECOND_NS - 1)


@CASES.case("""
    device 1: USED_MB=600 SAMPLED=now EXTERNAL_MB=600 EXTERNAL_LEAST_MB=600 RING_NEXT=3 RING[4]=now RING[5]=600
    returns True
""")
def take_a_figure_when_an_older_peak_counts_no_more(it: RowChanges) -> Operation:
    it.sample(1, 800.0)
    it.wait(40)
    it.sample(1, 700.0)
    return lambda t: it.to.devices.sample(t, 1, 600.0, it.now)


@CASES.case("""
    device 1: USED_MB=600 SAMPLED=now PEAK_MB=600 HIGHEST_MB=600 EXTERNAL_MB=600 EXTERNAL_LEAST_MB=600
      RING_NEXT=0 RING[254]=now RING[255]=600
    returns True
""")
def take_a_figure_into_the_last_place_of_the_ring(it: RowChanges) -> Operation:
    it.poke(it.tables.device(1) + Device.RING_NEXT, Device.RING_LENGTH - 1)
    return lambda t: it.to.devices.sample(t, 1, 600.0, it.now)


@CASES.case("""
    device 1: USED_MB=700 SAMPLED=now PEAK_MB=700 EXTERNAL_MB=700 EXTERNAL_LEAST_MB=700 RING_NEXT=2 RING[2]=now
      RING[3]=700
    returns True
""")
def take_a_figure_after_the_peak_was_reset(it: RowChanges) -> Operation:
    it.sample(1, 900.0)
    it.do(lambda t: it.to.devices.reset_peaks(t, 0b10))
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now)


@CASES.case("""
    device 1: USED_MB=700 PEAK_MB=700 HIGHEST_MB=700 RING_NEXT=2 RING[2]=now-3 RING[3]=700
    returns True
""")
def take_a_figure_while_one_loads(it: RowChanges) -> Operation:
    """It has begun before the answer was there, so it may have part of that."""
    it.sample(1, 300.0)
    it.loading()
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now - 3 * SECOND_NS, it.now - SECOND_NS)


@CASES.case("""
    device 1: USED_MB=700 PEAK_MB=700 HIGHEST_MB=700 EXTERNAL_MB=700 RING_NEXT=2 RING[2]=now-3 RING[3]=700
    returns True
""")
def take_a_figure_before_one_loads(it: RowChanges) -> Operation:
    it.sample(1, 300.0)
    it.loading()
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now - 3 * SECOND_NS, it.now - 5 * SECOND_NS // 2)


@CASES.case("""
    device 1: USED_MB=800 SAMPLED=now-6 PEAK_MB=800 HIGHEST_MB=800 EXTERNAL_MB=350 EXTERNAL_LEAST_MB=350
      RING_NEXT=2 RING[2]=now-6 RING[3]=800
    returns True
""")
def take_a_figure_of_which_more_is_unrelated_than_was_known(it: RowChanges) -> Operation:
    it.sample(1, 100.0)
    it.active()
    it.do(lambda t: it.to.devices.note_unrelated(t, 1, 350.0))
    return lambda t: it.to.devices.sample(t, 1, 800.0, it.now - 6 * SECOND_NS)


@CASES.case("""
    device 1: PEAK_MB=700 PEAK_RESET=now
""")
def reset_the_peak_of_a_device(it: RowChanges) -> Operation:
    for row, mb in ((0, 900.0), (1, 800.0), (1, 700.0)):
        it.sample(row, mb)
    return lambda t: it.to.devices.reset_peaks(t, 0b10)


@CASES.case("""
    device 0: PEAK_RESET=now
    device 1: PEAK_MB=700 PEAK_RESET=now
    device 2: PEAK_RESET=now
""")
def reset_all_peaks(it: RowChanges) -> Operation:
    for row, mb in ((0, 900.0), (1, 800.0), (1, 700.0)):
        it.sample(row, mb)
    return lambda t: it.to.devices.reset_peaks(t)


@CASES.case("""
    device 0: PEAK_RESET=now BASELINE_MB=900
    device 1: PEAK_RESET=now BASELINE_MB=800
""")
def take_a_baseline(it: RowChanges) -> Operation:
    for row, mb in ((0, 900.0), (1, 800.0), (2, 700.0)):
        it.sample(row, mb)
    row = it.loading(devices=(0, 1))
    it.do(lambda t: it.to.isolation.begin(t, row))
    return lambda t: it.to.isolation.set_baseline(t, row)


# ---- what comes back -------------------------------------------------------------------------------------------


@CASES.case("""
    device 1: USED_MB=700 SAMPLED=now RETURNING_MB=0 EXTERNAL_MB=700 EXTERNAL_LEAST_MB=700 RETURN_COUNT=0
      RING_NEXT=3 RING[4]=now RING[5]=700
    returns True
""")
def memory_comes_back(it: RowChanges) -> Operation:
    it.unload_two()
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now)


@CASES.case("""
    device 1: USED_MB=1000 SAMPLED=now PEAK_MB=1000 RETURNING_MB=0 EXTERNAL_MB=1000 EXTERNAL_LEAST_MB=1000
      RETURN_COUNT=0 RING_NEXT=3 RING[4]=now RING[5]=1000
    returns True
""")
def memory_does_not_come_back(it: RowChanges) -> Operation:
    it.unload_two()
    it.wait(60)
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now)


@CASES.case("""
    header: WRITTEN_OFF=700
    device 1: USED_MB=1000 SAMPLED=now PEAK_MB=1000 RETURNING_MB=0 EXTERNAL_MB=1000 EXTERNAL_LEAST_MB=1000
      RETURN_COUNT=0 RING_NEXT=3 RING[4]=now RING[5]=1000
    WRITTEN_OFF: value=700
    log mpmm NAMESPACE: 700 MB of 800 MB that were unloaded did not come back in time and are written off;
      memory_return_seconds sets the limit
    returns True
""")
def memory_is_written_off(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.members.lead(t, 2, b"made up", (True, True, False)))
    it.unload_two()
    it.wait(60)
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now)


@CASES.case("""
    device 1: USED_MB=1000 SAMPLED=now RETURNING_MB=700 RING_NEXT=3 RETURNS[1]=400 RING[4]=now RING[5]=1000
    returns True
""")
def memory_is_late(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.members.lead(t, 2, b"made up", (True, True, False)))
    it.unload_two()
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now)


@CASES.case("""
    device 1: USED_MB=1000 SAMPLED=now-2 RING_NEXT=3 RING[4]=now-2 RING[5]=1000
    returns True
""")
def a_late_figure_shows_what_comes_back(it: RowChanges) -> Operation:
    """The sample began before the second one was unloaded."""
    it.unload_two()
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now - 2 * SECOND_NS, it.now - SECOND_NS)


@CASES.case("""
    device 1: RETURNING_MB=0 RETURN_COUNT=0
""")
def no_figure_shows_what_comes_back(it: RowChanges) -> Operation:
    it.unload_two()
    it.wait(60)
    return lambda t: it.to.ledgers.expire(t)


@CASES.case("""
    device 1: RETURNING_MB=0 RETURN_COUNT=0
""")
def nobody_measures_what_comes_back(it: RowChanges) -> Operation:
    it.unload_two()
    return lambda t: it.to.ledgers.await_nothing(t)


# ---- measurements ----------------------------------------------------------------------------------------------


@CASES.case("""
    member 1: MEASURED_MB=70 PEAK_MB=70
""")
def measure_a_worker(it: RowChanges) -> Operation:
    return lambda t: it.to.measurements.measure(t, 1, {0: 30.0, 2: 40.0})


@CASES.case("""
    member 1: MEASURED_MB=70 PEAK_MB=70
""")
def measure_a_worker_whose_reference_is_the_pid_of_the_one_that_measures(it: RowChanges) -> Operation:
    """As in a container, whose pids are small."""

    def measure(t: Transaction) -> None:
        it.words[Header.LOCK_HOLDER] = 2
        it.to.measurements.measure(t, 1, {0: 30.0, 2: 40.0})

    return measure


@CASES.case("""
    member 1: MEASURED_MB=80
""")
def measure_a_worker_that_has_had_more(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.measurements.measure(t, 1, {0: 90.0}))
    return lambda t: it.to.measurements.measure(t, 1, {0: 80.0})


@CASES.case("""
    member 3: MEASURED_MB=520 PEAK_MB=520
    model 1: ESTIMATE_MB=520 KNOWN=1 MEASURED=1
    instance 1: MB=520
    ESTIMATED: model=1 value=520
""")
def measure_a_server(it: RowChanges) -> Operation:
    it.active(server=3)
    return lambda t: it.to.measurements.measure(t, 3, {0: 30.0, 1: 520.0})


@CASES.case("""
    member 3: MEASURED_MB=530 PEAK_MB=530 SHARES=210 SHARES[1]=320
    model 1: ESTIMATE_MB=640 KNOWN=1 MEASURED=1
    instance 1: MB=530 SHARES=210 SHARES[1]=320
    ESTIMATED: model=1 value=640
""")
def measure_a_server_on_two_devices(it: RowChanges) -> Operation:
    it.idle(server=3, devices=(0, 1))
    return lambda t: it.to.measurements.measure(t, 3, {0: 210.0, 1: 320.0}, it.now)


@CASES.case("""
    member 3: MEASURED_MB=100 PEAK_MB=100
""")
def measure_a_server_before_its_copy_was_loaded(it: RowChanges) -> Operation:
    row = it.active(server=3)
    loaded = it.tables.instances[row].loaded_at
    return lambda t: it.to.measurements.measure(t, 3, {1: 100.0}, loaded)


@CASES.case("""
    member 3: MEASURED_MB=100 PEAK_MB=100
    model 1: ESTIMATE_MB=100 KNOWN=1 MEASURED=1
    instance 1: MB=100
    ESTIMATED: model=1 value=100
""")
def measure_a_server_just_after_its_copy_was_loaded(it: RowChanges) -> Operation:
    row = it.active(server=3)
    loaded = it.tables.instances[row].loaded_at
    return lambda t: it.to.measurements.measure(t, 3, {1: 100.0}, loaded + 1)


@CASES.case("""
    member 3: MEASURED_MB=100 PEAK_MB=100
""")
def measure_a_server_that_loads(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.loads.link_server(t, row, 3))
    return lambda t: it.to.measurements.measure(t, 3, {1: 100.0})


@CASES.case("""
    member 3: MEASURED_MB=40 PEAK_MB=40
    instance 1: MB=40
""")
def measure_a_server_that_is_suspended(it: RowChanges) -> Operation:
    it.suspended(server=3)
    return lambda t: it.to.measurements.measure(t, 3, {1: 40.0}, it.now)


@CASES.case("""
    member 3: MEASURED_MB=40 PEAK_MB=40
""")
def measure_a_server_before_it_was_suspended(it: RowChanges) -> Operation:
    row = it.suspended(server=3)
    since = it.tables.instances[row].since
    return lambda t: it.to.measurements.measure(t, 3, {1: 40.0}, since)


@CASES.case("""
    member 3: MEASURED_MB=550 PEAK_MB=550
""")
def measure_a_server_whose_copy_is_another_ones(it: RowChanges) -> Operation:
    row = it.active(server=3)
    it.poke(it.tables.instance(row) + Instance.SERVER, 5)
    return lambda t: it.to.measurements.measure(t, 3, {0: 30.0, 1: 520.0})


@CASES.case("""
    member 3: MEASURED_MB=0
    instance 1: MB=0
""")
def measure_a_server_elsewhere_than_where_its_copy_lies(it: RowChanges) -> Operation:
    it.active(server=3)
    return lambda t: it.to.measurements.measure(t, 3, {0: 30.0})


@CASES.case("""
    instance 1: MB=510 SHARES=255 SHARES[1]=255
""")
def measure_the_whole_device_for_a_copy(it: RowChanges) -> Operation:
    row = it.active(devices=(0, 1))
    return lambda t: it.to.measurements.set_measured_mb(t, row, 510.0)


@CASES.case("""
    member 1: MEASURED_MB=nan
""")
def forget_what_a_process_takes(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.measurements.measure(t, 1, {0: 30.0}))
    return lambda t: it.to.measurements.forget(t, 1)


@CASES.case("""
    device 1: USED_MB=300 SAMPLED=now PEAK_MB=300 HIGHEST_MB=300 RING_NEXT=1 RING=now RING[1]=300
    returns True
""")
def sample_while_a_copy_loads_that_may_have_taken_all_of_that(it: RowChanges) -> Operation:
    it.loading()
    for word in (Device.EXTERNAL_MB, Device.EXTERNAL_LEAST_MB):
        it.poke(it.tables.device(1) + word, 0.0)
    return lambda t: it.to.devices.sample(t, 1, 300.0, it.now)


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_devices_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)


# ---- claims to poll, and to look at devices ----------------------------------------------------------------------

LATE_NS, LASTS_NS = 1000, 300


@pytest.mark.parametrize(
    ("tried", "claimed", "claims"),
    [
        *((-LATE_NS, -LASTS_NS, False), (-LATE_NS - 1, -LASTS_NS, True), (-LATE_NS - 1, -LASTS_NS + 1, False)),
        *((-LATE_NS - 1, 0, False), (-LATE_NS - 1, 1, True), (0, -LASTS_NS, False), (1, -LASTS_NS, False)),
        (-LATE_NS - 1, -START_NS, True),
    ],
)
@pytest.mark.parametrize("late", ["the poll", "the first device", "the last device"])
def test_who_polls_for_another_one_is_late_enough_and_the_only_one(
    it: RowChanges, late: str, tried: int, claimed: int, claims: bool
) -> None:
    """tried, claimed: when something was last done, and somebody last set out to do it, in ns from now."""
    devices = [0, 2]
    starts = [it.tables.device(row) for row in devices]
    places = [(Header.POLLED, Header.POLL_CLAIMED), *((at + Device.TRIED, at + Device.CLAIMED) for at in starts)]
    for word, _ in places:
        it.poke(word, it.now)
    place = places[{"the poll": 0, "the first device": 1, "the last device": 2}[late]]
    it.poke(place[0], it.now + tried)
    it.poke(place[1], it.now + claimed)
    assert times_of_polls(it.tables, devices) == tuple(word for word, _ in places)
    before = it.words.tolist()
    of_devices = claims and late != "the poll"
    assert claim_late_looks(it.tables, devices, LATE_NS, LASTS_NS) == of_devices
    assert [it.words[word] for _, word in places[1:]] == [it.now if of_devices else before[w] for _, w in places[1:]]
    assert it.words[Header.POLL_CLAIMED] == before[Header.POLL_CLAIMED]
    for word in (word for _, word in places):
        it.poke(word, before[word])
    assert claim_late_polls(it.tables, devices, LATE_NS, LASTS_NS) == claims
    assert [it.words[word] for _, word in places] == [it.now if claims else before[word] for _, word in places]
    assert [it.words[word] for word, _ in places] == [before[word] for word, _ in places]


def test_nobody_has_claimed_what_was_never_claimed_even_if_the_machine_has_just_started(it: RowChanges) -> None:
    it.now = LASTS_NS // 2
    for word in (Header.POLLED, Header.POLL_CLAIMED):
        it.poke(word, 0)
    assert claim_late_polls(it.tables, [], 10, LASTS_NS)
    assert it.words[Header.POLL_CLAIMED] == it.now


# ---- what is read of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isolated", "anything", "everything", "under"),
    [
        *((0, False, False, [False] * 3), (0b1, True, False, [True, False, True])),
        *((0b10, True, False, [False, True, True]), (0b11, True, False, [True, True, True])),
        *((0b100, True, False, [False] * 3), (0b111, True, True, [True] * 3)),
    ],
)
def test_a_copy_that_runs_alone_has_its_devices_to_itself(
    it: RowChanges, isolated: int, anything: bool, everything: bool, under: list[bool]
) -> None:
    rows = [it.loading(devices=devices) for devices in ((0,), (1,), (0, 1))]
    it.poke(Header.ISOLATED, isolated)
    reads = it.namespace.reads.devices
    assert reads.anything_runs_alone() is anything
    assert reads.all_isolated() is everything
    assert [reads.isolated_under(row) for row in rows] == under
    it.poke(Header.ISOLATED, 0)


@pytest.mark.parametrize(("accounts", "processes", "whole"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_a_source_measures_processes_or_whole_devices_or_nothing(
    it: RowChanges, accounts: int, processes: int, whole: bool
) -> None:
    it.poke(Header.SOURCE_ACCOUNTING_ONLY, accounts)
    it.poke(Header.SOURCE_MEASURES_PROCESSES, processes)
    assert it.namespace.reads.devices.only_whole_devices_are_measured() is whole
