"""The ahead-of-time plugins in the registry of a genuine TensorRT 11: the lean runtime, which a CPU can load.

It has the real base classes, registry, fields and enumerations, and neither a builder nor a parser. So the library
takes the creators and makes plugins from fields; it never asks a plugin for a shape or a kernel, and nothing runs.
``tensorrt.plugin`` names two things that this library lacks, ``ITensor`` and ``TensorFormat``: placeholders stand in.
Types and aliases are asked of the plugins by Python, as the library would. What needs symbolic sizes is not: those cannot be
made here. The library runs in a child process, since it ends a process that uses what needs a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from foldkv.plugins.aot import EXTRAS
from foldkv.plugins.spec import NAMESPACE, PLUGINS, STATE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_lean_bindings") is None
    or importlib.util.find_spec("tensorrt_lean_libs") is None,
    reason="the wheels of lean TensorRT are not installed",
)
KINDS = {int: "INT64", float: "FLOAT64", str: "CHAR"}
TYPES = {"float32": "FLOAT", "int32": "INT32", "int64": "INT64", STATE: "BF16"}
VALUES: dict[str, Any] = {"ratio": 4, "topk": 512, "eps": 0.5, "rows": "dense", "layout_version": 1, "rotary": 16}

CHILD = """
import enum, importlib.metadata, json, sys, types, warnings
from pathlib import Path

warnings.simplefilter("ignore")
import numpy as np
import tensorrt_lean_bindings as lean

trt = types.ModuleType("tensorrt")
trt.__dict__.update({name: value for name, value in vars(lean).items() if not name.startswith("__")})
trt.__path__ = [str(Path(lean.__file__).parent)]
lacks = [name for name in ("ITensor", "TensorFormat") if not hasattr(trt, name)]
trt.ITensor, trt.TensorFormat = type("ITensor", (), {}), enum.IntEnum("TensorFormat", {"LINEAR": 0})
sys.modules["tensorrt"] = trt

from foldkv.plugins import aot
from foldkv.plugins.spec import NAMESPACE, PLUGINS

values, kinds = json.loads(sys.argv[1]), json.loads(sys.argv[2])
before = len(trt.get_plugin_registry().all_creators)
aot.register_plugins(trt, sm=80)
registry = trt.get_plugin_registry()
found = {}
for name, spec in PLUGINS.items():
    creator = registry.get_creator(name, "1", NAMESPACE)
    given = {key: values[key] for key in (*spec.attributes, *aot.EXTRAS)}
    held = {key: value.encode() if isinstance(value, str) else np.array([value]) for key, value in given.items()}
    types_of = {str: trt.PluginFieldType.CHAR, float: trt.PluginFieldType.FLOAT64, int: trt.PluginFieldType.INT64}
    fields = [trt.PluginField(key, held[key], types_of[type(given[key])]) for key in given]
    plugin = creator.create_plugin(
        name, NAMESPACE, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    inputs = [getattr(trt.DataType, kinds[tensor.dtype]) for tensor in spec.inputs]
    outputs = plugin.get_output_data_types(inputs, [tensor.rank for tensor in spec.inputs])
    found[name] = {
        "creator": creator.interface_info.kind,
        "fields": [[field.name, field.type.name] for field in creator.field_names],
        "core": plugin.interface_info.kind,
        "bases": [base.__name__ for base in type(plugin).__mro__ if issubclass(base, trt.IPluginV3QuickAOTBuild)],
        "values": plugin.attrs,
        "outputs": [type_.name for type_ in outputs],
        "aliases": [plugin.get_aliased_input(index) for index in range(plugin.num_outputs)],
        "again": registry.register_creator(creator, NAMESPACE),
        "copy": plugin.clone().attrs,
    }
version = importlib.metadata.version("tensorrt_lean_cu13_bindings")
print(json.dumps({"lacks": lacks, "version": version, "before": before, "after": len(registry.all_creators),
                  "plugins": found}))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What the library and the plugins said, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(VALUES), json.dumps(TYPES)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"the child ended with {done.returncode}:\n{done.stderr[-2000:]}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_library_is_a_genuine_tensorrt_11(said: dict[str, Any]) -> None:
    assert said["version"].startswith("11.")
    assert said["lacks"] == ["ITensor", "TensorFormat"]
    assert said["after"] - said["before"] == len(PLUGINS) == len(said["plugins"])


@pytest.mark.parametrize("operator", PLUGINS)
def test_the_registry_takes_the_creator(said: dict[str, Any], operator: str) -> None:
    found, spec = said["plugins"][operator], PLUGINS[operator]
    assert found["creator"] == "PLUGIN CREATOR_V3QUICK"
    types = {**spec.attributes, **EXTRAS}
    assert found["fields"] == [[name, KINDS[type_]] for name, type_ in types.items()]
    assert found["again"] is False, f"{NAMESPACE}::{operator} was not known to the registry"


@pytest.mark.parametrize("operator", PLUGINS)
def test_a_plugin_is_made_from_its_fields(said: dict[str, Any], operator: str) -> None:
    found, spec = said["plugins"][operator], PLUGINS[operator]
    assert found["core"] == "PLUGIN_V3QUICK_CORE"
    assert found["bases"] == ["_TemplateAOTPlugin", "IPluginV3QuickAOTBuild"]
    assert found["values"] == found["copy"] == {name: VALUES[name] for name in (*spec.attributes, *EXTRAS)}


@pytest.mark.parametrize("operator", PLUGINS)
def test_types_and_aliases_in_its_own_enumerations(said: dict[str, Any], operator: str) -> None:
    found, spec = said["plugins"][operator], PLUGINS[operator]
    assert found["outputs"] == [TYPES[tensor.dtype] for tensor in spec.outputs]
    assert found["aliases"] == [spec.aliases.get(index, -1) for index in range(len(spec.outputs))]
