"""Text a model or an environment may produce to harm whoever looks at it, by what it attacks.

A viewer shows every one of them as text: nothing runs, no element appears that the viewer did not make, the terminal
does nothing, and every printable character can be read.

A page that runs one sets `window.pwned` or opens a dialog. A terminal that obeys one gets one of the characters that
`is_active` names.
"""

from __future__ import annotations

import unicodedata

_RUN = "window.pwned=1;alert(1)"

BROWSER: dict[str, str] = {
    "script": f"<script>{_RUN}</script>",
    "script upper case": f"<SCRIPT>{_RUN}</SCRIPT>",
    "script split": f"<scr<script>ipt>{_RUN}</scr</script>ipt>",
    "script from a data URL": '<script src="data:text/javascript,window.pwned=1"></script>',
    "end of script": f"</script><script>{_RUN}</script>",
    "end of script with space": f"</script ><img src=x onerror={_RUN}>",
    "double escaped script": f"<!--<script>{_RUN}//-->",
    "comment": f"<!-- --!><img src=x onerror={_RUN}> -->",
    "comment start": "<!--",
    "cdata": f"<![CDATA[<script>{_RUN}</script>]]>",
    "image with handler": f"<img src=x onerror={_RUN}>",
    "image without spaces": f"<img/src=x/onerror={_RUN}>",
    "body handler": f'<body onload="{_RUN}">',
    "svg handler": f"<svg onload={_RUN}>",
    "svg script": f'<svg><script xlink:href="data:,{_RUN}"></script><animate onbegin={_RUN} attributeName=x dur=1s>',
    "svg title": f"<svg><style><!--</style><img src=x onerror={_RUN}>",
    "math": f'<math><mtext><table><mglyph><style><img src=x onerror="{_RUN}">',
    "details": f"<details open ontoggle={_RUN}>",
    "autofocus": f"<input autofocus onfocus={_RUN}><button formaction=javascript:{_RUN}>ok</button>",
    "iframe": f'<iframe srcdoc="<script>parent.{_RUN}</script>"></iframe>',
    "object": f'<object data="data:text/html,<script>{_RUN}</script>"></object><embed src="javascript:{_RUN}">',
    "meta refresh": '<meta http-equiv="refresh" content="0;url=https://example.org/"><base href="https://example.org/">',
    "link": '<link rel="stylesheet" href="https://example.org/x.css"><link rel="prefetch" href="//example.org">',
    "style": "<style>*{display:none!important}</style>",
    "css": "red;}*{display:none!important;background:url(https://example.org/)}/*",
    "template tag": f"<template><img src=x onerror={_RUN}></template><slot name=x>",
    "javascript URL": f'<a href="javascript:{_RUN}">go on</a>',
    "javascript URL in Markdown": f"[go on](javascript:{_RUN}) ![x](https://example.org/leak.png)",
    "attribute end": f'" autofocus onfocus="{_RUN}" x="',
    "attribute end, single quote": f"' onmouseover='{_RUN}' x='",
    "string end": f"';{_RUN};//\";{_RUN};//`;{_RUN};//\\",
    "template literal": f"${{{_RUN}}}`${{{_RUN}}}`",
    "Jinja": "{{7*7}}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}{# #}",
    "other templates": "<%= 7*7 %> #{7*7} ${7*7} *{7*7} @(7*7) {{constructor.constructor('window.pwned=1')()}}",
    "entities": "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x&#62; &amp;amp; &nbsp; &#0; &notit;",
    "Plotly pseudo-HTML": f'<b>bold</b><br><a href="javascript:{_RUN}">x</a><span style="color:red">%{{y}}</span>$x^2$',
    "rich markup": "[bold red]x[/] [link=https://example.org]y[/link] [/nothing] \\[z]",
    "prototype key": "__proto__",
    "constructor key": "constructor",
    "prototype object": '{"__proto__": {"pwned": 1}, "constructor": {"prototype": {"pwned": 1}}}',
    "JSON end": f'"}}]}}</script><script>{_RUN}</script>',
    "line separators": "a\u2028b\u2029c\u0085d",
    "URL": "https://example.org/?q=<x>#' onclick=alert(1)",
}
"""Aimed at a page."""

TERMINAL: dict[str, str] = {
    "clear screen": "a\x1b[2J\x1b[Hb",
    "colours": "\x1b[31mred\x1b[0m \x1b[8mhidden\x1b[28m \x1b[38;2;0;0;0;48;2;0;0;0mblack on black",
    "one-byte CSI": "a\x9b31mb\x9b2J",
    "window title": "\x1b]0;title\x07after",
    "one-byte OSC": "\x9d0;title\x9cafter",
    "clipboard (OSC 52)": "\x1b]52;c;cm0gLXJmIH4=\x07after",
    "hyperlink (OSC 8)": "\x1b]8;;file:///etc/passwd\x1b\\click\x1b]8;;\x1b\\",
    "device control string": "\x1bP$q q\x1b\\after \x1bPq#0;2;0;0;0#0~\x1b\\",
    "privacy message": "\x1b^secret\x1b\\ \x1b_command\x1b\\",
    "answer back": "\x1b[c\x1b[6n\x1b[21t\x05after",
    "alternative screen": "\x1b[?1049h\x1b[?25l\x1b[?1000hafter",
    "scroll region, reset": "\x1b[1;1r\x1bc\x1b(0after",
    "escape at the end": "text\x1b",
    "overwriting": "success: false\rsuccess: true ",
    "backspace": "rm -rf /\b\b\b\b\b\b\b\bls      ",
    "bell, tab, vertical": "\x07a\tb\x0bc\x0cd\x7fe",
    "nul": "before\x00after",
    "every control character": "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])),
}
"""Aimed at a terminal."""

UNICODE: dict[str, str] = {
    "bidi override": "access granted \u202edetnarg ton\u202c",
    "bidi isolates": "\u2066a\u2067b\u2068c\u2069 \u202ax\u202by\u202dz\u202c \u200e\u200f\u061c",
    "bidi letters": "open \u05d3\u05dc\u05ea then \u0628\u0627\u0628",
    "zero width": "pass\u200bword \u200c\u200d\u2060\ufeff\u180e\u00ad\u034f\u2061\u2063",
    "tag characters": "hi\U000e0001\U000e0068\U000e0069\U000e007f",
    "variation selectors": "a\ufe0f\ufe0e\U000e0100b",
    "fillers": "a\u3164b\u115fc\uffa0d\u2800e",
    "other spaces": "a\u00a0b\u2003c\u3000d\u202fe\u205ff",
    "combining marks": "z" + "\u0300\u0336\u0489" * 40,
    "emoji family": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "lone surrogates": "a\ud800b\udfffc",
    "non-characters": "a\ufffeb\uffffc\U0010ffffd\ue000e\ufffdf",
    "interlinear": "a\ufff9b\ufffac\ufffbd",
}
"""Aimed at the reader's eyes. Lone surrogates survive JSON only as escapes (`ensure_ascii`)."""

PAYLOADS: dict[str, str] = {**BROWSER, **TERMINAL, **UNICODE}
"""All short ones, by name."""

LONG: dict[str, str] = {
    "a million characters": "0123456789" * 100_000,
    "a million line feeds": "\n" * 1_000_000,
    "a hundred thousand tags": f"<img src=x onerror={_RUN}>" * 100_000,
    "a long escape": "\x1b]52;c;" + "QUFB" * 50_000,
}
"""What a viewer folds: whole on demand, never in the way."""


def is_active(character: str) -> bool:
    """Whether a terminal or a reader's eyes may be steered by it: control, format and surrogate characters, line and
    paragraph separators. A line feed is active too; a viewer may write its own."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: str) -> str:
    """What of `text` any viewer must show as it is: letters, digits, punctuation and signs that have a width."""
    return "".join(
        c
        for c in text
        if not is_active(c) and unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lo", "Nd", "Po", "Ps", "Pe", "Sm", "Sc")
        if c not in "\u3164\u115f\uffa0"
    )
