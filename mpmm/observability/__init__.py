"""What people see: snapshots of a namespace as text, as a live screen, as a trace, a plot, metrics, or a page.

Everything here works on the plain values of `mpmm.shared_state.snapshot`, and knows neither bytes nor locks.

    inspect_screen  one screen of text, for `mpmm inspect`    findings      what is wrong
    top             the same, live                            listing       a line for each copy, for `mpmm ps`
    event_lines     events as lines, for `mpmm events`        tables        columns of text in a given width
    colours         on a terminal only                        formatting    figures as text
    controls        what the keys of `mpmm top` do            json_text     a snapshot as JSON
    terminal_log    what `mpmm run` prints on a terminal
    doctor          what the host offers and limits           bundle        that and all namespaces in one file
    completion      the command line for shells and `man`     trace_writer  writes the trace of a namespace
    event_reader    the events one after another, none twice, lost ones counted
    trace           events as spans for Perfetto              trace_tracks  the lanes on which they are written
    plot            such a trace as a picture
    histograms      of waits, holds and loads, from events    prometheus    metrics, for `mpmm.metrics`
    dashboard/      a page in a browser, for `mpmm dashboard`
"""
