#!/usr/bin/env python3
"""Writes tests/data/chat/jinja.json: expressions and small templates as real Jinja renders them, set up as Transformers does.

    python -m venv venv && venv/bin/pip install jinja2==3.1.6 transformers
    venv/bin/python scripts/jinja-cases.py

A result of null says that Jinja refuses. Of what is combined each with each, only some are kept: all with `--all`.
"""

import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

CONTEXT = {
    "messages": [
        {"role": "user", "content": "añb"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, True]}}}]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]},
    ],
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds \"two\" <numbers> & it's ünïcode.",
               "parameters": {"type": "object", "properties": {
                   "a": {"type": "integer", "enum": [1, 2]}, "b": {"type": "array", "items": {"type": "string"}},
                   "items": {"type": ["string", "null"], "default": None}}, "required": ["a"]}}}],
    "documents": None,
    "s": "Hello World", "e": "", "sp": "  a b  c ", "nl": "one\n two\n\nthree\n", "u": "Größe ÉTÉ ß ǆ", "q": "it's", "qq": "a\"b'c\\",
    "n": 7, "neg": -7, "z": 0, "f": 2.5, "big": 12345678901234567890, "t": True, "no": False, "nul": None,
    "l": [3, 1, 2], "ls": ["b", "A", "c"], "le": [], "lm": [1, "a", None, 2.5, True, [1], {"k": "v"}],
    "d": {"b": 1, "a": 2, "C": 0}, "de": {}, "dn": {"items": 5, "x": {"y": {"z": "deep"}}, "get": 1, "keys": [1]},
    "people": [{"name": "Ann", "age": 30, "city": "X"}, {"name": "bob", "age": 25, "city": "Y"},
               {"name": "Cy", "age": 30, "city": "X"}, {"name": "Di"}],
    "fs": [1.0, 0.1, 1e16, 1e-5, 123456789.125, 1e22, 1e300, -0.0, 100.0, 0.0001],
}

CASES = []


def some(cases, every):
    """Not all of many that are alike."""
    CASES.extend(cases if "--all" in sys.argv else cases[::every])


def e(text):
    """Expressions, one a line."""
    for line in text.strip("\n").split("\n"):
        if line.strip():
            CASES.append("{{ " + line.strip() + " }}")


def t(*templates):
    CASES.extend(templates)


# --- values as texts
VALUES = ["s", "e", "n", "neg", "f", "big", "t", "no", "nul", "l", "ls", "le", "lm", "d", "de", "fs", "q", "qq", "nothing", "messages",
          "(1, 2)", "(1,)", "()", "[(1, 'a')]", "1e16", "1e15", "1.5e-7", "{'a': {'b': [none]}}", "['it\\'s', \"a\\\"b'\"]", "'\\n\\t\\x01ü'", "['\\n\\t\\x01ü\\u200b\\xa0']",
          "{1: 'a', none: 2, true: 3}", "[1.0, 2]", "-0.0", "1_000", "0x1f", "0b101", "0o17", "1.5e3", "'a' 'b'", "10000000000000000000000"]
ASKED = []
for v in VALUES:
    ASKED += ("{{ " + x + " }}" for x in (f"{v}\n'' ~ {v}\n{v} ~ '|' ~ {v}\n{v} | string\n[{v}, {v}] | join('-')\n{v} | upper\n'%s' % [{v}]\n'%s %r' | format({v}, {v})\n'{{}}'.format({v})\n{v} | tojson\n{v} | length\n{v} | list\n{v} | default('D')\n{v} | default('D', true)\n{v} | int\n{v} | float\n{v} | first\n{v} | trim\nnot {v}").split("\n"))
some(ASKED, 5)

# --- tests
TESTS = ["defined", "undefined", "none", "string", "number", "integer", "float", "boolean", "mapping", "sequence", "iterable", "callable", "true",
         "false", "odd", "even", "lower", "upper", "divisibleby(7)", "divisibleby 7", "sameas(none)", "sameas true", "eq(7)", "equalto 7", "ne 7", "gt 2", "greaterthan(2)",
         "lt(8)", "le 7", "ge 7", "in [7, none]", "in 'Hello World'", "escaped", "filter", "test", "== 7"]
ASKED = []
for test in TESTS:
    for v in ["s", "e", "n", "f", "t", "nul", "l", "d", "nothing", "(1, 2)", "range(3)", "'abc'", "'ABC'", "none", "1.0"]:
        ASKED.append("{{ " + f"{v} is {test}" + " }}")
    ASKED.append("{{ " + f"n is not {test}" + " }}")
some(ASKED, 5)
e("""
'upper' is filter
'nope' is filter
'odd' is test
'nope' is test
raise_exception is callable
range is callable
s.upper is callable
s.upper is defined
d.items is defined
d.nope is defined
d.items() is iterable
d.items() is sequence
n is defined and n is number and not n is string
n is not defined or true
nothing is not defined
x.y is defined
nothing.a is defined
dn.x.y.z is defined
dn.x.q is defined
d['nope'] is defined
l[10] is defined
l[1] is defined
s[0] is string
1 is sameas 1
true is sameas true
true is sameas 1
none is sameas none
'a' is in 'abc'
'a' is in(['b', 'a'])
3 is in l
n is nope
""")

# --- operators
ASKED = []
NUMBERS = ["7", "-7", "2", "0", "2.5", "-2.5", "true", "1e3", "3"]
for op in ["+", "-", "*", "/", "//", "%", "**", "<", "==", "~"]:
    for a in NUMBERS:
        for b in ["2", "-3", "0", "2.5", "true"]:
            ASKED.append("{{ " + f"{a} {op} {b}" + " }}")
some(ASKED, 4)
ASKED = []
MIXED = ["'a'", "1", "none", "[1]", "{'a': 1}", "nothing", "(1, 2)", "true", "1.5"]
for op in ["+", "-", "*", "/", "%", "<", "<=", ">", "==", "!=", "in", "not in", "and", "or", "~"]:
    for a in MIXED:
        for b in MIXED:
            ASKED.append("{{ " + f"{a} {op} {b}" + " }}")
some(ASKED, 7)
e("""
1 + 2 * 3
(1 + 2) * 3
2 ** 3 ** 2
-2 ** 2
2 ** -1
-n
-n + 1
- -n
+n
-d.b
-l[0]
-n | abs
(-n) | abs
-1 | abs
-7 // 2
-7 % 3
7 % -3
-7.5 // 2
-7.5 % 2
7 / 2
6 / 2
10 ** 20
2 ** 100
9223372036854775807 + 1
-9223372036854775808 - 1
9223372036854775807 * 2
big + 1
big * big
big // 3
big % 10
1 / 3
0.1 + 0.2
1e308 * 10
100000000000000000.0
5 // 0.0
5 % 0.0
0 ** 0
0 and 2
1 and 2
0 or 2
1 or 2
'' or 'x'
[] or 'empty'
{} or none
none and 1
none or none
n and s
z or s
nothing or 'x'
nothing and 'x'
not nothing
not 0
not not 'a'
not n == 7
not n in l
not (n in l)
n and not z
1 < 2 < 3
1 < 3 < 2
1 < n <= 7
1 == 1 == 1
3 > 2 > 1
1 < 2 > 0 != 5
'a' < 'b' < 'c'
'a' in 'abc' in ['abc']
'B' < 'a'
'a' < 'B'
'é' > 'z'
[1, 2] < [1, 3]
[1, 2] == [1, 2]
(1, 2) == (1, 2)
(1, 2) == [1, 2]
{'a': 1} == {'a': 1.0}
1 == 1.0
1 == true
0 == false
'1' == 1
none == false
nothing == none
nothing == nothing
nothing != 1
1 in [1.0]
true in [1]
'a' in {'a': 1}
1 in {'a': 1}
'' in 'abc'
'b' not in 'abc'
'b' not in ['abc']
none in [none]
nothing in [1]
nothing in 'abc'
1 in 5
'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1, 'a'] ~ {'k': 'v'}
1 ~ 2
1 ~ 2 + 3
'a' + 'b' ~ 'c'
1 + 2 ~ 3
'a' ~ 'b' * 2
'a' * 3
3 * 'a'
'a' * 0
'a' * -1
[1, 2] * 2
2 * [0]
[1] + [2]
(1,) + (2,)
[1] + (2,)
(1, 2) * 2
'x' if true
'x' if false
'x' if n == 7 else 'y'
'x' if z else 'y' if n else 'w'
('x' if false) is defined
('a' if false) ~ 'b'
1 if 2 if 0 else 3 else 4
n == 7 and 'yes' or 'no'
s is string and s | length > 3
s | length > 3 and n
s | length + 1
s | upper ~ e
(s ~ 'a') | upper
s.split()[0].lower() | title
[1, 2, 3] | sum / 2
n is divisibleby 7 and true
1 if n is odd else 2
d.a + d.b
d['a'] * 2
messages[0].content + '!'
messages[0]['role'] == 'user' and messages[1].content is none
(messages | length) - 1
messages | length - 1
'a' in messages[0].content
tools is not none and tools | length > 0
'%s' % 'a'
'%s %s' % ('a', 1)
'%s' % (1, 2)
'%d' % 3.7
'%d items' % n
'%5d|%-5d|%05d|%+d|% d' % (1, 2, 3, 4, 5)
'%5.2f|%.3f|%f|%e|%g|%G' % (1.234, 2, 3.5, 12345.678, 0.00001234, 1e20)
'%x %X %o %#x %#o' % (255, 255, 8, 255, 8)
'%c%c' % ('a', 98)
'%r %a' % ('é', 'é')
'%s' % none
'%s' % [1, 'a']
'%s' % {'a': 1}
'%(a)s and %(b)05d' % {'a': 'x', 'b': 42}
'%(a)s' % d
'%%'
'%%' % ()
'100%%' % ()
'%s%%' % 5
'%10s|%-10s|%.2s' % ('abc', 'abc', 'abc')
'%*d' % (5, 42)
'%.*f' % (2, 3.14159)
'%d' % 'a'
'%s' % ()
'%s %s' % ('a',)
'a' % 1
'a' % {'b': 1}
'%q' % 1
'%i %u' % (3, 4)
'%5.1f%%' % 99.55
'%s' % nothing
'%d' % true
'%d' % big
'%x' % -255
'%e' % 0
'%g %g %g' % (1.0, 100000.0, 1000000.0)
'%.0f %.0f' % (0.5, 1.5)
'%s' % 1e16
'%08.3f' % -3.14159
'%+.2e' % 12345.6789
'%-8s|' % n
""")

# --- subscripts and slices
e("""
l[0]
l[-1]
l[-4]
l[3]
l['0']
l.0
l.1.5
ls[1][0]
s[0]
s[-1]
s[99]
s[1:3]
s[::-1]
s[:-1]
s[-3:]
s[5:2]
s[::2]
s[None:3]
s[:n]
s[n:]
s[1:n:2]
s[::0]
u[1:5]
l[1:]
l[::-1]
l[:1]
l[-2:][0]
(1, 2, 3)[1:]
(1, 2, 3)[0]
range(10)[2:5] | list
range(10)[::-3] | list
range(5) | list
range(5)
range(2, 8, 3) | list
range(5, 0, -2) | list
range(0) | list
range(3)[1]
range(3)[5]
range(1, 2, 0) | list
range(3) | length
2 in range(3)
d['a']
d.a
d['zz']
d.zz
d[none]
{1: 'a'}[1]
{1: 'a'}[1.0]
{true: 'a'}[1]
{none: 'a'}[none]
{(1, 2): 'a'}[(1, 2)]
{[1]: 'a'}
d['a':]
nul[0]
nul.a
nothing.a
nothing[0]
nothing['a']
n[0]
n.a
s.nope
s['nope']
l.nope
l['nope']
l[1.0]
l[true]
l[none]
l['a':]
dn.items
dn['items']
dn.get
dn['keys']
d['items'] is defined
d.items is callable
d['items'] and 1
dn.x.y.z
dn['x']['y'].z
dn.x['y']['z'][0]
dn.items()
dn.keys() | list
dn.get('x').y
people[0].name
people[-1]['age']
people[0]['name'][0]
messages[-1].content[0].text
messages[1].tool_calls[0].function.arguments.b[0]
tools[0].function.parameters.properties.items()|list|length
tools[0].function.parameters.properties['items']
tools[0].function.parameters.properties.b['items'].type
tools[0].function.parameters.properties.a['items'] is defined
[1, 2, 3][true]
'abc'[true]
[[1, 2], [3]][0][1]
{'a': [1, {'b': 'c'}]}.a[1].b
{'a': 1}.a
{'a': 1,}
[1, 2,]
{'a': 1, 'a': 2}
{'b': 1, 'a': 2}
{n: s, s: n}
{'a' ~ 1: 2}
[x for x in l]
s.upper.lower
d[1:]
nul[1:]
n[1:]
s['b':]
messages[0][1:]
d.items()[1:]
'a'[::0]
""")

# --- methods of texts
TEXTS = ["s", "e", "sp", "nl", "u", "'abc'", "'ABC'", "'123'", "'aB1'", "'a-b_c d'", "'\\x1c a\\u2003'", "'½²'", "'٣'", "'Hello world foo'", "'ǆ ß'", "\"they're bill's\""]
ASKED = []
for m in ["upper()", "lower()", "title()", "capitalize()", "swapcase()", "casefold()", "strip()", "lstrip()", "rstrip()", "split()", "rsplit()",
          "splitlines()", "splitlines(true)", "splitlines(keepends=True)", "isdigit()", "isalpha()", "isalnum()", "isspace()", "isupper()", "islower()",
          "istitle()", "isdecimal()", "isnumeric()", "isidentifier()", "isascii()", "isprintable()", "split(' ')", "rsplit(' ', 1)", "split(None, 1)", "split(maxsplit=1)",
          "partition(' ')", "rpartition(' ')", "expandtabs()", "zfill(15)", "center(15)", "ljust(14, '.')", "rjust(14, '.')", "replace('a', 'XX')", "count('a')", "find('b')"]:
    for v in TEXTS:
        ASKED.append("{{ " + f"{v}.{m}" + " }}")
some(ASKED, 5)
e("""
s.strip('Hd')
s.lstrip('He')
s.rstrip('dl')
s.strip('')
s.strip(none)
sp.strip(' a')
s.split('o')
s.split('o', 1)
s.split('o', maxsplit=1)
s.split(sep='o', maxsplit=1)
s.split('')
s.split(none)
s.rsplit('o', 1)
s.rsplit('o', maxsplit=1)
s.rsplit(none, 1)
sp.rsplit(none, 1)
sp.split(none, 1)
sp.split(' ')
sp.split('  ')
e.split()
e.split(',')
'a,b,,c,'.split(',')
'a,b,,c,'.split(',', 2)
'a,b,,c,'.split(',', -1)
'a,b,,c,'.split(',', 0)
'a,b,,c,'.rsplit(',', 2)
'abcabc'.split('bc')
'x</think>y</think>z'.split('</think>')[-1].lstrip('\\n')
'x</think>y</think>z'.split('</think>', 1)[1]
'x</think>y'.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n')
s.startswith('He')
s.startswith('x')
s.startswith(('x', 'He'))
s.startswith(())
s.startswith(['He'])
s.startswith('l', 2)
s.startswith('l', 2, 3)
s.startswith('l', -9, 99)
s.startswith('')
s.startswith(1)
s.endswith('ld')
s.endswith(('x', 'ld'))
s.endswith('lo', 0, 5)
s.endswith('lo', 3, 5)
s.endswith('')
s.find('o')
s.find('o', 5)
s.find('o', 5, 7)
s.find('zz')
s.find('o', -4)
s.find('', 3)
s.find('', 99)
s.rfind('o')
s.rfind('o', 0, 5)
s.rfind('zz')
s.index('o')
s.index('zz')
s.rindex('o')
s.rindex('zz')
u.find('ß')
u.index('É')
u.rfind('ß')
s.count('l')
s.count('l', 5)
s.count('l', 0, 3)
s.count('')
e.count('')
'aaaa'.count('aa')
s.replace('l', 'L')
s.replace('l', 'L', 1)
s.replace('l', 'L', -1)
s.replace('', '-')
s.replace('', '-', 2)
e.replace('', 'x')
s.replace('l', '')
s.replace('l', 1)
s.replace('l')
s.replace(old='l', new='L')
s.removeprefix('Hello ')
s.removeprefix('x')
s.removesuffix('World')
s.removesuffix('')
','.join(ls)
','.join('abc')
','.join([])
','.join([1])
','.join(d)
', '.join(d.keys())
''.join(['a', 'b'])
'-'.join(('x', 'y'))
'{} {}'.format(1, 'a')
'{0} {1} {0}'.format('a', 'b')
'{a} {b}'.format(a=1, b='x')
'{:>5}|{:<5}|{:^5}|'.format('a', 'b', 'c')
'{:*^9}'.format('mid')
'{:05d} {:+d} {: d} {:,} {:_}'.format(42, 5, 6, 1234567, 1234567)
'{:.2f} {:8.3f} {:e} {:g} {:%} {:.1%}'.format(3.14159, 2.5, 12345.678, 0.0001, 0.25, 0.256)
'{:x} {:X} {:#x} {:b} {:o} {:c} {:#b}'.format(255, 255, 255, 5, 8, 97, 5)
'{!r} {!s} {!a}'.format('é', 'b', 'é')
'{0[0]} {0[1]}'.format([1, 2])
'{0[a]} {x.b}'.format({'a': 1}, x=2)
'{{}} {}'.format(1)
'{'.format(1)
'}'.format(1)
'{} {0}'.format(1)
'{}'.format()
'{a}'.format()
'{:d}'.format('a')
'{:s}'.format(1)
'{:5}|{:5}|'.format(1, 'a')
'{:.2}'.format('abc')
'{:.3}'.format(3.14159)
'{}'.format(none)
'{} {} {}'.format(true, 1.0, [1, 'a'])
'{:>{w}}'.format('a', w=5)
'{:,.2f}'.format(1234567.891)
'{:>10,}'.format(1234567)
'{:5}'.format(none)
'{:<5}'.format(true)
'{:5}'.format(true)
'{:d}'.format(true)
'{:}'.format([1])
'{:5}'.format([1])
'{:.0f}'.format(2.5)
'{:n}'.format(1234)
'{a}'.format_map({'a': 1})
s.encode()
s.encode('utf-8')
s.center(20, '*')
s.center(3)
'ab'.center(5)
'abc'.center(6)
s.ljust(3)
s.rjust(20, 'ab')
s.zfill(3)
'-42'.zfill(6)
'+42'.zfill(6)
''.zfill(3)
'a\\tb'.expandtabs()
'a\\tb'.expandtabs(4)
'a\\tb'.expandtabs(tabsize=2)
'ab\\n\\tc'.expandtabs(4)
'a-b-c'.partition('-')
'a-b-c'.rpartition('-')
'abc'.partition('-')
'abc'.rpartition('-')
'abc'.partition('')
'a-b'.partition('-')[2]
'\\r\\na\\x0bb\\u2028c'.splitlines()
'a\\r\\nb'.splitlines(true)
'a\\n'.splitlines()
'a\\nb'.splitlines(False)
'abc'.translate({97: 'x'})
'abc'.maketrans('a', 'b')
s.upper(1)
s.nope()
s.__class__
s.__len__()
s.__class__.__mro__
''.__class__
s['upper']()
s.lower().upper().title()
s.upper().lower
s.strip().split(' ')[0] | upper
'%s'.upper()
'abc'.isalpha() and not '12'.isalpha()
n.bit_length()
n.real
f.is_integer()
(2.0).is_integer()
s is string and s.startswith('H')
messages[0].content.strip().upper()
messages[0]['content'].split('ñ')
""")

# --- methods of lists and dictionaries
e("""
l.index(1)
l.index(9)
l.index(2, 1)
l.index(3, 1)
l.count(1)
[1, 1.0, true].count(1)
l.copy()
l.append(1)
l.pop()
l.sort()
l.reverse()
l.insert(0, 1)
l.extend([1])
l.remove(1)
l.clear()
(1, 2, 1).count(1)
(1, 2, 1).index(2)
d.get('a')
d.get('zz')
d.get('zz', 'D')
d.get('zz', default='D')
d.get('a', 5)
d.get()
d.items()
d.items() | list
d.keys()
d.keys() | list
d.values()
d.values() | list
d.values() | sum
d.items() | length
d.copy()
d.pop('a')
d.update({'x': 1})
d.setdefault('x', 1)
d.clear()
d.popitem()
d.keys() | join(',')
d.items() | first
(d.items() | list)[0][1]
d.items()[0]
d.keys()[0]
'a' in d.keys()
2 in d.values()
('a', 2) in d.items()
de.items() | list
nothing.items()
nul.items()
s.items()
l.items()
d | items | list
nothing | items | list
nul | items | list
d.fromkeys([1])
dict(a=1, b=2)
dict({'a': 1}, b=2)
dict([('a', 1)])
dict()
dict(d).a
dict(d, **{'z': 1})
namespace(a=1).a
namespace(a=1).b
namespace({'a': 1}).a
namespace(a=1) is mapping
""")

# --- filters
e("""
s | length
l | count
d | length
n | length
nul | length
s | upper
s | lower
s | title
"they're bill's FRIENDS" | title
'hello-world (foo) [bar] <baz> {q}' | title
"a b\\tc\\nd" | title
s | capitalize
'ÉTÉ' | capitalize
n | upper
sp | trim
s | trim('Hd')
'--a--' | trim('-')
'xxaxx' | trim(chars='x')
nul | trim
s | replace('l', 'L')
s | replace('l', 'L', 1)
s | replace('l', 'L', count=2)
s | replace('', '-')
n | replace('7', 'x')
s | replace(old='l', new='L')
s | replace('l')
ls | join
ls | join(', ')
ls | join(d=', ')
l | join('-')
lm | join('|')
people | join(', ', attribute='name')
people | join(', ', 'name')
people | map(attribute='name') | join(', ')
people | map(attribute='age', default=0) | join(', ')
people | map(attribute='age') | join(', ')
people | map(attribute='age') | list
messages | map(attribute='role') | list
messages | map(attribute='tool_calls.0.function.name') | list
[[1, 2], [3, 4]] | map(attribute=1) | list
[[1, 2], [3, 4]] | map(attribute='1') | list
ls | map('upper') | list
ls | map('upper') | join
l | map('string') | join
ls | map('replace', 'b', 'x') | list
['1', 'x'] | map('int') | list
['1', 'x'] | map('int', default=9) | list
['1', 'x'] | map('int', 9) | list
l | map
l | map('nope') | list
l | map(nope=1) | list
[[1], [2, 3]] | map('length') | list
[[3, 1], [2]] | map('first') | list
l | map('default', 1) | list
s | join('-')
nothing | join
d | join(',')
nul | join
n | join
l | sort
ls | sort
ls | sort(case_sensitive=true)
l | sort(reverse=true)
l | sort(true)
people | sort(attribute='name') | map(attribute='name') | list
people[:3] | sort(attribute='age') | map(attribute='name') | list
people[:3] | sort(attribute='age,name', reverse=true) | map(attribute='name') | list
people[:3] | sort(attribute='age') | map(attribute='name') | list
lm | sort
s | sort | join
d | sort
nothing | sort
l | unique | list
ls | unique | list
['a', 'A', 'b', 'a'] | unique | list
['a', 'A', 'b', 'a'] | unique(case_sensitive=true) | list
[1, 1.0, 2] | unique | list
people | unique(attribute='city') | map(attribute='name') | list
l | reverse
l | reverse | list
s | reverse
d | reverse | list
(1, 2) | reverse | list
n | reverse
l | first
l | last
le | first
le | last
s | first
s | last
e | first
d | first
d | last
nothing | first
nothing | last
nul | first
l | min
l | max
le | min
le | max
ls | min
ls | max
ls | max(case_sensitive=true)
people[:3] | min(attribute='age')
people[:3] | max(attribute='age')
[1, 2.5] | max
l | sum
l | sum(start=10)
[1.5, 2] | sum
le | sum
people[:3] | sum(attribute='age')
people[:3] | sum(attribute='age', start=100)
people[:3] | sum('age')
ls | sum
[[1], [2]] | sum(start=[])
d | dictsort
d | dictsort(case_sensitive=true)
d | dictsort(true)
d | dictsort(by='value')
d | dictsort(false, 'value')
d | dictsort(reverse=true)
d | dictsort(by='nope')
l | dictsort
{'b': 1, 'B': 2} | dictsort
d | items | list
d | list
s | list
n | list
nul | list
nothing | list
l | list
range(3) | list
d.items() | list
l | select('odd') | list
l | reject('odd') | list
l | select('gt', 1) | list
l | select('>', 1) | list
l | select | list
lm | select | list
lm | reject | list
lm | select('string') | list
lm | select('none') | list
l | select('nope') | list
l | select('in', [1, 2]) | list
l | select('equalto', 2) | first
people | selectattr('age') | map(attribute='name') | list
people | selectattr('age', 'defined') | map(attribute='name') | list
people | rejectattr('age', 'defined') | map(attribute='name') | list
people | selectattr('age', 'equalto', 30) | map(attribute='name') | list
people | selectattr('age', 'eq', 30) | map(attribute='name') | list
people | selectattr('age', '==', 30) | list | length
people | rejectattr('city', 'equalto', 'X') | map(attribute='name') | list
people | selectattr('city', 'in', ['X']) | map(attribute='name') | list
messages | selectattr('role', 'equalto', 'user') | list | length
messages | selectattr('content', 'none') | list | length
messages | selectattr('content', 'string') | map(attribute='content') | list
messages | selectattr('tool_calls', 'defined') | list | length
messages | rejectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | list
messages | selectattr
people | groupby('city') | list | length
people[:3] | groupby('city')
people[:3] | groupby('age') | map('first') | list
people | groupby('city', default='none') | map(attribute='grouper') | list
people | groupby('city', default='none') | map(attribute='list') | map('length') | list
l | batch(2) | list
l | batch(2, 'x') | list
l | batch(linecount=2, fill_with=0) | list
l | batch(0) | list
[1, 2, 3, 4, 5, 6, 7] | slice(3) | list
[1, 2, 3, 4, 5, 6, 7] | slice(3, 'x') | list
[1, 2] | slice(3) | list
s | batch(4) | map('join') | list
s | wordcount
sp | wordcount
"a-b c_d e's" | wordcount
n | wordcount
s | truncate(5)
s | truncate(8)
s | truncate(9, true)
s | truncate(9, true, '')
s | truncate(11)
s | truncate(6, false, '...', 0)
s | truncate(length=8, leeway=0)
s | truncate(8, killwords=true, end='…', leeway=0)
'foo bar baz qux' | truncate(9)
'foo bar baz qux' | truncate(9, true)
'foo bar baz qux' | truncate(11)
'foo bar baz qux' | truncate(11, false, '...', 0)
s | truncate(2)
s | truncate
s | center(20)
s | center(width=20)
s | center
s | center(3)
nl | indent
nl | indent(2)
nl | indent(2, true)
nl | indent(2, first=true, blank=true)
nl | indent(width=2, blank=true)
nl | indent('> ')
nl | indent('> ', true, true)
e | indent(2, true)
'a' | indent(2)
'a\\n' | indent(2)
'a\\r\\nb' | indent(2)
n | indent
nl | wordwrap(5)
'The quick brown fox jumps over the lazy dog' | wordwrap(10)
'The quick brown fox' | wordwrap(4)
'The quick brown fox' | wordwrap(4, false)
'The quick brown fox' | wordwrap(width=9, wrapstring='|')
nl | striptags
'<b>x &amp; y</b>' | striptags
'1.5' | int
'x' | int
'x' | int(5)
'x' | int(default=5)
'0x1f' | int(0, 16)
'ff' | int(base=16)
'101' | int(0, 2)
' 42 ' | int
'-3' | int
'1_000' | int
2.9 | int
-2.9 | int
'1e3' | int
nul | int
nul | int(7)
true | int
l | int
nothing | int
'9' * 30 | int
('9' * 30) | int
1e20 | int
'inf' | int
'nan' | int
'1.5' | float
'x' | float
'x' | float(1.5)
'x' | float(default=2)
n | float
nul | float
true | float
'1e3' | float
' 1.5 ' | float
'inf' | float
'-inf' | float
'nan' | float
2.5 | round
3.5 | round
-2.5 | round
2.675 | round(2)
2.345 | round(2)
1234.5678 | round(2)
1234.5678 | round(-2)
2.1 | round(method='ceil')
2.9 | round(method='floor')
2.15 | round(1, 'ceil')
2.15 | round(1, 'floor')
7 | round
7 | round(1)
7 | round(-1)
15 | round(-1)
25 | round(-1)
2.5 | round | int
2.5 | round(0)
2.5 | round(method='nope')
'x' | round
1.5 | round(precision=0)
-1.5 | abs
neg | abs
'a' | abs
s | string
n | string
nul | string
f | string
nothing | string
none | default('D')
nothing | default
nothing | default('D')
nothing | d('D')
e | default('D')
e | default('D', true)
z | default('D', boolean=true)
d.zz | default(n)
d.zz.y | default(n)
(d.zz).y | default(n)
nothing | default(default_value='D')
s | attr('nope')
d | attr('a')
d | attr('items')
s | attr('upper')
s | escape
'<a href="x">&\\'</a>' | escape
'<a>' | e
'<a>' | safe
'<a>' | e | safe
'<a>' | forceescape
('<a>' | e) ~ '<b>'
('<a>' | e) + '<b>'
'<b>' + ('<a>' | safe)
('<a>' | e) | e
'<a>' | safe is escaped
'a b/ü&?' | urlencode
d | urlencode
{'a': 1, 'b': 'x y'} | xmlattr
'see http://x.org now' | urlize
1000 | filesizeformat
1234567 | filesizeformat
1234567 | filesizeformat(true)
1 | filesizeformat
'%s-%s' | format('a', 1)
'%(a)s' | format(a=1)
'%d%%' | format(50)
'%.2f' | format(f)
s | pprint
d | pprint
{'a': [1, 'x', none]} | pprint
lm | random is defined
s | nope
s | split
s | lines
l | zip(l)
l | chain(l)
s | bool
l | tojson
d | tojson
lm | tojson
s | tojson
u | tojson
q | tojson
qq | tojson
nul | tojson
t | tojson
f | tojson
fs | tojson
big | tojson
nothing | tojson
'</script>&<' | tojson
'\\x7f\\u2028\\x01\\b\\f' | tojson
'😀é' | tojson(ensure_ascii=true)
'😀é' | tojson(ensure_ascii=false)
d | tojson(indent=2)
d | tojson(2)
d | tojson(true)
lm | tojson(indent=4)
de | tojson(indent=2)
[[], {}, [[]]] | tojson(indent=1)
d | tojson(indent=0)
d | tojson(indent=none)
d | tojson(indent='\\t')
d | tojson(separators=(',', ':'))
d | tojson(separators=[',', ': '])
d | tojson(separators=none)
d | tojson(separators=(',', ':'), indent=2)
d | tojson(sort_keys=true)
{'b': {'d': 1, 'c': 2}, 'a': 3} | tojson(sort_keys=true)
d | tojson(nope=1)
d | tojson(ensure_ascii=True, indent=2, separators=(', ', ' = '), sort_keys=True)
{1: 2} | tojson
{none: 1, true: 2, 1.5: 3} | tojson
{(1, 2): 3} | tojson
(1, 2) | tojson
{'a': (1, 2)} | tojson
range(3) | tojson
range(3) | list | tojson
d.items() | tojson
d.items() | list | tojson
d.keys() | list | tojson
messages | tojson
tools | tojson
tools | tojson(indent=2)
tools[0] | tojson(indent=4)
namespace(a=1) | tojson
('a' | e) | tojson
1e16 | tojson
1e400 | tojson
-0.0 | tojson
tools | map('tojson') | join('\\n')
messages | map(attribute='content') | map('string') | join('|')
""")

# --- functions
e("""
raise_exception('no')
raise_exception()
strftime_now('%%')
strftime_now('plain')
strftime_now('') | length
strftime_now('%Y') | length
strftime_now('%d %b %Y') | length
strftime_now('%Q')
strftime_now('a%') 
strftime_now('%Y-%m-%d') | length
strftime_now(1)
strftime_now()
strftime_now is defined
lipsum is defined
cycler is defined
joiner is defined
cycler('a', 'b').next()
debug()
dict is defined
range is defined
namespace is defined
nofunction()
nofunction is defined
nothing()
s()
range('a')
range(1000000) | length
range(-5) | list
range(1.5)
true()
""")

# --- statements
t(
    "{% if n %}a{% elif z %}b{% else %}c{% endif %}",
    "{% if z %}a{% elif n == 7 %}b{% else %}c{% endif %}",
    "{% if nothing %}a{% else %}c{% endif %}",
    "{% if nothing.x %}a{% endif %}",
    "{% if d.zz %}a{% else %}b{% endif %}",
    "{% if not d.zz is defined %}a{% endif %}",
    "{% if le %}a{% elif de %}b{% elif e %}c{% elif 0.0 %}d{% elif () %}e{% else %}f{% endif %}",
    "{% if namespace() %}a{% endif %}",
    "{% if range(0) %}a{% else %}b{% endif %}",
    "{% for x in l %}{{ x }}{% endfor %}",
    "{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}",
    "{% for x in l %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }} {% endfor %}",
    "{% for x in l %}{{ loop.previtem is defined }}{{ loop.nextitem is undefined }}{% endfor %}",
    "{% for x in l %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "{% for x in l %}{{ loop.cycle() }}{% endfor %}",
    "{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %}",
    "{% for x in l %}{{ loop.depth }}{{ loop.depth0 }}{% for y in l %}{{ loop.depth }}{% endfor %}{% endfor %}",
    "{% for x in l %}{{ loop }}{% endfor %}",
    "{% for x in l if x > 1 %}{{ x }}{{ loop.last }}{{ loop.length }}{% endfor %}",
    "{% for x in l if x > 9 %}{{ x }}{% else %}none{% endfor %}",
    "{% for x in le %}{{ x }}{% else %}empty{% endfor %}",
    "{% for x in nothing %}{{ x }}{% else %}empty{% endfor %}",
    "{% for x in nul %}{{ x }}{% endfor %}",
    "{% for x in n %}{{ x }}{% endfor %}",
    "{% for c in 'añb' %}{{ c }},{% endfor %}",
    "{% for k in d %}{{ k }}{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in d | items %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in d | dictsort %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in dn.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for item in d.items() %}{{ item }}{{ item[0] }}{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}",
    "{% for (a, b) in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}",
    "{% for a, (b, c) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for a, b in [(1, 2, 3)] %}{{ a }}{% endfor %}",
    "{% for a, b in ['xy'] %}{{ a }}{{ b }}{% endfor %}",
    "{% for x in 1, 2, 3 %}{{ x }}{% endfor %}",
    "{% for x in l %}{% if loop.first %}{% continue %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in l %}{% if loop.last %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in l %}{{ x }}{% break %}{% else %}e{% endfor %}",
    "{% for x in l recursive %}{{ x }}{% endfor %}",
    "{% for x in [{'v': 1, 'c': [{'v': 2, 'c': []}]}, {'v': 3, 'c': []}] recursive %}{{ x.v }}{{ loop.depth }}({{ loop(x.c) }}){% endfor %}",
    "{% for x in messages[1:] %}{{ loop.index }}{{ x.role }} {% endfor %}",
    "{% for x in messages if x.role == 'user' %}{{ loop.index0 }}{{ x.role }} {% endfor %}",
    "{% for x in l | sort %}{{ x }}{% endfor %}",
    "{% for x in l | reverse %}{{ x }}{{ loop.last }}{% endfor %}",
    "{% for x in range(3) %}{{ x }}{% endfor %}",
    "{% for x in range(0, messages | length, 2) %}{{ messages[x].role }}{% endfor %}",
    "{% for x in [1, 2] if true else [] %}{{ x }}{% endfor %}",
    "{% for x in ([1, 2] if true else []) %}{{ x }}{% endfor %}",
    "{% for x in l %}{% set y = x %}{% endfor %}{{ y }}",
    "{% set y = 0 %}{% for x in l %}{% set y = x %}{{ y }}{% endfor %}{{ y }}",
    "{% set ns = namespace(y=0) %}{% for x in l %}{% set ns.y = ns.y + x %}{% endfor %}{{ ns.y }}",
    "{% set ns = namespace() %}{% set ns.a = [1] %}{% set ns.a = ns.a + [2] %}{{ ns.a }}{{ ns.b is defined }}",
    "{% set ns = namespace(found=false) %}{% if not ns.found %}{% set ns.found = true %}{% endif %}{{ ns.found }}",
    "{% set ns = namespace(a=1) %}{{ ns }}",
    "{% set ns = namespace(a=1) %}{{ ns['a'] }}",
    "{% set d.a = 5 %}{{ d.a }}",
    "{% set l.a = 5 %}",
    "{% for x in l %}{% set loop = 5 %}{% endfor %}",
    "{% if t %}{% set y = 1 %}{% endif %}{{ y }}",
    "{% if no %}{% set y = 1 %}{% endif %}{{ y }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set a, b = [1, 2] %}{{ a }}{{ b }}",
    "{% set (a, b) = (1, 2) %}{{ a }}{{ b }}",
    "{% set a = 1, 2 %}{{ a }}",
    "{% set a = 'x' if n else 'y' %}{{ a }}",
    "{% set x %}a{{ n }}b{% endset %}{{ x }}{{ x | length }}",
    "{% set x | upper %}a{{ n }}b{% endset %}{{ x }}",
    "{% set x | replace('a', 'c') | upper %}a{{ n }}b{% endset %}{{ x }}",
    "{% set x = n %}{% set x = x + 1 %}{{ x }}",
    "{% set messages = messages[1:] %}{{ messages | length }}",
    "{% with %}{% set a = 1 %}{{ a }}{% endwith %}{{ a }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}",
    "{% with a = 1 %}{% with b = a %}{{ b }}{% endwith %}{% endwith %}",
    "{% with a = n, b = a %}{{ b }}{% endwith %}",
    "{% filter upper %}abc{{ s }}{% endfilter %}",
    "{% filter replace('a', 'b') | upper %}aXa{% endfilter %}",
    "{% set ns = namespace(a=1) %}{% macro f() %}{% set ns.a = 2 %}{% endmacro %}{{ f() }}{{ ns.a }}", "{% filter upper %}{% set v = 'a' %}{{ v }}{% endfilter %}[{{ v }}]", "{% set y %}{% set n = 1 %}{{ n }}{% endset %}{{ y }}{{ n }}",
    "a\n  {% filter upper %}\n  b\n  {% endfilter %}\n c", "a\n  {%- set y -%}\n  b\n  {%- endset -%}\n c{{ y }}", "{% set ns = namespace() %}{% set ns.y %}x{% set n = 1 %}{% endset %}{{ ns.y }}{{ n }}",
    "{% filter trim %}  abc {% endfilter %}|",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, 3) }}{{ f(b=1, a=2) }}{{ f() }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(c=2) }}",
    "{% macro f(a) %}{{ a }}{{ varargs }}{% endmacro %}{{ f(1, 2, 3) }}",
    "{% macro f(a) %}{{ a }}{{ kwargs }}{% endmacro %}{{ f(1, x=3) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, a=2) }}",
    "{% macro f(a, b=a) %}{{ b }}{% endmacro %}{{ f(1) }}",
    "{% macro f(a, b=n) %}{{ b }}{% endmacro %}{{ f(1) }}",
    "{% macro f(a, b) %}{{ b is defined }}{% endmacro %}{{ f(1) }}",
    "{% macro f(a, b=none) %}{{ b }}{% endmacro %}{{ f(1) }}",
    "{% macro f(a=1, b) %}{{ b }}{% endmacro %}",
    "{% macro f(x) %}{{ x }}{% if x > 0 %}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(5) }}",
    "{% macro f() %}{{ y }}{% endmacro %}{% set y = 3 %}{{ f() }}",
    "{% set y = 2 %}{% macro f() %}{{ y }}{% endmacro %}{% set y = 3 %}{{ f() }}",
    "{% macro f() %}{{ y }}{% endmacro %}{% for y in l %}{{ f() }}{% endfor %}",
    "{% macro f() %}{{ n }}{{ messages | length }}{% endmacro %}{{ f() }}",
    "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}G{% endmacro %}{{ f() }}",
    "{% macro f() %}{% set q = 1 %}{{ q }}{% endmacro %}{{ f() }}{{ q }}",
    "{% macro f() %} x {% endmacro %}[{{ f() }}][{{ f() | trim }}]{{ f() is string }}{{ f() | length }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f.name }}{{ f.arguments }}{{ f }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(**{'a': 3}) }}{{ f(*[4]) }}",
    "{% macro f(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call f(1) %}body{{ n }}{% endcall %}",
    "{% macro f(a) %}{{ caller(a, 5) }}{% endmacro %}{% call(x, y) f(1) %}{{ x }}{{ y }}{% endcall %}",
    "{% macro f(a) %}{{ a }}{% if caller %}C{{ caller() }}{% endif %}{% endmacro %}{{ f(1) }}{% call f(2) %}x{% endcall %}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{% call f(1) %}body{% endcall %}",
    "{% macro f(ns) %}{% set ns.v = 5 %}{% endmacro %}{% set ns = namespace(v=1) %}{{ f(ns) }}{{ ns.v }}",
    "{% macro f(x) %}{% for k, v in x.items() %}{% if v is mapping %}{{ k }}({{ f(v) }}){% else %}{{ k }}={{ v }},{% endif %}{% endfor %}{% endmacro %}{{ f({'a': 1, 'b': {'c': {'d': 2}}}) }}",
    "{% block x %}a{{ n }}{% endblock %}",
    "{% for i in l %}{% block x %}{{ i }}{% endblock %}{% endfor %}",
    "{% raw %}{{ n }}{% if %}{% endraw %}",
    "{%- raw -%} {{ n }} {%- endraw -%} x",
    "a\n {% raw %}\n b\n  {% endraw %}\n c", "  {%- raw -%}\n {{ n }}\n {%- endraw -%}\n x", " {%+ raw %} {{ n }} {%+ endraw +%}\n x", "{% raw -%}\n  {% endraw %} x", "{% raw +%}a{% endraw %}", "{% raw %} {% endraw %}", "{%raw%}{{ '\\n' }}{%endraw%}",
    "{# comment {{ n }} #}a{#- x -#} b",
    "a{# x #}\nb",
    "{% include 'x' %}", "{% import 'x' as y %}", "{% from 'x' import y %}", "{% extends 'x' %}", "{% do l.append(1) %}", "{% do 1 %}", "{% print n %}",
    "{% print n, s %}", "{% debug %}", "{% trans %}a{% endtrans %}", "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{% autoescape false %}{{ '<' }}{% endautoescape %}",
    "{% nope %}", "{% if %}", "{% endif %}", "{% for %}{% endfor %}", "{{ }}", "{{ n", "{% if n %}", "{{ n }", "{{ n + }}", "{{ (n }}", "{{ n) }}", "{{ [1, 2 }}",
    "{{ 'a }}", "{% set x %}", "{% set = 1 %}", "{% set none = 1 %}", "{% set 1 = 1 %}", "{% else %}", "{{ n n }}", "{{ n | }}", "{{ n is }}", "{{ l[ }}", "{{ l[] }}",
    "{% raw %}", "{# x", "{{ 1..2 }}", "{{ a.b. }}", "{{ n ? 1 : 2 }}", "{{ n && 1 }}", "{{ !n }}", "{{ n = 1 }}", "{{ `a` }}", "{{ $a }}", "{{ lambda: 1 }}", "{% break %}", "{% continue %}",
    "{% endfor %}", "{{ 08 }}", "{{ 1__0 }}", "{{ 1a }}", "{{ 1.e }}", "{{ .5 }}", "{{ 5. }}", "{{ 1e5 }}", "{{ 1E-2 }}", "{{ self }}", "{{ self.x() }}", "{{ super() }}", "{{ caller() }}",
    "{% generation %}a{{ n }}{% endgeneration %}", "a\n{% generation %}\nb\n{% endgeneration %}\nc",
    # whitespace
    "a\n{% if n %}\nb\n{% endif %}\nc\n", "  {% if n %}\n  b\n  {% endif %}\n  c", "a {%- if n -%} b {%- endif -%} c", "a {%+ if n +%} b {%+ endif +%} c", "  {%+ if n %}\nb{% endif %}",
    "{% if n +%}\nb{% endif %}", "{{ n }}\n{{ n }}\n", "\n\n{{ n }}\n\n", "a  {{- n -}}  b", "  {{ n }}  ", "  {# c #}  \nx", "  {# c #}\nx", "x  {#- c -#}  y", "\t{% if n %}\t\n\tb\t{% endif %}\t",
    "{% if n %}\n\nx{% endif %}", "{% if n %}\r\nx\r\n{% endif %}\r\ny\r\n", "x\ry\r\nz", "{% set x = 1 %}\n\n{{ x }}", "  {% set x = 1 %}  \n{{ x }}", "a{% set x = 1 %}\nb", "a {% set x = 1 %} b",
    "{%- for x in l %}\n{{ x }}\n{%- endfor %}\n", "{% for x in l -%}\n  {{ x }}\n{% endfor -%}\n  end", "{{ 'a\nb' }}", "{{ 'a\\nb' }}", "{{ 'a\\\nb' }}", "{{ \"a\\\"b\" }}", "{{ 'a\\'b' }}", "{{ 'a\\\\b' }}",
    "{{ '\\u00e9\\x41\\101\\N{BULLET}\\q' }}", "{{ '{{ x }}' }}{{ '%}' }}", "{{ '\\a\\v\\0' | tojson }}", "{%-if n-%}a{%-endif-%}", "{{n}}{{-n}}{{n-}}", "{{ n\n}}\n{{\nn }}", "{%\nif\nn\n%}x{% endif %}",
    "{{ -n }}{{- -n }}{{ n - 1 }}{{ n -1 }}{{ n-1 }}", "a{{ '' }}\nb", "{{ '\n' }}", "{%- set x = '\n' -%}|{{ x }}|", "{{'a'}}{#b#}{{'c'}}", "{ {n} }", "{%%}", "{{{}}}", "{{{'a': 1}}}", "{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}}}}", "}}", "%}", "#}", "{",
    "{{ [1,\n 2,\n 3] }}", "{{ messages[0]\n['content'] }}", "{% if n\n and s %}x{% endif %}", "line\n  {%- if n %} a{% endif %}\n", "x\n\n  {%- if n %}\n  a\n  {%- endif %}\n\ny",
    # as templates of models do
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.content is iterable %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}|{% endfor %}",
    "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls is not none %}{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}{% endfor %}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ (m.content or '') ~ '|' }}{% endfor %}",
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] if m['content'] is string else '') | trim + '<|im_end|>' + '\n' }}{% endfor %}",
    "{%- set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|' + message['role'] + '|>\n\n'+ message['content'] | string | trim + '<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}",
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}{% else %}{% set sys = '' %}{% endif %}[{{ sys }}]{{ sys == '' }}",
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate ' ~ loop.index0) }}{% endif %}{% endfor %}",
    "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}{{ i }}{{ m.role }}{% if m.role == 'user' and not (m.content is string and m.content.startswith('<tool')) %}{% set ns.last = i %}{% break %}{% endif %}{% endfor %}{{ ns.last }}",
    "{% for t in tools %}{% set f = t.function %}{{ f.name }}: {{ f.description }}\n{% for k, v in f.parameters.properties.items() %}- {{ k }} ({{ v.type }}){{ ' required' if k in f.parameters.required }}{% if v.enum is defined %} {{ v.enum | join('|') }}{% endif %}\n{% endfor %}{% endfor %}",
    "{% macro render(p) %}{% if p.type == 'array' %}{% if p['items'] %}{{ render(p['items']) }}[]{% else %}any[]{% endif %}{% elif p.type is string %}{{ p.type }}{% else %}{{ p.type | join(' | ') }}{% endif %}{% endmacro %}{% for k, v in tools[0].function.parameters.properties.items() %}{{ k }}: {{ render(v) }}\n{% endfor %}",
    "{% macro render(p) %}{% if p['items'] %}yes{{ p['items']['type'] == 'string' }}{% else %}no{% endif %}{% endmacro %}{{ render({'type': 'array'}) }}{{ render({}) }}",
    "{{ tools | selectattr('type', 'equalto', 'function') | map(attribute='function.name') | join(', ') }}",
    "{% set m = messages[1] %}{{ m.content if m.content else '' }}{{ m.get('content', 'x') }}{{ m.get('nope', 'x') }}",
    "{% for key in tools[0].function.parameters.properties.keys() | sort %}{{ key }}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first }}",
    "{{ (messages | last).content[0].type }}{{ (messages | selectattr('role', 'equalto', 'tool') | list)[0].name }}",
    "{% set x = messages[0].content.split('ñ') %}{{ x[0] }}{{ x | last }}{{ x | length }}",
    "{% if tools is defined and tools %}{{ tools | length }}{% endif %}{% if documents %}d{% endif %}{{ documents }}{{ documents is none }}",
    "{{ messages[1].tool_calls[0].function.arguments | tojson }}{{ messages[1].tool_calls[0].function.arguments }}{{ messages[1].tool_calls[0].function.arguments | string }}",
    "{% if messages[1].tool_calls[0].function.arguments is mapping %}{% for k, v in messages[1].tool_calls[0].function.arguments | items %}{{ k }}:{{ v | tojson if v is not string else v }};{% endfor %}{% endif %}",
)


def main():
    seen, cases = set(), []
    for template in CASES:
        if template in seen:
            continue
        seen.add(template)
        try:
            # As a caller of Transformers has it: freshly read values for each.
            result = _compile_jinja_template(template).render(**json.loads(json.dumps(CONTEXT)))
        except Exception:
            result = None
        # Where a value lies in memory is no rendering.
        if result is not None and (" object at 0x" in result or " at 0x" in result):
            continue
        cases.append([template, result])
    out = {"context": CONTEXT, "cases": cases}
    path = Path(__file__).parent.parent / "tests/data/chat/jinja.json"
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
    head = json.dumps(out["context"], ensure_ascii=True)
    path.write_text(f'{{"context": {head},\n"cases": [\n{lines}\n]}}\n')
    print(f"{len(cases)} cases, {sum(c[1] is None for c in cases)} of them refused")


if __name__ == "__main__":
    main()
