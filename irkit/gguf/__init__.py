"""GGUF model files: metadata, tensors, dequantizing; numpy is all it needs.

`with irkit.gguf.open("model.gguf") as file:` gives a file with `file.metadata["general.architecture"]`,
`file.tensors["token_embd.weight"].shape` and `file.dequantize("token_embd.weight")`.
"""

from irkit.gguf.metadata import Metadata, Value
from irkit.gguf.quants import QUANTS, dequantize
from irkit.gguf.reader import File, TensorInfo, open, part_names

__all__ = ["QUANTS", "File", "Metadata", "TensorInfo", "Value", "dequantize", "open", "part_names"]
