"""Where the workers run: in the cluster that RAY_ADDRESS names, or in one here that ends with the program."""

import logging
import os
from pathlib import Path

import ray


def start_ray(cpus: int) -> None:
    """Join the cluster, bringing the modules of this directory along, or start one with so many CPUs."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"working_dir": str(Path(__file__).parent)}, logging_level=logging.ERROR)
    else:
        ray.init(
            "local", num_cpus=cpus, include_dashboard=False, object_store_memory=2**27, logging_level=logging.ERROR
        )
