"""Make an instruction dataset from the documentation of the installed Python packages.

    python recipes/python_docs.py --output_dir runs/demo/data

Every documented public module, class, method and function gives one row: `instruction` asks what
it does, `input` is its signature, `output` its docstring, `name` and `package` say whence it comes.
Sources are parsed, not imported; only what compiled code documents (built-ins, ufuncs, Arrow)
is read from the imported module. The same packages give the same rows in the same order.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import inspect
import json
import os
import pkgutil
import platform
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import NamedTuple

PACKAGES = (
    "python,numpy,pandas,scipy,sklearn,torch,torchvision,transformers,datasets,pyarrow,accelerate,"
    "peft,timm,trl,huggingface_hub,sentence_transformers"
)
# Modules and classes with documented compiled members; importing them has no other effect.
COMPILED = (
    "builtins,builtins.str,builtins.bytes,builtins.bytearray,builtins.list,builtins.tuple,"
    "builtins.dict,builtins.set,builtins.frozenset,builtins.int,builtins.float,collections,"
    "collections.deque,io,itertools,math,cmath,operator,os,re,struct,sys,time,zlib,numpy,"
    "numpy.ndarray,numpy.fft,numpy.linalg,numpy.random,numpy.strings,scipy.special,torch,"
    "torch.Tensor,torch.fft,torch.linalg,torch.special,pyarrow,pyarrow.compute,pyarrow.Array,"
    "pyarrow.ChunkedArray,pyarrow.Table,pyarrow.RecordBatch,pyarrow.Schema,pyarrow.Field"
)
SKIPPED = "test,tests,testing,conftest,externals,third_party,idlelib,lib2to3,turtledemo"
MIN_CHARS = 40
MAX_PACKAGE_RATIO = 0.25
QUESTIONS = {
    "module": "What is the module {} for?",
    "class": "Describe the class {}.",
    "function": "Explain what {} does.",
    "method": "What does the method {} do?",
    "property": "What does the property {} hold?",
}


class Doc(NamedTuple):
    """One documented object: its public dotted name, kind, signature, docstring and package."""

    name: str
    kind: str
    signature: str
    text: str
    package: str = ""


def hash_of(text: str, seed: object = 0) -> str:
    """Give a hash of a text, the same on every machine and in every process."""
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "replace")).hexdigest()


def is_public(dotted: str) -> bool:
    """Say whether no part of a dotted name starts with an underscore."""
    return not f".{dotted}".count("._")


def shorten(text: str, max_chars: int) -> str:
    """Cut a text at the end of a paragraph, else of a sentence, else of a word."""
    if len(text) <= max_chars:
        return text
    head = text[: max_chars + 1]
    cuts = (head.rfind(end, MIN_CHARS) + shift for end, shift in (("\n\n", 0), (". ", 1), (" ", 0)))
    return head[: next((cut for cut in cuts if cut >= MIN_CHARS), max_chars)].rstrip()


def find_sources(package: str) -> list[tuple[Path, str]]:
    """List the files of a package (`python` for the standard library) with their dotted names.

    Raises:
        ValueError: If the package is not installed.
    """
    base, roots = Path(os.__file__).parent, [package]
    if package == "python":
        roots = sorted(sys.stdlib_module_names)
    elif package not in sys.stdlib_module_names:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.origin:
            raise ValueError(f"packages must name installed packages, got {package!r}")
        base = Path(spec.origin).parents["__init__" in spec.origin]
    paths = [path for root in roots for path in [base / f"{root}.py"] if path.is_file()]
    paths += [path for root in roots for path in sorted((base / root).rglob("*.py"))]
    sources = []
    for path in paths:
        parts = path.relative_to(base).with_suffix("").parts
        is_skipped = any(part in SKIPPED.split(",") or part[:5] == "test_" for part in parts)
        if not is_skipped and is_public(".".join(parts[:-1])):
            sources.append((path, ".".join(parts).removesuffix(".__init__")))
    return sources


def read_source(source: tuple[Path, str]) -> list[Doc]:
    """Read the docstrings of one file without importing it.

    What a private module defines is named after its package (`scipy.fft._basic.fft` is
    `scipy.fft.fft`), and only if the `__init__.py` of the package names it.
    """
    path, module = source
    try:
        code = path.read_text("utf-8")
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return []  # templates, and files for other versions of Python
    package, _, last = module.rpartition(".")
    if is_public(last):
        head = Doc(module, "module", "", ast.get_docstring(tree) or "")
        return [head, *read_body(tree.body, module, "function")]
    init = path.with_name("__init__.py")
    exports = re.findall(r"\w+", init.read_text("utf-8")) if init.is_file() else []
    body = [node for node in tree.body if getattr(node, "name", None) in exports]
    return list(read_body(body, package, "function"))


def read_body(body: Iterable[ast.stmt], prefix: str, kind: str) -> Iterator[Doc]:
    """Read the public functions and classes of a module or class body, and what is in them."""
    for node in body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            name = f"{prefix}.{node.name}"
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield Doc(name, "class", f"class {node.name}({bases})", ast.get_docstring(node) or "")
            yield from read_body(node.body, name, "method")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public(node.name):
            name, text = f"{prefix}.{node.name}", ast.get_docstring(node) or ""
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            if re.search(rf"property|\b{node.name}\.setter", decorators):
                yield Doc(name, "property", "", text)
            else:
                yield Doc(name, kind, f"{node.name}({ast.unparse(node.args)})", text)


def read_compiled(path: str) -> Iterator[Doc]:
    """Read the docstrings of the public members of an importable module or class."""
    owner, top = pkgutil.resolve_name(path), path.split(".")[0]
    tops = sys.stdlib_module_names if top in sys.stdlib_module_names else {top}
    for name in filter(is_public, dir(owner)):
        member = inspect.getattr_static(owner, name, None)
        home = getattr(member, "__module__", None) or top
        kind = "method" if inspect.isclass(owner) else "function"
        if home.split(".")[0] not in tops or (kind == "function" and not callable(member)):
            continue
        kind = "class" if inspect.isclass(member) else kind if callable(member) else "property"
        text = getattr(member, "__doc__", None)
        text = inspect.cleandoc(text) if isinstance(text, str) else ""
        # Compiled functions often carry their signature on the first line.
        signature = re.match(r"[\w.]+\(.*\)( ?->.*)?(\n|$)", text)
        line = signature[0] if signature else ""
        yield Doc(f"{path}.{name}".removeprefix("builtins."), kind, line, text[len(line) :])


def collect(packages: list[str], max_chars: int) -> list[Doc]:
    """Read the packages: every object with a text of `MIN_CHARS` or more, sorted by name."""
    from tqdm import tqdm

    sources = [(package, source) for package in packages for source in find_sources(package)]
    found: dict[str, Doc] = {}

    def add(package: str, docs: Iterable[Doc]) -> None:
        for doc in docs:
            text = shorten(doc.text.strip(), max_chars)
            # A %(name)s is a template that its package fills in later; notices are no answers.
            if len(text) >= MIN_CHARS and not re.search(r"%\(|opyright", text):
                found.setdefault(doc.name, doc._replace(text=text, package=package))

    with ProcessPoolExecutor() as pool:
        results = pool.map(read_source, [source for _, source in sources], chunksize=16)
        bar = tqdm(results, total=len(sources), desc="reading docs", unit="file")
        for (package, _), docs in zip(sources, bar, strict=True):
            add(package, docs)
    for package in packages:
        tops = sys.stdlib_module_names if package == "python" else {package}
        for path in COMPILED.split(","):
            add(package, read_compiled(path) if path.split(".")[0] in tops else ())
    return [found[name] for name in sorted(found)]


def choose(docs: list[Doc], max_rows: int, seed: int) -> list[Doc]:
    """Choose rows by the hash of their text, so that repeated texts stay together.

    No package gives more than a quarter of the rows (or its even share, if they are few).
    """
    max_ratio = max(MAX_PACKAGE_RATIO, 1 / max(1, len({doc.package for doc in docs})))
    n_chosen: Counter[str] = Counter()
    chosen: list[Doc] = []
    for doc in sorted(docs, key=lambda doc: (hash_of(doc.text, seed), doc.name)):
        if len(chosen) < max_rows and n_chosen[doc.package] < int(max_ratio * max_rows):
            n_chosen[doc.package] += 1
            chosen.append(doc)
    return sorted(chosen)


def hold_out(docs: list[Doc], eval_rows: int, seed: int) -> tuple[list[Doc], list[Doc]]:
    """Split rows into training and held-out rows that share no text, whatever its case and spaces.

    Texts of many rows stay in training: none weighs more than a hundredth in the held-out loss.
    """
    groups: dict[str, list[Doc]] = {}
    for doc in docs:
        groups.setdefault(" ".join(doc.text.lower().split()), []).append(doc)
    held: list[Doc] = []
    for text in sorted(groups, key=lambda text: hash_of(text, f"held out {seed}")):
        if len(groups[text]) <= min(eval_rows - len(held), max(1, eval_rows // 100)):
            held += groups[text]
    train = sorted(set(docs) - set(held))
    return train, sorted(held)


def to_row(doc: Doc) -> dict[str, str]:
    """Turn a document into a row with Alpaca's columns and where it comes from."""
    signature = textwrap.shorten(doc.signature, 160, placeholder=" ...)")
    instruction = QUESTIONS[doc.kind].format(doc.name)
    row = {"instruction": instruction, "input": signature, "output": doc.text}
    return {**row, "name": doc.name, "package": doc.package}


def make_dataset(args: argparse.Namespace) -> str:
    """Write both files, unless they are there, and say in one line what they hold.

    Raises:
        ValueError: If an option is out of range or a package is not installed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, least in {"eval_rows": 1, "max_rows": 2, "max_chars": MIN_CHARS}.items():
        if getattr(args, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(args, name)}")
    packages = list(dict.fromkeys(args.packages.split(",")))
    names = packages_distributions()
    request = {package: version(names[package][0]) for package in packages if package in names}
    request |= {"python": platform.python_version(), "recipe": hash_of(Path(__file__).read_text())}
    request |= {key: value for key, value in vars(args).items() if key != "output_dir"}
    metadata = {b"python_docs": json.dumps(request, sort_keys=True).encode()}

    paths = [args.output_dir / "train.parquet", args.output_dir / "heldout.parquet"]
    with contextlib.suppress(OSError, pa.ArrowInvalid):  # missing or cut off
        if all(pq.read_schema(path).metadata == metadata for path in paths):
            return f"{args.output_dir}: already complete"
    docs = choose(collect(packages, args.max_chars), args.max_rows, args.seed)
    if args.eval_rows > len(docs) // 2:
        raise ValueError(f"eval_rows must be at most {len(docs) // 2}, got {args.eval_rows}")
    parts = hold_out(docs, args.eval_rows, args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path, part in zip(paths, parts, strict=True):
        rows = [to_row(doc) for doc in part]
        schema = pa.schema([(column, pa.string()) for column in rows[0]], metadata)
        pq.write_table(pa.Table.from_pylist(rows, schema), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    n_packages, n_bytes = len({doc.package for doc in docs}), sum(p.stat().st_size for p in paths)
    counts = f"{len(docs):,} rows from {n_packages} packages, {len(parts[1]):,} of them held out"
    return f"{args.output_dir}: {counts}, {n_bytes:,} bytes"


def main() -> None:
    """Read the command line and make the dataset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for both files")
    parser.add_argument("--packages", default=PACKAGES, help="comma list, by default %(default)s")
    parser.add_argument("--max_rows", type=int, default=4500, help="rows, held-out ones included")
    parser.add_argument("--max_chars", type=int, default=1200, help="greatest length of an output")
    parser.add_argument("--eval_rows", type=int, default=500, help="rows to hold out")
    parser.add_argument("--seed", type=int, default=0, help="chooses rows and held-out rows")
    args = parser.parse_args()
    try:
        print(make_dataset(args))
    except (ValueError, OSError) as error:
        parser.exit(2, f"python_docs.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "python_docs.py: interrupted\n")


if __name__ == "__main__":
    main()
