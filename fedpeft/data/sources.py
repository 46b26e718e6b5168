"""Reading records from where they are: built in, on the local disk, or a ``datasets`` id.

A spec is the same in a job file and in a client's own configuration:

- ``builtin:NAME``: found through the entry-point group ``fedpeft.data``, whose values are
  :class:`~fedpeft.data.records.DataSource` objects;
- a path: a file or folder on the local disk, see below;
- anything else: an id that the ``datasets`` library can load. Records of a data set with a ``client`` column are
  grouped into natural clients.

A folder is either one client or a folder of clients. **One client** is a folder that holds ``train`` and, if there is
one, ``heldout``, each as ``.jsonl``, ``.parquet``, ``.txt``, ``.py`` or a sub-folder of such files; or that holds such
files under any other name. A text file is one record. For image classification, a part is a folder of class folders
of image files (or JSONL or Parquet with images inside). **A folder of clients** holds one such folder per client, named
after it.

Without a held-out part, a tenth of the records is held out, chosen by a PRF over what they contain: adding, removing or
reordering records never moves another record from one side to the other.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> alice = ClientData("alice", ({"text": "a = 1"},), ({"text": "b = 2"},))
>>> write_client_folder(alice, folder / "alice")
>>> load_source(str(folder), "causal-lm") == (alice,)
True
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.data.records import TASKS, ClientData, Record, record_digest
from fedpeft.errors import FedPeftError, nearest
from fedpeft.prf import prf_bytes

_FIELD = "data.source"
_HELDOUT_SHARE = 0.1
_TABLES = (".jsonl", ".parquet")
_TEXTS = (".txt", ".py", ".md")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_PARTS = ("train", "heldout")
# Columns of public data sets that mean what our keys mean.
_ALIASES = {
    "text": ("content", "sentence", "document", "code"),
    "label": ("labels", "fine_label"),
    "image": ("img",),
}

_cache: dict[tuple[str, str], tuple[ClientData, ...]] = {}


def load_source(spec: str, task: str, cache: bool = True) -> tuple[ClientData, ...]:
    """The natural clients of a source, in a fixed order.

    Args:
        spec: ``builtin:NAME``, a local path or a ``datasets`` id.
        task: one of :data:`~fedpeft.data.records.TASKS`; decides which keys a record needs.
        cache: keep and reuse built-in and ``datasets`` sources within this process. A local path is always read anew:
            its owner may change it between rounds.

    Returns:
        One client named ``"all"`` if the source knows no owners.

    Raises:
        FedPeftError: there is no such source, it is unreadable, or it does not suit the task.
    """
    if task not in TASKS:
        meant = nearest(task, TASKS)
        hint = f"did you mean {meant!r}?" if meant else "choose one of " + ", ".join(TASKS)
        raise FedPeftError("unknown task", field="data.task", value=task, hint=hint)
    if cache and (spec, task) in _cache:
        return _cache[spec, task]
    if spec.startswith("builtin:"):
        clients = _load_builtin(spec, task)
    elif is_local_path(spec):
        return _load_path(Path(spec).expanduser(), spec, task)
    else:
        clients = _load_dataset_id(spec, task)
    if cache:
        _cache[spec, task] = clients
    return clients


def load_client_data(spec: str, task: str) -> ClientData:
    """One owner's data: a folder, or ``builtin:SOURCE/CLIENT``.

    Raises:
        FedPeftError: there is no such data, or it belongs to several owners.
    """
    source, _, owner = spec.partition("/") if spec.startswith("builtin:") else (spec, "", "")
    clients = load_source(source, task)
    if owner:
        found = next((c for c in clients if c.name == owner), None)
        if found is None:
            names = ", ".join(c.name for c in clients)
            raise FedPeftError("no such client in the source", field="data", value=spec, hint=f"known: {names}")
        return found
    if len(clients) != 1:
        raise FedPeftError(
            f"holds the data of {len(clients)} owners",
            field="data",
            value=spec,
            hint="name the folder of one owner, or builtin:SOURCE/CLIENT",
        )
    return clients[0]


def is_local_path(spec: str) -> bool:
    """Whether ``spec`` means a place on the local disk rather than an id such as ``org/name``."""
    return spec.startswith((".", "~", "/", "\\")) or os.path.isabs(spec) or spec.count("/") > 1 or Path(spec).exists()


def write_client_folder(data: ClientData, directory: Path | str) -> None:
    """Write one client's records as ``train.jsonl`` and ``heldout.jsonl``.

    :func:`load_source` reads them back equal to the last bit: images are written as the base64 of their float32 bytes.

    Raises:
        FedPeftError: a record holds something that JSON cannot express, or the folder cannot be written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part, records in (("train", data.train), ("heldout", data.heldout)):
            lines = [json.dumps({k: _to_json(v) for k, v in record.items()}) + "\n" for record in records]
            (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    except TypeError as error:
        raise FedPeftError(f"a record cannot be written as JSON: {error}", field=_FIELD, value=data.name) from error
    except OSError as error:
        raise FedPeftError(f"cannot write the client folder: {error.strerror}", value=str(folder)) from error


def hold_out(records: Iterable[Record], where: str) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """``records`` as (train, held out): about a tenth is held out, at least one, chosen by content.

    Equal records go to the same side, so that nothing that is trained on is also held out.

    Raises:
        FedPeftError: there are fewer than two different records.
    """
    every = tuple(records)
    ranks = [prf_bytes(0, "heldout-split", record_digest(record)) for record in every]
    if len(set(ranks)) < 2:
        raise FedPeftError(
            "a held-out part cannot be split off fewer than two different records",
            field=_FIELD,
            value=where,
            hint="give a heldout file beside train, or more records",
        )
    edge = max(min(ranks), int(_HELDOUT_SHARE * 2**64).to_bytes(8, "big"))
    if all(rank <= edge for rank in ranks):
        edge = sorted(set(ranks))[-2]
    train = tuple(record for record, rank in zip(every, ranks, strict=True) if rank > edge)
    return train, tuple(record for record, rank in zip(every, ranks, strict=True) if rank <= edge)


def _load_builtin(spec: str, task: str) -> tuple[ClientData, ...]:
    name = spec.removeprefix("builtin:")
    points = {p.name: p for p in importlib.metadata.entry_points(group="fedpeft.data")}
    if name not in points:
        meant = nearest(name, points)
        hint = f"did you mean 'builtin:{meant}'?" if meant else "known: " + ", ".join(sorted(points))
        raise FedPeftError("no such built-in data", field=_FIELD, value=spec, hint=hint)
    source = points[name].load()
    if source.task != task:
        raise FedPeftError(
            f"these data are for {source.task}, not for {task}", field=_FIELD, value=spec, hint="change data.task"
        )
    clients: tuple[ClientData, ...] = tuple(source.load())
    return clients


# --- local files -----------------------------------------------------------------------------------------------------


def _load_path(path: Path, spec: str, task: str) -> tuple[ClientData, ...]:
    if not path.exists():
        raise FedPeftError("no such file or folder", field=_FIELD, value=spec, hint="check the path")
    try:
        if path.is_file():
            train, heldout = hold_out(_read_file(path, task), spec)
            return (ClientData("all", train, heldout),)
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _from_datasets(_import_datasets(spec).load_from_disk(str(path)), spec, task)
        if _is_client(path, task):
            return (_read_client(path, "all", task),)
        folders = [sub for sub in sorted(path.iterdir()) if sub.is_dir() and _is_client(sub, task)]
        if not folders:
            raise FedPeftError(
                f"the folder holds no data for {task}",
                field=_FIELD,
                value=spec,
                hint="it needs train.jsonl (or .parquet, .txt, .py, class folders of images), or one such folder per "
                "client",
            )
        return tuple(_read_client(folder, folder.name, task) for folder in folders)
    except OSError as error:
        raise FedPeftError(f"cannot be read: {error.strerror}", field=_FIELD, value=spec) from error


def _data_files(folder: Path, task: str) -> list[Path]:
    wanted = _TABLES if task != "causal-lm" else _TABLES + _TEXTS
    return [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in wanted]


def _class_folders(folder: Path) -> list[Path]:
    return [
        sub
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and any(p.suffix.lower() in _IMAGES for p in sub.iterdir())
    ]


def _is_client(folder: Path, task: str) -> bool:
    if _data_files(folder, task) or (folder / "train").is_dir():
        return True
    return task == "image-classification" and bool(_class_folders(folder))


def _read_client(folder: Path, name: str, task: str) -> ClientData:
    parts = {part: _read_part(folder, part, task) for part in _PARTS}
    if parts["train"] is None and parts["heldout"] is not None:
        raise FedPeftError("there is heldout but no train", field=_FIELD, value=str(folder), hint="add train.jsonl")
    if parts["train"] is None:
        # Files under other names: all of them are training data.
        found = [record for file in _data_files(folder, task) for record in _read_file(file, task)]
        if task == "image-classification":
            found += _read_classes(folder, folder)
        parts["train"] = found
    if not parts["train"]:
        raise FedPeftError("there are no records", field=_FIELD, value=str(folder), hint="a client needs at least one")
    if parts["heldout"]:
        return ClientData(name, tuple(parts["train"]), tuple(parts["heldout"]))
    train, heldout = hold_out(parts["train"], str(folder))
    return ClientData(name, train, heldout)


def _read_part(folder: Path, part: str, task: str) -> list[Record] | None:
    """The records of ``train`` or ``heldout``; ``None`` if the folder has no such part."""
    files = [p for p in _data_files(folder, task) if p.stem == part]
    records: list[Record] = [record for file in files for record in _read_file(file, task)]
    sub = folder / part
    if sub.is_dir():
        wanted = _TABLES if task != "causal-lm" else _TABLES + _TEXTS
        nested = [p for p in sorted(sub.rglob("*")) if p.is_file() and p.suffix.lower() in wanted]
        records += [record for file in nested for record in _read_file(file, task)]
        if task == "image-classification":
            records += _read_classes(sub, folder)
    return records if files or sub.is_dir() else None


def _read_classes(folder: Path, client: Path) -> list[Record]:
    """Class folders of images. A numeric folder name is the label; other names count in the order of ``classes.txt``
    beside the data (or one level up, shared by all clients), else in alphabetical order."""
    folders = _class_folders(folder)
    names = [sub.name for sub in folders]
    order: list[str] = sorted(names)
    for listed in (client / "classes.txt", client.parent / "classes.txt"):
        if listed.is_file():
            order = listed.read_text(encoding="utf-8").split()
            break
    records: list[Record] = []
    for sub in folders:
        if all(name.isdecimal() for name in names):
            label = int(sub.name)
        elif sub.name in order:
            label = order.index(sub.name)
        else:
            raise FedPeftError("class folder is not in classes.txt", field=_FIELD, value=str(sub), hint="add its name")
        for file in sorted(sub.iterdir()):
            if file.suffix.lower() in _IMAGES:
                records.append({"image": _decode_image(file.read_bytes(), str(file)), "label": label})
    return records


def _read_file(path: Path, task: str) -> list[Record]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif suffix == ".parquet":
        rows = _read_parquet(path)
    elif suffix in _TEXTS and task == "causal-lm":
        try:
            return [{"text": path.read_text(encoding="utf-8")}]
        except UnicodeDecodeError as error:
            raise FedPeftError(
                "the file is not UTF-8 text", field=_FIELD, value=str(path), hint="convert it"
            ) from error
    else:
        raise FedPeftError(
            f"cannot read {path.suffix or 'such'} files for {task}", field=_FIELD, value=str(path), hint="use JSONL"
        )
    return [_normalise(row, f"{path}, record {number}", task) for number, row in enumerate(rows, start=1)]


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    try:
        # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise FedPeftError("a line is no JSON object", field=_FIELD, value=f"{path}, line {number}")
                rows.append(row)
    except json.JSONDecodeError as error:
        raise FedPeftError(
            f"a line is not valid JSON: {error.msg}", field=_FIELD, value=f"{path}, line {number}", hint="correct it"
        ) from error
    except UnicodeDecodeError as error:
        raise FedPeftError("the file is not UTF-8 text", field=_FIELD, value=str(path), hint="convert it") from error
    return rows


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise _missing("pyarrow", str(path)) from error
    try:
        rows: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise FedPeftError(
            f"not a readable Parquet file: {str(error).splitlines()[0]}", field=_FIELD, value=str(path)
        ) from error
    return rows


def _missing(package: str, what: str) -> FedPeftError:
    return FedPeftError(
        f"reading this needs the package {package}", field=_FIELD, value=what, hint="pip install 'fedpeft[data]'"
    )


# --- the datasets library --------------------------------------------------------------------------------------------


def _import_datasets(spec: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", spec) from error
    return datasets


def _load_dataset_id(spec: str, task: str) -> tuple[ClientData, ...]:
    datasets = _import_datasets(spec)
    try:
        loaded = datasets.load_dataset(spec)
    # The library raises its own errors, those of the hub client and of HTTP for: unknown id, gated, offline, a
    # configuration to choose. All of them are the user's to mend.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FedPeftError(
            f"the data set cannot be fetched: {lines[0][:300]}",
            field=_FIELD,
            value=spec,
            hint="check the id and the network, or give a local folder or builtin:NAME",
        ) from error
    return _from_datasets(loaded, spec, task)


def _from_datasets(loaded: Any, spec: str, task: str) -> tuple[ClientData, ...]:
    splits: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    if "train" not in splits:
        raise FedPeftError(
            f"the data set has no train split (it has {', '.join(splits)})", field=_FIELD, value=spec, hint="add one"
        )
    heldout_name = next((name for name in ("heldout", "validation", "test") if name in splits), None)

    def read(name: str) -> list[Record]:
        return [_normalise(row, f"{spec}, {name} {i}", task) for i, row in enumerate(splits[name], start=1)]

    train, heldout = read("train"), read(heldout_name) if heldout_name else []
    owners = sorted({str(record["client"]) for record in train if "client" in record})
    if len(owners) < 2 or any("client" not in record for record in [*train, *heldout]):
        groups = [("all", train, heldout)]
    else:
        groups = [
            (o, [r for r in train if str(r["client"]) == o], [r for r in heldout if str(r["client"]) == o])
            for o in owners
        ]
    clients = []
    for name, mine, mine_heldout in groups:
        if mine_heldout:
            clients.append(ClientData(name, tuple(mine), tuple(mine_heldout)))
        else:
            clients.append(ClientData(name, *hold_out(mine, f"{spec}, client {name}")))
    return tuple(clients)


# --- one record ------------------------------------------------------------------------------------------------------


def _normalise(row: Mapping[str, Any], where: str, task: str) -> Record:
    """A row of a file as a record: our key names, images as float32 arrays."""
    record = dict(row)
    needed = {"causal-lm": ("text",), "sequence-classification": ("text", "label")}.get(task, ("image", "label"))
    for key in needed:
        if key not in record:
            alias = next((a for a in _ALIASES[key] if a in record), None)
            if alias is None:
                have = ", ".join(sorted(record)) or "none"
                raise FedPeftError(
                    f"a record has no key {key!r} (keys: {have})", field=_FIELD, value=where, hint=f"{task} needs it"
                )
            record[key] = record.pop(alias)
    if "image" in record:
        record["image"] = _to_image(record["image"], where)
    return record


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, dtype="<f4")
        return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}
    return value.item() if isinstance(value, np.generic) else value


def _to_image(value: Any, where: str) -> np.ndarray:
    try:
        if isinstance(value, Mapping) and "float32" in value:
            raw = np.frombuffer(base64.b64decode(value["float32"], validate=True), dtype="<f4")
            image = raw.reshape(value["shape"]).astype(np.float32)
        elif isinstance(value, Mapping) and value.get("bytes"):
            image = _decode_image(value["bytes"], where)
        elif isinstance(value, bytes):
            image = _decode_image(value, where)
        elif hasattr(value, "convert"):  # a PIL image, as the datasets library gives them
            image = _pil_to_array(value)
        else:
            image = np.asarray(value, dtype=np.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise FedPeftError(f"'image' cannot be read: {error}", field=_FIELD, value=where) from error
    if image.ndim not in (2, 3) or not image.size:
        raise FedPeftError(
            f"'image' has shape {image.shape}", field=_FIELD, value=where, hint="use (H, W) or (H, W, C)"
        )
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise FedPeftError("'image' has values outside [0, 1]", field=_FIELD, value=where, hint="divide by 255")
    return image


def _decode_image(data: bytes, where: str) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise _missing("pillow", where) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _pil_to_array(image)
    except (UnidentifiedImageError, OSError) as error:
        raise FedPeftError("not a readable image", field=_FIELD, value=where, hint="use PNG or JPEG") from error


def _pil_to_array(image: Any) -> np.ndarray:
    grey = image.mode in ("1", "L", "I", "F", "I;16")
    array: np.ndarray = np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32) / np.float32(255.0)
    return array
