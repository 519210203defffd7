"""What people see: snapshots of a namespace as text, as a live screen, as a trace, a plot or metrics.

Everything here works on the plain values of `mpmm.shared_state.snapshot`, and knows neither bytes nor locks.

    screen.py       one screen of text, for `mpmm inspect`    health.py    what is wrong
    top.py          the same, live                            listing.py   a line for each copy, for `mpmm ps`
    event_lines.py  events as lines, for `mpmm events`        tables.py    columns of text in a given width
    colours.py      on a terminal only                        words.py     figures as text
    controls.py     what the keys of `mpmm top` do
    doctor.py       what the host offers and limits           bundle.py    that and all namespaces in one file
    json_text.py    a snapshot as JSON                        completion.py  the command line for shells and `man`
    record.py       the trace of a namespace, written
    follow.py       the events one after another, none twice, lost ones counted
    trace.py        events as spans for Perfetto              plot.py      such a trace as a picture
    tally.py        events as histograms                      families.py  metrics, for `mpmm.metrics`
"""
