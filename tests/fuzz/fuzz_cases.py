"""Hostile values from a seeded generator: text, trees, YAML, JSON lines, bytes of files."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

CONTROL_TOKENS = [
    "<|im_end|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "</s>",
    "<think>",
    "</think>",
    "<action>",
    "</action>",
]
EXECUTION = [
    "__import__('os').system('touch PWNED')",
    "$(touch PWNED)",
    "`touch PWNED`",
    "; touch PWNED;",
    "!!python/object/apply:os.system ['touch PWNED']",
    "!!python/name:os.system",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "${jndi:ldap://127.0.0.1/x}",
    "cos\nsystem\n(S'touch PWNED'\ntR.",
    "../../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "\\\\host\\share",
    "%s%n%x",
    "{r.name}",
]
ODD = [
    "", " ", "\n", "\r\n", "\t", "\x00", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ud800", "a\udfffb",
    "\U0010ffff", "é", "дверь", "門", "👩‍👩‍👧", "z" + "\u0300" * 50, "NaN", "Infinity", "-inf", "1e999", "null", "true",
    "~", "yes",
    "0x7f", "1_000", "2024-13-45", "1:30:00", "=", "<<", "*a", "&a", "- -", "{", "}", "[", "]", ":", "#", "|", ">",
    "'", '"',
    "%TAG", "---", "...", "!!binary |", "__proto__", "constructor", "__class__", "extends", "epo", "tiny",
]  # fmt: skip
NUMBERS = [
    0,
    -1,
    1,
    2,
    255,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    10**400,
    0.0,
    -0.0,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]


def text(rng: random.Random, *, longest: int = 60) -> str:
    """A string of any kind: letters, odd characters, control tokens, attempts at execution, now and then very long."""
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(ODD)
    if kind < 0.25:
        return rng.choice(EXECUTION)
    if kind < 0.3:
        return rng.choice([*ODD, *CONTROL_TOKENS, "a", "ab "]) * rng.randrange(1, 3000)
    parts: list[str] = []
    for _ in range(rng.randrange(1, 8)):
        draw = rng.random()
        if draw < 0.4:
            parts.append("".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(1, max(2, longest // 4)))))
        elif draw < 0.55:
            parts.append("".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 6))))
        elif draw < 0.7:
            parts.append(rng.choice(CONTROL_TOKENS))
        elif draw < 0.85:
            parts.append(rng.choice(ODD))
        else:
            parts.append(
                rng.choice(["go to", "open", "take", "focus on", "look around", "1", "door", "push", " ", "\n"])
            )
    return "".join(parts)


def leaf(rng: random.Random) -> Any:
    draw = rng.random()
    if draw < 0.35:
        return text(rng)
    if draw < 0.6:
        return rng.choice(NUMBERS)
    if draw < 0.75:
        return rng.randrange(-5, 100)
    if draw < 0.85:
        return rng.random()
    return rng.choice([None, True, False])


def value(rng: random.Random, *, depth: int = 3) -> Any:
    """A tree of plain data."""
    draw = rng.random()
    if depth == 0 or draw < 0.6:
        return leaf(rng)
    if draw < 0.8:
        return [value(rng, depth=depth - 1) for _ in range(rng.randrange(4))]
    return {text(rng, longest=12): value(rng, depth=depth - 1) for _ in range(rng.randrange(4))}


def mutated_tree(rng: random.Random, tree: Any, *, changes: int = 1) -> Any:
    """A deep copy of plain data with values replaced, keys removed, added or renamed, in random places."""
    tree = json.loads(json.dumps(tree))
    for _ in range(changes):
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            items = node.items() if isinstance(node, dict) else enumerate(node)
            for key, child in items:
                places.append((node, key))  # noqa: B023
                if isinstance(child, dict | list):
                    walk(child)

        if isinstance(tree, dict | list):
            walk(tree)
        if not places:
            return value(rng)
        node, key = rng.choice(places)
        draw = rng.random()
        if draw < 0.55:
            node[key] = value(rng)
        elif draw < 0.75:
            del node[key]
        elif isinstance(node, dict):
            node[text(rng, longest=12)] = value(rng)
        else:
            node.insert(rng.randrange(len(node) + 1), value(rng))
    return tree


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut off, bits flipped, parts removed, doubled, zeroed or replaced by garbage."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if not found:
            return rng.randbytes(rng.randrange(64))
        at = rng.randrange(len(found))
        end = min(len(found), at + rng.randrange(1, 40))
        draw = rng.random()
        if draw < 0.3:
            found[at] ^= 1 << rng.randrange(8)
        elif draw < 0.45:
            del found[at:]
        elif draw < 0.6:
            del found[at:end]
        elif draw < 0.7:
            found[at:at] = found[at:end]
        elif draw < 0.8:
            found[at:end] = bytes(end - at)
        else:
            found[at:end] = rng.choice([rng.randbytes(end - at), text(rng).encode("utf-8", "surrogatepass")])
    return bytes(found)


def mutated_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says other things, or another length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = mutated_tree(rng, json.loads(data[8 : 8 + length]), changes=rng.randrange(1, 4))
    text = json_text(rng, header)
    claimed = rng.choice([len(text), len(text), len(text), 2**63, 2**32, 0, length])
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def json_text(rng: random.Random, tree: Any) -> bytes:
    """JSON as Python writes it, with NaN, infinities and lone surrogates; now and then a huge number or a deep nest."""
    draw = rng.random()
    if draw < 0.02:
        return b"[" * 100_000
    if draw < 0.04:
        return b'{"a":' * 3000 + b"1" + b"}" * 3000
    if draw < 0.05:
        return b"1" * 10_000
    return json.dumps(tree, ensure_ascii=rng.random() < 0.5, default=str).encode("utf-8", "surrogatepass")


def yaml_text(rng: random.Random, dump: Callable[[Any], str], tree: Any) -> bytes:
    """YAML of `tree`, or a bomb, or bytes that are no text at all."""
    draw = rng.random()
    if draw < 0.5:
        return dump(tree).encode("utf-8", "replace")
    if draw < 0.7:
        return mutated_bytes(rng, dump(tree).encode("utf-8", "replace"))
    return rng.choice(yaml_bombs(rng))


def yaml_bombs(rng: random.Random) -> Sequence[bytes]:
    wide = b"\n".join(
        [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        + [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)]
    )
    section = rng.choice(
        [b"environment", b"model", b"imitation", b"agent", b"evaluation", b"name", b"extends", b"seed", b"steps"]
    )
    return [
        wide,
        wide + b"\nenvironment: {options: {x: *a11}}",
        b"environment: {suite: corridor, options: &o {x: *o}}",
        b"environment: &e\n  options: *e",
        b"&a [*a]",
        b"? &k [*k]\n: 1",
        b"steps: " + b"9" * 5000,
        b"steps: 0x" + b"f" * 5000,
        b"seed: 1e400",
        b"steps: " + b"1_" * 3000 + b"1",
        section + b": " + b"[" * 2000,
        section + b": " + b"{a: " * 300 + b"1" + b"}" * 300,
        b"- " * 2000 + b"x",
        section + b": !!python/object/apply:os.system ['touch PWNED']",
        section + b": !!python/object/new:os.system ['touch PWNED']",
        section + b": !<tag:yaml.org,2002:python/name:os.system> x",
        section + b": !!binary " + rng.randbytes(8).hex().encode(),
        section + b": !!timestamp x",
        section + b": !!int x",
        section + b": !!float .",
        section + b": 2024-13-45",
        section + b": !!set {a, b}",
        section + b": !!omap [a: 1]",
        b"<<: [1, 2]",
        b"<<: *x",
        section + b":\t1",
        b"\xff\xfe" + "steps: 1".encode("utf-16-le"),
        b"steps: 1\x00",
        b"\xef\xbb\xbfsteps: 1",
        b"steps: \xed\xa0\x80",
        b'name: "\\ud800"',
        b'name: "a\\0b"',
        b'name: "..\\/.."',
        b"extends: " + section,
        b"extends: ../../../../etc/passwd",
        b"extends: /dev/zero",
        b"extends: [base]",
        b"extends: {a: b}",
        rng.randbytes(rng.randrange(200)),
        b"a" * 200_000,
        b"'" * 10_001,
        b"a: b: c",
        b"%YAML 9.9\n---\na",
        b"--- 1\n--- 2",
    ]
