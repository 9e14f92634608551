"""Writes reference_smollm2.json: difficult texts, and the ids that llama.cpp gives them.

Run by hand, in an environment of its own, when texts are added:

    pip install xllamacpp
    python tests/tokenizer/make_reference.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import importlib
import importlib.metadata
import json
import random
import sys
import urllib.request
from pathlib import Path

TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t",
    " \n",
    "\n ",
    "\r\n",
    "\r",
    "\r\n\r\n",
    " \t\n\r ",
    "Hello",
    " Hello",
    "  Hello",
    "Hello ",
    "Hello  ",
    "Hello world",
    "Hello  world",
    "Hello\nworld",
    "Hello\n\n world",
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "What is the capital of France?",
    "don't DON'T Don'T I'm I'M we'll WE'LL they've you're he'd it's '' ' 's 'S 'x ''s",
    "'tis 'twas rock 'n' roll",
    "0",
    "1",
    "12",
    "123",
    "1234",
    "12345",
    "1234567890",
    "3.14159",
    "1,234,567.89",
    "1 2 3",
    "x1y2",
    "½ ⅓ Ⅷ ² ①",
    "１２３４",
    "٠١٢٣٤٥٦٧٨٩",
    "০১২৩",
    "0x1F600",
    "1e-10",
    "2024-02-29T23:59:60Z",
    "v1.2.3-rc.4+build.5",
    "café",
    "cafe\u0301",
    "naïve Ünïcödé ÀÉÎÕÜ ß ẞ ſ ﬁ ﬀ",
    "Ｆｕｌｌ ｗｉｄｔｈ",
    "ÆØÅ æøå Þþ Ðð Łł Šš",
    "Привет, мир! Ёжик",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "வணக்கம் உலகம்",
    "你好，世界！",
    "今日は、世界。",
    "안녕하세요 세계",
    "ꯍꯦꯜꯂꯣ",
    "ᚺᛖᛚᛚᛟ",
    "𓀀𓁐𓂀",
    "𝓗𝓮𝓵𝓵𝓸 𝟙𝟚𝟛",
    "ខ្ញុំស្រលាញ់អ្នក",
    "😀",
    "😀😃😄",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👍🏽",
    "🇫🇷🇩🇪",
    "❤️ ☃ ☺ ☹",
    "🫠🪿🫨",
    "e\u0301\u0302\u0303\u0304",
    "a\u200bb\u200cc\u200dd",
    "\u00a0",
    "a\u00a0b",
    "\u2003em\u2003space",
    "\u3000",
    "\ufeffbom",
    "\u2028line\u2029paragraph",
    "a\x85b",
    "a\x0bb\x0cc",
    "\x00",
    "a\x00b",
    "\x01\x02\x1f\x7f",
    "\u202eright to left\u202c",
    "\ufffd",
    "\ue000\uf8ff",
    "\U000f0000\U0010fffd",
    "def f(x):\n    return x + 1\n",
    "\tif (a && b) {\n\t\tc();\n\t}\n",
    "for(int i=0;i<10;++i){}",
    "#include <stdio.h>\n",
    "SELECT * FROM t WHERE a != 'b' -- c",
    '<div class="a">&nbsp;</div>',
    '{"a": [1, 2.5, null, true], "b": {"c": "\\u00e9"}}',
    "https://example.org/a/b?c=d&e=f#g",
    "user.name+tag@example.com",
    "C:\\Users\\x\\y.txt",
    "$x^2 + \\frac{1}{2}$",
    "a/b\\c|d",
    "------------------------------------------------------------",
    "============",
    "....",
    "…",
    "!!!???",
    "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./",
    "(((())))[[[]]]{{{}}}",
    "“quotes” ‘single’ «guillemets» — – ‐",
    "→ ⇒ ∀x∈ℝ ∑ ∫ √ ≤ ≠ ∞",
    "┌─┐│└┘█▓▒░",
    "♠♥♦♣",
    "a" * 50,
    " " * 50,
    "\n" * 20,
    "ab " * 20,
    "lorem ipsum dolor sit amet",
    "supercalifragilisticexpialidocious",
    "CamelCaseAndHTTPServerError",
    "snake_case_name",
    "kebab-case-name",
    "MiXeD CaSe",
    "ALL CAPS TEXT",
    "iPhone12Pro",
    "3D2D",
    "  leading",
    "trailing  ",
    " \n \n ",
    "a \n b",
    "a\n \nb",
    "x\r\n\ty",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<|im_end|>b",
    "a <|im_end|> b",
    "<|im_end|><|im_end|>",
    "<|im_end",
    "|im_end|>",
    "<|im_<|im_end|>end|>",
    "<<|im_end|>>",
    "<|IM_END|>",
    "< |im_end| >",
    "<repo_name>x<file_sep>y",
    "<reponame>",
    "<jupyter_code>1+1<jupyter_output>2",
    "<s>",
    "</s>",
    "<unk>",
    "[INST] x [/INST]",
    "<empty_output><filename>",
    "<gh_stars>100-1000",
]
PIECES = [
    "the",
    " quick",
    "Brown",
    "FOX",
    "'s",
    "'LL",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u00a0",
    "é",
    "e\u0301",
    "ß",
    "漢字",
    "かな",
    "한",
    "ж",
    "ع",
    "ह",
    "😀",
    "👩‍💻",
    "1",
    "23",
    "456",
    "½",
    "٣",
    ".",
    ",",
    "!?",
    "--",
    "(",
    ")",
    "<",
    ">",
    "|",
    "<|im_end|>",
    "<|im_start|>",
    "_",
    "#",
    "\\",
    "/",
    "\x00",
    "\ufffd",
    "\u200d",
    "ſ",
    "K",
    "ǅ",
    "ﬃ",
    "\u0300",
]


def texts() -> list[str]:
    """The fixed texts and seeded random mixtures."""
    source = random.Random(0)
    mixed = ["".join(source.choices(PIECES, k=source.randint(2, 12))) for _ in range(250)]
    return TEXTS + mixed


def main(model: str) -> None:
    """Asks llama.cpp's server for the ids of every text, and writes them down."""
    # By name, since only this script needs it.
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 256
    server = xllamacpp.Server(params)

    def ids(text: str, parse_special: bool) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": parse_special}
        request = urllib.request.Request(f"{server.listening_address}/tokenize", json.dumps(body).encode())
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]

    rows = [{"text": text, "plain": ids(text, False), "special": ids(text, True)} for text in texts()]
    head = {"made_by": f"xllamacpp {importlib.metadata.version('xllamacpp')}", "model": Path(model).name}
    lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
    path = Path(__file__).with_name("reference_smollm2.json")
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n', "utf-8")
    print(f"{len(rows)} rows -> {path}")


if __name__ == "__main__":
    main(sys.argv[1])
