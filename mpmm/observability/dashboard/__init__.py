"""`mpmm dashboard`: one page in a browser that shows what the namespaces of this host do, live. It only reads.

    segment -> EventReader -> Recorder (history, timeline) -> Watcher -> server -> page/
                              one for each namespace          a thread   JSON      index.html, app.js, style.css

Only `server` needs the extra `web`. `grafana/` has a dashboard for Grafana and alert rules for Prometheus, made for
what `mpmm metrics` exports; nothing here reads them.
"""
