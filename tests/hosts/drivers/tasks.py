"""A driver that has every node say who and where it is."""

import os
import socket

import ray
from nodes import join, on


@ray.remote
def where() -> tuple[str, str, str, int]:
    """Node, name of the host, address, and process id inside the host."""
    context = ray.get_runtime_context()
    return context.get_node_id(), socket.gethostname(), ray.util.get_node_ip_address(), os.getpid()


nodes = join()
for node, told in zip(nodes, ray.get([where.options(**on(node)).remote() for node in nodes], timeout=30), strict=True):
    assert told[0] == node
    print(*told)
