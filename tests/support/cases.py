"""Schemas of every kind of content, and prompts on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Case:
    """The inside of a schema, and prompts on it: their attributes and their inside."""

    schema: str
    prompts: tuple[tuple[str, str], ...]
    attributes: str = ""
    """Of the schema."""


ASK = "<user>and where is it?</user>"

CASES = {
    "siblings": Case(
        "The opening text. <module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<module name='c'>and it ends.</module>",
        (("", "<a/><b/><c/>" + ASK), ("", "<a/><c/>" + ASK), ("", "<c/>" + ASK), ("", ASK), ("", "<b/><c/>")),
    ),
    "siblings with nothing before them": Case(
        "<module name='a'>the first module, </module><module name='b'>here another one.</module>",
        (("", "<a/><b/>" + ASK), ("", "<b/>" + ASK), ("", "<b/>"), ("", "<b/>to be continued")),
    ),
    "text between modules": Case(
        "One. <module name='a'>the first module, </module>Two, at the root. <module name='b'>here another.</module>"
        "Three.<module name='c'>and it ends.</module>",
        (("", "<a/><b/><c/>" + ASK), ("", "<b/>" + ASK), ("", ASK), ("", "<a/><c/>")),
    ),
    "nesting": Case(
        "Root. <module name='a'>Outer text. <module name='b'>Inner <module name='d'>innermost</module> again.</module>"
        "Behind it. <module name='c'>Second inner.</module>And the end.</module> Root again."
        "<module name='e'>Last.</module>",
        (
            ("", "<a><b><d/></b><c/></a><e/>" + ASK),
            ("", "<a><b/></a>" + ASK),
            ("", "<a><c/></a><e/>" + ASK),
            ("", "<a/>" + ASK),
            ("", "<e/>" + ASK),
        ),
    ),
    "unions": Case(
        "Root. <union><module name='a'>a short one</module><module name='b'>one that is a good deal longer</module>"
        "</union>Between. <module name='u'>In it: <union><module name='c'>the third</module><module name='d'>d "
        "<module name='n'>nested</module></module></union> and <union><module name='e'>e</module></union>.</module>",
        (
            ("", "<a/><u><c/><e/></u>" + ASK),
            ("", "<b/><u><d><n/></d></u>" + ASK),
            ("", "<u><d/><e/></u>" + ASK),
            ("", "<a/>" + ASK),
        ),
    ),
    "a union with a scaffold": Case(
        "Root. <union scaffold='b'><module name='a'>the first </module><module name='b'>the second, and <module "
        "name='n'>nested </module>more </module><module name='c'>the third, which is the longest of all </module>"
        "</union>Behind the union. <module name='m'>A module behind.</module>",
        (
            ("", "<b/><m/>" + ASK),
            ("", "<a/><m/>" + ASK),
            ("", "<c/><m/>" + ASK),
            ("", "<b><n/></b><m/>" + ASK),
            ("", "<m/>" + ASK),
        ),
    ),
    "scaffolds within scaffolds": Case(
        "<module name='w'>With: <union scaffold='a'><module name='a'>Ay <union scaffold='x'><module name='x'>ex "
        "</module><module name='y'>why </module></union>of ay </module><module name='b'>Be <union><module name='z'>zed"
        "</module></union></module></union> text <module name='i'>inner</module>.</module>"
        "<module name='o'>out</module>",
        (
            ("", "<w><a><x/></a><i/></w><o/>" + ASK),
            ("", "<w><a><y/></a><i/></w>" + ASK),
            ("", "<w><b><z/></b><i/></w>" + ASK),
            ("", "<w><i/></w><o/>" + ASK),
        ),
    ),
    "parameters": Case(
        "To <parameter name='who' length='12' scaffold='a friend'/>: <module name='a'>Go to <parameter name='place' "
        "length='16' scaffold='the market'/> at <parameter name='time' length='9'/> sharp. <module name='n'>Then rest."
        "</module></module><module name='b'>The end, <parameter name='who' length='10' scaffold='you'/></module>",
        (
            ("who='a friend'", "<a place='the market' time='noon'><n/></a><b who='you'/>" + ASK),  # as the scaffold
            ("who='Z'", "<a place='sea' time='1'><n/></a>" + ASK),  # shorter
            ("who='my old aunt'", "<a place='the other shop' time='half six'/><b who='my friend'/>" + ASK),  # longer
            ("who='qwertyuiopas'", "<a place='0123456789abcdef' time='123456789'><n/></a><b who='zxcvbnmlkj'/>" + ASK),
            ("who=''", "<a place='' time=''><n/></a><b who=''/>" + ASK),
            ("who='me'", "<b who='them'/>"),
        ),
    ),
    "parameters in unions": Case(
        "Do: <union scaffold='b'><module name='a'>drive <parameter name='x' length='6'/> on</module><module name='b'>"
        "turn <parameter name='x' length='10' scaffold='left'/></module></union><module name='c'>and stop.</module>",
        (("", "<a x='12 m'/><c/>" + ASK), ("", "<b x='right'/><c/>" + ASK), ("", "<c/>" + ASK)),
    ),
    "cache='false'": Case(
        "Root. <module name='a'>cached text </module><module name='now' cache='false'>the news of today <module "
        "name='in'>which were cached, </module>and again news <parameter name='p' length='8' scaffold='so'/></module>"
        "<module name='b'>cached <module name='off' cache='false'>not cached </module>after it</module>",
        (
            ("", "<a/><now p='yes'><in/></now><b><off/></b>" + ASK),
            ("", "<now p='exactly'/><b/>" + ASK),
            ("", "<a/><b><off/></b>" + ASK),
            ("", "<now p=''><in/></now>"),
        ),
    ),
    "cache='false' as a scaffold": Case(
        "Root. <union scaffold='a'><module name='a' cache='false'>in sight, though not cached </module>"
        "<module name='b'>cached</module></union>Behind. <module name='c'>Module.</module>",
        (("", "<a/><c/>" + ASK), ("", "<b/><c/>" + ASK), ("", "<c/>" + ASK)),
    ),
    "new text between references": Case(
        "Root. <module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<module name='c'>and it <module name='n'>nearly </module>ends.</module>",
        (
            ("", "First: <a/> then <b/> last <c/>" + ASK),
            ("", "<a/> in its place <c>now <n/></c>" + ASK),
            ("", "a text much longer than the module that it stands for <c/>"),
            ("", "<a/> x <c/><assistant>It is</assistant>"),
        ),
    ),
    "another order": Case(
        "Root. <module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<module name='c'>and it ends.</module>",
        (("", "<c/><b/><a/>" + ASK), ("", "<b/><a/>" + ASK), ("", "<c/> and <a/>")),
    ),
    "roles": Case(
        "<system>Be brief. <module name='a'>And be kind. </module><union scaffold='f'><module name='f'>French.</module>"
        "<module name='g'>German.</module></union></system><module name='x'><user>What is <parameter name='it' "
        "length='9' scaffold='a thing'/>?</user><assistant>That is</assistant></module>",
        (
            ("", "<a/><g/>" + ASK),
            ("", "<f/><x it='this'/>" + ASK),
            ("", "<a/><x it='over here'/>"),
            ("", "<user>Hello.</user><assistant>Hi.</assistant><user>Who?</user>"),
            ("", ""),
        ),
    ),
    "empty modules": Case(
        "<module name='a'></module><module name='b'><module name='n'>only this</module></module>"
        "<union scaffold='c'><module name='c'></module><module name='d'>dee</module></union>"
        "<module name='e'>end</module>",
        (("", "<a/><b><n/></b><c/><e/>" + ASK), ("", "<b/><d/>" + ASK)),
    ),
}

SETS = {
    "two of three": Case(
        "<scaffold modules='a c'/>" + CASES["text between modules"].schema,
        (("", "<a/><b/><c/>" + ASK), ("", "<a/><c/>" + ASK), ("", "<b/><c/>" + ASK), ("", "<a/> new <c/>")),
    ),
    "another order": Case(
        "<scaffold modules='b a'/>" + CASES["another order"].schema,
        (("", "<c/><b/><a/>" + ASK), ("", "<a/><c/><b/>" + ASK), ("", "<c/><a/><b/>" + ASK)),
    ),
    "overlapping": Case(
        "Root. <scaffold modules='a b'/><scaffold modules='b c d'/><scaffold modules='c d'/><module name='a'>the first "
        "module, </module><module name='b'>here another one.</module> Text. <module name='c'>and it ends</module>"
        "<module name='d'> with this.</module>",
        (
            ("", "<a/><b/><c/><d/>" + ASK),
            ("", "<a/><b/><d/>" + ASK),
            ("", "<a/><c/><d/>" + ASK),
            ("", "<b/><c/><d/>"),
        ),
    ),
    "all kinds of content": Case(
        "<system>Root. <module name='a'>To <parameter name='p' length='9' scaffold='them'/>: <union scaffold='x'>"
        "<module name='x'>ex </module><module name='y'>why <module name='n'>nested </module></module></union>go."
        "</module><module name='b'>one <module name='m'>in it </module>more</module></system><user>Between. <union>"
        "<module name='u'>This, <parameter name='q' length='4'/></module><module name='v'>that is longer</module>"
        "</union></user><module name='w'>left out</module><scaffold modules='a b u'/><scaffold modules='b v a'/>",
        (
            ("", "<a p='her'><x/></a><b><m/></b><u q='so'/><w/>" + ASK),
            ("", "<a p='nobody'><y><n/></y></a><b/><v/>" + ASK),
            ("", "<a p=''/><b><m/></b><v/>"),
            ("", "<a p='me'/><u q=''/>" + ASK),
        ),
    ),
    "nested modules": Case(
        CASES["nesting"].schema + "<scaffold modules='a a.b a.c e'/><scaffold modules='a.b a.b.d a'/>",
        CASES["nesting"].prompts,
    ),
    "the scaffold of a union": Case(
        CASES["a union with a scaffold"].schema + "<scaffold modules='b m'/>",
        CASES["a union with a scaffold"].prompts,
    ),
    "instead of the scaffold of a union": Case(
        "Root. <union scaffold='x'><module name='x'>The one </module><module name='y'>Or the other thing </module>"
        "</union>goes on <module name='a'>with a module</module>. <scaffold modules='y a'/>",
        (("", "<y/><a/>" + ASK), ("", "<x/><a/>" + ASK), ("", "<y/>" + ASK), ("", "<a/>" + ASK)),
    ),
}

ISOLATED = {
    "a module": Case(
        "Root. <module name='a'>the first module, </module><module name='b' isolate='true'>here <module name='n'>inner "
        "</module>another one.</module> Between. <module name='c'>and it ends.</module>",
        (("", "<a/><b><n/></b><c/>" + ASK), ("", "<b/><c/>" + ASK), ("", "<b><n/></b><a/>" + ASK), ("", "<c/>" + ASK)),
    ),
    "a union": Case(
        "Root. <module name='a'>the first module, </module><union isolate='true'><module name='x'>ex </module>"
        "<module name='y'>why, at length </module></union>Between. <module name='c'>and it ends.</module>",
        (("", "<a/><x/><c/>" + ASK), ("", "<y/><c/>" + ASK), ("", "<c/>" + ASK), ("", "<a/><y/>" + ASK)),
    ),
}

UNANCHORED = {
    name: Case(case.schema, case.prompts, "anchor='none'")
    for name, case in {**{name: CASES[name] for name in CASES if name != "empty modules"}, **SETS}.items()
}

WHOLE = {
    "side by side": (
        "<scaffold modules='a b c'/>Root. <module name='a'>the first module, </module><module name='b'>here another "
        "one </module><module name='c'>and it ends.</module>",
        "<a/><b/><c/>",
    ),
    "nested, and with a parameter": (
        "Root. <module name='a'>Outer, <module name='n'>inner </module>outer again </module><module name='b'>of "
        "<parameter name='p' length='5' scaffold='12345'/> it </module><union><module name='u'>short</module><module "
        "name='v'>a longer one</module></union><scaffold modules='a.n b a u'/>",
        "<a><n/></a><b p='12345'/><u/>",
    ),
    "with the schema's own text between and after": (
        "<system>Root. <module name='a'>the first module, </module> and <module name='b'>here another one </module> "
        "to end with</system>As I said. <scaffold modules='a b'/>",
        "<a/><b/>",
    ),
    "a member instead of the scaffold of its union": (
        "Root. <union scaffold='x'><module name='x'>The one </module><module name='y'>Or another </module></union>goes "
        "on <module name='a'>with a module.</module><scaffold modules='y a'/>",
        "<y/><a/>",
    ),
    "anchored on nothing": (
        "<module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<scaffold modules='a b'/>",
        "<a/><b/>",
    ),
}
"""Schemas with a scaffold set that some prompt on them consists of."""
