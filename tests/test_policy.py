"""The policy: the decision for each waiter, as a table of cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from policy_views import (
    ME,
    OTHER,
    RULES,
    A,
    B,
    C,
    D,
    at_most,
    device,
    held_for_long,
    idle,
    in_use,
    model,
    ticket,
    usable_on,
    view,
)

from mpmm.policy.plan import make_plan
from mpmm.policy.view import (
    BusyInstance,
    Evict,
    Grant,
    Load,
    PlacedInstance,
    Reason,
    Refuse,
    Satisfied,
    View,
    Wait,
)

CASES: Mapping[str, tuple[View, list[object]]] = {
    "nobody waits": (view([], []), []),
    "an idle copy is granted": (view([model(A, shared=1)], [ticket(1, A)], copies=[idle(7, A)]), [Grant(1, 7)]),
    "the newest idle copy is granted": (
        view([model(A, shared=2)], [ticket(1, A)], copies=[idle(7, A, age=9), idle(8, A, age=3)]),
        [Grant(1, 8)],
    ),
    "one's own object is granted": (
        view([model(A, owned={ME: 1})], [ticket(1, A)], copies=[idle(7, A, owner=ME)]),
        [Grant(1, 7)],
    ),
    "another's object is of no use": (
        view([model(A, owned={OTHER: 1})], [ticket(1, A)], copies=[idle(7, A, owner=OTHER)]),
        [Load(1, (0,), 100, False)],
    ),
    "one copy is granted once": (
        view([held_for_long(model(A, shared=1))], [ticket(1, A), ticket(2, A)], copies=[idle(7, A)]),
        [Grant(1, 7), Load(2, (0,), 100, False)],
    ),
    "pinned copies are not evicted": (
        view(
            [model(A, 900), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, mb=500, pinned=True), idle(8, C, mb=300)],
            devices=[device(used=800)],
        ),
        [Wait(1, Reason.PINNED)],
    ),
    "others are evicted in place of pinned copies": (
        view(
            [model(A, 400), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, mb=500, pinned=True, age=200), idle(8, C, mb=300)],
            devices=[device(used=800)],
        ),
        [Evict(1, (8,))],
    ),
    "a pinned copy is granted like any other": (
        view([model(A, shared=1)], [ticket(1, A)], copies=[idle(7, A, pinned=True)]),
        [Grant(1, 7)],
    ),
    "an unknown model runs alone beside what is idle and pinned": (
        view([model(A, known=False), model(B, shared=1)], [ticket(1, A)], copies=[idle(7, B, pinned=True)]),
        [Load(1, (0,), 100, True)],
    ),
    "no more copies than there may be": (
        view([model(A, shared=1), model(B)], [ticket(1, A), ticket(2, B)], rules=at_most(1), in_use=1),
        [Wait(1, Reason.COPIES), Load(2, (0,), 100, False)],
    ),
    "a copy that is being loaded counts": (
        view([model(A, loading={OTHER: 1})], [ticket(1, A)], rules=at_most(1), in_use=1),
        [Wait(1, Reason.COPIES)],
    ),
    "loads of one plan count": (
        view([model(A)], [ticket(1, A), ticket(2, A, member=OTHER)], rules=at_most(1)),
        [Load(1, (0,), 100, False), Wait(2, Reason.COPIES)],
    ),
    "so do loads on the devices that a waiter names": (
        view(
            [model(A), model(B)],
            [usable_on(ticket(1, A), 1), ticket(2, A, member=OTHER), usable_on(ticket(3, A), 0), ticket(4, B)],
            rules=at_most(1),
            devices=[device(0), device(1)],
        ),
        [Load(1, (1,), 100, False), Wait(2, Reason.COPIES), Wait(3, Reason.COPIES), Load(4, (0,), 100, False)],
    ),
    "so do loads that run alone": (
        view(
            [model(A, known=False), model(B, known=False)],
            [ticket(1, A, priority=0), ticket(2, A, member=OTHER, priority=0), ticket(3, B, priority=0)],
            rules=at_most(1),
            devices=[device(0), device(1)],
        ),
        [Load(1, (0,), 100, True), Wait(2, Reason.COPIES), Load(3, (1,), 100, True)],
    ),
    "requests for one unknown model share the copy that runs alone": (
        view(
            [model(A, known=False), model(B, shared=1)],
            [ticket(1, A, priority=0), ticket(2, A, member=OTHER, priority=0), ticket(3, B)],
            copies=[idle(7, B, on=1)],
            devices=[device(0), device(1, used=100)],
        ),
        # The idle copy on the second device stays.
        [Load(1, (0,), 100, True), Wait(2, Reason.SHARING), Grant(3, 7)],
    ),
    "or that is being loaded alone": (
        view(
            [model(A, known=False, loading={OTHER: 1}), model(B, shared=1)],
            [ticket(1, A, priority=0), ticket(2, B)],
            copies=[idle(7, B, on=1)],
            devices=[device(0, reserved_mb=100, isolated=True), device(1, used=100)],
            busy=(BusyInstance(6, A, 0, 100, 9.0, owner=OTHER, loading=True),),
        ),
        [Wait(1, Reason.SHARING), Grant(2, 7)],
    ),
    "or that is to run alone once its device is empty": (
        view(
            [model(A, known=False), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A, priority=0), ticket(2, A, member=OTHER, priority=0), ticket(3, A, priority=0, preload=1)],
            copies=[idle(7, B, on=1)],
            devices=[device(0, used=50), device(1, used=100)],
            busy=(in_use(8, C, 50, 1.0), replace(in_use(9, C, 90, 9.0), device=1)),
        ),
        [Wait(1, Reason.DRAINING), Wait(2, Reason.BEHIND), Wait(3, Reason.DRAINING)],
    ),
    "but not one that is to run on another device": (
        view(
            [model(A, known=False), model(C, shared=1)],
            [usable_on(ticket(1, A, priority=0), 0), ticket(2, A, member=OTHER, priority=0)],
            devices=[device(0, used=50), device(1)],
            busy=(in_use(8, C, 50, 1.0),),
        ),
        [Wait(1, Reason.DRAINING), Load(2, (1,), 100, True)],
    ),
    "nor an object of another process": (
        view(
            [model(A, known=False, owned={OTHER: 1})],
            [ticket(1, A, priority=0)],
            devices=[device(0, used=100, isolated=True), device(1)],
            busy=(BusyInstance(6, A, 0, 100, 1.0, owner=OTHER),),
        ),
        [Load(1, (1,), 100, True)],
    ),
    "nor one that others hold for longer than a load takes": (
        view(
            [held_for_long(model(A, known=False, shared=1))],
            [ticket(1, A, priority=0)],
            devices=[device(0, used=100, isolated=True), device(1)],
            busy=(in_use(6, A, 100, 1.0),),
        ),
        [Load(1, (1,), 100, True)],
    ),
    "nor one that more wait for than it can serve within a load": (
        view(
            [replace(model(A, known=False, shared=1), load_s=2.0, hold_s=1.5), model(B, shared=1)],
            [ticket(1, A, priority=0), ticket(2, A, priority=0), ticket(3, B)],
            copies=[idle(7, B, on=1)],
            devices=[device(0, used=100, isolated=True), device(1, used=100)],
            busy=(in_use(6, A, 100, 1.0),),
        ),
        [Wait(1, Reason.SHARING), Evict(2, (7,)), Wait(3, Reason.SHARING)],
    ),
    "no device is drained for a model of which there are as many copies as there may be": (
        view(
            [model(A, known=False, owned={OTHER: 1}), model(B, shared=1)],
            [ticket(1, A, priority=0), ticket(2, B)],
            copies=[idle(7, B)],
            rules=at_most(1),
            in_use=1,
        ),
        [Wait(1, Reason.COPIES), Grant(2, 7)],
    ),
    "waiters that are bound to the same devices share a load there": (
        view(
            [model(A)],
            [usable_on(ticket(1, A), 1), usable_on(ticket(2, A), 1), usable_on(ticket(3, A), 0)],
            devices=[device(0), device(1)],
        ),
        [Load(1, (1,), 100, False), Wait(2, Reason.SHARING), Load(3, (0,), 100, False)],
    ),
    "another's idle object makes way where there may be no more": (
        view(
            [model(A, owned={OTHER: 2})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER, age=9), idle(8, A, owner=OTHER, age=3)],
            rules=at_most(2),
        ),
        [Evict(1, (7,))],
    ),
    "another's pinned object does not": (
        view(
            [model(A, owned={OTHER: 1})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER, pinned=True)],
            rules=at_most(1),
        ),
        [Wait(1, Reason.PINNED)],
    ),
    "no copy makes way for a load that never fits": (
        view(
            [model(A, 800, shared=1)],
            [usable_on(ticket(1, A), 1)],
            copies=[idle(7, A, mb=800)],
            devices=[device(0), device(1, 400)],
            rules=at_most(1),
        ),
        [Refuse(1)],
    ),
    "a pinned copy on another device does not make way either": (
        view(
            [model(A, shared=1)],
            [usable_on(ticket(1, A), 1)],
            copies=[idle(7, A, pinned=True)],
            devices=[device(0), device(1)],
            rules=at_most(1),
        ),
        [Wait(1, Reason.PINNED)],
    ),
    "another's object does not make way for who has one": (
        view(
            [model(A, owned={ME: 1, OTHER: 1})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER)],
            rules=at_most(2),
            in_use=1,
        ),
        [Wait(1, Reason.COPIES)],
    ),
    "a preload loads although a copy is idle": (
        view([model(A, shared=1)], [ticket(1, A, priority=2, preload=2)], copies=[idle(7, A)]),
        [Load(1, (0,), 100, False)],
    ),
    "a preload has enough when others load": (
        view(
            [model(A, shared=1, loading={OTHER: 1})],
            [ticket(1, A, priority=2, preload=2)],
            copies=[idle(7, A)],
            in_use=1,
        ),
        [Satisfied(1)],
    ),
    "a preload has enough when there may be no more": (
        view([model(A, shared=1)], [ticket(1, A, priority=2, preload=2)], rules=at_most(1)),
        [Satisfied(1)],
    ),
    "others' objects are not enough for a preload": (
        view([model(A, owned={OTHER: 2})], [ticket(1, A, priority=2, preload=1)]),
        [Load(1, (0,), 100, False)],
    ),
    "a preload comes after everybody else": (
        view([model(A, 600), model(B, 600)], [ticket(1, A, priority=2, preload=1), ticket(2, B)]),
        [Load(2, (0,), 600, False), Wait(1, Reason.MEMORY)],
    ),
    "a preload of more copies than fit at once is refused": (
        view([model(A, 300, shared=3)], [ticket(1, A, priority=2, preload=4)], devices=[device(used=900)]),
        [Refuse(1)],
    ),
    "a preload of as many copies as fit at once has others evicted": (
        view(
            [model(A, 300, shared=2), model(B, shared=1)],
            [ticket(1, A, priority=2, preload=3)],
            copies=[idle(7, A, mb=300), idle(8, A, mb=300), idle(9, B, mb=200)],
            devices=[device(used=800)],
        ),
        [Evict(1, (9,))],
    ),
    "a preload of what can be loaded no second time is refused": (
        view([model(A, 950, shared=1)], [ticket(1, A, priority=2, preload=2)], devices=[device(used=950)]),
        [Refuse(1)],
    ),
    "who waits for a lease to end holds up no model": (
        view(
            [model(A, 500), model(B, shared=1), model(C, 100)],
            [ticket(1, A, waited=60), ticket(2, B), ticket(3, C)],
            copies=[idle(7, B, mb=100)],
            devices=[device(used=100, reserved_mb=600, leased_mb=600)],
        ),
        [Wait(1, Reason.LEASED), Grant(2, 7), Load(3, (0,), 100, False)],
    ),
    "a lease goes before who has just begun to wait for one to end": (
        view(
            [model(A, 850), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=1.9), ticket(2, B)],
            devices=[device(reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Load(2, (0,), 100, False)],
    ),
    "also before who waits for other programs, which no lease delays": (
        view(
            [model(A, 800), model(C, 900), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=9.0), ticket(2, C), ticket(3, B)],
            devices=[device(used=100, external_mb=100, external_least_mb=100, reserved_mb=100, leased_mb=100)],
            leases=(PlacedInstance(7, D, 0, 100),),
        ),
        [Wait(1, Reason.EXTERNAL), Wait(2, Reason.LEASED), Load(3, (0,), 100, False)],
    ),
    "no lease that delays who has waited for long": (
        view(
            [model(A, 850), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=2.0), ticket(2, B)],
            devices=[device(reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Wait(2, Reason.BEHIND)],
    ),
    "whoever else has just begun to wait": (
        view(
            [model(A, 850), model(C, 850), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=2.0), ticket(2, C, waited=1.9), ticket(3, B)],
            devices=[device(reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Wait(2, Reason.LEASED), Wait(3, Reason.BEHIND)],
    ),
    "but one that leaves it room when the others have ended, and not two if they do not": (
        view(
            [model(A, 750), replace(model(B, 100), lease=True), replace(model(C, 100), lease=True)],
            [ticket(1, A, waited=9.0), ticket(2, B), ticket(3, C)],
            devices=[device(reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Load(2, (0,), 100, False), Wait(3, Reason.BEHIND)],
    ),
    "nor one that would have it wait for two leases in place of one": (
        view(
            [model(A, 600), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=9.0), ticket(2, B)],
            devices=[device(reserved_mb=550, leased_mb=550)],
            leases=(PlacedInstance(7, D, 0, 300), PlacedInstance(8, D, 0, 250)),
        ),
        [Wait(1, Reason.LEASED), Wait(2, Reason.BEHIND)],
    ),
    "a lease may go where who waits for one to end may not": (
        view(
            [model(A, 850), replace(model(B, 100), lease=True)],
            [replace(ticket(1, A, waited=9.0), loadable_on=(0,)), ticket(2, B)],
            devices=[device(reserved_mb=600, leased_mb=600), device(1, used=700)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Load(2, (1,), 100, False)],
    ),
    "no room is made for a lease behind who waits for one to end": (
        view(
            [model(A, 850), replace(model(B, 200), lease=True), model(C, shared=1)],
            [ticket(1, A, waited=1.0), ticket(2, B)],
            copies=[idle(6, C, mb=200)],
            devices=[device(used=200, reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Wait(2, Reason.BEHIND)],
    ),
    "beside a lease what fits if others let go is waited for in turn": (
        view(
            [model(A, 500), model(B, 100)],
            [ticket(1, A), ticket(2, B)],
            devices=[device(used=300, reserved_mb=400, leased_mb=400)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "what fits is loaded": (view([model(A)], [ticket(1, A)]), [Load(1, (0,), 100, False)]),
    "what fits exactly is loaded": (view([model(A, 900)], [ticket(1, A)]), [Load(1, (0,), 900, False)]),
    "what an earlier load takes is gone for a later one": (
        view([model(A, 500), model(B, 500)], [ticket(1, A), ticket(2, B)]),
        [Load(1, (0,), 500, False), Wait(2, Reason.MEMORY)],
    ),
    "reservations count": (
        view([model(A, 500)], [ticket(1, A)], devices=[device(reserved_mb=401)], in_use=1),
        [Wait(1, Reason.MEMORY)],
    ),
    "too large for ever": (view([model(A, 901)], [ticket(1, A)]), [Refuse(1)]),
    "too large for another copy, but there is one": (
        view([held_for_long(model(A, 901, shared=1))], [ticket(1, A)], in_use=1),
        [Wait(1, Reason.ONLY_COPY)],
    ),
    "too large, and another's object does not help": (
        view([model(A, 901, owned={OTHER: 1})], [ticket(1, A)], in_use=1),
        [Refuse(1)],
    ),
    "too large, even while something runs alone": (
        view(
            [model(A), model(B, 901), model(C, 901, shared=1), model(D, 950, known=False)],
            [ticket(row + 1, wants) for row, wants in enumerate((A, B, C, D))],
            isolated=True,
        ),
        [Refuse(2)],
    ),
    "a preload that is satisfied is not refused while something runs alone": (
        view([model(A, 901, owned={ME: 1})], [ticket(1, A, preload=1), ticket(2, A, preload=2)], isolated=True),
        [Refuse(2)],
    ),
    "a refusal blocks nobody": (
        view([model(A, 901), model(B)], [ticket(1, A), ticket(2, B)]),
        [Refuse(1), Load(2, (0,), 100, False)],
    ),
    "the device that is least full takes it": (
        view([model(A, 300)], [ticket(1, A)], devices=[device(0, used=500), device(1), device(2, used=300)]),
        [Load(1, (1,), 300, False)],
    ),
    "full means the share that is in use": (
        view([model(A, 100)], [ticket(1, A)], devices=[device(0, 4000, used=1000), device(1, used=300)]),
        [Load(1, (0,), 100, False)],
    ),
    "of devices that are as full the tightest fit takes it": (
        view([model(A, 10)], [ticket(1, A)], devices=[device(0, 4000, used=1620), device(1, used=405)]),
        [Load(1, (1,), 10, False)],
    ),
    "a device without room does not, however full the others are": (
        view([model(A, 900)], [ticket(1, A)], devices=[device(0, used=100), device(1, 4000, used=2600)]),
        [Load(1, (1,), 900, False)],
    ),
    "loads of one plan go to different devices": (
        view([model(A, 300), model(B, 300)], [ticket(1, A), ticket(2, B)], devices=[device(0), device(1)]),
        [Load(1, (0,), 300, False), Load(2, (1,), 300, False)],
    ),
    "who is bound to a device loads there": (
        view(
            [model(A, 300)],
            [replace(ticket(1, A), loadable_on=(1,), usable_on=(1,))],
            devices=[device(0), device(1, used=500)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "who is bound to a device has no use for a copy elsewhere": (
        view(
            [replace(model(A, 300, shared=1), load_s=9.0, hold_s=0.1)],
            [replace(ticket(1, A), loadable_on=(1,), usable_on=(1,))],
            copies=[idle(7, A, mb=300)],
            devices=[device(0, used=300), device(1)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "who has a copy only where it cannot use it displaces others like one without": (
        view(
            [model(A, 800, shared=1), model(B, 800, shared=1)],
            [usable_on(ticket(1, A), 1), usable_on(ticket(2, B), 0)],
            copies=[idle(7, A, mb=800), idle(8, B, mb=800, on=1)],
            devices=[device(0, used=800), device(1, used=800)],
        ),
        [Evict(1, (8,))],
    ),
    "who has a copy where it is bound to displaces none for which as many wait": (
        view(
            [held_for_long(model(A, 400, shared=1)), model(B, 400, shared=1, waiting=1)],
            [usable_on(ticket(1, A), 1)],
            copies=[idle(8, B, mb=400, on=1)],
            busy=(BusyInstance(9, A, 1, 500, 9.0),),
            devices=[device(0), device(1, used=900)],
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "another model that is in use where a waiter is bound to is of no use for it": (
        view(
            [replace(model(A, 300), load_s=9.0, hold_s=0.1), model(B, shared=1)],
            [replace(ticket(1, A), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, B, 1, 100, 1.0),),
            devices=[device(0), device(1, used=100)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "nor is it enough for a preload there": (
        view(
            [model(A, 300), model(B, shared=1)],
            [replace(ticket(1, A, priority=2, preload=1), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, B, 1, 100, 1.0),),
            devices=[device(0), device(1, used=100)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "one's own object that is in use there counts once": (
        view(
            [model(A, 300, owned={ME: 1})],
            [replace(ticket(1, A, priority=2, preload=2), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, A, 1, 300, 1.0, owner=ME),),
            devices=[device(0), device(1, used=300)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "one that is being loaded there counts, too": (
        view(
            [model(A, 300, owned={ME: 1}, loading={ME: 1})],
            [replace(ticket(1, A, priority=2, preload=2), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, A, 1, 300, 1.0, owner=ME), BusyInstance(6, A, 1, 0, 1.0, owner=ME, loading=True)),
            devices=[device(0), device(1, used=300)],
        ),
        [Satisfied(1)],
    ),
    "as many share an instance as it serves sooner than a load": (
        view(
            [replace(model(A, shared=1), load_s=2.0, hold_s=0.9)],
            [ticket(row, A) for row in (1, 2, 3)],
            busy=(BusyInstance(5, A, 0, 100, 0.5),),
        ),
        [Wait(1, Reason.SHARING), Wait(2, Reason.SHARING), Load(3, (0,), 100, False)],
    ),
    "who merely cannot load elsewhere has": (
        view(
            [model(A, 300, shared=1)],
            [replace(ticket(1, A), loadable_on=(1,))],
            copies=[idle(7, A, mb=300)],
            devices=[device(0, used=300), device(1)],
        ),
        [Grant(1, 7)],
    ),
    "a model that spans two devices takes half of each": (
        view(
            [model(A, 1600)],
            [replace(ticket(1, A), span=2)],
            devices=[device(0, used=200), device(1, used=50), device(2, used=30)],
        ),
        [Load(1, (2, 1), 1600, False)],
    ),
    "room for it is made on each": (
        view(
            [model(A, 1600), model(B, shared=1), model(C, shared=1)],
            [replace(ticket(1, A), span=2)],
            copies=[idle(7, B, mb=500), idle(8, C, mb=500, on=1)],
            devices=[device(0, used=500), device(1, used=500)],
        ),
        [Evict(1, (7, 8))],
    ),
    "a copy that spans devices makes room on each of them": (
        view(
            [model(A, 800), model(B, shared=1)],
            [replace(ticket(1, A), loadable_on=(1,))],
            copies=[replace(idle(7, B, mb=600), other_shares=((1, 500.0),))],
            devices=[device(0, used=600), device(1, used=500)],
        ),
        [Evict(1, (7,))],
    ),
    "what is too large for the devices it may go to is refused": (
        view([model(A, 2000)], [replace(ticket(1, A), loadable_on=(1,))], devices=[device(0, 4000), device(1)]),
        [Refuse(1)],
    ),
    "what is too large for two of them as well": (
        view([model(A, 2000)], [replace(ticket(1, A), span=2)], devices=[device(0, 4000), device(1)]),
        [Refuse(1)],
    ),
    "an unknown model isolates one device, and copies on others are handed out": (
        view(
            [model(A, known=False), held_for_long(model(B, shared=1)), model(C, shared=1)],
            [ticket(1, A, priority=0), ticket(2, B), ticket(3, C)],
            copies=[idle(7, B), idle(8, C, on=1)],
            devices=[device(0, used=100), device(1, used=200)],
        ),
        [Evict(1, (7,)), Load(2, (1,), 100, False), Grant(3, 8)],
    ),
    "it takes the device that is free soonest": (
        view(
            [model(A, known=False), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A, priority=0)],
            busy=(BusyInstance(5, B, 0, 100, 3.0), BusyInstance(6, C, 1, 100, 0.5)),
            devices=[device(0, used=100), device(1, used=100)],
        ),
        [Wait(1, Reason.DRAINING)],
    ),
    "while a device drains, loads go on elsewhere, room is made for them as well": (
        view(
            [model(A, known=False), model(B, shared=2), model(C, shared=1), model(D, 500)],
            [ticket(1, A, priority=0), ticket(2, D)],
            copies=[idle(8, C, mb=400, on=1)],
            busy=(BusyInstance(5, B, 0, 100, 0.5), BusyInstance(6, B, 1, 400, 9.0)),
            devices=[device(0, used=100), device(1, used=800)],
        ),
        [Wait(1, Reason.DRAINING), Evict(2, (8,))],
    ),
    "two unknown models are measured on two devices at the same time": (
        view(
            [model(A, known=False), model(B, known=False)],
            [ticket(1, A, priority=0), ticket(2, B, priority=0)],
            devices=[device(0), device(1)],
        ),
        [Load(1, (0,), 100, True), Load(2, (1,), 100, True)],
    ),
    "beside a copy that runs alone nothing happens, elsewhere everything": (
        view(
            [model(A, shared=1), model(B, shared=1), model(C)],
            [ticket(1, A), ticket(2, B), ticket(3, C)],
            copies=[idle(7, A, pinned=True), idle(8, B, on=1)],
            rules=at_most(1),
            devices=[device(0, used=100, isolated=True), device(1, used=100)],
        ),
        [Wait(1, Reason.COPIES), Grant(2, 8), Load(3, (1,), 100, False)],
    ),
    "who waits for room on a device it is bound to keeps nobody from others": (
        view(
            [model(A, 800), model(B, 100)],
            [replace(ticket(1, A), loadable_on=(0,)), ticket(2, B)],
            devices=[device(0, used=800), device(1)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY), Load(2, (1,), 100, False)],
    ),
    "nobody stands back for one whom other programs leave no room": (
        view(
            [model(A, 800), model(B, 100)],
            [ticket(1, A), ticket(2, B)],
            devices=[device(used=300, external_mb=300, external_least_mb=300)],
        ),
        [Wait(1, Reason.EXTERNAL), Load(2, (0,), 100, False)],
    ),
    "no device is known yet": (view([model(A)], [ticket(1, A)], devices=[]), [Wait(1, Reason.NO_DEVICE)]),
    "room is made": (
        view([model(A, 800), model(B, shared=1)], [ticket(1, A)], copies=[idle(7, B)], devices=[device(used=150)]),
        [Evict(1, (7,))],
    ),
    "no more is evicted than needed": (
        view(
            [model(A, 800), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, age=50), idle(8, C, age=60)],
            devices=[device(used=200)],
        ),
        [Evict(1, (8,))],
    ),
    "room that could not be enough is not made": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=400)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "where it is cheapest": (
        view(
            [model(A, 800), model(B, shared=2)],
            [ticket(1, A)],
            copies=[idle(7, B, mb=300, on=0), idle(8, B, mb=200, on=1)],
            devices=[device(0, used=300), device(1, used=200)],
        ),
        [Evict(1, (8,))],
    ),
    "memory that is being unloaded is waited for": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=250, unloading_mb=150)],
            unloading=1,
        ),
        [Wait(1, Reason.UNLOADING)],
    ),
    "memory that is returning is waited for": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=250, returning_mb=150)],
        ),
        [Wait(1, Reason.RETURNING)],
    ),
    "only what is missing beyond that is evicted": (
        view(
            [model(A, 800), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, age=60), idle(8, C, age=50)],
            devices=[device(used=350, returning_mb=150)],
        ),
        [Evict(1, (7,))],
    ),
    "a starving model displaces one with more waiters": (
        view(
            [model(A, 900), model(B, shared=1, waiting=5)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=100)],
        ),
        [Evict(1, (7,))],
    ),
    "a model that has a copy does not": (
        view(
            [held_for_long(model(A, 800, shared=1)), model(B, shared=1, waiting=5)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "a model whose only copies are other processes' objects is starving": (
        view(
            [model(A, 800, owned={OTHER: 1}), model(B, shared=1, waiting=5)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Evict(1, (7,))],
    ),
    "others' idle objects of the same model make room": (
        view(
            [model(A, 800, owned={OTHER: 1})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER)],
            devices=[device(used=200)],
        ),
        [Evict(1, (7,))],
    ),
    "a head of the line that may not be delayed stops later loads": (
        view([model(A, 800), model(B)], [ticket(1, A), ticket(2, B)], devices=[device(used=200)], in_use=1),
        [Wait(1, Reason.MEMORY)],
    ),
    "but not at once those who reuse": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A, waited=9.0, head_for=1.9), ticket(2, B)],
            copies=[idle(7, B, mb=10)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY), Grant(2, 7)],
    ),
    "later those, too": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A, waited=9.0, head_for=2.0), ticket(2, B)],
            copies=[idle(7, B, mb=10)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "during isolation everybody waits": (
        view([model(A, shared=1)], [ticket(1, A)], copies=[idle(7, A)], isolated=True),
        [],
    ),
    "an unknown model goes first": (
        view([model(A, 500), model(B, known=False)], [ticket(1, A), ticket(2, B, priority=0)]),
        [Load(2, (0,), 100, True)],
    ),
    "it waits for the others to finish": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], in_use=1),
        [Wait(1, Reason.DRAINING)],
    ),
    "it waits for loads to finish": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], in_use=1),
        [Wait(1, Reason.DRAINING)],
    ),
    "everything idle goes": (
        view([model(A, known=False), model(B, shared=2)], [ticket(1, A, priority=0)], copies=[idle(7, B), idle(8, B)]),
        [Evict(1, (7, 8))],
    ),
    "it waits for unloads to end": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], unloading=1),
        [Wait(1, Reason.UNLOADING)],
    ),
    "it waits for memory to return": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], devices=[device(used=100, returning_mb=100)]),
        [Wait(1, Reason.RETURNING)],
    ),
    "it gets the roomiest device": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], devices=[device(0, used=100), device(1)]),
        [Load(1, (1,), 100, True)],
    ),
    "two unknown ones run one after the other": (
        view([model(A, known=False), model(B, known=False)], [ticket(1, A, priority=0), ticket(2, B, priority=0)]),
        [Load(1, (0,), 100, True)],
    ),
    "with nothing to measure by nobody runs alone": (
        view(
            [model(A, known=False), model(B, known=False)],
            [ticket(1, A, priority=0), ticket(2, B, priority=0)],
            rules=replace(RULES, isolate_unknown=False),
        ),
        [Load(1, (0,), 100, False), Load(2, (0,), 100, False)],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_what_is_decided_when(case: str) -> None:
    state, expected = CASES[case]
    decisions = list(make_plan(state).decisions)
    if case == "everything idle goes":
        assert [(type(d), set(d.instances)) for d in decisions if isinstance(d, Evict)] == [(Evict, {7, 8})]
    else:
        assert decisions == expected


def test_the_plan_says_whether_the_rest_of_the_queue_can_still_get_something() -> None:
    assert make_plan(CASES["a head of the line that may not be delayed stops later loads"][0]).queue_held_up
    assert make_plan(CASES["during isolation everybody waits"][0]).queue_held_up
    assert not make_plan(CASES["what fits is loaded"][0]).queue_held_up
