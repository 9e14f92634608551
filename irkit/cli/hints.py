"""What to say to words that other programs know, and irkit does not."""

_TEXT_ONLY = "models read and write text here, no images or sound"
_OPTIONS = {
    **dict.fromkeys(("--image", "--images", "--mmproj", "--audio", "--video", "--attachment", "-a"), _TEXT_ONLY),
    **dict.fromkeys(("--model", "-m"), "the model is the first word after the command"),
    **dict.fromkeys(("--prompt", "-p"), "the prompt is the word after the model, or is piped in"),
    **dict.fromkeys(("--n-predict", "--predict", "--max-tokens", "-n"), "--num-predict limits the tokens"),
    **dict.fromkeys(("--ctx-size", "-c"), "--num-ctx sets the context"),
    **dict.fromkeys(("--n-gpu-layers", "--gpu-layers"), "--backend chooses where all layers run"),
    "--temp": "it is called --temperature",
    "--keepalive": "a model is let go of when the command ends; what serve holds, stop lets go of",
}
_COMMANDS = {
    "show": "info shows what a model is",
    "ls": "list shows the models there are",
    "download": "pull fetches a model",
    "remove": "rm removes a model",
    "delete": "rm removes a model",
    "push": "models are not published from here",
    "help": "irkit -h lists the commands",
}


def for_option(name: str) -> str | None:
    """What to say to somebody who expects this option."""
    return _OPTIONS.get(name)


def for_command(name: str) -> str | None:
    """What to say to somebody who expects this command."""
    return _COMMANDS.get(name)
