"""How fast tokens are made through the chat widget, beside the same answer without it: in a real kernel, in turns.

    python tests/bench/chat.py [ROUNDS] [TOKENS]

Prints the median of each in tokens a second, their ratio, and how many messages a second the widget sent. It asks for
one answer of so many tokens, which the model may not end, after a warming round; `coloured` is with the tokens coloured
by probability, whose numbers are sent too.
"""

import json
import statistics
import sys
import time

from jupyter_client.manager import start_new_kernel

MEASURED = """
import json, irkit
session = irkit.Session("smollm2", num_ctx=8192)
ends = {str(token): -1000.0 for token in session.model.tokenizer.eog_ids}
options = dict(num_predict=TOKENS, temperature=0.8, seed=1, logit_bias=ends)
asked = "Tell me a very long story about the sea."

def plain():
    session.reset()
    return session.respond(asked, **options).stats.tokens_per_second

chat = session.chat(**options)
chat.show()

def through_the_chat(colour):
    session.reset()
    chat.new()
    chat.colour = colour
    chat.ask(asked)
    chat.wait()
    return chat._turn(chat.turns[-1]["id"]).generation.stats.tokens_per_second

WAYS = {"plain": plain, "chat": lambda: through_the_chat("none"), "coloured": lambda: through_the_chat("probability")}
"""


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
    manager, client = start_new_kernel(kernel_name="python3")
    sent = 0

    def run(code: str) -> str:
        """What the code prints; counts the messages to widgets meanwhile."""
        nonlocal sent
        printed = []

        def heard(message: dict) -> None:
            nonlocal sent
            sent += message["msg_type"] == "comm_msg"
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])
            if message["msg_type"] == "error":
                raise SystemExit("\n".join(message["content"]["traceback"]))

        client.execute_interactive(code, output_hook=heard, timeout=600)
        return "".join(printed)

    try:
        run(MEASURED.replace("TOKENS", str(tokens)))
        speeds: dict[str, list[float]] = {"plain": [], "chat": [], "coloured": []}
        rates = []
        for number in range(rounds + 1):
            for name, found in speeds.items():
                sent, began = 0, time.perf_counter()
                speed = json.loads(run(f"print(json.dumps(WAYS[{name!r}]()))").splitlines()[-1])
                if number:  # the first round compiles
                    found.append(speed)
                    rates += [sent / (time.perf_counter() - began)] if name != "plain" else []
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        for name, median in medians.items():
            print(f"{name:9} {median:6.1f} tokens/s   {min(speeds[name]):.1f} to {max(speeds[name]):.1f}")
        print(f"chat / plain: {medians['chat'] / medians['plain']:.3f}")
        print(f"coloured / plain: {medians['coloured'] / medians['plain']:.3f}")
        print(f"messages a second: {max(rates):.1f} at most")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
