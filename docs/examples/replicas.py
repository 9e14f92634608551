"""Replicas of irkit's server under Ray Serve: `serve run replicas:app`, in the folder of this file.

A replica is a whole server, with models, caches and queue of its own; Ray Serve divides the requests among them, starts
them on the machines of its cluster and again where one fails. IRKIT_REPLICAS says how many there are, IRKIT_CPUS how
many cores each has, IRKIT_API_KEY the key that requests must carry.
"""

import os
import sys

from fastapi import FastAPI
from ray import serve

CPUS = int(os.environ.get("IRKIT_CPUS", "2"))


def build() -> FastAPI:
    """The server of one replica; it is made there, not sent there."""
    from irkit.options import ServeOptions
    from irkit.server import create_app
    from irkit.server.listen import OPEN_TO_ALL

    key = os.environ.get("IRKIT_API_KEY") or None
    if not key:
        print(f"irkit: {OPEN_TO_ALL}", file=sys.stderr, flush=True)
    # The proxy of Ray Serve listens, and passes on whatever name it is reached by. A key keeps out the web pages that
    # reach it by a name of their own (DNS rebinding); where there is none, only local names are answered.
    return create_app(ServeOptions(host="0.0.0.0" if key else "127.0.0.1", api_key=key))


@serve.deployment(
    num_replicas=int(os.environ.get("IRKIT_REPLICAS", "2")),
    max_ongoing_requests=64,
    health_check_timeout_s=120,  # to load a model and compile its programs takes a while
    ray_actor_options={"num_cpus": CPUS, "runtime_env": {"env_vars": {"NPROC": str(CPUS)}}},
)
@serve.ingress(build)
class Irkit:
    """A server of models."""


app = Irkit.bind()
