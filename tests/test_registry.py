"""Registry: keys, mappings, plug-ins and errors."""

import sys
import types

import pytest
from torch import nn

from em_lightning.registry import Registry


class Part:
    def __init__(self, size=1):
        self.size = size

    def __call__(self):
        return self.size


@pytest.fixture
def parts():
    registry = Registry("part")
    registry.register("plain")(Part)
    return registry


def test_build_from_a_key_class_mapping_or_instance(parts):
    instance = Part(7)
    module = types.ModuleType("module_of_parts")
    module.Part = Part
    sys.modules["module_of_parts"] = module
    assert parts.build("plain").size == 1
    assert parts.build("plain", size=2).size == 2
    assert parts.build(Part, size=3).size == 3
    assert parts.build({"name": "plain", "size": 4}, size=9).size == 4
    assert parts.build({"class_path": "module_of_parts.Part", "init_args": {"size": 5}}).size == 5
    assert parts.build(instance) is instance
    assert list(parts) == ["plain"] and len(parts) == 1 and "plain" in parts and parts["plain"] is Part
    assert parts.resolve({"name": "plain", "size": 4}) == (Part, {"size": 4})


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda r: r.build("plian"), ValueError, ["'plian'", "'plain'"]),
        (lambda r: r.build("zzz"), ValueError, ["'zzz'", "plain"]),
        (lambda r: r.build({"size": 3}), ValueError, ["'size': 3", "name"]),
        (lambda r: r.build({"class_path": "nowhere.Part"}), ValueError, ["class_path='nowhere.Part'"]),
        (lambda r: r.build({"class_path": "json.dumps"}), ValueError, ["json.dumps", "class"]),
        (lambda r: r.build("plain", colour=1), TypeError, ["part 'plain'", "colour"]),
        (lambda r: r.build(Part(), size=1), TypeError, ["Part", "size"]),
        (lambda r: r.build(None), TypeError, ["None", "plain"]),
        (lambda r: r.build(5), TypeError, ["5", "plain"]),
        (lambda r: r.register("plain")(type("Other", (), {})), ValueError, ["'plain'", "Part", "Other"]),
        (lambda r: r.register("Not A Key"), ValueError, ["key='Not A Key'"]),
    ],
)
def test_wrong_arguments_raise(parts, call, error, words):
    with pytest.raises(error) as caught:
        call(parts)
    assert all(word in str(caught.value) for word in words), str(caught.value)


class FakeEntryPoint:
    def __init__(self, name, load):
        self.name, self.value, self.load = name, f"elsewhere:{name}", load


class Other(Part):
    pass


def test_class_path_is_restricted_to_the_base():
    registry = Registry("part", base=Other)
    for path in ("test_registry.Part", "json.dumps", ".Part", "Part"):
        with pytest.raises(ValueError, match=f"class_path='{path}'"):
            registry.build({"class_path": path})


def test_plugins_are_read_once_and_only_when_needed(monkeypatch):
    calls = []

    def entry_points(group):
        calls.append(group)
        return [FakeEntryPoint("other", lambda: Part)]

    monkeypatch.setattr("em_lightning.registry.entry_points", entry_points)
    registry = Registry("part", group="parts")
    registry.register("plain")(type("Plain", (Part,), {}))
    registry.build("plain")
    assert calls == []
    assert registry.build("other", size=3).size == 3
    assert "none" not in registry and list(registry) == ["plain", "other"]
    assert calls == ["em_lightning.parts"]


def test_broken_plugin_error_names_the_plugin(monkeypatch):
    def load():
        raise RuntimeError("boom")

    monkeypatch.setattr("em_lightning.registry.entry_points", lambda group: [FakeEntryPoint("bad", load)])
    with pytest.raises(ImportError, match="'bad'.*elsewhere:bad.*boom"):
        Registry("part", group="parts")["bad"]


def test_a_class_path_imports_no_module_of_another_package(monkeypatch):
    """Importing a module runs its code, and a checkpoint of someone else may name any."""
    registry = Registry("part", base=nn.Module)
    for module in ("this", "venv.__main__", "em_lightning.cli.__main__", "torch.utils.hipify.version"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(ValueError, match=f"class_path='{module}.Part' .* not imported yet.* import {module}"):
            registry.build({"class_path": f"{module}.Part"})
        assert module not in sys.modules
    assert isinstance(registry.build({"class_path": "torch.nn.modules.activation.SiLU"}), nn.SiLU)
