import collections
import dataclasses
import sys

import pytest

from tfmq_fx.core.errors import ArtifactError
from tfmq_fx.core.output_classes import class_name, output_class


@dataclasses.dataclass
class Mine:
    a: object
    b: object = None


Named = collections.namedtuple("Named", "a b", defaults=[None])


@pytest.mark.parametrize("cls", [Mine, Named])
def test_classes_that_are_given_are_found_and_no_others(cls):
    for fields in (["a"], ["b", "a"]):
        assert output_class(class_name(cls), fields, [Mine, Named]) is cls
    for fields in (["b"], ["a", "c"], []):
        with pytest.raises(ArtifactError, match="takes the fields"):
            output_class(class_name(cls), fields, [cls])
    with pytest.raises(ArtifactError, match="give it by hand"):
        output_class(class_name(cls), ["a"])


def test_a_class_without_fields_is_none():
    with pytest.raises(ArtifactError, match="no dataclass and no named tuple"):
        output_class(class_name(dict), ["a"], [dict])


@pytest.mark.parametrize(
    "name",
    [
        "diffusers.models.unets.unet_2d:UNet2DModel",
        "diffusers.models.unets.unet_2d:dataclass",
        "diffusers.models.unets.unet_2d:UNet2DOutput.__init__",
        "diffusers.models.unets.unet_2d_condition:UNet2DOutput",
        "diffusers.utils.outputs:BaseOutput",
        "diffusers.pipelines.pipeline_utils:ImagePipelineOutput",
        "diffusers.models.__main__:X",
        "transformers.testing_utils:X",
        "",
        ":",
        "x" * 10_000,
    ],
)
def test_other_things_in_libraries_are_no_output_types(name):
    with pytest.raises(ArtifactError, match=r"is none of|is not an output type|cannot be imported"):
        output_class(name, ["sample"])


def test_a_folder_called_like_a_library_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ArtifactError, match=r"not the installed one|not installed"):
        output_class("transformers.modeling_outputs:BaseModelOutput", ["last_hidden_state"])
    assert not (tmp_path / "ran").exists()
