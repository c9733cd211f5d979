"""Pickles that want to run something, and zip archives that say one thing twice."""

import io
import pickle
import zipfile

# Each takes the path of a folder, or would; none may ever be called.
CALLABLES = (
    *("os mkdir", "posix mkdir", "os system", "posix system", "subprocess call", "builtins eval"),
    *("builtins exec", "builtins open", "builtins __import__", "builtins getattr", "shutil rmtree"),
    *("runpy run_path", "pathlib Path.mkdir", "importlib import_module", "torch load"),
    *("torch.hub load", "numpy.core.multiarray _reconstruct", "collections Counter"),
    *("torch._utils _rebuild_tensor", "torch.storage _load_from_bytes"),
)


def short_text(text: str) -> bytes:
    return pickle.BINUNICODE + len(text).to_bytes(4, "little") + text.encode()


def forms(module: str, name: str, argument: str) -> dict[str, bytes]:
    """A call of `module.name(argument)` in every way that pickles have."""
    function = f"c{module}\n{name}\n".encode()
    on_stack = short_text(module) + short_text(name) + pickle.STACK_GLOBAL
    text = short_text(argument)
    return {
        "reduce": function + text + pickle.TUPLE1 + pickle.REDUCE,
        "stack global": on_stack + text + pickle.TUPLE1 + pickle.REDUCE,
        "inst": pickle.MARK + text + f"i{module}\n{name}\n".encode(),
        "obj": pickle.MARK + function + text + pickle.OBJ,
        "newobj": function + text + pickle.TUPLE1 + pickle.NEWOBJ,
        "build": b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
        + pickle.EMPTY_DICT + short_text("__setstate__") + function + pickle.SETITEM + pickle.BUILD,
    }  # fmt: skip


def malicious(argument: str) -> dict[str, bytes]:
    pickles = {}
    for entry in CALLABLES:
        module, name = entry.split()
        for form, code in forms(module, name, argument).items():
            pickles[f"{entry} by {form}"] = pickle.PROTO + b"\x04" + code + pickle.STOP
    return pickles


def odd() -> dict[str, bytes]:
    """Not malicious, but no checkpoint, or one that needs too much."""
    nested = pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999
    # Each value holds the one before it twice: as a text, or for its hash, the last is 2 ** 40.
    twice = [b"h%c" % i * 2 for i in range(40)]
    tuples = b")q\x000" + b"".join(b"%b\x86q%c0" % (t, i + 1) for i, t in enumerate(twice)) + b"h("
    lists = b"]q\x000" + b"".join(b"](%beq%c0" % (t, i + 1) for i, t in enumerate(twice)) + b"h("
    kind, name = b"X\x07\x00\x00\x00storage", b"X\x0c\x00\x00\x00FloatStorage"
    device = b"X\x03\x00\x00\x00cpuK\x01tQ."
    storage = b"(X\x07\x00\x00\x00storageX\x0c\x00\x00\x00FloatStorageX\x01\x00\x00\x000"
    return {
        "empty": b"",
        "no stop": b"\x80\x04]",
        "a huge index of the memo": b"\x80\x04]r\xff\xff\xff\x7f.",
        "a huge index of the memo in text": b"\x80\x04]p2000000000\n.",
        "a text that is longer than the file": b"\x80\x04X\xff\xff\xff\x7fa.",
        "bytes that are longer than the file": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        "a frame that is longer than the file": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f].",
        "a number of a million digits": b"\x80\x04L" + b"9" * 1_000_000 + b"L\n.",
        "nested deeply": b"\x80\x02" + nested + b".",
        "an extension": b"\x80\x02\x82\x01.",
        "a protocol of the future": b"\x80\x63].",
        "a storage that is no tuple": b"\x80\x02K\x01Q.",
        "a storage of a huge index": storage
        + b"X\x03\x00\x00\x00cpu\x8a\x08" + b"\x7f" * 8 + b"tQ.",
        "a storage with a huge name": b"\x80\x02(" + kind + name + lists + device,
        "a storage of a huge type": b"\x80\x02(" + kind + tuples + kind + device,
        "a huge key": b"\x80\x02}" + tuples + b"K\x01s.",
        "a huge key, kept behind something else": b"\x80\x02}"
        + tuples.replace(b"q", b"K\x010q") + b"K\x01s.",
        "a huge key, kept where another was": b"\x80\x04}K\x01q\x00q\x000)\x940"
        + b"".join(b"h%c" % (i + 1) * 2 + b"\x86\x940" for i in range(40)) + b"h)K\x01s.",
        "a huge key, made on the stack": b"\x80\x02})" + b"2\x86" * 40 + b"K\x01s.",
        "a list": pickle.dumps([1, 2]),
        "numbers by name": pickle.dumps({"a": 1}),
        "tensors by number": pickle.dumps({1: 2}),
        "a tensor of no storage": b"ctorch._utils\n_rebuild_tensor_v2\n"
        b"(K\x01K\x00)))K\x00N" + b"tR.",
    }  # fmt: skip


def zipped(content: bytes, **options) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        archive.writestr("a/data.pkl", content)
    return stream.getvalue()


def archives(good: bytes) -> dict[str, bytes]:
    """Damaged copies of `good`, an archive that torch wrote."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
        infos = archive.infolist()
    root = next(iter(entries)).split("/")[0]
    data = next(info for info in infos if "/data/" in info.filename)

    def rewritten(change, compression=zipfile.ZIP_STORED):
        changed = change(list(entries.items()))
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for name, content in changed:
                archive.writestr(name, content)
        return stream.getvalue()

    def patched(offset, value):
        return good[:offset] + value + good[offset + len(value) :]

    bomb = bytes(100_000_000)
    return {
        "compressed": rewritten(lambda entries: entries, zipfile.ZIP_DEFLATED),
        "a deflated byteorder of 100 MB": rewritten(
            lambda entries: (
                [e for e in entries if "byteorder" not in e[0]] + [(f"{root}/byteorder", bomb)]
            ),
            zipfile.ZIP_DEFLATED,
        ),
        "a big byteorder": rewritten(
            lambda entries: (
                [e for e in entries if "byteorder" not in e[0]]
                + [(f"{root}/byteorder", b"little" * 1000)]
            )
        ),
        "big endian": rewritten(
            lambda entries: [
                (n, b"big" if n.endswith("byteorder") else content) for n, content in entries
            ]
        ),
        "two data.pkl": rewritten(lambda entries: [*entries, ("b/data.pkl", entries[0][1])]),
        "no data.pkl": rewritten(lambda entries: entries[1:]),
        "no storages": rewritten(lambda entries: [e for e in entries if "/data/" not in e[0]]),
        "a storage that is too short": rewritten(
            lambda entries: [(n, c[:-4] if "/data/" in n else c) for n, c in entries]
        ),
        "a local header with a longer name": patched(
            data.header_offset + 26, (len(data.filename) + 8).to_bytes(2, "little")
        ),
        "a local header with a longer extra field": patched(data.header_offset + 28, b"\x00\x00"),
        "a local header with another name": patched(data.header_offset + 30, b"x"),
        "no local header": patched(data.header_offset, b"\x00\x00\x00\x00"),
    }
