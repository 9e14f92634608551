"""How long `irkit run` takes to its first byte, beside what its parts take alone: paired, alternating runs.

    python tests/bench/first_token.py [RUNS]

Prints the median of each in seconds, and the ratios. Run it twice: the first run may compile.
"""

import statistics
import subprocess
import sys
import time

IRKIT = [sys.executable, "-m", "irkit", "run", "smollm2", "hi", "--num-predict", "4"]
COMMANDS = {
    "jax alone": [sys.executable, "-c", "import jax; jax.devices()"],
    "irkit run": IRKIT,
    "its libraries": [sys.executable, "-c", "import numpy, tokenizers, pydantic"],
    "import irkit": [sys.executable, "-c", "import irkit"],
}


def seconds(command: list[str]) -> float:
    """To the first byte of the output, or to the end where there is none."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        took = time.perf_counter() - began
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return took


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    subprocess.run(IRKIT, check=True, capture_output=True)  # fetches and compiles what is not there yet
    times = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name:14} {median:5.2f} s   {min(times[name]):.2f} to {max(times[name]):.2f}")
    print(f"irkit run / jax alone: {medians['irkit run'] / medians['jax alone']:.2f}")
    print(f"import irkit / its libraries: {medians['import irkit'] / medians['its libraries']:.2f}")


if __name__ == "__main__":
    main()
