"""How far `fast`, and llama.cpp, are from the exact logits of the same file, token by token of one text.

    python tests/bench/closeness.py [--tokens N] [--text FILE] GGUF ...

Prints, for each file, the mean over the text's tokens of the Kullback-Leibler divergence from the distribution of
`precision="exact"` to the other one's, in nats, the largest, and for how many tokens the likeliest next one is the
same. Both read the text as a prompt. llama.cpp is measured where llama-cpp-python is installed. Nothing is timed, so
it need not run on a quiet machine.
"""

import argparse
import ctypes
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import irkit
from irkit.options import Precision

TEXT = Path(__file__).parents[2] / "LICENSE"
AT_ONCE = 256
"""Tokens whose logits are looked at together: 50 MB of them for a vocabulary of 49,152."""


def of_irkit(path: Path, precision: Precision, ids: list[int]) -> np.ndarray:
    """The logits after each of `ids`, `[token, vocabulary]`."""
    with irkit.Session(path, precision=precision, backend="cpu", num_ctx=len(ids)) as session:
        logits = session.trace(ids, names=(), logits="all").logits
        assert logits is not None
        return logits[0]


def of_llama_cpp(path: Path, ids: list[int]) -> np.ndarray:
    """The same of llama.cpp, through its C functions."""
    import llama_cpp as api  # pyright: ignore[reportMissingImports]

    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = len(ids), AT_ONCE, AT_ONCE
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    context = api.llama_init_from_model(model, settings)
    width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    found = np.empty((len(ids), width), np.float32)
    batch = api.llama_batch_init(AT_ONCE, 0, 1)
    for start in range(0, len(ids), AT_ONCE):
        part = ids[start : start + AT_ONCE]
        batch.n_tokens = len(part)
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                start + i,
                1,
                0,
                1,
            )
        if api.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp failed to compute {path}")
        address = ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        found[start : start + len(part)] = np.ctypeslib.as_array(address, (len(part), width))
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(exact: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """The mean and the largest divergence, and the share of tokens after which the likeliest is the same."""

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, len(exact), AT_ONCE):
            p, q = (log_softmax(logits[start : start + AT_ONCE]) for logits in (exact, other))
            yield (np.exp(p) * (p - q)).sum(axis=-1)

    divergence = np.concatenate(list(parts()))
    return divergence.mean(), divergence.max(), (exact.argmax(-1) == other.argmax(-1)).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="GGUF")
    parser.add_argument("--tokens", type=int, default=2000, help="of the text, at most")
    parser.add_argument("--text", type=Path, default=TEXT, help="what is read; irkit's license if not given")
    options = parser.parse_args()
    print(f"{'':24} {'':10} {'mean KL':>9} {'largest':>9} {'same likeliest':>15}")
    for path in options.files:
        ids = irkit.Session(path).tokenize(options.text.read_text())[: options.tokens]
        exact = of_irkit(path, "exact", ids)
        others = {"irkit fast": lambda path=path, ids=ids: of_irkit(path, "fast", ids)}
        if find_spec("llama_cpp"):
            others["llama.cpp"] = lambda path=path, ids=ids: of_llama_cpp(path, ids)
        for name, logits in others.items():
            mean, largest, same = compare(exact, logits())
            print(f"{path.stem:24} {name:10} {mean:9.2g} {largest:9.2g} {same:15.1%}   {len(ids)} tokens", flush=True)


if __name__ == "__main__":
    main()
