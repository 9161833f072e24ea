#!/usr/bin/env python3
"""Write src/text/unicode_tables.h: the character classes that the splitters use, as Hugging Face tokenizers sees them.

    python3 -m venv v && v/bin/pip install tokenizers==0.23.3 && v/bin/python tools/unicode_tables.py >src/text/unicode_tables.h

The library is asked about every code point through its own regular expressions (Oniguruma, by its newest characters of Unicode 16), so that
the tables agree with it by construction. Debian 12's utf8proc (Unicode 15.0) disagrees on 5,055 code points.
"""
import tokenizers
from tokenizers import Regex, pre_tokenizers

CLASSES = [r"\p{Lu}|\p{Lt}", r"\p{Ll}", r"\p{Lm}|\p{Lo}", r"\p{M}", r"\p{N}", r"\s"]  # 1, 2, ...; 0 is any other
BLOCK = 128

points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
text = "".join(map(chr, points))
table = bytearray(0x110000)
for number, pattern in enumerate(CLASSES, 1):
    unmatched = bytearray(len(text))
    for _, (a, b) in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(text):
        unmatched[a:b] = b"\1" * (b - a)
    for i, c in enumerate(points):
        if not unmatched[i]:
            assert table[c] == 0, hex(c)
            table[c] = number

rows, index = {}, []
for at in range(0, 0x110000, BLOCK):
    index.append(rows.setdefault(bytes(table[at : at + BLOCK]), len(rows)))
last = max(i for i, row in enumerate(index) if row != index[-1]) + 1  # the tail of planes is all the same row
assert len(rows) <= 256 and not any(table[last * BLOCK :])
print(f"/* Made by tools/unicode_tables.py with tokenizers {tokenizers.__version__}. Do not edit. */")
print("#ifndef ORCD_TEXT_UNICODE_TABLES_H\n#define ORCD_TEXT_UNICODE_TABLES_H\n\n#include <stdint.h>\n")
print(f"#define UNI_BLOCK {BLOCK}\n#define UNI_END 0x{last * BLOCK:x} /* every code point from here on is of class 0 */\n")
print("/* Row of each block of code points. */")
print(f"static const uint8_t uni_block[{last}] = {{")
for i in range(0, last, 28):
    print("    " + ", ".join(str(v) for v in index[i : min(i + 28, last)]) + ",")
print("};\n\n/* Classes as digits: 1 upper and title case, 2 lower case, 3 other letters, 4 marks, 5 numbers, 6 spaces. */")
print(f"static const char uni_row[{len(rows)}][UNI_BLOCK + 1] = {{")
for row in rows:
    print('    "' + "".join(str(v) for v in row) + '",')
print("};\n\n#endif")
