"""torch.save files: torch itself as oracle, then every way to break or to abuse one."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.errors import (
    CheckpointError,
    MalformedFile,
    TruncatedFile,
    UnsafePickle,
    UnsupportedContainer,
    UnsupportedDtype,
)
from diffquant.io import open_source, pickle_scan, torch_unpickle

REAL = Path(__file__).parents[3] / "shared" / "data" / "real"
torch = pytest.importorskip("torch")

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
}


def raw(tensor):
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def check(path, state):
    with open_source(path) as source:
        assert list(source.specs) == list(state)
        for key, tensor in state.items():
            spec = source.specs[key]
            assert spec.dtype == DTYPES[tensor.dtype]
            assert spec.shape == tuple(tensor.shape)
            assert source.read(key).tobytes() == raw(tensor)
            if spec.rows > 1:
                assert source.read(key, (1, 2)).tobytes() == raw(tensor[1:2])
        return dict(source.metadata)


@pytest.fixture
def state():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    found = OrderedDict((str(dtype), torch.zeros(2, 3, dtype=dtype)) for dtype in DTYPES)
    found |= {
        "base": base,
        "transposed": base.t(),
        "slice": base[2:4, 1:7:2],
        "column": base[:, 3],
        "tail": base[5],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "größe 重み/x": torch.ones(1),
    }
    return found


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saves(tmp_path, state, zipped, options):
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped, **options)
    check(path, state)


def test_module_state_dict_with_its_hidden_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "m.pth")
    check(tmp_path / "m.pth", module.state_dict())


def test_training_checkpoint_gives_its_state_dict_and_notes(tmp_path, state):
    everything = {
        "state_dict": state,
        "epoch": 7,
        "name": "x" * 5000,
        "numpy": np.float64(0.5),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "betas": (0.9, 0.99)},
    }
    torch.save(everything, tmp_path / "m.ckpt")
    notes = check(tmp_path / "m.ckpt", state)
    assert notes["epoch"] == "7"
    assert len(notes["name"]) == 1000
    assert notes["optimizer"] == "dict of 2, not read"


@pytest.mark.parametrize("name", ["model", "module", "ema", "params_ema"])
def test_usual_wrappers_are_opened(tmp_path, name):
    torch.save({name: {"w": torch.ones(2)}, "step": 3}, tmp_path / "m.pt")
    assert check(tmp_path / "m.pt", {"w": torch.ones(2)}) == {"step": "3"}


def test_nested_dicts_and_lists_become_dotted_keys(tmp_path):
    tree = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": torch.ones(1, 4)},
        "list": [torch.zeros(1)],
    }
    torch.save(tree, tmp_path / "m.pt")
    notes = check(
        tmp_path / "m.pt", {"string_to_param.*": torch.ones(1, 4), "list.0": torch.zeros(1)}
    )
    assert notes["string_to_token.*"] == "265"


def test_bare_tensor_is_called_tensor(tmp_path):
    torch.save(torch.ones(3), tmp_path / "m.pt")
    check(tmp_path / "m.pt", {"tensor": torch.ones(3)})


def test_shared_storage_is_read_for_both(tmp_path):
    base = torch.randn(4, 4)
    check_state = {"a": base, "b": base, "c": base.view(16)}
    torch.save(check_state, tmp_path / "m.pt")
    check(tmp_path / "m.pt", check_state)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name",
    [
        "lora/catundchat_sd15.bin",
        "textual_inversion/fastai_learned_embeds.bin",
        "taesd/taef2_decoder.pth",
        "tiny_diffusion/sdaloglu_ddpm_mnist.pth",
        "lpips/vgg.pth",
    ],
)
def test_real_files_equal_torch_load(name):
    path = REAL / name
    if not path.exists():
        pytest.skip("no reference data")
    check(path, torch.load(path, map_location="cpu", weights_only=True))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"w": torch.zeros(2, dtype=torch.complex64)}, UnsupportedDtype, "Complex"),
        ({"a": 1}, UnsupportedContainer, "without any tensor"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, MalformedFile, "flatten to 'a.b'"),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path, value, error, message):
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(error, match=message):
        open_source(tmp_path / "m.pt")


# -- abuse -------------------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def store(path, data, kind):
    """Put a pickle where each kind of file has it."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/byteorder", "little")
    elif kind == "bare":
        path.write_bytes(data)
    else:
        head = [
            pickle.dumps(part, 2)
            for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        ]
        path.write_bytes(b"".join([*head, data, pickle.dumps([], 2)]))


# What the attack would leave behind if it ran; each test checks that it is not there.
MARK = "ran"
ATTACKS = {
    "os.system": (lambda p: pickle.dumps(Evil(os.system, f"touch {p}"), 2), "posix.system"),
    "eval": (lambda p: pickle.dumps(Evil(eval, f"open({str(p)!r},'w')"), 4), "builtins.eval"),
    "getattr": (
        lambda p: b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R.",
        "builtins.getattr",
    ),
    "text protocol": (lambda p: f"cos\nsystem\n(S'touch {p}'\ntR.".encode(), "os.system"),
    "inst": (lambda p: f"(S'touch {p}'\nios\nsystem\n.".encode(), "os.system"),
    "memoized names": (
        lambda p: (
            b"\x80\x04\x8c\x06system\x94\x8c\x02os\x940h\x01h\x00\x93\x8c"
            + bytes([len(f"touch {p}")])
            + f"touch {p}".encode()
            + b"\x85R."
        ),
        "os.system",
    ),
    "put and get": (
        lambda p: b"\x80\x02X\x02\0\0\0osq\x05X\x06\0\0\0systemq\x0600h\x05h\x06\x93.",
        "os.system",
    ),
    "dup": (lambda p: b"\x80\x04\x8c\x02os2\x93.", "os.os"),
    "computed name": (
        lambda p: b"\x80\x04\x8c\x02os\x8c\x06system\x86\x8c\x01x\x93.",
        "computed while loading",
    ),
    "dotted name": (lambda p: b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "torch.os.system"),
    "inside allowed module": (lambda p: b"\x80\x02ctorch\nload\n.", "torch.load"),
    "hidden in torch": (
        lambda p: b"\x80\x02ctorch._utils\n_import_dotted_name\n.",
        "_import_dotted_name",
    ),
    "extension": (lambda p: b"\x80\x02\x82\x01.", "copyreg extension 1"),
    "lightning": (
        lambda p: b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n.",
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    ),
    "after an allowed one": (
        lambda p: b"\x80\x02ccollections\nOrderedDict\n)Rcbuiltins\nexec\n.",
        "builtins.exec",
    ),
}


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_code_in_a_pickle_is_refused_by_name_and_does_not_run(tmp_path, attack, kind):
    make, name = ATTACKS[attack]
    path = tmp_path / "m.ckpt"
    store(path, make(tmp_path / MARK), kind)
    with pytest.raises(UnsafePickle) as error:
        open_source(path)
    assert any(name in item for item in error.value.names)
    assert name in str(error.value)
    assert error.value.exit_code == 5
    assert not (tmp_path / MARK).exists()


def test_all_offending_names_are_listed(tmp_path):
    store(tmp_path / "m.pt", b"\x80\x02cos\nsystem\ncbuiltins\neval\nctorch\nSize\n.", "zip")
    with pytest.raises(UnsafePickle) as error:
        open_source(tmp_path / "m.pt")
    assert error.value.names == ("builtins.eval", "os.system")


def build_state(patch_globals):
    """A pickle of one allowed object on which BUILD or REDUCE is used in an odd way."""
    return b"\x80\x02" + patch_globals + b"."


@pytest.mark.parametrize(
    "body",
    [
        b"ctorch._utils\n_rebuild_parameter\n}X\x05\0\0\0_call}sb",  # BUILD on a function
        b"ccollections\nOrderedDict\nN}X\x05\0\0\0itemsK\x01s\x86b",  # slot state on a class
        b"ccollections\nOrderedDict\n)\x81",  # NEWOBJ of a function
        b"ctorch\nFloatStorage\n)R",  # calling a type
        b"ctorch\nTensor\n)R",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nK\x01)NtR",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01K\x01tR",
        b"(K\x01K\x02K\x03K\x04K\x05tQ",  # persistent id that is no storage
        b"(X\x07\0\0\0storageK\x01X\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ",
        b"ccollections\nOrderedDict\n(K\x05tR",
        b"c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0utf-8\x86R",
        b"0",  # empty stack
        b"(0",
        b"h\x07",  # memo entry that was never stored
        b"r\xff\xff\xff\x7f",  # memo index that would make the unpickler allocate 16 GB
        b"K\x01r\xff\xff\xff\x7f",
        b"K\x01p99999999999\n",
        b"\x8e" + struct.pack("<Q", 2**40),  # BINBYTES8 longer than the file
        b"\x96" + struct.pack("<Q", 2**62),
        b"\xff",
        b"}(" + b"N" + b"\x85" * 200_000 + b"K\x01u",  # hashing it would overflow the C stack
        b"}}K\x01s",  # unhashable key
        b"K\x01(",
        b"X\xff\xff\xff\xff",
    ],
)
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_odd_pickles_are_malformed_not_crashes(tmp_path, kind, body):
    store(tmp_path / "m.pt", build_state(body), kind)
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "m.pt")


def saved(tensor, edit, zipped=True):
    """Save one tensor, then edit its pickle (same file otherwise)."""
    buffer = io.BytesIO()
    torch.save({"w": tensor}, buffer, _use_new_zipfile_serialization=zipped)
    if not zipped:
        return edit(buffer.getvalue())
    source, target = zipfile.ZipFile(buffer), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            data = source.read(info)
            archive.writestr(info.filename, edit(data) if info.filename.endswith(".pkl") else data)
    return target.getvalue()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x06", b"K\x07", "expected|described|ends at"),  # storage of 7 elements
        (b"K\x00K\x02K\x03\x86", b"K\x01K\x02K\x03\x86", "ends at byte 28"),  # offset 1
        (b"K\x02K\x03\x86", b"K\xffK\x03\x86", "ends at byte"),  # 255 rows
        (b"K\x03K\x01\x86", b"K\xffK\x01\x86", "ends at byte"),  # row stride 255
        (b"K\x03K\x01\x86", b"J\xfd\xff\xff\xffK\x01\x86", "negative"),
        (b"K\x02K\x03\x86", b"J\xfe\xff\xff\xffK\x03\x86", "bad dimension"),
        (b"K\x03K\x01\x86", b"K\x03\x85", "1 strides"),
        (b"FloatStorage", b"DoubleStorage"[:12], "asks for"),
        (b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86", "ends at byte"),
        (b"K\x02K\x03\x86q\x08K\x03K", b"J\xff\xff\xff\x7fK\x03\x86q\x08K\0K", "repeats"),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, old, new, message):
    def edit(data):
        assert old in data
        return data.replace(old, new, 1)

    (tmp_path / "m.pt").write_bytes(saved(torch.arange(6.0).reshape(2, 3), edit))
    with pytest.raises((CheckpointError, UnsafePickle), match=message):
        open_source(tmp_path / "m.pt")


def zip_file(path, entries, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries:
            archive.writestr(name, data)


def test_zip_oddities_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    zip_file(path, [("readme.txt", "x")])
    with pytest.raises(MalformedFile, match="not a torch"):
        open_source(path)
    zip_file(path, [("a/data.pkl", b"\x80\x02}."), ("b/data.pkl", b"\x80\x02}.")])
    with pytest.raises(MalformedFile, match="without one"):
        open_source(path)
    zip_file(path, [("a/data.pkl", b"\x80\x02}."), ("a/constants.pkl", b"")])
    with pytest.raises(UnsupportedContainer, match="TorchScript"):
        open_source(path)
    zip_file(path, [("a/data.pkl", b"\x80\x02}."), ("a/byteorder", "big")])
    with pytest.raises(UnsupportedContainer, match="big-endian"):
        open_source(path)
    zip_file(path, [("a/data.pkl", bytes(10 << 20))], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(MalformedFile, match="compressed"):
        open_source(path)


def test_missing_and_short_storages_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(6.0)}, buffer)
    archive = zipfile.ZipFile(buffer)
    entries = {info.filename: archive.read(info) for info in archive.infolist()}
    key = next(name for name in entries if name.endswith("data/0"))
    zip_file(path, [(name, data) for name, data in entries.items() if name != key])
    with pytest.raises(MalformedFile, match="storage '0' is missing"):
        open_source(path)
    zip_file(path, (entries | {key: entries[key][:-1]}).items())
    with pytest.raises(TruncatedFile, match="23 bytes, 24 expected"):
        open_source(path)


def test_legacy_storages_are_checked(tmp_path):
    path = tmp_path / "m.pt"
    whole = saved(torch.arange(6.0), lambda data: data, zipped=False)
    path.write_bytes(whole[:-1])
    with pytest.raises(TruncatedFile, match="ends at byte"):
        open_source(path)
    count = whole.rindex(struct.pack("<Q", 6))
    path.write_bytes(whole[:count] + struct.pack("<Q", 2**40) + whole[count + 8 :])
    with pytest.raises(MalformedFile, match="elements, 6 expected"):
        open_source(path)


def test_laughing_dicts_do_not_expand(tmp_path):
    body = b"}q\x00K\x00Ns"  # a dict, doubled 30 times by reference
    for index in range(30):
        body += (
            b"}(K\x00"
            + b"h"
            + bytes([index])
            + b"K\x01h"
            + bytes([index])
            + b"uq"
            + bytes([index + 1])
        )
    store(tmp_path / "m.pt", b"\x80\x02" + body + b".", "zip")
    with pytest.raises(MalformedFile, match="nested over"):
        open_source(tmp_path / "m.pt")


def test_repeated_copies_are_bounded(tmp_path):
    body = (
        b"ccollections\nOrderedDict\nq\x00]("
        + b"".join(b"J" + struct.pack("<i", index) + b"K\x01\x86" for index in range(50_000))
        + b"e\x85q\x01"
    )
    body += b"0" + b"h\x00h\x01R0" * 1000 + b"N"
    store(tmp_path / "m.pt", b"\x80\x02" + body + b".", "zip")
    with pytest.raises(MalformedFile, match="copies more than"):
        open_source(tmp_path / "m.pt")


def test_io_never_imports_torch(tmp_path):
    import subprocess
    import sys

    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    code = (
        "import sys\nfrom diffquant.io import open_source\n"
        f"with open_source({str(tmp_path / 'm.pt')!r}) as source:\n"
        "    assert source.read('w').size == 8\n"
        "assert not {'torch', 'numba', 'gguf', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("body", [b"r\xff\xff\xff\x7f", b"p99999999\n"])
def test_memo_index_that_would_allocate_gigabytes_is_refused_before_loading(tmp_path, body):
    store(tmp_path / "m.pt", build_state(b"K\x01" + body), "zip")
    with pytest.raises(MalformedFile, match="memo index"):
        open_source(tmp_path / "m.pt")


def test_unpickler_refuses_names_even_where_the_scan_was_skipped(tmp_path):
    data = b"\x80\x02cos\nsystem\n."
    with pytest.raises(UnsafePickle, match=r"os\.system"):
        torch_unpickle.load(data, tmp_path, found=pickle_scan.Scan((), len(data)))
