"""Ray on many hosts: the actors of each host share one copy of a model. Needs ray.

    ray start --head                          # on one host, and on each other: ray start --address HEAD:6379
    python tools/examples/ray_hosts.py        # joins that cluster; without one it makes two nodes on this machine

Ray sends a request to an actor on any host; mpmm decides there by the memory of that host, and shares nothing between
hosts. The two nodes on one machine have a runtime directory each, which keeps them as separate as real hosts; real
hosts need no setting for that.
"""

# Ray may be missing where types are checked.
# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mpmm import ModelManager, MultiProcessShared

ACTORS_ON_A_HOST = 2


class Reverser:
    """Stands for a model: it takes memory, and a while to load."""

    def predict(self, text: str) -> tuple[str, int]:
        """Return the text backwards, and the pid of the process that did it."""
        return text[::-1], os.getpid()


def load() -> str:
    """Start a server for the model on this host; its tag is a handle that works in every process of the host."""
    shared("reverser").acquire()
    return "reverser"


def shared(handle: str) -> MultiProcessShared[Reverser]:
    """Return the shared object for a handle, on this host."""
    return MultiProcessShared(Reverser, tag=handle, always_proxy=True, spawn_process=True)


@ray.remote(num_cpus=0)
class Worker:
    """One actor; each is a process of its own, and a member of the namespace of its host."""

    def __init__(self) -> None:
        self._manager = ModelManager(namespace="hosts", memory_source="booked", max_model_copies=1)

    def reverse(self, text: str) -> tuple[str, int]:
        """Borrow the copy of this host, use it, give it back."""
        with self._manager.model("reverser", load) as handle, shared(handle).using() as model:
            answer: tuple[str, int] = model.predict(text)
            return answer

    def leave(self) -> None:
        """Release the models: Ray ends actors by a signal."""
        self._manager.shutdown()


def use(texts: list[str]) -> dict[str, set[int]]:
    """Have actors on each node of the cluster reverse texts; return the pids of the model servers, by node."""
    hosts = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    actors = [
        (host, Worker.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False)).remote())
        for host in hosts
        for _ in range(ACTORS_ON_A_HOST)
    ]
    asked = [(host, text, actor.reverse.remote(text)) for text in texts for host, actor in actors]
    servers = defaultdict[str, set[int]](set)
    for host, text, answer in asked:
        reversed_text, server = ray.get(answer)
        assert reversed_text == text[::-1]
        servers[host].add(server)
    ray.get([actor.leave.remote() for _, actor in actors])
    return servers


def main(folder: Path) -> None:
    """Use a cluster; without one, two nodes on this machine, with runtime directories in a folder."""
    cluster = None
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="ERROR")
    else:
        cluster = Cluster()
        for name in ("one", "two"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
            os.environ["MPMM_RUNTIME_DIR"] = str(folder / name)  # for all processes of this node
            cluster.add_node(num_cpus=1, include_dashboard=False)
        ray.init(address=cluster.address, logging_level="ERROR")
    try:
        servers = use(["to be", "or not to be"])
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()
    for pids in servers.values():
        print(f"a host with {ACTORS_ON_A_HOST} actors and {len(pids)} copy")
    print(f"{len(set[int]().union(*servers.values()))} copies on {len(servers)} hosts")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="mpmm-", ignore_cleanup_errors=True) as temporary:
        main(Path(os.environ.get("MPMM_RUNTIME_DIR", temporary)))
