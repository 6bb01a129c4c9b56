"""The native schemas (csrc/ops.cpp) are those of the reference functions."""

import pytest
import torch

import recsparse_kernels as rk
from recsparse_kernels import triton as triton_backend
from recsparse_kernels.ops._backend import OPS

pytestmark = pytest.mark.skipif(not rk.cpu_levels(), reason="the native library is not built")

CONFIGURATION = {"cpu_level", "cpu_levels", "set_cpu_level", "use_huge_pages", "set_huge_pages"}
CONFIGURATION |= {"cuda_runtime_version", "cuda_driver_version", "set_check_indices", "set_tf32"}


def arguments(schema):
    return [
        (a.name, str(a.type), a.default_value, a.alias_info is not None and a.alias_info.is_write)
        for a in schema.arguments
    ]


@pytest.mark.parametrize("name", sorted(OPS))
def test_native_schema_equals_reference(name):
    op = OPS[name]
    if "native" not in op._overloads:
        pytest.skip("runs on the reference only")
    native, reference = op.overload("native")._schema, op.overload("reference")._schema
    assert arguments(native) == arguments(reference)
    assert [str(r.type) for r in native.returns] == [str(r.type) for r in reference.returns]


def test_every_native_op_has_a_definition():
    names = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("recsparse::")
    }
    assert names - CONFIGURATION == {name for name, op in OPS.items() if "native" in op._overloads}


@pytest.mark.parametrize("name", sorted(triton_backend.LAUNCHERS))
def test_triton_launcher_has_the_schema_of_its_reference(name):
    op = OPS[name]
    assert torch.library.infer_schema(triton_backend.LAUNCHERS[name], mutates_args=op.mutates) == op.schema
