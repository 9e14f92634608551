"""From a GGUF file's metadata to a tokenizer and a chat template.

>>> tokenizer = irkit.tokenizer.from_gguf("model.gguf")  # doctest: +SKIP
>>> template = irkit.tokenizer.ChatTemplate(tokenizer.chat_template)
>>> ids = template.encode(tokenizer, [{"role": "user", "content": "Hello!"}])
>>> tokenizer.decode(ids, skip_special=False)
"""

from irkit.tokenizer.answers import AnswerReader, Content, Thinking, ToolCall
from irkit.tokenizer.chat import ChatTemplate
from irkit.tokenizer.tokenizer import Tokenizer, TokenStream, from_gguf

__all__ = ["AnswerReader", "ChatTemplate", "Content", "Thinking", "TokenStream", "Tokenizer", "ToolCall", "from_gguf"]
