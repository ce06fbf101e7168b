"""A driver that waits until a cluster has all its nodes."""

import sys
import time

import ray

while not ray.is_initialized():
    try:
        ray.init(log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        time.sleep(0.05)
while len(ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.05)
