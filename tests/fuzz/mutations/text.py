"""Changes to TOML, to a model card's YAML front matter, and to plain text."""

from __future__ import annotations

from random import Random

from tests.fuzz.mutations.blind import blind
from tests.fuzz.mutations.values import STRINGS

_CONTROL = ("\x1b]0;title\x07", "\x1b[2K", "\0", "\r", "\u202e", "\ufeff", "\x7f", "\x85")

_TOML_VALUES = (
    "1", "-1", "0.5", "1.0e400", "nan", "-nan", "inf", "-inf", "9" * 400, "9" * 5000, "-" + "9" * 400,
    "0x" + "f" * 300, "0b" + "1" * 5000,
    "1_000", "true", "false", '""', '"0.1"', "''", '"""x"""', "1979-05-27", "1979-05-27T07:32:00Z",
    "9999-99-99", "07:32:00", "[]", "{}",
    "[[1]]", "{a = 1}", "{a = {b = 1}}", "[1, 'a']", '"\\u0000"', '"\\uD800"', '"\\x1b"', "1e-400", "0.1e1",
    "1.", ".1", "", "0.1 # c", "0o17",
)  # fmt: skip


def toml_text(random: Random, raw: bytes) -> bytes:
    """A change of one line of a TOML file, or a line more."""
    lines = raw.decode("utf-8", "surrogateescape").splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(lines) + 1)
        line = lines[place] if place < len(lines) else ""
        key = line.partition("=")[0].strip() or "max-kld"
        choice = random.randrange(9)
        if choice <= 2:
            lines[place : place + 1] = [f"{key} = {_toml_value(random)}"]
        elif choice == 3:
            lines[place:place] = [line]
        elif choice == 4:
            del lines[place : place + 1]
        elif choice == 5:
            lines[place:place] = [random.choice((f"[{_toml_key(random)}]", f"[[{_toml_key(random)}]]"))]
        elif choice == 6:
            lines[place : place + 1] = [f"{_toml_key(random)} = {_toml_value(random)}"]
        elif choice == 7:
            lines[place:place] = [
                random.choice(
                    (
                        ".".join("a" * random.choice((5, 900, 20_000))) + " = 1",
                        "[" + ".".join("a" * 3000) + "]",
                    )
                )
            ]
        else:
            return _respelled(random, "\n".join(lines).encode("utf-8", "surrogateescape"))
    return "\n".join(lines).encode("utf-8", "surrogateescape")


def _toml_key(random: Random) -> str:
    return random.choice(
        ("default", "q4_k_m", "max-kld", "min-same-top", "max-ln-ppl-ratio", "max-flips", '""', '"a b"',
        '"\\u001b]0;x\\u0007"', "default.default", "q4_k_m.x",
         '"' + "x" * 70_000 + '"', "é", "[", "a..b", '"\\uD800"', "__class__")
    )  # fmt: skip


def _toml_value(random: Random) -> str:
    if random.random() < 0.1:
        depth = random.choice((50, 900, 3000, 100_000))
        return random.choice(("[" * depth + "]" * depth, "{a=" * depth + "1" + "}" * depth, "[" * depth))
    return random.choice(_TOML_VALUES)


_YAML_VALUES = (
    "", "~", "null", "yes", "no", "1", "-1", "0.1", ".nan", ".inf", "9" * 400, "9" * 5000, "0x" + "f" * 3000,
    "0b" + "1" * 5000, "1e400", "190:20:30", "1_000",
    ":".join("1" * 3000),
    "2020-01-01", "9999-99-99", "2020-01-01T00:00:00Z", "2020-13-01 25:61:61",
    "!!python/object/apply:os.system ['true']", "!!binary x", "!!binary aGVsbG8=", "!!timestamp x",
    "!!timestamp 2020-01-01", "!!int x", "!!int ''", "!!float x", "!!float ''", "!!bool x", "!!null x",
    "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!str 1", "!!map [1]", "!!seq {a: 1}", "!unknown x",
    "!!int [1]", "!!omap x", "!!pairs [1]", "!<tag:yaml.org,2002:int> z", "*missing", "&a [*a]", "&a x",
    "[a, b", "{a: b", "[[a]]", "{a: {b: c}}", "- x", "|\n  text", ">\n  text", '"\\x1b]0;t\\x07"',
    "\"\\ud800\"", '"\\0"',
    "'it''s'", "? a", "{[1]: 2}", "{{a: 1}: 2}", "[1, 2.5, x, ~, 2020-01-01]", "{name: x, url: y}",
    "[{name: x}, {name: 1}, {other: 2}]", "@x", "`x`", "%x", "a: b: c", "\tx", "!!binary [1]",
)  # fmt: skip
_CARD_KEYS = (
    "license", "license_name", "license_link", "language", "languages", "tags", "pipeline_tag", "base_model",
    "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources",
    "name", "author", "version", "organization", "description", "finetune", "basename", "size_label", "url",
    "doi", "uuid", "repo_url", "model_name", "model_creator", "model_type", "model_version", "library_name",
    "<<", "", "1", "~", "? x", "!!int x",
)  # fmt: skip


def card(random: Random, raw: bytes) -> bytes:
    """A change of one entry of the front matter, or of what encloses it."""
    text = raw.decode("utf-8", "surrogateescape")
    before, fence, rest = text.partition("---\n")
    matter, end, body = rest.partition("---\n")
    lines = matter.splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(lines) + 1)
        key = random.choice(_CARD_KEYS)
        choice = random.randrange(12)
        if choice <= 4:
            lines[place:place] = [f"{key}: {_yaml_value(random)}"]
        elif choice == 5:
            lines[place:place] = lines[place : place + 1]
        elif choice == 6:
            del lines[place : place + 1]
        elif choice == 7:
            lines[place:place] = [
                f"{key}:",
                *(f"- {_yaml_value(random)}" for _ in range(random.choice((1, 3)))),
            ]
        elif choice == 8:
            lines[place:place] = _laughs(random)
        elif choice == 9:
            lines[place:place] = [
                random.choice(
                    (
                        "%YAML 9.9",
                        "%TAG ! x",
                        "...",
                        "---",
                        "\t",
                        "- x",
                        "x",
                        ": ",
                        "? x",
                        f"a: {random.choice(_CONTROL)}",
                    )
                )
            ]
        elif choice == 10:
            fence, end = random.choice(
                (
                    ("---\n", ""),
                    ("--- \n", "---\n"),
                    ("---\r\n", "---\r\n"),
                    ("", ""),
                    ("---\n---\n", "---\n"),
                )
            )
        else:
            return _respelled(random, raw)
    return (before + fence + "\n".join(lines) + "\n" + end + body).encode("utf-8", "surrogateescape")


def _yaml_value(random: Random) -> str:
    choice = random.random()
    if choice < 0.08:
        depth = random.choice((50, 900, 3000, 20_000))
        return random.choice(
            (
                "[" * depth + "]" * depth,
                "{a: " * depth + "1" + "}" * depth,
                "[" * depth,
                "!!seq " * 2 + "[" * depth,
            )
        )
    if choice < 0.16:
        return '"' + random.choice(STRINGS).encode("unicode_escape").decode().replace('"', "'") + '"'
    return random.choice(_YAML_VALUES)


def _laughs(random: Random) -> list[str]:
    """Aliases of aliases: a small text that is a huge value."""
    key = random.choice(("tags", "language", "base_model", "x"))
    width = random.choice((2, 10))
    lines = ["a0: &a0 [x, y]"]
    lines += [
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]"
        for level in range(1, random.choice((4, 9, 30)))
    ]
    return [*lines, f"{key}: *a{len(lines) - 1}"]


def _respelled(random: Random, raw: bytes) -> bytes:
    text = raw.decode("utf-8", "surrogateescape")
    choice = random.randrange(8)
    if choice == 0:
        return b"\xef\xbb\xbf" + raw
    if choice == 1:
        return text.encode(random.choice(("utf-16", "utf-32", "utf-7")), "replace")
    if choice == 2:
        at = random.randrange(len(raw) + 1)
        return raw[:at] + random.choice((b"\xff", b"\xed\xa0\x80", b"\xe9", b"\0")) + raw[at:]
    if choice == 3:
        return raw.replace(b"\n", b"\r\n")
    if choice == 4:
        return raw.replace(b"\n", b"\r")
    if choice == 5:
        return raw * random.choice((2, 100))
    if choice == 6:
        return b"\n" * random.choice((1, 100_000)) + raw
    return blind(random, raw)


def plain_text(random: Random, raw: bytes) -> bytes:
    """Text in other encodings, with odd characters, or very long."""
    if random.random() < 0.5:
        return _respelled(random, raw)
    at = random.randrange(len(raw) + 1)
    odd = random.choice(
        (*STRINGS, *_CONTROL, "a" * 100_000, " " * 100_000, "\n" * 50_000, "{{ x }}" * 1000, "{% for %}")
    )
    return raw[:at] + odd.encode("utf-8", "surrogatepass") + raw[at:]
