"""Mark up the code of a response simply: keywords, strings, numbers, comments.

One regular expression rather than a parser, because half of what a model writes does not parse.
Every alternative consumes what it has looked at, so hostile text costs linear time.
"""

import builtins
import keyword
import re

from markupsafe import Markup, escape

from rlef_mega.report.display import visible

CALLABLE = "|".join(name for name in dir(builtins) if name.islower() and name.isalpha())
TOKEN = re.compile(
    rf"""
      (?P<comment> \#[^\n]* )
    | (?P<string> [A-Za-z]{{0,2}} (?: \"\"\" (?:\\.|[^\\])*? (?:\"\"\"|\Z)
                                    | ''' (?:\\.|[^\\])*? (?:'''|\Z)
                                    | "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'? ) )
    | (?P<keyword> \b(?:{"|".join(keyword.kwlist)})\b )
    | (?P<builtin> \b(?:{CALLABLE})\b(?=\() )
    | (?P<number> \b\d[\w.]* )
    | \w+
    """,
    re.VERBOSE | re.DOTALL,
)
FENCED = re.compile(r"(?P<open>```[\w+-]*\n?)(?P<code>.*?)(?P<close>```|\Z)", re.DOTALL)


def highlight_code(code: str) -> Markup:
    parts, end = [], 0
    for match in TOKEN.finditer(code):
        if match.lastgroup is None:
            continue
        parts.append(escape(code[end : match.start()]))
        parts.append(Markup('<span class="{}">{}</span>').format(match.lastgroup, match[0]))
        end = match.end()
    return Markup("").join([*parts, escape(code[end:])])


def highlight_response(response: str, *, starts_in_code: bool = False) -> Markup:
    """A response, its fenced blocks as code. `starts_in_code`: the prompt opened the fence."""
    text = visible(response)
    parts, end = [], 0
    if starts_in_code:
        end = text.find("```") if "```" in text else len(text)
        parts.append(highlight_code(text[:end]))
        parts.append(Markup('<span class="fence">{}</span>').format(text[end : end + 3]))
        end += 3
    for match in FENCED.finditer(text, end):
        parts.append(escape(text[end : match.start()]))
        parts.append(Markup('<span class="fence">{}</span>').format(match["open"]))
        parts.append(highlight_code(match["code"]))
        parts.append(Markup('<span class="fence">{}</span>').format(match["close"]))
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])
