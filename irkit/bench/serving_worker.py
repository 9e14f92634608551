"""One process that serves one model as one engine does: `python serving_worker.py ENGINE MODEL PORT THREADS CLIENTS`.

Run by its path, not as part of the package, so that the process of a peer holds nothing of irkit.
"""

import sys
import threading
from importlib import import_module

NAME = "bench"


def irkit(path: str, port: int, threads: int, clients: int) -> None:
    """`irkit serve`; its environment names a home of its own. Threads are as many as there are cores."""
    from irkit import hub
    from irkit.options import ServeOptions
    from irkit.server import serve

    hub.add(path, NAME)
    serve(ServeOptions(port=port))


def llama_cpp(path: str, port: int, threads: int, clients: int) -> None:
    """llama.cpp's server, as the package xllamacpp has it."""
    api = import_module("xllamacpp")
    params = api.CommonParams()
    params.model.path, params.model_alias = path, {NAME}
    params.port, params.n_parallel, params.n_gpu_layers = port, clients, 0
    params.n_ctx = clients * 4096
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = api.Server(params)
    assert server.listening_address
    threading.Event().wait()


ENGINES = {"irkit": irkit, "llama.cpp": llama_cpp}

if __name__ == "__main__":
    engine, path, *numbers = sys.argv[1:]
    ENGINES[engine](path, *map(int, numbers))
