"""Names of weight files in a model: none is missed, wherever it is and however it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from foldkv.errors import ArtifactError
from foldkv.onnx_files import FIELDS, check_external_files, external_files

MODEL = "model.onnx"


def test_every_way_from_a_model_to_a_name_is_followed() -> None:
    """The table of fields is what onnx itself says, for the version that is installed."""
    messages: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.name not in messages:
            inner = {field.number: field.message_type for field in message.fields if field.message_type}
            messages[message.name] = {number: found.name for number, found in inner.items()}
            waiting += inner.values()

    def reaches(name: str, seen: frozenset[str] = frozenset()) -> bool:
        return name == "TensorProto" or any(
            reaches(inner, seen | {name}) for inner in messages[name].values() if inner not in seen
        )

    expected = {
        name: {number: inner for number, inner in fields.items() if reaches(inner)} for name, fields in messages.items()
    }
    external = onnx.TensorProto.DESCRIPTOR.fields_by_name["external_data"]
    expected["TensorProto"] = {external.number: external.message_type.name}
    assert {name: fields for name, fields in expected.items() if fields} == FIELDS


def outside(name: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=name)
    return tensor


def graph(**parts: Any) -> onnx.GraphProto:
    return onnx.GraphProto(name="g", **parts)


def node(**parts: Any) -> onnx.NodeProto:
    return onnx.NodeProto(op_type="If", attribute=[onnx.AttributeProto(name="a", **parts)])


SPARSE = onnx.SparseTensorProto(values=outside("evil"), dims=[1])
PLACES: dict[str, onnx.ModelProto] = {
    "weight": onnx.ModelProto(graph=graph(initializer=[outside("evil")])),
    "sparse weight": onnx.ModelProto(graph=graph(sparse_initializer=[SPARSE])),
    "sparse indices": onnx.ModelProto(graph=graph(sparse_initializer=[onnx.SparseTensorProto(indices=outside("evil"))])),
    "constant": onnx.ModelProto(graph=graph(node=[node(t=outside("evil"))])),
    "constants": onnx.ModelProto(graph=graph(node=[node(tensors=[outside("evil")])])),
    "branch": onnx.ModelProto(graph=graph(node=[node(g=graph(node=[node(graphs=[graph(initializer=[outside("evil")])])]))])),
    "function": onnx.ModelProto(functions=[onnx.FunctionProto(node=[node(sparse_tensor=SPARSE)])]),
    "default of a function": onnx.ModelProto(
        functions=[onnx.FunctionProto(attribute_proto=[onnx.AttributeProto(t=outside("evil"))])]
    ),
    "training": onnx.ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=graph(initializer=[outside("evil")]))]),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_a_name_that_the_manifest_does_not_list_is_refused_wherever_it_is(
    place: onnx.ModelProto, tmp_path: Path
) -> None:
    model = onnx.ModelProto.FromString(place.SerializeToString())
    model.graph.node.append(helper.make_node("Identity", ["location"], ["y"]))
    model.graph.initializer.append(outside("weights.bin"))
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    assert external_files(tmp_path / MODEL) == {"evil", "weights.bin"}
    with pytest.raises(ArtifactError, match=r"(?s)model\.onnx names files .* does not list .*'evil'"):
        check_external_files(tmp_path, {MODEL, "weights.bin"}, MODEL)
    assert check_external_files(tmp_path, {"evil", "weights.bin"}, MODEL)


def test_names_are_relative_to_the_models_own_folder(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / MODEL).write_bytes(PLACES["weight"].SerializeToString())
    assert check_external_files(tmp_path, {"segments/evil"}, f"segments/{MODEL}") == ("evil",)
    with pytest.raises(ArtifactError, match="'evil'"):
        check_external_files(tmp_path, {"evil"}, f"segments/{MODEL}")


def field(tag: bytes, content: bytes) -> bytes:
    return tag + bytes([len(content)]) + content


def test_bytes_that_onnx_reads_as_a_name_are_read_as_one(tmp_path: Path) -> None:
    """Readers in C++ take long spellings of numbers and cut tags to 32 bits; a name must not hide behind those."""
    entry = field(b"\x8a\x00", b"location") + field(b"\x12", b"evil")
    tensor = field(b"\x6a", entry) + b"\x70\x01"
    for tag in (b"\x3a", b"\xba\x00", b"\xba\x80\x80\x80\x00", b"\xba\x80\x80\x80\x10"):
        content = field(tag, field(b"\x2a", tensor))
        if not tag.endswith(b"\x10"):  # onnx's reader in Python refuses this one
            found = onnx.ModelProto.FromString(content).graph.initializer
            assert [e.value for t in found for e in t.external_data] == ["evil"], tag
        (tmp_path / MODEL).write_bytes(content)
        assert external_files(tmp_path / MODEL) == {"evil"}
    # Of a field that is there twice readers take the last one; this one takes both.
    entry = field(b"\x0a", b"location") + field(b"\x12", b"good") + field(b"\x12", b"evil")
    (tmp_path / MODEL).write_bytes(field(b"\x3a", field(b"\x2a", field(b"\x6a", entry))))
    assert external_files(tmp_path / MODEL) == {"good", "evil"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x3a\x7f\x00",
        b"\x3b\x0a\x08location",
        b"\xff" * 11,
        b"\x3a\x05\x2a\x09location",
        b"\x39\x00",
        b"\x08\x80",
    ],
)
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MODEL).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx is (empty|not an ONNX model)"):
        external_files(tmp_path / MODEL)
