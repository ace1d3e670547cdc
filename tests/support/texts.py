"""Text that finds out where two tokenizers part: many scripts, emoji, numbers, white space, code, special tokens."""

from __future__ import annotations

BROAD = [
    "Hello world! It's the 1st test, isn't it? We'll see: I'd say they've done what I'm told you're up to.",
    "HELLO WORLD! IT'S THE 1ST TEST, WE'LL SEE I'D THEY'VE I'M YOU'RE DON'T",
    "Grüße aus Köln, où l'été n'est pas trop chaud; ¿qué tal, señor Núñez? Çok güzel. Zażółć gęślą jaźń.",
    "Съешь ещё этих мягких французских булок. Добър ден! Їжак. Чудово, о'кей.",
    "Ελληνικά: το γρήγορο καφέ αλεπού. עברית: שלום עולם. العربية: السلام عليكم ورحمة الله",
    "हिन्दी में नमस्ते दुनिया। বাংলা ভাষা। தமிழ் மொழி. ภาษาไทยไม่มีช่องว่าง ລາວ မြန်မာ ខ្មែរ",
    "我想在apple工作1314151天～ 日本語のテキスト、カタカナ。 한국어 텍스트 안녕하세요 세계",
    "🚀 (normal) 😶‍🌫️ (joined) ✅ 🦙🦙 👩‍👩‍👧‍👦 🇩🇪🇫🇷 👍🏽 ☺️ \U0001fae0",
    "3 33 333 3333 33333 333333 3333333 3.3 3..3 3...3 1,234,567.89 0x1F 1e-10 ½ ² ① Ⅷ ٣٤٥ १२३",
    "spaces:  two   three    four     five\ttab\t\ttabs \t mixed \n newline \n\n two\n\n\nthree",
    "windows\r\n\r\n  end  ",
    "   leading, trailing   ",
    "\n\n\n   \n \t \n",
    "def f(x: int) -> str:\n    return f\"{x!r:>10}\"  # comment\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b->c * 2; } // done\n#include <stdio.h>\n/* --- */",
    "<html><body class=\"x\">&nbsp;</body></html> {\"a\": [1, 2.5, null], \"b\": \"\\u00e9\\n\"}",
    "https://example.org/path?query=1&x=%20#frag user@example.org C:\\Users\\x /usr/bin/env",
    "------======= ''''''```````\"\"\"\"......!!!!!!?????? ///// \\\\\\ ((( ))) ***bold*** __init__ a_b-c",
    "camelCase PascalCase snake_case SCREAMING_SNAKE iPhone McDonald XMLHttpRequest aB1cD2",
    "nbsp\u00a0here thin\u2009space zero\u200bwidth ideographic\u3000space line\u2028sep nel\u0085x ogham\u1680x",
    "combining: e\u0301 a\u030a n\u0303 — “quotes” ‘single’ «guillemets» …ellipsis – dash • bullet © ® ™ € £ ¥",
    "a", " ", "", "\n", "\t", "é", "漢", "🦙", "'", "''", "'s", " 's", "0", "00000", "x" * 70, " " * 40, "\n" * 20,
    "tokens [PAD5] [UNK] </s> <s> <|x|> <unk>",
]  # fmt: skip

# Texts with the special tokens that tests give their vocabularies.
SPECIAL = [
    "<|begin_of_text|>Hello<|end_of_text|>",
    "a<|end_of_text|> b <|end_of_text|>  c",
    "text <tool> with </tool> user <tool></tool> tokens",
]
